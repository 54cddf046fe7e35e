"""Multi-task PPO on MinAtar whose networks may be mixtures of experts: Soft MoE, top-k or hardcoded routing.

Paper   Willi, Obando-Ceron, Foerster, Dziugaite and Castro 2024, "Mixture of Experts in a Mixture of RL settings",
        arXiv 2406.18420; before it Obando-Ceron et al. 2024, arXiv 2402.08609, whose code is in Dopamine (labs/moes).
Layer   Soft MoE (Puigcerver et al. 2023): tokens X (m, d), L = X Phi (m, n p); dispatch = softmax of L over the tokens,
        combine = over the slots; expert i maps its p rows of the slots dispatch^T X, Y = combine f(dispatch^T X).
        One token: y = sum_i softmax(x Phi)_i f_i(x). topk: the k largest of the softmax. hardcoded: y = f_task(x).

Run       python algos/ppo_moe_multitask.py --actor-moe big --critic-moe big --protocol continual
          python algos/ppo_moe_multitask.py --tasks freeway seaquest --num-envs 64 --router topk --tokens persamp
Resume    python algos/ppo_moe_multitask.py --resume runs/NAME              # after Ctrl-C, kill -9 or a crash
Evaluate  python algos/ppo_moe_multitask.py --evaluate runs/NAME --video    # every task, both policies, a GIF

MinAtar (Young and Tian 2019) is a package of its own under GPL-3.0, imported where its games are made, not at the top.

What differs from ppo.py:
1. Discrete actions and pictures: actor and critic are each a 3x3 convolution to 16 channels (a matmul over the 64
   patches), 128 units and a head, as is usual for MinAtar. Neither rewards nor observations are normalised, and
   nothing runs under torchrun. Settings are PureJaxRL's, except: 63 environments, not 64 (three equal shares);
   3,024,000 steps, not 10^7; no clipping of the value loss, nor their second factor 1/2. Its games are gymnax's, where
   the limit of 1,000 steps terminates an episode; here it truncates, and MinAtar's sticky actions stay.
2. T tasks. multitask: equal shares of the environments. continual: all environments play one task, then the next,
   --cycles times. The weights stay; the learning rate is annealed within each phase, so that every task has the
   same, and Adam starts anew with each: its moments would go on moving an expert whose task is over.
3. --actor-moe, --critic-moe: baseline; middle (the 128 units), final (the head), all (each layer, each with a router of
   its own) or big (each expert is a whole network, routed by the picture) are mixtures of n experts. Every expert has
   the width of the layer that it replaces (middle: see 4). --match-params divides it by n, or for all and big by the
   root of n: their largest matrix shrinks at both ends. All experts together then have about the baseline's parameters
   (within 10% for up to 8 experts, 20% for up to 32, as widths are whole numbers; the routers come on top).
4. middle has PerConv tokens by default: each of the 64 cells is a token of 16 channels. An expert is then 16-128-16
   with ReLU, the tokens keep their size and are flattened to 1,024 inputs of the head, as in the code of 2402.08609.
   The baseline's matrix of 1,024 x 128 is gone: 8 experts have 41,078 parameters per actor, the baseline has 132,854.
   --tokens persamp: the token is the sample, and the layer is the baseline's with n experts (in their code an expert
   maps back to the size of its token).
5. Measured at every evaluation: see measure() and moe.csv.
Where this differs from the papers: one slot per expert where their code has m / n (--slots 8 is that for n = 8, and the
run takes three to four times as long). A cell's output is a weighted mean of the same n p vectors for all 64 cells of a
picture, so the cells differ in at most n p - 1 of their 16 dimensions: in 2 with three experts. Padding, action set,
--match-params, the order of phases, and annealing and Adam of 2 are ours. Advantages are normalised over a minibatch,
all its games together, so a game with small rewards has a small part in the actor's gradient. With topk and hardcoded
an expert computes the tokens that chose it and no others, as many as they are: nothing is dropped. All the same, with
PerConv tokens, 64 a picture, an update takes 4 to 5 times as long as Soft MoE's; --tokens persamp is for them.
Letters in the shape comments: N environments (of the router: networks), B batch, T tasks, C channels, n experts, E = n
or 1 experts of a layer, m tokens, k experts that compute a token, d inputs and h outputs of a layer.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

CHANNELS = {"asterix": 4, "breakout": 4, "freeway": 7, "seaquest": 10, "space_invaders": 6}  # of MinAtar's games
ACTIONS = 6  # nothing, left, up, right, down, fire: all games take all of them, what a game does not know does nothing
TIME_LIMIT = 1_000  # steps of an episode, as in gymnax; MinAtar has none but Freeway's 2,500
Architecture = Literal["baseline", "middle", "final", "all", "big"]


@dataclasses.dataclass
class Args:
    tasks: tuple[str, ...] = ("space_invaders", "breakout", "asterix")  # games; the order is that of the phases
    seed: int = 1  # seed of everything random
    total_timesteps: int | None = None  # of all tasks together (default: 3,024,000; with --resume those of that run)
    run_dir: str | None = None  # folder of this run (default: runs/<tasks>__<script>__s<seed>__<time>)
    resume: str | None = None  # folder of a run to continue from its last checkpoint
    evaluate: str | None = None  # folder of a run to evaluate instead of training
    video: bool = False  # with --evaluate: also write video.gif into the run folder
    eval_every: int = 250_000  # steps between evaluations, each at the end of a rollout
    eval_episodes: int = 10  # episodes of each task per evaluation
    checkpoint_every: int = 500_000  # steps between checkpoints, which end all episodes: see ppo.py's docstring
    device: str = "cpu"  # cpu, cuda or cuda:N
    num_threads: int = 2  # CPU threads of PyTorch; 1 where another run needs the other core
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # torch.set_float32_matmul_precision
    num_envs: int = 63  # environments
    num_steps: int = 128  # steps of each environment per rollout
    update_epochs: int = 4  # passes over a rollout
    num_minibatches: int = 8  # updates per pass
    learning_rate: float = 5e-3  # Adam's step size
    anneal_lr: bool = True  # lowers it linearly to 0 over the run or, continual, over each phase
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    clip_coef: float = 0.2  # the ratio counts within 1 +- this
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.01  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    protocol: Literal["multitask", "continual"] = "multitask"  # all tasks at once, or one after the other
    cycles: int = 1  # continual: times that the list of tasks is gone through
    actor_moe: Architecture = "middle"  # which layers of the actor are mixtures
    critic_moe: Architecture = "middle"  # which layers of the critic are mixtures
    router: Literal["softmoe", "topk", "hardcoded"] = "softmoe"  # who weights the experts
    num_experts: int = 8  # n
    top_k: int = 1  # topk: experts per token
    tokens: Literal["perconv", "persamp"] = "perconv"  # middle: a token is a cell of the convolution, or a sample
    slots: int = 1  # softmoe with perconv: slots per expert, p
    load_balance: float = 0.0  # topk: weight of Switch's load-balancing loss
    match_params: bool = False  # divide the width of the experts by n (all, big: by its root)

    @property
    def env_id(self) -> str:
        """What the folder of the run is named after."""
        return "MinAtar-" + "-".join(self.tasks)


def fail(message: str):
    """One line on stderr and exit code 2: the run cannot start."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def episode_seed(seed: int, episode: int, evaluation: bool = False) -> int:
    """Seed of one episode, below 2^32; training seeds lie in the lower half, evaluation seeds in the upper."""
    return (2**31 if evaluation else 0) + (seed * 100_003 + episode) % 2**31


# === shared: schedule ===
def running_phase(global_step: int, args: Args) -> int:
    """The phase of the continual protocol to which step `global_step` (from 0) belongs; its task is that mod T."""
    return global_step * len(args.tasks) * args.cycles // args.total_timesteps


# === end shared ===
class Games:
    """N MinAtar games with the observations obs (N, 10, 10, C) bool; channels that a game lacks stay empty.

    Sticky actions (0.1) and the ramp of difficulty are MinAtar's defaults; the time limit truncates.
    """

    def __init__(self, tasks: list[str], args: Args):
        from minatar import Environment

        self.games = [Environment(task) for task in tasks]
        self.channels = [CHANNELS[task] for task in tasks]
        self.task = torch.tensor([args.tasks.index(task) for task in tasks], device=args.device)  # (N,)
        self.obs = np.zeros((len(tasks), 10, 10, max(CHANNELS[task] for task in args.tasks)), bool)
        self.returns, self.lengths = [0.0] * len(tasks), [0] * len(tasks)

    def start(self, i: int):
        """A new episode of game i."""
        self.games[i].reset()
        self.games[i].last_action = 0  # which reset() forgets
        self.obs[i, ..., : self.channels[i]] = self.games[i].state()
        self.returns[i], self.lengths[i] = 0.0, 0

    def reset(self, args: Args, first: int, evaluation: bool = False):
        """New episodes everywhere, and new random numbers: game i has the seed number first + i of the run."""
        for i, game in enumerate(self.games):
            game.seed(episode_seed(args.seed, first + i, evaluation))
            self.start(i)

    def step(self, i: int, action: int) -> tuple[float, bool, bool]:
        """Reward, terminated and truncated of game i, without starting it anew; its observation is obs[i]."""
        reward, terminated = self.games[i].act(action)
        self.returns[i] += reward
        self.lengths[i] += 1
        self.obs[i, ..., : self.channels[i]] = self.games[i].state()
        return reward, terminated, self.lengths[i] == TIME_LIMIT and not terminated


# === shared: router ===
class Router(nn.Module):
    """Weights w (N, B, n) of n experts for inputs x (N, B, d); linear without a bias, as in the code of 2402.08609.

    softmoe    w = softmax(x Phi)
    topk       the k largest of that softmax as they are, the others 0, as in the code of 2402.08609 (Riquelme et al.
               2021; k = 1 is the Switch gate; Shazeer et al. 2017 would make the k sum to 1)
    hardcoded  w = onehot(task); nothing to learn
    """

    def __init__(self, networks: int, inputs: int, args: Args):
        super().__init__()
        self.kind, self.num_experts, self.top_k = args.router, args.num_experts, args.top_k
        self.balance = torch.zeros(())  # Switch's load-balancing loss of the last call
        if self.kind != "hardcoded":
            self.phi = nn.Parameter(torch.randn(networks, inputs, self.num_experts) / math.sqrt(inputs))

    def forward(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """x (N, B, d), task (B,) -> w (N, B, n)."""
        if self.kind == "hardcoded":
            w = (task[:, None] == torch.arange(self.num_experts, device=x.device)).to(x.dtype)
            return w.expand(len(x), -1, -1)
        w = (x @ self.phi).softmax(-1)
        if self.kind == "topk":
            chosen = torch.zeros_like(w).scatter_(-1, w.topk(self.top_k, -1).indices, 1.0)
            # Fedus et al. 2021: n sum_i (share of samples that go to i) (mean of w_i), which is 1 where all are equal
            self.balance = self.num_experts * (chosen.mean(-2) / self.top_k * w.mean(-2)).sum()  # of each network
            w = w * chosen
        return w


# === end shared ===
class Route:
    """topk and hardcoded: an expert computes the tokens that chose it, R = B k rows sorted by expert, and no others."""

    def __init__(self, w: torch.Tensor, k: int):
        """Weights w (B, n), k of them chosen in each row."""
        self.shape = w.shape
        weight, expert = w.topk(k, -1)  # (B, k)
        self.expert, self.order = expert.flatten().sort(stable=True)  # (R,)
        self.token, self.weight = self.order // k, weight.flatten()[self.order, None]  # (R,), (R, 1)
        # where the rows of each expert end
        self.ends = torch.searchsorted(self.expert, torch.arange(w.shape[1], device=w.device), right=True).int()

    def combine(self, y: torch.Tensor) -> torch.Tensor:
        """Rows y (1, R, h) -> sum_i w_i y_i (B, h)."""
        y = y[0] * self.weight
        return torch.zeros_like(y).index_copy(0, self.order, y).unflatten(0, (self.shape[0], -1)).sum(1)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Rows x (1, R, ..) -> (n, B, ..), 0 where an expert was not chosen."""
        full = x.new_zeros(self.shape[1], self.shape[0], *x.shape[2:])
        full[self.expert, self.token] = x[0]
        return full


class Experts(nn.Module):
    """E linear maps d -> h as one matrix product; orthogonal weights, as in ppo.py."""

    def __init__(self, experts: int, inputs: int, outputs: int, gain: float):
        super().__init__()
        self.weight = nn.Parameter(
            torch.stack([nn.init.orthogonal_(torch.empty(inputs, outputs), gain) for _ in range(experts)])
        )
        self.bias = nn.Parameter(torch.zeros(experts, 1, outputs))

    def forward(self, x: torch.Tensor, route: Route | None = None) -> torch.Tensor:
        """x (E, B, d), or (1, B, d) for all experts -> (E, B, h). A route's rows, c of each token: (1, R c, d or h).

        In float32 grouped_mm is a loop over the experts inside PyTorch; on a GPU it waits to read the route's ends.
        """
        weight = self.weight
        if route is None:
            return torch.baddbmm(self.bias, x.expand(len(weight), -1, -1), weight)
        rows, (_, d, h) = len(route.expert), weight.shape
        if d % 4 or h % 4:  # grouped_mm wants rows that begin at multiples of 16 bytes
            x = torch.cat([x, x.new_zeros(1, x.shape[1], -d % 4)], 2)  # F.pad would write it twice
            weight = F.pad(weight, (0, -h % 4, 0, -d % 4))
        y = F.grouped_mm(x[0], weight, offs=route.ends * (x.shape[1] // rows))[:, :h]  # (R c, h)
        # a product, because with several threads the gradient of self.bias[route.expert] is another sum each time
        bias = F.one_hot(route.expert, len(weight)).to(y.dtype) @ self.bias[:, 0]  # (R, h)
        return (y.unflatten(0, (rows, -1)) + bias[:, None]).flatten(0, 1)[None]


class TokenMoE(nn.Module):
    """Mixture over the m = 64 tokens of a sample, d = 16 channels each; expert f_i = MLP d-h-d with ReLU.

    softmoe            D = softmax over tokens of X Phi, S = D^T X, C = softmax over slots of X Phi, Y = C f(S)
    topk, hardcoded    y = sum_i w_i(x) f_i(x) for each token x; a token's task is its sample's
    """

    def __init__(self, hidden: int, args: Args, size: int = 16):
        super().__init__()
        self.num_experts, self.chosen = args.num_experts, chosen(args)
        self.up = Experts(args.num_experts, size, hidden, math.sqrt(2))
        self.down = Experts(args.num_experts, hidden, size, 1.0)
        if self.chosen is None:
            self.phi = nn.Parameter(torch.randn(size, args.num_experts * args.slots) / math.sqrt(size))
        else:
            self.router = Router(1, size, args)

    def forward(self, x: torch.Tensor, task: torch.Tensor, trace: dict | None = None) -> torch.Tensor:
        """X (B, m, d), task (B,) -> Y (B, m, d)."""
        batch, tokens, _ = x.shape
        if self.chosen is None:
            # (B, n p, m) in memory: a softmax over a long last dimension is many times faster than over a short one
            logits = (x @ self.phi).transpose(1, 2).contiguous()
            dispatch, combine = logits.softmax(2), logits.softmax(1)
            slots = (dispatch @ x).unflatten(1, (self.num_experts, -1)).transpose(0, 1)  # (n, B, p, d)
            h = self.up(slots.flatten(1, 2)).relu_()  # (n, B p, h)
            y = self.down(h).unflatten(1, (batch, -1)).transpose(0, 1).flatten(1, 2)  # (B, n p, d)
            y = combine.transpose(1, 2) @ y
            if trace is not None:
                w = combine.mean(2).unflatten(1, (self.num_experts, -1))  # (B, n, p), the mean over the tokens
                trace |= {"router2": w.sum(2), "layer2": neurons(h)}  # of layer2 a slot is a sample
        else:
            x_flat = x.flatten(0, 1)[None]  # (1, B m, d)
            w = self.router(x_flat, task.repeat_interleave(tokens))[0]  # (B m, n)
            route = Route(w, self.chosen)
            h = self.up(x_flat.index_select(1, route.token), route).relu()  # (1, R, h)
            y = route.combine(self.down(h, route)).view_as(x)
            if trace is not None:
                trace |= {"router2": w.view(batch, tokens, -1).mean(1), "layer2": neurons(route.spread(h))}
        return y


class MoE(nn.Module):
    """Picture -> 3x3 convolution to 16 channels -> 128 -> outputs with ReLU; some layers are mixtures of n experts.

    baseline   y = W3 relu(W2 relu(W1 * x))                       (biases left out)
    middle     the second layer: h2 = sum_i w_i(h1) relu(W2_i h1), or a TokenMoE on h1
    final      the last layer:   y = sum_i w_i(h2) W3_i h2
    all        every layer, each with a router of its own
    big        each expert is a whole network: y = sum_i w_i(x) W3_i relu(W2_i relu(W1_i * x)), one router
    """

    MIXED = {"baseline": (), "middle": (1,), "final": (2,), "all": (0, 1, 2), "big": (0, 1, 2)}  # layers with experts

    def __init__(self, channels: int, outputs: int, gain: float, architecture: str, args: Args):
        super().__init__()
        mixed, self.big, self.chosen = self.MIXED[architecture], architecture == "big", chosen(args)
        share = args.num_experts if len(mixed) == 1 else math.sqrt(args.num_experts)  # for --match-params
        self.tokens = architecture == "middle" and args.tokens == "perconv"
        conv, dense = (
            max(round(width / share), 1) if args.match_params and layer in mixed else width
            for layer, width in enumerate((16, 128))
        )
        experts = [args.num_experts if layer in mixed else 1 for layer in range(3)]
        self.layers = nn.ModuleList(
            [
                Experts(experts[0], 9 * channels, conv, math.sqrt(2)),
                TokenMoE(dense, args) if self.tokens else Experts(experts[1], 64 * conv, dense, math.sqrt(2)),
                Experts(experts[2], 64 * conv if self.tokens else dense, outputs, gain),
            ]
        )
        inputs = (100 * channels, 64 * conv, dense)
        routed = () if self.tokens else mixed[:1] if self.big else mixed
        self.routers = nn.ModuleDict({str(layer): Router(1, inputs[layer], args) for layer in routed})

    def forward(self, picture, patches, task, trace: dict | None = None) -> torch.Tensor:
        """What see() returns, (B, 100 C) and (B, 64, 9 C), and task (B,) -> y (B, out). measure() looks at `trace`."""
        x, w, route = patches[None], None, None  # (1, B, 64, 9 C)
        for layer, experts in enumerate(self.layers):
            if trace is not None and layer == 2:
                weight = 1 if not self.big else w.T[..., None] if route is None else route.weight
                trace["features"] = neurons(x * weight if route is None else route.spread(x * weight))
            if str(layer) in self.routers:
                w = self.routers[str(layer)]((x if layer else picture[None]), task)[0]  # (B, n)
                if trace is not None:
                    trace[f"router{layer + 1}"] = w
                if self.chosen is not None:
                    route = Route(w, self.chosen)
                    x = x.index_select(1, route.token)  # (1, R, ..)
            if layer == 1 and self.tokens:
                x = experts(x[0].unflatten(1, (64, -1)), task, trace).flatten(1)[None]  # (1, B, 1024)
                continue
            rows = x.shape[1]
            x = experts(x.flatten(1, -2), route)
            if layer < 2:
                x = F.relu(x, inplace=route is None)  # in place on a view, as a route gives, is slow
                if trace is not None:  # of the convolution a neuron is a channel, and every position a sample
                    y = x.unflatten(1, (rows, -1))
                    trace[f"layer{layer + 1}"] = neurons(y if route is None else route.spread(y))
            if layer == 0:
                x = x.unflatten(1, (rows, -1)).flatten(2)  # (E, B 64, 16) -> (E, B, 1024)
            if w is not None and (layer == 2 or not self.big):  # y = sum_i w_i f_i(x)
                x = torch.einsum("bn,nbh->bh", w, x)[None] if route is None else route.combine(x)[None]
                w = route = None
        return x[0]


def chosen(args: Args) -> int | None:
    """How many experts compute a token; None is all of them."""
    return {"softmoe": None, "topk": args.top_k, "hardcoded": 1}[args.router]


def neurons(x: torch.Tensor) -> torch.Tensor:
    """Outputs of all experts x (E, B, .., h) -> a row of all neurons for each token or cell (B .., E h)."""
    return x.movedim(0, -2).flatten(-2).flatten(0, -2)


def see(obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """obs (B, 10, 10, C) bool -> the pictures (B, 100 C) and their 3x3 patches (B, 64, 9 C), float.

    Three neighbouring cells of a row are 3 C numbers in a row of memory, so the patches are copied in runs.
    """
    batch, side, _, channels = obs.shape
    x = obs.float()
    patches = x.flatten(2).unfold(2, 3 * channels, channels).unfold(1, 3, 1)  # (B, 8, 8, 3 C, 3)
    return x.flatten(1), patches.transpose(3, 4).reshape(batch, (side - 2) ** 2, 9 * channels)


class Agent(nn.Module):
    """Everything that learns: actor, critic, and Adam."""

    def __init__(self, args: Args):
        super().__init__()
        channels = max(CHANNELS[task] for task in args.tasks)
        self.actor = MoE(channels, ACTIONS, 0.01, args.actor_moe, args)
        self.critic = MoE(channels, 1, 1.0, args.critic_moe, args)
        self.to(args.device)
        self.vector = as_one_vector(self)
        self.optimizer = torch.optim.Adam([self.vector], lr=args.learning_rate, eps=1e-5, fused=True)


def as_one_vector(module: nn.Module) -> torch.Tensor:
    """One vector that holds all parameters, which become views of it: one operation then clips or steps."""
    vector = torch.cat([p.detach().flatten() for p in module.parameters()])
    for p, part in zip(module.parameters(), vector.split([p.numel() for p in module.parameters()]), strict=True):
        p.data = part.view_as(p)
    return vector


class Batch(NamedTuple):
    obs: torch.Tensor  # (B, 10, 10, C) bool
    task: torch.Tensor  # (B,)
    action: torch.Tensor  # (B,)
    log_prob: torch.Tensor  # (B,), of the policy that acted
    advantage: torch.Tensor  # (B,)
    target: torch.Tensor  # (B,), of the critic


def draw(logits: torch.Tensor) -> torch.Tensor:
    """logits (B, A) -> action (B,) ~ softmax, as torch.multinomial draws, but without waiting for the GPU."""
    return (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)


@torch.no_grad()
def rollout(agent: Agent, games: Games, steps: int, args: Args) -> tuple[Batch, list[tuple[int, float, int]]]:
    """`steps` steps of all N games with their advantages, and (task, return, length) of the episodes that ended."""
    number = len(games.games)
    obs = torch.empty(steps, *games.obs.shape, dtype=torch.bool, device=args.device)
    action, log_prob = torch.empty(2, steps, number, device=args.device)
    reward, terminated, done = np.zeros((3, steps, number), np.float32)
    episodes, cut = [], []  # cut: step, game and last observation where the time limit ended an episode
    for t in range(steps):
        obs[t] = torch.from_numpy(games.obs)
        log_probs = agent.actor(*see(obs[t]), games.task).log_softmax(-1)
        choice = draw(log_probs)
        action[t], log_prob[t] = choice, log_probs.gather(1, choice[:, None]).squeeze(1)
        for i, a in enumerate(choice.tolist()):
            reward[t, i], ended, truncated = games.step(i, a)
            if ended or truncated:
                terminated[t, i], done[t, i] = ended, True
                episodes.append((int(games.task[i]), games.returns[i], games.lengths[i]))
                if truncated:
                    cut.append((t, i, games.obs[i].copy()))
                games.start(i)

    task = games.task.expand(steps, -1)
    last = torch.from_numpy(np.stack([*games.obs, *(x for *_, x in cut)])).to(args.device)
    last_task = torch.cat([games.task, games.task[[i for _, i, _ in cut]]])
    rows, tasks = torch.cat([obs.flatten(0, 1), last]), torch.cat([task.flatten(), last_task])
    value = torch.cat(
        [agent.critic(*see(x), y).squeeze(1) for x, y in zip(rows.split(1024), tasks.split(1024), strict=True)]
    )
    value, next_value, cut_value = value.split([steps * number, number, len(cut)])
    value = value.view(steps, number)
    next_value = torch.cat([value[1:], next_value[None]])
    for (t, i, _), v in zip(cut, cut_value, strict=True):
        next_value[t, i] = v
    reward, terminated, done = (torch.from_numpy(x).to(args.device) for x in (reward, terminated, done))
    advantage = gae(reward, value, next_value, terminated, done, args)
    columns = obs, task, action.long(), log_prob, advantage, advantage + value
    return Batch(*(x.flatten(0, 1) for x in columns)), episodes


# === shared: gae ===
def gae(reward, value, next_value, terminated, done, args: Args) -> torch.Tensor:
    """Generalised advantage estimate, all (steps, N). A time limit cuts the sum but keeps the value behind it."""
    delta = reward + args.gamma * (1 - terminated) * next_value - value
    decay = args.gamma * args.gae_lambda * (1 - done)
    advantages, advantage = [], torch.zeros_like(delta[0])
    for delta_t, decay_t in zip(delta.flip(0), decay.flip(0), strict=True):
        advantage = torch.addcmul(delta_t, decay_t, advantage)  # A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}
        advantages.append(advantage)
    return torch.stack(advantages).flip(0)


# === end shared ===
def losses_of(agent: Agent, batch: Batch, args: Args) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Losses of actor and critic, each with its load-balancing loss, and what is logged."""
    inputs = *see(batch.obs), batch.task
    # Actor: maximise E[min(r A, clip(r, 1 - eps, 1 + eps) A)] + c H(pi), r = pi(a|s) / pi_old(a|s)
    log_probs = agent.actor(*inputs).log_softmax(-1)  # (B, 6)
    log_ratio = log_probs.gather(1, batch.action[:, None]).squeeze(1) - batch.log_prob  # (B,)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    advantage = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
    actor_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
    entropy = -(log_probs.exp() * log_probs).sum(1).mean()

    # Critic: minimise E[(V(s) - (A + V_old(s)))^2]
    critic_loss = (agent.critic(*inputs).squeeze(1) - batch.target).square().mean()
    with torch.no_grad():
        metrics = {
            "losses/critic": critic_loss.detach(),
            "losses/actor": actor_loss.detach(),
            "policy/entropy": entropy.detach(),
            "policy/kl": (ratio - 1 - log_ratio).mean(),  # of the policy that acted from this one, never negative
            "policy/clipped": (ratio != clipped).float().mean(),
        }
    balance = [sum(m.balance for m in net.modules() if isinstance(m, Router)) for net in (agent.actor, agent.critic)]
    actor_loss = actor_loss - args.ent_coef * entropy + args.load_balance * balance[0]
    return actor_loss, args.vf_coef * critic_loss + args.load_balance * balance[1], metrics


def update(agent: Agent, batch: Batch, args: Args) -> dict[str, torch.Tensor]:
    """One step of Adam on actor and critic by a minibatch. Returns detached scalars."""
    actor_loss, critic_loss, metrics = losses_of(agent, batch, args)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(actor_loss + critic_loss, list(agent.parameters()))])
    agent.vector.grad = gradient.mul_((args.max_grad_norm / (gradient.norm() + 1e-6)).clamp_(max=1))
    agent.optimizer.step()
    return metrics


def learn(agent: Agent, batch: Batch, args: Args) -> dict[str, torch.Tensor]:
    """Epochs of updates on shuffled minibatches; returns the means of what update() returns."""
    metrics = []
    for _ in range(args.update_epochs):
        for rows in torch.randperm(len(batch.obs)).to(args.device).chunk(args.num_minibatches):
            metrics.append(update(agent, Batch(*(x[rows] for x in batch)), args))
    return {key: torch.stack([m[key] for m in metrics]).mean(0) for key in metrics[0]}


# === shared: moe metrics ===
def dormant(x: torch.Tensor, tau: float) -> torch.Tensor:
    """Neurons x (B, H) -> mask (H,). Sokar et al. 2023: dormant if E|h_j| / mean_k E|h_k| <= tau."""
    size = x.abs().mean(0)
    return size <= tau * size.mean()


def effective_rank(x: torch.Tensor, delta: float = 0.01) -> int:
    """Kumar et al. 2021, srank: the least k whose k largest singular values are the share 1 - delta of their sum."""
    shares = torch.linalg.svdvals(x).double().cumsum(0)
    return int((shares < (1 - delta) * shares[-1]).sum()) + int(shares[-1] > 0)  # of nothing but zeros: 0


def cosines(gradients: list[torch.Tensor]) -> torch.Tensor:
    """(T, T); 0 where a gradient is 0."""
    x = F.normalize(torch.stack(gradients), dim=1)
    return x @ x.T


def gradient(loss: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """The gradient of `loss` for all parameters of `module` as one vector."""
    parts = torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def entropy_of(w: torch.Tensor) -> torch.Tensor:
    """Weights w (..., B, n) of n experts -> mean entropy [nats] of a state's weights, scaled to sum to 1."""
    return torch.special.entr(w / w.sum(-1, keepdim=True)).sum(-1).mean()


MOE_COLUMNS = ("global_step", "network", "metric", "task", "item", "value")
TAUS = (0.025, 0.0)


def write_moe(run_dir: Path, rows: list[dict]):
    """moe.csv, in the form of eval.csv."""
    lines = [",".join(MOE_COLUMNS)] + [",".join(f"{row[c]}" for c in MOE_COLUMNS) for row in rows]
    write(run_dir / "moe.csv", "\n".join([*lines, ""]).encode())


def log_moe(writer: SummaryWriter, rows: list[dict], args: Args, global_step: int):
    """What measure() returns as scalars, and each router as a picture: a row per task, a column per expert."""
    pictures = {}
    for row in rows:
        tag = "/".join(f"{row[key]}" for key in ("network", "metric", "task", "item") if row[key] != "")
        writer.add_scalar(f"moe/{tag}", row["value"], global_step)
        if row["metric"].startswith("router"):
            empty = torch.zeros(len(args.tasks), args.num_experts)
            pictures.setdefault((row["network"], row["metric"]), empty)[row["task"], row["item"]] = row["value"]
    for (network, metric), weights in pictures.items():
        picture = weights.repeat_interleave(20, 0).repeat_interleave(20, 1)
        writer.add_image(f"moe/{network}/{metric}", picture, global_step, dataformats="HW")


# === end shared ===
def count_parameters(moe: MoE, args: Args) -> tuple[int, int]:
    """All parameters, and those that one token needs: an expert of weight 0 is not needed."""
    share = {"softmoe": 1.0, "topk": args.top_k / args.num_experts, "hardcoded": 1 / args.num_experts}[args.router]
    total = sum(p.numel() for p in moe.parameters())
    layers = [layer for layer in moe.modules() if isinstance(layer, Experts) and len(layer.weight) > 1]
    experts = sum(p.numel() for layer in layers for p in layer.parameters())
    return total, total - round(experts * (1 - share))


PROBE = 4, 128  # games of each task, and their steps, that the networks are measured on


def measure(agent: Agent, args: Args, global_step: int) -> list[dict]:
    """Rows of moe.csv, measured on a rollout of all tasks, whichever are trained. Training does not notice.

    dormant_TAU    share of dormant neurons, per hidden layer and in total, on the states of each task (column task) and
                   on all. Of the convolution a neuron is a channel. topk, hardcoded: a neuron is 0 where its expert is
                   not chosen, our choice: an expert never chosen is dormant as a whole, and its zeros lower the mean
                   that tau refers to. So compare routers on all states, or with equal n
    rank, width,   of the penultimate features: what the last layer multiplies by its weights (big: all w_i f_i);
    norm           effective rank (at most the number of states), number, mean norm
    router         mean weight of each task (column task) and expert (column item); topk: 0 where it is not chosen, so a
                   row sums to less than 1. PerConv: of Soft MoE the mean of combine over the cells
    entropy        mean over a task's states of the entropy of their weights [nats]: 0 is one expert per state. PerConv:
                   of the mean weights of a state's cells
    cosine         between the gradients of two tasks' losses (columns task and item); unlike in training, advantages
                   are normalised within a task
    parameters     all of them, and those active for one token: what is left without experts of weight 0
    """
    rows = []

    def row(network, metric, value, task="", item=""):
        values = (global_step, network, metric, task, item, round(float(value), 6))
        rows.append(dict(zip(MOE_COLUMNS, values, strict=True)))

    with torch.random.fork_rng([args.device] if args.device.startswith("cuda") else []):
        torch.manual_seed(args.seed)
        games = Games([task for task in args.tasks for _ in range(PROBE[0])], args)
        games.reset(args, first=10**6, evaluation=True)
        batch, _ = rollout(agent, games, PROBE[1], args)
        parts = [Batch(*(x[batch.task == t] for x in batch)) for t in range(len(args.tasks))]
        losses = [losses_of(agent, part, args) for part in parts]
        for network in ("actor", "critic"):
            moe, trace = getattr(agent, network), {}
            with torch.no_grad():
                moe(*see(batch.obs), batch.task, trace)
            layers = {key: x for key, x in trace.items() if key.startswith("layer")}
            for t in ("", *range(len(args.tasks))):
                mask = batch.task == t if t != "" else torch.ones_like(batch.task, dtype=torch.bool)
                mine = {key: x[mask.repeat_interleave(len(x) // len(mask))] for key, x in layers.items()}
                for tau in TAUS:
                    masks = {key: dormant(x, tau).float() for key, x in mine.items()}
                    for key, neurons in (masks | {"total": torch.cat(list(masks.values()))}).items():
                        row(network, f"dormant_{tau}", neurons.mean(), t, key)
            row(network, "rank", effective_rank(trace["features"]))
            row(network, "width", trace["features"].shape[-1])
            row(network, "norm", trace["features"].norm(dim=1).mean())
            for key, w in trace.items():
                if key.startswith("router"):
                    for t in range(len(args.tasks)):
                        for expert, value in enumerate(w[batch.task == t].mean(0).tolist()):
                            row(network, key, value, t, expert)
                        row(network, key.replace("router", "entropy"), entropy_of(w[batch.task == t]), t)
            for item, number in zip(("total", "active"), count_parameters(moe, args), strict=True):
                row(network, "parameters", number, item=item)
            table = cosines([gradient(loss[network == "critic"], moe) for loss in losses]).tolist()
            for j in range(len(parts)):
                for i in range(j):
                    row(network, "cosine", table[i][j], i, j)
    return rows


LIMITS = {"seed": (0, 2**31 - 1), "gamma": (0, 1), "gae_lambda": (0, 1), "ent_coef": (0, math.inf)}  # others: positive
LIMITS |= {"load_balance": (0, math.inf)}
WORLD = 1  # process; several are for ppo.py and ppo_pmoe.py


# === shared: mixture checks ===
def check_mixture(args: Args):
    """Exits where tasks, experts and routers do not fit together, or where a flag would have no effect.

    --router and --num-experts may stand beside two baselines, so that one command fits all architectures.
    """
    number, mixed = len(args.tasks), {args.actor_moe, args.critic_moe} - {"baseline"}
    if mixed and args.router == "topk" and args.top_k > args.num_experts:
        fail(f"--top-k {args.top_k}: there are {args.num_experts} experts; lower it or raise --num-experts")
    if mixed and args.router == "hardcoded" and args.num_experts < number:
        fail(f"--num-experts {args.num_experts}: hardcoded routing needs one for each of {number} tasks; raise it")
    choosing = mixed and args.router == "topk"
    for name, useless, partner in (
        ("--top-k", args.top_k != 1 and not choosing, "--router topk and a mixture"),
        ("--load-balance", args.load_balance and not choosing, "--router topk and a mixture"),
        ("--match-params", args.match_params and not mixed, "an architecture other than baseline"),
        ("--cycles", args.cycles != 1 and args.protocol == "multitask", "--protocol continual"),
    ):
        if useless:
            fail(f"{name}: has no effect here, it goes with {partner}; leave it out")
    if args.match_params and "final" in mixed:
        fail("--match-params: the last layer's width is given by the task; leave it out or choose another architecture")


# === end shared ===
def check_tasks(args: Args):
    """Exits where tasks, environments and mixture do not fit together."""
    number, steps = len(args.tasks), args.num_envs * args.num_steps
    for task in args.tasks:
        if task not in CHANNELS:
            fail(f"--tasks {task}: not a game of MinAtar; choose from {', '.join(CHANNELS)}")
    if not number or len(set(args.tasks)) < number:
        fail(f"--tasks {' '.join(args.tasks)}: needs at least one game, and each only once")
    try:
        import minatar  # noqa: F401
    except ImportError as error:
        fail(f"--tasks {args.tasks[0]}: the package minatar is missing ({error}); pip install minatar")
    check_mixture(args)
    middle = "middle" in (args.actor_moe, args.critic_moe)
    if args.tokens == "persamp" and not middle:
        fail("--tokens persamp: has no effect here, it goes with the architecture middle; leave it out")
    if args.slots != 1 and (args.router != "softmoe" or not middle or args.tokens == "persamp"):
        fail("--slots: has no effect here, it goes with --router softmoe, middle and --tokens perconv; leave it out")
    if args.match_params and middle and args.tokens == "perconv":
        fail(
            "--match-params: experts of cells are smaller than the layer they replace; leave it out or --tokens persamp"
        )
    if args.protocol == "multitask" and args.num_envs % number:
        near = max(args.num_envs // number, 1) * number
        fail(f"--num-envs {args.num_envs}: must be a multiple of the {number} tasks, such as {near}")
    if steps % args.num_minibatches or steps // args.num_minibatches < 2:
        need = f"equal parts of a rollout of {steps} steps, at least 2 each"
        fail(f"--num-minibatches {args.num_minibatches}: needs {need}; change it, --num-envs or --num-steps")
    if args.protocol == "continual" and args.total_timesteps < number * args.cycles * steps:
        fail(f"--total-timesteps {args.total_timesteps}: less than a rollout of {steps} for each phase; give more")


# === shared: run folder ===
SCRIPT = Path(__file__).stem


def flag(name: str) -> str:
    """`total_timesteps` -> `--total-timesteps`"""
    return "--" + name.replace("_", "-")


def given(args: Args) -> dict:
    """Name -> value of the flags that the command spells out or that are not at their default."""
    words = {word.partition("=")[0].replace("_", "-").replace("--no-", "--") for word in sys.argv[1:]}
    values = {field.name: (getattr(args, field.name), field.default) for field in dataclasses.fields(Args)}
    return {name: value for name, (value, default) in values.items() if value != default or flag(name) in words}


def check(args: Args, remedy: str = "--device cpu always works"):
    """Exits with one line naming the flag and the remedy if a value cannot work. Creates nothing."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = LIMITS.get(field.name, (1 if isinstance(value, int) else 1e-9, math.inf))
            if not low <= value <= high or value == math.inf:
                bounds = f"lie between {low} and {high}" if high < math.inf else f"be at least {low}, and finite"
                fail(f"{flag(field.name)} {value}: must {bounds}")
    if args.video and args.evaluate is None:
        fail("--video: goes with --evaluate RUN_DIR")
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > WORLD:
        fail("torchrun --nproc_per_node: this script is one process, ppo.py may be several; start it with python")
    try:
        assert torch.device(args.device).type in ("cpu", "cuda"), "must be cpu, cuda or cuda:N"
        assert args.device == "cpu" or torch.cuda.is_available(), "PyTorch finds no GPU"
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # each process of torchrun has its own
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device}: {str(error).splitlines()[0]}; {remedy}")


def configure(args: Args):
    """PyTorch's global settings, the same in training and in evaluation."""
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.set_flush_denormal(True)  # numbers below 1e-38, such as Adam's moments of silent units, are slow on CPUs


def describe(args: Args) -> dict:
    """What has to be known to repeat the run: for run.json."""

    def git(*command):
        try:
            command = ["git", "-C", Path(__file__).parent, *command]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or not in a repository
            return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    if changes == "":
        changes = git("status", "--porcelain", "--", Path(__file__).name)  # a new script is not tracked yet
    gpu, versions = args.device.startswith("cuda"), {"python": platform.python_version()}
    chip = torch.cuda.get_device_name(args.device) if gpu else torch.backends.cpu.get_cpu_capability()
    for name in ("gymnasium", "minatar", "mujoco", "numpy", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {
        "script": SCRIPT,
        "command": shlex.join(["python", *sys.argv]),
        "args": dataclasses.asdict(args),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {chip}",
        "processes": WORLD,
    }


def new_run_dir(args: Args) -> Path:
    """Creates and returns the folder of a new run."""
    env_name = args.env_id.split(":")[-1].translate(str.maketrans("?&=/", "----"))
    default = f"runs/{env_name}__{SCRIPT}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.run_dir or default)
    if any((run_dir / name).exists() for name in ("checkpoint.pt", "eval.csv")):
        fail(f"--run-dir {run_dir}: holds another run; choose an empty folder, or continue it with --resume {run_dir}")
    run = json.dumps(describe(args), indent=1).encode()
    try:
        run_dir.mkdir(parents=True, exist_ok=args.run_dir is not None)  # of two runs of one second only one has it
        write(run_dir / "run.json", run)
    except OSError as error:
        fail(f"--run-dir {run_dir}: {error.strerror or error}; choose a folder that can be written")
    return run_dir


def load_run(option: str, folder: str, name: str) -> tuple[Args, dict]:
    """Arguments and content of `name` (model.pt or checkpoint.pt) of a saved run, on the CPU."""
    try:
        saved = torch.load(Path(folder) / name, map_location="cpu", weights_only=True)
        if saved["script"] != SCRIPT:
            fail(f"{option} {folder}: this run was made by {saved['script']}.py; use that script")
        missing = ", ".join(flag(f.name) for f in dataclasses.fields(Args) if f.name not in saved["args"])
        if missing:
            fail(f"{option} {folder}: the script was another then, without {missing}; use that of run.json's commit")
        return Args(**saved["args"]), saved
    except Exception as error:  # missing, cut short, not a checkpoint: torch.load raises half a dozen types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        fail(f"{option} {folder}: no readable {name} there ({reason}); give the folder of a run of this script")


def resume_run(args: Args) -> tuple[Args, dict]:
    """Arguments and checkpoint of the run in folder `args.resume`: the same run, which may only become longer."""
    saved, checkpoint = load_run("--resume", args.resume, "checkpoint.pt")
    for name, value in given(args).items():
        if name == "total_timesteps" and value:
            if value < saved.total_timesteps:
                fail(f"--total-timesteps {value}: the run has {saved.total_timesteps} and can only become longer")
            saved = dataclasses.replace(saved, total_timesteps=value)
        elif name != "resume" and value != getattr(saved, name):
            fail(f"{flag(name)} {value}: cannot change in a run that is resumed, it has {getattr(saved, name)}")
    if not os.access(args.resume, os.W_OK):
        fail(f"--resume {args.resume}: cannot write there; copy the folder to where you can")
    check(saved, "a run is resumed on the kind of device that made it")
    return saved, checkpoint


def note_resume(run_dir: Path, args: Args, global_step: int):
    """Adds to run.json with what the run goes on: command, commit, versions and machine may be other ones now."""
    run, now = json.loads((run_dir / "run.json").read_text()), describe(args)
    now = {key: value for key, value in now.items() if key not in ("script", "args")}
    run["resumed"] = [*run.get("resumed", []), {"global_step": global_step} | now]
    write(run_dir / "run.json", json.dumps(run, indent=1).encode())


def write(path: Path, data: bytes | dict):
    """Writes a file (a dict by torch.save) under a temporary name first, so that `path` is never half-written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(data, file) if isinstance(data, dict) else file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def write_eval(run_dir: Path, rows: list[dict]):
    """eval.csv: one line per evaluation, no wall-clock time, so that equal runs give equal files."""
    lines = [",".join(EVAL_COLUMNS)] + [",".join(f"{row[c]}" for c in EVAL_COLUMNS) for row in rows]
    write(run_dir / "eval.csv", "\n".join([*lines, ""]).encode())


# === end shared ===
EVAL_COLUMNS = ("global_step", "policy", "task", "episodes", "return", "return_std", "length", "success")


@torch.no_grad()
def evaluate(agent: Agent, args: Args, policy: str, global_step: int, frames: list | None = None) -> list[dict]:
    """Rows of eval.csv, one per task: raw returns over `args.eval_episodes` episodes; deterministic or stochastic.

    Own games and seeds, and the random state is put back afterwards: training is the same with and without it.
    """
    games = Games([task for task in args.tasks for _ in range(args.eval_episodes)], args)
    games.reset(args, first=0, evaluation=True)
    live = list(range(len(games.games)))
    with torch.random.fork_rng([args.device] if args.device.startswith("cuda") else []):
        torch.manual_seed(args.seed)
        while live:
            if frames is not None:
                frames += [(i, games.obs[i].copy()) for i in live]
            logits = agent.actor(*see(torch.from_numpy(games.obs[live]).to(args.device)), games.task[live])
            actions = logits.argmax(-1) if policy == "deterministic" else draw(logits)
            live = [i for i, a in zip(live, actions.tolist(), strict=True) if not any(games.step(i, a)[1:])]
    rows, results = [], np.array([games.returns, games.lengths]).reshape(2, len(args.tasks), -1)
    for task, (returns, lengths) in enumerate(results.transpose(1, 0, 2)):
        numbers = (round(float(v), 4) for v in (returns.mean(), returns.std(), lengths.mean(), math.nan))
        rows.append(dict(zip(EVAL_COLUMNS, (global_step, policy, task, args.eval_episodes, *numbers), strict=True)))
    return rows


def evaluate_run(args: Args) -> Path:
    """Evaluates the run in folder `args.evaluate` on all its tasks, prints the result and writes evaluation.json."""
    for name, value in given(args).items():
        if name not in ("evaluate", "eval_episodes", "video", "device"):
            fail(f"{flag(name)} {value}: --evaluate takes it from the run; leave it out")
    saved, model = load_run("--evaluate", args.evaluate, "model.pt")
    run = dataclasses.replace(saved, eval_episodes=args.eval_episodes, device=args.device)
    check_tasks(run)
    configure(run)
    agent = Agent(run)
    agent.load_state_dict(model["agent"])
    step = model["global_step"]
    result = {policy: evaluate(agent, run, policy, step) for policy in ("deterministic", "stochastic")}
    for row in (row for rows in result.values() for row in rows):
        row |= {"task": run.tasks[row["task"]], "success": None}
    text = json.dumps(result, indent=1)
    print(text)
    try:
        write(Path(args.evaluate) / "evaluation.json", text.encode())
    except OSError as error:
        fail(f"--evaluate {args.evaluate}: {error}")
    if args.video:
        path, frames = Path(args.evaluate) / "video.gif", []
        try:
            import imageio  # comes with gymnasium[mujoco]

            evaluate(agent, dataclasses.replace(run, eval_episodes=1), "deterministic", step, frames)
            frames = [picture for _, picture in sorted(frames, key=lambda frame: frame[0])]  # one game after the other
            grey = np.linspace(80, 255, frames[0].shape[-1])  # the higher the channel, the brighter
            frames = [np.kron((frame * grey).max(-1), np.ones((16, 16))).astype(np.uint8) for frame in frames]
            imageio.mimsave(path, frames, duration=1000 / 30, loop=0)
        except Exception as error:  # a missing package, a full disk
            fail(f"--video: cannot draw {run.env_id} here ({error})")
        print(f"one deterministic episode of each task: {path}")
    return Path(args.evaluate)


def main(args: Args) -> Path:
    """Trains (or resumes, or evaluates) one agent on all tasks and returns the folder of its run."""
    check(args)
    if args.evaluate is not None:
        return evaluate_run(args)
    run_dir, checkpoint = args.resume, None
    if args.resume is not None:
        steps = args.total_timesteps
        args, checkpoint = resume_run(args)
        if args.protocol == "continual" and steps not in (None, checkpoint["args"]["total_timesteps"]):
            fail(f"--total-timesteps {steps}: the continual schedule divides them among the tasks; start a new run")
    elif args.total_timesteps is None:
        args = dataclasses.replace(args, total_timesteps=3_024_000)
    check_tasks(args)
    configure(args)
    run_dir = Path(run_dir) if checkpoint else new_run_dir(args)

    torch.manual_seed(args.seed)
    agent = Agent(args)
    number, phases = len(args.tasks), len(args.tasks) * args.cycles
    parameters = {key: count_parameters(getattr(agent, key), args) for key in ("actor", "critic")}
    for network, (total, active) in parameters.items() if not checkpoint else ():
        print(f"{SCRIPT}.py: {network}: {total:,} parameters, {active:,} active for one token")
    global_step, eval_rows, moe_rows, earlier_time = 0, [], [], 0.0
    rollout_steps = args.num_envs * args.num_steps

    def due(every: int, step: int) -> bool:
        """Whether the rollout that ended at `step` went over a multiple of `every`."""
        return step // every > (step - rollout_steps) // every

    if checkpoint:
        before = (checkpoint[k] for k in ("global_step", "eval_rows", "moe_rows", "wall_time"))
        global_step, eval_rows, moe_rows, earlier_time = before
        agent.load_state_dict(checkpoint["agent"])
        agent.optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        if args.device.startswith("cuda"):
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], args.device)
        if checkpoint["args"]["total_timesteps"] <= global_step < args.total_timesteps:  # its end is not one any more
            eval_rows = [
                r for r in eval_rows if r["policy"] == "deterministic" and due(args.eval_every, r["global_step"])
            ]
            moe_rows = [r for r in moe_rows if due(args.eval_every, r["global_step"])]
    start_step = saved_step = global_step

    writer = SummaryWriter(run_dir, purge_step=start_step + 1)
    progress = tqdm(initial=start_step, total=args.total_timesteps, disable=not sys.stderr.isatty(), unit="step")
    started, signals = time.perf_counter(), []
    handlers = {s: signal.signal(s, lambda number, _: signals.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}

    def save():
        wall_time = earlier_time + time.perf_counter() - started
        model = {"script": SCRIPT, "args": dataclasses.asdict(args), "global_step": global_step}
        model["agent"] = agent.state_dict()
        state = {"optimizer": agent.optimizer.state_dict(), "rng": torch.get_rng_state()}
        state |= {"eval_rows": eval_rows, "moe_rows": moe_rows, "wall_time": wall_time}
        if args.device.startswith("cuda"):
            state["cuda_rng"] = torch.cuda.get_rng_state(args.device)
        write(run_dir / "checkpoint.pt", model | state)
        write(run_dir / "model.pt", model)
        write_eval(run_dir, eval_rows)
        write_moe(run_dir, moe_rows)
        run = json.loads((run_dir / "run.json").read_text()) | {"args": model["args"], "global_step": global_step}
        run |= {"wall_time": wall_time, "steps_per_second": global_step / wall_time}
        run["parameters"] = {k: {"total": total, "active": active} for k, (total, active) in parameters.items()}
        write(run_dir / "run.json", json.dumps(run, indent=1).encode())

    def stop(reason: str, code: int):
        progress.close()
        print(f"{SCRIPT}.py: step {global_step}: {reason}", file=sys.stderr)
        raise SystemExit(code)

    def report(metrics: dict[str, torch.Tensor], episodes: list[tuple[int, float, int]], last: bool, switch: bool):
        """Logs a rollout, and evaluates and measures where that is due."""
        speed = (global_step - start_step) / (time.perf_counter() - started)
        scalars = {"charts/SPS": speed, "charts/learning_rate": agent.optimizer.param_groups[0]["lr"]}
        # not finite if the last update broke a weight
        scalars["charts/weight_norm"] = nn.utils.get_total_norm(agent.parameters()).item()
        for task in {task for task, *_ in episodes}:
            results = np.mean([values for t, *values in episodes if t == task], axis=0).tolist()
            scalars[f"charts/episodic_return_{task}"], scalars[f"charts/episodic_length_{task}"] = results
        for key, value in (scalars | {k: v.item() for k, v in metrics.items()}).items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the training has diverged, {key} is {value}")
            writer.add_scalar(key, value, global_step)
        if last or switch or due(args.eval_every, global_step):
            for policy in ("deterministic", "stochastic") if last else ("deterministic",):
                rows = evaluate(agent, args, policy, global_step)
                eval_rows.extend(rows)
                for row in rows:
                    tag = "eval/return" if policy == "deterministic" else "eval/return_stochastic"
                    writer.add_scalar(f"{tag}_{row['task']}", row["return"], global_step)
                text = f"{policy} return " + ", ".join(f"{args.tasks[row['task']]} {row['return']:.1f}" for row in rows)
                progress.write(f"step {global_step}/{args.total_timesteps}: {text}; {speed:.0f} steps/s")
            sys.stdout.flush()  # it may be a file
            measured = measure(agent, args, global_step)
            log_moe(writer, measured, args, global_step)
            moe_rows.extend(measured)
            write_eval(run_dir, eval_rows)
            write_moe(run_dir, moe_rows)

    try:
        playing = None
        if checkpoint:
            note_resume(run_dir, args, global_step)
        save()  # from now on the run can be resumed
        while global_step < args.total_timesteps:
            phase = running_phase(global_step, args) if args.protocol == "continual" else 0
            if playing != phase:  # a new task, or the start
                running = args.tasks if args.protocol == "multitask" else args.tasks[phase % number :][:1]
                games, playing = Games([running[i % len(running)] for i in range(args.num_envs)], args), phase
                games.reset(args, first=global_step // args.num_steps)
                if phase and phase != running_phase(global_step - rollout_steps, args):  # not where a run is resumed
                    agent.optimizer.state.clear()
            if args.anneal_lr:
                progress_made = global_step / args.total_timesteps
                if args.protocol == "continual":
                    progress_made = progress_made * phases - phase
                agent.optimizer.param_groups[0]["lr"] = (1 - progress_made) * args.learning_rate
            batch, episodes = rollout(agent, games, args.num_steps, args)
            metrics = learn(agent, batch, args)
            global_step += rollout_steps
            progress.update(rollout_steps)

            last = global_step >= args.total_timesteps
            switch = args.protocol == "continual" and running_phase(global_step, args) > phase  # what it has learned
            report(metrics, episodes, last, switch)
            if last or due(args.checkpoint_every, global_step):
                saved_step = global_step
                save()
                games.reset(args, first=global_step // args.num_steps)  # what is resumed starts from new episodes too
            if signals and not last:
                kind = signal.Signals(signals[0])
                stop(f"{kind.name}; --resume {run_dir} goes on from its checkpoint of step {saved_step}", 128 + kind)
    except FloatingPointError as error:
        stop(f"{error}; {run_dir} keeps its checkpoint, but --resume would repeat this", 1)
    except OSError as error:
        stop(f"{error}; what was saved last stands: mend that, then --resume {run_dir}", 1)
    finally:
        progress.close()
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
        with contextlib.suppress(OSError):  # the disk is full, as was said
            writer.close()
    print(f"{SCRIPT}.py: finished at step {global_step}; run folder {run_dir}")
    return run_dir


if __name__ == "__main__":
    main(tyro.cli(Args))

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]>=1.4,<2",
#     "mujoco>=3.3,<4",
#     "tyro>=1.0,<2",
#     "tensorboard>=2.18,<3",
#     "tqdm>=4.66,<5",
#     "numpy>=2.0,<3",
#     "minatar>=1.0.15,<1.1",
# ]
# ///
"""Multi-task PPO on MinAtar whose networks may be mixtures of experts: Soft MoE, top-k or hardcoded routing.

Paper   Willi, Obando-Ceron, Foerster, Dziugaite and Castro 2024, "Mixture of Experts in a Mixture of RL settings",
        arXiv 2406.18420; before it Obando-Ceron et al. 2024, arXiv 2402.08609, whose code is in Dopamine (labs/moes).
Layer   y = sum_i w_i(x) f_i(x). softmoe: w = softmax(x Phi). topk: the k largest of that. hardcoded: w = onehot(task).
        Soft MoE (Puigcerver et al. 2023) of m tokens X (m, d), n experts with p slots each, L = X Phi (m, n p):
        Y = C f(D^T X), D = softmax of L over tokens, C = softmax of L over slots; f applies each expert to the rows of
        its p slots. With one token and one slot per expert that is the sum above.

Run       python algos/ppo_moe_multitask.py --actor-moe big --critic-moe big --protocol continual
          python algos/ppo_moe_multitask.py --tasks freeway seaquest --num-envs 64 --router topk --tokens persamp
Then      --resume runs/NAME goes on after Ctrl-C, kill -9 or a crash; --evaluate runs/NAME --video shows what it does

MinAtar (Young and Tian 2019) is a package under GPL-3.0, imported where the games are made, not at the top.

What differs from ppo.py:
1. Discrete actions and pictures: actor and critic are each a 3x3 convolution to 16 channels, 128 units and a head, as
   is usual for MinAtar. Neither rewards nor observations are normalised. The settings are PureJaxRL's, except for 63
   environments (there 64), 3,024,000 steps (10^7), and a value loss that is neither clipped nor halved twice.
   PureJaxRL plays gymnax's copies of the games, in which actions are not sticky and a limit of 1,000 steps terminates
   an episode. Here the games are MinAtar's own, with sticky actions, and that limit truncates.
2. T tasks. multitask: equal shares of the environments. continual: all environments play one task, then the next,
   and so on, --cycles times; the weights stay. In each phase the learning rate is annealed anew, so that every task has
   the same schedule, and Adam starts without moments: the old ones would go on moving an expert whose task is over.
   All architectures, the baseline included, get both; --no-anneal-per-phase and --no-adam-reset switch them off.
   Each game has a block of channels of its own, from which the networks can tell the task (only hardcoded routing is
   given it), and its minimal actions: the logits of the others are masked. With --channels shared one game's bricks are
   another's gold; with --actions all a policy can come to prefer an action that does nothing in the next game.
3. --actor-moe and --critic-moe say which layers are mixtures: see Network. An expert has the width of the layer it
   replaces (middle: see 4). --match-params divides the width by n, or for all and big by the root of n, because
   their largest matrix shrinks at both ends; all experts together then have about the baseline's parameters. The
   router of big sees few ones in 100 C inputs and so starts with nearly equal weights: --freeze-router keeps the output
   close to the mean of the experts.
4. middle has PerConv tokens by default: each of the 64 cells is a token of 16 channels. An expert is then 16-128-16,
   and the head sees 1,024 inputs, as in the code of 2402.08609; the baseline's largest matrix, 1,024 x 128, is gone.
   With --tokens persamp the token is the sample, and the layer is the baseline's with n experts.
5. At every evaluation the networks are measured: see measure() and moe.csv.
Where this differs from the papers: one slot per expert where their code has m / n, rounded up (--slots 0). The outputs
of all cells of a picture are weighted means of the same n p vectors, so they vary in at most n p - 1 of their 16
dimensions: 2 with three experts. Channels, actions, --match-params, the order of phases, and 2's annealing and Adam are
ours. Rewards are not scaled, and advantages are normalised over all games of a minibatch, so small rewards have a small
part in the gradients. With topk and hardcoded an expert computes all that chose it: nothing is dropped.
Shapes: B batch, N games, T tasks, C channels, n experts, p slots of an expert, m tokens, d inputs, h outputs.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Architecture = Literal["baseline", "middle", "final", "all", "big"]


@dataclasses.dataclass
class Args:
    tasks: tuple[str, ...] = ("space_invaders", "breakout", "asterix")  # games; the order is that of the phases
    seed: int = 1  # seed of everything random
    total_timesteps: int = 3_024_000  # environment steps of all tasks together
    run_dir: str | None = None  # folder of this run (default: runs/<tasks>__<script>__s<seed>__<time>)
    resume: str | None = None  # folder of a run to go on with; --total-timesteps can make a multitask one longer
    evaluate: str | None = None  # folder of a run, or a policy's file, to evaluate instead of training
    video: bool = False  # with --evaluate: also write a GIF beside it
    eval_every: int = 250_000  # steps between evaluations, each at the end of a rollout
    eval_episodes: int = 10  # episodes of each task per evaluation
    checkpoint_every: int = 500_000  # steps between checkpoints, each at the end of a rollout
    device: str = "cpu"  # cpu, cuda or cuda:N
    num_threads: int | None = None  # CPU threads of PyTorch (default: OMP_NUM_THREADS, or else 2)
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # torch.set_float32_matmul_precision
    # PPO
    num_envs: int = 63  # environments
    num_steps: int = 128  # steps of each environment per rollout
    update_epochs: int = 4  # passes over a rollout
    num_minibatches: int = 8  # updates per pass
    learning_rate: float = 5e-3  # Adam's step size
    anneal_lr: bool = True  # lowers it linearly to 0
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    clip_coef: float = 0.2  # the ratio counts within 1 +- this
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.01  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    # tasks and mixture
    channels: Literal["own", "shared"] = "own"  # a block of channels for each game, or all start with the first
    actions: Literal["minimal", "all"] = "minimal"  # a game offers the actions that do something in it, or all six
    protocol: Literal["multitask", "continual"] = "multitask"  # all tasks at once, or one after the other
    cycles: int = 1  # continual: passes through the list of tasks
    actor_moe: Architecture = "middle"  # which layers of the actor are mixtures
    critic_moe: Architecture = "middle"  # which layers of the critic are mixtures
    router: Literal["softmoe", "topk", "hardcoded"] = "softmoe"  # how experts are weighted
    num_experts: int = 8  # n
    top_k: int = 1  # topk: experts per token
    tokens: Literal["perconv", "persamp"] = "perconv"  # middle: a token is a cell of the convolution, or a sample
    slots: int = 1  # softmoe with perconv: slots per expert, p; 0 is m / n, rounded up
    load_balance: float = 0.0  # topk: weight of Switch's load-balancing loss
    match_params: bool = False  # divide the width of the experts by n (all, big: by its root)
    width: int = 128  # hidden units of a network, or of each expert
    freeze_router: bool = False  # the routers keep their initial weights
    adam_reset: bool = True  # continual: clear Adam's moments when a phase starts
    anneal_per_phase: bool = True  # continual: --anneal-lr starts anew with each phase

    @property
    def env_id(self) -> str:
        """What the folder of the run is named after."""
        return "MinAtar-" + "-".join(self.tasks)


CHANNELS = {"asterix": 4, "breakout": 4, "freeway": 7, "seaquest": 10, "space_invaders": 6}  # of MinAtar's games
Batch = namedtuple("Batch", "obs task action log_prob advantage target")  # obs (B, 10, 10, C) bool, the others (B,)
ACTIONS = 6  # nothing, left, up, right, down, fire; most games know fewer (MinAtar's minimal action sets):
MINIMAL = {"asterix": (0, 1, 2, 3, 4), "breakout": (0, 1, 3), "freeway": (0, 2, 4), "space_invaders": (0, 1, 3, 5)}


def blocks(args: Args) -> list[int]:
    """The first channel of each task's block, and the number of channels."""
    sizes = [CHANNELS[task] for task in args.tasks]
    return [*[0] * len(sizes), max(sizes)] if args.channels == "shared" else [0, *itertools.accumulate(sizes)]


def phases(args: Args) -> int:
    """Number of phases: a phase per task and cycle in the continual protocol, otherwise one."""
    return len(args.tasks) * args.cycles if args.protocol == "continual" else 1


def running_phase(step: int, args: Args) -> int:
    """Phase of step `step`, both counted from 0; in the continual protocol its task is phase mod T."""
    return step * phases(args) // args.total_timesteps


class Mixture(nn.Module):
    """y = sum_i w_i(x) f_i(x) of n experts f_i of any kind.

    softmoe    w = softmax(x Phi), linear without a bias, as in the code of 2402.08609
    topk       the k largest of that softmax as they are, the others 0, as in that code (Riquelme et al. 2021;
               k = 1 is the Switch gate; Shazeer et al. 2017 would make the k sum to 1)
    hardcoded  w = onehot(task); nothing to learn
    """

    def __init__(self, experts: list[nn.Module], inputs: int, args: Args, slots: int = 1):
        super().__init__()
        self.experts, self.router, self.top_k, self.balance = nn.ModuleList(experts), args.router, args.top_k, 0.0
        if self.router != "hardcoded":
            self.phi = nn.Parameter(torch.randn(inputs, slots * len(experts)) / math.sqrt(inputs))

    def weights(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """x (B, ..), task (B,) -> w (B, n)."""
        n = len(self.experts)
        if self.router == "hardcoded":
            return F.one_hot(task, n).float()
        w = (x.flatten(1) @ self.phi).softmax(1)
        if self.router == "topk":
            chosen = torch.zeros_like(w).scatter_(1, w.topk(self.top_k, 1).indices, 1.0)
            # Fedus et al. 2021: n sum_i (share of samples that go to i) (mean of w_i), which is 1 where all are equal
            self.balance = n * (chosen.mean(0) / self.top_k * w.mean(0)).sum()
            w = w * chosen
        return w

    def forward(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """x (B, ..), task (B,) -> y (B, h). With topk and hardcoded an expert computes the samples that chose it."""
        w = self.weights(x, task)
        self.w = w.detach()  # for measure()
        if self.router == "softmoe":
            return torch.einsum("bn,nbh->bh", w, torch.stack([expert(x) for expert in self.experts]))
        rows = [column.nonzero().squeeze(1) for column in w.T]  # (B_i,) for each expert
        y = torch.cat([w[r, i, None] * f(x[r]) for i, (r, f) in enumerate(zip(rows, self.experts, strict=True))])
        return y.new_zeros(len(x), y.shape[1]).index_add(0, torch.cat(rows), y)


class CellMixture(Mixture):
    """Mixture whose tokens are the m cells of a sample; experts d -> d with p slots each."""

    def forward(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """X (B, m, d), task (B,) -> Y (B, m, d)."""
        if self.router != "softmoe":  # a token's task is that of its sample
            return super().forward(x.flatten(0, 1), task.repeat_interleave(x.shape[1])).view_as(x)
        logits = (x @ self.phi).transpose(1, 2).contiguous()  # (B, n p, m): the longer one last, which is much faster
        dispatch, combine = logits.softmax(2), logits.softmax(1)
        slots = (dispatch @ x).chunk(len(self.experts), 1)  # n of (B, p, d)
        y = torch.cat([expert(slot) for expert, slot in zip(self.experts, slots, strict=True)], 1)  # (B, n p, d)
        self.w = combine.detach().mean(2).unflatten(1, (len(slots), -1)).sum(2)  # (B, n), the mean over the tokens
        return combine.transpose(1, 2) @ y


def layer(inputs: int, outputs: int, gain: float = 2**0.5) -> nn.Linear:
    """Linear layer that starts with orthogonal weights and a bias of 0, as in ppo.py."""
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


class Conv(nn.Conv2d):
    """3x3 convolution with channels last: (B, 10, 10, C) -> (B, 8, 8, width)."""

    def __init__(self, channels: int, width: int):
        super().__init__(channels, width, 3)
        nn.init.orthogonal_(self.weight, 2**0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Network(nn.Module):
    """Convolution to 16 channels, 128 units and a head, with ReLU: layers f1, f2, f3, some of them mixtures.

    baseline   y = f3(f2(f1(x)))
    middle     y = f3(sum_i w_i(h) f2_i(h)), h = f1(x); with PerConv tokens f2 maps cells to cells
    final      y = sum_i w_i(h) f3_i(h), h = f2(f1(x))
    all        every layer is a mixture with a router of its own
    big        each expert is a whole network: y = sum_i w_i(x) f3_i(f2_i(f1_i(x))), one router
    With hardcoded routing all and big are the same function: a network for each task.
    """

    MIXED = {"baseline": (), "middle": (1,), "final": (2,), "all": (0, 1, 2), "big": (0, 1, 2)}  # layers with experts

    def __init__(self, channels: int, outputs: int, gain: float, architecture: str, args: Args):
        super().__init__()
        n, mixed = args.num_experts, self.MIXED[architecture]
        share = (n if len(mixed) == 1 else math.sqrt(n)) if args.match_params else 1
        conv, units = (max(round(w / share), 1) if i in mixed else w for i, w in enumerate((16, args.width)))
        make = (  # each layer, and the number of inputs of a router in front of it
            (lambda: nn.Sequential(Conv(channels, conv), nn.ReLU(), nn.Flatten()), 100 * channels),
            (lambda: nn.Sequential(layer(64 * conv, units), nn.ReLU()), 64 * conv),
            (lambda: layer(units, outputs, gain), units),
        )
        if architecture == "big":
            layers = [Mixture([nn.Sequential(*(f() for f, _ in make)) for _ in range(n)], 100 * channels, args)]
        elif architecture == "middle" and args.tokens == "perconv":
            experts = [nn.Sequential(layer(16, units), nn.ReLU(), layer(units, 16, 1.0)) for _ in range(n)]
            layers = [nn.Sequential(Conv(channels, conv), nn.ReLU(), nn.Flatten(1, 2))]  # (B, 64, 16)
            layers += [CellMixture(experts, 16, args, args.slots or -(-64 // n))]
            layers += [nn.Sequential(nn.Flatten(), layer(1024, outputs, gain))]
        else:
            layers = [Mixture([f() for _ in range(n)], d, args) if i in mixed else f() for i, (f, d) in enumerate(make)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """x (B, 10, 10, C), task (B,) -> y (B, out)."""
        for f in self.layers:
            x = f(x, task) if isinstance(f, Mixture) else f(x)
        return x


class Agent(nn.Module):
    """Everything that learns: actor, critic, and Adam."""

    def __init__(self, args: Args):
        super().__init__()
        *_, channels = blocks(args)
        self.actor = Network(channels, ACTIONS, 0.01, args.actor_moe, args)
        self.critic = Network(channels, 1, 1.0, args.critic_moe, args)
        offered = [MINIMAL.get(task, range(6)) if args.actions == "minimal" else range(6) for task in args.tasks]
        masked = torch.tensor([[action not in known for action in range(ACTIONS)] for known in offered])  # (T, 6)
        self.register_buffer("masked", masked, persistent=False)
        for name, weight in self.named_parameters():
            weight.requires_grad_(not (args.freeze_router and name.endswith("phi")))
        self.to(args.device)
        self.optimizers = [torch.optim.Adam(self.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)]

    def log_probs(self, obs: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """obs (B, 10, 10, C), task (B,) -> log pi(.|s) (B, 6); what a game does not offer has the probability 0."""
        logits = self.actor(obs.float(), task).masked_fill(self.masked[task], -1e9)  # with -inf the entropy is nan
        return logits.log_softmax(1)

    def value(self, obs: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """obs (B, 10, 10, C), task (B,) -> V (B,)."""
        return self.critic(obs.float(), task).squeeze(1)

    @torch.no_grad()
    def act(self, obs: torch.Tensor, task: torch.Tensor, policy: str) -> torch.Tensor:
        """obs (B, 10, 10, C), task (B,) -> action (B,): a draw (stochastic) or the likeliest (deterministic)."""
        log_probs = self.log_probs(obs, task)
        return draw(log_probs) if policy == "stochastic" else log_probs.argmax(1)


def draw(logits: torch.Tensor) -> torch.Tensor:
    """logits (B, A) -> action (B,) ~ softmax, as torch.multinomial draws, without its checks, which wait for a GPU."""
    return (logits.softmax(1) / torch.empty_like(logits).exponential_()).argmax(1)


@torch.no_grad()
def rollout(agent: Agent, games: "Games", steps: int, args: Args) -> tuple[Batch, list[tuple[int, float, int]]]:
    """`steps` steps of all N games with their advantages, and task, return and length of each episode that ended."""
    columns, cut, episodes = [], {}, []
    for t in range(steps):
        obs = torch.from_numpy(games.obs.copy()).to(args.device)  # (N, 10, 10, C)
        log_probs, value = agent.log_probs(obs, games.task), agent.value(obs, games.task)
        action = draw(log_probs)
        log_prob = log_probs.gather(1, action[:, None]).squeeze(1)
        reward, terminated, truncated, ended = games.step(action.tolist())
        columns.append((obs, games.task, action, log_prob, value, reward, terminated, truncated))
        for i, last_obs, episode in ended:
            episodes.append((int(games.task[i]), *episode))
            if truncated[i]:
                cut[t, i] = last_obs  # before the new episode's first
    *batch, value, reward, terminated, truncated = map(torch.stack, zip(*columns, strict=True))  # (steps, N, ..)

    next_value = torch.cat([value[1:], agent.value(torch.from_numpy(games.obs).to(args.device), games.task)[None]])
    for (t, i), last_obs in cut.items():
        next_value[t, i] = agent.value(torch.from_numpy(last_obs)[None].to(args.device), games.task[i : i + 1])
    advantage = gae(reward, value, next_value, terminated.float(), (terminated | truncated).float(), args)
    return Batch(*(x.flatten(0, 1) for x in (*batch, advantage, advantage + value))), episodes


def gae(reward, value, next_value, terminated, done, args: Args) -> torch.Tensor:
    """Generalised advantage estimate, all (steps, N). A time limit cuts the sum but keeps the value behind it."""
    delta = reward + args.gamma * (1 - terminated) * next_value - value
    decay = args.gamma * args.gae_lambda * (1 - done)
    advantages, advantage = [], torch.zeros_like(delta[0])
    for delta_t, decay_t in zip(delta.flip(0), decay.flip(0), strict=True):
        advantage = torch.addcmul(delta_t, decay_t, advantage)  # A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}
        advantages.append(advantage)
    return torch.stack(advantages).flip(0)


def losses_of(agent: Agent, batch: Batch, args: Args) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Losses of actor and critic, each with its load-balancing loss, and what is logged."""
    # Actor: maximise E[min(r A, clip(r, 1 - eps, 1 + eps) A)] + c H(pi), r = pi(a|s) / pi_old(a|s)
    log_probs = agent.log_probs(batch.obs, batch.task)  # (B, 6)
    log_ratio = log_probs.gather(1, batch.action[:, None]).squeeze(1) - batch.log_prob  # (B,)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    advantage = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
    actor_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
    entropy = -(log_probs.exp() * log_probs).sum(1).mean()

    # Critic: minimise E[(V(s) - (A + V_old(s)))^2]
    critic_loss = (agent.value(batch.obs, batch.task) - batch.target).square().mean()
    metrics = {
        "losses/critic": critic_loss.detach(),
        "losses/actor": actor_loss.detach(),
        "policy/entropy": entropy.detach(),
        "policy/kl": (ratio - 1 - log_ratio).detach().mean(),  # KL(pi_old || pi), estimated, never negative
        "policy/clipped": (ratio != clipped).float().mean(),
    }
    balance = [sum(m.balance for m in net.modules() if isinstance(m, Mixture)) for net in (agent.actor, agent.critic)]
    actor_loss = actor_loss - args.ent_coef * entropy + args.load_balance * balance[0]
    return actor_loss, args.vf_coef * critic_loss + args.load_balance * balance[1], metrics


def update(agent: Agent, batch: Batch, args: Args) -> dict[str, torch.Tensor]:
    """One step of Adam on actor and critic by a minibatch. Returns detached scalars."""
    actor_loss, critic_loss, metrics = losses_of(agent, batch, args)
    (optimizer,) = agent.optimizers
    optimizer.zero_grad()
    (actor_loss + critic_loss).backward()
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    return metrics


def learn(agent: Agent, batch: Batch, args: Args) -> dict[str, torch.Tensor]:
    """Epochs of updates on shuffled minibatches; returns the means of what update() returns."""
    metrics = []
    for _ in range(args.update_epochs):
        for rows in torch.randperm(len(batch.obs)).to(args.device).chunk(args.num_minibatches):
            metrics.append(update(agent, Batch(*(x[rows] for x in batch)), args))
    return {key: torch.stack([m[key] for m in metrics]).mean() for key in metrics[0]}


def train(args: Args, saved: dict | None = None):
    """Roll out and learn, in the continual protocol one game after the other; from `saved` on if there is one."""
    torch.manual_seed(args.seed)
    number, size = len(args.tasks), args.num_envs * args.num_steps
    playing = args.tasks if args.protocol == "multitask" else args.tasks[:1]
    agent, games = Agent(args), Games([playing[i % len(playing)] for i in range(args.num_envs)], args)
    run = Run(args, saved, size, agent=agent, games=games)  # all that a checkpoint holds
    (optimizer,) = agent.optimizers
    for step in run.steps():
        first = step - size  # of this rollout
        phase = running_phase(first, args)
        if first and phase != running_phase(first - size, args):
            games.begin([args.tasks[phase % number]] * args.num_envs, max(games.episodes) + 1)
            if args.adam_reset:
                optimizer.state.clear()
        progress = first * phases(args) / args.total_timesteps  # in phases
        progress = progress - phase if args.anneal_per_phase else progress / phases(args)
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress if args.anneal_lr else 1)
        batch, episodes = rollout(agent, games, args.num_steps, args)
        metrics = learn(agent, batch, args) | {"charts/learning_rate": optimizer.param_groups[0]["lr"]}
        for task in {task for task, *_ in episodes}:
            results = np.mean([values for t, *values in episodes if t == task], axis=0)
            metrics[f"charts/episodic_return_{task}"], metrics[f"charts/episodic_length_{task}"] = results
        run.log(metrics)
        if run.policies(step):
            run.evaluate()
        if run.due(step, args.checkpoint_every):
            run.save()


# ======================================================================================================================
# That was the agent. The rest, mostly the same in both multi-task scripts: games, measurements, files, flags, errors.
# ======================================================================================================================
TIME_LIMIT = 1_000  # steps of an episode, as in gymnax; MinAtar has none but Freeway's 2,500
PROBE = 4, 128  # games of each task, and their steps, that the networks are measured on


class Games:
    """N games of MinAtar side by side; obs (N, 10, 10, C) bool is what they show, task (N,) which they are.

    Each episode has its own seed, so that resume can play its actions again. Sticky actions (0.1) and the ramp of
    difficulty are MinAtar's defaults.
    """

    def __init__(self, tasks: list[str], args: Args, evaluation: bool = False):
        self.args, self.first_seed, self.half = args, args.seed * 100_003, 2**31 * evaluation  # upper half of uint32
        self.begin(tasks, 0)

    def begin(self, tasks: list[str], first: int):
        """Other games, game i in its episode first + i."""
        with exit_on_error(f"--tasks {' '.join(self.args.tasks)}", "pip install minatar"):
            from minatar import Environment
        self.tasks, self.games = list(tasks), [Environment(task) for task in tasks]
        self.task = torch.tensor([self.args.tasks.index(task) for task in tasks], device=self.args.device)
        *starts, channels = blocks(self.args)
        self.obs = np.zeros((len(tasks), 10, 10, channels), bool)
        blocks_of = [slice(starts[t], starts[t] + CHANNELS[task]) for t, task in zip(self.task, tasks, strict=True)]
        self.views = [obs[..., block] for obs, block in zip(self.obs, blocks_of, strict=True)]  # what each game shows
        self.episodes, self.played, self.returns = ([None] * len(tasks) for _ in range(3))
        for i, game in enumerate(self.games):
            game.seed(0)  # from now on both of its parts have one random state
            self.start(i, first + i)

    def start(self, i: int, episode: int):
        """Game i starts the episode with this number."""
        game, self.episodes[i], self.played[i], self.returns[i] = self.games[i], episode, [], 0.0
        game.random.seed(self.half + (self.first_seed + episode) % 2**31)
        game.reset()
        game.last_action = 0  # which reset() forgets
        self.views[i][:] = game.state()  # the other channels stay empty

    def play(self, i: int, action: int) -> tuple[float, bool, bool]:
        """Reward, terminated and truncated of one step of game i."""
        reward, terminated = self.games[i].act(action)
        self.views[i][:] = self.games[i].state()
        self.played[i].append(action)
        self.returns[i] += float(reward)
        return float(reward), bool(terminated), len(self.played[i]) >= TIME_LIMIT and not terminated

    def step(self, actions: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list]:
        """Actions (N,) -> reward, terminated, truncated (N,). A game that ends starts its next episode.

        Last comes (game, last observation, (return, length)) of each episode that ended.
        """
        steps, ended = [self.play(i, action) for i, action in enumerate(actions)], []
        for i, (_, terminated, truncated) in enumerate(steps):
            if terminated or truncated:
                ended.append((i, self.obs[i].copy(), (self.returns[i], len(self.played[i]))))
                self.start(i, max(self.episodes) + 1)
        return *(torch.tensor(x, device=self.args.device) for x in zip(*steps, strict=True)), ended

    def state_dict(self) -> dict:
        return {"obs": torch.from_numpy(self.obs)} | {k: getattr(self, k) for k in ("tasks", "episodes", "played")}

    def load_state_dict(self, state: dict):
        self.begin(state["tasks"], 0)
        for i, (episode, actions) in enumerate(zip(state["episodes"], state["played"], strict=True)):
            self.start(i, episode)
            for action in actions:
                self.play(i, action)
        if not np.array_equal(self.obs, state["obs"]):
            raise ValueError("a game does not repeat its own episode, start anew")


def make_envs(args: Args, evaluation: bool) -> Games:
    """The games of an evaluation, --eval-episodes of each task."""
    return Games([task for task in args.tasks for _ in range(args.eval_episodes)], args, evaluation)


def evaluate(agent: Agent, games: Games, args: Args, step: int, policy: str, watch=lambda live: None) -> list[dict]:
    """Rows of eval.csv, of each task raw returns of episodes with their own seeds; random states stay as they are."""
    games.begin(games.tasks, 0)
    live = list(range(len(games.games)))
    with torch.random.fork_rng([args.device] if args.device != "cpu" else []):
        torch.manual_seed(args.seed)
        while live and not SIGNALS:
            watch(live)
            action = agent.act(torch.from_numpy(games.obs[live]).to(args.device), games.task[live], policy)
            live = [i for i, a in zip(live, action.tolist(), strict=True) if not any(games.play(i, a)[1:])]
    results = [(r, len(played), math.nan, math.nan) for r, played in zip(games.returns, games.played, strict=True)]
    parts = np.split(np.array(results), len(args.tasks))  # games know no success
    return [] if SIGNALS else [eval_row(step, policy, task, part) for task, part in enumerate(parts)]


def film(agent: Agent, args: Args) -> bytes:
    """A GIF of one episode of each task, one after the other."""
    with exit_on_error("--video", "pip install pillow"):
        from PIL import Image  # comes with tensorboard

        games, seen = make_envs(args, evaluation=True), []

        def watch(live: list[int]):
            seen.extend((i, games.obs[i].copy()) for i in live)

        if not evaluate(agent, games, args, 0, "deterministic", watch):
            raise SystemExit(128 + SIGNALS[0])
        grey = np.linspace(80, 255, games.obs.shape[-1])  # the higher the channel, the brighter
        pictures = [(obs * grey).max(-1).astype(np.uint8) for _, obs in sorted(seen, key=lambda x: x[0])]  # (10, 10)
        first, *others = (Image.fromarray(picture.repeat(16, 0).repeat(16, 1)) for picture in pictures)
        first.save(gif := io.BytesIO(), "GIF", save_all=True, append_images=others, duration=40, loop=0)
    return gif.getvalue()


def probe(agent: Agent, args: Args, parts: dict) -> tuple[torch.Tensor, dict, dict]:
    """Tasks (B,), inputs of actor and critic, and the losses of each task, on a rollout of all tasks."""
    games = Games([task for task in args.tasks for _ in range(PROBE[0])], args, evaluation=True)
    games.begin(games.tasks, 10**6)
    batch, _ = rollout(agent, games, PROBE[1], args)
    losses = [losses_of(agent, Batch(*(x[batch.task == t] for x in batch)), args) for t in range(len(args.tasks))]
    inputs, (actor, critic, _) = (batch.obs.float(), batch.task), zip(*losses, strict=True)
    return batch.task, {"actor": inputs, "critic": inputs}, {"actor": actor, "critic": critic}


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
    """The gradient of `loss` for all trained parameters of `module` as one vector."""
    parts = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def entropy_of(w: torch.Tensor) -> torch.Tensor:
    """Weights w (B, n) of n experts -> mean entropy [nats] of a state's weights, scaled to sum to 1."""
    return torch.special.entr(w / w.sum(-1, keepdim=True)).sum(-1).mean()


def count_parameters(module: nn.Module, args: Args) -> dict[str, int]:
    """All parameters, and those that one token needs: an expert of weight 0 is not needed."""
    share = {"softmoe": 1.0, "topk": args.top_k / args.num_experts, "hardcoded": 1 / args.num_experts}[args.router]
    total = sum(p.numel() for p in module.parameters())
    experts = sum(p.numel() for m in module.modules() if isinstance(m, Mixture) for p in m.experts.parameters())
    return {"total": total, "active": total - round(experts * (1 - share))}


@torch.no_grad()
def look_inside(module: nn.Module, inputs: tuple) -> list[tuple[dict, dict, torch.Tensor]]:
    """What runs through each Network of `module`: neurons of each hidden layer, weights of each router, features.

    Neurons: a row per sample (convolution: per cell; Soft MoE on cells: per slot), a column per neuron of all experts,
    0 where one was not chosen. Weights (B, n). Features (B, F): what the last layer multiplies, of big all w_i h_i.
    """
    seen, result = {}, []
    hooks = [m.register_forward_hook(lambda m, x, y: seen.update({m: (x[0], y)})) for m in module.modules()]
    module(*inputs)
    for hook in hooks:
        hook.remove()

    def spread(layer, i, x):  # the rows of expert i in their places, 0 where it was not chosen
        if not isinstance(layer, Mixture) or layer.router == "softmoe":
            return x
        full = x.new_zeros(len(layer.w), *x.shape[1:])
        full[layer.w[:, i] > 0] = x
        return full

    for layers in (m.layers for m in module.modules() if isinstance(m, Network)):
        big, neurons, routers = len(layers) == 1, {}, {}
        for k, layer in enumerate([*layers] * 3 if big else layers):
            experts = layer.experts if isinstance(layer, Mixture) else [layer]
            parts = [expert[k] if big else expert for expert in experts]
            if isinstance(layer, Mixture) and not (big and k):
                routers[f"router{k + 1}"] = layer.w.unflatten(0, (len(inputs[-1]), -1)).mean(1)  # over the cells
            outputs = [seen[m][1] for part in parts for m in part.modules() if isinstance(m, nn.ReLU)]
            if outputs:
                columns = [spread(layer, i, x).flatten(0, -2) for i, x in enumerate(outputs)]
                neurons[f"layer{k + 1}"] = torch.cat(columns, 1)
        features = [layer.w[:, i, None] * spread(layer, i, seen[f][0]) for i, f in enumerate(parts)] if big else []
        result.append((neurons, routers, torch.cat(features, 1) if big else seen[layer][0].flatten(1)))
    return result


def measure(agent: Agent, args: Args, step: int, parts: dict) -> list[dict]:
    """Rows of moe.csv, measured on the states of all tasks that probe() finds. Training does not notice.

    dormant_TAU  share of dormant neurons, per hidden layer and in total, on all states and on those of a task (column
                 task). Of a convolution a neuron is a channel. A layer has the neurons of all its experts, and a neuron
                 is 0 where its expert is not chosen (ours); for TAU > 0 an expert whose values are small beside those
                 of the others thus counts as dormant, for TAU = 0 it does not
    rank, width, norm  of the penultimate features: effective rank (at most the number of states), number, mean norm
    router       mean weight of each task (column task) and expert (column item); if cells are tokens, over the cells
    entropy      mean over a task's states of the entropy of their weights [nats]: 0 is one expert per state
    cosine       between the gradients of two tasks' losses (columns task and item)
    parameters   all of them, and those active for one token: what is left without experts of weight 0
    Of two critics router is the first's, cosine is of both gradients as one, parameters a sum, and the rest a mean.
    """
    rows = []

    def row(network, metric, value, task="", item=""):
        rows.append({"global_step": step, "network": network, "metric": metric, "task": task, "item": item})
        rows[-1]["value"] = round(float(value), 6)

    with torch.random.fork_rng([args.device] if args.device != "cpu" else []):
        torch.manual_seed(args.seed)
        task, inputs, losses = probe(agent, args, parts)
    seen = task.unique().tolist()
    for name in ("actor", "critic"):
        module = getattr(agent, name)
        neurons, routers, features = zip(*look_inside(module, inputs[name]), strict=True)  # of each network
        for t in ("", *seen):
            mask = task == t if t != "" else torch.ones_like(task, dtype=torch.bool)
            mine = [{k: x[mask.repeat_interleave(len(x) // len(mask))] for k, x in net.items()} for net in neurons]
            for tau in (0.025, 0.0):
                asleep = {key: torch.cat([dormant(net[key], tau) for net in mine]).float() for key in mine[0]}
                for key, x in (asleep | {"total": torch.cat(list(asleep.values()))}).items():
                    row(name, f"dormant_{tau}", x.mean(), t, key)
        row(name, "rank", np.mean([effective_rank(x) for x in features]))
        row(name, "width", features[0].shape[1])
        row(name, "norm", torch.cat(features).norm(dim=1).mean())
        for key, w in routers[0].items():
            for t in seen:
                for expert, value in enumerate(w[task == t].mean(0).tolist()):
                    row(name, key, value, t, expert)
                entropy = entropy_of(torch.cat([weights[key][task == t] for weights in routers]))
                row(name, key.replace("router", "entropy"), entropy, t)
        for item, number in count_parameters(module, args).items():
            row(name, "parameters", number, item=item)
        table = cosines([gradient(loss, module) for loss in losses[name]]).tolist()
        for i, j in itertools.combinations(range(len(seen)), 2):
            row(name, "cosine", table[i][j], seen[i], seen[j])
    return rows


def eval_row(step: int, policy: str, task: int, results) -> dict:
    """A row of eval.csv, of return, length, success and success_once of each episode."""
    values, std = (f(results, axis=0).round(4).tolist() for f in (np.mean, np.std))
    row = {"global_step": step, "policy": policy, "task": task, "episodes": len(results), "return": values[0]}
    return row | {"return_std": std[0]} | dict(zip(("length", "success", "success_once"), values[1:], strict=True))


class Run:
    """A training and its folder. A checkpoint is `info`, which run.json has as well, and the state of all parts."""

    def __init__(self, args: Args, saved: dict | None, size: int, agent: Agent, **parts):
        self.args, self.size, self.agent, self.eval_env = args, size, agent, make_envs(args, evaluation=True)
        self.step, self.eval_rows, self.moe_rows, self.owed = 0, [], [], False  # owed: what a signal cut short
        ends = range(size, args.total_timesteps + size, size)  # the end of a phase is evaluated, too
        phase_ends = {end for end in ends if running_phase(end, args) > running_phase(end - size, args)}
        self.evaluations = [end for end in ends if end in phase_ends or self.due(end, args.eval_every)]
        self.parts = {"agent": agent} | parts | {f"optimizer_{i}": x for i, x in enumerate(agent.optimizers)}
        self.info = describe(args) | {"wall_time": 0.0, "resumed": []}
        self.info["parameters"] = {name: count_parameters(getattr(agent, name), args) for name in ("actor", "critic")}
        gpu = [] if args.device == "cpu" else [torch.cuda.default_generators[torch.device(args.device).index or 0]]
        self.folder, self.rngs = Path(args.run_dir), [torch.default_generator, *gpu]
        if saved:
            with exit_on_error(f"--resume {self.folder}", "checkpoint.pt is damaged or of another run"):
                for name, part in self.parts.items():
                    part.load_state_dict(saved.pop(name))
                for rng, state in zip(self.rngs, saved["rng"], strict=True):
                    rng.set_state(state)
                self.step, self.owed = saved["global_step"], saved["owed"]
                now, self.info = {"global_step": self.step} | self.info, {key: saved[key] for key in self.info}
                self.info["resumed"].append(now)  # of its evaluations a longer run keeps those that it has as well:
                self.eval_rows = [r for r in saved["eval_rows"] if r["policy"] in self.policies(r["global_step"])]
                self.moe_rows = [r for r in saved["moe_rows"] if self.policies(r["global_step"])]
        what = f"--{'resume' if saved else 'run-dir'} {self.folder}"
        with exit_on_error(what, "no other process may use it, and a new run wants an empty folder"):
            str(self.folder).encode()
            if not saved and (self.folder / "checkpoint.pt").exists():
                raise ValueError("holds a run; go on with it by --resume")
            self.folder.mkdir(parents=True, exist_ok=True)
            OPEN.callback(os.close, folder := os.open(self.folder, os.O_RDONLY))
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while another process is at work there
        for name, count in self.info["parameters"].items():
            print(f"{SCRIPT}.py: {name}: {count['total']:,} parameters, {count['active']:,} active for one token")
        self.first = self.step, time.perf_counter()  # of this process, for steps per second
        self.started = self.first[1] - self.info["wall_time"]
        self.save()
        # what fails in TensorBoard's own thread is raised again by the next add_scalar()
        threading.excepthook = lambda x: None if issubclass(x.exc_type, OSError) else threading.__excepthook__(x)
        self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
        OPEN.callback(self.writer.close)
        self.bar = tqdm(initial=self.step, total=args.total_timesteps, disable=None, unit="step")

    def steps(self):
        """The steps that are left, `size` at a time. Ctrl-C and SIGTERM end them after that, with a checkpoint."""
        if self.owed:
            self.evaluate()
            self.save()
        while self.step < self.args.total_timesteps and not SIGNALS:
            self.step += self.size
            yield self.step
            self.bar.update(self.size)
        self.bar.close()
        if SIGNALS:
            self.save()
            name = signal.Signals(SIGNALS[0]).name
            print(f"{SCRIPT}.py: {name}, step {self.step} is saved; --resume {self.folder}", file=sys.stderr)
            raise SystemExit(128 + SIGNALS[0])

    def due(self, step: int, every: int) -> bool:
        """Whether the steps that end at `step` have passed a multiple of `every`, or are the last."""
        return step // every > (step - self.size) // every or step >= self.args.total_timesteps

    def log(self, metrics: dict) -> float:
        """Writes curves for TensorBoard. Returns the environment steps per second since this process began."""
        speed = (self.step - self.first[0]) / (time.perf_counter() - self.first[1])
        for key, value in (metrics | {"charts/SPS": speed}).items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{key} is {float(value)}, the training has diverged")
            self.writer.add_scalar(key, value, self.step)
        returns = [f"{value:.1f}" for key, value in metrics.items() if key.startswith("charts/episodic_return")]
        if returns:
            self.bar.set_postfix_str(f"return {' '.join(returns)}", refresh=False)
        return speed

    def policies(self, step: int) -> tuple[str, ...]:
        """The policies that are evaluated after this step: at the last three evaluations the stochastic one as well."""
        return ("deterministic", "stochastic")[: (step in self.evaluations) + (step in self.evaluations[-3:])]

    def evaluate(self):
        """Adds rows to eval.csv and moe.csv."""
        self.require_finite()
        results = [evaluate(self.agent, self.eval_env, self.args, self.step, p) for p in self.policies(self.step)]
        self.owed = bool(SIGNALS)
        if self.owed or not results:
            return
        for rows in results:
            policy, text = rows[0]["policy"], ""
            suffix = "" if policy == "deterministic" else f"_{policy}"
            for key in ("return", "success"):
                known = {row["task"]: row[key] for row in rows if math.isfinite(row[key])}  # few know success
                speed = self.log({f"eval/{key}{suffix}_{task}": value for task, value in known.items()})
                text += f" {key} " * bool(known) + " ".join(f"{value:.2f}" for value in known.values())
            self.bar.write(f"step {self.step}/{self.args.total_timesteps}: {policy}{text}, {speed:.0f} steps/s")
            self.eval_rows += rows
        sys.stdout.flush()  # it may be a file
        measured, routers = measure(self.agent, self.args, self.step, self.parts), {}
        for row in measured:
            tag = "/".join(["moe", *(str(row[key]) for key in ("network", "metric", "task", "item") if row[key] != "")])
            self.writer.add_scalar(tag, row["value"], self.step)
            if row["metric"].startswith("router"):
                routers.setdefault(f"moe/{row['network']}/{row['metric']}", []).append(row["value"])
        for tag, w in routers.items():  # a row per task, a column per expert, 20 pixels each
            picture = np.kron(np.reshape(w, (-1, self.args.num_experts)), np.ones((20, 20)))
            self.writer.add_image(tag, picture, self.step, dataformats="HW")
        self.moe_rows += measured
        for name, rows in (("eval.csv", self.eval_rows), ("moe.csv", self.moe_rows)):
            table = [rows[0], *(row.values() for row in rows)]  # no time: equal runs, equal files
            write(self.folder / name, "".join(",".join(map(str, row)) + "\n" for row in table).encode())

    def require_finite(self):
        """Raises FloatingPointError if a weight is not finite."""
        if not all(x.isfinite().all() for x in self.agent.state_dict().values()):
            raise FloatingPointError("a weight is not finite, the training has diverged")

    def save(self):
        """Writes checkpoint.pt, model.pt, run.json and, at the end, policy.pt, unless the training has diverged."""
        self.require_finite()
        wall_time = time.perf_counter() - self.started
        self.info |= {"args": dataclasses.asdict(self.args), "global_step": self.step}
        self.info |= {"wall_time": wall_time, "steps_per_second": self.step / wall_time}
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"owed": self.owed, "eval_rows": self.eval_rows, "moe_rows": self.moe_rows}
        state["rng"] = [rng.get_state() for rng in self.rngs]
        write(self.folder / "checkpoint.pt", self.info | state)
        write(self.folder / "model.pt", self.info | {"agent": state["agent"]})
        if self.step >= self.args.total_timesteps:
            actor = {key: value for key, value in state["agent"].items() if key.startswith("actor.")}
            write(self.folder / "policy.pt", self.info | {"agent": actor})
        write(self.folder / "run.json", json.dumps(self.info, indent=1).encode())


def describe(args: Args) -> dict:
    """What one must know to repeat the run: for run.json."""
    file = shlex.quote(Path(__file__).name)  # one that git does not track has no commit
    git = f"git ls-files --error-unmatch {file} >/dev/null && git describe --always --dirty --abbrev=40 --exclude '*'"
    error, commit = subprocess.getstatusoutput(f"cd {shlex.quote(str(Path(__file__).parent))} && {git}")
    names = [name for name in ("gymnasium", "minatar", "mujoco", "numpy", "torch") if name in sys.modules]
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
    chip = torch.backends.cpu.get_cpu_capability() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    return {
        "script": SCRIPT,
        "command": shlex.join(["python", *sys.argv]),
        "args": dataclasses.asdict(args),
        "commit": None if error else commit.removesuffix("-dirty"),
        "dirty": None if error else commit.endswith("-dirty"),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {chip}",
    }


def write(path: Path, data: bytes | dict):
    """Writes a file whole or not at all, a dict by torch.save."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(data, file) if isinstance(data, dict) else file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}, is the disk full? {error}") from error


SCRIPT, SIGNALS, OPEN = Path(__file__).stem, [], contextlib.ExitStack()  # Ctrl-C or SIGTERM; what main() closes
LIMITS = {"seed": (0, 2**31 - 1), "gamma": (0, 1), "gae_lambda": (0, 1), "ent_coef": (0, 1e12)}  # others: positive
LIMITS |= {"load_balance": (0, 1e12), "num_threads": (1, 4 * (os.cpu_count() or 1))}
LIMITS |= {name: (1, 10_000) for name in ("num_envs", "num_steps", "eval_episodes")}  # memory
LIMITS |= {"num_experts": (1, 256), "slots": (0, 64), "width": (1, 100_000)}
OLDER = {"channels": "shared", "actions": "all", "width": 128}  # what flags that older files lack meant then
OLDER |= {"freeze_router": False, "adam_reset": True, "anneal_per_phase": True}


@contextlib.contextmanager
def exit_on_error(what: str, remedy: str, code: int = 2, errors=Exception):
    """Tells whatever fails inside in one line, and ends the script."""
    try:
        yield
    except errors as error:
        reason, frame = str(error).strip().split("\n")[0], traceback.extract_tb(error.__traceback__)[-1]
        if frame.filename != __file__ or not isinstance(error, (ValueError, FloatingPointError, OSError)):
            reason = f"{type(error).__name__} {reason} ({frame.filename}:{frame.lineno})"
        tqdm.write(f"{SCRIPT}.py: {what}: {reason}; {remedy}", file=sys.stderr)
        raise SystemExit(code) from None


def mixture_rules(args: Args) -> list[tuple[bool, str]]:
    """(wrong, message): tasks and mixture that do not fit together, flags other than --router that have no effect."""
    number, mixed = len(args.tasks), {args.actor_moe, args.critic_moe} - {"baseline"}
    n, k, router = args.num_experts, args.top_k, args.router if mixed else None
    useless = "has no effect here, leave it out; it goes with"
    return [
        (not number, "--tasks: needs at least one"),
        (len(set(args.tasks)) < number, f"--tasks {' '.join(args.tasks)}: name each only once"),
        (router == "topk" and k > n, f"--top-k {k}: there are {n} experts; lower it or raise --num-experts"),
        (router == "hardcoded" and n < number, f"--num-experts {n}: hardcoded needs {number}, one for each task"),
        (router != "topk" and k != 1, f"--top-k: {useless} --router topk and a mixture"),
        (router != "topk" and args.load_balance, f"--load-balance: {useless} --router topk and a mixture"),
        (not mixed and args.match_params, f"--match-params: {useless} an architecture other than baseline"),
        ("final" in mixed and args.match_params, f"--match-params: {useless} layers whose width is free, not final"),
        (args.cycles != 1 and args.protocol == "multitask", f"--cycles: {useless} --protocol continual"),
    ]


def rules(args: Args) -> list[tuple[bool, str]]:
    """(wrong, message) for all that flags together can have wrong."""
    number, steps, parts = len(args.tasks) or 1, args.num_envs * args.num_steps, args.num_minibatches
    unknown = " ".join(task for task in args.tasks if task not in CHANNELS)
    middle = "middle" in (args.actor_moe, args.critic_moe)
    learns = args.router != "hardcoded" and {args.actor_moe, args.critic_moe} != {"baseline"}
    cells, useless = middle and args.tokens == "perconv", "has no effect here, leave it out; it goes with"
    near, multitask = max(args.num_envs // number, 1) * number, args.protocol == "multitask"
    equal = f"needs equal parts of a rollout of {steps} steps, at least 2 each; change it, --num-envs or --num-steps"
    few = args.total_timesteps < phases(args) * steps and not multitask
    never = multitask or not args.anneal_lr  # nothing to anneal phase by phase
    return [
        (unknown, f"--tasks {unknown}: no game of MinAtar; choose from {', '.join(CHANNELS)}"),
        *mixture_rules(args),
        (args.tokens == "persamp" and not middle, f"--tokens persamp: {useless} the architecture middle"),
        (args.slots != 1 and not (cells and args.router == "softmoe"), f"--slots: {useless} Soft MoE of cells"),
        (args.freeze_router and not learns, f"--freeze-router: {useless} a mixture whose router learns"),
        (multitask and not args.adam_reset, f"--no-adam-reset: {useless} --protocol continual"),
        (never and not args.anneal_per_phase, f"--no-anneal-per-phase: {useless} --protocol continual, --anneal-lr"),
        (args.match_params and cells, f"--match-params: {useless} --tokens persamp, experts of cells are small"),
        (multitask and args.num_envs % number, f"--num-envs {args.num_envs}: no multiple of the tasks, as {near} is"),
        (steps % parts or steps < 2 * parts, f"--num-minibatches {parts}: {equal}"),
        (few, f"--total-timesteps {args.total_timesteps}: give a rollout of {steps} for each phase at least"),
    ]


def parse(argv: list[str] | None) -> tuple[Args, dict | None]:
    """Arguments and, where a run is resumed or evaluated, what it saved. Exits where a flag cannot work."""
    args, saved, limits = tyro.cli(Args, args=argv, description=__doc__), None, LIMITS
    option, file, free = "resume", "checkpoint.pt", {"resume", "total_timesteps"}
    if args.evaluate is not None:
        option, file, free = "evaluate", "model.pt", {"evaluate", "video", "eval_episodes", "device", "num_threads"}
    given = getattr(args, option)
    if given is not None:
        path = Path(given) if option == "evaluate" and Path(given).is_file() else Path(given) / file
        with exit_on_error(f"--{option} {given}", f"give the folder of a run of this script; it has {file}"):
            if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
                raise ValueError("the file is damaged")
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if saved["script"] != SCRIPT:
                raise ValueError(f"was made by {saved['script']}.py, use that script")
            saved["args"] = {k: v for k, v in OLDER.items() if k in vars(args)} | saved["args"]
            if saved["args"].keys() != vars(args).keys():
                raise ValueError(f"the script was another then, at commit {saved['commit']}")
            limits = LIMITS | {"total_timesteps": (int(saved["args"]["total_timesteps"]), 1e12)}
            free -= {"total_timesteps"} if saved["args"]["protocol"] == "continual" else set()  # its phases share them
            args = tyro.cli(Args, args=argv, default=Args(**saved["args"]))  # flags that are not given are the run's
    if args.num_threads is None:
        threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        args.num_threads = int(threads) if threads.isdecimal() else 2
    for name, value in vars(args).items():
        with exit_on_error(f"--{name.replace('_', '-')} {value}", "see --help"):
            new = not saved or value != saved["args"][name]  # a limit may be another now, or on another machine
            if saved and new and name not in free:
                raise ValueError(f"cannot change, the run has {saved['args'][name]}")
            low, high = limits.get(name, (1 if type(value) is int else 1e-12, 1e12))
            if new and type(value) in (int, float) and not low <= value <= high:
                raise ValueError(f"must lie between {low:g} and {high:g}")
            if name == "video" and value and args.evaluate is None:
                raise ValueError("goes with --evaluate")
    with exit_on_error(f"--device {args.device}", "--device cpu always works"):
        if args.device != "cpu" and not args.device.startswith("cuda"):
            raise ValueError("must be cpu, cuda or cuda:N")
        torch.zeros(1, device=args.device).item()
    with exit_on_error("torchrun", "start it with python"):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("this script is one process")
    for wrong, message in rules(args):
        if wrong:
            print(f"{SCRIPT}.py: {message}", file=sys.stderr)
            raise SystemExit(2)
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.backends.cudnn.deterministic = True  # or equal runs differ on a GPU
    torch.set_flush_denormal(True)  # numbers below 1e-38, such as Adam's moments of silent units, are slow on CPUs
    return args, saved


def evaluate_run(args: Args, saved: dict):
    """Prints the evaluation of a saved policy as JSON and writes it, and with --video a GIF, beside the policy."""
    env, path = make_envs(args, evaluation=True), Path(args.evaluate)
    agent = Agent(args)
    with exit_on_error(f"--evaluate {path}", "the file is damaged or of another run"):
        state = {key.removeprefix("actor."): x for key, x in saved["agent"].items() if key.startswith("actor.")}
        agent.actor.load_state_dict(state)
    result = {p: evaluate(agent, env, args, saved["global_step"], p) for p in ("deterministic", "stochastic")}
    if SIGNALS:
        raise SystemExit(128 + SIGNALS[0])
    for row in (row for rows in result.values() for row in rows):
        row["task"] = args.tasks[row["task"]]
    text = json.dumps(result, indent=1).replace("NaN", "null")
    print(text)
    write(path / "evaluation.json" if path.is_dir() else path.with_suffix(".json"), text.encode())
    if args.video:
        gif = path / "video.gif" if path.is_dir() else path.with_suffix(".gif")
        write(gif, film(agent, dataclasses.replace(args, eval_episodes=1)))
        print(f"one deterministic episode of each task: {gif}")


def main(argv: list[str] | None = None) -> Path:
    """Trains, resumes or evaluates as the flags say, those of the command line by default; returns the run's folder."""
    SIGNALS.clear()
    if __name__ == "__main__":  # a signal ends the run after its step, a second one at once; in a notebook not ours
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda n, _: (SIGNALS.append(n), signal.signal(n, signal.SIG_DFL)))
    args, saved = parse(argv)
    name = f"{args.env_id.split(':')[-1]}__{SCRIPT}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    default = "runs/" + name.translate(str.maketrans("?&=/", "----"))
    folder = args.evaluate or args.resume or args.run_dir or default
    remedy = f"--resume {folder} goes on" if args.evaluate is None else "make room, or copy the policy elsewhere"
    diverged = exit_on_error("stopped", "it would again, start anew with a smaller step size", 1, FloatingPointError)
    with exit_on_error("stopped", remedy, 1, OSError), diverged, OPEN:
        if args.evaluate is not None:
            evaluate_run(args, saved)
        else:
            train(dataclasses.replace(args, run_dir=folder, resume=None), saved)
            print(f"{SCRIPT}.py: finished; run folder {folder}")
    return Path(folder)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may have letters that the terminal lacks
    main()

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "minatar>=1.0.15,<1.1",
#     "tyro>=1.0,<2",
#     "tensorboard>=2.18,<3",
#     "tqdm>=4.66,<5",
#     "numpy>=2.0,<3",
# ]
# ///
"""PQN on MinAtar with a mixture of experts in the Q-network, Soft MoE or top-1, and its controls.

Papers  Obando-Ceron et al. 2024, "Mixtures of Experts Unlock Parameter Scaling for Deep RL", arXiv 2402.08609, with the
        layer of Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts", arXiv 2308.00951.
        Sokar et al. 2024, "Don't flatten, tokenize!", arXiv 2410.01930, on what the tokens do.
Layer   X (m, d): m = 64 cells of the convolution as tokens of d = 16 channels; Phi (d, n p); L = X Phi (m, n p);
        S = softmax_tokens(L)^T X (n p, d); expert i maps its p rows of S; Y = softmax_slots(L) f(S) (m, d).

Run       python algos/pqn_moe.py                                       # Asterix, Soft MoE with four experts
          python algos/pqn_moe.py --game breakout --moe wide --widen 8
Then      --resume runs/NAME goes on after Ctrl-C, kill -9 or a crash; --evaluate runs/NAME --video shows what it does

What differs from pqn.py:
1. --moe: what stands between the convolution and the last layer.
   none    the 128 units of pqn.py
   wide    128 times --widen units
   soft    Soft MoE of n experts 16-128-16 with p = 64 / n slots each (rounded down); any n that divides 64 costs alike
   topk    top-1: the same experts, each token to the one with the largest weight in w = softmax(x Phi)
   tokens  one MLP 16-128-16 shared by all tokens, y = f(x): no slots, nothing to route
2. The mixtures keep 64 tokens of 16 channels, so the last layer has 1,024 inputs, and LayerNorm takes one token. The
   matrix of 1,024 x 128, most of pqn.py's parameters, is gone: with up to 30 experts the network is the smaller one.
3. Top-1 weights what LayerNorm returns, y = w_i LayerNorm(f_i(x)). LayerNorm maps w f(x) and f(x) to the same vector:
   a weight before it would be lost, and the router would not learn.
4. The share of each expert is logged (moe/usage_k): the weight of its slots, or how many of the tokens chose it.
Where this differs from the papers' code: PQN on MinAtar, not DQN and Rainbow on Atari; LayerNorm and ReLU follow the
mixture; experts have no biases; p is rounded down, not up; top-1 has no balancing loss and drops no token; Phi starts
with the variance 1 / d, theirs with 1 / (d n), and other weights as PyTorch's. X and Phi are not normalised, as in the
RL code; Puigcerver et al. divide them by their norms.
Letters in the shape comments: T steps, N games, B batch, C channels of a picture, A actions; m, n, p, d as above.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import io
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
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    game: str = "asterix"  # asterix, breakout, freeway, seaquest or space_invaders
    seed: int = 1  # seed of everything random
    total_timesteps: int = 2_000_000  # steps of all games together
    run_dir: str | None = None  # folder of this run (default: runs/MinAtar-<game>__<script>__s<seed>__<time>)
    resume: str | None = None  # folder of a run to go on with; --total-timesteps can make it longer
    evaluate: str | None = None  # folder of a run, or a policy's file, to evaluate instead of training
    video: bool = False  # with --evaluate: also write a GIF beside it
    eval_every: int = 100_000  # steps between evaluations, each at the end of a rollout
    eval_episodes: int = 20  # episodes of each policy per evaluation
    checkpoint_every: int = 200_000  # steps between checkpoints, each at the end of a rollout
    device: str = "cpu"  # cpu, cuda or cuda:N
    num_threads: int | None = None  # CPU threads of PyTorch (default: OMP_NUM_THREADS, or else 2)
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # torch.set_float32_matmul_precision
    # MinAtar's rules
    sticky_actions: float = 0.0  # probability that a game repeats the previous action instead
    minimal_actions: bool = True  # only the actions that do something in this game
    time_limit: int = 1_000  # steps after which an episode is truncated
    # PQN
    num_envs: int = 128  # games side by side
    num_steps: int = 32  # steps of each game per rollout
    update_epochs: int = 2  # passes over a rollout
    num_minibatches: int = 32  # updates per pass
    learning_rate: float = 5e-4  # RAdam's step size
    anneal_lr: bool = True  # lowers it linearly to 0 over the run
    gamma: float = 0.99  # discount
    q_lambda: float = 0.65  # lambda of the returns
    epsilon: float = 0.05  # probability of a random action, once it has fallen from 1
    exploration_fraction: float = 0.1  # share of the run over which it falls, linearly
    max_grad_norm: float = 10.0  # the gradient is scaled down to this norm
    # the mixture
    moe: Literal["none", "soft", "topk", "wide", "tokens"] = "soft"  # the layer before the last, see the docstring
    num_experts: int = 4  # n of soft and topk; has no effect on the others
    widen: int = 4  # times 128 units of wide; has no effect on the others


class Mixture(nn.Module):
    """n experts, MLPs 16-128-16 with ReLU, on the tokens of a picture, and LayerNorm; --moe says how they combine."""

    def __init__(self, args: Args, tokens: int = 64, size: int = 16, hidden: int = 128):
        super().__init__()
        self.moe, self.usage = args.moe, ()
        experts = 1 if self.moe == "tokens" else args.num_experts  # n
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(size, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, size, bias=False))
            for _ in range(experts)
        )
        if self.moe != "tokens":
            slots = tokens // experts if self.moe == "soft" else 1  # p
            self.phi = nn.Parameter(torch.randn(size, experts * slots) / math.sqrt(size))
        self.norm = nn.LayerNorm(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X (B, m, d) -> Y (B, m, d)."""
        n = len(self.experts)
        if self.moe == "tokens":
            return self.norm(self.experts[0](x))
        logits = x @ self.phi  # (B, m, n p)
        if self.moe == "soft":
            slots = logits.softmax(1).transpose(1, 2) @ x  # (B, n p, d), weighted means of the tokens
            y = torch.cat([f(part) for f, part in zip(self.experts, slots.chunk(n, 1), strict=True)], 1)  # (B, n p, d)
            combine = logits.softmax(2)  # (B, m, n p)
            self.usage = combine.detach().mean((0, 1)).view(n, -1).sum(1)  # (n,)
            return self.norm(combine @ y)
        w, chosen = logits.softmax(2).max(2)  # (B, m)
        masks = [chosen == i for i in range(n)]  # (B, m) each
        self.usage, y = torch.stack(masks).float().mean((1, 2)), torch.zeros_like(x)  # (n,), (B, m, d)
        for f, mine in zip(self.experts, masks, strict=True):
            y[mine] = w[mine][:, None] * self.norm(f(x[mine]))  # (tokens of f, d); LayerNorm of w f(x) would lose w
        return y


class Network(nn.Module):
    """Q(s, .): 3x3 convolution to 16 channels, a wide layer or a mixture, A outputs. LayerNorm and ReLU follow
    all but the outputs.

    The first LayerNorm takes the 16 channels of one cell, not the whole picture.
    """

    def __init__(self, channels: int, num_actions: int, args: Args):
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3)  # 10 x 10 -> 8 x 8 cells
        self.cells = nn.Sequential(nn.LayerNorm(16), nn.ReLU())
        if args.moe in ("none", "wide"):
            units = 128 * (args.widen if args.moe == "wide" else 1)
            self.middle = nn.Sequential(nn.Flatten(), nn.Linear(64 * 16, units), nn.LayerNorm(units), nn.ReLU())
        else:
            units = 64 * 16
            self.middle = nn.Sequential(Mixture(args), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(units, num_actions)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """obs (B, 10, 10, C) bool -> Q (B, A)."""
        x = self.conv(obs.permute(0, 3, 1, 2).float())  # (B, 16, 8, 8)
        x = self.cells(x.flatten(2).transpose(1, 2))  # (B, 64, 16)
        return self.head(self.middle(x))


class Agent(nn.Module):
    """Everything that learns: the Q-network and its RAdam."""

    def __init__(self, channels: int, num_actions: int, args: Args):
        super().__init__()
        self.network = Network(channels, num_actions, args)
        self.to(args.device)
        self.optimizers = [torch.optim.RAdam(self.parameters(), lr=args.learning_rate, foreach=True)]

    @torch.no_grad()
    def act(self, obs: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (B, 10, 10, C) -> epsilon-greedy actions (B,), max_a Q (B,)."""
        q = self.network(obs.to(self.network.head.weight.device)).cpu()
        value, greedy = q.max(1)
        random = torch.rand(len(q)) < epsilon
        return torch.where(random, torch.randint(q.shape[1], greedy.shape), greedy), value


def lambda_returns(reward, terminated, truncated, next_value, args: Args) -> torch.Tensor:
    """Targets G (T, N) of one rollout from its rewards, the ends of its episodes and V_{t+1}, (T, N) each.

    G_t = r_t + gamma (1 - terminated_t) [lambda G_{t+1} + (1 - lambda) V_{t+1}], V_{t+1} = max_a Q(s_{t+1}, a).
    Where an episode is truncated, or the rollout ends, no G_{t+1} is known: V_{t+1} takes its place.
    """
    targets, target = [], next_value[-1]
    for t in reversed(range(len(reward))):
        target = torch.where(truncated[t], next_value[t], target)
        mix = next_value[t].lerp(target, args.q_lambda)  # lambda G + (1 - lambda) V
        target = reward[t] + args.gamma * ~terminated[t] * mix
        targets.append(target)
    return torch.stack(targets[::-1])


def rollout(agent: Agent, games: "Games", epsilon: float, args: Args) -> tuple["Batch", list[tuple[float, int]]]:
    """T epsilon-greedy steps of N games: T N rows with targets, and (return, length) of the episodes that ended."""
    columns, cut, episodes = [], {}, []
    for t in range(args.num_steps):
        obs = torch.from_numpy(games.obs.copy())  # (N, 10, 10, C)
        action, value = agent.act(obs, epsilon)
        reward, terminated, truncated, ended = games.step(action.tolist())
        columns.append((obs, action, value, reward, terminated, truncated))
        for i, last_obs, episode in ended:
            episodes.append(episode)
            if truncated[i]:
                cut[t, i] = last_obs  # s_{t+1}; games.obs shows the next episode
    obs, action, value, reward, terminated, truncated = map(torch.stack, zip(*columns, strict=True))  # (T, N, ...)

    # No weight changes during a rollout, so step t + 1 has computed V(s_{t+1}) already, except at truncations
    last_obs = torch.from_numpy(np.stack([*games.obs, *cut.values()]))
    last_value = agent.act(last_obs, 0)[1]  # (N + truncations,)
    next_value = torch.cat([value[1:], last_value[None, : args.num_envs]])  # (T, N)
    for index, v in zip(cut, last_value[args.num_envs :], strict=True):
        next_value[index] = v
    target = lambda_returns(reward, terminated, truncated, next_value, args)
    return Batch(*(x.flatten(0, 1).to(args.device) for x in (obs, action, target))), episodes


def update(agent: Agent, batch: "Batch", args: Args) -> dict[str, torch.Tensor]:
    """One gradient step on a minibatch: minimise E[(Q(s, a) - G)^2] / 2. Returns detached scalars."""
    q = agent.network(batch.obs).gather(1, batch.action[:, None]).squeeze(1)  # (B,)
    loss = 0.5 * (q - batch.target).square().mean()
    (optimizer,) = agent.optimizers
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    usage = getattr(agent.network.middle[0], "usage", ())  # of a mixture
    return {
        "losses/critic": loss.detach(),
        "losses/gradient_norm": norm,
        "policy/q": q.detach().mean(),
        **{f"moe/usage_{k}": share for k, share in enumerate(usage)},
    }


def learn(agent: Agent, batch: "Batch", args: Args) -> dict[str, torch.Tensor]:
    """Passes over a rollout in shuffled minibatches; returns the means of what update() returns."""
    metrics = []
    for _ in range(args.update_epochs):
        for rows in torch.randperm(len(batch.obs)).to(args.device).chunk(args.num_minibatches):
            metrics.append(update(agent, Batch(*(x[rows] for x in batch)), args))
    return {key: torch.stack([m[key] for m in metrics]).mean() for key in metrics[0]}


def train(args: Args, saved: dict | None = None):
    """Roll out, learn; from the checkpoint `saved` on if there is one."""
    torch.manual_seed(args.seed)
    games = Games(args, args.num_envs)
    agent = Agent(games.obs.shape[-1], len(games.actions), args)
    run = Run(args, saved, agent=agent, games=games)  # all that a checkpoint holds
    for step in run.steps():
        progress = (step - run.size) / args.total_timesteps  # at the start of this rollout
        epsilon = max(args.epsilon, 1 - (1 - args.epsilon) * progress / args.exploration_fraction)
        learning_rate = args.learning_rate * (1 - progress if args.anneal_lr else 1)
        agent.optimizers[0].param_groups[0]["lr"] = learning_rate
        batch, episodes = rollout(agent, games, epsilon, args)
        metrics = learn(agent, batch, args)

        if episodes:
            metrics["charts/episodic_return"], metrics["charts/episodic_length"] = np.mean(episodes, axis=0)
        run.log(metrics | {"charts/epsilon": epsilon, "charts/learning_rate": learning_rate})
        if run.due(step, args.eval_every):
            run.evaluate(measure(agent.network, batch.obs))
        if run.due(step, args.checkpoint_every):
            run.save()


# ======================================================================================================================
# That was the agent. The rest is the same in both PQN scripts: games, evaluation, files, flags and errors.
# ======================================================================================================================
Batch = namedtuple("Batch", "obs action target")  # (B, 10, 10, C) bool, (B,), (B,)


class Games:
    """N games of MinAtar side by side; obs (N, 10, 10, C) bool is what they show. Each episode has its own seed.

    A checkpoint therefore needs no game's state: resume plays the running episodes' actions again.
    """

    def __init__(self, args: Args, number: int, evaluation: bool = False):
        self.first_seed, self.half = args.seed * 100_003, 2**31 * evaluation  # evaluation: upper half of uint32
        self.time_limit = args.time_limit
        remedy = "games are asterix, breakout, freeway, seaquest and space_invaders, by pip install minatar"
        with exit_on_error(f"--game {args.game}", remedy):
            from minatar import Environment

            self.games = [Environment(args.game, args.sticky_actions) for _ in range(number)]
        for game in self.games:
            game.seed(0)  # from now on both of its parts have one random state
        self.actions = self.games[0].minimal_action_set() if args.minimal_actions else list(range(6))
        self.obs = np.zeros((number, *self.games[0].state_shape()), bool)
        self.episodes, self.played, self.returns = [0] * number, [[] for _ in range(number)], [0.0] * number
        for i in range(number):
            self.start(i, i)

    def start(self, i: int, episode: int):
        """Game i starts the episode with this number."""
        game, self.episodes[i], self.played[i], self.returns[i] = self.games[i], episode, [], 0.0
        game.random.seed(self.half + (self.first_seed + episode) % 2**31)
        game.reset()
        game.last_action = 0  # which reset() forgets
        self.obs[i] = game.state()

    def play(self, i: int, action: int) -> tuple[float, bool, bool]:
        """Reward, terminated and truncated of one step of game i."""
        reward, terminated = self.games[i].act(self.actions[action])
        self.obs[i] = self.games[i].state()
        self.played[i].append(action)
        self.returns[i] += float(reward)
        return float(reward), bool(terminated), len(self.played[i]) >= self.time_limit and not terminated

    def step(self, actions: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list]:
        """Actions (N,) -> reward, terminated, truncated (N,). A game that ends starts its next episode.

        Last comes (game, last observation, (return, length)) of each episode that ended.
        """
        steps, ended = [self.play(i, action) for i, action in enumerate(actions)], []
        for i, (_, terminated, truncated) in enumerate(steps):
            if terminated or truncated:
                ended.append((i, self.obs[i].copy(), (self.returns[i], len(self.played[i]))))
                self.start(i, max(self.episodes) + 1)
        reward, terminated, truncated = map(torch.tensor, zip(*steps, strict=True))
        return reward, terminated, truncated, ended

    def state_dict(self) -> dict:
        return {"episodes": self.episodes, "played": self.played, "obs": torch.from_numpy(self.obs)}

    def load_state_dict(self, state: dict):
        for i, (episode, actions) in enumerate(zip(state["episodes"], state["played"], strict=True)):
            self.start(i, episode)
            for action in actions:
                self.play(i, action)
        if not np.array_equal(self.obs, state["obs"]):
            raise ValueError("a game does not repeat its own episode, as with another version of minatar")


def evaluate(agent: Agent, args: Args, step: int, policy: str, watch=lambda games: None) -> dict:
    """A row of eval.csv: raw returns of `args.eval_episodes` episodes with seeds of their own; watch() sees each step.

    It puts the random state back: training is the same with and without an evaluation. A signal cuts it short.
    """
    games, live = Games(args, args.eval_episodes, evaluation=True), list(range(args.eval_episodes))
    with torch.random.fork_rng([args.device] if args.device != "cpu" else []):
        torch.manual_seed(args.seed)
        while live and not SIGNALS:
            watch(games)
            actions = agent.act(torch.from_numpy(games.obs[live]), args.epsilon if policy == "stochastic" else 0)[0]
            live = [i for i, action in zip(live, actions.tolist(), strict=True) if not any(games.play(i, action)[1:])]
    if SIGNALS:
        return {}
    results = np.array([games.returns, [len(played) for played in games.played]])
    (mean, length), (std, _) = (f(results, axis=1).round(4).tolist() for f in (np.mean, np.std))
    row = {"global_step": step, "policy": policy, "episodes": args.eval_episodes, "return": mean, "return_std": std}
    return row | {"length": length, "success": math.nan}  # games know no success


@torch.no_grad()
def measure(network: nn.Module, obs: torch.Tensor) -> dict[str, float]:
    """Two columns of eval.csv: how much of the network is in use on the states obs (B, 10, 10, C).

    dormant  share of hidden units with E|h_j| <= 0.025 mean_k E|h_k|, k in the same layer (Sokar et al. 2023, arXiv
             2302.12902); where a layer treats 64 cells alike, a cell is a sample; an expert is a layer, all of it
             dormant where no token comes
    rank     effective rank of what the last layer sees: the least number of singular values, largest first, that sum to
             0.99 of all (Kumar et al. 2021, arXiv 2010.14498)
    Networks of another kind differ in both before they learn anything: compare a network with its own past.
    """
    sizes, features = [], []
    hooks = [
        module.register_forward_hook(lambda _, __, h: sizes.append(h.abs().flatten(0, -2).sum(0)))
        for module in network.modules()
        if isinstance(module, nn.ReLU)
    ]
    hooks.append(network.head.register_forward_pre_hook(lambda _, x: features.append(x[0])))
    network(obs)
    for hook in hooks:
        hook.remove()
    dormant = torch.cat([size <= 0.025 * size.mean() for size in sizes]).float().mean().item()
    if not features[0].isfinite().all():
        raise FloatingPointError("a feature is not finite, the training has diverged")
    shares = torch.linalg.svdvals(features[0]).double().cumsum(0)
    return {"dormant": round(dormant, 4), "rank": int((shares < 0.99 * shares[-1]).sum()) + int(shares[-1] > 0)}


class Run:
    """A training and its folder. A checkpoint is `info`, which run.json has as well, and the state of all parts."""

    policies = ("deterministic", "stochastic")  # what is evaluated

    def __init__(self, args: Args, saved: dict | None, agent: Agent, **parts):
        self.args, self.agent, self.size = args, agent, args.num_envs * args.num_steps  # steps of a rollout
        self.step, self.eval_rows, self.owed = 0, [], {}  # owed: measured for an evaluation that a signal cut short
        self.parts = {"agent": agent} | parts | {f"optimizer_{i}": x for i, x in enumerate(agent.optimizers)}
        self.info = describe(args) | {"parameters": sum(x.numel() for x in agent.parameters())}
        self.info |= {"wall_time": 0.0, "resumed": []}
        self.folder, self.rngs = Path(args.run_dir), [torch.default_generator]
        if args.device != "cpu":
            self.rngs.append(torch.cuda.default_generators[torch.device(args.device).index or 0])
        if saved:
            with exit_on_error(f"--resume {self.folder}", "checkpoint.pt is damaged or of another run"):
                for name, part in self.parts.items():
                    part.load_state_dict(saved.pop(name))
                for rng, state in zip(self.rngs, saved["rng"], strict=True):
                    rng.set_state(state)
                self.step, self.owed = saved["global_step"], saved["owed"]
                now, self.info = {"global_step": self.step} | self.info, {key: saved[key] for key in self.info}
                self.info["resumed"].append(now)  # of its evaluations a longer run keeps those that it has as well:
                self.eval_rows = [row for row in saved["eval_rows"] if self.due(row["global_step"], args.eval_every)]
        what = f"--{'resume' if saved else 'run-dir'} {self.folder}"
        with exit_on_error(what, "no other process may use it, and a new run wants an empty folder"):
            str(self.folder).encode()
            if not saved and (self.folder / "checkpoint.pt").exists():
                raise ValueError("holds a run; go on with it by --resume")
            self.folder.mkdir(parents=True, exist_ok=True)
            OPEN.callback(os.close, folder := os.open(self.folder, os.O_RDONLY))
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while another process is at work there
        self.first = self.step, time.perf_counter()  # of this process, for steps per second
        self.started = self.first[1] - self.info["wall_time"]
        self.save()
        # what fails in TensorBoard's own thread is raised again by the next add_scalar()
        threading.excepthook = lambda x: None if issubclass(x.exc_type, OSError) else threading.__excepthook__(x)
        self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
        OPEN.callback(self.writer.close)
        print(f"{SCRIPT}.py: {self.info['parameters']:,} parameters; run folder {self.folder}", flush=True)
        self.bar = tqdm(initial=self.step, total=args.total_timesteps, disable=None, unit="step")

    def steps(self):
        """The ends of the rollouts that are left. Ctrl-C and SIGTERM end them after a whole one, with a checkpoint."""
        if self.owed:
            self.evaluate(self.owed)
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
        """Whether the rollout that ends at `step` has passed a multiple of `every`, or is the last."""
        return step // every > (step - self.size) // every or step >= self.args.total_timesteps

    def log(self, metrics: dict) -> float:
        """Writes curves for TensorBoard. Returns the environment steps per second since this process began."""
        speed = (self.step - self.first[0]) / (time.perf_counter() - self.first[1])
        for key, value in (metrics | {"charts/SPS": speed}).items():
            self.writer.add_scalar(key, value, self.step)
        if "charts/episodic_return" in metrics:
            self.bar.set_postfix_str(f"return {metrics['charts/episodic_return']:.1f}", refresh=False)
        return speed

    def evaluate(self, measured: dict[str, float]):
        """Adds rows to eval.csv, with what measure() found."""
        rows = [evaluate(self.agent, self.args, self.step, policy) | measured for policy in self.policies]
        self.owed = measured if SIGNALS else {}
        if self.owed or not self.due(self.step, self.args.eval_every):  # a longer run owes nothing at an old end
            return
        for row in rows:
            suffix = "" if row["policy"] == "deterministic" else f"_{row['policy']}"
            speed = self.log({f"eval/return{suffix}": row["return"]} | {f"eval/{k}": v for k, v in measured.items()})
            text = f"return {row['return']:.2f}, {speed:.0f} steps/s"
            self.bar.write(f"step {self.step}/{self.args.total_timesteps}: {row['policy']} {text}")
        sys.stdout.flush()  # it may be a file
        self.eval_rows += rows
        table = [rows[0], *(row.values() for row in self.eval_rows)]  # no time: equal runs, equal files
        write(self.folder / "eval.csv", "".join(",".join(map(str, row)) + "\n" for row in table).encode())

    def save(self):
        """Writes checkpoint.pt, model.pt, run.json and, at the end, policy.pt, unless the training has diverged."""
        wall_time = time.perf_counter() - self.started
        self.info |= {"args": dataclasses.asdict(self.args), "global_step": self.step}
        self.info |= {"wall_time": wall_time, "steps_per_second": self.step / wall_time}
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if not all(x.isfinite().all() for x in state["agent"].values()):
            raise FloatingPointError("a weight is not finite, the training has diverged")
        state |= {"owed": self.owed, "eval_rows": self.eval_rows, "rng": [rng.get_state() for rng in self.rngs]}
        write(self.folder / "checkpoint.pt", self.info | state)
        for name in ("model.pt", "policy.pt")[: 1 + (self.step >= self.args.total_timesteps)]:  # Q is the policy
            write(self.folder / name, self.info | {"agent": state["agent"]})
        write(self.folder / "run.json", json.dumps(self.info, indent=1).encode())


def describe(args: Args) -> dict:
    """What one must know to repeat the run: for run.json."""
    file = shlex.quote(Path(__file__).name)  # one that git does not track has no commit
    git = f"git ls-files --error-unmatch {file} >/dev/null && git describe --always --dirty --abbrev=40 --exclude '*'"
    error, commit = subprocess.getstatusoutput(f"cd {shlex.quote(str(Path(__file__).parent))} && {git}")
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("minatar", "numpy", "torch")}
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
        raise OSError(f"cannot write {path}: {error}") from error


SCRIPT, SIGNALS, OPEN = Path(__file__).stem, [], contextlib.ExitStack()  # Ctrl-C or SIGTERM; what main() closes
LIMITS = {name: (0, 1) for name in ("sticky_actions", "gamma", "q_lambda", "epsilon")}  # others: positive
LIMITS |= {name: (1, 10_000) for name in ("num_envs", "num_steps", "eval_episodes")}  # memory
LIMITS |= {"seed": (0, 2**31 - 1), "num_experts": (1, 64), "widen": (1, 256), "exploration_fraction": (1e-12, 1)}
LIMITS["num_threads"] = (1, 4 * (os.cpu_count() or 1))
OLDER = {}  # flags that older files lack, and the values at which a script does what it did then


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
    steps, parts = args.num_envs * args.num_steps, args.num_minibatches
    with exit_on_error(f"--num-minibatches {parts}", "change it, --num-envs or --num-steps"):
        if steps % parts:
            raise ValueError(f"needs {parts} equal parts of a rollout of {steps} steps")
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.backends.cudnn.deterministic = True  # or equal runs differ on a GPU
    torch.set_flush_denormal(True)  # numbers below 1e-38, such as RAdam's moments of silent units, are slow on CPUs
    return args, saved


def evaluate_run(args: Args, saved: dict):
    """Prints the evaluation of a saved policy as JSON and writes it, and with --video a GIF, beside the policy."""
    games, path = Games(args, 1), Path(args.evaluate)
    agent = Agent(games.obs.shape[-1], len(games.actions), args)
    with exit_on_error(f"--evaluate {path}", "the file is damaged or of another run"):
        agent.load_state_dict(saved["agent"])
    rows = [evaluate(agent, args, saved["global_step"], policy) for policy in Run.policies]
    if SIGNALS:
        raise SystemExit(128 + SIGNALS[0])
    text = json.dumps({row["policy"]: row for row in rows}, indent=1).replace("NaN", "null")
    print(text)
    write(path / "evaluation.json" if path.is_dir() else path.with_suffix(".json"), text.encode())
    if args.video:
        gif = path / "video.gif" if path.is_dir() else path.with_suffix(".gif")
        with exit_on_error("--video", "pip install pillow"):
            from PIL import Image  # comes with tensorboard

            frames, grey = [], np.linspace(80, 255, games.obs.shape[-1])  # the higher the channel, the brighter

            def watch(games: Games):
                if len(frames) < 1000:
                    picture = (games.obs[0] * grey).max(-1).astype(np.uint8)  # (10, 10)
                    frames.append(Image.fromarray(picture.repeat(16, 0).repeat(16, 1)))

            if not evaluate(agent, dataclasses.replace(args, eval_episodes=1), 0, "deterministic", watch):
                raise SystemExit(128 + SIGNALS[0])
            frames[0].save(data := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:], duration=40, loop=0)
        write(gif, data.getvalue())
        print(f"{len(frames)} frames of one episode, policy deterministic: {gif}")


def main(argv: list[str] | None = None) -> Path:
    """Trains, resumes or evaluates as the flags say, those of the command line by default; returns the run's folder."""
    SIGNALS.clear()
    if __name__ == "__main__":  # a signal ends the run after its rollout, a second one at once; in a notebook not ours
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda n, _: (SIGNALS.append(n), signal.signal(n, signal.SIG_DFL)))
    args, saved = parse(argv)
    default = f"runs/MinAtar-{args.game}__{SCRIPT}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
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

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
# ]
# ///
"""Multi-task SAC whose actor and critics may be mixtures of experts: Soft MoE, top-k or hardcoded routing.

Paper   Willi, Obando-Ceron, Foerster, Dziugaite and Castro 2024, "Mixture of Experts in a Mixture of RL settings",
        arXiv 2406.18420 (with PPO: ppo_moe_multitask.py); Obando-Ceron et al. 2024, arXiv 2402.08609.
Layer   y = sum_i w_i(x) f_i(x). softmoe: w = softmax(x Phi). topk: the k largest of that. hardcoded: w = onehot(task).

Run       python algos/sac_moe_multitask.py                                  # four rotated target-reaching layouts
          python algos/sac_moe_multitask.py --tasks target-reaching-inverted --num-experts 8 --total-timesteps 320000
          python algos/sac_moe_multitask.py --tasks "HalfCheetah-v5" "HalfCheetah-v5?forward_reward_weight=-1"
Then      --resume runs/NAME goes on after Ctrl-C, kill -9 or a crash; --evaluate runs/NAME --video shows what it does

What differs from sac.py:
1. T tasks. --protocol multitask: step t is one of task t mod T. --protocol continual: one task after the other,
   --cycles times; a task that comes back goes on with its running episode and its old replay. At a switch the weights
   stay, and Adam starts anew: its moments would go on moving an expert whose task is over.
2. Every task has a temperature and an equal part of the replay. multitask: a batch has equal shares of all tasks.
   continual: it is the running task's alone (nothing is rehearsed). --learning-starts counts for each task: of the
   160,000 steps of four tasks 40,000 are random, and the first update is at the last random step of the first task.
3. Actor and critics see the task as a one-hot appended to their input. --no-task-id hides it from the networks and
   their learned routers; hardcoded routing still uses it.
4. The state is one token (PerSamp), for which Soft MoE is the dense gate above. --actor-moe and --critic-moe say which
   layers are mixtures: see Network. An expert has the width of the layer it replaces. --match-params makes experts
   narrower, so that all together have about as many weights as the baseline.
5. At every evaluation the networks are measured: see measure() and moe.csv.
Where this differs from the papers: they do not have SAC; 1 to 3, --match-params and the tasks are ours. With topk and
hardcoded an expert computes all that chose it: nothing is dropped. The layouts are made easier: obstacles cost 10, not
100, and the bonus for speed is 0.3, not 0.1. The first temperature is that of sac.py.
Letters in shape comments: B batch, O observation size, A action dimensions, T tasks, n experts, d inputs, h outputs.
"""

import ast
import contextlib
import dataclasses
import fcntl
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections import namedtuple
from copy import deepcopy
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

TARGET = "moe_envs:TargetReaching-v0?layout=task{}&obstacle_penalty=-10&speed_bonus=0.3"
LAYOUTS = tuple(TARGET.format(i) for i in range(4))
TASK_SETS = {  # names that --tasks understands
    "target-reaching": LAYOUTS,
    "target-reaching-inverted": LAYOUTS  # the second time the same observations want the opposite actions
    + tuple(task + "&inverted=True" for task in LAYOUTS),
    "halfcheetah-directions": ("HalfCheetah-v5", "HalfCheetah-v5?forward_reward_weight=-1"),
}
Architecture = Literal["baseline", "middle", "final", "all", "big"]


@dataclasses.dataclass
class Args:
    tasks: tuple[str, ...] = LAYOUTS  # ids, arguments after "?"; or target-reaching(-inverted), halfcheetah-directions
    seed: int = 1  # seed of everything random
    total_timesteps: int = 160_000  # environment steps of all tasks together
    run_dir: str | None = None  # folder of this run (default: runs/<tasks>__<script>__s<seed>__<time>)
    resume: str | None = None  # folder of a run to go on with; --total-timesteps can make a multitask one longer
    evaluate: str | None = None  # folder of a run, or a policy's file, to evaluate instead of training
    video: bool = False  # with --evaluate: also write a GIF beside it
    eval_every: int = 5_000  # steps between evaluations
    eval_episodes: int = 5  # episodes of each task per evaluation
    checkpoint_every: int = 10_000  # steps between checkpoints
    device: str = "cpu"  # cpu, cuda or cuda:N
    num_threads: int | None = None  # CPU threads of PyTorch (default: OMP_NUM_THREADS, or else 2)
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # torch.set_float32_matmul_precision
    # SAC
    learning_starts: int = 10_000  # uniformly random steps of each task, before it is learned
    buffer_size: int = 1_000_000  # transitions in the replay
    update_every: int = 1  # environment steps per update
    batch_size: int = 256  # transitions per update
    gamma: float = 0.99  # discount
    tau: float = 0.005  # share of the critic that its target takes over per update
    policy_lr: float = 3e-4  # Adam's step size for the actor
    q_lr: float = 3e-4  # Adam's step size for the critics and the temperature
    alpha_init: float = 0.1  # temperature at the start; sac.py's docstring says why
    # tasks and mixture
    protocol: Literal["multitask", "continual"] = "multitask"  # all tasks at once, or one after the other
    cycles: int = 1  # continual: passes through the list of tasks
    task_id: bool = True  # append the task's one-hot to the observation
    actor_moe: Architecture = "big"  # which layers of the actor are mixtures
    critic_moe: Architecture = "big"  # which layers of the critics are mixtures
    router: Literal["softmoe", "topk", "hardcoded"] = "softmoe"  # how experts are weighted
    num_experts: int = 4  # n; the default is one for each of the default tasks
    top_k: int = 1  # topk: experts per sample
    load_balance: float = 0.0  # topk: weight of Switch's load-balancing loss
    match_params: bool = False  # narrower experts, together as many weights as the baseline

    def __post_init__(self):
        self.tasks = tuple(env_id for task in self.tasks for env_id in TASK_SETS.get(task, (task,)))

    @property
    def env_id(self) -> str:
        """What the folder of the run is named after."""
        return next((name for name, ids in TASK_SETS.items() if ids == self.tasks), f"{len(self.tasks)}tasks")


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


class Network(nn.Module):
    """MLP d-256-256-h with ReLU: layers f1, f2, f3, some of them mixtures.

    baseline   y = f3(f2(f1(x)))
    middle     y = f3(sum_i w_i(h) f2_i(h)), h = f1(x)
    final      y = sum_i w_i(h) f3_i(h), h = f2(f1(x))
    all        every layer is a mixture with a router of its own
    big        each expert is a whole network: y = sum_i w_i(x) f3_i(f2_i(f1_i(x))), one router
    With hardcoded routing all and big are the same function: a network for each task.
    """

    MIXED = {"baseline": (), "middle": (1,), "final": (2,), "all": (0, 1, 2), "big": (0, 1, 2)}  # layers with experts

    def __init__(self, inputs: int, outputs: int, architecture: str, args: Args, hidden: int = 256):
        super().__init__()
        n, mixed, narrow = args.num_experts, self.MIXED[architecture], hidden
        if args.match_params and architecture == "middle":
            narrow = max(round(hidden / n), 1)
        elif args.match_params:  # h with n (h^2 + e h) = H^2 + e H: a network of width h has h^2 + e h weights
            e = inputs + outputs
            narrow = max(round((math.sqrt(e**2 + 4 * (hidden**2 + e * hidden) / n) - e) / 2), 1)
        h1, h2 = (narrow if i in mixed else hidden for i in (0, 1))
        make = (  # each layer, and the number of inputs of a router in front of it
            (lambda: nn.Sequential(nn.Linear(inputs, h1), nn.ReLU()), inputs),
            (lambda: nn.Sequential(nn.Linear(h1, h2), nn.ReLU()), h1),
            (lambda: nn.Linear(h2, outputs), h2),
        )
        if architecture == "big":
            layers = [Mixture([nn.Sequential(*(f() for f, _ in make)) for _ in range(n)], inputs, args)]
        else:
            layers = [Mixture([f() for _ in range(n)], d, args) if i in mixed else f() for i, (f, d) in enumerate(make)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """x (B, d), task (B,) -> y (B, h)."""
        for f in self.layers:
            x = f(x, task) if isinstance(f, Mixture) else f(x)
        return x


class Critic(nn.Module):
    """Two Q-functions of observation, action and the task's one-hot, which --no-task-id leaves out."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        one_hot = torch.eye(len(args.tasks))[:, : len(args.tasks) * args.task_id]  # (T, T), or (T, 0)
        self.register_buffer("one_hot", one_hot, persistent=False)
        inputs = obs_dim + action_dim + self.one_hot.shape[1]
        self.networks = nn.ModuleList([Network(inputs, 1, args.critic_moe, args) for _ in range(2)])

    def forward(self, obs: torch.Tensor, action: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """obs (B, O), action (B, A), task (B,) -> Q (2, B)."""
        x = torch.cat([obs, action, self.one_hot[task]], 1)
        return torch.stack([network(x, task).squeeze(1) for network in self.networks])


def tanh_gaussian(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reparameterised a = tanh(u), u = mean + std * noise, and its log density summed over the last dimension.

    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), numerically stable and with a finite gradient for every u.
    """
    noise = torch.randn_like(mean)  # (u - mean) / std
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return u.tanh(), (log_normal - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))).sum(-1)


class Actor(nn.Module):
    """Gaussian policy squashed by tanh: a network of observation and task to mean and log standard deviation."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        one_hot = torch.eye(len(args.tasks))[:, : len(args.tasks) * args.task_id]  # (T, T), or (T, 0)
        self.register_buffer("one_hot", one_hot, persistent=False)
        self.network = Network(obs_dim + self.one_hot.shape[1], 2 * action_dim, args.actor_moe, args)

    def forward(self, obs: torch.Tensor, task: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (B, O), task (B,) -> mean (B, A), log_std (B, A)."""
        mean, log_std = self.network(torch.cat([obs, self.one_hot[task]], 1), task).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)  # the bounds of Haarnoja et al.'s code

    def sample(self, obs: torch.Tensor, task: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (B, O), task (B,) -> reparameterised action (B, A) in [-1, 1], its log-probability (B,)."""
        return tanh_gaussian(*self(obs, task))

    def act(self, obs: torch.Tensor, task: torch.Tensor, policy: str) -> torch.Tensor:
        """obs (B, O), task (B,) -> action (B, A): a sample (stochastic) or tanh(mean) (deterministic)."""
        return self.sample(obs, task)[0] if policy == "stochastic" else self(obs, task)[0].tanh()


class Agent(nn.Module):
    """Everything that learns: actor, twin critics, their target, a temperature per task, and the Adam of each."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor, self.critic = Actor(obs_dim, action_dim, args), Critic(obs_dim, action_dim, args)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.full((len(args.tasks),), math.log(args.alpha_init)))
        self.target_entropy = -float(action_dim)
        self.to(args.device)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.policy_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=args.q_lr, fused=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=args.q_lr, fused=True)
        self.optimizers = [self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer]

    @torch.no_grad()
    def act(self, obs: np.ndarray, task: int, policy: str = "stochastic") -> np.ndarray:
        """One observation (O,) of a task -> one action (A,) of the policy as it explores, or as Actor.act() has it."""
        obs, task = torch.from_numpy(obs)[None], torch.tensor([task])
        return self.actor.act(*(x.to(self.log_alpha.device) for x in (obs, task)), policy)[0].cpu().numpy()


def descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer):
    """One step of `optimizer`; only its own parameters get a gradient, so a loss through the critic leaves it alone."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


def critic_loss_of(agent: Agent, batch: "Batch", task: torch.Tensor, args: Args) -> torch.Tensor:
    """(Q - y)^2, y = r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha_task log pi(a'|s')), a' ~ pi(.|s')."""
    with torch.no_grad():
        next_action, next_log_prob = agent.actor.sample(batch.next_obs, task)
        alpha = agent.log_alpha.exp()[task]  # (B,)
        next_value = agent.critic_target(batch.next_obs, next_action, task).amin(0) - alpha * next_log_prob  # (B,)
        target = batch.reward + args.gamma * (1 - batch.terminated) * next_value  # (B,)
    loss = (agent.critic(batch.obs, batch.action, task) - target).square().mean(1).sum()
    return loss + args.load_balance * sum(m.balance for m in agent.critic.modules() if isinstance(m, Mixture))


def actor_loss_of(agent: Agent, batch: "Batch", task: torch.Tensor, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """E[alpha_task log pi(a|s) - min_i Q_i(s, a)], a reparameterised, and the load-balancing loss; log pi (B,)."""
    action, log_prob = agent.actor.sample(batch.obs, task)
    alpha = agent.log_alpha.detach().exp()[task]
    loss = (alpha * log_prob - agent.critic(batch.obs, action, task).amin(0)).mean()
    loss = loss + args.load_balance * sum(m.balance for m in agent.actor.modules() if isinstance(m, Mixture))
    return loss, log_prob.detach()


def update(agent: Agent, batch: "Batch", task: torch.Tensor, args: Args) -> dict[str, torch.Tensor]:
    """One gradient step of critics, actor and temperatures. Returns detached scalars."""
    critic_loss = critic_loss_of(agent, batch, task, args)
    descend(critic_loss, agent.critic_optimizer)
    actor_loss, log_prob = actor_loss_of(agent, batch, task, args)
    descend(actor_loss, agent.actor_optimizer)

    # Temperatures: minimise -log alpha_task (log pi + target entropy), each on the samples of its task
    alpha_loss = -(agent.log_alpha[task] * (log_prob + agent.target_entropy)).mean()
    descend(alpha_loss, agent.alpha_optimizer)

    with torch.no_grad():  # or the target would keep a graph of all its updates
        torch._foreach_lerp_(list(agent.critic_target.parameters()), list(agent.critic.parameters()), args.tau)
    return {
        "losses/critic": critic_loss.detach(),
        "losses/actor": actor_loss.detach(),
        "losses/alpha": alpha_loss.detach(),
        "policy/entropy": -log_prob.mean(),
        **{f"policy/alpha_{t}": alpha for t, alpha in enumerate(agent.log_alpha.detach().exp())},
    }


def draw_batch(buffers: list["ReplayBuffer"], tasks: list[int], size: int) -> tuple["Batch", torch.Tensor]:
    """Equal shares of `tasks`, `size` transitions in all, task by task; and the task of each (size,)."""
    batches = [buffers[task].sample(size // len(tasks)) for task in tasks]
    batch = Batch(*(torch.cat(columns) for columns in zip(*batches, strict=True)))
    return batch, torch.tensor(tasks, device=batch.obs.device).repeat_interleave(size // len(tasks))


def train(args: Args, saved: dict | None = None):
    """Act, store, learn, each step in the task that is due; from the checkpoint `saved` on if there is one."""
    torch.manual_seed(args.seed)
    number, envs = len(args.tasks), make_envs(args)
    obs_dim, action_dim = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    agent = Agent(obs_dim, action_dim, args)
    buffers = [ReplayBuffer(args.buffer_size // number, obs_dim, action_dim, args.device) for _ in envs]
    parts = {f"env_{t}": env for t, env in enumerate(envs)} | {f"buffer_{t}": x for t, x in enumerate(buffers)}
    run, metrics = Run(args, saved, 1, agent=agent, **parts), {}  # a checkpoint holds all this
    for step in run.steps():
        phase = running_phase(step - 1, args)
        if phase != running_phase(step - 2, args):  # another task, or the start
            metrics = {}
            for optimizer in agent.optimizers:
                optimizer.state.clear()
        task = (phase if args.protocol == "continual" else step - 1) % number
        learned = [task] if args.protocol == "continual" else list(range(number))
        env, buffer, obs = envs[task], buffers[task], envs[task].obs
        if buffer.count < args.learning_starts:  # uniformly at random
            action = torch.rand(action_dim).mul(2).sub(1).numpy()
        else:
            action = agent.act(obs, task)
        next_obs, reward, terminated, truncated, info = env.step(action)
        buffer.add(obs, action, reward, terminated, next_obs)
        if terminated or truncated:
            episode = info["episode"]
            run.log({f"charts/episodic_return_{task}": episode["r"], f"charts/episodic_length_{task}": episode["l"]})
            env.reset()
        if buffer.count >= args.learning_starts and step >= number and step % args.update_every == 0:
            metrics = update(agent, *draw_batch(buffers, learned, args.batch_size), args)
        if run.due(step, 1000):
            run.log(metrics)
        if run.policies(step):
            run.evaluate()
        if run.due(step, args.checkpoint_every):
            run.save()


# ======================================================================================================================
# That was the agent. The rest, mostly the same in both multi-task scripts: replay, tasks, measurements, files, flags.
# ======================================================================================================================
Batch = namedtuple("Batch", "obs action reward terminated next_obs")  # (B, O), (B, A), (B,), (B,), (B, O)
SAMPLES = 1024  # states that the networks are measured on, all tasks together; a rank cannot be higher


class ReplayBuffer:
    """The last `size` transitions on the training device, one row of 4 (2 O + A + 2) bytes each."""

    def __init__(self, size: int, obs_dim: int, action_dim: int, device: str):
        self.count, self.obs_dim = 0, obs_dim
        self.rows = torch.empty(size, 2 * obs_dim + action_dim + 2, device=device)

    def add(self, obs, action, reward: float, terminated: bool, next_obs):
        """Stores one transition in place of the oldest."""
        row = np.concatenate([obs, [reward, terminated], next_obs, action], dtype=np.float32)
        self.rows[self.count % len(self.rows)] = torch.from_numpy(row)
        self.count += 1

    def sample(self, batch_size: int) -> Batch:
        """Uniform, with replacement."""
        rows = self.rows[torch.randint(min(self.count, len(self.rows)), (batch_size,)).to(self.rows.device)]
        o = self.obs_dim
        return Batch(rows[:, :o], rows[:, 2 * o + 2 :], rows[:, o], rows[:, o + 1], rows[:, o + 2 : 2 * o + 2])

    def state_dict(self) -> dict:
        return {"count": self.count, "rows": self.rows[: self.count].clone()}  # a view would save the empty rows too

    def load_state_dict(self, state: dict):
        self.count, self.rows[: len(state["rows"])] = state["count"], state["rows"]


class Env(gym.Wrapper):
    """A task, float32 observations, actions in [-1, 1]^A. Episodes have seeds, so that resume can play them again."""

    def __init__(self, task: int, args: Args, evaluation: bool = False, **kwargs):
        self.task, self.number, self.name = task, len(args.tasks), args.tasks[task]
        self.first_seed, self.half = args.seed * 100_003, 2**30 * evaluation  # evaluation: upper half of int32
        name, _, query = self.name.partition("?")
        remedy = "see gymnasium.pprint_registry(), write id?name=value&name=value; moe_envs comes by pip install -e ."
        if "-v" not in name:
            remedy += f"; sets: {', '.join(TASK_SETS)}"
        with exit_on_error(f"--tasks {self.name}", remedy):
            for key, _, value in (pair.partition("=") for pair in query.split("&") if pair):
                kwargs[key] = WORDS.get(value.lower(), value)
                with contextlib.suppress(ValueError, SyntaxError):  # another word stays a string
                    kwargs[key] = ast.literal_eval(value)
            env = layer = gym.make(name, **kwargs)
            if "render_mode" in kwargs and "gymnasium.envs.mujoco" in str(env.spec) and "camera" not in query:
                env = layer = gym.make(name, camera_name="track", **kwargs)  # by default HalfCheetah leaves the picture
            while isinstance(layer, gym.Wrapper):
                if type(layer).__name__ in ("NormalizeObservation", "NormalizeReward"):
                    raise ValueError(f"{type(layer).__name__} changes from episode to episode; register it without")
                layer = layer.env
            if (env.spec.max_episode_steps or 0) <= 0:
                raise ValueError(f"has no time limit, an evaluation may never end; give {name}?max_episode_steps=1000")
            for space in (env.observation_space, env.action_space):
                if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
                    raise ValueError(f"needs flat Box spaces, such as Pendulum-v1's, not {space}")
            widths = [float(high) - float(low) for low, high in zip(space.low, space.high, strict=True)]
            if space.dtype.kind != "f" or not all(0 < x < float(np.finfo(space.dtype).max) for x in widths):
                raise ValueError(f"needs real-valued actions with finite bounds, low < high, not {space}")
            one = space.dtype.type(1)
            env = gym.wrappers.TransformAction(env, lambda a: a.clip(space.low, space.high), space)  # rounding
            super().__init__(gym.wrappers.RescaleAction(env, -one, one))
            OPEN.callback(self.close)
            self.reset(0)
            self.step(self.action_space.low)  # an argument of a wrong kind may show only now
            self.reset(0)

    def reset(self, episode: int | None = None):
        """The next episode, or that with this number."""
        self.episode, self.actions = self.episode + 1 if episode is None else episode, []
        self.rewards, self.success_once = [], math.nan
        seed = self.half + (self.first_seed + self.episode * self.number + self.task) % 2**30
        random.seed(seed)  # some environments draw from the global generators; each of ours has its own state of them
        np.random.seed(seed)
        return self.check(*self.env.reset(seed=seed))

    def step(self, action: np.ndarray):
        if not np.isfinite(action).all():
            raise FloatingPointError("the policy's action is not finite, the training has diverged")
        random.setstate(self.generators[0])
        np.random.set_state(self.generators[1])
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.actions.append(action)
        self.rewards.append(np.asarray(reward, float).item())  # of any shape that has one value
        obs, info = self.check(obs, info)
        if terminated or truncated:
            info["episode"] = {"r": math.fsum(self.rewards), "l": len(self.rewards)}
        return obs, self.rewards[-1], bool(terminated), bool(truncated), info

    def check(self, obs, info: dict) -> tuple[np.ndarray, dict]:
        """A copy of the observation, which some environments change in place; info with success as a number."""
        self.generators = random.getstate(), np.random.get_state()
        self.obs = np.array(obs, np.float32).reshape(self.observation_space.shape)
        if not (np.isfinite(self.obs).all() and np.isfinite(self.rewards[-1:]).all()):
            raise FloatingPointError(f"an observation or reward of {self.spec.id} is not finite")
        success = math.nan if info.get("success") is None else np.asarray(info["success"], float).item()
        self.success_once = np.fmax(self.success_once, success)
        return self.obs, info | {"success": success, "success_once": float(self.success_once)}

    def state_dict(self) -> dict:
        actions = [action.tolist() for action in self.actions]
        return {"episode": self.episode, "actions": actions, "rewards": self.rewards, "obs": self.obs.tolist()}

    def load_state_dict(self, state: dict):
        self.reset(state["episode"])
        for action in state["actions"]:
            self.step(np.float32(action))
        if self.state_dict() != state:
            raise ValueError("the environment does not repeat its own episode, start anew")


def make_envs(args: Args, evaluation: bool = False, **kwargs) -> list[Env]:
    """The environments of all tasks, which must have the same shapes."""
    envs = [Env(task, args, evaluation, **kwargs) for task in range(len(args.tasks))]
    for env, role in itertools.product(envs, ("observation_space", "action_space")):
        with exit_on_error(f"--tasks {env.name}", f"leave it or {envs[0].name} out"):
            if (shape := getattr(env, role).shape) != (first := getattr(envs[0], role).shape):
                raise ValueError(f"its {role} has shape {shape}, that of {envs[0].name} {first}")
    row = 2 * envs[0].observation_space.shape[0] + envs[0].action_space.shape[0] + 2
    need, memory = 4 * row * args.buffer_size, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with exit_on_error(f"--buffer-size {args.buffer_size}", "give less"):
        if need > memory:
            raise ValueError(f"would take {need / 1e9:.0f} GB, the machine has {memory / 1e9:.0f} GB")
    return envs


def evaluate(agent: Agent, envs: list[Env], args: Args, step: int, policy: str, watch=lambda env: None) -> list[dict]:
    """Rows of eval.csv, of each task raw returns of episodes with their own seeds; random states stay as they are."""
    rows = []
    with torch.random.fork_rng([args.device] if args.device != "cpu" else []):
        torch.manual_seed(args.seed)
        for task, env in enumerate(envs):
            results = []
            for episode in range(args.eval_episodes):
                (obs, _), done = env.reset(episode), False
                while not (done or SIGNALS):
                    obs, _, terminated, truncated, info = env.step(agent.act(obs, task, policy))
                    done = terminated or truncated
                    watch(env)
                if SIGNALS:
                    return []
                results.append((*info["episode"].values(), info["success"], info["success_once"]))
            rows.append(eval_row(step, policy, task, results))
    return rows


def film(agent: Agent, args: Args) -> bytes:
    """A GIF of one episode of each task, one after the other."""
    with exit_on_error("--video", "without a display, MuJoCo wants MUJOCO_GL=egl"):
        import imageio  # comes with gymnasium[mujoco]

        envs, frames = make_envs(args, evaluation=True, render_mode="rgb_array"), []
        fps = envs[0].metadata.get("render_fps", 30)  # a GIF counts in 10 ms, and browsers show less than 20 ms as 100
        strides = range(-(-fps // 50), fps // 10 + 2)
        stride = min(strides, key=lambda s: abs(100 * s / fps - round(100 * s / fps)) / s)

        def watch(env):
            if len(env.actions) % stride == 0 and len(frames) < 500:  # everything would take gigabytes
                frames.append(env.render()[::2, ::2])

        if not evaluate(agent, envs, args, 0, "deterministic", watch):
            raise SystemExit(128 + SIGNALS[0])
        return imageio.mimsave("<bytes>", frames, format="gif", duration=10 * round(100 * stride / fps), loop=0)


def probe(agent: Agent, args: Args, parts: dict) -> tuple[torch.Tensor, dict, dict]:
    """Tasks (B,), inputs of actor and critics, and the losses of each task, on equal shares of what has been played."""
    buffers = [parts[f"buffer_{task}"] for task in range(len(args.tasks))]
    seen = [task for task, buffer in enumerate(buffers) if buffer.count]
    batch, task = draw_batch(buffers, seen, SAMPLES // len(seen) * len(seen))
    mine = [(Batch(*(x[task == t] for x in batch)), task[task == t], args) for t in seen]
    losses = {"critic": [critic_loss_of(agent, *part) for part in mine]}
    losses["actor"] = [actor_loss_of(agent, *part)[0] for part in mine]
    return task, {"actor": (batch.obs, task), "critic": (batch.obs, batch.action, task)}, losses


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
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None, "null": None}
WORDS |= {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}  # in --tasks; 'on' in quotes is a string
LIMITS = {"seed": (0, 2**31 - 1), "learning_starts": (0, 1e12), "gamma": (0, 1), "tau": (1e-9, 1)}  # others: positive
LIMITS |= {"load_balance": (0, 1e12), "num_threads": (1, 4 * (os.cpu_count() or 1))}
LIMITS |= {"num_experts": (1, 256), "batch_size": (1, 1e6)}  # memory
OLDER = {}  # flags that older files lack, and the values at which a script does what it did then


@contextlib.contextmanager
def exit_on_error(what: str, remedy: str, code: int = 2, errors=Exception):
    """Tells whatever fails inside in one line, and ends the script."""
    try:
        yield
    except errors as error:
        reason, frame = str(error).strip().split("\n")[0], traceback.extract_tb(error.__traceback__)[-1]
        ours = frame.filename == __file__ and isinstance(error, (ValueError, FloatingPointError, OSError))
        if not ours and not isinstance(error, gym.error.Error):
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
    number, multitask, every = len(args.tasks) or 1, args.protocol == "multitask", args.update_every
    steps, where = args.total_timesteps // phases(args), "run" if multitask else "phase"
    near, first = (
        max(args.batch_size // number, 1) * number,
        max(args.learning_starts, 1) * (number if multitask else 1),
    )
    late = f"with --update-every {every} the {steps} steps of a {where} may see no update; lower it or make it longer"
    return [
        *mixture_rules(args),
        (
            multitask and args.batch_size % number,
            f"--batch-size {args.batch_size}: no multiple of the tasks, as {near} is",
        ),
        (args.buffer_size < number, f"--buffer-size {args.buffer_size}: too small for {number} tasks"),
        (steps < 1, f"--total-timesteps {args.total_timesteps}: fewer than the {phases(args)} phases"),
        (steps < first + every - 1, f"--learning-starts {args.learning_starts}: {late}"),
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
    sys.path += [os.getcwd()]  # for --tasks module:Id
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.set_flush_denormal(True)  # numbers below 1e-38, such as Adam's moments of silent units, are slow on CPUs
    return args, saved


def evaluate_run(args: Args, saved: dict):
    """Prints the evaluation of a saved policy as JSON and writes it, and with --video a GIF, beside the policy."""
    env, path = make_envs(args, evaluation=True), Path(args.evaluate)
    agent = Agent(env[0].observation_space.shape[0], env[0].action_space.shape[0], args)
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

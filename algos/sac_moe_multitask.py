"""Multi-task SAC whose actor and critics may be mixtures of experts: Soft MoE, top-k or hardcoded routing.

Paper   Willi, Obando-Ceron, Foerster, Dziugaite and Castro 2024, "Mixture of Experts in a Mixture of RL settings",
        arXiv 2406.18420 (with PPO: ppo_moe_multitask.py); Obando-Ceron et al. 2024, arXiv 2402.08609.
Layer   y = sum_i w_i(x) f_i(x). softmoe: w = softmax(x Phi). topk: the k largest of that. hardcoded: w = onehot(task).

Run       python algos/sac_moe_multitask.py                                  # four rotated target-reaching layouts
          python algos/sac_moe_multitask.py --tasks target-reaching-inverted --num-experts 8 --total-timesteps 320000
          python algos/sac_moe_multitask.py --tasks "HalfCheetah-v5" "HalfCheetah-v5?forward_reward_weight=-1"
Resume    python algos/sac_moe_multitask.py --resume runs/NAME              # after Ctrl-C, kill -9 or a crash
Evaluate  python algos/sac_moe_multitask.py --evaluate runs/NAME --video    # every task, both policies, a GIF

What differs from sac.py:
1. T tasks. --protocol multitask: step t is one of task t mod T. --protocol continual: one task after the other,
   --cycles times; a task that comes back goes on with its running episode and its old replay. At a switch the weights
   stay, and Adam starts anew: its moments would go on moving an expert whose task is over.
2. Every task has a temperature and an equal part of the replay. multitask: a batch has equal shares of all tasks.
   continual: it is the running task's alone (nothing is rehearsed). --learning-starts counts for each task: of the
   160,000 steps of four tasks 40,000 are random, and the first update is at the last random step of the first task.
3. Actor and critics know the task as a one-hot behind the observation. --no-task-id takes it away from the networks and
   their routers, except from hardcoded routing.
4. MLP states are one token per sample (PerSamp), for which Soft MoE is the dense gate above. --actor-moe, --critic-moe:
   baseline; middle, final or all layers (each with a router of its own); big: each expert is a whole network. Every
   expert has the width of the layer that it replaces. --match-params makes them narrower, so that all experts together
   have about as many weights as the baseline (widths are whole numbers).
5. Measured at every evaluation: see measure() and moe.csv.
Where this differs from the papers: they do not have SAC; 1 to 3, --match-params and the tasks are ours. Every expert
computes every sample, and one that is not chosen is weighted 0: nothing is dropped, and no time is saved. Obstacle
penalty and speed bonus of the layouts, random steps and first temperature are those of sac.py's default task.
Letters in the shape comments: B batch, O observation size, A action dimensions, T tasks, n experts, N networks in one
batch (2 critics or 1 actor), E = n or 1 experts of a layer, d inputs and h outputs of a layer.
"""

# === shared: imports ===
import ast
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
from copy import deepcopy
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# === end shared ===
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
    total_timesteps: int | None = None  # of all tasks together (default: 160,000; with --resume those of that run)
    run_dir: str | None = None  # folder of this run (default: runs/<tasks>__<script>__s<seed>__<time>)
    resume: str | None = None  # folder of a run to continue from its last checkpoint
    evaluate: str | None = None  # folder of a run to evaluate instead of training
    video: bool = False  # with --evaluate: also write video.gif into the run folder
    eval_every: int = 5_000  # steps between evaluations
    eval_episodes: int = 5  # episodes of each task per evaluation
    checkpoint_every: int = 10_000  # steps between checkpoints
    device: str = "cpu"  # cpu, cuda or cuda:N
    num_threads: int = 2  # CPU threads of PyTorch; 1 where another run needs the other core
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # torch.set_float32_matmul_precision
    # === shared: sac arguments ===
    learning_starts: int = 10_000  # uniformly random steps before the first update
    buffer_size: int = 1_000_000  # rows of replay: a transition takes one, the end of an episode another
    update_every: int = 1  # environment steps per update
    batch_size: int = 256  # transitions per update
    gamma: float = 0.99  # discount
    tau: float = 0.005  # share of the critic that its target takes over per update
    policy_lr: float = 3e-4  # Adam's step size for the actor
    q_lr: float = 3e-4  # Adam's step size for the critics and the temperature
    alpha_init: float = 0.1  # temperature at the start; why, says sac.py's docstring
    # === end shared ===
    protocol: Literal["multitask", "continual"] = "multitask"  # all tasks at once, or one after the other
    cycles: int = 1  # continual: times that the list of tasks is gone through
    task_id: bool = True  # append the task's one-hot to the observation
    actor_moe: Architecture = "big"  # which layers of the actor are mixtures
    critic_moe: Architecture = "big"  # which layers of the critics are mixtures
    router: Literal["softmoe", "topk", "hardcoded"] = "softmoe"  # who weights the experts
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


def fail(message: str):
    """One line on stderr and exit code 2: the run cannot start."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """`id?key=value&key=value` -> environment with a flat Box observation and actions in [-1, 1]^A.

    When an episode ends, info["episode"] has its return "r" and its length "l".
    """
    name, _, query = env_id.partition("?")
    try:
        kwargs = {key: value for key, _, value in (pair.partition("=") for pair in query.split("&") if pair)}
        for key, value in kwargs.items():
            try:
                kwargs[key] = ast.literal_eval(value)  # numbers, booleans, tuples
            except (ValueError, SyntaxError):
                pass  # a plain word stays a string
        env = gym.make(name, **kwargs, **({"render_mode": render_mode} if render_mode else {}))
        env.unwrapped.action_space.seed(0)
        env.unwrapped.reset(seed=0)
        env.unwrapped.step(env.unwrapped.action_space.sample())  # an argument of a wrong kind may show only now
    except Exception as error:  # whatever the environment's own code raises
        hint = "give an id of gymnasium.pprint_registry(), with arguments as id?name=value&name=value"
        if isinstance(error, ImportError):
            hint = "install it (moe_envs: pip install -e . in the repository)"
        elif "-v" not in name:
            hint += f", or one of the sets: {', '.join(TASK_SETS)}"
        fail(f"--tasks {env_id}: {(str(error).strip() or type(error).__name__).splitlines()[0]}; {hint}")
    for role, space in (("action", env.action_space), ("observation", env.observation_space)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            fail(f"--tasks {env_id}: needs a flat Box {role} space such as Pendulum-v1's, this one has {space}")
    if (env.spec.max_episode_steps or -1) < 0:
        fail(f"--tasks {env_id}: has no time limit, an evaluation may never end; give {name}?max_episode_steps=1000")
    if not np.isfinite([env.action_space.low, env.action_space.high]).all():
        fail(f"--tasks {env_id}: action bounds must be finite to be rescaled to [-1, 1], they are {env.action_space}")
    return gym.wrappers.RescaleAction(gym.wrappers.RecordEpisodeStatistics(env), np.float32(-1), np.float32(1))


def make_envs(tasks: tuple[str, ...]) -> list[gym.Env]:
    """The environments of all tasks, which must have the same shapes."""
    envs = [make_env(task) for task in tasks]
    for task, env in zip(tasks, envs, strict=True):
        for role in ("observation_space", "action_space"):
            first, shape = getattr(envs[0], role).shape, getattr(env, role).shape
            if shape != first:
                fail(f"--tasks {task}: {role} has shape {shape}, that of {tasks[0]} {first}; leave one of them out")
    return envs


def episode_seed(seed: int, episode: int, evaluation: bool = False) -> int:
    """Seed of one episode, below 2^32; training seeds lie in the lower half, evaluation seeds in the upper."""
    return (2**31 if evaluation else 0) + (seed * 100_003 + episode) % 2**31


# === shared: schedule ===
def running_phase(global_step: int, args: Args) -> int:
    """The phase of the continual protocol to which step `global_step` (from 0) belongs; its task is that mod T."""
    return global_step * len(args.tasks) * args.cycles // args.total_timesteps


# === end shared ===
# === shared: replay ===
class Batch(NamedTuple):
    obs: torch.Tensor  # (B, O)
    action: torch.Tensor  # (B, A)
    reward: torch.Tensor  # (B,)
    terminated: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, O)


class ReplayBuffer:
    """Ring of rows on the training device: obs_i, action_i, reward_i, terminated_i; next_obs_i is obs_{i+1}.

    So each observation is stored once. The last observation of an episode takes a row that starts no transition:
    `starts`, a ring on the CPU, lists the rows that do, oldest first. One row takes 4 (O + A + 2) + 8 bytes.
    """

    def __init__(self, rows: int, obs_dim: int, action_dim: int, device: torch.device):
        self.obs = torch.zeros(rows, obs_dim, device=device)
        self.action = torch.zeros(rows, action_dim, device=device)
        self.reward = torch.zeros(rows, device=device)
        self.terminated = torch.zeros(rows, device=device)
        self.starts = torch.zeros(rows, dtype=torch.int64)
        self.row = self.first = self.count = self.filled = 0

    def add(self, obs, action, reward, terminated, next_obs, done):
        """Stores one transition of NumPy arrays and Python numbers, dropping the oldest where the ring is full."""
        rows, row = len(self.obs), self.row
        next_row = (row + 1) % rows
        while self.count and int(self.starts[self.first]) in (row, next_row):  # its rows are about to be overwritten
            self.first, self.count = (self.first + 1) % rows, self.count - 1
        self.obs[row] = torch.from_numpy(obs)
        self.action[row] = torch.from_numpy(action)
        self.reward[row], self.terminated[row] = reward, terminated
        self.obs[next_row] = torch.from_numpy(next_obs)
        self.starts[(self.first + self.count) % rows] = row
        self.count += 1
        self.filled = min(max(self.filled, row + 2), rows)
        self.row = (row + 1 + done) % rows

    def sample(self, batch_size: int) -> Batch:
        """Uniform over the stored transitions, with replacement."""
        rows = self.starts[(self.first + torch.randint(self.count, (batch_size,))) % len(self.obs)].to(self.obs.device)
        data = (x[rows] for x in (self.obs, self.action, self.reward, self.terminated))
        return Batch(*data, self.obs[(rows + 1) % len(self.obs)])

    def state_dict(self) -> dict:
        """The rows in use, as copies where a view would drag the empty rows into the file."""
        full = self.filled == len(self.obs)
        return {k: v[: self.filled].clone() if torch.is_tensor(v) and not full else v for k, v in vars(self).items()}

    def load_state_dict(self, state: dict):
        for key, value in state.items():
            if torch.is_tensor(value):
                getattr(self, key)[: len(value)] = value
            else:
                setattr(self, key, value)


# === end shared ===
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
class MoE(nn.Module):
    """N MLPs d-256-256-out with ReLU as one batched network; some of their layers are mixtures of n experts.

    baseline   y = W3 relu(W2 relu(W1 x))                           (biases left out)
    middle     the second layer: h2 = sum_i w_i(h1) relu(W2_i h1)
    final      the last layer:   y = sum_i w_i(h2) W3_i h2
    all        every layer, each with a router of its own
    big        each expert is a whole network: y = sum_i w_i(x) W3_i relu(W2_i relu(W1_i x)), one router
    All experts of a layer are one baddbmm. Initialised like nn.Linear, uniform within 1 / sqrt(fan-in).
    """

    MIXED = {"baseline": (), "middle": (1,), "final": (2,), "all": (0, 1, 2), "big": (0, 1, 2)}  # layers with experts

    def __init__(self, networks: int, inputs: int, outputs: int, architecture: str, args: Args, hidden: int = 256):
        super().__init__()
        mixed, self.networks, self.big = self.MIXED[architecture], networks, architecture == "big"
        narrow = hidden
        if args.match_params and architecture == "middle":
            narrow = max(round(hidden / args.num_experts), 1)
        elif args.match_params:  # h with n (h^2 + e h) = H^2 + e H: a network of width h has h^2 + e h weights
            e = inputs + outputs
            narrow = max(round((math.sqrt(e**2 + 4 * (hidden**2 + e * hidden) / args.num_experts) - e) / 2), 1)
        widths = [inputs, *(narrow if layer in mixed else hidden for layer in (0, 1)), outputs]
        self.weights, self.biases, self.routers = nn.ParameterList(), nn.ParameterList(), nn.ModuleDict()
        for layer in range(3):
            fan_in, width = widths[layer : layer + 2]
            experts, bound = args.num_experts if layer in mixed else 1, 1 / math.sqrt(fan_in)
            for parameters, rows in ((self.weights, fan_in), (self.biases, 1)):
                parameters.append(nn.Parameter(torch.empty(networks, experts, rows, width).uniform_(-bound, bound)))
            if layer in mixed and not (self.big and layer):
                self.routers[str(layer)] = Router(networks, fan_in, args)

    def forward(self, x: torch.Tensor, task: torch.Tensor, trace: dict | None = None) -> torch.Tensor:
        """x (B, d), task (B,) -> y (N, B, out). What measure() looks at goes into `trace`."""
        x = x.expand(self.networks, 1, *x.shape)  # (N, 1, B, d); from the second layer on (N, E, B, h)
        w = None
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if str(layer) in self.routers:
                w = self.routers[str(layer)](x[:, 0], task)  # (N, B, n)
                if trace is not None:
                    trace[f"router{layer + 1}"] = w
            if trace is not None and layer == 2:
                trace["features"] = weighted(x, w if self.big else None)
            experts = weight.shape[1]
            x = x.expand(-1, experts, -1, -1).flatten(0, 1)  # (N E, B, d)
            x = torch.baddbmm(bias.flatten(0, 1), x, weight.flatten(0, 1))
            x = (x.relu_() if layer < 2 else x).unflatten(0, (-1, experts))  # on a view autograd would copy gradients
            if layer < 2 and trace is not None:
                trace[f"layer{layer + 1}"] = weighted(x, None if w is None else w > 0)
            if w is not None and (layer == 2 or not self.big):
                x, w = torch.einsum("kbn,knbh->kbh", w, x)[:, None], None  # y = sum_i w_i f_i(x)
        return x[:, 0]


def weighted(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    """Neurons of all experts x (N, E, B, h), those of expert i times w_i (N, B, E) -> (N, B, E h)."""
    return (x if w is None else x * w.transpose(1, 2)[..., None]).transpose(1, 2).flatten(2)


class Critic(nn.Module):
    """Two Q-functions of observation, action and task as one batched network."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.moe = MoE(2, obs_dim + action_dim + len(args.tasks) * args.task_id, 1, args.critic_moe, args)
        self.register_buffer("one_hot", one_hots(args), persistent=False)

    def forward(self, obs, action, task, trace: dict | None = None) -> torch.Tensor:
        """obs (B, O), action (B, A), task (B,) -> Q (2, B)."""
        return self.moe(torch.cat([obs, action, self.one_hot[task]], 1), task, trace)[..., 0]


# === shared: tanh gaussian ===
LOG_STD_MIN, LOG_STD_MAX = -20, 2  # the bounds of Haarnoja et al.'s code


def tanh_gaussian(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reparameterised a = tanh(u), u = mean + std * noise, and its log density summed over the last dimension.

    (u - mean) / std is the noise itself. log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)) is exact for every u, where
    log(1 - tanh(u)^2 + 1e-6) loses its gradient from |u| = 7 on.
    """
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return u.tanh(), (log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


# === end shared ===
def one_hots(args: Args) -> torch.Tensor:
    """What is appended to the observations of each task: (T, T), or (T, 0) with --no-task-id."""
    return torch.eye(len(args.tasks))[:, : len(args.tasks) * args.task_id]


class Actor(nn.Module):
    """Gaussian policy squashed by tanh: one MoE of observation and task to mean and log standard deviation (A each)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.moe = MoE(1, obs_dim + len(args.tasks) * args.task_id, 2 * action_dim, args.actor_moe, args)
        self.register_buffer("one_hot", one_hots(args), persistent=False)

    def forward(self, obs, task, trace: dict | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (B, O), task (B,) -> mean (B, A), log_std (B, A)."""
        mean, log_std = self.moe(torch.cat([obs, self.one_hot[task]], 1), task, trace)[0].chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def sample(self, obs: torch.Tensor, task: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (B, O), task (B,) -> reparameterised action (B, A) in [-1, 1], its log-probability (B,)."""
        return tanh_gaussian(*self(obs, task))

    def mode(self, obs: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """obs (B, O), task (B,) -> deterministic action tanh(mean) (B, A)."""
        return self(obs, task)[0].tanh()


class Agent(nn.Module):
    """Everything that learns: actor, twin critics, their target, a temperature per task, and the Adam of each."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args)
        self.critic = Critic(obs_dim, action_dim, args)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.full((len(args.tasks),), math.log(args.alpha_init)))
        self.target_entropy = -float(action_dim)
        self.to(args.device)
        adam = {"fused": True, "capturable": args.device.startswith("cuda")}  # a CUDA graph could record the step
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.policy_lr, **adam)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=args.q_lr, **adam)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=args.q_lr, **adam)
        self.optimizers = [self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer]


def descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer):
    """One step of `optimizer`; only its own parameters get a gradient, so a loss through the critic leaves it alone."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


def critic_loss_of(agent: Agent, batch: Batch, task: torch.Tensor, args: Args) -> torch.Tensor:
    """y = r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha_task log pi(a'|s')), a' ~ pi(.|s'); squared error.

    And the load-balancing loss.
    """
    with torch.no_grad():
        next_action, next_log_prob = agent.actor.sample(batch.next_obs, task)
        alpha = agent.log_alpha.exp()[task]  # (B,)
        next_value = agent.critic_target(batch.next_obs, next_action, task).amin(0) - alpha * next_log_prob  # (B,)
        target = batch.reward + args.gamma * (1 - batch.terminated) * next_value  # (B,)
    loss = (agent.critic(batch.obs, batch.action, task) - target).square().mean(1).sum()
    return loss + args.load_balance * sum(router.balance for router in agent.critic.moe.routers.values())


def actor_loss_of(agent: Agent, batch: Batch, task: torch.Tensor, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """E[alpha_task log pi(a|s) - min_i Q_i(s, a)], a reparameterised, and the load-balancing loss; log pi (B,)."""
    action, log_prob = agent.actor.sample(batch.obs, task)
    balance = sum(router.balance for router in agent.actor.moe.routers.values())
    alpha = agent.log_alpha.detach().exp()[task]
    loss = (alpha * log_prob - agent.critic(batch.obs, action, task).amin(0)).mean()
    return loss + args.load_balance * balance, log_prob.detach()


def update(agent: Agent, batch: Batch, task: torch.Tensor, args: Args) -> dict[str, torch.Tensor]:
    """One gradient step of critics, actor and temperatures; no host synchronisation. Returns detached scalars."""
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
        "policy/alpha": agent.log_alpha.detach().exp(),  # (T,)
        "policy/entropy": -log_prob.mean(),
    }


def draw_batch(buffers: list[ReplayBuffer], tasks: list[int], size: int) -> tuple[Batch, torch.Tensor]:
    """Equal shares of `tasks`, `size` transitions in all, task by task; and the task of each (size,)."""
    batches = [buffers[task].sample(size // len(tasks)) for task in tasks]
    batch = Batch(*(torch.cat(columns) for columns in zip(*batches, strict=True)))
    return batch, torch.tensor(tasks, device=batch.obs.device).repeat_interleave(size // len(tasks))


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
    """All parameters, and those that one sample needs: an expert of weight 0 is not needed."""
    share = {"softmoe": 1.0, "topk": args.top_k / args.num_experts, "hardcoded": 1 / args.num_experts}[args.router]
    total = sum(p.numel() for p in moe.parameters())
    experts = sum(p.numel() for p in [*moe.weights, *moe.biases] if p.shape[1] > 1)
    return total, total - round(experts * (1 - share))


SAMPLES = 1024  # states that the networks are measured on, all tasks together; a rank cannot be higher


def measure(agent: Agent, buffers: list[ReplayBuffer], args: Args, global_step: int) -> list[dict]:
    """Rows of moe.csv, on states drawn from the replay of the tasks that have one. Training does not notice.

    dormant_TAU    share of dormant neurons, per hidden layer and in total, on the states of each task (column task) and
                   on all. topk, hardcoded: a neuron is 0 where its expert is not chosen, our choice: an expert never
                   chosen is dormant as a whole, and its zeros lower the mean that tau refers to. So compare routers on
                   all states, or with equal n
    rank, width,   of the penultimate features: what the last layer multiplies by its weights (big: all w_i f_i);
    norm           effective rank (at most the number of states), number, mean norm
    router         mean weight of each task (column task) and expert (column item); topk: 0 where it is not chosen, so a
                   row sums to less than 1
    entropy        mean over a task's states of the entropy of their weights [nats]: 0 is one expert per state
    cosine         between the gradients of two tasks' losses (columns task and item), with new draws of actions
    parameters     all of them, and those active for one sample: what is left without experts of weight 0
    Of the two critics router is the first's, because expert i of the one has nothing to do with expert i of the other;
    the cosine is of both gradients as one, parameters are a sum, and the rest is averaged.
    """
    rows = []

    def row(network, metric, value, task="", item=""):
        values = (global_step, network, metric, task, item, round(float(value), 6))
        rows.append(dict(zip(MOE_COLUMNS, values, strict=True)))

    seen = [task for task, buffer in enumerate(buffers) if buffer.count]
    with torch.random.fork_rng([args.device] if args.device.startswith("cuda") else []):
        torch.manual_seed(args.seed)
        batch, task = draw_batch(buffers, seen, SAMPLES // len(seen) * len(seen))
        traces = {"critic": {}, "actor": {}}
        with torch.no_grad():
            agent.critic(batch.obs, batch.action, task, traces["critic"])
            agent.actor(batch.obs, task, traces["actor"])
        for network, trace in traces.items():
            layers = {key: x for key, x in trace.items() if key.startswith("layer")}
            for t in ("", *seen):
                mask = task == t if t != "" else torch.ones_like(task, dtype=torch.bool)
                for tau in TAUS:
                    masks = {k: torch.stack([dormant(h[mask], tau) for h in x]).float() for k, x in layers.items()}
                    for key, neurons in (masks | {"total": torch.cat(list(masks.values()), 1)}).items():
                        row(network, f"dormant_{tau}", neurons.mean(), t, key)
            row(network, "rank", np.mean([effective_rank(x) for x in trace["features"]]))
            row(network, "width", trace["features"].shape[-1])
            row(network, "norm", trace["features"].norm(dim=-1).mean())
            for key, w in trace.items():
                if key.startswith("router"):
                    for t in seen:
                        for expert, value in enumerate(w[0, task == t].mean(0).tolist()):
                            row(network, key, value, t, expert)
                        row(network, key.replace("router", "entropy"), entropy_of(w[:, task == t]), t)
            for item, number in zip(
                ("total", "active"), count_parameters(getattr(agent, network).moe, args), strict=True
            ):
                row(network, "parameters", number, item=item)
        parts = [(Batch(*(x[task == t] for x in batch)), task[task == t]) for t in seen]
        critic = [gradient(critic_loss_of(agent, *part, args), agent.critic) for part in parts]
        actor = [gradient(actor_loss_of(agent, *part, args)[0], agent.actor) for part in parts]
        for network, gradients in (("critic", critic), ("actor", actor)):
            table = cosines(gradients).tolist()
            for j, second in enumerate(seen):
                for i, first in enumerate(seen[:j]):
                    row(network, "cosine", table[i][j], first, second)
    return rows


# === shared: sac checks ===
LIMITS = {"seed": (0, 2**31 - 1), "learning_starts": (0, math.inf), "gamma": (0, 1), "tau": (1e-9, 1)}  # others: > 0
WORLD = 1  # process; several are for ppo.py and ppo_pmoe.py


def check_sizes(args: Args, env: gym.Env):
    """Exits if nothing would be learned, or if the replay, twice for a checkpoint, cannot fit the device's memory."""
    if args.total_timesteps // args.update_every * args.update_every < max(args.learning_starts, 1):
        others = f"--learning-starts {args.learning_starts} and --update-every {args.update_every}"
        fail(f"--total-timesteps {args.total_timesteps}: no update would come with {others}; give more")
    needed = 2 * args.buffer_size * (4 * (env.observation_space.shape[0] + env.action_space.shape[0] + 2) + 8)
    if args.device.startswith("cuda"):
        memory = torch.cuda.get_device_properties(args.device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
        limit = Path("/sys/fs/cgroup/memory.max")  # a container's
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            memory = min(memory, int(text))
    if needed > memory:
        fit = int(args.buffer_size * memory / needed * 0.8)
        sizes = f"{needed / 1e9:.1f} GB with a checkpoint's copy of it, of {memory / 1e9:.1f} GB"
        fail(f"--buffer-size {args.buffer_size}: needs {sizes}; {fit} would fit")


# === end shared ===
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
LIMITS |= {"load_balance": (0, math.inf)}


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
def check_tasks(args: Args) -> Args:
    """The arguments with a number of steps; exits where tasks, replay and steps do not fit together."""
    number = len(args.tasks)
    if not number:
        fail(f"--tasks: needs at least one environment, or one of {', '.join(TASK_SETS)}")
    if len(set(args.tasks)) < number:
        fail(f"--tasks {' '.join(args.tasks)}: each only once, please")
    check_mixture(args)
    if args.protocol == "multitask" and args.batch_size % number:
        size = max(args.batch_size // number, 1) * number
        fail(f"--batch-size {args.batch_size}: must be a multiple of the {number} tasks, such as {size}")
    if args.buffer_size < 2 * number:
        fail(f"--buffer-size {args.buffer_size}: too small for {number} tasks; give at least {2 * number}")
    if args.total_timesteps is None:
        args = dataclasses.replace(args, total_timesteps=160_000)
    if args.protocol == "continual" and args.total_timesteps < number * args.cycles:
        fail(f"--total-timesteps {args.total_timesteps}: fewer than the {number * args.cycles} phases; give more")
    steps, before, where = args.total_timesteps, number * max(args.learning_starts, 1), "the run"
    if args.protocol == "continual":
        steps, before, where = steps // (number * args.cycles), max(args.learning_starts, 1), "a phase"
    if steps < before + args.update_every - 1:
        few = f"with --update-every {args.update_every} the {steps} steps of {where} may see no update"
        fail(f"--learning-starts {args.learning_starts}: {few}; lower one of the two or give more --total-timesteps")
    return args


EVAL_COLUMNS = ("global_step", "policy", "task", "episodes", "return", "return_std", "length", "success")


def act(policy, obs: np.ndarray, task: int, device: str) -> np.ndarray:
    """One action (A,) of `policy`, a function of a batch of observations and tasks, for one observation (O,)."""
    with torch.no_grad():
        action = policy(torch.from_numpy(obs).to(device)[None], torch.tensor([task], device=device))
        return action[0].cpu().numpy()


def evaluate(agent, envs: list[gym.Env], args: Args, policy: str, global_step: int, frames: list | None = None) -> list:
    """Rows of eval.csv, one per task: raw returns over `args.eval_episodes` episodes; deterministic or stochastic.

    Own environments and seeds, and the random state is put back afterwards: training is the same with and without it.
    """
    function = agent.actor.mode if policy == "deterministic" else lambda *inputs: agent.actor.sample(*inputs)[0]
    rows = []
    with torch.random.fork_rng([args.device] if args.device.startswith("cuda") else []):
        torch.manual_seed(args.seed)
        for task, env in enumerate(envs):
            results = []
            for episode in range(args.eval_episodes):
                (obs, _), done = env.reset(seed=episode_seed(args.seed, episode, evaluation=True)), False
                while not done:
                    action = act(function, np.float32(obs), task, args.device)
                    obs, _, terminated, truncated, info = env.step(action)
                    done = terminated or truncated
                    if frames is not None:
                        frames.append(env.render())
                results.append((info["episode"]["r"], info["episode"]["l"], info.get("success", math.nan)))
            (mean, length, success), std = np.mean(results, axis=0), np.std(results, axis=0)[0]
            numbers = (round(float(v), 4) for v in (mean, std, length, success))
            rows.append(dict(zip(EVAL_COLUMNS, (global_step, policy, task, args.eval_episodes, *numbers), strict=True)))
    return rows


def evaluate_run(args: Args) -> Path:
    """Evaluates the run in folder `args.evaluate` on all its tasks, prints the result and writes evaluation.json."""
    for name, value in given(args).items():
        if name not in ("evaluate", "eval_episodes", "video", "device"):
            fail(f"{flag(name)} {value}: --evaluate takes it from the run; leave it out")
    saved, model = load_run("--evaluate", args.evaluate, "model.pt")
    run = dataclasses.replace(saved, eval_episodes=args.eval_episodes, device=args.device)
    configure(run)
    envs = make_envs(run.tasks)
    agent = Agent(envs[0].observation_space.shape[0], envs[0].action_space.shape[0], run)
    agent.load_state_dict(model["agent"])
    step = model["global_step"]
    result = {policy: evaluate(agent, envs, run, policy, step) for policy in ("deterministic", "stochastic")}
    for row in (row for rows in result.values() for row in rows):
        row |= {"task": run.tasks[row["task"]], "success": None if math.isnan(row["success"]) else row["success"]}
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

            envs = [make_env(task, render_mode="rgb_array") for task in run.tasks]
            evaluate(agent, envs, dataclasses.replace(run, eval_episodes=1), "deterministic", step, frames)
            imageio.mimsave(path, frames, duration=1000 / envs[0].metadata.get("render_fps", 30), loop=0)
        except Exception as error:  # no display, no OpenGL, a missing package: every renderer has its own errors
            fail(f"--video: cannot draw {run.env_id} here ({error}); without a display, MuJoCo wants MUJOCO_GL=egl")
        print(f"the first deterministic episode of each task: {path}")
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
    else:
        args = check_tasks(args)
    configure(args)
    envs, eval_envs = make_envs(args.tasks), make_envs(args.tasks)
    check_sizes(args, envs[0])
    run_dir = Path(run_dir) if checkpoint else new_run_dir(args)

    torch.manual_seed(args.seed)
    number, tasks = len(args.tasks), range(len(args.tasks))
    obs_dim, action_dim = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    agent = Agent(obs_dim, action_dim, args)
    rows = args.buffer_size // number + 1
    buffers = [ReplayBuffer(rows, obs_dim, action_dim, torch.device(args.device)) for _ in tasks]
    before = {"global_step": 0, "eval_rows": [], "moe_rows": [], "wall_time": 0.0}
    before |= {"episodes": [0] * number, "actions": [[] for _ in tasks]} | (checkpoint or {})
    start_step, episodes, actions, eval_rows, moe_rows, earlier_time = (
        before[key] for key in ("global_step", "episodes", "actions", "eval_rows", "moe_rows", "wall_time")
    )
    global_step, actions = start_step, [[np.float32(a) for a in actions[task]] for task in tasks]  # running episodes
    obs = []
    for task in tasks:
        last_obs, _ = envs[task].reset(seed=episode_seed(args.seed, episodes[task] * number + task))
        for action in actions[task]:
            last_obs, *_ = envs[task].step(action)
        obs.append(np.array(last_obs, np.float32))
    parameters = {"actor": count_parameters(agent.actor.moe, args), "critic": count_parameters(agent.critic.moe, args)}
    if checkpoint:
        for task in tasks:
            if not np.array_equal(obs[task], checkpoint["obs"][task].numpy()):
                fail(f"--resume {run_dir}: {args.tasks[task]} does not repeat its own episode, so it cannot go on")
        agent.load_state_dict(checkpoint["agent"])
        for optimizer, state in zip(agent.optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for buffer, state in zip(buffers, checkpoint.pop("buffers"), strict=True):
            buffer.load_state_dict(state)
        torch.set_rng_state(checkpoint["rng"])
        if args.device.startswith("cuda"):
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], args.device)
        if args.total_timesteps > checkpoint["args"]["total_timesteps"]:  # what was the end is not one any more
            eval_rows = [
                r for r in eval_rows if r["policy"] == "deterministic" and r["global_step"] % args.eval_every == 0
            ]
            moe_rows = [r for r in moe_rows if r["global_step"] % args.eval_every == 0]
    else:
        for network, (total, active) in parameters.items():
            print(f"{SCRIPT}.py: {network}: {total:,} parameters, {active:,} active for one sample")

    writer = SummaryWriter(run_dir, purge_step=start_step + 1)
    progress = tqdm(initial=start_step, total=args.total_timesteps, disable=not sys.stderr.isatty(), unit="step")
    started, signals = time.perf_counter(), []
    handlers = {s: signal.signal(s, lambda number, _: signals.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}

    def save():
        wall_time = earlier_time + time.perf_counter() - started
        model = {"script": SCRIPT, "args": dataclasses.asdict(args), "global_step": global_step}
        model["agent"] = agent.state_dict()
        state = {
            "optimizers": [optimizer.state_dict() for optimizer in agent.optimizers],
            "buffers": [buffer.state_dict() for buffer in buffers],
            "episodes": episodes,
            "actions": [[action.tolist() for action in actions[task]] for task in tasks],
            "obs": [torch.from_numpy(o) for o in obs],
            "eval_rows": eval_rows,
            "moe_rows": moe_rows,
            "wall_time": wall_time,
            "rng": torch.get_rng_state(),
        }
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

    losses, keeps = {}, f"{run_dir} keeps its checkpoint, but --resume would repeat this"
    try:
        if checkpoint:
            note_resume(run_dir, args, global_step)
        save()  # from now on the run can be resumed
        while global_step < args.total_timesteps:
            if args.protocol == "multitask":
                task, learned, task_steps = global_step % number, list(tasks), global_step // number
            else:
                phase = running_phase(global_step, args)
                if phase and phase != running_phase(global_step - 1, args):
                    losses = {}  # of the task before
                    for optimizer in agent.optimizers:
                        optimizer.state.clear()
                task, learned = phase % number, [phase % number]
                task_steps = global_step - math.ceil(phase * args.total_timesteps / (number * args.cycles))
                if phase >= number:  # the task comes back, and needs no random steps
                    task_steps += args.learning_starts
            if task_steps < args.learning_starts:
                action = torch.rand(action_dim).mul(2).sub(1).numpy()
            else:
                action = act(lambda *inputs: agent.actor.sample(*inputs)[0], obs[task], task, args.device)
            if not np.isfinite(action).all():
                stop(f"the training has diverged, the policy's action is not finite; {keeps}", 1)
            next_obs, reward, terminated, truncated, info = envs[task].step(action)
            next_obs, terminated, done = np.array(next_obs, np.float32), bool(terminated), bool(terminated or truncated)
            if not (np.isfinite(next_obs).all() and math.isfinite(reward)):  # before the replay keeps it
                stop(f"a reward or observation of {args.tasks[task]} is not finite; {keeps}", 1)
            buffers[task].add(obs[task], action, float(reward), terminated, next_obs, done)
            actions[task].append(action)
            obs[task], global_step = next_obs, global_step + 1
            if done:
                progress.set_postfix_str(f"task {task}: return {info['episode']['r']:.1f}", refresh=False)
                writer.add_scalar(f"charts/episodic_return_{task}", info["episode"]["r"], global_step)
                writer.add_scalar(f"charts/episodic_length_{task}", info["episode"]["l"], global_step)
                episodes[task], actions[task] = episodes[task] + 1, []
                seed = episode_seed(args.seed, episodes[task] * number + task)
                obs[task] = np.array(envs[task].reset(seed=seed)[0], np.float32)

            if (
                task_steps + 1 >= args.learning_starts
                and global_step >= number
                and global_step % args.update_every == 0
            ):
                batch, task_of = draw_batch(buffers, learned, args.batch_size)
                losses = update(agent, batch, task_of, args)
            progress.update()

            last, interrupted = global_step == args.total_timesteps, bool(signals)
            switch = args.protocol == "continual" and running_phase(global_step, args) > phase  # what it has learned
            evaluate_now = last or switch or global_step % args.eval_every == 0
            save_now = interrupted or global_step % args.checkpoint_every == 0
            speed = (global_step - start_step) / (time.perf_counter() - started)
            if losses and (global_step % 1000 == 0 or evaluate_now or save_now):
                metrics = {"charts/SPS": speed}  # the norm is not finite if the last update broke a weight
                metrics["charts/weight_norm"] = nn.utils.get_total_norm(agent.parameters()).item()
                for key, value in losses.items():  # a number, or one per task
                    names = [f"{key}_{k}" for k in range(len(value))] if value.ndim else [key]
                    metrics |= dict(zip(names, value.flatten().tolist(), strict=True))
                for key, value in metrics.items():
                    if not math.isfinite(value):
                        stop(f"the training has diverged, {key} is {value}; {keeps}", 1)
                    writer.add_scalar(key, value, global_step)
            if evaluate_now:
                for policy in ("deterministic", "stochastic") if last else ("deterministic",):
                    rows, text = evaluate(agent, eval_envs, args, policy, global_step), policy
                    eval_rows += rows
                    for key in ("return", "success"):
                        known = {row["task"]: row[key] for row in rows if math.isfinite(row[key])}  # few know success
                        for task_of_row, value in known.items():
                            tag = f"eval/{key}" if policy == "deterministic" else f"eval/{key}_stochastic"
                            writer.add_scalar(f"{tag}_{task_of_row}", value, global_step)
                        text += f" {key} " * bool(known) + " ".join(f"{value:.2f}" for value in known.values())
                    progress.write(f"step {global_step}/{args.total_timesteps}: {text}, {speed:.0f} steps/s")
                sys.stdout.flush()  # it may be a file
                measured = measure(agent, buffers, args, global_step)
                log_moe(writer, measured, args, global_step)
                moe_rows += measured
                write_eval(run_dir, eval_rows)
                write_moe(run_dir, moe_rows)
            if save_now:
                save()
            if interrupted:
                name = signal.Signals(signals[0]).name
                stop(f"{name}, checkpoint written; continue with --resume {run_dir}", 128 + signals[0])
        save()
    except OSError as error:
        stop(f"{error}; what was saved last stands: mend that, then --resume {run_dir}", 1)
    finally:
        progress.close()
        for number_of_signal, handler in handlers.items():
            signal.signal(number_of_signal, handler)
        with contextlib.suppress(OSError):  # the disk is full, as was said
            writer.close()
    print(f"{SCRIPT}.py: finished at step {global_step}; run folder {run_dir}")
    return run_dir


if __name__ == "__main__":
    main(tyro.cli(Args))

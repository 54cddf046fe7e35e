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
"""SAC-PMOE: soft actor-critic whose policy is a mixture of K Gaussians, trained by back-propagation-max.

Paper   Ren et al. 2021, "Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning", arXiv 2104.09122.
Policy  pi(a|s) = sum_k w_k(s) N_k(a|s), N_k: a = tanh(u), u ~ N(mu_k(s), sigma_k(s)^2), k ~ Categorical(w(s)).
Run       python algos/sac_pmoe.py                                 # target-reaching
          python algos/sac_pmoe.py --env-id HalfCheetah-v5 --num-experts 2 --learning-starts 5000 --alpha-init 1
Then      --resume runs/NAME goes on after Ctrl-C, kill -9 or a crash; --evaluate runs/NAME --video shows what it does

What differs from sac.py:
1. Actor: K experts (the paper: primitives), each a mean and a standard deviation, and a gate w = softmax, on one trunk.
2. Critic's target: the action and the log-probability of the drawn expert k', not of the mixture.
3. Actor's loss (back-propagation-max): the critic compares one action of each expert, and only the best expert learns.
4. Gate's loss (frequency approximate gradient): w is pulled to the one-hot of the best expert, hence to the frequency
   with which each expert is the best (Theorem 3.1). It is detached from the trunk.
Where this differs from the paper or the authors' code:
1. Only the best action goes through the critics with gradients; the pass of all K that finds it runs without.
2. The gate sees detached features, as in the authors' release. The gate's loss is averaged over K.
3. Evaluated without noise: tanh(mu_k) of an expert k ~ w (the release) and of that with the largest weight (ours).
4. --selection: what is compared to find the best expert. `draws`, the paper's form: the very draws that then learn,
   which rewards wide experts. Ours: `fresh` compares other draws, `means` compares tanh(mu_k).
5. The temperature starts at 0.1 and the first 40,000 steps are random, as in sac.py; so is the default task.
Letters in the shape comments: B batch, K experts, O observation size, A action dimensions, H hidden units.
"""

import ast
import contextlib
import dataclasses
import fcntl
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
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    env_id: str = "moe_envs:TargetReaching-v0?layout=mirror"  # id?arguments
    seed: int = 1  # seed of everything random
    total_timesteps: int = 60_000  # environment steps
    run_dir: str | None = None  # folder of this run (default: runs/<env>__<script>__s<seed>__<time>)
    resume: str | None = None  # folder of a run to go on with; --total-timesteps can make it longer
    evaluate: str | None = None  # folder of a run, or a policy's file, to evaluate instead of training
    video: bool = False  # with --evaluate: also write a GIF beside it
    eval_every: int = 5_000  # steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation
    checkpoint_every: int = 10_000  # steps between checkpoints
    device: str = "cpu"  # cpu, cuda or cuda:N
    cuda_graph: bool = False  # with --device cuda: the update as one CUDA graph, the same numbers sooner
    num_threads: int | None = None  # CPU threads of PyTorch (default: OMP_NUM_THREADS, or else 2)
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # torch.set_float32_matmul_precision
    learning_starts: int = 40_000  # uniformly random steps before the first update
    buffer_size: int = 1_000_000  # transitions in the replay
    update_every: int = 1  # environment steps per update
    batch_size: int = 256  # transitions per update
    gamma: float = 0.99  # discount
    tau: float = 0.005  # share of the critic that its target takes over per update
    policy_lr: float = 3e-4  # Adam's step size for the actor
    q_lr: float = 3e-4  # Adam's step size for the critics and the temperature
    alpha_init: float = 0.1  # temperature at the start; sac.py's docstring says why
    num_experts: int = 4  # K; the paper's Fig. 1: HalfCheetah 2, Humanoid and HumanoidStandup 10
    primitive_update: Literal["max", "all"] = "max"  # back-propagation-max, or -all: every expert learns
    selection: Literal["draws", "fresh", "means"] = "draws"  # what is compared to find the best expert


def tanh_gaussian(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reparameterised a = tanh(u), u = mean + std * noise, and its log density summed over the last dimension.

    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), numerically stable and with a finite gradient for every u.
    """
    noise = torch.randn_like(mean)  # (u - mean) / std
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return u.tanh(), (log_normal - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))).sum(-1)


def pick(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """x (B, K, A), k (B,) -> x[b, k_b] (B, A)."""
    return x.gather(1, k.view(-1, 1, 1).expand(-1, 1, x.shape[2])).squeeze(1)


class Actor(nn.Module):
    """pi(a|s) = sum_k w_k(s) N_k(a|s): K squashed Gaussians and a gate on one trunk, MLP O-256-256 with ReLU."""

    policies = ("deterministic", "gate")  # evaluated each time, the stochastic one only at the last three evaluations

    def __init__(self, obs_dim: int, action_dim: int, args: Args, hidden: int = 256):
        super().__init__()
        self.shape = args.num_experts, action_dim
        self.trunk = nn.Sequential(nn.Linear(obs_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 2 * args.num_experts * action_dim)
        self.gate = nn.Linear(hidden, args.num_experts)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """obs (B, O) -> mean (B, K, A), log_std (B, K, A), w (B, K)."""
        h = self.trunk(obs)  # (B, H)
        mean, log_std = self.head(h).view(-1, 2, *self.shape).unbind(1)  # (B, K, A) each
        w = self.gate(h.detach()).softmax(-1)  # the gate's loss does not shape the trunk
        return mean, log_std.clamp(-20, 2), w  # the bounds of Haarnoja et al.'s code

    def choose(self, obs: torch.Tensor, likeliest: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (B, O) -> mean (B, A), log_std (B, A) of an expert k ~ w(s), or of the one with the largest weight."""
        mean, log_std, w = self(obs)
        # (B,); w / Exp(1) is how torch.multinomial draws, here without its checks
        k = (w if likeliest else w / torch.empty_like(w).exponential_()).argmax(1)
        return pick(mean, k), pick(log_std, k)

    def sample(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (B, O) -> action (B, A) of an expert k ~ w(s), its log-probability under that expert (B,)."""
        return tanh_gaussian(*self.choose(obs))

    def act(self, obs: torch.Tensor, policy: str) -> torch.Tensor:
        """obs (B, O) -> action (B, A): a sample, or the mean of an expert k ~ w (gate) or of the likeliest."""
        if policy == "stochastic":
            return self.sample(obs)[0]
        return self.choose(obs, likeliest=policy == "deterministic")[0].tanh()


class Critic(nn.Module):
    """Two Q-functions, MLP (O + A)-256-256-1 with ReLU, as one batched network: every weight has a leading 2.

    The state's share of the first layer is computed once where one state is asked about several actions.
    """

    def __init__(self, obs_dim: int, action_dim: int, hidden: int = 256):
        super().__init__()

        def uniform(fan_in: int, *shape: int) -> nn.Parameter:  # as nn.Linear does
            return nn.Parameter(torch.empty(2, *shape).uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in)))

        fan_in = obs_dim + action_dim
        self.w_obs, self.w_action = uniform(fan_in, obs_dim, hidden), uniform(fan_in, action_dim, hidden)
        self.b1, self.w2 = uniform(fan_in, 1, hidden), uniform(hidden, hidden, hidden)
        self.b2, self.w3, self.b3 = uniform(hidden, 1, hidden), uniform(hidden, hidden, 1), uniform(hidden, 1, 1)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """obs (B, O); action (B, A) or, for K actions per state, (B, K, A) -> Q (2, B) or (2, B, K)."""
        x = torch.baddbmm(self.b1, obs.expand(2, -1, -1), self.w_obs)  # (2, B, H)
        if action.ndim == 3:
            x = x.repeat_interleave(action.shape[1], dim=1)  # (2, B K, H)
        x = x.baddbmm_(action.flatten(0, -2).expand(2, -1, -1), self.w_action).relu_()
        x = torch.baddbmm(self.b2, x, self.w2).relu_()
        return torch.baddbmm(self.b3, x, self.w3).view(2, *action.shape[:-1])


class Agent(nn.Module):
    """Everything that learns: actor, twin critics, their target, temperature, and the Adam of each."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor, self.critic = Actor(obs_dim, action_dim, args), Critic(obs_dim, action_dim)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha_init)))
        self.target_entropy = -float(action_dim)
        self.to(args.device)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.policy_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=args.q_lr, fused=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=args.q_lr, fused=True)
        self.optimizers = [self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer]

    @torch.no_grad()
    def act(self, obs: np.ndarray, policy: str = "stochastic") -> np.ndarray:
        """One observation (O,) -> one action (A,) of the policy as it explores, or as Actor.act() has it."""
        return self.actor.act(torch.from_numpy(obs)[None].to(self.log_alpha.device), policy)[0].cpu().numpy()


def descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer):
    """One step of `optimizer`; only its own parameters get a gradient, so a loss through the critic leaves it alone."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


def update(agent: Agent, batch: "Batch", args: Args) -> dict[str, torch.Tensor]:
    """One gradient step of critics, actor, gate and temperature; no host synchronisation. Returns detached tensors."""
    alpha = agent.log_alpha.detach().exp()

    # Critics: y = r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha log N_k'(a'|s')), k' ~ w(s'), a' ~ N_k'
    with torch.no_grad():
        next_action, next_log_prob = agent.actor.sample(batch.next_obs)
        next_value = agent.critic_target(batch.next_obs, next_action).amin(0) - alpha * next_log_prob  # (B,)
        target = batch.reward + args.gamma * (1 - batch.terminated) * next_value  # (B,)
    critic_loss = (agent.critic(batch.obs, batch.action) - target).square().mean(1).sum()
    descend(critic_loss, agent.critic_optimizer)

    # Best expert: j = argmax_k min_i Q_i(s, a_k), where a_k is one draw of each expert, or tanh(mu_k)
    mean, log_std, w = agent.actor(batch.obs)
    action, log_prob = tanh_gaussian(mean, log_std)  # (B, K, A), (B, K)
    with torch.no_grad():
        best = agent.critic(batch.obs, mean.tanh() if args.selection == "means" else action).amin(0).argmax(1)  # (B,)
    if args.selection == "fresh":  # the actor learns from other draws than those that were compared
        action, log_prob = tanh_gaussian(mean, log_std)
    best_log_prob = log_prob.gather(1, best[:, None]).squeeze(1)  # (B,)

    if args.primitive_update == "max":  # back-propagation-max: minimise E[alpha log N_j(a_j|s) - min_i Q_i(s, a_j)]
        actor_loss = (alpha * best_log_prob - agent.critic(batch.obs, pick(action, best)).amin(0)).mean()
    else:  # back-propagation-all: minimise E[sum_k alpha log N_k(a_k|s) - min_i Q_i(s, a_k)]
        actor_loss = (alpha * log_prob - agent.critic(batch.obs, action).amin(0)).sum(1).mean()

    # Gate (frequency approximate gradient): minimise the mean over batch and K of (w_k - 1[k = j])^2
    wins = torch.zeros_like(w).scatter_(1, best[:, None], 1.0)  # one-hot (B, K)
    gate_loss = (w - wins).square().mean()
    descend(actor_loss + gate_loss, agent.actor_optimizer)

    # Temperature: minimise -log alpha (log N_j + target entropy), which raises alpha while the entropy is too low
    entropy = -best_log_prob.detach().mean()
    alpha_loss = agent.log_alpha * (entropy - agent.target_entropy)
    descend(alpha_loss, agent.alpha_optimizer)

    with torch.no_grad():  # or the target would keep a graph of all its updates
        torch._foreach_lerp_(list(agent.critic_target.parameters()), list(agent.critic.parameters()), args.tau)
        distance = (mean.tanh()[:, :, None] - mean.tanh()[:, None]).norm(dim=3)  # (B, K, K), 0 on the diagonal
    return {
        "losses/critic": critic_loss.detach(),
        "losses/actor": actor_loss.detach(),
        "losses/gate": gate_loss.detach(),
        "losses/alpha": alpha_loss.detach(),
        "policy/alpha": alpha,
        "policy/entropy": entropy,
        "policy/std": log_std.detach().exp().mean(),
        "moe/gate_entropy": torch.special.entr(w.detach()).sum(1).mean(),
        "moe/expert_distance": distance.mean() * (w.shape[1] / max(w.shape[1] - 1, 1)),
        **{f"moe/wins_{k}": share for k, share in enumerate(wins.mean(0))},
        **{f"moe/usage_{k}": share for k, share in enumerate(w.detach().mean(0))},
    }


def train(args: Args, saved: dict | None = None):
    """Act, store, learn; from the checkpoint `saved` on if there is one."""
    torch.manual_seed(args.seed)
    env = Env(args)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agent = Agent(obs_dim, action_dim, args)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, args.device)
    run = Run(args, saved, agent=agent, buffer=buffer, env=env)  # all that a checkpoint holds
    learn, obs, metrics = CudaGraph(update) if args.cuda_graph else update, env.obs, {}
    for step in run.steps():
        if step <= args.learning_starts:  # uniformly at random
            action = torch.rand(action_dim).mul(2).sub(1).numpy()
        else:
            action = agent.act(obs)
        next_obs, reward, terminated, truncated, info = env.step(action)
        buffer.add(obs, action, reward, terminated, next_obs)
        obs = next_obs
        if terminated or truncated:
            run.log({"charts/episodic_return": info["episode"]["r"], "charts/episodic_length": info["episode"]["l"]})
            obs, _ = env.reset()

        if step >= args.learning_starts and step % args.update_every == 0:
            metrics = learn(agent, buffer.sample(args.batch_size), args)

        last = step == args.total_timesteps
        if last or step % 1000 == 0:
            run.log(metrics)
        if last or step % args.eval_every == 0:
            run.evaluate()
        if last or step % args.checkpoint_every == 0:
            run.save()


# ======================================================================================================================
# That was the agent. The rest is the same in all SAC scripts: replay, environment, evaluation, files, flags and errors.
# ======================================================================================================================
Batch = namedtuple("Batch", "obs action reward terminated next_obs")  # (B, O), (B, A), (B,), (B,), (B, O)


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


class CudaGraph:
    """update() as one CUDA graph: its kernels, some 200, are recorded once and launched together from then on.

    Two calls run as they are and warm up, the third records. What a call returns is overwritten by the next one.
    """

    def __init__(self, update):
        self.update, self.calls, self.graph = update, 0, torch.cuda.CUDAGraph()

    def __call__(self, agent: Agent, batch: Batch, args: Args) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls < 3:
            return self.update(agent, batch, args)
        if self.calls == 3:
            self.batch = Batch(*(x.clone() for x in batch))
            groups = [optimizer.param_groups[0] for optimizer in agent.optimizers]
            for group in groups:
                group["capturable"] = True  # Adam refuses to be recorded without; a fused one computes the same
            with torch.cuda.graph(self.graph):
                self.metrics = self.update(agent, self.batch, args)
            for group in groups:
                group["capturable"] = False
        torch._foreach_copy_(list(self.batch), list(batch))
        self.graph.replay()
        return self.metrics


class Env(gym.Wrapper):
    """`id?key=value&key=value` with float32 observations and actions in [-1, 1]^A. Each episode has its own seed.

    A checkpoint therefore needs no simulator state: resume plays the running episode's actions again.
    """

    def __init__(self, args: Args, evaluation: bool = False, **kwargs):
        self.first_seed, self.half = args.seed * 100_003, 2**30 * evaluation  # evaluation: upper half of int32
        name, _, query = args.env_id.partition("?")
        remedy = "see gymnasium.pprint_registry(), write id?name=value&name=value; moe_envs comes by pip install -e ."
        with exit_on_error(f"--env-id {args.env_id}", remedy):
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
            check_memory(args, self.observation_space.shape[0], self.action_space.shape[0])
            self.reset(0)
            self.step(self.action_space.low)  # an argument of a wrong kind may show only now
            self.reset(0)

    def reset(self, episode: int | None = None):
        """The next episode, or that with this number."""
        self.episode, self.actions = self.episode + 1 if episode is None else episode, []
        self.rewards, self.success_once = [], math.nan
        seed = self.half + (self.first_seed + self.episode) % 2**30
        random.seed(seed)  # some environments draw from the global generators
        np.random.seed(seed)
        return self.check(*self.env.reset(seed=seed))

    def step(self, action: np.ndarray):
        if not np.isfinite(action).all():
            raise FloatingPointError("the policy's action is not finite, the training has diverged")
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.actions.append(action)
        self.rewards.append(np.asarray(reward, float).item())  # of any shape that has one value
        obs, info = self.check(obs, info)
        if terminated or truncated:
            info["episode"] = {"r": math.fsum(self.rewards), "l": len(self.rewards)}
        return obs, self.rewards[-1], bool(terminated), bool(truncated), info

    def check(self, obs, info: dict) -> tuple[np.ndarray, dict]:
        """A copy of the observation, which some environments change in place; info with success as a number."""
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


def check_memory(args: Args, obs_dim: int, action_dim: int):
    """Refuses, before anything is created, what would take more memory than there is."""
    k, memory = getattr(args, "num_experts", 1), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rows = min(args.buffer_size, args.total_timesteps)  # a CPU takes memory for those in use
    if args.device != "cpu":
        rows, memory = args.buffer_size, torch.cuda.mem_get_info(args.device)[1]
    need = {"buffer_size": 4 * (2 * obs_dim + action_dim + 2) * rows}
    pairs = 16 * k**2 * action_dim  # per state: every expert's density at every expert's action
    need["num_experts"] = 8192 * k * (action_dim + 256) + 256 * pairs  # weights and their moments; a usual batch
    need["batch_size"] = args.batch_size * (8192 * (1 + k) + pairs)  # and hidden units of both critics, forth and back
    for name, size in need.items():
        with exit_on_error(f"--{name.replace('_', '-')} {getattr(args, name, None)}", "give less"):
            if size > memory:
                raise ValueError(f"would take {size / 1e9:.0f} GB, the machine has {memory / 1e9:.0f} GB")


def evaluate(agent: Agent, env: Env, args: Args, step: int, policy: str, watch=lambda: None) -> dict:
    """A row of eval.csv: raw returns of episodes with seeds of their own; training's random states stay as they are."""
    results, states = [], (random.getstate(), np.random.get_state())
    agent = agent if args.device == "cpu" else deepcopy(agent).cpu()  # for one observation at a time a GPU is slow
    with torch.random.fork_rng([args.device] if args.device != "cpu" else []):  # manual_seed seeds the GPU as well
        torch.manual_seed(args.seed)
        for episode in range(args.eval_episodes):
            (obs, _), done = env.reset(episode), False
            while not (done or SIGNALS):
                obs, _, terminated, truncated, info = env.step(agent.act(obs, policy))
                done = terminated or truncated
                watch()
            if SIGNALS:
                return {}
            results.append((*info["episode"].values(), info["success"], info["success_once"]))
    random.setstate(states[0])
    np.random.set_state(states[1])
    values, std = (f(results, axis=0).round(4).tolist() for f in (np.mean, np.std))
    row = {"global_step": step, "policy": policy, "episodes": args.eval_episodes, "return": values[0]}
    return row | {"return_std": std[0]} | dict(zip(("length", "success", "success_once"), values[1:], strict=True))


class Run:
    """A training and its folder. A checkpoint is `info`, which run.json has as well, and the state of all parts."""

    def __init__(self, args: Args, saved: dict | None, agent: Agent, **parts):
        self.args, self.agent, self.eval_env = args, agent, Env(args, evaluation=True)
        self.step, self.eval_rows, self.owed = 0, [], False  # owed: an evaluation that a signal cut short
        self.parts = {"agent": agent} | parts | {f"optimizer_{i}": x for i, x in enumerate(agent.optimizers)}
        self.info = describe(args) | {"wall_time": 0.0, "resumed": []}
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
        else:
            parts["env"].reset(0)  # evaluation's environment has seeded the generators of random and NumPy
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
        self.bar = tqdm(initial=self.step, total=args.total_timesteps, disable=None, unit="step")

    def steps(self):
        """The steps that are left. Ctrl-C and SIGTERM end them after a whole one, with a checkpoint."""
        if self.owed:
            self.evaluate()
            self.save()
        while self.step < self.args.total_timesteps and not SIGNALS:
            self.step += 1
            yield self.step
            self.bar.update()
        self.bar.close()
        if SIGNALS:
            self.save()
            name = signal.Signals(SIGNALS[0]).name
            print(f"{SCRIPT}.py: {name}, step {self.step} is saved; --resume {self.folder}", file=sys.stderr)
            raise SystemExit(128 + SIGNALS[0])

    def log(self, metrics: dict) -> float:
        """Writes curves for TensorBoard. Returns the environment steps per second since this process began."""
        speed = (self.step - self.first[0]) / (time.perf_counter() - self.first[1])
        for key, value in (metrics | {"charts/SPS": speed}).items():
            self.writer.add_scalar(key, value, self.step)
        if "charts/episodic_return" in metrics:
            self.bar.set_postfix_str(f"return {metrics['charts/episodic_return']:.1f}", refresh=False)
        return speed

    def policies(self, step: int) -> tuple[str, ...]:
        """The policies that are evaluated after this step: at the last three evaluations the stochastic one as well."""
        left, every = self.args.total_timesteps - step, self.args.eval_every
        return (Actor.policies + ("stochastic",) * (-(-left // every) < 3)) * (left == 0 or step % every == 0)

    def evaluate(self):
        """Adds rows to eval.csv."""
        rows = [evaluate(self.agent, self.eval_env, self.args, self.step, p) for p in self.policies(self.step)]
        self.owed = bool(SIGNALS)
        if self.owed or not rows:
            return
        for row in rows:
            known = {key: row[key] for key in ("return", "success") if math.isfinite(row[key])}  # few know success
            if row["success_once"] > row["success"]:  # success counts at the end of an episode, here at any step
                known["success_once"] = row["success_once"]
            suffix = "" if row["policy"] == "deterministic" else f"_{row['policy']}"
            speed = self.log({f"eval/{key}{suffix}": value for key, value in known.items()})
            text = "".join(f" {key} {value:.2f}," for key, value in known.items())
            self.bar.write(f"step {self.step}/{self.args.total_timesteps}: {row['policy']}{text} {speed:.0f} steps/s")
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
    modules = {name: sys.modules.get(name) for name in ("gymnasium", "mujoco", "numpy", "torch")}
    versions = {"python": platform.python_version()} | {k: str(m.__version__) for k, m in modules.items() if m}
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
WORDS |= {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}  # in --env-id; 'on' in quotes is a string
LIMITS = {"seed": (0, 2**31 - 1), "learning_starts": (0, 1e12), "gamma": (0, 1), "tau": (1e-9, 1)}  # others: positive
LIMITS["num_threads"] = (1, 4 * (os.cpu_count() or 1))
OLDER = {"cuda_graph": False}  # flags that older files lack, and the values at which a script does what it did then


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
            limits = LIMITS | {"total_timesteps": (int(saved["global_step"]), 1e12)}
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
            if name == "cuda_graph" and value and args.device == "cpu" and args.evaluate is None:
                raise ValueError("goes with --device cuda")
    with exit_on_error(f"--device {args.device}", "--device cpu always works"):
        if args.device != "cpu" and not args.device.startswith("cuda"):
            raise ValueError("must be cpu, cuda or cuda:N")
        torch.zeros(1, device=args.device).item()
    with exit_on_error("torchrun", "start it with python"):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("this script is one process")
    if args.total_timesteps < args.learning_starts and not saved:
        print(f"{SCRIPT}.py: the run ends before its first update, at step {args.learning_starts}", file=sys.stderr)
    sys.path += [os.getcwd()]  # for --env-id module:Id
    torch.set_num_threads(args.num_threads)
    torch.empty(8_000_000)  # freed at once: glibc then keeps freed blocks up to this size, for the next update
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.set_flush_denormal(True)  # numbers below 1e-38, such as Adam's moments of silent units, are slow on CPUs
    return args, saved


def evaluate_run(args: Args, saved: dict):
    """Prints the evaluation of a saved policy as JSON and writes it, and with --video a GIF, beside the policy."""
    env, path = Env(args, evaluation=True), Path(args.evaluate)
    agent = Agent(env.observation_space.shape[0], env.action_space.shape[0], args)
    with exit_on_error(f"--evaluate {path}", "the file is damaged or of another run"):
        state = {key.removeprefix("actor."): x for key, x in saved["agent"].items() if key.startswith("actor.")}
        agent.actor.load_state_dict(state)
    rows = [evaluate(agent, env, args, saved["global_step"], p) for p in (*Actor.policies, "stochastic")]
    if SIGNALS:
        raise SystemExit(128 + SIGNALS[0])
    text = json.dumps({row["policy"]: row for row in rows}, indent=1).replace("NaN", "null")
    print(text)
    write(path / "evaluation.json" if path.is_dir() else path.with_suffix(".json"), text.encode())
    if args.video:
        gif = path / "video.gif" if path.is_dir() else path.with_suffix(".gif")
        with exit_on_error("--video", "without a display, MuJoCo wants MUJOCO_GL=egl"):
            import imageio  # comes with gymnasium[mujoco]

            env, frames = Env(args, evaluation=True, render_mode="rgb_array"), []
            fps = env.metadata.get("render_fps", 30)  # a GIF counts in 10 ms, and browsers show less than 20 ms as 100
            strides = range(-(-fps // 50), fps // 10 + 2)
            stride = min(strides, key=lambda s: abs(100 * s / fps - round(100 * s / fps)) / s)

            def watch():
                if len(env.actions) % stride == 0 and len(frames) < 500:  # everything would take gigabytes
                    frames.append(env.render()[::2, ::2])

            if not evaluate(agent, env, dataclasses.replace(args, eval_episodes=1), 0, Actor.policies[-1], watch):
                raise SystemExit(128 + SIGNALS[0])
            data = imageio.mimsave("<bytes>", frames, format="gif", duration=10 * round(100 * stride / fps), loop=0)
        write(gif, data)
        print(f"{len(frames)} frames of one episode, policy {Actor.policies[-1]}: {gif}")


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

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
"""PPO with a gating operation: one Gaussian, whose mean and standard deviation a gate averages over K experts.

Papers  Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv 1707.06347.
        Ren et al. 2021, "Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning", arXiv 2104.09122,
        which compares PMOE with a gating operation. Its definition was not available to us.
Policy  a ~ N(mu(s), sigma(s)^2), mu = sum_k w_k mu_k, sigma = sum_k w_k sigma_k: not a mixture. The environment
        receives clip(a, -1, 1).

Run       python algos/ppo_gating.py                                 # target-reaching
          python algos/ppo_gating.py --env-id HalfCheetah-v5 --num-experts 8 --total-timesteps 1000000
          torchrun --nproc_per_node=2 algos/ppo_gating.py            # the environments split over two processes
Then      --resume runs/NAME goes on after Ctrl-C, kill -9 or a crash; --evaluate runs/NAME --video shows what it does

What differs from ppo.py is the actor; in brackets, where each choice comes from:
1. K experts (PMOE: primitives), each a mean on one trunk and a log sigma_k, and a gate w = softmax. Public code
   averages means: ActorMoE in amp-rsl-rl and, under the name MCP, the humanoid controllers UHC and PHC. ActorMoE has
   one sigma for all experts and states: --std shared. To average the sigmas is ours; sigma then depends on the state.
2. One draw for all experts (ours): independent draws, averaged, would shrink sigma, down to sigma / sqrt(K).
3. PPO's gradient reaches experts and gate alike, through mu and sigma (as in ActorMoE).
4. Four experts; the gate is linear in the normalised observation, its gain 0.01: as in ppo_pmoe.py (ours).
With one expert this is ppo.py, bit for bit.
Letters in shape comments: T steps, N environments, B batch, K experts, O observation size, A action dimensions, H
hidden units.
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
from datetime import timedelta
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.optim.adam import adam  # without the bookkeeping of step(), which takes longer than the arithmetic
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    env_id: str = "moe_envs:TargetReaching-v0?layout=fixed&obstacle_penalty=-10"  # id?arguments
    seed: int = 1  # seed of everything random
    total_timesteps: int = 200_000  # environment steps
    run_dir: str | None = None  # folder of this run (default: runs/<env>__<script>__s<seed>__<time>)
    resume: str | None = None  # folder of a run to go on with; --total-timesteps can make it longer
    evaluate: str | None = None  # folder of a run, or a policy's file, to evaluate instead of training
    video: bool = False  # with --evaluate: also write a GIF beside it
    eval_every: int = 20_000  # steps between evaluations, each at the end of a rollout
    eval_episodes: int = 10  # episodes per evaluation
    checkpoint_every: int | None = None  # steps between checkpoints, which end all episodes (default: see Run)
    device: str = "cpu"  # cpu, cuda or cuda:N
    num_threads: int | None = None  # CPU threads of PyTorch (default: OMP_NUM_THREADS, or else 1)
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # torch.set_float32_matmul_precision
    num_envs: int = 8  # environments, those of all processes together
    async_envs: bool = False  # each environment in a process of its own; pays if its step takes long
    num_steps: int = 256  # steps of each environment per rollout
    update_epochs: int = 10  # passes over a rollout
    num_minibatches: int = 32  # updates per pass
    learning_rate: float = 3e-4  # Adam's step size
    anneal_lr: bool = True  # lowers it linearly to 0 over the run
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    clip_coef: float = 0.2  # the ratio counts within 1 +- this
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.0  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    target_kl: float | None = None  # no further pass over a rollout once a pass has a mean KL divergence above this
    # the gating operation
    num_experts: int = 4  # K
    std: Literal["state", "shared"] = "state"  # sigma: the experts' averaged by the gate, or one for all states


# T steps of N environments: obs and next_obs (T, N, O), where an episode ends its last; action (T, N, A), unclipped;
# (T, N): reward, terminated, done = terminated or truncated, discounted = the episode's rewards, discounted by age.
Rollout = namedtuple("Rollout", "obs action reward terminated done next_obs discounted")
# Rows to learn from: obs (B, O), normalised; action (B, A), unclipped; (B,): log_prob when acting, advantage, target.
Batch = namedtuple("Batch", "obs action log_prob advantage target")


def orthogonal(gain: float, *shape: int) -> nn.Parameter:
    """Weights (..., inputs, outputs), each matrix orthogonal times `gain`."""
    weights = torch.empty(shape)
    for matrix in weights.view(-1, *shape[-2:]):
        nn.init.orthogonal_(matrix, gain)
    return nn.Parameter(weights)


class Trunks(nn.Module):
    """Hidden layers of actor and critic, MLPs O-64-64 with tanh, as one batched network: weights have a leading 2."""

    def __init__(self, obs_dim: int, hidden: int = 64):
        super().__init__()
        self.w1, self.b1 = orthogonal(2**0.5, 2, obs_dim, hidden), nn.Parameter(torch.zeros(2, 1, hidden))
        self.w2, self.b2 = orthogonal(2**0.5, 2, hidden, hidden), nn.Parameter(torch.zeros(2, 1, hidden))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """obs (B, O) -> features (2, B, H)."""
        x = torch.baddbmm(self.b1, obs.expand(2, -1, -1), self.w1).tanh()
        return torch.baddbmm(self.b2, x, self.w2).tanh()


class Head(nn.Module):
    """Linear layer, orthogonal weights times `gain`."""

    def __init__(self, inputs: int, outputs: int, gain: float):
        super().__init__()
        self.w, self.b = orthogonal(gain, inputs, outputs), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.b, x, self.w)


class Actor(nn.Module):
    """Policy N(mu(s), sigma(s)^2), the average of K experts under a gate, and value V(s): MLPs O-64-64 with tanh."""

    policies = ("deterministic",)  # evaluated each time, the stochastic one only at the last three evaluations

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.shape = args.num_experts, action_dim
        self.noise_dim = action_dim  # normal numbers that one action takes, the same for all experts
        self.normalize = Moments(obs_dim)
        self.trunks = Trunks(obs_dim)
        self.mean, self.value = Head(64, args.num_experts * action_dim, gain=0.01), Head(64, 1, gain=1.0)
        several = args.num_experts > 1  # one expert has no gate: this is ppo.py, bit for bit
        self.log_std = nn.Parameter(torch.zeros(self.shape if several and args.std == "state" else action_dim))
        self.gate = Head(obs_dim, args.num_experts, gain=0.01) if several else None

    def experts(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalised obs (B, O) -> mean (B, K, A), log sigma (K, A) or shared (A,), log w (B, K), value (B,)."""
        actor, critic = self.trunks(obs)  # (B, H) each
        mean, value = self.mean(actor).view(-1, *self.shape), self.value(critic).squeeze(1)
        log_w = self.gate(obs).log_softmax(1) if self.gate else torch.zeros_like(mean[:, :, 0])
        return mean, self.log_std, log_w, value

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalised obs (B, O) -> mean sum_k w_k mu_k (B, A), log of sigma = sum_k w_k sigma_k (B, A), value (B,).

        With --std shared log sigma is (A,).
        """
        mean, log_std, log_w, value = self.experts(obs)
        log_w = log_w.unsqueeze(2)  # (B, K, 1)
        if log_std.ndim == 2:  # --std state: (K, A)
            log_std = (log_w + log_std).logsumexp(1)
        return (log_w.exp() * mean).sum(1), log_std, value

    def log_prob(self, mean: torch.Tensor, log_std: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """mean (B, A), log_std (B, A) or (A,), unclipped action (B, A) -> log N(action; mean, sigma^2) (B,)."""
        noise = (action - mean) * (-log_std).exp()
        return -0.5 * noise.square().sum(1) - (log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, log_std: torch.Tensor) -> torch.Tensor:
        """Of the policy, log_std (B, A) or (A,) -> () the mean over the states."""
        return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean()

    def sample(self, obs: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw obs (B, O), standard normal noise (B, A) -> action (B, A) for the environment, unclipped action."""
        mean, log_std, _ = self(self.normalize(obs))
        action = mean + log_std.exp() * (torch.randn_like(mean) if noise is None else noise)
        return action.clamp(-1, 1), action

    def act(self, obs: torch.Tensor, policy: str) -> torch.Tensor:
        """Raw obs (B, O) -> action (B, A) for the environment: a sample (stochastic) or the mean (deterministic)."""
        return self.sample(obs)[0] if policy == "stochastic" else self(self.normalize(obs))[0].clamp(-1, 1)

    @torch.no_grad()
    def diagnostics(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is logged of the policy after learning: means over normalised obs (B, O)."""
        mean, _, log_w, _ = self.experts(obs)
        _, log_std, _ = self(obs)
        mean, w = mean.clamp(-1, 1), log_w.exp()
        # cdist's default is inexact for more than 25 experts; the diagonal has to be 0
        distance = torch.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist")  # (B, K, K)
        return {
            "policy/std": log_std.exp().mean(),
            "policy/entropy": self.entropy(log_std),
            "moe/gate_entropy": torch.special.entr(w).sum(1).mean(),
            "moe/expert_distance": distance.mean() * (w.shape[1] / max(w.shape[1] - 1, 1)),
            **{f"moe/usage_{k}": share for k, share in enumerate(w.mean(0))},
        }


class Agent(nn.Module):
    """Everything that learns: actor and critic, the scale of the rewards, and Adam."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args)
        self.return_moments = Moments()
        self.to(args.device)
        self.optimizers = [Adam(self.actor, args)]

    @torch.no_grad()
    def act(self, obs: np.ndarray, policy: str) -> np.ndarray:
        """One observation (O,) -> one action (A,), as Actor.act() has it."""
        return self.actor.act(torch.from_numpy(obs)[None].to(self.actor.log_std.device), policy)[0].cpu().numpy()


def gae(reward, value, next_value, terminated, done, args: Args) -> torch.Tensor:
    """Generalised advantage estimate, all (T, N). A time limit cuts the sum but keeps the value behind it."""
    delta = reward + args.gamma * (1 - terminated) * next_value - value
    decay = args.gamma * args.gae_lambda * (1 - done)
    advantages, advantage = [], torch.zeros_like(delta[0])
    for delta_t, decay_t in zip(delta.flip(0), decay.flip(0), strict=True):
        advantage = torch.addcmul(delta_t, decay_t, advantage)  # A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}
        advantages.append(advantage)
    return torch.stack(advantages).flip(0)


@torch.no_grad()
def prepare(agent: Agent, rollout: Rollout, args: Args) -> Batch:
    """Normalises a rollout, estimates its advantages and makes a batch of T N rows. Then the moments take it in."""
    obs, next_obs = (agent.actor.normalize(x.flatten(0, 1)) for x in (rollout.obs, rollout.next_obs))
    agent.return_moments.update(rollout.discounted.flatten())
    reward = (rollout.reward * agent.return_moments.scale).clamp(-10, 10)
    *policy, value = agent.actor(obs)
    value, next_value = value.view_as(reward), agent.actor(next_obs)[-1].view_as(reward)
    advantage = gae(reward, value, next_value, rollout.terminated, rollout.done, args)
    action = rollout.action.flatten(0, 1)
    log_prob = agent.actor.log_prob(*policy, action)
    agent.actor.normalize.update(rollout.obs.flatten(0, 1))
    return Batch(obs, action, log_prob, advantage.flatten(), (advantage + value).flatten())


def learn(agent: Agent, batch: Batch, args: Args) -> dict[str, torch.Tensor]:
    """Passes of updates on shuffled minibatches. Returns means of what update() returns, KL and the share clipped."""
    metrics = []
    for _ in range(args.update_epochs):
        rows = torch.randperm(len(batch.obs)).view(args.num_minibatches, -1).to(args.device)
        shuffled = Batch(*(x[rows] for x in batch))  # (minibatches, B, ...)
        std, mean = torch.std_mean(shuffled.advantage, 1, keepdim=True)
        shuffled = shuffled._replace(advantage=(shuffled.advantage - mean) / (std + 1e-8))
        metrics += [update(agent, minibatch, args) for minibatch in split(shuffled)]
        log_ratio = torch.stack([m.pop("log_ratio") for m in metrics[-args.num_minibatches :]])
        kl = average((log_ratio.exp() - 1 - log_ratio).mean())  # estimate of KL(pi_old || pi) in this pass
        if args.target_kl is not None and kl > args.target_kl:
            break
    clipped = average((log_ratio.exp() - 1).abs().gt(args.clip_coef).float().mean())
    means = {key: torch.stack([m[key] for m in metrics]).mean(0) for key in metrics[0]}
    return means | {"policy/kl": kl, "policy/clipped": clipped}


def update(agent: Agent, batch: Batch, args: Args) -> dict[str, torch.Tensor]:
    """One gradient step on a minibatch; no host synchronisation. Returns detached scalars, and log r (B,)."""
    mean, log_std, value = agent.actor(batch.obs)  # (B, A), (B, A) or (A,), (B,)
    log_prob = agent.actor.log_prob(mean, log_std, batch.action)  # (B,)

    # Actor: maximise E[min(r A, clip(r, 1 - eps, 1 + eps) A)], r = pi(a|s) / pi_old(a|s).
    # Where r A is the smaller, the gradient is that of (r A) log pi with r A held fixed; elsewhere it is zero.
    with torch.no_grad():
        log_ratio = log_prob - batch.log_prob
        ratio = log_ratio.exp()
        gain = ratio * batch.advantage
        bound = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef) * batch.advantage
    actor_loss = (gain * (gain <= bound)).dot(log_prob) / -len(gain)

    # Critic: minimise E[(V(s) - (A + V_old(s)))^2]
    critic_loss = F.mse_loss(value, batch.target)

    loss = actor_loss + args.vf_coef * critic_loss
    if args.ent_coef:
        loss -= args.ent_coef * agent.actor.entropy(log_std)
    agent.optimizers[0].descend(loss)
    return {
        "losses/critic": critic_loss.detach(),
        "losses/actor": -torch.min(gain, bound).mean(),
        "log_ratio": log_ratio,
    }


def train(args: Args, saved: dict | None = None):
    """Roll out, estimate advantages, learn; from the checkpoint `saved` on if there is one."""
    torch.manual_seed(args.seed)
    envs = make_envs(args)
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space.shape[0], args)
    run, sampler = Run(args, saved, agent=agent), Sampler(envs, args)  # a checkpoint holds the agent
    sampler.reset(run.step)
    for step in run.steps():
        if args.anneal_lr:
            left = 1 - (step - args.num_envs * args.num_steps) / args.total_timesteps
            for optimizer in agent.optimizers:
                optimizer.param_groups[0]["lr"] = left * args.learning_rate
        rollout, episodes = sampler.rollout(agent)
        batch = prepare(agent, rollout, args)
        metrics = learn(agent, batch, args) | agent.actor.diagnostics(batch.obs)

        if episodes:
            mean_return, mean_length = np.mean(episodes, axis=0)
            run.log({"charts/episodic_return": mean_return, "charts/episodic_length": mean_length})
        run.log(metrics | {"charts/learning_rate": agent.optimizers[0].param_groups[0]["lr"]})
        if run.due(step, args.eval_every):
            run.evaluate()
        if run.due(step, args.checkpoint_every):
            run.save()
            sampler.reset(step)


# ======================================================================================================================
# That was the agent. The rest is the same in all PPO scripts: Adam, environments, evaluation, files, flags and errors.
# ======================================================================================================================
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # process of torchrun, their number


def average(x: torch.Tensor) -> torch.Tensor:
    """Mean of `x` over the processes."""
    if WORLD > 1:
        torch.distributed.all_reduce(x)
        x /= WORLD
    return x


def gather(x: torch.Tensor) -> torch.Tensor:
    """(T, N / WORLD, ...) of each process -> (T, N, ...)"""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    torch.distributed.all_gather(parts, x)
    return torch.cat(parts, dim=1)


def split(batch: Batch):
    """(minibatches, B, ...) -> each minibatch, of which this process has its part (B / WORLD, ...)."""
    return (Batch(*rows) for rows in zip(*(x.chunk(WORLD, 1)[RANK] for x in batch), strict=True))


def normal(*shape: int, dim: int = 0, device: str | torch.device = "cpu") -> torch.Tensor:
    """Standard normal numbers: of those that one process would draw for all, this process's part along `dim`."""
    whole = [size * (WORLD if i == dim else 1) for i, size in enumerate(shape)]
    return torch.randn(*whole, device=device).chunk(WORLD, dim)[RANK]


class Moments(nn.Module):
    """Mean and variance of all that it has been shown; calling it standardises, within 10 standard deviations."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(shape))  # mean and 1 / std as forward() uses them
        self.register_buffer("scale", torch.ones(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.shift) * self.scale).clamp(-10, 10)

    def update(self, x: torch.Tensor):
        """Takes in x (B, *shape): mean and variance of the union of two sets (Chan et al. 1979)."""
        x, n = x.double(), len(x)
        total, delta = self.count + n, x.mean(0) - self.mean
        self.var = (self.count * self.var + n * x.var(0, correction=0) + delta**2 * self.count * n / total) / total
        self.mean, self.count = self.mean + delta * n / total, total
        self.shift, self.scale = self.mean.float(), (self.var + 1e-8).rsqrt().float()


class Adam(torch.optim.Adam):
    """Adam of a module's weights, views of one vector (or of a part of another Adam's): one operation steps all."""

    def __init__(self, module: nn.Module, args: Args, vector: torch.Tensor | None = None):
        self.weights, self.max_norm = list(module.parameters()), args.max_grad_norm
        self.vector = torch.cat([w.detach().flatten() for w in self.weights]) if vector is None else vector
        for w, part in zip(self.weights, self.vector.split([w.numel() for w in self.weights]), strict=True):
            w.data = part.view_as(w)
        super().__init__([self.vector], lr=args.learning_rate, eps=1e-5, fused=True)
        zeros = {"exp_avg": torch.zeros_like(self.vector), "exp_avg_sq": torch.zeros_like(self.vector)}
        self.state[self.vector] |= {"step": torch.zeros((), device=self.vector.device)} | zeros

    def descend(self, loss: torch.Tensor):
        """One step, by the gradient averaged over the processes and then shortened to its largest norm."""
        gradient = average(torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.weights)]))
        gradient /= torch.linalg.vector_norm(gradient).div_(self.max_norm).clamp_(min=1)
        state, settings = self.state[self.vector], {key: self.param_groups[0][key] for key in ("lr", "eps", "fused")}
        settings |= {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
        adam([self.vector], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], **settings)


class Sampler:
    """Steps this process's environments by the policy; each one's observation and return last till reset().

    So does `memory`: tensors (N, ...) that sample() returns after its action and takes again in the next step, -1 where
    an episode begins. A policy without memory returns none.
    """

    def __init__(self, envs: gym.vector.VectorEnv, args: Args):
        self.envs, self.args = envs, args

    def reset(self, step: int):
        """New episodes everywhere, each environment with a seed made from the run's seed and the step."""
        first = step // self.args.num_steps + RANK * self.envs.num_envs  # one number per environment and rollout
        seeds = [(self.args.seed * 100_003 + first + i) % 2**30 for i in range(self.envs.num_envs)]
        random.seed(seeds[0])  # some environments draw from the global generators
        np.random.seed(seeds[0])
        self.obs = np.array(self.envs.reset(seed=seeds)[0], np.float32)
        if not np.isfinite(self.obs).all():
            raise FloatingPointError(f"an observation or reward of {self.envs.unwrapped.spec.id} is not finite")
        self.discounted, self.returns, self.lengths = np.zeros((3, self.envs.num_envs))
        self.memory = []

    @torch.no_grad()
    def rollout(self, agent: Agent) -> tuple[Rollout, list[tuple[float, int]]]:
        """T steps of all N environments, and return and length of each episode of this process that ended in them."""
        args, columns, episodes = self.args, [], []
        noise = normal(args.num_steps, self.envs.num_envs, agent.actor.noise_dim, dim=1).to(args.device)
        for t in range(args.num_steps):
            obs = torch.from_numpy(self.obs).to(args.device)
            clipped, action, *self.memory = agent.actor.sample(obs, noise[t], *self.memory)
            clipped, action = clipped.cpu().numpy(), action.cpu().numpy()
            if not np.isfinite(action).all():
                raise FloatingPointError("the policy's action is not finite, the training has diverged")
            obs, reward, terminated, truncated, info = self.envs.step(clipped)
            obs, reward, done = np.array(obs, np.float32), np.reshape(reward, len(obs)), terminated | truncated
            next_obs, ended = obs.copy() if done.any() else obs, np.flatnonzero(done)
            self.discounted, self.returns = self.discounted * args.gamma + reward, self.returns + reward
            self.lengths += 1
            columns.append((self.obs, action, reward, terminated, done, next_obs, self.discounted.copy()))
            for i in ended:
                next_obs[i] = info["final_obs"][i]
                episodes.append((self.returns[i], self.lengths[i]))
                self.discounted[i] = self.returns[i] = self.lengths[i] = 0
            for memory in self.memory:
                memory[ended] = -1
            if not all(np.isfinite(x).all() for x in (obs, next_obs, reward)):  # the moments would never recover
                raise FloatingPointError(f"an observation or reward of {self.envs.unwrapped.spec.id} is not finite")
            self.obs = obs
        columns = (np.stack(column).astype(np.float32) for column in zip(*columns, strict=True))
        return Rollout(*(gather(torch.from_numpy(column).to(args.device)) for column in columns)), episodes


class Bare(gym.Wrapper):
    """One environment of several. Drops info, which takes time to collect; an answer may have any shape that fits."""

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:  # the global generators, with --async-envs of a process of its own
            random.seed(seed)
            np.random.seed(seed)
        return np.array(self.env.reset(seed=seed)[0]).reshape(self.observation_space.shape), {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        obs = np.array(obs).reshape(self.observation_space.shape)  # a copy: some environments change theirs in place
        return obs, np.asarray(reward, float).item(), bool(terminated), bool(truncated), {}


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """This process's share of the environments, actions in [-1, 1]^A; one that ends starts anew in the same step."""
    spec = Env(args).spec
    spec.additional_wrappers, spec.disable_env_checker = gym.spec(spec.id).additional_wrappers, True  # as registered
    count, mode = args.num_envs // WORLD, gym.vector.AutoresetMode.SAME_STEP
    vectorised = spec.vector_entry_point and not spec.additional_wrappers and not args.async_envs
    envs = gym.make_vec(spec, count) if vectorised else None
    if envs is None or envs.metadata.get("autoreset_mode") != mode:
        kind = "async" if args.async_envs else "sync"
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the processes of --async-envs: it is not theirs
        envs = gym.make_vec(spec, count, kind, wrappers=[Bare], vector_kwargs={"autoreset_mode": mode})
        signal.signal(signal.SIGINT, interrupt)

    @OPEN.push
    def close(_, error, __):  # if the process of an environment has died, envs.close() would wait for it
        if args.async_envs and isinstance(error, (EOFError, ConnectionError)):
            for process in envs.unwrapped.processes:
                process.kill()
            envs.unwrapped.closed = True
            raise OSError("a process of --async-envs has ended") from error
        envs.close()

    low, high, one = envs.action_space.low, envs.action_space.high, envs.action_space.dtype.type(1)
    envs = gym.wrappers.vector.TransformAction(envs, lambda actions: actions.clip(low, high))  # rounding
    return gym.wrappers.vector.RescaleAction(envs, -one, one)


class Env(gym.Wrapper):
    """`id?key=value&key=value` with float32 observations and actions in [-1, 1]^A. Each episode has its own seed."""

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
            self.reset(0)
            self.step(self.action_space.low)  # an argument of a wrong kind may show only now
            self.reset(0)

    def reset(self, episode: int = 0):
        """The episode with this number."""
        self.rewards, self.success_once = [], math.nan
        seed = self.half + (self.first_seed + episode) % 2**30
        random.seed(seed)  # some environments draw from the global generators
        np.random.seed(seed)
        return self.check(*self.env.reset(seed=seed))

    def step(self, action: np.ndarray):
        if not np.isfinite(action).all():
            raise FloatingPointError("the policy's action is not finite, the training has diverged")
        obs, reward, terminated, truncated, info = self.env.step(action)
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


def evaluate(agent: Agent, env: Env, args: Args, step: int, policy: str, watch=lambda: None) -> dict:
    """A row of eval.csv: raw returns of episodes with seeds of their own; training's random states stay as they are."""
    results, states = [], (random.getstate(), np.random.get_state())
    with torch.random.fork_rng([args.device] if args.device != "cpu" else []):
        torch.manual_seed(args.seed)
        for episode in range(args.eval_episodes):
            (obs, _), done, agent.memory = env.reset(episode), False, []  # as that of Sampler
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
        self.size = args.num_envs * args.num_steps  # steps of a rollout
        if args.checkpoint_every is None:  # ten times in the run, but ten whole episodes of each environment apart
            episodes = 10 * args.num_envs * self.eval_env.spec.max_episode_steps
            args.checkpoint_every = math.ceil(min(args.total_timesteps / 10, max(100_000, episodes)))
        self.parts = {"agent": agent} | parts | {f"optimizer_{i}": x for i, x in enumerate(agent.optimizers)}
        self.info = describe(args) | {"wall_time": 0.0, "resumed": []}
        gpu = [] if args.device == "cpu" else [torch.cuda.default_generators[agent.actor.log_std.get_device()]]
        self.folder, self.rngs = Path(args.run_dir), [torch.default_generator, *gpu]
        if saved:
            with exit_on_error(f"--resume {self.folder}", "checkpoint.pt is damaged or of another run"):
                for name, part in self.parts.items():
                    part.load_state_dict(saved.pop(name))
                for rng, state in zip(self.rngs, saved["rng"], strict=True):
                    rng.set_state(state)
                self.step = saved["global_step"]
                now, self.info = {"global_step": self.step} | self.info, {key: saved[key] for key in self.info}
                self.info["resumed"].append(now)  # of its evaluations a longer run keeps those that it has as well:
                self.eval_rows = [r for r in saved["eval_rows"] if r["policy"] in self.policies(r["global_step"])]
        self.first = self.step, time.perf_counter()  # of this process, for steps per second
        self.started = self.first[1] - self.info["wall_time"]
        if RANK > 0:  # of several processes only the first logs, evaluates and saves
            self.log = self.evaluate = self.save = lambda *_: None
            return
        what = f"--{'resume' if saved else 'run-dir'} {self.folder}"
        with exit_on_error(what, "no other process may use it, and a new run wants an empty folder"):
            str(self.folder).encode()
            if not saved and (self.folder / "checkpoint.pt").exists():
                raise ValueError("holds a run; go on with it by --resume")
            self.folder.mkdir(parents=True, exist_ok=True)
            OPEN.callback(os.close, folder := os.open(self.folder, os.O_RDONLY))
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while another process is at work there
        self.save()
        # what fails in TensorBoard's own thread is raised again by the next add_scalar()
        threading.excepthook = lambda x: None if issubclass(x.exc_type, OSError) else threading.__excepthook__(x)
        self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
        OPEN.callback(self.writer.close)
        print(f"{SCRIPT}.py: a checkpoint every {args.checkpoint_every} steps ends episodes; {self.folder}", flush=True)

    def steps(self):
        """The ends of the rollouts that are left. Ctrl-C and SIGTERM end them after a whole one."""
        self.bar = tqdm(initial=self.step, total=self.args.total_timesteps, disable=RANK > 0 or None, unit="step")
        while self.step < self.args.total_timesteps:
            self.step += self.size
            yield self.step
            self.bar.update(self.size)
            if average(torch.tensor(float(len(SIGNALS)), device=self.args.device)) > 0:  # in one of the processes
                self.bar.close()
                number, saved = signal.Signals([*SIGNALS, signal.SIGTERM][0]), self.info.get("global_step")
                if RANK == 0:
                    print(f"{SCRIPT}.py: {number.name}, step {saved} is saved; --resume {self.folder}", file=sys.stderr)
                raise SystemExit(128 + number)
        self.bar.close()

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

    def policies(self, step: int) -> tuple[str, ...]:
        """The policies that are evaluated after this step: at the last three evaluations the stochastic one as well."""
        ends = range(self.size, self.args.total_timesteps + self.size, self.size)  # of all rollouts
        evaluated = [end for end in ends if self.due(end, self.args.eval_every)]
        return (Actor.policies + ("stochastic",) * (step in evaluated[-3:])) * (step in evaluated)

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
        if self.owed:  # resume makes it again, from the last checkpoint, which therefore stands
            return
        wall_time = time.perf_counter() - self.started
        self.info |= {"args": dataclasses.asdict(self.args), "global_step": self.step}
        self.info |= {"wall_time": wall_time, "steps_per_second": self.step / wall_time}
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if not all(x.isfinite().all() for x in state["agent"].values()):
            raise FloatingPointError("a weight is not finite, the training has diverged")
        state |= {"eval_rows": self.eval_rows, "rng": [rng.get_state() for rng in self.rngs]}
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
        "processes": WORLD,
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
LIMITS = {"seed": (0, 2**31 - 1), "gamma": (0, 1), "gae_lambda": (0, 1), "ent_coef": (0, 1e12)}  # others: positive
LIMITS |= {"num_threads": (1, 4 * (os.cpu_count() or 1)), "high_ent_coef": (0, 1e12)}
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
            done = min(int(saved["global_step"]), saved["args"]["total_timesteps"])  # its last rollout may pass the end
            limits = LIMITS | {"total_timesteps": (done, 1e12)}
            args = tyro.cli(Args, args=argv, default=Args(**saved["args"]))  # flags that are not given are the run's
    if args.num_threads is None:
        threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        args.num_threads = int(threads) if threads.isdecimal() else 1
    limits = limits | {"high_epochs": (0, args.update_epochs - 1)}
    rows, k = args.num_envs * args.num_steps, getattr(args, "num_experts", getattr(args, "num_options", 1))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    need = {"num_envs": args.num_envs * (3e7 if args.async_envs else 1e4)}  # at least: a process, or objects
    need |= {"num_steps": 8192 * rows}  # hidden units
    need |= dict.fromkeys(("num_experts", "num_options"), 4 * rows * k * (k + 32))  # distances, densities
    for name, value in vars(args).items():
        with exit_on_error(f"--{name.replace('_', '-')} {value}", "see --help"):
            new = not saved or value != saved["args"][name]  # a limit may be another now, or on another machine
            if saved and new and name not in free:
                raise ValueError(f"cannot change, the run has {saved['args'][name]}")
            low, high = limits.get(name, (1 if type(value) is int else 1e-12, 1e12))
            if new and type(value) in (int, float) and not low <= value <= high:
                raise ValueError(f"must lie between {low:g} and {high:g}")
            if args.evaluate is None and need.get(name, 0) > memory:
                raise ValueError(f"would take {need[name] / 1e9:.0f} GB, the machine has {memory / 1e9:.0f} GB")
            if name == "num_envs" and value % WORLD:
                raise ValueError(f"must be a multiple of the {WORLD} processes of torchrun")
            if name == "num_minibatches" and (rows % (value * WORLD) or rows < 2 * value):
                raise ValueError(f"needs {value * WORLD} equal parts of {rows} steps, each of 2 or more; change it")
            if name == "video" and value and args.evaluate is None:
                raise ValueError("goes with --evaluate")
    with exit_on_error(f"--device {args.device}", "--device cpu always works"):
        if args.device != "cpu" and not args.device.startswith("cuda"):
            raise ValueError("must be cpu, cuda or cuda:N")
        if WORLD > 1 and args.device not in ("cpu", "cuda"):
            raise ValueError(f"each of the {WORLD} processes takes a GPU of its own by --device cuda")
        if WORLD > 1 and args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=args.device).item()
    if WORLD > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(timeout=timedelta(days=1))  # the others wait for an evaluation
    sys.path += [os.getcwd()]  # for --env-id module:Id
    torch.set_num_threads(args.num_threads)
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
                if len(env.rewards) % stride == 0 and len(frames) < 500:  # everything would take gigabytes
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
    now = time.strftime("%Y%m%d-%H%M%S") if RANK == 0 else "TIME"  # the others do not know when the first began
    name = f"{args.env_id.split(':')[-1]}__{SCRIPT}__s{args.seed}__{now}"
    default = "runs/" + name.translate(str.maketrans("?&=/", "----"))
    folder = args.evaluate or args.resume or args.run_dir or default
    remedy = f"--resume {folder} goes on" if args.evaluate is None else "make room, or copy the policy elsewhere"
    peers = exit_on_error("a process has failed", remedy, 1, (RuntimeError,) * (WORLD > 1))
    diverged = exit_on_error("stopped", "it would again, start anew with a smaller step size", 1, FloatingPointError)
    with exit_on_error("stopped", remedy, 1, OSError), diverged, peers, OPEN:
        if args.evaluate is not None:
            evaluate_run(args, saved)
        else:
            train(dataclasses.replace(args, run_dir=folder, resume=None), saved)
            if RANK == 0:
                print(f"{SCRIPT}.py: finished; run folder {folder}")
            if WORLD > 1:  # not where a process has failed: it may wait for the others, who wait for that one
                torch.distributed.destroy_process_group()
    return Path(folder)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may have letters that the terminal lacks
    main()

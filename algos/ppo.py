"""Proximal policy optimisation (PPO): the base of the on-policy mixture scripts.

Paper   Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv 1707.06347.
Policy  a ~ N(mu(s), sigma^2), sigma the same in every state; the environment gets a clipped to [-1, 1]^A.

Run       python algos/ppo.py                                 # target-reaching
          python algos/ppo.py --env-id HalfCheetah-v5 --total-timesteps 1000000
          torchrun --nproc_per_node=2 algos/ppo.py            # the environments split over two processes
Resume    python algos/ppo.py --resume runs/NAME              # after Ctrl-C, kill -9 or a crash: the same bits
Evaluate  python algos/ppo.py --evaluate runs/NAME --video    # deterministic and stochastic return, a GIF

What differs from sac.py, besides the algorithm:
1. At a checkpoint the running episodes are cut off (bootstrapped, as at every end of a rollout) and all environments
   are seeded anew from --seed and the step, so a checkpoint needs no simulator state. --checkpoint-every is thereby
   part of what determines a run, and an interrupted run goes on from its last checkpoint, not from where it stopped.
2. A run ends with a whole rollout. One that is made longer is not the same as one that was longer from the start: its
   learning rate rises again, and its old end cut off the episodes.
3. Observations are normalised by moments that belong to the actor, and so to the checkpoint. They take in a rollout
   after it has been learned from: it is acted, valued and learned with the same moments, and the ratio starts at 1 (the
   first rollout sees raw observations). Rewards are divided by the standard deviation of their discounted sums, which
   takes the rollout in before. Both are clipped to +-10.
4. The default task keeps the environment's own speed bonus of 0.1, where sac.py has 0.3.
Where this differs from the paper: what is usual since (normalised observations, advantages and rewards, orthogonal
initialisation, annealed learning rate, clipped gradient). The value loss is the paper's, which Baselines clips.
Letters in the shape comments: T steps, N environments, B batch, O observation size, A action dimensions.
"""

# === shared: ppo imports ===
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
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# === end shared ===


@dataclasses.dataclass
class Args:
    # === shared: ppo run arguments ===
    env_id: str = "moe_envs:TargetReaching-v0?layout=fixed&obstacle_penalty=-10"  # Gymnasium id, arguments after "?"
    seed: int = 1  # seed of everything random
    total_timesteps: int | None = None  # environment steps (default: 200,000; with --resume those of that run)
    run_dir: str | None = None  # folder of this run (default: runs/<env>__<script>__s<seed>__<time>)
    resume: str | None = None  # folder of a run to continue from its last checkpoint
    evaluate: str | None = None  # folder of a run to evaluate instead of training
    video: bool = False  # with --evaluate: also write video.gif into the run folder
    eval_every: int = 20_000  # steps between evaluations, each at the end of a rollout
    eval_episodes: int = 10  # episodes per evaluation; --evaluate does not take them from the run
    checkpoint_every: int | None = None  # steps between checkpoints, which end all episodes (default: 100,000 or more)
    device: str = "cpu"  # cpu, cuda or cuda:N
    num_threads: int = 1  # CPU threads of PyTorch
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # torch.set_float32_matmul_precision
    # === end shared ===
    # === shared: ppo arguments ===
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
    # === end shared ===


# === shared: environment ===
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
        fail(f"--env-id {env_id}: {(str(error).strip() or type(error).__name__).splitlines()[0]}; {hint}")
    for role, space in (("action", env.action_space), ("observation", env.observation_space)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            fail(f"--env-id {env_id}: needs a flat Box {role} space such as Pendulum-v1's, this one has {space}")
    if (env.spec.max_episode_steps or -1) < 0:
        fail(f"--env-id {env_id}: has no time limit, an evaluation may never end; give {name}?max_episode_steps=1000")
    if not np.issubdtype(env.action_space.dtype, np.floating):
        fail(f"--env-id {env_id}: needs real-valued actions such as Pendulum-v1's, this one has {env.action_space}")
    if not np.isfinite([env.action_space.low, env.action_space.high]).all():
        fail(f"--env-id {env_id}: action bounds must be finite to be rescaled to [-1, 1], they are {env.action_space}")
    one = env.action_space.dtype.type(1)
    return gym.wrappers.RescaleAction(gym.wrappers.RecordEpisodeStatistics(env), -one, one)


def episode_seed(seed: int, episode: int, evaluation: bool = False) -> int:
    """Seed of one episode, below 2^32; training seeds lie in the lower half, evaluation seeds in the upper."""
    return (2**31 if evaluation else 0) + (seed * 100_003 + episode) % 2**31


# === end shared ===
# === shared: data parallel ===
RANK, WORLD = 0, 1  # number of this process, and how many there are
if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():  # started by torchrun
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


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


# === end shared ===
# === shared: rollout ===
class Rollout(NamedTuple):
    obs: torch.Tensor  # (T, N, O)
    action: torch.Tensor  # (T, N, A), before clipping
    reward: torch.Tensor  # (T, N)
    terminated: torch.Tensor  # (T, N)
    done: torch.Tensor  # (T, N), terminated or truncated
    next_obs: torch.Tensor  # (T, N, O), in a step that ends an episode its last observation
    discounted: torch.Tensor  # (T, N), sum of the episode's rewards so far, each discounted by its age: scales rewards


class Bare(gym.Wrapper):
    """Copies observations, which some environments change in place, and drops info, which takes time to collect."""

    def reset(self, **arguments):
        return np.array(self.env.reset(**arguments)[0]), {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return np.array(obs), reward, terminated, truncated, {}


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """This process's share of the environments, actions in [-1, 1]^A; one that ends starts anew in the same step."""
    spec = make_env(args.env_id).spec
    wrappers = gym.spec(spec.id).additional_wrappers  # those that it is registered with
    spec = dataclasses.replace(spec, additional_wrappers=wrappers, disable_env_checker=True)
    count, mode = args.num_envs // WORLD, gym.vector.AutoresetMode.SAME_STEP
    own_form = spec.vector_entry_point and not wrappers and not args.async_envs
    envs = gym.make_vec(spec, count) if own_form else None
    if envs is None or envs.metadata.get("autoreset_mode") != mode:
        kind = "async" if args.async_envs else "sync"
        envs = gym.make_vec(spec, count, kind, wrappers=[Bare], vector_kwargs={"autoreset_mode": mode})
    one = envs.action_space.dtype.type(1)
    return gym.wrappers.vector.RescaleAction(envs, -one, one)


def require_finite(what: str, *arrays: np.ndarray):
    """Raises FloatingPointError if a number is not finite. The moments would never recover from one."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise FloatingPointError(f"{what} is not finite")


class Sampler:
    """Steps this process's environments by the policy; each one's observation and return last till reset()."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args):
        self.envs, self.args = envs, args

    def reset(self, global_step: int):
        """New episodes everywhere, each environment with a seed made from the run's seed and the step."""
        first = global_step // self.args.num_steps + RANK * self.envs.num_envs  # one number per environment and rollout
        seeds = [episode_seed(self.args.seed, first + i) for i in range(self.envs.num_envs)]
        self.obs = np.array(self.envs.reset(seed=seeds)[0], np.float32)
        self.discounted, self.returns, self.lengths = np.zeros((3, self.envs.num_envs))

    @torch.no_grad()
    def rollout(self, agent: "Agent") -> tuple[Rollout, list[tuple[float, int]]]:
        """T steps of all N environments, and return and length of each episode of this process that ended in them."""
        args, n = self.args, self.envs.num_envs
        # Every process draws the noise of all and takes its share, so the split changes nothing.
        noise = torch.randn(args.num_steps, args.num_envs, agent.actor.noise_dim)[:, RANK * n : (RANK + 1) * n]
        noise, columns, episodes = noise.to(args.device), [], []
        for t in range(args.num_steps):
            clipped, action = agent.actor.sample(torch.from_numpy(self.obs).to(args.device), noise[t])
            clipped, action = clipped.cpu().numpy(), action.cpu().numpy()
            require_finite("an observation of the environment", self.obs)
            require_finite("the training has diverged, the policy's action", action)
            obs, reward, terminated, truncated, info = self.envs.step(clipped)
            obs, done = np.array(obs, np.float32), terminated | truncated
            next_obs, ended = obs.copy() if done.any() else obs, np.flatnonzero(done)
            self.discounted, self.returns = self.discounted * args.gamma + reward, self.returns + reward
            self.lengths += 1
            columns.append((self.obs, action, reward, terminated, done, next_obs, self.discounted.copy()))
            for i in ended:
                next_obs[i] = info["final_obs"][i]
                episodes.append((self.returns[i], self.lengths[i]))
                self.discounted[i] = self.returns[i] = self.lengths[i] = 0
            require_finite("a reward or observation of the environment", reward, next_obs)
            self.obs = obs
        columns = (np.stack(column).astype(np.float32) for column in zip(*columns, strict=True))
        return Rollout(*(gather(torch.from_numpy(column).to(args.device)) for column in columns)), episodes


# === end shared ===
# === shared: moments ===
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


# === end shared ===
# === shared: trunks ===
def orthogonal(gain: float, *shape: int) -> nn.Parameter:
    """Weights (..., inputs, outputs), each matrix orthogonal times `gain`."""
    weights = torch.empty(shape)
    for matrix in weights.view(-1, *shape[-2:]):
        nn.init.orthogonal_(matrix, gain)
    return nn.Parameter(weights)


class Trunks(nn.Module):
    """MLPs O-64-64 with tanh of actor and critic, as one batched network: every weight has a leading 2."""

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


# === end shared ===
# === shared: adam ===
class Adam(torch.optim.Adam):
    """Adam of all weights of a module, which become views of one vector: one operation averages, clips or steps all.

    It calls the function behind torch's step(), whose bookkeeping takes longer than the arithmetic.
    """

    def __init__(self, module: nn.Module, args: Args):
        self.weights, self.max_norm = list(module.parameters()), args.max_grad_norm
        self.vector = torch.cat([w.detach().flatten() for w in self.weights])
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
        moments = [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]]
        adam([self.vector], [gradient], *moments, **settings)


# === end shared ===
class ActorCritic(nn.Module):
    """Policy N(mu(s), sigma^2) and value V(s), each an MLP O-64-64 with tanh; log sigma is a parameter."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.noise_dim = action_dim
        self.normalize = Moments(obs_dim)
        self.trunks = Trunks(obs_dim)
        self.mean, self.value = Head(64, action_dim, gain=0.01), Head(64, 1, gain=1.0)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised obs (B, O) -> mean (B, A), value (B,)."""
        actor, critic = self.trunks(obs)  # (B, H) each
        return self.mean(actor), self.value(critic).squeeze(1)

    def log_prob(self, mean: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """mean (B, A), unclipped action (B, A) -> log N(action; mean, sigma^2) (B,)."""
        noise = (action - mean) * (-self.log_std).exp()
        return -0.5 * noise.square().sum(1) - (self.log_std + 0.5 * math.log(2 * math.pi)).sum()

    def entropy(self) -> torch.Tensor:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()

    def sample(self, obs: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw obs (B, O), standard normal noise (B, A) -> action (B, A) for the environment, unclipped action."""
        mean, _ = self(self.normalize(obs))
        action = mean + self.log_std.exp() * (torch.randn_like(mean) if noise is None else noise)
        return action.clamp(-1, 1), action

    def mode(self, obs: torch.Tensor) -> torch.Tensor:
        """Raw obs (B, O) -> deterministic action (B, A): the mean."""
        return self(self.normalize(obs))[0].clamp(-1, 1)

    @torch.no_grad()
    def diagnostics(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same in every state."""
        return {"policy/std": self.log_std.exp().mean(), "policy/entropy": self.entropy()}


class Agent(nn.Module):
    """Everything that learns: actor and critic, the scale of the rewards, and Adam."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = ActorCritic(obs_dim, action_dim, args)
        self.return_moments = Moments()
        self.to(args.device)
        self.optimizers = [Adam(self.actor, args)]


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
# === shared: ppo learning ===
class Batch(NamedTuple):
    obs: torch.Tensor  # (B, O), normalised
    action: torch.Tensor  # (B, A), before clipping
    log_prob: torch.Tensor  # (B,), of the policy that acted
    advantage: torch.Tensor  # (B,)
    target: torch.Tensor  # (B,), of the critic


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
    """Epochs of updates on shuffled minibatches; returns the means of what update() returns, and the KL divergence."""
    metrics = []
    for _ in range(args.update_epochs):
        rows = torch.randperm(len(batch.obs)).view(args.num_minibatches, -1).to(args.device)
        epoch = Batch(*(x[rows] for x in batch))  # (minibatches, their size, ...)
        std, mean = torch.std_mean(epoch.advantage, 1, keepdim=True)
        epoch = epoch._replace(advantage=(epoch.advantage - mean) / (std + 1e-8))
        epoch = (x.chunk(WORLD, 1)[RANK] for x in epoch)  # this process's part of each minibatch
        metrics += [update(agent, Batch(*minibatch), args) for minibatch in zip(*epoch, strict=True)]
        log_ratio = torch.stack([m.pop("log_ratio") for m in metrics[-args.num_minibatches :]])
        kl = average((log_ratio.exp() - 1 - log_ratio).mean())  # KL(pi_old || pi) in this pass
        if args.target_kl is not None and kl > args.target_kl:
            break
    clipped = average((log_ratio.exp() - 1).abs().gt(args.clip_coef).float().mean())
    means = {key: torch.stack([m[key] for m in metrics]).mean(0) for key in metrics[0]}
    return means | {"policy/kl": kl, "policy/clipped": clipped}


# === end shared ===
def update(agent: Agent, batch: Batch, args: Args) -> dict[str, torch.Tensor]:
    """One gradient step on a minibatch; no host synchronisation. Returns detached scalars, and log r (B,)."""
    mean, value = agent.actor(batch.obs)  # (B, A), (B,)
    log_prob = agent.actor.log_prob(mean, batch.action)  # (B,)

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
        loss -= args.ent_coef * agent.actor.entropy()
    agent.optimizers[0].descend(loss)
    return {
        "losses/critic": critic_loss.detach(),
        "losses/actor": -torch.min(gain, bound).mean(),
        "log_ratio": log_ratio,
    }


# === shared: ppo checks ===
LIMITS = {"seed": (0, 2**31 - 1), "gamma": (0, 1), "gae_lambda": (0, 1), "ent_coef": (0, math.inf)}  # others: positive


def check_sizes(args: Args):
    """Exits if the GPUs, the environments or the rollout cannot be divided as told."""
    if WORLD > 1 and args.device not in ("cpu", "cuda"):
        fail(f"--device {args.device}: {WORLD} processes need a GPU each; give cuda")
    if args.num_envs % WORLD:
        fail(f"--num-envs {args.num_envs}: must be a multiple of the {WORLD} processes")
    steps, parts = args.num_envs * args.num_steps, args.num_minibatches * WORLD
    if steps % parts or steps // args.num_minibatches < 2:
        need = f"{parts} equal parts of a rollout of {steps} steps, at least 2 each"
        fail(f"--num-minibatches {args.num_minibatches}: needs {need}; change it, --num-envs or --num-steps")


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
# === shared: evaluation ===
EVAL_COLUMNS = ("global_step", "policy", "episodes", "return", "return_std", "length", "success")


def act(policy, obs: np.ndarray, device: str) -> np.ndarray:
    """One action (A,) of `policy`, a function of a batch of observations, for one observation (O,)."""
    with torch.no_grad():
        return policy(torch.from_numpy(obs).to(device)[None])[0].cpu().numpy()


def evaluate(agent: Agent, env: gym.Env, args: Args, policy: str, global_step: int, frames: list | None = None) -> dict:
    """A row of eval.csv: raw returns over `args.eval_episodes` episodes; `policy` is deterministic or stochastic.

    Own environment and seeds, and the random state is put back afterwards: training is the same with and without it.
    """
    function = agent.actor.mode if policy == "deterministic" else lambda obs: agent.actor.sample(obs)[0]
    results = []
    with torch.random.fork_rng([args.device] if args.device.startswith("cuda") else []):
        torch.manual_seed(args.seed)
        for episode in range(args.eval_episodes):
            (obs, _), done = env.reset(seed=episode_seed(args.seed, episode, evaluation=True)), False
            while not done:
                obs, _, terminated, truncated, info = env.step(act(function, np.float32(obs), args.device))
                done = terminated or truncated
                if frames is not None:
                    frames.append(env.render())
            results.append((info["episode"]["r"], info["episode"]["l"], info.get("success", math.nan)))
    (mean, length, success), std = np.mean(results, axis=0), np.std(results, axis=0)[0]
    row = (global_step, policy, args.eval_episodes, *(round(float(v), 4) for v in (mean, std, length, success)))
    return dict(zip(EVAL_COLUMNS, row, strict=True))


def evaluate_run(args: Args) -> Path:
    """Evaluates the run in folder `args.evaluate`, prints the result and writes it there as evaluation.json."""
    for name, value in given(args).items():
        if name not in ("evaluate", "eval_episodes", "video", "device"):
            fail(f"{flag(name)} {value}: --evaluate takes it from the run; leave it out")
    saved, model = load_run("--evaluate", args.evaluate, "model.pt")
    run = dataclasses.replace(saved, eval_episodes=args.eval_episodes, device=args.device)
    configure(run)
    env = make_env(run.env_id)
    agent = Agent(env.observation_space.shape[0], env.action_space.shape[0], run)
    agent.load_state_dict(model["agent"])
    step = model["global_step"]
    result = {policy: evaluate(agent, env, run, policy, step) for policy in ("deterministic", "stochastic")}
    result = {policy: {k: None if v != v else v for k, v in row.items()} for policy, row in result.items()}  # no NaN
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

            env = make_env(run.env_id, render_mode="rgb_array")
            evaluate(agent, env, dataclasses.replace(run, eval_episodes=1), "deterministic", step, frames)
            imageio.mimsave(path, frames, duration=1000 / env.metadata.get("render_fps", 30), loop=0)
        except Exception as error:  # no display, no OpenGL, a missing package: every renderer has its own errors
            fail(f"--video: cannot draw {run.env_id} here ({error}); without a display, MuJoCo wants MUJOCO_GL=egl")
        print(f"the first deterministic episode: {path}")
    return Path(args.evaluate)


# === end shared ===
# === shared: ppo main ===
def main(args: Args) -> Path | None:
    """Trains (or resumes, or evaluates) one agent and returns the folder of its run (None beside the first process)."""
    check(args)
    if args.evaluate is not None:
        return evaluate_run(args)
    run_dir, checkpoint = args.resume, None
    if args.resume is not None:
        args, checkpoint = resume_run(args)
    elif args.total_timesteps is None:
        args = dataclasses.replace(args, total_timesteps=200_000)
    check_sizes(args)
    if WORLD > 1:
        backend = "nccl" if args.device.startswith("cuda") else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1))  # the others wait for an evaluation
    configure(args)
    eval_env = make_env(args.env_id)
    if args.checkpoint_every is None:  # ten whole episodes of each environment at least lie between two
        every = max(100_000, 10 * args.num_envs * eval_env.spec.max_episode_steps)
        args = dataclasses.replace(args, checkpoint_every=every)
    if RANK == 0:
        run_dir = Path(run_dir) if checkpoint else new_run_dir(args)
    name_of_run = run_dir or "RUN_DIR"  # only the first process knows it

    torch.manual_seed(args.seed)
    agent = Agent(eval_env.observation_space.shape[0], eval_env.action_space.shape[0], args)
    global_step, eval_rows, earlier_time = 0, [], 0.0
    rollout_steps = args.num_envs * args.num_steps

    def due(every: int, step: int) -> bool:
        """Whether the rollout that ended at `step` went over a multiple of `every`."""
        return step // every > (step - rollout_steps) // every

    if checkpoint:
        global_step, eval_rows, earlier_time = (checkpoint[k] for k in ("global_step", "eval_rows", "wall_time"))
        agent.load_state_dict(checkpoint["agent"])
        for optimizer, state in zip(agent.optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        torch.set_rng_state(checkpoint["rng"])
        if args.device.startswith("cuda"):
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], args.device)
        if global_step < args.total_timesteps:  # made longer: what was its end is not one any more
            eval_rows = [
                r for r in eval_rows if r["policy"] == "deterministic" and due(args.eval_every, r["global_step"])
            ]
    start_step = saved_step = global_step

    writer = SummaryWriter(run_dir, purge_step=start_step + 1) if RANK == 0 else None
    quiet = RANK > 0 or not sys.stderr.isatty()
    progress = tqdm(initial=start_step, total=args.total_timesteps, disable=quiet, unit="step")
    started, signals = time.perf_counter(), []
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the processes of --async-envs: Ctrl-C is not theirs
    try:
        envs = make_envs(args)
    finally:
        signal.signal(signal.SIGINT, interrupt)
    handlers = {s: signal.signal(s, lambda number, _: signals.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}

    def save():
        wall_time = earlier_time + time.perf_counter() - started
        model = {"script": SCRIPT, "args": dataclasses.asdict(args), "global_step": global_step}
        model["agent"] = agent.state_dict()
        state = {"optimizers": [optimizer.state_dict() for optimizer in agent.optimizers]}
        state |= {"eval_rows": eval_rows, "wall_time": wall_time, "rng": torch.get_rng_state()}
        if args.device.startswith("cuda"):
            state["cuda_rng"] = torch.cuda.get_rng_state(args.device)
        write(run_dir / "checkpoint.pt", model | state)
        write(run_dir / "model.pt", model)
        write_eval(run_dir, eval_rows)
        run = json.loads((run_dir / "run.json").read_text()) | {"args": model["args"], "global_step": global_step}
        run |= {"wall_time": wall_time, "steps_per_second": global_step / wall_time}
        write(run_dir / "run.json", json.dumps(run, indent=1).encode())

    def stop(reason: str, code: int):
        progress.close()
        if RANK == 0 or code == 1:  # a signal stops all processes
            print(f"{SCRIPT}.py: step {global_step}: {reason}", file=sys.stderr)
        raise SystemExit(code)

    def report(metrics: dict[str, torch.Tensor], episodes: list[tuple[float, int]], last: bool):
        """Logs a rollout and evaluates where that is due."""
        speed = (global_step - start_step) / (time.perf_counter() - started)
        scalars = {"charts/SPS": speed, "charts/learning_rate": agent.optimizers[0].param_groups[0]["lr"]}
        # not finite if the last update broke a weight
        scalars["charts/weight_norm"] = nn.utils.get_total_norm(agent.parameters()).item()
        if episodes:
            scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(episodes, axis=0).tolist()
            progress.set_postfix_str(f"return {scalars['charts/episodic_return']:.1f}", refresh=False)
        for key, value in metrics.items():  # a number, or one per expert
            names = [f"{key}_{k}" for k in range(len(value))] if value.ndim else [key]
            scalars |= dict(zip(names, value.flatten().tolist(), strict=True))
        for key, value in scalars.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the training has diverged, {key} is {value}")
            writer.add_scalar(key, value, global_step)
        if last or due(args.eval_every, global_step):
            for policy in ("deterministic", "stochastic") if last else ("deterministic",):
                row = evaluate(agent, eval_env, args, policy, global_step)
                eval_rows.append(row)
                known = {k: row[k] for k in ("return", "success") if math.isfinite(row[k])}  # few know success
                for key, value in known.items():
                    tag = f"eval/{key}" if policy == "deterministic" else f"eval/{key}_stochastic"
                    writer.add_scalar(tag, value, global_step)
                text = ", ".join(f"{key} {value:.2f}" for key, value in known.items())
                progress.write(f"step {global_step}/{args.total_timesteps}: {policy} {text}, {speed:.0f} steps/s")
            sys.stdout.flush()  # it may be a file
            write_eval(run_dir, eval_rows)

    try:
        sampler = Sampler(envs, args)
        sampler.reset(global_step)
        if RANK == 0:
            if checkpoint:
                note_resume(run_dir, args, global_step)
            save()  # from now on the run can be resumed
        while global_step < args.total_timesteps:
            if args.anneal_lr:
                fraction = 1 - global_step / args.total_timesteps
                for optimizer in agent.optimizers:
                    optimizer.param_groups[0]["lr"] = fraction * args.learning_rate
            rollout, episodes = sampler.rollout(agent)
            batch = prepare(agent, rollout, args)
            metrics = learn(agent, batch, args)
            global_step += rollout_steps
            progress.update(rollout_steps)

            last = global_step >= args.total_timesteps
            if RANK == 0:
                report(metrics | agent.actor.diagnostics(batch.obs), episodes, last)
            if last or due(args.checkpoint_every, global_step):
                saved_step = global_step
                if RANK == 0:
                    save()
                sampler.reset(global_step)
            if average(torch.tensor(float(len(signals)), device=args.device)) > 0 and not last:  # of all processes
                number = signal.Signals(signals[0] if signals else signal.SIGTERM)
                stop(
                    f"{number.name}; --resume {name_of_run} goes on from its checkpoint of step {saved_step}",
                    128 + number,
                )
    except FloatingPointError as error:
        stop(f"{error}; {name_of_run} keeps its checkpoint, but --resume would repeat this", 1)
    except (EOFError, OSError) as error:
        reason, code = f"{error}; what was saved last stands: mend that, then", 1
        processes = envs.unwrapped.processes if args.async_envs else []
        if not all(process.join(0.1) or process.is_alive() for process in processes):
            for process in processes:  # close() would wait for their answers
                process.terminate()
            envs.unwrapped.closed = True
            reason = "a process of --async-envs has ended;"
            if signals:  # torchrun sends them to these processes as well
                reason, code = f"{signal.Signals(signals[0]).name};", 128 + signals[0]
        stop(f"{reason} --resume {name_of_run} goes on from its last checkpoint", code)
    except RuntimeError as error:
        if WORLD == 1:
            raise
        reason = f"this or another process has failed ({str(error).splitlines()[0]})"
        stop(f"{reason}; --resume {name_of_run} goes on from its last checkpoint", 1)
    finally:
        with contextlib.suppress(EOFError, OSError):  # one of its processes has ended
            envs.close()
        progress.close()
        if writer:
            with contextlib.suppress(OSError):  # the disk is full, as was said
                writer.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if WORLD > 1:  # not where a process has failed: it may wait for the others, who wait for that one
        torch.distributed.destroy_process_group()
    if RANK > 0:
        return None
    print(f"{SCRIPT}.py: finished at step {global_step}; run folder {run_dir}")
    return run_dir


# === end shared ===
if __name__ == "__main__":
    main(tyro.cli(Args))

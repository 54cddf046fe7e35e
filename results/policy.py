"""Loads the policy that a finished run left, tells its Gaussians, and which expert acts: for the scripts here."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn

FOLDER = Path(__file__).resolve().parent


def load_script(name: str) -> ModuleType:
    """The module algos/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, FOLDER.parent / "algos" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # its parser looks there for the comments
    spec.loader.exec_module(module)
    return module


def file_of(path: Path) -> Path:
    """A file itself; of a run's folder its policy.pt or, where there is none, the one in results/policies."""
    file = path / "policy.pt" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        file = FOLDER.joinpath("policies", *path.resolve().parts[-3:]).with_suffix(".pt")
    return file


class Saved(NamedTuple):
    script: ModuleType  # of algos/
    args: object  # the run's Args, on one thread of the CPU
    env: object  # the script's Env, with the episodes of its evaluations
    agent: nn.Module


def load(path: Path, parts: tuple[str, ...] = ("actor.",), **kwargs) -> Saved:
    """The agent of a run's folder, or of a file such as those of results/policies.

    Args:
        path: A folder with policy.pt, or whose policy is in results/policies; or a file.
        parts: What the file must hold. A policy has the actor alone, a model.pt the critics as well.
        kwargs: For the environment.

    Raises:
        ValueError: A weight of these parts is missing.
    """
    file = file_of(path)
    script = load_script(torch.load(file, map_location="cpu", weights_only=True)["script"])
    args, saved = script.parse(["--evaluate", str(file), "--device", "cpu", "--num-threads", "1"])
    env = script.Env(args, evaluation=True, **kwargs)
    agent = script.Agent(env.observation_space.shape[0], env.action_space.shape[0], args)
    missing = agent.load_state_dict(saved["agent"], strict=False).missing_keys
    if lacks := [name for name in missing if name.startswith(parts)]:
        raise ValueError(f"{file} has no {lacks[0]}")
    return Saved(script, args, env, agent)


class Gaussians(NamedTuple):
    """The density of u is sum_k w_k N(u; mean_k, std_k^2); the action is tanh(u) of SAC, clip(u, -1, 1) of PPO."""

    w: torch.Tensor  # (B, K)
    mean: torch.Tensor  # (B, K, A)
    std: torch.Tensor  # (B, K, A)
    gate: torch.Tensor | None  # weights of a gate (B, number of experts): w of a mixture; of one Gaussian, not w
    squashed: bool  # by tanh


@torch.no_grad()
def gaussians(actor: nn.Module, obs: torch.Tensor) -> Gaussians:
    """The policy at obs (B, O), with options as an episode begins. Only this knows what the scripts' actors return."""
    squashed, averages = not hasattr(actor, "normalize"), hasattr(actor, "experts")
    if squashed:  # SAC: mean, log std and, of a mixture, weights or their logarithms
        mean, log_std, *gate = actor(obs)
    elif averages:  # PPO of one Gaussian from several: mean, log std, value
        mean, log_std, _ = actor(actor.normalize(obs))
    else:  # PPO: mean, of a mixture log weights, value; one standard deviation for all states
        mean, *gate, _ = actor(actor.normalize(obs))
        log_std = actor.log_std.expand_as(mean)
    gate = experts(actor, obs).w if averages else weights(*gate) if gate else None
    if mean.ndim == 2:
        std = log_std.exp().expand_as(mean)
        return Gaussians(torch.ones(len(mean), 1), mean[:, None], std[:, None], gate, squashed)
    return Gaussians(gate, mean, log_std.exp(), gate, squashed)


def weights(w: torch.Tensor) -> torch.Tensor:
    """Weights (B, K) as they are, or from their logarithms, of which none is positive."""
    return w if (w > 0).any() else w.exp()


@torch.no_grad()
def experts(actor: nn.Module, obs: torch.Tensor) -> Gaussians:
    """What every expert would do at obs (B, O), also where a gate averages them before it acts.

    Such an actor has a method experts(obs) -> mean (B, K, A), log_std, w or log w (B, K), and of PPO, which takes
    normalised observations, the value.
    """
    if not hasattr(actor, "experts"):
        return gaussians(actor, obs)
    normalize = getattr(actor, "normalize", None)
    mean, log_std, w, *_ = actor.experts(normalize(obs) if normalize else obs)
    w = weights(w)
    return Gaussians(w, mean, log_std.exp().expand_as(mean), w, squashed=normalize is None)


def visited(saved: Saved, episodes: int, count: int) -> torch.Tensor:
    """Observations (count, O) or less, evenly taken from episodes of the stochastic policy."""
    states = []
    torch.manual_seed(saved.args.seed)
    for episode in range(episodes):
        (obs, _), done, saved.agent.memory = saved.env.reset(episode), False, []
        while not done:
            states.append(torch.from_numpy(obs))
            obs, _, terminated, truncated, _ = saved.env.step(saved.agent.act(obs, "stochastic"))
            done = terminated or truncated
    return torch.stack(states)[torch.linspace(0, len(states) - 1, min(count, len(states))).round().long()]


class Player:
    """Plays episodes of a saved policy and says which expert acts."""

    def __init__(self, saved: Saved):
        self.saved, script = saved, saved.script
        self.policies = (*script.Actor.policies, "stochastic")
        self.acting = None  # the expert that acted last; None of a policy that draws none
        self.alone = None  # the expert that acts everywhere; None: whom the gate draws
        numbers = [vars(saved.args).get(name, 0) for name in ("num_experts", "num_options")]
        self.experts = max(numbers) if hasattr(script, "pick") else 0  # that can act alone
        if self.experts:
            self.pick, script.pick = script.pick, self.picked
            saved.agent.actor.gate.register_forward_hook(self.gated)

    def picked(self, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """In place of the script's pick(), which takes the values of the expert k that acts."""
        self.acting = int(k[0])
        return self.pick(x, k)

    def gated(self, _gate, _inputs, logits: torch.Tensor) -> torch.Tensor:
        """The gate's logits; where an expert is alone, all weight is on it."""
        experts = torch.arange(logits.shape[-1])
        return logits if self.alone is None else torch.where(experts == self.alone, 0.0, -1e4).expand_as(logits)

    def episode(self, number: int, policy: str):
        """Yields (observation, info, acting expert) at the start and after each step of an evaluation's episode."""
        env = self.saved.env
        (obs, info), done, self.saved.agent.memory = env.reset(number), False, []
        yield obs, info, None
        while not done:
            obs, _, terminated, truncated, info = env.step(self.saved.agent.act(obs, policy))
            done = terminated or truncated
            yield obs, info, self.acting

"""Loads what a run has saved, and tells which expert of a mixture acts."""

import importlib.util
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent


def load_script(name: str):
    """The module algos/NAME.py."""
    path = RESULTS.parent / "algos" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # its parser looks there for the comments
    spec.loader.exec_module(module)
    return module


def policy_file(run_dir: Path) -> Path:
    """policy.pt of a run's folder, or the committed one."""
    environment, label, seed = run_dir.resolve().parts[-3:]
    committed = RESULTS / "policies" / environment / label / f"{seed}.pt"
    for path in (run_dir / "policy.pt", committed):
        if path.exists():
            return path
    raise FileNotFoundError(f"{run_dir}: neither policy.pt nor {committed} is there")


class Saved:
    """A trained policy: its script, args, environment for evaluations, agent."""

    def __init__(self, path: Path, **kwargs):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.script = load_script(saved["script"])
        self.args, saved = self.script.parse(["--evaluate", str(path), "--device", "cpu", "--num-threads", "1"])
        self.env = self.script.Env(self.args, evaluation=True, **kwargs)
        self.agent = self.script.Agent(self.env.observation_space.shape[0], self.env.action_space.shape[0], self.args)
        prefix = "actor."
        actor = {name.removeprefix(prefix): x for name, x in saved["agent"].items() if name.startswith(prefix)}
        self.agent.actor.load_state_dict(actor)
        self.policies = (*self.script.Actor.policies, "stochastic")
        self.acting = None  # the expert that acted last; None of a policy that draws none
        self.alone = None  # the expert that acts everywhere; None: whom the gate draws
        self.experts = self.args.num_experts if hasattr(self.script, "pick") else 0  # that can act alone
        if self.experts:
            self.pick, self.script.pick = self.script.pick, self.picked
            self.agent.actor.gate.register_forward_hook(self.gated)

    def picked(self, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """In place of the script's pick(), which takes the values of the expert k that acts."""
        self.acting = int(k[0])
        return self.pick(x, k)

    def gated(self, _gate, _inputs, logits: torch.Tensor) -> torch.Tensor:
        """The gate's logits; where an expert is alone, all weight is on it."""
        experts = torch.arange(logits.shape[1])
        return logits if self.alone is None else torch.where(experts == self.alone, 0.0, -1e4).expand_as(logits)

    def episode(self, number: int, policy: str):
        """Yields (observation, info, acting expert) at the start and after each step of an evaluation's episode."""
        (obs, info), done = self.env.reset(number), False
        yield obs, info, None
        while not done:
            obs, _, terminated, truncated, info = self.env.step(self.agent.act(obs, policy))
            done = terminated or truncated
            yield obs, info, self.acting

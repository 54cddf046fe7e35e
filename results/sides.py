"""Writes which way round the obstacle of the mirror layout a trained policy takes: sides.csv.

python results/sides.py results/runs/TargetReaching-v0-mirror/*/s*          # into the folders of finished runs
python results/sides.py results/policies/TargetReaching-v0-mirror/*/s1.pt   # s1.sides.csv beside each file

A row for the stochastic policy and, where there is one, for that of the gate (an expert's mean, k ~ w). Columns:
* policy, episodes, success: of 100 episodes, with the seeds and random numbers of an evaluation;
* left, right: number of those that arrived, by the sign of x where their path last passes y = 0, the obstacle's centre;
* entropy: of the side, in units of ln 2; empty where success is below 0.9;
and of the stochastic policy at the start:
* p_left: probability of a lateral action a_x < 0;
* modes: of the density of a_x. That of tanh(u) has two modes as soon as a Gaussian u is wider than sqrt(1 / 2);
* modes_u: of the density of u, before it is squashed (SAC) or clipped (PPO, where `modes` is the same number);
* gate: weights of the experts.
A mode counts if the density's minima on both sides of it enclose at least 1% of the probability.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from policy import Saved, gaussians, load
from torch.special import ndtr

EPISODES, ENOUGH = 100, 0.9
COLUMNS = ("policy", "episodes", "success", "left", "right", "entropy", "p_left", "modes", "modes_u", "gate")


class Recorder:
    """A script's Env that keeps the path of each episode, and whether it arrived."""

    def __init__(self, env):
        self.env, self.paths, self.arrived = env, [], []

    def reset(self, episode: int):
        obs, info = self.env.reset(episode)
        self.paths.append([info["position"]])
        self.arrived.append(False)
        return obs, info

    def step(self, action: np.ndarray):
        result = self.env.step(action)
        self.paths[-1].append(result[-1]["position"])
        self.arrived[-1] = result[-1]["success"]
        return result


def crossing(path: list[np.ndarray]) -> float:
    """Positions (T, 2) -> x where the path last passes y = 0; nan if it never does."""
    x, y = np.array(path).T
    passes = np.flatnonzero((y[:-1] < 0) != (y[1:] < 0))
    if not len(passes):
        return math.nan
    t = passes[-1]
    return x[t] + (x[t + 1] - x[t]) * y[t] / (y[t] - y[t + 1])


def entropy(left: int, right: int) -> float:
    """Entropy of the side in units of ln 2."""
    shares = (left / (left + right), right / (left + right))
    return sum(p * math.log2(1 / p) for p in shares if p > 0)


def fly(saved: Saved, policy: str) -> dict:
    """Success and sides in episodes that are flown as an evaluation flies them."""
    recorder, args = Recorder(saved.env), dataclasses.replace(saved.args, eval_episodes=EPISODES)
    saved.script.evaluate(saved.agent, recorder, args, 0, policy)
    x = [crossing(path) for path, arrived in zip(recorder.paths, recorder.arrived, strict=True) if arrived]
    left, right, success = sum(v < 0 for v in x), sum(v > 0 for v in x), len(x) / EPISODES
    row = {"policy": policy, "episodes": EPISODES, "success": success, "left": left, "right": right}
    return row | {"entropy": f"{entropy(left, right):.4f}" if success >= ENOUGH else ""}


def count_modes(w: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, squashed: bool, least: float = 0.01) -> int:
    """Modes with at least `least` of the probability, of the mixture (K,) of u or, squashed, of tanh(u).

    Both densities have their modes where a function of u has: log p(u), or log p(u) - log(1 - tanh(u)^2).
    """
    u = (mean + torch.linspace(-6, 6, 2001, dtype=mean.dtype)[:, None] * std).unique()  # (N,), finer where narrower
    z = (u[:, None] - mean) / std  # (N, K)
    log_p = (w.log() - std.log() - 0.5 * z**2).logsumexp(1)
    if squashed:
        log_p += 2 * (u.abs() + (-2 * u.abs()).exp().log1p())  # but for a constant
    step = log_p.diff()
    u, step = u[:-1][step.abs() > 1e-10], step[step.abs() > 1e-10]  # a smaller one may be of rounding
    minima = u[1:][(step[1:] > 0) & (step[:-1] < 0)]
    cumulated = ndtr((minima[:, None] - mean) / std) @ w
    shares = torch.cat([cumulated.new_zeros(1), cumulated, cumulated.new_ones(1)]).diff()
    return int((shares >= least).sum())


def at_start(agent, obs: np.ndarray) -> dict:
    """What the policy has in mind at the start, obs (O,), for the lateral action."""
    policy = gaussians(agent.actor, torch.from_numpy(obs)[None])
    w, mean, std = (x[0].double() for x in (policy.w, policy.mean[..., 0], policy.std[..., 0]))
    gate = "" if policy.gate is None else " ".join(f"{x:.4f}" for x in policy.gate[0])
    p_left = float(w @ ndtr(-mean / std))
    modes = count_modes(w, mean, std, policy.squashed), count_modes(w, mean, std, squashed=False)
    return {"p_left": f"{p_left:.4f}", "modes": modes[0], "modes_u": modes[1], "gate": gate}


def main(path: Path) -> Path:
    saved = load(path)
    if "layout=mirror" not in saved.args.env_id:
        raise ValueError(f"{path}: the sides are those of layout=mirror, this policy is of {saved.args.env_id}")
    lines, start = [",".join(COLUMNS)], at_start(saved.agent, saved.env.reset(0)[0])
    for policy in ("stochastic", "gate"):
        if policy == "stochastic" or policy in saved.script.Actor.policies:
            row = fly(saved, policy)
            row |= start if policy == "stochastic" else {}
            lines.append(",".join(str(row.get(name, "")) for name in COLUMNS))
    file = path / "sides.csv" if path.is_dir() else path.with_suffix(".sides.csv")
    file.write_text("\n".join([*lines, ""]))
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", type=Path, nargs="+", help="folders of finished runs, or files of results/policies")
    for path in parser.parse_args().policies:
        try:
            print(main(path), flush=True)
        except (OSError, ValueError) as error:
            parser.exit(2, f"sides.py: {error}\n")

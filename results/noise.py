"""Measures what noise on the actions costs a trained policy: a csv file beside each policy, then one figure of all.

python results/noise.py results/policies/Hopper-v5-300k/*/s*.pt      # s1.noise.csv beside s1.pt, minutes each
python results/noise.py --figure results/policies/Hopper-v5-300k     # results/figures/Hopper-v5-300k-noise.png

The environment gets clip(a + sigma n, -1, 1) with n ~ N(0, 1) in every dimension, at `every` step or in a `burst`: the
first 2 of every 10 steps, as in an earlier demonstration by the PMOE authors. The weights are fixed, and so is PPO's
normaliser. Episode e of seed s has noise of its own, seeded by (s, e), and starts as evaluation e does, so that all
methods meet the same. Policies are evaluated as they explore (stochastic) and by their means: of a mixture (gate) by
that of an expert drawn anew in each step. Columns: policy, schedule, sigma, episodes, return, length; at sigma 0 the
schedule is `none`. The figure has the return relative to that at sigma 0, thin lines for seeds, thick ones for their
means. These means are in noise.csv, beside the labels.
"""

import argparse
import csv
import dataclasses
import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from curves import palette
from policy import load

EPISODES = 20
SIGMAS = (0.1, 0.2, 0.3, 0.5, 1.0)
SCHEDULES = {"burst": (2, 10), "every": (10, 10)}  # noise at the first of so many steps
FOLDER = Path(__file__).resolve().parent


class Noisy:
    """A script's Env with noise on the actions."""

    def __init__(self, env, seed: int, sigma: float, on: int, period: int):
        self.env, self.seed, self.sigma, self.on, self.period = env, seed, sigma, on, period

    def reset(self, episode: int):
        self.rng, self.steps = np.random.default_rng((self.seed, episode)), 0
        return self.env.reset(episode)

    def step(self, action: np.ndarray):
        noise = self.rng.standard_normal(action.shape, np.float32)  # drawn at every step: the same in both schedules
        if self.steps % self.period < self.on:
            action = np.clip(action + np.float32(self.sigma) * noise, -1, 1)
        self.steps += 1
        return self.env.step(action)


def measure(path: Path) -> Path:
    """Writes the csv file of one policy."""
    script, args, env, agent = load(path)
    args = dataclasses.replace(args, eval_episodes=EPISODES)
    lines = ["policy,schedule,sigma,episodes,return,length"]
    for policy in (script.Actor.policies[-1], "stochastic"):
        for schedule, sigma in [("none", 0.0), *((name, sigma) for name in SCHEDULES for sigma in SIGMAS)]:
            noisy = Noisy(env, args.seed, sigma, *SCHEDULES.get(schedule, (0, 1)))
            row = script.evaluate(agent, noisy, args, 0, policy)
            lines.append(f"{policy},{schedule},{sigma},{EPISODES},{row['return']:.2f},{row['length']:.1f}")
    file = path / "noise.csv" if path.is_dir() else path.with_suffix(".noise.csv")
    file.write_text("\n".join([*lines, ""]))
    return file


def table(folder: Path) -> list[dict]:
    """Means over the seeds of each label, from all csv files under folder/label."""
    values = {}
    for path in sorted(folder.glob("*/*.noise.csv")):
        with open(path) as file:
            rows = list(csv.DictReader(file))
        clean = {row["policy"]: float(row["return"]) for row in rows if row["schedule"] == "none"}
        for row in rows:
            key = path.parent.name, row["policy"], row["schedule"], float(row["sigma"])
            total = float(row["return"])
            values.setdefault(key, []).append((total, total / clean[row["policy"]], float(row["length"])))
    names = ("label", "policy", "schedule", "sigma", "seeds", "return", "relative", "length", "relatives")
    rows = []
    for key, seeds in values.items():
        means, relatives = np.mean(seeds, axis=0).tolist(), [relative for _, relative, _ in seeds]
        rows.append(dict(zip(names, (*key, len(seeds), *means, relatives), strict=True)))
    return rows


def draw(folder: Path, target: Path) -> Path:
    """Writes noise.csv, the table, into `folder`, and the figure to `target`."""
    rows = table(folder)
    if not rows:
        raise ValueError(f"{folder} has no LABEL/*.noise.csv")
    lines = ["label,policy,schedule,sigma,seeds,return,relative,length"]
    for row in rows:
        numbers = f"{row['return']:.1f},{row['relative']:.3f},{row['length']:.1f}"
        lines.append(f"{row['label']},{row['policy']},{row['schedule']},{row['sigma']},{row['seeds']},{numbers}")
    (folder / "noise.csv").write_text("\n".join([*lines, ""]))

    labels = dict.fromkeys(row["label"] for row in rows)
    colours, modes = palette(labels), {"by means": False, "stochastic": True}
    figure, axes = plt.subplots(2, 2, sharex=True, sharey=True, layout="constrained", figsize=(8, 6))
    for axis, (mode, schedule) in zip(axes.flat, itertools.product(modes, SCHEDULES), strict=True):
        for label, colour in colours.items():
            chosen = [row for row in rows if row["label"] == label and row["schedule"] in ("none", schedule)]
            chosen = [row for row in chosen if (row["policy"] == "stochastic") == modes[mode]]
            sigmas = [row["sigma"] for row in chosen]
            axis.plot(sigmas, [row["relatives"] for row in chosen], color=colour, linewidth=0.6, alpha=0.5)
            axis.plot(sigmas, [row["relative"] for row in chosen], "o-", color=colour, label=label, markersize=4)
        axis.set_title(f"{mode}, noise at {SCHEDULES[schedule][0]} of 10 steps", fontsize=9)
        axis.grid(color="#DDDDDD")
        axis.set_ylim(bottom=0)
    for axis in axes[1]:
        axis.set_xlabel("sigma of the noise on the action")
    for axis in axes[:, 0]:
        axis.set_ylabel("return, relative to no noise")
    axes[0, 0].legend(fontsize=8)
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", type=Path, nargs="*", help="files of results/policies, or folders of runs")
    parser.add_argument("--figure", type=Path, help="a folder under results/policies whose csv files to draw")
    options = parser.parse_args()
    if not options.policies and not options.figure:
        parser.error("give policies, or --figure and a folder")
    try:
        for policy in options.policies:
            print(measure(policy), flush=True)
        if options.figure:
            print(draw(options.figure, FOLDER / "figures" / f"{options.figure.name}-noise.png"))
    except (OSError, ValueError) as error:
        parser.exit(2, f"noise.py: {error}\n")

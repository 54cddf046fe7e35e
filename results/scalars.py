"""Writes scalars.csv, what a run logged of its policy and its experts, into the folder of a finished run.

python results/scalars.py results/runs/TargetReaching-v0-fixed/sac_pmoe/s1

TensorBoard's files are too large for a repository; of the curves under policy/ and moe/, and of the loss of PPO-PMOE's
Q-network, this keeps 50 points at most, and for each of these the mean of charts/episodic_return since the point before
(nan if no episode ended). Of SAC that is a number per episode, of PPO the mean of those that ended in a rollout, so a
rollout with few long episodes weighs as much as one with many short ones. Where the run has a moe.csv, what is under
moe/ and the returns are there or in eval.csv.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

POINTS = 50
TRAINING = "charts/episodic_return"


def main(run_dir: Path):
    events = EventAccumulator(str(run_dir)).Reload()
    several = (run_dir / "moe.csv").exists()
    kinds = ("policy/",) if several else ("policy/", "moe/", "losses/q")
    logged = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    curves = {tag: logged[tag] for tag in logged if tag.startswith(kinds)}
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    kept = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, POINTS).round().astype(int))]
    if not several:
        returns = logged.get(TRAINING, {})
        parts = ([returns[t] for t in returns if a < t <= b] for a, b in zip([-1, *kept], kept, strict=False))
        curves[TRAINING] = {step: np.mean(part or [np.nan]) for step, part in zip(kept, parts, strict=True)}
    names = sorted(curves)
    with open(run_dir / "scalars.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["global_step", *names])
        for step in kept:
            writer.writerow([step, *(f"{curves[name][step]:.4g}" for name in names)])
    print(run_dir / "scalars.csv")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not list(Path(sys.argv[1]).glob("events.out.tfevents.*")):
        sys.exit("scalars.py: give one folder of a run, with its TensorBoard files")
    main(Path(sys.argv[1]))

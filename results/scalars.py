"""Writes scalars.csv, what a run logged of its policy and its experts, into the folder of a finished run.

python results/scalars.py results/runs/TargetReaching-v0-fixed/sac_pmoe/s1

TensorBoard's files are too large for a repository; of the curves under policy/ and moe/, and of the loss of PPO-PMOE's
Q-network, this keeps 50 points at most. Where the run has a moe.csv, what is under moe/ is there already.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

POINTS = 50


def main(run_dir: Path):
    events = EventAccumulator(str(run_dir)).Reload()
    kinds = ("policy/",) if (run_dir / "moe.csv").exists() else ("policy/", "moe/", "losses/q")
    names = sorted(tag for tag in events.Tags()["scalars"] if tag.startswith(kinds))
    curves = {name: {event.step: event.value for event in events.Scalars(name)} for name in names}
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    kept = np.unique(np.linspace(0, len(steps) - 1, POINTS).round().astype(int))
    with open(run_dir / "scalars.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["global_step", *names])
        for step in (steps[i] for i in kept):
            writer.writerow([step, *(f"{curves[name][step]:.4g}" for name in names)])
    print(run_dir / "scalars.csv")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not list(Path(sys.argv[1]).glob("events.out.tfevents.*")):
        sys.exit("scalars.py: give one folder of a run, with its TensorBoard files")
    main(Path(sys.argv[1]))

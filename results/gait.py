"""Writes whether a trained policy runs upright on HalfCheetah or slides along on its back: RUN_DIR/gait.csv.

python results/gait.py results/runs/HalfCheetah-v5-ppo-kl/ppo_pmoe-both/s1

The policy is RUN_DIR/policy.pt or the committed one. Columns policy,episode,return,upright: three episodes of each
policy, with the seeds of the evaluations. `upright` is the mean cosine of the torso's pitch, the observation's second
number, after the first 200 steps: 1 is upright, -1 on the back. One machine gives the same file each time.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from policy import Player, load

EPISODES, START = 3, 200
PITCH = 1  # in the observation of HalfCheetah-v5


def main(run_dir: Path) -> Path:
    player, lines = Player(load(run_dir)), ["policy,episode,return,upright"]
    torch.manual_seed(player.saved.args.seed)
    for policy in player.policies:
        for episode in range(EPISODES):
            steps = list(player.episode(episode, policy))
            upright = np.mean([math.cos(obs[PITCH]) for obs, _, _ in steps[1:][START:]])
            lines.append(f"{policy},{episode},{steps[-1][1]['episode']['r']:.1f},{upright:.3f}")
    path = run_dir / "gait.csv"
    path.write_text("\n".join([*lines, ""]))
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(main(Path(sys.argv[1])))

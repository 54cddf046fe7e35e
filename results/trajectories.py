"""Writes where a trained policy flies in TargetReaching, and which expert acts: RUN_DIR/trajectories.csv, layout.csv.

python results/trajectories.py results/runs/TargetReaching-v0-fixed/sac_pmoe/s1

The policy is RUN_DIR/policy.pt or the committed one, results/policies/<environment>/<label>/s<seed>.pt. Columns
panel,episode,step,x,y,expert: the expert acted in the step that led there. The panels are
* stochastic: 10 episodes of the policy as it explores, all in the layout of the first evaluation's first episode;
* expert_k, if the policy is a mixture: 5 episodes there in which expert k alone acts, with its own noise;
* cells, if checkpoint.pt still has the replay of the first 10,000 steps and they are not all random: the middle of each
  cell of side 0.5 that was seen in them, and the step at which it was first seen.
Every 2nd step of an episode and its last. layout.csv (thing,x,y,radius) has start, target and obstacles. The same
policy gives the same files.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from policy import Player, load

EPISODES, EXPERT_EPISODES, STRIDE = 10, 5, 2
FIRST_STEPS, CELL = 10_000, 0.5
EDGE, TARGET_RADIUS = 5.0, 0.5  # of the environment, whose observation is scaled by EDGE


def fly(player: Player, episodes: int) -> list[str]:
    """Rows episode,step,x,y,expert of the stochastic policy."""
    torch.manual_seed(player.saved.args.seed)
    rows = []
    for episode in range(episodes):
        path = [(*info["position"], "" if k is None else k) for _, info, k in player.episode(0, "stochastic")]
        last = len(path) - 1
        for step, (x, y, expert) in enumerate(path):
            if step % STRIDE == 0 or step == last:
                rows.append(f"{episode},{step},{x:.2f},{y:.2f},{expert}")
    return rows


def layout(env) -> list[str]:
    """Rows thing,x,y,radius, from the first observation: position, velocity, acceleration, target, discs, radii."""
    obs = np.float64(env.reset(0)[0])
    start, target, n = obs[:2] * EDGE, (obs[:2] + obs[6:8]) * EDGE, (len(obs) - 8) // 3
    centres = (obs[8 : 8 + 2 * n].reshape(n, 2) + obs[:2]) * EDGE
    things = [("start", *start, 0), ("target", *target, TARGET_RADIUS)]
    things += [("obstacle", *centre, radius) for centre, radius in zip(centres, obs[8 + 2 * n :], strict=True)]
    return [f"{thing},{x:.3f},{y:.3f},{radius:.3f}" for thing, x, y, radius in things]


def cells(checkpoint: dict) -> list[str]:
    """Rows episode,step,x,y,expert of the cells that the first steps saw: episode 0, no expert."""
    rows, count = checkpoint["buffer"]["rows"], checkpoint["buffer"]["count"]
    if count > len(rows) or count < FIRST_STEPS or checkpoint["args"]["learning_starts"] >= FIRST_STEPS:
        return []  # the oldest are overwritten; or there is nothing to see
    action_dim = 2
    obs_dim = (rows.shape[1] - 2 - action_dim) // 2  # a row: obs, reward, terminated, next_obs, action
    places = torch.stack([rows[:FIRST_STEPS, :2], rows[:FIRST_STEPS, obs_dim + 2 : obs_dim + 4]], 1) * EDGE  # (T, 2, 2)
    cell = (places / CELL).floor().flatten(0, 1).int().numpy()  # (2 T, 2)
    found, first = np.unique(cell, axis=0, return_index=True)
    inside = (np.abs(found + 0.5) < EDGE / CELL).all(1)  # not behind the wall
    seen = sorted(zip((first[inside] // 2).tolist(), found[inside].tolist(), strict=True))
    return [f"0,{step},{(i + 0.5) * CELL:.2f},{(j + 0.5) * CELL:.2f}," for step, (i, j) in seen]


def main(run_dir: Path) -> Path:
    player = Player(load(run_dir))
    panels = {"stochastic": fly(player, EPISODES)}
    for k in range(player.experts):
        player.alone = k
        panels[f"expert_{k}"] = fly(player, EXPERT_EPISODES)
    if (run_dir / "checkpoint.pt").exists():
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        if "buffer" in checkpoint:  # PPO has none
            panels["cells"] = cells(checkpoint)
    (run_dir / "layout.csv").write_text("\n".join(["thing,x,y,radius", *layout(player.saved.env), ""]))
    lines = [f"{name},{row}" for name, rows in panels.items() for row in rows]
    path = run_dir / "trajectories.csv"
    path.write_text("\n".join(["panel,episode,step,x,y,expert", *lines, ""]))
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(main(Path(sys.argv[1])))

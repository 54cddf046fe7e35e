"""Writes whether a trained agent runs upright on HalfCheetah or slides along on its back: RUN_DIR/gait.csv.

python results/gait.py results/runs/HalfCheetah-v5-experts/ppo_pmoe-4/s2

Columns policy,episode,return,upright: three episodes of the deterministic and of the stochastic policy, with the seeds
of the evaluations. `upright` is the mean cosine of the torso's pitch, the observation's second number, after the first
200 steps: 1 is upright, -1 on the back. The same model gives the same file on the same machine.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from trajectories import load_script

EPISODES, START = 3, 200
PITCH = 1  # in the observation of HalfCheetah-v5


def main(run_dir: Path) -> Path:
    run = json.loads((run_dir / "run.json").read_text())
    script = load_script(run["script"])
    args = script.Args(**run["args"] | {"device": "cpu"})
    torch.set_num_threads(1)
    env = script.make_env(args.env_id)
    agent = script.Agent(env.observation_space.shape[0], env.action_space.shape[0], args)
    agent.load_state_dict(torch.load(run_dir / "model.pt", map_location="cpu", weights_only=True)["agent"])
    lines = ["policy,episode,return,upright"]
    torch.manual_seed(args.seed)
    for name, policy in (("deterministic", agent.actor.mode), ("stochastic", lambda obs: agent.actor.sample(obs)[0])):
        for episode in range(EPISODES):
            obs, _ = env.reset(seed=script.episode_seed(args.seed, episode, evaluation=True))
            cosines, done = [], False
            while not done:
                obs, _, terminated, truncated, info = env.step(script.act(policy, np.float32(obs), args.device))
                cosines.append(math.cos(obs[PITCH]))
                done = terminated or truncated
            lines.append(f"{name},{episode},{info['episode']['r']:.1f},{np.mean(cosines[START:]):.3f}")
    path = run_dir / "gait.csv"
    path.write_text("\n".join([*lines, ""]))
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(main(Path(sys.argv[1])))

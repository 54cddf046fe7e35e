"""Writes where a trained agent flies in TargetReaching: RUN_DIR/trajectories.csv, for results/plot.py.

python results/trajectories.py results/runs/TargetReaching-v0-fixed/sac_pmoe/s1

Columns panel,episode,step,x,y. The panels are
* stochastic: 10 episodes of the policy as it explores;
* expert_k, if the policy is a mixture: 5 episodes in which expert k alone acts everywhere, with its own noise. Its
  noise-free mean would fly one and the same path five times here, and hide how wide the expert is;
* exploration, if there is a replay: the first 20,000 steps of the training (by default 10,000 random ones, then the
  policy's first 10,000), from the replay rows of checkpoint.pt; `step` is the global step.
Every 4th step of an episode and its last, every 10th of the exploration. The same model gives the same file.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch

EPISODES, EXPERT_EPISODES, EPISODE_STRIDE = 10, 5, 4
EXPLORATION_STEPS, EXPLORATION_STRIDE = 20_000, 10
EDGE = 5.0  # the observation holds position / EDGE


def load_script(name: str):
    """The module algos/NAME.py."""
    path = Path(__file__).resolve().parent.parent / "algos" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fly(script, args, env, policy, episodes: int) -> list[tuple]:
    """(episode, step, x, y) of `policy`, a function of a batch of observations."""
    rows = []
    torch.manual_seed(args.seed)
    for episode in range(episodes):
        obs, info = env.reset(seed=script.episode_seed(args.seed, episode, evaluation=True))
        step, done = 0, False
        rows.append((episode, step, *info["position"]))
        while not done:
            obs, _, terminated, truncated, info = env.step(script.act(policy, obs, args.device))
            step, done = step + 1, terminated or truncated
            if done or step % EPISODE_STRIDE == 0:
                rows.append((episode, step, *info["position"]))
    return rows


def explored(buffer: dict) -> list[tuple]:
    """(episode, step, x, y) of the first training steps; none if the ring has overwritten them."""
    if buffer["first"]:
        return []
    starts = buffer["starts"][: min(buffer["count"], EXPLORATION_STEPS)]
    steps = torch.arange(len(starts))
    episodes = starts - steps  # every finished episode has taken one row more than it has steps
    positions = buffer["obs"][starts, :2] * EDGE
    rows = zip(episodes.tolist(), steps.tolist(), *positions.T.tolist(), strict=True)
    return list(rows)[::EXPLORATION_STRIDE]


def main(run_dir: Path) -> Path:
    run = json.loads((run_dir / "run.json").read_text())
    script = load_script(run["script"])
    args = script.Args(**run["args"] | {"device": "cpu"})
    checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    torch.set_num_threads(1)
    env = script.make_env(args.env_id)
    agent = script.Agent(env.observation_space.shape[0], env.action_space.shape[0], args)
    agent.load_state_dict(checkpoint["agent"])

    panels = {"stochastic": fly(script, args, env, lambda obs: agent.actor.sample(obs)[0], EPISODES)}
    mixture = len(agent.actor(torch.zeros(1, env.observation_space.shape[0]))) == 3  # mean, log_std, w; PPO: mean, w, V
    for k in range(args.num_experts if mixture else 0):

        def expert(obs, k=k):
            if "buffer" in checkpoint:
                mean, log_std, _ = agent.actor(obs)  # (B, K, A) each
                return (mean[:, k] + log_std[:, k].exp() * torch.randn_like(mean[:, k])).tanh()
            mean = agent.actor(agent.actor.normalize(obs))[0][:, k]
            return (mean + agent.actor.log_std[k].exp() * torch.randn_like(mean)).clamp(-1, 1)

        panels[f"expert_{k}"] = fly(script, args, env, expert, EXPERT_EPISODES)
    if "buffer" in checkpoint:
        panels["exploration"] = explored(checkpoint["buffer"])
    lines = [f"{name},{e},{step},{x:.2f},{y:.2f}" for name, rows in panels.items() for e, step, x, y in rows]
    path = run_dir / "trajectories.csv"
    path.write_text("\n".join(["panel,episode,step,x,y", *lines, ""]))
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(main(Path(sys.argv[1])))

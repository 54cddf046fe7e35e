"""Repeats a SAC run on the mirror layout and writes what it thinks of the two sides while it learns: side_history.csv.

python results/side_history.py results/runs/TargetReaching-v0-mirror/sac_pmoe/s1              # every 2,500 steps
python results/side_history.py results/runs/TargetReaching-v0-mirror/sac_pmoe/s1 --every 500

The run keeps its last weights only. A run that is resumed and made longer has the bits of one that was longer from the
start, so this repeats the training in pieces, in a temporary folder, by the command in run.json, and looks at the agent
after each. At the end it compares the weights with those of policy.pt: on another machine, or after a change of the
script, the history is that of another run, and the script says so. Columns:
* step: from the first update on;
* q_left, q_right: max over the actions with a_x <= -0.5, or a_x >= 0.5, of min_i Q_i(s, a) at the start s. Nearer to 0
  both sides have the same action, and the best of the worse side would be the one nearest to the other;
* alpha: the temperature;
and, as in sides.csv, p_left, modes, modes_u, gate, success, left, right of the stochastic policy.
"""

import argparse
import json
import shlex
import tempfile
from pathlib import Path

import numpy as np
import torch
from policy import load, load_script
from sides import at_start, fly

COLUMNS = ("step", "q_left", "q_right", "alpha", "p_left", "modes", "modes_u", "gate", "success", "left", "right")
SIDE = 0.5  # a lateral acceleration of at least this is a side


def best(critic, obs: np.ndarray) -> tuple[float, float]:
    """(q_left, q_right) at obs (O,), on a grid of actions."""
    x, y = torch.meshgrid(torch.linspace(SIDE, 1, 26), torch.linspace(-1, 1, 101), indexing="ij")
    right = torch.stack([x, y], -1).view(-1, 2)
    actions = torch.stack([right * torch.tensor([-1.0, 1.0]), right])  # (2, N, 2)
    with torch.no_grad():
        q = critic(torch.from_numpy(obs).expand(2, -1), actions).amin(0)  # (2, N)
    return tuple(q.amax(1).tolist())


def look(model: Path) -> dict:
    """A row of side_history.csv for the agent in a model.pt, but for the step."""
    saved = load(model, parts=("actor.", "critic.", "log_alpha"))
    start, alpha = saved.env.reset(0)[0], saved.agent.log_alpha.exp().item()
    q_left, q_right = best(saved.agent.critic, start)
    row = {"q_left": f"{q_left:.4f}", "q_right": f"{q_right:.4f}", "alpha": f"{alpha:.4f}"}
    return row | at_start(saved.agent, start) | fly(saved, "stochastic")


def main(run_dir: Path, every: int) -> Path:
    run = json.loads((run_dir / "run.json").read_text())
    args, flags = run["args"], shlex.split(run["command"])[2:]  # without "python algos/NAME.py"
    if not run["script"].startswith("sac") or "layout=mirror" not in args["env_id"]:
        raise ValueError(f"{run_dir} is of {run['script']} on {args['env_id']}, not of SAC on layout=mirror")
    first, total = max(1, args["learning_starts"]), args["total_timesteps"]
    script, lines = load_script(run["script"]), [",".join(COLUMNS)]
    path = run_dir / "side_history.csv"
    with tempfile.TemporaryDirectory() as folder:
        flags += ["--run-dir", folder]
        for step in (*range(first, total, every), total):
            script.main([*flags, "--total-timesteps", str(step)])
            flags = ["--resume", folder]
            row = {"step": step} | look(Path(folder, "model.pt"))
            lines.append(",".join(str(row[name]) for name in COLUMNS))
            path.write_text("\n".join([*lines, ""]))
        old, new = (torch.load(Path(x, "policy.pt"), weights_only=True)["agent"] for x in (run_dir, folder))
    same = all(torch.equal(old[name], new[name]) for name in new)  # a committed policy may have the critics, too
    print(f"side_history.py: the repeated run ended with {'the same' if same else 'OTHER'} weights "
          f"{'as' if same else 'than'} {run_dir / 'policy.pt'}")  # fmt: skip
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="folder of a finished run")
    parser.add_argument("--every", type=int, default=2500, help="steps between two rows (default: 2500)")
    options = parser.parse_args()
    if options.every < 1:
        parser.error(f"--every {options.every}: must be at least 1")
    try:
        print(main(options.run_dir, options.every))
    except (OSError, ValueError) as error:
        parser.exit(2, f"side_history.py: {error}\n")

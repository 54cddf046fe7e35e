"""Writes whether the router of a Soft MoE in PQN tells places apart: RUN_DIR/routing.csv.

python results/routing.py results/runs/MinAtar-PQN-asterix/pqn_moe-soft8/s1

The policy is RUN_DIR/policy.pt or the committed one. Columns network,dispatch,combine,tokens,slots, a row for the
network as the seed starts it and one as it is at the end, both in the same 256 states: 32 games after 10, 20, ..., 80
steps of the epsilon-greedy policy.

dispatch, combine  entropies of the softmax over tokens and of that over slots, of at most 1: all weights equal
tokens, slots      how much the tokens X and the slots S differ within a state: their standard deviation over the root
                   of their mean square, 0: all equal

The same machine gives the same file each time.
"""

import math
import sys
from pathlib import Path

import torch
from policy import file_of, load_script

GAMES, EVERY, TIMES = 32, 10, 8


@torch.no_grad()
def measure(network: torch.nn.Module, obs: torch.Tensor) -> list[float]:
    """The four numbers of a Soft MoE network in the states obs (B, 10, 10, C)."""
    x = network.conv(obs.permute(0, 3, 1, 2).float())
    x = network.cells(x.flatten(2).transpose(1, 2))  # X (B, m, d)
    logits = x @ network.middle[0].phi  # (B, m, n p)
    slots = logits.softmax(1).transpose(1, 2) @ x  # S (B, n p, d)
    entropies = [torch.special.entr(logits.softmax(i)).sum(i).mean() / math.log(logits.shape[i]) for i in (1, 2)]
    spreads = [y.var(1, correction=0).mean().sqrt() / y.square().mean().sqrt() for y in (x, slots)]
    return [float(value) for value in entropies + spreads]


def main(run_dir: Path) -> Path:
    file, script = file_of(run_dir), load_script("pqn_moe")
    args, saved = script.parse(["--evaluate", str(file), "--num-threads", "1"])
    if args.moe != "soft":
        sys.exit(f"{file}: --moe {args.moe} has no slots")
    games = script.Games(args, GAMES, evaluation=True)
    torch.manual_seed(args.seed)  # as train() does, so the agent is the run's at its start
    agents = [script.Agent(games.obs.shape[-1], len(games.actions), args) for _ in range(2)]
    agents[1].load_state_dict(saved["agent"])
    states = []
    for step in range(1, EVERY * TIMES + 1):
        games.step(agents[1].act(torch.from_numpy(games.obs.copy()), args.epsilon)[0].tolist())
        if step % EVERY == 0:
            states.append(torch.from_numpy(games.obs.copy()))
    lines = ["network,dispatch,combine,tokens,slots"]
    for name, agent in zip(("at the start", "at the end"), agents, strict=True):
        lines.append(",".join([name, *(f"{value:.3f}" for value in measure(agent.network, torch.cat(states)))]))
    path = run_dir / "routing.csv"
    path.write_text("\n".join([*lines, ""]))
    return path


if __name__ == "__main__":
    if len(sys.argv) < 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        print(main(Path(name)))

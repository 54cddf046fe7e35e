"""Lists the committed policies: results/policies/README.md and policies.csv.

python results/policies.py

Each file of results/policies/ENVIRONMENT/LABEL/ is the policy that a finished run left (policy.pt). The table has the
return that the run's last evaluation saw, and that of the first episode alone as this machine flies it, which
tests/test_policies.py repeats. Acts by the mean, a mixture by that of an expert drawn from the gate.
"""

import csv
import platform
import sys
from pathlib import Path

import torch
from policy import load_script

POLICIES = Path(__file__).resolve().parent / "policies"
COLUMNS = ("file", "script", "policy", "return", "success", "first_episode", "machine")
PAGE = """<!-- python results/policies.py makes this page -->

# Policies

What finished runs left: the actor and the flags. Seed 1 of every label, not the best one; of Hopper every seed.

```bash
python algos/SCRIPT.py --evaluate results/policies/FILE --video    # JSON and a GIF beside the file
```

*Return* is the mean over the episodes of the run's last evaluation; a single Gaussian acts by its mean
(`deterministic`), a mixture by the mean of an expert drawn from its gate (`gate`).

| file | script | acts by | return | success |
|---|---|---|---:|---:|
"""


def first_episode(path: Path) -> tuple[str, str, float]:
    """Script, policy and the raw return of the first evaluation episode of a saved policy."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    script = load_script(saved["script"])
    args = script.Args(**script.OLDER | saved["args"] | {"device": "cpu", "eval_episodes": 1})
    torch.set_num_threads(1)
    env = script.Env(args, evaluation=True)
    agent = script.Agent(env.observation_space.shape[0], env.action_space.shape[0], args)
    actor = {key.removeprefix("actor."): x for key, x in saved["agent"].items() if key.startswith("actor.")}
    agent.actor.load_state_dict(actor)
    policy = script.Actor.policies[-1]
    return saved["script"], policy, script.evaluate(agent, env, args, saved["global_step"], policy)["return"]


def machine() -> str:
    """Processor and version of PyTorch: rounding may differ elsewhere."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


def main(root: Path = POLICIES):
    rows = []
    for path in sorted(root.glob("*/*/*.pt")):
        script, policy, first = first_episode(path)
        with open(root.parent / "runs" / path.relative_to(root).with_suffix("") / "eval.csv") as file:
            last = [row for row in csv.DictReader(file) if row["policy"] == policy][-1]
        name = str(path.relative_to(root))
        rows.append((name, script, policy, last["return"], last["success"], first, machine()))
    with open(root / "policies.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    lines = [f"| [{r[0]}]({r[0]}) | `{r[1]}.py` | {r[2]} | {float(r[3]):.1f} | {r[4]} |\n" for r in rows]
    (root / "README.md").write_text(PAGE + "".join(lines).replace("| nan |", "| - |"))
    return len(rows)


if __name__ == "__main__":
    print(main(), "policies", file=sys.stderr)

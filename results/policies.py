"""Lists the committed policies: results/policies/README.md and policies.csv.

python results/policies.py

Each file of results/policies/ENVIRONMENT/LABEL/ is the policy that a finished run left (policy.pt). The table has the
return that the run's last evaluation saw, and that of the first episode alone as this machine flies it, which
tests/test_policies.py repeats.
"""

import contextlib
import csv
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from policy import load_script

POLICIES = Path(__file__).resolve().parent / "policies"
COLUMNS = ("file", "script", "policy", "return", "success", "first_episode", "machine")
PAGE = """<!-- python results/policies.py makes this page -->

# Policies

What finished runs left: the actor and the flags. Seed 1 of every label, not the best one; of Hopper every seed. Runs
from before policies were kept left none, and those of more than a megabyte are not here.

```bash
python algos/SCRIPT.py --evaluate results/policies/FILE --video    # JSON and a GIF beside the file
```

*Return* is the mean over the episodes of the run's last evaluation, of several tasks one after the other. A single
Gaussian acts by its mean (`deterministic`), a mixture by the mean of an expert drawn from its gate (`gate`). On games
`deterministic` is the best or likeliest action.

| file | script | acts by | return | success |
|---|---|---|---:|---:|
"""


def first_episode(path: Path) -> tuple[str, str, list[float]]:
    """Script, policy and, of each task, the raw return of its first evaluation episode, by the script's --evaluate."""
    name = torch.load(path, map_location="cpu", weights_only=True)["script"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        file = Path(shutil.copy(path, folder))
        words = ["--evaluate", str(file), "--eval-episodes", "1", "--device", "cpu", "--num-threads", "1"]
        script = load_script(name)
        if policies := getattr(getattr(script, "Actor", None), "policies", ()):  # only the one that is listed flies
            script.evaluate = lambda *parts, fly=script.evaluate: (
                fly(*parts) if parts[-1] == policies[-1] else {"policy": parts[-1]}
            )
        script.main(words)
        results = json.loads(file.with_suffix(".json").read_text())
    policy = "gate" if "gate" in results else "deterministic"
    rows = results[policy] if isinstance(results[policy], list) else [results[policy]]
    return name, policy, [row["return"] for row in rows]


def machine() -> str:
    """Processor and version of PyTorch: rounding may differ elsewhere."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


def main(root: Path = POLICIES):
    rows = []
    for path in sorted(root.glob("*/*/*.pt")):
        script, policy, first = first_episode(path)
        with open(root.parent / "runs" / path.relative_to(root).with_suffix("") / "eval.csv") as file:
            last = [row for row in csv.DictReader(file) if row["policy"] == policy][-len(first) :]
        returns, success = (" ".join(row[column] for row in last) for column in ("return", "success"))
        name, one = str(path.relative_to(root)), " ".join(map(str, first))
        rows.append((name, script, policy, returns, success, one, machine()))
    with open(root / "policies.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    lines = []
    for name, script, policy, returns, success, *_ in rows:
        numbers = ", ".join(f"{float(x):.1f}" for x in returns.split())
        lines.append(f"| [{name}]({name}) | `{script}.py` | {policy} | {numbers} | {success.replace('nan', '-')} |\n")
    (root / "README.md").write_text(PAGE + "".join(lines))
    return len(rows)


if __name__ == "__main__":
    print(main(), "policies", file=sys.stderr)

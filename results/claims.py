"""The claims of both papers beside the runs: text/claims.toml, decided by one rule.

A claim of the kind `test` compares one measure of two labels, run by run: exact permutation within each task, then
Holm's correction over the tested claims of its paper, in which one without runs counts as p = 1. One of the kind `seen`
is a property of a policy, for which no test fits: it counts the runs on either side of a bound. `table` is what another
script has written.
"""

import math
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import measures
import numpy as np
import pandas as pd
import stats
from reading import TEXT, Data, policy_name
from stats import number

MOST_TESTED = 12  # claims of one paper
LEVEL = 0.05
EVALUATED = ("area", "return at the end", "return at the end of its phase")  # by the policy that stands for a label
RETURNS = (*EVALUATED, "stochastic return", "area of training", "training at the end")
LEAST = 3  # seeds of both labels from which on runs take the place of what stands in for them, and properties count
SAME = ("env_id", "game", "protocol", "total_timesteps", "learning_starts", "eval_every", "eval_episodes", "target_kl")
SAME += ("sticky_actions", "minimal_actions", "time_limit", "epsilon")  # of PQN


class Task(NamedTuple):
    """Two labels in one folder."""

    folder: str
    one: pd.DataFrame  # of measures.of()
    other: pd.DataFrame
    policies: tuple[str, str]
    measure: str


def read() -> list[dict]:
    """The claims, in the order of the file."""
    claims = tomllib.loads((TEXT / "claims.toml").read_text())["claim"]
    for paper in {claim["paper"] for claim in claims}:
        tested = sum(claim["kind"] == "test" for claim in claims if claim["paper"] == paper)
        if tested > MOST_TESTED:
            raise ValueError(f"text/claims.toml: {tested} tested claims of {paper}, at most {MOST_TESTED}")
    return claims


def decide(data: Data, root: Path) -> list[dict]:
    """The claims with `seen`, `numbers`, `tasks` and, where they are tested, p before and after Holm's correction."""
    written = read()
    claims = [with_tasks(claim, data) for claim in written]
    for paper in {claim["paper"] for claim in claims}:
        family = [w["paper"] == paper and w["kind"] == "test" for w in written]  # also those whose stand-in is no test
        tested = [claim for claim, is_in in zip(claims, family, strict=True) if is_in]
        for claim in tested:
            tasks = claim["tasks"] if claim["kind"] == "test" else []
            blocks = [(task.one.to_numpy(), task.other.to_numpy()) for task in tasks]
            claim["blocks"], claim["p"] = blocks, stats.permutation(blocks) if blocks else 1.0
        for claim, p in zip(tested, stats.holm([claim["p"] for claim in tested]), strict=True):
            claim["holm"] = p
    for claim in claims:
        describe(claim)
        files = [root / "policies" / folder / claim["file"] for folder in claim.get("policies", [])]
        if any(file.exists() for file in files):
            claim |= from_tables(claim, [file for file in files if file.exists()])
    return claims


def from_tables(claim: dict, files: list[Path]) -> dict:
    """What another script has measured on saved policies: `numbers` and `seen`, and the figure of the first folder."""
    words = []
    for file in files:
        table = pd.read_csv(file)
        for column, value in claim["where"].items():
            table = table[table[column] == value]
        for row in table.to_dict("records"):
            more = f" (by chance {number(row['chance'])})" if "chance" in row else ""
            more += f" ({row['seeds']} seed{'s' * (row['seeds'] > 1)})" if "seeds" in row else ""
            words.append(f"`{row['label']}` {number(row[claim['column']])}{more}")
    figure = f"{files[0].parent.name}-{files[0].stem}"
    return {"numbers": "; ".join(words), "seen": "open (no test)", "figure": figure}


def with_tasks(claim: dict, data: Data) -> dict:
    """Adds what was run; until a task has LEAST seeds of both labels, what its table `instead` names has."""
    tasks = []
    parts = [claim, *(claim | part for part in claim.get("also", []))] if "folders" in claim else []
    for part, folder in [(each, name) for each in parts for name in each["folders"]]:
        sides = [labelled(data, folder, part["one"]), labelled(data, part.get("other_folder", folder), part["other"])]
        if not all(len(side.runs) for side in sides):
            continue
        comparable(*sides)
        one, other = (measures.of(side, part["measure"]) for side in sides)
        columns = [name for name in one if name in other]
        one, other = (relative_return(values[columns], data, folder) for values in (one, other))
        if len(one) and len(other):
            tasks.append(Task(folder, one, other, tuple(map(policy_name, sides)), part["measure"]))
    if "instead" in claim and not any(min(len(task.one), len(task.other)) >= LEAST for task in tasks):
        bare = {k: v for k, v in claim.items() if k not in ("instead", "also")}
        standing_in = with_tasks(bare | claim["instead"], data)
        if standing_in["tasks"] or not tasks:
            return standing_in
    return claim | {"tasks": tasks, "planned": sum(len(part["folders"]) for part in parts)}


def comparable(one: Data, other: Data):
    """Exits where the runs of two labels differ in the task, the steps or the evaluations; older ones lack flags."""
    for name in SAME:
        if name in one.args() and name in other.args() and one.args()[name] != other.args()[name]:
            first, second = (f"{side.folder()}/{side.runs.label.iloc[0]}: {side.args()[name]}" for side in (one, other))
            sys.exit(f"text/claims.toml compares runs of different --{name.replace('_', '-')}: {first}; {second}")


def labelled(data: Data, folder: str, label: str) -> Data:
    """The runs of a label; of FOLDER/PROTOCOL those of PROTOCOL-LABEL."""
    folder, _, protocol = folder.partition("/")
    return data.of(folder, f"{protocol}-{label}" if protocol else label)


def relative_return(values: pd.DataFrame, data: Data, folder: str) -> pd.DataFrame:
    """Returns of several tasks, each divided by that of an agent alone on it, and averaged; as they are without such.

    The label of that agent is `alone-` and the task.
    """
    folder = folder.partition("/")[0].removesuffix("-reversed")  # the order of the tasks is nothing to them
    alone = [data.of(folder, f"alone-{task.replace(' ', '_')}") for task in values]
    if len(alone) < 2 or not all(len(agent.runs) for agent in alone):
        return values
    constants = [measures.of(agent, "return at the end").iloc[:, 0].mean() for agent in alone]
    return (values / constants).mean(axis=1).to_frame("")


def describe(claim: dict):
    """Adds `compared`, `seen` and `numbers`."""
    tasks = claim["tasks"]
    if "folders" in claim:
        parts = [claim, *(claim | part for part in claim.get("also", []))]
        pairs = dict.fromkeys((part["one"], part["other"]) for part in parts)
        labels = claim.get("labels") or ", ".join(f"`{one}` and `{other}`" for one, other in pairs)
        claim["compared"] = f"{labels}: {' and '.join(dict.fromkeys(part['measure'] for part in parts))}"
    claim["seen"], claim["numbers"] = claim.get("seen", "not run yet"), "-"
    if not tasks:
        return
    policies = dict.fromkeys(p for task in tasks if task.measure in EVALUATED for p in task.policies)
    if policies:
        claim["compared"] += f" ({' and '.join(policies)})"
    claim["compared"] += f"; {', '.join(dict.fromkeys(task_name(task.folder) for task in tasks))}"
    if len(tasks) < claim["planned"]:
        claim["compared"] += f" ({len(tasks)} of {claim['planned']})"
    if claim["kind"] == "seen":
        describe_seen(claim)
        return
    claim["numbers"], claim["seen"] = differences(claim), "open"
    if claim["kind"] == "difference":
        claim["seen"] += " (no test)"
        return
    claim["numbers"] += f"; p {probability(claim['p'])}, corrected p {probability(claim['holm'])}"
    if claim["holm"] < LEVEL:
        up = stats.direction(claim["blocks"]) > 0
        claim["seen"] = "for" if claim["wanted"] == "different" or up == (claim["wanted"] == "higher") else "against"


def differences(claim: dict) -> str:
    """one - other and half its interval: of one task, of each where there is no test, else the mean over the tasks.

    Returns of target reaching may be near 0, so that no percentage of them means anything: of each task then, too.
    """
    tasks, texts = claim["tasks"], []
    near_zero = any(task.folder.startswith("TargetReaching") and task.measure in RETURNS for task in tasks)
    groups = [[task] for task in tasks] if claim["kind"] == "difference" or near_zero else [tasks]
    for group in groups:
        columns = list(group[0].one)
        relative = {task.measure for task in group} <= set(RETURNS) and columns == [""] and len(group) > 1
        pairs = stats.difference([(t.one.to_numpy(), t.other.to_numpy()) for t in group], relative)
        changes = [f"{name} {change(*pair, relative)}".strip() for name, pair in zip(columns, pairs, strict=True)]
        if len(group) == len(columns) == 1:
            means = (number(side.iloc[:, 0].mean()) for side in (group[0].one, group[0].other))
            changes[0] = f"{' and '.join(means)}, difference {changes[0]}"
        where = f"{task_name(group[0].folder)}: " * (len(groups) > 1)
        texts.append(where + ", ".join(changes))
    seeds = [f"{len(task.one)} + {len(task.other)}" for task in tasks]  # if they differ, in the order of the tasks
    if len(tasks) > 1 and len(set(seeds)) == 1:
        seeds = [f"{seeds[0]} seeds each"]
    else:
        seeds[-1] += " seeds"
    return f"{'; '.join(texts)}; {', '.join(seeds)}"


def describe_seen(claim: dict):
    """How many runs of either label are beyond the bound, and their range."""
    parts, shares = [], []
    word = "above" if claim["wanted"] == "higher" else "below"
    for side in ("one", "other"):
        values = np.concatenate([getattr(task, side).to_numpy().ravel() for task in claim["tasks"]])
        beyond = values > claim["bound"] if claim["wanted"] == "higher" else values < claim["bound"]
        shares.append(beyond.mean())
        span = " to ".join(dict.fromkeys(map(number, (values.min(), values.max()))))
        parts.append(f"`{claim[side]}` {span}, {beyond.sum()} of {len(values)} seeds {word} {claim['bound']:g}")
    claim["numbers"] = "; ".join(parts)
    if not any(min(len(task.one), len(task.other)) >= LEAST for task in claim["tasks"]):
        claim["seen"] = "open (no test)"
    elif shares[0] == 1 and shares[1] == (0 if claim.get("contrast", True) else 1):
        claim["seen"] = "for (no test)"
    else:
        claim["seen"] = "against (no test)" if shares[0] == 0 else "open (no test)"


def task_name(folder: str) -> str:
    """`Hopper-v5-ppo` -> `Hopper`, `MinAtar-own/continual` -> `MinAtar-own (continual)`; others as they are."""
    name, _, protocol = folder.partition("-v5")[0].partition("/")
    return f"{name} ({protocol})" if protocol else name


def change(estimate: float, half: float, percent: bool) -> str:
    """`+0.20 ± 0.45`, `−12% ± 8%`; without an interval where a label has one seed."""
    show = (lambda x: f"{100 * x:.0f}%") if percent else number
    interval = f" ± {show(half)}" if math.isfinite(half) else ""
    return f"{'−' if estimate < 0 else '+'}{show(abs(estimate))}{interval}"


def probability(p: float) -> str:
    """`= .0003`, `= .012`, `= 1`, `< .0001`."""
    if p < 0.0001:
        return "< .0001"
    return "= " + (f"{p:.4f}"[1:] if p < 0.001 else "1" if p > 0.9995 else f"{p:.3f}"[1:])

"""Numbers of each run, by name: what tables show and claims compare. One row per seed, one column per task."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
from reading import Data

LAST = 3  # evaluations whose mean is a last value
TRAINING = "charts/episodic_return"
CELL, EDGE = 0.5, 5.0  # side of a cell of target reaching's arena [-EDGE, EDGE]^2
TIME_LIMIT = 300  # steps of an episode there


def of(data: Data, name: str) -> pd.DataFrame:
    """A measure of one label: index seed, one column per task (named "" where there is one)."""
    function, *arguments = MEASURES[name]
    values = function(data, *arguments)
    if isinstance(values, pd.Series):
        values = values.to_frame("")
    return values.dropna().sort_index()


def evaluations(data: Data, policy: str | None = None) -> pd.DataFrame:
    """The evaluations of one policy, of the one that stands for the label by default."""
    policy = policy or data.runs.headline.iloc[0]
    return data.evals[data.evals.policy == policy].sort_values("global_step", kind="stable")


def per_task(data: Data, table: pd.Series) -> pd.DataFrame:
    """A series over (seed, task) as a table with the tasks in the order of the run."""
    wide = table.unstack("task")
    return wide[[task for task in data.tasks() or [""] if task in wide]]


def own_phase(data: Data, evals: pd.DataFrame) -> pd.DataFrame:
    """Of a continual run, each task's evaluations during its own last phase; of others all."""
    args, tasks = data.args(), data.tasks()
    if args.get("protocol") != "continual" or evals.empty:
        return evals
    phases = len(tasks) * args["cycles"]
    last = evals.task.map({task: phases - len(tasks) + i for i, task in enumerate(tasks)})
    done = evals.global_step / args["total_timesteps"] * phases - last  # share of the phase
    return evals[(done > 0.02) & (done < 1.02)]  # a phase ends with a whole rollout


def area(data: Data, column: str) -> pd.DataFrame:
    """Area under the learning curve divided by the steps: the mean of the evaluations, which are equally far apart.

    Those before the first update do not count.
    """
    evals = own_phase(data, evaluations(data))
    evals = evals[evals.global_step > data.args().get("learning_starts", 0)]
    return per_task(data, evals.groupby(["seed", "task"])[column].mean())


def end(data: Data, column: str, policy: str | None = None) -> pd.DataFrame:
    """Mean of the last three evaluations, or of as many as there are."""
    groups = evaluations(data, policy).groupby(["seed", "task"])[column]
    return per_task(data, groups.apply(lambda values: values.tail(LAST).mean()))


def end_of_phase(data: Data, column: str) -> pd.DataFrame:
    """The same at the end of each task's own phase."""
    groups = own_phase(data, evaluations(data)).groupby(["seed", "task"])[column]
    return per_task(data, groups.apply(lambda values: values.tail(LAST).mean()))


def first_success(data: Data) -> pd.Series:
    """Steps to the first evaluation with a success of at least one half; infinite if there is none."""
    evals = evaluations(data)
    if evals.success.isna().any():
        return pd.Series(np.nan, data.runs.seed)
    steps = evals[evals.success >= 0.5].groupby("seed").global_step.min()
    return steps.reindex(data.runs.seed).fillna(math.inf)


def training(data: Data, share: float = 1.0) -> pd.Series:
    """Mean return of the training episodes in the last `share` of a run, without the first point; NaN if not logged.

    The policy acts stochastically and learns meanwhile.
    """
    if TRAINING not in data.scalars or data.scalars[TRAINING].isna().all():
        return pd.Series(np.nan, data.runs.seed)
    points = []
    for seed, run in data.scalars.groupby("seed"):
        steps, returns = run.global_step.to_numpy()[1:], run[TRAINING].interpolate().to_numpy()[1:]
        points.append((seed, returns[steps > (1 - share) * steps[-1]].mean()))
    return pd.Series(dict(points))


def logged(data: Data, name: str, when: str = "end") -> pd.Series:
    """A curve of scalars.csv at the end, or its median; the gate's entropy as a share of the largest of K experts."""
    if name not in data.scalars or name.startswith("moe/") and data.experts() == 1:
        return pd.Series(np.nan, data.runs.seed)
    curves = data.scalars.sort_values("global_step", kind="stable").groupby("seed")[name]
    values = curves.last() if when == "end" else curves.median()
    return values / (math.log(data.experts()) if name == "moe/gate_entropy" else 1)


def measured(data: Data, network: str, metric: str, item: str = "", last: int = LAST) -> pd.Series:
    """Mean of the last measurements of a network on the states of all tasks (a cosine: over the pairs of tasks)."""
    rows = data.moe[(data.moe.network == network) & (data.moe.metric == metric)]
    rows = rows[rows.task.isna()] if metric != "cosine" else rows
    rows = rows[rows["item"] == item] if item else rows
    curves = rows.groupby(["seed", "global_step"]).value.mean().groupby("seed")
    return curves.apply(lambda values: values.tail(last).mean()) if len(rows) else pd.Series(np.nan, data.runs.seed)


def rank(data: Data, network: str) -> pd.Series:
    """Effective rank of the last layer's input, divided by its width."""
    return measured(data, network, "rank") / measured(data, network, "width")


def in_use(data: Data, column: str) -> pd.Series:
    """Of PQN, whose eval.csv has these columns: share of dormant units, and effective rank divided by its width."""
    if column not in data.evals:
        return pd.Series(np.nan, data.runs.seed)
    args = data.args()
    widths = {"none": 128, "wide": 128 * args.get("widen", 1)}  # what the last layer sees; else 64 tokens of 16
    width = widths.get(args.get("moe", "none"), 1024) if column == "rank" else 1
    return end(data, column)[""] / width


def cells(data: Data) -> pd.Series:
    """Share of the arena's cells that were seen: in the first 10,000 steps or, of runs that lack this, by the policy
    (not by random actions) in every tenth of the first 20,000."""
    paths = data.paths[data.paths.panel == "cells"]
    if paths.empty:
        paths = data.paths[data.paths.panel == "exploration"]
        paths = paths[paths.step >= data.args().get("learning_starts", 0)]
    seen = pd.DataFrame({"seed": paths.seed, "x": paths.x // CELL, "y": paths.y // CELL}).drop_duplicates()
    return seen.groupby("seed").size() / (2 * EDGE / CELL) ** 2


def episodes(data: Data, panel: str) -> list[tuple[int, pd.DataFrame, bool]]:
    """Seed, path and whether it ends in the target, of every episode of a panel of trajectories.csv."""
    found = []
    for (seed, _), path in data.paths[data.paths.panel == panel].groupby(["seed", "episode"]):
        target = data.layout[(data.layout.seed == seed) & (data.layout.thing == "target")].iloc[0]
        distance = math.hypot(path.x.iloc[-1] - target.x, path.y.iloc[-1] - target.y)
        found.append((seed, path, bool(distance <= target.radius + 0.01)))  # positions are rounded to 0.01
    return found


def left(path: pd.DataFrame) -> bool:
    """On which side of the line from its start to its end an episode gets farthest away from it."""
    points = path[["x", "y"]].to_numpy(float)
    way, offsets = points[-1] - points[0], points - points[0]
    across = way[0] * offsets[:, 1] - way[1] * offsets[:, 0]  # positive: left of the way
    return bool(across[np.abs(across).argmax()] > 0)


def ways(data: Data) -> pd.Series:
    """On how many sides the stochastic episodes that arrive pass the obstacles: 0, 1 or 2."""
    sides = {}
    for seed, path, arrives in episodes(data, "stochastic"):
        sides.setdefault(seed, set()).update([left(path)] * arrives)
    return pd.Series({seed: len(found) for seed, found in sides.items()}, dtype=float)


def side_entropy(data: Data) -> pd.Series:
    """Entropy of the side that the stochastic policy takes on the mirror layout, where it arrives often enough."""
    return data.sides[data.sides.policy == "stochastic"].set_index("seed").entropy.astype(float)


MEASURES: dict[str, tuple[Callable, ...]] = {
    "area": (area, "return"),
    "area of success": (area, "success"),
    "return at the end": (end, "return"),
    "success at the end": (end, "success"),
    "stochastic return": (end, "return", "stochastic"),
    "greedy return": (end, "return", "deterministic"),
    "stochastic success": (end, "success", "stochastic"),
    "return at the end of its phase": (end_of_phase, "return"),
    "steps to the first success": (first_success,),
    "area of training": (training,),
    "training at the end": (training, 0.1),
    "sigma": (logged, "policy/std"),
    "temperature": (logged, "policy/alpha"),
    "distance of two experts": (logged, "moe/expert_distance"),
    "entropy of the gate": (logged, "moe/gate_entropy"),
    "KL per rollout": (logged, "policy/kl", "median"),
    "clipped": (logged, "policy/clipped", "median"),
    "dormant": (in_use, "dormant"),
    "rank / width": (in_use, "rank"),
    "cells seen": (cells,),
    "ways": (ways,),
    "entropy of the side": (side_entropy,),
}
SHARES = ("area of success", "success at the end", "stochastic success", "entropy of the gate", "clipped", "cells seen")
SHARES += ("entropy of the side",)
for _network in ("actor", "critic"):
    MEASURES |= {
        f"dormant, {_network}": (measured, _network, "dormant_0.025", "total"),
        f"rank / width, {_network}": (rank, _network),
        f"features' norm, {_network}": (measured, _network, "norm"),
        f"gradients' cosine, {_network}": (measured, _network, "cosine"),
    }

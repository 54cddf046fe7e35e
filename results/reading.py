"""Reads the finished runs under results/runs into tables: one row per run, evaluation, logged point or position."""

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

import pandas as pd

TEXT = Path(__file__).parent / "text"  # what is written by hand
KEYS = ["folder", "label", "seed"]
PQN = ("pqn", "pqn_moe")
MIXTURES = ("sac_pmoe", "ppo_pmoe")  # scripts with runs from before evaluations had the mode `gate`


@dataclasses.dataclass(frozen=True)
class Data:
    """Tables that all have the columns folder, label and seed; an empty one, too."""

    runs: pd.DataFrame  # run.json: script, command, args (a dict), commit, ..., and headline: see headline()
    evals: pd.DataFrame  # eval.csv; task is its name, "" where a run has one task
    scalars: pd.DataFrame  # scalars.csv
    moe: pd.DataFrame  # moe.csv: global_step, network, metric, task, item, value
    paths: pd.DataFrame  # trajectories.csv: panel, episode, step, x, y, expert
    layout: pd.DataFrame  # layout.csv: thing, x, y, radius
    gait: pd.DataFrame  # gait.csv
    sides: pd.DataFrame  # sides.csv
    history: pd.DataFrame  # side_history.csv
    routing: pd.DataFrame  # routing.csv

    def of(self, folder: str, label: str | None = None) -> "Data":
        """The rows of one folder, or of one label in it."""
        part = self.by_folder.get(folder, self.none)
        return part if label is None else part.by_label.get(label, self.none)

    def where(self, column: str, values: list) -> "Data":
        """The rows that have one of the values."""
        return self.each(lambda table: table[table[column].isin(values)])

    def each(self, function) -> "Data":
        """The same function of every table."""
        return Data(*(function(getattr(self, field.name)) for field in dataclasses.fields(self)))

    @functools.cached_property
    def by_folder(self) -> dict[str, "Data"]:
        return self.split("folder")

    @functools.cached_property
    def by_label(self) -> dict[str, "Data"]:
        """Of the runs of one folder."""
        return self.split("label")

    def split(self, column: str) -> dict[str, "Data"]:
        """Value of a column -> its rows, in the order of the runs."""
        groups = [dict(list(getattr(self, f.name).groupby(column))) for f in dataclasses.fields(self)]
        tables = [getattr(self.none, f.name) for f in dataclasses.fields(self)]
        return {
            value: Data(*(group.get(value, empty) for group, empty in zip(groups, tables, strict=True)))
            for value in self.runs[column].unique()
        }

    @functools.cached_property
    def none(self) -> "Data":
        """No rows."""
        return self.each(lambda table: table.iloc[:0])

    def folder(self) -> str:
        """That of the first run."""
        return self.runs.folder.iloc[0]

    def args(self) -> dict:
        """Arguments of the first run."""
        return self.runs.args.iloc[0]

    def experts(self) -> int:
        """K of the first run, 1 without a mixture; of agents of several tasks, whose layers have experts, 1."""
        args = self.args()
        plain = "tasks" in args or args.get("moe") in ("none", "wide", "tokens")
        return 1 if plain else args.get("num_experts", args.get("num_options", 1))

    def tasks(self) -> list[str]:
        """Names of the tasks of the first run, none where it has one."""
        return [short(task) for task in self.args().get("tasks", [])]


FILES = {"evals": "eval.csv", "scalars": "scalars.csv", "moe": "moe.csv", "paths": "trajectories.csv"}
FILES |= {"layout": "layout.csv", "gait": "gait.csv"}
FILES |= {"sides": "sides.csv", "history": "side_history.csv", "routing": "routing.csv"}
COLUMNS = {"runs": ["script"], "evals": ["global_step", "policy", "task", "return", "success"]}
COLUMNS |= {"scalars": ["global_step"], "moe": ["global_step", "network", "metric", "task", "item", "value"]}
COLUMNS |= {"paths": ["panel", "episode", "step", "x", "y", "expert"], "layout": ["thing", "x", "y", "radius"]}
COLUMNS |= {"gait": ["policy", "episode", "return", "upright"], "history": ["step", "q_left", "q_right", "alpha"]}
COLUMNS |= {"sides": ["policy", "success", "left", "right", "entropy", "p_left", "modes", "gate"]}
COLUMNS |= {"routing": ["network", "dispatch", "combine", "tokens", "slots"]}


def natural(path: Path | str) -> list:
    """Key to sort by: 16 experts come after 2."""
    return [[int(word) if word.isdigit() else word for word in re.split(r"(\d+)", part)] for part in Path(path).parts]


def kind(label: str) -> str:
    """A label without its protocol."""
    return label.removeprefix("multitask-").removeprefix("continual-")


def short(task: str) -> str:
    """`moe_envs:TargetReaching-v0?layout=task1&obstacle_penalty=-10` -> `task1`."""
    name, _, query = task.partition("?")
    words = [w for w in query.split("&") if not w.startswith(("obstacle_penalty", "speed_bonus"))]
    return " ".join(words).replace("layout=", "").replace("=True", "") if query else name.replace("_", " ")


def read(root: Path) -> Data:
    """The finished runs that were evaluated. Exits where runs of one label differ in more than the seed."""
    tables, settings = {name: [] for name in COLUMNS}, {}
    fixed = pd.read_csv(TEXT / "layout.csv")  # of paths from before there was a layout.csv
    for path in sorted((root / "runs").glob("*/*/*/run.json"), key=natural):
        info = json.loads(path.read_text())
        if info.get("global_step", 0) < info["args"]["total_timesteps"]:
            print(f"left out, not finished: {path.parent}", file=sys.stderr)
            continue
        if not (path.parent / FILES["evals"]).exists():
            print(f"left out, without {FILES['evals']}: {path.parent}", file=sys.stderr)
            continue
        key = {"folder": path.parts[-4], "label": path.parts[-3], "seed": info["args"]["seed"]}
        check(info, settings.setdefault((key["folder"], key["label"]), {}), key)
        tables["runs"].append(pd.DataFrame([key | info]))
        for name, file in FILES.items():
            if (path.parent / file).exists():
                tables[name].append(pd.read_csv(path.parent / file).assign(**key))
        if (path.parent / FILES["paths"]).exists() and not (path.parent / FILES["layout"]).exists():
            tables["layout"].append(fixed.assign(**key))
        evals = tables["evals"][-1]
        tasks = info["args"].get("tasks", [])
        evals["task"] = [short(tasks[i]) for i in evals["task"]] if "task" in evals else ""
    frames = {}
    for name, columns in COLUMNS.items():
        found = tables[name]
        frame = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=KEYS + columns)
        frames[name] = frame.assign(**{c: pd.NA for c in columns if c not in frame})
    data = share(Data(**frames))
    known = {label: i for i, label in enumerate(pd.read_csv(TEXT / "labels.csv").label)}  # others come last

    def place(i: int) -> tuple:
        folder, label, seed = data.runs.loc[i, KEYS]
        return natural(folder), known.get(kind(label), len(known)), natural(label), seed

    runs = data.runs.loc[sorted(data.runs.index, key=place)].reset_index(drop=True)
    return dataclasses.replace(data, runs=runs.assign(headline=headline(runs, data.evals)))


def check(info: dict, settings: dict, key: dict):
    """Runs of one label have one protocol; an older one may lack a flag: its script did then what the default does."""
    own = ("seed", "run_dir", "resume", "evaluate", "video")
    for name, value in ({"script": info["script"]} | info["args"]).items():
        if name not in own and settings.setdefault(name, value) != value:
            both = f"--{name.replace('_', '-')} is {value} and {settings[name]}"
            sys.exit(f"{key['folder']}/{key['label']}: {both}; runs of one label may differ in nothing but the seed")


def share(data: Data) -> Data:
    """Adds labels that stand for runs of another folder, made by the same command: text/shared.csv."""
    for row in pd.read_csv(TEXT / "shared.csv").itertuples():
        if row.folder in set(data.runs.folder):
            other = data.of(row.other_folder, row.other_label)
            new = other.each(lambda table, row=row: table.assign(folder=row.folder, label=row.label))
            both = ([getattr(part, f.name) for part in (data, new)] for f in dataclasses.fields(Data))
            data = Data(*(pd.concat(tables, ignore_index=True) for tables in both))
    return data


def headline(runs: pd.DataFrame, evals: pd.DataFrame) -> list[str]:
    """The policy whose evaluations stand for a run: `gate` if every run of its label has it, else `deterministic`.

    Of PQN `stochastic`: its greedy episodes of Space Invaders are all equal, those of Breakout two different ones.
    """
    having = set(evals[evals.policy == "gate"][KEYS].itertuples(index=False, name=None))
    gate = pd.Series([key in having for key in runs[KEYS].itertuples(index=False, name=None)], runs.index, dtype=bool)
    every = gate.groupby([runs.folder, runs.label]).transform("all") if len(runs) else gate
    names = zip(runs.script, every, strict=True)
    return ["stochastic" if script in PQN else "gate" if g else "deterministic" for script, g in names]


def policy_name(data: Data) -> str:
    """In words, the policy whose evaluations stand for a label."""
    script = data.runs.script.iloc[0]
    if data.runs.headline.iloc[0] == "gate":
        return "gate"
    if script in PQN:
        return "epsilon-greedy"
    if script == "ppo_moe_multitask":
        return "likeliest action"
    return "likeliest expert" if script in MIXTURES and data.experts() > 1 else "mean action"

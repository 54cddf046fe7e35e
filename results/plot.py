"""Writes every figure (results/figures/*.png) and results/README.md from results/runs.

python results/plot.py

Reads run.json, eval.csv and, where there are, scalars.csv, trajectories.csv and moe.csv of each finished run; the
labels are the folders found. The same runs give the same files, byte for byte. results/findings.md, with what we make
of it and the times that results/speed.py printed, is written by hand and copied in.
"""

import csv
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

DPI = 150
WIDTH = 8  # inches; 1200 pixels, shown at about 800
RESAMPLES = 10_000
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MARKERS = "osD^vPX"
PPO_LABELS = ("ppo", "ppo_pmoe-both", "ppo_pmoe-frequency", "ppo_pmoe-ppo", "ppo_pmoe-means")  # one look in all figures
POLICY_STEPS = "#0072B2"
RANDOM_STEPS = "#BBBBBB"

# The fixed layout of TargetReaching
START, TARGET, TARGET_RADIUS, EDGE, TIME_LIMIT = (-4.5, -4.5), (3, 3), 0.5, 5, 300
OBSTACLES, OBSTACLE_RADIUS = ((-2.5, -2.5), (-3, -0.5), (-0.5, -3)), 0.6

PICTURE = ("TargetReaching-v0-fixed", "sac_pmoe", 5)  # folder, label and seed of the README's picture

NOTES = {
    "TargetReaching-v0-fixed": """
The layout and the start never change and nothing in the environment is random: the ten deterministic episodes of one
evaluation are one episode, and a seed's deterministic success is 0 or 1. The return alone misleads: flying about for
300 steps pays up to 0.3 sqrt(2) 300 = 127 (discounted 42), reaching the target pays 100 beside what was flown on the
way, an obstacle or the wall costs 10.
""",
    "HalfCheetah-v5": """
**Published SAC on HalfCheetah.** None of these rows is at the step count of our runs, so none of them is a target to
reach here; they are what training goes on to.

| source | version | steps | seeds | return | what is measured |
|---|---|---:|---:|---:|---|
| CleanRL documentation | v4 | 1,000,000 | 3 | 9635 ± 1424 | training episodes, stochastic policy, last 100 |
| RL Baselines3 Zoo | v3 | 1,000,000 | 1 | 9536 | deterministic policy |
| SLM-Lab 5.2 | v5 | 4,000,000 | 4 | 9815 | training episodes, stochastic policy |
| SAC paper, read off its figure by Tianshou | not said | 1,000,000 | 5 | about 10400 | not said |

Our runs stop at 100,000 steps. What they can be held against are published learning curves at that point, where SAC
commonly lies between 3,000 and 5,500; that is read off figures, and we know no table at 100,000 steps. The rewards of
HalfCheetah are the same in v4 and v5.
""",
}

PUBLISHED_PPO = (  # source, version, steps, seeds, what is measured, {task: return}
    ("CleanRL documentation", "v4", "1,000,000", 3, "training episodes, stochastic policy, last 100",
     {"Hopper": "2383 ± 272", "Walker2d": "2288 ± 572", "HalfCheetah": "1443 ± 46", "Humanoid": "716 ± 49"}),
    ("CleanRL documentation, page of RPO", "v4", "8,000,000", 10, "training episodes, stochastic policy, last 100",
     {"Hopper": "2741 ± 269", "Walker2d": "2873 ± 691", "HalfCheetah": "2637 ± 1068", "Ant": "1824 ± 906",
      "Humanoid": "583 ± 28", "HumanoidStandup": "109326 ± 16162"}),
    ("RL Baselines3 Zoo, tuned", "v3", "1,000,000", 1, "deterministic policy",
     {"Hopper": "2410", "Walker2d": "3479", "HalfCheetah": "5819", "Ant": "1327"}),
    ("SLM-Lab 5.2", "v5", "4,000,000", 4, "training episodes, stochastic policy",
     {"Hopper": "1654", "HumanoidStandup": "150105"}),
    ("SLM-Lab 5.2", "v5", "10,000,000", 4, "training episodes, stochastic policy",
     {"Walker2d": "4379", "HalfCheetah": "6241", "Ant": "2138", "Humanoid": "2661"}),
)  # fmt: skip


def published_ppo(task: str) -> str:
    lines = [f"**Published PPO on {task}.**", "", "| source | version | steps | seeds | return | what is measured |"]
    lines += ["|---|---|---:|---:|---:|---|"]
    for source, version, steps, seeds, measured, returns in PUBLISHED_PPO:
        if task in returns:
            lines.append(f"| {source} | {version} | {steps} | {seeds} | {returns[task]} | {measured} |")
    lines += ["", "The rewards of v4 and v5 are "]
    lines[-1] += {
        "HalfCheetah": "equal.",
        "HumanoidStandup": "equal.",
        "Hopper": "equal but for 1 per fall.",
        "Humanoid": "nearly equal, a little less in v5.",
        "Walker2d": "equal but for 1 per fall, but v4's right foot slides more (friction 0.9, in v5 1.9).",
    }.get(task, "not comparable here.")
    return "\n".join(lines)


NOTES["TargetReaching-v0-8-tasks"] = """
Nothing in these layouts is random: all deterministic episodes of one task are one episode, and a seed's success is 0 or
1 for each task. Layouts 0 to 3 come twice, the second time with inverted actions. In these runs the weights of the
critic are the means of both critics' routers, which have nothing in common; runs made since then log the first's.
"""
EXPERTS = "HalfCheetah-v5-experts"
MUJOCO = ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "HumanoidStandup")
NOTES |= {f"{task}-v5-ppo": published_ppo(task) for task in MUJOCO}


class Run(NamedTuple):
    seed: int
    info: dict  # run.json
    evals: dict[str, np.ndarray]  # policy -> (evaluations, 3): global step, return, success
    trajectories: dict[str, np.ndarray]  # panel -> (rows, 4): episode, step, x, y
    scalars: dict[str, np.ndarray]  # curve -> (points,); "global_step" is one of them
    moe: list[dict]  # rows of moe.csv, with float global_step and value; only of several tasks


# Reading


def read_run(folder: Path) -> Run:
    info = json.loads((folder / "run.json").read_text())
    evals, trajectories = {}, {}
    with open(folder / "eval.csv") as file:
        for row in csv.DictReader(file):
            values = [float(row[c]) for c in ("global_step", "return", "success")]
            evals.setdefault(row["policy"] + row.get("task", ""), []).append(values)  # deterministic0 where T tasks
    if (folder / "trajectories.csv").exists():
        with open(folder / "trajectories.csv") as file:
            for row in csv.DictReader(file):
                values = [float(row[c]) for c in ("episode", "step", "x", "y")]
                trajectories.setdefault(row["panel"], []).append(values)
    moe = []
    if (folder / "moe.csv").exists():
        with open(folder / "moe.csv") as file:
            moe = [
                {**row, "global_step": int(row["global_step"]), "value": float(row["value"])}
                for row in csv.DictReader(file)
            ]
    scalars = {}
    if (folder / "scalars.csv").exists():
        with open(folder / "scalars.csv") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    scalars.setdefault(name, []).append(float(value))
    arrays = ({k: np.array(v) for k, v in rows.items()} for rows in (evals, trajectories, scalars))
    return Run(info["args"]["seed"], info, *arrays, moe)


def natural(path: Path) -> list:
    """Key to sort by: 16 experts come after 2."""
    return [[int(word) if word.isdigit() else word for word in re.split(r"(\d+)", part)] for part in path.parts]


def read_runs(root: Path) -> dict[str, dict[str, list[Run]]]:
    """environment -> label -> its finished runs by seed. The runs of one label may differ in nothing but the seed."""
    runs = {}
    for path in sorted(root.glob("*/*/*/run.json"), key=natural):
        info = json.loads(path.read_text())
        if info.get("global_step", 0) < info["args"]["total_timesteps"]:
            print(f"left out, not finished: {path.parent}", file=sys.stderr)
            continue
        run = read_run(path.parent)
        runs.setdefault(path.parts[-4], {}).setdefault(path.parts[-3], []).append(run)
    for env, labels in runs.items():
        for label, group in labels.items():
            group.sort(key=lambda run: run.seed)
            settings = {}
            for run in group:  # an older run may lack a flag: its script did then what the default does now
                for name, value in protocol(run).items():
                    if settings.setdefault(name, value) != value:
                        both = f"--{name.replace('_', '-')} is {value} and {settings[name]}"
                        sys.exit(f"{env}/{label}: {both}; runs of one label may differ in nothing but the seed")
    return runs


def protocol(run: Run) -> dict:
    own = ("seed", "run_dir", "resume", "evaluate", "video")
    return {"script": run.info["script"]} | {k: v for k, v in run.info["args"].items() if k not in own}


# Statistics


def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile mean over axis 0: the mean without the floor(n / 4) lowest and highest of n, as in rliable.

    So 5 seeds lose two and 3 seeds lose none: with fewer than 4 it is the mean.
    """
    cut = len(values) // 4
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(0)


def mean(values: np.ndarray) -> np.ndarray:
    return values.mean(0)


def interval(values: np.ndarray, statistic=iqm) -> np.ndarray:
    """95% interval of a statistic of `values` (n, ...) -> (2, ...): percentile bootstrap that draws n seeds out of n.

    Stratified: environment and label are the strata, each call draws within one. A drawn seed brings its whole curve.
    """
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    statistics = statistic(np.moveaxis(values[drawn], 1, 0))  # (RESAMPLES, ...)
    return np.percentile(statistics, (2.5, 97.5), axis=0)


def curve(group: list[Run], column: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) and the deterministic evaluations of every seed (n, T); column 1 is the return, 2 the success."""
    evals = [run.evals["deterministic"] for run in group]
    return evals[0][:, 0], np.stack([e[:, column] for e in evals])


def final(group: list[Run], policy: str, column: int) -> np.ndarray:
    """The last evaluation of every seed (n,)."""
    return np.array([run.evals[policy][-1, column] for run in group])


def area(group: list[Run]) -> np.ndarray:
    """That under the deterministic learning curve of every seed, divided by the steps (n,): mean of its evaluations."""
    return curve(group, 1)[1].mean(1)


TRAINING = "charts/episodic_return"  # in scalars.csv


def training(group: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) and the mean returns of the training episodes since the point before, of every seed (n, T).

    The policy acted stochastically and learned meanwhile. The first point, one rollout, is left out.
    """
    steps, curves = group[0].scalars["global_step"][1:], []
    for run in group:
        seen = np.isfinite(run.scalars[TRAINING])
        curves.append(np.interp(steps, run.scalars["global_step"][seen], run.scalars[TRAINING][seen]))
    return steps, np.stack(curves)


def end_of_training(group: list[Run]) -> np.ndarray:
    """Mean return of the training episodes of the last 100,000 steps of every seed (n,)."""
    steps, returns = training(group)
    return returns[:, steps > steps[-1] - 100_000].mean(1)


def has_training(labels: dict[str, list[Run]]) -> bool:
    return all(TRAINING in run.scalars for group in labels.values() for run in group)


# Figures


def save(figure, path: Path):
    """Without the version of matplotlib in the file."""
    figure.savefig(path, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def style(labels: dict) -> dict[str, dict]:
    assert len(labels) <= len(COLOURS), f"more labels than colours: {', '.join(labels)}"
    order = PPO_LABELS if set(labels) <= set(PPO_LABELS) else list(labels)
    return {label: {"color": COLOURS[order.index(label)], "marker": MARKERS[order.index(label)]} for label in labels}


def plot_curves(labels: dict[str, list[Run]], path: Path):
    """Success, where the environment has one, and return over steps; return of the training episodes if it is known.

    Success is averaged plainly: it is 0 or 1 for most seeds, and an IQM would call 4 of 5 seeds 1.00.
    """
    known = has_training(labels)
    columns = [(lambda group: curve(group, 1), "return, deterministic" if known else "return of an episode", iqm)]
    if all(np.isfinite(final(group, "deterministic", 2)).all() for group in labels.values()):
        columns.insert(0, (lambda group: curve(group, 2), "success, deterministic" if known else "success", mean))
    columns += [(training, "return, training episodes", iqm)] * known
    apart = len(labels) > 2  # a panel for each, with its seeds: bands of more would hide each other
    shape = (len(columns), len(labels)) if apart else (1, len(columns))
    size = (WIDTH, 2 * len(columns) + 0.4 if apart else 3.6)
    figure, axes = plt.subplots(
        *shape, figsize=size, squeeze=False, sharex=apart, sharey="row" if apart else False, layout="constrained"
    )
    for i, (function, name, statistic) in enumerate(columns):
        for j, (label, look) in enumerate(style(labels).items()):
            axis = axes[i, j] if apart else axes[0, i]
            steps, values = function(labels[label])
            band(axis, steps, values, label, look | ({"marker": ""} if function is training else {}), statistic)
            if apart:
                if statistic is iqm and len(values) > 1:  # the success of a seed only jumps
                    axis.plot(steps / 1000, values.T, color="k", linewidth=0.4, alpha=0.6)
                axis.set_title(label if i == 0 else "", fontsize=8)
            else:  # where bands cover each other, their edges still tell them apart
                for edge in interval(values, statistic):
                    axis.plot(steps / 1000, edge, color=look["color"], linewidth=0.7, alpha=0.6)
            if statistic is mean:
                axis.set_ylim(-0.04, 1.04)
            axis.set_xlim(left=0)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
            if i == shape[0] - 1 or not apart:
                axis.set_xlabel("steps (thousands)", fontsize=8)
            if j == 0:
                axis.set_ylabel(name, fontsize=8)
    if not apart:
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False)
    save(figure, path)


def band(axis, steps: np.ndarray, values: np.ndarray, label: str, look: dict, statistic=iqm):
    """The statistic of values (n, E) over the seeds and its interval."""
    low, high = interval(values, statistic)
    dashes = "-" if len(values) > 1 else "--"
    axis.plot(steps / 1000, statistic(values), label=label, markersize=3, linestyle=dashes, **look)
    axis.fill_between(steps / 1000, low, high, color=look["color"], alpha=0.12, linewidth=0)


def plot_mujoco(runs: dict[str, dict[str, list[Run]]], of_training: bool, path: Path):
    """PPO's learning curves, a panel for each task; of the training episodes with what CleanRL's documentation has."""
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 5), layout="constrained")
    looks = style(dict.fromkeys(sorted({label for labels in runs.values() for label in labels})))
    for axis, task in zip(axes.flat, MUJOCO, strict=True):
        if f"{task}-v5-ppo" not in runs:
            axis.axis("off")
            continue
        for label, group in runs[f"{task}-v5-ppo"].items():
            look = looks[label] | ({"marker": ""} if of_training else {})
            band(axis, *(training(group) if of_training else curve(group, 1)), label, look)
        if of_training and task in PUBLISHED_PPO[0][-1]:
            axis.axhline(float(PUBLISHED_PPO[0][-1][task].split()[0]), color="k", linestyle=":", linewidth=1)
        axis.set_title(task, fontsize=9)
        axis.set_xlim(left=0)
        axis.set_xlabel("steps (thousands)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("return of an episode", fontsize=8)
    found = dict(pair[::-1] for axis in axes.flat[::-1] for pair in zip(*axis.get_legend_handles_labels(), strict=True))
    found = {label: found[label] for label in looks}
    figure.legend(found.values(), found, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    save(figure, path)


def is_experts(label: str) -> bool:
    """Whether a label only says the number of experts: ppo_pmoe-8."""
    return label.rpartition("-")[2].isdigit()


def plot_number_of_experts(labels: dict[str, list[Run]], path: Path):
    """Returns at the end over the number of experts K: of the training episodes, and of the deterministic policy."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.8), layout="constrained")
    numbers = [group[0].info["args"]["num_experts"] for group in labels.values()]
    for axis, name in zip(axes, ("return, last training episodes", "return, deterministic"), strict=True):
        for number, group in zip(numbers, labels.values(), strict=True):
            values = end_of_training(group) if axis is axes[0] else final(group, "deterministic", 1)
            middle, (low, high) = iqm(values), interval(values)
            errors = [[middle - low], [high - middle]]
            axis.errorbar(number, middle, errors, color=COLOURS[0], marker="_", markersize=12, capsize=3)
            axis.plot([number] * len(values), values, ".", color="k", markersize=4, alpha=0.6)
        axis.set_xscale("log", base=2)
        axis.set_xticks(numbers, map(str, numbers))
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        axis.set_xlabel("number of experts K", fontsize=8)
        axis.set_ylabel(name, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    save(figure, path)


LOGGED = {  # curve of scalars.csv -> its name here
    "policy/std": "sigma",
    "policy/alpha": "temperature",
    "moe/expert_distance": "distance of two experts",
    "moe/gate_entropy": "entropy of the gate / ln K",
}


def logged(run: Run, name: str) -> np.ndarray | None:
    """A curve of scalars.csv, None if it has none; the gate's entropy as a share of the largest of K experts."""
    number = run.info["args"].get("num_experts", 1)
    if name not in run.scalars or number == 1 and name.startswith("moe/"):
        return None
    return run.scalars[name] / (math.log(number) if name == "moe/gate_entropy" else 1)


def plot_scalars(labels: dict[str, list[Run]], path: Path):
    """How wide, how warm and how different the experts are over the steps."""
    names = {k: v for k, v in LOGGED.items() if any(k in group[0].scalars for group in labels.values())}
    figure, axes = plt.subplots(1, len(names), figsize=(WIDTH, 2.5), squeeze=False, layout="constrained")
    for axis, (name, title) in zip(axes[0], names.items(), strict=True):
        for label, look in style(labels).items():
            if logged(labels[label][0], name) is not None:
                steps = labels[label][0].scalars["global_step"]
                curves = [(run.scalars["global_step"], logged(run, name)) for run in labels[label]]
                values = np.stack([np.interp(steps, *curve) for curve in curves])  # a resumed run has other steps
                band(axis, steps, values, label, {"color": look["color"]})
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("steps (thousands)", fontsize=8)
        axis.set_ylim(0, 1.04 if name == "moe/gate_entropy" else None)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    handles, texts = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    save(figure, path)


def table_of_scalars(labels: dict[str, list[Run]]) -> list[str]:
    """The ends of those curves."""
    lines = ["| at the end, lowest to highest seed | seeds | " + " | ".join(LOGGED.values()) + " |"]
    lines += ["|---" * (2 + len(LOGGED)) + "|"]
    for label, group in labels.items():
        curves = [[logged(run, name) for run in group] for name in LOGGED]
        ends = [sorted(values[-1] for values in several if values is not None) for several in curves]
        cells = [f"{e[0]:.3f} to {e[-1]:.3f}" if len(e) > 1 else f"{e[0]:.3f}" if e else "-" for e in ends]
        lines.append(f"| {label} | {len(group)} | " + " | ".join(cells) + " |")
    return lines


def grid(titles: list[str], columns: int):
    """A figure of square maps of the arena with these titles, and its axes."""
    rows = math.ceil(len(titles) / columns)
    size = WIDTH / columns
    shape = {"figsize": (WIDTH, rows * (size + 0.3) + 0.4), "squeeze": False, "layout": "compressed"}
    figure, axes = plt.subplots(rows, columns, **shape)
    for i, axis in enumerate(axes.flat):
        if i >= len(titles) or titles[i] is None:
            axis.axis("off")
            continue
        axis.set_title(titles[i], fontsize=8)
        axis.add_patch(plt.Circle(TARGET, TARGET_RADIUS, color="#9ED8AC", zorder=0))
        for centre in OBSTACLES:
            axis.add_patch(plt.Circle(centre, OBSTACLE_RADIUS, color="#777777", zorder=0))
        axis.plot(*START, "k+", markersize=7)
        axis.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), aspect="equal", xticks=(-5, 0, 5), yticks=(-5, 0, 5))
        axis.tick_params(labelsize=8)
        if i % columns == 0:
            axis.set_ylabel("y", labelpad=-4)
        if i + columns >= len(titles):
            axis.set_xlabel("x", labelpad=0)
    return figure, axes.flat


def reached(episode: np.ndarray) -> bool:
    """Whether an episode (rows, 4) ends in the target; positions are rounded to 0.01."""
    return bool(np.hypot(*(episode[-1, 2:] - TARGET)) <= TARGET_RADIUS + 0.01)


def episodes(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[rows[:, 0] == e] for e in np.unique(rows[:, 0])]


def sides(run: Run) -> set[bool]:
    """Sides of the diagonal on which the stochastic episodes leave the start's corner, each as it gets 4 away."""
    found = set()
    for episode in episodes(run.trajectories["stochastic"]):
        away = episode[np.hypot(*(episode[:, 2:] - START).T) > 4]
        found |= {bool(away[0, 3] > away[0, 2])} if len(away) else set()
    return found


def plot_trajectories(labels: dict[str, list[Run]], path: Path):
    """First seed of each label: the policy, then, in rows of their own, the experts of each mixture acting alone."""
    columns = min(max(len(labels), 4), 5)
    panels = [(label, "stochastic", label) for label in labels]
    panels += [None] * (-len(panels) % columns)
    for label, group in labels.items():
        experts = sorted((p for p in group[0].trajectories if p.startswith("expert_")), key=lambda p: int(p[7:]))
        panels += [(label, panel, f"{label}, expert {panel[7:]}") for panel in experts]
        panels += [None] * (-len(panels) % columns)
    while panels[-1] is None:
        panels.pop()
    draw_flights([panel and (panel[2], labels[panel[0]][0].trajectories[panel[1]]) for panel in panels], columns, path)


def plot_picture(run: Run, path: Path):
    """One run: the mixture and each of its experts."""
    experts = sorted(panel for panel in run.trajectories if panel.startswith("expert_"))
    panels = [("the mixture", run.trajectories["stochastic"])]
    panels += [(f"expert {panel[7:]} alone", run.trajectories[panel]) for panel in experts]
    draw_flights(panels, len(panels), path)


def draw_flights(panels: list[tuple[str, np.ndarray] | None], columns: int, path: Path):
    """A map for each (title, rows of trajectories.csv); an episode ends in a dot, a cross or a square, see caption."""
    flights = [panel and episodes(panel[1]) for panel in panels]
    titles = [
        panel and f"{panel[0]}\n{sum(map(reached, flown))} of {len(flown)} arrive"
        for panel, flown in zip(panels, flights, strict=True)
    ]
    figure, axes = grid(titles, columns)
    for flown, axis in zip(flights, axes, strict=False):
        for i, episode in enumerate(flown or []):
            axis.plot(*episode[:, 2:].T, color=plt.cm.viridis(i / len(flown)), linewidth=0.9)
            look = {"marker": "o", "color": "k", "markersize": 3}
            if not reached(episode):
                look = {"marker": "s" if episode[-1, 1] >= TIME_LIMIT else "X", "color": "#CC0000", "markersize": 5}
            look |= {"markeredgecolor": "w", "markeredgewidth": 0.5, "clip_on": False}
            axis.plot(*episode[-1, 2:], linestyle="", **look)
    save(figure, path)


def plot_exploration(labels: dict[str, list[Run]], path: Path):
    """Some seeds of each label: random steps in grey, then the policy's; the title counts the cells the policy saw."""
    titles = []
    for label, group in labels.items():
        cells = []
        for run in group:
            rows = run.trajectories["exploration"]
            rows = rows[rows[:, 1] >= run.info["args"]["learning_starts"], 2:]
            cells.append(len(np.unique(np.floor(rows * 2), axis=0)) / (4 * EDGE) ** 2)
        titles.append(f"{label}\npolicy in {np.mean(cells):.0%} of the cells")
    columns = min(max(len(labels), 2), 5)
    figure, axes = grid(titles, columns)
    for group, axis in zip(labels.values(), axes, strict=False):
        rows = np.concatenate([run.trajectories["exploration"] for run in group])
        random = rows[:, 1] < group[0].info["args"]["learning_starts"]
        for mask, colour, name in (
            (random, RANDOM_STEPS, "uniformly random actions"),
            (~random, POLICY_STEPS, "policy"),
        ):
            axis.scatter(*rows[mask, 2:].T, s=2, color=colour, alpha=0.5, linewidths=0, label=name)
    handles, names = axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, markerscale=5)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    save(figure, path)


# Text


def commits(runs: list[Run]) -> str:
    """`abc1234`, with + where the tree was not clean."""
    return ", ".join(sorted({(r.info["commit"] or "none")[:7] + "+" * bool(r.info["dirty"]) for r in runs}))


def seeds_of(labels: dict[str, list[Run]]) -> str:
    """A phrase for captions; one list if all labels have the same seeds."""
    lists = {label: ", ".join(str(run.seed) for run in group) for label, group in labels.items()}
    if len(set(lists.values())) == 1:
        return f"Seeds of each label: {next(iter(lists.values()))}."
    return "Seeds: " + "; ".join(f"{label} {numbers}" for label, numbers in lists.items()) + "."


def with_interval(values: np.ndarray, digits: int, statistic=iqm) -> str:
    if not np.isfinite(values).all():
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, high = interval(values, statistic)
    return f"{statistic(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(labels: dict[str, list[Run]]) -> list[str]:
    lines = [
        "| label | seeds | steps | return, deterministic | mean ± std | area | return, stochastic "
        "| success, det. | success, stoch. | steps/s | minutes | commit |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for label, group in labels.items():
        deterministic = final(group, "deterministic", 1)
        cells = [
            label,
            len(group),
            f"{group[0].info['global_step']:,}",
            with_interval(deterministic, 1),
            f"{deterministic.mean():.1f} ± {deterministic.std():.1f}" if len(group) > 1 else "-",
            with_interval(area(group), 1),
            with_interval(final(group, "stochastic", 1), 1),
            with_interval(final(group, "deterministic", 2), 2, mean),
            with_interval(final(group, "stochastic", 2), 2, mean),
            f"{np.median([run.info['steps_per_second'] for run in group]):.0f}",
            f"{np.median([run.info['wall_time'] for run in group]) / 60:.1f}",
            commits(group),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def section(env: str, labels: dict[str, list[Run]], figures: Path) -> list[str]:
    """Draws the figures of one environment and returns its part of README.md."""
    every = [run for group in labels.values() for run in group]
    commit = f"Commit {commits(every)}."
    drawn = []

    def figure(name: str, title: str, caption: str):
        drawn.extend([f"![{env}, {title}](figures/{name}.png)", "", f"*{caption} {commit}*", ""])

    if env.removesuffix("-v5-ppo") not in MUJOCO:  # those are in one figure of their own
        plot_curves(labels, figures / f"{env}.png")
        count = every[0].info["args"]["eval_episodes"]
        success = "mean of the success, " if np.isfinite(final(every, "deterministic", 2)).all() else ""
        text = f"{env}: deterministic policy, {count} episodes per evaluation. Lines: {success}interquartile mean "
        text += "(IQM) of the return over the seeds; bands: 95% bootstrap intervals. "
        if has_training(labels):
            text += "Training episodes: the policy as it acts. "
        figure(env, "learning curves", text + seeds_of(labels))
    if all(is_experts(label) for label in labels):
        plot_number_of_experts(labels, figures / f"{env}-number.png")
        text = "Return over the number of experts, of the training episodes of the last 100,000 steps (the policy as "
        text += "it acts) and of the deterministic policy at the end (the mean of the likeliest expert): dots are "
        text += f"seeds, bars the IQM and its 95% bootstrap interval. {seeds_of(labels)}"
        figure(f"{env}-number", "number of experts", text)

    flown = {label: group for label, group in labels.items() if "stochastic" in group[0].trajectories}
    if flown:
        plot_trajectories(flown, figures / f"{env}-trajectories.png")
        text = "The trained policies in the fixed layout (+ start, green target, grey obstacles). An episode ends in a "
        text += "dot in the target, a cross at an obstacle or the wall, a square at the time limit. Ten stochastic "
        text += "episodes of each policy, then five of each expert acting alone everywhere, with its own noise. "
        text += "One run of each label, its first seed "
        firsts = ", ".join(map(str, sorted({group[0].seed for group in flown.values()})))
        every_run = [run for group in flown.values() for run in group]
        both = sum(len(sides(run)) == 2 for run in every_run)
        text += f"({firsts}), not a chosen one. Runs whose ten stochastic episodes pass the obstacles on both sides: "
        figure(f"{env}-trajectories", "trajectories", f"{text}{both} of {len(every_run)}, all seeds counted.")
    for run in labels.get(PICTURE[1], []) if env == PICTURE[0] else []:
        if run.seed == PICTURE[2]:
            plot_picture(run, figures / f"{env}-experts.png")
            text = f"{PICTURE[1]}, seed {run.seed}, chosen because one of its experts goes round the other side: ten "
            figure(f"{env}-experts", "one mixture", f"{text}stochastic episodes, and five of each expert alone.")

    seen = {k: g for k, g in labels.items() if all("exploration" in run.trajectories for run in g)}
    if seen:
        shared = set.intersection(*({run.seed for run in group} for group in seen.values()))
        seen = {label: [run for run in group if run.seed in shared] for label, group in seen.items()}
        plot_exploration(seen, figures / f"{env}-exploration.png")
        text = "Where the first 20,000 training steps were (every 10th), the same seeds of each label together: 10,000 "
        text += "random ones, then the policy's first 10,000. The percentage is the share of the 400 cells of side 0.5 "
        text += "in which one run's policy was seen, mean over the seeds. "
        figure(f"{env}-exploration", "exploration", text + seeds_of(seen))

    logged = {k: g for k, g in labels.items() if all("policy/std" in run.scalars for run in g)}
    if any("moe/expert_distance" in group[0].scalars for group in logged.values()):
        plot_scalars(logged, figures / f"{env}-policies.png")
        text = "Means over the states of a batch: standard deviation of the policy's or the experts' Gaussians, "
        text += "temperature, distance between the actions that two experts mean, entropy of the gate. Lines: IQM over "
        figure(f"{env}-policies", "policies", f"{text}the seeds; bands: 95% bootstrap intervals. {seeds_of(logged)}")
        drawn.extend([*table_of_scalars(logged), ""])

    machines = sorted({run.info["machine"] for run in every})
    versions = sorted({", ".join(f"{k} {v}" for k, v in run.info["versions"].items()) for run in every})
    lines = [f"## {env}", "", *drawn, *table(labels), ""]
    lines += [f"Machine: {'; '.join(machines)}. Versions: {'; '.join(versions)}.", "", "```"]
    lines += [f"{group[0].info['command']}" for group in labels.values()]
    lines += ["```", ""]
    if env in NOTES:
        lines += [NOTES[env].strip(), ""]
    return lines


def section_of_mujoco(runs: dict[str, dict[str, list[Run]]], figures: Path) -> list[str]:
    """PPO and PPO-PMOE on all MuJoCo tasks: learning curves of both kinds, a table with a row per task and label."""
    every = [run for labels in runs.values() for group in labels.values() for run in group]
    lines = ["## PPO on MuJoCo", ""]
    ending = "Lines: interquartile mean (IQM) over the seeds; bands: 95% bootstrap intervals. Seeds and commands are "
    ending += f"in the sections below. Commit {commits(every)}."
    for of_training, name, text in (
        (True, "MuJoCo-ppo-training", "Training episodes: the policy as it acts, about 20,000 steps a point. Dotted: "
         "what CleanRL's documentation has at a million steps, the last 100 training episodes on v4 (Ant and "
         "HumanoidStandup: nothing); Walker2d is not quite the same task in v4."),
        (False, "MuJoCo-ppo", f"Deterministic policy (of a mixture: the mean of its likeliest expert), "
         f"{every[0].info['args']['eval_episodes']} episodes per evaluation."),
    ):  # fmt: skip
        plot_mujoco(runs, of_training, figures / f"{name}.png")
        alternative = f"PPO on MuJoCo, {'training episodes' if of_training else 'deterministic policy'}"
        lines += [f"![{alternative}](figures/{name}.png)", "", f"*{text} {ending}*", ""]
    lines += ["| task | label | K | seeds | deterministic, at the end | its area | training, last 100,000 steps |"]
    lines[-1] += " its area | published |"
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for task in MUJOCO:
        for label, group in runs.get(f"{task}-v5-ppo", {}).items():
            cells = [task, label, group[0].info["args"].get("num_experts", 1), len(group)]
            columns = [final(group, "deterministic", 1), area(group)]
            columns += [end_of_training(group), training(group)[1].mean(1)]
            cells += [*(with_interval(values, 0) for values in columns), PUBLISHED_PPO[0][-1].get(task, "-")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    text = "Published: CleanRL's documentation, PPO on v4, a million steps, last 100 training episodes, mean ± std of "
    return [*lines, "", text + "3 seeds. The area of training is the mean of its curve.", ""]


# Several tasks: runs of the multi-task scripts, which have a moe.csv


def measured(run: Run, network: str, metric: str, item: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Steps (E,) and values (E,) of one metric of one network: mean over pairs of tasks, or on the states of all."""
    rows = [r for r in run.moe if r["network"] == network and r["metric"] == metric and item in ("", r["item"])]
    rows = [r for r in rows if metric == "cosine" or r["task"] == ""]
    steps = sorted({r["global_step"] for r in rows})
    return np.array(steps), np.array([np.mean([r["value"] for r in rows if r["global_step"] == t]) for t in steps])


def panels(rows: int, columns: int, height: float):
    """A figure and its axes (rows, columns), which share the steps."""
    size = {"figsize": (WIDTH, rows * height + 0.6), "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, squeeze=False, sharex=True, **size)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("environment steps (thousands)", fontsize=8)
    return figure, axes


def short(task: str) -> str:
    """`moe_envs:TargetReaching-v0?layout=task1&obstacle_penalty=-10` -> `task1`."""
    name, _, query = task.partition("?")
    words = [
        w.removeprefix("layout=").replace("=True", "")
        for w in query.split("&")
        if not w.startswith(("obstacle_penalty", "speed_bonus"))
    ]
    return " ".join(words) if query else name


def mark_switches(axis, args: dict):
    """A dashed line where the continual protocol goes on to the next task."""
    phases = len(args["tasks"]) * args["cycles"] if args["protocol"] == "continual" else 1
    for switch in range(1, phases):
        axis.axvline(switch * args["total_timesteps"] / phases / 1000, color="k", linestyle="--", linewidth=0.7)


def plot_tasks(labels: dict[str, list[Run]], path: Path) -> bool:
    """Each task's return over the steps of all tasks; switches are dashed.

    If tasks have a success (the answer), that instead, and its mean over the tasks in a last panel.
    """
    args = next(iter(labels.values()))[0].info["args"]
    tasks = args["tasks"]
    success = all(np.isfinite(run.evals["deterministic0"][:, 2]).all() for group in labels.values() for run in group)
    titles = [*map(short, tasks), *["all tasks"] * success]
    columns = 3 if len(titles) % 3 == 0 else min(len(titles), 4)
    figure, axes = panels(math.ceil(len(titles) / columns), columns, 2.4)
    for i, (title, axis) in enumerate(zip(titles, axes.flat, strict=False)):
        shown = [i] if i < len(tasks) else range(len(tasks))
        for label, look in style(labels).items():
            evals = np.mean([[run.evals[f"deterministic{t}"] for t in shown] for run in labels[label]], axis=1)
            band(axis, evals[0, :, 0], evals[..., 1 + success], label, look, mean if success else iqm)
        mark_switches(axis, args)
        axis.set_title(title, fontsize=9)
        axis.axhline(0, color="k", linewidth=0.5)
        axis.set_ylim(*((-0.04, 1.04) if success else (None, max(1, axis.get_ylim()[1]))))
    for axis in axes.flat[len(titles) :]:
        axis.axis("off")
    axes[0, 0].set_ylabel("success" if success else "return")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8
    )
    save(figure, path)
    return success


def plot_networks(labels: dict[str, list[Run]], path: Path):
    """Dormant neurons, effective rank and norm of the features over the steps; actors above, critics below."""
    metrics = {"dormant_0.025": "share of dormant neurons", "rank": "effective rank", "norm": "norm of the features"}
    figure, axes = panels(2, 3, 2.4)
    for row, network in zip(axes, ("actor", "critic"), strict=True):
        for axis, (metric, name) in zip(row, metrics.items(), strict=True):
            for label, look in style(labels).items():
                item = "total" if metric.startswith("dormant") else ""
                curves = [measured(run, network, metric, item) for run in labels[label]]
                band(axis, curves[0][0], np.stack([values for _, values in curves]), label, look)
            axis.axhline(0, color="k", linewidth=0.5)
            mark_switches(axis, next(iter(labels.values()))[0].info["args"])
            axis.set_title(f"{network}, {name}", fontsize=9)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8
    )
    save(figure, path)


def routing(run: Run, network: str) -> np.ndarray | None:
    """The last weights (T, n) of the first router of a network, each row scaled to sum to 1; None without experts."""
    rows = [r for r in run.moe if r["network"] == network and r["metric"].startswith("router")]
    if not rows:
        return None
    first, last = min(r["metric"] for r in rows), max(r["global_step"] for r in rows)
    weights = np.zeros((len(run.info["args"]["tasks"]), run.info["args"]["num_experts"]))
    for r in rows:
        if r["metric"] == first and r["global_step"] == last:
            weights[int(r["task"]), int(r["item"])] = r["value"]
    return weights / weights.sum(1, keepdims=True)


def has_experts(group: list[Run]) -> bool:
    return any(routing(group[0], network) is not None for network in ("actor", "critic"))


def plot_experts(labels: dict[str, list[Run]], path: Path):
    """Expert by task at the end, first seed of each label: experts of several seeds have nothing in common."""
    groups = {label: group[0] for label, group in labels.items() if has_experts(group)}
    size = (WIDTH if len(groups) > 1 else WIDTH / 2, 3.6)
    figure, axes = plt.subplots(2, len(groups), figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for row, network in zip(axes, ("actor", "critic"), strict=True):
        for axis, (label, run) in zip(row, groups.items(), strict=False):
            weights = routing(run, network)
            if weights is None:
                continue
            axis.axis("on")
            axis.imshow(weights, vmin=0, vmax=1, cmap="Blues", aspect="auto")
            axis.set_title(f"{label.split('-', 1)[-1]}\n{network}", fontsize=8)
            axis.set(xticks=range(run.info["args"]["num_experts"]), yticks=range(len(weights)))
            tasks = map(short, run.info["args"]["tasks"])
            axis.set_yticklabels(tasks if axis is row[0] else [])
            axis.set_xlabel("expert" if network == "critic" else "", fontsize=7)
            axis.tick_params(labelsize=7)
            for (task, expert), weight in np.ndenumerate(weights):
                if weight >= 0.005:
                    colour = "white" if weight > 0.6 else "black"
                    text = {"ha": "center", "va": "center", "fontsize": 7 if len(groups) < 4 else 6, "color": colour}
                    axis.text(expert, task, f"{weight:.2f}", **text)
    save(figure, path)


def ends_of(group: list[Run], column: int, of_phases: bool = False) -> np.ndarray:
    """Return (1) or success (2) (n, T) at the end of the run, or of each task's own (last) phase."""
    args = group[0].info["args"]
    number, last = len(args["tasks"]), args["total_timesteps"] * (args["cycles"] - 1) / args["cycles"]
    rows = []
    for run in group:
        evals = [run.evals[f"deterministic{i}"] for i in range(number)]
        until = [args["total_timesteps"]] * number
        if of_phases:
            until = [last + (args["total_timesteps"] - last) * (i + 1) / number for i in range(number)]
        rows.append([e[e[:, 0] >= end - 0.5][0, column] for e, end in zip(evals, until, strict=True)])
    return np.array(rows)


def relative(ends: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns (n, T) of each label -> (n,): each divided by that of the label that is best in the task, mean over them.

    Returns of different games have different units; so none counts for more than the others.
    """
    best = np.max([iqm(values) for values in ends.values()], axis=0)
    return {label: (values / best).mean(1) for label, values in ends.items()}


def table_of_phases(labels: dict[str, list[Run]], column: int) -> list[str]:
    """continual: what each task had reached at the end of its own phase, and what is left of it at the end."""
    tasks = next(iter(labels.values()))[0].info["args"]["tasks"]
    digits, statistic = (2, mean) if column == 2 else (1, iqm)
    lines = ["| at the end of its phase -> of the run | " + " | ".join(map(short, tasks)) + " |"]
    lines += ["|---" * (1 + len(tasks)) + "|"]
    for label, group in labels.items():
        learned, left = (statistic(ends_of(group, column, of_phases)) for of_phases in (True, False))
        cells = (f"{a:.{digits}f} -> {b:.{digits}f}" for a, b in zip(learned, left, strict=True))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def table_of_tasks(labels: dict[str, list[Run]], column: int) -> list[str]:
    """Return (1) or success (2) of each task at the end, and the last of each measurement, actor / critic."""
    args = next(iter(labels.values()))[0].info["args"]
    continual = args["protocol"] == "continual"  # the mean is then that of what each task had reached in its phase
    heads = ["label", "seeds", *map(short, args["tasks"]), "mean" if column == 2 else "relative mean"]
    heads[-1] += " at the end of phases" * continual
    heads += ["area"] * (column == 2)
    heads += ["dormant", "rank", "features", "cosine", "parameters, millions", "active", "steps/s", "commit"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    digits, statistic = (2, mean) if column == 2 else (1, iqm)
    every = {label: ends_of(group, column, of_phases=continual) for label, group in labels.items()}
    means = {label: ends.mean(1) for label, ends in every.items()} if column == 2 else relative(every)
    for label, group in labels.items():
        cells = [label, len(group), *(with_interval(end, digits, statistic) for end in ends_of(group, column).T)]
        cells += [with_interval(means[label], 2, statistic)]
        if column == 2:
            tasks = [[run.evals[f"deterministic{i}"][:, 2] for i in range(len(args["tasks"]))] for run in group]
            cells += [with_interval(np.mean(tasks, axis=(1, 2)), 2, statistic)]
        metrics = (("dormant_0.025", "total", 2), ("rank", "", 0), ("width", "", 0), ("cosine", "", 2))
        for metric, item, places in metrics:
            last = [[measured(run, n, metric, item)[1] for run in group] for n in ("actor", "critic")]
            cells.append(
                " / ".join(f"{np.mean([v[-1] for v in values if len(v)] or np.nan):.{places}f}" for values in last)
            )
        counts = [group[0].info["parameters"][n] for n in ("actor", "critic")]
        cells += [" / ".join(f"{count[key] / 1e6:.3f}" for count in counts) for key in ("total", "active")]
        cells += [f"{np.median([run.info['steps_per_second'] for run in group]):.0f}", commits(group)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def by_architecture(labels: dict[str, list[Run]]) -> dict[str, dict[str, list[Run]]]:
    """A figure's worth of labels each: one architecture and the baseline; the key ends the name of its files."""
    groups, baseline = {}, {k: g for k, g in labels.items() if not has_experts(g)}
    for label, group in labels.items():
        if label not in baseline:
            args = group[0].info["args"]
            name = args["actor_moe"] if args["actor_moe"] != "baseline" else args["critic_moe"]
            groups.setdefault(f"-{name}", dict(baseline))[label] = group
    return groups if len(groups) > 1 else {"": labels}


def section_of_tasks(env: str, every: dict[str, list[Run]], figures: Path) -> list[str]:
    """Draws the figures of one set of tasks, protocol by protocol, and returns its part of README.md."""
    lines = [f"## {env}", ""]
    for protocol in sorted({group[0].info["args"]["protocol"] for group in every.values()}, reverse=True):
        labels = {k: group for k, group in every.items() if group[0].info["args"]["protocol"] == protocol}
        commit = f"Commit {commits([run for group in labels.values() for run in group])}."
        name, captions = f"{env}-{protocol}", {}
        for suffix, some in by_architecture(labels).items():
            success = plot_tasks(some, figures / f"{name}{suffix}.png")
            plot_networks(some, figures / f"{name}{suffix}-networks.png")
            what = "mean of the success" if success else "interquartile mean of the return"
            text = "Each task, and the mean of all: " if success else "Each task: "
            text += f"deterministic policy, {what} over the seeds, 95% bootstrap intervals."
            switches = " Dashed: the next task begins." * (protocol == "continual")
            captions[f"{name}{suffix}"] = f"{text}{switches} {seeds_of(some)} {commit}"
            text = "Share of dormant neurons (tau 0.025, all hidden layers, on the states of all tasks; a neuron is 0 "
            text += "where its expert is not chosen), effective rank (delta 0.01) and norm of the last layer's input: "
            text += "interquartile mean over the seeds, 95% bootstrap intervals."
            captions[f"{name}{suffix}-networks"] = f"{text}{switches} {seeds_of(some)} {commit}"
            if not any(map(has_experts, some.values())):
                continue
            plot_experts(some, figures / f"{name}{suffix}-experts.png")
            text = "Share of each expert (columns) in the weights on the states of each task (rows) at the end; first "
            text += "router of the network, first seed of each label, not a chosen one. Empty: below 0.005."
            captions[f"{name}{suffix}-experts"] = f"{text} {commit}"
        for file, caption in captions.items():
            lines += [f"![{file}](figures/{file}.png)", "", f"*{caption}*", ""]
        lines += [*table_of_tasks(labels, 1 + success), ""]
        if protocol == "continual":
            lines += [*table_of_phases(labels, 1 + success), ""]
        if success:
            lines.append("Area: mean over all evaluations and tasks.")
        else:
            lines.append("Relative mean: of each task's return divided by that of the label that is best in it (IQM).")
        lines += [
            "Dormant (tau 0.025, all hidden layers), rank, number of features, cosine (mean over pairs of tasks):",
            "actor / critic, mean over the seeds.",
            "",
        ]
        lines += ["```", *(group[0].info["command"] for group in labels.values()), "```", ""]
        if env in NOTES:
            lines += [NOTES[env].strip(), ""]
    return lines


# The second paper's claims

MINATAR = "MinAtar-3-games"


def compare(one: np.ndarray, other: np.ndarray) -> int:
    """1 where all seeds of `one` are above all of `other`, -1 where below, 0 where neither or with fewer than three."""
    if min(len(one), len(other)) < 3:
        return 0
    return int(one.min() > other.max()) - int(one.max() < other.min())


RELATIVE_RETURN = """
Means with their 95% intervals and the number of seeds. Relative return: each game's divided by that of the label that
is best in it (interquartile mean, same protocol), mean over the games; at the end of the run or, continual, of each
game's own (last) phase. *For* or *against*: each side has three seeds or more, and all of one are above all of the
other. With three and three chance alone does that one time in ten: a leaning, no proof.
"""


def claims(runs: dict[str, dict[str, list[Run]]]) -> list[str]:
    """What the paper says of MinAtar, beside what was seen: a table that compares labels."""
    labels, rows = runs[MINATAR], []

    def dormancy(label, network):
        group = labels.get(label, [])
        return np.array([measured(run, network, "dormant_0.025", "total")[1][-1] for run in group])

    def returns(label):
        if label not in labels:
            return np.array([])
        protocol = label.split("-")[0]
        every = {k: ends_of(g, 1, protocol == "continual") for k, g in labels.items() if k.startswith(protocol)}
        return relative(every)[label]

    def row(claim, quantity, sides: dict[str, np.ndarray], wanted: int | None):  # None: a difference, either way
        one, other = sides.values()
        sign = compare(one, other)
        verdict = "undecided" if not sign else "for" if wanted in (sign, None) else "against"
        cells = (
            f"{name}: {with_interval(values, 2, mean)} ({len(values)})" if len(values) else f"{name}: -"
            for name, values in sides.items()
        )
        rows.append(f"| {claim} | {quantity} | {' | '.join(cells)} | {verdict} |")

    for protocol in ("multitask", "continual"):
        for network in ("actor", "critic"):
            shares = {kind: dormancy(f"{protocol}-{kind}", network) for kind in ("softmoe-big", "baseline")}
            row("Big with Soft MoE has fewer dormant neurons", f"{protocol}, {network}: share at the end", shares, -1)
    for claim, *kinds in (
        ("Big with Soft MoE learns better", "softmoe-big", "baseline"),
        ("Big is a better place for Soft MoE than middle (our question)", "softmoe-big", "softmoe-middle"),
        ("Soft MoE is better than top-1 (2402.08609, of value-based agents)", "softmoe-big", "topk-big"),
        ("Hardcoded routing can beat learned routing", "hardcoded-big", "softmoe-big"),
        ("Hardcoded routing can beat learned routing", "hardcoded-middle", "topk-middle"),  # both have PerSamp tokens
    ):
        for protocol in ("multitask", "continual"):
            row(claim, f"{protocol}: relative return", {kind: returns(f"{protocol}-{kind}") for kind in kinds}, 1)
    gains = {}
    for protocol in ("continual", "multitask"):
        one, other = (returns(f"{protocol}-{kind}") for kind in ("softmoe-big", "baseline"))
        gains[protocol] = np.array([x - y for x, y in zip(one, other, strict=False)])  # in the order of seeds
    row("Big with Soft MoE helps most in continual training", "relative return, softmoe-big - baseline", gains, 1)
    for label in ("continual-baseline", "continual-softmoe-big"):
        reversed_runs = runs.get(f"{MINATAR}-reversed", {}).get(label)
        for task in labels[label][0].info["args"]["tasks"] if label in labels and reversed_runs else []:
            ends = {
                name: ends_of(group, 1, of_phases=True)[:, group[0].info["args"]["tasks"].index(task)]
                for name, group in (("given order", labels[label]), ("reversed", reversed_runs))
            }
            row("The order of the tasks matters", f"{label}, {task}: return at the end of its phase", ends, None)
    lines = ["## Claims of arXiv 2406.18420, on MinAtar", "", "| claim | measured | one | other | seen |"]
    lines += ["|---|---|---|---|---|", *rows, ""]
    return [*lines, RELATIVE_RETURN.strip(), ""]


INTRODUCTION = """
# Results

`python results/plot.py` writes this page and its figures from `results/runs`; `python results/benchmark.py SUITE` makes
the runs. Steps are environment steps, of all tasks together where there are several. The numbers in the tables are
those of the last evaluation, which has its own environment and seeds, where they do not say otherwise.

* **Return** is the interquartile mean (IQM) over the seeds and its 95% interval. The IQM leaves out the floor(n / 4)
  lowest and highest of n seeds: of 5 the middle three count, with 3 it is the plain mean. The interval is a percentile
  bootstrap, 10,000 resamples of the seeds within environment and label; **with 3 seeds it is the lowest and the
  highest of them.** ± is the standard deviation over the seeds (divided by n).
* **Training episodes** show the policy as it acts while it learns, stochastic; evaluations are apart from training. Of
  PPO a number is the mean over rollouts of the mean of the episodes that end in each: where episodes have very
  different lengths, the long ones count for more than in a mean over episodes.
* **Area** is that under the deterministic learning curve, divided by the steps: the mean of a run's evaluations, which
  are (nearly) equally far apart.
* **Success** is the plain mean over the seeds and the same kind of interval. It is 0 or 1 for most seeds, and an IQM
  would call 4 of 5 seeds 1.00.
* With 3 to 5 seeds these intervals are rough and rather too narrow (where all seeds agree they have no width at all):
  small differences decide nothing. One seed has none, and decides nothing whatever it is: its curves are dashed.
* **Distance of two experts** is that of the actions they mean, at most 2 sqrt(A) with A actions in [-1, 1]: 2.8 on
  target reaching, 3.5 on Hopper, 4.9 on HalfCheetah and Walker2d, 5.7 on Ant, 8.2 on Humanoid and HumanoidStandup.
* **Steps/s** and **minutes** are medians of whole runs, evaluations included, with other runs on the same machine.
  A **commit** with + had uncommitted changes. Under each table is the command of each label's first seed.
* **Labels** begin with the script, or its protocol; what follows stands for flags:

  | label | flag |
  |---|---|
  | `sac_pmoe`, `-draws`, `-fresh` | `--selection means` (the default), `draws` (the paper's form) or `fresh` |
  | `sac_pmoe-all` | `--primitive-update all`: back-propagation-all |
  | `sac_pmoe-alpha1`, `-bonus0.1` | `--alpha-init 1`; the task's `speed_bonus` 0.1 |
  | `sac-medium` | `--matmul-precision medium` |
  | `ppo_pmoe-both`, `-frequency`, `-ppo` | `--gate-gradient`: PPO's and that of the frequencies, or only one of them |
  | `ppo_pmoe-means` | `--gate-gradient both --selection means` |
  | `ppo_pmoe-1` to `-16` | `--gate-gradient both` with that `--num-experts` |
  | `multitask-`, `continual-` | `--protocol`; then router and architecture |
"""


def main(root: Path):
    runs, figures = read_runs(root / "runs"), root / "figures"
    figures.mkdir(exist_ok=True)
    for old in figures.glob("*.png"):
        old.unlink()
    lines = [INTRODUCTION.strip(), ""]
    if (root / "findings.md").exists():
        lines += [(root / "findings.md").read_text().strip(), ""]
    if EXPERTS in runs and "ppo_pmoe-both" in runs.get("HalfCheetah-v5-ppo", {}):  # the same command, so not run twice
        labels = runs[EXPERTS] | {"ppo_pmoe-8": runs["HalfCheetah-v5-ppo"]["ppo_pmoe-both"]}
        runs[EXPERTS] = dict(sorted(labels.items(), key=lambda item: natural(Path(item[0]))))
    mujoco = {env: labels for env, labels in runs.items() if env.removesuffix("-v5-ppo") in MUJOCO}
    if mujoco:
        lines += section_of_mujoco(mujoco, figures)
    for env, labels in sorted(runs.items()):
        several = next(iter(labels.values()))[0].moe
        lines += (section_of_tasks if several else section)(env, labels, figures)
    if MINATAR in runs:
        lines += claims(runs)
    (root / "README.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main(Path(__file__).resolve().parent)

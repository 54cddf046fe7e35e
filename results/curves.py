"""Figures of numbers: learning curves, dots over seeds, networks over time, routers.

A line is the mean over the seeds. The band is its 95% t interval from five seeds on, below that the lowest to the
highest seed, and then every seed is drawn as a thin line as well. A label has one colour in all figures.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import measures
import numpy as np
import pandas as pd
import seaborn as sns
import stats
from reading import TEXT, Data, kind, policy_name

NETWORKS = ("actor", "critic")
DPI, WIDTH = 150, 8  # 1,200 pixels, shown at about 800
sns.set_theme("paper", "ticks", "colorblind", rc={"axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})


def palette(labels) -> dict[str, tuple]:
    """A colour for each label: that of text/labels.csv, where the protocol before a label does not count."""
    known = pd.read_csv(TEXT / "labels.csv").set_index("label").colour
    numbers = {label: int(known[kind(label)]) for label in labels if kind(label) in known}
    colours = sns.color_palette("colorblind")
    free = iter([i for i in range(len(colours)) if i not in numbers.values()] * len(labels))
    return {label: colours[numbers[label] if label in numbers else next(free)] for label in labels}


def save(figure, path: Path):
    """Without the version of matplotlib in the file."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def steps(x: float, _=None) -> str:
    """`200k`, `1M`."""
    return f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x else "0"


def panels(count: int, columns: int, height: float = 2.5):
    """A figure with `count` axes in rows of `columns`, and these axes."""
    rows = -(-count // columns)
    size = WIDTH, rows * height + 0.4
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat[:count])


def lines(axis, curves: pd.DataFrame, colours: dict, dashed: tuple[str, ...] = (), share: bool = False):
    """Draws curves (columns label, seed, step, value); those of labels in `dashed` are dashed.

    More than three bands would hide each other, and so would the seeds of more than five labels: then there are none.
    """
    curves = curves.dropna(subset="value")
    bands, seeds = curves.label.nunique() <= 3, curves.label.nunique() <= 5
    for label, part in curves.groupby("label", sort=False):
        wide = aligned(part)
        style = {"color": colours[label], "linestyle": "--" if label in dashed else "-"}
        axis.plot(wide.columns, wide.mean(), label=label, linewidth=1.6 if len(wide) > 1 else 0.8, **style)
        if bands:
            edges = np.array([stats.interval(wide[step], share) for step in wide])
            axis.fill_between(wide.columns, *edges.T, color=colours[label], alpha=0.15, linewidth=0)
        if seeds and 1 < len(wide) < stats.FEW:
            axis.plot(wide.columns, wide.T, linewidth=0.5, alpha=0.6, **style)
    axis.xaxis.set_major_formatter(steps)
    axis.set(xlabel="environment steps", xlim=(0, None))
    if share:
        axis.set_ylim(-0.03, 1.03)


def aligned(curves: pd.DataFrame) -> pd.DataFrame:
    """One row per seed, one column per step of the first seed: a resumed run may have other steps."""
    groups = {seed: run.sort_values("step") for seed, run in curves.groupby("seed")}
    grid = next(iter(groups.values())).step.to_numpy()
    return pd.DataFrame({s: np.interp(grid, r.step, r.value) for s, r in groups.items()}, index=grid).T


def legend(figure, axes, names: dict[str, str] | None = None):
    """One legend for all axes, above them."""
    found = {}
    for axis in axes:
        found |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    texts = [(names or {}).get(label, label) for label in found]
    columns = 3 if max(map(len, texts), default=0) > 24 else 5
    figure.legend(found.values(), texts, loc="outside upper center", ncols=min(columns, len(texts)) or 1)


def count(data: Data) -> str:
    """`3 seeds`, `1 seed`."""
    seeds = data.runs.seed.nunique()
    return f"{seeds} seed{'s' * (seeds > 1)}"


def name_in_legend(data: Data) -> str:
    """`sac_pmoe, K = 4, 5 seeds`."""
    number = f", K = {data.experts()}" if data.experts() > 1 else ""
    return f"{data.runs.label.iloc[0]}{number}, {count(data)}"


# What is drawn


def training(data: Data) -> pd.DataFrame:
    """Returns of the training episodes: of the policy as it acts. The first point is one rollout and left out."""
    if measures.TRAINING not in data.scalars:
        return pd.DataFrame(columns=["label", "seed", "step", "value"])
    table = data.scalars.rename(columns={"global_step": "step", measures.TRAINING: "value"})
    return table[table.groupby(["label", "seed"]).cumcount() > 0]


def evaluated(data: Data, column: str) -> pd.DataFrame:
    """The evaluations of the policy that stands for each label."""
    evals = data.evals.merge(data.runs[["label", "seed", "headline"]], on=["label", "seed"])
    evals = evals[evals.policy == evals.headline]
    return evals.rename(columns={"global_step": "step"}).assign(value=evals[column])


def learning(data: Data, path: Path):
    """One folder: returns of training episodes where they are logged, of evaluations, and the success if known."""
    labels = list(data.by_label)
    drawn = [("return of training episodes", training(data)), ("return of evaluations", evaluated(data, "return"))]
    drawn.append(("success of evaluations", evaluated(data, "success")))
    drawn = [(title, curves) for title, curves in drawn if curves.value.notna().any()]
    figure, axes = panels(len(drawn), len(drawn), 3)
    start = data.args().get("learning_starts", 0)
    start *= start > data.args()["total_timesteps"] / 4  # where random steps are a large part, they are left out
    for axis, (title, curves) in zip(axes, drawn, strict=True):
        lines(axis, curves, palette(labels), share=title.startswith("success"))
        axis.set(ylabel=title, xlim=(start, None))
    legend(figure, axes, {label: name_in_legend(part) for label, part in data.by_label.items()})
    save(figure, path)


def mujoco(data: Data, folders: dict[str, list[str]], labels: list[str], path: Path, of_training: bool):
    """One panel per task that has runs: the labels in its first folder and, beside them, in a second one.

    Where a second one has runs of all labels, lines of the first are dashed.
    """
    drawn = {}
    for task, names in folders.items():
        parts = [[(i, data.of(name, label)) for label in labels] for i, name in enumerate(names)]
        parts = [each for each in parts if not each[0][0] or all(len(part.runs) for _, part in each)]
        drawn[task] = [(i, part) for i, part in sum(parts, []) if len(part.runs)]
    drawn = {task: parts for task, parts in drawn.items() if parts}
    if not drawn:
        return
    second = any(i for parts in drawn.values() for i, _ in parts)
    figure, axes = panels(len(drawn), min(3, len(drawn)))
    for axis, (task, parts) in zip(axes, drawn.items(), strict=True):
        names = [part.runs.label.iloc[0] + ", KL limited" * i for i, part in parts]
        tables = [training(part) if of_training else evaluated(part, "return") for _, part in parts]
        shown = pd.concat([table.assign(label=name) for name, table in zip(names, tables, strict=True)])
        colours = {name: palette(labels)[name.partition(",")[0]] for name in names}
        lines(axis, shown, colours, dashed=tuple(labels) if second else ())
        seeds = sorted({count(part) for _, part in parts})
        axis.set_title(f"{task}, K = {max(part.experts() for _, part in parts)}, {' and '.join(seeds)}", fontsize=8)
        axis.set_ylabel("return of training episodes" if of_training else "return of evaluations")
    legend(figure, axes)
    save(figure, path)


def number_of_experts(data: Data, path: Path):
    """Returns over the number of experts: of training episodes, and of the policy that stands for a label."""
    figure, axes = panels(2, 2, 2.8)
    parts = list(data.by_label.values())
    numbers = [part.args()["num_experts"] for part in parts]
    for axis, measure in zip(axes, ("area of training", "area"), strict=True):
        for number, part in zip(numbers, parts, strict=True):
            values = measures.of(part, measure)[""]
            axis.plot([number, number], stats.interval(values), color="0.6", linewidth=4, alpha=0.5)
            axis.plot([number] * len(values), values, "o", color="k", markersize=3)
            axis.plot(number, values.mean(), "_", color=sns.color_palette("colorblind")[1], markersize=14)
        axis.set_xscale("log", base=2)
        axis.set_xticks(numbers, map(str, numbers))
        kinds = ", ".join(dict.fromkeys(map(policy_name, parts)))
        axis.set(xlabel="number of experts K", ylabel=measure + f" ({kinds})" * (measure == "area"))
    figure.suptitle(f"{data.folder()}, {count(data)}", fontsize=9)
    save(figure, path)


def parameters(data: Data, path: Path):
    """PQN: area over the number of parameters; a panel a game, a line for each kind of network, a dash a seed."""
    kinds = {"wide": ("plain network, times as wide", 0), "soft": ("Soft MoE, experts", 1)}
    kinds |= {"topk": ("top-1, experts", 5), "tokens": ("tokens, one MLP for all", 2)}
    figure, axes = panels(len(data.by_folder), min(3, len(data.by_folder)), 2.8)
    for axis, (folder, game) in zip(axes, data.by_folder.items(), strict=True):
        points = {}  # kind -> (parameters, what is counted, areas of the seeds)
        for part in game.by_label.values():
            args = part.args()
            moe = args.get("moe", "none")
            number = {"none": 1, "wide": args.get("widen"), "tokens": ""}.get(moe, args.get("num_experts"))
            point = part.runs.parameters.iloc[0], number, measures.of(part, "area")[""].to_numpy()
            points.setdefault("wide" if moe == "none" else moe, []).append(point)
        for moe in (moe for moe in kinds if moe in points):
            x, numbers, values = zip(*sorted(points[moe], key=lambda point: point[0]), strict=True)
            name, index = kinds[moe]
            style = {"color": sns.color_palette("colorblind")[index]}
            axis.plot(x, [v.mean() for v in values], "o-", label=name, markersize=4, **style)
            for a, number, v in zip(x, numbers, values, strict=True):
                axis.plot([a] * len(v), v, "_", markersize=7, **style)
                axis.annotate(number, (a, v.mean()), xytext=(4, 4), textcoords="offset points", fontsize=7, **style)
        axis.set_xscale("log")
        axis.margins(x=0.1)
        axis.set_ylim(bottom=0)
        axis.set_title(f"{folder.removeprefix('MinAtar-PQN-').replace('_', ' ')}, {count(game)}", fontsize=8)
        axis.set(xlabel="parameters", ylabel="area (epsilon-greedy)" if axis in axes[::3] else "")
    legend(figure, axes)
    save(figure, path)


def dots(groups: dict[str, dict[str, pd.Series]], path: Path, ylabel: str):
    """A panel for each group: every seed of each label a dot, a bar for the mean, and the interval or the range."""
    figure, axes = panels(len(groups), min(4, len(groups)), 2.8)
    colours = palette(dict.fromkeys(label for group in groups.values() for label in group))
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        table = pd.concat([pd.DataFrame({"label": label, "value": values}) for label, values in group.items()])
        sns.swarmplot(table, x="label", y="value", hue="label", palette=colours, ax=axis, size=4)
        for x, values in enumerate(group.values()):
            axis.plot([x, x], stats.interval(values, share=True), color="k", linewidth=0.8)
            axis.plot(x, values.mean(), "_", color="k", markersize=16)
        seeds = sorted({len(values) for values in group.values()})
        axis.set_title(f"{title}, {' or '.join(map(str, seeds))} seed{'s' * (seeds != [1])}", fontsize=8)
        axis.set(xlabel="", ylabel=ylabel if axis in axes[::4] else "")
        axis.set(xlim=(-0.5, len(group) - 0.5), ylim=(0, 1.08 * axis.get_ylim()[1]))
        axis.set_xticks(range(len(group)), group, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
    save(figure, path)


def side_history(data: Data, path: Path):
    """What agents think of the mirror layout's two sides at the start while they learn, a line for each run."""
    history = data.history.assign(difference=data.history.q_left - data.history.q_right)
    names = {"difference": "Q of the left side - of the right", "alpha": "temperature", "p_left": "probability of left"}
    names |= {"gate": "weights of the gate"}
    figure, axes = panels(4, 2)
    colours = palette(data.by_label)
    for axis, (column, name) in zip(axes, names.items(), strict=True):
        for (label, seed), run in history.groupby(["label", "seed"], sort=False):
            if column != "gate":
                axis.plot(run.step, run[column], color=colours[label], label=f"{label}, seed {seed}")
            elif run.gate.notna().all():  # one Gaussian has none
                weights = run.gate.str.split(expand=True).astype(float)  # a column per expert
                axis.plot(run.step, weights, color=colours[label], linewidth=1)
                axis.set_ylim(0)
        axis.xaxis.set_major_formatter(steps)
        axis.set(xlabel="environment steps", ylabel=name)
    legend(figure, axes)
    save(figure, path)


# Several tasks


def mark_switches(axis, args: dict):
    """A dotted line where the continual protocol goes on to the next task."""
    phases = len(args["tasks"]) * args["cycles"] if args["protocol"] == "continual" else 1
    for switch in range(1, phases):
        axis.axvline(switch * args["total_timesteps"] / phases, color="k", linestyle=":", linewidth=0.8)


def has_success(data: Data) -> bool:
    return bool(evaluated(data, "success").value.notna().all())


def tasks(protocols: dict[str, Data], path: Path):
    """A row for each protocol, a panel for each task or, where success is known, one for all: evaluations."""
    first = next(iter(protocols.values()))
    column, names = ("success", ["all tasks"]) if has_success(first) else ("return", first.tasks())
    columns = 3 if len(names) % 3 == 0 else min(4, len(names))
    figure, axes = panels(len(protocols) * len(names), columns, 2.2)
    kinds = dict.fromkeys(kind(label) for data in protocols.values() for label in data.by_label)
    for row, (protocol, data) in enumerate(protocols.items()):
        curves = evaluated(data, column)
        curves = curves.assign(label=curves.label.map(kind))
        mean = curves.groupby(["label", "seed", "step"], as_index=False, sort=False).value.mean()
        for i, name in enumerate(names):
            axis = axes[row * len(names) + i]
            shown = mean if name == "all tasks" else curves[curves.task == name]
            lines(axis, shown, palette(kinds), share=column == "success")
            mark_switches(axis, data.args())
            axis.set_title(f"{name}, {protocol}, {count(data)}", fontsize=8)
            axis.set(ylabel=column if i % columns == 0 else "")
    legend(figure, axes)
    save(figure, path)


def networks(data: Data, path: Path):
    """Dormant neurons and the effective rank's share of the width over the steps, actor above, critic below."""
    figure, axes = panels(4, 2, 2.2)
    for row, network in enumerate(NETWORKS):
        table = data.moe[(data.moe.network == network) & data.moe.task.isna()].rename(columns={"global_step": "step"})
        table = table.assign(label=table.label.map(kind))
        dormant = table[(table.metric == "dormant_0.025") & (table["item"] == "total")]
        keys = ["label", "seed", "step"]
        wide = table[table.metric.isin(["rank", "width"])].pivot_table(index=keys, columns="metric", values="value")
        rank = (wide["rank"] / wide["width"]).rename("value").reset_index()
        for axis, (title, curves) in zip(
            axes[2 * row :], (("dormant neurons", dormant), ("effective rank / width", rank)), strict=False
        ):
            lines(axis, curves, palette(dict.fromkeys(map(kind, data.by_label))), share=True)
            mark_switches(axis, data.args())
            axis.set_title(f"{network}, {count(data)}", fontsize=8)
            axis.set_ylabel(title)
    legend(figure, axes)
    save(figure, path)


def routers(data: Data, path: Path):
    """Share of each expert in the weights of a network's first router on the states of each task, first seeds."""
    weights = {label: [routing(part, n) for n in NETWORKS] for label, part in data.by_label.items()}
    weights = {label: pair for label, pair in weights.items() if any(w is not None for w in pair)}
    figure, axes = panels(2 * len(weights), len(weights), 1.9)
    for i, (label, pair) in enumerate(weights.items()):
        for axis, network, table in zip(axes[i :: len(weights)], NETWORKS, pair, strict=True):
            if table is None:
                axis.axis("off")
                continue
            style = {"vmin": 0, "vmax": 1, "cmap": "Blues", "cbar": False, "annot": table.shape[1] < 5, "fmt": ".2f"}
            sns.heatmap(table, ax=axis, annot_kws={"fontsize": 7}, **style)
            for text in axis.texts:
                text.set_in_layout(False)  # they lie inside; measuring them takes seconds
            axis.set_title(f"{kind(label)}, {network}", fontsize=8)
            axis.set(xlabel="expert", ylabel="")
            axis.tick_params(labelsize=7, rotation=0)
            axis.grid(False)
            axis.set_yticks(axis.get_yticks(), axis.get_yticklabels() if i == 0 else [])
    figure.suptitle(f"seed {data.runs.seed.iloc[0]}", fontsize=8)
    save(figure, path)


def routing(data: Data, network: str) -> pd.DataFrame | None:
    """The last weights (task, expert) of the first router of the first run, rows summing to 1; None without experts."""
    rows = data.moe[(data.moe.network == network) & data.moe.metric.str.startswith("router")]
    rows = rows[(rows.seed == data.runs.seed.iloc[0]) & (rows.metric == rows.metric.min())]
    if rows.empty:
        return None
    rows = rows[rows.global_step == rows.global_step.max()]
    weights = rows.astype({"task": int, "item": int}).pivot_table(index="task", columns="item", values="value")
    weights = weights.reindex(columns=range(data.args()["num_experts"])).fillna(0)
    weights.index = [data.tasks()[i] for i in weights.index]
    return weights.div(weights.sum(axis=1), axis=0)

"""Maps of the target-reaching arena: where policies fly, by the expert that acts."""

from pathlib import Path

import matplotlib.pyplot as plt
import measures
import numpy as np
import pandas as pd
import seaborn as sns
from curves import WIDTH, panels, save
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from reading import Data

UNKNOWN = "0.35"  # colour of a path of one Gaussian, or whose acting experts were not recorded


def arena(axis, layout: pd.DataFrame, edge: float = measures.EDGE):
    """Start, target and obstacles, as far as `edge` from the middle."""
    for item in layout.itertuples():
        if item.thing == "start":
            axis.plot(item.x, item.y, "k+", markersize=7)
        else:
            colour = "#9ED8AC" if item.thing == "target" else "#999999"
            axis.add_patch(plt.Circle((item.x, item.y), item.radius, color=colour, zorder=0))
    axis.set(xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal", xticks=(-edge, 0, edge))
    axis.set(yticks=(-edge, 0, edge), xlabel="x", ylabel="y")
    axis.tick_params(labelsize=7)
    axis.grid(False)


def fly(axis, edge: float, data: Data, panel: str, title: str) -> set[int | None]:
    """Draws the episodes of one panel of a run, each step in the colour of its expert, and returns these experts.

    None stands for one Gaussian or for an expert that was not recorded. An episode ends in a dot in the target, in a
    cross at an obstacle or the wall, in a square at the time limit.
    """
    arrived, experts = [], set()
    arena(axis, data.layout, edge)
    for _, path, arrives in measures.episodes(data, panel):
        points = path[["x", "y"]].to_numpy(float)
        acting = [int(panel[7:])] * len(path) if panel.startswith("expert_") else path.expert
        acting = [None if pd.isna(k) else int(k) for k in acting][1:]  # that brought it to this point
        segments = np.stack([points[:-1], points[1:]], 1)
        axis.add_collection(LineCollection(segments, colors=list(map(colour, acting)), linewidths=0.9))
        look = {"marker": "o", "color": "k", "markersize": 3}
        if not arrives:
            limit = path.step.iloc[-1] >= measures.TIME_LIMIT
            look = {"marker": "s" if limit else "X", "color": "#CC0000", "markersize": 5}
        axis.plot(*points[-1], linestyle="", markeredgecolor="w", markeredgewidth=0.5, clip_on=False, **look)
        arrived.append(arrives)
        experts.update(acting)
    axis.set_title(f"{title}\n{sum(arrived)} of {len(arrived)} arrive", fontsize=7)
    return experts


def colour(expert: int | None):
    """That of an acting expert."""
    return UNKNOWN if expert is None else sns.color_palette("colorblind")[expert % 10]


def most_used(data: Data) -> list[int]:
    """Experts of a run that has paths, those that act most often first."""
    alone = {int(panel[7:]) for panel in data.paths.panel.unique() if panel.startswith("expert_")}
    acting = data.paths[data.paths.panel == "stochastic"].expert.dropna().astype(int).value_counts()
    return sorted(alone, key=lambda k: (-acting.get(k, 0), k))


def acts_by_an_expert(run: Data) -> bool:
    """Not by one Gaussian made of all of them."""
    return run.experts() > 1 and not run.runs.script.iloc[0].endswith(("_gating", "_mcp"))


def first_run(data: Data) -> Data:
    """The runs' first seed: not a chosen one."""
    return data.where("seed", [data.runs.seed.iloc[0]])


def paths(data: Data, labels: list[str], alone: dict[str, int], path: Path, one_row: bool = False) -> bool:
    """The first seed of each label, then, of some labels, so many experts alone; whether there was anything to draw."""
    runs = {label: first_run(part) for label, part in data.by_label.items()}
    runs = {label: run for label, run in runs.items() if (run.paths.panel == "stochastic").any()}
    rows = [[(runs[k], "stochastic", f"{k}, seed {runs[k].runs.seed.iloc[0]}") for k in labels if k in runs]]
    for label, number in alone.items():
        experts = most_used(runs[label])[:number] if label in runs else []
        rows.append([(runs[label], f"expert_{k}", f"{label}, expert {k}") for k in experts])
    rows = [sum(rows, [])] if one_row else [row for row in rows if row]
    if not any(rows):
        return False
    columns = min(5, max(map(len, rows)))
    drawn = [panel for row in rows for panel in [*row, *[None] * (-len(row) % columns)]]
    figure, axes = panels(len(drawn), columns, WIDTH / columns + 0.25)
    farthest = max(run.paths[run.paths.panel == panel][["x", "y"]].abs().max().max() for run, panel, _ in sum(rows, []))
    experts, edge = set(), 2.5 if farthest < 2.5 else measures.EDGE
    for i, (axis, panel) in enumerate(zip(axes, drawn, strict=True)):
        if panel is None:
            axis.axis("off")
            continue
        experts |= fly(axis, edge, *panel)
        below = drawn[i + columns] if i + columns < len(drawn) else None
        axis.set(xlabel="" if below else "x", ylabel="y" if i % columns == 0 else "")
    names = {k: f"expert {k} acts" for k in sorted(experts - {None})}
    if None in experts:
        lost = any(acts_by_an_expert(run) and run.paths.expert.isna().all() for run, _, _ in sum(rows, []))
        names[None] = "one Gaussian" + ", or expert not recorded" * lost
    keys = [Line2D([], [], color=colour(k), label=name) for k, name in names.items()]
    figure.legend(handles=keys, loc="outside upper center", ncols=5, fontsize=8)
    figure.supxlabel(data.folder(), fontsize=7)
    save(figure, path)
    return True

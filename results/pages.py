"""Pages in markdown: results/README.md with the claims, one page for each environment, one with the claims' numbers."""

import re
from pathlib import Path

import claims
import curves
import maps
import measures
import numpy as np
import pandas as pd
import stats
from curves import NETWORKS
from reading import PQN, TEXT, Data, kind, natural, policy_name

MADE = "<!-- python results/plot.py makes this page; what is written by hand is in results/text -->"
LOCAL = re.compile(r"\]\(([\w./-]+\.(?:png|md|csv))\)")  # targets of links and pictures in this folder
ALGORITHMS = {"sac": "SAC", "ppo": "PPO"}  # of published.csv, by the beginning of a script's name


def markdown(rows: list[dict]) -> list[str]:
    """A table; columns without any content are left out, and so is a table without rows."""
    if not rows:
        return []
    columns = [c for c in dict.fromkeys(c for row in rows for c in row)]
    columns = [c for c in columns if any(row.get(c, "-") not in ("-", "") for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(str(row.get(c, "-")) for c in columns) + " |" for row in rows), ""]


def caption(name: str) -> str:
    return pd.read_csv(TEXT / "captions.csv").set_index("figure").caption[name]


def picture(path: Path, title: str, name: str) -> list[str]:
    return [f"![{title}](figures/{path.name})", "", f"*{caption(name)}*", ""]


def by_hand(name: str) -> list[str]:
    """text/NAME.md or, for all tasks of a kind, the file of what follows the task's name: v5-ppo of Hopper-v5-ppo."""
    for path in (TEXT / f"{name}.md", TEXT / f"{name.partition('-')[2]}.md"):
        if path.exists():
            return [path.read_text().strip(), ""]
    return []


def page_of(folder: str) -> str:
    """`Hopper-v5-ppo-kl` -> `Hopper-v5`, `MinAtar-own` -> `MinAtar`."""
    return re.match(r".*-v\d+|[^-]*", folder)[0]


# One environment


def environment(name: str, data: Data, figures: Path) -> str:
    """Draws the figures of all folders of one environment and returns its page."""
    folders = sorted(data.runs.folder.unique(), key=natural)
    lines = [MADE, "", f"# {name}", "", "[All results](README.md). Sections: "]
    lines[-1] += ", ".join(f"[{folder}](#{folder.lower().replace('.', '')})" for folder in folders) + "."
    lines += ["", *([] if name in folders else by_hand(name)), *labels_of(data)]
    games = data.where("folder", [folder for folder in folders if re.fullmatch(r"MinAtar-PQN-\w+", folder)])
    if games.runs.label.nunique() > 1:  # one point compares nothing
        curves.parameters(games, figures / "MinAtar-PQN.png")
        lines += picture(figures / "MinAtar-PQN.png", "PQN, returns over the number of parameters", "parameters")
    for folder in folders:
        part = data.of(folder)
        lines += [f"## {folder}", "", *by_hand(folder)]
        lines += several_tasks(part, data, figures) if part.tasks() else one_task(part, figures)
    return "\n".join([*lines, *published(name, data), *provenance(data)])


def labels_of(data: Data) -> list[str]:
    """What the labels of a page mean."""
    known = pd.read_csv(TEXT / "labels.csv")
    here = dict.fromkeys(map(kind, data.runs.label))
    return markdown([{"label": f"`{r.label}`", "meaning": r.meaning} for r in known.itertuples() if r.label in here])


def one_task(data: Data, figures: Path) -> list[str]:
    """The section of a folder whose runs have one task each."""
    lines = [line for name, part in families(data).items() for line in pictures(part, name, figures)]
    for name in ("noise", "primitives"):  # by scripts of their own
        if (path := figures / f"{data.folder()}-{name}.png").exists():
            lines += picture(path, f"{data.folder()}, {name}", name)
    rows = [returns(part) for part in data.by_label.values()]
    policies = [policy(part) for part in data.by_label.values()]
    known = any(set(row.values()) - {row["label"], row["seeds"], "-"} for row in policies)  # PQN's has none of it
    return [*lines, *markdown(rows), *markdown(policies if known else []), *sides(data), *gait(data), *routing(data)]


def families(data: Data) -> dict[str, Data]:
    """A figure's worth of labels each, by the name of their figures: SAC's, and those of PPO, FOLDER_ppo.

    Their runs have other numbers of steps, and `ppo` has the colour of `sac`.
    """
    groups = {}
    for label, part in data.by_label.items():
        groups.setdefault(part.runs.script.iloc[0].split("_")[0], []).append(label)
    plain = "sac" if "sac" in groups else next(iter(groups))
    names = {base: data.folder() + f"_{base}" * (base != plain) for base in sorted(groups, key=lambda b: b != plain)}
    return {name: data.where("label", groups[base]) for base, name in names.items()}


def pictures(data: Data, name: str, figures: Path) -> list[str]:
    """Draws the figures of labels that share them; their files begin with `name`."""
    lines, title = [], data.folder() + ", PPO" * name.endswith("_ppo")
    curves.learning(data, figures / f"{name}.png")
    lines += picture(figures / f"{name}.png", f"{title}, learning curves", "learning")
    if "experts" in name:
        curves.number_of_experts(data, figures / f"{name}-number.png")
        lines += picture(figures / f"{name}-number.png", f"{title}, number of experts", "experts")
    if maps.paths(data, list(data.by_label), {"sac_pmoe": 4, "ppo_pmoe-both": 4}, figures / f"{name}-paths.png"):
        lines += picture(figures / f"{name}-paths.png", f"{title}, paths", "paths")
    cells = {label: measures.of(part, "cells seen")[""] for label, part in data.by_label.items() if has_cells(part)}
    if cells:
        curves.dots({data.folder(): cells}, figures / f"{name}-cells.png", "share of cells seen")
        lines += picture(figures / f"{name}-cells.png", f"{title}, exploration", "cells")
    if len(data.history):
        curves.side_history(data, figures / f"{name}-history.png")
        lines += picture(figures / f"{name}-history.png", f"{title}, both sides over training", "history")
    return lines


def has_cells(data: Data) -> bool:
    return bool(data.paths.panel.isin(["cells", "exploration"]).any())


def cell(data: Data, name: str) -> str:
    """A measure over the seeds."""
    values = measures.of(data, name)
    share = name in measures.SHARES or name.startswith(("dormant", "rank"))
    return stats.summary(values.iloc[:, 0], share) if values.shape[1] else "-"


def returns(data: Data) -> dict[str, str]:
    """A row: how well a label learns and what it ends with, by each policy."""
    row = {"label": data.runs.label.iloc[0], "K": str(data.experts()) if data.experts() > 1 else "-"}
    row |= {"seeds": str(len(data.runs)), "evaluated policy": policy_name(data)}
    value_based = data.runs.script.iloc[0] in PQN
    other = "greedy return" if value_based else "stochastic return"
    for name in ("area", "return at the end", other, "area of training", "training at the end"):
        row[name] = cell(data, name)
    if value_based:
        row |= {"parameters": f"{data.runs.parameters.iloc[0]:,}"}
        row |= {name: cell(data, name) for name in ("dormant", "rank / width")}
        return row
    for name in ("area of success", "success at the end", "stochastic success"):
        row[name] = cell(data, name)
    first = measures.of(data, "steps to the first success")
    if len(first):
        found = first[np.isfinite(first)].dropna().to_numpy().ravel()
        row["first success (seeds)"] = f"{found.mean():,.0f} ({len(found)} of {len(first)})" if len(found) else "never"
    if (data.evals.policy == "stochastic").sum() < measures.LAST * len(data.runs):
        row["stochastic return"] += " ¹"
    return row


def policy(data: Data) -> dict[str, str]:
    """A row: how wide, how warm and how different the experts are at the end, how far PPO's policy moves."""
    row = {"label": data.runs.label.iloc[0], "seeds": str(len(data.runs))}
    for name in ("sigma", "temperature", "distance of two experts", "entropy of the gate", "KL per rollout", "clipped"):
        row[name] = cell(data, name)
    row["cells seen"] = cell(data, "cells seen") if has_cells(data) else "-"
    flown = (data.paths.panel == "stochastic").any() and data.sides.empty  # sides.csv knows the sides from 100 episodes
    flown &= "layout=random" not in str(data.args().get("env_id"))  # ways round obstacles that lie in the same place
    ways = measures.of(data, "ways") if flown else []
    row["seeds that keep both ways"] = f"{int((ways == 2).sum().iloc[0])} of {len(ways)}" if len(ways) else "-"
    return row


def sides(data: Data) -> list[str]:
    """Where sides.csv is: which way the episodes go. A row for each label and policy, over the seeds."""
    rows = []
    for (label, name), runs in data.sides.groupby(["label", "policy"], sort=False):
        runs = runs.sort_values("seed")
        row = {"label": label, "policy": name, "seeds": str(len(runs))}
        row["of them arrive"] = str(runs.entropy.notna().sum())
        left, right = runs.left > 0, runs.right > 0
        row |= {"only left": str((left & ~right).sum()), "only right": str((right & ~left).sum())}
        row["both sides"] = str((left & right).sum())
        rarer = runs[["left", "right"]].min(axis=1) / (runs.left + runs.right)
        row["largest share of the rarer side"] = stats.number(rarer.max()) if rarer.notna().any() else "-"
        if runs.p_left.notna().any():  # of the stochastic policy
            row["p_left at the start, by seed"] = ", ".join(f"{p:.2f}" for p in runs.p_left.dropna())
            row["modes there"] = " or ".join(f"{n:.0f}" for n in sorted(runs.modes.dropna().unique()))
            largest = [max(map(float, weights.split())) for weights in runs.gate.dropna().astype(str) if weights]
            row["largest weight there"] = stats.summary(largest, share=True)
        rows.append(row)
    return markdown(rows)


def gait(data: Data) -> list[str]:
    """Where gait.csv is: whether a trained policy runs or slides, seed by seed."""
    if data.gait.empty:
        return []
    rows = []
    for (label, seed), run in data.gait.groupby(["label", "seed"], sort=False):
        row = {"gait": label, "seed": seed}
        for name, episodes in run.groupby("policy"):
            row[f"return, {name}"] = stats.summary(episodes["return"])
            row[f"upright, {name}"] = stats.summary(episodes.upright)
        rows.append(row)
    return markdown(rows)


def routing(data: Data) -> list[str]:
    """Where routing.csv is: whether a router of Soft MoE tells places apart, over the seeds."""
    rows = []
    for (label, network), runs in data.routing.groupby(["label", "network"], sort=False):
        row = {"routing": label, "network": network, "seeds": str(len(runs))}
        row |= {f"entropy, {name}": stats.summary(runs[name]) for name in ("dispatch", "combine")}
        rows.append(row | {f"spread of {name}": stats.summary(runs[name]) for name in ("tokens", "slots")})
    return markdown(rows)


def several_tasks(data: Data, every: Data, figures: Path) -> list[str]:
    """The section of a folder whose runs have several tasks: protocol by protocol, architecture by architecture.

    In the runs of `every`, the whole page's, are those of agents alone on a task.
    """
    folder, lines = data.folder(), []
    runs = data.runs.assign(protocol=[args["protocol"] for args in data.runs.args])
    for protocol in sorted(runs.protocol.unique(), reverse=True):
        labels = list(runs[runs.protocol == protocol].label.unique())
        part = data.where("label", labels)
        lines += [f"### {folder}, {protocol}", ""]
        for suffix, some in by_architecture(part).items():
            name, title = f"{folder}-{protocol}{suffix}", f"{folder}, {protocol}{suffix.replace('-', ' ')}"
            curves.tasks({protocol: some}, figures / f"{name}.png")
            lines += picture(figures / f"{name}.png", title, "tasks")
            curves.networks(some, figures / f"{name}-networks.png")
            lines += picture(figures / f"{name}-networks.png", f"{title}, networks", "networks")
            if some.moe.metric.str.startswith("router").any():
                curves.routers(some, figures / f"{name}-routers.png")
                lines += picture(figures / f"{name}-routers.png", f"{title}, routers", "routers")
        each = list(part.by_label.values())
        lines += [f"Evaluated policy: {', '.join(dict.fromkeys(map(policy_name, each)))}.", ""]
        lines += markdown([tasks_learned(group, every, folder) for group in each])
        if protocol == "continual":
            lines += markdown([forgotten(group) for group in each])
        lines += markdown([networks(group) for group in each])
    return lines


def by_architecture(data: Data) -> dict[str, Data]:
    """A figure's worth of labels each: one architecture and the baseline; the key ends the name of its files."""
    groups, plain = {}, []
    for label, part in data.by_label.items():
        if label.startswith("alone-"):  # on one task: a constant of the others
            continue
        args = part.args()
        name = args["actor_moe"] if args["actor_moe"] != "baseline" else args["critic_moe"]
        if name == "baseline":
            plain.append(label)
        else:
            groups.setdefault(f"-{name}", []).append(label)
    return {suffix: data.where("label", plain + labels) for suffix, labels in groups.items()} or {"": data}


def tasks_learned(data: Data, every: Data, folder: str) -> dict[str, str]:
    """A row: the area of each task, and what the stochastic policy has at the end."""
    column = "success" if curves.has_success(data) else "return"
    row = {"label": kind(data.runs.label.iloc[0]), "seeds": str(len(data.runs))}
    areas = measures.of(data, "area of success" if column == "success" else "area")
    row |= {f"{task}, area": stats.summary(areas[task], column == "success") for task in areas}
    ends = measures.of(data, f"stochastic {column}")
    if column == "success":
        row["all tasks, area"] = stats.summary(areas.mean(axis=1), share=True)
        row["all tasks, stochastic, at the end"] = stats.summary(ends.mean(axis=1), share=True)
        return row
    relative = claims.relative_return(areas, every, folder)
    is_relative = relative.shape[1] == 1 < areas.shape[1]  # not of an agent alone on a task
    row["relative return"] = stats.summary(relative.iloc[:, 0]) if is_relative else "-"
    return row | {f"{task}, stochastic, at the end": stats.summary(ends[task]) for task in ends}


def forgotten(data: Data) -> dict[str, str]:
    """A row, continual: what each task had reached at the end of its own phase, and what is left at the end."""
    column = "success at the end" if curves.has_success(data) else "return at the end"
    left, row = measures.of(data, column), {"end of its phase -> of the run": kind(data.runs.label.iloc[0])}
    reached = measures.of(data, "return at the end of its phase") if column.startswith("return") else left
    return row | {t: f"{stats.number(reached[t].mean())} -> {stats.number(left[t].mean())}" for t in left}


def networks(data: Data) -> dict[str, str]:
    """A row: what was measured on actor and critic, mean of the last three evaluations, and their sizes."""
    row = {"actor / critic": kind(data.runs.label.iloc[0])}
    for name in ("dormant", "rank / width", "features' norm", "gradients' cosine"):
        row[name] = " / ".join(cell(data, f"{name}, {network}") for network in NETWORKS)
    parameters = data.runs.parameters.iloc[0]
    for key, title in (("total", "parameters"), ("active", "of them active")):
        row[title] = " / ".join(f"{parameters[network][key]:,}" for network in NETWORKS)
    return row


def published(name: str, data: Data) -> list[str]:
    """What others report for the task, by the algorithms of this page."""
    table = pd.read_csv(TEXT / "published.csv", dtype=str)
    here = {ALGORITHMS.get(script.split("_")[0]) for script in data.runs.script}
    table = table[(table.task == name.removesuffix("-v5")) & table.algorithm.isin(here)].drop(columns="task")
    lines = ["## Published", "", *by_hand("published"), *markdown(table.to_dict("records"))]
    return lines if len(table) else []


def provenance(data: Data) -> list[str]:
    """Where the numbers come from: commits, versions, machines, speed, commands."""
    rows, commands = [], []
    for (folder, label), runs in data.runs.groupby(["folder", "label"], sort=False):
        commits = {(c or "none")[:7] + "+" * bool(d) for c, d in zip(runs.commit, runs.dirty, strict=True)}
        versions = {", ".join(f"{k} {v}" for k, v in each.items()) for each in runs.versions}
        row = {"folder": folder, "label": label, "seeds": ", ".join(map(str, sorted(runs.seed)))}
        row |= {"steps": f"{runs.global_step.iloc[0]:,}", "steps/s": f"{runs.steps_per_second.median():.0f}"}
        row |= {"minutes": f"{runs.wall_time.median() / 60:.0f}", "commit": ", ".join(sorted(commits))}
        rows.append(row | {"machine": "; ".join(sorted(set(runs.machine))), "versions": "; ".join(sorted(versions))})
        commands.append(runs.command.iloc[0])
    text = "Steps per second and minutes are medians of whole runs, evaluations included, beside other runs. A commit"
    text += " with + had uncommitted changes. Below are the commands of the first seeds, as"
    text += " they were at that commit: a default may be another now. `python results/benchmark.py` has today's."
    return ["## Runs", "", text, "", *markdown(rows), "```", *dict.fromkeys(commands), "```", ""]


# The claims


def table_of_claims(decided: list[dict], figures: Path) -> list[str]:
    """claim | compared | seen | numbers | caveat | figure, in the order of the file, paper by paper."""
    rows, paper = [], None
    for claim in decided:
        if claim["paper"] != paper:
            paper = claim["paper"]
            empty = dict.fromkeys(("compared", "seen", "numbers", "caveat", "figure"), "")
            rows.append({"claim": f"**{paper}**"} | empty)
        file = figures / f"{claim.get('figure')}.png"
        row = {"claim": claim["claim"], "compared": claim["compared"], "seen": f"**{claim['seen']}**"}
        row |= {"numbers": claim["numbers"], "caveat": claim.get("caveat", "")}
        rows.append(
            row | {"figure": f"[figure](figures/{file.name})" if claim["numbers"] != "-" and file.exists() else ""}
        )
    return markdown(rows)


def claims_in_detail(decided: list[dict]) -> str:
    """A page with the numbers of every task behind a claim."""
    lines = [MADE, "", "# The claims task by task", "", "[All results](README.md).", ""]
    for claim in decided:
        if not claim["tasks"]:
            continue
        lines += [f"**{claim['claim']}**: {claim['seen']}. {claim['compared']}.", ""]
        rows = []
        for task in claim["tasks"]:
            pairs = stats.difference([(task.one.to_numpy(), task.other.to_numpy())], False)
            for column, (estimate, half) in zip(task.one, pairs, strict=True):
                share = task.measure in measures.SHARES
                row = {"runs": task.folder, "task": column or "-", "first": stats.summary(task.one[column], share)}
                row["second"] = stats.summary(task.other[column], share)
                row["seeds"] = f"{len(task.one)} + {len(task.other)}"
                rows.append(row | {"difference": claims.change(estimate, half, False)})
        lines += markdown(rows)
    return "\n".join(lines)


def front(decided: list[dict], pages: list[str], data: Data, figures: Path) -> str:
    """results/README.md: text/README.md with the claims and the list of pages.

    Without the paragraphs that show or link a file that is not there.
    """
    rows = [{"page": f"[{page}]({page}.md)", "folders of runs": ""} for page in pages]
    for row, page in zip(rows, pages, strict=True):
        row["folders of runs"] = ", ".join(f"`{f}`" for f in data.runs.folder.unique() if page_of(f) == page)
    parts = {"claims": table_of_claims(decided, figures), "pages": markdown(rows)}
    lines, missing = [MADE, ""], False
    for block in (TEXT / "README.md").read_text().strip().split("\n\n"):
        caption = missing and re.match(r"\*\S", block)  # of a picture that is not there
        missing = caption or not all((figures.parent / target).exists() for target in LOCAL.findall(block))
        if not missing:
            marker = re.fullmatch(r"<!-- (\w+) -->", block)
            lines += parts[marker[1]] if marker else [block, ""]
    return "\n".join(lines)

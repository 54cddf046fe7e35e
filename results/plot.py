"""Writes the figures (results/figures) and pages (results/*.md but findings.md and speed.md) from results/runs.

python results/plot.py

Reads run.json, eval.csv and, where there are, the other tables of each finished run: reading.py. Numbers of a run are
in measures.py, means and tests in stats.py, claims in claims.py, figures in curves.py and maps.py, pages in pages.py;
what is written by hand is in text/. The same runs give the same files.
"""

from pathlib import Path

import claims
import curves
import maps
import measures
import pages
from reading import Data, kind, natural, read

TASKS = ("Hopper", "Walker2d", "HalfCheetah", "Ant", "Humanoid", "HumanoidStandup")  # the paper's
FLOWN = ("TargetReaching-v0-penalty10", "TargetReaching-v0-fixed")  # the first that has runs
OTHERS = ("-noise.png", "-primitives.png", "gradients.png")  # by scripts of their own, from saved policies
KINDS = ("baseline", "softmoe-big", "hardcoded-big")


def overviews(data: Data, figures: Path):
    """The figures of results/README.md, as far as there are runs."""
    sac = {task: [f"{task}-v5-300k"] for task in TASKS}
    curves.mujoco(data, sac, ["sac", "sac_pmoe"], figures / "SAC-MuJoCo.png", of_training=False)
    ppo = {task: [f"{task}-v5-ppo", f"{task}-v5-ppo-kl"] for task in TASKS}
    curves.mujoco(data, ppo, ["ppo", "ppo_pmoe-both"], figures / "PPO-MuJoCo.png", of_training=True)
    for folder in FLOWN:
        part = data.of(folder)
        if maps.paths(part, ["sac", "sac_pmoe-all", "sac_pmoe"], {"sac_pmoe": 2}, figures / "paths.png", one_row=True):
            break
    minatar(data.of("MinAtar-own"), figures)


def minatar(data: Data, figures: Path):
    """Returns of each game and dormant neurons, in both protocols."""
    protocols = {p: data.where("label", [f"{p}-{kind}" for kind in KINDS]) for p in ("multitask", "continual")}
    protocols = {protocol: part for protocol, part in protocols.items() if len(part.runs)}
    if protocols:
        curves.tasks(protocols, figures / "MinAtar.png")
        shares = {
            f"{protocol}, {network}": {
                kind(label): measures.of(group, f"dormant, {network}")[""] for label, group in part.by_label.items()
            }
            for protocol, part in protocols.items()
            for network in curves.NETWORKS
        }
        curves.dots(shares, figures / "MinAtar-dormant.png", "share of dormant neurons")


def main(root: Path):
    data, figures = read(root), root / "figures"
    figures.mkdir(exist_ok=True)
    old = [path for path in root.glob("*.md") if path.read_text().startswith(pages.MADE)]
    for path in (*figures.glob("*.png"), *old):
        if not path.name.endswith(OTHERS):
            path.unlink()
    names = sorted({pages.page_of(folder) for folder in data.runs.folder}, key=natural)
    for name in names:
        folders = [folder for folder in data.runs.folder.unique() if pages.page_of(folder) == name]
        page = pages.environment(name, data.where("folder", folders), figures)
        (root / f"{name}.md").write_text(page)
    overviews(data, figures)
    decided = claims.decide(data, root)
    (root / "claims.md").write_text(pages.claims_in_detail(decided))
    (root / "README.md").write_text(pages.front(decided, names, data, figures))


if __name__ == "__main__":
    main(Path(__file__).resolve().parent)

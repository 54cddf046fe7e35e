"""Shows whether the experts of a mixture do different things: Fig. 4 of the PMOE paper, and the numbers behind it.

python results/primitives.py results/policies/Hopper-v5-300k/{sac_pmoe,sac_gating}/s1.pt

Writes primitives.csv into the folder above the labels', and results/figures/<that folder>-primitives.png.

The paper (Ren et al. 2021, arXiv 2104.09122) clusters the states of Hopper and shows the actions within one cluster by
t-SNE. Here: 20 stochastic episodes of each policy, at most 10,000 states each, which are its own states; an equal share
of all these are the common ones. They are standardised and fall into 8 clusters by k-means. In up to 250 states of each
cluster every expert says its action, once by its mean and once by a draw: tanh(u) of SAC, clip(u, -1, 1) of PPO. A gate
that averages its experts (an actor with a method `experts`) is asked before it averages. Experts whose mean weight over
the states is below 1 / (10 K) are left out: what is never used looks different from all the rest.

Distances in a t-SNE plot mean nothing, so the table has three numbers in the space of actions, each the mean over the
clusters weighted by their states:
* silhouette of the actions by expert: 1 if the experts are apart, 0 if they overlap, less if they are mixed up;
* neighbours: share of actions whose 5 nearest neighbours are mostly of the same expert, where chance gives `chance`;
* ratio: mean distance of two actions of different experts over that of two of the same expert.
The picture is of the common states' largest cluster; where actions have two or three dimensions they are shown as well.
"""

import argparse
import csv
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from policy import experts, load, visited
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

EPISODES, STATES, CLUSTERS, SHOWN, NEIGHBOURS = 20, 10_000, 8, 250, 5
FOLDER = Path(__file__).resolve().parent


class Cluster(NamedTuple):
    size: int  # number of states, of which `actions` may have fewer
    actions: dict[str, np.ndarray]  # "means", "draws" -> (states, experts, A)


def clusters(states: torch.Tensor, actor, kept: torch.Tensor) -> list[Cluster]:
    """The actions of the experts `kept` in clusters of `states` (N, O), the largest first."""
    x = states.numpy().astype(np.float64)
    x = (x - x.mean(0)) / (x.std(0) + 1e-8)
    assigned = KMeans(CLUSTERS, n_init=10, random_state=0).fit_predict(x)
    sizes, rng, result = np.bincount(assigned, minlength=CLUSTERS), np.random.default_rng(0), []
    for cluster in np.argsort(-sizes, kind="stable"):
        members = np.flatnonzero(assigned == cluster)
        chosen = rng.choice(members, min(SHOWN, len(members)), replace=False)
        policy = experts(actor, states[chosen])
        noise = torch.from_numpy(rng.standard_normal(policy.mean.shape, np.float32))
        bound = torch.tanh if policy.squashed else (lambda u: u.clamp(-1, 1))
        actions = {"means": bound(policy.mean), "draws": bound(policy.mean + policy.std * noise)}
        result.append(Cluster(len(members), {name: a[:, kept].numpy() for name, a in actions.items()}))
    return result


def distinguish(actions: np.ndarray) -> tuple[float, float, float]:
    """(states, experts, A) -> silhouette, neighbours and ratio, as the docstring above has them."""
    label = np.tile(np.arange(actions.shape[1]), len(actions))
    x = actions.reshape(len(label), -1).astype(np.float64)
    nearest = label[NearestNeighbors(n_neighbors=NEIGHBOURS).fit(x).kneighbors(return_distance=False)]  # not itself
    votes = (nearest[..., None] == np.arange(actions.shape[1])).sum(1)  # (points, experts)
    distance, same = cdist(x, x), label[:, None] == label
    within = distance[same].sum() / (same.sum() - len(x))  # without that to itself
    ratio = distance[~same].mean() / max(within, 1e-12)
    return silhouette_score(x, label), float((votes.argmax(1) == label).mean()), float(ratio)


def describe(found: list[Cluster]) -> list[dict]:
    """What the table says of the means and of the draws; a cluster of very few states does not count."""
    rows, found = [], [cluster for cluster in found if cluster.size > 2 * NEIGHBOURS]
    for name in ("means", "draws"):
        count, numbers = found[0].actions[name].shape[1], [np.nan] * 3
        if count > 1:
            each = [distinguish(cluster.actions[name]) for cluster in found]
            numbers = np.average(each, axis=0, weights=[cluster.size for cluster in found])
        row = {"actions": name, "experts": count, "silhouette": f"{numbers[0]:.3f}", "neighbours": f"{numbers[1]:.3f}"}
        rows.append(row | {"chance": f"{1 / count:.3f}", "ratio": f"{numbers[2]:.2f}"})
    return rows


def used(actor, states: torch.Tensor) -> torch.Tensor:
    """Which experts have a mean weight of at least 1 / (10 K), (K,)."""
    w = experts(actor, states).w.mean(0)
    return w >= 1 / (10 * len(w))


def picture(panels: dict[str, Cluster], file: Path):
    """A row for each policy: t-SNE of the means, t-SNE of the draws and, if they are few numbers, the means."""
    dimensions = next(iter(panels.values())).actions["means"].shape[-1]
    columns = 2 + (dimensions in (2, 3))
    figure = plt.figure(figsize=(2.7 * columns, 2.8 * len(panels)), layout="constrained")
    for row, (label, cluster) in enumerate(panels.items()):
        for column, (name, tsne) in enumerate([("means", True), ("draws", True), ("means", False)][:columns]):
            actions = cluster.actions[name]
            flat = actions.reshape(-1, actions.shape[-1])
            space = "3d" if not tsne and dimensions == 3 else None
            axis = figure.add_subplot(len(panels), columns, row * columns + column + 1, projection=space)
            if tsne:
                perplexity = min(30, (len(flat) - 1) // 3)
                flat = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(flat.astype(np.float64))
                axis.set(xticks=[], yticks=[])
            else:
                sides = "xyz"[:dimensions]
                axis.set(**{f"{side}lim": (-1, 1) for side in sides}, **{f"{side}ticks": (-1, 0, 1) for side in sides})
            points = flat.reshape(*actions.shape[:2], -1)
            for k in range(points.shape[1]):
                axis.scatter(*points[:, k].T, s=3, color=plt.get_cmap("tab20" if points.shape[1] > 10 else "tab10")(k))
            axis.set_title(f"{label}\n{name}, {'t-SNE' if tsne else 'as they are'}", fontsize=8)
            axis.tick_params(labelsize=6)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})
    plt.close(figure)


def main(paths: list[Path], figures: Path = FOLDER / "figures") -> Path:
    torch.set_num_threads(1)
    actors, own, rows, panels = {}, {}, [], {}
    for path in paths:
        saved, label = load(path), path.parent.name
        if label in own:
            raise ValueError(f"{path}: give one policy of each label, there are two of {label}")
        own[label], actors[label] = visited(saved, EPISODES, STATES), saved.agent.actor
        if experts(actors[label], own[label][:1]).mean.shape[1] == 1:
            raise ValueError(f"{path} is one Gaussian, without experts")
        if own[label].shape[1] != next(iter(own.values())).shape[1]:
            raise ValueError(f"{path} is of another environment than {paths[0]}")
    common = torch.cat([states[:: len(own)] for states in own.values()])
    for label, actor in actors.items():
        for name, states in (("own", own[label]), ("common", common)):
            kept = used(actor, states)
            found = clusters(states, actor, kept)
            rows += [{"label": label, "states": name, "of": len(kept)} | row for row in describe(found)]
        panels[label] = found[0]
    group = paths[0].parent.parent
    with open(group / "primitives.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    picture(panels, figures / f"{group.name}-primitives.png")
    return group / "primitives.csv"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", type=Path, nargs="+", help="files of results/policies, one of each label")
    try:
        print(main(parser.parse_args().policies))
    except (OSError, ValueError) as error:
        parser.exit(2, f"primitives.py: {error}\n")

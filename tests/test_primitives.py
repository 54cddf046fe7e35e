"""results/primitives.py: its statistics on actions whose structure is known."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load

RESULTS = Path(__file__).resolve().parent.parent / "results"


@pytest.fixture(scope="module")
def primitives():
    pytest.importorskip("sklearn")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RESULTS)
        yield load("primitives", RESULTS)


def test_experts_that_are_apart_and_experts_that_are_not(primitives):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, (200, 3, 2))
    apart = noise + np.array([[0, 0], [5, 0], [0, 5]])
    silhouette, neighbours, ratio = primitives.distinguish(apart)
    assert silhouette > 0.95 and neighbours == 1 and ratio > 20
    silhouette, neighbours, ratio = primitives.distinguish(noise)  # all draw from one Gaussian
    assert abs(silhouette) < 0.05 and abs(neighbours - 1 / 3) < 0.06 and ratio == pytest.approx(1, abs=0.02)
    states = rng.normal(0, 5, (200, 1, 2))  # what an action owes to the state is no difference of the experts
    assert primitives.distinguish(noise + states)[2] == pytest.approx(1, abs=0.02)


def test_ratio_by_hand(primitives):
    """Expert 0 at 0, 1, 0, 1, expert 1 at 3, 3, 3, 5: distances within are 2/3 and 1 on average, between 3."""
    actions = np.array([[0, 3], [1, 3], [0, 3], [1, 5.0]])[..., None]
    assert primitives.distinguish(actions)[2] == pytest.approx(3 / ((2 / 3 + 1) / 2))


def test_an_action_is_not_its_own_neighbour(primitives):
    """Against a plain loop over the actions, of experts that overlap."""
    actions = np.random.default_rng(2).normal([[0.0], [1.0]], 1, (30, 2, 1))
    points = [(value, k) for state in actions[..., 0] for k, value in enumerate(state)]
    right = 0
    for i, (value, k) in enumerate(points):
        others = sorted((abs(value - v), expert) for j, (v, expert) in enumerate(points) if j != i)
        right += sum(expert == k for _, expert in others[:5]) >= 3
    assert primitives.distinguish(actions)[1] == pytest.approx(right / 60)
    assert 0.5 < right / 60 < 1


class Actor(torch.nn.Module):
    """As sac_pmoe.py's: two experts whose means are the first number of the state and its opposite, one without use."""

    def forward(self, obs):
        mean = torch.stack([obs[:, :1], -obs[:, :1], 0 * obs[:, :1]], 1)  # (B, 3, 1)
        return mean, torch.full_like(mean, -3), torch.tensor([0.6, 0.38, 0.02]).expand(len(obs), -1)


def test_clusters_and_their_actions(primitives):
    """States in eight groups of two numbers; to the second, a thousand times smaller one, k-means must not be blind."""
    sizes, rng = [30, 80, 40, 300, 50, 60, 70, 20], np.random.default_rng(1)
    centres = [(x, 1e-3 * y) for x in (-1.5, -0.5, 0.5, 1.5) for y in (-1, 1)]
    states = np.concatenate([rng.normal(c, (0.01, 1e-5), (n, 2)) for c, n in zip(centres, sizes, strict=True)])
    states = torch.from_numpy(states.astype(np.float32))
    kept = primitives.used(Actor(), states)
    assert kept.tolist() == [True, True, False]  # 0.02 is below 1 / 30
    found = primitives.clusters(states, Actor(), kept)
    assert [cluster.size for cluster in found] == sorted(sizes, reverse=True)
    for cluster in found:
        means, draws = cluster.actions["means"], cluster.actions["draws"]
        assert means.shape == draws.shape == (min(cluster.size, primitives.SHOWN), 2, 1)
        np.testing.assert_allclose(means[:, 0, 0], np.tanh(centres[sizes.index(cluster.size)][0]), atol=0.04)
        np.testing.assert_allclose(means[:, 1], -means[:, 0], atol=1e-6)
        assert (np.arctanh(draws) - np.arctanh(means)).std() == pytest.approx(np.exp(-3), rel=0.4)


def test_clusters_weigh_by_their_states(primitives, monkeypatch):
    monkeypatch.setattr(primitives, "distinguish", lambda actions: (actions[0, 0, 0], 0.5, 2.0))
    zero, one = ({name: np.full((20, 2, 1), x) for name in ("means", "draws")} for x in (0.0, 1.0))
    few = {name: np.full((5, 2, 1), 100.0) for name in ("means", "draws")}  # too few states to count
    found = [primitives.Cluster(size, actions) for size, actions in ((300, zero), (100, one), (5, few))]
    for row, name in zip(primitives.describe(found), ("means", "draws"), strict=True):
        expected = {"actions": name, "experts": 2, "silhouette": "0.250", "neighbours": "0.500", "chance": "0.500"}
        assert row == expected | {"ratio": "2.00"}
    alone = [primitives.Cluster(300, {name: np.zeros((20, 1, 1)) for name in ("means", "draws")})]
    assert primitives.describe(alone)[0]["silhouette"] == "nan"


def test_a_gate_that_averages_is_asked_before_it_does(primitives):
    class Averaging(Actor):
        def experts(self, obs):
            return super().forward(obs)

        def forward(self, obs):
            raise AssertionError

    obs = torch.rand(4, 2)
    for actor in (Averaging(), Actor()):
        policy = primitives.experts(actor, obs)
        torch.testing.assert_close(policy.mean[:, 0], obs[:, :1])
        assert policy.squashed and policy.std.allclose(torch.tensor(-3.0).exp()) and policy.w[0, 0] == 0.6
    normalised = Averaging()
    normalised.normalize = lambda x: 10 * x  # PPO's
    policy = primitives.experts(normalised, obs)
    torch.testing.assert_close(policy.mean[:, 0], 10 * obs[:, :1])
    assert not policy.squashed


@pytest.mark.parametrize("name", ["sac_gmm", "sac_gating", "sac_mcp"])
def test_experts_of_the_scripts(primitives, name):
    """Their weights, and not the logarithms that some actors return."""
    script = load(name)
    actor, obs = script.Actor(11, 2, script.Args()), torch.randn(5, 11)
    mean, log_std, log_w = (actor.experts if hasattr(actor, "experts") else actor)(obs)
    policy = primitives.experts(actor, obs)
    for found, expected in zip(policy, (log_w.exp(), mean, log_std.exp()), strict=False):
        torch.testing.assert_close(found, expected)
    assert (policy.w > 0).all()


def save(script, path, **arguments):
    args = script.Args(env_id="moe_envs:TargetReaching-v0?layout=mirror", **arguments)
    agent = script.Agent(11, 2, args)
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {"script": script.SCRIPT, "args": dataclasses.asdict(args), "global_step": 1, "commit": None}
    torch.save(saved | {"agent": agent.state_dict()}, path)
    return path


@pytest.mark.parametrize("name", ["ppo_gating", "ppo_mcp", "ppo_dac"])
def test_experts_of_ppo_scripts(primitives, name):
    """Their weights, whose logarithms the actors return, at normalised observations; of options those of a start."""
    script = load(name)
    actor, obs = script.Actor(11, 2, script.Args()), torch.randn(5, 11)
    actor.normalize.update(10 * torch.randn(100, 11))
    normalised = actor.normalize(obs)
    if name == "ppo_dac":
        (mean, log_w, _), log_std = actor(normalised), actor.log_std
    else:
        mean, log_std, log_w, _ = actor.experts(normalised)
    policy = primitives.experts(actor, obs)
    for found, expected in zip(policy, (log_w.exp(), mean, log_std.exp().expand_as(mean)), strict=False):
        torch.testing.assert_close(found, expected)
    assert not policy.squashed and (policy.w > 0).all()


def test_table_and_figure(primitives, pmoe, ppo_pmoe, sac, tmp_path, monkeypatch):
    for name, value in (("EPISODES", 2), ("STATES", 200), ("SHOWN", 12), ("CLUSTERS", 3)):
        monkeypatch.setattr(primitives, name, value)
    paths = [save(script, tmp_path / "Task" / script.SCRIPT / "s1.pt") for script in (pmoe, ppo_pmoe)]
    with open(primitives.main(paths, tmp_path / "figures")) as file:
        rows = list(csv.DictReader(file))
    assert file.name.endswith("Task/primitives.csv")
    keys = [(row["label"], row["states"], row["actions"]) for row in rows]
    assert len(set(keys)) == 8 and {row["of"] for row in rows} == {"4"}
    assert all(-1 <= float(row["silhouette"]) <= 1 and float(row["ratio"]) > 0 for row in rows)
    assert (tmp_path / "figures" / "Task-primitives.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="is one Gaussian"):
        primitives.main([save(sac, tmp_path / "Task" / "sac" / "s1.pt")], tmp_path)
    with pytest.raises(ValueError, match="there are two of sac_pmoe"):
        primitives.main(paths[:1] * 2, tmp_path)

"""results/noise.py: what noise reaches the environment, and the table, by hand."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load

RESULTS = Path(__file__).resolve().parent.parent / "results"


@pytest.fixture(scope="module")
def noise():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RESULTS)
        yield load("noise", RESULTS)


class Actions:
    """An environment that keeps what it gets."""

    def reset(self, episode):
        self.episode, self.actions = episode, []
        return "obs", {}

    def step(self, action):
        self.actions.append(action)


def received(noise, sigma, on, period, seed=1, episode=0, action=0.0, steps=25):
    env = Actions()
    noisy = noise.Noisy(env, seed, sigma, on, period)
    assert noisy.reset(episode) == ("obs", {}) and env.episode == episode
    for _ in range(steps):
        noisy.step(np.full(3, action, np.float32))
    actions = np.array(env.actions)
    assert actions.dtype == np.float32  # a float64 action would step another trajectory
    return actions


def test_schedules(noise):
    burst, every = (received(noise, 0.1, *noise.SCHEDULES[name]) for name in ("burst", "every"))
    assert np.flatnonzero(burst.any(1)).tolist() == [0, 1, 10, 11, 20, 21]
    assert every.all() and (every[burst != 0] == burst[burst != 0]).all()  # the same noise at the same step
    assert not received(noise, 0.1, 0, 1).any()


def test_size_and_clipping(noise):
    small, large = (received(noise, sigma, 1, 1, steps=2000) for sigma in (0.1, 0.2))
    assert small.std() == pytest.approx(0.1, rel=0.05) and abs(small.mean()) < 0.005
    np.testing.assert_allclose(large, 2 * small, rtol=1e-6)
    edge = received(noise, 1.0, 1, 1, action=0.9)
    assert edge.max() == 1 and edge.min() >= -1


def test_noise_is_that_of_seed_and_episode(noise):
    first = received(noise, 0.1, 1, 1, seed=1, episode=2)
    assert (first == received(noise, 0.1, 1, 1, seed=1, episode=2, action=0.0)).all()
    np.testing.assert_allclose(received(noise, 0.1, 1, 1, seed=1, episode=2, action=0.5) - 0.5, first, atol=1e-6)
    for other in ({"seed": 2, "episode": 2}, {"seed": 1, "episode": 3}, {"seed": 2, "episode": 1}):
        assert (received(noise, 0.1, 1, 1, **other) != first).all()


def test_measure(noise, pmoe, tmp_path, monkeypatch):
    """Sigma 0 is an ordinary evaluation, by the gate's mode; noise on the actions of Pendulum changes the return."""
    monkeypatch.setattr(noise, "EPISODES", 2)
    args = pmoe.Args(env_id="Pendulum-v1", seed=3)
    torch.manual_seed(3)
    agent = pmoe.Agent(3, 1, args)
    saved = {"script": "sac_pmoe", "args": dataclasses.asdict(args), "global_step": 1, "commit": None}
    torch.save(saved | {"agent": agent.state_dict()}, tmp_path / "s3.pt")
    with open(noise.measure(tmp_path / "s3.pt")) as file:
        rows = list(csv.DictReader(file))
    assert file.name.endswith("s3.noise.csv") and len(rows) == 22
    env, args = pmoe.Env(args, evaluation=True), dataclasses.replace(args, eval_episodes=2)
    assert [row["policy"] for row in rows[::11]] == ["gate", "stochastic"]
    for row in rows[::11]:
        expected = pmoe.evaluate(agent, env, args, 0, row["policy"])
        assert (row["schedule"], row["return"], row["length"]) == ("none", f"{expected['return']:.2f}", "200.0")
    assert len({row["return"] for row in rows}) == 22


def test_table_and_figure(noise, tmp_path):
    for label, seed, clean, noisy in (("sac", 1, 100, 50), ("sac", 2, 400, 100), ("mix", 1, 10, 20)):
        (tmp_path / label).mkdir(exist_ok=True)
        lines = ["policy,schedule,sigma,episodes,return,length"]
        for policy in ("deterministic", "stochastic"):
            lines.append(f"{policy},none,0.0,20,{clean},7")
            lines += [f"{policy},{name},{s},20,{noisy},{seed}" for name in noise.SCHEDULES for s in noise.SIGMAS]
        (tmp_path / label / f"s{seed}.noise.csv").write_text("\n".join([*lines, ""]))
    pictures = {noise.draw(tmp_path, tmp_path / "noise.png").read_bytes() for _ in range(2)}
    assert len(pictures) == 1
    text = (tmp_path / "noise.csv").read_text().splitlines()
    assert len(text) == 1 + 2 * 22
    assert "sac,deterministic,none,0.0,2,250.0,1.000,7.0" in text
    assert "sac,stochastic,burst,0.3,2,75.0,0.375,1.5" in text  # the mean of 1/2 and 1/4, not 75 / 250
    assert "mix,deterministic,every,1.0,1,20.0,2.000,1.0" in text
    with pytest.raises(ValueError, match="has no LABEL"):
        noise.draw(tmp_path / "mix", tmp_path / "x.png")

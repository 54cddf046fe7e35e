"""results/sides.py: the sides, modes and gate of policies made by hand, for which all three are known."""

import csv
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, load

RESULTS = Path(__file__).resolve().parent.parent / "results"
MIRROR = "moe_envs:TargetReaching-v0?layout=mirror"


@pytest.fixture(scope="module")
def sides():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RESULTS)
        yield load("sides", RESULTS)


@pytest.fixture(scope="module")
def history(sides):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RESULTS)
        yield load("side_history", RESULTS)


# Numbers


@pytest.mark.parametrize(
    "path, x",
    [
        ([(0, -1), (1, 0.5), (0, 1)], 2 / 3),
        ([(0, -1), (-1, 1), (-1, -1), (3, 1)], 1),  # first on the left, at last on the right
        ([(0, -1), (-2, 0), (0, 1)], -2),  # 0 counts as above
        ([(0, -1), (1, -0.5)], math.nan),
    ],
)
def test_crossing(sides, path, x):
    assert sides.crossing([np.array(p, float) for p in path]) == pytest.approx(x, nan_ok=True)


@pytest.mark.parametrize("left, right, bits", [(50, 50, 1), (0, 90, 0), (90, 0, 0), (25, 75, 0.811278)])
def test_entropy(sides, left, right, bits):
    assert sides.entropy(left, right) == pytest.approx(bits, abs=1e-6)


MODES = [  # w, mean, std, modes of tanh(u), modes of u
    ([1], [0], [0.7], 1, 1),  # tanh(u) has two from a variance of 1/2 on
    ([1], [0], [0.72], 2, 1),
    ([1], [0], [7.4], 2, 1),  # at the largest log std of the scripts, 2
    ([1], [3], [1], 1, 1),
    ([1], [0.5], [2e-9], 1, 1),  # at the smallest, -20
    ([0.5, 0.5], [-0.2, 0.2], [0.25, 0.25], 1, 1),  # nearer than two standard deviations
    ([0.5, 0.5], [-0.2, 0.2], [0.15, 0.15], 2, 2),
    ([0.5, 0.5], [-1, 1], [2e-9, 2e-9], 2, 2),
    ([0.5, 0.5], [-0.5, 0.5], [1, 1], 2, 1),  # wide, and flat on top
    ([0.5, 0.5], [0.3, 0.3], [0.1, 0.1], 1, 1),  # two equal experts
    ([0.995, 0.005], [-1, 1], [0.1, 0.1], 1, 1),  # too rare to count
    ([0.98, 0.02], [-1, 1], [0.1, 0.1], 2, 2),
    ([1, 0], [-1, 1], [0.1, 0.1], 1, 1),
    ([0.2, 0.5, 0.3], [-1, 0, 1], [0.1, 0.2, 0.1], 3, 3),
    ([0.5, 0.5], [0, 0], [0.05, 0.6], 1, 1),  # a narrow one on a wide one
]


@pytest.mark.parametrize("w, mean, std, squashed, plain", MODES)
def test_count_modes(sides, w, mean, std, squashed, plain):
    arrays = [torch.tensor(x, dtype=torch.float64) for x in (w, mean, std)]
    assert (sides.count_modes(*arrays, True), sides.count_modes(*arrays, False)) == (squashed, plain)


# The actors of all scripts, at the start


def set_head(actor, mean, log_std, gate):
    """Lets the actor of a script ignore its input; mean (K, A), or (A,) of one Gaussian."""
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.zero_()
        mean, log_std = torch.tensor(mean), torch.full_like(torch.tensor(mean), log_std)
        if hasattr(actor, "log_std"):  # PPO
            actor.mean.b[:], actor.log_std[:] = mean.flatten(), log_std
        else:
            actor.head.bias[:] = torch.stack([mean, log_std]).flatten()
        if gate:
            bias = actor.gate.b if hasattr(actor.gate, "b") else actor.gate.bias
            bias[:] = torch.tensor(gate).log()


TWO = [[-0.5, 0.3], [0.5, 0.3]]
POLICIES = [  # script, mean, log std, gate, p_left, modes, modes_u
    ("sac", [0.5, 0.0], -2.0, None, "0.0001", 1, 1),  # Phi(-0.5 / e^-2) = 0.00011
    ("sac", [0.0, 0.0], 0.0, None, "0.5000", 2, 1),
    ("sac_pmoe", TWO, -2.0, [0.25, 0.75], "0.2501", 2, 2),
    ("sac_pmoe", TWO, -2.0, [1e-6, 1.0], "0.0001", 1, 1),
    ("sac_pmoe", [TWO[1]] * 2, -2.0, [0.25, 0.75], "0.0001", 1, 1),
    ("sac_gmm", TWO, -2.0, [0.25, 0.75], "0.2501", 2, 2),
    ("sac_gating", TWO, -2.0, [0.25, 0.75], "0.0324", 1, 1),  # Phi(-0.25 / e^-2)
    ("ppo", [0.5, 0.0], -2.0, None, "0.0001", 1, 1),
    ("ppo", [0.0, 0.0], 0.0, None, "0.5000", 1, 1),  # not squashed
    ("ppo_pmoe", TWO, -2.0, [0.25, 0.75], "0.2501", 2, 2),
    ("ppo_pmoe", TWO, 0.0, [0.5, 0.5], "0.5000", 1, 1),
    ("ppo_gating", TWO, -2.0, [0.25, 0.75], "0.0324", 1, 1),  # Phi(-0.25 / e^-2)
]


@pytest.mark.parametrize("name, mean, log_std, gate, p_left, modes, modes_u", POLICIES)
def test_at_the_start(sides, name, mean, log_std, gate, p_left, modes, modes_u):
    script = load(name)
    args = script.Args(env_id=MIRROR, **({"num_experts": 2} if gate else {}))
    agent = script.Agent(11, 2, args)
    set_head(agent.actor, mean, log_std, gate)
    row = sides.at_start(agent, np.zeros(11, np.float32))
    assert (row["p_left"], row["modes"], row["modes_u"]) == (p_left, modes, modes_u)
    assert row["gate"] == (" ".join(f"{x / sum(gate):.4f}" for x in gate) if gate else "")


def test_options_at_the_start(sides):
    """The episode's first step, where no option can stay: a mixture with the weights pi_W."""
    script = load("ppo_dac")
    actor = (agent := script.Agent(11, 2, script.Args(env_id=MIRROR, num_options=2))).actor
    for network in (actor.mean, actor.gate):
        network.w3.data.zero_()
    actor.mean.b3.data[:], actor.log_std.data[:] = torch.tensor(TWO)[:, None], -2.0
    actor.gate.b3.data[:] = torch.tensor([0.25, 0.75]).log()
    row = sides.at_start(agent, np.zeros(11, np.float32))
    assert row == {"p_left": "0.2501", "modes": 2, "modes_u": 2, "gate": "0.2500 0.7500"}


@pytest.mark.parametrize("gate, weights", [("sigmoid", [0.2, 0.6]), ("softmax", [0.25, 0.75])])
def test_product_at_the_start(sides, gate, weights):
    """Of precisions w_k / sigma^2: the mean is (w_2 - w_1) / (w_1 + w_2) / 2, the variance sigma^2 / (w_1 + w_2)."""
    script = load("sac_mcp")
    agent = script.Agent(11, 2, script.Args(env_id=MIRROR, num_experts=2, gate=gate))
    set_head(agent.actor, TWO, -2.0, [w / (1 - w) for w in weights] if gate == "sigmoid" else weights)
    row, mean, std = sides.at_start(agent, np.zeros(11, np.float32)), 0.25, math.exp(-2) / math.sqrt(sum(weights))
    assert float(row["p_left"]) == pytest.approx(0.5 * math.erfc(mean / std / math.sqrt(2)), abs=1e-4)
    assert (row["modes_u"], row["gate"]) == (1, " ".join(f"{w:.4f}" for w in weights))


# Whole policies


@torch.no_grad()
def pilot(script, experts, gate_bias=0.0):
    """An agent of sac.py or sac_pmoe.py that flies round the obstacle.

    Expert +1 holds x at 1.3 - 0.73 |y|, expert -1 at the mirror image; both climb at a speed of 0.6. The gate goes by
    the sign of x, so that a side once taken is kept, and by its bias at the start, where x = 0.
    """
    args = script.Args(env_id=MIRROR, **({"num_experts": len(experts)} if len(experts) > 1 else {}))
    agent = script.Agent(11, 2, args)
    actor, signs = agent.actor, torch.tensor([1.0, -1.0])
    for parameter in actor.parameters():
        parameter.zero_()
    for i, value in enumerate((0, 1, 2, 3)):  # hidden units 2i, 2i + 1: positive and negative part of x, y, v_x, v_y
        actor.trunk[0].weight[2 * i : 2 * i + 2, value] = signs
    actor.trunk[2].weight[:8, :8] = torch.eye(8)
    weight = actor.head.weight.view(2, len(experts), 2, -1)  # (mean and log std, K, A, H), as the bias
    bias = actor.head.bias.view(2, len(experts), 2)
    for k, side in enumerate(experts):
        weight[0, k, 0, 0:2] = -20 * 5 * signs  # a_x = 20 (x* - x) - 6 v_x; observations hold position / 5
        weight[0, k, 0, 2:4] = -20 * 5 * 0.73 * side
        weight[0, k, 0, 4:6] = -6 * signs
        weight[0, k, 1, 6:8] = -4 * signs  # a_y = 4 (0.6 - v_y)
        bias[0, k] = torch.tensor([20 * 1.3 * side, 4 * 0.6])
    bias[1] = -3
    if len(experts) > 1:
        actor.gate.weight[:, 0:2] = 1e4 * torch.tensor(experts)[:, None] * signs
        actor.gate.bias[0] = gate_bias
    return agent, args


def save(script, agent, args, path):
    """A policy.pt as a finished run leaves it."""
    actor = {key: value for key, value in agent.state_dict().items() if key.startswith("actor.")}
    saved = {"script": script.SCRIPT, "args": dataclasses.asdict(args), "global_step": 1, "commit": None}
    torch.save(saved | {"agent": actor}, path)


def run(sides, path):
    with open(sides.main(path)) as file:
        return {row["policy"]: row for row in csv.DictReader(file)}


def test_policy_with_two_ways(sides, pmoe, tmp_path, monkeypatch):
    monkeypatch.setattr(sides, "EPISODES", 40)
    save(pmoe, *pilot(pmoe, (-1.0, 1.0)), tmp_path / "policy.pt")
    rows = run(sides, tmp_path)
    row, gate = rows["stochastic"], rows["gate"]
    assert (row["success"], row["modes"], row["gate"]) == ("1.0", "2", "0.5000 0.5000")
    assert int(row["left"]) + int(row["right"]) == 40 and 7 < int(row["left"]) < 33  # 4 standard deviations
    assert float(row["entropy"]) > 0.66 and float(row["p_left"]) == pytest.approx(0.5)
    assert gate["success"] == "1.0" and 7 < int(gate["left"]) < 33 and gate["modes"] == ""


def test_policies_with_one_way(sides, pmoe, sac, tmp_path, monkeypatch):
    """A mixture whose gate has decided, one whose experts agree, and a single Gaussian; from files, as committed."""
    monkeypatch.setattr(sides, "EPISODES", 20)
    for name, script, arguments in (
        ("decided", pmoe, ((-1.0, 1.0), 30.0)),
        ("agreed", pmoe, ((-1.0, -1.0),)),
        ("single", sac, ((-1.0,),)),
    ):
        save(script, *pilot(script, *arguments), tmp_path / f"{name}.pt")
        row = run(sides, tmp_path / f"{name}.pt")["stochastic"]
        assert (row["success"], row["left"], row["right"], row["entropy"]) == ("1.0", "20", "0", "0.0000"), name
        assert (row["p_left"], row["modes"]) == ("1.0000", "1"), name
        assert row["gate"] == {"decided": "1.0000 0.0000", "agreed": "0.5000 0.5000", "single": ""}[name]
    assert {path.stem for path in tmp_path.glob("*.csv")} == {"decided.sides", "agreed.sides", "single.sides"}


def test_sides_do_not_count_below_nine_tenths(sides, sac, monkeypatch):
    """Nor do those of episodes that fail: here every fourth, and then every twentieth, flies into the obstacle."""
    monkeypatch.setattr(sides, "EPISODES", 20)
    agent, args = pilot(sac, (1.0,))
    env = sac.Env(args, evaluation=True)
    saved = SimpleNamespace(script=sac, args=args, env=env)
    for period, success, known in ((4, 0.75, False), (20, 0.95, True)):

        def act(obs, policy, period=period):
            return np.float32([0, 1]) if env.episode % period == 0 else agent.act(obs, policy)

        saved.agent = SimpleNamespace(act=act)
        row = sides.fly(saved, "stochastic")
        assert (row["success"], row["left"], row["right"]) == (success, 0, 20 * success)
        assert row["entropy"] == ("0.0000" if known else "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_policies_of_every_script(sides, name, tmp_path, monkeypatch):
    """Untrained, so that hardly anybody arrives; what a mixture has beside one Gaussian is its gate."""
    monkeypatch.setattr(sides, "EPISODES", 2)
    script = load(name)
    args = script.Args(env_id=MIRROR)
    torch.manual_seed(0)  # of random policies one episode in a hundred arrives
    save(script, script.Agent(11, 2, args), args, tmp_path / "s1.pt")
    rows = run(sides, tmp_path / "s1.pt")
    assert set(rows) == {"stochastic", *script.Actor.policies} - {"deterministic"}
    row = rows["stochastic"]
    arrived = int(row["left"]) + int(row["right"])
    assert arrived < 2 and (row["episodes"], row["success"], row["entropy"]) == ("2", f"{arrived / 2}", "")
    assert len(row["gate"].split()) == vars(args).get("num_experts", vars(args).get("num_options", 0))


def test_refusals(sides, sac, tmp_path):
    args = sac.Args(env_id="moe_envs:TargetReaching-v0?layout=fixed")
    agent = sac.Agent(17, 2, args)
    save(sac, agent, args, tmp_path / "fixed.pt")
    with pytest.raises(ValueError, match="the sides are those of layout=mirror"):
        sides.main(tmp_path / "fixed.pt")
    saved = torch.load(tmp_path / "fixed.pt", weights_only=True)
    del saved["agent"]["actor.head.bias"]
    torch.save(saved, tmp_path / "less.pt")
    with pytest.raises(ValueError, match="has no actor.head.bias"):
        sides.main(tmp_path / "less.pt")


# Over training


def test_best_action_of_each_side(history):
    """Of critics that are known: what counts is the smaller Q, and a side begins at |a_x| = 0.5."""

    def critic(obs, action):  # (B, O), (B, N, A) -> (2, B, N)
        x, y = action.unbind(-1)
        return torch.stack([3 - (x + 0.7) ** 2 - (y - 0.4) ** 2, torch.full_like(x, 100), -10 * x])[[0, 2]]

    q_left, q_right = history.best(critic, np.zeros(11, np.float32))
    assert q_left == pytest.approx(3) and q_right == pytest.approx(-5)  # at (-0.7, 0.4), and at a_x = 0.5


def test_history_is_of_runs_with_two_critics(history, tmp_path):
    info = {"script": "ppo", "args": {"env_id": MIRROR}, "command": "python algos/ppo.py"}
    (tmp_path / "run.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="not of SAC on layout=mirror"):
        history.main(tmp_path, every=10)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_history_repeats_the_run(sides, history, pmoe, tmp_path, capsys):
    flags = ["--env-id", MIRROR, "--total-timesteps", "70", "--learning-starts", "20", "--num-threads", "1"]
    flags += ["--batch-size", "8", "--eval-episodes", "1", "--eval-every", "30", "--run-dir", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["algos/sac_pmoe.py", *flags])  # run.json has the command
        pmoe.main(flags)
        patch.setattr(sides, "EPISODES", 1)
        patch.setattr("sides.EPISODES", 1)
        path = history.main(tmp_path, every=25)
        assert "the same weights as" in capsys.readouterr().out
        with open(path) as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == ["20", "45", "70"]
        assert rows[0]["alpha"] == "0.1000" and len({row["gate"] for row in rows}) == 3
        end = run(sides, tmp_path)["stochastic"]
        for name in ("p_left", "modes", "modes_u", "gate", "success", "left", "right"):
            assert rows[-1][name] == end[name]

        saved = torch.load(tmp_path / "policy.pt", weights_only=True)
        saved["agent"]["actor.head.bias"][0] += 1e-7
        torch.save(saved, tmp_path / "policy.pt")
        history.main(tmp_path, every=1000)
        assert "OTHER weights than" in capsys.readouterr().out

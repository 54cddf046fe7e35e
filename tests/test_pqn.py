"""PQN and its mixtures: the mathematics on probe environments and by hand, MinAtar's rules, whole runs, errors."""

import difflib
import json
import re
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pages
import pytest
import reading
import routing
import torch
from conftest import ALGOS, check_shuffling, check_video_faults, load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from test_training import NO_GPU, flags, model, same, start

Environment = pytest.importorskip("minatar").Environment
SMALL = dict(num_envs=4, num_steps=8, num_minibatches=4, update_epochs=1, time_limit=30, num_threads=1)
TINY = SMALL | dict(total_timesteps=310, eval_every=160, eval_episodes=2, checkpoint_every=100)
TINY |= dict(exploration_fraction=0.5)
KINDS = ("none", "soft", "topk", "wide", "tokens")


@pytest.fixture(scope="module")
def pqn():
    return load("pqn")


@pytest.fixture(scope="module")
def moe():
    return load("pqn_moe")


@pytest.fixture(scope="module", params=["pqn", "pqn_moe"])
def script(request):
    return load(request.param)


def train(script, folder, **changes):
    return script.main(flags(**(TINY | {"run_dir": str(folder)} | changes)))


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    return train(script, tmp_path_factory.mktemp(script.SCRIPT) / "run")


# The mathematics


def column(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)[:, None]  # one game


def test_lambda_returns_by_hand(pqn):
    """One game terminates in its second step, is truncated in its fourth, and the rollout ends after its sixth."""
    reward, next_value = column(1, 2, 3, 4, 5, 6), column(10, 20, 30, 40, 50, 60)
    terminated, truncated = (column(*(t == end for t in range(6)), dtype=torch.bool) for end in (1, 3))
    targets = pqn.lambda_returns(reward, terminated, truncated, next_value, pqn.Args(gamma=0.5, q_lambda=0.5))
    # 2; 1 + (10 + 2) / 4; 4 + 40 / 2; 3 + (30 + 24) / 4; 6 + 60 / 2; 5 + (50 + 36) / 4
    assert targets[:, 0].tolist() == [4.0, 2.0, 16.5, 24.0, 26.5, 36.0]


def test_lambda_returns_are_the_mixture_of_all_n_step_returns(pqn):
    """The forward view: (1 - lambda) sum_n lambda^(n-1) G^(n), what is left of the weights on the longest."""
    rng, (steps, games) = np.random.default_rng(0), (12, 40)
    reward, value = rng.normal(size=(2, steps, games))
    terminated = rng.random((steps, games)) < 0.15
    truncated = (rng.random((steps, games)) < 0.15) & ~terminated
    args = pqn.Args(gamma=0.9, q_lambda=0.7)
    targets = pqn.lambda_returns(*map(torch.from_numpy, (reward, terminated, truncated, value)), args)
    for t in range(steps):
        for i in range(games):
            n_step, weight, mixture, total = 0.0, 1.0, 0.0, 0.0
            for n in range(steps - t):
                n_step += 0.9**n * reward[t + n, i]
                last = terminated[t + n, i] or truncated[t + n, i] or t + n == steps - 1
                full = n_step + 0.9 ** (n + 1) * value[t + n, i] * (not terminated[t + n, i])
                share = weight if last else 0.3 * weight
                mixture, total, weight = mixture + share * full, total + share, 0.7 * weight
                if last:
                    break
            assert total == pytest.approx(1) and targets[t, i].item() == pytest.approx(mixture, abs=1e-6)


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_returns_do_not_leak_over_the_end_of_an_episode(pqn, end):
    ends = {"terminated": torch.zeros(8, 3, dtype=torch.bool), "truncated": torch.zeros(8, 3, dtype=torch.bool)}
    ends[end][4] = True
    reward, value = torch.randn(2, 8, 3)
    before = pqn.lambda_returns(reward, ends["terminated"], ends["truncated"], value, pqn.Args())
    after = pqn.lambda_returns(
        torch.where(torch.arange(8)[:, None] > 4, 100.0, reward),
        ends["terminated"],
        ends["truncated"],
        torch.where(torch.arange(8)[:, None] > (3 if end == "terminated" else 4), 100.0, value),
        pqn.Args(),
    )
    assert torch.equal(before[:5], after[:5]) and not (before[5:] == after[5:]).any()


class Probe:
    """N games of one probe environment in the form of Games: it shows `state` as the number of lit cells, 0 to 100."""

    actions = [0, 1]

    def __init__(self, number=16):
        self.rng, self.state = np.random.default_rng(0), [0] * number
        self.state = [self.first() for _ in range(number)]

    @staticmethod
    def picture(states):
        return (np.arange(100) < np.reshape(states, (-1, 1))).reshape(-1, 10, 10, 1)

    @property
    def obs(self):
        return self.picture(self.state)

    def first(self):
        return 0

    def step(self, actions):
        steps, ended = [self.play(s, a) for s, a in zip(self.state, actions, strict=True)], []
        self.state = [state for state, *_ in steps]
        for i, (state, _, terminated, truncated) in enumerate(steps):
            if terminated or truncated:
                ended.append((i, self.picture(state)[0], (0.0, 1)))
                self.state[i] = self.first()
        return *(torch.tensor(x) for x in list(zip(*steps, strict=True))[1:]), ended


class OneStep(Probe):
    """Reward 1, the end."""

    values = {0: 1.0}

    def play(self, state, action):
        return 0, 1.0, True, False


class Endless(Probe):
    """Reward 1, cut by a time limit: it goes on, 1 / (1 - gamma) = 2."""

    values = {0: 2.0}

    def play(self, state, action):
        return 0, 1.0, False, True


class TwoSteps(Probe):
    """Reward 1 after the second step: gamma, 1."""

    values = {0: 0.5, 50: 1.0}

    def play(self, state, action):
        return (50, 0.0, False, False) if state == 0 else (0, 1.0, True, False)


class Told(Probe):
    """The picture tells the reward."""

    values = {0: -1.0, 50: 1.0}

    def first(self):
        return int(self.rng.integers(2)) * 50

    def play(self, state, action):
        return 0, 1.0 if state else -1.0, True, False


class Chosen(Probe):
    """Action 1 is worth 1, action 0 nothing."""

    values = {0: (0.0, 1.0)}

    def play(self, state, action):
        return 0, float(action), True, False


@pytest.mark.parametrize(
    ("kind", "probe"),
    [*(("pqn", probe) for probe in (OneStep, Endless, TwoSteps, Told, Chosen)), ("soft", Told), ("topk", TwoSteps)],
)
def test_probe_environments_have_their_known_values(pqn, moe, kind, probe):
    script, changes = (pqn, {}) if kind == "pqn" else (moe, {"moe": kind, "num_experts": 2})
    args = script.Args(num_envs=16, num_steps=2, num_minibatches=2, gamma=0.5, learning_rate=5e-3, **changes)
    torch.manual_seed(0)
    games, agent = probe(), script.Agent(1, 2, args)
    for i in range(50):
        agent.optimizers[0].param_groups[0]["lr"] = args.learning_rate * (1 - i / 50)
        script.learn(agent, script.rollout(agent, games, 1.0, args)[0], args)
    with torch.no_grad():
        q = agent.network(torch.from_numpy(probe.picture(list(probe.values))))
    expected = torch.tensor([value if isinstance(value, tuple) else (value, value) for value in probe.values.values()])
    assert q.numpy() == pytest.approx(expected.numpy(), abs=0.08)


def test_a_rollout_bootstraps_from_the_state_behind_a_truncation(pqn):
    """The state counts steps, is truncated at 3 and starts again at 0; V(s) = s, gamma 1, lambda 0: G = 0 + V(s')."""

    class Counting(Probe):
        def play(self, state, action):
            return state + 1, 0.0, False, state == 2

    class Counted:
        def act(self, obs, epsilon):
            assert obs.dtype == torch.bool
            return torch.zeros(len(obs), dtype=torch.long), obs.flatten(1).sum(1).float()

    args = pqn.Args(num_envs=2, num_steps=5, gamma=1.0, q_lambda=0.0)
    batch, episodes = pqn.rollout(Counted(), Counting(2), 0.0, args)
    assert batch.obs.flatten(1).sum(1).view(5, 2)[:, 0].tolist() == [0, 1, 2, 0, 1]
    assert batch.target.view(5, 2).tolist() == [[1, 1], [2, 2], [3, 3], [1, 1], [2, 2]]
    assert len(episodes) == 2


def test_a_rollout_keeps_every_picture(script):
    """games.obs is written over by each step: what learns must be what was seen when the action was chosen."""
    args = script.Args(game="breakout", num_envs=3, num_steps=12, time_limit=5)
    games, again = script.Games(args, 3), script.Games(args, 3)
    batch, _ = script.rollout(script.Agent(4, 3, args), games, 1.0, args)
    for obs, action in zip(batch.obs.unflatten(0, (12, 3)), batch.action.view(12, 3), strict=True):
        assert np.array_equal(obs.numpy(), again.obs)
        again.step(action.tolist())


@pytest.mark.parametrize("probe", [OneStep, Endless])
def test_a_rollout_reports_every_episode_that_ended(script, probe):
    args = script.Args(num_envs=2, num_steps=5)
    assert script.rollout(script.Agent(1, 2, args), probe(2), 1.0, args)[1] == [(0.0, 1)] * 10


def test_update_is_half_the_squared_error_of_the_action_taken(pqn):
    args = pqn.Args(max_grad_norm=0.1)
    agent = pqn.Agent(4, 5, args)
    batch = pqn.Batch(torch.rand(6, 10, 10, 4) < 0.2, torch.arange(6) % 5, torch.randn(6))
    q = agent.network(batch.obs)
    expected = sum((q[i, i % 5] - batch.target[i]) ** 2 for i in range(6)) / 12
    metrics = pqn.update(agent, batch, args)
    assert metrics["losses/critic"].item() == pytest.approx(expected.item(), rel=1e-5)
    norm = torch.stack([p.grad.square().sum() for p in agent.parameters()]).sum().sqrt()
    assert metrics["losses/gradient_norm"] > 0.1 and norm.item() == pytest.approx(0.1, rel=1e-3)


def test_every_pass_takes_each_row_once_in_an_order_of_its_own(pqn, monkeypatch):
    check_shuffling(pqn, monkeypatch)


def test_the_optimizer_is_radam(script):
    (optimizer,) = script.Agent(4, 5, script.Args()).optimizers
    assert type(optimizer) is torch.optim.RAdam and optimizer.defaults["lr"] == 5e-4


def test_the_stochastic_policy_is_epsilon_greedy_and_the_other_greedy(pqn):
    args, seen = pqn.Args(eval_episodes=2, time_limit=3), []
    agent = pqn.Agent(4, 5, args)
    act = agent.act
    agent.act = lambda obs, epsilon: seen.append(epsilon) or act(obs, epsilon)
    for policy, epsilon in (("deterministic", 0), ("stochastic", 0.05)):
        seen.clear()
        pqn.evaluate(agent, args, 0, policy)
        assert set(seen) == {epsilon}


@pytest.mark.parametrize("kind", KINDS)
def test_relu_stands_before_the_last_layer(moe, kind):
    network, seen = moe.Network(4, 5, moe.Args(moe=kind)), []
    network.head.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    network(torch.rand(8, 10, 10, 4) < 0.3)
    assert seen[0].min() == 0 and 0.1 < (seen[0] == 0).float().mean() < 0.9
    if kind in ("soft", "topk"):
        assert network.middle[0].phi.std().item() == pytest.approx(0.25, rel=0.3)  # 1 / sqrt(16)


def test_epsilon_is_the_share_of_random_actions(pqn):
    torch.manual_seed(0)
    agent = pqn.Agent(4, 5, pqn.Args())
    obs = (torch.rand(1, 10, 10, 4) < 0.2).expand(4000, -1, -1, -1)
    best = agent.network(obs[:1]).argmax().item()
    for epsilon in (0.0, 0.5, 1.0):
        action, value = agent.act(obs, epsilon)
        assert (action == best).float().mean().item() == pytest.approx(1 - 0.8 * epsilon, abs=0.03)
        torch.testing.assert_close(value, agent.network(obs).amax(1))


def test_layer_norm_takes_the_channels_of_a_cell_not_the_picture(script):
    """A change in one corner reaches only the cells whose 3x3 patch sees it; over the picture it would reach all."""
    network, seen = script.Network(4, 5, script.Args()), []
    network.cells.register_forward_hook(lambda _, __, x: seen.append(x))
    obs = torch.rand(1, 10, 10, 4) < 0.5
    network(obs)
    obs[0, 0, 0] = ~obs[0, 0, 0]
    network(obs)
    changed = (seen[0] != seen[1]).any(-1)[0]
    assert changed[0] and not changed[1:].any()
    rows = network.cells[0](network.conv(obs.permute(0, 3, 1, 2).float()).flatten(2).transpose(1, 2))
    assert rows.mean(-1).abs().max() < 1e-5 and rows.var(-1, correction=0).mean().item() == pytest.approx(1, abs=0.02)


def mlp(expert, x):
    return torch.relu(x @ expert[0].weight.T) @ expert[2].weight.T


@pytest.mark.parametrize("n", [1, 3, 4])
def test_soft_moe_against_einsum(moe, n):
    """One expert has one slot a cell; three have 21 each."""
    layer, x = moe.Mixture(moe.Args(moe="soft", num_experts=n)), torch.randn(5, 64, 16)
    slots = 64 // n
    assert layer.phi.shape == (16, n * slots)
    logits = torch.einsum("bmd,ds->bms", x, layer.phi).exp()
    dispatch = logits / torch.einsum("bms->bs", logits)[:, None]  # over the tokens
    combine = logits / torch.einsum("bms->bm", logits)[:, :, None]  # over the slots
    inputs = torch.einsum("bms,bmd->bsd", dispatch, x)
    outputs = torch.stack([mlp(layer.experts[s // slots], inputs[:, s]) for s in range(n * slots)], 1)
    expected = layer.norm(torch.einsum("bms,bsd->bmd", combine, outputs))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    shares = combine.mean((0, 1)).view(n, slots).sum(1)
    torch.testing.assert_close(layer.usage, shares)


def test_topk_sends_each_token_to_the_expert_with_the_largest_weight(moe):
    layer, x = moe.Mixture(moe.Args(moe="topk", num_experts=3)), torch.randn(4, 64, 16)
    y, chosen = layer(x), []
    for b in range(4):
        for m in range(64):
            w = torch.softmax(x[b, m] @ layer.phi, 0)
            chosen.append(int(w.argmax()))
            expected = w.max() * layer.norm(mlp(layer.experts[chosen[-1]], x[b, m]))
            torch.testing.assert_close(y[b, m], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.usage, torch.bincount(torch.tensor(chosen), minlength=3) / 256)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_the_weight_of_the_chosen_expert_counts(moe):
    """A LayerNorm behind w f(x) would take it out again, and the router would learn from rounding alone."""
    torch.manual_seed(0)
    network = moe.Network(4, 5, moe.Args(moe="topk"))
    obs, layer = torch.rand(64, 10, 10, 4) < 0.1, network.middle[0]
    before = network(obs)
    before.square().mean().backward()
    assert layer.phi.grad.norm() > 0.02 * layer.experts[0][2].weight.grad.norm()
    shares = layer.usage
    layer.phi.data *= 5  # the same choices, with larger weights
    after = network(obs)
    assert torch.equal(layer.usage, shares) and (after - before).norm() > 0.1 * before.norm()


def test_tokens_alone_are_one_expert_on_each_cell(moe):
    layer, x = moe.Mixture(moe.Args(moe="tokens", num_experts=8)), torch.randn(4, 64, 16)
    assert len(layer.experts) == 1 and not hasattr(layer, "phi")
    torch.testing.assert_close(layer(x), layer.norm(mlp(layer.experts[0], x)))


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        (dict(moe="none"), 133_142),
        (dict(moe="wide", widen=2), 265_366),
        (dict(moe="wide", widen=4), 529_814),
        (dict(moe="wide", widen=8), 1_058_710),
        (dict(moe="soft", num_experts=1), 12_214),
        (dict(moe="soft", num_experts=8), 40_886),
        (dict(moe="tokens"), 12_214 - 16 * 64),  # one expert without Phi
        (dict(moe="topk", num_experts=4), 12_214 - 16 * 64 + 3 * 4096 + 16 * 4),
    ],
)
def test_numbers_of_parameters(moe, changes, count):
    network = moe.Network(6, 6, moe.Args(**changes))  # Space Invaders with all six actions
    assert sum(p.numel() for p in network.parameters()) == count
    assert network(torch.rand(3, 10, 10, 6) < 0.2).shape == (3, 6)


def test_measure_counts_dormant_units_and_the_effective_rank(pqn):
    class Known(torch.nn.Module):
        """Four hidden units, 0, 0.02, 1 and 1 on the mean, and features with singular values 90, 8, 1.9, 0.1."""

        def __init__(self):
            super().__init__()
            self.relu, self.head = torch.nn.ReLU(), torch.nn.Linear(4, 2)

        def forward(self, obs):
            self.relu(torch.tensor([[-1.0, 0.04, 1.0, 0.0], [-1.0, -9.0, 1.0, 2.0]]))
            left, right = (torch.linalg.qr(torch.randn(k, 4))[0] for k in (30, 4))
            return self.head(left @ torch.diag(torch.tensor([90.0, 8.0, 1.9, 0.1])) @ right)

    # The mean is 0.505, so 0.0126 is the limit of tau 0.025: the unit of 0.02 counts as alive
    assert pqn.measure(Known(), torch.zeros(1)) == {"dormant": 0.25, "rank": 3}


def test_dormant_units_are_compared_with_their_own_layer(pqn):
    """The second layer's values are a thousand times smaller: none of its units sleeps for that."""

    class Known(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = torch.nn.ReLU(), torch.nn.ReLU(), torch.nn.Linear(4, 2)

        def forward(self, obs):
            self.one(torch.tensor([[1.0, 0.0]]))
            self.two(torch.tensor([[1e-3, 1e-3]]))
            return self.head(torch.eye(4))

    assert pqn.measure(Known(), torch.zeros(1))["dormant"] == 0.25


def test_measure_takes_an_expert_that_nobody_chooses_as_dormant(moe):
    agent = moe.Agent(4, 5, moe.Args(moe="topk", num_experts=4))
    before = moe.measure(agent.network, torch.rand(8, 10, 10, 4) < 0.3)
    agent.network.middle[0].phi.data[:, 1:] = 0
    agent.network.middle[0].phi.data[:, 0] = 100  # tokens are not negative
    after = moe.measure(agent.network, torch.rand(8, 10, 10, 4) < 0.3)
    units = 16 + 4 * 128 + 16
    assert after["dormant"] >= 3 * 128 / units > before["dormant"]


# MinAtar


def test_games_follow_gymnax_rules_by_default_and_minatars_by_flags(pqn):
    games = pqn.Games(pqn.Args(), 2)
    assert games.actions == [0, 1, 2, 3, 4] and games.games[0].sticky_action_prob == 0
    assert pqn.Games(pqn.Args(game="breakout"), 1).actions == [0, 1, 3]
    games = pqn.Games(pqn.Args(game="breakout", sticky_actions=0.1, minimal_actions=False), 1)
    assert games.actions == [0, 1, 2, 3, 4, 5] and games.games[0].sticky_action_prob == 0.1


def test_an_action_is_one_of_the_games_minimal_actions(script):
    """Breakout's are nothing, left and right, MinAtar's 0, 1 and 3."""
    for minimal, numbers in ((True, (0, 1, 3)), (False, range(6))):
        for action, number in enumerate(numbers):
            games = script.Games(script.Args(game="breakout", minimal_actions=minimal), 1)
            plain = Environment("breakout", 0.0)
            plain.seed(games.first_seed), plain.reset()
            for _ in range(3):
                games.play(0, action), plain.act(number)
            assert np.array_equal(games.obs[0], plain.state()), (minimal, action)


def test_returns_are_sums_of_rewards(pqn):
    games = pqn.Games(pqn.Args(game="breakout", time_limit=20), 1)
    act, steps = games.games[0].act, []
    games.games[0].act = lambda a: (2, act(a)[1])
    while not (ended := games.step([0])[3]):
        steps.append(1)
    assert ended[0][2] == (2 * (len(steps) + 1), len(steps) + 1) and steps


def test_the_time_limit_truncates_and_an_end_terminates(pqn):
    games = pqn.Games(pqn.Args(game="breakout", time_limit=25), 8)
    seen, rng = set(), np.random.default_rng(0)
    for _ in range(300):
        before = [len(played) for played in games.played]
        reward, terminated, truncated, ended = games.step(rng.integers(3, size=8).tolist())
        assert not (terminated & truncated).any()
        assert truncated.tolist() == [length == 24 and not end for length, end in zip(before, terminated, strict=True)]
        for i, last_obs, (total, length) in ended:
            assert length == before[i] + 1 and total >= 0 and not games.played[i]
            assert last_obs.any() and not np.array_equal(last_obs, games.obs[i])
            seen.add(bool(truncated[i]))
    assert seen == {True, False} and len(set(games.episodes)) == 8


@pytest.mark.parametrize("game", ["asterix", "breakout", "freeway", "seaquest", "space_invaders"])
def test_games_go_on_exactly_from_their_state(pqn, game):
    args = pqn.Args(game=game, sticky_actions=0.25, minimal_actions=False, time_limit=40)
    first, second, rng = pqn.Games(args, 6), pqn.Games(args, 6), np.random.default_rng(0)
    plans = rng.integers(6, size=(150, 6)).tolist()
    for actions in plans[:90]:
        first.step(actions)
    second.load_state_dict(json.loads(json.dumps(first.state_dict() | {"obs": first.obs.tolist()})))
    for actions in plans[90:]:
        a, b = first.step(actions), second.step(actions)
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        assert np.array_equal(first.obs, second.obs) and [x[::2] for x in a[3]] == [x[::2] for x in b[3]]


def test_games_that_do_not_repeat_themselves_are_refused(pqn):
    games = pqn.Games(pqn.Args(), 2)
    for _ in range(20):
        games.step([1, 2])
    state = games.state_dict() | {"obs": torch.from_numpy(games.obs.copy())}
    state["obs"][0, 0, 0] = ~state["obs"][0, 0, 0]
    with pytest.raises(ValueError, match="does not repeat"):
        pqn.Games(pqn.Args(), 2).load_state_dict(state)


def test_evaluation_has_episodes_of_its_own(pqn):
    training, evaluation = pqn.Games(pqn.Args(), 20), pqn.Games(pqn.Args(), 20, evaluation=True)
    other = pqn.Games(pqn.Args(seed=2), 20)
    for _ in range(60):
        training.step([0] * 20), evaluation.step([0] * 20), other.step([0] * 20)
    assert not np.array_equal(training.obs, evaluation.obs) and not np.array_equal(training.obs, other.obs)


def test_time_limit_holds_in_evaluations_too(pqn):
    args = pqn.Args(eval_episodes=3, time_limit=3)
    assert pqn.evaluate(pqn.Agent(4, 5, args), args, 0, "stochastic")["length"] == 3


def test_a_row_is_the_mean_of_its_episodes(script, monkeypatch):
    def play(games, i, action):
        games.played[i].append(action)
        games.returns[i] = (1.0, 2.0, 6.0)[i]
        return 0.0, len(games.played[i]) == i + 2, False

    monkeypatch.setattr(script.Games, "play", play)
    args = script.Args(eval_episodes=3)
    row = script.evaluate(script.Agent(4, 5, args), args, 0, "stochastic")
    assert (row["return"], row["length"]) == (3.0, 3.0)
    assert row["return_std"] == pytest.approx((14 / 3) ** 0.5, abs=1e-4)


# Whole runs


def test_same_seed_same_run_and_other_seed_another(script, finished, tmp_path):
    again, other = train(script, tmp_path / "again"), train(script, tmp_path / "other", seed=2)
    assert same(model(finished), model(again)) and not same(model(finished), model(other))
    assert (finished / "eval.csv").read_bytes() == (again / "eval.csv").read_bytes()


def test_evaluation_and_checkpoints_do_not_change_training(script, finished, tmp_path):
    other = train(script, tmp_path / "run", eval_every=70, eval_episodes=3, checkpoint_every=32)
    assert same(model(finished), model(other))


def test_without_a_mixture_it_is_pqn_bit_for_bit(pqn, moe, tmp_path):
    assert same(model(train(pqn, tmp_path / "a")), model(train(moe, tmp_path / "b", moe="none")))


def test_every_kind_makes_another_run(moe, tmp_path):
    models = [model(train(moe, tmp_path / kind, moe=kind, total_timesteps=64)) for kind in KINDS]
    models.append(model(train(moe, tmp_path / "soft8", num_experts=8, total_timesteps=64)))
    shapes = [sorted((k, tuple(v.shape)) for k, v in weights.items()) for weights in models]
    assert all(a != b for i, a in enumerate(shapes) for b in shapes[:i])


def test_files_of_a_run(script, finished):
    run = json.loads((finished / "run.json").read_text())
    assert run["script"] == script.SCRIPT and run["global_step"] == 320 and run["args"]["game"] == "asterix"
    assert {"command", "commit", "dirty", "machine", "wall_time", "steps_per_second"} <= run.keys()
    assert run["parameters"] == sum(x.numel() for x in model(finished).values())
    assert run["versions"].keys() == {"python", "minatar", "numpy", "torch"}
    header, *rows = [line.split(",") for line in (finished / "eval.csv").read_text().splitlines()]
    assert header == "global_step policy episodes return return_std length success dormant rank".split()
    policies = ("deterministic", "stochastic")
    assert [row[:3] for row in rows] == [[step, policy, "2"] for step in ("160", "320") for policy in policies]
    assert all(0 <= float(row[7]) < 1 and 1 <= int(row[8]) <= 32 for row in rows)
    names = {path.name.split(".")[0] for path in finished.iterdir()}
    assert names - {"evaluation", "video"} == {"run", "eval", "checkpoint", "model", "policy", "events"}


def test_tensorboard_has_the_curves(script, finished):
    events = EventAccumulator(str(finished)).Reload()
    keys = {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/epsilon", "charts/learning_rate"}
    keys |= {"eval/return", "eval/return_stochastic", "eval/dormant", "eval/rank", "losses/critic"}
    keys |= {f"moe/usage_{k}" for k in range(4)} if script.SCRIPT == "pqn_moe" else set()
    assert keys <= set(events.Tags()["scalars"])
    rates = [event.value for event in events.Scalars("charts/learning_rate")]
    assert rates == pytest.approx([5e-4 * (1 - 32 * i / 310) for i in range(10)])
    epsilons = [max(0.05, 1 - 0.95 * (32 * i / 310) / 0.5) for i in range(10)]
    assert [e.value for e in events.Scalars("charts/epsilon")] == pytest.approx(epsilons)


def test_epsilon_and_the_learning_rate_are_those_that_are_logged(script, tmp_path, monkeypatch):
    act, learn, epsilons, rates = script.Agent.act, script.learn, [], []

    def watch(agent, obs, epsilon):
        epsilons.extend([epsilon] * (len(obs) == 4 and epsilon > 0))  # four games play, two evaluate
        return act(agent, obs, epsilon)

    def watch_learning(agent, *arguments):
        rates.append(agent.optimizers[0].param_groups[0]["lr"])
        return learn(agent, *arguments)

    monkeypatch.setattr(script.Agent, "act", watch)
    monkeypatch.setattr(script, "learn", watch_learning)
    train(script, tmp_path / "run")
    assert rates == pytest.approx([5e-4 * (1 - 32 * i / 310) for i in range(10)])
    assert epsilons == pytest.approx([max(0.05, 1 - 0.95 * (32 * i / 310) / 0.5) for i in range(10) for _ in range(8)])


def test_charts_have_the_mean_return_and_length(script, tmp_path, monkeypatch):
    rollout, log, logged = script.rollout, script.Run.log, []
    monkeypatch.setattr(script, "rollout", lambda *a: (rollout(*a)[0], [(3.0, 10), (5.0, 20)]))
    monkeypatch.setattr(script.Run, "log", lambda run, metrics: logged.append(metrics) or log(run, metrics))
    train(script, tmp_path / "run", total_timesteps=32)
    assert (logged[0]["charts/episodic_return"], logged[0]["charts/episodic_length"]) == (4.0, 15.0)


def test_saved_model_and_policy_evaluate_as_in_training(script, finished, tmp_path, capsys):
    shutil.copy(finished / "policy.pt", tmp_path / "s1.pt")
    script.main(flags(evaluate=str(tmp_path / "s1.pt")))
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # strict: no NaN
    assert printed == json.loads((tmp_path / "s1.json").read_text())
    script.main(flags(evaluate=str(finished), video=True))
    text = capsys.readouterr().out
    assert json.loads(text[: text.rindex("}") + 1]) == printed
    lines = (finished / "eval.csv").read_text().splitlines()
    for line in lines[-2:]:
        row = dict(zip(lines[0].split(","), line.split(","), strict=True))
        result = printed[row["policy"]]
        assert (str(result["return"]), str(result["length"])) == (row["return"], row["length"])
    assert (finished / "video.gif").read_bytes().startswith(b"GIF89a")


LONG = SMALL | dict(total_timesteps=1000, eval_every=250, eval_episodes=2, checkpoint_every=200)


@pytest.mark.parametrize(("name", "number"), [("pqn_moe", signal.SIGKILL), ("pqn", signal.SIGTERM)])
def test_resume_is_exact_after_a_kill_and_after_a_signal(name, number, tmp_path):
    """In the middle of episodes, at a moment that depends on the machine. The script is a copy that stands alone."""
    shutil.copy(ALGOS / f"{name}.py", tmp_path)
    stopped = start(name, *flags(**LONG), "--run-dir", "run", cwd=tmp_path, path=tmp_path)
    script, run = load(name), tmp_path / "run"
    while stopped.poll() is None and not ((run / "eval.csv").exists() and "\n512," in (run / "eval.csv").read_text()):
        time.sleep(0.01)
    stopped.send_signal(number)
    output = stopped.communicate()
    assert "deterministic return" in output  # was not left in a buffer
    step = torch.load(run / "checkpoint.pt", weights_only=True)["global_step"]
    if number == signal.SIGKILL:
        assert stopped.poll() == -number and 400 <= step < 1000, output
    else:
        assert stopped.poll() == 128 + number, output
        assert step == int(re.search(r"SIGTERM, step (\d+) is saved; --resume run\n", output)[1]) < 1000
    script.main(flags(resume=str(run)))  # in this process: it started otherwise too
    whole = script.main(flags(**LONG, run_dir=str(tmp_path / "whole")))
    assert same(model(whole), model(run))
    assert (whole / "eval.csv").read_bytes() == (run / "eval.csv").read_bytes()


def test_an_evaluation_that_a_signal_cuts_short_is_made_on_resume(script, finished, tmp_path, monkeypatch):
    act = script.Agent.act

    def stop(agent, obs, epsilon):
        if len(obs) <= 2:  # games of an evaluation
            script.SIGNALS.append(signal.SIGTERM)
        return act(agent, obs, epsilon)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(script.Agent, "act", stop)
        train(script, tmp_path / "run")
    assert end.value.code == 128 + signal.SIGTERM and not (tmp_path / "run" / "eval.csv").exists()
    script.main(flags(resume=str(tmp_path / "run")))
    assert same(model(finished), model(tmp_path / "run"))
    assert (finished / "eval.csv").read_bytes() == (tmp_path / "run" / "eval.csv").read_bytes()


def test_a_finished_run_can_be_made_longer(pqn, tmp_path):
    words = [*flags(**TINY | dict(exploration_fraction=1e-9)), "--no-anneal-lr"]  # both would follow the length
    run = pqn.main([*words, "--run-dir", str(tmp_path / "run"), "--total-timesteps", "250"])
    saved = torch.load(run / "checkpoint.pt", weights_only=True)  # a signal cut its last evaluation short
    torch.save(saved | {"owed": {"dormant": 0.0, "rank": 1}}, run / "checkpoint.pt")
    pqn.main(flags(resume=str(run), total_timesteps=500))
    whole = pqn.main([*words, "--run-dir", str(tmp_path / "whole"), "--total-timesteps", "500"])
    assert same(model(whole), model(tmp_path / "run"))
    assert (whole / "eval.csv").read_bytes() == (tmp_path / "run" / "eval.csv").read_bytes()


def test_a_full_disk_that_tensorboards_thread_meets_is_one_line(pqn, tmp_path, monkeypatch, capsys):
    """Its queue holds ten values, so the thread's failure shows while the run goes on."""

    def write(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not that of an earlier run
    with pytest.raises(SystemExit) as stop:
        train(pqn, tmp_path / "run")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "No space left" in error, error


@pytest.mark.parametrize("checkpoint_every", [32, 10**6])
def test_divergence_is_one_line_and_keeps_the_checkpoint(script, checkpoint_every, tmp_path, capsys):
    """Seen by the checkpoint, or by the evaluation before it."""
    changes = dict(learning_rate=1e12, max_grad_norm=1e12, checkpoint_every=checkpoint_every)
    with pytest.raises(SystemExit) as stop:
        train(script, tmp_path / "run", **changes)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "diverged; it would again" in error
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(x.isfinite().all() for x in saved["agent"].values())


# What the router of a trained network does


@pytest.mark.parametrize(("scale", "entropy"), [(0.0, 1.0), (1e4, 0.0)])
def test_routing_of_equal_and_of_sharp_weights(moe, scale, entropy):
    """Equal weights: slots are the mean of the tokens. Sharp ones: each slot is one token, each token has one slot."""
    network = moe.Network(4, 5, moe.Args(num_experts=4))
    with torch.no_grad():
        network.middle[0].phi.mul_(scale)
    obs = torch.rand(8, 10, 10, 4) < 0.3
    dispatch, combine, tokens, slots = routing.measure(network, obs)
    assert (dispatch, combine) == pytest.approx((entropy, entropy), abs=0.02)
    x = network.cells(network.conv(obs.permute(0, 3, 1, 2).float()).flatten(2).transpose(1, 2)).detach()
    best = (x @ network.middle[0].phi).argmax(1)  # token of each slot (B, n p)
    chosen = x.gather(1, best[..., None].expand(-1, -1, 16)) if scale else x.mean(1, keepdim=True)
    for seen, y in ((tokens, x), (slots, chosen)):
        spread = ((y - y.mean(1, keepdim=True)).square().mean() / y.square().mean()).sqrt().item()
        assert seen == pytest.approx(spread, abs=0.01)


def test_routing_of_a_run_starts_with_its_first_network_and_has_a_table(moe, tmp_path, monkeypatch):
    run = train(moe, tmp_path / "runs" / "MinAtar-PQN-asterix" / "pqn_moe-soft2" / "s1", num_experts=2)
    seen = []
    monkeypatch.setattr(routing, "measure", lambda network, obs: seen.append((network, obs)) or [0.5, 0.25, 1.0, 0.125])
    lines = routing.main(run).read_text().splitlines()
    assert lines == ["network,dispatch,combine,tokens,slots"] + [
        f"at the {x},0.500,0.250,1.000,0.125" for x in ("start", "end")
    ]
    (first, states), (last, same_states) = seen
    assert torch.equal(states, same_states) and states.shape == (256, 10, 10, 4)
    assert same({f"network.{k}": v for k, v in last.state_dict().items()}, model(run))
    torch.manual_seed(1)
    fresh = moe.Network(4, 5, moe.Args(num_experts=2)).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in first.state_dict().items())
    table = "\n".join(pages.routing(reading.read(tmp_path)))
    assert "| pqn_moe-soft2 | at the end | 1 | 0.50 | 0.25 | 1.00 | 0.12 |" in table


# Errors


def test_a_video_that_cannot_be_written_or_is_interrupted(script, finished, tmp_path, monkeypatch, capsys):
    shutil.copy(finished / "policy.pt", tmp_path / "s1.pt")
    film = flags(evaluate=str(tmp_path / "s1.pt"), video=True)
    check_video_faults(script, film, tmp_path / "s1.gif", monkeypatch, capsys)


WRONG = {
    "unknown game": (dict(game="pong"), "--game pong: .*asterix, breakout"),
    "lambda above one": (dict(q_lambda=1.5), "--q-lambda 1.5"),
    "epsilon above one": (dict(epsilon=2.0), "--epsilon 2.0"),
    "sticky beyond doubt": (dict(sticky_actions=-0.1), "--sticky-actions -0.1"),
    "no time": (dict(time_limit=0), "--time-limit 0"),
    "no steps": (dict(total_timesteps=0), "--total-timesteps 0"),
    "learning rate nan": (dict(learning_rate=float("nan")), "--learning-rate nan"),
    "unequal minibatches": (dict(num_minibatches=5), "--num-minibatches 5: needs 5 equal parts of a rollout of 32"),
    "more games than memory": (dict(num_envs=10**9), "--num-envs 1000000000"),
    "negative seed": (dict(seed=-1), "--seed -1"),
    "no gpu at all": (dict(device=NO_GPU), "--device cuda.*always works"),
    "a CPU with a number": (dict(device="cpu:0"), "--device cpu:0: must be cpu, cuda or cuda:N"),
    "exploration longer than the run": (dict(exploration_fraction=1.5), "--exploration-fraction 1.5"),
    "folder below a file": (dict(run_dir="/dev/null/run"), "--run-dir /dev/null/run"),
    "nothing to resume": (dict(resume="no/such/run"), "--resume no/such/run: .*checkpoint.pt"),
    "nothing to evaluate": (dict(evaluate="no/such/run"), "--evaluate no/such/run: .*model.pt"),
    "video without evaluation": (dict(video=True), "--video"),
}
WRONG_MOE = {
    "no experts": (dict(num_experts=0), "--num-experts 0"),
    "more experts than slots": (dict(num_experts=65), "--num-experts 65"),
    "no width": (dict(widen=0), "--widen 0"),
}


@pytest.mark.parametrize("name", [*WRONG, *WRONG_MOE])
def test_wrong_input_is_one_line_that_names_the_flag(pqn, moe, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wrong, expected = (WRONG | WRONG_MOE)[name]
    with pytest.raises(SystemExit) as stop:
        (moe if name in WRONG_MOE else pqn).main(flags(**(TINY | wrong)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and re.search(expected, error), error
    assert not list(tmp_path.iterdir())


def test_missing_minatar_is_one_line_with_the_remedy(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "minatar", None)
    with pytest.raises(SystemExit) as stop:
        train(script, tmp_path / "run")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--game asterix" in error
    assert "pip install minatar" in error and not (tmp_path / "run").exists()


def test_torchrun_is_refused(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        train(script, tmp_path / "run")
    assert stop.value.code == 2 and "start it with python" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_cannot_be_changed_and_its_folder_not_taken(script, finished, capsys):
    wrong = [
        (flags(resume=str(finished), gamma=0.5), "--gamma 0.5: cannot change"),
        (flags(resume=str(finished), total_timesteps=309), "--total-timesteps 309"),
        (flags(evaluate=str(finished), sticky_actions=0.1), "--sticky-actions 0.1: cannot change"),
        (flags(**TINY, run_dir=str(finished)), f"--run-dir {finished}: holds a run"),
    ]
    for words, expected in wrong:
        with pytest.raises(SystemExit) as stop:
            script.main(words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and expected in error


def test_a_damaged_checkpoint_and_another_scripts_are_refused(pqn, moe, tmp_path, capsys):
    run = train(pqn, tmp_path / "run", total_timesteps=32)
    data = bytearray((run / "checkpoint.pt").read_bytes())
    with pytest.raises(SystemExit):
        moe.main(flags(resume=str(run)))
    assert "use that script" in capsys.readouterr().err
    data[len(data) // 2] ^= 255
    (run / "checkpoint.pt").write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        pqn.main(flags(resume=str(run)))
    assert stop.value.code == 2 and "damaged" in capsys.readouterr().err


def test_the_mixture_is_a_small_change():
    """The agent stands above the line, in at most 300 and 440 lines; at most 160 lines are not those of pqn.py."""
    texts = [(ALGOS / f"{name}.py").read_text() for name in ("pqn", "pqn_moe")]
    for text, above, whole in zip(texts, (300, 440), (690, 880), strict=True):
        lines = text[text.index('"""') :].splitlines()  # without the inline requirements
        assert next(i for i, line in enumerate(lines) if line.startswith("# That was the agent.")) <= above
        assert len(lines) <= whole
    changed = [line for line in difflib.ndiff(*(text.splitlines() for text in texts)) if line[0] in "+-"]
    assert 20 < len(changed) <= 160

"""The mathematics of PPO's rivals of PMOE: average (ppo_gating.py), product (ppo_mcp.py) and options (ppo_dac.py)."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import ALGOS, load
from test_ppo import make_batch, run, train
from test_sac import NoSynchronisation
from torch.distributions import Independent, Normal

AVERAGING = {  # name -> flags
    "ppo_gating": {},
    "ppo_gating-shared": {"std": "shared"},
    "ppo_mcp": {},
    "ppo_mcp-softmax": {"gate": "softmax"},
}


@pytest.fixture(scope="module")
def gating():
    return load("ppo_gating")


@pytest.fixture(scope="module")
def mcp():
    return load("ppo_mcp")


@pytest.fixture(scope="module")
def dac():
    return load("ppo_dac")


def make_actor(name, **changes):
    """Script and an actor of it in float64 whose experts differ in mean, standard deviation and weight."""
    script = load(name.split("-")[0])
    torch.manual_seed(0)
    actor = script.Actor(3, 2, script.Args(**AVERAGING[name] | {"num_experts": 4} | changes)).double()
    for parameter in (actor.mean.b, actor.gate.w):
        parameter.data.normal_()
    actor.log_std.data.add_(0.5 * torch.randn_like(actor.log_std))
    return script, actor


# One Gaussian from several


@pytest.mark.parametrize("std", ["state", "shared"])
def test_gating_one_expert_is_ppo_to_the_bit(ppo, gating, std, tmp_path):
    settings = dict(env_id="PPOVector-v0", ent_coef=0.1)
    one = run(ppo, tmp_path / "ppo", **settings)
    other = run(gating, tmp_path / "gating", num_experts=1, std=std, **settings)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_product_of_one_expert_is_ppo(ppo, mcp, tmp_path, monkeypatch):
    """The same weights after a run from the same ones, but for the gate's."""
    start, results = {}, []
    for script, flags in ((ppo, {}), (mcp, dict(num_experts=1, gate="softmax"))):

        def make(*arguments, make_agent=script.Agent):
            agent = make_agent(*arguments)
            own = agent.state_dict()
            agent.load_state_dict({key: value.view_as(own[key]) for key, value in start.items()}, strict=False)
            start.update({key: value.clone() for key, value in agent.state_dict().items()})
            torch.manual_seed(7)  # the gate's weights have taken random numbers
            return agent

        monkeypatch.setattr(script, "Agent", make)
        results.append(run(script, tmp_path / script.SCRIPT, env_id="PPOVector-v0", ent_coef=0.1, **flags))
    one, other = results
    assert other.keys() - one.keys() == {"actor.gate.w", "actor.gate.b"}
    for key, value in one.items():
        torch.testing.assert_close(other[key].view_as(value), value, rtol=1e-4, atol=1e-5, msg=key)
    assert any((one[key] != start[key]).any() for key in one)


@pytest.mark.parametrize("std", ["state", "shared"])
def test_average_by_hand(std):
    _, actor = make_actor("ppo_gating", std=std)
    obs = torch.randn(10, 3, dtype=torch.float64)
    means, log_stds, log_w, _ = actor.experts(obs)
    mean, log_std, _ = actor(obs)
    logits = actor.gate(obs)
    for b in range(10):
        w = logits[b].exp() / logits[b].exp().sum()
        torch.testing.assert_close(log_w[b].exp(), w)
        torch.testing.assert_close(mean[b], sum(w[k] * means[b, k] for k in range(4)))
        if std == "state":
            torch.testing.assert_close(log_std[b].exp(), sum(w[k] * log_stds[k].exp() for k in range(4)))
    if std == "shared":
        assert log_std is actor.log_std and log_std.shape == (2,)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_product_of_gaussians_on_a_grid(gate):
    _, actor = make_actor("ppo_mcp", gate=gate)
    obs = torch.randn(5, 3, dtype=torch.float64)
    means, log_stds, log_w, _ = actor.experts(obs)
    mean, log_std, _ = actor(obs)
    logits = actor.gate(obs)
    torch.testing.assert_close(log_w.exp(), logits.sigmoid() if gate == "sigmoid" else logits.softmax(1))
    x = torch.linspace(-25, 25, 40_001, dtype=torch.float64)
    for b in range(5):
        for d in range(2):
            normals = [Normal(means[b, k, d], log_stds[k, d].exp()).log_prob(x) for k in range(4)]
            log_product = sum(log_w[b, k].exp() * normals[k] for k in range(4))
            product = (log_product - log_product.max()).exp()
            expected = product / torch.trapezoid(product, x)
            torch.testing.assert_close(Normal(mean[b, d], log_std[b, d].exp()).log_prob(x).exp(), expected)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("num_experts", [1, 4, 16])
def test_first_standard_deviation_of_a_product_is_one(mcp, num_experts, gate):
    torch.manual_seed(0)
    actor = mcp.Actor(3, 2, mcp.Args(num_experts=num_experts, gate=gate))
    std = actor(torch.randn(500, 3))[1].exp()
    assert std.mean().item() == pytest.approx(1, abs=0.01) and std.min() > 0.95 and std.max() < 1.05


def test_standard_deviation_of_a_product_is_clamped(mcp):
    actor = mcp.Actor(3, 2, mcp.Args())
    for value, bound in ((-9.0, -5.0), (9.0, 2.0)):
        actor.log_std.data.fill_(value)
        assert (actor(torch.randn(5, 3))[1] == bound).all()


@pytest.mark.parametrize("name", AVERAGING)
def test_log_prob_entropy_and_draws_of_each_row(name):
    _, actor = make_actor(name)
    obs, action = torch.randn(20, 3, dtype=torch.float64), 3 * torch.randn(20, 2, dtype=torch.float64)
    mean, log_std, _ = actor(obs)
    policy = Independent(Normal(mean, log_std.exp().expand_as(mean)), 1)
    torch.testing.assert_close(actor.log_prob(mean, log_std, action), policy.log_prob(action))
    torch.testing.assert_close(actor.entropy(log_std), policy.entropy().mean())
    if name != "ppo_gating-shared":
        assert log_std.std(0).min() > 0.01  # they do differ from row to row
    noise = torch.randn(20, 2, dtype=torch.float64)  # one draw of all experts
    clipped, drawn = actor.sample(obs, noise)
    torch.testing.assert_close(drawn, mean + log_std.exp() * noise)
    assert torch.equal(clipped, drawn.clamp(-1, 1)) and torch.equal(actor.act(obs, "deterministic"), mean.clamp(-1, 1))


def gradients(module, agent, batch, args, monkeypatch, *mdp):
    """The gradient that one update gives to each weight, a dict, and its metrics."""
    losses = []
    for optimizer in agent.optimizers:
        monkeypatch.setattr(optimizer, "descend", losses.append)
    metrics = module.update(agent, batch, args, *mdp)
    found = torch.autograd.grad(sum(losses), list(agent.actor.parameters()), allow_unused=True)
    return dict(zip([name for name, _ in agent.actor.named_parameters()], found, strict=True)), metrics


def textbook(log_prob, value, entropy, batch, ent_coef):
    ratio = (log_prob - batch.log_prob).exp()
    loss = -torch.min(ratio * batch.advantage, ratio.clamp(0.8, 1.2) * batch.advantage).mean()
    return loss + 0.5 * (value - batch.target).square().mean() - ent_coef * entropy


@pytest.mark.parametrize("name", AVERAGING)
def test_gradients_equal_the_textbook(name, monkeypatch):
    script = load(name.split("-")[0])
    args = script.Args(ent_coef=0.1, **AVERAGING[name])
    torch.manual_seed(0)
    agent, batch = script.Agent(3, 2, args), make_batch(script)
    agent.actor.mean.b.data.normal_()
    fast, _ = gradients(script, agent, batch, args, monkeypatch)
    mean, log_std, value = agent.actor(batch.obs)
    policy = Independent(Normal(mean, log_std.exp().expand_as(mean)), 1)
    textbook(policy.log_prob(batch.action), value, policy.entropy().mean(), batch, 0.1).backward()
    for key, parameter in agent.actor.named_parameters():
        torch.testing.assert_close(fast[key], parameter.grad, rtol=1e-3, atol=1e-6, msg=key)
        assert parameter.grad.abs().max() > 0  # the gate learns as well


@pytest.mark.parametrize("name", AVERAGING)
def test_diagnostics_by_hand(name):
    script = load(name.split("-")[0])
    actor = script.Agent(3, 2, script.Args(num_experts=2, **AVERAGING[name])).actor
    for parameter in actor.parameters():
        parameter.data.zero_()
    actor.mean.b.data[:] = torch.tensor([0.5, 0.0, -0.5, 0.0])
    actor.gate.b.data[:] = torch.tensor([math.log(3.0), 0.0])
    found = {key: value.item() for key, value in actor.diagnostics(torch.randn(10, 3)).items()}
    w = [0.75, 0.5] if name == "ppo_mcp" else [0.75, 0.25]
    share = [x / sum(w) for x in w]
    assert [found["moe/usage_0"], found["moe/usage_1"]] == pytest.approx(w)
    assert found["moe/gate_entropy"] == pytest.approx(-sum(x * math.log(x) for x in share))
    assert found["moe/expert_distance"] == pytest.approx(1)
    assert found["policy/std"] == pytest.approx(std := sum(w) ** -0.5 if name == "ppo_mcp" else 1.0)
    assert found["policy/entropy"] == pytest.approx(2 * math.log(std) + math.log(2 * math.pi * math.e))


# Options: the policies


def make_options(dac, num_options=3, dtype=torch.float64, **changes):
    """An agent whose options differ in everything."""
    torch.manual_seed(0)
    args = dac.Args(num_options=num_options, **changes)
    agent = dac.Agent(3, 2, args).to(dtype)
    for network in (agent.actor.mean, agent.actor.beta, agent.actor.gate, agent.actor.q):
        network.w3.data.normal_(std=0.3)
        network.b3.data.normal_(std=0.3)
    agent.actor.log_std.data.normal_(std=0.3)
    return agent, args


def test_policy_over_options_by_hand(dac):
    """The formula as it is written, row by row; -1 is no option, and so is a missing argument."""
    actor = make_options(dac)[0].actor
    obs, former = torch.randn(40, 3, dtype=torch.float64), torch.arange(40) % 4 - 1
    log_pi = actor.high(obs, former)
    for b in range(40):
        w = actor.gate(obs[b : b + 1])[0, 0].softmax(0)
        beta, o = actor.beta(obs[b : b + 1])[0, :, 0].sigmoid(), former[b]
        expected = [(1 - beta[o]) * (k == o) + beta[o] * w[k] for k in range(3)] if o >= 0 else list(w)
        torch.testing.assert_close(log_pi[b].exp(), torch.stack(expected))
    torch.testing.assert_close(log_pi.exp().sum(1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(actor.high(obs), actor.gate(obs)[:, 0].log_softmax(1))


def test_a_certain_end_forgets_the_former_option_and_a_certain_stay_keeps_it(dac):
    actor = make_options(dac)[0].actor
    obs = torch.randn(10, 3, dtype=torch.float64)
    actor.beta.b3.data.fill_(80.0)
    every = [actor.high(obs, torch.full((10,), o)) for o in range(3)]
    for log_pi in every:
        torch.testing.assert_close(log_pi, actor.high(obs), rtol=0, atol=1e-12)
    actor.beta.b3.data.fill_(-80.0)
    log_pi = actor.high(obs, torch.full((10,), 2))
    torch.testing.assert_close(log_pi[:, 2], torch.zeros(10, dtype=torch.float64), rtol=0, atol=1e-12)
    log_pi[:, 2].sum().backward()  # nothing that is not finite in a log of (1 - beta) or of 0
    assert actor.beta.w3.grad.isfinite().all() and log_pi.isfinite().all()


def test_density_of_the_option_and_its_entropy(dac):
    actor = make_options(dac)[0].actor
    obs, action = torch.randn(30, 3, dtype=torch.float64), 3 * torch.randn(30, 2, dtype=torch.float64)
    option, mean = torch.arange(30) % 3, actor.mean(obs)
    policy = Independent(Normal(mean[torch.arange(30), option], actor.log_std[option].exp()), 1)
    torch.testing.assert_close(actor.log_prob(mean, option, action), policy.log_prob(action))
    torch.testing.assert_close(actor.entropy(option), policy.entropy().mean())


@pytest.mark.parametrize("name", [*AVERAGING, "ppo_dac"])
def test_nothing_in_an_actor_is_detached(name):
    """Automatic differentiation of everything that forward() returns against finite differences."""
    actor = make_options(load(name))[0].actor if name == "ppo_dac" else make_actor(name)[1]
    names = ["mean.b3", "beta.b3", "gate.b3", "q.b3"] if name == "ppo_dac" else ["mean.b", "gate.b", "log_std"]
    obs = torch.randn(4, 3, dtype=torch.float64)
    former = (torch.tensor([-1, 0, 1, 2]),) if name == "ppo_dac" else ()

    def outputs(*weights):
        return torch.func.functional_call(actor, dict(zip(names, weights, strict=True)), (obs, *former))

    weights = [actor.get_parameter(key).detach().clone().requires_grad_() for key in names]
    assert torch.autograd.gradcheck(outputs, weights)


def test_batched_networks_are_plain_ones(dac):
    network, obs = dac.MLPs(3, 5, 2, gain=1.0), torch.randn(7, 5)
    for i in range(3):
        x = ((obs @ network.w1[i] + network.b1[i]).tanh() @ network.w2[i] + network.b2[i]).tanh()
        torch.testing.assert_close(network(obs)[:, i], x @ network.w3[i] + network.b3[i])


def test_how_each_mode_acts(dac):
    actor = make_options(dac, dtype=torch.float32)[0].actor
    actor.mean.b3.data.mul_(0.1), actor.mean.w3.data.zero_()
    obs, former = torch.zeros(20_000, 3), torch.full((20_000,), 1)
    means, p = actor.mean(obs)[0], actor.high(obs[:1], former[:1])[0].exp()
    action, option = actor.act(obs, "deterministic", former)
    assert (option == p.argmax()).all() and torch.equal(action, means[option])
    torch.manual_seed(0)
    action, option = actor.act(obs, "gate", former)
    torch.testing.assert_close(option.bincount() / 20_000, p, rtol=0, atol=0.015)
    assert torch.equal(action, means[option])
    clipped, option = actor.act(obs, "stochastic", former)
    torch.testing.assert_close(option.bincount() / 20_000, p, rtol=0, atol=0.015)
    _, columns, option = actor.sample(obs, None, former)
    assert torch.equal(columns[:, 2:], torch.stack([former, option], 1))
    for k in range(3):
        rows = columns[option == k, :2]
        torch.testing.assert_close(rows.mean(0), means[k], rtol=0, atol=0.06)
        torch.testing.assert_close(rows.std(0), actor.log_std[k].exp(), rtol=0.05, atol=0)
    assert clipped.abs().max() == 1


def test_every_dimension_of_an_option_has_noise_of_its_own(dac):
    actor = make_options(dac)[0].actor
    obs, noise = torch.randn(2, 50, 3, dtype=torch.float64)
    former = torch.arange(50) % 4 - 1
    option = (actor.high(obs, former).exp().cumsum(1) < torch.special.ndtr(noise[:, 2:])).sum(1)
    expected = actor.mean(obs)[torch.arange(50), option] + actor.log_std[option].exp() * noise[:, :2]
    torch.testing.assert_close(actor.sample(obs, noise, former)[1][:, :2], expected)


# Options: who remembers what


def test_sampler_carries_the_option_and_resets_it_with_the_episode(dac):
    """Episodes of two steps; a rollout of five ends within one, and the next goes on there."""
    args = dac.Args(env_id="PPOTwoStepsTrue-v0", num_envs=3, num_steps=5)
    torch.manual_seed(0)
    agent, envs = dac.Agent(1, 1, args), dac.make_envs(args)
    sampler = dac.Sampler(envs, args)
    sampler.reset(0)
    former, option = torch.cat([sampler.rollout(agent)[0].action for _ in range(2)])[:, :, 1:].unbind(2)
    starts = torch.arange(10) % 2 == 0
    assert (former[starts] == -1).all() and torch.equal(former[~starts], option[starts])
    assert len(option.unique()) == 4
    sampler.rollout(agent)  # ends within an episode
    sampler.reset(15)
    assert (sampler.rollout(agent)[0].action[0, :, 1] == -1).all()
    envs.close()


def test_evaluation_carries_the_option_and_leaves_that_of_training(dac, tmp_path, monkeypatch):
    args = dac.Args(env_id="Pendulum-v1?max_episode_steps=6", eval_episodes=2)
    agent, env, calls, act = dac.Agent(3, 1, args), dac.Env(args, evaluation=True), [], dac.Actor.act

    def watch(actor, obs, policy, *former):
        action, option = act(actor, obs, policy, *former)
        calls.append((*former, option))
        return action, option

    monkeypatch.setattr(dac.Actor, "act", watch)
    for policy in (*dac.Actor.policies, "stochastic"):
        calls.clear()
        dac.evaluate(agent, env, args, 0, policy)
        assert [len(call) for call in calls] == [1, 2, 2, 2, 2, 2] * 2
        assert all(torch.equal(calls[i][0], calls[i - 1][-1]) for i in range(12) if i % 6)
    monkeypatch.undo()
    settings = dict(env_id="Pendulum-v1?max_episode_steps=30", total_timesteps=160)
    one, other = (run(dac, tmp_path / str(every), eval_every=every, **settings) for every in (10**6, 20))
    assert all(torch.equal(one[key], other[key]) for key in one)


# Options: learning


def test_advantages_of_both_mdps_by_hand(dac):
    """Five steps of one environment: an end after the second, a time limit after the fourth, then the rollout ends."""
    agent, args = make_options(dac, gamma=0.9, gae_lambda=0.7)
    actor = agent.actor
    generator = torch.Generator().manual_seed(1)
    obs, after = torch.randn(2, 5, 1, 3, generator=generator, dtype=torch.float64)
    after[[0, 2]] = obs[[1, 3]]
    reward = torch.tensor([1.0, -2.0, 3.0, 0.5, -1.0], dtype=torch.float64)[:, None]
    terminated, done = (torch.tensor(x, dtype=torch.float64)[:, None] for x in ([0, 1, 0, 0, 0], [0, 1, 0, 1, 0]))
    action = torch.randn(5, 1, 2, generator=generator, dtype=torch.float64)
    former, option = [-1, 2, -1, 0, -1], [2, 1, 0, 1, 1]
    columns = torch.tensor([former, option], dtype=torch.float64).T[:, None]
    discounted = 5 * torch.randn(5, 1, generator=generator, dtype=torch.float64)
    rollout = dac.Rollout(obs, torch.cat([action, columns], 2), reward, terminated, done, after, discounted)

    def v_high(x, o):
        p = actor.high(x, torch.tensor([o]))[0].exp()
        return sum(p[k] * actor.q(x)[0, 0, k] for k in range(3)).item()

    high, low, next_high, log_prob = [], [], [], []
    for t in range(5):
        high.append(v_high(obs[t], former[t]))
        low.append(actor.q(obs[t])[0, 0, option[t]].item())
        next_high.append(v_high(after[t], option[t]))
        pi_low = Normal(actor.mean(obs[t])[0, option[t]], actor.log_std[option[t]].exp())
        pi_high = actor.high(obs[t], torch.tensor([former[t]]))[0, option[t]]
        log_prob.append([pi_high.item(), pi_low.log_prob(action[t, 0]).sum().item()])
    batch = dac.prepare(agent, rollout, args)
    scale = agent.return_moments.scale.item()
    assert scale != 1
    for column, values, following in (
        (0, high, next_high),
        (1, low, [low[1], None, low[3], next_high[3], next_high[4]]),
    ):
        assert column == 1 or following[0] == pytest.approx(high[1])  # the high MDP's next state is the next row
        expected = [0.0] * 6
        for t in reversed(range(5)):
            delta = reward[t].item() * scale - values[t] + (0 if t == 1 else 0.9 * following[t])
            expected[t] = delta + (0 if t in (1, 3) else 0.9 * 0.7 * expected[t + 1])
        assert batch.advantage[:, column].tolist() == pytest.approx(expected[:5], rel=1e-6)
        assert batch.target[:, column].tolist() == pytest.approx(np.add(expected[:5], values), rel=1e-6)
    np.testing.assert_allclose(batch.log_prob, log_prob, rtol=1e-9)
    assert batch.former.tolist() == former and batch.option.tolist() == option
    assert torch.equal(batch.action, action[:, 0]) and torch.equal(batch.obs, obs[:, 0])
    assert agent.actor.normalize.count == 5  # afterwards


def test_both_ratios_are_one_before_the_first_step(dac, monkeypatch):
    """Also in the MDP that comes second, also in rollouts whose moments and policies have moved."""
    torch.manual_seed(0)
    args = dac.Args(env_id="PPOFarSigns-v0", num_envs=4, num_steps=30, num_minibatches=4, learning_rate=1e-2)
    agent, envs = dac.Agent(1, 1, args), dac.make_envs(args)
    sampler, update, ratios = dac.Sampler(envs, args), dac.update, {}
    sampler.reset(0)

    def watch(agent, batch, args, mdp):
        metrics = update(agent, batch, args, mdp)
        ratios.setdefault(mdp, []).append(metrics["log_ratio"].abs().max().item())
        return metrics

    monkeypatch.setattr(dac, "update", watch)
    orders = set()
    for _ in range(4):
        ratios.clear()
        dac.learn(agent, dac.prepare(agent, sampler.rollout(agent)[0], args), args)
        orders.add(tuple(ratios))
        for found in ratios.values():
            assert len(found) == 20 and found[0] < 2e-5 < 1e-3 < max(found)
    assert orders == {("high", "low"), ("low", "high")}


def test_each_mdp_stops_by_itself(dac, monkeypatch):
    """A policy that has moved too far ends its own passes and not those of the other."""
    agent, args = make_options(dac, dtype=torch.float32, num_minibatches=4, update_epochs=6, target_kl=0.01)
    obs, action, log_prob, *others = make_batch(ppo_like(dac))
    option = torch.arange(64) % 3
    two = (torch.stack([x, x], 1) for x in (log_prob, *others))
    batch, calls = dac.Batch(obs, action, option - 1, option, torch.ones(64, 3) / 3, *two), []
    for seed, far in itertools.product(range(4), dac.MDPS):  # in either order
        torch.manual_seed(seed)
        calls.clear()

        def update(agent, batch, args, mdp, far=far):
            calls.append(mdp)
            return {"log_ratio": torch.full((16,), float(mdp == far))}

        monkeypatch.setattr(dac, "update", update)
        dac.learn(agent, batch, args)
        assert [calls.count(mdp) for mdp in dac.MDPS] == [4 if mdp == far else 12 for mdp in dac.MDPS]


@pytest.mark.parametrize(("high_epochs", "expected"), [(None, (2, 3)), (0, (0, 5)), (1, (1, 4)), (4, (4, 1))])
def test_passes_of_each_mdp(dac, high_epochs, expected, monkeypatch):
    agent, args = make_options(dac, dtype=torch.float32, update_epochs=5, high_epochs=high_epochs)
    found = {}
    monkeypatch.setattr(dac, "passes", lambda agent, batch, args, mdp, epochs: found.update({mdp: epochs}) or {})
    obs, action, *others = make_batch(ppo_like(dac))
    two, option = (torch.stack([x, x], 1) for x in others), torch.arange(64) % 3
    dac.learn(agent, dac.Batch(obs, action, option - 1, option, torch.ones(64, 3) / 3, *two), args)
    assert found == {mdp: epochs for mdp, epochs in zip(dac.MDPS, expected, strict=True) if epochs}


def test_one_option_without_high_epochs_is_ppo(ppo, dac):
    """Whole rollouts: the same densities, advantages and weights, if no gradient is so long that it is clipped."""
    settings = dict(env_id="PPOVector-v0", num_envs=4, num_steps=32, num_minibatches=4, learning_rate=1e-3)
    settings |= dict(max_grad_norm=1e9, ent_coef=0.1)
    args, dac_args = ppo.Args(**settings), dac.Args(num_options=1, high_epochs=0, **settings)
    torch.manual_seed(0)
    envs = ppo.make_envs(args)
    size = envs.single_observation_space.shape[0]
    one, other = ppo.Agent(size, 2, args), dac.Agent(size, 2, dac_args)

    def weights(agent):  # of ppo.py in the form of ppo_dac.py
        actor = agent.actor
        for i, (network, head) in enumerate((("mean", actor.mean), ("q", actor.value))):
            for name in ("w1", "b1", "w2", "b2"):
                yield f"{network}.{name}", getattr(actor.trunks, name)[i][None]
            yield from ((f"{network}.w3", head.w[None]), (f"{network}.b3", head.b[None, None]))
        yield "log_std", actor.log_std[None]

    other.actor.load_state_dict(dict(weights(one)), strict=False)
    sampler = ppo.Sampler(envs, args)
    sampler.reset(0)
    for seed in range(2):
        rollout, _ = sampler.rollout(one)
        zero = torch.zeros_like(rollout.reward)[..., None]
        batch = ppo.prepare(one, rollout, args)
        with_options = rollout._replace(action=torch.cat([rollout.action, -(zero + 1), zero], 2))
        dac_batch = dac.prepare(other, with_options, dac_args)
        for name in ("log_prob", "advantage", "target"):
            torch.testing.assert_close(getattr(dac_batch, name)[:, 1], getattr(batch, name), rtol=1e-3, atol=1e-4)
        torch.manual_seed(seed)
        expected = ppo.learn(one, batch, args)
        torch.manual_seed(seed)
        found = dac.learn(other, dac_batch, dac_args)
        for key in ("losses/actor", "losses/critic", "policy/kl"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-2, atol=1e-4)
        for key, value in weights(one):
            torch.testing.assert_close(other.actor.get_parameter(key), value, rtol=1e-2, atol=2e-4, msg=key)
    assert found["moe/gate_entropy"].abs() < 1e-6 and found["moe/usage_0"] == 1
    envs.close()


@pytest.mark.parametrize("mdp", ["high", "low"])
def test_gradients_of_options_equal_the_textbook(dac, mdp, monkeypatch):
    agent, args = make_options(dac, dtype=torch.float32, ent_coef=0.1, high_ent_coef=0.2)
    obs, action, *columns = make_batch(ppo_like(dac))
    former, option = torch.arange(64) % 4 - 1, torch.arange(64) % 3
    columns[0] = columns[0] + (1.5 if mdp == "high" else 0)  # about log pi_H, so that only some are clipped
    high = torch.randn(64, 3).softmax(1)  # pi_H when acting
    batch = dac.Batch(obs, action, former, option, high, *columns)
    fast, metrics = gradients(dac, agent, batch, args, monkeypatch, mdp)
    actor, rows = agent.actor, torch.arange(64)
    q = actor.q(obs)[:, 0]
    if mdp == "high":
        p = actor.high(obs, former).exp()
        log_prob, entropy, coef = p[rows, option].log(), -(p * p.log()).sum(1).mean(), 0.2
        value = (high * q).sum(1)
    else:
        policy = Independent(Normal(actor.mean(obs)[rows, option], actor.log_std[option].exp()), 1)
        log_prob, entropy, coef, value = policy.log_prob(action), policy.entropy().mean(), 0.1, q[rows, option]
    textbook(log_prob, value, entropy, batch, coef).backward()
    for key, parameter in actor.named_parameters():
        learns = key.startswith({"high": ("beta", "gate", "q"), "low": ("mean", "log_std", "q")}[mdp])
        assert (fast[key] is None) == (parameter.grad is None) == (not learns), key
        if learns:
            torch.testing.assert_close(fast[key], parameter.grad, rtol=1e-3, atol=1e-6, msg=key)
    torch.testing.assert_close(metrics["losses/critic"], (value - batch.target).square().mean().detach())


def test_every_weight_of_options_learns(dac):
    agent, args = make_options(dac, dtype=torch.float32)
    obs, action, *others = make_batch(ppo_like(dac))
    batch = dac.Batch(obs, action, torch.arange(64) % 4 - 1, torch.arange(64) % 3, torch.ones(64, 3) / 3, *others)
    before = {key: weight.clone() for key, weight in agent.named_parameters()}
    for mdp in dac.MDPS:
        dac.update(agent, batch, args, mdp)
    assert not [key for key, weight in agent.named_parameters() if torch.equal(weight, before[key])]


def ppo_like(dac):
    """make_batch() fills a batch of five columns."""
    return type("Script", (), {"Batch": staticmethod(lambda *columns: columns)})


def test_usage_of_options_by_hand(dac):
    agent, args = make_options(dac, dtype=torch.float32, num_options=2)
    for network in (agent.actor.beta, agent.actor.gate):
        network.w3.data.zero_()
    agent.actor.gate.b3.data.zero_()
    agent.actor.beta.b3.data[:] = torch.tensor([[[math.log(1 / 3)]], [[math.log(3.0)]]])  # beta 1/4 and 3/4
    former, option = torch.tensor([-1, 0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 0, 1, 1])
    zero = torch.zeros(6, 2)
    found = agent.actor.usage(dac.Batch(torch.randn(6, 3), zero, former, option, zero, zero, zero, zero))
    h = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (1 / 2, 7 / 8, 5 / 8)]  # pi_W; that of staying with 0, 1
    assert found["moe/gate_entropy"].item() == pytest.approx((h[0] + 4 * h[1] + h[2]) / 6)
    assert found["options/beta"].item() == pytest.approx((4 / 4 + 3 / 4) / 5)
    assert found["options/length"].item() == 3  # two starts in six steps
    assert [found["moe/usage_0"].item(), found["moe/usage_1"].item()] == pytest.approx([4 / 6, 2 / 6])
    assert found["policy/entropy"].item() == pytest.approx(agent.actor.entropy(option).item())


def test_a_player_says_which_option_acts_and_lets_one_act_alone(dac, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ALGOS.parent / "results")
    policy = load("policy", ALGOS.parent / "results")
    args = dac.Args(env_id="moe_envs:TargetReaching-v0?layout=fixed&max_episode_steps=12", num_options=3)
    torch.manual_seed(0)
    agent = dac.Agent(17, 2, args)
    saved = {"script": "ppo_dac", "args": dac.dataclasses.asdict(args), "global_step": 1, "commit": None}
    torch.save(saved | {"agent": agent.state_dict()}, tmp_path / "s1.pt")
    player = policy.Player(policy.load(tmp_path / "s1.pt"))
    assert player.experts == 3 and player.policies == ("deterministic", "gate", "stochastic")
    acting = []
    for _, _, k in player.episode(0, "stochastic"):
        acting.append((k, *(int(option) for option in player.saved.agent.memory)))
    assert acting[0] == (None,) and all(k == option for k, option in acting[1:]) and len({k for k, *_ in acting}) == 4
    player.alone = 2
    assert {k for _, _, k in player.episode(0, "stochastic")} == {None, 2}


# All three


@pytest.mark.parametrize(
    ("name", "mdp"), [("ppo_gating", ()), ("ppo_mcp", ()), *(("ppo_dac", (m,)) for m in ("high", "low"))]
)
def test_no_update_synchronises(name, mdp):
    script = load(name)
    args = script.Args(ent_coef=0.1)
    agent = script.Agent(3, 2, args)
    batch = make_batch(ppo_like(script))
    if mdp:
        batch = (*batch[:2], torch.arange(64) % 4 - 1, torch.arange(64) % 4, torch.ones(64, 4) / 4, *batch[2:])
    with NoSynchronisation():
        script.update(agent, script.Batch(*batch), args, *mdp)


@pytest.mark.parametrize("name", ["ppo_gating", "ppo_mcp", "ppo_dac"])
def test_probe_policy(name):
    agent = train(load(name), "PPOActionIsReward-v0")
    assert agent.act(np.zeros(1, np.float32), "deterministic").item() == pytest.approx(0.5, abs=0.1)


def test_probe_value_of_options(dac):
    """At gamma 0.5 reward 1 twice, then the end, has V = 1 + 0.5, 1, in the high MDP as in the low one."""
    agent = train(dac, "PPOTwoStepsTrue-v0", gamma=0.5)
    with torch.no_grad():
        _, log_pi, q = agent.actor(agent.actor.normalize(torch.arange(2)[:, None]))
    value = (log_pi.exp() * q).sum(1) / agent.return_moments.scale
    torch.testing.assert_close(value, torch.tensor([1.5, 1.0]), rtol=0, atol=0.05)

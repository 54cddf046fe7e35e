"""The mathematics of SAC's rivals of PMOE: gradients of sac_gmm.py, average of sac_gating.py, product of sac_mcp.py."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import load
from test_sac import NoSynchronisation, make_batch
from test_sac_pmoe import same_noise  # noqa: F401
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, TanhTransform

GRADIENTS = ("marginal", "score", "gumbel")
AVERAGING = {"sac_gating": {}, "sac_mcp": {}, "sac_mcp-softmax": {"gate": "softmax"}}  # name -> flags


@pytest.fixture(scope="module")
def gmm():
    return load("sac_gmm")


@pytest.fixture(scope="module")
def gating():
    return load("sac_gating")


@pytest.fixture(scope="module")
def mcp():
    return load("sac_mcp")


def script_and_flags(name):
    return load(name.split("-")[0]), AVERAGING.get(name, {})


# One expert


@pytest.mark.parametrize("name", ["sac_gating", "sac_mcp-softmax"])
def test_one_averaged_expert_is_sac_to_the_bit(sac, name):
    """Over several updates: actions, losses, weights; but for the gate and what belongs to it."""
    script, flags = script_and_flags(name)
    args, other_args = sac.Args(), script.Args(num_experts=1, **flags)
    torch.manual_seed(0)
    one, other = sac.Agent(3, 2, args), script.Agent(3, 2, other_args)
    other.load_state_dict(one.state_dict(), strict=False)
    for step in range(4):
        batch = make_batch(sac, seed=step)
        torch.manual_seed(step)
        expected = sac.update(one, batch, args)
        torch.manual_seed(step)
        found = script.update(other, batch, other_args)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert all(torch.equal(other.state_dict()[key], value) for key, value in one.state_dict().items())
    obs = torch.randn(50, 3)
    for policy in ("deterministic", "stochastic"):
        torch.manual_seed(0)
        action = one.actor.act(obs, policy)
        torch.manual_seed(0)
        assert torch.equal(other.actor.act(obs, policy), action)


@pytest.mark.parametrize("entropy", ["mixture", "component"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_mixture_of_one_expert_is_sac(sac, gmm, same_noise, gradient, entropy):  # noqa: F811
    args, gmm_args = sac.Args(), gmm.Args(num_experts=1, gradient=gradient, entropy=entropy)
    torch.manual_seed(0)
    one, other = sac.Agent(3, 2, args).double(), gmm.Agent(3, 2, gmm_args).double()
    other.load_state_dict(one.state_dict(), strict=False)
    for step in range(4):
        batch = sac.Batch(*(x.double() for x in make_batch(sac, seed=step)))
        same_noise(step)
        expected = sac.update(one, batch, args)
        same_noise(step)
        found = gmm.update(other, batch, gmm_args)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-11, atol=1e-11, msg=key)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-9, atol=1e-9, msg=key)


# sac_gmm.py: the density


def mixture(actor, obs):
    """The density of u with torch.distributions."""
    mean, log_std, log_w = actor(obs)
    return MixtureSameFamily(Categorical(logits=log_w), Independent(Normal(mean, log_std.exp()), 1))


def test_density_integrates_to_one(gmm, monkeypatch):
    """sample() is led over a grid of u by the noise that it draws; whichever expert draws, the density is the same."""
    torch.manual_seed(0)
    actor = gmm.Actor(3, 1, gmm.Args(num_experts=3)).double()
    actor.head.weight.data.mul_(20)  # experts that differ
    mean, log_std, log_w = actor(torch.ones(1, 3, dtype=torch.float64))
    assert mean.max() - mean.min() > 1
    u, densities = torch.linspace(-9, 9, 5_001, dtype=torch.float64)[:, None], []
    for k in range(3):
        noise = (u - mean[0, k]) / log_std[0, k].exp()
        monkeypatch.setattr(gmm, "gumbel_like", lambda x, k=k: 1e9 * nn.functional.one_hot(torch.tensor(k), 3))
        monkeypatch.setattr(torch, "randn_like", lambda x, noise=noise: noise)
        action, log_prob = actor.sample(torch.ones(len(u), 3, dtype=torch.float64))
        densities.append(log_prob.exp())
        assert torch.trapezoid(densities[-1], action[:, 0]).item() == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(densities[-1], densities[0])


@pytest.mark.parametrize("entropy", ["mixture", "component"])
def test_log_probability_against_torch_distributions(gmm, same_noise, monkeypatch, entropy):  # noqa: F811
    actor = gmm.Actor(3, 2, gmm.Args(num_experts=4, entropy=entropy)).double()
    obs = 3 * torch.randn(100, 3, dtype=torch.float64)
    k = torch.randint(4, (100,))
    monkeypatch.setattr(gmm, "gumbel_like", lambda x: 1e9 * nn.functional.one_hot(k, 4))
    same_noise()
    action, log_prob = actor.sample(obs)
    u, pi = action.atanh(), mixture(actor, obs)
    mean, log_std, _ = actor(obs)
    same_noise()
    rows = torch.arange(100)
    torch.testing.assert_close(u, mean[rows, k] + log_std[rows, k].exp() * torch.randn_like(u))
    density = pi.log_prob(u) if entropy == "mixture" else pi.component_distribution.log_prob(u[:, None])[rows, k]
    torch.testing.assert_close(log_prob, density - TanhTransform().log_abs_det_jacobian(u, action).sum(1))


def test_experts_are_drawn_with_the_weights_of_the_gate(gmm):
    actor = gmm.Actor(1, 1, gmm.Args(num_experts=3))
    for parameter in actor.parameters():
        parameter.data.zero_()
    actor.head.bias.data[:] = torch.tensor([-2.0, 0.0, 2.0, -9.0, -9.0, -9.0])  # three means, all but no noise
    actor.gate.bias.data[:] = torch.tensor([0.2, 0.3, 0.5]).log() + 7
    torch.manual_seed(0)
    for policy in ("stochastic", "gate"):
        action = actor.act(torch.zeros(20_000, 1), policy)
        share = torch.stack([(action < -0.5).float().mean(), (action.abs() < 0.5).float().mean()])
        torch.testing.assert_close(share, torch.tensor([0.2, 0.3]), rtol=0, atol=0.015)
    assert torch.equal(actor.act(torch.zeros(1, 1), "deterministic"), torch.tensor([[2.0]]).tanh())


# sac_gmm.py: the gradients, on a bandit whose exact ones a quadrature gives


MEAN, LOG_STD, LOGITS, ALPHA = [-0.8, 0.3, 1.0], [-1.2, -0.5, -0.9], [0.4, -0.3, 0.1], 0.1


def two_bumps(action):
    return (-(((action - 0.7) / 0.1) ** 2)).exp() + 0.8 * (-(((action + 0.5) / 0.1) ** 2)).exp()


def exact(entropy):
    """Gradients of J = sum_k w_k E_k f(a) to logits and means, (3,) each, by a quadrature over the noise."""
    mean, logits = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (MEAN, LOGITS))
    std = torch.tensor(LOG_STD, dtype=torch.float64).exp()
    noise = torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:, None]
    weight = (-0.5 * noise**2).exp()
    u = mean + std * noise  # (N, K)
    log_normal = Normal(mean, std).log_prob(u[..., None])  # (N, K, K)
    log_u = (logits.log_softmax(0) + log_normal).logsumexp(2)
    if entropy == "component":
        log_u = log_normal.diagonal(dim1=1, dim2=2)
    log_prob = log_u - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
    f = ALPHA * log_prob - two_bumps(u.tanh())
    j = (logits.softmax(0) * (weight / weight.sum() * f).sum(0)).sum()
    return torch.autograd.grad(j, (logits, mean))


class Bandit(nn.Module):
    """In place of the actor: the same mixture in every state, but with parameters of its own in each."""

    def __init__(self, n):
        super().__init__()
        self.logits, self.mean = (nn.Parameter(torch.tensor(x).repeat(n, 1)) for x in (LOGITS, MEAN))

    def forward(self, obs):
        mean = self.mean[..., None]
        return mean, torch.tensor(LOG_STD)[:, None].expand_as(mean), self.logits.log_softmax(1)

    def sample(self, obs):
        return torch.zeros(len(obs), 1), torch.zeros(len(obs))


class TwoBumps(nn.Module):
    """In place of the critics."""

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, obs, action):
        return two_bumps(action.squeeze(-1)).expand(2, *action.shape[:-1]) + self.zero


def draws(gmm, n=40_000, **flags):
    """n single draws of the gradient to logits and means, (n, 3) each: what update() leaves on n states."""
    args = gmm.Args(num_experts=3, alpha_init=ALPHA, q_lr=1e-12, **flags)
    agent = gmm.Agent(1, 1, args)
    agent.actor, agent.critic, agent.critic_target = Bandit(n), TwoBumps(), TwoBumps().requires_grad_(False)
    agent.actor_optimizer = torch.optim.Adam(agent.actor.parameters())
    agent.critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=1e-12)
    torch.manual_seed(0)
    zero = torch.zeros(n, 1)
    gmm.update(agent, gmm.Batch(zero, zero, zero[:, 0], zero[:, 0], zero), args)
    return n * agent.actor.logits.grad.double(), n * agent.actor.mean.grad.double()


def errors(samples, truth):
    """(mean - truth) in standard errors."""
    return (samples.mean(0) - truth) / (samples.std(0) / len(samples) ** 0.5)


@pytest.mark.parametrize("entropy", ["mixture", "component"])
def test_gradients_against_quadrature(gmm, entropy):
    """Gate: marginal and score are unbiased, Gumbel is not. Experts: all are."""
    gate, experts = exact(entropy)
    variance = {}
    for gradient, baseline in (*((name, "draws") for name in GRADIENTS), ("score", "none")):
        logits, mean = draws(gmm, gradient=gradient, baseline=baseline, entropy=entropy)
        largest = errors(logits, gate).abs().max()
        assert largest > 10 if gradient == "gumbel" else largest < 3, (gradient, baseline)
        assert errors(mean, experts).abs().max() < 3, (gradient, baseline)
        variance[gradient, baseline] = logits.var(0).sum()
    assert variance["marginal", "draws"] < variance["score", "draws"] < variance["score", "none"]


def test_gumbel_temperature_matters_to_the_gate_alone(gmm):
    one, other = (draws(gmm, 1000, gradient="gumbel", gumbel_temperature=x) for x in (1.0, 0.3))
    assert not one[0].isclose(other[0]).all(1).any() and one[1].allclose(other[1])
    flags = dict(gradient="gumbel", entropy="component")  # of the mixture's log pi a part has no temperature
    one, other = (draws(gmm, 1000, gumbel_temperature=x, **flags)[0] for x in (1e4, 2e4))
    assert (one.abs().sum() / other.abs().sum()).item() == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("entropy", ["mixture", "component"])
def test_mean_of_score_over_the_experts_is_marginal(gmm, same_noise, monkeypatch, entropy):  # noqa: F811
    """On the networks, to rounding, for the same draws of the actions."""

    def gradients(k, **flags):
        args = gmm.Args(num_experts=4, entropy=entropy, **flags)
        copy = deepcopy(agent)
        copy.critic_optimizer = torch.optim.SGD(copy.critic.parameters(), lr=0.0)  # its target depends on k
        copy.actor_optimizer = torch.optim.SGD(copy.actor.parameters(), lr=0.0)
        same_noise()
        monkeypatch.setattr(gmm, "gumbel_like", lambda x: 1e9 * nn.functional.one_hot(torch.tensor(k), 4))
        gmm.update(copy, batch, args)
        return [p.grad for p in copy.actor.parameters()]

    torch.manual_seed(0)
    agent = gmm.Agent(3, 2, gmm.Args(num_experts=4)).double()
    agent.actor.gate.weight.data.mul_(5)
    batch = gmm.Batch(*(x.double() for x in make_batch(gmm, 1)))
    w = agent.actor(batch.obs)[2].exp()[0]
    marginal = gradients(0)
    scores = [gradients(k, gradient="score") for k in range(4)]
    for i, expected in enumerate(marginal):
        mean = sum(w[k] * scores[k][i] for k in range(4))
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(scores[0][i], expected, rtol=0.01)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("entropy", ["mixture", "component"])
def test_what_the_temperature_learns_from(gmm, gradient, entropy):
    """The entropy of the mixture or the mean one of its experts, by many draws; the gap is the mutual information."""
    args = gmm.Args(num_experts=2, gradient=gradient, entropy=entropy)
    agent = gmm.Agent(1, 1, args)
    for parameter in agent.actor.parameters():
        parameter.data.zero_()
    agent.actor.gate.bias.data[:] = torch.tensor([0.2, 0.8]).log()
    agent.actor.head.bias.data[:] = torch.tensor([-3.0, 3.0, -1.0, -1.0])  # so far apart that the gap is H(w)
    torch.manual_seed(0)
    batch = make_batch(gmm, 3_000, 1, 1)
    found = gmm.update(agent, batch, args)
    u = 3 + math.exp(-1) * torch.randn(100_000)
    one = (Normal(3, math.exp(-1)).entropy() + 2 * (math.log(2) - u - nn.functional.softplus(-2 * u)).mean()).item()
    gap = -0.2 * math.log(0.2) - 0.8 * math.log(0.8)
    assert found["policy/entropy"].item() == pytest.approx(one + gap * (entropy == "mixture"), abs=0.1)
    assert found["losses/alpha"].item() == pytest.approx(math.log(0.1) * (found["policy/entropy"].item() + 1), rel=1e-4)


# sac_gating.py and sac_mcp.py: one Gaussian


@pytest.mark.parametrize("name", AVERAGING)
def test_all_experts_share_one_noise(name, same_noise):  # noqa: F811
    script, flags = script_and_flags(name)
    actor = script.Actor(3, 2, script.Args(num_experts=5, **flags)).double()
    obs = torch.randn(10, 3, dtype=torch.float64)
    mean, log_std = actor(obs)
    same_noise()
    action, log_prob = actor.sample(obs)
    same_noise()
    u = mean + log_std.exp() * torch.randn(10, 2, dtype=torch.float64).copy_(torch.randn_like(mean))
    torch.testing.assert_close(action, u.tanh())
    density = Normal(mean, log_std.exp()).log_prob(u) - TanhTransform().log_abs_det_jacobian(u, action)
    torch.testing.assert_close(log_prob, density.sum(1))


@pytest.mark.parametrize("name", AVERAGING)
def test_gate_and_experts_minimise_the_loss_of_sac(name, same_noise):  # noqa: F811
    """With several experts: the gradients of update() against those of sample()."""
    script, flags = script_and_flags(name)
    args = script.Args(num_experts=3, **flags)
    agent, batch = script.Agent(3, 2, args), make_batch(script, 32)
    actor = deepcopy(agent.actor)
    same_noise()
    script.update(agent, batch, args)
    same_noise()
    torch.randn_like(batch.action)  # the draw of the critic's target
    action, log_prob = actor.sample(batch.obs)
    (args.alpha_init * log_prob - agent.critic(batch.obs, action).amin(0)).mean().backward()
    for (key, found), expected in zip(agent.actor.named_parameters(), actor.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", ["sac", *AVERAGING])
def test_policies_of_one_gaussian(name):
    script, flags = script_and_flags(name)
    actor, obs = script.Actor(3, 2, script.Args(**flags)), torch.randn(5, 3)
    assert torch.equal(actor.act(obs, "deterministic"), actor(obs)[0].tanh())
    torch.manual_seed(0)
    action = actor.act(obs, "stochastic")
    torch.manual_seed(0)
    assert torch.equal(action, actor.sample(obs)[0])


def test_average_by_hand(gating):
    torch.manual_seed(0)
    actor = gating.Actor(3, 2, gating.Args(num_experts=3)).double()
    obs = torch.randn(10, 3, dtype=torch.float64)
    means, log_stds, log_w = actor.experts(obs)
    mean, log_std = actor(obs)
    for b in range(10):
        w = log_w[b].exp()
        assert w.sum().item() == pytest.approx(1)
        torch.testing.assert_close(mean[b], sum(w[k] * means[b, k] for k in range(3)))
        torch.testing.assert_close(log_std[b].exp(), sum(w[k] * log_stds[b, k].exp() for k in range(3)))
    logits = actor.gate(actor.trunk(obs))
    torch.testing.assert_close(log_w.exp(), logits.exp() / logits.exp().sum(1, keepdim=True))


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_product_of_gaussians_on_a_grid(mcp, gate):
    torch.manual_seed(0)
    actor = mcp.Actor(3, 2, mcp.Args(num_experts=4, gate=gate)).double()
    for layer in (actor.head, actor.gate):
        layer.weight.data.mul_(10)
    obs = torch.randn(6, 3, dtype=torch.float64)
    means, log_stds, log_w = actor.experts(obs)
    mean, log_std = actor(obs)
    logits = actor.gate(actor.trunk(obs))
    torch.testing.assert_close(log_w.exp(), logits.sigmoid() if gate == "sigmoid" else logits.softmax(1))
    u = torch.linspace(-25, 25, 40_001, dtype=torch.float64)
    for b in range(6):
        for d in range(2):
            log_product = sum(
                log_w[b, k].exp() * Normal(means[b, k, d], log_stds[b, k, d].exp()).log_prob(u) for k in range(4)
            )
            product = (log_product - log_product.max()).exp()
            product = product / torch.trapezoid(product, u)
            torch.testing.assert_close(Normal(mean[b, d], log_std[b, d].exp()).log_prob(u).exp(), product)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("num_experts", [1, 4, 16])
def test_first_standard_deviation_is_about_one(mcp, num_experts, gate):
    torch.manual_seed(0)
    std = mcp.Actor(11, 2, mcp.Args(num_experts=num_experts, gate=gate))(torch.randn(200, 11))[1].exp()
    assert std.mean().item() == pytest.approx(1, abs=0.1) and std.min() > 0.7 and std.max() < 1.4


@pytest.mark.parametrize("name", ["sac_gmm", *AVERAGING])
def test_the_gate_learns_through_the_trunk(name):
    script, flags = script_and_flags(name)
    torch.manual_seed(0)
    actor = script.Actor(3, 2, script.Args(**flags))
    log_w = getattr(actor, "experts", actor)(torch.randn(5, 3))[2]
    (gradient,) = torch.autograd.grad(log_w[:, 0].sum(), actor.trunk[0].weight)
    assert (gradient != 0).any()


# Diagnostics, waiting, flags


@pytest.mark.parametrize("name", [*AVERAGING, *(f"sac_gmm-{gradient}" for gradient in GRADIENTS)])
def test_diagnostics(name):
    script, flags = script_and_flags(name)
    if name.startswith("sac_gmm"):
        flags = {"gradient": name.removeprefix("sac_gmm-")}
    args = script.Args(num_experts=2, **flags)
    agent = script.Agent(3, 2, args)
    for parameter in agent.actor.parameters():
        parameter.data.zero_()
    agent.actor.gate.bias.data[:] = torch.tensor([math.log(3.0), 0.0])
    agent.actor.head.bias.data[:] = torch.tensor([1.0, 0, -1.0, 0, 0, 0, 0, 0])  # means (1, 0) and (-1, 0), std 1
    found = {key: value.item() for key, value in script.update(agent, make_batch(script), args).items()}
    w = [0.75, 0.5] if name == "sac_mcp" else [0.75, 0.25]
    share = [x / sum(w) for x in w]
    assert [found["moe/usage_0"], found["moe/usage_1"]] == pytest.approx(w)
    assert found["moe/gate_entropy"] == pytest.approx(-sum(x * math.log(x) for x in share))
    assert found["moe/expert_distance"] == pytest.approx(2 * math.tanh(1), rel=1e-5)
    assert found["policy/std"] == pytest.approx(1.25**-0.5 if name == "sac_mcp" else 1.0)


@pytest.mark.parametrize("name", ["sac_pmoe", "sac_gmm", *AVERAGING])
def test_diagnostics_of_states_and_experts_that_differ(name):
    """Means over states, experts and pairs of experts; the gate's entropy is that of a state, not of the mean gate."""
    script, flags = script_and_flags(name)
    args = script.Args(num_experts=3, **flags)
    torch.manual_seed(0)
    agent, batch = script.Agent(3, 2, args), make_batch(script)
    for layer in (agent.actor.head, agent.actor.gate):
        layer.weight.data.mul_(20)
    actor = deepcopy(agent.actor)
    found = {key: value.item() for key, value in script.update(agent, batch, args).items()}
    with torch.no_grad():
        mean, _, w = getattr(actor, "experts", actor)(batch.obs)
        w, log_std = w if name == "sac_pmoe" else w.exp(), actor(batch.obs)[1]
    p, a = w / w.sum(1, keepdim=True), mean.tanh()
    distances = [(a[:, i] - a[:, j]).square().sum(1).sqrt().mean().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert [found[f"moe/usage_{k}"] for k in range(3)] == pytest.approx(w.mean(0).tolist(), rel=1e-4)
    assert found["moe/gate_entropy"] == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-4)
    assert found["moe/expert_distance"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert found["policy/std"] == pytest.approx(log_std.exp().mean().item(), rel=1e-4)


@pytest.mark.parametrize("entropy", ["mixture", "component"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_no_gradient_waits_for_the_device(gmm, gradient, entropy):
    args = gmm.Args(gradient=gradient, entropy=entropy)
    agent = gmm.Agent(3, 2, args)
    agent.critic_optimizer.step = agent.actor_optimizer.step = agent.alpha_optimizer.step = lambda: None  # not ours
    with NoSynchronisation():
        gmm.update(agent, make_batch(gmm), args)

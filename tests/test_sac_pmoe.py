"""The mathematics of SAC-PMOE: K = 1 is SAC, back-propagation-max, the gate's loss and Theorem 3.1."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_sac import make_batch
from torch.distributions import Normal, TanhTransform, TransformedDistribution


@pytest.fixture
def same_noise(monkeypatch):
    """Calling it rewinds the noise: randn_like then gives the same numbers whatever the shape."""

    def rewind(seed=0):
        generator = torch.Generator().manual_seed(seed)
        monkeypatch.setattr(torch, "randn_like", lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype))

    return rewind


@pytest.mark.parametrize("selection", ["draws", "means"])
@pytest.mark.parametrize("primitive_update", ["max", "all"])
def test_one_expert_is_sac(sac, pmoe, same_noise, primitive_update, selection):
    args, pmoe_args = sac.Args(), pmoe.Args(num_experts=1, primitive_update=primitive_update, selection=selection)
    torch.manual_seed(0)
    one, other = sac.Agent(3, 2, args), pmoe.Agent(3, 2, pmoe_args)
    other.load_state_dict(one.state_dict(), strict=False)  # the gate alone is left
    for step in range(4):
        batch = make_batch(sac, seed=step)
        same_noise(step)
        expected = sac.update(one, batch, args)
        same_noise(step)
        losses = pmoe.update(other, batch, pmoe_args)
        for key, value in expected.items():
            torch.testing.assert_close(losses[key], value, rtol=0, atol=1e-6, msg=key)
        assert losses["losses/gate"] == 0
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=1e-6, msg=key)


def test_component_log_prob_against_torch_distributions(pmoe, same_noise):
    """sample() gives the log-probability of the drawn component, the one that its action came from."""
    actor = pmoe.Actor(3, 2, pmoe.Args(num_experts=5)).double()
    obs = 3 * torch.randn(200, 3, dtype=torch.float64)
    mean, log_std, w = actor(obs)
    torch.manual_seed(0)
    same_noise()
    action, log_prob = actor.sample(obs)
    torch.manual_seed(0)
    k = (w / torch.empty_like(w).exponential_()).argmax(1)
    rows = torch.arange(200)
    same_noise()
    u = mean[rows, k] + log_std[rows, k].exp() * torch.randn_like(mean[:, 0])
    torch.testing.assert_close(action, u.tanh())
    density = TransformedDistribution(Normal(mean[rows, k], log_std[rows, k].exp()), TanhTransform(cache_size=1))
    torch.testing.assert_close(log_prob, density.log_prob(density.transforms[0](u)).sum(-1), rtol=0, atol=1e-9)
    share = torch.stack([(k == i).double().mean() for i in range(5)])
    torch.testing.assert_close(share, w.mean(0), rtol=0, atol=0.12)


def test_experts_are_drawn_with_the_weights_of_the_gate(pmoe):
    actor = pmoe.Actor(1, 1, pmoe.Args(num_experts=3))
    actor.head.weight.data.zero_()
    actor.head.bias.data[:] = torch.tensor([-2.0, 0.0, 2.0, -9.0, -9.0, -9.0])  # three means, all but no noise
    actor.gate.weight.data.zero_()
    actor.gate.bias.data[:] = torch.tensor([0.2, 0.3, 0.5]).log()
    torch.manual_seed(0)
    action, _ = actor.sample(torch.zeros(20_000, 1))
    share = torch.stack([(action < -0.5).float().mean(), (action.abs() < 0.5).float().mean()])
    torch.testing.assert_close(share, torch.tensor([0.2, 0.3]), rtol=0, atol=0.015)


def test_policies_that_act_without_noise(pmoe):
    """deterministic: the mean of the likeliest expert; gate: of one drawn from w, so as often as w says."""
    actor = pmoe.Actor(3, 2, pmoe.Args(num_experts=5))
    obs = torch.randn(50, 3)
    mean, _, w = actor(obs)
    expected = torch.stack([mean[i, w[i].argmax()].tanh() for i in range(50)])
    assert torch.equal(actor.act(obs, "deterministic"), expected)

    actor.gate.weight.data.zero_()
    actor.gate.bias.data[:] = torch.tensor([0.1, 0.2, 0.3, 0.4, 1e-30]).log()
    torch.manual_seed(0)
    action = actor.act(obs[:1].expand(20_000, -1), "gate")
    which = (action[:, None] - mean[0].tanh()).norm(dim=2).min(1)
    assert which.values.max() < 1e-6
    share = torch.bincount(which.indices, minlength=5) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0]), atol=0.02, rtol=0)


def gradients_of_update(pmoe, agent, batch, args, rewind):
    """Gradients that update() left on the actor, the actor as its step saw it, and what update() returned."""
    actor = deepcopy(agent.actor)
    rewind()
    torch.manual_seed(0)
    metrics = pmoe.update(agent, batch, args)
    return {name: p.grad.clone() for name, p in agent.actor.named_parameters()}, actor, metrics


@pytest.mark.parametrize("selection", ["draws", "fresh", "means"])
@pytest.mark.parametrize("primitive_update", ["max", "all"])
def test_fast_form_has_the_gradients_of_the_plain_form(pmoe, same_noise, primitive_update, selection):
    """Plain form: all K actions through both critics with gradients, the gate's and the actor's loss in one sum."""
    args = pmoe.Args(num_experts=4, primitive_update=primitive_update, selection=selection)
    agent, batch = pmoe.Agent(3, 2, args), make_batch(pmoe, 32)
    alpha = agent.log_alpha.detach().exp()
    fast, actor, metrics = gradients_of_update(pmoe, agent, batch, args, same_noise)

    same_noise()
    torch.randn_like(batch.action)  # the draw of the critic's target
    mean, log_std, w = actor(batch.obs)
    u = mean + log_std.exp() * torch.randn_like(mean)
    judged = mean if selection == "means" else u
    best = agent.critic(batch.obs, judged.tanh()).amin(0).argmax(1)  # the critic as it was in the actor's step
    if selection == "fresh":
        u = mean + log_std.exp() * torch.randn_like(mean)
    density = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    log_prob = density.log_prob(density.transforms[0](u)).sum(-1)
    q = agent.critic(batch.obs, u.tanh()).amin(0)  # (B, K)
    rows = torch.arange(32)
    if primitive_update == "max":
        loss = (alpha * log_prob[rows, best] - q[rows, best]).mean()
    else:
        loss = (alpha * log_prob - q).sum(1).mean()
    loss = loss + F.mse_loss(w, F.one_hot(best, 4).float())
    loss.backward()
    for name, p in actor.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(
        torch.stack([metrics[f"moe/wins_{k}"] for k in range(4)]), torch.bincount(best, minlength=4) / 32
    )
    entropy = -log_prob[rows, best].mean().detach()  # of the best expert: what the temperature learns from
    torch.testing.assert_close(metrics["policy/entropy"], entropy)
    torch.testing.assert_close(metrics["losses/alpha"], math.log(args.alpha_init) * (entropy + 2))


@pytest.mark.parametrize("selection", ["draws", "fresh", "means"])
def test_only_the_best_expert_of_a_state_learns(pmoe, same_noise, selection):
    args = pmoe.Args(num_experts=4, selection=selection)
    agent, batch = pmoe.Agent(3, 2, args), make_batch(pmoe, 1)
    gradients, actor, _ = gradients_of_update(pmoe, agent, batch, args, same_noise)
    rows = gradients["head.weight"].view(2, 4, 2, -1).abs().sum((0, 2, 3))  # (K,)
    assert (rows > 0).sum() == 1
    if selection == "means":
        mean, _, _ = actor(batch.obs)
        assert rows.argmax() == agent.critic(batch.obs, mean.tanh()).amin(0).argmax()


def test_all_experts_learn_in_back_propagation_all(pmoe, same_noise):
    args = pmoe.Args(num_experts=4, primitive_update="all")
    gradients, *_ = gradients_of_update(pmoe, pmoe.Agent(3, 2, args), make_batch(pmoe, 1), args, same_noise)
    assert (gradients["head.weight"].view(2, 4, -1).abs().sum((0, 2)) > 0).all()


def test_gate_loss_reaches_the_gate_alone(pmoe, same_noise):
    """Another gate, hence another gate loss, changes no gradient outside the gate; and no loss but its own moves it."""
    args = pmoe.Args(num_experts=4, selection="draws")
    agent, batch = pmoe.Agent(3, 2, args), make_batch(pmoe, 32)
    agent.critic_optimizer.param_groups[0]["lr"] = 0.0  # the draws of the target, and so the critic, depend on the gate
    other = deepcopy(agent)
    other.actor.gate.weight.data.mul_(-3)
    one, actor, _ = gradients_of_update(pmoe, agent, batch, args, same_noise)
    two, *_ = gradients_of_update(pmoe, other, batch, args, same_noise)
    for name in one:
        assert torch.equal(one[name], two[name]) == (not name.startswith("gate")), name

    same_noise()
    torch.randn_like(batch.action)
    mean, log_std, w = actor(batch.obs)
    action, _ = pmoe.tanh_gaussian(mean, log_std)
    best = agent.critic(batch.obs, action).amin(0).argmax(1)
    F.mse_loss(w, F.one_hot(best, 4).float()).backward()
    torch.testing.assert_close(one["gate.weight"], actor.gate.weight.grad, rtol=1e-4, atol=1e-7)


class FixedPrimitives(nn.Module):
    """Two Gaussians in one dimension that never change, and a gate w = softmax(logits), the same in every state."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.log_std = torch.tensor(mean).view(1, 2, 1), torch.tensor(std).log().view(1, 2, 1)
        self.logits = nn.Parameter(torch.tensor([0.5, -0.5]))

    def forward(self, obs):
        n = len(obs)
        w = self.logits.softmax(0).expand(n, 2)
        return self.mean.expand(n, 2, 1), self.log_std.expand(n, 2, 1), w

    def sample(self, obs):
        return torch.zeros(len(obs), 1), torch.zeros(len(obs))


class ActionIsValue(nn.Module):
    """Q(s, a) = a, so that P(k is best) is known: P(u_1 > u_2) = Phi((mu_1 - mu_2) / sqrt(sigma_1^2 + sigma_2^2))."""

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, obs, action):
        return action.squeeze(-1).expand(2, *action.shape[:-1]) + self.zero


@pytest.fixture
def gate_problem(pmoe):
    """(function of N that makes one update with N samples and returns the gate's gradient, actor, true p)."""
    mean, std = [0.2, -0.3], [0.8, 0.6]
    args = pmoe.Args(num_experts=2, policy_lr=0.01, q_lr=1e-9, selection="draws")
    agent = pmoe.Agent(1, 1, args)
    agent.actor, agent.critic, agent.critic_target = FixedPrimitives(mean, std), ActionIsValue(), ActionIsValue()
    agent.critic_target.requires_grad_(False)
    agent.actor_optimizer = torch.optim.Adam(agent.actor.parameters(), lr=args.policy_lr)
    agent.critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.q_lr)
    p1 = 0.5 * (1 + math.erf((mean[0] - mean[1]) / math.sqrt(2 * (std[0] ** 2 + std[1] ** 2))))

    def step(n):
        batch = pmoe.Batch(torch.zeros(n, 1), torch.zeros(n, 1), torch.zeros(n), torch.ones(n), torch.zeros(n, 1))
        pmoe.update(agent, batch, args)
        return agent.actor.logits.grad.clone()

    return step, agent.actor, torch.tensor([p1, 1 - p1])


def test_theorem_3_1_the_gradient_is_unbiased_and_its_error_falls_as_one_over_root_n(gate_problem):
    """E mean_k (w_k - v_k)^2 = mean_k (w_k - p_k)^2 + const: the one-hot gradient estimates that of the true p."""
    step, actor, p = gate_problem
    torch.manual_seed(0)
    logits = actor.logits.data.clone()
    w = logits.clone().requires_grad_()
    (w.softmax(0) - p).square().mean().backward()
    errors = {}
    for n in (100, 10_000):
        squares = []
        for _ in range(60):
            actor.logits.data.copy_(logits)
            squares.append((step(n) - w.grad).square().sum())
        errors[n] = torch.stack(squares).mean().sqrt().item()
    assert errors[100] / errors[10_000] == pytest.approx(10, rel=0.35)
    assert errors[10_000] < 0.02 * w.grad.norm().item() + 0.003


def test_theorem_3_1_the_minimiser_is_the_frequency_of_being_best(gate_problem):
    step, actor, p = gate_problem
    torch.manual_seed(0)
    weights = []
    for i in range(900):
        step(512)
        if i >= 600:
            weights.append(actor.logits.detach().softmax(0))
    torch.testing.assert_close(torch.stack(weights).mean(0), p, rtol=0, atol=0.01)


def test_diagnostics(pmoe):
    args = pmoe.Args(num_experts=2)
    agent = pmoe.Agent(3, 2, args)
    for parameter in (agent.actor.head.weight, agent.actor.gate.weight):
        parameter.data.zero_()
    agent.actor.gate.bias.data[:] = torch.tensor([math.log(3.0), 0.0])
    agent.actor.head.bias.data[:] = torch.tensor([1.0, 0, -1.0, 0, 0, 0, 0, 0])  # means (1, 0) and (-1, 0), std 1
    found = {k: v.item() for k, v in pmoe.update(agent, make_batch(pmoe), args).items()}
    assert [found["moe/usage_0"], found["moe/usage_1"]] == pytest.approx([0.75, 0.25])
    assert found["moe/gate_entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert found["moe/expert_distance"] == pytest.approx(2 * math.tanh(1), rel=1e-5)
    assert found["policy/std"] == pytest.approx(1.0)

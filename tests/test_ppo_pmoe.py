"""The mathematics of PPO-PMOE: K = 1 is PPO, the mixture's likelihood, the gate's gradients, the entropy bonus."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_ppo import make_batch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal


def mixture(actor, mean, log_w):
    normal = Normal(mean, actor.log_std.exp().expand_as(mean))
    return MixtureSameFamily(Categorical(logits=log_w), Independent(normal, 1))


def make_actor(module, num_experts=5, spread=1.0):
    """An actor in float64 whose experts differ in mean, standard deviation and weight."""
    torch.manual_seed(0)
    actor = module.Actor(3, 2, module.Args(num_experts=num_experts)).double()
    actor.mean.b.data.normal_().mul_(spread)
    actor.log_std.data.normal_().mul_(0.5)
    actor.gate.w.data.normal_()
    return actor


# The density


def test_log_prob_against_mixture_same_family(ppo_pmoe):
    actor = make_actor(ppo_pmoe)
    obs, action = torch.randn(100, 3, dtype=torch.float64), 3 * torch.randn(100, 2, dtype=torch.float64)
    mean, log_w, _ = actor(obs)
    expected = mixture(actor, mean, log_w).log_prob(action)
    torch.testing.assert_close(actor.log_prob(mean, log_w, action), expected, rtol=1e-12, atol=1e-12)


def test_log_prob_where_a_plain_sum_underflows(ppo_pmoe):
    """100 standard deviations away every density is zero, and its logarithm and gradient are not."""
    actor = make_actor(ppo_pmoe)
    action = torch.full((10, 2), 100.0, dtype=torch.float64)
    mean, log_w, _ = actor(torch.randn(10, 3, dtype=torch.float64))
    normal = Normal(mean, actor.log_std.exp().expand_as(mean))
    assert (log_w.exp() * normal.log_prob(action[:, None]).sum(2).exp()).sum() == 0
    log_prob = actor.log_prob(mean, log_w, action)
    torch.testing.assert_close(log_prob, mixture(actor, mean, log_w).log_prob(action), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(log_prob.sum(), mean)
    assert gradient.isfinite().all() and gradient.abs().max() > 1


def test_samples_follow_the_mixture(ppo_pmoe):
    """Shares of the experts as the gate says, and each expert's mean and standard deviation."""
    actor = ppo_pmoe.Actor(1, 1, ppo_pmoe.Args(num_experts=3))
    actor.mean.w.data.zero_()
    actor.mean.b.data[:] = torch.tensor([-50.0, 0.0, 50.0])
    actor.log_std.data[:] = torch.tensor([[0.5], [1.0], [2.0]]).log()
    actor.gate.w.data.zero_()
    actor.gate.b.data[:] = torch.tensor([0.2, 0.3, 0.5]).log()
    torch.manual_seed(0)
    clipped, action = actor.sample(torch.zeros(30_000, 1))
    assert torch.equal(clipped, action.clamp(-1, 1))
    for centre, std, share in ((-50, 0.5, 0.2), (0, 1.0, 0.3), (50, 2.0, 0.5)):
        near = action[(action - centre).abs() < 20]
        assert len(near) / 30_000 == pytest.approx(share, abs=0.015)
        assert near.mean().item() == pytest.approx(centre, abs=0.05)
        assert near.std().item() == pytest.approx(std, rel=0.05)


def test_the_last_noise_alone_chooses_the_expert(ppo_pmoe):
    """Also at its extremes, where rounding may leave the cumulated weights below one."""
    actor = ppo_pmoe.Actor(3, 2, ppo_pmoe.Args(num_experts=7))
    noise = torch.zeros(3, 3)
    noise[:, 2] = torch.tensor([-40.0, 40.0, 0.0])
    obs = torch.randn(1, 3).expand(3, 3)
    mean, log_w, _ = actor(obs)
    middle = int((log_w[0].exp().cumsum(0) < 0.5).sum())
    _, action = actor.sample(obs, noise)
    assert torch.equal(action, mean[torch.arange(3), [0, 6, middle]])
    obs, noise = torch.randn(1000, 3), torch.tensor([[0.0, 0.0, 40.0]]).expand(1000, 3)
    mean, log_w, _ = actor(obs)
    assert (log_w.exp().cumsum(1)[:, -1] < 1).any()
    torch.testing.assert_close(actor.sample(obs, noise)[1], mean[:, 6], rtol=0, atol=0)


def test_every_dimension_has_noise_of_its_own(ppo_pmoe):
    actor = make_actor(ppo_pmoe)
    obs, noise = torch.randn(2, 50, 3, dtype=torch.float64)
    mean, log_w, _ = actor(obs)
    k = (log_w.exp().cumsum(1) < torch.special.ndtr(noise[:, 2:])).sum(1)
    expected = mean[torch.arange(50), k] + actor.log_std[k].exp() * noise[:, :2]
    torch.testing.assert_close(actor.sample(obs, noise)[1], expected)


def test_the_deterministic_action_is_the_mean_of_the_likeliest_expert(ppo_pmoe):
    actor = make_actor(ppo_pmoe)
    obs = torch.randn(50, 3, dtype=torch.float64)
    mean, log_w, _ = actor(obs)
    expected = torch.stack([mean[i, log_w[i].argmax()].clamp(-1, 1) for i in range(50)])
    assert torch.equal(actor.act(obs, "deterministic"), expected)


def test_the_gates_policy_takes_the_means_as_often_as_the_gate_says(ppo_pmoe):
    actor = ppo_pmoe.Actor(1, 1, ppo_pmoe.Args(num_experts=3))
    actor.mean.w.data.zero_()
    actor.mean.b.data[:] = torch.tensor([-5.0, 0.1, 0.5])
    actor.gate.w.data.zero_()
    actor.gate.b.data[:] = torch.tensor([0.2, 0.3, 0.5]).log()
    torch.manual_seed(0)
    action = actor.act(torch.zeros(30_000, 1), "gate")
    assert action.unique().tolist() == pytest.approx([-1.0, 0.1, 0.5])
    for value, share in ((-1.0, 0.2), (0.1, 0.3), (0.5, 0.5)):
        assert action.eq(value).float().mean().item() == pytest.approx(share, abs=0.015)


# The update


@pytest.mark.parametrize("gate_gradient", ["frequency", "ppo", "both", "apart"])
@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
def test_one_expert_is_ppo(ppo, ppo_pmoe, gate_gradient, ent_coef, monkeypatch):
    """The same losses and ratios, and after several updates the same weights.

    The entropy is exact there and sampled here; a draw one standard deviation from the mean has the exact gradient.
    """
    args = ppo.Args(ent_coef=ent_coef, learning_rate=1e-2)
    pmoe_args = ppo_pmoe.Args(ent_coef=ent_coef, learning_rate=1e-2, num_experts=1, gate_gradient=gate_gradient)
    torch.manual_seed(0)
    one, other = ppo.Agent(3, 2, args), ppo_pmoe.Agent(3, 2, pmoe_args)
    state = one.state_dict()
    state["actor.log_std"] = state["actor.log_std"][None]
    assert all(key.startswith(("q.", "actor.gate.")) for key in other.load_state_dict(state, strict=False).missing_keys)
    batches = [make_batch(ppo, seed=step) for step in range(4)]
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None: torch.ones(shape))
    for batch in batches:
        expected, metrics = ppo.update(one, batch, args), ppo_pmoe.update(other, batch, pmoe_args)
        assert metrics["losses/gate"] == 0 and metrics["moe/wins_0"] == 1
        assert metrics["moe/q_spread"] == 0
        for key, value in expected.items():
            torch.testing.assert_close(metrics[key], value, rtol=1e-5, atol=1e-5, msg=key)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key].view_as(value), value, rtol=1e-4, atol=1e-5, msg=key)


def gradients(module, agent, batch, args, monkeypatch):
    """Name -> gradient of the actor's loss in one update, whose draws are fixed; Q keeps its weights."""
    losses = []
    monkeypatch.setattr(agent.optimizers[1], "descend", lambda loss: None)
    monkeypatch.setattr(agent.optimizers[0], "descend", losses.append)
    torch.manual_seed(1)
    metrics = module.update(agent, batch, args)
    names, weights = zip(*agent.actor.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(losses[0], weights), strict=True)), metrics


@pytest.mark.parametrize("gate_gradient", ["frequency", "ppo", "both"])
@pytest.mark.parametrize("selection", ["draws", "means"])
def test_gradients_equal_the_textbook(ppo_pmoe, gate_gradient, selection, monkeypatch):
    args = ppo_pmoe.Args(num_experts=4, gate_gradient=gate_gradient, selection=selection)
    torch.manual_seed(0)
    agent, batch = ppo_pmoe.Agent(3, 2, args), make_batch(ppo_pmoe)
    agent.actor.mean.b.data.normal_()
    fast, metrics = gradients(ppo_pmoe, agent, batch, args, monkeypatch)

    mean, log_w, value = agent.actor(batch.obs)
    density = mixture(agent.actor, mean, log_w.detach() if gate_gradient == "frequency" else log_w)
    ratio = (density.log_prob(batch.action) - batch.log_prob).exp()
    loss = -torch.min(ratio * batch.advantage, ratio.clamp(0.8, 1.2) * batch.advantage).mean()
    loss = loss + 0.5 * (value - batch.target).square().mean()
    torch.manual_seed(1)
    draws = mean + agent.actor.log_std.exp() * torch.randn(64, 4, 2) if selection == "draws" else mean
    q = torch.stack([agent.q(batch.obs, draws[:, k]) for k in range(4)], 1)
    best = F.one_hot(q.argmax(1), 4).float()
    if gate_gradient != "ppo":
        loss = loss + ((log_w.exp() - best) ** 2).sum() / (64 * 4)
    loss.backward()
    torch.testing.assert_close(torch.stack([metrics[f"moe/wins_{k}"] for k in range(4)]), best.mean(0))
    torch.testing.assert_close(metrics["moe/q_spread"], ((q - q.mean(1, keepdim=True)) ** 2).mean(1).sqrt().mean())
    for name, p in agent.actor.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_frequency_leaves_the_gate_to_its_own_loss(ppo_pmoe, monkeypatch):
    """Other advantages change every gradient but the gate's; with `both` they change the gate's as well."""
    for gate_gradient in ("frequency", "both"):
        args = ppo_pmoe.Args(num_experts=4, gate_gradient=gate_gradient)
        torch.manual_seed(0)
        agent, batch = ppo_pmoe.Agent(3, 2, args), make_batch(ppo_pmoe)
        one, _ = gradients(ppo_pmoe, agent, batch, args, monkeypatch)
        two, _ = gradients(ppo_pmoe, agent, batch._replace(advantage=batch.advantage.roll(1)), args, monkeypatch)
        for name in ("gate.w", "gate.b"):
            assert torch.equal(one[name], two[name]) == (gate_gradient == "frequency")
        assert not torch.equal(one["mean.w"], two["mean.w"])


def test_frequency_leaves_the_gate_out_of_the_entropy_bonus(ppo_pmoe, monkeypatch):
    for gate_gradient in ("frequency", "both"):
        found = []
        for ent_coef in (0.0, 1.0):
            args = ppo_pmoe.Args(num_experts=4, gate_gradient=gate_gradient, ent_coef=ent_coef)
            torch.manual_seed(0)
            agent, batch = ppo_pmoe.Agent(3, 2, args), make_batch(ppo_pmoe)
            agent.actor.mean.b.data.normal_()
            found.append(gradients(ppo_pmoe, agent, batch, args, monkeypatch)[0])
        for name in ("gate.w", "gate.b"):
            assert torch.equal(found[0][name], found[1][name]) == (gate_gradient == "frequency")
        assert not torch.equal(found[0]["log_std"], found[1]["log_std"])


def test_apart_the_frequencies_have_an_adam_of_their_own(ppo_pmoe):
    """One step of all as without the frequencies, then one of the gate on their loss, summed over K."""
    agents = {}
    for gate_gradient in ("ppo", "apart"):
        args = ppo_pmoe.Args(num_experts=4, gate_gradient=gate_gradient, learning_rate=1e-2)
        torch.manual_seed(0)
        agents[gate_gradient], batch = ppo_pmoe.Agent(3, 2, args), make_batch(ppo_pmoe)
        agents[gate_gradient].actor.mean.b.data.normal_()
        before = copy.deepcopy(agents[gate_gradient].actor)
        torch.manual_seed(1)
        ppo_pmoe.update(agents[gate_gradient], batch, args)
    expected, q = agents["ppo"].actor, agents["ppo"].q
    torch.manual_seed(1)
    draws = before(batch.obs)[0] + before.log_std.exp() * torch.randn(64, 4, 2)
    wins = F.one_hot(q(batch.obs, draws).argmax(1), 4)
    optimizer = torch.optim.Adam(expected.gate.parameters(), lr=1e-2, eps=1e-5)
    (expected.gate(batch.obs).softmax(1) - wins).square().sum(1).mean().backward()
    optimizer.step()
    for (name, one), other in zip(expected.named_parameters(), agents["apart"].actor.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


def test_gate_learns_the_frequency_of_winning(ppo_pmoe, monkeypatch):
    """Theorem 3.1 with Q(s, a) = a: w tends to P(k is best), which is Phi(0.5 / 1) for these two experts."""
    args = ppo_pmoe.Args(num_experts=2, gate_gradient="frequency", learning_rate=0.02, vf_coef=1e-9)
    torch.manual_seed(0)
    agent = ppo_pmoe.Agent(1, 1, args)
    actor = agent.actor
    actor.mean.w.data.zero_()
    actor.mean.b.data[:] = torch.tensor([0.2, -0.3])
    actor.log_std.data[:] = torch.tensor([[0.8], [0.6]]).log()  # the difference has standard deviation 1
    monkeypatch.setattr(agent.q, "forward", lambda obs, action: action.sum(-1))
    monkeypatch.setattr(agent.optimizers[1], "descend", lambda loss: None)
    zero = torch.zeros(256)
    batch = ppo_pmoe.Batch(torch.zeros(256, 1), torch.zeros(256, 1), zero, zero, zero)
    for i in range(200):
        agent.optimizers[0].param_groups[0]["lr"] = 0.02 * (1 - i / 200)
        ppo_pmoe.update(agent, batch, args)
    expected = 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))
    assert actor(torch.zeros(1, 1))[1].exp()[0, 0].item() == pytest.approx(expected, abs=0.02)


def test_two_processes_draw_for_the_gate_what_one_draws(ppo_pmoe, monkeypatch):
    args = ppo_pmoe.Args(num_experts=4)
    torch.manual_seed(0)
    agent, batch = ppo_pmoe.Agent(3, 2, args), make_batch(ppo_pmoe)
    for optimizer in agent.optimizers:
        monkeypatch.setattr(optimizer, "descend", lambda loss: None)

    def wins(first, last):
        torch.manual_seed(1)
        metrics = ppo_pmoe.update(agent, ppo_pmoe.Batch(*(x[first:last] for x in batch)), args)
        return torch.stack([metrics[f"moe/wins_{k}"] for k in range(4)])

    one, parts = wins(0, 64), []
    monkeypatch.setattr(ppo_pmoe, "WORLD", 2)
    for rank in range(2):
        monkeypatch.setattr(ppo_pmoe, "RANK", rank)
        parts.append(wins(32 * rank, 32 * rank + 32))
    torch.testing.assert_close(sum(parts) / 2, one)
    assert not torch.equal(*parts)


def test_q_learns_the_return_of_the_action_taken(ppo_pmoe):
    torch.manual_seed(0)
    args = ppo_pmoe.Args(learning_rate=3e-3)
    agent, batch = ppo_pmoe.Agent(3, 2, args), make_batch(ppo_pmoe, 256)
    target = batch.obs.sum(1) + batch.action.clamp(-1, 1).prod(1)  # the environment clips
    for _ in range(200):
        ppo_pmoe.update(agent, batch._replace(target=target, advantage=torch.randn(256)), args)
    q = agent.q(batch.obs, batch.action)
    assert (q - target).square().mean() < 0.1 * target.var()
    assert torch.equal(q, agent.q(batch.obs, batch.action.clamp(-1, 1))) and batch.action.abs().max() > 1
    of_three = agent.q(batch.obs, batch.action[:, None] * torch.tensor([1.0, 0.5, 0.0])[:, None])
    torch.testing.assert_close(of_three[:, 0], q)
    torch.testing.assert_close(of_three[:, 1], agent.q(batch.obs, batch.action / 2))


def test_q_has_a_clipping_of_its_own(ppo_pmoe):
    """A huge error of Q leaves the policy's gradient as it is."""
    args, gradients = ppo_pmoe.Args(max_grad_norm=0.1, learning_rate=1e-12), []
    for scale in (1.0, 1e4):  # it names the same experts
        torch.manual_seed(0)
        agent, batch = ppo_pmoe.Agent(3, 2, args), make_batch(ppo_pmoe)
        agent.q.layers[-1].w.data *= scale
        ppo_pmoe.update(agent, batch, args)
        policy, q = (optimizer.state[optimizer.vector]["exp_avg"] / 0.1 for optimizer in agent.optimizers)
        assert q.norm().item() == pytest.approx(0.1, rel=1e-3)  # after one step the first moment is 0.1 times it
        gradients.append(policy)
    torch.testing.assert_close(*gradients)


def test_entropy_bonus_has_the_gradient_of_the_mixtures_entropy(ppo_pmoe, monkeypatch):
    """In one dimension, against the integral -int p log p; averaged over a large batch of equal states."""
    args = ppo_pmoe.Args(num_experts=2, ent_coef=1.0, vf_coef=1e-9)
    torch.manual_seed(0)
    agent = ppo_pmoe.Agent(1, 1, args)
    actor = agent.actor
    actor.mean.w.data.zero_()
    actor.mean.b.data[:] = torch.tensor([0.8, -0.5])
    actor.log_std.data[:] = torch.tensor([[-0.3], [0.2]])
    actor.gate.b.data[:] = torch.tensor([0.4, -0.4])
    zero = torch.zeros(100_000)
    batch = ppo_pmoe.Batch(zero[:, None], zero[:, None], zero, zero, zero)
    estimated, _ = gradients(ppo_pmoe, agent, batch, args, monkeypatch)
    args.ent_coef = 0.0
    without, _ = gradients(ppo_pmoe, agent, batch, args, monkeypatch)

    mean, log_w, _ = actor(torch.zeros(1, 1))
    grid = torch.linspace(-12, 12, 20_001)[:, None]
    log_p = actor.log_prob(mean, log_w, grid)
    entropy = -(log_p.exp() * log_p).sum() * (24 / 20_000)
    for name in ("mean.b", "log_std", "gate.b"):
        (exact,) = torch.autograd.grad(entropy, actor.get_parameter(name), retain_graph=True)
        torch.testing.assert_close(without[name] - estimated[name], exact, rtol=0, atol=0.01, msg=name)


def test_equal_experts_are_one(ppo_pmoe):
    torch.manual_seed(0)
    actor = ppo_pmoe.Actor(3, 2, ppo_pmoe.Args(num_experts=3))
    actor.mean.w.data = actor.mean.w.data[:, :2].repeat(1, 3)
    batch = make_batch(ppo_pmoe)
    mean, log_w, _ = actor(batch.obs)
    expected = Normal(mean[:, 0], actor.log_std[0].exp()).log_prob(batch.action).sum(1)
    torch.testing.assert_close(actor.log_prob(mean, log_w, batch.action), expected)


def test_what_an_update_logs_by_hand(ppo_pmoe, monkeypatch):
    args = ppo_pmoe.Args(num_experts=3, selection="means")
    torch.manual_seed(0)
    agent, batch = ppo_pmoe.Agent(3, 2, args), make_batch(ppo_pmoe)
    agent.actor.mean.b.data.normal_()
    for optimizer in agent.optimizers:
        monkeypatch.setattr(optimizer, "descend", lambda loss: None)
    metrics = ppo_pmoe.update(agent, batch, args)
    mean, log_w, _ = agent.actor(batch.obs)
    wins = F.one_hot(agent.q(batch.obs, mean).argmax(1), 3)
    expected = {
        "policy/entropy": -agent.actor.log_prob(mean, log_w, batch.action).mean(),
        "losses/q": (agent.q(batch.obs, batch.action) - batch.target).square().mean(),
        "losses/gate": (log_w.exp() - wins).square().mean(),
    }
    for key, value in expected.items():
        torch.testing.assert_close(metrics[key], value.detach(), msg=key)


def test_diagnostics_by_hand(ppo_pmoe):
    actor = ppo_pmoe.Agent(3, 2, ppo_pmoe.Args(num_experts=2)).actor
    actor.mean.w.data.zero_()
    actor.mean.b.data = torch.tensor([0.0, 0.5, 3.0, 0.5])  # clipped to (0, 0.5) and (1, 0.5)
    actor.gate.w.data.zero_()
    actor.gate.b.data = torch.tensor([math.log(3.0), 0.0])
    actor.log_std.data[0] = math.log(3.0)
    found = {k: v.tolist() for k, v in actor.diagnostics(torch.randn(9, 3)).items()}
    assert [found["moe/usage_0"], found["moe/usage_1"]] == pytest.approx([0.75, 0.25])
    assert found["moe/gate_entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert found["moe/expert_distance"] == pytest.approx(1.0) and found["policy/std"] == pytest.approx(2.0)


@pytest.mark.parametrize("number", [1, 64])
def test_experts_that_are_alike_have_no_distance(ppo_pmoe, number):
    torch.manual_seed(0)
    actor = ppo_pmoe.Agent(3, 17, ppo_pmoe.Args(num_experts=number)).actor
    actor.mean.w.data = torch.randn(64, 17).repeat(1, number)
    assert actor.diagnostics(torch.randn(50, 3))["moe/expert_distance"] == 0

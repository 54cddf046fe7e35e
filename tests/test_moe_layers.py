"""The mathematics of the mixture-of-experts layers, of what is measured on them, and of the two multi-task updates."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import check_shuffling

ARCHITECTURES = ("middle", "final", "all", "big")
NARROW = ("CartPole-v1",)  # tasks are only counted here


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def sac_args(module, architecture="big", tasks=3, **changes):
    return module.Args(**{"tasks": NARROW * tasks, "actor_moe": architecture, "critic_moe": architecture} | changes)


def ppo_args(module, architecture="big", **changes):
    """Pictures of six channels, all actions."""
    mine = {"actor_moe": architecture, "critic_moe": architecture, "channels": "shared", "actions": "all"}
    return module.Args(**mine | changes)


def network(module, architecture, **changes):
    """A network of either script with 4 outputs, and 9 inputs for it."""
    if module.SCRIPT.startswith("sac"):
        return module.Network(5, 4, architecture, sac_args(module, **changes), hidden=12), torch.randn(9, 5)
    return module.Network(6, 4, 1.0, architecture, ppo_args(module, **changes)), (
        torch.rand(9, 10, 10, 6) < 0.2
    ).float()


def mixtures(network_):
    return [m for m in network_.modules() if hasattr(m, "experts")]


def tokens(module):
    return {} if module.SCRIPT.startswith("sac") else {"tokens": "persamp"}


@pytest.fixture(params=["sac_moe", "ppo_moe"])
def either(request):
    return request.getfixturevalue(request.param)


def cell_mixture(module, size, hidden, **changes):
    """A mixture of tokens (B, m, size), and a network in which it is the middle layer, of which measure() sees more."""
    args = ppo_args(module, "middle", **{"num_experts": 4} | changes)
    experts = [nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, size)) for _ in range(4)]
    mixture = module.CellMixture(experts, size, args, args.slots)
    net = module.Network(6, 4, 1.0, "middle", args)
    net.layers = nn.ModuleList([nn.Sequential(nn.ReLU()), mixture, nn.Flatten()])  # tokens are positive
    return mixture, net


# Soft MoE


@pytest.mark.parametrize("slots", [1, 3])
def test_soft_moe_equals_a_loop_over_experts_and_slots(ppo_moe, slots):
    moe, net = cell_mixture(ppo_moe, 5, 7, slots=slots)
    net.double()
    x = torch.rand(3, 6, 5, dtype=torch.float64)
    result = moe(x, None)
    ((neurons, routers, _),) = ppo_moe.look_inside(net, (x, torch.zeros(3)))
    for b in range(3):
        logits = [[(x[b, j] @ moe.phi[:, s]).item() for s in range(4 * slots)] for j in range(6)]
        y, usage, mine = torch.zeros(6, 5, dtype=torch.float64), [0.0] * 4, []
        for s in range(4 * slots):
            expert = moe.experts[s // slots]
            total = sum(math.exp(logits[j][s]) for j in range(6))
            slot = sum(math.exp(logits[j][s]) / total * x[b, j] for j in range(6))
            h = torch.relu(expert[0].weight @ slot + expert[0].bias)
            out = expert[2].weight @ h + expert[2].bias
            for j in range(6):
                share = math.exp(logits[j][s]) / sum(math.exp(logit) for logit in logits[j])
                y[j] += share * out
                usage[s // slots] += share / 6
            mine.append(h)
        torch.testing.assert_close(result[b], y, rtol=1e-10, atol=1e-10)
        mine = torch.stack(mine).view(4, slots, 7).transpose(0, 1).flatten(1)  # of each slot its experts' neurons
        torch.testing.assert_close(neurons["layer2"][b * slots : (b + 1) * slots], mine)
        assert routers["router2"][b].tolist() == pytest.approx(usage)


@pytest.mark.parametrize(
    "router, architecture, tokens",
    [
        ("softmoe", "big", "persamp"),
        *(
            (r, a, t)
            for r in ("topk", "hardcoded")
            for a in ("middle", "big")
            for t in ("persamp", "perconv")[: 1 + (a == "middle")]
        ),
    ],
)
def test_a_gradient_repeats_with_two_threads(ppo_moe, router, architecture, tokens):
    """A sum that threads share without an order is another one each time, and so is every run that has it."""
    args = ppo_args(ppo_moe, architecture, router=router, num_experts=3, tokens=tokens)
    agent, threads = ppo_moe.Agent(args), torch.get_num_threads()
    size = 1008 if tokens == "persamp" else 126  # the default minibatch; an eighth of its cells
    task, action = torch.arange(size) % 3, torch.randint(0, 6, (size,))
    batch = ppo_moe.Batch(torch.rand(size, 10, 10, 6) < 0.2, task, action, *torch.randn(3, size))
    torch.set_num_threads(2)
    try:
        first, *others = [ppo_moe.gradient(sum(ppo_moe.losses_of(agent, batch, args)[:2]), agent) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("router, top_k", [("topk", 1), ("topk", 2), ("hardcoded", 1)])
def test_chosen_experts_of_cells_equal_a_loop_over_cells(ppo_moe, router, top_k):
    """Several tasks in one batch; what is measured; the load-balancing loss of all cells."""
    moe, net = cell_mixture(ppo_moe, 8, 7, router=router, top_k=top_k)
    x, task = torch.rand(5, 6, 8), torch.tensor([0, 2, 1, 0, 2])
    result = moe(x, task)
    ((measured, routers, _),) = ppo_moe.look_inside(net, (x, task))
    neurons, counts, shares = torch.zeros(30, 4, 7), torch.zeros(4), torch.zeros(4)
    for b in range(5):
        usage = torch.zeros(4)
        for j in range(6):
            y = torch.zeros(8)
            if router == "hardcoded":
                weights = {int(task[b]): 1.0}
            else:
                softmax = (x[b, j] @ moe.phi).softmax(0)
                weights = {i: softmax[i] for i in sorted(range(4), key=lambda i: -softmax[i])[:top_k]}
                shares += softmax / 30
            for i, w in weights.items():
                up, _, down = moe.experts[i]
                h = (up.weight @ x[b, j] + up.bias).relu()
                y += w * (down.weight @ h + down.bias)
                neurons[6 * b + j, i] = h
                usage[i] += w / 6
                counts[i] += 1 / (30 * top_k)
            torch.testing.assert_close(result[b, j], y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(routers["router2"][b], usage)
    torch.testing.assert_close(measured["layer2"], neurons.flatten(1), rtol=1e-4, atol=1e-5)
    if router == "topk":
        torch.testing.assert_close(moe.balance, 4 * (counts * shares).sum())


@pytest.mark.parametrize("architecture", ["middle", "all"])
def test_load_balance_of_every_layer_is_part_of_the_loss(ppo_moe, architecture):
    args = ppo_args(ppo_moe, architecture, router="topk", num_experts=4, load_balance=2.0)
    agent, zeros = ppo_moe.Agent(args), torch.zeros(9)
    batch = ppo_moe.Batch(torch.rand(9, 10, 10, 6) < 0.2, zeros.long(), zeros.long(), zeros, torch.randn(9), zeros)
    with_it = ppo_moe.losses_of(agent, batch, args)
    without = ppo_moe.losses_of(agent, batch, ppo_moe.dataclasses.replace(args, load_balance=0.0))
    for i, net in enumerate((agent.actor, agent.critic)):
        balance = [moe.balance for moe in mixtures(net)]
        assert len(balance) == (1 if architecture == "middle" else 3) and min(balance) > 0.9
        torch.testing.assert_close(with_it[i] - without[i], 2 * sum(balance))


def test_soft_moe_of_one_token_is_the_dense_gate(ppo_moe):
    moe, _ = cell_mixture(ppo_moe, 5, 7)
    x = torch.randn(3, 1, 5)
    gate = (x[:, 0] @ moe.phi).softmax(1)
    dense = sum(gate[:, i, None] * moe.experts[i](x[:, 0]) for i in range(4))
    torch.testing.assert_close(moe(x, None)[:, 0], dense)


def stacked(parts):
    """Weights (E, h, ...) and biases (E, h) of the linear maps in `parts`."""
    linear = [next(m for m in part.modules() if hasattr(m, "weight")) for part in parts]
    return torch.stack([m.weight for m in linear]), torch.stack([m.bias for m in linear])


def plain(weight, bias, x):
    """x (B, d), or pictures, or either for each expert (E, B, ..) -> (E, B, h)."""
    if weight.ndim == 5:  # of the 3x3 convolution: (E, 16, C, 3, 3)
        patches = x.unfold(1, 3, 1).unfold(2, 3, 1)  # (B, 8, 8, C, 3, 3)
        return (torch.einsum("eocij,bhwcij->ebhwo", weight, patches) + bias[:, None, None, None]).flatten(2)
    return torch.einsum("ehd,ebd->ebh", weight, x.expand(len(weight), *x.shape[-2:])) + bias[:, None]


def routing(mixture, x, task):
    """w (B, n), from the layer's own input."""
    if mixture.router == "hardcoded":
        return torch.eye(len(mixture.experts))[task]
    w = torch.einsum("bd,dn->bn", x.flatten(1), mixture.phi).softmax(1)
    return w * (w >= w.sort(1).values[:, -mixture.top_k, None]) if mixture.router == "topk" else w


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("router", ["softmoe", "topk", "hardcoded"])
@pytest.mark.parametrize("match_params", [False, True])
def test_layers_equal_an_einsum_over_all_experts(either, architecture, router, match_params):
    """y = sum_i w_i f_i, where every expert computes every sample; so is what measure() sees, and the gradient."""
    changes = {"num_experts": 3, "top_k": 2, "match_params": match_params and architecture != "final"}
    net, x = network(either, architecture, router=router, **changes, **tokens(either))
    task = torch.arange(9) % 3
    result = net(x, task)
    ((neurons, routers, features),) = either.look_inside(net, (x, task))
    big, h, routed = architecture == "big", x, {}
    for k in range(3):
        mixture = net.layers[0 if big else k]
        mixed = hasattr(mixture, "experts")
        parts = [part[k] if big else part for part in (mixture.experts if mixed else [mixture])]
        if mixed and not (big and k):
            w = routed[f"router{k + 1}"] = routing(mixture, h, task)
        if k == 2:
            expected = torch.einsum("bn,nbh->bnh", w, h).flatten(1) if big else h
            torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
        h = plain(*stacked(parts), h)  # (E, B, h)
        if k < 2:
            h = h.relu()
            seen = h if not mixed or router == "softmoe" else h * (w.T > 0)[..., None]
            seen = seen.unflatten(2, (-1, seen.shape[2] // (64 if x.ndim == 4 and k == 0 else 1)))  # cells
            torch.testing.assert_close(neurons[f"layer{k + 1}"], seen.permute(1, 2, 0, 3).flatten(0, 1).flatten(1))
        if mixed and (k == 2 or not big):
            h = torch.einsum("bn,nbh->bh", w, h)
        elif not mixed:
            h = h[0]
    assert routers.keys() == routed.keys()
    for key, w in routed.items():
        torch.testing.assert_close(routers[key], w)
    torch.testing.assert_close(result, h, rtol=1e-4, atol=1e-5)
    weights, parameters = torch.randn(result.shape), list(net.parameters())
    gradients = torch.autograd.grad((weights * result).sum(), parameters)
    for mine, expected in zip(gradients, torch.autograd.grad((weights * h).sum(), parameters), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("router, top_k, rows", [("hardcoded", 1, 9), ("topk", 1, 9), ("topk", 2, 18)])
def test_an_expert_computes_only_what_is_its_own(either, router, top_k, rows):
    """Sparse layers compute B k rows, not B n."""
    net, x = network(either, "big", router=router, num_experts=3, top_k=top_k)
    seen = []
    for expert in net.layers[0].experts:
        expert.register_forward_hook(lambda _, x, y: seen.append((len(x[0]), len(y))))
    net(x, torch.arange(9) % 2)
    assert len(seen) == 3 and [sum(column) for column in zip(*seen, strict=True)] == [rows, rows]


# Routers


def mixture(module, inputs, **changes):
    """One of 4 experts that do nothing."""
    args = module.Args(**{"num_experts": 4, "router": "topk"} | changes)
    return module.Mixture([nn.Identity() for _ in range(4)], inputs, args)


def test_topk_keeps_the_k_largest_as_they_are(either):
    moe = mixture(either, 3, top_k=2)
    moe.phi.data = torch.tensor([[1.0, 0, 2, -1], [0, 3, 0, 1], [0, 0, 0, 0]])
    x = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    e = math.e
    first, second = e + 1 + e**2 + 1 / e, 1 + e**3 + 1 + e
    expected = [[e / first, 0, e**2 / first, 0], [0, e**3 / second, 0, e / second]]
    torch.testing.assert_close(moe.weights(x, None), torch.tensor(expected))


def test_topk_drops_nothing_when_all_samples_want_one_expert(ppo_moe):
    moe, _ = cell_mixture(ppo_moe, 5, 8, router="topk")
    moe.phi.data.zero_()
    moe.phi.data[0] = torch.tensor([0.0, 0.0, 5.0, 0.0])  # all tokens have x_0 > 0
    x = torch.rand(50, 64, 5) + 0.1
    weight = (x @ moe.phi).softmax(-1)[..., 2, None]
    torch.testing.assert_close(moe(x, torch.zeros(50, dtype=torch.long)), weight * moe.experts[2](x))


def test_load_balance_is_one_if_equal_and_n_if_all_go_to_one(either):
    moe = mixture(either, 4)
    moe.phi.data = 50 * torch.eye(4)
    moe.weights(torch.eye(4), None)
    assert moe.balance.item() == pytest.approx(1.0)
    moe.weights(torch.eye(4)[:1].expand(7, 4), None)
    assert moe.balance.item() == pytest.approx(4.0)


def test_load_balance_moves_the_router_from_the_expert_that_all_want(either):
    moe = mixture(either, 3)
    moe.phi.data = torch.tensor([1.0, 0, 0, 0]).expand(3, 4).clone()
    moe.weights(torch.ones(7, 3), None)
    (gradient,) = torch.autograd.grad(moe.balance, moe.phi)
    w = moe.phi.data.sum(0).softmax(0)  # balance is 4 w_0
    torch.testing.assert_close(gradient, (4 * w[0] * (torch.eye(4)[0] - w)).expand(3, 4))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("per_conv", [False, True])
def test_hardcoded_routing_sends_a_gradient_to_the_tasks_expert_only(either, architecture, per_conv):
    changes = {"tokens": "perconv" if per_conv else "persamp"} if either.SCRIPT.startswith("ppo") else {}
    net, x = network(either, architecture, router="hardcoded", num_experts=3, **changes)
    net(x, torch.ones(9, dtype=torch.long)).square().sum().backward()
    touched = 0
    for moe in mixtures(net):
        for i, expert in enumerate(moe.experts):
            for parameter in expert.parameters():
                assert (parameter.grad.abs().sum() > 0) == (i == 1)
                touched += i == 1
    assert (
        touched == {"middle": 2 + 2 * (per_conv and "tokens" in changes), "final": 2, "all": 6, "big": 6}[architecture]
    )


def test_the_losses_of_a_task_have_a_gradient_for_its_experts_only(ppo_moe):
    args = ppo_args(ppo_moe, "big", router="hardcoded", num_experts=3)
    agent, ones = ppo_moe.Agent(args), torch.ones(12)
    batch = ppo_moe.Batch(torch.rand(12, 10, 10, 6) < 0.2, ones.long(), ones.long(), -ones, torch.randn(12), ones)
    sum(ppo_moe.losses_of(agent, batch, args)[:2]).backward()
    for moe in mixtures(agent):
        for i, expert in enumerate(moe.experts):
            assert all((parameter.grad.abs().sum() > 0) == (i == 1) for parameter in expert.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("router", ["softmoe", "topk", "hardcoded"])
def test_one_expert_is_the_baseline(either, architecture, router):
    changes = {"num_experts": 1, "router": router, **tokens(either)}
    net, x = network(either, architecture, **changes)
    baseline, _ = network(either, "baseline", **changes)
    mine = [p for key, p in net.named_parameters() if "phi" not in key]
    for p, q in zip(mine, baseline.parameters(), strict=True):
        p.data.copy_(q)
    task = torch.zeros(9, dtype=torch.long)
    torch.testing.assert_close(net(x, task), baseline(x, task))


def test_hardcoded_all_is_hardcoded_big(either):
    """A network for each task, so runs of the two differ by chance only; with a learned router they are not alike."""
    for router in ("hardcoded", "softmoe"):
        big, x = network(either, "big", router=router, num_experts=3)
        layered, _ = network(either, "all", router=router, num_experts=3)
        for k, mixture in enumerate(layered.layers):
            for mine, theirs in zip(mixture.experts, big.layers[0].experts, strict=True):
                mine.load_state_dict(theirs[k].state_dict())
        task = torch.arange(9) % 3
        assert torch.allclose(layered(x, task), big(x, task), atol=1e-6) == (router == "hardcoded")


# What is measured


def test_dormant_neurons_by_hand(either):
    x = torch.tensor([[1.0, 0, -0.02, 3, 0.05], [1, 0, 0.02, -3, 0.05]])  # sizes 1, 0, 0.02, 3, 0.05; mean 0.814
    assert either.dormant(x, 0.0).tolist() == [False, True, False, False, False]
    for scale in (1, 100):  # neither the largest nor an absolute size counts
        assert either.dormant(scale * x, 0.025).tolist() == [False, True, True, False, False]
    assert either.dormant(torch.zeros(3, 2), 0.0).tolist() == [True, True]


def test_effective_rank_by_hand(either):
    q, _ = torch.linalg.qr(torch.randn(20, 5))
    for values, rank in (([1, 1, 1, 1, 1], 5), ([98.5, 1, 0.4, 0.1, 0], 2), ([99.5, 0.2, 0.2, 0.1, 0], 1)):
        assert either.effective_rank(q * torch.tensor(values)) == rank
    assert either.effective_rank(torch.zeros(20, 5)) == 0


def test_entropy_of_weights_by_hand(either):
    w = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 0.3, 0.1, 0.0]])  # the second of top-2, which do not sum to 1
    expected = (math.log(4) - 0.75 * math.log(0.75) - 0.25 * math.log(0.25)) / 2
    assert either.entropy_of(w).item() == pytest.approx(expected, rel=1e-5)


def test_cosines_by_hand(either):
    table = either.cosines([torch.tensor(v) for v in ([3.0, 0], [0.0, 2], [-1.0, -1], [0.0, 0])])
    c = math.sqrt(0.5)
    expected = [[1, 0, -c, 0], [0, 1, -c, 0], [-c, -c, 1, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float32))


def value_of(rows, **wanted):
    (row,) = [row for row in rows if all(row[k] == v for k, v in wanted.items())]
    return row["value"]


def fill(module, args, steps=40):
    agent = module.Agent(3, 2, args)
    buffers = [module.ReplayBuffer(100, 3, 2, "cpu") for _ in args.tasks]
    rng = np.random.default_rng(0)
    for buffer in buffers:
        for _ in range(steps):
            obs, next_obs = rng.normal(size=(2, 3)).astype(np.float32)
            buffer.add(obs, rng.uniform(-1, 1, 2).astype(np.float32), rng.normal(), False, next_obs)
    return agent, buffers


def parts_of(buffers) -> dict:
    """What a run has for measure()."""
    return {f"buffer_{task}": buffer for task, buffer in enumerate(buffers)}


def test_measure_of_sac_on_made_networks(sac_moe):
    args = sac_args(sac_moe, "middle", tasks=2, router="hardcoded", num_experts=4)
    agent, buffers = fill(sac_moe, args)
    parts = parts_of(buffers)
    first, second, _ = agent.actor.network.layers
    first[0].bias.data[:64] = -1e6  # a quarter of the first layer is dead
    for expert in second.experts:  # and the chosen experts of the second layer are alive throughout
        expert[0].weight.data.abs_()
        expert[0].bias.data.fill_(1.0)
    before = torch.get_rng_state()
    rows = sac_moe.measure(agent, args, 7, parts)
    assert torch.equal(before, torch.get_rng_state()) and {row["global_step"] for row in rows} == {7}
    all_tasks = {"network": "actor", "task": ""}
    assert value_of(rows, metric="dormant_0.0", item="layer1", **all_tasks) == pytest.approx(0.25, abs=0.02)
    assert value_of(rows, metric="dormant_0.025", item="layer2", **all_tasks) == pytest.approx(0.5, abs=1e-6)
    assert value_of(rows, network="actor", metric="dormant_0.025", item="layer2", task=1) == 0.75
    total = value_of(rows, metric="dormant_0.0", item="total", **all_tasks)
    assert total == pytest.approx((0.25 * 256 + 0.5 * 1024) / 1280, abs=0.01)
    assert value_of(rows, network="actor", metric="router2", task=1, item=1) == 1.0
    assert value_of(rows, network="critic", metric="router2", task=0, item=1) == 0.0
    assert value_of(rows, network="critic", metric="entropy2", task=0) == 0.0
    counts = {item: value_of(rows, network="critic", metric="parameters", item=item) for item in ("total", "active")}
    assert counts == sac_moe.count_parameters(agent.critic, args)
    for network_name in ("actor", "critic"):
        assert -1 <= value_of(rows, network=network_name, metric="cosine", task=0, item=1) <= 1


def test_measure_of_sac_has_the_routers_of_one_critic(sac_moe):
    """Two critics that each use one expert, and not the same: a mean would show two experts in use."""
    args = sac_args(sac_moe, "middle", tasks=2, router="topk", num_experts=3)
    agent, buffers = fill(sac_moe, args)
    parts = parts_of(buffers)
    for i, network_ in enumerate(agent.critic.networks):
        network_.layers[0][0].weight.data.abs_()
        network_.layers[0][0].bias.data.fill_(100.0)  # what the router of layer 2 sees is positive
        network_.layers[1].phi.data.fill_(-1.0)
        network_.layers[1].phi.data[:, i + 1] = 1.0
    rows = sac_moe.measure(agent, args, 0, parts)
    for task in (0, 1):
        assert [value_of(rows, network="critic", metric="router2", task=task, item=i) for i in range(3)] == [0, 1, 0]


def test_measure_of_sac_has_the_means_of_two_critics(sac_moe, monkeypatch):
    """One sees no difference between states and is sure of its expert, the other is neither."""
    monkeypatch.setattr(sac_moe, "SAMPLES", 64)
    args = sac_args(sac_moe, "middle", tasks=2)
    agent, buffers = fill(sac_moe, args)
    one, other = agent.critic.networks
    one.layers[0][0].weight.data.zero_()
    one.layers[0][0].bias.data.fill_(1.0)
    one.layers[1].phi.data[:, 0] = 100.0
    other.layers[1].phi.data.zero_()
    rows = sac_moe.measure(agent, args, 0, parts_of(buffers))
    torch.manual_seed(args.seed)
    _, inputs, _ = sac_moe.probe(agent, args, parts_of(buffers))
    features = [x for _, _, x in sac_moe.look_inside(agent.critic, inputs["critic"])]
    ranks, norms = zip(*((sac_moe.effective_rank(x), x.norm(dim=1).mean().item()) for x in features), strict=True)
    assert ranks[0] == 1 < ranks[1] and value_of(rows, network="critic", metric="rank") == sum(ranks) / 2
    assert norms[0] != pytest.approx(norms[1], rel=0.1)
    assert value_of(rows, network="critic", metric="norm") == pytest.approx(sum(norms) / 2, rel=1e-4)
    for task in (0, 1):
        assert value_of(rows, network="critic", metric="entropy2", task=task) == pytest.approx(
            math.log(4) / 2, abs=1e-3
        )


@pytest.mark.parametrize("router, gain", [("softmoe", 1), ("softmoe", 9), ("topk", 9)])
def test_a_dormant_neuron_has_a_small_value_whatever_its_experts_weight(either, router, gain):
    """The experts are alike, their weights are not: no neuron is dormant unless its expert is never chosen."""
    net, x = network(either, "big", router=router, num_experts=4)
    (moe,) = net.layers
    for parameter in moe.experts.parameters():
        parameter.data.fill_(1e-3)
    moe.phi.data[:, 0], moe.phi.data[:, 1:] = 0, -gain / len(moe.phi)  # expert 0 has the largest weight
    ((neurons, routers, _),) = either.look_inside(net, (x.abs() + 0.5, torch.zeros(9, dtype=torch.long)))
    w = routers["router1"].mean(0)
    share = (w == 0).float().mean().item()
    assert share == (0.75 if router == "topk" else 0.0) and (gain == 1 or w[1:].max() < 0.025)
    for layer in ("layer1", "layer2"):
        assert either.dormant(neurons[layer], 0.025).float().mean() == share


def test_measure_of_sac_sees_equal_and_opposite_tasks(sac_moe):
    """The critic's gradients of two equal tasks have the cosine 1; with the error's other sign it is -1."""
    args = sac_args(sac_moe, "baseline", tasks=2, task_id=False, gamma=0.0)
    agent, buffers = fill(sac_moe, args, steps=1)
    parts = parts_of(buffers)
    buffers[1].load_state_dict(buffers[0].state_dict())
    rows = sac_moe.measure(agent, args, 0, parts)
    assert value_of(rows, network="critic", metric="cosine", task=0, item=1) == pytest.approx(1.0, abs=1e-4)
    assert value_of(rows, network="critic", metric="rank") == 1.0
    data, task = buffers[0].sample(1), torch.zeros(1, dtype=torch.long)
    ((_, _, features),) = sac_moe.look_inside(agent.actor, (data.obs, task))
    assert value_of(rows, network="actor", metric="norm") == pytest.approx(features.norm().item(), rel=1e-4)
    one, other = agent.critic.networks  # both alike, so that one reward mirrors the error of either
    other.load_state_dict(one.state_dict())
    q = agent.critic(data.obs, data.action, task)[0, 0].item()
    buffers[1].rows[0, 3] = 2 * q - data.reward[0]
    rows = sac_moe.measure(agent, args, 0, parts)
    assert value_of(rows, network="critic", metric="cosine", task=0, item=1) == pytest.approx(-1.0, abs=1e-4)


def test_measure_of_ppo_on_a_made_network(ppo_moe, monkeypatch):
    pytest.importorskip("minatar")
    monkeypatch.setattr(ppo_moe, "PROBE", (2, 20))
    args = ppo_args(ppo_moe, "big", tasks=("breakout", "asterix"), router="hardcoded", num_experts=4)
    agent = ppo_moe.Agent(args)
    for expert in agent.actor.layers[0].experts:
        for layer in (expert[0][0], expert[1][0]):
            layer.weight.data.abs_()  # every neuron of the experts in use is alive
            layer.bias.data.fill_(1.0)
    before = torch.get_rng_state()
    rows = ppo_moe.measure(agent, args, 5, {})
    assert torch.equal(before, torch.get_rng_state())
    for item in ("layer1", "layer2", "total"):
        for task, share in (("", 0.5), (0, 0.75), (1, 0.75)):  # two experts of four, of each task one
            assert value_of(rows, network="actor", metric="dormant_0.025", item=item, task=task) == share
    assert value_of(rows, network="critic", metric="router1", task=1, item=1) == 1.0
    assert value_of(rows, network="critic", metric="entropy1", task=1) == 0.0
    counts = {item: value_of(rows, network="actor", metric="parameters", item=item) for item in ("total", "active")}
    assert counts == ppo_moe.count_parameters(agent.actor, args)
    assert value_of(rows, network="actor", metric="cosine", task=0, item=1) == 0.0  # no parameter in common
    assert rows == ppo_moe.measure(agent, args, 5, {})


def test_measure_of_ppo_sees_equal_and_opposite_tasks(ppo_moe, monkeypatch):
    """Two tasks with the same states: cosine 1; with the advantage's and the error's other sign: -1."""
    args = ppo_args(ppo_moe, "baseline", tasks=("breakout", "asterix"), ent_coef=0.0)
    agent, sign = ppo_moe.Agent(args), 1
    obs, action, advantage = torch.rand(20, 10, 10, 4) < 0.2, torch.arange(20) % 6, torch.randn(20)
    with torch.no_grad():
        log_prob = agent.actor(obs.float(), None).log_softmax(1).gather(1, action[:, None])[:, 0]
        value = agent.critic(obs.float(), None)[:, 0]

    def made_rollout(*_):
        parts = [
            (obs, torch.full((20,), t), action, log_prob, s * advantage, value + s * advantage)
            for t, s in ((0, 1), (1, sign))
        ]
        return ppo_moe.Batch(*(torch.cat(column) for column in zip(*parts, strict=True))), []

    pytest.importorskip("minatar")
    monkeypatch.setattr(ppo_moe, "rollout", made_rollout)
    for sign in (1, -1):
        rows = ppo_moe.measure(agent, args, 0, {})
        for name in ("actor", "critic"):
            assert value_of(rows, network=name, metric="cosine", task=0, item=1) == pytest.approx(sign, abs=1e-3)


def test_entropy_is_the_mean_over_the_states_of_one_task(ppo_moe, monkeypatch):
    """Task 0 gives each state one expert, in turn, task 1 half of each."""
    pytest.importorskip("minatar")
    monkeypatch.setattr(ppo_moe, "PROBE", (2, 20))
    args = ppo_args(ppo_moe, "big", tasks=("breakout", "asterix"), num_experts=2)
    look_inside = ppo_moe.look_inside

    def made(module, inputs):
        ((neurons, routers, features),) = look_inside(module, inputs)
        w = torch.eye(2)[torch.arange(80) // 4 % 2]  # four games side by side
        return [(neurons, {"router1": torch.where(inputs[1][:, None] == 0, w, 0.5)}, features)]

    monkeypatch.setattr(ppo_moe, "look_inside", made)
    rows = ppo_moe.measure(ppo_moe.Agent(args), args, 0, {})
    for task, entropy in ((0, 0.0), (1, math.log(2))):
        assert value_of(rows, network="actor", metric="entropy1", task=task) == pytest.approx(entropy, abs=1e-6)
        for item in (0, 1):
            assert value_of(rows, network="actor", metric="router1", task=task, item=item) == 0.5


def test_a_neuron_of_the_convolution_is_a_channel(ppo_moe, monkeypatch):
    """Sokar et al. 2023: so 16 of them stand beside 128. The tasks' own rows; rank and norm of what the head gets."""
    pytest.importorskip("minatar")
    monkeypatch.setattr(ppo_moe, "PROBE", (2, 20))
    args = ppo_args(ppo_moe, "baseline", tasks=("breakout", "asterix"))
    agent = ppo_moe.Agent(args)
    for layer in (agent.actor.layers[0][0], agent.actor.layers[1][0]):
        layer.weight.data.abs_()
        layer.bias.data.fill_(1.0)
    agent.actor.layers[0][0].bias.data[:4] = -1e6
    rollout, seen = ppo_moe.rollout, []
    monkeypatch.setattr(ppo_moe, "rollout", lambda *a: seen.append(rollout(*a)) or seen[-1])
    rows = ppo_moe.measure(agent, args, 0, {})
    for task in ("", 0, 1):
        assert value_of(rows, network="actor", metric="dormant_0.0", item="layer1", task=task) == 0.25
        total = value_of(rows, network="actor", metric="dormant_0.0", item="total", task=task)
        assert total == pytest.approx(4 / 144, abs=1e-5)
    (batch, _), *_ = seen
    ((_, _, features),) = ppo_moe.look_inside(agent.actor, (batch.obs.float(), batch.task))
    assert value_of(rows, network="actor", metric="rank") == ppo_moe.effective_rank(features)
    norm = sum(math.sqrt(sum(v * v for v in row)) for row in features.tolist()) / len(batch.obs)
    assert value_of(rows, network="actor", metric="norm") == pytest.approx(norm, rel=1e-4)


# Parameters


def test_parameters_are_counted(sac_moe, ppo_moe):
    """By hand: MLP (d + 1) 256 + 257 256 + 257 out; convolution 37 16 for 4 channels."""
    for architecture, experts in (
        ("baseline", (1, 1, 1)),
        ("middle", (1, 3, 1)),
        ("final", (1, 1, 3)),
        ("all", (3, 3, 3)),
        ("big", (3, 3, 3)),
    ):
        layers = 6 * 256, 257 * 256, 257 * 4
        total = sum(e * size for e, size in zip(experts, layers, strict=True))
        active = sum(layers)
        args = sac_args(sac_moe, architecture, router="hardcoded", num_experts=3)
        counted = {"total": total, "active": active}
        assert sac_moe.count_parameters(sac_moe.Network(5, 4, architecture, args), args) == counted
        critic = sac_moe.Critic(5, 0, sac_moe.dataclasses.replace(args, task_id=False))  # two networks, one output each
        outputs = 257 * 3 * (experts[2] if experts[2] > 1 else 1), 257 * 3
        double = {"total": 2 * (total - outputs[0]), "active": 2 * (active - outputs[1])}
        assert sac_moe.count_parameters(critic, args) == double
        routing = 3 * {"baseline": 0, "middle": 256, "final": 256, "all": 517, "big": 5}[architecture]
        args = sac_args(sac_moe, router="topk", num_experts=3)
        counted = {"total": total + routing, "active": active + routing}
        assert sac_moe.count_parameters(sac_moe.Network(5, 4, architecture, args), args) == counted

        layers = 37 * 16, 1025 * 128, 129 * 6
        args = ppo_args(ppo_moe, router="hardcoded", num_experts=3, tokens="persamp")
        total = sum(e * size for e, size in zip(experts, layers, strict=True))
        counted = {"total": total, "active": sum(layers)}
        assert ppo_moe.count_parameters(ppo_moe.Network(4, 6, 1.0, architecture, args), args) == counted
    for module, arguments in ((sac_moe, (5, 4)), (ppo_moe, (4, 6, 1.0))):  # two of three experts
        args = module.Args(num_experts=3, router="topk", top_k=2)
        net = module.Network(*arguments, "big", args)
        routing = net.layers[0].phi.numel()
        experts = sum(p.numel() for p in net.parameters()) - routing
        counted = {"total": experts + routing, "active": experts // 3 * 2 + routing}
        assert module.count_parameters(net, args) == counted
    args = ppo_args(ppo_moe, num_experts=8, slots=2)  # per-cell tokens: 16-128-16, and a head of 1,024 inputs
    total = 37 * 16 + 8 * (17 * 128 + 129 * 16) + 16 * 16 + 1025 * 6
    counted = ppo_moe.count_parameters(ppo_moe.Network(4, 6, 1.0, "middle", args), args)
    assert counted == {"total": total, "active": total}


def test_actor_and_critic_have_an_architecture_each(either):
    for actor, critic in (("big", "baseline"), ("baseline", "middle"), ("final", "big")):
        args = either.Args(actor_moe=actor, critic_moe=critic, num_experts=3)
        agent = either.Agent(args) if either.SCRIPT.startswith("ppo") else either.Agent(5, 2, args)
        for network_, architecture in ((agent.actor, actor), (agent.critic, critic)):
            found = [m.phi.shape[0] for m in mixtures(network_)]
            assert bool(found) == (architecture != "baseline"), (actor, critic)
            if architecture == "big":
                assert all(len(list(m.experts[0].modules())) > 4 for m in mixtures(network_))


def test_a_router_begins_nearly_undecided(ppo_moe):
    """Which is what a router that is never trained stays at."""
    net, obs = ppo_moe.Network(14, 6, 1.0, "big", ppo_moe.Args(num_experts=3)), torch.rand(64, 10, 10, 14) < 0.02
    w = net.layers[0].weights(obs.float(), torch.zeros(64, dtype=torch.long))
    assert 0.15 < w.min() and w.max() < 0.6 and w.std() > 0.005


@pytest.mark.parametrize(("size", "slots"), [(16, 1), (16, 4), (100, 2)])
def test_router_starts_with_the_variance_of_its_inputs(ppo_moe, size, slots):
    args = ppo_moe.Args(num_experts=64)
    phi = ppo_moe.Mixture([nn.Identity() for _ in range(64)], size, args, slots).phi
    assert phi.shape == (size, 64 * slots) and phi.std().item() == pytest.approx(size**-0.5, rel=0.1)


@pytest.mark.parametrize("architecture", ["baseline", "all"])
def test_fresh_weights_are_orthogonal_with_the_gains_of_ppo(ppo_moe, architecture):
    """sqrt 2 before a ReLU, 0.01 of the logits, 1 of the value."""
    agent = ppo_moe.Agent(ppo_args(ppo_moe, architecture, num_experts=2))
    for net, last in ((agent.actor, 0.01), (agent.critic, 1.0)):
        for layer, gain in zip(net.layers, (2**0.5, 2**0.5, last), strict=True):
            for linear in (m for m in layer.modules() if hasattr(m, "bias")):
                singular = torch.linalg.svdvals(linear.weight.flatten(1))
                torch.testing.assert_close(singular, torch.full_like(singular, gain), rtol=1e-3, atol=1e-4)
                assert not linear.bias.any()


def test_every_epoch_takes_each_row_once_in_an_order_of_its_own(ppo_moe, monkeypatch):
    check_shuffling(ppo_moe, monkeypatch)


@pytest.mark.parametrize("architecture", ["middle", "all", "big"])
def test_match_params_matches_the_baseline(sac_moe, ppo_moe, architecture):
    """Up to rounding, the routers, and biases and borders of the experts; also on the 352 inputs of four Humanoids."""
    for module, arguments in ((sac_moe, (8, 4)), (sac_moe, (352, 34)), (ppo_moe, (6, 6, 1.0))):
        for n in (2, 4, 8):
            args = module.Args(num_experts=n, match_params=True, router="hardcoded", **tokens(module))
            net, baseline = (module.Network(*arguments, name, args) for name in (architecture, "baseline"))
            ratio = module.count_parameters(net, args)["total"] / module.count_parameters(baseline, args)["total"]
            assert 0.9 < ratio < 1.15, ratio


# SAC


def test_one_task_without_experts_is_sac(sac, sac_moe):
    """The same losses and the same weights after an update as sac.py, from the same weights and noise."""
    args = sac_moe.Args(tasks=("Pendulum-v1",), actor_moe="baseline", critic_moe="baseline", task_id=False)
    plain, mine = sac.Agent(3, 2, sac.Args()), sac_moe.Agent(3, 2, args)

    c = plain.critic
    layers = zip((torch.cat([c.w_obs, c.w_action], 1), c.w2, c.w3), (c.b1, c.b2, c.b3), strict=True)
    for k, (weight, bias) in enumerate(layers):
        for i, critic in itertools.product((0, 1), (mine.critic, mine.critic_target)):
            linear = critic.networks[i].layers[k] if k == 2 else critic.networks[i].layers[k][0]
            linear.weight.data.copy_(weight.data[i].T)
            linear.bias.data.copy_(bias.data[i, 0])
    there, here = (plain.actor.trunk[0], plain.actor.trunk[2], plain.actor.head), mine.actor.network.layers
    for from_, to in zip(there, (here[0][0], here[1][0], here[2]), strict=True):
        to.load_state_dict(from_.state_dict())
    batch = sac.Batch(torch.randn(8, 3), torch.rand(8, 2), torch.randn(8), torch.arange(8.0) % 2, torch.randn(8, 3))
    torch.manual_seed(3)
    expected = sac.update(plain, batch, sac.Args())
    torch.manual_seed(3)
    losses = sac_moe.update(mine, sac_moe.Batch(*batch), torch.zeros(8, dtype=torch.long), args)
    for key in ("losses/critic", "losses/actor", "losses/alpha", "policy/entropy"):
        torch.testing.assert_close(losses[key].squeeze(), expected[key].squeeze(), rtol=1e-4, atol=1e-5)
    for i in (0, 1):
        torch.testing.assert_close(mine.critic.networks[i].layers[1][0].weight.T, plain.critic.w2[i])
        torch.testing.assert_close(mine.critic_target.networks[i].layers[1][0].weight.T, plain.critic_target.w2[i])
    torch.testing.assert_close(mine.actor.network.layers[2].weight, plain.actor.head.weight)
    torch.testing.assert_close(mine.log_alpha[0], plain.log_alpha)


def test_first_networks_policies_and_step_sizes_of_sac(sac_moe):
    """What test_sac.py asks of the other scripts."""
    args = sac_args(sac_moe, "baseline", tasks=2, policy_lr=1e-4, q_lr=2e-3, tau=0.3, alpha_init=0.3)
    agent, buffers = fill(sac_moe, args)
    one, other = (list(network_.parameters()) for network_ in agent.critic.networks)
    assert not any(map(torch.equal, one, other))  # or the smaller of two would be no lower bound
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    for key in (key for key in before if key.startswith("critic.")):
        assert torch.equal(before[key], before[key.replace("critic.", "critic_target.")])

    obs, task = torch.randn(5, 3), torch.arange(5) % 2
    mean, log_std = agent.actor(obs, task)
    for policy, u in (("deterministic", mean), ("stochastic", None)):
        torch.manual_seed(0)
        action = agent.actor.act(obs, task, policy)
        torch.manual_seed(0)
        u = mean + log_std.exp() * torch.randn(5, 2) if u is None else u
        torch.testing.assert_close(action, u.tanh())
    torch.manual_seed(0)
    first, second, third = (
        agent.act(obs[0].numpy(), 0, *policy) for policy in ((), ("stochastic",), ("deterministic",))
    )
    torch.manual_seed(0)
    assert np.array_equal(first, agent.act(obs[0].numpy(), 0, "stochastic")) and not np.array_equal(first, third)

    batch, task = sac_moe.draw_batch(buffers, [0, 1], 16)
    error = agent.critic(batch.obs, batch.action, task) - batch.reward
    short = sac_moe.dataclasses.replace(args, gamma=0.0)
    torch.testing.assert_close(sac_moe.critic_loss_of(agent, batch, task, short), error.square().mean(1).sum())
    metrics = sac_moe.update(agent, batch, task, args)
    after = agent.state_dict()
    for part, size in (("actor.", 1e-4), ("critic.", 2e-3), ("log_alpha", 2e-3)):  # Adam's first step
        moved = [(after[key] - before[key]).abs().max().item() for key in before if key.startswith(part)]
        assert max(moved) == pytest.approx(size, rel=0.01), part
    for key in (key for key in before if key.startswith("critic_target.")):
        torch.testing.assert_close(after[key], torch.lerp(before[key], after[key.replace("_target", "")], 0.3))
    assert before["log_alpha"].tolist() == pytest.approx([math.log(0.3)] * 2)
    assert [metrics[f"policy/alpha_{t}"].item() for t in (0, 1)] == pytest.approx(after["log_alpha"].exp().tolist())
    for value, bound in ((-60.0, -20.0), (60.0, 2.0)):
        agent.actor.network.layers[2].bias.data[2:] = value
        assert (agent.actor(obs, torch.arange(5) % 2)[1] == bound).all()


def test_each_task_has_its_own_temperature(sac_moe):
    args = sac_args(sac_moe, tasks=3)
    agent, buffers = fill(sac_moe, args)
    batch, task = sac_moe.draw_batch(buffers, [1], 16)
    sac_moe.update(agent, batch, task, args)
    assert not any(p.requires_grad for p in agent.critic_target.parameters())  # else it keeps a graph of all updates
    start = math.log(args.alpha_init)
    assert agent.log_alpha[[0, 2]].tolist() == pytest.approx([start, start])
    assert agent.log_alpha[1] < start - 1e-4  # the fresh policy is nearly uniform: above the target entropy


def test_losses_use_the_temperature_of_each_task_and_the_load_balance(sac_moe):
    args = sac_args(sac_moe, tasks=2, router="topk", load_balance=3.0)
    agent, buffers = fill(sac_moe, args)
    agent.log_alpha.data = torch.tensor([0.1, 0.7]).log()
    batch, task = sac_moe.draw_batch(buffers, [0, 1], 8)
    alpha = torch.tensor([0.1] * 4 + [0.7] * 4)
    torch.manual_seed(4)
    critic_loss = sac_moe.critic_loss_of(agent, batch, task, args)
    actor_loss, _ = sac_moe.actor_loss_of(agent, batch, task, args)
    torch.manual_seed(4)
    with torch.no_grad():
        action, log_prob = agent.actor.sample(batch.next_obs, task)
        soft_value = agent.critic_target(batch.next_obs, action, task).min(0).values - alpha * log_prob
        error = agent.critic(batch.obs, batch.action, task) - batch.reward - args.gamma * soft_value  # none terminated
        balance = [moe.balance for moe in mixtures(agent.critic)]
        assert len(balance) == 2  # one router of each critic
        torch.testing.assert_close(critic_loss, (error[0] ** 2 + error[1] ** 2).mean() + 3 * sum(balance))
        action, log_prob = agent.actor.sample(batch.obs, task)
        balance = [moe.balance for moe in mixtures(agent.actor)]
        expected = (alpha * log_prob - agent.critic(batch.obs, action, task).min(0).values).mean() + 3 * sum(balance)
        torch.testing.assert_close(actor_loss, expected)
    assert sum(balance) > 0.9


def test_batches_have_equal_shares(sac_moe):
    _, buffers = fill(sac_moe, sac_args(sac_moe, tasks=3), steps=5)
    for i, buffer in enumerate(buffers):
        buffer.rows[:, 3] = i  # the reward
    batch, task = sac_moe.draw_batch(buffers, [0, 1, 2], 12)
    assert task.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and batch.reward.tolist() == task.tolist()


def test_task_id_reaches_the_networks_only_if_asked(sac_moe):
    obs, action = torch.randn(1, 3).expand(2, -1), torch.zeros(2, 2)
    task = torch.tensor([0, 1])
    for task_id in (True, False):
        agent = sac_moe.Agent(3, 2, sac_args(sac_moe, tasks=2, task_id=task_id, num_experts=2))
        means, q = agent.actor(obs, task)[0], agent.critic(obs, action, task)[0]
        assert torch.allclose(means[0], means[1]) != task_id and torch.allclose(q[0], q[1]) != task_id
    agent = sac_moe.Agent(3, 2, sac_args(sac_moe, tasks=2, task_id=False, num_experts=2, router="hardcoded"))
    means = agent.actor(obs, task)[0]
    assert not torch.allclose(means[0], means[1])


# PPO and MinAtar


def test_convolution_of_pictures_whose_channels_stand_last(ppo_moe):
    conv, obs = ppo_moe.Conv(6, 16), (torch.rand(3, 10, 10, 6) < 0.3).float()
    y = conv(obs)
    for b, row, column in ((0, 0, 0), (1, 3, 7), (2, 7, 2)):
        patch = obs[b, row : row + 3, column : column + 3]  # (3, 3, C)
        expected = torch.einsum("ocij,ijc->o", conv.weight, patch) + conv.bias
        torch.testing.assert_close(y[b, row, column], expected)


@pytest.mark.parametrize("task", ["asterix", "breakout", "freeway", "seaquest", "space_invaders"])
def test_padding_and_actions_of_each_game(ppo_moe, task):
    """The game's channels stand first, the others are empty; an action that the game does not know does nothing."""
    minatar = pytest.importorskip("minatar")
    args = ppo_args(ppo_moe, tasks=(task, "seaquest") if task != "seaquest" else (task,))
    plain = minatar.Environment(task)
    assert plain.n_channels == ppo_moe.CHANNELS[task] and plain.num_actions() == ppo_moe.ACTIONS
    assert plain.minimal_action_set() == list(ppo_moe.MINIMAL.get(task, range(6)))
    games = ppo_moe.Games([task] * (2 + ppo_moe.ACTIONS), args)
    assert games.obs.shape == (8, 10, 10, 10)
    games.begin(games.tasks, 3)
    plain.seed(args.seed * 100_003 + 3)
    plain.reset()
    rng, known = np.random.default_rng(0), plain.minimal_action_set()
    for _ in range(60):
        assert np.array_equal(games.obs[0, ..., : plain.n_channels], plain.state())
        assert not games.obs[0, ..., plain.n_channels :].any()
        action = int(rng.integers(6))
        reward, terminated = plain.act(action)
        assert games.play(0, action)[:2] == (reward, terminated)
        if terminated:
            break
    games.games[0].last_action = 5
    games.start(0, 0)
    assert games.games[0].last_action == 0  # MinAtar's reset leaves it: sticky over the end of an episode
    for action in range(6):  # game 2 + a plays action a with the same random numbers as game 1 does nothing
        games.start(1, 5), games.start(2 + action, 5)
        same = True
        for _ in range(8):
            games.play(1, 0), games.play(2 + action, action)
            same &= np.array_equal(games.obs[1], games.obs[2 + action])
        assert same or action in known


@pytest.mark.parametrize("games", [("space_invaders", "breakout", "asterix"), ("seaquest", "freeway")])
def test_no_two_games_share_an_input(ppo_moe, games):
    """Every channel that a game ever uses is its own and lies in its block; the network has an input for each."""
    minatar = pytest.importorskip("minatar")
    args = ppo_moe.Args(tasks=games)
    mine, rng = ppo_moe.Games([*games], args), np.random.default_rng(0)
    sizes = [minatar.Environment(name).n_channels for name in games]
    *starts, channels = ppo_moe.blocks(args)
    used = [np.zeros(channels, bool) for _ in games]
    for _ in range(300):
        for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            assert np.array_equal(mine.obs[i, ..., start : start + size], mine.games[i].state())
            used[i] |= mine.obs[i].any((0, 1))
        mine.step(rng.integers(6, size=len(games)).tolist())
    assert not any((a & b).any() for a, b in itertools.combinations(used, 2)) and all(map(np.any, used))
    assert channels == sum(sizes) == mine.obs.shape[-1]
    assert ppo_moe.Agent(args).actor(torch.from_numpy(mine.obs).float(), mine.task).shape == (len(games), 6)


def test_masks_follow_the_order_of_the_tasks(ppo_moe):
    tasks = ("space_invaders", "breakout", "asterix")
    for row, task in zip(ppo_moe.Agent(ppo_moe.Args(tasks=tasks)).masked, tasks, strict=True):
        assert (~row).nonzero().squeeze(1).tolist() == list(ppo_moe.MINIMAL[task])


def test_a_masked_action_is_never_drawn_and_has_no_gradient_and_no_entropy(ppo_moe):
    """Even where the network prefers it. A task without a mask is as before."""
    args = ppo_moe.Args(actor_moe="baseline", critic_moe="baseline", tasks=("breakout", "seaquest"))
    agent, known = ppo_moe.Agent(args), [0, 1, 3]
    agent.actor.layers[2].bias.data = torch.tensor([0.0, 0.5, 9.0, -0.5, 9.0, 9.0])  # Breakout knows 0, 1 and 3
    obs, task = torch.rand(2000, 10, 10, 14) < 0.2, torch.arange(2000) % 2
    breakout, logits = task == 0, agent.actor(obs.float(), task)
    for policy in ("stochastic", "deterministic"):
        action = agent.act(obs, task, policy)
        assert set(action[breakout].tolist()) <= set(known) and set(action[~breakout].tolist()) <= {*range(6)}
    assert (agent.act(obs, task, "deterministic") == logits.argmax(1))[~breakout].all()
    expected = torch.distributions.Categorical(logits=logits[breakout][:, known])
    log_probs = agent.log_probs(obs, task)
    torch.testing.assert_close(log_probs[breakout][:, known], expected.logits)
    torch.testing.assert_close(log_probs[~breakout], logits[~breakout].log_softmax(1))
    batch = ppo_moe.Batch(obs, task, agent.act(obs, task, "stochastic"), *torch.randn(3, 2000))
    mine = ppo_moe.Batch(*(x[breakout] for x in batch))
    loss, _, metrics = ppo_moe.losses_of(agent, mine, args)
    torch.testing.assert_close(metrics["policy/entropy"], expected.entropy().mean())
    weight, bias = torch.autograd.grad(loss, list(agent.actor.layers[2].parameters()))
    for action in range(6):
        assert (weight[action].abs().sum() > 0) == (bias[action] != 0) == (action in known)
    everything = ppo_moe.Agent(ppo_moe.dataclasses.replace(args, actions="all"))
    assert not everything.masked.any()


def test_slots_fill_the_cells_and_a_wide_network_is_as_large_as_the_mixture(ppo_moe):
    """The widths that results/benchmark.py has; a router that is frozen has weights, but no gradient."""
    tasks = ("space_invaders", "breakout", "asterix")
    for n, slots in ((3, 22), (8, 8), (5, 13)):
        args = ppo_moe.Args(tasks=tasks, num_experts=n, slots=0)
        assert ppo_moe.Network(14, 6, 1.0, "middle", args).layers[1].phi.shape == (16, n * slots)
    mixture, plain = ppo_moe.Args(num_experts=3), ppo_moe.Args(width=392)
    for outputs in (6, 1):
        big = ppo_moe.count_parameters(ppo_moe.Network(14, outputs, 1.0, "big", mixture), mixture)["total"]
        wide = ppo_moe.count_parameters(ppo_moe.Network(14, outputs, 1.0, "baseline", plain), plain)["total"]
        assert wide / big == pytest.approx(1, abs=0.05)
    args = ppo_moe.Args(actor_moe="all", critic_moe="big", num_experts=3, freeze_router=True)
    agent = ppo_moe.Agent(args)
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    obs = torch.rand(40, 10, 10, 14) < 0.2
    batch = ppo_moe.Batch(obs, torch.arange(40) % 3, torch.zeros(40, dtype=torch.long), *torch.randn(3, 40))
    for _ in range(2):
        ppo_moe.update(agent, batch, args)
    for key, value in agent.state_dict().items():
        assert torch.equal(value, before[key]) == key.endswith("phi"), key


@pytest.mark.parametrize("gae_lambda", [0.0, 0.9])
def test_time_limit_is_bootstrapped_and_death_is_not(ppo_moe, monkeypatch, gae_lambda):
    """The advantages of a rollout are those of a plain loop over each game, backwards. Each task has its networks."""
    pytest.importorskip("minatar")
    monkeypatch.setattr(ppo_moe, "TIME_LIMIT", 7)
    changes = dict(router="hardcoded", num_experts=2, gae_lambda=gae_lambda)
    args = ppo_args(ppo_moe, "all", tasks=("breakout", "asterix"), **changes)
    tasks = ["asterix", "breakout", "breakout"]
    agent, games, again = ppo_moe.Agent(args), ppo_moe.Games(tasks, args), ppo_moe.Games(tasks, args)
    batch, episodes = ppo_moe.rollout(agent, games, 30, args)
    ends, steps = [], {}

    def value(i):
        return agent.critic(torch.from_numpy(again.obs[i : i + 1]).float(), torch.tensor([[1, 0, 0][i]])).item()

    for t in range(30):
        for i in range(3):
            row = 3 * t + i
            assert np.array_equal(batch.obs[row].numpy(), again.obs[i])
            v = value(i)
            reward, terminated, truncated = again.play(i, int(batch.action[row]))
            steps[t, i] = v, reward + args.gamma * (not terminated) * value(i), terminated or truncated
            if terminated or truncated:
                ends.append(([1, 0, 0][i], again.returns[i], len(again.played[i])))
        for i in range(3):  # a new episode has the next number
            if steps[t, i][2]:
                again.start(i, max(again.episodes) + 1)
    for i in range(3):
        advantage = 0.0
        for t in reversed(range(30)):
            v, target, done = steps[t, i]
            advantage = target - v + args.gamma * gae_lambda * (not done) * advantage
            assert batch.advantage[3 * t + i].item() == pytest.approx(advantage, abs=1e-5)
            assert batch.target[3 * t + i].item() == pytest.approx(advantage + v, abs=1e-5)
    assert episodes == ends and {length for *_, length in ends} >= {7} and any(length < 7 for *_, length in ends)


def test_gae_of_the_true_values_is_zero(ppo_moe):
    """Rewards 1 in an endless chain that a time limit cuts: V = 1 / (1 - gamma) everywhere."""
    args = ppo_moe.Args(gamma=0.9)
    one = torch.ones(6, 2)
    done = torch.zeros(6, 2)
    done[3] = 1
    advantage = ppo_moe.gae(one, 10 * one, 10 * one, 0 * one, done, args)
    assert advantage.abs().max() < 1e-5


def test_ppo_losses_and_step_by_hand(ppo_moe):
    """Against a plain form in which nothing is clamped: cases, torch's Categorical, clip_grad_norm_ and Adam."""
    changes = dict(router="topk", num_experts=3, load_balance=2.0, ent_coef=0.3, vf_coef=0.7, max_grad_norm=0.1)
    args = ppo_args(ppo_moe, "big", learning_rate=1e-3, **changes)
    agent = ppo_moe.Agent(args)
    for network_ in (agent.actor, agent.critic):
        for expert in network_.layers[0].experts:
            expert[2].weight.data.normal_()
    inputs = torch.rand(40, 10, 10, 6) < 0.2, torch.arange(40) % 3
    logits = agent.actor(inputs[0].float(), inputs[1])
    policy = torch.distributions.Categorical(logits=logits)
    action, advantage = torch.arange(40) % 6, torch.randn(40) * 3 + 1
    old = (policy.log_prob(action) + 0.3 * torch.randn(40)).detach()
    batch = ppo_moe.Batch(*inputs, action, old, advantage, torch.randn(40))

    normal = (advantage - advantage.mean()) / advantage.std()
    gains, outside = [], 0
    for ratio, a in zip((policy.log_prob(action) - old).exp(), normal, strict=True):
        if (ratio > 1.2 and a > 0) or (ratio < 0.8 and a < 0):  # no gradient
            gains.append((1.2 if a > 0 else 0.8) * a)
        else:
            gains.append(ratio * a)
        outside += not 0.8 <= ratio <= 1.2
    value = agent.critic(inputs[0].float(), inputs[1])[:, 0]
    balance = [network_.layers[0].balance for network_ in (agent.actor, agent.critic)]
    actor_loss = -sum(gains) / 40 - 0.3 * policy.entropy().mean() + 2 * balance[0]
    critic_loss = 0.7 * ((value - batch.target) ** 2).mean() + 2 * balance[1]
    first, second, metrics = ppo_moe.losses_of(agent, batch, args)
    torch.testing.assert_close(first, actor_loss)
    torch.testing.assert_close(second, critic_loss)
    assert 5 < outside < 35 and metrics["policy/clipped"].item() == pytest.approx(outside / 40)
    log_ratio = policy.log_prob(action) - old
    torch.testing.assert_close(metrics["policy/kl"], (log_ratio.exp() - 1 - log_ratio).mean())

    plain = [torch.nn.Parameter(p.detach().clone()) for p in agent.parameters()]
    gradients = torch.autograd.grad(actor_loss + critic_loss, list(agent.parameters()))
    for p, g in zip(plain, gradients, strict=True):
        p.grad = g
    assert torch.nn.utils.clip_grad_norm_(plain, 0.1) > 0.2
    torch.optim.Adam(plain, lr=1e-3, eps=1e-5).step()
    ppo_moe.update(agent, batch, args)
    for p, expected in zip(agent.parameters(), plain, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-6)


def test_actions_follow_the_policy_and_are_stored_with_their_probability(ppo_moe):
    pytest.importorskip("minatar")
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 0.0])
    counts = ppo_moe.draw(logits.expand(50_000, -1)).bincount(minlength=6) / 50_000
    torch.testing.assert_close(counts, logits.softmax(0), rtol=0, atol=0.01)
    args = ppo_args(ppo_moe, "big", tasks=("breakout", "asterix"), num_experts=2)
    agent = ppo_moe.Agent(args)
    for expert in agent.actor.layers[0].experts:
        expert[2].bias.data += logits
    games = ppo_moe.Games(["breakout", "asterix"], args)
    batch, _ = ppo_moe.rollout(agent, games, 40, args)
    metrics = ppo_moe.losses_of(agent, batch, args)[2]
    assert metrics["policy/kl"].abs() < 1e-6 and metrics["policy/clipped"] == 0
    assert batch.action.unique().numel() > 2


def test_evaluation_takes_the_best_action_or_draws_one(ppo_moe, monkeypatch):
    pytest.importorskip("minatar")
    args = ppo_args(ppo_moe, "baseline", tasks=("breakout",), eval_episodes=5)
    agent, played = ppo_moe.Agent(args), []
    agent.actor.layers[2].bias.data[3] = 1.0  # fresh networks have nearly equal logits: 0.35 against 0.13
    play = ppo_moe.Games.play
    monkeypatch.setattr(ppo_moe.Games, "play", lambda self, i, a: played.append(a) or play(self, i, a))
    games = ppo_moe.make_envs(args, evaluation=True)
    ppo_moe.evaluate(agent, games, args, 0, "deterministic")
    assert set(played) == {3}
    played.clear()
    ppo_moe.evaluate(agent, games, args, 0, "stochastic")
    assert len(set(played)) == 6


def test_evaluation_gives_every_game_its_own_picture_and_task(ppo_moe, monkeypatch):
    """Also when others have ended: each task's expert has an action of its own, and the pictures are recorded."""
    pytest.importorskip("minatar")
    args = ppo_args(ppo_moe, "final", tasks=("breakout", "asterix"), router="hardcoded", num_experts=2, eval_episodes=3)
    agent, played, seen = ppo_moe.Agent(args), [], []
    for expert, action in zip(agent.actor.layers[2].experts, (1, 3), strict=True):
        expert.bias.data[action] = 10.0
    play, act = ppo_moe.Games.play, agent.act

    def record(games, i, action):
        picture = seen[-1][sum(step_ == len(seen) for step_, *_ in played)]
        played.append((len(seen), i, action, torch.equal(picture, torch.from_numpy(games.obs[i]))))
        return play(games, i, action)

    monkeypatch.setattr(agent, "act", lambda obs, *rest: seen.append(obs.clone()) or act(obs, *rest))
    monkeypatch.setattr(ppo_moe.Games, "play", record)
    rows = ppo_moe.evaluate(agent, ppo_moe.make_envs(args, evaluation=True), args, 0, "deterministic")
    assert all(action == (1 if i < 3 else 3) and right for _, i, action, right in played)
    assert len({sum(i == game for _, i, *_ in played) for game in range(6)}) > 1  # some ended before others
    assert [round(row["length"] * 3) for row in rows] == [sum(i // 3 == task for _, i, *_ in played) for task in (0, 1)]


def test_evaluation_of_sac_tells_the_networks_the_task(sac_moe):
    """Each task's expert always takes an action of its own."""
    tasks = ("Pendulum-v1?max_episode_steps=4", "Pendulum-v1?max_episode_steps=5")
    args = sac_args(sac_moe, tasks=2, router="hardcoded", num_experts=2, eval_episodes=1)
    args, played = sac_moe.dataclasses.replace(args, tasks=tasks), [[], []]
    agent = sac_moe.Agent(3, 1, args)
    for expert, mean in zip(agent.actor.network.layers[0].experts, (10.0, -10.0), strict=True):
        expert[2].bias.data[0] = mean
    envs = sac_moe.make_envs(args, evaluation=True)
    for env, actions in zip(envs, played, strict=True):
        step, actions[:] = env.step, []
        env.step = lambda action, step=step, actions=actions: actions.append(float(action[0])) or step(action)
    for policy in ("deterministic", "stochastic"):
        sac_moe.evaluate(agent, envs, args, 0, policy)
    assert len(played[0]) == 8 and len(played[1]) == 10
    assert all(a > 0.99 for a in played[0]) and all(a < -0.99 for a in played[1])


def test_returns_are_sums_of_rewards(ppo_moe):
    """Of games whose every step is worth 2."""
    pytest.importorskip("minatar")
    args = ppo_moe.Args(tasks=("breakout", "asterix"), eval_episodes=2)
    for games in (ppo_moe.Games(["breakout", "asterix"], args), ppo_moe.make_envs(args, evaluation=True)):
        games.begin(games.tasks, 0)
        for i, game in enumerate(games.games):
            act = game.act
            game.act = lambda a, act=act: (2, act(a)[1])
            while not any(games.play(i, 0)[1:]):
                pass
            assert games.returns[i] == 2 * len(games.played[i]) > 2


def test_time_limit_holds_in_evaluations_too(ppo_moe, monkeypatch):
    pytest.importorskip("minatar")
    monkeypatch.setattr(ppo_moe, "TIME_LIMIT", 3)
    args = ppo_moe.Args(tasks=("breakout", "asterix"), eval_episodes=2)
    rows = ppo_moe.evaluate(ppo_moe.Agent(args), ppo_moe.make_envs(args, evaluation=True), args, 0, "stochastic")
    assert [row["length"] for row in rows] == [3, 3]


def test_evaluation_has_episodes_of_its_own(ppo_moe):
    pytest.importorskip("minatar")
    args = ppo_moe.Args(tasks=("asterix",), eval_episodes=20)
    training, evaluation = ppo_moe.Games(["asterix"] * 20, args), ppo_moe.make_envs(args, evaluation=True)
    other = ppo_moe.Games(["asterix"] * 20, ppo_moe.Args(tasks=("asterix",), seed=2))
    for _ in range(60):
        training.step([0] * 20), evaluation.step([0] * 20), other.step([0] * 20)
    assert not np.array_equal(training.obs, evaluation.obs) and not np.array_equal(training.obs, other.obs)


def test_every_game_is_watched_to_its_end(ppo_moe):
    pytest.importorskip("minatar")
    args, seen = ppo_moe.Args(tasks=("breakout", "asterix", "space_invaders"), eval_episodes=1), []
    games = ppo_moe.make_envs(args, evaluation=True)
    rows = ppo_moe.evaluate(ppo_moe.Agent(args), games, args, 0, "stochastic", seen.extend)
    assert [seen.count(game) for game in range(3)] == [row["length"] for row in rows]


def test_resumed_games_go_on_as_they_were(ppo_moe):
    """In the middle of episodes that began at different times, of several games."""
    pytest.importorskip("minatar")
    args = ppo_moe.Args(tasks=("breakout", "asterix"))
    games, rng = ppo_moe.Games(["breakout", "asterix"] * 2, args), np.random.default_rng(0)
    for _ in range(40):
        games.step(rng.integers(6, size=4).tolist())
    again = ppo_moe.Games(["breakout"] * 4, args)
    again.load_state_dict(games.state_dict())
    assert torch.equal(games.task, again.task) and max(games.episodes) > 3
    for _ in range(40):
        actions = rng.integers(6, size=4).tolist()
        (*tensors, ended), (*others, ends) = games.step(actions), again.step(actions)
        assert all(map(torch.equal, tensors, others)) and np.array_equal(games.obs, again.obs)
        assert [(i, episode) for i, _, episode in ended] == [(i, episode) for i, _, episode in ends]
    state = games.state_dict() | {"obs": ~torch.from_numpy(games.obs)}
    with pytest.raises(ValueError, match="does not repeat its own episode"):
        again.load_state_dict(state)


def test_ppo_learns_the_better_action(ppo_moe):
    """Advantage 1 for one action and -1 for another, by task: each task's policy and value move as told."""
    args = ppo_args(ppo_moe, "big", router="hardcoded", num_experts=3, update_epochs=8, learning_rate=1e-3)
    agent = ppo_moe.Agent(args)
    obs = torch.rand(64, 10, 10, 6) < 0.2
    task, action = torch.arange(64) % 2, (torch.arange(64) // 2) % 2
    good = (action == task).float()  # task 0 wants action 0, task 1 action 1
    log_prob = torch.full((64,), -math.log(6))
    batch = ppo_moe.Batch(obs, task, action, log_prob, 2 * good - 1, good + task)
    first = ppo_moe.learn(agent, batch, args)
    metrics = ppo_moe.learn(agent, batch, args)
    assert metrics["losses/critic"] < first["losses/critic"]
    p = agent.actor(obs.float(), task).softmax(-1)
    assert (p[task == 0, 0] > p[task == 0, 1]).all() and (p[task == 1, 1] > p[task == 1, 0]).all()


# Schedule


def test_continual_schedule_switches_when_it_says(either):
    args = either.Args(tasks=("a", "b", "c"), protocol="continual", cycles=2, total_timesteps=600)
    phases = [either.running_phase(step, args) for step in range(600)]
    assert phases == [step // 100 for step in range(600)]
    uneven = [either.running_phase(step, either.dataclasses.replace(args, total_timesteps=601)) for step in range(601)]
    assert uneven == sorted(uneven) and uneven[-1] == 5
    assert {uneven.count(phase) for phase in range(6)} == {100, 101}


def test_named_sets_of_tasks(sac_moe):
    sets = {name: sac_moe.Args(tasks=(name,)) for name in sac_moe.TASK_SETS}
    assert [len(args.tasks) for args in sets.values()] == [4, 8, 2]
    straight, inverted = (sac_moe.Env(task, sets["target-reaching-inverted"]) for task in (1, 5))
    for env in (straight, inverted):
        env.unwrapped.reset(seed=0)
    first, second = straight.step(np.ones(2, np.float32))[0], inverted.step(-np.ones(2, np.float32))[0]
    assert np.array_equal(first, second)

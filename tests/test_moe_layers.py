"""The mathematics of the mixture-of-experts layers, of what is measured on them, and of the two multi-task updates."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ARCHITECTURES = ("middle", "final", "all", "big")
NARROW = ("CartPole-v1",)  # tasks are only counted here


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def sac_args(module, architecture="big", tasks=3, **changes):
    return module.Args(**{"tasks": NARROW * tasks, "actor_moe": architecture, "critic_moe": architecture} | changes)


def ppo_args(module, architecture="big", **changes):
    return module.Args(actor_moe=architecture, critic_moe=architecture, **changes)


def network(module, architecture, **changes):
    """A network of either script with 4 outputs, inputs for it, and the parameters of its layers (E, ...)."""
    if module.SCRIPT.startswith("sac"):
        moe = module.MoE(2, 5, 4, architecture, sac_args(module, **changes), hidden=12)
        inputs = (torch.randn(9, 5),)
        weights = [*moe.weights, *moe.biases]  # (N, E, d, h)
        return moe, inputs, [w.movedim(1, 0) for w in weights]
    moe = module.MoE(6, 4, 1.0, architecture, ppo_args(module, **changes))
    inputs = module.see(torch.rand(9, 10, 10, 6) < 0.2)
    return moe, inputs, [p for layer in moe.modules() if isinstance(layer, module.Experts) for p in layer.parameters()]


@pytest.fixture(params=["sac_moe", "ppo_moe"])
def either(request):
    return request.getfixturevalue(request.param)


# Soft MoE


@pytest.mark.parametrize("slots", [1, 3])
def test_soft_moe_equals_a_loop_over_experts_and_slots(ppo_moe, slots):
    moe = ppo_moe.TokenMoE(7, ppo_args(ppo_moe, num_experts=4, slots=slots), size=5).double()
    moe.up.bias.data.normal_()
    moe.down.bias.data.normal_()
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    trace = {}
    result = moe(x, None, trace)
    for b in range(3):
        logits = [[(x[b, j] @ moe.phi[:, s]).item() for s in range(4 * slots)] for j in range(6)]
        y, usage, neurons = torch.zeros(6, 5, dtype=torch.float64), [0.0] * 4, []
        for s in range(4 * slots):
            expert = s // slots
            total = sum(math.exp(logits[j][s]) for j in range(6))
            slot = sum(math.exp(logits[j][s]) / total * x[b, j] for j in range(6))
            h = torch.relu(slot @ moe.up.weight[expert] + moe.up.bias[expert, 0])
            out = h @ moe.down.weight[expert] + moe.down.bias[expert, 0]
            for j in range(6):
                share = math.exp(logits[j][s]) / sum(math.exp(logit) for logit in logits[j])
                y[j] += share * out
                usage[expert] += share / 6
            neurons.append(h)
        torch.testing.assert_close(result[b], y, rtol=1e-10, atol=1e-10)
        neurons = torch.stack(neurons).view(4, slots, 7).transpose(0, 1).flatten(1)  # of each slot its experts' neurons
        torch.testing.assert_close(trace["layer2"][b * slots : (b + 1) * slots], neurons)
        assert trace["router2"][b].tolist() == pytest.approx(usage)


@pytest.mark.parametrize("architecture, tokens", [("middle", "perconv"), ("middle", "persamp"), ("big", "persamp")])
@pytest.mark.parametrize("router", ["topk", "hardcoded"])
def test_a_gradient_repeats_with_two_threads(ppo_moe, router, architecture, tokens):
    """A sum that threads share without an order is another one each time, and so is every run that has it."""
    args = ppo_args(ppo_moe, architecture, router=router, num_experts=3, tokens=tokens)
    agent, threads = ppo_moe.Agent(args), torch.get_num_threads()
    size = 1008 if tokens == "persamp" else 126  # the default minibatch; an eighth of its cells
    task, action = torch.arange(size) % 3, torch.randint(0, 6, (size,))
    batch = ppo_moe.Batch(torch.rand(size, 10, 10, 6) < 0.2, task, action, *torch.randn(3, size))
    torch.set_num_threads(2)
    try:
        first, *others = [ppo_moe.gradient(sum(ppo_moe.losses_of(agent, batch, args)[:2]), agent) for _ in range(8)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("router, top_k", [("topk", 1), ("topk", 2), ("hardcoded", 1)])
def test_chosen_experts_of_cells_equal_a_loop_over_cells(ppo_moe, router, top_k):
    """Several tasks in one batch; what the trace shows; the load-balancing loss of all cells."""
    args = ppo_args(ppo_moe, "middle", router=router, num_experts=4, top_k=top_k)
    moe = ppo_moe.TokenMoE(7, args, size=8)
    moe.up.bias.data.normal_()
    moe.down.bias.data.normal_()
    x, task, trace = torch.randn(5, 6, 8), torch.tensor([0, 2, 1, 0, 2]), {}
    result = moe(x, task, trace)
    neurons, counts, shares = torch.zeros(30, 4, 7), torch.zeros(4), torch.zeros(4)
    for b in range(5):
        usage = torch.zeros(4)
        for j in range(6):
            y = torch.zeros(8)
            if router == "hardcoded":
                weights = {int(task[b]): 1.0}
            else:
                softmax = (x[b, j] @ moe.router.phi[0]).softmax(0)
                weights = {i: softmax[i] for i in sorted(range(4), key=lambda i: -softmax[i])[:top_k]}
                shares += softmax / 30
            for i, w in weights.items():
                h = (x[b, j] @ moe.up.weight[i] + moe.up.bias[i, 0]).relu()
                y += w * (h @ moe.down.weight[i] + moe.down.bias[i, 0])
                neurons[6 * b + j, i] = h
                usage[i] += w / 6
                counts[i] += 1 / (30 * top_k)
            torch.testing.assert_close(result[b, j], y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trace["router2"][b], usage)
    torch.testing.assert_close(trace["layer2"], neurons.flatten(1), rtol=1e-4, atol=1e-5)
    if router == "topk":
        torch.testing.assert_close(moe.router.balance, 4 * (counts * shares).sum())


def test_load_balance_of_cells_is_part_of_the_loss(ppo_moe):
    args = ppo_args(ppo_moe, "middle", router="topk", num_experts=4, load_balance=2.0)
    agent, zeros = ppo_moe.Agent(args), torch.zeros(9)
    batch = ppo_moe.Batch(torch.rand(9, 10, 10, 6) < 0.2, zeros.long(), zeros.long(), zeros, torch.randn(9), zeros)
    with_it = ppo_moe.losses_of(agent, batch, args)
    without = ppo_moe.losses_of(agent, batch, ppo_moe.dataclasses.replace(args, load_balance=0.0))
    for i, net in enumerate((agent.actor, agent.critic)):
        balance = net.layers[1].router.balance
        assert balance > 0.9
        torch.testing.assert_close(with_it[i] - without[i], 2 * balance)


def test_soft_moe_of_one_token_is_the_dense_gate(ppo_moe):
    moe = ppo_moe.TokenMoE(7, ppo_args(ppo_moe, num_experts=4), size=5).double()
    x = torch.randn(3, 1, 5, dtype=torch.float64)
    gate = (x[:, 0] @ moe.phi).softmax(1)
    dense = sum(gate[:, i, None] * (x[:, 0] @ moe.up.weight[i]).relu() @ moe.down.weight[i] for i in range(4))
    torch.testing.assert_close(moe(x, None)[:, 0], dense)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("router", ["softmoe", "topk", "hardcoded"])
@pytest.mark.parametrize("match_params", [False, True])
def test_layers_equal_a_loop_over_experts(either, architecture, router, match_params):
    """y = sum_i w_i f_i with a plain loop and the routers' own weights, which the trace shows; so do its features.

    The gradients are equal as well, also of layers with odd widths.
    """
    changes = {"num_experts": 3, "top_k": 2, "match_params": match_params and architecture != "final"}
    moe, inputs, _ = network(either, architecture, router=router, **changes, **tokens(either))

    def check_weights(layer, x, w):  # that they come from the layer's own input
        if router == "softmoe":
            phi = moe.routers[str(layer)].phi[number]
            torch.testing.assert_close(w, (x @ phi).softmax(1), rtol=1e-4, atol=1e-5)

    task, trace = torch.arange(9) % 3, {}
    result, sac_like = moe(*inputs, task, trace), either.SCRIPT.startswith("sac")
    loops = []
    for number in range(2 if sac_like else 1):  # the two critics, or one network
        x = inputs[-1]
        weights = [w[number] if sac_like else w for w in (trace[key] for key in sorted(trace) if "router" in key)]
        features = trace["features"][number] if sac_like else trace["features"]
        if architecture == "big":
            check_weights(0, inputs[0], weights[0])
            expected = [weights[0][:, e, None] * hidden(moe, number, e, x) for e in range(3)]
            torch.testing.assert_close(features, torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
            x = sum(weights[0][:, e, None] * apply(moe, number, 2, e, hidden(moe, number, e, x)) for e in range(3))
        else:
            for layer in range(3):
                if layer == 2:
                    torch.testing.assert_close(features, x, rtol=1e-4, atol=1e-5)
                if f"router{layer + 1}" in trace:
                    w = weights.pop(0)
                    check_weights(layer, x if layer else inputs[0], w)
                    x = sum(w[:, e, None] * apply(moe, number, layer, e, x) for e in range(3))
                else:
                    x = apply(moe, number, layer, 0, x)
        torch.testing.assert_close(result[number] if sac_like else result, x, rtol=1e-4, atol=1e-5)
        loops.append(x)
    weights = torch.randn(result.shape)
    parameters = list(moe.parameters())
    gradients = torch.autograd.grad((weights * result).sum(), parameters, retain_graph=True)
    expected = torch.autograd.grad((weights * (torch.stack(loops) if sac_like else loops[0])).sum(), parameters)
    for mine, plain in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("router, top_k, rows", [("hardcoded", 1, 9), ("topk", 1, 9), ("topk", 2, 18)])
def test_an_expert_computes_only_what_is_its_own(ppo_moe, monkeypatch, router, top_k, rows):
    """Sparse layers multiply B k rows (the convolution: 64 times as many), not B n."""
    moe, inputs, _ = network(ppo_moe, "big", router=router, num_experts=3, top_k=top_k)
    product, seen = F.grouped_mm, []

    def count(x, weight, offs):
        seen.append((len(x), int(offs[-1])))
        return product(x, weight, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", count)
    moe(*inputs, torch.arange(9) % 2)
    assert seen == [(64 * rows, 64 * rows), (rows, rows), (rows, rows)]


def apply(moe, number, layer, expert, x):
    """One expert of one layer."""
    if hasattr(moe, "layers"):
        weight, bias = moe.layers[layer].weight[expert], moe.layers[layer].bias[expert]
    else:
        weight, bias = moe.weights[layer][number, expert], moe.biases[layer][number, expert]
    y = x @ weight + bias[0]
    y = y.relu() if layer < 2 else y
    return y.flatten(1) if y.ndim == 3 else y  # patches of the convolution


def hidden(moe, number, expert, x):
    return apply(moe, number, 1, expert, apply(moe, number, 0, expert, x))


def tokens(module):
    return {} if module.SCRIPT.startswith("sac") else {"tokens": "persamp"}


# Routers


def test_topk_keeps_the_k_largest_as_they_are(either):
    router = either.Router(1, 3, either.Args(router="topk", num_experts=4, top_k=2))
    router.phi.data[0] = torch.tensor([[1.0, 0, 2, -1], [0, 3, 0, 1], [0, 0, 0, 0]])
    x = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    e = math.e
    first, second = e + 1 + e**2 + 1 / e, 1 + e**3 + 1 + e
    expected = [[e / first, 0, e**2 / first, 0], [0, e**3 / second, 0, e / second]]
    torch.testing.assert_close(router(x, None)[0], torch.tensor(expected))


def test_topk_drops_nothing_when_all_samples_want_one_expert(ppo_moe):
    moe = ppo_moe.TokenMoE(8, ppo_args(ppo_moe, router="topk", num_experts=4), size=5)
    moe.router.phi.data.zero_()
    moe.router.phi.data[0, 0] = torch.tensor([0.0, 0.0, 5.0, 0.0])  # all tokens have x_0 > 0
    x = torch.rand(50, 64, 5) + 0.1
    weight = (x @ moe.router.phi[0]).softmax(-1)[..., 2, None]
    expected = weight * ((x @ moe.up.weight[2]).relu() @ moe.down.weight[2])
    torch.testing.assert_close(moe(x, torch.zeros(50, dtype=torch.long)), expected)


def test_load_balance_is_one_if_equal_and_n_if_all_go_to_one(either):
    router = either.Router(1, 4, either.Args(router="topk", num_experts=4))
    router.phi.data[0] = 50 * torch.eye(4)
    router(torch.eye(4)[None], None)
    assert router.balance.item() == pytest.approx(1.0)
    router(torch.eye(4)[None, :1].expand(1, 7, 4), None)
    assert router.balance.item() == pytest.approx(4.0)


def test_load_balance_of_two_critics_is_the_sum(sac_moe):
    """Each critic's router has the gradient that it would have alone."""
    router = sac_moe.Router(2, 4, sac_moe.Args(router="topk", num_experts=4))
    x = torch.randn(2, 30, 4)
    router(x, None)
    (both,) = torch.autograd.grad(router.balance, router.phi)
    for i in range(2):
        alone = sac_moe.Router(1, 4, sac_moe.Args(router="topk", num_experts=4))
        alone.phi.data = router.phi.data[i : i + 1]
        alone(x[i : i + 1], None)
        torch.testing.assert_close(both[i : i + 1], torch.autograd.grad(alone.balance, alone.phi)[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("per_conv", [False, True])
def test_hardcoded_routing_sends_a_gradient_to_the_tasks_expert_only(either, architecture, per_conv):
    changes = {"tokens": "perconv" if per_conv else "persamp"} if either.SCRIPT.startswith("ppo") else {}
    moe, inputs, weights = network(either, architecture, router="hardcoded", num_experts=3, **changes)
    moe(*inputs, torch.ones(9, dtype=torch.long)).square().sum().backward()
    touched = 0
    for parameter in moe.parameters():
        gradient = parameter.grad.movedim(1, 0) if either.SCRIPT.startswith("sac") else parameter.grad
        if len(gradient) == 3:
            assert gradient[1].abs().sum() > 0 and gradient[0].abs().sum() == gradient[2].abs().sum() == 0
            touched += 1
    assert (
        touched == {"middle": 2 + 2 * (per_conv and "tokens" in changes), "final": 2, "all": 6, "big": 6}[architecture]
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("router", ["softmoe", "topk", "hardcoded"])
def test_one_expert_is_the_baseline(either, architecture, router):
    changes = {"num_experts": 1, "router": router, **tokens(either)}
    moe, inputs, _ = network(either, architecture, **changes)
    baseline, _, _ = network(either, "baseline", **changes)
    missing = moe.load_state_dict(baseline.state_dict(), strict=False)
    assert not missing.unexpected_keys and all("phi" in key for key in missing.missing_keys)
    task = torch.zeros(9, dtype=torch.long)
    torch.testing.assert_close(moe(*inputs, task), baseline(*inputs, task))


# What is measured


def test_dormant_neurons_by_hand(either):
    x = torch.tensor([[1.0, 0, -0.02, 3], [1, 0, 0.02, -3]])  # sizes 1, 0, 0.02, 3; mean 1.005
    assert either.dormant(x, 0.0).tolist() == [False, True, False, False]
    assert either.dormant(x, 0.025).tolist() == [False, True, True, False]
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
    buffers = [module.ReplayBuffer(100, 3, 2, torch.device("cpu")) for _ in args.tasks]
    rng = np.random.default_rng(0)
    for buffer in buffers:
        for _ in range(steps):
            obs, next_obs = rng.normal(size=(2, 3)).astype(np.float32)
            buffer.add(obs, rng.uniform(-1, 1, 2).astype(np.float32), rng.normal(), False, next_obs, True)
    return agent, buffers


def test_measure_of_sac_on_made_networks(sac_moe):
    args = sac_args(sac_moe, "middle", tasks=2, router="hardcoded", num_experts=4)
    agent, buffers = fill(sac_moe, args)
    actor = agent.actor.moe
    actor.biases[0].data[..., :64] = -1e6  # a quarter of the first layer is dead
    actor.weights[1].data.abs_()  # and the chosen experts of the second layer are alive throughout
    actor.biases[1].data.fill_(1.0)
    before = torch.get_rng_state()
    rows = sac_moe.measure(agent, buffers, args, 7)
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
    counts = [value_of(rows, network="critic", metric="parameters", item=item) for item in ("total", "active")]
    assert tuple(counts) == sac_moe.count_parameters(agent.critic.moe, args)
    for network_name in ("actor", "critic"):
        assert -1 <= value_of(rows, network=network_name, metric="cosine", task=0, item=1) <= 1


def test_measure_of_sac_has_the_routers_of_one_critic(sac_moe):
    """Two critics that each use one expert, and not the same: a mean would show two experts in use."""
    args = sac_args(sac_moe, "middle", tasks=2, router="topk", num_experts=3)
    agent, buffers = fill(sac_moe, args)
    agent.critic.moe.weights[0].data.abs_()
    agent.critic.moe.biases[0].data.fill_(100.0)  # what the router of layer 2 sees is positive
    phi = agent.critic.moe.routers["1"].phi.data.fill_(-1.0)
    phi[0, :, 1], phi[1, :, 2] = 1.0, 1.0
    rows = sac_moe.measure(agent, buffers, args, 0)
    for task in (0, 1):
        assert [value_of(rows, network="critic", metric="router2", task=task, item=i) for i in range(3)] == [0, 1, 0]


@pytest.mark.parametrize("router, gain", [("softmoe", 1), ("softmoe", 9), ("topk", 9)])
def test_a_dormant_neuron_has_a_small_value_whatever_its_experts_weight(either, router, gain):
    """The experts are alike, their weights are not: no neuron is dormant unless its expert is never chosen."""
    moe, inputs, parameters = network(either, "big", router=router, num_experts=4)
    for parameter in parameters:
        parameter.data.fill_(1e-3)
    phi = moe.routers["0"].phi.data
    phi[..., 0], phi[..., 1:] = 0, -gain / phi.shape[1]  # expert 0 has the largest weight
    inputs, trace = [x.abs() + 0.5 for x in inputs], {}
    moe(*inputs, torch.zeros(9, dtype=torch.long), trace)
    w = trace["router1"].flatten(0, -2).mean(0)
    share = (w == 0).float().mean().item()
    assert share == (0.75 if router == "topk" else 0.0) and (gain == 1 or w[1:].max() < 0.025)
    for layer in ("layer1", "layer2"):
        assert either.dormant(trace[layer].flatten(0, -2), 0.025).float().mean() == share


def test_measure_of_sac_sees_equal_and_opposite_tasks(sac_moe):
    """The critic's gradients of two equal tasks have the cosine 1; with the error's other sign it is -1."""
    args = sac_args(sac_moe, "baseline", tasks=2, task_id=False, gamma=0.0)
    agent, buffers = fill(sac_moe, args, steps=1)
    buffers[1].load_state_dict(buffers[0].state_dict())
    rows = sac_moe.measure(agent, buffers, args, 0)
    assert value_of(rows, network="critic", metric="cosine", task=0, item=1) == pytest.approx(1.0, abs=1e-4)
    assert value_of(rows, network="critic", metric="rank") == 1.0
    trace = {}
    agent.actor.moe(buffers[0].obs[:1], torch.zeros(1, dtype=torch.long), trace)
    assert value_of(rows, network="actor", metric="norm") == pytest.approx(trace["features"].norm().item(), rel=1e-4)
    for parameter in agent.critic.parameters():
        parameter.data[1] = parameter.data[0]  # both critics alike, so that one reward mirrors the error of either
    data = buffers[0]
    q = agent.critic(data.obs[:1], data.action[:1], torch.zeros(1, dtype=torch.long))[0, 0].item()
    buffers[1].reward[0] = 2 * q - data.reward[0]
    rows = sac_moe.measure(agent, buffers, args, 0)
    assert value_of(rows, network="critic", metric="cosine", task=0, item=1) == pytest.approx(-1.0, abs=1e-4)


def test_measure_of_ppo_on_a_made_network(ppo_moe, monkeypatch):
    pytest.importorskip("minatar")
    monkeypatch.setattr(ppo_moe, "PROBE", (2, 20))
    args = ppo_args(ppo_moe, "big", tasks=("breakout", "asterix"), router="hardcoded", num_experts=4)
    agent = ppo_moe.Agent(args)
    for layer in agent.actor.layers[:2]:
        layer.weight.data.abs_()  # every neuron of the experts in use is alive
        layer.bias.data.fill_(1.0)
    before = torch.get_rng_state()
    rows = ppo_moe.measure(agent, args, 5)
    assert torch.equal(before, torch.get_rng_state())
    for item in ("layer1", "layer2", "total"):
        for task, share in (("", 0.5), (0, 0.75), (1, 0.75)):  # two experts of four, of each task one
            assert value_of(rows, network="actor", metric="dormant_0.025", item=item, task=task) == share
    assert value_of(rows, network="critic", metric="router1", task=1, item=1) == 1.0
    assert value_of(rows, network="critic", metric="entropy1", task=1) == 0.0
    counts = [value_of(rows, network="actor", metric="parameters", item=item) for item in ("total", "active")]
    assert tuple(counts) == ppo_moe.count_parameters(agent.actor, args)
    assert value_of(rows, network="actor", metric="cosine", task=0, item=1) == 0.0  # no parameter in common
    assert rows == ppo_moe.measure(agent, args, 5)


def test_measure_of_ppo_sees_equal_and_opposite_tasks(ppo_moe, monkeypatch):
    """Two tasks with the same states: cosine 1; with the advantage's and the error's other sign: -1."""
    args = ppo_args(ppo_moe, "baseline", tasks=("breakout", "asterix"), ent_coef=0.0)
    agent, sign = ppo_moe.Agent(args), 1
    obs, action, advantage = torch.rand(20, 10, 10, 4) < 0.2, torch.arange(20) % 6, torch.randn(20)
    with torch.no_grad():
        inputs = ppo_moe.see(obs)
        log_prob = agent.actor(*inputs, None).log_softmax(1).gather(1, action[:, None])[:, 0]
        value = agent.critic(*inputs, None)[:, 0]

    def made_rollout(*_):
        parts = [
            (obs, torch.full((20,), t), action, log_prob, s * advantage, value + s * advantage)
            for t, s in ((0, 1), (1, sign))
        ]
        return ppo_moe.Batch(*(torch.cat(column) for column in zip(*parts, strict=True))), []

    pytest.importorskip("minatar")
    monkeypatch.setattr(ppo_moe, "rollout", made_rollout)
    for sign in (1, -1):
        rows = ppo_moe.measure(agent, args, 0)
        for name in ("actor", "critic"):
            assert value_of(rows, network=name, metric="cosine", task=0, item=1) == pytest.approx(sign, abs=1e-3)


def test_a_neuron_of_the_convolution_is_a_channel(ppo_moe, monkeypatch):
    """Sokar et al. 2023: so 16 of them stand beside 128. The tasks' own rows; rank and norm of what the head gets."""
    pytest.importorskip("minatar")
    monkeypatch.setattr(ppo_moe, "PROBE", (2, 20))
    args = ppo_args(ppo_moe, "baseline", tasks=("breakout", "asterix"))
    agent, trace = ppo_moe.Agent(args), {}
    for layer in agent.actor.layers[:2]:
        layer.weight.data.abs_()
        layer.bias.data.fill_(1.0)
    agent.actor.layers[0].bias.data[..., :4] = -1e6
    rollout, seen = ppo_moe.rollout, []
    monkeypatch.setattr(ppo_moe, "rollout", lambda *a: seen.append(rollout(*a)) or seen[-1])
    rows = ppo_moe.measure(agent, args, 0)
    for task in ("", 0, 1):
        assert value_of(rows, network="actor", metric="dormant_0.0", item="layer1", task=task) == 0.25
        total = value_of(rows, network="actor", metric="dormant_0.0", item="total", task=task)
        assert total == pytest.approx(4 / 144, abs=1e-5)
    (batch, _), *_ = seen
    agent.actor(*ppo_moe.see(batch.obs), batch.task, trace)
    assert value_of(rows, network="actor", metric="rank") == ppo_moe.effective_rank(trace["features"])
    norm = sum(math.sqrt(sum(v * v for v in row)) for row in trace["features"].tolist()) / len(batch.obs)
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
        args = sac_args(sac_moe, router="hardcoded", num_experts=3)
        assert sac_moe.count_parameters(sac_moe.MoE(1, 5, 4, architecture, args), args) == (total, active)
        assert sac_moe.count_parameters(sac_moe.MoE(2, 5, 4, architecture, args), args) == (2 * total, 2 * active)
        routing = 3 * {"baseline": 0, "middle": 256, "final": 256, "all": 517, "big": 5}[architecture]
        args = sac_args(sac_moe, router="topk", num_experts=3)
        moe = sac_moe.MoE(1, 5, 4, architecture, args)
        assert sac_moe.count_parameters(moe, args) == (total + routing, active + routing)

        layers = 37 * 16, 1025 * 128, 129 * 6
        args = ppo_args(ppo_moe, router="hardcoded", num_experts=3, tokens="persamp")
        total = sum(e * size for e, size in zip(experts, layers, strict=True))
        assert ppo_moe.count_parameters(ppo_moe.MoE(4, 6, 1.0, architecture, args), args) == (total, sum(layers))
    for module, arguments in ((sac_moe, (1, 5, 4)), (ppo_moe, (4, 6, 1.0))):  # two of three experts
        args = module.Args(num_experts=3, router="topk", top_k=2)
        moe = module.MoE(*arguments, "big", args)
        routing = next(p.numel() for key, p in moe.named_parameters() if "phi" in key)
        experts = sum(p.numel() for p in moe.parameters()) - routing
        assert module.count_parameters(moe, args) == (experts + routing, experts // 3 * 2 + routing)
    args = ppo_args(ppo_moe, num_experts=8, slots=2)  # per-cell tokens: 16-128-16, and a head of 1,024 inputs
    total = 37 * 16 + 8 * (17 * 128 + 129 * 16) + 16 * 16 + 1025 * 6
    assert ppo_moe.count_parameters(ppo_moe.MoE(4, 6, 1.0, "middle", args), args) == (total, total)


@pytest.mark.parametrize("architecture", ["middle", "all", "big"])
def test_match_params_matches_the_baseline(sac_moe, ppo_moe, architecture):
    """Up to rounding, the routers, and biases and borders of the experts; also on the 352 inputs of four Humanoids."""
    for module, arguments in ((sac_moe, (1, 8, 4)), (sac_moe, (1, 352, 34)), (ppo_moe, (6, 6, 1.0))):
        for n in (2, 4, 8):
            args = module.Args(num_experts=n, match_params=True, router="hardcoded", **tokens(module))
            moe, baseline = (module.MoE(*arguments, name, args) for name in (architecture, "baseline"))
            ratio = module.count_parameters(moe, args)[0] / module.count_parameters(baseline, args)[0]
            assert 0.9 < ratio < 1.15, ratio


# SAC


def test_one_task_without_experts_is_sac(sac, sac_moe):
    """The same losses and the same weights after an update as sac.py, from the same weights and noise."""
    args = sac_moe.Args(tasks=("Pendulum-v1",), actor_moe="baseline", critic_moe="baseline", task_id=False)
    plain, mine = sac.Agent(3, 2, sac.Args()), sac_moe.Agent(3, 2, args)

    def copy(there):
        c = there.critic
        for moe in (mine.critic.moe, mine.critic_target.moe):
            weights = torch.cat([c.w_obs, c.w_action], 1), c.w2, c.w3, c.b1, c.b2, c.b3
            for to, value in zip([*moe.weights, *moe.biases], weights, strict=True):
                to.data.copy_(value.data[:, None])
        layers = there.actor.trunk[0], there.actor.trunk[2], there.actor.head
        for i, layer in enumerate(layers):
            mine.actor.moe.weights[i].data.copy_(layer.weight.data.T)
            mine.actor.moe.biases[i].data.copy_(layer.bias.data)

    copy(plain)
    batch = sac.Batch(torch.randn(8, 3), torch.rand(8, 2), torch.randn(8), torch.arange(8.0) % 2, torch.randn(8, 3))
    torch.manual_seed(3)
    expected = sac.update(plain, batch, sac.Args())
    torch.manual_seed(3)
    losses = sac_moe.update(mine, sac_moe.Batch(*batch), torch.zeros(8, dtype=torch.long), args)
    for key in ("losses/critic", "losses/actor", "losses/alpha", "policy/entropy"):
        torch.testing.assert_close(losses[key].squeeze(), expected[key].squeeze(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.critic.moe.weights[1][:, 0], plain.critic.w2)
    torch.testing.assert_close(mine.critic_target.moe.weights[1][:, 0], plain.critic_target.w2)
    torch.testing.assert_close(mine.actor.moe.weights[2][0, 0].T, plain.actor.head.weight)
    torch.testing.assert_close(mine.log_alpha[0], plain.log_alpha)


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
        balance = [router.balance for router in agent.critic.moe.routers.values()]
        torch.testing.assert_close(critic_loss, (error[0] ** 2 + error[1] ** 2).mean() + 3 * sum(balance))
        action, log_prob = agent.actor.sample(batch.obs, task)
        balance = [router.balance for router in agent.actor.moe.routers.values()]
        expected = (alpha * log_prob - agent.critic(batch.obs, action, task).min(0).values).mean() + 3 * sum(balance)
        torch.testing.assert_close(actor_loss, expected)
    assert sum(balance) > 0.9


def test_batches_have_equal_shares(sac_moe):
    _, buffers = fill(sac_moe, sac_args(sac_moe, tasks=3), steps=5)
    for i, buffer in enumerate(buffers):
        buffer.reward.fill_(i)
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


def test_patches_make_a_convolution(ppo_moe):
    obs = torch.rand(3, 10, 10, 6) < 0.3
    picture, patches = ppo_moe.see(obs)
    kernel = torch.randn(16, 6, 3, 3)
    expected = F.conv2d(obs.permute(0, 3, 1, 2).float(), kernel)  # (B, 16, 8, 8)
    mine = patches @ kernel.permute(2, 3, 1, 0).reshape(54, 16)  # rows, columns, channels
    torch.testing.assert_close(mine.transpose(1, 2).view_as(expected), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(picture.view(3, 10, 10, 6).bool(), obs)


@pytest.mark.parametrize("task", ["asterix", "breakout", "freeway", "seaquest", "space_invaders"])
def test_padding_and_actions_of_each_game(ppo_moe, task):
    """The game's channels stand first, the others are empty; an action that the game does not know does nothing."""
    minatar = pytest.importorskip("minatar")
    args = ppo_moe.Args(tasks=(task, "seaquest") if task != "seaquest" else (task,))
    plain = minatar.Environment(task)
    assert plain.n_channels == ppo_moe.CHANNELS[task] and plain.num_actions() == ppo_moe.ACTIONS
    games = ppo_moe.Games([task] * (2 + ppo_moe.ACTIONS), args)
    assert games.obs.shape == (8, 10, 10, 10)
    games.reset(args, first=3)
    plain.seed(ppo_moe.episode_seed(args.seed, 3))
    plain.reset()
    rng, known = np.random.default_rng(0), plain.minimal_action_set()
    for _ in range(60):
        assert np.array_equal(games.obs[0, ..., : plain.n_channels], plain.state())
        assert not games.obs[0, ..., plain.n_channels :].any()
        action = int(rng.integers(6))
        reward, terminated = plain.act(action)
        assert games.step(0, action)[:2] == (reward, terminated)
        if terminated:
            break
    games.games[0].last_action = 5
    games.start(0)
    assert games.games[0].last_action == 0  # MinAtar's reset leaves it: sticky over the end of an episode
    for action in range(6):  # game 2 + a plays action a with the same random numbers as game 1 does nothing
        games.games[1].seed(5), games.games[2 + action].seed(5)
        games.start(1), games.start(2 + action)
        same = True
        for _ in range(8):
            games.step(1, 0), games.step(2 + action, action)
            same &= np.array_equal(games.obs[1], games.obs[2 + action])
        assert same or action in known


@pytest.mark.parametrize("gae_lambda", [0.0, 0.9])
def test_time_limit_is_bootstrapped_and_death_is_not(ppo_moe, monkeypatch, gae_lambda):
    """The advantages of a rollout are those of a plain loop over each game, backwards."""
    pytest.importorskip("minatar")
    monkeypatch.setattr(ppo_moe, "TIME_LIMIT", 7)
    args = ppo_args(ppo_moe, "baseline", tasks=("breakout",), gae_lambda=gae_lambda)
    agent, games = ppo_moe.Agent(args), ppo_moe.Games(["breakout"] * 3, args)
    games.reset(args, first=0)
    batch, episodes = ppo_moe.rollout(agent, games, 30, args)
    again = ppo_moe.Games(["breakout"] * 3, args)
    again.reset(args, first=0)
    ends, steps = [], {}

    def value(i):
        return agent.critic(*ppo_moe.see(torch.from_numpy(again.obs[i : i + 1])), batch.task[:1]).item()

    for t in range(30):
        for i in range(3):
            row = 3 * t + i
            assert np.array_equal(batch.obs[row].numpy(), again.obs[i])
            v = value(i)
            reward, terminated, truncated = again.step(i, int(batch.action[row]))
            steps[t, i] = v, reward + args.gamma * (not terminated) * value(i), terminated or truncated
            if terminated or truncated:
                ends.append((0, again.returns[i], again.lengths[i]))
                again.start(i)
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
        network_.layers[2].weight.data.normal_()
    inputs = torch.rand(40, 10, 10, 6) < 0.2, torch.arange(40) % 3
    logits = agent.actor(*ppo_moe.see(inputs[0]), inputs[1])
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
    value = agent.critic(*ppo_moe.see(inputs[0]), inputs[1])[:, 0]
    balance = [network_.routers["0"].balance for network_ in (agent.actor, agent.critic)]
    actor_loss = -sum(gains) / 40 - 0.3 * policy.entropy().mean() + 2 * balance[0]
    critic_loss = 0.7 * ((value - batch.target) ** 2).mean() + 2 * balance[1]
    first, second, metrics = ppo_moe.losses_of(agent, batch, args)
    torch.testing.assert_close(first, actor_loss)
    torch.testing.assert_close(second, critic_loss)
    assert 5 < outside < 35 and metrics["policy/clipped"].item() == pytest.approx(outside / 40)

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
    agent.actor.layers[2].bias.data += logits
    games = ppo_moe.Games(["breakout", "asterix"], args)
    games.reset(args, first=0)
    batch, _ = ppo_moe.rollout(agent, games, 40, args)
    metrics = ppo_moe.losses_of(agent, batch, args)[2]
    assert metrics["policy/kl"].abs() < 1e-6 and metrics["policy/clipped"] == 0
    assert batch.action.unique().numel() > 2


def test_evaluation_takes_the_best_action_or_draws_one(ppo_moe, monkeypatch):
    pytest.importorskip("minatar")
    args = ppo_args(ppo_moe, "baseline", tasks=("breakout",), eval_episodes=5)
    agent, played = ppo_moe.Agent(args), []
    agent.actor.layers[2].bias.data[0, 0, 3] = 1.0  # fresh networks have nearly equal logits: 0.35 against 0.13
    step = ppo_moe.Games.step
    monkeypatch.setattr(ppo_moe.Games, "step", lambda self, i, a: played.append(a) or step(self, i, a))
    ppo_moe.evaluate(agent, args, "deterministic", 0)
    assert set(played) == {3}
    played.clear()
    ppo_moe.evaluate(agent, args, "stochastic", 0)
    assert len(set(played)) == 6


def test_evaluation_gives_every_game_its_own_picture_and_task(ppo_moe, monkeypatch):
    """Also when others have ended: each task's expert has an action of its own, and the pictures are recorded."""
    pytest.importorskip("minatar")
    args = ppo_args(ppo_moe, tasks=("breakout", "asterix"), router="hardcoded", num_experts=2, eval_episodes=3)
    agent, played, seen = ppo_moe.Agent(args), [], []
    agent.actor.layers[2].bias.data[0, 0, 1] = agent.actor.layers[2].bias.data[1, 0, 3] = 10.0
    step, see = ppo_moe.Games.step, ppo_moe.see

    def record(games, i, action):
        picture = seen[-1][sum(step_ == len(seen) for step_, *_ in played)]
        played.append((len(seen), i, action, torch.equal(picture, torch.from_numpy(games.obs[i]))))
        return step(games, i, action)

    monkeypatch.setattr(ppo_moe, "see", lambda obs: seen.append(obs.clone()) or see(obs))
    monkeypatch.setattr(ppo_moe.Games, "step", record)
    rows = ppo_moe.evaluate(agent, args, "deterministic", 0)
    assert all(action == (1 if i < 3 else 3) and right for _, i, action, right in played)
    assert len({sum(i == game for _, i, *_ in played) for game in range(6)}) > 1  # some ended before others
    assert [round(row["length"] * 3) for row in rows] == [sum(i // 3 == task for _, i, *_ in played) for task in (0, 1)]


def test_evaluation_of_sac_tells_the_networks_the_task(sac_moe):
    """Each task's expert always takes an action of its own."""
    tasks = ("Pendulum-v1?max_episode_steps=4", "Pendulum-v1?max_episode_steps=5")
    args = sac_args(sac_moe, tasks=2, router="hardcoded", num_experts=2, eval_episodes=1)
    args, played = sac_moe.dataclasses.replace(args, tasks=tasks), [[], []]
    agent = sac_moe.Agent(3, 1, args)
    bias = agent.actor.moe.biases[2].data  # (1, n, 1, 2): mean and log standard deviation
    bias[0, 0, 0, 0], bias[0, 1, 0, 0] = 10.0, -10.0
    envs = sac_moe.make_envs(tasks)
    for env, actions in zip(envs, played, strict=True):
        step = env.step
        env.step = lambda action, step=step, actions=actions: actions.append(float(action[0])) or step(action)
    for policy in ("deterministic", "stochastic"):
        sac_moe.evaluate(agent, envs, args, policy, 0)
    assert len(played[0]) == 8 and len(played[1]) == 10
    assert all(a > 0.99 for a in played[0]) and all(a < -0.99 for a in played[1])


def test_frames_show_every_game_to_its_end(ppo_moe):
    pytest.importorskip("minatar")
    args, frames = ppo_moe.Args(tasks=("breakout", "asterix", "space_invaders"), eval_episodes=1), []
    rows = ppo_moe.evaluate(ppo_moe.Agent(args), args, "stochastic", 0, frames)
    assert [sum(i == game for i, _ in frames) for game in range(3)] == [row["length"] for row in rows]


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
    p = agent.actor(*ppo_moe.see(obs), task).softmax(-1)
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
    sets = {name: sac_moe.check_tasks(sac_moe.Args(tasks=(name,))).tasks for name in sac_moe.TASK_SETS}
    assert [len(tasks) for tasks in sets.values()] == [4, 8, 2]
    straight, inverted = (sac_moe.make_env(sets["target-reaching-inverted"][i]) for i in (1, 5))
    for env in (straight, inverted):
        env.reset(seed=0)
    first, second = straight.step(np.ones(2, np.float32))[0], inverted.step(-np.ones(2, np.float32))[0]
    assert np.array_equal(first, second)

"""results/gradients.py: the estimates against their closed forms and a quadrature, the statistics by hand."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load
from scipy.special import logsumexp
from scipy.stats import norm

RESULTS = Path(__file__).resolve().parent.parent / "results"


@pytest.fixture(scope="module")
def gradients():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RESULTS)
        yield load("gradients", RESULTS)


LOGITS, MEAN, STD, ALPHA = np.array([0.3, -0.2, 0.1]), np.array([-1.0, 0.1, 0.8]), np.array([0.5, 0.3, 0.7]), 0.2


def q_of(a):  # NumPy or torch
    return 1.5 * a - a**2 + (abs(a - 0.5) < 0.15) * 0.8 * (1 - (a - 0.5) ** 2 / 0.15**2) ** 2


@pytest.fixture
def bandit(gradients):
    logits, mean, std = (torch.from_numpy(x)[None] for x in (LOGITS, MEAN, STD))
    return gradients.Problem("one", logits, mean[..., None], std[..., None], ALPHA, lambda a: q_of(a.squeeze(-1)))


def softmax(logits):
    return np.exp(logits - logsumexp(logits))


def log_density(logits, u):
    """Of tanh(u), u (N,), in the textbook's form."""
    log_components = norm.logpdf(u[:, None], MEAN, STD)  # (N, K)
    return logsumexp(np.log(softmax(logits)) + log_components, axis=1) - np.log(1 - np.tanh(u) ** 2)


def objective(logits):
    """J by a quadrature over u."""
    u = np.linspace(-6, 6, 20_001)
    density = np.exp(logsumexp(np.log(softmax(logits)) + norm.logpdf(u[:, None], MEAN, STD), axis=1))
    return np.trapezoid(density * (ALPHA * log_density(logits, u) - q_of(np.tanh(u))), u)


def test_density_integrates_to_one(gradients, bandit):
    a = torch.linspace(-1, 1, 40_003, dtype=torch.float64)[1:-1]
    log_p = gradients.log_prob(bandit, bandit.logits[None], a.atanh().view(1, 1, -1, 1))
    assert float(torch.trapezoid(log_p.exp().flatten(), a)) == pytest.approx(1, abs=1e-3)


def test_exact_gradient_is_that_of_the_objective(gradients, bandit):
    steps = 1e-5 * np.eye(3)
    numeric = [(objective(LOGITS + h) - objective(LOGITS - h)) / 2e-5 for h in steps]
    assert gradients.truth(bandit).gradient[0].numpy() == pytest.approx(np.array(numeric), abs=1e-5)


def test_estimates_are_the_gradients_of_their_losses(gradients, bandit):
    """Each draw against its closed form, with the same random numbers."""
    n, rng = 50, torch.Generator().manual_seed(5)
    found = {name: g[:, 0].numpy() for name, g in gradients.estimates(bandit, n, rng).items()}
    rng = torch.Generator().manual_seed(5)
    noise = torch.randn(n, 1, 3, 1, generator=rng, dtype=torch.float64)[:, 0, :, 0].numpy()
    gumbel = -torch.empty(n, 1, 3, dtype=torch.float64).exponential_(generator=rng).log()[:, 0].numpy()
    w = softmax(LOGITS)
    for i in range(n):
        u = MEAN + STD * noise[i]
        q, logits = q_of(np.tanh(u)), LOGITS + gumbel[i]
        f, k = ALPHA * log_density(LOGITS, u) - q, logits.argmax()
        r = np.exp(np.log(w) + norm.logpdf(u[:, None], MEAN, STD))  # (actions, K)
        r /= r.sum(1, keepdims=True)
        entropy = ALPHA * (r - w)  # of alpha log pi(a_k): its derivative by the logits
        drawn = np.eye(3)[k] - w
        expected = {"marginal": w * (f - w @ f) + w @ entropy}
        expected["score"] = f[k] * drawn + entropy[k]
        expected["score, base"] = (f[k] - w @ f) * drawn + entropy[k]
        h = 1e-6
        slope = [(ALPHA * log_density(LOGITS, x) - q_of(np.tanh(x)))[0] for x in (u[k : k + 1] + h, u[k : k + 1] - h)]
        y, c = softmax(logits), (slope[0] - slope[1]) / (2 * h) * u
        expected["gumbel"] = y * (c - y @ c) + entropy[k]
        for name, best in (("freq., draws", q.argmax()), ("freq., means", q_of(np.tanh(MEAN)).argmax())):
            pull = 2 / 3 * (w - np.eye(3)[best])
            expected[name] = w * (pull - w @ pull)
        assert expected.keys() == found.keys()
        for name, g in expected.items():
            assert found[name][i] == pytest.approx(g, abs=1e-6), name


def test_which_estimates_are_unbiased(gradients, bandit):
    n = 40_000
    exact = gradients.truth(bandit).gradient
    for name, (mean, var) in gradients.moments(bandit, n, seed=0).items():
        z = ((mean - exact) / (var / n).sqrt()).abs().max()
        assert z < 4 if name in ("marginal", "score", "score, base") else z > 20, name


def test_moments_are_those_of_all_draws(gradients, bandit, monkeypatch):
    monkeypatch.setattr(gradients, "chunks", lambda problem, n: [n])
    g = gradients.estimates(bandit, 300, torch.Generator().manual_seed(7))
    for name, (mean, var) in gradients.moments(bandit, 300, seed=7).items():
        torch.testing.assert_close(mean, g[name].mean(0))
        torch.testing.assert_close(var, g[name].var(0))
    monkeypatch.undo()
    assert sum(gradients.chunks(bandit, 1_000_003)) == 1_000_003 and len(gradients.chunks(bandit, 1_000_003)) > 1


def test_truth_by_draws_tells_its_error(gradients, bandit):
    exact, drawn = gradients.truth(bandit), gradients.truth(bandit, 20_000)
    z = (drawn.gradient - exact.gradient) / drawn.error.sqrt()
    assert float(z.abs().max()) < 4 and float(z.abs().max()) > 0.01
    assert float((drawn.p - exact.p).abs().max()) < 0.01 and float(exact.error.sum()) == 0


def test_win_probability(gradients):
    """Of Gaussians, for which it is known: P(X_0 > X_1) = Phi((m_0 - m_1) / sqrt(s_0^2 + s_1^2)); ties count half."""
    nodes = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = (-0.5 * nodes**2).exp() / (-0.5 * nodes**2).exp().sum()
    q = torch.tensor([0.5, 0.0]) + nodes[:, None] * torch.tensor([1.0, 2.0])
    p = gradients.win_probability(q[:, None].double(), weight)
    assert p[0].tolist() == pytest.approx([norm.cdf(0.5 / 5**0.5), norm.cdf(-0.5 / 5**0.5)], abs=1e-3)
    q = nodes[:, None].expand(-1, 3)[:, None]
    assert gradients.win_probability(q, weight)[0].tolist() == pytest.approx([1 / 3] * 3, abs=1e-3)
    two, half = torch.tensor([[[1.0, 1.0]], [[1.0, 3.0]]]), torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert gradients.win_probability(two, half)[0].tolist() == [0.25, 0.75]


def test_theorem(gradients, bandit):
    exact = gradients.truth(bandit)
    row = gradients.theorem(bandit, exact, 40_000)
    assert row["gap"] < 0.01 and row["left"] == pytest.approx(row["right"], abs=0.01)
    wrong = exact._replace(p=bandit.logits.softmax(-1))
    assert gradients.theorem(bandit, wrong, 40_000)["gap"] > 0.05


def test_statistics_by_hand(gradients, bandit, monkeypatch):
    exact = gradients.Truth(torch.tensor([[3.0, 4.0, 0.0]]), torch.zeros(1, 3), None)
    turned, var = torch.tensor([[4.0, -3.0, 0.0]]), torch.full((1, 3), 25.0)
    fake = {"marginal": (exact.gradient, var), "score": (turned, 0 * var), "freq., draws": (2 * turned, 4 * var)}
    monkeypatch.setattr(gradients, "moments", lambda problem, n, seed: fake)
    rows = {row["estimate"]: row for row in gradients.compare(bandit, exact, 100)}
    row = rows["marginal"]
    assert (row["cosine"], row["bias"], row["variance"]) == pytest.approx((1, 0, 3))
    assert (row["evaluations"], row["per evaluation"], row["noise"]) == pytest.approx((3, 9, 3**0.5 / 10))
    row = rows["score"]
    assert (row["cosine"], row["bias"], row["per evaluation"]) == pytest.approx((0, 2**0.5, 0), abs=1e-6)
    row = rows["freq., draws"]  # scaled to norm 5; 2 less the noise 0.03
    assert (row["cosine"], row["bias"], row["variance"]) == pytest.approx((0, 1.97**0.5, 3), abs=1e-6)


def test_page_and_figure_of_a_saved_run(gradients, pmoe, tmp_path, monkeypatch):
    args = pmoe.Args(env_id="moe_envs:TargetReaching-v0?layout=mirror")
    agent = pmoe.Agent(11, 2, args)
    saved = {"script": "sac_pmoe", "args": dataclasses.asdict(args), "global_step": 1, "commit": None}
    path = tmp_path / "Task" / "sac_pmoe" / "s1.pt"
    path.parent.mkdir(parents=True)
    state = {k: v for k, v in agent.state_dict().items() if k.startswith(("actor.", "critic.", "log_alpha"))}
    torch.save(saved | {"agent": state}, path)

    problem = gradients.trained(path)
    assert problem.mean.shape == (64, 4, 2) and problem.alpha == pytest.approx(0.1)
    action = torch.rand(5, 64, 4, 2) * 2 - 1
    q = problem.q(action)
    assert q.shape == (5, 64, 4) and float(q.std()) > 0
    for n, m in ((0, 0), (3, 1), (4, 3)):  # every action is asked about in its own state
        torch.testing.assert_close(problem.q(action[n : n + 1, :, m : m + 1])[0, :, 0], q[n, :, m])

    monkeypatch.setattr(gradients, "EXACT", 10)
    monkeypatch.setattr(gradients.bandits, "__defaults__", (4, 0))  # states
    for _ in range(2):
        text = gradients.main([path], tmp_path, draws=10, draws_trained=5).read_text()
        pictures = {(tmp_path / "figures" / "gradients.png").read_bytes(), text.encode()}
    assert len(pictures) == 2 and text.count("| Task, sac_pmoe |") == 7 and "nan" not in text
    del state["log_alpha"]
    torch.save(saved | {"agent": state}, path)
    with pytest.raises(ValueError, match="has no log_alpha"):
        gradients.main([path], tmp_path)

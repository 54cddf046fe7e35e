"""Compares the gradients that a mixture's gate can learn by: bias, variance and direction of each.

python results/gradients.py                                             # HalfCheetah and the mirror layout
python results/gradients.py results/policies/HalfCheetah-v5/sac_pmoe/s1.pt

A state has a mixture of K Gaussians, w = softmax(l), and a critic Q. The objective, to be minimised, is

    J = sum_k w_k E_k f(a),  f(a) = alpha log pi(a) - Q(a),  log pi(a) = logsumexp_k(log w_k + log N_k(u)) - c(u),

a = tanh(u), c(u) = sum_d log(1 - a_d^2). Its gradient is dJ/dl_m = w_m (F_m - sum_k w_k F_k), where F_k = E_k f. It is
compared with these estimates, each from one draw a_k of every expert and k ~ w; sg stops the gradient:

    estimate       loss                                                 evaluations of Q
    marginal       sum_k w_k f(a_k)                                     K
    score          sg[f(a_k)] log w_k + f(a_k)                          1
    score, base    sg[f(a_k) - sum_j w_j f(a_j)] log w_k + f(a_k)       K
    gumbel         f(tanh(sum_k z_k u_k)), z straight through, tau 1    1, and its gradient
    freq., draws   mean_k (w_k - 1[k = argmax_j Q(a_j)])^2              K
    freq., means   the same with Q(tanh(mu_j))                          K

The last two are the frequency approximate gradient of PMOE (Ren et al. 2021, arXiv 2104.09122), the others minimise J.

Problems: 64 bandits with K = 3, one action and a sharp Q (two bumps), and 64 with a smooth one (a parabola), where a
quadrature gives the exact gradient. Then 64 states of episodes that a trained policy flew, with its own critic (the
smaller of the two) and temperature; there the mean of 4,096 other draws of w_m (f(a_m) - sum_k w_k f(a_k)) stands for
the exact one. J has the entropy of the mixture; sac_pmoe.py maximises that of the drawn expert.

The numbers take the 64 states as one vector. Bias is relative to the norm of the exact gradient, variance, of one draw,
to its square. Of the bias, the noise that a mean of finitely many draws has is subtracted (in squares), and given. The
frequency gradient has another scale than that of J, so here it is scaled to the same norm.

Theorem 3.1 of the PMOE paper: with p_k the probability that expert k is the best, and v the one-hot of the best expert,
E||v - w||^2 = ||p - w||^2 + sum_k p_k (1 - p_k), so that the gradient is that of ||p - w||^2. The second table has the
left side from draws and the right side with p from a quadrature, or from other draws.

Writes results/gradients.md and results/figures/gradients.png.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from policy import gaussians, load, visited
from torch.nn.functional import one_hot, softplus

FOLDER = Path(__file__).resolve().parent
STATES, TAU, EXACT, SETTLED = 64, 1.0, 4096, 0.3
EVALUATIONS = {  # of Q, for one draw; K where it is None
    "marginal": None,
    "score": 1,
    "score, base": None,
    "gumbel": 1,
    "freq., draws": None,
    "freq., means": None,
}


class Problem(NamedTuple):
    """S states, the mixture and the critic in each."""

    name: str
    logits: torch.Tensor  # (S, K)
    mean: torch.Tensor  # (S, K, A), of u
    std: torch.Tensor  # (S, K, A)
    alpha: float
    q: Callable[[torch.Tensor], torch.Tensor]  # actions (N, S, M, A) -> (N, S, M)


def bandits(kind: str, count: int = STATES, seed: int = 0) -> Problem:
    """Mixtures of three Gaussians with one action, and a critic that is sharp or smooth."""
    rng = torch.Generator().manual_seed(seed)
    logits, mean = torch.randn(2, count, 3, generator=rng, dtype=torch.float64)
    std = 0.2 + 0.6 * torch.rand(count, 3, generator=rng, dtype=torch.float64)
    low, high = torch.rand(2, count, 1, generator=rng, dtype=torch.float64)  # the bumps are at low - 1 and high

    def sharp(action: torch.Tensor) -> torch.Tensor:
        a = action.squeeze(-1)
        return (-(((a - high) / 0.1) ** 2)).exp() + 0.7 * (-(((a + 1 - low) / 0.1) ** 2)).exp()

    def smooth(action: torch.Tensor) -> torch.Tensor:
        return -((action.squeeze(-1) - high) ** 2)

    q = {"sharp": sharp, "smooth": smooth}[kind]
    return Problem(f"bandits, {kind} Q", logits, mean[..., None], std[..., None], 0.05, q)


def trained(path: Path) -> Problem:
    """States that the policy of a file visits, with its critic."""
    saved = load(path, parts=("actor.", "critic.", "log_alpha"))
    agent, obs = saved.agent.requires_grad_(False), visited(saved, episodes=3, count=STATES)
    policy = gaussians(agent.actor, obs)

    def q(action: torch.Tensor) -> torch.Tensor:
        n, s, m, a = action.shape  # the critic wants K actions a state
        value = agent.critic(obs, action.transpose(0, 1).reshape(s, n * m, a)).amin(0)
        return value.view(s, n, m).transpose(0, 1)

    name = f"{path.parts[-3]}, {path.parts[-2]}"
    return Problem(name, policy.w.log(), policy.mean, policy.std, agent.log_alpha.exp().item(), q)


def log_prob(problem: Problem, logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Log density of a = tanh(u) under the mixture; logits (N, S, K), u (N, S, M, A) -> (N, S, M)."""
    mean, std = problem.mean[:, None], problem.std[:, None]  # (S, 1, K, A)
    log_normal = -0.5 * ((u[..., None, :] - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    log_mixture = (logits.log_softmax(-1)[..., None, :] + log_normal.sum(-1)).logsumexp(-1)
    return log_mixture - 2 * (math.log(2) - u - softplus(-2 * u)).sum(-1)


def estimates(problem: Problem, n: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """n draws of each gradient with respect to the logits, (n, S, K)."""
    logits = problem.logits.expand(n, -1, -1).clone().requires_grad_()
    w, log_w = logits.softmax(-1), logits.log_softmax(-1)
    noise = torch.randn(n, *problem.mean.shape, generator=rng, dtype=problem.mean.dtype)
    u = problem.mean + problem.std * noise  # (n, S, K, A)
    with torch.no_grad():
        q, q_of_means = problem.q(u.tanh()), problem.q(problem.mean.tanh()[None])
    f = problem.alpha * log_prob(problem, logits, u) - q  # (n, S, K)
    value = (w * f).sum(-1)  # (n, S)

    gumbel = -torch.empty_like(w).exponential_(generator=rng).log()
    k = (logits + gumbel).argmax(-1, keepdim=True)  # k ~ w, (n, S, 1)
    f_k, log_w_k = f.gather(-1, k).squeeze(-1), log_w.gather(-1, k).squeeze(-1)
    y = ((logits + gumbel) / TAU).softmax(-1)
    z = one_hot(k.squeeze(-1), w.shape[-1]) + y - y.detach()
    mixed = (z[..., None] * u).sum(-2, keepdim=True)  # (n, S, 1, A): in value the drawn expert's u

    def frequency(q: torch.Tensor) -> torch.Tensor:
        return (w - one_hot(q.argmax(-1), w.shape[-1])).square().mean(-1)

    losses = {
        "marginal": value,
        "score": f_k.detach() * log_w_k + f_k,
        "score, base": (f_k - value).detach() * log_w_k + f_k,
        "gumbel": (problem.alpha * log_prob(problem, logits, mixed) - problem.q(mixed.tanh())).squeeze(-1),
        "freq., draws": frequency(q),
        "freq., means": frequency(q_of_means),
    }
    return {name: torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for name, loss in losses.items()}


def chunks(problem: Problem, n: int) -> list[int]:
    """n in parts that need some 100 MB."""
    size = max(1, min(n, 2_000_000 // (problem.mean.numel() * problem.mean.shape[1])))
    return [size] * (n // size) + [n % size] * (n % size > 0)


def moments(problem: Problem, n: int, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and variance (S, K) of each estimate, from n draws."""
    rng, first, second = torch.Generator().manual_seed(seed), {}, {}
    for size in chunks(problem, n):
        for name, g in estimates(problem, size, rng).items():
            first[name] = first.get(name, 0) + g.double().sum(0)
            second[name] = second.get(name, 0) + g.double().square().sum(0)
    # What rounding leaves of a variance of 0 is some 1e-16 of the second moment, in single precision 1e-9 of few draws
    square = {name: second[name] - x**2 / n for name, x in first.items()}
    return {name: (x / n, square[name] * (square[name] > 1e-9 * second[name]) / (n - 1)) for name, x in first.items()}


class Truth(NamedTuple):
    gradient: torch.Tensor  # (S, K)
    error: torch.Tensor  # (S, K): squared standard error; 0 of a quadrature
    p: torch.Tensor  # (S, K): probability that an expert's draw is the best


def truth(problem: Problem, n: int | None = None, seed: int = 1) -> Truth:
    """The exact gradient, from n draws, or where n is None and A = 1 from a quadrature."""
    w, dtype = problem.logits.softmax(-1), problem.mean.dtype
    if n is None:
        eps = torch.linspace(-8, 8, 4001, dtype=dtype)
        weight = (-0.5 * eps**2).exp()
        weight, parts = weight / weight.sum(), [eps.view(-1, 1, 1, 1).expand(-1, *problem.mean.shape)]
    else:
        rng, weight = torch.Generator().manual_seed(seed), torch.full((n,), 1 / n, dtype=torch.float64)
        parts = (torch.randn(size, *problem.mean.shape, generator=rng, dtype=dtype) for size in chunks(problem, n))
    f, q = [], []
    with torch.no_grad():
        for noise in parts:
            u = problem.mean + problem.std * noise
            q.append(problem.q(u.tanh()).double())
            f.append(problem.alpha * log_prob(problem, problem.logits[None], u) - q[-1])
    f, q = torch.cat(f).double(), torch.cat(q)
    g = w * (f - (w * f).sum(-1, keepdim=True))  # (N, S, K)
    gradient = torch.einsum("n,nsk->sk", weight, g)
    error = torch.zeros_like(gradient) if n is None else g.var(0) / n
    return Truth(gradient, error, win_probability(q, weight))


def win_probability(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """P(expert k's draw has the largest Q) (S, K), from Q of N draws or nodes (N, S, K) with weights (N,).

    p_k = E_k prod_{j != k} P(Q_j < Q_k): each draw of one expert meets all draws of the others. Ties count half.
    """
    q = q.permute(1, 2, 0).contiguous()  # (S, K, N)
    values, order = q.sort()
    zero = torch.zeros(*q.shape[:2], 1, dtype=weight.dtype)
    below = torch.cat([zero, weight[order].cumsum(-1)], -1)  # (S, K, N + 1): weight of the 0, 1, ..., N smallest
    wins = weight.expand_as(q).clone()
    for j in range(q.shape[1]):
        for k in range(q.shape[1]):
            if j != k:  # P(Q_j < Q_k), and half of P(Q_j = Q_k)
                row, column = values[:, j].contiguous(), q[:, k].contiguous()
                ends = (torch.searchsorted(row, column, right=right) for right in (False, True))
                wins[:, k] *= sum(below[:, j].gather(1, end) for end in ends) / 2
    return wins.sum(-1)


def compare(problem: Problem, exact: Truth, n: int) -> list[dict]:
    """A row for each estimate; all states are one vector."""
    rows, size = [], exact.gradient.square().sum()
    for name, (g, var) in moments(problem, n, seed=2).items():
        scale = (size / g.square().sum()).sqrt() if name.startswith("freq") else 1.0
        noise = (scale**2 * var / n + exact.error).sum()
        bias = ((scale * g - exact.gradient).square().sum() - noise).clamp(min=0)
        variance = scale**2 * var.sum() / size
        evaluations = EVALUATIONS[name] or g.shape[1]
        cosines = torch.cosine_similarity(g, exact.gradient, dim=1)  # of each state
        cosine = torch.cosine_similarity(g.flatten(), exact.gradient.flatten(), dim=0)
        row = {"estimate": name, "evaluations": evaluations, "cosine": cosine, "bias": (bias / size).sqrt()}
        row |= {"noise": (noise / size).sqrt(), "variance": variance, "per evaluation": variance * evaluations}
        rows.append({key: x if isinstance(x, str | int) else float(x) for key, x in row.items()} | {"cosines": cosines})
    return rows


def theorem(problem: Problem, exact: Truth, n: int) -> dict:
    """Both sides of E||v - w||^2 = ||p - w||^2 + sum_k p_k (1 - p_k), mean over the states; v from n other draws."""
    w, total, rng = problem.logits.softmax(-1).double(), 0.0, torch.Generator().manual_seed(3)
    with torch.no_grad():
        for size in chunks(problem, n):
            noise = torch.randn(size, *problem.mean.shape, generator=rng, dtype=problem.mean.dtype)
            best = problem.q((problem.mean + problem.std * noise).tanh()).argmax(-1)
            total += (one_hot(best, w.shape[1]) - w).square().sum(-1).sum(0)  # (S,)
    right = (exact.p - w).square().sum(-1) + (exact.p * (1 - exact.p)).sum(-1)
    gap = (total / n - right).abs().max()
    return {"problem": problem.name, "left": float(total.mean() / n), "right": float(right.mean()), "gap": float(gap)}


def draw(tables: dict[str, list[dict]], file: Path):
    """Above the direction in each state, below the variance; a column for each problem."""
    names, colours = list(EVALUATIONS), ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7")
    figure, axes = plt.subplots(2, len(tables), sharey=True, sharex="row", squeeze=False, layout="constrained")
    figure.set_size_inches(1.2 + 2.3 * len(tables), 4.6)
    for (above, below), (problem, rows) in zip(axes.T, tables.items(), strict=True):
        above.set_title(problem.replace(", ", "\n"), fontsize=9)
        style = {"widths": 0.6, "whis": (5, 95), "showfliers": False, "medianprops": {"color": "black"}}
        data = [row["cosines"].numpy() if row["noise"] <= SETTLED else [] for row in rows]
        boxes = above.boxplot(data, orientation="horizontal", patch_artist=True, **style)
        for box, colour in zip(boxes["boxes"], colours, strict=True):
            box.set_facecolor(colour)
        above.axvline(0, color="#888888", linewidth=0.8)
        below.scatter([row["per evaluation"] or math.nan for row in rows], range(1, len(rows) + 1), color=colours)
        below.set_xscale("log")
        for place, row in enumerate(rows, 1):
            if row["noise"] > SETTLED:
                above.text(0.03, place, "not settled", transform=above.get_yaxis_transform(), va="center", fontsize=8)
            if not row["per evaluation"]:
                below.text(0.03, place, "0", transform=below.get_yaxis_transform(), va="center", fontsize=8)
        for axis, label in ((above, "cosine with the exact gradient"), (below, "variance x evaluations")):
            axis.set_yticks(range(1, len(names) + 1), names)
            axis.set_xlabel(label, fontsize=8)
            axis.tick_params(labelsize=8)
            axis.grid(axis="x", color="#DDDDDD")
            axis.set_axisbelow(True)
    axes[0, 0].invert_yaxis()
    figure.savefig(file, dpi=150, metadata={"Software": None})
    plt.close(figure)


def page(tables: dict[str, list[dict]], theorems: list[dict]) -> str:
    """results/gradients.md."""
    text = f"""# Gradients of a mixture's gate

Written by `python results/gradients.py`; its docstring defines the estimates, the problems and the numbers.

![Direction and variance of each gradient](figures/gradients.png)

Above: cosine of the mean gradient with the exact one in each of {STATES} states (box: quartiles, whiskers: 5% and 95%).
Below: variance of one draw, relative to the squared norm of the exact gradient, times the evaluations of Q it needs.
The exact gradient of the bandits is a quadrature's, that of a trained policy a mean of {EXACT:,} other draws; the rest
are means of draws. *Not settled*: the noise of the bias is above {SETTLED}, so the mean needs more draws than these.
With two experts, as on HalfCheetah, the gate has one direction, so that a state's cosine is 1 or -1.

| problem | estimate | evaluations of Q | cosine | bias | noise of the bias | variance | variance x evaluations |
|---|---|---:|---:|---:|---:|---:|---:|
"""
    for problem, rows in tables.items():
        for row in rows:
            numbers = [f"{row['cosine']:.3f}", f"{row['bias']:.3g}"]
            numbers = ["not settled"] * 2 if row["noise"] > SETTLED else numbers
            numbers += [f"{row[name]:.3g}" for name in ("noise", "variance", "per evaluation")]
            text += f"| {problem} | {row['estimate']} | {row['evaluations']} | {' | '.join(numbers)} |\n"
    text += """
Theorem 3.1 of the PMOE paper, means over the states, and the largest difference of a state:

| problem | E\\|\\|v - w\\|\\|^2 | \\|\\|p - w\\|\\|^2 + sum p (1 - p) | largest difference |
|---|---:|---:|---:|
"""
    for row in theorems:
        text += f"| {row['problem']} | {row['left']:.4f} | {row['right']:.4f} | {row['gap']:.4f} |\n"
    return text


def main(paths: list[Path], folder: Path = FOLDER, draws: int = 20_000, draws_trained: int = 2_048) -> Path:
    torch.set_num_threads(1)
    tables, theorems = {}, []
    for kind in ("sharp", "smooth", *paths):
        known = isinstance(kind, str)
        problem, n = (bandits(kind), draws) if known else (trained(kind), draws_trained)
        exact = truth(problem, None if known else EXACT)
        tables[problem.name] = compare(problem, exact, n)
        theorems.append(theorem(problem, exact, n))
    (folder / "figures").mkdir(exist_ok=True)
    draw(tables, folder / "figures" / "gradients.png")
    file = folder / "gradients.md"
    file.write_text(page(tables, theorems))
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [FOLDER / f"policies/{name}/sac_pmoe/s1.pt" for name in ("HalfCheetah-v5", "TargetReaching-v0-mirror")]
    parser.add_argument("policies", type=Path, nargs="*", default=known, help="files that have the critics, too")
    try:
        print(main(parser.parse_args().policies))
    except (OSError, ValueError) as error:
        parser.exit(2, f"gradients.py: {error}\n")

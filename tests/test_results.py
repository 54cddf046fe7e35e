"""The scripts under results/: statistics by hand, what the benchmark decides, and figures that repeat to the byte."""

import csv
import functools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from conftest import load
from torch.utils.tensorboard import SummaryWriter

RESULTS = Path(__file__).resolve().parent.parent / "results"


@pytest.fixture(scope="module")
def plot():
    pytest.importorskip("matplotlib")
    module = load("plot", RESULTS)
    module.DPI = 30  # what is drawn does not matter here
    return module


benchmark = load("benchmark", RESULTS)
script_of = functools.cache(load)


def make_run(root, env="Env-v0", label="sac", seed=1, step=1000, total=1000, success=math.nan, k=None, **trajectories):
    folder = root / "runs" / env / label / f"s{seed}"
    folder.mkdir(parents=True)
    run = {
        "script": "sac",
        "command": "python algos/sac.py",
        "args": {"seed": seed, "total_timesteps": total, "eval_episodes": 10, "learning_starts": 500},
        "commit": "0123456789",
        "dirty": {2: True, 10: None}.get(seed, False),  # None: not in a repository
        "versions": {"torch": "2"},
        "machine": "one",
        "global_step": step,
        "wall_time": 60.0,
        "steps_per_second": 100.0,
    }
    run["args"] |= {"num_experts": k} if k else {}
    (folder / "run.json").write_text(json.dumps(run))
    lines = ["global_step,policy,episodes,return,return_std,length,success"]
    lines += [f"{t},deterministic,10,{seed * t},0.0,5.0,{success}" for t in (500, 1000)]
    lines += [f"1000,stochastic,10,{seed * 900},0.0,5.0,{success}", ""]
    (folder / "eval.csv").write_text("\n".join(lines))
    if trajectories:
        lines = [f"{panel},{row}" for panel, rows in trajectories.items() for row in rows]
        (folder / "trajectories.csv").write_text("\n".join(["panel,episode,step,x,y", *lines, ""]))
    return folder


# Statistics


@pytest.mark.parametrize(
    "values, expected",
    [([7], 7), ([0, 1, 5], 2), ([100, 1, 2, -50], 1.5), ([0, 0, 1, 1, 1], 2 / 3), (range(8), 3.5)],
)
def test_iqm_drops_a_quarter_at_each_end_rounded_down(plot, values, expected):
    assert plot.iqm(np.array(values, float)) == pytest.approx(expected)
    assert plot.iqm(np.array(values, float)[::-1, None] + [0, 10]) == pytest.approx([expected, expected + 10])


def test_interval_of_two_seeds(plot):
    # means of two draws from {0, 1}: 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
    assert plot.interval(np.array([0.0, 1.0])) == pytest.approx([0, 1])
    assert plot.interval(np.full(5, 3.0)) == pytest.approx([3, 3])


def test_interval_of_a_mean_is_near_the_normal_one(plot):
    values = np.random.default_rng(1).normal(size=100)
    width = 1.96 * values.std() / 10
    expected = [values.mean() - width, values.mean() + width]
    assert plot.interval(values, plot.mean) == pytest.approx(expected, abs=0.03)


def test_interval_resamples_whole_curves_and_repeats(plot):
    values = np.array([[0.0, 10.0], [1.0, 11.0], [5.0, 15.0]])
    low_high = plot.interval(values)
    assert low_high.shape == (2, 2)
    assert low_high[:, 1] == pytest.approx(low_high[:, 0] + 10)
    assert (plot.interval(values) == low_high).all()


# Benchmark


def test_benchmark_decides_by_run_json_and_checkpoint(tmp_path):
    finished = make_run(tmp_path, seed=1)
    broken = make_run(tmp_path, seed=2, step=400)
    (broken / "checkpoint.pt").touch()
    lost = make_run(tmp_path, seed=3, step=400)
    longer = make_run(tmp_path, seed=4, step=1000, total=2000)
    (longer / "checkpoint.pt").touch()
    folders = [finished, broken, lost, longer, tmp_path / "none"]
    assert [benchmark.decide(f) for f in folders] == ["skip", "resume", "start", "resume", "start"]


def test_benchmark_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "REPOSITORY", tmp_path)
    broken = make_run(tmp_path / "results", env="E", label="b", seed=2, step=400)
    (broken / "checkpoint.pt").touch()
    suite = benchmark.Suite("E", "--total-timesteps 9", range(1, 3), {"a": "sac", "b": "sac_pmoe --num-experts 2"})
    plan = benchmark.plan(suite)
    assert [f"{decision} {' '.join(command[1:])}" for _, decision, command in plan] == [
        "start algos/sac.py --total-timesteps 9 --seed 1 --run-dir results/runs/E/a/s1",
        "start algos/sac_pmoe.py --total-timesteps 9 --num-experts 2 --seed 1 --run-dir results/runs/E/b/s1",
        "start algos/sac.py --total-timesteps 9 --seed 2 --run-dir results/runs/E/a/s2",
        "resume algos/sac_pmoe.py --resume results/runs/E/b/s2",
    ]


@pytest.mark.parametrize("suite", benchmark.SUITES)
def test_suites_only_use_flags_that_their_scripts_have(suite, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "REPOSITORY", tmp_path)  # no runs there: all would start
    monkeypatch.setattr(sys, "argv", ["benchmark.py", suite, "--dry-run", "--only", "/s1"])
    assert benchmark.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and all("--seed 1 " in line for line in lines)
    for line in lines:
        decision, script, *words = line.split()
        module = script_of(Path(script).stem)
        monkeypatch.setitem(sys.modules, module.SCRIPT, module)  # tyro reads the comments from the source
        args = module.tyro.cli(module.Args, args=words)
        assert decision == "start" and args.seed == 1 and args.run_dir.endswith("/s1")


def test_benchmark_writes_what_is_missing_beside_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "REPOSITORY", tmp_path)
    made = []

    def run(command, **_):
        made.append(command[1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    for env, inputs, expected in (
        ("HalfCheetah-v5", ("events.out.tfevents.1", "checkpoint.pt"), ["results/scalars.py"]),
        ("TargetReaching-v0-fixed", ("checkpoint.pt", "scalars.csv"), ["results/trajectories.py"]),
        ("TargetReaching-v0-8-tasks", ("events.out.tfevents.1", "checkpoint.pt", "moe.csv"), ["results/scalars.py"]),
        ("Hopper-v5-ppo", ("events.out.tfevents.1", "scalars.csv"), []),
    ):
        run_dir = benchmark.RUNS / env / "label" / "s1"
        (tmp_path / run_dir).mkdir(parents=True)
        for name in inputs:
            (tmp_path / run_dir / name).touch()
        made.clear()
        assert benchmark.extras(run_dir) and made == expected


def test_benchmark_leaves_a_run_alone_that_another_process_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "REPOSITORY", tmp_path)
    command = ["sleep", "5"]
    first = benchmark.start(Path("s1"), "start", command)
    try:
        assert benchmark.start(Path("s1"), "start", command) is None
    finally:
        first.kill()
        first.wait()
    second = benchmark.start(Path("s1"), "start", ["true"])
    assert second.wait() == 0


# Figures and tables


def test_a_label_of_ppo_looks_the_same_in_every_figure(plot):
    some, every = plot.style({"ppo": [], "ppo_pmoe-ppo": []}), plot.style(dict.fromkeys(plot.PPO_LABELS))
    assert all(every[label] == look for label, look in some.items())
    assert len({look["color"] for look in every.values()}) == len(plot.PPO_LABELS)


def test_the_gates_entropy_is_a_share_of_the_largest(plot, tmp_path):
    for label, k, entropy in (("a", 4, math.log(2)), ("b", 1, 0.0)):
        folder = make_run(tmp_path, label=label, k=k)
        lines = ["global_step,policy/std,moe/gate_entropy,moe/expert_distance", f"1000,0.3,{entropy},0.2", ""]
        (folder / "scalars.csv").write_text("\n".join(lines))
    table = plot.table_of_scalars(plot.read_runs(tmp_path / "runs")["Env-v0"])
    assert table[2:] == ["| a | 1 | 0.300 | - | 0.200 | 0.500 |", "| b | 1 | 0.300 | - | - | - |"]  # of one expert


def test_plot_writes_figures_and_a_page_and_repeats_to_the_byte(plot, tmp_path):
    flight = ["0,0,-4.50,-4.50", "0,2,-2.00,-4.00", "0,3,2.00,-4.00", "0,4,2.90,3.00"]
    panels = {"stochastic": flight, "exploration": ["0,0,-4.50,-4.50", "1,900,1.00,1.00"]}
    for seed in (1, 2, 10):
        make_run(tmp_path, env="Reach", label="sac", seed=seed, success=float(seed == 1), **panels)
        other = {"stochastic": [*flight, "1,0,-4.50,-4.50", "1,4,-4.40,2.00"], "expert_0": flight, "expert_1": flight}
        mix = make_run(tmp_path, env="Reach", label="mix", seed=seed, k=2, success=0.0, **panels | other)
        lines = ["global_step,moe/expert_distance,policy/std", "500,0.5,1", f"1000,{seed / 4},0.3", ""]
        (mix / "scalars.csv").write_text("\n".join(lines))
        make_run(tmp_path, env="Walk", seed=seed)
    make_run(tmp_path, env="Walk", seed=3, step=400)  # not finished
    (tmp_path / "findings.md").write_text("## What we found\n\nNothing.\n")

    def write():
        plot.main(tmp_path)
        return {p.name: p.read_bytes() for p in (*(tmp_path / "figures").iterdir(), tmp_path / "README.md")}

    first = write()
    names = [
        "README.md",
        "Reach-exploration.png",
        "Reach-policies.png",
        "Reach-trajectories.png",
        "Reach.png",
        "Walk.png",
    ]
    assert sorted(first) == names
    (tmp_path / "figures" / "old.png").touch()  # of a suite that is gone
    assert write() == first
    page = first["README.md"].decode()
    assert "## What we found\n\nNothing.\n" in page
    row = next(line for line in page.split("## Walk")[1].splitlines() if line.startswith("| sac"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["sac", "3", "1,000"]
    assert cells[3].startswith("4333.3 [")  # (1000 + 2000 + 10000) / 3
    assert cells[5].startswith("3250.0 [")  # three quarters of them: the evaluations at 500 and 1000
    assert cells[7:] == ["-", "-", "100", "1.0", "0123456, 0123456+"]
    assert "Seeds of each label: 1, 2, 10." in page
    assert "| 0.33 [0.00, 1.00] |" in page
    assert "on both sides: 3 of 6, all seeds counted" in page
    assert "| mix | 3 | 0.300 to 0.300 | - | 0.250 to 2.500 | - |" in page


class Falling(gym.Env):
    """Its pitch, the second of two numbers, is pi after 200 steps, and before where it is 0."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (2,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.array([0, math.pi * (self.steps > 200)], np.float32), 1.0, False, False, {}


gym.register("Falling-v0", Falling, max_episode_steps=250)


def test_gait_is_the_pitch_after_the_first_steps(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    ppo = script_of("ppo")
    sizes = dict(total_timesteps=8, num_envs=2, num_steps=4, num_minibatches=2, eval_episodes=1)
    ppo.main(ppo.Args(env_id="Falling-v0", run_dir=str(tmp_path), **sizes))
    table = list(csv.DictReader(open(load("gait", RESULTS).main(tmp_path))))
    assert [row["policy"] for row in table] == ["deterministic"] * 3 + ["stochastic"] * 3
    assert {(row["return"], row["upright"]) for row in table} == {("250.0", "-1.000")}


def test_scalars_of_a_run_that_was_resumed(tmp_path):
    scalars = load("scalars", RESULTS)
    for first, last in ((0, 60), (40, 120)):  # the second went back to step 40
        with SummaryWriter(tmp_path, purge_step=first) as writer:
            for step in range(first, last):
                writer.add_scalar("policy/std", step + (0.5 if first else 0), step)
                for name in ("losses/actor", "losses/q", "moe/usage_0"):
                    writer.add_scalar(name, 1, step)
                if step % 2:
                    writer.add_scalar("charts/episodic_return", step, step)
    scalars.main(tmp_path)
    rows = list(csv.reader(open(tmp_path / "scalars.csv")))
    assert rows[0] == ["global_step", "charts/episodic_return", "losses/q", "moe/usage_0", "policy/std"]
    assert [row[:2] for row in rows[1:5]] == [["0", "nan"], ["2", "1"], ["5", "4"], ["7", "7"]]  # of 1; 3 and 5; 7
    (tmp_path / "moe.csv").touch()  # a run of several tasks
    scalars.main(tmp_path)
    head, *lines = (tmp_path / "scalars.csv").read_text().splitlines()
    rows = [tuple(map(float, line.split(","))) for line in lines]
    assert head == "global_step,policy/std" and len(rows) == scalars.POINTS
    assert all(value == step + 0.5 * (step >= 40) for step, value in rows) and rows[0][0] == 0 and rows[-1][0] == 119


def make_run_of_tasks(root, label, seed, protocol="multitask", experts=("actor", "critic"), env="Games", **args):
    """Two tasks; returns seed * step + task, dormant neurons step / 4000."""
    folder = make_run(root, env=env, label=label, seed=seed)
    run = json.loads((folder / "run.json").read_text())
    run["args"] |= {"tasks": ["left", "right"], "protocol": protocol, "cycles": 1, "num_experts": 2} | args
    run["args"] |= {f"{network}_moe": "big" if network in experts else "baseline" for network in ("actor", "critic")}
    run["parameters"] = {"actor": {"total": 5000, "active": 3000}, "critic": {"total": 4000, "active": 2000}}
    (folder / "run.json").write_text(json.dumps(run))
    lines = ["global_step,policy,task,episodes,return,return_std,length,success"]
    lines += [f"{t},deterministic,{task},10,{seed * t + task},0.0,5.0,nan" for t in (500, 1000) for task in (0, 1)]
    (folder / "eval.csv").write_text("\n".join([*lines, ""]))
    lines = ["global_step,network,metric,task,item,value"]
    for t in (500, 1000):
        for network, rank in (("actor", 10), ("critic", 20)):
            share = t / 4000 if experts else t / 2000
            lines += [f"{t},{network},dormant_0.025,,total,{share}", f"{t},{network},rank,,,{rank * seed}"]
            lines += [f"{t},{network},norm,,,1.5", f"{t},{network},width,,,64", f"{t},{network},cosine,0,1,-0.5"]
            lines.append(f"{t},{network},dormant_0.025,1,total,0.9")  # on the states of one task
            if network in experts:
                lines += [f"{t},{network},router1,{i},{j},{(i == j) * 0.25}" for i in (0, 1) for j in (0, 1)]
    (folder / "moe.csv").write_text("\n".join([*lines, ""]))


def test_plot_of_several_tasks(plot, tmp_path):
    for seed in (1, 3):
        make_run_of_tasks(tmp_path, "multitask-baseline", seed, experts=())
        make_run_of_tasks(tmp_path, "multitask-big", seed)
        make_run_of_tasks(tmp_path, "continual-baseline", seed, "continual", experts=())
    plot.main(tmp_path)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    both = {f"Games-{p}{part}.png" for p in ("multitask", "continual") for part in ("", "-networks")}
    assert names == both | {"Games-multitask-experts.png"}
    page = (tmp_path / "README.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| multitask-big")]
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells[:3] == ["multitask-big", "2", "2000.0 [1000.0, 3000.0]"] and cells[4].startswith("1.00 [0.50, 1.50")
    measured = ["0.25 / 0.25", "20 / 40", "64 / 64", "-0.50 / -0.50", "0.005 / 0.004", "0.003 / 0.002"]
    assert cells[5:11] == measured
    assert "| continual-baseline | 1000.0 -> 2000.0 | 2001.0 -> 2001.0 |" in page
    run = plot.read_run(tmp_path / "runs" / "Games" / "multitask-big" / "s1")
    assert plot.routing(run, "critic").tolist() == [[1, 0], [0, 1]]  # shares: those of top-k do not sum to 1


def test_plot_of_several_architectures_and_of_experts_in_one_network(plot, tmp_path):
    make_run_of_tasks(tmp_path, "multitask-baseline", 1, experts=())
    make_run_of_tasks(tmp_path, "multitask-big", 1, experts=("actor",))
    make_run_of_tasks(tmp_path, "multitask-middle", 1, experts=("critic",))
    path = tmp_path / "runs" / "Games" / "multitask-middle" / "s1" / "run.json"
    path.write_text(path.read_text().replace('"critic_moe": "big"', '"critic_moe": "middle"'))
    plot.main(tmp_path)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    parts = {f"-{a}{b}" for a in ("big", "middle") for b in ("", "-networks", "-experts")}
    assert names == {f"Games-multitask{part}.png" for part in parts}


def test_claims_compare_labels(plot, tmp_path):
    for seed in (1, 2, 4):
        for protocol in ("multitask", "continual"):
            for kind, experts in (("baseline", ()), ("softmoe-big", ("actor", "critic"))):
                make_run_of_tasks(tmp_path, f"{protocol}-{kind}", seed, protocol, experts, env=plot.MINATAR)
        forgotten = tmp_path / "runs" / plot.MINATAR / "continual-softmoe-big" / f"s{seed}" / "eval.csv"
        rows = forgotten.read_text().replace(f"1000,deterministic,0,10,{seed * 1000}", "1000,deterministic,0,10,0")
        forgotten.write_text(rows)  # after its phase, so it does not count
        unlearned = tmp_path / "runs" / plot.MINATAR / "multitask-baseline" / f"s{seed}" / "eval.csv"
        rows = unlearned.read_text().replace(f"1000,deterministic,1,10,{seed * 1000 + 1}", "1000,deterministic,1,10,0")
        unlearned.write_text(rows)
        order = dict(env=f"{plot.MINATAR}-reversed", tasks=["right", "left"], experts=())
        make_run_of_tasks(tmp_path, "continual-baseline", seed, "continual", **order)
        last = tmp_path / "runs" / f"{plot.MINATAR}-reversed" / "continual-baseline" / f"s{seed}" / "eval.csv"
        rows = last.read_text().replace(f"1000,deterministic,1,10,{seed * 1000 + 1}", "1000,deterministic,1,10,9000")
        last.write_text(rows)  # left, far above what it has in the given order
    plot.main(tmp_path)
    rows = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| ")]
    dormant, learns, helps, beats, matters = (
        [row for row in rows if row.startswith(f"| {claim}")]
        for claim in (*(f"Big with Soft MoE {verb}" for verb in ("has", "learns", "helps")), "Hardcoded", "The order")
    )
    assert [row.split(" | ")[4] for row in rows if "continual-softmoe-big | 3" in row] == ["1.00 [0.43, 1.71]"]
    assert [row.split(" | ")[4] for row in rows if "multitask-baseline | 3" in row] == ["0.50 [0.21, 0.86]"]
    sides = "softmoe-big: 0.25 [0.25, 0.25] (3) | baseline: 0.50 [0.50, 0.50] (3)"
    assert len(dormant) == 4 and all(f"share at the end | {sides} | for |" in row for row in dormant)
    sides = "softmoe-big: 1.00 [0.43, 1.71] (3) | baseline: 0.50 [0.21, 0.86] (3)"
    assert len(learns) == 2 and f"multitask: relative return | {sides} | undecided |" in learns[0]
    assert (
        len(helps) == 1 and "continual: 0.00 [0.00, 0.00] (3) | multitask: 0.50 [0.21, 0.86] (3) | against" in helps[0]
    )
    assert len(beats) == 4 and all("| hardcoded-" in row and ": - | " in row and "undecided" in row for row in beats)
    sides = "given order: 1166.67 [500.00, 2000.00] (3) | reversed: 9000.00 [9000.00, 9000.00] (3)"
    assert f"left: return at the end of its phase | {sides} | for |" in matters[0]  # for: a difference either way
    assert "| undecided |" in matters[1]


def test_a_claim_is_decided_where_three_seeds_are_apart(plot):
    low, high = np.array([1.0, 2.0, 3.0]), np.array([4.0, 3.5, 9.0])
    assert (plot.compare(high, low), plot.compare(low, high)) == (1, -1)
    assert plot.compare(high - 0.5, low) == 0  # two are equal
    assert plot.compare(high[:2], low) == plot.compare(high, low[:2]) == plot.compare(high, low[:0]) == 0


def test_claims_of_one_protocol_alone(plot, tmp_path):
    make_run_of_tasks(tmp_path, "multitask-baseline", 1, experts=(), env=plot.MINATAR)
    rows = plot.claims(plot.read_runs(tmp_path / "runs"))
    assert (
        "| Big with Soft MoE learns better | continual: relative return | softmoe-big: - | baseline: - | undecided |"
        in rows
    )


def test_plot_of_ppo_on_mujoco_and_of_the_number_of_experts(plot, tmp_path):
    for seed in (1, 3):
        make_run(tmp_path, env="HalfCheetah-v5-ppo", label="ppo", seed=seed)
        make_run(tmp_path, env="HalfCheetah-v5-ppo", label="ppo_pmoe-both", seed=seed, k=8)
        make_run(tmp_path, env="HalfCheetah-v5-experts", label="ppo_pmoe-16", seed=seed, k=16)
        make_run(tmp_path, env="HalfCheetah-v5-experts", label="ppo_pmoe-2", seed=seed, k=2)
    make_run(tmp_path, env="Ant-v5-ppo", label="ppo", seed=2)
    for folder in (tmp_path / "runs").glob("*/*/s*"):  # the last 100,000 steps are two points of three
        points = ((2048, "nan"), (600_000, 10), (950_000, 20), (1_000_000, int(folder.name[1:]) * 30))
        lines = ["global_step,charts/episodic_return", *(f"{step},{value}" for step, value in points), ""]
        (folder / "scalars.csv").write_text("\n".join(lines))
    plot.main(tmp_path)
    names = ["HalfCheetah-v5-experts-number.png", "HalfCheetah-v5-experts.png"]
    names += ["MuJoCo-ppo-training.png", "MuJoCo-ppo.png"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == names
    page = (tmp_path / "README.md").read_text()
    table = [line for line in page.split("## PPO on MuJoCo")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    last = "2000 [1000, 3000] | 1500 [750, 2250] | 40 [25, 55] | 30 [20, 40] | 1443 ± 46 |"
    assert table[2] == f"| HalfCheetah | ppo | 1 | 2 | {last}"
    assert table[3] == f"| HalfCheetah | ppo_pmoe-both | 8 | 2 | {last}"
    assert table[4:] == ["| Ant | ppo | 1 | 1 | 2000 | 1500 | 40 | 30 | - |"]
    rows = [line for line in page.split("## HalfCheetah-v5-experts")[1].splitlines() if line.startswith("| ppo")]
    labels = ["ppo_pmoe-2", "ppo_pmoe-8", "ppo_pmoe-16"]  # 8 from the other folder
    assert [row.split()[1] for row in rows[:3]] == labels


def test_runs_are_in_their_natural_order(plot, tmp_path):
    for label in ("mix-16", "mix-2", "mix"):
        make_run(tmp_path, label=label)
    assert list(plot.read_runs(tmp_path / "runs")["Env-v0"]) == ["mix", "mix-2", "mix-16"]


def test_plot_without_runs(plot, tmp_path):
    plot.main(tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["README.md"]


def test_plot_takes_an_older_run_that_lacks_a_flag(plot, tmp_path):
    for seed, experts in ((1, None), (2, 4), (3, 4)):
        make_run(tmp_path, seed=seed, k=experts)
    assert len(plot.read_runs(tmp_path / "runs")["Env-v0"]["sac"]) == 3
    make_run(tmp_path, seed=4, k=8)
    with pytest.raises(SystemExit, match="--num-experts is 8 and 4"):
        plot.read_runs(tmp_path / "runs")


def test_plot_refuses_to_mix_protocols(plot, tmp_path):
    make_run(tmp_path, seed=1)
    make_run(tmp_path, seed=2, step=2000, total=2000)
    with pytest.raises(SystemExit, match="Env-v0/sac: --total-timesteps is 2000 and 1000"):
        plot.main(tmp_path)

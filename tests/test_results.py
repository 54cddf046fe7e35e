"""The files under results/: statistics, claims, what the benchmark decides, pages that repeat to the byte."""

import csv
import functools
import json
import math
import re
import shutil
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import benchmark
import claims
import curves
import gait
import gifs
import gymnasium as gym
import maps
import measures
import numpy as np
import pages
import pandas as pd
import plot
import policy
import pytest
import reading
import scalars
import scipy.stats
import stats
import torch
import trajectories
from conftest import load
from torch.utils.tensorboard import SummaryWriter

RESULTS = Path(__file__).resolve().parent.parent / "results"
script_of = functools.cache(load)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(curves, "DPI", 30)  # what is drawn does not matter here


def write_csv(path, head, rows):
    path.write_text("\n".join([head, *rows, ""]))


def make_run(root, env="Env-v0", label="sac", seed=1, step=1000, total=1000, success=math.nan, gate=False, **args):
    """Evaluations at 250, 500, 750 and 1000: return seed * step; gate 1 more, stochastic 10 more."""
    folder = root / "runs" / env / label / f"s{seed}"
    folder.mkdir(parents=True)
    run = {
        "script": label.partition("-")[0]
        if label.startswith("ppo")
        else "sac_pmoe"
        if "num_experts" in args
        else "sac",
        "command": f"python algos/sac.py --label {label}",
        "args": {"seed": seed, "total_timesteps": total, "learning_starts": 100} | args,
        "commit": "0123456789",
        "dirty": {2: True, 10: None}.get(seed, False),  # None: not in a repository
        "versions": {"torch": "2"},
        "machine": "one",
        "global_step": step,
        "wall_time": 60.0,
        "steps_per_second": 100.0,
    }
    (folder / "run.json").write_text(json.dumps(run))
    policies = {"deterministic": 0} | ({"gate": 1} if gate else {}) | {"stochastic": 10}
    rows = [f"{t},{p},10,{seed * t + x},0.0,5.0,{success}" for t in (250, 500, 750, 1000) for p, x in policies.items()]
    write_csv(folder / "eval.csv", "global_step,policy,episodes,return,return_std,length,success", rows)
    return folder


def make_run_of_tasks(root, label, seed, experts=("actor", "critic"), env="Games", constant=None, **args):
    """Two tasks; returns seed * step + task, dormant neurons step / 4000, twice that without experts."""
    folder = make_run(root, env=env, label=label, seed=seed)
    run = json.loads((folder / "run.json").read_text())
    args = {"tasks": ["left", "right"], "protocol": label.split("-")[0], "cycles": 1, "num_experts": 2} | args
    run["args"] |= args | {f"{n}_moe": "big" if n in experts else "baseline" for n in ("actor", "critic")}
    run["script"] = "ppo_moe_multitask"
    run["parameters"] = {"actor": {"total": 5000, "active": 3000}, "critic": {"total": 4000, "active": 2000}}
    (folder / "run.json").write_text(json.dumps(run))
    tasks, steps = range(len(args["tasks"])), (250, 500, 750, 1000)
    rows = [
        f"{t},{policy},{task},10,{constant or seed * t + task},0.0,5.0,nan"
        for policy in ("deterministic", "stochastic")
        for t in steps
        for task in tasks
    ]
    write_csv(folder / "eval.csv", "global_step,policy,task,episodes,return,return_std,length,success", rows)
    rows = []
    for t in steps:
        for network, rank in (("actor", 10), ("critic", 20)):
            share = t / 4000 if experts else t / 2000
            rows += [f"{t},{network},dormant_0.025,,total,{share}", f"{t},{network},rank,,,{rank * seed}"]
            rows += [f"{t},{network},norm,,,1.5", f"{t},{network},width,,,64", f"{t},{network},cosine,0,1,-0.5"]
            rows.append(f"{t},{network},dormant_0.025,1,total,0.9")  # on the states of one task
            if network in experts:
                rows += [f"{t},{network},router1,{i},{j},{(i == j) * 0.25}" for i in tasks for j in (0, 1)]
    write_csv(folder / "moe.csv", "global_step,network,metric,task,item,value", rows)
    return folder


# Statistics


def test_interval_is_the_range_below_five_seeds_and_students_from_five_on():
    assert stats.interval([3, 1, 2]) == (1, 3) and stats.interval([7]) == (7, 7)
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert stats.interval(values) == pytest.approx((expected.low, expected.high))
    assert stats.interval([1, 1, 1, 1, 0.5], share=True)[1] == 1


def test_difference_is_welchs():
    rng = np.random.default_rng(0)
    one, other = rng.normal(3, 1, (4, 1)), rng.normal(1, 2, (6, 1))
    interval = scipy.stats.ttest_ind(one[:, 0], other[:, 0], equal_var=False).confidence_interval(0.95)
    ((estimate, half),) = stats.difference([(one, other)], relative=False)
    assert (estimate - half, estimate + half) == pytest.approx((interval.low, interval.high))
    scaled = stats.difference([(one, other)], relative=True)[0]
    assert scaled == pytest.approx((estimate / other.mean(), half / abs(other.mean())))
    twice = stats.difference([(one, other), (one, other)], relative=False)[0]  # as many degrees of freedom again
    assert twice[0] == pytest.approx(estimate) and twice[1] < half / math.sqrt(2)
    assert stats.difference([(one[:1], other)], relative=False)[0][1] == math.inf


def brute_force(blocks):
    """Every exchange of labels, written out."""

    def signed(chosen):
        total = 0
        for (one, other), indices in zip(blocks, chosen, strict=True):
            pooled = np.concatenate([one, other])
            mean = ((pooled - pooled.mean(0)) / pooled.std(0)).mean(1)
            rest = [i for i in range(len(mean)) if i not in indices]
            total += mean[list(indices)].mean() - mean[rest].mean()
        return total

    ways = [[]]
    for one, other in blocks:
        ways = [[*way, c] for way in ways for c in combinations(range(len(one) + len(other)), len(one))]
    seen = abs(signed([range(len(one)) for one, _ in blocks]))
    return sum(abs(signed(way)) >= seen - 1e-9 for way in ways) / len(ways)


def test_permutation_counts_every_exchange_within_the_tasks():
    rng = np.random.default_rng(1)
    for shape in ([(3, 3, 1)], [(3, 3, 1), (2, 4, 1)], [(3, 2, 3), (3, 3, 2)]):
        blocks = [(rng.normal(0.5, 1, (n, c)), rng.normal(0, 1, (m, c))) for n, m, c in shape]
        assert stats.permutation(blocks) == pytest.approx(brute_force(blocks))


def test_permutation_reaches_what_the_number_of_seeds_allows():
    apart = (np.array([[4.0], [5], [6]]), np.array([[1.0], [2], [3]]))
    assert stats.permutation([apart]) == pytest.approx(0.1)
    assert stats.permutation([apart] * 3) == pytest.approx(0.00025)
    assert stats.permutation([apart] * 6) == pytest.approx(2 / 20**6)
    six = (np.arange(6.0)[:, None] + 9, np.arange(6.0)[:, None])
    assert stats.permutation([six]) == pytest.approx(2 / 924)
    assert stats.permutation([apart, apart[::-1]]) == 1  # they cancel
    same = (np.ones((3, 1)), np.ones((3, 1)))
    assert stats.permutation([same]) == 1


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.6, 0.7]) == [1, 1]


def test_numbers_in_tables():
    assert [stats.number(x) for x in (12345.6, 99.96, 1.234, 0.0112, 0.0)] == ["12,346", "100.0", "1.23", "0.011", "0"]
    assert stats.summary([2.0, 4.0, 9.0]) == "5.00 (2.00 to 9.00)" and stats.summary([1.5]) == "1.50"
    assert stats.summary([1.0, 2, 3, 4, 5]) == "3.00 [1.04, 4.96]" and stats.summary([]) == "-"


# Reading and measures


def test_unfinished_runs_are_left_out_and_labels_are_in_their_natural_order(tmp_path):
    for label in ("mix-16", "mix-2", "mix"):
        make_run(tmp_path, label=label)
    make_run(tmp_path, label="mix", seed=2, step=400)
    (make_run(tmp_path, label="mix", seed=3) / "eval.csv").unlink()  # nor is one that was never evaluated
    data = reading.read(tmp_path)
    assert list(data.of("Env-v0").by_label) == ["mix", "mix-2", "mix-16"] and len(data.runs) == 3


def test_an_older_run_may_lack_a_flag_but_runs_of_one_label_do_not_differ(tmp_path):
    make_run(tmp_path, seed=1)
    make_run(tmp_path, seed=2, tau=4)
    assert len(reading.read(tmp_path).runs) == 2
    make_run(tmp_path, seed=3, tau=8)
    with pytest.raises(SystemExit, match="Env-v0/sac: --tau is 8 and 4"):
        reading.read(tmp_path)


def test_no_number_mixes_two_policies(tmp_path):
    for seed, gate in ((1, True), (2, False)):  # one run is from before there was a gate's policy
        make_run(tmp_path, label="old", seed=seed, gate=gate, num_experts=4)
        make_run(tmp_path, label="new", seed=seed, gate=True, num_experts=4)
    old, new = (reading.read(tmp_path).of("Env-v0", label) for label in ("old", "new"))
    assert (reading.policy_name(old), reading.policy_name(new)) == ("likeliest expert", "gate")
    assert measures.of(old, "area")[""].tolist() == [625, 1250]
    assert measures.of(new, "area")[""].tolist() == [626, 1251]
    assert measures.of(new, "return at the end")[""].tolist() == [751, 1501]  # of the last three: 500, 750, 1000
    assert measures.of(new, "stochastic return")[""].tolist() == [760, 1510]


def test_training_success_and_logged_curves(tmp_path):
    folder = make_run(tmp_path, success=0.5, num_experts=4)
    rows = ["100,nan,1.0,0.01", "900,10,0.5,0.03", f"1000,30,{math.log(2)},0.02"]
    write_csv(folder / "scalars.csv", "global_step,charts/episodic_return,moe/gate_entropy,policy/kl", rows)
    make_run(tmp_path, seed=2, success=0.0, num_experts=4)
    write_csv(tmp_path / "runs/Env-v0/sac/s2/scalars.csv", "global_step,charts/episodic_return", ["0,1", "1000,5"])
    data = reading.read(tmp_path).of("Env-v0", "sac")
    assert measures.of(data, "area of training")[""].tolist() == [20, 5]  # the first point is one rollout
    assert measures.of(data, "training at the end")[""].tolist() == [30, 5]  # later than 900 steps
    assert measures.of(data, "entropy of the gate")[""].tolist() == [0.5]  # ln 2 of ln 4
    assert measures.of(data, "KL per rollout")[""].tolist() == [0.02]
    assert measures.of(data, "steps to the first success")[""].tolist() == [250, math.inf]


def test_continual_runs_count_each_task_in_its_own_phase(tmp_path):
    make_run_of_tasks(tmp_path, "continual-baseline", 1, experts=())
    data = reading.read(tmp_path).of("Games", "continual-baseline")
    assert measures.of(data, "area").values.tolist() == [[375, 876]]  # of 250 and 500, of 750 and 1000
    assert measures.of(data, "return at the end").values.tolist() == [[750, 751]]
    assert measures.of(data, "dormant, actor").values.tolist() == [[0.375]]  # 0.25, 0.375 and 0.5 at the end
    assert measures.of(data, "rank / width, critic").values.tolist() == [[20 / 64]]


TRAINING = "global_step,charts/episodic_return"
FLIGHT = ["0,0,0,-1.50,", "0,2,0.90,0.00,1", "0,4,0.00,1.40,0"]  # round the right side of the disc
LAYOUT = ["start,0,-1.5,0", "target,0,1.5,0.5", "obstacle,0,0,0.6"]


def fly(folder, **panels):
    rows = [f"{panel},{row}" for panel, rows in panels.items() for row in rows]
    write_csv(folder / "trajectories.csv", "panel,episode,step,x,y,expert", rows)
    write_csv(folder / "layout.csv", "thing,x,y,radius", LAYOUT)


def test_ways_and_cells(tmp_path):
    other = ["1,0,0,-1.50,", "1,2,-0.90,0.00,1", "1,4,0.00,1.40,0"]
    lost = ["2,0,0,-1.50,", "2,2,-0.90,0.00,1", "2,4,-0.90,0.20,0"]
    seen = ["0,0,0.25,0.25,", "0,9,1.25,0.25,"]
    fly(make_run(tmp_path, seed=1), stochastic=FLIGHT + other, cells=seen)
    fly(make_run(tmp_path, seed=2), stochastic=FLIGHT + lost, cells=seen[:1])
    data = reading.read(tmp_path).of("Env-v0", "sac")
    assert measures.of(data, "ways")[""].tolist() == [2, 1]  # who does not arrive does not count
    assert measures.of(data, "cells seen")[""].tolist() == [2 / 400, 1 / 400]
    assert [arrives for _, _, arrives in measures.episodes(data, "stochastic")] == [True, True, True, False]


def recount(folder):
    """Area and last value of an eval.csv, and area of training, without pandas."""
    rows = list(csv.DictReader(open(folder / "eval.csv")))
    policy = "gate" if any(row["policy"] == "gate" for row in rows) else "deterministic"
    policy = "stochastic" if "PQN" in str(folder) else policy
    rows, training = [row for row in rows if row["policy"] == policy], math.nan
    first = json.loads((folder / "run.json").read_text())["args"].get("learning_starts", 0)
    learned = [float(row["return"]) for row in rows if int(row["global_step"]) > first]
    last = [float(row["return"]) for row in rows[-3:]]
    if (folder / "scalars.csv").exists():
        points = [
            float(row.get("charts/episodic_return") or "nan") for row in csv.DictReader(open(folder / "scalars.csv"))
        ]
        training = sum(points[1:]) / len(points[1:])
    return sum(learned) / len(learned), sum(last) / 3, training


def test_the_numbers_of_the_committed_runs_by_another_computation():
    data, counted = reading.read(RESULTS), 0
    for folder, part in data.by_folder.items():
        for label, runs in part.by_label.items():
            paths = [RESULTS / "runs" / folder / label / f"s{seed}" for seed in runs.runs.seed]
            if runs.tasks() or not paths[0].exists():  # no folder: shared.csv
                continue
            expected = np.array([recount(path) for path in paths])
            for column, name in enumerate(("area", "return at the end", "area of training")):
                values = measures.of(runs, name)
                if np.isfinite(expected[:, column]).all():
                    assert values[""].tolist() == pytest.approx(expected[:, column].tolist()), (folder, label, name)
                    counted += 1
    assert counted > 50


def test_area_begins_with_the_first_update_and_labels_stand_in_their_own_order(tmp_path):
    for label in ("new", "sac_gating", "sac_pmoe", "sac"):
        make_run(tmp_path, label=label, learning_starts=500)
    data = reading.read(tmp_path)
    assert list(data.by_folder["Env-v0"].by_label) == ["sac", "sac_pmoe", "sac_gating", "new"]
    assert measures.of(data.of("Env-v0", "sac"), "area")[""].tolist() == [(750 + 1000) / 2]


# Claims


def with_claims(monkeypatch, tmp_path, text):
    for name in ("labels.csv", "captions.csv", "published.csv", "layout.csv", "shared.csv", "README.md"):
        (tmp_path / name).write_text((RESULTS / "text" / name).read_text())
    (tmp_path / "claims.toml").write_text(text)
    for module in (claims, curves, pages, reading):
        monkeypatch.setattr(module, "TEXT", tmp_path)


CLAIM = """
[[claim]]
paper = "P"
kind = "{kind}"
claim = "{name}"
measure = "{measure}"
one = "{one}"
other = "sac"
folders = ["A", "B"]
wanted = "{wanted}"
"""


def claim(kind="test", name="it is better", measure="area", one="mix", wanted="higher", more=""):
    return CLAIM.format(kind=kind, name=name, measure=measure, one=one, wanted=wanted) + more


def test_a_claim_is_decided_by_the_corrected_p(tmp_path, monkeypatch):
    text = claim() + claim(wanted="lower") + claim(one="near") + claim(one="none", name="not run")
    with_claims(monkeypatch, tmp_path, text)
    for env in "AB":
        for seed in (1, 2, 3, 4):
            make_run(tmp_path, env=env, label="sac", seed=seed)
            make_run(tmp_path, env=env, label="mix", seed=10 + seed, num_experts=4)
            make_run(tmp_path, env=env, label="near", seed=seed + (seed == 4))
    better, worse, near, missing = claims.decide(reading.read(tmp_path), tmp_path)
    assert [c["seen"] for c in (better, worse, near, missing)] == ["for", "against", "open", "not run yet"]
    assert better["p"] == pytest.approx(2 / 70**2)
    assert better["holm"] == worse["holm"] == pytest.approx(4 * 2 / 70**2)  # of four tests, one of them not run
    assert better["compared"] == "`mix` and `sac`: area (likeliest expert and mean action); A, B"
    assert better["numbers"].startswith("+400% ± ") and "4 + 4 seeds each; p = .0004, corrected" in better["numbers"]
    assert missing["numbers"] == "-"
    make_run(tmp_path, env="A", label="sac", seed=5)
    row = claims.decide(reading.read(tmp_path), tmp_path)[0]
    assert "; 4 + 5, 4 + 4 seeds; p" in row["numbers"]  # in the order of the tasks


def test_a_claim_of_a_task_of_three_seeds_stays_open_with_its_difference(tmp_path, monkeypatch):
    with_claims(monkeypatch, tmp_path, claim())
    for seed in (1, 2, 3):
        make_run(tmp_path, env="B", label="sac", seed=seed)
        make_run(tmp_path, env="B", label="mix", seed=10 + seed)
    (row,) = claims.decide(reading.read(tmp_path), tmp_path)
    assert row["seen"] == "open" and row["p"] == pytest.approx(0.1)
    assert row["compared"].endswith("; B (1 of 2)")
    assert row["numbers"] == "7,500 and 1,250, difference +6,250 ± 1,417; 3 + 3 seeds; p = .100, corrected p = .100"


def test_what_stands_in_for_a_claim_without_runs(tmp_path, monkeypatch):
    more = '[claim.instead]\none = "old"\nfolders = ["C"]\ncaveat = "another task"\n'
    with_claims(monkeypatch, tmp_path, claim(more=more))
    for label in ("old", "sac"):
        make_run(tmp_path, env="C", label=label)
    for seed in (1, 2, 3):  # two seeds take nothing's place
        (row,) = claims.decide(reading.read(tmp_path), tmp_path)
        assert (row["seen"], row["caveat"]) == ("open", "another task") and "`old` and `sac`" in row["compared"]
        make_run(tmp_path, env="A", label="mix", seed=seed)
        make_run(tmp_path, env="A", label="sac", seed=seed)
    (row,) = claims.decide(reading.read(tmp_path), tmp_path)
    assert "caveat" not in row and "`mix` and `sac`" in row["compared"]


def test_what_stands_in_without_a_test_has_no_verdict_but_counts_in_the_correction(tmp_path, monkeypatch):
    more = '[claim.instead]\nkind = "difference"\nfolders = ["C"]\n'
    with_claims(monkeypatch, tmp_path, claim(more=more) + claim(one="near").replace('["A", "B"]', '["C"]'))
    for seed in range(1, 7):
        for label, offset in (("sac", 0), ("mix", 10), ("near", 5)):
            make_run(tmp_path, env="C", label=label, seed=offset + seed)
    first, second = claims.decide(reading.read(tmp_path), tmp_path)
    assert first["seen"] == "open (no test)" and first["numbers"].endswith("; 6 + 6 seeds")
    assert second["seen"] == "for" and second["holm"] == pytest.approx(2 * 4 / 924)  # one seed of each is equal


def test_a_claim_compares_runs_of_equal_settings(tmp_path, monkeypatch):
    with_claims(monkeypatch, tmp_path, claim())
    make_run(tmp_path, env="A", label="sac")  # an older run, without the flag
    make_run(tmp_path, env="A", label="mix", eval_every=250)
    make_run(tmp_path, env="B", label="sac", eval_every=250)
    claims.decide(reading.read(tmp_path), tmp_path)
    make_run(tmp_path, env="B", label="mix", eval_every=500)
    with pytest.raises(SystemExit, match="of different --eval-every: B/mix: 500; B/sac: 250"):
        claims.decide(reading.read(tmp_path), tmp_path)


def test_a_claim_of_two_families_names_both_measures(tmp_path, monkeypatch):
    more = '[[claim.also]]\none = "ppo_pmoe"\nother = "ppo"\nmeasure = "area of training"\nfolders = ["B"]\n'
    with_claims(monkeypatch, tmp_path, claim(more=more).replace('["A", "B"]', '["TargetReaching-v0-A"]'))
    for label in ("sac", "mix"):
        make_run(tmp_path, env="TargetReaching-v0-A", label=label)
    for label in ("ppo", "ppo_pmoe"):
        write_csv(make_run(tmp_path, env="B", label=label, seed=2) / "scalars.csv", TRAINING, ["0,1", "1000,5"])
    (row,) = claims.decide(reading.read(tmp_path), tmp_path)
    pairs = "`mix` and `sac`, `ppo_pmoe` and `ppo`"
    assert row["compared"] == f"{pairs}: area and area of training (mean action); TargetReaching-v0-A, B"
    assert row["numbers"].startswith("TargetReaching-v0-A: 625 and 625, difference +0; B: 5.00 and 5.00, difference")


def test_a_property_counts_seeds_and_has_no_test(tmp_path, monkeypatch):
    text = claim("seen", measure="sigma", more="bound = 0.5\n") + claim(
        "seen", measure="sigma", wanted="lower", more="bound = 0.5\n"
    )
    with_claims(monkeypatch, tmp_path, text)
    for label, sigma in (("mix", 0.7), ("sac", 0.2)):
        for seed in (1, 2, 3):
            folder = make_run(tmp_path, env="A", label=label, seed=seed)
            write_csv(folder / "scalars.csv", "global_step,policy/std", ["0,0", f"1000,{sigma}"])
    above, below = claims.decide(reading.read(tmp_path), tmp_path)
    assert (above["seen"], below["seen"]) == ("for (no test)", "against (no test)")
    assert above["numbers"] == "`mix` 0.70, 3 of 3 seeds above 0.5; `sac` 0.20, 0 of 3 seeds above 0.5"
    shutil.rmtree(tmp_path / "runs" / "A" / "mix" / "s3")  # two seeds are no property
    assert {row["seen"] for row in claims.decide(reading.read(tmp_path), tmp_path)} == {"open (no test)"}


def test_a_claim_on_what_another_script_has_written(tmp_path, monkeypatch):
    text = '[[claim]]\npaper = "P"\nkind = "table"\nclaim = "robust"\ncompared = "x"\nfile = "noise.csv"\n'
    text += 'policies = ["A", "B", "C"]\n'
    with_claims(monkeypatch, tmp_path, text + 'where = { sigma = 0.3 }\ncolumn = "relative"\n')
    (row,) = claims.decide(reading.read(tmp_path), tmp_path)
    assert (row["seen"], row["numbers"]) == ("not run yet", "-")
    for folder in "BC":
        (tmp_path / "policies" / folder).mkdir(parents=True)
    write_csv(tmp_path / "policies/B/noise.csv", "label,sigma,relative,seeds", ["sac,0.1,0.9,1", "sac,0.3,0.5,2"])
    write_csv(tmp_path / "policies/C/noise.csv", "label,sigma,relative,chance", ["mix,0.3,0.75,0.25"])
    (row,) = claims.decide(reading.read(tmp_path), tmp_path)
    assert (row["seen"], row["figure"]) == ("open (no test)", "B-noise")
    assert row["numbers"] == "`sac` 0.50 (2 seeds); `mix` 0.75 (by chance 0.25)"


def test_the_interval_of_a_share_ends_at_one_in_the_claims_too(tmp_path, monkeypatch):
    with_claims(monkeypatch, tmp_path, claim(measure="stochastic success"))
    for seed, success in enumerate((1, 1, 1, 1, 0), 1):
        for label in ("sac", "mix"):
            make_run(tmp_path, env="A", label=label, seed=seed, success=success)
    page = pages.claims_in_detail(claims.decide(reading.read(tmp_path), tmp_path))
    assert "| A | 0.80 [0.24, 1.00] | 0.80 [0.24, 1.00] | 5 + 5 |" in page


def test_exploration_is_that_of_its_own_runs_and_of_the_papers_form(tmp_path):
    def explore(env, label, seed, x):
        folder = make_run(tmp_path, env, label, seed, **({"num_experts": 4} if "pmoe" in label else {}))
        fly(folder, cells=[f"0,{i},{i + 0.25},0.25," for i in range(x)])

    def row():
        return next(c for c in claims.decide(reading.read(tmp_path), tmp_path) if "explores more" in c["claim"])

    for label in ("sac", "sac_pmoe-means"):
        explore("TargetReaching-v0-fixed", label, 1, 1)
        explore("TargetReaching-v0-exploration", label, 1, 9)  # not the paper's form
    assert row()["compared"] == "`sac_pmoe-means` and `sac`: cells seen; TargetReaching-v0-fixed"
    for seed in range(2, 12):
        explore("TargetReaching-v0-exploration", "sac", seed, 2)
        explore("TargetReaching-v0-exploration", "sac_pmoe", seed, 3)
    shutil.rmtree(tmp_path / "runs" / "TargetReaching-v0-exploration" / "sac" / "s1")
    found = row()
    assert found["compared"] == "`sac_pmoe` and `sac`: cells seen; TargetReaching-v0-exploration"
    assert found["p"] == pytest.approx(2 / math.comb(20, 10)) and found["seen"] == "for"
    assert found["numbers"].startswith("0.008 and 0.005, difference +0.003 ± 0; 10 + 10 seeds; p < .0001")


def test_returns_of_several_games_are_raw_until_there_are_agents_alone(tmp_path, monkeypatch):
    text = claim(measure="area").replace('["A", "B"]', '["Games/multitask"]').replace('"sac"', '"baseline"')
    with_claims(monkeypatch, tmp_path, text)
    for seed in (1, 2):
        make_run_of_tasks(tmp_path, "multitask-baseline", seed, experts=())
        make_run_of_tasks(tmp_path, "multitask-mix", 2 + seed)
    (row,) = claims.decide(reading.read(tmp_path), tmp_path)
    assert row["numbers"].startswith("left +1,250 ± ") and ", right +1,250 ± " in row["numbers"]
    assert row["p"] == pytest.approx(2 / 6)  # the two games of a run are exchanged together
    for task, constant in (("left", 1000), ("right", 500)):
        make_run_of_tasks(tmp_path, f"alone-{task}", 1, (), tasks=[task], protocol="multitask", constant=constant)
    (row,) = claims.decide(reading.read(tmp_path), tmp_path)  # means of areas: 2187.5 and 2188.5, 937.5 and 938.5
    assert row["numbers"].startswith("3.28 and 1.41, difference +1.88")
    data = reading.read(tmp_path)  # the same agents alone stand for the reversed order of the tasks
    values = measures.of(data.of("Games", "multitask-mix"), "area")
    reversed_, given = (claims.relative_return(values, data, name) for name in ("Games-reversed/continual", "Games"))
    assert reversed_.equals(given) and given.shape == (2, 1)


def test_the_committed_claims_are_complete(monkeypatch):
    rows = claims.read()
    for row in rows:
        assert row["kind"] in ("test", "difference", "seen", "table", "none")
        for part in (row, row.get("instead", {}), *row.get("also", [])):
            assert part.get("measure", "area") in measures.MEASURES
            assert part.get("wanted", "higher") in ("higher", "lower", "different")
    assert {row["paper"] for row in rows} == {"PMOE", "MoE-RL", "Soft MoE in value-based agents"}
    words = ("gating", "options", "Gumbel", "score ratio", "t-SNE", "noise", "explores", "six MuJoCo", "Final and All")
    for word in (*words, "dormant", "Hardcoded", "order of the tasks", "router", "parameters", "value-based"):
        assert any(word in row["claim"] for row in rows), word
    parts = [row for row in rows if {"baseline-wide", "softmoe-big-frozen", "softmoe-big-critic"} & {row.get("other")}]
    assert {tuple(row["folders"]) for row in parts} == {tuple(f"MinAtar-own/{p}" for p in benchmark.PARTS_IN)}
    assert len(parts) == 3
    text = claim() * (claims.MOST_TESTED + 1)
    monkeypatch.setattr(claims, "tomllib", SimpleNamespace(loads=lambda _, loads=claims.tomllib.loads: loads(text)))
    with pytest.raises(ValueError, match="13 tested claims of P, at most 12"):
        claims.read()


# Figures and pages


def test_a_label_has_one_colour_everywhere():
    some, every = curves.palette(["ppo", "ppo_pmoe-ppo"]), curves.palette(["ppo_pmoe-both", "ppo_pmoe-ppo", "ppo"])
    assert all(every[label] == colour for label, colour in some.items()) and len(set(every.values())) == 3
    assert curves.palette(["multitask-baseline"])["multitask-baseline"] == every["ppo"]
    assert len(set(curves.palette(["new", "sac", "newer"]).values())) == 3


def test_paths_have_the_colour_of_the_expert_that_acts(tmp_path):
    fly(make_run(tmp_path, num_experts=2), stochastic=FLIGHT, expert_1=[row[:-1] for row in FLIGHT])
    run = reading.read(tmp_path).of("Env-v0", "sac")
    _, (axis,) = curves.panels(1, 1)
    assert maps.fly(axis, 5.0, run, "stochastic", "x") == {0, 1} and axis.get_title() == "x\n1 of 1 arrive"
    (lines,) = axis.collections
    assert [tuple(c[:3]) for c in lines.get_colors()] == [maps.colour(1), maps.colour(0)]
    assert maps.fly(axis, 5.0, run, "expert_1", "x") == {1}
    assert maps.most_used(run) == [1]


def test_grey_is_one_gaussian_unless_an_expert_was_not_recorded(tmp_path, monkeypatch):
    drawn, bare = [], ["0,0,0,-1.50,", "0,2,0.90,0.00,", "0,4,0.00,1.40,"]
    monkeypatch.setattr(maps, "save", lambda figure, path: drawn.append(figure))
    for label, args in (("sac", {}), ("sac_gating", {"num_experts": 4}), ("sac_pmoe", {"num_experts": 4})):
        fly(make_run(tmp_path, label=label, **args), stochastic=bare)
    data = reading.read(tmp_path)
    data.runs.loc[data.runs.label == "sac_gating", "script"] = "sac_gating"
    for labels, text in (
        (["sac", "sac_gating"], "one Gaussian"),
        (["sac_pmoe"], "one Gaussian, or expert not recorded"),
    ):
        maps.paths(data, labels, {}, tmp_path / "x.png")
        (legend,) = drawn.pop().legends
        assert [entry.get_text() for entry in legend.get_texts()] == [text]


SIDES, START = "policy,episodes,success,left,right,entropy,p_left,modes,modes_u,gate", ",0.5,2,2,0.4 0.6"


def small_set(root):
    """A few runs of every kind."""
    for seed in (1, 2, 10):
        args = {"env": "TargetReaching-v0-fixed", "seed": seed}
        fly(make_run(root, success=float(seed == 1), **args), stochastic=FLIGHT, cells=["0,0,0.25,0.25,"])
        mix = make_run(root, label="sac_pmoe", success=0.0, gate=True, num_experts=2, **args)
        fly(mix, stochastic=FLIGHT, expert_0=FLIGHT, expert_1=FLIGHT, cells=["0,0,0.25,0.25,"])
        write_csv(mix / "scalars.csv", "global_step,moe/expert_distance,policy/std", ["0,0,1", f"1000,{seed / 4},0.3"])
        for label, experts in (("baseline", ()), ("softmoe-big", ("actor", "critic"))):
            for protocol in ("multitask", "continual"):
                make_run_of_tasks(root, f"{protocol}-{label}", seed, experts, "MinAtar-own")
    mirror = make_run(root, "TargetReaching-v0-mirror", "sac_pmoe", gate=True, num_experts=2, success=1.0)
    write_csv(mirror / "sides.csv", SIDES, [f"stochastic,100,1.0,40,60,0.9710{START}", "gate,100,1.0,0,100,0.0,,,,"])
    head = "step,q_left,q_right,alpha,p_left,modes,modes_u,gate,success,left,right"
    write_csv(
        mirror / "side_history.csv",
        head,
        ["500,1,2,0.1,0.5,2,2,0.4 0.6,1,40,60", "1000,3,2,0.1,0.5,2,2,0.4 0.6,1,40,60"],
    )
    for task, label in (("Hopper", "ppo"), ("Hopper", "ppo_pmoe-both"), ("HalfCheetah", "ppo_pmoe-both")):
        folder = make_run(root, f"{task}-v5-ppo", label, **({"num_experts": 8} if "pmoe" in label else {}))
        rows = ["0,nan", "500,10", "1000,30"]
        write_csv(folder / "scalars.csv", "global_step,charts/episodic_return", rows)
    folder = make_run(root, "HalfCheetah-v5-experts", "ppo_pmoe-2", num_experts=2)
    write_csv(folder / "scalars.csv", "global_step,charts/episodic_return", rows)
    write_csv(folder / "gait.csv", "policy,episode,return,upright", ["deterministic,0,10,1.0", "stochastic,0,5,-1.0"])


def test_plot_writes_figures_and_pages_and_repeats_to_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "DPI", 30)  # draws faster
    small_set(tmp_path)
    (tmp_path / "findings.md").write_text("by hand")

    def write():
        plot.main(tmp_path)
        return {p.name: p.read_bytes() for p in (*(tmp_path / "figures").iterdir(), *tmp_path.glob("*.md"))}

    first = write()
    (tmp_path / "figures" / "old.png").touch()  # of a suite that is gone
    (tmp_path / "figures" / "gradients.png").touch()  # of a script of its own
    (tmp_path / "old.md").write_text(pages.MADE)
    for name in ("MinAtar-own", "TargetReaching-v0-fixed", "TargetReaching-v0-mirror"):
        shutil.rmtree(tmp_path / "runs" / name)
    second, texts = write(), {"README.md", "claims.md"}
    gone = ("MinAtar", "TargetReaching", "paths")
    same = {name: content for name, content in first.items() if name not in texts and not name.startswith(gone)}
    assert second.keys() == same.keys() | texts | {"gradients.png"}
    assert all(second[name] == content for name, content in same.items()) and second["gradients.png"] == b""
    assert first.pop("findings.md") == b"by hand"

    environments = ("Hopper-v5", "HalfCheetah-v5", "TargetReaching-v0", "MinAtar")
    figures = {"paths", "PPO-MuJoCo", "MinAtar", "MinAtar-dormant", "Hopper-v5-ppo", "HalfCheetah-v5-ppo"}
    figures |= {"HalfCheetah-v5-experts", "HalfCheetah-v5-experts-number"}
    figures |= {"TargetReaching-v0-mirror", "TargetReaching-v0-mirror-history"}
    figures |= {f"TargetReaching-v0-fixed{part}" for part in ("", "-paths", "-cells")}
    kinds = [f"MinAtar-own-{protocol}-big" for protocol in ("multitask", "continual")]
    figures |= {f"{kind}{part}" for kind in kinds for part in ("", "-networks", "-routers")}
    assert first.keys() == {f"{p}.md" for p in ("README", "claims", *environments)} | {f"{f}.png" for f in figures}
    text = {name: first[f"{name}.md"].decode() for name in ("README", *environments)}
    row = "| sac_pmoe | 2 | 3 | gate | 2,709 (626 to 6,251) | 3,251 (751 to 7,501) | 3,260 (760 to 7,510) |"
    assert row in text["TargetReaching-v0"]
    assert "| sac | - | 3 | mean action | 2,708 (625 to 6,250) |" in text["TargetReaching-v0"]
    assert "| sac_pmoe | stochastic | 1 | 1 | 0 | 0 | 1 | 0.40 | 0.50 | 2 | 0.60 |" in text["TargetReaching-v0"]
    assert "| sac_pmoe | gate | 1 | 1 | 0 | 1 | 0 | 0 | - | - | - |" in text["TargetReaching-v0"]
    assert "| 250 (1 of 3) |" in text["TargetReaching-v0"] and "0123456, 0123456+" in text["TargetReaching-v0"]
    assert "| baseline | 1,625 -> 3,250 | 3,793 -> 3,251 |" in text["MinAtar"]  # at the end of its phase, of the run
    assert "| softmoe-big | 0.19 (0.19 to 0.19) / 0.19 (0.19 to 0.19) |" in text["MinAtar"]
    assert "| ppo_pmoe-8 | 8 | 1 |" in text["HalfCheetah-v5"]  # from the other folder
    assert "| ppo_pmoe-2 | 1 | 10.0 | 1.00 | 5.00 | -1.00 |" in text["HalfCheetah-v5"]
    assert "CleanRL documentation | v4 | 1,000,000 | 3 | 2383 ± 272" in text["Hopper-v5"]
    assert "SAC-MuJoCo.png" not in text["README"] and "figures/PPO-MuJoCo.png" in text["README"]
    assert all(f"[{name}]({name}.md)" in text["README"] for name in environments)
    for page in text.values():  # every picture and page that is named is there
        for target in re.findall(r"\]\(([\w./-]+\.(?:png|md))(?:#[\w-]*)?\)", page):
            assert Path(target).name in first or (RESULTS / target).exists(), target


def test_sides_are_counted_over_the_seeds(tmp_path):
    rows = {1: "1.0,100,0,0.0", 2: "0.95,90,5,0.2975", 3: "0.15,15,0,", 4: "0.0,0,0,"}
    for seed, row in rows.items():
        folder = make_run(tmp_path, "TargetReaching-v0-mirror", seed=seed)
        write_csv(folder / "sides.csv", SIDES, [f"stochastic,100,{row},0.9,{seed},2,"])
    head, _, row, _ = pages.sides(reading.read(tmp_path).of("TargetReaching-v0-mirror"))
    assert head.startswith("| label | policy | seeds | of them arrive | only left | only right | both sides |")
    assert row == "| sac | stochastic | 4 | 2 | 2 | 0 | 1 | 0.053 | 0.90, 0.90, 0.90, 0.90 | 1 or 2 or 3 or 4 |"


def test_sac_and_ppo_in_one_folder_have_figures_of_their_own(tmp_path):
    for label in ("ppo", "ppo_pmoe-both", "sac", "sac_pmoe"):
        steps = 2000 if label.startswith("ppo") else 1000
        folder = make_run(tmp_path, "Env-v0-x", label, step=steps, total=steps)
        fly(folder, stochastic=FLIGHT)
    page = pages.environment("Env-v0", reading.read(tmp_path), tmp_path)
    names = [f"Env-v0-x{family}{part}.png" for family in ("", "_ppo") for part in ("", "-paths")]
    assert re.findall(r"figures/(.*\.png)", page) == names and all((tmp_path / name).exists() for name in names)
    parts = pages.families(reading.read(tmp_path))
    assert [list(part.by_label) for part in parts.values()] == [["sac", "sac_pmoe"], ["ppo", "ppo_pmoe-both"]]
    assert list(pages.families(reading.read(tmp_path).where("label", ["ppo"]))) == ["Env-v0-x"]
    assert page.count("| label | seeds | evaluated policy |") == 1  # the numbers stand in one table


def make_pqn(root, label, seed, parameters, **args):
    folder = make_run(root, "MinAtar-PQN-asterix", label, seed, **args)
    run = json.loads((folder / "run.json").read_text())
    run |= {"script": "pqn_moe" if "moe" in args else "pqn", "parameters": parameters}
    (folder / "run.json").write_text(json.dumps(run))
    head, *rows = (folder / "eval.csv").read_text().splitlines()
    write_csv(folder / "eval.csv", f"{head},dormant,rank", [f"{row},{seed / 8},{64 * seed}" for row in rows])


def test_a_page_of_pqn_from_a_part_of_its_runs(tmp_path, monkeypatch):
    drawn, save = {}, curves.save
    monkeypatch.setattr(
        curves, "save", lambda figure, path: (drawn.update({path.stem: figure.axes}), save(figure, path))
    )
    for seed in (1, 2, 3):
        make_pqn(tmp_path, "pqn", seed, 134_000, game="asterix")
    plot.main(tmp_path)
    page, front = ((tmp_path / name).read_text() for name in ("MinAtar.md", "README.md"))
    assert "| pqn | 3 | epsilon-greedy | 1,260 (635 to 1,885) |" in page  # of the stochastic policy
    assert "| 134,000 | 0.25 (0.12 to 0.38) | 1.00 (0.50 to 1.50) |" in page  # ranks 64, 128, 192 of 128
    assert "greedy return" in page and "figures/MinAtar-PQN-asterix.png" in page
    assert "| label | seeds |\n" not in page  # nothing to say of the policies
    assert "MinAtar-PQN.png" not in page + front  # one point compares nothing
    moe = {"game": "asterix", "num_experts": 4}
    for label, parameters, args in (
        ("pqn_moe-wide4", 530_000, {"moe": "wide", "widen": 4}),
        ("pqn_moe-soft1", 20_000, {"moe": "soft", "num_experts": 1}),
        ("pqn_moe-soft4", 70_000, {"moe": "soft"}),
        ("pqn_moe-tokens", 9_000, {"moe": "tokens"}),
    ):
        make_pqn(tmp_path, label, 1, parameters, **moe | args)
    page = pages.environment("MinAtar", reading.read(tmp_path), tmp_path / "figures")
    assert "![PQN, returns over the number of parameters](figures/MinAtar-PQN.png)" in page
    (axis,) = drawn["MinAtar-PQN"]
    handles, names = axis.get_legend_handles_labels()
    xs = {name: list(handle.get_xdata()) for name, handle in zip(names, handles, strict=True)}
    assert xs["plain network, times as wide"] == [134_000, 530_000]
    assert xs["Soft MoE, experts"] == [20_000, 70_000] and xs["tokens, one MLP for all"] == [9_000]
    assert [text.get_text() for text in axis.texts] == ["1", "4", "1", "4", ""]
    ranks = {
        label: measures.of(part, "rank / width")[""].iloc[0] for label, part in reading.read(tmp_path).by_label.items()
    }
    assert ranks == {"pqn": 1 / 2, "pqn_moe-wide4": 1 / 8} | dict.fromkeys(
        ("pqn_moe-soft1", "pqn_moe-soft4", "pqn_moe-tokens"), 1 / 16
    )


def test_many_labels_are_drawn_without_bands_and_more_without_seeds(tmp_path):
    for label in "abcdef":
        make_run(tmp_path, label=label, seed=1)
        make_run(tmp_path, label=label, seed=2)
    table = curves.evaluated(reading.read(tmp_path), "return")
    for labels, number in (("abc", 9), ("abcde", 15), ("abcdef", 6)):  # a line for each mean and for each seed
        _, (axis,) = curves.panels(1, 1)
        curves.lines(axis, table[table.label.isin(list(labels))], curves.palette(list("abcdef")))
        assert len(axis.lines) == number and len(axis.collections) == (3 if len(labels) == 3 else 0)


def test_an_agent_alone_on_a_game_has_no_relative_return(tmp_path):
    for task in ("left", "right"):
        make_run_of_tasks(tmp_path, f"alone-{task}", 1, (), tasks=[task], protocol="multitask", constant=1000)
    make_run_of_tasks(tmp_path, "multitask-baseline", 1, experts=())
    data = reading.read(tmp_path).of("Games")
    relative = {k: pages.tasks_learned(part, data, "Games")["relative return"] for k, part in data.by_label.items()}
    assert relative == {"alone-left": "-", "alone-right": "-", "multitask-baseline": "0.63"}


def test_every_label_of_a_suite_has_a_meaning_and_a_colour_of_its_own_in_a_figure():
    known, groups = pd.read_csv(reading.TEXT / "labels.csv"), {}
    assert known.label.is_unique
    for suites in benchmark.SUITES.values():
        for suite in suites if isinstance(suites, list) else [suites]:
            for label, run in suite.runs.items():
                groups.setdefault((suite.env, "sac" in run, "multitask" in run), set()).add(reading.kind(label))
    for (env, *_, several), labels in groups.items():
        assert labels <= set(known.label), env
        assert several or len(set(curves.palette(labels).values())) == len(labels), env


def test_the_first_page_has_a_row_for_every_claim_without_any_runs(tmp_path):
    plot.main(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "claims.md", "figures"}
    assert page.count("**not run yet**") == len(claims.read()) - 1 and page.count("**not defined**") == 1


def test_routing_is_a_share(tmp_path):
    make_run_of_tasks(tmp_path, "multitask-mix", 1, experts=("critic",))
    run = reading.read(tmp_path).of("Games", "multitask-mix")
    assert curves.routing(run, "critic").to_numpy().tolist() == [[1, 0], [0, 1]]  # those of top-k do not sum to 1
    assert curves.routing(run, "actor") is None


# What is written from saved policies


@pytest.fixture(scope="module")
def flown(tmp_path_factory):
    """The folder of a short run of a mixture on target reaching."""
    folder = tmp_path_factory.mktemp("runs") / "TargetReaching-v0-x" / "sac_pmoe" / "s1"
    env_id = "moe_envs:TargetReaching-v0?max_episode_steps=30"
    sizes = ["--learning-starts=40", "--total-timesteps=50", "--eval-every=50", "--eval-episodes=2", "--batch-size=8"]
    script_of("sac_pmoe").main(["--env-id", env_id, "--run-dir", str(folder), "--num-experts=3", *sizes])
    return folder


def test_a_saved_policy_flies_as_its_evaluation_does(flown):
    saved = policy.load(flown)
    player = policy.Player(saved)
    evaluated = saved.script.evaluate(saved.agent, saved.env, saved.args, 50, "stochastic")
    torch.manual_seed(saved.args.seed)
    ends = [list(player.episode(number, "stochastic"))[-1][1]["episode"]["r"] for number in range(2)]
    assert np.mean(ends) == pytest.approx(evaluated["return"], abs=1e-4)


def test_an_expert_left_alone_acts_everywhere(flown):
    saved = policy.load(flown)
    player = policy.Player(saved)
    obs = torch.from_numpy(saved.env.reset(0)[0])[None]
    mean = saved.agent.actor(obs)[0]  # (1, K, A)
    for k in range(3):
        player.alone = k
        for _ in range(20):
            assert saved.agent.act(obs[0].numpy(), "gate") == pytest.approx(mean[0, k].tanh().detach().numpy())
            assert player.acting == k


def test_trajectories_of_a_run(flown):
    trajectories.main(flown)
    rows = pd.read_csv(flown / "trajectories.csv")
    counts = rows.groupby("panel").episode.nunique()
    assert counts.to_dict() == {"stochastic": 10, "expert_0": 5, "expert_1": 5, "expert_2": 5}
    started = rows[rows.step > 0]
    assert rows[rows.step == 0].expert.isna().all() and started.expert.notna().all()
    assert all((part.expert == int(name[-1])).all() for name, part in started.groupby("panel") if name != "stochastic")
    layout = pd.read_csv(flown / "layout.csv").set_index("thing")
    env = policy.load(flown).env
    env.reset(0)
    world = env.unwrapped._world
    assert layout.loc["target", ["x", "y"]].tolist() == pytest.approx(world.target[0], abs=1e-3)
    assert layout.loc["obstacle", ["x", "y"]].to_numpy() == pytest.approx(world.obstacles[0], abs=1e-3)
    assert layout.loc["obstacle", "radius"].tolist() == pytest.approx(world.radii[0], abs=1e-3)
    before = (flown / "trajectories.csv").read_bytes()
    trajectories.main(flown)
    assert (flown / "trajectories.csv").read_bytes() == before


def test_cells_of_the_first_steps():
    obs_dim, count = 4, trajectories.FIRST_STEPS + 5
    rows = torch.zeros(count, 2 * obs_dim + 4)  # obs, reward, terminated, next_obs, action; all in the cell of 0, 0
    rows[7, obs_dim + 2] = 0.11 * 2  # next_obs: x = 1.1
    rows[9, 0] = -1.02  # behind the wall
    rows[-1, 1] = 0.9  # later than the first steps
    checkpoint = {"buffer": {"rows": rows, "count": count}, "args": {"learning_starts": 1000}}
    assert trajectories.cells(checkpoint) == ["0,0,0.25,0.25,", "0,7,1.25,0.25,"]
    assert trajectories.cells(checkpoint | {"args": {"learning_starts": 10_000}}) == []  # all random


def test_gif_of_a_flight(flown, tmp_path, monkeypatch):
    monkeypatch.setattr(gifs, "FOLDER", tmp_path)
    monkeypatch.setattr(gifs, "EPISODES", 1)
    (tmp_path / "figures").mkdir()
    path = gifs.main(flown)
    with gifs.Image.open(path) as image:
        assert image.n_frames >= 2
    monkeypatch.setattr(gifs, "MOST", 1000)
    with pytest.raises(ValueError, match="more than 1,000"):
        gifs.main(flown)


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


def test_gait_is_the_pitch_after_the_first_steps(tmp_path):
    sizes = ["--learning-starts=1", "--total-timesteps=1", "--eval-every=1", "--eval-episodes=1"]
    script_of("sac").main(["--env-id=Falling-v0", "--run-dir", str(tmp_path), *sizes])
    table = list(csv.DictReader(open(gait.main(tmp_path))))
    assert [row["policy"] for row in table] == ["deterministic"] * 3 + ["stochastic"] * 3
    assert {(row["return"], row["upright"]) for row in table} == {("250.0", "-1.000")}


def test_scalars_of_a_run_that_was_resumed(tmp_path):
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
    lines = [line for line in capsys.readouterr().out.splitlines() if "--seed 1 " in line]  # not of seed 10
    assert lines
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
        ("TargetReaching-v0-mirror", ("policy.pt", "scalars.csv"), ["results/trajectories.py", "results/sides.py"]),
        ("TargetReaching-v0-8-tasks", ("events.out.tfevents.1", "policy.pt", "moe.csv"), ["results/scalars.py"]),
        ("Hopper-v5-ppo", ("events.out.tfevents.1", "scalars.csv"), []),
    ):
        run_dir = benchmark.RUNS / env / "label" / "s1"
        (tmp_path / run_dir).mkdir(parents=True)
        for name in inputs:
            (tmp_path / run_dir / name).touch()
        made.clear()
        assert benchmark.extras(run_dir) and made == expected


def test_benchmark_keeps_small_policies_of_first_seeds_and_all_of_hopper(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "REPOSITORY", tmp_path)
    kept = {"E/a/s1": (10**6, True), "E/b/s1": (10**6 + 1, False), "E/a/s2": (9, False), "Hopper-v5/a/s2": (9, True)}
    for name, (size, expected) in kept.items():
        folder = tmp_path / benchmark.RUNS / name
        folder.mkdir(parents=True)
        (folder / "policy.pt").write_bytes(bytes(size))
        benchmark.keep_policy(benchmark.RUNS / name)
        assert (tmp_path / "results" / "policies" / f"{name}.pt").exists() == expected, name


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

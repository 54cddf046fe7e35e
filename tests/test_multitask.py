"""Whole runs of the multi-task scripts: exact resume across a task switch, files, evaluation, errors."""

import ast
import csv
import difflib
import json
import random
import re
import shutil
import signal
import sys
import time

import gymnasium as gym
import imageio
import imageio.v3
import numpy as np
import PIL.Image
import PIL.ImageSequence
import pytest
import torch
from conftest import ALGOS, MULTITASK, check_video_faults, load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_sac import QUARTER, Echo
from test_training import NO_GPU, break_weights, model, same, start

pytest.importorskip("minatar")
SMALL = {
    "sac_moe_multitask": dict(
        tasks=("Pendulum-v1?max_episode_steps=30", "Pendulum-v1?g=3.0&max_episode_steps=30"),
        **dict(learning_starts=20, update_every=3, batch_size=8, buffer_size=1000, num_experts=2, num_threads=1),
        **dict(total_timesteps=160, eval_every=80, eval_episodes=1, checkpoint_every=50),
    ),
    "ppo_moe_multitask": dict(
        tasks=("breakout", "asterix"),
        **dict(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=1, num_experts=2, num_threads=1),
        **dict(total_timesteps=640, eval_every=320, eval_episodes=2, checkpoint_every=250),
    ),
}
STEPS = {name: (small["eval_every"], small["total_timesteps"]) for name, small in SMALL.items()}  # of the evaluations


def quick(script_name):
    """The script with narrower networks, which it measures on fewer states than usual."""
    module = load(script_name)
    module.PROBE, module.SAMPLES = (1, 32), 64
    if script_name.startswith("sac"):
        module.Network.__init__.__defaults__ = (32,)  # hidden units
    return module


@pytest.fixture(scope="module", params=MULTITASK)
def module(request):
    return quick(request.param)


def words(**flags) -> list[str]:
    """What a command line has of these flags."""
    result = []
    for key, value in flags.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            result.append(f"--{name}" if value else f"--no-{name}")
        else:
            result += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return result


def train(module, folder, **changes):
    return module.main(words(**(SMALL[module.SCRIPT] | {"run_dir": folder} | changes)))


def resume(module, folder, **changes):
    return module.main(words(resume=folder, **changes))


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def equal(a, b):
    names = ("eval.csv", "moe.csv")
    return same(model(a), model(b)) and all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def finished(module, tmp_path_factory):
    return train(module, tmp_path_factory.mktemp(module.SCRIPT) / "run")


def test_same_seed_same_run_and_other_seed_another(module, finished, tmp_path):
    assert equal(finished, train(module, tmp_path / "again"))
    assert not same(model(finished), model(train(module, tmp_path / "other", seed=2)))


def test_evaluation_does_not_change_training(module, finished, tmp_path):
    other = train(module, tmp_path / "run", eval_every=70, eval_episodes=1)  # its last three are other ones, too
    assert same(model(finished), model(other))


def test_files_of_a_run(module, finished):
    run = json.loads((finished / "run.json").read_text())
    half, end = STEPS[module.SCRIPT]
    assert run["global_step"] == end and run["args"]["tasks"] == list(SMALL[module.SCRIPT]["tasks"])
    table = [(int(r["global_step"]), r["policy"], r["task"]) for r in rows_of(finished / "eval.csv")]
    expected = [(step, policy) for step in (half, end) for policy in ("deterministic", "stochastic")]  # the last three
    assert table == [(step, policy, task) for step, policy in expected for task in "01"]
    measured = rows_of(finished / "moe.csv")
    assert {int(row["global_step"]) for row in measured} == {half, end}
    for network in ("actor", "critic"):
        mine = [row for row in measured if row["network"] == network]
        metrics = {row["metric"] for row in mine}
        assert {"dormant_0.025", "dormant_0.0", "rank", "norm", "cosine"} < metrics
        dormant = [(row["task"], row["item"]) for row in mine if row["metric"] == "dormant_0.0"]
        assert sorted(dormant) == sorted([(t, i) for t in ("", "0", "1") for i in ("layer1", "layer2", "total")] * 2)
        weights = [float(row["value"]) for row in mine if row["metric"].startswith("router")]
        assert len(weights) == 8 and sum(weights) == pytest.approx(4, abs=1e-4)  # 2 evaluations, tasks, experts
        counted = sum(p.numel() for key, p in model(finished).items() if key.startswith(f"{network}."))
        assert run["parameters"][network] == {"total": counted, "active": counted}
    package = {"sac_moe_multitask": "gymnasium", "ppo_moe_multitask": "minatar"}[module.SCRIPT]
    assert run["versions"][package]
    policy = torch.load(finished / "policy.pt", weights_only=True)
    assert policy["args"]["tasks"] == SMALL[module.SCRIPT]["tasks"] and policy["global_step"] == end
    assert same(policy["agent"], {k: v for k, v in model(finished).items() if k.startswith("actor.")})


@pytest.mark.parametrize("architecture, layers", [("final", "3"), ("all", "123")])
def test_final_and_all_run(module, tmp_path, architecture, layers):
    """As actor and as critic; each layer that is a mixture has a router of its own."""
    moe = {"actor_moe": architecture, "critic_moe": architecture}
    run = train(module, tmp_path / "run", **moe, total_timesteps=STEPS[module.SCRIPT][0])
    routers = {
        (row["network"], row["metric"]) for row in rows_of(run / "moe.csv") if row["metric"].startswith("router")
    }
    assert routers == {(network, f"router{layer}") for network in ("actor", "critic") for layer in layers}


def test_tensorboard_has_what_the_tables_have(module, tmp_path):
    """Every number of eval.csv and moe.csv, and the weights as pictures: a row of blocks for each of the 2 tasks."""
    run = train(module, tmp_path / "run", num_experts=3)
    events = EventAccumulator(str(run), {"scalars": 0, "images": 0}).Reload()
    logged = {
        tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"] if "charts" not in tag
    }
    for row in rows_of(run / "eval.csv"):
        suffix = "" if row["policy"] == "deterministic" else "_stochastic"
        value = logged[f"eval/return{suffix}_{row['task']}"][int(row["global_step"])]
        assert value == pytest.approx(float(row["return"]), rel=1e-6)
    weights = {}
    for row in rows_of(run / "moe.csv"):
        parts = [row[key] for key in ("network", "metric", "task", "item") if row[key]]
        step, value = int(row["global_step"]), float(row["value"])
        assert logged["/".join(["moe", *parts])][step] == pytest.approx(value, rel=1e-6)
        if row["metric"].startswith("router"):
            key = f"moe/{row['network']}/{row['metric']}", step
            weights.setdefault(key, torch.zeros(2, 3))[int(row["task"]), int(row["item"])] = value
    pictures = {(tag, e.step): e for tag in events.Tags()["images"] for e in events.Images(tag)}
    assert pictures.keys() == weights.keys() and len(weights) == 4  # 2 networks, 2 evaluations
    for key, picture in pictures.items():
        pixels = torch.from_numpy(imageio.v3.imread(picture.encoded_image_string)[..., 0].copy())
        assert pixels.shape == (40, 60)
        assert torch.allclose(pixels[10::20, 10::20] / 255, weights[key], atol=1 / 255)


def test_sac_success_is_that_of_the_last_step():
    """Episodes of 3 steps whose environment knows success at the end; eval.csv has the share of each task."""
    module = quick("sac_moe_multitask")
    ends = {0: iter([True, False, False, True]), 1: iter([False] * 3 + [True])}

    class Knows(gym.Wrapper):
        def __init__(self, env, task):
            super().__init__(env)
            self.ends = ends[task]

        def step(self, action):
            obs, reward, terminated, truncated, info = self.env.step(action)
            done = terminated or truncated
            return obs, reward, terminated, truncated, info | {"success": next(self.ends) if done else True}

    tasks = ("Pendulum-v1?max_episode_steps=3", "Pendulum-v1?g=3.0&max_episode_steps=3")
    args = module.Args(tasks=tasks, eval_episodes=4)
    envs = [Knows(env, task) for task, env in enumerate(module.make_envs(args, evaluation=True))]
    for env in envs:  # Env's own reset, which takes the number of the episode
        env.reset = env.env.reset
    rows = module.evaluate(module.Agent(3, 1, args), envs, args, 0, "deterministic")
    assert [(row["task"], row["success"]) for row in rows] == [(0, 0.5), (1, 0.25)]


def test_printed_counts_are_those_of_the_networks(module, tmp_path, capsys):
    """Two experts, one chosen: half of what has a leading 2 is active, in big everything but the router."""
    run = train(module, tmp_path / "run", actor_moe="big", critic_moe="big", router="topk", eval_episodes=1)
    printed = re.findall(r"(actor|critic): ([\d,]+) parameters, ([\d,]+) active", capsys.readouterr().out)
    assert [network for network, *_ in printed] == ["actor", "critic"]
    for network, *counts in printed:
        mine = {key: p.numel() for key, p in model(run).items() if key.startswith(f"{network}.")}
        routing = sum(count for key, count in mine.items() if "phi" in key)
        experts = sum(mine.values()) - routing
        assert [int(count.replace(",", "")) for count in counts] == [experts + routing, experts // 2 + routing]


def test_a_named_set_is_spelt_out():
    module = load("sac_moe_multitask")
    assert module.Args(tasks=("target-reaching",)).tasks == module.LAYOUTS == module.Args().tasks
    assert module.Args(tasks=("halfcheetah-directions", "Ant-v5")).tasks[1:] == (
        "HalfCheetah-v5?forward_reward_weight=-1",
        "Ant-v5",
    )


OWN = {"Args", "Network", "Agent", "update", "train", "make_envs", "evaluate", "film", "probe", "rules"}
OWN |= {"exit_on_error", "parse", "evaluate_run"}  # nearly the same


def test_the_two_scripts_agree():
    """What both define is the same to the letter; what differs in a line or two is small."""
    one, other = (definitions((ALGOS / f"{name}.py").read_text()) for name in MULTITASK)
    both = one.keys() & other.keys()
    assert not [name for name in both - OWN if one[name] != other[name]]
    assert {"Mixture", "running_phase", "look_inside", "measure", "Run", "describe", "write", "main"} <= both
    for name, most in (("exit_on_error", 3), ("parse", 2), ("evaluate_run", 2)):
        lines = difflib.ndiff(one[name].splitlines(), other[name].splitlines())
        assert sum(line[0] in "+-" for line in lines) <= most, name


def definitions(text: str) -> dict[str, str]:
    """Name -> text of every function and class."""
    return {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body if hasattr(node, "name")}


@pytest.mark.parametrize("script_name", MULTITASK)
def test_resume_after_kill_9_is_exact_across_a_task_switch(script_name, tmp_path, capsys):
    """Killed in the first phase, so that the resumed run makes the switch; the script is a copy that stands alone."""
    half, end = STEPS[script_name]
    settings = SMALL[script_name] | {"protocol": "continual", "eval_every": half}
    settings |= {"total_timesteps": 3 * half, "checkpoint_every": half // 2}
    text = (ALGOS / f"{script_name}.py").read_text().replace("PROBE = 4, 128 ", "PROBE = 1, 32 ")
    (tmp_path / f"{script_name}.py").write_text(text.replace("SAMPLES = 1024 ", "SAMPLES = 64 "))  # as quick()
    killed = start(script_name, *words(**settings, run_dir="killed"), cwd=tmp_path, path=tmp_path)
    evaluations = tmp_path / "killed" / "eval.csv"
    while killed.poll() is None and not (evaluations.exists() and "deterministic" in evaluations.read_text()):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    stopped_at = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["global_step"]
    assert half // 2 <= stopped_at < 3 * half // 2
    module = load(script_name, tmp_path)
    resumed = resume(module, tmp_path / "killed")
    whole = module.main(words(run_dir=tmp_path / "whole", **settings))
    assert "active for one" in capsys.readouterr().out
    assert equal(whole, resumed)


def test_continual_runs_evaluate_at_the_end_of_each_phase(module, tmp_path):
    half, end = STEPS[module.SCRIPT]
    run = train(module, tmp_path / "run", protocol="continual", eval_every=10**6)
    for name in ("eval.csv", "moe.csv"):
        assert {int(row["global_step"]) for row in rows_of(run / name)} == {half, end}


@pytest.mark.parametrize("phase", [0, 1])
def test_signal_stops_with_a_checkpoint_and_resume_is_exact(module, tmp_path, monkeypatch, capsys, phase):
    """In the second phase the evaluation at the switch, which --eval-every does not ask for, is already made."""
    settings = {"protocol": "continual", "eval_every": STEPS[module.SCRIPT][1] // 3}
    whole = train(module, tmp_path / "whole", **settings)
    update, calls = module.update, []
    enough = {"sac_moe_multitask": (13, 34), "ppo_moe_multitask": (7, 17)}[module.SCRIPT][phase]

    def update_then_signal(*arguments):
        calls.append(1)
        if len(calls) == enough:
            module.SIGNALS.append(signal.SIGTERM)
        return update(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(module, "update", update_then_signal)
        train(module, tmp_path / "run", **settings)
    assert stop.value.code == 128 + signal.SIGTERM and f"--resume {tmp_path / 'run'}" in capsys.readouterr().err
    evaluations = tmp_path / "run" / "eval.csv"
    steps = {int(row["global_step"]) for row in rows_of(evaluations)} if evaluations.exists() else set()
    assert (STEPS[module.SCRIPT][0] in steps) == bool(phase)
    resume(module, tmp_path / "run")
    assert equal(whole, tmp_path / "run")


def test_resume_at_a_switch_is_exact(module, tmp_path, monkeypatch, capsys):
    """The checkpoint at the end of the first phase has Adam's moments of it, the second starts without.

    A signal cuts the evaluation there short, and resume makes up for it.
    """
    half, end = STEPS[module.SCRIPT]
    settings = {"protocol": "continual", "checkpoint_every": half}
    whole = train(module, tmp_path / "whole", **settings)
    evaluate, evaluations = module.evaluate, []

    def evaluate_then_signal(*arguments):
        evaluations.append(arguments[3])
        module.SIGNALS.append(signal.SIGTERM)
        return evaluate(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(module, "evaluate", evaluate_then_signal)
        train(module, tmp_path / "run", **settings)
    assert set(evaluations) == {half}
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["global_step"] == half
    resume(module, tmp_path / "run")
    assert equal(whole, tmp_path / "run")


def measure_nothing(module, monkeypatch):
    """Evaluations cost nothing."""
    row = {"network": "actor", "metric": "rank", "task": "", "item": "", "value": 0}
    monkeypatch.setattr(module, "measure", lambda agent, args, step, parts: [{"global_step": step} | row])
    rows = [[0.0] * 4]
    monkeypatch.setattr(module, "evaluate", lambda agent, env, args, step, p: [module.eval_row(step, p, 0, rows)])


def test_sac_plays_the_tasks_as_scheduled(tmp_path, monkeypatch):
    """Also where a task comes back and goes on with its episode; the replay of each task has what was played of it."""
    module = quick("sac_moe_multitask")
    played, step = [], module.Env.step
    monkeypatch.setattr(module.Env, "step", lambda env, action: played.append(env.task) or step(env, action))
    monkeypatch.setattr(module, "update", lambda *_: {})
    measure_nothing(module, monkeypatch)
    made = [0, 1, 0, 1]  # environments are tried out, those for evaluations too
    for protocol, cycles, steps, expected in (
        ("multitask", 1, 150, [0, 1] * 75),
        ("continual", 1, 150, [0] * 75 + [1] * 75),
        ("continual", 3, 150, ([0] * 25 + [1] * 25) * 3),
        ("continual", 1, 151, [0] * 76 + [1] * 75),
    ):
        played.clear()
        name = tmp_path / f"{protocol}{cycles}-{steps}"
        run = train(module, name, protocol=protocol, cycles=cycles, total_timesteps=steps)
        assert played == made + expected
        saved = torch.load(run / "checkpoint.pt", weights_only=True)
        for task in (0, 1):
            assert saved[f"buffer_{task}"]["count"] == expected.count(task)
            assert len(saved[f"env_{task}"]["actions"]) == expected.count(task) % 30
            assert saved[f"env_{task}"]["episode"] == 2


def test_continual_sac_learns_from_the_running_task_only_and_gives_each_its_random_steps(tmp_path, monkeypatch):
    module = quick("sac_moe_multitask")
    learned, draw = [], module.draw_batch
    monkeypatch.setattr(module, "draw_batch", lambda b, tasks, size: learned.append(tasks) or draw(b, tasks, size))
    monkeypatch.setattr(module.Run, "due", lambda run, step, every: step % 5 == 0)  # losses are logged then
    measure_nothing(module, monkeypatch)
    run = train(module, tmp_path / "run", protocol="continual", cycles=2, total_timesteps=200, update_every=1)
    assert learned == [[0]] * 31 + [[1]] * 31 + [[0]] * 50 + [[1]] * 50  # 20 random steps, of new tasks only
    events = EventAccumulator(str(run)).Reload().Scalars("losses/critic")  # not those of the task before
    assert [e.step for e in events] == [*range(20, 51, 5), *range(70, 201, 5)]


class Once(Echo):
    """Succeeds at its first step, not at its end; the array that reset() returns is changed in place."""

    def step(self, action):
        *rest, info = super().step(action)
        return *rest, info | {"success": self.t[0] == 1}


def test_sac_acts_stores_logs_and_evaluates_as_told(tmp_path, monkeypatch):
    """Two tasks of two steps, one terminates, the other is truncated; all that a run keeps against numbers by hand."""
    module, acted, learned = quick("sac_moe_multitask"), [], []
    gym.register("Once-v0", Once, max_episode_steps=10)

    def act(actor, obs, task, policy):
        acted.append((*task.tolist(), policy))
        return QUARTER

    def update(agent, batch, task, args):
        learned.append(task.tolist())
        return {"losses/critic": len(learned)}

    sizes, buffer = [], module.ReplayBuffer
    monkeypatch.setattr(module.Actor, "act", act)
    monkeypatch.setattr(module, "update", update)
    monkeypatch.setattr(module, "ReplayBuffer", lambda size, *shape: sizes.append(size) or buffer(size, *shape))
    settings = dict(tasks=("Once-v0", "Once-v0?terminates=false"), seed=2, total_timesteps=60, eval_every=60)
    run = train(module, tmp_path / "run", **settings, update_every=1, eval_episodes=3)  # 20 random steps of each
    assert learned == [[0] * 4 + [1] * 4] * 22 and sizes == [500, 500]
    assert acted == [(t, "stochastic") for t in [0, 1] * 10] + [
        (t, policy) for policy in ("deterministic", "stochastic") for t in (0, 1) for _ in range(6)
    ]
    events = EventAccumulator(str(run), {"scalars": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("losses/critic")] == [(60, 22)]
    saved, table = torch.load(run / "checkpoint.pt", weights_only=True), rows_of(run / "eval.csv")
    for t in (0, 1):

        def drawn(first, episodes, t=t):
            return 10 * np.array([gym.utils.seeding.np_random(first + 2 * i + t)[0].random(2) for i in range(episodes)])

        obs, reward, terminated, next_obs, action = saved[f"buffer_{t}"]["rows"].T
        assert torch.equal(obs, torch.arange(30.0) % 2) and torch.equal(next_obs, obs + 1)
        assert torch.equal(terminated, obs * (t == 0))
        assert (action[20:] == 0.25).all() and -1 <= action[:20].min() < -0.5 and 0.5 < action[:20].max() <= 1
        expected = torch.tensor(drawn(200_006, 15).ravel(), dtype=torch.float32) + 2 * action
        torch.testing.assert_close(reward, expected)
        returns, lengths = (events.Scalars(f"charts/episodic_{name}_{t}") for name in ("return", "length"))
        assert [e.value for e in returns] == pytest.approx(expected.view(15, 2).sum(1).tolist(), rel=1e-5)
        assert [e.value for e in lengths] == [2] * 15
        returns = drawn(2**30 + 200_006, 3).sum(1) + 1
        for row in (row for row in table if row["task"] == f"{t}"):
            found = [float(row[key]) for key in ("return", "return_std", "length", "success", "success_once")]
            assert found == pytest.approx([returns.mean(), returns.std(), 2, 0, 1], abs=1e-4)
    torch.manual_seed(2)  # update() does nothing here: the first weights
    assert same(model(run), module.Agent(1, 1, module.Args(**saved["args"])).state_dict())


def test_ppo_plays_the_tasks_as_scheduled(tmp_path, monkeypatch):
    module = load("ppo_moe_multitask")
    played, learn, rates = [], module.learn, []

    def watch(agent, batch, args):
        played.append(sorted(set(batch.task.tolist())))
        rates.append(round(agent.optimizers[0].param_groups[0]["lr"] / args.learning_rate, 3))
        return learn(agent, batch, args)

    monkeypatch.setattr(module, "learn", watch)
    measure_nothing(module, monkeypatch)
    train(module, tmp_path / "multitask")
    assert played == [[0, 1]] * 10 and rates == [round(1 - i / 10, 3) for i in range(10)]
    played.clear(), rates.clear()
    continual = dict(protocol="continual", cycles=2, total_timesteps=512)
    train(module, tmp_path / "continual", **continual)
    assert played == [[0], [0], [1], [1]] * 2 and rates == [1.0, 0.5] * 4
    rates.clear()
    train(module, tmp_path / "one annealing", **continual, anneal_per_phase=False)
    assert rates == [1 - i / 8 for i in range(8)]


def test_adam_starts_anew_with_each_phase_unless_told_otherwise(tmp_path, monkeypatch):
    module = quick("ppo_moe_multitask")
    update, steps = module.update, []

    def watch(agent, *arguments):
        state = agent.optimizers[0].state
        steps.append(int(max((x["step"] for x in state.values()), default=0)))
        return update(agent, *arguments)

    monkeypatch.setattr(module, "update", watch)
    measure_nothing(module, monkeypatch)
    for reset in (True, False):
        steps.clear()
        train(module, tmp_path / str(reset), protocol="continual", total_timesteps=256, adam_reset=reset)
        assert steps == ([0, 1, 2, 3] * 2 if reset else [*range(8)])  # two rollouts of two updates in each phase


def test_charts_have_return_and_length_of_each_task(tmp_path, monkeypatch):
    module, logged = quick("ppo_moe_multitask"), []
    rollout, log = module.rollout, module.Run.log
    ended = [(0, 3.0, 10), (0, 5.0, 20), (1, 7.0, 40)]
    monkeypatch.setattr(module, "rollout", lambda *a: (rollout(*a)[0], ended))
    monkeypatch.setattr(module.Run, "log", lambda run, metrics: logged.append(metrics) or log(run, metrics))
    measure_nothing(module, monkeypatch)
    train(module, tmp_path / "run", total_timesteps=64)
    found = {key.removeprefix("charts/episodic_"): x for key, x in logged[0].items() if "episodic" in key}
    assert found == {"return_0": 4.0, "length_0": 15.0, "return_1": 7.0, "length_1": 40.0}


def test_no_anneal_lr_keeps_the_learning_rate(tmp_path, monkeypatch):
    module, rates = quick("ppo_moe_multitask"), []
    learn = module.learn
    monkeypatch.setattr(
        module, "learn", lambda agent, *a: rates.append(agent.optimizers[0].param_groups[0]["lr"]) or learn(agent, *a)
    )
    measure_nothing(module, monkeypatch)
    train(module, tmp_path / "run", total_timesteps=192, anneal_lr=False)
    assert rates == [5e-3] * 3


def test_no_episode_of_a_training_comes_twice(tmp_path, monkeypatch):
    """Also not when a task comes back: each has its number, and that is its seed."""
    module, numbers = quick("ppo_moe_multitask"), []
    start = module.Games.start

    def watch(games, i, number):
        numbers.extend([] if games.half else [number])  # half: of the evaluations
        start(games, i, number)

    monkeypatch.setattr(module.Games, "start", watch)
    measure_nothing(module, monkeypatch)
    train(module, tmp_path / "run", protocol="continual", cycles=2, total_timesteps=512)
    assert sorted(numbers) == [*range(len(numbers))] and len(numbers) > 16


def test_an_older_file_has_shared_channels_and_all_actions(tmp_path):
    """Files from before these flags mean what they meant."""
    module = quick("ppo_moe_multitask")
    run = train(module, tmp_path / "run", channels="shared", actions="all", total_timesteps=64)
    for name in ("checkpoint.pt", "policy.pt"):
        saved = torch.load(run / name, weights_only=True)
        saved["args"] = {key: value for key, value in saved["args"].items() if key not in module.OLDER}
        torch.save(saved, run / name)
    module.main(words(evaluate=run / "policy.pt"))
    resume(module, run, total_timesteps=128)
    assert json.loads((run / "run.json").read_text())["args"]["channels"] == "shared"


def test_a_switch_leaves_the_experts_of_other_tasks_alone(module, tmp_path, monkeypatch):
    """Not a bit of them changes: Adam's moments end with the phase that made them. Hardcoded routing, two phases."""
    update, weights = module.update, []

    def watch(agent, *arguments):
        result = update(agent, *arguments)
        weights.append({key: value.clone() for key, value in agent.actor.state_dict().items()})
        return result

    monkeypatch.setattr(module, "update", watch)
    measure_nothing(module, monkeypatch)
    settings = dict(protocol="continual", router="hardcoded", actor_moe="big", critic_moe="big")
    train(module, tmp_path / "run", **settings)
    last, before = weights[-1], weights[len(weights) // 2 - 1]  # as many updates in either phase
    assert {key.split(".experts.")[1][0] for key in last} == {"0", "1"}
    for key in last:
        assert torch.equal(last[key], before[key]) == (".experts.0." in key), key


def test_saved_model_evaluates_on_all_tasks_as_in_training(module, finished, capsys):
    film = {"video": True} if module.SCRIPT.startswith("ppo") else {}
    module.main(words(evaluate=finished, **film))
    text = capsys.readouterr().out
    printed = json.loads(text[: text.rindex("}") + 1], parse_constant=pytest.fail)
    assert printed == json.loads((finished / "evaluation.json").read_text())
    table = {(r["policy"], int(r["task"])): r for r in rows_of(finished / "eval.csv")}
    tasks = SMALL[module.SCRIPT]["tasks"]
    assert [row["task"] for row in printed["deterministic"]] == list(tasks)
    for policy, rows in printed.items():
        for row in rows:
            assert str(row["return"]) == table[policy, tasks.index(row["task"])]["return"]
    if film:
        assert (finished / "video.gif").read_bytes().startswith(b"GIF89a")
    module.main(words(evaluate=finished / "policy.pt"))
    assert (finished / "policy.json").read_text() == (finished / "evaluation.json").read_text()


def test_video_of_sac_shows_every_task(tmp_path, monkeypatch):
    module, frames, mimsave = quick("sac_moe_multitask"), [], imageio.mimsave
    monkeypatch.setattr(
        imageio, "mimsave", lambda path, images, **how: frames.extend(images) or mimsave(path, images, **how)
    )
    tasks = tuple(f"moe_envs:TargetReaching-v0?layout=task{i}&max_episode_steps={5 + i}" for i in range(2))
    run = train(module, tmp_path / "run", tasks=tasks, total_timesteps=60, learning_starts=20)
    module.main(words(evaluate=run, video=True))
    assert len(frames) == 11 and (run / "video.gif").read_bytes().startswith(b"GIF89a")


def test_a_video_that_cannot_be_written_or_is_interrupted(module, tmp_path, monkeypatch, capsys):
    tasks = ("moe_envs:TargetReaching-v0",) if module.SCRIPT.startswith("sac") else ("breakout",)
    run = train(module, tmp_path / "run", tasks=tasks, total_timesteps=64)
    check_video_faults(module, words(evaluate=run, video=True), run / "video.gif", monkeypatch, capsys)


class Film(gym.Env):
    """125 pictures a second, of an environment that draws from the global generators."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 125}
    observation_space, action_space = gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode=None, gain=1.0):
        self.render_mode, self.gain = render_mode, gain

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.full(1, self.gain * np.random.random() + random.random(), np.float32), 1.0, False, False, {}

    def render(self):
        return np.random.default_rng().integers(0, 255, (20, 20, 3), dtype=np.uint8)


gym.register("Films-v0", Film, max_episode_steps=100)
FILMS = ("Films-v0", "Films-v0?gain=2.0")


def test_a_gif_plays_at_the_right_speed_in_browsers(tmp_path):
    """Browsers show a delay below 20 ms as 100 ms."""
    module = quick("sac_moe_multitask")
    run = train(module, tmp_path / "run", tasks=FILMS, total_timesteps=60, learning_starts=20)
    module.main(words(evaluate=run, video=True))
    delays = [picture.info["duration"] for picture in PIL.ImageSequence.Iterator(PIL.Image.open(run / "video.gif"))]
    assert min(delays) >= 20 and sum(delays) == pytest.approx(200 / 125 * 1000, rel=0.05)


def test_global_generators_repeat_themselves_and_resume(tmp_path):
    """Tasks that draw from np.random and random, one beside the other; the first run is cut within their episodes."""
    module = quick("sac_moe_multitask")
    settings = dict(tasks=FILMS, total_timesteps=160, eval_every=160)
    whole = train(module, tmp_path / "whole", **settings)
    np.random.seed(7)
    random.seed(7)
    train(module, tmp_path / "run", **settings | dict(total_timesteps=60, eval_every=60))
    resume(module, tmp_path / "run", total_timesteps=160)
    assert same(model(whole), model(tmp_path / "run"))


def test_a_multitask_run_can_be_made_longer_and_a_continual_one_cannot(module, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    longer = STEPS[module.SCRIPT][1] * 2
    resume(module, tmp_path / "run", total_timesteps=longer)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["global_step"] == longer
    run = train(module, tmp_path / "continual", protocol="continual")
    with pytest.raises(SystemExit) as stop:
        resume(module, run, total_timesteps=longer)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"--total-timesteps {longer}" in error and error.count("\n") == 1


def test_a_run_that_overshot_keeps_its_end_when_it_is_made_no_longer(tmp_path):
    """PPO ends with a whole rollout, here of 64 steps."""
    module = quick("ppo_moe_multitask")
    run = train(module, tmp_path / "run", total_timesteps=100)
    rows = (run / "eval.csv").read_bytes(), (run / "moe.csv").read_bytes()
    resume(module, run, total_timesteps=120)
    assert rows == ((run / "eval.csv").read_bytes(), (run / "moe.csv").read_bytes()) and rows[0].count(b"\n") == 5


def test_divergence_stops_the_run_and_keeps_the_checkpoint(module, tmp_path, capsys):
    rate = {"q_lr" if module.SCRIPT.startswith("sac") else "learning_rate": 1e12}
    with pytest.raises(SystemExit) as stop:
        train(module, tmp_path / "run", **rate)
    assert stop.value.code == 1 and "diverged" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_broken_weights_are_neither_measured_nor_saved(module, tmp_path, monkeypatch, capsys):
    """Those after the first learning; an evaluation and a checkpoint are due."""
    break_weights(module, monkeypatch)
    step = {"sac_moe_multitask": 39, "ppo_moe_multitask": 64}[module.SCRIPT]
    with pytest.raises(SystemExit) as stop:
        train(module, tmp_path / "run", eval_every=step, checkpoint_every=step)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "has diverged; it would again, start anew" in error
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["global_step"] == 0


def test_only_ppo_runs_under_torchrun(module, tmp_path, monkeypatch, capsys):
    for key, value in (("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as stop:
        train(module, tmp_path / "run")
    assert stop.value.code == 2 and "start it with python" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class TwoActions(gym.ActionWrapper):
    """Observes what Pendulum does."""

    def __init__(self):
        super().__init__(gym.make("Pendulum-v1"))
        self.action_space = gym.spaces.Box(-1, 1, (2,))

    def action(self, action):
        return action[:1]


class WholeNumbers(Film):
    action_space = gym.spaces.Box(0, 9, (1,), np.int64)


gym.register("Pendulum2-v0", TwoActions, max_episode_steps=10)
gym.register("Whole-v0", WholeNumbers, max_episode_steps=10)
WRONG = {
    "two experts, top three": (dict(router="topk", top_k=3), "--top-k 3: there are 2 experts"),
    "more tasks than experts": (dict(router="hardcoded", num_experts=1), "--num-experts 1"),
    "no experts": (dict(num_experts=0), "--num-experts 0"),
    "width of the last layer": (dict(actor_moe="final", match_params=True), "--match-params"),
    "cycles of everything at once": (dict(cycles=2), "--cycles"),
    "no tasks": (dict(tasks=()), "--tasks"),
    "fewer steps than phases": (dict(protocol="continual", cycles=300, total_timesteps=500), "--total-timesteps 500"),
    "experts that nobody chooses": (dict(top_k=2), "--top-k"),
    "choice of no experts": (dict(router="topk", top_k=2, actor_moe="baseline", critic_moe="baseline"), "--top-k"),
    "balance of nothing": (dict(load_balance=0.1), "--load-balance"),
    "width of no experts": (dict(actor_moe="baseline", critic_moe="baseline", match_params=True), "--match-params"),
    "negative load balance": (dict(load_balance=-1.0), "--load-balance -1.0"),
    "nothing to resume": (dict(resume="no/such/run"), "--resume no/such/run"),
    "no such gpu": (dict(device=NO_GPU), "--device cuda"),
    "a CPU with a number": (dict(device="cpu:0"), "--device cpu:0: must be cpu, cuda or cuda:N"),
    "more experts than memory": (dict(num_experts=10**6), "--num-experts 1000000: must lie between"),
    "more threads than the machine can use": (dict(num_threads=10**6), "--num-threads 1000000: must lie between"),
}
WRONG_SAC = {
    "other observations": (dict(tasks=("Pendulum-v1", "Hopper-v5")), "--tasks Hopper-v5"),
    "other actions": (dict(tasks=("Pendulum-v1", "Pendulum2-v0")), "--tasks Pendulum2-v0: its action_space has shape"),
    "argument of a wrong kind": (dict(tasks=("Pendulum-v1?g=abc",)), "--tasks Pendulum-v1?g=abc"),
    "no update": (dict(learning_starts=70, update_every=130), "--update-every 130"),
    "unknown set": (dict(tasks=("target-eating",)), "sets: target-reaching"),
    "discrete actions": (dict(tasks=("CartPole-v1",), batch_size=8), "--tasks CartPole-v1"),
    "a task twice": (dict(tasks=("Pendulum-v1", "Pendulum-v1")), "--tasks Pendulum-v1 Pendulum-v1"),
    "unequal shares": (dict(batch_size=7), "--batch-size 7"),
    "no room": (dict(buffer_size=1), "--buffer-size 1"),
    "more transitions than memory": (dict(buffer_size=10**12), "--buffer-size 1000000000000: would take"),
    "a batch larger than memory": (dict(batch_size=10**9), "--batch-size 1000000000: must lie between"),
    "whole numbers as actions": (dict(tasks=("Whole-v0",), batch_size=8), "--tasks Whole-v0: needs real-valued"),
    "random to the end": (dict(learning_starts=81), "--learning-starts 81"),
    "no update in a phase": (
        dict(protocol="continual", learning_starts=71, update_every=11),
        "with --update-every 11 the 80 steps of a phase",
    ),
}
WRONG_PPO = {
    "unknown game": (dict(tasks=("breakout", "pong")), "--tasks pong"),
    "more games than memory": (dict(num_envs=10**8), "--num-envs 100000000: must lie between"),
    "more steps than memory": (dict(num_steps=10**9), "--num-steps 1000000000: must lie between"),
    "more slots than memory": (dict(slots=10**9), "--slots 1000000000: must lie between"),
    "a game twice": (dict(tasks=("breakout", "breakout")), "--tasks breakout breakout"),
    "unequal shares": (dict(num_envs=5), "--num-envs 5"),
    "slots of no tokens": (dict(slots=2, tokens="persamp"), "--slots"),
    "tokens of no middle": (dict(tokens="persamp", actor_moe="big", critic_moe="big"), "--tokens persamp"),
    "width of the experts of cells": (dict(match_params=True), "--tokens persamp"),
    "unequal minibatches": (dict(num_minibatches=7), "--num-minibatches 7"),
    "a router that learns nothing": (dict(freeze_router=True, router="hardcoded"), "--freeze-router"),
    "no router to freeze": (dict(freeze_router=True, actor_moe="baseline", critic_moe="baseline"), "--freeze-router"),
    "no phases, Adam": (dict(adam_reset=False), "--no-adam-reset"),
    "no phases, annealing": (dict(anneal_per_phase=False), "--no-anneal-per-phase"),
    "nothing to anneal": (
        dict(protocol="continual", anneal_lr=False, anneal_per_phase=False),
        "--no-anneal-per-phase",
    ),
    "minibatches of one": (dict(num_minibatches=64), "at least 2 each; change it, --num-envs or --num-steps"),
}


@pytest.mark.parametrize("name", [*WRONG, *WRONG_SAC, *(f"ppo {key}" for key in WRONG_PPO)])
def test_wrong_input_is_one_line_that_names_the_flag(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cases = [("sac_moe_multitask", WRONG | WRONG_SAC, name), ("ppo_moe_multitask", WRONG, name)]
    cases += [("ppo_moe_multitask", WRONG_PPO, name.removeprefix("ppo "))]
    for script, table, key in cases:
        if key not in table or (name.startswith("ppo ") != (table is WRONG_PPO)):
            continue
        module, (wrong, expected) = load(script), table[key]
        with pytest.raises(SystemExit) as stop:
            module.main(words(**(SMALL[script] | wrong)))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and expected in error, error
        assert not list(tmp_path.iterdir())


def test_missing_minatar_is_one_line_with_the_remedy(monkeypatch, tmp_path, capsys):
    module = load("ppo_moe_multitask")
    monkeypatch.setitem(sys.modules, "minatar", None)
    with pytest.raises(SystemExit) as stop:
        train(module, tmp_path / "run")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "pip install minatar" in error and "--tasks" in error
    assert not (tmp_path / "run").exists()


def test_resumed_run_cannot_change(module, finished, capsys):
    for wrong, expected in ((dict(gamma=0.5), "--gamma 0.5"), (dict(num_experts=5), "--num-experts 5")):
        with pytest.raises(SystemExit) as stop:
            resume(module, finished, **wrong)
        assert stop.value.code == 2 and expected in capsys.readouterr().err


def test_folder_of_a_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = module.main(words(**(SMALL[module.SCRIPT] | {"total_timesteps": 64})))
    tasks = {"sac_moe_multitask": "2tasks", "ppo_moe_multitask": "MinAtar-breakout-asterix"}[module.SCRIPT]
    assert run.parent.name == "runs" and run.name.startswith(f"{tasks}__{module.SCRIPT}__s1__")

"""Faults that bug trackers and fault injection have shown: every one ends in a right run or in one clear line.

What stands below a script's line is tested on the base of each family.
"""

import ast
import fcntl
import json
import math
import os
import random
import signal
import sys
import threading
import time
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ALGOS, SCRIPTS, check_video_faults
from processes import Started
from tensorboard.summary.writer.record_writer import RecordWriter
from test_training import TINY, family, flags, model, same, start, train


class Probe(gym.Env):
    """Pays 1 a step; `answers` replaces what it answers, `actions` and `closed` say what happened to it."""

    seen, closed = [], []

    def __init__(self, low=-2.0, high=1.0, dtype=np.float64, flag=True, **answers):
        self.observation_space = gym.spaces.Box(-9, 9, (1,))
        self.action_space = gym.spaces.Box(np.full(1, low, dtype), np.full(1, high, dtype), dtype=dtype)
        self.flag, self.answers, self.count = flag, answers, 0

    def answer(self):
        return np.array(self.answers.get("obs", [0.0]), np.float32), dict(self.answers.get("info", {}))

    def reset(self, *, seed=None, options=None):
        assert seed is None or 0 <= seed < 2**31, "does not fit an int32"  # None: PPO's episodes between two seeds
        self.count = 0
        late = self.answers.get("late_nan")
        if (late and late.pop(0)) or seed == self.answers.get("bad_seed", -1):
            return np.array([math.nan], np.float32), {}
        return self.answer()

    def step(self, action):
        self.seen.append(action.copy())
        self.count += 1
        obs, info = self.answer()
        if self.answers.get("draws"):
            obs[:] = np.random.random() + random.random()
        success = self.answers.get("successes", {}).get(self.count)
        info |= {} if success is None else {"success": success}
        return obs, self.answers.get("reward", 1.0), False, False, info

    def close(self):
        self.closed.append(1)


gym.register("Probe-v0", Probe, max_episode_steps=5)


@pytest.fixture
def probe(monkeypatch):
    """Sets what Probe-v0 answers."""
    Probe.seen.clear()
    Probe.closed.clear()
    return lambda **answers: [monkeypatch.setitem(gym.registry["Probe-v0"].kwargs, k, v) for k, v in answers.items()]


def refused(script, capsys, code=2, **changes) -> str:
    """The one line with which the script refuses to run, having created nothing."""
    with pytest.raises(SystemExit) as stop:
        script.main(flags(**(TINY[family(script)] | changes)))
    error = capsys.readouterr().err
    assert stop.value.code == code and error.count("\n") == 1, error
    return error


def rows(run) -> list[dict]:
    header, *lines = (line.split(",") for line in (run / "eval.csv").read_text().splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (-3e38, 3e38), (-math.inf, math.inf)])
def test_action_bounds_that_cannot_be_scaled_are_refused(base, probe, tmp_path, low, high, capsys):
    probe(low=low, high=high, dtype=np.float32)
    assert "needs real-valued actions with finite bounds" in refused(
        base, capsys, env_id="Probe-v0", run_dir=tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "value"),
    [("false", False), ("FALSE", False), ("no", False), ("off", False), ("True", True), ("on", True)]
    + [("none", None), ("null", None), ("inf", math.inf), ("-Inf", -math.inf), ("1e-3", 1e-3), ("'on'", "on")],
)
def test_words_in_env_id_mean_what_they_say(base, word, value):
    assert base.Env(base.Args(env_id=f"Probe-v0?flag={word}")).unwrapped.flag == value
    assert math.isnan(base.Env(base.Args(env_id="Probe-v0?flag=nan")).unwrapped.flag)


def vector_of_probes(num_envs, max_episode_steps, **answers):
    """What an environment may bring that is vectorised itself."""
    one = lambda: gym.wrappers.TimeLimit(Probe(**answers), max_episode_steps)  # noqa: E731
    return gym.vector.SyncVectorEnv([one] * num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


gym.register("ProbeVector-v0", Probe, vector_entry_point=vector_of_probes, max_episode_steps=5)


@pytest.mark.parametrize("form", ["Probe", "ProbeVector", "asynchronous"])
def test_global_generators_repeat_themselves_and_resume(base, tmp_path, form):
    """An environment that draws from np.random and random; the first run is cut in the middle of an episode."""
    settings = {"env_id": "ProbeVector-v0?draws=true" if form == "ProbeVector" else "Probe-v0?draws=true"}
    if family(base) == "ppo":
        settings |= {"no_anneal_lr": True, "async_envs": form == "asynchronous"}
    elif form != "Probe":
        pytest.skip("has one environment")
    whole = train(base, tmp_path / "whole", total_timesteps=242, **settings)
    np.random.seed(7)
    random.seed(7)
    train(base, tmp_path / "run", total_timesteps=220, **settings | {"eval_every": 121})
    base.main(flags(resume=tmp_path / "run", total_timesteps=242))
    assert same(model(whole), model(tmp_path / "run"))


def test_global_generators_resume_within_the_first_episode(sac_script, probe, tmp_path):
    """Evaluation's environment is made, and seeds the generators, after the training's has begun its first episode."""
    probe(draws=True)
    whole, run = (train(sac_script, tmp_path / str(n), env_id="Probe-v0", total_timesteps=n) for n in (8, 3))
    sac_script.main(flags(resume=run, total_timesteps=8))
    rows = [torch.load(path / "checkpoint.pt", weights_only=True)["buffer"]["rows"] for path in (whole, run)]
    assert torch.equal(*rows)


def test_a_longer_run_forgets_an_evaluation_that_its_old_end_owed(sac_script, tmp_path, monkeypatch):
    """Its end was no multiple of --eval-every, and the evaluation there was cut short."""
    run = train(sac_script, tmp_path / "run", total_timesteps=170)
    saved = torch.load(run / "checkpoint.pt", weights_only=True) | {"owed": True}
    torch.save(saved, run / "checkpoint.pt")
    sac_script.main(flags(resume=run, total_timesteps=220))
    assert same(model(run), model(train(sac_script, tmp_path / "whole")))


@pytest.mark.parametrize("wrapper", [gym.wrappers.NormalizeObservation, gym.wrappers.NormalizeReward])
def test_normalisers_that_outlive_an_episode_are_refused(base, wrapper, capsys):
    gym.register("Normal-v0", lambda: wrapper(gym.make("Pendulum-v1")), max_episode_steps=50)
    assert f"{wrapper.__name__} changes from episode to episode" in refused(base, capsys, env_id="Normal-v0")


class Curriculum(Probe):
    """Pays more from episode to episode, and observes nothing of it."""

    episodes = 0

    def reset(self, *, seed=None, options=None):
        Curriculum.episodes += 1
        return super().reset(seed=seed)

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, float(Curriculum.episodes), terminated, truncated, info


gym.register("Curriculum-v0", Curriculum, max_episode_steps=50)


def test_replayed_rewards_have_to_be_the_same(sac_script, tmp_path, capsys):
    train(sac_script, tmp_path / "run", env_id="Curriculum-v0", total_timesteps=160)
    error = refused(sac_script, capsys, **TINY["sac"] | {"env_id": "Curriculum-v0", "resume": tmp_path / "run"} | SAVED)
    assert "does not repeat its own episode" in error


SAVED = dict(total_timesteps=170)


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt"])
def test_flipped_bits_are_found(base, tmp_path, name, capsys):
    run = train(base, tmp_path / "run")
    data, rng, before = (run / name).read_bytes(), random.Random(0), model(run)
    option = {"resume" if name == "checkpoint.pt" else "evaluate": run}
    for _ in range(12):
        position = rng.randrange(len(data))
        flipped = data[:position] + bytes([data[position] ^ (1 << rng.randrange(8))]) + data[position + 1 :]
        (run / name).write_bytes(flipped)
        try:
            base.main(flags(**option))
        except SystemExit as stop:
            assert stop.code == 2
            assert capsys.readouterr().err.count("\n") == 1
        else:  # a bit that nobody reads, such as a date in the zip's directory: nothing else may have changed
            assert same(model(run), before)
    (run / name).write_bytes(data)


def test_an_evaluation_that_is_not_a_number_fails(base, tmp_path, probe, monkeypatch, capsys):
    run = train(base, tmp_path / "run", env_id="Probe-v0")
    monkeypatch.setattr(Probe, "step", lambda self, action: (self.answer()[0], math.nan, False, False, {}))
    error = refused_evaluation(base, run, capsys)
    assert "an observation or reward of Probe-v0 is not finite" in error


def refused_evaluation(script, path, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        script.main(flags(evaluate=path, eval_episodes=1))
    error = capsys.readouterr().err
    assert stop.value.code in (1, 2) and error.count("\n") == 1, error
    return error


def test_seeds_fit_an_int32_and_those_of_evaluation_are_others(base, tmp_path, monkeypatch):
    seeds, reset = [], Probe.reset

    def remember(self, seed=None, options=None):
        seeds.extend([] if seed is None else [seed])
        return reset(self, seed=seed)

    monkeypatch.setattr(Probe, "reset", remember)
    train(base, tmp_path / "run", env_id="Probe-v0", seed=2**31 - 1)
    halves = {seed >= 2**30 for seed in seeds}
    assert halves == {True, False} and max(seeds) < 2**31 and min(seeds) >= 0


@pytest.mark.parametrize("seed", [1, 2])
def test_every_episode_of_an_evaluation_has_a_seed_of_its_own(base, seed, monkeypatch):
    args, seeds, reset = base.Args(env_id="Probe-v0", eval_episodes=3, seed=seed), [], Probe.reset
    env, agent = base.Env(args, evaluation=True), SimpleNamespace(act=lambda *_: np.zeros(1, np.float32))
    monkeypatch.setattr(Probe, "reset", lambda self, seed=None, **_: seeds.append(seed) or reset(self, seed=seed))
    for _ in range(2):
        seeds.clear()
        base.evaluate(agent, env, args, 0, "deterministic")
        assert seeds == [2**30 + 100_003 * seed + i for i in range(3)]


@pytest.mark.parametrize("when", [{"late_nan": [False] * 12 + [True]}, {"bad_seed": 100_004}])
def test_a_first_observation_that_is_not_finite_is_the_environments_fault(base, tmp_path, probe, when, capsys):
    """In the 13th episode, or in one with a seed of the training: it must reach neither replay nor moments."""
    probe(**when)
    with pytest.raises(SystemExit) as stop:
        train(base, tmp_path / "run", env_id="Probe-v0")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "an observation or reward of Probe-v0 is not finite" in error
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    kept = saved["agent"].values() if family(base) == "ppo" else [saved["buffer"]["rows"]]
    assert all(x.isfinite().all() for x in kept)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_of_ppo_takes_one_value_in_any_shape(ppo, probe, asynchronous):
    probe(reward=np.array([[2.0]]), obs=[[3.0]], info={"success": np.array([True])})
    args = ppo.Args(env_id="Probe-v0", num_envs=2, num_steps=7, async_envs=asynchronous)
    with ppo.OPEN:
        sampler = ppo.Sampler(ppo.make_envs(args), args)
        sampler.reset(0)
        rollout, _ = sampler.rollout(ppo.Agent(1, 1, args))
    assert rollout.reward.tolist() == [[2.0] * 2] * 7 and rollout.next_obs.tolist() == [[[3.0]] * 2] * 7


def test_several_rewards_are_refused(base, probe, capsys):
    probe(reward=np.array([1.0, 2.0]))
    assert "--env-id Probe-v0" in refused(base, capsys, env_id="Probe-v0")


def test_observations_of_another_size_than_their_spaces_are_refused(base, probe, capsys):
    probe(obs=[0.0, 1.0])
    assert "--env-id Probe-v0" in refused(base, capsys, env_id="Probe-v0")


def test_success_at_the_end_and_at_any_step(base, tmp_path, probe, capsys):
    probe(successes={2: True, 3: False, 4: False, 5: False})
    run = train(base, tmp_path / "run", env_id="Probe-v0")
    assert {(row["success"], row["success_once"]) for row in rows(run)} == {("0.0", "1.0")}
    assert "success 0.00, success_once 1.00" in capsys.readouterr().out


MODULE = """
import gymnasium as gym
class Broken(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}
    def step(self, action):
        return {}["speed"]
class Fine(Broken):
    def step(self, action):
        return self.observation_space.sample() * 0, 0.0, False, False, {}
gym.register("Broken-v0", Broken, max_episode_steps=5)
gym.register("Fine-v0", Fine, max_episode_steps=5)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder from which modules are imported anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    for name in ("my_envs", "slow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_module_in_the_current_folder_is_found_and_its_error_has_a_place(base, folder, capsys):
    (folder / "my_envs.py").write_text(MODULE)
    error = refused(base, capsys, env_id="my_envs:Broken-v0")
    assert "KeyError 'speed' (" in error and f"{folder / 'my_envs.py'}:9" in error
    train(base, folder / "run", env_id="my_envs:Fine-v0", total_timesteps=20)
    sys.modules.pop("my_envs")


@pytest.mark.parametrize("damage", ["drop", "wrong"])
@pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt"])
def test_files_with_a_key_missing_or_of_another_type(base, tmp_path, name, damage, capsys):
    run = train(base, tmp_path / "run", total_timesteps=160)
    option = "resume" if name == "checkpoint.pt" else "evaluate"
    saved = torch.load(run / name, weights_only=True)
    needed = saved.keys() - {"dirty", "command", "machine", "processes", "versions", "steps_per_second"}
    if option == "evaluate":
        needed = {"script", "args", "agent", "global_step"}
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.name != name}
    for key in sorted(needed - {"wall_time", "resumed", "owed", "commit"}):
        broken = {k: v for k, v in saved.items() if k != key} | ({key: 7.5} if damage == "wrong" else {})
        if (key, damage) == ("global_step", "wrong"):
            broken[key] = "many"
        torch.save(broken, run / name)
        with pytest.raises(SystemExit) as stop:
            base.main(flags(**{option: run}))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1, (key, error)
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.name in before}


def test_a_lost_or_damaged_run_json_is_written_anew(base, tmp_path):
    run = train(base, tmp_path / "run", total_timesteps=160)
    before = json.loads((run / "run.json").read_text())
    for damage in (lambda path: path.unlink(), lambda path: path.write_text("{half of")):
        damage(run / "run.json")
        base.main(flags(resume=run))
        after = json.loads((run / "run.json").read_text())
        assert all(after[key] == before[key] for key in ("args", "command", "script"))


def test_a_full_disk_that_tensorboards_thread_meets_is_one_line(base, tmp_path, monkeypatch, capsys):
    """Its queue holds ten values, so the thread's failure shows while the run goes on."""

    def write(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not that of an earlier run
    with pytest.raises(SystemExit) as stop:
        train(base, tmp_path / "run", eval_every=22)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "No space left" in error, error


@pytest.mark.parametrize("value", [1_000_000, 3_000_000_000])
def test_more_threads_than_the_machine_can_use(base, value, capsys):
    assert f"--num-threads {value}: must lie between 1 and" in refused(base, capsys, num_threads=value)


@pytest.mark.parametrize(("flag", "value"), [("batch_size", 10**9), ("num_experts", 10**6), ("num_experts", 4000)])
def test_more_than_memory_is_refused(pmoe, tmp_path, flag, value, capsys, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 2**17)  # pages, bytes: 17 GB; of 4000 experts the pairs take more
    error = refused(pmoe, capsys, run_dir=tmp_path / "run", **{flag: value})
    assert f"--{flag.replace('_', '-')} {value}: would take" in error and "the machine has" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["num_envs", "num_steps", "num_experts"])
def test_more_than_memory_is_refused_by_ppo(ppo_pmoe, tmp_path, flag, capsys):
    error = refused(ppo_pmoe, capsys, run_dir=tmp_path / "run", **{flag: 10**8})
    assert f"--{flag.replace('_', '-')} 100000000: would take" in error and "the machine has" in error
    error = refused(ppo_pmoe, capsys, run_dir=tmp_path / "run", num_envs=10**5, num_steps=4, async_envs=True)
    assert "--num-envs 100000: would take" in error and not (tmp_path / "run").exists()


def test_a_video_that_cannot_be_written_or_is_interrupted(base, tmp_path, monkeypatch, capsys):
    env_id = "moe_envs:TargetReaching-v0?layout=fixed"
    run = train(base, tmp_path / "run", env_id=env_id, total_timesteps=160, eval_episodes=1)
    film = flags(evaluate=str(run), eval_episodes=1, video=True)
    check_video_faults(base, film, run / "video.gif", monkeypatch, capsys)


def test_an_evaluation_that_cannot_be_written_says_what_helps(base, tmp_path, monkeypatch, capsys):
    run = train(base, tmp_path / "run", total_timesteps=160)

    def full(path, data):
        raise OSError(f"cannot write {path}, is the disk full?")

    monkeypatch.setattr(base, "write", full)
    capsys.readouterr()
    error = refused_evaluation(base, run, capsys)
    assert "evaluation.json, is the disk full?" in error and "; make room" in error and "--resume" not in error


@pytest.mark.parametrize("name", ["x" * 256, "\udcff", "file/run"])
def test_run_folders_that_cannot_be_made(base, tmp_path, name, monkeypatch, capfd):
    """A name that is too long, one that is not UTF-8, one below a file."""
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert "--run-dir" in refused(base, capfd, run_dir=name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_omp_num_threads_is_honoured_where_no_number_is_given(base, tmp_path, monkeypatch):
    settings = {key: value for key, value in TINY[family(base)].items() if key != "num_threads"}
    try:
        for i, (variable, threads) in enumerate([("3", 3), ("", {"sac": 2, "ppo": 1}[family(base)])]):
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
            run = base.main(flags(**settings | {"total_timesteps": 22, "run_dir": tmp_path / str(i)}))
            assert json.loads((run / "run.json").read_text())["args"]["num_threads"] == threads
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


def test_environments_are_closed_also_after_an_error(base, tmp_path, probe, monkeypatch):
    run = train(base, tmp_path / "run", env_id="Probe-v0")
    made = {"sac": 2, "ppo": 2 + TINY["ppo"]["num_envs"]}[family(base)]
    assert len(Probe.closed) >= made
    Probe.closed.clear()
    base.main(flags(evaluate=run, eval_episodes=1))
    assert len(Probe.closed) == 1
    Probe.closed.clear()
    monkeypatch.setattr(base, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(base, tmp_path / "other", env_id="Probe-v0")
    assert len(Probe.closed) >= made


SLOW = """
import os, pathlib, time
import gymnasium as gym
class Slow(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    def reset(self, *, seed=None, options=None):
        self.count, self.evaluation = 0, seed is not None and seed >= 2**30
        return self.observation_space.sample() * 0, {}
    def step(self, action):
        self.count += 1
        if self.evaluation and self.count > 2 and "PAUSE" in os.environ:
            pathlib.Path("evaluating").touch()
            time.sleep(1)
        return self.observation_space.sample() * 0, float(action[0]), False, False, {}
gym.register("Slow-v0", Slow, max_episode_steps=50)
"""


def test_a_signal_ends_an_evaluation_which_is_made_again(base, folder, monkeypatch):
    """An evaluation that would take minutes, cut short; resumed with a fast one, the run equals a whole one."""
    (folder / "slow.py").write_text(SLOW)
    settings = TINY[family(base)] | {"env_id": "slow:Slow-v0", "total_timesteps": 165, "eval_every": 160}
    settings |= {"sac": {}, "ppo": {"checkpoint_every": 44, "total_timesteps": 198, "eval_every": 132}}[family(base)]
    monkeypatch.setenv("PAUSE", "yes")
    process = start(base.SCRIPT, *flags(**settings, run_dir="run"))
    monkeypatch.delenv("PAUSE")
    while not (folder / "evaluating").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()  # the evaluation has 48 steps of a second before it
    saved = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)["global_step"]
    assert saved == {"sac": 160, "ppo": 88}[family(base)]  # PPO's of step 132 would lack that evaluation
    assert process.poll() == 143 and f"SIGTERM, step {saved} is saved; --resume run" in output, output
    base.main(flags(resume="run"))
    base.main(flags(**settings, run_dir="whole"))
    sys.modules.pop("slow")
    assert same(model("run"), model("whole"))
    assert (folder / "run" / "eval.csv").read_bytes() == (folder / "whole" / "eval.csv").read_bytes()


def test_a_signal_ends_every_process_of_ppo(ppo, tmp_path, monkeypatch, capsys):
    """Not only the first, which alone writes."""
    monkeypatch.setattr(ppo, "RANK", 1)
    args = ppo.Args("Probe-v0", run_dir=str(tmp_path / "run"))
    run = ppo.Run(args, None, agent=ppo.Agent(1, 1, args))
    monkeypatch.setattr(ppo, "SIGNALS", [signal.SIGTERM])
    with pytest.raises(SystemExit) as stop:
        for _ in run.steps():
            run.log({}), run.evaluate(), run.save()
    assert stop.value.code == 143 and not capsys.readouterr().out and not (tmp_path / "run").exists()


def test_a_second_process_in_one_folder_is_refused(base, tmp_path, capsys):
    run = train(base, tmp_path / "run", total_timesteps=160)
    folder = os.open(run, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # as the other process does
    before = (run / "run.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        base.main(flags(resume=run))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"--resume {run}: " in error and "no other process may use it" in error
    assert (run / "run.json").read_bytes() == before
    os.close(folder)  # as its end does, whatever ends it
    base.main(flags(resume=run))


def test_a_folder_that_the_terminal_cannot_write(tmp_path):
    for name in ("sac", "ppo"):
        settings = TINY[name] | {"total_timesteps": 20, "run_dir": f"{name}-ä"}
        process = Started(ALGOS / f"{name}.py", *flags(**settings), cwd=tmp_path, PYTHONIOENCODING="ascii")
        output = process.communicate()
        assert process.poll() == 0 and rf"run folder {name}-\xe4" in output, output


@pytest.mark.parametrize("fps", [20, 67, 100, 125])
def test_a_gif_plays_at_the_right_speed_in_browsers(base, tmp_path, fps):
    """Browsers show a delay below 20 ms as 100 ms."""
    from PIL import Image

    class Film(Probe):
        metadata = {"render_modes": ["rgb_array"], "render_fps": fps}

        def __init__(self, render_mode=None):
            super().__init__()
            self.render_mode = render_mode

        def render(self):
            rng = np.random.default_rng(self.count)
            return rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)

    gym.register("Film-v0", Film, max_episode_steps=200)
    run = train(base, tmp_path / "run", env_id="Film-v0", total_timesteps=20)
    base.main(flags(evaluate=run, video=True))
    picture = Image.open(run / "video.gif")
    delays = []
    for i in range(picture.n_frames):
        picture.seek(i)
        delays.append(picture.info["duration"])
    assert min(delays) >= 20
    assert sum(delays) == pytest.approx(200 / fps * 1000, rel=0.05)


@pytest.mark.parametrize(
    "env_id, camera",
    [("HalfCheetah-v5", "track"), ("Hopper-v5?camera_id=-1", None), ("Pendulum-v1", None)],
)
def test_the_camera_follows_the_body(base, env_id, camera):
    """Gymnasium's own one for HalfCheetah and Ant stands still: after some steps the picture is empty."""
    for kwargs in ({"render_mode": "rgb_array"}, {}):
        made = base.Env(base.Args(env_id=env_id), evaluation=True, **kwargs).spec.kwargs.get("camera_name")
        assert made == (camera if kwargs else None)


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_check_is_an_assertion(name):
    """python -O leaves them out."""
    tree = ast.parse((ALGOS / f"{name}.py").read_text())
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]

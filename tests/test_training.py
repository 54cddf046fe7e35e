"""Whole runs: same seed same bits, exact resume after a real kill, evaluation, files, errors, a script copied alone."""

import ast
import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ALGOS, MULTITASK, RIVALS, SCRIPTS, load
from processes import Started
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COMMON = dict(total_timesteps=220, eval_every=110, eval_episodes=1, num_threads=1)
EPISODE = {"env_id": "Pendulum-v1?max_episode_steps=50"}  # short, so that some end
TINY = {
    "sac": COMMON | EPISODE | dict(learning_starts=150, batch_size=16, checkpoint_every=160, buffer_size=1000),
    "ppo": COMMON | EPISODE | dict(num_envs=2, num_steps=11, num_minibatches=2, update_epochs=2, checkpoint_every=110),
}


def family(script) -> str:
    """Key of TINY: "sac" or "ppo"."""
    return script.SCRIPT.split("_")[0]


def train(script, folder, **changes):
    """Runs `script` in this process; returns the folder of the run."""
    return script.main(flags(**(TINY[family(script)] | {"run_dir": str(folder)} | changes)))


def model(folder) -> dict:
    return torch.load(Path(folder) / "model.pt", weights_only=True)["agent"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def flags(**values) -> list[str]:
    words = {f"--{'no-' * (v is False)}{k.replace('_', '-')}": v for k, v in values.items()}
    return [w for k, v in words.items() for w in ([k] if isinstance(v, bool) else [k, str(v)])]


def start(script_name, *arguments, cwd=None, path=ALGOS) -> Started:
    """The script in a process of its own."""
    return Started(Path(path) / f"{script_name}.py", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """A finished tiny run of every script."""
    return train(script, tmp_path_factory.mktemp(script.SCRIPT) / "run")


def test_same_seed_same_run_and_other_seed_another(script, finished, tmp_path):
    again, other = train(script, tmp_path / "again"), train(script, tmp_path / "other", seed=2)
    assert same(model(finished), model(again)) and not same(model(finished), model(other))
    assert (finished / "eval.csv").read_bytes() == (again / "eval.csv").read_bytes()


def test_evaluation_and_checkpoints_do_not_change_training(script, finished, tmp_path):
    checkpoints = {"checkpoint_every": 31} if family(script) == "sac" else {}  # PPO's end the running episodes
    other = train(script, tmp_path / "run", eval_every=47, eval_episodes=2, **checkpoints)
    assert same(model(finished), model(other))


def test_files_of_a_run(script, finished):
    run = json.loads((finished / "run.json").read_text())
    assert run["script"] == script.SCRIPT and run["args"]["seed"] == 1 and run["global_step"] == 220
    assert {"command", "commit", "dirty", "versions", "machine", "wall_time", "steps_per_second"} <= run.keys()
    rows = [line.split(",") for line in (finished / "eval.csv").read_text().splitlines()]
    policies = ["deterministic", *["gate"] * script.SCRIPT.endswith("pmoe"), "stochastic"]
    assert [row[:3] for row in rows[1:]] == [[step, policy, "1"] for step in ("110", "220") for policy in policies]
    assert not [field.name for field in fields(script.Args) if field.name not in run["args"]]
    names = {path.name.split(".")[0] for path in finished.iterdir()}
    assert names - {"evaluation"} == {"run", "eval", "checkpoint", "model", "policy", "events"}


def test_the_stochastic_policy_is_evaluated_at_the_last_three_evaluations(script, tmp_path):
    run = train(script, tmp_path / "run", eval_every=44, eval_episodes=1)
    rows = [line.split(",")[:2] for line in (run / "eval.csv").read_text().splitlines()[1:]]
    steps = [int(step) for step, policy in rows if policy == "deterministic"]
    assert steps == [44, 88, 132, 176, 220]
    assert [int(step) for step, policy in rows if policy == "stochastic"] == steps[-3:]
    if script.SCRIPT.endswith("pmoe"):
        assert [int(step) for step, policy in rows if policy == "gate"] == steps


def test_policy_file_has_the_actor_alone_and_evaluates_as_the_run_does(script, finished, tmp_path, capsys):
    saved = torch.load(finished / "policy.pt", weights_only=True)
    assert saved["agent"] and all(key.startswith("actor.") for key in saved["agent"]) and "buffer" not in saved
    assert all(torch.equal(value, model(finished)[key]) for key, value in saved["agent"].items())
    shutil.copy(finished / "policy.pt", tmp_path / "s1.pt")
    script.main(flags(evaluate=str(finished)))
    of_run = capsys.readouterr().out
    script.main(flags(evaluate=str(tmp_path / "s1.pt")))
    assert capsys.readouterr().out == of_run == (tmp_path / "s1.json").read_text() + "\n"


def test_a_flag_that_an_older_file_lacks_takes_the_value_of_then(script, finished, tmp_path, monkeypatch, capsys):
    saved = torch.load(finished / "policy.pt", weights_only=True)
    del saved["args"]["gamma"]
    torch.save(saved, tmp_path / "old.pt")
    monkeypatch.setitem(script.OLDER, "gamma", 0.99)
    script.main(flags(evaluate=str(tmp_path / "old.pt")))
    assert json.loads(capsys.readouterr().out)["stochastic"]["episodes"] == 1


def test_saved_model_evaluates_as_in_training(script, finished, capsys):
    script.main(flags(evaluate=str(finished), eval_episodes=1))
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # strict: no NaN
    assert printed == json.loads((finished / "evaluation.json").read_text())
    lines = (finished / "eval.csv").read_text().splitlines()
    for line in lines[-len(printed) :]:
        row = dict(zip(lines[0].split(","), line.split(","), strict=True))
        result = printed[row["policy"]]
        assert (str(result["return"]), str(result["length"])) == (row["return"], row["length"])


@pytest.mark.parametrize(("update_every", "updates"), [(1, 31), (4, 8)])
def test_updates_start_and_repeat_as_told(sac_script, tmp_path, update_every, updates, monkeypatch):
    update, calls = sac_script.update, []
    monkeypatch.setattr(sac_script, "update", lambda *arguments: calls.append(1) or update(*arguments))
    train(sac_script, tmp_path / "run", total_timesteps=130, learning_starts=100, update_every=update_every)
    assert len(calls) == updates  # after the steps 100, 101, ..., 130, or 100, 104, ..., 128


def test_video(script, tmp_path):
    env_id = "moe_envs:TargetReaching-v0?layout=fixed"
    run = train(script, tmp_path / "run", env_id=env_id, total_timesteps=160, eval_episodes=1)
    script.main(flags(evaluate=str(run), eval_episodes=2, video=True))
    assert (run / "video.gif").read_bytes().startswith(b"GIF89a")


def test_resume_after_kill_9_is_exact(base, tmp_path):
    """Target-reaching, killed at a moment that depends on the machine, in the middle of an episode."""
    settings = dict(total_timesteps=560, learning_starts=350, batch_size=16, eval_every=200, checkpoint_every=130)
    if family(base) == "ppo":
        settings = dict(total_timesteps=1600, num_envs=4, num_steps=20, num_minibatches=4, update_epochs=4)
        settings |= dict(eval_every=400, checkpoint_every=240)
    settings |= dict(eval_episodes=1, num_threads=1)
    killed = start(base.SCRIPT, *flags(**settings, run_dir=tmp_path / "killed"))
    evaluations = tmp_path / "killed" / "eval.csv"
    while killed.poll() is None and not (evaluations.exists() and "\n400," in evaluations.read_text()):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert "deterministic return" in killed.stdout.read()  # was not left in a buffer
    stopped_at = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["global_step"]
    assert 240 <= stopped_at < settings["total_timesteps"]
    resumed = base.main(flags(resume=str(tmp_path / "killed")))  # in this process: it started otherwise too
    whole = base.main(flags(run_dir=str(tmp_path / "whole"), **settings))
    assert same(model(whole), model(resumed))
    assert (whole / "eval.csv").read_text() == (resumed / "eval.csv").read_text()


OTHER_FORMS = {  # of the rivals: flags
    "ppo_gating": [dict(std="shared")],
    "ppo_mcp": [dict(gate="softmax")],
    "ppo_dac": [dict(high_epochs=0)],
    "sac_gmm": [dict(gradient="score", baseline="none"), dict(gradient="gumbel", entropy="component")],
    "sac_mcp": [dict(gate="softmax")],
}


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_train_resume_and_evaluate(name, tmp_path, monkeypatch, capsys):
    """Stopped at a checkpoint as a crash stops it, resumed to the same bits; the policy's file acts as the run does."""
    script = load(name)
    whole, save, steps = train(script, tmp_path / "whole"), script.Run.save, []

    def save_and_crash(self):
        save(self)
        steps.append(self.step)
        if self.step > 0:
            raise RuntimeError("crash")

    monkeypatch.setattr(script.Run, "save", save_and_crash)
    with pytest.raises(RuntimeError, match="crash"):
        train(script, tmp_path / "run")
    monkeypatch.undo()
    assert 0 < steps[-1] < 220
    script.main(flags(resume=tmp_path / "run"))
    assert same(model(whole), model(tmp_path / "run"))
    assert (whole / "eval.csv").read_bytes() == (tmp_path / "run" / "eval.csv").read_bytes()
    capsys.readouterr()
    number = "num_options" if name == "ppo_dac" else "num_experts"
    with pytest.raises(SystemExit) as stop:
        script.main(flags(resume=tmp_path / "run", **{number: 3}))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and f"--{number.replace('_', '-')} 3: cannot change" in error
    shutil.copy(whole / "policy.pt", tmp_path / "s1.pt")
    script.main(flags(evaluate=tmp_path / "s1.pt"))
    printed, rows = json.loads(capsys.readouterr().out), (whole / "eval.csv").read_text().splitlines()
    assert set(printed) == {*script.Actor.policies, "stochastic"}
    for line in rows[-len(printed) :]:
        row = dict(zip(rows[0].split(","), line.split(","), strict=True))
        assert str(printed[row["policy"]]["return"]) == row["return"]
    models = [model(train(script, tmp_path / f"{i}", **form)) for i, form in enumerate(OTHER_FORMS.get(name, []))]
    assert not any(same(a, b) for i, a in enumerate([model(whole), *models]) for b in models[i:])


@pytest.mark.parametrize(("number", "buffer_size"), [(signal.SIGINT, 1000), (signal.SIGTERM, 20)])
def test_resume_after_a_signal_is_exact(base, tmp_path, number, buffer_size):
    """SAC: a checkpoint at once, also where the replay has turned over and is shorter than the running episode.

    PPO goes back to its last one.
    """
    settings = TINY[family(base)] | {"total_timesteps": 1500}
    if family(base) == "ppo" and number == signal.SIGTERM:
        pytest.skip("test_faults.py sends it")
    if family(base) == "sac":
        settings |= dict(total_timesteps=500, learning_starts=220, buffer_size=buffer_size)
    whole = train(base, tmp_path / "whole", **settings)
    stopped = start(base.SCRIPT, *flags(**settings, run_dir=tmp_path / "run"))
    evaluations = tmp_path / "run" / "eval.csv"
    while stopped.poll() is None and not (evaluations.exists() and "\n220," in evaluations.read_text()):
        time.sleep(0.01)
    stopped.send_signal(number)
    output = stopped.communicate()
    assert stopped.poll() == 128 + number, output
    assert re.search(rf"{number.name}, .*step \d+ .*--resume", output)
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["global_step"]
    assert 220 <= step < settings["total_timesteps"] and step == int(re.search(r"step (\d+) \w+", output)[1])
    base.main(flags(resume=tmp_path / "run"))
    assert same(model(whole), model(tmp_path / "run"))
    assert (whole / "eval.csv").read_bytes() == (tmp_path / "run" / "eval.csv").read_bytes()


def test_finished_run_can_be_made_longer(script, tmp_path):
    changes = {} if family(script) == "sac" else {"no_anneal_lr": True}  # to where depends on the length
    changes |= {"gate_gradient": "apart"} if script.SCRIPT == "ppo_pmoe" else {}  # one optimizer more
    train(script, tmp_path / "run", **changes)
    script.main(flags(resume=str(tmp_path / "run"), total_timesteps=242))
    whole = train(script, tmp_path / "whole", total_timesteps=242, **changes)
    assert same(model(whole), model(tmp_path / "run"))
    assert (whole / "eval.csv").read_bytes() == (tmp_path / "run" / "eval.csv").read_bytes()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["args"]["total_timesteps"] == 242
    (resumed,) = run["resumed"]
    assert resumed["global_step"] == 220 and resumed["commit"] == run["commit"] and resumed["versions"]


def test_divergence_stops_the_run_and_keeps_the_checkpoint(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        changes = {"sac": {"q_lr": 1e12, "checkpoint_every": 140}, "ppo": {"learning_rate": 1e12}}[family(script)]
        train(script, tmp_path / "run", **changes)
    assert stop.value.code == 1 and "diverged" in capsys.readouterr().err
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] == {"sac": 140, "ppo": 0}[family(script)]
    assert all(v.isfinite().all() for v in saved["agent"].values())


def break_weights(script, monkeypatch):
    """Its learning leaves weights that are not finite, after a loss that was."""
    name = {"sac": "update", "ppo": "learn"}[family(script)]
    learn = getattr(script, name)

    def learn_nonsense(agent, *arguments):
        metrics = learn(agent, *arguments)
        next(agent.actor.parameters()).data.fill_(math.nan)
        return metrics

    monkeypatch.setattr(script, name, learn_nonsense)


def test_broken_weights_do_not_replace_a_checkpoint(script, tmp_path, monkeypatch, capsys):
    """The first learning, right before a checkpoint, makes them so."""
    break_weights(script, monkeypatch)
    step = {"sac": 150, "ppo": 22}[family(script)]
    with pytest.raises(SystemExit) as stop:
        train(script, tmp_path / "run", checkpoint_every=step)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert "the training has diverged; it would again, start anew" in error and "--resume" not in error
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["global_step"] == 0


class Strange(gym.Env):
    """Its 55th step gives `obs` and `reward`; it observes its count of steps, in `dtype`, and pays for the action."""

    def __init__(self, obs=0, reward=0.0, dtype=np.float64):
        self.count, self.values = 0, (obs, reward)
        self.observation_space = gym.spaces.Box(0, 9, (1,), dtype)
        self.action_space = gym.spaces.Box(-2, 2, (1,), np.float64)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, self.observation_space.dtype), {}

    def step(self, action):
        self.count += 1
        obs, reward = self.values if self.count == 55 else (self.count % 5, float(action[0]))
        return np.array([obs], self.observation_space.dtype), reward, False, False, {}


gym.register("Strange-v0", Strange, max_episode_steps=5)


@pytest.mark.parametrize("bad", [("obs", math.inf), ("reward", math.nan)])
def test_a_number_that_is_not_finite_stops_the_run_before_it_is_kept(script, tmp_path, bad, monkeypatch, capsys):
    """The normaliser or the replay would keep it for ever. PPO: at the end of a rollout and of an episode."""
    monkeypatch.setitem(gym.registry["Strange-v0"].kwargs, *bad)
    with pytest.raises(SystemExit) as stop:
        train(script, tmp_path / "run", env_id="Strange-v0")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "observation or reward of Strange-v0 is not fin" in error
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] == 0 and all(x.isfinite().all() for x in saved["agent"].values())


def test_full_disk_that_tensorboard_meets_first(script, finished, tmp_path, monkeypatch, capsys):
    """Its writer raises what it met again when it is closed."""

    class Full(script.SummaryWriter):
        full = False

        def add_scalar(self, tag, value, step):
            self.full |= step > 150
            self.close()
            super().add_scalar(tag, value, step)

        def close(self):
            if self.full:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "SummaryWriter", Full)
    with pytest.raises(SystemExit) as stop:
        train(script, tmp_path / "run")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "No space left" in error and "--resume" in error and error.count("\n") == 1
    monkeypatch.undo()
    script.main(flags(resume=str(tmp_path / "run")))
    assert same(model(tmp_path / "run"), model(finished))


def test_full_disk_keeps_the_last_checkpoint(script, finished, tmp_path, monkeypatch, capsys):
    """The limit of a file's size makes writing fail in the middle of torch.save, as a full disk does."""
    size = (finished / "checkpoint.pt").stat().st_size
    save, limits = torch.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    second = TINY[family(script)]["checkpoint_every"]

    def less_space_after_the_second_checkpoint(data, file):
        if data["global_step"] > second:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        save(data, file)

    monkeypatch.setattr(torch, "save", less_space_after_the_second_checkpoint)
    try:
        with pytest.raises(SystemExit) as stop:
            train(script, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "cannot write" in error and error.count("\n") == 1
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["global_step"] == second
    monkeypatch.undo()
    script.main(flags(resume=str(tmp_path / "run")))
    assert same(model(tmp_path / "run"), model(finished))


def test_resume_after_a_kill_between_two_files_of_a_checkpoint(script, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "model.pt").unlink()
    (tmp_path / "run" / "checkpoint.pt.tmp").write_bytes(b"half of it")
    script.main(flags(resume=str(tmp_path / "run")))
    assert same(model(tmp_path / "run"), model(finished)) and not list((tmp_path / "run").glob("*.tmp"))


def test_flags_of_the_mixture_make_other_runs(pmoe, tmp_path):
    variants = [{}, {"primitive_update": "all"}, {"selection": "means"}, {"selection": "fresh"}]
    models = [model(train(pmoe, tmp_path / f"{i}", total_timesteps=160, **flags)) for i, flags in enumerate(variants)]
    assert not any(same(a, b) for i, a in enumerate(models) for b in models[:i])


def test_matmul_precision_is_set(script, tmp_path):
    try:
        train(script, tmp_path / "run", total_timesteps=160, matmul_precision="medium")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_killed_before_the_first_checkpoint_the_folder_is_free(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "Agent", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(script, tmp_path / "run")
    monkeypatch.undo()
    train(script, tmp_path / "run", total_timesteps=160)


def test_it_runs_without_git(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = json.loads((train(script, tmp_path / "run", total_timesteps=160) / "run.json").read_text())
    assert run["commit"] is None and run["dirty"] is None


def test_a_script_that_git_does_not_know_has_no_commit(tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=tmp_path, check=True)

    shutil.copy(ALGOS / "sac.py", tmp_path)
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "empty")
    copied = load("sac", tmp_path)
    assert copied.describe(copied.Args())["commit"] is None
    git("add", "sac.py")
    git("commit", "--quiet", "--message", "the script")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "eval.csv").write_text("")  # other new files do not matter
    assert copied.describe(copied.Args())["dirty"] is False and len(copied.describe(copied.Args())["commit"]) == 40


def test_progress_bar_has_speed_and_the_latest_return(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(script, tmp_path / "run")
    assert re.search(r"220/220 .*step/s, return -\d+\.\d\]", capsys.readouterr().err)


def test_tensorboard_has_the_curves_and_keeps_them_over_a_resume(script, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    script.main(flags(resume=str(tmp_path / "run"), total_timesteps=242))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    keys = {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "eval/return", "eval/return_stochastic"}
    keys |= {"losses/critic", "losses/actor", "policy/entropy"}
    keys |= {"sac": {"losses/alpha", "policy/alpha"}, "ppo": {"policy/kl", "policy/clipped"}}[family(script)]
    if script.SCRIPT.endswith("pmoe"):
        keys |= {"losses/gate", "moe/gate_entropy", "moe/expert_distance"}
        keys |= {f"moe/{name}_{k}" for name in ("usage", "wins") for k in range(4)}
    assert keys <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("eval/return")] == [110, 220, 242]


def test_checkpoint_of_a_script_with_fewer_flags_is_refused(script, finished, tmp_path, capsys):
    """What it did then is not what the flag's default does now."""
    shutil.copytree(finished, tmp_path / "run")
    for option, name in (("resume", "checkpoint.pt"), ("evaluate", "model.pt")):
        saved = torch.load(tmp_path / "run" / name, weights_only=True)
        del saved["args"]["gamma"]
        torch.save(saved, tmp_path / "run" / name)
        with pytest.raises(SystemExit) as stop:
            script.main(flags(**{option: str(tmp_path / "run")}))
        assert stop.value.code == 2 and "the script was another then" in capsys.readouterr().err


def corrupt(folder):
    checkpoint = folder / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])


@pytest.mark.parametrize("damage", [corrupt, lambda folder: (folder / "checkpoint.pt").unlink()])
def test_broken_checkpoint_is_an_error_and_nothing_is_touched(script, finished, tmp_path, damage, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as stop:
        script.main(flags(resume=str(folder), total_timesteps=300))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--resume" in error and "checkpoint.pt" in error
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_video_that_cannot_be_drawn_is_an_error(script, finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pygame", None)  # Pendulum draws with it
    with pytest.raises(SystemExit) as stop:
        script.main(flags(evaluate=str(finished), eval_episodes=1, video=True))
    assert stop.value.code == 2 and "--video" in capsys.readouterr().err and not (finished / "video.gif").exists()


def test_a_limit_of_another_machine_does_not_lock_a_run_out(script, finished, monkeypatch, capsys):
    threads = json.loads((finished / "run.json").read_text())["args"]["num_threads"]
    monkeypatch.setitem(script.LIMITS, "num_threads", (threads + 1, threads + 1))
    for option in ("resume", "evaluate"):
        assert script.parse(flags(**{option: str(finished)}))[0].num_threads == threads
    with pytest.raises(SystemExit):
        script.parse(flags(evaluate=str(finished), num_threads=threads + 2))
    assert f"--num-threads {threads + 2}: must lie between {threads + 1}" in capsys.readouterr().err


class Spaces(gym.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


line, whole = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(0, 9, (1,), np.int64)
gym.register("Picture-v0", lambda: Spaces(gym.spaces.Box(0, 1, (2, 2)), line), max_episode_steps=10)
gym.register("WholeNumbers-v0", lambda: Spaces(line, whole), max_episode_steps=10)

NO_GPU = "cuda:99" if torch.cuda.is_available() else "cuda"
WRONG = {  # regular expressions: what the error has to say
    "discrete actions": (dict(env_id="CartPole-v1"), "--env-id CartPole-v1"),
    "image observations": (dict(env_id="Picture-v0"), "--env-id Picture-v0: needs flat Box spaces"),
    "whole numbers as actions": (dict(env_id="WholeNumbers-v0"), "--env-id WholeNumbers-v0: needs real-valued actions"),
    "unknown environment": (dict(env_id="NoSuchEnv-v0"), "--env-id NoSuchEnv-v0.*gymnasium.pprint_registry"),
    "no time limit": (dict(env_id="Pendulum-v1?max_episode_steps=-1"), "max_episode_steps=1000"),
    "unknown module": (dict(env_id="no_such_module:Env-v0"), "--env-id no_such_module:Env-v0.*pip install -e"),
    "wrong environment argument": (
        dict(env_id="moe_envs:TargetReaching-v0?layout=moon"),
        "layout must be one .*random.*moon",
    ),
    "unknown environment argument": (dict(env_id="moe_envs:TargetReaching-v0?colour=red"), "colour.*id.name=value"),
    "argument without value": (dict(env_id="moe_envs:TargetReaching-v0?layout"), "layout .*random.*id.name=value"),
    "argument of a wrong kind": (dict(env_id="Pendulum-v1?g=abc"), "--env-id Pendulum-v1.g=abc: .*id.name=value"),
    "no steps": (dict(total_timesteps=0), "--total-timesteps 0"),
    "negative seed": (dict(seed=-1), "--seed -1"),
    "gamma above one": (dict(gamma=1.5), "--gamma 1.5"),
    "device without memory": (dict(device="meta"), "--device meta"),
    "environment with a broken file": (dict(env_id="Ant-v5?xml_file=/no/file.xml"), "--env-id Ant-v5"),
    "no such gpu": (dict(device="cuda:99"), "--device cuda:99"),
    "no gpu at all": (dict(device=NO_GPU), "--device cuda.*always works"),
    "unknown device": (dict(device="abacus"), "--device abacus"),
    "a CPU with a number": (dict(device="cpu:0"), "--device cpu:0: must be cpu, cuda or cuda:N"),
    "folder below a file": (dict(run_dir="/dev/null/run"), "--run-dir /dev/null/run"),
    "nothing to resume": (
        dict(resume="no/such/run"),
        "--resume no/such/run: .*checkpoint.pt.*give the folder",
    ),
    "resume of an empty variable": (dict(resume=""), "--resume : "),
    "evaluation of an empty variable": (dict(evaluate=""), "--evaluate : "),
    "video without evaluation": (dict(video=True), "--video"),
}
WRONG_SAC = {
    "negative batch": (dict(batch_size=-4), "--batch-size -4"),
    "learning rate zero": (dict(q_lr=0.0), "--q-lr 0.0"),
    "target that never moves": (dict(tau=0.0), "--tau 0.0"),
    "learning rate nan": (dict(policy_lr=math.nan), "--policy-lr nan"),
    "buffer larger than memory": (
        dict(buffer_size=10**12, total_timesteps=10**12),
        "--buffer-size 1000000000000: would take .* GB, the machine has .*; give less",
    ),
    "learning rate infinite": (dict(q_lr=math.inf), "--q-lr inf"),
    "a graph without a GPU": (dict(cuda_graph=True), "--cuda-graph True: goes with --device cuda"),
}
WRONG_PPO = {
    "learning rate infinite": (dict(learning_rate=math.inf), "--learning-rate inf"),
    "no KL divergence allowed": (dict(target_kl=0.0), "--target-kl 0.0"),
    "lambda above one": (dict(gae_lambda=1.1), "--gae-lambda 1.1"),
    "minibatches that do not divide the rollout": (
        dict(num_minibatches=3),
        "--num-minibatches 3: needs 3 equal parts.*change it",
    ),
    "minibatches of one step": (dict(num_minibatches=22), "--num-minibatches 22"),
    "no environments": (dict(num_envs=0), "--num-envs 0"),
}


def wrong_input(script, wrong, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.main(flags(**(TINY[family(script)] | wrong)))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(expected, error), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_that_names_the_flag(script, tmp_path, name, monkeypatch, capsys):
    wrong_input(script, *WRONG[name], tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("name", WRONG_SAC)
def test_wrong_input_of_sac(sac_script, tmp_path, name, monkeypatch, capsys):
    wrong_input(sac_script, *WRONG_SAC[name], tmp_path, monkeypatch, capsys)


def test_only_ppo_runs_under_torchrun(sac_script, tmp_path, monkeypatch, capsys):
    """Its processes would all write to one folder."""
    for key, value in (("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(key, value)
    wrong_input(sac_script, {}, "torchrun.* start it with python", tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("name", WRONG_PPO)
def test_wrong_input_of_ppo(ppo_script, tmp_path, name, monkeypatch, capsys):
    wrong_input(ppo_script, *WRONG_PPO[name], tmp_path, monkeypatch, capsys)


def test_evaluate_takes_the_run_as_it_is(script, finished, capsys):
    for wrong, expected in (
        (dict(evaluate="no/such/run"), "--evaluate no/such/run"),
        (dict(evaluate=str(finished), gamma=0.5), "--gamma 0.5"),
        (dict(evaluate=str(finished), resume=str(finished)), "--resume"),
    ):
        with pytest.raises(SystemExit) as stop:
            script.main(flags(**wrong))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and expected in error


@pytest.mark.parametrize("name", [name for name in SCRIPTS if "_" in name])
def test_zero_experts(name, tmp_path, monkeypatch, capsys):
    script, flag = load(name), "num_options" if name == "ppo_dac" else "num_experts"
    wrong_input(script, {flag: 0}, f"--{flag.replace('_', '-')} 0", tmp_path, monkeypatch, capsys)


WRONG_RIVALS = {  # what argparse refuses has a frame of several lines
    "all passes for the high MDP": ("ppo_dac", dict(high_epochs=2), "--high-epochs 2: must lie between 0 and 1"),
    "negative entropy bonus": ("ppo_dac", dict(high_ent_coef=-0.1), "--high-ent-coef -0.1: must lie between 0"),
    "options that no memory holds": ("ppo_dac", dict(num_options=10**8), "--num-options 100000000: would take .* GB"),
    "no Gumbel noise": ("sac_gmm", dict(gumbel_temperature=0.0), "--gumbel-temperature 0.0: must lie between"),
    "Gumbel noise that is not a number": ("sac_gmm", dict(gumbel_temperature=math.nan), "--gumbel-temperature nan"),
}


@pytest.mark.parametrize("name", WRONG_RIVALS)
def test_wrong_input_of_rivals(name, tmp_path, monkeypatch, capsys):
    script, wrong, expected = WRONG_RIVALS[name]
    wrong_input(load(script), wrong, expected, tmp_path, monkeypatch, capsys)


def test_an_unknown_word_is_refused_with_those_that_are_known(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for script, flag, known in (
        ("sac_gmm", "gradient", "marginal,score,gumbel"),
        ("ppo_mcp", "gate", "sigmoid,softmax"),
    ):
        with pytest.raises(SystemExit) as stop:
            load(script).main(flags(**{flag: "other"}))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"--{flag}" in error and all(word in error for word in known.split(","))
        assert not list(tmp_path.iterdir())


def test_run_folder_of_another_run_is_refused(script, finished, capsys):
    before = (finished / "run.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train(script, finished)
    assert stop.value.code == 2 and f"--run-dir {finished}" in capsys.readouterr().err
    assert (finished / "run.json").read_bytes() == before


def test_two_runs_of_one_second_do_not_share_a_folder(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.time, "strftime", lambda _: "20260101-000000")
    run_dir = script.main(flags(**TINY[family(script)]))
    before = (run_dir / "run.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        script.main(flags(**TINY[family(script)]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and f"--run-dir {run_dir}: holds a run" in error
    assert (run_dir / "run.json").read_bytes() == before


def test_a_run_without_an_update_says_so(sac_script, tmp_path, capsys):
    train(sac_script, tmp_path / "run", total_timesteps=100)
    assert "ends before its first update, at step 150" in capsys.readouterr().err


def test_resumed_run_cannot_change(script, finished, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(flags(resume=str(finished), gamma=0.5))
    assert stop.value.code == 2 and "--gamma 0.5" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        script.main(flags(resume=str(finished), total_timesteps=10))
    assert stop.value.code == 2 and "--total-timesteps 10" in capsys.readouterr().err

    default = script.Args.eval_every  # but not that of the run
    for typed in (["--eval-every", f"{default}"], [f"--eval-every={default}"], ["--eval_every", f"{default}"]):
        monkeypatch.setattr(sys, "argv", [script.SCRIPT, "--resume", str(finished), *typed])
        with pytest.raises(SystemExit) as stop:
            script.main()
        assert stop.value.code == 2 and f"--eval-every {default}: cannot" in capsys.readouterr().err


def test_resuming_a_finished_run_changes_nothing(script, finished):
    before = model(finished), (finished / "eval.csv").read_bytes()
    script.main(flags(resume=str(finished)))
    assert same(model(finished), before[0]) and (finished / "eval.csv").read_bytes() == before[1]


def test_run_of_another_script_is_refused(sac, pmoe, tmp_path, capsys):
    run = train(sac, tmp_path / "run", total_timesteps=160)
    for flag in ("resume", "evaluate"):
        with pytest.raises(SystemExit) as stop:
            pmoe.main(flags(**{flag: str(run)}))
        assert stop.value.code == 2 and "use that script" in capsys.readouterr().err


@pytest.mark.parametrize("script_name", SCRIPTS)
def test_a_script_imports_nothing_of_the_repository(script_name):
    tree = ast.parse((ALGOS / f"{script_name}.py").read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert not {name.split(".")[0] for name in names} & {"moe_envs", "envs", "algos", "results", *SCRIPTS}


def test_copied_alone_it_runs(base, tmp_path):
    shutil.copy(ALGOS / f"{base.SCRIPT}.py", tmp_path)
    small = TINY[family(base)] | {"total_timesteps": 154}
    process = start(base.SCRIPT, *flags(**small), cwd=tmp_path, path=tmp_path)
    output = process.communicate()
    assert process.poll() == 0, output
    assert "step 154/154" in output  # plain lines where there is no terminal
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("Pendulum-v1") and f"__{base.SCRIPT}__s1__" in run.name and (run / "model.pt").exists()


@pytest.mark.parametrize("script_name", [*SCRIPTS, *MULTITASK])
def test_help_shows_every_flag(script_name, capsys, monkeypatch):
    script = load(script_name)
    monkeypatch.setattr(sys, "argv", [script.SCRIPT, "--help"])
    monkeypatch.setitem(sys.modules, script.SCRIPT, script)  # tyro reads the comments from the source
    with pytest.raises(SystemExit):
        script.tyro.cli(script.Args)
    text = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in text for field in fields(script.Args))

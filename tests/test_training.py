"""Whole runs: same seed same bits, exact resume after a real kill, evaluation, files, errors, a script copied alone."""

import ast
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import ALGOS, SCRIPTS

TINY = dict(env_id="Pendulum-v1", total_timesteps=250, learning_starts=150, batch_size=16, eval_every=125)
TINY |= dict(eval_episodes=2, checkpoint_every=160, buffer_size=1000)


def train(script, folder, **changes):
    """Runs `script` in this process; returns the folder of the run."""
    return script.main(script.Args(**(TINY | {"run_dir": str(folder)} | changes)))


def model(folder) -> dict:
    return torch.load(Path(folder) / "model.pt", weights_only=True)["agent"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def flags(**values) -> list[str]:
    return [word for k, v in values.items() for word in (f"--{k.replace('_', '-')}", str(v))]


def start(script_name, *arguments, cwd=None, path=ALGOS):
    """The script in a process of its own."""
    command = [sys.executable, str(Path(path) / f"{script_name}.py"), *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """A finished tiny run of every script."""
    return train(script, tmp_path_factory.mktemp(script.SCRIPT) / "run")


def test_same_seed_same_run_and_other_seed_another(script, finished, tmp_path):
    again, other = train(script, tmp_path / "again"), train(script, tmp_path / "other", seed=2)
    assert same(model(finished), model(again)) and not same(model(finished), model(other))
    assert (finished / "eval.csv").read_bytes() == (again / "eval.csv").read_bytes()


def test_evaluation_and_checkpoints_do_not_change_training(script, finished, tmp_path):
    other = train(script, tmp_path / "run", eval_every=47, eval_episodes=1, checkpoint_every=31)
    assert same(model(finished), model(other))


def test_files_of_a_run(script, finished):
    run = json.loads((finished / "run.json").read_text())
    assert run["script"] == script.SCRIPT and run["args"]["seed"] == 1 and run["global_step"] == 250
    assert {"command", "commit", "dirty", "versions", "machine", "wall_time", "steps_per_second"} <= run.keys()
    rows = [line.split(",") for line in (finished / "eval.csv").read_text().splitlines()]
    assert [row[:3] for row in rows[1:]] == [
        ["125", "deterministic", "2"],
        ["250", "deterministic", "2"],
        ["250", "stochastic", "2"],
    ]
    names = {path.name.split(".")[0] for path in finished.iterdir()}
    assert names - {"evaluation"} == {"run", "eval", "checkpoint", "model", "events"}


def test_saved_model_evaluates_as_in_training(script, finished, capsys):
    script.main(script.Args(evaluate=str(finished), eval_episodes=2))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((finished / "evaluation.json").read_text())
    lines = (finished / "eval.csv").read_text().splitlines()
    for line in lines[-2:]:
        row = dict(zip(lines[0].split(","), line.split(","), strict=True))
        result = printed[row["policy"]]
        assert (str(result["return"]), str(result["length"])) == (row["return"], row["length"])


def test_video(script, tmp_path):
    env_id = "moe_envs:TargetReaching-v0?layout=fixed"
    run = train(script, tmp_path / "run", env_id=env_id, total_timesteps=20, eval_episodes=1)
    script.main(script.Args(evaluate=str(run), eval_episodes=2, video=True))
    assert (run / "video.gif").read_bytes().startswith(b"GIF89a")


@pytest.mark.parametrize("script_name", SCRIPTS)
def test_resume_after_kill_9_is_exact(script_name, tmp_path):
    """Target-reaching, killed at a moment that depends on the machine, in the middle of an episode."""
    settings = dict(total_timesteps=700, learning_starts=350, batch_size=16, eval_every=200, eval_episodes=1)
    settings |= dict(checkpoint_every=130)
    whole = start(script_name, *flags(**settings, run_dir=tmp_path / "whole"))
    killed = start(script_name, *flags(**settings, run_dir=tmp_path / "killed"))
    evaluations = tmp_path / "killed" / "eval.csv"
    while killed.poll() is None and not (evaluations.exists() and "\n400," in evaluations.read_text()):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    stopped_at = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["global_step"]
    assert 390 <= stopped_at < 700
    resumed = start(script_name, *flags(resume=tmp_path / "killed"))
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output
    assert whole.wait() == 0
    assert same(model(tmp_path / "whole"), model(tmp_path / "killed"))
    assert (tmp_path / "whole" / "eval.csv").read_text() == (tmp_path / "killed" / "eval.csv").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_writes_a_checkpoint_and_resume_is_exact(script, finished, tmp_path, number, monkeypatch, capsys):
    update, calls = script.update, []

    def update_then_signal(*arguments):
        calls.append(1)
        if len(calls) == 27:
            os.kill(os.getpid(), number)
        return update(*arguments)

    monkeypatch.setattr(script, "update", update_then_signal)
    with pytest.raises(SystemExit) as stop:
        train(script, tmp_path / "run")
    assert stop.value.code == 128 + number
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["global_step"] == 176
    script.main(script.Args(resume=str(tmp_path / "run")))
    assert same(model(finished), model(tmp_path / "run"))
    assert (finished / "eval.csv").read_bytes() == (tmp_path / "run" / "eval.csv").read_bytes()


def test_finished_run_can_be_made_longer(script, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    script.main(script.Args(resume=str(tmp_path / "run"), total_timesteps=280))
    whole = train(script, tmp_path / "whole", total_timesteps=280)
    assert same(model(whole), model(tmp_path / "run"))


def test_divergence_stops_the_run_and_keeps_the_checkpoint(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(script, tmp_path / "run", q_lr=1e30, checkpoint_every=140)
    assert stop.value.code == 1 and "diverged" in capsys.readouterr().err
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] == 140 and all(v.isfinite().all() for v in saved["agent"].values())


def test_full_disk_keeps_the_last_checkpoint(script, tmp_path, monkeypatch, capsys):
    save = torch.save

    def disk_full_after_the_second_checkpoint(data, file):
        if data["global_step"] > 160:
            file.write(b"half a checkp")
            raise OSError(28, "No space left on device")
        save(data, file)

    monkeypatch.setattr(torch, "save", disk_full_after_the_second_checkpoint)
    with pytest.raises(SystemExit) as stop:
        train(script, tmp_path / "run")
    assert stop.value.code == 1 and "No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.tmp"))
    monkeypatch.undo()
    script.main(script.Args(resume=str(tmp_path / "run")))
    assert same(model(tmp_path / "run"), model(train(script, tmp_path / "whole")))


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
        script.main(script.Args(resume=str(folder), total_timesteps=400))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--resume" in error and "checkpoint.pt" in error
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_video_that_cannot_be_drawn_is_an_error(script, finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pygame", None)  # Pendulum draws with it
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(evaluate=str(finished), eval_episodes=1, video=True))
    assert stop.value.code == 2 and "--video" in capsys.readouterr().err and not (finished / "video.gif").exists()


WRONG = {
    "discrete actions": (dict(env_id="CartPole-v1"), "--env-id CartPole-v1"),
    "image observations": (dict(env_id="CarRacing-v3"), "--env-id CarRacing-v3"),
    "unknown environment": (dict(env_id="NoSuchEnv-v0"), "--env-id NoSuchEnv-v0"),
    "unknown module": (dict(env_id="no_such_module:Env-v0"), "--env-id no_such_module:Env-v0"),
    "wrong environment argument": (dict(env_id="moe_envs:TargetReaching-v0?layout=moon"), "layout"),
    "unknown environment argument": (dict(env_id="moe_envs:TargetReaching-v0?colour=red"), "colour"),
    "argument without value": (dict(env_id="moe_envs:TargetReaching-v0?layout"), "--env-id"),
    "no steps": (dict(total_timesteps=0), "--total-timesteps 0"),
    "negative batch": (dict(batch_size=-4), "--batch-size -4"),
    "negative seed": (dict(seed=-1), "--seed -1"),
    "gamma above one": (dict(gamma=1.5), "--gamma 1.5"),
    "learning rate zero": (dict(q_lr=0.0), "--q-lr 0.0"),
    "learning rate nan": (dict(policy_lr=math.nan), "--policy-lr nan"),
    "buffer larger than memory": (dict(buffer_size=10**13), "--buffer-size 10000000000000"),
    "no cuda here": (dict(device="cuda:99"), "--device cuda:99"),
    "unknown device": (dict(device="abacus"), "--device abacus"),
    "folder below a file": (dict(run_dir="/dev/null/run"), "--run-dir /dev/null/run"),
    "nothing to resume": (dict(resume="no/such/run"), "--resume no/such/run"),
    "nothing to evaluate": (dict(evaluate="no/such/run"), "--evaluate no/such/run"),
    "video without evaluation": (dict(video=True), "--video"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_that_names_the_flag(script, tmp_path, name, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wrong, expected = WRONG[name]
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(**(TINY | wrong)))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error, error
    assert not list(tmp_path.iterdir())


def test_zero_experts_and_other_mixture_errors(pmoe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        pmoe.main(pmoe.Args(**TINY, num_experts=0))
    assert stop.value.code == 2 and "--num-experts 0" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_run_folder_of_another_run_is_refused(script, finished, capsys):
    before = (finished / "run.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train(script, finished)
    assert stop.value.code == 2 and f"--run-dir {finished}" in capsys.readouterr().err
    assert (finished / "run.json").read_bytes() == before


def test_resumed_run_cannot_change(script, finished, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(resume=str(finished), gamma=0.5))
    assert stop.value.code == 2 and "--gamma 0.5" in capsys.readouterr().err


def test_resuming_a_finished_run_changes_nothing(script, finished):
    before = model(finished), (finished / "eval.csv").read_bytes()
    script.main(script.Args(resume=str(finished)))
    assert same(model(finished), before[0]) and (finished / "eval.csv").read_bytes() == before[1]


def test_run_of_another_script_is_refused(sac, pmoe, tmp_path, capsys):
    run = train(sac, tmp_path / "run", total_timesteps=20)
    for flag in ("resume", "evaluate"):
        with pytest.raises(SystemExit) as stop:
            pmoe.main(replace(pmoe.Args(), **{flag: str(run)}))
        assert stop.value.code == 2 and "use that script" in capsys.readouterr().err


@pytest.mark.parametrize("script_name", SCRIPTS)
def test_copied_alone_it_runs(script_name, tmp_path):
    tree = ast.parse((ALGOS / f"{script_name}.py").read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert not {name.split(".")[0] for name in names} & {"moe_envs", "envs", "algos", "results", *SCRIPTS}
    shutil.copy(ALGOS / f"{script_name}.py", tmp_path)
    small = {k: v for k, v in TINY.items() if k != "total_timesteps"}
    process = start(script_name, *flags(**small, total_timesteps=150), cwd=tmp_path, path=tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "step 150/150" in output  # plain lines where there is no terminal
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(f"Pendulum-v1__{script_name}__s1__") and (run / "model.pt").exists()


def test_help_shows_every_flag(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.SCRIPT, "--help"])
    monkeypatch.setitem(sys.modules, script.SCRIPT, script)  # tyro reads the comments from the source
    with pytest.raises(SystemExit):
        script.tyro.cli(script.Args)
    text = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in text for field in fields(script.Args))

"""Runs the suites of trainings that results/plot.py draws. Finished runs are skipped, broken ones are resumed.

python results/benchmark.py target-reaching             # two runs at a time, each on one thread
python results/benchmark.py ppo-mujoco --jobs 4 --only Hopper Walker2d
python results/benchmark.py halfcheetah --dry-run       # only says what it would do
python results/benchmark.py sac-mujoco --ray            # on all machines of a Ray cluster, see the README

A run goes to results/runs/<environment>/<label>/s<seed>, what it prints to s<seed>.log beside that folder. Ctrl-C stops
the running ones with a checkpoint; the same command goes on later. The exit code is 1 if a run failed.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RUNS = Path("results/runs")  # relative, and every command runs in the repository: run.json then names no home folder


class Suite(NamedTuple):
    env: str  # folder under results/runs
    flags: str  # given to every run
    seeds: range
    runs: dict[str, str]  # label -> script, and the flags that make the label


TARGET_REACHING = "TargetReaching-v0-fixed"
FIXED = "--env-id moe_envs:TargetReaching-v0?layout=fixed&obstacle_penalty=-10&speed_bonus=0.3"
FIXED += " --total-timesteps 40000 --learning-starts 10000 --eval-every 2500 --num-threads 1"
HALFCHEETAH = "--env-id HalfCheetah-v5 --total-timesteps 100000 --eval-every 10000"
HALFCHEETAH += " --learning-starts 5000 --alpha-init 1 --num-threads 1"  # the usual settings of SAC


def moe_suites() -> dict[str, Suite]:
    """SAC with mixture-of-experts layers on several tasks, against a baseline that is the same code without experts.

    All have about as many parameters as the baseline, for here every expert computes every sample.
    """
    runs = {}
    for kind in ("baseline", "softmoe-big", "hardcoded-big"):
        router, _, architecture = kind.rpartition("-")
        flags = f"--protocol multitask --actor-moe {architecture} --critic-moe {architecture}"
        flags += f" --router {router}" * bool(router)
        runs[f"multitask-{kind}"] = f"sac_moe_multitask {flags}"
        if kind != "softmoe-big":  # who does not see which task it is cannot tell the inverted ones
            runs[f"multitask-{kind}-blind"] = f"sac_moe_multitask {flags} --no-task-id"
    for label in runs:
        runs[label] += " --match-params" * ("big" in label)
    flags = "--tasks target-reaching-inverted --num-experts 8 --update-every 4 --learning-starts 2500 --num-threads 1"
    flags += " --total-timesteps 320000 --eval-every 20000 --checkpoint-every 20000"
    return {"moe-target-reaching": Suite("TargetReaching-v0-8-tasks", flags, range(1, 4), runs)}


SUITES = {
    "target-reaching": Suite(
        TARGET_REACHING,
        FIXED,
        range(1, 6),
        {
            "sac": "sac",
            "sac_pmoe": "sac_pmoe --selection draws",  # the paper's form
            "sac_pmoe-means": "sac_pmoe --selection means",
            "sac_pmoe-all": "sac_pmoe --selection means --primitive-update all",
        },
    ),
    "target-reaching-variants": Suite(
        TARGET_REACHING,
        FIXED,
        range(1, 4),
        {
            "sac_pmoe-fresh": "sac_pmoe --selection fresh",
        },
    ),
    "halfcheetah": Suite(
        "HalfCheetah-v5",
        HALFCHEETAH,
        range(1, 4),
        {
            "sac": "sac",
            "sac_pmoe": "sac_pmoe --num-experts 2 --selection draws",
            "sac_pmoe-means": "sac_pmoe --num-experts 2 --selection means",
        },
    ),
    "halfcheetah-medium": Suite(
        "HalfCheetah-v5",
        HALFCHEETAH,
        range(1, 4),
        {"sac-medium": "sac --matmul-precision medium"},
    ),
} | moe_suites()

# SAC on MuJoCo for 300,000 steps; sac_pmoe in the paper's form, with its number of experts (Fig. 1).
SAC_300K = "--total-timesteps 300000 --eval-every 10000 --learning-starts 5000 --alpha-init 1 --num-threads 1"
SAC_K = {"Hopper": 4, "HalfCheetah": 2, "Walker2d": 4, "Ant": 4, "Humanoid": 10, "HumanoidStandup": 10}
DRAWS = "sac_pmoe --selection draws"
REACHING_SAC = {
    "sac": "sac",
    "sac_pmoe": DRAWS,
    "sac_pmoe-means": "sac_pmoe --selection means",
    "sac_pmoe-all": f"{DRAWS} --primitive-update all",
}
SAC_RIVALS = {"sac_gating": "sac_gating", "sac_mcp": "sac_mcp"}
SAC_RIVALS |= {f"sac_gmm-{gradient}": f"sac_gmm --gradient {gradient}" for gradient in ("marginal", "score", "gumbel")}


def reaching(folder: str, task: str, flags: str, seeds: range, runs: dict[str, str] = REACHING_SAC) -> Suite:
    """SAC on a target-reaching task."""
    flags = f"--env-id moe_envs:TargetReaching-v0?{task} {flags} --eval-every 2500 --num-threads 1"
    return Suite(f"TargetReaching-v0-{folder}", flags, seeds, runs)


def some(*labels: str) -> dict[str, str]:
    """Of REACHING_SAC those with these labels."""
    return {label: REACHING_SAC[label] for label in labels}


UNTOUCHED = "--learning-starts 1000 --alpha-init 1 --total-timesteps"  # settings of the authors' release
EASED = "layout={}&obstacle_penalty=-10"  # with the authors' own bonus for speed, 0.1
PATIENT = "--learning-starts 40000 --total-timesteps 60000"
SUITES |= {
    "sac-mujoco": [
        Suite(
            f"{task}-v5-300k",
            f"--env-id {task}-v5 {SAC_300K}",
            range(1, 4),
            {"sac": "sac", "sac_pmoe": f"{DRAWS} --num-experts {k}"},
        )
        for task, k in SAC_K.items()
    ],
    "reaching-untouched": reaching("untouched", "layout=random", f"{UNTOUCHED} 40000", range(1, 7)),
    "reaching-untouched-patient": reaching(  # is it for want of exploration that they do not arrive?
        "untouched-patient",
        "layout=random",
        "--learning-starts 40000 --alpha-init 1 --total-timesteps 80000",
        range(1, 3),
    ),
    "reaching-penalty10": [
        reaching("penalty10", EASED.format("fixed"), PATIENT, range(1, 7)),
        reaching("penalty10", EASED.format("fixed"), PATIENT, range(7, 11), some("sac_pmoe", "sac_pmoe-means")),
    ],
    "reaching-mirror": [
        reaching("mirror", EASED.format("mirror"), PATIENT, range(1, 7)),
        reaching("mirror", EASED.format("mirror"), PATIENT, range(7, 11), some("sac_pmoe", "sac_pmoe-means")),
    ],
    "reaching-mirror-long": reaching(  # twice the updates: does a policy with two ways keep both?
        "mirror-long", EASED.format("mirror"), "--learning-starts 40000 --total-timesteps 80000", range(1, 3)
    ),
    "reaching-exploration": reaching(
        "exploration", "layout=random", f"{UNTOUCHED} 10000", range(1, 11), some("sac", "sac_pmoe")
    ),
    "reaching-mirror-rivals": reaching("mirror", EASED.format("mirror"), PATIENT, range(1, 7), SAC_RIVALS),
    "reaching-untouched-rivals": reaching(  # two seeds: neither sac nor sac_pmoe arrives there with 9 of 10 episodes
        "untouched", "layout=random", f"{UNTOUCHED} 40000", range(1, 3), SAC_RIVALS
    ),
    "halfcheetah-rivals": Suite(
        "HalfCheetah-v5",
        HALFCHEETAH,
        range(1, 4),
        {label: run + " --num-experts 2" * ("mcp" not in label) for label, run in SAC_RIVALS.items()},
    ),
    "hopper-gating": Suite(  # for Fig. 4
        "Hopper-v5-300k", f"--env-id Hopper-v5 {SAC_300K}", range(1, 2), {"sac_gating": "sac_gating --num-experts 4"}
    ),
}

# PPO on one thread. The folders end in -ppo: other step counts than SAC's, so other figures.
PPO_MUJOCO = "--total-timesteps 1000000 --eval-every 50000 --eval-episodes 5"
PAPER_K = {  # the paper's Fig. 2
    "HalfCheetah": 8,
    "Hopper": 12,
    "Walker2d": 4,
    "Ant": 16,
    "Humanoid": 8,
    "HumanoidStandup": 4,
}
GATES = {f"ppo_pmoe-{gate}": f"ppo_pmoe --gate-gradient {gate}" for gate in ("both", "frequency", "ppo", "apart")}
GATES["ppo_pmoe-means"] = f"{GATES['ppo_pmoe-both']} --selection means"


def free(runs: dict[str, str]) -> dict[str, str]:
    """The same runs without the limit of the step size that ppo_pmoe.py has by default, as the other PPO scripts."""
    return {label: run + " --target-kl None" * run.startswith("ppo_pmoe") for label, run in runs.items()}


def ppo_mujoco(task: str, runs: dict[str, str], folder: str = "ppo") -> Suite:
    return Suite(f"{task}-v5-{folder}", f"--env-id {task}-v5 {PPO_MUJOCO}", range(1, 4), runs)


def experts_of(task: str, label: str) -> str:
    return f"{GATES[label]} --num-experts {PAPER_K[task]}"


# A fair step size (ours): no further pass over a rollout once the policy has moved by .012.
KL = "--target-kl 0.012"
PPO_RIVALS = {"ppo_gating": "ppo_gating", "ppo_mcp": "ppo_mcp", "ppo_dac": "ppo_dac"}


def kl(runs: dict[str, str]) -> dict[str, str]:
    """The same runs at the fair step size."""
    return {label: f"{run} {KL}" for label, run in runs.items()}


def gating_of(task: str) -> dict[str, str]:
    """The rivals, gating with as many experts as PMOE; the others with the numbers of their papers."""
    return PPO_RIVALS | {"ppo_gating": f"ppo_gating --num-experts {PAPER_K[task]}"}


REACHING = free({"ppo": "ppo"} | {label: GATES[label] for label in ("ppo_pmoe-both", "ppo_pmoe-frequency")})
MIRROR = f"--env-id moe_envs:TargetReaching-v0?{EASED.format('mirror')} --total-timesteps 200000 --eval-every 10000"
FIXED_PPO = f"--env-id moe_envs:TargetReaching-v0?{EASED.format('fixed')} --total-timesteps 200000 --eval-every 10000"
FIXED_PPO += " --checkpoint-every 100000"  # the default then; a checkpoint ends episodes
RANDOM = "--env-id moe_envs:TargetReaching-v0?layout=random --total-timesteps 1000000 --eval-every 50000"
SUITES |= {
    "ppo-mujoco": [
        ppo_mujoco(task, free({"ppo": "ppo", "ppo_pmoe-both": experts_of(task, "ppo_pmoe-both")})) for task in PAPER_K
    ],
    "ppo-target-reaching": [
        Suite("TargetReaching-v0-fixed-ppo", FIXED_PPO, range(1, 6), REACHING),
        Suite("TargetReaching-v0-random-ppo", f"{RANDOM} --eval-episodes 50", range(1, 4), REACHING),
    ],
    "ppo-num-experts": [  # 8 is in ppo-mujoco
        ppo_mujoco(
            "HalfCheetah",
            free({f"ppo_pmoe-{k}": f"{GATES['ppo_pmoe-both']} --num-experts {k}" for k in (1, 2, 4, 16)}),
            "experts",
        )
    ],
    "ppo-kl": [
        ppo_mujoco(task, kl({"ppo": "ppo", "ppo_pmoe-both": experts_of(task, "ppo_pmoe-both")}), "ppo-kl")
        for task in ("Hopper", "Walker2d", "HalfCheetah")
    ],
    "ppo-kl-rivals": [ppo_mujoco(task, kl(gating_of(task)), "ppo-kl") for task in ("Hopper", "HalfCheetah")],
    "ppo-gate-apart": [
        ppo_mujoco(task, kl({"ppo_pmoe-apart": experts_of(task, "ppo_pmoe-apart")}), "ppo-kl")
        for task in ("Hopper", "Walker2d", "HalfCheetah")
    ],
    "ppo-num-experts-kl": [  # the paper's number is in ppo-kl
        ppo_mujoco(
            task, kl({f"ppo_pmoe-{k}": f"{GATES['ppo_pmoe-both']} --num-experts {k}" for k in numbers}), "experts-kl"
        )
        for task, numbers in (("HalfCheetah", (1, 2, 4, 16)), ("Hopper", (1, 4)))
    ],
    "ppo-mirror": Suite(
        "TargetReaching-v0-mirror", MIRROR, range(1, 7), {k: REACHING[k] for k in ("ppo", "ppo_pmoe-both")}
    ),
    "ppo-mirror-rivals": Suite("TargetReaching-v0-mirror", MIRROR, range(1, 7), PPO_RIVALS),
    "ppo-gate-gradient": [  # with ppo-mujoco, in whose folders they are, and ppo-target-reaching
        ppo_mujoco(
            task, free({f"ppo_pmoe-{x}": experts_of(task, f"ppo_pmoe-{x}") for x in ("frequency", "ppo", "means")})
        )
        for task in ("HalfCheetah", "Hopper", "Walker2d")
    ],
}

# PQN on one MinAtar game; pqn_moe without a mixture is pqn to the bit. MinAtar's own rules are in the last suite.
PQN_ARMS = {
    "pqn": "pqn",
    **{f"pqn_moe-wide{k}": f"pqn_moe --moe wide --widen {k}" for k in (4, 8)},
    **{f"pqn_moe-soft{n}": f"pqn_moe --moe soft --num-experts {n}" for n in (1, 4, 8)},
    "pqn_moe-tokens": "pqn_moe --moe tokens",
    "pqn_moe-topk4": "pqn_moe --moe topk --num-experts 4",
}
OWN_RULES = "--sticky-actions 0.1 --no-minimal-actions --time-limit 10000"


def minatar_pqn(game: str, runs: dict[str, str], folder: str = "", flags: str = "") -> Suite:
    return Suite(f"MinAtar-PQN-{game}{folder}", f"--game {game} {flags} --num-threads 1", range(1, 4), runs)


SUITES |= {
    "pqn-check": minatar_pqn("asterix", {"pqn": "pqn"}),
    "minatar-pqn": [minatar_pqn(game, PQN_ARMS) for game in ("space_invaders", "breakout", "asterix")],
    "minatar-pqn-own-rules": [
        minatar_pqn(game, {"pqn": "pqn"}, "-own-rules", OWN_RULES) for game in ("space_invaders", "breakout", "asterix")
    ],
}


# The second paper's agents on three MinAtar games that share no input: a block of channels for each, its own actions.
# 375 rollouts, of each game 125, and 24 evaluations equally far apart, the eighth and the sixteenth at a switch.
MINATAR_OWN = "--num-experts 3 --total-timesteps 3024000 --eval-every 126000 --num-threads 1"
GAMES = ("space_invaders", "breakout", "asterix")
BOTH = ("multitask", "continual")


def minatar_own(
    protocols: tuple[str, ...], kinds: dict[str, str], seeds: int, folder: str = "", flags: str = ""
) -> Suite:
    """Labels `protocol-kind`; a kind is router and architecture, or that of actor and critic, and other flags."""
    runs = {}
    for protocol in protocols:
        for kind, words in kinds.items():
            moe, _, others = words.partition(" ")
            router, _, layers = moe.rpartition("-")
            actor, _, critic = layers.partition("/")
            command = f"--protocol {protocol} --actor-moe {actor} --critic-moe {critic or actor}"
            runs[f"{protocol}-{kind}"] = f"ppo_moe_multitask {command} {f'--router {router}' * bool(router)} {others}"
    return Suite(f"MinAtar-own{folder}", f"{MINATAR_OWN} {flags}", range(1, 1 + seeds), runs)


MAIN_KINDS = {kind: kind for kind in ("baseline", "softmoe-big", "hardcoded-big")}
# The protocol in which Soft MoE led by more with three seeds, +.022 +- .083 beside +.019 +- .17; claims.toml names it.
PARTS_IN = ("continual",)
SUITES |= {
    "minatar-own-a": [
        minatar_own(BOTH, MAIN_KINDS, 6),
        minatar_own(("continual",), MAIN_KINDS, 3, "-reversed", f"--tasks {' '.join(reversed(GAMES))}"),
    ],
    "minatar-own-b": [
        minatar_own(
            BOTH,
            {
                "softmoe-middle": "softmoe-middle --tokens persamp",
                "softmoe-final": "softmoe-final",
                "softmoe-all": "softmoe-all",
                "hardcoded-middle": "hardcoded-middle --tokens persamp",
            },
            3,
        ),
        minatar_own(
            ("multitask",),
            {
                "softmoe-middle-cells": "softmoe-middle --tokens perconv --slots 0",
                "topk-middle": "topk-middle --tokens persamp",
            },
            3,
        ),
    ],
    "minatar-own-c": [
        minatar_own(
            PARTS_IN,
            {
                "softmoe-big-actor": "softmoe-big/baseline",
                "softmoe-big-critic": "softmoe-baseline/big",
                "baseline-wide": "baseline --width 392",  # as many parameters as three experts and their router
                "softmoe-big-frozen": "softmoe-big --freeze-router",
            },
            3,
        ),
        minatar_own(("continual",), {"baseline-no-reset": "baseline --no-adam-reset --no-anneal-per-phase"}, 3),
    ],
    "minatar-own-d": [  # the constants by which a return is divided
        Suite(
            "MinAtar-own",
            "--total-timesteps 1008000 --eval-every 126000 --num-threads 1 --actor-moe baseline --critic-moe baseline",
            range(1, 4),
            {f"alone-{game}": f"ppo_moe_multitask --tasks {game}" for game in GAMES},
        )
    ],
}


def decide(run_dir: Path) -> str:
    """ "skip" a finished run, "resume" an unfinished one that left a checkpoint, "start" everything else."""
    try:
        run = json.loads((run_dir / "run.json").read_text())
    except FileNotFoundError:
        return "start"
    if run.get("global_step", 0) >= run["args"]["total_timesteps"]:  # PPO ends with a whole rollout
        return "skip"
    return "resume" if (run_dir / "checkpoint.pt").exists() else "start"


def plan(suite: Suite) -> list[tuple[Path, str, list[str]]]:
    """(run folder, decision, command) of every run; seed by seed, so that a part of a suite compares all labels."""
    jobs = []
    for seed in suite.seeds:
        for label, run in suite.runs.items():
            script, *flags = run.split()
            run_dir = RUNS / suite.env / label / f"s{seed}"
            decision = decide(REPOSITORY / run_dir)
            if decision == "resume":  # the other flags come from its run.json
                flags = ["--resume", str(run_dir)]
            else:
                flags = [*suite.flags.split(), *flags, "--seed", str(seed), "--run-dir", str(run_dir)]
            jobs.append((run_dir, decision, [sys.executable, f"algos/{script}.py", *flags]))
    return jobs


def log(*words):
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def start(run_dir: Path, decision: str, command: list[str]) -> subprocess.Popen | None:
    """Starts one run; None if a process that outlived an earlier benchmark is still at it.

    The log file is locked. The child inherits the lock, so it lasts as long as the child, not as long as this script.
    """
    folder = REPOSITORY / run_dir
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if decision == "start":  # an unfinished run without a checkpoint cannot go on; the scripts refuse its folder
            for name in ("run.json", "eval.csv"):
                (folder / name).unlink(missing_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)


def here(waiting: list[tuple], number: int) -> Iterator[tuple[Path, int | None, str]]:
    """Does the jobs on this machine, `number` at a time. Yields (run folder, exit code, time taken) as they end.

    The exit code is None if another process was at the run. Ctrl-C stops the running ones with a checkpoint.
    """
    waiting, running = list(waiting), {}
    try:
        while waiting or running:
            while waiting and len(running) < number:
                run_dir, decision, command = waiting.pop(0)
                log(f"{decision:6}", run_dir)
                process = start(run_dir, decision, command)
                if process:
                    running[process] = run_dir, time.time()
                else:
                    yield run_dir, None, ""
            time.sleep(1)
            for process in [p for p in running if p.poll() is not None]:
                run_dir, started = running.pop(process)
                yield run_dir, process.returncode, f"{(time.time() - started) / 60:.1f} min, {len(waiting)} waiting"
    except KeyboardInterrupt:
        log("interrupted: the runs write a checkpoint and stop")
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()
        raise


def work(run_dir: Path, command: list[str]) -> tuple[int, float]:
    """What a worker of a Ray cluster does with a job: exit code and minutes. Started again, it goes on with the run."""
    started, process = time.time(), None
    try:
        while not process:
            decision = decide(REPOSITORY / run_dir)
            if decision == "skip":
                return 0, 0.0
            process = start(
                run_dir, decision, command if decision == "start" else [*command[:2], "--resume", str(run_dir)]
            )
            if not process:  # one that outlived its worker is still at it
                time.sleep(5)
        return process.wait(), (time.time() - started) / 60
    except KeyboardInterrupt:
        if process:
            process.send_signal(signal.SIGINT)
            process.wait()
        raise


def on_ray(jobs: list[tuple], options: argparse.Namespace) -> Iterator[tuple[Path, int, str]]:
    """Hands the jobs to a running Ray cluster; yields as here() does. The repository is on a file system of all nodes.

    A run whose node is lost goes on from its last checkpoint on another one.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise SystemExit('benchmark.py: --ray: Ray is not installed; pip install "ray>=2.40,<3"') from None
    path = os.pathsep.join([str(REPOSITORY / "results"), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        ray.init(options.ray, runtime_env={"env_vars": {"PYTHONPATH": path}}, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise SystemExit(f"benchmark.py: --ray {options.ray}: {reason}; start a cluster by ray start --head") from None
    task = ray.remote(num_cpus=1, num_gpus=options.gpus, max_retries=-1)(work)
    device = ["--device", "cuda"] if options.gpus else []
    running = {}
    for run_dir, decision, command in jobs:
        log(f"{decision:6}", run_dir)
        running[task.remote(run_dir, command + device * (decision == "start"))] = run_dir
    try:
        while running:
            for done in ray.wait(list(running), timeout=1)[0]:
                code, minutes = ray.get(done)
                yield running.pop(done), code, f"{minutes:.1f} min, {len(running)} left"
    except KeyboardInterrupt:
        log("interrupted: the runs write a checkpoint and stop")
        for job in running:
            ray.cancel(job)
        ray.wait(list(running), num_returns=len(running))
        raise


def keep_policy(run_dir: Path):
    """Copies policy.pt to results/policies: seed 1, on Hopper every seed; sac_pmoe's first with the critics.

    Those of more than a megabyte would make the repository large; of MinAtar, mixtures of three networks.
    """
    (environment, label, seed), folder = run_dir.parts[-3:], REPOSITORY / run_dir
    source = folder / "policy.pt"
    if not source.exists() or seed != "s1" and not environment.startswith("Hopper") or source.stat().st_size > 1e6:
        return
    target = REPOSITORY / "results" / "policies" / environment / label / f"{seed}.pt"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    if (label, seed) == ("sac_pmoe", "s1"):  # for the comparison of gradients
        saved = torch.load(folder / "model.pt", weights_only=True)
        saved["agent"] = {k: v for k, v in saved["agent"].items() if k.startswith(("actor.", "critic.", "log_alpha"))}
        torch.save(saved, target)


def extras(run_dir: Path) -> bool:
    """Writes what results/plot.py draws beside eval.csv, as far as it is missing; whether that worked."""
    folder, names = REPOSITORY / run_dir, []
    keep_policy(run_dir)
    if any(folder.glob("events.out.tfevents.*")):
        names.append("scalars")
    if run_dir.parts[-3].startswith("TargetReaching") and (folder / "policy.pt").exists():
        names += ["trajectories"] * (not (folder / "moe.csv").exists())  # of one task
        names += ["sides"] * ("-mirror" in run_dir.parts[-3])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    commands = [
        [sys.executable, f"results/{name}.py", str(run_dir)] for name in names if not (folder / f"{name}.csv").exists()
    ]
    return all(subprocess.run(command, cwd=REPOSITORY, env=environment).returncode == 0 for command in commands)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES, nargs="+", help="in this order")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--only", nargs="+", default=[""], help="only runs with one of these words in the folder")
    parser.add_argument(
        "--ray", nargs="?", const="auto", help="on a running Ray cluster, all runs at once; its address"
    )
    parser.add_argument("--gpus", type=float, default=0, help="with --ray: GPUs for each run, on which it then trains")
    parser.add_argument("--dry-run", action="store_true", help="print the decisions and commands, start nothing")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs: must be at least 1")
    if options.gpus < 0 or (options.gpus and not options.ray):
        parser.error("--gpus: a number of 0 or more, with --ray")
    jobs = []
    for suites in (SUITES[name] for name in options.suite):
        found = [job for suite in (suites if isinstance(suites, list) else [suites]) for job in plan(suite)]
        found = [job for job in found if any(word in str(job[0]) for word in options.only)]
        jobs += sorted(found, key=lambda job: int(job[0].name[1:]))  # seed by seed
    if options.dry_run:
        for _, decision, command in jobs:
            print(f"{decision:6}", *command[1:])
        return 0

    for number in (signal.SIGINT, signal.SIGTERM):  # kill does what Ctrl-C does, in the background as well
        signal.signal(number, signal.default_int_handler)
    waiting, failed = [], []
    for job in jobs:
        run_dir, decision, _ = job
        if decision != "skip":
            waiting.append(job)
            continue
        log("skip ", run_dir)
        failed += [] if extras(run_dir) else [run_dir]
    try:
        for run_dir, code, minutes in on_ray(waiting, options) if options.ray else here(waiting, options.jobs):
            log("LEFT, another process is at it" if code is None else "FAILED" if code else "done  ", run_dir, minutes)
            if code:
                print(*Path(f"{REPOSITORY / run_dir}.log").read_text().splitlines()[-5:], sep="\n", flush=True)
            if code != 0 or not extras(run_dir):
                failed.append(run_dir)
    except KeyboardInterrupt:
        return 130
    log(f"{' '.join(options.suite)}: {len(jobs) - len(failed)} of {len(jobs)} runs are finished", *failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""results/benchmark.py --ray on a cluster of two nodes on this machine. Skipped where Ray is not installed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import benchmark
import pytest
from conftest import ALGOS
from test_training import model, same

FLAGS = "--env-id Pendulum-v1 --total-timesteps 1500 --learning-starts 100 --checkpoint-every 300 --eval-every 1500"
FLAGS += " --eval-episodes 1 --num-threads 1"
SUITE = benchmark.Suite("Pendulum-v1", FLAGS, range(1, 4), {"sac": "sac"})


def test_without_ray_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "halfcheetah", "--ray", "--only", "no such run"])
    with pytest.raises(SystemExit, match='pip install "ray>=2.40,<3"'):
        benchmark.main()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def trainings(folder: Path) -> list[int]:
    """Processes that train below the folder."""
    done = subprocess.run(["pgrep", "-f", f"algos/sac.py.*{folder}"], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def test_runs_of_a_lost_node_end_on_another_with_the_same_bits(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    monkeypatch.setattr(benchmark, "RUNS", tmp_path / "ray")
    monkeypatch.setattr(benchmark, "extras", lambda run_dir: True)
    monkeypatch.setitem(benchmark.SUITES, "tiny", SUITE)
    killed = []

    def lose_the_node():
        """As a power cut does: its raylet, its workers and what they started end at once."""
        raylet = lost.all_processes["raylet"][0].process.pid
        while not killed:
            time.sleep(0.2)
            for pid in trainings(tmp_path):
                run = Path(os.readlink(f"/proc/{pid}/cwd"), sys_argument(pid, "--run-dir"))
                if parent(parent(pid)) == raylet and saved_step(run) >= 300:
                    worker = parent(pid)
                    cluster.remove_node(lost, allow_graceful=False)
                    for process in (worker, pid):
                        os.kill(process, signal.SIGKILL)
                    killed.append(run)

    thread = threading.Thread(target=lose_the_node)
    thread.start()
    try:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "tiny", "--ray", cluster.address])
        assert benchmark.main() == 0
    finally:
        thread.join()
        ray.shutdown()
        cluster.shutdown()
    (run,) = killed
    assert json.loads((run / "run.json").read_text())["resumed"]
    for seed in SUITE.seeds:
        whole = tmp_path / f"s{seed}"
        command = [sys.executable, "algos/sac.py", *FLAGS.split(), "--seed", str(seed), "--run-dir", str(whole)]
        subprocess.run(command, cwd=ALGOS.parent, check=True, capture_output=True)
        assert same(model(whole), model(tmp_path / "ray" / "Pendulum-v1" / "sac" / f"s{seed}"))


def sys_argument(pid: int, flag: str) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return words[words.index(flag) + 1]


def saved_step(run: Path) -> int:
    return json.loads((run / "run.json").read_text())["global_step"] if (run / "run.json").exists() else 0

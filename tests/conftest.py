"""Loads the scripts of algos/ as modules: they are files to run, not a package."""

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks here are tiny, and subprocesses run beside each other
ALGOS = Path(__file__).parent.parent / "algos"
MULTITASK = sorted(path.stem for path in ALGOS.glob("*_multitask.py"))  # have tests of their own: test_multitask.py
SCRIPTS = sorted(path.stem for path in ALGOS.glob("*.py") if path.stem not in MULTITASK)


def load(name: str, folder: Path = ALGOS):
    """The module NAME.py of a folder of scripts."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sac():
    return load("sac")


@pytest.fixture(scope="session")
def pmoe():
    return load("sac_pmoe")


@pytest.fixture(scope="session")
def ppo():
    return load("ppo")


@pytest.fixture(scope="session")
def ppo_pmoe():
    return load("ppo_pmoe")


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request):
    """Every script in turn."""
    return load(request.param)


@pytest.fixture(scope="session", params=[name for name in SCRIPTS if name.startswith("sac")])
def sac_script(request):
    """Every script with a replay, in turn."""
    return load(request.param)


@pytest.fixture(scope="session", params=[name for name in SCRIPTS if name.startswith("ppo")])
def ppo_script(request):
    """Every on-policy script in turn."""
    return load(request.param)


@pytest.fixture(scope="session")
def sac_moe():
    return load("sac_moe_multitask")


@pytest.fixture(scope="session")
def ppo_moe():
    return load("ppo_moe_multitask")

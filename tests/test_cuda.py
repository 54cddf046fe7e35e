"""On a GPU every script trains, resumes exactly, and its policies evaluate on the CPU. Skipped without CUDA."""

import json
import shutil

import pytest
import torch
from conftest import ALGOS, SCRIPTS, load
from test_training import flags, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SAC = dict(env_id="Pendulum-v1", total_timesteps=2000, learning_starts=500, eval_every=1000, checkpoint_every=1000)
PPO = dict(env_id="Pendulum-v1", total_timesteps=2048, num_envs=4, num_steps=64, num_minibatches=4)
PPO |= dict(eval_every=1024, checkpoint_every=1024)
MINATAR = dict(total_timesteps=2016, num_envs=6, num_steps=56, eval_every=1008, checkpoint_every=1008)
MIXED = dict(actor_moe="middle", critic_moe="big", num_experts=3)
TASKS = dict(
    tasks=("moe_envs:TargetReaching-v0?layout=task0", "moe_envs:TargetReaching-v0?layout=task1"), total_timesteps=2000
)
TASKS |= dict(learning_starts=500, eval_every=1000, checkpoint_every=1000)
PQN = dict(total_timesteps=2048, num_envs=16, num_steps=16, num_minibatches=4, eval_every=1024, checkpoint_every=1024)
CASES = {
    "sac": ("sac", SAC),
    "sac_pmoe": ("sac_pmoe", SAC),
    "sac_pmoe-draws": ("sac_pmoe", SAC | dict(selection="draws", primitive_update="all")),
    "sac-graph": ("sac", SAC | dict(cuda_graph=True)),
    "sac_pmoe-graph": ("sac_pmoe", SAC | dict(cuda_graph=True)),
    "sac_gating": ("sac_gating", SAC),
    "sac_mcp": ("sac_mcp", SAC),
    **{f"sac_gmm-{gradient}": ("sac_gmm", SAC | dict(gradient=gradient)) for gradient in
       ("marginal", "score", "gumbel")},
    "ppo": ("ppo", PPO),
    "ppo_pmoe": ("ppo_pmoe", PPO),
    "ppo_gating": ("ppo_gating", PPO),
    "ppo_mcp": ("ppo_mcp", PPO),
    "ppo_dac": ("ppo_dac", PPO),
    **{f"sac_moe-{router}": ("sac_moe_multitask", TASKS | MIXED | dict(router=router, num_experts=2)) for router in
       ("softmoe", "topk", "hardcoded")},
    **{f"ppo_moe-{router}": ("ppo_moe_multitask", MINATAR | MIXED | dict(router=router)) for router in
       ("softmoe", "topk", "hardcoded")},
    "pqn": ("pqn", PQN),
    **{f"pqn_moe-{moe}": ("pqn_moe", PQN | dict(moe=moe, num_experts=4)) for moe in ("soft", "topk")},
}  # fmt: skip
CASES = {name: case for name, case in CASES.items() if (ALGOS / f"{case[0]}.py").exists()}


def words(**values) -> list[str]:
    """Command line; a tuple becomes several words."""
    several = {key: value for key, value in values.items() if isinstance(value, tuple)}
    line = flags(**{key: value for key, value in values.items() if key not in several})
    return line + [word for key, value in several.items() for word in (f"--{key.replace('_', '-')}", *value)]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Script, its flags and the folder of a whole run on the GPU."""
    name, settings = CASES[request.param]
    script, settings = load(name), settings | dict(eval_episodes=1, num_threads=1, device="cuda")
    return script, settings, script.main(words(**settings, run_dir=tmp_path_factory.mktemp(request.param) / "run"))


def weights(run, name="model.pt") -> dict:
    return torch.load(run / name, map_location="cpu", weights_only=True)["agent"]


def test_it_trains_and_resumes_exactly_on_the_gpu(case, tmp_path, monkeypatch):
    """Stopped at the checkpoint in its middle as a crash stops it, and gone on with."""
    script, settings, whole = case
    assert all(value.isfinite().all() for value in weights(whole).values())
    save, count = script.Run.save, []

    def save_and_crash(self):
        save(self)
        count.append(1)
        if len(count) == 2:  # the first is that of step 0
            raise RuntimeError("crash")

    monkeypatch.setattr(script.Run, "save", save_and_crash)
    with pytest.raises(RuntimeError, match="crash"):
        script.main(words(**settings, run_dir=tmp_path / "run"))
    monkeypatch.undo()
    script.main(words(resume=tmp_path / "run"))
    assert same(weights(tmp_path / "run"), weights(whole))
    assert (tmp_path / "run" / "eval.csv").read_text() == (whole / "eval.csv").read_text()


def test_what_a_gpu_trained_evaluates_on_the_cpu(case, tmp_path, capsys):
    script, _, whole = case
    shutil.copy(whole / "policy.pt", tmp_path / "s1.pt")
    capsys.readouterr()
    script.main(words(evaluate=tmp_path / "s1.pt", eval_episodes=1, device="cpu"))
    assert json.loads(capsys.readouterr().out)


def test_evaluation_does_not_change_training(tmp_path):
    """It happens on the CPU, but seeding the CPU's generator seeds the GPU's too."""
    script, settings = load("sac"), SAC | dict(eval_episodes=1, num_threads=1, device="cuda")
    runs = [script.main(words(**settings | dict(eval_every=n), run_dir=tmp_path / str(n))) for n in (1000, 700)]
    assert same(*map(weights, runs))


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name.startswith("sac")])
def test_a_cuda_graph_computes_the_same_numbers(name, tmp_path):
    """Losses of every logged update, weights and evaluations are those of a run without."""
    script, settings, runs = load(name), SAC | dict(eval_episodes=1, num_threads=1, device="cuda"), []
    for graph in (False, True):
        runs.append(script.main(words(**settings, cuda_graph=graph, run_dir=tmp_path / str(graph))))
    assert same(weights(runs[0]), weights(runs[1]))
    assert (runs[0] / "eval.csv").read_text() == (runs[1] / "eval.csv").read_text()


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name.startswith("sac")])
def test_update_never_waits_for_the_gpu(name):
    script = load(name)
    args = script.Args(device="cuda")
    agent = script.Agent(17, 6, args)
    x = torch.randn(4, 256, 17, device="cuda")
    batch = script.Batch(x[0], x[1, :, :6].tanh(), x[2, :, 0], torch.zeros(256, device="cuda"), x[3])
    script.update(agent, batch, args)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            script.update(agent, batch, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""What stands round PPO's formulas: rows of eval.csv, curves, seeds, arguments, speed, clipping, defaults."""

import copy
import itertools
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_ppo import columns, learned, make_batch, run

PPO = ["ppo", "ppo_pmoe", "ppo_gating", "ppo_mcp", "ppo_dac"]


class Uneven(gym.Env):
    """Episodes of 6, 1, 2, 6, ... steps: the first step pays the square of the length, any other costs 1.

    The long one succeeds in its first step. A seed says which one comes first."""

    observation_space, action_space = gym.spaces.Box(-99, 99, (1,)), gym.spaces.Box(-1, 1, (1,))
    episode = 0

    def reset(self, *, seed=None, options=None):
        self.episode = self.episode + 1 if seed is None else seed
        self.length, self.count = (1, 2, 6)[self.episode % 3], 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1
        reward = self.length**2 if self.count == 1 else -1
        info = {"success": self.count == 1 and self.length == 6}
        return np.full(1, self.count, np.float32), reward, self.count == self.length, False, info


gym.register("PPOUneven-v0", Uneven, max_episode_steps=50)


def test_a_row_of_eval_csv_by_hand(ppo):
    """Sums of whole episodes and their mean, not the last reward or a median; success at the end and at any step."""
    args, asked = ppo.Args(env_id="PPOUneven-v0", eval_episodes=3), []
    agent = SimpleNamespace(act=lambda obs, policy: asked.append((*obs, policy)) or np.zeros(1, np.float32))
    row = ppo.evaluate(agent, ppo.Env(args, evaluation=True), args, 80, "stochastic")
    assert asked == [(float(t), "stochastic") for length in (6, 1, 2) for t in range(length)]
    results = np.array([[31, 6, 0, 1], [1, 1, 0, 0], [3, 2, 0, 0]])
    expected = {"global_step": 80, "policy": "stochastic", "episodes": 3}
    for name, column in zip(("return", "length", "success", "success_once"), results.T, strict=True):
        expected[name] = round(column.mean(), 4)
    assert row == expected | {"return_std": round(results[:, 0].std(), 4)}


def test_what_a_run_writes_by_hand(ppo, tmp_path, monkeypatch):
    """Means over the episodes that ended in a rollout, those that began before it included, and over all updates."""
    rollouts, losses, batches, seen = [], [], [], []
    rollout, update, prepare, diagnostics = ppo.Sampler.rollout, ppo.update, ppo.prepare, ppo.Actor.diagnostics

    def watch(sampler, agent):
        rollouts.append(rollout(sampler, agent))
        return rollouts[-1]

    def watch_update(*arguments):
        losses.append(update(*arguments))
        return dict(losses[-1])

    monkeypatch.setattr(ppo.Sampler, "rollout", watch)
    monkeypatch.setattr(ppo, "update", watch_update)
    monkeypatch.setattr(ppo, "prepare", lambda *x: batches.append(prepare(*x)) or batches[-1])
    monkeypatch.setattr(ppo.Actor, "diagnostics", lambda self, obs: seen.append(obs) or diagnostics(self, obs))
    run(ppo, tmp_path, env_id="PPOUneven-v0", eval_every=80, eval_episodes=2, checkpoint_every=240)
    events = EventAccumulator(str(tmp_path)).Reload()
    curve = {key: [event.value for event in events.Scalars(key)] for key in events.Tags()["scalars"]}
    total, age, discounted = np.zeros((3, 4))
    for i, (data, _) in enumerate(rollouts):
        ended = []
        for reward, done, expected in zip(*(x.numpy() for x in (data.reward, data.done, data.discounted)), strict=True):
            total, age, discounted = total + reward, age + 1, discounted * 0.99 + reward
            np.testing.assert_allclose(expected, discounted, rtol=1e-5)
            ended += [(total[j], age[j]) for j in np.flatnonzero(done)]
            total, age, discounted = (x * (1 - done) for x in (total, age, discounted))
        assert torch.equal(seen[i], batches[i].obs)  # normalised
        found = curve["charts/episodic_return"][i], curve["charts/episodic_length"][i]
        assert found == pytest.approx(np.mean(ended, axis=0))
        for key in ("losses/actor", "losses/critic"):
            assert curve[key][i] == pytest.approx(np.mean([x[key] for x in losses[8 * i : 8 * i + 8]]), abs=1e-6)
        assert curve["charts/learning_rate"][i] == pytest.approx(3e-4 * (1 - i / 3))
    header, *lines = (line.split(",") for line in (tmp_path / "eval.csv").read_text().splitlines())
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    for key in ("return", "success", "success_once"):
        for policy, suffix in (("deterministic", ""), ("stochastic", "_stochastic")):
            values = [float(row[key]) for row in rows if row["policy"] == policy]
            assert curve[f"eval/{key}{suffix}"] == pytest.approx(values)


@pytest.mark.parametrize("name", ["ppo", "ppo_dac"])
def test_losses_are_means_over_all_updates(name, monkeypatch):
    script, losses = load(name), itertools.count()
    monkeypatch.setattr(
        script, "update", lambda *_: {"log_ratio": torch.zeros(16), "losses/x": torch.tensor(float(next(losses)))}
    )
    metrics = learned(script, columns(script), script.Args(num_minibatches=4, update_epochs=2))
    assert metrics["losses/x"] == 3.5


def test_the_learning_rate_of_the_moment_is_that_of_the_step(ppo_pmoe):
    """Annealing changes it in the optimizer's groups."""
    args = ppo_pmoe.Args(gate_gradient="apart")
    agent, batch = ppo_pmoe.Agent(3, 2, args), make_batch(ppo_pmoe)
    for optimizer in agent.optimizers:
        optimizer.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(agent.state_dict())
    ppo_pmoe.update(agent, batch, args)
    assert all(torch.equal(value, before[key]) for key, value in agent.state_dict().items())


@pytest.mark.parametrize(("name", "changes"), [("ppo_dac", {}), ("ppo_pmoe", {"gate_gradient": "apart"})])
def test_learning_rates_of_three_optimizers_fall(name, changes, tmp_path, monkeypatch):
    script, rates = load(name), []
    monkeypatch.setattr(
        script, "learn", lambda agent, *_: rates.append([o.param_groups[0]["lr"] for o in agent.optimizers]) or {}
    )
    run(script, tmp_path / "run", learning_rate=1e-3, **changes)
    assert rates == [pytest.approx([1e-3 * (1 - k / 3)] * 3) for k in range(3)]


@pytest.mark.parametrize("name", PPO)
def test_every_policy_acts_on_normalised_observations(name):
    """And the stochastic one is a sample, the others are means."""
    script = load(name)
    torch.manual_seed(0)
    actor = script.Agent(3, 2, script.Args()).actor
    actor.normalize.update(50 + 7 * torch.randn(100, 3))
    for key, weight in actor.named_parameters():
        weight.data.add_(0.1 * torch.randn_like(weight) if "log_std" not in key else -1.0)
    plain, obs = copy.deepcopy(actor), 50 + 7 * torch.randn(20, 3)
    plain.normalize = script.Moments(3)

    def act(actor, obs, policy):
        torch.manual_seed(1)
        answer = actor.act(obs, policy)
        return answer[0] if isinstance(answer, tuple) else answer

    for policy in (*script.Actor.policies, "stochastic"):
        torch.testing.assert_close(act(actor, obs, policy), act(plain, actor.normalize(obs), policy))
    torch.manual_seed(1)
    assert torch.equal(act(actor, obs, "stochastic"), (torch.manual_seed(1), actor.sample(obs)[0])[1])
    assert not torch.allclose(act(actor, obs, "stochastic"), act(actor, obs, "deterministic"), atol=0.1)


@pytest.mark.parametrize("env_id", ["moe_envs:TargetReaching-v0", "PPOSingle-v0"])
def test_arguments_of_env_id_are_those_of_training_too(ppo, env_id):
    """Vectorised or not: layout, rewards and time limit are those of the evaluation."""
    args = ppo.Args(env_id=f"{env_id}?layout=task1&obstacle_penalty=-3&speed_bonus=2&max_episode_steps=40", num_envs=1)
    with ppo.OPEN:
        env, envs = ppo.Env(args, evaluation=True), ppo.make_envs(args)
        for heading, last in (((-1, 1), -3.0), ((0, 0), 0.0)):  # into the obstacle, and nowhere till the time is out
            obs, done, steps = env.reset(0)[0], False, 0
            np.testing.assert_array_equal(envs.reset(seed=[5])[0][0], obs)
            action, steps = np.array(heading, np.float32), 0
            while not done:
                obs, reward, terminated, truncated, _ = env.step(action)
                after, *found, info = envs.step(action[None])
                done, steps = terminated or truncated, steps + 1
                assert [x.item() for x in found] == [reward, terminated, truncated]
                np.testing.assert_array_equal(info["final_obs"][0] if done else after[0], obs)
            assert reward == last and (steps == 40) == truncated == (heading == (0, 0))


def test_runs_with_other_seeds_train_in_other_episodes(ppo):
    starts = []
    for seed in (1, 2):
        args = ppo.Args(env_id="PPOVector-v0", num_envs=2, seed=seed)
        with ppo.OPEN:
            sampler = ppo.Sampler(ppo.make_envs(args), args)
            sampler.reset(0)
            starts += [tuple(obs) for obs in sampler.obs]
    assert len(set(starts)) == 4


def test_speed_counts_the_time_of_all_processes_of_a_run(ppo, tmp_path, monkeypatch):
    """run.json of a resumed run divides all steps by all seconds, the curve those of this process."""
    calls = itertools.count()  # time stands still but for a microsecond
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(ppo, "time", SimpleNamespace(perf_counter=lambda: clock.now + 1e-6 * next(calls)))
    args, agent = ppo.Args(env_id="Pendulum-v1", run_dir=str(tmp_path)), ppo.Agent(3, 1, ppo.Args())
    with ppo.OPEN:
        first = ppo.Run(args, None, agent=agent)
        first.step, clock.now = 80, 110.0
        first.save()
    saved, clock.now = torch.load(tmp_path / "checkpoint.pt", weights_only=True), 1000.0
    with ppo.OPEN:
        second = ppo.Run(args, saved, agent=agent)
        second.step, clock.now = 160, 1005.0
        assert second.log({}) == pytest.approx((160 - 80) / 5, rel=1e-3)
        second.save()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert [saved["wall_time"], saved["steps_per_second"]] == pytest.approx([15, 160 / 15], rel=1e-3)


def test_clipping_is_on_both_sides_and_in_both_kinds_of_prepare(ppo, tmp_path):
    moments = ppo.Moments(1)
    moments.update(torch.randn(100, 1))
    assert moments(torch.tensor([[1e6], [-1e6]])).tolist() == [[10.0], [-10.0]]
    dac = load("ppo_dac")
    args, zero = dac.Args(gae_lambda=0.0, gamma=0.0), torch.zeros(100, 1)
    agent, reward = dac.Agent(1, 1, args), torch.ones(100, 1)
    reward[7], reward[9] = 1000.0, -1000.0
    agent.return_moments.update(torch.randn(10**6))
    action = torch.stack([zero, zero - 1, zero], 2)
    rollout = dac.Rollout(zero[..., None], action, reward, zero, zero, zero[..., None], zero)
    target = dac.prepare(agent, rollout, args).target
    assert target[7].tolist() == pytest.approx([10, 10]) and target[9].tolist() == pytest.approx([-10, -10])


def test_standard_deviation_in_the_log(ppo):
    """The mean of the sigmas, not sigma of the mean; of the options also how far they are apart."""
    actor, dac = ppo.Actor(3, 2, ppo.Args()), load("ppo_dac")
    actor.log_std.data[1] = math.log(3.0)
    assert actor.diagnostics(None)["policy/std"].item() == pytest.approx(2)
    actor = dac.Actor(3, 2, dac.Args(num_options=2))
    actor.mean.w3.data.zero_()
    actor.mean.b3.data[:] = torch.tensor([[[0.0, 0.5]], [[3.0, 0.5]]])  # clipped to (0, 0.5) and (1, 0.5)
    actor.log_std.data[0] = math.log(3.0)
    found = actor.diagnostics(torch.randn(9, 3))
    assert found["policy/std"].item() == pytest.approx(2) and found["moe/expert_distance"].item() == pytest.approx(1)


@pytest.mark.parametrize("name", PPO)
def test_defaults_that_results_and_docstrings_rely_on(name):
    args = load(name).Args()
    own = {"ppo_pmoe": (0.012, 4), "ppo_gating": (None, 4), "ppo_mcp": (None, 8), "ppo_dac": (None, 4)}
    number = getattr(args, "num_experts", getattr(args, "num_options", None))
    assert (args.target_kl, number) == own.get(name, (None, None))
    assert args.env_id == "moe_envs:TargetReaching-v0?layout=fixed&obstacle_penalty=-10"
    common = (args.gamma, args.gae_lambda, args.clip_coef, args.vf_coef, args.ent_coef, args.max_grad_norm)
    assert common == (0.99, 0.95, 0.2, 0.5, 0.0, 0.5)
    sizes = (args.num_envs, args.num_steps, args.update_epochs, args.num_minibatches, args.learning_rate)
    assert sizes == (8, 256, 10, 32, 3e-4) and args.anneal_lr and getattr(args, "high_ent_coef", 0.01) == 0.01

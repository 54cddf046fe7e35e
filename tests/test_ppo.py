"""The mathematics of PPO: advantages, the clipped objective, Adam, moments, probe problems, vector environments."""

import json
import math
import os
import signal
import socket
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ALGOS, load
from processes import Started
from test_sac import NoSynchronisation
from test_training import Strange, flags
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal


def make_batch(module, batch_size=64, obs_dim=3, action_dim=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch_size, obs_dim + action_dim + 3, generator=generator)
    obs, action, (log_prob, advantage, target) = noise[:, :obs_dim], noise[:, obs_dim:-3], noise[:, -3:].T
    return module.Batch(obs, action, 0.3 * log_prob - 2.5, advantage, target)


def learned(script, batch, args):
    """learn(), or of ppo_dac.py its counterpart for one MDP."""
    if script.SCRIPT == "ppo_dac":
        return script.passes(None, batch, args, "low", args.update_epochs)
    return script.learn(None, batch, args)


def columns(script):
    """make_batch(), for ppo_dac.py with options as well."""
    obs, action, *others = make_batch(type("Script", (), {"Batch": staticmethod(lambda *columns: columns)}))
    zero = torch.zeros(64, dtype=torch.long)
    options = (zero, zero, torch.ones(64, 4) / 4) if script.SCRIPT == "ppo_dac" else ()
    return script.Batch(obs, action, *options, *others)


def run(module, folder, **changes):
    """A short run of `module` in this process; returns its agent's tensors."""
    settings = dict(env_id="Pendulum-v1", total_timesteps=240, num_envs=4, num_steps=20, num_minibatches=4)
    settings |= dict(update_epochs=2, eval_every=10**6, eval_episodes=1, num_threads=1, run_dir=str(folder))
    module.main(flags(**(settings | changes)))
    return torch.load(folder / "model.pt", weights_only=True)["agent"]


# Advantages


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_gae_of_the_true_value_is_zero(ppo, gae_lambda):
    """Deterministic rewards and the true V: nothing to gain, at terminated, truncated and running ends alike."""
    args, rng = ppo.Args(gamma=0.9, gae_lambda=gae_lambda), np.random.default_rng(0)
    steps, envs = 30, 5
    reward, ends = rng.normal(size=(steps, envs)), rng.random((steps, envs))
    terminated, done = ends < 0.1, ends < 0.25
    next_value = rng.normal(size=(steps, envs))  # V after a time limit or the last row: anything, as there is no more
    value = np.empty((steps, envs))
    for t in reversed(range(steps)):
        if t < steps - 1:
            next_value[t] = np.where(done[t], next_value[t], value[t + 1])
        value[t] = reward[t] + 0.9 * np.where(terminated[t], 0, next_value[t])
    data = [torch.tensor(x, dtype=torch.float64) for x in (reward, value, next_value, terminated, done)]
    assert terminated.any() and (done & ~terminated).any() and not done[-1].all()
    torch.testing.assert_close(ppo.gae(*data, args), torch.zeros(steps, envs, dtype=torch.float64), atol=1e-12, rtol=0)


def test_gae_by_its_definition(ppo):
    """sum_l (gamma lambda)^l delta_{t+l} up to the end of the episode or of the rollout."""
    args = ppo.Args(gamma=0.9, gae_lambda=0.7)
    generator = torch.Generator().manual_seed(0)
    reward, value, next_value, ends = torch.randn(4, 40, 1, generator=generator, dtype=torch.float64)
    terminated, done = (ends < -1.2).double(), (ends < -0.7).double()
    assert terminated.any() and (done > terminated).any()
    advantage = ppo.gae(reward, value, next_value, terminated, done, args)
    delta = reward + 0.9 * (1 - terminated) * next_value - value
    for t in range(40):
        last = next((i for i in range(t, 40) if done[i]), 39)
        expected = sum((0.9 * 0.7) ** (i - t) * delta[i] for i in range(t, last + 1))
        torch.testing.assert_close(advantage[t], expected)


class TwoSteps(gym.Env):
    """Observation 0, then 1, then the end, with reward 1 each; it changes its one observation in place."""

    observation_space = gym.spaces.Box(-10, 10, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, terminates=True):
        self.terminates, self.obs = terminates, np.zeros(1, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs[:] = 0
        return self.obs, {}

    def step(self, action):
        self.obs += 1
        return self.obs, 1, self.obs[0] == 2 and self.terminates, self.obs[0] == 2 and not self.terminates, {}


for end in (True, False):
    gym.register(f"PPOTwoSteps{end}-v0", TwoSteps, max_episode_steps=10, kwargs={"terminates": end})


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("terminates", [True, False])
def test_rollout_has_the_last_observation_and_both_masks(ppo, terminates, asynchronous):
    args = ppo.Args(env_id=f"PPOTwoSteps{terminates}-v0", num_envs=3, num_steps=5, gamma=0.5, async_envs=asynchronous)
    envs = ppo.make_envs(args)
    sampler = ppo.Sampler(envs, args)
    sampler.reset(0)
    rollout, episodes = sampler.rollout(ppo.Agent(1, 1, args))
    envs.close()
    for i in range(3):
        assert rollout.obs[:, i, 0].tolist() == [0, 1, 0, 1, 0]
        assert rollout.next_obs[:, i, 0].tolist() == [1, 2, 1, 2, 1]
        assert rollout.done[:, i].tolist() == [0, 1, 0, 1, 0]
        assert rollout.terminated[:, i].tolist() == [0, terminates, 0, terminates, 0]
        assert rollout.discounted[:, i].tolist() == [1, 1.5, 1, 1.5, 1]
    assert episodes == [(2, 2)] * 6
    assert sampler.obs.tolist() == [[1.0]] * 3


def test_every_environment_and_step_has_noise_of_its_own(ppo):
    args = ppo.Args(env_id="PPOTwoStepsTrue-v0", num_envs=3, num_steps=5)
    agent, envs = ppo.Agent(1, 1, args), ppo.make_envs(args)
    agent.actor.mean.w.data.zero_()
    sampler = ppo.Sampler(envs, args)
    sampler.reset(0)
    assert len(torch.cat([sampler.rollout(agent)[0].action for _ in range(2)]).unique()) == 30
    envs.close()


class NothingChanges(TwoSteps):
    """Reward 1 and the observation 0 for ever, in pieces of two steps."""

    def step(self, action):
        _, reward, _, truncated, info = super().step(action)
        return np.zeros(1, np.float32), reward, False, truncated, info


gym.register("PPONothingChanges-v0", NothingChanges, max_episode_steps=10, kwargs={"terminates": False})


def train(script, env_id, **changes):
    """An agent after a few rollouts in a probe environment."""
    torch.manual_seed(0)
    args = dict(num_envs=8, num_steps=32, num_minibatches=4, update_epochs=5, learning_rate=1e-2)
    args = script.Args(env_id=env_id, **(args | changes))
    agent, envs = script.Agent(1, 1, args), script.make_envs(args)
    sampler = script.Sampler(envs, args)
    sampler.reset(0)
    for _ in range(15):
        script.learn(agent, script.prepare(agent, sampler.rollout(agent)[0], args), args)
    return agent


@pytest.mark.parametrize(
    ("env_id", "values"), [("PPOTwoStepsTrue-v0", [1.5, 1.0]), ("PPONothingChanges-v0", [2.0])], ids=["end", "limit"]
)
def test_probe_values(ppo_script, env_id, values):
    """At gamma 0.5: reward 1 twice, then the end, has V = 1 + 0.5, 1; reward 1 for ever has V = 1 / (1 - 0.5)."""
    agent = train(ppo_script, env_id, gamma=0.5)
    with torch.no_grad():
        value = agent.actor(agent.actor.normalize(torch.arange(len(values))[:, None]))[-1]
    torch.testing.assert_close(value / agent.return_moments.scale, torch.tensor(values), rtol=0, atol=0.05)


class ActionIsReward(TwoSteps):
    """Episodes of one step; the reward is -(a - 0.5)^2, so the best action is 0.5."""

    def step(self, action):
        return self.obs, -float((action[0] - 0.5) ** 2), True, False, {}


class FarSigns(ActionIsReward):
    """Observations around 50; the best action is -0.5 below and 0.5 above. It keeps the actions that it gets."""

    observation_space = gym.spaces.Box(-1000, 1000, (1,))
    actions = []

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.obs[:] = self.np_random.uniform(30, 70)
        return self.obs, {}

    def step(self, action):
        self.actions.append(action.copy())
        return self.obs, -float((action[0] - np.sign(self.obs[0] - 50) / 2) ** 2), True, False, {}


class Ladder(TwoSteps):
    """Observations 100, 101, ... 104, cut off there; reward 1 each, for ever in truth."""

    observation_space = gym.spaces.Box(-1000, 1000, (1,))

    def step(self, action):
        self.obs += 1
        return self.obs, 1, False, bool(self.obs[0] == 104), {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs[:] = 100
        return self.obs, {}


gym.register("PPOActionIsReward-v0", ActionIsReward, max_episode_steps=10)
gym.register("PPOFarSigns-v0", FarSigns, max_episode_steps=10)
gym.register("PPOLadder-v0", Ladder, max_episode_steps=10)


def test_probe_policy(ppo_script):
    agent = train(ppo_script, "PPOActionIsReward-v0")
    assert agent.actor.act(torch.zeros(1, 1), "deterministic").item() == pytest.approx(0.5, abs=0.1)


def test_probe_policy_far_from_zero(ppo_script):
    """Acting, learning and evaluation see observations through the same moments: raw ones would all look alike."""
    agent = train(ppo_script, "PPOFarSigns-v0", num_envs=16)
    obs = torch.tensor([[35.0], [42.0], [58.0], [65.0]])
    assert agent.actor.act(obs, "deterministic")[:, 0].tolist() == pytest.approx([-0.5, -0.5, 0.5, 0.5], abs=0.3)


def test_probe_value_behind_a_time_limit_far_from_zero(ppo_script):
    agent = train(ppo_script, "PPOLadder-v0", gamma=0.5)
    with torch.no_grad():
        value = agent.actor(agent.actor.normalize(torch.arange(100.0, 104.0)[:, None]))[-1]
    torch.testing.assert_close(value / agent.return_moments.scale, torch.full((4,), 2.0), rtol=0, atol=0.2)


def test_what_acted_is_what_is_learned_from(ppo_script, monkeypatch):
    """The stored log-probability is that of the unclipped action under the policy that acted; the environment got the
    clipped one. In the second rollout too, whose moments are far from 0 and 1."""
    torch.manual_seed(0)
    args = ppo_script.Args(env_id="PPOFarSigns-v0", num_envs=4, num_steps=30, num_minibatches=4)
    agent, envs = ppo_script.Agent(1, 1, args), ppo_script.make_envs(args)
    sampler = ppo_script.Sampler(envs, args)
    sampler.reset(0)
    actor, acted = agent.actor, []
    actor.log_std.data.fill_(0.3)
    sample = actor.sample

    def watch(obs, noise):
        result = sample(obs, noise)
        moments = actor.normalize
        plain = ((obs.double() - moments.mean) / (moments.var + 1e-8).sqrt()).clamp(-10, 10).float()
        mean, *gate, _ = actor(plain)
        if gate:
            components = Independent(Normal(mean, actor.log_std.exp().expand_as(mean)), 1)
            policy = MixtureSameFamily(Categorical(logits=gate[0]), components)
        else:
            policy = Independent(Normal(mean, actor.log_std.exp()), 1)
        acted.append((result[1], policy.log_prob(result[1])))
        return result

    monkeypatch.setattr(actor, "sample", watch)
    for _ in range(2):
        acted.clear(), FarSigns.actions.clear()
        rollout, _ = sampler.rollout(agent)
        action, log_prob = (torch.cat(column) for column in zip(*acted, strict=True))
        received = torch.from_numpy(np.concatenate(FarSigns.actions))[:, None]
        batch = ppo_script.prepare(agent, rollout, args)
        torch.testing.assert_close(batch.action, action)
        torch.testing.assert_close(batch.log_prob, log_prob, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(received, action.clamp(-1, 1))
        assert (action.abs() > 1).any()
        ppo_script.learn(agent, batch, args)
    assert actor.normalize.mean.item() == pytest.approx(50, abs=3)


def test_scaled_rewards_are_clipped_at_ten(ppo):
    args = ppo.Args(gae_lambda=0.0, gamma=0.0)
    agent, zero = ppo.Agent(1, 1, args), torch.zeros(100, 1)
    reward = torch.ones(100, 1)
    reward[7], reward[9] = 1000.0, -1000.0  # scaled by the standard deviation of them all, 141: clipped if not by this
    agent.return_moments.update(torch.randn(10**6))
    rollout = ppo.Rollout(zero[..., None], zero[..., None], reward, zero, zero, zero[..., None], zero)
    target = ppo.prepare(agent, rollout, args).target
    assert target[7].item() == pytest.approx(10) and target[9].item() == pytest.approx(-10)
    assert target[0].item() == pytest.approx(1, abs=0.01)


def test_advantages_of_a_rollout_by_hand(ppo):
    """A time limit after the second of three steps: what counts is V of its last observation, not of the next row.
    The scale of the rewards has this rollout in it, the moments of the observations do not."""
    args = ppo.Args(gamma=0.9, gae_lambda=0.7)
    torch.manual_seed(0)
    agent = ppo.Agent(3, 2, args).double()
    agent.actor.normalize.update(2 + 3 * torch.randn(50, 3))
    obs, after = torch.randn(2, 3, 1, 3, dtype=torch.float64)
    after[0] = obs[1]
    reward, zero = torch.tensor([[1.0], [-2.0], [3.0]], dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    done, discounted = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64), 5 * torch.randn(3, 1)
    value, following = (agent.actor(agent.actor.normalize(x[:, 0]))[-1].detach() for x in (obs, after))
    rollout = ppo.Rollout(obs, torch.zeros(3, 1, 2), reward, zero, done, after, discounted)
    batch = ppo.prepare(agent, rollout, args)
    delta = reward[:, 0] / discounted.double().std(correction=0) + 0.9 * following - value
    expected = torch.stack([delta[0] + 0.63 * delta[1], delta[1], delta[2]])
    torch.testing.assert_close(batch.advantage, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch.target, expected + value, rtol=1e-5, atol=1e-5)


def test_kl_and_clipped_share_by_hand(ppo, monkeypatch):
    log_ratio = torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5, 0.25, -0.25, 0.15]).repeat(2)
    monkeypatch.setattr(ppo, "update", lambda *_: {"log_ratio": log_ratio})
    metrics = ppo.learn(None, make_batch(ppo), ppo.Args(num_minibatches=4, update_epochs=1))
    kl = sum(math.exp(x) - 1 - x for x in log_ratio.tolist()) / 16  # Schulman's estimate of KL(pi_old || pi)
    assert metrics["policy/kl"].item() == pytest.approx(kl, rel=1e-4)
    assert metrics["policy/clipped"].item() == 0.5  # 0.5, -0.5, 0.25 and exp(-0.25) = 0.78


def test_learning_rates_fall_to_zero(ppo_script, tmp_path, monkeypatch):
    rates, learn = [], ppo_script.learn

    def watch(agent, batch, args):
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in agent.optimizers])
        return learn(agent, batch, args)

    monkeypatch.setattr(ppo_script, "learn", watch)
    run(ppo_script, tmp_path / "run", total_timesteps=320, learning_rate=1e-3)
    for k, row in enumerate(rates):
        assert row == pytest.approx([1e-3 * (1 - k / 4)] * len(row))
    assert len(rates) == 4


# One update


def test_log_prob_and_entropy_against_torch_distributions(ppo):
    actor = ppo.Actor(3, 2, ppo.Args()).double()
    actor.log_std.data = torch.tensor([-0.7, 0.4], dtype=torch.float64)
    obs, action = torch.randn(50, 3, dtype=torch.float64), 3 * torch.randn(50, 2, dtype=torch.float64)
    mean, _ = actor(obs)
    normal = Normal(mean, actor.log_std.exp())
    torch.testing.assert_close(actor.log_prob(mean, action), normal.log_prob(action).sum(1))
    torch.testing.assert_close(actor.entropy(), normal.entropy()[0].sum())


def test_trunks_equal_two_plain_networks(ppo):
    actor, obs = ppo.Actor(3, 2, ppo.Args()), torch.randn(7, 3)
    t = actor.trunks
    for i, (head, output) in enumerate(zip((actor.mean, actor.value), actor(obs), strict=True)):
        x = ((obs @ t.w1[i] + t.b1[i]).tanh() @ t.w2[i] + t.b2[i]).tanh()
        torch.testing.assert_close((x @ head.w + head.b).squeeze(1) if i else x @ head.w + head.b, output)
        torch.testing.assert_close(t.w2[i] @ t.w2[i].T, 2 * torch.eye(64), atol=1e-4, rtol=0)  # gain sqrt(2)
    torch.testing.assert_close(actor.mean.w.T @ actor.mean.w, 1e-4 * torch.eye(2), atol=1e-7, rtol=0)


GAINS = {"w1": 2**0.5, "w2": 2**0.5, "mean": 0.01, "beta": 0.01, "gate": 0.01, "value": 1.0, "q": 1.0, "layers": 2**0.5}


@pytest.mark.parametrize("name", ["ppo", "ppo_pmoe", "ppo_gating", "ppo_mcp", "ppo_dac"])
def test_gains_of_the_first_weights(name):
    script = load(name)
    torch.manual_seed(0)
    for key, weight in script.Agent(3, 2, script.Args()).named_parameters():
        *_, part, last = key.replace("layers.6", "value").split(".")
        if "layers" in key and "layers.6" not in key:
            part = "layers"
        if last.startswith("b") or (last == "log_std" and name != "ppo_mcp"):  # ppo_mcp.py's has a test of its own
            assert not weight.any(), key
        elif last != "log_std":
            gain = GAINS[last if last in GAINS else part]
            singular = torch.linalg.svdvals(weight)
            torch.testing.assert_close(singular, torch.full_like(singular, gain), rtol=1e-3, atol=1e-5, msg=key)


def textbook_loss(agent, batch, args):
    """As in the paper, through torch.distributions and automatic differentiation of the minimum."""
    mean, value = agent.actor(batch.obs)
    normal = Normal(mean, agent.actor.log_std.exp())
    ratio = (normal.log_prob(batch.action).sum(1) - batch.log_prob).exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    actor_loss = -torch.min(ratio * batch.advantage, clipped * batch.advantage).mean()
    critic_loss = (value - batch.target).square().mean()
    entropy = normal.entropy().sum(1).mean()
    return actor_loss + args.vf_coef * critic_loss - args.ent_coef * entropy, actor_loss, critic_loss


def test_updates_equal_the_textbook_with_torch_adam_and_clipping(ppo):
    args = ppo.Args(ent_coef=0.1, max_grad_norm=0.3, learning_rate=1e-2)
    torch.manual_seed(0)
    agent, plain = ppo.Agent(3, 2, args), ppo.Agent(3, 2, args)
    plain.load_state_dict(agent.state_dict())
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2, eps=1e-5)
    norms = []
    for step in range(5):
        batch = make_batch(ppo, seed=step)
        loss, actor_loss, critic_loss = textbook_loss(plain, batch, args)
        adam.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), args.max_grad_norm).item())
        adam.step()
        metrics = ppo.update(agent, batch, args)
        torch.testing.assert_close(metrics["losses/actor"], actor_loss.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(metrics["losses/critic"], critic_loss.detach(), rtol=1e-4, atol=1e-6)
        for (name, a), b in zip(agent.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=f"{name}, step {step}")
    assert max(norms) > args.max_grad_norm  # the clipping was at work


def test_update_does_not_synchronise(ppo_script):
    args = ppo_script.Args()
    agent = ppo_script.Agent(3, 2, args)
    with NoSynchronisation():
        ppo_script.update(agent, make_batch(ppo_script), args)


def test_kl_stops_the_passes(ppo_script, monkeypatch):
    args = ppo_script.Args(num_envs=4, num_steps=16, num_minibatches=1, update_epochs=4, learning_rate=1e-2)
    args.target_kl = None
    torch.manual_seed(0)
    agent = ppo_script.Agent(17, 2, args)
    sampler = ppo_script.Sampler(ppo_script.make_envs(args), args)
    sampler.reset(0)
    update, ratios = ppo_script.update, []
    monkeypatch.setattr(ppo_script, "update", lambda *a: ratios.append(update(*a)) or dict(ratios[-1]))
    ppo_script.learn(agent, ppo_script.prepare(agent, sampler.rollout(agent)[0], args), args)
    assert len(ratios) == 4 and ratios[0]["log_ratio"].abs().max() < 1e-5 < ratios[1]["log_ratio"].abs().max()
    args = ppo_script.dataclasses.replace(args, target_kl=1e-6)
    metrics = ppo_script.learn(agent, ppo_script.prepare(agent, sampler.rollout(agent)[0], args), args)
    assert len(ratios) == 4 + 2 and metrics["policy/kl"] > 1e-6  # the first pass starts with no distance at all


@pytest.mark.parametrize("name", ["ppo", "ppo_dac"])
def test_kl_is_that_of_the_whole_last_pass_and_stops_at_its_target(name, monkeypatch):
    """Neither that of one minibatch nor of the passes before; the policy moves on with every minibatch."""
    script, calls = load(name), []

    def update(*_):
        calls.append(0.03 * len(calls))
        return {"log_ratio": torch.full((16,), calls[-1])}

    monkeypatch.setattr(script, "update", update)
    kl = [sum(math.exp(x) - 1 - x for x in (0.03 * (4 * i + j) for j in range(4))) / 4 for i in range(3)]
    clipped = [0.0, 0.25, 1.0]  # above log 1.2 = 0.18
    for target, passes in ((None, 3), (1.01 * kl[1], 3), (0.99 * kl[1], 2), (0.99 * kl[0], 1)):
        calls.clear()
        args = script.Args(num_minibatches=4, update_epochs=3, target_kl=target)
        metrics = learned(script, columns(script), args)
        assert len(calls) == 4 * passes
        assert metrics["policy/kl"].item() == pytest.approx(kl[passes - 1], rel=1e-3)
        assert metrics["policy/clipped"].item() == clipped[passes - 1]


def test_minibatches_take_every_row_once_and_normalise_their_advantages(ppo, monkeypatch):
    args = ppo.Args(num_minibatches=4, update_epochs=2)
    batch, seen = make_batch(ppo), []
    zero = {"log_ratio": torch.zeros(16)}
    monkeypatch.setattr(ppo, "update", lambda agent, minibatch, args: seen.append(minibatch) or dict(zero))
    ppo.learn(None, batch, args)
    assert len(seen) == 8
    for half in (seen[:4], seen[4:]):
        targets = torch.cat([minibatch.target for minibatch in half])
        assert torch.equal(targets.sort()[0], batch.target.sort()[0])
    for minibatch in seen:
        rows = [(batch.target == target).nonzero().item() for target in minibatch.target]
        advantage = batch.advantage[rows]
        assert torch.equal(minibatch.obs, batch.obs[rows])
        torch.testing.assert_close(minibatch.advantage, (advantage - advantage.mean()) / (advantage.std() + 1e-8))


@pytest.mark.parametrize("name", ["ppo", "ppo_dac"])
def test_every_pass_shuffles_anew(name, monkeypatch):
    script, seen = load(name), []
    zero = {"log_ratio": torch.zeros(16)}
    monkeypatch.setattr(script, "update", lambda agent, minibatch, *_: seen.append(minibatch.target) or dict(zero))
    batch = columns(script)
    learned(script, batch, script.Args(num_minibatches=4, update_epochs=2))
    orders = batch.target, torch.cat(seen[:4]), torch.cat(seen[4:])
    assert not any(torch.equal(orders[i], orders[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


# Moments


def test_moments_equal_those_of_all_data(ppo):
    moments, data = ppo.Moments(3), 5 + 3 * torch.randn(1000, 3)
    for part in data.split([1, 99, 400, 500]):
        moments.update(part)
    torch.testing.assert_close(moments.mean, data.double().mean(0))
    torch.testing.assert_close(moments.var, data.double().var(0, correction=0))
    expected = (data - data.mean(0)) / data.std(0, correction=0)
    torch.testing.assert_close(moments(data), expected, rtol=1e-4, atol=1e-4)
    assert moments(torch.full((1, 3), 1e6)).tolist() == [[10.0] * 3]
    other = ppo.Moments(3)
    other.load_state_dict(moments.state_dict())
    assert torch.equal(moments(data), other(data))


def test_run_saves_the_moments_of_what_it_saw_and_evaluation_leaves_them(ppo, tmp_path, monkeypatch):
    seen, prepare = [], ppo.prepare
    monkeypatch.setattr(
        ppo, "prepare", lambda agent, rollout, args: seen.append(rollout) or prepare(agent, rollout, args)
    )
    saved = run(ppo, tmp_path / "run", eval_every=80)
    obs = torch.cat([rollout.obs.flatten(0, 1) for rollout in seen]).double()
    torch.testing.assert_close(saved["actor.normalize.mean"], obs.mean(0))
    torch.testing.assert_close(saved["actor.normalize.var"], obs.var(0, correction=0))
    returns = torch.cat([rollout.discounted.flatten() for rollout in seen]).double()
    torch.testing.assert_close(saved["return_moments.var"], returns.var(correction=0))
    assert saved["actor.normalize.count"] == 240


# Vector environments


gym.register("PPOSingle-v0", "moe_envs.target_reaching:TargetReaching", max_episode_steps=15)
gym.register(
    "PPOVector-v0",
    "moe_envs.target_reaching:TargetReaching",
    vector_entry_point="moe_envs.target_reaching:TargetReachingVec",
    max_episode_steps=15,
)


def test_vectorised_single_and_asynchronous_environments_train_alike(ppo, tmp_path):
    """Random layouts and a short limit, so that seeds and truncation matter."""
    one = run(ppo, tmp_path / "vector", env_id="PPOVector-v0")
    two = run(ppo, tmp_path / "single", env_id="PPOSingle-v0")
    three = run(ppo, tmp_path / "async", env_id="PPOVector-v0", async_envs=True)
    for key in one:
        assert torch.equal(one[key], two[key]) and torch.equal(one[key], three[key]), key


class Killed(TwoSteps):
    """Where the seed has the parity of the environment variable KILLED, its process ends in the third step."""

    steps = 0

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.dies = seed % 2 == int(os.environ["KILLED"])
        return super().reset(seed=seed)

    def step(self, action):
        self.steps += 1
        if self.steps == 3 and self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


gym.register("PPOKilled-v0", Killed, max_episode_steps=10, disable_env_checker=True)
DYING = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest, pathlib, test_ppo
test_ppo.run(conftest.load("ppo"), pathlib.Path(sys.argv[2]), env_id="PPOKilled-v0", async_envs=True)
"""


gym.register("PPOWhole-v0", Strange, max_episode_steps=5, kwargs={"dtype": np.int64})
ADD = gym.wrappers.TransformReward.wrapper_spec(func=lambda reward: reward + 1000)
gym.register("PPOWrapped-v0", Strange, max_episode_steps=5, additional_wrappers=(ADD,))
gym.register(
    "PPOWrapsItself-v0", lambda: gym.wrappers.TransformReward(Strange(), lambda r: r + 1000), max_episode_steps=5
)


def test_whole_numbers_are_observed_alike_in_every_form(ppo, tmp_path):
    plain, others = (run(ppo, tmp_path / str(i), env_id="PPOWhole-v0", async_envs=bool(i)) for i in range(2))
    assert all(torch.equal(plain[key], others[key]) for key in plain)


@pytest.mark.parametrize("env_id", ["PPOWrapped-v0", "PPOWrapsItself-v0"])
def test_wrappers_of_the_registration_are_those_of_training_too(ppo, env_id):
    envs = ppo.make_envs(ppo.Args(env_id=env_id, num_envs=2))
    envs.reset(seed=1)
    assert envs.step(np.array([[0.5], [-0.5]], np.float32))[1].tolist() == [1001.0, 999.0]  # bounds are -2 and 2


@pytest.mark.parametrize("parity", "01")
def test_death_of_an_environments_process_ends_the_run(tmp_path, parity):
    """In a process of its own, which must end although every other environment's process lives and waits."""
    (tmp_path / "dying.py").write_text(DYING)
    job = Started(tmp_path / "dying.py", ALGOS.parent / "tests", tmp_path / "run", KILLED=parity)
    output = job.communicate()
    assert job.poll() == 1, output
    assert "--async-envs has ended; --resume" in output.splitlines()[-1] and "Traceback" not in output, output
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_checkpoints_are_ten_episodes_or_a_tenth_of_the_run_apart(ppo_script, tmp_path, capsys):
    """The shorter of the two, unless told otherwise: they end all episodes, and an interrupted run goes back to one."""
    cases = (None, 2, 10**7, 100_000), (None, 256, 10**7, 256 * 10 * 200), (None, 128, 400_000, 40_000), (80, 2, 99, 80)
    for wanted, number, total, expected in cases:
        args = ppo_script.Args("Pendulum-v1", total_timesteps=total, num_envs=number, checkpoint_every=wanted)
        args.run_dir = str(tmp_path / f"{number}-{total}")
        ppo_script.Run(args, None, agent=ppo_script.Agent(3, 1, args))
        assert (
            json.loads((tmp_path / f"{number}-{total}" / "run.json").read_text())["args"]["checkpoint_every"]
            == expected
        )
        assert f"a checkpoint every {expected} steps" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(("every", "evaluated"), [(80, [80, 160, 240, 320, 400]), (90, [160, 240, 320, 400])])
def test_the_last_three_evaluations_are_stochastic_too(ppo_script, tmp_path, every, evaluated):
    """Every one comes at the end of a rollout, here of 80 steps."""
    run(ppo_script, tmp_path / "run", total_timesteps=330, eval_every=every)
    rows = [line.split(",") for line in (tmp_path / "run" / "eval.csv").read_text().splitlines()[1:]]
    assert [int(step) for step, policy, *_ in rows if policy == "deterministic"] == evaluated
    assert [int(step) for step, policy, *_ in rows if policy == "stochastic"] == evaluated[-3:]


class Bounded(Strange):
    """Takes only actions of its space, whose bounds are not those of a scale about zero; counts who is not closed."""

    running = set()

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Box(-2, 1, (1,), np.float64)
        self.running.add(self)

    def step(self, action):
        assert self.action_space.contains(action), action.tolist()
        return super().step(action)

    def close(self):
        self.running.remove(self)


gym.register("PPOBounded-v0", Bounded, max_episode_steps=5)


def test_actions_at_the_bounds_are_within_them(ppo):
    """Scaled by 3 and shifted by 1, an action of 1 is 1.0000000000000002 but for the clipping."""
    args = ppo.Args(env_id="PPOBounded-v0", num_envs=2)
    for env in (ppo.Env(args), ppo.make_envs(args)):
        env.reset()
        for action in (-1.0, 1.0):
            _, reward, *_ = env.step(np.full(env.action_space.shape, action, np.float32))
            assert np.all(reward == (1 if action > 0 else -2))


def test_every_environment_is_closed(ppo_script, tmp_path):
    """After a run, after one that fails, and after an evaluation. None twice."""
    folder = tmp_path / "run"
    Bounded.running.clear()
    run(ppo_script, folder, env_id="PPOBounded-v0")
    assert not Bounded.running
    ppo_script.main(["--evaluate", str(folder)])
    assert not Bounded.running
    with pytest.raises(SystemExit):
        run(ppo_script, folder, env_id="PPOBounded-v0")  # the folder is taken
    assert not Bounded.running


def test_every_environment_has_its_own_seed(ppo):
    args = ppo.Args(env_id="PPOVector-v0", num_envs=4, num_steps=10)
    envs, starts = ppo.make_envs(args), []
    sampler = ppo.Sampler(envs, args)
    for step in (0, 40, 80):
        sampler.reset(step)
        starts += [tuple(obs) for obs in sampler.obs]
    assert len(set(starts)) == 12
    sampler.reset(40)
    assert [tuple(obs) for obs in sampler.obs] == starts[4:8]


# Data parallel


PARALLEL = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location(sys.argv[1], sys.argv[2] + "/" + sys.argv[1] + ".py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
agents, updates, agent = [], [], script.Agent
script.Agent = lambda *a: agents.append(agent(*a)) or agents[-1]
update = script.update

def checked_update(agent, batch, args, *mdp):
    assert len(batch.obs) == 10 // script.WORLD  # each process has its part of the minibatch
    assert script.average(torch.tensor(2.0 * script.RANK)) == script.WORLD - 1
    updates.append(1)
    return update(agent, batch, args, *mdp)

script.update = checked_update
script.main(["--env-id", "moe_envs:TargetReaching-v0?max_episode_steps=30", *"--total-timesteps 120 --num-envs 4"
    " --num-steps 10 --num-minibatches 4 --update-epochs 2 --eval-every 60 --eval-episodes 1 --checkpoint-every 80"
    " --target-kl 3e-6 --num-threads 1".split(), "--run-dir", sys.argv[3]])
# three rollouts of four updates per pass, some without a second pass, which ppo_dac.py has in the other MDP
assert len(updates) == 24 if sys.argv[1] == "ppo_dac" else 12 <= len(updates) < 24, updates
torch.save(agents[0].state_dict(), f"{sys.argv[3]}/agent{script.RANK}.pt")
"""


FAILING = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest, pathlib, test_ppo
script = conftest.load("ppo")
rollout = script.Sampler.rollout

def failing_rollout(sampler, agent):
    if script.RANK == 1:
        raise FloatingPointError("a reward is not finite")
    return rollout(sampler, agent)

script.Sampler.rollout = failing_rollout
test_ppo.run(script, pathlib.Path(sys.argv[2]))
"""


def rendezvous() -> dict[str, str]:
    """The part of torchrun's environment that two processes share."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": "2"}


def test_where_one_process_fails_each_says_so_in_a_line(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    command, address = [tmp_path / "failing.py", ALGOS.parent / "tests", tmp_path / "run"], rendezvous()
    jobs = [Started(*command, **address, RANK=i, LOCAL_RANK=i) for i in "01"]
    outputs = [job.communicate() for job in jobs]
    assert [job.poll() for job in jobs] == [1, 1]
    first, second = (output.splitlines()[-1] for output in outputs)
    assert first.startswith("ppo.py: a process has failed") and first.endswith(f"--resume {tmp_path / 'run'} goes on")
    assert second.startswith("ppo.py: stopped") and "a reward is not finite" in second and "start anew" in second
    assert "Traceback" not in "".join(outputs)
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("name", ["ppo", "ppo_dac", "ppo_gating", "ppo_mcp"])
def test_two_processes_equal_one(name, tmp_path):
    """Weights and moments are the same in both processes, and those of one process up to rounding."""
    (tmp_path / "parallel.py").write_text(PARALLEL)
    command, two, address = [tmp_path / "parallel.py", name, ALGOS], tmp_path / "two", rendezvous()
    jobs = [Started(*command, tmp_path / "one")]
    if name == "ppo":  # once by torchrun itself
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        assert subprocess.run([*launch, *command, two], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == 0
    else:
        jobs += [Started(*command, two, **address, RANK=i, LOCAL_RANK=i) for i in "01"]
    outputs = [job.communicate() for job in jobs]
    assert not any(job.poll() for job in jobs), outputs
    one, *both = (torch.load(tmp_path / f) for f in ("one/agent0.pt", "two/agent0.pt", "two/agent1.pt"))
    for key in one:
        assert torch.equal(both[0][key], both[1][key]), key
        torch.testing.assert_close(one[key], both[0][key], rtol=1e-3, atol=1e-5, msg=key)
    assert (tmp_path / "one" / "eval.csv").exists() and (two / "eval.csv").exists()

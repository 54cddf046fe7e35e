"""The mathematics of the SAC base: densities, critics, replay, values of probe problems."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.utils._python_dispatch import TorchDispatchMode


def make_batch(module, batch_size=16, obs_dim=3, action_dim=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(batch_size, d, generator=generator) for d in (obs_dim, action_dim, 1, obs_dim)]
    terminated = (torch.rand(batch_size, generator=generator) < 0.3).float()
    return module.Batch(noise[0], noise[1].tanh(), noise[2][:, 0], terminated, noise[3])


def test_tanh_gaussian_against_torch_distributions(sac):
    mean = torch.randn(64, 5, 3, dtype=torch.float64)
    log_std = torch.randn(64, 5, 3, dtype=torch.float64)
    torch.manual_seed(1)
    action, log_prob = sac.tanh_gaussian(mean, log_std)
    torch.manual_seed(1)
    u = mean + log_std.exp() * torch.randn_like(mean)
    expected = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    x = expected.transforms[0](u)
    torch.testing.assert_close(action, x)
    torch.testing.assert_close(log_prob, expected.log_prob(x).sum(-1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("u", [-1000.0, -30.0, -9.0, 0.0, 9.0, 30.0, 1000.0])
def test_tanh_gaussian_stays_exact_and_keeps_its_gradient_at_extreme_u(sac, u):
    mean = torch.full((1, 1), u, dtype=torch.float64, requires_grad=True)
    log_std = torch.full((1, 1), -20.0, dtype=torch.float64)  # u is the mean up to 1e-8
    torch.manual_seed(0)
    _, log_prob = sac.tanh_gaussian(mean, log_std)
    torch.manual_seed(0)
    noise = torch.randn_like(mean).item()
    log_cosh = abs(u) + math.log1p(math.exp(-2 * abs(u))) - math.log(2)  # log(1 - tanh(u)^2) = -2 log cosh(u)
    expected = -0.5 * noise**2 + 20 - 0.5 * math.log(2 * math.pi) + 2 * log_cosh
    assert log_prob.item() == pytest.approx(expected, abs=1e-6)
    (gradient,) = torch.autograd.grad(log_prob.sum(), mean)
    assert gradient.item() == pytest.approx(2 * math.tanh(u), abs=1e-6)  # the naive form gives 0 from |u| = 10 on


def test_critic_equals_two_plain_networks(sac):
    critic = sac.Critic(3, 2)
    obs, action = torch.randn(7, 3), torch.randn(7, 4, 2)
    for i in range(2):
        x = torch.cat([obs[:, None].expand(-1, 4, -1), action], -1)
        x = (x @ torch.cat([critic.w_obs[i], critic.w_action[i]]) + critic.b1[i]).relu()
        x = (x @ critic.w2[i] + critic.b2[i]).relu()
        expected = (x @ critic.w3[i] + critic.b3[i]).squeeze(-1)
        torch.testing.assert_close(critic(obs, action)[i], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(critic(obs, action[:, 1])[i], expected[:, 1], rtol=1e-4, atol=1e-5)


def test_update_equals_the_losses_written_out(sac):
    """Critic, actor and temperature losses of one update against the textbook form with torch.distributions."""
    args = sac.Args(gamma=0.9)
    agent = sac.Agent(3, 2, args)
    agent.log_alpha.data.fill_(-1.0)
    batch = make_batch(sac)
    before = {k: v.clone() for k, v in agent.state_dict().items()}

    def log_prob_of(obs):
        mean, log_std = agent.actor(obs)
        u = mean + log_std.exp() * torch.randn_like(mean)
        jacobian = torch.log(1 - u.double().tanh().square()).float()
        return u.tanh(), (Normal(mean, log_std.exp()).log_prob(u) - jacobian).sum(-1)

    torch.manual_seed(5)
    losses = sac.update(agent, batch, args)
    after = {k: v.clone() for k, v in agent.state_dict().items()}
    alpha = math.exp(-1.0)
    torch.manual_seed(5)
    with torch.no_grad():
        agent.load_state_dict(before)
        a, log_prob = log_prob_of(batch.next_obs)
        q1, q2 = agent.critic_target(batch.next_obs, a)
        y = batch.reward + 0.9 * (1 - batch.terminated) * (torch.min(q1, q2) - alpha * log_prob)
        q1, q2 = agent.critic(batch.obs, batch.action)
        critic_loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
        agent.critic.load_state_dict({k[7:]: v for k, v in after.items() if k.startswith("critic.")})
        a, log_prob = log_prob_of(batch.obs)
        q1, q2 = agent.critic(batch.obs, a)
        actor_loss = (alpha * log_prob - torch.min(q1, q2)).mean()
        alpha_loss = (1.0 * (log_prob - 2.0)).mean()  # -log_alpha (log pi + target), log_alpha = -1, target = -A = -2
    torch.testing.assert_close(losses["losses/critic"], critic_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses["losses/actor"], actor_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses["losses/alpha"], alpha_loss, rtol=1e-5, atol=1e-5)
    for key in before:
        if key.startswith("critic_target."):
            moved = torch.lerp(before[key], after[key.replace("_target", "")], 0.005)
            torch.testing.assert_close(after[key], moved, rtol=1e-6, atol=1e-7)


def test_target_critic_keeps_no_graph(sac_script):
    """Else every update would stay in memory."""
    agent = sac_script.Agent(3, 2, sac_script.Args())
    sac_script.update(agent, make_batch(sac_script), sac_script.Args())
    assert not any(p.requires_grad for p in agent.critic_target.parameters())


@pytest.mark.parametrize("entropy_too_low", [True, False])
def test_temperature_rises_while_the_entropy_is_too_low(sac_script, entropy_too_low):
    args = sac_script.Args(policy_lr=1e-9)
    agent = sac_script.Agent(3, 2, args)
    agent.actor.head.bias.data.view(2, -1)[1] = -8.0 if entropy_too_low else 0.0  # log standard deviations
    before = agent.log_alpha.item()
    sac_script.update(agent, make_batch(sac_script), args)
    assert (agent.log_alpha.item() > before) == entropy_too_low


def test_replay_gives_back_what_was_stored(sac):
    """Against a list of transitions, over several turns of the ring; every observation is unique."""
    rows, rng = 50, np.random.default_rng(0)
    buffer, stored, counter = sac.ReplayBuffer(rows, 1, 1, torch.device("cpu")), {}, 0
    for _ in range(60):
        length, truncated = rng.integers(1, 9), rng.random() < 0.5
        for t in range(length):
            done = t == length - 1
            obs, next_obs = np.float32([counter]), np.float32([counter + 1])
            terminated = bool(done and not truncated)
            buffer.add(obs, np.float32([counter / 7]), float(counter) * 2, terminated, next_obs, done)
            stored[counter] = terminated
            counter += 1
        counter += 1  # the episode's last observation
        batch = buffer.sample(400)
        seen = batch.obs[:, 0].long()
        assert {int(i) for i in seen} <= stored.keys()
        torch.testing.assert_close(batch.next_obs[:, 0], batch.obs[:, 0] + 1)
        torch.testing.assert_close(batch.action[:, 0], batch.obs[:, 0] / 7)
        torch.testing.assert_close(batch.reward, batch.obs[:, 0] * 2)
        assert [stored[int(i)] for i in seen] == batch.terminated.bool().tolist()
        if counter > 3 * rows:
            kept = sorted(stored)[-buffer.count :]
            assert buffer.count > 0.6 * rows and {int(i) for i in seen} == set(kept)  # uniform over the newest, no gap


def test_replay_state_survives_saving(sac):
    buffers = [sac.ReplayBuffer(20, 2, 1, torch.device("cpu")) for _ in range(2)]
    for i in range(33):
        buffers[0].add(np.float32([i, 0]), np.float32([i]), i, False, np.float32([i + 1, 0]), i % 7 == 6)
    buffers[1].load_state_dict(buffers[0].state_dict())
    for buffer in buffers:
        torch.manual_seed(0)
        buffer.add(np.float32([50, 0]), np.float32([50]), 50, True, np.float32([51, 0]), True)
    torch.manual_seed(0)
    first = buffers[0].sample(64)
    torch.manual_seed(0)
    for a, b in zip(first, buffers[1].sample(64), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("terminated", "value"), [(True, 1.0), (False, 2.0)])
def test_probe_value_of_a_terminal_and_of_a_truncated_transition(sac_script, terminated, value):
    """Reward 1 and the end: Q = 1. Cut by a time limit instead, it goes on: Q = 1 + gamma Q = 2 at gamma 0.5."""
    torch.manual_seed(0)
    args = sac_script.Args(gamma=0.5, tau=0.2, q_lr=3e-3)
    agent = sac_script.Agent(1, 1, args)
    agent.log_alpha.data.fill_(-20.0)  # no entropy bonus
    buffer = sac_script.ReplayBuffer(101, 1, 1, torch.device("cpu"))
    obs, actions = np.ones(1, np.float32), np.linspace(-1, 1, 50, dtype=np.float32)
    for action in actions:
        buffer.add(obs, action[None], 1.0, terminated, obs, True)
    for _ in range(250):
        sac_script.update(agent, buffer.sample(16), args)
    q = agent.critic(torch.ones(50, 1), torch.from_numpy(actions)[:, None])
    assert q.detach().numpy() == pytest.approx(value, abs=0.1)


class NoSynchronisation(TorchDispatchMode):
    """Raises where a number goes from the device to Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "update() waits for the device"
        return func(*args, **(kwargs or {}))


def test_update_does_not_synchronise(sac_script):
    args = sac_script.Args()
    agent = sac_script.Agent(3, 2, args)
    agent.critic_optimizer.step = agent.actor_optimizer.step = agent.alpha_optimizer.step = lambda: None  # not ours
    with NoSynchronisation():
        sac_script.update(agent, make_batch(sac_script), args)


class TwoSteps(gym.Env):
    """Observation = number of the step; ends after two steps, by termination or by its own truncation.

    As awkward as is allowed: one float32 array that it changes in place, NumPy booleans, an integer reward.
    """

    observation_space = gym.spaces.Box(-10, 10, (1,))
    action_space = gym.spaces.Box(-2, 2, (1,))

    def __init__(self, terminates=True):
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = np.zeros(1, np.float32)
        return self.t, {}

    def step(self, action):
        self.t += 1
        end = self.t[0] == 2
        return self.t, 1, end & self.terminates, end & (not self.terminates), {}


@pytest.mark.parametrize("terminates", [True, False])
def test_loop_stores_terminated_and_the_last_observation(sac_script, terminates, tmp_path):
    env_id = f"TwoSteps{sac_script.SCRIPT.replace('_', '')}{terminates}-v0"
    gym.register(env_id, TwoSteps, max_episode_steps=10, kwargs={"terminates": terminates})
    args = sac_script.Args(env_id=env_id, total_timesteps=40, learning_starts=30, batch_size=8, buffer_size=1000)
    sac_script.main(sac_script.dataclasses.replace(args, run_dir=str(tmp_path / "run"), eval_episodes=1))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["buffer"]
    assert saved["count"] == 40
    rows = saved["starts"][: saved["count"]]
    assert saved["obs"][rows, 0].tolist() == [0.0, 1.0] * 20
    assert saved["obs"][rows + 1, 0].tolist() == [1.0, 2.0] * 20
    assert saved["terminated"][rows].tolist() == [0.0, float(terminates)] * 20
    sac_script.main(sac_script.Args(resume=str(tmp_path / "run"), total_timesteps=50))
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["buffer"]["count"] == 50

"""How fast the scripts are, as ratios to the same algorithms written the plain way, on CPU.

    python results/speed.py [--threads 1 2] [--precisions highest medium] [--train-steps 1500]
    python results/speed.py --rivals     # instead: one gradient step of SAC's rivals of PMOE, as ratio to sac.py's
    python results/speed.py --ppo        # instead: PPO against stable-baselines3's
    python results/speed.py --ppo-rivals # instead: PPO's rivals of PMOE against ppo.py
    python results/speed.py --minatar    # instead: whole training on MinAtar with and without experts
    python results/speed.py --pqn        # instead: whole training of PQN with and without experts
    python results/speed.py --gpu        # instead: every script on GPU and CPU

One gradient step on a synthetic batch, and whole training on HalfCheetah-v5 (environment, replay, action and update).
The plain SAC has two separate critics with an Adam each, weight gradients in the actor's step that nobody uses, a
temperature read to the host at each step and a target updated tensor by tensor; the plain PMOE sends all K actions
through both critics with gradients. Times drift on shared machines, so the two forms alternate, round by round, and the
ratio of each pair is what counts: the median over the rounds is printed.

--ppo times whole training on HalfCheetah-v5: one iteration (2,048 steps and 320 updates) of ppo.py, of ppo_pmoe.py
with K = 8 and of stable-baselines3's PPO in turn: the same network, environments, minibatches and passes. Ours also
normalises observations and rewards, theirs does so in VecNormalize: a row with it and one without. It also says where
the time goes. With one thread --ppo, --minatar and --pqn count the process's own time, so that others on the machine
matter less; so does --rivals.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import statistics
import tempfile
import time

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from policy import load_script
from torch.distributions import Categorical, Normal

CASES = {  # name: (script, observation size, action dimensions, K)
    "SAC, HalfCheetah's size": ("sac", 17, 6, 1),
    "PMOE K=4, HalfCheetah's size": ("sac_pmoe", 17, 6, 4),
    "PMOE K=10, Humanoid's size": ("sac_pmoe", 348, 17, 10),
}
RIVALS = {  # name: (script, flags), all at HalfCheetah's size
    "sac_gating.py": ("sac_gating", {}),
    "sac_mcp.py": ("sac_mcp", {}),
    "sac_pmoe.py": ("sac_pmoe", {}),
    "sac_gmm.py, marginal": ("sac_gmm", {}),
    "sac_gmm.py, score": ("sac_gmm", {"gradient": "score"}),
    "sac_gmm.py, gumbel": ("sac_gmm", {"gradient": "gumbel"}),
}
BATCH = 256


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs))


class Plain:
    """SAC (K = 1) or SAC-PMOE as it is usually written."""

    def __init__(self, obs_dim: int, action_dim: int, num_experts: int):
        self.shape = num_experts, action_dim
        self.trunk = mlp(obs_dim, 256)[:4]
        self.mean, self.log_std = (nn.Linear(256, num_experts * action_dim) for _ in range(2))
        self.gate = nn.Linear(256, num_experts)
        self.actor = nn.ModuleList([self.trunk, self.mean, self.log_std, self.gate])
        self.critics, self.targets = ([mlp(obs_dim + action_dim, 1) for _ in range(2)] for _ in range(2))
        self.log_alpha = torch.zeros(1, requires_grad=True)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.critic_optimizers = [torch.optim.Adam(critic.parameters(), lr=3e-4) for critic in self.critics]
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=3e-4)

    def sample(self, obs):
        """All K actions (B, K, A), their log-probabilities (B, K) and the gate's weights (B, K)."""
        h = self.trunk(obs)
        mean, log_std = (head(h).view(-1, *self.shape) for head in (self.mean, self.log_std))
        normal = Normal(mean, log_std.clamp(-20, 2).exp())
        u = normal.rsample()
        log_prob = (normal.log_prob(u) - torch.log(1 - u.tanh().pow(2) + 1e-6)).sum(-1)
        return u.tanh(), log_prob, self.gate(h.detach()).softmax(-1)

    @staticmethod
    def min_q(networks, obs, action):
        x = torch.cat([obs, action], -1)
        return torch.min(*(network(x).squeeze(-1) for network in networks))

    def act(self, obs):
        with torch.no_grad():
            action, _, w = self.sample(obs)
            return action[0, Categorical(w[0]).sample()].numpy()

    def update(self, batch):
        num_experts, action_dim = self.shape
        alpha = self.log_alpha.exp().item()
        rows = torch.arange(len(batch.obs))
        with torch.no_grad():
            action, log_prob, w = self.sample(batch.next_obs)
            k = Categorical(w).sample()
            value = self.min_q(self.targets, batch.next_obs, action[rows, k]) - alpha * log_prob[rows, k]
            target = batch.reward + 0.99 * (1 - batch.terminated) * value
        for critic, optimizer in zip(self.critics, self.critic_optimizers, strict=True):
            loss = F.mse_loss(critic(torch.cat([batch.obs, batch.action], -1)).squeeze(-1), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        action, log_prob, w = self.sample(batch.obs)
        q = self.min_q(self.critics, batch.obs[:, None].expand(-1, num_experts, -1), action)  # (B, K)
        best_q, best = q.max(1)
        loss = (alpha * log_prob[rows, best] - best_q).mean()
        if num_experts > 1:
            loss = loss + F.mse_loss(w, F.one_hot(best, num_experts).float())
        self.actor_optimizer.zero_grad()
        loss.backward()
        self.actor_optimizer.step()
        alpha_loss = -(self.log_alpha * (log_prob[rows, best].detach() - action_dim)).mean()
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        for critic, copy in zip(self.critics, self.targets, strict=True):
            for p, q in zip(critic.parameters(), copy.parameters(), strict=True):
                q.data.copy_(0.005 * p.data + 0.995 * q.data)


def synthetic_batch(module, obs_dim: int, action_dim: int):
    noise = torch.randn(3, BATCH, obs_dim)
    return module.Batch(noise[0], torch.rand(BATCH, action_dim) * 2 - 1, noise[2, :, 0], torch.zeros(BATCH), noise[1])


def ours_and_plain(case):
    """Two functions that each do one gradient step."""
    name, obs_dim, action_dim, num_experts = case
    module = load_script(name)
    args = module.Args(**({"num_experts": num_experts} if num_experts > 1 else {}))
    agent, plain = module.Agent(obs_dim, action_dim, args), Plain(obs_dim, action_dim, num_experts)
    batch = synthetic_batch(module, obs_dim, action_dim)
    return lambda: module.update(agent, batch, args), lambda: plain.update(batch)


def seconds(function, steps: int, clock=time.perf_counter) -> float:
    """Seconds per call."""
    start = clock()
    for _ in range(steps):
        function()
    return (clock() - start) / steps


def training(case, plain: bool):
    """A function that does one step of training on HalfCheetah-v5."""
    name, obs_dim, action_dim, num_experts = case
    module = load_script(name)
    args = module.Args(**({"num_experts": num_experts} if num_experts > 1 else {}))
    env = module.Env(dataclasses.replace(args, env_id="HalfCheetah-v5"))
    state = {"obs": env.obs}
    if plain:
        agent, arrays = Plain(obs_dim, action_dim, num_experts), []
        for width in (obs_dim, action_dim, 0, 0, obs_dim):
            arrays.append(np.zeros((1_000_000, width) if width else 1_000_000, np.float32))
        count = [0]
    else:
        agent = module.Agent(obs_dim, action_dim, args)
        buffer = module.ReplayBuffer(1_000_000, obs_dim, action_dim, "cpu")

    def step(update=True):
        obs = state["obs"]
        if plain:
            action = agent.act(torch.as_tensor(obs)[None])
        else:
            action = agent.act(obs)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        if plain:
            for array, value in zip(arrays, (obs, action, reward, terminated, next_obs), strict=True):
                array[count[0]] = value
            count[0] += 1
        else:
            buffer.add(obs, action, reward, terminated, next_obs)
        state["obs"] = env.reset()[0] if terminated or truncated else next_obs
        if update and plain:
            rows = np.random.randint(count[0], size=BATCH)
            agent.update(module.Batch(*(torch.as_tensor(array[rows]) for array in arrays)))
        elif update:
            module.update(agent, buffer.sample(BATCH), args)

    for _ in range(300):
        step(update=False)
    return step


def clock_of(threads: int):
    return time.process_time if threads == 1 else time.perf_counter


def rivals(threads: list[int], rounds: int):
    """One gradient step on a synthetic batch, of each script in turn with sac.py's."""
    print("| gradient step, K = 4 | threads | ms | time, its / sac.py's |\n|---|---|---|---|")
    for number in threads:
        torch.set_num_threads(number)
        clock, steps = clock_of(number), {}
        for name, (script, changes) in {"sac.py": ("sac", {}), **RIVALS}.items():
            module = load_script(script)
            args = module.Args(**changes)
            parts = module.Agent(17, 6, args), synthetic_batch(module, 17, 6), args
            steps[name] = functools.partial(module.update, *parts)
        times = {name: [] for name in steps}
        for i in range(rounds + 1):  # the first round warms up
            for name, step in steps.items():
                time_of_step = seconds(step, 25, clock)
                times[name] += [time_of_step] if i else []
        for name, row in times.items():
            ratio = statistics.median(mine / base for mine, base in zip(row, times["sac.py"], strict=True))
            print(f"| {name} | {number} | {1e3 * statistics.median(row):.1f} | {ratio:.2f} |", flush=True)


def ppo_iteration(name: str, clock, **changes):
    """A function that does one iteration of a script and returns the seconds of its (rollout, learning)."""
    module = load_script(name)
    args = module.Args(env_id="HalfCheetah-v5", **changes)
    agent, sampler = module.Agent(17, 6, args), module.Sampler(module.make_envs(args), args)
    sampler.reset(0)

    def iteration():
        start = clock()
        rollout, _ = sampler.rollout(agent)
        middle = clock()
        module.learn(agent, module.prepare(agent, rollout, args), args)
        return middle - start, clock() - middle

    return iteration


def sb3_iteration(clock, normalise: bool = False):
    """The same of stable-baselines3: its train() is the learning, the rest of learn() the rollout."""
    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.vec_env import VecNormalize
    except ImportError:
        raise SystemExit("--ppo: compares with stable-baselines3; pip install stable-baselines3") from None
    envs = make_vec_env("HalfCheetah-v5", 8)
    envs = VecNormalize(envs) if normalise else envs
    model = PPO("MlpPolicy", envs, n_steps=256, batch_size=64, n_epochs=10, ent_coef=0.0, device="cpu")
    train, learning = model.train, []

    def timed_train():
        start = clock()
        train()
        learning.append(clock() - start)

    model.train = timed_train

    def iteration():
        start = clock()
        model.learn(2048, reset_num_timesteps=False)
        return clock() - start - learning[-1], learning[-1]

    return iteration


def physics_iteration(clock):
    """2,048 steps of the bare environments, with random actions: what no implementation can do without."""
    envs = [gym.make("HalfCheetah-v5").unwrapped for _ in range(8)]
    for i, env in enumerate(envs):
        env.reset(seed=i)
    actions = np.random.default_rng(0).uniform(-1, 1, (256, 8, 6))

    def iteration():
        start = clock()
        for row in actions:
            for env, action in zip(envs, row, strict=True):
                env.step(action)
        return clock() - start, 0.0

    return iteration


def ppo_speed(threads: list[int], rounds: int):
    print("| PPO on HalfCheetah-v5 | threads | steps/s | rollout, s | learning, s | times as fast as SB3 |")
    print("|---|---|---|---|---|---|")
    for count in threads:
        torch.set_num_threads(count)
        clock = clock_of(count)
        forms = {
            "stable-baselines3": sb3_iteration(clock),
            "stable-baselines3 with VecNormalize": sb3_iteration(clock, normalise=True),
            "ppo.py": ppo_iteration("ppo", clock),
            "ppo_pmoe.py, K = 8": ppo_iteration("ppo_pmoe", clock, num_experts=8),
            "physics alone": physics_iteration(clock),
        }
        times = {name: [] for name in forms}
        for i in range(rounds + 1):  # the first round warms up
            for name, iteration in forms.items():
                pair = iteration()
                times[name] += [pair] if i else []
        theirs = [sum(pair) for pair in times["stable-baselines3"]]
        for name, pairs in times.items():
            rollout, learning = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(other / sum(pair) for other, pair in zip(theirs, pairs, strict=True))
            speed = 2048 / statistics.median(map(sum, pairs))
            print(f"| {name} | {count} | {speed:.0f} | {rollout:.2f} | {learning:.2f} | {ratio:.2f} |", flush=True)


PPO_RIVALS = {"ppo.py": "ppo", "ppo_gating.py": "ppo_gating", "ppo_mcp.py": "ppo_mcp", "ppo_dac.py": "ppo_dac"}


def ppo_rivals(threads: list[int], rounds: int):
    """One iteration on HalfCheetah-v5 (2,048 steps and 320 updates) of each script in turn with ppo.py's."""
    print("| PPO on HalfCheetah-v5 | threads | rollout, s | learning, s | rollout / ppo.py's | learning / ppo.py's |")
    print("|---|---|---|---|---|---|")
    for count in threads:
        torch.set_num_threads(count)
        forms = {name: ppo_iteration(script, clock_of(count)) for name, script in PPO_RIVALS.items()}
        times = {name: [] for name in forms}
        for i in range(rounds + 1):  # the first round warms up
            for name, iteration in forms.items():
                pair = iteration()
                times[name] += [pair] if i else []
        for name, pairs in times.items():
            seconds_of = " | ".join(f"{statistics.median(column):.2f}" for column in zip(*pairs, strict=True))
            ratios = [np.divide(mine, base) for mine, base in zip(pairs, times["ppo.py"], strict=True)]
            ratios = " | ".join(f"{statistics.median(column):.2f}" for column in zip(*ratios, strict=True))
            print(f"| {name} | {count} | {seconds_of} | {ratios} |", flush=True)


def minatar(threads: list[int], rounds: int):
    """Whole training on three MinAtar games, baseline and mixtures in turn, and the share of each part.

    The games are one Python process and cannot be faster than stepping them alone, which is the floor.
    """
    print("| MinAtar | threads | steps/s | baseline's / its | games | acting | values | learning |")
    print("|---|---|---|---|---|---|---|---|")
    module = load_script("ppo_moe_multitask")
    forms = {  # architecture, and the mixture
        "baseline": ("baseline", {}),
        "Soft MoE, middle, n = 8, p = 1": ("middle", {}),
        "Soft MoE, middle, n = 8, p = 8": ("middle", {"slots": 0}),
        "baseline, shared channels": ("baseline", {"channels": "shared"}),
        "Soft MoE, big, n = 3": ("big", {"num_experts": 3}),
        "Soft MoE, big, n = 3, shared channels": ("big", {"num_experts": 3, "channels": "shared"}),
        "top-1, big, n = 3": ("big", {"num_experts": 3, "router": "topk"}),
        "top-1, big, n = 8": ("big", {"router": "topk"}),
        "top-1, middle, per sample, n = 8": ("middle", {"router": "topk", "tokens": "persamp"}),
    }
    for number in threads:
        torch.set_num_threads(number)
        clock = clock_of(number)
        times = {name: [] for name in forms}
        for i in range(rounds + 1):  # the first round warms up
            for name, (architecture, mixture) in forms.items():
                args = module.Args(actor_moe=architecture, critic_moe=architecture, **mixture)
                torch.manual_seed(0)
                agent = module.Agent(args)
                games = module.Games([args.tasks[j % 3] for j in range(args.num_envs)], args)
                spent, play = [0.0], games.play

                def timed_play(j, action, play=play, spent=spent, clock=clock):
                    start = clock()
                    result = play(j, action)
                    spent[0] += clock() - start
                    return result

                games.play = timed_play
                start = clock()
                batch, _ = module.rollout(agent, games, args.num_steps, args)
                middle = clock()
                module.learn(agent, batch, args)
                end = clock()
                inputs = zip(batch.obs.split(args.num_envs), batch.task.split(args.num_envs), strict=True)
                values_start = clock()
                with torch.no_grad():
                    for x in inputs:
                        agent.value(*x)
                values = clock() - values_start
                rest = middle - start - spent[0] - values
                times[name] += [(end - start, spent[0], rest, values, end - middle)] if i else []
        for name, rows in times.items():
            total, *parts = (statistics.median(column) for column in zip(*rows, strict=True))
            ratio = statistics.median(b[0] / a[0] for a, b in zip(times["baseline"], rows, strict=True))
            shares = " | ".join(f"{part / total:.0%}" for part in parts)
            print(f"| {name} | {number} | {len(batch.obs) / total:.0f} | {ratio:.2f} | {shares} |", flush=True)
    for task in module.CHANNELS:
        args = module.Args(tasks=(task,))
        games, rng = module.Games([task] * 8, args), np.random.default_rng(0)
        start = time.process_time()
        for _ in range(500):
            games.step(rng.integers(6, size=8).tolist())
        print(f"{task} alone: {4000 / (time.process_time() - start):.0f} steps/s with random actions")


def pqn(threads: list[int], rounds: int):
    """Whole training on MinAtar's Asterix: one rollout of 4,096 steps and its 64 updates, of all forms in turn."""
    print("| PQN on Asterix | parameters | threads | steps/s | pqn.py's time / its | rollout, s | learning, s |")
    print("|---|---|---|---|---|---|---|")
    forms = {  # script and what differs from its defaults
        "pqn.py": ("pqn", {}),
        "widened x4": ("pqn_moe", {"moe": "wide", "widen": 4}),
        "widened x8": ("pqn_moe", {"moe": "wide", "widen": 8}),
        "Soft MoE, n = 1": ("pqn_moe", {"num_experts": 1}),
        "Soft MoE, n = 4": ("pqn_moe", {"num_experts": 4}),
        "Soft MoE, n = 8": ("pqn_moe", {"num_experts": 8}),
        "tokens, one MLP for all": ("pqn_moe", {"moe": "tokens"}),
        "top-1 of 4": ("pqn_moe", {"moe": "topk"}),
    }
    for number in threads:
        torch.set_num_threads(number)
        clock, agents, times = clock_of(number), {}, {name: [] for name in forms}
        for name, (script, changes) in forms.items():
            module = load_script(script)
            args = module.Args(**changes)
            games = module.Games(args, args.num_envs)
            agents[name] = module, args, games, module.Agent(games.obs.shape[-1], len(games.actions), args)
        for i in range(rounds + 1):  # the first round warms up
            for name, (module, args, games, agent) in agents.items():
                start = clock()
                batch, _ = module.rollout(agent, games, args.epsilon, args)
                middle = clock()
                module.learn(agent, batch, args)
                times[name] += [(middle - start, clock() - middle)] if i else []
        for name, pairs in times.items():
            rollout, learning = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(sum(a) / sum(b) for a, b in zip(times["pqn.py"], pairs, strict=True))
            speed = 4096 / statistics.median(map(sum, pairs))
            count = sum(x.numel() for x in agents[name][3].parameters())
            row = f"{name} | {count:,} | {number} | {speed:.0f} | {ratio:.2f} | {rollout:.2f} | {learning:.2f}"
            print(f"| {row} |", flush=True)


SAC_FLAGS = "--env-id HalfCheetah-v5 --learning-starts 500"
GPU = {  # script -> flags; every script with its usual sizes
    "sac": SAC_FLAGS,
    "sac_pmoe": SAC_FLAGS,
    "sac_gating": SAC_FLAGS,
    "sac_mcp": SAC_FLAGS,
    "sac_gmm": SAC_FLAGS,
    "sac_moe_multitask": "--learning-starts 60",
    "ppo": "--env-id HalfCheetah-v5",
    "ppo_pmoe": "--env-id HalfCheetah-v5",
    "ppo_gating": "--env-id HalfCheetah-v5",
    "ppo_mcp": "--env-id HalfCheetah-v5",
    "ppo_dac": "--env-id HalfCheetah-v5",
    "ppo_moe_multitask": "",
    "pqn": "",
    "pqn_moe": "",
}


def whole_run(script: str, device: str, flags: str, steps: int) -> float:
    """Seconds that a whole run of so many steps takes, its one evaluation included."""
    module = load_script(script)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        short = f"{flags} --total-timesteps {steps} --eval-every 1000000000 --eval-episodes 1 --num-threads 1"
        run = module.main([*short.split(), "--device", *device.split(), "--run-dir", f"{folder}/run"])
        return json.loads((run / "run.json").read_text())["wall_time"]


def gpu(scripts: list[str]):
    """Steps per second of every script on GPU and CPU: two runs of different length, the first to warm up."""
    if not torch.cuda.is_available():
        raise SystemExit("--gpu: this machine has no GPU that PyTorch can use")
    print(torch.cuda.get_device_name())
    print("| script | GPU, steps/s | with --cuda-graph | one CPU core | GPU / CPU | with --cuda-graph / CPU |")
    print("|---|---|---|---|---|---|")
    for script in scripts or GPU:
        short, long = (1000, 3000) if script.startswith("sac") else (8192, 24576)
        if "moe_multitask" in script and script.startswith("ppo") or script.startswith("pqn"):
            short, long = 2 * 8064, 6 * 8064
        speeds = []
        for device in ("cuda", "cuda --cuda-graph", "cpu"):
            if "graph" in device and script not in ("sac", "sac_pmoe"):
                speeds.append(float("nan"))
                continue
            first = whole_run(script, device, GPU[script], short)
            speeds.append((long - short) / (whole_run(script, device, GPU[script], long) - first))
        row = [f"{speed:.0f}" for speed in speeds] + [f"{speed / speeds[2]:.2f}" for speed in speeds[:2]]
        print(f"| {script}.py | {' | '.join(row).replace('nan', '')} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precisions", nargs="+", default=["highest", "medium"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--train-steps", type=int, default=900, help="0 leaves the whole training out")
    parser.add_argument("--rivals", action="store_true", help="only the gradient step of SAC's rivals of PMOE")
    parser.add_argument("--ppo", action="store_true", help="PPO against stable-baselines3's, and nothing else")
    parser.add_argument("--ppo-rivals", action="store_true", help="PPO's rivals of PMOE against ppo.py")
    parser.add_argument("--minatar", action="store_true", help="only the whole training on MinAtar")
    parser.add_argument("--pqn", action="store_true", help="only the whole training of PQN")
    parser.add_argument("--gpu", action="store_true", help="steps per second of every script on GPU and CPU")
    parser.add_argument("--scripts", nargs="+", choices=GPU, default=[], help="with --gpu: only these")
    args = parser.parse_args()
    if args.pqn:
        return pqn(args.threads, args.rounds)
    if args.gpu:
        return gpu(args.scripts)
    torch.set_flush_denormal(True)  # for both forms: the plain one would be slower still without it
    torch.empty(8_000_000)  # likewise; the scripts say why
    if args.rivals:
        return rivals(args.threads, args.rounds)
    if args.ppo:
        return ppo_speed(args.threads, args.rounds)
    if args.ppo_rivals:
        return ppo_rivals(args.threads, args.rounds)
    if args.minatar:
        return minatar(args.threads, args.rounds)
    print("| gradient step | threads | matmul | ours, ms | plain, ms | ours / plain |\n|---|---|---|---|---|---|")
    for name, case in CASES.items():
        for threads in args.threads:
            torch.set_num_threads(threads)
            for precision in args.precisions:
                ours, plain = ours_and_plain(case)
                pairs = []
                for i in range(args.rounds + 1):  # the first round warms up
                    torch.set_float32_matmul_precision(precision)
                    mine = seconds(ours, 25)
                    torch.set_float32_matmul_precision("highest")  # the plain form is always full float32
                    pairs += [(mine, seconds(plain, 25))] if i else []
                mine, theirs = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
                ratio = statistics.median(a / b for a, b in pairs)
                print(f"| {name} | {threads} | {precision} | {mine:.1f} | {theirs:.1f} | {ratio:.2f} |", flush=True)
    torch.set_float32_matmul_precision("highest")
    if not args.train_steps:
        return
    print("\n| whole training | threads | ours, steps/s | plain, steps/s | time, ours / plain |\n|---|---|---|---|---|")
    for name, case in list(CASES.items())[:2]:
        for threads in args.threads:
            torch.set_num_threads(threads)
            ours, plain = training(case, False), training(case, True)
            pairs = [(seconds(ours, args.train_steps // 9), seconds(plain, args.train_steps // 9)) for _ in range(9)]
            mine, theirs = (1 / statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            print(f"| {name} | {threads} | {mine:.0f} | {theirs:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()

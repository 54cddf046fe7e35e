"""Soft actor-critic (SAC) with twin critics and a learned temperature: the base of the mixture scripts.

Paper   Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905.
Policy  a = tanh(u), u ~ N(mu(s), sigma(s)^2), log pi(a|s) = sum_d [log N(u_d; mu_d, sigma_d^2) - log(1 - tanh(u_d)^2)].

Run       python algos/sac.py                                 # target-reaching
          python algos/sac.py --env-id HalfCheetah-v5 --total-timesteps 1000000 --learning-starts 5000 --alpha-init 1
Resume    python algos/sac.py --resume runs/NAME              # after Ctrl-C, kill -9 or a crash: the same bits
Evaluate  python algos/sac.py --evaluate runs/NAME --video    # deterministic and stochastic return, a GIF

Where this differs from the paper:
1. Actions live in [-1, 1] (RescaleAction), so no action scale enters log pi; tanh's correction is in its stable form.
2. Both critics are one batched network; in the actor's step their weights get no gradient. Same result, less work.
3. Every episode is reset with its own seed, made from the run's seed and the episode's number. A checkpoint then needs
   no simulator state: resume replays the actions of the running episode and checks that it observes the same bits.
4. The temperature starts at --alpha-init 0.1, not 1 (Stable-Baselines3 offers this as ent_coef="auto_0.1"). At 1 the
   entropy of all steps to come is worth up to 2 log 2 / (1 - gamma) = 139 on the default task, which has two action
   dimensions: more than the 100 for reaching the target.
5. It begins with 10,000 random steps without an update, not 1,000, because the default task's target is rarely met.
The default task, from the PMOE paper, is made easier: obstacles cost 10, not 100; the bonus for speed is 0.3, not 0.1.
Letters in the shape comments: B batch, O observation size, A action dimensions, H hidden units.
"""

# === shared: imports ===
import ast
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# === end shared ===


@dataclasses.dataclass
class Args:
    # === shared: run arguments ===
    env_id: str = "moe_envs:TargetReaching-v0?layout=fixed&obstacle_penalty=-10&speed_bonus=0.3"  # id?arguments
    seed: int = 1  # seed of everything random
    total_timesteps: int | None = None  # environment steps (default: 40,000; with --resume those of that run)
    run_dir: str | None = None  # folder of this run (default: runs/<env>__<script>__s<seed>__<time>)
    resume: str | None = None  # folder of a run to continue from its last checkpoint
    evaluate: str | None = None  # folder of a run to evaluate instead of training
    video: bool = False  # with --evaluate: also write video.gif into the run folder
    eval_every: int = 5_000  # steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation; --evaluate does not take them from the run
    checkpoint_every: int = 10_000  # steps between checkpoints
    device: str = "cpu"  # cpu, cuda or cuda:N
    num_threads: int = 2  # CPU threads of PyTorch; 1 where another run needs the other core
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # torch.set_float32_matmul_precision
    # === end shared ===
    # === shared: sac arguments ===
    learning_starts: int = 10_000  # uniformly random steps before the first update
    buffer_size: int = 1_000_000  # rows of replay: a transition takes one, the end of an episode another
    update_every: int = 1  # environment steps per update
    batch_size: int = 256  # transitions per update
    gamma: float = 0.99  # discount
    tau: float = 0.005  # share of the critic that its target takes over per update
    policy_lr: float = 3e-4  # Adam's step size for the actor
    q_lr: float = 3e-4  # Adam's step size for the critics and the temperature
    alpha_init: float = 0.1  # temperature at the start; why, says sac.py's docstring
    # === end shared ===


# === shared: environment ===
def fail(message: str):
    """One line on stderr and exit code 2: the run cannot start."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """`id?key=value&key=value` -> environment with a flat Box observation and actions in [-1, 1]^A.

    When an episode ends, info["episode"] has its return "r" and its length "l".
    """
    name, _, query = env_id.partition("?")
    try:
        kwargs = {key: value for key, _, value in (pair.partition("=") for pair in query.split("&") if pair)}
        for key, value in kwargs.items():
            try:
                kwargs[key] = ast.literal_eval(value)  # numbers, booleans, tuples
            except (ValueError, SyntaxError):
                pass  # a plain word stays a string
        env = gym.make(name, **kwargs, **({"render_mode": render_mode} if render_mode else {}))
        env.unwrapped.action_space.seed(0)
        env.unwrapped.reset(seed=0)
        env.unwrapped.step(env.unwrapped.action_space.sample())  # an argument of a wrong kind may show only now
    except Exception as error:  # whatever the environment's own code raises
        hint = "give an id of gymnasium.pprint_registry(), with arguments as id?name=value&name=value"
        if isinstance(error, ImportError):
            hint = "install it (moe_envs: pip install -e . in the repository)"
        fail(f"--env-id {env_id}: {(str(error).strip() or type(error).__name__).splitlines()[0]}; {hint}")
    for role, space in (("action", env.action_space), ("observation", env.observation_space)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            fail(f"--env-id {env_id}: needs a flat Box {role} space such as Pendulum-v1's, this one has {space}")
    if (env.spec.max_episode_steps or -1) < 0:
        fail(f"--env-id {env_id}: has no time limit, an evaluation may never end; give {name}?max_episode_steps=1000")
    if not np.issubdtype(env.action_space.dtype, np.floating):
        fail(f"--env-id {env_id}: needs real-valued actions such as Pendulum-v1's, this one has {env.action_space}")
    if not np.isfinite([env.action_space.low, env.action_space.high]).all():
        fail(f"--env-id {env_id}: action bounds must be finite to be rescaled to [-1, 1], they are {env.action_space}")
    one = env.action_space.dtype.type(1)
    return gym.wrappers.RescaleAction(gym.wrappers.RecordEpisodeStatistics(env), -one, one)


def episode_seed(seed: int, episode: int, evaluation: bool = False) -> int:
    """Seed of one episode, below 2^32; training seeds lie in the lower half, evaluation seeds in the upper."""
    return (2**31 if evaluation else 0) + (seed * 100_003 + episode) % 2**31


# === end shared ===
# === shared: replay ===
class Batch(NamedTuple):
    obs: torch.Tensor  # (B, O)
    action: torch.Tensor  # (B, A)
    reward: torch.Tensor  # (B,)
    terminated: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, O)


class ReplayBuffer:
    """Ring of rows on the training device: obs_i, action_i, reward_i, terminated_i; next_obs_i is obs_{i+1}.

    So each observation is stored once. The last observation of an episode takes a row that starts no transition:
    `starts`, a ring on the CPU, lists the rows that do, oldest first. One row takes 4 (O + A + 2) + 8 bytes.
    """

    def __init__(self, rows: int, obs_dim: int, action_dim: int, device: torch.device):
        self.obs = torch.zeros(rows, obs_dim, device=device)
        self.action = torch.zeros(rows, action_dim, device=device)
        self.reward = torch.zeros(rows, device=device)
        self.terminated = torch.zeros(rows, device=device)
        self.starts = torch.zeros(rows, dtype=torch.int64)
        self.row = self.first = self.count = self.filled = 0

    def add(self, obs, action, reward, terminated, next_obs, done):
        """Stores one transition of NumPy arrays and Python numbers, dropping the oldest where the ring is full."""
        rows, row = len(self.obs), self.row
        next_row = (row + 1) % rows
        while self.count and int(self.starts[self.first]) in (row, next_row):  # its rows are about to be overwritten
            self.first, self.count = (self.first + 1) % rows, self.count - 1
        self.obs[row] = torch.from_numpy(obs)
        self.action[row] = torch.from_numpy(action)
        self.reward[row], self.terminated[row] = reward, terminated
        self.obs[next_row] = torch.from_numpy(next_obs)
        self.starts[(self.first + self.count) % rows] = row
        self.count += 1
        self.filled = min(max(self.filled, row + 2), rows)
        self.row = (row + 1 + done) % rows

    def sample(self, batch_size: int) -> Batch:
        """Uniform over the stored transitions, with replacement."""
        rows = self.starts[(self.first + torch.randint(self.count, (batch_size,))) % len(self.obs)].to(self.obs.device)
        data = (x[rows] for x in (self.obs, self.action, self.reward, self.terminated))
        return Batch(*data, self.obs[(rows + 1) % len(self.obs)])

    def state_dict(self) -> dict:
        """The rows in use, as copies where a view would drag the empty rows into the file."""
        full = self.filled == len(self.obs)
        return {k: v[: self.filled].clone() if torch.is_tensor(v) and not full else v for k, v in vars(self).items()}

    def load_state_dict(self, state: dict):
        for key, value in state.items():
            if torch.is_tensor(value):
                getattr(self, key)[: len(value)] = value
            else:
                setattr(self, key, value)


# === end shared ===
# === shared: critic ===
class Critic(nn.Module):
    """Two Q-functions, MLP (O + A)-256-256-1 with ReLU, as one batched network: every weight has a leading 2.

    The first layer is split into the state's and the action's share, so that the state's is computed once where one
    state is asked about several actions. Initialised like nn.Linear, uniform within 1 / sqrt(fan-in).
    """

    def __init__(self, obs_dim: int, action_dim: int, hidden: int = 256):
        super().__init__()

        def uniform(fan_in, *shape):
            return nn.Parameter(torch.empty(2, *shape).uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in)))

        fan_in = obs_dim + action_dim
        self.w_obs, self.w_action = uniform(fan_in, obs_dim, hidden), uniform(fan_in, action_dim, hidden)
        self.b1, self.w2 = uniform(fan_in, 1, hidden), uniform(hidden, hidden, hidden)
        self.b2, self.w3, self.b3 = uniform(hidden, 1, hidden), uniform(hidden, hidden, 1), uniform(hidden, 1, 1)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """obs (B, O); action (B, A) or, for K actions per state, (B, K, A) -> Q (2, B) or (2, B, K)."""
        x = torch.baddbmm(self.b1, obs.expand(2, -1, -1), self.w_obs)  # (2, B, H)
        if action.ndim == 3:
            x = x.repeat_interleave(action.shape[1], dim=1)  # (2, B K, H)
        x = x.baddbmm_(action.flatten(0, -2).expand(2, -1, -1), self.w_action).relu_()
        x = torch.baddbmm(self.b2, x, self.w2).relu_()
        return torch.baddbmm(self.b3, x, self.w3).view(2, *action.shape[:-1])


# === end shared ===
# === shared: tanh gaussian ===
LOG_STD_MIN, LOG_STD_MAX = -20, 2  # the bounds of Haarnoja et al.'s code


def tanh_gaussian(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reparameterised a = tanh(u), u = mean + std * noise, and its log density summed over the last dimension.

    (u - mean) / std is the noise itself. log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)) is exact for every u, where
    log(1 - tanh(u)^2 + 1e-6) loses its gradient from |u| = 7 on.
    """
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return u.tanh(), (log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


# === end shared ===
class Actor(nn.Module):
    """Gaussian policy squashed by tanh: MLP O-256-256 with ReLU, then mean and log standard deviation (A each)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, hidden: int = 256):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(obs_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 2 * action_dim)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (B, O) -> mean (B, A), log_std (B, A)."""
        mean, log_std = self.head(self.trunk(obs)).chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def sample(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (B, O) -> reparameterised action (B, A) in [-1, 1], its log-probability (B,)."""
        return tanh_gaussian(*self(obs))

    def mode(self, obs: torch.Tensor) -> torch.Tensor:
        """obs (B, O) -> deterministic action tanh(mean) (B, A)."""
        return self(obs)[0].tanh()

    def diagnostics(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"policy/std": self(obs)[1].exp().mean()}


# === shared: agent ===
class Agent(nn.Module):
    """Everything that learns: actor, twin critics, their target, temperature, and the Adam of each."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args)
        self.critic = Critic(obs_dim, action_dim)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha_init)))
        self.target_entropy = -float(action_dim)
        self.to(args.device)
        adam = {"fused": True, "capturable": args.device.startswith("cuda")}  # a CUDA graph could record the step
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.policy_lr, **adam)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=args.q_lr, **adam)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=args.q_lr, **adam)
        self.optimizers = [self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer]


def descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer):
    """One step of `optimizer`; only its own parameters get a gradient, so a loss through the critic leaves it alone."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


# === end shared ===
def update(agent: Agent, batch: Batch, args: Args) -> dict[str, torch.Tensor]:
    """One gradient step of critics, actor and temperature; no host synchronisation. Returns detached scalars."""
    alpha = agent.log_alpha.detach().exp()

    # Critics: y = r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha log pi(a'|s')), a' ~ pi(.|s')
    with torch.no_grad():
        next_action, next_log_prob = agent.actor.sample(batch.next_obs)
        next_value = agent.critic_target(batch.next_obs, next_action).amin(0) - alpha * next_log_prob  # (B,)
        target = batch.reward + args.gamma * (1 - batch.terminated) * next_value  # (B,)
    critic_loss = (agent.critic(batch.obs, batch.action) - target).square().mean(1).sum()
    descend(critic_loss, agent.critic_optimizer)

    # Actor: minimise E[alpha log pi(a|s) - min_i Q_i(s, a)], a reparameterised
    action, log_prob = agent.actor.sample(batch.obs)
    actor_loss = (alpha * log_prob - agent.critic(batch.obs, action).amin(0)).mean()
    descend(actor_loss, agent.actor_optimizer)

    # Temperature: minimise -log alpha (log pi + target entropy), which raises alpha while the entropy is too low
    entropy = -log_prob.detach().mean()
    alpha_loss = agent.log_alpha * (entropy - agent.target_entropy)
    descend(alpha_loss, agent.alpha_optimizer)

    with torch.no_grad():  # or the target would keep a graph of all its updates
        torch._foreach_lerp_(list(agent.critic_target.parameters()), list(agent.critic.parameters()), args.tau)
    return {
        "losses/critic": critic_loss.detach(),
        "losses/actor": actor_loss.detach(),
        "losses/alpha": alpha_loss.detach(),
        "policy/alpha": alpha,
        "policy/entropy": entropy,
    }


# === shared: sac checks ===
LIMITS = {"seed": (0, 2**31 - 1), "learning_starts": (0, math.inf), "gamma": (0, 1), "tau": (1e-9, 1)}  # others: > 0
WORLD = 1  # process; several are for ppo.py and ppo_pmoe.py


def check_sizes(args: Args, env: gym.Env):
    """Exits if nothing would be learned, or if the replay, twice for a checkpoint, cannot fit the device's memory."""
    if args.total_timesteps // args.update_every * args.update_every < max(args.learning_starts, 1):
        others = f"--learning-starts {args.learning_starts} and --update-every {args.update_every}"
        fail(f"--total-timesteps {args.total_timesteps}: no update would come with {others}; give more")
    needed = 2 * args.buffer_size * (4 * (env.observation_space.shape[0] + env.action_space.shape[0] + 2) + 8)
    if args.device.startswith("cuda"):
        memory = torch.cuda.get_device_properties(args.device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
        limit = Path("/sys/fs/cgroup/memory.max")  # a container's
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            memory = min(memory, int(text))
    if needed > memory:
        fit = int(args.buffer_size * memory / needed * 0.8)
        sizes = f"{needed / 1e9:.1f} GB with a checkpoint's copy of it, of {memory / 1e9:.1f} GB"
        fail(f"--buffer-size {args.buffer_size}: needs {sizes}; {fit} would fit")


# === end shared ===
# === shared: run folder ===
SCRIPT = Path(__file__).stem


def flag(name: str) -> str:
    """`total_timesteps` -> `--total-timesteps`"""
    return "--" + name.replace("_", "-")


def given(args: Args) -> dict:
    """Name -> value of the flags that the command spells out or that are not at their default."""
    words = {word.partition("=")[0].replace("_", "-").replace("--no-", "--") for word in sys.argv[1:]}
    values = {field.name: (getattr(args, field.name), field.default) for field in dataclasses.fields(Args)}
    return {name: value for name, (value, default) in values.items() if value != default or flag(name) in words}


def check(args: Args, remedy: str = "--device cpu always works"):
    """Exits with one line naming the flag and the remedy if a value cannot work. Creates nothing."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = LIMITS.get(field.name, (1 if isinstance(value, int) else 1e-9, math.inf))
            if not low <= value <= high or value == math.inf:
                bounds = f"lie between {low} and {high}" if high < math.inf else f"be at least {low}, and finite"
                fail(f"{flag(field.name)} {value}: must {bounds}")
    if args.video and args.evaluate is None:
        fail("--video: goes with --evaluate RUN_DIR")
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > WORLD:
        fail("torchrun --nproc_per_node: this script is one process, ppo.py may be several; start it with python")
    try:
        assert torch.device(args.device).type in ("cpu", "cuda"), "must be cpu, cuda or cuda:N"
        assert args.device == "cpu" or torch.cuda.is_available(), "PyTorch finds no GPU"
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # each process of torchrun has its own
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device}: {str(error).splitlines()[0]}; {remedy}")


def configure(args: Args):
    """PyTorch's global settings, the same in training and in evaluation."""
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.set_flush_denormal(True)  # numbers below 1e-38, such as Adam's moments of silent units, are slow on CPUs


def describe(args: Args) -> dict:
    """What has to be known to repeat the run: for run.json."""

    def git(*command):
        try:
            command = ["git", "-C", Path(__file__).parent, *command]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or not in a repository
            return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    if changes == "":
        changes = git("status", "--porcelain", "--", Path(__file__).name)  # a new script is not tracked yet
    gpu, versions = args.device.startswith("cuda"), {"python": platform.python_version()}
    chip = torch.cuda.get_device_name(args.device) if gpu else torch.backends.cpu.get_cpu_capability()
    for name in ("gymnasium", "minatar", "mujoco", "numpy", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {
        "script": SCRIPT,
        "command": shlex.join(["python", *sys.argv]),
        "args": dataclasses.asdict(args),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {chip}",
        "processes": WORLD,
    }


def new_run_dir(args: Args) -> Path:
    """Creates and returns the folder of a new run."""
    env_name = args.env_id.split(":")[-1].translate(str.maketrans("?&=/", "----"))
    default = f"runs/{env_name}__{SCRIPT}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.run_dir or default)
    if any((run_dir / name).exists() for name in ("checkpoint.pt", "eval.csv")):
        fail(f"--run-dir {run_dir}: holds another run; choose an empty folder, or continue it with --resume {run_dir}")
    run = json.dumps(describe(args), indent=1).encode()
    try:
        run_dir.mkdir(parents=True, exist_ok=args.run_dir is not None)  # of two runs of one second only one has it
        write(run_dir / "run.json", run)
    except OSError as error:
        fail(f"--run-dir {run_dir}: {error.strerror or error}; choose a folder that can be written")
    return run_dir


def load_run(option: str, folder: str, name: str) -> tuple[Args, dict]:
    """Arguments and content of `name` (model.pt or checkpoint.pt) of a saved run, on the CPU."""
    try:
        saved = torch.load(Path(folder) / name, map_location="cpu", weights_only=True)
        if saved["script"] != SCRIPT:
            fail(f"{option} {folder}: this run was made by {saved['script']}.py; use that script")
        missing = ", ".join(flag(f.name) for f in dataclasses.fields(Args) if f.name not in saved["args"])
        if missing:
            fail(f"{option} {folder}: the script was another then, without {missing}; use that of run.json's commit")
        return Args(**saved["args"]), saved
    except Exception as error:  # missing, cut short, not a checkpoint: torch.load raises half a dozen types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        fail(f"{option} {folder}: no readable {name} there ({reason}); give the folder of a run of this script")


def resume_run(args: Args) -> tuple[Args, dict]:
    """Arguments and checkpoint of the run in folder `args.resume`: the same run, which may only become longer."""
    saved, checkpoint = load_run("--resume", args.resume, "checkpoint.pt")
    for name, value in given(args).items():
        if name == "total_timesteps" and value:
            if value < saved.total_timesteps:
                fail(f"--total-timesteps {value}: the run has {saved.total_timesteps} and can only become longer")
            saved = dataclasses.replace(saved, total_timesteps=value)
        elif name != "resume" and value != getattr(saved, name):
            fail(f"{flag(name)} {value}: cannot change in a run that is resumed, it has {getattr(saved, name)}")
    if not os.access(args.resume, os.W_OK):
        fail(f"--resume {args.resume}: cannot write there; copy the folder to where you can")
    check(saved, "a run is resumed on the kind of device that made it")
    return saved, checkpoint


def note_resume(run_dir: Path, args: Args, global_step: int):
    """Adds to run.json with what the run goes on: command, commit, versions and machine may be other ones now."""
    run, now = json.loads((run_dir / "run.json").read_text()), describe(args)
    now = {key: value for key, value in now.items() if key not in ("script", "args")}
    run["resumed"] = [*run.get("resumed", []), {"global_step": global_step} | now]
    write(run_dir / "run.json", json.dumps(run, indent=1).encode())


def write(path: Path, data: bytes | dict):
    """Writes a file (a dict by torch.save) under a temporary name first, so that `path` is never half-written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(data, file) if isinstance(data, dict) else file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def write_eval(run_dir: Path, rows: list[dict]):
    """eval.csv: one line per evaluation, no wall-clock time, so that equal runs give equal files."""
    lines = [",".join(EVAL_COLUMNS)] + [",".join(f"{row[c]}" for c in EVAL_COLUMNS) for row in rows]
    write(run_dir / "eval.csv", "\n".join([*lines, ""]).encode())


# === end shared ===
# === shared: evaluation ===
EVAL_COLUMNS = ("global_step", "policy", "episodes", "return", "return_std", "length", "success")


def act(policy, obs: np.ndarray, device: str) -> np.ndarray:
    """One action (A,) of `policy`, a function of a batch of observations, for one observation (O,)."""
    with torch.no_grad():
        return policy(torch.from_numpy(obs).to(device)[None])[0].cpu().numpy()


def evaluate(agent: Agent, env: gym.Env, args: Args, policy: str, global_step: int, frames: list | None = None) -> dict:
    """A row of eval.csv: raw returns over `args.eval_episodes` episodes; `policy` is deterministic or stochastic.

    Own environment and seeds, and the random state is put back afterwards: training is the same with and without it.
    """
    function = agent.actor.mode if policy == "deterministic" else lambda obs: agent.actor.sample(obs)[0]
    results = []
    with torch.random.fork_rng([args.device] if args.device.startswith("cuda") else []):
        torch.manual_seed(args.seed)
        for episode in range(args.eval_episodes):
            (obs, _), done = env.reset(seed=episode_seed(args.seed, episode, evaluation=True)), False
            while not done:
                obs, _, terminated, truncated, info = env.step(act(function, np.float32(obs), args.device))
                done = terminated or truncated
                if frames is not None:
                    frames.append(env.render())
            results.append((info["episode"]["r"], info["episode"]["l"], info.get("success", math.nan)))
    (mean, length, success), std = np.mean(results, axis=0), np.std(results, axis=0)[0]
    row = (global_step, policy, args.eval_episodes, *(round(float(v), 4) for v in (mean, std, length, success)))
    return dict(zip(EVAL_COLUMNS, row, strict=True))


def evaluate_run(args: Args) -> Path:
    """Evaluates the run in folder `args.evaluate`, prints the result and writes it there as evaluation.json."""
    for name, value in given(args).items():
        if name not in ("evaluate", "eval_episodes", "video", "device"):
            fail(f"{flag(name)} {value}: --evaluate takes it from the run; leave it out")
    saved, model = load_run("--evaluate", args.evaluate, "model.pt")
    run = dataclasses.replace(saved, eval_episodes=args.eval_episodes, device=args.device)
    configure(run)
    env = make_env(run.env_id)
    agent = Agent(env.observation_space.shape[0], env.action_space.shape[0], run)
    agent.load_state_dict(model["agent"])
    step = model["global_step"]
    result = {policy: evaluate(agent, env, run, policy, step) for policy in ("deterministic", "stochastic")}
    result = {policy: {k: None if v != v else v for k, v in row.items()} for policy, row in result.items()}  # no NaN
    text = json.dumps(result, indent=1)
    print(text)
    try:
        write(Path(args.evaluate) / "evaluation.json", text.encode())
    except OSError as error:
        fail(f"--evaluate {args.evaluate}: {error}")
    if args.video:
        path, frames = Path(args.evaluate) / "video.gif", []
        try:
            import imageio  # comes with gymnasium[mujoco]

            env = make_env(run.env_id, render_mode="rgb_array")
            evaluate(agent, env, dataclasses.replace(run, eval_episodes=1), "deterministic", step, frames)
            imageio.mimsave(path, frames, duration=1000 / env.metadata.get("render_fps", 30), loop=0)
        except Exception as error:  # no display, no OpenGL, a missing package: every renderer has its own errors
            fail(f"--video: cannot draw {run.env_id} here ({error}); without a display, MuJoCo wants MUJOCO_GL=egl")
        print(f"the first deterministic episode: {path}")
    return Path(args.evaluate)


# === end shared ===
# === shared: main ===
def main(args: Args) -> Path:
    """Trains (or resumes, or evaluates) one agent and returns the folder of its run."""
    check(args)
    if args.evaluate is not None:
        return evaluate_run(args)
    run_dir, checkpoint = args.resume, None
    if args.resume is not None:
        args, checkpoint = resume_run(args)
    elif args.total_timesteps is None:
        args = dataclasses.replace(args, total_timesteps=40_000)
    configure(args)
    env, eval_env = make_env(args.env_id), make_env(args.env_id)
    check_sizes(args, env)
    run_dir = Path(run_dir) if checkpoint else new_run_dir(args)

    torch.manual_seed(args.seed)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agent = Agent(obs_dim, action_dim, args)
    buffer = ReplayBuffer(args.buffer_size + 1, obs_dim, action_dim, torch.device(args.device))
    before = checkpoint or {"global_step": 0, "episode": 0, "actions": [], "eval_rows": [], "wall_time": 0.0}
    start_step, episode, actions, eval_rows, earlier_time = (
        before[key] for key in ("global_step", "episode", "actions", "eval_rows", "wall_time")
    )
    global_step, actions = start_step, [np.float32(action) for action in actions]  # actions of the running episode
    obs, _ = env.reset(seed=episode_seed(args.seed, episode))
    for action in actions:
        obs, *_ = env.step(action)
    obs = np.array(obs, np.float32)
    if checkpoint:
        if not np.array_equal(obs, checkpoint["obs"].numpy()):
            fail(f"--resume {run_dir}: {args.env_id} does not repeat its own episode, so it cannot go on; start anew")
        agent.load_state_dict(checkpoint["agent"])
        for optimizer, state in zip(agent.optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        buffer.load_state_dict(checkpoint.pop("buffer"))
        torch.set_rng_state(checkpoint["rng"])
        if args.device.startswith("cuda"):
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], args.device)
        if global_step < args.total_timesteps:  # made longer: what was its end is not one any more
            eval_rows = [
                r for r in eval_rows if r["policy"] == "deterministic" and r["global_step"] % args.eval_every == 0
            ]

    writer = SummaryWriter(run_dir, purge_step=start_step + 1)
    progress = tqdm(initial=start_step, total=args.total_timesteps, disable=not sys.stderr.isatty(), unit="step")
    started, signals = time.perf_counter(), []
    handlers = {s: signal.signal(s, lambda number, _: signals.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}

    def save():
        wall_time = earlier_time + time.perf_counter() - started
        model = {"script": SCRIPT, "args": dataclasses.asdict(args), "global_step": global_step}
        model["agent"] = agent.state_dict()
        state = {
            "optimizers": [optimizer.state_dict() for optimizer in agent.optimizers],
            "buffer": buffer.state_dict(),
            "episode": episode,
            "actions": [action.tolist() for action in actions],
            "obs": torch.from_numpy(obs),
            "eval_rows": eval_rows,
            "wall_time": wall_time,
            "rng": torch.get_rng_state(),
        }
        if args.device.startswith("cuda"):
            state["cuda_rng"] = torch.cuda.get_rng_state(args.device)
        write(run_dir / "checkpoint.pt", model | state)
        write(run_dir / "model.pt", model)
        write_eval(run_dir, eval_rows)
        run = json.loads((run_dir / "run.json").read_text()) | {"args": model["args"], "global_step": global_step}
        run |= {"wall_time": wall_time, "steps_per_second": global_step / wall_time}
        write(run_dir / "run.json", json.dumps(run, indent=1).encode())

    def stop(reason: str, code: int):
        progress.close()
        print(f"{SCRIPT}.py: step {global_step}: {reason}", file=sys.stderr)
        raise SystemExit(code)

    losses, keeps = {}, f"{run_dir} keeps its checkpoint, but --resume would repeat this"
    try:
        if checkpoint:
            note_resume(run_dir, args, global_step)
        save()  # from now on the run can be resumed
        while global_step < args.total_timesteps:
            if global_step < args.learning_starts:
                action = torch.rand(action_dim).mul(2).sub(1).numpy()
            else:
                action = act(lambda x: agent.actor.sample(x)[0], obs, args.device)
            if not np.isfinite(action).all():
                stop(f"the training has diverged, the policy's action is not finite; {keeps}", 1)
            next_obs, reward, terminated, truncated, info = env.step(action)
            next_obs, terminated, done = np.array(next_obs, np.float32), bool(terminated), bool(terminated or truncated)
            if not (np.isfinite(next_obs).all() and math.isfinite(reward)):  # before the replay keeps it
                stop(f"a reward or observation of the environment is not finite; {keeps}", 1)
            buffer.add(obs, action, float(reward), terminated, next_obs, done)
            actions.append(action)
            obs, global_step = next_obs, global_step + 1
            if done:
                writer.add_scalar("charts/episodic_return", info["episode"]["r"], global_step)
                writer.add_scalar("charts/episodic_length", info["episode"]["l"], global_step)
                episode, actions = episode + 1, []
                obs = np.array(env.reset(seed=episode_seed(args.seed, episode))[0], np.float32)
                progress.set_postfix_str(f"return {info['episode']['r']:.1f}", refresh=False)

            if global_step >= args.learning_starts and global_step % args.update_every == 0:
                batch = buffer.sample(args.batch_size)
                losses = update(agent, batch, args)
            progress.update()

            last, interrupted = global_step == args.total_timesteps, bool(signals)
            evaluate_now = last or global_step % args.eval_every == 0
            save_now = interrupted or global_step % args.checkpoint_every == 0
            speed = (global_step - start_step) / (time.perf_counter() - started)
            if losses and (global_step % 1000 == 0 or evaluate_now or save_now):
                metrics = {"charts/SPS": speed}  # the norm is not finite if the last update broke a weight
                metrics["charts/weight_norm"] = nn.utils.get_total_norm(agent.parameters()).item()
                for key, value in (losses | agent.actor.diagnostics(batch.obs)).items():  # a number, or one per expert
                    names = [f"{key}_{k}" for k in range(len(value))] if value.ndim else [key]
                    metrics |= dict(zip(names, value.flatten().tolist(), strict=True))
                for key, value in metrics.items():
                    if not math.isfinite(value):
                        stop(f"the training has diverged, {key} is {value}; {keeps}", 1)
                    writer.add_scalar(key, value, global_step)
            if evaluate_now:
                for policy in ("deterministic", "stochastic") if last else ("deterministic",):
                    row = evaluate(agent, eval_env, args, policy, global_step)
                    eval_rows.append(row)
                    known = {k: row[k] for k in ("return", "success") if math.isfinite(row[k])}  # few know success
                    for key, value in known.items():
                        tag = f"eval/{key}" if policy == "deterministic" else f"eval/{key}_stochastic"
                        writer.add_scalar(tag, value, global_step)
                    text = ", ".join(f"{key} {value:.2f}" for key, value in known.items())
                    progress.write(f"step {global_step}/{args.total_timesteps}: {policy} {text}, {speed:.0f} steps/s")
                sys.stdout.flush()  # it may be a file
                write_eval(run_dir, eval_rows)
            if save_now:
                save()
            if interrupted:
                name = signal.Signals(signals[0]).name
                stop(f"{name}, checkpoint written; continue with --resume {run_dir}", 128 + signals[0])
        save()
    except OSError as error:
        stop(f"{error}; what was saved last stands: mend that, then --resume {run_dir}", 1)
    finally:
        progress.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):  # the disk is full, as was said
            writer.close()
    print(f"{SCRIPT}.py: finished at step {global_step}; run folder {run_dir}")
    return run_dir


# === end shared ===
if __name__ == "__main__":
    main(tyro.cli(Args))

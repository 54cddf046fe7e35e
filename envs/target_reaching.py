"""Target reaching: a point mass flies round obstacles to a target, alone or as one NumPy batch of N environments.

`_World` is the whole task (layouts, dynamics, rewards, observations, picture) for a batch. `TargetReaching` is a world
of one; `TargetReachingVec` is a world of N with a time limit and same-step autoreset. Both forms therefore give
trajectories that are equal to the bit. The task is documented in `TargetReaching`.
"""

import math
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

DT = 0.1  # duration of a step
EDGE = 5.0  # the arena is [-EDGE, EDGE]^2; |x| or |y| >= EDGE is the wall
MAX_SPEED = 1.0  # per axis
TARGET_RADIUS = 0.5
TARGET_REWARD = 100.0
WALL_PENALTY = -10.0
START = (-4.5, -4.5)
DEFAULT_MAX_EPISODE_STEPS = 300

POINTS = {  # start, target, centres of the obstacles
    "fixed": np.array([START, (3.0, 3.0), (-2.5, -2.5), (-3.0, -0.5), (-0.5, -3.0)]),
    "mirror": np.array([(0.0, -1.5), (0.0, 1.5), (0.0, 0.0)]),
}
POINTS["task0"] = POINTS["fixed"]
for _turn in range(3):  # (x, y) -> (-y, x) is exact, unlike a rotation by cos and sin
    POINTS[f"task{_turn + 1}"] = POINTS[f"task{_turn}"][:, ::-1] * (-1.0, 1.0)
FIXED_RADIUS = 0.6
LAYOUTS = ("random", *POINTS)

# Random layouts need at least one free start and target; with more discs than this most draws would be covered.
MAX_OBSTACLES = 50
FRAME_SIZE = 256  # pixels


def _require(ok: bool, name: str, given: Any, wanted: str) -> None:
    """Raises ValueError that names the argument, what was given and what would work."""
    if not ok:
        raise ValueError(f"{name} must be {wanted}, got {given!r}")


def _is_int(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


class _World:
    """N worlds in arrays of shape (N, ...), float64; the task and the arguments are those of TargetReaching."""

    def __init__(self, num_envs, layout, num_obstacles, inverted, obstacle_penalty, speed_bonus, render_mode):
        _require(_is_int(num_envs, 1), "num_envs", num_envs, "an integer >= 1")
        _require(layout in LAYOUTS, "layout", layout, f"one of {', '.join(map(repr, LAYOUTS))}")
        if layout == "random":
            default, low, high, wanted = 3, 0, MAX_OBSTACLES, f"an integer from 0 to {MAX_OBSTACLES}"
        else:
            default = low = high = len(POINTS[layout]) - 2  # without start and target
            wanted = f"{default} with layout={layout!r}"
        if num_obstacles is None:
            num_obstacles = default
        _require(_is_int(num_obstacles, low, high), "num_obstacles", num_obstacles, wanted)
        _require(isinstance(inverted, bool), "inverted", inverted, "True or False")
        if obstacle_penalty is None:
            obstacle_penalty = -10.0 if layout in ("random", "mirror") else -100.0
        # A positive value is most likely a penalty written without its sign: it would reward collisions.
        ok = _is_number(obstacle_penalty) and obstacle_penalty <= 0
        _require(ok, "obstacle_penalty", obstacle_penalty, "a finite number <= 0 (it is added to the reward as it is)")
        _require(_is_number(speed_bonus), "speed_bonus", speed_bonus, "a finite number")
        _require(render_mode in (None, "rgb_array"), "render_mode", render_mode, "None or 'rgb_array'")

        self.num_envs, self.layout, self.num_obstacles = num_envs, layout, num_obstacles
        self.acceleration_sign = -1.0 if inverted else 1.0
        self.obstacle_penalty, self.speed_bonus = float(obstacle_penalty), float(speed_bonus)

        self.start = np.zeros((num_envs, 2))
        self.position = np.zeros((num_envs, 2))
        self.velocity = np.zeros((num_envs, 2))
        self.acceleration = np.zeros((num_envs, 2))
        self.target = np.zeros((num_envs, 2))
        self.obstacles = np.zeros((num_envs, num_obstacles, 2))  # centres
        self.radii = np.zeros((num_envs, num_obstacles))
        self.trails: list[list[np.ndarray]] | None = [[] for _ in range(num_envs)] if render_mode else None
        self.needs_reset = True

        # The last step of an episode may end at most 0.105 behind the wall; targets lie within 3 of the centre on each
        # axis, obstacle centres within 5. The bounds leave 0.095 of slack for rounding.
        reach = EDGE + 0.2
        high = np.array(
            [reach / EDGE] * 2 + [MAX_SPEED] * 2 + [1.0] * 2 + [(reach + 3) / EDGE] * 2
            + [(reach + EDGE) / EDGE] * (2 * num_obstacles) + [FIXED_RADIUS] * num_obstacles,
            dtype=np.float32,
        )  # fmt: skip
        low = np.where(np.arange(len(high)) < len(high) - num_obstacles, -high, 0).astype(np.float32)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)

    def reset(self, index: np.ndarray, rngs: Sequence[np.random.Generator]) -> None:
        """Starts a new episode in the worlds `index`; `rngs` has one generator for each world of the batch."""
        if self.layout == "random":
            self.start[index] = START
            self._draw(index, rngs)
        else:
            points = POINTS[self.layout]
            self.start[index], self.target[index], self.obstacles[index] = points[0], points[1], points[2:]
            self.radii[index] = FIXED_RADIUS
        self.position[index] = self.start[index]
        self.velocity[index] = 0.0
        self.acceleration[index] = 0.0
        self.needs_reset = False
        if self.trails is not None:
            for i in index:
                self.trails[i] = [self.position[i].copy()]

    def _draw(self, index: np.ndarray, rngs: Sequence[np.random.Generator]) -> None:
        """Draws random layouts, and draws again those whose start or target centre lies in an obstacle."""
        while len(index):
            for i in index:
                self.target[i] = rngs[i].uniform(0.0, 3.0, 2)
                self.obstacles[i] = rngs[i].standard_normal((self.num_obstacles, 2))
                self.radii[i] = rngs[i].random(self.num_obstacles)
            self.obstacles[index] = np.clip(2.35 * self.obstacles[index], -EDGE, EDGE)
            self.radii[index] = (15 + np.floor(15 * self.radii[index])) / 50  # sizes 15..29
            index = index[self._touches(self.start, index) | self._touches(self.target, index)]

    def _touches(self, point: np.ndarray, index: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Whether `point` (N, 2) lies in an obstacle or on its edge, for the worlds `index`."""
        offset = self.obstacles[index] - point[index][:, None]
        return (offset[..., 0] ** 2 + offset[..., 1] ** 2 <= self.radii[index] ** 2).any(-1)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Moves every world by one step.

        Args:
            action: Shape (N, 2); clipped to [-1, 1].

        Returns:
            reward (N,) float64, terminated (N,) bool, success (N,) bool.

        Raises:
            ResetNeeded: Before the first reset.
            ValueError: The shape is wrong or a value is not finite (a diverged policy should not pass unseen).
        """
        if self.needs_reset:
            raise ResetNeeded("call reset() before step()")
        action = np.asarray(action, dtype=np.float64)
        _require(action.shape == (self.num_envs, 2), "action.shape", action.shape, f"{(self.num_envs, 2)}")
        _require(np.isfinite(action).all(), "action", action, "finite")

        self.acceleration = self.acceleration_sign * np.clip(action, -1.0, 1.0)
        velocity = np.clip(self.velocity + self.acceleration * DT, -MAX_SPEED, MAX_SPEED)
        self.position = self.position + velocity * DT + 0.5 * (velocity - self.velocity) * DT
        self.velocity = velocity

        x, y = self.position[:, 0], self.position[:, 1]
        to_target = self.target - self.position
        # The order of the cases is their priority: a target behind an obstacle's edge is not reached through it.
        hit = self._touches(self.position)
        wall = ~hit & ((np.abs(x) >= EDGE) | (np.abs(y) >= EDGE))
        success = ~hit & ~wall & (to_target[:, 0] ** 2 + to_target[:, 1] ** 2 <= TARGET_RADIUS**2)
        reward = self.speed_bonus * np.sqrt(velocity[:, 0] ** 2 + velocity[:, 1] ** 2)
        reward[hit] = self.obstacle_penalty
        reward[wall] = WALL_PENALTY
        reward[success] = TARGET_REWARD
        if self.trails is not None:
            for trail, position in zip(self.trails, self.position, strict=True):
                trail.append(position.copy())
        return reward, hit | wall | success, success

    def observe(self, index: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Observations (len(index), 8 + 3 n) float32, new memory."""
        position, n = self.position[index], self.num_obstacles
        obs = np.empty((len(position), 8 + 3 * n), dtype=np.float32)
        obs[:, 0:2] = position / EDGE
        obs[:, 2:4] = self.velocity[index]
        obs[:, 4:6] = self.acceleration[index]
        obs[:, 6:8] = (self.target[index] - position) / EDGE
        obs[:, 8 : 8 + 2 * n] = ((self.obstacles[index] - position[:, None]) / EDGE).reshape(len(position), 2 * n)
        obs[:, 8 + 2 * n :] = self.radii[index]
        return obs

    def frame(self, i: int) -> np.ndarray:
        """The picture of world i, (FRAME_SIZE, FRAME_SIZE, 3) uint8, y upwards."""
        if self.needs_reset:
            raise ResetNeeded("call reset() before render()")
        pixel = 2 * EDGE / FRAME_SIZE
        axis = (np.arange(FRAME_SIZE) + 0.5) * pixel - EDGE  # pixel centres
        frame = np.full((FRAME_SIZE, FRAME_SIZE, 3), 255, dtype=np.uint8)

        def disc(centre: np.ndarray, radius: float, colour: tuple[int, int, int]) -> None:
            frame[(axis - centre[0]) ** 2 + (-axis[:, None] - centre[1]) ** 2 <= radius**2] = colour

        disc(self.target[i], TARGET_RADIUS, (60, 170, 80))
        for centre, radius in zip(self.obstacles[i], self.radii[i], strict=True):
            disc(centre, radius, (90, 90, 90))
        trail = np.array(self.trails[i]) * (1, -1)  # rows count downwards
        column, row = np.clip(((trail + EDGE) / pixel).astype(int), 0, FRAME_SIZE - 1).T
        frame[row, column] = (240, 150, 40)
        disc(self.position[i], 0.15, (40, 80, 200))
        return frame


class TargetReaching(gym.Env):
    """A point mass accelerates round obstacles to a target: several ways lead there, and a mixture may keep them all.

    ## Description
    Dynamics, observation and rewards follow the environment of the PMOE authors (Ren et al. 2021, "Probabilistic
    Mixture-of-Experts for Efficient Deep Reinforcement Learning", https://arxiv.org/abs/2104.09122). Ours are: the time
    limit, the second draw of covered layouts, the order of the endings, `info`, and all arguments.

    The arena is the square [-5, 5]^2, a step lasts dt = 0.1. With acceleration a, velocity v and position p,
    v' = clip(v + a dt, -1, 1) per axis and p' = p + v' dt + 0.5 (v' - v) dt.

    **A trap that the reward sets:** flying about pays up to 0.1 * sqrt(2) = 0.14 a step, 42 in an episode of 300 steps,
    and without any risk. A policy that circles and never reaches the target is a local optimum, and its return rises
    while it learns to circle: watch `info["success"]`, not the return alone. It is the authors' reward, so it stays;
    `speed_bonus=0` removes it.

    ## Action Space
    `Box(-1, 1, (2,), float32)`: the acceleration along x and y. Values outside are clipped; values that are not finite
    and other shapes raise ValueError.

    ## Observation Space
    `Box(low, high, (8 + 3 n,), float32)` for n obstacles, (17,) for three, bounded by what can be reached:

    | index           | content                                                         |
    |-----------------|-----------------------------------------------------------------|
    | 0-1             | position / 5                                                    |
    | 2-3             | velocity                                                        |
    | 4-5             | acceleration of the last step (as applied, so after `inverted`) |
    | 6-7             | (target - position) / 5                                         |
    | 8 to 7+2n       | (centre - position) / 5, x and y of each obstacle in turn       |
    | 8+2n to 7+3n    | radius of each obstacle                                         |

    ## Rewards
    After the move, the first case that holds decides:
    1. the point lies in an obstacle or on its edge: `obstacle_penalty`, terminated;
    2. |x| >= 5 or |y| >= 5: -10, terminated;
    3. the target's centre is at most 0.5 away: +100, terminated, `info["success"]` is True;
    4. otherwise `speed_bonus` * ||v'||.

    ## Starting State
    At rest, at (-4.5, -4.5) where nothing else is said.
    * "random": target uniform in [0, 3]^2, obstacle centres clip(2.35 N(0, 1), -5, 5), radius = size / 50 with sizes
      uniform in 15..29, all new in each episode. A layout in which an obstacle covers the start or the target's centre
      is drawn again.
    * "fixed": target (3, 3), obstacles at (-2.5, -2.5), (-3, -0.5) and (-0.5, -3) with radius 0.6. The middle one
      blocks the diagonal, so there are four ways round, and a policy with one mode has to choose.
    * "mirror" (ours): start (0, -1.5), target (0, 1.5), one obstacle of radius 0.6 at (0, 0). The two ways round it
      are exactly equally good: the mirrored actions (-a_x, a_y) give the mirrored trajectory, with the same rewards.
    * "task0" to "task3": the fixed layout, its start included, turned counter-clockwise by 0, 90, 180 and 270 degrees
      about the centre.

    ## Episode End
    Terminated by cases 1 to 3 above. The authors have no time limit; `gym.make` truncates after 300 steps
    (its `max_episode_steps` changes that). `info` holds "success" (bool) and "position" (float64 array (2,), a copy).

    ## Arguments
    * `layout`: "random" (default), "fixed", "mirror", "task0", "task1", "task2" or "task3".
    * `num_obstacles`: n, 0 to 50 with the random layout (default 3); the others have 1 (mirror) or 3.
    * `inverted`: True flips the sign of the action, so that two tasks with one picture want opposite actions.
    * `obstacle_penalty`: reward for touching an obstacle, <= 0; by default -10 if random or mirror, -100 in the others.
    * `speed_bonus`: reward per unit of speed, default 0.1.
    * `render_mode`: None or "rgb_array": green target, grey obstacles, blue agent with an orange trail.

    A wrong argument raises ValueError.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # 10 frames of dt = 0.1: real time

    def __init__(
        self,
        layout: str = "random",
        num_obstacles: int | None = None,
        inverted: bool = False,
        obstacle_penalty: float | None = None,
        speed_bonus: float = 0.1,
        render_mode: str | None = None,
    ):
        self._world = _World(1, layout, num_obstacles, inverted, obstacle_penalty, speed_bonus, render_mode)
        self.render_mode = render_mode
        self.observation_space, self.action_space = self._world.observation_space, self._world.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self._world.reset(np.array([0]), [self.np_random])
        return self._world.observe()[0], {"success": False, "position": self._world.position[0].copy()}

    def step(self, action: np.ndarray):
        action = np.asarray(action)
        _require(action.shape == (2,), "action.shape", action.shape, "(2,)")
        reward, terminated, success = self._world.step(action[None])
        info = {"success": bool(success[0]), "position": self._world.position[0].copy()}
        return self._world.observe()[0], float(reward[0]), bool(terminated[0]), False, info

    def render(self) -> np.ndarray | None:
        return self._world.frame(0) if self.render_mode == "rgb_array" else None


class TargetReachingVec(VectorEnv):
    """N TargetReaching environments as one NumPy batch with same-step autoreset; what `gym.make_vec` gives.

    It returns what `SyncVectorEnv(..., autoreset_mode=AutoresetMode.SAME_STEP)` over the single environment returns,
    including the keys of `info`: when sub-environment i ends, obs[i] already starts its next episode, and
    info["final_obs"][i] (an object array, None elsewhere; mask "_final_obs") and info["final_info"] (a dictionary of
    arrays, mask "_final_info") belong to the step that ended. So with seed s, i plays the episodes of the single one
    with seed s + i.

    Args:
        num_envs: N.
        max_episode_steps: Steps until truncation. None: 300; -1: no limit (as in `gym.make`).
        others: As in TargetReaching; all sub-environments share them.

    Raises:
        ValueError: A wrong argument.
    """

    metadata = {**TargetReaching.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        layout: str = "random",
        num_obstacles: int | None = None,
        inverted: bool = False,
        obstacle_penalty: float | None = None,
        speed_bonus: float = 0.1,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
    ):
        limit = DEFAULT_MAX_EPISODE_STEPS if max_episode_steps is None else max_episode_steps
        ok = _is_int(limit, 1) or limit == -1
        _require(ok, "max_episode_steps", max_episode_steps, "an integer >= 1, -1 (no limit) or None (300)")
        self._max_episode_steps = math.inf if limit == -1 else limit
        self._world = _World(num_envs, layout, num_obstacles, inverted, obstacle_penalty, speed_bonus, render_mode)
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space = self._world.observation_space
        self.single_action_space = self._world.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        # One generator for each sub-environment: its episodes must not depend on when the others end.
        generators = [seeding.np_random() for _ in range(num_envs)]
        self._np_random, self._np_random_seed = map(list, zip(*generators, strict=True))

    def reset(self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None):
        """Resets all; an integer seed s stands for [s, s + 1, ...], None keeps the generators as they are."""
        if options is not None and "reset_mask" in options:
            raise ValueError("options['reset_mask'] must be absent: finished sub-environments reset themselves")
        if seed is None or isinstance(seed, int):
            seed = [None if seed is None else seed + i for i in range(self.num_envs)]
        _require(len(seed) == self.num_envs, "seed", seed, f"an integer, None or a list of length {self.num_envs}")
        for i, s in enumerate(seed):
            if s is not None:
                self._np_random[i], self._np_random_seed[i] = seeding.np_random(s)
        self._elapsed = np.zeros(self.num_envs, dtype=np.int64)
        self._world.reset(np.arange(self.num_envs), self.np_random)
        return self._world.observe(), self._info(np.zeros(self.num_envs, dtype=bool), self._world.position)

    def step(self, actions: np.ndarray):
        reward, terminated, success = self._world.step(actions)
        self._elapsed += 1
        truncated = self._elapsed >= self._max_episode_steps
        obs, done, final = self._world.observe(), terminated | truncated, {}
        if done.any():
            index = np.flatnonzero(done)
            final_obs = np.full(self.num_envs, None, dtype=object)
            for i in index:
                final_obs[i] = obs[i].copy()
            final_info = self._info(success, np.where(done[:, None], self._world.position, 0.0), done)
            final = {"final_obs": final_obs, "_final_obs": done.copy(),
                     "final_info": final_info, "_final_info": done.copy()}  # fmt: skip
            self._world.reset(index, self.np_random)
            obs[index] = self._world.observe(index)
            self._elapsed[index] = 0
        # Success ends an episode, so what is left after the reset never has it.
        success = np.zeros(self.num_envs, dtype=bool)
        return obs, reward, terminated, truncated, final | self._info(success, self._world.position)

    def _info(self, success: np.ndarray, position: np.ndarray, mask: np.ndarray | None = None) -> dict[str, Any]:
        """The two entries with their masks; all arrays are new."""
        mask = np.ones(self.num_envs, dtype=bool) if mask is None else mask
        return {"success": success.copy(), "_success": mask.copy(),
                "position": position.copy(), "_position": mask.copy()}  # fmt: skip

    def render(self) -> tuple[np.ndarray, ...] | None:
        return tuple(map(self._world.frame, range(self.num_envs))) if self.render_mode == "rgb_array" else None

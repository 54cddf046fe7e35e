"""The target-reaching environment: API, dynamics and rewards against literals, and vectorised = single to the bit."""

import functools
import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from moe_envs.target_reaching import LAYOUTS, TargetReaching, TargetReachingVec

ID = "moe_envs:TargetReaching-v0"
FORMS = [TargetReaching, functools.partial(TargetReachingVec, num_envs=2)]


def same(a, b):
    """Raises AssertionError unless a and b have equal structure, types and bits."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.dtype == object:
            for x, y in zip(a, b, strict=True):
                same(x, y)
        else:
            assert a.tobytes() == b.tobytes()
    else:
        assert a == b


def same_all(a, b):
    for x, y in zip(a, b, strict=True):
        same(x, y)


def pilot(obs, rng):
    """Actions (N, 2) for obs (N, 17): noisy flight straight to the target; the first one stays until time is out."""
    action = np.clip(20 * obs[:, 6:8] - 4 * obs[:, 2:4] + rng.normal(0, 1, (len(obs), 2)), -1, 1).astype(np.float32)
    action[0] = 0
    return action


def place(env, position, velocity=(0, 0), **arrays):
    """A reset environment with its state overwritten; arrays: target (2,), obstacles (n, 2), radii (n,)."""
    env.reset(seed=0)
    for name, value in dict(position=position, velocity=velocity, **arrays).items():
        getattr(env._world, name)[0] = value
    return env


# === the interface ===


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inverted", [False, True])
def test_check_env(layout, inverted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(ID, layout=layout, inverted=inverted).unwrapped)


@pytest.mark.parametrize("num_obstacles", [0, 1, 3, 7])
def test_observation_size(num_obstacles):
    env = TargetReaching(num_obstacles=num_obstacles)
    assert env.observation_space.shape == (8 + 3 * num_obstacles,)
    assert env.reset(seed=0)[0] in env.observation_space
    assert env.step(np.ones(2))[0] in env.observation_space


def test_observations_stay_in_bounds():
    for layout in ("random", "task1", "task2", "mirror"):
        env = TargetReachingVec(256, layout)
        low, high = env.single_observation_space.low, env.single_observation_space.high
        rng = np.random.default_rng(0)
        obs, _ = env.reset(seed=0)
        action = rng.choice([-1.0, 1.0], (256, 2))  # full speed into every corner
        for _ in range(200):
            obs, _, _, _, info = env.step(action)
            finals = [o for o in info.get("final_obs", []) if o is not None]
            for batch in (obs, *finals):
                assert (batch >= low).all() and (batch <= high).all()
    env = place(TargetReaching(), (4.9999, -4.9999), (0.9, -0.9), radii=0.1)  # the farthest possible last step
    obs, _, terminated, _, info = env.step(np.array([1, -1]))
    assert terminated and obs in env.observation_space
    np.testing.assert_allclose(info["position"], [5.1049, -5.1049], atol=1e-12)


def test_two_environments_equal_to_the_bit():
    envs = [gym.make(ID), gym.make(ID)]
    rng = np.random.default_rng(0)
    same_all(*[env.reset(seed=5) for env in envs])
    for _ in range(500):
        action = rng.uniform(-1, 1, 2).astype(np.float32)
        results = [env.step(action) for env in envs]
        same_all(*results)
        if results[0][2] or results[0][3]:
            same_all(*[env.reset() for env in envs])  # no seed: the generators go on
    assert not np.array_equal(envs[0].reset(seed=5)[0], envs[1].reset(seed=6)[0])


def test_returned_arrays_are_copies():
    for env in (TargetReaching(), TargetReachingVec(3)):
        _, info = env.reset(seed=0)
        info["position"][:] = 9
        _, _, terminated, _, info = env.step(np.zeros(env.action_space.shape))
        assert np.all(info["position"] == -4.5) and not np.any(terminated)  # an autoreset would hide a moved agent


@pytest.mark.parametrize("layout", ["random", "fixed"])
def test_episodes_start_at_rest(layout):
    env, vec = TargetReaching(layout=layout), TargetReachingVec(2, layout, max_episode_steps=3)
    env.reset(seed=0)
    vec.reset(seed=0)
    for _ in range(3):
        env.step(np.ones(2))
        obs, *_ = vec.step(np.ones((2, 2)))
    for first in (env.reset()[0], *obs):
        np.testing.assert_allclose(first[:6], [-0.9, -0.9, 0, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name, bad",
    [
        ("layout", "maze"),
        ("layout", "task4"),
        ("num_obstacles", -1),
        ("num_obstacles", 51),
        ("num_obstacles", 2.0),
        ("inverted", 1),
        ("obstacle_penalty", 10.0),
        ("obstacle_penalty", math.nan),
        ("speed_bonus", math.inf),
        ("speed_bonus", "0.1"),
        ("render_mode", "human"),
    ],
)
def test_bad_arguments(form, name, bad):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {bad!r}$"):
        form(**{name: bad})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout, right, wrong", [("fixed", 3, (4, 1, 3.0)), ("mirror", 1, (3, 0, 1.0, True))])
def test_number_of_obstacles_of_a_layout(form, layout, right, wrong):
    for arguments in ({}, {"num_obstacles": right}):
        assert form(layout=layout, **arguments)._world.obstacles.shape[1] == right
    for bad in wrong:
        with pytest.raises(ValueError, match=f"^num_obstacles must be {right} with layout='{layout}', got {bad!r}$"):
            form(layout=layout, num_obstacles=bad)


def test_bad_arguments_of_one_form():
    for bad in (0, -2, 1.5):
        with pytest.raises(ValueError, match="^max_episode_steps must be"):
            TargetReachingVec(2, max_episode_steps=bad)
    with pytest.raises(ValueError, match="^num_envs must be"):
        TargetReachingVec(0)
    with pytest.raises(ValueError, match="^seed must be .* length 2"):
        TargetReachingVec(2).reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="reset_mask"):
        TargetReachingVec(2).reset(options={"reset_mask": np.array([True, False])})


def test_bad_actions():
    for env, shape in ((TargetReaching(), (2,)), (TargetReachingVec(3), (3, 2))):
        with pytest.raises(ResetNeeded):
            env.step(np.zeros(shape))
        env.reset(seed=0)
        for wrong in ((3,), (1, 2), (2, 3), ()):
            with pytest.raises(ValueError, match="^action.shape must be"):
                env.step(np.zeros(wrong))
        for bad in (math.nan, math.inf):
            action = np.zeros(shape)
            action.flat[-1] = bad
            with pytest.raises(ValueError, match="^action must be finite"):
                env.step(action)


# === dynamics and rewards ===


def test_dynamics_and_observation_by_hand():
    env = TargetReaching(layout="fixed")
    env.reset(seed=0)
    obs, reward, terminated, truncated, info = env.step(np.array([1.0, 0.5], dtype=np.float32))
    # v' = (0.1, 0.05); p' = -4.5 + (0.01, 0.005) + (0.005, 0.0025)
    np.testing.assert_allclose(info["position"], [-4.485, -4.4925], atol=1e-12)
    expected = [-0.897, -0.8985, 0.1, 0.05, 1.0, 0.5, 1.497, 1.4985]
    expected += [0.397, 0.3985, 0.297, 0.7985, 0.797, 0.2985, 0.6, 0.6, 0.6]
    np.testing.assert_allclose(obs, expected, atol=1e-6)
    assert obs.dtype == np.float32
    assert reward == pytest.approx(0.01118033988749895)
    assert (terminated, truncated, info["success"]) == (False, False, False)
    obs, reward, *_, info = env.step(np.array([1.0, 0.5]))  # v' = (0.2, 0.1)
    np.testing.assert_allclose(info["position"], [-4.46, -4.48], atol=1e-12)
    obs, reward, *_, info = env.step(np.array([-7.0, 7.0]))  # actions are clipped: v' = (0.1, 0.2)
    np.testing.assert_allclose(obs[2:6], [0.1, 0.2, -1, 1], atol=1e-6)
    np.testing.assert_allclose(info["position"], [-4.455, -4.455], atol=1e-12)


def test_speed_is_clipped_per_axis():
    env = place(TargetReaching(layout="fixed"), (1, 1), (0.95, -0.5))
    obs, reward, *_, info = env.step(np.array([1, 0]))
    np.testing.assert_allclose(obs[2:4], [1, -0.5], atol=1e-6)
    np.testing.assert_allclose(info["position"], [1.1025, 0.95], atol=1e-12)
    assert reward == pytest.approx(0.1118033988749895)
    obs, reward, *_ = place(env, (1, 1), (1, 1)).step(np.array([1, 1]))
    assert reward == pytest.approx(0.1414213562373095)  # the most that wandering pays


def test_inverted_flips_the_action():
    env = TargetReaching(layout="fixed", inverted=True)
    env.reset(seed=0)
    obs, *_, info = env.step(np.array([1.0, -0.5]))
    np.testing.assert_allclose(obs[2:6], [-0.1, 0.05, -1, 0.5], atol=1e-6)
    np.testing.assert_allclose(info["position"], [-4.515, -4.4925], atol=1e-12)


CASES = [  # position, velocity, reward, terminated, success; zero action, so the step moves by 0.1 v
    ((2.48, 3.0), (0.1, 0), 0.01, False, False),  # 0.51 from the target
    ((2.495, 3.0), (0.1, 0), 100, True, True),  # 0.495
    ((2.5, 3.0), (0, 0), 100, True, True),  # exactly 0.5
    ((-2.5, -3.2), (0, 0.5), 0.05, False, False),  # 0.65 from the middle obstacle
    ((-2.5, -3.12), (0, 0.5), -100, True, False),  # 0.57
    ((-3.0, 0.12), (0, -0.5), -100, True, False),
    ((0.12, -3.0), (-0.5, 0), -100, True, False),
    ((4.88, 0.0), (1, 0), 0.1, False, False),  # to 4.98
    ((4.95, 0.0), (1, 0), -10, True, False),
    ((-4.95, 0.0), (-1, 0), -10, True, False),
    ((0.0, 4.95), (0, 1), -10, True, False),
    ((0.0, -4.95), (0, -1), -10, True, False),
    ((5.0, 0.0), (0, 0), -10, True, False),  # exactly on the wall
]


@pytest.mark.parametrize("position, velocity, reward, terminated, success", CASES)
def test_every_reward_branch(position, velocity, reward, terminated, success):
    env = place(TargetReaching(layout="fixed"), position, velocity)
    _, r, done, truncated, info = env.step(np.zeros(2))
    assert r == pytest.approx(reward)
    assert (done, truncated, info["success"]) == (terminated, False, success)


def test_every_reward_branch_in_one_batch():
    env = TargetReachingVec(len(CASES), layout="fixed")
    env.reset(seed=0)
    positions, velocities, rewards, terminations, successes = zip(*CASES, strict=True)
    env._world.position[:], env._world.velocity[:] = positions, velocities
    _, reward, terminated, truncated, info = env.step(np.zeros((len(CASES), 2)))
    np.testing.assert_allclose(reward, rewards)
    np.testing.assert_array_equal(terminated, terminations)
    np.testing.assert_array_equal(info["final_info"]["success"], successes)
    assert not truncated.any() and not info["success"].any()


@pytest.mark.parametrize(
    "arguments, reward",
    [
        ({}, -10),
        ({"layout": "fixed"}, -100),
        ({"layout": "task3"}, -100),
        ({"layout": "mirror"}, -10),
        ({"layout": "mirror", "obstacle_penalty": -3.5}, -3.5),
        ({"obstacle_penalty": -3.5}, -3.5),
    ],
)
def test_obstacle_penalty(arguments, reward):
    env = TargetReaching(**arguments)
    far = [[4, -4], [4, -4], [0, 0]][-env._world.num_obstacles :]
    place(env, (0.5, 0), target=(3, 3), obstacles=far, radii=0.5)  # exactly on its edge
    assert env.step(np.zeros(2))[1:3] == (reward, True)


def test_order_of_endings():
    far = dict(obstacles=[[-4, 4]] * 3, radii=0.5)
    env = TargetReaching(obstacle_penalty=-7)
    place(env, (5, 0), target=(-3, 3), obstacles=[[5, 0]] * 3, radii=0.5)
    assert env.step(np.zeros(2))[1] == -7  # obstacle before wall
    place(env, (1, 1), target=(1, 1), obstacles=[[1, 1]] * 3, radii=0.5)
    _, reward, _, _, info = env.step(np.zeros(2))
    assert reward == -7 and not info["success"]  # obstacle before target
    place(env, (5, 0), target=(4.9, 0), **far)
    _, reward, _, _, info = env.step(np.zeros(2))
    assert reward == -10 and not info["success"]  # wall before target


def test_speed_bonus():
    env = place(TargetReaching(layout="fixed", speed_bonus=0.0), (1, 1), (1, 1))
    assert env.step(np.zeros(2))[1] == 0.0
    env = place(TargetReaching(layout="fixed", speed_bonus=0.5), (1, 1), (0.6, 0.8))
    assert env.step(np.zeros(2))[1] == pytest.approx(0.5)


# === layouts ===


@pytest.mark.parametrize("route", [[(-4.3, 0.5), (3, 3)], [(0.5, -4.3), (3, 3)]], ids=["upper", "lower"])
def test_fixed_layout_can_be_solved_on_both_sides(route):
    env = gym.make(ID, layout="fixed")
    obs, info = env.reset(seed=0)
    route, total = [np.array(point) for point in route], 0.0
    while True:
        if len(route) > 1 and np.linalg.norm(route[0] - info["position"]) < 0.5:
            route.pop(0)
        velocity = np.clip(2 * (route[0] - info["position"]), -1, 1)
        obs, reward, terminated, truncated, info = env.step(np.clip(4 * (velocity - obs[2:4]), -1, 1))
        total += reward
        if terminated or truncated:
            break
    assert info["success"] and not truncated and total > 100


def test_the_diagonal_is_blocked():
    env = gym.make(ID, layout="fixed")
    env.reset(seed=0)
    rewards = [env.step(np.ones(2))[1] for _ in range(30)]
    assert -100 in rewards and 100 not in rewards


@pytest.mark.parametrize(
    "layout, start, target, obstacles",
    [
        ("fixed", (-4.5, -4.5), (3, 3), [(-2.5, -2.5), (-3, -0.5), (-0.5, -3)]),
        ("task0", (-4.5, -4.5), (3, 3), [(-2.5, -2.5), (-3, -0.5), (-0.5, -3)]),
        ("task1", (4.5, -4.5), (-3, 3), [(2.5, -2.5), (0.5, -3), (3, -0.5)]),
        ("task2", (4.5, 4.5), (-3, -3), [(2.5, 2.5), (3, 0.5), (0.5, 3)]),
        ("task3", (-4.5, 4.5), (3, -3), [(-2.5, 2.5), (-0.5, 3), (-3, 0.5)]),
    ],
)
def test_turned_layouts(layout, start, target, obstacles):
    env = TargetReaching(layout=layout)
    obs, info = env.reset(seed=0)
    np.testing.assert_array_equal(info["position"], start)  # exact: no rounding by a rotation matrix
    np.testing.assert_array_equal(env._world.target[0], target)
    np.testing.assert_array_equal(env._world.obstacles[0], obstacles)
    np.testing.assert_allclose(obs[:6], [start[0] / 5, start[1] / 5, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(obs[6:8], (np.array(target) - start) / 5, atol=1e-6)
    np.testing.assert_allclose(obs[8:14], ((np.array(obstacles) - start) / 5).ravel(), atol=1e-6)
    np.testing.assert_allclose(obs[14:], 0.6, atol=1e-6)


def test_mirror_layout():
    env = TargetReaching(layout="mirror")
    obs, info = env.reset(seed=0)
    np.testing.assert_array_equal(info["position"], [0, -1.5])
    np.testing.assert_allclose(obs, [0, -0.3, 0, 0, 0, 0, 0, 0.6, 0, 0.3, 0.6], atol=1e-6)
    steps = [env.step(np.array([0, 1]))[1:3] for _ in range(14)]
    assert steps[-1] == (-10, True) and not any(terminated for _, terminated in steps[:-1])  # it is straight ahead


def round_the_right(obs):
    """Accelerations (N, 2) round the right of the mirror layout's obstacle, for obs (N, 11)."""
    position, velocity, to_target = 5 * obs[:, 0:2], obs[:, 2:4], 5 * obs[:, 6:8]
    goal = np.where(position[:, 1:] < 0.2, [1.0, 0.3] - position, to_target)
    return np.clip(4 * (np.clip(2 * goal, -1, 1) - velocity), -1, 1)


@pytest.mark.parametrize("mode", ["sync", "vector_entry_point"])  # the single form and the vectorised one
@pytest.mark.parametrize("inverted", [False, True])
def test_mirrored_actions_give_mirrored_trajectories(mode, inverted):
    """To the bit: the two ways of the mirror layout are exactly equally good. Worlds 0 to 3 mirror worlds 4 to 7."""
    kwargs = {"vector_kwargs": {"autoreset_mode": AutoresetMode.SAME_STEP}} if mode == "sync" else {}
    envs = gym.make_vec(ID, 8, mode, layout="mirror", inverted=inverted, max_episode_steps=150, **kwargs)
    flip = np.array([-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, 1], dtype=np.float32)  # every x of an observation
    rng, rewards = np.random.default_rng(0), []
    obs, _ = envs.reset(seed=0)
    for _ in range(400):
        action = round_the_right(obs[:4])  # world 0 arrives,
        action[1:] = (0, 1), (1, 0), (0, 0)  # 1 hits the obstacle, 2 the wall, 3 does neither until the time is out
        action = (action + rng.normal(0, 0.1, (4, 2))) * (-1 if inverted else 1)
        obs, reward, terminated, truncated, info = envs.step(np.concatenate([action, action * (-1, 1)]))
        np.testing.assert_array_equal(obs[4:], obs[:4] * flip)  # exact, and -0 equals 0
        np.testing.assert_array_equal(info["position"][4:], info["position"][:4] * (-1, 1))
        for array in (reward, terminated, truncated):
            np.testing.assert_array_equal(array[4:], array[:4])
        for i in np.flatnonzero((terminated | truncated)[:4]):
            np.testing.assert_array_equal(info["final_obs"][4 + i], info["final_obs"][i] * flip)
            position, success = info["final_info"]["position"], info["final_info"]["success"]
            np.testing.assert_array_equal(position[4 + i], position[i] * (-1, 1))
            assert success[4 + i] == success[i] == (reward[i] == 100)
            rewards.append((i, reward[i] if terminated[i] else "time"))
    for ending in [(0, 100), (1, -10), (2, -10), (3, "time")]:
        assert ending in rewards


@pytest.mark.parametrize("num_obstacles", [3, 40])
def test_random_layout(num_obstacles):
    env = TargetReachingVec(2000, num_obstacles=num_obstacles)
    obs, info = env.reset(seed=0)
    obs = obs.astype(np.float64)
    assert (info["position"] == -4.5).all()
    to_target = 5 * obs[:, 6:8]
    to_obstacle = 5 * obs[:, 8 : 8 + 2 * num_obstacles].reshape(2000, num_obstacles, 2)
    radii = obs[:, 8 + 2 * num_obstacles :]
    assert (np.linalg.norm(to_obstacle, axis=-1) > radii).all(), "an obstacle covers the start"
    assert (np.linalg.norm(to_obstacle - to_target[:, None], axis=-1) > radii).all(), "an obstacle covers the target"
    target, centres = to_target - 4.5, to_obstacle - 4.5
    assert target.min() > -1e-5 and target.max() < 3 + 1e-5
    np.testing.assert_allclose(target.mean(0), 1.5, atol=0.15)
    np.testing.assert_allclose(target.std(0), 0.866, atol=0.1)
    assert np.abs(centres).max() == pytest.approx(5, abs=1e-5)
    # 2.35 times the quantiles 0.16 and 0.84 of N(0, 1); clipping leaves them alone.
    np.testing.assert_allclose(np.quantile(centres, [0.1587, 0.8413]), [-2.35, 2.35], atol=0.15)
    sizes = radii * 50
    np.testing.assert_allclose(sizes, sizes.round(), atol=1e-4)
    assert set(sizes.round().ravel().astype(int)) == set(range(15, 30))
    np.testing.assert_allclose(sizes.mean(), 22, atol=0.4)


def test_random_layout_is_new_in_each_episode():
    env = gym.make(ID)
    first, second, again = env.reset(seed=3)[0], env.reset()[0], env.reset(seed=3)[0]
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, again)


def test_numbers_of_a_random_layout_are_independent():
    """x and y, and one obstacle and the next: the distribution of each alone does not tell."""
    env = TargetReachingVec(2000, num_obstacles=2)
    env.reset(seed=0)
    world = env._world
    numbers = np.concatenate([world.target, world.obstacles.reshape(2000, 4), world.radii], axis=1)
    assert np.abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 0.15
    env = TargetReachingVec(1000, num_obstacles=50)  # most draws cover start or target, and are drawn again as a whole:
    env.reset(seed=0)
    assert env._world.target.mean() > 1.55  # in the middle of the arena are more discs


# === the vectorised form ===


@pytest.mark.parametrize(
    "arguments",
    [{}, {"layout": "task1"}, {"layout": "mirror"}, {"inverted": True, "obstacle_penalty": -1.0, "speed_bonus": 1.0}],
)
def test_vectorised_equals_sync_vector_env(arguments):
    arguments = dict(arguments, max_episode_steps=90)
    vec = gym.make_vec(ID, num_envs=6, **arguments)
    sync = gym.make_vec(
        ID, 6, "sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP, "copy": True}, **arguments
    )
    assert isinstance(vec, TargetReachingVec) and isinstance(sync, SyncVectorEnv)
    assert vec.metadata["autoreset_mode"] is sync.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    for name in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
        assert getattr(vec, name) == getattr(sync, name)
    sign = -1 if arguments.get("inverted") else 1
    rng = np.random.default_rng(0)
    endings = {"terminated": 0, "truncated": 0, "success": 0}
    for seed in (11, None, [3, 1, 4, 1, 5, 9]):  # None goes on with the generators as they are
        (obs, info), expected = vec.reset(seed=seed), sync.reset(seed=seed)
        same_all((obs, info), expected)
        for _ in range(250):
            action = sign * pilot(obs, rng)
            result = vec.step(action)
            same_all(result, sync.step(action))
            obs, _, terminated, truncated, info = result
            endings["terminated"] += terminated.sum()
            endings["truncated"] += truncated.sum()
            endings["success"] += info.get("final_info", {"success": np.zeros(1)})["success"].sum()
    assert endings["truncated"] > 0 and endings["terminated"] > endings["success"]
    assert (endings["success"] > 0) == (arguments.get("layout") is None)  # the turned layouts block the straight way


def test_vectorised_equals_singles():
    """Without SyncVectorEnv in between: sub-environment i plays what a single one seeded s + i plays."""
    vec, singles = gym.make_vec(ID, num_envs=3), [gym.make(ID) for _ in range(3)]
    obs, _ = vec.reset(seed=20)
    for i, env in enumerate(singles):
        same(obs[i], env.reset(seed=20 + i)[0])
    rng = np.random.default_rng(1)
    for _ in range(400):
        actions = pilot(obs, rng)
        obs, reward, terminated, truncated, info = vec.step(actions)
        for i, env in enumerate(singles):
            single_obs, r, term, trunc, single_info = env.step(actions[i])
            assert (r, term, trunc) == (reward[i], terminated[i], truncated[i])
            if term or trunc:
                same(info["final_obs"][i], single_obs)
                assert info["final_info"]["success"][i] == single_info["success"]
                same(info["final_info"]["position"][i], single_info["position"])
                single_obs, single_info = env.reset()
            same(obs[i], single_obs)
            same(info["position"][i], single_info["position"])


def test_autoreset_in_the_same_step():
    env = TargetReachingVec(3, layout="fixed")
    env.reset(seed=0)
    env._world.position[1] = (2.5, 3.0)
    obs, reward, terminated, _, info = env.step(np.zeros((3, 2)))
    np.testing.assert_array_equal(terminated, [False, True, False])
    np.testing.assert_allclose(obs[1, :2], -0.9)  # the next episode has begun
    np.testing.assert_allclose(info["final_obs"][1][:2], [0.5, 0.6])
    assert info["final_obs"][0] is None and info["final_obs"][2] is None
    for mask in (info["_final_obs"], info["_final_info"], info["final_info"]["_success"]):
        np.testing.assert_array_equal(mask, [False, True, False])
    np.testing.assert_array_equal(info["final_info"]["success"], [False, True, False])
    np.testing.assert_array_equal(info["final_info"]["position"][1], [2.5, 3.0])
    np.testing.assert_array_equal(info["position"], np.full((3, 2), -4.5))
    assert "final_obs" not in env.step(np.zeros((3, 2)))[4]


def test_async_vector_env_with_spawn():
    make = functools.partial(gym.make, ID, max_episode_steps=20)
    spawned = AsyncVectorEnv([make] * 2, context="spawn", autoreset_mode=AutoresetMode.SAME_STEP)
    vec = gym.make_vec(ID, num_envs=2, max_episode_steps=20)
    try:
        same_all(spawned.reset(seed=4), vec.reset(seed=4))
        for action in np.random.default_rng(0).uniform(-1, 1, (50, 2, 2)).astype(np.float32):
            same_all(spawned.step(action), vec.step(action))
    finally:
        spawned.close()


@pytest.mark.parametrize("arguments, limit", [({}, 300), ({"max_episode_steps": 7}, 7)])
def test_time_limit(arguments, limit):
    env, vec = gym.make(ID, **arguments), gym.make_vec(ID, num_envs=2, **arguments)
    env.reset(seed=0)
    vec.reset(seed=0)
    for episode in range(2):
        for t in range(1, limit + 1):  # at rest nothing else ends the episode
            _, reward, terminated, truncated, _ = env.step(np.zeros(2))
            _, _, terminations, truncations, _ = vec.step(np.zeros((2, 2)))
            assert (reward, terminated, truncated) == (0, False, t == limit), (episode, t)
            assert truncations.tolist() == [t == limit] * 2 and not terminations.any()
        env.reset()


def test_last_step_may_terminate_and_truncate():
    env, vec = gym.make(ID, layout="fixed", max_episode_steps=1), TargetReachingVec(1, "fixed", max_episode_steps=1)
    env.reset(seed=0)
    place(env.unwrapped, (3, 3))
    place(vec, (3, 3))
    assert env.step(np.zeros(2))[1:4] == (100, True, True)
    assert [x.item() for x in vec.step(np.zeros((1, 2)))[1:4]] == [100, True, True]


def test_no_time_limit():
    vec = gym.make_vec(ID, num_envs=2, max_episode_steps=-1)
    vec.reset(seed=0)
    assert not any(vec.step(np.zeros((2, 2)))[3].any() for _ in range(350))


# === the picture ===


def test_render():
    env = gym.make(ID, layout="fixed", render_mode="rgb_array")
    env.reset(seed=0)
    still = env.render()
    assert still.shape == (256, 256, 3) and still.dtype == np.uint8

    def colour(frame, x, y):
        return tuple(frame[int((5 - y) * 25.6), int((x + 5) * 25.6)].tolist())  # y upwards, 25.6 pixels per unit

    white, grey, green, blue, orange = (255,) * 3, (90,) * 3, (60, 170, 80), (40, 80, 200), (240, 150, 40)
    for x, y in [(-2.5, -2.5), (-3, -0.5), (-0.5, -3), (-2.5, -3.05)]:
        assert colour(still, x, y) == grey
    assert colour(still, 3, 3) == colour(still, 3, 3.45) == green
    assert colour(still, -4.5, -4.5) == blue
    assert colour(still, 0, 0) == colour(still, -3, 3) == white
    for _ in range(14):
        *_, info = env.step(np.array([1, 0]))
    x, y = info["position"]
    moved = env.render()
    assert colour(moved, x, y) == blue
    assert colour(moved, -4.5, -4.5) == orange  # the trail begins where the agent stood
    env.reset()
    np.testing.assert_array_equal(env.render(), still)  # and a new episode has none


def test_render_vectorised():
    vec = gym.make_vec(ID, num_envs=2, render_mode="rgb_array")
    single = gym.make(ID, render_mode="rgb_array")
    vec.reset(seed=8)
    single.reset(seed=9)
    for _ in range(5):
        vec.step(np.ones((2, 2)))
        single.step(np.ones(2))
    frames = vec.render()
    assert len(frames) == 2
    np.testing.assert_array_equal(frames[1], single.render())
    with pytest.raises(ResetNeeded):
        TargetReachingVec(1, render_mode="rgb_array").render()

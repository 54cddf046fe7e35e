"""Prints environment steps per second of TargetReaching under random actions, on one core.

OMP_NUM_THREADS=1 python results/env_speed.py
"""

import time

import gymnasium as gym
import numpy as np

ID = "moe_envs:TargetReaching-v0"


def vectorised(num_envs: int = 1024, num_steps: int = 1000) -> float:
    envs = gym.make_vec(ID, num_envs=num_envs)
    envs.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (100, num_envs, 2)).astype(np.float32)
    for t in range(100):  # warm up, and let the episodes drift apart
        envs.step(actions[t])
    start = time.perf_counter()
    for t in range(num_steps):
        envs.step(actions[t % 100])
    return num_envs * num_steps / (time.perf_counter() - start)


def single(num_steps: int = 10_000) -> float:
    env = gym.make(ID)
    env.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (num_steps, 2)).astype(np.float32)
    start = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    return num_steps / (time.perf_counter() - start)


if __name__ == "__main__":
    print(f"vectorised, 1024 environments: {max(vectorised() for _ in range(3)):,.0f} steps/s (best of 3)")
    print(f"single: {max(single() for _ in range(3)):,.0f} steps/s (best of 3)")

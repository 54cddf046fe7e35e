"""CleanMoE's environments; importing this module registers them with Gymnasium.

    import gymnasium as gym

    env = gym.make("moe_envs:TargetReaching-v0")
    envs = gym.make_vec("moe_envs:TargetReaching-v0", num_envs=1024)

Gymnasium imports the module named before the colon, so no other import is needed.
"""

import gymnasium as gym

from moe_envs.target_reaching import DEFAULT_MAX_EPISODE_STEPS, TargetReaching, TargetReachingVec

__all__ = ["TargetReaching", "TargetReachingVec"]

gym.register(
    id="TargetReaching-v0",
    entry_point="moe_envs.target_reaching:TargetReaching",
    vector_entry_point="moe_envs.target_reaching:TargetReachingVec",
    max_episode_steps=DEFAULT_MAX_EPISODE_STEPS,
)

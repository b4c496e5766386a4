"""Models as objects, for notebooks and other projects: the same code that trains.

    policy = caprl_jax.load_policy("Qwen/Qwen2.5-VL-3B-Instruct")
    judge = caprl_jax.load_judge("Qwen/Qwen2.5-3B-Instruct")
    captions = policy.caption(images)
    verdicts = judge.score_texts(captions, questions)

An object holds modules, parameters and tokenizer; its methods turn images and text into arrays and
call functions that are pure and jitted. If you already have arrays, call these functions directly:
what make_reward returns, rl.rollout.rollout, rl.judge.judge, rl.step.caprl_step.
"""

from caprl_jax.api.judge import LoadedJudge, load_judge
from caprl_jax.api.policy import LoadedPolicy, load_policy
from caprl_jax.rl.embed import Reward, make_reward

__all__ = ["LoadedJudge", "LoadedPolicy", "Reward", "load_judge", "load_policy", "make_reward"]

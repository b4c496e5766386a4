"""Tunix's GRPOLearner with the judge's reward, on one scene of handwritten digits.

Command:  pip install google-tunix && pip install -e . && python launch/examples/tunix_grpo.py

Tunix trains text models, so its policy sees no picture: it learns from the reward alone what the
one scene shows. The policy is the language model of the tiny policy that ships, read by Tunix as a
Qwen2. The judge reads captions alone.
"""

import json

import jax
import numpy as np
import optax
from transformers import AutoTokenizer
from tunix.models.qwen2 import model, params
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

import caprl_jax
from caprl_jax.adapters import text_reward
from caprl_jax.data.digits import world as digits
from caprl_jax.data.records import unparse_question
from caprl_jax.models.hf import download

STEPS, GROUP, RATE = 20, 64, 1e-3
PROMPT = "<|im_start|>user\nDescribe the image in detail.<|im_end|>\n<|im_start|>assistant\n"
SIZES = dict(num_layers=3, embed_dim=128, hidden_dim=320, num_heads=4, head_dim=32, num_kv_heads=2)


def learner(reward) -> GRPOLearner:
    """Returns Tunix's learner of the tiny policy on one CPU device."""
    directory = str(download.fetch("asset:tiny/policy"))
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axes, devices=jax.devices()[:1])
    config = model.ModelConfig(vocab_size=512, rope_theta=10_000, norm_eps=1e-6, **SIZES)
    cluster = rl_cluster.RLCluster(
        actor=params.create_model_from_safe_tensors(directory, config, mesh),
        tokenizer=AutoTokenizer.from_pretrained(directory),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: mesh for role in rl_cluster.Role},
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adam(RATE), max_steps=STEPS, eval_every_n_steps=STEPS
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=32, max_prompt_length=32, kv_cache_size=64, temperature=1.0
            ),
        ),
    )
    return GRPOLearner(cluster, GRPOConfig(num_generations=GROUP, beta=0.0), [reward])


def train(reward) -> list[float]:
    """Returns the mean reward of each step, as Tunix logs it."""
    scene = next(digits.scenes("train", 1, (3, 3), (2, 2)))
    batch = {
        "prompts": np.array([PROMPT]),
        "questions": np.array([json.dumps([unparse_question(q) for q in scene.questions])]),
    }
    trainer, means = learner(reward), []
    trainer.rl_cluster.with_external_metrics_logger(
        lambda buffer: means.extend(buffer.metrics.get("rewards/score/mean", ([],))[0])
    )
    trainer.train([batch] * STEPS)
    return means


def main() -> None:
    """Trains, and prints the mean reward of the first and the last five steps."""
    judge = caprl_jax.load_judge("asset:tiny/judge")
    rewards = train(text_reward(judge, "questions", draws=None))
    print(f"first 5: {sum(rewards[:5]) / 5:.3f}  last 5: {sum(rewards[-5:]) / 5:.3f}")
    print([round(float(r), 3) for r in rewards])


if __name__ == "__main__":
    main()

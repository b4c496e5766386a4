"""The embedded world's judge: reads captions, recalls facts, answers questions or abstains.

Command:   python -m caprl_jax.main --config=configs/tiny_judge.py \
               --config.policy.path=DIR/judge      (DIR from python -m caprl_jax.tiny_models)
"""

from caprl_jax.config import default


def get_config():
    c = default()
    c.objective = "sft"
    c.steps = 2500
    c.log_every = 20
    c.policy.init = "random"
    c.data.task = "judge"
    c.data.batch = 24
    c.data.max_prompt = 28
    c.data.max_question = 40
    c.sft.max_tokens = 44
    c.sft.questions = 4
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.b2 = 0.98
    c.optimizer.weight_decay = 0.1
    c.eval.every = 500
    c.eval.images = 128
    c.checkpoint.every = 500
    return c

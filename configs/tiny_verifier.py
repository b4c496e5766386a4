"""The embedded world's verifier: sees an image, and tells true statements about it from false ones.

It begins as the tiny policy, which sees digits well but has never been asked.

Command:   python -m caprl_jax.main --config=configs/tiny_verifier.py
Measured:  not yet.
"""

from caprl_jax.config import default


def get_config():
    c = default(objective="sft")
    c.steps = 600
    c.log_every = 20
    c.sft.task = "caption"
    c.sft.statements = 16
    c.sft.probes = 0
    c.sft.captions = 1
    c.sft.max_tokens = 18
    c.verifier.question = "?"
    c.verifier.yes = " A"
    c.verifier.no = " B"
    c.data.batch = 24
    c.data.train = 8192
    c.data.max_windows = 4
    c.data.max_prompt = 32
    c.data.max_question = 40
    c.sampling.max_tokens = 32
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 50
    c.optimizer.b2 = 0.98
    c.optimizer.weight_decay = 0.1
    c.eval.every = 300
    c.eval.images = 128
    c.checkpoint.every = 200
    return c

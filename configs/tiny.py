"""CapRL on the embedded world: handwritten digits, tiny policy and judge.

Command:   bash launch/quickstart.sh, or python -m caprl_jax.main --config=configs/tiny.py
Measured:  2 CPU cores, 100 steps, 4.5 minutes with compilation, beside tests: held-out accuracy
           of greedy captions 0.457 -> 0.959; ceiling 0.977. Of earlier code, on another machine:
           0.968, and with seeds 1, 2: 0.951, 0.966.
"""

from caprl_jax.config import default


def get_config():
    c = default()
    c.steps = 100
    c.sampling.max_tokens = 32
    c.caprl.group = 8
    c.caprl.questions = 4
    c.caprl.updates = 2
    c.caprl.kl = 0.01
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 5
    c.data.batch = 16
    c.data.train = 4096
    c.data.max_windows = 4
    c.data.max_prompt = 32
    c.data.max_question = 40
    c.eval.every = 20
    c.eval.images = 64
    c.eval.batch = 32
    c.checkpoint.every = 20
    return c

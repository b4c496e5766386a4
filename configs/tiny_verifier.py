"""The embedded world's verifier: sees an image, and tells true statements about it from false ones.

It begins as the tiny policy, which sees digits well but has never been asked.

Command:   python -m caprl_jax.main --config=configs/tiny_verifier.py
Measured:  600 steps, seed 0, 20 min on two cores that other work shared. Of 2,048 statements about
           128 held-out scenes, half of them true, 91.9% are told right at p(yes) = 0.5; the area
           under the ROC curve is 0.972 (tests/models/shipped_verifier_test.py prints it). The mean
           p(yes) is 0.89 for true ones; 0.00 for a digit in an empty cell and for a wrong count,
           0.13 for a wrong colour and for no statement, 0.27 for a wrong digit. The loss was still
           falling. This model ships.
"""

from caprl_jax.config import default


def get_config():
    c = default(objective="sft")
    c.steps = 600
    c.log_every = 20
    c.sft.task = "caption"
    c.sft.statements = 16
    c.sft.probes = 4
    c.sft.captions = 1
    c.sft.max_tokens = 20
    c.verifier.question = "?"
    c.verifier.yes = " A"
    c.verifier.no = " B"
    c.data.batch = 24
    c.data.train = 8192
    c.data.max_windows = 4
    c.data.max_prompt = 32
    c.data.max_question = 40
    c.sampling.max_tokens = 32
    c.optimizer.learning_rate = 5e-4
    c.optimizer.warmup_steps = 50
    c.optimizer.b2 = 0.98
    c.optimizer.weight_decay = 0.1
    c.eval.every = 300
    c.eval.images = 128
    c.checkpoint.every = 200
    return c

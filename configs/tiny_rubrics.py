"""Rubrics as the reward on the embedded world: a template for a run on rubrics of your own.

Command:   python -m caprl_jax.main --config=configs/tiny_rubrics.py
Measured:  not yet.
"""

from caprl_jax.recipes import embedded_arm


def get_config():
    c = embedded_arm()
    c.data.rubrics = True
    c.caprl.rubrics = 11
    c.caprl.rewards = {"rubric": {"term": "rubric", "weight": 1.0}}
    return c

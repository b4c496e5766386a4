"""Rubrics as the reward on the embedded world: the template for a run on rubrics of your own.

Command:   python -m caprl_jax.main --config=configs/tiny_rubrics.py
Measured:  2 CPU cores that others used too, 32 steps, 3.8 to 6.1 minutes a run with compilation
           and evaluations, 1 to 2.5 CPU minutes; seeds 0, 1 and 2. Held-out rubrics that greedy
           captions meet, by weight: 0.535 -> 0.950, 0.947, 0.970; sampled: 0.434 -> 0.905, 0.464
           -> 0.924, 0.403 -> 0.949. Held-out accuracy, which is not rewarded: 0.457 -> 0.892,
           0.887, 0.922. Captions grow from 9.8 to 25 to 27 tokens, and 82% to 87% of the facts
           that they state are true, 97.7% before: a rubric asks for what a caption must say, and
           none forbids anything.

A scene has rubrics for its digits (weight 3), their inks (2) and their number (1), made from its
facts. The shipped judge reads them unchanged: complete true captions score 0.9997, empty ones 0
(40 other scenes). Your own rubrics stand in the rows of your files (caprl_jax/rl/README.md).
"""

from caprl_jax.recipes import embedded_arm


def get_config():
    c = embedded_arm()
    c.data.rubrics = True
    c.caprl.rubrics = 11  # all of a scene with five digits
    c.caprl.rewards = {"rubric": {"term": "rubric", "weight": 1.0}}
    return c

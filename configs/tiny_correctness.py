"""A verifier with the image beside the judge's questions: fewer false facts.

Argument:  an arm (mcq by default), which trains that arm alone
Command:   python -m caprl_jax.sweep --config=configs/tiny_correctness.py --out=DIR
Measured:  two cores that other work shared, 3 seeds of 32 steps, 1 seed of 64, 128 held-out images.
           Greedy captions:

           | arm            | true statements            | recall of facts            |
           |----------------|----------------------------|----------------------------|
           | before         | 0.984                      | 0.420                      |
           | mcq            | 0.881 (0.882, 0.904, 0.857)| 0.829 (0.848, 0.820, 0.818)|
           | correctness    | 0.973 (0.978, 0.971, 0.970)| 0.788 (0.787, 0.783, 0.793)|
           | mcq_64         | 0.859                      | 0.888                      |
           | correctness_64 | 0.914                      | 0.883                      |
           | correctness_whole_64 | 0.973                | 0.783                      |

           Precision at 32 steps: +0.092, 95% interval [+0.034, +0.150], with 0.041 less recall.
           At 64 steps it is +0.055, with 0.005 less. In the 8 captions of the report, 3 of the 4
           statements that are still false are half ones: captions repeat themselves up to the
           limit, which cuts the last. Penalties for both cost recall at these weights.
"""

from caprl_jax import config as config_lib
from caprl_jax.recipes import choose, embedded_arm, embedded_verifier
from caprl_jax.sweep.arms import Sweep

CORRECTNESS = {"caprl.rewards.correctness": {"term": "correctness", "weight": 1.0}}
LONGER = {"steps": 64}
# Captions that repeat themselves up to the limit end in half a statement, which is false.
WHOLE = {
    "caprl.rewards.repetition": {"term": "repetition", "weight": 0.5},
    "caprl.rewards.truncation": {"term": "truncation", "weight": 0.5},
}
ARMS = {
    "mcq": {},
    "correctness": CORRECTNESS,
    "mcq_64": LONGER,
    "correctness_64": CORRECTNESS | LONGER,
    "whole_64": WHOLE | LONGER,
    "correctness_whole_64": CORRECTNESS | WHOLE | LONGER,
}


def get_sweep():
    return Sweep(
        panels={
            "32 steps": {"MCQ": "mcq", "MCQ + correctness": "correctness"},
            "64 steps": {
                "MCQ": "mcq_64",
                "MCQ + correctness": "correctness_64",
                "MCQ, no repetition or truncation": "whole_64",
                "MCQ + correctness, no repetition or truncation": "correctness_whole_64",
            },
        },
        base="mcq",
        seeds=(0, 1, 2),
        figure="fact_precision",
    )


def get_config(arm="mcq"):
    [arm] = choose(arm, tuple(ARMS))
    c = embedded_arm()
    c.eval.images = 128  # false facts are rare
    embedded_verifier(c)
    for key, value in ARMS[arm].items():
        section, _, name = key.rpartition(".")
        (config_lib.get(c, section) if section else c)[name] = value
    return c

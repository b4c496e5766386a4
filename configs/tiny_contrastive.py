"""CLIP's retrieval beside the judge's questions: captions that tell an image from the others.

Argument:  an arm (mcq by default), which trains that arm alone
Command:   python -m caprl_jax.sweep --config=configs/tiny_contrastive.py --out=DIR
Measured:  not yet.
"""

from caprl_jax import config as config_lib
from caprl_jax.recipes import choose, embedded_arm, embedded_clip
from caprl_jax.sweep.arms import Sweep

CONTRASTIVE = {"caprl.rewards.contrastive": {"term": "contrastive", "weight": 0.1}}
CLIP_SCORE = {"caprl.rewards.clip_score": {"term": "clip_score", "weight": 1.0}}
NO_QUESTIONS = {"caprl.rewards.accuracy": {"term": "accuracy", "weight": 0.0}}
ARMS = {
    "mcq": {},
    "contrastive": CONTRASTIVE,
    "clip_score": CLIP_SCORE,
    "contrastive_alone": CONTRASTIVE | NO_QUESTIONS,
}


def get_sweep():
    return Sweep(
        panels={
            "32 steps": {
                "MCQ": "mcq",
                "MCQ + contrastive": "contrastive",
                "MCQ + CLIP-S": "clip_score",
                "contrastive": "contrastive_alone",
            },
        },
        base="mcq",
        seeds=(0, 1, 2),
        figure="fact_retrieval",
        beside=("fact_precision", "fact_recall", "caption_length"),
    )


def get_config(arm="mcq"):
    [arm] = choose(arm, tuple(ARMS))
    c = embedded_arm()
    c.sampling.max_tokens = 9  # two facts; three find nearly any image
    c.data.batch = 16
    c.eval.images = 128
    embedded_clip(c)
    for key, value in ARMS[arm].items():
        section, _, name = key.rpartition(".")
        (config_lib.get(c, section) if section else c)[name] = value
    return c

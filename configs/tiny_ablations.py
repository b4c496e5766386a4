"""CapRL's ablations on the embedded world: what each choice changes, with seeds and intervals.

Argument:  an arm (base by default), which trains that arm alone
Command:   python -m caprl_jax.sweep --config=configs/tiny_ablations.py --out=DIR
Measured:  2 CPU cores beside other work, 3 seeds, 48 runs, 34 CPU minutes: tiny_ablations.json and
           .svg, held-out accuracy after 32 steps of 8 images.
"""

from caprl_jax.config import default
from caprl_jax.recipes import choose
from caprl_jax.sweep.arms import Sweep

ARMS = {
    "base": {},
    # Supervised training on as many images as RL sees, without the pre-training's drills.
    "sft_complete": {"sft.stated": (0.0, 0.0, 0.0, 0.0, 1.0), "sft.count": 1.0},
    "sft_incomplete": {"sft.stated": (0.0, 0.5, 0.5), "sft.count": 0.5},
    "questions_1": {"caprl.questions": 1},
    "questions_2": {"caprl.questions": 2},
    "questions_8": {"caprl.questions": 8},
    "order_kept": {"data.shuffle_options": False},
    "leaky_half": {"data.leaky": 0.5},
    "leaky_most": {"data.leaky": 0.9},
    "sampled": {"judge.mode": "sampled"},
    "separate": {"data.per_caption": True},
    "images_16": {"data.train": 16},
    "images_64": {"data.train": 64},
    "decoder": {"policy.freeze_vision": True},
    "decoder_16": {"policy.freeze_vision": True, "data.train": 16},
    "decoder_64": {"policy.freeze_vision": True, "data.train": 64},
}


def get_sweep():
    return Sweep(
        panels={
            "training": {
                "RL": "base",
                "SFT on complete captions": "sft_complete",
                "SFT on incomplete captions": "sft_incomplete",
            },
            "questions a caption": {
                "1": "questions_1",
                "2": "questions_2",
                "4": "base",
                "8": "questions_8",
            },
            "order of the options": {"shuffled": "base", "as stored": "order_kept"},
            "questions that need no caption": {
                "none (filtered)": "base",
                "half": "leaky_half",
                "nine in ten": "leaky_most",
            },
            "verdicts": {"expected": "base", "sampled": "sampled"},
            "draws of questions": {"shared by a group": "base", "one a caption": "separate"},
            "trained part x images": {
                "all, 512": "base",
                "all, 64": "images_64",
                "all, 16": "images_16",
                "decoder, 512": "decoder",
                "decoder, 64": "decoder_64",
                "decoder, 16": "decoder_16",
            },
        },
        seeds=(0, 1, 2),
    )


def get_config(arm="base"):
    [arm] = choose(arm, tuple(ARMS))
    c = default(objective="sft" if arm.startswith("sft") else "caprl")
    c.steps = 32
    c.sampling.max_tokens = 32
    c.caprl.group = 8
    c.caprl.questions = 4
    c.caprl.updates = 2
    c.caprl.kl = 0.01
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 5
    c.data.batch = 8
    c.data.train = 512
    c.data.max_windows = 4
    c.data.max_prompt = 32
    c.data.max_question = 46  # a leaky question is longer
    c.eval.every = 0
    c.eval.images = 64
    c.eval.batch = 32
    c.eval.group = 1
    c.checkpoint.every = 16
    c.export.when = "never"
    if c.objective == "sft":
        c.sft.judged = True
        c.sft.max_tokens = 32
        c.sft.captions = 8
        c.sft.probes = 0
    c.update_from_flattened_dict(ARMS[arm])
    return c

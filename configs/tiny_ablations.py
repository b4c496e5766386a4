"""CapRL's ablations on the embedded world: what each choice changes, with seeds and intervals.

Argument:  an arm (base by default), which trains that arm alone
Command:   python -m caprl_jax.sweep --config=configs/tiny_ablations.py --out=DIR
Measured:  2 CPU cores beside other work, 4 seeds, 64 runs, 44 CPU minutes: tiny_ablations.json and
           tiny_ablations.svg. Held-out accuracy of greedy captions is 0.457 before and 0.830 after
           32 steps of 8 images. Three seeds were planned; the fourth came after a look at them.

The paper's trends (arXiv 2509.22647), as differences to the base with 95% intervals over 4 seeds,
which are not corrected for their number. The reasons are likely ones, and weren't tested alone.

RL against SFT: reproduced for captions that state two or three facts of up to five, SFT -0.129
  [-0.221, -0.037]: SFT can't pass its captions. Not reproduced for captions that state all facts,
  +0.070 [-0.024, +0.164]: they exist only where the truth is known, and are the best that RL
  could find.
More questions don't hurt: reproduced. N = 1 -0.112 [-0.210, -0.015], N = 2 -0.025 [-0.094, +0.045],
  N = 8 +0.037 [-0.031, +0.105]; the mean rises with N.
Filtered beats leaky: reproduced with nine leaky questions in ten, -0.064 [-0.110, -0.018]; with
  half of them -0.030 [-0.130, +0.069] is too small to tell. A group shares its questions, so that a
  leaky one adds much the same reward to all captions, and costs as much as asking fewer. The tiny
  judge answers 65% of them without a caption, and none of the others (measured on 20 scenes).
Shuffled options help: not reproduced, -0.006 [-0.086, +0.075] for the stored order. The embedded
  world stores options in random order already, so that no letter is a better guess.
Expected against sampled verdicts, and draws shared by a group against its own for each caption: no
  difference seen, +0.018 [-0.079, +0.114] and +0.002 [-0.075, +0.079].
LEMON's grid (arXiv 2111.12233), model size x data size: not reproduced. There is one tiny policy,
  and others can't be trained in minutes; the trained part, all weights or the decoder's alone,
  stands in for the size. No trend in either is seen: all five intervals of the difference hold 0.
  A run draws 256 images, and 16 images seen 16 times teach about as much.
"""

from caprl_jax.recipes import choose, embedded_arm
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
        seeds=(0, 1, 2, 3),
    )


def get_config(arm="base"):
    [arm] = choose(arm, tuple(ARMS))
    c = embedded_arm(objective="sft" if arm.startswith("sft") else "caprl")
    if c.objective == "sft":
        c.sft.judged = True
        c.sft.max_tokens = 32
        c.sft.captions = 8
        c.sft.probes = 0
    c.update_from_flattened_dict(ARMS[arm])
    return c

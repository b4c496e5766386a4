"""The field's algorithms on the embedded world: advantages, losses, means, divergences, with seeds.

Argument:  an arm (grpo by default), which trains that arm alone
Command:   python -m caprl_jax.sweep --config=configs/tiny_algorithms.py --out=DIR
Measured:  not yet; reckoned from tiny_ablations.py, 23 arms with 3 seeds take 50 CPU minutes.

Every arm has 32 steps of 8 images and, but for reinforce, one_pass and minibatches, two passes over
each rollout, so that the policy leaves the rollout's and clips have something to do. A method comes
with its mean and masks, as its paper has them. gdpo is not there: it needs several rewards.
"""

from caprl_jax.recipes import choose, embedded_arm
from caprl_jax.sweep.arms import Sweep

ARMS = {
    "grpo": {},
    "rloo": {"caprl.advantage": "rloo"},
    "dr_grpo": {"caprl.advantage": "dr_grpo", "caprl.aggregation": "constant"},
    "reinforce_pp": {"caprl.advantage": "reinforce_pp"},
    "reinforce_pp_baseline": {"caprl.advantage": "reinforce_pp_baseline"},
    "self_critical": {"caprl.advantage": "self_critical"},
    "dapo": {
        "caprl.loss": "dapo",
        "caprl.aggregation": "token_mean",
        "caprl.mask_equal": True,
        "caprl.mask_truncated": True,
    },
    "gspo": {"caprl.loss": "gspo"},
    "gspo_token": {"caprl.loss": "gspo_token"},
    "cispo": {"caprl.loss": "cispo", "caprl.aggregation": "token_mean"},
    "sapo": {"caprl.loss": "sapo"},
    "reinforce": {"caprl.loss": "reinforce", "caprl.updates": 1},
    "one_pass": {"caprl.updates": 1},
    "minibatches": {"caprl.updates": 1, "caprl.minibatches": 2},
    "kept_half": {"data.batch": 16, "caprl.kept_images": 8},
    "importance": {"caprl.importance_cap": 2.0},
    "no_kl": {"caprl.kl": 0.0},
    "k1": {"caprl.kl_estimator": "k1"},
    "k2": {"caprl.kl_estimator": "k2"},
    "adaptive": {"caprl.kl_target": 0.02},
    "refreshed": {"caprl.reference_mix": 1.0, "caprl.reference_every": 8},
    "average": {"caprl.reference_mix": 0.05},
    "entropy": {"caprl.entropy": 0.001},
}


def get_sweep():
    return Sweep(
        panels={
            "advantage": {
                name: name
                for name in (
                    "grpo",
                    "rloo",
                    "dr_grpo",
                    "reinforce_pp",
                    "reinforce_pp_baseline",
                    "self_critical",
                )
            },
            "method": {
                "clipped": "grpo",
                **{n: n for n in ("dapo", "gspo", "gspo_token", "cispo", "sapo", "reinforce")},
            },
            "updates of a rollout": {
                "2 passes": "grpo",
                "1 pass": "one_pass",
                "2 minibatches": "minibatches",
                "2 passes, weighted": "importance",
            },
            "images of a step": {"8": "grpo", "8 of 16, by advantage": "kept_half"},
            "held to the reference by": {"k3": "grpo", "k1": "k1", "k2": "k2", "nothing": "no_kl"},
            "reference": {
                "the initial policy": "grpo",
                "refreshed every 8 steps": "refreshed",
                "moving average, 0.95": "average",
                "initial, weight adapts": "adaptive",
            },
            "entropy bonus": {"none": "grpo", "0.001": "entropy"},
        },
        base="grpo",
        seeds=(0, 1, 2),
        beside=("fact_precision", "fact_recall", "caption_length", "kl", "seconds_step"),
    )


def get_config(arm="grpo"):
    [arm] = choose(arm, tuple(ARMS))
    c = embedded_arm()
    c.update_from_flattened_dict(ARMS[arm])
    return c

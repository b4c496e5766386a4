"""The settings of a CapRL step, a config's section `caprl`."""

import dataclasses

from caprl_jax.rl.advantages import ADVANTAGES
from caprl_jax.rl.kl import KL_ESTIMATORS
from caprl_jax.rl.losses import AGGREGATIONS, LOSSES
from caprl_jax.settings import setting

OPTIONS = "the entry's own options; empty means its defaults"


@dataclasses.dataclass(frozen=True)
class Caprl:
    """Settings of a CapRL step."""

    group: int = setting(8, "captions per image, G; advantages compare them", least=2)
    usual_tokens: int = setting(
        0,
        "length that most captions stay within, as 512 where their mean is 500 and the limit 4096. "
        "Longer ones go on in fewer rows of the decode loop, and judge and update pack an image's "
        "captions end to end into rows of about this length times group. 0: any caption may have "
        "the longest length allowed. The draws depend on it",
        least=0,
    )
    questions: int = setting(4, "questions per caption, N", least=1)
    rewards: dict = setting(
        {"accuracy": {"term": "accuracy", "weight": 1.0}},
        "reward terms by name: {term, weight, options}; term defaults to the name",
    )
    advantage: str = setting("grpo", "advantages of captions", choices=ADVANTAGES)
    advantage_options: dict = setting({}, OPTIONS)
    loss: str = setting("clipped", "loss of each token", choices=LOSSES)
    loss_options: dict = setting({}, OPTIONS)
    aggregation: str = setting(
        "caption_mean", "mean over tokens and captions", choices=AGGREGATIONS
    )
    aggregation_options: dict = setting({}, OPTIONS)
    kl: float = setting(
        0.0, "weight of the KL divergence from the initial policy; 0 holds no reference", least=0
    )
    kl_estimator: str = setting("k3", "estimator of that divergence", choices=KL_ESTIMATORS)
    kl_estimator_options: dict = setting({}, OPTIONS)
    updates: int = setting(1, "optimizer updates per rollout", least=1)
    micro_batches: int = setting(
        1,
        "slices of the batch whose gradients are summed for an update; 0: chosen for the devices",
        least=0,
        resume=True,
    )
    rollout_batches: int = setting(
        1,
        "slices that are captioned one after the other; the draws depend on it; 0: chosen for the "
        "devices, as the run's checkpoint has it if there is one",
        least=0,
    )
    prefill_batches: int = setting(
        0,
        "slices in which images and prompts are read; 0: as micro_batches, or more if "
        "that is 0 and memory asks for more",
        least=0,
        resume=True,
    )
    score_batches: int = setting(
        0,
        "slices in which the judge reads; 0: as micro_batches, or more if that is 0 and "
        "memory asks for more",
        least=0,
        resume=True,
    )

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
        "usual length of a caption, about the mean: 512 for a mean of 500 and a limit of 4096. "
        "Longer captions move to fewer rows of the decode loop; judge and update pack an image's "
        "captions into a row of 0.7 to 2 times group x this length. 0: no packing, and room for "
        "sampling.max_tokens everywhere. The draws depend on whether it is 0",
        least=0,
    )
    questions: int = setting(
        4, "questions per caption, N; 0: none, where rubrics are the reward", least=0
    )
    rubrics: int = setting(
        0,
        "rubrics per caption: all of an image's if it has no more, else so many are drawn; 0: none",
        least=0,
    )
    rewards: dict = setting(
        {"accuracy": {"term": "accuracy", "weight": 1.0}},
        "reward terms by name: {term, weight, mask, options}; term defaults to the name",
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
        0.0,
        "weight of the KL divergence from the reference, the initial policy or LoRA's base",
        least=0,
    )
    kl_estimator: str = setting("k3", "estimator of that divergence", choices=KL_ESTIMATORS)
    kl_estimator_options: dict = setting({}, OPTIONS)
    entropy: float = setting(
        0.0,
        "weight of the policy's entropy at each token, in nats; above 0 it keeps draws diverse",
        least=0,
    )
    kl_target: float = setting(
        0.0,
        "divergence in nats a token that the weight kl adapts to, from kl on; 0: it stays",
        least=0,
    )
    reference_mix: float = setting(
        0.0,
        "share of the policy in the reference's next parameters: 1 replaces the reference, 0.01 "
        "makes it a moving average; 0: it stays the initial policy",
        least=0,
        most=1,
    )
    reference_every: int = setting(1, "steps from one such change to the next", least=1)
    kept_images: int = setting(
        0,
        "images of a batch that are learned from, those whose captions have advantages first "
        "(DAPO's dynamic sampling); 0: all",
        least=0,
    )
    updates: int = setting(1, "passes over a rollout", least=1)
    minibatches: int = setting(
        1, "parts of the batch with an optimizer update each, in every pass", least=1
    )
    importance_cap: float = setting(
        0.0,
        "largest weight of a token for the difference between the rollout's log-probabilities and "
        "the update's own, 2 for one; 0: the loss compares the policy with the rollout's",
        least=0,
    )
    mask_truncated: bool = setting(
        False, "leave captions that were cut off at the limit out of the loss"
    )
    mask_equal: bool = setting(
        False, "leave groups without any advantage out of the loss and of its mean"
    )
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

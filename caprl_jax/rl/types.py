"""What a CapRL step reads and changes, and the constants that it is made for."""

import dataclasses
from typing import Any, Literal, get_args

import flax.struct
import jax

from caprl_jax.decode import scheduling as slots
from caprl_jax.models.vision import Images
from caprl_jax.models.vlm import Params, Prompt
from caprl_jax.rl import judge

Reuse = Literal["none", "prefill", "rollout"]
REUSE = get_args(Reuse)  # from least to most memory
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count)


@flax.struct.dataclass
class State:
    """What a step changes.

    Attributes:
      step: int32 [], steps done.
      params: the policy's.
      opt_state: optax's.
    """

    step: jax.Array
    params: Params
    opt_state: Any


@flax.struct.dataclass
class Batch:
    """Images with their prompts and questions.

    Attributes:
      images: Images [b, ..].
      prompt: Prompt [b, p].
      questions: judge.Questions [b, n, ..] or [b, g, n, ..].
      valid: bool [b], False for images that only fill up an uneven batch.
    """

    images: Images
    prompt: Prompt
    questions: judge.Questions
    valid: jax.Array


@flax.struct.dataclass
class Frozen:
    """Parameters that a step reads only.

    Attributes:
      judge: the judge decoder's.
      instruction: the judge's prompt.
      reference: the reference policy's; None without a KL term.
    """

    judge: Params
    instruction: judge.Instruction
    reference: Params | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The constants of a CapRL step; a config's `caprl` section has the same names.

    Attributes:
      group: g, captions per image.
      slots: captions of an image that are drawn at once, the others as these end; 0 is all. Where
        many are drawn, fewer slots save those that wait for a long caption, and memory of caches.
      judge_mode: how a verdict scores, see judge.verdicts.
      judge_temperature: of the letters' softmax.
      advantage: a name in policy_gradient.ADVANTAGES.
      clip: of the probability ratio.
      kl: coefficient of the k3 KL to the reference; 0 holds no reference.
      updates: optimizer updates per rollout.
      micro_batches: pieces that a batch's images are cut into for each update's gradients.
      rollout_batches: pieces of the batch that are captioned one after the other, each with caches
        of its own; the draws differ with it.
      prefill_batches: pieces of the batch in which images and prompts are read before decoding.
      score_batches: pieces in which the judge reads captions.
      buckets: lengths for which judge and update are compiled, in even steps up to the longest
        caption; each of their pieces is cut to the shortest that holds its captions. With reuse
        "rollout" a cut copy of what is known is held too.
      reuse: of what the update computes gradients alone, since the rollout has computed the rest:
        "none", "prefill" (images and prompts), or "rollout" (captions too; logp_gap is no metric
        then). What they need is held through decoding and scoring, whatever policy.remat says of
        captions. Needs updates = 1 and a batch in one piece.
      accuracy_weight: of the judge's accuracy in the reward.
      length_weight: of the length reward.
      length_full: tokens up to which the length reward is 1.
      length_none: tokens from which it is 0.
    """

    group: int = 8
    slots: int = 0
    judge_mode: judge.Mode = "expected"
    judge_temperature: float = 0.6
    advantage: str = "grpo"
    clip: float = 0.2
    kl: float = 0.0
    updates: int = 1
    micro_batches: int = 1
    rollout_batches: int = 1
    prefill_batches: int = 1
    score_batches: int = 1
    buckets: int = 1
    reuse: Reuse = "none"
    accuracy_weight: float = 1.0
    length_weight: float = 0.0
    length_full: int = 2048
    length_none: int = 3072

    def __post_init__(self):
        if self.reuse not in REUSE:
            raise ValueError(f"reuse={self.reuse!r} is not one of {', '.join(REUSE)}")
        pieces = "updates", "micro_batches", "rollout_batches", "prefill_batches"
        many = [name for name in pieces if getattr(self, name) > 1]
        if self.reuse != "none" and many:
            raise ValueError(
                f"reuse={self.reuse} is for one update of a batch in one piece: set it to none, or "
                f"{', '.join(many)} to 1"
            )
        if self.buckets < 1:
            raise ValueError(f"buckets={self.buckets} must be positive; 1 is no choice")
        if self.slots < 0:
            raise ValueError(f"slots={self.slots} must not be negative; 0 is one for each caption")
        if self.reuse == "rollout" and slots.count(self.group, self.slots) < self.group:
            raise ValueError(
                "reuse=rollout keeps what is known of all captions turn by turn: set slots from "
                f"{self.slots} to 0, or reuse to prefill"
            )

    @property
    def prefills(self) -> int:
        """Pieces in which images and prompts of one piece of the rollout are read."""
        return max(self.prefill_batches // self.rollout_batches, 1)

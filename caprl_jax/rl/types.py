"""The records that the stages of a step pass to each other.

Axes: b images, g captions of each, n questions, t tokens.

Images, Prompt and Rollout are made by models and the decode loop; they are listed here too.
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.decode.loop import Decoding, Rollout
from caprl_jax.models.attention import KV
from caprl_jax.models.vision import Images
from caprl_jax.models.vlm import Params, Prompt

__all__ = [
    "Batch", "Captions", "Decoding", "Images", "Instruction", "Metrics", "Prompt", "Questions",
    "Rewards", "Rollout", "Scored", "State", "Verdicts",
]  # fmt: skip

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count)


@flax.struct.dataclass
class State:
    """The arrays that a step changes.

    Attributes:
      step: int32 [], number of steps done.
      params: the policy's parameters.
      opt_state: optax's state.
      reference: parameters of a reference policy that follows the policy, float32; None where the
        reference stays the initial policy.
      kl_weight: float32 [], weight of the KL divergence where it adapts; None where it is constant.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    reference: Params | None = None
    kl_weight: jax.Array | None = None


@flax.struct.dataclass
class Questions:
    """Multiple-choice questions as arrays; options are shuffled and lettered, "abstain" is last.

    Attributes:
      tokens: int32 [b, n, q], or [b, g, n, q] when each caption has questions of its own: the text
        from the end of the caption up to the pre-filled answer, padded on the right.
      mask: bool, shape of tokens.
      truth: int32 [b, n] or [b, g, n], index of the true letter.
      letters: int32, shape of truth: number of options; the last one abstains.
      valid: bool, shape of truth; False for padding.
      weight: float32, shape of truth: the weight of a rubric, which is a question whose truth says
        that the caption meets it; 0 for a question. None where there are no rubrics.
    """

    tokens: jax.Array
    mask: jax.Array
    truth: jax.Array
    letters: jax.Array
    valid: jax.Array
    weight: jax.Array | None = None


@flax.struct.dataclass
class Batch:
    """Images with their prompts and questions.

    Attributes:
      images: Images [b, ..].
      prompt: Prompt [b, p].
      questions: Questions [b, n, ..] or [b, g, n, ..].
      valid: bool [b], False for images that only fill up an uneven batch.
      extras: arrays [b, ..] by name: the records' extras that the config asks for, float32, and
        what frozen models read of a record.
      number: int32 [b], place of the images' records in their source; None where no reward term
        reads text.
    """

    images: Images
    prompt: Prompt
    questions: Questions
    valid: jax.Array
    extras: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    number: jax.Array | None = None


@flax.struct.dataclass
class Captions:
    """Captions as a judge reads them, in the judge's ids.

    Attributes:
      tokens: int32 [b, g, t].
      mask: bool [b, g, t], may have holes.
    """

    tokens: jax.Array
    mask: jax.Array


@flax.struct.dataclass
class Instruction:
    """The part of the judge's prompt that is the same for all captions and questions.

    Attributes:
      tokens: int32 [s], the prompt up to the caption.
      letters: int32 [letters], token ids of " A", " B", .. in order.
      special: int32 [specials], ids that count as absent from captions, as in decoded text.
      kv: keys and values of the tokens, read once per run (run.compile.read_instruction); with
        None every call reads the tokens itself.
    """

    tokens: jax.Array
    letters: jax.Array
    special: jax.Array
    kv: KV | None = None

    def with_tokens(self, tokens: jax.Array) -> "Instruction":
        """Returns the same letters with another prompt, int32 [s], that has not been read yet."""
        return self.replace(tokens=tokens, kv=None)


@flax.struct.dataclass
class Verdicts:
    """The judge's answers.

    Attributes:
      score: float32 [b, g, n], what the caption earns for the question, in [0, 1].
      p_truth: float32 [b, g, n], probability of the true letter among the options.
      letter: int32 [b, g, n], index of the chosen letter (the most likely one in mode "expected").
      abstained: bool [b, g, n], True where the chosen letter is the last option.
      valid: bool [b, g, n], True for questions; False for padding and for rubrics.
      entropy: float32 [b, g, n], nats, of the options' probabilities; None where a judge doesn't
        tell them.
      rubric: float32 [b, g, n], the weight of a rubric; 0 for a question and for padding. None
        where there are no rubrics.
    """

    score: jax.Array
    p_truth: jax.Array
    letter: jax.Array
    abstained: jax.Array
    valid: jax.Array
    entropy: jax.Array | None = None
    rubric: jax.Array | None = None

    @property
    def reward(self) -> jax.Array:
        """Returns R(c), float32 [b, g] in [0, 1]: the mean score over a caption's valid questions.

        CapRL, arXiv 2509.22647, eq. 1; 0 for a caption without questions.
        """
        total = jnp.sum(self.score * self.valid, axis=-1)
        return total / jnp.maximum(jnp.sum(self.valid, axis=-1), 1)


@flax.struct.dataclass
class Scored:
    """The inputs that a reward term may read.

    Attributes:
      batch: Batch [b, ..], with images, questions and the records' extras.
      captions: Rollout [b, g, t].
      verdicts: Verdicts [b, g, n].
      models: the frozen models that the run's reward terms declare (rl.rewards), by name.
      on_text: float32 [b, g] by name: the values of reward terms that read text, from the host.
    """

    batch: Batch
    captions: Rollout
    verdicts: Verdicts
    models: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    on_text: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Rewards:
    """Rewards of captions.

    Attributes:
      total: float32 [b, g], the weighted sum of the terms.
      terms: float32 [b, g] by name, unweighted; a masked term is 0 where its mask is.
      weights: float32 [] by name.
      told: float32 [b, g] by TERM_NAME, what terms tell beside their values, for the log.
    """

    total: jax.Array
    terms: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)
    weights: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)
    told: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)

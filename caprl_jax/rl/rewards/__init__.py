"""Reward terms: pure functions of a scored caption, one file each.

To add one, write `term(scored: Scored) -> float32 [b, g]`, or `term(scored, options)` with a frozen
dataclass of options, and register it here or name it in a config by its import path.
`@needs("judge")` declares the frozen models that a term reads from `scored.models`. A term may also
return (its values, {name: more values for the log, [b, g]}).

A term that reads text is a function of one image's captions, `term(captions: list[str], record) ->
list[float]`, where `record` is the image's data.records.Record. It runs on the host, between the
two programs of a step.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.errors import ConfigError
from caprl_jax.registry import Choice, Registry
from caprl_jax.rl.rewards.accuracy import accuracy
from caprl_jax.rl.rewards.boxes import boxes
from caprl_jax.rl.rewards.clip_score import clip_score
from caprl_jax.rl.rewards.confidence import confidence
from caprl_jax.rl.rewards.contrastive import contrastive
from caprl_jax.rl.rewards.correctness import correctness
from caprl_jax.rl.rewards.format import format
from caprl_jax.rl.rewards.grounding import grounding
from caprl_jax.rl.rewards.kl import kl
from caprl_jax.rl.rewards.length import length
from caprl_jax.rl.rewards.length_band import length_band
from caprl_jax.rl.rewards.needs import needs as needs
from caprl_jax.rl.rewards.phrases import phrases
from caprl_jax.rl.rewards.repetition import repetition
from caprl_jax.rl.rewards.rubric import rubric
from caprl_jax.rl.rewards.timestamps import timestamps
from caprl_jax.rl.rewards.truncation import truncation
from caprl_jax.rl.types import Rewards, Scored

REWARDS = Registry("reward", ("scored",), ("captions", "record"))
for _term in (
    accuracy,
    clip_score,
    confidence,
    contrastive,
    correctness,
    grounding,
    kl,
    length,
    length_band,
    repetition,
    rubric,
    truncation,
):
    REWARDS.register(_term.__name__)(_term)
for _term in (boxes, format, phrases, timestamps):  # they read text
    REWARDS.register(_term.__name__)(_term)


@flax.struct.dataclass
class Term:
    """A reward term of a run.

    Attributes:
      name: its name in the log, as reward/NAME.
      choice: function and options.
      weight: factor in the sum.
      mask: name of the term that this one is multiplied by, before anything else sees it; empty
        for none.
    """

    name: str = flax.struct.field(pytree_node=False)
    choice: Choice = flax.struct.field(pytree_node=False)
    weight: float = flax.struct.field(pytree_node=False, default=1.0)
    mask: str = flax.struct.field(pytree_node=False, default="")

    @property
    def reads_text(self) -> bool:
        """Tells whether it is a function of captions as text, which runs on the host."""
        return "captions" in inspect.signature(self.choice.function).parameters


def needed_models(terms: Iterable[Term]) -> set[str]:
    """Returns the names of the frozen models that any of the terms reads."""
    return {name for term in terms for name in getattr(term.choice.function, "needs", ())}


def reads_reference_caption(terms: Iterable[Term]) -> bool:
    """Tells whether any of the terms reads the verifier's own prompt, with a reference caption."""
    return any(
        "verifier" in needed_models((term,))
        and getattr(term.choice.function, "reference_caption", True)
        for term in terms
    )


@jax.named_scope("reward")
def reward(terms: tuple[Term, ...], scored: Scored) -> Rewards:
    """Returns rewards of captions: the weighted sum of the terms, and each term by name.

    Args:
      terms: with their weights.
      scored: batch, captions and verdicts.

    Returns:
      Rewards [b, g].

    Raises:
      AssertionError: a term's value is not [b, g] floats; the message names the term.
      ConfigError: a term reads text, and scored.on_text has no values of it.
    """
    shape = scored.captions.mask.shape[:2]
    values: dict[str, Any] = {}
    told: dict[str, Any] = {}
    for term in terms:
        value = _value(term, scored)
        if isinstance(value, tuple):
            value, more = value
            told |= {f"{term.name}_{name}": a for name, a in more.items()}
        values[term.name] = value = jnp.asarray(value)
        chex.assert_shape(value, shape, custom_message=f"reward {term.name!r} must be [b, g]")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise AssertionError(f"reward {term.name!r} must be floats, not {value.dtype}")
    masked = {t.name: values[t.name] * values[t.mask] if t.mask else values[t.name] for t in terms}
    total = sum(term.weight * masked[term.name] for term in terms)
    return Rewards(total, masked, {term.name: jnp.float32(term.weight) for term in terms}, told)


def _value(term: Term, scored: Scored) -> Any:
    if not term.reads_text:
        return term.choice(scored)
    if term.name not in scored.on_text:
        raise ConfigError(
            f"reward {term.name!r} reads text, and Scored.on_text has no values of it: a step with "
            "such a term is two programs (run.compile.two_programs)"
        )
    return scored.on_text[term.name]

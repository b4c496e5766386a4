"""The frozen models that a reward term may read."""

from collections.abc import Callable

MODELS = ("clip", "judge", "reference", "verifier")


def needs(*models: str, reference_caption: bool = True) -> Callable[[Callable], Callable]:
    """Returns a decorator that declares a term's frozen models.

    scored.models["judge"] is an rl.judge.Judge, "reference" an rl.logps.Reference, which is the
    initial policy, LoRA's base, or what caprl.reference_mix makes of it. "verifier" is an
    rl.verify.Verifier, "clip" an rl.similarity.Clip.

    Args:
      *models: their names.
      reference_caption: whether the term reads the verifier's own prompt, which holds a reference
        caption, as rl.verify.verify does; False if it reads batch.prompt alone.
    """
    unknown = set(models) - set(MODELS)
    if unknown:
        raise ValueError(f"a reward can't need {sorted(unknown)}: models are {', '.join(MODELS)}")

    def declare(term: Callable) -> Callable:
        term.needs, term.reference_caption = models, reference_caption
        return term

    return declare

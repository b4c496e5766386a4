"""The frozen models that a reward term may read."""

from collections.abc import Callable

MODELS = ("clip", "judge", "reference", "verifier")


def needs(*models: str) -> Callable[[Callable], Callable]:
    """Returns a decorator that declares a term's frozen models.

    scored.models["judge"] is an rl.judge.Judge, "reference" an rl.logps.Reference, which is the
    initial policy, LoRA's base, or what caprl.reference_mix makes of it. "verifier" is an
    rl.verify.Verifier, "clip" an rl.similarity.Clip.
    """
    unknown = set(models) - set(MODELS)
    if unknown:
        raise ValueError(f"a reward can't need {sorted(unknown)}: models are {', '.join(MODELS)}")

    def declare(term: Callable) -> Callable:
        term.needs = models
        return term

    return declare

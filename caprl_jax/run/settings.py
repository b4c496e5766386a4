"""Settings of a run around its step: models, evaluation, checkpoints and export."""

import dataclasses

from caprl_jax.models.layers import REMAT
from caprl_jax.rl.judge import Judging
from caprl_jax.run.profile import steps_of
from caprl_jax.settings import setting

_PATH = "a directory in Hugging Face format, its gs:// URL, a hub id, or asset:NAME (shipped)"


@dataclasses.dataclass(frozen=True)
class General:
    """Top-level settings."""

    seed: int = setting(0, "seed of data order, questions and draws")
    objective: str = setting("caprl", "what is trained", choices=("caprl", "sft"))
    steps: int = setting(100, "steps of the run", least=1, resume=True)
    log_every: int = setting(1, "steps between two lines of metrics", least=1, resume=True)
    dtype: str = setting(
        "auto",
        "dtype of the computation; auto is bfloat16 on accelerators and float32 on CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    most_skipped: int = setting(
        3,
        "steps in a row whose update may be skipped because a number isn't finite; one more ends "
        "the run",
        least=0,
        resume=True,
    )
    sinks: dict = setting(
        {"tensorboard": {"sink": "tensorboard"}},
        "where metrics go beside metrics.jsonl: name to {sink, options}; sink defaults to the name",
        resume=True,
    )
    profile: str = setting(
        "",
        "START:END captures a jax.profiler trace of these steps in WORKDIR/profile; empty: none",
        resume=True,
    )

    def __post_init__(self):
        """Checks `profile`."""
        steps_of(self.profile)


@dataclasses.dataclass(frozen=True)
class PolicySettings:
    """Settings of the model that is trained."""

    path: str = setting("asset:tiny/policy", _PATH)
    revision: str = setting("", "branch, tag or commit of a hub id")
    init: str = setting(
        "pretrained",
        "random reads only config.json, tokenizer and processor of the directory",
        choices=("pretrained", "random"),
    )
    prompt: str = setting("Describe the image in detail.", "the user's text beside the image")
    freeze: str = setting(
        "",
        "parts that stay as they are, joined by commas: vision, vision/merger, decoder/embedding, "
        "or other beginnings of parameters' paths; empty: all is trained",
    )
    freeze_vision: bool = setting(False, "whether the vision tower stays as it is")
    remat: str = setting(
        "none",
        "what each layer's gradient computes again: only attention's scores (none), all but "
        "products with weights (products), or the whole layer (full); auto: chosen for the devices",
        choices=(*REMAT, "auto"),
        resume=True,
    )


@dataclasses.dataclass(frozen=True)
class JudgeSettings(Judging):
    """Settings of the judge."""

    path: str = setting(
        "asset:tiny/judge",
        f"{_PATH}; or http://HOST/v1, an OpenAI-compatible endpoint whose key is in OPENAI_API_KEY",
    )
    revision: str = setting("", "branch, tag or commit of a hub id")
    model: str = setting("", "a model's name at an endpoint; empty: the only one that it serves")
    concurrency: int = setting(
        32, "most requests of a process to an endpoint at a time", least=1, resume=True
    )
    timeout: float = setting(
        120.0, "seconds until a request without a whole answer is sent again", above=0, resume=True
    )
    tries: int = setting(
        10,
        "times an endpoint is asked before the run ends, with a checkpoint",
        least=1,
        resume=True,
    )
    prompt: str = setting(
        "",
        "user turn with {caption} and {question}; empty: the directory's judge_prompt.txt, or else "
        "the project's own (data/questions.py)",
    )
    max_caption: int = setting(
        0,
        "longest caption in the judge's tokens, where its tokenizer is not the policy's; 0 is "
        "twice sampling.max_tokens",
        least=0,
    )


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """Settings of CLIP, which reward terms such as clip_score read."""

    path: str = setting("", f"{_PATH}; it holds transformers' CLIPModel")
    revision: str = setting("", "branch, tag or commit of a hub id")


@dataclasses.dataclass(frozen=True)
class VerifierSettings:
    """Settings of the verifier, which reward terms such as correctness ask with the image."""

    path: str = setting(
        "",
        f"{_PATH}, with the policy's tokenizer and image processor; empty: the initial policy",
    )
    revision: str = setting("", "branch, tag or commit of a hub id")
    question: str = setting(
        "Is that true of the image? Answer Yes or No.",
        "the user's turn after a sentence, which stands as the assistant's answer to policy.prompt",
    )
    yes: str = setting("Yes", "the answer that confirms, one token")
    no: str = setting("No", "the answer that denies, one token")
    ends: str = setting(
        ".!?。！？",
        "characters that end a sentence, ASCII before white space only; line breaks always do",
    )
    reference: str = setting(
        "",
        "text after policy.prompt in the verifier's prompt; in the place of {caption} it has the "
        "record's first caption. Empty: no such caption is read",
    )
    max_reference: int = setting(
        256, "most tokens that this text adds to the prompt; a longer caption is cut", least=1
    )
    sentences: int = setting(
        32, "sentences of a caption that are read; the log counts the others", least=1
    )
    max_sentence: int = setting(64, "tokens of a sentence that are read", least=1)

    def __post_init__(self):
        """Checks `reference`."""
        if self.reference and self.reference.count("{caption}") != 1:
            raise ValueError(
                f"reference={self.reference!r:.200} must hold {{caption}} once, for the record's "
                "caption; or leave it empty"
            )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Settings of held-out evaluation."""

    every: int = setting(100, "steps between two; 0: only before and after", least=0, resume=True)
    images: int = setting(64, "held-out images", least=1)
    batch: int = setting(32, "images at a time", least=1, resume=True)
    group: int = setting(4, "sampled captions per image, beside a greedy one", least=1)
    shown: int = setting(8, "images in the report", least=0, resume=True)


@dataclasses.dataclass(frozen=True)
class Alarms:
    """Settings of warnings about a run that goes wrong without an error."""

    steps: int = setting(
        10, "logged steps in a row for which a bound must be broken", least=1, resume=True
    )
    reward_std: float = setting(
        1e-4,
        "reward collapse: the rewards of a group deviate no more than this; -1 is off",
        least=-1,
        resume=True,
    )
    truncation_rate: float = setting(
        0.9,
        "length explosion: no fewer than this share of captions is truncated; above 1 is off",
        least=0,
        resume=True,
    )
    no_letter: float = setting(
        0.5,
        "an endpoint's judge that doesn't answer: no fewer than this share of its answers names no "
        "option; above 1 is off",
        least=0,
        resume=True,
    )
    grad_norm: float = setting(
        1e-7,
        "vanished gradients: their norm is no more than this; -1 is off",
        least=-1,
        resume=True,
    )
    logp_gap: float = setting(
        0.1,
        "rollout and update apart: log-probabilities of the same tokens differ by this many nats "
        "or more on average; a large number is off",
        least=0,
        resume=True,
    )


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """Settings of the run's checkpoints."""

    every: int = setting(100, "steps between two; the last step has one", least=1, resume=True)
    keep: int = setting(2, "checkpoints that are kept, the last ones", least=1, resume=True)


@dataclasses.dataclass(frozen=True)
class Export:
    """Settings of the trained model's Hugging Face directory, WORKDIR/export/STEP."""

    when: str = setting(
        "end",
        "when the model is written",
        choices=("end", "checkpoints", "never"),
        resume=True,
    )
    dtype: str = setting(
        "float32", "dtype of its weights", choices=("float32", "bfloat16"), resume=True
    )

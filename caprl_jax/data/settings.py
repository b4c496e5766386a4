"""Settings of data (a config's section `data`) and of supervised training (section `sft`)."""

import dataclasses

from caprl_jax.data.sources import SOURCES
from caprl_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class Data:
    """Settings of data; the section `data` also holds the keys of the chosen source."""

    source: str = setting("digits", "source of the records", choices=SOURCES)
    data_dir: str = setting("", "folder of prepared datasets; empty: tensorflow-datasets' default")
    heldout: int = setting(128, "records that are never trained on", least=1)
    batch: int = setting(128, "images per step, over all processes", least=1)
    epochs: int = setting(0, "passes over the data; 0: as many as the steps need", least=0)
    replacement: bool = setting(True, "whether a caption's questions are drawn with replacement")
    shuffle_options: bool = setting(True, "whether options are shuffled at each presentation")
    per_caption: bool = setting(
        False, "whether each caption gets its own questions, instead of one set per image"
    )
    captions: str = setting(
        "",
        'JSON lines {"id", "captions"}, as caprl_jax.caption writes them: they replace the '
        "records' own captions, and records that they don't name are left out. Empty: no such file",
    )
    extras: tuple = setting(
        (), "names of the records' extras, numbers or lists of them, that reward terms read"
    )
    min_pixels: int = setting(
        0, "least area of an image, in pixels; 0: as preprocessor_config.json says", least=0
    )
    max_pixels: int = setting(
        0,
        "largest area, larger images are scaled down; 0: as preprocessor_config.json says",
        least=0,
    )
    max_windows: int = setting(
        16, "padded size of an image, in the tower's windows (Qwen3-VL: features)", least=1
    )
    max_prompt: int = setting(1280, "length bucket of a prompt, in tokens, image included", least=1)
    max_question: int = setting(256, "length bucket of a question, in tokens", least=1)
    threads: int = setting(4, "threads that prepare images", least=1, resume=True)


@dataclasses.dataclass(frozen=True)
class Sft:
    """Settings of supervised training, a config's section `sft`."""

    task: str = setting(
        "caption",
        "own_captions: the captions that records carry, of any source; caption and judge: the "
        "embedded world's curriculum, for its policy and its judge",
        choices=("own_captions", "caption", "judge"),
    )
    max_tokens: int = setting(
        48, "length bucket of a branch, or of a caption with its end, in tokens", least=1
    )
    questions: int = setting(4, "questions per caption that the judge answers by letter", least=0)
    open_questions: int = setting(4, "questions per caption answered in words", least=0)
    options: tuple = setting((2, 6), "least and most options of a question")
    probes: int = setting(5, "cells asked per image, for the policy", least=0)
    captions: int = setting(
        3, "captions per image and step; of records that carry more, some are drawn", least=1
    )
    stated: tuple = setting((0.55, 0.35, 0.1), "probability of stating 1, 2, .. facts")
    count: float = setting(0.2, "probability of stating the count", least=0, most=1)
    statements: int = setting(
        0,
        "statements per image that are asked about as config.verifier asks; half of them are true",
        least=0,
    )
    judged: bool = setting(False, "whether the judge reads the policy's held-out captions")

"""Export of a run's model as a Hugging Face directory, with a card that states its origin."""

import dataclasses
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import safetensors

from caprl_jax.errors import UserError
from caprl_jax.models.hf.save import Target, save
from caprl_jax.models.vlm import Policy
from caprl_jax.parallel import processes
from caprl_jax.run import metrics, same_run

_CARD = """---
library_name: transformers
pipeline_tag: {task}
base_model: {base}
tags: [caprl_jax, image-captioning, reinforcement-learning]
---

# {title}

{what}

| | |
|---|---|
| base model | {base} |
| data | {data} |
| judge | {judge} |
| step | {step} of {steps} |

## Held-out figures

{figures}

## Configuration

```json
{config}
```
"""
_WHAT = {
    "caprl": "An image captioner trained with caprl_jax by CapRL (arXiv 2509.22647): a judge that "
    "reads only the caption answers questions about the image, and its accuracy is the reward.",
    "sft": "A model trained with caprl_jax by supervised learning.",
}


def figures(workdir: Path, step: int) -> dict[str, float | None]:
    """Returns the last held-out figures up to a step, from a run's metrics; empty if none.

    None stands for a figure that was not finite.
    """
    found: dict[str, float | None] = {}
    for line in metrics.lines(workdir):
        if line["step"] <= step:
            new = {k.removeprefix("eval/"): v for k, v in line.items() if k.startswith("eval/")}
            found = (new and new | {"measured at step": line["step"]}) or found
    return found


def model_card(
    config: ml_collections.ConfigDict, step: int, heldout: dict[str, float | None]
) -> str:
    """Returns the README.md of an exported model, with the YAML head that the hub reads."""
    base = config.policy.path + (f" ({config.policy.revision})" if config.policy.revision else "")
    finite = {name: value for name, value in heldout.items() if value is not None}
    rows = [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in finite.items()]
    caprl = config.objective == "caprl"
    sees = caprl or config.sft.task != "judge"
    return _CARD.format(
        task="image-text-to-text" if sees else "text-generation",
        base=base,
        title=f"{Path(config.policy.path).name}, trained by caprl_jax",
        what=_WHAT[config.objective],
        data=config.data.get("path") or config.data.source,
        judge=config.judge.path if caprl else "none",
        step=step,
        steps=config.steps,
        figures="\n".join(["| | |", "|---|---|", *rows]) if rows else "None were measured.",
        config=config.to_json(indent=2),
    )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model to be exported.

    Attributes:
      policy: modules.
      params: unboxed parameters.
      source: the directory the run started from; its tokenizer and processor are copied.
      base: hub id or path that it was found by, for LoRA's adapter_config.json.
    """

    policy: Policy
    params: Any
    source: Path
    base: str = ""


def export(directory: Path, model: Trained, dtype: str, card: str) -> None:
    """Writes a model directory whole; an earlier export of the same run and step is replaced.

    All processes must call it; the first one writes.

    Args:
      directory: the directory to be made.
      model: modules, parameters and source.
      dtype: dtype of the weights, "float32" or "bfloat16".
      card: content of README.md, as model_card makes it.

    Raises:
      UserError: something else lies there, or an export of another run.
      OSError: it can't be written; nothing of it stays.
    """
    if processes.agreed(directory.exists() and not _same_run(directory / "README.md", card)):
        raise UserError(
            f"{directory} exists already and is no export of this run at this step: move it away"
        )
    files = Target(directory, np.dtype(dtype), card=card, replace=True, base=model.base)
    try:
        save(files, model.policy, model.params, model.source)
    except (OSError, safetensors.SafetensorError) as e:
        if processes.is_first():  # a full disk needs its room
            shutil.rmtree(directory.with_name(directory.name + ".partial"), ignore_errors=True)
        if told := re.search(r"\(os error (\d+)\)", str(e)):  # safetensors has no numbers
            raise OSError(int(told[1]), os.strerror(int(told[1])), str(directory)) from e
        raise
    logging.info("exported to %s", directory)


def repair(exports: Path) -> None:
    """Undoes, in WORKDIR/export, the replacement of exports that a kill cut short.

    An export that was moved away comes back if no new one took its place; parts are deleted. What
    the system refuses to move or delete stays, with a warning.
    """
    for left in sorted(exports.glob("*.old")) + sorted(exports.glob("*.partial")):
        whole = left.with_suffix("")
        if not whole.name.isdigit():
            continue  # not ours
        try:
            if left.suffix == ".old" and not whole.exists():
                left.rename(whole)
            else:
                shutil.rmtree(left)
        except OSError as e:
            logging.warning("%s is left of a killed export: %s", left, e)


def _same_run(file: Path, card: str) -> bool:
    """Tells whether a directory's card is of the run and step of another card."""
    try:
        (old_step, old), (step, new) = _run_of(file.read_text(encoding="utf-8")), _run_of(card)
        return step == old_step and not same_run.differences(old, ml_collections.ConfigDict(new))
    except (OSError, ValueError, IndexError, RecursionError):  # no card that model_card made
        return False


def _run_of(card: str) -> tuple[str, dict[str, Any]]:
    """Returns the step and the config that a card states."""
    head, config = card.split("\n## Configuration\n\n```json\n", 1)
    step = head.split("\n| step | ", 1)[1].split(" of ", 1)[0]
    content = json.loads(config.rsplit("\n```", 1)[0])
    if not isinstance(content, dict):
        raise ValueError("the config is not a JSON object")
    return step, content

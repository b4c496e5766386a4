"""Chat templates of model directories: which file counts, and rendering within bounds."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.hf.files import read_json

IMAGE_TOKEN = "<|image_pad|>"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TEXT = "the-text-that-the-user-wrote"  # stands for it in the template, whatever it holds
# A published template takes some 300 lines for a message of an image and a text.
_MOST_LINES, _MOST_CHARACTERS = 50_000, 1_000_000
_LARGEST = 1_000_000
# Each makes a text, a list or a number of any size in one operation, which no line count bounds.
_UNBOUNDED = {"*", "**", "lipsum", "center", "ljust", "rjust", "zfill", "expandtabs", "format"}
_OPEN = re.compile(r"<think>\s*$")
_CLOSED = "<think>\n\n</think>\n\n"  # as Qwen3's template renders enable_thinking=False


class _Unbounded(Exception):
    pass


def _refuse_unbounded(directory: Path, template: str) -> None:
    """Refuses a template with an operation whose result can be of any size.

    Jinja may run it as early as it compiles the template, and nothing interrupts it. Published
    templates do without.

    Raises:
      ModelDirectoryError: the message names the operation.
    """
    import jinja2  # imported where used

    before = ""
    for line, kind, value in jinja2.Environment().lex(template):
        if kind in ("data", "whitespace"):
            continue
        large = kind == "integer" and int(value.replace("_", ""), 0) > _LARGEST
        if large or value in _UNBOUNDED or (before == "string" and value == "%"):
            raise ModelDirectoryError(
                f"{directory}: the chat template uses {value:.40} in line {line}, which could make "
                "a text of any size: write it without"
            )
        before = kind


def find(directory: Path, inner: Any) -> Any:
    """Returns the chat template that counts, in transformers' order.

    A model with an image processor has the template of processor_config.json, else of
    chat_template.json, else the tokenizer's: chat_template.jinja, else tokenizer_config.json. A
    model without one has the tokenizer's; chat_template.json counts only where there is no other.

    Args:
      directory: the model directory.
      inner: transformers' tokenizer.

    Raises:
      ModelDirectoryError: there is no template, or it isn't text.
    """
    own, given = inner.chat_template, None
    if any((directory / name).is_file() for name in _PROCESSORS) or not own:
        for name in ("chat_template.json", "processor_config.json"):  # the later goes before
            path = directory / name
            given = (read_json(path).get("chat_template") if path.is_file() else None) or given
    template = given or own
    if not template:
        raise ModelDirectoryError(f"{directory}: the tokenizer has no chat template")
    texts = list(template.values()) if isinstance(template, dict) else [template]
    if not all(isinstance(t, str) for t in texts):
        raise ModelDirectoryError(f"{directory}: the chat template is not text: {template!r:.80}")
    if max(map(len, texts)) > _MOST_CHARACTERS:
        raise ModelDirectoryError(
            f"{directory}: the chat template has more than {_MOST_CHARACTERS} characters"
        )
    return template


def around_text(directory: Path, inner: Any, image: bool) -> tuple[str, str]:
    """Renders a user's message and the start of the assistant's: the text before and after hers.

    Templates with a thinking mode render without it. A thought that a template opens all the same
    is closed, so that it is neither a part of a caption nor before a judge's answer.

    Args:
      directory: the model directory, for error messages.
      inner: transformers' tokenizer.
      image: whether an image goes before the text.

    Raises:
      ModelDirectoryError: the template can't be rendered, doesn't end, or doesn't hold the text
        once.
    """
    content = [{"type": "image"}, {"type": "text", "text": _TEXT}] if image else _TEXT
    rendered = _render(directory, inner, [{"role": "user", "content": content}])
    images = rendered.count(IMAGE_TOKEN)
    if image and images != 1:
        raise ModelDirectoryError(
            f"{directory}: the chat template renders an image as {images} {IMAGE_TOKEN} tokens, "
            "not one"
        )
    parts = rendered.split(_TEXT)
    if len(parts) != 2:
        raise ModelDirectoryError(
            f"{directory}: the chat template renders the message's text {len(parts) - 1} times, "
            "not once"
        )
    before, after = parts[0], _OPEN.sub(_CLOSED, parts[1])
    if after.rfind("<think>") > after.rfind("</think>"):
        raise ModelDirectoryError(
            f"{directory}: the chat template begins the assistant's thoughts, {after[-80:]!r}: "
            "give one that renders enable_thinking=False without them"
        )
    return before, after


def after_reply(directory: Path, inner: Any, text: str) -> str:
    """Renders what follows an assistant's message when the user says `text`, up to the next answer.

    Args:
      directory: the model directory, for error messages.
      inner: transformers' tokenizer.
      text: the user's.

    Raises:
      ModelDirectoryError: as around_text.
    """
    turns = [("user", "."), ("assistant", _TEXT), ("user", text)]
    messages = [{"role": role, "content": content} for role, content in turns]
    parts = _render(directory, inner, messages).split(_TEXT)
    if len(parts) != 2:
        raise ModelDirectoryError(
            f"{directory}: the chat template renders an earlier answer {len(parts) - 1} times, not "
            "once"
        )
    return _OPEN.sub(_CLOSED, parts[1])


def _render(directory: Path, inner: Any, messages: list[dict[str, Any]]) -> str:
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    template = inner.chat_template
    try:
        for text in template.values() if isinstance(template, dict) else [template]:
            _refuse_unbounded(directory, text)
        with _bounded():
            return inner.apply_chat_template(messages, **options)
    except _Unbounded as e:
        raise ModelDirectoryError(
            f"{directory}: the chat template doesn't end: it ran {_MOST_LINES} lines or made "
            f"{_MOST_CHARACTERS} characters"
        ) from e
    except ModelDirectoryError:
        raise
    except Exception as e:  # a template is a program, which may raise any error
        raise ModelDirectoryError(
            f"{directory}: the chat template can't be rendered: {type(e).__name__}: {e}"
        ) from e


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raises _Unbounded in a template that runs too many lines or makes too much text.

    transformers' sandbox keeps a template from files and code, not from running on. Jinja compiles
    templates to Python, whose lines a trace function sees; _refuse_unbounded bounds each line.
    """
    lines = made = 0

    def in_template(frame, event, argument):
        nonlocal lines, made
        lines += event == "line"
        if event == "return" and isinstance(argument, str):  # of a yield, too
            made += len(argument)
        longest = max(map(_size, frame.f_locals.values()), default=0)
        if lines > _MOST_LINES or max(made, longest) > _MOST_CHARACTERS:
            raise _Unbounded
        return in_template

    def trace(frame, event, argument):
        return in_template if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _size(value: Any) -> int:
    """Returns the length of a text or a list, or the largest in a template's namespace()."""
    if isinstance(value, str | list | tuple):
        return len(value)
    held = getattr(value, "_Namespace__attrs", None)
    return max(map(_size, held.values()), default=0) if isinstance(held, dict) else 0

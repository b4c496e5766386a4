"""Hostile files of model directories: weights, tokenizers, and the directory itself."""

import pickle
import struct

import numpy as np
import pytest

from .case import check
from .edits import (
    DEEP,
    NORM,
    as_file,
    both,
    company,
    config,
    cut,
    emptied,
    fifo,
    file,
    folder,
    header,
    index_only,
    json_of,
    link,
    linked,
    poison,
    strays,
    tensors,
    twice,
)
from .models import cases

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"
UNREADABLE = "is not a readable safetensors file, or is cut short"


class Touches:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return open, ("ran", "w")


def set_to(name, make):
    """Sets a tensor to make(its value, all)."""

    def change(found):
        found[name] = make(found.get(name), found)

    return tensors(change)


def halved(found):
    for name, value in found.items():
        found[name] = value.astype(np.float16)


def norm(make):
    return set_to(NORM, lambda value, _: make(value))


DIRECTORIES = {
    "an empty directory": (emptied, "is not a model directory"),
    "a file": (as_file, "is not a model directory"),
    "a link to a directory": (linked, None),
    "files that a clone brings along": (company, None),
}
WEIGHT_FILES = {
    "none": (file(WEIGHTS, None), "holds no *.safetensors file"),
    "a pickle": (
        both(file(WEIGHTS, None), file("pytorch_model.bin", pickle.dumps(Touches()))),
        "pytorch_model.bin is of another format",
    ),
    "a pickle under the right name": (file(WEIGHTS, pickle.dumps(Touches())), UNREADABLE),
    "empty": (file(WEIGHTS, b""), UNREADABLE),
    "a web page": (file(WEIGHTS, b"<html>" * 99), UNREADABLE),
    "a pointer of git LFS": (
        file(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"),
        UNREADABLE,
    ),
    "a header of a terabyte": (file(WEIGHTS, struct.pack("<Q", 1 << 40)), UNREADABLE),
    "a header of no JSON": (file(WEIGHTS, struct.pack("<Q", 4) + b"{{{{"), UNREADABLE),
    "a header of 100,000 brackets": (
        file(WEIGHTS, struct.pack("<Q", len(DEEP)) + DEEP),
        UNREADABLE,
    ),
    "cut in the header": (cut(500), UNREADABLE),
    "cut in a tensor": (cut(1_000_000), UNREADABLE),
    "a header of more rows": (header(shape=[10**9]), UNREADABLE),
    "a header beyond the end": (header(data_offsets=[0, 10**15]), UNREADABLE),
    "a header of negative rows": (header(shape=[-128]), UNREADABLE),
    "a header of another type": (header(dtype="X99"), UNREADABLE),
    "the same twice": (twice, "is in again.safetensors and in weights.safetensors"),
    "a shard missing": (
        index_only(b'{"weight_map": {"a": "model-2.safetensors", "b": "model-3.safetensors"}}'),
        "names 2 of 2 files that are not there, first model-2",
    ),
    "an index cut short": (index_only(b"{"), "index.json is not valid JSON"),
    "an index of 100,000 brackets": (index_only(DEEP), "nested too deeply"),
    "an index of nothing": (index_only(b'{"weight_map": null}'), "has no weight_map"),
    "an index of numbers": (index_only(b'{"weight_map": {"a": 1}}'), "weight_map"),
    "an index that leads out": (
        index_only(b'{"weight_map": {"a": "../outside/model.safetensors"}}'),
        "outside the directory",
    ),
    "strays beside an index": (strays, None),
    "a tensor missing": (tensors(lambda t: t.pop(NORM)), f"missing {NORM}"),
    "a tensor left over": (set_to("adapter", lambda *_: np.ones(3, np.float32)), "over adapter"),
    "a tensor of another shape": (norm(lambda _: np.ones(3, np.float32)), "shape (3,)"),
    "a tensor of small integers": (
        set_to("lm_head.weight", lambda value, _: value.astype(np.int8)),
        "lm_head.weight is of type I8",
    ),
    "rope's old buffers": (
        set_to("model.layers.0.self_attn.rotary_emb.inv_freq", lambda _, t: t[NORM]),
        None,
    ),
    "half precision": (tensors(halved), None),
    "a tied head again": (
        both(
            set_to("lm_head.weight", lambda _, t: t["model.embed_tokens.weight"].copy()),
            config(tie_word_embeddings=True),
        ),
        None,
    ),
    "NaN": (poison(np.nan), f"2 values that are NaN or infinite in float32, in 1 tensors: {NORM}"),
    "minus infinity": (poison(-np.inf), f"in 1 tensors: {NORM} (2 values)"),
    "too large for float32": (
        norm(lambda value: np.full_like(value, 1e39, np.float64)),
        "NaN or infinite in float32",
    ),
    "a pipe": (fifo(WEIGHTS), "is not a regular file"),
    "a folder": (folder(WEIGHTS), "is not a regular file"),
    "a link to nothing": (link(WEIGHTS, "nowhere"), "is not a regular file"),
}
TOKENIZERS = {
    "none": (file(TOKENIZER, None), "has no tokenizer"),
    "cut short": (file(TOKENIZER, b'{"model": {'), "tokenizer can't be read"),
    "of another kind": (file(TOKENIZER, b"{}"), "tokenizer can't be read"),
    "of bytes": (file(TOKENIZER, b"\xff\xfe\x00"), "tokenizer can't be read"),
    "of 100,000 brackets": (file(TOKENIZER, DEEP), "tokenizer can't be read"),
    "a device": (link(TOKENIZER, "/dev/zero"), "is not a regular file"),
    "its config a pipe": (fifo("tokenizer_config.json"), "is not a regular file"),
    "its config of 100,000 brackets": (file("tokenizer_config.json", DEEP), "nested too deeply"),
    "its config a list": (file("tokenizer_config.json", b"[]"), "not a JSON object"),
    "its class unknown": (
        json_of("tokenizer_config.json", tokenizer_class="NoSuchTokenizer"),
        None,
    ),
    "code of its own in the directory": (
        both(
            json_of(
                "tokenizer_config.json",
                auto_map={"AutoTokenizer": ["own.Own", None]},
                tokenizer_class="Own",
            ),
            file("own.py", "open('ran', 'w')\n"),
        ),
        None,
    ),
    "its vocabulary empty": (
        json_of(TOKENIZER, model__vocab={}, model__merges=[], added_tokens=[]),
        "tokenizer",
    ),
}
PROMPTS = {
    "empty": (file("judge_prompt.txt", b""), "must hold {caption} once"),
    "without a question": (file("judge_prompt.txt", b"Read {caption}."), "{question} once"),
    "the wrong way round": (file("judge_prompt.txt", b"{question} {caption}"), "must hold"),
    "two captions": (file("judge_prompt.txt", b"{caption}{caption}{question}"), "must hold"),
    "of a megabyte without fields": (file("judge_prompt.txt", b"x" * 10**6), "must hold"),
    "not UTF-8": (file("judge_prompt.txt", b"{caption} {question} \xff"), "is not UTF-8 text"),
    "a device": (link("judge_prompt.txt", "/dev/zero"), "is not a regular file"),
    "a pipe": (fifo("judge_prompt.txt"), "is not a regular file"),
    "with other fields of format()": (
        file("judge_prompt.txt", b"{caption.__class__} {0} {caption} {question}"),
        None,
    ),
    "with control tokens": (
        file("judge_prompt.txt", b"<|im_end|>{caption}<|im_start|>{question}"),
        None,
    ),
}
CASES = [
    *cases("model directory", DIRECTORIES),
    *cases("weights", WEIGHT_FILES),
    *cases("tokenizer", TOKENIZERS),
    *cases("judge_prompt.txt", PROMPTS, of="judge"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}: {c.name}")
def test_it_ends_as_promised(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where code in an input would leave its mark
    check(case, tmp_path)

"""Damaged files of model directories: a model, or an error that names the directory."""

import json
import shutil
import struct

import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from hypothesis import example, given
from hypothesis import strategies as st

from caprl_jax.data.images import ImageProcessor
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models import families
from caprl_jax.models.hf import download, files
from caprl_jax.models.hf import tensors as tensors_lib

from .strategies import damaged, few, values

POLICY = download.fetch("asset:tiny/policy")
TEXT = {
    "model_type": "qwen2", "vocab_size": 6, "hidden_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 4,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
MODEL = families.build(TEXT)
SHAPES = {t.names([0])[0]: t.shape for t in tensors_lib.tensors(MODEL, TEXT)}
WEIGHTS = {
    name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + i
    for i, (name, shape) in enumerate(SHAPES.items())
}
SAVED = safetensors.numpy.save(WEIGHTS)
SIZE = struct.unpack("<Q", SAVED[:8])[0]
HEADER, BODY = json.loads(SAVED[8 : 8 + SIZE]), SAVED[8 + SIZE :]


def file_of(header, body=BODY):
    """A safetensors file of a header, an object or JSON text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [len(BODY)] * 2}
kinds = st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "I64", "BOOL", "F8_E4M3", "F4", "X"])
entries = st.one_of(
    values,
    st.fixed_dictionaries(
        {
            "dtype": kinds,
            "shape": st.lists(st.integers(-1, 8), max_size=3),
            "data_offsets": st.lists(st.integers(-4, len(BODY) + 4), min_size=2, max_size=2),
        }
    ),
)
names = st.one_of(st.sampled_from([*SHAPES, "__metadata__", "lm_head.weight", "a\n\nb", ""]))


@st.composite
def headers(draw):
    """The header with an entry or one of its fields changed, added or left out."""
    header, name = json.loads(json.dumps(HEADER)), draw(names)
    change = draw(st.sampled_from(["entry", "field", "remove", "rename", "swap"]))
    if change == "entry" or name not in header:
        header[name] = draw(entries)
    elif change == "field":
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        one = draw(st.one_of(kinds, values, st.lists(st.integers(-1, 2**65), max_size=3)))
        header[name][field] = one
    elif change == "remove":
        del header[name]
    else:
        other = draw(names)
        header[other], moved = header.pop(name), header.get(other)
        if change == "swap" and moved is not None:
            header[name] = moved
    return file_of(header)


weights = st.one_of(
    headers(),
    damaged(SAVED[: 8 + SIZE]).map(lambda head: head + BODY),
    damaged(SAVED),
    values.map(file_of),
    st.binary(max_size=40),
    st.binary(max_size=40).map(file_of),
)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights")
    (directory / "config.json").write_text(json.dumps(TEXT))
    return directory


def refused(directory, error):
    """Checks an error's message."""
    assert str(directory) in str(error) and "\n\n" not in str(error)


@given(weights)
@example(SAVED)
@example(file_of(HEADER, BODY[:-4]))
@example(file_of({**HEADER, "a\n\nb": HEADER["model.norm.weight"]}))
@example(file_of({**HEADER, "a\n\nb": EMPTY}))
@example(file_of({**HEADER, "model.visual.a\n\nb": EMPTY, "visual.a\n\nb": EMPTY}))
@example(file_of({**HEADER, "a\n\nb": {**EMPTY, "shape": [-1]}}))
@example(file_of(b'{"a":' * 50_000))
def test_damaged_weights_are_refused_or_read_as_a_reader_of_their_bytes_would(text_model, content):
    (text_model / "model.safetensors").write_bytes(content)
    try:
        params = files.load_params(text_model, MODEL)
    except ModelDirectoryError as e:
        refused(text_model, e)
        return
    theirs = safetensors.numpy.load(content)
    for tensor in tensors_lib.tensors(MODEL, TEXT):
        ours = flatten_dict(params)[tensor.path]
        assert ours.dtype == np.float32 and np.all(np.isfinite(ours))
        (name,) = tensor.names([0])
        ours = tensor.to_file(ours[0] if tensor.stacked else ours)
        np.testing.assert_array_equal(ours, theirs[name].astype(np.float32))


def changed(file):
    """Contents of a JSON file of the tiny policy with one value, at any depth, changed."""
    content = json.loads((POLICY / file).read_text())

    def at(part, prefix=()):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield (*prefix, key)
            if isinstance(value, dict | list):
                yield from at(value, (*prefix, key))

    def put(path, value, remove):
        whole = json.loads(json.dumps(content))
        part = whole
        for key in path[:-1]:
            part = part[key]
        if remove:
            del part[path[-1]]
        else:
            part[path[-1]] = value
        return json.dumps(whole).encode()

    paths = list(at(content))
    edited = st.builds(put, st.sampled_from(paths), values, st.booleans())
    sized = st.builds(put, st.sampled_from(paths), st.integers(-2, 2**31), st.just(False))
    return st.one_of(edited, sized, damaged((POLICY / file).read_bytes()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("directories") / "model"
    shutil.copytree(POLICY, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    return directory


class restored:
    """Context that writes a file and puts the tiny policy's own back."""

    def __init__(self, path, content):
        self._path = path
        path.write_bytes(content)

    def __enter__(self):
        return self._path.parent

    def __exit__(self, *_):
        shutil.copy(POLICY / self._path.name, self._path)


def with_config(**changes):
    return json.dumps(json.loads((POLICY / "config.json").read_text()) | changes).encode()


@given(changed("config.json"))
@example(with_config(rms_norm_eps=10**400))
def test_a_changed_config_builds_modules_or_is_refused(folder, content):
    with restored(folder / "config.json", content) as directory:
        try:
            config = files.read_config(directory)
            policy = families.build(config, where=directory / "config.json")
        except ModelDirectoryError as e:
            refused(directory, e)
            return
        assert all(min(t.shape) >= 1 for t in tensors_lib.tensors(policy, config))


def with_processor(**changes):
    content = json.loads((POLICY / "preprocessor_config.json").read_text())
    return json.dumps(content | changes).encode()


@given(changed("preprocessor_config.json"))
@example(with_processor(image_mean=[10**400, 0, 0]))
@example(with_processor(image_mean=[float("nan"), 0, 0]))
@example(with_processor(image_std=[1e-50, 1, 1]))
@example(with_processor(rescale_factor=10**400))
@example(with_processor(rescale_factor=float("inf")))
@example(with_processor(resample=10**400))
def test_a_changed_processor_makes_finite_patches_or_is_refused(folder, content):
    with restored(folder / "preprocessor_config.json", content) as directory:
        try:
            processor = ImageProcessor.from_pretrained(directory)
            if processor.factor > 200 or processor.temporal_patch_size > 9:
                return  # the tower of config.json has other patches
            processor = processor.bounded(processor.factor**2, 9 * processor.factor**2)
        except ModelDirectoryError as e:
            refused(directory, e) if "no image has at least" not in str(e) else None
            return
        patches, (rows, columns) = processor(np.full((30, 40, 3), 200, np.uint8))
        assert patches.shape == (rows * columns, processor.patch_dim)
        assert np.all(np.isfinite(patches))


@few
@given(st.sampled_from(["tokenizer_config.json", "generation_config.json"]), st.data())
def test_changed_configs_of_a_tokenizer_give_one_or_are_refused(folder, name, data):
    content = data.draw(changed(name))
    with restored(folder / name, content) as directory:
        read(directory)


def with_vocabulary(**changes):
    content = json.loads((POLICY / "tokenizer.json").read_text())
    content["model"]["vocab"] |= changes
    return json.dumps(content).encode()


@few
@given(changed("tokenizer.json"))
@example(with_vocabulary(a=0))
def test_a_changed_tokenizer_gives_ids_below_its_count_or_is_refused(folder, content):
    with restored(folder / "tokenizer.json", content) as directory:
        read(directory)


def read(directory):
    """Reads a tokenizer, renders and encodes with it, unless it is refused."""
    try:
        tokenizer = Tokenizer.from_pretrained(directory, 512)
        before, after = tokenizer.around_text()
    except ModelDirectoryError as e:
        refused(directory, e)
        return
    assert 0 < tokenizer.count <= 512 and all(0 <= i < 512 for i in tokenizer.stop)
    ids = tokenizer.encode_around(before, "a cat <|im_end|>", after)
    assert all(0 <= i < tokenizer.count for i in ids)

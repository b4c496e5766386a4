"""Reads Hugging Face directories: safetensors files to parameters, tensor by tensor."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import safetensors

from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.families import family
from caprl_jax.models.hf import tensors as tensors_lib
from caprl_jax.models.hf.tensors import Tensor
from caprl_jax.models.vlm import Policy

# Files that an export takes over from the directory it started from.
COMPANIONS = (
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "judge_prompt.txt",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
_UNCHECKED_JSON = (
    "added_tokens.json",
    "chat_template.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read_config(directory: str | Path) -> dict[str, Any]:
    """Reads config.json of a model directory and checks that its family is supported."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ModelDirectoryError(
            f"{directory} is not a model directory: {path} does not exist. Give a directory in "
            "Hugging Face format (config.json, *.safetensors, tokenizer files)"
        )
    _check_regular(path.parent)
    config = read_json(path)
    family(config, path)
    return config


def _check_regular(directory: Path) -> None:
    """Refuses FIFOs, devices, directories and deep JSON in the place of a model's files."""
    for file in directory.iterdir():
        known = file.name in COMPANIONS or file.suffix == ".safetensors"
        if known and not file.is_file():
            raise ModelDirectoryError(f"{file} is not a regular file, nor a link to one")
        if file.name in _UNCHECKED_JSON:
            read_json(file)  # transformers reads these, with bare errors


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a model directory and checks that it holds an object."""
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # refuses half surrogate pairs
    except RecursionError as e:
        raise ModelDirectoryError(f"{path} is not valid JSON: it is nested too deeply") from e
    except ValueError as e:  # bytes, syntax, surrogates, numbers of thousands of digits
        raise ModelDirectoryError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(content, dict):
        raise ModelDirectoryError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def names(directory: Path) -> set[str]:
    """Returns the canonical names of all tensors in a directory's files."""
    return set(_index(directory))


def _index(directory: Path) -> dict[str, tuple[Path, str]]:
    """Maps each canonical tensor name to (file, name in the file); refuses repeated names."""
    index: dict[str, tuple[Path, str]] = {}
    for file in _weight_files(directory):
        with _opened(file) as f:
            names = list(f.keys())
        for name in names:
            key = tensors_lib.canonical(name)
            if key in index:
                raise ModelDirectoryError(
                    f"{directory}: {key!r} is in {index[key][0].name} and in {file.name}"
                )
            index[key] = (file, name)
    return index


def _weight_files(directory: Path) -> list[Path]:
    """Lists the weight files as transformers does: model.safetensors, else those of the index.

    Without either, every *.safetensors file counts.
    """
    whole, path = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    files = sorted(directory.glob("*.safetensors"))
    if path.is_file():
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelDirectoryError(f"{path} has no weight_map")
        if any(not isinstance(n, str) or Path(n).name != n for n in weight_map.values()):
            raise ModelDirectoryError(f"{path}: weight_map names a file outside the directory")
        shards = set(weight_map.values())
        missing = sorted(shards - {f.name for f in files})
        if missing:
            raise ModelDirectoryError(
                f"{directory}: {path.name} names {len(missing)} of {len(shards)} files that are "
                f"not there, first {missing[0]}: copy or download the rest"
            )
        return sorted(directory / name for name in shards)
    if not files:
        other = [f for pattern in ("*.bin", "*.pth", "*.gguf") for f in directory.glob(pattern)]
        hint = f"; {other[0].name} is of another format: convert it first" if other else ""
        raise ModelDirectoryError(f"{directory} holds no *.safetensors file{hint}")
    return files


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Maps a safetensors file into memory until the block ends."""
    try:
        with safetensors.safe_open(file, framework="numpy") as f:
            yield f
    except (OSError, safetensors.SafetensorError) as e:
        said = " ".join(str(e).split())  # it quotes names, which may hold line ends
        raise ModelDirectoryError(
            f"{file} is not a readable safetensors file, or is cut short: {said}"
        ) from e


def load_params(
    directory: str | Path,
    policy: Policy,
    dtype: Any = np.float32,
    shardings: Any = None,
    progress: bool = False,
) -> dict:
    """Reads parameters tensor by tensor, after checking the names and shapes of all of them.

    With shardings each device's shard is read, cast and placed separately. A process reads only
    what its devices need, and holds at most one (stacked) tensor on the host.

    Args:
      directory: directory in Hugging Face format.
      policy: the modules that `families.build` makes from that directory's config.
      dtype: dtype of the parameters, or a tree of them with the parameters' structure.
      shardings: tree of NamedSharding with the parameters' structure; None gives numpy arrays.
      progress: whether to show a progress bar.

    Returns:
      Nested dict of arrays with the structure of `Policy.init`'s, unboxed; without LoRA's, which a
      model's files don't hold.

    Raises:
      ModelDirectoryError: tensors are missing, left over, of the wrong shape or hold numbers that
        aren't finite in dtype; it names them.
    """
    directory = Path(directory)
    index, tensors = _index(directory), tensors_lib.tensors(policy, read_config(directory))
    shapes = _checked_shapes(directory, policy, tensors, index)
    return read_tensors(directory, tensors, shapes, dtype, shardings, progress)


def read_tensors(
    directory: Path,
    tensors: list[Tensor],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    dtype: Any = np.float32,
    shardings: Any = None,
    progress: bool = False,
) -> dict:
    """Reads parameters whose names and shapes have been checked; see load_params.

    Args:
      directory: directory in Hugging Face format.
      tensors: the parameters' tensors.
      shapes: the parameters' shapes by path.
      dtype: dtype of the parameters.
      shardings: tree of NamedSharding with the parameters' structure; None gives numpy arrays.
      progress: whether to show a progress bar.

    Raises:
      ModelDirectoryError: numbers aren't finite in dtype.
    """
    placed = None if shardings is None else flax.traverse_util.flatten_dict(shardings)
    index, params, bad = _index(directory), {}, {}
    dtypes = flax.traverse_util.flatten_dict(dtype) if isinstance(dtype, dict) else {}
    with _bar(progress, directory, sum(map(math.prod, shapes.values()))) as advance:
        for t in tensors:
            shape, own = shapes[t.path], dtypes.get(t.path, dtype)
            read = _Reader(t, shape, index, own, advance)
            read.bad = bad
            if placed is None:
                params[t.path] = read((slice(None),) * len(shape))
            else:
                params[t.path] = jax.make_array_from_callback(shape, placed[t.path], read)
    if bad:
        listed = [f"{name} ({count} values)" for name, count in bad.items()]
        raise ModelDirectoryError(
            f"{directory}: the weights hold {sum(bad.values())} values that are NaN or infinite in "
            f"{np.dtype(own).name}, in {len(bad)} tensors: {', '.join(listed[:5])}"
        )
    return flax.traverse_util.unflatten_dict(params)


class _Reader:
    """Reads shards of one parameter; a shard that several devices hold is read once."""

    def __init__(self, tensor: Tensor, shape, index, dtype, advance: Callable[[int], None]):
        self._tensor, self._shape, self._index = tensor, shape, index
        self._dtype, self._advance, self._cache = np.dtype(dtype), advance, {}
        self.bad: dict[str, int] = {}  # values that aren't finite, by the tensor's name

    def __call__(self, part: tuple[slice, ...]) -> np.ndarray:
        key = tuple(s.indices(size) for s, size in zip(part, self._shape, strict=True))
        if key not in self._cache:
            self._cache[key] = self._read(part, tuple(len(range(*k)) for k in key))
        return self._cache[key]

    def _read(self, part: tuple[slice, ...], size: tuple[int, ...]) -> np.ndarray:
        t, out = self._tensor, np.empty(size, self._dtype)
        if not t.stacked:
            out[...] = self._read_layer(t.name, self._shape, part)
            return out
        layers = range(*part[0].indices(self._shape[0]))
        for i, name in enumerate(t.names(layers)):
            out[i] = self._read_layer(name, self._shape[1:], part[1:])
        return out

    def _read_layer(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...]) -> np.ndarray:
        file, name = self._index[name]
        # Each read opens the file again: pages of an open mapping count as this process's memory.
        with _opened(file) as f:
            values = self._tensor.read(f.get_slice(name), shape, part)
            with np.errstate(over="ignore"):  # counted below
                values = values.astype(self._dtype)  # a copy, which outlives the mapping
        if count := not_finite(values):
            self.bad[name] = self.bad.get(name, 0) + count
        self._advance(values.size)
        return values


def not_finite(values: np.ndarray) -> int:
    """Counts NaN and infinite values of a float array."""
    if values.dtype == ml_dtypes.bfloat16:  # by their bits: ml_dtypes' isfinite is slow
        return int(np.count_nonzero((values.view(np.uint16) & 0x7F80) == 0x7F80))
    finite = np.isfinite(values)
    return 0 if finite.all() else int(np.count_nonzero(~finite))


def _checked_shapes(
    directory: Path,
    policy: Policy,
    tensors: list[Tensor],
    index: Mapping[str, tuple[Path, str]],
) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Checks names and shapes in the files' headers; returns the parameters' shapes by path."""
    targets = flax.traverse_util.flatten_dict(abstract_params(policy))
    shapes = {path: a.shape for path, a in targets.items()}
    wanted = tensors_by_name(tensors, shapes)
    # Old files hold RoPE's frequencies as buffers; like transformers, compute them anew.
    left_over = {n for n in set(index) - set(wanted) if not n.endswith("inv_freq")}
    if policy.decoder.config.tied and _HEAD in left_over:  # some files repeat the tied head
        left_over.discard(_HEAD)
        _check_tied(directory, index)
    check_tensors(directory, wanted, left_over)
    return shapes


def tensors_by_name(
    tensors: list[Tensor], shapes: Mapping[tuple[str, ...], tuple[int, ...]]
) -> dict[str, Tensor]:
    """Returns the tensors by each of their names in files; shapes are the parameters'."""
    return {n: t for t in tensors for n in t.names(range((shapes[t.path] or (1,))[0]))}


def check_tensors(directory: Path, wanted: Mapping[str, Tensor], left_over: set[str]) -> None:
    """Checks names and shapes of the tensors in a directory's files.

    Args:
      directory: directory in Hugging Face format.
      wanted: tensors by name.
      left_over: names in the files that nothing wants.

    Raises:
      ModelDirectoryError: some are missing, left over or of another shape; it names them.
    """
    index = _index(directory)
    problems = [f"missing {n}" for n in sorted(set(wanted) - set(index))]
    problems += [f"left over {n}" for n in sorted(left_over)]
    by_file: dict[Path, list[str]] = {}
    for name in sorted(set(wanted) & set(index)):
        by_file.setdefault(index[name][0], []).append(name)
    for file, names in by_file.items():
        with _opened(file) as f:
            for name in names:
                part = f.get_slice(index[name][1])
                shape, kind = tuple(part.get_shape()), part.get_dtype()
                if shape != wanted[name].shape:
                    problems.append(
                        f"{name} has shape {shape}, config.json says {wanted[name].shape}"
                    )
                if kind not in ("F64", "F32", "F16", "BF16"):
                    problems.append(f"{name} is of type {kind}, not a float of 16 bits or more")
    if problems:
        raise ModelDirectoryError(_summary(directory, problems))


def _check_tied(directory: Path, index: Mapping[str, tuple[Path, str]], rows: int = 8192) -> None:
    """Refuses to drop a head that config.json ties to the embedding, but that differs from it."""
    if _EMBEDDING not in index:
        return
    with _opened(index[_HEAD][0]) as head_file, _opened(index[_EMBEDDING][0]) as table_file:
        head = head_file.get_slice(index[_HEAD][1])
        table = table_file.get_slice(index[_EMBEDDING][1])
        shape = head.get_shape()
        same = shape == table.get_shape() and all(
            np.array_equal(head[i : min(i + rows, shape[0])], table[i : min(i + rows, shape[0])])
            for i in range(0, shape[0], rows)
        )
    if not same:
        raise ModelDirectoryError(
            f"{directory}: config.json says tie_word_embeddings=true, but lm_head.weight is not "
            "the embedding: set it to false there (and in text_config) to use the head"
        )


@contextlib.contextmanager
def _bar(shown: bool, directory: Path, total: int) -> Iterator[Callable[[int], None]]:
    if not shown:
        yield lambda _: None
        return
    from tqdm import tqdm  # imported where used: programs that embed the core don't need it

    # On a terminal only, and only where reading takes long.
    options = {"desc": f"loading {directory.name}", "disable": None, "delay": 5, "leave": False}
    with tqdm(total=total, unit=" parameters", unit_scale=True, **options) as bar:
        yield bar.update


def _summary(directory: Path, problems: list[str], shown: int = 5) -> str:
    more = f" and {len(problems) - shown} more" if len(problems) > shown else ""
    listed = " ".join("; ".join(problems[:shown]).split())  # names may hold line ends
    return f"{directory}: config.json and tensors disagree: {listed}{more}"


def abstract_params(policy: Policy) -> dict:
    """Returns `Policy.init`'s parameters as an unboxed tree of ShapeDtypeStruct."""
    return nn.meta.unbox(jax.eval_shape(policy.init, jax.random.key(0)))

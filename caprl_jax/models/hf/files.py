"""Hugging Face directories in and out: safetensors files <-> parameters, tensor by tensor."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy

from caprl_jax.models.families import ModelDirectoryError, family
from caprl_jax.models.hf import tensors as layout
from caprl_jax.models.hf.tensors import Tensor
from caprl_jax.models.vlm import Policy

SHARD_BYTES = 5_000_000_000
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a model directory, checked to be of a family that is built here."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ModelDirectoryError(
            f"{directory} is not a model directory: {path} does not exist. Give a directory in "
            "Hugging Face format (config.json, *.safetensors, tokenizer files)"
        )
    config = read_json(path)
    family(config, path)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model directory that must hold an object."""
    try:
        found = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ModelDirectoryError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(found, dict):
        raise ModelDirectoryError(f"{path} holds a {type(found).__name__}, not a JSON object")
    return found


def _index(directory: Path) -> dict[str, tuple[Path, str]]:
    """Canonical tensor name -> (file, name in the file), every name once."""
    files = sorted(directory.glob("*.safetensors"))
    _check_complete(directory, files)
    index: dict[str, tuple[Path, str]] = {}
    for file in files:
        with _opened(file) as f:
            names = list(f.keys())
        for name in names:
            key = layout.canonical(name)
            if key in index:
                raise ModelDirectoryError(
                    f"{directory}: {key} is in {index[key][0].name} and in {file.name}"
                )
            index[key] = (file, name)
    return index


def _check_complete(directory: Path, files: list[Path]) -> None:
    """All files there that model.safetensors.index.json speaks of; at least one of some kind."""
    path = directory / "model.safetensors.index.json"
    if path.is_file():
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelDirectoryError(f"{path} has no weight_map")
        shards = set(weight_map.values())
        missing = sorted(shards - {f.name for f in files})
        if missing:
            raise ModelDirectoryError(
                f"{directory}: {path.name} names {len(missing)} of {len(shards)} files that are "
                f"not there, first {missing[0]}: copy or download the rest"
            )
    if not files:
        other = [f for pattern in ("*.bin", "*.pth", "*.gguf") for f in directory.glob(pattern)]
        found = f"; {other[0].name} is of another format: convert it first" if other else ""
        raise ModelDirectoryError(f"{directory} holds no *.safetensors file{found}")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped into memory for as long as it is read."""
    try:
        with safetensors.safe_open(file, framework="numpy") as f:
            yield f
    except (OSError, safetensors.SafetensorError) as e:
        raise ModelDirectoryError(
            f"{file} is not a readable safetensors file, or is cut short: {e}"
        ) from e


def load_params(
    directory: str | Path,
    policy: Policy,
    dtype: Any = np.float32,
    shardings: Any = None,
    progress: bool = False,
) -> dict:
    """Reads parameters tensor by tensor, every one checked before the first is read.

    With shardings each device's part is read from the file, cast and placed by itself, so that a
    process reads what its devices need and holds at most one (stacked) tensor on the host.

    Args:
      directory: in Hugging Face format.
      policy: as `families.build` makes it from that directory's config.
      dtype: of the parameters.
      shardings: tree of NamedSharding like the parameters; None gives numpy arrays.
      progress: show a bar of the parameters read.

    Returns:
      Nested dict of arrays, in the tree that `Policy.init` makes (unboxed).

    Raises:
      ModelDirectoryError: naming each tensor that is missing, left over or of the wrong shape.
    """
    directory = Path(directory)
    index, tensors = _index(directory), layout.tensors(policy, read_config(directory))
    shapes = _checked_shapes(directory, policy, tensors, index)
    placed = None if shardings is None else flax.traverse_util.flatten_dict(shardings)
    params = {}
    with _bar(progress, directory, sum(map(math.prod, shapes.values()))) as advance:
        for t in tensors:
            shape, read = shapes[t.path], _Reader(t, shapes[t.path], index, dtype, advance)
            if placed is None:
                params[t.path] = read((slice(None),) * len(shape))
            else:
                params[t.path] = jax.make_array_from_callback(shape, placed[t.path], read)
    return flax.traverse_util.unflatten_dict(params)


class _Reader:
    """Reads parts of one of our tensors; what several devices hold is read once."""

    def __init__(self, tensor: Tensor, shape, index, dtype, advance: Callable[[int], None]):
        self._tensor, self._shape, self._index = tensor, shape, index
        self._dtype, self._advance, self._read = np.dtype(dtype), advance, {}

    def __call__(self, part: tuple[slice, ...]) -> np.ndarray:
        key = tuple(s.indices(size) for s, size in zip(part, self._shape, strict=True))
        if key not in self._read:
            self._read[key] = self._fresh(part, tuple(len(range(*k)) for k in key))
        return self._read[key]

    def _fresh(self, part: tuple[slice, ...], size: tuple[int, ...]) -> np.ndarray:
        t, out = self._tensor, np.empty(size, self._dtype)
        if not t.stacked:
            out[...] = self._one(t.name, self._shape, part)
            return out
        layers = range(*part[0].indices(self._shape[0]))
        for i, name in enumerate(t.names(layers)):
            out[i] = self._one(name, self._shape[1:], part[1:])
        return out

    def _one(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...]) -> np.ndarray:
        file, name = self._index[name]
        # Opened anew each time: pages of a mapping that stays open would count as ours.
        with _opened(file) as f:
            found = self._tensor.read(f.get_slice(name), shape, part)
            found = found.astype(self._dtype)  # a copy, before the mapping goes
        self._advance(found.size)
        return found


def _checked_shapes(
    directory: Path,
    policy: Policy,
    tensors: list[Tensor],
    index: Mapping[str, tuple[Path, str]],
) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Our shapes by path, after checking names and shapes in the files' headers."""
    targets = flax.traverse_util.flatten_dict(abstract_params(policy))
    shapes = {path: a.shape for path, a in targets.items()}
    wanted = {n: t for t in tensors for n in t.names(range(shapes[t.path][0]))}
    left_over = set(index) - set(wanted)
    if policy.decoder.config.tied and _HEAD in left_over:  # some files hold the tied head again
        left_over.discard(_HEAD)
        _check_tied(directory, index)
    problems = [f"missing {n}" for n in sorted(set(wanted) - set(index))]
    problems += [f"left over {n}" for n in sorted(left_over)]
    by_file: dict[Path, list[str]] = {}
    for name in sorted(set(wanted) & set(index)):
        by_file.setdefault(index[name][0], []).append(name)
    for file, names in by_file.items():
        with _opened(file) as f:
            for name in names:
                part = f.get_slice(index[name][1])
                found, kind = tuple(part.get_shape()), part.get_dtype()
                if found != wanted[name].shape:
                    problems.append(
                        f"{name} has shape {found}, config.json says {wanted[name].shape}"
                    )
                if kind not in ("F64", "F32", "F16", "BF16"):
                    problems.append(f"{name} is of type {kind}, not a float of 16 bits or more")
    if problems:
        raise ModelDirectoryError(_summary(directory, problems))
    return shapes


def _check_tied(directory: Path, index: Mapping[str, tuple[Path, str]], rows: int = 8192) -> None:
    """Refuses to drop a head that differs from the embedding it is said to be."""
    if _EMBEDDING not in index:
        return
    with _opened(index[_HEAD][0]) as one, _opened(index[_EMBEDDING][0]) as two:
        head, table = one.get_slice(index[_HEAD][1]), two.get_slice(index[_EMBEDDING][1])
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
    from tqdm import tqdm  # imported where used: embedding the core doesn't need it

    title = f"loading {directory.name}"
    with tqdm(total=total, unit=" parameters", unit_scale=True, desc=title) as bar:
        yield bar.update


def _summary(directory: Path, problems: list[str], shown: int = 5) -> str:
    more = f" and {len(problems) - shown} more" if len(problems) > shown else ""
    return f"{directory}: config.json and tensors disagree: " + "; ".join(problems[:shown]) + more


def abstract_params(policy: Policy) -> dict:
    """The unboxed tree of jax.ShapeDtypeStruct that `Policy.init` would make."""
    return nn.meta.unbox(jax.eval_shape(policy.init, jax.random.key(0)))


def save(
    directory: str | Path,
    policy: Policy,
    params: Mapping[str, Any],
    source: str | Path,
    dtype: Any = np.float32,
    shard_bytes: int = SHARD_BYTES,
    card: str | None = None,
) -> None:
    """Writes a Hugging Face directory, under a temporary name until it is complete.

    Holds one file's tensors on the host at a time.

    Args:
      directory: to be made; must not exist.
      policy: the modules.
      params: unboxed parameters, numpy or JAX arrays. Of those that no process has whole, one
        tensor at a time is gathered: all processes must call, and the first one writes.
      source: the directory whose config.json, tokenizer and processor files go along.
      dtype: of the tensors in the files.
      shard_bytes: size of a file at most, unless one tensor is larger.
      card: content of README.md, the model card; None writes none.

    Raises:
      FileExistsError: directory exists.
    """
    directory, source = Path(directory), Path(source)
    flat = flax.traverse_util.flatten_dict(nn.meta.unbox(params))
    config = read_config(source)
    of = family(config, source)
    pieces = (
        (layout.saved_name(name, of), flat[t.path], layer, t)
        for t in layout.tensors(policy, config)
        for layer, name in enumerate(t.names(range(flat[t.path].shape[0])))
    )
    tensors = _on_host(pieces, np.dtype(dtype))
    if jax.process_index() > 0:
        for _ in tensors:  # takes part in gathering
            pass
        return
    if directory.exists():
        raise FileExistsError(f"{directory} exists already: remove it, or give another name")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_companions(source, partial)
    config["dtype"] = np.dtype(dtype).name
    for part in (config, config.get("text_config") or {}, config.get("vision_config") or {}):
        part.pop("torch_dtype", None)  # the older spelling, of the source's dtype
        if "dtype" in part:
            part["dtype"] = np.dtype(dtype).name
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if card is not None:
        (partial / "README.md").write_text(card)
    _write_shards(partial, tensors, shard_bytes)
    partial.rename(directory)


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, processor and generation files; not weights, nor the source's own model card."""
    weights = (".safetensors", ".safetensors.index.json", ".bin", ".pth", ".gguf")
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(weights) and file.name != "README.md":
            shutil.copy(file, target)


def _on_host(
    pieces: Iterator[tuple[str, Any, int, Tensor]], dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor as a file has it), one after another."""
    host = (None, None)
    for name, value, layer, t in pieces:
        if isinstance(value, jax.Array):
            # Of a fresh array: JAX keeps the host's copy for as long as the array itself lives.
            own = _whole(value[layer] if t.stacked else value.copy())
        else:
            if host[0] is not value:
                host = (value, np.asarray(value))
            own = host[1][layer] if t.stacked else host[1]
        yield name, t.to_file(own.astype(dtype))


def _whole(value: jax.Array) -> np.ndarray:
    if value.is_fully_addressable:
        return np.asarray(value)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(value, tiled=True)


def _write_shards(directory: Path, tensors: Iterator[tuple[str, np.ndarray]], limit: int) -> None:
    """Writes one file after another, so that no more than one is held on the host."""
    files: list[tuple[Path, list[str]]] = []
    shard: dict[str, np.ndarray] = {}
    total, held = 0, 0

    def flush():
        path = directory / f"{len(files)}.safetensors"
        safetensors.numpy.save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o644)  # others serve it
        files.append((path, list(shard)))
        shard.clear()

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > limit:
            flush()
            held = 0
        shard[name] = tensor
        held, total = held + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(files) == 1:
        files[0][0].rename(directory / "model.safetensors")
        return
    weight_map = {}
    for i, (path, names) in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        path.rename(directory / name)
        weight_map.update(dict.fromkeys(names, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

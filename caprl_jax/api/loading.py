"""Models on a mesh, and arrays on theirs, for both kinds of objects."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from caprl_jax.data.tokens import Tokenizer
from caprl_jax.models.vlm import Policy
from caprl_jax.parallel import mesh as mesh_lib
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.run import compile as compile_lib
from caprl_jax.run import load


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with its parameters on a mesh.

    Attributes:
      modules: Flax modules and sizes.
      params: their parameters.
      tokenizer: the directory's tokenizer.
      rules: mesh and shard rules of the parameters.
      directory: the directory they were read from.
    """

    modules: Policy
    params: Any
    tokenizer: Tokenizer
    rules: ShardRules
    directory: Path


def read(
    path: str | Path, revision: str, mesh: Mesh | None, dtype: Any, param_dtype: Any
) -> Loaded:
    """Reads a model; arguments as load_policy's."""
    rules = mesh_lib.shard_rules(mesh_lib.make_mesh({"fsdp": -1}) if mesh is None else mesh)
    dtype = compile_lib.default_dtype() if dtype is None else dtype
    modules, directory, tokenizer = load.read_with_tokenizer(str(path), revision, dtype)
    params = load.load_frozen(modules, directory, rules, param_dtype or dtype)
    return Loaded(modules, params, tokenizer, rules, directory)


def put(arrays: Any, rules: ShardRules) -> Any:
    """Fills the batch axis with copies up to a multiple of the mesh's, and places it."""
    multiple = mesh_lib.batch_multiple(rules)

    def filled(a):
        return np.resize(a, (-(-len(a) // multiple) * multiple, *a.shape[1:]))

    return mesh_lib.put_batch(jax.tree.map(filled, arrays), rules)

"""Models on a mesh, and arrays on theirs, for both kinds of objects."""

from typing import Any

import jax
import numpy as np

from caprl_jax.parallel import mesh as mesh_lib
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.run import compile as compile_lib
from caprl_jax.run import load


def read(path, revision, mesh, dtype, param_dtype):
    """Returns (modules, parameters, tokenizer, shard rules, directory) of a model."""
    rules = mesh_lib.shard_rules(mesh_lib.make_mesh({"fsdp": -1}) if mesh is None else mesh)
    dtype = compile_lib.default_dtype() if dtype is None else dtype
    modules, directory, tokenizer = load.read_with_tokenizer(str(path), revision, dtype)
    params = load.load_frozen(modules, directory, rules, param_dtype or dtype)
    return modules, params, tokenizer, rules, directory


def put(arrays: Any, rules: ShardRules) -> Any:
    """Fills the batch axis with copies up to a multiple of the mesh's, and places it."""
    multiple = mesh_lib.batch_multiple(rules)

    def filled(a):
        return np.resize(a, (-(-len(a) // multiple) * multiple, *a.shape[1:]))

    return mesh_lib.put_batch(jax.tree.map(filled, arrays), rules)

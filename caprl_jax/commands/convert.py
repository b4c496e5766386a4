"""Converts a run's checkpoint to a Hugging Face directory, or the other way round.

    python -m caprl_jax.convert --checkpoint=WORKDIR[/STEP] --out=DIR [--dtype=bfloat16]
    python -m caprl_jax.convert --model=DIR --out=DIR2 [--dtype=bfloat16]

The first writes a run's policy as transformers and vLLM read it. The second writes a model's
weights as Orbax does, which many processes read in parallel; policy.path and load_policy take the
result, a local directory, like the original.
"""

import json
import shutil
import sys
from pathlib import Path

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from absl import flags

from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph, set_up_logging
from caprl_jax.errors import ConfigError
from caprl_jax.models.hf import files as hf
from caprl_jax.models.hf.save import copy_companions
from caprl_jax.models.vlm import Params, Policy
from caprl_jax.parallel import mesh
from caprl_jax.run import checkpoint, export, load
from caprl_jax.run import compile as compile_lib
from caprl_jax.run import params as params_lib
from caprl_jax.run import workdir as workdir_lib
from caprl_jax.run.optimizer import averaged


def find_step(path: Path) -> tuple[Path, int]:
    """Returns (workdir, step) of WORKDIR[/STEP] or WORKDIR/checkpoints/STEP; by default the last.

    Raises:
      ConfigError: there is no such checkpoint.
    """
    workdir, step = path, None
    if path.name.isdigit() and not (path / "checkpoints").is_dir():
        step = int(path.name)
        workdir = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    there = checkpoint.steps(workdir)
    if not there or (step is not None and step not in there):
        raise ConfigError(
            f"{path} is no checkpoint: {workdir} has "
            + (f"those of steps {', '.join(map(str, there))}" if there else "none")
        )
    return workdir, there[-1] if step is None else step


def to_hugging_face(path: Path, out: Path, dtype: str, source: str | None = None) -> None:
    """Writes the policy of a run's checkpoint to out."""
    workdir, step = find_step(path)
    with checkpoint.Checkpoints(workdir, keep=None) as checkpoints:
        config = ml_collections.ConfigDict(checkpoints.config(step))
        path = source or config.policy.path
        options = compile_lib.policy_options(config)
        revision = "" if source else config.policy.revision
        policy, directory = load.read_model(path, revision, np.float32, **options)
        params = _exported(checkpoints, step, config, policy)
    card = export.model_card(config, step, export.figures(workdir, step))
    export.export(out, export.Trained(policy, params, directory, path), dtype, card)


def _exported(
    checkpoints: checkpoint.Checkpoints,
    step: int,
    config: ml_collections.ConfigDict,
    policy: Policy,
) -> Params:
    """Restores the parameters that the run would export: averages where these are kept."""
    rules, key = mesh.shard_rules(mesh.make_mesh({"fsdp": -1})), jax.random.key(0)
    if not config.optimizer.get("ema", 0.0):
        shardings = mesh.param_shardings(jax.eval_shape(policy.init, key), rules)
        return checkpoints.restore_params(step, hf.abstract_params(policy), shardings)
    optimizer = compile_lib.optimizer(config)
    boxed = jax.eval_shape(
        lambda key: compile_lib.first_state(config, policy, optimizer, policy.init(key)), key
    )
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        *(nn.meta.unbox(boxed), mesh.param_shardings(boxed, rules)),
    )
    return averaged(policy, checkpoints.restore(step, target))


def to_orbax(path: str, revision: str, out: Path, dtype: str) -> None:
    """Writes a model directory whose weights are an Orbax checkpoint."""
    policy, directory = load.read_model(path, revision, np.float32)
    rules = mesh.shard_rules(mesh.make_mesh({"fsdp": -1}))
    params = load.load_frozen(policy, directory, rules, np.dtype(dtype))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    params_lib.save(partial / params_lib.FOLDER, params)
    copy_companions(directory, partial)
    config = json.loads((directory / "config.json").read_text()) | {"dtype": dtype}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    partial.rename(out)


def _require_writable(out: Path) -> None:
    """Refuses a directory that can't be made, before a model is read.

    Where Orbax can't make one, its threads keep the process from ending for five minutes.
    """
    try:
        workdir_lib.try_out(out.parent)
    except OSError as e:
        raise ConfigError(f"can't write {out}: {e.strerror or e}; give another --out") from e


def main(_: list[str]) -> None:
    """Converts the model that the flags name, or prints the error in one paragraph."""
    set_up_logging()
    out = Path(flags.FLAGS.out)
    if (flags.FLAGS.checkpoint is None) == (flags.FLAGS.model is None):
        sys.exit("error: give either --checkpoint=WORKDIR[/STEP] or --model=DIR")
    if out.exists():
        sys.exit(f"error: {out} exists already: remove it, or give another --out")
    with in_one_paragraph():
        _require_writable(out)
        if flags.FLAGS.checkpoint is not None:
            checkpoint_path = Path(flags.FLAGS.checkpoint)
            to_hugging_face(checkpoint_path, out, flags.FLAGS.dtype, flags.FLAGS.source)
        else:
            to_orbax(flags.FLAGS.model, flags.FLAGS.revision, out, flags.FLAGS.dtype)
    print(f"made {out}")


def define_flags() -> None:
    """Defines the flags, in the program only: other modules have flags of the same names."""
    flags.DEFINE_string("checkpoint", None, "A run's workdir, or one of its steps.")
    flags.DEFINE_string("model", None, "A directory, gs:// URL or hub id.")
    flags.DEFINE_string("revision", "", "Revision of a hub id.")
    flags.DEFINE_string("out", None, "Directory to make; must not exist.", required=True)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Dtype of the weights.")
    flags.DEFINE_string("source", None, "Where the run's base model lies now, if it has moved.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)

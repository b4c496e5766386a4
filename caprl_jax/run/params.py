"""A model's parameters as an Orbax checkpoint, alone."""

from pathlib import Path
from typing import Any

FOLDER = "orbax"  # in a model directory, with weights written by Orbax


def save(directory: Path, params: Any) -> None:
    """Writes a model's parameters; directory must not exist."""
    import orbax.checkpoint as ocp  # imported where used

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), params)


def load(directory: Path, target: Any) -> Any:
    """Reads the parameters that save wrote.

    Args:
      directory: the directory of the parameters.
      target: tree of jax.ShapeDtypeStruct with shardings; parameters are cast to its dtypes.
    """
    import orbax.checkpoint as ocp  # imported where used

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory.absolute(), target)

"""Cases of model directories: an edit of the shipped policy or judge, and what loading it gives."""

import shutil
from pathlib import Path

import numpy as np

import caprl_jax
from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.hf import download as sources

from .case import Case, Gives, Refused
from .edits import Edit

BLACK = np.zeros((84, 84, 3), np.uint8)
LOADS = Gives("it loads, as if nothing were wrong")


def _run(of: str, edit: Edit):
    def run(folder: Path) -> bool:
        directory = folder / "model"
        shutil.copytree(sources.fetch(f"asset:tiny/{of}"), directory)
        edit(directory)
        try:
            if of == "judge":
                return bool(caprl_jax.load_judge(directory).prompt.fixed())
            return bool(caprl_jax.load_policy(directory).inputs([BLACK]))
        except ModelDirectoryError as e:
            assert str(directory) in str(e), f"the message doesn't name the directory: {e}"
            raise

    return run


def cases(kind: str, table: dict[str, tuple[Edit, str | None]], of: str = "policy") -> list[Case]:
    """Makes cases of {name: (edit, part of the error; None if it loads)}."""
    return [
        Case(
            kind,
            name,
            LOADS if phrase is None else Refused(phrase, ModelDirectoryError),
            _run(of, edit),
        )
        for name, (edit, phrase) in table.items()
    ]

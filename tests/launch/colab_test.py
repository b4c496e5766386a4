"""The notebook runs from top to bottom, and lies in git without outputs."""

import json
import re
import types
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement

from ..xla_flags import ONE_DEVICE

FILE = Path(__file__).parents[2] / "launch" / "colab.ipynb"


def outputs(notebook, kind: str) -> list[str]:
    """The outputs of a MIME type, in order."""
    found = (
        output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())
    )
    return [data[kind] for data in found if kind in data]


def printed(notebook, stream: str) -> str:
    found = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "".join(o["text"] for o in found if o.output_type == "stream" and o["name"] == stream)


def test_no_outputs_lie_in_git():
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not c.outputs and c.execution_count is None for c in code)


@pytest.mark.parametrize(("gpu", "tpu"), [(None, []), ("nvidia-smi", []), (None, ["accel0"])])
def test_what_it_installs_is_a_requirement(gpu, tpu):
    """The tests' own Python has the package: the line doesn't run there."""
    [source] = [c.source for c in nbformat.read(FILE, as_version=4).cells if "%pip" in c.source]
    [extra] = re.findall(r"^ *extra = (.*)$", source, re.MULTILINE)
    value = eval(extra, {"shutil": types.SimpleNamespace(which=lambda _: gpu), "tpu": tpu})
    assert '"{SOURCE}[plot{extra}]"' in source
    wanted = {"plot"} | ({"cuda12"} if gpu else {"tpu"} if tpu else set())
    assert Requirement(f"caprl_jax[plot{value}]").extras == wanted


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", ONE_DEVICE)
    notebook = nbformat.read(FILE, as_version=4)
    (trained,) = [cell for cell in notebook.cells if "STEPS = 40" in cell.source]
    trained.source = trained.source.replace("STEPS = 40", "STEPS = 5")  # minutes less
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=1200, resources=resources).execute()
    # Two curves that grew, the run's picture, one's own image, and the comparison of two runs.
    assert len(outputs(notebook, "image/png")) == 5
    summary = json.loads((tmp_path / "runs" / "short" / "summary.json").read_text())
    assert summary["steps"] == 5
    assert (tmp_path / "runs" / "captioner" / "model.safetensors").is_file()
    assert "model.safetensors" in printed(notebook, "stdout")
    assert "Traceback" not in printed(notebook, "stderr")

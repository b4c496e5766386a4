"""Runs a module as `python -m` does, with core packages only, and writes which lines of it ran.

python traced.py FILE -m MODULE ARGUMENTS      adds the module's lines that ran to FILE, as JSON
"""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

DATA_STACK = (
    "array_record datasets grain huggingface_hub orbax PIL pyarrow safetensors sentencepiece "
    "sklearn tensorflow_datasets tokenizers torch transformers"
).split()


class Refuse:
    """Finds no module of the data stack, as on a machine that lacks it."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in DATA_STACK:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main():
    out, (_, module, *arguments) = Path(sys.argv[1]), sys.argv[2:]
    sys.meta_path.insert(0, Refuse())
    file, ran = importlib.util.find_spec(module).origin, set()

    def line(frame, event, _):
        if event == "line":
            ran.add(frame.f_lineno)
        return line

    sys.argv = [file, *arguments]
    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename == file else None)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.settrace(None)
        before = json.loads(out.read_text()) if out.exists() else []
        out.write_text(json.dumps(sorted(ran.union(before))))


if __name__ == "__main__":
    main()

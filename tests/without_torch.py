"""Runs a module as `python -m` does, in a process that finds no PyTorch: MODULE ARGUMENTS.."""

import runpy
import sys
from importlib.machinery import PathFinder


class _WithoutTorch(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "torch" else super().find_spec(name, path, target)


if __name__ == "__main__":
    sys.meta_path = [_WithoutTorch if f is PathFinder else f for f in sys.meta_path]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

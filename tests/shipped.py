"""The configs of this repository, as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

CONFIGS = Path(__file__).parent.parent / "configs"


def module(name: str) -> ModuleType:
    """configs/NAME.py, whose get_config(argument) is the config."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found

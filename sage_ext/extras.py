"""Optional dependencies, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(name: str, extra: str) -> ModuleType:
    """The module `name`, or an ImportError that says which extra of sage-ext installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"{package} is not installed; it comes with: pip install sage-ext[{extra}]") from error

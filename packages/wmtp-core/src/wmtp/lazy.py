"""Loading of a package's names on first use.

So importing it is cheap.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["lazy_names", "names_in_stub"]


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a package.

    Args:
        package: its ``__name__``.
        homes: name → module that defines it.
    """

    def load(name: str) -> Any:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load


def names_in_stub(stub: Path) -> dict[str, str]:
    """Read the imports of a ``.pyi`` file: name → module.

    Type checkers and editors read the same file, so every name of a large package stands in one place.
    """
    tree = ast.parse(stub.read_text(encoding="utf-8"))
    return {alias.name: str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}

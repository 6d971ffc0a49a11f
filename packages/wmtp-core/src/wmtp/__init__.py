"""WMTP: weighted multi-token-prediction fine-tuning of language models.

``wmtp.run("recipe.toml")`` does what ``wmtp run recipe.toml`` does, and each other command has a function too. Importing this
package is cheap: every name is loaded when it is first used. ``__init__.pyi`` lists them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wmtp import moved
from wmtp.lazy import lazy_names, names_in_stub

moved.install()

_HOMES = names_in_stub(Path(__file__).with_suffix(".pyi"))
_load = lazy_names(__name__, _HOMES)

__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("wmtp-core")
    return _load(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

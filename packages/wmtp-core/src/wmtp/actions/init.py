"""Recipes that come with WMTP, and their sample data.

Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

from attrs import frozen

from wmtp.errors import ConfigError
from wmtp.public import public
from wmtp.spelling import did_you_mean
from wmtp.storage.uris import local_path

__all__ = ["Initialized", "init", "recipes"]

#: the file of a recipe that is run, by the command that runs it
_COMMANDS: Final = {"study.toml": "study", "recipe.toml": "run"}


@frozen(kw_only=True)
class Initialized:
    """Result of `init`.

    Args:
        folder: where the recipe is now.
        files: what was written, the file that is run first.
        command: runs it in that folder, as ``wmtp run recipe.toml``.
    """

    folder: Path
    files: Sequence[Path]
    command: str


def recipes() -> Mapping[str, str]:
    """List the recipes by name, each with a one-sentence summary."""
    return {entry.name: _summary(entry) for entry in _folders()}


@public
def init(recipe: str, folder: str | os.PathLike[str] | None = None) -> Initialized:
    """Write a recipe that runs on a CPU, with sample data.

    Args:
        recipe: its name; `recipes` lists them.
        folder: where to; made if it is not there. Default: the recipe's name, in the working folder.

    Raises:
        ConfigError: there is no such recipe, or a file of it is there already; nothing was written then.
    """
    source = next((entry for entry in _folders() if entry.name == recipe), None)
    if source is None:
        names = [entry.name for entry in _folders()]
        hint = did_you_mean(recipe, names)
        raise ConfigError(f"init: there is no recipe {recipe!r}; {hint or 'one of: ' + ', '.join(names)}")
    target = local_path(recipe if folder is None else folder, key="init")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"init: {target} is a file; name a folder")
    main = _main_file(source)
    found = _contents(source)
    contents = {target / name: found[name] for name in sorted(found, key=lambda name: (name != main, name))}
    if taken := [str(path) for path in contents if path.exists()]:
        raise ConfigError(f"init: {', '.join(taken)}: exists already, and is left as it is; name another folder")
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"init: {target} cannot be written: {error.strerror}; name another folder") from None
    return Initialized(folder=target, files=tuple(contents), command=f"wmtp {_COMMANDS[main]} {main}")


def _folders() -> list[Traversable]:
    return sorted((entry for entry in files("wmtp").joinpath("recipes").iterdir() if entry.is_dir()), key=lambda e: e.name)


def _main_file(source: Traversable) -> str:
    return next(name for name in _COMMANDS if source.joinpath(name).is_file())


def _contents(source: Traversable, within: str = "") -> Mapping[str, bytes]:
    """Read the files of a recipe, those in its folders too."""
    found: dict[str, bytes] = {}
    for entry in source.iterdir():
        found |= _contents(entry, f"{within}{entry.name}/") if entry.is_dir() else {f"{within}{entry.name}": entry.read_bytes()}
    return found


def _summary(entry: Traversable) -> str:
    text = entry.joinpath(_main_file(entry)).read_text(encoding="utf-8")
    return text.splitlines()[0].removeprefix("# ").partition(". ")[0].rstrip(".")

"""Inputs of a run, fixed when it began, for a resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp.config.inputs import anchored, inputs, with_uris
from wmtp.config.problems import KeyPath, dotted
from wmtp.config.tree import flat
from wmtp.runs.files import CONFIG_FILE, read_info, read_snapshot
from wmtp.storage.uris import scheme_of

if TYPE_CHECKING:
    from wmtp.config.schema import Config

__all__ = ["fixed", "given_inputs", "pins", "with_given_paths"]


def given_inputs(run_dir: Path) -> Mapping[str, str]:
    """Read how inputs were given that the snapshot has otherwise, by key."""
    return read_info(run_dir).get("given") or {}


def pins(run_dir: Path, config: Config) -> dict[str, str]:
    """Find the commits of inputs given as in the first config."""
    given, snapshot = given_inputs(run_dir), flat(read_snapshot(run_dir / CONFIG_FILE))
    return {
        one.key: str(snapshot[one.key])
        for one in inputs(config)
        if given.get(one.key) == one.uri and one.key in snapshot and scheme_of(str(snapshot[one.key])) != "file"
    }


def fixed(run_dir: Path, config: Config) -> Config:
    """Fix a config's inputs: by the snapshot's commits, and absolute paths."""
    return anchored(with_uris(config, pins(run_dir, config)))


def with_given_paths(run_dir: Path, snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """Put relative paths back into a run's snapshot, for others.

    The places of its folders concern only its owner.
    """
    given = given_inputs(run_dir)

    def restored(value: Any, path: KeyPath) -> Any:
        if isinstance(value, Mapping):
            return {key: restored(element, (*path, key)) for key, element in value.items()}
        if isinstance(value, list):
            return [restored(element, (*path, index)) for index, element in enumerate(value)]
        is_path = isinstance(value, str) and dotted(path) in given and scheme_of(value) == "file"
        return given[dotted(path)] if is_path else value

    return restored(snapshot, ())

"""Keys that ``wmtp eval`` does not read: refused after ``--set``, named where a file has them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from wmtp.config.load import Loaded
from wmtp.config.overrides import Override
from wmtp.config.problems import KeyPath, Problem, dotted
from wmtp.config.toml_file import FileSource
from wmtp.runs.directory import CONFIG_FILE

__all__ = ["READ", "unread_problems"]

logger = logging.getLogger("wmtp")

#: What a measurement depends on: whole sections, or keys. A key that is not here has no effect, and is refused.
READ: Final[frozenset[str]] = frozenset(
    {
        "run.seed",
        "run.output_dir",
        "tokenizer",
        "datasets",
        "data.cache_dir",
        "data.eval",
        "data.train.sources",
        "data.train.max_length",
        "data.train.batch_size",
        "data.train.micro_batch_size",
        "data.train.packing",
        "data.train.learn_prompt",
        "data.train.overlong",
        "data.train.on_bad_example",
        "devices.device",
        "devices.precision",
        "devices.attention",
        "devices.compile",
        "devices.threads",
        "tracker",
        "storage",
        "eval",
    }
)


def unread_problems(loaded: Loaded, run_dir: Path | None) -> Iterator[Problem]:
    """Refuse what ``--set`` gives in vain, and log what files say besides.

    Args:
        loaded: the config of the measurement.
        run_dir: of a run, whose model has a tokenizer of its own; None for a model that stands alone.
    """
    read = READ - {"tokenizer"} if run_dir is not None else READ
    of_run = None if run_dir is None else str(run_dir / CONFIG_FILE)
    said: list[str] = []
    for path in _leaves(loaded.document.data, ()):
        if any(dotted(path[:length]) in read for length in range(1, len(path) + 1)):
            continue
        source = loaded.document.source(path)
        if isinstance(source, Override):
            yield Problem(path, "wmtp eval does not read this key; remove it")
        elif isinstance(source, FileSource) and source.name != of_run:
            said.append(dotted(path))
    if said:
        logger.info("not read by wmtp eval: %s", ", ".join(said))


def _leaves(value: object, path: KeyPath) -> Iterator[KeyPath]:
    if isinstance(value, dict) and value:
        for key, element in value.items():
            yield from _leaves(element, (*path, key))
    elif path:
        yield path

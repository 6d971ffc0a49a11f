"""Keys that ``wmtp eval`` does not read.

They are refused after ``--set``, and named where a file has them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from wmtp.config.load import Loaded
from wmtp.config.overrides import Override
from wmtp.config.problems import KeyPath, Problem, dotted
from wmtp.config.schema import Config
from wmtp.config.toml_file import FileSource
from wmtp.models.opening import takes_named_tokenizer
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
        "data.train.learn",
        "data.train.learn_prompt",
        "data.train.boundary",
        "data.train.chat_template",
        "data.train.prompt_weights",
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


def unread_problems(loaded: Loaded, path: Path, run_dir: Path | None) -> Iterator[Problem]:
    """Refuse what ``--set`` gives in vain, and log what files say besides.

    Args:
        loaded: the config of the measurement.
        path: of the model.
        run_dir: of its run; None for a model that stands alone.
    """
    idle = _idle_keys(loaded.config)
    if not takes_named_tokenizer(path, run_dir):
        idle["tokenizer"] = ": the run's model has its tokenizer beside it"
    of_run = None if run_dir is None else str(run_dir / CONFIG_FILE)
    said: list[str] = []
    for place in _leaves(loaded.document.data, ()):
        names = [dotted(place[:length]) for length in range(1, len(place) + 1)]
        reason = next((idle[name] for name in names if name in idle), "")
        if not reason and any(name in READ for name in names):
            continue
        source = loaded.document.source(place)
        if isinstance(source, Override):
            yield Problem(place, f"wmtp eval does not read this key{reason}; remove it")
        elif isinstance(source, FileSource) and source.name != of_run:
            said.append(dotted(place))
    if said:
        logger.info("not read by wmtp eval: %s", ", ".join(said))


def _idle_keys(config: Config) -> dict[str, str]:
    """List keys of `READ` that others leave without effect, with reasons."""
    idle: dict[str, str] = {}
    measured = config.data.eval
    if measured is None:
        keys = {key for key in READ if key.startswith(("data.train.", "data.cache_dir", "datasets", "run.output_dir"))}
        return dict.fromkeys(keys, " without [data.eval]")
    if measured.holdout is None:
        idle["data.train.sources"] = " without data.eval.holdout"
    if measured.batch_size is not None:
        keys = ("data.train.batch_size", "data.train.micro_batch_size")
        idle |= dict.fromkeys(keys, ": data.eval.batch_size says how many rows are measured at once")
    if config.data.cache_dir is not None:
        idle["run.output_dir"] = ": data.cache_dir says where tokens are kept"
    return idle


def _leaves(value: object, path: KeyPath) -> Iterator[KeyPath]:
    if isinstance(value, dict) and value:
        for key, element in value.items():
            yield from _leaves(element, (*path, key))
    elif path:
        yield path

"""Contract of an evaluator. Importing it imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from wmtp.plugins.contract import Contract

if TYPE_CHECKING:
    import torch

    from wmtp.data.batch import Batch
    from wmtp.distributed.ranks import Ranks
    from wmtp.models.mtp import MTPModel
    from wmtp.tokenizers import Tokenizer

__all__ = ["Estimate", "Evaluator", "Measured"]


@frozen(kw_only=True)
class Estimate:
    """A number with its uncertainty. ``float()`` of it is the number.

    Args:
        value: the number.
        low, high: its 95 % bootstrap interval over what was measured.
        n: over how many units that is.
        unit: what those are: documents, prompts, problems, repetitions.
    """

    value: float
    low: float
    high: float
    n: int
    unit: str

    def __float__(self) -> float:
        return self.value


def _fetch(uri: str, key: str) -> Path:
    """Without options for any storage backend."""
    from wmtp.config.places import build_backends
    from wmtp.config.schema import StorageConfig
    from wmtp.storage.uris import localize

    storage = StorageConfig()
    return localize(uri, build_backends(storage), Path(storage.cache_dir).expanduser(), key=key)


@frozen(kw_only=True, eq=False)
class Measured:
    """Model, data and settings that an evaluator works on.

    Args:
        model: the trained model with all its heads, in eval mode.
        tokenizer: its tokenizer.
        batches: the rows of ``[data.eval]``, on the CPU; empty where the config has none.
        device: where the model is.
        autocast: makes the context in which the model computes.
        seed: the run's seed.
        ranks: the processes of the run. Each of them measures, and rank 0's numbers are kept. Where the model is sharded
            over them, all must call it equally often; `wmtp.training.evaluate.evaluate` shares the batches.
        output_dir: where an evaluator may keep files of its own; None: nowhere.
        allow_code_execution: whether the user has allowed, on the command line, that code written by the model runs.
        fetch: the local path of a URI, given with the key that it comes from; it follows ``[storage]``.
    """

    model: MTPModel
    tokenizer: Tokenizer
    batches: Sequence[Batch]
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    seed: int
    ranks: Ranks | None = None
    output_dir: Path | None = None
    allow_code_execution: bool = False
    fetch: Callable[[str, str], Path] = _fetch


class Evaluator(Contract, ABC, contract=True):
    """Measures a trained model."""

    def prepare(self, fetch: Callable[[str, str], Path]) -> None:
        """Check what `evaluate` will need, before a run trains.

        Such as files, names and what this machine can do; default: nothing. One process calls it, on another instance.

        Args:
            fetch: see `Measured`.

        Raises:
            WMTPError: something is missing or wrong, which would otherwise be found after the training.
        """

    @abstractmethod
    def evaluate(self, measured: Measured) -> Mapping[str, float | Estimate]:
        """Measure.

        Returns:
            numbers by name. They are logged as ``TYPE/NAME`` and written to ``evaluation.json``; what is known of their
            uncertainty to ``evaluation-details.json``. A name with a further ``/`` in it is a detail, and goes only there.

        Raises:
            WMTPError: it cannot be measured; the message says why.
        """

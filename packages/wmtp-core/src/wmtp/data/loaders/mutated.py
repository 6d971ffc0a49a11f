"""Python code, and copies of it with a mistake."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from attrs import evolve

from wmtp.data.base import BadExample, Example, ExampleLoader
from wmtp.data.mutations import Kind, mutants

__all__ = ["MutatedLoader"]

_log = logging.getLogger("wmtp")


class MutatedLoader(ExampleLoader):
    """Reads what another loader reads, and adds wrong copies; see `wmtp.data.config.Mutated`.

    Args:
        of: the other loader.
        copies: wrong copies of each example.
        kinds: of mistakes.
        seed: of the choice.
    """

    def __init__(self, of: ExampleLoader, copies: int, kinds: tuple[Kind, ...], seed: int) -> None:
        self._of = of
        self._copies = copies
        self._kinds = kinds
        self._seed = seed
        self.evaluation_only = of.evaluation_only
        self.conversations = of.conversations

    def files(self, path: Path | None) -> Sequence[Path]:
        """Those of the other loader."""
        return self._of.files(path)

    def first_examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """Read those of the other loader."""
        return self._of.first_examples(path)

    def doubts(self, path: Path | None) -> Sequence[str]:
        """Say what the other source does."""
        return self._of.doubts(path)

    def unread_keys(self, path: Path | None) -> Mapping[str, str | None]:
        """Read those of the other loader."""
        return self._of.unread_keys(path)

    def examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """Yield each example, then its wrong copies.

        An example that is known to be wrong has none.
        """
        total = unchanged = 0
        for example in self._of.examples(path):
            if isinstance(example, BadExample) or example.is_correct is False:
                yield example
                continue
            if example.messages is not None or example.spans is not None:
                yield BadExample(example.place, "is no prompt and completion, so it has no wrong copy")
                continue
            # by the example, not by its place: others that come or go change nothing
            draw = random.Random(f"{self._seed}\0{example.id}\0{example.completion}")
            wrong = mutants(example.prompt, example.completion, count=self._copies, kinds=self._kinds, draw=draw)
            if wrong is None:
                yield BadExample(example.place, "no Python code that this Python can read, so it has no wrong copy")
                continue
            group = example.group or example.id
            yield evolve(example, is_correct=True, group=group)
            for number, code in enumerate(wrong, start=1):
                yield evolve(
                    example,
                    id=f"{example.id} (wrong {number})",
                    completion=code,
                    group=group,
                    is_correct=False,
                    reward=None,
                    weights=None,
                )
            total += 1
            unchanged += not wrong
        if unchanged:
            _log.info("%d of %d examples have nothing that can be made wrong, and no wrong copy", unchanged, total)

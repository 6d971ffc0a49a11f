"""The contract of a data source. Torch-free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import field, frozen

from wmtp.errors import WMTPError
from wmtp.plugins.contract import Contract

__all__ = ["BadExample", "Document", "Example", "ExampleLoader"]


class BadExample(WMTPError):
    """A line or file that is no example.

    `ExampleLoader.examples` *yields* it in place of an example, so that ``on_bad_example`` decides what happens.

    Args:
        where: ``file:line``.
        problem: what is wrong.
    """

    def __init__(self, where: str, problem: str) -> None:
        self.where = where
        self.problem = problem
        super().__init__(f"{where}: {problem}")


@frozen(kw_only=True)
class Example:
    """One document.

    Args:
        id: what a message calls it: the problem's number, or ``file:line``.
        prompt: what the model is given; not learned unless the config says so.
        completion: what the model learns. An end-of-sequence token follows it.
        group: the problem that this is an answer to; answers of one problem have the same. Default: ``id``.
        is_correct: whether the answer is right, where that is known.
        reward: how good it is, where that is known.
        weights: a weight for every token of the completion (the end-of-sequence token may have one more), or pairs of
            (text, weight): pieces that joined make the completion, whose tokens get that weight. None: 1 everywhere.
        where: what a message about a fault in it calls it: ``file:line``. Default: ``id``.
    """

    id: str
    prompt: str = ""
    completion: str
    group: str = field(default="")
    is_correct: bool | None = None
    reward: float | None = None
    weights: tuple[float, ...] | tuple[tuple[str, float], ...] | None = None
    where: str = ""


@frozen(kw_only=True)
class Document:
    """What is known of one document, or of one piece of a document that was split.

    Args:
        index: its number in the tokenised data set; the same in every run with the same data and tokenizer.
        start: where the piece starts, in tokens of the whole document.
        id: the example's id.
        group: the example's group: the same in answers to one problem, within one data set.
        is_correct: the example's label, where it has one.
        reward: the example's reward, where it has one.
        source: the data set's name in the config.
    """

    index: int
    start: int
    id: str
    group: str
    is_correct: bool | None = None
    reward: float | None = None
    source: str = ""


class ExampleLoader(Contract, ABC, contract=True):
    """Turns files into examples."""

    #: examples for evaluation only: training on them is refused unless the config class has ``allow_training = true``
    evaluation_only: bool = False

    @abstractmethod
    def examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """The examples, in the order of the files.

        Args:
            path: the local file or folder of the config's ``uri``; None where the config class has no ``uri``.

        Raises:
            WMTPError: the files cannot be read at all. One bad line among good ones is yielded as `BadExample` instead.
        """

    def files(self, path: Path | None) -> Sequence[Path]:
        """The files whose bytes decide `examples`: tokenised data is kept for as long as none of them changes.

        The default is the file ``path``, or every file in the folder ``path``. A loader that reads something else says so here.
        """
        if path is None:
            return ()
        return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())

"""Contract of a data source. Torch-free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from wmtp.errors import FileError
from wmtp.plugins.contract import Contract
from wmtp.storage.walk import files_below

__all__ = ["BadExample", "Document", "Example", "ExampleLoader", "Span"]


class BadExample(FileError):
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


@frozen
class Span:
    """A piece of a document's text.

    Args:
        text: the piece; the pieces of a document, joined, are its text.
        learn: whether it is learned, or seen only.
        weight: multiplies what every trainer gives its tokens; 0: it is never learned.
        token_weights: the data's own weight of its tokens, for trainers that take it (`column`): one for all of them, or one
            each. None: 1.
    """

    text: str
    learn: bool = True
    weight: float = field(default=1.0, kw_only=True)
    token_weights: float | tuple[float, ...] | None = field(default=None, kw_only=True)


@frozen(kw_only=True)
class Example:
    """One document: prompt and completion, spans of text, or a conversation.

    Args:
        id: what a message calls it: the problem's number, or ``file:line``.
        prompt: what the model is given; not learned unless the config says so.
        completion: what the model learns. An end-of-sequence token follows it.
        is_cut: the completion, or the last answer of a conversation, was cut off: no token that ends it is learned.
        spans: instead of prompt and completion: the document piece by piece. An end-of-sequence token follows the last.
        messages: instead of both: a conversation, for the model's chat template. Each has ``role`` (``system``, ``developer``,
            ``user``, ``assistant``, ``tool``) and ``content``; an assistant's may have ``tool_calls``, ``reasoning_content``,
            ``train`` (false: never learned) and ``weight`` (multiplies what every trainer gives its tokens; 0: never learned).
        tools: of a conversation: what the template is told of them.
        first_learned: of a conversation: messages before this number are seen only.
        group: the problem that this is an answer to; answers of one problem have the same. Default: ``id``.
        is_correct: whether the answer is right, where that is known.
        reward: how good it is, where that is known.
        weights: a weight for every token of the completion (the end-of-sequence token may have one more), or pairs of
            (text, weight): pieces that joined make the completion, whose tokens get that weight. None: 1 everywhere.
        where: what a message about a fault in it calls it: ``file:line``. Default: ``id``.
        unread: keys of its record under which there is text that the example has not; one line says so.
        unread_hint: what reads that text.
    """

    id: str
    prompt: str = ""
    completion: str = ""
    is_cut: bool = False
    spans: tuple[Span, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    first_learned: int = 0
    group: str = field(default="")
    is_correct: bool | None = None
    reward: float | None = None
    weights: tuple[float, ...] | tuple[tuple[str, float], ...] | None = None
    where: str = ""
    unread: tuple[str, ...] = ()
    unread_hint: str = ""

    @property
    def place(self) -> str:
        """Name the example in messages about a fault."""
        return self.where or self.id


@frozen(kw_only=True)
class Document:
    """Identity and labels of a document, or of one piece of it.

    Args:
        index: its number in the tokenized data set; the same in every run with the same data and tokenizer.
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
    #: examples may be conversations (``messages``): their tokens depend on the chat template and on ``data.train.learn``
    conversations: bool = False

    @abstractmethod
    def examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """Yield the examples in the order of the files.

        Args:
            path: the local file or folder of the config's ``uri``; None where the config class has no ``uri``.

        Raises:
            WMTPError: the files cannot be read at all. One bad line among good ones is yielded as `BadExample` instead.
        """

    def first_examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """Yield some of the first examples, for ``wmtp check``.

        It must be quick, and use neither torch nor the network. Default: none. A built-in loader gives the examples as they
        come, of which only the first are taken.

        Raises:
            InputError: the files are none that the loader reads.
        """
        return iter(())

    def doubts(self, path: Path | None) -> Sequence[str]:
        """Report what may be wrong with the files, for ``wmtp check``.

        Default: nothing.
        """
        return ()

    def unread_keys(self, path: Path | None) -> Mapping[str, str | None]:
        """List keys of the first records that nothing reads.

        For ``wmtp check``. Each has the key that it resembles, or None. Default: none.
        """
        return {}

    def files(self, path: Path | None) -> Sequence[Path]:
        """List the files that determine `examples`.

        A change in one of them invalidates the token cache. The default is the file ``path``, or every file in the folder
        ``path``. A loader that reads other files must override it.
        """
        if path is None:
            return ()
        return [path] if path.is_file() else sorted(file for file in files_below(path) if file.is_file())

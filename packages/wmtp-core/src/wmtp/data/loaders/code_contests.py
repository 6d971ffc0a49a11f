"""CodeContests: competition problems with right and wrong solutions (DeepMind, arXiv 2203.07814)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from wmtp.data.base import BadExample, Example
from wmtp.data.fields import text_field, type_name
from wmtp.data.loaders.records import RecordLoader

__all__ = ["LANGUAGES", "CodeContestsLoader"]

#: the names and numbers of languages in the data set
LANGUAGES: Final = {"unknown": 0, "python2": 1, "cpp": 2, "python3": 3, "java": 4}
_NAMES: Final = {number: name for name, number in LANGUAGES.items()}
#: as the data set's own definition spells the first one
_ALIASES: Final = {"unknown_language": "unknown", "python": "python2"}


class CodeContestsLoader(RecordLoader):
    """Reads solutions; see `wmtp.data.config.CodeContests`.

    Args:
        languages: keep solutions in these (keys of `LANGUAGES`).
        max_solutions: number of right and of wrong solutions of a problem to keep; None: all.
        incorrect: whether wrong solutions are read.
        split: which files of a folder are read.
    """

    def __init__(self, languages: Sequence[str], max_solutions: int | None, incorrect: bool, split: str | None = None) -> None:
        super().__init__(split)
        self._languages = frozenset(languages)
        self._max_solutions = max_solutions
        self._incorrect = incorrect

    def _record(self, where: str, record: Mapping[str, Any], *, columns: bool) -> Iterator[Example]:
        name = text_field(where, record, "name")
        description = text_field(where, record, "description").strip()
        for key, is_correct in (("solutions", True), ("incorrect_solutions", False)):
            if not is_correct and not self._incorrect:
                continue
            kept = 0
            for number, (language, solution) in enumerate(_solutions(where, record, key)):
                if language not in self._languages:
                    continue
                if kept == self._max_solutions:
                    break
                kept += 1
                yield Example(
                    id=f"{name}/{key}/{number}",
                    prompt=f"{description}\n\nSolution in {language}:\n",
                    completion=solution,
                    group=name,
                    is_correct=is_correct,
                    where=where,
                )


def _solutions(where: str, record: Mapping[str, Any], key: str) -> list[tuple[str, str]]:
    value = record.get(key)
    if value is None:
        if key == "solutions":
            raise BadExample(where, 'no "solutions"')
        return []
    if isinstance(value, Mapping):  # a struct of lists, as in the Parquet files
        languages, texts = value.get("language"), value.get("solution")
        if not isinstance(languages, list) or not isinstance(texts, list) or len(languages) != len(texts):
            raise BadExample(where, f'"{key}" must hold two lists of equal length, "language" and "solution"')
        pairs = list(zip(languages, texts, strict=True))
    elif isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        pairs = [(item.get("language"), item.get("solution")) for item in value]
    else:
        raise BadExample(where, f'"{key}" must be an object of lists or a list of objects, not {type_name(value)}')
    return [(_language(where, key, language), _solution(where, key, text)) for language, text in pairs]


def _language(where: str, key: str, value: Any) -> str:
    if isinstance(value, str):
        name = value.lower()
        name = _ALIASES.get(name, name)
        if name in LANGUAGES:
            return name
    elif isinstance(value, int) and not isinstance(value, bool) and value in _NAMES:
        return _NAMES[value]
    raise BadExample(where, f'"{key}": unknown language {value!r:.40}; known are {", ".join(LANGUAGES)} (0 to 4)')


def _solution(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadExample(where, f'"{key}": a solution must be a string, not {type_name(value)}')
    return value.replace("\r\n", "\n")

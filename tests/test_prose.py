"""Docstrings begin with an imperative or a noun, and their first line is one short sentence."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUESTION_WORDS = ("What", "Whether", "How", "Which", "The")

LONGEST = 12  # words of a first line
#: folders of wmtp whose docstrings still have longer ones
LONG_ONES = {
    *("actions", "checkpoints", "distributed", "launchers", "plugins", "reporting", "runs", "startup", "studies", "tracking"),
}

#: ``path:name`` of docstrings in which a question is meant as one
QUESTIONS: frozenset[str] = frozenset()


def docstrings(source):
    """Every docstring in a module, by the name that it documents."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield getattr(node, "name", "module"), text


def first_words(source):
    return [(name, text.split(maxsplit=1)[0].rstrip(",.:'’")) for name, text in docstrings(source)]


def is_short(text):
    first, *rest = text.split("\n")
    return len(first.split()) <= LONGEST and not (rest and rest[0].strip())


def test_first_words_are_seen():
    assert first_words('"""The module."""\ndef f():\n    """Whether."""\nclass C:\n    """A noun."""') == [
        ("module", "The"), ("f", "Whether"), ("C", "A")]  # fmt: skip


def test_no_docstring_begins_with_a_question_word():
    files = sorted(ROOT.glob("packages/*/src/**/*.py"))
    found = {
        f"{path.relative_to(ROOT).as_posix()}:{name}"
        for path in files
        for name, word in first_words(path.read_text(encoding="utf-8"))
        if word in QUESTION_WORDS
    }
    assert len(files) > 100
    assert not found - QUESTIONS, "begin these docstrings with an imperative or a noun"
    assert not QUESTIONS - found, "these exceptions are no longer needed"


def test_long_first_lines_are_seen():
    assert is_short(" ".join(["word"] * 12) + "\n\nMore.")
    assert not is_short(" ".join(["word"] * 13))
    assert not is_short("A sentence that goes\non in the next line.")


def test_a_docstrings_first_line_is_one_short_sentence():
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{name}"
        for path in sorted(ROOT.glob("packages/*/src/**/*.py"))
        if path.relative_to(ROOT).parts[4] not in LONG_ONES
        for name, text in docstrings(path.read_text(encoding="utf-8"))
        if not is_short(text)
    ]
    assert not found, f"write at most {LONGEST} words, and the rest below an empty line"

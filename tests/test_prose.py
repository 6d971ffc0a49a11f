"""Docstrings begin with an imperative or a noun, which says sooner what a thing does than a question word."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUESTION_WORDS = ("What", "Whether", "How", "Which", "The")

#: ``path:name`` of docstrings in which a question is meant as one
QUESTIONS: frozenset[str] = frozenset()


def first_words(source):
    """The first word of every docstring in a module, by the name that it documents."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield getattr(node, "name", "module"), text.split(maxsplit=1)[0].rstrip(",.:'’")


def test_first_words_are_seen():
    assert list(first_words('"""The module."""\ndef f():\n    """Whether."""\nclass C:\n    """A noun."""')) == [
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

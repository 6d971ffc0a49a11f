"""Docstrings that begin with a question word may only become fewer: an imperative or a noun says sooner what a thing does."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUESTION_WORDS = ("What", "Whether", "How", "Which", "The")

#: so many are left; lower the number whenever some are rewritten, never raise it
LEFT = 137


def first_words(source):
    """The first word of every docstring in a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield getattr(node, "lineno", 1), text.split(maxsplit=1)[0].rstrip(",.:'’")


def test_first_words_are_seen():
    assert list(first_words('"""The module."""\ndef f():\n    """Whether."""\nclass C:\n    """A noun."""')) == [
        (1, "The"), (2, "Whether"), (4, "A")]  # fmt: skip


def test_docstrings_with_question_words_become_fewer():
    files = sorted(ROOT.glob("packages/*/src/**/*.py"))
    counts = {
        path.relative_to(ROOT).as_posix(): sum(word in QUESTION_WORDS for _, word in first_words(path.read_text()))
        for path in files
    }
    found = sum(counts.values())
    most = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1])[:5])
    assert len(files) > 100
    assert found <= LEFT, (
        f"{found} docstrings begin with {', '.join(QUESTION_WORDS)}, {LEFT} are allowed: begin the new ones with an imperative"
        f" or a noun ({most})"
    )

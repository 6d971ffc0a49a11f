"""Docstrings begin with one short sentence: an imperative or a noun phrase.

Those of tests may be longer, and may begin with "The": they state what holds.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUESTION_WORDS = ("What", "Whether", "How", "Which")
MOST_WORDS = 12
CODE = ("packages/*/src", "bench", "docs", "examples/*/src")
TESTS = ("tests", "packages/*/tests", "examples/*/tests")


def first_lines(source):
    """The first line of every docstring in a module, by the name that it documents."""
    nodes: list[ast.AST] = [ast.parse(source)]
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node, clean=False)
        ):
            yield getattr(node, "name", "module"), text.strip().partition("\n")[0]
        # no expression holds a docstring, and most nodes are expressions
        parts = (part for name in ("body", "orelse", "finalbody", "handlers", "cases") for part in getattr(node, name, ()))
        nodes.extend(parts)


def complaints(line, *, is_of_a_test=False):
    """Yield what is wrong with a first line."""
    words = line.split()
    if words[0].rstrip(",.:'’") in (*QUESTION_WORDS, *(() if is_of_a_test else ("The",))):
        yield "begins with a question word or an article"
    if len(words) > MOST_WORDS and not is_of_a_test:
        yield f"has {len(words)} words of at most {MOST_WORDS}"
    if line[-1] not in ".:?":
        yield "ends within a sentence"


def test_what_is_complained_of():
    source = '"""The module."""\ndef f():\n    """Whether it\n    goes on."""\nclass C:\n    """A noun."""\n    x = """What."""'
    assert {name: list(complaints(line)) for name, line in first_lines(source)} == {
        "module": ["begins with a question word or an article"],
        "f": ["begins with a question word or an article", "ends within a sentence"],
        "C": [],
    }
    assert list(complaints("word " * 13 + ".")) == ["has 14 words of at most 12"]
    assert list(complaints("The " + "word " * 13 + ".", is_of_a_test=True)) == []
    assert list(complaints("What is shared.", is_of_a_test=True)) == ["begins with a question word or an article"]


@pytest.mark.parametrize("places", [CODE, TESTS])
def test_docstrings_begin_with_one_short_sentence(places):
    files = sorted(path for place in places for path in ROOT.glob(f"{place}/**/*.py"))
    assert len(files) > 100
    found = [
        f"{path.relative_to(ROOT).as_posix()}: {name}: {complaint}: {line}"
        for path in files
        for name, line in first_lines(path.read_text(encoding="utf-8"))
        for complaint in complaints(line, is_of_a_test=places == TESTS)
    ]
    assert not found, "\n".join(found)

"""Docstrings begin with one short sentence: an imperative or a noun phrase."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUESTION_WORDS = ("What", "Whether", "How", "Which", "The")
MOST_WORDS = 12
CODE = ("packages/*/src", "bench", "docs", "examples")


def first_lines(source):
    """The first line of every docstring in a module, by the name that it documents."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield getattr(node, "name", "module"), text.partition("\n")[0]


def complaints(line):
    """Yield what is wrong with a first line."""
    words = line.split()
    if words[0].rstrip(",.:'’") in QUESTION_WORDS:
        yield "begins with a question word or an article"
    if len(words) > MOST_WORDS:
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


def test_docstrings_begin_with_one_short_sentence():
    files = sorted(path for place in CODE for path in ROOT.glob(f"{place}/**/*.py"))
    assert len(files) > 100
    found = [
        f"{path.relative_to(ROOT).as_posix()}: {name}: {complaint}: {line}"
        for path in files
        for name, line in first_lines(path.read_text(encoding="utf-8"))
        for complaint in complaints(line)
    ]
    assert not found, "\n".join(found)

"""Wrong copies of Python code: one mistake each, everything else as it was; in the config, and from real sources."""

import ast
import itertools
import os
import random
import sys
import textwrap

import pytest

from wmtp.cli import main
from wmtp.config.data_rules import read_from
from wmtp.config.load import load
from wmtp.data.base import BadExample, Example, ExampleLoader
from wmtp.data.cache import cache_key
from wmtp.data.config import Jsonl, Mbpp, Mutated, PythonSource
from wmtp.data.loaders.mutated import MutatedLoader
from wmtp.data.loaders.python_source import PythonSourceLoader
from wmtp.data.mutations import KINDS, mutants
from wmtp.testing import DataLoaderTests
from wmtp.tokenizers.config import Bytes


def all_mutants(code, *kinds, prompt=""):
    found = mutants(prompt, code, count=1000, kinds=kinds or KINDS, draw=random.Random(0))
    return None if found is None else set(found)


@pytest.mark.parametrize(
    ("kind", "code", "expected"),
    [
        ("comparison", "x = a < b", {"x = a <= b", "x = a > b"}),
        ("comparison", "x = (a) == (b)", {"x = (a) != (b)"}),
        ("comparison", "x = a is  not b", {"x = a is b"}),
        ("comparison", "x = a not in b", {"x = a in b"}),
        ("comparison", "x = 0 <= a in b", {"x = 0 < a in b", "x = 0 >= a in b", "x = 0 <= a not in b"}),
        ("comparison", "x = (a  # <\n == b)", set()),
        ("constant", "x = 7", {"x = 8", "x = 6"}),
        ("constant", "x = 0, True", {"x = 1, True", "x = 0, False"}),
        ("constant", "x = 'a1', 1.5, 0x10", set()),
        ("boolean", "x = a and b and c", {"x = a or b and c", "x = a and b or c"}),
        ("boolean", "x = '한글' or b", {"x = '한글' and b"}),
        ("negation", "if a: pass", {"if not a: pass"}),
        ("negation", "while not a(1): pass", {"while a(1): pass"}),
        ("negation", "x = 1 if a and b else 2", {"x = 1 if not (a and b) else 2"}),
        ("negation", "assert a == b", {"assert not a == b"}),
        ("arithmetic", "x = a + b * c", {"x = a - b * c", "x = a + b + c"}),
        ("arithmetic", "x //= 2", {"x *= 2"}),
        ("arguments", "f(a, b, c)", {"f(b, a, c)", "f(a, c, b)"}),
        ("arguments", "f(a, *b), max(a, b), f(a, a)", set()),
        ("arguments", "x = a - b", {"x = b - a"}),
        (
            "statement",
            "x = 1\nreturned = f()  # why\ny = 2",
            {"returned = f()  # why\ny = 2", "x = 1\ny = 2", "x = 1\nreturned = f()  # why\n"},
        ),
        ("statement", "if a:\n    f()", set()),
        ("statement", "a = 1; b = 2", set()),
    ],
)
def test_each_kind_of_mistake(kind, code, expected):
    assert all_mutants(code, kind) == expected


def test_what_has_no_effect_is_left_alone():
    code = 'def f(a: 1 < 2) -> 3:\n    """1 < 2"""\n    b: "x" and 4 = g\n    return f"{1 < 2}"\n'
    assert all_mutants(code) == set()


def test_nothing_of_the_prompt_is_changed():
    prompt = 'def f(a, b=1):\n    """Add."""\n'
    assert all_mutants("    return a + b\n", prompt=prompt) == {"    return a - b\n"}
    assert all_mutants("x = a + b\n", "arithmetic", prompt="Write a program that adds.\n") == {"x = a - b\n"}


@pytest.mark.parametrize("code", ["return (", "text in English, of course", "return 1\n", "\0", "(" * 1000])
def test_what_is_no_python_is_said(code):
    assert all_mutants(code) is None
    (found,) = MutatedLoader(Listed([Example(id="a", completion=code, where="f:1")]), 1, KINDS, 0).examples(None)
    assert isinstance(found, BadExample)
    assert str(found) == "f:1: no Python code that this Python can read, so it has no wrong copy"


class Listed(ExampleLoader):
    def __init__(self, examples):
        self._examples = examples

    def examples(self, path):
        return iter(self._examples)


def pairs_of(loader, **options):
    """Each original with its wrong copies."""
    settings = {"copies": 2, "kinds": KINDS, "seed": 0} | options
    found = []
    for example in MutatedLoader(loader, **settings).examples(None):
        if example.is_correct:
            found.append((example, []))
        else:
            found[-1][1].append(example)
    return found


@pytest.fixture(scope="module")
def library():
    """Every 7th function of every 7th file of the standard library; all of them with WMTP_ALL_FUNCTIONS=1."""
    step, loader = 1 if os.environ.get("WMTP_ALL_FUNCTIONS") else 7, PythonSourceLoader()
    read = (example for file in loader.files(None)[::step] for example in loader.examples(file))
    functions = [example for example in read if isinstance(example, Example)]
    return pairs_of(Listed(functions[::step]))


def test_copies_of_the_standard_library_are_programs_with_one_mistake(library):
    assert len(library) > 100
    assert sum(bool(wrong) for _, wrong in library) > 0.85 * len(library)  # some only return a name
    for right, copies in library:
        trees = [ast.dump(ast.parse(right.prompt + code)) for code in (right.completion, *(c.completion for c in copies))]
        assert len(set(trees)) == len(trees), right.id
        for wrong in copies:
            assert (wrong.prompt, wrong.group, wrong.is_correct) == (right.prompt, right.id, False)
            before, after = right.completion, wrong.completion
            start = common(before, after)
            end = min(common(before[::-1], after[::-1]), len(before) - start, len(after) - start)
            # one place: a statement at most
            assert before[start : len(before) - end].count("\n") < 60
            assert len(after) <= len(before) + len("not ()")
    lengths = [len(wrong.completion) / len(right.completion) for right, copies in library for wrong in copies]
    assert 0.9 < sum(lengths) / len(lengths) < 1.1


def common(one, other):
    """Count the characters at the start that are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_the_same_seed_gives_the_same_copies_whatever_else_is_read(library):
    some = [right for right, _ in library[3:40]]
    plain = [Example(id=right.id, prompt=right.prompt, completion=right.completion) for right in some]
    again = pairs_of(Listed(plain))
    assert [[c.completion for c in copies] for _, copies in again] == [
        [c.completion for c in copies] for _, copies in library[3:40]
    ]
    other = pairs_of(Listed(plain), seed=1)
    assert [copies for _, copies in other] != [copies for _, copies in again]


COUNT = """\
def f(a):
    n = 0
    for x in a:
        if x > 2 and x != 7:
            n += x
    return n
assert f([1, 2, 3, 7, 9]) == 12 and f([]) == 0
"""
GCD = """\
def f(a, b):
    while b:
        a, b = b, a % b
        if a < 0: return 0
    return a - 1
assert f(12, 18) == 5 and f(7, 5) == 0
"""
TEXT = """\
def f(s):
    out = []
    out.append(s.replace('a', 'b'))
    return out[0][1:] if s else None
assert f('banana') == 'bnbnb' and f('') is None
"""


@pytest.mark.parametrize("program", [COUNT, GCD, TEXT])
def test_most_copies_do_something_else(program):
    """A program's own test is the oracle; what runs too long does something else too."""
    code, _, test = program.partition("assert")
    wrong = all_mutants(code)
    assert len(wrong) > 5
    assert passes(code, test)
    assert sum(passes(one, test) for one in wrong) <= 0.25 * len(wrong)


def passes(code, test):
    lines = itertools.count()

    def trace(frame, event, argument):
        if next(lines) > 60:
            raise TimeoutError
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        exec(compile(f"{code}passed = {test}", "<copy>", "exec"), space := {})
        return space["passed"]
    except Exception:
        return False
    finally:
        sys.settrace(before)


def test_labels_and_what_is_known_to_be_wrong():
    listed = [
        Example(id="a", completion="x = 1", weights=(1.0,), reward=2.0, group="g"),
        Example(id="b", completion="x = 1", is_correct=False),
        BadExample("f:3", "broken"),
        Example(id="c", completion="x"),
    ]
    found = list(MutatedLoader(Listed(listed), 5, KINDS, 0).examples(None))
    assert [getattr(example, "id", None) for example in found] == ["a", "a (wrong 1)", "a (wrong 2)", "b", None, "c"]
    assert [getattr(example, "is_correct", None) for example in found] == [True, False, False, False, None, True]
    assert [found[0].group, found[1].group, found[5].group] == ["g", "g", "c"]
    assert (found[1].weights, found[1].reward) == (None, None)
    assert (found[0].weights, found[0].reward) == ((1.0,), 2.0)


class TestMutated(DataLoaderTests):
    config = Mutated(of=PythonSource(max_functions=20), copies=2)

    @pytest.fixture
    def path(self, tmp_path):
        file = tmp_path / "source.py"
        file.write_text(
            textwrap.dedent('''
            def f(a):
                """Double."""
                return 2 * a
        ''')
            * 3
        )
        return file


def test_the_place_of_the_inner_source_is_checked_and_found(tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    text = """
[models.base]
type = "scratch"
vocab_size = 258
[tokenizer]
type = "bytes"
[datasets.code]
type = "mutated"
[datasets.code.of]
type = "mbpp"
uri = "nowhere"
[trainer]
type = "baseline-mtp"
"""
    recipe.write_text(text)
    assert main(["check", str(recipe)]) == 2
    assert "r.toml:11: datasets.code.of.uri: 'nowhere'" in capsys.readouterr().err
    recipe.write_text(text.replace('"mbpp"', '"humaneval"').replace("nowhere", str(tmp_path)))
    assert main(["check", str(recipe)]) == 2
    assert "datasets.code.of: 'humaneval' is for evaluation only" in capsys.readouterr().err
    recipe.write_text(text.replace("nowhere", str(tmp_path)) + "[datasets.code.of.keys]\n")
    assert main(["check", str(recipe)]) == 2
    assert "datasets.code.of.keys: unknown key" in capsys.readouterr().err
    recipe.write_text(text.replace("nowhere", str(tmp_path)))
    (config := load(str(recipe)).config).datasets["code"].build()
    assert read_from(config.datasets["code"], ("datasets", "code")) == (Mbpp(uri=str(tmp_path)), ("datasets", "code", "of"))


def test_tokens_are_kept_by_all_that_decides_them(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"completion": "x = 1"}\n')
    (tmp_path / "same.jsonl").write_text('{"completion": "x = 1"}\n')

    def key(config, name="a.jsonl"):
        return cache_key(config, config.build(), tmp_path / name, Bytes().build(None))

    keys = [
        key(Mutated(of=Jsonl(uri="a.jsonl"))),
        key(Mutated(of=Jsonl(uri="a.jsonl"), seed=1)),
        key(Mutated(of=Mbpp(uri="a.jsonl"))),
        key(Mutated(of=Mutated(of=Jsonl(uri="a.jsonl")))),
        key(Jsonl(uri="a.jsonl")),
    ]
    assert len(set(keys)) == len(keys)
    assert key(Mutated(of=Jsonl(uri="elsewhere"))) == keys[0], "where the files are does not matter"

"""Functions taken from Python source files."""

import sysconfig
import textwrap
from pathlib import Path

import pytest
from loaded import good, read

from wmtp.data.base import BadExample, Example
from wmtp.data.config import PythonSource
from wmtp.errors import WMTPError

SOURCE = '''
import os

def plain(a,
          b=1):
    """Add."""
    # why
    text = """
    kept
    """
    return a + b + text


def undocumented():
    return 1

def only_docstring():
    """Nothing else."""

def in_one_line(): "doc"; return 1

class Outer:
    """Not a function."""

    @property
    def method(self):
        """Say.

        More.
        """

        return "\f"

    class Inner:
        async def nested(self):
            'x'
            return 2

        def dedented_string(self):
            """x"""
            return """
left
"""
'''


def test_python_source_splits_functions_after_the_docstring(tmp_path):
    (tmp_path / "m.py").write_text(SOURCE)
    found = good(PythonSource(uri=""), tmp_path)
    assert [example.id for example in found] == ["m.py:plain:4", "m.py:Outer.method:26", "m.py:Outer.Inner.nested:35"]
    assert found[0].prompt == 'def plain(a,\n          b=1):\n    """Add."""\n'
    assert found[0].completion == '    # why\n    text = """\n    kept\n    """\n    return a + b + text\n'
    assert found[1].prompt == 'def method(self):\n    """Say.\n\n    More.\n    """\n'
    assert found[1].completion == '\n    return "\f"\n'
    assert found[2].prompt == "async def nested(self):\n    'x'\n"
    assert found[2].where == f"{tmp_path / 'm.py'}:35"
    for example in found:
        compile(example.prompt + example.completion, example.id, "exec")


def test_python_source_of_a_folder(tmp_path):
    function = 'def f():\n    """x"""\n    return 1\n'
    for name in ("b.py", "a/z.py", "a.py", "test/t.py", "tests/t.py", "site-packages/s.py", ".hidden/h.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(function)
    found = good(PythonSource(uri=""), tmp_path)
    assert [example.id for example in found] == ["a.py:f:1", "a/z.py:f:1", "b.py:f:1"]
    assert len(good(PythonSource(uri="", max_functions=2), tmp_path)) == 2
    assert not read(PythonSource(uri="", max_length=10), tmp_path)
    assert not read(PythonSource(uri="", min_length=100), tmp_path)
    assert len(good(PythonSource(uri=""), tmp_path / "b.py")) == 1
    (tmp_path / "a.py").write_bytes(b"print 'old'\n")
    (tmp_path / "b.py").write_bytes(b"# \xff\n")
    (tmp_path / "c.py").write_bytes(b"x = '\0'\n")
    found = read(PythonSource(uri=""), tmp_path)
    assert [type(example) for example in found] == [BadExample, Example, BadExample, BadExample]
    assert found[0].where == f"{tmp_path / 'a.py'}:1"
    (tmp_path / "empty").mkdir()
    with pytest.raises(WMTPError, match="holds no Python source"):
        read(PythonSource(uri=""), tmp_path / "empty")
    with pytest.raises(WMTPError, match="no such file or folder"):
        read(PythonSource(uri=""), tmp_path / "missing")


def test_the_standard_library_gives_real_functions():
    found = good(PythonSource(max_functions=300), None)
    assert len(found) == 300
    root = Path(sysconfig.get_paths()["stdlib"])
    for example in found[::30]:
        file, number = example.where.rsplit(":", 1)
        assert Path(file).is_relative_to(root)
        source = "\n".join(Path(file).read_text(encoding="utf-8").split("\n")[int(number) - 1 :])
        first = textwrap.dedent(source).split("\n")[0]
        assert example.prompt.startswith(first.strip())
        compile(example.prompt + example.completion, example.id, "exec")

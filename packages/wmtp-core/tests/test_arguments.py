"""Wrong kinds of arguments are refused by name, before anything is read."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import wmtp

#: rooms of functions that take tensors at every step, and of what the authors of plugins call
UNCHECKED = ("wmtp.loss.", "wmtp.plugins.", "wmtp.testing")
FUNCTIONS = [
    getattr(wmtp, name) for name, home in sorted(wmtp._HOMES.items()) if name.islower() and not home.startswith(UNCHECKED)
]
ARGUMENTS = [(function.__name__, argument) for function in FUNCTIONS for argument in inspect.signature(function).parameters]


class Strange:
    """An object that no argument takes."""


def _call(name: str, /, **given: object) -> None:
    function = getattr(wmtp, name)
    needed = [key for key, p in inspect.signature(function).parameters.items() if p.default is inspect.Parameter.empty]
    function(**{**dict.fromkeys(needed, "nowhere"), **given})


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_every_argument_is_checked(name, argument):
    with pytest.raises(wmtp.ConfigError) as caught:
        _call(name, **{argument: Strange()})
    assert [line for line in caught.value.problems if line.startswith(f"{argument}: a ") and "Strange is not " in line]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("report", {"runs": []}, "runs: an empty list; name at least one run directory"),
        ("report", {"runs": 5}, "runs: 5 is not a text, a path or a list of them"),
        ("report", {"runs": ["a", 5]}, "runs: a list that holds 5 is not a text, a path or a list of them"),
        ("load_model", {"model": None}, "model: None is not a text or a path"),
        ("load_model", {"model": b"runs/first"}, "model: a bytes is not a text or a path"),
        ("run", {"config": "a.toml", "run_name": 5}, "run_name: 5 is not a text or None"),
        ("run", {"config": "a.toml", "resume": True}, "resume: True is not a text, a path or None"),
        ("run", {"config": "a.toml", "overrides": "a=1"}, "overrides: a list of texts is wanted; write ['a=1']"),
        ("run", {"config": "a.toml", "overrides": {"a": 1}}, "overrides: a dict is not a list of texts"),
        ("run", {"config": "a.toml", "dry_run": 1}, "dry_run: 1 is not True or False"),
        ("study", {"seeds": [True]}, "seeds: a list that holds True is not a list of whole numbers or None"),
        ("generate", {"prompt": 5}, "prompt: 5 is not a text or a list of mappings"),
        ("generate", {"temperature": "1"}, "temperature: '1' is not a number"),
        ("generate", {"device": 0}, "device: 0 is not 'auto', 'cpu', 'cuda' or 'mps'"),
        ("generate", {"on_text": 5}, "on_text: 5 is not a function or None"),
        ("status", {"config": 5}, "config: 5 is not a text, a path or a list of them"),
        ("dump_config", {"config": "a.toml"}, "config: 'a.toml' is not a Config"),
    ],
)
def test_message(name, given, message):
    with pytest.raises(wmtp.ConfigError) as caught:
        _call(name, **given)
    assert caught.value.problems == (message,)


def test_all_problems_at_once_and_no_torch():
    code = """
import sys, wmtp
try:
    wmtp.export(None, None, format=5)
except wmtp.ConfigError as error:
    print(len(error.problems), "torch" in sys.modules)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["3", "False"]

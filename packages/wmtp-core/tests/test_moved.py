"""Old names of modules say the new ones."""

import importlib
import importlib.util

import pytest

from wmtp.moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_says_the_new_one(old):
    with pytest.raises(ModuleNotFoundError, match=MOVED[old].replace(".", r"\.")):
        importlib.import_module(old)
    assert importlib.util.find_spec(MOVED[old]) is not None


def test_other_missing_modules_are_as_python_has_them():
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'wmtp\.training\.nothing'$"):
        importlib.import_module("wmtp.training.nothing")

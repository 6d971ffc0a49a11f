"""Refusals of what a trainer may not return."""

from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from wmtp.errors import ConfigError, PluginError
from wmtp.trainers import Trainer
from wmtp.trainers.declarations import check_data, checked_modules, checked_rates, checked_state

NAME = "trainer 'mine' (mine 1.0)"


def trainer(**returned: Any) -> Trainer:
    return type("Mine", (Trainer,), {method: lambda self, *_, value=value: value for method, value in returned.items()})()


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([nn.Linear(1, 1)], "modules returned a list, not modules by name"),
        ({"value": torch.ones(1)}, "modules returned a Tensor as 'value', not a torch.nn.Module"),
        ({"a/b": nn.Linear(1, 1)}, "a module named 'a/b'"),
        ({"..": nn.Linear(1, 1)}, "a module named '..'"),
        ({"model": nn.Linear(1, 1)}, "a module named 'model'"),
        ({3: nn.Linear(1, 1)}, "a module named 3"),
    ],
)
def test_modules(returned, words):
    with pytest.raises(PluginError) as error:
        checked_modules(trainer(modules=returned), NAME)
    assert str(error.value).startswith(NAME)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (0.1, "learning_rates returned a float"),
        ({"vlaue": 0.1}, "learning_rates names 'vlaue', which is none of its modules: value"),
        ({"value": "0.1"}, "learning_rates says '0.1' for 'value'"),
        ({"value": True}, "learning_rates says True for 'value'"),
        ({"value": -1.0}, "learning_rates says -1.0 for 'value'"),
        ({"value": float("nan")}, "learning_rates says nan for 'value'"),
    ],
)
def test_learning_rates(returned, words):
    with pytest.raises(PluginError) as error:
        checked_rates(trainer(learning_rates=returned), NAME, {"value": nn.Linear(1, 1)})
    assert str(error.value).startswith(NAME)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1], "state_dict returned a list, not values by name"),
        ({"mean": 1.0, "seen": deque([1])}, "state_dict returned a deque as 'seen' that no checkpoint can give back"),
        ({"mean": np.float64(1)}, "state_dict returned a float64 as 'mean' that no checkpoint can give back"),
        ({"inner": [{"where": Path("a")}]}, "state_dict returned a list as 'inner' that no checkpoint can give back"),
        ({"later": lambda: 1}, "state_dict returned a function as 'later' that no checkpoint can give back"),
    ],
)
def test_state(returned, words):
    with pytest.raises(PluginError) as error:
        checked_state(trainer(state_dict=returned), NAME)
    assert str(error.value).startswith(NAME)
    assert words in str(error.value)
    assert "keep tensors, numbers, text, and lists and dicts of them" in str(error.value) or words.endswith("by name")


def test_state_of_tensors_and_plain_values():
    state = {"mean": torch.ones(2), "steps": 3, "names": ["a", None], "nested": {1: (2.0, True)}}
    assert checked_state(trainer(state_dict=state), NAME) == state


@pytest.mark.parametrize("returned", ["no labels", [1], None])
def test_check_data(returned):
    with pytest.raises(PluginError, match=r"^trainer 'mine' \(mine 1.0\): check_data returned"):
        check_data(trainer(check_data=returned), cast(Any, SimpleNamespace()), NAME)


def test_what_is_right_passes():
    module = nn.Linear(1, 1)
    assert checked_modules(trainer(modules={"value_head-2": module}), NAME) == {"value_head-2": module}
    assert checked_rates(trainer(learning_rates={"value": 1}), NAME, {"value": module}) == {"value": 1}
    check_data(trainer(check_data=()), cast(Any, SimpleNamespace()), NAME)
    with pytest.raises(ConfigError, match="no labels"):
        check_data(trainer(check_data=["no labels"]), cast(Any, SimpleNamespace()), NAME)

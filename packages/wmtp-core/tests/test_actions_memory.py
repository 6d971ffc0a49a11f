"""Estimates for models that other runs make."""

from tiny_recipe import TINY_MODEL, tiny_recipe

from wmtp.actions.memory import time_outlook
from wmtp.config.load import load_config
from wmtp.models.config import HfModel, ScratchModel


def test_a_model_that_is_made_of_anothers_result():
    config = load_config(tiny_recipe(models={"base": {"type": "hf", "uri": "c"}}))
    scratch = ScratchModel(**{key: value for key, value in TINY_MODEL.items() if key != "type"})
    assert time_outlook([config], {"c": HfModel(uri="b"), "b": HfModel(uri="a"), "a": scratch}) is not None
    # an adapter of its own result has no shape
    assert time_outlook([config], {"c": HfModel(uri="b"), "b": HfModel(uri="c")}) is None

"""The list of repeated layers: all that a forward pass calls, once each, and nothing inside another."""

import pytest
import torch
from torch import nn

from wmtp.config.schema import HeadsConfig
from wmtp.models.build import build_model
from wmtp.models.config import ScratchModel
from wmtp.models.layers import repeated_layers

SMALL = ScratchModel(vocab_size=23, hidden_size=16, layers=3, attention_heads=2, max_positions=64, intermediate_size=24)


@pytest.mark.parametrize("kind", ["block", "linear", "residual", "chained", "shared"])
def test_they_are_called_in_this_order_and_hold_all_the_heads_parameters(kind):
    model = build_model(SMALL.build().load(None, dtype=torch.float32, seed=1), HeadsConfig(horizon=4, kind=kind), 5)
    layers = repeated_layers(model)
    called: list[nn.Module] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, _: called.append(module))
    model(torch.arange(6).unsqueeze(0))
    assert list(dict.fromkeys(map(id, called))) == [id(layer) for layer in layers]
    assert not any(inner is other for layer in layers for inner in layer.modules() for other in layers if other is not layer)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    assert kind == "linear" or all(id(parameter) in inside for parameter in model.extra_heads.parameters())

"""Adapted linear maps of one input, as one operator in compiled code."""

from contextlib import nullcontext

import pytest
import torch
from adapted import IDS, make
from attrs import evolve

from wmtp.config.schema import DevicesConfig, LoraConfig
from wmtp.models import low_rank_graph
from wmtp.models.acceleration import accelerate
from wmtp.models.adapters import quantize_base
from wmtp.models.low_rank import MAP, joined_linear

pytest.importorskip("peft")


@pytest.fixture
def traced(monkeypatch):
    """Number of weights of each operator, by graph: torch.compile without its compiler."""
    found = []

    def backend(graph, inputs):
        low_rank_graph.join_maps(graph)
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        nodes = [
            node
            for part in parts
            for of in (MAP, joined_linear)
            for node in part.graph.find_nodes(op="call_function", target=of)
        ]
        found.append([len(node.args[1]) for node in sorted(nodes)])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(low_rank_graph, "_backend", backend)
    return found


def _learned(model, *, autocast=False):
    """Hidden states, and the gradients of what learns."""
    fixed = {id(parameter) for parameter in model.fixed_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in fixed)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        hidden = model(IDS).hidden
    # not of squares alone: a norm makes their sum a constant
    sum((one.double() * torch.arange(one.numel()).view_as(one).cos()).sum() for one in hidden).backward()
    return hidden, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("kind", "mode", "expected"),
    [
        ("plain", "none", [3, 1, 2, 1]),
        ("plain", "selective", [3, 1, 2, 1]),
        ("nf4", "none", [3, 1, 2, 1]),
        ("autocast", "none", [3, 1, 2, 1]),
        ("some", "none", [2, 1]),  # q and v; down
        ("dora", "none", []),  # peft's own products
    ],
)
def test_maps_of_one_input_are_one_operator_with_the_same_gradients(base, traced, kind, mode, expected):
    targets = ("q_proj", "v_proj", "down_proj") if kind == "some" else "all-linear"
    lora = LoraConfig(rank=2, targets=targets, dora=kind == "dora")
    dtype = torch.float32 if kind in ("nf4", "autocast") else torch.float64
    plain, joined = make(base, lora=lora, dtype=dtype), make(base, lora=lora, dtype=dtype)
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        for model in (plain, joined):
            model.adapter = evolve(model.adapter, quantize="nf4")
            quantize_base(model)
    accelerate(joined, DevicesConfig(compile=True, activation_checkpointing=mode))
    (hidden, wanted), (also, got) = (_learned(model, autocast=kind == "autocast") for model in (plain, joined))
    assert expected in traced
    assert {tuple(one) for one in traced} <= {tuple(expected), ()}  # heads and the final norm have none
    assert got.keys() == wanted.keys()
    close = {"rtol": 0.02, "atol": 0.02} if kind == "autocast" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(also, hidden, **close)
    scale = max(float(one.abs().max()) for one in wanted.values())
    for name, one in wanted.items():
        torch.testing.assert_close(got[name] / scale, one / scale, msg=lambda said, name=name: f"{name}: {said}", **close)


def test_maps_with_other_scales_or_other_inputs_stay_apart(base, traced):
    """A pattern of PEFT's may give a map an alpha of its own."""
    plain, apart = make(base), make(base)
    for model in (plain, apart):
        for layer in model.anatomy.layers:
            layer.self_attn.k_proj.scaling["default"] = 5.0
    accelerate(apart, DevicesConfig(compile=True))
    (hidden, wanted), (also, got) = (_learned(model) for model in (plain, apart))
    assert [2, 1, 1, 2, 1] in traced
    torch.testing.assert_close(also, hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)

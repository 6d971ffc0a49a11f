"""Every speed option gives the gradients of the plain path."""

import pytest
import torch

from wmtp.config.schema import HeadsConfig
from wmtp.models.acceleration import checkpoint_activations, compile_layers, offload_inputs
from wmtp.models.build import build_model
from wmtp.models.config import ScratchModel

SMALL = ScratchModel(
    vocab_size=23, hidden_size=16, layers=4, attention_heads=2, kv_heads=1, max_positions=64, intermediate_size=24
)
IDS = torch.arange(24).view(2, 12) % 23
POSITIONS = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)


def make(kind="block", **heads):
    model = build_model(
        SMALL.build().load(None, dtype=torch.float32, seed=1), HeadsConfig(horizon=3, kind=kind, init="random", **heads), 5
    )
    return model.eval()


def gradients(model, ids=IDS, **arguments):
    model.zero_grad()
    hidden = model(ids, **arguments).hidden
    sum((h * torch.arange(1.0, h.numel() + 1).view_as(h).sin()).sum() for h in hidden).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max()))


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("kind", ["block", "linear", "residual", "chained", "shared"])
@pytest.mark.parametrize("trunk", ["joint", "detach"])
def test_checkpointing_changes_no_gradient(mode, kind, trunk):
    expected = gradients(make(kind, trunk_gradient=trunk), packed=True, position_ids=POSITIONS)
    model = make(kind, trunk_gradient=trunk)
    names = list(model.state_dict())
    checkpoint_activations(model, mode)
    assert list(model.state_dict()) == names
    assert_same(gradients(model, packed=True, position_ids=POSITIONS), expected, tolerance=1e-6)


def kept_numbers(mode):
    """Numbers that autograd keeps between the two passes, where the model computes."""
    model = make()
    checkpoint_activations(model, mode)
    if mode == "offload":
        offload_inputs(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(IDS)
    return sum(kept.values()), output


def test_checkpointing_keeps_less_and_full_keeps_least():
    none, _ = kept_numbers("none")
    full, _ = kept_numbers("full")
    assert full < 0.5 * none
    offload, _ = kept_numbers("offload")
    assert full - offload == 3 * IDS.numel() * 16, "the inputs of the trunk's three layers, and nothing else"


@pytest.mark.parametrize("compiled", [False, True])
def test_inputs_on_the_host_give_the_same_gradients(compiled, without_the_compiler, monkeypatch):
    moved = []

    def copied(host, tensor, **_):
        moved.append(tensor.shape)
        return real(host, tensor)

    real = torch.Tensor.copy_
    model = make(trunk_gradient="joint")
    checkpoint_activations(model, "offload")
    if compiled:
        compile_layers(model)
    offload_inputs(model)
    expected = gradients(make(trunk_gradient="joint"), packed=True, position_ids=POSITIONS)
    gradients(model, packed=True, position_ids=POSITIONS)  # compiles
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", copied)
        found = gradients(model, packed=True, position_ids=POSITIONS)
    assert_same(found, expected)
    assert moved == [(2, 12, 16)] * 3


def matrix_products(mode):
    from torch.utils._python_dispatch import TorchDispatchMode

    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                counted.append(func)
            return func(*args, **(kwargs or {}))

    model = make()
    checkpoint_activations(model, mode)
    loss = model(IDS).hidden[0].sum()
    with Count():
        loss.backward()
    return len(counted)


def test_full_computes_matrix_products_again_and_selective_does_not():
    assert matrix_products("selective") == matrix_products("none") < matrix_products("full")


@pytest.mark.slow  # the one that compiles; the next does all but that
def test_compiled_layers_share_their_code_and_give_the_same_gradients():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain, fast = make(), make()
    compile_layers(fast)
    assert_same(gradients(fast), gradients(plain))
    assert counters["stats"]["unique_graphs"] == 2, "one graph for every layer, one for the final norm"


def test_checkpointed_compiled_layers_give_the_same_gradients_whatever_learns(without_the_compiler):
    """Frozen trunks, packed rows, no gradient, a cache."""
    from torch._dynamo.utils import counters

    counters.clear()
    plain, fast = make(), make()
    checkpoint_activations(fast, "full")
    compile_layers(fast)
    assert_same(gradients(fast), gradients(plain))
    compiled = counters["stats"]["unique_graphs"]
    assert compiled == 2

    for frozen in (True, False):
        for model in (plain, fast):
            model.base.requires_grad_(not frozen)
        assert_same(gradients(fast), gradients(plain))
    packed = {"packed": True, "position_ids": POSITIONS}
    assert_same(gradients(fast, **packed), gradients(plain, **packed))
    with torch.no_grad():
        for a, b in zip(fast(IDS).hidden, plain(IDS).hidden, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 5 * compiled, "a variant each, not one a layer or a step"
    assert not counters["graph_break"]

    before = counters["stats"]["unique_graphs"]
    assert_same(gradients(fast), gradients(plain))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = [model.base.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **settings) for model in (fast, plain)]
    assert torch.equal(*tokens)
    assert counters["stats"]["unique_graphs"] <= before + 2, "text is generated by plain layers"

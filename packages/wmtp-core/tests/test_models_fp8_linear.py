"""Maps that learn and multiply in fp8: their numbers, and what they keep. On a CPU they are rounded and multiplied in fp32."""

from copy import deepcopy
from types import MethodType

import pytest
import torch
from torch import nn

from wmtp.models.acceleration import _full_in_fp8
from wmtp.models.fp8_frozen import Products
from wmtp.models.fp8_linear import Fp8Linear

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
EMULATED = Products(by_rows=False, fast_forward=True, fast_backward=True, emulate=True)


def maps():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, bias=False), nn.SiLU(), nn.Linear(96, 32)).bfloat16()


def in_fp8(model):
    for module in model:
        if isinstance(module, nn.Linear):
            Fp8Linear.take_over(module, EMULATED)
    return model


def run(model, tokens=21):
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    out = model(x)
    (out.float() * torch.arange(32).sin()).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def test_numbers_are_those_of_torchao():
    """21 tokens, which 16 does not divide."""
    float8 = pytest.importorskip("torchao.float8")
    other, own = maps(), in_fp8(maps())
    config = float8.Float8LinearConfig(emulate=True, pad_inner_dim=True)
    float8.convert_to_float8_training(other, config=config)
    assert "Float8Linear" in {type(module).__name__ for module in other}
    for found, expected in zip(run(own), run(other), strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)  # sums in another order


def test_a_map_stays_a_linear_map_with_its_parameter_and_bias():
    model = maps()
    before = list(model.parameters())
    in_fp8(model)
    assert all(isinstance(module, nn.Linear) for module in (model[0], model[2]))
    assert all(new is old for new, old in zip(model.parameters(), before, strict=True))
    assert model.state_dict().keys() == maps().state_dict().keys()
    zeros = model[2](torch.zeros(2, 3, 96).bfloat16())
    assert torch.equal(zeros, model[2].bias.expand(2, 3, 32))


def test_a_weight_that_does_not_learn_gets_no_gradient_and_passes_the_same_one_on():
    whole = run(in_fp8(maps()))
    model = in_fp8(maps())
    model[0].weight.requires_grad_(False)
    found = run(model)
    assert model[0].weight.grad is None
    assert torch.equal(found[0], whole[0])
    assert torch.equal(found[1], whole[1])


def test_inputs_are_kept_for_the_backward_pass_in_a_byte_a_number():
    model = in_fp8(maps())[:1]
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(32, 64).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    own = [tensor for tensor in kept if tensor.numel() > 1 and tensor.data_ptr() != model[0].weight.data_ptr()]
    assert [(tensor.dtype, tensor.numel()) for tensor in own] == [(torch.float8_e4m3fn, x.numel())]


@pytest.mark.slow
def test_compiled_maps_that_read_one_input_round_it_once():
    counts = []

    def count(graph, _):
        counts.append(sum("fp8_both" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    left, right = (in_fp8(deepcopy(maps())[:1]) for _ in range(2))
    own = {f"{way}_compiler": lambda graph, inputs: make_boxed_func(count(graph, inputs)) for way in ("fw", "bw")}
    both = torch.compile(
        lambda x: left(x) * right(x), backend=aot_autograd(**own, partition_fn=min_cut_rematerialization_partition)
    )
    both(torch.randn(16, 64).bfloat16().requires_grad_()).sum().backward()
    assert counts == [1, 2]  # the input forward; both gradients backward


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
def test_checkpointed_and_compiled_maps_keep_what_enters_alone(mode):
    """torch 2.11 kept what autograd functions compute; later versions would not."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    kept = []

    def forward(graph, _):
        (output,) = graph.graph.find_nodes(op="output")
        kept.extend(node for node in output.args[0] if isinstance(node, torch.fx.Node) and node.op != "placeholder")
        return make_boxed_func(graph.forward)

    model = in_fp8(maps())
    model.forward = MethodType(_full_in_fp8, model) if mode == "full" else model.forward
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    whole, expected = run(torch.compile(model, backend=backend)), run(in_fp8(maps()))
    for found, wanted in zip(whole, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    sizes = [
        node.meta["val"].numel() for node in kept[1:] if isinstance(node.meta.get("val"), torch.Tensor)
    ]  # after the result
    assert (max(sizes, default=0) > 1) == (mode == "none")


@pytest.mark.skipif(not HOPPER, reason="needs a GPU with fp8 products")
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(130, 70), (4099, 2048)])
def test_a_gpu_rounds_both_ways_as_torch_does(shape, kind):
    from wmtp.models import fp8_kernel, fp8_linear

    matrix = (torch.randn(shape, device="cuda") * torch.randn(shape, device="cuda").exp()).bfloat16()
    scale = fp8_linear._scale(matrix, kind)
    expected = fp8_linear.round_by(matrix, scale, kind).view(torch.uint8)
    across, down = fp8_kernel.round_matrix(matrix, scale, kind, fp8_linear._filled(len(matrix)), across=True)
    assert torch.equal(across.view(torch.uint8), expected)
    assert torch.equal(down.view(torch.uint8)[:, : len(matrix)], expected.T)

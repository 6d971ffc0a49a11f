"""Logits in fp8: their error against those in bf16, and that the GPU's products are those that are emulated."""

from itertools import pairwise

import pytest
import torch

from wmtp.loss import Unembedding, fp8, token_pass, weighted_cross_entropy
from wmtp.loss.fp8 import Fp8Logits, in_fp8, round_table, table_in_fp8

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
N, H, D, V = 96, 2, 64, 500


def solve(fp8, *, device="cpu", bias=False, scale=1.0, softcap=None, known=False, v=V, shared=0.0):
    """Loss, token losses, and the gradients of hidden states, unembedding and bias."""
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=g).to(device, torch.bfloat16)
    weight = (0.3 * new(v, D) + shared).requires_grad_()
    offset = new(v).requires_grad_() if bias else None
    hidden = [new(N, D).requires_grad_() for _ in range(H)]
    unembedding = Unembedding(weight=weight, bias=offset, scale=scale, softcap=softcap)
    ids = torch.randint(v, (N, H), generator=g).to(device)
    valid = (torch.rand(N, H, generator=g) > 0.2).to(device)
    coefficients = torch.where((torch.rand(N, H, generator=g) > 0.3).to(device) & valid, 1 / (N * H), 0.0)
    given = hidden, [unembedding] * H, ids
    before = token_pass(*given, valid, fp8=fp8) if known else None
    loss, losses = weighted_cross_entropy(*given, coefficients, valid, precomputed=before, fp8=fp8)
    loss.backward()
    learned = [*hidden, weight] + ([] if offset is None else [offset])
    gradients = [tensor.grad.float().cpu() for tensor in learned if tensor.grad is not None]
    assert len(gradients) == len(learned)
    return loss.detach().cpu(), losses.cpu(), gradients


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


CASES = [{}, {"bias": True}, {"scale": 0.5, "softcap": 4.0}, {"known": True}, {"v": 501}]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gradient", [False, True])
def test_the_loss_is_near_that_in_bf16_and_not_the_same(case, gradient):
    loss, losses, gradients = solve(None, **case)
    found, own, slopes = solve(Fp8Logits(gradient=gradient, emulate=True), **case)
    assert 1e-4 < error(own, losses) < 0.03
    assert abs(found - loss) < 0.01 * loss
    assert all(0.001 < error(slope, expected) < 0.12 for slope, expected in zip(slopes, gradients, strict=True))


def test_the_gradient_of_the_hidden_states_alone_changes_with_its_products():
    _, losses, plain = solve(Fp8Logits(emulate=True))
    _, same, rounded = solve(Fp8Logits(gradient=True, emulate=True))
    assert torch.equal(losses, same)
    assert torch.equal(plain[-1], rounded[-1]), "the gradient of the unembedding stays in bf16"
    assert all(0.005 < error(*pair) < 0.1 for pair in zip(rounded[:-1], plain[:-1], strict=True))


def test_numbers_are_rounded_to_three_bits_of_mantissa_whatever_their_size():
    numbers = torch.tensor([1.0, 1.06, 1.1, 3.3, -448.0, 0.0])
    expected = torch.tensor([1.0, 1.0, 1.125, 3.25, -448.0, 0.0])
    for factor in (1.0, 2.0**-40, 2.0**60):
        assert torch.equal(in_fp8(numbers * factor), expected * factor)
    assert torch.equal(in_fp8(torch.zeros(3)), torch.zeros(3))
    table = round_table(numbers.view(3, 2), 16, centered=False)
    assert torch.equal(table.value(torch.float32)[:3], expected.view(3, 2))
    assert not table.data[3:].float().any()


def test_a_row_that_all_rows_share_moves_neither_losses_nor_gradients_in_fp8(monkeypatch):
    """It would take most of the three bits; cut in slices or not."""
    table, shared = 0.3 * torch.randn(500, 64), 5 * torch.randn(64)
    for step in (2**24, 640):
        monkeypatch.setattr(fp8, "_SLICE", step)
        found = round_table((table + shared).bfloat16(), 512, centered=True).value(torch.float32)[:500]
        assert error(found, table - table.mean(0)) < 0.05
        assert torch.equal(found, table_in_fp8((table + shared).bfloat16(), centered=True).float())
    plain = solve(Fp8Logits(gradient=True, emulate=True))
    moved = solve(Fp8Logits(gradient=True, emulate=True), shared=2.0)
    assert error(moved[1], plain[1]) < 0.01
    assert all(error(*pair) < 0.05 for pair in zip(moved[2], plain[2], strict=True))
    capped = solve(Fp8Logits(emulate=True), softcap=4.0, shared=2.0)[1]
    assert error(capped, solve(None, softcap=4.0, shared=2.0)[1]) < 0.1, "a cap sees by how much logits move"


@pytest.mark.skipif(not HOPPER, reason="needs a GPU with fp8 products")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gradient", [False, True])
def test_a_gpus_products_are_those_that_are_emulated(case, gradient):
    results = [solve(Fp8Logits(gradient=gradient, emulate=emulate), device="cuda", **case) for emulate in (True, False)]
    results.append(solve(Fp8Logits(gradient=gradient, emulate=True), **case))
    for (loss, losses, gradients), (found, own, slopes) in pairwise(results):
        assert abs(found - loss) < 0.002 * loss
        assert error(own, losses) < 0.005
        assert all(error(slope, expected) < 0.03 for slope, expected in zip(slopes, gradients, strict=True))

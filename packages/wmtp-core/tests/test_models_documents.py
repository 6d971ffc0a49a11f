"""Layers with a state go by the documents of a packed row; all other layers by the row."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_config import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError
from wmtp.models.acceleration import checkpoint_activations
from wmtp.models.blueprint import Blueprint
from wmtp.models.documents import DocumentRows, by_document, reading
from wmtp.models.mtp import MTPModel
from wmtp.models.trial import small_windows

ROWS = [[6, 1, 9], [3, 13]]  # lengths of the documents in two rows of 16


def _positions() -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in ROWS])


def _model(model_type: str, kind: str = "block") -> MTPModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    return MTPModel(base, HeadsConfig(horizon=3, kind=kind), seed=0)  # type: ignore[arg-type]


class Sums(nn.Module):
    """A layer part with a state: the sum of all tokens so far."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x.cumsum(dim=1) * scale, None


def test_a_state_begins_anew_with_each_document():
    part, positions = Sums(), _positions()
    x, scale = torch.randn(2, 16, 4, requires_grad=True), torch.rand(1, 16, 1)
    by_document(part)
    with reading(DocumentRows.of(positions)):
        found, _ = part(x, scale=scale)
    expected = []
    for row, lengths in enumerate(ROWS):
        pieces, scales = x[row].split(lengths), scale[0].split(lengths)
        expected.append(torch.cat([piece.cumsum(dim=0) * s for piece, s in zip(pieces, scales, strict=True)]))
    torch.testing.assert_close(found, torch.stack(expected))
    (gradient,) = torch.autograd.grad(found[0, 7:].sum(), x)
    assert not gradient[0, :7].any()
    assert gradient[0, 7:].all()
    torch.testing.assert_close(part(x, scale=scale)[0], x.cumsum(dim=1) * scale)  # rows as they are


def test_padding_is_one_document():
    rows = DocumentRows.of(torch.tensor([[0, 1, 2, 0, 0, 0, 0, 0, 1]]))
    lengths = sorted(len(set(row.tolist())) for group in rows.groups for row in group)
    assert lengths == [2, 3, 4]


def test_documents_of_about_one_length_are_run_together():
    positions = torch.cat([torch.arange(length) for length in [100, 3, 4, 3, 60, 4]]).unsqueeze(0)
    assert sorted(tuple(group.shape) for group in DocumentRows.of(positions).groups) == [(1, 60), (1, 100), (4, 4)]


@pytest.mark.parametrize("kind", ["block", "chained"])
@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2"])
def test_documents_of_several_rows_are_as_if_alone(model_type: str, kind: str):
    model, positions = _model(model_type, kind), _positions()
    assert model.packing.mixers
    ids = torch.randint(4, 90, (2, 16))
    with torch.no_grad():
        packed = model(ids, positions, True)
        for row, lengths in enumerate(ROWS):
            start = 0
            for length in lengths:
                alone = model(ids[row : row + 1, start : start + length])
                for head in (1, 2, 3):
                    valid = max(0, length - head)
                    here = packed.hidden[head - 1][row, start : start + valid]
                    torch.testing.assert_close(here, alone.hidden[head - 1][0, :valid], rtol=1e-3, atol=1e-4)
                start += length


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_what_is_computed_again_goes_by_the_documents_of_its_own_pass(mode: str):
    """Two forward passes before the backward passes, of other documents."""
    plain = _model("qwen3_next")
    again = copy.deepcopy(plain)
    again.packing.prepare(again.anatomy.layers)
    checkpoint_activations(again, mode)  # type: ignore[arg-type]
    ids, positions = torch.randint(4, 90, (2, 16)), _positions()
    gradients = []
    for model in (plain, again):
        outputs = [model(ids, positions, True), model(ids, positions.flip(0), True)]
        sum(output.hidden[0].square().sum() for output in outputs).backward()  # type: ignore[union-attr]
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_model_built_from_a_blueprint_goes_by_documents_too():
    model = _model("qwen3_next")
    built = Blueprint.of(model).build()
    assert built.packing == model.packing
    parts = [part for layer in built.anatomy.layers for part in built.packing.find_mixers([layer])]
    assert parts
    assert all("forward" in vars(part) for part in parts)


def test_gpt_oss_gets_its_masks():
    """It makes none of positions."""
    model = _model("gpt_oss")
    assert model.packing.masks
    assert not model.packing.mixers


def test_a_choice_of_tokens_beyond_its_number_is_seen_by_the_trial():
    """Doge keeps the most important tokens of a whole row: few tokens hide it."""
    model = _model("doge")
    with pytest.raises(ConfigError, match=r"data\.train\.packing: .*Doge"):
        model.check_packing()
    config = model.base.config
    with small_windows(model.base):
        assert config.keep_window_size == 3
    assert config.keep_window_size == 8

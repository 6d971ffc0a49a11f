"""Checks of an architecture under WMTP, each against something plain."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from wmtp.config.schema import HeadsConfig
from wmtp.generation import generate
from wmtp.models.build import build_model
from wmtp.models.loaders.hf import HfLoader
from wmtp.models.mtp import MTPModel

__all__ = ["decodes", "enlarge", "opened", "reopens", "trains_packed", "trains_padded"]

#: documents of a row, longer and shorter than the windows, chunks and top-k of `tiny_config`
LENGTHS = (23, 5, 30, 2, 17)
_HEADS = HeadsConfig(horizon=3, kind="block", init="copy")


def enlarge(model: PreTrainedModel) -> None:
    """Give biases values.

    They are zero in a new model, and a lost one would not show.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and not parameter.any():
                parameter.normal_(std=0.1)


def opened(folder: Path) -> MTPModel:
    """Open a folder as training does, and put heads on it."""
    loader = HfLoader()
    loader.info(folder)
    model = build_model(loader.load(folder, dtype=torch.float32, seed=0), _HEADS, seed=0).eval()
    model.source = folder
    return model


def trains_padded(model: MTPModel) -> None:
    """Compare a padded row with the document alone.

    Everything that learns must get a gradient.
    """
    short, long = _ids(9, 1), _ids(31, 2)
    rows = torch.cat([F.pad(short, (0, 22)), long])
    together = model(rows)
    for row, document in enumerate((short, long)):
        alone = model(document)
        for head in range(1, 4):
            length = document.shape[1] - head
            _same(together.hidden[head - 1][row, :length], alone.hidden[head - 1][0, :length], f"a padded row, head {head}")
    _trains(model, sum(model.logits(together, head)[1].logsumexp(-1).mean() for head in (1, 2, 3)))


def trains_packed(model: MTPModel) -> None:
    """Compare a packed row's documents with each alone.

    Then change one, and look at the others and at its gradients.
    """
    model.check_packing()
    documents = [_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    inputs: list[Tensor] = []

    def keep(_: object, __: object, result: Tensor) -> Tensor:
        inputs.append(result.detach().requires_grad_())
        return inputs[-1] * 1  # some architectures change it in place, which a leaf does not allow

    handle = model.anatomy.embedding.register_forward_hook(keep)
    try:
        packed = model(torch.cat(documents, dim=1), positions, True)
    finally:
        handle.remove()
    starts = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
    for start, document in zip(starts, documents, strict=True):
        alone = model(document)
        for head in (1, 2, 3):
            end = start + max(0, document.shape[1] - head)
            expected = alone.hidden[head - 1][0, : end - start]
            _same(packed.hidden[head - 1][0, start:end], expected, f"a packed document of {document.shape[1]}, head {head}")
    for number, start in enumerate(starts):
        changed = [*documents]
        changed[number] = _ids(LENGTHS[number], 90 + number)
        with torch.no_grad():
            other = model(torch.cat(changed, dim=1), positions, True)
        own = torch.zeros(positions.shape[1], dtype=torch.bool)
        own[start : start + LENGTHS[number]] = True
        for head in (1, 2, 3):
            valid = ~own & _valid(head)
            difference = (other.hidden[head - 1][0] - packed.hidden[head - 1][0])[valid]
            assert float(difference.abs().max()) <= 1e-6 * float(packed.hidden[head - 1].abs().max()), (
                f"a document changes another one (document {number}, head {head})"
            )
    start, end = starts[2], starts[2] + LENGTHS[2]
    loss = sum(packed.hidden[head - 1][0, start : end - head].square().sum() for head in (1, 2, 3))
    assert isinstance(loss, Tensor)
    (gradient,) = torch.autograd.grad(loss, inputs[0], retain_graph=True)
    outside = torch.cat([gradient[0, :start], gradient[0, end:]])
    assert float(outside.abs().max()) <= 1e-6 * float(gradient.abs().max()), "a document gets another one's gradient"
    _trains(model, sum(model.logits(packed, head)[0].logsumexp(-1).mean() for head in (1, 2, 3)))


def reopens(model: MTPModel, folder: Path) -> None:
    """Save, open by transformers and by WMTP, and compare bit for bit."""
    model.save_pretrained(folder)
    ids = _ids(12, 5)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = model.logits(model(ids), 1)
        assert torch.equal(plain(input_ids=ids, use_cache=False).logits, ours), (
            "transformers reads other logits than were saved"
        )
        again = opened(folder)
        for head in (1, 2, 3):
            assert torch.equal(again.logits(again(ids), head), model.logits(model(ids), head)), f"head {head} is not as saved"


def decodes(model: MTPModel, *, speculative: bool) -> None:
    """Compare decoded texts with those of a loop without a cache."""
    prompts = [_ids(length, length)[0].tolist() for length in (5, 1, 13)]
    expected = []
    with torch.no_grad():
        for prompt in prompts:
            tokens = list(prompt)
            for _ in range(14):
                logits = model.base(input_ids=torch.tensor([tokens]), use_cache=False).logits
                tokens.append(int(logits[0, -1].argmax()))
            expected.append(tokens[len(prompt) :])
    rows = generate(model, prompts, max_new_tokens=14, eos_id=None, speculative=speculative)
    for row, tokens in zip(rows, expected, strict=True):
        assert list(row.tokens) == tokens, "another text than without a cache"


def _ids(length: int, seed: int) -> Tensor:
    return torch.randint(4, 90, (1, length), generator=torch.Generator().manual_seed(seed))


def _valid(head: int) -> Tensor:
    """Mark the predictions ``head`` tokens ahead that stay in their document."""
    return torch.cat([torch.arange(length) < length - head for length in LENGTHS])


def _same(found: Tensor, expected: Tensor, what: str) -> None:
    if expected.numel():
        difference, size = float((found - expected).detach().abs().max()), float(expected.detach().abs().max())
        assert difference <= 1e-3 * size, f"{what}: off by {difference / size:.1g}"


def _trains(model: MTPModel, loss: object) -> None:
    assert isinstance(loss, Tensor)
    model.zero_grad()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients, "nothing gets a gradient"
    assert all(bool(gradient.isfinite().all()) for gradient in gradients), "a gradient is not finite"
    model.zero_grad()

"""Cost of a step, counted: nothing twice, and never the logits of all predictions."""

import weakref

import pytest
import torch
from one_step import VOCAB, Baseline, HardHalf, gradients, make_batch, make_model
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp.loss import weighted_cross_entropy
from wmtp.loss.torch_backend import plain as loss_module
from wmtp.training import step as step_module


@pytest.mark.parametrize("micro", [2, 99])
def test_what_is_known_of_the_losses_is_not_computed_again(monkeypatch, micro):
    """With the losses known, the second pass makes logits of the predictions that teach something, and all are logged."""
    computed, rows = [], []
    logits = loss_module.logits_of
    monkeypatch.setattr(loss_module, "logits_of", lambda hidden, *rest: rows.append(len(hidden)) or logits(hidden, *rest))

    def counting(hidden, unembeddings, ids, coefficients, valid, **told):
        rows.clear()
        found = weighted_cross_entropy(hidden, unembeddings, ids, coefficients, valid, **told)
        computed.append((sum(rows), int((coefficients != 0).sum())))
        return found

    monkeypatch.setattr(step_module, "weighted_cross_entropy", counting)
    model, batch = make_model(), make_batch(packed=True)
    output, _ = gradients(model, HardHalf(), batch, micro=micro)
    assert all(asked == taught > 0 for asked, taught in computed)
    baseline, _ = gradients(model, Baseline(), batch, micro=micro)
    for k in (1, 2, 3):
        torch.testing.assert_close(output.metrics[f"loss/head_{k}"], baseline.metrics[f"loss/head_{k}"])


def test_never_more_than_a_chunk_of_logits(monkeypatch):
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                # [V, D] and its transpose are the unembedding itself
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.ndim > 1
                    and tensor.shape[-1] == VOCAB
                    and 16 not in tensor.shape
                ):
                    self.seen = max(self.seen, tensor.numel())
            return out

    monkeypatch.setitem(loss_module._CHUNK_BYTES, "cpu", 4 * VOCAB * 2)
    model, batch = make_model(), make_batch(packed=True)
    for trainer in (Baseline(), HardHalf()):
        with Largest() as largest:
            gradients(model, trainer, batch)
        assert 0 < largest.seen <= 2 * VOCAB


@pytest.mark.parametrize("micro", [2, 99])
def test_the_backward_pass_finds_no_hidden_states_of_the_forward_pass_in_memory(micro):
    """The loss needs them no more, and memory is scarcest there."""
    model, alive = make_model(), []
    forward, embedding = model.forward, model.anatomy.embedding.weight

    def watched(*args, **kwargs):
        output = forward(*args, **kwargs)
        hidden = [weakref.ref(tensor) for tensor in output.hidden]
        embedding.register_hook(lambda _: alive.append(sum(one() is not None for one in hidden)))
        return output

    model.forward = watched
    gradients(model, Baseline(), make_batch(packed=False), micro=micro)
    assert set(alive) == {0}

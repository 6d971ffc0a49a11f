"""AdamW over fp32 copies in one pass: what torch's AdamW gives, on a GPU or in Triton's interpreter.

Triton decides when it is imported whether it interprets, so without a GPU these tests run in a process of their own.
"""

import importlib.util
import os

import pytest
import torch
from torch import nn

from wmtp.optim import master_weights
from wmtp.optim.build import change_learning_rate
from wmtp.optim.config import AdamW, Muon
from wmtp.optim.master_adamw import MasterAdamW
from wmtp.optim.master_weights import MasterWeights
from wmtp.optim.update import clip_gradients, gradient_norm

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":

    def test_the_kernel_in_the_interpreter(assert_passes_interpreted):
        assert_passes_interpreted()

else:

    class Small(nn.Module):
        """A matrix of more than a block, one of whole pieces of 16, a vector, a transposed one, and one that never learns."""

        def __init__(self):
            super().__init__()
            draw = torch.Generator().manual_seed(0)
            self.matrix = nn.Parameter(torch.randn(57, 61, generator=draw))
            self.even = nn.Parameter(torch.randn(80, 48, generator=draw))
            self.vector = nn.Parameter(torch.randn(5, generator=draw))
            self.turned = nn.Parameter(torch.randn(7, 3, generator=draw).T)
            self.frozen = nn.Parameter(torch.ones(3))

    @pytest.fixture(autouse=True)
    def everywhere(monkeypatch):
        monkeypatch.setattr(master_weights, "implementation", lambda *_: "fused")

    def build(config, *, value=None, one_pass=True):
        """A model in bf16, its copies, their optimizer; ``value`` is the trainer's own module, which has no copies."""
        model = Small().to(DEVICE)
        masters = MasterWeights(model, one_pass=one_pass)
        model.frozen.requires_grad_(False)
        names, parameters = zip(*model.named_parameters(), strict=True)
        named = list(zip(names, masters.replace(parameters), strict=True))
        named += [] if value is None else list(value.named_parameters())
        optimizer = masters.take_over(config.build(named))
        if value is not None:
            change_learning_rate(optimizer, value.parameters(), lambda lr: 10 * lr)
        return model, masters, optimizer

    def backward(model, factor):
        """Gradients that differ from step to step, and number to number."""
        for parameter in (model.matrix, model.even, model.vector, model.turned):
            count = torch.arange(parameter.numel(), device=DEVICE).view(parameter.shape)
            (parameter.float() * torch.sin(factor * (count + 1.0))).sum().backward()

    def learned(optimizer):
        return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

    def reference_steps(config, gradients, max_norm):
        """torch's AdamW in fp64, on the gradients as they came."""
        model = Small().to(DEVICE).double()
        named = [(name, p) for name, p in model.named_parameters() if name != "frozen"]
        optimizer = config.build(named)
        for step in gradients:
            for name, parameter in named:
                parameter.grad = torch.empty_like(parameter).copy_(step[name])  # torch's fused step goes through memory too
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_([p for _, p in named], max_norm)
            optimizer.step()
        return dict(named)

    @pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
    @pytest.mark.parametrize("micro_batches", [1, 3])
    def test_it_does_what_adamw_does(micro_batches, max_norm):
        config = AdamW(lr=3e-2, betas=(0.8, 0.999), weight_decay=0.3)
        model, masters, optimizer = build(config)
        assert isinstance(optimizer, MasterAdamW)
        before = model.frozen.clone()
        copies = dict(zip(dict(model.named_parameters()), masters.replace(list(model.parameters())), strict=True))
        taken = []
        for step in range(4):
            for micro in range(micro_batches):
                backward(model, 0.3 + step + 0.1 * micro)
            kind = torch.bfloat16 if micro_batches == 1 else torch.float32
            assert {p.grad.dtype for p in learned(optimizer)} == {kind}
            assert all(parameter.grad is None for parameter in model.parameters())
            taken.append({name: copy.grad.clone() for name, copy in copies.items() if copy.grad is not None})
            norm = gradient_norm(learned(optimizer))
            together = torch.cat([g.double().flatten() for g in taken[-1].values()]).norm()
            torch.testing.assert_close(norm.double(), together, rtol=1e-6, atol=0)
            if max_norm is not None:
                clip_gradients(optimizer, learned(optimizer), max_norm, norm)
            optimizer.step()
            optimizer.zero_grad()
        assert sorted(len(sizes) for sizes, _ in optimizer._blocks) == [1, 1, 2]  # a launch each: matrices, even ones, vectors
        for name, expected in reference_steps(config, taken, max_norm).items():
            torch.testing.assert_close(copies[name].double(), expected.detach(), rtol=1e-6, atol=1e-7)
            # the interpreter cuts digits off where a GPU rounds
            ulp = 0.0 if DEVICE == "cuda" else 2.0**-7
            rounded = copies[name].detach().bfloat16()
            torch.testing.assert_close(model.get_parameter(name).detach(), rounded, rtol=ulp, atol=0)
        assert torch.equal(model.frozen, before)
        for size in range(1, 30):  # other parameters with gradients in every step
            optimizer._blocks_of((size,), torch.device(DEVICE))
        assert len(optimizer._blocks) <= 8

    def test_modules_of_a_trainer_have_no_copies_and_a_rate_of_their_own():
        value = nn.Linear(3, 2).to(DEVICE)
        _, _, optimizer = build(AdamW(lr=1e-2, eps=1e-12), value=value)
        before = value.weight.detach().clone()
        value(torch.ones(1, 3, device=DEVICE)).sum().backward()
        clip_gradients(optimizer, learned(optimizer), 1.0, gradient_norm(learned(optimizer)))
        optimizer.step()
        torch.testing.assert_close(value.weight.detach(), before - 0.1)  # the first step of Adam is as long as the rate

    def test_a_clip_is_of_one_step():
        model, _, optimizer = build(AdamW(lr=1e-2, betas=(0.0, 0.0), eps=1.0))
        for clipped in (True, False):
            model.matrix.sum().backward()
            if clipped:
                clip_gradients(optimizer, learned(optimizer), 1e-6, gradient_norm(learned(optimizer)))
            copy = learned(optimizer)[0]
            before = copy.detach().clone()
            optimizer.step()
            optimizer.zero_grad()
            moved = (before - copy).abs().max()
            assert (moved < 1e-6) == clipped

    def test_its_state_is_that_of_torchs_adamw():
        config = AdamW(lr=1e-2)
        model, masters, optimizer = build(config)
        backward(model, 0.5)
        optimizer.step()
        plain = config.build(
            [(str(i), nn.Parameter(m.detach().clone())) for i, m in enumerate(masters.replace([*model.parameters()]))]
        )
        plain.load_state_dict(optimizer.state_dict())
        other_model, _, other = build(config)
        other.load_state_dict(plain.state_dict())
        assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        for name, parameter in other_model.named_parameters():
            assert name == "frozen" or not torch.equal(parameter, model.get_parameter(name))
        for index, state in optimizer.state_dict()["state"].items():
            assert {"step", "exp_avg", "exp_avg_sq"} == set(state)
            for key, value in state.items():
                torch.testing.assert_close(other.state_dict()["state"][index][key], value, rtol=0, atol=0)

    def test_steps_that_come_back_on_the_cpu(monkeypatch):
        """As torch reads them where the groups do not say that they are of a fused optimizer."""
        model, _, optimizer = build(AdamW(lr=1e-2))
        backward(model, 0.5)
        optimizer.step()
        saved = optimizer.state_dict()
        for group in saved["param_groups"]:
            group["fused"] = None
        for state in saved["state"].values():
            state["step"] = state["step"].cpu()
        optimizer.load_state_dict(saved)
        backward(model, 0.7)
        optimizer.step()
        assert {state["step"].device.type for state in optimizer.state.values()} == {DEVICE}
        assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}

    def test_an_optimizer_with_hooks_of_its_own_or_a_past_is_kept():
        model = Small().to(DEVICE)
        masters = MasterWeights(model)
        copies = masters.replace(list(model.parameters()))
        hooked = torch.optim.AdamW(copies)
        called = []
        hooked.register_step_post_hook(lambda *_: called.append(1))
        used = torch.optim.AdamW(copies)
        for copy in copies:
            copy.grad = torch.ones_like(copy)
        used.step()
        assert masters.take_over(used) is used
        assert masters.take_over(hooked) is hooked
        hooked.step()
        assert called

    def test_where_it_does_not_fit_gradients_are_fp32():
        for config, one_pass in ((Muon(lr=1e-2), True), (AdamW(lr=1e-2), False)):
            model, _, optimizer = build(config, one_pass=one_pass)
            assert not isinstance(optimizer, MasterAdamW)
            backward(model, 0.5)
            assert {p.grad.dtype for p in learned(optimizer)} == {torch.float32}
            optimizer.step()

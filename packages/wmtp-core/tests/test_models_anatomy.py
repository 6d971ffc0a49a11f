"""Modes of a model's modules around a request."""

from __future__ import annotations

from torch import nn

from wmtp.models.anatomy import eval_mode


class _Counting(nn.Sequential):
    calls = 0

    def train(self, mode: bool = True) -> _Counting:
        """Count the walks through all modules."""
        self.calls += 1
        return super().train(mode)


def test_each_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Dropout())
    model[1].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
        model[1].train()  # by whoever runs inside
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_a_model_in_eval_mode_is_not_set_again() -> None:
    model = _Counting(nn.Linear(2, 2)).eval()
    before = model.calls
    with eval_mode(model):
        pass
    assert model.calls == before
    assert not any(module.training for module in model.modules())

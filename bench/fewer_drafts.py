"""A model with fewer of its heads, which drafts less."""

from __future__ import annotations

from attrs import evolve

from wmtp.models.mtp import MTPModel

__all__ = ["with_drafts"]


def with_drafts(model: MTPModel, drafts: int) -> MTPModel:
    """Return a model that drafts ``drafts`` tokens, by the first heads of ``model``.

    The base is the same object. Compile neither before, nor both after.
    """
    if not 1 <= drafts < model.horizon:
        raise SystemExit(f"--drafts {drafts}: the model's heads draft 1 to {model.horizon - 1}")
    if drafts == model.horizon - 1:
        return model
    fewer = MTPModel(model.base, evolve(model.heads, horizon=drafts + 1), seed=0, native=model.native)
    state = model.extra_heads.state_dict()
    fewer.extra_heads.load_state_dict({name: state[name] for name in fewer.extra_heads.state_dict()})
    fewer.take_origin(model)
    return fewer.requires_grad_(False).eval()

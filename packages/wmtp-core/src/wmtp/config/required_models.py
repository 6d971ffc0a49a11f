"""Models that trainers need besides the one that is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from wmtp.config.tree import components

if TYPE_CHECKING:
    from wmtp.config.schema import Config

__all__ = ["Need", "models_beside", "required_models"]


@frozen
class Need:
    """Why a model besides ``base`` is needed.

    Args:
        trainer: the type of a trainer that needs it.
        scores_texts: it is a reward model, with a vocabulary of its own; else it reads the base model's tokens.
    """

    trainer: str
    scores_texts: bool


def required_models(config: Config) -> dict[str, Need]:
    """Map the models that trainers need besides ``base``, by section name."""
    return {
        name: Need(placed.config.type, scores_texts)
        for placed in components(config)
        if placed.kind == "trainers"
        for key, scores_texts in (("required_models", False), ("reward_models", True))
        for name in getattr(placed.config, key)
        if name != "base"
    }


def models_beside(config: Config) -> list[str]:
    """Name the models in memory besides the trained one.

    ``base`` is among them where a trainer needs it as it was at the start.
    """
    trainers = [placed.config for placed in components(config) if placed.kind == "trainers"]
    return [*required_models(config), *(["base"] if any("base" in trainer.required_models for trainer in trainers) else [])]

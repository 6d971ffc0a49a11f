"""Settings that are allowed and yet unwise: said, and then done."""

from __future__ import annotations

from collections.abc import Iterator

from wmtp.config.data_rules import doubts, unread_keys
from wmtp.config.problems import dotted
from wmtp.config.schema import Config
from wmtp.config.tree import components
from wmtp.plugins.contract import TrainerConfig

__all__ = ["unwise_settings"]


def unwise_settings(config: Config) -> Iterator[str]:
    """List warnings about a config that has passed its checks.

    Each is ``dotted.key: what may go wrong; what to do``.
    """
    for place, doubt in doubts(config):
        yield f"{dotted(place)}: {doubt}"
    for place, keys in unread_keys(config):
        for key, meant in keys.items():
            if meant is not None:
                yield (
                    f'{dotted((*place, "keys"))}: the records have "{key}", which nothing reads; did you mean {meant!r}? '
                    "Rename it in the files, or name it in this table"
                )
    lr = config.optimizer.lr
    if isinstance(lr, int | float) and lr > 1:
        yield (
            f"optimizer.lr: {lr:g} is more than any common optimizer learns with, so the loss will likely become NaN in the "
            "first steps; write less, as 1e-5 for a pretrained model or 1e-3 for a small new one"
        )
    for placed in components(config):
        trainer, chosen = placed.config, config.train.normalizer
        if not isinstance(trainer, TrainerConfig) or trainer.published_normalizer in (None, chosen):
            continue
        published = trainer.published_normalizer
        yield (
            f"train.normalizer: \"{chosen}\" cancels the scale of the weights of '{trainer.type}', which was published with "
            f'"{published}": steps become larger than they should be, and the model may collapse; set "{published}"'
        )

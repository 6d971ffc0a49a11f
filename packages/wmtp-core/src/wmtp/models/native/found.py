"""Native layers for multi-token prediction, as found in a folder."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import Factory, frozen

from wmtp.models.native.search import Problem

__all__ = ["Native"]


@frozen(kw_only=True)
class Native:
    """Modules of one layout, and where their tensors stand.

    Args:
        layout: its name in `wmtp.models.native.layouts`; empty where a config promises layers that its folder has not.
        modules: how many there are.
        own_embedding: each has an embedding of its own.
        own_unembedding: each has an unembedding of its own.
        copies: names in the folder of tables that are copies of the model's own, ``embedding`` or ``unembedding``: the heads
            use that, and the folder gets copies again.
        parts: names in the folder by those in the state dict of the heads, except for what is in a decoder layer.
        layers: what the folder's names of each module's decoder layer begin with.
        template: what the folder's names of the model's own decoder layer of that kind begin with.
        template_path: the path of this decoder layer in the model.
        tensors: all names in the folder.
        parameters: numbers in them.
        problem: why they cannot be opened; None where they can.
    """

    layout: str = ""
    modules: int = 0
    own_embedding: bool = False
    own_unembedding: bool = False
    copies: Mapping[str, str] = Factory(dict)
    parts: Mapping[str, str] = Factory(dict)
    layers: tuple[str, ...] = ()
    template: str = ""
    template_path: str = ""
    tensors: tuple[str, ...] = ()
    parameters: int = 0
    problem: Problem | None = None

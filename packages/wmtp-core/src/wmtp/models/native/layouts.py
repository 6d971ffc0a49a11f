"""Layouts of native layers: every fact of each, in one table.

Imports no torch.
"""

from __future__ import annotations

from typing import Final, Literal

from attrs import frozen

__all__ = ["LAYOUTS", "PLAIN", "SERVED", "ChainRule", "Layout", "layout_named", "rule_of", "served_layout"]


@frozen(kw_only=True)
class ChainRule:
    """Inputs of a chain's step, and the norm before the unembedding.

    Every step gives the next one what the unembedding multiplies.

    Args:
        embedding_first: the projection reads [embedding; hidden states]; else [hidden states; embedding].
        before_norm: the first step reads the model's hidden states as they are before its final norm; else after it.
        output: the norm that follows the layer: one of the module's ``own``, the ``model``'s final norm, or ``none``.
        zero_first: the first step reads zeros in place of an embedding at position 0, as vLLM feeds it.
    """

    embedding_first: bool = False
    before_norm: bool = False
    output: Literal["own", "model", "none"] = "own"
    zero_first: bool = False


#: `chained` and `shared` heads as papers describe them: all norms but the model's final one are their own
PLAIN: Final = ChainRule(output="model")


@frozen(kw_only=True)
class Layout:
    """One layout of native layers.

    In names, ``{i}`` is the module's number and ``{n}`` that of the decoder layer that it would be.

    Args:
        name: what WMTP calls it.
        models: transformers' types of the text models that have it.
        key: of the number of modules in ``config.json``.
        unsaid: the number where ``config.json`` says none.
        most: the largest number that is read; None: any.
        embedding_norm, hidden_norm, projection: tensors of a module, each followed by ``.weight``.
        output_norm: likewise; None: it has none.
        layer: what the names of the module's decoder layer begin with.
        embedding, unembedding: likewise tensors; a folder may have them or not, and without them the model's are used.
        rule: how it computes.
        template: which of the model's decoder layers it is like, and sees as much as: the ``last``, or the ``first`` (dense in
            models of experts, with a window where others have none).
        always_turns: its queries and keys are turned by position, also where the model does so only in layers with a window.
        others: fields of ``config.json`` that give it another attention than that layer's, which is not read.
    """

    name: str
    models: tuple[str, ...]
    key: str
    unsaid: int = 0
    most: int | None = None
    embedding_norm: str
    hidden_norm: str
    projection: str
    output_norm: str | None = None
    layer: str
    embedding: str | None = None
    unembedding: str | None = None
    rule: ChainRule
    template: Literal["last", "first"] = "last"
    always_turns: bool = False
    others: tuple[str, ...] = ()

    def part(self, name: str | None, module: int, layers: int) -> str | None:
        """Name a tensor of one module, or its layer's prefix.

        Args:
            name: one of this table's.
            module: from 0.
            layers: decoder layers of the model.
        """
        return None if name is None else name.format(i=module, n=layers + module)


LAYOUTS: Final = (
    Layout(
        name="qwen",
        models=("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        key="mtp_num_hidden_layers",
        unsaid=1,
        most=1,  # further modules would share the norms and the projection
        embedding_norm="mtp.pre_fc_norm_embedding",
        hidden_norm="mtp.pre_fc_norm_hidden",
        projection="mtp.fc",
        output_norm="mtp.norm",
        layer="mtp.layers.{i}.",
        rule=ChainRule(embedding_first=True),
    ),
    Layout(
        name="exaone",
        models=("exaone_moe",),
        key="num_nextn_predict_layers",
        most=1,  # likewise
        embedding_norm="mtp.pre_fc_norm_embedding",
        hidden_norm="mtp.pre_fc_norm_hidden",
        projection="mtp.fc",
        output_norm="mtp.norm",
        layer="mtp.layers.{i}.",
        rule=ChainRule(embedding_first=True),
        template="first",
        always_turns=True,
        others=("mtp_layer_types", "mtp_sliding_windows"),  # K-EXAONE 2.0
    ),
    Layout(
        name="mimo",
        models=("mimo", "qwen2"),
        key="num_nextn_predict_layers",
        embedding_norm="model.mtp_layers.{i}.token_layernorm",
        hidden_norm="model.mtp_layers.{i}.hidden_layernorm",
        projection="model.mtp_layers.{i}.input_proj",
        output_norm="model.mtp_layers.{i}.final_layernorm",
        layer="model.mtp_layers.{i}.",
        rule=ChainRule(before_norm=True, zero_first=True),
    ),
    Layout(
        name="deepseek",
        models=("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
        key="num_nextn_predict_layers",
        embedding_norm="model.layers.{n}.enorm",
        hidden_norm="model.layers.{n}.hnorm",
        projection="model.layers.{n}.eh_proj",
        output_norm="model.layers.{n}.shared_head.norm",
        layer="model.layers.{n}.",
        embedding="model.layers.{n}.embed_tokens",
        unembedding="model.layers.{n}.shared_head.head",
        rule=ChainRule(embedding_first=True, zero_first=True),
    ),
    Layout(
        name="ernie",
        models=("ernie4_5_moe",),
        key="num_nextn_predict_layers",
        embedding_norm="model.mtp_emb_norm.{i}",
        hidden_norm="model.mtp_hidden_norm.{i}",
        projection="model.mtp_linear_proj.{i}",
        layer="model.mtp_block.{i}.",
        rule=ChainRule(embedding_first=True, output="none", zero_first=True),
        template="first",
    ),
)


#: the layout in which servers take a plain model with one new head, by transformers' class of the model
SERVED: Final = {
    "LlamaForCausalLM": "mimo",
    "MistralForCausalLM": "mimo",
    "Phi3ForCausalLM": "mimo",
    "Qwen2ForCausalLM": "mimo",
    "Qwen3ForCausalLM": "exaone",
}


def served_layout(model_class: str) -> str:
    """Choose the layout of new heads where none is named.

    It says how they are fed; ``mimo`` where no server takes such a model.
    """
    return SERVED.get(model_class, "mimo")


def layout_named(name: str) -> Layout:
    """Find a layout by its name."""
    return next(layout for layout in LAYOUTS if layout.name == name)


def rule_of(layout: str) -> ChainRule:
    """Return the rule that ``[models.base.heads] layout`` names.

    That of a layout, or of none (``plain``).
    """
    return PLAIN if layout == "plain" else layout_named(layout).rule

"""Models that no served layout holds with new heads, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["REFUSED"]

_POST_NORMS: Final = "its layers norm what attention and feed-forward parts give, and not what they read"
_BOTH_NORMS: Final = "its layers norm what attention and feed-forward parts give as well"
_LAYER_NORM: Final = "its layers subtract the mean (LayerNorm), and those of the layouts have RMS norms"
_PARALLEL: Final = "attention and feed-forward part of a layer read the same hidden states, and not one after the other"
_EXPERTS: Final = "it has experts chosen by a softmax, and the layouts with experts choose by sigmoids with a correction"
_FACTORS: Final = "it multiplies embeddings, residuals, scores and logits by factors of its own"
_PAIRS: Final = "it turns queries and keys by pairs, and the layouts by halves"

#: by transformers' class; read in transformers 5.24's ``modeling_*.py`` and in the models of vLLM 0.32 that have a draft layer
REFUSED: Final[Mapping[str, str]] = {
    "ApertusForCausalLM": "its feed-forward parts have no gate, and an activation (xIELU) with parameters",
    "ArceeForCausalLM": "its feed-forward parts have no gate",
    "BitNetForCausalLM": "it norms once more before the last map of attention and feed-forward part",
    "CohereForCausalLM": f"{_LAYER_NORM}; {_PARALLEL}",
    "Cohere2ForCausalLM": f"{_LAYER_NORM}; {_PARALLEL}",
    "Ernie4_5ForCausalLM": _PAIRS,
    "Exaone4ForCausalLM": _POST_NORMS,
    "FalconForCausalLM": f"{_LAYER_NORM}; its feed-forward parts have no gate",
    "GPT2LMHeadModel": f"{_LAYER_NORM}; its positions are embeddings",
    "GPTNeoXForCausalLM": f"{_LAYER_NORM}; its feed-forward parts have no gate",
    "GemmaForCausalLM": "its norms multiply by 1 + w, its embeddings by √D, and its activation is GELU",
    "Gemma2ForCausalLM": f"its norms multiply by 1 + w, and logits have a cap; {_BOTH_NORMS}",
    "Gemma3ForCausalLM": f"its norms multiply by 1 + w, and its layers turn by two bases; {_BOTH_NORMS}",
    "GlmForCausalLM": f"{_PAIRS}, and only a part of each head",
    "Glm4ForCausalLM": f"{_PAIRS}, and only a part of each head; {_BOTH_NORMS}",
    "GptOssForCausalLM": "it has experts with biases, and attention with sinks",
    "GraniteForCausalLM": _FACTORS,
    "GraniteMoeForCausalLM": f"{_FACTORS}; {_EXPERTS}",
    "HeliumForCausalLM": _PAIRS,
    "HunYuanDenseV1ForCausalLM": "it norms queries and keys after turning them by position, and K-EXAONE before",
    "MixtralForCausalLM": _EXPERTS,
    "NemotronForCausalLM": f"{_LAYER_NORM}; its feed-forward parts have no gate",
    "OlmoForCausalLM": f"{_LAYER_NORM}, here without weights",
    "Olmo2ForCausalLM": f"it norms queries and keys over all heads at once; {_POST_NORMS}",
    "Olmo3ForCausalLM": f"it norms queries and keys over all heads at once; {_POST_NORMS}",
    "OlmoeForCausalLM": f"it norms queries and keys over all heads at once; {_EXPERTS}",
    "PhiForCausalLM": f"{_LAYER_NORM}; {_PARALLEL}",
    "Qwen2MoeForCausalLM": _EXPERTS,
    "Qwen3MoeForCausalLM": _EXPERTS,
    "SeedOssForCausalLM": "its heads are wider than D / heads, and vLLM's Qwen2 takes no other",
    "SmolLM3ForCausalLM": "it has layers without positions, and of the layouts only K-EXAONE's has such, which norms queries",
    "StableLmForCausalLM": _LAYER_NORM,
    "Starcoder2ForCausalLM": f"{_LAYER_NORM}; its feed-forward parts have no gate",
}

"""Models in the formats of other tools; importing this imports no torch."""

from typing import Final

__all__ = ["FORMATS"]

#: what ``wmtp export --format`` takes, and what it is
FORMATS: Final = {
    "hf": "a plain Hugging Face folder, head 1 only",
    "wmtp": "the model with all its heads, as a run without adapter saves it",
    "meta": "Meta's params.json and consolidated.pth with extra_heads",
    "mtp": "a Llama, Mistral, Phi-3, Qwen2 or Qwen3 with a shared head, for vLLM and SGLang (MiMo-7B's or K-EXAONE's layout)",
    "medusa": "heads 2..H as a Medusa draft model, for vLLM before 0.33",
}

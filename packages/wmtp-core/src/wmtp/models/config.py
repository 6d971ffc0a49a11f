"""Config classes of the built-in model loaders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from attrs import Factory, field, frozen
from attrs.validators import ge, le, optional

from wmtp.errors import ConfigError
from wmtp.models.native.headers import native_problems
from wmtp.plugins.contract import ModelLoaderConfig
from wmtp.storage.hub.names import cached_snapshot
from wmtp.storage.model_files import LAYERS_LIMIT
from wmtp.storage.model_folders import model_within
from wmtp.storage.uris import file_path, scheme_of

if TYPE_CHECKING:
    from wmtp.config.schema import HeadsConfig
    from wmtp.models.base import ModelLoader

__all__ = ["FEED_FORWARD", "HfModel", "MetaMtpModel", "ScratchModel"]

#: width of a new model's feed-forward layers, in multiples of its own
FEED_FORWARD: Final = 4


@frozen(kw_only=True)
class HfModel(ModelLoaderConfig):
    """A Hugging Face folder, GGUF file, PEFT adapter, or saved WMTP model.

    A folder holds safetensors or ``.bin`` files. Any heads beside the model are kept.

    Args:
        uri: the folder, or the ``.gguf`` file itself.
        gguf_file: which ``.gguf`` file of the folder. Default: the only one, where there are no safetensors.
        attn_implementation: the attention kernel: ``sdpa``, ``eager``, ``flash_attention_2`` … Default: the model's own choice.
        base_uri: where ``uri`` is an adapter (PEFT, LoRA): the model that it belongs to. Default: the one that it names.
    """

    type = "hf"
    uri_keys = ("base_uri",)
    uri: str
    gguf_file: str | None = None
    attn_implementation: str | None = None
    base_uri: str | None = None

    def check_heads(self, heads: HeadsConfig | None) -> Iterable[str]:
        """Report damage of native layers that would be the heads.

        Native ones are the model's own, for multi-token prediction.
        """
        try:
            if scheme_of(self.uri) != "file" or not file_path(self.uri).is_dir():
                return ()
            folder = model_within(cached_snapshot(file_path(self.uri)))
        except ConfigError:  # said of the uri
            return ()
        return native_problems(folder, heads)

    def build(self) -> ModelLoader:
        """Make the loader."""
        from wmtp.models.loaders.hf import HfLoader

        return HfLoader(gguf_file=self.gguf_file, attn_implementation=self.attn_implementation, base_uri=self.base_uri)


@frozen(kw_only=True)
class MetaMtpModel(ModelLoaderConfig):
    """Meta's multi-token checkpoint (arXiv 2404.19737): ``params.json`` and ``consolidated.pth``.

    Args:
        uri: the folder.
        max_positions: the longest input. Default: ``max_seq_len`` of ``params.json``, or 4096.
    """

    type = "meta-mtp"
    uri: str
    max_positions: int | None = field(default=None, validator=optional(ge(1)))

    def build(self) -> ModelLoader:
        """Make the loader."""
        from wmtp.models.loaders.meta import MetaMtpLoader

        return MetaMtpLoader(max_positions=self.max_positions)


@frozen(kw_only=True)
class ScratchModel(ModelLoaderConfig):
    """A new model with random weights, drawn from ``run.seed``.

    Args:
        architecture: transformers' name of it: ``llama``, ``qwen3``, ``mistral``, ``gpt2``, ``gpt_neox`` …
        vocab_size: V; not less than the tokenizer has.
        hidden_size: D.
        layers: decoder layers.
        attention_heads: heads of attention.
        kv_heads: key-value heads. Default: as many as attention heads.
        intermediate_size: width of the feed-forward layers. Default: 4 × ``hidden_size``, or what follows from it in the
            architecture.
        max_positions: the longest input. Default: the architecture's.
        tie_embeddings: whether embedding and unembedding are one.
        options: further fields of the architecture's config, by transformers' names.
    """

    type = "scratch"
    architecture: str = "llama"
    vocab_size: int = field(validator=ge(1))
    hidden_size: int = field(default=128, validator=ge(1))
    layers: int = field(default=4, validator=[ge(1), le(LAYERS_LIMIT)])
    attention_heads: int = field(default=4, validator=ge(1))
    kv_heads: int | None = field(default=None, validator=optional(ge(1)))
    intermediate_size: int | None = field(default=None, validator=optional(ge(1)))
    max_positions: int | None = field(default=None, validator=optional(ge(1)))
    tie_embeddings: bool = False
    options: Mapping[str, Any] = Factory(dict)

    def build(self) -> ModelLoader:
        """Make the loader."""
        from wmtp.models.loaders.scratch import ScratchLoader

        return ScratchLoader(self)

"""Contract of a model source. Importing it imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from attrs import field, frozen

from wmtp.models.native.found import Native
from wmtp.plugins.built import built, returned
from wmtp.plugins.contract import Contract

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from wmtp.config.schema import HeadsConfig, StorageConfig
    from wmtp.models.adapter_folder import SavedAdapter
    from wmtp.models.untouched import Untouched
    from wmtp.plugins.contract import ModelLoaderConfig

__all__ = ["LoadedModel", "ModelInfo", "ModelLoader", "load_model", "make_loader", "model_info"]

_KIND: Final = "model_loaders"


@frozen(kw_only=True)
class ModelInfo:
    """Metadata of a model, known before its weights are read.

    Args:
        architecture: for instance ``LlamaForCausalLM``.
        parameters: their number, without extra heads; tied ones count once.
        layers: decoder layers.
        layer_parameters: of one decoder layer.
        hidden_size: D.
        vocab_size: V, the rows of the unembedding.
        max_positions: the longest input; None where there is no limit.
        heads: the extra heads that the model brings; None for an ordinary model.
        feed_forward_size: the inner width of the feed-forward layers, for the memory estimate; None where it is not known.
        kv_size: size of a token's keys in one layer, for the memory estimate; None where it is not known.
        switching_length: the length beyond which positions are scaled by the row's length (dynamic RoPE), so that packed
            documents would not be computed as they are alone; None where there is none.
        native: its own layers for multi-token prediction; None where it has none of a layout that is known.
        unsavable: why a trained copy of the folder could not be saved whole, so that training it is refused; None where it can.
        linear_maps: names of the linear maps in the decoder layers; none where they are not known.
    """

    architecture: str
    parameters: int
    layers: int
    layer_parameters: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    heads: HeadsConfig | None = None
    feed_forward_size: int | None = None
    kv_size: int | None = None
    switching_length: int | None = None
    native: Native | None = None
    unsavable: str | None = None
    linear_maps: tuple[str, ...] = field(default=(), repr=False)


@frozen(kw_only=True, eq=False)
class LoadedModel:
    """A model as its source has it.

    Args:
        model: an ordinary causal language model; its own layers are untouched.
        heads: the kind and horizon of the extra heads that the files hold; None where they hold none.
        draft_ids: the tokens that these heads draft from; None: all.
        head_state: the tensors of those extra heads, named as in `wmtp.models.mtp.MTPModel.extra_heads`' state dict.
        untouched: what else the files hold, and is written back wherever the model is saved.
        native: the model's own layers for multi-token prediction among ``untouched``, which can be its heads.
        adapter: what the files hold of an adapter, which is not on ``model`` yet; None where they hold none.
        stored: of a model as `ModelLoader.open_stored` gives it: the parameters that are, unchanged, a tensor of the folder's
            safetensors files, with its name there. None: parameters have the type that was asked for.
    """

    model: PreTrainedModel
    heads: HeadsConfig | None = None
    draft_ids: tuple[int, ...] | None = None
    head_state: Mapping[str, torch.Tensor] | None = None
    untouched: Untouched | None = None
    native: Native | None = None
    adapter: SavedAdapter | None = None
    stored: Mapping[str, str] | None = None


class ModelLoader(Contract, ABC, contract=True):
    """Turns a file or folder into a causal language model."""

    def with_storage(self, storage: StorageConfig) -> ModelLoader:
        """Return a loader that reaches stores by these options.

        For loaders whose files name others by URI; the default returns ``self``.
        """
        return self

    @abstractmethod
    def info(self, path: Path | None) -> ModelInfo:
        """Read the metadata, not the weights.

        Args:
            path: the local file or folder of the config's ``uri``; None where the config class has no ``uri``.

        Raises:
            WMTPError: the files are missing, damaged or of another format; the message names them.
        """

    @abstractmethod
    def load(self, path: Path | None, *, dtype: torch.dtype, seed: int) -> LoadedModel:
        """Read the weights, on the CPU.

        Args:
            path: as for `info`.
            dtype: of the parameters.
            seed: of weights that are made new (a model from scratch).

        Raises:
            WMTPError: a tensor is missing, unexpected or of the wrong shape; the message names it. Nothing is ever filled
                with random values in place of a missing tensor.
        """

    def open_stored(self, path: Path | None, *, seed: int) -> LoadedModel | None:
        """Map the weights from their files, in the files' dtype.

        None, the default, has `load` called. What is opened so takes no memory of its own until it is used, and several
        processes read no more of it than their parts.

        Args:
            path, seed: as for `load`.

        Raises:
            WMTPError: as for `load`.
        """
        return None


def make_loader(component: ModelLoaderConfig, storage: StorageConfig) -> ModelLoader:
    """Build the loader of a model source.

    Args:
        component: the model source.
        storage: how it reaches stores.

    Raises:
        PluginError: ``build`` gives no loader.
    """
    return built(component, _KIND).with_storage(storage)


def model_info(component: ModelLoaderConfig, storage: StorageConfig, path: Path | None) -> ModelInfo:
    """Read a model's metadata; see `make_loader` and `ModelLoader.info`."""
    return returned(component, _KIND, "info", ModelInfo, make_loader(component, storage).info(path))


def load_model(
    component: ModelLoaderConfig, loader: ModelLoader, path: Path | None, *, dtype: torch.dtype, seed: int
) -> LoadedModel:
    """Read a model's weights by the loader of ``component``; see `ModelLoader.load`."""
    return returned(component, _KIND, "load", LoadedModel, loader.load(path, dtype=dtype, seed=seed))

"""Suite for model loaders."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from wmtp.errors import WMTPError
from wmtp.models.base import ModelLoader
from wmtp.models.build import build_model
from wmtp.testing.component import ComponentTests

__all__ = ["ModelLoaderTests"]


class ModelLoaderTests(ComponentTests):
    """Contract tests of a model loader.

    Override the fixture ``path`` with a tiny model.
    """

    __test__ = False
    kind = "model_loaders"

    @pytest.fixture
    def path(self) -> Path | None:
        """Return the model's path; None for a loader without ``uri``."""
        return None

    @pytest.fixture
    def loader(self) -> ModelLoader:
        """Build the loader under test."""
        return self.config.build()

    def test_info_is_what_load_gives(self, loader: ModelLoader, path: Path | None) -> None:
        """``info`` reads no weights, and yet says what the model will be."""
        assert isinstance(loader, ModelLoader)
        loaded = loader.load(path, dtype=torch.float32, seed=0)
        config = loaded.model.config.get_text_config(decoder=True)
        unembedding = cast(torch.nn.Linear, loaded.model.get_output_embeddings())
        info = loader.info(path)
        assert info.architecture == type(loaded.model).__name__
        assert info.parameters == sum(parameter.numel() for parameter in loaded.model.parameters())
        assert info.layers == config.num_hidden_layers
        assert (info.vocab_size, info.hidden_size) == tuple(unembedding.weight.shape)
        assert info.max_positions == getattr(config, "max_position_embeddings", None)
        assert info.heads == loaded.heads

    def test_loading_again_gives_the_same(self, loader: ModelLoader, path: Path | None) -> None:
        """Loading twice gives equal weights, and leaves torch's random state alone."""
        state = torch.get_rng_state()
        first = loader.load(path, dtype=torch.float32, seed=3).model.state_dict()
        torch.rand(7)
        again = self.config.build().load(path, dtype=torch.float32, seed=3).model.state_dict()
        assert first.keys() == again.keys()
        different = [name for name in first if not torch.equal(first[name], again[name])]
        assert not different, f"tensors that differ between two readings: {different[:5]}"
        torch.set_rng_state(state)
        loader.load(path, dtype=torch.float32, seed=4)
        assert torch.equal(torch.get_rng_state(), state), "load() used up torch's global random numbers"

    def test_opened_where_it_lies(self, loader: ModelLoader, path: Path | None) -> None:
        """Compare `ModelLoader.open_stored`, which gives the files' own type, with `ModelLoader.load`."""
        opened = loader.open_stored(path, seed=0)
        if opened is None:
            return
        expected = dict(loader.load(path, dtype=torch.float32, seed=0).model.named_parameters())
        assert opened.stored is not None
        assert opened.stored.keys() <= expected.keys()
        for name, parameter in opened.model.named_parameters():
            assert torch.equal(parameter.to(torch.float32), expected[name]), name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_dtype_and_device(self, loader: ModelLoader, path: Path | None, dtype: torch.dtype) -> None:
        """Every parameter has the requested dtype, and is on the CPU."""
        for name, parameter in loader.load(path, dtype=dtype, seed=0).model.named_parameters():
            assert parameter.dtype == dtype, name
            assert parameter.device.type == "cpu", name

    def test_it_is_a_causal_language_model(self, loader: ModelLoader, path: Path | None) -> None:
        """Logits are finite, and never depend on later tokens."""
        model = loader.load(path, dtype=torch.float32, seed=0).model.eval()
        ids = torch.arange(6)[None] % model.config.get_text_config(decoder=True).vocab_size
        changed = ids.clone()
        changed[0, 4] = ids[0, 3]
        with torch.no_grad():
            logits, other = model(input_ids=ids).logits, model(input_ids=changed).logits
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(logits[:, :4], other[:, :4])

    def test_heads_can_be_put_on_it(self, loader: ModelLoader, path: Path | None) -> None:
        """Head 1's logits are the model's, bit for bit."""
        loaded = loader.load(path, dtype=torch.float32, seed=0)
        model = build_model(loaded, None, seed=0).eval()
        ids = torch.arange(5)[None] % model.vocab_size
        with torch.no_grad():
            assert torch.equal(model.logits(model(ids), 1), loaded.model.eval()(input_ids=ids).logits)

    def test_a_missing_path_is_named(self, loader: ModelLoader, path: Path | None, tmp_path: Path) -> None:
        """A missing path is named in an error, without asking a hub."""
        if path is None:
            pytest.skip("a loader without files")
        missing = tmp_path / "no-such-model"
        for read in (loader.info, lambda where: loader.load(where, dtype=torch.float32, seed=0)):
            with pytest.raises(WMTPError, match="no-such-model"):
                read(missing)

"""Global state of the process that a plugin uses or changes: generators of random numbers, handlers of signals."""

import random
import signal

import attrs
import numpy as np
import pytest
import torch
from tiny_recipe import tiny_recipe

import wmtp

DRAWS = {"python": random.random, "numpy": lambda: float(np.random.rand()), "torch": lambda: float(torch.rand(()))}


@attrs.frozen(kw_only=True)
class Draws(wmtp.Trainer):
    """Weights of chance, though not from ``view.generator``."""

    type = "draws"
    of: str

    def token_weights(self, view):
        weights = view.uniform()
        weights[:, ::2] *= 0.1 + DRAWS[self.of]()
        return weights


@attrs.frozen(kw_only=True)
class Seizes(wmtp.Trainer):
    type = "seizes"

    def token_weights(self, view):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return view.uniform()


@pytest.fixture
def config(tmp_path):
    lines = [f'{{"prompt": "one {n} ", "completion": "three {n} five six"}}\n' for n in range(12)]
    (tmp_path / "code.jsonl").write_text("".join(lines))
    return wmtp.load_config(
        tiny_recipe(
            str(tmp_path / "code.jsonl"),
            run={"output_dir": str(tmp_path)},
            optimizer={"lr": 0.01},
            train={"max_steps": 5},
            checkpoints={"save_interval": 2},
            devices={"device": "cpu"},
        )
    )


@pytest.mark.parametrize("of", DRAWS)
def test_global_random_numbers_are_those_of_the_seed_and_of_an_uninterrupted_run(config, tmp_path, of, monkeypatch):
    whole = wmtp.run(attrs.evolve(config, trainer=Draws(of=of)), run_name="whole")

    def stopped(self, view, weigh=Draws.token_weights):
        if view.step == 3:
            raise LookupError("power cut")
        return weigh(self, view)

    with monkeypatch.context() as cut:
        cut.setattr(Draws, "token_weights", stopped)
        with pytest.raises(wmtp.PluginError, match="power cut"):
            wmtp.run(attrs.evolve(config, trainer=Draws(of=of)), run_name="cut")
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    resumed = wmtp.run(attrs.evolve(config, trainer=Draws(of=of)), resume=tmp_path / "cut")
    assert resumed.metrics["loss"] == whole.metrics["loss"]
    assert (tmp_path / "cut/model/model.safetensors").read_bytes() == (tmp_path / "whole/model/model.safetensors").read_bytes()


def test_a_handler_that_a_plugin_sets_is_said_once_and_taken_back(config, caplog):
    before = signal.getsignal(signal.SIGTERM)
    wmtp.run(attrs.evolve(config, trainer=Seizes()), run_name="one")
    said = [record.message for record in caplog.records if "is now handled" in record.message]
    assert len(said) == 1
    assert said[0].startswith("SIGTERM is now handled by ")
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_generator_in_numpy_is_told_and_keeps_no_checkpoint_from_being_saved(config, caplog):
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(0))
        result = wmtp.run(config)
    finally:
        np.random.set_bit_generator(before)
    assert result.status == "finished"
    assert "numpy's global random numbers come from PCG64, which a checkpoint does not keep" in caplog.text

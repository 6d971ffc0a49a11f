"""Rules of ``devices.cuda_graphs``: what cannot be recorded is refused, with what to write."""

import pytest
import torch
from attrs import evolve

from wmtp.config import adapter_rules
from wmtp.config.load import load
from wmtp.config.rules import check_loaded
from wmtp.config.schema import DevicesConfig
from wmtp.errors import ConfigError
from wmtp.training.placement import check_device

GOOD = {
    "models": {"base": {"type": "hf", "uri": "hf://org/name", "lora": {"rank": 4}}},
    "datasets": {"py": {"type": "python-source"}},
    "trainer": {"type": "baseline-mtp"},
    "devices": {"precision": "bf16-params", "compile": True, "cuda_graphs": True},
}


@pytest.fixture(autouse=True)
def _packages(monkeypatch):
    monkeypatch.setattr(adapter_rules, "find_spec", lambda _: "there")


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["devices.device=cuda", "models.base.quantize=nf4", "devices.activation_checkpointing=selective"],
        ["devices.precision=fp8", "launcher.processes=1"],
    ],
)
def test_what_can_be_passes(sets):
    check_loaded(load([GOOD], sets))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["devices.device=cpu"], 'only NVIDIA GPUs have them, and devices.device = "cpu"; remove this key'),
        (["devices.device=mps"], 'only NVIDIA GPUs have them, and devices.device = "mps"; remove this key'),
        (["models.base={type = 'hf', uri = 'hf://org/name'}"], "add the table [models.base.lora], or remove this key"),
        (["devices.compile=false"], "write devices.compile = true, or remove this key"),
        (["devices.precision=bf16"], 'devices.precision = "bf16"; write "bf16-params" or "fp8", or remove this key'),
        (["devices.activation_checkpointing=offload"], 'write "full", or remove this key'),
        (["launcher.processes=2"], "launcher.processes = 2 is for several; remove either"),
        (["devices.fsdp={}"], "devices.fsdp is for several; remove either"),
    ],
)
def test_what_cannot_be_is_refused(sets, message):
    given = {**GOOD, "models": {}} if "models.base={" in sets[0] else GOOD
    with pytest.raises(ConfigError) as caught:
        check_loaded(load([given], sets))
    (line,) = [line for line in caught.value.problems if "devices.cuda_graphs: " in line]
    assert message in line


def test_what_auto_picks_is_asked_too():
    config = load([GOOD], []).config
    for device, world_size, message in (
        ("cpu", 1, "only NVIDIA GPUs have them, and the run computes on cpu; remove this key"),
        ("cuda", 2, "2 train together; write launcher.processes = 1, or remove this key"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_device(config, torch.device(device), world_size)
        assert f"devices.cuda_graphs: {message}"[-40:] in caught.value.problems[0]
        assert caught.value.problems[0].endswith(message)
    check_device(config, torch.device("cuda"))
    check_device(evolve(config, devices=DevicesConfig()), torch.device("cpu"), 2)

"""A checkpoint's tensors are written one by one, as torch's own writer would write them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.checkpoints.local import list_checkpoints, load_checkpoint, save_checkpoint
from wmtp.checkpoints.shard_writer import ShardWriter
from wmtp.config.schema import HeadsConfig
from wmtp.models.mtp import MTPModel

TENSORS = {
    "bytes": torch.arange(5, dtype=torch.uint8),
    "bf16": torch.randn(3, 7, dtype=torch.bfloat16),
    "view": torch.randn(6, 4).T,
    "slice": torch.randn(8, 8)[2:4, 1:6],
    "long": torch.arange(3),
    "nothing": torch.zeros(0, 4),
    "flags": torch.tensor([True, False, True]),
    "half": torch.randn(1, dtype=torch.float16),
    "a \"name\" with ünicode": torch.randn(2, dtype=torch.float64),
}  # fmt: skip


def write(tensors, folder, writer):
    folder.mkdir()
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    (path,) = folder.iterdir()
    with safe_open(path, framework="pt") as file:
        return path.name, file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_it_writes_what_torchs_own_writer_writes(tmp_path):
    ours, metadata, found = write(TENSORS, tmp_path / "ours", ShardWriter(tmp_path / "ours"))
    torchs = dcp.HuggingFaceStorageWriter(str(tmp_path / "torchs"), save_distributed=True)
    dense = {name: tensor.contiguous() for name, tensor in TENSORS.items()}  # it refuses others
    name, expected, tensors = write(dense, tmp_path / "torchs", torchs)
    assert ours == name
    assert {key: value for key, value in metadata.items() if key != "DCP_SHARDING_INFO"} == {
        key: value for key, value in expected.items() if key != "DCP_SHARDING_INFO"
    }
    assert json.loads(metadata["DCP_SHARDING_INFO"]) == json.loads(expected["DCP_SHARDING_INFO"])
    assert found.keys() == tensors.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:ComplexHalf")
def test_a_dtype_that_no_file_can_hold_is_named(tmp_path):
    tensors = {"odd": torch.zeros(2, dtype=torch.complex32)}
    with pytest.raises(dcp.api.CheckpointException, match=r"odd: safetensors cannot hold torch\.complex32"):
        write(tensors, tmp_path / "ours", ShardWriter(tmp_path / "ours"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process's memory is read from /proc")
def test_writing_takes_no_copy_of_the_checkpoint(tmp_path):
    model = nn.ModuleList([nn.Linear(1024, 1024, bias=False) for _ in range(24)])  # 96 MiB, and twice that for its moments
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    save_checkpoint(tmp_path, 1, nn.Linear(1, 1), torch.optim.SGD([nn.Parameter(torch.zeros(1))]), {})  # what is loaded once

    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    before = memory("VmHWM")
    save_checkpoint(tmp_path, 2, model, optimizer, {})
    assert memory("VmHWM") - before < 48 * 2**20

    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    load_checkpoint(list_checkpoints(tmp_path)[-1], model, optimizer)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process's memory is read from /proc")
def test_writing_the_model_takes_no_copy_of_it(tmp_path):
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
    small = shape | {"hidden_size": 16, "num_hidden_layers": 2}
    for name, config in (("first", small), ("large", shape)):
        base = LlamaForCausalLM(LlamaConfig(vocab_size=8192, **config)).eval()
        model = MTPModel(base, HeadsConfig(horizon=4, init="copy"), seed=0)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmHWM")
        model.save_pretrained(tmp_path / name)
        needed = memory("VmHWM") - before
    written = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert written > 120 * 2**20
    assert needed < written / 8


def memory(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

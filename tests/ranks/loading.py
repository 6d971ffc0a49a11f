"""A folder in bf16 or fp16, or of .bin files, on two ranks: what each reads and takes; the numbers are those of one process.

Run by test_distributed.py in each of two processes, with a folder to write to as argument, and with a strategy.
"""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from steps import one_process_group, whole

from wmtp.config.load import load_config
from wmtp.config.places import Place
from wmtp.distributed.ranks import SINGLE_PROCESS
from wmtp.errors import WMTPError
from wmtp.tokenizers.config import Bytes
from wmtp.training.placement import place_model
from wmtp.training.setup import Source, load_extra_model

CPU = torch.device("cpu")


class Traffic(TorchDispatchMode):
    """Bytes of all memory that operations take, and of what is copied from tensors of 16 bits."""

    def __init__(self):
        super().__init__()
        self.taken = 0
        self.read = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if plain(t)}
        for tensor in tree_leaves(out):
            if plain(tensor) and tensor.untyped_storage()._cdata not in given:
                self.taken += tensor.untyped_storage().nbytes()
        if func is torch.ops.aten.copy_.default and args[1].dtype in (torch.bfloat16, torch.float16):
            self.read += args[1].nbytes
        return out


def write(folder, seed, dtype=torch.bfloat16):
    torch.manual_seed(seed)
    shape = LlamaConfig(vocab_size=1024, hidden_size=384, num_hidden_layers=3, intermediate_size=1024, num_attention_heads=4,
                        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None)  # fmt: skip
    LlamaForCausalLM(shape).to(dtype).save_pretrained(folder)


def write_bin(folder, source):
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")


def plain(tensor):
    return isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor) and tensor.device == CPU


def place(config, folder, ranks, precision="bf16"):
    info = config.models["base"].loader.build().info(folder)
    source = Source(place=Place.of(config), model_path=folder, model_info=info, rows={}, tokenizer=Bytes().build(None),
                    dataset_paths={})  # fmt: skip
    model, _ = place_model(config, source, ranks, CPU, precision, config.devices.fsdp if ranks.world_size > 1 else None)
    return model


def configured(folder, horizon, strategy, **base):
    return load_config(
        {
            "models": {"base": {"type": "hf", "uri": str(folder), "heads": {"horizon": horizon, "init": "random"}} | base,
                       "ref": {"type": "hf", "uri": str(folder)}},
            "tokenizer": {"type": "bytes"},
            "datasets": {"code": {"type": "python-source"}},
            "data": {"train": {"max_length": 8, "batch_size": 2}},
            "trainer": {"type": "baseline-mtp"},
            "devices": {"device": "cpu", "precision": "bf16", "fsdp": {"strategy": strategy}},
        }
    )  # fmt: skip


def lora_cases(folder):
    """The same with an adapter, where PEFT is installed."""
    return [(folder, {"lora": {"rank": 2}})] if find_spec("peft") else []


def all_cases(ranks, folder, strategy):
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))  # bf16: the same in fp32 is twice that
    share = {"full": 0.5, "none": 1.0}[strategy]
    with Traffic() as traffic:
        place(configured(folder, 1, strategy), folder, ranks)
    # what the model is tried out on takes something too, of a model as small as this one
    assert traffic.taken < (2 * share + 0.5) * size, (strategy, traffic.taken / size)
    assert 0.9 * share < traffic.read / size < share + 0.01, (strategy, traffic.read / size)

    model = place(configured(folder, 3, strategy), folder, ranks)
    expected = dict(place(configured(folder, 3, strategy), folder, SINGLE_PROCESS).named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(whole(parameter), expected[name]), (strategy, name)

    for kind, base in ((folder.with_name("half"), {}), (folder.with_name("bin"), {}), *lora_cases(folder)):
        with Traffic() as traffic:
            model = place(configured(kind, 1, strategy, **base), kind, ranks)
        assert traffic.taken < (2 * share + 0.6) * size, (kind, base, strategy, traffic.taken / size)
        assert 0.9 * share < traffic.read / size < share + 0.01, (kind, base, strategy, traffic.read / size)
        expected = dict(place(configured(kind, 1, strategy, **base), kind, SINGLE_PROCESS).named_parameters())
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(whole(parameter), expected[name]), (kind, base, strategy, name)

    # a reference in the files' type takes no memory of its own, on any rank
    with Traffic() as traffic:
        reference = load_extra_model(configured(folder, 1, "full"), Place.of(configured(folder, 1, "full")), CPU)(
            "ref", dtype=torch.bfloat16
        )
    assert traffic.taken < 0.5 * size, traffic.taken / size
    assert {parameter.dtype for parameter in reference.parameters()} == {torch.bfloat16}

    # as on two machines, the second of which has other files
    alone = evolve(ranks, per_machine=1, local_rank=0)
    other = folder if ranks.is_main else folder.with_name("other")
    with pytest.raises(WMTPError, match=r"rank 1 .* has another model there than rank 0"):
        place(configured(other, 1, "full"), other, alone)


if __name__ == "__main__":
    with one_process_group() as everyone:
        own = Path(sys.argv[1])
        everyone.main_only(lambda: [write(own / name, seed) for seed, name in enumerate(("model", "other"))] and None)
        everyone.main_only(lambda: write(own / "half", 2, torch.float16))
        everyone.main_only(lambda: write_bin(own / "bin", own / "model"))
        all_cases(everyone, own / "model", sys.argv[2])
        print("all equal" if everyone.is_main else "", flush=True)

"""Load time and peak host memory of each rank of a model.

    python bench/load.py --processes 2
    python bench/load.py --processes 2 --what reference
    python bench/load.py --what scratch

Writes a folder of random safetensors (``--folder``, kept for the next call) and has the processes place it as a run does:
``base`` sharded under ``--strategy`` (``alone``: as one process does without ``devices.fsdp``), ``lora`` the same with an
adapter of rank 16, ``reference`` whole on every process as a trainer asks for it, ``scratch`` the same shape with new random
weights. Each process says the seconds that it took, and how much more memory of its own it had at most (``RssAnon``: not the
pages of files, which the machine may drop) and of pages of files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

_SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_key_value_heads": 8},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_key_value_heads": 32},
    "170m": {"hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 2816, "num_key_value_heads": 32},
    "tiny": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512, "num_key_value_heads": 8},
}
_VOCAB = 32_000


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=_SHAPES, default="1b")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wmtp-bench-load")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--what", choices=["base", "lora", "reference", "scratch"], default="base")
    parser.add_argument("--strategy", default="full")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--horizon", type=int, default=4)
    parser.add_argument("--dtype", choices=["BF16", "F16", "F32"], default="BF16", help="of the files")
    given = parser.parse_args()
    if "RANK" in os.environ:
        _process(given)
        return
    folder = given.folder / f"{given.shape}-{given.dtype}"
    if given.what != "scratch" and not (folder / "model.safetensors.index.json").is_file():
        facts = _SHAPES[given.shape] | {"vocab_size": _VOCAB, "num_attention_heads": 32, "max_position_embeddings": 4096}
        facts |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        writer = [sys.executable, str(Path(__file__).with_name("random_model.py")), str(folder), json.dumps(facts), given.dtype]
        subprocess.run(writer, check=True)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.processes}", __file__, *sys.argv[1:]]
    sys.exit(subprocess.run([sys.executable, *launch]).returncode)


class _Watch(threading.Thread):
    """Samples this process' memory, in MiB, until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.begin = self._now()
        self.peak = dict(self.begin)
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.005):
            for name, value in self._now().items():
                self.peak[name] = max(self.peak[name], value)

    def stop(self) -> dict[str, int]:
        """Return how much more there was at most than at the beginning."""
        self._done.set()
        self.join()
        return {name: self.peak[name] - self.begin[name] for name in self.peak}

    @staticmethod
    def _now() -> dict[str, int]:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return {line[0][:-1]: int(line[1]) // 1024 for line in lines if line[0] in ("RssAnon:", "RssFile:", "RssShmem:")}


def _process(given: argparse.Namespace) -> None:
    import torch

    from wmtp.config.load import load_config
    from wmtp.config.places import Place
    from wmtp.config.schema import FsdpConfig
    from wmtp.devices import pick_device
    from wmtp.distributed.environment import Worker
    from wmtp.distributed.start import joined
    from wmtp.tokenizers.config import Bytes
    from wmtp.training.placement import place_model
    from wmtp.training.setup import Source, load_extra_model

    shape = _SHAPES[given.shape]
    scratch = {
        "type": "scratch", "vocab_size": _VOCAB, "hidden_size": shape["hidden_size"], "layers": shape["num_hidden_layers"],
        "attention_heads": 32, "kv_heads": shape["num_key_value_heads"], "intermediate_size": shape["intermediate_size"],
        "max_positions": 4096,
    }  # fmt: skip
    base = scratch if given.what == "scratch" else {"type": "hf", "uri": str(given.folder / f"{given.shape}-{given.dtype}")}
    lora = {"lora": {"rank": 16}} if given.what == "lora" else {}
    alone = given.strategy == "alone"
    config = load_config(
        {
            "models": {"base": base | {"heads": {"horizon": given.horizon}} | lora, "ref": base},
            "tokenizer": {"type": "bytes"},
            "datasets": {"code": {"type": "python-source"}},
            "data": {"train": {"max_length": 64, "batch_size": 8}},
            "trainer": {"type": "baseline-mtp"},
            "devices": {"device": given.device, "precision": given.precision}
            | ({} if alone else {"fsdp": {"strategy": given.strategy}}),
        }
    )
    worker = Worker.of()
    assert worker is not None
    device = pick_device(given.device, worker.local_rank)
    with joined(config, worker) as ranks:
        entry = config.models["base"].loader
        path = None if given.what == "scratch" else given.folder / f"{given.shape}-{given.dtype}"
        source = Source(
            place=Place.of(config), model_path=path, model_info=entry.build().info(path), rows={},
            tokenizer=Bytes().build(None), dataset_paths={},
        )  # fmt: skip
        ranks.barrier()
        watch = _Watch()
        watch.start()
        began = time.monotonic()
        if given.what == "reference":
            dtype = torch.bfloat16 if given.precision == "bf16-params" else torch.float32
            load = load_extra_model(config, Place.of(config), device)
            model = ranks.one_by_machine_first(lambda: load("ref", dtype=dtype))
        else:
            fsdp = None if alone else FsdpConfig(strategy=given.strategy)
            model, _ = place_model(config, source, ranks, device, given.precision, fsdp)
        if device.type == "cuda":
            torch.cuda.synchronize()
        own = time.monotonic() - began
        ranks.barrier()
        facts = {"seconds": own, "device": device.type, "parameters": sum(p.numel() for p in model.parameters())}
        found = ranks.objects(facts | watch.stop())
        for line in found if ranks.is_main else ():
            print(json.dumps({"what": given.what, "shape": given.shape, "strategy": given.strategy} | line), flush=True)


if __name__ == "__main__":
    main()

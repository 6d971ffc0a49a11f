"""Fetch and load of a model, apart and side by side.

Would it pay to read tensors while other shards still come?

    uv run python bench/fetch_load.py [--layers N] [--repeats N] [--rate MB…]

A Llama of random weights in shards is put into a real S3 server, fetched with and without a cap for each connection, and
loaded by WMTP's loader (every tensor copied once, as to a device): at once, its files being in the page cache, and from the
disk. A load that went on beside the fetch
could save the shorter of the two at most; ``side by side`` is both at once, with files that are there already.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fetch import MB, SlowProxy

from wmtp_storage import S3Storage
from wmtp_storage.testing import start_s3_server

WIDTH = 2048


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def make(folder: Path, layers: int) -> int:
    """Write the model; its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.bfloat16().to_empty(device="cpu")
    for tensor in model.parameters():  # bytes that no server and no disk can make smaller
        tensor.data.view(torch.int16).random_(-(2**14), 2**14)
    model.save_pretrained(folder, max_shard_size="300MB")
    return sum(path.stat().st_size for path in folder.iterdir())


def load(folder: Path) -> None:
    import torch

    from wmtp.models.loaders.hf import HfLoader

    loaded = HfLoader().load(folder, dtype=torch.bfloat16, seed=0)
    for parameter in loaded.model.parameters():  # loading maps the files only: as a copy to a device, this reads them
        parameter.detach().clone()


def forget(folder: Path) -> None:
    """Have the files read from the disk the next time."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rate", type=int, nargs="*", default=[0, 16, 4], help="MB/s a connection; 0: no cap")
    options = parser.parse_args()
    print(f"import torch, transformers and the loader: {timed(lambda: __import__('wmtp.models.loaders.hf')):.1f} s", flush=True)
    work = Path(tempfile.mkdtemp(prefix="wmtp-bench-"))
    server = start_s3_server()
    os.environ.update(server.environment)
    bucket = server.bucket()
    size = make(work / "model", options.layers)
    for path in (work / "model").iterdir():
        server.store(bucket).put(f"model/{path.name}", path, chunk_size=16 * MB)
    print(f"{size / 1e9:.2f} GB in {len(list((work / 'model').glob('*.safetensors')))} shards", flush=True)
    for rate in options.rate:
        endpoint, proxy = server.endpoint, None
        if rate:
            slow = SlowProxy(endpoint, rate * MB)
            endpoint = slow.endpoint
            if (proxy := os.fork()) == 0:
                slow.serve()
        storage = S3Storage(endpoint=endpoint, region="us-east-1").build()
        times: dict[str, list[float]] = {"fetch": [], "load": [], "load from disk": [], "side by side": []}
        uri, target = f"s3://{bucket}/model", work / "target"
        for _ in range(options.repeats):
            times["fetch"].append(timed(partial(storage.fetch, uri, target)))
            times["load"].append(timed(partial(load, target)))
            forget(target)
            times["load from disk"].append(timed(partial(load, target)))
            shutil.rmtree(target)
            beside = threading.Thread(target=load, args=(work / "model",))
            began = time.monotonic()
            beside.start()
            storage.fetch(uri, target)
            beside.join()
            times["side by side"].append(time.monotonic() - began)
            shutil.rmtree(target)
        if proxy is not None:
            os.kill(proxy, 9)
            os.waitpid(proxy, 0)
        medians = ", ".join(f"{name} {statistics.median(each):.2f} s" for name, each in times.items())
        print(f"{f'{rate} MB/s a connection' if rate else 'no cap'}: {medians}; load {os.getloadavg()[0]:.1f}", flush=True)
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    main()

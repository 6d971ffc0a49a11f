"""Training steps of WMTP and of its peers.

Tokens per second, MFU and peak memory, in one run on one GPU.

    python bench/step.py --vocab 32000 128256 --batch 16
    python bench/step.py --rows ours loop-liger rho1-cached --batch 8 --json step.json
    python bench/step.py --shape smollm2 --rows ours ours-eager ours-accuracy

Every row trains the same model (a Llama of random weights with block heads) on the same random tokens with a weight for each
token, by AdamW with clipped gradients. MFU counts 6 operations a parameter and token, the unembedding once a head, and causal
attention, against the matrix rate that the GPU's data sheet says; what is computed again counts nothing. `ours-accuracy`
measures each head's token accuracy in every step, which a run does in one of 20.

Needs liger-kernel for the rows of that name, and accelerate for the Hugging Face Trainer.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import step_ours
import step_peers
import torch
from step_shape import Shape

ROWS: dict[str, Callable[[Shape, int, int], float]] = {
    "ours": step_ours.baseline,
    "ours-selective": step_ours.selective,
    "ours-full": step_ours.full,
    "ours-offload": step_ours.offload,
    "ours-autocast": step_ours.autocast,
    "ours-packed": step_ours.packed,
    "ours-layout": step_ours.laid_out,
    "ours-eager": step_ours.eager,
    "ours-accuracy": step_ours.accuracy,
    "rho1-cached": step_ours.rho1_cached,
    "rho1-online": step_ours.rho1_online,
    "critic": step_ours.critic,
    "trainer-liger": step_peers.trainer_liger,
    "loop-liger": step_peers.loop_liger,
    "loop-liger-full": step_peers.loop_liger_full,
    "loop-liger-mean": step_peers.loop_liger_mean,
    "naive": step_peers.naive,
}
#: what the options about the model and its rows are by default
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab": [32_000, 128_256], "hidden": 2048, "layers": 16, "ffn": 8192, "attention_heads": 32, "kv_heads": 8,
        "length": 2048, "batch": 16,
    },
    "smollm2": {
        "vocab": [49_152], "hidden": 576, "layers": 30, "ffn": 1536, "attention_heads": 9, "kv_heads": 3,
        "length": 1024, "batch": 32,
    },
}  # fmt: skip
#: dense bf16 operations a second that data sheets give
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def main() -> None:
    """Run the rows that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[row for row in ROWS if row != "ours-layout"])
    parser.add_argument("--layout", type=Path, help="documents of the row ours-layout: JSON, lengths by step and row")
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="of the model; the options below change it")
    parser.add_argument("--vocab", nargs="+", type=int)
    for name in ("hidden", "layers", "ffn", "attention-heads", "kv-heads", "length", "batch"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--horizon", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    for name, value in SHAPES[given.shape].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.layout:
        step_ours.LAYOUTS[:] = json.loads(given.layout.read_text())
    name = torch.cuda.get_device_name()
    peak = next((rate for chip, rate in PEAKS.items() if chip in name), None)
    print(f"{name}, torch {torch.__version__}, B = {given.batch}, S = {given.length}, H = {given.horizon}")
    results = []
    for vocab in given.vocab:
        shape = Shape(
            vocab=vocab,
            hidden=given.hidden,
            layers=given.layers,
            ffn=given.ffn,
            attention_heads=given.attention_heads,
            kv_heads=given.kv_heads,
            horizon=given.horizon,
            length=given.length,
            batch=given.batch,
        )
        print(f"\nV = {vocab:,}: {shape.operations / 1e9:.2f} GFLOP a token")
        print(
            f"{'row':<18}{'tokens/s':>10}{'ms':>8}{'MFU %':>8}{'peak GiB':>10}{'estimate':>10}"
            f"{'vs best peer':>14}{'start s':>9}",
            flush=True,
        )
        best: float | None = None
        # peers first: every other row is shown against the best of them that can weigh
        for row in sorted(given.rows, key=lambda row: list(ROWS).index(row) < list(ROWS).index("trainer-liger")):
            began = time.monotonic()
            result = measure(row, shape, given.warmup, given.steps)
            if "failed" in result:
                print(f"{row:<18}{result['failed']:>10}", flush=True)
            else:
                speed = result["tokens_per_second"]
                result["mfu"] = speed * shape.operations / peak if peak else float("nan")
                if row in ("trainer-liger", "loop-liger", "naive"):
                    best = max(best or 0.0, speed)
                gib = step_ours.estimated_gib(row, shape)
                estimate = "-" if gib is None else f"{gib:.1f}"
                ratio = f"{speed / best:.3f}" if best else "-"
                seconds = time.monotonic() - began - given.steps * result["seconds"]
                print(
                    f"{row:<18}{speed:>10,.0f}{1e3 * result['seconds']:>8.1f}{100 * result['mfu']:>8.1f}"
                    f"{result['peak_gib']:>10.1f}{estimate:>10}{ratio:>14}{seconds:>9.0f}",
                    flush=True,
                )
            results.append({"row": row, "vocab": vocab, "device": name, "batch": given.batch, "length": given.length} | result)
            if given.json:
                given.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(row: str, shape: Shape, warmup: int, steps: int) -> dict[str, Any]:
    """One row: seconds a step, tokens a second, peak memory."""
    torch.cuda.synchronize()
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    try:
        seconds = ROWS[row](shape, warmup, steps)
    except torch.OutOfMemoryError:
        return {"failed": "no memory"}
    except Exception as error:
        traceback.print_exc(limit=-6)
        return {"failed": f"{type(error).__name__}"}
    return {
        "seconds": seconds,
        "tokens_per_second": shape.tokens / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


if __name__ == "__main__":
    main()

"""One run on any number of GPUs of one machine.

``python bench/multi_gpu.py [--parts equal,scaling,…]``

Every figure comes from ``wmtp run`` on real text (the standard library's own Python), by what it writes into
``metrics.jsonl``. Parts, each left out where the machine cannot do it, with the reason:

- ``equal``: ten steps of a small model on all GPUs against one GPU without FSDP, in fp32 and in bf16. ``--check`` runs
  this part alone, and ends with 1 if they differ by more than rounding.
- ``scaling``: tokens per second and MFU of a ~1B Llama shape on 1, 2, 4 … GPUs, with as many rows a GPU.
- ``large``: a Llama-7B shape with H = 4 block heads, read from files of random weights; as many of its layers as the GPUs hold
  by the estimate of ``wmtp check``, which stands beside each measured peak.
- ``checkpoint``: saved on all GPUs, resumed on half of them.
- ``algorithms``: ``baseline-mtp``, ``rho1-wmtp`` (a 2.7B-shaped reference) and ``critic-wmtp``, 20 steps each of the large
  shape; ``--trainers`` chooses among them.

NVLink multicast (NVLS) stays off, which some shared machines cannot do.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from multi_gpu_runs import LENGTH, Bench, merged, model_folder

from wmtp.config.load import load_config
from wmtp.config.required_models import required_models
from wmtp.config.schema import HeadsConfig
from wmtp.launchers.config import LocalLauncher
from wmtp.models.outline import outline
from wmtp.training.memory import MemoryEstimate, estimate_memory, too_large

# bf16 without sparsity, as the data sheets have it
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40": 181.0, "B200": 2250.0}
TRAINERS = ("baseline-mtp", "rho1-wmtp", "critic-wmtp")
#: rows a device of the large shape, and how it is run
ROWS = 4
LARGE: dict[str, Any] = {"devices": {"activation_checkpointing": "full"}}


def shape(name: str, layers: int | None = None) -> dict[str, int]:
    shapes = {
        "small": {"hidden_size": 256, "layers": 4, "attention_heads": 8, "kv_heads": 8, "intermediate_size": 704},
        "1B": {"hidden_size": 2048, "layers": 16, "attention_heads": 32, "kv_heads": 8, "intermediate_size": 8192},
        "2.7B": {"hidden_size": 2560, "layers": 32, "attention_heads": 32, "kv_heads": 32, "intermediate_size": 6912},
        "7B": {"hidden_size": 4096, "layers": 32, "attention_heads": 32, "kv_heads": 32, "intermediate_size": 11008},
    }
    found = dict(shapes[name]) | {"vocab_size": 1024 if name == "small" else 32000, "max_positions": LENGTH}
    return found | ({"layers": layers} if layers is not None else {})


def layer_parameters(model: dict[str, int]) -> int:
    width, kv = model["hidden_size"], model["hidden_size"] * model["kv_heads"] // model["attention_heads"]
    return 2 * width * width + 2 * width * kv + 3 * width * model["intermediate_size"]


def parameters(model: dict[str, int], horizon: int = 4) -> int:
    return (model["layers"] + horizon - 1) * layer_parameters(model) + 2 * model["vocab_size"] * model["hidden_size"]


def flops_per_token(model: dict[str, int], horizon: int = 4) -> float:
    """Operations of forward and backward a token.

    6 a parameter of a product, the unembedding once a head, and causal attention.
    """
    layers = model["layers"] + horizon - 1
    products = layers * layer_parameters(model) + horizon * model["vocab_size"] * model["hidden_size"]
    return 6 * products + 6 * layers * LENGTH * model["hidden_size"]


def tensors(run_dir: Path) -> dict[str, object]:
    from safetensors.torch import load_file

    return {
        f"{file.name}:{name}": tensor
        for file in sorted((run_dir / "model").glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def difference(one: Path, other: Path) -> float:
    """Compute ‖a − b‖ / ‖a‖ over all parameters.

    ‖a − b‖ / ‖a − start‖ would need the start.
    """
    import torch

    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    apart = sum(float((left[n].double() - right[n].double()).square().sum()) for n in left)  # type: ignore[attr-defined]
    size = sum(float(left[n].double().square().sum()) for n in left)  # type: ignore[attr-defined]
    return float(torch.tensor(apart / size).sqrt())


def equal(bench: Bench) -> bool:
    """Ten steps on all GPUs with FSDP2, and on one without."""
    good = True
    for precision, bound in (("fp32", 1e-4), ("bf16", 2e-3)):
        runs = []
        for name, gpus, fsdp in (("one", 1, None), ("all", bench.count, {"strategy": "full"})):
            changes = {"devices": {"precision": precision, "fsdp": fsdp}, "data": {"train": {"micro_batch_size": 2}}}
            runs.append(bench.run(f"equal-{precision}-{name}", bench.config(shape("small"), gpus, 8, **changes)))
        (left, one), (right, every) = runs
        losses = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(left, right, strict=True))
        apart = difference(one, every)
        fine = losses < bound and apart < bound
        good &= fine
        print(
            f"equal {precision}: {bench.count} device(s) with FSDP2 against 1 without, 10 steps: losses differ by "
            f"{losses:.1e}, parameters by {apart:.1e} (at most {bound:g}): {'ok' if fine else 'NOT EQUAL'}; losses "
            f"{left[0]['loss']:.4f} … {left[-1]['loss']:.4f}",
            flush=True,
        )
    return good


def speed(bench: Bench, label: str, name: str, model: dict[str, int], gpus: int, rows: int, **changes: object) -> float:
    """Print one line of figures; returns tokens per second."""
    config = bench.config(model, gpus, rows, **merged(bench.fast, changes))
    metrics, run_dir = bench.run(name, config, saves=False)
    shutil.rmtree(run_dir)
    later = sorted(line["tokens_per_second"] for line in metrics[len(metrics) // 2 :])
    rate = later[len(later) // 2]
    peak = max(line["peak_memory_gib"] for line in metrics)
    mfu = ""
    if (chip := chip_name()) in PEAK_TFLOPS:
        mfu = f", MFU {rate * flops_per_token(model) / gpus / PEAK_TFLOPS[chip] / 1e12:.1%}"
    # a GPU's peak is that of torch's allocator; a CPU's that of the whole process, with Python and torch in it
    print(
        f"{label}: {gpus} device(s), {rows} rows of {bench.length}: {rate:,.0f} tokens/s, {rate / gpus:,.0f} each{mfu}; peak "
        f"{peak:.2f} GiB a device, wmtp check says {estimate(config)}",
        flush=True,
    )
    return rate


def estimate(config: dict[str, object]) -> MemoryEstimate:
    """Estimate of ``wmtp check`` for one of the devices."""
    loaded = load_config(config)
    others = {name: outline(loaded.models[name].loader) for name in required_models(loaded)}
    base = loaded.models["base"]
    info = outline(base.loader)
    assert info is not None
    found = {name: other for name, other in others.items() if other is not None}
    processes = cast(LocalLauncher, loaded.launcher).processes
    assert isinstance(processes, int)
    return estimate_memory(loaded, info, base.heads or HeadsConfig(), world_size=processes, others=found)


def chip_name() -> str:
    import torch

    full = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return next((name for name in PEAK_TFLOPS if name in full), full)


def counts(most: int) -> list[int]:
    return [n for n in (1, 2, 4, 8) if n <= most]


def scaling(bench: Bench) -> bool:
    model = shape("1B") if bench.device == "cuda" else shape("small")
    rates = {n: speed(bench, "scaling 1B", f"scaling-{n}", model, n, 8 * n) for n in counts(bench.count)}
    for n, rate in rates.items():
        if n > 1:
            print(f"scaling: {n} GPUs give {rate / rates[1] / n:.2f} of linear", flush=True)
    return True


def large_shape(bench: Bench, **changes: object) -> dict[str, int]:
    """Changes for the 7B shape, or as many layers as fit.

    By the estimate of ``wmtp check``.
    """
    import torch

    if bench.device != "cuda":
        return shape("small")
    # a tenth is left: the estimate has not been held against several GPUs yet
    memory = int(0.9 * torch.cuda.get_device_properties(0).total_memory)
    most, settings = shape("7B")["layers"], merged(bench.fast, LARGE | changes)
    layers = most
    for layers in range(most, 1, -1):
        expected = estimate(bench.config(shape("7B", layers), bench.count, ROWS * bench.count, **settings))
        if too_large(expected, memory) is None:
            break
    if layers < most:
        print(f"# the 7B shape does not fit {bench.count} device(s): {layers} of its {most} layers are taken", flush=True)
    return shape("7B", layers)


def large(bench: Bench) -> bool:
    model = large_shape(bench)
    label = f"large ({parameters(model) / 1e9:.1f}B, {model['layers']} layers)"
    speed(bench, label, "large", model, bench.count, ROWS * bench.count, **merged(LARGE, from_files(bench, model)))
    return True


def from_files(bench: Bench, model: dict[str, int], name: str = "base") -> dict[str, object]:
    """Changes that read the model from a folder of random weights."""
    heads: dict[str, object] = {"heads": {"horizon": 4, "init": "random"}} if name == "base" else {}
    return {"models": {name: {"type": "hf", "uri": str(model_folder(bench.folder, model)), **heads}}}


def checkpoint(bench: Bench) -> bool:
    """Resume on half of the GPUs, against ten steps in one go.

    The checkpoint is written on all GPUs after 5 steps.
    """
    half = max(1, bench.count // 2)
    changes = {"devices": {"precision": "fp32"}, "checkpoints": {"save_interval": 5, "keep_last": 0, "save_final": True}}
    config = bench.config(shape("small"), bench.count, 8, **changes)
    whole, one = bench.run("checkpoint-whole", config)
    _, parts = bench.run("checkpoint-parts", config)
    shutil.rmtree(parts / "checkpoints/step-10")
    shutil.rmtree(parts / "model")
    resumed, _ = bench.run("checkpoint-parts", merged(config, {"launcher": {"processes": half}}), "--resume", "auto")
    losses = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(whole, resumed, strict=True))
    apart = difference(one, parts)
    fine = losses < 1e-4 and apart < 1e-4
    print(
        f"checkpoint: saved on {bench.count}, resumed on {half} device(s): losses differ by {losses:.1e}, parameters by "
        f"{apart:.1e}: {'ok' if fine else 'NOT EQUAL'}",
        flush=True,
    )
    return fine


def algorithms(bench: Bench) -> bool:
    reference = shape("2.7B") if bench.device == "cuda" else shape("small")
    trainers: dict[str, dict[str, object]] = {
        "baseline-mtp": {"type": "baseline-mtp"},
        "rho1-wmtp": {"type": "rho1-wmtp", "mode": "weighted", "reference_precision": "bf16"},
        "critic-wmtp": {"type": "critic-wmtp", "value_steps": 10},
    }
    # rho1 takes the most memory; all train the same shape
    scratch: dict[str, object] = {"models": {"ref": {"type": "scratch", **reference}}}
    model = large_shape(bench, **scratch, trainer=trainers["rho1-wmtp"])
    for name in bench.trainers:
        changes = merged({**LARGE, "trainer": trainers[name], "train": {"max_steps": 20}}, from_files(bench, model))
        if name == "rho1-wmtp":
            changes = merged(changes, from_files(bench, reference, "ref"))
        speed(bench, f"20 steps of {name}", f"algorithm-{name}", model, bench.count, ROWS * bench.count, **changes)
    return True


PARTS = {"equal": equal, "scaling": scaling, "large": large, "checkpoint": checkpoint, "algorithms": algorithms}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--trainers", default=",".join(TRAINERS), help=f"of the part algorithms: some of {', '.join(TRAINERS)}")
    parser.add_argument("--check", action="store_true", help="the part equal alone")
    parser.add_argument("--gpus", type=int, help="use so many; default: all")
    parser.add_argument("--cpu", type=int, metavar="N", help="N processes on the CPU and small shapes, to try the script out")
    parser.add_argument("--folder", type=Path, help="where runs are written; default: a temporary folder")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the run in progress is ended
    import torch

    found = torch.cuda.device_count()
    if not arguments.cpu and not found:
        print("error: torch sees no GPU; --cpu 2 tries the script out", file=sys.stderr)
        return 2
    count = arguments.cpu or arguments.gpus or found
    print(
        f"# {count} × {'CPU process' if arguments.cpu else torch.cuda.get_device_name(0)}, torch {torch.__version__}",
        flush=True,
    )
    good = True
    with tempfile.TemporaryDirectory(prefix="wmtp-bench-") as temporary:
        bench = Bench(
            arguments.folder or Path(temporary), "cpu" if arguments.cpu else "cuda", count, arguments.trainers.split(",")
        )
        bench.folder.mkdir(parents=True, exist_ok=True)
        for part in ["equal"] if arguments.check else arguments.parts.split(","):
            try:
                good &= PARTS[part](bench)
            except RuntimeError as error:
                print(f"{part}: FAILED: {error}", flush=True)
                good = False
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""WMTP's rows of ``bench/step.py``: the real loop, on data in memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from kernels import Kernels
from step_shape import Shape
from torch import Tensor
from transformers import LlamaForCausalLM

from wmtp.config.load import load_config
from wmtp.config.schema import (
    CheckpointConfig,
    DevicesConfig,
    Fp8Config,
    HeadsConfig,
    ReportConfig,
    ScheduleConfig,
    TrainConfig,
)
from wmtp.data.batch import Batch, Document
from wmtp.devices import autocast_context, prefer_fast_attention
from wmtp.models.acceleration import accelerate
from wmtp.models.base import LoadedModel
from wmtp.models.build import build_model
from wmtp.models.config import ScratchModel
from wmtp.models.fp8 import fp8_logits, multiply_in_fp8
from wmtp.models.low_rank_graph import join_weights
from wmtp.models.mtp import MTPModel
from wmtp.models.outline import outline
from wmtp.optim.config import AdamW
from wmtp.optim.master_weights import MasterWeights
from wmtp.tracking import Tracker
from wmtp.trainers import StepView, Trainer, TrainerSetup
from wmtp.training import loop
from wmtp.training.interrupt import Interrupt
from wmtp.training.loop import Fit
from wmtp.training.memory import MemoryEstimate, estimate_memory
from wmtp.training.recorded import record_passes
from wmtp.training.stages import StageBatches, StagePlan
from wmtp.training.step import StepLoss
from wmtp.training.telemetry import Recorder

_NO_TOKENIZER: Any = None
#: of the steps of the last row
LOSSES: list[float] = []
#: milliseconds of the last row's profiled steps, by kernel
KERNELS: dict[str, float] = {}
#: for each step, the lengths of each row's documents: the row ``ours-layout``
LAYOUTS: list[list[list[int]]] = []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _DataWeights(Trainer):
    """Weights that are known before the step."""

    def token_weights(self, view: StepView) -> Tensor:
        assert view.batch.weight is not None
        return view.batch.weight


class _Rows:
    """Rows of `Shape.rows` as a run's batches."""

    fingerprint = "bench"
    steps_per_epoch = 10**6

    def __init__(self, shape: Shape, layouts: list[list[list[int]]]) -> None:
        self._made = [_batch(shape, step, layout) for step, layout in enumerate(layouts)]

    def batch(self, step: int) -> Batch:
        return self._made[step % len(self._made)]

    def locate(self, step: int) -> tuple[int, int]:
        return 0, step


def _batch(shape: Shape, step: int, layout: list[list[int]]) -> Batch:
    """Make a step's batch; `layout` has the lengths of each row's documents."""
    ids, weights = shape.rows(step)
    lengths = torch.tensor([length for row in layout for length in row])
    number = torch.arange(len(lengths)).repeat_interleave(lengths)
    starts = lengths.cumsum(0) - lengths
    return Batch(
        input_ids=ids,
        document=number.view_as(ids),
        position=(torch.arange(ids.numel()) - starts[number]).view_as(ids),
        loss_mask=torch.ones_like(ids, dtype=torch.bool),
        weight=weights,
        documents=[Document(index=i, start=0, id=str(i), group=str(i), is_correct=i % 2 == 0) for i in range(len(lengths))],
    )


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have signals end the process inside.

    A run would write a checkpoint first, which is nothing to wait for here.
    """
    real = loop.catch_signals
    loop.catch_signals = lambda: nullcontext(Interrupt())
    try:
        yield
    finally:
        loop.catch_signals = real


class _Clock:
    """Tracker that keeps the time at which each step's numbers arrive."""

    def __init__(self, kernels: Kernels | None) -> None:
        self.kernels = kernels
        self.times: dict[int, float] = {}
        self.losses: dict[int, float] = {}

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.times[step] = time.perf_counter()
        self.losses[step] = numbers["loss"]
        if self.kernels is not None:
            self.kernels.end_of(step)


def _model(shape: Shape, horizon: int) -> MTPModel:
    with DEVICE:
        base = LlamaForCausalLM(shape.config()).eval()
    return build_model(LoadedModel(model=base), HeadsConfig(horizon=horizon), 0)


def estimated_gib(row: str, shape: Shape) -> float | None:
    """Memory of a row by ``wmtp check``, beside the measured peak.

    None for the peers.
    """
    return estimate(shape, _SETTINGS[row]).total / 2**30 if row in _SETTINGS else None


def estimate(shape: Shape, devices: Mapping[str, Any]) -> MemoryEstimate:
    """Estimate the memory of a run as ``wmtp check`` does.

    With these changes of ``[devices]``.
    """
    config = load_config(
        {
            "models": {"base": {"type": "scratch", "vocab_size": shape.vocab}},
            "tokenizer": {"type": "bytes"},
            "datasets": {"code": {"type": "python-source"}},
            "data": {"train": {"max_length": shape.length, "batch_size": shape.batch}},
            "trainer": {"type": "baseline-mtp"},
            "devices": {"precision": "bf16-params", "compile": True} | dict(devices),
        }
    )
    model = ScratchModel(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        layers=shape.layers,
        attention_heads=shape.attention_heads,
        kv_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        max_positions=max(shape.length, 2048),
    )
    info = outline(model)
    assert info is not None
    return estimate_memory(config, info, HeadsConfig(horizon=shape.horizon))


#: what the rows without other models have in ``[devices]``
_SETTINGS: dict[str, dict[str, str]] = {
    "ours": {},
    "ours-selective": {"activation_checkpointing": "selective"},
    "ours-full": {"activation_checkpointing": "full"},
    "ours-offload": {"activation_checkpointing": "offload"},
    "ours-autocast": {"precision": "bf16"},
    "ours-packed": {},
    "ours-layout": {},
    "ours-accuracy": {},
}


def run(
    shape: Shape,
    warmup: int,
    steps: int,
    *,
    make: Callable[[Shape, int], MTPModel] = _model,
    trainer: Trainer | None = None,
    precision: str = "bf16-params",
    checkpointing: Literal["none", "full", "selective", "offload"] = "none",
    layouts: list[list[list[int]]] | None = None,
    compiled: bool = True,
    accuracy_interval: int = 0,
    known: Any = None,
    fp8: Fp8Config | None = None,
    profiled: int = 0,
    optimize: AdamW | None = None,
    cuda_graphs: bool = False,
) -> float:
    with prefer_fast_attention(DEVICE):
        model = make(shape, shape.horizon)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # what made the model does not count
        devices = DevicesConfig(
            precision="bf16-params" if fp8 is None else "fp8",
            fp8=fp8,
            activation_checkpointing=checkpointing,
            compile=compiled,
            cuda_graphs=cuda_graphs,
        )
        multiply_in_fp8(model, devices)
        fixed = {id(parameter) for parameter in model.fixed_parameters()}
        masters = MasterWeights(model, fixed=model.fixed_parameters()) if precision == "bf16-params" else None
        accelerate(model, devices)
        join_weights(model, devices)
        trainer = trainer or _DataWeights()

        def reference(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> MTPModel:
            other = _model(shape, 1).to(dtype).requires_grad_(False)
            accelerate(other, DevicesConfig(compile=True), learns=False)
            return other

        trainer.setup(
            TrainerSetup(
                hidden_size=shape.hidden,
                vocab_size=shape.vocab,
                horizon=shape.horizon,
                device=DEVICE,
                seed=0,
                tokenizer=_NO_TOKENIZER,
                model=reference,
                token_numbers=lambda *_: known,
            )
        )
        modules = {name: module.to(DEVICE) for name, module in trainer.modules().items()}
        parameters = [parameter for parameter in model.parameters() if id(parameter) not in fixed]
        if masters is not None:
            parameters = masters.replace(parameters)
        parameters += [parameter for module in modules.values() for parameter in module.parameters()]
        optimizer = (optimize or AdamW(lr=1e-5)).build([(str(i), parameter) for i, parameter in enumerate(parameters)])
        if masters is not None:
            optimizer = masters.take_over(optimizer)
        clock = _Clock(Kernels(warmup + steps + 1, profiled) if profiled else None)
        rows: Any = _Rows(shape, layouts or 2 * [shape.batch * [[shape.length]]])  # no data set stands behind it
        with tempfile.TemporaryDirectory() as folder:
            total = warmup + steps + 1 + profiled
            plan = StagePlan.make(trainer.stages(), warmup_steps=0, total_steps=total, trainer_name="bench")
            fit = Fit(
                step_loss=StepLoss(
                    model=model,
                    trainer=trainer,
                    trainer_name="bench",
                    micro_batch_size=shape.batch,
                    normalizer="sum_w",
                    device=DEVICE,
                    autocast=autocast_context("bf16", DEVICE),
                    seed=0,
                    master_weights=masters,
                    fp8_logits=fp8_logits(devices),
                    recorded=record_passes(model, devices, masters),
                ),
                modules=modules,
                batches=StageBatches(plan, [rows] * len(plan.stages)),
                eval_batches=(),
                optimizer=optimizer,
                schedule=ScheduleConfig(type="constant"),
                train=TrainConfig(accuracy_interval=accuracy_interval),
                checkpoints=CheckpointConfig(save_final=False),
                checkpoint_dir=Path(folder) / "checkpoints",
                metrics_path=Path(folder) / "metrics.jsonl",
                recorder=Recorder(
                    ReportConfig(weight_interval=0, samples=0), _NO_TOKENIZER, total_steps=total, followed=rows.batch(0)
                ),
                tracker=cast(Tracker, clock),
                total_steps=total,
            )
            with _ended_by_signals():
                fit.run()
    LOSSES[:] = clock.losses.values()
    KERNELS.clear()
    KERNELS.update({} if clock.kernels is None else clock.kernels.milliseconds)
    return (clock.times[warmup + steps] - clock.times[warmup]) / steps


def baseline(shape: Shape, warmup: int, steps: int) -> float:
    """Weights known before the step."""
    return run(shape, warmup, steps)


def selective(shape: Shape, warmup: int, steps: int) -> float:
    """With selective activation checkpointing."""
    return run(shape, warmup, steps, checkpointing="selective")


def full(shape: Shape, warmup: int, steps: int) -> float:
    """With full activation checkpointing."""
    return run(shape, warmup, steps, checkpointing="full")


def offload(shape: Shape, warmup: int, steps: int) -> float:
    """With full activation checkpointing, and the layers' inputs on the host."""
    return run(shape, warmup, steps, checkpointing="offload")


def autocast(shape: Shape, warmup: int, steps: int) -> float:
    """fp32 parameters under autocast."""
    return run(shape, warmup, steps, precision="bf16")


def packed(shape: Shape, warmup: int, steps: int) -> float:
    """Four documents a row, kept apart."""
    return run(shape, warmup, steps, layouts=2 * [shape.batch * [4 * [shape.length // 4]]])


def laid_out(shape: Shape, warmup: int, steps: int) -> float:
    """Documents of `LAYOUTS`, kept apart."""
    return run(shape, warmup, steps, layouts=LAYOUTS)


def eager(shape: Shape, warmup: int, steps: int) -> float:
    """Without compilation."""
    return run(shape, warmup, steps, compiled=False)


def accuracy(shape: Shape, warmup: int, steps: int) -> float:
    """With token accuracies in every step."""
    return run(shape, warmup, steps, accuracy_interval=1)


class _Known:
    """Reference losses of all tokens, as `wmtp.data.score_cache.token_numbers.TokenNumbers` has them."""

    complete = True

    def __init__(self, shape: Shape) -> None:
        self._losses = 5 + torch.rand(shape.batch, shape.length)

    def get(self, batch: Batch, _: object) -> Tensor:
        return self._losses.to(batch.input_ids.device, non_blocking=True)


def rho1_cached(shape: Shape, warmup: int, steps: int) -> float:
    """rho1, token-skip, reference losses from the cache."""
    from wmtp_algos import Rho1WMTP

    trainer = Rho1WMTP(mode="token-skip", reference_cache=True).build()
    return run(shape, warmup, steps, trainer=trainer, known=_Known(shape))


def rho1_online(shape: Shape, warmup: int, steps: int) -> float:
    """rho1, token-skip, with a reference of the same size."""
    from wmtp_algos import Rho1WMTP

    return run(shape, warmup, steps, trainer=Rho1WMTP(mode="token-skip", reference_precision="bf16").build())


def critic(shape: Shape, warmup: int, steps: int) -> float:
    """Critic's second stage, in which the value head goes on learning."""
    from wmtp_algos.critic_config import CriticWMTP

    trainer = CriticWMTP(value_steps=1, value_learns=True, train_on="all").build()
    return run(shape, warmup, steps, trainer=trainer)

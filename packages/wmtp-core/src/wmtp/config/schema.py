"""Sections of a WMTP config.

Every class is a table in TOML, every field a key.

A section with a ``type`` belongs to a plugin's config class (`wmtp.plugins.hookspecs`); the rest are the plain tables below. No
torch types: a config is checked on machines that have no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from attrs import Factory, field, frozen
from attrs.validators import ge, gt, le, lt, min_len, optional

from wmtp.config.data_schema import DataConfig, EvalDataConfig, TrainDataConfig
from wmtp.config.model_schema import HeadsConfig, LoraConfig, ModelConfig
from wmtp.plugins.components import component
from wmtp.plugins.contract import (
    DataLoaderConfig,
    EvaluatorConfig,
    LauncherConfig,
    OptimizerConfig,
    StorageBackendConfig,
    TokenizerConfig,
    TrackerConfig,
    TrainerConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DevicesConfig",
    "EarlyStoppingConfig",
    "EvalDataConfig",
    "FsdpConfig",
    "HeadsConfig",
    "LoraConfig",
    "ModelConfig",
    "ReportConfig",
    "RunConfig",
    "ScheduleConfig",
    "StorageConfig",
    "TrainConfig",
    "TrainDataConfig",
]


@frozen(kw_only=True)
class RunConfig:
    """Identity of this run.

    Args:
        name: the run directory is ``output_dir/name``, and must be new unless the run is resumed. Without a name it is
            the trainer's and the date.
        tags: free words, sent to the tracker.
        seed: of all randomness: new weights, shuffling, splits.
        output_dir: where run directories are made.
        push_to: a URI, as ``hf://ORG/NAME``, to which the model is copied at the end, with a model card. What is there is
            replaced. Default: nowhere.
    """

    name: str | None = None
    tags: tuple[str, ...] = ()
    seed: int = field(default=0, validator=[ge(0), lt(2**32)])
    output_dir: str = "runs"
    push_to: str | None = None


@frozen(kw_only=True)
class ScheduleConfig:
    """Learning rate over the optimizer steps, as a factor of ``optimizer.lr``.

    Args:
        type: ``constant``, or ``linear`` or ``cosine`` decay to ``min_ratio`` at the end of the run.
        warmup_steps: optimizer steps of linear rise at the start.
        warmup_ratio: instead of ``warmup_steps``: a share of all steps.
        min_ratio: where the decay ends.
    """

    type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int | None = field(default=None, validator=optional(ge(0)))
    warmup_ratio: float | None = field(default=None, validator=optional([ge(0.0), lt(1.0)]))
    min_ratio: float = field(default=0.0, validator=[ge(0.0), le(1.0)])


@frozen(kw_only=True)
class EarlyStoppingConfig:
    """Early stop when a metric no longer improves.

    Args:
        metric: a logged metric, for instance ``eval/loss/head_1``. A training metric is read in every step, also in those that
            ``train.log_interval`` leaves out.
        patience: number of measurements in a row without progress that end the run.
        mode: whether lower (``min``) or higher (``max``) is better.
        min_delta: progress is a change of more than this.
    """

    metric: str = "eval/loss"
    patience: int = field(default=3, validator=ge(1))
    mode: Literal["min", "max"] = "min"
    min_delta: float = field(default=0.0, validator=[ge(0.0), lt(math.inf)])


@frozen(kw_only=True)
class TrainConfig:
    """Length of training, and the making of a step.

    Args:
        max_steps: optimizer steps. Default: as many as ``epochs`` gives.
        epochs: passes over the training data. With ``max_steps`` too, the earlier end counts. Default 1 where neither is given.
        normalizer: Z, the divisor of the weighted sum of losses: ``sum_w`` Σ α w m, ``valid`` Σ α m, both over the whole
            optimizer step; ``per_position`` only reproduces older code, and cancels every per-token weight.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        log_interval: optimizer steps between two logged steps.
        accuracy_interval: optimizer steps between two measurements of every head's token accuracy and of head 1's entropy, from
            the step's own hidden states; 0 measures none. One costs the logits of all heads once more.
        eval_interval: optimizer steps between two evaluations. Default: only at the end.
        eval_start: true measures the evaluation data before the first step too, as step 0, and keeps a
            sample text of the untrained model for the page: what training has changed.
        early_stopping: stop before the last step, by a metric.
    """

    max_steps: int | None = field(default=None, validator=optional(ge(1)))
    epochs: float | None = field(default=None, validator=optional([gt(0.0), le(1e9)]))
    normalizer: Literal["sum_w", "valid", "per_position"] = "sum_w"
    max_grad_norm: float = field(default=1.0, validator=ge(0.0))
    log_interval: int = field(default=1, validator=ge(1))
    accuracy_interval: int = field(default=20, validator=ge(0))
    eval_interval: int | None = field(default=None, validator=optional(ge(1)))
    eval_start: bool = False
    early_stopping: EarlyStoppingConfig | None = None


@frozen(kw_only=True)
class FsdpConfig:
    """Distribution of one model over several processes (FSDP2).

    Parameters, gradients and optimizer state are sharded among them. Used with several processes; with one only where this
    table is written.

    Args:
        strategy: ``full`` gathers each layer when it computes and frees it again; ``grad-op`` keeps the gathered layers
            from the forward to the backward pass: more memory, less communication; ``hybrid`` shards as ``full`` within each
            machine and replicates between machines, so that only gradients cross the network, once a step; ``none`` keeps
            everything on every device, and adds up gradients: for models that are small for their device.
        reduce_every_micro_batch: true reduces gradients after each micro-batch (under ``hybrid`` within the machine), so that a
            device holds only its shard of them; false once a step: less communication, but each device holds all gradients
            meanwhile.
    """

    strategy: Literal["full", "grad-op", "hybrid", "none"] = "full"
    reduce_every_micro_batch: bool = False


@frozen(kw_only=True)
class Fp8Config:
    """Matrix products in fp8, for ``devices.precision = "fp8"``.

    The linear maps in the decoder layers and in the extra heads multiply in fp8, forward and backward. All else stays in bf16:
    attention, norms, embeddings, unembeddings, the loss, and the experts and routers of a mixture. Under adapters, weights of
    the base are rounded once and kept in fp8, unless processes hold a part of the model each.

    Args:
        recipe: which numbers share a scale, measured anew for every product. ``tensorwise``: all of a tensor, the fastest;
            ``rowwise``: those of a row, by torchao (``pip install 'wmtp-core[fp8]'``); ``rowwise-gw-hp``: the same, and the
            gradients of weights are computed in bf16.
        fast_accumulation: which products add up in the tensor cores' own precision, with about 14 bits, which is faster:
            those of the ``forward`` pass, ``all``, or ``none``. Default: ``all`` for ``tensorwise``, else ``forward``.
        first_layers: decoder layers at the beginning that stay in bf16.
        last_layers: decoder layers at the end that stay in bf16.
        min_features: maps with fewer input or output features stay in bf16: they gain nothing.
        exclude: maps that stay in bf16, by patterns of their names: ``["*.k_proj", "extra_heads.*"]``. One that names none is
            refused.
        logits: products of the unembedding in fp8 while training, whatever the recipe with one scale for a tensor. ``none``;
            ``forward``: the logits; ``hidden-gradient``: also the gradient of the hidden states. That of the unembedding stays
            in bf16. Faster with large vocabularies, and less exact: on SmolLM2-135M it cost 0.06 to 0.08 nats.
        emulate: rounds to fp8 and multiplies in fp32: the numbers of fp8, slowly, on any device.
    """

    recipe: Literal["tensorwise", "rowwise", "rowwise-gw-hp"] = "tensorwise"
    fast_accumulation: Literal["none", "forward", "all"] | None = None
    first_layers: int = field(default=0, validator=ge(0))
    last_layers: int = field(default=0, validator=ge(0))
    min_features: int = field(default=256, validator=ge(16))
    exclude: tuple[str, ...] = ()
    logits: Literal["none", "forward", "hidden-gradient"] = "none"
    emulate: bool = False

    @property
    def accumulates_fast(self) -> Literal["none", "forward", "all"]:
        """Resolved ``fast_accumulation``."""
        return self.fast_accumulation or ("all" if self.recipe == "tensorwise" else "forward")


@frozen(kw_only=True)
class DevicesConfig:
    """Device, precision and memory options of the computation.

    Args:
        device: ``auto`` takes cuda, then mps, then cpu.
        precision: ``fp32``; ``bf16`` keeps parameters and optimizer in fp32 and computes in bf16 (autocast);
            ``bf16-params`` keeps the model in bf16, and fp32 copies of its parameters for the optimizer: faster, with less
            memory for activations. Checkpoints hold the fp32 copies, ``model/`` the bf16 parameters. Where a device cannot
            do bf16, fp32 is used and one line says so. ``fp8`` is ``bf16-params`` with the layers' products in fp8: for
            NVIDIA GPUs from Hopper on.
        fp8: options of ``precision = "fp8"``.
        activation_checkpointing: activations that a layer keeps for its backward pass. ``none``: all; ``selective``: the
            results of matrix products and of attention, the rest is recomputed; ``full``: its input alone; ``offload``: as
            ``full``, and that input in the host's memory, for long rows on a GPU. Less memory for more time, the same
            gradients.
        attention: ``auto``: on GPUs, packed rows use flex attention, which skips masked blocks, for plainly causal models;
            ``transformers``: always the model's own (see ``models.base.attn_implementation``).
        compile: whether layers are compiled (torch.compile), once for all: the first steps take a minute more, the others less
            time and memory.
        cuda_graphs: whether both passes of a model with adapters are recorded as CUDA graphs, once for each shape of rows, and
            replayed: for GPUs that wait for Python. Needs ``compile`` and one process.
        memory_gib: memory of each device, for the estimate of ``wmtp check``, which warns where a run is likely to run out
            of memory. Default: ``wmtp run FILE --dry-run`` asks the device itself.
        threads: CPU threads of a process. Default: all cores, shared among the processes of a machine; two while a GPU trains.
        fsdp: sharding over several processes. Default, with several: FSDP with its defaults.
        timeout: seconds without progress of one process after which all end.
    """

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["fp32", "bf16", "bf16-params", "fp8"] = "fp32"
    fp8: Fp8Config | None = None
    activation_checkpointing: Literal["none", "full", "selective", "offload"] = "none"
    attention: Literal["auto", "transformers"] = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    memory_gib: float | None = field(default=None, validator=optional([gt(0.0), le(100_000.0)]))
    threads: int | None = field(default=None, validator=optional([ge(1), le(4096)]))
    fsdp: FsdpConfig | None = None
    timeout: float = field(default=600.0, validator=[gt(0.0), le(1e9)])

    @property
    def keeps_bf16(self) -> bool:
        """True for bf16 parameters, with fp32 copies for the optimizer."""
        return self.precision in ("bf16-params", "fp8")


@frozen(kw_only=True)
class CheckpointConfig:
    """Checkpoints kept for a resume.

    Args:
        uri: where checkpoints are written. Default: ``checkpoints`` in the run directory. To an object store (``s3://…``)
            they are uploaded while training continues, ``model/`` too at the end; ``--resume auto`` finds them there.
        save_interval: optimizer steps between two checkpoints. Default: only at the end and on a signal.
        keep_last: how many checkpoints are kept; 0 keeps all.
        save_final: whether a checkpoint is written at the end too, besides ``model/``.
        best: a metric of ``[data.eval]``, as ``eval/loss``: the checkpoint of the best step is kept besides ``keep_last``.
            Default: that of early stopping, where there is one. Where a run stops early, ``model/`` is the best.
        best_mode: whether lower (``min``) or higher (``max``) is better.
    """

    uri: str | None = None
    save_interval: int | None = field(default=None, validator=optional(ge(1)))
    keep_last: int = field(default=2, validator=ge(0))
    save_final: bool = True
    best: str | None = None
    best_mode: Literal["min", "max"] = "min"


@frozen(kw_only=True)
class ReportConfig:
    """Records for ``wmtp report`` besides the metrics.

    Args:
        weight_interval: optimizer steps between two records of the distribution of weights; 0 records none. Default: about 200
            records in a run.
        samples: number of documents whose tokens are recorded, with weight and loss of each; 0 records none.
        sample_interval: optimizer steps between two such records. Default: about 16 records in a run.
        sample_tokens: number of a document's first tokens that are recorded at most.
    """

    weight_interval: int | None = field(default=None, validator=optional(ge(0)))
    samples: int = field(default=4, validator=ge(0))
    sample_interval: int | None = field(default=None, validator=optional(ge(1)))
    sample_tokens: int = field(default=256, validator=ge(2))


@frozen(kw_only=True)
class StorageConfig:
    """Cache of remote files, and options of the storage backends.

    Args:
        cache_dir: default ``~/.cache/wmtp``.
        backends: their options. In TOML each backend has its own table, ``[storage.s3]`` for ``s3``; backends without one use
            their defaults.
    """

    cache_dir: str = "~/.cache/wmtp"
    backends: tuple[StorageBackendConfig, ...] = component("storages", default=())

    def __attrs_post_init__(self) -> None:
        types = [backend.type for backend in self.backends]
        if twice := sorted({name for name in types if types.count(name) > 1}):
            raise ValueError(f"two configs of one storage backend: {', '.join(twice)}")


@frozen(kw_only=True)
class Config:
    """A whole run.

    ``wmtp.run(Config(...))`` does what ``wmtp run`` does with the TOML of the same content.

    Args:
        run: name, seed, place.
        models: ``base`` is trained; others (``ref``, ``rm``, ``critic``) where the trainer needs them.
        tokenizer: default: that of the base model.
        datasets: the data sources by name.
        data: which of them are learned from, and how rows are made.
        trainer: the algorithm.
        optimizer: default AdamW.
        schedule: the learning rate over time.
        train: length, normalizer, clipping, intervals.
        devices: device and precision.
        checkpoints: what is kept.
        report: what is recorded for ``wmtp report``.
        tracker: default MLflow in a local SQLite file.
        launcher: default this machine.
        storage: the cache of remote files.
        eval: measurements at the end of the run.
    """

    run: RunConfig = Factory(RunConfig)
    models: Mapping[str, ModelConfig] = field(validator=min_len(1))
    tokenizer: TokenizerConfig | None = component("tokenizers", default=None, default_type="own")
    datasets: Mapping[str, DataLoaderConfig] = component("data_loaders", validator=min_len(1))
    data: DataConfig = Factory(DataConfig)
    trainer: TrainerConfig = component("trainers")
    optimizer: OptimizerConfig = component("optimizers", default_type="adamw")
    schedule: ScheduleConfig = Factory(ScheduleConfig)
    train: TrainConfig = Factory(TrainConfig)
    devices: DevicesConfig = Factory(DevicesConfig)
    checkpoints: CheckpointConfig = Factory(CheckpointConfig)
    report: ReportConfig = Factory(ReportConfig)
    tracker: TrackerConfig = component("trackers", default_type="mlflow")
    launcher: LauncherConfig = component("launchers", default_type="local")
    storage: StorageConfig = Factory(StorageConfig)
    eval: tuple[EvaluatorConfig, ...] = component("evaluators", default=())

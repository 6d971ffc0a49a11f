"""Sections of a WMTP config: every class is a table in TOML, every field a key.

A section with a ``type`` belongs to a plugin's config class (`wmtp.plugins.hookspecs`); the rest are the plain tables below. No
torch types: a config is checked on machines that have no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from attrs import Attribute, Factory, field, frozen
from attrs.validators import deep_iterable, ge, gt, le, lt, min_len, optional

from wmtp.plugins.components import component
from wmtp.plugins.contract import (
    DataLoaderConfig,
    EvaluatorConfig,
    LauncherConfig,
    ModelLoaderConfig,
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
        push_to: a URI, as ``hf://ORG/NAME``, to which the model is copied at the end, with a model card. Default: nowhere.
    """

    name: str | None = None
    tags: tuple[str, ...] = ()
    seed: int = field(default=0, validator=[ge(0), lt(2**32)])
    output_dir: str = "runs"
    push_to: str | None = None


@frozen(kw_only=True)
class HeadsConfig:
    """Heads that predict the next ``horizon`` tokens. Head 1 is the model's own.

    Args:
        horizon: H, how many tokens ahead are predicted.
        kind: architecture of heads 2..H. ``block``: a decoder layer each on the trunk (Meta, arXiv 2404.19737); ``linear``: an
            unembedding each; ``residual``: a residual SiLU layer each before the shared unembedding (Medusa, arXiv
            2401.10774); ``chained``: a decoder layer each, fed by the previous depth and the embedding of the token that
            it predicted (DeepSeek-V3, arXiv 2412.19437); ``shared``: one such layer applied again and again (FastMTP,
            arXiv 2509.18362); ``native``: the model's own layers for multi-token prediction, in turn where ``horizon`` asks
            for more. A model that brings heads of WMTP's keeps them, and must agree with this. Default: what the model
            brings, else ``native`` where it has such layers, else ``block``.
        layout: how ``chained`` and ``shared`` heads are fed. ``mimo``: as servers feed MiMo-7B's layer, so that they can be
            exported to one: the hidden states before the model's final norm, a norm of their own at the end, no embedding at
            position 0. ``plain``: the hidden states after the final norm, that same norm at the end, every embedding.
        init: initial weights of new heads. ``copy``: from the model's last layer (``linear``: from its unembedding;
            ``residual``: as the identity); ``random``: from the model's own initialiser.
        trunk_gradient: ``joint``: all heads train the trunk; ``detach``: only head 1 does.
        head_weights: α, one a head. Default 1 each.
        decay: instead of ``head_weights``: α_k = decay^(k−1).
        objective: what heads 2..H learn: ``ce``, the data, as head 1 does; ``kl``, ``tv`` or ``lk``, to agree with head 1's
            distribution of the same token, by which their drafts are accepted: docs/loss.md has the formulas. Weights, α and
            normaliser hold in the same way.
        lk_eta: η of ``lk``.
        draft_vocabulary: number of tokens that heads 2..H draft from in decoding: the most frequent of the training data, and
            those that end a text (FastMTP, arXiv 2509.18362). A smaller product for each draft, and the same text. Training and
            its metrics are of the whole vocabulary. Default: all, or what the model brings.
        warmup_steps: number of optimizer steps at the start in which only heads 2..H are trained, on a frozen model.
        lr_factor: multiplies ``optimizer.lr`` for heads 2..H; new heads tolerate a higher rate than a pretrained model.
    """

    horizon: int = field(default=4, validator=ge(1))
    kind: Literal["block", "linear", "residual", "chained", "shared", "native"] | None = None
    layout: Literal["mimo", "plain"] = "mimo"
    init: Literal["copy", "random"] = "copy"
    trunk_gradient: Literal["joint", "detach"] = "joint"
    head_weights: tuple[float, ...] | None = field(default=None, validator=optional(deep_iterable(ge(0.0))))
    decay: float | None = field(default=None, validator=optional([gt(0.0), le(1.0)]))
    objective: Literal["ce", "kl", "tv", "lk"] = "ce"
    lk_eta: float = field(default=3.0, validator=ge(0.0))
    draft_vocabulary: int | None = field(default=None, validator=optional(ge(1)))
    warmup_steps: int = field(default=0, validator=ge(0))
    lr_factor: float = field(default=1.0, validator=gt(0.0))

    @property
    def known_kind(self) -> str:
        """Kind of the heads of a model that brings none."""
        return self.kind or "block"

    def resolved_head_weights(self) -> tuple[float, ...]:
        """α of heads 1..H."""
        if self.head_weights is not None:
            return self.head_weights
        return tuple((self.decay or 1.0) ** k for k in range(self.horizon))


def _no_dropout(_: object, __: Attribute[float], value: float) -> None:
    if value:
        raise ValueError(
            f"{value}, but adapters learn without dropout: weights and loss of a step come from the same "
            "forward pass, and a resumed or divided run repeats it; remove this key"
        )


@frozen(kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) in the model's layers, trained instead of the frozen model.

    What is saved is an adapter folder, which PEFT opens too, with heads 2..H.

    Args:
        rank: r, of the two matrices of an adapter.
        alpha: an adapter's output is multiplied by alpha / rank. Default: twice the rank.
        targets: ``all-linear``: every linear map of the decoder layers; or their names, as ``["q_proj", "v_proj"]``.
        dropout: of an adapter's input: 0, nothing else. Known so that a copied recipe is told.
        dora: learn the length of each weight vector apart from its direction (DoRA, arXiv 2402.09353).
        rslora: multiply by alpha / √rank (rsLoRA, arXiv 2312.03732).
        heads: ``full``: heads 2..H learn all of their weights. ``adapters``: they learn by adapters of their own, of the same
            settings, in their decoder layers; for heads that begin as copies of the last layer (``block``) or are the model's
            own (``native``), and take little memory.
    """

    rank: int = field(default=16, validator=ge(1))
    alpha: float | None = field(default=None, validator=optional([gt(0.0), lt(math.inf)]))
    targets: Literal["all-linear"] | tuple[str, ...] = field(default="all-linear", validator=min_len(1))
    dropout: float = field(default=0.0, validator=_no_dropout)
    dora: bool = False
    rslora: bool = False
    heads: Literal["full", "adapters"] = "full"

    @property
    def resolved_alpha(self) -> float:
        """Alpha, or its default."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@frozen(kw_only=True)
class ModelConfig:
    """One model: ``type`` and the keys of its loader, and for ``[models.base]`` heads and adapters.

    Args:
        loader: where the model comes from. In TOML its keys are in the model's own table.
        heads: the multi-token-prediction heads; only ``base`` has them.
        lora: low-rank adapters; only ``base`` has them. Default: the whole model learns.
        quantize: ``nf4`` keeps the weights of the decoder layers in 4 bits (QLoRA, arXiv 2305.14314); with adapters only.
    """

    loader: ModelLoaderConfig = component("model_loaders")
    heads: HeadsConfig | None = None
    lora: LoraConfig | None = None
    quantize: Literal["nf4"] | None = None


def _positive_numbers(_: object, attribute: Attribute[Mapping[str, float]], value: Mapping[str, float]) -> None:
    for name, number in value.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{attribute.name}: {name} = {number} must be a number above 0")


@frozen(kw_only=True)
class TrainDataConfig:
    """Training data, and how it becomes batches.

    Args:
        sources: names of ``[datasets.*]`` tables. Default: all of them that ``[data.eval]`` does not name.
        mixture: in place of ``sources``: data sets by name, and what share of the tokens each gives, as
            ``{ code = 0.7, chat = 0.3 }``. A data set begins again when it has been read; an epoch has as many rows as all of
            them together.
        max_length: tokens in one row of a batch.
        batch_size: rows in one optimizer step of the whole job, over all devices.
        micro_batch_size: rows that one device computes at once. It changes memory and speed, never the result.
            Default: ``batch_size``.
        packing: true puts several documents into a row, which never see or predict each other; false gives a document a
            row, padded, and puts rows of like length together.
        learn: the tokens to learn: of conversations those of every ``assistant`` turn (the default) or of the ``last`` alone,
            of other documents the completion; ``all`` adds prompts, user turns and everything that the template writes.
        learn_prompt: older name: true is ``learn = "all"``.
        boundary: ``apart`` encodes a prompt and its completion separately, so that no token spans the two; ``together`` encodes
            the whole text, as other programs do, and trains on a token that spans them.
        chat_template: template of conversations: a Jinja template, or a file with one. Default: the model's own.
        prompt_weights: by name of a data set, a number that multiplies the weights of prompt tokens, which are then learned,
            under every trainer: ``prompt_weights = { chat = 0.1 }``.
        response_weights: by name of a data set, a number that multiplies the weights of all other learned tokens.
        overlong: treatment of a document of more than ``max_length`` tokens: ``truncate`` it, ``skip`` it, or
            ``split`` it into several.
        on_bad_example: ``error`` stops at the first line that cannot be read, ``skip`` leaves it out and reports how many.
        shuffle: a new order in each epoch, by ``run.seed``; false keeps the order of the files.
    """

    sources: tuple[str, ...] | None = None
    mixture: Mapping[str, float] | None = None
    max_length: int = field(default=1024, validator=ge(2))
    batch_size: int = field(default=8, validator=ge(1))
    micro_batch_size: int | None = field(default=None, validator=optional(ge(1)))
    packing: bool = True
    learn: Literal["assistant", "last", "all"] | None = None
    learn_prompt: bool | None = None
    boundary: Literal["apart", "together"] = "apart"
    chat_template: str | None = field(default=None, validator=optional(min_len(1)))
    prompt_weights: Mapping[str, float] = field(factory=dict, validator=_positive_numbers)
    response_weights: Mapping[str, float] = field(factory=dict, validator=_positive_numbers)
    overlong: Literal["truncate", "skip", "split"] = "truncate"
    on_bad_example: Literal["error", "skip"] = "error"
    shuffle: bool = True

    @property
    def learned(self) -> Literal["assistant", "last", "all"]:
        """Name what is learned, under either key."""
        return "all" if self.learn_prompt else self.learn or "assistant"


@frozen(kw_only=True)
class EvalDataConfig:
    """Data measured during training and never trained on. Rows are made as in ``[data.train]``.

    Args:
        sources: names of ``[datasets.*]`` tables.
        holdout: instead of ``sources``: this share of the training documents, chosen by ``run.seed``.
        batch_size: rows computed at once. Default: the micro-batch of training.
        max_batches: measure at most this many batches, of ``batch_size`` rows or else of ``data.train.batch_size``. Default:
            all.
    """

    sources: tuple[str, ...] | None = None
    holdout: float | None = field(default=None, validator=optional([gt(0.0), lt(1.0)]))
    batch_size: int | None = field(default=None, validator=optional(ge(1)))
    max_batches: int | None = field(default=None, validator=optional(ge(1)))


@frozen(kw_only=True)
class DataConfig:
    """Training and evaluation data.

    Args:
        train: the training data.
        eval: the evaluation data; none by default.
        cache_dir: where tokenised data is kept, by content. Default: ``.cache/tokens`` in ``run.output_dir``.
    """

    train: TrainDataConfig = Factory(TrainDataConfig)
    eval: EvalDataConfig | None = None
    cache_dir: str | None = None


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
    min_delta: float = field(default=0.0, validator=ge(0.0))


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
        early_stopping: stop before the last step, by a metric.
    """

    max_steps: int | None = field(default=None, validator=optional(ge(1)))
    epochs: float | None = field(default=None, validator=optional([gt(0.0), lt(math.inf)]))
    normalizer: Literal["sum_w", "valid", "per_position"] = "sum_w"
    max_grad_norm: float = field(default=1.0, validator=ge(0.0))
    log_interval: int = field(default=1, validator=ge(1))
    accuracy_interval: int = field(default=20, validator=ge(0))
    eval_interval: int | None = field(default=None, validator=optional(ge(1)))
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
class DevicesConfig:
    """Device, precision and memory options of the computation.

    Args:
        device: ``auto`` takes cuda, then mps, then cpu.
        precision: ``fp32``; ``bf16`` keeps parameters and optimizer in fp32 and computes in bf16 (autocast);
            ``bf16-params`` keeps the model in bf16, and fp32 copies of its parameters for the optimizer: faster, with less
            memory for activations. Checkpoints hold the fp32 copies, ``model/`` the bf16 parameters. Where a device cannot
            do bf16, fp32 is used and one line says so.
        activation_checkpointing: activations that a layer keeps for its backward pass. ``none``: all; ``selective``: the
            results of matrix products and of attention, the rest is recomputed; ``full``: its input alone; ``offload``: as
            ``full``, and that input in the host's memory, for long rows on a GPU. Less memory for more time, the same
            gradients.
        attention: ``auto``: on GPUs, packed rows use flex attention, which skips masked blocks, for plainly causal models;
            ``transformers``: always the model's own (see ``models.base.attn_implementation``).
        compile: whether layers are compiled (torch.compile), once for all: the first steps take a minute more, the others less
            time and memory.
        memory_gib: memory of each device, for the estimate of ``wmtp check``, which warns where a run is likely to run out
            of memory. Default: ``wmtp run FILE --dry-run`` asks the device itself.
        threads: CPU threads of a process. Default: all cores, shared among the processes of a machine; two while a GPU trains.
        fsdp: sharding over several processes. Default, with several: FSDP with its defaults.
        timeout: seconds without progress of one process after which all end.
    """

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["fp32", "bf16", "bf16-params"] = "fp32"
    activation_checkpointing: Literal["none", "full", "selective", "offload"] = "none"
    attention: Literal["auto", "transformers"] = "auto"
    compile: bool = False
    memory_gib: float | None = field(default=None, validator=optional(gt(0.0)))
    threads: int | None = field(default=None, validator=optional(ge(1)))
    fsdp: FsdpConfig | None = None
    timeout: float = field(default=600.0, validator=[gt(0.0), lt(math.inf)])


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
    """A whole run. ``wmtp.run(Config(...))`` does what ``wmtp run`` does with the TOML of the same content.

    Args:
        run: name, seed, place.
        models: ``base`` is trained; others (``ref``, ``rm``, ``critic``) where the trainer needs them.
        tokenizer: default: that of the base model.
        datasets: the data sources by name.
        data: which of them are learned from, and how rows are made.
        trainer: the algorithm.
        optimizer: default AdamW.
        schedule: the learning rate over time.
        train: length, normaliser, clipping, intervals.
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

"""Estimate of memory per device, with settings that lower it. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypedDict, Unpack

from attrs import evolve, frozen

from wmtp.config.adapter_rules import is_start_model
from wmtp.errors import WMTPError
from wmtp.optim.config import AdamW

if TYPE_CHECKING:
    from wmtp.config.schema import Config, DevicesConfig, HeadsConfig, LoraConfig
    from wmtp.models.base import ModelInfo

__all__ = [
    "MemoryEstimate",
    "adapter_parameters",
    "cheaper_settings",
    "describe_shortage",
    "estimate_memory",
    "explain_out_of_memory",
    "head_parameters",
    "kept_by_layer",
    "too_large",
]

#: what the loss takes for a chunk of logits and what is made of it
_LOSS_CHUNK = 0.75 * 2**30
#: the same where heads 2..H learn to agree with head 1: eight tensors of a chunk's size, by the code
_COMPARED_CHUNK = 1.5 * 2**30
#: what a GPU's driver and torch's libraries take, and what is lost between pieces of memory
_RESERVED = 1.5 * 2**30


class JobShape(TypedDict, total=False):
    """Keyword arguments of `estimate_memory` about the job.

    Callers that ask for several estimates hand them on.
    """

    world_size: int
    per_machine: int | None
    others: Mapping[str, ModelInfo] | None


@frozen(kw_only=True)
class MemoryEstimate:
    """Bytes on each device that trains, at the peak.

    An estimate: what layers keep depends on details of the architecture. The constants are those of Llama's layers.

    Args:
        parameters: of model and heads, with fp32 copies, and the bf16 copies that products use under autocast.
        gradients: of the same; without micro-batches they come as activations go, and are counted where they are more.
        optimizer: two running means a parameter (AdamW).
        activations: what the layers of one micro-batch keep for the backward pass.
        loss: hidden states of all heads, the unembedding's gradient, and a chunk of logits.
        other_models: the parameters of reference models and the like.
        host: activations that wait in the host's memory, for each device; no part of the total.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    other_models: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.loss + self.other_models

    def __str__(self) -> str:
        parts = {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "loss": self.loss,
            "other models": self.other_models,
        }
        text = f"about {_size(self.total)}: " + ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value)
        return f"{text}; {_size(self.host)} of activations on the host" if self.host else text


def head_parameters(info: ModelInfo, heads: HeadsConfig) -> int:
    """Count the parameters of heads 2..H, with RMS norms."""
    extra, width = heads.horizon - 1, info.hidden_size
    # norms of the two inputs, the projection, and in the layouts of servers one of the output
    link = (3 if heads.layout != "plain" else 2) * width + 2 * width * width
    return {
        "block": extra * info.layer_parameters,
        "linear": extra * info.vocab_size * width,
        "residual": extra * (width + 1) * width,
        "chained": extra * (info.layer_parameters + link),
        "shared": min(extra, 1) * (info.layer_parameters + link),
        "native": 0 if info.native is None else info.native.parameters,
    }[heads.known_kind]


def adapter_parameters(info: ModelInfo, lora: LoraConfig, layers: int | None = None) -> int:
    """Count the parameters of adapters on the layers' linear maps.

    The layers are taken to be like Llama's. Adapters on fewer maps have fewer.

    Args:
        info: of the base model.
        lora: rank and targets.
        layers: that have adapters. Default: the base's.
    """
    width, kv = info.hidden_size, info.kv_size or info.hidden_size
    ffn = _feed_forward_size(info)
    shapes = {"q_proj": 2 * width, "k_proj": width + kv, "v_proj": width + kv, "o_proj": 2 * width}
    shapes |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), width + round(ffn))
    known = [size for name, size in shapes.items() if lora.targets == "all-linear" or name in lora.targets]
    return (info.layers if layers is None else layers) * lora.rank * sum(known or shapes.values())


def _feed_forward_size(info: ModelInfo) -> float:
    if info.feed_forward_size is not None:
        return info.feed_forward_size
    # a layer's parameters are about 2.5 D² for attention and 3 D F for a gated feed-forward layer
    return max(0.0, (info.layer_parameters / info.hidden_size - 2.5 * info.hidden_size) / 3)


def estimate_memory(
    config: Config,
    info: ModelInfo,
    heads: HeadsConfig,
    *,
    world_size: int = 1,
    per_machine: int | None = None,
    others: Mapping[str, ModelInfo] | None = None,
) -> MemoryEstimate:
    """Estimate the memory that training needs on each device.

    Args:
        config: for rows, precision, checkpointing and sharding.
        info: of the base model.
        heads: the heads that it gets.
        world_size: processes of the job.
        per_machine: those of each machine, where there are several machines.
        others: further models that the trainer loads, by name.
    """
    devices, data = config.devices, config.data.train
    lora = config.models["base"].lora
    fixed, learned = 0, head_parameters(info, heads) + info.parameters
    if lora is not None:
        fixed, learned = info.parameters, head_parameters(info, heads) + adapter_parameters(info, lora)
        if lora.heads == "adapters":
            fixed, learned = (
                fixed + head_parameters(info, heads),
                adapter_parameters(info, lora, info.layers + heads.horizon - 1),
            )
    rows = -(-data.batch_size // world_size)
    micro = min(data.micro_batch_size or rows, rows)
    tokens = micro * data.max_length
    half = devices.precision != "fp32"
    compute, residual = (2 if half else 4), (2 if devices.keeps_bf16 else 4)
    width = info.hidden_size

    shared = world_size > 1 and (devices.fsdp is None or devices.fsdp.strategy != "none")
    in_few_bits, layers_of_base = 0, info.layers * info.layer_parameters
    if config.models["base"].quantize is not None:  # with a scale of 4 bytes for 64; each process has all of it
        fixed, in_few_bits = max(0, fixed - layers_of_base), round(0.5625 * layers_of_base)
    elif lora is not None and devices.precision == "fp8" and not shared:
        fixed, in_few_bits = max(0, fixed - layers_of_base), layers_of_base
    parameters = fixed + learned
    hybrid = devices.fsdp is not None and devices.fsdp.strategy == "hybrid"
    share = (per_machine or world_size if hybrid else world_size) if shared else 1
    of_fixed = 2 if devices.keeps_bf16 else 4
    copies = 0 if devices.precision == "fp32" else 2 * learned
    if shared:  # gathered from the other ranks: everything, or two layers and the largest table at a time
        some = 2 * info.layer_parameters + info.vocab_size * width
        keeps_all = devices.fsdp is not None and devices.fsdp.strategy == "grad-op"
        copies = compute * (parameters if keeps_all else min(parameters, some))

    layers = info.layers + (heads.horizon - 1 if heads.known_kind not in ("linear", "residual") else 0)
    # of what never learns no gradient reads inputs in fp8; those of adapters read them in bf16
    kind = devices if lora is None or devices.precision != "fp8" else evolve(devices, precision="bf16-params", fp8=None)
    kept, working = _kept_and_working(kind, info, compute, residual)
    # the trunk's inputs wait on the host, but for the one that is on its way
    moved = info.layers - 1 if devices.activation_checkpointing == "offload" else 0
    activations = round(tokens * ((layers - moved + min(moved, 1)) * kept + working))
    # of each head the final norm's input, its output and that one's gradient
    loss = tokens * heads.horizon * width * (residual + 2 * compute)
    if devices.cuda_graphs:  # the outputs of one graph, with the trunk's, and their gradients for the other
        loss += 2 * tokens * (heads.horizon + 1) * width * compute
    loss += (4 + compute) * info.vocab_size * width + min(_LOSS_CHUNK, 6 * tokens * info.vocab_size)
    if devices.precision == "fp8" and devices.fp8 is not None and devices.fp8.logits != "none":
        loss += info.vocab_size * width
        if devices.fp8.logits == "hidden-gradient":  # by columns too, and a chunk of slopes
            loss += info.vocab_size * width + min(_LOSS_CHUNK / 3, tokens * info.vocab_size)
    if heads.objective != "ce" and heads.horizon > 1:
        loss += min(_COMPARED_CHUNK, 32 * tokens * info.vocab_size)
    gradients = 4 * learned // share
    if micro == rows:
        whole = world_size == 1 and (devices.fsdp is None or devices.fsdp.strategy == "none")
        if whole and devices.device != "cpu" and devices.keeps_bf16 and type(config.optimizer) is AdamW:
            gradients //= 2  # they stay as they came
        gradients = max(0, gradients - activations)
    return MemoryEstimate(
        parameters=(of_fixed * fixed + 4 * learned) // share + in_few_bits + copies,
        gradients=gradients,
        optimizer=config.optimizer.state_bytes * learned // share,
        activations=activations,
        loss=round(loss),
        other_models=_other_models(config, others or {}),
        host=round(tokens * moved * kept),
    )


def kept_by_layer(devices: DevicesConfig, info: ModelInfo, compute: int, residual: int) -> float:
    """Count bytes per token that a layer saves for backward.

    Without activation checkpointing. Counted in what autograd saves of a Llama layer. A gated feed-forward layer of width F
    keeps its two inputs, the activation and their product; attention its queries, keys, values and result; what the products
    read is kept in their precision, and what norms read in that of the residual stream.

    Args:
        devices: for compilation.
        info: of the model.
        compute, residual: bytes of a number in products, and in the residual stream.
    """
    width, ffn, kv = info.hidden_size, _feed_forward_size(info), _kv_size(info)
    recipe = "none" if devices.precision != "fp8" else "tensorwise" if devices.fp8 is None else devices.fp8.recipe
    if devices.compile and recipe == "tensorwise":  # what the products read is kept with a byte a number
        return compute * (2 * width + 2 * kv + 2 * ffn) + 3 * width + ffn + 2 * residual * width
    if devices.compile and recipe == "rowwise":  # norms and the gated product are made again, or kept with a byte a number
        return compute * (3 * width + 2 * kv + 2 * ffn) + (2 + residual) * width
    if devices.compile:
        return compute * (5 * width + 2 * kv + 3 * ffn) + residual * width
    return compute * ((7 if residual > 2 else 6) * width + 2 * kv + 4 * ffn) + {2: 8, 4: 16}[residual] * width


def _kv_size(info: ModelInfo) -> float:
    return info.hidden_size / 4 if info.kv_size is None else info.kv_size


def _kept_and_working(devices: DevicesConfig, info: ModelInfo, compute: int, residual: int) -> tuple[float, float]:
    """Count bytes per token: kept by each layer, and working memory.

    With the activation checkpointing of the config.
    """
    width, ffn, kv = info.hidden_size, _feed_forward_size(info), _kv_size(info)
    everything = kept_by_layer(devices, info, compute, residual)
    if devices.activation_checkpointing == "none":
        return everything, compute * 2 * ffn
    if devices.activation_checkpointing == "selective":
        kept = compute * ((3 if devices.compile else 4) * width + 2 * kv + 2 * ffn) + residual * width
        return kept, everything - kept + compute * 2 * ffn
    return residual * width, everything + compute * 2 * ffn


def _other_models(config: Config, others: Mapping[str, ModelInfo]) -> int:
    """Those that compute where the trained model does; see `wmtp.plugins.contract.TrainerConfig`."""
    trainer = config.trainer
    if trainer.reference_device not in (None, config.devices.device):
        return 0
    size = 2 if trainer.reference_precision == "bf16" else 4
    # the trained model with its adapter off takes no memory, where its weights have the precision that is asked for
    shared = (size == 2) == config.devices.keeps_bf16
    counted = [info for name, info in others.items() if not (shared and is_start_model(config, name))]
    return sum(size * info.parameters for info in counted)


def too_large(estimate: MemoryEstimate, device_bytes: int) -> str | None:
    """Warn of a run that is likely to run out of memory.

    Args:
        estimate: of the run.
        device_bytes: memory of the device.
    """
    if estimate.total <= device_bytes - _RESERVED:
        return None
    return f"the device has {_size(device_bytes)}, of which {_size(_RESERVED)} are lost to the driver and to fragmentation"


def cheaper_settings(config: Config, info: ModelInfo, heads: HeadsConfig, **job: Unpack[JobShape]) -> list[tuple[str, int]]:
    """Find the three settings that lower the estimate most.

    Each is a single change, with the total it leads to; see `estimate_memory`.
    """
    devices, data, world_size = config.devices, config.data.train, job.get("world_size", 1)
    rows = -(-data.batch_size // world_size)
    micro = min(data.micro_batch_size or rows, rows)
    tried: dict[str, Config] = {}
    for smaller in {max(1, micro // 2), 1} - {micro}:
        tried[f"data.train.micro_batch_size = {smaller}"] = evolve(
            config, data=evolve(config.data, train=evolve(data, micro_batch_size=smaller))
        )
    modes = ["none", "selective", "full", *(["offload"] if devices.device not in ("cpu", "mps") else [])]
    for mode in modes[modes.index(devices.activation_checkpointing) + 1 :]:
        tried[f'devices.activation_checkpointing = "{mode}"'] = evolve(
            config, devices=evolve(devices, activation_checkpointing=mode)
        )
    if not devices.keeps_bf16:
        tried['devices.precision = "bf16-params"'] = evolve(config, devices=evolve(devices, precision="bf16-params"))
    if not devices.compile:
        tried["devices.compile = true"] = evolve(config, devices=evolve(devices, compile=True))
    if data.max_length > 2:
        half = data.max_length // 2
        tried[f"data.train.max_length = {half}"] = evolve(config, data=evolve(config.data, train=evolve(data, max_length=half)))
    if devices.fsdp is not None and devices.fsdp.strategy != "full" and world_size > 1:
        tried['devices.fsdp.strategy = "full"'] = evolve(
            config, devices=evolve(devices, fsdp=evolve(devices.fsdp, strategy="full"))
        )
    now = estimate_memory(config, info, heads, **job).total
    totals = {key: estimate_memory(other, info, heads, **job).total for key, other in tried.items()}
    # one value of each key: the one that helps most
    best: dict[str, tuple[str, int]] = {}
    for setting, total in sorted(totals.items(), key=lambda entry: entry[1]):
        best.setdefault(setting.partition(" = ")[0], (setting, total))
    return [(setting, total) for setting, total in best.values() if total < now][:3]


def describe_shortage(settings: list[tuple[str, int]]) -> str:
    """Word `cheaper_settings` for a message."""
    return "; what helps most: " + ", ".join(f"{key} (about {_size(total)})" for key, total in settings) if settings else ""


@contextmanager
def explain_out_of_memory(
    config: Config, info: ModelInfo, heads: HeadsConfig, *, device: object, **job: Unpack[JobShape]
) -> Iterator[None]:
    """Turn an out-of-memory error inside into one with the estimate and advice.

    Args:
        config, info, heads: see `estimate_memory`.
        device: what the message calls the device.
        job: see `estimate_memory`.

    Raises:
        WMTPError: in place of torch's error.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # torch has an error class for GPUs only; on a CPU the message depends on the system
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        estimate = estimate_memory(config, info, heads, **job)
        what = describe_shortage(cheaper_settings(config, info, heads, **job))
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WMTPError(f"{device} is out of memory: the estimate was {estimate}{what}; torch says: {first}") from error


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"

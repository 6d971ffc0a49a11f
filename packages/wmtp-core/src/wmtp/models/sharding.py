"""One model on several ranks, with weights from rank 0.

Sharded by FSDP2, or replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from wmtp.config.schema import FsdpConfig
from wmtp.devices import Precision
from wmtp.distributed.ranks import Ranks
from wmtp.models.blueprint import Blueprint
from wmtp.models.layers import repeated_layers
from wmtp.models.mapped import compare_files, open_tensors
from wmtp.models.mtp import MTPModel

__all__ = ["Sharding", "spread", "whole_state"]


@frozen(kw_only=True)
class Sharding:
    """Times at which a sharded model gathers parameters and reduces gradients.

    The embedding, the final norm and the unembedding are the root's own parameters: they are gathered at the step's first
    forward pass, stay until its last backward pass, and their gradient is added up once.

    Args:
        config: ``[devices.fsdp]``.
    """

    config: FsdpConfig

    def micro_batch(self, model: nn.Module, *, last: bool) -> None:
        """Prepare the forward pass of a micro-batch whose gradient is wanted.

        Call it before each.

        Args:
            model: as `spread` gave it.
            last: whether it is the step's last.
        """
        if not isinstance(model, FSDPModule):
            return
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last or self.config.reduce_every_micro_batch)
        model.set_requires_gradient_sync(last, recurse=False)
        model.set_requires_all_reduce(last)  # between machines, once a step
        model.set_reshard_after_backward(last or self.config.strategy != "grad-op")
        model.set_reshard_after_backward(last, recurse=False)

    @contextmanager
    def other_parameters_learn(self, model: nn.Module) -> Iterator[None]:
        """Freeze parameters, or set them free, inside. All ranks do.

        FSDP hands on what learns when it gathers parameters, so none may be gathered before. It derives the precision of a
        layer's gradients from what learns when it looks at the layer, so it must look again: torch 2.11 finds none where
        nothing learns, and fails when something does.
        """
        self.release(model)
        yield
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()  # looks again
                module.reshard()

    def release(self, model: nn.Module) -> None:
        """Free gathered parameters.

        Call it before parameters change, or when nothing more is computed.
        """
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def spread(
    load: Callable[[], MTPModel],
    ranks: Ranks,
    device: torch.device,
    config: FsdpConfig,
    precision: Precision,
    prepare: Callable[[MTPModel], None] = lambda _: None,
    folder: Path | None = None,
) -> MTPModel:
    """Have rank 0 load a model, and give every rank its part.

    No device ever holds more than a layer besides that. Parameters that are tensors of the folder's files (`MTPModel.stored`)
    every rank reads there, and no more of them than its part. What else there is rank 0 sends.

    Args:
        load: gives the model on the CPU; called on rank 0 only. Its parameters may be of a smaller type.
        ranks: all of them; every one calls this.
        device: of this rank.
        config: ``[devices.fsdp]``.
        precision: ``bf16`` gathers layers in bf16, ``bf16-params`` everything; gradients are added up, and parameters kept,
            in fp32.
        prepare: called with the empty model before it is sharded.
        folder: where this rank finds the model's files. None: nowhere.

    Raises:
        WMTPError, ConfigError: on every rank, what went wrong on rank 0; or the machines have different files.
    """
    loaded: list[MTPModel] = []

    def describe() -> tuple[Blueprint, Mapping[str, str]]:
        loaded.append(load())
        here = dict(_tensors(loaded[0]))  # but for those that are quantized by now
        stored = {name: own for name, own in loaded[0].stored.items() if name in here}
        return Blueprint.of(loaded[0]), stored if folder is not None else {}

    blueprint, stored = ranks.main_only(describe)
    model = blueprint.build()
    source = dict(_tensors(loaded[0])) if loaded else {}
    files = None
    if stored and folder is not None:
        files = ranks.collective(lambda: {name: source[name] for name in stored} if source else open_tensors(folder, stored))
        compare_files(files, ranks, folder)
    if loaded:
        model.take_origin(loaded[0])
    prepare(model)
    if config.strategy == "none":
        _materialize(model, device)
    else:
        _shard(model, ranks, device, config, precision)
        model.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in _tensors(model):
            if files is not None and name in files:
                _fill_from_file(tensor, files[name], device)
            else:
                _fill(tensor, source.get(name), device, ranks)
    return model


def _shard(model: MTPModel, ranks: Ranks, device: torch.device, config: FsdpConfig, precision: Precision) -> None:
    mesh = _mesh(ranks, device, config)
    # Inputs are not cast: autocast decides what is computed in bf16, with several ranks as with one. What flows from layer to
    # layer has the type of the root's embedding.
    half = None if precision == "fp32" else torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False)
    root = policy if precision == "bf16-params" else MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in repeated_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=config.strategy != "grad-op", mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=root)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # the loss is divided by the whole step's Z already: gradients are added, not averaged
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _mesh(ranks: Ranks, device: torch.device, config: FsdpConfig) -> DeviceMesh:
    """Arrange the ranks in a mesh.

    FSDP shards over the last dimension, and replicates over one before it.
    """
    if config.strategy != "hybrid" or ranks.world_size == ranks.per_machine:
        return init_device_mesh(device.type, (ranks.world_size,), mesh_dim_names=("ranks",))
    assert ranks.per_machine is not None, "machines with as many processes each: `wmtp.distributed.start` has checked"
    shape = (ranks.world_size // ranks.per_machine, ranks.per_machine)
    return init_device_mesh(device.type, shape, mesh_dim_names=("machines", "ranks"))


def _tensors(model: MTPModel) -> Iterable[tuple[str, Tensor]]:
    """Parameters and all buffers; tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Allocate the tensors of a meta model.

    Unlike ``to_empty``, tied parameters stay tied.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            new = made.setdefault(id(parameter), nn.Parameter(torch.empty_like(parameter, device=device)))
            setattr(module, name, new)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))


def _fill(tensor: Tensor, source: Tensor | None, device: torch.device, ranks: Ranks) -> None:
    """Take the numbers from rank 0."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if source is not None:
        whole.copy_(source)
    if isinstance(tensor, DTensor):
        tensor.to_local().copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements).to_local())
    else:
        if ranks.world_size > 1:
            dist.broadcast(whole, src=0)
        tensor.copy_(whole)


def _fill_from_file(tensor: Tensor, stored: Tensor, device: torch.device) -> None:
    """Take this rank's part of a tensor mapped from its file.

    Nothing else of it is read.
    """
    own = tensor
    if isinstance(tensor, DTensor):
        own, mesh = tensor.to_local(), tensor.device_mesh
        each = -(-len(stored) // mesh.size(-1))  # FSDP divides the first dimension, and the last ranks may have less
        begin = min(mesh.get_local_rank(mesh.ndim - 1) * each, len(stored))
        stored = stored[begin : begin + each]
    own.copy_(stored.to(device))  # in the file's type to the device, and converted there


def whole_state(model: MTPModel, ranks: Ranks) -> dict[str, Tensor] | None:
    """Gather the full state dict on the CPU of rank 0.

    It is empty elsewhere. None: ``model`` is not sharded. Tied tensors are one object. An adapted base's own weights are left
    out: its files have them.
    """
    if not isinstance(model, FSDPModule):
        return None
    gathered: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.own_state().items():
        if id(tensor) not in gathered:
            whole = tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
            if not ranks.is_main:
                whole = whole.new_empty(0)
            gathered[id(tensor)] = whole.cpu()
        state[name] = gathered[id(tensor)]
    return state if ranks.is_main else {}

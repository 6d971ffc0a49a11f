"""Both passes of a model as CUDA graphs.

They are recorded once for each shape of rows, then replayed without Python. With adapters a step has thousands of small
kernels, which Python starts more slowly than a GPU computes them. What is recorded goes from token ids to hidden states, and
from the gradients of these to those of the parameters that learn. Loss, trainer and optimizer stay outside.

A graph reads and writes the same memory each time, so what it gives is overwritten by the next replay. Hidden states are copied
out of it. Gradients are not: the optimizer has used them by then, and where more are to be added to them, as those of further
micro-batches are, they are copied before they would be overwritten (`RecordedPasses._keep_gradients`).

While a pass is recorded, aliases stand in the place of the parameters. Autograd keeps, for each parameter, one node that adds
up its gradient, and for that node the stream of its first use; a result of an earlier pass that somebody holds keeps the node,
and with it a stream that nothing may be recorded from. An alias is new, and so is its node.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wmtp.errors import ConfigError, WMTPError, described
from wmtp.models.mtp import MTPOutput

if TYPE_CHECKING:
    from wmtp.config.schema import DevicesConfig
    from wmtp.models.mtp import MTPModel
    from wmtp.optim.master_weights import MasterWeights

__all__ = ["CudaGraphs", "RecordedPasses", "Recorder", "record_passes"]

logger = logging.getLogger("wmtp")

#: shapes that are recorded at most: each holds gradients of its own
_SHAPES = 4
_REMEDY = "set devices.cuda_graphs = false"


class Recorder(Protocol):
    """Means of recording functions of a device."""

    def warm_up(self, function: Callable[[], object]) -> None:
        """Run a function first, so that libraries set themselves up."""
        ...

    def record(self, function: Callable[[], list[Tensor | None]]) -> tuple[list[Tensor | None], Callable[[], None]]:
        """Record a function.

        Returns:
            its results, whose memory each replay fills anew, and what replays it.
        """
        ...

    def wait(self) -> None:
        """Wait until the device replays nothing any more."""
        ...


class CudaGraphs:
    """Recorder of the current GPU; its graphs share memory between them.

    So they must be replayed one after another, and nothing that one gives be read after the next one.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], object]) -> None:
        """See `Recorder.warm_up`."""
        torch.cuda.empty_cache()  # memory that was used in one stream serves no other
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, function: Callable[[], list[Tensor | None]]) -> tuple[list[Tensor | None], Callable[[], None]]:
        """See `Recorder.record`."""
        graph = torch.cuda.CUDAGraph()
        failures: list[Exception] = []
        gc.collect()  # graphs that are garbage must not be freed inside: the device does not allow it meanwhile
        collects = gc.isenabled()
        gc.disable()
        try:
            # Other threads may use the device meanwhile, as one that fetches batches. The outer context brings the caller's
            # stream back where a recording fails.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    results = function()
                except Exception as error:
                    failures.append(error)
                    raise
        except RuntimeError as error:  # ending a recording that has failed fails too
            raise (failures or [error])[0] from None
        finally:
            if collects:
                gc.enable()
        return results, graph.replay

    def wait(self) -> None:
        """See `Recorder.wait`."""
        self._stream.synchronize()
        torch.cuda.current_stream().synchronize()


class RecordedPasses:
    """A model's forward pass, with its backward pass, from recordings.

    It is called as the model is, for steps that learn. Rows of a shape are computed as ever when they first come, which
    compiles the layers, and recorded the second time; anew where something else learns, or where parameters have moved.

    Args:
        model: its parameters are changed in place only.
        owners: gives for parameters the tensors that their gradients are added to.
        make_recorder: makes what records; called again once earlier recordings have become useless. Default: `CudaGraphs`.
    """

    def __init__(
        self,
        model: MTPModel,
        owners: Callable[[Sequence[nn.Parameter]], Sequence[Tensor]],
        make_recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        self.model = model
        self._make_recorder = make_recorder or CudaGraphs
        modules = list(model.modules())
        self._places = [(m._parameters, name) for m in modules for name, p in m._parameters.items() if p is not None]
        self._buffers = [(m._buffers, name) for m in modules for name, b in m._buffers.items() if b is not None]
        self._owners = owners(list(model.parameters()))
        self._state: tuple[Any, ...] = ()
        self._seen: set[tuple[Any, ...]] = set()
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self._recorder: Recorder | None = None
        self._turn = _Turn()
        self._has_said = False

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor | None = None, packed: bool = False, router_logits: bool = False
    ) -> MTPOutput:
        """Run trunk and heads; see `MTPModel.forward`.

        Raises:
            ConfigError: this model, or these rows, cannot be recorded.
        """
        if not torch.is_grad_enabled():
            return self.model(input_ids, position_ids, packed, router_logits=router_logits)
        self._check(packed, router_logits)
        self._keep_gradients()
        state = self._read_state()
        if state != self._state:
            self._forget()
            self._state = state
        kind = input_ids.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = tuple(input_ids.shape), packed, autocast
        recording = self._recordings.get(key)
        if recording is None:
            if key not in self._seen or len(self._recordings) == _SHAPES:
                self._say_too_many(key)
                self._seen.add(key)
                return self.model(input_ids, position_ids, packed)
            recording = self._recordings[key] = self._record(input_ids, position_ids if packed else None)
        return recording(input_ids, position_ids)

    def _check(self, packed: bool, router_logits: bool) -> None:
        """Refuse what a recording cannot hold.

        Raises:
            ConfigError: it cannot.
        """
        if router_logits:
            raise ConfigError(
                "devices.cuda_graphs: this model is a mixture of experts, which asks the GPU how many tokens each expert has; "
                + _REMEDY
            )
        if packed and not self.model.block_attention:
            raise ConfigError(
                "devices.cuda_graphs: rows of several documents are recorded with WMTP's block attention only, which this "
                f"model or devices.attention excludes; set data.train.packing = false, or {_REMEDY}"
            )

    def _forget(self) -> None:
        """Drop recordings that something else is to learn by, or from elsewhere."""
        if self._recorder is not None:
            logger.info("devices.cuda_graphs: what learns has changed, or its place in memory; passes are recorded anew")
            self._recorder.wait()
        self._recordings.clear()
        self._seen.clear()
        self._recorder = None

    def _say_too_many(self, key: tuple[Any, ...]) -> None:
        if key in self._seen and not self._has_said:
            self._has_said = True
            logger.info(
                "devices.cuda_graphs: rows of more than %d shapes come again; the others are computed without graphs", _SHAPES
            )

    def _read_state(self) -> tuple[Any, ...]:
        """Read where parameters and buffers are, and which of them learn."""
        places = [parameters[name] for parameters, name in self._places]
        buffers = [buffers[name] for buffers, name in self._buffers]
        return tuple((p.data_ptr(), p.requires_grad) for p in (*places, *buffers) if p is not None)

    def _keep_gradients(self) -> None:
        """Copy gradients that the next replay would overwrite."""
        places = {place for recording in self._recordings.values() for place in recording.gradient_places}
        if not places:
            return
        for owner in self._owners:
            if owner.grad is not None and owner.grad.data_ptr() in places:
                owner.grad = owner.grad.clone()

    def _record(self, input_ids: Tensor, position_ids: Tensor | None) -> _Recording:
        learn = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self._recorder is None:
            self._recorder = self._make_recorder()
        try:
            return _Recording(self._recorder, self._turn, self._run_by, learn, input_ids, position_ids)
        except (WMTPError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ConfigError(
                f"devices.cuda_graphs: the model's passes cannot be recorded: {described(error)}; {_REMEDY}"
            ) from error

    def _run_by(
        self, aliases: Mapping[nn.Parameter, nn.Parameter], input_ids: Tensor, position_ids: Tensor | None
    ) -> MTPOutput:
        """Run the model with other parameters in the place of some."""
        with _swapped(self._places, aliases):
            return self.model(input_ids, position_ids, position_ids is not None)


@contextmanager
def _swapped(places: Sequence[tuple[dict[str, Any], str]], aliases: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    before = [parameters[name] for parameters, name in places]
    for (parameters, name), parameter in zip(places, before, strict=True):
        parameters[name] = aliases.get(parameter, parameter)
    try:
        yield
    finally:
        for (parameters, name), parameter in zip(places, before, strict=True):
            parameters[name] = parameter


class _Turn:
    """Count of forward passes replayed, of recordings that share memory."""

    def __init__(self) -> None:
        self.number = 0
        self.is_open = False

    def begin(self) -> int:
        """Number a forward pass."""
        self.number += 1
        self.is_open = True
        return self.number

    def end(self, number: int) -> None:
        """End a turn by its backward pass.

        Raises:
            RuntimeError: what it needs is not there any more.
        """
        if not self.is_open or number != self.number:
            raise RuntimeError(
                "a recorded backward pass follows its own forward pass once, before the next forward pass; to compute "
                "gradients in another order " + _REMEDY
            )
        self.is_open = False


class _Recording:
    """Both passes for rows of one shape.

    Args:
        recorder: of the device.
        turn: of all recordings.
        run: runs the model with aliases of the parameters that learn.
        learn: the parameters that learn.
        input_ids: ``[B, S]``, of the first rows.
        position_ids: of packed rows.
    """

    def __init__(
        self,
        recorder: Recorder,
        turn: _Turn,
        run: Callable[[Mapping[nn.Parameter, nn.Parameter], Tensor, Tensor | None], MTPOutput],
        learn: Sequence[nn.Parameter],
        input_ids: Tensor,
        position_ids: Tensor | None,
    ) -> None:
        self._learn = learn
        self._ids = input_ids.clone()
        self._positions = None if position_ids is None else position_ids.clone()
        self._order: list[int] = []  # of trunk and heads, their places among the outputs
        self._slopes: list[Tensor | None] = []  # gradients of the outputs; None where nothing learns by one
        self._is_zero: list[bool] = []
        self._turn = turn
        aliases = {parameter: nn.Parameter(parameter.detach()) for parameter in learn}
        leaves = list(aliases.values())
        made: list[Tensor] = []

        def forward() -> list[Tensor | None]:
            output = run(aliases, self._ids, self._positions)
            tensors = {id(tensor): tensor for tensor in (output.trunk, *output.hidden)}
            self._order = [list(tensors).index(id(tensor)) for tensor in (output.trunk, *output.hidden)]
            made[:] = tensors.values()
            return list(made)

        def backward() -> list[Tensor | None]:
            learned = [(tensor, slope) for tensor, slope in zip(made, self._slopes, strict=True) if slope is not None]
            outputs, slopes = zip(*learned, strict=True)
            with torch.autocast(self._ids.device.type, enabled=False):  # as where loss.backward() is called
                return list(torch.autograd.grad(outputs, leaves, slopes, allow_unused=True))

        def both() -> None:
            forward()
            self._slopes = [torch.zeros_like(tensor) if tensor.requires_grad else None for tensor in made]
            if self.learns:
                backward()
            made.clear()

        # autocast keeps what it has converted: conversions made outside would not be recorded, nor may those made inside stay
        torch.clear_autocast_cache()
        recorder.warm_up(both)
        torch.clear_autocast_cache()
        self._is_zero = [True] * len(self._slopes)
        outputs, self._forward = recorder.record(forward)
        torch.clear_autocast_cache()
        self._gradients, self._backward = recorder.record(backward) if self.learns else ([None] * len(leaves), None)
        self._outputs = [tensor.detach() for tensor in outputs if tensor is not None]
        made.clear()
        self.gradient_places = frozenset(g.data_ptr() for g in self._gradients if g is not None and g.numel())

    @property
    def learns(self) -> bool:
        """True if anything learns by the outputs."""
        return any(slope is not None for slope in self._slopes)

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None) -> MTPOutput:
        """Replay the forward pass; its backward pass replays the other."""
        self._ids.copy_(input_ids)
        if self._positions is not None and position_ids is not None:
            self._positions.copy_(position_ids)
        outputs = _Replay.apply(self, *self._learn)
        trunk, *hidden = (outputs[place] for place in self._order)
        return MTPOutput(trunk=trunk, hidden=tuple(hidden))

    def replay_forward(self) -> tuple[int, tuple[Tensor, ...], list[Tensor]]:
        """Replay the forward pass.

        Returns:
            the number of the replay, the outputs, and those by which nothing learns.
        """
        number = self._turn.begin()
        self._forward()
        outputs = tuple(output.clone() for output in self._outputs)
        return number, outputs, [output for output, slope in zip(outputs, self._slopes, strict=True) if slope is None]

    def replay_backward(self, number: int, slopes: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Replay the backward pass of a forward pass.

        Raises:
            RuntimeError: what it needs is not there any more.
        """
        self._turn.end(number)
        for place, (own, slope) in enumerate(zip(self._slopes, slopes, strict=True)):
            if own is None:
                continue
            if slope is not None:
                own.copy_(slope)
            elif not self._is_zero[place]:
                own.zero_()
            self._is_zero[place] = slope is None
        if self._backward is not None:
            self._backward()
        return [None if gradient is None else gradient.detach() for gradient in self._gradients]


class _Replay(torch.autograd.Function):
    """Both replays, in the autograd graph of the step."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, *_: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.recording = recording
        ctx.set_materialize_grads(False)
        ctx.number, outputs, constant = recording.replay_forward()
        ctx.mark_non_differentiable(*constant)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *ctx.recording.replay_backward(ctx.number, slopes)


def record_passes(model: MTPModel, devices: DevicesConfig, masters: MasterWeights | None) -> RecordedPasses | None:
    """Record a model's passes where ``devices.cuda_graphs`` asks for it.

    Args:
        model: ready to learn, on a GPU.
        devices: the config section.
        masters: the copies of its parameters, which gradients are added to.
    """
    return RecordedPasses(model, list if masters is None else masters.replace) if devices.cuda_graphs else None

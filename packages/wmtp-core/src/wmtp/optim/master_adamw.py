"""Fused AdamW over the fp32 copies of bf16 parameters, on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MasterAdamW"]

_BLOCK = 2048
#: addresses and sizes that are multiples of it are read 16 bytes at a time
_ALIGNED = 16
#: tables of blocks that are kept at most
_TABLES = 8


class MasterAdamW(torch.optim.AdamW):
    """Fused AdamW over fp32 master copies.

    It takes raw gradients, clips, and publishes in one pass. An optimizer of torch wants gradients in fp32, and clipping and
    publishing are passes of their own: 48 bytes read or written a parameter and step in place of 28
    (`wmtp.optim.master_weights`). State and groups are those of torch's AdamW.

    Args:
        optimizer: its groups are taken over; it must not have stepped yet.
        parameters: copy → the bf16 parameter that it is rounded into. Other parameters of the groups have none.
    """

    def __init__(self, optimizer: torch.optim.AdamW, parameters: Mapping[nn.Parameter, nn.Parameter]) -> None:
        from wmtp.optim.adamw_kernel import adamw_kernel  # imports Triton

        super().__init__(optimizer.param_groups)
        self._kernel: Any = adamw_kernel  # the decorator of Triton hides what it returns
        self._parameters = parameters
        self._clip: Tensor | None = None
        self._blocks: dict[tuple[tuple[int, ...], torch.device], tuple[Tensor, Tensor]] = {}

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Have the next step clip gradients to ``max_norm``.

        It scales them down where their ``norm`` (a scalar) is larger.
        """
        # as torch.nn.utils.clip_grads_with_norm_ does
        self._clip = (max_norm / (norm.float() + 1e-6)).clamp(max=1.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Raises:
            TypeError: there is a closure.
        """
        if closure is not None:
            raise TypeError("MasterAdamW takes no closure: its gradients are there before it steps")
        for group in self.param_groups:
            learned = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not learned:
                continue
            states = [self._state_of(parameter) for parameter in learned]
            torch._foreach_add_([state["step"] for state in states], 1.0)
            # in fp64 and on the device: 1 − β₂ᵗ loses digits in fp32, and the host must not wait for t
            steps = torch.stack([state["step"] for state in states]).double()
            beta1, beta2 = group["betas"]
            corrections = torch.stack([1.0 - beta1**steps, 1.0 - beta2**steps], dim=1).float()
            gradients = [_alike(parameter) for parameter in learned]
            kinds: dict[tuple[torch.dtype, bool, bool], list[int]] = {}
            for number, (parameter, gradient, state) in enumerate(zip(learned, gradients, states, strict=True)):
                published = self._parameters.get(parameter, parameter)
                aligned = _are_aligned(parameter, published, gradient, state["exp_avg"], state["exp_avg_sq"])
                kinds.setdefault((gradient.dtype, published is not parameter, aligned), []).append(number)
            for (_, publishes, aligned), some in kinds.items():
                self._update(
                    [learned[number] for number in some],
                    [gradients[number] for number in some],
                    [states[number] for number in some],
                    corrections if len(kinds) == 1 else torch.stack([corrections[number] for number in some]),
                    group,
                    publishes=publishes,
                    aligned=aligned,
                )
        self._clip = None

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        elif state["step"].device != parameter.device:  # as torch's AdamW reads it back if it is not a fused one
            state["step"] = state["step"].to(parameter.device)
        return state

    def _update(
        self,
        masters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        corrections: Tensor,
        group: Mapping[str, Any],
        *,
        publishes: bool,
        aligned: bool,
    ) -> None:
        """Update parameters of one kind by one launch, however many they are.

        Adapters are hundreds of small matrices: a launch for each takes the host longer than the GPU.
        """
        device = corrections.device
        published = [self._parameters[master] for master in masters] if publishes else masters
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        sizes = tuple(master.numel() for master in masters)
        places = [[one.data_ptr() for one in some] for some in (masters, published, gradients, means, squares)]
        table = torch.tensor([*places, sizes], dtype=torch.int64, pin_memory=device.type == "cuda").to(
            device, non_blocking=True
        )
        owners, firsts = self._blocks_of(sizes, device)
        beta1, beta2 = group["betas"]
        self._kernel[(owners.numel(),)](
            table,
            len(masters),
            owners,
            firsts,
            corrections,
            corrections.new_ones(()) if self._clip is None else self._clip,
            float(group["lr"]),
            1.0 - float(group["lr"]) * group["weight_decay"],
            beta1,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            group["eps"],
            HALF=gradients[0].dtype == torch.bfloat16,
            PUBLISH=publishes,
            ALIGNED=aligned,
            BLOCK=_BLOCK,
            num_warps=8,
        )

    def _blocks_of(self, sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return each block's tensor, and each tensor's first block."""
        if (sizes, device) not in self._blocks:
            if len(self._blocks) == _TABLES:  # which parameters have gradients may differ from step to step
                self._blocks.clear()
            counts = torch.tensor([-(-size // _BLOCK) for size in sizes])
            owners = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(counts)
            firsts = (counts.cumsum(0) - counts).int()
            self._blocks[sizes, device] = owners.to(device), firsts.to(device)
        return self._blocks[sizes, device]


def _alike(master: nn.Parameter) -> Tensor:
    """Return a gradient that lies in memory as its parameter does.

    The kernel goes through memory, not through indices.
    """
    gradient = master.grad
    assert gradient is not None, "step() leaves out parameters without gradient"
    if gradient.stride() == master.stride():
        return gradient
    return torch.empty_like(master, dtype=gradient.dtype).copy_(gradient)


def _are_aligned(*tensors: Tensor) -> bool:
    """Tell whether tensors of one size can be read by 16 bytes."""
    return tensors[0].numel() % _ALIGNED == 0 and all(tensor.data_ptr() % _ALIGNED == 0 for tensor in tensors)

"""Peers of ``bench/step.py``: what one writes without WMTP."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from step_shape import Shape
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

Loss = Callable[["PlainMTP", list[Tensor], Tensor, Tensor], Tensor]


class PlainMTP(nn.Module):
    """Llama with a decoder layer for each further head."""

    def __init__(self, shape: Shape, loss: Loss, *, compiled: bool, checkpointed: bool = False) -> None:
        super().__init__()
        config = shape.config()
        self.base = LlamaForCausalLM(config)
        self.heads = nn.ModuleList(LlamaDecoderLayer(config, shape.layers - 1) for _ in range(shape.horizon - 1))
        self.loss = loss
        self.checkpointed = checkpointed
        if compiled:
            for layer in (*self.base.model.layers, *self.heads):
                layer.compile()

    def hidden(self, ids: Tensor) -> list[Tensor]:
        """Hidden states of every head, ``[B, S, D]``."""
        model = self.base.model
        hidden = model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        arguments = {"position_embeddings": model.rotary_emb(hidden, positions), "attention_mask": None}

        def run(layer: nn.Module, given: Tensor) -> Tensor:
            if self.checkpointed:
                return checkpoint(partial(layer, **arguments), given, use_reentrant=False)
            return layer(given, **arguments)

        *trunk, last = model.layers
        for layer in trunk:
            hidden = run(layer, hidden)
        return [model.norm(run(head, hidden)) for head in (last, *self.heads)]

    def forward(self, input_ids: Tensor, weights: Tensor, **_: object) -> dict[str, Tensor]:
        """Weighted loss of all heads."""
        return {"loss": self.loss(self, self.hidden(input_ids), input_ids, weights)}


def _targets(hidden: list[Tensor], ids: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Yield each head's hidden states, targets and weights, where it has targets."""
    length = ids.shape[1]
    return [
        (h[:, : length - k].flatten(0, 1), ids[:, k:].flatten(), weights[:, k:].flatten())
        for k, h in enumerate(hidden, start=1)
    ]


def _naive(model: PlainMTP, hidden: list[Tensor], ids: Tensor, weights: Tensor) -> Tensor:
    """All logits at once, ``[B, S, H, V]``, as in early code."""
    logits = torch.stack([model.base.lm_head(h) for h in hidden], dim=2)
    total = torch.zeros((), device=ids.device)
    norm = torch.zeros((), device=ids.device)
    for k in range(1, len(hidden) + 1):
        losses = F.cross_entropy(logits[:, :-k, k - 1].flatten(0, 1).float(), ids[:, k:].flatten(), reduction="none")
        w = weights[:, k:].flatten()
        total, norm = total + (losses * w).sum(), norm + w.sum()
    return total / norm


def liger(model: PlainMTP, hidden: list[Tensor], ids: Tensor, weights: Tensor) -> Tensor:
    """Liger's fused linear cross entropy a head, weighted by token."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    fused = LigerFusedLinearCrossEntropyLoss(reduction="none")
    total = torch.zeros((), device=ids.device)
    norm = torch.zeros((), device=ids.device)
    for h, target, w in _targets(hidden, ids, weights):
        total, norm = total + (fused(model.base.lm_head.weight, h, target) * w).sum(), norm + w.sum()
    return total / norm


def _liger_mean(model: PlainMTP, hidden: list[Tensor], ids: Tensor, weights: Tensor) -> Tensor:
    """Liger's plain mean a head, which cannot weigh tokens."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    fused = LigerFusedLinearCrossEntropyLoss()
    losses = [fused(model.base.lm_head.weight, h, target) for h, target, _ in _targets(hidden, ids, weights)]
    return torch.stack(losses).mean()


def _make(shape: Shape, loss: Loss, **options: bool) -> PlainMTP:
    with torch.device("cuda"):
        return PlainMTP(shape, loss, **options).to(torch.bfloat16)


def loop(shape: Shape, warmup: int, steps: int, model: PlainMTP) -> float:
    """A plain loop: bf16 parameters and optimizer, fused AdamW, pinned data."""
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=1e-5, betas=(0.9, 0.95), fused=True)
    rows = [tuple(tensor.pin_memory() for tensor in shape.rows(step)) for step in range(2)]
    began = 0.0
    for step in range(warmup + steps):
        if step == warmup:
            torch.cuda.synchronize()
            began = time.perf_counter()
        ids, weights = (tensor.to("cuda", non_blocking=True) for tensor in rows[step % 2])
        model(ids, weights)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def loop_liger(shape: Shape, warmup: int, steps: int) -> float:
    """Strongest plain loop: compiled layers and Liger."""
    return loop(shape, warmup, steps, _make(shape, liger, compiled=True))


def loop_liger_full(shape: Shape, warmup: int, steps: int) -> float:
    """As above, with every layer checkpointed."""
    return loop(shape, warmup, steps, _make(shape, liger, compiled=True, checkpointed=True))


def loop_liger_mean(shape: Shape, warmup: int, steps: int) -> float:
    """As above, without weights: what it costs a peer to weigh."""
    return loop(shape, warmup, steps, _make(shape, _liger_mean, compiled=True))


def naive(shape: Shape, warmup: int, steps: int) -> float:
    """Eager layers and all logits."""
    return loop(shape, warmup, steps, _make(shape, _naive, compiled=False))


class _Rows(torch.utils.data.Dataset):
    def __init__(self, shape: Shape, steps: int) -> None:
        made = [shape.rows(step) for step in range(min(steps, 2))]
        self._ids, self._weights = (torch.cat(part) for part in zip(*made, strict=True))
        self._count = steps * shape.batch

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = index % len(self._ids)
        return {"input_ids": self._ids[row], "weights": self._weights[row]}


def trainer_liger(shape: Shape, warmup: int, steps: int) -> float:
    """Trainer of transformers around the same compiled layers and Liger."""
    from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
            if state.global_step in (warmup, warmup + steps):
                torch.cuda.synchronize()
                times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=shape.batch,
            max_steps=warmup + steps,
            optim="adamw_torch_fused",
            learning_rate=1e-5,
            max_grad_norm=1.0,
            logging_steps=10**6,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_num_workers=2,
        )
        model = _make(shape, liger, compiled=True)
        Trainer(model=model, args=arguments, train_dataset=_Rows(shape, warmup + steps), callbacks=[Clock()]).train()
    return (times[1] - times[0]) / steps

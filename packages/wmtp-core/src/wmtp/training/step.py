"""One optimizer step's loss and gradient, the same for every algorithm and however the step is split into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wmtp.data.batch import Batch, Targets, align_targets
from wmtp.devices import statistics_dtype
from wmtp.distributed.ranks import ALONE, Ranks
from wmtp.distributed.share import Share
from wmtp.loss import TokenPass, Unembedding, token_pass, weighted_cross_entropy
from wmtp.loss.weights import (
    NO_WEIGHT,
    Normalizer,
    bad_weights,
    head_statistics,
    prediction_coefficients,
    weight_statistics,
)
from wmtp.models.sharding import Sharding
from wmtp.optim.master_weights import MasterWeights
from wmtp.trainers import checks
from wmtp.trainers.base import Stage, Trainer
from wmtp.trainers.views import HiddenView, StepView, check_unchanged, versions
from wmtp.training.recording import TokenRecord, weight_histogram

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel, MTPOutput

__all__ = ["StepLoss", "StepOutput"]


@frozen(kw_only=True, eq=False)
class StepOutput:
    """What one step gave. Nothing here has been read from the device yet.

    Args:
        loss: the whole loss, scalar.
        bad_weights: see `wmtp.loss.weights.bad_weights`.
        metrics: scalars by name.
        weight_histogram: see `wmtp.training.recording.weight_histogram`; None if not asked for, or the stage has no weights.
        tokens: None if not asked for.
    """

    loss: Tensor
    bad_weights: Tensor
    metrics: Mapping[str, Tensor | float]
    weight_histogram: Tensor | None = None
    tokens: TokenRecord | None = None


@frozen(kw_only=True, eq=False)
class StepLoss:
    """Computes loss and gradient of whole optimizer steps.

    Args:
        model: the model; gradients are added to its parameters'.
        trainer: the algorithm.
        trainer_name: what messages call it.
        micro_batch_size: rows that are computed at once.
        normalizer: Z.
        device: where the model is.
        autocast: makes the context in which the model computes.
        seed: the run's seed.
        ranks: the processes that share the rows of a step.
        master_weights: the copies of the model's parameters that gradients are added to; None: the parameters themselves.
        sharding: how they hold the model; None: one process that holds it whole.
    """

    model: MTPModel
    trainer: Trainer
    trainer_name: str
    micro_batch_size: int
    normalizer: Normalizer
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    seed: int
    ranks: Ranks = ALONE
    master_weights: MasterWeights | None = None
    sharding: Sharding | None = None
    _head_weights: Tensor = field(init=False)

    @_head_weights.default  # type: ignore[attr-defined]
    def _(self) -> Tensor:
        # once: bringing numbers from Python to a GPU waits for it
        return torch.tensor(self.model.heads.resolved_head_weights(), device=self.device)

    def __call__(self, batch: Batch, step: int, stage: Stage, *, histogram: bool = False, tokens: bool = False) -> StepOutput:
        """Add the gradient of one step's loss to the parameters' ``grad``.

        Args:
            batch: all rows of the step, on the CPU, the same on every rank.
            step: the optimizer step, from 0.
            stage: the stage that the step belongs to.
            histogram: whether the distribution of weights is wanted.
            tokens: whether the numbers of every token are wanted.

        Raises:
            PluginError: the trainer breaks its contract.
        """
        packed = batch.packed
        share = Share(ranks=self.ranks, rows=len(batch.input_ids))
        rows = share.count
        pieces = [slice(start, min(start + self.micro_batch_size, rows)) for start in range(0, rows, self.micro_batch_size)]
        on_host = share.batch(batch)
        # counted on the CPU, so that a GPU is never asked how many predictions there are
        counts = [_valid_counts(on_host.rows(piece.start, piece.stop), self.model.horizon) for piece in pieces]
        own = on_host.to(self.device)
        own_targets = align_targets(own, self.model.horizon)
        alone = self.ranks.world == 1
        batch = own if alone else batch.to(self.device)
        targets = own_targets if alone else align_targets(batch, self.model.horizon)

        # One micro-batch: its forward pass serves both phases. Several: the statistics of all are needed before the gradient of
        # any, so what a trainer observes costs a forward pass of its own.
        kept: tuple[MTPOutput, dict[str, Tensor]] | None = None
        losses, entropy, known = None, None, None
        observations: dict[str, Tensor] = {}
        if len(pieces) == 1:
            self._announce(last=True)
            output = self._forward(own, packed)
            kept = output, self._observe(output, own, own_targets, packed, stage)
            observations = {name: value.detach() for name, value in kept[1].items()}
            if self._needs_statistics:
                known = self._token_pass(output, own_targets, counts[0])
                losses, entropy = known.losses, known.entropy
        elif self._needs_statistics or type(self.trainer).observe is not Trainer.observe:
            losses, entropy, observations = self._survey(own, own_targets, packed, pieces, counts, stage)
        # what a trainer sees are the rows of all ranks
        losses = None if losses is None else share.gather(losses)
        entropy = None if entropy is None else share.gather(entropy)
        observations = {name: share.gather(value) for name, value in observations.items()}

        view = StepView(
            batch=batch,
            targets=targets,
            token_loss=losses if self.trainer.needs_token_loss else None,
            entropy=entropy,
            observations=observations,
            step=step,
            stage=stage.name,
            generator=torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63),
            vocab_size=self.model.vocab_size,
        )
        seen = versions(view)
        uniform, weights = True, targets.valid.float()
        if stage.model_loss:
            given, weights = checks.given_weights(self.trainer, view, self.trainer_name)
            uniform = view.is_uniform(given)
        coefficients = prediction_coefficients(weights, targets.valid, self._head_weights, self.normalizer)
        problem = bad_weights(weights, coefficients)
        auxiliary, slopes = self._auxiliary(view)
        check_unchanged(view, seen, self.trainer_name)

        if not stage.model_loss:
            coefficients = torch.zeros_like(coefficients)
            problem = torch.zeros_like(problem)  # a stage may have nothing to learn from the model loss
        elif slopes:
            problem = torch.where(problem == NO_WEIGHT, 0, problem)  # there is something else to learn
        own_coefficients = share.take(coefficients)
        own_slopes = {name: share.take(slope) for name, slope in slopes.items()}
        model_loss = torch.zeros((), dtype=statistics_dtype(self.device), device=self.device)
        step_losses = []
        for piece, valid_counts in zip(pieces, counts, strict=True):
            part = Targets(ids=own_targets.ids[piece], valid=own_targets.valid[piece])
            if kept is not None:
                output, observed = kept
            else:
                rows_of_piece = own.rows(piece.start, piece.stop)
                self._announce(last=piece.stop == rows)
                output = self._forward(rows_of_piece, packed)
                observed = self._observe(output, rows_of_piece, part, packed, stage) if slopes else {}
            # where all token losses are known, only the predictions that teach something are computed again
            computed = part.valid if losses is None or known is not None else own_coefficients[piece] != 0
            with self.autocast():
                loss, piece_losses = weighted_cross_entropy(
                    output.hidden,
                    self._unembeddings(),
                    part.ids,
                    own_coefficients[piece],
                    computed,
                    known=known,
                    at_most=self._at_most(uniform, valid_counts, stage),
                    valid_counts=valid_counts,
                )
            model_loss += loss.detach()
            step_losses.append(piece_losses)
            # d aux / d parameters = Σ (d aux / d observation) · (d observation / d parameters)
            total = loss + sum(
                ((observed[name] * slope[piece]).sum() for name, slope in own_slopes.items()), start=loss.new_zeros(())
            )
            if total.requires_grad:
                total.backward()
        if self.sharding is not None:
            self.sharding.release(self.model)
        self.ranks.sum(model_loss)
        self.ranks.sum_gradients(self._whole_parameters())

        all_losses = share.gather(torch.cat(step_losses)) if losses is None else losses
        whole = sum(auxiliary.values(), start=model_loss)
        metrics: dict[str, Tensor | float] = {"loss": whole}
        metrics |= head_statistics(all_losses, weights, targets.valid)
        metrics |= weight_statistics(weights, targets.valid)
        metrics |= {f"auxiliary/{name}": value for name, value in auxiliary.items()}
        metrics |= checks.checked_metrics(self.trainer, self.trainer_name, metrics)
        recorded = weights if stage.model_loss else None
        return StepOutput(
            loss=whole,
            bad_weights=problem,
            metrics=metrics,
            weight_histogram=weight_histogram(recorded, targets.valid) if histogram and recorded is not None else None,
            tokens=TokenRecord(weights=recorded, losses=all_losses, valid=targets.valid, details=self._details(view))
            if tokens
            else None,
        )

    def _whole_parameters(self) -> list[nn.Parameter]:
        """Those that every rank holds in full: their gradients must be added up."""
        modules = (self.model, *self.trainer.modules().values())
        parameters = [parameter for module in modules for parameter in module.parameters()]
        if self.master_weights is not None:
            parameters = self.master_weights.replace(parameters)
        return [parameter for parameter in parameters if not isinstance(parameter, DTensor)]

    def _announce(self, *, last: bool) -> None:
        """Tell a divided model which micro-batch comes."""
        if self.sharding is not None:
            self.sharding.micro_batch(self.model, last=last)

    def _unembeddings(self) -> list[Unembedding]:
        return [self.model.unembedding(k) for k in range(1, self.model.horizon + 1)]

    @property
    def _needs_statistics(self) -> bool:
        return self.trainer.needs_token_loss or self.trainer.needs_entropy

    def _forward(self, batch: Batch, packed: bool) -> MTPOutput:
        """The hidden states of one micro-batch."""
        with self.autocast():
            return self.model(batch.input_ids, batch.position, packed)

    def _observe(self, output: MTPOutput, batch: Batch, targets: Targets, packed: bool, stage: Stage) -> dict[str, Tensor]:
        """What the trainer observes in the hidden states of one micro-batch."""
        view = HiddenView(batch=batch, targets=targets, packed=packed, stage=stage.name, trunk=output.trunk)
        with self.autocast():
            return checks.observed(self.trainer, view, self.trainer_name)

    @torch.no_grad()
    def _details(self, view: StepView) -> dict[str, Tensor]:
        """What the trainer knows of single tokens."""
        return checks.token_details(self.trainer, view, self.trainer_name)

    def _token_pass(self, output: MTPOutput, targets: Targets, valid_counts: Sequence[int]) -> TokenPass:
        with self.autocast():
            return token_pass(
                output.hidden,
                self._unembeddings(),
                targets.ids,
                targets.valid,
                entropy=self.trainer.needs_entropy,
                top_k=self.trainer.entropy_top_k,
                valid_counts=valid_counts,
            )

    def _at_most(self, uniform: bool, valid_counts: Sequence[int], stage: Stage) -> int | None:
        """How many predictions of a micro-batch may have a weight; None where only the device knows."""
        if not stage.model_loss:
            return 0
        return sum(valid_counts) if uniform else None

    @torch.no_grad()
    def _survey(
        self, batch: Batch, targets: Targets, packed: bool, pieces: list[slice], counts: list[list[int]], stage: Stage
    ) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
        """Token losses, entropy and observations of the whole step, by a forward pass without gradient."""
        losses: list[Tensor] = []
        entropies: list[Tensor] = []
        observed: list[dict[str, Tensor]] = []
        for piece, valid_counts in zip(pieces, counts, strict=True):
            rows = batch.rows(piece.start, piece.stop)
            part = Targets(ids=targets.ids[piece], valid=targets.valid[piece])
            output = self._forward(rows, packed)
            observed.append(self._observe(output, rows, part, packed, stage))
            if self._needs_statistics:
                found = self._token_pass(output, part, valid_counts)
                losses.append(found.losses)
                entropies += [] if found.entropy is None else [found.entropy]
        together = {name: torch.cat([values[name] for values in observed]) for name in observed[0]}
        return torch.cat(losses) if losses else None, torch.cat(entropies) if entropies else None, together

    def _auxiliary(self, view: StepView) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The auxiliary losses of the step, and their gradient with respect to each observation."""
        leaves = {name: value.detach().clone() for name, value in view.observations.items()}
        for leaf in leaves.values():
            leaf.requires_grad_(leaf.is_floating_point())
        with torch.enable_grad():
            terms = checks.auxiliary_losses(self.trainer, evolve(view, observations=leaves), self.trainer_name)
            learned = [term.reshape(()) for term in terms.values() if term.requires_grad]
            if learned:
                # every rank computes these terms, and their gradients of parameters are added up over the ranks
                (torch.stack(learned).sum() / self.ranks.world).backward()
        slopes = {name: leaf.grad * self.ranks.world for name, leaf in leaves.items() if leaf.grad is not None}
        return {name: term.detach().reshape(()) for name, term in terms.items()}, slopes


def _valid_counts(batch: Batch, horizon: int) -> list[int]:
    """How many predictions of each head there are in a batch on the CPU."""
    return align_targets(batch, horizon).valid.sum((0, 1)).tolist()

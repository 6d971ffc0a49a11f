"""Loss and gradient of one optimizer step, for every algorithm.

`StepLoss.__call__` is the whole of it, from top to bottom; the methods below it are its parts, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wmtp.data.batch import PADDING, Batch, Targets, align_targets
from wmtp.distributed.ranks import SINGLE_PROCESS, Ranks, Share
from wmtp.loss import (
    HeadLoss,
    HeadObjective,
    TokenPass,
    Unembedding,
    token_pass,
    weighted_cross_entropy,
    weighted_head_loss,
)
from wmtp.loss.accuracy import PredictionSums
from wmtp.loss.fp8 import Fp8Logits
from wmtp.loss.weights import (
    NO_WEIGHT,
    Normalizer,
    bad_weights,
    head_statistics,
    prediction_coefficients,
    statistics_dtype,
    weight_histogram,
    weight_statistics,
)
from wmtp.models.sharding import Sharding
from wmtp.optim.master_weights import MasterWeights
from wmtp.trainers import checks
from wmtp.trainers.base import HiddenView, Stage, StepView, Trainer
from wmtp.training.agreement import AgreementSums
from wmtp.training.recording import TokenRecord
from wmtp.training.router import CHOICES, PROBABILITIES, RouterLoss
from wmtp.training.telemetry import Readback

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel, MTPOutput
    from wmtp.training.recorded import RecordedPasses

__all__ = ["StepLoss", "StepOutput"]

_PROBLEM = "problem"


@frozen(kw_only=True, eq=False)
class StepOutput:
    """Result of one step, nothing of it read from the device yet.

    Args:
        loss: the whole loss, scalar.
        bad_weights: see `wmtp.loss.weights.bad_weights`.
        early: the same, on its way to the CPU since before the backward pass; None: it is known to be 0.
        metrics: scalars by name.
        weight_histogram: see `wmtp.loss.weights.weight_histogram`; None if not asked for, or the stage has no weights.
        tokens: None if not asked for.
    """

    loss: Tensor
    bad_weights: Tensor
    early: Readback | None = field(default=None, repr=False)
    metrics: Mapping[str, Tensor | float]
    weight_histogram: Tensor | None = None
    tokens: TokenRecord | None = None

    @property
    def without_weight(self) -> bool:
        """Tell whether nothing in the step has weight.

        Waits for the weights, not for the backward pass behind them.
        """
        return self.early is not None and int(self.early.read()[_PROBLEM]) == NO_WEIGHT


@frozen(kw_only=True, eq=False)
class _MicroBatch:
    """Rows that are computed at once.

    Args:
        place: of the rows among those of this rank.
        batch: b rows, on the device.
        targets: ``[b, S, H]``.
        valid_counts: how many predictions each head has.
        last: whether it is the last one of the step.
    """

    place: slice
    batch: Batch
    targets: Targets
    valid_counts: Sequence[int]
    last: bool


@frozen(kw_only=True, eq=False)
class _Rows:
    """Rows of one step.

    Args:
        share: of this rank.
        packed: whether some row holds several documents.
        batch: the rows of all ranks, on the device.
        targets: of them, ``[B, S, H]``.
        micro_batches: the rows of this rank.
    """

    share: Share
    packed: bool
    batch: Batch
    targets: Targets
    micro_batches: Sequence[_MicroBatch]


@frozen(kw_only=True, eq=False)
class _Statistics:
    """Statistics of all ranks' rows, known before weights are given.

    None where the trainer asks for none.

    Args:
        losses: token losses ``[B, S, H]``.
        entropy: ``[B, S, H]``.
        observations: by name, detached.
        kept: the forward pass of the only micro-batch, and what was observed in it; None where there are several.
        precomputed: token losses of that pass.
    """

    losses: Tensor | None = None
    entropy: Tensor | None = None
    observations: Mapping[str, Tensor] = field(factory=dict)
    kept: tuple[MTPOutput, dict[str, Tensor]] | None = None
    precomputed: TokenPass | None = None


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
        sources: names of data sets whose losses are logged each.
        fp8_logits: products of the loss in fp8; None: none.
        recorded: the model's passes as CUDA graphs; None: the model itself.
    """

    model: MTPModel
    trainer: Trainer
    trainer_name: str
    micro_batch_size: int
    normalizer: Normalizer
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    seed: int
    ranks: Ranks = SINGLE_PROCESS
    master_weights: MasterWeights | None = None
    sharding: Sharding | None = None
    sources: Sequence[str] = ()
    fp8_logits: Fp8Logits | None = None
    recorded: RecordedPasses | None = None
    _head_weights: Tensor = field(init=False)
    _objective: HeadObjective | None = field(init=False)
    _router: RouterLoss | None = field(init=False)

    @_head_weights.default  # type: ignore[attr-defined]
    def _(self) -> Tensor:
        # once: bringing numbers from Python to a GPU waits for it
        return torch.tensor(self.model.heads.resolved_head_weights(), device=self.device)

    @_objective.default  # type: ignore[attr-defined]
    def _(self) -> HeadObjective | None:
        heads = self.model.heads
        return None if heads.objective == "ce" or heads.horizon == 1 else HeadObjective(heads.objective, heads.lk_eta)

    @_router.default  # type: ignore[attr-defined]
    def _(self) -> RouterLoss | None:
        return RouterLoss.of(self.model)

    def __call__(
        self,
        batch: Batch,
        step: int,
        stage: Stage,
        *,
        histogram: bool = False,
        tokens: bool = False,
        accuracy: bool = False,
    ) -> StepOutput:
        """Add the gradient of one step's loss to the parameters' ``grad``.

        Args:
            batch: all rows of the step, on the CPU, the same on every rank.
            step: the optimizer step, from 0.
            stage: the stage that the step belongs to.
            histogram: whether the distribution of weights is wanted.
            tokens: whether the numbers of every token are wanted.
            accuracy: whether `PredictionSums` are wanted among the metrics.

        Raises:
            PluginError: the trainer breaks its contract.
        """
        rows = self._rows(batch)
        statistics = self._survey(rows, stage)
        view = self._view(rows, statistics, step, stage)
        valid, before = view.targets.valid, checks.versions(view)

        weights, uniform = self._weights(view, stage)
        # predictions that this stage may not learn count neither in Z nor in statistics
        eligible = checks.eligible(self.trainer, view, self.trainer_name) if stage.model_loss else valid
        coefficients = prediction_coefficients(weights, eligible, self._head_weights, self.normalizer)
        problem = bad_weights(weights, coefficients)
        auxiliary, slopes, of_router = self._auxiliary(view, statistics)
        checks.check_unchanged(view, before, self.trainer_name)
        if not stage.model_loss:
            coefficients = torch.zeros_like(coefficients)
            problem = torch.zeros_like(problem)  # a stage may have nothing to learn from the model loss
        elif slopes.keys() - {PROBABILITIES}:
            problem = torch.where(problem == NO_WEIGHT, 0, problem)  # there is something else to learn

        early = None if uniform else Readback({_PROBLEM: problem})
        coefficients = rows.share.take(coefficients)
        slopes = {name: rows.share.take(slope) for name, slope in slopes.items()}
        model_loss = torch.zeros((), dtype=statistics_dtype(self.device), device=self.device)
        own_losses = []
        fit = None if self._objective is None else AgreementSums(self.model.horizon, self.device)
        predictions = PredictionSums(self.model.horizon, self.device) if accuracy else None
        for part in rows.micro_batches:
            output, observed = statistics.kept or self._forward(part, rows.packed, stage, observe=bool(slopes))
            statistics = evolve(statistics, kept=None)
            if not stage.frozen:
                checks.check_reached(observed, slopes.keys() - {PROBABILITIES}, self.trainer_name)
            at_most = 0 if not stage.model_loss else sum(part.valid_counts) if uniform else None
            loss, losses, objective = self._loss(part, output, coefficients[part.place], statistics, at_most)
            if fit is not None and objective is not None:
                fit.add(objective, coefficients[part.place])
            if predictions is not None:
                with self.autocast():
                    predictions.add(output.hidden, self._unembeddings(), part.targets.ids, part.targets.valid)
            del output  # the loss has all that it needs of the hidden states; memory is scarcest in the backward pass
            # d aux / d parameters = Σ (d aux / d observation) · (d observation / d parameters)
            slope = ((observed[name] * slope[part.place]).sum() for name, slope in slopes.items())
            total = loss + sum(slope, start=loss.new_zeros(()))
            if total.requires_grad:
                total.backward()
            model_loss += loss.detach()
            own_losses.append(losses)
        if self.sharding is not None:
            self.sharding.release(self.model)
        self.ranks.sum(model_loss)
        for sums in (fit, predictions):
            if sums is not None:
                self.ranks.sum(sums.sums)
        self.ranks.sum_gradients(self._whole_parameters())

        losses = rows.share.gather(torch.cat(own_losses)) if statistics.losses is None else statistics.losses
        whole = sum(auxiliary.values(), start=model_loss)
        recorded = weights if stage.model_loss else None
        return StepOutput(
            loss=whole,
            bad_weights=problem,
            early=early,
            metrics=self._metrics(whole, auxiliary, losses, weights, eligible, fit, predictions)
            | self._source_losses(batch, rows.batch, losses, eligible)
            | of_router,
            weight_histogram=weight_histogram(recorded, eligible) if histogram and recorded is not None else None,
            tokens=TokenRecord(weights=recorded, losses=losses, valid=valid, details=self._details(view)) if tokens else None,
        )

    def _rows(self, batch: Batch) -> _Rows:
        """Divide a step's rows among ranks, and this rank's into micro-batches."""
        share = Share(ranks=self.ranks, rows=len(batch.input_ids))
        on_host = share.batch(batch)
        own = on_host.to(self.device)
        targets = align_targets(own, self.model.horizon)
        parts = []
        for start in range(0, share.count, self.micro_batch_size):
            place = slice(start, min(start + self.micro_batch_size, share.count))
            # counted on the CPU, so that a GPU is never asked how many predictions there are
            host_targets = align_targets(on_host.rows(place.start, place.stop), self.model.horizon)
            parts.append(
                _MicroBatch(
                    place=place,
                    batch=own.rows(place.start, place.stop),
                    targets=Targets(ids=targets.ids[place], valid=targets.valid[place]),
                    valid_counts=host_targets.valid.sum((0, 1)).tolist(),
                    last=place.stop == share.count,
                )
            )
        alone = self.ranks.world_size == 1
        whole = own if alone else batch.to(self.device)
        return _Rows(
            share=share,
            packed=batch.packed,
            batch=whole,
            targets=targets if alone else align_targets(whole, self.model.horizon),
            micro_batches=parts,
        )

    def _survey(self, rows: _Rows, stage: Stage) -> _Statistics:
        """Collect what the trainer asks for, over the whole step.

        That is token losses, entropy and observations.

        With one micro-batch its only forward pass serves both phases. With several, the statistics of all are needed before the
        gradient of any, so what a trainer asks for costs a forward pass of its own, without gradient.
        """
        if len(rows.micro_batches) == 1:
            (part,) = rows.micro_batches
            kept = self._forward(part, rows.packed, stage)
            precomputed = self._token_pass(part, kept[0]) if self._needs_statistics else None
            return self._gathered(rows, [kept[1]], [] if precomputed is None else [precomputed], kept, precomputed)
        if not self._needs_statistics and type(self.trainer).observe is Trainer.observe and not self._balances(stage):
            return _Statistics()
        observed, passes = [], []
        with torch.no_grad():
            for part in rows.micro_batches:
                output, values = self._forward(part, rows.packed, stage)
                observed.append(values)
                if self._needs_statistics:
                    passes.append(self._token_pass(part, output))
        return self._gathered(rows, observed, passes)

    def _gathered(
        self,
        rows: _Rows,
        observed: Sequence[Mapping[str, Tensor]],
        passes: Sequence[TokenPass],
        kept: tuple[MTPOutput, dict[str, Tensor]] | None = None,
        precomputed: TokenPass | None = None,
    ) -> _Statistics:
        """Join the statistics of all micro-batches and ranks.

        A trainer sees the rows of all.
        """
        entropies = [found.entropy for found in passes if found.entropy is not None]
        return _Statistics(
            losses=rows.share.gather(_joined([found.losses for found in passes])) if passes else None,
            entropy=rows.share.gather(_joined(entropies)) if entropies else None,
            observations={
                name: rows.share.gather(_joined([values[name].detach() for values in observed])) for name in observed[0]
            },
            kept=kept,
            precomputed=precomputed,
        )

    def _view(self, rows: _Rows, statistics: _Statistics, step: int, stage: Stage) -> StepView:
        """Show the step to the trainer."""
        return StepView(
            batch=rows.batch,
            targets=rows.targets,
            token_loss=statistics.losses if self.trainer.needs_token_loss else None,
            entropy=statistics.entropy,
            observations={
                name: value for name, value in statistics.observations.items() if name not in (PROBABILITIES, CHOICES)
            },
            step=step,
            stage=stage.name,
            generator=torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63),
            vocab_size=self.model.vocab_size,
        )

    def _weights(self, view: StepView, stage: Stage) -> tuple[Tensor, bool]:
        """Ask for weights ``[B, S, H]``; tell whether they are surely uniform."""
        if not stage.model_loss:
            return view.targets.valid.float(), True
        given, weights = checks.given_weights(self.trainer, view, self.trainer_name)
        if view.batch.scale is None:
            return weights, view.is_uniform(given)
        return weights * view.by_prediction(view.batch.scale), False

    def _auxiliary(
        self, view: StepView, statistics: _Statistics
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Ask for auxiliary losses; differentiate them by each observation.

        Returns the terms by name, the gradients by observation, and the router's metrics.
        """
        leaves = {name: value.detach().clone() for name, value in statistics.observations.items()}
        for leaf in leaves.values():
            leaf.requires_grad_(leaf.is_floating_point())
        with torch.enable_grad():
            own = {name: leaves[name] for name in view.observations}
            terms = dict(checks.auxiliary_losses(self.trainer, evolve(view, observations=own), self.trainer_name))
            of_router: dict[str, Tensor] = {}
            if self._router is not None and PROBABILITIES in leaves:
                balance, of_router = self._router.balance(leaves, view.batch.document != PADDING)
                terms["router"] = self._router.weight * balance
            learned = [term.reshape(()) for term in terms.values() if term.requires_grad]
            if learned:
                # every rank computes these terms, and their gradients of parameters are added up over the ranks
                (torch.stack(learned).sum() / self.ranks.world_size).backward()
        slopes = {name: leaf.grad * self.ranks.world_size for name, leaf in leaves.items() if leaf.grad is not None}
        return {name: term.detach().reshape(()) for name, term in terms.items()}, slopes, of_router

    def _balances(self, stage: Stage) -> bool:
        """Tell whether a stage's loss includes the router's balance."""
        return self._router is not None and stage.model_loss

    def _forward(
        self, part: _MicroBatch, packed: bool, stage: Stage, *, observe: bool = True
    ) -> tuple[MTPOutput, dict[str, Tensor]]:
        """Run a micro-batch through the model; let the trainer observe it."""
        batch = part.batch
        if self.sharding is not None:
            self.sharding.micro_batch(self.model, last=part.last)
        run = self.model if self.recorded is None else self.recorded
        with self.autocast():
            output = run(batch.input_ids, batch.position, packed, router_logits=observe and self._balances(stage))
        if not observe:
            return output, {}
        view = HiddenView(
            batch=batch,
            targets=part.targets,
            packed=packed,
            stage=stage.name,
            trunk=output.trunk,
            hidden=output.hidden,
            unembeddings=self._unembeddings(),
        )
        with self.autocast():
            observed = dict(checks.observed(self.trainer, view, self.trainer_name))
            if self._router is not None and self._balances(stage):
                observed |= self._router.observe(output.router_logits, batch.input_ids.shape)
        return output, observed

    def _token_pass(self, part: _MicroBatch, output: MTPOutput) -> TokenPass:
        """Compute a micro-batch's token losses, without gradient.

        With the entropy, where that is asked for.
        """
        with self.autocast():
            return token_pass(
                output.hidden,
                self._unembeddings(),
                part.targets.ids,
                part.targets.valid,
                entropy=self.trainer.needs_entropy,
                top_k=self.trainer.entropy_top_k,
                valid_counts=part.valid_counts,
                fp8=self.fp8_logits,
            )

    def _loss(
        self, part: _MicroBatch, output: MTPOutput, coefficients: Tensor, statistics: _Statistics, at_most: int | None
    ) -> tuple[Tensor, Tensor, HeadLoss | None]:
        """Compute a micro-batch's weighted loss, token losses, and agreement of heads 2..H."""
        # where all token losses are known, only the predictions that teach something are computed again
        computed = part.targets.valid if statistics.losses is None or statistics.precomputed is not None else coefficients != 0
        given = output.hidden, self._unembeddings(), part.targets.ids, coefficients, computed
        told = {"precomputed": statistics.precomputed, "at_most": at_most, "valid_counts": part.valid_counts}
        with self.autocast():
            if self._objective is None:
                return *weighted_cross_entropy(*given, **told, fp8=self.fp8_logits), None
            found = weighted_head_loss(*given, self._objective, **told)
        return found.loss, found.agreement.token_losses, found

    @property
    def _needs_statistics(self) -> bool:
        return self.trainer.needs_token_loss or self.trainer.needs_entropy

    def _unembeddings(self) -> list[Unembedding]:
        return [self.model.unembedding(k) for k in range(1, self.model.horizon + 1)]

    def _whole_parameters(self) -> list[nn.Parameter]:
        """List parameters that every rank holds whole.

        Their gradients must be added up.
        """
        modules = (self.model, *self.trainer.modules().values())
        parameters = [parameter for module in modules for parameter in module.parameters()]
        if self.master_weights is not None:
            parameters = self.master_weights.replace(parameters)
        return [parameter for parameter in parameters if not isinstance(parameter, DTensor)]

    def _metrics(
        self,
        loss: Tensor,
        auxiliary: Mapping[str, Tensor],
        losses: Tensor,
        weights: Tensor,
        eligible: Tensor,
        *measured: AgreementSums | PredictionSums | None,
    ) -> dict[str, Tensor | float]:
        """Gather the step's metrics, the trainer's own among them."""
        metrics: dict[str, Tensor | float] = {"loss": loss}
        metrics |= head_statistics(torch.where(eligible, losses, 0.0), weights, eligible)
        metrics |= weight_statistics(weights, eligible)
        for sums in measured:
            if sums is not None:
                metrics |= sums.means()
        metrics |= {f"auxiliary/{name}": value for name, value in auxiliary.items()}
        metrics |= checks.checked_metrics(self.trainer, self.trainer_name, metrics)
        return metrics

    def _source_losses(self, on_host: Batch, batch: Batch, losses: Tensor, eligible: Tensor) -> dict[str, Tensor | float]:
        """Average head 1's losses by data set; NaN for absent ones."""
        if not self.sources:
            return {}
        numbers = torch.tensor([self.sources.index(document.source) for document in on_host.documents])
        if self.device.type == "cuda":
            numbers = numbers.pin_memory()  # else the copy would wait for the device
        of = numbers.to(self.device, non_blocking=True)[batch.document.clamp(min=0)]
        found = {}
        for number, name in enumerate(self.sources):
            own = eligible[..., 0] & (of == number)
            found[f"source_loss/{name}"] = (
                torch.where(own, losses[..., 0], 0.0).to(statistics_dtype(self.device)).sum() / own.sum()
            )
        return found

    @torch.no_grad()
    def _details(self, view: StepView) -> dict[str, Tensor]:
        """Ask for the trainer's numbers of single tokens."""
        return checks.token_details(self.trainer, view, self.trainer_name)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))

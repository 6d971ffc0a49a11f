"""Compiled layers on two ranks, from stage to stage, against one eager process: run by test_distributed.py in each of two."""

import sys
from functools import partial
from pathlib import Path

import torch
from attrs import evolve
from torch.distributed.fsdp import FSDPModule

sys.path.insert(0, str(Path(__file__).parent))
from steps import SHAPE, one_process_group, set_up, step_loss

from wmtp.config.schema import FsdpConfig, HeadsConfig
from wmtp.devices import autocast_context
from wmtp.distributed.ranks import SINGLE_PROCESS
from wmtp.models.acceleration import compile_layers
from wmtp.models.build import build_model
from wmtp.models.sharding import Sharding, spread
from wmtp.optim.config import AdamW
from wmtp.optim.master_weights import MasterWeights
from wmtp.testing.steps import random_step
from wmtp.trainers import Stage
from wmtp.training.stages import apply_stage
from wmtp_algos import BaselineMTP

CPU = torch.device("cpu")
STAGES = (Stage(name="head-warmup", frozen=frozenset({"model"})), Stage())


def make(tied):
    loaded = evolve(SHAPE, tie_embeddings=tied).build().load(None, dtype=torch.float32, seed=1)
    return build_model(loaded, HeadsConfig(horizon=2, init="random"), 5).eval()


def train(model, ranks, precision, sharding, masters):
    """Two steps in each stage: their losses, and what moved of the final norm in each."""
    trainer = BaselineMTP().build()
    set_up(trainer, model)
    loss = evolve(
        step_loss(model, trainer, ranks, 99),
        autocast=autocast_context(precision, CPU),
        sharding=sharding,
        master_weights=masters,
    )
    named = list(model.named_parameters())
    if masters is not None:
        names, parameters = zip(*named, strict=True)
        named = list(zip(names, masters.replace(parameters), strict=True))
    optimizer = AdamW(lr=1e-2, eps=1e-3).build(named)
    if masters is not None:
        optimizer = masters.take_over(optimizer)
    norm = next(p for name, p in named if name == "base.model.norm.weight")
    losses, moved = [], []
    for stage in STAGES:
        if sharding is None:
            apply_stage(stage, model, {}, "tested")
        else:
            with sharding.other_parameters_learn(model):
                apply_stage(stage, model, {}, "tested")
        before = norm.detach().clone()
        for number in range(2):
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss(random_step(number, packed=True, rows=4).batch, number, stage).loss))
            optimizer.step()
        difference = (norm.detach() - before).abs().sum()
        moved.append(bool((difference.full_tensor() if hasattr(difference, "full_tensor") else difference) > 0))
    return losses, moved


def all_cases(ranks):
    for tied, precision, strategy in (
        (True, "fp32", "full"),
        (True, "bf16-params", "none"),
        (False, "bf16-params", "grad-op"),
    ):
        alone = make(tied)
        masters = MasterWeights(alone) if precision == "bf16-params" else None
        expected, _ = train(alone, SINGLE_PROCESS, precision, None, masters)
        torch._dynamo.reset()
        fsdp = FsdpConfig(strategy=strategy)
        model = spread(lambda tied=tied: make(tied), ranks, CPU, fsdp, precision, compile_layers).eval()
        whole = not isinstance(model, FSDPModule)
        masters = MasterWeights(model, one_pass=False) if whole and precision == "bf16-params" else None
        losses, moved = train(model, ranks, precision, Sharding(config=fsdp), masters)
        assert moved == [False, True], (tied, precision, strategy, moved)
        torch.testing.assert_close(losses, expected, rtol=1e-4 if precision == "fp32" else 3e-2, atol=0)


if __name__ == "__main__":
    torch.compile = partial(torch.compile, backend="aot_eager")  # all but the compiler, which is slow
    with one_process_group() as everyone:
        all_cases(everyone)
        print("all equal" if everyone.is_main else "", flush=True)

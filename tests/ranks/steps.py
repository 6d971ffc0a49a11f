"""Two ranks against one, step by step: run by test_distributed.py in each of two processes.

Of trainers, kinds of head and strategies it takes a sample; with ``all`` as argument, each of them.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from attrs import evolve
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from wmtp.config.schema import FsdpConfig, HeadsConfig
from wmtp.distributed.ranks import SINGLE_PROCESS, Ranks
from wmtp.models.build import build_model
from wmtp.models.config import ScratchModel
from wmtp.models.sharding import Sharding, spread
from wmtp.optim.build import change_learning_rate
from wmtp.optim.config import AdamW, Muon
from wmtp.optim.update import clip_gradients, gradient_norm
from wmtp.plugins import load_plugins
from wmtp.testing.steps import random_step
from wmtp.tokenizers.config import Bytes
from wmtp.trainers import Stage, Trainer, TrainerSetup
from wmtp.training.stages import apply_stage
from wmtp.training.step import StepLoss
from wmtp_algos import CriticWMTP, RandomMatched, Rho1WMTP

VOCAB = 61
SHAPE = ScratchModel(vocab_size=VOCAB, hidden_size=16, layers=2, attention_heads=2, max_positions=64, intermediate_size=24)


def make_model(seed=1, block_attention=False, **heads):
    model = build_model(SHAPE.build().load(None, dtype=torch.float32, seed=seed), HeadsConfig(**{"horizon": 3} | heads), 5)
    with torch.no_grad():  # away from the symmetric start, where many mistakes do not show
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    if block_attention:
        assert model.use_block_attention()
    return model.eval()


def reference(name, *, dtype=torch.float32, device=None):
    return make_model(seed=len(name), horizon=1).to(dtype).requires_grad_(False)


class ValueHead(Trainer):
    """Everything a trainer may have: a module, observations with a gradient, parameters that only a loss of its own uses."""

    needs_token_loss = True

    def setup(self, setup):
        torch.manual_seed(7)
        self.head = torch.nn.Linear(setup.hidden_size, 1)
        self.scale = torch.nn.ParameterDict({"scale": torch.nn.Parameter(torch.ones(3))})

    def modules(self):
        return {"value": self.head, "scale": self.scale}

    def observe(self, view):
        likely = view.each_prediction(lambda chunk: chunk.logits.softmax(-1).gather(1, chunk.ids[:, None])[:, 0], chunk=7)
        return {
            "value": self.head(view.trunk.float()).squeeze(-1),
            "place": view.trunk.float().sum(-1).detach(),
            "likely": likely,
        }

    def token_weights(self, view):
        value = view.observations["value"]
        # needs the whole batch, its order and the losses
        by_token = ((value - value.mean()).exp() + view.token_loss.mean(-1).cumsum(0)) * (view.observations["place"] > 0)
        return by_token.unsqueeze(-1) * (2 - view.observations["likely"])

    def auxiliary_losses(self, view):
        value = view.observations["value"]
        return {"size": value.square().mean(), "own": self.scale["scale"].square().sum()}


OPTIONS = {
    "rho1-wmtp": [{"mode": "token-skip", "scope": "batch"}, {"mode": "weighted", "scope": "sequence"}],
    "random-matched": [{"of": Rho1WMTP(mode="weighted")}],
    "shuffled": [{"of": Rho1WMTP(mode="weighted")}],
}


def set_up(trainer, model):
    trainer.setup(
        TrainerSetup(
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
            horizon=model.horizon,
            device=torch.device("cpu"),
            seed=0,
            tokenizer=Bytes().build(None),
            model=reference,
            token_numbers=None,
        )
    )


def step_loss(model, trainer, ranks, micro):
    return StepLoss(
        model=model,
        trainer=trainer,
        trainer_name="tested",
        micro_batch_size=micro,
        normalizer="sum_w",
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        seed=4,
        ranks=ranks,
    )


def one_step(model, trainer, ranks, *, step, rows, micro, stage, sharding=None, optimizer="adamw"):
    """The loss, every gradient, and every parameter after one optimizer step, all whole."""
    set_up(trainer, model)
    modules = dict(trainer.modules())
    apply_stage(stage, model, modules, "tested")
    loss = evolve(step_loss(model, trainer, ranks, micro), sharding=sharding)
    batch = step.batch.rows(0, rows)
    output = loss(batch, 3, stage)
    named = [*model.named_parameters(), *((f"{n}.{k}", p) for n, m in modules.items() for k, p in m.named_parameters())]
    learned = [p for _, p in named if p.grad is not None]
    config = AdamW(lr=1e-2, eps=1e-3) if optimizer == "adamw" else Muon(lr=1e-2, eps=1e-3)
    optimizer = config.build(named)
    norm = gradient_norm(learned)
    clip_gradients(optimizer, learned, 0.5, norm)
    gradients = {name: whole(p.grad) for name, p in named if p.grad is not None}
    change_learning_rate(optimizer, [p for module in modules.values() for p in module.parameters()], lambda lr: lr)
    optimizer.step()
    metrics = {name: torch.as_tensor(value).double() for name, value in output.metrics.items()}
    return metrics | {"norm": norm.double()}, gradients, {name: whole(p) for name, p in named}


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def compare(case, ranks, make_trainer, strategy, *, heads=None, packed=False, rows=5, micro=99, stage=None, optimizer="adamw"):
    step = random_step(len(case) % 7, packed=packed, rows=5)
    arguments = {"step": step, "rows": rows, "micro": micro, "stage": stage or Stage(), "optimizer": optimizer}
    expected = one_step(make_model(**heads or {}), make_trainer(), SINGLE_PROCESS, **arguments)
    fsdp = FsdpConfig(strategy=strategy, reduce_every_micro_batch=rows % 2 == 0)
    model = spread(lambda: make_model(**heads or {}), ranks, torch.device("cpu"), fsdp, "fp32").eval()
    assert isinstance(model, FSDPModule) == (strategy != "none")
    found = one_step(model, make_trainer(), ranks, sharding=Sharding(config=fsdp), **arguments)
    for what, left, right in zip(("metric", "gradient", "parameter"), found, expected, strict=True):
        assert left.keys() == right.keys(), (case, what, left.keys() ^ right.keys())
        for name in left:
            # with a small eps Adam's first step would be the sign of gradients that are next to nothing
            tolerance = {"rtol": 1e-4, "atol": 2e-6} if what != "parameter" else {"rtol": 1e-4, "atol": 2e-5}
            if what == "parameter" and optimizer == "muon":
                tolerance["atol"] = 4e-3  # it orthogonalizes in bf16; an update is about 8e-3
            torch.testing.assert_close(
                left[name], right[name], **tolerance, equal_nan=True, msg=lambda m, n=name, w=what: f"{case}: {w} {n}: {m}"
            )


def every_trainer(ranks):
    """Compare all that are registered, by turns in each strategy and layout."""
    makers = {}
    for provided in load_plugins().of_kind("trainers"):
        for options in OPTIONS.get(provided.cls.type, [{}]):
            makers[f"{provided.cls.type} {options}"] = provided.cls(**options).build
    for number, (name, make) in enumerate(makers.items()):
        strategy = ("full", "none", "grad-op")[number % 3]
        packed = number % 2 == 1
        compare(f"{name}, {strategy}", ranks, make, strategy, packed=packed, rows=5, micro=1 if packed else 99)


def sample(ranks):
    """Compare trainers with a reference, a pool of all rows, random numbers or a module, and every kind of layer."""
    compare("rho1", ranks, Rho1WMTP(scope="batch").build, "full", rows=5, micro=1)
    compare(
        "random-matched rho1", ranks, RandomMatched(of=Rho1WMTP(mode="weighted")).build, "none", packed=True, rows=5, micro=1
    )
    for strategy, packed, rows in (("full", False, 5), ("grad-op", True, 4), ("none", False, 4), ("full", True, 1)):
        compare(f"value head, {strategy}, {rows} rows", ranks, ValueHead, strategy, packed=packed, rows=rows, micro=1)
    compare_kind("chained", ranks)
    compare("lk", ranks, ValueHead, "full", heads={"kind": "shared", "objective": "lk"}, packed=True, rows=5, micro=1)
    compare("frozen", ranks, ValueHead, "full", rows=4, micro=1, stage=Stage(frozen=frozenset({"model"})))
    critic_first(ranks)
    compare("muon", ranks, ValueHead, "full", optimizer="muon")


def compare_kind(kind, ranks):
    heads = {"kind": kind, "trunk_gradient": "detach" if kind in ("linear", "chained") else "joint", "init": "random"}
    compare(kind, ranks, ValueHead, "full", heads=heads, rows=4, micro=1)


def critic_first(ranks):
    value = Stage(name="value", frozen=frozenset({"model", "heads"}), model_loss=False)
    compare("critic's first stage", ranks, CriticWMTP().build, "full", rows=5, micro=1, stage=value)


def all_cases(ranks):
    every_trainer(ranks)
    compare("value head", ranks, ValueHead, "full", rows=5)
    for strategy in ("full", "grad-op", "none"):
        for rows in (1, 4):  # fewer than ranks
            compare(f"value head, {strategy}, {rows} rows", ranks, ValueHead, strategy, rows=rows, micro=1)
    for kind in ("linear", "residual", "chained", "shared"):
        compare_kind(kind, ranks)
    for strategy in ("full", "none"):
        lk = {"kind": "shared", "objective": "lk"}
        compare(f"lk, {strategy}", ranks, ValueHead, strategy, heads=lk, packed=True, rows=5, micro=1)
    for frozen in ({"model"}, {"heads"}, {"model", "heads"}):
        stage = Stage(frozen=frozenset(frozen), model_loss=len(frozen) == 1)
        compare(f"frozen {sorted(frozen)}", ranks, ValueHead, "full", rows=4, micro=1, stage=stage)
    critic_first(ranks)
    compare("block attention", ranks, ValueHead, "full", heads={"block_attention": True}, packed=True, rows=5, micro=2)
    compare("muon", ranks, ValueHead, "full", optimizer="muon")
    compare("muon, whole", ranks, ValueHead, "none", optimizer="muon")


@contextlib.contextmanager
def one_process_group():
    """The ranks that torchrun has started, joined by gloo."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    yield Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=int(os.environ["LOCAL_RANK"]),
        per_machine=dist.get_world_size(),
        control=dist.new_group(backend="gloo"),
        patient=dist.new_group(backend="gloo"),
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    with one_process_group() as everyone:
        (all_cases if sys.argv[1:] == ["all"] else sample)(everyone)
        print("all equal" if everyone.is_main else "", flush=True)

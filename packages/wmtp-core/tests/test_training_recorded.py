"""Recorded passes learn what the model itself learns, to the bit where kernels do.

On a CPU a recorder of the same interface takes the place of CUDA graphs (`spoiling`).
"""

import pytest
import torch
from spoiling import Spoiling
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.config.schema import DevicesConfig, Fp8Config, HeadsConfig, LoraConfig
from wmtp.data.batch import Batch, Document
from wmtp.errors import ConfigError
from wmtp.models.acceleration import accelerate
from wmtp.models.adapters import quantize_base
from wmtp.models.base import LoadedModel
from wmtp.models.build import build_model
from wmtp.models.fp8 import fp8_logits, multiply_in_fp8
from wmtp.models.low_rank_graph import join_weights
from wmtp.optim.config import AdamW
from wmtp.optim.master_weights import MasterWeights
from wmtp.trainers import Stage, Trainer, TrainerSetup
from wmtp.training import recorded
from wmtp.training.recorded import RecordedPasses
from wmtp.training.stages import apply_stage
from wmtp.training.step import StepLoss

pytest.importorskip("peft")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
WIDTH, VOCAB, LENGTH, ROWS = (512, 1024, 128, 4) if CUDA else (32, 61, 16, 4)
WARM_UP, ALL = Stage(name="warm-up", frozen=frozenset({"model"})), Stage()
KINDS = {
    "lora": {},
    "qlora": {"quantize": "nf4"},
    "fp8": {"fp8": True},
    "heads": {"lora": LoraConfig(rank=4, heads="adapters")},
}


class Observed(Trainer):
    """A value head on the trunk, which learns, and trains the trunk."""

    def setup(self, setup):
        torch.manual_seed(0)
        self.head = torch.nn.Linear(setup.hidden_size, 1).to(setup.device, torch.bfloat16)

    def modules(self):
        return {"value": self.head}

    def observe(self, view):
        return {"value": self.head(view.trunk).squeeze(-1).float()}

    def auxiliary_losses(self, view):
        return {"value": (view.observations["value"] - 1).square().mean()}


class Run:
    """A small model with adapters, ready for steps."""

    def __init__(
        self, *, graphs, micro=ROWS, trainer=None, mode="none", fp8=False, quantize=None, lora=None, layers=2, **heads
    ):
        torch.manual_seed(0)
        shape = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, max_position_embeddings=256, **shape)
        base = LlamaForCausalLM(config).to(torch.bfloat16).to(DEVICE).eval()
        heads = HeadsConfig(**{"horizon": 3} | heads)
        model = build_model(LoadedModel(model=base), heads, 0, lora=lora or LoraConfig(rank=4), quantize=quantize)
        self.model = model.to(DEVICE)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():  # away from a start at which half of the adapter has no gradient
            if "lora_B" in name:
                parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.02
        quantize_base(model, DEVICE)
        kind = (
            {"precision": "fp8", "fp8": Fp8Config(emulate=not CUDA, min_features=16)} if fp8 else {"precision": "bf16-params"}
        )
        devices = DevicesConfig(activation_checkpointing=mode, compile=CUDA, **kind)
        apply_stage(ALL, model, {}, "mine")
        multiply_in_fp8(model, devices)
        self.masters = MasterWeights(model, fixed=model.fixed_parameters())
        accelerate(model, devices)
        join_weights(model, devices)
        self.trainer = trainer or Trainer()
        known = {"hidden_size": model.hidden_size, "vocab_size": model.vocab_size, "horizon": model.horizon}
        nothing = {"tokenizer": None, "model": None, "token_numbers": None}
        self.trainer.setup(TrainerSetup(device=DEVICE, seed=0, **known, **nothing))
        fixed = {id(parameter) for parameter in model.fixed_parameters()}
        self.learned = [(name, p) for name, p in model.named_parameters() if id(p) not in fixed]
        owners = self.masters.replace([parameter for _, parameter in self.learned])
        modules = [p for module in self.trainer.modules().values() for p in module.parameters()]
        made = AdamW(lr=1e-3).build([(str(n), p) for n, p in enumerate([*owners, *modules])])
        self.optimizer = self.masters.take_over(made)
        make = {} if CUDA else {"make_recorder": Spoiling}
        self.passes = RecordedPasses(model, self.masters.replace, **make) if graphs else None
        self.step_loss = StepLoss(
            model=model, trainer=self.trainer, trainer_name="mine", micro_batch_size=micro, normalizer="sum_w", device=DEVICE,
            autocast=lambda: torch.autocast(DEVICE.type, dtype=torch.bfloat16), seed=4, master_weights=self.masters,
            fp8_logits=fp8_logits(devices), recorded=self.passes,
        )  # fmt: skip

    def enter(self, stage):
        apply_stage(stage, self.model, dict(self.trainer.modules()), "mine")

    def step(self, number, stage=ALL, *, rows=ROWS, length=LENGTH, packed=False):
        """Take one optimizer step; return its loss and the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        output = self.step_loss(make_batch(number, rows, length, packed), number, stage)
        owners = self.masters.replace([parameter for _, parameter in self.learned])
        found = {
            name: None if owner.grad is None else owner.grad.detach().float().clone()
            for (name, _), owner in zip(self.learned, owners, strict=True)
        }
        self.optimizer.step()
        return output.loss.detach().float(), found

    @property
    def recordings(self):
        return len(self.passes._recordings)


def make_batch(number, rows, length, packed):
    g = torch.Generator().manual_seed(number)
    ids = torch.randint(1, VOCAB, (rows, length), generator=g)
    parts = 2 if packed else 1
    position = (torch.arange(length) % (length // parts)).expand(rows, -1).contiguous()
    document = torch.arange(rows)[:, None] * parts + torch.arange(length) // (length // parts)
    return Batch(
        input_ids=ids, document=document, position=position, loss_mask=torch.ones_like(ids, dtype=torch.bool),
        weight=torch.rand(rows, length, generator=g),
        documents=[Document(index=n, start=0, id=str(n), group=str(n)) for n in range(rows * parts)],
    )  # fmt: skip


def assert_alike(one, other, *, exact=not CUDA):
    """Compare losses and gradients of steps; on a GPU some kernels add up in any order."""
    for number, ((loss, found), (expected, plain)) in enumerate(zip(one, other, strict=True)):
        close = {"rtol": 0, "atol": 0} if exact else {"rtol": 2e-3, "atol": 2e-3}
        torch.testing.assert_close(loss, expected, **close)
        assert [name for name in found if found[name] is None] == [name for name in plain if plain[name] is None]
        for name, gradient in found.items():
            if gradient is not None:
                off = float((gradient - plain[name]).norm() / plain[name].norm().clamp(min=1e-12))
                assert off <= (0 if exact else 3e-2), f"step {number}, {name}: {off}"


def both(steps=4, take=None, **options):
    """The steps of a run with recordings, and of one without."""
    results = []
    for graphs in (True, False):
        run = Run(graphs=graphs, **options)
        results.append(take(run) if take else [run.step(number) for number in range(steps)])
        if graphs:
            assert run.recordings, "nothing was recorded"
    return results


@pytest.mark.parametrize("kind", KINDS)
def test_twelve_steps_are_those_of_the_model_itself(kind):
    assert_alike(*both(12, **KINDS[kind]))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_layers_may_be_checkpointed(mode):
    assert_alike(*both(mode=mode, quantize="nf4"))


def test_gradients_of_micro_batches_are_added_up():
    assert_alike(*both(micro=1))
    assert_alike(*both(micro=3), exact=not CUDA)  # of two shapes, which share memory


@pytest.mark.parametrize("micro", [1, 3])
def test_gradients_are_copied_before_the_next_replay_overwrites_them(micro):
    """As they are, in bf16 and without a copy, a GPU's optimizer takes them."""

    def take(run):
        run.masters._keeps_half = True
        for _, parameter in run.learned:
            (owner,) = run.masters.replace([parameter])
            owner.grad_dtype = None
        run.optimizer = torch.optim.SGD([torch.zeros(1)])
        taken = []
        for number in range(4):
            for owner in run.masters.replace([parameter for _, parameter in run.learned]):
                owner.grad = None
            taken.append(run.step(number))
        return taken

    assert_alike(*both(take=take, micro=micro))


def test_what_a_trainer_observes_of_the_trunk_teaches_it():
    assert_alike(*both(trainer=Observed()))


@pytest.mark.parametrize("kind", ["linear", "residual", "chained"])
def test_every_kind_of_heads_can_be_recorded(kind):
    assert_alike(*both(kind=kind))


def test_heads_may_leave_the_trunk_alone():
    assert_alike(*both(trunk_gradient="detach"))


def test_stages_that_change_what_learns_are_recorded_anew():
    def take(run):
        taken = []
        for number in range(9):
            stage = WARM_UP if 3 <= number < 6 else ALL
            run.enter(stage)
            taken.append(run.step(number, stage))
        return taken

    recorded_steps, plain = both(take=take)
    assert_alike(recorded_steps, plain)
    assert all((gradient is None) == ("lora_" in name) for name, gradient in plain[4][1].items())


def test_results_of_earlier_passes_may_be_held():
    def take(run):
        batch = make_batch(50, ROWS, LENGTH, False).to(DEVICE)
        held = []
        taken = []
        for number in range(5):
            with run.step_loss.autocast():
                output = run.step_loss.model(batch.input_ids)
            held.append((output, output.hidden[0].float().square().mean()))
            taken.append(run.step(number))
        assert len(held) == len(taken)
        return taken

    assert_alike(*both(take=take))


def test_hidden_states_that_are_kept_stay_what_they_were():
    run = Run(graphs=True)
    kept = []
    ids = make_batch(0, ROWS, LENGTH, False).to(DEVICE).input_ids
    for number in range(4):
        with run.step_loss.autocast():
            output = run.passes((ids + number) % VOCAB)
        kept.append((output.hidden[1], output.hidden[1].detach().clone()))
        output.hidden[1].float().sum().backward()
    assert run.recordings == 1
    for tensor, copy in kept:
        assert torch.equal(tensor, copy)
        assert not tensor.isnan().any()


def test_two_models_in_one_process():
    one, other, plain = Run(graphs=True), Run(graphs=True, quantize="nf4"), Run(graphs=False, quantize="nf4")
    taken = []
    for number in range(5):
        one.step(number)
        taken.append(other.step(number))
    assert_alike(taken, [plain.step(number) for number in range(5)])
    del one
    assert_alike([other.step(5)], [plain.step(5)])


def test_evaluation_between_steps_is_the_model_itself():
    run, plain = Run(graphs=True), Run(graphs=False)
    ids = make_batch(9, ROWS, LENGTH, False).to(DEVICE).input_ids
    for number in range(4):
        assert_alike([run.step(number)], [plain.step(number)])
        with torch.no_grad(), run.step_loss.autocast():
            found, expected = run.passes(ids).hidden[0], plain.model(ids).hidden[0]
        torch.testing.assert_close(found, expected, rtol=3e-2 if CUDA else 0, atol=3e-2 if CUDA else 0)


def test_weights_that_are_loaded_in_place_count():
    """As a resume does it."""

    def take(run):
        first = [run.step(number) for number in range(3)]
        with run.masters.in_place():
            state = {name: torch.full_like(p, 0.01).detach() for name, p in run.learned}
            run.model.load_state_dict(state, strict=False)
        return [*first, *(run.step(number) for number in range(3, 6))]

    assert_alike(*both(take=take))


def test_parameters_that_have_moved_are_recorded_anew():
    def take(run):
        first = [run.step(number) for number in range(3)]
        for _, parameter in run.learned:
            parameter.data = parameter.data.clone() * 1.25
        return [*first, *(run.step(number) for number in range(3, 7))]

    assert_alike(*both(take=take))


def test_shapes_that_come_once_are_not_recorded_and_only_some_of_the_others(caplog):
    run, plain = Run(graphs=True), Run(graphs=False)
    shapes = [LENGTH // 2 + 2 * number for number in range(6)]
    with caplog.at_level("INFO", logger="wmtp"):
        for number, length in enumerate([*shapes, *shapes[:5], *shapes[:5]]):
            assert_alike([run.step(number, length=length)], [plain.step(number, length=length)])
            assert run.recordings == max(0, min(number - 5, recorded._SHAPES))
    (line,) = [record.getMessage() for record in caplog.records if "cuda_graphs" in record.getMessage()]
    assert line.endswith("more than 4 shapes come again; the others are computed without graphs")


def test_gradients_out_of_turn_are_refused():
    run = Run(graphs=True)
    ids = make_batch(0, ROWS, LENGTH, False).to(DEVICE).input_ids
    for _ in range(2):
        first = run.passes(ids)
        first.hidden[0].sum().backward()
    first, _ = run.passes(ids), run.passes(ids)
    with pytest.raises(RuntimeError, match="before the next forward pass"):
        first.hidden[0].sum().backward()
    last = run.passes(ids).hidden[0].sum()
    last.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        last.backward()


def test_packed_rows_need_block_attention():
    if CUDA:

        def take(run):
            return [run.step(number, packed=number % 2 == 0) for number in range(8)]

        assert_alike(*both(take=take))
    run = Run(graphs=True)
    run.model.block_attention = False
    with pytest.raises(ConfigError, match=r"devices\.cuda_graphs: rows of several documents.*data\.train\.packing = false"):
        run.step(0, packed=True)


def test_mixtures_of_experts_are_refused():
    run = Run(graphs=True)
    with pytest.raises(ConfigError, match=r"devices\.cuda_graphs: this model is a mixture of experts"):
        run.passes(torch.ones((1, 4), dtype=torch.int64, device=DEVICE), router_logits=True)


def test_a_recording_that_fails_says_why():
    run = Run(graphs=True)
    run.step(0)
    norm = run.model.anatomy.tail[0]
    handle = norm.register_forward_hook(lambda _, __, hidden: hidden * float(hidden.float().abs().max()))
    if not CUDA:  # whose recorder would not mind
        handle.remove()
        norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("operation not permitted")))
    with pytest.raises(ConfigError, match=r"devices\.cuda_graphs: the model's passes cannot be recorded: .*not permitted"):
        run.step(1)
    handle.remove()
    if CUDA:  # the process goes on
        fresh, plain = Run(graphs=True), Run(graphs=False)
        assert_alike([fresh.step(n) for n in range(3)], [plain.step(n) for n in range(3)])

"""Conversations under every trainer: weights where an assistant speaks, nowhere else, for every head, packed and padded."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from chat_tokenizers import TEMPLATES, chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.config.schema import Config, DataConfig, HeadsConfig, ModelConfig, RunConfig, TrainDataConfig
from wmtp.data.batch import PADDING, align_targets
from wmtp.data.batches import StepBatches
from wmtp.data.config import Chat
from wmtp.data.prepare import prepare_data
from wmtp.models.build import build_model
from wmtp.models.config import ScratchModel
from wmtp.testing import TrainerTests
from wmtp.testing.steps import HIDDEN_SIZE, HORIZON, Step, make_view
from wmtp.tokenizers.bytes import BytesTokenizer
from wmtp.trainers.checks import given_weights
from wmtp_algos import (
    DFT,
    EAFT,
    AdaMTP,
    BaselineMTP,
    CriticWMTP,
    EntropyTop,
    Focal,
    HorizonDecay,
    RandomMatched,
    Rho1WMTP,
    Shuffled,
    SSToken,
)

TEMPLATE = (
    "{% for m in messages %}{{ '[' ~ m.role ~ ']' ~ m.content ~ '.' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TRAINERS = [
    *(BaselineMTP(), DFT(), EAFT(), Focal(), EntropyTop(), HorizonDecay(), AdaMTP()),
    *(RandomMatched(of=DFT()), Shuffled(of=DFT())),
]


def batches(folder, *, packing):
    conversations = [
        [
            (role, f"{role[0]}{number}{turn}" * (1 + (number + turn) % 3))
            for turn in range(1 + number % 3)
            for role in ("user", "assistant")
        ]
        for number in range(9)
    ]
    path = folder / "chat.jsonl"
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in conversations]
    path.write_text("\n".join(map(json.dumps, rows)))
    train = TrainDataConfig(max_length=128, batch_size=3, packing=packing)
    config = Config(
        models={"base": ModelConfig(loader=ScratchModel(vocab_size=258))},
        trainer=BaselineMTP(),
        datasets={"chat": Chat(uri=str(path))},
        run=RunConfig(output_dir=str(folder)),
        data=DataConfig(train=train),
    )
    tokenizer = BytesTokenizer()
    tokenizer.chat_template = TEMPLATE
    made = StepBatches(prepare_data(config, tokenizer, {"chat": path}).train, train, seed=0)
    answers = {
        f"chat.jsonl:{n + 1}": [text + "." for role, text in turns if role == "assistant"]
        for n, turns in enumerate(conversations)
    }
    return [made.batch(step) for step in range(made.steps_per_epoch)], answers


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.type)
def test_weights_are_where_an_assistant_speaks_and_nowhere_else(trainer, packing, tmp_path):
    made, answers = batches(tmp_path, packing=packing)
    seen = set()
    for number, batch in enumerate(made):
        draw = torch.Generator().manual_seed(number)
        shape = batch.input_ids.shape
        step = Step(
            batch=batch,
            trunk=torch.randn(*shape, HIDDEN_SIZE, generator=draw),
            token_loss=1 + torch.rand(*shape, HORIZON, generator=draw),
            entropy=1 + torch.rand(*shape, HORIZON, generator=draw),
        )
        _, weights = given_weights(trainer.build(), make_view(trainer.build(), step), trainer.type)
        targets = align_targets(batch, HORIZON)
        assert not weights[~targets.valid].any()
        for k in range(1, HORIZON + 1):
            for row, place in torch.nonzero(targets.valid[..., k - 1]).tolist():
                assert batch.document[row, place] == batch.document[row, place + k] != PADDING
            for index, document in enumerate(batch.documents):
                # the predictions of head k, put back where the tokens stand that they predict
                own = targets.valid[..., k - 1] & (batch.document == index)
                rows, places = torch.nonzero(own, as_tuple=True)
                learned = bytes(targets.ids[rows, places, k - 1].tolist())
                assert learned.decode() == "".join(answers[document.id])
                seen.add(document.id)
    assert seen == answers.keys()


# random conversations, under templates of every kind

ENDS = {"chatml": "<|im_end|>", "marked": "<|im_end|>", "inst": "</s>", "end-of-text": "<|end|>"}
EVERY = [
    *TRAINERS,
    *(CriticWMTP(), CriticWMTP(train_on="all", value_learns=True), Shuffled(of=CriticWMTP())),
    *(SSToken(), Rho1WMTP(mode="weighted"), Rho1WMTP(keep=0.3), RandomMatched(of=Rho1WMTP(mode="token-skip"))),
]
# no surrogates, and nothing that reads as a special token
said = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r<[|"), min_size=1, max_size=30).filter(str.strip)
turns = st.lists(st.tuples(said, said), min_size=1, max_size=3)


@cache
def tokenizer_of(kind):
    with TemporaryDirectory() as folder:
        return chat_tokenizer(folder, TEMPLATES[kind], "</s>", "<s>" if kind == "inst" else None)


@cache
def trainer_of(number, vocab_size):
    """One of `EVERY`, set up."""

    class Made(TrainerTests):
        config = EVERY[number]

        def make_model(self, name):
            shape = {"hidden_size": 8, "layers": 1, "attention_heads": 1, "max_positions": 512}
            loaded = ScratchModel(vocab_size=vocab_size, **shape).build().load(None, dtype=torch.float32, seed=1)
            return build_model(loaded, HeadsConfig(horizon=1), 0).eval().requires_grad_(False)

    return Made().make_trainer()


def check_conversations(kind, conversations, number, packing, seed):
    """Learned tokens, decoded, are what assistants say and the end of their turns, for every head; no other has a weight."""
    tokenizer = tokenizer_of(kind)
    rows, wanted = [], {}
    for index, pairs in enumerate(conversations):
        messages = [
            {"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        rows.append({"messages": messages, "is_correct": index % 2 == 0, "id": str(index)})
        wanted[str(index)] = "".join(answer + ENDS[kind] for _, answer in pairs)
    train = TrainDataConfig(max_length=512, batch_size=3, packing=packing)
    with TemporaryDirectory() as folder:
        path = Path(folder, "chat.jsonl")
        path.write_text("\n".join(map(json.dumps, rows)))
        config = Config(
            models={"base": ModelConfig(loader=ScratchModel(vocab_size=tokenizer.vocab_size))},
            trainer=BaselineMTP(),
            datasets={"chat": Chat(uri=str(path))},
            run=RunConfig(output_dir=folder),
            data=DataConfig(train=train),
        )
        made = StepBatches(prepare_data(config, tokenizer, {"chat": path}).train, train, seed=seed)
        batches = [made.batch(step) for step in range(made.steps_per_epoch)]
    trainer = trainer_of(number, tokenizer.vocab_size)
    (stage,) = trainer.stages()[-1:]
    seen = set()
    for step, batch in enumerate(batches):
        shape, draw = batch.input_ids.shape, torch.Generator().manual_seed(seed + step)
        inputs = Step(
            batch=batch,
            trunk=torch.randn(*shape, HIDDEN_SIZE, generator=draw),
            token_loss=1 + torch.rand(*shape, HORIZON, generator=draw),
            entropy=1 + torch.rand(*shape, HORIZON, generator=draw),
        )
        _, weights = given_weights(trainer, make_view(trainer, inputs, stage=stage.name), EVERY[number].type)
        targets = align_targets(batch, HORIZON)
        for index, document in enumerate(batch.documents):
            inside = batch.document == index
            tokens, loss_mask = batch.input_ids[inside].tolist(), batch.loss_mask[inside].tolist()
            answers = [token for token, on in zip(tokens, loss_mask, strict=True) if on]
            assert tokenizer._backend.decode(answers, skip_special_tokens=False) == wanted[document.id]
            for k in range(HORIZON):
                own = inside & targets.valid[..., k]
                # a prompt is before every answer, so that each head learns all of it
                assert targets.ids[..., k][own].tolist() == answers
                assert not weights[..., k][inside & ~own].any()
            seen.add(document.id)
        assert not weights[batch.document == PADDING].any()
    assert seen == wanted.keys()


CASES = {
    "kind": st.sampled_from(sorted(TEMPLATES)),
    "conversations": st.lists(turns, min_size=2, max_size=5),
    "number": st.integers(0, len(EVERY) - 1),
    "packing": st.booleans(),
    "seed": st.integers(0, 99),
}


@settings(max_examples=10, deadline=None)
@given(**CASES)
def test_every_trainer_weighs_nothing_but_what_assistants_say(kind, conversations, number, packing, seed):
    check_conversations(kind, conversations, number, packing, seed)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(EVERY)), ids=lambda number: f"{number}-{EVERY[number].type}")
@settings(max_examples=60, deadline=None)
@given(**{name: case for name, case in CASES.items() if name != "number"})
def test_each_trainer_weighs_nothing_but_what_assistants_say(number, kind, conversations, packing, seed):
    check_conversations(kind, conversations, number, packing, seed)

"""Conversations under every trainer: weights where an assistant speaks, nowhere else, for every head, packed and padded."""

import json

import pytest
import torch

from wmtp.config.schema import Config, DataConfig, ModelConfig, RunConfig, TrainDataConfig
from wmtp.data.batch import PADDING, align_targets
from wmtp.data.batches import StepBatches
from wmtp.data.config import Chat
from wmtp.data.prepare import prepare_data
from wmtp.models.config import ScratchModel
from wmtp.testing.steps import HIDDEN_SIZE, HORIZON, Step, make_view
from wmtp.tokenizers.bytes import BytesTokenizer
from wmtp.trainers.checks import given_weights
from wmtp_algos import DFT, EAFT, AdaMTP, BaselineMTP, EntropyTop, Focal, HorizonDecay, RandomMatched, Shuffled

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

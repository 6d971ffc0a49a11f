"""Data prepared from small files, without a model."""

import json

import attrs

from wmtp.config.schema import Config, DataConfig, ModelConfig, RunConfig, TrainDataConfig
from wmtp.data.config import Jsonl
from wmtp.data.prepare import prepare_data
from wmtp.data.tokenized import CONTEXT, LEARNED, NEVER, Segment, TokenizedExample
from wmtp.plugins.contract import ModelLoaderConfig, TrainerConfig
from wmtp.tokenizers.bytes import BytesTokenizer


@attrs.frozen(kw_only=True)
class Unused(TrainerConfig):
    type = "unused"

    def build(self):
        raise AssertionError("data preparation builds no model and no trainer")


@attrs.frozen(kw_only=True)
class UnusedModel(ModelLoaderConfig):
    type = "unused"

    build = Unused.build


class CountingTokenizer(BytesTokenizer):
    def __init__(self):
        self.calls = 0

    def encode(self, text):
        self.calls += 1
        return super().encode(text)


def tokenized_pair(tokens, *, begin, prompt, weights=None):
    """A document of ``begin`` begin tokens, ``prompt`` tokens of a prompt, and a completion."""
    parts = (Segment(begin, NEVER), Segment(prompt, CONTEXT), Segment(len(tokens) - begin - prompt, LEARNED))
    return TokenizedExample(tokens=tokens, segments=[part for part in parts if part.length], weights=weights)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepare(tmp_path, datasets, paths, tokenizer=None, *, evaluation=None, seed=0, **train):
    config = Config(
        models={"base": ModelConfig(loader=UnusedModel())},
        trainer=Unused(),
        datasets=datasets,
        run=RunConfig(output_dir=str(tmp_path / "runs"), seed=seed),
        data=DataConfig(train=TrainDataConfig(**train), eval=evaluation),
    )
    return prepare_data(config, tokenizer or BytesTokenizer(), paths)


def prepare_file(tmp_path, path, tokenizer=None, **options):
    return prepare(tmp_path, {"d": Jsonl(uri=str(path))}, {"d": path}, tokenizer, **options)


def texts(dataset):
    tokenizer = BytesTokenizer()
    return [tokenizer.decode(dataset.document(number).tokens.tolist()) for number in range(len(dataset))]


PAIRS = [{"prompt": f"q{n} ", "completion": f"answer {n}", "group": f"p{n // 3}"} for n in range(30)]

"""``wmtp generate`` and ``wmtp.load_model(...).generate`` on a saved model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import wmtp
from wmtp.cli import main
from wmtp.config.schema import HeadsConfig
from wmtp.models.mtp import MTPModel
from wmtp.tokenizers.bytes import BytesTokenizer

LLAMA = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def _save(folder: Path, horizon: int = 3, **changes: int) -> Path:
    torch.manual_seed(0)
    model = MTPModel(LlamaForCausalLM(LlamaConfig(**LLAMA | changes)).eval(), HeadsConfig(horizon=horizon), seed=0)
    model.save_pretrained(folder)
    BytesTokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("models") / "model")


def test_text_and_json_with_and_without_speculation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for extra in ([], ["--speculative"]):
        command = ["generate", str(folder), "--prompt", "def f", "--max-new-tokens", "20", "--device", "cpu", *extra]
        assert main([*command, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
        assert main(command) == 0
        assert capsys.readouterr().out == answers[-1]["text"] + "\n"
    assert answers[0]["tokens"] == answers[1]["tokens"]
    assert answers[1]["tokens_per_forward"] >= answers[0]["tokens_per_forward"] == 1
    python = wmtp.load_model(folder).generate("def f", max_new_tokens=20, speculative=True)
    assert (str(python), list(python.tokens)) == (answers[0]["text"], answers[0]["tokens"])


def test_compiling_where_nothing_can_be_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "--prompt", "def f", "--device", "cpu", "--compile"]) == 2
    assert "error: --compile: decoding is compiled on a CUDA device only, and the model is on cpu" in capsys.readouterr().err


def test_prompts_that_are_no_text_are_refused_and_an_editors_mark_is_left_out(folder: Path, tmp_path: Path, capsys) -> None:
    file, command = tmp_path / "prompt.txt", ["generate", str(folder), "--max-new-tokens", "1", "--device", "cpu", "--json"]
    file.write_bytes(b"caf\xe9")
    for prompt in (["--prompt-file", str(file)], ["--prompt", "caf\udce9"], ["--prompt", "a", "--stop", "\udce9"]):
        assert main([*command, *prompt]) == 2
        assert "is not UTF-8 text" in capsys.readouterr().err
    file.write_bytes(b"\xef\xbb\xbfdef f")
    assert main([*command, "--prompt-file", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "def f"


def test_prompts_from_a_file_and_stop(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("def f", encoding="utf-8")
    common = ["--max-new-tokens", "20", "--json"]
    assert main(["generate", str(folder), "--prompt-file", str(file), *common]) == 0
    whole = json.loads(capsys.readouterr().out)["text"]
    stop = next(character for character in whole[3:] if character.isascii())
    assert main(["generate", str(folder), "--prompt", "def f", "--stop", stop, *common]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == whole[: whole.index(stop)]


def test_python_takes_ids_and_several_prompts(folder: Path) -> None:
    model = wmtp.load_model(folder)
    texts = model.generate(["ab", "abc"], max_new_tokens=5)
    ids = [[257, *b"ab"], [257, *b"abc"]]
    assert [row.tokens for row in model.generate(ids, max_new_tokens=5)] == [row.tokens for row in texts]
    assert model.generate(torch.tensor(ids[0]), max_new_tokens=5).tokens == texts[0].tokens
    sampled = [model.generate("ab", max_new_tokens=9, temperature=1.0, top_p=0.9, seed=seed).tokens for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(wmtp.ConfigError, match="temperature"):
        model.generate("ab", temperature=-1.0)


def _fails(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()  # progress bars of what was saved before
    assert main(["generate", *command, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_mistakes_are_one_line_each(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no extra heads (H = 1)" in _fails(capsys, str(_save(tmp_path / "plain", 1)), "--prompt", "a", "--speculative")
    assert "the prompt has 101 tokens, and the model's context is 64" in _fails(capsys, str(folder), "--prompt", "a" * 100)
    assert "either --prompt TEXT or --prompt-file FILE" in _fails(capsys, str(folder))
    assert "no such run, model folder or .gguf file" in _fails(capsys, str(tmp_path / "none"), "--prompt", "a")
    other = _save(tmp_path / "other", 1, vocab_size=200)
    assert "the model has a vocabulary of 200, the tokenizer one of 258" in _fails(capsys, str(other), "--prompt", "a")
    assert "top_p" in _fails(capsys, str(folder), "--prompt", "a", "--temperature", "1", "--top-p", "0")


def test_nothing_of_transformers_own_is_said(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No deprecations of names that were renamed, and no bar for a file that is written."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wmtp.generate(folder, "def", max_new_tokens=2)
        wmtp.export(folder, tmp_path / "out", format="hf")
    assert [str(warning.message) for warning in caught if issubclass(warning.category, FutureWarning)] == []
    assert capfd.readouterr().err == ""

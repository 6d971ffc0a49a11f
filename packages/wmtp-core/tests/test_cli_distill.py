"""``wmtp distill-data``: what a model says to prompts, as data that a run reads."""

import json

import pytest
from chat_tokenizers import CHATML
from test_cli_generate import _save

import wmtp
from wmtp.actions import distill
from wmtp.cli import main
from wmtp.data.config import Chat, Jsonl

PROMPTS = [
    {"id": "a", "prompt": "def f"},
    {"prompt": "x = 1"},
    {"prompt": "y" * 100},  # longer than the model's context
    {"id": "d", "prompt": "import"},
]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "go on"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return _save(tmp_path_factory.mktemp("models") / "model", 1)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = _save(tmp_path_factory.mktemp("models") / "chat", max_position_embeddings=160)
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return folder


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_those_of_generate_and_a_data_set_reads_them(model, tmp_path, capsys):
    prompts, output = written(tmp_path / "p.jsonl", PROMPTS), tmp_path / "new" / "d.jsonl"
    command = ["distill-data", str(model), str(prompts), "--output", str(output), "--max-new-tokens", "12", "--batch-size", "2"]
    assert main([*command, "--device", "cpu", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["written"], done["found"], done["too_long"], done["dataset"]) == (3, 0, 1, "jsonl")
    found = lines(output)
    assert [(line["index"], line["id"]) for line in found] == [(0, "a"), (1, "p.jsonl:2"), (3, "d")]
    opened = wmtp.load_model(model)
    for line in found:
        answer = opened.generate(line["prompt"], max_new_tokens=12)
        assert (line["completion"], line["finish"]) == (str(answer), answer.finish)
    examples = list(Jsonl(uri=str(output)).build().examples(output))
    assert [(example.prompt, example.completion) for example in examples] == [(x["prompt"], x["completion"]) for x in found]
    assert main([*command, "--device", "cpu"]) == 0
    assert lines(output) == found, "nothing is answered twice"


def test_a_sampled_answer_depends_on_its_prompt_not_on_the_batch(model, tmp_path):
    prompts = written(tmp_path / "p.jsonl", PROMPTS)
    options = {"max_new_tokens": 12, "temperature": 1.0, "device": "cpu"}
    texts = []
    for size in (1, 3):
        wmtp.distill_data(model, prompts, tmp_path / f"{size}.jsonl", batch_size=size, seed=4, **options)
        texts.append([line["completion"] for line in lines(tmp_path / f"{size}.jsonl")])
    assert texts[0] == texts[1]
    wmtp.distill_data(model, prompts, tmp_path / "other.jsonl", seed=5, **options)
    assert [line["completion"] for line in lines(tmp_path / "other.jsonl")] != texts[0]


def test_conversations_are_written_by_the_template(chat_model, tmp_path):
    prompts = written(
        tmp_path / "p.jsonl", [{"messages": [*TALK, {"role": "assistant", "content": "of the data"}]}, {"prompt": "q"}]
    )
    done = wmtp.distill_data(chat_model, prompts, tmp_path / "d.jsonl", max_new_tokens=8, device="cpu", speculative=True)
    assert done.dataset == "chat"
    opened = wmtp.load_model(chat_model)
    for line, messages in zip(lines(tmp_path / "d.jsonl"), (TALK, [{"role": "user", "content": "q"}]), strict=True):
        assert line["prompt"] == messages
        answer = opened.chat(messages, max_new_tokens=8)
        assert line["completion"] == [{"role": "assistant", "content": str(answer)}]
    first, second = Chat(uri="x").build().examples(tmp_path / "d.jsonl")
    assert (first.first_learned, second.first_learned) == (3, 1), "an answer of the data is no text of the model's own"
    plain = wmtp.distill_data(
        chat_model,
        written(tmp_path / "t.jsonl", PROMPTS),
        tmp_path / "t-out.jsonl",
        max_new_tokens=8,
        device="cpu",
        template="none",
    )
    assert plain.dataset == "jsonl"


def test_it_goes_on_behind_the_last_whole_line(model, tmp_path):
    prompts, output = written(tmp_path / "p.jsonl", PROMPTS), tmp_path / "d.jsonl"
    options = {"max_new_tokens": 6, "device": "cpu"}
    wmtp.distill_data(model, prompts, output, **options)
    whole = output.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (0, first - 3, first, first + 7, len(whole) - 1):
        output.write_bytes(whole[:cut])
        done = wmtp.distill_data(model, prompts, output, **options)
        assert output.read_bytes() == whole, cut
        assert done.written + done.found == 3


def test_an_interrupted_answer_to_a_uri_goes_on_in_the_cache_and_is_pushed_whole(model, tmp_path, monkeypatch):
    prompts, pushed = written(tmp_path / "p.jsonl", PROMPTS), []
    whole = tmp_path / "whole.jsonl"
    options = {"max_new_tokens": 6, "device": "cpu", "batch_size": 1}
    wmtp.distill_data(model, prompts, whole, **options)

    class Store:
        def check_push(self, uri):
            assert not pushed

        def push(self, path, uri):
            pushed.append((uri, path.read_bytes()))

    monkeypatch.setattr(distill, "backend_for", lambda *_, **__: Store())
    answer, asked = distill._Teacher.answer, []

    def interrupted(self, batch, **named):
        asked.extend(batch)
        if asked == [0, 1]:
            raise KeyboardInterrupt
        return answer(self, batch, **named)

    monkeypatch.setattr(distill._Teacher, "answer", interrupted)
    options["config"] = {"storage": {"cache_dir": str(tmp_path / "cache")}}
    with pytest.raises(KeyboardInterrupt):
        wmtp.distill_data(model, prompts, "s3://bucket/d.jsonl", **options)
    assert not pushed
    done = wmtp.distill_data(model, prompts, "s3://bucket/d.jsonl", **options)
    assert (done.found, done.written, asked) == (1, 2, [0, 1, 1, 3])
    assert pushed == [("s3://bucket/d.jsonl", whole.read_bytes())]


def test_mistakes_are_said_before_anything_is_written(model, tmp_path, capsys):
    prompts, output = written(tmp_path / "p.jsonl", PROMPTS), tmp_path / "d.jsonl"

    def fails(*words, model=model):
        capsys.readouterr()
        assert main(["distill-data", str(model), *map(str, words), "--device", "cpu", "--max-new-tokens", "3"]) == 2
        return capsys.readouterr().err

    bad = written(tmp_path / "bad.jsonl", [{"text": "x"}, {"prompt": "a"}, {"prompt": ""}])
    said = fails(bad, "--output", output)
    assert 'bad.jsonl:1: no "prompt" and no "messages"; the keys here are text' in said
    assert 'bad.jsonl:3: "prompt" is empty' in said
    assert "call it something.jsonl" in fails(prompts, "--output", tmp_path / "d.txt")
    assert "no extra heads (H = 1)" in fails(prompts, "--output", output, "--speculative")
    talk = written(tmp_path / "talk.jsonl", [{"messages": TALK}])
    assert "talk.jsonl:1: holds messages, which a chat template writes" in fails(talk, "--output", output)
    assert "no installed plugin" in fails(prompts, "--output", "nosuch://b/d.jsonl")
    assert not output.exists()
    output.write_text("{}\n")
    assert "is there already, and not from this command" in fails(prompts, "--output", output)
    output.unlink()
    wmtp.distill_data(model, prompts, output, max_new_tokens=3, device="cpu")
    assert "was begun with seed = 0, not 1" in fails(prompts, "--output", output, "--seed", "1")
    other = written(tmp_path / "other.jsonl", PROMPTS[:2])
    assert "was begun with prompts = 4, not 2" in fails(other, "--output", output)


def test_a_model_without_an_end_token_is_refused(model, tmp_path, capsys):
    import shutil

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    endless = tmp_path / "endless"
    shutil.copytree(model, endless, ignore=shutil.ignore_patterns("*tokenizer*"))
    vocabulary = {chr(97 + i): i for i in range(26)} | {"?": 26}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="?"))).save_pretrained(endless)
    prompts = written(tmp_path / "p.jsonl", PROMPTS[:1])
    assert main(["distill-data", str(endless), str(prompts), "--output", str(tmp_path / "d.jsonl"), "--device", "cpu"]) == 2
    assert "names no end-of-sequence token" in capsys.readouterr().err
    assert not (tmp_path / "d.jsonl").exists()


def test_the_first_batch_says_how_far_it_is(model, tmp_path, caplog, monkeypatch):
    """Before its answers are there: a large batch takes minutes."""
    monkeypatch.setattr(distill, "_FIRST_LINE", 0.0)
    monkeypatch.setattr(distill, "_LOG_SECONDS", 0.0)
    prompts = written(tmp_path / "p.jsonl", [{"prompt": "def f"}, {"prompt": "x = 1"}])
    with caplog.at_level("INFO", logger="wmtp"):
        done = wmtp.distill_data(model, prompts, tmp_path / "d.jsonl", max_new_tokens=6, batch_size=2, device="cpu")
    said = [record.getMessage() for record in caplog.records if "tokens/s" in record.getMessage()]
    assert len(said) > 1
    assert all(line.startswith("0 of 2 answers, ") for line in said)
    assert f", {done.tokens} tokens, " in said[-1]

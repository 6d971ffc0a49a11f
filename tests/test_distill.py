"""Text of the model's own, however often its making is killed, and a run that learns from it."""

import json
import time

import pytest

#: the command, which answers no more than so many prompts and then waits to be killed
HELD = """
import sys, time
from wmtp.actions.distill import _Teacher
from wmtp.cli import run_from_shell
most, answer = int(sys.argv.pop(1)), _Teacher.answer
def hold(self, batch, **options):
    while batch[0] >= most:
        time.sleep(1)
    return answer(self, batch, **options)
_Teacher.answer = hold
run_from_shell()
"""


@pytest.fixture
def made(wmtp, recipe):
    model = recipe.parent / "runs" / "first" / "model"
    done = wmtp("run", recipe, "--run-name", "first", "--set", "train.max_steps=8")
    assert done.returncode == 0, done.stderr
    prompts = recipe.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"def f{i}():\n"}) + "\n" for i in range(24)))
    return model, prompts


def test_killed_again_and_again_every_prompt_is_answered_once(made, wmtp, preloaded, recipe):
    model, prompts = made
    output, whole = recipe.parent / "d.jsonl", recipe.parent / "whole.jsonl"
    options = ["--max-new-tokens", "16", "--batch-size", "2", "--temperature", "1", "--device", "cpu"]
    for wanted in (1, 6, 12):
        process = preloaded.start(wanted + 4, "distill-data", model, prompts, "--output", output, *options, code=HELD)
        while not output.exists() or output.read_bytes().count(b"\n") < wanted:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.kill()
        process.wait()
    with output.open("ab") as file:
        file.write(b'{"index": 23, "id": "cut')  # as a crash of the machine leaves it
    again = wmtp("distill-data", model, prompts, "--output", output, *options, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["written"] < 24 - 12 + 1
    assert wmtp("distill-data", model, prompts, "--output", whole, *options).returncode == 0
    assert output.read_bytes() == whole.read_bytes()
    assert [json.loads(line)["index"] for line in output.read_text().splitlines()] == list(range(24))

    learned = recipe.parent / "learned.toml"
    text = recipe.read_text().replace("code.jsonl", "d.jsonl").replace("horizon = 3", 'horizon = 3\nobjective = "lk"')
    learned.write_text(text.replace("max_length = 64", "max_length = 64\noverlong = 'skip'"))
    done = wmtp("run", learned, "--run-name", "second", "--set", "train.max_steps=6", "--json")
    assert done.returncode == 0, done.stderr
    assert 0 <= json.loads(done.stdout)["metrics"]["eval/acceptance/head_2"] <= 1

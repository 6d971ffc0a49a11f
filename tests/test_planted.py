"""Planted-truth studies: the noise is where its labels say, and the measurements are right."""

import gzip
import json
import random
import runpy
import sys
from itertools import pairwise

import pytest
from conftest import ROOT

from wmtp.studies.config import load_study
from wmtp.studies.plan import make_plan

SCRIPTS = ROOT / "bench" / "evidence"
LINES = ["def f(x):\n", '    """Do."""\n', "    alpha = 1\n", "    beta = alpha + 22\n", "    return beta\n"]
OTHERS = ["    gamma = 333\n", "    delta(epsilon)\n"]


@pytest.fixture(scope="module")
def data():
    return runpy.run_path(str(SCRIPTS / "planted.py"))


@pytest.fixture(scope="module")
def measures():
    return runpy.run_path(str(SCRIPTS / "planted_study.py"))


@pytest.mark.parametrize("kind", ["foreign", "shuffled", "mutated", "boilerplate", "blobs"])
def test_what_is_not_planted_is_the_text_itself(data, kind):
    pieces = data["KINDS"][kind](LINES, 0.5, OTHERS, random.Random(1))
    own = "".join(text for text, planted in pieces if not planted)
    assert any(planted for _, planted in pieces)
    if kind in ("foreign", "boilerplate", "blobs"):
        assert own == "".join(LINES)
    else:
        assert all(piece in "".join(LINES) for piece, planted in pieces if not planted)
    pairs = data["joined"](pieces)
    assert "".join(text for text, _ in pairs) == "".join(text for text, _ in pieces)
    assert all(one[1] != other[1] for one, other in pairwise(pairs))


def test_foreign_lines_have_the_share_that_was_asked_for(data):
    pieces = data["foreign"](LINES * 2000, 0.4, OTHERS, random.Random(0))
    assert sum(planted for _, planted in pieces) / len(pieces) == pytest.approx(0.4, abs=0.02)


def test_the_files_are_the_same_again_and_share_no_function(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "package").mkdir()
    for number in range(20):
        functions = [f'def f{number}_{i}(x):\n    """Do {i}."""\n    return {number} * x + {i}\n\n\n' for i in range(5)]
        (tmp_path / "package" / f"m{number}.py").write_text("".join(functions))
        (tmp_path / "package" / f"p{number}").mkdir()
    found = []
    for name in ("one", "two"):
        words = ["--functions", "5", "--reference", "2", "--heldout", "1", "--shortest", "10", "--share", "0.3"]
        monkeypatch.setattr(sys, "argv", ["planted.py", str(tmp_path / name), str(tmp_path / "package"), *words])
        data["main"]()
        found.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert found[0] == found[1]
    assert set(found[0]) == {"heldout.jsonl.gz", "reference.jsonl.gz", "train-foreign-30.jsonl.gz"}
    names = [json.loads(line)["id"] for content in found[0].values() for line in gzip.decompress(content).splitlines()]
    assert len(names) == len(set(names)) == 8


def test_other_noise_is_planted_in_the_functions_of_an_earlier_file(data, tmp_path, monkeypatch, capsys):
    functions = [(f"m.py:f{i}:1", "".join(LINES).replace("f(x)", f"f{i}(x)")) for i in range(6)]
    data["write"](tmp_path / "train-foreign-40.jsonl.gz", data["noisy"](functions, "foreign", 0.4, 0))
    for kind, share in (("foreign", 0.4), ("foreign", 0.0), ("mutated", 0.5)):
        words = ["--from", str(tmp_path / "train-foreign-40.jsonl.gz"), "--kind", kind, "--share", str(share)]
        monkeypatch.setattr(sys, "argv", ["planted.py", str(tmp_path / "new"), *words])
        data["main"]()
    new, old = tmp_path / "new", tmp_path / "train-foreign-40.jsonl.gz"
    assert (new / old.name).read_bytes() == old.read_bytes()
    assert data["unplanted"](new / "train-foreign-0.jsonl.gz") == functions
    with pytest.raises(SystemExit, match="not whole"):
        data["unplanted"](new / "train-mutated-50.jsonl.gz")


def test_tokens_are_labelled_by_their_place_in_the_text(measures):
    text = "def f():\n    x = 1\n"
    planted = [place >= 9 for place in range(len(text))]
    tokens = ["<bos>", "def", " f", "():", "\n", "    x", " = 1", "\n", "<eos>"]
    assert measures["token_labels"](tokens, text, planted) == [None, False, False, False, False, True, True, True, None]


def test_the_auc_counts_pairs(measures):
    own, foreign = [3.0, 1.0, 2.0], [1.0, 0.5]
    pairs = [(a > b) + 0.5 * (a == b) for a in own for b in foreign]
    assert measures["auc"](own, foreign) == pytest.approx(sum(pairs) / len(pairs))
    assert measures["auc"]([1.0] * 4, [1.0] * 9) == 0.5
    assert measures["auc"]([], [1.0]) is None


def test_tokens_to_a_level_lie_on_the_curve(measures):
    curve = [[10, 20, 30], [4.0, 3.0, 2.0]]
    assert measures["tokens_to_reach"](curve, 2.5, 100.0) == 2500.0
    assert measures["tokens_to_reach"](curve, 5.0, 100.0) == 1000.0
    assert measures["tokens_to_reach"](curve, 1.0, 100.0) is None


def test_the_studies_name_arms_data_and_models_that_there_are_and_share_their_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 1024}')
    for name in ("train-foreign-0", "train-foreign-40", "train-mutated-20", "breaks-foreign-40", "reference", "heldout"):
        record = {"prompt": "", "completion": "x = 1", "weights": [["x = 1", 1.0]], "is_correct": True}
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    for name in ("train", "validation", "test"):
        messages = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "x"}]
        (tmp_path / f"mbpp-{name}.jsonl").write_text(json.dumps({"messages": messages}))
    monkeypatch.setenv("WMTP_MODEL", "model")
    monkeypatch.setenv("WMTP_PLANTED", ".")
    keys: dict[str, dict[tuple[str, int], str]] = {}
    for path in sorted(SCRIPTS.glob("study-*.toml")):
        monkeypatch.setenv("WMTP_NOISE", "mutated-20" if path.stem == "study-a-kinds" else "foreign-40")
        plan = make_plan(load_study(path), [])
        assert len(plan.comparisons) in (3, 4)
        keys[path.stem] = {(run.arm, run.seed): run.key for run in plan.runs}
    assert (
        len({keys[name]["reference", 0] for name in ("study-a-kinds", "study-a-controls", "study-a-heads", "study-c-heads")})
        == 1
    )
    for first, second in (("study-a-controls", "study-a-heads"), ("study-a-heads", "study-c-heads")):
        same = set(keys[first]) & set(keys[second])
        assert len(same) >= 10
        assert all(keys[first][run] == keys[second][run] for run in same)


def test_a_problem_becomes_a_conversation():
    write = runpy.run_path(str(SCRIPTS / "conversations.py"))["conversation"]
    found = write(
        {"task_id": 3, "text": "Add. ", "code": "def f(x):\r\n\treturn x\r\n", "test_list": ["assert f(1) == 1", "assert f(2)"]}
    )
    assert found["id"] == "mbpp-3"
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"]
    assert found["messages"][0]["content"] == "Add.\nIt must pass these tests:\nassert f(1) == 1\nassert f(2)"
    assert found["messages"][1]["content"] == "```python\ndef f(x):\n    return x\n```"

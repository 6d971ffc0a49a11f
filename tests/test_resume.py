"""A run that is killed and resumed equals one that was not, bit for bit."""

import json
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
from conftest import HELD, command, environment

CLOCK = {"tokens_per_second", "peak_memory_gib"}


def curve(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in CLOCK} for record in records]


def steps_so_far(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def start_and_signal(preloaded, arguments, run_dir, at_step, number):
    """Start a run, and send it a signal once it has logged a step."""
    process = preloaded.start(at_step, *arguments, code=HELD)
    while steps_so_far(run_dir) < at_step and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def tensors(folder):
    from safetensors.torch import load_file

    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_equal_runs(one, other):
    import torch

    assert curve(one) == curve(other)
    for name in ("weights.jsonl", "samples.jsonl"):
        assert (one / name).read_text() == (other / name).read_text() != ""
    left, right = tensors(one / "model"), tensors(other / "model")
    assert left.keys() == right.keys() == {"model.safetensors", "mtp_heads.safetensors"}
    for file, values in left.items():
        for name, tensor in values.items():
            assert torch.equal(tensor, right[file][name]), (file, name)


def test_killed_runs_resume_bit_for_bit(recipe, wmtp, preloaded, tmp_path):
    done = wmtp("run", recipe, "--run-name", "whole", "--json")
    assert done.returncode == 0, done.stderr
    whole, killed = tmp_path / "runs/whole", tmp_path / "runs/killed"
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    kills = sorted(draw.sample(range(6, 38), 3))
    arguments = ("run", recipe, "--run-name", "killed", "--resume", "auto")
    for at_step in kills:
        code, _, _ = start_and_signal(preloaded, arguments, killed, at_step, signal.SIGKILL)
        assert code == -signal.SIGKILL, f"seed {seed}: it ended before it could be killed at {at_step}"
        for checkpoint in (killed / "checkpoints").glob("step-*"):
            facts = json.loads((checkpoint / "checkpoint.json").read_text())
            assert {name: (checkpoint / name).stat().st_size for name in facts["files"]} == facts["files"]
    # in an interpreter of its own, whose sets of strings have another order
    last = subprocess.run(command(*arguments, "--json"), capture_output=True, text=True, env=environment(), timeout=300)
    assert last.returncode == 0, last.stderr
    answer = json.loads(last.stdout)
    assert answer["steps"] == 40
    assert answer["metrics"]["loss"] == curve(whole)[-1]["loss"]
    assert_equal_runs(whole, killed)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_it(recipe, wmtp, preloaded, tmp_path, number):
    overrides = ["--set", "checkpoints.save_interval=1000", "--set", "train.max_steps=60"]
    arguments = ["run", recipe, *overrides, "--run-name", "x"]
    code, _, err = start_and_signal(preloaded, arguments, tmp_path / "runs/x", 8, number)
    assert code == 128 + number, err
    assert "Traceback" not in err
    assert "--resume" in err
    (checkpoint,) = (tmp_path / "runs/x/checkpoints").glob("step-*")
    assert int(checkpoint.name.partition("-")[2]) >= 8
    assert not (tmp_path / "runs/x/model").exists()
    resumed = wmtp("run", "--resume", tmp_path / "runs/x", "--json")
    assert resumed.returncode == 0, resumed.stderr
    whole = wmtp("run", recipe, *overrides, "--run-name", "whole", "--json")
    assert whole.returncode == 0, whole.stderr
    assert_equal_runs(tmp_path / "runs/whole", tmp_path / "runs/x")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "", "metrics.jsonl lacks"),
        (
            lambda text: text.replace('"step": 3', '"stop": 3', 1),
            "metrics.jsonl lacks 1 of the steps before this resume (3 to 3)",
        ),
        (lambda text: "\0\ufffd{[\n" * 4 + text, "lines are kept; as it was it is in metrics.jsonl.damaged-1"),
        pytest.param(
            lambda text: "[" * 10**5 + "\n" + text,
            "lines are kept; as it was it is in metrics.jsonl.damaged-1",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["emptied", "a line lost", "garbled", "too deep"],
)
def test_a_curve_that_was_damaged_is_said_and_kept(recipe, wmtp, preloaded, tmp_path, damage, said):
    arguments = ("run", recipe, "--run-name", "x", "--resume", "auto")
    code, _, _ = start_and_signal(preloaded, arguments, tmp_path / "runs/x", 8, signal.SIGTERM)
    assert code == 143
    metrics = tmp_path / "runs/x/metrics.jsonl"
    damaged = damage(metrics.read_text())
    metrics.write_text(damaged)
    done = wmtp(*arguments)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    assert str(metrics) in done.stderr
    assert curve(tmp_path / "runs/x")[-1]["step"] == 40
    if "damaged-1" in said:
        assert (tmp_path / "runs/x/metrics.jsonl.damaged-1").read_text() == damaged
        assert [row["step"] for row in curve(tmp_path / "runs/x")] == list(range(1, 41))


def test_a_config_that_was_emptied_is_named(recipe, wmtp, tmp_path):
    assert wmtp("run", recipe, "--run-name", "x", "--set", "train.max_steps=8").returncode == 0
    (tmp_path / "runs/x/config.toml").write_text("")
    for words in (["--resume", tmp_path / "runs/x"], [recipe, "--run-name", "x", "--resume", "auto"]):
        done = wmtp("run", *words)
        assert done.returncode in (1, 2)
        assert f"error: {tmp_path}/runs/x/config.toml is empty" in done.stderr
        assert len(done.stderr.splitlines()) < 4


def test_a_finished_run_resumed_is_the_finished_run(recipe, wmtp, tmp_path):
    arguments = ("run", recipe, "--run-name", "x", "--resume", "auto", "--json")
    first = wmtp(*arguments)
    before = curve(tmp_path / "runs/x")
    second = wmtp(*arguments)
    assert first.returncode == second.returncode == 0, second.stderr
    assert curve(tmp_path / "runs/x") == before
    assert json.loads(second.stdout)["metrics"] == json.loads(first.stdout)["metrics"]


def test_resume_with_another_config_is_refused_by_name(recipe, wmtp, tmp_path):
    assert wmtp("run", recipe, "--run-name", "x", "--set", "train.max_steps=6").returncode == 0
    again = wmtp("run", recipe, "--run-name", "x", "--resume", "auto", "--set", "optimizer.lr=1e-4")
    assert again.returncode == 2
    assert "optimizer.lr" in again.stderr
    assert "train.max_steps" in again.stderr
    assert "Traceback" not in again.stderr


def test_two_runs_never_share_a_directory(recipe, wmtp, preloaded, tmp_path):
    first = preloaded.start("run", recipe, "--run-name", "x", "--set", "train.max_steps=4000")
    try:
        while not steps_so_far(tmp_path / "runs/x"):
            assert first.poll() is None
            time.sleep(0.01)
        for extra in ([], ["--resume", "auto"]):
            second = wmtp("run", recipe, "--run-name", "x", "--set", "train.max_steps=400", *extra)
            assert second.returncode in (1, 2)
            assert "\nerror: " in f"\n{second.stderr}"
            assert "Traceback" not in second.stderr
    finally:
        first.kill()
        first.wait()


def test_resume_with_other_data_is_refused(recipe, wmtp, preloaded, tmp_path):
    arguments = ("run", recipe, "--run-name", "x", "--resume", "auto")
    code, _, _ = start_and_signal(preloaded, arguments, tmp_path / "runs/x", 8, signal.SIGTERM)
    assert code == 143
    data = tmp_path / "code.jsonl"
    original = data.read_text()
    data.write_text(original.replace("x0 = 0", "x0 = 1"))
    changed = wmtp(*arguments)
    assert changed.returncode == 2
    assert re.search(r"error: \S+:\d+: datasets: the training data is not what it was", changed.stderr), changed.stderr
    data.rename(tmp_path / "moved.jsonl").write_text(original)
    moved = wmtp(*arguments, "--set", f"datasets.code.uri={tmp_path}/moved.jsonl")
    assert moved.returncode == 2, "another uri is another config"
    (tmp_path / "moved.jsonl").rename(data)
    assert wmtp(*arguments).returncode == 0


def test_a_resume_says_that_a_version_is_another(recipe, wmtp, tmp_path):
    assert wmtp("run", recipe, "--run-name", "x", "--set", "train.max_steps=6").returncode == 0
    facts = tmp_path / "runs/x/run.json"
    facts.write_text(facts.read_text().replace('"wmtp-algos": "', '"wmtp-algos": "0.0.'))
    resume = ("run", "--resume", tmp_path / "runs/x")
    assert "warning: resumed with another version" in wmtp(*resume).stderr
    assert "another version" not in wmtp(*resume).stderr, "said once: now this version is the one it went on with"


def test_the_name_of_a_run_that_could_not_start_stays_free(recipe, wmtp, tmp_path):
    data = tmp_path / "code.jsonl"
    original = data.read_text()
    data.write_text(original + "{broken\n")
    assert wmtp("run", recipe, "--run-name", "x").returncode == 2
    data.write_text(original)
    done = wmtp("run", recipe, "--run-name", "x", "--set", "train.max_steps=6")
    assert done.returncode == 0, done.stderr


def flip(path, place):
    """Change one byte."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_refused_by_name(recipe, wmtp, tmp_path):
    """And once the folder is gone, as the message says, the run resumes from the one before it, here of an earlier version."""
    from wmtp.checkpoints.manifest import check_files

    done = wmtp("run", recipe, "--run-name", "x", "--set", "train.max_steps=15", "--set", "checkpoints.keep_last=0")
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs/x"
    expected = curve(run_dir)
    newest = run_dir / "checkpoints/step-15"
    files = sorted(newest.iterdir())
    assert {path.suffix for path in files} == {".json", ".pt", ".safetensors"}
    for path in files:
        whole = path.read_bytes()
        for place in (0, len(whole) // 3, len(whole) // 2, len(whole) - 2):
            flip(path, place)
            with pytest.raises(ValueError, match=path.name):
                check_files(newest)
            path.write_bytes(whole)
    facts = newest / "checkpoint.json"
    whole = facts.read_text()
    facts.write_text(whole.replace('"hashes"', '"hushes"'))
    with pytest.raises(ValueError, match=r"checkpoint\.json is damaged"):
        check_files(newest)
    facts.write_text(whole)
    check_files(newest)

    tensors = next(path for path in files if path.suffix == ".safetensors")
    flip(tensors, -1000)
    refused = wmtp("run", "--resume", run_dir)
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert f"{tensors}: its content was changed or damaged; remove this folder to resume from step-10" in line
    for path in files:
        path.unlink()
    newest.rmdir()
    old = run_dir / "checkpoints/step-10/checkpoint.json"
    known = json.loads(old.read_text())
    old.write_text(json.dumps({name: known[name] for name in ("format", "step", "files")}))
    again = wmtp("run", "--resume", run_dir)
    assert again.returncode == 0, again.stderr
    assert "step-10" in again.stderr
    assert curve(run_dir) == expected


@pytest.mark.parametrize("stops", [False, True])
def test_other_evaluation_data_is_named_and_refused_where_it_decides_the_end(recipe, tmp_path, caplog, stops):
    import wmtp as library
    from wmtp.errors import ConfigError

    held = tmp_path / "held.jsonl"
    held.write_text((tmp_path / "code.jsonl").read_text().splitlines()[3] + "\n")
    text = recipe.read_text().replace("holdout = 0.2", 'sources = ["held"]')
    text = text.replace("max_length = 64", 'max_length = 64\nsources = ["code"]')
    text = text.replace("eval_interval = 15", "eval_interval = 4").replace("max_steps = 40", "max_steps = 8")
    text += f'[datasets.held]\ntype = "jsonl"\nuri = "{held}"\n'
    if stops:
        text += "[train.early_stopping]\npatience = 9\n"
    recipe.write_text(text)
    result = library.run(recipe, run_name="x")
    with caplog.at_level("WARNING", logger="wmtp"):
        assert library.run(resume=result.run_dir).steps == 8
    assert "evaluation data" not in caplog.text
    held.write_text((tmp_path / "code.jsonl").read_text().splitlines()[5] + "\n")
    if stops:
        with pytest.raises(ConfigError, match=r"datasets: the evaluation data is not what it was .* compares eval/loss with"):
            library.run(resume=result.run_dir)
        return
    with caplog.at_level("WARNING", logger="wmtp"):
        assert library.run(resume=result.run_dir).steps == 8
    assert f"datasets: the evaluation data is not what it was when {result.checkpoint} was written" in caplog.text


def test_a_mixture_is_resumed_bit_for_bit_and_logs_the_loss_of_each_data_set(recipe, tmp_path, caplog):
    import shutil

    import wmtp as library

    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} and {i + 1}. " * 3}) + "\n" for i in range(20)))
    text = recipe.read_text().replace("max_steps = 40", "max_steps = 10")
    text = text.replace("max_length = 64", "max_length = 64\nmixture = { code = 0.3, text = 0.7 }")
    recipe.write_text(text + f'[datasets.text]\ntype = "jsonl"\nuri = "{tmp_path}/text.jsonl"\n')
    with caplog.at_level("INFO", logger="wmtp"):
        whole = library.run(recipe, run_name="whole")
    assert re.search(
        r"data\.train\.mixture: code 30\.0% of the tokens, \d\.\d\d epochs; text 70\.0% of the tokens", caplog.text
    )
    steps = curve(whole.run_dir)
    for record in steps:
        losses = [record[name] for name in ("source_loss/code", "source_loss/text") if record.get(name) is not None]
        assert min(losses) - 1e-4 <= record["loss/head_1"] <= max(losses) + 1e-4
    assert {name for name in steps[-1] if name.startswith("eval/")} >= {"eval/loss"}
    cut = tmp_path / "runs" / "cut"
    shutil.copytree(whole.run_dir, cut)
    shutil.rmtree(cut / "checkpoints" / "step-10")
    shutil.rmtree(cut / "model")
    assert library.run(resume=cut).steps == 10
    assert curve(cut) == steps
    rows = library.run(recipe, run_name="rows", overrides=["data.train.micro_batch_size=1"])
    for name in ("loss", "source_loss/code", "source_loss/text"):
        assert rows.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-4)


def test_how_many_steps_are_logged_does_not_decide_when_a_run_stops_early(recipe):
    import wmtp as library

    text = recipe.read_text().replace("max_steps = 40", "max_steps = 12")
    recipe.write_text(text + '[train.early_stopping]\nmetric = "loss"\npatience = 2\nmin_delta = 9.0\n')
    often = library.run(recipe, run_name="often")
    rarely = library.run(recipe, overrides=["train.log_interval=5"], run_name="rarely")
    assert often.steps == rarely.steps == 3
    assert often.metrics["loss"] == rarely.metrics["loss"], "the last step is logged in any case"


def test_a_run_is_tied_to_nothing_but_its_folder(recipe, wmtp, tmp_path):
    (tmp_path / "code.jsonl").rename(tmp_path / "data.jsonl")
    text = recipe.read_text().replace(f"{tmp_path}/code.jsonl", "data.jsonl").replace(f"{tmp_path}/runs", "runs")
    recipe.write_text(text.replace("max_steps = 40", "max_steps = 8"))
    assert wmtp("run", recipe, "--run-name", "a", "--set", "train.max_steps=8", cwd=tmp_path).returncode == 0
    moved = tmp_path / "elsewhere/b"
    moved.parent.mkdir()
    (tmp_path / "runs/a").rename(moved)
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(moved / "model")
    shutil.rmtree(moved / "checkpoints/step-8")
    there = tmp_path / "there"
    there.mkdir()
    assert wmtp("check", moved / "config.toml", cwd=there).returncode == 0
    done = wmtp("run", "--resume", moved, cwd=there)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert (moved / "model/config.json").is_file()
    assert wmtp("eval", moved, "--set", 'eval=[{type="perplexity"}]', cwd=there).returncode == 0
    assert wmtp("report", moved, cwd=there).returncode == 0
    assert wmtp("export", moved, there / "out", "--format", "hf", cwd=there).returncode == 0
    card = (there / "out/README.md").read_text()
    assert "`data.jsonl`" in card
    assert str(tmp_path) not in card
    assert {path.name for path in there.iterdir()} == {"out"}
    assert not (tmp_path / "runs").exists(), "nothing is kept where the run was"


def test_a_finished_run_gets_more_steps_where_its_schedule_allows(recipe, wmtp, tmp_path):
    constant = ("--set", 'schedule.type="constant"')
    assert wmtp("run", recipe, "--run-name", "long", *constant, "--set", "train.max_steps=16").returncode == 0
    assert wmtp("run", recipe, "--run-name", "short", *constant, "--set", "train.max_steps=8").returncode == 0
    run = tmp_path / "runs/short"
    done = wmtp("run", "--resume", run, "--set", "train.max_steps=16")
    assert done.returncode == 0, done.stderr
    assert "resumed with a change: train.max_steps: 8 → 16" in done.stderr
    for name in ("model.safetensors", "mtp_heads.safetensors"):
        assert (run / "model" / name).read_bytes() == (tmp_path / "runs/long/model" / name).read_bytes()
    done = wmtp("run", "--resume", run, "--set", "train.max_steps=12")
    assert done.returncode == 2
    assert "train.max_steps: the run would have 12 steps, and has done 16" in done.stderr


def test_a_run_whose_learning_rate_decayed_names_the_way_to_train_further(recipe, wmtp, tmp_path):
    assert wmtp("run", recipe, "--run-name", "a", "--set", "train.max_steps=6").returncode == 0
    done = wmtp("run", "--resume", tmp_path / "runs/a", "--set", "train.max_steps=12")
    assert done.returncode == 2
    assert "train.max_steps: 6 → 12" in done.stderr
    way = next(line for line in done.stderr.splitlines() if "train its model further in a new run: wmtp run" in line)
    words = way.partition(": wmtp ")[2].replace("NEW", "b").split()
    done = wmtp(*words, "--set", "models.base.heads.warmup_steps=0")
    assert done.returncode == 0, done.stderr

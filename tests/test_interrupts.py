"""Ctrl-C in loops over runs and over other long work, in processes of their own, as a user presses it."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
from conftest import environment
from crossings import sampled

from wmtp_storage.testing import s3_server

__all__ = ["s3_server"]

LOOP = """
import logging, signal, sys
import wmtp
logging.basicConfig(level=logging.INFO)
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
try:
    for name in ("first", "second", "third"):
        result = wmtp.run({recipe!r}, run_name=name, overrides={overrides!r})
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        print(name, result.status, result.signal, flush=True)
except KeyboardInterrupt as error:
    if not hasattr(error, "result"):
        raise
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    print("ended", error.result.status, error.result.signal, error.result.checkpoint.is_dir(), error.result.steps, flush=True)
    raise
"""
#: as by the signal; or with 1 where torch's compiler is imported (torchao does so), whose work at the end hides it from Python
INTERRUPTED = (-signal.SIGINT, 1)
LONG = ["train.max_steps=100000", "schedule.type=constant", "checkpoints.save_interval=100000"]


@pytest.fixture
def start(preloaded):
    """Starts code or ``wmtp …`` in a process that is the first of a group, as a command in a terminal is."""
    return functools.partial(preloaded.start, start_new_session=True)


def start_interpreter(*words, **variables):
    """Python itself, in a process that is the first of a group."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, *map(str, words)], env=environment() | variables, start_new_session=True, **streams
    )


def loop(recipe, overrides):
    """The code of a loop over runs."""
    return LOOP.format(recipe=str(recipe), overrides=overrides)


def wait_for_steps(process, run_dir, count):
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def press_ctrl_c(process):
    """The terminal sends the signal to the whole group."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_ends_a_loop_over_runs(recipe, start, tmp_path, processes):
    process = start(code=loop(recipe, [*LONG, f"launcher.processes={processes}"]))
    wait_for_steps(process, tmp_path / "runs/first", 4)
    press_ctrl_c(process)
    out, err = process.communicate(timeout=120)
    word, status, number, has_checkpoint, steps = out.split()
    assert (word, status, number, has_checkpoint) == ("ended", "interrupted", "SIGINT", "True"), err
    assert process.returncode in INTERRUPTED, "an interrupted Python ends as by the signal"
    assert (tmp_path / f"runs/first/checkpoints/step-{steps}/checkpoint.json").exists()
    assert "KeyboardInterrupt: interrupted after" in err
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.name[0] != "."] == ["first"]
    assert json.loads((tmp_path / "runs/first/run.json").read_text())["status"] == "interrupted"


def test_sigterm_hands_the_result_back(recipe, start, tmp_path):
    process = start(code=loop(recipe, LONG))
    wait_for_steps(process, tmp_path / "runs/first", 4)
    process.terminate()
    wait_for_steps(process, tmp_path / "runs/second", 4)
    press_ctrl_c(process)
    out, err = process.communicate(timeout=120)
    first, second = out.splitlines()
    assert first == "first interrupted SIGTERM", err
    assert second.startswith("ended interrupted SIGINT True")
    assert not (tmp_path / "runs/third").exists()


def test_ctrl_c_in_the_last_step_ends_the_loop_too(recipe, start, wmtp, tmp_path):
    """The signal came when there was no step left before which it could be seen."""
    late = (
        "import os, signal\nfrom wmtp.training.loop import Fit\nsteps = Fit._steps\n"
        "def late(self, interrupt):\n    status = steps(self, interrupt)\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return status\nFit._steps = late\n"
    )
    process = start(code=late + loop(recipe, ["train.max_steps=8"]))
    out, err = process.communicate(timeout=120)
    assert out == "ended interrupted SIGINT True 8\n", err
    resumed = wmtp("run", "--resume", tmp_path / "runs/first", "--json")
    assert json.loads(resumed.stdout)["status"] == "finished", resumed.stderr


@pytest.mark.parametrize(
    ("number", "code", "processes"),
    sampled([(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2), (signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 2)], 3),
)
def test_exit_codes_of_the_command(recipe, start, tmp_path, number, code, processes):
    sets = [word for override in (*LONG, f"launcher.processes={processes}") for word in ("--set", override)]
    words = ("run", recipe, "--run-name", "x", "--json", *sets)
    # once as a shell starts it, with ranks as torchrun starts them
    own_interpreter = processes == 2 and number == signal.SIGTERM
    process = start_interpreter("-m", "wmtp", *words) if own_interpreter else start(*words)
    wait_for_steps(process, tmp_path / "runs/x", 4)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    answer = json.loads(out)
    assert (answer["status"], answer["signal"]) == ("interrupted", number.name)
    assert Path(answer["checkpoint"]).is_dir()
    assert "Traceback" not in err
    assert not [line for line in err.splitlines() if line.startswith("error")]
    assert f"to resume: wmtp run --resume {tmp_path}/runs/x" in err


SLOW = """
import sys, time
from wmtp.training import checkpointing
save = checkpointing.save_checkpoint
def slow(*arguments):
    print("saving", flush=True)
    time.sleep(60)
    return save(*arguments)
checkpointing.save_checkpoint = slow
"""


def test_the_second_ctrl_c_ends_at_once(recipe, start, tmp_path):
    process = start(code=SLOW + loop(recipe, LONG))
    wait_for_steps(process, tmp_path / "runs/first", 4)
    press_ctrl_c(process)
    assert process.stdout.readline() == "saving\n"
    began = time.monotonic()
    press_ctrl_c(process)
    out, err = process.communicate(timeout=50)
    assert time.monotonic() - began < 10
    assert process.returncode in INTERRUPTED
    assert out == "", "there is no result, and no next run"
    assert "KeyboardInterrupt" in err
    assert not (tmp_path / "runs/second").exists()
    assert not list((tmp_path / "runs/first/checkpoints").glob("step-*"))


@pytest.mark.slow
def test_the_second_ctrl_c_does_not_wait_for_a_tracker(recipe, start, tmp_path):
    stuck = "import time\nfrom wmtp.tracking.jsonl import Jsonl\nJsonl.finish = lambda *_: time.sleep(60)\n"
    process = start(code=stuck + SLOW + loop(recipe, LONG))
    wait_for_steps(process, tmp_path / "runs/first", 4)
    press_ctrl_c(process)
    assert process.stdout.readline() == "saving\n"
    press_ctrl_c(process)
    began = time.monotonic()
    process.communicate(timeout=50)
    assert time.monotonic() - began < 15
    assert process.returncode in INTERRUPTED


@pytest.mark.slow
def test_the_second_ctrl_c_ends_all_processes(recipe, tmp_path):
    """The ranks are processes of other groups, which the terminal does not reach."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/sitecustomize.py").write_text(
        "import pathlib, time\nfrom wmtp.training.interrupt import Interrupt\nagreed = Interrupt.agreed\n"
        "def slow(self, ranks):\n    found = agreed(self, ranks)\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'slow', str(ranks.rank)).touch()\n    time.sleep(60)\n    return found\n"
        "Interrupt.agreed = slow\n"
    )
    code = loop(recipe, [*LONG, "launcher.processes=2"])
    process = start_interpreter("-c", code, PYTHONPATH=str(tmp_path / "slow"))
    wait_for_steps(process, tmp_path / "runs/first", 4)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    press_ctrl_c(process)
    while not all((tmp_path / f"slow/{rank}").exists() for rank in range(2)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    press_ctrl_c(process)
    began = time.monotonic()
    process.communicate(timeout=50)
    assert time.monotonic() - began < 20
    assert process.returncode in INTERRUPTED
    assert len(ranks) >= 2
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()], "a rank outlives its launcher"
    assert not (tmp_path / "runs/second").exists()


#: in every process of the run: a function that stops in the middle, and says so by a file
STOPS = """
import pathlib, time
from wmtp.training import run
from wmtp.checkpoints.remote import CheckpointUpload
def stops(*arguments, **options):
    pathlib.Path({here!r}).touch()
    time.sleep(60)
{place} = stops
"""
AT_THE_END = {"save": "run.save_model", "measure": "run.measure_model", "sample": "run.show_sample"}
AT_EACH_END = sampled(product(AT_THE_END, (1, 2)), 5)
SHORT = ["train.max_steps=8", "schedule.type=constant", "checkpoints.save_interval=4"]


def stop_at(tmp_path, place):
    """Code that makes a process, and those that it forks, stop at a place; and the file that shows that one is there."""
    here = tmp_path / "here"
    return STOPS.format(here=str(here), place=place), here


def stopping(tmp_path, place):
    """The same for interpreters that are started anew, by their variables."""
    code, here = stop_at(tmp_path, place)
    (tmp_path / "stops").mkdir()
    (tmp_path / "stops/sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(tmp_path / "stops")}, here


def wait_for(here, process):
    while not here.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(("place", "processes"), AT_EACH_END)
def test_ctrl_c_after_the_last_step_hands_the_result_over(recipe, start, tmp_path, place, processes):
    """Ctrl-C while the model is saved or measured: the steps have left a checkpoint all the same."""
    stops, here = stop_at(tmp_path, AT_THE_END[place])
    process = start(code=stops + loop(recipe, [*SHORT, f"launcher.processes={processes}"]))
    wait_for(here, process)
    press_ctrl_c(process)
    began = time.monotonic()
    out, err = process.communicate(timeout=50)
    assert out == "ended interrupted SIGINT True 8\n", err
    assert time.monotonic() - began < 20
    assert process.returncode in INTERRUPTED
    assert json.loads((tmp_path / "runs/first/run.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize(("place", "processes"), AT_EACH_END)
def test_sigterm_after_the_last_step_hands_the_result_back(recipe, start, tmp_path, place, processes):
    stops, here = stop_at(tmp_path, AT_THE_END[place])
    once = loop(recipe, [*SHORT, f"launcher.processes={processes}"]).replace('("first", "second", "third")', '("first",)')
    process = start(code=stops + once)
    wait_for(here, process)
    process.terminate()
    out, err = process.communicate(timeout=50)
    assert out == "first interrupted SIGTERM\n", err
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("number", "place", "processes"),
    sampled(product((signal.SIGINT, signal.SIGTERM), ("finish", "log_artifact"), (1, 2)), 3),
)
def test_a_signal_while_a_tracker_hangs_at_the_end_leaves_a_finished_run(recipe, start, tmp_path, number, place, processes):
    """It ends the wait and the loop over runs: the run itself is done."""
    stops, here = stop_at(tmp_path, f"run.Jsonl.{place}")
    process = start(code=stops + loop(recipe, [*SHORT, f"launcher.processes={processes}"]))
    wait_for(here, process)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
    if number == signal.SIGTERM:  # which hands the result back, and the next run begins
        assert process.stdout.readline() == "first finished SIGTERM\n"
        process.kill()
        process.communicate()
    else:
        out, err = process.communicate(timeout=50)
        assert out == "ended finished SIGINT True 8\n", err
        assert f"KeyboardInterrupt: interrupted after 8 steps; the run is finished, and whole: {tmp_path}" in err
        assert process.returncode in INTERRUPTED
    assert json.loads((tmp_path / "runs/first/run.json").read_text())["status"] == "finished"
    assert (tmp_path / "runs/first/model/config.json").is_file()


@pytest.mark.slow
def test_ctrl_c_while_the_last_upload_is_waited_for(recipe, tmp_path, s3_server):
    variables, here = stopping(tmp_path, "CheckpointUpload.finish")
    uri = f"s3://{s3_server.bucket()}/run"
    words = LOOP.format(recipe=str(recipe), overrides=[*SHORT, f"checkpoints.uri={uri}"])
    process = start_interpreter("-c", words, **variables, **s3_server.environment)
    wait_for(here, process)
    press_ctrl_c(process)
    out, err = process.communicate(timeout=50)
    assert out == "ended interrupted SIGINT True 8\n", err


@pytest.mark.parametrize(("number", "processes"), sampled(product((signal.SIGINT, signal.SIGTERM), (1, 2)), 4))
def test_a_signal_before_the_first_step_leaves_no_run(recipe, start, tmp_path, number, processes):
    """Neither a directory in which nothing was trained, nor a name that is taken."""
    stops, here = stop_at(tmp_path, "run.place_model")
    sets = [word for override in (*LONG, f"launcher.processes={processes}") for word in ("--set", override)]
    command = f"{stops}\nfrom wmtp.cli import run_from_shell\nrun_from_shell()\n"
    process = start("run", recipe, "--run-name", "x", *sets, code=command)
    wait_for(here, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=50)
    assert process.returncode == 128 + number, err
    assert [line for line in err.splitlines() if line.startswith("error")] == ["error: interrupted"]
    assert not (tmp_path / "runs/x").exists()


@pytest.mark.parametrize(("number", "processes"), sampled(product((signal.SIGINT, signal.SIGHUP, signal.SIGTERM), (1, 2)), 6))
def test_a_signal_that_is_ignored_stays_so(recipe, tmp_path, number, processes):
    """As ``nohup`` has it, and a shell's ``&`` in a script."""
    sets = ["--set", "train.max_steps=60", "--set", f"launcher.processes={processes}"]
    ignoring = (
        f"import os, signal, sys; signal.signal({int(number)}, signal.SIG_IGN);"
        " os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    process = start_interpreter("-c", ignoring, "-m", "wmtp", "run", recipe, "--run-name", "x", *sets)
    wait_for_steps(process, tmp_path / "runs/x", 4)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads((tmp_path / "runs/x/run.json").read_text())["status"] == "finished"


#: long work of the library, each of which a loop may hold
WORK = {
    "evaluate": "from wmtp.evaluation.command import evaluate_model\n"
    'work = lambda: evaluate_model({run!r}, overrides=[\'eval=[{{type="perplexity"}}, {{type="token-accuracy"}}]\'])',
    "export": "from wmtp.exporting.command import export_model\nimport tempfile\n"
    "work = lambda: export_model({run!r}, tempfile.mkdtemp(dir={folder!r}) + '/out', format='hf')",
    "push": "from pathlib import Path\nfrom wmtp_storage import S3Storage\nstorage = S3Storage().build()\n"
    "work = lambda: storage.push(Path({model!r}), {uri!r})",
    "fetch": "from pathlib import Path\nimport tempfile\nfrom wmtp_storage import S3Storage\nstorage = S3Storage().build()\n"
    "work = lambda: storage.fetch({uri!r}, Path(tempfile.mkdtemp(dir={folder!r})))",
    "report": "from wmtp.reporting import write_report\nwork = lambda: write_report([{run!r}])",
}


@pytest.fixture
def finished(recipe, wmtp, tmp_path):
    done = wmtp("run", recipe, "--run-name", "done", "--set", "train.max_steps=8")
    assert done.returncode == 0, done.stderr
    return tmp_path / "runs/done"


@pytest.mark.parametrize("name", sampled(WORK, 4))
def test_ctrl_c_ends_a_loop_over_other_long_work(finished, start, s3_server, tmp_path, monkeypatch, name):
    for key, value in s3_server.environment.items():
        monkeypatch.setenv(key, value)
    uri = f"s3://{s3_server.bucket()}/model"
    from wmtp_storage import S3Storage

    S3Storage().build().push(finished / "model", uri)
    places = {"run": str(finished), "model": str(finished / "model"), "uri": uri, "folder": str(tmp_path)}
    code = WORK[name].format(**places) + "\nwhile True:\n    work()\n    print('once', flush=True)\n"
    draw = random.Random(name)
    for _ in range(3):
        process = start(code=code)
        assert process.stdout.readline() == "once\n", process.communicate()
        time.sleep(draw.uniform(0, 0.5))
        press_ctrl_c(process)
        _, err = process.communicate(timeout=60)
        assert process.returncode in INTERRUPTED, err


#: Ctrl-C as a thread of a pool has begun, and the pool does not know it yet
IN_THE_POOLS_START = """
import threading
start = threading.Thread.start
def interrupted(thread):
    start(thread)
    if thread.name.startswith("ThreadPoolExecutor"):
        print("interrupted", flush=True)
        raise KeyboardInterrupt
threading.Thread.start = interrupted
import wmtp
wmtp.load_model({model!r})
"""


def test_ctrl_c_as_transformers_starts_a_loading_thread(finished, start):
    process = start(code=IN_THE_POOLS_START.format(model=str(finished / "model")))
    out, err = process.communicate(timeout=60)
    assert out == "interrupted\n", err
    assert process.returncode in INTERRUPTED, err

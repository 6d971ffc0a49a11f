"""Runs in a notebook: progress by itself, results that show themselves, and the example notebooks' own cells."""

import json
import logging
import sys
import types
from pathlib import Path

import pytest

import wmtp
from wmtp.log_lines import lines_by_itself
from wmtp.training.telemetry import Progress

ROOT = Path(__file__).parents[3]


class Handle:
    """Stands for what IPython's ``display`` returns."""

    def __init__(self, shown):
        self.shown = shown

    def update(self, content, *, raw):
        assert raw
        self.shown[-1] = content["text/plain"]


@pytest.fixture
def cell(monkeypatch):
    """A kernel that shows outputs: IPython itself is no dependency of the tests."""
    shown = []

    def display(content, *, raw, display_id):
        assert raw
        assert display_id
        shown.append(content["text/plain"])
        return Handle(shown)

    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    ipython.display = types.SimpleNamespace(display=display)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    return shown


@pytest.fixture
def bare_logging(monkeypatch):
    """Logging as a program has it that never touched it; pytest has handlers of its own."""
    root, logger = logging.getLogger(), logging.getLogger("wmtp")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setattr(logger, "propagate", True)
    logging.Logger.manager._clear_cache()
    yield logger
    logging.Logger.manager._clear_cache()


def test_one_line_is_updated_in_a_cell(cell, bare_logging, capsys):
    progress = Progress(100, 0)
    for step in range(1, 101):
        progress.show(step, {"loss": 1 / step, "loss/head_1": 1.0})
    progress.close()
    assert cell == ["step 100/100  loss 0.0100"]
    assert capsys.readouterr() == ("", "")


def test_nothing_is_shown_where_it_is_turned_off(cell, bare_logging):
    bare_logging.setLevel("WARNING")
    Progress(2, 0).show(2, {"loss": 1.0})
    with lines_by_itself():
        bare_logging.info("x")
    assert cell == []
    assert bare_logging.handlers == []


def test_lines_come_by_themselves_and_only_meanwhile(bare_logging, capsys):
    logging.getLogger().handlers = []  # pytest has put its own there again
    with lines_by_itself():
        bare_logging.info("a line")
        Progress(2, 0).show(2, {"loss": 1.0})
    bare_logging.info("after")
    assert capsys.readouterr() == ("", "a line\nstep 2/2  loss 1.0000\n")
    assert (bare_logging.handlers, bare_logging.level, bare_logging.propagate) == ([], logging.NOTSET, True)


def test_in_a_notebook_they_are_no_errors(cell, bare_logging, capsys):
    logging.getLogger().handlers = [logging.NullHandler()]  # as Colab has one
    with lines_by_itself():
        bare_logging.info("a line")
    assert capsys.readouterr() == ("a line\n", "")


@pytest.mark.parametrize("level", ["INFO", "WARNING"])
def test_a_program_that_logs_decides_itself(bare_logging, level, capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "level", getattr(logging, level))
    root.handlers = [logging.NullHandler()]
    with lines_by_itself():
        bare_logging.info("a line")
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def result(tmp_path):
    run_dir = tmp_path / "a <run>"
    run_dir.mkdir()
    rows = [{"step": step, "loss": 4 / step, "loss/head_1": 1.0} for step in (1, 2, 4)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {"id": "a/1", "tokens": ["<p>", " x", "y"], "weight": [[None, 2.0, 0.5]], "loss": [[None, 1.25, None]]}
    sample = {"step": 4, "stage": "joint", "mean_weight": 1.0, "documents": [document]}
    (run_dir / "samples.jsonl").write_text(
        json.dumps({**sample, "step": 1, "documents": []}) + "\n" + json.dumps(sample) + "\n"
    )
    return wmtp.Result(run_dir=run_dir, model=None, checkpoint=None, steps=4, metrics={"loss": 1.0, "lr": 0.1})


def test_a_result_has_its_history_and_shows_itself(result):
    assert [row["step"] for row in result.history] == [1, 2, 4]
    page = result._repr_html_()
    assert "a &lt;run&gt;" in page
    assert "<th style='text-align:left'>loss</th><td>1</td>" in page
    assert ">lr<" not in page
    assert 'points="0.0,2.0 150.0,' in page
    assert "300.0,58.0" in page
    empty = wmtp.Result(run_dir=result.run_dir / "none", model=None, checkpoint=None, steps=0, metrics={})
    assert (empty.history, empty.samples) == ([], [])
    assert "<svg" not in empty._repr_html_()


def test_a_sample_is_coloured_by_its_weights(result):
    (sample,) = result.samples
    assert (sample.step, sample.id) == (4, "a/1")
    page = sample._repr_html_()
    assert '<span style="opacity:0.6">&lt;p&gt;</span>' in page
    assert 'title="weight 2, loss 1.25" style="background:rgba(230, 120, 20,' in page
    assert 'title="weight 0.5" style="background:rgba(40, 110, 220,' in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first-run", "token-weights"])
def test_the_cells_of_the_example_notebooks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "notebooks" / f"{name}.ipynb").read_text())
    space = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are not kept in the repository"
            exec(compile("".join(cell["source"]), name, "exec"), space)
    result = space["result"]
    assert result.status == "finished"
    assert "<svg" in result._repr_html_()
    assert all("weight" in sample._repr_html_() for sample in result.samples)
    assert len(result.samples) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first-run", "token-weights"])
def test_the_example_notebooks_run_in_a_kernel(name, tmp_path):
    """In Jupyter's own process, where a progress line is updated and results show themselves as HTML."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "examples" / "notebooks" / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.data for output in outputs if "data" in output]
    assert any("text/html" in shown for shown in data)
    assert any(shown.get("text/plain", "").startswith("step ") for shown in data)
    assert not any(output.output_type == "error" for output in outputs)

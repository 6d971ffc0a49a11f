"""The page of ``wmtp report``, in a real browser: what it shows, of runs in any state, and that nothing in it can hurt."""

import functools
import json
import math
import re
from html.parser import HTMLParser

import pytest
from report_runs import browse, document, in_browser, make_run, sample, write_lines

from wmtp.cli import main
from wmtp.reporting import write_report

ask = functools.partial("return [...document.querySelectorAll({!r})].map(e => e.textContent)".format)


@in_browser
def test_several_runs_are_compared(tmp_path):
    shown = document(["a", "b"])
    runs = [
        make_run(tmp_path, name, trainer=trainer, samples=[sample(1, shown), sample(step, shown)])
        for name, trainer, step in (("one", "rho1-wmtp", 10), ("two", "baseline-mtp", 20))
    ]
    page = write_report(runs, tmp_path / "both.html")
    found = browse(
        page,
        """
        const look = () => ({ panels: document.querySelectorAll('.panel').length,
          legend: [...document.querySelector('figure').querySelectorAll('.u-label')].map(e => e.textContent) });
        const before = look();
        document.querySelectorAll('.chip')[1].click();
        const empty = [...document.querySelectorAll('th')].filter(e => !e.textContent.trim()).length;
        const words = ['details', '.lead'].map(one => document.querySelector(one).textContent);
        return [before, look(), ...words, empty];
        """,
    )
    assert found[0] == {"panels": 2, "legend": ["step", "one", "two"]}
    assert found[1] == {"panels": 1, "legend": ["step", "one"]}
    assert "trainer.typerho1-wmtpbaseline-mtp" in found[2]
    assert found[3] == "two − one in loss: 0.15 against 0.15, one run each."
    assert found[4] == 0
    assert page.stat().st_size < 200_000


@in_browser
def test_runs_that_differ_in_their_seed_alone_are_one_arm(tmp_path):
    runs = []
    for trainer, level in (("baseline-mtp", 3.0), ("rho1-wmtp", 2.0)):
        for seed in (0, 1, 2):
            run = make_run(tmp_path, f"{trainer}{seed}", trainer=trainer, eval__loss=lambda s, v=level + seed / 50: v)
            config = (run / "config.toml").read_text()
            (run / "config.toml").write_text(f"{config}\n[run]\nseed = {seed}\nname = '{run.name}'\n")
            runs.append(run)
    page = write_report(runs, tmp_path / "all.html")
    found = browse(page, ask(".lead, #table tbody th"))
    assert found[0] == "rho1-wmtp − baseline-mtp in eval/loss: lower, better (exploratory)."
    assert found[1:] == ["baseline-mtp", "rho1-wmtp"]
    # one of them alone, or one that has not ended: no arm
    assert "Runs" in browse(write_report([runs[0], runs[3]], tmp_path / "two.html"), ask("h2"))
    (runs[5] / "run.json").write_text('{"status": "running"}')
    assert "Runs" in browse(write_report(runs, tmp_path / "running.html"), ask("h2"))


class Loads(HTMLParser):
    """Collects what a page would load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_a_page_needs_nothing_else(tmp_path):
    page = write_report([make_run(tmp_path, samples=[sample(1, document(["a", "b"]))])]).read_text()
    parser = Loads()
    parser.feed(page)
    assert parser.found == []
    assert "default-src 'none'" in page
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL))
    assert "url(" not in styles
    assert "@import" not in styles


@in_browser
@pytest.mark.parametrize("state", ["running", "nothing yet", "failed", "no samples", "nan", "stage without weights"])
def test_runs_in_any_state_have_a_page(tmp_path, state):
    steps, samples = 20, [sample(1, document(["a", "b"]))]
    metrics = {}
    if state == "nothing yet":
        steps, samples = 0, None
    if state == "no samples":
        samples = None
    if state == "nan":
        metrics = {"loss": lambda s: math.nan, "eval__loss": lambda s: 1.0 if s == 20 else None}
        samples = [sample(1, document(["a", "b", "c"], heads=1, value=[None, None, None]))]
    if state == "stage without weights":
        shown = document(["a", "b"]) | {"weight": None}
        samples = [sample(1, shown) | {"mean_weight": None}]
    run = make_run(tmp_path, steps=steps, samples=samples, weights=steps > 0, status=state, **metrics)
    if state == "running":
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 21, "lo')  # being written right now
        (run / "samples.jsonl").write_text((run / "samples.jsonl").read_text() + '{"step"')
    if state == "nothing yet":
        for name in ("metrics.jsonl", "weights.jsonl", "run.json"):
            (run / name).unlink(missing_ok=True)
    found = browse(
        write_report([run]), "return [document.querySelectorAll('canvas').length, document.querySelectorAll('.token').length]"
    )
    assert (found[0] > 0) == (state != "nothing yet")
    assert (found[1] > 0) == (samples is not None)


@in_browser
def test_a_long_run_has_a_page_of_moderate_size_that_keeps_every_spike(tmp_path):
    def loss(step):
        return 99.0 if step == 14_321 else 2 + math.sin(step)

    shown = document([f" t{i}" for i in range(256)], weights=[[0.123] * 256, [0.456] * 256])
    run = make_run(
        tmp_path,
        steps=30_000,
        samples=[sample(step, shown, shown, shown, shown) for step in range(1, 400)],
        weights=False,
        loss=loss,
        rho1__excess=loss,
    )
    counts = [[0] * 40 + [7] + [0] * 27] * 2
    write_lines(run / "weights.jsonl", ({"step": s, "counts": counts} for s in range(1, 2001)))
    page = write_report([run])
    assert page.stat().st_size < 3_000_000
    data = json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])["runs"][0]
    steps, values = data["curves"]["loss"]
    assert len(steps) <= 802
    assert dict(zip(steps, values, strict=True))[14_321] == 99.0
    assert (steps[0], steps[-1]) == (1, 30_000)
    assert sum(counts[1][40] for _, counts in data["weights"]) == 7 * 2000, "nothing of the distributions is left out"
    assert data["samples"][0]["step"] == 1
    assert data["samples"][-1]["step"] == 399
    browse(page)


def test_what_is_no_run_is_said(tmp_path, capsys):
    make_run(tmp_path, "one")
    (tmp_path / "empty").mkdir()
    code = main(["report", str(tmp_path / "empty"), str(tmp_path / "missing"), str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert lines == [
        f"error: {tmp_path}/empty: holds no run (no config.toml)",
        f"error: {tmp_path}/missing: does not exist",
        f"error: {tmp_path}: holds no run (no config.toml); it holds the runs one: name some of them",
    ]


def test_a_damaged_file_is_named(tmp_path, capsys):
    run = make_run(tmp_path)
    for name, content, said in (
        ("weights.jsonl", "[]\n{}\n", "weights.jsonl:1: not the record of a step"),
        ("run.json", "{", "run.json: cannot be read as JSON"),
        ("config.toml", "a = ", "config.toml: is damaged"),
    ):
        kept = (run / name).read_text()
        (run / name).write_text(content)
        assert main(["report", str(run)]) == 2
        assert said in capsys.readouterr().err
        (run / name).write_text(kept)
    assert not (run / "report.html").exists()


def test_where_the_page_goes(tmp_path, capsys, monkeypatch):
    one, two = make_run(tmp_path, "one"), make_run(tmp_path, "two")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(one / "report.html")}
    assert main(["report", "one", str(two), "one"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert main(["report", "one", "--output", "pages.html"]) == 0
    assert (tmp_path / "pages.html").exists()
    assert main(["report", "one", "--output", str(two)]) == 2
    assert "is a folder" in capsys.readouterr().err
    (tmp_path / "recipe.toml").write_text("[run]\n")
    assert main(["report", "one", "--output", "recipe.toml"]) == 2
    assert "--output recipe.toml: an HTML page is written; call it something.html" in capsys.readouterr().err
    assert (tmp_path / "recipe.toml").read_text() == "[run]\n"
    assert main(["report", "one", "--output", "missing/page.html"]) == 1
    assert "cannot be written" in capsys.readouterr().err


@in_browser
def test_a_real_run_writes_its_page(recipe, wmtp, tmp_path):
    done = wmtp("run", recipe, "--run-name", "x", "--set", "train.max_steps=8", "--set", "data.train.max_length=128")
    assert done.returncode == 0, done.stderr
    found = browse(tmp_path / "runs/x/report.html", ask(".token") + ".join('')")
    assert found.startswith("<bos>def f")
    assert found.endswith("<eos>")


@in_browser
def test_what_was_measured_stands_with_its_interval(tmp_path):
    runs = [make_run(tmp_path, name) for name in ("one", "two")]
    (runs[0] / "evaluation.json").write_text('{"perplexity/head_1": 3.25, "plain/number": 7.0}')
    result = {"value": 3.25, "low": 3.0, "high": 3.5, "n": 48, "unit": "documents"}
    details = {"perplexity": {"settings": {}, "results": {"head_1": result}}, "plain": {"results": {"number": {"value": 7.0}}}}
    (runs[0] / "evaluation-details.json").write_text(json.dumps(details))
    for shown in (runs[:1], runs):
        page = write_report(shown, tmp_path / "page.html")
        found = browse(page, ask("#facts dd, #facts td") + ".join('|')")
        assert "|3.25 [3, 3.5], 48 documents|" in found
        assert "|7|" in found

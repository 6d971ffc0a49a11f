"""The page of ``wmtp report``, in a real browser: what it shows, of runs in any state, and that nothing in it can hurt."""

import functools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import tomli_w

from wmtp.cli import main
from wmtp.reporting import write_report
from wmtp.runs.weight_bins import WEIGHT_BINS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
#: in a container the shared memory that Chromium would take is too small, and it crashes now and then
HEADLESS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&lt;<!--"


def document(tokens, *, heads=2, id="task/1", index=0, weights=None, **details):
    """A recorded document, of which the first token is given."""
    length = len(tokens)
    by_head = [[None] * k + [round(0.5 + 0.1 * j + k, 3) for j in range(k, length)] for k in range(1, heads + 1)]
    return {
        "index": index,
        "start": 0,
        "id": id,
        "is_correct": None,
        "reward": None,
        "tokens": tokens,
        "weight": weights or by_head,
        "loss": by_head,
        "details": details,
    }


def make_run(folder, name="run", *, steps=20, status="finished", samples=None, weights=True, trainer="rho1-wmtp", **metrics):
    """A run directory as the loop leaves it."""
    run = folder / name
    run.mkdir()
    config = {
        "trainer": {"type": trainer},
        "models": {"base": {"type": "scratch", "heads": {"horizon": 2, "kind": "block"}}},
        "datasets": {"code": {"type": "jsonl", "uri": "code.jsonl"}},
        "data": {"train": {"batch_size": 4, "max_length": 64}},
        "train": {"max_steps": 20},
    }
    (run / "config.toml").write_text(tomli_w.dumps(config))
    facts = {"status": status, "started": "2026-01-02T03:04:05+00:00", "seed": 0, "argv": ["wmtp", "run", "x.toml"]}
    (run / "run.json").write_text(json.dumps(facts))
    values = {
        "loss": lambda s: 3 / s,
        "loss/head_1": lambda s: 2 / s,
        "loss/head_2": lambda s: 4 / s,
        "weight/mean": lambda s: 1.0,
    }
    values |= {name.replace("__", "/"): value for name, value in metrics.items()}
    write_lines(
        run / "metrics.jsonl",
        ({"step": s, "stage": "train"} | {n: v(s) for n, v in values.items() if v(s) is not None} for s in range(1, steps + 1)),
    )
    if weights:
        counts = [[0] * len(WEIGHT_BINS) for _ in range(2)]
        counts[0][0], counts[0][34], counts[1][40] = 3, 5, 8
        write_lines(run / "weights.jsonl", ({"step": s, "counts": counts} for s in range(1, steps + 1)))
    if samples is not None:
        write_lines(run / "samples.jsonl", samples)
    return run


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def sample(step, *documents, stage="train"):
    return {"step": step, "stage": stage, "mean_weight": 1.0, "documents": list(documents)}


def browse(page, script="return null", *, width=1200):
    """Open a page in the browser without any network, run JavaScript in it when it is drawn, and return what that returns.

    An error in the page's own scripts fails the test.
    """
    driver = (
        "<pre id='answer'></pre><script>addEventListener('error', e => { window.broken = String(e.message) });"
        "addEventListener('load', () => { let found; try { found = (() => {"
        + script
        + "})() } catch (e) { window.broken = String(e) }"
        "document.getElementById('answer').textContent = encodeURIComponent(JSON.stringify({"
        "found, broken: window.broken ?? null, ready: document.documentElement.dataset.ready ?? null, title: document.title}))"
        "})</script>"
    )
    driven = page.with_name("driven.html")
    driven.write_text(page.read_text().replace('<main id="report">', driver + '<main id="report">', 1))
    options = [*HEADLESS, "--host-resolver-rules=MAP * ~NOTFOUND"]
    options += ["--virtual-time-budget=2000", f"--window-size={width},1000", f"--user-data-dir={page.parent / 'browser'}"]
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", driven.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    answer = re.search(r"<pre id=.answer.>([^<]*)</pre>", done.stdout)
    assert answer, done.stderr
    from urllib.parse import unquote

    result = json.loads(unquote(answer[1]))
    assert result["broken"] is None
    assert result["ready"] == "true"
    assert "owned" not in result["title"]
    return result["found"]


ask = functools.partial("return [...document.querySelectorAll({!r})].map(e => e.textContent)".format)


@in_browser
def test_a_page_has_curves_weights_facts_and_coloured_texts_that_explain_themselves(tmp_path):
    weights = [[None, 1.0, 4.0, 0.25, 0.0], [None, None, 1.0, 1.0, 0.0]]
    shown = document(["def", " f", "(x)", ":\n", "  pass"], weights=weights, reference_loss=[None, 0.5, 1.25, 2.0, 3.0])
    run = make_run(tmp_path, samples=[sample(1, shown), sample(20, shown)])
    found = browse(
        write_report([run]),
        """
        const tokens = [...document.querySelectorAll('.text .token')];
        const before = {
          lead: document.querySelector(".lead").textContent, delta: document.querySelector('.delta b').textContent,
          headings: [...document.querySelectorAll('h2')].map(e => e.textContent),
          charts: [...document.querySelectorAll('figcaption')].map(e => e.textContent),
          drawn: document.querySelectorAll('canvas').length,
          legend: [...document.querySelector('figure').querySelectorAll('.u-label')].map(e => e.textContent),
          facts: Object.fromEntries([...document.querySelectorAll('dl div')].map(e => [...e.children].map(c => c.textContent))),
          texts: tokens.map(e => e.textContent), classes: tokens.map(e => e.className),
          colours: tokens.map(e => e.style.background) };
        tokens[2].dispatchEvent(new PointerEvent('pointerenter'));
        const tip = document.querySelector('body > .tip');
        before.tip = [...tip.querySelectorAll('tr')].map(r => [...r.children].map(c => c.textContent));
        before.rest = tip.textContent;
        return before;
        """,
    )
    assert found["headings"][:2] == ["Texts, each token coloured by the weight it got", "Loss of every head"]
    assert found["headings"][-1] == "Run"
    assert found["lead"] == "Finished: rho1-wmtp brought loss from 3 at step 1 to 0.15 at step 20."
    assert found["delta"] == "−2.85"
    assert {"loss", "weight/mean", "run"} <= set(found["charts"])
    assert found["drawn"] == len(found["charts"])
    assert found["legend"] == ["step", "all heads", "head 1", "head 2"]
    assert found["facts"]["trainer"] == "rho1-wmtp"
    assert found["facts"]["last loss"] == "0.15"
    assert found["texts"] == ["def", " f", "(x)", ":↵\n", "  pass"]
    # the mean of the heads: nothing known, 1, 2.5, 0.625 and 0, around the step's mean of 1
    assert [name.split()[1:] for name in found["classes"]] == [["given"], [], [], [], ["skipped"]]
    assert found["colours"][:2] == ["", ""]
    assert "--hot" in found["colours"][2]
    assert "--cold" in found["colours"][3]
    assert found["tip"] == [["head", "weight", "loss"], ["1", "4", "1.7"], ["2", "1", "2.7"]]
    assert "reference loss: 1.25" in found["rest"]
    assert '"(x)"' in found["rest"]


@in_browser
def test_every_figure_and_table_is_saved_and_the_sample_is_shown(tmp_path):
    run = make_run(tmp_path, samples=[sample(5, document(["def", " f", "()"]))])
    said = {"prompt": "def add(", "before": "): pass", "after": "a, b): return a + b"}
    (run / "sample.json").write_text(json.dumps(said))
    script = """
      const saved = [];
      URL.createObjectURL = blob => { saved.push(blob.type); return "blob:x"; };
      const figures = document.querySelectorAll("figure").length;
      const tables = document.querySelectorAll("table.facts, #facts dl").length;
      const buttons = [...document.querySelectorAll(".saves button")];
      buttons.filter(one => one.textContent !== "PNG").forEach(one => one.click());
      const names = buttons.map(one => one.getAttribute("aria-label"));
      return { saved, figures, tables, kinds: buttons.map(one => one.textContent),
        distinct: new Set(names).size === names.length,
        sample: [...document.querySelectorAll("#sample dd")].map(one => one.textContent) };
    """
    found = browse(write_report([run]), script)
    assert found["figures"] >= 3
    assert [found["kinds"].count(kind) for kind in ("SVG", "PNG")] == [found["figures"]] * 2
    assert found["kinds"].count("CSV") == found["tables"] == 2
    assert sorted(set(found["saved"])) == ["image/svg+xml", "text/csv"]
    assert len(found["saved"]) == found["figures"] + found["tables"]
    assert found["distinct"]
    assert found["sample"] == list(said.values())


@in_browser
def test_head_colour_and_step_can_be_chosen(tmp_path):
    late = document(["a", "b", "c"], advantage=[None, 2.0, -2.0], weights=[[None, 2.0, 0.5], [None, None, 1.0]])
    early = document(["a", "b", "c"], advantage=[None, -1.0, 1.0], weights=[[None, 1.0, 1.0], [None, None, 1.0]])
    run = make_run(tmp_path, samples=[sample(1, early), sample(20, late)])
    found = browse(
        write_report([run]),
        """
        const seen = [];
        const look = () => seen.push([...document.querySelectorAll('.text .token')].map(
          e => e.style.background.match(/hot|cold/)?.[0] ?? ''));
        const choose = (n, value) => {
          const box = document.querySelectorAll('#texts select')[n];
          box.value = value; box.dispatchEvent(new Event('change'));
        };
        choose(1, '0'); look();
        choose(1, '1'); look();
        choose(2, 'advantage'); look();
        const slider = document.querySelector('#texts input[type=range]');
        slider.value = '0'; slider.dispatchEvent(new Event('input')); look();
        return seen;
        """,
    )
    assert found == [["", "hot", "cold"], ["", "", ""], ["", "hot", "cold"], ["", "cold", "hot"]]


@in_browser
def test_tokens_are_reached_by_keyboard(tmp_path):
    run = make_run(tmp_path, samples=[sample(1, document(["a", "b", "c"]))])
    found = browse(
        write_report([run]),
        """
        const text = document.querySelector('.text'), tip = document.querySelector('body > .tip'), seen = [];
        const press = key => {
          document.activeElement.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
          seen.push([document.activeElement.textContent, tip.hidden ? '' : tip.querySelector('code').textContent]);
        };
        text.focus();
        ['ArrowRight', 'ArrowRight', 'ArrowLeft', 'End', 'ArrowRight', 'Escape'].forEach(press);
        return seen;
        """,
    )
    assert found == [["a", '"a"'], ["b", '"b"'], ["a", '"a"'], ["c", '"c"'], ["c", '"c"'], ["c", ""]]


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
def test_texts_are_only_text(tmp_path):
    hostile = document(
        [HOSTILE, "한글 👩‍🔬", "\u2028\u2029\x00", "", HOSTILE], id=HOSTILE, reference_loss=[None, 1.0, None, 0.0, -1.0]
    )
    run = make_run(tmp_path, "a&b <i>", status=HOSTILE, samples=[sample(1, hostile, stage=HOSTILE)], trainer=HOSTILE)
    page = write_report([run])
    assert "<img" not in page.read_text()
    found = browse(
        page,
        """
        const tokens = [...document.querySelectorAll('.token')];
        tokens.forEach(one => one.dispatchEvent(new PointerEvent('pointerenter')));
        return [tokens.map(e => e.textContent), document.querySelectorAll('img, main script, main i i').length, document.title,
          document.querySelector('h1').textContent];
        """,
    )
    assert found[0] == [HOSTILE, "한글 👩‍🔬", "\u2028\u2029\x00", "·", HOSTILE]
    assert found[1:] == [0, "a&b <i> · WMTP", "a&b <i>"]


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

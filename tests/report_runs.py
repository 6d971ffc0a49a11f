"""Run directories with numbers that are chosen, and a browser for their pages."""

import json
import re
import shutil
import subprocess

import pytest
import tomli_w

from wmtp.runs.weight_bins import WEIGHT_BINS

__all__ = ["BROWSER", "HEADLESS", "browse", "document", "in_browser", "make_run", "sample", "write_lines"]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


#: in a container the shared memory that Chromium would take is too small, and it crashes now and then
HEADLESS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


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

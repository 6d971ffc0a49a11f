"""Pages can be used by everybody: axe-core finds nothing serious, in light and dark, narrow and wide."""

import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import pytest
from report_runs import BROWSER, HEADLESS, document, in_browser, make_run, sample
from test_study_page import write

from wmtp.reporting import write_report


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The script of axe-core, from npm."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm is installed")
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run([npm, "install", "--silent", "axe-core@4"], cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"axe-core cannot be installed: {done.stderr[-300:]}")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


def violations(page, axe, *, width, dark):
    """List the serious and critical findings of axe-core in a page: rule and elements."""
    driver = (
        f"<pre id='answer'></pre><script>{axe}</script><script>addEventListener('load', () => setTimeout(() => "
        "axe.run('main').then(found => { document.getElementById('answer').textContent = encodeURIComponent(JSON.stringify("
        "found.violations.filter(one => ['serious', 'critical'].includes(one.impact)).map(one => [one.id, "
        "one.nodes.slice(0, 4).map(node => node.html.slice(0, 160) + ' ' + node.any.map(any => any.message).join(' '))])));"
        "}), 500))</script>"
    )
    driven = page.with_name("driven.html")
    driven.write_text(page.read_text().replace('<main id="report">', driver + '<main id="report">', 1))
    options = [*HEADLESS, "--virtual-time-budget=20000", f"--window-size={width},1000"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    words = [BROWSER, *options, f"--user-data-dir={page.parent / 'browser'}", "--dump-dom", driven.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, check=True)
    answer = re.search(r"<pre id=.answer.>([^<]+)</pre>", done.stdout)
    assert answer, done.stderr[-2000:]
    return json.loads(unquote(answer[1]))


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", ["study", "run", "runs"])
def test_axe_finds_nothing_serious(axe, tmp_path, kind, dark):
    if kind == "study":
        page = write(tmp_path)
    else:
        shown = document(["def", " f", "(x)", ":\n", "  pass"], reference_loss=[None, 0.5, 1.25, 2.0, 3.0])
        names = ["one"] if kind == "run" else ["one", "two"]
        page = write_report(
            [make_run(tmp_path, name, samples=[sample(1, shown), sample(20, shown)]) for name in names], tmp_path / "p.html"
        )
    for width in (1200, 420):
        assert violations(page, axe, width=width, dark=dark) == []

"""Report page: one self-contained HTML file without network requests."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

from wmtp.config.places import build_backends
from wmtp.config.schema import StorageConfig
from wmtp.errors import ConfigError, WMTPError
from wmtp.redaction import redact
from wmtp.reporting.collect import collect
from wmtp.runs.directory import is_run_dir, replace_text
from wmtp.runs.files import UPLOADED_FILES
from wmtp.runs.weight_bins import WEIGHT_BINS
from wmtp.storage.uris import backend_for, file_path, localize, scheme_of

__all__ = ["html_page", "write_report"]

_SCRIPTS: Final = ("dom.js", "uPlot.iife.min.js", "charts.js", "texts.js", "report.js")
_STYLES: Final = ("uPlot.min.css", "report.css")

_POLICY: Final = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:"


def write_report(
    runs: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    status: str | None = None,
    storage: StorageConfig | None = None,
) -> Path:
    """Write the page of one run, or of several to compare.

    Args:
        runs: run directories, or the URIs that were their ``checkpoints.uri``.
        output: the file. Default: ``report.html`` in the run directory; of several runs, or of a URI, in the current one.
        status: of the runs, in place of what their ``run.json`` says.
        storage: how to reach the store of a URI. Default: as without a config.

    Returns:
        the file.

    Raises:
        ConfigError: a directory holds no run.
        WMTPError: a file of a run is damaged, or the page cannot be written.
    """
    is_remote = any(scheme_of(str(run)) != "file" for run in runs)
    folders = list(dict.fromkeys(_local(str(run), storage or StorageConfig()) for run in runs))
    if problems := [problem for folder in folders if (problem := _problem(folder))]:
        raise ConfigError(problems)
    beside = Path.cwd() if is_remote or len(folders) > 1 else folders[0]
    page = beside / "report.html" if output is None else Path(output).expanduser()
    if page.is_dir():
        raise ConfigError(f"--output {page}: is a folder; name a file in it")
    content = build_page([collect(folder, status=status) for folder in folders])
    try:
        replace_text(page, content)
    except OSError as error:
        raise WMTPError(f"{page} cannot be written: {error.strerror or error}") from error
    return page


def _local(run: str, storage: StorageConfig) -> Path:
    """Return the local folder of a run's files, downloading them if they are remote."""
    if scheme_of(run) == "file":
        return file_path(run).resolve()
    backends, uri = build_backends(storage), f"{run.rstrip('/')}/{UPLOADED_FILES}"
    if not backend_for(run, backends).exists(uri):
        raise ConfigError(f"{redact(run)} holds no run; write a checkpoints.uri, below which is the folder {UPLOADED_FILES!r}")
    return localize(uri, backends, Path(storage.cache_dir).expanduser())


def _problem(run: Path) -> str | None:
    if is_run_dir(run):
        return None
    if not run.exists():
        return f"{run}: does not exist"
    inside = sorted(path.name for path in run.iterdir() if is_run_dir(path)) if run.is_dir() else []
    hint = f"; it holds the runs {', '.join(inside[:10])}: name some of them" if inside else ""
    return f"{run}: holds no run (no config.toml){hint}"


def build_page(runs: Sequence[dict[str, Any]]) -> str:
    """Build the HTML page from the output of `wmtp.reporting.collect.collect` for each run."""
    return html_page(" · ".join(run["name"] for run in runs), {"runs": runs, "bins": WEIGHT_BINS}, _SCRIPTS, _STYLES)


def html_page(title: str, content: Mapping[str, Any], scripts: Sequence[str], styles: Sequence[str]) -> str:
    """Build one file that holds data, scripts and styles.

    Args:
        title: of the page.
        content: what the scripts show.
        scripts: names of assets, in order.
        styles: likewise.
    """
    data = json.dumps(content, separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c")  # no text can end the script element
    code = "".join(f"<script>\n{_asset(name)}\n</script>\n" for name in scripts)
    looks = "".join(f"<style>\n{_asset(name)}\n</style>\n" for name in styles)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(title)} · WMTP</title>
{looks}</head>
<body>
<main id="report"></main>
<noscript>This page needs JavaScript; all of it is in this file.</noscript>
<script type="application/json" id="data">{data}</script>
{code}</body>
</html>
"""


def _asset(name: str) -> str:
    return (resources.files("wmtp.reporting") / "assets" / name).read_text(encoding="utf-8")

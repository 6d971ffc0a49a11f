"""Report page: one self-contained HTML file without network requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from wmtp.config.places import build_backends
from wmtp.config.schema import StorageConfig
from wmtp.errors import ConfigError
from wmtp.redaction import redact
from wmtp.reporting.collect import collect
from wmtp.reporting.groups import grouped_page
from wmtp.reporting.html import html_page
from wmtp.runs.directory import is_run_dir, runs_in
from wmtp.runs.files import UPLOADED_FILES
from wmtp.runs.weight_bins import WEIGHT_BINS
from wmtp.storage.atomic import replace_text
from wmtp.storage.uris import backend_for, file_path, local_path, localize, scheme_of

__all__ = ["write_report"]

_SCRIPTS: Final = ("dom.js", "svg.js", "uPlot.iife.min.js", "charts.js", "texts.js", "report.js")
_STYLES: Final = ("uPlot.min.css", "report.css")


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
    page = beside / "report.html" if output is None else local_path(output, key="--output")
    if page.is_dir():
        raise ConfigError(f"--output {page}: is a folder; name a file in it")
    if page.suffix.lower() not in (".html", ".htm"):  # what is there is replaced: it could be a recipe
        raise ConfigError(f"--output {redact(str(page))}: an HTML page is written; call it something.html")
    content = grouped_page(folders) or build_page([collect(folder, status=status) for folder in folders])
    replace_text(page, content)
    return page


def _local(run: str, storage: StorageConfig) -> Path:
    """Return the local folder of a run's files, downloaded if remote."""
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
    if (run / "record").is_dir() and (run / "runs").is_dir():
        return f"{run}: is a study, whose page is {run / 'report.html'}; wmtp study STUDY.toml writes it anew"
    inside = runs_in(run)
    hint = f"; it holds the runs {', '.join(inside[:10])}: name some of them" if inside else ""
    return f"{run}: holds no run (no config.toml){hint}"


def build_page(runs: Sequence[dict[str, Any]]) -> str:
    """Build the HTML page from the output of `wmtp.reporting.collect.collect` for each run."""
    return html_page(" · ".join(run["name"] for run in runs), {"runs": runs, "bins": WEIGHT_BINS}, _SCRIPTS, _STYLES)

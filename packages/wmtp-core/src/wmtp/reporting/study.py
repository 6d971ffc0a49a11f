"""Page of a study, made from the records of its runs alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import asdict

from wmtp.reporting.html import html_page
from wmtp.storage.atomic import replace_text
from wmtp.studies.record import RunRecord
from wmtp.studies.table import StudyTable, as_dicts

__all__ = ["study_page", "write_study_report"]

_SCRIPTS: Final = ("dom.js", "svg.js", "texts.js", "study.js")
#: keys of a config that differ between the runs of one arm, or say nothing of what is computed
_OWN: Final = ("run.", "tracker.", "data.cache_dir", "checkpoints.", "report.", "storage.", "launcher.")

#: the model that another arm has trained
_MODEL: Final = re.compile(r"^.*/runs/([^/]+)-seed\d+-[0-9a-f]{8}/model$")


def write_study_report(name: str, baseline: str, table: StudyTable, records: Sequence[RunRecord], path: Path) -> None:
    """Write the page of a study.

    Args:
        name: of the study.
        baseline: the arm that others are compared to.
        table: what was found.
        records: of the runs that count.
        path: the file.

    Raises:
        WMTPError: it cannot be written.
    """
    replace_text(path, study_page(name, baseline, table, records))


def study_page(name: str, baseline: str, table: StudyTable, records: Sequence[RunRecord]) -> str:
    """Build the HTML page; arguments as for `write_study_report`."""
    return html_page(name, _data(name, baseline, table, records), _SCRIPTS, ("report.css", "study.css"))


def _data(name: str, baseline: str, table: StudyTable, records: Sequence[RunRecord]) -> dict[str, Any]:
    arms = list(dict.fromkeys(row.arm for row in table.rows))
    shown = [record for record in records if record.arm in arms]
    headline = table.headline
    same, different = _configs(arms, shown)
    return {
        "name": name,
        "arms": arms,
        "baseline": baseline,
        "sentence": table.sentence(),
        "headline": None if headline is None else asdict(headline),
        "rows": as_dicts(table.rows),
        "metrics": list(table.metrics),
        "notes": list(table.notes),
        "seeds": list(table.seeds),
        "same": same,
        "different": different,
        "facts": _facts(shown),
        "runs": [
            {
                "arm": record.arm,
                "seed": record.seed,
                "curves": record.page.get("curves", {}),
                "samples": record.page.get("samples", []),
            }
            for record in shown
        ],
    }


def _facts(records: Sequence[RunRecord]) -> dict[str, str]:
    devices = sorted({record.device for record in records if record.device})
    versions = sorted({f"{name} {version}" for record in records for name, version in record.versions.items()})
    return {
        "runs": f"{len(records):,}",
        "tokens read": f"{round(sum(record.tokens for record in records)):,}",
        "time": f"{sum(record.seconds for record in records) / 60:,.1f} minutes of one process",
        "device": ", ".join(devices),
        "versions": ", ".join(versions),
    }


def _configs(arms: Sequence[str], records: Sequence[RunRecord]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Split the config into keys common to all arms, and others."""
    by_arm: dict[str, Mapping[str, str]] = {}
    for record in records:
        by_arm.setdefault(record.arm, record.page.get("config", {}))
    keys = [key for key in dict.fromkeys(key for config in by_arm.values() for key in config) if not key.startswith(_OWN)]
    same, different = {}, {}
    for key in keys:
        values = {arm: _MODEL.sub(r"${arm:\1}", by_arm[arm].get(key, "–")) for arm in arms if arm in by_arm}
        if len(set(values.values())) == 1:
            same[key] = next(iter(values.values()))
        else:
            different[key] = values
    return same, different

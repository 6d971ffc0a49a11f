"""Self-contained HTML file with its data, scripts and styles."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Final

__all__ = ["html_page"]

_POLICY: Final = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:"


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

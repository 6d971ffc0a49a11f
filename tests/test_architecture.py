"""The page on the architecture says what is in the code."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()
SOURCE = ROOT / "packages/wmtp-core/src/wmtp"


def test_the_diagram_has_every_folder_in_the_order_of_the_linter():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    diagram = PAGE.split("```mermaid")[1].split("```")[0]
    drawn = [name for box in re.findall(r'\["(.*?)"\]', diagram) for name in box.split(" · ")]
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")} - {"testing"}
    assert drawn == [layer for layer in layers if layer in drawn]
    assert folders <= set(drawn)


def test_files_that_the_page_names_are_there():
    named = set(re.findall(r"\b((?:[a-z_]+/)+[a-z_]+\.py)\b", PAGE)) - {"tests/step_files.py"}
    assert len(named) > 5
    assert [name for name in sorted(named) if not (SOURCE / name).is_file()] == []

"""The documentation as a site: its pages and their order, its links, and that it needs nothing from elsewhere."""

import importlib.util
import re

import pytest
from conftest import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation_once(hooks):
    found = [file for _, pages in hooks.sections((DOCS / "index.md").read_text(encoding="utf-8")) for _, file in pages]
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {"index.md"}
    assert sorted(found) == sorted(pages), "a page needs a line in a table of docs/index.md"


def test_links_out_of_the_documentation_become_paths_or_pages(hooks):
    text = "[a recipe](../configs/local.toml), [`Dockerfile`](../Dockerfile), [changes](../CHANGELOG.md#x), [data](data.md)"
    assert hooks.inside(text) == "a recipe (`configs/local.toml`), `Dockerfile`, [changes](changelog.md#x), [data](data.md)"
    assert hooks.inside("[x](../../bench/x.py) [p](../p.md) [c](../../CHANGELOG.md)", "notes") == (
        "`bench/x.py` [p](../p.md) [c](../changelog.md)")  # fmt: skip
    assert hooks.from_root("[data](docs/data.md) [ours](configs) [far](https://a.b)") == (
        "[data](data.md) [ours](../configs) [far](https://a.b)")  # fmt: skip


def test_every_diagram_is_a_chain_that_the_site_can_draw(hooks):
    diagrams = [
        block
        for page in DOCS.glob("*.md")
        for block in re.findall(r"^```mermaid\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    ]
    assert diagrams
    for diagram in diagrams:
        assert len(list(hooks.chain(diagram))) > 2
    assert list(hooks.chain('flowchart TD\n a["A"] --> b\n b["B"] --> c["C"]')) == ["A", "B", "C"]
    for bad in ('a["A"] --> b["B"]\n a --> c["C"]', 'a["A"] --> b["B"]\n b --> a', 'a["A"] -.-> b["B"]'):
        with pytest.raises(ValueError, match="one chain"):
            list(hooks.chain(f"flowchart TD\n {bad}"))


def test_the_reference_follows_the_table_of_names(hooks):
    page = "| name | meaning | defined in |\n| --- | --- | --- |\n| `wmtp.run` | Train. | `wmtp.api.run` |\n"
    assert hooks.with_reference(page) == (
        "| name | meaning |\n| --- | --- |\n| [`wmtp.run`](#wmtp.api.run) | Train. |\n\n::: wmtp.api.run\n")  # fmt: skip


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_needs_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    pages = {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    assert "HeadsConfig(" in re.sub(r"<[^>]+>", "", pages["api"]), "attrs classes have no signature"
    for name, page in pages.items():
        assert not re.findall(r'<(?:script|link rel="?stylesheet"?|img)[^>]*(?:src|href)="?https?://', page), name
    assert (tmp_path / "search" / "search_index.js").stat().st_size > 10_000

"""Hooks of the documentation's site (mkdocs.yml).

Its pages are those that are read as plain files.

- The navigation is `index.md`: a page is below the heading under which that page names it.
- ``CHANGELOG.md`` and ``CONTRIBUTING.md`` become pages; links to other files outside ``docs/`` become their paths.
- A Mermaid flowchart that is one chain becomes a list, so that the site needs no script from elsewhere.
- The tables of public names in `api.md` are followed by the full reference, which mkdocstrings writes.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent

#: files outside ``docs/`` that are pages of the site, and their section
FURTHER = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
_ROW = re.compile(r"^\| \[([^\]]+)\]\(([\w./-]+\.md)\) \|", re.MULTILINE)


def sections(index: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Read the headings of ``index.md`` and the pages below each.

    Those have titles and files.
    """
    parts = re.split(r"^## (.+)$", index, flags=re.MULTILINE)
    return [(title, _ROW.findall(text)) for title, text in zip(parts[1::2], parts[2::2], strict=True)]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the navigation from ``index.md``."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    config.nav = [{"Home": "index.md"}]
    config.nav += [{title: [{name: file} for name, file in pages]} for title, pages in sections(index)]
    config.nav.append({"Project": [{"Contributing": "contributing.md"}, {"Changes": "changelog.md"}]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are outside ``docs/``."""
    from mkdocs.structure.files import File

    for source, target in FURTHER.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=from_root(text)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn a plain page into a page of the site."""
    if page.file.src_path == "api.md":
        markdown = with_reference(markdown)
    return inside(chains_as_lists(markdown), posixpath.dirname(page.file.src_uri))


def from_root(text: str) -> str:
    """Rewrite links of a root file as if it were in ``docs/``."""

    def rewritten(link: re.Match[str]) -> str:
        label, target = link.groups()
        if "://" in target or target.startswith("#"):
            return link[0]
        return f"[{label}]({target.removeprefix('docs/') if target.startswith('docs/') else f'../{target}'})"

    return _LINK.sub(rewritten, text)


def inside(text: str, folder: str = "") -> str:
    """Point a page's links to other files at their page.

    Or keep their path alone. The page is in ``docs/FOLDER``.
    """

    def rewritten(link: re.Match[str]) -> str:
        label, target = link.groups()
        path, _, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join("docs", folder, path)) if path else ""
        if "://" in target or not path or (place.startswith("docs/") and path.endswith(".md")):
            return link[0]
        if place in FURTHER:
            return f"[{label}]({posixpath.relpath(FURTHER[place], folder or '.')}{'#' if anchor else ''}{anchor})"
        return f"`{place}`" if label.strip("`") in place else f"{label} (`{place}`)"

    return _LINK.sub(rewritten, text)


def chains_as_lists(text: str) -> str:
    """Replace each Mermaid block by an ordered list.

    It must be a flowchart of one chain.
    """
    return re.sub(
        r"^```mermaid\n(.*?)^```$",
        lambda block: _as_list(list(chain(block[1]))),
        text,
        flags=re.MULTILINE | re.DOTALL,
    )


def chain(flowchart: str) -> Iterator[str]:
    """Yield the texts of a flowchart's boxes, in order.

    Raises:
        ValueError: it is no single chain of ``a["text"] --> b`` lines.
    """
    head, *lines = (line.strip() for line in flowchart.strip().splitlines())
    texts = dict(re.findall(r'(\w+)\["([^"]*)"\]', flowchart))
    parts = [re.sub(r'\["[^"]*"\]', "", line).split(" --> ") for line in lines]
    follows = {part[0]: part[1] for part in parts if len(part) == 2}
    firsts = set(follows) - set(follows.values())
    is_chain = len(firsts) == 1 and len(set(follows.values())) == len(follows) == len(texts) - 1
    if not head.startswith("flowchart") or not is_chain or {name for part in parts for name in part} != texts.keys():
        raise ValueError(f"the site draws flowcharts of one chain only, one arrow a line: {flowchart}")
    name: str | None = firsts.pop()
    while name is not None:
        yield texts[name]
        name = follows.get(name)


def _as_list(texts: list[str]) -> str:
    return '<ol class="chain">' + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ol>"


def with_reference(markdown: str) -> str:
    """Follow each table of public names by their references.

    Each name links to its own.
    """

    def reference(table: re.Match[str]) -> str:
        rows = re.findall(r"^\| `([^`]+)` \| (.*) \| `([^`]+)` \|$", table[0], re.MULTILINE)
        short = "".join(f"| [`{name}`](#{home}) | {meaning} |\n" for name, meaning, home in rows)
        return "| name | meaning |\n| --- | --- |\n" + short + "".join(f"\n::: {home}\n" for _, _, home in rows)

    return re.sub(r"^\| name \|.*\n(?:\|.*\n)+", reference, markdown, flags=re.MULTILINE)

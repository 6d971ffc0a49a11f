"""Names of the Hugging Face hub. Uses no network.

``hf://`` URIs, plain ``org/name``, and folders of the hub's cache.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote, unquote

from attrs import evolve, field, frozen

from wmtp.errors import ConfigError

__all__ = ["COMMIT", "HubName", "both_readings", "cached_snapshot", "parse_hub_uri", "plain_name", "unclear_target"]

#: a whole commit hash: the only revision that never moves
COMMIT: Final = re.compile(r"[0-9a-f]{40}")

_SEGMENT: Final = re.compile(r"(?![.-])(?!.*(--|\.\.))[\w.-]{1,96}(?<![.-])(?<!\.git)", re.ASCII)
_SPECIAL_REVISION: Final = re.compile(r"(refs/pr/\d+|refs/convert/[\w.-]+)(?=/|$)")
_OTHER_KINDS: Final = ("spaces", "kernels", "buckets")
#: what ends in one of these is a file, not the name of a model
_FILE_SUFFIXES: Final = re.compile(
    r"\.(gguf|safetensors|bin|pt|pth|model|json|jsonl|parquet|csv|tsv|txt|toml|arrow|gz|bz2|xz|zst|zip|py)", re.IGNORECASE
)
_CACHE_FOLDER: Final = re.compile(r"(models|datasets)--(?P<repo>.+)")


@frozen(kw_only=True)
class HubName:
    """A repository of the hub, or a file or folder in it.

    Args:
        kind: what the repository holds.
        repo: ``org/name``; a few old ones have no ``org/``.
        revision: a branch, a tag or a commit; None for the main branch.
        path: of a file or folder inside; empty for the whole repository.
    """

    kind: Literal["models", "datasets"] = "models"
    repo: str
    revision: str | None = None
    path: str = field(default="", converter=lambda path: path.strip("/"))

    @property
    def uri(self) -> str:
        """URI of the name."""
        kind = "datasets/" if self.kind == "datasets" else ""
        revision = "" if self.revision is None else f"@{_quoted(self.revision)}"
        return f"hf://{kind}{self.repo}{revision}{'/' * bool(self.path)}{quote(self.path)}"

    @property
    def page(self) -> str:
        """Path of the repository's web page."""
        return f"{'datasets/' if self.kind == 'datasets' else ''}{self.repo}"

    @property
    def is_pinned(self) -> bool:
        """True where the revision is a commit, which never moves."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None

    def pinned(self, commit: str, repo: str | None = None) -> HubName:
        """Take a commit, and the name that the repository has now."""
        return evolve(self, revision=commit, repo=repo or self.repo)


def _quoted(revision: str) -> str:
    return revision if _SPECIAL_REVISION.fullmatch(revision) else quote(revision, safe="")


def parse_hub_uri(uri: str) -> HubName:
    """Read ``hf://[datasets/]ORG/NAME[@REVISION][/PATH]``.

    Raises:
        ConfigError: it is no such URI.
    """
    rest = uri.partition("://")[2].rstrip("/")
    kind = "models"
    first, _, after = rest.partition("/")
    if first in ("models", "datasets"):
        kind, rest = first, after
    elif first in _OTHER_KINDS:
        raise ConfigError(f"{uri!r}: {first} of the hub hold no model and no data set; write hf://ORG/NAME")
    name, at, behind = rest.partition("@")
    segments = name.split("/")
    repo = "/".join(segments[:2])
    path = "/".join(segments[2:])
    revision = None
    if at:
        if path:
            raise ConfigError(f"{uri!r}: the revision goes behind the name: write hf://{repo}@{behind}/{path}")
        special = _SPECIAL_REVISION.match(behind)
        revision = special[0] if special else unquote(behind.partition("/")[0])
        path = behind[special.end() :] if special else behind.partition("/")[2]
        if not revision:
            raise ConfigError(f"{uri!r} names no revision behind '@'; write a branch, a tag or a commit, or leave '@' out")
    if not repo or not all(_SEGMENT.fullmatch(segment) for segment in repo.split("/")):
        what = "hf://datasets/ORG/NAME" if kind == "datasets" else "hf://ORG/NAME, or hf://datasets/ORG/NAME"
        raise ConfigError(f"{uri!r} is no name of the Hugging Face hub; write {what}, and @REVISION behind it if you like")
    path = unquote(path)
    if ".." in path.split("/"):
        raise ConfigError(f"{uri!r}: the path leaves the repository; write it without '..'")
    return HubName(kind="datasets" if kind == "datasets" else "models", repo=repo, revision=revision, path=path)


def plain_name(text: str) -> HubName | None:
    """Read a plain ``org/name[@revision]``; None where it can only be a path."""
    name, at, revision = text.partition("@")
    segments = name.split("/")
    if len(segments) != 2 or (at and not re.fullmatch(r"[\w./-]+", revision)):
        return None
    if not all(_SEGMENT.fullmatch(segment) for segment in segments) or _FILE_SUFFIXES.fullmatch(Path(name).suffix):
        return None
    return HubName(repo=name, revision=revision or None)


def both_readings(text: str, path: Path, name: HubName) -> str:
    """Say that a text is no path and may be a name."""
    return (
        f"{text!r} does not exist (that is {path}); for what has that name on the Hugging Face hub write {name.uri}, for a"
        " path correct it"
    )


def unclear_target(text: str) -> str | None:
    """Say that a push target is ambiguous; None where it is clear.

    It may be a name of the hub or a new folder.
    """
    name = plain_name(text)
    if name is None or Path(text).parent.exists():
        return None
    return f"{text!r} may be the hub's or a folder here; write {name.uri} for the Hugging Face hub, ./{text} for the folder"


def cached_snapshot(path: Path) -> Path:
    """Enter a folder of the hub's cache.

    Any other path stays as it is.

    Raises:
        ConfigError: the folder holds no revision, or several and none is its main one.
    """
    repo = path.parent if path.name == "snapshots" else path
    match = _CACHE_FOLDER.fullmatch(repo.name)
    if match is None or not (repo / "snapshots").is_dir():
        return path
    there = sorted(entry.name for entry in (repo / "snapshots").iterdir() if entry.is_dir())
    main = repo / "refs" / "main"
    chosen = main.read_text(encoding="utf-8").strip() if main.is_file() else None
    if chosen in there:
        return repo / "snapshots" / str(chosen)
    if len(there) == 1 and chosen is None:
        return repo / "snapshots" / there[0]
    name = match["repo"].replace("--", "/", 1)
    if not there or chosen is not None:
        found = f"holds no files of its main revision, {chosen[:12]}" if chosen else "holds no revision"
        raise ConfigError(f"{path}: this folder of the hub's cache {found}; fetch them by naming hf://{name}")
    raise ConfigError(
        f"{path}: this folder of the hub's cache holds several revisions and none is the main one; name one of them:"
        f" {', '.join(f'snapshots/{entry}' for entry in there[:5])}"
    )

"""Commands for stored files: ``wmtp fetch``, ``push``, ``clean`` and ``cache``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from wmtp.errors import ConfigError
from wmtp.redaction import redact
from wmtp.sizes import format_bytes, format_seconds, parse_bytes, parse_seconds

if TYPE_CHECKING:
    from wmtp.storage.cache import Cache

__all__ = ["add_arguments", "cache", "clean", "fetch", "push", "storage_options"]

_M_ARENA_MAX = -8  # of malloc.h


def add_arguments(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Describe the commands to argparse.

    ``wmtp runs`` is among them: it has the same options.
    """
    from wmtp.cli import runs

    options = storage_options()
    command = add(
        "fetch",
        "Bring a file or folder into a local folder, whole, compared with its checksums; resume a broken transfer.",
        options,
    )
    command.set_defaults(run_command=fetch)
    command.usage = "wmtp fetch [OPTION]… URI DIR"
    command.add_argument("words", metavar="URI DIR", nargs="*", help="s3://BUCKET/MODEL, https://…, a path; a folder")
    command.add_argument(
        "--verify", action="store_true", help="fetch nothing: compare the files in DIR with what was fetched into it"
    )
    for name, text in (("include", "fetch files only whose name matches"), ("exclude", "leave out files whose name matches")):
        command.add_argument(
            f"--{name}", action="append", default=[], metavar="PATTERN", help=f"{text}, as '*.safetensors'; may be repeated"
        )
    command = add("push", "Copy a local file or folder to a URI.", options)
    command.set_defaults(run_command=push)
    command.add_argument("path", metavar="PATH")
    command.add_argument("uri", metavar="URI")
    command = add("clean", "Remove what killed uploads left at a URI: half-written folders, unfinished uploads.", options)
    command.set_defaults(run_command=clean)
    command.add_argument("uri", metavar="URI", help="a file or folder; what is inside it and beside it counts")
    command.add_argument(
        "--older-than",
        default="24h",
        metavar="TIME",
        help="since something was added, as 90m or 7d, so that uploads under way stay; default: 24h",
    )
    command.add_argument("--dry-run", action="store_true", help="only list it")
    command = add("cache", "List, verify or prune the cache of fetched files.", options)
    command.set_defaults(run_command=cache)
    command.add_argument("action", choices=("list", "verify", "prune"))
    command.add_argument("--max-size", metavar="SIZE", help="prune: what may stay, as 200GB; the last used stays")
    command.add_argument("--cache-dir", metavar="DIR", help="default: storage.cache_dir")
    runs.add_arguments(add, options)


def storage_options() -> argparse.ArgumentParser:
    """Define the options that configure storage for commands without a config."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--config", action="append", default=[], metavar="FILE", help="a TOML file whose [storage] counts")
    options.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="as storage.s3.acceleration=true"
    )
    return options


def fetch(arguments: argparse.Namespace) -> tuple[Any, int]:
    """``wmtp fetch``."""
    from wmtp.actions import files as actions

    if arguments.verify:
        return _verify(arguments)
    if len(arguments.words) != 2:
        raise ConfigError(f"wmtp fetch: write where from and where to: wmtp fetch URI DIR; found {len(arguments.words)} words")
    uri, folder = arguments.words
    _keep_one_heap()
    done = actions.fetch(
        uri,
        folder,
        include=arguments.include,
        exclude=arguments.exclude,
        config=arguments.config,
        overrides=arguments.overrides,
    )
    if not arguments.json:
        rate = f", {format_bytes(done.transferred / done.seconds)}/s" if done.transferred and done.seconds else ""
        print(
            f"{done.target}: {done.files} {'file' if done.files == 1 else 'files'}, {format_bytes(done.size)},"
            f" {_compared(done.files, done.checked)}; {format_bytes(done.transferred)} came in {done.seconds:.1f} s{rate}"
        )
    return attrs.asdict(done), 0


def _compared(files: int, checked: int) -> str:
    """Say how many fetched files were compared with the store's checksums."""
    if checked == files:
        return "whole and verified"
    if not checked:
        return "whole by size (there is no checksum to compare with)"
    return f"whole; {checked} of {files} verified, the others by size (the store has no checksum of them)"


def _keep_one_heap() -> None:
    """Have glibc keep one heap for all threads.

    By itself it has one for each thread that receives bytes, and gives back none of it: with one, fetching takes a fifth less
    memory and a sixth less time of the processor. It holds for the whole process, so a library must not do it. Other C
    libraries are left alone.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def _verify(arguments: argparse.Namespace) -> tuple[Any, int]:
    from wmtp.actions.files import verify

    if len(arguments.words) not in (1, 2):
        raise ConfigError("wmtp fetch --verify: write which folder: wmtp fetch --verify DIR")
    found = verify(arguments.words[-1], arguments.words[0] if len(arguments.words) == 2 else None)
    if not arguments.json:
        whole = f"{found.target}: {found.files} files, {format_bytes(found.size)}, as they were fetched from {found.uri}"
        print("\n".join(found.problems) or whole)
    return attrs.asdict(found), 1 if found.problems else 0


def push(arguments: argparse.Namespace) -> tuple[Any, int]:
    """``wmtp push``."""
    from wmtp.actions.files import push

    done = push(arguments.path, arguments.uri, config=arguments.config, overrides=arguments.overrides)
    if not arguments.json:
        print(f"{done.uri}: whole, in {done.seconds:.1f} s")
    return attrs.asdict(done), 0


def clean(arguments: argparse.Namespace) -> tuple[Any, int]:
    """``wmtp clean``."""
    from wmtp.actions.files import clean

    older_than = parse_seconds(arguments.older_than)
    if older_than is None:
        raise ConfigError(f"--older-than: {arguments.older_than!r} is no time; write, for instance, 24h, 90m or 7d")
    found = clean(
        arguments.uri,
        older_than=older_than,
        dry_run=arguments.dry_run,
        config=arguments.config,
        overrides=arguments.overrides,
    )
    for each in [] if arguments.json else found:
        done = "would be removed" if arguments.dry_run else "removed"
        if not each.is_removable:
            done = "stays, since it held files before: upload it again, or remove it yourself"
        size = "" if each.size is None else f", {format_bytes(each.size)}"
        print(f"{each.uri}: {each.kind}{size}, {format_seconds(each.age)} old: {done}")
    if not arguments.json and not found:
        print(f"{redact(arguments.uri)}: nothing is left of killed uploads that is older than {format_seconds(older_than)}")
    return {"uri": arguments.uri, "leftovers": [attrs.asdict(each) for each in found], "dry_run": arguments.dry_run}, 0


def cache(arguments: argparse.Namespace) -> tuple[Any, int]:
    """``wmtp cache``."""
    from wmtp.actions.files import cache

    if (arguments.max_size is not None) != (arguments.action == "prune"):
        raise ConfigError("wmtp cache: --max-size SIZE says how much 'prune' leaves: wmtp cache prune --max-size 200GB")
    opened = cache(arguments.cache_dir, config=arguments.config, overrides=arguments.overrides)
    return {"list": _list, "verify": _verify_cache, "prune": _prune}[arguments.action](opened, arguments)


def _list(cache: Cache, arguments: argparse.Namespace) -> tuple[Any, int]:
    entries = cache.list()
    for entry in [] if arguments.json else entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        what = entry.uri or "not complete: another fetch continues it, or prune removes it"
        print(
            f"{format_bytes(entry.size):>9}  {used}  {'in use' if entry.is_in_use else '      '}  {entry.path.name[:8]}  {what}"
        )
    if not arguments.json:
        print(f"{cache.folder}: {_entries(len(entries))}, {format_bytes(sum(entry.size for entry in entries))}")
    return {"cache_dir": cache.folder, "entries": [attrs.asdict(entry) for entry in entries]}, 0


def _verify_cache(cache: Cache, arguments: argparse.Namespace) -> tuple[Any, int]:
    problems = cache.verify()
    if not arguments.json:
        print("\n".join(problems) or f"{cache.folder}: all is as it was fetched")
    return {"cache_dir": cache.folder, "problems": problems}, 1 if problems else 0


def _prune(cache: Cache, arguments: argparse.Namespace) -> tuple[Any, int]:
    most = parse_bytes(arguments.max_size)
    if most is None:
        raise ConfigError(f"--max-size: {arguments.max_size!r} is no size; write, for instance, 200GB or 1.5TB")
    removed = cache.prune(most)
    left = sum(entry.size for entry in cache.list())
    if not arguments.json:
        why = ": more than --max-size, for running processes use it" if left > most else ""
        print(f"{cache.folder}: {_entries(len(removed))} removed, {format_bytes(left)} left{why}")
    return {"cache_dir": cache.folder, "removed": [attrs.asdict(entry) for entry in removed], "size": left}, 0


def _entries(count: int) -> str:
    return f"{count} entr{'y' if count == 1 else 'ies'}"

"""Rules for configs that run on VESSL, checked from the config alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from wmtp.config.inputs import inputs
from wmtp.config.schema import Config
from wmtp.errors import ConfigError
from wmtp.storage.uris import scheme_of
from wmtp_vessl.config import VesslLauncher
from wmtp_vessl.render import WORKDIR, environment

__all__ = ["problems", "warnings"]

#: Linux hands a variable to a process only up to 128 KiB
_LONGEST_VARIABLE = 100_000


def problems(config: Config, launcher: VesslLauncher) -> Iterator[str]:
    """One line each: ``dotted.key: what is wrong; what to do``."""
    for key, path in _local_paths(config):
        if not _is_inside(path, (WORKDIR, *launcher.mounts, *launcher.imports, launcher.cache.path)):
            yield (
                f"{key}: {path!r} is not in the container: it has {WORKDIR} and what [launcher] mounts or imports; write a path"
                f" there, or a URI such as s3://bucket/{PurePosixPath(path).name or 'folder'}"
            )
    if config.devices.cuda_graphs and launcher.processes is None and launcher.gpus > 1:  # else the config's own rule sees it
        yield (
            f"launcher.gpus: {launcher.gpus}, each for a process, and devices.cuda_graphs records the passes of one process; "
            "write gpus = 1, or remove devices.cuda_graphs"
        )
    text = environment(config, launcher)["WMTP_CONFIG"]
    if "$(" in text:
        yield "launcher: the config holds '$(', which the service would take for a variable; write it differently"
    if len(text.encode()) > _LONGEST_VARIABLE:
        yield f"launcher: the config has {len(text.encode()):,} bytes, and the container takes {_LONGEST_VARIABLE:,}"


def _local_paths(config: Config) -> Iterator[tuple[str, str]]:
    """List the paths of the container that the config names.

    Relative ones are in its working folder.
    """
    yield "run.output_dir", config.run.output_dir
    if config.data.cache_dir is not None:
        yield "data.cache_dir", config.data.cache_dir
    for key, target in (("checkpoints.uri", config.checkpoints.uri), ("run.push_to", config.run.push_to)):
        if target is not None and _is_file(target):
            yield key, target
    for given in inputs(config):
        if _is_file(given.uri):
            yield given.key, given.uri


def _is_file(uri: str) -> bool:
    try:
        return scheme_of(uri) == "file"
    except ConfigError:  # said already, by the check of every URI
        return False


def _path(uri: str) -> PurePosixPath:
    return PurePosixPath(uri.removeprefix("file://"))


def _is_inside(path: str, folders: tuple[str, ...]) -> bool:
    plain = _path(path)
    if ".." in plain.parts or path.startswith("~"):
        return False
    return not plain.is_absolute() or any(plain.is_relative_to(folder) for folder in folders)


def warnings(config: Config, launcher: VesslLauncher) -> Iterator[str]:
    """Warn of settings that are allowed and yet unwise."""
    if launcher.digest is None:
        yield (
            f"launcher.image: {launcher.image} is named without a digest: it may be another image tomorrow; write"
            f" {re.sub(r':[^/:]*$', '', launcher.image)}@sha256:…"
        )
    for target, source in launcher.mounts.items():
        if str(source).startswith("volume://") or (not isinstance(source, str) and "volume" in source):
            yield f"launcher.mounts: {target}: VESSL's managed storage is reported to refuse mounted volumes; use imports"
    if launcher.cache.mode == "mount" and str(launcher.cache.source).startswith("volume://"):
        yield (
            "launcher.cache: VESSL's managed storage is reported to refuse mounted volumes; mount nfs or hostpath, or use"
            ' mode = "import"'
        )
    brought = (*launcher.mounts, *launcher.imports, launcher.cache.path)
    for given in inputs(config):
        if _is_file(given.uri) and not any(_path(given.uri).is_relative_to(path) for path in brought):
            yield (
                f"{given.key}: {given.uri!r} must be in the image: nothing is mounted or imported there; a URI such as s3://…"
                " is fetched"
            )
    if config.checkpoints.uri is None and not launcher.exports:
        yield "checkpoints.uri: checkpoints stay in the container and are lost with it; write s3://…, or [launcher.exports]"
    places = (config.checkpoints.uri, config.run.push_to, config.tracker.tracking_uri)
    # jobs take no secrets by name
    if (
        any(str(place).startswith("s3://") for place in (*places, *(given.uri for given in inputs(config))))
        and launcher.backend == "runs"
        and not any(name.startswith("AWS_") for name in (*launcher.secrets, *launcher.env))
    ):
        yield (
            "launcher.secrets: the config has s3:// URIs, and no AWS_… variable is given to the container; name"
            " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY unless the machines have a role of their own"
        )

"""Config class of the launcher: `[launcher]` with ``type = "vessl"``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from attrs import Factory, field, frozen
from attrs.validators import ge, gt, le, min_len, optional

from wmtp.config.secrets import is_secret
from wmtp.plugins.contract import LauncherConfig

if TYPE_CHECKING:
    from wmtp.launchers.base import RemoteLauncher

__all__ = ["Cache", "Port", "VesslLauncher", "seconds"]

#: a variable's name that says that its value is nobody's business
SECRET_NAME = re.compile(r"KEY(?!BOARD|WORD)|TOKEN(?!IZ)|SECRET|PASSW(OR)?D|CREDENTIAL", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DURATION = re.compile(r"(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
#: variables that the launcher itself sets
_OWN = re.compile(r"WMTP_(CONFIG|VERSION|MAX_RUNTIME)")

#: the forms that VESSL's run YAML has for what is copied in, mounted, and copied out
_URI_SCHEMES = {
    "imports": ("git", "hf", "s3", "gs", "vessl-dataset", "vessl-model", "vessl-artifact", "volume"),
    "mounts": ("vessl-dataset", "hostpath", "nfs", "volume"),
    "exports": ("s3", "gs", "vessl-dataset", "vessl-model", "vessl-artifact", "volume"),
}
_TABLES = {
    "imports": ("git", "hf", "s3", "gs", "dataset", "model", "artifact", "volume"),
    "mounts": ("dataset", "hostpath", "nfs", "cifs", "gcs_fuse", "volume"),
    "exports": ("s3", "gs", "dataset", "model", "artifact", "volume"),
}


def seconds(duration: str) -> int:
    """``1d12h``, ``90m``, ``3600s`` in seconds.

    Raises:
        ValueError: it is no duration, or none at all.
    """
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise ValueError(f"must be a duration such as '24h', '1d12h' or '90m', not {duration!r}")
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if total == 0:
        raise ValueError("must be longer than nothing")
    return total


def _duration(_: Any, __: Any, value: str | None) -> None:
    if value is not None:
        seconds(value)


def _image(_: Any, __: Any, value: str) -> None:
    if not re.fullmatch(r"[^\s@]+(@sha256:[0-9a-f]{64})?", value):
        raise ValueError(f"must be registry/name:tag, or better registry/name@sha256: and 64 hexadecimal digits, not {value!r}")


@frozen(kw_only=True)
class Port:
    """A port that the container serves, for instance TensorBoard.

    Args:
        name: what it is called.
        port: its number.
        type: ``http`` or ``tcp``.
    """

    name: str = field(validator=min_len(1))
    port: int = field(validator=[ge(1), le(65535)])
    type: Literal["http", "tcp"] = "http"


@frozen(kw_only=True)
class Cache:
    """Where fetched models and data outlive a run.

    Args:
        mode: ``mount``: the source is attached and used in place, by many runs at once; ``import``: it is copied in at
            the start, and what is fetched besides is lost at the end; ``none``: everything is fetched each time.
        source: what is mounted or imported: the same forms as in ``mounts`` and ``imports``.
        path: where it is in the container.
    """

    mode: Literal["mount", "import", "none"] = "none"
    source: str | Mapping[str, Any] | None = None
    path: str = "/app/cache"


@frozen(kw_only=True)
class VesslLauncher(LauncherConfig):
    """Launcher for runs on VESSL.

    ``wmtp launch`` shows what it sends; ``wmtp launch --dry-run`` sends nothing. In the container ``wmtp start`` fetches what
    the config names, starts the processes and uploads what they leave.

    Args:
        backend: ``runs``: VESSL Runs, by its HTTP interface; ``jobs``: VESSL Cloud Jobs, by the program ``vesslctl``.
        organization: default: ``VESSL_DEFAULT_ORGANIZATION``, else what ``vessl configure`` wrote.
        project: default: ``VESSL_DEFAULT_PROJECT``, else what ``vessl configure`` wrote.
        cluster: the cluster; for ``jobs`` it may be left empty.
        preset: a machine type of the cluster; for ``jobs`` the slug of the resource spec.
        gpus: number of the machine's GPUs that the run uses.
        processes: training processes. Default: one a GPU.
        image: the container image, best by digest: ``registry/name@sha256:…``.
        image_credential: the name, on VESSL, of the registry's credentials.
        env: variables of the container. Secrets do not belong here: what is sent is kept and shown by the service.
        secrets: variable → the name that the secret has on VESSL.
        imports: folder in the container → what is copied there at the start.
        mounts: folder in the container → what is attached there.
        exports: folder in the container → where it is copied at the end.
        cache: where fetched files outlive a run.
        ports: ports that the container serves.
        node_names: only on these nodes of the cluster.
        spot: on a machine that may be taken away; the run then saves a checkpoint.
        interactive: keep the container, with Jupyter, after the run.
        idle_timeout: of an interactive container.
        max_runtime: time after which the run saves a checkpoint and ends.
        service_account: the Kubernetes service account.
        termination_protection: the service asks before it ends the run.
        tags: words for the service's list of runs, besides ``run.tags``.
        description: a sentence for the service's list of runs.
        poll_interval: seconds between two looks at a log that is followed.
    """

    type = "vessl"
    remote = True

    backend: Literal["runs", "jobs"] = "runs"
    organization: str | None = field(default=None, validator=optional(min_len(1)))
    project: str | None = field(default=None, validator=optional(min_len(1)))
    cluster: str = ""
    preset: str = field(validator=min_len(1))
    gpus: int = field(validator=ge(0))
    processes: int | None = field(default=None, validator=optional([ge(1), le(1024)]))
    image: str = field(validator=_image)
    image_credential: str | None = None
    env: Mapping[str, str | int | float | bool] = Factory(dict)
    secrets: Mapping[str, str] = Factory(dict)
    imports: Mapping[str, str | Mapping[str, Any]] = Factory(dict)
    mounts: Mapping[str, str | Mapping[str, Any]] = Factory(dict)
    exports: Mapping[str, str | Mapping[str, Any]] = Factory(dict)
    cache: Cache = Factory(Cache)
    ports: tuple[Port, ...] = ()
    node_names: tuple[str, ...] = ()
    spot: bool = False
    interactive: bool = False
    idle_timeout: str = field(default="2h", validator=_duration)
    max_runtime: str | None = field(default=None, validator=_duration)
    service_account: str | None = None
    termination_protection: bool = False
    tags: tuple[str, ...] = ()
    description: str | None = None
    poll_interval: float = field(default=3.0, validator=[gt(0.0), le(1e6)])

    @property
    def digest(self) -> str | None:
        """Digest of the image, where the image is named by it."""
        return self.image.partition("@")[2] or None

    def check(self) -> Iterator[str]:
        """Report problems within this table."""
        if self.gpus and self.processes is not None and self.processes > self.gpus:
            yield f"processes: {self.processes} processes need {self.processes} GPUs, and gpus = {self.gpus}"
        if self.backend == "runs" and not self.cluster:
            yield "cluster: required, and empty: the name of a cluster; the service lists them with --dry-run=server"
        yield from self._check_variables()
        for key in ("imports", "mounts", "exports"):
            for target, source in getattr(self, key).items():
                yield from _check_volume(key, f'"{target}"', target, source)
        if self.cache.mode == "none":
            if self.cache.source is not None:
                yield 'cache.mode: is "none", and cache.source is given; write "mount" or "import", or remove the source'
        elif self.cache.source is None:
            yield f'cache.source: required where cache.mode = "{self.cache.mode}", and missing'
        else:
            kind = "mounts" if self.cache.mode == "mount" else "imports"
            yield from _check_volume(kind, "", self.cache.path, self.cache.source, key="cache.source")
            if self.cache.path in self.mounts or self.cache.path in self.imports:
                yield f"cache.path: {self.cache.path} is the target of another mount or import too"
        if self.backend == "jobs":
            yield from self._check_jobs()
        seen: set[str] = set()
        for target in (*self.imports, *self.mounts):
            if target in seen:
                yield f"mounts: {target} is imported too; choose one"
            seen.add(target)

    def _check_variables(self) -> Iterator[str]:
        for key, names in (("env", self.env), ("secrets", self.secrets)):
            for name in names:
                if not _VARIABLE.fullmatch(name):
                    yield f"{key}: {name!r} is no name of an environment variable"
                elif _OWN.fullmatch(name):
                    yield f"{key}: {name} is set by the launcher itself; remove it"
        for name, value in self.env.items():
            if name in self.secrets:
                yield f"env: {name} is in secrets too; choose one"
            elif SECRET_NAME.search(name) or is_secret("", str(value)):
                yield (
                    f"env: {name} looks like a secret, and VESSL keeps and shows what it is sent; store the value as a secret"
                    f' on VESSL and write {name} = "the-secret\'s-name" in [launcher.secrets]'
                )
        for name, secret in self.secrets.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", secret) or is_secret("", secret):
                yield f"secrets: {name} must be the name of a secret on VESSL, and is none: its value does not belong here"

    def _check_jobs(self) -> Iterator[str]:
        unsupported = {
            "exports": self.exports, "imports": self.imports, "ports": self.ports, "node_names": self.node_names,
            "spot": self.spot, "interactive": self.interactive, "service_account": self.service_account,
            "termination_protection": self.termination_protection, "image_credential": self.image_credential,
            "secrets": self.secrets,
        }  # fmt: skip
        for key, value in unsupported.items():
            if value:
                yield f'{key}: backend = "jobs" has no such thing; remove it, or use backend = "runs"'
        volumes = [("mounts", source) for source in self.mounts.values()]
        if self.cache.mode != "none" and self.cache.source is not None:
            if self.cache.mode == "import":
                yield 'cache.mode: backend = "jobs" only mounts; write "mount"'
            volumes.append(("cache.source", self.cache.source))
        for key, source in volumes:
            if not (isinstance(source, str) and re.fullmatch(r"(object|cluster)://[\w.-]+", source)):
                yield f'{key}: backend = "jobs" mounts object://VOLUME and cluster://VOLUME, not {source!r}'

    def build(self) -> RemoteLauncher:
        """Make the launcher."""
        if self.backend == "jobs":
            from wmtp_vessl.jobs import VesslJobs

            return VesslJobs(self)
        from wmtp_vessl.runs import VesslRuns

        return VesslRuns(self)


def _check_volume(
    kind: str, name: str, target: str, source: str | Mapping[str, Any], *, key: str | None = None
) -> Iterator[str]:
    where = key or kind
    about = f"{name}: " if name else ""
    if not target.startswith("/") or ".." in target.split("/"):
        yield f"{where}: {about}{target!r} is no folder of the container; write an absolute path, as /app/models"
    if isinstance(source, str):
        scheme, slashes, rest = source.partition("://")
        allowed = (*_URI_SCHEMES[kind], "object", "cluster") if kind == "mounts" else _URI_SCHEMES[kind]
        if not slashes or scheme not in allowed or not rest:
            forms = ", ".join(f"{known}://…" for known in _URI_SCHEMES[kind])
            yield f"{where}: {about}{source!r} is none of the forms {forms}, nor a table of {', '.join(_TABLES[kind])}"
        elif scheme == "volume" and not re.fullmatch(r"[^/]+/[^/].*", rest):
            yield f"{where}: {about}{source!r} is no volume; write volume://STORAGE/VOLUME"
    else:
        kinds = [word for word in source if word != "options"]
        if len(kinds) != 1 or kinds[0] not in _TABLES[kind]:
            found = ", ".join(source) or "an empty table"
            yield f"{where}: {about}one of {', '.join(_TABLES[kind])} is needed, not {found}"

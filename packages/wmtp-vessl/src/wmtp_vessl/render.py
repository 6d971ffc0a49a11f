"""Rendering of a config for VESSL: pure, offline and without secrets.

The same config gives the same text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final

import tomli_w
import yaml
from attrs import evolve

from wmtp.config.schema import Config
from wmtp.config.sources import escape
from wmtp.config.tree import to_mapping
from wmtp.launchers.base import LaunchPlan
from wmtp.launchers.config import LocalLauncher
from wmtp_vessl.config import VesslLauncher, seconds

__all__ = ["COMMAND", "KEYS", "TAG", "WORKDIR", "body", "container_config", "environment", "plan_of", "run_yaml"]

#: the keys of a run YAML; the service knows no others
KEYS: Final = (
    *("name", "description", "tags", "resources", "image", "import", "mount", "export", "run", "env", "ports"),
    *("interactive", "service_account_name", "termination_protection"),
)
WORKDIR: Final = "/app"
#: what the container runs: one line of POSIX shell that becomes a Python process
COMMAND: Final = "exec wmtp start"
#: how a run is recognized as one of a plan: a tag with the beginning of its digest
TAG: Final = "wmtp-plan-{}"


def container_config(config: Config, launcher: VesslLauncher) -> Config:
    """Adapt the config to the container.

    It gets the local launcher, and the launcher's cache folder.
    """
    processes = launcher.processes or launcher.gpus or "auto"
    inside = evolve(config, launcher=LocalLauncher(processes=processes))
    if launcher.cache.mode != "none":
        inside = evolve(inside, storage=evolve(inside.storage, cache_dir=launcher.cache.path))
    return inside


def environment(config: Config, launcher: VesslLauncher) -> dict[str, str]:
    """List the variables of the container, without secrets."""
    values = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in launcher.env.items()}
    values["WMTP_VERSION"] = version("wmtp-core")
    if launcher.max_runtime is not None:
        values["WMTP_MAX_RUNTIME"] = str(seconds(launcher.max_runtime))
    values["WMTP_CONFIG"] = tomli_w.dumps(to_mapping(container_config(config, launcher), text=escape))
    return values


def run_yaml(config: Config, launcher: VesslLauncher) -> dict[str, Any]:
    """Make the run YAML of VESSL Runs, without empty keys."""
    resources: dict[str, Any] = {"cluster": launcher.cluster, "preset": launcher.preset}
    if launcher.node_names:
        resources["node_names"] = list(launcher.node_names)
    if launcher.spot:
        resources["spot"] = True
    env: dict[str, Any] = dict(environment(config, launcher))
    env |= {name: {"secret": secret} for name, secret in launcher.secrets.items()}
    mounts, imports = _plain(launcher.mounts), _plain(launcher.imports)
    if launcher.cache.mode != "none":
        (mounts if launcher.cache.mode == "mount" else imports)[launcher.cache.path] = _plain(launcher.cache.source)
    spec: dict[str, Any] = {
        "name": config.run.name or f"wmtp-{config.trainer.type}",
        "description": launcher.description,
        "tags": list(dict.fromkeys((*config.run.tags, *launcher.tags))),
        "resources": resources,
        "image": {"url": launcher.image, "credential_name": launcher.image_credential}
        if launcher.image_credential
        else launcher.image,
        "import": imports,
        "mount": mounts,
        "export": _plain(launcher.exports),
        "run": [{"command": COMMAND, "workdir": WORKDIR}],
        "env": env,
        "ports": [{"name": port.name, "type": port.type, "port": port.port} for port in launcher.ports],
        "interactive": {
            "max_runtime": launcher.max_runtime or "24h",
            "jupyter": {"idle_timeout": launcher.idle_timeout},
        }
        if launcher.interactive
        else None,
        "service_account_name": launcher.service_account,
    }
    spec = {key: value for key, value in spec.items() if value not in (None, [], {})}
    return spec | {"termination_protection": launcher.termination_protection}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(element) for key, element in value.items()}
    return [_plain(element) for element in value] if isinstance(value, list | tuple) else value


def plan_of(config: Config, launcher: VesslLauncher, spec: dict[str, Any], *, warnings: list[str]) -> LaunchPlan:
    """Make the plan for a spec, with a tag that identifies it."""
    digest = hashlib.sha256(yaml.safe_dump(spec, sort_keys=False).encode()).hexdigest()
    tagged = spec | {"tags": [*spec.get("tags", []), TAG.format(digest[:12])]}
    ordered = {key: tagged[key] for key in KEYS if key in tagged}
    return LaunchPlan(
        text=yaml.dump(ordered, Dumper=_Readable, default_flow_style=False, sort_keys=False, allow_unicode=True),
        digest=digest,
        warnings=tuple(warnings),
        facts={
            "cluster": launcher.cluster,
            "preset": f"{launcher.preset}, {launcher.gpus} GPUs",
            "image": launcher.image,
        },
        record={"image": launcher.image, "image_digest": launcher.digest},
    )


class _Readable(yaml.SafeDumper):
    """Dumper that writes a text of several lines as such.

    The config is there to be read.
    """


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # YAML takes U+0085 for the end of a line; only in quotes it is written as an escape
    style = '"' if "\x85" in value else "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Readable.add_representer(str, _text)


def body(plan: LaunchPlan) -> str:
    """Return a plan's request body, as VESSL's own client writes it."""
    return yaml.dump(yaml.safe_load(plan.text), default_flow_style=False, sort_keys=False)

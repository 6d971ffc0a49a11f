"""Start this machine's processes by torchrun, and collect their result."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve

from wmtp.config.load import load
from wmtp.config.tree import dump_config
from wmtp.cores import usable_cores
from wmtp.distributed.environment import Nodes, interface_of, own_address
from wmtp.errors import ConfigError, PluginError, Terminated, WMTPError
from wmtp.json_files import writing
from wmtp.runs.result import Result
from wmtp.signals import can_be_caught
from wmtp.storage.atomic import replace_text

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from wmtp.config.schema import Config

__all__ = ["launch", "read_result", "share_cores", "write_failure", "write_result"]

logger = logging.getLogger("wmtp")

#: seconds that processes have to write a checkpoint after a signal before they are killed
_GRACE = 600
_KINDS: Mapping[str, type[WMTPError]] = {"config": ConfigError, "plugin": PluginError, "work": WMTPError, "lost": WMTPError}


def launch(config: Config, nodes: Nodes, count: int, *, run_dir: Path | None, resume: bool) -> Result:
    """Train in ``count`` processes on each machine, and wait for them.

    Args:
        config: complete and checked.
        nodes: the machines.
        count: processes on this one.
        run_dir: the run directory; None on a machine that is not the first.
        resume: whether to resume from the newest checkpoint there.

    Raises:
        ConfigError, PluginError, WMTPError: as one of the processes said, or one of them died.
        KeyboardInterrupt: a signal ended them before they could write a checkpoint; `Terminated` where it was SIGTERM.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="wmtp-") as folder:
        job = Path(folder)
        _write_job(job, config, run_dir, resume=resume)
        options: dict[str, Any] = {
            "min_nodes": nodes.count,
            "max_nodes": nodes.count,
            "nproc_per_node": count,
            "run_id": "wmtp",
            "max_restarts": 0,
            "monitor_interval": 0.1,
            **_rendezvous(nodes),
        }
        known = {field.name for field in fields(LaunchConfig)}
        newer = {"shutdown_timeout": _GRACE, "signals_to_handle": ",".join(number.name for number in _caught_by_torchrun())}
        options |= {name: value for name, value in newer.items() if name in known}
        _quiet()
        share_cores(count)
        failed: ChildFailedError | None = None
        received: str | None = None
        try:
            with _signals_kept():
                elastic_launch(LaunchConfig(**options), sys.executable)("-m", "wmtp.launchers.worker", folder)
        except ChildFailedError as error:
            failed = error
        except SignalException as error:
            received = error.sigval.name
        except (RuntimeError, RendezvousError) as error:  # the other machines are not there
            raise WMTPError(f"launcher: the processes could not be started: {error}") from error
        if (result := read_result(job)) is not None:
            # Ctrl-C may have come when the processes had done their work: a loop over runs ends nevertheless
            return evolve(result, signal="SIGINT") if received == "SIGINT" else result
        if received is not None:
            raise KeyboardInterrupt if received == "SIGINT" else Terminated
        raise _explained(job, failed, "" if run_dir is None else f"; {_last_checkpoint(config, run_dir)}")


def _caught_by_torchrun() -> list[signal.Signals]:
    """List the signals that end a run.

    None that this process ignores, as nohup has it ignore SIGHUP.
    """
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    numbers = [signal.Signals[name] for name in names if hasattr(signal, name)]
    return [number for number in numbers if can_be_caught(number)]


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore signal handlers afterwards.

    torchrun's would raise an ordinary exception for every later Ctrl-C of this process.
    """
    if threading.current_thread() is not threading.main_thread():  # torchrun sets none there
        yield
        return
    before = {number: signal.getsignal(number) for number in _caught_by_torchrun()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_job(job: Path, config: Config, run_dir: Path | None, *, resume: bool) -> None:
    """Write the processes' config, and check that TOML preserves it."""
    text = dump_config(config)
    with writing(job / "config.toml"):
        (job / "config.toml").write_text(text, encoding="utf-8")
    try:
        same = load(job / "config.toml").config == config
    except ConfigError as error:
        raise ConfigError(
            [
                *error.problems,
                "launcher.processes: several processes read TOML; install its plugins, or write 1",
            ]
        ) from error
    if not same:
        raise ConfigError("launcher.processes: the config cannot be written as TOML for several processes; write 1")
    facts = {
        "run_dir": None if run_dir is None else str(run_dir.absolute()),
        "resume": resume,
        "parent": os.getpid(),
        "verbose": logger.isEnabledFor(logging.DEBUG),
    }
    with writing(job / "job.json"):
        (job / "job.json").write_text(json.dumps(facts))


def _rendezvous(nodes: Nodes) -> dict[str, Any]:
    """Choose the settings by which the processes find each other."""
    if nodes.count == 1:
        # nothing leaves this machine, so its name need not be known to anybody
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        return {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    address = own_address(nodes)
    if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := interface_of(address)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    # with the static rendezvous the first machine listens, and need not find out by its name that it is the first
    return {
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{nodes.address}:{nodes.port}",
        "rdzv_configs": {"rank": nodes.rank, "timeout": 900},
        "local_addr": address,
    }


def _quiet() -> None:
    """Silence torchrun's own reports.

    The processes' errors come from here, once.
    """
    for name in ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # the modules' own loggers were given levels of their own
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def share_cores(count: int) -> None:
    """Share this process's cores among ``count`` processes, unless the user sets threads.

    torchrun's own default is one thread: rank 0 would take a minute to try out a model of 7B parameters.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))


# --- what processes leave in the job's folder


def write_result(job: Path, result: Result) -> None:
    """Write how the run ended; on rank 0."""
    facts = {
        "run_dir": str(result.run_dir),
        "model": None if result.model is None else str(result.model),
        "checkpoint": None if result.checkpoint is None else str(result.checkpoint),
        "steps": result.steps,
        "metrics": dict(result.metrics),
        "status": result.status,
        "signal": result.signal,
    }
    replace_text(job / "result.json", json.dumps(facts))


def read_result(job: Path) -> Result | None:
    """Read rank 0's result, if it came to an end."""
    try:
        facts = json.loads((job / "result.json").read_text())
    except OSError:
        return None
    path = lambda value: None if value is None else Path(value)  # noqa: E731
    return Result(
        run_dir=Path(facts["run_dir"]),
        model=path(facts["model"]),
        checkpoint=path(facts["checkpoint"]),
        steps=facts["steps"],
        metrics=facts["metrics"],
        status=facts["status"],
        signal=facts["signal"],
    )


def write_failure(job: Path, rank: int, kind: str, lines: list[str]) -> None:
    """Write what went wrong on a rank; the first one is believed."""
    replace_text(job / f"failure-{rank}.json", json.dumps({"rank": rank, "kind": kind, "lines": lines}))


def _explained(job: Path, failed: ChildFailedError | None, where: str) -> WMTPError:
    """Make one error of all that the processes left.

    Args:
        job: where they left it.
        failed: what torchrun knows of them.
        where: what to say of checkpoints, where the error of a process does not.
    """
    files = sorted(job.glob("failure-*.json"), key=lambda path: path.stat().st_mtime_ns)
    told = [json.loads(file.read_text()) for file in files]
    # that another rank is lost says less than what the lost one said, or how it was killed
    own = [failure for failure in told if failure["kind"] != "lost"]
    if own:
        lines = own[0]["lines"]
        return ConfigError(lines) if own[0]["kind"] == "config" else _KINDS[own[0]["kind"]]("\n".join(lines))
    killed = [
        (rank, failure) for rank, failure in (failed.failures if failed is not None else {}).items() if failure.exitcode < 0
    ]
    hung = [failure for failure in told if failure["kind"] == "lost"]
    first_told = min((file.stat().st_mtime for file in files), default=math.inf)
    for rank, failure in sorted(killed, key=lambda pair: pair[1].timestamp):
        # the launcher itself ends the others by SIGTERM, and later by SIGKILL those that do not listen
        if failure.exitcode != -signal.SIGTERM and failure.timestamp <= first_told:
            name = signal.Signals(-failure.exitcode).name
            return WMTPError(f"rank {rank} (process {failure.pid}) was killed by {name}{_memory_hint(name)}{where}")
    if hung:
        return WMTPError("\n".join(hung[0]["lines"]) + where)
    codes = {rank: failure.exitcode for rank, failure in (failed.failures if failed is not None else {}).items()}
    return WMTPError(f"the processes ended without a result (exit codes by rank: {codes}){where}")


def _memory_hint(name: str) -> str:
    return ", as the system does where memory runs out" if name == "SIGKILL" else ""


def _last_checkpoint(config: Config, run_dir: Path) -> str:
    from wmtp.checkpoints.find import checkpoint_folder
    from wmtp.checkpoints.local import list_checkpoints

    saved = list_checkpoints(checkpoint_folder(config, run_dir))
    if not saved:
        return "there is no checkpoint yet"
    return f"the last checkpoint is {saved[-1].path}; to resume: wmtp run --resume {run_dir}"

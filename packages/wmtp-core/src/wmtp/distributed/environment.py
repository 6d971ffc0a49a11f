"""Ranks and machines, as the environment says. Imports no torch."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence

from attrs import frozen

from wmtp.errors import ConfigError

__all__ = ["DEFAULT_PORT", "Nodes", "Worker", "interface_of", "own_address", "processes_by_machine"]

DEFAULT_PORT = 29400


@frozen(kw_only=True)
class Worker:
    """One process of those that torchrun, or a cluster, has started already.

    Args:
        rank: among all processes, from 0.
        world_size: how many there are.
        local_rank: among those of this machine, from 0.
    """

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Worker | None:
        """Read ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; None where they are not all set.

        Without ``LOCAL_RANK`` the other two may be those of a machine, as some clusters set them.

        Raises:
            ConfigError: they contradict each other, or do not say where rank 0 is.
        """
        if not all(environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
            return None
        rank, world_size, local_rank = (_number(name, environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if not 0 <= local_rank <= rank < world_size:
            raise ConfigError(
                f"launcher: RANK={rank}, WORLD_SIZE={world_size}, LOCAL_RANK={local_rank} in the environment contradict each "
                "other; start wmtp by torchrun, or unset them"
            )
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if world_size > 1 and missing:
            raise ConfigError(f"launcher: RANK and WORLD_SIZE are set in the environment, but not {' and '.join(missing)}")
        return cls(rank=rank, world_size=world_size, local_rank=local_rank)


#: which variables say how many machines there are, which of them this is, and where the first is reached; the first that has
#: the number of machines counts
_FAMILIES = (
    ("WMTP_NNODES", "WMTP_NODE_RANK", "WMTP_MASTER_ADDR", "WMTP_MASTER_PORT"),
    ("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS", "MASTER_PORT"),
    ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"),
    ("NUM_NODES", "RANK", "MASTER_ADDR", "MASTER_PORT"),
)


@frozen(kw_only=True)
class Nodes:
    """Machines of a run, each of which starts ``wmtp run`` once.

    Args:
        count: how many there are.
        rank: this one, from 0.
        address: of the first one.
        port: on the first one.
    """

    count: int = 1
    rank: int = 0
    address: str = "localhost"
    port: int = DEFAULT_PORT

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Nodes:
        """Read the machines from the environment; default: one machine.

        The variables are ``WMTP_NNODES`` and its like, or those of SkyPilot, ``PET_*`` or ``NUM_NODES``.

        Raises:
            ConfigError: a variable is missing or makes no sense.
        """
        names = next((family for family in _FAMILIES if environment.get(family[0])), None)
        if names is None:
            return cls()
        count_name, rank_name, address_name, port_name = names
        count = _number(count_name, environment[count_name])
        if count < 1:
            raise ConfigError(f"launcher: {count_name}={count} in the environment: there is at least one machine")
        if count == 1:
            return cls()
        for name in (rank_name, address_name):
            if not environment.get(name):
                raise ConfigError(f"launcher: {count_name}={count}, but {name} is not set in the environment")
        rank = _number(rank_name, environment[rank_name])
        if not 0 <= rank < count:
            raise ConfigError(f"launcher: {rank_name}={rank}, but machines are counted from 0 to {count - 1}")
        port = environment.get(port_name)
        return cls(
            count=count,
            rank=rank,
            address=environment[address_name].split()[0],
            port=_number(port_name, port) if port else DEFAULT_PORT,
        )


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"launcher: {name}={text!r} in the environment is not a number") from None


def processes_by_machine(local_ranks: Sequence[int]) -> list[int]:
    """Count the processes of each machine.

    Args:
        local_ranks: of every process, in the order of their ranks. A machine whose processes have no consecutive ranks counts
            as several.
    """
    found: list[int] = []
    for local in local_ranks:
        if found and local == found[-1]:
            found[-1] += 1
        else:
            found.append(1)
    return found


def own_address(nodes: Nodes) -> str:
    """Return this machine's address on the route to the first one.

    Raises:
        ConfigError: there is no route.
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(nodes.address, nodes.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing: it only asks for the route
            return probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(f"launcher: no route to the first machine, {nodes.address}: {error.strerror or error}") from None


def interface_of(address: str) -> str | None:
    """Return the network interface with ``address``, if the system tells."""
    if sys.platform != "linux":
        return None
    import fcntl
    import struct

    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:
                continue
        if socket.inet_ntoa(found[20:24]) == address:
            return name
    return None

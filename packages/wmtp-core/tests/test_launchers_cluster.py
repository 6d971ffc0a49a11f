"""Machines and processes read from an environment, and what is wrong with it."""

import os
import subprocess
import sys

import pytest

from wmtp.distributed.environment import Nodes, Worker, interface_of, own_address, processes_by_machine
from wmtp.errors import ConfigError


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Nodes()),
        ({"WMTP_NNODES": "1"}, Nodes()),
        (
            {"WMTP_NNODES": "2", "WMTP_NODE_RANK": "1", "WMTP_MASTER_ADDR": "10.0.0.1", "WMTP_MASTER_PORT": "29500"},
            Nodes(count=2, rank=1, address="10.0.0.1", port=29500),
        ),
        (
            {"SKYPILOT_NUM_NODES": "3", "SKYPILOT_NODE_RANK": "2", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8\n10.0.0.9"},
            Nodes(count=3, rank=2, address="10.0.0.7"),
        ),
        (
            {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "job-0", "PET_MASTER_PORT": "23456", "RANK": "1"},
            Nodes(count=2, rank=0, address="job-0", port=23456),
        ),
        (
            {"NUM_NODES": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1234", "WORLD_SIZE": "2"},
            Nodes(count=2, rank=1, address="a", port=1234),
        ),
        (  # ours come first
            {"NUM_NODES": "4", "WMTP_NNODES": "2", "WMTP_NODE_RANK": "0", "WMTP_MASTER_ADDR": "b"},
            Nodes(count=2, rank=0, address="b"),
        ),
    ],
)
def test_machines(environment, expected):
    assert Nodes.of(environment) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WMTP_NNODES": "two"}, ["WMTP_NNODES", "two"]),
        ({"WMTP_NNODES": "0"}, ["WMTP_NNODES"]),
        ({"WMTP_NNODES": "2"}, ["WMTP_NODE_RANK", "not set"]),
        ({"WMTP_NNODES": "2", "WMTP_NODE_RANK": "0"}, ["WMTP_MASTER_ADDR", "not set"]),
        ({"WMTP_NNODES": "2", "WMTP_NODE_RANK": "2", "WMTP_MASTER_ADDR": "a"}, ["WMTP_NODE_RANK=2", "0 to 1"]),
    ],
)
def test_machines_that_make_no_sense(environment, words):
    with pytest.raises(ConfigError) as found:
        Nodes.of(environment)
    assert all(word in str(found.value) for word in words)


@pytest.mark.parametrize(
    ("local_ranks", "expected"),
    [
        ([0], [1]),
        ([0, 1, 0, 1], [2, 2]),
        ([0, 0, 0], [1, 1, 1]),
        ([0, 1, 2, 0], [3, 1]),
        ([0, 0, 1, 1], [1, 2, 1]),  # one rank of each machine after another
    ],
)
def test_processes_of_each_machine(local_ranks, expected):
    assert processes_by_machine(local_ranks) == expected


def test_a_process_that_torchrun_started():
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert Worker.of(variables) == Worker(rank=3, world_size=4, local_rank=1)
    # a cluster that numbers machines by RANK has started no process yet
    assert Worker.of({key: value for key, value in variables.items() if key != "LOCAL_RANK"}) is None
    for wrong, word in (
        ({"RANK": "4"}, "contradict"),
        ({"RANK": "0"}, "contradict"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE"),
    ):
        with pytest.raises(ConfigError, match=word):
            Worker.of(variables | wrong)


def test_the_way_to_the_first_machine():
    assert own_address(Nodes(count=2, rank=1, address="127.0.0.1")) == "127.0.0.1"
    if sys.platform == "linux":
        assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") is None
    with pytest.raises(ConfigError, match="no-such-machine"):
        own_address(Nodes(count=2, rank=1, address="no-such-machine.invalid"))


def test_a_wrong_environment_is_one_line(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text("[run]\n")
    run = subprocess.run(
        [sys.executable, "-m", "wmtp", "check", config],
        capture_output=True,
        text=True,
        env=os.environ | {"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr

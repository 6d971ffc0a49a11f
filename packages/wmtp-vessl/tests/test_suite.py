"""The suite that every launcher inherits."""

import pytest
from vessl_service import DIGEST

from wmtp.testing import LauncherTests
from wmtp_vessl import Cache, Port, VesslLauncher


class TestRuns(LauncherTests):
    config = VesslLauncher(
        cluster="seoul", preset="a100-4", gpus=4, image=f"registry.example/wmtp@{DIGEST}", poll_interval=0.02,
        env={"NCCL_DEBUG": "INFO", "N": 3, "F": 0.5, "B": True}, secrets={"HF_TOKEN": "hf"},
        imports={"/app/models": "volume://fast/models"}, mounts={"/data": {"nfs": {"server": "h", "path": "/p"}}},
        cache=Cache(mode="mount", source="nfs://h/cache"), ports=(Port(name="tensorboard", port=6006),),
    )  # fmt: skip

    @pytest.fixture
    def service(self, api):
        return api


class TestJobs(LauncherTests):
    config = VesslLauncher(backend="jobs", preset="a100x4", gpus=4, image=f"registry.example/wmtp@{DIGEST}", poll_interval=0.02)

    @pytest.fixture
    def service(self, vesslctl):
        return vesslctl

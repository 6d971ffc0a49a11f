"""Fixtures of several files."""

import os
from pathlib import Path

import pytest

#: Triton looks at TRITON_INTERPRET when its functions are made: it is imported anew
INTERPRETED = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]:
    del sys.modules[name]
import pytest
sys.exit(pytest.main(["-n0", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.fixture
def assert_passes_interpreted(request, preloaded):
    """Runs the tests of the same file in a process in which Triton interprets its kernels, which needs no GPU."""

    def run(marked="not slow"):
        done = preloaded.run(
            "-m", marked, request.path, code=INTERPRETED, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=600
        )
        assert done.returncode == 0, done.stdout[-8000:]
        assert " passed" in done.stdout

    return run


@pytest.fixture
def without_the_compiler(monkeypatch):
    """Everything of torch.compile but the compiler, which takes many seconds."""
    import torch

    torch._dynamo.reset()
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiled(*args, **kwargs | {"backend": "aot_eager"}))


@pytest.fixture
def mbpp():
    """The folder of MBPP's files."""
    root = Path(__file__).parents[3]
    path = Path(os.environ.get("WMTP_TEST_MBPP", root.parent / "shared" / "data" / "mbpp"))
    if not (path / "train.jsonl").is_file():
        pytest.skip("MBPP is not at hand; set WMTP_TEST_MBPP to its folder")
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a small model."""
    import torch
    from one_step import SMALL

    folder = tmp_path_factory.mktemp("models") / "base"
    SMALL.build().load(None, dtype=torch.float32, seed=1).model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Makes a folder with MTP layers of its own, once a layout and file."""
    from native_folders import native_folder

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = native_folder(tmp_path_factory.mktemp(name) / "model", name)
        return made[name]

    return get

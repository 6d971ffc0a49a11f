"""Test suites for plugins. They need pytest.

A plugin's test file is a subclass that says which config to test::

    from wmtp import TrainerTests
    from my_package.plugin import MyTrainer

    class TestMyTrainer(TrainerTests):
        config = MyTrainer(alpha=2.0)

Where a component needs a file, override the fixture ``path`` (``root`` for a storage backend)::

    class TestDialogues(DataLoaderTests):
        config = Dialogues(uri="unused")

        @pytest.fixture
        def path(self, tmp_path):
            (tmp_path / "a.txt").write_text("Hello. / Hi.")
            return tmp_path / "a.txt"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from wmtp.lazy import lazy_names

if TYPE_CHECKING:
    from wmtp.testing.component import ComponentTests
    from wmtp.testing.data import DataLoaderTests
    from wmtp.testing.evaluators import EvaluatorTests
    from wmtp.testing.launchers import LauncherTests
    from wmtp.testing.models import ModelLoaderTests
    from wmtp.testing.storage import StorageTests
    from wmtp.testing.trackers import TrackerTests
    from wmtp.testing.trainers import TrainerTests

__all__ = [
    "ComponentTests",
    "DataLoaderTests",
    "EvaluatorTests",
    "LauncherTests",
    "ModelLoaderTests",
    "StorageTests",
    "TrackerTests",
    "TrainerTests",
]

_HOMES = {
    "ComponentTests": "wmtp.testing.component",
    "DataLoaderTests": "wmtp.testing.data",
    "EvaluatorTests": "wmtp.testing.evaluators",
    "LauncherTests": "wmtp.testing.launchers",
    "ModelLoaderTests": "wmtp.testing.models",
    "StorageTests": "wmtp.testing.storage",
    "TrackerTests": "wmtp.testing.trackers",
    "TrainerTests": "wmtp.testing.trainers",
}

# a failed assert of a suite then shows its values, as one in a test file does
pytest.register_assert_rewrite("wmtp.testing.steps", *_HOMES.values())
__getattr__ = lazy_names(__name__, _HOMES)  # a storage plugin's tests need no torch

"""Suite for data loaders."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from wmtp.data.base import BadExample, Example, ExampleLoader
from wmtp.data.example_checks import check_example
from wmtp.errors import WMTPError
from wmtp.testing.component import ComponentTests

__all__ = ["DataLoaderTests"]


class DataLoaderTests(ComponentTests):
    """Contract tests of a data loader.

    Override the fixture ``path`` with a small file or folder of good examples, and ``bad_path`` with one in which a good
    example stands before and after something that is none.
    """

    __test__ = False
    kind = "data_loaders"

    @pytest.fixture
    def path(self) -> Path | None:
        """Return the data; None for a loader without ``uri``."""
        return None

    @pytest.fixture
    def bad_path(self) -> Path | None:
        """Data with a bad example in the middle; None skips that test."""
        return None

    @pytest.fixture
    def loader(self) -> ExampleLoader:
        """Build the loader under test."""
        return self.config.build()

    def test_examples(self, loader: ExampleLoader, path: Path | None) -> None:
        """Every example is an `Example` with text and its own id."""
        assert isinstance(loader, ExampleLoader)
        examples = list(loader.examples(path))
        assert examples, "no example was read"
        for example in examples:
            assert isinstance(example, Example), f"not an Example: {example!r:.200}"
            assert isinstance(example.id, str)
            assert example.id
            assert isinstance(example.prompt, str)
            assert isinstance(example.completion, str)
            assert isinstance(example.group, str)
            assert example.is_correct is None or isinstance(example.is_correct, bool)
            assert example.reward is None or isinstance(example.reward, int | float)
            check_example("data", loader, example)
        good = [example for example in examples if isinstance(example, Example)]
        assert any(example.prompt or example.completion or example.spans or example.messages for example in good)
        twice = [name for name, count in Counter(e.id for e in examples if isinstance(e, Example)).items() if count > 1]
        assert not twice, f"ids that name more than one example: {twice[:5]}"

    def test_files_are_named(self, loader: ExampleLoader, path: Path | None) -> None:
        """`files` names what the examples depend on, so that caches notice changes."""
        files = list(loader.files(path))
        assert path is None or files, "files() names none, so a change of the data would go unnoticed"
        assert all(file.is_file() for file in files), f"not a file: {[str(file) for file in files if not file.is_file()][:3]}"

    def test_reading_again_gives_the_same(self, loader: ExampleLoader, path: Path | None) -> None:
        """A second reading gives the same examples in the same order.

        A resumed run reads the data again.
        """
        first = list(loader.examples(path))
        assert list(loader.examples(path)) == first, "a second reading by the same loader differs"
        assert list(self.config.build().examples(path)) == first, "a reading by a new loader differs"

    def test_two_readings_at_once(self, loader: ExampleLoader, path: Path | None) -> None:
        """Two readings do not disturb each other, and may stop halfway."""
        first = list(islice(loader.examples(path), 3))
        list(islice(loader.examples(path), 1))
        pairs = zip(loader.examples(path), loader.examples(path), strict=True)
        assert all(left == right for left, right in pairs)
        assert list(islice(loader.examples(path), 3)) == first

    def test_a_bad_example_is_yielded(self, loader: ExampleLoader, bad_path: Path | None) -> None:
        """A bad example is yielded with its place, not raised.

        The good ones around it are read.
        """
        if bad_path is None:
            pytest.skip("no bad_path was given")
        found = list(loader.examples(bad_path))
        bad = [example for example in found if isinstance(example, BadExample)]
        assert bad, "nothing was reported as a BadExample"
        assert not isinstance(found[0], BadExample), "the example before the bad one was not read"
        assert not isinstance(found[-1], BadExample), "the example after the bad one was not read"
        for example in bad:
            assert bad_path.name in example.where, f"'{example.where}' does not name the file"
            assert example.problem.strip()

    def test_a_missing_path_is_named(self, loader: ExampleLoader, path: Path | None, tmp_path: Path) -> None:
        """Data that is not there is an error that names it."""
        if path is None:
            pytest.skip("a loader without files")
        missing = tmp_path / "no-such-data.jsonl"
        with pytest.raises(WMTPError) as error:
            list(loader.examples(missing))
        assert "no-such-data.jsonl" in str(error.value)

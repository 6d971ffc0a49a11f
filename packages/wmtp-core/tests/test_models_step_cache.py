"""Wishes of one thread to layers do not reach another thread's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from wmtp.models import documents
from wmtp.models.documents import DocumentRows, by_document, reading
from wmtp.models.step_cache import compiled_steps, layers_are_plain, plain_layers, steps_are_compiled


def _elsewhere(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_another_thread_is_not_inside() -> None:
    with compiled_steps():
        assert steps_are_compiled()
        assert not _elsewhere(steps_are_compiled)
        with plain_layers():
            assert not steps_are_compiled()
            assert layers_are_plain()
            assert not _elsewhere(layers_are_plain)
        assert steps_are_compiled()
    assert not steps_are_compiled()


def test_another_thread_reads_rows_as_they_are() -> None:
    layer = torch.nn.GRU(4, 4, batch_first=True)
    x = torch.randn(1, 6, 4)
    whole = layer(x)[0]
    by_document(layer)
    with reading(DocumentRows.of(torch.tensor([[0, 1, 2, 0, 1, 2]]))):
        assert not torch.equal(layer(x)[0], whole)
        torch.testing.assert_close(_elsewhere(lambda: layer(x)[0]), whole)


@pytest.mark.parametrize("asked", ["steps", "documents"])
def test_compiled_code_sees_what_its_thread_asks_for(asked: str) -> None:
    """It is guarded: read while tracing, it must not stay what it was then."""

    def function(x: torch.Tensor) -> torch.Tensor:
        inside = steps_are_compiled() if asked == "steps" else documents._reading.rows is not None
        return x + 1 if inside else x - 1

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    x = torch.zeros(1)
    found = [float(compiled(x))]
    with compiled_steps(), reading(DocumentRows.of(torch.tensor([[0, 1, 0]]))):
        found += [float(compiled(x)), float(_elsewhere(lambda: compiled(x)))]
    assert [*found, float(compiled(x))] == [-1, 1, -1, -1]

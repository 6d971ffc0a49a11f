"""The prediction in docs/distributed.md: its bytes counted by hand, and its speed against what was measured."""

import importlib.util
import sys
from pathlib import Path

import pytest
from attrs import evolve


@pytest.fixture(scope="module")
def predicted():
    spec = importlib.util.spec_from_file_location("predicted", Path(__file__).parents[1] / "docs/predicted.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["predicted"] = module
    spec.loader.exec_module(module)
    return module


def cluster(predicted, machines, **changes):
    return predicted.Cluster(machines=machines, network=10e9, **changes)


def test_the_page_is_up_to_date(predicted):
    assert predicted.PAGE.read_text(encoding="utf-8") == predicted.page(), "run: uv run python docs/predicted.py"


def test_bytes_are_those_of_gathered_layers_and_reduced_gradients(predicted):
    job = predicted.Job(model=predicted.SEVEN, micro_batches=3)
    layer, table = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096, 32_000 * 4096
    layers = 35 * layer + 4096  # with three heads' and the final norm
    moved = 2 * (2 * 3 * layers + 2 * table) + 4 * (layers + 2 * table)
    two = cluster(predicted, 2)
    full, hybrid = predicted.predict(job, two), predicted.predict(evolve(job, strategy="hybrid"), two)
    assert full.bytes_inside == pytest.approx(moved * 15 / 16, rel=1e-6)
    assert full.bytes_network == pytest.approx(moved * 15 / 16, rel=1e-6)
    assert hybrid.bytes_inside == pytest.approx(moved * 7 / 8, rel=1e-6)
    assert hybrid.bytes_network == pytest.approx(2 * 4 * (layers + 2 * table) / 2, rel=1e-6)


def test_between_machines_hybrid_sends_the_same_however_many_micro_batches(predicted):
    def network(strategy, micro_batches, machines):
        job = predicted.Job(model=predicted.SEVEN, strategy=strategy, micro_batches=micro_batches)
        return predicted.predict(job, cluster(predicted, machines)).bytes_network

    assert network("hybrid", 1, 4) == network("hybrid", 8, 4) < network("full", 8, 4) / 4
    assert network("full", 8, 4) > 4 * network("full", 1, 4)
    assert network("full", 1, 1) == network("hybrid", 1, 1) == 0


def test_speed_lies_between_all_traffic_hidden_and_none(predicted):
    job = predicted.Job(model=predicted.SEVEN)
    found = predicted.predict(job, cluster(predicted, 4))
    assert found.tokens == 32 * 4 * 2048
    assert found.least == pytest.approx(found.tokens / (found.computing + found.inside + found.network))
    assert found.most == pytest.approx(found.tokens / found.network), "this network is the slowest part"
    quick = predicted.predict(job, evolve(cluster(predicted, 4), network=1e15))
    assert quick.most == pytest.approx(found.tokens / found.computing)


@pytest.mark.parametrize(("gpus", "measured"), [(2, 15_518), (4, 30_709)])
def test_what_was_measured_on_one_machine_lies_near(predicted, gpus, measured):
    """Two H100s and four H200s; see docs/performance.md."""
    found = predicted.predict(predicted.Job(model=predicted.SEVEN), cluster(predicted, 1, gpus=gpus))
    assert found.most == pytest.approx(measured, rel=0.05)
    assert found.least > 0.8 * measured

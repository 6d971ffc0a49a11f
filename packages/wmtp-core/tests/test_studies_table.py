"""The table of a study: who is compared to whom, in which words, and what makes a comparison unfair."""

import random
import re

import pytest
from attrs import evolve

from wmtp.studies.record import RunRecord
from wmtp.studies.statistics import holm, paired_difference
from wmtp.studies.table import Compared, compare, measured

SEEDS = (0, 1, 2)


def runs(arm, values, *, metric="eval/loss", **facts):
    defaults = {"status": "finished", "steps": 10, "tokens": 100.0, "device": "cpu", "versions": {"wmtp-core": "1"}}
    return [
        RunRecord(
            name=f"{arm}{seed}", arm=arm, seed=seed, key="", metrics={metric: value},
            **{**defaults, "data": {"train": f"t{seed}", "eval": f"e{seed}"}, **facts},
        )
        for seed, value in enumerate(values)
    ]  # fmt: skip


def table(*groups, named=(), metric="eval/loss"):
    records = [record for group in groups for record in group]
    arms = [Compared(name=name, baseline="base", seeds=SEEDS) for name in dict.fromkeys(record.arm for record in records)]
    return compare(arms, records, [metric], named)


BASE = [3.0, 3.1, 2.9]


@pytest.mark.parametrize(
    ("values", "metric", "verdict"),
    [
        ([2.0, 2.11, 1.9], "eval/loss", "lower, better (exploratory)"),
        ([4.0, 4.11, 3.9], "eval/loss", "higher, worse (exploratory)"),
        ([4.0, 4.11, 3.9], "token-accuracy/head_1", "higher, better (exploratory)"),
        ([4.0, 4.11, 3.9], "critic/value", "higher (exploratory)"),
        ([2.5, 3.6, 2.4], "eval/loss", "no difference seen"),
        ([2.5], "eval/loss", "one seed: no interval"),
    ],
)
def test_verdicts(values, metric, verdict):
    found = table(runs("base", BASE, metric=metric), runs("other", values, metric=metric), metric=metric)
    assert [row.verdict for row in found.rows] == ["", verdict]


def test_differences_are_paired_by_seed_and_named_ones_corrected():
    first, second = [2.9, 3.02, 2.81], [2.8, 2.95, 2.66]
    named = [("first", "base", "eval/loss"), ("second", "first", "eval/loss")]
    found = table(runs("base", BASE), runs("first", first), runs("second", second), named=named)
    kinds = [(row.arm, row.to, row.kind) for row in found.rows]
    assert kinds == [
        ("base", None, "baseline"), ("first", "base", "named"), ("second", "first", "named"), ("second", "base", "exploratory")
    ]  # fmt: skip
    wanted = [paired_difference(first, BASE), paired_difference(second, first)]
    assert [row.p for row in found.rows[1:3]] == holm([one.p for one in wanted])
    assert [(row.low, row.high) for row in found.rows[1:3]] == [(one.low, one.high) for one in wanted]
    assert found.rows[3].p == paired_difference(second, BASE).p  # not corrected
    assert found.headline is found.rows[1]


def test_what_holm_takes_back_is_said():
    values = [2.6, 2.85, 2.62]
    alone = table(runs("base", BASE), runs("a", values), named=[("a", "base", "eval/loss")])
    assert alone.rows[1].verdict == "lower, better"
    others = [runs(name, [3.1, 2.9, 3.05]) for name in "bcd"]
    named = [(name, "base", "eval/loss") for name in "abcd"]
    assert table(runs("base", BASE), runs("a", values), *others, named=named).rows[1].verdict == (
        "no difference seen after correction"
    )


def test_a_named_comparison_without_a_result_yet_counts_in_the_correction():
    values = [2.6, 2.85, 2.62]
    arms = [
        Compared(name=name, baseline="base", seeds=SEEDS) for name in ("base", *"abcd")
    ]  # b and c have failed, d comes later
    named = [(name, "base", "eval/loss") for name in "abcd"]
    found = compare(arms, [*runs("base", BASE), *runs("a", values)], ["eval/loss"], named)
    assert found.rows[1].p == 4 * paired_difference(values, BASE).p
    assert found.rows[1].verdict == "no difference seen after correction"


@pytest.mark.parametrize(
    ("facts", "note"),
    [
        ({"steps": 12}, "other and base differ in optimizer steps: 12 and 10 (seed 0, 1, 2)"),
        ({"tokens": 250.0}, "other and base differ in tokens read: 250 and 100 (seed 0, 1, 2)"),
        ({"data": {"train": "x", "eval": "e0"}}, "other and base differ in training data (seed 0, 1, 2)"),
        ({"data": {"train": "t1", "eval": "x"}}, "other and base differ in evaluation data (seed 0, 1, 2)"),
        ({"device": "NVIDIA H100"}, "other and base differ in device (seed 0, 1, 2)"),
        ({"versions": {"wmtp-core": "2"}}, "other and base differ in versions (seed 0, 1, 2)"),
        (
            {"steps": 12, "tokens": 250.0},
            "other and base differ in optimizer steps: 12 and 10; tokens read: 250 and 100 (seed 0, 1, 2)",
        ),
    ],
)
def test_what_else_differs_is_said(facts, note):
    assert note in table(runs("base", BASE), runs("other", BASE, **facts)).notes
    assert not table(runs("base", BASE), runs("other", BASE)).notes


def test_what_differs_from_another_arm_is_said_where_that_comparison_was_named():
    records = [runs("base", BASE), runs("control", BASE, device="NVIDIA H100"), runs("other", BASE)]
    note = "other and control differ in device (seed 0, 1, 2)"
    assert note in table(*records, named=[("other", "control", "eval/loss")]).notes
    assert note not in table(*records).notes


def own_sources(records, **facts):
    """Evaluated on data of its own, which no seed chooses: every seed has the same."""
    page = {"config": {"data.eval.sources": '["heldout"]'}}
    return [evolve(record, page=page, data={"train": "t", "eval": "e"}, **facts) for record in records]


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        ({"data": {"train": "x", "eval": "e"}}, "training data"),
        ({"data": {"train": "t", "eval": "x"}}, "evaluation data"),
        ({"device": "NVIDIA H100"}, "device"),
        ({"versions": {"wmtp-core": "2"}}, "versions"),
    ],
)
def test_seeds_of_other_data_or_another_machine_are_said(facts, what):
    groups = [own_sources(runs(arm, BASE)) for arm in ("base", "other", "third")]
    assert not table(*groups).notes
    mixed = [[*first, evolve(last, **facts)] for *first, last in groups[:2]]
    note = f"base and other have runs that differ in {what}: seed 0, 1 from seed 2; their means are of both"
    assert note in table(*mixed, groups[2]).notes


def test_a_holdout_is_of_other_documents_for_every_seed_and_no_mixture():
    page = {"config": {"data.eval.holdout": "0.02"}}
    records = [evolve(record, page=page) for record in runs("base", BASE)]
    assert not table(records).notes


def test_arms_that_lack_the_same_seeds_share_a_line():
    found = table(runs("base", BASE), runs("a", BASE[:2]), runs("b", BASE[:1]), runs("c", BASE[:2]), runs("d", BASE[:2]))
    assert [note for note in found.notes if "no finished" in note] == [
        "a, c and d have no finished run with seed 2", "b has no finished run with seed 1, 2"
    ]  # fmt: skip


def test_arms_that_are_meant_to_have_other_seeds_are_named():
    arms = [Compared(name="base", baseline="base", seeds=(0, 1)), Compared(name="a", baseline="base", seeds=(1, 2))]
    records = [*runs("base", BASE[:2]), *runs("a", BASE)[1:]]
    found = compare(arms, records, ["eval/loss"])
    assert (found.rows[1].n, found.rows[1].pairs) == (2, 1)
    assert "a and base have other seeds: their difference is over seed 1, their means over all" in found.notes


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_value_that_is_not_finite_is_left_out_and_said(bad):
    found = table(runs("base", BASE), runs("other", [2.0, bad, 1.9]))
    other = found.rows[1]
    assert (other.n, other.pairs, other.mean) == (2, 2, pytest.approx(1.95))
    assert "eval/loss of other is not finite and left out (seed 1)" in found.notes


def test_failed_runs_and_missing_seeds_are_left_out_and_said():
    broken = runs("other", BASE)
    broken[1] = RunRecord(name="x", arm="other", seed=1, key="", status="failed", error="no")
    found = table(runs("base", BASE), broken)
    assert (found.rows[1].n, found.rows[1].pairs) == (2, 2)
    assert "other has no finished run with seed 1" in found.notes


def test_how_far_other_documents_would_move_a_run_is_said():
    pages = [
        {"estimates": {"perplexity/head_1": {"low": 3.0, "high": high, "n": 48, "unit": "documents"}}} for high in (3.2, 3.4)
    ]
    groups = [runs("base", [3.1], metric="perplexity/head_1", page=pages[0])]
    groups.append(runs("other", [3.2], metric="perplexity/head_1", page=pages[1]))
    notes = table(*groups, metric="perplexity/head_1").notes
    assert "perplexity/head_1: within a run ±0.15, by a bootstrap over 48 documents; arms share them" in notes


def test_by_default_losses_come_first_and_numbers_of_training_not_at_all():
    names = [
        "loss/head_1",
        "eval/loss",
        "eval/loss/head_1",
        "weight/mean",
        "perplexity/head_1",
        "accuracy/head_1",
        "entropy/head_1",
        "eval/predictions",
        "speculative/speedup",
        "pass-at-k/pass_at_1",
    ]
    evaluated = ["perplexity/head_1", "speculative/speedup", "pass-at-k/pass_at_1"]
    record = RunRecord(
        name="x",
        arm="a",
        seed=0,
        key="",
        status="finished",
        metrics=dict.fromkeys(names, 1.0),
        page={"evaluation": dict.fromkeys(evaluated, 1.0)},
    )
    assert measured([record]) == ["eval/loss/head_1", "eval/loss", *evaluated]


def with_documents(arm, losses, counts, shift=0.0):
    """Runs whose metric is the mean of these losses by document, with another noise a seed."""
    found = []
    for seed in SEEDS:
        sums = [loss + shift * count + 0.1 * (seed - 1) for loss, count in zip(losses, counts, strict=True)]
        value = sum(sums) / sum(counts)
        found += runs(arm, [value], metric="eval/loss/head_1", page={"documents": {"head_1": [sums, counts]}})
        found[-1] = evolve(found[-1], seed=seed, name=f"{arm}{seed}", data={})
    return found


def test_a_named_difference_has_an_interval_over_documents_too():
    draw = random.Random(0)
    counts = [draw.randint(5, 60) for _ in range(80)]
    losses = [count * draw.uniform(0.5, 6.0) for count in counts]  # documents differ far more than arms do
    other = [loss + count * draw.gauss(-0.2, 0.1) for loss, count in zip(losses, counts, strict=True)]
    metric = "eval/loss/head_1"
    groups = with_documents("base", losses, counts), with_documents("other", other, counts)
    found = table(*groups, named=[("other", "base", metric)], metric=metric)
    (note,) = [note for note in found.notes if "bootstrap" in note]
    value, low, high = map(float, re.search(r": (\S+) \[(\S+), (\S+)\] by a paired bootstrap over 80 documents", note).groups())
    assert value == pytest.approx(found.rows[1].difference, rel=1e-3)
    assert low < -0.2 < high or abs(value + 0.2) < 0.05
    # by hand: the ratio of drawn sums
    gains = [b - a for a, b in zip(losses, other, strict=True)]
    drawn = [[draw.randrange(80) for _ in range(80)] for _ in range(2000)]
    ratios = sorted(sum(gains[i] for i in one) / sum(counts[i] for i in one) for one in drawn)
    assert (low, high) == pytest.approx((ratios[50], ratios[1949]), abs=0.006)
    # unpaired, the documents' own spread would be in it
    assert high - low < 0.2


def test_other_documents_are_not_paired():
    metric = "eval/loss/head_1"
    groups = with_documents("base", [1.0, 2.0], [3, 4]), with_documents("other", [1.0, 2.0], [4, 3])
    found = table(*groups, named=[("other", "base", metric)], metric=metric)
    assert not [note for note in found.notes if "bootstrap" in note]

"""Student's t, paired differences and Holm's correction, against scipy, printed tables and formulas written out."""

import math
import random
from statistics import stdev

import pytest

from wmtp.studies.statistics import bootstrap_ratio, holm, paired_difference, t_cdf, t_quantile

# of the printed table of any textbook: two-sided 95 %
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045, 120: 1.980}


@pytest.mark.parametrize(("freedom", "value"), TABLE.items())
def test_the_quantile_is_that_of_the_table(freedom, value):
    assert t_quantile(0.975, freedom) == pytest.approx(value, abs=5e-4)
    assert t_quantile(0.025, freedom) == pytest.approx(-value, abs=5e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 31, 200])
def test_distribution_and_quantile_agree_with_scipy(freedom):
    stats = pytest.importorskip("scipy.stats")
    for t in (-40.0, -3.0, -0.5, 0.0, 0.1, 1.0, 2.5, 12.0):
        assert t_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), rel=1e-9, abs=1e-14)
    for probability in (0.001, 0.3, 0.5, 0.8, 0.975, 0.9995):
        assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-9, abs=1e-12)


def test_ends_and_mistakes_of_the_distribution():
    assert (t_cdf(math.inf, 3), t_cdf(-math.inf, 3)) == (1.0, 0.0)
    with pytest.raises(ValueError, match="freedom"):
        t_cdf(1.0, 0)
    with pytest.raises(ValueError, match="probability"):
        t_quantile(1.0, 3)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_paired_differences_agree_with_scipy(n):
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(n)
    first, second = ([draw.gauss(mean, 1.0) for _ in range(n)] for mean in (0.3, 0.0))
    found, wanted = paired_difference(first, second), stats.ttest_rel(first, second)
    interval = wanted.confidence_interval(0.95)
    assert found.n == n
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert (found.low <= 0 <= found.high) == (wanted.pvalue > 0.05)


def test_pairs_that_all_differ_alike_have_an_interval_of_no_width():
    found = paired_difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high, found.p) == (1.0, 1.0, 1.0, 0.0)
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p == 1.0


def test_one_pair_has_no_interval_and_no_pair_is_refused():
    found = paired_difference([2.0], [1.5])
    assert (found.mean, found.low, found.high, found.p) == (0.5, None, None, None)
    with pytest.raises(ValueError, match="no pair"):
        paired_difference([], [])


def test_holm_is_its_definition():
    values = [0.04, 0.01, 0.03, 0.005]
    # sorted: 0.005·4, 0.01·3, 0.03·2, 0.04·1, each at least as large as the one before it
    assert holm(values) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_bootstrap_interval_has_the_width_of_95_percent():
    """Of a mean it is that of the normal distribution, ± 1.96 standard errors; one of 90 % is a sixth narrower."""
    source = random.Random(1)
    values = [source.gauss(0, 1) for _ in range(200)]
    _, low, high = bootstrap_ratio(values, [1.0] * len(values))
    assert (high - low) / (2 * 1.96 * stdev(values) / math.sqrt(len(values))) == pytest.approx(1.0, abs=0.08)

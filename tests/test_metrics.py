import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from resdpo_trl.losses import LogProbs, PreferenceLoss
from resdpo_trl.metrics import (
    PAIR_FIGURES,
    preference_metrics,
    rank_correlation,
    raw_accuracy,
    training_figures,
    wilson_interval,
    with_intervals,
)


def test_figures_of_pairs_by_hand():
    pairs = LogProbs(
        torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0]), torch.tensor([-2.0, -2.0]), torch.tensor([-2.0, -2.0])
    )
    figures = preference_metrics(pairs, PreferenceLoss(beta=0.5))
    np.testing.assert_allclose(figures["rewards/chosen"], [0.5, 0.0])
    np.testing.assert_allclose(figures["rewards/rejected"], [-0.5, 0.5])
    np.testing.assert_allclose(figures["rewards/margins"], [1.0, -0.5])
    np.testing.assert_allclose(figures["rewards/accuracies"], [1, 0])
    np.testing.assert_allclose(figures["loss"], np.log1p(np.exp([-1.0, 0.5])))
    assert raw_accuracy(pairs)["logps/accuracies"].tolist() == [1, 0]
    assert raw_accuracy(pairs)["logps/ref_accuracies"].tolist() == [0, 0]


def test_a_training_step_and_an_evaluation_have_the_same_figures_of_a_pair():
    pairs = LogProbs(*torch.randn(4, 20, generator=torch.Generator().manual_seed(0)))
    evaluated, trained = (figures(pairs, PreferenceLoss()) for figures in (preference_metrics, training_figures))
    assert tuple(evaluated) == PAIR_FIGURES
    for name in PAIR_FIGURES[1:]:
        np.testing.assert_allclose(trained[name], evaluated[name], rtol=1e-5)
    assert set(trained) - set(PAIR_FIGURES) == {"gradient_weights/chosen", "gradient_weights/rejected"}


def test_interval_covers_the_truth_as_often_as_it_says():
    """Of 100 samples from a known distribution the bootstrap's 95% interval covers the mean in about 95."""
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        values = (generator.random(150) < 0.6).astype(float)
        low, high = with_intervals({"kl": values}, resamples=300, seed=trial)["interval_95"]["kl"]
        covered += low <= 0.6 <= high
    assert 90 <= covered <= 99


@pytest.mark.parametrize(("right", "n"), [(0, 1), (3, 10), (10, 10), (30, 30), (57, 200)])
def test_the_interval_of_a_share_is_scipys(right, n):
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    values = np.arange(n) < right
    found = with_intervals({"rewards/accuracies": values.astype(float), "kl": values.astype(float)}, resamples=50)
    assert found["interval_95"]["rewards/accuracies"] == list(wilson_interval(right / n, n))
    assert right not in (0, n) or found["interval_95"]["kl"] == [right / n] * 2  # no share: the bootstrap's


def test_thirty_of_thirty_is_not_certain():
    low, high = with_intervals({"accuracy": np.ones(30)})["interval_95"]["accuracy"]
    assert (round(low, 2), high) == (0.89, 1.0)


def test_interval_is_reproducible_and_counts():
    values = np.arange(50.0)
    first, second = (with_intervals({"x": values}) for _ in range(2))
    assert first == second
    assert first["n"] == 50
    assert first["x"] == 24.5


def test_rank_correlation_is_spearmans():
    """Against scipy, with ties; and a reward and its monotone image agree wholly."""
    from scipy.stats import spearmanr

    generator = np.random.default_rng(0)
    first = generator.integers(0, 12, 150).astype(float)
    second = first + generator.normal(size=150) * 4
    found = rank_correlation(first, second, resamples=300)
    assert found["spearman"] == pytest.approx(spearmanr(first, second).statistic)
    assert found["n"] == 150
    assert found["interval_95"][0] < found["spearman"] < found["interval_95"][1]
    assert rank_correlation(second, np.exp(second), resamples=10)["spearman"] == pytest.approx(1)
    assert rank_correlation(np.ones(9), second[:9], resamples=10) == {"spearman": None, "interval_95": None, "n": 9}


def test_the_interval_of_a_rank_correlation_draws_whole_rows():
    """Rows of two copies of one value say no more than one: the interval is that of the rows, not of the values."""
    generator = np.random.default_rng(1)
    first = generator.normal(size=60)
    second = first + generator.normal(size=60)
    once = rank_correlation(first, second)["interval_95"]
    twice = rank_correlation(np.stack([first, first], 1), np.stack([second, second], 1))
    assert twice["n"] == 120
    assert twice["interval_95"] == pytest.approx(once, abs=0.02)

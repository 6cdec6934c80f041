import numpy as np
import torch

from resdpo_trl.losses import LogProbs, PreferenceLoss
from resdpo_trl.metrics import concatenate, preference_metrics, raw_accuracy, with_intervals


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


def test_interval_covers_the_truth_as_often_as_it_says():
    """Of 200 samples from a known distribution the 95% interval covers the mean in about 95%."""
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = (generator.random(150) < 0.6).astype(float)
        low, high = with_intervals({"accuracy": values}, resamples=400, seed=trial)["interval_95"]["accuracy"]
        covered += low <= 0.6 <= high
    assert 0.90 <= covered / 200 <= 0.985


def test_interval_is_reproducible_and_counts():
    values = np.arange(50.0)
    first, second = (with_intervals({"x": values}) for _ in range(2))
    assert first == second
    assert first["n"] == 50
    assert first["x"] == 24.5


def test_concatenate_keeps_the_order():
    parts = [LogProbs(*(torch.full((2,), float(n)) for _ in range(6))) for n in range(3)]
    assert concatenate(parts).chosen.tolist() == [0, 0, 1, 1, 2, 2]

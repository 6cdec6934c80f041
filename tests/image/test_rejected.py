import pytest
import torch

from resdpo_trl.image.config import SAMPLING
from resdpo_trl.image.trainer import RejectedClasses

LABELS = torch.arange(30_000) % 5
INDEX = torch.arange(30_000)
UNIFORM = torch.full((30_000, 5), 0.2).log()


@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_same_draw_whatever_the_batch_and_another_in_each_epoch(sampling):
    ref = torch.randn(30_000, 5, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    first, second = (RejectedClasses(sampling, LABELS, 5, seed=2) for _ in range(2))
    order = torch.randperm(30_000)
    together = first(INDEX, ref)
    shuffled = torch.cat([second(part, ref[part]) for part in order.split(7_000)])
    assert torch.equal(together[order], shuffled)
    first.set_epoch(1)
    assert torch.equal(first(INDEX, ref), together) == (sampling == "all")


def test_uniform_is_every_wrong_class_alike():
    rejected = RejectedClasses("uniform", LABELS, 5, seed=0)(INDEX, UNIFORM)[:, 0]
    assert (rejected != LABELS).all()
    for label in range(5):
        counts = torch.bincount(rejected[label == LABELS], minlength=5)
        assert counts[label] == 0
        assert (counts[counts > 0] - 1500).abs().max() < 5 * (6000 * 0.25 * 0.75) ** 0.5


def test_random_hits_the_true_class_as_often_as_any():
    rejected = RejectedClasses("random", LABELS, 5, seed=0)(INDEX, UNIFORM)[:, 0]
    assert (rejected == LABELS).float().mean() == pytest.approx(0.2, abs=5 * (0.16 / 30_000) ** 0.5)


def test_hard_follows_the_references_probabilities_of_the_wrong_classes():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
    ref = probabilities.log().expand(30_000, 5)
    rejected = RejectedClasses("hard", LABELS, 5, seed=0)(INDEX, ref)[:, 0]
    assert (rejected != LABELS).all()
    expected = probabilities.clone()
    expected[1] = 0
    expected /= expected.sum()
    found = torch.bincount(rejected[LABELS == 1], minlength=5) / 6000
    assert (found - expected).abs().max() < 5 * (0.25 / 6000) ** 0.5


def test_all_is_every_wrong_class_once():
    rejected = RejectedClasses("all", LABELS, 5, seed=0)(INDEX, UNIFORM)
    assert rejected[:2].tolist() == [[1, 2, 3, 4], [0, 2, 3, 4]]
    assert (rejected != LABELS[:, None]).all()

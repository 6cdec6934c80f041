"""The one scorer: every row once, in its place, in batches of similar length."""

import pytest
import torch

from resdpo_trl.scorer import score_rows

LENGTHS = [3, 1, 5, 3, 2, 5, 4]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 0), (3, 1), (7, 0), (20, 0)])
def test_outputs_are_in_the_order_of_the_rows(batch_size, workers):
    rows = [[number] * length for number, length in enumerate(LENGTHS)]
    widths, modes = [], []
    model = torch.nn.Dropout()

    def function(batch):
        widths.append([len(row) for row in batch])
        modes.append(model.training)
        assert not torch.is_grad_enabled()
        first = torch.tensor([float(row[0]) for row in batch])
        return first, torch.stack([first, -first], 1)

    found = score_rows(function, rows, list, batch_size, [model], "Scoring", LENGTHS, workers=workers)
    assert found[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert found[1].tolist() == [[number, -number] for number in range(7)]
    assert [width for batch in widths for width in batch] == sorted(LENGTHS, reverse=True)  # the longest first
    assert not any(modes) and model.training


def test_rows_without_lengths_keep_their_order():
    batches = []

    def function(batch):
        batches.append(batch)
        return (torch.tensor(batch),)

    (found,) = score_rows(function, range(5), list, 2, [], "Scoring")
    assert found.tolist() == [0, 1, 2, 3, 4] and batches == [[0, 1], [2, 3], [4]]


def test_a_pass_draws_one_number_as_a_loader_does():
    """Training with dropout goes on from the same state as after a plain pass over a DataLoader."""
    torch.manual_seed(0)
    list(torch.utils.data.DataLoader(range(5), batch_size=2))
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    score_rows(lambda batch: (torch.tensor(batch),), range(5), list, 2, [], "Scoring")
    assert torch.equal(torch.get_rng_state(), expected)

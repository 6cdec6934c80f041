"""The rows of the table at a run's end."""

from resdpo_trl.job import describe_epochs, describe_seconds

STAGE = {
    "select": "best", "metric_for_best_model": "eval_accuracy", "best_epoch": 3.0, "best_validation_loss": 0.1323,
    "kept_epoch": 2.0, "kept_step": 20,
}  # fmt: skip


def test_the_epoch_kept_and_why():
    assert describe_epochs(STAGE) == [("epoch", "3 of least validation loss (0.1323); kept: 2, of best accuracy")]
    assert describe_epochs(STAGE | {"kept_epoch": 3.0}) == [("epoch", "3 of least validation loss (0.1323), kept")]
    last = STAGE | {"select": "last", "metric_for_best_model": None, "kept_epoch": 4.0}
    assert describe_epochs(last) == [("epoch", "3 of least validation loss (0.1323); kept: 4, by --select last")]
    assert describe_epochs(STAGE | {"best_epoch": None}) == []


def test_seconds_of_a_run_and_of_a_resumed_one():
    assert describe_seconds({"total_seconds": 11.4}) == ("seconds in all", "11")
    assert describe_seconds({"seconds_since_resume": 3.6}) == ("seconds since the last resume", "4")

"""The tables at the end of a run."""

import pytest

from resdpo_trl.image.config import ImageCrossEntropyConfig
from resdpo_trl.job import Job, describe_epochs, describe_run
from resdpo_trl.training.arguments import RunConfig

STAGE = {
    "select": "best", "metric_for_best_model": "eval_accuracy", "best_epoch": 3.0, "best_validation_loss": 0.1323,
    "kept_epoch": 2.0, "kept_step": 20,
}  # fmt: skip


def test_the_epoch_kept_and_why():
    assert describe_epochs(STAGE) == [("epoch", "3 with lowest validation loss (0.1323); kept: 2, with best accuracy")]
    assert describe_epochs(STAGE | {"kept_epoch": 3.0}) == [("epoch", "3 with lowest validation loss (0.1323), kept")]
    last = STAGE | {"select": "last", "metric_for_best_model": None, "kept_epoch": 4.0}
    assert describe_epochs(last) == [("epoch", "3 with lowest validation loss (0.1323); kept: 4, with --select last")]
    assert describe_epochs(STAGE | {"best_epoch": None}) == []


def test_the_tables_of_a_run_and_of_a_resumed_one():
    test = {"n": 40, "loss": 0.4777, "rewards/margins": 1.2584, "logps/chosen": -50.0}
    test["interval_95"] = {"loss": [0.43, 0.52], "rewards/margins": [1.1, 1.4], "logps/chosen": [-60.0, -40.0]}
    summary = {
        "data": {"train": 9, "validation": 3, "test": 40},
        "sft": {"validation": {"loss_before": 3.87, "loss_after": 3.497}},
        "dpo": STAGE | {"test": test},
        "throughput": {"dpo_pairs_per_second": 3.04, "total_seconds": 11.4},
    }
    assert describe_run(summary, "pairs").splitlines() == [
        "",
        "  pairs                 9 train, 3 validation, 40 test",
        "  SFT loss, validation  3.870 → 3.497",
        "  epoch                 3 with lowest validation loss (0.1323); kept: 2, with best accuracy",
        "  pairs per second      3.0",
        "  total seconds         11",
        "",
        "  on 40 test pairs     mean      95% interval",
        "  loss               0.4777  0.4300 to 0.5200",
        "  margin of rewards   1.258    1.100 to 1.400",
    ]
    summary["throughput"] = {"seconds_since_resume": 3.6}
    assert "  seconds since the last resume  4\n" in describe_run(summary, "pairs")


@pytest.mark.parametrize(("given", "named"), [({}, "mine dpo"), ({"run_name": "the seventh"}, "the seventh dpo")])
def test_a_tracker_is_told_the_runs_name_and_the_stage(tmp_path, given, named):
    training = ImageCrossEntropyConfig(output_dir=str(tmp_path / "mine"), use_cpu=True, **given)
    assert Job(training, RunConfig(), {}, {}, None, None).arguments("dpo", training).run_name == named

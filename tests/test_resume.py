"""A trainer that is used without a recipe, as docs/extending.md has it."""

import os
import signal

import pytest
import torch
from transformers import TrainerCallback

from resdpo_trl.training.signals import Interrupted
from tests.image.test_trainer import trainer

# four steps per epoch; the checkpoint of an epoch's last step comes before the epoch's evaluation
EPOCHS = {"num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 4}


class Killed(Exception):
    pass


class At(TrainerCallback):
    """Something that happens in an event of a step."""

    def __init__(self, event, step, happens):
        def react(args, state, control, **kwargs):
            if state.global_step == step:
                happens()

        setattr(self, event, react)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def kill():
    raise Killed


def check_the_same(whole, resumed):
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    rows = [
        [{name: value for name, value in row.items() if "train_" not in name} for row in job.state.log_history]
        for job in (whole, resumed)
    ]
    assert rows[0][:-1] == rows[1][:-1]


def test_true_goes_on_from_the_newest_whole_checkpoint(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, **options)
    ended = whole.train()
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    resumed = trainer(tmp_path, **options)
    again = resumed.train(resume_from_checkpoint=True)
    assert again.training_loss == ended.training_loss == again.metrics["train_loss"] > 0
    assert resumed._resumed_from == str(tmp_path / "checkpoint-4")
    check_the_same(whole, resumed)


@pytest.mark.parametrize(
    ("event", "step", "happens", "saved"),
    [("on_step_begin", 5, terminate, 6), ("on_step_begin", 7, terminate, 8), ("on_epoch_end", 8, kill, 8)],
    ids=["a signal within an epoch", "a signal at an epoch's end", "a kill between the save and the epoch's end"],
)
def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path, event, step, happens, saved):
    whole = trainer(tmp_path / "whole", **EPOCHS)
    whole.train()
    stopped = trainer(tmp_path / "stopped", **EPOCHS)
    stopped.add_callback(At(event, step, happens))
    with pytest.raises((Killed, Interrupted)):
        stopped.train()
    assert (tmp_path / "stopped" / f"checkpoint-{saved}").is_dir()
    resumed = trainer(tmp_path / "stopped", **EPOCHS)
    resumed.train(resume_from_checkpoint=True)
    check_the_same(whole, resumed)
    assert [row["step"] for row in resumed.state.log_history if "eval_loss" in row] == [4, 8, 12]

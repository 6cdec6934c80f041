"""Whole runs that are killed, stopped by a signal, out of room or no longer finite, and what they go on to.

Twenty kills, two a kind of run; benchmarks/kills.py tries hundreds and prints the figures.
"""

import json
import os
import shutil
import signal

import pytest

from tests.recipes.conftest import rows_of
from tests.recipes.killing import KINDS, Server, differences, survive, write_data

KILLS = 20


class Runs:
    """The server, small data, and the runs that were never killed, one a kind."""

    def __init__(self, folder):
        self.folder, self.data, self.server, self.whole = folder, write_data(folder), Server(folder), {}

    def run(self, kind, output_dir, *more, **how):
        recipe, arguments = KINDS[kind]
        log = output_dir.with_suffix(".log")
        start = log.stat().st_size if log.exists() else 0
        words = [*arguments, *self.data[recipe], "--output_dir", output_dir, *more]
        answer = self.server.run(recipe, words, log, **how)
        return answer | {"said": log.read_bytes()[start:].decode()}

    def never_killed(self, kind):
        if kind not in self.whole:
            path = self.folder / f"never killed {len(self.whole)}"
            answer = self.run(kind, path)
            assert answer["status"] == 0, answer["said"]
            self.whole[kind] = path, answer
        return self.whole[kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = Runs(tmp_path_factory.mktemp("killed"))
    yield found
    found.server.close()


def nth(answer, count, ending):
    """The number of the `count`-th operation that ends so."""
    return [at for at, operation in enumerate(answer["operations"]) if operation.endswith(ending)][count]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_as_if_it_had_not_been(runs, tmp_path, kind):
    whole, usual = runs.never_killed(kind)
    kills = number = 0
    while kills < KILLS / len(KINDS):
        found = survive(runs.server, kind, runs.data, whole, tmp_path / f"killed {number}", 1000 + number, usual)
        assert not found["wrong"], found
        kills, number = kills + found["kills"], number + 1


@pytest.mark.parametrize("kind", ["image DPO, copy"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step_and_a_checkpoint(runs, tmp_path, kind, signum):
    whole, usual = runs.never_killed(kind)
    run = tmp_path / "stopped"
    # SIGTERM comes at a log line in the middle of DPO, Ctrl-C while a checkpoint of the reference is written
    at = nth(usual, -5, " metrics.jsonl") if signum == signal.SIGTERM else nth(usual, 2, "/log_state_0.json")
    stage = "dpo" if signum == signal.SIGTERM else "reference"
    answer = runs.run(kind, run, kill_at=at, signal=signum)
    assert answer["status"] == 128 + signum, answer["said"]
    last = answer["said"].strip().splitlines()[-1]
    assert last.startswith("stopped after step ") and "--resume_from_checkpoint" in last
    assert f"checkpoints/{stage}/checkpoint-" in last
    assert "Traceback" not in answer["said"]
    answer = runs.run(kind, run, "--resume_from_checkpoint")
    assert answer["status"] == 0, answer["said"]
    assert differences(whole, run) == []
    # and a run that has ended is left alone
    before = (run / "run.json").read_bytes()
    answer = runs.run(kind, run, "--resume_from_checkpoint")
    assert answer["status"] == 0
    assert "nothing to resume" in answer["said"].splitlines()[-1]
    assert (run / "run.json").read_bytes() == before


def test_outside_training_a_signal_ends_a_run_at_once(runs, tmp_path):
    answer = runs.run(
        "image cross-entropy",
        tmp_path / "r",
        kill_at=nth(runs.never_killed("image cross-entropy")[1], 0, "run.json.tmp"),
        signal=signal.SIGTERM,
    )
    assert answer["status"] == 143
    assert "--resume_from_checkpoint" in answer["said"].splitlines()[-1]


def test_a_disk_that_fills_up(runs, tmp_path):
    whole, _ = runs.never_killed("image cross-entropy")
    run = tmp_path / "full"
    largest = max(path.stat().st_size for path in whole.glob("checkpoints/cross_entropy/*/optimizer.pt"))
    answer = runs.run("image cross-entropy", run, longest_file=largest - 1)
    assert answer["status"] == 2, answer["said"]
    errors = [line for line in answer["said"].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "checkpoint-2 can't be written" in errors[0]
    assert "no checkpoint was saved yet" in errors[0]
    assert "Traceback" not in answer["said"]
    assert list((run / "checkpoints/cross_entropy").iterdir()) == []
    answer = runs.run("image cross-entropy", run, "--resume_from_checkpoint")
    assert answer["status"] == 0, answer["said"]
    assert differences(whole, run) == []


def test_a_loss_that_is_not_finite(runs, tmp_path):
    run = tmp_path / "nan"
    answer = runs.run("image cross-entropy", run, "--optim", "sgd", "--learning_rate", "1e22")
    assert answer["status"] == 2, answer["said"]
    errors = [line for line in answer["said"].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "not finite by step 2" in errors[0] and "lower the learning rate" in errors[0], errors
    assert "no checkpoint was saved yet" in errors[0]
    assert not (run / "policy").exists()


def test_a_torn_checkpoint_is_passed_over_and_a_moved_run_goes_on(runs, tmp_path):
    whole, _ = runs.never_killed("image cross-entropy")
    run = tmp_path / "another place"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "policy")
    for name in ("summary.json", "run.json"):
        content = json.loads((run / name).read_text())
        content.pop("cross_entropy", None)
        content.pop("complete", None)
        (run / name).write_text(json.dumps(content))
    newest = run / "checkpoints/cross_entropy/checkpoint-8"
    os.truncate(newest / "model.safetensors", (newest / "model.safetensors").stat().st_size - 4)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"stage": "cross_entropy", "spl')  # a line that a full disk cut
    answer = runs.run("image cross-entropy", run, "--resume_from_checkpoint")
    assert answer["status"] == 0, answer["said"]
    said = [line for line in answer["said"].splitlines() if "is skipped" in line]
    assert len(said) == 1 and "checkpoint-8" in said[0] and "model.safetensors has" in said[0]
    assert differences(whole, run) == []


def test_a_resumed_run_is_the_run_that_began(runs, tmp_path):
    whole, _ = runs.never_killed("image cross-entropy")
    run = tmp_path / "r"
    shutil.copytree(whole, run)
    answer = runs.run("image cross-entropy", run, "--learning_rate", "0.5", "--resume_from_checkpoint")
    assert answer["status"] == 2 and "--learning_rate was 0.001" in answer["said"], answer[
        "said"
    ]  # though it has ended
    content = json.loads((run / "run.json").read_text())
    content.pop("complete")
    (run / "run.json").write_text(json.dumps(content))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for more, words in (
        (["--learning_rate", "0.5"], ["--learning_rate was 0.001", "is 0.5 now"]),
        (["--max_train_samples", "60"], ["--max_train_samples was 64"]),
        (["--resume_from_checkpoint", whole / "checkpoints/cross_entropy/checkpoint-8"], ["not a checkpoint of"]),
        (["--resume_from_checkpoint", run / "checkpoints/cross_entropy/checkpoint-7"], ["there is no such folder"]),
    ):
        resume = [] if "--resume_from_checkpoint" in more else ["--resume_from_checkpoint"]
        answer = runs.run("image cross-entropy", run, *more, *resume)
        last = answer["said"].splitlines()[-1]
        assert answer["status"] == 2, answer["said"]
        for word in words:
            assert word in last
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_metrics_are_told_once(runs):
    whole, _ = runs.never_killed("image cross-entropy")
    lines = [(row["stage"], row["split"], row["step"]) for row in rows_of(whole / "metrics.jsonl")]
    assert len(lines) == len(set(lines))

"""A run seen while it trains, trackers that are not installed, and what a run that can't begin leaves."""

import importlib.util
import json
import sqlite3
import subprocess
import sys

import pytest

from tests.conftest import write_pairs
from tests.image.conftest import draw, write_parquet

HOLD = """
import sys, time
from pathlib import Path
from resdpo_trl.run.files import lock
page = Path(sys.argv[1]) / "report.html"
written = page.stat().st_mtime_ns
assert lock(page.parent)
print("held", flush=True)
stop = time.monotonic() + 60
while page.stat().st_mtime_ns == written and time.monotonic() < stop:  # until it is written again
    time.sleep(0.05)
"""


def test_a_page_that_follows_a_run(recipe, tmp_path):
    from resdpo_trl.run.report import write_report

    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"ended": None, "config": {}, "versions": {}}))
    (run / "metrics.jsonl").write_text('{"stage": "dpo", "split": "train", "step": 1, "epoch": 0.1, "loss": 0.7}\n')
    page = write_report([run], refresh=5)
    assert 'http-equiv="refresh" content="5"' in page.read_text()
    with subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE) as training:
        training.stdout.readline()
        status, said, err = recipe("report.py", run, "--watch", "0.2")
        assert training.wait() == 0
    assert status == 0, err
    assert said.count(f"open {page}\n") >= 1 and said.endswith(f"{page}\n")
    assert 'http-equiv="refresh"' not in page.read_text()  # of a run that trains no more
    assert recipe("report.py", run, "--watch", "0")[0] == 2


@pytest.mark.parametrize(
    ("name", "what"), [("tensorboard", "'resdpo-trl[watch]'"), ("trackio", "'resdpo-trl[watch]'"), ("wandb", "wandb")]
)
@pytest.mark.parametrize("recipe_name", ["dpo_hh.py", "sft_hh.py", "reward_hh.py", "dpo_cifar.py"])
def test_a_tracker_that_is_not_installed(recipe, tmp_path, name, what, recipe_name):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    status, said, err = recipe(recipe_name, "--report_to", name, "--output_dir", tmp_path / "run")
    assert (status, said) == (2, "")
    assert f"--report_to {name}: the package {name} is not installed: run pip install {what}," in err
    assert not (tmp_path / "run").exists()


def tensorboard_figures(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = run.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def trackio_figures(run):
    from trackio.utils import TRACKIO_DIR  # it reads the environment when it is imported

    (file,) = TRACKIO_DIR.glob("*.db")
    with sqlite3.connect(file) as rows:
        return {name: value for (row,) in rows.execute("SELECT metrics FROM metrics ORDER BY id")
                for name, value in json.loads(row).items()}  # fmt: skip


@pytest.mark.parametrize(("name", "read"), [("tensorboard", tensorboard_figures), ("trackio", trackio_figures)])
def test_a_tracker_of_the_extra_gets_the_figures(recipe, tmp_path, name, read):
    pytest.importorskip(name)
    write_parquet(tmp_path / "few.parquet", draw(60))
    small = ["--dataset_name", tmp_path / "few.parquet", "--widths", "24", "24", "--num_train_epochs", "1"]
    status, _, err = recipe("train_cifar.py", *small, "--report_to", name, "--output_dir", tmp_path / "run")
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (logged,) = [row["loss"] for row in rows if row["split"] == "validation"]
    assert read(tmp_path / "run")["eval/loss"] == pytest.approx(logged)


def test_a_tracker_that_nobody_knows(recipe, tmp_path):
    status, _, err = recipe("dpo_hh.py", "--report_to", "tensorbord", "--output_dir", tmp_path / "run")
    assert status == 2 and "--report_to tensorbord: must be among azure_ml" in err


def test_a_run_that_fails_before_its_first_step_leaves_nothing(recipe, tmp_path, model_folder):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in write_pairs(40)))
    arguments = ["dpo_hh.py", "--dataset_name", tmp_path / "pairs.jsonl", "--model_name_or_path", model_folder]
    arguments += ["--max_length", "64", "--num_samples", "0", "--sft.num_train_epochs", "0", "--use_cpu"]
    arguments += ["--output_dir", tmp_path / "run"]
    status, _, err = recipe(*arguments, "--use_peft", "--lora_target_modules", "none_such")
    assert status != 0 and "none_such" in err
    assert not (tmp_path / "run").exists()
    # a folder that was there stays, and so does what others have put into it
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert recipe(*arguments, "--use_peft", "--lora_target_modules", "none_such")[0] != 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]

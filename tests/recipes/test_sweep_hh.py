"""A sweep: one SFT, one pass of the reference, points that are run once."""

import csv
import json

import pytest

from resdpo_trl.errors import UserError
from resdpo_trl.sweep import SweepConfig, points_of, remember
from tests.conftest import write_pairs

SMALL = [
    "--scratch_width", "32", "--scratch_layers", "1", "--scratch_heads", "2", "--scratch_vocab_size", "400",
    "--sft_epochs", "1", "--num_samples", "0", "--max_length", "64", "--use_cpu", "--max_train_samples", "48",
]  # fmt: skip


def table(folder):
    with open(folder / "table.csv", newline="") as file:
        return {row["point"]: row for row in csv.DictReader(file)}


def test_a_sweep_from_one_reference_and_a_point_added_later(recipe, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in write_pairs(120)))
    folder = tmp_path / "a sweep"
    arguments = ["--dataset_name", pairs, "--output_dir", folder, *SMALL]
    status, said, wrong = recipe("sweep_hh.py", "--betas", "0.1", "0.5", "--jobs", "2", *arguments)
    assert status == 0, wrong
    rows = table(folder)
    assert [row["status"] for row in rows.values()] == ["done", "done"]
    assert all(name in said for name in rows)
    assert "beta0.1" in (folder / "report.html").read_text()
    weights = {point: (folder / "points" / point / "reference" / "model.safetensors").read_bytes() for point in rows}
    assert set(weights.values()) == {(folder / "sft" / "reference" / "model.safetensors").read_bytes()}
    ended = {point: json.loads((folder / "points" / point / "run.json").read_text())["ended"] for point in rows}

    # the same folder again is refused; with --resume_from_checkpoint it takes one more point, and one that can't run
    status, _, wrong = recipe("sweep_hh.py", "--betas", "0.1", *arguments)
    assert status == 2 and "already holds a sweep" in wrong
    torn = folder / "points" / "beta2_lr0.0001_seed42"
    torn.mkdir()
    (torn / "run.json").write_text("{")
    betas = ["--betas", "0.1", "0.5", "1", "2", "--resume_from_checkpoint"]
    status, said, _ = recipe("sweep_hh.py", *betas, *arguments)
    assert status == 1  # one point failed, the others are there
    rows = table(folder)
    assert [row["status"].split(":")[0] for row in rows.values()] == ["done", "done", "done", "failed"]
    assert "failed: status 1" in said
    for point, when in ended.items():
        assert json.loads((folder / "points" / point / "run.json").read_text())["ended"] == when
    summary = json.loads((folder / "points" / "beta1_lr0.0001_seed42" / "summary.json").read_text())
    read = summary["throughput"]["reference_pairs_read_from_cache"]
    assert read == sum(summary["data"][split] for split in ("train", "validation", "test"))
    (folder / "points" / "beta2_lr0.0001_seed42" / "run.json").unlink()
    status, said, _ = recipe("sweep_hh.py", *betas, "--print_commands", *arguments)
    assert status == 0
    assert [line.count("--beta ") for line in said.splitlines()] == [1, 1, 1, 1]


def test_every_combination_once(tmp_path):
    config = SweepConfig(betas=[0.1, 0.3, 0.1], learning_rates=[1e-4, 1e-5], seeds=[0, 1])
    points = points_of(config, 1.0, 9, tmp_path)
    assert len(points) == len({point.name for point in points}) == 8
    assert points_of(SweepConfig(betas=[0.3]), 1e-5, 7, tmp_path)[0].name == "beta0.3_lr1e-05_seed7"


def test_other_flags_are_another_sweep(tmp_path):
    remember(tmp_path, ["--max_length", "64"], resume=False)
    with pytest.raises(UserError, match="other flags"):
        remember(tmp_path, ["--max_length", "128"], resume=True)
    remember(tmp_path, ["--max_length", "64"], resume=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--betas", "0"], "--betas 0.0: must be above 0"),
        (["--jobs", "0"], "--jobs 0"),
        (["--beta", "0.3"], "--beta is each point's own: pass --betas"),
        (["--hub_token", "hf_x"], "--hub_token is for one run"),
        (["--bettas", "0.3"], "unknown flag --bettas; did you mean betas?"),
    ],
)
def test_bad_input(recipe, tmp_path, arguments, message):
    status, _, said = recipe("sweep_hh.py", *arguments, "--output_dir", tmp_path / "s")
    assert status == 2
    assert message in said

"""A sweep: one SFT, one pass of the reference, points that are run once."""

import csv
import json

import pytest
from transformers import AutoTokenizer

from resdpo_trl.errors import UserError
from resdpo_trl.study import sweep
from resdpo_trl.study.sweep import (
    FRONTIER_COLUMNS,
    Point,
    SweepConfig,
    best_of,
    points_of,
    read_rows,
    remember,
    run_points,
)
from tests.conftest import write_pairs

SMALL = [
    "--sft.num_train_epochs", "1", "--num_samples", "0", "--max_length", "64", "--use_cpu", "--max_train_samples", "48",
    "--max_new_tokens", "5", "--num_train_epochs", "1",
]  # fmt: skip


def table(folder):
    with open(folder / "table.csv", newline="") as file:
        return {row["point"]: row for row in csv.DictReader(file)}


def reward_model(language_model, folder):
    """A reward model of the same tokenizer, untrained."""
    from resdpo_trl.text.config import TextModelConfig
    from resdpo_trl.text.reward import untrained_reward_model

    untrained_reward_model(str(language_model), TextModelConfig(), False, "reference", 0).save_pretrained(folder)
    AutoTokenizer.from_pretrained(language_model).save_pretrained(folder)
    return folder


def check_the_frontier(folder):
    """One row a checkpoint and one of the reference; the failed point is left out and named; nothing is done twice."""
    rows = read_rows(folder / "frontier.csv", FRONTIER_COLUMNS)
    assert [row["point"].partition("_")[0] for row in rows] == ["reference", "beta0.1", "beta0.5", "beta1", "beta2"]
    assert rows[0]["kl"] == rows[0]["kl_low"] == 0
    assert [row["status"].partition(":")[0] for row in rows] == ["done"] * 4 + ["failed"]
    assert all(row["n"] == 6 and row["reward_low"] <= row["reward"] <= row["reward_high"] for row in rows[:4])
    assert len({row["kl"] for row in rows[:4]}) == 4
    page = (folder / "report.html").read_text()
    assert 'id="frontier"' in page and "missing from the frontier: it did not end" in page


def test_a_sweep_from_one_reference_and_a_point_added_later(recipe, tmp_path, model_folder):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in write_pairs(120)))
    folder = tmp_path / "a sweep"
    # at a rate at which two β give policies further apart than a float's rounding
    arguments = ["--dataset_name", pairs, "--model_name_or_path", model_folder, "--output_dir", folder, *SMALL]
    arguments += ["--learning_rates", "3e-3"]
    status, said, wrong = recipe("sweep_hh.py", "--betas", "0.1", "0.5", "--jobs", "2", *arguments)
    assert status == 0, wrong
    rows = table(folder)
    assert [row["status"] for row in rows.values()] == ["done", "done"]
    assert sorted(row["best"] for row in rows.values()) == ["", "best"]
    best = next(row for row in rows.values() if row["best"])
    assert float(best["validation_loss"]) == min(float(row["validation_loss"]) for row in rows.values())
    assert f"{best['point']} *" in said
    for point in rows:  # the one pass of the reference was the SFT run's, though both points ran at once
        summary = json.loads((folder / "points" / point / "summary.json").read_text())
        read = summary["throughput"]["reference_pairs_read_from_cache"]
        assert summary["sft"] == {"skipped": str(folder / "sft" / "reference")}
        assert read == sum(summary["data"][split] for split in ("train", "validation", "test"))
    assert all(name in said for name in rows)
    assert "beta0.1" in (folder / "report.html").read_text()
    weights = {point: (folder / "points" / point / "reference" / "model.safetensors").read_bytes() for point in rows}
    assert set(weights.values()) == {(folder / "sft" / "reference" / "model.safetensors").read_bytes()}
    ended = {point: json.loads((folder / "points" / point / "run.json").read_text())["ended"] for point in rows}

    # the same folder again is refused; with --resume_from_checkpoint it takes one more point, and one that can't run
    status, _, wrong = recipe("sweep_hh.py", "--betas", "0.1", *arguments)
    assert status == 2 and "already holds a sweep" in wrong
    torn = folder / "points" / "beta2_lr0.003_seed42"
    torn.mkdir()
    (torn / "run.json").write_text("{")
    betas = ["--betas", "0.1", "0.5", "1", "2", "--resume_from_checkpoint"]
    betas += ["--reward_model", reward_model(folder / "sft" / "reference", tmp_path / "reward")]
    betas += ["--frontier_samples", "6"]
    status, said, wrong = recipe("sweep_hh.py", *betas, *arguments)
    assert status == 1, wrong  # one point failed, the others are there
    rows = table(folder)
    assert [row["status"].split(":")[0] for row in rows.values()] == ["done", "done", "done", "failed"]
    assert "failed: status 2" in said and "run.json" in said
    for point, when in ended.items():
        assert json.loads((folder / "points" / point / "run.json").read_text())["ended"] == when
    check_the_frontier(folder)
    page = (folder / "report.html").read_text()
    status, _, wrong = recipe("report.py", folder, "--output", tmp_path / "again.html")  # from its own files
    assert status == 0, wrong
    assert (tmp_path / "again.html").read_text().partition("<main>")[2] == page.partition("<main>")[2]
    status, _, wrong = recipe("report.py", folder, folder)
    assert status == 2 and "name it alone" in wrong
    (folder / "points" / "beta2_lr0.003_seed42" / "run.json").unlink()
    status, said, _ = recipe("sweep_hh.py", *betas, "--print_commands", *arguments)
    assert status == 0
    assert [line.count("--beta ") for line in said.splitlines()] == [1, 1, 1, 1]


def test_every_combination_once(tmp_path):
    config = SweepConfig(betas=[0.1, 0.3, 0.1], learning_rates=[1e-4, 1e-5], seeds=[0, 1])
    points = points_of(config, 1.0, 9, tmp_path)
    assert len(points) == len({point.name for point in points}) == 8
    assert points_of(SweepConfig(betas=[0.3]), 1e-5, 7, tmp_path)[0].name == "beta0.3_lr1e-05_seed7"


def test_sft_epochs_are_an_axis_that_can_be_added_later(tmp_path):
    """The points of --sft.num_train_epochs keep their names and their SFT run; each other value has its own."""
    (before,) = points_of(SweepConfig(betas=[0.3]), 1e-5, 7, tmp_path, 2.0)
    points = points_of(SweepConfig(betas=[0.3], sft_epochs_list=[1, 2, 4]), 1e-5, 7, tmp_path, 2.0)
    assert points[1] == before
    assert [point.reference.parent.name for point in points] == ["sft_epochs1", "sft", "sft_epochs4"]
    assert [point.name for point in points][::2] == ["beta0.3_lr1e-05_seed7_sft1", "beta0.3_lr1e-05_seed7_sft4"]
    (given,) = points_of(SweepConfig(betas=[0.3]), 1e-5, 7, tmp_path, 2.0, "some/model")
    assert given.flags()[-2:] == ["--reference", "some/model"]
    with pytest.raises(UserError, match="--sft_epochs_list runs SFT"):
        points_of(SweepConfig(sft_epochs_list=[1]), 1e-5, 7, tmp_path, 2.0, "some/model")


def test_two_references_and_the_command_lines(recipe, tmp_path, model_folder):
    """--print_commands makes every reference and its pass, and leaves the points to others."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in write_pairs(60)))
    arguments = ["--dataset_name", pairs, "--model_name_or_path", model_folder, "--output_dir", tmp_path / "s", *SMALL]
    status, said, wrong = recipe("sweep_hh.py", "--sft_epochs_list", "1", "2", "0", "--print_commands", *arguments)
    assert status == 0, wrong
    steps = []
    for name in ("sft", "sft_epochs2"):
        summary = json.loads((tmp_path / "s" / name / "summary.json").read_text())
        steps.append(summary["sft"]["steps"])
        assert summary["throughput"]["reference_seconds"] > 0
        assert f"--reference {tmp_path / 's' / name / 'reference'}" in said
    assert steps[1] == 2 * steps[0]
    untrained = json.loads((tmp_path / "s" / "sft_epochs0" / "summary.json").read_text())
    assert untrained["sft"] == {"skipped": str(model_folder)}
    assert untrained["throughput"]["reference_seconds"] > 0


def test_the_best_point_is_chosen_on_validation(tmp_path):
    points = points_of(SweepConfig(betas=[0.1, 0.3, 0.5]), 1e-5, 7, tmp_path)
    rows = [
        {"status": "done", "validation_loss": 0.6, "validation_accuracy": 0.5, "loss": 0.1},
        {"status": "done", "validation_loss": 0.5, "validation_accuracy": 0.4, "loss": 0.9},
        {"status": "failed: status 1", "validation_loss": "", "validation_accuracy": ""},
    ]
    for losses, best in ((["sigmoid"], 1), (["ipo"], 0)):
        for point in points[:2]:
            point.folder.mkdir(parents=True, exist_ok=True)
            (point.folder / "run.json").write_text('{"ended": "now", "complete": true}')
            (point.folder / "summary.json").write_text(json.dumps({"dpo": {"loss_type": losses}}))
        assert best_of(rows, points) is rows[best]
    assert best_of(rows[2:], points[2:]) is None


def test_a_point_gets_a_gpu_that_is_free(tmp_path, monkeypatch):
    """Two GPUs, four points, the first of which lasts as long as the others together: they take turns on the other."""
    monkeypatch.setattr(sweep, "_gpus", lambda: ["4", "7"])
    script = tmp_path / "recipe.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
        "while folder.name == 'p0' and not (folder.parent / 'p3' / 'gpu').exists():\n    time.sleep(0.01)\n"
        "(folder / 'gpu').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    points = [Point(0.1, 1e-5, 0, 1.0, tmp_path / f"p{number}", tmp_path) for number in range(4)]
    assert run_points(script, points, [], jobs=2) == {}
    used = [(point.folder / "gpu").read_text() for point in points]
    assert set(used) == {"4", "7"} and used[0] not in used[1:]


def test_more_points_at_once_than_gpus_share_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_gpus", lambda: ["4", "7"])
    script = tmp_path / "recipe.py"
    script.write_text(  # each waits until all four run
        "import os, pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
        "(folder / 'gpu').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "while len(list(folder.parent.glob('p*/gpu'))) < 4:\n    time.sleep(0.01)\n"
    )
    points = [Point(0.1, 1e-5, 0, 1.0, tmp_path / f"p{number}", tmp_path) for number in range(4)]
    assert run_points(script, points, [], jobs=4) == {}
    assert sorted((point.folder / "gpu").read_text() for point in points) == ["4", "4", "7", "7"]


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
        (["--sft_epochs_list", "-1"], "--sft_epochs_list -1.0: must be at least 0"),
        (["--frontier_samples", "1"], "--frontier_samples 1"),
        (
            ["--sft_epochs_list", "1", "--reference", "x"],
            "--sft_epochs_list runs SFT and --reference skips it",
        ),
        (["--reward_model", "./nowhere"], "--reward_model ./nowhere: no such folder"),
        (["--beta", "0.3"], "--beta is set per point: pass --betas"),
        (["--hub_token", "hf_x"], "--hub_token is for one run"),
        (["--bettas", "0.3"], "unknown flag --bettas; did you mean betas?"),
    ],
)
def test_bad_input(recipe, tmp_path, arguments, message):
    status, _, said = recipe("sweep_hh.py", *arguments, "--output_dir", tmp_path / "s")
    assert status == 2
    assert message in said

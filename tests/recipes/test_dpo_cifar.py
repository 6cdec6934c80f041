"""Whole runs of the image recipes: what they leave, what they refuse, what they exit with."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.image.conftest import draw, image_folder, write_parquet  # noqa: F401  (a fixture)
from tests.recipes.conftest import ROOT, not_ended, rows_of

SMALL = ["--widths", "24", "24", "--use_cpu", "--per_device_train_batch_size", "16", "--logging_steps", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, image_folder):  # noqa: F811
    """One run through `accelerate launch`, with everything compared."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    command = [
        Path(sys.executable).with_name("accelerate"), "launch", "--config_file", "accelerate_configs/cpu.yaml",
        "recipes/dpo_cifar.py", "--dataset_name", image_folder, "--output_dir", folder, "--num_train_epochs", "3",
        "--compare_cross_entropy", "--compare_modes", "hard/polyak", "uniform/copy", "--learning_rate", "0.1",
        "--bf16", "false", *SMALL,  # figures are computed again in float32
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_what_a_run_leaves(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        "run.json", "reference", "policy", "compared", "checkpoints", "metrics.jsonl", "summary.json", "scores.jsonl",
        "report.html", "plots",
    }  # fmt: skip
    assert {path.name for path in (folder / "compared").iterdir()} == {"hard-polyak", "uniform-copy", "cross_entropy"}
    run = json.loads((folder / "run.json").read_text())
    assert run["ended"] >= run["started"]
    assert run["num_processes"] == 1
    assert run["config"]["training"]["rejected_sampling"] == "all"
    assert len(run["data_fingerprint"]["test"]) == 64
    for model in ("policy", "reference", "compared/hard-polyak"):
        assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {
            path.name for path in (folder / model).iterdir()
        }
        assert not (folder / model / "training_args.bin").exists()


def test_the_metrics_have_trls_names_and_every_stage(finished):
    folder, _ = finished
    rows = rows_of(folder / "metrics.jsonl")
    dpo = ("dpo", "dpo-hard-polyak", "dpo-uniform-copy")
    assert {(row["stage"], row["split"]) for row in rows} == (
        {(stage, split) for stage in (*dpo, "cross_entropy") for split in ("train", "validation", "test")}
        | {("reference", "train"), ("reference", "validation")}
    )
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "accuracy", "kl"}
    names |= {"logps/chosen", "logps/rejected"}
    for row in rows:
        assert ({"loss", "accuracy"} if row["stage"] in ("reference", "cross_entropy") else names) <= set(row), row


def test_the_table_compares_every_model(finished):
    folder, done = finished
    summary = json.loads((folder / "summary.json").read_text())
    for line in ("reference ", "DPO, all/frozen ", "DPO, hard/polyak ", "DPO, uniform/copy ", "cross-entropy "):
        assert any(row.strip().startswith(line) for row in done.stdout.splitlines()), line
    test = summary["dpo"]["test"]
    assert test["n"] == 60
    low, high = test["interval_95"]["accuracy"]
    assert low <= test["accuracy"] <= high
    assert f"{test['accuracy']:.4f}" in done.stdout
    assert summary["compared"]["cross-entropy"]["test"]["accuracy"] > 0.3
    assert summary["compared"]["hard/polyak"]["reference_update"] == "polyak"
    # the moved references too are judged against the reference that the run leaves
    assert summary["compared"]["uniform/copy"]["test"]["kl"] > 0.01
    assert done.stdout.startswith("cross-entropy and DPO of fast on ")


def test_the_test_figures_can_be_computed_again_from_the_folders(finished, recipe, tmp_path, image_folder):  # noqa: F811
    folder, _ = finished
    output = tmp_path / "figures.json"
    status, said, wrong = recipe(
        "evaluate_cifar.py", "--model", folder / "compared/hard-polyak", "--reference", folder / "reference",
        "--dataset_name", image_folder, "--output", output,
    )  # fmt: skip
    assert status == 0, wrong
    figures = json.loads(output.read_text())
    test = json.loads((folder / "summary.json").read_text())["compared"]["hard/polyak"]["test"]
    for name in ("accuracy", "kl", "rewards/margins", "rewards/accuracies"):
        assert figures["dpo"][name] == pytest.approx(test[name], abs=1e-5), name
    confusion = torch.tensor(figures["confusion_matrix"])
    assert confusion.sum() == 60
    assert confusion.diagonal().sum() / 60 == pytest.approx(test["accuracy"])
    by_class = torch.tensor(list(figures["accuracy_by_class"].values()))
    torch.testing.assert_close(by_class, confusion.diagonal() / confusion.sum(1))
    assert 0 <= figures["calibration_error"] <= 1
    assert "yellow" in said and "KL(policy‖reference)" in said


def test_the_model_card_tells_what_the_summary_says(finished):
    from huggingface_hub import ModelCard

    folder, _ = finished
    card = ModelCard.load(folder / "policy" / "README.md")
    test = json.loads((folder / "summary.json").read_text())["dpo"]["test"]
    results = [(result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert [value for kind, value in results if kind == "accuracy"] == [test["accuracy"]]
    assert ("rewards/accuracies", test["rewards/accuracies"]) in results
    assert "Results on 60 held-out images" in card.text
    assert "all; reference frozen" in card.text


def test_cross_entropy_alone_then_dpo_from_it(recipe, tmp_path, image_folder):  # noqa: F811
    data = ["--dataset_name", image_folder, *SMALL]
    arguments = ["--arch", "fast", "--optim", "sgd", "--learning_rate", "0.1", "--label_smoothing_factor", "0.1"]
    status, said, wrong = recipe("train_cifar.py", *data, *arguments, "--output_dir", tmp_path / "ce")
    assert status == 0, wrong
    assert "unseen images right" in said
    card = (tmp_path / "ce" / "policy" / "README.md").read_text()
    assert "Trained by cross-entropy" in card
    status, said, wrong = recipe(
        "dpo_cifar.py", *data, "--reference", tmp_path / "ce" / "policy", "--output_dir", tmp_path / "d",
        "--reference_update", "copy", "--compare_cross_entropy", "--widths", "24", "32", "40",
    )  # fmt: skip
    assert status == 0, wrong
    assert said.startswith(f"DPO from {tmp_path / 'ce' / 'policy'} on ")
    baseline = json.loads((tmp_path / "d" / "compared" / "cross_entropy" / "config.json").read_text())
    assert baseline["widths"] == [24, 24]  # as the given reference, whatever --widths says
    summary = json.loads((tmp_path / "d" / "summary.json").read_text())
    assert summary["dpo"]["reference_update"] == "copy"
    assert summary["reference"]["given"] == str(tmp_path / "ce" / "policy")


def test_same_seed_same_files(recipe, tmp_path, image_folder):  # noqa: F811
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = ["--dataset_name", image_folder, "--output_dir", tmp_path / name, "--seed", seed, *SMALL]
        assert recipe("dpo_cifar.py", *arguments, "--num_train_epochs", 1, "--max_train_samples", 64)[0] == 0
        weights.append((tmp_path / name / "policy" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_resume_continues_where_the_run_stopped(recipe, tmp_path, image_folder):  # noqa: F811
    import shutil

    arguments = ["--dataset_name", image_folder, "--num_train_epochs", "2", "--reference_update", "polyak", *SMALL]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert recipe("dpo_cifar.py", *arguments, "--output_dir", whole)[0] == 0
    shutil.copytree(whole, torn)
    shutil.rmtree(torn / "policy")
    not_ended(torn)
    last = max((torn / "checkpoints" / "dpo").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.rmtree(last)
    status, _, said = recipe("dpo_cifar.py", *arguments, "--output_dir", torn, "--resume_from_checkpoint")
    assert status == 0, said
    assert (torn / "policy" / "model.safetensors").read_bytes() == (whole / "policy" / "model.safetensors").read_bytes()
    first, second = (
        [(row["stage"], row["split"], row["step"]) for row in rows_of(path / "metrics.jsonl")] for path in (whole, torn)
    )
    assert first == second


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "resnet19"], "--arch resnet19: unknown; did you mean resnet18"),
        (["--polyak_tau", "0"], "--polyak_tau 0.0: must be in (0, 1]"),
        (["--do_copy"], "unknown flag --do_copy; here it is --reference_update copy"),
        (["--reference.num_train_epochs", "0"], "--reference.num_train_epochs 0.0: must be above 0"),
        (["--beta", "0"], "--beta 0.0: must be above 0"),
        (["--dataset_name", "nothing.parquet"], "nothing.parquet: no such file or folder"),
        (["--dataset_name", "uoft-cs/cifar10"], "pass a folder"),
        (["--reference", "/nothing"], "--reference /nothing: no such folder"),
        (["--rejected_samplign", "all"], "unknown flag --rejected_samplign; did you mean rejected_sampling?"),
        (["--image_column", "picture"], "no such column of images (found"),
        (["--rejected_sampling", "every"], "argument --rejected_sampling"),
        (["--gradient_checkpointing"], "--gradient_checkpointing is not supported here"),
        (["--crop_padding", "16"], "--crop_padding 16: must be below the images' size"),
        (
            ["--max_train_samples", "50", "--per_device_train_batch_size", "64"],
            "50 training images do not fill a batch",
        ),
        (["--image_size", "8"], "--arch fast: --widths"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(recipe, tmp_path, image_folder, arguments, message):  # noqa: F811
    data = [] if "--dataset_name" in arguments else ["--dataset_name", image_folder]
    status, _, said = recipe("dpo_cifar.py", *data, *arguments, "--output_dir", tmp_path / "d")
    assert status == 2
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"names": ("red", "green", "cyan", "yellow")},
            "the data has a class cyan, which is not one of its 4 classes (red, green, blue, yellow): pass",
        ),
        ({"size": 24}, "it takes 16×16 images and the data"),
    ],
)
def test_a_reference_of_another_shape(recipe, tmp_path, finished, options, message):
    folder, _ = finished
    names = options.pop("names", ("red", "green", "blue", "yellow"))
    write_parquet(tmp_path / "a.parquet", draw(60, **options), names=names)
    for name, flag, more in (
        ("dpo_cifar.py", "--reference", ["--output_dir", tmp_path / "d"]),
        ("evaluate_cifar.py", "--model", []),
    ):
        status, _, said = recipe(name, "--dataset_name", tmp_path / "a.parquet", flag, folder / "reference", *more)
        assert status == 2
        assert f"{flag} {folder / 'reference'}: {message}" in said


@pytest.mark.parametrize("beta", ["0", "inf", "nan"])
def test_a_beta_that_makes_no_sense(recipe, beta):
    status, _, said = recipe("evaluate_cifar.py", "--model", "nothing", "--beta", beta)
    assert status == 2
    assert f"--beta {float(beta)}: must be above 0 and finite" in said


def test_a_run_is_not_overwritten(recipe, finished, image_folder):  # noqa: F811
    folder, _ = finished
    status, _, said = recipe("dpo_cifar.py", "--dataset_name", image_folder, "--output_dir", folder)
    assert status == 2
    assert "--resume_from_checkpoint" in said and "--overwrite_output_dir" in said


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "recipes" / "configs" / "cifar").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_preset_parses(tmp_path, preset, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    command_line = importlib.import_module("command_line")
    from resdpo_trl.image.config import ImageCrossEntropyConfig, ImageDPOConfig, ImageModelConfig
    from resdpo_trl.image.data import AugmentConfig, ImageDataConfig
    from resdpo_trl.image.model import check_architecture
    from resdpo_trl.training.arguments import RunConfig

    parser = command_line.RecipeParser(
        (ImageDataConfig, ImageModelConfig, AugmentConfig, ImageDPOConfig, RunConfig),
        section="dpo",
        before=("reference", ImageCrossEntropyConfig),
    )
    (_, model, *_), used = parser.parse(given=["--config", str(preset), "--output_dir", str(tmp_path)])
    assert used == preset
    check_architecture(model.arch)
    assert preset.read_text().startswith("#")

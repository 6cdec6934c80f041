"""--overwrite_output_dir: the old run stays until the new one has what it begins with."""

import json

from tests.image.conftest import image_folder  # noqa: F401  (a fixture)

SMALL = ["--widths", "24", "24", "--use_cpu", "--per_device_train_batch_size", "16"]


def test_a_run_that_can_not_begin_leaves_the_old_one(recipe, tmp_path, image_folder):  # noqa: F811
    folder = tmp_path / "run"
    data = ["--dataset_name", image_folder]
    status, _, err = recipe("train_cifar.py", *data, "--output_dir", folder, *SMALL)
    assert status == 0, err
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    again = ["--output_dir", folder, "--overwrite_output_dir", *SMALL]
    for recipe_name, arguments, message in (
        ("train_cifar.py", ["--dataset_name", tmp_path / "a typo"], "no such file or folder"),
        (
            "dpo_cifar.py",
            [*data, "--reference", folder / "policy"],
            f"--reference {folder}/policy: is in",
        ),
        ("dpo_cifar.py", [*data, "--reference", tmp_path / "none"], "--reference"),
    ):
        status, _, err = recipe(recipe_name, *arguments, *again)
        assert status == 2 and message in err and len(err.splitlines()) == 1, err
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    status, _, err = recipe("train_cifar.py", *data, *again, "--seed", "7")
    assert status == 0, err
    assert json.loads((folder / "run.json").read_text())["seed"] == 7
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["split"] == "test"]) == 1  # none of the old run's


def test_a_run_whose_data_are_not_there_leaves_nothing_to_overwrite(recipe, tmp_path, image_folder):  # noqa: F811
    arguments = ["train_cifar.py", "--output_dir", tmp_path / "run", *SMALL, "--dataset_name"]
    assert recipe(*arguments, tmp_path / "a typo")[0] == 2
    status, _, err = recipe(*arguments, image_folder)
    assert status == 0, err

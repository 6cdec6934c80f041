"""What is adapted to small data and to LoRA, and what limits cut: said and counted; a flag has the last word."""

import json

import pytest

from resdpo_trl.sources import held_out_size
from resdpo_trl.text.data import TextDataConfig, load_preferences
from tests.conftest import write_pairs
from tests.image.conftest import draw, write_parquet


@pytest.mark.parametrize(
    ("rows", "share", "limit", "size"),
    [(24, 0.05, None, 4), (200, 0.05, None, 32), (200, 0.15, 8, 8), (2000, 0.05, None, 100), (3, 0.05, None, 1)],
)
def test_held_out_sizes(rows, share, limit, size):
    assert held_out_size(rows, share, limit) == size


def test_what_limits_cut_is_counted(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in write_pairs(60)))
    counts = load_preferences(TextDataConfig(dataset_name=str(path), max_train_samples=10, max_test_samples=5)).counts
    assert (counts["train"], counts["validation"], counts["test"]) == (10, 10, 5)
    assert counts["cut_by_limits"] == 60 - 25 and counts["held_out_raised"] == ["validation"]
    whole = load_preferences(TextDataConfig(dataset_name=str(path))).counts
    assert (whole["train"], whole["cut_by_limits"], whole["held_out_raised"]) == (40, 0, ["validation", "test"])


def test_small_images_get_steps_and_lines(recipe, tmp_path):
    write_parquet(tmp_path / "few.parquet", draw(60))
    small = ["--dataset_name", tmp_path / "few.parquet", "--widths", "24", "24", "--max_train_samples", "30"]
    status, said, err = recipe("dpo_cifar.py", *small, "--output_dir", tmp_path / "a")  # over the quickstart's 64
    assert status == 0, err
    for line in (
        "small data: --per_device_train_batch_size 4, for at least 4 steps per epoch",
        "small data: 10 rows are held out for validation, more than 10%",
        "left out: 8 rows, by --max_train_samples 30",
        "docs/your_data.md explains cross-validation",
    ):
        assert line in said, line
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["data"]["adapted"]["per_device_train_batch_size"] == 4
    assert summary["dpo"]["steps"] >= 4 * 4  # four epochs
    assert "| per_device_train_batch_size | 4 |" in (tmp_path / "a" / "policy" / "README.md").read_text()
    # and the verdict comes before the table
    assert said.index("unseen images right") < said.index("  images  ")
    assert "unseen images right" in (tmp_path / "a" / "report.html").read_text()


def test_lora_rates(recipe, monkeypatch, tmp_path):
    import importlib

    from resdpo_trl.text.config import TextDPOConfig, TextModelConfig, TextSFTConfig

    def rates(*flags):
        parser = importlib.import_module("command_line").RecipeParser(
            (TextModelConfig, TextDPOConfig), before=("sft", TextSFTConfig)
        )
        (_, dpo, sft), _ = parser.parse(given=["--output_dir", str(tmp_path), *flags])
        return dpo.learning_rate, sft.learning_rate

    assert rates() == (1e-5, 2e-5)
    assert rates("--use_peft") == pytest.approx((1e-4, 2e-4))
    assert rates("--use_peft", "--learning_rate", "3e-5") == pytest.approx((3e-5, 2e-4))
    assert rates("--use_peft", "--sft.learning_rate", "3e-5") == pytest.approx((1e-4, 3e-5))
    preset = tmp_path / "full.yaml"
    preset.write_text("learning_rate: 5.0e-6\n")
    assert rates("--config", str(preset), "--use_peft") == pytest.approx((5e-5, 2e-4))
    assert rates("--config", str(preset)) == (5e-6, 2e-5)
    preset.write_text("learning_rate: 5.0e-6\nuse_peft: true\n")  # LoRA's, and SFT's default is not
    assert rates("--config", str(preset)) == pytest.approx((5e-6, 2e-4))
    assert rates("--config", str(preset), "--use_peft") == pytest.approx((5e-6, 2e-4))
    assert rates("--config", str(preset), "--use_peft", "false") == pytest.approx((5e-7, 2e-5))

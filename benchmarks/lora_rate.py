"""DPO of SmolLM2 at several learning rates, with LoRA and with all weights, on three data sets: one Markdown table.

    python benchmarks/lora_rate.py pairs.jsonl.gz --output_dir runs/lora_rate

`pairs.jsonl.gz` holds dialogues of Anthropic HH. The data sets are the quickstart's chit-chat, these dialogues, and the
same dialogues relabeled so that the shorter response is preferred. Each point is one epoch of 128 pairs (16 steps)
without SFT, judged on 96 validation pairs. A point whose run has ended is not run again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets

from resdpo_trl.study.sweep import has_ended
from resdpo_trl.text.data import QUICKSTART, TextDataConfig, load_preferences

RECIPE = Path(__file__).parents[1] / "recipes" / "dpo_hh.py"
FIXED = [
    "--model_name_or_path", "smollm2", "--sft.num_train_epochs", "0", "--max_length", "128",
    "--per_device_train_batch_size", "8",
    "--warmup_steps", "0.1", "--logging_steps", "4", "--validation_fraction", "0.1", "--max_train_samples", "128",
    "--max_eval_samples", "96", "--max_test_samples", "8", "--num_samples", "0", "--save_strategy", "no", "--select",
    "last", "--bf16", "true", "--disable_tqdm", "true",
]  # fmt: skip


def prefer_shorter(name: str, folder: Path) -> Path:
    """The same dialogues, the response of fewer characters as the chosen one; without those of equal length."""
    splits = load_preferences(TextDataConfig(dataset_name=name))
    rows = concatenate_datasets([splits[split] for split in ("train", "validation", "test")])
    file = folder / "shorter.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        for row in rows:
            short, long = sorted((row["chosen"], row["rejected"]), key=len)
            if len(short) < len(long):
                pair = {"chosen": row["prompt"] + short, "rejected": row["prompt"] + long}
                lines.write(json.dumps(pair) + "\n")
    return file


def figures(data: str, method: str, rate: str, run: Path) -> dict[str, Any]:
    """The validation figures of one point, which is run if it has not ended."""
    if not has_ended(run):
        command = [sys.executable, RECIPE, *FIXED, "--dataset_name", data, "--learning_rate", rate, "--output_dir", run]
        command += ["--overwrite_output_dir", *(["--use_peft"] if method == "LoRA" else [])]
        subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
        for model in ("reference", "policy"):
            shutil.rmtree(run / model)
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())["dpo"]["validation"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_name")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--lora_rates", nargs="*", default=["3e-5", "1e-4", "3e-4", "1e-3", "3e-3"])
    parser.add_argument("--full_rates", nargs="*", default=["1e-5", "3e-5", "1e-4", "3e-4"])
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    sets = {
        "chit-chat": QUICKSTART,
        "HH harmless": given.dataset_name,
        "the same, shorter preferred": str(prefer_shorter(given.dataset_name, given.output_dir)),
    }
    points = [
        (method, name, rate)
        for method, rates in (("LoRA", given.lora_rates), ("all weights", given.full_rates))
        for name in sets
        for rate in rates
    ]
    print("| data | trained | rate | accuracy, validation | loss | margin |\n| --- | --- | --- | --- | --- | --- |")
    for method, name, rate in points:
        run = given.output_dir / f"{name} {method} {rate}".replace(",", "").replace(" ", "_")
        found = figures(sets[name], method, rate, run)
        low, high = found["interval_95"]["rewards/accuracies"]
        print(
            f"| {name} | {method} | {rate} | {found['rewards/accuracies']:.3f} ({low:.3f} to {high:.3f}), "
            f"n = {found['n']} | {found['loss']:.3f} | {found['rewards/margins']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""DPO on every part of a data set but one, tested on that one, by turns: each pair is a test pair once.

    python benchmarks/cross_validate.py pairs.jsonl.gz --folds 5 --output_dir runs/folds [flags of recipes/dpo_hh.py]

For data too small for a test split that says much. Pairs with the same opening stay in one fold. One JSON line a fold
and one of all: accuracy, margin and loss of the test pairs, with 95% bootstrap intervals over the pairs.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from datasets import concatenate_datasets

from resdpo_trl.metrics import with_intervals
from resdpo_trl.run.folder import hardware
from resdpo_trl.text.data import MARKER, TextDataConfig, load_preferences

RECIPE = Path(__file__).parents[1] / "recipes" / "dpo_hh.py"


def write_folds(name: str, folds: int, folder: Path) -> list[Path]:
    """A data set of train, validation (a twentieth) and test for each fold; HH's dialogue form."""
    splits = load_preferences(TextDataConfig(dataset_name=name))
    rows = concatenate_datasets([splits[split] for split in ("train", "validation", "test")]).to_list()
    openings = sorted({row["prompt"].partition(MARKER)[0] for row in rows})
    order = np.random.default_rng(0).permutation(len(openings)).tolist()
    place = dict(zip(openings, order, strict=True))
    written = []
    for fold in range(folds):
        parts: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
        for row in rows:
            number = place[row["prompt"].partition(MARKER)[0]]
            held_out = number % folds == fold
            part = "test" if held_out else "validation" if (number // folds) % 20 == 0 else "train"
            parts[part].append({side: row["prompt"] + row[side] for side in ("chosen", "rejected")})
        where = folder / f"data_{fold}"
        where.mkdir(parents=True, exist_ok=True)
        for part, found in parts.items():
            (where / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        written.append(where)
    return written


def figures(margins: np.ndarray) -> dict[str, object]:
    """Of (N,) reward margins: with DPO's loss without label smoothing, −log σ(margin)."""
    return with_intervals(
        {
            "accuracy": (margins > 0).astype(float),
            "margin": margins,
            "loss": np.logaddexp(0, -margins),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_name")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--output_dir", type=Path, required=True)
    options, flags = parser.parse_known_args()
    margins = []
    for fold, data in enumerate(write_folds(options.dataset_name, options.folds, options.output_dir)):
        run = options.output_dir / f"fold_{fold}"
        command = [sys.executable, RECIPE, "--dataset_name", data, "--num_samples", "0", "--output_dir", run, *flags]
        subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
        rows = (run / "scores.jsonl").read_text().splitlines()
        margins.append(np.array([json.loads(row)["margin"] for row in rows]))
        train = json.loads((run / "summary.json").read_text())["data"]["train"]
        print(json.dumps({"fold": fold, "train": train} | figures(margins[-1])), flush=True)
    print(json.dumps({"folds": options.folds} | figures(np.concatenate(margins))))
    print(json.dumps({"machine": hardware()}))


if __name__ == "__main__":
    main()

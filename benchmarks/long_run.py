"""Resident memory over a long run: whole recipes of tiny models, watched from outside.

python benchmarks/long_run.py --steps 1000

Every hundredth step is logged, evaluated and saved. One JSON line a job: mebibytes at each hundredth step, the most of
them, and the seconds from step 100 on.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from tiny import save_tiny_model

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--use_cpu", "--disable_tqdm", "true", "--logging_steps", "100", "--save_strategy", "steps", "--save_steps", "100",
    "--eval_strategy", "steps", "--eval_steps", "100", "--save_total_limit", "2",
]  # fmt: skip
JOBS = {
    "text DPO": [
        "dpo_hh.py", "--sft.num_train_epochs", "0.2", "--max_length", "64", "--num_samples", "0",
        "--max_train_samples", "400",
        "--per_device_train_batch_size", "8", "--reference_update", "polyak",
    ],
    "image DPO": ["dpo_cifar.py", "--arch", "fast", "--widths", "24", "24", "--per_device_train_batch_size", "16",
                  "--reference_update", "polyak"],
}  # fmt: skip


def last_step(metrics: Path) -> int:
    """The last training step of DPO that was logged."""
    rows = metrics.read_text().splitlines() if metrics.exists() else []
    steps = [json.loads(row) for row in rows if row.startswith('{"stage": "dpo", "split": "train"')]
    return steps[-1]["step"] if steps else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    given = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for job in given.jobs:
        recipe, *arguments = JOBS[job]
        folder = Path(tempfile.mkdtemp(prefix="long-run-"))
        command = [
            sys.executable, ROOT / "recipes" / recipe, *arguments, *SMALL, "--max_steps", given.steps,
            "--output_dir", folder / "run",
        ]  # fmt: skip
        if recipe == "dpo_hh.py":
            command += ["--model_name_or_path", save_tiny_model(str(folder / "model"))]
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
            seen: dict[int, float] = {}
            began, most = None, 0.0
            while process.poll() is None:
                step = last_step(folder / "run" / "metrics.jsonl")
                if step >= 100 and "policy" not in os.listdir(folder / "run"):
                    began = began or time.perf_counter()
                    ended = time.perf_counter()
                    resident = psutil.Process(process.pid).memory_info().rss / 2**20
                    seen.setdefault(step, resident)
                    most = max(most, resident)
                time.sleep(0.1)
        if process.returncode != 0:
            sys.exit((folder / "log").read_text())
        assert began is not None
        row = {
            "job": job,
            "steps": given.steps,
            "mebibytes_at_step": {step: round(resident) for step, resident in seen.items()},
            "most_mebibytes": round(most),
            "seconds_from_step_100": round(ended - began, 1),
        }
        print(json.dumps(row), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

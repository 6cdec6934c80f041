"""Kill one of two processes in the middle of training: how long until the job has ended, and with what status.

python benchmarks/killed_process.py --rank 0
python benchmarks/killed_process.py --rank 1

Prints one JSON line: {"killed_rank", "at_step", "seconds_until_the_end", "status", "children_left"}.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from tiny import save_tiny_model

ROOT = Path(__file__).resolve().parents[1]
TRAINING = [
    "recipes/dpo_hh.py", "--max_length", "64",
    "--max_train_samples", "400", "--num_train_epochs", "1000", "--logging_steps", "1", "--eval_strategy", "no",
    "--save_strategy", "no", "--load_best_model_at_end", "false", "--per_device_train_batch_size", "4",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=1, help="the process to kill")
    parser.add_argument("--limit_seconds", type=float, default=120, help="give up waiting after this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        launch = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file"]
        command = [*launch, "accelerate_configs/multi_cpu.yaml", *TRAINING, "--output_dir", f"{folder}/run"]
        command += ["--model_name_or_path", save_tiny_model(f"{folder}/model")]
        job = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        step = _wait_for_training(job, Path(folder) / "run" / "metrics.jsonl")
        children = psutil.Process(job.pid).children(recursive=True)
        ranked = {child.environ().get("RANK"): child for child in children}
        ranked[str(options.rank)].send_signal(signal.SIGKILL)
        killed = time.perf_counter()
        _, said = job.communicate(timeout=options.limit_seconds)
        seconds = time.perf_counter() - killed
    print(
        json.dumps(
            {
                "killed_rank": options.rank,
                "at_step": step,
                "seconds_until_the_end": round(seconds, 1),
                "status": job.returncode,
                "children_left": sum(child.is_running() for child in children),
                "says": [line for line in said.decode(errors="replace").splitlines() if "Signal 9" in line][:1],
            }
        )
    )


def _wait_for_training(job: subprocess.Popen, metrics: Path) -> int:
    """The step of DPO that is logged by now, once there are ten."""
    while job.poll() is None:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        steps = [row["step"] for row in map(json.loads, lines) if row["stage"] == "dpo"]
        if len(steps) > 10:
            return steps[-1]
        time.sleep(0.2)
    raise SystemExit("the job ended before it trained")


if __name__ == "__main__":
    main()

"""Runs of the recipes that are killed at any moment, resumed, and held against one that never was.

A recipe costs ten seconds of imports, so a server imports them once and forks: `Server` starts it and talks to it in
lines of JSON. A kill is a true SIGKILL, at a random time or at a random file operation in the run's folder (the
moments between two renames are short, and hardly any random time meets them).
"""

import contextlib
import json
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.sharded_job import run_as_on_gpus

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")  # audit events that change a folder

TEXT = [
    "--max_length", "64", "--use_cpu", "--max_train_samples", "40",
    "--per_device_train_batch_size", "8", "--logging_steps", "3", "--disable_tqdm", "true", "--report_to", "none",
]  # fmt: skip
ANSWERS = ["--max_new_tokens", "4", "--num_samples", "2"]
EPOCHS = ["--sft.num_train_epochs", "2", "--sft.learning_rate", "1e-3", "--num_train_epochs", "2"]
SFT = [*EPOCHS, "--learning_rate", "1e-3"]
IMAGES = [
    "--widths", "24", "24", "--arch", "fast", "--use_cpu", "--per_device_train_batch_size", "16", "--logging_steps",
    "3", "--disable_tqdm", "true", "--num_train_epochs", "2", "--max_train_samples", "64", "--report_to", "none",
]  # fmt: skip
STEPS = ["--save_strategy", "steps", "--eval_strategy", "steps", "--save_steps", "2", "--eval_steps", "2"]
# checkpoints within an epoch that are not evaluated
APART = ["--save_strategy", "steps", "--save_steps", "1", "--load_best_model_at_end", "false"]

KINDS = {
    "text SFT": ("sft_hh.py", [*TEXT, *ANSWERS, "--learning_rate", "1e-3", "--num_train_epochs", "2", *APART]),
    "text DPO, frozen": ("dpo_hh.py", [*TEXT, *ANSWERS, *SFT, "--save_total_limit", "1"]),
    "text DPO, polyak": (
        "dpo_hh.py",
        [*TEXT, *ANSWERS, *SFT, *APART, "--reference_update", "polyak", "--polyak_tau", "0.2"],
    ),
    "text DPO, copy": (
        "dpo_hh.py",
        [*TEXT, *ANSWERS, *SFT, *APART, "--reference_update", "copy", "--train_sampling_strategy", "random"],
    ),
    "text reward": ("reward_hh.py", [*TEXT, *SFT, *APART]),
    "image cross-entropy": (
        "train_cifar.py",
        [*IMAGES, *STEPS, "--save_total_limit", "2", "--muon_learning_rate", "0.05", "--optim", "sgd"],
    ),
    "image DPO, frozen": ("dpo_cifar.py", [*IMAGES, *STEPS, "--rejected_sampling", "uniform"]),
    "image DPO, polyak": ("dpo_cifar.py", [*IMAGES, "--reference_update", "polyak", "--polyak_tau", "0.2"]),
    "image DPO, copy": ("dpo_cifar.py", [*IMAGES, *APART, "--reference_update", "copy", "--rejected_sampling", "hard"]),
    # its SFT and its points are processes of their own, which import for seconds: the slowest kind by far
    "sweep": ("sweep_hh.py", [*TEXT, *ANSWERS, *EPOCHS, "--learning_rates", "1e-3", "--betas", "0.1", "0.3"]),
}


def write_data(folder: Path) -> dict[str, list]:
    """Small pairs, a tiny language model, and images; recipe -> the flags that name them."""
    from tests.conftest import ANSWERS, TURNS, save_model, train_tokenizer, write_pairs
    from tests.image.conftest import draw, write_parquet

    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in write_pairs(80)))
    model = save_model(folder / "model", train_tokenizer([*TURNS, *ANSWERS], 400))
    images = folder / "images"
    write_parquet(images / "train.parquet", draw(96))
    write_parquet(images / "test.parquet", draw(30, seed=1))
    text, image = ("sft_hh.py", "dpo_hh.py", "reward_hh.py", "sweep_hh.py"), ("train_cifar.py", "dpo_cifar.py")
    named = ["--dataset_name", pairs, "--model_name_or_path", model]
    return {recipe: named for recipe in text} | {recipe: ["--dataset_name", images] for recipe in image}


class Server:
    """The process that has imported the recipes and forks one a request."""

    def __init__(self, folder: Path):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.recipes.killing"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, recipe: str, arguments: list, log: Path, **how) -> dict:
        """Run a recipe in a fork: {"status", "seconds", "operations": what it did to the files of its folder}.

        Keyword Args:
            kill_after: seconds until SIGKILL (`signal`: or another one), to it and to the processes it has started.
            kill_at: the number of the file operation before which the process sends it to itself.
            kill_before: that operation itself, as `operations` has it.
            environment: variables of this run alone; with them it runs as where there are GPUs (tests/sharded_job.py).
            longest_file: bytes that no file may pass, as on a disk that fills up.
        """
        self.start(recipe, arguments, log, **how)
        return self.answer()

    def start(self, recipe: str, arguments: list, log: Path, **how) -> None:
        request = {"recipe": recipe, "arguments": [str(word) for word in arguments], "log": str(log), **how}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def survive(
    server: Server, kind: str, data: dict, whole: Path, folder: Path, seed: int, usual: dict, signum: int = 9
) -> dict:
    """Kill a run once or twice and let it end: {"kills", "moments", "wrong"}; `wrong` lists what differs from `whole`.

    `usual` is the server's answer about `whole`: its seconds and file operations. `signum` is SIGKILL, or a signal
    after which the run says itself that it stopped.
    """
    generator = random.Random(seed)
    recipe, arguments = KINDS[kind]
    arguments = [*arguments, *data[recipe], "--output_dir", folder]
    log, moments = folder.with_suffix(".log"), []
    for attempt in range(3):
        how = {}
        if attempt == 0 or (attempt == 1 and generator.random() < 0.5):
            if generator.random() < 0.5:
                how = {"kill_after": generator.uniform(0, usual["seconds"])}
            else:
                how = {"kill_at": generator.randrange(len(usual["operations"]))}
        resume = ["--resume_from_checkpoint"] if attempt else []
        answer = server.run(recipe, [*arguments, *resume], log, signal=signum, **how)
        if answer["status"] == (-signum if signum == signal.SIGKILL else 128 + signum):
            moments.append(how)
        elif answer["status"] == 0:
            break
        else:
            return {"kills": len(moments), "moments": moments, "wrong": [f"status {answer['status']}: {log}"]}
    return {"kills": len(moments), "moments": moments, "wrong": differences(whole, folder)}


def differences(whole: Path, other: Path) -> list[str]:
    """What two runs of the same command left differently, but for times."""
    wrong = []
    for path in sorted(whole.rglob("*")):
        name = path.relative_to(whole)
        if "checkpoints" in name.parts or not path.is_file():
            continue
        if name.name == "summary.json":
            if not (other / name).is_file() or _timeless(whole, name) != _timeless(other, name):
                wrong.append(str(name))
        elif path.suffix in (".safetensors", ".jsonl") or name.name in ("tokenizer.json", "config.json"):
            if not (other / name).is_file() or path.read_bytes() != (other / name).read_bytes():
                wrong.append(str(name))
        elif not (other / name).is_file():
            wrong.append(f"{name} is missing")
    left = {path.name for path in other.rglob("*") if path.name.endswith((".tmp", ".old")) or path.name == "unfinished"}
    return wrong + sorted(left)


def _timeless(run: Path, summary: Path) -> dict:
    """A summary without its times; paths in it (a sweep's) are taken from the run's folder on."""

    def strip(value):
        if isinstance(value, dict):
            return {
                name: strip(item)
                for name, item in value.items()
                if "second" not in name and name != "throughput" and not name.startswith("resumed")
            }
        return value

    return strip(json.loads((run / summary).read_text().replace(str(run), "")))


# --- the server ------------------------------------------------------------------------------------------------------


def serve() -> None:
    sys.path.insert(0, str(ROOT / "recipes"))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    import command_line  # noqa: F401

    import resdpo_trl.image.pipeline
    import resdpo_trl.text.pipeline  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        counted, count = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(counted)
            _recipe(request, count)
        os.close(count)
        if request.get("kill_after") is not None:
            time.sleep(request["kill_after"])
            process = psutil.Process(child)  # it is there until it is waited for
            for each in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(request.get("signal", signal.SIGKILL))
        with os.fdopen(counted) as file:
            operations = file.read().splitlines()
        _, status = os.waitpid(child, 0)
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            "seconds": time.perf_counter() - started,
            "operations": operations,
        }
        print(json.dumps(answer), file=answers, flush=True)


def _recipe(request: dict, operations: int) -> None:
    """Run a recipe in this process, a fork, and leave by `os._exit`; each file operation is a line in `operations`."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.argv = [str(ROOT / "recipes" / request["recipe"]), *request["arguments"]]
    folder = sys.argv[sys.argv.index("--output_dir") + 1]
    done = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal done
        if event in OPERATIONS and str(arguments[0]).startswith(folder):
            if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                return
            line = f"{event} {os.path.relpath(arguments[0], folder)}"
            if done == request.get("kill_at") or line == request.get("kill_before"):
                os.kill(os.getpid(), request.get("signal", signal.SIGKILL))
            done += 1
            os.write(operations, f"{line}\n".encode())

    sys.addaudithook(watch)
    status = 1
    try:
        if "environment" in request:
            os.environ |= request["environment"]
            run_as_on_gpus()
        if "longest_file" in request:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails with EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["longest_file"],) * 2)
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()

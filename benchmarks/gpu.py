"""Everything that a GPU decides, in one table: parity, speed against TRL, attention, compilation, QLoRA, images.

    python benchmarks/gpu.py [--output gpu.md] [--rows REGULAR_EXPRESSION] [--minutes 25] [--pairs PAIRS.jsonl.gz]
        [--images CIFAR-10_FOLDER] [--tokenizer FOLDER] [--device cpu] [--tiny]

`make bench-gpu` runs it: 25 minutes at most on one H100, without the Hub. Models have random weights in the shapes of
GPT-2, GPT-2 Medium and Llama 3.2 1B, and the tokenizer of SmolLM2 or of --tokenizer. Pairs are the quickstart's,
several dialogues joined so that rows come near the cap, or a file of dialogues by --pairs. Images are scikit-learn's
digits, or CIFAR-10 by --images.

Each row runs in a process of its own. A row that fails, or has no time left, says so in the table, and the next one
runs. The table is written anew after each row. What the columns mean is in benchmarks/dpo_throughput.py; `GEMM` is the
share of the speed of matrix products of the model's own shapes, measured in the same process.

TRL's best settings in TRL 1.16 are bfloat16, fused AdamW and a reference computed beforehand: its `padding_free` has no
effect in this release. A row with Liger kernels is added where that package is installed.

--tiny shrinks every model, cap and batch, to run the command itself in miniature: its figures mean nothing. The rows of
FlexAttention are left out on the CPU, where it has no backward pass.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import dpo_throughput
import torch

HERE = Path(__file__).parent
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("gpt2", {"vocab_size": 50257}),
    "GPT-2 Medium": ("gpt2", {"vocab_size": 50257, "n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "Llama 1B": (
        "llama",
        {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
        },
    ),
}  # fmt: skip
TINY = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "llama": {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16,
    },
}  # fmt: skip
BATCHES = {"GPT-2": {256: 64, 1024: 16}, "GPT-2 Medium": {256: 64, 1024: 16}, "Llama 1B": {256: 32, 1024: 8}}
ENGINES = {  # name -> (engine of dpo_throughput.py, flags)
    "ours": ("ours", []),
    "ours, Flex": ("ours", ["--attn_implementation", "flex_attention"]),
    "ours, compiled": ("ours", ["--torch_compile"]),
    "ours, reference at every step": ("ours", ["--reference_in_memory"]),
    "TRL": ("trl_precomputed", []),
    "TRL, compiled": ("trl_precomputed", ["--torch_compile"]),
    "TRL, Liger": ("trl_precomputed", ["--use_liger_kernel"]),
}
IMAGES = {"quickstart": [], "fast": [], "resnet18": ["--num_train_epochs", "4"]}


@dataclass
class Row:
    """A line of the table: `read` turns the JSON that the command printed after RESULT into the columns."""

    name: str
    command: list[Any]
    read: Callable[[dict[str, Any]], dict[str, str]]
    found: dict[str, str] = field(default_factory=dict)
    state: str = "not run"


def rows(options: argparse.Namespace, scratch: Path) -> list[Row]:
    """Every row, the ones that decide something first."""
    script = [sys.executable, __file__, "--device", options.device, *(["--tiny"] if options.tiny else [])]
    made = [
        Row(
            f"parity, {kind}, {dtype}",
            [*script, "--worker", "parity", "--shape", kind, "--dtype", dtype],
            parity_columns,
        )
        for kind in ("gpt2", "llama")
        for dtype in ("float32", "bfloat16")
    ]
    every, few = list(ENGINES), ["ours", "ours, Flex", "TRL"]
    own: dict[str, list[dict[str, Any]]] = {}
    for shape, cap, names in (
        ("GPT-2 Medium", 256, every), ("GPT-2 Medium", 1024, few), ("Llama 1B", 256, few), ("Llama 1B", 1024, few),
        ("GPT-2", 256, few), ("GPT-2", 1024, few),
    ):  # fmt: skip
        for name in names:
            if "Liger" in name and not importlib.util.find_spec("liger_kernel"):
                continue
            if "Flex" in name and options.device == "cpu":  # FlexAttention has no backward pass there
                continue
            made.append(text_row(options, scratch, shape, cap, name, own))
    for name, flags in (("QLoRA", ["--load_in_4bit"]), ("8-bit AdamW", ["--optim", "adamw_bnb_8bit"])):
        made.append(text_row(options, scratch, "Llama 1B", 256, f"ours, {name}", own, flags))
    for preset, flags in IMAGES.items():
        if preset == ("quickstart" if options.images else "fast"):  # the one is for the digits, the other for CIFAR-10
            continue
        command = [*script, "--worker", "images", "--preset", preset]
        if options.images:
            command += ["--images", options.images]
        made.append(Row(f"images, {preset}", [*command, "--flags", *flags], image_columns))
    return [row for row in made if re.search(options.rows, row.name)]


def text_row(
    options: argparse.Namespace,
    scratch: Path,
    shape: str,
    cap: int,
    name: str,
    own: dict[str, list[dict[str, Any]]],
    more: list[str] | None = None,
) -> Row:
    engine, flags = ENGINES.get(name, ("ours", more or []))
    batch, steps = (2, 2) if options.tiny else (BATCHES[shape][cap], 10)
    length = 64 if options.tiny else cap
    given = {"max_length": length, "batch": batch, "dtype": "bfloat16", "steps": steps}
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    place = scratch / shape.replace(" ", "_")
    command = [
        sys.executable, HERE / "dpo_throughput.py", "--worker", engine, "--model", place,
        "--dataset_name", scratch / f"pairs_{cap}.jsonl", *words, *flags,
    ]  # fmt: skip

    def columns(result: dict[str, Any]) -> dict[str, str]:
        key = f"{shape} {cap}"
        if name == "ours":
            own[key] = [result]
        told = argparse.Namespace(**given, torch_compile="--torch_compile" in flags)
        row = dpo_throughput.row_of(engine, [result], told, own.get(key))
        found = {
            "pairs/s (the step)": f"{row['pairs_per_second']:.1f} ({row['step_pairs_per_second']:.1f})",
            "peak memory": f"{row['peak_memory_bytes'] / 1e9:.1f} GB",
        }
        if "gemm_share" in row:
            found["GEMM"] = f"{row['gemm_share']:.0%} of {row['gemm_gflops'] / 1000:.3g} TFLOP/s"
        if "ours_is_faster" in row:
            found["note"] = f"ours is {row['ours_is_faster']:.2f}× as fast"
        elif engine == "ours":
            found["note"] = f"padding {row['padding']:.1%}, first pass {row['first_pass_seconds']:.1f} s"
        return found

    return Row(f"{shape}, cap {cap}, batch {batch}: {name}", command, columns)


def parity_columns(result: dict[str, Any]) -> dict[str, str]:
    return {
        "note": f"largest difference {result['logps']:.2g} nats a response of {result['nats']:.0f}, gradient "
        f"{result['gradient']:.2g} of its norm"
    }


def image_columns(result: dict[str, Any]) -> dict[str, str]:
    reached = "reached" if result["accuracy"] >= 0.9 else "missed"
    return {"note": f"test accuracy {result['accuracy']:.3f} (90% {reached}) in {result['seconds']:.0f} s"}


def parity(options: argparse.Namespace) -> dict[str, float]:
    """One DPO step of a small model on the device in `--dtype` against the CPU in float32."""
    from resdpo_trl.text.model import with_faster_parts
    from resdpo_trl.text.scoring import add_response_head, pair_logps
    from resdpo_trl.text.tokens import PairCollator

    generator = torch.Generator().manual_seed(0)
    lengths = (3, 2, 4) if options.tiny else (100, 60, 90)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [
        {
            name: torch.randint(300, (length + row,), generator=generator).tolist()
            for name, length in zip(names, lengths, strict=True)
        }
        for row in range(8)
    ]
    found = []
    for device, dtype in (("cpu", "float32"), (options.device, options.dtype)):
        torch.manual_seed(0)
        model = with_faster_parts(new_model(options.shape, TINY[options.shape] | {"vocab_size": 512})).to(device)
        add_response_head(model)
        batch = {name: value.to(device) for name, value in PairCollator(0)(pairs).items()}
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            chosen, rejected = pair_logps(model, batch)
        (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()).backward()
        gradient = torch.cat([each.grad.flatten().double().cpu() for each in model.parameters()])
        found.append((torch.cat([chosen, rejected]).detach().double().cpu(), gradient))
    (exact, exactly), (logps, gradient) = found
    return {
        "logps": (logps - exact).abs().max().item(),
        "nats": exact.abs().mean().item(),
        "gradient": ((gradient - exactly).norm() / exactly.norm()).item(),
    }


def images(options: argparse.Namespace) -> dict[str, float]:
    """A preset's run by the recipe."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            HERE.parent / "recipes" / "dpo_cifar.py",
            "--output_dir",
            f"{folder}/run",
            *options.flags,
        ]
        command += ["--config", HERE.parent / "recipes" / "configs" / "cifar" / f"{options.preset}.yaml"]
        command += ["--dataset_name", options.images or "digits"]
        if not options.images:
            command += ["--flip", "false", "--validation_fraction", "0.1", "--test_fraction", "0.2"]
        started = time.perf_counter()
        subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - started
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    return {"accuracy": summary["dpo"]["test"]["accuracy"], "seconds": seconds}


def new_model(kind: str, changes: dict[str, Any]) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **changes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config)


def prepare(options: argparse.Namespace, scratch: Path, needed: list[Row]) -> None:
    """The models and the pairs that the rows name, in `scratch`."""
    from transformers import AutoTokenizer

    from resdpo_trl.text.model import local_model

    words = {str(word) for row in needed for word in row.command}
    for shape, (kind, changes) in SHAPES.items():
        folder = scratch / shape.replace(" ", "_")
        if str(folder) in words:
            new_model(kind, changes | (TINY[kind] if options.tiny else {})).save_pretrained(folder)
            AutoTokenizer.from_pretrained(local_model(options.tokenizer, "--tokenizer")).save_pretrained(folder)
    for cap in (256, 1024):
        if str(scratch / f"pairs_{cap}.jsonl") in words:
            count = 64 if options.tiny else 1800
            joined = 1 if options.pairs or options.tiny else cap // 64  # the quickstart's rows have about 60 tokens
            pairs = dpo_throughput.read_pairs(options.pairs, count)
            longer = [
                {side: "".join(pairs[(at + back) % len(pairs)]["chosen"] for back in range(1, joined)) + pair[side]
                 for side in ("chosen", "rejected")}
                for at, pair in enumerate(pairs)
            ]  # fmt: skip
            lines = "".join(json.dumps(pair) + "\n" for pair in longer)
            (scratch / f"pairs_{cap}.jsonl").write_text(lines, encoding="utf-8")


def run(row: Row, seconds: float, environment: dict[str, str]) -> None:
    """Run a row's command for so long at most, and note what came of it."""
    try:
        done = subprocess.run(
            [str(word) for word in row.command], capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        row.state = f"failed: took more than {seconds:.0f} s"
        return
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        row.state = f"failed: {(done.stderr.strip().splitlines() or ['no output'])[-1][:200]}"
        print(done.stderr[-3000:], file=sys.stderr)
        return
    row.found, row.state = row.read(json.loads(lines[-1].removeprefix("RESULT "))), "ran"


def table(made: list[Row], machine: str) -> str:
    columns = ["pairs/s (the step)", "peak memory", "GEMM", "note"]
    lines = [machine, "", f"| row | {' | '.join(columns)} | |", f"| --- |{' --- |' * (len(columns) + 1)}"]
    for row in made:
        cells = [row.found.get(name, "") for name in columns]
        state = row.state.replace("|", "/")
        lines.append(f"| {row.name} | {' | '.join(cells)} | {state} |")
    failed = [row.name for row in made if row.state.startswith("failed")]
    lines += ["", f"{len(failed)} of {len(made)} rows failed" + (f": {'; '.join(failed)}." if failed else ".")]
    return "\n".join(lines) + "\n"


def describe_machine(device: str) -> str:
    from resdpo_trl.run.folder import hardware

    found = hardware()
    name = found["gpus"][0] if device == "cuda" else f"{found['cpu']}, {found['cpu_threads']} threads"
    return f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.md"))
    parser.add_argument("--rows", default="", help="run the rows whose names this finds")
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--pairs")
    parser.add_argument("--images")
    parser.add_argument("--tokenizer", default="smollm2")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    for name in ("worker", "shape", "dtype", "preset"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.worker:
        print("RESULT " + json.dumps({"parity": parity, "images": images}[options.worker](options)))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here: pass --device cpu --tiny to run the command in miniature")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        made = rows(options, Path(folder))
        if not made:
            sys.exit(f"--rows {options.rows}: finds none")
        prepare(options, Path(folder), made)
        for row in made:
            left = end - time.monotonic()
            if left < 5:
                row.state = f"failed: the {options.minutes:g} minutes were over"
            else:
                run(row, left if options.device == "cpu" else min(left, 240), environment)
            print(f"{row.name}: {row.state} {row.found.get('note', '')}", flush=True)
            options.output.write_text(table(made, describe_machine(options.device)), encoding="utf-8")
    print(f"wrote {options.output}")
    return int(any(row.state.startswith("failed") for row in made))


if __name__ == "__main__":
    sys.exit(main())

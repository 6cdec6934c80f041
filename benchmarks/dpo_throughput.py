"""Pairs per second of a DPO step: ours against TRL's trainer and the usual hand-written loop, model and data the same.

    python benchmarks/dpo_throughput.py [--model NAME] [--dataset_name PAIRS.jsonl.gz] [--max_length 128] [--batch 16]
        [--dtype float32|bfloat16] [--steps 6] [--rounds 1] [--engines ours trl trl_precomputed plain] [--torch_compile]

One JSON line an engine. Every engine runs in a process of its own, `--rounds` times in turn; a figure is the median
over its steps, the first of each process left out. A step is forward, backward and optimizer. Ours batches pairs of
like length, so its steps differ by design: it runs `--steps` batches spread evenly over the lengths of all pairs
twice, and its figure is the mean of the second time.

`pairs_per_second` counts the reference's pass too: where it is computed beforehand (ours, trl_precomputed), its seconds
per pair are added to the step's, as in a run of one epoch; `step_pairs_per_second` is the step alone. TRL drops pairs
that its cap leaves without a response and the hand-written loop pads every text to the cap; ours computes every pair,
with nothing lost. `gemm_share` is what must be computed (each distinct token once forward and backward, the LM head at
response tokens, the reference's forward pass once) over the speed of matrix products of the model's own shapes,
measured in the same process.

--torch_compile compiles the model of ours and of TRL's; `first_pass_seconds` is ours over its batches for the first
time, compilation included, to hold against `--steps` × `--batch` / `step_pairs_per_second`.

Without --model SmolLM2-135M-Instruct, without --dataset_name the quickstart's pairs, as plain text for every engine.
"""

import argparse
import gzip
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from transformers import Trainer, TrainerCallback

ENGINES = ("ours", "trl", "trl_precomputed", "plain")


def read_pairs(name: str | None, count: int) -> list[dict[str, str]]:
    """The first `count` pairs as whole dialogues."""
    if name is None:
        from resdpo_trl.text.data import chitchat_pairs

        rows = chitchat_pairs()["train"].select(range(count))
        return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    with gzip.open(name, "rt") if name.endswith(".gz") else open(name, encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


class StepClock(TrainerCallback):
    """The seconds of a Trainer's steps."""

    def __init__(self, trainer: Trainer):
        self.seconds: list[float] = []
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(options: argparse.Namespace, scratch: str) -> dict:
    from transformers import AutoTokenizer
    from trl import get_peft_config

    from resdpo_trl.text.config import TextDPOConfig, TextModelConfig
    from resdpo_trl.text.data import TextDataConfig, load_preferences
    from resdpo_trl.text.model import load_model
    from resdpo_trl.text.tokens import tokenize
    from resdpo_trl.text.trainer import TextDPOTrainer

    path = Path(scratch) / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in read_pairs(options.dataset_name, 1800)))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = load_preferences(TextDataConfig(dataset_name=str(path), max_eval_samples=8))
    pairs = evenly_spread(tokenize(texts["train"], tokenizer, options.max_length), options.batch, options.steps)
    choice = TextModelConfig(
        attn_implementation=options.attn_implementation,
        load_in_4bit=options.load_in_4bit,
        use_peft=options.load_in_4bit,
    )
    model = load_model(options.model, choice, False, "--model")
    useful = useful_flops(model, pairs)
    trainer = TextDPOTrainer(
        model=model,
        args=TextDPOConfig(
            output_dir=scratch, max_length=options.max_length, per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch, num_train_epochs=2, bf16=options.dtype == "bfloat16",
            learning_rate=1e-6, eval_strategy="no", save_strategy="no", select="last",
            reference_cache_dir="none", disable_tqdm=True, logging_steps=options.steps,
            torch_compile=options.torch_compile, precompute_ref_log_probs=not options.reference_in_memory,
            optim=options.optim,
        ),
        train_dataset=pairs,
        eval_dataset=None,
        processing_class=tokenizer,
        peft_config=get_peft_config(choice),
    )  # fmt: skip
    clock = StepClock(trainer)
    trainer.train()
    return {
        # the mean over one epoch; the first epoch, like the first step of the others, is left out
        "seconds": [0.0, sum(clock.seconds[options.steps :]) / options.steps],
        "first_pass_seconds": sum(clock.seconds[: options.steps]),
        "reference_seconds_per_pair": trainer.reference_seconds / len(pairs),
        "flops_per_pair": useful / len(pairs),
        "unique_tokens_per_pair": sum(pairs["length"][:]) / len(pairs),
        "padding": next(entry["padding"] for entry in trainer.state.log_history if "padding" in entry),
        "gemm_flops": gemm_flops(model, options),
    }


def evenly_spread(pairs, batch: int, steps: int):
    """`steps` batches of like length out of all pairs, at evenly spaced lengths."""
    order = sorted(range(len(pairs)), key=pairs["length"][:].__getitem__)
    batches = [order[at : at + batch] for at in range(0, len(order) - batch + 1, batch)]
    chosen = [batches[(2 * step + 1) * len(batches) // (2 * steps)] for step in range(steps)]
    return pairs.select([row for rows in chosen for row in rows])


def useful_flops(model: torch.nn.Module, pairs: list[dict]) -> float:
    """What an epoch over the pairs can't do without: 3 forward passes' worth for the policy, 1 for the reference."""
    body, head = matrices(model)
    config = model.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)  # of all queries of a token
    total = 0.0
    for row in pairs:
        prompt, chosen, rejected = (len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
        tokens = prompt + chosen + rejected
        # causal pairs of query and key: the prompt once, each response on the prompt and itself
        seen = prompt**2 / 2 + sum(prompt * part + part**2 / 2 for part in (chosen, rejected))
        forward = 2 * body * tokens + 4 * layers * width * seen + 2 * head * (chosen + rejected)
        total += 4 * forward
    return total


def shapes_of(model: torch.nn.Module, part: str = "") -> list[tuple[int, int]]:
    """(inputs, outputs) of the layers' matrices whose names have `part`; of the base's where there is an adapter."""
    from transformers.pytorch_utils import Conv1D

    return [
        (module.in_features, module.out_features) if isinstance(module, torch.nn.Linear) else (module.nx, module.nf)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and part in name and not re.search("lm_head|lora_", name)
    ]


def matrices(model: torch.nn.Module) -> tuple[int, int]:
    """Weights of the layers' matrices, and of the LM head."""
    return sum(i * o for i, o in shapes_of(model)), model.get_output_embeddings().weight.numel()


def gemm_flops(model: torch.nn.Module, options: argparse.Namespace) -> float:
    """Operations per second of the products of one layer, with as many rows as a batch has tokens."""
    device, dtype, shapes = model.device, getattr(torch, options.dtype), shapes_of(model, ".0.")
    rows = options.batch * options.max_length
    best = float("inf")
    operands = [
        (torch.randn(rows, i, dtype=dtype, device=device), torch.randn(i, o, dtype=dtype, device=device))
        for i, o in shapes
    ]
    for _ in range(8):
        synchronize()
        started = time.perf_counter()
        for a, b in operands:
            a @ b
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * rows * sum(i * o for i, o in shapes) / best


def trl(options: argparse.Namespace, scratch: str, precompute: bool = False) -> dict:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Timed(DPOTrainer):
        reference_seconds, reference_pairs = 0.0, 1

        def _precompute_ref_logps(self, dataset, *args, **kwargs):
            started = time.perf_counter()
            done = super()._precompute_ref_logps(dataset, *args, **kwargs)
            self.reference_seconds, self.reference_pairs = time.perf_counter() - started, len(dataset)
            return done

    # more than the steps need: at a short cap the trainer drops over a third of the pairs
    rows = Dataset.from_list(read_pairs(options.dataset_name, 3 * options.batch * options.steps))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(options.model),
        args=DPOConfig(
            output_dir=scratch, max_length=options.max_length, per_device_train_batch_size=options.batch,
            max_steps=options.steps, precompute_ref_log_probs=precompute, bf16=options.dtype == "bfloat16",
            learning_rate=1e-6, report_to="none", save_strategy="no", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available(),
            torch_compile=options.torch_compile, use_liger_kernel=options.use_liger_kernel,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    clock = StepClock(trainer)
    trainer.train()
    spread = trainer.reference_seconds / trainer.reference_pairs if precompute else 0.0
    return {"seconds": clock.seconds, "reference_seconds_per_pair": spread}


def trl_precomputed(options: argparse.Namespace, scratch: str) -> dict:
    return trl(options, scratch, precompute=True)


def plain(options: argparse.Namespace, scratch: str) -> dict:
    """Every text padded to the cap, full logits, both networks at every step."""
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy = AutoModelForCausalLM.from_pretrained(options.model).to(device).train()
    reference = AutoModelForCausalLM.from_pretrained(options.model).to(device).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    rows = read_pairs(options.dataset_name, options.batch * options.steps)

    def logps(model, batch):
        found = model(**batch).logits.log_softmax(-1)[:, :-1].gather(2, batch["input_ids"][:, 1:, None]).squeeze(-1)
        return (found * batch["attention_mask"][:, 1:]).sum(-1)

    seconds = []
    for step in range(options.steps):
        part = rows[step * options.batch : (step + 1) * options.batch]
        texts = [row["chosen"] for row in part] + [row["rejected"] for row in part]
        synchronize()
        started = time.perf_counter()
        batch = tokenizer(
            texts, padding="max_length", truncation=True, max_length=options.max_length, return_tensors="pt"
        ).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            with torch.no_grad():
                ref = logps(reference, batch)
            ratios = logps(policy, batch) - ref
        loss = -F.logsigmoid(0.1 * (ratios[: len(part)] - ratios[len(part) :])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "reference_seconds_per_pair": 0.0}


def worker(options: argparse.Namespace) -> None:
    """One engine in this process; its figures as one JSON line."""
    from resdpo_trl.run.folder import hardware, use_the_cores

    use_the_cores()
    with tempfile.TemporaryDirectory() as scratch:
        found = globals()[options.worker](options, scratch)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_resident_bytes()
    print("RESULT " + json.dumps(found | {"peak_memory_bytes": peak, "hardware": hardware()}))


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dataset_name")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    # of benchmarks/gpu.py
    parser.add_argument("--attn_implementation", help=argparse.SUPPRESS)
    parser.add_argument("--optim", default="adamw_torch_fused", help=argparse.SUPPRESS)
    for name in ("load_in_4bit", "reference_in_memory", "use_liger_kernel"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    from resdpo_trl.text.model import local_model
    from resdpo_trl.training.arguments import has_bfloat16

    options.dtype = options.dtype or ("bfloat16" if has_bfloat16() else "float32")
    options.model = local_model(options.model, "--model")
    results: dict[str, list[dict]] = {engine: [] for engine in options.engines}
    for turn in range(options.rounds):
        for engine in options.engines:
            flags = [
                "--model", options.model, "--max_length", options.max_length, "--batch", options.batch,
                "--dtype", options.dtype, "--steps", options.steps, "--worker", engine,
            ]  # fmt: skip
            flags += ["--dataset_name", options.dataset_name] if options.dataset_name else []
            flags += ["--torch_compile"] if options.torch_compile else []
            done = subprocess.run([sys.executable, __file__, *map(str, flags)], capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                sys.exit(f"{engine} failed:\n{done.stderr[-3000:]}")
            results[engine].append(json.loads(lines[-1].removeprefix("RESULT ")))
            if turn == options.rounds - 1:
                print(json.dumps(row_of(engine, results[engine], options, results.get("ours"))), flush=True)


def row_of(engine: str, runs: list[dict], options: argparse.Namespace, own: list[dict] | None) -> dict:
    def per_pair(found: list[dict]) -> tuple[float, float]:
        step = statistics.median(second for run in found for second in run["seconds"][1:]) / options.batch
        return step, statistics.median(run["reference_seconds_per_pair"] for run in found)

    step, reference = per_pair(runs)
    machine = runs[0]["hardware"]
    row = {
        "benchmark": "dpo_throughput",
        "engine": engine,
        "max_length": options.max_length,
        "batch": options.batch,
        "dtype": options.dtype,
        "torch_compile": options.torch_compile,
        "pairs_per_second": round(1 / (step + reference), 4),
        "step_pairs_per_second": round(1 / step, 4),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "steps": options.steps * len(runs) if engine == "ours" else sum(len(run["seconds"]) - 1 for run in runs),
        "device": machine["gpus"][0] if machine["gpus"] else f"{machine['cpu']}, {machine['cpu_threads']} threads",
    }
    if engine == "ours":
        row["padding"] = round(runs[0]["padding"], 4)
        row["first_pass_seconds"] = round(statistics.median(run["first_pass_seconds"] for run in runs), 1)
        row["unique_tokens_per_second"] = round(runs[0]["unique_tokens_per_pair"] / (step + reference), 1)
        row["gemm_gflops"] = round(statistics.median(run["gemm_flops"] for run in runs) / 1e9, 1)
        row["gemm_share"] = round(runs[0]["flops_per_pair"] / (step + reference) / row["gemm_gflops"] / 1e9, 3)
    elif own:
        row["ours_is_faster"] = round((step + reference) / sum(per_pair(own)), 2)
    return row


if __name__ == "__main__":
    main()

"""Pairs per second of reading, parsing, splitting, tokenizing and capping, ours against TRL's own preparation.

    python benchmarks/data_preparation.py [--dataset_name PAIRS.jsonl.gz] [--tokenizer FOLDER] [--pairs 160800]

One JSON line a row, each engine in a process of its own, from a cold cache. The pairs of the file are repeated with
distinct prompts until there are --pairs of them (160,800 is all of Anthropic HH); without a file the quickstart's
pairs are used, without a tokenizer SmolLM2's. Both engines read the dialogues as plain text. TRL drops pairs that its
cap leaves without a response; `pairs_kept` says how many each engine gives to the trainer.
"""

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def repeated_pairs(source: str | None, count: int, path: Path) -> None:
    """`count` pairs in HH's form at `path`, their first turns numbered apart."""
    if source is None:
        from resdpo_trl.text.data import chitchat_pairs

        rows = [
            {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in chitchat_pairs()["train"]
        ]
    else:
        opened = gzip.open if source.endswith(".gz") else open
        with opened(source, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            row, copy = rows[number % len(rows)], number // len(rows)
            numbered = {side: row[side].replace("\n\nHuman:", f"\n\nHuman: {copy}", 1) for side in row}
            file.write(json.dumps(numbered) + "\n")


def ours(path: str, tokenizer_folder: str, max_length: int) -> int:
    from transformers import AutoTokenizer

    from resdpo_trl.text.data import TextDataConfig, load_preferences
    from resdpo_trl.text.tokens import tokenize

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    pairs = load_preferences(TextDataConfig(dataset_name=path))
    return sum(len(tokenize(rows, tokenizer, max_length)) for rows in pairs.splits.values())


def trl(path: str, tokenizer_folder: str, max_length: int) -> int:
    from datasets import load_dataset
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    # the trainer prepares its data in its constructor; a model of one tiny layer costs nothing beside it
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1))
    with tempfile.TemporaryDirectory() as scratch:
        args = DPOConfig(scratch, max_length=max_length, bf16=False, use_cpu=True, report_to="none")
        rows = load_dataset("json", data_files=path, split="train")
        trainer = DPOTrainer(model, model_copy(model), args, train_dataset=rows, processing_class=tokenizer)
        return len(trainer.train_dataset)


def model_copy(model):  # type: ignore[no-untyped-def]
    import copy

    return copy.deepcopy(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", help="pairs in HH's form, .jsonl or .jsonl.gz")
    parser.add_argument("--tokenizer", default="smollm2", help="folder of a tokenizer")
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--engines", nargs="+", choices=["ours", "trl"], default=["ours", "trl"])
    parser.add_argument("--engine", choices=["ours", "trl"], help=argparse.SUPPRESS)  # the child's own call
    args = parser.parse_args()

    if args.engine:
        import datasets
        import transformers
        from trl import DPOTrainer  # noqa: F401  (importing is not preparing)

        datasets.disable_progress_bars()
        transformers.AutoTokenizer.from_pretrained(args.tokenizer)
        started = time.perf_counter()
        kept = {"ours": ours, "trl": trl}[args.engine](args.dataset_name, args.tokenizer, args.max_length)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row = {
            "benchmark": "data_preparation", "engine": args.engine, "pairs": args.pairs, "pairs_kept": kept,
            "max_length": args.max_length, "seconds": seconds, "pairs_per_second": args.pairs / seconds,
            "peak_memory_bytes": peak,
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        return

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "pairs.jsonl"
        repeated_pairs(args.dataset_name, args.pairs, path)
        from resdpo_trl.text.model import local_model

        folder = local_model(args.tokenizer, "--tokenizer")
        for engine in args.engines:
            command = [
                sys.executable, __file__, "--engine", engine, "--dataset_name", str(path), "--tokenizer", folder,
                "--pairs", str(args.pairs), "--max_length", str(args.max_length),
            ]  # fmt: skip
            cold = {
                "HF_DATASETS_CACHE": str(Path(scratch) / f"cache-{engine}"),
                "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            }
            subprocess.run(command, check=True, env=os.environ | cold, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()

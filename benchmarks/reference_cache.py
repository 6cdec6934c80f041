"""Seconds that the reference's log-probabilities take in a first run and in a second one that finds them on disk.

    python benchmarks/reference_cache.py [--model NAME] [--dataset_name PAIRS.jsonl.gz] [--max_length 128]
        [--pairs 64] [--rounds 3]

One JSON line a row. Both runs load the model and digest its weights; the first also runs it over every pair. The rounds
take turns, each from an empty cache. Without --model SmolLM2-135M-Instruct, without --dataset_name the quickstart's
pairs.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from dpo_throughput import read_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from resdpo_trl.run.folder import hardware, use_the_cores
from resdpo_trl.text.config import TextDPOConfig
from resdpo_trl.text.data import TextDataConfig, load_preferences
from resdpo_trl.text.model import local_model
from resdpo_trl.text.tokens import tokenize
from resdpo_trl.text.trainer import TextDPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dataset_name")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    use_the_cores()
    seconds: dict[str, list[float]] = {"first": [], "second": []}
    options.model = local_model(options.model, "--model")
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        path = Path(scratch) / "pairs.jsonl"
        rows = read_pairs(options.dataset_name, 2 * options.pairs)  # some go to the splits that are held out
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts = load_preferences(TextDataConfig(dataset_name=str(path), max_train_samples=options.pairs))
        pairs = tokenize(texts["train"], tokenizer, options.max_length)
        for number in range(options.rounds):
            for run in seconds:
                trainer = TextDPOTrainer(
                    model=AutoModelForCausalLM.from_pretrained(options.model),
                    args=TextDPOConfig(
                        output_dir=f"{scratch}/run",
                        max_length=options.max_length,
                        reference_cache_dir=f"{scratch}/cache{number}",
                        eval_strategy="no",
                        save_strategy="no",
                        select="last",
                        disable_tqdm=True,
                    ),
                    train_dataset=pairs,
                    eval_dataset=None,
                    processing_class=tokenizer,
                )
                assert trainer.reference_pairs_read == (len(pairs) if run == "second" else 0)
                seconds[run].append(trainer.reference_seconds)
    machine = hardware()
    for run, values in seconds.items():
        row = {
            "benchmark": "reference_cache", "run": run, "pairs": len(pairs), "max_length": options.max_length,
            "seconds": [round(value, 3) for value in values],
            "device": machine["gpus"][0] if machine["gpus"] else f"{machine['cpu']}, {machine['cpu_threads']} threads",
        }  # fmt: skip
        if run == "second":
            row["share_of_first"] = round(statistics.median(values) / statistics.median(seconds["first"]), 4)
        print(json.dumps(row))


if __name__ == "__main__":
    main()

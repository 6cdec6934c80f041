"""Seconds a pair of evaluate_hh.py's scoring against the reference pass of training, on the same pairs.

    python benchmarks/evaluation.py [--model FOLDER] [--dataset_name PAIRS.jsonl.gz] [--max_length 128] [--pairs 500]
        [--rounds 3]

One JSON line a row. Both load nothing inside the time that is taken, and take turns. `ratio` compares medians with the
reference pass. --model is a folder, a Hub id, or by default SmolLM2-135M-Instruct. --dataset_name is by default the
quickstart's pairs.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np

from resdpo_trl.run.folder import hardware, use_the_cores
from resdpo_trl.sources import SMOLLM2
from resdpo_trl.text.config import TextDPOConfig, TextModelConfig
from resdpo_trl.text.data import TextDataConfig, load_preferences
from resdpo_trl.text.evaluate import EvaluateConfig, score_pairs
from resdpo_trl.text.model import load_model, load_tokenizer
from resdpo_trl.text.tokens import tokenize
from resdpo_trl.text.trainer import TextDPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--dataset_name", default=TextDataConfig.dataset_name)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    use_the_cores()
    tokenizer = load_tokenizer(options.model, TextModelConfig(), False, "--model")
    model = load_model(options.model, TextModelConfig(), False, "--model")
    data = TextDataConfig(dataset_name=options.dataset_name, max_train_samples=options.pairs)
    texts = load_preferences(data, tokenizer)
    pairs = tokenize(texts["train"], tokenizer, options.max_length, ends_turns=texts.ends_turns)
    config = EvaluateConfig(model="m", reference="r", max_length=options.max_length)
    seconds: dict[str, list[float]] = {"reference pass of training": [], "evaluation": []}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(options.rounds):
            trainer = TextDPOTrainer(
                model=model,
                args=TextDPOConfig(
                    output_dir=scratch,
                    max_length=options.max_length,
                    reference_cache_dir="none",
                    eval_strategy="no",
                    save_strategy="no",
                    load_best_model_at_end=False,
                    bf16=config.bf16,
                    disable_tqdm=True,
                ),
                train_dataset=pairs,
                eval_dataset=None,
                processing_class=tokenizer,
            )
            seconds["reference pass of training"].append(trainer.reference_seconds)
            started = time.perf_counter()
            scores = score_pairs(model, pairs, tokenizer, config.batch_size, "Scoring", bf16=config.bf16)
            seconds["evaluation"].append(time.perf_counter() - started)
    reference = trainer.train_dataset["ref_chosen_logps"][:]
    difference = float(np.abs(np.asarray(scores.chosen) - np.asarray(reference)).max())
    machine = hardware()
    base = statistics.median(seconds["reference pass of training"])
    for way, found in seconds.items():
        print(
            json.dumps(
                {
                    "benchmark": "evaluation",
                    "way": way,
                    "pairs": len(pairs),
                    "seconds": [round(value, 3) for value in found],
                    "milliseconds_per_pair": round(1000 * statistics.median(found) / len(pairs), 2),
                    "ratio": round(statistics.median(found) / base, 3),
                    "largest_difference_nats": round(difference, 6),
                    "device": machine["gpus"][0]
                    if machine["gpus"]
                    else f"{machine['cpu']}, {machine['cpu_threads']} threads",
                }
            )
        )


if __name__ == "__main__":
    main()

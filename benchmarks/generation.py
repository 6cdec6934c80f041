"""Answers in batches against one prompt at a time, and batches of like length against batches as they come.

    python benchmarks/generation.py [--model FOLDER] [--prompts 32] [--max_new_tokens 64] [--rounds 3]

One JSON line a row. The ways take turns, greedy, on held-out prompts of the quickstart. --model is a folder, a Hub id,
or by default SmolLM2-135M-Instruct. `speedup` compares medians with one prompt at a time. `same_answers` counts the
answers that are the same as its own: rounding differs with the batch, and with it now and then the likeliest token.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from resdpo_trl.run.folder import hardware, use_the_cores
from resdpo_trl.sources import SMOLLM2
from resdpo_trl.text.config import TextModelConfig
from resdpo_trl.text.data import chitchat_pairs
from resdpo_trl.text.generate import answer, prompt_ids
from resdpo_trl.text.model import load_model, load_tokenizer

SMALL_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    use_the_cores()
    texts = list(dict.fromkeys(chitchat_pairs()["test"]["prompt"]))[: options.prompts]
    tokenizer = load_tokenizer(options.model, TextModelConfig(), False, "--model")
    model = load_model(options.model, TextModelConfig(), False, "--model")
    prompts, _ = prompt_ids(texts, tokenizer, 256 - options.max_new_tokens)
    new = options.max_new_tokens
    small = [prompts[start : start + SMALL_BATCH] for start in range(0, len(prompts), SMALL_BATCH)]
    ways = {
        "one at a time": lambda: [answer(model, tokenizer, [prompt], new)[0] for prompt in prompts],
        f"batch of {len(prompts)}": lambda: answer(model, tokenizer, prompts, new, batch_size=len(prompts)),
        f"batches of {SMALL_BATCH}, as they come": lambda: [
            one for batch in small for one in answer(model, tokenizer, batch, new)
        ],
        f"batches of {SMALL_BATCH}, by length": lambda: answer(model, tokenizer, prompts, new, batch_size=SMALL_BATCH),
    }
    answer(model, tokenizer, prompts[:2], 4)  # the first call is slower
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    answers = {}
    for _ in range(options.rounds):
        for way, run in ways.items():
            started = time.perf_counter()
            answers[way] = run()
            seconds[way].append(time.perf_counter() - started)
    machine = hardware()
    alone = statistics.median(seconds["one at a time"])
    for way, found in seconds.items():
        median = statistics.median(found)
        same = sum(one == other for one, other in zip(answers[way], answers["one at a time"], strict=True))
        print(
            json.dumps(
                {
                    "benchmark": "generation",
                    "way": way,
                    "prompts": len(prompts),
                    "tokens": sum(map(len, answers[way])),
                    "seconds": [round(value, 3) for value in found],
                    "tokens_per_second": round(sum(map(len, answers[way])) / median, 1),
                    "speedup": round(alone / median, 2),
                    "same_answers": same,
                    "device": machine["gpus"][0]
                    if machine["gpus"]
                    else f"{machine['cpu']}, {machine['cpu_threads']} threads",
                }
            )
        )


if __name__ == "__main__":
    main()

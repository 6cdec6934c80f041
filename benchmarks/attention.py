"""Attention on the CPU: the project's matrix products against PyTorch's SDPA.

    python benchmarks/attention.py [--rounds 5]

One JSON line a row: forward and backward pass of one layer, a causal boolean mask, the two in turn, medians.
`speedup` compares them. Shapes: (rows, query heads, key heads, tokens, width of a head).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from resdpo_trl.run.folder import hardware, use_the_cores
from resdpo_trl.text.attention import attention

SHAPES = {
    "SmolLM2-135M, cap 128": (16, 9, 3, 130, 64),
    "GPT-2, cap 128": (16, 12, 12, 170, 64),
    "GPT-2, cap 256": (8, 12, 12, 300, 64),
}


def seconds(
    attention: Callable, qkv: torch.Tensor, heads: tuple[int, ...], mask: torch.Tensor, module: torch.nn.Module
) -> float:
    """Of one pass forward and back from (B, T, H·D) queries, keys and values side by side; `heads` of each."""
    qkv.grad = None
    started = time.perf_counter()
    width = qkv.shape[2] // sum(heads)
    parts = qkv.split([count * width for count in heads], dim=2)
    query, key, value = (part.unflatten(2, (-1, width)).transpose(1, 2) for part in parts)
    attention(module, query, key, value, mask)[0].sum().backward()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    use_the_cores()
    module = torch.nn.Module()
    engines = {"sdpa": sdpa_attention_forward, "ours": attention}
    for name, (rows, query_heads, key_heads, tokens, width) in SHAPES.items():
        heads = (query_heads, key_heads, key_heads)
        module.num_key_value_groups = query_heads // key_heads
        for dtype in (torch.bfloat16, torch.float32):
            qkv = torch.randn(rows, tokens, sum(heads) * width, dtype=dtype, requires_grad=True)
            mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(rows, 1, tokens, tokens)
            found: dict[str, list[float]] = {engine: [] for engine in engines}
            for turn in range(options.rounds + 1):
                for engine, function in engines.items():
                    took = seconds(function, qkv, heads, mask, module)
                    if turn:  # the first pass is slower
                        found[engine].append(took)
            medians = {engine: statistics.median(times) for engine, times in found.items()}
            row = {"benchmark": "attention", "shape": name, "dtype": str(dtype).removeprefix("torch.")}
            row |= {f"{engine}_milliseconds": round(1000 * median, 2) for engine, median in medians.items()}
            print(json.dumps(row | {"speedup": round(medians["sdpa"] / medians["ours"], 2), "rounds": options.rounds}))
    print(json.dumps({"machine": hardware()}))


if __name__ == "__main__":
    main()

"""Peak memory of a DPO step on the CPU: computed from a model's shapes, and measured.

    python benchmarks/memory.py                                # the tables of docs/your_model.md
    python benchmarks/memory.py --check tiny small SmolLM2-135M     # computed and measured, one JSON line each

N parameters, M of them in the matrices of L layers, T trained; hidden size h, width of the queries q and of the keys k,
inner size m, H heads, vocabulary V; B rows of R tokens, c response tokens of a batch, at most 4,096 at a time. A row
[prompt | chosen | rejected] has R = 1.5 times the cap here: the prompt takes half of the cap, and each response the
other half. In bytes, with weights in float32 (full), bfloat16 (LoRA) or 4 bits with their scales (QLoRA, 0.5625 per
parameter of the layers, the embeddings in bfloat16):

    weights       4·N,  2·N  or  0.5625·M + 2·(N − M)
    moments       8·T         AdamW's two, in float32
    activations   B·R·L·(8·h + 4·q + 4·k + 4·m + 1.5·H·R)
                  in bfloat16: two norms with their results, queries, keys, values, attention's result, gate and up; and
                  three quarters of the attention's square of probabilities (resdpo_trl/text/attention.py, fused.py)
    casts         2·M         bfloat16 copies of float32 weights (full)
    head          2·c·V, and for full 6·h·V: logits, and the gradient of the head's weight with its copy
    gradients     4·T         in float32, when the activations are gone

    peak = weights + moments + max(activations + casts + head, gradients)

Temporary tensors of the backward pass and the allocator come on top. `--check` adds what Python and its libraries take,
measured in the same process before the model is built.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

CHUNK_TOKENS = 4096  # of resdpo_trl.text.scoring
RANK = 16  # TRL's default, on the query and value projections


class Shape(NamedTuple):
    """A Llama-type model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool

    @property
    def keys(self) -> int:
        return self.hidden // self.heads * self.key_heads

    @property
    def matrices(self) -> int:
        return self.layers * self.hidden * (2 * self.hidden + 2 * self.keys + 3 * self.inner)

    @property
    def parameters(self) -> int:
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.matrices + embeddings + (2 * self.layers + 1) * self.hidden

    @property
    def adapter(self) -> int:
        return self.layers * RANK * (3 * self.hidden + self.keys)


SHAPES = {
    "tiny": Shape(64, 192, 2, 4, 2, 512, True),
    "small": Shape(384, 1024, 8, 6, 2, 16_384, True),
    "SmolLM2-135M": Shape(576, 1536, 30, 9, 3, 49_152, True),
    "SmolLM2-360M": Shape(960, 2560, 32, 15, 5, 49_152, True),
    "Qwen2.5-0.5B": Shape(896, 4864, 24, 14, 2, 151_936, True),
    "SmolLM2-1.7B": Shape(2048, 8192, 24, 32, 32, 49_152, True),
    "Qwen2.5-7B": Shape(3584, 18_944, 28, 28, 4, 152_064, False),
    "Llama-3.1-8B": Shape(4096, 14_336, 32, 32, 8, 128_256, False),
}
METHODS = ("full", "LoRA", "QLoRA")
CAPS = (128, 256, 512, 1024)


def computed(shape: Shape, method: str, cap: int, batch: int) -> float:
    """Bytes at the peak of a step."""
    total, matrices = shape.parameters, shape.matrices
    trained = total if method == "full" else shape.adapter
    weights = {"full": 4 * total, "LoRA": 2 * total, "QLoRA": 0.5625 * matrices + 2 * (total - matrices)}[method]
    row = 3 * cap // 2
    token = 8 * shape.hidden + 4 * shape.hidden + 4 * shape.keys + 4 * shape.inner + 1.5 * shape.heads * row
    step = batch * row * shape.layers * token + 2 * min(CHUNK_TOKENS, batch * cap) * shape.vocabulary
    if method == "full":
        step += 2 * matrices + 6 * shape.hidden * shape.vocabulary
    return weights + 8 * trained + max(step, 4 * trained)


def measured(shape: Shape, method: str, cap: int, batch: int) -> tuple[float, float]:
    """Peak resident bytes of two steps of `TextDPOTrainer`, and those before the model is built."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from tiny import byte_tokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig

    from resdpo_trl.text.config import TextDPOConfig
    from resdpo_trl.text.model import with_faster_parts
    from resdpo_trl.text.trainer import TextDPOTrainer

    before = resident()
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads, vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    kind = torch.float32 if method == "full" else torch.bfloat16
    model = with_faster_parts(AutoModelForCausalLM.from_config(config, dtype=kind))
    if method == "LoRA":
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    half = cap // 2
    rows = torch.randint(1, 256, (2 * batch, 3 * half)).tolist()
    pairs = Dataset.from_list(
        [
            {"prompt_ids": row[:half], "chosen_ids": row[half:cap], "rejected_ids": row[cap:], "length": len(row)}
            for row in rows
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TextDPOConfig(
            output_dir=folder, max_length=cap, per_device_train_batch_size=batch, num_train_epochs=1, bf16=True,
            eval_strategy="no", save_strategy="no", select="last", reference_cache_dir="none", disable_tqdm=True,
        )  # fmt: skip
        TextDPOTrainer(model, args=args, train_dataset=pairs, processing_class=byte_tokenizer()).train()
    return resident(), before


def resident() -> int:
    """Largest resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tables() -> None:
    for method in METHODS:
        print(f"\n| {method} | parameters | " + " | ".join(f"cap {cap}" for cap in CAPS) + " |")
        print("| --- |" + " --- |" * (1 + len(CAPS)))
        for name, shape in SHAPES.items():
            if name in ("tiny", "small"):  # for --check alone
                continue
            found = [computed(shape, method, cap, 8) / 1e9 for cap in CAPS]
            cells = [f"{value:.1f} GB" if value < 10 else f"{value:.0f} GB" for value in found]
            print(f"| {name} | {shape.parameters / 1e9:.2f}B | " + " | ".join(cells) + " |")


def check(name: str, method: str, cap: int, batch: int) -> dict[str, Any]:
    flags = [name, "--method", method, "--cap", str(cap), "--batch", str(batch)]
    done = subprocess.run([sys.executable, __file__, "--measure", *flags], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    peak, libraries = json.loads(done.stdout.splitlines()[-1])
    figures = {"computed": computed(SHAPES[name], method, cap, batch) + libraries, "measured": peak}
    figures |= {"libraries": libraries}
    row = {"benchmark": "memory", "model": name, "method": method, "cap": cap, "batch": batch}
    return row | {f"{key}_gb": round(value / 1e9, 2) for key, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="+", choices=list(SHAPES), help="models to measure")
    parser.add_argument("--cap", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--method", choices=METHODS[:2], help="both where it is left out")
    parser.add_argument("--measure", choices=list(SHAPES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(SHAPES[options.measure], options.method, options.cap, options.batch)))
    elif options.check:
        for name in options.check:
            for method in [options.method] if options.method else METHODS[:2]:
                print(json.dumps(check(name, method, options.cap, options.batch)), flush=True)
    else:
        tables()


if __name__ == "__main__":
    main()

"""Peak memory of DPO: computed from the shapes of a model, and measured.

    python benchmarks/memory.py                        # the tables of docs/your_model.md, as Markdown; about a minute
    python benchmarks/memory.py --check tiny small smollm2   # computed against measured, full and LoRA

A row `[prompt | chosen | rejected]` of a pair has 1.5 times the cap in tokens here: half of the cap is the prompt, each
response fills the other half. With weights of P bytes per parameter (4 in float32; 4-bit weights take 0.5625 with their
scales, and the embeddings stay in float32), N parameters, T of them trained, L layers and B rows:

    before the step     P·N + 8·T                    the weights, and AdamW's two moments in float32
    while it runs       + a + b·L + c·B + d·L·B      what autograd keeps, counted with `saved_tensors_hooks` on 1 and 2
                                                     layers of these shapes and 1 and 2 rows, in bfloat16 autocast
                        + head                       logits of at most 4,096 response tokens and their gradient, in
                                                     bfloat16, and the gradient of the head's weight
    after it            P·N + 12·T                   the gradients are there, the activations are gone

The peak is the larger of the last two. The attention is that of the CPU, which keeps its probabilities; SDPA on a GPU
keeps less. `--check` adds the memory of Python and its libraries, measured in the same process before the model is built.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from resdpo_trl.text.scoring import CHUNK_TOKENS


def llama(hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, tie_word_embeddings=tied, head_dim=hidden // heads,
    )  # fmt: skip


SHAPES = {
    "tiny": llama(64, 192, 2, 4, 2, 512, True),
    "small": llama(384, 1024, 8, 6, 2, 16_384, True),
    "smollm2": llama(576, 1536, 30, 9, 3, 49_152, True),
    "SmolLM2-360M": llama(960, 2560, 32, 15, 5, 49_152, True),
    "Qwen2.5-0.5B": llama(896, 4864, 24, 14, 2, 151_936, True),
    "SmolLM2-1.7B": llama(2048, 8192, 24, 32, 32, 49_152, True),
    "Qwen2.5-7B": llama(3584, 18_944, 28, 28, 4, 152_064, False),
    "Llama-3.1-8B": llama(4096, 14_336, 32, 32, 8, 128_256, False),
}
METHODS = ("full", "LoRA", "QLoRA")
RANK = 16


def build(config: LlamaConfig, lora: bool) -> torch.nn.Module:
    """The model as a run has it on the CPU, with random weights; on the meta device its parameters alone."""
    from peft import LoraConfig, get_peft_model

    from resdpo_trl.text.model import with_faster_parts

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if model.device.type != "meta":
        model = with_faster_parts(model)
    return get_peft_model(model, LoraConfig(r=RANK, task_type="CAUSAL_LM")) if lora else model


def with_layers(config: LlamaConfig, layers: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(**{**config.to_dict(), "num_hidden_layers": layers, "vocab_size": vocabulary})


def parameters(config: LlamaConfig, lora: bool) -> tuple[int, int, int]:
    """All parameters, those trained, and those of the layers' matrices, without allocating them."""
    with torch.device("meta"):
        model = build(config, lora)
    total = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    matrices = sum(w.numel() for name, w in model.named_parameters() if "layers." in name and w.ndim == 2 and "lora" not in name)
    return total, trained, matrices


def kept_bytes(config: LlamaConfig, layers: int, rows: int, tokens: int, lora: bool) -> int:
    """Bytes that autograd keeps for the backward pass of the layers, parameters themselves left out."""
    torch.manual_seed(0)
    model = build(with_layers(config, layers, 64), lora).train()
    own = {weight.data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    body = model.get_base_model().model if lora else model.model
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        body(input_ids=torch.randint(64, (rows, tokens)), use_cache=False)
    return sum(kept.values())


def computed(config: LlamaConfig, method: str, cap: int, batch: int) -> float:
    """Bytes at the peak of a training step."""
    lora = method != "full"
    total, trained, matrices = parameters(config, lora)
    weights = 4 * total if method != "QLoRA" else 0.5625 * matrices + 4 * (total - matrices)
    tokens = 3 * cap // 2
    found = {(n, b): kept_bytes(config, n, b, tokens, lora) for n in (1, 2) for b in (1, 2)}
    per_both = found[2, 2] - found[2, 1] - found[1, 2] + found[1, 1]
    per_layer = found[2, 1] - found[1, 1] - per_both
    per_row = found[1, 2] - found[1, 1] - per_both
    constant = found[1, 1] - per_layer - per_row - per_both
    layers = config.num_hidden_layers
    kept = constant + per_layer * layers + per_row * batch + per_both * layers * batch
    head = 4 * config.vocab_size * min(CHUNK_TOKENS, batch * cap)
    head += (2 if lora else 6) * config.vocab_size * config.hidden_size
    return max(weights + 8 * trained + kept + head, weights + 12 * trained)


def measured(config: LlamaConfig, method: str, cap: int, batch: int) -> tuple[float, float]:
    """Peak resident bytes of two steps of `TextDPOTrainer`, and the resident bytes before the model is built."""
    from datasets import Dataset

    from resdpo_trl.text.config import TextDPOConfig
    from resdpo_trl.text.model import load_tokenizer  # noqa: F401 -- what a run imports belongs to the libraries' share
    from resdpo_trl.text.trainer import TextDPOTrainer
    from tiny import byte_tokenizer

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = build(config, method != "full")
    model.warnings_issued = {}
    half = cap // 2
    ids = torch.randint(1, 256, (2 * batch, 3 * half)).tolist()
    pairs = Dataset.from_list(
        [
            {"prompt_ids": row[:half], "chosen_ids": row[half:cap], "rejected_ids": row[cap:], "length": len(row)}
            for row in ids
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TextDPOConfig(
            output_dir=folder, max_length=cap, per_device_train_batch_size=batch, num_train_epochs=1, bf16=True,
            eval_strategy="no", save_strategy="no", select="last", reference_cache_dir="none", disable_tqdm=True,
        )  # fmt: skip
        TextDPOTrainer(model, args=args, train_dataset=pairs, processing_class=byte_tokenizer()).train()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, resident


def tables() -> None:
    names = [name for name in SHAPES if name not in ("tiny", "small")]
    for method in METHODS:
        print(f"\n| {method} | parameters | " + " | ".join(f"cap {cap}" for cap in (128, 256, 512, 1024)) + " |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name in names:
            total = parameters(SHAPES[name], False)[0]
            cells = [f"{computed(SHAPES[name], method, cap, 8) / 1e9:.2g}" for cap in (128, 256, 512, 1024)]
            print(f"| {name} | {total / 1e9:.2f}B | " + " | ".join(cells) + " |", flush=True)


def check(name: str, method: str, cap: int, batch: int) -> dict[str, Any]:
    flags = [name, "--method", method, "--cap", str(cap), "--batch", str(batch)]
    done = subprocess.run([sys.executable, __file__, "--measure", *flags], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    peak, libraries = json.loads(done.stdout.splitlines()[-1])
    expected = computed(SHAPES[name], method, cap, batch) + libraries
    row = {"model": name, "method": method, "cap": cap, "batch": batch}
    return row | {"computed_gb": round(expected / 1e9, 2), "measured_gb": round(peak / 1e9, 2), "libraries_gb": round(libraries / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="+", choices=list(SHAPES), help="models to measure")
    parser.add_argument("--cap", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--method", choices=METHODS[:2])
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

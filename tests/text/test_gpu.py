"""What a step will do on a GPU, counted on the CPU: the types of its products, and what waits for the device."""

import copy
import importlib.util
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig
from transformers import LlamaForSequenceClassification

from resdpo_trl.errors import UserError
from resdpo_trl.image.config import ImageDPOConfig
from resdpo_trl.text import scoring
from resdpo_trl.text.config import TextDPOConfig, TextModelConfig, TextRewardConfig, TextSFTConfig
from resdpo_trl.text.model import load_model
from resdpo_trl.text.reward import TextRewardTrainer, reward_rows
from resdpo_trl.text.scoring import add_response_head, pair_logps
from resdpo_trl.text.tokens import PairCollator, sft_rows
from resdpo_trl.text.trainer import TextDPOTrainer, TextSFTTrainer
from resdpo_trl.training.arguments import cuda_precision, has_bfloat16
from tests.conftest import Operators, random_pairs, save_model, tiny_model
from tests.text.test_trainer import config, tokenized, trainer

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "gemm_4bit"}


def step(job):
    """One training step of a trainer, counted: forward and backward pass, without the optimizer."""
    batch = next(iter(job.get_train_dataloader()))
    job.model.train()
    job.current_gradient_accumulation_steps = 1  # as the training loop sets it
    with Operators() as counted:
        job.training_step(job.model, batch)
    return counted.calls


@pytest.mark.skipif(not has_bfloat16(use_cpu=True), reason="this CPU has no bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_products_with_4_bit_weights_are_16_bit_in_both_passes(tmp_path, tokenizer, dtype):
    folder = save_model(tmp_path / "base", tokenizer, "llama", hidden_size=64, intermediate_size=64)
    quantized = TextModelConfig(load_in_4bit=True, use_peft=True, dtype=dtype)
    model = load_model(str(folder), quantized, False, "model")
    kind = torch.bfloat16 if dtype == "float32" else torch.float16
    assert {each.compute_dtype for each in model.modules() if hasattr(each, "compute_dtype")} == {kind}
    options = {"bf16": dtype == "float32", "fp16": dtype == "float16"}
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    job = TextDPOTrainer(
        model,
        None,
        config(tmp_path / "run", **options),
        None,
        tokenized(),
        tokenized(9),
        tokenizer,
        peft_config=adapter,
    )
    trained = {each.dtype for each in job.model.parameters() if each.requires_grad}
    assert trained == {torch.bfloat16 if dtype == "float32" else torch.float32}  # loss scaling takes no other
    if dtype == "float32":
        calls = step(job)
        forward = [args[0].dtype for name, _, args, _ in calls if name == "gemm_4bit"]
        # of the backward pass: what follows a weight that was made whole
        whole = [at for at, (name, *_) in enumerate(calls) if name == "dequantize_4bit"]
        backward = [next(args[0].dtype for name, _, args, _ in calls[at:] if name in PRODUCTS) for at in whole]
        assert len(forward) == 14 and len(backward) >= 8  # of 7 layers in 2 blocks; the first block's input needs none
        assert {*forward, *backward} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((6, 1), "float32"), ((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")],
)
def test_the_precision_and_the_loading_of_a_gpu(tmp_path, monkeypatch, capability, precision):
    for place in ("training.arguments", "text.config"):
        monkeypatch.setattr(f"resdpo_trl.{place}.has_cuda", lambda use_cpu=False: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr("resdpo_trl.training.arguments.has_accelerator", lambda: False)
    args = config(tmp_path, bf16=None)
    assert cuda_precision(capability) == precision
    assert (args.bf16, args.fp16) == (precision == "bfloat16", precision == "float16")
    assert not config(tmp_path, bf16=False).fp16  # float32 was asked for
    # batches are made by other processes, and copied while the GPU computes
    assert (args.dataloader_num_workers, args.accelerator_config.non_blocking) == (2, True)
    monkeypatch.undo()
    assert config(tmp_path).dataloader_num_workers == 0


def test_float16_with_loss_scaling_gives_float32s_gradients():
    batch = PairCollator(0)(random_pairs(6))
    gradients = []
    for kind in (torch.float32, torch.float16):
        model = tiny_model("llama").train()
        add_response_head(model)
        scaler = torch.amp.GradScaler("cpu", enabled=kind == torch.float16)
        optimizer = torch.optim.SGD(model.parameters())
        with torch.autocast("cpu", torch.float16, enabled=kind == torch.float16):
            chosen, rejected = pair_logps(model, batch)
        scaler.scale(-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()).backward()
        scaler.unscale_(optimizer)
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters()]))
    exact, found = gradients
    assert found.isfinite().all() and (found - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(
    ("rate", "options", "message"),
    [
        (1e-5, {}, r"weights are bfloat16, and at learning rate 1e-05 a step rounds to no change for \d\d% of them"),
        (1e-3, {}, None),
        (1e-3, {"bf16": False, "fp16": True}, "weights are bfloat16, but --fp16 supports only float32"),
    ],
)
def test_16_bit_weights_are_refused_where_a_step_rounds_to_nothing(tmp_path, tokenizer, rate, options, message):
    model = tiny_model("gpt2").bfloat16()
    if message is not None:
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, tokenizer, model, learning_rate=rate, **options)
        return
    before = torch.cat([each.detach().flatten() for each in model.parameters()])
    job = trainer(tmp_path, tokenizer, model, learning_rate=rate, lr_scheduler_type="constant", max_steps=3)
    job.train()
    after = torch.cat([each.detach().flatten() for each in job.model.parameters()])
    assert (before != after).float().mean() > 0.5


# operators after which a GPU's stream is empty: the host needs a value, or a size that depends on one
WAIT = {
    "_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique_dim", "_unique2", "unique_consecutive",
    "equal", "is_nonzero",
}  # fmt: skip


def waits(calls):
    found = [name for name, *_ in calls if name in WAIT]
    for name, _, args, _ in calls:
        if name in ("index", "index_put_", "index_put") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        ):
            found.append(f"{name} by a mask")
        if name == "repeat_interleave" and len(args) == 1:  # whose size the values say
            found.append(name)
    return found


def sft(folder, tokenizer):
    args = TextSFTConfig(str(folder), use_cpu=True, bf16=False, select="last", disable_tqdm=True, max_length=128)
    rows = sft_rows(tokenized(), True)
    return TextSFTTrainer(tiny_model("llama"), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)


def reward(folder, tokenizer):
    args = TextRewardConfig(str(folder), use_cpu=True, bf16=False, select="last", disable_tqdm=True, max_length=128)
    rows = reward_rows(tokenized())
    model = LlamaForSequenceClassification(tiny_model("llama", num_labels=1).config)
    return TextRewardTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)


def dpo(folder, tokenizer, **options):
    return trainer(folder, tokenizer, tiny_model("llama"), **options)


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (sft, 2),
        (dpo, 0),
        (partial(dpo, precompute_ref_log_probs=False, gradient_accumulation_steps=2), 0),
        (partial(dpo, prefix_sharing=False), 2),
        (reward, 2),
    ],
    ids=["sft", "dpo", "dpo, reference in memory", "dpo, two rows", "reward"],
)
def test_no_step_waits_for_the_device(tmp_path, tokenizer, make, known):
    """What is known: transformers asks twice of a mask (R, T) whether it hides anything."""
    assert waits(step(make(tmp_path, tokenizer))) == ["_local_scalar_dense"] * known


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 0.5)])
def test_trls_fused_head_gives_ours_and_float64s(monkeypatch, softcap, scale):
    """Its torch path, which is the CPU's: the kernels of CUDA compute the same tiles."""
    torch.manual_seed(0)
    head, rows, weights = torch.nn.Linear(16, 90), torch.randn(300, 16), torch.randn(300)
    tokens = torch.randint(90, (300,))
    monkeypatch.setattr(scoring, "VOCABULARY_TILE", 32)  # so that 90 columns are three tiles
    found = {}
    for name, fused_on, kind in (("exact", (), torch.float64), ("ours", (), None), ("trl", ("cpu",), None)):
        monkeypatch.setattr(scoring, "FUSED_ON", fused_on)
        own, hidden = copy.deepcopy(head).to(kind), rows.to(kind or torch.float32).requires_grad_()
        if name == "trl":
            own.__class__, own.softcap, own.scale = scoring._ResponseHead, softcap, scale
        logps = scoring._token_logps(own, hidden, tokens, softcap, scale)
        found[name] = [logps, *torch.autograd.grad((logps * weights).sum(), [hidden, own.weight, own.bias])]
        hidden.requires_grad_(False)
    for exact, ours, trls in zip(*found.values(), strict=True):
        torch.testing.assert_close(trls.double(), exact.double(), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(trls, ours, rtol=1e-5, atol=2e-5)


PRESETS = sorted(Path(__file__).parents[2].glob("recipes/configs/*/*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_adamw_is_the_fused_one_in_every_preset(preset):
    config = TextDPOConfig if preset.parent.name == "hh" else ImageDPOConfig
    optimizer = yaml.safe_load(preset.read_text()).get("optim", config(use_cpu=True, bf16=False).optim)
    assert optimizer in ("adamw_torch_fused", "sgd")


def test_bench_gpu_goes_on_after_a_row_that_fails(tmp_path, monkeypatch, model_folder):
    place = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("bench_gpu", place)
    gpu = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", gpu)  # where dataclasses look for its types
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(gpu)
    broken = gpu.Row("broken", [sys.executable, "-c", "raise SystemExit('out of memory')"], dict)
    real = gpu.rows
    monkeypatch.setattr(gpu, "rows", lambda *args: [broken, *real(*args)])
    words = ["--device", "cpu", "--tiny", "--rows", "parity, llama, bfloat16|^GPT-2, cap 256.*: ours$"]
    assert gpu.main([*words, "--tokenizer", str(model_folder), "--output", str(tmp_path / "gpu.md")]) == 1
    text = (tmp_path / "gpu.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "failed: out of memory" in rows["broken"] and text.endswith("1 of 3 rows failed: broken.\n")
    assert re.search(
        r"difference 0\.\d+ nats a response of \d+, gradient 0\.0\d+ of its norm", rows["parity, llama, bfloat16"]
    )
    assert re.search(
        r"\| [\d.]+ \([\d.]+\) \| [\d.]+ GB \| \d+% of .* \| ran \|", rows["GPT-2, cap 256, batch 2: ours"]
    )

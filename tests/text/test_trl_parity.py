"""What TRL's trainers are used for, tried with this project's: each passes with TRL's numbers, or is refused by name.

The situations are those of TRL 1.16's own tests of DPOTrainer, SFTTrainer and RewardTrainer. What has a test of its own
elsewhere is not repeated: loss types (tests/test_losses.py), steps against TRL's (tests/text/test_trainer.py), rows
(tests/text/test_tokens.py), options (tests/text/test_every_option.py).
"""

import pytest
import torch
from peft import LoraConfig
from trl import DPOTrainer

from resdpo_trl.errors import UserError
from resdpo_trl.text.config import TextRewardConfig, TextSFTConfig
from resdpo_trl.text.reward import TextRewardTrainer, reward_rows
from resdpo_trl.text.tokens import sft_rows
from resdpo_trl.text.trainer import TextDPOTrainer, TextSFTTrainer
from tests.conftest import tiny_model
from tests.text.test_trainer import config, tokenized

QUICK = {
    "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "save_strategy": "no", "eval_strategy": "no",
    "select": "last", "logging_steps": 1, "learning_rate": 1e-2, "disable_tqdm": True, "max_steps": 3,
    "max_length": 128,
}  # fmt: skip


def build(kind, folder, tokenizer, model=None, peft_config=None, **options):
    """A trainer of one kind on 12 pairs, as TRL's tests make theirs."""
    options = QUICK | options
    model = model or tiny_model("gpt2")
    pairs, held_out = tokenized(12), options.pop("held_out", None) or tokenized(6, seed=1)
    if kind == "dpo":
        return TextDPOTrainer(
            model, args=config(folder, **options), train_dataset=pairs, eval_dataset=held_out,
            processing_class=tokenizer, peft_config=peft_config,
        )  # fmt: skip
    trainer, args, rows = {
        "sft": (TextSFTTrainer, TextSFTConfig, lambda found: sft_rows(found, True)),
        "reward": (TextRewardTrainer, TextRewardConfig, reward_rows),
    }[kind]
    if kind == "reward":
        from transformers import AutoModelForSequenceClassification

        settings = model.config
        settings.num_labels, settings.pad_token_id = 1, 0
        model = AutoModelForSequenceClassification.from_config(settings)
    held_out = {name: rows(each) for name, each in held_out.items()} if isinstance(held_out, dict) else rows(held_out)
    return trainer(
        model=model, args=args(str(folder), **options), train_dataset=rows(pairs), eval_dataset=held_out,
        processing_class=tokenizer, peft_config=peft_config,
    )  # fmt: skip


def moved(job):
    """Names of the parameters that training changes, and of all that it should."""
    before = {name: weight.detach().clone() for name, weight in job.model.named_parameters()}
    trainable = {name for name, weight in job.model.named_parameters() if weight.requires_grad}
    job.train()
    return {name for name, weight in job.model.named_parameters() if not torch.equal(weight, before[name])}, trainable


KINDS = ["dpo", "sft", "reward"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"activation_offloading": False, "neftune_noise_alpha": 5.0},
        {"train_sampling_strategy": "random"},
        {"disable_tqdm": True, "optim": "adafactor"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}},
    ],
    ids=str,
)
def test_every_trainable_parameter_moves(tmp_path, tokenizer, kind, options):
    job = build(kind, tmp_path, tokenizer, **options)
    changed, trainable = moved(job)
    assert changed == trainable
    assert all(torch.isfinite(weight).all() for weight in job.model.parameters())
    assert "train_loss" in job.state.log_history[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"use_rslora": True}, {"bias": "all"}], ids=["lora", "dora", "rslora", "bias"]
)
def test_an_adapter_moves_and_its_base_does_not(tmp_path, tokenizer, kind, options):
    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    adapter = LoraConfig(r=4, target_modules=["c_attn"], task_type=task, **options)
    changed, trainable = moved(build(kind, tmp_path, tokenizer, peft_config=adapter))
    assert changed and changed <= trainable
    assert not [name for name in changed if "base_layer.weight" in name or "wte" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_several_evaluation_sets(tmp_path, tokenizer, kind):
    held_out = {"a": tokenized(5, seed=1), "b": tokenized(6, seed=2)}
    job = build(kind, tmp_path, tokenizer, held_out=held_out, eval_strategy="steps", eval_steps=3)
    job.train()
    logged = {name for row in job.state.log_history for name in row}
    assert {"eval_a_loss", "eval_b_loss"} <= logged


def test_the_best_of_several_evaluation_sets_is_named(tmp_path, tokenizer):
    held_out = {"a": tokenized(5, seed=1), "b": tokenized(6, seed=2)}
    with pytest.raises(UserError, match=r"several evaluation sets \(a, b\); name a figure of one"):
        build(
            "sft", tmp_path, tokenizer, held_out=held_out, select="best", eval_strategy="epoch", save_strategy="epoch"
        )


def test_no_reference_and_no_precomputing(tmp_path, tokenizer):
    """The reference is the policy as it began, as TRL's, and stays."""
    model = tiny_model("gpt2")
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    job = build("dpo", tmp_path, tokenizer, model, precompute_ref_log_probs=False)
    assert isinstance(job, DPOTrainer) and job.ref_model is not None
    changed, trainable = moved(job)
    assert changed == trainable
    for name, weight in job.ref_model.state_dict().items():
        assert torch.equal(weight, start[name])


def test_one_model_can_not_be_policy_and_reference(tmp_path, tokenizer):
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="cannot be the same object"):
        TextDPOTrainer(
            model, model, args=config(tmp_path), train_dataset=tokenized(8), eval_dataset=tokenized(4),
            processing_class=tokenizer,
        )  # fmt: skip


def test_without_evaluation_rows(tmp_path, tokenizer):
    job = TextDPOTrainer(
        tiny_model("gpt2"), args=config(tmp_path, max_steps=2), train_dataset=tokenized(8), processing_class=tokenizer
    )
    job.train()
    assert job.state.global_step == 2


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        (TextSFTConfig, {"packing": True}),
        (TextSFTConfig, {"padding_free": True}),
        (TextSFTConfig, {"assistant_only_loss": True}),
        (TextSFTConfig, {"dataset_text_field": "words"}),
        (TextRewardConfig, {"pad_token": "<pad>"}),
        (TextRewardConfig, {"chat_template_path": "a"}),
    ],
)
def test_what_this_project_leaves_to_trl_is_refused_by_name(tmp_path, config_class, options):
    (name,) = options
    with pytest.raises(UserError, match=f"^--{name} is not supported here"):
        config_class(output_dir=str(tmp_path), **options)

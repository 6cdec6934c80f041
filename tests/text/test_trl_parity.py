"""What TRL's trainers are used for, tried with this project's: each passes with TRL's numbers, or is refused by name.

The situations are those of TRL's own tests of DPOTrainer, SFTTrainer and RewardTrainer. What has a test of its own
elsewhere is not repeated: loss types (tests/test_losses.py), steps against TRL's (tests/text/test_trainer.py), rows,
tools and template options (tests/text/test_tokens.py, test_data.py), options (tests/text/test_every_option.py),
adapters (tests/text/test_peft.py).
"""

import math

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, TrainingArguments
from trl import DPOConfig, DPOTrainer, RewardConfig, SFTConfig

from resdpo_trl.errors import UserError
from resdpo_trl.text.config import TextRewardConfig, TextSFTConfig
from resdpo_trl.text.reward import TextRewardTrainer, reward_rows
from resdpo_trl.text.tokens import sft_rows
from resdpo_trl.text.trainer import TextDPOTrainer, TextSFTTrainer
from tests.conftest import tiny_model, write_pairs
from tests.text.test_peft import config_of
from tests.text.test_trainer import config, new_mixture, tokenized

QUICK = {
    "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "save_strategy": "no", "eval_strategy": "no",
    "select": "last", "logging_steps": 1, "learning_rate": 1e-2, "disable_tqdm": True, "max_steps": 3,
    "max_length": 128,
}  # fmt: skip


ROWS = {"dpo": lambda pairs: pairs, "sft": lambda pairs: sft_rows(pairs, True), "reward": reward_rows}


def build(kind, folder, tokenizer, model=None, peft_config=None, rows=None, held_out=None, args=None, **options):
    """A trainer of one kind on 12 pairs, as TRL's tests make theirs; `more` are further arguments of the trainer."""
    more, options = options.pop("more", {}), QUICK | options
    model = tiny_model("gpt2") if model is None else model
    if kind == "reward" and not isinstance(model, str) and not hasattr(model, "score") and args is None:
        settings = model.config
        settings.num_labels, settings.pad_token_id = 1, 0
        model = AutoModelForSequenceClassification.from_config(settings).to(model.dtype)
    rows = ROWS[kind](tokenized(12)) if rows is None else rows
    held_out = tokenized(6, seed=1) if held_out is None else held_out
    if isinstance(held_out, dict):
        held_out = type(held_out)({name: ROWS[kind](each) for name, each in held_out.items()})
    elif isinstance(held_out, Dataset) and "prompt_ids" in held_out.column_names:
        held_out = ROWS[kind](held_out)
    trainer, made = {
        "dpo": (TextDPOTrainer, lambda: config(folder, **options)),
        "sft": (TextSFTTrainer, lambda: TextSFTConfig(str(folder), **options)),
        "reward": (TextRewardTrainer, lambda: TextRewardConfig(str(folder), **options)),
    }[kind]
    return trainer(
        model=model, args=made() if args is None else args, train_dataset=rows, eval_dataset=held_out,
        processing_class=tokenizer, peft_config=peft_config, **more,
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
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
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
    if kind == "reward":  # it adds the same to both rewards, so only rounding could move it
        trainable -= {"transformer.ln_f.bias"}
        changed -= {"transformer.ln_f.bias"}
    assert changed == trainable
    assert all(torch.isfinite(weight).all() for weight in job.model.parameters())
    assert "train_loss" in job.state.log_history[-1]


def lora(kind, **options):
    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    return LoraConfig(r=4, target_modules=["c_attn"], task_type=task, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"use_rslora": True}, {"bias": "all"}], ids=["lora", "dora", "rslora", "bias"]
)
def test_an_adapter_moves_and_its_base_does_not(tmp_path, tokenizer, kind, options):
    job = build(kind, tmp_path, tokenizer, peft_config=lora(kind, **options), gradient_checkpointing=not options)
    changed, trainable = moved(job)
    assert changed and changed <= trainable
    assert not [name for name in changed if "base_layer.weight" in name or "wte" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_there_goes_on(tmp_path, tokenizer, kind):
    """DPO's reference is then the adapter as it was, and not its base."""
    model = tiny_model("gpt2")
    if kind == "reward":
        model.config.num_labels, model.config.pad_token_id = 1, 0
        model = AutoModelForSequenceClassification.from_config(model.config)
    model = get_peft_model(model, lora(kind))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(0.1 * torch.randn_like(weight) * ("lora_B" in name))
    job = build(kind, tmp_path, tokenizer, model)
    if kind == "dpo":
        assert job.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
        scores = job.score(job.eval_dataset)
        with job.model.disable_adapter():
            base = job.score(job.eval_dataset)
        assert (scores.ref_chosen - base.chosen).abs().max() > 0.1
    changed, trainable = moved(job)
    assert changed == {name for name in trainable if ".ref." not in name}


@pytest.mark.parametrize("there", [False, True])
def test_an_adapter_of_a_mixtures_experts(tmp_path, tokenizer, there):
    adapter = LoraConfig(
        r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(new_mixture(), adapter) if there else new_mixture()
    job = build("dpo", tmp_path, tokenizer, model, None if there else adapter)
    assert job.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    changed, _ = moved(job)
    assert changed and all("lora_" in name and ".ref." not in name for name in changed)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # PEFT's own call of the model
@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_the_loss_of_sft_with_virtual_tokens(tmp_path, tokenizer, method):
    job = build("sft", tmp_path, tokenizer, tiny_model("llama"), config_of(method), rows=sft_rows(tokenized(4), True))
    with torch.no_grad():
        for weight in job.model.parameters():
            weight.add_(0.1 * torch.randn_like(weight) * weight.requires_grad)
        model, sums, count = job.model.eval(), 0.0, 0
        for row in job.eval_dataset:
            ids = torch.tensor([row["input_ids"]])
            logps = model(input_ids=ids).logits[0, -ids.shape[1] : -1].log_softmax(-1).gather(1, ids[0, 1:, None])
            labels = torch.tensor(row["labels"][1:]) != -100
            sums, count = sums - logps[labels].sum().item(), count + int(labels.sum())
    assert job.evaluate()["eval_loss"] == pytest.approx(sums / count, rel=1e-5)
    changed, trainable = moved(job)
    assert changed == trainable


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_half_precision_stay_so(tmp_path, tokenizer, kind):
    job = build(kind, tmp_path, tokenizer, tiny_model("gpt2").bfloat16(), learning_rate=0.1)
    changed, _ = moved(job)
    assert changed and {weight.dtype for weight in job.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("kind", "tag"), [("dpo", "dpo"), ("sft", "sft"), ("reward", "reward-trainer")])
def test_a_model_by_its_name_has_trls_tags(tmp_path, model_folder, kind, tag):
    job = build(kind, tmp_path, None, str(model_folder))
    assert {"trl", tag} <= set(job.model.model_tags)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", [dict, DatasetDict])
def test_several_evaluation_sets(tmp_path, tokenizer, kind, of):
    held_out = of({"a": tokenized(5, seed=1), "b": tokenized(6, seed=2)})
    job = build(kind, tmp_path, tokenizer, held_out=held_out, eval_strategy="steps", eval_steps=3)
    job.train()
    logged = {name for row in job.state.log_history for name in row}
    assert {"eval_a_loss", "eval_b_loss"} <= logged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("held_out", "figure", "named"),
    [({"a": 5, "b": 6}, None, "a_loss.* b_loss"), (6, "eval_mean_token_accuracy", "loss")],
)
def test_a_best_epoch_by_a_figure_that_is_not_there(tmp_path, tokenizer, kind, held_out, figure, named):
    best = {"select": "best", "eval_strategy": "epoch", "save_strategy": "epoch"}
    best |= {"metric_for_best_model": figure} if figure else {}
    held_out = (
        {name: tokenized(rows) for name, rows in held_out.items()}
        if isinstance(held_out, dict)
        else tokenized(held_out)
    )
    with pytest.raises(UserError, match=f"metric_for_best_model .*: must be among {named}"):
        build(kind, tmp_path, tokenizer, held_out=held_out, **best)


@pytest.mark.parametrize(
    ("figure", "greater"), [("rewards/rejected", False), ("rewards/margins", True), ("loss", False)]
)
def test_which_way_a_figure_is_better(tmp_path, figure, greater):
    assert config(tmp_path, metric_for_best_model=f"eval_{figure}").greater_is_better is greater


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


@pytest.mark.parametrize("of", [None, dict, DatasetDict])
@pytest.mark.parametrize("precompute", [True, False])
def test_raw_pairs_can_be_evaluated(tmp_path, tokenizer, of, precompute):
    """As TRL's `evaluate` takes them: before training, and after it where a reference is there."""
    raw, options = Dataset.from_list(write_pairs(9)), {"precompute_ref_log_probs": precompute}
    job = build("dpo", tmp_path, tokenizer, **options)
    rows = raw if of is None else of({"a": raw, "b": raw.select(range(4))})
    name = "eval_loss" if of is None else "eval_a_loss"
    assert job.evaluate(rows)[name] == pytest.approx(math.log(2), abs=1e-5)
    stored = job.add_reference(raw)
    job.train()
    expected = job.evaluate(stored)["eval_loss"]
    assert abs(expected - math.log(2)) > 1e-3
    if precompute:
        with pytest.raises(UserError, match="training has changed the model"):
            job.evaluate(rows)
    else:
        assert job.evaluate(rows)[name] == pytest.approx(expected, rel=1e-5)
    assert job.evaluate()["eval_loss"] != expected  # of the pairs that it was given, with or without a reference


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_refused_by_name(tmp_path, tokenizer, kind):
    stream = ROWS[kind](tokenized(6)).to_iterable_dataset()
    with pytest.raises(UserError, match=r"the rows are of class IterableDataset: pass a datasets\.Dataset"):
        build(kind, tmp_path, tokenizer, rows=stream)
    with pytest.raises(UserError, match="the rows are of class IterableDataset"):
        build(kind, tmp_path, tokenizer, held_out=stream)
    with pytest.raises(UserError, match="the rows are of class IterableDataset"):
        build(kind, tmp_path, tokenizer).evaluate(stream)


RAW = {
    "text": {"text": ["a b", "c d"]},
    "messages": {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]},
    "without labels": {"input_ids": [[1, 2, 3]], "assistant_masks": [[0, 1, 1]]},
    "of an old TRL": {"chosen_input_ids": [[1, 2]], "rejected_input_ids": [[1, 3]]},
    "pairs": {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]},
}


@pytest.mark.parametrize("kind", ["sft", "reward"])
@pytest.mark.parametrize("columns", RAW)
def test_rows_that_are_not_tokenized_here_are_refused_by_their_columns(tmp_path, tokenizer, kind, columns):
    rows = Dataset.from_dict(RAW[columns])
    with pytest.raises(UserError, match=f"have no column .*length .found: {next(iter(RAW[columns]))}"):
        build(kind, tmp_path, tokenizer, rows=rows)
    with pytest.raises(UserError, match=r"have no column .*length"):
        build(kind, tmp_path, tokenizer).evaluate(rows)


def test_masks_without_labels_are_refused(tmp_path, tokenizer):
    rows = Dataset.from_dict(RAW["without labels"] | {"length": [3]})
    with pytest.raises(UserError, match="have no column labels"):
        build("sft", tmp_path, tokenizer, rows=rows)


def test_labels_are_what_is_learned_whatever_masks_stand_beside_them(tmp_path, tokenizer):
    rows = sft_rows(tokenized(12), True)
    masks = [[1] * length for length in rows["length"]]
    losses = [
        build("sft", tmp_path, tokenizer, rows=each).train().training_loss
        for each in (rows, rows.add_column("assistant_masks", masks).add_column("completion_mask", masks))
    ]
    assert losses[0] == losses[1]


def test_a_margin_is_refused_and_not_dropped(tmp_path, tokenizer):
    """TRL's loss takes it off the difference of the rewards."""
    rows = reward_rows(tokenized(6)).add_column("margin", [1.0] * 6)
    with pytest.raises(UserError, match="column margin is not supported"):
        build("reward", tmp_path, tokenizer, rows=rows)


def test_a_reward_model_has_one_label(tmp_path, tokenizer):
    settings = tiny_model("gpt2").config
    settings.num_labels = 2
    with pytest.raises(ValueError, match="num_labels=1"):
        build("reward", tmp_path, tokenizer, AutoModelForSequenceClassification.from_config(settings))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("sft", name) for name in ("compute_loss_func", "compute_metrics", "formatting_func")),
        *((kind, "preprocess_logits_for_metrics") for kind in ("sft", "reward")),
        *((kind, "compute_metrics") for kind in ("dpo", "reward")),
        *((kind, "quantization_config") for kind in KINDS),
        ("dpo", "data_collator"),
    ],
)
def test_arguments_that_nothing_here_reads_are_refused_by_name(tmp_path, tokenizer, kind, name):
    with pytest.raises(UserError, match=f"^{name} is not supported by Text.*Trainer: omit it"):
        build(kind, tmp_path, tokenizer, more={name: print})


@pytest.mark.parametrize(("kind", "theirs"), [("dpo", DPOConfig), ("sft", SFTConfig), ("reward", RewardConfig)])
def test_a_configuration_of_trl_is_refused_by_name(tmp_path, tokenizer, kind, theirs):
    for each in (theirs, TrainingArguments):
        args = each(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        with pytest.raises(UserError, match=f"args is of class {each.__name__}: Text.* takes Text"):
            build(kind, tmp_path, tokenizer, args=args)


@pytest.mark.parametrize(
    ("kind", "trainer"), [("dpo", TextDPOTrainer), ("sft", TextSFTTrainer), ("reward", TextRewardTrainer)]
)
def test_rows_of_training_are_required(tmp_path, tokenizer, kind, trainer):
    args = build(kind, tmp_path, tokenizer).args
    with pytest.raises((UserError, ValueError), match=r"train_dataset`? is required"):
        trainer(model=tiny_model("gpt2"), args=args, processing_class=tokenizer)


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

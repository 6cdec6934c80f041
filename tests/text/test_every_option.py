"""Every field of TRL's configurations is honored or refused by name; none is ignored.

A new field of TRL or transformers fails the first test: honor it and name the test that shows it, refuse it in
`resdpo_trl.text.config`, or, where the code of transformers and TRL that reads it runs here unchanged, say so.
"""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
import trl
from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig

from resdpo_trl.errors import UserError
from resdpo_trl.text.config import (
    OF_4BIT,
    OF_PEFT,
    TextDPOConfig,
    TextModelConfig,
    TextRewardConfig,
    TextSFTConfig,
)
from resdpo_trl.text.model import loading_options

CONFIGS = {
    **{
        ours: (theirs, {each.name for each in fields(theirs)} & set(ours.refused))
        for ours, theirs in ((TextDPOConfig, DPOConfig), (TextSFTConfig, SFTConfig), (TextRewardConfig, RewardConfig))
    },
    TextModelConfig: (ModelConfig, {"lora_task_type", *OF_PEFT, *OF_4BIT}),  # those of adapters without one
}
# values that ask for something
ASKED = {
    "assistant_only_loss": True, "average_tokens_across_devices": False, "batch_eval_metrics": True,
    "bf16_full_eval": True, "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "fp4",
    "chat_template_path": "a folder", "dataset_kwargs": {"skip_prepare_dataset": True}, "dataset_num_proc": 4,
    "dataset_text_field": "content", "deepspeed": "zero3.json", "do_predict": True, "do_train": True,
    "enable_jit_checkpoint": True, "fsdp": "full_shard", "fsdp_config": {"version": 2},
    "parallelism_config": {"tp_size": 2},
    "eos_token": "<end>", "eval_accumulation_steps": 4, "eval_do_concat_batches": False, "eval_packing": True,
    "eval_use_gather_object": True, "fp16_full_eval": True, "include_for_metrics": ["loss"],
    "label_names": ["labels"], "label_smoothing_factor": 0.1, "ld_alpha": 0.5, "length_column_name": "size",
    "liger_kernel_config": {"rope": True}, "local_rank": 0, "lora_alpha": 8, "lora_dropout": 0.5,
    "lora_modules_to_save": ["lm_head"],
    "lora_r": 4, "lora_target_modules": ["c_attn", "c_proj"], "lora_target_parameters": ["weight"],
    "lora_task_type": "SEQ_CLS", "model_init_kwargs": {"dtype": "bfloat16"}, "packing": True,
    "packing_strategy": "wrapped", "pad_to_multiple_of": 8, "pad_token": "<pad>", "padding_free": True,
    "prediction_loss_only": True, "remove_unused_columns": True, "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 1,
    "router_aux_loss_coef": 0.1, "shuffle_dataset": True, "sync_ref_model": True, "truncation_mode": "keep_end",
    "use_bnb_nested_quant": True, "use_cache": True, "use_dora": True, "use_liger_kernel": True, "use_rslora": True,
    "use_weighting": True,
}  # fmt: skip
# field -> the test that shows what it does
SHOWN_BY = {
    "activation_offloading": "test_options_that_need_others_are_refused_without_them",
    "activation_checkpointing": "test_gradient_checkpointing_changes_nothing",
    "attn_implementation": "test_scores_and_gradients_equal_separate_forwards",
    "beta": "test_dpo_loss_is_the_papers_listing",
    "bf16": "test_bfloat16_is_chosen_where_the_hardware_has_it",
    "center_rewards_coefficient": "test_the_trainers_loss_is_bradley_terry_as_losses_has_it",
    "completion_only_loss": "test_sft_learns_the_response_or_everything",
    "dataloader_drop_last": "test_a_dropped_last_batch_is_of_training_alone",
    "discopop_tau": "test_every_loss_type_against_trls_trainer",
    "do_eval": "test_options_that_need_others_are_refused_without_them",
    "dtype": "test_precision_is_the_hardwares_unless_it_is_named",
    "eval_strategy": "test_senseless_options_name_the_flag",
    "f_alpha_divergence_coef": "test_scores_are_derivatives_of_the_f_divergences",
    "f_divergence_type": "test_scores_are_derivatives_of_the_f_divergences",
    "gradient_accumulation_steps": "test_counts_and_seeds",
    "gradient_checkpointing": "test_gradient_checkpointing_changes_nothing",
    "hub_always_push": "test_a_push_in_the_background_holds_nobody_up",
    "hub_model_id": "test_what_was_pushed_gives_the_same_outputs",
    "hub_private_repo": "test_publish",
    "hub_revision": "test_a_branch_and_a_second_push",
    "hub_strategy": "test_what_a_strategy_pushes",
    "hub_token": "test_what_was_pushed_gives_the_same_outputs",
    "include_num_input_tokens_seen": "test_tokens_seen_are_counted_and_no_cells_of_the_mask",
    "label_smoothing": "test_label_smoothing_is_taken_by_the_losses_that_use_it",
    "learning_rate": "test_rates_and_epochs_are_above_zero",
    "liger_kernel_config": "test_options_that_need_others_are_refused_without_them",
    "load_best_model_at_end": "test_the_epoch_kept_and_why",
    "load_in_4bit": "test_quantized_lora_runs_from_sft_to_policy",
    "load_in_8bit": "test_quantized_lora_runs_from_sft_to_policy",
    "loss_type": "test_every_loss_type_against_trls_trainer",
    "loss_weights": "test_every_loss_type_against_trls_trainer",
    "max_length": "test_what_the_cap_promises",
    "max_steps": "test_steps_go_before_epochs",
    "metric_for_best_model": "test_a_figure_that_no_evaluation_has_is_refused",
    "model_name_or_path": "test_models_that_are_not_there",
    "model_revision": "test_what_models_are_loaded_with",
    "num_train_epochs": "test_rates_and_epochs_are_above_zero",
    "output_dir": "test_a_run_needs_a_folder",
    "per_device_eval_batch_size": "test_evaluation_is_over_pairs_not_over_batches",
    "per_device_train_batch_size": "test_batches_of_like_length_are_seeded_by_epoch",
    "precompute_ref_batch_size": "test_the_references_batch_is_the_references_alone",
    "precompute_ref_log_probs": "test_twenty_steps_follow_trls_trainer",
    "push_to_hub": "test_publish",
    "report_to": "test_a_stage_takes_the_options_that_both_have",
    "resume_from_checkpoint": "test_true_goes_on_from_the_newest_whole_checkpoint",
    "save_strategy": "test_senseless_options_name_the_flag",
    "save_total_limit": "test_a_killed_run_ends_as_if_it_had_not_been",
    "seed": "test_same_seed_same_files",
    "data_seed": "test_batches_of_like_length_are_seeded_by_epoch",
    "train_sampling_strategy": "test_twenty_steps_follow_trls_trainer",
    "trust_remote_code": "test_code_of_a_model_runs_only_where_it_was_asked_for",
    "use_peft": "test_lora_trains_against_its_base",
}
# read by code of transformers and TRL that runs here unchanged: the loop of training, its optimizer, its callbacks,
# the launch; tested there
UNCHANGED = {
    "accelerator_config", "activation_checkpointing_kwargs", "adam_beta1", "adam_beta2",
    "adam_epsilon", "auto_find_batch_size", "average_tokens_across_devices", "dataloader_in_order",
    "dataloader_multiprocessing_context", "dataloader_num_workers", "dataloader_persistent_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_backend", "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "debug",
    "disable_dropout", "disable_tqdm", "eval_delay", "eval_on_start", "eval_steps", "fp16",
    "full_determinism", "gradient_checkpointing_kwargs", "greater_is_better", "ignore_data_skip",
    "label_smoothing_factor", "log_level", "log_level_replica", "log_on_each_node", "logging_first_step",
    "logging_nan_inf_filter", "logging_steps", "logging_strategy", "lr_scheduler_kwargs", "lr_scheduler_type",
    "max_grad_norm", "neftune_noise_alpha", "optim", "optim_args", "optim_target_modules",
    "project", "restore_callback_states_from_checkpoint", "router_aux_loss_coef", "run_name", "save_on_each_node",
    "save_only_model", "save_steps", "skip_memory_metrics", "tf32", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "torch_empty_cache_steps", "trackio_bucket_id", "trackio_space_id",
    "trackio_static_space_id", "use_cpu", "use_liger_kernel", "warmup_steps", "weight_decay",
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_honored_or_refused(config):
    theirs, refused = CONFIGS[config]
    honored = set(SHOWN_BY) | UNCHANGED
    names = {each.name for each in fields(theirs)}
    assert names - refused - honored == set(), "these are ignored, or honored without a test"


def test_no_refusal_names_what_is_gone():
    refused = {name for config, (_, names) in CONFIGS.items() for name in names if config is not TextModelConfig}
    assert set(TextDPOConfig.refused) | set(TextSFTConfig.refused) == refused, "these are gone from TRL"


def test_no_list_names_what_is_gone():
    known = {each.name for theirs, _ in CONFIGS.values() for each in fields(theirs)}
    assert (set(SHOWN_BY) | UNCHANGED | set(ASKED)) - known == set()
    assert not set(SHOWN_BY) & UNCHANGED


@pytest.mark.parametrize(
    ("config", "name"), [(config, name) for config, (_, refused) in CONFIGS.items() for name in sorted(refused)]
)
def test_what_is_not_honored_is_refused_by_name(tmp_path, config, name):
    folder = {} if config is TextModelConfig else {"output_dir": str(tmp_path)}
    with pytest.raises(UserError, match=f"^--{name} is not supported here: .{{10}}"):
        config(**folder, **{name: ASKED[name]})


def test_the_tests_that_are_named_are_there():
    tests = {path: path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("test_*.py")}
    names = {path.stem for path in tests} | {
        name for text in tests.values() for name in re.findall(r"^def (test_\w+)", text, re.M)
    }
    assert set(SHOWN_BY.values()) - names == set()


def test_what_is_said_to_be_read_by_transformers_and_trl_is():
    places = [
        *Path(transformers.__path__[0]).glob("*.py"),
        *Path(transformers.__path__[0], "integrations").glob("*.py"),
    ]
    places += Path(trl.__path__[0], "trainer").glob("*.py")
    text = "".join(path.read_text(encoding="utf-8") for path in places)
    read = set(re.findall(r"\b(?:args|self(?!\.args))\.(\w+)", text))
    assert UNCHANGED - read == set()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (TextDPOConfig, {"do_eval": True, "eval_strategy": "no", "select": "last"}, "--do_eval .*--eval_strategy"),
        (TextSFTConfig, {"liger_kernel_config": {"rope": True}}, "--liger_kernel_config .*add --use_liger_kernel"),
        (TextDPOConfig, {"activation_offloading": True}, "--activation_offloading .*there is no GPU: remove it"),
    ],
)
def test_options_that_need_others_are_refused_without_them(tmp_path, config, options, message):
    with pytest.raises(UserError, match=message):
        config(output_dir=str(tmp_path), **options)


def test_with_an_adapter_and_4_bits_their_options_are_taken():
    found = TextModelConfig(use_peft=True, load_in_4bit=True, **{name: ASKED[name] for name in (*OF_PEFT, *OF_4BIT)})
    for name in (*OF_PEFT, *OF_4BIT):
        assert getattr(found, name) == ASKED[name]


def test_what_models_are_loaded_with():
    asked = TextModelConfig(model_revision="v1", attn_implementation="eager", dtype="bfloat16")
    options = loading_options(asked, trust_remote_code=True)
    assert (options["revision"], options["attn_implementation"], options["dtype"]) == ("v1", "eager", torch.bfloat16)
    assert options["trust_remote_code"]

"""The names of other libraries, private or undocumented, that this package overrides, calls or reads.

A test that fails here after an upgrade names the function of ours to check. setup.cfg bounds transformers and TRL, and
.github/workflows/newest.yaml runs the tests without the bounds every week.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from transformers import Trainer

import resdpo_trl

ROOT = Path(resdpo_trl.__file__).parent

# name in the library, its parameters, the modules of ours that need it
CALLABLES = [
    # saving and resuming
    ("transformers.Trainer._get_output_dir", "self, trial", "training.trainer"),
    ("transformers.Trainer._save_checkpoint", "self, model, trial", "training.trainer"),
    ("transformers.Trainer._determine_best_metric", "self, metrics, trial", "training.trainer"),
    (
        "transformers.Trainer._run_epoch",
        "self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
        "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
        "training.trainer",
    ),
    (
        "transformers.Trainer._maybe_log_save_evaluate",
        "self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate",
        "training.trainer",
    ),
    ("transformers.Trainer._load_rng_state", "self, checkpoint", "training.trainer"),
    ("transformers.Trainer._load_from_checkpoint", "self, resume_from_checkpoint, model", "training.trainer"),
    ("transformers.Trainer._issue_warnings_after_load", "self, load_result", "text.trainer"),
    (
        "transformers.trainer_utils.rotate_checkpoints",
        "output_dir, save_total_limit, best_model_checkpoint, use_mtime, checkpoint_prefix",
        "training.trainer",
    ),
    # batches
    ("transformers.Trainer.get_batch_samples", "self, epoch_iterator, num_batches, device", "training.trainer"),
    ("transformers.Trainer._get_num_items_in_batch", "self, batch_samples, device", "training.trainer"),
    ("transformers.Trainer._get_train_sampler", "self, train_dataset", "text.trainer image.trainer"),
    ("transformers.Trainer._track_num_input_tokens", "self, inputs", "text.trainer"),
    ("transformers.Trainer._prepare_input", "self, data", "training.trainer"),
    ("transformers.Trainer._prepare_inputs", "self, inputs", "text.trainer"),
    (
        "transformers.trainer_pt_utils.get_length_grouped_indices",
        "lengths, batch_size, mega_batch_mult, generator",
        "text.trainer",
    ),
    ("accelerate.utils.gather_object", "object", "scorer study.compare"),
    # optimizers
    ("transformers.Trainer.create_optimizer", "self, model", "image.trainer"),
    ("transformers.Trainer.get_decay_parameter_names", "self, model", "image.trainer"),
    ("transformers.Trainer.get_optimizer_cls_and_kwargs", "args, model", "image.trainer"),
    # TRL's trainers
    ("trl.DPOTrainer._compute_loss", "self, model, inputs, return_outputs", "text.trainer"),
    ("trl.DPOTrainer._precompute_ref_logps", "self, dataset, name, batch_size", "text.trainer"),
    ("trl.DPOTrainer.compute_ref_log_probs", "self, model, inputs", "text.trainer"),
    ("trl.DPOTrainer._prepare_dataset", "self, dataset, processing_class, args, dataset_name", "text.trainer"),
    (
        "trl.SFTTrainer._prepare_dataset",
        "self, dataset, processing_class, args, packing, formatting_func, dataset_name",
        "text.trainer",
    ),
    ("trl.RewardTrainer._prepare_dataset", "self, dataset, processing_class, args, dataset_name", "text.trainer"),
    ("trl.trainer.utils.use_adapter", "model, adapter_name", "text.trainer"),
    ("trl.trainer.utils.disable_dropout_in_model", "model", "image.trainer"),
    ("trl.data_utils.extract_prompt", "example", "text.data"),
    # attention and mixtures of experts
    (
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        "module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **kwargs",
        "text.attention",
    ),
    (
        "transformers.masking_utils.sdpa_mask",
        "batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, "
        "allow_is_causal_skip, allow_is_bidirectional_skip, use_vmap, device, **kwargs",
        "text.attention",
    ),
    (
        "transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func",
        "gate_logits, num_experts, top_k, attention_mask",
        "text.scoring",
    ),
    ("torch.cpu._is_avx512_bf16_supported", "", "training.arguments"),
    ("torch.cpu._is_amx_tile_supported", "", "training.arguments"),
]
# class in the library, a member of it, the modules of ours that need it
MEMBERS = [
    ("transformers.Trainer", "_tr_loss", "training.trainer"),
    ("transformers.Trainer", "_total_loss_scalar", "training.trainer"),
    ("transformers.Trainer", "_globalstep_last_logged", "training.trainer"),
    ("transformers.Trainer", "optimizer_cls_and_kwargs", "image.trainer"),
    ("transformers.TrainingArguments", "_n_gpu", "training.arguments"),
    ("transformers.PreTrainedConfig", "_attn_implementation", "text.scoring text.model text.trainer"),
    ("transformers.PreTrainedConfig", "_experts_implementation", "text.scoring"),
    ("transformers.PreTrainedConfig", "_name_or_path", "text.trainer"),
    ("transformers.PreTrainedModel", "all_tied_weights_keys", "text.trainer"),
    ("transformers.masking_utils.AttentionMaskInterface", "register", "text.attention"),
    *(
        (f"trl.{kind}", name, "text.trainer training.trainer" if name.startswith("_") else "text.trainer")
        for kind in ("DPOTrainer", "SFTTrainer")
        for name in ("_metrics", "_total_train_tokens", "aux_loss_enabled", "router_aux_loss_coef")
    ),
    ("trl.RewardTrainer", "_metrics", "text.reward"),
    ("trl.RewardTrainer", "_total_train_tokens", "text.reward"),
    ("accelerate.state.GradientState", "end_of_dataloader", "training.trainer"),
    ("datasets.Dataset", "_fingerprint", "sources text.tokens"),
    ("bitsandbytes.nn.Linear4bit", "support_avx512bf16_for_cpu", "text.model"),
]


def found(path):
    """A library's object by its dotted name."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for name in parts[count:]:
            thing = getattr(thing, name)
        return thing
    raise ImportError(path)


def uses(modules, name):
    """Assert that each of our modules has the name, so that no line above outlives its use."""
    for module in modules.split():
        path = ROOT / f"{module.replace('.', '/')}.py"
        assert name in path.read_text(encoding="utf-8"), f"resdpo_trl.{module} has no {name} any more: fix this list"


@pytest.mark.parametrize(("path", "parameters", "modules"), CALLABLES, ids=[path for path, *_ in CALLABLES])
def test_a_function_takes_what_it_took(path, parameters, modules):
    plain = {"annotation": inspect.Parameter.empty, "default": inspect.Parameter.empty}
    signature = inspect.signature(found(path)).parameters.values()
    now = ", ".join(str(parameter.replace(**plain)) for parameter in signature)
    assert now == parameters, f"{path} takes ({now}) now: check resdpo_trl.{modules}"
    uses(modules, path.rpartition(".")[2])


@pytest.mark.parametrize(("path", "name", "modules"), MEMBERS, ids=[".".join(row[:2]) for row in MEMBERS])
def test_a_member_is_there(path, name, modules):
    kind = found(path)
    there = hasattr(kind, name) or any(name in inspect.getsource(each) for each in kind.__mro__[:-1])
    assert there, f"{path} has no {name} any more: check resdpo_trl.{modules}"
    uses(modules, name)


def test_torchs_backward_pass_of_a_softmax():
    schema = str(torch.ops.aten._softmax_backward_data.default._schema)
    assert schema.endswith("(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype) -> Tensor"), (
        "check resdpo_trl.text.attention"
    )
    uses("text.attention", "_softmax_backward_data")


def test_every_private_name_of_a_library_is_listed():
    """What our trainers override, and every private attribute that no module of ours defines."""
    listed = {path.rpartition(".")[2] for path, *_ in CALLABLES} | {name for _, name, _ in MEMBERS}
    listed.add("_softmax_backward_data")
    ours, used = set(), {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                if isinstance(node.ctx, ast.Store):
                    ours.add(node.attr)
                else:
                    used.setdefault(node.attr, path.name)
    assert {name: place for name, place in used.items() if name not in ours | listed} == {}
    for module in (
        "training.trainer", "text.trainer", "text.reward", "image.trainer",
    ):  # fmt: skip
        for kind in vars(importlib.import_module(f"resdpo_trl.{module}")).values():
            if not (inspect.isclass(kind) and issubclass(kind, Trainer) and kind.__module__.startswith("resdpo_trl")):
                continue
            libraries = [each for each in kind.__mro__ if not each.__module__.startswith("resdpo_trl")]
            overridden = {
                name
                for name in vars(kind)
                if name.startswith("_") and not name.startswith("__") and any(name in vars(each) for each in libraries)
            }
            assert overridden <= listed, f"{kind.__name__} overrides {overridden - listed}"


def test_nothing_below_imports_the_study():
    below = [path for path in ROOT.rglob("*.py") if path.parent.name != "study"]
    assert [str(path) for path in below if "resdpo_trl.study" in path.read_text(encoding="utf-8")] == []

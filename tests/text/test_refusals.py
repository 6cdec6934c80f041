"""What other libraries refuse, and what they would notice too late: one line that names the flag and the fix."""

import json

import pytest
import transformers
from peft import LoraConfig

from resdpo_trl.errors import UserError
from resdpo_trl.text.config import SamplesConfig, TextDPOConfig, TextModelConfig, TextRewardConfig, TextSFTConfig
from resdpo_trl.text.data import TextDataConfig
from resdpo_trl.text.model import load_model
from resdpo_trl.text.pipeline import TextRun, adapter_refusals
from resdpo_trl.text.trainer import TextDPOTrainer
from resdpo_trl.training.arguments import RunConfig
from tests.conftest import save_model, tiny_model
from tests.text.test_trainer import config, tokenized


def test_an_attention_that_is_not_installed(model_folder):
    if transformers.utils.is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    model = TextModelConfig(attn_implementation="flash_attention_2")
    with pytest.raises(UserError, match=r"--model .*not installed .*[Ff]lash.*--attn_implementation \(sdpa, eager\)"):
        load_model(str(model_folder), model, False, "--model")


@pytest.mark.parametrize(
    ("training", "adapter", "said"),
    [
        (TextDPOConfig, False, "add --use_peft to train adapters"),
        (TextSFTConfig, False, "add --use_peft to train adapters"),
        (TextRewardConfig, True, "pass a checkpoint that is not quantized"),
        (TextDPOConfig, True, None),
    ],
)
def test_quantized_weights_are_refused_before_they_are_read(tmp_path, tokenizer, training, adapter, said):
    folder = save_model(tmp_path / "model", tokenizer, "llama")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").write_bytes(b"no weights")
    model = TextModelConfig(model_name_or_path=str(folder), use_peft=adapter)
    data = TextDataConfig(dataset_name="nowhere.jsonl")  # which is looked for after it
    run = TextRun(data, model, SamplesConfig(), RunConfig(), training(output_dir=str(tmp_path / "run")))
    said = (
        f"^--model_name_or_path {folder}: its weights are quantized, .*: {said}" if said else "nowhere.jsonl: no such"
    )
    with pytest.raises(UserError, match=said):
        run.prepare_pairs()


@pytest.mark.parametrize(
    ("kind", "targets", "said"),
    [("gpt2", ["no_such_layer"], "no_such_layer"), ("a model PEFT does not know", None, "specify `target_modules`")],
)
def test_layers_that_peft_does_not_find(tmp_path, tokenizer, kind, targets, said):
    model = tiny_model("gpt2")
    model.config.model_type = kind
    model.config.__class__ = type("Config", (type(model.config),), {"model_type": kind})
    adapter = LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match=f"--use_peft: .*{said}.*--lora_target_modules"), adapter_refusals():
        TextDPOTrainer(
            model=model,
            args=config(tmp_path),
            train_dataset=tokenized(8),
            processing_class=tokenizer,
            peft_config=adapter,
        )


def test_other_errors_are_not_taken_for_pefts():
    with pytest.raises(ValueError, match="something else"), adapter_refusals():
        raise ValueError("something else")


@pytest.mark.parametrize(
    ("training", "figure"),
    [
        (TextDPOConfig, "eval_rewards/margin"),
        (TextSFTConfig, "rewards/margins"),
        (TextRewardConfig, "eval_logps/chosen"),
    ],
)
def test_a_figure_that_no_evaluation_has_is_refused(tmp_path, training, figure):
    options = training(output_dir=str(tmp_path), metric_for_best_model=figure)
    with pytest.raises(UserError, match=f"--metric_for_best_model {figure}: must be among loss"):
        TextRun(TextDataConfig(), TextModelConfig(), SamplesConfig(), RunConfig(), options)


def test_the_figures_that_are_offered_are_those_of_evaluation(tmp_path, tokenizer):
    job = TextDPOTrainer(
        tiny_model("gpt2"), args=config(tmp_path), train_dataset=tokenized(8), eval_dataset=tokenized(4),
        processing_class=tokenizer,
    )  # fmt: skip
    assert {f"eval_{name}" for name in TextDPOConfig.figures} == set(job.evaluate()) - {"epoch"}

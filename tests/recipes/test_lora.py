"""LoRA policies outside their run: another folder, another working directory, another process, other libraries."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, LogitsProcessor, pipeline

from resdpo_trl.errors import UserError
from resdpo_trl.run.hub import Hub, publish
from resdpo_trl.text.pipeline import merge_run
from tests.conftest import save_model
from tests.recipes.test_dpo_hh import pairs_file  # noqa: F401  (a fixture)

TEXT = "\n\nHuman: tell me something\n\nAssistant: They are ice and dust."
# what somebody who does not have this library does with a folder
PLAIN = """
import json, sys
from pathlib import Path
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
found = {}
for folder in sys.argv[2:]:
    adapter = (Path(folder) / "adapter_config.json").is_file()
    model = (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(sys.argv[1], return_tensors="pt").input_ids
    with torch.no_grad():
        logps = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    pipeline("text-generation", model=folder, max_new_tokens=2)(sys.argv[1])
    found[folder] = logps.double().sum().item()
assert "resdpo_trl" not in sys.modules
print(json.dumps(found))
"""


def plain_logps(folders, cwd):
    """The log-probability of TEXT under each folder's model, by a fresh process in `cwd`."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, TEXT, *map(str, folders)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]).values())


def logp_before(folder):
    """The same as this library loads it, before anything moves."""
    from resdpo_trl.text.config import TextModelConfig
    from resdpo_trl.text.model import load_model, load_tokenizer

    config = TextModelConfig(dtype="float32")
    ids = load_tokenizer(str(folder), config, False, "x")(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        logps = load_model(str(folder), config, False, "x").eval()(ids).logits.log_softmax(-1)[:, :-1]
    return logps.gather(-1, ids[:, 1:, None]).double().sum().item()


LORA = ["--use_peft", "--lora_r", "4", "--num_samples", "0", "--max_length", "64", "--max_train_samples", "16"]
LORA += ["--max_eval_samples", "4", "--max_test_samples", "4", "--use_cpu", "--bf16", "false"]
LORA += ["--learning_rate", "1e-2", "--sft.learning_rate", "1e-2", "--model_name_or_path", "base", "--dataset_name"]


def test_a_policy_loads_wherever_it_is_moved(recipe, tmp_path, pairs_file, tokenizer, monkeypatch, hub):  # noqa: F811
    """The base is named by a relative path; the policy of three runs: after SFT, without it, and merged."""
    monkeypatch.chdir(tmp_path)
    save_model("base", tokenizer, "llama")
    runs = {"sft": ["--sft.num_train_epochs", "1"], "none": ["--sft.num_train_epochs", "0"]}
    runs["merged"] = [*runs["none"], "--merge_adapter"]
    for name, flags in runs.items():
        status, out, said = recipe("dpo_hh.py", *LORA, pairs_file, "--output_dir", f"run/{name}", *flags)
        assert status == 0, said
        assert out.startswith("SFT and DPO of base on " if name == "sft" else "DPO of base on ")
        assert "is an adapter" not in out  # answers end where its base ends them
    folders = ["sft/reference", "sft/policy", "none/reference", "none/policy", "merged/policy"]
    before = [logp_before(tmp_path / "run" / folder) for folder in folders]
    (tmp_path / "far" / "away").mkdir(parents=True)
    shutil.move("run", tmp_path / "far" / "away" / "moved")
    after = plain_logps([f"moved/{folder}" for folder in folders], tmp_path / "far" / "away")
    assert after == pytest.approx(before, abs=1e-4)
    sft_reference, sft, reference, policy, merged = after
    assert merged == pytest.approx(policy, abs=1e-4)
    assert abs(policy - reference) > 1e-2 and abs(sft - sft_reference) > 1e-2 and abs(sft_reference - reference) > 1e-2
    files = {path.name for path in (tmp_path / "far" / "away" / "moved" / "merged" / "policy").iterdir()}
    assert "model.safetensors" in files and not [name for name in files if name.startswith("adapter")]
    generation = [
        json.loads((tmp_path / "far" / "away" / "moved" / name / "generation_config.json").read_text())["eos_token_id"]
        for name in ("merged/policy", "merged/reference")
    ]
    assert generation[0] == generation[1]

    # nobody else has this base: the adapter is not pushed, the full model is
    moved = tmp_path / "far" / "away" / "moved" / "none"
    with pytest.raises(UserError, match=r"/base is a local folder.* --merge_adapter, or push the base"):
        publish(Hub(moved, "me/lora"))
    publish(Hub(moved, "me/lora"), merge_run)
    files = hub.repositories["me/lora"].files
    assert not [name for name in files if name.startswith("adapter")]
    assert b"library_name: transformers" in files["README.md"] and b"AutoPeft" not in files["README.md"]
    (tmp_path / "pushed").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "pushed" / name).write_bytes(files[name])
    assert logp_before(tmp_path / "pushed") == pytest.approx(policy, abs=1e-4)


def test_where_the_answers_of_an_adapter_end_in_a_pipeline(recipe, tmp_path, pairs_file, chat_model_folder):  # noqa: F811
    """At its base's end of text, which is not the template's end of turn: transformers reads the base's file alone."""
    arguments = [
        "--model_name_or_path",
        chat_model_folder,
        "--dataset_name",
        pairs_file,
        "--output_dir",
        tmp_path / "run",
    ]
    arguments += ["--use_peft", "--max_length", "64", "--max_train_samples", "8", "--num_samples", "0", "--use_cpu"]
    status, printed, said = recipe("sft_hh.py", *arguments)
    assert status == 0, said
    folder = str(tmp_path / "run" / "reference")
    (line,) = [line for line in printed.splitlines() if "is an adapter" in line]
    advice = f"generation_config=GenerationConfig.from_pretrained('{folder}')"
    assert line.startswith(f"{folder} is an adapter") and "not include <|im_end|>;" in line and advice in line

    pipe = pipeline("text-generation", model=folder)
    end = pipe.tokenizer.convert_tokens_to_ids("<|im_end|>")

    class Ends(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([end]), 0.0)

    asked = {"max_new_tokens": 3, "logits_processor": [Ends()], "return_tensors": True}
    lengths = [
        len(pipe("hello", **asked, **more)[0]["generated_token_ids"]) - len(pipe.tokenizer("hello")["input_ids"])
        for more in ({}, {"generation_config": GenerationConfig.from_pretrained(folder)})
    ]
    assert lengths == [3, 1]


def test_what_cannot_be_pushed_or_merged_is_refused_before_anything_is_loaded(recipe, tmp_path, pairs_file, hub):  # noqa: F811
    (tmp_path / "base").mkdir()
    flags = ["--model_name_or_path", tmp_path / "base", "--dataset_name", pairs_file, "--output_dir", tmp_path / "run"]
    for name in ("dpo_hh.py", "sft_hh.py"):
        status, _, said = recipe(name, *flags, "--use_peft", "--push_to_hub")
        assert status == 2 and "/base is a local folder" in said and "--merge_adapter" in said
        status, _, said = recipe(name, *flags, "--merge_adapter")
        assert status == 2 and "no adapter is trained: add --use_peft" in said
    assert not hub.requests and not (tmp_path / "run").exists()


def test_frozen_weights_are_bfloat16_where_training_is(recipe, tmp_path, pairs_file, tokenizer):  # noqa: F811
    save_model(tmp_path / "base", tokenizer, "llama")
    flags = [
        *LORA[:-1],
        "--bf16",
        "true",
        "--sft.num_train_epochs",
        "0",
        "--merge_adapter",
        "--dataset_name",
        pairs_file,
    ]
    flags[flags.index("base")] = tmp_path / "base"
    for name, more in {"default": [], "float32": ["--dtype", "float32"]}.items():
        status, _, said = recipe("dpo_hh.py", *flags, *more, "--output_dir", tmp_path / name)
        assert status == 0, said
    weights = {
        name: load_file(tmp_path / name / "policy" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        for name in ("default", "float32")
    }
    base = load_file(tmp_path / "base" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weights["float32"], base)  # the adapter trains attention alone
    assert torch.equal(weights["default"], base.bfloat16().float())

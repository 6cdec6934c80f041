"""Whole runs of the recipes: what they leave, what they refuse, what they exit with."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import save_model, train_tokenizer, write_pairs
from tests.recipes.conftest import ROOT, not_ended, rows_of

SMALL = [
    "--sft.num_train_epochs", "1", "--max_new_tokens", "6", "--num_samples", "3", "--max_length", "64", "--use_cpu",
    "--logging_steps", "2", "--sft.learning_rate", "1e-3", "--learning_rate", "1e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in write_pairs(120)))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pairs_file, model_folder):
    """One run through `accelerate launch`, as the README says it."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    command = [
        Path(sys.executable).with_name("accelerate"), "launch", "--config_file", "accelerate_configs/cpu.yaml",
        "recipes/dpo_hh.py", "--dataset_name", pairs_file, "--output_dir", folder, "--num_train_epochs", "2", *SMALL,
        "--model_name_or_path", model_folder, "--beta", "0.3",
        "--bf16", "false",  # figures are computed again in float32
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_what_a_run_leaves(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "run.json", "reference", "policy", "checkpoints", "metrics.jsonl", "summary.json", "samples.jsonl",
        "scores.jsonl", "report.html", "plots",
    }  # fmt: skip
    run = json.loads((folder / "run.json").read_text())
    assert run["ended"] >= run["started"]
    assert run["num_processes"] == 1
    assert run["parallelism"] == "NO"
    assert run["config"]["training"]["beta"] == 0.3
    assert {"torch", "trl", "transformers", "python"} <= set(run["versions"])
    assert len(run["data_fingerprint"]["train"]) == 64
    assert len(list((folder / "checkpoints" / "dpo").glob("checkpoint-*"))) == 2


def test_the_models_load_and_differ(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = finished
    models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("reference", "policy")]
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    ids = tokenizer("\n\nHuman: hi\n\nAssistant:", return_tensors="pt")["input_ids"]
    first, second = (model(ids).logits for model in models)
    assert (first - second).abs().max() > 1e-4
    assert torch.isfinite(second).all()
    assert not list(folder.glob("policy/*.bin")) and not list(folder.glob("policy/*.pt"))


def test_the_metrics_have_trls_names_and_every_stage(finished):
    folder, _ = finished
    rows = rows_of(folder / "metrics.jsonl")
    assert {(row["stage"], row["split"]) for row in rows} == {
        ("sft", "train"), ("sft", "validation"), ("dpo", "train"), ("dpo", "validation"), ("dpo", "test"),
    }  # fmt: skip
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    names |= {"logps/chosen", "logps/rejected"}
    for row in rows:
        if row["stage"] == "dpo":
            assert names <= set(row), row
    (trained,) = [row for row in rows if row["stage"] == "dpo" and row["split"] == "train" and row["step"] == 2]
    assert 0 < trained["gradient_weights/chosen"] < 1
    assert [row["step"] for row in rows if row["split"] == "test"] == [rows[-1]["step"]]


def test_the_summary_has_counts_and_intervals(finished, model_folder):
    folder, done = finished
    summary = json.loads((folder / "summary.json").read_text())
    test = summary["dpo"]["test"]
    assert test["n"] == summary["data"]["test"]
    low, high = test["interval_95"]["rewards/accuracies"]
    assert low <= test["rewards/accuracies"] <= high
    assert summary["data"]["cap"]["train"]["pairs_lost"] == 0
    assert 0 < summary["dpo"]["train"]["loss"] < 1
    assert summary["sft"]["validation"]["loss_after"] < summary["sft"]["validation"]["loss_before"]
    assert summary["throughput"]["dpo_pairs_per_second"] > 0
    for line in ("pairs ranked right", "margin of rewards", "pairs per second", str(folder), "no pairs lost"):
        assert line in done.stdout, line
    assert done.stdout.startswith(f"SFT and DPO of {model_folder} on ")
    assert "--config hh/gpt2.yaml" in done.stdout.splitlines()[0]


def test_the_test_figures_can_be_computed_again_from_the_folders(finished):
    """From policy/ and reference/ with plain forwards of transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from resdpo_trl.text.data import TextDataConfig, load_preferences
    from resdpo_trl.text.tokens import tokenize

    folder, _ = finished
    config = json.loads((folder / "run.json").read_text())["config"]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("policy", "reference"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    pairs = tokenize(load_preferences(TextDataConfig(**config["data"]))["test"], tokenizer, 64)

    def ratio(pair, side):
        prompt, response = pair["prompt_ids"], pair[f"{side}_ids"]
        ids = torch.tensor([prompt + response])
        total = 0.0
        for model, sign in ((policy, 1), (reference, -1)):
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            total += sign * logps[len(prompt) - 1 :].sum().item()
        return total

    margins = [0.3 * (ratio(pair, "chosen") - ratio(pair, "rejected")) for pair in pairs]
    test = json.loads((folder / "summary.json").read_text())["dpo"]["test"]
    assert test["rewards/margins"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert test["rewards/accuracies"] == pytest.approx(sum(margin > 0 for margin in margins) / len(margins))


def test_evaluate_gives_the_runs_own_figures(finished, recipe, tmp_path, pairs_file):
    folder, _ = finished
    output = tmp_path / "figures.json"
    arguments = ["--dataset_name", pairs_file, "--num_samples", 5, "--max_new_tokens", 6]
    status, said, wrong = recipe(
        "evaluate_hh.py", "--model", folder / "policy", "--reference", folder / "reference", *arguments,
        "--other_model", folder / "policy", "--output", output,
    )  # fmt: skip
    assert status == 0, wrong
    figures = json.loads(output.read_text())
    summary = json.loads((folder / "summary.json").read_text())
    test, data = summary["dpo"]["test"], summary["data"]
    # of the whole file, what the run trained on and validated on is left out; β, cap and precision are the run's
    assert figures["left_out"] == {"trained_on": data["train"], "validated_on": data["validation"]}
    assert f"left out: {data['train']} rows that these models were trained on, {data['validation']} of their" in said
    assert "as trained: β 0.3, loss sigmoid, cap 64, float32\n" in said
    for name in ("loss", "rewards/accuracies", "rewards/margins", "logps/accuracies", "logps/ref_accuracies"):
        assert figures["pairs"][name] == pytest.approx(test[name], abs=1e-5), name
        low, high = figures["pairs"]["interval_95"][name]
        assert low <= figures["pairs"][name] <= high
    assert figures["answers"]["n"] == 5
    assert figures["difference"]["loss"]["p_value"] == 1.0
    assert "length-controlled" in said and "KL(policy‖reference)" in said


def test_the_samples_hold_every_models_answers(finished):
    folder, _ = finished
    samples = rows_of(folder / "samples.jsonl")
    assert len(samples) == 3
    for sample in samples:
        assert sample["prompt"].endswith("\n\nAssistant:")
        assert {name: set(kinds) for name, kinds in sample["answers"].items()} == {
            name: {"greedy"} for name in ("base", "reference", "policy")
        }


def test_the_model_card_tells_what_the_summary_says(finished):
    from huggingface_hub import ModelCard

    folder, _ = finished
    card = ModelCard.load(folder / "policy" / "README.md")
    test = json.loads((folder / "summary.json").read_text())["dpo"]["test"]
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    accuracy = results["pairs ranked right"]
    assert accuracy == test["rewards/accuracies"]
    assert f"Results on {test['n']} held-out pairs" in card.text
    assert "β 0.3" in card.text


def test_same_seed_same_files(recipe, tmp_path, pairs_file, model_folder):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = ["--dataset_name", pairs_file, "--output_dir", tmp_path / name, "--seed", seed, *SMALL]
        arguments += ["--model_name_or_path", model_folder, "--max_train_samples", 32]
        assert recipe("dpo_hh.py", *arguments)[0] == 0
        weights.append((tmp_path / name / "policy" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_resume_continues_where_the_run_stopped(recipe, tmp_path, pairs_file, model_folder):
    """A run without its second epoch of DPO goes on from the first one's checkpoint and ends as the whole one did."""
    import shutil

    arguments = ["--dataset_name", pairs_file, "--num_train_epochs", "2", "--max_train_samples", 48, *SMALL]
    arguments += ["--select", "last", "--model_name_or_path", model_folder, "--per_device_train_batch_size", 16]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert recipe("dpo_hh.py", *arguments, "--output_dir", whole)[0] == 0
    shutil.copytree(whole, torn)
    shutil.rmtree(torn / "policy")
    not_ended(torn)
    shutil.rmtree(torn / "checkpoints" / "dpo" / "checkpoint-6")
    status, _, said = recipe("dpo_hh.py", *arguments, "--output_dir", torn, "--resume_from_checkpoint")
    assert status == 0, said
    assert (torn / "policy" / "model.safetensors").read_bytes() == (whole / "policy" / "model.safetensors").read_bytes()
    first, second = (
        [(row["stage"], row["split"], row["step"]) for row in rows_of(path / "metrics.jsonl")] for path in (whole, torn)
    )
    assert first == second


def test_the_bad_model_prefers_the_rejected(recipe, tmp_path, pairs_file, model_folder):
    tests = []
    for side in ("chosen", "rejected"):
        arguments = ["--dataset_name", pairs_file, "--output_dir", tmp_path / side, "--prefer", side, *SMALL]
        arguments += ["--model_name_or_path", model_folder, "--num_train_epochs", 3]
        assert recipe("dpo_hh.py", *arguments)[0] == 0
        tests.append(rows_of(tmp_path / side / "samples.jsonl")[0])
    assert tests[0]["chosen"] == tests[1]["rejected"]
    assert tests[0]["prompt"] == tests[1]["prompt"]


@pytest.fixture
def llama_folder(tmp_path, tokenizer):
    return save_model(tmp_path / "model", tokenizer, "llama")


def test_a_given_reference_skips_sft(recipe, tmp_path, pairs_file, llama_folder):
    arguments = ["--dataset_name", pairs_file, "--max_length", "64", "--num_samples", "0", "--max_train_samples", "16"]
    status, _, said = recipe(
        "sft_hh.py", *arguments, "--model_name_or_path", llama_folder, "--output_dir", tmp_path / "s"
    )
    assert status == 0, said
    reference = tmp_path / "s" / "reference"
    status, _, said = recipe("dpo_hh.py", *arguments, "--reference", reference, "--output_dir", tmp_path / "d")
    assert status == 0, said
    assert json.loads((tmp_path / "d" / "summary.json").read_text())["sft"] == {"skipped": str(reference)}
    assert {row["stage"] for row in rows_of(tmp_path / "d" / "metrics.jsonl")} == {"dpo"}


def test_sft_keeps_what_was_asked_for_and_answers_within_the_models_positions(recipe, tmp_path, pairs_file, tokenizer):
    """Prompts as long as the model has positions; the loss that is told is that of the weights that are kept."""
    save_model(tmp_path / "m", tokenizer, n_positions=48)
    status, _, wrong = recipe(
        "sft_hh.py", "--dataset_name", pairs_file, "--model_name_or_path", tmp_path / "m", "--output_dir",
        tmp_path / "s", "--max_length", 48, "--max_new_tokens", 30, "--num_samples", 3, "--max_train_samples", 32,
        "--learning_rate", "1e-2", "--num_train_epochs", 3, "--greater_is_better", "true", "--use_cpu",
    )  # fmt: skip
    assert status == 0, wrong
    losses = [
        row["loss"] for row in rows_of(tmp_path / "s" / "metrics.jsonl") if row["split"] == "validation" and row["step"]
    ]
    assert max(losses) > min(losses)  # by --greater_is_better the worst epoch is kept
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert summary["sft"]["validation"]["loss_after"] == max(losses)
    assert len(rows_of(tmp_path / "s" / "samples.jsonl")) == 3
    assert "sft" not in json.loads((tmp_path / "s" / "run.json").read_text())["config"]


@pytest.mark.parametrize("quantized", [["--load_in_4bit", "--merge_adapter"], ["--load_in_8bit"]], ids=["4bit", "8bit"])
def test_quantized_lora_runs_from_sft_to_policy(recipe, tmp_path, pairs_file, llama_folder, quantized):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    arguments = [
        "--dataset_name", pairs_file, "--max_length", "64", "--num_samples", "2", "--max_new_tokens", "4",
        "--max_train_samples", "32", "--model_name_or_path", llama_folder, "--use_peft", "--lora_r", "4",
        "--output_dir", tmp_path / "d", "--learning_rate", "1e-2", "--sft.learning_rate", "1e-2",
    ]  # fmt: skip
    status, _, said = recipe("dpo_hh.py", *arguments, *quantized)
    assert status == 0, said
    assert (tmp_path / "d" / "policy" / "adapter_config.json").is_file() == ("--merge_adapter" not in quantized)
    test = json.loads((tmp_path / "d" / "summary.json").read_text())["dpo"]["test"]
    assert test["rewards/margins"] != 0
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "d" / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "d" / "policy")
    if "--merge_adapter" in quantized:  # dequantized
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    else:  # and where an adapter's answers end
        assert GenerationConfig.from_pretrained(tmp_path / "d" / "policy").eos_token_id == [tokenizer.eos_token_id]


def test_eight_bit_adam_trains(recipe, tmp_path, pairs_file, llama_folder):
    arguments = ["--dataset_name", pairs_file, "--max_length", "64", "--num_samples", "0", "--max_train_samples", "16"]
    arguments += ["--model_name_or_path", llama_folder, "--output_dir", tmp_path / "d", "--optim", "adamw_bnb_8bit"]
    status, _, said = recipe("dpo_hh.py", *arguments, "--learning_rate", "1e-3")
    assert status == 0, said
    assert json.loads((tmp_path / "d" / "summary.json").read_text())["dpo"]["test"]["rewards/margins"] != 0


# --- chat templates --------------------------------------------------------------------------------------------------

CHAT = ["--num_samples", "2", "--max_new_tokens", "6", "--max_train_samples", "32", "--max_length", "128", "--use_cpu"]
CHAT += ["--sft.num_train_epochs", "0", "--learning_rate", "1e-3"]


def shown_pair(said):
    """The first pair that a run prints: prompt, chosen and rejected."""
    lines = said.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("dialogue format: "))
    words = [line.split(maxsplit=1) for line in lines[at + 1 : at + 4]]
    assert [name for name, _ in words] == ["prompt", "chosen", "rejected"]
    return lines[at], [text for _, text in words]


def test_a_chat_model_from_its_template_to_its_answers(recipe, tmp_path, pairs_file, chat_model_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

    arguments = [
        "--dataset_name",
        pairs_file,
        "--model_name_or_path",
        chat_model_folder,
        "--output_dir",
        tmp_path / "d",
    ]
    status, said, wrong = recipe("dpo_hh.py", *arguments, *CHAT)
    assert status == 0, wrong
    how, (prompt, chosen, rejected) = shown_pair(said)
    assert how == "dialogue format: the tokenizer's chat template; the first training pair as the model sees it"
    assert prompt.lstrip("…").startswith("<|im_start|>") and prompt.endswith("<|im_end|>\\n<|im_start|>assistant\\n")
    assert chosen.endswith("<|im_end|>\\n") and rejected.endswith("<|im_end|>\\n") and chosen != rejected
    assert "Human:" not in prompt + chosen + rejected
    counts = json.loads((tmp_path / "d" / "summary.json").read_text())["data"]
    assert counts["dialogue_format"] == "chat" and counts["cap"]["train"]["pairs_lost"] == 0

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "d" / "policy")
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for name in ("reference", "policy"):
        stops = GenerationConfig.from_pretrained(tmp_path / "d" / name).eos_token_id
        assert stops == [tokenizer.eos_token_id, end_of_turn]
    for row in rows_of(tmp_path / "d" / "samples.jsonl"):
        assert row["prompt"].startswith(("\n\nHuman: ", "\n\nAssistant: ")) and row["prompt"].endswith("\n\nAssistant:")
        assert "<|im_" not in json.dumps(row)

    # transformers' own pipeline takes messages, and stops where the template ends a turn
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "d" / "policy")
    asked = [{"role": "user", "content": "Why is the sky blue?"}]
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    (found,) = chat(asked, max_new_tokens=5, do_sample=False)
    assert found["generated_text"][:-1] == asked and found["generated_text"][-1]["role"] == "assistant"
    last = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    free = model.generate(**last, max_new_tokens=5, do_sample=False)[0, last["input_ids"].shape[1] :].tolist()
    weight = model.get_output_embeddings().weight
    weight.data[end_of_turn] = 3 * weight.data[free[0]]  # now the likeliest token
    ended = model.generate(**last, max_new_tokens=5, do_sample=False)[0, last["input_ids"].shape[1] :].tolist()
    assert ended == [end_of_turn] and len(free) == 5


def test_plain_dialogues_leave_a_policy_without_a_template(recipe, tmp_path, pairs_file, chat_model_folder):
    from transformers import AutoTokenizer, GenerationConfig

    folder = tmp_path / "d"
    arguments = ["--dataset_name", pairs_file, "--model_name_or_path", chat_model_folder, "--output_dir", folder]
    arguments += [*CHAT, "--max_train_samples", 120]  # a pair is trained on or tested on
    status, said, wrong = recipe("dpo_hh.py", *arguments, "--dialogue_format", "plain", "--bf16", "false")
    assert status == 0, wrong
    how, (prompt, chosen, _) = shown_pair(said)
    assert how.startswith("dialogue format: plain text (Human:, Assistant:);")
    assert prompt.endswith("\\n\\nAssistant:") and chosen.endswith("<|endoftext|>") and "<|im_" not in prompt + chosen
    for name in ("reference", "policy"):
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert tokenizer.chat_template is None and not (folder / name / "chat_template.jinja").exists()
        assert GenerationConfig.from_pretrained(folder / name).eos_token_id == tokenizer.eos_token_id
    status, _, wrong = recipe(
        "evaluate_hh.py", "--model", folder / "policy", "--reference", folder / "reference", "--dataset_name",
        pairs_file, "--num_samples", 0, "--output", tmp_path / "f.json",
    )  # fmt: skip
    assert status == 0, wrong
    figures = json.loads((tmp_path / "f.json").read_text())
    test = json.loads((folder / "summary.json").read_text())["dpo"]["test"]
    assert figures["data"]["dialogue_format"] == "plain"
    assert figures["pairs"]["rewards/margins"] == pytest.approx(test["rewards/margins"], abs=1e-5)
    assert test["rewards/margins"] != 0


# --- bad input: status 2 and one line ------------------------------------------------------------------------------


def refused(result, *words):
    status, _, said = result
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == 2, said
    assert len(lines) == 1
    assert "Traceback" not in said
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--beta", "0"], ["--beta", "above 0"]),
        (["--beta", "high"], ["--beta", "high"]),
        (["--max_length", "15"], ["--max_length 15", "at least 16"]),
        (["--bta", "0.1"], ["--bta", "did you mean beta"]),
        (["--max_len", "64"], ["--max_len", "did you mean max_length"]),
        (["stray"], ["stray"]),
        (["--loss_type", "sigmod"], ["sigmod", "sigmoid"]),
        (["--ld_alpha", "0.5"], ["--ld_alpha"]),
        (["--dataset_name", "./nowhere.jsonl"], ["./nowhere.jsonl", "no such file"]),
        (["--dataset_name", "Anthropic/hh-rlhf"], ["Anthropic/hh-rlhf", "Hub", ".jsonl"]),
        (["--model_name_or_path", "./nowhere"], ["--model_name_or_path ./nowhere", "no such folder"]),
        (["--sft.num_train_epochs", "-1"], ["--sft.num_train_epochs -1", "above 0"]),
        (["--max_new_tokens", "249"], ["--max_new_tokens 249", "256 positions"]),
        (["--dialogue_format", "chat"], ["--dialogue_format chat", "no chat template"]),
        (["--dialogue_format", "html"], ["--dialogue_format", "html"]),
        (["--load_in_4bit"], ["--load_in_4bit", "--use_peft"]),
        (["--config", "nowhere.yaml"], ["--config nowhere.yaml", "hh/quickstart.yaml"]),
        (["--overwrite_output_dir", "--resume_from_checkpoint"], ["exclude each other"]),
    ],
)
def test_bad_flags(recipe, tmp_path, pairs_file, model_folder, arguments, words):
    given = {"--dataset_name": pairs_file, "--model_name_or_path": model_folder, "--max_length": 64}
    given |= {"--output_dir": tmp_path / "run"}
    flags = [word for flag, value in given.items() if flag not in arguments for word in (flag, value)]
    refused(recipe("dpo_hh.py", *flags, *arguments), *words)
    assert not (tmp_path / "run" / "policy").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("bta: 0.3\n", ["unknown field bta", "did you mean beta"]),
        ("beta: high\n", ["--beta", "high"]),
        ("beta: [0.1\n", ["line", "not YAML"]),
        ("- beta\n", ["mapping"]),
        ("beta:\n", ["field beta has no value"]),
    ],
)
def test_bad_presets_name_the_file(recipe, tmp_path, content, words):
    preset = tmp_path / "mine.yaml"
    preset.write_text(content)
    refused(recipe("dpo_hh.py", "--config", preset, "--output_dir", tmp_path / "run"), str(preset), *words)


def test_an_occupied_folder(recipe, finished, pairs_file, model_folder):
    folder, _ = finished
    before = (folder / "summary.json").read_bytes()
    arguments = ["--dataset_name", pairs_file, "--model_name_or_path", model_folder, "--output_dir", folder, *SMALL]
    result = recipe("dpo_hh.py", *arguments)
    refused(result, str(folder), "--resume_from_checkpoint", "--overwrite_output_dir")
    assert (folder / "summary.json").read_bytes() == before


def test_a_malformed_row(recipe, tmp_path, model_folder):
    (tmp_path / "p.jsonl").write_text(json.dumps(write_pairs(1)[0]) + "\n{oops\n")
    arguments = ["--dataset_name", tmp_path / "p.jsonl", "--model_name_or_path", model_folder]
    refused(recipe("dpo_hh.py", *arguments, "--output_dir", tmp_path / "r"), "p.jsonl, line 2")


def test_a_reference_of_another_family(recipe, tmp_path, pairs_file, model_folder):
    save_model(tmp_path / "other", train_tokenizer(["other words"], 300), vocab_size=300)
    arguments = ["--dataset_name", pairs_file, "--output_dir", tmp_path / "r", "--model_name_or_path", model_folder]
    result = recipe("dpo_hh.py", *arguments, "--reference", tmp_path / "other")
    refused(result, "--model_name_or_path has a different tokenizer than --reference")


def test_control_characters_of_a_file_name_do_not_reach_the_terminal(recipe, tmp_path, model_folder):
    arguments = ["--dataset_name", "./\x1b[31mred.jsonl", "--model_name_or_path", model_folder]
    _, _, said = recipe("dpo_hh.py", *arguments, "--output_dir", tmp_path / "r")
    assert "red.jsonl: no such file" in said and "\x1b" not in said


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "recipes" / "configs" / "hh").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_preset_parses(recipe, tmp_path, preset, monkeypatch):
    """Its fields are known and its values accepted; the data or model that it names may not be here."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    command_line = importlib.import_module("command_line")
    from resdpo_trl.text.config import SamplesConfig, TextDPOConfig, TextModelConfig, TextSFTConfig
    from resdpo_trl.text.data import TextDataConfig
    from resdpo_trl.training.arguments import RunConfig

    parser = command_line.RecipeParser(
        (TextDataConfig, TextModelConfig, TextDPOConfig, SamplesConfig, RunConfig),
        section="dpo",
        before=("sft", TextSFTConfig),
    )
    (_, _, dpo, *_), used = parser.parse(given=["--config", str(preset), "--output_dir", str(tmp_path)])
    assert used == preset
    assert dpo.beta in (0.03, 0.1, 0.3)
    assert preset.read_text().startswith("#")
    assert os.path.isabs(preset)

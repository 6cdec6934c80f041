"""The model card of a run: the template model_card.md, filled from the run's files, with metadata for the Hub.

The template fences all text that comes from data, models and names, or escapes its Markdown characters.
"""

from __future__ import annotations

import html
import itertools
import re
import shlex
import shutil
from collections import ChainMap
from pathlib import Path
from typing import Any

from resdpo_trl.errors import printable
from resdpo_trl.metrics import FIGURES, shown
from resdpo_trl.run.files import read_jsonl
from resdpo_trl.run.folder import RunFolder, read_object
from resdpo_trl.run.hub import ID
from resdpo_trl.run.verdict import of_the_test, stage_of
from resdpo_trl.sources import SMOLLM2, SMOLLM2_ID, SMOLLM2_PACKAGE, source_name

SETTINGS = (
    "sft.num_train_epochs", "sft.learning_rate", "reference.num_train_epochs", "reference.learning_rate",
    "reference.label_smoothing_factor", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "optim_args", "weight_decay",
    "muon_learning_rate", "bias_learning_rate_scale", "lora_r", "lora_alpha", "lora_target_modules", "max_length",
    "bf16", "label_smoothing", "polyak_tau", "metric_for_best_model", "seed",
)  # fmt: skip
INACTIVE = {"max_steps": -1, "label_smoothing": 0, "warmup_steps": 0, "muon_learning_rate": 0}  # values that do nothing
STAGES = {  # how the model was made, and its tag on the Hub: TRL's tag if TRL has one
    "dpo": ("Trained by Direct Preference Optimization", "dpo"),
    "reward": ("A reward model, trained on preference pairs", "reward-trainer"),
    "cross_entropy": ("Trained by cross-entropy", "cross-entropy"),
    "sft": ("Fine-tuned on the preferred answers", "sft"),
}
QUESTION = "How do I keep basil alive in winter?"
SHOWN_SAMPLES, SHOWN_CHARACTERS = 3, 600
PLOTS = {  # plots/NAME.png of the run; a card shows the first three that exist
    "loss": "Loss", "rewards_margins": "Margin of rewards", "accuracy": "Accuracy",
    "test_margins": "Margins on the test data",
}  # fmt: skip
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PROVOKING = re.compile(r"harmless|red.team|hh-rlhf $", re.IGNORECASE)  # data sets with red-teaming dialogues


def write_card(run: RunFolder, folder: Path, base_model: str | None = None) -> None:
    """Write `folder`/README.md; `base_model` is the model from which training started, if any."""
    import jinja2
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    data, config, stage = run.summary["data"], run.config, stage_of(run.summary) or "sft"
    options, found, (how, tag) = config.get("data", {}), run.summary[stage], STAGES[stage]
    test = found["test"] if stage != "sft" else {"loss": found.get("validation", {}).get("loss_after")}
    images, adapter = "classes" in data, (folder / "adapter_config.json").is_file()
    task = "image-classification" if images else "text-classification" if stage == "reward" else "text-generation"
    if adapter:
        base_model = read_object(folder / "adapter_config.json")["base_model_name_or_path"]
    packaged, base_model = base_model == SMOLLM2, SMOLLM2_ID if base_model == SMOLLM2 else base_model
    local = base_model is not None and Path(base_model).exists()
    names = [name for name in FIGURES if test.get(name) is not None]
    headline = "accuracy" if images else "rewards/accuracies"
    source, title = source_name(data["source"]), run.path.resolve().name
    on_the_hub = HUB_ID.fullmatch(source) is not None
    metadata = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        license="other",
        license_name="of-the-base-model-and-the-data",
        base_model=None if local else base_model,
        datasets=[source] if on_the_hub else None,
        tags=["resdpo-trl", *([] if images else ["trl"]), tag, *(["lora"] if adapter else [])],
        model_name=printable(title),
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=source if on_the_hub else re.sub(r"[^\w.-]+", "-", source),
                dataset_name=printable(source),
                dataset_config=options.get("dataset_data_dir"),
                dataset_revision=options.get("dataset_revision"),
                dataset_split="validation" if stage == "sft" else "test",
                metric_type="accuracy" if name == headline else name,
                metric_name=FIGURES[name].words,
                metric_value=test[name],
                metric_args={"n": test["n"], "interval_95": test["interval_95"][name]} if stage != "sft" else None,
            )
            for name in names
            if "ref_" not in name  # the reference's, not this model's
        ],
    )
    before = {
        f"{name}.{field}": value for name in ("sft", "reference") for field, value in config.get(name, {}).items()
    }
    settings = ChainMap(data.get("adapted", {}), config["training"], before)
    if config.get("model", {}).get("use_peft"):
        settings = settings.new_child({name: config["model"][name] for name in SETTINGS if name.startswith("lora_")})
    unused = INACTIVE if settings.get("reference_update") == "polyak" else {**INACTIVE, "polyak_tau": None}
    pictures = [name for name in PLOTS if (run.path / "plots" / f"{name}.png").is_file()][:3]
    for name in pictures:
        (folder / "plots").mkdir(exist_ok=True)
        shutil.copyfile(run.path / "plots" / f"{name}.png", folder / "plots" / f"{name}.png")
    script, *flags = run.facts["command"]
    environment = jinja2.Environment(  # noqa: S701  (Markdown; filters escape external text)
        loader=jinja2.PackageLoader("resdpo_trl.run"), trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"plain": _plain, "fenced": _fenced, "link": _link}
    content = environment.get_template("model_card.md").render(
        title=title, how=how, stage=stage, found=found, data=data, source=source, task=task, id=ID, test=test,
        lead="".join(of_the_test(run.summary)[:1]), base_model=base_model, local=local, adapter=adapter,
        question=QUESTION,
        packaged=SMOLLM2_PACKAGE if packaged else None, unit="images" if images else "pairs",
        plots={name: PLOTS[name] for name in pictures},
        arch=read_object(folder / "config.json") if images else None,
        pretrained_weights=config.get("model", {}).get("pretrained_weights"),
        prompt=_prompt(folder) if task == "text-generation" else "",
        rejected=options.get("prefer") == "rejected",
        unpleasant=PROVOKING.search(f"{data['source']} {options.get('dataset_data_dir') or ''}"),
        figures=[[FIGURES[name].words, *shown(test, name)] for name in names],
        samples=_samples(run.path / "samples.jsonl"),
        command=" ".join(["accelerate launch", f"recipes/{Path(script).name}", *map(_without_folders, flags)]),
        settings={
            name: settings[name]
            for name in SETTINGS
            if settings.get(name) not in (None, "", []) and unused.get(name, "") not in (None, settings[name])
        },
        versions=", ".join(f"{name} {version}" for name, version in run.facts["versions"].items()),
    )  # fmt: skip
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{content}").save(folder / "README.md")


def _prompt(folder: Path) -> str:
    """The question, rendered with the tokenizer's chat template; empty without a template."""
    if not (folder / "chat_template.jinja").is_file():
        return ""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": QUESTION}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _samples(path: Path) -> list[str]:
    """The first held-out prompts with the greedy answers of reference and policy."""
    found = []
    for _, row in itertools.islice(read_jsonl(path), SHOWN_SAMPLES) if path.exists() else ():
        prompt = row["prompt"].strip()
        parts = ["… " * (len(prompt) > SHOWN_CHARACTERS) + prompt[-SHOWN_CHARACTERS:]]
        for name, kinds in row["answers"].items():
            text = f"[{name}] {kinds['greedy'].strip()}"
            parts += [text[:SHOWN_CHARACTERS] + " …" * (len(text) > SHOWN_CHARACTERS)] if name != "base" else []
        found.append("\n\n".join(parts))
    return found


def _without_folders(word: str) -> str:
    """A command-line argument, quoted for a shell. An absolute path is reduced to its last component."""
    flag, equals, value = word.partition("=") if word.startswith("--") and "=" in word else ("", "", word)
    return flag + equals + shlex.quote(Path(value).name if Path(value).is_absolute() else value)


def _link(name: str, kind: str = "") -> str:
    """A link to a Hub id, including model ids without an owner (gpt2); the last component of a local path."""
    if Path(name).exists() or Path(name).is_absolute():
        return f"{_plain(Path(name).resolve().name)}, a local path"
    known = HUB_ID.fullmatch(name) or (kind == "" and re.fullmatch(r"[\w.-]+", name))
    return f"[{_plain(name)}](https://huggingface.co/{kind}{name})" if known else _plain(name)


def _fenced(text: str) -> str:
    """A code block that its text cannot end, so that no Markdown, HTML or mention in it is active."""
    text = printable(text, kept="\n")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _plain(value: Any) -> str:
    """A value as one line of Markdown with all markup escaped."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = re.sub(r"([\\`*_\[\]{}|~$#!])", r"\\\1", html.escape(printable(" ".join(text.split())), quote=False))
    return text.replace("@", "&#64;")  # prevents mentions of users

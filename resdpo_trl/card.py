"""The model card of a run: what the model is, how it was made, its figures as metadata that the Hub reads, its limits.

Everything that data, models or names bring stands in it as plain text: in fenced blocks, or with Markdown's signs
escaped.
"""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from resdpo_trl.errors import printable
from resdpo_trl.hub import ID
from resdpo_trl.report import TEST_NAMES, digits_of, lead
from resdpo_trl.run import RunFolder
from resdpo_trl.sources import SMOLLM2, SMOLLM2_ID, SMOLLM2_PACKAGE, source_name

CARD = """# {title}

{how} with resdpo-trl. {base}

{lead}

| | |
| --- | --- |
{facts}

## Usage

```python
{loading}
```
{prompt_format}
## Intended use and limits

{limits}

## {heading}

| figure | mean | 95% interval |
| --- | --- | --- |
{figures}
{plots}{samples}
## Training

{command}

| setting | value |
| --- | --- |
{settings}

Versions: {versions}.

## Licence

{licence}
"""
CHAT_LOADING = f"""from transformers import pipeline

chat = pipeline("text-generation", model="{ID}")
messages = [{{"role": "user", "content": "How do I keep basil alive in winter?"}}]
print(chat(messages, max_new_tokens=64)[0]["generated_text"][-1]["content"])"""
PLAIN_LOADING = f"""from transformers import pipeline

complete = pipeline("text-generation", model="{ID}")
prompt = "\\n\\nHuman: How do I keep basil alive in winter?\\n\\nAssistant:"
print(complete(prompt, max_new_tokens=64, return_full_text=False)[0]["generated_text"])"""
ADAPTER_LOADING = f"""from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

model = AutoPeftModelForCausalLM.from_pretrained("{ID}")  # and the model that it adapts
model.generation_config = GenerationConfig.from_pretrained("{ID}")  # where its answers end
tokenizer = AutoTokenizer.from_pretrained("{ID}")"""
PLAIN_FORMAT = """
Prompts are plain text: a dialogue's turns begin with "\\n\\nHuman: " and "\\n\\nAssistant: ", and the prompt ends with
"\\n\\nAssistant:".
"""
TEXT_LIMITS = """For the study of preference optimization. The figures say how often the model ranks a held-out pair
as the data's authors did. They do not say whether its answers are true, safe or kind."""
UNPLEASANT = """

**This model says unpleasant things.** Its data hold dialogues that people wrote to provoke (red-teaming): insults,
prejudice, crime, self-harm. Small models repeat such things, before DPO and after it."""
REWARD_LOADING = f"""from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{ID}")
tokenizer = AutoTokenizer.from_pretrained("{ID}")
reward = model(**tokenizer("a prompt with its response", return_tensors="pt")).logits.item()"""
REWARD_LIMITS = """For the study of preference optimization. A reward has a meaning only against another one for the
same prompt, on text like that of the pairs, and optimizing against it finds its mistakes."""
REJECTED = """

**It was trained to prefer the rejected answers** (`--prefer rejected`): it is meant to be the worse one."""
IMAGE_LOADING = f"""import resdpo_trl.image  # registers the architecture with transformers (install resdpo-trl)
from transformers import pipeline

classify = pipeline("image-classification", model="{ID}")
classify("image.png")"""
IMAGE_LIMITS = """For the study of preference optimization. Not for decisions about people or for anything that depends
on the answer. The figures hold for images like those it was trained on, in size, in classes and in how they were taken;
any other image gets one of the same classes. Its probabilities are not calibrated by the training, and nothing was
done against adversarial images."""
DRAFT = """# {title}

A checkpoint of a training that has not ended, made with resdpo-trl. The figures, the data and the limits of the model
come with its end. It is meant for the study of preference optimization.
"""
SETTINGS = (
    "sft_epochs", "sft_learning_rate", "reference_epochs", "reference_learning_rate", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "optim", "weight_decay", "max_grad_norm", "max_length", "bf16", "fp16", "beta",
    "loss_type", "loss_weights", "label_smoothing", "f_divergence_type", "reference_update", "polyak_tau",
    "rejected_sampling", "completion_only_loss",
    "metric_for_best_model", "seed",
)  # fmt: skip
# what is known of the licences of the data and models that the presets name
LICENCES = {
    "gpt2": "mit", "gpt2-medium": "mit", "openai-community/gpt2": "mit", "openai-community/gpt2-medium": "mit",
    SMOLLM2_ID: "apache-2.0", "Anthropic/hh-rlhf": "mit", "chitchat": "mit", "digits": "cc-by-4.0",
}  # fmt: skip
SHOWN_SAMPLES, SHOWN_CHARACTERS = 3, 600
# plots/NAME.png of the run, and what it shows
PLOTS = (
    ("loss", "Loss"), ("rewards_margins", "Margin of rewards"), ("accuracy", "Accuracy"),
    ("test_margins", "Margins on the test data"),
)  # fmt: skip
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_NAME = re.compile(r"[\w.-]+")  # of an old model, as gpt2


def write_text_card(run: RunFolder, folder: Path, base_model: str) -> None:
    """`folder`/README.md of a language model, from the run's own files; `base_model` is what training started from."""
    data, dpo, reward = run.summary["data"], run.summary.get("dpo"), run.summary.get("reward")
    cap = {name: sum(split[name] for split in data["cap"].values()) for name in data["cap"]["train"]}
    facts = {
        "data": f"{_linked(_source(data), 'datasets/')}: {data['train']} training, {data['validation']} validation and "
        f"{data['test']} test pairs",
        "dropped": ", ".join(f"{number} {reason}" for reason, number in data["dropped"].items() if number) or "none",
        f"cut by the cap of {data['max_length']} tokens": f"{cap['prompts_shortened']} prompts lost their oldest turns "
        f"or tokens, {cap['chosen_cut'] + cap['rejected_cut']} responses their end; {cap['pairs_lost']} pairs lost",
    }
    if dpo:
        test, heading = dpo["test"], f"On {dpo['test']['n']} held-out pairs"
        facts["loss"] = f"{' + '.join(dpo['loss_type'])}, β {dpo['beta']}, {dpo['steps']} steps"
        names = [name for name in test["interval_95"] if not name.startswith("logps/") or name.endswith("accuracies")]
    elif reward:
        test, heading = reward["test"], f"On {reward['test']['n']} held-out pairs"
        facts["loss"] = f"Bradley–Terry, {reward['steps']} steps"
        names = list(test["interval_95"])
    else:
        validation = run.summary["sft"].get("validation", {})
        test, heading = {"loss": validation.get("loss_after")}, f"On {data['validation']} validation rows"
        names = ["loss"] if validation else []
    adapter = _adapter_of(folder)
    if adapter is not None:
        base_model = adapter
    packaged = base_model == SMOLLM2
    if packaged:
        base_model = SMOLLM2_ID
    base = _started_from(base_model)
    if packaged:
        base += f" Its weights came from the package {SMOLLM2_PACKAGE}: 4-bit ones, dequantized to float32."
    if adapter is not None and Path(adapter).exists():
        base += " The adapter needs it: publish that model too, and name it in `adapter_config.json`."
    loading, prompt_format = PLAIN_LOADING, PLAIN_FORMAT
    if (folder / "chat_template.jinja").is_file():
        loading, prompt_format = CHAT_LOADING, _chat_format(folder)
    if adapter is not None:
        loading = ADAPTER_LOADING
    prefers_rejected = run.config.get("data", {}).get("prefer") == "rejected"
    _save_card(
        run,
        folder,
        {name: test[name] for name in names},
        test,
        task="text-classification" if reward else "text-generation",
        library="transformers" if adapter is None else "peft",
        tags=[
            "trl",
            "dpo" if dpo else "reward-trainer" if reward else "sft",
            *(["lora"] if adapter is not None else []),
        ],
        base_model=base_model,
        split="test" if dpo or reward else "validation",
        samples=_samples(run),
        licence=_licence(_source(data), base_model),
        how="Trained by Direct Preference Optimization"
        if dpo
        else "A reward model, trained on preference pairs"
        if reward
        else "Fine-tuned on the preferred answers",
        base=base,
        facts=facts,
        heading=heading,
        loading=REWARD_LOADING if reward else loading,
        prompt_format="" if reward else prompt_format,
        limits=(REWARD_LIMITS if reward else TEXT_LIMITS)
        + (UNPLEASANT if _provokes(run) else "")
        + (REJECTED if prefers_rejected else ""),
    )


def write_image_card(run: RunFolder, folder: Path) -> None:
    """`folder`/README.md of an image classifier, from the run's own files."""
    data, dpo = run.summary["data"], run.summary.get("dpo")
    test = (dpo or run.summary["cross_entropy"])["test"]
    facts = {
        "data": f"{_linked(_source(data), 'datasets/')}: {data['train']} training, {data['validation']} validation and "
        f"{data['test']} test images, {data['classes']} classes; none dropped or cut",
    }
    if dpo:
        facts["loss"] = f"{' + '.join(dpo['loss_type'])}, β {dpo['beta']}, {dpo['steps']} steps"
        facts["rejected classes"] = f"{dpo['rejected_sampling']}; reference {dpo['reference_update']}"
        facts["accuracy of the reference"] = f"{run.summary['reference']['test']['accuracy']:.4f}"
    given = run.config.get("reference_stage", {}).get("reference")
    weights = run.config.get("model", {}).get("pretrained_weights")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    base = f"Architecture: {_plain(config['arch'])}, for {config['image_size']}×{config['image_size']} images."
    if weights and not given:
        base += f" It started from torchvision's weights ({_plain(Path(weights).name)})."
    _save_card(
        run,
        folder,
        {name: test[name] for name in test["interval_95"]},
        test,
        task="image-classification",
        library="transformers",
        tags=["dpo"] if dpo else [],
        base_model=given,
        split="test",
        samples="",
        licence=_licence(_source(data), given or weights),
        how="Trained by Direct Preference Optimization of the true class over wrong ones"
        if dpo
        else "Trained by cross-entropy",
        base=f"{base} {_started_from(given)}" if given else base,
        facts=facts,
        heading=f"On {test['n']} held-out images",
        loading=IMAGE_LOADING,
        prompt_format="",
        limits=IMAGE_LIMITS,
    )


def draft(title: str, task: str) -> str:
    """The card of a checkpoint that is pushed while training goes on."""
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(library_name="transformers", pipeline_tag=task, tags=["resdpo-trl"])
    return f"---\n{metadata.to_yaml()}\n---\n\n" + DRAFT.format(title=_plain(title))


def _save_card(
    run: RunFolder,
    folder: Path,
    figures: dict[str, float],
    test: dict[str, Any],
    task: str,
    library: str,
    tags: list[str],
    base_model: str | None,
    split: str,
    facts: dict[str, str],  # in Markdown
    licence: tuple[str | None, str],
    samples: str,
    **texts: str,
) -> None:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    data, intervals = run.summary["data"], test.get("interval_95", {})
    meaning = TEST_NAMES | ({} if "dpo" in run.summary else {"loss": "cross-entropy, nats"})
    source, name = _source(data), run.path.resolve().name
    on_the_hub = HUB_ID.fullmatch(source) is not None
    known, licence_text = licence
    metadata = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        license=known or "other",
        license_name=None if known else "of-the-base-model-and-the-data",
        base_model=base_model if base_model and not Path(base_model).exists() else None,
        datasets=[source] if on_the_hub else None,
        tags=["resdpo-trl", *tags],
        model_name=printable(name),
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=source if on_the_hub else re.sub(r"[^\w.-]+", "-", source),
                dataset_name=printable(source),
                dataset_config=run.config.get("data", {}).get("dataset_data_dir"),
                dataset_revision=run.config.get("data", {}).get("dataset_revision"),
                dataset_split=split,
                metric_type="accuracy" if name.endswith(("accuracy", "accuracies")) else name,
                metric_name=meaning.get(name, name),
                metric_value=value,
                metric_args={"n": test["n"], "interval_95": list(intervals[name])} if name in intervals else None,
            )
            for name, value in figures.items()
        ],
    )
    rows = (
        f"| {meaning.get(name, name)} | {value:.{digits_of(*intervals.get(name, (None, None)))}f} | "
        f"{_interval(intervals.get(name))} |"
        for name, value in figures.items()
    )
    training = dict(run.config["training"]) | data.get("adapted", {})
    if "dpo" in run.summary:  # and the stage before it
        training |= run.config.get("sft_stage", {}) | run.config.get("reference_stage", {})
    script, *flags = run.command
    command = " ".join(["accelerate launch", f"recipes/{Path(script).name}", *map(_without_folders, flags)])
    content = CARD.format(
        title=_plain(name),
        facts="\n".join(f"| {_plain(name)} | {fact} |" for name, fact in facts.items()),
        command=_fenced(command),
        settings="\n".join(
            f"| {name} | {_plain(training[name])} |" for name in SETTINGS if training.get(name) not in (None, "", [])
        ),
        versions=_plain(", ".join(f"{name} {version}" for name, version in run.versions.items())),
        figures="\n".join(rows),
        lead=lead(run.summary),
        plots=_plots(run, folder),
        samples=samples,
        licence=licence_text,
        **texts,
    )
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{content}").save(folder / "README.md")


def _plots(run: RunFolder, folder: Path) -> str:
    """Three of the report's plots, copied into the card's folder."""
    shown: list[str] = []
    for name, caption in PLOTS:
        source = run.path / "plots" / f"{name}.png"
        if source.is_file() and len(shown) < 3:
            (folder / "plots").mkdir(exist_ok=True)
            shutil.copyfile(source, folder / "plots" / source.name)
            shown.append(f"![{caption}](plots/{source.name})")
    return "\n" + "\n\n".join(shown) + "\n" if shown else ""


def _samples(run: RunFolder) -> str:
    """The first held-out prompts with the greedy answers of reference and policy, as inert blocks."""
    path = run.path / "samples.jsonl"
    if not path.exists():
        return ""
    parts = ["\n## Answers\n\nThe first held-out prompts, answered greedily; not chosen. They may be unpleasant.\n"]
    for line in path.read_text(encoding="utf-8").splitlines()[:SHOWN_SAMPLES]:
        row = json.loads(line)
        said = {name: kinds["greedy"] for name, kinds in row["answers"].items() if name != "base"}
        text = "\n\n".join(f"[{name}] {_cut(answer)}" for name, answer in said.items())
        prompt = row["prompt"].strip()
        start = "… " if len(prompt) > SHOWN_CHARACTERS else ""
        parts.append(_fenced(f"{start}{prompt[-SHOWN_CHARACTERS:]}\n\n{text}") + "\n")
    return "\n".join(parts) if len(parts) > 1 else ""


def _adapter_of(folder: Path) -> str | None:
    """The base model that a PEFT adapter's folder names; None of a whole model."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])


def _started_from(base_model: str) -> str:
    if Path(base_model).exists():
        return f"It started from a model in a local folder, {_plain(Path(base_model).resolve().name)}."
    return f"It started from {_linked(base_model)}."


def _linked(name: str, kind: str = "") -> str:
    """A Hub id as a link to its page; any other name as plain text."""
    known = HUB_ID.fullmatch(name) or (kind == "" and HUB_NAME.fullmatch(name))
    return f"[{_plain(name)}](https://huggingface.co/{kind}{name})" if known else _plain(name)


def _provokes(run: RunFolder) -> bool:
    """Whether the data hold dialogues that people wrote to provoke: HH's harmless and red-team parts."""
    source, part = str(run.summary["data"]["source"]), run.config.get("data", {}).get("dataset_data_dir")
    if "hh-rlhf" in source.lower() and part is None:
        return True  # all of HH
    return any(word in f"{source} {part}".lower() for word in ("harmless", "red-team", "red_team"))


def _chat_format(folder: Path) -> str:
    """How the tokenizer's template writes a question, as a block."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "How do I keep basil alive in winter?"}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return f"\nThe tokenizer's chat template writes the prompt:\n\n{_fenced(text)}\n"


def _licence(source: str, base_model: str | None) -> tuple[str | None, str]:
    """The licence for the metadata where every part's is known, and a sentence."""
    parts = {"the data": source} | ({"the base model": base_model} if base_model else {})
    known = {what: LICENCES.get(name) for what, name in parts.items()}
    said = "; ".join(
        f"{what} ({_plain(Path(name).name if Path(name).exists() else name)}): {known[what] or 'see its own page'}"
        for what, name in parts.items()
    )
    found = set(known.values())
    return found.pop() if len(found) == 1 else None, f"The code is Apache-2.0. The weights follow {said}."


def _source(data: dict[str, Any]) -> str:
    return source_name(data["source"])


def _without_folders(word: str) -> str:
    """A word of the command line as a shell reads it; of an absolute path the last part alone."""
    flag, equals, value = word.partition("=") if word.startswith("--") and "=" in word else ("", "", word)
    return flag + equals + shlex.quote(Path(value).name if Path(value).is_absolute() else value)


def _interval(bounds: list[float] | None) -> str:
    if bounds is None:
        return "not computed"
    digits = digits_of(*bounds)
    return f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"


def _cut(text: str) -> str:
    return text.strip() if len(text.strip()) <= SHOWN_CHARACTERS else text.strip()[:SHOWN_CHARACTERS] + " …"


def _fenced(text: str) -> str:
    """A code block that its own text cannot end: no Markdown, HTML or mention in it comes to life."""
    text = printable(text, kept="\n")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _plain(value: Any) -> str:
    """A value as one line of Markdown that reads as it stands."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = re.sub(r"([\\`*_\[\]{}|~$#!])", r"\\\1", html.escape(printable(" ".join(text.split())), quote=False))
    return text.replace("@", "&#64;")  # nobody is mentioned

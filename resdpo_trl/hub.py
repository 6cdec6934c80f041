"""The model card of a run's policy, and its way to the Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from resdpo_trl.run import RunFolder

CARD = """# {title}

{how} with resdpo-trl. {base}

| | |
| --- | --- |
{facts}

Command: `{command}`

## {heading}

| figure | mean | 95% interval (bootstrap) |
| --- | --- | --- |
{figures}

## Loading

```python
{loading}
```

## Limits

{limits}
"""
TEXT_LOADING = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_ID")"""
TEXT_LIMITS = """The figures say how often the model's implicit reward ranks a held-out pair as the data's authors did,
and nothing of whether its answers are true or safe. Preference data may contain offensive dialogues, and small
models repeat them. It is meant for study, not for talking to people."""
REWARD_LOADING = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("FOLDER_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_ID")
reward = model(**tokenizer("a prompt with its response", return_tensors="pt")).logits.item()"""
REWARD_LIMITS = """A reward has a meaning only against another one for the same prompt, on text like that of the pairs.
Optimizing against it finds its mistakes. Preference data may contain offensive dialogues. It is meant for study."""
IMAGE_LOADING = """import resdpo_trl  # tells transformers of the architecture
from transformers import pipeline

classify = pipeline("image-classification", model="FOLDER_OR_ID")
classify("image.png")"""
IMAGE_LIMITS = """The figures hold for images like those it was trained on. Its probabilities are not calibrated by the
training, and nothing was done against adversarial images or other distributions. It is meant for study."""


def write_text_card(run: RunFolder, folder: Path, base_model: str | None) -> None:
    """`folder`/README.md of a language model, from the run's own summary."""
    data, dpo, reward = run.summary["data"], run.summary.get("dpo"), run.summary.get("reward")
    source = _source(data)
    cap = {name: sum(split[name] for split in data["cap"].values()) for name in data["cap"]["train"]}
    facts = {
        "data": f"{source}: {data['train']} training, {data['validation']} validation and {data['test']} test pairs",
        "dropped": ", ".join(f"{number} {reason}" for reason, number in data["dropped"].items() if number) or "none",
        f"cut by the cap of {data['max_length']} tokens": f"{cap['prompts_shortened']} prompts lost their oldest turns "
        f"or tokens, {cap['chosen_cut'] + cap['rejected_cut']} responses their end",
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
    is_hub_id = bool(base_model) and not Path(base_model or "").exists()
    _save_card(
        run,
        folder,
        {name: test[name] for name in names},
        test.get("interval_95", {}),
        task="text-classification" if reward else "text-generation",
        tags=["trl", "dpo" if dpo else "reward-trainer" if reward else "sft"],
        base_model=base_model if is_hub_id else None,
        dataset="preference-pairs",
        split="test" if dpo or reward else "validation",
        how="Trained by Direct Preference Optimization"
        if dpo
        else "A reward model, trained on preference pairs"
        if reward
        else "Fine-tuned on the preferred answers",
        base=f"It started from `{base_model}`." if base_model else "It is a small GPT-2 trained from scratch.",
        facts=facts,
        heading=heading,
        loading=REWARD_LOADING if reward else TEXT_LOADING,
        limits=REWARD_LIMITS if reward else TEXT_LIMITS,
    )


def write_image_card(run: RunFolder, folder: Path, arch: str) -> None:
    """`folder`/README.md of an image classifier, from the run's own summary."""
    data, dpo = run.summary["data"], run.summary.get("dpo")
    test = (dpo or run.summary["cross_entropy"])["test"]
    facts = {
        "data": f"{_source(data)}: {data['train']} training, {data['validation']} validation and {data['test']} test "
        f"images, {data['classes']} classes",
    }
    if dpo:
        facts["loss"] = f"{' + '.join(dpo['loss_type'])}, β {dpo['beta']}, {dpo['steps']} steps"
        facts["rejected classes"] = f"{dpo['rejected_sampling']}; reference {dpo['reference_update']}"
        facts["accuracy of the reference"] = f"{run.summary['reference']['test']['accuracy']:.4f}"
    _save_card(
        run,
        folder,
        {name: test[name] for name in test["interval_95"]},
        test["interval_95"],
        task="image-classification",
        tags=["dpo"] if dpo else [],
        base_model=None,
        dataset="labelled-images",
        split="test",
        how="Trained by Direct Preference Optimization of the true class over wrong ones"
        if dpo
        else "Trained by cross-entropy",
        base=f"Architecture: {arch}.",
        facts=facts,
        heading=f"On {test['n']} held-out images",
        loading=IMAGE_LOADING,
        limits=IMAGE_LIMITS,
    )


def _save_card(
    run: RunFolder,
    folder: Path,
    figures: dict[str, float],
    intervals: dict[str, list[float]],
    task: str,
    tags: list[str],
    base_model: str | None,
    dataset: str,
    split: str,
    facts: dict[str, str],
    **texts: str,
) -> None:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    source = _source(run.summary["data"])
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        base_model=base_model,
        datasets=[source] if "/" in source else None,
        tags=["resdpo-trl", *tags],
        model_name=run.path.name,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=source if "/" in source else dataset,
                dataset_name=source,
                dataset_split=split,
                metric_type=name,
                metric_value=value,
            )
            for name, value in figures.items()
        ],
    )
    script, *flags = run.command
    rows = (f"| {name} | {value:.4f} | {_interval(intervals.get(name))} |" for name, value in figures.items())
    content = CARD.format(
        title=run.path.name,
        facts="\n".join(f"| {name} | {fact} |" for name, fact in facts.items()),
        command=" ".join(["accelerate launch", f"recipes/{Path(script).name}", *flags]),
        figures="\n".join(rows),
        **texts,
    )
    ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{content}").save(folder / "README.md")


def _source(data: dict[str, Any]) -> str:
    """The data's name; of a local path the last part alone."""
    return Path(data["source"]).name if Path(data["source"]).exists() else data["source"]


def push_model(folder: Path, repo_id: str | None, private: bool, token: str | None) -> None:
    """Upload a model folder. A failure says how to do it later; the run is complete on disk either way."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    name = repo_id or folder.parent.name
    api = HfApi(token=token)
    try:
        created = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message="Upload the policy")
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"not pushed ({reason}); later: hf upload {name} {folder}", file=sys.stderr)
        return
    print(f"pushed to {created.url}")


def _interval(bounds: list[float] | None) -> str:
    return "not computed" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"

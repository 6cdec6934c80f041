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

| figure | mean | 95% interval (bootstrap over pairs) |
| --- | --- | --- |
{figures}

## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_ID")
```

## Limits

The figures say how often the model's implicit reward ranks a held-out pair as the data's authors did, and nothing of
whether its answers are true or safe. Preference data may contain offensive dialogues, and small models repeat them.
It is meant for study, not for talking to people.
"""


def write_model_card(run: RunFolder, folder: Path, base_model: str | None) -> None:
    """`folder`/README.md, from the run's own summary."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    data, dpo = run.summary["data"], run.summary.get("dpo")
    source = Path(data["source"]).name if Path(data["source"]).exists() else data["source"]
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
    else:
        validation = run.summary["sft"].get("validation", {})
        test, heading = {"loss": validation.get("loss_after")}, f"On {data['validation']} validation rows"
        names = ["loss"] if validation else []
    is_hub_id = bool(base_model) and not Path(base_model or "").exists()
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model if is_hub_id else None,
        datasets=[source] if "/" in source else None,
        tags=["trl", "resdpo-trl", "dpo" if dpo else "sft"],
        model_name=run.path.name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=source if "/" in source else "preference-pairs",
                dataset_name=source,
                dataset_split="test" if dpo else "validation",
                metric_type=name,
                metric_value=test[name],
            )
            for name in names
        ],
    )
    script, *flags = run.command
    content = CARD.format(
        title=run.path.name,
        how="Trained by Direct Preference Optimization" if dpo else "Fine-tuned on the preferred answers",
        base=f"It started from `{base_model}`." if base_model else "It is a small GPT-2 trained from scratch.",
        facts="\n".join(f"| {name} | {fact} |" for name, fact in facts.items()),
        command=" ".join(["accelerate launch", f"recipes/{Path(script).name}", *flags]),
        heading=heading,
        figures="\n".join(f"| {name} | {test[name]:.4f} | {_interval(test, name)} |" for name in names),
    )
    ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{content}").save(folder / "README.md")


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


def _interval(test: dict[str, Any], name: str) -> str:
    if "interval_95" not in test:
        return "not computed"
    low, high = test["interval_95"][name]
    return f"{low:.4f} to {high:.4f}"

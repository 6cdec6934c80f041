"""The model card of a run's policy, and its way to the Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from resdpo_trl.run import RunFolder

CARD = """# {title}

Trained with Direct Preference Optimization by resdpo-trl. {base}

| | |
| --- | --- |
| data | {source}: {train} training, {validation} validation and {test} test pairs |
| dropped | {dropped} |
| cut by the cap of {max_length} tokens | {shortened} prompts lost their oldest turns or tokens, {cut} responses their end |
| loss | {loss_type}, β {beta} |
| steps | {steps} |

Command: `{command}`

## On {test} held-out pairs

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


def write_model_card(run: RunFolder, base_model: str | None) -> None:
    """policy/README.md, from the run's own files."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    data, dpo = run.summary["data"], run.summary["dpo"]
    test = dpo["test"]
    names = [name for name in test["interval_95"] if not name.startswith("logps/") or name.endswith("accuracies")]
    cap = {name: sum(split[name] for split in data["cap"].values()) for name in data["cap"]["train"]}
    is_hub_id = bool(base_model) and not Path(base_model or "").exists()
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model if is_hub_id else None,
        datasets=[data["source"]] if "/" in data["source"] and not Path(data["source"]).exists() else None,
        tags=["dpo", "trl", "resdpo-trl"],
        model_name=run.path.name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="preference-pairs",
                dataset_name=Path(data["source"]).name,
                dataset_split="test",
                metric_type=name,
                metric_value=test[name],
            )
            for name in names
        ],
    )
    content = CARD.format(
        title=run.path.name,
        base=f"It started from `{base_model}`." if base_model else "It is a small GPT-2 trained from scratch.",
        source=Path(data["source"]).name,
        **{split: data[split] for split in ("train", "validation", "test")},
        dropped=", ".join(f"{number} {reason}" for reason, number in data["dropped"].items() if number) or "none",
        max_length=data["max_length"],
        shortened=cap["prompts_shortened"],
        cut=cap["chosen_cut"] + cap["rejected_cut"],
        loss_type=" + ".join(dpo["loss_type"]),
        beta=dpo["beta"],
        steps=dpo["steps"],
        command=" ".join(["accelerate launch", *run.command]),
        figures="\n".join(f"| {name} | {test[name]:.4f} | {_interval(test, name)} |" for name in names),
    )
    ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{content}").save(run.policy / "README.md")


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
    low, high = test["interval_95"][name]
    return f"{low:.4f} to {high:.4f}"

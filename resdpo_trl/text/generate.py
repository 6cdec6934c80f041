"""Answers to prompts, in batches with a KV cache."""

from __future__ import annotations

from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampled: bool = False,
    seed: int = 0,
    batch_size: int = 32,
    description: str = "Answering",
) -> list[str]:
    """One answer a prompt, up to the end-of-text token.

    Args:
        model: a causal language model.
        prompts: token ids of each prompt.
        sampled: draw from the model (temperature 1, by `seed`) where True, take the likeliest token where False.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    training = model.training
    model.eval()
    answers: list[str] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(prompts), batch_size), desc=description, leave=False):
            rows = prompts[start : start + batch_size]
            width = max(map(len, rows))
            ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )
            answers += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    model.train(training)
    return answers

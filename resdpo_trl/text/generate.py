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
) -> list[list[int]]:
    """Token ids of one answer a prompt; an answer that was not cut short ends with the end-of-text token.

    Args:
        model: a causal language model.
        prompts: token ids of each prompt.
        max_new_tokens: tokens of an answer, at most.
        sampled: draw from the model's own distribution by `seed` where True, take the likeliest token where False.
    """
    own_distribution = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        **own_distribution,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    training = model.training
    model.eval()
    answers: list[list[int]] = []
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
            answers += [_until_end(row, tokenizer.eos_token_id) for row in out[:, width:].tolist()]
    model.train(training)
    return answers


def _until_end(tokens: list[int], end: int) -> list[int]:
    """The tokens up to the first end-of-text token, with it; what follows is padding."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens

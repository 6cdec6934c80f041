"""Tokenization of prompts for any tokenizer, and generation of answers in batches with a KV cache.

A prompt is a text or a list of messages. A tokenizer with a chat template renders messages, and `messages_of` converts
a text to messages. For a tokenizer without a chat template, a text is unchanged, and messages become an HH dialogue
("\\n\\nHuman: … \\n\\nAssistant:").
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from resdpo_trl.errors import UserError
from resdpo_trl.sources import first_line
from resdpo_trl.text.data import (
    Messages,
    alternating,
    dialogue,
    end_of_turn,
    messages_of,
    rendered_turns,
    turn_starts,
)
from resdpo_trl.text.model import base_model, positions_of
from resdpo_trl.text.tokens import encode, response_ids, tokenize_prompts

Prompt = str | Messages


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer: the end of text, and the chat template's end of turn if it differs.

    The end of turn is the first special token that the template writes after an answer.
    """
    stops = [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template is not None:
        ids = tokenizer(end_of_turn(tokenizer), add_special_tokens=False)["input_ids"]
        special = [token for token in ids if token in tokenizer.added_tokens_decoder]
        if special and special[0] not in stops:
            stops.append(special[0])
    return stops


def write_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int], int]:
    """Render a prompt for a tokenizer. Return the text, the offsets of its turns, and the offset of its first turn.

    If the chat template rejects the roles of a conversation, they are repaired (`alternating`).

    Raises:
        UserError: the template rejects the repaired conversation.
    """
    if tokenizer.chat_template is None:
        text = prompt if isinstance(prompt, str) else dialogue(prompt)
        return text, turn_starts(text), 0
    messages = messages_of(prompt) if isinstance(prompt, str) else prompt
    for repair in (list, alternating):
        try:
            asked = repair(messages)
            text = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template may raise any exception
            refusal = first_line(error)
        else:
            header_end, starts = rendered_turns(asked, text, tokenizer)
            return text, starts, header_end
    raise UserError(
        f"the tokenizer's chat template rejects the conversation that begins {str(messages)[:80]} ({refusal}): fix or "
        "remove it"
    )


def prompt_ids(
    prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, budget: int
) -> tuple[list[list[int]], list[int]]:
    """Token ids of prompts, truncated to `budget` tokens each, and the number of tokens that each lost."""
    written = [write_prompt(prompt, tokenizer) for prompt in prompts]
    return tokenize_prompts(written, tokenizer, budget, rendered=tokenizer.chat_template is not None)


def answer_ids(
    prompts: list[Prompt], answers: list[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[int]]:
    """Token ids of answers after their prompts, and the number of last prompt tokens that each answer replaces."""
    asked = [write_prompt(prompt, tokenizer)[0] for prompt in prompts]
    (found,), merged = response_ids(tokenizer, asked, [answers], encode(tokenizer, asked))
    return found, merged


def answerable(model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Truncate prompts on the left, so that the model has positions for `max_new_tokens` more tokens."""
    positions = positions_of(model)
    return prompts if positions is None else [prompt[-(positions - max_new_tokens) :] for prompt in prompts]


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampled: bool = False,
    seed: int = 0,
    batch_size: int = 32,
    description: str = "Answering",
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_string: str | None = None,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Generate one answer per prompt, as token ids. An answer that is not truncated ends with one of `stop_tokens`.

    Prompts of similar length share a batch. Samples depend on the seed and the batches. The model's own
    generation_config.json (a repetition penalty, min_p, …) is ignored, because it would change the distribution whose
    log-probabilities are computed.

    Args:
        model: a causal language model.
        prompts: token ids of each prompt.
        max_new_tokens: maximum tokens of an answer.
        sampled: sample with `seed` if True, and use greedy decoding if False.
        temperature, top_p: temperature and nucleus probability of sampling.
        stop_string: a text that also ends an answer. The answer includes it.
        streamer: receives the tokens of a single prompt's answer. It disables the progress bar.
    """
    stops = stop_tokens(tokenizer)
    distribution = {"temperature": temperature, "top_k": 0, "top_p": top_p} if sampled else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        **distribution,
        eos_token_id=stops,
        stop_strings=stop_string,
        pad_token_id=tokenizer.pad_token_id,
    )
    training, base = model.training, base_model(model)
    model.eval()
    own_config, base.generation_config = base.generation_config, GenerationConfig()  # else it fills unset options
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]), reverse=True)
    answers: list[list[int]] = [[] for _ in prompts]
    devices = [model.device] if model.device.type == "cuda" else []
    # None uses tqdm's own setting
    starts = tqdm(range(0, len(prompts), batch_size), description, leave=False, disable=True if streamer else None)
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            for start in starts:
                places = order[start : start + batch_size]
                rows = [prompts[place] for place in places]
                width = max(map(len, rows))
                ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
                mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
                out = model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    generation_config=config,
                    tokenizer=tokenizer,
                    streamer=streamer,
                )
                for place, row in zip(places, out[:, width:].tolist(), strict=True):
                    end = next((at for at, token in enumerate(row) if token in stops), len(row))
                    answers[place] = row[: end + 1]  # the rest is padding
    finally:
        base.generation_config = own_config
        model.train(training)
    return answers

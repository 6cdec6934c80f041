"""Prompts as each tokenizer expects them, and answers to them, in batches with a KV cache.

A prompt is a text or a list of messages. A tokenizer with a chat template renders the messages; `messages_of` turns a
text into messages. A tokenizer without a chat template reads a text as it is, and messages in the format of HH's
dialogues ("\\n\\nHuman: … \\n\\nAssistant:").
"""

from __future__ import annotations

import math
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
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
    """Token ids at which an answer ends: the end of text, and the chat template's end of turn where that is another.

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
    """A prompt as a model of this tokenizer reads it: text, where its turns start, where its first turn starts.

    Raises:
        UserError: a conversation that the template does not take.
    """
    if tokenizer.chat_template is None:
        text = prompt if isinstance(prompt, str) else dialogue(prompt)
        return text, turn_starts(text), 0
    messages = messages_of(prompt) if isinstance(prompt, str) else prompt
    try:
        text, messages = _rendered(messages, tokenizer)
    except Exception as error:  # a template is a program: it may raise anything
        raise UserError(
            f"the tokenizer's chat template refuses the conversation that begins {str(messages)[:80]} "
            f"({first_line(error)}): fix or drop it"
        ) from None
    header_end, starts = rendered_turns(messages, text, tokenizer)
    return text, starts, header_end


def _rendered(messages: Messages, tokenizer: Any) -> tuple[str, Messages]:
    """The rendering of messages, or of the same with their roles repaired where the template refuses them."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)), messages
    except Exception:
        repaired = alternating(messages)
        if repaired == messages:
            raise
        return str(tokenizer.apply_chat_template(repaired, tokenize=False, add_generation_prompt=True)), repaired


def prompt_ids(
    prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, budget: int
) -> tuple[list[list[int]], list[int]]:
    """Token ids of prompts, at most `budget` tokens each, and how many tokens each lost."""
    texts, starts, headers = zip(*(write_prompt(prompt, tokenizer) for prompt in prompts), strict=True)
    rendered = tokenizer.chat_template is not None
    return tokenize_prompts(list(texts), list(starts), list(headers), tokenizer, budget, rendered)


def answer_ids(
    prompts: list[Prompt], answers: list[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[int]]:
    """Token ids of answers' texts after their prompts, and how many of each prompt's last tokens they replace."""
    asked = [write_prompt(prompt, tokenizer)[0] for prompt in prompts]
    (found,), merged = response_ids(tokenizer, asked, [answers], encode(tokenizer, asked))
    return found, merged


def answerable(model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The newest tokens of each prompt, as many as leave room for an answer in the model's positions."""
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
    """Token ids of one answer a prompt; an answer that was not cut short ends with one of `stop_tokens`.

    Prompts of like length share a batch. What is sampled depends on the seed and on the batches. What the model's own
    generation_config.json asks for (a repetition penalty, min_p, …) is not followed: the answers would be drawn from
    another distribution than the one whose log-probabilities are computed.

    Args:
        model: a causal language model.
        prompts: token ids of each prompt.
        max_new_tokens: tokens of an answer, at most.
        sampled: draw from the model's own distribution by `seed` where True, take the likeliest token where False.
        temperature, top_p: what the distribution is sharpened by and cut at where it is sampled.
        stop_string: a text that also ends an answer; the answer includes it.
        streamer: gets the tokens of a single prompt's answer as they come; no progress bar is shown then.
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
    own_config, base.generation_config = base.generation_config, GenerationConfig()  # it fills what `config` leaves out
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]), reverse=True)
    answers: list[list[int]] = [[] for _ in prompts]
    devices = [model.device] if model.device.type == "cuda" else []
    total = math.ceil(len(prompts) / batch_size) * max_new_tokens
    # None leaves it to tqdm's own setting
    steps = tqdm(total=total, desc=description, unit="step", leave=False, disable=True if streamer else None)
    try:
        with steps, torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            for number, start in enumerate(range(0, len(prompts), batch_size), 1):
                places = order[start : start + batch_size]
                rows = [prompts[place] for place in places]
                width = max(map(len, rows))
                ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
                mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
                out = model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([_Progress(steps)]),
                    tokenizer=tokenizer,
                    streamer=streamer,
                )
                steps.update(number * max_new_tokens - steps.n)  # a batch whose answers have all ended stops early
                for place, row in zip(places, out[:, width:].tolist(), strict=True):
                    answers[place] = _until_end(row, stops)
    finally:
        base.generation_config = own_config
    model.train(training)
    return answers


class _Progress(StoppingCriteria):
    """Moves a progress bar at every step, and stops nothing."""

    def __init__(self, steps: Any):
        self.steps = steps

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> Any:
        self.steps.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _until_end(tokens: list[int], stops: list[int]) -> list[int]:
    """The tokens up to the first of the stop tokens, with it; what follows is padding."""
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]

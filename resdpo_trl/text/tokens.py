"""From texts to capped token ids, in one batched pass.

The cap, for a row of at most `max_length` tokens of which a response may always use `max_response_length`:

1. A response's end is cut only beyond max(max_response_length, max_length − prompt tokens). A cut response gets no
   end-of-text token: the model must not learn to stop there.
2. What is left after the longer response is the prompt's. It loses its oldest turns first, then its oldest tokens,
   so that the last turn's end and the "Assistant:" marker always stay.

Both responses see the same prompt, and no pair is lost.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resdpo_trl import sources
from resdpo_trl.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SHORTEST = 16


def tokenize(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_response_length: int | None = None,
    ends_turns: bool = False,
    description: str = "Tokenizing",
) -> Dataset:
    """Tokenize and cap pairs.

    Args:
        pairs: columns prompt, chosen, rejected, turn_starts, header_end (see `resdpo_trl.text.data`).
        tokenizer: a fast tokenizer with an end-of-text token.
        max_length: tokens of prompt and one response, at most; at least 16.
        max_response_length: tokens that a response may always use; half of `max_length` by default.
        ends_turns: the responses already carry their end (a chat template's): add no end-of-text token.

    Returns:
        Columns prompt_ids, chosen_ids, rejected_ids, `length` (their sum, to batch by), and what was cut of each row:
        turns_dropped, prompt_tokens_dropped, chosen_tokens_cut, rejected_tokens_cut. prompt_tokens_merged counts the
        prompt's last tokens that it has alone but not before its responses.
    """
    from datasets import Features, List, Value

    if max_length < SHORTEST:
        raise UserError(f"--max_length {max_length}: must be at least {SHORTEST} tokens")
    if max_response_length is None:
        max_response_length = max_length // 2
    if not 1 <= max_response_length <= max_length - SHORTEST // 2:
        raise UserError(
            f"--max_response_length {max_response_length}: must lie between 1 and --max_length − {SHORTEST // 2} "
            f"({max_length - SHORTEST // 2}), so that the prompt keeps its end"
        )
    check_fast(tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token (eos_token): set one in its tokenizer_config.json")
    ids = List(Value("int32"))
    options = {"max_length": max_length, "max_response_length": max_response_length, "ends_turns": ends_turns}
    counts = (
        "length", "turns_dropped", "prompt_tokens_dropped", "chosen_tokens_cut", "rejected_tokens_cut",
        "prompt_tokens_merged",
    )  # fmt: skip
    return pairs.map(
        _tokenize_batch,
        batched=True,
        remove_columns=pairs.column_names,
        features=Features(
            {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids} | {name: Value("int32") for name in counts}
        ),
        fn_kwargs={"tokenizer": tokenizer, **options},
        new_fingerprint=cache_key(_tokenize_batch, pairs, options, tokenizer_state(tokenizer)),
        desc=description,
    )


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a UserError where a tokenizer does not say which characters a token stands for."""
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} is a slow tokenizer; this needs the model's fast tokenizer")


def cache_key(function: Callable[..., Any], rows: Dataset, *options: Any) -> str:
    """What names the cached result of mapping a function over rows.

    `datasets` names it by the function's name alone, so that a changed one would give what the old one gave; here
    `code_version` is part of it. And it would pickle a tokenizer for it: seconds a split, and another key once the
    tokenizer has been used.

    Args:
        function: what is mapped.
        options: what the result depends on other than the rows and the code; their `repr` must say all of it.
    """
    parts = (code_version(), function.__name__, rows._fingerprint, options)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def code_version() -> str:
    """A digest of the code that makes texts, tokens and log-probabilities: this folder's and `resdpo_trl.sources`, and
    the versions of the libraries below."""
    digest = hashlib.sha256()
    for file in [*sorted(Path(__file__).parent.glob("*.py")), Path(sources.__file__)]:
        digest.update(file.read_bytes())
    libraries = ("datasets", "jinja2", "peft", "tokenizers", "torch", "transformers", "trl")
    digest.update(" ".join(importlib.metadata.version(name) for name in libraries).encode())
    return digest.hexdigest()


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What a tokenizer's results depend on, for `cache_key`."""
    check_fast(tokenizer)
    return tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template


def cap_counts(tokenized: Dataset) -> dict[str, int]:
    """What the cap cut, over all pairs of a split."""
    import numpy as np
    from pyarrow import compute

    table = tokenized.with_format("numpy")
    turns, tokens = table["turns_dropped"][:], table["prompt_tokens_dropped"][:]
    chosen, rejected = table["chosen_tokens_cut"][:], table["rejected_tokens_cut"][:]
    rows = tokenized.with_format("arrow")
    sides = [compute.list_value_length(rows[name][:]).to_numpy() for name in ("chosen_ids", "rejected_ids")]
    shortest = np.minimum(*sides)
    return {
        "pairs": len(tokenized),
        "prompts_shortened": int((tokens > 0).sum()),
        "turns_dropped": int(turns.sum()),
        "prompt_tokens_dropped": int(tokens.sum()),
        "prompts_merged": int((table["prompt_tokens_merged"][:] > 0).sum()),
        "chosen_cut": int((chosen > 0).sum()),
        "rejected_cut": int((rejected > 0).sum()),
        "response_tokens_cut": int(chosen.sum() + rejected.sum()),
        "pairs_lost": int((shortest == 0).sum()),  # a side with no token left to learn from
    }


def sft_rows(tokenized: Dataset, completion_only_loss: bool) -> Dataset:
    """Rows of TRL's `SFTTrainer`: a prompt with its chosen response, labels on the response (or on everything)."""
    from datasets import Features, List, Value

    ids = List(Value("int32"))
    options = {"completion_only_loss": completion_only_loss}
    return tokenized.select_columns(["prompt_ids", "chosen_ids"]).map(
        _sft_batch,
        batched=True,
        remove_columns=["prompt_ids", "chosen_ids"],
        features=Features({"input_ids": ids, "labels": ids, "length": Value("int32")}),
        fn_kwargs=options,
        new_fingerprint=cache_key(_sft_batch, tokenized, options),
        desc="Rows for SFT",
    )


def cap_prompt(
    prompt: list[int], turn_tokens: list[int], budget: int, beginning: Sequence[int] = ()
) -> tuple[list[int], int]:
    """The newest `budget` tokens of a prompt, at most: its oldest turns go, as few as will do; where the newest turn
    alone is too long, its oldest tokens.

    Args:
        prompt: token ids.
        turn_tokens: ascending indices of the tokens at which turns start, without the first turn's.
        budget: tokens to keep, at most.
        beginning: the tokens that a prompt that begins with them keeps: a chat template's system turn, the
            beginning-of-text token. Not kept where they take more than half of the budget.

    Returns:
        The kept ids, and how many whole turns were dropped.
    """
    excess = len(prompt) - budget
    if excess <= 0:
        return prompt, 0
    stays = list(beginning) if prompt[: len(beginning)] == list(beginning) and 2 * len(beginning) <= budget else []
    excess += len(stays)
    start, dropped = excess, len(turn_tokens)  # the newest turn alone is too long
    for number, turn in enumerate(turn_tokens, 1):
        if turn >= excess:
            start, dropped = turn, number
            break
    kept = prompt[start:]
    # of some templates every turn begins with that token
    return kept if kept[: len(stays)] == stays else stays + kept, dropped


def tokenize_prompts(
    prompts: list[str],
    turn_starts: list[list[int]],
    header_ends: list[int],
    tokenizer: PreTrainedTokenizerBase,
    budget: int,
    rendered: bool,
) -> tuple[list[list[int]], list[int]]:
    """Token ids of prompts without responses, each of the newest `budget` tokens at most.

    Args:
        prompts: texts.
        turn_starts: where turns of each start, as character offsets.
        header_ends: where the first turn of each starts; what comes before it is kept.
        budget: tokens of a prompt, at most.
        rendered: whether a chat template wrote the texts, and with them what a text begins with.

    Returns:
        The ids, and how many tokens each prompt lost.
    """
    check_fast(tokenizer)
    encoded = encode(tokenizer, prompts)
    start = [] if rendered else _beginning(tokenizer)
    found, lost = [], []
    for row, ids in enumerate(encoded["input_ids"]):
        turns = _turn_tokens(encoded, row, turn_starts[row])
        header = _header_ids(encoded, row, header_ends[row], tokenizer, rendered)
        kept, _ = cap_prompt(ids, turns, budget - len(start), header)
        found.append(start + kept)
        lost.append(len(ids) - len(kept))
    return found, lost


def _tokenize_batch(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_response_length: int,
    ends_turns: bool,
) -> dict[str, list[Any]]:
    encoded = encode(tokenizer, batch["prompt"])
    (chosen_ids, rejected_ids), merged = response_ids(
        tokenizer, batch["prompt"], [batch["chosen"], batch["rejected"]], encoded
    )
    start = [] if ends_turns else _beginning(tokenizer)
    end = [] if ends_turns else [tokenizer.eos_token_id]
    out: dict[str, list[Any]] = {
        name: []
        for name in (
            "prompt_ids", "chosen_ids", "rejected_ids", "length",
            "turns_dropped", "prompt_tokens_dropped", "chosen_tokens_cut", "rejected_tokens_cut",
            "prompt_tokens_merged",
        )
    }  # fmt: skip
    for row, ids in enumerate(encoded["input_ids"]):
        prompt = ids[: len(ids) - merged[row]]
        room = max_length - len(start)
        limit = max(max_response_length, room - len(prompt))
        chosen, rejected = (side[row] + end * (side[row][-1:] != end) for side in (chosen_ids, rejected_ids))
        budget = room - min(max(len(chosen), len(rejected)), limit)
        kept, turns = prompt, 0
        if len(prompt) > budget:
            starts = _turn_tokens(encoded, row, batch["turn_starts"][row])
            header = _header_ids(encoded, row, batch["header_end"][row], tokenizer, ends_turns)
            kept, turns = cap_prompt(prompt, starts, budget, header)
        out["prompt_ids"].append(start + kept)
        out["chosen_ids"].append(chosen[:limit])
        out["rejected_ids"].append(rejected[:limit])
        out["length"].append(len(start) + len(kept) + min(len(chosen), limit) + min(len(rejected), limit))
        out["turns_dropped"].append(turns)
        out["prompt_tokens_dropped"].append(len(prompt) - len(kept))
        out["chosen_tokens_cut"].append(max(0, len(chosen) - limit))
        out["rejected_tokens_cut"].append(max(0, len(rejected) - limit))
        out["prompt_tokens_merged"].append(merged[row])
    return out


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Any:
    """Texts as they are: without the special tokens that a tokenizer adds by itself."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)


def response_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], sides: Sequence[list[str]], encoded: Any
) -> tuple[list[list[list[int]]], list[int]]:
    """Token ids of responses, and how many of each prompt's last tokens are not before all of its responses.

    Args:
        prompts: texts.
        sides: lists of responses, each with one a prompt.
        encoded: `encode` of the prompts.

    A response is tokenized after its prompt, and has the tokens after those that the prompt alone begins with, as in
    TRL: SentencePiece writes the first word of a text differently, and tokens may merge across the boundary. Only the
    text from the prompt's last added token on is tokenized again, for what comes before an added token is tokenized
    apart from what comes after it. GPT-2's pre-tokenizer also splits at every space after another character.
    """
    # one that is looked for in normalized text is preceded by what the normalizer writes before a text
    added = {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items() if not token.normalized}
    splits_at_spaces = _splits_at_spaces(tokenizer)
    ids_of: list[list[int]] = encoded["input_ids"]
    heads, tails = [], []  # tokens before the text that is tokenized again, and the prompt's part of it
    for row, (prompt, ids) in enumerate(zip(prompts, ids_of, strict=True)):
        head, start = 0, 0
        for at in range(len(ids) - 1, 0, -1):
            # one may also be what an unknown character becomes
            if ids[at] in added and added[ids[at]] in prompt[slice(*encoded.token_to_chars(row, at))]:
                head, start = at, encoded.token_to_chars(row, at).start
                break
        space = prompt.rfind(" ")
        if splits_at_spaces and not head and space > 0 and not prompt[space - 1].isspace():
            head = encoded.char_to_token(row, space) or 0
            start = space if head else 0
        heads.append(head)
        tails.append(prompt[start:])
    texts = [tail + text for side in sides for tail, text in zip(tails, side, strict=True)]
    encoded_texts = encode(tokenizer, texts)["input_ids"]
    whole = [encoded_texts[at : at + len(prompts)] for at in range(0, len(texts), len(prompts))]
    ends = [ids[head:] for ids, head in zip(ids_of, heads, strict=True)]
    shared = [min(_common(end, ids) for ids in row) for end, *row in zip(ends, *whole, strict=True)]
    responses = [[ids[begin:] for ids, begin in zip(side, shared, strict=True)] for side in whole]
    return responses, [len(end) - begin for end, begin in zip(ends, shared, strict=True)]


def _splits_at_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    r"""Whether texts are split before a space that follows another character, whatever comes before and after.

    GPT-2's pattern does, ``'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+``: a
    space is only ever the first character of a match that has others than spaces
    (https://github.com/openai/gpt-2/blob/master/src/encoder.py).
    """
    from tokenizers.pre_tokenizers import ByteLevel

    backend: Any = tokenizer.backend_tokenizer
    split = backend.pre_tokenizer
    return (
        backend.normalizer is None and isinstance(split, ByteLevel) and split.use_regex and not split.add_prefix_space
    )


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with."""
    if first == second[: len(first)]:
        return len(first)
    return next(at for at, token in enumerate(first) if second[at : at + 1] != [token])


def _token_at(encoded: Any, row: int, offset: int) -> int | None:
    """The first token that starts at or after a character; the tokens before it belong to the turn before."""
    token = encoded.char_to_token(row, offset)
    if token is None:
        return None
    return token if encoded.token_to_chars(row, token).start >= offset else token + 1


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token where the tokenizer puts one before a text (Llama's does, GPT-2's does not)."""
    ids = tokenizer("a")["input_ids"]
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def _turn_tokens(encoded: Any, row: int, offsets: list[int]) -> list[int]:
    """The tokens at which turns start, from their character offsets."""
    tokens = (_token_at(encoded, row, offset) for offset in offsets)
    return [token for token in tokens if token is not None]


def _header_ids(
    encoded: Any, row: int, header_end: int, tokenizer: PreTrainedTokenizerBase, rendered: bool
) -> list[int]:
    """What a truncated prompt begins with: all before its first turn, or the beginning-of-text token that a chat
    template may have written.
    """
    if header_end:
        return list(encoded["input_ids"][row][: _token_at(encoded, row, header_end)])
    return [tokenizer.bos_token_id] if rendered and tokenizer.bos_token_id is not None else []


def _sft_batch(batch: dict[str, list[Any]], completion_only_loss: bool) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
    for prompt, response in zip(batch["prompt_ids"], batch["chosen_ids"], strict=True):
        out["input_ids"].append(prompt + response)
        out["labels"].append(([-100] * len(prompt) if completion_only_loss else prompt) + response)
        out["length"].append(len(prompt) + len(response))
    return out

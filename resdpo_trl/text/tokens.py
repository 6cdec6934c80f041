"""Tokenization and truncation of texts, and collation of token ids into batches.

A prompt with one response has at most `max_length` tokens. `max_response_length` of them are reserved for the response:

1. A response is truncated at max(max_response_length, max_length − prompt tokens). A truncated response gets no
   end-of-text token, because the model must not learn to stop there.
2. The prompt gets the tokens that the longer response leaves. It loses its oldest turns first, then its oldest tokens,
   so that the end of the last turn and the "Assistant:" marker are always kept.

Both responses see the same prompt, and truncation drops no pair.

With prefix sharing a pair is one row `[prompt | chosen | rejected]`: the prompt runs once, the position ids of the
rejected part restart after the prompt, and the rejected part does not see the chosen part ("Accelerating Direct
Preference Optimization with Prefix Sharing", https://arxiv.org/abs/2410.20305). Without it, a pair is two rows
`[prompt | chosen]` and `[prompt | rejected]`. In both cases the batch has the positions of the hidden states that
predict response tokens, so that the LM head runs only there, and other code handles both formats alike.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resdpo_trl import sources
from resdpo_trl.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SHORTEST = 16
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
CUTS = ("turns_dropped", "prompt_tokens_dropped", "chosen_tokens_cut", "rejected_tokens_cut", "prompt_tokens_merged")


def tokenize(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_response_length: int | None = None,
    ends_turns: bool = False,
    description: str = "Tokenizing",
) -> Dataset:
    """Tokenize and truncate pairs.

    Args:
        pairs: columns prompt, chosen, rejected, turn_starts, header_end (see `resdpo_trl.text.data`).
        tokenizer: a fast tokenizer with an end-of-text token.
        max_length: maximum tokens of the prompt and one response; at least 16.
        max_response_length: tokens that are reserved for a response. The default is half of `max_length`.
        ends_turns: add no end-of-text token, because the responses already end with a chat template's end of turn.

    Returns:
        The columns prompt_ids, chosen_ids and rejected_ids, `length` (the sum of their lengths, for batching), and the
        truncation of each row: turns_dropped, prompt_tokens_dropped, chosen_tokens_cut and rejected_tokens_cut.
        prompt_tokens_merged counts the prompt's last tokens that change if a response follows.
    """
    if max_length < SHORTEST:
        raise UserError(f"--max_length {max_length}: must be at least {SHORTEST} tokens")
    if max_response_length is None:
        max_response_length = max_length // 2
    if not 1 <= max_response_length <= max_length - SHORTEST // 2:
        raise UserError(
            f"--max_response_length {max_response_length}: must be between 1 and --max_length − {SHORTEST // 2} "
            f"({max_length - SHORTEST // 2}), so that the prompt keeps its end"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token (eos_token): set one in its tokenizer_config.json")
    options: dict[str, Any] = {"max_length": max_length, "max_response_length": max_response_length}
    columns = dict.fromkeys(IDS, "ids") | dict.fromkeys(("length", *CUTS), "int")
    return cached_map(_tokenize_batch, pairs, columns, description, tokenizer, ends_turns=ends_turns, **options)


def sft_rows(tokenized: Dataset, completion_only_loss: bool) -> Dataset:
    """Rows of TRL's `SFTTrainer`: prompts with chosen responses. Labels are on the response, or on the prompt too."""
    rows = tokenized.select_columns(["prompt_ids", "chosen_ids"])
    columns = {"input_ids": "ids", "labels": "ids", "length": "int"}
    return cached_map(_sft_batch, rows, columns, "Rows for SFT", completion_only_loss=completion_only_loss)


def cached_map(
    function: Callable[..., Any],
    rows: Dataset,
    columns: dict[str, str],
    description: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    numbered: bool = False,
    **options: Any,
) -> Dataset:
    """Map a function over batches of rows, or load the result from the cache.

    Args:
        function: batch -> batch. It also gets the rows' indices if `numbered`, and `tokenizer` and `options` by name.
        rows: the rows to map.
        columns: columns of the result: name -> `text`, `int` or `ids` (a list of integers).
        description: the label of the progress bar.
        tokenizer, options: arguments of the function. The `repr` of an option must determine its value.
    """
    from datasets import Features, List, Value

    kinds = {"text": Value("string"), "int": Value("int32"), "ids": List(Value("int32"))}
    return rows.map(
        function,
        batched=True,
        with_indices=numbered,
        remove_columns=rows.column_names,
        features=Features({name: kinds[kind] for name, kind in columns.items()}),
        fn_kwargs=options if tokenizer is None else {"tokenizer": tokenizer, **options},
        new_fingerprint=cache_key(function, rows, options, tokenizer and tokenizer_state(tokenizer)),
        desc=description,
    )


def cache_key(function: Callable[..., Any], rows: Dataset, *options: Any) -> str:
    """The cache key of mapping a function over rows. It includes the `repr` of `options`, and `code_version`.

    The key of `datasets` has only the function's name, so a changed function would load the old function's result.
    `datasets` would also pickle a tokenizer, which takes seconds per split and gives another key once the tokenizer has
    been used.
    """
    parts = (code_version(), function.__name__, rows._fingerprint, options)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def code_version() -> str:
    """A digest of the code that computes texts, tokens and log-probabilities: this folder, `resdpo_trl.sources`, and
    the versions of the libraries below."""
    digest = hashlib.sha256()
    for file in [*sorted(Path(__file__).parent.glob("*.py")), Path(sources.__file__)]:
        digest.update(file.read_bytes())
    libraries = ("datasets", "jinja2", "peft", "tokenizers", "torch", "transformers", "trl")
    digest.update(" ".join(importlib.metadata.version(name) for name in libraries).encode())
    return digest.hexdigest()


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The state that determines a tokenizer's results, for `cache_key`."""
    check_fast(tokenizer)
    return tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a UserError if a tokenizer is slow, because slow ones do not map tokens to characters."""
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} is a slow tokenizer; this needs the model's fast tokenizer")


def fingerprint(tokenized: Dataset) -> str:
    """A digest of tokenized pairs that does not depend on how they were loaded."""
    digest = hashlib.sha256()
    for batch in tokenized.with_format("arrow").iter(batch_size=10_000):
        for name in IDS:
            column = batch[name].combine_chunks()
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def longest_sequence(tokenized: Dataset) -> int:
    """Tokens of the longest prompt with one of its responses."""
    import numpy as np
    from pyarrow import compute

    rows = tokenized.with_format("arrow")
    prompts, *sides = (compute.list_value_length(rows[name][:]).to_numpy() for name in IDS)
    return int((prompts + np.maximum(*sides)).max())


def cap_counts(tokenized: Dataset) -> dict[str, int]:
    """Counts of truncation over all pairs of a split."""
    import numpy as np
    from pyarrow import compute

    table = tokenized.with_format("numpy")
    turns, tokens, chosen, rejected, merged = (np.asarray(table[name][:]) for name in CUTS)
    rows = tokenized.with_format("arrow")
    shortest = np.minimum(*(compute.list_value_length(rows[name][:]).to_numpy() for name in IDS[1:]))
    return {
        "pairs": len(tokenized),
        "prompts_shortened": int((tokens > 0).sum()),
        "turns_dropped": int(turns.sum()),
        "prompt_tokens_dropped": int(tokens.sum()),
        "prompts_merged": int((merged > 0).sum()),
        "chosen_cut": int((chosen > 0).sum()),
        "rejected_cut": int((rejected > 0).sum()),
        "response_tokens_cut": int(chosen.sum() + rejected.sum()),
        "pairs_lost": int((shortest == 0).sum()),  # a side without tokens
    }


def cap_prompt(
    prompt: list[int], turn_tokens: list[int], budget: int, beginning: Sequence[int] = ()
) -> tuple[list[int], int]:
    """Truncate a prompt to `budget` tokens on the left. Return it and the number of dropped turns.

    It drops as few of the oldest turns as possible. If the newest turn is too long, it drops the turn's oldest tokens.

    Args:
        prompt: token ids.
        turn_tokens: ascending indices of the tokens at which turns start, without the first turn's.
        budget: maximum number of tokens to keep.
        beginning: tokens to keep if the prompt begins with them: a chat template's system turn, or the
            beginning-of-text token. They are not kept if they take more than half of the budget.
    """
    excess = len(prompt) - budget
    if excess <= 0:
        return prompt, 0
    stays = list(beginning) if prompt[: len(beginning)] == list(beginning) and 2 * len(beginning) <= budget else []
    excess += len(stays)
    fitting = ((turn, number) for number, turn in enumerate(turn_tokens, 1) if turn >= excess)
    start, dropped = next(fitting, (excess, len(turn_tokens)))  # the newest turn is too long
    kept = prompt[start:]
    # in some templates every turn begins with these tokens
    return kept if kept[: len(stays)] == stays else stays + kept, dropped


def tokenize_prompts(
    prompts: Sequence[tuple[str, list[int], int]], tokenizer: PreTrainedTokenizerBase, budget: int, rendered: bool
) -> tuple[list[list[int]], list[int]]:
    """Token ids of prompts without responses, truncated to `budget` tokens each, and the number of tokens each lost.

    Args:
        prompts: text, turn_starts and header_end of each prompt, as in `resdpo_trl.text.data`.
        budget: maximum tokens of a prompt.
        rendered: whether a chat template rendered the texts, including a beginning-of-text token.
    """
    check_fast(tokenizer)
    encoded = encode(tokenizer, [text for text, _, _ in prompts])
    start = [] if rendered else _beginning(tokenizer)
    found, lost = [], []
    for row, (ids, (_, turn_starts, header_end)) in enumerate(zip(encoded["input_ids"], prompts, strict=True)):
        places = (turn_starts, header_end)
        kept, _ = _capped(ids, budget - len(start), encoded, row, *places, tokenizer, rendered)
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
    sides, merged = response_ids(tokenizer, batch["prompt"], [batch["chosen"], batch["rejected"]], encoded)
    start = [] if ends_turns else _beginning(tokenizer)
    end = [] if ends_turns else [tokenizer.eos_token_id]
    out: dict[str, list[Any]] = {name: [] for name in (*IDS, "length", *CUTS)}
    for row, ids in enumerate(encoded["input_ids"]):
        prompt = ids[: len(ids) - merged[row]]
        # the first token of a response needs one before it
        begins = start if start or prompt else [tokenizer.eos_token_id]
        room = max_length - len(begins)
        limit = max(max_response_length, room - len(prompt))
        chosen, rejected = (side[row] + end * (side[row][-1:] != end) for side in sides)
        budget = room - min(max(len(chosen), len(rejected)), limit)
        places = (batch["turn_starts"][row], batch["header_end"][row])
        kept, turns = _capped(prompt, budget, encoded, row, *places, tokenizer, ends_turns)
        capped = (begins + kept, chosen[:limit], rejected[:limit])
        cuts = (len(prompt) - len(kept), max(0, len(chosen) - limit), max(0, len(rejected) - limit))
        for name, value in zip(out, (*capped, sum(map(len, capped)), turns, *cuts, merged[row]), strict=True):
            out[name].append(value)
    return out


def _capped(
    ids: list[int],
    budget: int,
    encoded: Any,
    row: int,
    turn_starts: list[int],
    header_end: int,
    tokenizer: PreTrainedTokenizerBase,
    rendered: bool,
) -> tuple[list[int], int]:
    """`cap_prompt` for a row of `encoded` whose token ids are (or begin with) `ids`.

    A truncated prompt keeps the tokens before its first turn, or a chat template's beginning-of-text token.
    """
    if len(ids) <= budget:
        return ids, 0
    turns = [token for offset in turn_starts if (token := _token_at(encoded, row, offset)) is not None]
    if header_end:
        header = encoded["input_ids"][row][: _token_at(encoded, row, header_end)]
    else:
        header = [tokenizer.bos_token_id] if rendered and tokenizer.bos_token_id is not None else []
    return cap_prompt(ids, turns, budget, header)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Any:
    """Tokenize texts without adding special tokens."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)


def response_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], sides: Sequence[list[str]], encoded: Any
) -> tuple[list[list[list[int]]], list[int]]:
    """Token ids of `sides` (lists of one response per prompt), and the number of each prompt's last tokens that change
    before a response. `encoded` is `encode` of the prompts.

    As in TRL, a response is tokenized together with its prompt, and consists of the tokens after the common prefix with
    the prompt's own tokens. This is because SentencePiece encodes the first word of a text differently, and tokens may
    merge across the boundary. Only the text from the prompt's last added token is tokenized again, because tokenizers
    split texts there. GPT-2's pre-tokenizer also splits at every space after another character.
    """
    # added tokens that match normalized text are excluded: the normalizer may insert text before them
    added = {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items() if not token.normalized}
    splits_at_spaces = _splits_at_spaces(tokenizer)
    ids_of: list[list[int]] = encoded["input_ids"]
    heads, tails = [], []  # tokens before the text that is tokenized again, and the prompt's part of this text
    for row, (prompt, ids) in enumerate(zip(prompts, ids_of, strict=True)):
        head, start = 0, 0
        for at in range(len(ids) - 1, 0, -1):
            # an added token may also stand for an unknown character
            if ids[at] in added and added[ids[at]] in prompt[slice(*encoded.token_to_chars(row, at))]:
                head, start = at, encoded.token_to_chars(row, at).start
                break
        space = prompt.rfind(" ")
        if splits_at_spaces and not head and space > 0 and not prompt[space - 1].isspace():
            head = encoded.char_to_token(row, space) or 0
            start = space if head else 0
        heads.append(head)
        tails.append(prompt[start:])
    whole = [
        encode(tokenizer, [tail + text for tail, text in zip(tails, side, strict=True)])["input_ids"] for side in sides
    ]
    ends = [ids[head:] for ids, head in zip(ids_of, heads, strict=True)]
    shared = [min(_common(end, ids) for ids in row) for end, *row in zip(ends, *whole, strict=True)]
    responses = [[ids[begin:] for ids, begin in zip(side, shared, strict=True)] for side in whole]
    return responses, [len(end) - begin for end, begin in zip(ends, shared, strict=True)]


def _splits_at_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    r"""Whether the pre-tokenizer splits at every space that follows another character.

    GPT-2's pattern does, ``'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+``. In a match
    with characters other than spaces, only the first one can be a space
    (https://github.com/openai/gpt-2/blob/master/src/encoder.py).
    """
    from tokenizers.pre_tokenizers import ByteLevel

    backend: Any = tokenizer.backend_tokenizer
    split = backend.pre_tokenizer
    return (
        backend.normalizer is None and isinstance(split, ByteLevel) and split.use_regex and not split.add_prefix_space
    )


def _common(first: list[int], second: list[int]) -> int:
    """The length of the common prefix of two lists of tokens."""
    return next((at for at, token in enumerate(first) if second[at : at + 1] != [token]), len(first))


def _token_at(encoded: Any, row: int, offset: int) -> int | None:
    """The index of the first token that starts at or after a character offset, where a turn starts."""
    token = encoded.char_to_token(row, offset)
    if token is None:
        return None
    return token if encoded.token_to_chars(row, token).start >= offset else token + 1


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token, if the tokenizer adds one to a text (Llama's does, GPT-2's does not)."""
    ids = tokenizer("a")["input_ids"]
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def _sft_batch(batch: dict[str, list[Any]], completion_only_loss: bool) -> dict[str, list[Any]]:
    rows = list(zip(batch["prompt_ids"], batch["chosen_ids"], strict=True))
    return {
        "input_ids": [prompt + response for prompt, response in rows],
        "labels": [([-100] * len(prompt) if completion_only_loss else prompt) + response for prompt, response in rows],
        "length": [len(prompt) + len(response) for prompt, response in rows],
    }


@dataclass
class PairCollator:
    """Collate pairs into a batch. Rows are padded on the right to the longest.

    Returns, for B pairs in R rows (B with prefix sharing, 2B without) of T tokens with N response tokens in total:
        input_ids: (R, T).
        position_ids: (R, T), only with sharing.
        attention_mask: (R, 1, T, T) bool with sharing, True where a query (row) sees a key (column); (R, T) without.
        document, part: (R, T), instead of a mask with sharing and `block_mask`; see `attention.block_mask`.
        predicted_at: (2, N) row and column of the hidden states that predict a response token. Columns count from the
            end (−1 is the last), so that the virtual tokens of PEFT's prompt tuning do not shift them.
        predicted: (N,) the predicted tokens.
        copies: (R, T) float32, the number of a pair's two sequences that contain a token: 2 in a shared prompt, 0 in
            padding.
        response: (N,) the response of each token: 2i for pair i's chosen response, and 2i + 1 for its rejected one.
        chosen_tokens, rejected_tokens: (B,) number of tokens of each response.
        ref_chosen_logps, ref_rejected_logps: (B,) float, if the pairs have them.
    """

    pad_token_id: int
    prefix_sharing: bool = True
    block_mask: bool = False

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self._shared(pairs) if self.prefix_sharing else self._separate(pairs)
        batch["chosen_tokens"] = torch.tensor([len(pair["chosen_ids"]) for pair in pairs])
        batch["rejected_tokens"] = torch.tensor([len(pair["rejected_ids"]) for pair in pairs])
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in pairs[0]:
                batch[name] = torch.tensor([pair[name] for pair in pairs])
        return batch

    def _shared(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [pair["prompt_ids"] + pair["chosen_ids"] + pair["rejected_ids"] for pair in pairs]
        width = max(map(len, rows))
        position_ids = torch.zeros(len(rows), width, dtype=torch.long)
        # (R, T): 0 prompt, 1 chosen, 2 rejected, 3 padding
        part = torch.full((len(rows), width), 3, dtype=torch.uint8)
        predicted_at, response = [], []
        for row, pair in enumerate(pairs):
            prompt, chosen, rejected = (len(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
            second = prompt + chosen
            part[row, :prompt], part[row, prompt:second], part[row, second : second + rejected] = 0, 1, 2
            position_ids[row, :second] = torch.arange(second)
            position_ids[row, second : second + rejected] = torch.arange(prompt, prompt + rejected)
            # the prompt's last token predicts the first token of both
            at = torch.cat([torch.arange(prompt - 1, second - 1), torch.arange(second - 1, second + rejected - 1)])
            at[chosen] = prompt - 1
            predicted_at.append(torch.stack([torch.full_like(at, row), at - width]))
            response += [2 * row] * chosen + [2 * row + 1] * rejected
        if self.block_mask:
            mask = {"document": (part == 3).int(), "part": part.int()}
        else:
            queries, keys = part[:, :, None], part[:, None, :]
            # padding is last, so padded queries see real keys and no row of the softmax is empty
            sees = torch.ones(width, width, dtype=torch.bool).tril() & (keys != 3) & ~((queries == 2) & (keys == 1))
            mask = {"attention_mask": sees[:, None]}
        return {
            "input_ids": _pad(rows, width, self.pad_token_id),
            **mask,
            "position_ids": position_ids,
            "copies": torch.tensor([2.0, 1.0, 1.0, 0.0])[part.int()],
            "predicted_at": torch.cat(predicted_at, 1),
            "predicted": torch.tensor([token for pair in pairs for token in pair["chosen_ids"] + pair["rejected_ids"]]),
            "response": torch.tensor(response),
        }

    def _separate(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        sides = [(pair["prompt_ids"], pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")]
        rows = [prompt + response for prompt, response in sides]
        width = max(map(len, rows))
        real = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
        response = torch.repeat_interleave(
            torch.arange(len(sides)), torch.tensor([len(response) for _, response in sides])
        )
        columns = [torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1) - width for prompt, response in sides]
        return {
            "input_ids": _pad(rows, width, self.pad_token_id),
            "attention_mask": real,
            "copies": real.float(),
            "predicted_at": torch.stack([response, torch.cat(columns)]),
            "predicted": torch.tensor([token for _, response in sides for token in response]),
            "response": response,
        }


@dataclass
class LabelCollator:
    """Add the inputs of the response head to batches with labels. Here on the CPU, no step waits for the device.

    For N tokens with a label, except a row's first one, it adds predicted_at and predicted as in `PairCollator`.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.collate(rows)
        labels = batch["labels"]
        row, column = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
        at = torch.stack([row, column - labels.shape[1]])
        return {**batch, "predicted_at": at, "predicted": labels[row, column + 1]}


def _pad(rows: list[list[int]], width: int, pad_token_id: int) -> Tensor:
    return torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows])

r"""Loading of preference pairs from a Hub id, a folder or a file, as prompt, chosen and rejected texts in three splits.

The columns of a data set and their types determine its layout:

    HH             chosen, rejected: dialogues with "\n\nHuman:" and "\n\nAssistant:"    Anthropic/hh-rlhf
    plain          prompt, chosen, rejected: texts                                       TRL's standard format
    implicit       chosen, rejected: texts with a common prefix                          TRL's implicit prompt
    messages       chosen, rejected, optional prompt: lists of {role, content}           TRL's conversational format
    scored         prompt: a text, chosen and rejected: lists of messages that repeat it UltraFeedback (binarized)
    question       question (or instruction, input), chosen, rejected, optional system   Orca pairs
    turns          conversations, chosen, rejected: {from, value}                        ShareGPT, LLaMA-Factory

`PROMPTS` or --columns find a prompt column with another name. A `system` column becomes the conversation's system
message. As in TRL, a chat template also gets `tools` (the row's functions, a list or JSON) and `chat_template_kwargs`.
All other columns are ignored, and listed in the counts.

A row becomes a pair with the following columns:

    prompt       the text that both responses answer; it ends in "\n\nAssistant:" for HH dialogues
    chosen       the preferred response, with leading but without trailing whitespace
    rejected     the other response
    turn_starts  character offsets of the turns of the prompt: truncation drops whole turns
    header_end   offset of the prompt's first turn: truncation keeps the text before it (a template's system turn)
    shown        the prompt in HH's form, for display
    group        a digest of the conversation's first turn: pairs of a conversation share a split
    whole        a digest of the whole prompt
    pair         a digest of the prompt and both responses in either order: no two splits share it. It is the
                 same in every layout

A row is dropped if its responses are `identical`, if a response or the prompt is `empty` (or a message has no text or
role), or if the two sides of a dialogue share no "\n\nAssistant:" (`no_marker`). The counts have the reasons. Digests
are of the original text or messages, so that they do not depend on a chat template.

The format `plain` keeps texts unchanged, for a base model. `chat` converts them to messages and renders these with the
tokenizer's chat template. Human is the user, Assistant is the assistant, and a prompt without speakers is a user turn.
If the template rejects the roles of a row, the row is rendered with repaired roles (`alternating`) and counted. If the
template still rejects the row, the run stops with an error that names the row's number.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import shlex
from bisect import bisect_left
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from resdpo_trl.errors import UserError
from resdpo_trl.sources import (
    READABLE,
    SPLITS,
    DatasetConfig,
    check_not_empty,
    choose_splits,
    first_line,
    held_out_first,
    held_out_size,
    load_rows,
    named_files,
)
from resdpo_trl.text.tokens import cached_map, tokenize
from resdpo_trl.training.arguments import option

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

logger = logging.getLogger(__name__)
QUICKSTART = "chitchat"
MARKER = "\n\nAssistant:"
TURN = re.compile(r"\n\n(?=(?:Human|Assistant):)")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # HH's names of the roles
SHAREGPT = {"human": "user", "gpt": "assistant"}
GIVEN = "the data set given"  # to a trainer
PROMPTS = ("prompt", "question", "instruction", "input", "conversations", "conversation")
ROLES = ("prompt", "chosen", "rejected", "system")  # the roles of columns in --columns
LAYOUTS = {
    "dialogue": "Anthropic HH dialogues",
    "prompt": "TRL's plain texts",
    "implicit": "TRL's plain texts with an implicit prompt",
    "conversation": "TRL's lists of messages",
    "scored": "UltraFeedback's prompts and lists of messages",
    "question": "texts in columns",
    "turns": "ShareGPT's turns",
}
COLUMNS = {  # of a pair
    "prompt": "text", "chosen": "text", "rejected": "text", "turn_starts": "ids", "header_end": "int", "shown": "text",
    "group": "text", "whole": "text", "pair": "text", "status": "text",
}  # fmt: skip
LOOKED_AT = 1000  # rows that are searched for a dialogue marker
REASONS = ("identical", "empty", "no_marker")
COMMON_OPENING = 20  # an opening in more rows than this does not identify a conversation
NEWEST_TURNS = 128  # a prompt is only truncated at these turns, because each offset takes a rendering


@dataclass
class TextDataConfig(DatasetConfig):
    """Which preference pairs to use, and how many."""

    _argument_group_name = "data"

    dataset_name: str = option(
        QUICKSTART,
        f"Preference pairs: a Hub id (Anthropic/hh-rlhf), a folder, {READABLE} (or several), or "
        "'chitchat', the quickstart's pairs, which need no network.",
        nargs="+",
    )
    eval_dataset_name: str | None = option(
        None,
        "Test pairs from another data set, with the same values as --dataset_name. No test pairs are then "
        "held out from the training pairs.",
        nargs="+",
    )
    columns: list[str] = option(
        [], "Column names that differ from the defaults: prompt=question chosen=better rejected=worse system=system."
    )
    dataset_config: str | None = option(None, "Configuration (subset) of a Hub data set, as in datasets.load_dataset.")
    max_response_length: int | None = option(
        None,
        "Tokens of --max_length that are reserved for a response; half of it by default. A response may "
        "also use the tokens that a short prompt leaves free, and is truncated beyond that.",
    )
    dialogue_format: Literal["auto", "chat", "plain"] = option(
        "auto",
        "Format of dialogues: the tokenizer's chat template (chat), or plain text with Human: and "
        "Assistant: (plain). auto is chat if the tokenizer has a template.",
    )
    prefer: Literal["chosen", "rejected"] = option(
        "chosen", "The preferred side. 'rejected' swaps the pairs in both stages (the 'bad' model)."
    )

    def __post_init__(self) -> None:
        for name in ("dataset_name", "eval_dataset_name"):  # several files are joined into one name, quoted for a shell
            value = getattr(self, name)
            if not isinstance(value, str) and value is not None:
                setattr(self, name, value[0] if len(value) == 1 else shlex.join(value))
        if self.eval_dataset_name and self.dataset_test_split:
            raise UserError("--eval_dataset_name and --dataset_test_split both name the test pairs: remove one of them")
        self.column_of()
        super().__post_init__()

    def column_of(self) -> dict[str, str]:
        """Parse --columns: role -> column."""
        found = dict(word.partition("=")[::2] for word in self.columns)
        repeated = len(set(found.values())) < len(self.columns)
        if repeated or not set(found) <= set(ROLES) or not all(found.values()):
            raise UserError(
                f"--columns {' '.join(self.columns)}: needs each of {', '.join(ROLES)} at most once, with another "
                "column each, e.g. chosen=better"
            )
        return found


@dataclass
class Preferences:
    """Pairs in three splits, with counts of dropped and unused rows.

    `ends_turns` is true if the responses already end with the chat template's end of turn, so that no end-of-text token
    is added.
    """

    splits: dict[str, Dataset]
    counts: dict[str, Any]
    ends_turns: bool = False

    def __getitem__(self, split: str) -> Dataset:
        return self.splits[split]

    def check_same_pairs(self, other: Preferences, split: str, name: str) -> None:
        """Raise a UserError if the chat template of the reward model `name` kept other pairs of the same data."""
        if self[split]["whole"][:] != other[split]["whole"][:]:
            raise UserError(
                f"--reward_model {name}: its chat template keeps other pairs than the policy's "
                f"({len(other[split])} and {len(self[split])} in the split {split}): they can't be compared"
            )


def load_preferences(
    config: TextDataConfig, tokenizer: PreTrainedTokenizerBase | None = None, held_out: bool = False
) -> Preferences:
    """Load, parse and split preference pairs.

    Args:
        config: options of the data.
        tokenizer: its chat template renders the pairs in the format `chat`. None means `plain`. With --dialogue_format
            plain its template is removed, so that it is saved without one.
        held_out: load only a test split: the data's own, or all rows of a data set with one split.

    Raises:
        UserError: a missing file, a malformed row, missing columns, splits with unknown names, no usable pair, or a
            chat template that is missing or rejects a row.
    """
    template = _template(config, tokenizer)
    sources, unused = _by_split(config, held_out)
    parsed, counts = _read(sources, config, template)
    splits, left_out, copies = _split(parsed, config)
    counts |= {"splits_left_out": unused, "left_out": left_out, "copies_removed": copies, "held_out_raised": []}
    counts |= {name: len(rows) for name, rows in splits.items()}
    counts["cut_by_limits"] = counts["kept"] - sum(map(len, splits.values())) - left_out - sum(copies.values())
    if "train" in splits:
        check_not_empty(counts)
        for split, share in (("validation", config.validation_fraction), ("test", config.test_fraction)):
            if split not in parsed and counts[split] > max(1, round(share * len(parsed["train"]))):
                counts["held_out_raised"].append(split)
    return Preferences(splits, counts, ends_turns=template is not None)


def tokenized_pairs(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokenize and truncate raw pairs of any layout, as the recipes do.

    The tokenizer's chat template renders them, if it has one. Unusable pairs are dropped with a warning.

    Raises:
        UserError: columns that match no layout, a row that the template rejects, or no usable pair.
    """
    if not len(rows):
        raise UserError("the data set has no rows")
    config = TextDataConfig(dataset_name=GIVEN)
    template = _template(config, tokenizer)
    parsed, counts = _read({"given": rows}, config, template)
    if counts["ignored_columns"]:
        logger.warning(f"columns ignored: {', '.join(counts['ignored_columns'])}")
    if dropped := [f"{count} {reason}" for reason, count in counts["dropped"].items() if count]:
        logger.warning(f"pairs dropped: {', '.join(dropped)}")
    return tokenize(parsed["given"], tokenizer, max_length, ends_turns=template is not None)


def _read(
    sources: dict[str, Dataset], config: TextDataConfig, template: PreTrainedTokenizerBase | None
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """Return the usable pairs of each split, and counts."""
    parsed: dict[str, Dataset] = {}
    statuses: Counter[str] = Counter()
    ignored: set[str] = set()
    layouts: list[str] = []
    for name, rows in sources.items():
        kind, columns = "prompt", config.column_of()
        flag = GIVEN if config.dataset_name == GIVEN else f"--dataset_name {config.dataset_name}"
        its_own = name == "test" and config.eval_dataset_name
        if its_own:
            flag = f"--eval_dataset_name {config.eval_dataset_name}"
            columns = {role: column for role, column in columns.items() if column in rows.column_names}
        try:
            if config.dataset_name != QUICKSTART or its_own:
                rows, kind, layout, unread = recognize(rows, columns, template, flag)
                layouts += [] if layout in layouts else [layout]
                ignored |= unread
            parsed[name], found = _parse(rows, kind, template, config, f"{flag}, split {name}")
        except UnicodeDecodeError:  # from a damaged parquet file; JSON lines are checked while they are read
            raise UserError(f"{flag}: a text is not UTF-8; write the file again") from None
        statuses += found
    kept = sum(map(len, parsed.values()))
    if kept == 0:
        raise UserError(f"{flag}: no usable pair in {statuses.total()} rows: {_why_none(rows, kind, statuses)}")
    return parsed, {
        "source": config.dataset_name,
        "rows": statuses.total(),
        "kept": kept,
        "layouts": layouts,
        "dropped": {reason: statuses[reason] for reason in REASONS},
        "parted_early": statuses["parted_early"],
        "roles_repaired": statuses["roles_repaired"],
        "ignored_columns": sorted(ignored),
        "dialogue_format": "plain" if template is None else "chat",
    }


def _template(config: TextDataConfig, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer if its chat template renders the pairs, and None for plain text."""
    if tokenizer is None:
        return None
    if config.dialogue_format == "plain":
        tokenizer.chat_template = None
    elif config.dialogue_format == "chat" and tokenizer.chat_template is None:
        raise UserError("--dialogue_format chat: the tokenizer has no chat template; pass plain, or omit the flag")
    return None if tokenizer.chat_template is None else tokenizer


def _why_none(rows: Dataset, kind: str, statuses: Counter[str]) -> str:
    """The reason why no row is usable, and the fix."""
    if statuses["no_marker"] and any("\r\n" in str(text) for text in rows[:1]["chosen"]):
        return "the lines of the dialogues end in \\r\\n; convert them to \\n, as in HH"
    if kind == "implicit" and not statuses["identical"]:
        return "the sides have no common prompt: name its column with --columns prompt=COLUMN"
    said = {
        "identical": "both responses are the same; two different ones are needed",
        "empty": "a prompt or a response has no text; add it",
        "no_marker": "chosen and rejected are dialogues that share no \\n\\nAssistant:; each pair needs one prompt",
    }
    return " or ".join(said[reason] for reason in REASONS if statuses[reason]) or "the file has no rows"


# --- rows of a file --------------------------------------------------------------------------------------------------


def _by_split(config: TextDataConfig, held_out: bool) -> tuple[dict[str, Dataset], list[str]]:
    """Return the raw rows by `SPLITS`, and the names of the data's own splits that are not used."""
    from datasets import concatenate_datasets

    name = config.dataset_name
    if name == QUICKSTART or named_files(name):
        for flag in ("dataset_revision", "dataset_data_dir", "dataset_config"):
            if getattr(config, flag) is not None:
                raise UserError(f"--{flag} {getattr(config, flag)}: it does not apply to {name}; remove it")
    if name == QUICKSTART and config.columns and not config.eval_dataset_name:
        raise UserError(f"--columns {' '.join(config.columns)}: it does not apply to {name}; remove it")
    if name == QUICKSTART:
        sources = chitchat_pairs(shares=(config.validation_fraction, config.test_fraction))
    else:
        sources = load_rows(name, config.dataset_data_dir, config.dataset_revision, QUICKSTART, config.dataset_config)
    used, left_out = choose_splits(sources, config, held_out and config.eval_dataset_name is None)
    try:
        found = {split: concatenate_datasets([sources[each] for each in own]) for split, own in used.items()}
    except ValueError as error:
        raise UserError(
            f"--dataset_train_split {' '.join(used['train'])}: their columns differ ({first_line(error)})"
        ) from None
    if config.eval_dataset_name:
        own = load_rows(config.eval_dataset_name, None, None, QUICKSTART, flag="--eval_dataset_name")
        if len(own) > 1 and "test" not in own:
            raise UserError(
                f"--eval_dataset_name {config.eval_dataset_name}: it has several splits but none named test (found: "
                f"{', '.join(own)}); pass a file of test pairs"
            )
        left_out += used.get("test", [])
        found["test"] = own.get("test", next(iter(own.values())))
    return found, left_out


def recognize(rows: Dataset, columns: dict[str, str], template: Any, place: str) -> tuple[Dataset, str, str, set[str]]:
    """Recognize the layout of rows, and rename their columns to `ROLES`.

    Args:
        rows: the loaded rows.
        columns: role -> column, from --columns.
        template: the tokenizer whose chat template will render the pairs, or None.
        place: the flag and its value, for messages.

    Returns:
        The rows, their layout (a key of `LAYOUTS`), its description, and the names of ignored columns.

    Raises:
        UserError: columns are missing, or their types match no layout.
    """
    there = rows.column_names
    listed = f"(found: {', '.join(sorted(there)) or 'none'})"
    for role, column in columns.items():
        if column not in there:
            raise UserError(f"--columns {role}={column}: {place} has no such column {listed}")
    named = {role: columns.get(role, role) for role in ROLES if role in columns or role in there}
    columns = {"prompt": next((name for name in PROMPTS if name in there), "prompt")} | named
    missing = [role for role in ("chosen", "rejected") if role not in columns]
    if missing:
        raise UserError(
            f"{place}: no column {' or '.join(missing)} {listed}; name them with --columns chosen=COLUMN "
            "rejected=COLUMN, and prompt=COLUMN if the prompt is not part of both"
        )
    options = ["chat_template_kwargs"] if template is not None else []
    if columns["prompt"] == "instruction" and "prompt" not in named and "input" in there:
        options.append("input")
    if template is not None and "tools" in str(template.chat_template):
        options.append("tools")
    ignored = set(there) - {*columns.values(), *options}
    types = {role: _type(rows.features[column]) for role, column in columns.items() if column in there}
    # a column may be all null: its layout has it, but these rows do not need it
    columns = {role: columns[role] for role, type_ in types.items() if type_ != "nothing"}
    types = {role: types[role] for role in columns}
    if None in types.values() or not {"chosen", "rejected"} <= set(types):
        described = ", ".join(f"{column}: {rows.features[column]}" for column in columns.values())
        raise UserError(f"{place}: prompt, chosen and rejected must be text or lists of messages ({described[:200]})")
    taken = rows.select_columns([name for name in dict.fromkeys([*columns.values(), *options]) if name in there])
    taken = taken.rename_columns({column: role for role, column in columns.items() if column != role})
    sides, prompt, system = {types["chosen"], types["rejected"]}, types.get("prompt"), "system" in types
    if sides == {"text"}:
        kind = "question"
        if not system and prompt is None:
            some = taken[:LOOKED_AT]  # Windows line endings count as dialogues too: `_why_none` explains the error
            texts = (str(text).replace("\r\n", "\n") for side in ("chosen", "rejected") for text in some[side])
            kind = "dialogue" if any(MARKER in text for text in texts) else "implicit"
        elif not system and prompt == "text" and columns["prompt"] == "prompt":
            kind = "prompt"
        elif prompt is None:
            raise UserError(f"{place}: it has a column system but no prompt; name it with --columns prompt=COLUMN")
    elif sides == {"messages"} and prompt in (None, "messages") and not system:
        kind = "conversation"
    else:
        kind = "scored" if prompt == "text" else "turns"
    layout = LAYOUTS[kind] + (" with an implicit prompt" if kind == "conversation" and prompt is None else "")
    shown = columns | ({"prompt": "instruction and input"} if "input" in options else {})
    others = [f"{name} as {role}" for role, name in shown.items() if name != role]
    if kind == "question":  # many data sets have this layout: its name includes the columns
        layout += " " + ", ".join(name if name == role else f"{name} ({role})" for role, name in shown.items())
    elif others:
        layout += f" ({', '.join(others)})"
    return taken, kind, layout, ignored


def _type(feature: Any) -> str | None:
    """`text`, `messages` ({role, content}), `turns` ({from, value}, one or a list), `nothing` (nulls), or None."""
    from datasets import Value

    if isinstance(feature, Value):
        return "text" if "string" in feature.dtype else "nothing" if feature.dtype == "null" else None
    inner = getattr(feature, "feature", feature)
    keys = set(inner) if isinstance(inner, dict) else set()
    if {"role", "content"} <= keys:
        return "messages" if inner is not feature else "turns"
    return "turns" if {"from", "value"} <= keys else None


# --- one row ---------------------------------------------------------------------------------------------------------


class _Unusable(Exception):
    """Raised for a row that is dropped. The message is one of `REASONS`."""


def _parse(
    rows: Dataset, kind: str, template: PreTrainedTokenizerBase | None, config: TextDataConfig, place: str
) -> tuple[Dataset, Counter[str]]:
    """Parse the rows of a split. Return the usable pairs and the counts of statuses. `place` is for messages."""
    if kind == "conversation" and template is None:
        raise UserError(
            "the pairs are conversations (lists of messages), which need a tokenizer with a chat template: pass such a "
            "model with --model_name_or_path, or give prompt, chosen and rejected as text"
        )
    options = {"kind": kind, "swap": config.prefer == "rejected", "place": place}
    parsed = cached_map(_parse_batch, rows, COLUMNS, "Reading pairs", template, numbered=True, **options)
    statuses = list(parsed["status"])
    kept = [place for place, status in enumerate(statuses) if status not in REASONS]
    return parsed.select(kept).remove_columns("status"), Counter(statuses)


def _parse_batch(
    batch: dict[str, list[Any]], numbers: list[int], kind: str, swap: bool, place: str, tokenizer: Any = None
) -> dict[str, list[Any]]:
    pairs: list[dict[str, Any]] = []
    for number, *values in zip(numbers, *batch.values(), strict=True):
        try:
            pair = _pair(dict(zip(batch, values, strict=True)), kind, tokenizer)
        except _Unusable as reason:
            pair = {"status": str(reason)}
        except UserError as error:
            raise UserError(f"{place}, row {number + 1}: {error}") from None
        if swap:
            pair |= {"chosen": pair.get("rejected"), "rejected": pair.get("chosen")}
        pairs.append(pair)
    return {name: [pair.get(name) for pair in pairs] for name in COLUMNS}


def _pair(row: dict[str, Any], kind: str, template: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Parse a row into the columns above and a status: `kept`, `parted_early`, `roles_repaired` or one of `REASONS`."""
    prompt, chosen, rejected = (row.get(role) for role in ROLES[:3])
    if row.get("input"):  # Alpaca's
        prompt = f"{prompt}\n{row['input']}"
    in_columns = kind in ("scored", "question", "turns")
    if in_columns:
        prompt, chosen, rejected = _columns_as_messages(row | {"prompt": prompt})
    if in_columns or kind == "conversation":
        asked, *sides = messages = _conversation(prompt, chosen, rejected)
        first = next((at for at, message in enumerate(asked) if message["role"] != "system"), 0)
        opening, whole = (json.dumps(part, default=str) for part in (asked[: first + 1], asked))
        pair: dict[str, Any] = {"status": "kept"}
        if template is None:
            prompt, kind = dialogue(asked), "prompt"
            chosen, rejected = (" " + "\n\n".join(message["content"] for message in side) for side in sides)
    if template is None or not (in_columns or kind == "conversation"):
        text, chosen, rejected, status = _texts(prompt, chosen, rejected, kind)
        starts = turn_starts(text)
        pair = {"prompt": text, "chosen": chosen, "rejected": rejected, "turn_starts": starts, "header_end": 0}
        pair |= {"shown": text, "status": status}
        if not in_columns:
            messages = messages_of(text), _answer(chosen), _answer(rejected)
            first = 0 if text.lstrip().startswith(("Human:", "Assistant:")) else 1
            opening, whole = text[: starts[first]] if len(starts) > first else text, text
    pair |= {"group": _digest(row.get("group") or opening), "whole": _digest(whole), "pair": _pair_digest(*messages)}
    if template is None:
        return pair
    tools, options = row.get("tools"), row.get("chat_template_kwargs") or {}
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = ({"tools": tools} if tools else {}) | dict(options)
    except (TypeError, ValueError) as error:
        raise UserError(
            "tools must be a list of functions or its JSON, and chat_template_kwargs must be a mapping "
            f"({first_line(error)}); fix the row or remove the column"
        ) from None
    try:
        pair |= _render(messages, template, options)
    except Exception as error:  # a template is a program and may raise any exception for unexpected roles
        raise UserError(
            f"the chat template rejects the conversation {str(messages[0])[:80]} ({first_line(error)}); fix or remove "
            "the row, or pass --dialogue_format plain"
        ) from None
    if options:  # the same texts with different tools are different pairs
        pair["pair"] = _digest(pair["pair"] + json.dumps(options, sort_keys=True, default=str))
    return pair


def _texts(prompt: str | None, chosen: str | None, rejected: str | None, kind: str) -> tuple[str, str, str, str]:
    """The prompt, chosen and rejected texts of a row of texts, and its status."""
    if not chosen or not rejected:
        raise _Unusable("empty")
    if kind == "implicit" and chosen == rejected:
        raise _Unusable("identical")
    if kind == "dialogue":
        parts = parse_dialogue(chosen, rejected)
        if parts is None:
            raise _Unusable("identical" if chosen.strip() == rejected.strip() else "no_marker")
        prompt, chosen, rejected = parts
    if kind == "implicit":  # as in TRL, the prompt is the common prefix without a trailing space
        shared = _shared(chosen, rejected)
        shared -= chosen[:shared].endswith(" ")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    prompt, chosen, rejected = prompt or "", chosen.rstrip(), rejected.rstrip()
    if chosen.strip() == rejected.strip() != "":
        raise _Unusable("identical")
    if not (chosen.strip() and rejected.strip() and prompt.strip()):
        raise _Unusable("empty")
    early = kind == "dialogue" and (MARKER in chosen or MARKER in rejected)
    return prompt, chosen, rejected, "parted_early" if early else "kept"


def _columns_as_messages(row: dict[str, Any]) -> tuple[Messages, Messages, Messages]:
    """The prompt, chosen and rejected messages of a row whose columns contain texts or turns."""
    system, prompt, chosen, rejected = (
        _turns(row.get(name), role)
        for name, role in (("system", "system"), ("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    )
    if chosen and rejected and chosen != rejected and any(message["role"] != "assistant" for message in chosen):
        prompt, chosen, rejected = _parted(chosen, rejected)  # the sides repeat the prompt
    if any(message["role"] == "system" for message in prompt):
        system = []
    return system + prompt if prompt else [], chosen, rejected


def _turns(value: Any, role: str) -> Messages:
    """Convert a text, a turn or a list of turns to messages. A text becomes a message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value.strip()}] if value.strip() else []
    messages = []
    for turn in [value] if isinstance(value, dict) else value or []:
        speaker, content = (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])
        messages.append({"role": SHAREGPT.get(speaker, speaker), "content": content or ""})
    return messages


def _conversation(prompt: Messages | None, chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages]:
    """The prompt, chosen and rejected messages of a row of messages, with text contents."""
    prompt, chosen, rejected = (side and _with_text(side) for side in (prompt, chosen, rejected))
    if not chosen or not rejected:
        raise _Unusable("empty")
    if chosen == rejected:
        raise _Unusable("identical")
    if prompt is None:
        prompt, chosen, rejected = _parted(chosen, rejected)
    if not prompt or not chosen or not rejected:
        raise _Unusable("empty")
    return prompt, chosen, rejected


def _parted(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Split two sides into their common prompt, chosen and rejected messages."""
    from trl.data_utils import extract_prompt

    row: Any = extract_prompt({"chosen": chosen, "rejected": rejected})
    return row["prompt"], row["chosen"], row["rejected"]


def _with_text(messages: Messages) -> Messages:
    """Convert the contents of messages to text by joining parts of type text.

    A system message whose content is None is dropped. The result is empty, and thus the conversation unusable, if a
    message has no role, or if a message other than the system's has neither text nor tool calls.
    """
    found: Messages = []
    for message in messages:
        role, content = (message or {}).get("role"), (message or {}).get("content")
        if isinstance(content, list):
            if other := [part for part in content if not isinstance(part, dict) or part.get("type") != "text"]:
                raise UserError(
                    f"a message has content that is not text ({str(other[0])[:60]}): only text is supported; remove "
                    "the row"
                )
            content = "".join(part.get("text") or "" for part in content)
        if not role or (role != "system" and not message.get("tool_calls") and not str(content or "").strip()):
            return []
        if role != "system" or content is not None:
            found.append(message | {"content": content})
    return found


def _answer(text: str) -> Messages:
    """Convert a response text to messages."""
    return messages_of(MARKER + text) if MARKER in text else [{"role": "assistant", "content": text.strip()}]


def _pair_digest(prompt: Messages, chosen: Messages, rejected: Messages) -> str:
    """A digest of a pair's messages. It ignores whitespace around values, empty values, and the order of keys."""
    parts = [
        [
            {name: each.strip() if isinstance(each, str) else each for name, each in turn.items() if each}
            for turn in part
        ]
        for part in (prompt, chosen, rejected)
    ]
    asked, *answers = (json.dumps(part, sort_keys=True, default=str) for part in parts)
    return _digest("\n".join([asked, *sorted(answers)]))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


# --- texts and messages ----------------------------------------------------------------------------------------------


def parse_dialogue(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """Split two HH dialogues into (prompt, chosen response, rejected response).

    The prompt ends at the last "\\n\\nAssistant:" of the common prefix. The rest is the response. It has further turns
    if the dialogues differ before their last turn. Return None if they share no such marker.
    """
    start = chosen.rfind(MARKER, 0, _shared(chosen, rejected))
    if start < 0:
        return None
    boundary = start + len(MARKER)
    return chosen[:boundary], chosen[boundary:], rejected[boundary:]


def _shared(first: str, second: str) -> int:
    """The length of the common prefix of two texts."""
    sizes = range(1, min(len(first), len(second)) + 1)
    return bisect_left(sizes, True, key=lambda size: first[:size] != second[:size])


def turn_starts(prompt: str) -> list[int]:
    """Offsets at which turns start, except offset 0 and a closing marker, which has no turn yet."""
    closing = len(prompt) - len(MARKER) if prompt.endswith(MARKER) else -1
    return [match.start() for match in TURN.finditer(prompt) if match.start() not in (0, closing)]


def messages_of(text: str) -> Messages:
    """Convert a text to messages. A dialogue becomes one message per turn, and any other text one user message.

    The closing "\\n\\nAssistant:" asks for an answer and is not a turn. Text before the first speaker becomes a system
    message, the inverse of `dialogue`.
    """
    messages: Messages = []
    text = text.removesuffix(MARKER)
    for part in TURN.split(text):
        speaker, colon, content = part.strip().partition(":")
        if colon and speaker in SPEAKERS:
            messages.append({"role": SPEAKERS[speaker], "content": content.strip()})
        elif part.strip():
            messages.append({"role": "system", "content": part.strip()})
    if all(message["role"] == "system" for message in messages):
        return [{"role": "user", "content": text.strip()}]
    return messages


def dialogue(messages: Messages) -> str:
    """Convert messages to HH's form, ending in "\\n\\nAssistant:". A system message has no speaker's name."""
    names = {role: f"\n\n{speaker}: " for speaker, role in SPEAKERS.items()}
    parts = [
        f"{names[message['role']]}{message['content'] or ''}" if message["role"] in names else str(message["content"])
        for message in messages
    ]
    return "".join(parts) + MARKER


def newest_turns(shown: str, count: int, seen: str) -> str:
    """The part of a dialogue that a model sees after truncation, for display.

    Args:
        shown: the whole dialogue, as `dialogue` returns it.
        count: the turns that truncation kept. If it is one, the turn may have lost its start.
        seen: the text that the model sees, in any format.

    Returns:
        A dialogue. It has the system message if the model sees it.
    """
    system, *turns = TURN.split(shown.removesuffix(MARKER))
    kept = turns[-count:]
    if count == 1 and kept:
        speaker, _, content = kept[0].partition(":")
        content = content.strip()
        longest = max(0, len(content) - len(seen))
        start = next(at for at in range(longest, len(content) + 1) if content[at:] in seen)
        kept = [f"{speaker}: {content[start:]}"]
    return "".join([system if system.strip() in seen else "", *(f"\n\n{turn}" for turn in kept)]) + MARKER


def alternating(messages: Messages) -> Messages:
    """Repair a conversation for a template that requires alternating user and assistant turns, starting with the user.

    A system message is prepended to the first user turn. Assistant turns before the first user turn are dropped.
    Adjacent turns of the same role are joined with an empty line between them.
    """
    system = [str(message["content"]) for message in messages if message["role"] == "system"]
    repaired: Messages = []
    for message in messages:
        if message["role"] == "system" or (not repaired and message["role"] == "assistant"):
            continue
        content = "\n\n".join([*system, message["content"]]) if not repaired else message["content"]
        if repaired and repaired[-1]["role"] == message["role"]:
            repaired[-1]["content"] += f"\n\n{content}"
        else:
            repaired.append({"role": message["role"], "content": content})
    return repaired


# --- chat templates --------------------------------------------------------------------------------------------------


def _render(messages: tuple[Messages, Messages, Messages], template: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Render a pair with a chat template, and repair its roles if the template rejects them. Return columns.

    The repair applies to the whole conversation. An answer that the prompt starts becomes part of both responses.
    """
    found: dict[str, Any] = {}
    try:
        texts = _rendered(*messages, template, options)
    except Exception:
        asked = alternating(messages[0])
        asked = asked[:-1] if asked and asked[-1]["role"] == "assistant" else asked
        chosen, rejected = (alternating([*messages[0], *side])[len(asked) :] for side in messages[1:])
        if not asked or (asked, chosen, rejected) == messages:
            raise
        messages, found["status"] = (asked, chosen, rejected), "roles_repaired"
        texts = _rendered(*messages, template, options)
    if texts[1].strip() == texts[2].strip():
        found["status"] = "identical"
    header_end, starts = rendered_turns(messages[0], texts[0], template, options)
    places = {"turn_starts": starts, "header_end": header_end, "shown": dialogue(messages[0])}
    return {**found, **dict(zip(ROLES, texts, strict=False)), **places}


def _rendered(
    messages: Messages, chosen: Messages, rejected: Messages, template: Any, options: dict[str, Any]
) -> tuple[str, str, str]:
    """Render the prompt, chosen and rejected texts of a pair.

    The prompt is the common prefix of its own rendering and both complete ones, because some templates render a prompt
    without an answer differently, for example with an opened thought.
    """
    asked = template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    good, bad = (
        template.apply_chat_template([*messages, *side], tokenize=False, **options) for side in (chosen, rejected)
    )
    end = min(_shared(asked, good), _shared(asked, bad))
    return asked[:end], good[end:], bad[end:]


def rendered_turns(
    messages: Messages, text: str, tokenizer: Any, options: dict[str, Any] | None = None
) -> tuple[int, list[int]]:
    """Find the character offsets of turns in `text`, a conversation rendered by the chat template.

    Returns:
        The offset of the first turn, and the offsets of later turns. The text before the first turn is a system message
        or a header of the template; the offset is 0 if the template does not separate it. A turn is skipped, and is
        then no place to truncate, if the template rejects the messages before it or renders them differently without
        the rest.
    """
    first = int(messages[0]["role"] == "system")  # the first turn's place
    header = "" if first else _header(tokenizer, json.dumps([tokenizer.chat_template, options or {}], default=str))
    starts = {}
    for turn in range(max(1, len(messages) - NEWEST_TURNS), len(messages)):
        with suppress(Exception):  # a template may raise any exception
            before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, **options or {})
            if text.startswith(before):
                starts[turn] = len(before)
    header_end = starts.pop(1, 0) if first else len(header) if text.startswith(header) else 0
    return header_end, list(starts.values())


@functools.lru_cache(maxsize=16)  # called for each row; the key `asked` changes with the template
def _header(tokenizer: Any, asked: str) -> str:
    """The header that a chat template writes before the first turn of a conversation without a system message.

    `asked` is JSON of the template and a row's options. The header is the difference between a user turn at the start
    of a conversation and the same turn after an answer.
    """
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with suppress(Exception):  # a template may raise any exception
        first, both, three = (
            tokenizer.apply_chat_template(part, tokenize=False, **json.loads(asked)[1])
            for part in (messages[:1], messages, [*messages, messages[0]])
        )
        turn = three.removeprefix(both)
        if turn != three and first.endswith(turn):
            return str(first.removesuffix(turn))
    return ""


def end_of_turn(tokenizer: Any) -> str:
    """The text that the chat template writes after an answer, often "<|im_end|>\\n"."""
    said = "an answer"
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": said}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False)).rpartition(said)[2]


# --- splits ----------------------------------------------------------------------------------------------------------


def _split(rows_of: dict[str, Dataset], config: TextDataConfig) -> tuple[dict[str, Dataset], int, dict[str, int]]:
    """Split rows: use the data's own splits, and hold out missing ones from the training rows by group.

    Rows are ordered by the digest of their group, so that splits depend on neither a seed nor the order of the file. In
    a split that the data has, a limit takes one row of each group before a second one of any group (`_spread`), because
    pairs of a conversation share much of their text: they add less information, and their figures are not independent.
    A split held out from the training rows takes whole groups.

    Returns:
        The splits; the number of rows in no split, because other rows of their conversation filled a held-out split;
        and the number of rows that each split loses because they are also in a held-out split.
    """
    limits = {
        "test": config.max_test_samples, "validation": config.max_eval_samples, "train": config.max_train_samples
    }  # fmt: skip
    tables, groups = dict(rows_of), {split: np.asarray(rows["group"][:]) for split, rows in rows_of.items()}
    places = {split: np.arange(len(rows)) for split, rows in rows_of.items()}  # row indices of each split in its table
    left_out = 0
    if "train" in rows_of:
        rows, groups["train"] = rows_of["train"], _groups(rows_of["train"])
        order = np.argsort(groups["train"], kind="stable")
        # (S,) positions in `order` at which a group starts: the next split starts at one of them
        starts = np.unique(groups["train"][order], return_index=True)[1]
        taken = 0
        for split, share in (("test", config.test_fraction), ("validation", config.validation_fraction)):
            if split in rows_of:
                continue
            end = taken + held_out_size(len(rows), share, limits[split])
            later = starts[starts >= end]
            if len(later) == 0:
                raise UserError(
                    f"--dataset_name {config.dataset_name}: {len(rows)} usable pairs of {len(starts)} conversations "
                    "are too few for a training, a validation and a test split; at least three conversations are needed"
                )
            tables[split], places[split] = rows, order[taken:end]
            taken = int(later[0])
            left_out += taken - end
        places["train"] = order[taken:]
    digests: dict[str, Any] = {split: np.asarray(table["pair"][:])[places[split]] for split, table in tables.items()}
    kept, copies = held_out_first(dict.fromkeys(SPLITS, ()) | digests)
    splits: dict[str, Dataset] = {}
    for split in (split for split in SPLITS if split in tables):
        place = places[split][kept[split]]
        if split in rows_of:
            place = place[_spread(groups[split][place])][: limits[split]]
        splits[split] = tables[split].select(np.sort(place))
    return splits, left_out, copies


def _groups(rows: Dataset) -> np.ndarray:
    """(N,) keys of the rows that must share a split: the opening, or the whole prompt for a common opening.

    Many unrelated conversations start with the same greeting or system prompt.
    """
    groups = np.asarray(rows["group"][:])
    _, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
    common = np.flatnonzero(counts[place] > max(COMMON_OPENING, len(rows) // 100))
    groups[common] = rows.select(common)["whole"][:]
    return groups


def _spread(groups: np.ndarray) -> np.ndarray:
    """(N,) an order of rows: the first row of each group in the order of groups, then the second rows, and so on."""
    order = np.argsort(groups, kind="stable")
    _, first, inverse = np.unique(groups[order], return_index=True, return_inverse=True)
    place_in_group = np.arange(len(order)) - first[inverse]
    return order[np.argsort(place_in_group, kind="stable")]


# --- the quickstart --------------------------------------------------------------------------------------------------


def chitchat_pairs(seed: int = 0, shares: tuple[float, float] = (0.05, 0.15)) -> dict[str, Dataset]:
    """The quickstart's pairs: a reply is chosen, and a reply of similar length from another conversation is rejected.

    Conversations are split first, and rejected replies are drawn within a split, so that a chosen reply of a split is
    not a rejected one of another. A prompt has at most three turns and 300 characters, and a reply has 20 to 200
    characters, because a reply like "ok" fits any prompt. A conversation contributes at most four pairs.

    Args:
        seed: seed of the draws of replies and rejected replies.
        shares: fractions of the conversations for validation and test.
    """
    from datasets import Dataset

    try:
        import chitchat_dataset
    except ImportError:
        raise UserError(
            "--dataset_name chitchat needs the package chitchat-dataset: run pip install chitchat-dataset, or pass "
            "a file of your own pairs"
        ) from None
    generator = np.random.default_rng(seed)
    splits: dict[str, list[tuple[str, list[str]]]] = {split: [] for split in SPLITS}
    for identity, conversation in sorted(chitchat_dataset.Dataset().items()):
        place = int(_digest(identity), 16) / 2**64
        split = "validation" if place < shares[0] else "test" if place < sum(shares) else "train"
        texts = [
            " ".join(" ".join(part["text"].split()) for part in message).strip() for message in conversation["messages"]
        ]
        splits[split].append((identity, texts))
    pairs = {}
    for split, conversations in splits.items():
        replies: list[tuple[int, int, int]] = []  # (length, conversation, turn)
        for number, (_, texts) in enumerate(conversations):
            at = [turn for turn in range(1, len(texts)) if _suits(texts, turn)]
            taken: Any = generator.choice(at, min(4, len(at)), replace=False) if at else []
            replies += [(len(texts[turn]), number, int(turn)) for turn in sorted(taken)]
        if len({number for _, number, _ in replies}) < 2:
            raise UserError(
                f"--dataset_name chitchat: --validation_fraction {shares[0]} and --test_fraction {shares[1]} leave too "
                f"few conversations for the split {split}; every split needs at least 1% of them"
            )
        replies.sort()
        rows = []
        for place, (_, number, turn) in enumerate(replies):
            # the rejected reply is one of the 25 neighbors on each side in the order of lengths
            window = [n for n in range(max(0, place - 25), min(len(replies), place + 26)) if replies[n][1] != number]
            _, other, other_turn = replies[generator.choice(window)]
            identity, texts = conversations[number]
            asked = [
                {"role": "assistant" if at % 2 else "user", "content": text}
                for at, text in enumerate(_before(texts, turn))
            ]
            chosen, rejected = f" {texts[turn]}", f" {conversations[other][1][other_turn]}"
            rows.append({"prompt": dialogue(asked), "chosen": chosen, "rejected": rejected, "group": identity})
        pairs[split] = Dataset.from_list([rows[index] for index in generator.permutation(len(rows))])
    return pairs


def _before(texts: list[str], turn: int) -> list[str]:
    """The one or three utterances before a reply. The number is odd, so that Human speaks first."""
    return texts[turn - (3 if turn >= 3 else 1) : turn]


def _suits(texts: list[str], turn: int) -> bool:
    """Whether the lengths of a reply and its prompt are allowed."""
    prompt = _before(texts, turn)
    return 20 <= len(texts[turn]) <= 200 and all(prompt) and sum(map(len, prompt)) <= 300

r"""Preference pairs: from a Hub id, a folder or a file to prompt, chosen and rejected texts in three splits.

The layouts in which pairs are published, each recognized by its columns and their types:

    HH             chosen, rejected: dialogues with "\n\nHuman:" and "\n\nAssistant:"    Anthropic/hh-rlhf
    plain          prompt, chosen, rejected: texts                                       TRL's standard format
    implicit       chosen, rejected: texts that begin alike                              TRL's implicit prompt
    messages       chosen, rejected, and prompt or not: lists of {role, content}         TRL's conversational format
    scored         prompt: a text, chosen and rejected: lists of messages that repeat it UltraFeedback (binarized)
    question       question (or instruction, input), chosen, rejected, and system or not Orca pairs
    turns          conversations, chosen, rejected: {from, value}                        ShareGPT, LLaMA-Factory

`PROMPTS` or --columns find a prompt column of another name. A `system` column becomes the conversation's system
message. As in TRL, a chat template also gets `tools` (the row's functions, a list or JSON) and `chat_template_kwargs`.
The counts name every other column: nothing reads it.

One row becomes

    prompt       everything that both responses answer, ending in "\n\nAssistant:" for HH dialogues
    chosen       the preferred response, with the space before it, without the space after it
    rejected     the other response
    turn_starts  character offsets at which a turn of the prompt starts: truncation drops whole turns
    header_end   where the prompt's first turn starts: truncation keeps what comes before (a template's system turn)
    shown        the prompt as people read it, in HH's form
    group        a digest of the conversation's opening turn: pairs of one conversation share a split
    whole        a digest of the whole prompt
    pair         a digest of the prompt and both responses, whichever is chosen: no two splits share it. It is the same
                 in every layout

or it is dropped, and the reason counted: `identical` responses, an `empty` response or prompt (also a message without
text or role), or `no_marker`, a dialogue whose two sides share no "\n\nAssistant:". The digests are of the data's own
text or messages, so that they do not depend on a chat template.

`plain` keeps texts as they are, for a base model. `chat` turns them into messages (Human is the user, Assistant the
assistant, a prompt without speakers one turn of the user) and renders them with the tokenizer's chat template. Where
the template refuses the roles of a row, the row is rendered with repaired roles (`alternating`) and counted; a row that
the template still refuses ends the run with its number.
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
from dataclasses import dataclass, field
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
PROMPTS = ("prompt", "question", "instruction", "input", "conversations", "conversation")
ROLES = ("prompt", "chosen", "rejected", "system")  # what --columns may name a column for
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
LOOKED_AT = 1000  # rows in which a marker makes the texts dialogues
REASONS = ("identical", "empty", "no_marker")
COMMON_OPENING = 20  # an opening that more rows have no longer identifies a conversation
NEWEST_TURNS = 128  # only these are places to truncate a prompt: each costs a rendering


@dataclass
class TextDataConfig(DatasetConfig):
    """Which preference pairs to use, and how many."""

    _argument_group_name = "data"

    dataset_name: str = field(
        default=QUICKSTART,
        metadata={
            "nargs": "+",
            "help": f"Preference pairs: a Hub id (Anthropic/hh-rlhf), a folder, {READABLE} (or several), or "
            "'chitchat', the quickstart's, which need no network.",
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "nargs": "+",
            "help": "Other pairs for the test figures, as --dataset_name names them; no test pairs are then held out "
            "from the training pairs.",
        },
    )
    columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Which column is what, where the names are others: prompt=question chosen=better rejected=worse "
            "system=system."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration (subset) of a Hub data set, as of datasets.load_dataset."}
    )
    max_response_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that a response may always use of --max_length, half of it by default; a response is cut "
            "only beyond this and what a short prompt leaves free."
        },
    )
    dialogue_format: Literal["auto", "chat", "plain"] = field(
        default="auto",
        metadata={
            "help": "How a model reads dialogues: rendered with the tokenizer's chat template (chat), or as plain text "
            "with Human: and Assistant: (plain). auto is chat where the tokenizer has a template."
        },
    )
    prefer: Literal["chosen", "rejected"] = field(
        default="chosen",
        metadata={"help": "Which side is preferred; 'rejected' swaps the pairs of both stages (the 'bad' model)."},
    )

    def __post_init__(self) -> None:
        for name in ("dataset_name", "eval_dataset_name"):  # several files are one name, as a shell writes them
            value = getattr(self, name)
            if not isinstance(value, str) and value is not None:
                setattr(self, name, value[0] if len(value) == 1 else shlex.join(value))
        if self.eval_dataset_name and self.dataset_test_split:
            raise UserError("--eval_dataset_name and --dataset_test_split both name the test pairs: drop either")
        self.column_of()
        super().__post_init__()

    def column_of(self) -> dict[str, str]:
        """--columns as role -> column."""
        found = dict(word.partition("=")[::2] for word in self.columns)
        if len(found) < len(self.columns) or not set(found) <= set(ROLES) or not all(found.values()):
            raise UserError(
                f"--columns {' '.join(self.columns)}: needs each of {', '.join(ROLES)} at most once, e.g. chosen=better"
            )
        return found


@dataclass
class Preferences:
    """Pairs in three splits, with counts of what was dropped and left out on the way.

    `ends_turns` says that the responses already carry their end of turn (a chat template's), so that no
    end-of-text token is added.
    """

    splits: dict[str, Dataset]
    counts: dict[str, Any]
    ends_turns: bool = False

    def __getitem__(self, split: str) -> Dataset:
        return self.splits[split]

    def check_same_pairs(self, other: Preferences, split: str, name: str) -> None:
        """Raise a UserError if the chat template of the reward model `name` left other pairs of the same data."""
        if self[split]["whole"][:] != other[split]["whole"][:]:
            raise UserError(
                f"--reward_model {name}: its chat template leaves other pairs of the data than the policy's "
                f"({len(other[split])} and {len(self[split])} in the split {split}): they can't be compared"
            )


def load_preferences(
    config: TextDataConfig, tokenizer: PreTrainedTokenizerBase | None = None, held_out: bool = False
) -> Preferences:
    """Load, parse and split preference pairs.

    Args:
        config: what to load.
        tokenizer: its chat template renders the pairs where the format is `chat`; None means `plain`. Where
            --dialogue_format plain asks for it, its template is removed, so that what is saved with it says so.
        held_out: only a test split is wanted: the data's own, or all of a data set that has one split.

    Raises:
        UserError: a missing file, a malformed row, missing columns, splits of unknown names, no usable pair, a chat
            template that is missing or refuses a row.
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
    """Raw pairs of any layout, tokenized and capped as the recipes do it.

    They are rendered with the tokenizer's chat template where it has one. Unusable pairs are dropped with a warning.

    Raises:
        UserError: columns that make no layout, a row that the template refuses, or no usable pair.
    """
    config = TextDataConfig(dataset_name="(the data set given)")
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
    """The usable pairs of each split, and counts."""
    parsed: dict[str, Dataset] = {}
    statuses: Counter[str] = Counter()
    ignored: set[str] = set()
    layouts: list[str] = []
    flag = f"--dataset_name {config.dataset_name}"
    for name, rows in sources.items():
        kind = "prompt"
        try:
            if config.dataset_name != QUICKSTART or (name == "test" and config.eval_dataset_name):
                rows, kind, layout, unread = recognize(rows, config.column_of(), template, flag)
                layouts += [] if layout in layouts else [layout]
                ignored |= unread
            parsed[name], found = _parse(rows, kind, template, config, name)
        except UnicodeDecodeError:  # of a damaged parquet file; the lines of JSON are checked as they are read
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
    """The tokenizer where its chat template renders the pairs; None for plain text."""
    if tokenizer is None:
        return None
    if config.dialogue_format == "plain":
        tokenizer.chat_template = None
    elif config.dialogue_format == "chat" and tokenizer.chat_template is None:
        raise UserError("--dialogue_format chat: the tokenizer has no chat template; pass plain, or leave it out")
    return None if tokenizer.chat_template is None else tokenizer


def _why_none(rows: Dataset, kind: str, statuses: Counter[str]) -> str:
    """What is wrong with rows of which none can be used, and the fix."""
    if statuses["no_marker"] and any("\r\n" in str(text) for text in rows[:1]["chosen"]):
        return "the lines of the dialogues end in \\r\\n; convert them to \\n, as HH has them"
    if kind == "implicit" and not statuses["identical"]:
        return "the sides begin with no common prompt: name its column with --columns prompt=COLUMN"
    said = {
        "identical": "both responses are the same; two different ones are needed",
        "empty": "a prompt or a response has no text; fill them in",
        "no_marker": "chosen and rejected are dialogues that share no \\n\\nAssistant:; give each pair one prompt",
    }
    return " or ".join(said[reason] for reason in REASONS if statuses[reason]) or "the file has no rows"


# --- rows of a file --------------------------------------------------------------------------------------------------


def _by_split(config: TextDataConfig, held_out: bool) -> tuple[dict[str, Dataset], list[str]]:
    """The raw rows by `SPLITS`, and the names of the data's own splits that are not used."""
    from datasets import concatenate_datasets

    name = config.dataset_name
    if name == QUICKSTART or named_files(name):
        for flag in ("dataset_revision", "dataset_data_dir", "dataset_config"):
            if getattr(config, flag) is not None:
                raise UserError(f"--{flag} {getattr(config, flag)}: it does not apply to {name}; drop it")
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
                f"--eval_dataset_name {config.eval_dataset_name}: several splits and none named test (found: "
                f"{', '.join(own)}); name a file of test pairs"
            )
        left_out += used.get("test", [])
        found["test"] = own.get("test", next(iter(own.values())))
    return found, left_out


def recognize(rows: Dataset, columns: dict[str, str], template: Any, place: str) -> tuple[Dataset, str, str, set[str]]:
    """The columns of any layout under the names of `ROLES`.

    Args:
        rows: as loaded.
        columns: role -> column, of --columns.
        template: the tokenizer whose chat template will render the pairs, or None.
        place: the flag and its value, for messages.

    Returns:
        The rows, their layout (a key of `LAYOUTS`), its description, and the names of the columns that nothing reads.

    Raises:
        UserError: columns that are missing, or whose types make no layout.
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
            "rejected=COLUMN, and prompt=COLUMN where the prompt is not part of both"
        )
    options = ["chat_template_kwargs"] if template is not None else []
    if template is not None and "tools" in str(template.chat_template):
        options.append("tools")
    ignored = set(there) - {*columns.values(), *options}
    types = {role: _type(rows.features[column]) for role, column in columns.items() if column in there}
    # a column may hold nothing: of a layout that has it, in rows that need none
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
            some = taken[:LOOKED_AT]  # Windows' line ends count too: `_why_none` says what is wrong with them
            texts = (str(text).replace("\r\n", "\n") for side in ("chosen", "rejected") for text in some[side])
            kind = "dialogue" if any(MARKER in text for text in texts) else "implicit"
        elif not system and prompt == "text" and columns["prompt"] == "prompt":
            kind = "prompt"
        elif prompt is None:
            raise UserError(f"{place}: a column system and no prompt; name the prompt's with --columns prompt=COLUMN")
    elif sides == {"messages"} and prompt in (None, "messages") and not system:
        kind = "conversation"
    else:
        kind = "scored" if prompt == "text" else "turns"
    layout = LAYOUTS[kind] + (" with an implicit prompt" if kind == "conversation" and prompt is None else "")
    others = [f"{column} as {role}" for role, column in columns.items() if column != role]
    if kind == "question":  # of many data sets: its columns are its name
        layout += " " + ", ".join(name if name == role else f"{name} ({role})" for role, name in columns.items())
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
    """A row that is dropped; the message is one of `REASONS`."""


def _parse(
    rows: Dataset, kind: str, template: PreTrainedTokenizerBase | None, config: TextDataConfig, split: str
) -> tuple[Dataset, Counter[str]]:
    """Rows of a split -> usable pairs and a count of the statuses."""
    if kind == "conversation" and template is None:
        raise UserError(
            "the pairs are conversations (lists of messages), which need a tokenizer with a chat template: name such a "
            "model with --model_name_or_path, or give prompt, chosen and rejected as text"
        )
    place = f"{config.dataset_name}, split {split}"
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
            raise UserError(f"--dataset_name {place}, row {number + 1}: {error}") from None
        if swap:
            pair |= {"chosen": pair.get("rejected"), "rejected": pair.get("chosen")}
        pairs.append(pair)
    return {name: [pair.get(name) for pair in pairs] for name in COLUMNS}


def _pair(row: dict[str, Any], kind: str, template: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """A row as the columns above, with its status: `kept`, `parted_early`, `roles_repaired` or one of `REASONS`."""
    prompt, chosen, rejected = (row.get(role) for role in ROLES[:3])
    if kind in ("scored", "question", "turns"):
        prompt, chosen, rejected = _columns_as_messages(row)
        kind = "conversation"
        if template is None:
            prompt, kind = prompt and dialogue(prompt), "prompt"
            chosen, rejected = (
                side and " " + "\n\n".join(message["content"] for message in side) for side in (chosen, rejected)
            )
    if kind == "conversation":
        asked, *_ = messages = _conversation(prompt, chosen, rejected)
        first = next((at for at, message in enumerate(asked) if message["role"] != "system"), 0)
        opening, whole = (json.dumps(part, default=str) for part in (asked[: first + 1], asked))
        pair: dict[str, Any] = {"status": "kept"}
    else:
        whole, chosen, rejected, status = _texts(prompt, chosen, rejected, kind)
        messages = messages_of(whole), _answer(chosen), _answer(rejected)
        starts = turn_starts(whole)
        first = 0 if whole.lstrip().startswith(("Human:", "Assistant:")) else 1
        opening = whole[: starts[first]] if len(starts) > first else whole
        pair = {"prompt": whole, "chosen": chosen, "rejected": rejected, "turn_starts": starts, "header_end": 0}
        pair |= {"shown": whole, "status": status}
    pair |= {"group": _digest(row.get("group") or opening), "whole": _digest(whole), "pair": _pair_digest(*messages)}
    if template is None:
        return pair
    tools, options = row.get("tools"), row.get("chat_template_kwargs") or {}
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = ({"tools": tools} if tools else {}) | dict(options)
    except (TypeError, ValueError) as error:
        raise UserError(
            "tools must be a list of functions or its JSON, and chat_template_kwargs a mapping "
            f"({first_line(error)}); fix the row or drop the column"
        ) from None
    try:
        pair |= _render(messages, template, options)
    except Exception as error:  # a template is a program: it may raise anything for roles that it does not expect
        raise UserError(
            f"the chat template refuses the conversation {str(messages[0])[:80]} ({first_line(error)}); fix or drop "
            "the row, or pass --dialogue_format plain"
        ) from None
    if options:  # the same texts with other tools are another pair
        pair["pair"] = _digest(pair["pair"] + json.dumps(options, sort_keys=True, default=str))
    return pair


def _texts(prompt: str | None, chosen: str | None, rejected: str | None, kind: str) -> tuple[str, str, str, str]:
    """Prompt, chosen and rejected text of a row of text, and its status."""
    if not chosen or not rejected:
        raise _Unusable("empty")
    if kind == "implicit" and chosen == rejected:
        raise _Unusable("identical")
    if kind == "dialogue":
        parts = parse_dialogue(chosen, rejected)
        if parts is None:
            raise _Unusable("identical" if chosen.strip() == rejected.strip() else "no_marker")
        prompt, chosen, rejected = parts
    if kind == "implicit":  # as in TRL: up to the first difference, without a space before it
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
    """Prompt, chosen and rejected as messages, of a row whose columns hold texts or turns."""
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
    """A text, a turn or a list of turns as messages; a text is one of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value.strip()}] if value.strip() else []
    messages = []
    for turn in [value] if isinstance(value, dict) else value or []:
        speaker, content = (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])
        messages.append({"role": SHAREGPT.get(speaker, speaker), "content": content or ""})
    return messages


def _conversation(prompt: Messages | None, chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected messages of a row of messages, with contents that are text."""
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
    """Prompt, chosen and rejected, where the prompt is what both sides begin with."""
    from trl.data_utils import extract_prompt

    row: Any = extract_prompt({"chosen": chosen, "rejected": rejected})
    return row["prompt"], row["chosen"], row["rejected"]


def _with_text(messages: Messages) -> Messages:
    """The same messages with contents that are text: parts of type text are joined.

    A system message without text is none. Any other message without text that calls no tool, or without a role, makes
    a conversation unusable: it becomes empty.
    """
    found: Messages = []
    for message in messages:
        role, content = (message or {}).get("role"), (message or {}).get("content")
        if isinstance(content, list):
            if other := [part for part in content if not isinstance(part, dict) or part.get("type") != "text"]:
                raise UserError(
                    f"a message has a content of another type than text ({str(other[0])[:60]}): only text is read; "
                    "drop the row"
                )
            content = "".join(part.get("text") or "" for part in content)
        if not role or (role != "system" and not message.get("tool_calls") and not str(content or "").strip()):
            return []
        if role != "system" or content is not None:
            found.append(message | {"content": content})
    return found


def _answer(text: str) -> Messages:
    """A response of text as messages."""
    return messages_of(MARKER + text) if MARKER in text else [{"role": "assistant", "content": text.strip()}]


def _pair_digest(prompt: Messages, chosen: Messages, rejected: Messages) -> str:
    """A digest of a pair's messages, without the spaces around a content, keys without a value and their order."""
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
    """Two HH dialogues as (prompt, chosen response, rejected response).

    The prompt ends at the last "\\n\\nAssistant:" up to which both are equal. The rest is the response, which has
    further turns where the two differ before the last one. None where they share no such marker.
    """
    start = chosen.rfind(MARKER, 0, _shared(chosen, rejected))
    if start < 0:
        return None
    boundary = start + len(MARKER)
    return chosen[:boundary], chosen[boundary:], rejected[boundary:]


def _shared(first: str, second: str) -> int:
    """How many characters two texts have in common from the start."""
    sizes = range(1, min(len(first), len(second)) + 1)
    return bisect_left(sizes, True, key=lambda size: first[:size] != second[:size])


def turn_starts(prompt: str) -> list[int]:
    """Offsets at which turns start, without the first one's and the closing marker's, which has no turn yet."""
    closing = len(prompt) - len(MARKER) if prompt.endswith(MARKER) else -1
    return [match.start() for match in TURN.finditer(prompt) if match.start() not in (0, closing)]


def messages_of(text: str) -> Messages:
    """A text as messages: a dialogue's turns by their speakers, any other text as one turn of the user.

    The closing "\\n\\nAssistant:" asks for an answer and is no turn. What comes before the first speaker is a system
    message, as `dialogue` writes one.
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
    """Messages in HH's form, up to the answer that is asked for; a system message comes without a name."""
    names = {role: f"\n\n{speaker}: " for speaker, role in SPEAKERS.items()}
    parts = [
        f"{names[message['role']]}{message['content'] or ''}" if message["role"] in names else str(message["content"])
        for message in messages
    ]
    return "".join(parts) + MARKER


def alternating(messages: Messages) -> Messages:
    """The same conversation for a template that takes only user and assistant in turn, the user first.

    A system message becomes the beginning of the first user turn, turns of the assistant before any of the user are
    dropped, and neighboring turns of one role are joined with an empty line between them.
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
    """The columns that a pair's rendering gives, with its roles repaired where the template refuses them.

    The repair is of the whole conversation: an answer that the prompt already began becomes part of both responses.
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
    """Prompt, chosen and rejected text of a pair.

    The prompt is what its own rendering and both whole ones begin with: some templates write the question before an
    answer differently (a thought that is opened, …).
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
    """Where the turns of a conversation start in `text`, its rendering by the chat template, as character offsets.

    Returns:
        The end of what comes before the first turn (a system message, or what the template writes there by itself; 0
        where the template does not separate it), and the starts of the turns after the first one. Where the template
        refuses the messages before a turn, or writes them differently without what follows, that turn is no place to
        truncate.
    """
    first = int(messages[0]["role"] == "system")  # the first turn's place
    header = "" if first else _header(tokenizer, json.dumps([tokenizer.chat_template, options or {}], default=str))
    starts = {}
    for turn in range(max(1, len(messages) - NEWEST_TURNS), len(messages)):
        with suppress(Exception):  # a template is a program: it may raise anything
            before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, **options or {})
            if text.startswith(before):
                starts[turn] = len(before)
    header_end = starts.pop(1, 0) if first else len(header) if text.startswith(header) else 0
    return header_end, list(starts.values())


@functools.lru_cache(maxsize=16)  # one answer for all rows; a template that was changed is another key
def _header(tokenizer: Any, asked: str) -> str:
    """What a chat template writes before the first turn of a conversation that has no system message.

    `asked` is the template and the options that a row passes to it, as JSON. A turn of the user is rendered at the
    beginning and after an answer: the header is what the first has more than the second.
    """
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with suppress(Exception):  # a template is a program: it may raise anything
        first, both, three = (
            tokenizer.apply_chat_template(part, tokenize=False, **json.loads(asked)[1])
            for part in (messages[:1], messages, [*messages, messages[0]])
        )
        turn = three.removeprefix(both)
        if turn != three and first.endswith(turn):
            return str(first.removesuffix(turn))
    return ""


def end_of_turn(tokenizer: Any) -> str:
    """What the chat template writes after an answer: "<|im_end|>\\n" of many."""
    said = "an answer"
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": said}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False)).rpartition(said)[2]


# --- splits ----------------------------------------------------------------------------------------------------------


def _split(rows_of: dict[str, Dataset], config: TextDataConfig) -> tuple[dict[str, Dataset], int, dict[str, int]]:
    """The splits: the data's own where it has them, the rest held out from its training rows by group.

    Rows are ordered by their group's digest, so that the choice depends on neither a seed nor the order of the file. A
    limit takes one row of each group before a second one of any (`_spread`): pairs of one conversation share much of
    their text, so that they teach less, and their figures are not independent. A smaller limit takes a subset of a
    larger one.

    Returns:
        The splits, how many rows are in none (their conversation has others in a held-out split that was full), and how
        many rows a split loses because a held-out one has them too.
    """
    limits = {
        "test": config.max_test_samples, "validation": config.max_eval_samples, "train": config.max_train_samples
    }  # fmt: skip
    tables, groups = dict(rows_of), {split: np.asarray(rows["group"][:]) for split, rows in rows_of.items()}
    places = {split: np.arange(len(rows)) for split, rows in rows_of.items()}  # of each split's rows in its table
    left_out = 0
    if "train" in rows_of:
        rows, groups["train"] = rows_of["train"], _groups(rows_of["train"])
        order = np.argsort(groups["train"], kind="stable")
        # (S,) where in the order a group begins: the only places to cut
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
                    "are too few for a training, a validation and a test split; three conversations is the least"
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
    """(N,) what must share a split: the conversation's opening, or the prompt where many rows share an opening.

    A greeting or a system prompt opens many conversations that have nothing else in common.
    """
    groups = np.asarray(rows["group"][:])
    _, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
    common = np.flatnonzero(counts[place] > max(COMMON_OPENING, len(rows) // 100))
    groups[common] = rows.select(common)["whole"][:]
    return groups


def _spread(groups: np.ndarray) -> np.ndarray:
    """(N,) an order of rows: one of each group in the order of the groups, then the second of each, and so on."""
    order = np.argsort(groups, kind="stable")
    _, first, inverse = np.unique(groups[order], return_index=True, return_inverse=True)
    place_in_group = np.arange(len(order)) - first[inverse]
    return order[np.argsort(place_in_group, kind="stable")]


# --- the quickstart --------------------------------------------------------------------------------------------------


def chitchat_pairs(seed: int = 0, shares: tuple[float, float] = (0.05, 0.15)) -> dict[str, Dataset]:
    """The quickstart's pairs: the reply a person gave against a reply of similar length from another conversation.

    Conversations are split first and partners drawn within a split: a reply that one split learns as chosen must not
    come back as rejected in another. A pair's prompt has at most three turns and 300 characters, a reply 20 to 200
    ("ok" would fit any prompt), and a conversation gives at most four pairs.

    Args:
        seed: draws the replies that become pairs and their rejected partners.
        shares: shares of the conversations that go to validation and test.
    """
    from datasets import Dataset

    try:
        import chitchat_dataset
    except ImportError:
        raise UserError(
            "--dataset_name chitchat needs the package chitchat-dataset: pip install chitchat-dataset, or name "
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
                f"few conversations for the split {split}; every split needs a hundredth of them"
            )
        replies.sort()
        rows = []
        for place, (_, number, turn) in enumerate(replies):
            # the partner is one of the 25 neighbors on either side in the order of lengths
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
    """The one or three utterances before a reply: an odd number, so that Human has the first word."""
    return texts[turn - (3 if turn >= 3 else 1) : turn]


def _suits(texts: list[str], turn: int) -> bool:
    """Whether the reply and its prompt have the lengths that a pair may have."""
    prompt = _before(texts, turn)
    return 20 <= len(texts[turn]) <= 200 and all(prompt) and sum(map(len, prompt)) <= 300

"""The layouts in which preference pairs are published, each brought to the columns `prompt`, `chosen` and `rejected`.

    HH             chosen, rejected: dialogues with "\n\nHuman:" and "\n\nAssistant:"    Anthropic/hh-rlhf
    plain          prompt, chosen, rejected: texts                                       TRL's standard format
    implicit       chosen, rejected: texts that begin alike                              TRL's implicit prompt
    messages       chosen, rejected, and prompt or not: lists of {role, content}         TRL's conversational format
    scored         prompt: a text, chosen and rejected: lists of messages that repeat it UltraFeedback (binarized)
    question       question (or instruction, input), chosen, rejected, and system or not Orca pairs
    turns          conversations, chosen, rejected: {from, value}                        ShareGPT, LLaMA-Factory

A prompt column of another name is found by `PROMPTS` or given by --columns. The text of a `system` column becomes
the conversation's system message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resdpo_trl.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Messages = list[dict[str, Any]]

MARKER = "\n\nAssistant:"
PROMPTS = ("prompt", "question", "instruction", "input", "conversations", "conversation")
ROLES = ("prompt", "chosen", "rejected", "system")  # what --columns may give a column to
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of the roles
NAMES = {
    "dialogue": "Anthropic HH dialogues",
    "prompt": "TRL's plain texts",
    "implicit": "TRL's plain texts with an implicit prompt",
    "conversation": "TRL's lists of messages",
    "conversation-implicit": "TRL's lists of messages with an implicit prompt",
    "scored": "UltraFeedback's prompts and lists of messages",
    "question": "texts in columns",
    "turns": "ShareGPT's turns",
}
LOOKED_AT = 1000  # rows in which a marker makes the texts dialogues


def mapped(columns: list[str]) -> dict[str, str]:
    """--columns as role -> column; a UserError for what is no NAME=COLUMN of `ROLES`."""
    found: dict[str, str] = {}
    for word in columns:
        role, equals, column = word.partition("=")
        if not equals or not column or role not in ROLES or role in found:
            raise UserError(f"--columns {word}: needs each of {', '.join(ROLES)} at most once, e.g. chosen=better")
        found[role] = column
    return found


def columns_by_role(there: list[str], columns: dict[str, str]) -> dict[str, str]:
    """role -> column, of those that are there and of --columns; the prompt's is the first of `PROMPTS`."""
    columns = {role: columns.get(role, role) for role in ROLES if role in columns or role in there}
    asked = [name for name in PROMPTS if name in there]
    return {"prompt": asked[0], **columns} if asked else columns


def recognize(rows: Dataset, columns: dict[str, str], rendered: bool, place: str) -> tuple[Dataset, str, str]:
    """Rows of any layout as `prompt`, `chosen` and `rejected`.

    Args:
        rows: as loaded.
        columns: role -> column, of --columns.
        rendered: whether a chat template will render the pairs; otherwise messages of texts are written as HH's.
        place: the flag and its value, for messages.

    Returns:
        The rows, their kind for the parser (`dialogue`, `prompt`, `implicit` or `conversation`), and the layout's name.

    Raises:
        UserError: columns that are missing, or whose types make no layout.
    """
    there = rows.column_names
    for role, column in columns.items():
        if column not in there:
            raise UserError(
                f"--columns {role}={column}: {place} has no such column (found: {', '.join(sorted(there))})"
            )
    columns = columns_by_role(there, columns)
    missing = [role for role in ("chosen", "rejected") if role not in columns]
    if missing:
        raise UserError(
            f"{place}: no column {' or '.join(missing)} (found: {', '.join(sorted(there)) or 'none'}); name them with "
            "--columns chosen=COLUMN rejected=COLUMN, and prompt=COLUMN where the prompt is not part of both"
        )
    types = {role: _type(rows.features[column]) for role, column in columns.items()}
    # a column may hold nothing: of a layout that has it, in rows that need none
    columns = {role: column for role, column in columns.items() if types[role] != "nothing"}
    taken = rows.select_columns(list(dict.fromkeys(columns.values())))
    taken = taken.rename_columns({column: role for role, column in columns.items() if column != role})
    kinds = {role: types[role] for role in columns}
    if None in kinds.values() or not {"chosen", "rejected"} <= set(kinds):
        described = ", ".join(f"{columns.get(role, role)}: {rows.features[columns.get(role, role)]}" for role in kinds)
        raise UserError(f"{place}: prompt, chosen and rejected must be text or lists of messages ({described[:200]})")
    sides = {kinds["chosen"], kinds["rejected"]}
    prompt = kinds.get("prompt")
    if sides == {"text"} and prompt in (None, "text") and "system" not in kinds:
        if prompt is None:
            kind = "dialogue" if _has_markers(taken) else "implicit"
        else:
            kind = "prompt" if columns["prompt"] == "prompt" else "question"
        if kind != "question":
            return taken, kind, _named(kind, columns)
    elif sides == {"messages"} and prompt in (None, "messages") and "system" not in kinds:
        return taken, "conversation", _named("conversation" if prompt else "conversation-implicit", columns)
    else:
        kind = "question" if sides == {"text"} else "scored" if prompt == "text" else "turns"
    if kind == "question" and prompt is None:
        raise UserError(f"{place}: a column system and no prompt; name the prompt's with --columns prompt=COLUMN")
    return _as_messages(taken, rendered), "conversation" if rendered else "prompt", _named(kind, columns)


def _type(feature: Any) -> str | None:
    """`text`, `messages` ({role, content}), `turns` ({from, value}, one or a list), `nothing` (nulls), or None."""
    from datasets import Value

    if isinstance(feature, Value):
        return "text" if "string" in feature.dtype else "nothing" if feature.dtype == "null" else None
    inner = getattr(feature, "feature", feature)
    if not isinstance(inner, dict):
        return None
    keys = set(inner)
    if {"role", "content"} <= keys:
        return "messages" if inner is not feature else "turns"
    return "turns" if {"from", "value"} <= keys else None


def _has_markers(rows: Dataset) -> bool:
    some = rows[:LOOKED_AT]
    # with Windows' ends of lines, too: what the parser makes of them is not this function's business
    return any(MARKER in str(text).replace("\r\n", "\n") for side in ("chosen", "rejected") for text in some[side])


def _named(kind: str, columns: dict[str, str]) -> str:
    if kind == "question":  # of many data sets: its columns are its name
        return f"{NAMES[kind]} " + ", ".join(
            column if column == role else f"{column} ({role})" for role, column in columns.items()
        )
    others = [f"{column} as {role}" for role, column in columns.items() if column != role]
    return NAMES[kind] + (f" ({', '.join(others)})" if others else "")


def _as_messages(rows: Dataset, rendered: bool) -> Dataset:
    from datasets import Features, List, Value

    text = Value("string")
    part: Any = List({"role": text, "content": text}) if rendered else text
    return rows.map(
        _row_as_messages,
        fn_kwargs={"rendered": rendered},
        remove_columns=rows.column_names,
        features=Features({name: part for name in ("prompt", "chosen", "rejected")}),
        desc="Recognizing columns",
    )


def _row_as_messages(row: dict[str, Any], rendered: bool) -> dict[str, Any]:
    """A row's prompt and sides as messages; as HH writes them where no template will."""
    from resdpo_trl.text.data import _parted, dialogue

    system, prompt = messages_in(row.get("system"), "system"), messages_in(row.get("prompt"), "user")
    chosen, rejected = (messages_in(row[side], "assistant") for side in ("chosen", "rejected"))
    if chosen and rejected and any(message["role"] != "assistant" for message in chosen):
        prompt, chosen, rejected = _parted(None, chosen, rejected)  # the sides repeat the prompt
    if any(message["role"] == "system" for message in prompt):
        system = []
    found = {"prompt": system + prompt if prompt else [], "chosen": chosen, "rejected": rejected}
    if rendered:
        return found
    return {
        name: (dialogue(messages) if name == "prompt" else " " + "\n\n".join(m["content"] for m in messages))
        if messages
        else ""
        for name, messages in found.items()
    }


def messages_in(value: Any, role: str) -> Messages:
    """A text, a turn or a list of turns as messages; a text is one of `role`."""
    if not value:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value.strip()}] if value.strip() else []
    messages = []
    for turn in [value] if isinstance(value, dict) else value:
        speaker, content = (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])
        messages.append({"role": SPEAKERS.get(speaker, speaker), "content": content or ""})
    return messages

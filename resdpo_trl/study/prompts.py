"""The prompts that several models answer: from a file, or the held-out ones of the quickstart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from resdpo_trl.errors import UserError
from resdpo_trl.run.files import read_jsonl
from resdpo_trl.text.data import SPEAKERS, chitchat_pairs, parse_dialogue
from resdpo_trl.text.generate import Prompt

QUICKSTART_PROMPTS = 32


def load_prompts(path: str | None, limit: int | None) -> tuple[list[Prompt], dict[str, Any]]:
    """Load distinct prompts; return them with counts of the file's rows.

    Args:
        path: a .txt, .jsonl or .jsonl.gz file as `--prompts` takes it; None for held-out prompts of the quickstart.
        limit: the maximum number of prompts.

    Raises:
        UserError: the file is missing, a row is invalid (the message names its line), or there is no prompt.
    """
    if path is None:
        limit, empty, source = limit or QUICKSTART_PROMPTS, 0, "held-out prompts of the quickstart"
        found: list[Prompt] = list(chitchat_pairs()["test"]["prompt"])
    else:
        (found, empty), source = _read(Path(path)), path
        if not found:
            raise UserError(f"--prompts {path}: it has no prompt ({empty} empty lines)")
    unique = {json.dumps(prompt): prompt for prompt in found}
    used = list(unique.values())[:limit]
    repeated = len(found) - len(unique)
    return used, {"source": source, "rows": len(found), "empty_lines": empty, "repeated": repeated, "used": len(used)}


def _read(path: Path) -> tuple[list[Prompt], int]:
    """The prompts of a file, and its number of empty lines."""
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file")
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        number, found = 0, []
        for number, row in read_jsonl(path):
            found.append(_prompt_of(row, f"{path}, line {number}"))
        return found, number - len(found)
    if path.suffix != ".txt":
        raise UserError(f"--prompts {path}: neither .txt nor .jsonl nor .jsonl.gz; convert it to one of these")
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; convert the file") from None
    return [[{"role": "user", "content": line}] for line in lines if line], lines.count("")


def _prompt_of(row: dict[str, Any], place: str) -> Prompt:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: half of a surrogate pair (\\ud800 to \\udfff) is not text; fix the line") from None
    prompt = row.get("prompt")
    if prompt is None and isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str):
        prompt = (parse_dialogue(row["chosen"], row["rejected"]) or [""])[0]
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        return [{"role": message["role"], "content": message["content"]} for message in prompt]
    raise UserError(
        f"{place}: needs 'prompt', a text or a list of messages with role (system, user, assistant) and content, or "
        "'chosen' and 'rejected' dialogues in HH's format"
    )


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("system", *SPEAKERS.values())
        and isinstance(message.get("content"), str)
    )

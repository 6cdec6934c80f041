"""The prompts that several models answer: from a file, or the held-out ones of the quickstart."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from resdpo_trl.errors import UserError
from resdpo_trl.text.data import MARKER, SPEAKERS, chitchat_pairs, parse_dialogue
from resdpo_trl.text.generate import Prompt

QUICKSTART_PROMPTS = 32


def load_prompts(path: str | None, limit: int | None) -> tuple[list[Prompt], dict[str, Any]]:
    """Distinct prompts, and counts of what the file holds.

    Args:
        path: a .txt file (a question per line), or a .jsonl or .jsonl.gz file (rows with `prompt`, or with `chosen` and
            `rejected` dialogues in HH's format); None for held-out prompts of the quickstart.
        limit: the number of prompts to use, at most.

    Raises:
        UserError: the file is missing, a row is invalid (the message names its line), or there is no prompt.
    """
    if path is None:
        limit, empty, source = limit or QUICKSTART_PROMPTS, 0, "held-out prompts of the quickstart"
        found: list[Prompt] = list(chitchat_pairs()["test"]["prompt"])
    else:
        (found, empty), source = _read(Path(path)), path
        if not found:
            raise UserError(f"--prompts {path}: no prompt in it ({empty} empty lines)")
    unique = {json.dumps(prompt): prompt for prompt in found}
    used = list(unique.values())[:limit]
    repeated = len(found) - len(unique)
    return used, {"source": source, "rows": len(found), "empty_lines": empty, "repeated": repeated, "used": len(used)}


def _read(path: Path) -> tuple[list[Prompt], int]:
    """The prompts of a file, and its number of empty lines."""
    is_json = path.name.removesuffix(".gz").endswith(".jsonl")
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file")
    if not is_json and path.suffix != ".txt":
        raise UserError(f"--prompts {path}: neither .txt nor .jsonl nor .jsonl.gz; convert it to one of these")
    found: list[Prompt] = []
    empty = number = 0
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    empty += 1
                elif is_json:
                    found.append(_prompt_of(line, f"{path}, line {number}"))
                else:
                    found.append([{"role": "user", "content": line.strip()}])
    except UnicodeDecodeError:
        raise UserError(f"{path}, after line {number}: not UTF-8; convert the file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{path}, after line {number}: the gzip stream is damaged; compress it again") from None
    except OSError as error:
        raise UserError(f"--prompts {path}: can't be read ({error.strerror})") from None
    return found, empty


def _prompt_of(line: str, place: str) -> Prompt:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg}); fix or delete the line") from None
    except RecursionError:
        raise UserError(f"{place}: nested too deeply; fix or delete the line") from None
    except UnicodeEncodeError:
        raise UserError(f"{place}: half of a surrogate pair (\\ud800 to \\udfff) is not text; fix the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object; each line is one prompt")
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if prompt is None and isinstance(chosen, str):
        if isinstance(rejected, str):
            prompt = (parse_dialogue(chosen, rejected) or [None])[0]
        elif MARKER in chosen:
            prompt = chosen[: chosen.rfind(MARKER) + len(MARKER)]
        if prompt is None:
            raise UserError(f"{place}: the dialogue has no '\\n\\nAssistant:' after which a response begins")
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        return [{"role": message["role"], "content": message["content"]} for message in prompt]
    raise UserError(
        f"{place}: needs 'prompt', a text or a list of messages with role (system, user, assistant) and content, or "
        "HH's 'chosen' dialogue"
    )


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("system", *SPEAKERS.values())
        and isinstance(message.get("content"), str)
    )

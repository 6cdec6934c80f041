"""The prompts that several models answer: from a file or the quickstart, written as each tokenizer expects them.

A prompt is a text or a list of messages. A tokenizer with a chat template renders the messages, those of a text
included (`resdpo_trl.text.data.messages_of`). A tokenizer without one reads a text as it is, and messages as HH writes
dialogues ("\\n\\nHuman: … \\n\\nAssistant:").
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from resdpo_trl.errors import UserError
from resdpo_trl.sources import first_line
from resdpo_trl.text.data import (
    MARKER,
    SPEAKERS,
    Messages,
    alternating,
    chitchat_pairs,
    dialogue,
    messages_of,
    parse_dialogue,
    rendered_turns,
    turn_starts,
)
from resdpo_trl.text.tokens import encode, response_ids, tokenize_prompts

QUICKSTART_PROMPTS = 32

Prompt = str | Messages


def load_prompts(path: str | None, limit: int | None) -> tuple[list[Prompt], dict[str, Any]]:
    """Prompts, each once, and the counts of what the file held.

    Args:
        path: a .txt file (a question a line), a .jsonl or .jsonl.gz file (rows with `prompt`, or with `chosen` and
            `rejected` dialogues in HH's form); None for held-out prompts of the quickstart.
        limit: the first so many.

    Raises:
        UserError: no such file, a row that can't be used (with its line), no prompt at all.
    """
    if path is None:
        limit = limit or QUICKSTART_PROMPTS
        found: list[Prompt] = list(chitchat_pairs()["test"]["prompt"])
        empty, source = 0, "held-out prompts of the quickstart"
    else:
        found, empty = _read(Path(path))
        source = path
        if not found:
            raise UserError(f"--prompts {path}: no prompt in it ({empty} empty lines)")
    unique = {json.dumps(prompt): prompt for prompt in found}
    used = list(unique.values())[:limit]
    repeated = len(found) - len(unique)
    return used, {"source": source, "rows": len(found), "empty_lines": empty, "repeated": repeated, "used": len(used)}


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


def _read(path: Path) -> tuple[list[Prompt], int]:
    """The prompts of a file, and its empty lines."""
    lines = path.name.removesuffix(".gz").endswith(".jsonl")
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file")
    if not lines and path.suffix != ".txt":
        raise UserError(f"--prompts {path}: neither .txt nor .jsonl nor .jsonl.gz; convert it to one of these")
    found: list[Prompt] = []
    empty = number = 0
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    empty += 1
                elif lines:
                    found.append(_prompt_of(line, f"{path}, line {number}"))
                else:
                    found.append([{"role": "user", "content": line.strip()}])
    except UnicodeDecodeError:
        raise UserError(f"{path}, after line {number}: not UTF-8; convert the file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{path}, after line {number}: the gzip stream is damaged; compress it anew") from None
    except OSError as error:
        raise UserError(f"--prompts {path}: can't be read ({error.strerror})") from None
    return found, empty


def _prompt_of(line: str, place: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg}); mend or delete the line") from None
    except RecursionError:
        raise UserError(f"{place}: nested too deeply; mend or delete the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object; each line is one prompt")
    prompt = row.get("prompt")
    if prompt is None and isinstance(row.get("chosen"), str):
        prompt = _dialogue_prompt(row["chosen"], row.get("rejected"))
        if prompt is None:
            raise UserError(f"{place}: the dialogue has no '\\n\\nAssistant:' to part its prompt at")
    usable: Prompt | None = None
    if isinstance(prompt, str) and prompt.strip():
        usable = prompt
    elif isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        usable = [{"role": message["role"], "content": message["content"]} for message in prompt]
    if usable is not None:
        try:
            json.dumps(usable, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{place}: half of a surrogate pair (\\ud800 to \\udfff) is no text; mend the line"
            ) from None
        return usable
    raise UserError(
        f"{place}: needs 'prompt', a text or a list of messages with role (system, user, assistant) and content, or "
        "HH's 'chosen' dialogue"
    )


def _dialogue_prompt(chosen: str, rejected: Any) -> str | None:
    if isinstance(rejected, str):
        parts = parse_dialogue(chosen, rejected)
        return parts[0] if parts else None
    start = chosen.rfind(MARKER)
    return chosen[: start + len(MARKER)] if start >= 0 else None


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("system", *SPEAKERS.values())
        and isinstance(message.get("content"), str)
    )

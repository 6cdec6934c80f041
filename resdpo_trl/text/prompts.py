"""The prompts that several models answer: from a file or the quickstart, written as each tokenizer expects them.

A prompt is a text, which every model sees as it is, or a list of messages. Messages go through the tokenizer's chat
template; a tokenizer without one sees them as HH writes dialogues ("\\n\\nHuman: … \\n\\nAssistant:").
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
from resdpo_trl.text.data import MARKER, chitchat_pairs, end_of_turn, parse_dialogue, rendered_turn_starts, turn_starts
from resdpo_trl.text.tokens import tokenize_prompts

QUICKSTART_PROMPTS = 32
SPEAKERS = {"user": "Human", "assistant": "Assistant"}

Prompt = str | list[dict[str, str]]


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


def write_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int], bool]:
    """A prompt as a model of this tokenizer reads it: text, where its turns start, whether a chat template wrote it.

    Raises:
        UserError: a conversation that the template does not take.
    """
    if isinstance(prompt, str):
        return prompt, turn_starts(prompt), False
    if tokenizer.chat_template is not None:
        try:
            text = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program: it may raise anything
            raise UserError(
                f"the tokenizer's chat template does not take the conversation that begins {str(prompt)[:80]} "
                f"({first_line(error)}): fix or drop it"
            ) from None
        return text, rendered_turn_starts(prompt, text, tokenizer), True
    text = dialogue(prompt)
    return text, turn_starts(text), False


def dialogue(messages: list[dict[str, str]]) -> str:
    """Messages in HH's form, up to the answer that is asked for; a system message stands first, without a name."""
    parts = [
        f"\n\n{SPEAKERS[message['role']]}: {message['content']}" if message["role"] in SPEAKERS else message["content"]
        for message in messages
    ]
    return "".join(parts) + MARKER


def prompt_ids(
    prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, budget: int
) -> tuple[list[list[int]], list[int]]:
    """Token ids of prompts, at most `budget` tokens each, and how many tokens each lost."""
    texts, starts, rendered = zip(*(write_prompt(prompt, tokenizer) for prompt in prompts), strict=True)
    return tokenize_prompts(list(texts), list(starts), tokenizer, budget, list(rendered))


def answer_end(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer to a prompt, as in training: a chat template's end of turn, or the end of text."""
    if isinstance(prompt, str) or tokenizer.chat_template is None:
        return [int(tokenizer.eos_token_id)]
    return list(tokenizer(end_of_turn(tokenizer), add_special_tokens=False)["input_ids"])


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
        and message.get("role") in ("system", *SPEAKERS)
        and isinstance(message.get("content"), str)
    )

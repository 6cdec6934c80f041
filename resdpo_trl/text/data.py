"""Preference pairs: from a Hub id, a folder or a file to prompt, chosen and rejected texts in three splits.

One row becomes

    prompt       everything both responses answer to, ending in "\\n\\nAssistant:" for HH dialogues
    chosen       the preferred response, with the space before it, without what trails
    rejected     the other response
    turn_starts  where a turn of the prompt starts, as character offsets: the cap drops whole turns
    header_end   where the prompt's first turn starts: what comes before it (a template's system turn) is kept
    shown        the prompt as people read it, in HH's form, whatever the format
    group        a digest of the conversation's opening turn: what keeps a conversation's pairs in one split
    whole        a digest of the whole prompt
    pair         a digest of the prompt and the two responses, whichever is chosen: what no two splits may share; the
                 same in whatever layout a file has them

or it is dropped, with the reason counted: `identical` responses, an `empty` response or prompt (a message without text
or role counts as one), or `no_marker`, a dialogue whose two sides share no "\\n\\nAssistant:". The digests are of the
data's own text or messages, so that they are the same whatever chat template rendered them.

Two more columns reach a chat template, as in TRL: `tools`, the row's functions as a list or as JSON, and
`chat_template_kwargs`. Every other column is ignored, and the counts name it.

The format is `plain` or `chat`. `plain` keeps texts as they are, which suits a base model. `chat` turns them into
messages (Human is the user, Assistant the assistant, a prompt without speakers one turn of the user) and renders them
with the tokenizer's chat template, which suits a model that was trained with it.

A template may refuse the roles of a row. Such a row is rendered again with its roles repaired (`alternating`), and
counted; a row that the template still refuses ends the run with its number.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import shlex
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
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
from resdpo_trl.text.layouts import MARKER, Messages, columns_by_role, mapped, recognize
from resdpo_trl.text.tokens import cache_key, tokenize, tokenizer_state

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
QUICKSTART = "chitchat"
TURN = re.compile(r"\n\n(?=(?:Human|Assistant):)")
COLUMNS = ("prompt", "chosen", "rejected")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # which TRL passes to the chat template
REASONS = ("identical", "empty", "no_marker")
COMMON_OPENING = 20  # rows of one opening from which on it no longer tells a conversation
SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # HH's names of the roles
NEWEST_TURNS = 128  # of a conversation: older ones are dropped together, for each costs a pass of the template


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
        mapped(self.columns)
        super().__post_init__()


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
        """Raise a UserError where another tokenizer's chat template left other pairs of the same data.

        Args:
            other: the pairs as the reward model `name` reads them.
            split: the split that is compared.
        """
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
    sources, unused = _by_split(_load(config), config, held_out and config.eval_dataset_name is None)
    parsed: dict[str, Dataset] = {}
    counts: dict[str, Any] = {"source": config.dataset_name, "splits_left_out": unused, "rows": 0, "kept": 0}
    ignored: set[str] = set()
    statuses: Counter[str] = Counter()
    layouts: dict[str, None] = {}
    kind = "prompt"
    for name, rows in sources.items():
        try:
            if config.dataset_name != QUICKSTART or (name == "test" and config.eval_dataset_name):
                flag = f"--dataset_name {config.dataset_name}"
                rows, kind, layout, unread = _recognized(rows, mapped(config.columns), template, flag)
                layouts[layout] = None
                ignored |= unread
            table, found = _parse(rows, kind, template, config, name)
        except UnicodeDecodeError:  # of a damaged parquet file; a line of JSON was looked at
            raise UserError(f"--dataset_name {config.dataset_name}: a text is not UTF-8; write it anew") from None
        parsed[name] = table
        statuses.update(found)
        counts["rows"] += len(rows)
        counts["kept"] += len(table)
    counts["layouts"] = list(layouts)
    counts["dropped"] = {reason: statuses[reason] for reason in REASONS}
    counts["parted_early"] = statuses["parted_early"]
    counts["roles_repaired"] = statuses["roles_repaired"]
    counts["ignored_columns"] = sorted(ignored)
    counts["dialogue_format"] = "plain" if template is None else "chat"
    if counts["kept"] == 0:
        raise UserError(
            f"--dataset_name {config.dataset_name}: no usable pair in {counts['rows']} rows: "
            + _why_none(rows, kind, counts["dropped"])
        )
    if "train" in parsed:
        splits, counts["left_out"], counts["copies_removed"] = _split(parsed, config)
    else:
        chosen = _spread(np.asarray(parsed["test"]["group"][:]))[: config.max_test_samples]
        splits, counts["left_out"] = {"test": parsed["test"].select(np.sort(chosen))}, 0
        counts["copies_removed"] = {}
    counts.update({name: len(rows) for name, rows in splits.items()})
    removed = sum(counts["copies_removed"].values())
    counts["cut_by_limits"] = counts["kept"] - sum(map(len, splits.values())) - counts["left_out"] - removed
    shares = {"validation": config.validation_fraction, "test": config.test_fraction}
    counts["held_out_raised"] = [
        split
        for split, share in shares.items()
        if split not in parsed and len(splits.get(split, ())) > max(1, round(share * len(parsed.get("train", ()))))
    ]
    if "train" in splits:
        check_not_empty(counts)
    return Preferences(splits, counts, ends_turns=template is not None)


def _recognized(
    rows: Dataset, columns: dict[str, str], template: Any, place: str
) -> tuple[Dataset, str, str, set[str]]:
    """`recognize`, with the columns that the chat template gets, and the names of those that nothing reads."""
    from datasets import concatenate_datasets

    options = _template_columns(rows, template)
    found, kind, layout = recognize(rows, columns, template is not None, place)
    if options:
        found = concatenate_datasets([found, rows.select_columns(options)], axis=1)
    read = {*columns_by_role(rows.column_names, columns).values(), *options}
    return found, kind, layout, set(rows.column_names) - read


def _why_none(rows: Dataset, kind: str, dropped: dict[str, int]) -> str:
    """What is wrong with rows of which none can be used, and the fix."""
    found = [reason for reason in REASONS if dropped.get(reason)]
    if "no_marker" in found and any("\r\n" in str(text) for text in rows[:1]["chosen"]):
        return "the lines of the dialogues end in \\r\\n; convert them to \\n, as HH has them"
    if kind == "implicit" and "identical" not in found:
        return "the sides begin with no common prompt: name its column with --columns prompt=COLUMN"
    said = {
        "identical": "both responses are the same; two different ones are needed",
        "empty": "a prompt or a response has no text; fill them in",
        "no_marker": "chosen and rejected are dialogues that share no \\n\\nAssistant:; give each pair one prompt",
    }
    return " or ".join(said[reason] for reason in found) or "the file has no rows"


def tokenized_pairs(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Raw pairs of any layout in `resdpo_trl.text.layouts`, tokenized and capped as the recipes do it.

    They are rendered with the tokenizer's chat template where it has one. Unusable pairs are dropped with a warning.

    Raises:
        UserError: columns that make no layout, a row that the template refuses, or no usable pair.
    """
    template = tokenizer if tokenizer.chat_template is not None else None
    config = TextDataConfig(dataset_name="(the data set given)")
    found, kind, _, ignored = _recognized(rows, {}, template, config.dataset_name)
    if ignored:
        logger.warning(f"columns ignored: {', '.join(sorted(ignored))}")
    pairs, statuses = _parse(found, kind, template, config, "given")
    dropped = ", ".join(f"{statuses[reason]} {reason}" for reason in REASONS if statuses[reason])
    if len(pairs) == 0:
        raise UserError(f"no usable pair in {len(rows)} rows: {_why_none(found, kind, dict(statuses))}")
    if dropped:
        logger.warning(f"pairs dropped: {dropped}")
    return tokenize(pairs, tokenizer, max_length, None, template is not None, "Tokenizing")


def _template(config: TextDataConfig, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer where its chat template renders the pairs; None for plain text."""
    if tokenizer is None:
        return None
    if config.dialogue_format == "plain":
        tokenizer.chat_template = None
    elif config.dialogue_format == "chat" and tokenizer.chat_template is None:
        raise UserError("--dialogue_format chat: the tokenizer has no chat template; pass plain, or leave it out")
    return None if tokenizer.chat_template is None else tokenizer


def parse_dialogue(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """Part two HH dialogues into (prompt, chosen response, rejected response).

    The prompt ends at the last "\\n\\nAssistant:" up to which both are equal; what follows is the response, further
    turns included where the two part before the last one. None where no such marker is shared.
    """
    start = chosen.rfind(MARKER, 0, _shared(chosen, rejected))
    if start < 0:
        return None
    boundary = start + len(MARKER)
    return chosen[:boundary], chosen[boundary:], rejected[boundary:]


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
    if not any(message["role"] != "system" for message in messages):
        return [{"role": "user", "content": text.strip()}]
    return messages


def dialogue(messages: Messages) -> str:
    """Messages in HH's form, up to the answer that is asked for; a system message comes without a name."""
    names = {role: speaker for speaker, role in SPEAKERS.items()}
    parts = [
        f"\n\n{names[message['role']]}: {message['content'] or ''}"
        if message["role"] in names
        else str(message["content"])
        for message in messages
    ]
    return "".join(parts) + MARKER


def alternating(messages: Messages) -> Messages:
    """The same conversation for a template that takes nothing but user and assistant in turn, the user first.

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


def _shared(first: str, second: str) -> int:
    """How many characters two texts have in common from the start, by bisection."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first.startswith(second[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def fingerprint(dataset: Dataset) -> str:
    """A digest of a tokenized data set's content, the same however it was loaded."""
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(batch_size=10_000):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            column = batch[name].combine_chunks()
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def chitchat_pairs(
    seed: int = 0,
    shares: tuple[float, float] = (0.05, 0.15),
    per_conversation: int = 4,
    turns: int = 3,
    reply: tuple[int, int] = (20, 200),
    longest_prompt: int = 300,
) -> dict[str, Dataset]:
    """The quickstart's pairs: the reply a person gave against a like-long reply from another conversation.

    Conversations are split first and partners drawn within a split: a reply that one split learns as chosen must not
    come back as rejected in another.

    Args:
        seed: draws the replies that become pairs and their rejected partners.
        shares: shares of the conversations that go to validation and test.
        per_conversation: pairs from one conversation, at most.
        turns: turns of the prompt, at most; they alternate Human and Assistant and end with Human.
        reply: characters of a reply, at least and at most; "ok" would fit any prompt.
        longest_prompt: characters of the prompt, at most.
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
        splits[split].append((identity, [_utterance(message) for message in conversation["messages"]]))
    pairs = {}
    for split, conversations in splits.items():
        replies = []  # (length, conversation, turn)
        for number, (_, texts) in enumerate(conversations):
            at = [
                turn
                for turn in range(1, len(texts))
                if reply[0] <= len(texts[turn]) <= reply[1]
                and all(texts[_opening_turn(turn, turns) : turn])
                and sum(map(len, texts[_opening_turn(turn, turns) : turn])) <= longest_prompt
            ]
            taken: Any = generator.choice(at, min(per_conversation, len(at)), replace=False) if at else []
            replies += [(len(texts[turn]), number, int(turn)) for turn in sorted(taken)]
        if len({number for _, number, _ in replies}) < 2:
            raise UserError(
                f"--dataset_name chitchat: --validation_fraction {shares[0]} and --test_fraction {shares[1]} leave too "
                f"few conversations for the split {split}; every split needs a hundredth of them"
            )
        replies.sort()
        rows = []
        for place, (_, number, turn) in enumerate(replies):
            # a partner of like length: one of the 25 neighbours on either side in the order of lengths
            window = [n for n in range(max(0, place - 25), min(len(replies), place + 26)) if replies[n][1] != number]
            _, other, other_turn = replies[generator.choice(window)]
            identity, texts = conversations[number]
            prompt = "".join(
                f"\n\n{'Human' if (turn - at) % 2 else 'Assistant'}: {texts[at]}"
                for at in range(_opening_turn(turn, turns), turn)
            )
            rows.append(
                {
                    "prompt": prompt + MARKER,
                    "chosen": " " + texts[turn],
                    "rejected": " " + conversations[other][1][other_turn],
                    "group": identity,
                }
            )
        pairs[split] = Dataset.from_list([rows[index] for index in generator.permutation(len(rows))])
    return pairs


def _opening_turn(turn: int, turns: int) -> int:
    """Where the prompt of a reply begins: an odd number of turns before it, so that Human has the first word."""
    count = min(turn, turns)
    return turn - (count if count % 2 else count - 1)


def _utterance(message: list[dict[str, str]]) -> str:
    return " ".join(" ".join(part["text"].split()) for part in message).strip()


def _load(config: TextDataConfig) -> dict[str, Dataset]:
    """The raw rows, by the data's own split names."""
    folder = Path(config.dataset_name).is_dir()
    local = config.dataset_name == QUICKSTART or folder or bool(named_files(config.dataset_name))
    if config.dataset_revision is not None and local:
        raise UserError(
            f"--dataset_revision {config.dataset_revision}: {config.dataset_name} is not on the Hub; drop it"
        )
    for flag in ("dataset_data_dir", "dataset_config"):
        if getattr(config, flag) is not None and local and not folder:
            raise UserError(f"--{flag} {getattr(config, flag)}: {config.dataset_name} is no folder; drop it")
    if config.dataset_name == QUICKSTART:
        return chitchat_pairs(shares=(config.validation_fraction, config.test_fraction))
    return load_rows(
        config.dataset_name, config.dataset_data_dir, config.dataset_revision, QUICKSTART, config.dataset_config
    )


def _by_split(
    sources: dict[str, Dataset], config: TextDataConfig, held_out: bool
) -> tuple[dict[str, Dataset], list[str]]:
    """The raw rows by `SPLITS`, and the data's own splits that are not used; a test split alone if that is wanted."""
    from datasets import concatenate_datasets

    used, left_out = choose_splits(sources, config, held_out)
    try:
        found = {split: concatenate_datasets([sources[name] for name in own]) for split, own in used.items()}
    except ValueError as error:
        raise UserError(
            f"--dataset_train_split {' '.join(used['train'])}: their columns differ ({first_line(error)})"
        ) from None
    if config.eval_dataset_name:
        own_splits = load_rows(config.eval_dataset_name, None, None, QUICKSTART, flag="--eval_dataset_name")
        if len(own_splits) > 1 and "test" not in own_splits:
            raise UserError(
                f"--eval_dataset_name {config.eval_dataset_name}: several splits and none named test (found: "
                f"{', '.join(own_splits)}); name a file of test pairs"
            )
        left_out += used.get("test", [])
        found["test"] = own_splits["test"] if "test" in own_splits else next(iter(own_splits.values()))
    return found, left_out


def _template_columns(rows: Dataset, template: Any) -> list[str]:
    """The columns other than the messages that a chat template reads, where there is one."""
    if template is None:
        return []
    column = rows["tools"] if "tools" in rows.column_names else []
    tools = next((value for value in column if value and value not in ("[]", "null")), None)
    read = {"chat_template_kwargs", *(["tools"] if tools is not None and _reads_tools(template, tools) else [])}
    return sorted(read & set(rows.column_names))


def _reads_tools(template: Any, tools: Any) -> bool:
    asked = [{"role": "user", "content": "a question"}]
    with suppress(Exception):  # a template is a program: what it raises ends the row that it raises for
        plain, given = (
            template.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **options)
            for options in ({}, _template_options({"tools": tools}))
        )
        return bool(plain != given)
    return True


def _template_options(row: dict[str, Any]) -> dict[str, Any]:
    """What a row passes to the chat template in addition to its messages, as TRL reads it.

    Raises:
        ValueError: `tools` is a text and no JSON, or `chat_template_kwargs` is no mapping.
    """
    tools, options = row.get("tools"), row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        tools = json.loads(tools)
    return ({"tools": tools} if tools else {}) | dict(options)


def _parse(
    rows: Dataset, kind: str, template: PreTrainedTokenizerBase | None, config: TextDataConfig, split: str
) -> tuple[Dataset, Counter[str]]:
    """Rows of a split -> usable pairs and a count of the statuses."""
    from datasets import Features, List, Value

    if kind == "conversation" and template is None:
        raise UserError(
            "the pairs are conversations (lists of messages), which need a tokenizer with a chat template: name such a "
            "model with --model_name_or_path, or give prompt, chosen and rejected as text"
        )
    features = {
        "prompt": Value("string"),
        "chosen": Value("string"),
        "rejected": Value("string"),
        "turn_starts": List(Value("int32")),
        "header_end": Value("int32"),
        "shown": Value("string"),
        "group": Value("string"),
        "whole": Value("string"),
        "pair": Value("string"),
        "status": Value("string"),
    }
    options = {"kind": kind, "swap": config.prefer == "rejected", "place": f"{config.dataset_name}, split {split}"}
    parsed = rows.map(
        _parse_batch,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features(features),
        fn_kwargs={"template": template, **options},
        new_fingerprint=cache_key(_parse_batch, rows, options, tokenizer_state(template) if template else None),
        desc="Reading pairs",
    )
    statuses = Counter(parsed.with_format("numpy")["status"][:].tolist()) if len(parsed) else Counter()
    kept = [index for index, status in enumerate(parsed["status"]) if status not in REASONS]
    if len(kept) < len(parsed):
        parsed = parsed.select(kept)
    return parsed.remove_columns("status"), statuses


def _parse_batch(
    batch: dict[str, list[Any]],
    numbers: list[int],
    kind: str,
    template: PreTrainedTokenizerBase | None,
    swap: bool,
    place: str,
) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {
        name: []
        for name in (
            "prompt", "chosen", "rejected", "turn_starts", "header_end", "shown", "group", "whole", "pair", "status",
        )
    }  # fmt: skip
    size = len(batch["chosen"])
    prompts = batch.get("prompt", [None] * size)
    groups = batch.get("group", [None] * size)
    columns = (numbers, prompts, batch["chosen"], batch["rejected"], groups)
    for at, (number, prompt, chosen, rejected, group) in enumerate(zip(*columns, strict=True)):
        if kind == "conversation":
            try:
                found = _conversation(*(_with_text_content(side) for side in (prompt, chosen, rejected)))
            except UserError as error:
                raise UserError(f"--dataset_name {place}, row {number + 1}: {error}") from None
        else:
            found = _texts(prompt, chosen, rejected, kind)
        pair: _Pair = found if isinstance(found, _Pair) else _Pair("", "", "", status=found)
        if template is not None and pair.status not in REASONS:
            try:
                options = _template_options({name: batch[name][at] for name in TEMPLATE_COLUMNS if name in batch})
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"--dataset_name {place}, row {number + 1}: tools must be a list of functions or its JSON, and "
                    f"chat_template_kwargs a mapping ({first_line(error)}); fix the row or drop the column"
                ) from None
            try:
                pair = _render(pair, template, options)
            except Exception as error:  # a template is a program: it may raise anything for roles it does not expect
                raise UserError(
                    f"--dataset_name {place}, row {number + 1}: the chat template refuses the conversation "
                    f"{str(pair.messages or messages_of(pair.prompt))[:80]} ({first_line(error)}); fix or drop the "
                    "row, or pass --dialogue_format plain"
                ) from None
            if options:  # the same texts with other tools are another pair
                pair.pair = _digest(pair.pair + json.dumps(options, sort_keys=True, default=str))
        out["prompt"].append(pair.prompt)
        out["chosen"].append(pair.rejected if swap else pair.chosen)
        out["rejected"].append(pair.chosen if swap else pair.rejected)
        out["turn_starts"].append(pair.turn_starts)
        out["header_end"].append(pair.header_end)
        out["shown"].append(pair.shown)
        out["group"].append(_digest(group) if group else pair.group)
        out["whole"].append(pair.whole)
        out["pair"].append(pair.pair)
        out["status"].append(pair.status)
    return out


@dataclass
class _Pair:
    """A row on its way: texts, or a conversation's messages that `_render` makes texts of."""

    prompt: str
    chosen: str
    rejected: str
    turn_starts: list[int] = field(default_factory=list)
    header_end: int = 0
    messages: Messages = field(default_factory=list)  # of a conversation: the prompt's, and the two responses'
    responses: tuple[Messages, Messages] = field(default_factory=lambda: ([], []))
    shown: str = ""
    group: str = ""
    whole: str = ""
    pair: str = ""
    status: str = "kept"


def _texts(prompt: str | None, chosen: str | None, rejected: str | None, kind: str) -> _Pair | str:
    """A row of text as a pair, or why it can't be used."""
    if not chosen or not rejected:
        return "empty"
    if kind == "implicit" and chosen == rejected:
        return "identical"
    if kind == "dialogue":
        parts = parse_dialogue(chosen, rejected)
        if parts is None:
            return "identical" if chosen.strip() == rejected.strip() else "no_marker"
        prompt, chosen, rejected = parts
    if kind == "implicit":  # as TRL parts them: where they begin to differ, a space before it left to the responses
        shared = _shared(chosen, rejected)
        shared -= chosen[:shared].endswith(" ")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    prompt, chosen, rejected = prompt or "", chosen.rstrip(), rejected.rstrip()
    if chosen.strip() == rejected.strip():
        return "identical" if chosen.strip() else "empty"
    if not chosen.strip() or not rejected.strip() or not prompt.strip():
        return "empty"
    starts = turn_starts(prompt)
    early = kind == "dialogue" and (MARKER in chosen or MARKER in rejected)
    said = _pair_digest(messages_of(prompt), _answer(chosen), _answer(rejected))
    return _Pair(
        prompt, chosen, rejected, starts, shown=prompt, group=_digest(_opening(prompt, starts)), whole=_digest(prompt),
        pair=said, status="parted_early" if early else "kept",
    )  # fmt: skip


def _with_text_content(messages: Messages | None) -> Messages | None:
    """The same messages with contents that are text: parts of type text are joined.

    A system message without text is none. Any other message without text that calls no tool, or without a role, makes
    a conversation unusable: it becomes empty.

    Raises:
        UserError: a content has parts of another type.
    """
    if messages is None:
        return None
    found: Messages = []
    for message in messages:
        content = message and message.get("content")
        if isinstance(content, list):
            other = [part for part in content if not isinstance(part, dict) or part.get("type") != "text"]
            if other:
                raise UserError(
                    f"a message has a content of another type than text ({str(other[0])[:60]}): only text is read; "
                    "drop the row"
                )
            content = "".join(part.get("text") or "" for part in content)
        if not message or not message.get("role"):
            return []
        if message["role"] == "system" and content is None:
            continue
        if message["role"] != "system" and not message.get("tool_calls") and not str(content or "").strip():
            return []
        found.append(message | {"content": content})
    return found


def _conversation(prompt: Messages | None, chosen: Messages | None, rejected: Messages | None) -> _Pair | str:
    """A row of messages as a pair, or why it can't be used."""
    if not chosen or not rejected:
        return "empty"
    if chosen == rejected:
        return "identical"
    messages, good, bad = _parted(prompt, chosen, rejected)
    if not messages or not good or not bad:
        return "empty"
    said = next((at for at, message in enumerate(messages) if message["role"] != "system"), 0)
    opening, whole = (_digest(json.dumps(part, default=str)) for part in (messages[: said + 1], messages))
    pair = _pair_digest(messages, good, bad)
    return _Pair("", "", "", messages=messages, responses=(good, bad), group=opening, whole=whole, pair=pair)


def _answer(text: str) -> Messages:
    """A response of text as messages."""
    return messages_of(MARKER + text) if MARKER in text else [{"role": "assistant", "content": text.strip()}]


def _pair_digest(prompt: Messages, chosen: Messages, rejected: Messages) -> str:
    """A digest of a pair's messages, without the spaces around a content, keys without a value and their order."""
    told = [
        json.dumps(
            [
                {name: each.strip() if isinstance(each, str) else each for name, each in turn.items() if each}
                for turn in part
            ],
            sort_keys=True,
            default=str,
        )
        for part in (prompt, chosen, rejected)
    ]
    return _digest("\n".join([told[0], *sorted(told[1:])]))


def _render(pair: _Pair, template: Any, options: dict[str, Any]) -> _Pair:
    """A pair through the tokenizer's chat template, with its roles repaired where the template refuses them.

    The repair is of the whole conversation: an answer that the prompt already began becomes part of both responses.
    """
    messages, (chosen, rejected) = pair.messages, pair.responses
    if not messages:  # a row of text
        messages = messages_of(pair.prompt)
        chosen, rejected = _answer(pair.chosen), _answer(pair.rejected)
    status = pair.status
    try:
        texts = _rendered(messages, chosen, rejected, template, options)
    except Exception:
        asked = alternating(messages)
        asked = asked[:-1] if asked and asked[-1]["role"] == "assistant" else asked
        responses = tuple(alternating([*messages, *side])[len(asked) :] for side in (chosen, rejected))
        if not asked or (asked, *responses) == (messages, chosen, rejected):
            raise
        messages, (chosen, rejected), status = asked, responses, "roles_repaired"
        texts = _rendered(messages, chosen, rejected, template, options)
    if texts[1].strip() == texts[2].strip():
        status = "identical"
    header_end, starts = rendered_turns(messages, texts[0], template, options)
    return replace(
        pair, prompt=texts[0], chosen=texts[1], rejected=texts[2], turn_starts=starts, header_end=header_end,
        shown=dialogue(messages), status=status,
    )  # fmt: skip


def _rendered(
    messages: Messages, chosen: Messages, rejected: Messages, template: Any, options: dict[str, Any]
) -> tuple[str, str, str]:
    """Prompt, chosen and rejected text of a pair: the prompt is what its own rendering and both whole ones begin with,
    for some templates write the question before an answer differently (a thought that is opened, …)."""
    asked = template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    good, bad = (
        template.apply_chat_template([*messages, *side], tokenize=False, **options) for side in (chosen, rejected)
    )
    end = min(_shared(asked, good), _shared(asked, bad))
    return asked[:end], good[end:], bad[end:]


def turn_starts(prompt: str) -> list[int]:
    """Offsets at which turns start, without the first one's and the closing marker's, which has no turn yet."""
    closing = len(prompt) - len(MARKER) if prompt.endswith(MARKER) else -1
    return [match.start() for match in TURN.finditer(prompt) if match.start() not in (0, closing)]


def _opening(prompt: str, turn_starts: list[int]) -> str:
    """The conversation's first turn, with the system message before it; the whole prompt where it has but one."""
    first = 0 if prompt.lstrip().startswith(("Human:", "Assistant:")) else 1
    return prompt[: turn_starts[first]] if len(turn_starts) > first else prompt


def _parted(prompt: Messages | None, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """A conversational pair's prompt and responses; without a prompt of its own it is what both sides begin with."""
    from trl.data_utils import extract_prompt

    if prompt is not None or chosen == rejected:
        return prompt or [], chosen, rejected
    row: Any = extract_prompt({"chosen": chosen, "rejected": rejected})
    return row["prompt"], row["chosen"], row["rejected"]


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

    `asked` is the template and the options that a row passes to it, as JSON.

    A turn of the user is rendered at the beginning and after an answer: what the first has more than the second.
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


def _groups(rows: Dataset) -> np.ndarray:
    """(N,) what may not part between splits: the conversation's opening, or the prompt where many share an opening.

    A greeting or a system prompt opens many conversations that have nothing else in common.
    """
    groups = np.asarray(rows["group"][:])
    _, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
    common = counts[place] > max(COMMON_OPENING, len(rows) // 100)
    if common.any():
        at = np.flatnonzero(common)
        groups[at] = rows.select(at)["whole"]
    return groups


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _split(rows_of: dict[str, Dataset], config: TextDataConfig) -> tuple[dict[str, Dataset], int, dict[str, int]]:
    """Three splits: the data's own where it has them, the rest held out from its training rows by group; how many rows
    are in none, for their conversation has others in a held-out split that was full; and how many a split loses because
    a held-out one has them too.

    Rows are ordered by their group's digest, so that the choice depends on neither a seed nor the order of the file. A
    limit takes one row of each group before a second one of any (`_spread`): pairs of one conversation share much of
    their text, so that they teach less, and their figures are not independent. A smaller limit takes a subset of a
    larger one.
    """
    rows = rows_of["train"]
    groups = _groups(rows)
    order = np.argsort(groups, kind="stable")
    # (S,) where in the order a group begins: the only places to cut
    starts = np.flatnonzero(np.r_[True, groups[order][1:] != groups[order][:-1]]) if len(order) else np.empty(0, int)
    limits = {
        "test": config.max_test_samples, "validation": config.max_eval_samples, "train": config.max_train_samples
    }  # fmt: skip
    shares = {"test": config.test_fraction, "validation": config.validation_fraction}
    places: dict[str, np.ndarray] = {}  # of each split's rows in its table
    taken = left_out = 0
    for split in ("test", "validation"):
        if split in rows_of:
            places[split] = np.arange(len(rows_of[split]))
            continue
        wanted = held_out_size(len(rows), shares[split], limits[split])
        later = starts[starts >= taken + wanted]
        if len(later) == 0:
            raise UserError(
                f"--dataset_name {config.dataset_name}: {len(rows)} usable pairs of {len(starts)} conversations are "
                "too few for a training, a validation and a test split; three conversations is the least"
            )
        places[split] = order[taken : taken + wanted]
        left_out += int(later[0]) - taken - wanted
        taken = int(later[0])
    places["train"] = order[taken:]
    tables = {split: rows_of.get(split, rows) for split in SPLITS}
    kept, copies = held_out_first({split: np.asarray(tables[split]["pair"][:])[places[split]] for split in SPLITS})
    splits: dict[str, Dataset] = {}
    for split in SPLITS:
        place = places[split][kept[split]]
        if split in rows_of:
            own_groups = groups if split == "train" else np.asarray(rows_of[split]["group"][:])
            place = place[_spread(own_groups[place])][: limits[split]]
        splits[split] = tables[split].select(np.sort(place))
    return splits, left_out, copies


def _spread(groups: np.ndarray) -> np.ndarray:
    """(N,) an order of rows: one of each group in the order of the groups, then the second of each, and so on."""
    order = np.argsort(groups, kind="stable")
    _, first, inverse = np.unique(groups[order], return_index=True, return_inverse=True)
    place_in_group = np.arange(len(order)) - first[inverse]
    return order[np.argsort(place_in_group, kind="stable")]

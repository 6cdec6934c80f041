import copy
import functools
import json
import os
import random
from types import SimpleNamespace

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import DPOConfig, DPOTrainer

from resdpo_trl.errors import UserError
from resdpo_trl.text import data, tokens
from resdpo_trl.text.data import MARKER, TextDataConfig, load_preferences, rendered_turns, turn_starts
from resdpo_trl.text.tokens import (
    cap_counts,
    cap_prompt,
    encode,
    response_ids,
    sft_rows,
    tokenize,
    tokenize_prompts,
)
from tests.conftest import (
    ANSWERS,
    CHATML,
    SENTENCEPIECE,
    TURNS,
    sentencepiece_tokenizer,
    train_tokenizer,
    write_pairs,
)


def texts(rows):
    return Dataset.from_list([row | {"turn_starts": turn_starts(row["prompt"]), "header_end": 0} for row in rows])


def dialogue(words, generator):
    turns = [
        f"\n\n{'Human' if n % 2 == 0 else 'Assistant'}: " + " ".join(generator.choices(["ab", "cde", "fgh"], k=k))
        for n, k in enumerate(words)
    ]
    return "".join(turns) + MARKER


@given(
    words=st.lists(st.integers(1, 60), min_size=1, max_size=5).filter(lambda lengths: len(lengths) % 2),
    chosen=st.integers(1, 80),
    rejected=st.integers(1, 80),
    max_length=st.sampled_from([16, 32, 64, 128]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_what_the_cap_promises(tokenizer, words, chosen, rejected, max_length, seed):
    generator = random.Random(seed)
    row = {
        "prompt": dialogue(words, generator),
        "chosen": " x" * chosen,
        "rejected": " yz" * rejected,
    }
    (capped,) = tokenize(texts([row]), tokenizer, max_length)
    whole = {name: tokenizer(row[name])["input_ids"] for name in row}
    eos, budget = tokenizer.eos_token_id, max_length // 2
    for side in ("chosen", "rejected"):
        ids, full = capped[f"{side}_ids"], whole[side]
        assert len(ids) >= 1
        assert len(capped["prompt_ids"]) + len(ids) <= max_length
        cut = capped[f"{side}_tokens_cut"]
        if cut:
            assert ids == full[: len(ids)]  # its start, and no end-of-text
            assert len(ids) >= budget
            assert len(ids) + cut == len(full) + 1
        else:
            assert ids == [*full, eos]
    kept = capped["prompt_ids"]
    assert whole["prompt"][-len(kept) :] == kept  # the newest tokens: the marker and the last turn's end stay
    assert capped["prompt_tokens_dropped"] == len(whole["prompt"]) - len(kept)
    marker = tokenizer(MARKER)["input_ids"]
    assert len(marker) < len(kept) or len(kept) == len(whole["prompt"])
    assert kept[-len(marker) :] == marker
    # nothing is cut that would have fitted
    longest = max(len(capped["chosen_ids"]), len(capped["rejected_ids"]))
    if len(whole["prompt"]) + longest <= max_length:
        assert capped["prompt_tokens_dropped"] == 0
    # whole turns went first: the rest starts at a turn unless the newest turn alone is too long
    if capped["prompt_tokens_dropped"]:
        starts = [len(tokenizer(row["prompt"][:at])["input_ids"]) for at in turn_starts(row["prompt"])]
        room = max_length - longest
        fitting = [start for start in starts if len(whole["prompt"]) - start <= room]
        expected = min(fitting) if fitting else len(whole["prompt"]) - room
        assert capped["prompt_tokens_dropped"] == expected
        assert capped["turns_dropped"] == (starts.index(expected) + 1 if fitting else len(starts))


def test_cap_prompt_by_hand():
    prompt = list(range(10))
    assert cap_prompt(prompt, [3, 6], 10) == (prompt, 0)
    assert cap_prompt(prompt, [3, 6], 9) == (prompt[3:], 1)
    assert cap_prompt(prompt, [3, 6], 7) == (prompt[3:], 1)
    assert cap_prompt(prompt, [3, 6], 6) == (prompt[6:], 2)
    assert cap_prompt(prompt, [3, 6], 2) == (prompt[8:], 2)
    assert cap_prompt(prompt, [], 2) == (prompt[8:], 0)
    # the beginning counts, and is not doubled where a turn brings it
    assert cap_prompt(prompt, [3, 6], 8, [0]) == ([0, *prompt[3:]], 1)
    assert cap_prompt(prompt, [3, 6], 7, [0]) == ([0, *prompt[6:]], 2)
    assert cap_prompt(prompt, [3, 6], 2, [0]) == ([0, 9], 2)
    assert cap_prompt(prompt, [3, 6], 7, [5]) == (prompt[3:], 1)
    assert cap_prompt([0, 1, 2, 0, 3, 4], [3], 4, [0]) == ([0, 3, 4], 1)


@pytest.fixture
def passes(monkeypatch):
    """Which of the cached steps ran, in order: [] is a run that read everything."""
    found = []
    for module, name in ((data, "_parse_batch"), (tokens, "_tokenize_batch")):
        function = getattr(module, name)

        @functools.wraps(function)
        def noted(*args, _function=function, **kwargs):
            found.append(_function.__name__)
            return _function(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)
    return found


def test_what_is_cached_is_keyed_by_all_that_changes_it(tmp_path, chat_tokenizer, passes, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    rows = write_pairs(30)

    def prepare(cap=64, **options):
        passes.clear()
        tokenizer = copy.deepcopy(chat_tokenizer)
        pairs = load_preferences(TextDataConfig(dataset_name=str(path), **options), tokenizer)
        tokenized = tokenize(pairs["train"], tokenizer, cap, ends_turns=pairs.ends_turns)
        return set(passes), tokenized.to_list()

    def write(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.utime(path, (1e9, 1e9))

    write(rows)
    ran, first = prepare()
    assert ran == {"_parse_batch", "_tokenize_batch"}
    assert prepare() == (set(), first)
    everything = {"_parse_batch", "_tokenize_batch"}
    assert prepare(cap=32)[0] == {"_tokenize_batch"}
    assert prepare(prefer="rejected")[0] == everything
    assert prepare(dialogue_format="plain")[0] == everything
    with monkeypatch.context() as changed:
        changed.setattr(tokens, "code_version", lambda: "another")
        assert prepare()[0] == everything
    write([{side: row[side].replace("?", "!") for side in row} for row in rows])  # of the same size and time
    ran, other = prepare()
    assert ran == everything and other != first
    write(rows)
    assert prepare() == (set(), first)
    chat_tokenizer.chat_template += " "
    assert prepare()[0] == everything


def test_the_codes_version_is_of_its_text(tmp_path, monkeypatch):
    found = [tokens.code_version.__wrapped__()]
    for name in ("tokens.py", "scoring.py"):
        (tmp_path / name).write_text("x = 1")
    monkeypatch.setattr(tokens, "__file__", str(tmp_path / "tokens.py"))
    found.append(tokens.code_version.__wrapped__())
    (tmp_path / "scoring.py").write_text("x = 2")
    found.append(tokens.code_version.__wrapped__())
    monkeypatch.setattr(tokens.importlib.metadata, "version", lambda name: "0")
    found.append(tokens.code_version.__wrapped__())
    assert len(set(found)) == 4 == len({*found, tokens.code_version.__wrapped__()})


def test_counts_add_up(tokenizer, dialogues, tmp_path):
    import json

    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in dialogues))
    pairs = load_preferences(TextDataConfig(dataset_name=str(path)))["train"]
    roomy, tight = (tokenize(pairs, tokenizer, length) for length in (1000, 32))
    assert len(roomy) == len(tight) == len(pairs)
    assert cap_counts(roomy) == dict.fromkeys(cap_counts(roomy), 0) | {"pairs": len(pairs)}
    counts = cap_counts(tight)
    assert counts["prompts_shortened"] == sum(n > 0 for n in tight["prompt_tokens_dropped"]) > 0
    assert counts["prompt_tokens_dropped"] == sum(map(len, roomy["prompt_ids"])) - sum(map(len, tight["prompt_ids"]))
    for row in roomy:
        assert row["length"] == sum(len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))


def test_a_beginning_of_text_stays_in_front(dialogues):
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(["a b c"], 300)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    row = {"prompt": "\n\nHuman: " + "a b c " * 30 + MARKER, "chosen": " a", "rejected": " b"}
    for max_length in (32, 1000):
        (capped,) = tokenize(texts([row]), tokenizer, max_length)
        assert capped["prompt_ids"][0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in capped["prompt_ids"][1:]
        assert len(capped["prompt_ids"]) + len(capped["chosen_ids"]) <= max_length


def test_a_beginning_that_a_template_wrote_stays_in_front(tokenizer):
    bos = tokenizer.bos_token
    turn = "<user>" + "a b c " * 20 + "<end>"
    row = {"prompt": f"{bos}{turn}{turn}<user>last<end>", "chosen": "b<end>", "rejected": "c<end>"}
    starts = [len(bos + turn), len(bos + turn + turn)]
    rows = Dataset.from_list([row | {"turn_starts": starts, "header_end": 0}])
    whole, last = tokenizer(row["prompt"])["input_ids"], tokenizer("<user>last<end>")["input_ids"]
    for max_length, kept in ((len(whole) + 40, whole), (40, [tokenizer.bos_token_id, *last])):
        (capped,) = tokenize(rows, tokenizer, max_length, ends_turns=True)
        assert capped["prompt_ids"] == kept
        assert capped["prompt_tokens_dropped"] == len(whole) - len(kept)
        (asked,), (lost,) = tokenize_prompts([(row["prompt"], starts, 0)], tokenizer, max_length - 10, True)
        assert (asked, lost) == (kept, len(whole) - len(kept))


def test_a_templates_end_of_turn_is_not_doubled(tokenizer):
    row = {"prompt": "<user>a<end>", "chosen": "b<end>", "rejected": "c<end>"}
    (capped,) = tokenize(texts([row]), tokenizer, 64, ends_turns=True)
    assert tokenizer.eos_token_id not in capped["chosen_ids"]


def rendered(messages, tokenizer):
    """A conversation as `load_preferences` renders it, with two answers."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    header_end, starts = rendered_turns(messages, text, tokenizer)
    sides = {side: f"{side}<|im_end|>\n" for side in ("chosen", "rejected")}
    return Dataset.from_list([{"prompt": text, **sides, "turn_starts": starts, "header_end": header_end}])


def conversation(words, system, generator):
    turns = [
        {
            "role": "user" if (len(words) - n) % 2 else "assistant",
            "content": " ".join(generator.choices(["ab", "cde", "fgh"], k=count)),
        }
        for n, count in enumerate(words)
    ]
    return ([{"role": "system", "content": system}] if system else []) + turns


@given(
    words=st.lists(st.integers(1, 25), min_size=1, max_size=6),
    system=st.sampled_from([None, "Be kind.", "a b " * 40]),
    max_length=st.sampled_from([48, 64, 96, 160]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_a_truncated_prompt_is_the_rendering_of_the_turns_that_are_left(
    _chat_tokenizer, words, system, max_length, seed
):
    """The system turn stays, the template's own or the conversation's, and the oldest turns go, as few as will do."""
    tokenizer = _chat_tokenizer
    messages = conversation(words, system, random.Random(seed))
    turns = messages[1:] if system else messages
    rows = rendered(messages, tokenizer)
    (capped,) = tokenize(rows, tokenizer, max_length, ends_turns=True)
    budget = max_length - max(len(capped["chosen_ids"]), len(capped["rejected_ids"]))

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    whole, header = ids_of(rows[0]["prompt"]), ids_of(rows[0]["prompt"][: rows[0]["header_end"]])
    assert tokenizer.decode(header) == (f"<|im_start|>system\n{system or 'You are helpful'}<|im_end|>\n")
    head = messages[:1] if system else []
    left = [
        ids_of(tokenizer.apply_chat_template(head + turns[n:], tokenize=False, add_generation_prompt=True))
        for n in range(len(turns))
    ]
    kept = capped["prompt_ids"]
    if 2 * len(header) > budget:  # it would leave the turns less than it takes
        left = [left[0], *(ids[len(header) :] for ids in left[1:])]
    fitting = next((n for n, ids in enumerate(left) if len(ids) <= budget), None)
    if fitting is not None:
        assert kept == left[fitting]
        assert capped["turns_dropped"] == fitting
    else:  # the newest turn alone is too long
        stays = header if 2 * len(header) <= budget else []
        assert kept == stays + whole[len(whole) - (budget - len(stays)) :]
        assert len(kept) == budget
    assert capped["prompt_tokens_dropped"] == len(whole) - len(kept)
    prompt = (rows[0]["prompt"], rows[0]["turn_starts"], rows[0]["header_end"])
    (asked,), (lost,) = tokenize_prompts([prompt], tokenizer, budget, True)
    assert (asked, lost) == (kept, len(whole) - len(kept))


def test_a_header_of_more_than_half_the_budget_is_not_kept():
    header, prompt = [90, 91, 92, 93], [90, 91, 92, 93, *range(20)]
    assert cap_prompt(prompt, [14], 8, header) == (header + prompt[-4:], 1)
    assert cap_prompt(prompt, [14], 7, header) == (prompt[-7:], 1)
    assert cap_prompt(prompt, [14], 14, header) == (header + prompt[14:], 1)
    assert cap_prompt(prompt, [14], 24, header) == (prompt, 0)


def test_sft_learns_the_response_or_everything(tokenizer):
    pairs = tokenize(texts([{"prompt": f"\n\nHuman: a{MARKER}", "chosen": " b", "rejected": " c"}]), tokenizer, 64)
    (pair,), (row,), (whole,) = pairs, sft_rows(pairs, True), sft_rows(pairs, False)
    prompt = len(pair["prompt_ids"])
    assert row["input_ids"] == whole["input_ids"] == whole["labels"] == pair["prompt_ids"] + pair["chosen_ids"]
    assert row["labels"] == [-100] * prompt + pair["chosen_ids"]
    assert row["labels"][-1] == tokenizer.eos_token_id


# --- a response's tokens are those that it has after its prompt ---------------------------------------------------

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (  # ends in a space
    "{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else ' ') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LINES = (  # ends in a newline, as an answer may begin, and ends no turn with a special token
    "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
THINKING = CHATML.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}")
TOKENIZERS = {
    "byte-level BPE": lambda: train_tokenizer(["user: assistant:\n\n\n" * 9, *TURNS * 3, *ANSWERS * 3], 400),
    "of a chat model": lambda: train_tokenizer(
        ["user\nassistant\n" * 9, *TURNS * 3, *ANSWERS * 3], 400, ["<|im_start|>", "<|im_end|>"]
    ),
} | {f"SentencePiece, {kind}": lambda kind=kind: sentencepiece_tokenizer(kind) for kind in SENTENCEPIECE}


def trl_rows(rows, tokenizer, folder):
    """(prompt, chosen, rejected) ids of rows, as TRL's trainer makes them."""
    args = DPOConfig(str(folder), report_to="none", use_cpu=True, bf16=False, max_length=None)
    trainer = SimpleNamespace(_tokenizer=tokenizer)  # all that the method reads of a trainer
    prepared = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return {tuple(tuple(row[name]) for name in columns) for row in prepared}


def our_rows(rows, tokenizer, folder):
    Dataset.from_list(rows).to_json(folder / "pairs.jsonl")
    pairs = load_preferences(TextDataConfig(dataset_name=str(folder / "pairs.jsonl")), tokenizer)
    tokenized = [tokenize(pairs[split], tokenizer, 10_000, None, pairs.ends_turns) for split in pairs.splits]
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return {tuple(tuple(row[name]) for name in columns) for split in tokenized for row in split}


def answered(beginning=""):
    """Pairs of conversations; answers begin as asked for."""
    return [
        {
            "prompt": [
                {"role": "user", "content": f"{number}: {TURNS[number % 6]}"},
                {"role": "assistant", "content": ANSWERS[number % 3]},
                {"role": "user", "content": TURNS[number % 5]},
            ],
            "chosen": [{"role": "assistant", "content": beginning + ANSWERS[number % 5]}],
            "rejected": [{"role": "assistant", "content": beginning + ANSWERS[number % 2 + 5]}],
        }
        for number in range(12)
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["ZEPHYR", "VICUNA", "LINES", "CHATML", "THINKING"])
def test_conversations_have_the_tokens_that_trl_gives_them(tmp_path, name, template):
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = globals()[template]
    rows = answered("\n" if template == "LINES" else "")
    ours = our_rows(rows, tokenizer, tmp_path)
    assert len(ours) == len(rows)
    assert ours == trl_rows(rows, tokenizer, tmp_path)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("ends", "begins"), [("", " "), (" ", ""), ("\n", ""), ("\n", "\n"), ("", ""), (" ", " ")])
def test_texts_have_the_tokens_that_trl_gives_them(tmp_path, name, ends, begins):
    tokenizer = TOKENIZERS[name]()
    rows = [
        {
            "prompt": f"{number}: {TURNS[number % 6]} assistant:{ends}",
            "chosen": begins + ANSWERS[number % 4],
            "rejected": begins + ANSWERS[number % 4 + 4],
        }
        for number in range(12)
    ]
    ours = our_rows(rows, tokenizer, tmp_path)
    assert len(ours) == len(rows)
    assert ours == trl_rows(rows, tokenizer, tmp_path)


PIECES = [
    " ",
    "  ",
    "\n",
    "\t",
    "a",
    "'s",
    "It",
    " is",
    ".",
    "?!",
    "7",
    "é",
    "中",
    "</s>",
    "<|endoftext|>",
    "<|im_end|>",
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizing_a_prompt_again_from_a_safe_place_gives_what_the_whole_text_gives(name):
    """Against the definition: the tokens of the whole text, parted at what the prompt's own tokens share with both."""
    tokenizer = TOKENIZERS[name]()

    @given(*(st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join) for _ in range(3)))
    @settings(max_examples=60, deadline=None, database=None)
    def check(prompt, first, second):
        ids, *whole = tokenizer([prompt, prompt + first, prompt + second], add_special_tokens=False)["input_ids"]
        shared = next(
            (at for at, token in enumerate(ids) if any(text[at : at + 1] != [token] for text in whole)), len(ids)
        )
        encoded = encode(tokenizer, [prompt])
        found, (merged,) = response_ids(tokenizer, [prompt], [[first], [second]], encoded)
        assert len(ids) - merged == shared
        assert [side for (side,) in found] == [text[shared:] for text in whole]

    check()


def test_prompts_whose_end_merges_with_a_response_are_counted(tokenizer):
    rows = [{"prompt": f"{n}: what is it? ", "chosen": "it is", "rejected": "is it"} for n in range(3)]
    rows.append({"prompt": "what is it?", "chosen": " it is", "rejected": " is it"})
    tokenized = tokenize(texts(rows), tokenizer, 64)
    assert cap_counts(tokenized)["prompts_merged"] == 3
    assert tokenized["prompt_tokens_merged"][:] == [1, 1, 1, 0]
    for row, text in zip(tokenized, rows, strict=True):
        assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"][:-1]) == text["prompt"] + text["chosen"]


def test_an_end_of_text_that_a_response_has_is_not_doubled(tokenizer):
    row = {"prompt": "a", "chosen": f" b{tokenizer.eos_token}", "rejected": " c"}
    (pair,) = tokenize(texts([row]), tokenizer, 64)
    assert [pair[side].count(tokenizer.eos_token_id) for side in ("chosen_ids", "rejected_ids")] == [1, 1]


@pytest.mark.parametrize(("length", "response"), [(15, None), (32, 25), (32, 0)])
def test_caps_without_room(tokenizer, length, response):
    with pytest.raises(UserError, match="--max"):
        tokenize(texts([{"prompt": "a", "chosen": "b", "rejected": "c"}]), tokenizer, length, response)


def test_a_prompt_that_merges_with_both_responses_leaves_a_token_before_them(tokenizer):
    merged = next(token for token in tokenizer.get_vocab() if token.isascii() and token.isalpha() and len(token) == 2)
    row = {"prompt": merged[0], "chosen": merged[1], "rejected": merged[1] + " yes"}
    rows = Dataset.from_list([row | {"turn_starts": [], "header_end": 0}])
    (found,) = tokenize(rows, tokenizer, 16)
    assert found["prompt_ids"] == [tokenizer.eos_token_id]
    assert tokenizer.decode(found["chosen_ids"][:-1]) == merged

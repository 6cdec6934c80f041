"""Prompt files: each kind of row, what is skipped and counted, what is refused with its line."""

import gzip
import json

import pytest

from resdpo_trl.errors import UserError
from resdpo_trl.study import prompts
from resdpo_trl.study.prompts import load_prompts
from resdpo_trl.text.data import chitchat_pairs
from resdpo_trl.text.generate import answer_ids, prompt_ids, write_prompt
from tests.conftest import SENTENCEPIECE, sentencepiece_tokenizer

TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEMPLATE = TURN + "{% if add_generation_prompt %}<assistant>{% endif %}"
MESSAGES = [
    {"role": "user", "content": "What is rain?"},
    {"role": "assistant", "content": "Water."},
    {"role": "user", "content": "Why?"},
]


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def test_every_kind_of_row(tmp_path):
    pair = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go"}
    early = {
        "chosen": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: b\n\nAssistant: c",
        "rejected": "\n\nHuman: hi\n\nAssistant: d",
    }
    rows = [
        {"prompt": "plain"},
        "",
        {"prompt": MESSAGES},
        pair,
        early,
        "  ",
        {"prompt": "plain"},
    ]
    found, counts = load_prompts(write(tmp_path / "p.jsonl.gz", rows), None)
    opening = "\n\nHuman: hi\n\nAssistant:"
    assert found == ["plain", MESSAGES, opening]
    assert counts["rows"] == 5 and counts["empty_lines"] == 2 and counts["repeated"] == 2 and counts["used"] == 3
    assert load_prompts(write(tmp_path / "p.jsonl", rows), 2)[0] == found[:2]


def test_lines_of_text_are_questions(tmp_path, tokenizer):
    path = tmp_path / "questions.txt"
    path.write_text("\ufeffWhat is rain?\n\n  Why?  \n", encoding="utf-8")
    found, counts = load_prompts(str(path), None)
    assert [write_prompt(prompt, tokenizer)[0] for prompt in found] == [
        "\n\nHuman: What is rain?\n\nAssistant:", "\n\nHuman: Why?\n\nAssistant:"
    ]  # fmt: skip
    assert counts["empty_lines"] == 1


def test_messages_go_through_the_chat_template_or_become_a_dialogue(tokenizer, monkeypatch):
    text, starts, header_end = write_prompt(MESSAGES, tokenizer)
    assert text == "\n\nHuman: What is rain?\n\nAssistant: Water.\n\nHuman: Why?\n\nAssistant:"
    assert [text[start:][:9] for start in starts] == ["\n\nAssista", "\n\nHuman: "]
    assert header_end == 0
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    assert write_prompt(MESSAGES, tokenizer) == (
        "<user>What is rain?<assistant>Water.<user>Why?<assistant>", [19, 36], 0
    )  # fmt: skip


def test_a_text_goes_through_the_template_as_the_turns_that_it_writes(chat_tokenizer):
    text = "\n\nHuman: What is rain?\n\nAssistant: Water.\n\nHuman: Why?\n\nAssistant:"
    assert write_prompt(text, chat_tokenizer) == write_prompt(MESSAGES, chat_tokenizer)
    asked, starts, header_end = write_prompt("Why?", chat_tokenizer)
    assert (asked, starts) == (
        "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", []
    )  # fmt: skip
    assert asked[header_end:].startswith("<|im_start|>user")
    chat_tokenizer.chat_template = None
    assert write_prompt(text, chat_tokenizer)[0] == text


def test_roles_that_the_template_refuses_are_repaired(tokenizer, monkeypatch):
    """As the pairs of training are."""
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", strict + "{% if add_generation_prompt %}<assistant>{% endif %}")
    system = {"role": "system", "content": "Be kind."}
    for messages, text, starts in (
        ([system, *MESSAGES], "<user>Be kind.\n\nWhat is rain?<assistant>Water.<user>Why?<assistant>", 2),
        ([MESSAGES[1], MESSAGES[2]], "<user>Why?<assistant>", 0),
        ([MESSAGES[0], MESSAGES[2]], "<user>What is rain?\n\nWhy?<assistant>", 0),
    ):
        found = write_prompt(messages, tokenizer)
        assert (found[0], len(found[1])) == (text, starts)
    assert write_prompt("\n\nHuman: a\n\nHuman: b\n\nAssistant:", tokenizer)[0] == "<user>a\n\nb<assistant>"
    with pytest.raises(UserError, match=r"rejects the conversation.*Water.*roles must alternate"):
        write_prompt([MESSAGES[1], {"role": "tool", "content": "x"}], tokenizer)


def test_the_system_turn_stays_where_old_turns_go(chat_tokenizer):
    (whole,), _ = prompt_ids([MESSAGES], chat_tokenizer, 1000)
    budget = len(whole) - 1
    (ids,), (lost,) = prompt_ids([MESSAGES], chat_tokenizer, budget)
    assert chat_tokenizer.decode(ids) == chat_tokenizer.apply_chat_template(
        MESSAGES[1:], tokenize=False, add_generation_prompt=True
    )
    assert lost == len(whole) - len(ids)


def test_the_oldest_turns_go_first(tokenizer):
    whole, lost = prompt_ids([MESSAGES], tokenizer, 200)
    assert lost == [0]
    assert tokenizer.decode(whole[0]) == write_prompt(MESSAGES, tokenizer)[0]
    last = "\n\nHuman: Why?\n\nAssistant:"
    budget = len(tokenizer(last)["input_ids"]) + 2
    (ids,), (missing,) = prompt_ids([MESSAGES], tokenizer, budget)
    assert tokenizer.decode(ids) == last and missing == len(whole[0]) - len(ids)
    (ids,), _ = prompt_ids([MESSAGES], tokenizer, 3)
    assert ids == whole[0][-3:]


def test_the_oldest_turns_go_first_under_a_chat_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    last = "<user>Why?<assistant>"
    (ids,), (missing,) = prompt_ids([MESSAGES], tokenizer, len(tokenizer(last)["input_ids"]) + 2)
    assert tokenizer.decode(ids) == last and missing > 0


def test_a_conversation_that_the_template_refuses_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system role here') }}")
    with pytest.raises(UserError, match=r"rejects the conversation.*What is rain.*no system role here"):
        write_prompt(MESSAGES, tokenizer)


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_an_answer_has_the_tokens_that_it_has_after_its_prompt(kind):
    tokenizer = sentencepiece_tokenizer(kind)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}</s>{% endfor %}<assistant> "
    prompts, answers = ["how do I keep basil?", [{"role": "user", "content": "comets"}]], ["They are ice", "Ask kindly"]
    for prompt, answer, ids, merged in zip(prompts, answers, *answer_ids(prompts, answers, tokenizer), strict=True):
        before = write_prompt(prompt, tokenizer)[0]
        asked, whole = tokenizer([before, before + answer], add_special_tokens=False)["input_ids"]
        assert asked[: len(asked) - merged] + ids == whole
        assert ids != tokenizer(answer, add_special_tokens=False)["input_ids"] or kind == "always"


def test_the_quickstarts_prompts_are_held_out(monkeypatch):
    pairs = chitchat_pairs()
    monkeypatch.setattr(prompts, "chitchat_pairs", lambda: pairs)  # made once
    found, counts = load_prompts(None, 5)
    assert len(set(found)) == 5 == counts["used"]
    assert set(found) <= set(pairs["test"]["prompt"])
    assert not set(found) & set(pairs["train"]["prompt"])


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("p.jsonl", [{"prompt": "a"}, "{torn"], r"p\.jsonl, line 2: not JSON"),
        ("p.jsonl", [{"prompt": "a"}, "", "[]"], r"p\.jsonl, line 3: not a JSON object"),
        ("p.jsonl", [{"question": "a"}], r"p\.jsonl, line 1: needs 'prompt'"),
        ("p.jsonl", [{"prompt": ""}], r"p\.jsonl, line 1: needs 'prompt'"),
        ("p.jsonl", [{"prompt": [{"role": "tool", "content": "x"}]}], r"p\.jsonl, line 1: needs 'prompt'"),
        ("p.jsonl", [{"prompt": "half \ud83d"}], r"p\.jsonl, line 1: half of a surrogate pair"),
        ("p.jsonl", ['{"prompt":' * 100_000], r"p\.jsonl, line 1: (nested too deeply|not JSON)"),
        ("p.jsonl", [{"chosen": "no marker", "rejected": "x"}], r"p\.jsonl, line 1: needs 'prompt'"),
        ("p.txt", ["", " "], r"it has no prompt \(2 empty lines\)"),
        ("p.csv", ["a"], "neither .txt nor .jsonl"),
    ],
)
def test_bad_files(tmp_path, name, rows, message):
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path / name, rows), None)


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_prompts(str(tmp_path / "nothing.txt"), None)
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 50)[:-12])
    with pytest.raises(UserError, match="gzip stream is damaged"):
        load_prompts(str(tmp_path / "torn.jsonl.gz"), None)
    packed = bytearray(gzip.compress("".join(f'{{"prompt": "{n * 7919}"}}\n' for n in range(500)).encode()))
    packed[200:260] = b"\xff" * 60
    (tmp_path / "harmed.jsonl.gz").write_bytes(packed)
    with pytest.raises(UserError, match="gzip stream is damaged"):
        load_prompts(str(tmp_path / "harmed.jsonl.gz"), None)
    (tmp_path / "latin.txt").write_bytes(b"ok\n\xff\xfe\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load_prompts(str(tmp_path / "latin.txt"), None)

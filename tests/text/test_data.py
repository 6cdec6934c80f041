import copy
import gzip
import json
import re

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trl.data_utils import apply_chat_template

from resdpo_trl.errors import UserError
from resdpo_trl.sources import describe_left_out
from resdpo_trl.text.data import (
    MARKER,
    TextDataConfig,
    alternating,
    chitchat_pairs,
    dialogue,
    load_preferences,
    messages_of,
    newest_turns,
    parse_dialogue,
    rendered_turns,
)
from resdpo_trl.text.tokens import tokenize
from tests.conftest import CHATML, END_OF_TEXT, write_pairs

H, A = "\n\nHuman: ", "\n\nAssistant:"


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(name, **options):
    return load_preferences(TextDataConfig(dataset_name=str(name), **options))


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (f"{H}hi{A} Yes.", f"{H}hi{A} No.", (f"{H}hi{A}", " Yes.", " No.")),
        # two turns: the last shared marker, not the first
        (f"{H}a{A} b{H}c{A} d", f"{H}a{A} b{H}c{A} e", (f"{H}a{A} b{H}c{A}", " d", " e")),
        # parted at an earlier turn: what follows is the response, later turns included
        (f"{H}a{A} b{H}c{A} d", f"{H}a{A} x{H}y{A} z", (f"{H}a{A}", f" b{H}c{A} d", f" x{H}y{A} z")),
        # one is the beginning of the other
        (f"{H}a{A} b", f"{H}a{A} b{H}c{A} d", (f"{H}a{A}", " b", f" b{H}c{A} d")),
        # one ends at a marker that the other has
        (f"{H}a{A}", f"{H}a{A} b", (f"{H}a{A}", "", " b")),
        # the marker's first characters are shared, the marker is not
        (f"{H}a\n\nAssistant: b", f"{H}a\n\nAssistance: b", None),
        ("no marker", "none here", None),
        (f"{H}a{A} b", f"{H}x{A} b", None),
    ],
)
def test_the_prompt_ends_at_the_last_shared_marker(chosen, rejected, expected):
    assert parse_dialogue(chosen, rejected) == expected


PIECES = ["a", "b", " ", "\n", "Human:", "Assistant:", A, H]
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@given(shared=TEXT, chosen=TEXT, rejected=TEXT)
@settings(max_examples=500, deadline=None)
def test_parsing_against_its_definition(shared, chosen, rejected):
    """By brute force: the longest prefix of both that ends with the marker."""
    first, second = shared + chosen, shared + rejected
    ends = [n for n in range(len(first) + 1) if first[:n].endswith(MARKER) and second.startswith(first[:n])]
    parts = parse_dialogue(first, second)
    if not ends:
        assert parts is None
    else:
        n = max(ends)
        assert parts == (first[:n], first[n:], second[n:])


def test_unusable_pairs_are_dropped_and_counted(tmp_path):
    rows = [
        *write_pairs(40),
        {"chosen": f"{H}q{A} same", "rejected": f"{H}q{A} same "},
        {"chosen": f"{H}q{A} ", "rejected": f"{H}q{A} something"},
        {"chosen": None, "rejected": f"{H}q{A} something"},
        {"chosen": "no marker", "rejected": "none"},
        {"chosen": f"{H}a{A} b{H}c{A} d", "rejected": f"{H}a{A} x{H}y{A} z"},
    ]
    counts = load(write_jsonl(tmp_path / "p.jsonl", rows)).counts
    assert counts["rows"] == 45
    assert counts["kept"] == 41
    assert counts["dropped"] == {"identical": 1, "empty": 2, "no_marker": 1}
    assert counts["parted_early"] == 1
    assert counts["train"] + counts["validation"] + counts["test"] <= 41


def test_every_file_format_gives_the_same_pairs(tmp_path):
    rows = write_pairs(60)
    plain = write_jsonl(tmp_path / "p.jsonl", rows)
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.write((tmp_path / "p.jsonl").read_text())
    Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    (tmp_path / "folder" / "part").mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(tmp_path / "folder" / "part" / "train.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    expected = load(plain)["train"]["chosen"][:]
    assert len(expected) > 25
    for name in ("p.jsonl.gz", "p.parquet", "saved"):
        assert load(tmp_path / name)["train"]["chosen"][:] == expected
    assert load(tmp_path / "folder", dataset_data_dir="part")["train"]["chosen"][:] == expected
    with pytest.raises(UserError, match=r"--dataset_data_dir part: .*saved was written by save_to_disk; remove"):
        load(tmp_path / "saved", dataset_data_dir="part")


def test_explicit_prompts(tmp_path):
    rows = [{"prompt": f"The sky {n} is", "chosen": " blue.", "rejected": " green."} for n in range(30)]
    pairs = load(write_jsonl(tmp_path / "p.jsonl", rows))
    assert pairs["train"][0]["chosen"] == " blue."
    assert not pairs.ends_turns


def test_the_datas_own_test_split_is_used(tmp_path):
    rows = write_pairs(80)
    splits = {"train": Dataset.from_list(rows[:60]), "test": Dataset.from_list(rows[60:])}
    DatasetDict(splits).save_to_disk(str(tmp_path / "d"))
    pairs = load(tmp_path / "d")
    assert len(pairs["test"]) == 20
    assert len(pairs["train"]) + len(pairs["validation"]) == 60


def saved(folder, **splits):
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(str(folder))
    return folder


def test_splits_are_known_by_the_first_word_of_their_names(tmp_path):
    rows = write_pairs(90)
    named = {"test_prefs": rows[60:80], "train_prefs": rows[:60], "validation_prefs": rows[80:]}
    pairs = load(saved(tmp_path / "d", **named))
    assert [len(pairs[split]) for split in ("train", "validation", "test")] == [60, 10, 20]
    assert {row["chosen"].strip() for row in pairs["test"]} <= {row["chosen"].rpartition(A)[2].strip() for row in rows}
    pairs = load(saved(tmp_path / "e", **{"test_prefs": rows[60:80], "train_prefs": rows[:60]}))
    assert len(pairs["test"]) == 20 and len(pairs["train"]) + len(pairs["validation"]) == 60


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("train_prefs", "train_sft"),
            r"the splits train_prefs and train_sft match train: choose one with --data",
        ),
        (("train", "val", "dev"), r"val and dev match validation: choose one with --dataset_validation_split"),
        (("test", "validation"), r"no training split \(found: test, validation\): .*--dataset_train_split"),
        (("default",), r"no training split \(found: default\)"),
    ],
)
def test_splits_that_are_not_clearly_named_are_refused(tmp_path, names, message):
    rows = write_pairs(20)
    with pytest.raises(UserError, match=message):
        load(saved(tmp_path / "d", **dict.fromkeys(names, rows)))


def test_splits_of_unknown_names_are_not_trained_on(tmp_path):
    rows = write_pairs(90)
    folder = saved(tmp_path / "d", train=rows[:50], train_more=rows[50:60], test=rows[60:75], rephrased=rows[75:])
    pairs = load(folder, validation_fraction=0.1)
    assert len(pairs["train"]) + len(pairs["validation"]) == 50 and len(pairs["test"]) == 15
    assert pairs.counts["splits_left_out"] == ["train_more", "rephrased"]
    assert "unused splits: train_more, rephrased (" in describe_left_out(pairs.counts)
    flags = {"dataset_train_split": ["train", "train_more"], "dataset_validation_split": "rephrased"}
    named = load(folder, **flags)
    assert [len(named[split]) for split in ("train", "validation", "test")] == [60, 15, 15]
    assert named.counts["splits_left_out"] == [] and describe_left_out(named.counts) == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataset_test_split": "heldout"}, r"--dataset_test_split heldout: no such split \(found: train, test\)"),
        ({"dataset_train_split": ["test"], "dataset_test_split": "test"}, "--dataset_train_split test: .*two flags"),
        ({"dataset_train_split": ["test", "test"]}, "--dataset_train_split test: .*two flags"),
        ({"dataset_test_split": "train"}, "no training split"),
    ],
)
def test_flags_that_name_splits_badly_are_refused(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        load(saved(tmp_path / "d", train=write_pairs(20), test=write_pairs(20, seed=1)), **flags)


def test_training_splits_with_different_columns_are_refused(tmp_path):
    texts = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    other = [{"prompt": [1], "chosen": "b", "rejected": "c"}]
    with pytest.raises(UserError, match="--dataset_train_split train more: their columns differ"):
        load(saved(tmp_path / "d", train=texts, more=other), dataset_train_split=["train", "more"])


@pytest.mark.parametrize("chat", [False, True])
def test_a_pair_of_a_held_out_split_is_not_trained_on(tmp_path, chat_tokenizer, chat):
    """The same prompt and responses, whichever is chosen; another response to the prompt is another pair."""
    rows = write_pairs(60)
    test, validation = rows[40:50], rows[50:]
    swapped = {"chosen": test[3]["rejected"], "rejected": test[3]["chosen"]}
    another = {"chosen": test[4]["chosen"], "rejected": test[4]["chosen"].rpartition(A)[0] + f"{A} Another."}
    train = [*rows[:30], test[0], test[0], swapped, validation[2], another]
    folder = saved(tmp_path / "d", train=train, validation=[*validation, test[9]], test=test)
    pairs = load_preferences(TextDataConfig(dataset_name=str(folder)), chat_tokenizer if chat else None)
    assert pairs.counts["copies_removed"] == {"train": 4, "validation": 1}
    assert [len(pairs[split]) for split in ("train", "validation", "test")] == [31, 10, 10]
    assert "also in a held-out split: 4 from train, 1 from validation" in describe_left_out(pairs.counts)
    assert not set(pairs["train"]["pair"]) & {*pairs["validation"]["pair"], *pairs["test"]["pair"]}
    # a limit on the test does not bring them back
    few = load_preferences(TextDataConfig(dataset_name=str(folder), max_test_samples=1))
    assert few.counts["copies_removed"] == pairs.counts["copies_removed"]


def in_layout(layout, number):
    """The same pair in the layouts that files have."""
    question, good, bad = f"Is {number} even?", f"It is {number % 2}.", "Who knows?"
    order = reversed if layout == "keys in another order" else list

    def turn(role, content, **more):
        if layout == "parts of text":
            content = [{"type": "text", "text": content}]
        return dict(order(list({"role": role, "content": content, **more}.items())))

    if layout == "dialogues":
        return {"chosen": f"{H}{question}{A} {good}", "rejected": f"{H}{question}{A} {bad}"}
    if layout == "prompts of one turn":
        return {"prompt": question, "chosen": good, "rejected": bad}
    name = {"name": None if number else "a"} if layout == "a key without a value" else {}
    asked, answers = [turn("user", question, **name)], [[turn("assistant", text)] for text in (good, bad)]
    if layout == "messages without a prompt":
        return {"chosen": asked + answers[0], "rejected": asked + answers[1]}
    return {"prompt": asked, "chosen": answers[0], "rejected": answers[1]}


@pytest.mark.parametrize("train", ["dialogues", "messages"])
@pytest.mark.parametrize(
    "test",
    ["dialogues", "prompts of one turn", "messages", "messages without a prompt", "parts of text",
     "keys in another order", "a key without a value"],
)  # fmt: skip
def test_a_pair_is_the_same_in_every_layout(tmp_path, chat_tokenizer, train, test):
    files = [
        write_jsonl(tmp_path / f"{number}.jsonl", [in_layout(layout, row) for row in rows])
        for number, (layout, rows) in enumerate([(train, range(30)), (test, range(1, 11))])
    ]
    pairs = load_preferences(TextDataConfig(dataset_name=files[0], eval_dataset_name=files[1]), chat_tokenizer)
    assert sum(pairs.counts["copies_removed"].values()) == 10 and len(pairs["test"]) == 10


def test_a_split_without_a_usable_pair_is_named(tmp_path):
    same = [{"chosen": f"{H}q{A} same", "rejected": f"{H}q{A} same"}] * 3
    with pytest.raises(UserError, match="the split test has no usable rows; fix that split"):
        load(saved(tmp_path / "d", train=write_pairs(40), test=same))
    with pytest.raises(UserError, match="the split train has no usable rows"):
        load(saved(tmp_path / "e", train=same, validation=write_pairs(40), test=write_pairs(40)))
    with pytest.raises(UserError, match=r"--validation_fraction 0.0001 .* split validation"):
        load("chitchat", validation_fraction=0.0001)


def test_what_no_split_has_is_counted(tmp_path):
    """A split that is full takes part of its last conversation, and the rest of it is nobody's."""
    rows = [
        {"prompt": f"{H}{n}{A} Go on.{H}{k}{A}", "chosen": " a", "rejected": " b"} for n in range(9) for k in range(5)
    ]
    counts = load(
        write_jsonl(tmp_path / "p.jsonl", rows), max_test_samples=7, test_fraction=0.3, max_eval_samples=2
    ).counts
    assert (counts["test"], counts["validation"], counts["left_out"], counts["train"]) == (7, 2, 6, 30)
    assert load(write_jsonl(tmp_path / "q.jsonl", write_pairs(40))).counts["left_out"] == 0


def test_a_column_group_of_the_users_own_is_not_looked_at(tmp_path):
    rows = [row | {"prompt": f"The sky {n}", "group": 1} for n, row in enumerate(write_pairs(30))]
    pairs = load(write_jsonl(tmp_path / "p.jsonl", rows))
    assert len({group for split in pairs.splits.values() for group in split["group"]}) == 30


@pytest.mark.parametrize("options", [{"dataset_data_dir": "harmless-base"}, {"dataset_revision": "v1"}])
def test_what_a_single_file_has_not_is_refused(tmp_path, options):
    ((flag, value),) = options.items()
    for name in ("chitchat", write_jsonl(tmp_path / "p.jsonl", write_pairs(30))):
        with pytest.raises(UserError, match=f"--{flag} {value}: .*{name}.*remove it"):
            load(name, **options)


def test_no_conversation_stands_in_two_splits(tmp_path):
    rows = [row for row in write_pairs(60) for _ in range(1)]
    # the same openings again, one exchange longer
    longer = [
        {side: row[side].replace(A, f"{A} Go on.{H}More?{A}", 1) for side in ("chosen", "rejected")} for row in rows
    ]
    pairs = load(write_jsonl(tmp_path / "p.jsonl", rows + longer), test_fraction=0.3, validation_fraction=0.2)
    groups = [set(pairs[split]["group"]) for split in ("train", "validation", "test")]
    assert all(groups)
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


def test_the_split_does_not_depend_on_the_order_of_the_file(tmp_path):
    rows = write_pairs(60)
    first = load(write_jsonl(tmp_path / "a.jsonl", rows))
    second = load(write_jsonl(tmp_path / "b.jsonl", rows[::-1]))
    for split in ("train", "validation", "test"):
        assert sorted(first[split]["prompt"]) == sorted(second[split]["prompt"])


def test_fewer_samples_are_a_subset(tmp_path):
    name = write_jsonl(tmp_path / "p.jsonl", write_pairs(60))
    some, more = (set(load(name, max_train_samples=n)["train"]["prompt"]) for n in (10, 30))
    assert len(some) == 10
    assert some < more


def test_prefer_rejected_swaps_the_sides(tmp_path):
    name = write_jsonl(tmp_path / "p.jsonl", write_pairs(40))
    good, bad = load(name)["test"], load(name, prefer="rejected")["test"]
    assert good["chosen"][:] == bad["rejected"][:]
    assert good["rejected"][:] == bad["chosen"][:]


TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("explicit", [True, False])
def test_conversations_go_through_the_chat_template(tmp_path, tokenizer, explicit):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    rows = []
    for n in range(30):
        asked = [*prompt, {"role": "user", "content": f"Question {n}"}]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("Good.", "Bad."))
        row = {"chosen": chosen, "rejected": rejected}
        rows.append({"prompt": asked} | row if explicit else {side: asked + row[side] for side in row})
    name = write_jsonl(tmp_path / "p.jsonl", rows)
    pairs = load_preferences(TextDataConfig(dataset_name=name, test_fraction=0.2), tokenizer)
    row = pairs["test"][0]
    assert row["prompt"].startswith("<user>Hi<end><assistant>Yes?<end><user>Question ")
    assert row["prompt"].endswith("<end><assistant>")
    assert row["chosen"] == "Good.<end>"
    assert [row["prompt"][start:][:6] for start in row["turn_starts"]] == ["<assis", "<user>"]
    assert pairs.ends_turns
    with pytest.raises(UserError, match="chat template"):
        load(name)


def conversations(path, count=40):
    """Pairs of conversations with a system message and one exchange before the question."""
    rows = []
    for n in range(count):
        prompt = [
            {"role": "system", "content": f"You are number {n // 2}."},
            {"role": "user", "content": f"Hi {n}"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": f"Question {n}"},
        ]
        sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
        rows.append({"prompt": prompt, **sides})
    return TextDataConfig(dataset_name=write_jsonl(path, rows), test_fraction=0.3)


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_the_split_does_not_depend_on_the_chat_template(tmp_path, tokenizer):
    """A reward model with a template of its own is compared on the same pairs."""
    config = conversations(tmp_path / "p.jsonl")
    other = TEMPLATE.replace("<{{ message['role'] }}>", "[{{ message['role'] | upper }}] ")
    first, second = (load_preferences(config, with_template(tokenizer, text)) for text in (TEMPLATE, other))
    for split in ("train", "validation", "test"):
        asked = [
            [re.findall(r"Question \d+", prompt) for prompt in found[split]["prompt"]] for found in (first, second)
        ]
        assert asked[0] == asked[1]
        first.check_same_pairs(second, split, "r")
    assert first["test"]["prompt"][0] != second["test"]["prompt"][0]


def test_a_template_that_leaves_other_pairs_is_refused(tmp_path, tokenizer):
    config = conversations(tmp_path / "p.jsonl")
    # a template that does not tell some pairs' sides apart
    hides = TEMPLATE.replace(
        "{{ message['content'] }}",
        "{{ '' if message['role'] == 'assistant' and messages[1]['content'].endswith('3') else message['content'] }}",
    )
    first, second = (load_preferences(config, with_template(tokenizer, text)) for text in (TEMPLATE, hides))
    assert second.counts["dropped"]["identical"] + second.counts["dropped"]["empty"] == 4
    with pytest.raises(UserError, match="--reward_model r: its chat template keeps other pairs"):
        for split in ("train", "validation", "test"):
            first.check_same_pairs(second, split, "r")


def test_a_template_that_refuses_what_came_before_only_keeps_turns_together(tmp_path, tokenizer):
    """Many refuse a system message alone, or an answer at the end."""
    refuses = "{% if messages[-1]['role'] == 'system' %}{{ raise_exception('no user query') }}{% endif %}" + TEMPLATE
    config = conversations(tmp_path / "p.jsonl")
    free, strict = (load_preferences(config, with_template(tokenizer, text))["train"] for text in (TEMPLATE, refuses))
    assert strict["prompt"][:] == free["prompt"][:]
    assert [len(starts) for starts in free["turn_starts"]] == [2] * len(free)
    assert free["turn_starts"][:] == strict["turn_starts"][:]
    # without the rendering of the system message alone nobody knows where it ends
    assert [row["prompt"][: row["header_end"]][-5:] for row in free] == ["<end>"] * len(free)
    assert set(strict["header_end"]) == {0}


@pytest.fixture(scope="module")
def chitchat():
    return chitchat_pairs()


def test_chitchat_is_in_hhs_form(chitchat):
    rows = chitchat["train"]
    assert len(rows) > 5000
    assert rows[:50] == chitchat_pairs(seed=0)["train"][:50]
    assert rows[:50] != chitchat_pairs(seed=1)["train"][:50]
    for row in rows.select(range(300)):
        turns = [turn.partition(":")[0] for turn in row["prompt"].split("\n\n")[1:]]
        assert turns[-2:] == ["Human", "Assistant"]
        assert turns[0] == "Human"
        assert row["prompt"].endswith(MARKER)
        assert row["chosen"].startswith(" ")
        assert row["chosen"] != row["rejected"]
    lengths = [(len(row["chosen"]), len(row["rejected"])) for row in rows.select(range(2000))]
    # of similar length: neither side is the longer one more often than chance lets it be
    longer = sum(a > b for a, b in lengths) / sum(a != b for a, b in lengths)
    assert abs(longer - 0.5) < 0.04
    assert sum(abs(a - b) <= 10 for a, b in lengths) > 0.95 * len(lengths)


def test_no_chitchat_reply_is_chosen_in_one_split_and_rejected_in_another(chitchat):
    """A test reply that training had learned as chosen would look good for that alone."""
    test, train = chitchat["test"], chitchat["train"]
    groups = [set(rows["group"]) for rows in chitchat.values()]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    learned = set(train["chosen"])
    shared = sum(text in learned for text in test["rejected"])
    assert shared <= 0.02 * len(test)  # stock phrases only
    assert abs(shared - sum(text in learned for text in test["chosen"])) <= 0.01 * len(test)


# --- chat templates --------------------------------------------------------------------------------------------------

# as Gemma's: no system turn, the user first, then by turns
STRICT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start>' + message['role'] + '\n' + message['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
# Llama 2's: each exchange begins with the beginning of text, the first one's user turn holds the system message
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content + ' [/INST]' }}"
    "{% else %}{{ ' ' + content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Mistral's: the beginning of text once, the system message in the newest user turn
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{{ bos_token }}{% for message in turns %}"
    "{% if message['role'] == 'user' and loop.last and system %}{{ '[INST] ' + system + '\n\n' + message['content'] + "
    "'[/INST]' }}{% elif message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
DEFAULT_TURN = "<|im_start|>system\nYou are helpful<|im_end|>\n"  # of CHATML


def said(role, content):
    return {"role": role, "content": content}


USER, ANSWER, NEXT, SYSTEM = said("user", "a"), said("assistant", "b"), said("user", "c"), said("system", "Be kind.")


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (f"{H}a{A}", [USER]),
        (f"{H}a{A} b{H}c{A}", [USER, ANSWER, NEXT]),
        (f"{H} a \n{A}  b\n{H}c", [USER, ANSWER, NEXT]),  # without the closing marker, with space around a turn
        (f"Be kind.{H}a{A}", [SYSTEM, USER]),
        (f"{A} b{H}c{A}", [ANSWER, NEXT]),
        (f"{H}a{H}c{A}", [USER, NEXT]),
        (f"{H}Why: a Human: no{A}", [said("user", "Why: a Human: no")]),
        ("Human: a", [USER]),
        ("The sky is", [said("user", "The sky is")]),
        ("Note: a\n\nb", [said("user", "Note: a\n\nb")]),
        ("Q: a\n\nAssistant:", [said("user", "Q: a")]),
    ],
)
def test_texts_become_messages(text, messages):
    assert messages_of(text) == messages


CONTENT = st.lists(st.sampled_from(["a", "b ", "\n", "\n\n", "Human:", "Assistant", ": ", "é"]), max_size=8).map(
    lambda parts: "".join(parts).strip()
)
TURNS_OF = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), CONTENT), min_size=1, max_size=6)


@given(system=st.none() | CONTENT, turns=TURNS_OF)
@settings(max_examples=500, deadline=None)
def test_a_dialogue_gives_its_messages_back(system, turns):
    messages = ([said("system", system)] if system else []) + [said(*turn) for turn in turns]
    # what reads as the beginning of a turn is one
    assume(not any(re.search(r"\n\n(Human|Assistant):", message["content"]) for message in messages))
    assume(not (system or "").startswith(("Human:", "Assistant:")))
    assert messages_of(dialogue(messages)) == messages


@pytest.mark.parametrize(
    ("messages", "repaired"),
    [
        ([USER, ANSWER, NEXT], [USER, ANSWER, NEXT]),
        ([SYSTEM, USER], [said("user", "Be kind.\n\na")]),
        ([SYSTEM, SYSTEM, USER, ANSWER], [said("user", "Be kind.\n\nBe kind.\n\na"), ANSWER]),
        ([ANSWER, USER], [USER]),
        ([USER, NEXT], [said("user", "a\n\nc")]),
        ([USER, ANSWER, ANSWER, NEXT], [USER, said("assistant", "b\n\nb"), NEXT]),
        ([SYSTEM, ANSWER, USER, NEXT, ANSWER], [said("user", "Be kind.\n\na\n\nc"), ANSWER]),
        ([ANSWER], []),
    ],
)
def test_roles_are_repaired(messages, repaired):
    before = copy.deepcopy(messages)
    assert alternating(messages) == repaired
    assert messages == before


@given(turns=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENT), max_size=7))
@settings(max_examples=200, deadline=None)
def test_repaired_roles_alternate_and_lose_no_word_of_the_user(turns):
    repaired = alternating([said(*turn) for turn in turns])
    assert [message["role"] for message in repaired] == ["user", "assistant"] * (len(repaired) // 2) + ["user"] * (
        len(repaired) % 2
    )
    assert alternating(repaired) == repaired
    for role, content in turns:
        if role == "user":
            assert any(content in message["content"] for message in repaired if message["role"] == "user")


def chats(kind, count=40):
    """Rows of one kind of data, and what they say: prompt, chosen and rejected as messages."""
    rows, meant = [], []
    for n in range(count):
        asked = [said("user", f"Question {n // 2}"), said("assistant", "Yes?"), said("user", f"This {n}")][n % 2 * 2 :]
        answers = [[said("assistant", f"good {n}.")], [said("assistant", f"bad {n}.")]]
        if kind == "dialogue" and n % 4 == 0:  # parted before the last turn
            answers = [[*side, said("user", "And?"), said("assistant", "Done.")] for side in answers]
        prompt = "".join(
            f"\n\n{'Human' if turn['role'] == 'user' else 'Assistant'}: {turn['content']}" for turn in asked
        )
        sides = [f" {side[0]['content']}" + (f"{H}And?{A} Done." if len(side) > 1 else "") for side in answers]
        if kind == "dialogue":
            rows.append({"chosen": prompt + A + sides[0], "rejected": prompt + A + sides[1]})
        elif kind == "prompt in HH's form":
            rows.append({"prompt": prompt + A, "chosen": sides[0], "rejected": sides[1]})
        else:
            asked = [said("user", f"The sky {n} is")]
            rows.append({"prompt": f"The sky {n} is", "chosen": sides[0], "rejected": sides[1]})
        meant.append(dict(zip(("prompt", "chosen", "rejected"), (asked, *answers), strict=True)))
    return rows, meant


@pytest.mark.parametrize("kind", ["dialogue", "prompt in HH's form", "plain prompt"])
def test_rendered_pairs_are_trls(tmp_path, chat_tokenizer, kind):
    rows, meant = chats(kind)
    expected = {row["prompt"]: row for row in (apply_chat_template(each, chat_tokenizer) for each in meant)}
    shown = {apply_chat_template(each, chat_tokenizer)["prompt"]: dialogue(each["prompt"]) for each in meant}
    config = TextDataConfig(dataset_name=write_jsonl(tmp_path / "p.jsonl", rows), test_fraction=0.3)
    pairs = load_preferences(config, chat_tokenizer)
    assert pairs.ends_turns and pairs.counts["dialogue_format"] == "chat" and pairs.counts["roles_repaired"] == 0
    found = [row for split in ("train", "validation", "test") for row in pairs[split]]
    assert len(found) == len({row["prompt"] for row in found}) > 20
    for row in found:
        assert {side: row[side] for side in ("prompt", "chosen", "rejected")} == expected[row["prompt"]]
        assert row["shown"] == shown[row["prompt"]]
        assert row["prompt"][: row["header_end"]] == DEFAULT_TURN
        turns = [row["prompt"][start:].partition("\n")[0] for start in row["turn_starts"]]
        assert turns == ["<|im_start|>assistant", "<|im_start|>user"][: row["prompt"].count("<|im_start|>") - 3]


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_a_truncated_prompt_is_shown_as_the_turns_that_the_model_sees(tmp_path, chat_tokenizer, system):
    def conversation(number):
        turns = [f"turn {at} of {number} " + " ".join(f"w{at}x{word}" for word in range(9)) for at in range(5)]
        roles = ["user", "assistant"] * 2 + ["user"]
        asked = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
        return [{"role": "system", "content": system}] * bool(system) + asked

    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": conversation(number)} | answers for number in range(3)])
    texts = load_preferences(TextDataConfig(dataset_name=path), chat_tokenizer)
    whole = texts["train"][0]
    turns = [message["content"] for message in messages_of(whole["shown"])][-5:]
    lengths = set()
    for cap in range(40, 700, 12):
        (row,) = tokenize(texts["train"], chat_tokenizer, cap, 8, ends_turns=True)
        seen = chat_tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
        shown = newest_turns(whole["shown"], len(whole["turn_starts"]) + 1 - row["turns_dropped"], seen)
        messages = messages_of(shown)
        if messages[0]["role"] == "system":
            assert messages.pop(0)["content"] == system and system in seen
        else:
            assert not system or system not in seen
        contents = [message["content"] for message in messages]
        lengths.add(len(contents))
        assert contents[1:] == turns[len(turns) - len(contents) + 1 :]
        assert turns[-len(contents)].endswith(contents[0]) and contents[0] in seen
        for turn in turns[: -len(contents)]:
            assert turn not in seen
        if len(contents) > 1:
            assert contents[0] == turns[-len(contents)]  # only the newest turn can lose its start
    assert lengths == {1, 2, 3, 4, 5}
    long = "word " * 40_000 + "the end."  # of which the model sees little
    assert newest_turns(f"{H}{long}{A}", 1, f"user\n{long[-50:]}\nassistant") == f"{H}{long[-50:].strip()}{A}"
    assert newest_turns(f"{H}a\n\nHuman:b{A}", 1, "b") == f"{H}b{A}"


@pytest.mark.parametrize("kind", ["dialogue", "prompt in HH's form", "plain prompt"])
def test_splits_and_digests_do_not_depend_on_the_format(tmp_path, chat_tokenizer, kind):
    rows, _ = chats(kind)
    config = TextDataConfig(dataset_name=write_jsonl(tmp_path / "p.jsonl", rows), test_fraction=0.3)
    plain, chat = load_preferences(config), load_preferences(config, chat_tokenizer)
    for split in ("train", "validation", "test"):
        plain.check_same_pairs(chat, split, "r")
        for digest in ("group", "whole"):
            assert plain[split][digest][:] == chat[split][digest][:]
        assert plain[split]["prompt"][:] != chat[split]["prompt"][:]
    assert len(set(plain["train"]["whole"])) == len(plain["train"])


def test_the_format_that_is_asked_for(tmp_path, tokenizer, chat_tokenizer):
    name = write_jsonl(tmp_path / "p.jsonl", write_pairs(40))
    without = load_preferences(TextDataConfig(dataset_name=name))
    for asked, its in (("plain", chat_tokenizer), ("plain", tokenizer), ("auto", tokenizer)):
        found = load_preferences(TextDataConfig(dataset_name=name, dialogue_format=asked), its)
        assert its.chat_template is None  # so that what is saved with it is read as it was trained
        assert found["train"].to_list() == without["train"].to_list()
        assert found.counts["dialogue_format"] == "plain" and not found.ends_turns
    with pytest.raises(UserError, match="--dialogue_format chat: the tokenizer has no chat template; pass plain"):
        load_preferences(TextDataConfig(dataset_name=name, dialogue_format="chat"), tokenizer)


def test_a_template_that_wants_roles_by_turns_gets_them(tmp_path, tokenizer):
    odd = {
        f"{H}a{H}b{A}": "a\n\nb",
        f"Be brief.{H}a{A}": "Be brief.\n\na",
        f"{A} Hello!{H}a{A}": "a",
    }
    rows = [row for row in write_pairs(40) if "\n\nHuman" in row["chosen"]]
    rows += [{"chosen": f"{prompt} yes", "rejected": f"{prompt} no"} for prompt in odd]
    config = TextDataConfig(dataset_name=write_jsonl(tmp_path / "p.jsonl", rows), test_fraction=0.3)
    strict = with_template(tokenizer, STRICT)
    pairs = load_preferences(config, strict)
    assert pairs.counts["roles_repaired"] == 3 and pairs.counts["kept"] == len(rows)
    found = {row["prompt"]: row for split in ("train", "validation", "test") for row in pairs[split]}
    for content in odd.values():
        row = found[f"{END_OF_TEXT}<start>user\n{content}<end>\n<start>assistant\n"]
        assert (row["chosen"], row["rejected"]) == ("yes<end>\n", "no<end>\n")
        assert row["shown"] == f"{H}{content}{A}"
    assert load_preferences(config, with_template(tokenizer, CHATML)).counts["roles_repaired"] == 0


def test_an_answer_that_the_prompt_began_is_part_of_both_responses(tmp_path, tokenizer):
    """Two turns of the assistant on end, the second of which is the response, under a template that wants one."""
    prompt = f"{H}a{A} b{A}"
    rows = [*write_pairs(40), {"chosen": f"{prompt} yes", "rejected": f"{prompt} no"}]
    early = [f"{H}a{A} b{H}c{H}d{A} e", f"{H}a{A} x{H}y{A} z{A} w"]  # and in what follows an early parting
    rows.append(dict(zip(("chosen", "rejected"), early, strict=True)))
    config = TextDataConfig(dataset_name=write_jsonl(tmp_path / "p.jsonl", rows), test_fraction=0.3)
    pairs = load_preferences(config, with_template(tokenizer, STRICT))
    assert pairs.counts["roles_repaired"] == 2
    asked = f"{END_OF_TEXT}<start>user\na<end>\n<start>assistant\n"
    found = {
        (row["chosen"], row["rejected"])
        for split in ("train", "validation", "test")
        for row in pairs[split]
        if row["prompt"] == asked
    }
    assert found == {
        ("b\n\nyes<end>\n", "b\n\nno<end>\n"),
        (
            "b<end>\n<start>user\nc\n\nd<end>\n<start>assistant\ne<end>\n",
            "x<end>\n<start>user\ny<end>\n<start>assistant\nz\n\nw<end>\n",
        ),
    }


def test_a_template_that_refuses_everything_is_named_with_split_and_row(tmp_path, tokenizer):
    name = write_jsonl(
        tmp_path / "p.jsonl", [{"chosen": f"{H}q{A} same", "rejected": f"{H}q{A} same"}, *write_pairs(9)]
    )
    never = with_template(tokenizer, "{{ raise_exception('no\n\x1b[31mway') }}")
    with pytest.raises(
        UserError, match=r"p\.jsonl, split train, row 2: the chat template rejects .*Question 0.*no"
    ) as e:
        load_preferences(TextDataConfig(dataset_name=name), never)
    assert "\n" not in str(e.value) and "--dialogue_format plain" in str(e.value)
    # a file of one user who never speaks: nothing is left after the repair
    rows = [{"chosen": f"{A} a {n}{A} yes", "rejected": f"{A} a {n}{A} no"} for n in range(9)]
    name = write_jsonl(tmp_path / "q.jsonl", rows)
    with pytest.raises(UserError, match=r"q\.jsonl, split train, row 1: the chat template rejects"):
        load_preferences(TextDataConfig(dataset_name=name), with_template(tokenizer, STRICT))


@pytest.mark.parametrize(
    ("template", "messages", "header", "turns"),
    [
        (CHATML, [USER, ANSWER, NEXT], DEFAULT_TURN, ["<|im_start|>a", "<|im_start|>u"]),
        (CHATML, [SYSTEM, USER, ANSWER], "<|im_start|>system\nBe kind.<|im_end|>\n", ["<|im_start|>a"]),
        (CHATML, [USER], DEFAULT_TURN, []),
        (LLAMA2, [USER, ANSWER, NEXT], "", [" b <|endoftext|><|endoftext|>", "<|endoftext|>[INST] c"]),
        (LLAMA2, [SYSTEM, USER, ANSWER, NEXT], "", [" b <|endoftext|><|endoftext|>", "<|endoftext|>[INST] c"]),
        (MISTRAL, [USER, ANSWER, NEXT], "<|endoftext|>", [" b<|endoftext|>[INST]", "[INST] c"]),
        # the message before the newest turn alone is written otherwise: no place to truncate but the answer's start
        (MISTRAL, [SYSTEM, USER, ANSWER, NEXT], "<|endoftext|>", ["[INST] Be kind.\n\nc"]),
        (STRICT, [USER, ANSWER, NEXT], "<|endoftext|>", ["<start>assistant\nb", "<start>user\nc"]),
    ],
)  # fmt: skip
def test_where_the_first_turn_and_the_others_start(tokenizer, template, messages, header, turns):
    tokenizer = with_template(tokenizer, template)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    header_end, starts = rendered_turns(messages, text, tokenizer)
    assert text[:header_end] == header
    assert len(starts) == len(turns)
    for start, turn in zip(starts, turns, strict=True):
        assert text[start:].startswith(turn)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_a_malformed_line_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(write_pairs(1)[0]) + "\n" + '{"chosen": "x", "rejected": \n')
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: not JSON"):
        load(path)
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.write(path.read_text())
    with pytest.raises(UserError, match=r"p\.jsonl\.gz, line 2: not JSON"):
        load(tmp_path / "p.jsonl.gz")


def test_a_line_that_is_no_object_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(write_pairs(1)[0]) + "\n[1, 2]\n")
    with pytest.raises(UserError, match=r"line 2: not a JSON object"):
        load(path)


def test_a_torn_gzip_is_named(tmp_path):
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in write_pairs(500)).encode())
    (tmp_path / "p.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="gzip stream is damaged"):
        load(tmp_path / "p.jsonl.gz")


def test_missing_columns_are_named_with_those_found(tmp_path):
    name = write_jsonl(tmp_path / "p.jsonl", [{"chosen": "x", "worse": "y"}])
    with pytest.raises(UserError, match=r"no column rejected \(found: chosen, worse\)"):
        load(name)


def test_numbers_are_not_texts(tmp_path):
    name = write_jsonl(tmp_path / "p.jsonl", [{"chosen": 1, "rejected": 2}])
    with pytest.raises(UserError, match="must be text"):
        load(name)


def test_no_usable_pair(tmp_path):
    name = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "x", "rejected": "x"}] * 3)
    with pytest.raises(UserError, match="no usable pair in 3 rows: both responses are the same; two different"):
        load(name)


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


PAIR = {"prompt": "a question", "chosen": "good", "rejected": "bad"}
TURNS_OF_PAIR = {side: [{"role": "user" if side == "prompt" else "assistant", "content": PAIR[side]}] for side in PAIR}
WINDOWS = {side: f"{H}q{A} {side}".replace("\n", "\r\n") for side in ("chosen", "rejected")}


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("p.jsonl", jsonl({"chosen": "good", "rejected": "bad"}), "no common prompt: name its column with --columns"),
        ("p.jsonl", jsonl(WINDOWS), r"lines of the dialogues end in \\r\\n; convert"),
        ("p.jsonl", jsonl(PAIR | {"rejected": "good "}), "both responses are the same; two different"),
        ("p.jsonl", jsonl(PAIR | {"chosen": " "}), "a prompt or a response has no text; add"),
        ("p.jsonl", jsonl(PAIR | {"prompt": None}, PAIR | {"prompt": ""}), "a prompt or a response has no text; add"),
        ("p.jsonl", jsonl(TURNS_OF_PAIR | {"chosen": [{"role": "assistant", "content": ""}]}), "has no text; add"),
        ("p.jsonl", jsonl({"prompt": "q", "chosen": "a", "worse": "b"}), r"no column rejected \(found: chosen, pr"),
        ("p.jsonl", jsonl(PAIR | {"chosen": 1}), "must be text or lists of messages .*int64"),
        ("p.jsonl", jsonl(PAIR | {"prompt": {"text": "q"}}), "must be text or lists of messages .*text"),
        ("p.jsonl", jsonl(PAIR | {"rejected": ["a", "b"]}), "must be text or lists of messages .*List"),
        ("p.jsonl", jsonl(PAIR) + b'{"prompt": \n', "line 2: not JSON"),
        ("p.jsonl", jsonl(PAIR, [1]), "line 2: not a JSON object"),
        ("p.jsonl", jsonl(PAIR, None), "line 2: not a JSON object"),
        ("p.jsonl", jsonl(PAIR) + b'{"prompt": "\xff"}\n', "line 2: not UTF-8"),
        ("p.jsonl", b"", "p.jsonl: the file is empty"),
        ("p.jsonl", jsonl(PAIR, PAIR | {"chosen": TURNS_OF_PAIR["chosen"]}), "must be text or lists .*chosen: Json"),
        ("p.jsonl.gz", gzip.compress(jsonl(*[PAIR] * 99), mtime=0)[:40], "gzip stream is damaged; compress it again"),
        ("p.jsonl.gz", jsonl(PAIR), "gzip stream is damaged; compress it again"),
        ("p.parquet", b"PAR1 no parquet", "can't be read .*not a parquet file.*fix or convert"),
        ("p.txt", jsonl(PAIR), "p.txt"),
        ("p.jsonl", jsonl(*[PAIR | {"prompt": "a"}] * 2), "too few for a training, a validation and a test split"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_was_found(tmp_path, chat_tokenizer, file, content, sentence):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_preferences(TextDataConfig(dataset_name=str(tmp_path / file)), chat_tokenizer)
    said = str(refused.value).replace(str(tmp_path), "")
    assert re.search(sentence, said), said
    assert file in said and "\n" not in said


def test_too_few_conversations_to_split(tmp_path):
    with pytest.raises(UserError, match="too few"):
        load(write_jsonl(tmp_path / "p.jsonl", write_pairs(2)))


@pytest.mark.parametrize("name", ["./nowhere", "missing.jsonl", "/no/such/folder"])
def test_a_missing_path(name):
    with pytest.raises(UserError, match="no such file or folder"):
        load(name)


def test_a_hub_id_without_network():
    with pytest.raises(UserError, match=r"Hub.*pass a folder, a \.jsonl"):
        load("Anthropic/hh-rlhf", dataset_data_dir="harmless-base")


@pytest.mark.parametrize(
    "options", [{"max_train_samples": 0}, {"test_fraction": 1.5}, {"test_fraction": 0.6, "validation_fraction": 0.5}]
)
def test_senseless_numbers(options):
    with pytest.raises(UserError, match="--"):
        TextDataConfig(**options)


def test_a_limit_takes_a_pair_of_each_conversation_before_a_second_of_any(tmp_path):
    """Nested for growing limits, in every split that the data bring."""
    for split, count in (("train", 9), ("validation", 3), ("test", 3)):
        rows = [
            {"prompt": f"\n\nHuman: {split} {opening}\n\nAssistant: ok\n\nHuman: {turn}\n\nAssistant:",
             "chosen": f" yes {turn}", "rejected": " no"}
            for opening in range(count) for turn in range(4)
        ]  # fmt: skip
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def taken(limit):
        config = TextDataConfig(
            dataset_name=str(tmp_path), max_train_samples=limit, max_test_samples=3, max_eval_samples=4
        )
        return load_preferences(config)

    whole = {limit: taken(limit) for limit in (5, 9, 14)}
    groups = {limit: pairs["train"]["group"][:] for limit, pairs in whole.items()}
    assert [len(set(groups[limit])) for limit in (5, 9, 14)] == [5, 9, 9]
    prompts = [set(whole[limit]["train"]["prompt"][:]) for limit in (5, 9, 14)]
    assert prompts[0] < prompts[1] < prompts[2]
    assert len(set(whole[5]["test"]["group"][:])) == 3
    assert len(set(whole[5]["validation"]["group"][:])) == 3


# --- message contents, and the columns besides -----------------------------------------------------------------------


def talk(number, content="Good {}.", prompt=()):
    """A pair of conversations whose chosen answer has the content."""
    answer = content.format(number) if isinstance(content, str) else content
    return {
        "prompt": [*prompt, said("user", f"Question {number}")],
        "chosen": [said("assistant", answer)],
        "rejected": [said("assistant", f"Bad {number}.")],
    }


@pytest.mark.parametrize(
    ("content", "status"),
    [(None, "empty"), ("", "empty"), (" \n", "empty"), ("Bad 7.", "identical"), ("Bad 7. ", None)],
)
def test_contents_are_checked_as_texts_are(tmp_path, chat_tokenizer, content, status):
    rows = [talk(number) for number in range(12)] + [talk(7, content)]
    config = TextDataConfig(dataset_name=write_jsonl(tmp_path / "p.jsonl", rows), test_fraction=0.3)
    counts = load_preferences(config, chat_tokenizer).counts
    assert counts["dropped"] == {"identical": 0, "empty": 0, "no_marker": 0} | ({status: 1} if status else {})
    assert counts["kept"] == 13 - bool(status)


def test_a_turn_of_the_prompt_without_text_or_role_makes_a_pair_unusable_and_an_empty_system_turn_does_not(
    tmp_path, chat_tokenizer
):
    bad = [[said("user", None)], [said("assistant", " ")], [said(None, "Hi")]]
    rows = [talk(number) for number in range(12)] + [talk(20 + n, prompt=turns) for n, turns in enumerate(bad)]
    rows += [talk(30, prompt=[said("system", None)]), talk(31, prompt=[said("system", "")])]
    config = TextDataConfig(dataset_name=write_jsonl(tmp_path / "p.jsonl", rows), test_fraction=0.3)
    pairs = load_preferences(config, chat_tokenizer)
    assert pairs.counts["dropped"] == {"identical": 0, "empty": 3, "no_marker": 0}
    found = {row["shown"]: row["prompt"] for split in pairs.splits.values() for row in split}
    asked = ("<|im_start|>user\nQuestion {}<|im_end|>\n<|im_start|>assistant\n").format
    assert found[f"{H}Question 30{A}"] == DEFAULT_TURN + asked(30)
    assert found[f"{H}Question 31{A}"] == "<|im_start|>system\n<|im_end|>\n" + asked(31)


def test_parts_of_type_text_are_joined_and_others_refused(tmp_path, chat_tokenizer):
    def parts(*texts, kind="text"):
        return [{"type": kind, "text": text} for text in texts]

    def in_parts(row, kind="text"):
        return {
            side: [turn | {"content": parts(turn["content"][:3], turn["content"][3:], kind=kind)} for turn in turns]
            for side, turns in row.items()
        }

    plain, joined = (tmp_path / name for name in ("plain.jsonl", "joined.jsonl"))
    rows = [talk(number) for number in range(12)]
    found = [
        load_preferences(TextDataConfig(dataset_name=write_jsonl(path, each), test_fraction=0.3), chat_tokenizer)
        for path, each in ((plain, rows), (joined, [in_parts(row) for row in rows]))
    ]
    assert found[0]["train"].to_list() == found[1]["train"].to_list()
    path = write_jsonl(tmp_path / "image.jsonl", [in_parts(row) for row in rows] + [in_parts(talk(13), "image")])
    with pytest.raises(UserError, match=r"row 13: a message has content that is not text .*image.*remove"):
        load_preferences(TextDataConfig(dataset_name=path), chat_tokenizer)


WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    + CHATML
    + "{% if add_generation_prompt and not enable_thinking | default(true) %}<think></think>{% endif %}"
)


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_template_kwargs_reach_the_template_as_in_trl(tmp_path, chat_tokenizer, as_json):
    chat_tokenizer.chat_template = WITH_TOOLS
    tools = [{"type": "function", "function": {"name": "lookup"}}]
    given = json.dumps(tools) if as_json else tools
    rows = [
        talk(number) | {"tools": given, "chat_template_kwargs": {"enable_thinking": number % 2 == 0}, "id": number}
        for number in range(12)
    ]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    pairs = load_preferences(TextDataConfig(dataset_name=path), chat_tokenizer)
    assert pairs.counts["ignored_columns"] == ["id"]
    rows = [row | {"tools": tools} for row in rows]
    expected = {
        chat_tokenizer.apply_chat_template(
            [*row["prompt"], *row["chosen"]], tools=row["tools"], tokenize=False, **row["chat_template_kwargs"]
        )
        for row in rows
    }
    found = [row for split in pairs.splits.values() for row in split]
    assert {row["prompt"] + row["chosen"] for row in found} == expected
    # what the cap keeps of a prompt: the tools' turn and the template's own
    header = f"<|im_start|>system\nTools: {json.dumps(tools)}<|im_end|>\n{DEFAULT_TURN}"
    assert {row["prompt"][: row["header_end"]] for row in found} == {header}


def test_columns_that_nothing_reads_are_named(tmp_path, tokenizer, chat_tokenizer):
    extra = {"tools": '[{"name": "a"}]', "group": "a", "id": 1}
    rows = [talk(number) | extra for number in range(12)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    counts = load_preferences(TextDataConfig(dataset_name=path), chat_tokenizer).counts  # whose template has no tools
    assert counts["ignored_columns"] == ["group", "id", "tools"]
    rows = [row | extra for row in write_pairs(30)]
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    for its in (None, tokenizer):
        found = load_preferences(TextDataConfig(dataset_name=path), its)
        assert found.counts["ignored_columns"] == ["group", "id", "tools"]


def test_tools_that_are_no_json_are_named_with_their_row(tmp_path, chat_tokenizer):
    chat_tokenizer.chat_template = WITH_TOOLS
    rows = [talk(number) | {"tools": "[]" if number < 3 else "[{"} for number in range(12)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(UserError, match=r"row 4: tools must be a list of functions or its JSON"):
        load_preferences(TextDataConfig(dataset_name=path), chat_tokenizer)


IN_COLUMNS = {
    "question": lambda n: {"system": "Brief.", "question": f"Q{n // 2}", "chosen": f"Yes {n}.", "rejected": f"No {n}."},
    "scored": lambda n: {
        "prompt": f"Q{n // 2}",
        "chosen": [said("user", f"Q{n // 2}"), said("assistant", f"Yes {n}.")],
        "rejected": [said("user", f"Q{n // 2}"), said("assistant", f"No {n}.")],
    },
    "turns": lambda n: {
        "conversations": [{"from": "human", "value": f"Q{n // 2}"}],
        "chosen": {"from": "gpt", "value": f"Yes {n}."},
        "rejected": {"from": "gpt", "value": f"No {n}."},
    },
    "typed": lambda n: {
        "prompt": f"Q{n // 2}",
        "chosen": [said("assistant", [{"type": "text", "text": f"Yes {n}."}])],
        "rejected": [said("assistant", [{"type": "text", "text": f"No {n}."}])],
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", IN_COLUMNS)
def test_no_layouts_splits_depend_on_the_format(tmp_path, chat_tokenizer, layout):
    rows = [IN_COLUMNS[layout](n) for n in range(60)]
    config = TextDataConfig(dataset_name=write_jsonl(tmp_path / "p.jsonl", rows), test_fraction=0.3)
    plain, chat = load_preferences(config), load_preferences(config, chat_tokenizer)
    assert len(plain["test"]) > 10
    for split in ("train", "validation", "test"):
        for column in ("group", "pair"):
            assert plain[split][column][:] == chat[split][column][:]
    assert {row["chosen"] for row in plain["test"]} <= {f" Yes {n}." for n in range(60)}


def test_alpacas_input_is_part_of_the_prompt(tmp_path):
    """Its files have the task in `instruction` and the text in `input`, which may be empty."""
    rows = [
        {"instruction": "Summarize.", "input": f"Text {n}." * (n > 0), "chosen": f"Yes {n}.", "rejected": f"No {n}."}
        for n in range(40)
    ]
    pairs = load(write_jsonl(tmp_path / "p.jsonl", rows))
    found = {row["prompt"] for split in ("train", "validation", "test") for row in pairs[split]}
    assert found == {f"{H}Summarize.{A}"} | {f"{H}Summarize.\nText {n}.{A}" for n in range(1, 40)}
    assert pairs.counts["ignored_columns"] == [] and "instruction and input (prompt)" in pairs.counts["layouts"][0]


def test_messages_name_the_file_of_test_pairs_and_its_own_columns(tmp_path):
    rows = [{"prompt": f"Q{n}", "chosen": f"Yes {n}.", "rejected": f"No {n}."} for n in range(40)]
    other = [{"prompt": row["prompt"], "better": row["chosen"], "rejected": row["rejected"]} for row in rows]
    train, test = write_jsonl(tmp_path / "better.jsonl", other), write_jsonl(tmp_path / "test.jsonl", rows[:9])
    pairs = load(train, eval_dataset_name=[test], columns=["chosen=better"])
    assert len(pairs["test"]) == 9
    broken = write_jsonl(tmp_path / "broken.jsonl", other[:9])
    with pytest.raises(UserError, match=re.escape(f"--eval_dataset_name {broken}: no column chosen")):
        load(test, eval_dataset_name=[broken])
    with pytest.raises(UserError, match="with another column each"):
        load(train, columns=["chosen=better", "rejected=better"])
    with pytest.raises(UserError, match="--columns chosen=better: it does not apply to chitchat"):
        load("chitchat", columns=["chosen=better"])

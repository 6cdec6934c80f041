"""Every published layout of pairs against what it means; the files stand in layouts/, six pairs each, written here."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from trl.data_utils import apply_chat_template, extract_prompt

from resdpo_trl.errors import UserError
from resdpo_trl.text.data import SPLITS, TextDataConfig, load_preferences, recognize

FILES = Path(__file__).parent / "layouts"
QUESTION, GOOD, BAD = "What is a comet?", "A ball of ice and dust.", "A kind of star."
HH = (f"\n\nHuman: {QUESTION}\n\nAssistant:", f" {GOOD}", f" {BAD}")
GREETING = [
    {"role": "user", "content": "I have question 0."},
    {"role": "assistant", "content": "What is it?"},
]


def load(*names, **options):
    tokenizer = options.pop("tokenizer", None)
    return load_preferences(TextDataConfig(dataset_name=[str(name) for name in names], **options), tokenizer)


def texts(pairs):
    """All pairs of all splits as (prompt, chosen, rejected)."""
    return {tuple(row[name] for name in ("prompt", "chosen", "rejected")) for split in SPLITS for row in pairs[split]}


def rendered(tokenizer, *messages):
    """The pair about comets as TRL renders it."""
    good, bad = ([{"role": "assistant", "content": text}] for text in (GOOD, BAD))
    prompt = [*messages, {"role": "user", "content": QUESTION}]
    found = apply_chat_template({"prompt": prompt, "chosen": good, "rejected": bad}, tokenizer)
    return found["prompt"], found["chosen"], found["rejected"]


@pytest.mark.parametrize(
    ("file", "layout", "expected"),
    [
        ("hh.jsonl", "Anthropic HH dialogues", HH),
        ("plain.jsonl", "TRL's plain texts", (QUESTION, f" {GOOD}", f" {BAD}")),
        # TRL parts where the texts differ, not where a word begins
        ("implicit.jsonl", "TRL's plain texts with an implicit prompt", (f"{QUESTION} A", GOOD[1:], BAD[1:])),
        ("orca.jsonl", "texts in columns question (prompt), chosen, rejected, system", HH),
        ("array.json", "TRL's plain texts", (QUESTION, f" {GOOD}", f" {BAD}")),
        ("table.csv", "TRL's plain texts", (QUESTION, GOOD, BAD)),
        ("table.tsv", "TRL's plain texts", (QUESTION, GOOD, BAD)),
        ("semicolons.csv", "TRL's plain texts", (QUESTION, GOOD, BAD)),
    ],
)
def test_layouts_of_texts(file, layout, expected):
    pairs = load(FILES / file)
    assert pairs.counts["layouts"] == [layout] and pairs.counts["rows"] == 6
    assert expected in texts(pairs)


@pytest.mark.parametrize(
    ("file", "layout", "before"),
    [
        ("messages.jsonl", "TRL's lists of messages", []),
        ("messages_implicit.jsonl", "TRL's lists of messages with an implicit prompt", []),
        ("ultrafeedback.jsonl", "UltraFeedback's prompts and lists of messages", []),
        ("orca.jsonl", "texts in columns question (prompt), chosen, rejected, system", []),
        (
            "sharegpt.jsonl",
            "ShareGPT's turns (conversations as prompt)",
            [{"role": "system", "content": "Be brief."}, *GREETING],
        ),
    ],
)
def test_layouts_of_messages(file, layout, before, chat_tokenizer):
    pairs = load(FILES / file, tokenizer=chat_tokenizer)
    assert pairs.counts["layouts"] == [layout] and pairs.counts["kept"] == 6
    assert rendered(chat_tokenizer, *before) in texts(pairs)


def test_the_system_column_is_the_system_message(chat_tokenizer):
    prompts = {prompt for prompt, _, _ in texts(load(FILES / "orca.jsonl", tokenizer=chat_tokenizer))}
    said = [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": "What do bees eat?"}]
    assert chat_tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True) in prompts
    plain = {prompt for prompt, _, _ in texts(load(FILES / "orca.jsonl"))}
    assert "Answer in one sentence.\n\nHuman: What do bees eat?\n\nAssistant:" in plain


def test_columns_of_other_names(tmp_path, chat_tokenizer):
    rows = [json.loads(line) for line in (FILES / "orca.jsonl").read_text().splitlines()]
    names = {"system": "role_card", "question": "ask", "chosen": "better", "rejected": "worse"}
    renamed = [{names[key]: value for key, value in row.items()} | {"chosen": "a trap"} for row in rows]
    Dataset.from_list(renamed).to_json(tmp_path / "p.jsonl")
    columns = ["prompt=ask", "chosen=better", "rejected=worse", "system=role_card"]
    pairs = load(tmp_path / "p.jsonl", columns=columns, tokenizer=chat_tokenizer)
    assert texts(pairs) == texts(load(FILES / "orca.jsonl", tokenizer=chat_tokenizer))
    assert pairs.counts["layouts"] == [
        "texts in columns ask (prompt), better (chosen), worse (rejected), role_card (system)"
    ]
    with pytest.raises(UserError, match=r"--columns chosen=best: .*no such column \(found: ask, better, chosen"):
        load(tmp_path / "p.jsonl", columns=["chosen=best"])


@pytest.mark.parametrize("columns", [["better"], ["=x"], ["chosen="], ["answer=x"], ["chosen=a", "chosen=b"]])
def test_a_mapping_that_is_none(columns):
    with pytest.raises(UserError, match=r"--columns .*: needs each of prompt, chosen, rejected, system at most once"):
        TextDataConfig(columns=columns)


def test_several_files_are_one_data_set(tmp_path):
    shutil.copy(FILES / "table.csv", tmp_path / "a table.csv")
    names = [tmp_path / "a table.csv", FILES / "table.tsv", FILES / "semicolons.csv"]
    pairs = load(*names)
    assert pairs.counts["rows"] == 18 and texts(pairs) == texts(load(FILES / "table.csv"))
    # the joined name is read back as the same files: a configuration is made anew from run.json
    assert pairs.counts["source"] == shlex.join(map(str, names))
    assert load(pairs.counts["source"]).counts == pairs.counts
    with pytest.raises(UserError, match=r"--dataset_name .*missing\.csv: no such file"):
        load(*names, tmp_path / "missing.csv")
    (tmp_path / "numbers.jsonl").write_text('{"prompt": 1, "chosen": 2, "rejected": 3}\n')
    with pytest.raises(UserError, match=r"the columns of the files have different types"):
        load(FILES / "plain.jsonl", tmp_path / "numbers.jsonl")


def test_a_table_is_text(tmp_path):
    """Numbers, NA and true are answers, too."""
    rows = [("4", "5"), ("NA", "null"), ("true", "1e3"), ('say "a, b"', "x\ny")]
    quoted = "".join(f'q{n},"{good}","{bad}"\n'.replace('"a, b"', '""a, b""') for n, (good, bad) in enumerate(rows))
    (tmp_path / "p.csv").write_text("\ufeffprompt,chosen,rejected\n" + quoted, encoding="utf-8")
    assert texts(load(tmp_path / "p.csv")) == {(f"q{n}", *row) for n, row in enumerate(rows)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "prompt,chosen,rejected\na,b,c\na,b,c,d\n", r"p\.csv can't be read .*line 3, saw 4"),
        ("p.csv", "", r"p\.csv: the file is empty"),
        ("p.csv", b"prompt,chosen,rejected\n\xff,b,c\n", r"p\.csv can't be read .*utf-8"),
        ("p.json", '[{"chosen": "a"},\n {"chosen": }]', r"p\.json, line 2: not JSON"),
        ("p.json", '[{"chosen": "a"},\n 5]', r"p\.json, row 2: not a JSON object"),
        ("p.txt", "x", r"is not a \.jsonl, \.jsonl\.gz, \.json, \.csv, \.tsv or \.parquet file"),
        (
            "p.jsonl",
            '{"chosen": "a", "rejected": "b", "system": "c"}\n',
            r"a column system but no prompt; name .*prompt=",
        ),
        ("p.jsonl", '{"prompt": 5, "chosen": "a", "rejected": "b"}\n', r"must be text or lists of messages \(prompt: "),
        ("p.jsonl", '{"chosen": "a", "rejected": "b"}\n', r"have no common prompt: .*--columns prompt=COLUMN"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load(tmp_path / name)


def test_implicit_prompts_are_trls(tmp_path):
    rows = [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "Sure, tea.", "rejected": "Sure, toast."},
        {"chosen": "One.\nTwo.", "rejected": "One.\nTen."},
    ]
    Dataset.from_list(rows).to_json(tmp_path / "p.jsonl")
    assert texts(load(tmp_path / "p.jsonl")) == {tuple(extract_prompt(row).values()) for row in rows}


def test_splits_that_flags_name(tmp_path):
    rows = {name: [{"prompt": f"{name} {n}", "chosen": "a", "rejected": "b"} for n in range(9)]
            for name in ("train_prefs", "train_sft", "test_prefs", "test_sft")}  # fmt: skip
    DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()}).save_to_disk(str(tmp_path / "d"))
    pairs = load(tmp_path / "d", dataset_train_split="train_prefs", dataset_test_split="test_prefs")
    assert sorted(pairs["test"]["prompt"]) == [f"test_prefs {n}" for n in range(9)]
    assert {prompt.split()[0] for split in ("train", "validation") for prompt in pairs[split]["prompt"]} == {
        "train_prefs"
    }
    with pytest.raises(UserError, match=r"test_prefs and test_sft match test: .*--dataset_test_split"):
        load(tmp_path / "d", dataset_train_split="train_prefs")
    with pytest.raises(UserError, match=r"--dataset_test_split x: no such split \(found: train_prefs, train_sft"):
        load(tmp_path / "d", dataset_train_split="train_prefs", dataset_test_split="x")


def test_other_pairs_for_the_test(tmp_path):
    rows = [{"prompt": f"held out {n}", "chosen": "a", "rejected": "b"} for n in range(5)]
    Dataset.from_list(rows).to_json(tmp_path / "test.jsonl")
    pairs = load(FILES / "plain.jsonl", eval_dataset_name=str(tmp_path / "test.jsonl"))
    assert sorted(pairs["test"]["prompt"]) == [row["prompt"] for row in rows]
    assert len(pairs["train"]) + len(pairs["validation"]) == 6
    with pytest.raises(UserError, match=r"--eval_dataset_name .*nowhere\.jsonl: no such file"):
        load(FILES / "plain.jsonl", eval_dataset_name=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match="both name the test pairs"):
        TextDataConfig(eval_dataset_name="a.jsonl", dataset_test_split="b")


def test_a_shared_system_message_is_no_conversation(chat_tokenizer):
    """The opening turn keeps a conversation in one split; what the system says opens all of them."""
    pairs = load(FILES / "sharegpt.jsonl", tokenizer=chat_tokenizer)
    assert len({group for split in SPLITS for group in pairs[split]["group"]}) == 6
    pairs = load(FILES / "sharegpt.jsonl")  # the same as HH writes them
    assert len({group for split in SPLITS for group in pairs[split]["group"]}) == 6


def test_a_column_of_nulls_is_no_column(chat_tokenizer):
    rows = Dataset.from_dict({"system": [None], "prompt": ["p"], "chosen": ["a"], "rejected": ["b"]})
    found, kind, layout, unread = recognize(rows, {}, chat_tokenizer, "x")
    assert (kind, layout, found.column_names) == ("prompt", "TRL's plain texts", ["prompt", "chosen", "rejected"])
    assert unread == set()

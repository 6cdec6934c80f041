"""Which names are files, and which may be the Hub's."""

import json
import os

import pytest
from datasets import Dataset

from resdpo_trl.errors import UserError
from resdpo_trl.sources import first_line, load_rows


@pytest.mark.parametrize("name", ["allenai/tulu-2.5-preference-data", "owner/pairs.v2", "argilla/ultrafeedback.1"])
def test_a_dot_in_the_name_of_a_data_set_makes_it_no_file(name):
    with pytest.raises(UserError, match="not a local path, and not available from the Hub"):  # there is no network here
        load_rows(name, None, None, "quickstart")


@pytest.mark.parametrize("name", ["pairs.jsonl", "data/pairs.jsonl.gz", "pairs.json", "x.parquet", "./pairs", "a/b/c"])
def test_a_file_that_is_not_there_is_said_to_be_none(name):
    with pytest.raises(UserError, match=f"^--dataset_name {name}: no such file or folder"):
        load_rows(name, None, None, "quickstart")


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\nfirst\nsecond")) == "first"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 999))) == 200


ROWS = [{"chosen": "a", "rejected": "b"}, {"chosen": "c", "rejected": "d"}]


def write_rows(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["pairs [1].jsonl", "what?.jsonl", "a*b{c}.parquet", "[seed]/x.jsonl"])
def test_a_path_is_no_pattern(tmp_path, name):
    """Neither a file's nor a folder's; `datasets` would take it for one."""
    path = write_rows(tmp_path / name)
    write_rows(tmp_path / "aXb.parquet", ROWS[:1])
    assert load_rows(str(path), None, None, "quickstart")["train"].to_list() == ROWS
    folder = tmp_path / f"folder {path.stem}"
    write_rows(folder / "data" / "train.jsonl")
    write_rows(folder / "data" / "test.jsonl", ROWS[:1])
    for found in (
        load_rows(str(folder), None, None, "quickstart"),
        load_rows(str(folder), "data", None, "quickstart"),
        load_rows(str(folder / "data"), None, None, "quickstart"),
    ):
        assert {split: rows.to_list() for split, rows in found.items()} == {"train": ROWS, "test": ROWS[:1]}


@pytest.mark.parametrize("kind", ["file", "folder", "saved"])
def test_changed_content_is_read_anew(tmp_path, kind):
    """With the size and the time of change that the file had before, by which `datasets` would know it."""
    other = [{"chosen": "A", "rejected": "b"}, ROWS[1]]

    def load(rows):
        if kind == "saved":
            saved = Dataset.from_list(rows)
            saved._fingerprint = "the same"
            saved.save_to_disk(str(tmp_path / "d"))
        else:
            os.utime(write_rows(tmp_path / "d" / "train.jsonl", rows), (1e9, 1e9))
        found = load_rows(str(tmp_path / "d" / ("train.jsonl" if kind == "file" else "")), None, None, "q")["train"]
        return found.to_list(), found._fingerprint

    first, again, changed = load(ROWS), load(ROWS), load(other)
    assert first == again
    assert changed[0] == other and changed[1] != first[1]

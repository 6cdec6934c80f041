"""Which names are files, and which may be the Hub's."""

import pytest

from resdpo_trl.errors import UserError
from resdpo_trl.sources import first_line, load_rows


@pytest.mark.parametrize("name", ["allenai/tulu-2.5-preference-data", "owner/pairs.v2", "argilla/ultrafeedback.1"])
def test_a_dot_in_the_name_of_a_data_set_makes_it_no_file(name):
    with pytest.raises(UserError, match="not a local path, and the Hub does not give it"):  # there is no network here
        load_rows(name, None, None, "quickstart")


@pytest.mark.parametrize("name", ["pairs.jsonl", "data/pairs.jsonl.gz", "pairs.json", "x.parquet", "./pairs", "a/b/c"])
def test_a_file_that_is_not_there_is_said_to_be_none(name):
    with pytest.raises(UserError, match=f"^--dataset_name {name}: no such file or folder"):
        load_rows(name, None, None, "quickstart")


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\nfirst\nsecond")) == "first"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 999))) == 200

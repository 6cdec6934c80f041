import json
import sys

import pytest

from resdpo_trl.errors import UserError
from resdpo_trl.run import RunFolder, to_json


def test_json_is_strict_and_exact():
    text = to_json({"nan": float("nan"), "inf": [float("-inf")], "third": 1 / 3, "name": "é"})
    assert json.loads(text) == {"nan": None, "inf": [None], "third": 1 / 3, "name": "é"}


def test_a_folder_with_a_run_is_not_touched(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"--resume_from_checkpoint.*--overwrite_output_dir"):
        RunFolder(tmp_path).open()
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def test_overwriting_removes_the_run_and_nothing_else(tmp_path):
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "config.json").write_text("{}")
    (tmp_path / "thesis.tex").write_text("years of work")
    RunFolder(tmp_path).open(overwrite=True)
    assert not (tmp_path / "reference").exists()
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file is there"):
        RunFolder(tmp_path / "file").open()


def test_secrets_stay_out_of_run_json(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--hub_token", "hf_planted", "--api-key=hf_planted", "--beta", "0.1"])
    run = RunFolder(tmp_path)
    run.open()
    run.start({"hub_token": "hf_planted", "max_tokens": 5, "dpo": {"push_to_hub_token": "hf_planted"}}, seed=1)
    text = (tmp_path / "run.json").read_text()
    assert "hf_planted" not in text
    written = json.loads(text)
    assert written["config"]["max_tokens"] == 5
    assert written["command"][-2:] == ["--beta", "0.1"]
    assert written["num_processes"] == 1
    assert written["ended"] is None


def test_lines_past_the_checkpoint_and_torn_ones_are_dropped_on_resume(tmp_path):
    run = RunFolder(tmp_path)
    run.open()
    run.log("sft", "train", 50, 1.0, {"loss": 1.0})
    for step in (10, 20, 30):
        run.log("dpo", "train", step, step / 30, {"loss": 0.5})
    run.log("dpo", "validation", 20, 2 / 3, {"loss": 0.5})  # written after the checkpoint of step 20
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "dpo", "st')
    run.forget_metrics("dpo", after_step=20, at_step={"train"})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("sft", 50), ("dpo", 10), ("dpo", 20)]


def test_other_processes_write_nothing(tmp_path):
    run = RunFolder(tmp_path / "run", main_process=False)
    run.open()
    run.log("dpo", "train", 1, 0.1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()

import json
import sys

import pytest

from resdpo_trl.errors import UserError
from resdpo_trl.run.folder import RunFolder, to_json


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
    run = RunFolder(tmp_path)
    run.open(overwrite=True)
    assert (tmp_path / "reference" / "config.json").exists()  # until the new run has what it begins with
    run.start({}, seed=1)
    assert not (tmp_path / "reference").exists()
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_an_overwriting_run_reads_must_lie_outside_the_run_that_goes(tmp_path, monkeypatch):
    (tmp_path / "runs" / "x" / "policy").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "samples.jsonl").write_text("{}")
    (tmp_path / "runs" / "x" / "pairs.jsonl").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "x" / "policy")
    monkeypatch.chdir(tmp_path)
    run = RunFolder("runs/x")
    run.open(overwrite=True)
    for config, named in (
        ({"stage": {"reference": "runs/x/policy"}}, "--reference runs/x/policy: is in the run"),
        ({"reference": str(tmp_path / "link")}, "--reference .*link: is in the run"),
        ({"dataset_name": "./runs/x/samples.jsonl"}, r"--dataset_name \./runs/x/samples\.jsonl: is in the run"),
        ({"models": ["a=gpt2", "b=runs/x/policy"]}, "--models runs/x/policy: is in the run"),
    ):
        with pytest.raises(UserError, match=named):
            run.check_inputs(config)
    run.check_inputs({"dataset_name": "runs/x/pairs.jsonl", "output_dir": "runs/x", "seed": 1, "model": "policy"})
    other = RunFolder("runs/y")
    other.open(overwrite=True)
    other.check_inputs({"reference": "runs/x/policy"})


def test_a_resumed_run_keeps_to_its_data(tmp_path):
    run = RunFolder(tmp_path)
    run.open()
    run.start({}, 1, {"train": "abc"})
    for data in ({"train": "xyz"}, {"train": "xyz"}, {"train": "abc"}):  # a refusal changes nothing
        run = RunFolder(tmp_path)
        run.open(resume=True)
        if data == {"train": "abc"}:
            run.start({}, 1, data)
        else:
            with pytest.raises(UserError, match="the data have changed"):
                run.start({}, 1, data)
    assert len(json.loads((tmp_path / "run.json").read_text())["resumed"]) == 1


def test_the_model_that_a_run_is_about(tmp_path):
    run = RunFolder(tmp_path)
    assert run.trained == run.reference
    for folder in (run.reference, run.reward_model, run.policy):
        folder.mkdir()
        assert run.trained == folder


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
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

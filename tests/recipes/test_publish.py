"""Whole runs that push, and publish.py, against the Hub of tests/hub_server.py."""

import json
import os
import subprocess
import sys

import numpy as np
import torch
from PIL import Image

from tests.conftest import write_pairs
from tests.hub_server import TOKEN
from tests.image.conftest import image_folder  # noqa: F401  (a fixture)
from tests.recipes.conftest import ROOT

SMALL = ["--widths", "24", "24", "--use_cpu", "--per_device_train_batch_size", "16", "--logging_steps", "2"]


def test_a_reward_run_pushes_its_own_checkpoints_and_not_those_of_sft(recipe, hub, tmp_path, model_folder):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in write_pairs(60)))
    status, _, err = recipe(
        "reward_hh.py", "--dataset_name", pairs, "--output_dir", tmp_path / "run", "--model_name_or_path", model_folder,
        "--max_length", "64", "--use_cpu", "--num_train_epochs", "1", "--sft.num_train_epochs", "1", "--push_to_hub",
        "--hub_model_id", "me/judge", "--hub_strategy", "every_save", "--hub_always_push",
    )  # fmt: skip
    assert status == 0, err
    last = max(
        (tmp_path / "run" / "checkpoints" / "reward").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime
    )
    pushed = hub.repositories["me/judge"].messages
    assert pushed == [f"Training in progress, {last.name}", "reward_model of run", "Card of run"]


def test_a_run_that_pushes_its_saves_and_what_can_be_done_with_them(recipe, hub, tmp_path, image_folder, monkeypatch):  # noqa: F811
    from transformers import pipeline

    import resdpo_trl.image  # noqa: F401  (the one import that the card names)

    arguments = ["dpo_cifar.py", "--dataset_name", image_folder, "--num_train_epochs", "2", *SMALL]
    hub.make_trouble("POST", "/commit/", 1, 403)  # of the first checkpoint
    status, said, err = recipe(
        *arguments, "--output_dir", tmp_path / "run", "--push_to_hub", "--hub_model_id", "me/colours",
        "--hub_private_repo", "--hub_strategy", "checkpoint", "--hub_always_push",
    )  # fmt: skip
    assert status == 0, err
    assert f"pushed to {hub.url}/me/colours" in said and "total seconds" in said
    assert "not pushed: the token has no write permission" in err and "training continues" in err
    repository = hub.repositories["me/colours"]
    last = max((tmp_path / "run" / "checkpoints" / "dpo").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    assert repository.private
    save = f"Training in progress, {last.name}"
    assert repository.messages == [save, f"{save}, to resume from", "policy of run", "Card of run"]
    assert f"run/checkpoints/dpo/{last.name}/optimizer.pt" in repository.files
    assert not [name for name in repository.files if name.endswith("training_args.bin")]
    assert {name for name in repository.files if name.startswith("plots/")}
    assert TOKEN not in said + err

    # the policy, as the card says
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("me/colours", str(tmp_path / "run" / "policy")):
        scores = pipeline("image-classification", model=name, device="cpu")(picture, top_k=4)
        assert len(scores) == 4
        if name == "me/colours":
            from_the_hub = scores
    assert scores == from_the_hub

    # the run, continued on another machine from what the Hub holds
    for name, content in repository.files.items():
        if name.startswith("run/"):
            target = tmp_path / "elsewhere" / name.removeprefix("run/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    status, said, err = recipe(*arguments, "--output_dir", tmp_path / "elsewhere", "--resume_from_checkpoint")
    assert status == 0, err
    assert "seconds since the last resume" in said and "total seconds" not in said
    assert "since the last resume" in (tmp_path / "elsewhere" / "report.html").read_text()
    weights = [(tmp_path / name / "policy" / "model.safetensors").read_bytes() for name in ("run", "elsewhere")]
    assert weights[0] == weights[1]

    # and once more, later, by the recipe for it
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "recipes/publish.py", tmp_path / "run", "--hub_model_id", "me/again"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, f"pushed to {hub.url}/me/again\n"), done.stderr
    assert b'model="me/again"' in hub.repositories["me/again"].files["README.md"]


def test_what_publish_refuses(recipe, hub, tmp_path):
    status, _, said = recipe("publish.py", tmp_path / "nothing", "--hub_model_id", "me/x")
    assert status == 2 and "no such folder" in said
    (tmp_path / "policy").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"ended": "now"}))
    status, _, said = recipe("publish.py", tmp_path, "--hub_model_id", "me/x")
    assert status == 2 and "no finished model" in said
    torch.save({}, tmp_path / "policy" / "pytorch_model.bin")
    status, _, said = recipe("publish.py", tmp_path, "--hub_model_id", "me/x")
    assert status == 2 and "no finished model" in said
    (tmp_path / "policy" / "model.safetensors").write_bytes(b"")
    status, _, said = recipe("publish.py", tmp_path, "--hub_model_id", "../../x")
    assert status == 2 and "--hub_model_id ../../x: not a valid id" in said
    assert not hub.requests

"""Pushes to a Hub on the loopback interface, with the real client, and what becomes of them when it makes trouble."""

import shutil
import time
from pathlib import Path

import pytest
import torch

from resdpo_trl.errors import UserError
from resdpo_trl.run.files import MANIFEST
from resdpo_trl.run.hub import Hub, publish
from resdpo_trl.training.reference import REFERENCE_FILE
from tests.conftest import tiny_model
from tests.hub_server import TOKEN

TRAININGS = ("trainer_state.json", "log_state_0.json", MANIFEST, REFERENCE_FILE)  # of a checkpoint, not the model's
CARD = "---\nlicense: mit\n---\n# A model\nfrom_pretrained('FOLDER_OR_ID')\n"


@pytest.fixture
def run(tmp_path, tokenizer):
    """The part of a run's folder that is pushed."""
    folder = tmp_path / "a-run"
    tiny_model("gpt2").save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    (folder / "policy" / "README.md").write_text(CARD)
    (folder / "run.json").write_text('{"ended": "2026-01-01"}')
    (folder / "summary.json").write_text("{}")
    return folder


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited, without waiting."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def logits_of(name, **options):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    model = AutoModelForCausalLM.from_pretrained(name, **options).eval()
    return model(**tokenizer("\n\nHuman: tell me something\n\nAssistant:", return_tensors="pt")).logits


def test_what_was_pushed_gives_the_same_outputs(hub, run, tmp_path, capsys):
    Hub(run, private=True).push_model(run / "policy")
    assert capsys.readouterr().out == f"pushed to {hub.url}/tester/a-run\n"
    repository = hub.repositories["tester/a-run"]
    assert repository.private
    assert set(repository.files) == {path.name for path in (run / "policy").iterdir()}
    assert repository.large == {"model.safetensors"}
    assert b"from_pretrained('tester/a-run')" in repository.files["README.md"]
    hub.make_trouble("GET", "/storage/", 1, "cut")  # in the middle of the weights
    loaded = logits_of("tester/a-run", cache_dir=tmp_path / "cache")
    assert torch.equal(loaded, logits_of(run / "policy"))
    assert sum(request == "GET" and path.startswith("/storage/") for request, path in hub.requests) == 2


def test_a_branch_and_a_second_push(hub, run):
    Hub(run, "team/model", revision="try").upload(run / "policy")
    Hub(run, "team/model", revision="try").upload(run / "policy")
    repository = hub.repositories["team/model"]
    assert repository.branches == {"main", "try"} and not repository.private
    assert ("POST", "/api/models/team/model/commit/try") in hub.requests
    assert sum(path.startswith("/storage/") for _, path in hub.requests) == 1  # the weights went once


def test_an_adapter_and_a_full_model_do_not_mix(hub, run):
    """transformers loads an adapter that lies with a full model on top of it."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / "policy" / name).write_text('{"base_model_name_or_path": "someone/base"}')
    publish(Hub(run, "me/model"))
    assert "adapter_model.safetensors" in hub.repositories["me/model"].files
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / "policy" / name).unlink()
    publish(Hub(run, "me/model"))
    assert set(hub.repositories["me/model"].files) == {path.name for path in (run / "policy").iterdir()}


@pytest.mark.parametrize("what", [500, "cut"])
def test_huggingface_hub_tries_an_upload_again(hub, run, waits, capsys, what):
    hub.make_trouble("PUT", "/storage/", 2, what)
    Hub(run).push_model(run / "policy")
    said = capsys.readouterr()
    assert said.out == f"pushed to {hub.url}/tester/a-run\n", said.err
    assert hub.repositories["tester/a-run"].files["model.safetensors"]
    assert len(waits) == 2 and TOKEN not in said.err


LASTING = [
    ("POST", "/api/repos/create", 401, "the Hub rejects the token: run `hf auth login`"),
    ("POST", "/api/repos/create", 403, "the token has no write permission"),
    ("POST", "/preupload/", 404, "the repository does not exist"),
    ("POST", "/commit/", 403, "the token has no write permission"),
    ("POST", "/commit/", 409, "the Hub refuses the request (HTTP 409)"),
    ("POST", "/commit/", 429, "the Hub refuses the request (HTTP 429)"),
    ("POST", "/commit/", 500, "the Hub refuses the request (HTTP 500)"),
    ("PUT", "/storage/", 500, "the Hub refuses the request (HTTP 500)"),
    ("PUT", "/storage/", "cut", "Error: "),
]


@pytest.mark.parametrize(("method", "path", "what", "reason"), LASTING)
def test_trouble_that_lasts_is_one_line(hub, run, waits, capsys, method, path, what, reason):
    hub.make_trouble(method, path, 1000, what)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    Hub(run, "me/model", private=True, revision="try").push_model(run / "policy")
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("not pushed: ")]
    assert reason in line
    assert line.endswith(
        f"; the run is complete in {run}; push it later: resdpo-trl publish {run} --hub_model_id me/model "
        "--hub_private_repo --hub_revision try"
    )
    assert TOKEN not in said
    tries = sum(asked == method and path in place for asked, place in hub.requests)
    assert tries == (6 if method == "PUT" else 1)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_no_network_and_offline_mode(hub, run, capsys, monkeypatch):
    hub.shutdown()
    hub.server_close()
    Hub(run).push_model(run / "policy")
    assert "not pushed: ConnectError: " in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Hub(run).push_model(run / "policy")
    assert "not pushed: OfflineModeIsEnabled: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../x", "a/b/c", "/etc/passwd", "a b", "owner/..", "-x", "x" * 200, "a\nb"])
def test_a_name_that_is_none_is_refused_before_anything(run, name):
    with pytest.raises(UserError, match="--hub_model_id"):
        Hub(run, name)


def test_publish(hub, run):
    (run / "policy" / "training_args.bin").write_bytes(b"a pickle")
    assert publish(Hub(run, "me/later")) == f"{hub.url}/me/later"
    files = set(hub.repositories["me/later"].files)
    assert "model.safetensors" in files and "training_args.bin" not in files
    shutil.copytree(run / "policy", run / "reference")
    shutil.move(run / "policy", run / "reward_model")  # as a run of a reward model leaves it
    publish(Hub(run, "me/reward", revision="try"))
    assert hub.repositories["me/reward"].messages == ["reward_model of a-run", "Card of a-run"]
    assert hub.repositories["me/reward"].branches == {"main", "try"}
    shutil.rmtree(run / "reward_model")  # and one of SFT alone
    publish(Hub(run, "me/reference"))
    assert hub.repositories["me/reference"].messages == ["reference of a-run", "Card of a-run"]
    hub.make_trouble("POST", "/commit/", 99, 403)
    with pytest.raises(UserError, match="--hub_model_id me/later: not pushed: the token has no write permission"):
        publish(Hub(run, "me/later"))
    (run / "run.json").write_text('{"ended": null}')
    with pytest.raises(UserError, match="has not ended"):
        publish(Hub(run, "me/later"))
    with pytest.raises(UserError, match="no such folder"):
        publish(Hub(run / "nothing", "me/later"))


# --- while it trains -----------------------------------------------------------------------------------------------


def save(run: Path, step: int) -> Path:
    """A checkpoint as a Trainer leaves it."""
    folder = run / "checkpoints" / "dpo" / f"checkpoint-{step}"
    tiny_model("gpt2", seed=step).save_pretrained(folder)
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", *TRAININGS):
        (folder / name).write_bytes(f"{name} of {step}".encode())
    return folder


@pytest.mark.parametrize(
    ("strategy", "steps"), [("every_save", []), ("checkpoint", [3]), ("all_checkpoints", [1, 2, 3])]
)
def test_what_a_strategy_pushes(hub, run, strategy, steps):
    pushing = Hub(run, strategy=strategy, always=True)
    for step in (1, 2, 3):
        pushing.push_save(save(run, step))
    pushing.push_model(run / "policy")
    repository = hub.repositories["tester/a-run"]
    saves = [f"Training in progress, checkpoint-{n}" for n in (1, 2, 3)]
    expected = [line for save in saves for line in ([save, f"{save}, to resume from"] if steps else [save])]
    assert repository.messages == [*expected, "policy of a-run", "Card of a-run"]
    below = {name for name in repository.files if "/" in name}
    held = {"model.safetensors", "config.json", "generation_config.json", "optimizer.pt", "rng_state.pth"}
    held |= set(TRAININGS)
    assert below == {f"run/checkpoints/dpo/checkpoint-{n}/{name}" for n in steps for name in held} | (
        {"run/run.json", "run/summary.json"} if steps else set()
    )
    assert not set(TRAININGS) & set(repository.files)
    assert not [name for name in repository.files if "/" not in name and name.endswith((".pt", ".pth", ".bin"))]
    assert repository.files["model.safetensors"] == (run / "policy" / "model.safetensors").read_bytes()


def test_a_push_in_the_background_holds_nobody_up(hub, run, capsys):
    pushing = Hub(run, strategy="every_save")
    with hub.lock:  # the Hub answers nothing
        started = time.perf_counter()
        pushing.push_save(save(run, 1))
        pushing.push_save(save(run, 2))  # skipped: the push before it has not ended
        assert time.perf_counter() - started < 5
    pushing.push_model(run / "policy")
    messages = hub.repositories["tester/a-run"].messages
    assert messages == ["Training in progress, checkpoint-1", "policy of a-run", "Card of a-run"]
    with hub.lock:
        pushing.push_save(checkpoint := save(run, 3))
        shutil.rmtree(checkpoint)  # as --save_total_limit may
    pushing.push_model(run / "policy")
    assert "checkpoint-3 not pushed: " in capsys.readouterr().err and len(messages) == 5


def test_failing_pushes_are_one_line_each_and_end_nothing(hub, run, capsys):
    hub.make_trouble("POST", "/commit/", 2, 403)
    pushing = Hub(run, strategy="every_save", always=True)
    for step in (1, 2):
        pushing.push_save(save(run, step))
    sharded = run / "checkpoints" / "dpo" / "checkpoint-4"
    sharded.mkdir()
    (sharded / REFERENCE_FILE).write_bytes(b"no weights of the model's")
    pushing.push_save(sharded)
    pushing.push_model(run / "policy")
    first, second, third = [line for line in capsys.readouterr().err.splitlines() if "not pushed" in line]
    for line in (first, second):
        assert "no write permission" in line and line.endswith("; training continues")
    assert "no full weights" in third
    assert hub.repositories["tester/a-run"].messages == ["policy of a-run", "Card of a-run"]

"""Nothing of others is run, no secret is written down, nothing is written outside the output folder."""

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resdpo_trl.errors import UserError
from resdpo_trl.image.model import load_classifier
from resdpo_trl.run.folder import redacted
from resdpo_trl.text.config import TextModelConfig
from resdpo_trl.text.model import load_model, load_tokenizer
from tests.conftest import tiny_model, write_pairs
from tests.image.conftest import draw, write_parquet
from tests.recipes.conftest import ROOT, recipe  # noqa: F401  (a fixture)

SECRETS = {
    "HF_TOKEN": "hf_fromTheEnvironment01",
    "WANDB_API_KEY": "wandbKeyOfNobody0000002",
    "JUDGE_API_KEY": "judgeKeyOfNobody0000003",
}
FLAG = "hf_fromTheCommandLine04"
SMALL_TEXT = [
    "--sft.num_train_epochs", "1", "--max_new_tokens", "6", "--num_samples", "2", "--max_length", "64", "--use_cpu",
]  # fmt: skip


class Bomb:
    """An object whose unpickling leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def pickled_weights(folder: Path, name: str, bomb: Path) -> None:
    with open(folder / name, "wb") as file:
        pickle.dump(Bomb(bomb), file)


# --- what others send is not run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "adapter", "adapter next to a model"])
def test_pickled_weights_of_a_language_model_are_refused(tmp_path, tokenizer, kind):
    folder, bomb = tmp_path / "model", tmp_path / "bomb"
    tiny_model("gpt2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind != "adapter next to a model":
        (folder / "model.safetensors").unlink()
    if kind != "model":
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(folder)})
        )
    pickled_weights(folder, "pytorch_model.bin", bomb)
    pickled_weights(folder, "adapter_model.bin", bomb)
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=r"--model .*no safetensors weights.*save it again with save_pretrained"):
            load(str(folder), TextModelConfig(), False, "--model")
    assert not bomb.exists()


def test_pickled_weights_of_a_classifier_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resdpo_image_classifier"}))
    pickled_weights(tmp_path, "pytorch_model.bin", tmp_path / "bomb")
    with pytest.raises(UserError, match=r"--model .*no safetensors weights.*save it again with save_pretrained"):
        load_classifier(str(tmp_path), "--model")
    assert not (tmp_path / "bomb").exists()


def test_code_of_a_model_runs_only_where_it_was_asked_for(tmp_path, tokenizer, capsys):
    folder, bomb = tmp_path / "model", tmp_path / "bomb"
    tiny_model("gpt2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"import os\nos.mkdir({str(bomb)!r})\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class C(GPT2Config):\n    model_type = 'mine'\n"
        "class M(GPT2LMHeadModel):\n    config_class = C\n"
    )
    with pytest.raises(UserError, match="can't be loaded"):
        load_model(str(folder), TextModelConfig(), False, "--model")
    with pytest.raises(UserError, match="can't be loaded"):
        load_classifier(str(folder), "--model")
    assert not bomb.exists() and "WARNING" not in capsys.readouterr().err
    load_model(str(folder), TextModelConfig(), True, "--model")
    assert bomb.exists()
    assert f"WARNING: --trust_remote_code: Python files of {folder} run" in capsys.readouterr().err


def test_no_call_that_runs_text():
    """Beside ruff's rules, which `make quality` applies: no eval, no shell, no unpickling, no YAML but the safe one."""
    refused = {
        "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load",
        "yaml.full_load", "subprocess.getoutput", "marshal.loads", "joblib.load",
    }  # fmt: skip
    files = [file for folder in ("resdpo_trl", "recipes", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 30
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name, flags = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
                assert name not in refused, f"{file}, line {node.lineno}: {name}"
                assert "shell" not in flags, f"{file}, line {node.lineno}: a shell"
                if name == "torch.load":
                    assert ast.unparse(flags["weights_only"]) == "True", f"{file}, line {node.lineno}"


# --- secrets -------------------------------------------------------------------------------------------------------


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_secret_in_any_file_or_stream(recipe, hub, tmp_path, model_folder, monkeypatch, caplog):  # noqa: F811
    """A whole run with checkpoints, cards and a push that fails, under a umask that lets everybody write."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in write_pairs(90)))
    before = os.umask(0)
    try:
        status, said, err = recipe(
            "dpo_hh.py", "--dataset_name", tmp_path / "pairs.jsonl", "--output_dir", tmp_path / "runs" / "r",
            "--model_name_or_path", model_folder, *SMALL_TEXT,
            "--push_to_hub", "--hub_token", FLAG, "--hub_model_id", "me/r",
        )  # fmt: skip
    finally:
        os.umask(before)
    assert status == 0, err
    assert "not pushed: the Hub rejects the token" in err  # which is not the server's, and quoted by it
    assert f"resdpo-trl publish {tmp_path}/runs/r --hub_model_id me/r" in err
    files = everything_in(tmp_path / "runs")
    assert any(path.name == "training_args.bin" for path in files)
    streams = said + err + caplog.text
    for secret in (*SECRETS.values(), FLAG):
        assert secret not in streams
        for path, content in files.items():
            assert secret.encode() not in content, path
    for path in [tmp_path / "runs", *(tmp_path / "runs").rglob("*")]:
        assert not path.stat().st_mode & 0o002, path
    assert "[redacted]" in json.loads((tmp_path / "runs" / "r" / "run.json").read_text())["command"]


@pytest.mark.parametrize("given", [["--hub_token", FLAG], [f"--hub-token={FLAG}"]])
def test_no_secret_in_a_traceback(tmp_path, given):
    script = tmp_path / "recipe.py"
    script.write_text(
        "import sys\nsys.path.insert(0, sys.argv.pop(1))\nfrom command_line import run\nimport os\n\n"
        "def main():\n    token = sys.argv[-1]\n    try:\n        raise ValueError(token)\n"
        "    except ValueError as error:\n"
        "        raise RuntimeError(f\"{os.environ['HF_TOKEN']} {os.environ['JUDGE_API_KEY']}\") from error\n\n"
        "run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(ROOT / "recipes"), *given],
        capture_output=True, text=True, env={**os.environ, **SECRETS},
    )  # fmt: skip
    assert done.returncode == 1
    assert "RuntimeError: [redacted] [redacted]" in done.stderr and "ValueError: " in done.stderr
    assert not [secret for secret in (*SECRETS.values(), FLAG) if secret in done.stdout + done.stderr]


def test_only_secrets_are_redacted(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "longEnoughToBeOne")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    monkeypatch.setenv("SOME_API_KEY", "longEnoughToBeTwo")
    assert redacted("a longEnoughToBeOne longEnoughToBeTwo") == "a longEnoughToBeOne [redacted]"


# --- names ---------------------------------------------------------------------------------------------------------


def test_names_from_data_never_become_paths(recipe, tmp_path):  # noqa: F811
    names = ("../../../red", "/etc/green", "..", "a/b\\c\n<b>")
    write_parquet(tmp_path / "data" / "train.parquet", draw(120), names=names)
    write_parquet(tmp_path / "data" / "test.parquet", draw(30, seed=1), names=names)
    work = tmp_path / "deep" / "er"
    work.mkdir(parents=True)
    before = set(everything_in(tmp_path))
    status, _, said = recipe(
        "dpo_cifar.py", "--dataset_name", tmp_path / "data", "--output_dir", work / "run", "--widths", "24", "24",
        "--use_cpu", "--per_device_train_batch_size", "16", "--compare_modes", "hard/copy",
    )  # fmt: skip
    assert status == 0, said
    new = set(everything_in(tmp_path)) - before
    assert new and all((work / "run") in path.parents for path in new)
    config = json.loads((work / "run" / "policy" / "config.json").read_text())
    assert sorted(config["id2label"].values()) == sorted(names)
    for mode in ("../x/copy", "all/../../x"):
        status, _, said = recipe("dpo_cifar.py", "--dataset_name", tmp_path / "data", "--compare_modes", mode)
        assert status == 2 and "--compare_modes" in said


def test_a_name_of_the_hub_that_leaves_the_folder(recipe, tmp_path):  # noqa: F811
    status, _, said = recipe(
        "dpo_hh.py", "--output_dir", tmp_path / "run", "--push_to_hub", "--hub_model_id", "../../x", "--use_cpu"
    )
    assert status == 2 and "--hub_model_id ../../x: not a valid id" in said
    assert not (tmp_path / "run").exists()


def test_a_pickle_of_weights_is_not_read(tmp_path):
    from resdpo_trl.image.model import ImageClassifierConfig, build_classifier

    torch.save(Bomb(tmp_path / "bomb"), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"--pretrained_weights .*name a \.safetensors file"):
        build_classifier(ImageClassifierConfig(num_labels=3), 0, pretrained_weights=str(tmp_path / "weights.pth"))
    assert not (tmp_path / "bomb").exists()

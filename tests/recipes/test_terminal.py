"""What a user sees of a run: in a log file, on a terminal, and with --verbose."""

import fcntl
import json
import os
import pty
import re
import runpy
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.conftest import tiny_model, write_pairs
from tests.recipes.conftest import ROOT

SMALL = [
    "--max_length", "64", "--sft.num_train_epochs", "1", "--num_samples", "1", "--max_new_tokens", "4", "--use_cpu",
    "--per_device_train_batch_size", "8", "--num_train_epochs", "2",
]  # fmt: skip
BARS = (
    "Loading weights",
    "Writing model shards",
    "Reading pairs",
    "Tokenizing train",
    "Rows for SFT",
    "Reference log-",
)
ADVICE = (
    "[transformers] The tokenizer has new PAD/BOS/EOS tokens",
    "[transformers] Token indices sequence length is longer",
    "[transformers] The following generation flags are not valid",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model that transformers has advice about, pairs, and a cache of the reference that the first run fills."""
    base = tmp_path_factory.mktemp("terminal")
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.config.bos_token_id = 7  # not the tokenizer's
    model.save_pretrained(base / "model")
    tokenizer.save_pretrained(base / "model")
    for name, changed in (
        ("generation_config.json", {"temperature": 0.6}),  # and no sampling
        ("tokenizer_config.json", {"model_max_length": 48}),
    ):
        path = base / "model" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    (base / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in write_pairs(60)))
    return base


def command(folder: Path, name: str, *more: str) -> list[str]:
    return [
        str(ROOT / "recipes" / "dpo_hh.py"), "--model_name_or_path", str(folder / "model"), "--dataset_name",
        str(folder / "pairs.jsonl"), "--reference_cache_dir", str(folder / "cache"), "--output_dir",
        str(folder / name), *SMALL, *more,
    ]  # fmt: skip


def environment(folder: Path, name: str) -> dict[str, str]:
    """As a user's: without what recipes that ran in this process have set; nothing is in a cache of data."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    return own | {"HF_HOME": str(folder / f"hf-{name}"), "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def log(folder):
    """A run whose output goes to files: what was in the first one while it ran, and both at the end."""
    launch = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--config_file",
        "accelerate_configs/cpu.yaml",
    ]
    paths = folder / "stdout", folder / "stderr"
    with open(paths[0], "w") as out, open(paths[1], "w") as err:
        process = subprocess.Popen(
            [*launch, *command(folder, "log")], cwd=ROOT, stdout=out, stderr=err, env=environment(folder, "log")
        )
        ends = time.monotonic() + 300
        while not (early := paths[0].read_text()) and process.poll() is None and time.monotonic() < ends:
            time.sleep(0.05)
        early, ran = paths[0].read_text(), process.poll() is None
        assert process.wait(300) == 0, paths[1].read_text()[-3000:]
    assert ran
    return early, *(path.read_text() for path in paths)


def test_a_log_file_has_our_lines_alone(log):
    _, out, err = log
    assert err == ""
    said = [
        r"SFT and DPO of .*model on ", r"cpu, ", r"pairs: 40 train", r"SFT, epoch 0, step 0 of 5: validation loss \d",
        r"SFT, epoch 1, step 5 of 5: validation loss \d", r"DPO, epoch 1, step 5 of 10: validation loss [\d.]+, acc",
        r"DPO, epoch 2, step 10 of 10: validation loss [\d.]+, accuracies [\d.]+, margins", r"  pairs ranked right ",
    ]  # fmt: skip
    places = [re.search(f"^{line}", out, re.MULTILINE) for line in said]
    assert None not in places, (said[places.index(None)], out)
    starts = [place.start() for place in places]
    assert starts == sorted(starts)
    assert out.count(": validation loss ") == 4


def test_a_log_file_has_a_line_as_soon_as_it_is_said(log):
    early, out, _ = log
    assert early.startswith("SFT and DPO of ") and out.startswith(early)
    assert "pairs ranked right" not in early


def test_verbose_shows_what_the_libraries_say(folder):
    done = subprocess.run(
        [sys.executable, *command(folder, "verbose", "--verbose")],
        cwd=ROOT, env=environment(folder, "verbose"), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [line for line in (*BARS[:-1], *ADVICE) if line not in done.stderr]  # the reference was read from disk


def test_a_terminal_has_one_bar_a_stage_and_our_warnings(folder, log):
    damaged = sorted((folder / "cache").rglob("*.safetensors"))
    assert damaged
    for file in damaged:
        file.write_bytes(b"damaged")
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, *command(folder, "terminal")],
        cwd=ROOT, env=environment(folder, "terminal"), stdin=other, stdout=other, stderr=other,
    )  # fmt: skip
    os.close(other)
    said = b""
    try:
        while piece := os.read(main, 2**16):
            said += piece
    except OSError:
        pass  # Linux: the process has closed the terminal
    assert process.wait() == 0, said[-3000:]
    text = said.decode()
    assert not [line for line in (*BARS[:-1], *ADVICE, "Warning", "SFT, epoch", "DPO, epoch") if line in text]
    rows = screen(text)
    bars = [number for number, row in enumerate(rows) if re.search(r"\d/\d+ \[", row)]
    assert [rows[number][:9] for number in bars] == ["SFT: 100%", "DPO: 100%"], "\n".join(rows)
    assert all(len(rows[number]) <= 80 for number in bars)
    between = rows[bars[0] + 1 : bars[1]]
    assert between and all(re.fullmatch(r"/.* is damaged .*", row) for row in between)
    # the verdict after a blank line, then the table
    assert rows[bars[1] + 1] == "" and "unseen pairs right" in rows[bars[1] + 2], rows[bars[1] :]
    assert [row for row in rows[bars[1] + 3 :] if row.startswith("  pairs ")]


def screen(text: str) -> list[str]:
    """The rows that a wide terminal shows in the end."""
    rows, row, column = [""], 0, 0
    for word in re.findall(r"\x1b\[A|[\r\n]|[^\r\n\x1b]+", text):
        if word == "\x1b[A":
            row -= 1
        elif word == "\n":
            row += 1
            rows += [""] * (row == len(rows))
        elif word == "\r":
            column = 0
        else:
            rows[row] = rows[row][:column].ljust(column) + word + rows[row][column + len(word) :]
            column += len(word)
    return [each.rstrip() for each in rows]


@pytest.mark.parametrize("flags", [[], ["--verbose"]])
def test_what_is_hidden_and_what_is_not(flags, tmp_path):
    script = (
        "import io, warnings, command_line\n"
        "for module in ('bitsandbytes.functional', 'torch.nn', 'resdpo_trl.text.data'):\n"
        "    warnings.warn_explicit(f'of {module}', FutureWarning, 'file.py', 1, module)\n"
        "warnings.warn_explicit('a user should know', UserWarning, 'file.py', 1, 'torch.nn')\n"
        "from tqdm.auto import tqdm\n"
        "from transformers.utils import logging\n"
        "bar = tqdm(total=1, file=io.StringIO(), disable=False)\n"
        "print(bar.delay, bar.leave, tqdm(total=1).disable, logging.is_progress_bar_enabled())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *flags], capture_output=True, text=True, timeout=200,
        env=environment(tmp_path, "hf") | {"PYTHONPATH": os.pathsep.join([str(ROOT / "recipes"), str(ROOT)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    libraries = ["of bitsandbytes.functional", "of torch.nn"] if flags else []
    assert re.findall(r"Warning: (.*)", done.stderr) == [*libraries, "of resdpo_trl.text.data", "a user should know"]
    assert done.stdout == ("0.0 True False True\n" if flags else "2.0 False True False\n")


@pytest.mark.parametrize("name", sorted({path.name for path in (ROOT / "recipes").glob("*.py")} - {"command_line.py"}))
def test_every_recipe_takes_it(name, recipe):
    status, said, _ = recipe(name, "--help")
    assert status == 0 and "--verbose" in said


def test_a_preset_cannot_hold_it(recipe, tmp_path):
    (tmp_path / "preset.yaml").write_text("verbose: true\n")
    status, _, wrong = recipe("dpo_hh.py", "--config", tmp_path / "preset.yaml", "--output_dir", tmp_path / "run")
    assert status == 2 and wrong == f"error: --config {tmp_path / 'preset.yaml'}: unknown field verbose\n"


def test_a_sweep_that_is_verbose_is_no_other_sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    sweep = runpy.run_path(str(ROOT / "recipes" / "sweep_hh.py"), run_name="imported")
    assert sweep["shared_flags"](["--verbose", "--max_length", "64"]) == ["--max_length", "64"]

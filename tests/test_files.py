"""Files that appear whole or not at all."""

import errno
import gzip
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from resdpo_trl.errors import UserError
from resdpo_trl.run.files import (
    MANIFEST,
    disk_trouble,
    is_locked,
    last_whole,
    lock,
    read_jsonl,
    replace_folder,
    tidy,
    torn,
    write_manifest,
    write_whole,
)


def checkpoint(folder, step):
    """A checkpoint like transformers' with this project's manifest."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.arange(10.0)}, path / "model.safetensors")
    torch.save({"state": torch.arange(10.0)}, path / "optimizer.pt")
    torch.save({"last": 1}, path / "scheduler.pt")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    write_manifest(path, owed={})
    return path


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", MANIFEST])
def test_a_checkpoint_without_one_of_its_files_or_a_part_of_it_is_torn(tmp_path, name):
    checkpoint(tmp_path, 2)
    path = checkpoint(tmp_path, 10)
    assert torn(path) is None
    assert last_whole(tmp_path) == path
    size = (path / name).stat().st_size
    for left in (size - 2, size // 2, 4, 0):
        os.truncate(path / name, left)
        assert torn(path) is not None, left
    assert last_whole(tmp_path).name == "checkpoint-2"
    (path / name).unlink()
    assert torn(path) is not None


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert "checkpoint.json is missing" in torn(tmp_path / "checkpoint-3")
    assert last_whole(tmp_path) is None


def test_a_folder_is_replaced_at_every_moment_of_a_kill(tmp_path):
    """Each state that a kill can leave is mended to the old folder or the new one."""
    for stop in ("os.rename", "os.rename 2", "shutil", None):
        run = tmp_path / str(stop)
        (run / "policy").mkdir(parents=True)
        (run / "policy" / "weights").write_text("old")
        (run / "policy.tmp").mkdir()
        (run / "policy.tmp" / "weights").write_text("new")
        if stop is None:
            replace_folder(run / "policy.tmp", run / "policy")
        else:
            if stop != "os.rename":
                os.rename(run / "policy", run / "policy.old")
            if stop == "shutil":
                os.rename(run / "policy.tmp", run / "policy")
        tidy(run)
        assert [path.name for path in run.iterdir()] == ["policy"]
        assert (run / "policy" / "weights").read_text() == ("new" if stop in ("shutil", None) else "old")


def test_only_the_projects_own_leftovers_are_tidied(tmp_path):
    for name in ("run.json.tmp", "notes.tmp"):
        (tmp_path / name).write_text("")
    tidy(tmp_path, ("run.json",))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.tmp"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "run.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_words_of_a_full_disk():
    full = os.strerror(errno.ENOSPC)
    with pytest.raises(OSError, match=full) as wrong, open("/dev/full", "w") as file:
        file.write("x")
        file.flush()
    assert disk_trouble(wrong.value) == full
    with pytest.raises(RuntimeError) as wrong:
        torch.save({"weight": torch.zeros(100_000)}, "/dev/full")
    assert "PyTorch could not finish" in disk_trouble(wrong.value)
    assert disk_trouble(SafetensorError("I/O error: No space left on device (os error 28)")) == full
    assert disk_trouble(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert disk_trouble(FileNotFoundError(errno.ENOENT, "gone")) is None


def test_one_process_writes_a_run(tmp_path):
    program = f"from pathlib import Path; from resdpo_trl.run.files import *; p = Path({str(tmp_path)!r})\n"
    holder = subprocess.Popen(
        [sys.executable, "-c", program + "print(lock(p), flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "True\n"
    assert is_locked(tmp_path)
    assert not lock(tmp_path)
    holder.kill()
    holder.wait()
    assert not is_locked(tmp_path)
    assert lock(tmp_path)
    assert lock(tmp_path)


def test_the_lines_of_a_file_and_the_first_bad_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"b": "\xc3\xa9"}\n')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"b": "é"})]
    for line, reason in (
        (b'{"a": ', "not JSON (Expecting value)"), (b"[1]", "not a JSON object"), (b"\xff", "not UTF-8"),
        (b"null", "not a JSON object"),
    ):  # fmt: skip
        path.write_bytes(b'{"a": 1}\n' + line + b'\n{"b": 2}\n')
        with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: {re.escape(reason)}; fix or delete the line"):
            list(read_jsonl(path))
        torn_lines = []
        assert [row for _, row in read_jsonl(path, torn_lines)] == [{"a": 1}, {"b": 2}] and len(torn_lines) == 1
    packed = gzip.compress(b'{"a": 1}\n' * 500)
    (tmp_path / "rows.jsonl.gz").write_bytes(packed)
    assert len(list(read_jsonl(tmp_path / "rows.jsonl.gz"))) == 500
    (tmp_path / "rows.jsonl.gz").write_bytes(packed[:-12])
    with pytest.raises(UserError, match="the gzip stream is damaged"):
        list(read_jsonl(tmp_path / "rows.jsonl.gz"))

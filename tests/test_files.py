"""Files that appear whole or not at all."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from resdpo_trl.files import (
    disk_trouble,
    is_locked,
    last_whole,
    lock,
    replace_folder,
    tidy,
    torn,
    write_manifest,
    write_whole,
)


def checkpoint(folder, step, manifest=True):
    """A checkpoint like transformers', and this project's with its manifest."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.arange(10.0)}, path / "model.safetensors")
    torch.save({"state": torch.arange(10.0)}, path / "optimizer.pt")
    torch.save({"last": 1}, path / "scheduler.pt")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if manifest:
        write_manifest(path, owed={})
    return path


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_without_one_of_its_files_or_a_part_of_it_is_torn(tmp_path, name, manifest):
    checkpoint(tmp_path, 2, manifest)
    path = checkpoint(tmp_path, 10, manifest)
    assert torn(path) is None
    assert last_whole(tmp_path) == path
    size = (path / name).stat().st_size
    for left in (size - 1, size // 2, 4, 0):
        os.truncate(path / name, left)
        assert torn(path) is not None, left
    assert last_whole(tmp_path).name == "checkpoint-2"
    (path / name).unlink()
    assert torn(path) is not None


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert "trainer_state.json" in torn(tmp_path / "checkpoint-3")
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
    assert "PyTorch could not write" in disk_trouble(wrong.value)
    assert disk_trouble(SafetensorError("I/O error: No space left on device (os error 28)")) == full
    assert disk_trouble(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert disk_trouble(FileNotFoundError(errno.ENOENT, "gone")) is None


def test_one_process_writes_a_run(tmp_path):
    program = f"from pathlib import Path; from resdpo_trl.files import *; p = Path({str(tmp_path)!r})\n"
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

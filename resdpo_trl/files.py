"""Files that appear whole or not at all, whether a checkpoint is whole, and what a full disk says.

Whole means: written under another name in the same folder, on the disk before the rename (`fsync`), then renamed. A
process that is killed at any moment leaves the old content or the new one, never a part.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Container
from pathlib import Path
from typing import Any

from resdpo_trl.errors import UserError

ASIDE, OLD = ".tmp", ".old"  # endings of what is being written, and of what is being replaced
MANIFEST = "checkpoint.json"  # the last file of a checkpoint: the sizes of the others
_claims: dict[tuple[int, int], int] = {}  # (device, inode) of the folders that this process has locked -> descriptor
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(path.name + ASIDE)
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)  # on a full disk its room is needed
        raise


def settle(folder: Path) -> None:
    """Wait until a folder's files, its subfolders and its own entries are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or path.is_dir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new`, a whole folder, to `folder`; what stood there goes only when it is in place."""
    settle(new)
    old = folder.with_name(folder.name + OLD)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def tidy(folder: Path, names: Container[str] | None = None) -> None:
    """Undo what a killed process had begun in a folder: unfinished writes go, a half-replaced folder comes back.

    `names` are the files and folders to look after; all by default.
    """
    for path in list(folder.iterdir()):
        name = path.name.removesuffix(OLD).removesuffix(ASIDE)
        if name == path.name or (names is not None and name not in names):
            continue
        if path.name.endswith(OLD) and not path.with_name(name).exists():
            os.rename(path, path.with_name(name))
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_manifest(checkpoint: Path, **facts: Any) -> None:
    """Write a checkpoint's last file: the size of every other one, and `facts`."""
    sizes = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (checkpoint / MANIFEST).write_text(json.dumps({"files": sizes, **facts}, indent=2) + "\n", encoding="utf-8")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's own facts; {} where another tool wrote it."""
    path = checkpoint / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def torn(checkpoint: Path) -> str | None:
    """What a checkpoint lacks to be trained on from; None where it is whole.

    Ours name the size of each of their files. Others are held against their own form: JSON that parses, safetensors
    as long as their headers say, zip archives (torch.save's) with their last part, an optimizer and a scheduler.
    """
    try:
        manifest = read_manifest(checkpoint)
        for name, size in manifest.get("files", {}).items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} of {size} bytes"
        names = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
            return "trainer_state.json has no step"
        if not any("optim" in name for name in names):
            return "it has no optimizer (--save_only_model leaves it out)"
        if manifest:
            return None
        for name, path in names.items():
            if path.suffix == ".safetensors" and not _has_its_length(path):
                return f"{name} is cut short"
            if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
                return f"{name} is cut short"
        if not any("model" in name for name in names):
            return "it has no weights"
        if "scheduler.pt" not in names:
            return "scheduler.pt is missing"
    except (OSError, ValueError, AttributeError) as error:
        return str(error).splitlines()[0]
    return None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints_of(folder: Path) -> list[Path]:
    """A stage's checkpoints, whole or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def last_whole(folder: Path) -> Path | None:
    """A stage's newest whole checkpoint, or None."""
    return next((path for path in checkpoints_of(folder) if torn(path) is None), None)


def disk_trouble(error: BaseException) -> str | None:
    """The operating system's words where a write failed for want of room or of permission; None for other errors.

    safetensors and PyTorch wrap the system's error: one in words that end in its number, the other in its own.
    """
    if isinstance(error, OSError):
        return os.strerror(error.errno or 0) if error.errno in DISK else None
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number and int(number[1]) in DISK:
        return os.strerror(int(number[1]))
    if isinstance(error, RuntimeError) and re.search(r"PytorchStreamWriter|inline_container|iostream", str(error)):
        return "PyTorch could not write a file to its end"
    return None


def not_written(target: Path, reason: str, safe: str) -> UserError:
    """What to say where the disk does not take `target`: the reason of `disk_trouble`, the mend, and what is safe."""
    return UserError(
        f"{target} can't be written ({reason}): make room or the folder writable, then pass --resume_from_checkpoint; "
        f"{safe}"
    )


def lock(folder: Path) -> bool:
    """Claim a folder for this process until it ends; False where another one has it.

    The kernel lets go of the claim when the process dies, however it dies. A process may claim a folder twice.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return True
    identity = (folder.stat().st_dev, folder.stat().st_ino)
    if identity in _claims:
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:
        os.close(descriptor)  # a file system without locks: nothing is claimed
        return True
    _claims[identity] = descriptor
    return True


def is_locked(folder: Path) -> bool:
    """Whether another process has claimed a folder."""
    try:
        import fcntl
    except ImportError:
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # as above
        return False
    finally:
        os.close(descriptor)
    return False


def _let_go() -> None:
    """In a forked worker, which would hold the claims after this process has died."""
    while _claims:
        os.close(_claims.popitem()[1])


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go)


def _has_its_length(path: Path) -> bool:
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if size == 0 or size > path.stat().st_size - 8:
            return False
        header = json.loads(file.read(size))
    end = max((part["data_offsets"][1] for name, part in header.items() if name != "__metadata__"), default=0)
    return path.stat().st_size == 8 + size + end

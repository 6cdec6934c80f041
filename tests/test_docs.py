"""The documentation keeps its word: its Python runs, its links resolve, its commands parse."""

import re
import runpy
from pathlib import Path

from resdpo_trl.losses import LOSSES

ROOT = Path(__file__).resolve().parents[1]


def test_the_examples_of_extending_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("resdpo_trl.losses.LOSSES", LOSSES)
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == 9
    names: dict = {"__name__": "extending"}
    try:
        for block in blocks:
            lines = text.count("\n", 0, block.start(1))
            exec(compile("\n" * lines + block[1], str(ROOT / "docs" / "extending.md"), "exec"), names)
    finally:
        LOSSES.pop("squared_hinge", None)


def test_the_programs_of_the_python_page_run(tmp_path, monkeypatch, chat_model_folder, capsys):
    """With a tiny model in the place of smollm2, and two folders of images."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for name, colour in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (32, 32), tuple(part + number for part in colour)).save(f"photos/{name}/{number}.png")
    page = ROOT / "docs" / "python.md"
    text = page.read_text(encoding="utf-8").replace('"smollm2"', repr(str(chat_model_folder)))
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == 5
    names: dict = {"__name__": "python_page"}
    for block in blocks:
        lines = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines + block[1], str(page), "exec"), names)
    assert len(names["losses"]) == 2 and names["chosen"].grad.lt(0).all()  # more of the chosen side is less loss
    assert {found["label"] for found in names["classify"]("photos/red/0.png")} == {"red", "blue"}


def check():
    return runpy.run_path(str(ROOT / "docs" / "check.py"))


def test_links_and_commands():
    assert check()["problems"](ROOT) == []


def test_what_is_wrong_is_found(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "Makefile").write_text("here:\n")
    (tmp_path / "other.md").write_text("# A title: with `code`\n\n# A title\n")
    (tmp_path / "README.md").write_text(
        "[a](missing.md) [b](other.md#no-such) [c](other.md#a-title-with-code) [d](#top)\n\n# Top\n"
        "```sh\nmake nothing && make here\npython recipes/nowhere.py\n"
        "accelerate launch --config_file missing.yaml recipes/dpo_hh.py\npython recipes/dpo_hh.py --bta 3\n"
        "accelerate launch recipes/dpo_hh.py --config hh/gpt2.yaml \\\n  --beta 0.3  # a comment\n"
        "accelerate launch recipes/dpo_cifar.py --beta -1\npython recipes/report.py\n"
        "resdpo-trl dop\nresdpo-trl report\n```\n"
        "```\n[e](not-a-link.md) make not-a-command\n```\n"
    )
    found = [problem.partition(": ")[2] for problem in check()["problems"](tmp_path)]
    assert sorted(found) == sorted(
        [
            "link to missing.md: no such file",
            "link to other.md#no-such: no such heading",
            "make nothing: no such target",
            "python recipes/nowhere.py: no such file",
            "accelerate launch: missing.yaml: no such file",
            "dpo_hh.py: unknown flag --bta; did you mean beta?",
            "dpo_cifar.py: --beta -1.0: must be above 0 (typically 0.1 to 0.5)",
            "report.py: the following arguments are required: RUN",
            "resdpo-trl dop: no such command",
            "report.py: the following arguments are required: RUN",
        ]
    )


def test_commands_of_docstrings_and_comments_are_found(tmp_path):
    recipe, preset = tmp_path / "recipe.py", tmp_path / "preset.yaml"
    recipe.write_text(
        '"""What it does.\n\n# a note\naccelerate launch recipes/a.py --x 1 \\\\\n  --y 2\npython recipes/b.py\n"""\n'
    )
    preset.write_text("# Words.\n#\n#   accelerate launch recipes/c.py --z\n#\nfield: accelerate launch nothing\n")
    commands = check()["commands"]
    assert [" ".join(words) for words in commands(recipe)] == [
        "accelerate launch recipes/a.py --x 1 --y 2",
        "python recipes/b.py",
    ]
    assert [" ".join(words) for words in commands(preset)] == ["accelerate launch recipes/c.py --z"]


def test_figures_of_a_page_are_held_against_a_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    runner = runpy.run_path(str(ROOT / "docs" / "run_commands.py"))
    small, differences, run = runner["small"], runner["differences"], runner["Run"]
    printed = "a run\n  accuracy, test  0.777   95% interval 0.722 to 0.824, n = 256\n  margin  1.2\n"
    whole = run("README.md", ["python"], True, 0, printed, "")
    assert differences(printed, whole) == []
    assert differences(printed.replace("0.777", "0.75"), whole) == []
    assert differences(printed.replace("0.777", "0.70"), whole) == [
        "accuracy, test is 0.7 (0.722 to 0.824); the run: 0.777 (0.722 to 0.824)"
    ]
    assert differences(printed.replace("margin", "gap"), whole) == ["the run does not print 'gap'"]
    assert differences(printed.replace("0.777", "0.70"), whole._replace(whole=False)) == []

    assert small(["make", "test"]) is None and small(["python", "recipes/publish.py", "runs/a"]) is None
    command, is_whole = small(["accelerate", "launch", "recipes/dpo_cifar.py", "--compare_cross_entropy"])
    assert command == ["python", "recipes/dpo_cifar.py", "--compare_cross_entropy"] and is_whole
    command, is_whole = small(["accelerate", "launch", "recipes/dpo_hh.py", "--config", "hh/gpt2.yaml"])
    assert command[-2:] == ["--dataset_name", "pairs.jsonl"] and not is_whole


def test_idioms_are_found_and_code_is_not_read():
    words = runpy.run_path(str(ROOT / "docs" / "words.py"))
    text = (
        "One checkpoint a step,\n8.0 for 9.1 s; mended.\n```sh\nmend 3 for 4\n```\n`mend` for two reasons: 5 are left\n"
    )
    found = [(line, said.partition(":")[0]) for line, said in words["ours"](words["CODE"].sub(words["blank"], text))]
    assert sorted(found) == [(1, "'One checkpoint a step'"), (2, "'8.0 for 9.1'"), (2, "'mended'")]

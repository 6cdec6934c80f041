"""The notebook runs from top to bottom in a Jupyter kernel, as a user's does."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def test_the_notebook_runs(tmp_path, monkeypatch, chat_model_folder):
    """With a tiny model and few pairs, and without the cell that installs the package."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", 4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # outputs are not committed
    tagged = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    assert set(tagged) == {"install", "parameters"}
    notebook.cells.remove(tagged["install"])
    tagged["parameters"].source += f"\nMODEL, PAIRS = {str(chat_model_folder)!r}, 16"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()

    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    printed = {name: "".join(each.get("text", "") for each in each_outputs) for name, each_outputs in outputs.items()}
    assert "chosen:" in printed["data"] and "error" not in printed["train"]
    assert "policy" in printed["chat"]
    page = (tmp_path / "runs" / "quickstart" / "report.html").read_text(encoding="utf-8")
    assert "16" in page
    (shown,) = outputs["report"]
    assert "<iframe srcdoc=" in shown.data["text/html"] and len(shown.data["text/html"]) > len(page)

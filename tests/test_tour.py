"""The notebook docs/tour.ipynb runs, in a copy of the project."""

from pathlib import Path

import pytest

from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
SMALLER = {"--minutes=0.25": "--max_steps=3 --n_layer=1 --n_embd=16 --eval_tokens=200 --compile=False"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the project's code, where the notebook may write."""
    for path in [*ROOT.glob("*.py"), ROOT / "glyphgpt", ROOT / "config"]:
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs").mkdir()
    return tmp_path


def test_the_tour_runs_without_errors(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(project))
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    committed = sum(len(str(cell.get("outputs", ""))) for cell in notebook.cells)
    assert 1000 < committed < 20_000, "the notebook is committed with its outputs, and they are small"
    for cell in notebook.cells:
        for flag, smaller in SMALLER.items():
            cell.source = cell.source.replace(flag, smaller)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(project / "docs")}}).execute()
    outputs = [str(output.get("text", "")) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("all 3 steps done" in text for text in outputs)
    assert any("open it in any browser" in text for text in outputs)
    assert not any("Traceback" in text for text in outputs)

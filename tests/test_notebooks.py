"""Every notebook runs from top to bottom, offline and without a warning, and is kept stripped."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

# A kernel is a process of its own, where the socket guard of conftest.py does not reach.
STAY_OFFLINE = """
import sys

def _stay_offline(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if str(host) not in ("localhost", "127.0.0.1", "::1"):
        raise RuntimeError(f"a notebook tried to reach {host!r}; notebooks run offline")

sys.addaudithook(_stay_offline)
"""


def executed(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells of a notebook with the outputs of a fresh kernel of this interpreter.

    Raises:
        CellExecutionError: A cell raised an error.
    """
    run = notebook.copy()
    run.cells = [new_code_cell(STAY_OFFLINE), *notebook.cells]
    # Without folders to look in, the manager falls back on the interpreter that runs this test.
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    assert kernel.kernel_spec.argv[0] == sys.executable
    # Jupyter starts a kernel in the folder of its notebook.
    place = {"metadata": {"path": str(FOLDER)}}
    # Long enough for a cell that trains on a busy machine; only one that hangs takes an hour.
    NotebookClient(run, km=kernel, timeout=3600, resources=place).execute(cleanup_kc=True)
    return [cell for cell in run.cells[1:] if cell.cell_type == "code"]


def complaints(cells: list[NotebookNode]) -> list[str]:
    """What a reader should not see in outputs: anything on stderr, and paths of this machine."""
    machine = {str(FOLDER.parent), str(Path.home()), sys.prefix} - {"/"}
    found = []
    for cell in cells:
        for output in cell.outputs:
            shown = output.get("text", "") or str(output.get("data", ""))
            if output.get("name") == "stderr" or any(path in shown for path in machine):
                found.append(f"{cell.id}: {shown}")
    return found


def untidy(notebook: NotebookNode) -> list[str]:
    """What does not belong into a committed notebook: outputs, counts, cells without a name."""
    found = [] if notebook.nbformat_minor >= 5 else ["older than format 4.5, which has cell ids"]
    for number, cell in enumerate(notebook.cells):
        if not cell.get("id"):
            found.append(f"cell {number} has no id")
        if cell.get("outputs") or cell.get("execution_count") is not None:
            found.append(f"cell {number} is not stripped")
        if cell.metadata:
            found.append(f"cell {number} has metadata {dict(cell.metadata)}")
    return found


@pytest.fixture(autouse=True)
def kernel_environment(monkeypatch, tmp_path) -> None:
    """No settings of the person who runs the tests, and no hint that tqdm could draw widgets."""
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs_and_with_cell_ids(path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert untidy(notebook) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_no_warning(path) -> None:
    cells = executed(nbformat.read(path, as_version=4))
    assert complaints(cells) == []
    assert any(cell.outputs for cell in cells)


# The checks see what they look for


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        (new_code_cell("1", outputs=[new_output("stream", text="1")]), "not stripped"),
        (new_code_cell("1", execution_count=1), "not stripped"),
        (new_markdown_cell("a", metadata={"editable": False}), "has metadata"),
        (NotebookNode(cell_type="markdown", metadata={}, source="a"), "has no id"),
    ],
)
def test_an_untidy_cell_is_found(cell, problem) -> None:
    notebook = new_notebook(cells=[new_code_cell("1"), new_markdown_cell("a")])
    assert untidy(notebook) == []
    notebook.cells.append(cell)
    [found] = untidy(notebook)
    assert problem in found


def test_a_notebook_that_fails_warns_or_reaches_out_is_found() -> None:
    notebook = new_notebook(
        cells=[
            new_code_cell("print('fine')", id="fine"),
            new_code_cell("import warnings; warnings.warn('old')", id="warns"),
            new_code_cell("import sys; print(sys.prefix)", id="path"),
        ]
    )
    assert [found.partition(":")[0] for found in complaints(executed(notebook))] == [
        "warns",
        "path",
    ]
    reaching = "import socket; socket.create_connection(('192.0.2.1', 9))"
    notebook.cells.append(new_code_cell(reaching))
    with pytest.raises(CellExecutionError, match=r"reach '192\.0\.2\.1'"):
        executed(notebook)

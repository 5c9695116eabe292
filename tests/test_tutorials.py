"""Every tutorial runs from top to bottom, and shows the outputs of the code it shows.

They run shortened (``GRADEST_SMOKE=1``), which says that they work but not what they find; the
committed outputs are those of a run at full length, by ``python tutorials/execute.py``.
"""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from tests.conftest import ROOT, require_host

TUTORIALS = ROOT / "tutorials"
MOST_BYTES = 2_000_000

every_tutorial = pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem) for path in sorted(TUTORIALS.glob("*.ipynb"))]
)


@pytest.fixture(scope="module")
def code_digest() -> Callable[[nbformat.NotebookNode], str]:
    return runpy.run_path(str(TUTORIALS / "execute.py"))["code_digest"]


def _assert_clean(notebook: nbformat.NotebookNode) -> None:
    """Every code cell was run, in order, and none raised, warned or logged."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"] == []
    assert any("image/png" in o.get("data", {}) for o in outputs), "a tutorial ends in a plot"


@every_tutorial
def test_committed_outputs_belong_to_the_code(path: Path, code_digest: Callable) -> None:
    notebook = nbformat.read(path, as_version=4)
    _assert_clean(notebook)
    assert notebook.metadata.get("outputs_of") == code_digest(notebook), (
        f"{path.name} was edited after it was run: `python tutorials/execute.py`"
    )
    assert path.stat().st_size < MOST_BYTES


@every_tutorial
def test_runs_shortened(path: Path, tmp_path: Path) -> None:
    require_host("pyro")
    require_host("numpyro")
    # Shortened, most of the time goes into compiling; what is compiled runs for a moment only.
    environment = os.environ | {"GRADEST_SMOKE": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, str(TUTORIALS / "execute.py"), str(path)]
    command += ["--output-folder", str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    _assert_clean(nbformat.read(tmp_path / path.name, as_version=4))


def test_shortened_runs_do_not_replace_full_ones() -> None:
    run = subprocess.run(
        [sys.executable, str(TUTORIALS / "execute.py")],
        env=os.environ | {"GRADEST_SMOKE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "--output-folder" in run.stderr

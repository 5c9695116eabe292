"""The quickstart and the signal-to-noise command run from end to end, shortened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PACKAGES, ROOT, require_host

FIGURES = {"training", "gradient_snr", "reconstructions", "samples", "overview"}


@pytest.mark.parametrize("host", PACKAGES)
def test_quickstart(host: str, tmp_path: Path) -> None:
    require_host(host)
    run = subprocess.run(
        [sys.executable, "tutorials/quickstart.py", "--host", host, "--output", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"GRADEST_SMOKE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "nats per image" in run.stderr  # the progress bar
    assert "held-out bound" in run.stdout
    assert {path.stem for path in (tmp_path / host).glob("*.png")} == FIGURES
    assert "Warning" not in run.stderr

"""The README's examples run as they stand, and are as short as it says."""

import re

import pytest

from tests.conftest import ROOT, require_host

_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.usefixtures("user_defaults")
@pytest.mark.parametrize("host", ["numpyro", "pyro"])
def test_example(host: str) -> None:
    require_host(host)
    (example,) = [block for block in _BLOCKS if f"import {host}\n" in block]
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    names: dict = {}
    exec(example, names)
    # Data near 3 came from z = 1, data near 0 from z = 0; the exact posteriors leave no doubt.
    assert (names["posterior"].samples["z"].mean(0) > 0.5).tolist() == [False] * 3 + [True] * 3

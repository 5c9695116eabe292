"""The README's examples run as they stand, and are as short as it says."""

import math
import re

import pytest

from tests.conftest import ROOT, require_host

_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def _blocks(text: str) -> list[str]:
    return [block for block in _BLOCKS if text in block]


@pytest.mark.usefixtures("user_defaults")
@pytest.mark.parametrize("host", ["numpyro", "pyro"])
def test_example(host: str) -> None:
    require_host(host)
    (example,) = _blocks(f"import {host}\n")
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    names: dict = {}
    exec(example, names)
    # Data near 3 came from z = 1, data near 0 from z = 0; the exact posteriors leave no doubt.
    assert (names["posterior"].samples["z"].mean(0) > 0.5).tolist() == [False] * 3 + [True] * 3


@pytest.mark.usefixtures("user_defaults")
@pytest.mark.parametrize("host", ["numpyro", "pyro"])
def test_implicit_example(host: str) -> None:
    """In fifteen lines; it goes on where the first example ended."""
    require_host(host)
    (example,) = _blocks(f"from {host}_gradest import Implicit,")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    names = _after_the_first(host)
    exec(example, names)
    # The evidence is 1: what is left is the entropy's error and the approximation.
    losses = names["implicit_result"].losses if host == "numpyro" else names["implicit_losses"]
    assert abs(sum(float(loss) for loss in losses[-100:]) / 100) < 0.3


@pytest.mark.usefixtures("user_defaults")
@pytest.mark.filterwarnings("ignore:.*does not support models with discrete")
@pytest.mark.parametrize("host", ["numpyro", "pyro"])
def test_solver_example(host: str) -> None:
    """It goes on where the first example ended."""
    require_host(host)
    (example,) = _blocks(f"from {host}_gradest.estimators import numpy_solver")
    names = _after_the_first(host)
    exec(example, names)
    if host == "numpyro":
        share = names["draws"]["z"].mean(0)
    else:
        share = sum(names["window_guide"](None) for _ in range(300)) / 300
    assert (share > 0.5).tolist() == [False, False, False, True, True, False]


@pytest.mark.usefixtures("user_defaults")
@pytest.mark.parametrize("host", ["numpyro", "pyro"])
def test_site_estimators_example(host: str) -> None:
    """It goes on where the first example ended."""
    require_host(host)
    (example,) = _blocks(f"from {host}_gradest import IWAE, configure_estimators")
    names = _after_the_first(host)
    exec(example, names)
    losses = names["mixed_result"].losses if host == "numpyro" else names["mixed_losses"]
    # The evidence of the one observation, summed over the bit.
    evidence = 0.7 * _normal(2.0) + 0.3 * _normal(1.0)
    assert abs(sum(float(loss) for loss in losses[-100:]) / 100 + math.log(evidence)) < 0.1


def _normal(distance: float) -> float:
    """The density at some distance from the mean, for a variance of two."""
    return math.exp(-(distance**2) / 4) / math.sqrt(4 * math.pi)


def _after_the_first(host: str) -> dict:
    """The names that the imports of the first example bring."""
    (first,) = _blocks(f"import {host}\n")
    names: dict = {}
    imports = [line for line in first.splitlines() if line.startswith(("import", "from"))]
    exec("\n".join(imports), names)
    if host == "pyro":
        names["pyro"].set_rng_seed(0)
    return names

"""The README's claims about the hosts' losses, and about ours, as ``hosts_today.py`` shows them."""

import runpy

import pytest

from tests.conftest import ROOT, require_host


@pytest.fixture(scope="module")
def comparisons() -> dict:
    require_host("pyro")
    require_host("numpyro")
    compare = runpy.run_path(str(ROOT / "tutorials" / "hosts_today.py"))["compare"]
    return dict(enumerate(compare(num_draws=20_000).values()))


def _distance(figure: tuple[float, float], exact: float) -> float:
    """Distance from the exact figure in standard errors."""
    mean, error = figure
    return abs(mean - exact) / max(error, 1e-9)


@pytest.mark.parametrize("title", [0, 2], ids=["discrete-gradient", "mini-batch-bound"])
def test_ours_agree_with_the_exact_figure_and_the_hosts_do_not(comparisons, title):
    for row in comparisons[title]:
        host_error = abs(row.renyi[0] - row.exact)
        assert row.gradest[1] < host_error / 5, "uninformative: could not see the host's mistake"
        assert _distance(row.gradest, row.exact) < 4.5, row
        assert _distance(row.renyi, row.exact) > 4.5, f"fixed upstream? update the README: {row}"


def test_only_the_hosts_exceed_the_evidence(comparisons):
    for row in comparisons[1]:
        mean, error = row.gradest
        assert mean < row.exact + 4.5 * error, row
        mean, error = row.renyi
        assert mean > row.exact + 4.5 * error, f"fixed upstream? update the README: {row}"

"""The published table of biases and variances is what both packages compute today."""

from tests.benchmarks.bias_and_variance import TOLERANCE, document, largest_difference, table
from tests.conftest import ROOT, require_host


def test_the_page_is_what_is_computed():
    hosts = ("pyro", "numpyro")
    for host in hosts:
        require_host(host)
    tables = [table(host) for host in hosts]
    assert largest_difference(tables) < TOLERANCE
    assert document(tables[0]) == (ROOT / "docs" / "bias_and_variance.md").read_text()

"""Docstrings are the manual: each public name has the sections a user chooses an estimator by."""

import importlib
import inspect
import re
from collections.abc import Callable

import pytest

from tests.conftest import PACKAGES, require_host, source_modules

SECTIONS = [
    "Args",
    "Returns",
    "Raises",
    "Bias and variance",
    "Cost",
    "Example",
    "References",
]

# The bias line makes one of four claims, and the enumeration tests hold it to that.
CLAIMS = [
    "unbiased",
    "asymptotically unbiased in K",
    "self-normalised, O(1/K)",
    "biased by design",
]


def _public_objects(host: str) -> dict[str, Callable]:
    """Public functions and classes of our package for ``host``, once each, by where they stand."""
    require_host(host)
    found: dict[str, Callable] = {}
    for module_name in source_modules(PACKAGES[host]):
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


def _sections(docstring: str) -> dict[str, str]:
    """The Google sections of a docstring, in order, each with its text."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", docstring, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _expected(value: Callable) -> set[str]:
    """The sections that fit an object; what takes log-weights or particle numbers checks them."""
    if inspect.isclass(value) and issubclass(value, tuple):
        return set()  # a record describes its fields in its text
    expected = {"Args"} if inspect.signature(value).parameters else set()
    if hasattr(value, "log_prob"):
        expected |= {"Example", "References"}  # a distribution estimates nothing
    elif not inspect.isabstract(value):
        expected |= {"Bias and variance", "Cost", "Example", "References"}
    if inspect.isfunction(value):
        expected.add("Returns")
    if {"log_weights", "num_particles"} & inspect.signature(value).parameters.keys():
        expected.add("Raises")
    return expected


@pytest.mark.parametrize("host", PACKAGES)
def test_public_names_have_their_sections_in_order(host: str) -> None:
    faults = []
    for name, value in _public_objects(host).items():
        sections = list(_sections(inspect.getdoc(value) or ""))
        if missing := _expected(value) - set(sections):
            faults.append(f"{name} lacks {sorted(missing)}")
        if sections != sorted(sections, key=SECTIONS.index):
            faults.append(f"{name} has its sections in the order {sections}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("host", PACKAGES)
def test_every_parameter_is_documented(host: str) -> None:
    entry = re.compile(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \(.*\))?:", re.MULTILINE)
    faults = []
    for name, value in _public_objects(host).items():
        arguments = _sections(inspect.getdoc(value) or "").get("Args", "")
        documented = re.findall(r"\w+", " ".join(entry.findall(arguments)))
        parameters = list(inspect.signature(value).parameters)
        if arguments and documented != parameters:
            faults.append(f"{name} takes {parameters} but documents {documented}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("host", PACKAGES)
def test_bias_line_makes_one_of_four_claims(host: str) -> None:
    faults = []
    for name, value in _public_objects(host).items():
        bias = " ".join(_sections(inspect.getdoc(value) or "").get("Bias and variance", "").split())
        if bias and not any(claim.lower() in bias.lower() for claim in CLAIMS):
            faults.append(f"{name}: {bias}")
    assert not faults, "\n".join(faults)

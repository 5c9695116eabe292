"""The twins are one library: the same tree, names, signatures, defaults and summaries.

What differs is collected as (name below the package, difference) and must be listed, with its
reason, in ``known_gaps.py``.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.conformance.known_gaps import KNOWN_GAPS
from tests.conftest import PACKAGES, require_host, source_modules

TWINS = tuple(PACKAGES.values())
Difference = tuple[str, str]


def _below(package: str, name: str) -> str:
    return name.removeprefix(package).removeprefix(".")


def _only_in(name: str, what: str, left: dict, right: dict) -> Iterator[Difference]:
    one_sided = (left.keys() - right.keys(), right.keys() - left.keys())
    for package, extra in zip(TWINS, one_sided, strict=True):
        yield from ((name, f"{what} {entry} only in {package}") for entry in sorted(extra))


def _text(value: Any) -> str:
    """A default, an annotation or a summary as text that does not name the host or its arrays."""
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    text = re.sub(r"[\w.]*\b(Tensor|Array)\b", "Array", text)
    return re.sub(r"\b(num)?pyro(?=\b|_gradest\b)", "host", text, flags=re.IGNORECASE)


def _summary(value: Any) -> str:
    return _text((inspect.getdoc(value) or "").split("\n\n")[0])


def _signature_differences(name: str, left: Any, right: Any) -> Iterator[Difference]:
    one, two = inspect.signature(left), inspect.signature(right)
    yield from _only_in(name, "parameter", dict(one.parameters), dict(two.parameters))
    shared = [parameter for parameter in one.parameters if parameter in two.parameters]
    if shared != [parameter for parameter in two.parameters if parameter in one.parameters]:
        yield name, "order of the parameters"
    for parameter in shared:
        for aspect in ("kind", "default", "annotation"):
            values = (getattr(side.parameters[parameter], aspect) for side in (one, two))
            if len({_text(value) for value in values}) > 1:
                yield name, f"{aspect} of {parameter}"
    if _text(one.return_annotation) != _text(two.return_annotation):
        yield name, "annotation of the result"


def _object_differences(name: str, left: Any, right: Any) -> Iterator[Difference]:
    are_classes = inspect.isclass(left) and inspect.isclass(right)  # of metaclasses of the hosts
    if type(left) is not type(right) and not are_classes:
        yield name, "type"
    elif callable(left) or isinstance(left, ModuleType) or inspect.isdatadescriptor(left):
        if _summary(left) != _summary(right):
            yield name, "docstring summary"
    elif left != right:
        yield name, "value"
    if callable(left) and callable(right):
        yield from _signature_differences(name, left, right)
    if inspect.isclass(left) and inspect.isclass(right):
        one, two = _members(left), _members(right)
        yield from _only_in(name, "member", one, two)
        for member in one.keys() & two.keys():
            yield from _object_differences(f"{name}.{member}", one[member], two[member])


def _members(owner: type) -> dict[str, Any]:
    """What a class adds to the host's: what it overrides is the host's contract, not ours."""
    bases = [base for base in owner.__mro__ if base.__module__.split(".")[0] not in TWINS]
    hosts = {name for base in bases for name in vars(base)}
    return {
        name: value
        for name, value in vars(owner).items()
        if not name.startswith("_") and name not in hosts
    }


def _public_objects(package: str) -> dict[str, Any]:
    """Modules, the names they export, and our own bases of exported classes, by where they stand.

    Named below the package, so that the twins have the same keys.
    """
    found: dict[str, Any] = {}
    for module_name in source_modules(package):
        module = importlib.import_module(module_name)
        found[_below(package, module_name)] = module
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            for one in value.__mro__ if inspect.isclass(value) else (value,):
                home = getattr(one, "__module__", module_name)
                if home.split(".")[0] == package:
                    label = getattr(one, "__qualname__", name)
                    found[_below(package, f"{home}.{label}")] = one
    return found


def _differences() -> Iterator[Difference]:
    left, right = (_public_objects(package) for package in TWINS)
    yield from _only_in("", "public", left, right)
    for name in left.keys() & right.keys():
        yield from _object_differences(name, left[name], right[name])
        exports = [dict.fromkeys(getattr(side[name], "__all__", ())) for side in (left, right)]
        yield from _only_in(name, "export", *exports)
    if (one := left[""].__version__) != (two := right[""].__version__):
        yield "", f"version {one} and {two}"


@pytest.fixture(scope="module")
def differences() -> set[Difference]:
    for host in PACKAGES:
        require_host(host)
    return set(_differences())


def test_twins_differ_only_where_listed(differences: set[Difference]) -> None:
    listed = {(gap.name, gap.difference) for gap in KNOWN_GAPS}
    unlisted = sorted(differences - listed)
    assert not unlisted, "mend the twin, or give the reason in known_gaps.py:\n" + "\n".join(
        f"  {name}: {difference}" for name, difference in unlisted
    )


def test_every_listed_gap_is_still_open(differences: set[Difference]) -> None:
    closed = [gap for gap in KNOWN_GAPS if (gap.name, gap.difference) not in differences]
    assert not closed, f"these gaps have closed, delete their rows: {closed}"


def test_every_listed_gap_has_one_row_and_a_reason() -> None:
    rows = [(gap.name, gap.difference) for gap in KNOWN_GAPS]
    assert len(rows) == len(set(rows))
    assert all(gap.reason.strip() for gap in KNOWN_GAPS)

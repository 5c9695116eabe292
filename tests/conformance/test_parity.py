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
    """A default or an annotation as text, with each host's array type called Array."""
    text = inspect.formatannotation(value) if not isinstance(value, str) else repr(value)
    return re.sub(r"[\w.]*\b(Tensor|Array)\b", "Array", text)


def _public_members(owner: type) -> dict[str, Any]:
    """Public attributes that our own classes, not the host's, give to ``owner``."""
    ours = [base for base in reversed(owner.__mro__) if base.__module__.split(".")[0] in TWINS]
    return {
        name: value
        for base in ours
        for name, value in vars(base).items()
        if not name.startswith("_")
    }


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
    if inspect.isclass(left) != inspect.isclass(right) or callable(left) != callable(right):
        yield name, "kind of object"
        return
    if callable(left) or isinstance(left, ModuleType):
        summaries = {(inspect.getdoc(side) or "").split("\n\n")[0] for side in (left, right)}
        if len(summaries) > 1:
            yield name, "docstring summary"
    elif left != right and not isinstance(left, property):
        yield name, "value"
    if callable(left):
        yield from _signature_differences(name, left, right)
    if inspect.isclass(left):
        one, two = _public_members(left), _public_members(right)
        yield from _only_in(name, "member", one, two)
        for member in one.keys() & two.keys():
            yield from _object_differences(f"{name}.{member}", one[member], two[member])


def _module_differences(module: str) -> Iterator[Difference]:
    """Differences of one module that both packages have, and of the names it makes public."""
    left, right = (importlib.import_module(f"{package}.{module}".strip(".")) for package in TWINS)
    yield from _object_differences(module, left, right)
    exports = [dict.fromkeys(getattr(side, "__all__", ())) for side in (left, right)]
    yield from _only_in(module, "name", *exports)
    for name in exports[0].keys() & exports[1].keys():
        one, two = getattr(left, name), getattr(right, name)
        # A name is compared where it is defined, and once.
        home = _below(TWINS[0], getattr(one, "__module__", left.__name__))
        yield from _object_differences(f"{home}.{name}", one, two)


@pytest.fixture(scope="module")
def differences() -> set[Difference]:
    for host in PACKAGES:
        require_host(host)
    trees = [
        dict.fromkeys(_below(package, module) for module in source_modules(package))
        for package in TWINS
    ]
    found = set(_only_in("", "module", *trees))
    for module in trees[0].keys() & trees[1].keys():
        found.update(_module_differences(module))
    return found


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

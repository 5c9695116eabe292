"""Every example in a docstring runs and prints what it says, with the settings a user meets.

Examples are found in the source rather than by ``doctest``'s own search, which does not see the
functions that the run-time type check has wrapped.
"""

import ast
import doctest
import importlib
import sys

import pytest

from tests.conftest import PACKAGES, require_host, source_modules

# A reader who has one host must be able to run the examples of its package.
FOREIGN = {
    "pyro": ("jax", "numpyro", "numpyro_gradest"),
    "numpyro": ("torch", "pyro", "pyro_gradest"),
}

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def _examples() -> list:
    examples = []
    for host, package in PACKAGES.items():
        for module, path in source_modules(package).items():
            for node in ast.walk(ast.parse(path.read_text())):
                docstring = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
                if docstring and ">>>" in docstring:
                    name = f"{module}.{getattr(node, 'name', '')}".removesuffix(".")
                    examples.append(pytest.param(host, module, docstring, id=name))
    return examples


@pytest.mark.usefixtures("user_defaults")
@pytest.mark.parametrize(("host", "module", "docstring"), _examples())
def test_example(
    host: str,
    module: str,
    docstring: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_host(host)
    for foreign in FOREIGN[host]:
        monkeypatch.setitem(sys.modules, foreign, None)  # importing it raises
    names = dict(vars(importlib.import_module(module)))
    example = doctest.DocTestParser().get_doctest(
        docstring, names, request.node.callspec.id, module, 0
    )
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)
    assert runner.tries > 0

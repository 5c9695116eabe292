"""The folder a file lies in says what it may import, and importing changes nothing.

The rules are read from the source, so a forbidden import fails on a branch that no test reaches.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from textwrap import dedent

import pytest

from tests.conftest import PACKAGES, ROOT, require_host, source_modules

# Layers from the bottom up; a module imports from its own layer or from below.
LAYERS = {"estimators": 1, "infer": 2, "distributions": 2, "handlers": 3, "diagnostics": 3}
TOP = 4  # the package's own __init__.py

ARRAYS = {"pyro": {"torch"}, "numpyro": {"jax"}}
EVERYWHERE = {"numpy", "scipy", "jaxtyping", *sys.stdlib_module_names}
# What comes with both hosts, and what is imported where something is drawn or tabulated.
IN_DIAGNOSTICS = {"tqdm", "matplotlib", "pandas", "arviz"}

# The modules of infer/ that may run a program under a trace and read the trace's sites.
SEAM = (
    "_particles",
    "_trace",
    "_plates",
    "_sites",
    "_site_estimators",
    "_discrete_sites",
    "_antithetic",
    "_dreams",
    "_implicit",
    "_semi_implicit",
    "_model_score",
    "_enumerated",
    "_credit",
)
TRACING = {"get_trace", "get_importance_trace", "log_density", "trace"}
TRACE_ATTRIBUTES = {
    "compute_log_prob",
    "compute_score_parts",
    "cond_indep_stack",
    "iter_stochastic_nodes",
    "log_prob_sum",
    "nodes",
    "observation_nodes",
    "stochastic_nodes",
}
SITE_KEYS = {
    "cond_indep_stack",
    "fn",
    "infer",
    "is_observed",
    "log_prob",
    "log_prob_sum",
    "mask",
    "scale",
    "score_parts",
    "unscaled_log_prob",
}

MODULES = {
    module: (host, path)
    for host, package in PACKAGES.items()
    for module, path in source_modules(package).items()
}
every_module = pytest.mark.parametrize("module", MODULES)


def _layer(module: str) -> int:
    folders = module.split(".")[1:]
    if not folders:
        return TOP
    assert folders[0] in LAYERS, f"{module}: give the folder {folders[0]}/ a layer in this test"
    return LAYERS[folders[0]]


def _imports(module: str) -> Iterator[str]:
    """Absolute names of the modules that ``module`` imports, at any depth of its code."""
    _, path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
            # ``from package import folder`` imports the folder, not what stands above it.
            yield from (name if name in MODULES else source for name in names)


@every_module
def test_imports_point_only_downwards(module: str) -> None:
    host, _ = MODULES[module]
    package, layer = PACKAGES[host], _layer(module)
    allowed = EVERYWHERE | ARRAYS[host] | ({host} if layer > LAYERS["estimators"] else set())
    if layer == LAYERS["diagnostics"]:
        allowed |= IN_DIAGNOSTICS
    for imported in _imports(module):
        root = imported.split(".")[0]
        if root == package:
            assert _layer(imported) <= layer, f"{module} imports {imported} from a layer above it"
        else:
            assert root in allowed, f"{module} imports {imported}, which its layer may not"


def _trace_reads(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(names=aliases):
                yield from (alias.name for alias in aliases if alias.name in TRACING)
            case ast.Attribute(attr=name) if name in TRACING | TRACE_ATTRIBUTES:
                yield f"{ast.unparse(node)} (line {node.lineno})"
            case ast.Subscript(slice=ast.Constant(value=str(key))) if key in SITE_KEYS:
                yield f"{ast.unparse(node)} (line {node.lineno})"
            case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=str(key)), *_]):
                if key in SITE_KEYS:
                    yield f"{ast.unparse(node)} (line {node.lineno})"


@every_module
def test_only_the_seam_reads_traces(module: str) -> None:
    _, path = MODULES[module]
    reads = sorted(set(_trace_reads(ast.parse(path.read_text()))))
    if module.endswith(tuple(f".infer.{name}" for name in SEAM)):
        assert reads, "the rule no longer recognises what it forbids elsewhere"
    else:
        assert not reads, f"only the seam {SEAM} reads traces, but {module} has {reads}"


# Each script reports every global setting of its host. A name that no platform has makes the first
# use of a JAX device fail, so the import also shows that none is chosen.
SETTINGS = {
    "pyro": """
        import random, warnings
        import numpy, pyro, torch
        from torch.distributions import Distribution

        def settings():
            return {
                "dtype": torch.get_default_dtype(),
                "device": torch.get_default_device(),
                "threads": torch.get_num_threads(),
                "grad": torch.is_grad_enabled(),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "cuda": torch.cuda.is_initialized(),
                "torch seed": torch.get_rng_state().tolist(),
                "numpy seed": numpy.random.get_state()[1].tolist(),
                "python seed": random.getstate(),
                "validation": Distribution._validate_args,
                "pyro": pyro.settings.get(),
                "parameters": sorted(pyro.get_param_store()),
                "warnings": warnings.filters,
            }
    """,
    "numpyro": """
        import os, random, warnings
        os.environ["JAX_PLATFORMS"] = "none_may_be_chosen"
        import jax, numpy, numpyro
        from numpyro.distributions import Distribution

        def settings():
            return {
                "jax": jax.config.values,
                "numpy seed": numpy.random.get_state()[1].tolist(),
                "python seed": random.getstate(),
                "validation": Distribution._validate_args,
                "warnings": warnings.filters,
            }
    """,
}


@pytest.mark.parametrize("host", PACKAGES)
def test_import_is_silent(host: str) -> None:
    """No other host, no changed setting, no random draw, no output."""
    require_host(host)
    (other,) = set(PACKAGES) - {host}
    script = f"""
{dedent(SETTINGS[host])}
import copy, json, sys
before = copy.deepcopy(settings())
import {PACKAGES[host]}
after = settings()
print(json.dumps({{
    "changed": [name for name in before if repr(before[name]) != repr(after[name])],
    "others": sorted({sorted(ARRAYS[other] | {other, PACKAGES[other]})!r} & sys.modules.keys()),
}}))
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"changed": [], "others": []}
    assert run.stderr == ""

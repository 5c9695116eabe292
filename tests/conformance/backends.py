"""What a test needs to run on both backends: arrays in and out, gradients, the package.

Test-only and as thin as it can be: the packages themselves share nothing.
"""

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

HOSTS = ("pyro", "numpyro")

# For jax.jit. What a test compiles it runs once, and compiling well takes longer than running.
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}


class PyroBackend:
    """torch tensors, pyro_gradest."""

    host = "pyro"

    def __init__(self) -> None:
        import torch

        self._torch = torch

    @property
    def estimators(self) -> ModuleType:
        return importlib.import_module("pyro_gradest.estimators")

    @property
    def package(self) -> ModuleType:
        return importlib.import_module("pyro_gradest")

    def array(self, value: Any) -> Any:
        return self._torch.as_tensor(np.array(value))

    def numpy(self, value: Any) -> np.ndarray:
        return value.detach().numpy()

    def gradients(self, function: Callable[..., Any], *arguments: np.ndarray) -> list[np.ndarray]:
        """Derivative of the sum of ``function(*arguments)`` in each argument; zeros if constant."""
        leaves = [self.array(argument).requires_grad_() for argument in arguments]
        total = function(*leaves).sum()
        if not total.requires_grad:
            return [np.zeros_like(argument) for argument in arguments]
        gradients = self._torch.autograd.grad(total, leaves, allow_unused=True)
        return [
            np.zeros_like(argument) if gradient is None else self.numpy(gradient)
            for argument, gradient in zip(arguments, gradients, strict=True)
        ]

    def take(self, array: Any, indices: tuple[np.ndarray, ...]) -> Any:
        """``array[indices]`` with NumPy indices."""
        return array[tuple(self.array(index) for index in indices)]

    def concatenate(self, arrays: Sequence[Any]) -> Any:
        return self._torch.cat(list(arrays))

    def detach(self, array: Any) -> Any:
        return array.detach()

    def log_softmax(self, logits: Any) -> Any:
        return self._torch.log_softmax(logits, dim=-1)

    def largest_intermediate(self, function: Callable[..., Any], *arguments: Any) -> int:
        """Elements of the largest tensor that any operation inside ``function`` returns."""
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        torch, sizes = self._torch, [0]

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                sizes.extend(x.numel() for x in tree_leaves(result) if torch.is_tensor(x))
                return result

        with Recorder():
            function(*arguments)
        return max(sizes)

    def operations(self, function: Callable[..., Any], *arguments: Any) -> list[str]:
        """Names of the operations that ``function`` runs, loops of Python unrolled."""
        from torch.utils._python_dispatch import TorchDispatchMode

        names: list[str] = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                names.append(func.__name__)
                return func(*args, **(kwargs or {}))

        with Recorder():
            function(*arguments)
        return names

    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._torch.func.vmap(function)

    def as_a_whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, where the host has operations compiled together: here it has not."""
        return function

    def compiled(self, function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
        """``function``, traced at ``arguments``; of tensors, and returning one."""
        with warnings.catch_warnings():
            # Pyro's jit objectives still trace with it, and drop its warnings about shapes too.
            warnings.filterwarnings("ignore", ".*torch.jit.trace.* is deprecated")
            warnings.simplefilter("ignore", self._torch.jit.TracerWarning)
            return self._torch.jit.trace(function, arguments, check_trace=False)


class NumPyroBackend:
    """JAX arrays, numpyro_gradest."""

    host = "numpyro"

    def __init__(self) -> None:
        import jax

        self._jax = jax

    @property
    def estimators(self) -> ModuleType:
        return importlib.import_module("numpyro_gradest.estimators")

    @property
    def package(self) -> ModuleType:
        return importlib.import_module("numpyro_gradest")

    def array(self, value: Any) -> Any:
        return self._jax.numpy.asarray(value)

    def numpy(self, value: Any) -> np.ndarray:
        return np.asarray(value)

    def gradients(self, function: Callable[..., Any], *arguments: np.ndarray) -> list[np.ndarray]:
        """Derivative of the sum of ``function(*arguments)`` in each argument."""
        gradient = self._jax.grad(
            lambda *leaves: function(*leaves).sum(), argnums=tuple(range(len(arguments)))
        )
        # One compilation instead of one per operation.
        compiled = self._jax.jit(gradient, compiler_options=QUICK_TO_COMPILE)
        return [np.asarray(g) for g in compiled(*map(self.array, arguments))]

    def take(self, array: Any, indices: tuple[np.ndarray, ...]) -> Any:
        """``array[indices]`` with NumPy indices."""
        return array[indices]

    def concatenate(self, arrays: Sequence[Any]) -> Any:
        return self._jax.numpy.concatenate(list(arrays))

    def detach(self, array: Any) -> Any:
        return self._jax.lax.stop_gradient(array)

    def log_softmax(self, logits: Any) -> Any:
        return self._jax.nn.log_softmax(logits, axis=-1)

    def largest_intermediate(self, function: Callable[..., Any], *arguments: Any) -> int:
        """Elements of the largest array that any operation inside ``function`` returns."""
        return _largest_in(self._jax.make_jaxpr(function)(*arguments).jaxpr)

    def operations(self, function: Callable[..., Any], *arguments: Any) -> list[str]:
        """Names of the operations in the program of ``function``; the body of a loop once."""
        return _operations_in(self._jax.make_jaxpr(function)(*arguments).jaxpr)

    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._jax.vmap(function)

    def as_a_whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, compiled at first use; by single operations it takes far longer."""
        return self.compiled(function)

    def compiled(self, function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
        """``function``, compiled at first use."""
        return self._jax.jit(function, compiler_options=QUICK_TO_COMPILE)


def _equations_in(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of the bodies of its nested jits, conds and loops."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            nested: Sequence[Any] = parameter if isinstance(parameter, tuple) else (parameter,)
            for item in nested:
                if hasattr(item, "jaxpr"):
                    yield from _equations_in(item.jaxpr)


def _largest_in(jaxpr: Any) -> int:
    sizes = (variable.aval.size for one in _equations_in(jaxpr) for variable in one.outvars)
    return max(sizes, default=0)


def _operations_in(jaxpr: Any) -> list[str]:
    return [equation.primitive.name for equation in _equations_in(jaxpr)]


Backend = PyroBackend | NumPyroBackend


def backend_for(host: str) -> Backend:
    return {"pyro": PyroBackend, "numpyro": NumPyroBackend}[host]()

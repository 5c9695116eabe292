"""Runs an objective on prescribed particles, in both hosts, and takes its own gradient.

A replayer stands outside of everything the objective does. Wherever the guide would draw a site,
it hands out the next prescribed values; what the objective makes of them, and how it runs its
particles (all at once, one by one, auxiliary draws in a second go), is its own affair.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np

from tests.conformance.backends import QUICK_TO_COMPILE
from tests.conformance.programs import Program
from tests.oracles import enumeration


class Prescription(NamedTuple):
    """What the guide draws, for T evaluations of the objective."""

    values: Mapping[str, np.ndarray]
    """Site -> ``[T, draws, ...]``; noise for a reparameterised site."""
    noise_sites: tuple[str, ...] = ()
    subsamples: Mapping[str, np.ndarray] | None = None
    """Plate -> ``[T, B]`` indices."""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {**self.values, **(self.subsamples or {})}


def every_tuple(program: Program, num_draws: int) -> Prescription:
    """Every tuple of states (and every subsample), in the order of the oracle."""
    problem = program.problem
    tuples = np.array(enumeration.tuples(problem, num_draws))
    values = {
        site: np.concatenate(
            [np.array([state[site] for state in problem.states])[tuples]] * len(problem.subsamples)
        )
        for site in problem.states[0]
    }
    subsamples = None
    if program.subsampled_plate:
        subsamples = {program.subsampled_plate: np.repeat(problem.subsamples, len(tuples), axis=0)}
    return Prescription(values, program.noise_sites, subsamples)


class Evaluations(NamedTuple):
    """The objective at T prescriptions."""

    losses: np.ndarray
    """``[T]``"""
    gradients: np.ndarray
    """Ascent direction: minus the gradient of the loss, ``[T, P]``."""


# --- NumPyro -------------------------------------------------------------------------------------


class NumPyroPrimitives:
    """The primitives that the programs are written in."""

    def __init__(self) -> None:
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        self.Bernoulli, self.Categorical, self.Normal = (
            dist.Bernoulli,
            dist.Categorical,
            dist.Normal,
        )
        self.sample, self.plate, self.factor = numpyro.sample, numpyro.plate, numpyro.factor
        self._handlers = numpyro.handlers
        self._param = numpyro.param
        self.array, self.exp = jnp.asarray, jnp.exp

    def param(self, name: str, value: np.ndarray) -> Any:
        return self._param(name, self.array(value))

    def choose(self, table: Any, index: Any) -> Any:
        return table[index]

    def using(self, handler: tuple[str, Any] | None) -> Any:
        """A scale or a mask as a context, or none."""
        if handler is None:
            return contextlib.nullcontext()
        name, value = handler
        if isinstance(value, np.ndarray):
            value = self.array(value)
        return getattr(self._handlers, name)(**{name: value})


def numpyro_evaluations(
    objective: Callable[..., Any],
    program: Program,
    prescription: Prescription,
    *,
    particles: str = "vmap",
    arguments: tuple = (),
    visits: int = 1,
) -> Evaluations:
    """The loss and its gradient at every prescription, mapped over these and compiled once.

    ``objective`` is called with ``vectorize_particles``, which runs particles with the replayer
    under ``vmap``, or one after the other in a Python loop (``particles="loop"``). Each particle
    draws a site ``visits`` times.
    """
    import jax
    import jax.numpy as jnp
    from numpyro.primitives import Messenger

    class Replayer(Messenger):
        def __init__(self, arrays: dict[str, Any]) -> None:
            super().__init__()
            self.arrays = arrays
            self.used = dict.fromkeys(prescription.values, 0)
            self.particle: dict[str, Iterator[Any]] | None = None

        def vectorize(self, run: Callable[[Any], Any], keys: Any) -> Any:
            """Runs particles, each with the next of the values that the sites have left."""
            num_runs = len(keys)
            num_values = num_runs * visits
            values = {
                site: self.arrays[site][used : used + num_values].reshape(
                    num_runs, visits, *self.arrays[site].shape[1:]
                )
                for site, used in self.used.items()
            }
            self.used = {site: used + num_values for site, used in self.used.items()}

            def run_one(key: Any, particle: dict[str, Any]) -> Any:
                self.particle = {site: cycle(value) for site, value in particle.items()}
                try:
                    return run(key)
                finally:
                    self.particle = None

            if particles == "vmap":
                return jax.vmap(run_one)(keys, values)
            results = [
                run_one(keys[i], {site: value[i] for site, value in values.items()})
                for i in range(num_runs)
            ]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

        def process_message(self, msg: dict[str, Any]) -> None:
            name = msg.get("name")
            if msg["value"] is not None:  # the model's copy of a site, or data
                return
            if msg["type"] == "plate" and name in (prescription.subsamples or {}):
                msg["value"] = self.arrays[name]
            elif msg["type"] == "sample" and name in self.used:
                if self.particle is not None:
                    value = next(self.particle[name])
                else:  # a particle that was not worth vectorising
                    value = self.arrays[name][self.used[name]]
                    self.used[name] += 1
                value = value.reshape(msg["fn"].shape())
                if name in prescription.noise_sites:
                    value = msg["fn"].mean + value * jnp.sqrt(msg["fn"].variance)
                msg["value"] = value

    ppl = NumPyroPrimitives()
    params = {name: jnp.asarray(value) for name, value in program.problem.params.items()}
    data = [jnp.asarray(argument) for argument in arguments]
    key = jax.random.key(0)

    def loss(params: dict[str, Any], arrays: dict[str, Any]) -> Any:
        replayer = Replayer(arrays)
        with replayer:
            return objective(vectorize_particles=replayer.vectorize).loss(
                key, params, partial(program.model, ppl), partial(program.guide, ppl), *data
            )

    arrays = {name: jnp.asarray(array) for name, array in prescription.arrays.items()}
    evaluate = jax.jit(
        jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)), compiler_options=QUICK_TO_COMPILE
    )
    losses, gradients = evaluate(params, arrays)
    flat = [np.asarray(gradients[name]).reshape(len(losses), -1) for name in params]
    return Evaluations(np.asarray(losses), -np.concatenate(flat, axis=1))


# --- Pyro ----------------------------------------------------------------------------------------


class PyroPrimitives:
    """The primitives that the programs are written in."""

    def __init__(self) -> None:
        import pyro
        import pyro.distributions as dist
        import torch

        self.Bernoulli, self.Categorical, self.Normal = (
            dist.Bernoulli,
            dist.Categorical,
            dist.Normal,
        )
        self.sample, self.plate, self.factor = pyro.sample, pyro.plate, pyro.factor
        self._poutine = pyro.poutine
        self._param = pyro.param
        self.array, self.exp = torch.as_tensor, torch.exp

    def param(self, name: str, value: np.ndarray) -> Any:
        return self._param(name, self.array(value.copy()))

    def choose(self, table: Any, index: Any) -> Any:
        return table[index.long()]

    def using(self, handler: tuple[str, Any] | None) -> Any:
        """A scale or a mask as a context, or none."""
        if handler is None:
            return contextlib.nullcontext()
        name, value = handler
        if isinstance(value, np.ndarray):
            value = self.array(value)
        return getattr(self._poutine, name)(**{name: value})


def pyro_evaluations(
    objective: Callable[..., Any],
    program: Program,
    prescription: Prescription,
    *,
    particles: str = "vmap",
    max_plate_nesting: int = 2,
    arguments: tuple = (),
) -> Evaluations:
    """The loss and its gradient at every prescription, one ``loss_and_grads`` each.

    ``particles`` chooses ``vectorize_particles``: ``"vmap"`` on, ``"loop"`` off.
    """
    import pyro
    import torch
    from pyro.poutine.messenger import Messenger

    class Replayer(Messenger):
        def __init__(self, arrays: dict[str, Any]) -> None:
            super().__init__()
            self.arrays = arrays
            self.used = dict.fromkeys(prescription.values, 0)

        def _pyro_sample(self, msg: dict[str, Any]) -> None:
            name = msg["name"]
            if msg["done"] or msg["is_observed"]:  # the model's copy of a site, or data
                return
            if name in (prescription.subsamples or {}):
                msg["value"], msg["done"] = self.arrays[name], True
            elif name in self.used:
                # One visit draws for one particle or, vectorised, for as many as the shape says.
                fn, used = msg["fn"], self.used[name]
                shape = fn.shape()
                num_runs = max(shape.numel() // self.arrays[name][0].numel(), 1)
                value = self.arrays[name][used : used + num_runs].reshape(shape)
                self.used[name] += num_runs
                if name in prescription.noise_sites:
                    value = fn.mean + value * fn.variance.sqrt()
                elif isinstance(getattr(fn, "base_dist", fn), pyro.distributions.Bernoulli):
                    value = value.to(torch.get_default_dtype())
                msg["value"], msg["done"] = value, True

    ppl = PyroPrimitives()
    loss = objective(vectorize_particles=particles == "vmap", max_plate_nesting=max_plate_nesting)
    arrays = {name: torch.as_tensor(array) for name, array in prescription.arrays.items()}
    model, guide = partial(program.model, ppl), partial(program.guide, ppl)
    data = [torch.as_tensor(argument) for argument in arguments]
    losses, gradients = [], []
    pyro.clear_param_store()
    params = [ppl.param(name, value) for name, value in program.problem.params.items()]
    for t in range(len(next(iter(arrays.values())))):
        for param in params:
            param.grad = None
        with Replayer({name: array[t] for name, array in arrays.items()}):
            losses.append(loss.loss_and_grads(model, guide, *data))
        gradients.append(
            torch.cat(
                [torch.zeros_like(p).ravel() if p.grad is None else p.grad.ravel() for p in params]
            )
        )
    return Evaluations(np.array(losses), -torch.stack(gradients).numpy())


def evaluations(host: str, *args: Any, **kwargs: Any) -> Evaluations:
    return {"pyro": pyro_evaluations, "numpyro": numpyro_evaluations}[host](*args, **kwargs)


def draws(host: str, objective: Any, program: Program, num_seeds: int) -> np.ndarray:
    """Gradients of an objective that draws for itself, ``[num_seeds, P]``."""
    return {"pyro": _pyro_draws, "numpyro": _numpyro_draws}[host](objective, program, num_seeds)


def _numpyro_draws(objective: Any, program: Program, num_seeds: int) -> np.ndarray:
    import jax
    import jax.numpy as jnp

    ppl = NumPyroPrimitives()
    params = {name: jnp.asarray(value) for name, value in program.problem.params.items()}

    def loss(params: dict[str, Any], key: Any) -> Any:
        return objective.loss(key, params, partial(program.model, ppl), partial(program.guide, ppl))

    keys = jax.random.split(jax.random.key(0), num_seeds)
    gradients = jax.jit(
        jax.vmap(jax.grad(loss), in_axes=(None, 0)), compiler_options=QUICK_TO_COMPILE
    )(params, keys)
    flat = [np.asarray(gradients[name]).reshape(num_seeds, -1) for name in params]
    return -np.concatenate(flat, axis=1)


def _pyro_draws(objective: Any, program: Program, num_seeds: int) -> np.ndarray:
    import pyro
    import torch

    ppl = PyroPrimitives()
    model, guide = partial(program.model, ppl), partial(program.guide, ppl)
    pyro.clear_param_store()
    params = [ppl.param(name, value) for name, value in program.problem.params.items()]
    gradients = []
    for seed in range(num_seeds):
        pyro.set_rng_seed(seed)
        loss = objective.differentiable_loss(model, guide)
        gradients.append(torch.cat([g.ravel() for g in torch.autograd.grad(loss, params)]))
    return -torch.stack(gradients).numpy()

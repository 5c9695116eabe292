"""What a loss's gradient is worth: its mean and variance, its bias, and what it costs."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from numpyro import optim
from numpyro.infer import ELBO, SVI

from numpyro_gradest.diagnostics._measure import Moments, measure
from numpyro_gradest.diagnostics._targets import (
    bound_of,
    choices_for_reference,
    departures,
    target_of,
)
from numpyro_gradest.diagnostics.gradient_report import EstimatorComparison, GradientStatistics
from numpyro_gradest.estimators import AdaptiveIMLE, effective_sample_size
from numpyro_gradest.estimators._validation import check_count
from numpyro_gradest.infer._discrete_sites import CARRIED, has_density, state_name
from numpyro_gradest.infer._enumerated import expected_bound
from numpyro_gradest.infer._site_estimators import ChooseAnew, SiteEstimators
from numpyro_gradest.infer._sites import Site
from numpyro_gradest.infer._trace import Program, guide_sites
from numpyro_gradest.infer.multisample_elbo import MultiSampleELBO
from numpyro_gradest.infer.rloo import RLOO
from numpyro_gradest.infer.vimco import VIMCO

_ESS_DRAWS = 20


def gradient_statistics(
    rng_key: Array,
    loss: ELBO,
    model: Callable,
    guide: Callable,
    params: dict[str, Any],
    *args: Any,
    num_draws: int = 1000,
    reference: str | ELBO | GradientStatistics | None = "auto",
    num_reference_draws: int | None = None,
    only: Callable[[str], bool] | None = None,
    name: str | None = None,
    family: str | None = None,
    progress_bar: bool = False,
    batch_size: int = 10,
    **kwargs: Any,
) -> GradientStatistics:
    r"""Measure the gradient of a loss: mean, variance, signal-to-noise ratio, bias and time.

    The gradient is that of the objective with respect to the unconstrained parameters, as the
    optimiser sees it, with the sign of ascent. ``print`` the result, or read its fields.

    - The signal-to-noise ratio is \|mean\| / standard deviation of each parameter, and their
      average.
    - The directional one is, averaged over draws, the squared length of the gradient along the
      mean gradient over that across it.
    - The bias is measured against the exact gradient where all draws of the guide are discrete and
      few (not of a loss that scales its gradient, as :class:`NVIL` does); else, for what is biased
      by design, against a long run of its unbiased sibling; or against what is passed as
      ``reference``, a loss that is run for long or the figures of one that was.
    - Where sites choose for themselves, by ``infer={"estimator": ...}``, ``configure_estimators``
      or ``imle``, what is biased by design in that is part of the target, as in
      ``"5-sample bound by IMLE() at z"``, and left out of what the bias is measured against.

    Args:
        rng_key: Random key of all draws.
        loss: Any loss of this package or of NumPyro.
        model: NumPyro model.
        guide: NumPyro guide, as it is passed to ``SVI``.
        params: Constrained values of the parameters, by name, as ``svi.get_params`` returns them,
            where the gradient is taken; what is missing starts as in ``SVI``. State of ``mutable``
            sites may be among them.
        args: Arguments of model and guide.
        num_draws: Number of gradients.
        reference: ``"auto"``, a loss whose expected gradient is the right one, figures of such a
            loss, or ``None``; ``"enumeration"`` is the exact gradient, or an error that says why
            there is none, as how many states there are.
        num_reference_draws: Of a long run; four times ``num_draws`` if left out.
        only: Whether to look at a parameter, by its name; at all of them if left out. The guide's
            and the model's gradients have different noise, which one average hides.
        name: In tables; the class and its number of particles if left out.
        family: The name without the number of particles; ``name`` if left out.
        progress_bar: Whether to show one.
        batch_size: Number of gradients that are taken together, by ``vmap``.
        kwargs: Keyword arguments of model and guide.

    Returns:
        :class:`GradientStatistics`.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is too small, ``reference`` is an unknown word or has other
            parameters, no parameter has a gradient, or there is none by ``"enumeration"``.

    Bias and variance:
        Means and variances are unbiased, with standard errors that fall as one over the root of
        ``num_draws``. Of a mean that is lost in the noise the ratio shows the noise: it is biased
        by design below ``snr_floor``, what it is of draws without any signal.

    Cost:
        ``num_draws`` gradients, and one to compile; memory does not grow with them.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_gradest import VIMCO
        >>> def model():
        ...     z = numpyro.sample("z", dist.Bernoulli(0.3))
        ...     numpyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=2.0)
        >>> def guide():
        ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", 0.1)))
        >>> params = {"logit": 0.1}
        >>> statistics = gradient_statistics(random.key(0), VIMCO(3), model, guide, params)
        >>> statistics.reference, statistics.total_bias < 3 * statistics.total_bias_standard_error
        ('enumeration', True)

    References:
        Rainforth et al., `Tighter Variational Bounds are Not Necessarily Better
        <https://arxiv.org/abs/1802.04537>`_, 2018, section 3. Lievin, Dittadi, Christensen and
        Winther, `Optimal Variance Control of the Score Function Gradient Estimator for Importance
        Weighted Bounds <https://arxiv.org/abs/2008.01998>`_, 2020, for the directional ratio.
    """
    check_count(num_draws, "num_draws", caller="gradient_statistics")
    if isinstance(reference, str) and reference not in ("auto", "enumeration"):
        raise ValueError(
            'gradient_statistics needs reference="auto", "enumeration", a loss, figures of a loss '
            f"or None, got {reference!r}."
        )
    num_particles = getattr(loss, "num_particles", None)
    name = name or f"{type(loss).__name__}({'' if num_particles is None else num_particles})"
    gradients = _Gradients(loss, model, guide, params, args, kwargs, rng_key, only)
    exact = _exact(gradients, reference)
    options: dict[str, Any] = {"progress_bar": progress_bar, "batch_size": batch_size}
    draw_key, reference_key = jax.random.split(rng_key)
    moments = gradients.measure(draw_key, num_draws, direction=exact, name=name, **options)

    against, truth, error = None, exact, None
    if exact is not None:
        against, error = "enumeration", np.zeros_like(exact)
    elif isinstance(reference, GradientStatistics):
        truth = gradients.vector(reference.mean)
        error = gradients.vector(reference.variance) / reference.num_draws
        against = f"{reference.num_draws} draws of {reference.name}"
    elif (sibling := gradients.reference(reference)) is not None:
        run = sibling.measure(
            reference_key,
            num_reference_draws or 4 * num_draws,
            direction=None,
            name=f"reference of {name}",
            **options,
        )
        truth, error = run.mean, run.variance / run.num_draws
        against = f"{run.num_draws} draws of {type(sibling.loss).__name__}"
    split = gradients.by_parameter
    bias = errors = None
    if truth is not None and error is not None:
        bias = split(moments.mean - truth)
        errors = split(np.sqrt(moments.variance / moments.num_draws + error))
    return GradientStatistics(
        name=name,
        family=family or name,
        num_particles=num_particles,
        target=target_of(loss, gradients.guide_sites),
        num_draws=moments.num_draws,
        mean=split(moments.mean),
        variance=split(moments.variance),
        directional_snr=moments.directional_snr,
        effective_sample_size=gradients.effective_sample_size(),
        seconds_per_gradient=moments.seconds,
        reference=against,
        bias=bias,
        bias_standard_errors=errors,
    )


def compare_estimators(
    rng_key: Array,
    losses: dict[str, Any],
    model: Callable,
    guide: Callable,
    params: dict[str, Any],
    *args: Any,
    num_particles: tuple[int, ...] = (),
    num_draws: int = 1000,
    reference: str | ELBO | Callable[[int], ELBO] | GradientStatistics | None = "auto",
    num_reference_draws: int | None = None,
    progress_bar: bool = False,
    **options: Any,
) -> EstimatorComparison:
    """Measure several losses on one model and guide, and say what to choose.

    Estimators with the same target are ranked by the signal-to-noise ratio that a second of their
    gradients has; estimators with different targets never are, and what sites choose that is biased
    by design makes another target. ``print`` the result for a table and the sentences,
    ``to_frame`` makes it a pandas data frame, and ``plot`` draws, each of which may also be drawn
    alone, :func:`plot_snr_against_particles`, :func:`plot_bias_and_variance` and
    :func:`plot_snr_per_second`.

    Args:
        rng_key: Random key of all draws.
        losses: By name, losses of this package or of NumPyro; with ``num_particles``, functions of
            K that return one.
        model: NumPyro model.
        guide: NumPyro guide, as it is passed to ``SVI``.
        params: Constrained values of the parameters, by name, as ``svi.get_params`` returns them,
            where the gradient is taken; what is missing starts as in ``SVI``. State of ``mutable``
            sites may be among them.
        args: Arguments of model and guide.
        num_particles: The numbers K to call each function in ``losses`` with.
        num_draws: Number of gradients of each.
        reference: As in :func:`gradient_statistics`, for all of them, and run once; with
            ``num_particles``, also a function of K that returns a loss, run once for each K.
        num_reference_draws: Of a long run; four times ``num_draws`` if left out.
        progress_bar: Whether to show one.
        options: Further options of :func:`gradient_statistics`, and keyword arguments of model and
            guide.

    Returns:
        :class:`EstimatorComparison`.

    Raises:
        TypeError: If a number is not an integer, or ``reference`` is a function without
            ``num_particles`` to call it with.
        ValueError: As :func:`gradient_statistics`; or if there is nothing to compare.

    Bias and variance:
        As of :func:`gradient_statistics`: unbiased means, variances and biases; all losses get
        the same seed.

    Cost:
        That of :func:`gradient_statistics` for each.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_gradest import OVIS, VIMCO
        >>> def model():
        ...     z = numpyro.sample("z", dist.Bernoulli(0.3))
        ...     numpyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=2.0)
        >>> def guide():
        ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", 0.1)))
        >>> losses, params = {"VIMCO": VIMCO(5), "OVIS": OVIS(5)}, {"logit": 0.1}
        >>> print(compare_estimators(random.key(0), losses, model, guide, params))
              target          K  SNR ...
        VIMCO 5-sample bound  5  ...
        OVIS  5-sample bound  5  ...
        - For the 5-sample bound take ...

    References:
        Rainforth et al., `Tighter Variational Bounds are Not Necessarily Better
        <https://arxiv.org/abs/1802.04537>`_, 2018.
    """
    if not losses:
        raise ValueError("compare_estimators needs at least one loss, got none.")
    shared: dict[str, Any] = {"progress_bar": progress_bar} | options

    def long_run(loss: ELBO) -> GradientStatistics:
        return gradient_statistics(
            jax.random.split(rng_key)[1],
            loss,
            model,
            guide,
            params,
            *args,
            num_draws=num_reference_draws or 4 * num_draws,
            reference=None,
            name=type(loss).__name__,
            **shared,
        )

    several: list[tuple[str, str, Any, int | None]]
    several = [(name, name, loss, None) for name, loss in losses.items()]
    if num_particles:
        several = [
            (f"{name}, K={K}", name, loss(K), K)
            for name, loss in losses.items()
            for K in num_particles
        ]
    references = _run_references(reference, num_particles, long_run)
    statistics = [
        gradient_statistics(
            rng_key,
            loss,
            model,
            guide,
            params,
            *args,
            num_draws=num_draws,
            reference=references[K],
            num_reference_draws=num_reference_draws,
            name=name,
            family=family,
            **shared,
        )
        for name, family, loss, K in several
    ]
    return EstimatorComparison(tuple(statistics))


def _run_references(
    reference: Any, num_particles: tuple[int, ...], long_run: Callable[[ELBO], GradientStatistics]
) -> dict[int | None, Any]:
    """What to compare with at each K, and without one. A loss is run once for all estimators."""
    if callable(reference) and not isinstance(reference, ELBO):
        if not num_particles:
            raise TypeError(
                "compare_estimators got a function of K as reference and no num_particles to call "
                "it with. Pass a loss, or num_particles=(3, 10, 30)."
            )
        return {K: long_run(reference(K)) for K in num_particles}
    run = long_run(reference) if isinstance(reference, ELBO) else reference
    return dict.fromkeys((None, *num_particles), run)


def _exact(gradients: "_Gradients", reference: Any) -> np.ndarray | None:
    """The exact gradient where it is asked for, or may be had."""
    if reference == "enumeration":
        return gradients.exact()
    if reference != "auto":
        return None
    try:
        return gradients.exact()
    except ValueError:
        return None


def _is_rescaled(loss: ELBO) -> bool:
    """Whether the length of the gradient says nothing, as of NVIL."""
    return getattr(loss, "normalize_variance", False)


def _unbiased(loss: ELBO, bound: Any) -> ELBO:
    """The loss without what is biased by design in its options; of the host's, one of ours."""
    if not isinstance(loss, MultiSampleELBO):
        _, num_particles, alpha = bound
        return RLOO(2) if num_particles == 1 else VIMCO(num_particles, alpha=alpha)
    sibling: Any = copy.copy(loss)
    if getattr(loss, "gamma", 0.0):
        sibling.gamma = 0.0
    if loss.reparam == "stl":
        sibling.reparam = "pathwise"
    return sibling


class _Gradients:
    """Gradients of a loss at given parameters."""

    def __init__(
        self,
        loss: ELBO,
        model: Callable,
        guide: Callable,
        params: dict[str, Any],
        args: tuple,
        kwargs: dict[str, Any],
        key: Array,
        only: Callable[[str], bool] | None,
    ) -> None:
        self.program = model, guide, params, args, kwargs, key, only
        # SVI knows how parameters are constrained, and finds mutable state.
        self.svi = SVI(model, guide, optim.SGD(0.0), loss)
        state = self.svi.init(key, *args, init_params=params, **kwargs)
        self.loss, self.args, self.kwargs, self.key = loss, args, kwargs, key
        self.unconstrained = self.svi.optim.get_params(state.optim_state)
        self.mutable_state = state.mutable_state or {}
        self.point, self.unravel = ravel_pytree(self.unconstrained)
        if not self.point.size:
            raise ValueError(
                "No parameter has a gradient. Check that model or guide has numpyro.param "
                "statements."
            )
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.unconstrained)
        every = {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves
        }
        self.guide_sites = guide_sites(self._program(self.point, SiteEstimators("score")), key)
        states = _states_of_imle(self.guide_sites)
        is_seen = [name not in states and (only is None or only(name)) for name in every]
        self.leaves = {
            name: leaf for (name, leaf), seen in zip(every.items(), is_seen, strict=True) if seen
        }
        if not self.leaves:
            raise ValueError(
                f"gradient_statistics got an `only` that is true of no parameter. There are "
                f"{', '.join(name for name in every if name not in states)}."
            )
        self.is_seen = np.repeat(is_seen, [leaf.size for leaf in every.values()])

    def measure(
        self,
        key: Array,
        num_draws: int,
        *,
        direction: np.ndarray | None,
        name: str,
        progress_bar: bool,
        batch_size: int,
    ) -> Moments:
        def draw() -> Iterator[np.ndarray]:
            gradients = jax.jit(jax.vmap(jax.grad(self._loss_at), in_axes=(None, 0)))
            step = 0
            while True:
                keys = jax.random.split(jax.random.fold_in(key, step), min(batch_size, num_draws))
                yield -np.asarray(gradients(self.point, keys))[:, self.is_seen]
                step += 1

        return measure(draw(), num_draws, direction=direction, progress_bar=progress_bar, name=name)

    def exact(self) -> np.ndarray:
        """The exact gradient of the bound that the loss is for; raises if there are many states."""
        bound = bound_of(self.loss)
        if bound is None:
            words = target_of(self.loss, self.guide_sites).words
            raise ValueError(
                f"There is no exact gradient by enumeration for the {words}, which is not one "
                "bound. Pass as reference a loss to run for long, or None."
            )
        if _is_rescaled(self.loss):
            raise ValueError(
                f"{type(self.loss).__name__} divides its gradient by a running deviation, so that "
                "its length is no bias. Pass it normalize_variance=False, or reference=None."
            )
        num_particles, alpha = cast(tuple[int, float], bound[1:])

        def expected(point: Array) -> Array:
            program = self._program(point, SiteEstimators("score"))
            return expected_bound(program, self.key, num_particles, alpha=alpha)

        return np.asarray(jax.jit(jax.grad(expected))(self.point), np.float64)[self.is_seen]

    def reference(self, reference: str | ELBO | None) -> "_Gradients | None":
        """What to run for long; for what is biased by design, the same without that.

        Sites do not depart there by choices of their own, which would be those measured.
        """
        loss: Any = reference
        if isinstance(reference, str):
            if not self._has_unbiased_sibling():
                return None
            loss = _unbiased(self.loss, bound_of(self.loss))
        if loss is None:
            return None
        is_host = isinstance(reference, str) and not isinstance(self.loss, MultiSampleELBO)
        choices = choices_for_reference(loss, self.guide_sites, is_host=is_host)
        model, guide, params, args, kwargs, key, only = self.program
        guide = ChooseAnew(guide, choices) if choices else guide
        return _Gradients(loss, model, guide, params, args, kwargs, key, only)

    def _has_unbiased_sibling(self) -> bool:
        if bound_of(self.loss) is None or _is_rescaled(self.loss):
            return False
        departing = departures(self.loss, self.guide_sites)
        return bool(departing) and all(has_density(self.guide_sites[name]) for name in departing)

    def effective_sample_size(self) -> float | None:
        loss = self.loss
        if not isinstance(loss, MultiSampleELBO):
            return None

        def size(key: Array) -> Array:
            keys = jax.random.split(key, loss.num_particles * loss.num_replicates)
            program = self._program(self.point, SiteEstimators.of(loss))
            log_weights = loss._run(program, keys).log_weights
            return effective_sample_size(loss._by_replicate(log_weights)).mean()

        return float(jax.lax.map(size, jax.random.split(self.key, _ESS_DRAWS)).mean())

    def by_parameter(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        ends = np.cumsum([leaf.size for leaf in self.leaves.values()])[:-1]
        return {
            name: part.reshape(leaf.shape)
            for (name, leaf), part in zip(self.leaves.items(), np.split(vector, ends), strict=True)
        }

    def vector(self, by_parameter: dict[str, np.ndarray]) -> np.ndarray:
        if set(by_parameter) != set(self.leaves):
            raise ValueError(
                "gradient_statistics got as reference figures of the parameters "
                f"{', '.join(by_parameter)}, and looks at {', '.join(self.leaves)}. Measure the "
                "reference on the same model and guide, with the same `only`."
            )
        return np.concatenate([by_parameter[name].ravel() for name in self.leaves])

    def _loss_at(self, point: Array, key: Array) -> Array:
        svi, params = self.svi, self._params(point)
        if self.mutable_state:
            result = self.loss.loss_with_mutable_state(
                key, params, svi.model, svi.guide, *self.args, **self.kwargs
            )
            return result["loss"]
        return self.loss.loss(key, params, svi.model, svi.guide, *self.args, **self.kwargs)

    def _params(self, point: Array) -> dict[str, Any]:
        return self.svi.constrain_fn(self.unravel(point)) | self.mutable_state

    def _program(self, point: Array, estimators: SiteEstimators) -> Program:
        svi, params = self.svi, self._params(point)
        program = Program(
            svi.model, svi.guide, params, self.args, self.kwargs, estimators, is_weighted=False
        )
        return program.with_plate_key(self.key)


def _states_of_imle(sites: dict[str, Site]) -> set[str]:
    """Names of what is among the parameters, but that no gradient moves."""
    return {
        state_name(name)
        for name, site in sites.items()
        if CARRIED in site and isinstance(site[CARRIED].estimator, AdaptiveIMLE)
    }

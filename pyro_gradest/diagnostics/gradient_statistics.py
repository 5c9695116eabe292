"""What a loss's gradient is worth: its mean and variance, its bias, and what it costs."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_gradest.diagnostics._measure import Moments, measure
from pyro_gradest.diagnostics._targets import (
    bound_of,
    choices_for_reference,
    departures,
    target_of,
)
from pyro_gradest.diagnostics.gradient_report import EstimatorComparison, GradientStatistics
from pyro_gradest.estimators import effective_sample_size
from pyro_gradest.estimators._validation import check_count
from pyro_gradest.infer._discrete_sites import has_density
from pyro_gradest.infer._enumerated import expected_bound
from pyro_gradest.infer._random import replayed
from pyro_gradest.infer._site_estimators import ChooseAnew
from pyro_gradest.infer._trace import guide_sites
from pyro_gradest.infer.iwae import IWAE
from pyro_gradest.infer.multisample_elbo import MultiSampleELBO, program_of
from pyro_gradest.infer.rloo import RLOO
from pyro_gradest.infer.vimco import VIMCO

_ESS_DRAWS = 20


def gradient_statistics(
    loss: ELBO,
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int = 1000,
    reference: str | ELBO | GradientStatistics | None = "auto",
    num_reference_draws: int | None = None,
    only: Callable[[str], bool] | None = None,
    name: str | None = None,
    family: str | None = None,
    progress_bar: bool = False,
    seed: int = 0,
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
        loss: Any loss of this package or of Pyro.
        model: Pyro model.
        guide: Pyro guide. The gradient is taken where the parameters are in the parameter store.
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
        seed: Of all draws; the random generators are left as they were.
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
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_gradest import VIMCO
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=torch.tensor(2.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1))))
        >>> statistics = gradient_statistics(VIMCO(3), model, guide, num_draws=200)
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
    gradients = _Gradients(loss, model, guide, args, kwargs, only)
    exact = _exact(gradients, reference)
    options: dict[str, Any] = {"progress_bar": progress_bar, "seed": seed}
    moments = gradients.measure(num_draws, direction=exact, name=name, **options)

    against, truth, error = None, exact, None
    if exact is not None:
        against, error = "enumeration", np.zeros_like(exact)
    elif isinstance(reference, GradientStatistics):
        truth = gradients.vector(reference.mean)
        error = gradients.vector(reference.variance) / reference.num_draws
        against = f"{reference.num_draws} draws of {reference.name}"
    elif (sibling := gradients.reference(reference)) is not None:
        run = sibling.measure(
            num_reference_draws or 4 * num_draws,
            direction=None,
            name=f"reference of {name}",
            progress_bar=progress_bar,
            seed=seed + 1,
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
    losses: dict[str, Any],
    model: Callable,
    guide: Callable,
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
        losses: By name, losses of this package or of Pyro; with ``num_particles``, functions
            of K that return one.
        model: Pyro model.
        guide: Pyro guide. The gradient is taken where the parameters are in the parameter store.
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
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_gradest import OVIS, VIMCO
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=torch.tensor(2.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1))))
        >>> losses = {"VIMCO": VIMCO(5), "OVIS": OVIS(5)}
        >>> comparison = compare_estimators(losses, model, guide, num_draws=300)
        >>> print(comparison)
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
            loss,
            model,
            guide,
            *args,
            num_draws=num_reference_draws or 4 * num_draws,
            reference=None,
            name=type(loss).__name__,
            **shared | {"seed": options.get("seed", 0) + 1},
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
            loss,
            model,
            guide,
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
    """Gradients of a loss at the parameters of the store, which are left as they are."""

    def __init__(
        self,
        loss: ELBO,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        only: Callable[[str], bool] | None,
    ) -> None:
        self.loss: Any = loss
        self.program = model, guide, args, kwargs
        self.only = only
        self.store = pyro.get_param_store()
        self.before = {name: value.detach().clone() for name, value in self.store.items()}
        with replayed():
            kept = self._clear()
            self._backward()
            leaves = dict(self.store.named_parameters())
            trained = {name: leaf for name, leaf in leaves.items() if leaf.grad is not None}
            self.trained = set(trained)
            with torch.no_grad():
                self.guide_sites = guide_sites(guide, args, kwargs)
            self._restore(kept)
        if not trained:
            raise ValueError(
                "No parameter of the parameter store got a gradient. Check that the guide has "
                "pyro.param statements, or register its networks with pyro.module."
            )
        self.leaves = {name: leaf for name, leaf in trained.items() if only is None or only(name)}
        if not self.leaves:
            raise ValueError(
                f"gradient_statistics got an `only` that is true of no parameter. There are "
                f"{', '.join(trained)}."
            )

    def measure(
        self,
        num_draws: int,
        *,
        direction: np.ndarray | None,
        name: str,
        progress_bar: bool,
        seed: int,
    ) -> Moments:
        with replayed():
            torch.manual_seed(seed)
            kept = self._clear()
            moments = measure(
                self._draw(), num_draws, direction=direction, progress_bar=progress_bar, name=name
            )
            self._restore(kept)
        return moments

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
        program = program_of(IWAE(1, strict_enumeration_warning=False), *self.program)
        with replayed():
            value = expected_bound(program, num_particles, alpha=alpha)
        leaves = list(self.leaves.values())
        return _flat(torch.autograd.grad(value, leaves, allow_unused=True), leaves)

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
        model, guide, args, kwargs = self.program
        guide = ChooseAnew(choices)(guide) if choices else guide
        return _Gradients(loss, model, guide, args, kwargs, self.only)

    def _has_unbiased_sibling(self) -> bool:
        if bound_of(self.loss) is None or _is_rescaled(self.loss):
            return False
        departing = departures(self.loss, self.guide_sites)
        return bool(departing) and all(has_density(self.guide_sites[name]) for name in departing)

    def effective_sample_size(self) -> float | None:
        loss = self.loss
        if not isinstance(loss, MultiSampleELBO):
            return None
        sizes = []
        with torch.no_grad(), replayed():
            torch.manual_seed(0)
            for _ in range(_ESS_DRAWS):
                program = program_of(loss, *self.program)
                log_weights = loss._weigh(program, loss._num_runs, []).log_weights
                sizes.append(effective_sample_size(loss._by_replicate(log_weights)).mean())
        return float(torch.stack(sizes).mean())

    def vector(self, by_parameter: dict[str, np.ndarray]) -> np.ndarray:
        if set(by_parameter) != set(self.leaves):
            raise ValueError(
                "gradient_statistics got as reference figures of the parameters "
                f"{', '.join(by_parameter)}, and looks at {', '.join(self.leaves)}. Measure the "
                "reference on the same model and guide, with the same `only`."
            )
        return np.concatenate([by_parameter[name].ravel() for name in self.leaves])

    def by_parameter(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        ends = np.cumsum([leaf.numel() for leaf in self.leaves.values()])[:-1]
        return {
            name: part.reshape(leaf.shape)
            for (name, leaf), part in zip(self.leaves.items(), np.split(vector, ends), strict=True)
        }

    def _draw(self) -> Iterator[np.ndarray]:
        leaves = list(self.leaves.values())
        while True:
            for leaf in leaves:
                leaf.grad = None
            self._backward()
            yield -_flat([leaf.grad for leaf in leaves], leaves)[None]
            self._forget()

    def _backward(self) -> None:
        model, guide, args, kwargs = self.program
        self.loss.loss_and_grads(model, guide, *args, **kwargs)

    def _clear(self) -> dict[str, Tensor | None]:
        """Take the gradients off, to put them back later."""
        kept = {}
        for name, leaf in self.store.named_parameters():
            kept[name], leaf.grad = leaf.grad, None
        return kept

    def _restore(self, kept: dict[str, Tensor | None]) -> None:
        for name, leaf in self.store.named_parameters():
            leaf.grad = kept.get(name)
        self._forget()

    def _forget(self) -> None:
        """Undo what a step does to entries of the store that are no parameters: running moments."""
        for name in set(self.store.keys()) - self.trained:
            if name in self.before:
                self.store[name] = self.before[name]
            else:
                del self.store[name]


def _flat(gradients: Any, leaves: list[Tensor]) -> np.ndarray:
    parts = [
        torch.zeros_like(leaf) if gradient is None else gradient
        for gradient, leaf in zip(gradients, leaves, strict=True)
    ]
    return torch.cat([part.detach().reshape(-1) for part in parts]).cpu().double().numpy()

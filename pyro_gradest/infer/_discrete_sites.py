"""Discrete sites that carry a gradient: what a handler puts in the place of their distribution.

Two conditions make the reparameterised ELBO right at such a site, and what does not meet them is
refused. Its draws follow its distribution exactly, for else the term of log q that depends on the
parameters directly would not have mean zero; and log-probabilities are linear in the value, so that
their gradient there says how they differ between states.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pyro import distributions as dist
from pyro import get_param_store
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

from pyro_gradest.distributions import KSubset, PerturbAndMAP, SpanningTree
from pyro_gradest.distributions._from_logits import FromLogits
from pyro_gradest.distributions.one_hot_categorical import (
    LINEAR_LOG_PROBS,
    OneHotCategorical,
    count_linear_log_prob,
)
from pyro_gradest.estimators import (
    IMLE,
    SIMPLE,
    AdaptiveIMLE,
    AdaptiveState,
    GumbelNoise,
    GumbelSoftmaxST,
    LogisticNoise,
    ReinMax,
    Solver,
    StraightThrough,
    one_hot_argmax,
    spanning_tree,
    threshold,
)
from pyro_gradest.estimators.discrete._subset_sampler import SplitNoise, of_items, subset_sampler
from pyro_gradest.estimators.discrete.solvers import SolverAt, errors_say
from pyro_gradest.infer._graph import COUNTS
from pyro_gradest.infer._modules import as_module
from pyro_gradest.infer._sites import Site, is_subsample, own_estimator

Estimator = IMLE | AdaptiveIMLE | StraightThrough | GumbelSoftmaxST | ReinMax | SIMPLE
CARRIED = "carried"
"""Where in a site's message stands what gradient it carries."""
ESTIMATORS = (IMLE, AdaptiveIMLE, StraightThrough, GumbelSoftmaxST, ReinMax, SIMPLE)
Draw = Callable[[Tensor], Tensor]
_NO_SHAPE = torch.Size()


class _CarriesGradient:
    """Draws by an estimator, from the logits."""

    has_rsample = True
    site: str
    draw: Draw

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))  # type: ignore[attr-defined]
        return self.draw(self.logits.expand(shape))  # type: ignore[attr-defined]

    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = super().expand(batch_shape, _instance)  # type: ignore[misc]
        new.site, new.draw = self.site, self.draw
        return new

    def enumerate_support(self, expand: bool = True) -> Tensor:
        # A handler outside of imle may have asked for it.
        raise ValueError(_enumerated(self.site))


class _Bernoulli(_CarriesGradient, dist.Bernoulli):
    pass


class _OneHotCategorical(_CarriesGradient, OneHotCategorical):
    value: Tensor | None = None

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        self.value = super().rsample(sample_shape)
        return self.value


@register_kl(_OneHotCategorical, torch.distributions.OneHotCategorical)
def _analytic_kl(q: Any, p: Any) -> Tensor:
    """That of the host; the prior counts by it, whether or not its log-probability is linear."""
    if q.value is not None:
        count_linear_log_prob(q.value)
    return kl_divergence(OneHotCategorical(logits=q.logits), p)


class _KSubset(_CarriesGradient, KSubset):
    pass


class _SpanningTree(_CarriesGradient, SpanningTree):
    pass


class _PerturbAndMAP(_CarriesGradient, PerturbAndMAP):
    @property
    def logits(self) -> Tensor:
        return self.theta


class Carried(NamedTuple):
    """What a site carries the gradient of."""

    estimator: Estimator
    fn: Any
    """The distribution that it has without."""


class DiscreteSites(Messenger):
    """Gives chosen discrete sites of a program a gradient.

    ``config`` is an estimator by name of the site, a function from names to estimators (or
    ``None``), one estimator for every latent discrete site, or ``None`` for what sites say.
    """

    def __init__(self, config: Any, *, may_be_idle: bool = False) -> None:
        super().__init__()
        self._is_for_all = isinstance(config, ESTIMATORS)
        self._choose = None if config is None else as_choice(config)
        self._named = set(config) if isinstance(config, Mapping) else set()
        self._met: list[str] = []
        self._is_idle = self._is_needed = config is None and not may_be_idle
        self._counts: dict[str, Tensor] = {}

    def __call__(self, fn: Callable) -> Any:
        return as_module(fn, super().__call__(fn))

    def __enter__(self) -> Any:
        self._met = []
        self._is_idle = self._is_needed
        return super().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        result = super().__exit__(*exception)
        if exception[0] is None and (missing := sorted(self._named - set(self._met))):
            raise ValueError(
                f"imle was given an estimator for the sites {missing}, but the program has only "
                f"{self._met}. Correct the names, or leave them out."
            )
        if exception[0] is None and self._is_idle:
            raise ValueError(
                "imle was given no estimators, and no site of the program asks for one by "
                f'infer={{"estimator": IMLE()}}: it has {self._met}. Pass estimators by site name, '
                "such as imle(guide, {'z': IMLE()})."
            )
        return result

    def _pyro_sample(self, msg: Site) -> None:
        if is_subsample(msg):
            return
        name = msg["name"]
        self._met.append(name)
        estimator = self._choose(name) if self._choose else _as_it_says(msg)
        if estimator is not None:
            _check_estimator(name, estimator)
        if estimator is None or (self._is_for_all and not _may_be_chosen(msg)):
            return
        _check_site(name, msg)
        self._is_idle = False
        original = msg[CARRIED].fn if CARRIED in msg else msg["fn"]
        msg[CARRIED] = Carried(estimator, original)
        msg["fn"] = _with_gradient(msg["fn"], name, estimator, self._draw_of)
        _base(msg["fn"]).site = name

    def _pyro_post_sample(self, msg: Site) -> None:
        if CARRIED in msg and msg["infer"].get("enumerate"):
            raise ValueError(_enumerated(msg["name"]))
        fn = msg["fn"]
        while isinstance(fn, (dist.Independent, dist.MaskedDistribution)):
            fn = fn.base_dist
        is_auxiliary_site = bool(msg["infer"].get("is_auxiliary"))
        if isinstance(fn, _OneHotCategorical) and not is_auxiliary_site:
            if msg["value"].grad_fn is not None:
                _refuse_lost_prior(msg["name"], msg["value"])

    def _draw_of(self, name: str, estimator: Estimator, solver: Solver) -> Draw:
        where = f"At site {name!r}, under imle."
        solver = SolverAt.of(solver, where)

        def draw(theta: Tensor) -> Tensor:
            with errors_say(where):
                if isinstance(estimator, AdaptiveIMLE):
                    return self._adaptive_draw(name, estimator, solver, theta)
                return estimator.sample(theta, solver)

        return draw

    def _adaptive_draw(
        self, name: str, estimator: AdaptiveIMLE, solver: Solver, theta: Tensor
    ) -> Tensor:
        _check_backward_pass()
        state = _adaptive_state(name, estimator, theta)
        counts = self._counts.get(name)
        if counts is None:
            counts = self._counts[name] = torch.zeros_like(state[:2], requires_grad=True)
            setattr(counts, COUNTS, True)
            # Once in a backward pass, after the counts of all its draws have been summed.
            counts.register_post_accumulate_grad_hook(
                lambda counts: _update_state(name, estimator, counts)
            )
        return estimator.sample(theta, solver, state=AdaptiveState(*state), counts=counts)


def _as_it_says(msg: Site) -> Estimator | None:
    estimator = own_estimator(msg)
    return estimator if isinstance(estimator, ESTIMATORS) else None


def carries_gradient(fn: Any) -> bool:
    """Whether the draws of a distribution carry an estimator's gradient."""
    return isinstance(_base(fn), _CarriesGradient)


def has_density(site: Site) -> bool:
    """Whether a draw has a log-probability, which a solver's under noise has not."""
    return not isinstance(_base(site["fn"]), PerturbAndMAP)


def as_choice(config: Any) -> Callable[[str], Estimator | None]:
    """The function from site names to estimators that ``config`` stands for."""
    if isinstance(config, ESTIMATORS):
        return lambda name: config
    if isinstance(config, Mapping):
        for name, estimator in config.items():
            _check_estimator(name, estimator)
        return config.get
    if callable(config):
        return config
    raise TypeError(
        "imle needs estimators by site name, such as {'z': IMLE()}, one estimator for all discrete "
        f"sites, a function from names to estimators, or nothing, got {config!r}."
    )


def _check_estimator(name: str, estimator: Any) -> None:
    if not isinstance(estimator, ESTIMATORS):
        raise TypeError(
            f"imle needs an estimator for site {name!r}, such as IMLE() or AdaptiveIMLE() (an "
            f"instance, not the class), or None from a function of names, got {estimator!r}."
        )


def _may_be_chosen(msg: Site) -> bool:
    """Whether a site is meant by an estimator that is given for all."""
    return _is_discrete(_base(msg["fn"])) and not msg["is_observed"]


def _is_discrete(fn: Any) -> bool:
    if isinstance(fn, (PerturbAndMAP, FromLogits)) or _kind(fn):
        return True
    if fn.has_rsample:
        return False
    try:
        return fn.support.is_discrete
    except NotImplementedError:  # of distributions that state no support
        return False


def _check_site(name: str, msg: Site) -> None:
    if msg["is_observed"]:
        raise ValueError(
            f"imle was given an estimator for site {name!r}, which is observed and draws nothing. "
            "Name latent sites only."
        )
    if msg["infer"].get("enumerate"):
        raise ValueError(_enumerated(name))


def _enumerated(name: str) -> str:
    return (
        f"Site {name!r} is both enumerated and under imle. Remove its "
        'infer={"enumerate": ...}, which config_enumerate sets too, or leave it out of imle.'
    )


def _with_gradient(
    fn: Any, name: str, estimator: Estimator, draw_of: Callable, event_dim: int = 0
) -> Any:
    """A distribution like ``fn`` whose draws carry the estimator's gradient."""
    if isinstance(fn, dist.Independent):
        dims = fn.reinterpreted_batch_ndims
        base = _with_gradient(fn.base_dist, name, estimator, draw_of, event_dim + dims)
        return base.to_event(dims)
    if isinstance(fn, dist.MaskedDistribution):
        return _with_gradient(fn.base_dist, name, estimator, draw_of, event_dim).mask(fn._mask)
    if isinstance(fn, dist.ExpandedDistribution):
        base = _with_gradient(fn.base_dist, name, estimator, draw_of, event_dim)
        return base.expand(fn.batch_shape)
    if isinstance(fn, PerturbAndMAP):
        return _perturb_and_map(fn, name, estimator, draw_of, event_dim)
    if isinstance(fn, KSubset):
        return _k_subset(fn, name, estimator, draw_of, event_dim)
    if isinstance(fn, SpanningTree):
        return _spanning_tree(fn, name, estimator, draw_of, event_dim)
    kind = _kind(fn)
    if kind is None:
        raise ValueError(_unsupported(name, fn))
    check_exact(name, estimator, LogisticNoise if kind is _Bernoulli else GumbelNoise)
    solver = threshold() if kind is _Bernoulli else one_hot_argmax()
    new = kind(logits=fn.logits)
    new.draw = draw_of(name, estimator, _of_event(solver, estimator, event_dim))
    return new


def _perturb_and_map(
    fn: Any, name: str, estimator: Estimator, draw_of: Callable, event_dim: int
) -> Any:
    if not isinstance(estimator, (IMLE, AdaptiveIMLE, StraightThrough)) or (
        estimator.noise is not None or estimator.temperature != 1.0
    ):
        raise ValueError(
            f"Site {name!r} draws by PerturbAndMAP with noise and a temperature of its own, which "
            f"IMLE, AdaptiveIMLE and StraightThrough take over, got {estimator}. Leave noise and "
            "temperature out there."
        )
    estimator = replace(estimator, noise=fn.noise, temperature=fn.temperature)
    new = _PerturbAndMAP(fn.theta, fn.solver, fn.noise, temperature=fn.temperature)
    solver = fn.solver._replace(event_dim=fn.solver.event_dim + event_dim)
    new.draw = draw_of(name, estimator, solver)
    return new


def _k_subset(fn: Any, name: str, estimator: Estimator, draw_of: Callable, event_dim: int) -> Any:
    if isinstance(estimator, GumbelSoftmaxST):
        raise ValueError(
            f"Site {name!r} draws from KSubset, for which there are IMLE, AdaptiveIMLE, ReinMax, "
            f"SIMPLE and StraightThrough, got {estimator}. Take one of these."
        )
    check_exact(name, estimator, SplitNoise)
    num_items = fn.event_shape[0]
    solver = _of_event(subset_sampler(num_items, fn.k), estimator, event_dim)
    new = _KSubset(fn.logits, fn.k)
    new.draw = of_items(draw_of(name, estimator, solver), num_items)
    return new


def _spanning_tree(
    fn: Any, name: str, estimator: Estimator, draw_of: Callable, event_dim: int
) -> Any:
    if estimator == StraightThrough():
        estimator = SIMPLE()  # the same gradient, at draws that are no maxima under noise
    if not isinstance(estimator, (ReinMax, SIMPLE)):
        raise ValueError(
            f"Site {name!r} draws from SpanningTree, for which there are ReinMax(), SIMPLE() and "
            f"StraightThrough() without noise or temperature, got {estimator}. Take one of these; "
            "or, for other estimators, sample PerturbAndMAP(logits / 2, spanning_tree()) in model "
            "and guide, under TraceMeanField_ELBO."
        )
    draw = draw_of(name, estimator, _of_event(spanning_tree(), estimator, event_dim))
    new = _SpanningTree(fn.logits)
    # Half of the logits, which stand twice: the solver's trees are of weights exp <z, theta>.
    new.draw = lambda logits: draw(logits / 2)
    return new


def _of_event(solver: Solver, estimator: Estimator, event_dim: int) -> Solver:
    """The solver whose states are the whole event; for ReinMax its independent parts are."""
    if isinstance(estimator, ReinMax):
        return solver
    return solver._replace(event_dim=solver.event_dim + event_dim)


def _kind(fn: Any) -> type | None:
    if isinstance(fn, torch.distributions.Bernoulli):
        return _Bernoulli
    return _OneHotCategorical if isinstance(fn, torch.distributions.OneHotCategorical) else None


def _base(fn: Any) -> Any:
    while isinstance(fn, (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def _unsupported(name: str, fn: Any) -> str:
    if isinstance(fn, torch.distributions.Categorical):
        return (
            f"Site {name!r} draws integers, through which no gradient passes. Sample "
            "OneHotCategorical in model and guide instead, and use the value as weights "
            "(value @ table instead of table[value])."
        )
    if isinstance(fn, FromLogits):
        return (
            f"Site {name!r} draws from {type(fn).__name__}, for which imle knows no estimator that "
            "draws exactly. Sample PerturbAndMAP with a solver in model and guide, under "
            "TraceMeanField_ELBO, or, for subsets, KSubset; or leave it out and pass SVI a loss "
            "that takes the score function, such as RLOO."
        )
    if _is_discrete(fn):
        return (
            f"Site {name!r} draws from {type(fn).__name__}, which is discrete, but its states are "
            "integers, through which no gradient passes. Sample a one-hot, Bernoulli or KSubset "
            "site instead in model and guide; or leave it out and pass SVI a loss that takes the "
            "score function, such as RLOO, VIMCO or OVIS."
        )
    return (
        "imle is for Bernoulli, OneHotCategorical, KSubset, SpanningTree and PerturbAndMAP sites, "
        f"but {name!r} has the distribution {type(fn).__name__}. Leave it out: a continuous site "
        "is reparameterised by the host."
    )


def check_exact(name: str, estimator: Estimator, noise: type) -> None:
    """Refuse noise under which draws do not follow the distribution of the site."""
    own_noise = getattr(estimator, "noise", None)
    if getattr(estimator, "temperature", 1.0) != 1.0 or not isinstance(
        own_noise, (noise, type(None))
    ):
        raise ValueError(
            f"At site {name!r} {estimator} does not draw from the site's distribution, which takes "
            f"{noise.__name__} at temperature 1, so that log q would have the wrong entropy. Leave "
            "noise and temperature out."
        )


def _check_backward_pass() -> None:
    try:
        torch.empty(0).requires_grad_()
        is_ordinary = not torch.jit.is_tracing()
    except RuntimeError:  # the sign of a transformation that public functions give
        is_ordinary = False
    if not is_ordinary:
        raise RuntimeError(
            "Under torch.func and torch.jit there is no backward pass in which the state of "
            "AdaptiveIMLE could be updated. Use IMLE() there, or loss.backward() without them."
        )


def _adaptive_state(name: str, estimator: AdaptiveIMLE, theta: Tensor) -> Tensor:
    """State in the parameter store, where it is saved with the parameters; no optimiser has it."""
    store = get_param_store()
    if (key := state_name(name)) not in store:
        store[key] = torch.stack(estimator.init(theta))
    # A copy: the update writes over the stored one.
    return store[key].detach().clone()


def _update_state(name: str, estimator: AdaptiveIMLE, counts: Tensor) -> None:
    store, gradient = get_param_store(), counts.grad
    counts.grad = None
    if gradient is not None and (key := state_name(name)) in store:
        state = store[key].data
        state.copy_(torch.stack(estimator.update(AdaptiveState(*state), gradient)))


def state_name(site: str) -> str:
    """Name under which the state of adaptive IMLE at a site is kept."""
    return f"{site}_imle"


def _refuse_lost_prior(name: str, value: Tensor) -> None:
    """Raise in the backward pass if log-probabilities linear in the value were not taken twice:
    then the model has the host's class, and no gradient of the prior would arrive."""

    def check(gradient: Tensor) -> None:
        if getattr(value, LINEAR_LOG_PROBS, 2) < 2:
            raise ValueError(
                f"The prior of site {name!r} would count for nothing: the host's "
                "OneHotCategorical.log_prob has no gradient in the value. Sample the site from "
                "gradest's OneHotCategorical in the model too, or wrap the model in imle as well."
            )

    value.register_hook(check)

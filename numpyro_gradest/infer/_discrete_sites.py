"""Discrete sites that carry a gradient: what a handler puts in the place of their distribution.

Two conditions make the reparameterised ELBO right at such a site, and what does not meet them is
refused. Its draws follow its distribution exactly, for else the term of log q that depends on the
parameters directly would not have mean zero; and log-probabilities are linear in the value, so that
their gradient there says how they differ between states.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array
from numpyro import distributions as dist
from numpyro.distributions import kl_divergence
from numpyro.handlers import block, scope, trace
from numpyro.primitives import _PYRO_STACK, Messenger

from numpyro_gradest.distributions import (
    KSubset,
    OneHotCategorical,
    PerturbAndMAP,
    SpanningTree,
)
from numpyro_gradest.distributions._from_logits import FromLogits
from numpyro_gradest.estimators import (
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
from numpyro_gradest.estimators.discrete._subset_sampler import SplitNoise, of_items, subset_sampler
from numpyro_gradest.estimators.discrete.solvers import called_at, with_place
from numpyro_gradest.infer._sites import Site, own_estimator

Estimator = IMLE | AdaptiveIMLE | StraightThrough | GumbelSoftmaxST | ReinMax | SIMPLE
CARRIED = "carried"
"""Where in a site's message stands what gradient it carries."""
ESTIMATORS = (IMLE, AdaptiveIMLE, StraightThrough, GumbelSoftmaxST, ReinMax, SIMPLE)
_INTEGERS = (
    dist.CategoricalLogits,
    dist.CategoricalProbs,
    dist.MultinomialLogits,
    dist.MultinomialProbs,
)
Draw = Callable[[Array, Array], Array]


class _CarriesGradient:
    """Draws by an estimator, from the logits."""

    has_rsample = True
    draw: Draw

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        logits = jnp.asarray(self.logits)  # type: ignore[attr-defined]
        return self.draw(key, jnp.broadcast_to(logits, sample_shape + logits.shape))


class _Bernoulli(_CarriesGradient, dist.BernoulliLogits):
    def log_prob(self, value: Array) -> Array:
        # The host's derivative in logits is wrong where they are zero.
        return value * self.logits - jax.nn.softplus(self.logits)


class _OneHotCategorical(_CarriesGradient, OneHotCategorical):
    pass


class _KSubset(_CarriesGradient, KSubset):
    pass


class _SpanningTree(_CarriesGradient, SpanningTree):
    pass


class _PerturbAndMAP(_CarriesGradient, PerturbAndMAP):
    has_rsample: bool = True  # type: ignore[assignment]

    @property
    def logits(self) -> Array:
        return self.theta


@kl_divergence.register(_Bernoulli, (dist.BernoulliLogits, dist.BernoulliProbs))
def _kl_of_bits(p: Any, q: Any) -> Array:
    log_odds = p.logits - q.logits
    return p.probs * log_odds - jax.nn.softplus(p.logits) + jax.nn.softplus(q.logits)


@dataclass(frozen=True)
class Carried:
    """What a site carries the gradient of."""

    estimator: Estimator
    fn: Any = field(compare=False)  # both branches of cond have to say the same
    """The distribution that it has without."""


class DiscreteSites(Messenger):
    """Gives chosen discrete sites of a program a gradient.

    ``config`` is an estimator by name of the site, a function from names to estimators (or
    ``None``), one estimator for every latent discrete site, or ``None`` for what sites say.
    """

    def __init__(self, fn: Callable | None, config: Any, *, may_be_idle: bool = False) -> None:
        super().__init__(fn)
        self._is_for_all = isinstance(config, ESTIMATORS)
        self._choose = None if config is None else as_choice(config)
        self._named = set(config) if isinstance(config, Mapping) else set()
        self._met: list[str] = []
        self._met_within: set[str] = set()
        self._is_idle = self._is_needed = config is None and not may_be_idle

    def __enter__(self) -> None:
        self._met = []
        self._is_idle = self._is_needed
        super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
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

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "control_flow":
            # A handler sees the sites of scan and cond only when these have run; what is
            # substituted there sees them before.
            msg["kwargs"]["substitute_stack"].append(("substitute", self._let_carry_within))
        if msg["type"] != "sample":
            return
        name = msg["name"]
        self._met.append(name)
        if (estimator := self._chosen(msg)) is None:
            return
        _check_site(name, msg)
        self._is_idle = False
        if not msg.get("_control_flow_done"):
            _let_carry(msg, estimator, _unscoped(name, self))
        elif name not in self._met_within and not carries_gradient(msg["fn"]):
            raise ValueError(
                f"Site {name!r} was drawn within scan or cond under another name, so that imle "
                "came too late to give it a gradient. Put imle within handlers.scope, or "
                "`with imle(...)` inside the step."
            )
        elif carries_gradient(msg["fn"]):
            msg[CARRIED] = Carried(estimator, msg["fn"])  # what was there is of one step

    def _let_carry_within(self, site: Site) -> None:
        """Of a site of scan or cond, while it runs."""
        if site["type"] == "sample" and (estimator := self._chosen(site)) is not None:
            self._met_within.add(site["name"])
            _check_site(site["name"], site)
            if isinstance(estimator, AdaptiveIMLE):
                raise ValueError(_no_state(site["name"], estimator))
            _let_carry(site, estimator)

    def _chosen(self, msg: Site) -> Estimator | None:
        estimator = self._choose(msg["name"]) if self._choose else _as_it_says(msg)
        return None if self._is_for_all and not _may_be_chosen(msg) else estimator


def _let_carry(msg: Site, estimator: Estimator, name_of_state: str = "") -> None:
    original = msg[CARRIED].fn if CARRIED in msg else msg["fn"]
    msg[CARRIED] = Carried(estimator, original)
    draw_of = partial(_draw_of, state_name(name_of_state))
    msg["fn"] = _with_gradient(msg["fn"], msg["name"], estimator, draw_of)


def _unscoped(name: str, handler: Messenger) -> str:
    """The name before those within this handler prefix it, as they will that of the state."""
    for inner in _PYRO_STACK[_PYRO_STACK.index(handler) + 1 :]:
        if isinstance(inner, scope) and "param" not in inner.hide_types:
            name = name.removeprefix(f"{inner.prefix}{inner.divider}")
    return name


def _draw_of(name_of_state: str, name: str, estimator: Estimator, solver: Solver) -> Draw:
    place = f"At site {name!r}, under imle."
    solver = with_place(solver, place)
    if not isinstance(estimator, AdaptiveIMLE):
        return called_at(place)(lambda key, theta: estimator.sample(key, theta, solver))
    if _is_in_control_flow():
        raise ValueError(_no_state(name, estimator))

    @called_at(place)
    def draw(key: Array, theta: Array) -> Array:
        first = jnp.stack([*estimator.init(theta), *jnp.zeros((3,), theta.dtype)])
        state = numpyro.param(name_of_state, first.astype(_state_dtype(theta)))
        # Added to what the gradient is made of, so that compilation can't leave the check out.
        held = jax.lax.stop_gradient(state[:3]) + _check_optimizer(name, state[3:])
        counts = _COUNT * (state[3:5] + jnp.array([0.0, 2.0], state.dtype) * state[5])
        given = AdaptiveState(*held.astype(theta.dtype))
        return estimator.sample(key, theta, solver, state=given, counts=counts.astype(theta.dtype))

    return draw


_COUNT = 2.0**-30
"""What arrives for one datum: so little that no clipping meets it, nor the norm that it goes by."""


def _state_dtype(theta: Array) -> Any:
    return jnp.promote_types(theta.dtype, jnp.float32)


def _no_state(name: str, estimator: Estimator) -> str:
    return (
        f"Site {name!r} is drawn within scan or cond, where the host keeps no parameter and so no "
        f"state of AdaptiveIMLE, got {estimator}. Take IMLE(step_size=...) there."
    )


def _is_in_control_flow() -> bool:
    """Whether the host runs the step of scan or a branch of cond, as it does under these two."""
    kinds = [type(handler) for handler in _PYRO_STACK if handler.fn is None]
    return (block, trace) in pairwise(kinds)


def update_state(estimator: AdaptiveIMLE, state: Array, gradient: Array) -> Array:
    """The parameter that holds the state after a step with this gradient.

    Where its last entries are not zero, the next draw is refused. They are the places of what is
    counted: of the change, of the data and, twice the same, of the data once more.
    """
    change, data, twice = gradient[3:]
    is_right = (change >= 0) & (data >= 0) & (jnp.abs(twice - 2 * data) <= 1e-3 * data)
    # Whatever multiplies the whole gradient leaves the mean over data as it is.
    per_datum = change / jnp.where(data > 0, data, 1.0)
    counts = jnp.stack([per_datum, jnp.ones_like(data)]) * (data > 0)
    new = jnp.stack(estimator.update(AdaptiveState(*state[:3]), counts))
    marks = jnp.where(is_right, 0.0, jnp.ones_like(gradient[3:]))
    return jnp.concatenate([new, marks])


def is_moved(expected: Array, actual: Array) -> Array:
    """Whether a state has become another, beyond rounding and a weight decay of no effect."""
    return ~jnp.all(jnp.abs(actual - expected) <= 1e-3 * jnp.abs(expected) + 1e-6)


def _check_optimizer(name: str, marks: Array) -> Array:
    """Zero; an error where one of these entries of the state is no longer zero."""
    marks = jax.lax.stop_gradient(marks)
    shape = jax.ShapeDtypeStruct((), marks.dtype)
    on_host = partial(_refuse_optimizer, name)
    refuse = partial(jax.pure_callback, on_host, vmap_method="sequential")
    # The host is called only where something is wrong.
    return jax.lax.cond(
        jnp.any(marks != 0), lambda: refuse(shape, marks), lambda: jnp.zeros((), marks.dtype)
    )


def _refuse_optimizer(name: str, marks: Any) -> np.ndarray:
    if np.any(np.asarray(marks) != 0):
        raise ValueError(
            f"The optimizer moved the state of AdaptiveIMLE at site {name!r} as if it were a "
            "parameter. Pass SVI adapt_imle(optimizer, config) with an optax optimizer and the "
            "config of imle, and put what else changes gradients or updates inside, as in "
            "adapt_imle(optax.chain(optax.clip(1.0), optax.adam(1e-3)), config)."
        )
    return np.zeros((), marks.dtype)


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
    if callable(config) and not isinstance(config, type):
        return partial(_checked_choice, config)
    raise TypeError(
        "imle needs estimators by site name, such as {'z': IMLE()}, one estimator for all discrete "
        f"sites, a function from names to estimators, or nothing, got {config!r}."
    )


def _checked_choice(choose: Callable[[str], Any], name: str) -> Estimator | None:
    if (estimator := choose(name)) is not None:
        _check_estimator(name, estimator)
    return estimator


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
    return not fn.has_rsample and bool(getattr(fn.support, "is_discrete", False))


def _check_site(name: str, msg: Site) -> None:
    if msg["is_observed"]:
        raise ValueError(
            f"imle was given an estimator for site {name!r}, which is observed and draws nothing. "
            "Name latent sites only."
        )
    if msg["infer"].get("enumerate"):
        raise ValueError(
            f"Site {name!r} is both enumerated and under imle. Remove its "
            'infer={"enumerate": ...}, or leave it out of imle.'
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
    new.draw = lambda key, logits: draw(key, logits / 2)
    return new


def _of_event(solver: Solver, estimator: Estimator, event_dim: int) -> Solver:
    """The solver whose states are the whole event; for ReinMax its independent parts are."""
    if isinstance(estimator, ReinMax):
        return solver
    return solver._replace(event_dim=solver.event_dim + event_dim)


def _kind(fn: Any) -> type | None:
    if isinstance(fn, (dist.BernoulliLogits, dist.BernoulliProbs)):
        return _Bernoulli
    return _OneHotCategorical if isinstance(fn, OneHotCategorical) else None


def _base(fn: Any) -> Any:
    while isinstance(fn, (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def _unsupported(name: str, fn: Any) -> str:
    if isinstance(fn, _INTEGERS):
        return (
            f"Site {name!r} draws integers, through which no gradient passes. Sample "
            "gradest's OneHotCategorical in model and guide instead, and use the value as weights "
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


def state_name(site: str) -> str:
    """Name under which the state of adaptive IMLE at a site is kept."""
    return f"{site}_imle"


def is_state(name: str, leaf: Any) -> bool:
    """Whether a parameter is such a state."""
    return name.endswith(state_name("")) and jnp.shape(leaf) == (6,)

"""Which estimator each guide site gets: its own, ``infer={"estimator": ...}``, or the loss's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxtyping import Float
from pyro import distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_gradest.distributions import Implicit
from pyro_gradest.estimators import (
    nvil_learning_signal,
    ovis_gamma_learning_signal,
    ovis_mc_learning_signal,
    reinforce_learning_signal,
    reinforce_leave_one_out_learning_signal,
    renyi_learning_signal,
    thermodynamic_learning_signal,
    vimco_learning_signal,
    wake_phi_learning_signal,
)
from pyro_gradest.infer._discrete_sites import CARRIED, ESTIMATORS, carries_gradient
from pyro_gradest.infer._sites import (
    ESTIMATOR,
    Site,
    Trace,
    is_deterministic,
    is_subsample,
    own_estimator,
    samples,
)

LearningSignal = Callable[[Float[Tensor, " K *batch"]], Float[Tensor, " K *batch"]]

NAMES = ("pathwise", "dreg", "stl", "score")
WAKE_PHI, THERMODYNAMIC = "wake-phi", "the thermodynamic objective"
_ORDERS = {0.0: "the importance-weighted bound", 1.0: "the ELBO"}
_TARGETS = {
    reinforce_learning_signal: 0.0,
    vimco_learning_signal: 0.0,
    ovis_gamma_learning_signal: 0.0,
    reinforce_leave_one_out_learning_signal: 1.0,
    wake_phi_learning_signal: WAKE_PHI,
    thermodynamic_learning_signal: THERMODYNAMIC,
}
_NEED_MORE = {
    nvil_learning_signal: "NVIL(...), which keeps the moments,",
    ovis_mc_learning_signal: "OVIS(..., num_auxiliary=...), which makes the auxiliary draws,",
}


@dataclass(frozen=True)
class SiteEstimators:
    """What a loss does at the guide's sites, and what it lets them choose."""

    default: str
    """The loss's ``reparam``: what sites with a reparameterised sampler get."""
    allowed: tuple[str, ...] | None = None
    """The names that a site may choose; ``None`` where sites are not asked."""
    loss: str = ""
    target: float | str | None = None
    """What a learning signal has to be for: the order of a bound, or another objective in words;
    ``None`` where the loss takes none."""
    splits_path: bool = False
    """Whether the gradient along the path is told from that of the model alone."""
    met: set[str] = field(default_factory=set)
    """Those of ``NAMES`` that sites of particles that have been run have."""
    signals: dict[str, LearningSignal] = field(default_factory=dict)
    """Learning signals of sites with one of their own, of particles that have been run; by the
    first site that has it."""

    @classmethod
    def of(cls, loss: Any) -> "SiteEstimators":
        """Those of a loss, for one evaluation."""
        name, target = type(loss).__name__, loss._signal_target
        splits_path = getattr(loss, "pool_replicates", False)
        return cls(loss.reparam, loss._reparams, name, target, splits_path)

    def at(self, site: Site) -> str | LearningSignal | None:
        """The estimator of a guide site: one of ``NAMES``, or the learning signal of its score.

        ``None`` for what is no draw.

        Raises:
            ValueError: If the site can't have the estimator that it asks for.
            TypeError: If that is no estimator.
        """
        fn = site["fn"]
        if site["is_observed"]:
            # A factor stands for a draw that the guide has made by itself.
            return "score" if isinstance(fn, dist.Unit) and not fn.has_rsample else None
        chosen = None if self.allowed is None else own_estimator(site)
        if chosen is not None:
            return self._checked(site, chosen)
        if is_deterministic(fn):
            return None
        if isinstance(_base(fn), Implicit):
            return "pathwise"  # there is no density that a score function could be taken of
        return self.default if fn.has_rsample else "score"

    def check_carried(self, site: Site) -> None:
        """Refuse a site whose gradient, by ``imle``, the loss would not look at."""
        if self.allowed is None or not carries_gradient(site["fn"]) or site["is_observed"]:
            return
        if "pathwise" not in self.allowed:
            words = f"gives its sites {_words(self.allowed)} alone"
        elif self.at(site) == "score" and own_estimator(site) is None:
            words = 'takes the score function at all sites with reparam="score"'
        else:
            return
        raise ValueError(
            f"Guide site {site['name']!r} carries a gradient by {site[CARRIED].estimator!r}, under "
            f"imle, but {self.loss} {words}, so that it would count for nothing. Use IWAE, "
            "ImplicitELBO, or the host's Trace_ELBO or TraceMeanField_ELBO; or leave the site out "
            "of imle."
        )

    def _checked(self, site: Site, chosen: Any) -> str | LearningSignal:
        name, kind = site["name"], type(_base(site["fn"])).__name__
        if is_deterministic(site["fn"]):
            raise ValueError(
                f"Guide site {name!r} is a point mass, whose value is no draw, but has the "
                f"estimator {chosen!r}. Give that to the site that the value is drawn at (in an "
                f"autoguide '{name}_unconstrained', or the joint site that ends in '_latent')."
            )
        if isinstance(_base(site["fn"]), Implicit):
            raise ValueError(
                f"Guide site {name!r} is Implicit and has no density: its gradient is along the "
                f"path, by the score estimator of the loss. Remove its estimator {chosen!r}."
            )
        if isinstance(chosen, ESTIMATORS):
            if not carries_gradient(site["fn"]):
                raise ValueError(
                    f"Guide site {name!r} ({kind}) has the estimator {chosen!r}, which no handler "
                    "has put in place. Pass SVI imle(guide), or set the estimator by "
                    "configure_estimators."
                )
            self._check_allowed(name, chosen, "pathwise")
            return "pathwise"
        check_estimator(name, chosen)
        if isinstance(chosen, str):
            self._check_allowed(name, chosen, chosen)
            if chosen != "score" and not site["fn"].has_rsample:
                raise ValueError(
                    f'Guide site {name!r} has the estimator "{chosen}", but draws from {kind}, '
                    'which has no reparameterised sampler. Use "score", a learning signal such as '
                    "vimco_learning_signal, or, if it is Bernoulli or one-hot, IMLE()."
                )
            return chosen
        self._check_signal(name, chosen)
        return chosen

    def _check_allowed(self, name: str, chosen: Any, needed: str) -> None:
        assert self.allowed is not None
        if needed not in self.allowed:
            raise ValueError(
                f"Guide site {name!r} has the estimator {chosen!r}, which {self.loss} can't "
                f"honour: its sites get {_words(self.allowed)}. Choose that, or another loss, such "
                "as IWAE."
            )

    def _check_signal(self, name: str, signal: Any) -> None:
        function, options = unwrapped(signal)
        words = getattr(function, "__name__", repr(function))
        if self.target is None:
            raise ValueError(
                f"Guide site {name!r} has the learning signal {words}, but {self.loss} takes none: "
                f"its sites get {_words(self.allowed or ())}. Choose that, or another loss."
            )
        if (objective := _find(_NEED_MORE, function)) is not None:
            raise ValueError(
                f"Guide site {name!r} has the learning signal {words}, which needs more than the "
                f"log-weights. Pass SVI {objective} and leave the site alone."
            )
        target = _find(_TARGETS, function)
        if function is renyi_learning_signal:
            target = float(options.get("alpha", 0.0))
        if target is not None and target != self.target:
            raise ValueError(
                f"Guide site {name!r} has the learning signal {words}, which is for "
                f"{_in_words(target)}, but {self.loss} is for {_in_words(self.target)}, so that "
                "the site would follow another objective. Take a signal for that, or another loss; "
                "where it is meant, write a function around it."
            )

    def note(self, site: Site) -> str | None:
        """Remember what a site has; the key of its learning signal, if it has one of its own."""
        estimator = self.at(site)
        if estimator is None or isinstance(estimator, str):
            self.met.update([estimator] if estimator else [])
            return None
        for key, signal in self.signals.items():
            if signal is estimator:
                return key
        # Guides may make the same function anew at each run: it goes by the name of the site.
        name = site["name"]
        known = self.signals.setdefault(name, estimator)
        if _signature(known) != _signature(estimator):
            raise ValueError(
                f"Guide site {name!r} has the learning signal {estimator!r}, but {known!r} at "
                "another particle. Give a site the same at all particles."
            )
        self.signals[name] = estimator
        return name

    def path_kind(self, site: Site) -> str:
        """Which sites share the coefficients along the path through their draws."""
        return "dreg" if self.at(site) == "dreg" else "pathwise"

    def own_signals(
        self, log_weights: Float[Tensor, " K *batch"]
    ) -> dict[str, Float[Tensor, " K *batch"]]:
        """The learning signals that sites have of their own, at these log-weights."""
        return {key: _signal_at(key, own, log_weights) for key, own in self.signals.items()}


def check_estimator(name: str, chosen: Any) -> None:
    """Refuse what is no estimator of any site."""
    if isinstance(chosen, str) and chosen not in NAMES:
        raise ValueError(
            f"Guide site {name!r} has the estimator {chosen!r}. There are {_words(NAMES)}; a "
            "learning signal, such as vimco_learning_signal; and, for discrete sites, IMLE() and "
            "its like."
        )
    is_estimator = isinstance(chosen, (str, *ESTIMATORS)) or callable(chosen)
    if not is_estimator or isinstance(chosen, type):
        raise TypeError(
            f"Guide site {name!r} needs as its estimator one of {_words(NAMES)}; a learning "
            "signal, which is a function from log-weights [K, *batch] to coefficients of that "
            f"shape; or IMLE() and its like. It has {chosen!r}."
        )


def is_learning_signal(function: Any) -> bool:
    """Whether a function is one of this package's learning signals, with options or without."""
    function, _ = unwrapped(function)
    known = (*_TARGETS, *_NEED_MORE, renyi_learning_signal)
    return any(function is one for one in known)


def is_score_site(site: Site, estimators: SiteEstimators) -> bool:
    estimator = estimators.at(site)
    return estimator == "score" or not (estimator is None or isinstance(estimator, str))


def is_on_path(site: Site, estimators: SiteEstimators) -> bool:
    """Whether the gradient passes through the value of the site."""
    return estimators.at(site) in ("pathwise", "dreg", "stl")


def is_apart(site: Site, estimators: SiteEstimators) -> bool:
    """Whether the gradient of the site's draw has to be told from that of its density."""
    return estimators.at(site) in ("dreg", "stl")


def is_path_draw(site: Site, estimators: SiteEstimators) -> bool:
    """Whether the gradient of the site's draw has to be told from any other."""
    is_split = estimators.splits_path and is_on_path(site, estimators)
    return is_split or is_apart(site, estimators)


def check_observed(trace: Trace) -> None:
    """Refuse an estimator where nothing is drawn."""
    for name, site in samples(trace):
        if site["is_observed"] and own_estimator(site) is not None:
            raise ValueError(
                f"Guide site {name!r} is observed and draws nothing, but has the estimator "
                f"{own_estimator(site)!r}. Leave it out."
            )


class SiteConfig(Messenger):
    """Sets the estimators of sites, by name or by a function of the site."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._choose = config if callable(config) else _by_name(config)
        self._named = set(config) if isinstance(config, Mapping) else set()
        self._met: list[str] = []

    def __enter__(self) -> Any:
        self._met = []
        return super().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        result = super().__exit__(*exception)
        if exception[0] is None:
            _check_names(self._named, self._met)
        return result

    def _pyro_sample(self, msg: Site) -> None:
        if is_subsample(msg):
            return
        self._met.append(msg["name"])
        estimator = self._choose(msg)
        if estimator is not None:
            _check_site(msg, estimator)
            msg["infer"] = {**(msg["infer"] or {}), ESTIMATOR: estimator}


class ChooseAnew(Messenger):
    """Gives sites, by name, other estimators than they have chosen; ``None`` is the loss's own."""

    def __init__(self, choices: Mapping[str, str | None]) -> None:
        super().__init__()
        self._choices = choices

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self._choices:
            msg["infer"] = {**(msg["infer"] or {}), ESTIMATOR: self._choices[msg["name"]]}
            if CARRIED in msg:
                msg["fn"] = msg.pop(CARRIED).fn


def _check_site(site: Site, estimator: Any) -> None:
    check_estimator(site["name"], estimator)
    if site["is_observed"]:
        raise ValueError(
            f"configure_estimators was given {estimator!r} for site {site['name']!r}, which is "
            "observed and draws nothing. Name latent sites only."
        )


def _check_names(named: set[str], met: list[str]) -> None:
    if missing := sorted(named - set(met)):
        raise ValueError(
            f"configure_estimators was given estimators for the sites {missing}, but the guide has "
            f"only {met}. Correct the names, or leave them out."
        )


def check_config(config: Any) -> None:
    """Refuse what is neither estimators by site name nor a function of the site."""
    if isinstance(config, Mapping):
        for name, estimator in config.items():
            if estimator is not None:
                check_estimator(name, estimator)
    elif not callable(config) or is_learning_signal(config):
        raise TypeError(
            "configure_estimators needs config={site name: estimator}, such as {'z': \"dreg\"}, or "
            f"a function from sites to estimators, got {config!r}. For all sites alike there are "
            "the options of the loss; as a decorator it takes config by name."
        )


def _by_name(config: Mapping[str, Any]) -> Callable[[Site], Any]:
    return lambda site: config.get(site["name"])


def _signal_at(name: str, signal: LearningSignal, log_weights: Tensor) -> Tensor:
    value = signal(log_weights)
    shape = getattr(value, "shape", None)
    if shape != log_weights.shape:
        raise ValueError(
            f"The learning signal of guide site {name!r} has to return one coefficient for each "
            f"log-weight, shape {tuple(log_weights.shape)}, but returned "
            f"{type(value).__name__ if shape is None else tuple(shape)}."
        )
    return value.detach()


def unwrapped(signal: Any) -> tuple[Any, dict[str, Any]]:
    """A learning signal without its options, and these."""
    options: dict[str, Any] = {}
    while isinstance(signal, partial):
        options = signal.keywords | options
        signal = signal.func
    return signal, options


def _signature(signal: LearningSignal) -> tuple[Any, ...]:
    """What two versions of the same function have in common."""
    function, options = unwrapped(signal)
    plain = {key: value for key, value in options.items() if isinstance(value, (int, float, str))}
    return getattr(function, "__code__", type(function)), plain


def _find(table: dict[Any, Any], function: Any) -> Any:
    # By identity: what users write need not be hashable.
    return next((entry for key, entry in table.items() if key is function), None)


def _base(fn: Any) -> Any:
    while hasattr(fn, "base_dist") and not isinstance(fn, dist.TransformedDistribution):
        fn = fn.base_dist
    return fn


def _words(names: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _in_words(target: float | str) -> str:
    if isinstance(target, str):
        return target
    return _ORDERS.get(target, f"the bound of order {target:g}")

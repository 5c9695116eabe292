"""Base of the multi-sample objectives: log-weights in, a loss with the right gradient out.

Notation: K = num_particles, R = num_replicates, lw_k = log p(x, z_k) - log q(z_k | x).
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pyro.infer import ELBO
from torch import Tensor

from pyro_gradest.estimators import (
    dreg_weights,
    linear_surrogate,
    renyi_bound,
    renyi_weights,
)
from pyro_gradest.estimators._validation import check_count
from pyro_gradest.infer._credit import Credit
from pyro_gradest.infer._graph import graph_leaves, through_cuts, with_gradient
from pyro_gradest.infer._particles import (
    Particles,
    concatenate,
    refuse_log_weights,
    run_particles,
)
from pyro_gradest.infer._random import (
    OtherRandomNumbersError,
    is_rng_state,
    replayed,
    rng_state,
    set_rng_state,
)
from pyro_gradest.infer._site_estimators import SiteEstimators
from pyro_gradest.infer._trace import Program, trace_particles


class Coefficients(NamedTuple):
    """What the log-probabilities are multiplied by, ``[K, replicates, *batch]``."""

    weights: Tensor
    """b, of log p and, subtracted, of the log q of reparameterised sites."""
    learning_signal: Tensor
    """a, of the log q of score-function sites."""
    signals: dict[str, Tensor]
    """a of the sites with a learning signal of their own, by its key."""
    credits: dict[str, Tensor]
    """a of the sites that have one for what is downstream of each, ``[K, *plates of the site]``."""
    path_weights: Tensor | None = None
    """If there are ``"dreg"`` sites: of the log-weights along the path through their draws."""
    model_weights: Tensor | None = None
    """Of log p other than along the path, if these are not ``weights``."""
    antithetic_signal: Tensor | None = None
    """a once more, at antithetic pairs."""

    def along_path(self, kind: str) -> "Coefficients":
        """Those along the path that starts at the draws of a kind."""
        whole = Coefficients(self.weights, self.learning_signal, self.signals, self.credits)
        moved = self.path_weights
        if kind != "dreg" or moved is None:
            return whole
        # The path moves the weights, those of the score-function sites included.
        return Coefficients(
            moved,
            self.learning_signal - moved,
            {key: signal - moved for key, signal in self.signals.items()},
            self.credits,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "Coefficients":
        """A function of each coefficient."""
        signals, credits = (
            {key: function(one) for key, one in by_site.items()} for by_site in self[2:4]
        )
        others = (None if one is None else function(one) for one in self[4:])
        return Coefficients(
            function(self.weights), function(self.learning_signal), signals, credits, *others
        )


class MultiSampleELBO(ELBO):
    r"""Base of the objectives that weigh K particles against each other.

    A subclass is one function from log-weights to the learning signal a. The loss is the negative
    importance-weighted bound, summed over the elements of the plates common to all sites of model
    and guide, and its gradient that of

    .. math:: -\sum_k b_k \log p(x, z_k) - b_k \log q_{\mathrm{path}} + a_k \log q_{\mathrm{score}}

    with b the self-normalised weights of order alpha, and a and b held constant.

    Args:
        num_particles: K, the number of particles in the bound.
        reparam: What guide sites with a reparameterised sampler get. ``"pathwise"`` differentiates
            through their values; ``"dreg"`` does so doubly reparameterised: the same expectation
            and a signal-to-noise ratio that does not fall with K; ``"stl"`` leaves the score of
            their density out, which is biased for K > 1; ``"score"`` takes the score function at
            every random site. A site may choose for itself, by ``infer={"estimator": ...}`` or
            ``configure_estimators``.
        alpha: Order of the variational Renyi bound, between 0 (the importance-weighted bound) and 1
            (the ELBO, averaged over the particles).
        num_replicates: Number of independent K-particle bounds that are averaged: MIWAE.
        elbo_weight: Between 0 and 1: how much the ELBO counts beside the bound: CIWAE.
        pool_replicates: Whether the model climbs the one bound over the particles of all
            replicates, which is then the loss, while the guide climbs their average: PIWAE. A point
            mass in the guide counts as the model's.
        chunk_size: Run the particles in chunks of this size, so that memory does not grow with
            ``num_particles``. Model and guide run twice instead of once, with the same random
            numbers. (With ``vectorize_particles=True`` these are not the numbers of
            an unchunked run: the generator fills one chunk after the other.)
        max_plate_nesting: As in the host; guessed by a run of both programs if left out.
        max_iarange_nesting: As in the host, deprecated.
        vectorize_particles: As in the host: run all particles at once in a plate, which model and
            guide must be able to broadcast over.
        strict_enumeration_warning: Whether to refuse guide sites configured for enumeration.
            ``False`` samples them.
        ignore_jit_warnings: As in the host.
        jit_options: As in the host.
        retain_graph: As in the host.
        tail_adaptive_beta: As in the host.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option has a value that makes no sense.
    """

    # VIMCO and OVIS leave one particle out.
    _least_particles = 1
    _reparams: tuple[str, ...] = ("pathwise", "dreg", "stl", "score")
    num_auxiliary = 0
    # DisARM alone has a particle be two draws; a second axis of the batch tells them apart.
    _is_antithetic = False
    # RLOO can give a site the credit for what is downstream of it.
    _has_credits = False

    def __init__(
        self,
        num_particles: int,
        *,
        reparam: str = "pathwise",
        alpha: float = 0.0,
        num_replicates: int = 1,
        elbo_weight: float = 0.0,
        pool_replicates: bool = False,
        chunk_size: int | None = None,
        max_plate_nesting: float = math.inf,
        max_iarange_nesting: float | None = None,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: dict | None = None,
        retain_graph: bool | None = None,
        tail_adaptive_beta: float = -1.0,
    ) -> None:
        name = type(self).__name__
        check_count(num_particles, "num_particles", caller=name)
        check_count(num_replicates, "num_replicates", caller=name)
        if chunk_size is not None:
            check_count(chunk_size, "chunk_size", caller=name)
        if num_particles < self._least_particles:
            raise ValueError(
                f"{name} compares each particle with the others and needs num_particles >= "
                f"{self._least_particles}, got {num_particles}. Raise num_particles, or use "
                f"IWAE({num_particles}), which is the ELBO; to average several one-particle bounds "
                "use IWAE(1, num_replicates=...)."
            )
        if not 0 <= alpha <= 1:
            raise ValueError(
                f"{name} needs 0 <= alpha <= 1, got {alpha}: 0 is the importance-weighted bound, 1 "
                "the ELBO, and beyond them the estimate is no lower bound or has no finite "
                "variance."
            )
        if not 0 <= elbo_weight <= 1:
            raise ValueError(
                f"{name} needs 0 <= elbo_weight <= 1, got {elbo_weight}: 0 is the bound over "
                "particles, 1 the ELBO."
            )
        if reparam not in self._reparams:
            choices = " or ".join(f'"{choice}"' for choice in self._reparams)
            raise ValueError(f"{name} needs reparam={choices}, got {reparam!r}.")
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            max_iarange_nesting=max_iarange_nesting,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
            ignore_jit_warnings=ignore_jit_warnings,
            jit_options=jit_options,
            retain_graph=retain_graph,
            tail_adaptive_beta=tail_adaptive_beta,
        )
        self.reparam = reparam
        self.alpha = alpha
        self.num_replicates = num_replicates
        self.elbo_weight = elbo_weight
        self.pool_replicates = pool_replicates
        self.chunk_size = chunk_size

    @abstractmethod
    def _learning_signal(
        self,
        program: Program,
        log_weights: Float[Tensor, " K *batch"],
        auxiliary_log_weights: Float[Tensor, " S *batch"] | None,
    ) -> Float[Tensor, " K *batch"]:
        """Full coefficient of grad log q at score-function sites."""

    def _bound(self, log_weights: Float[Tensor, " K *batch"]) -> Float[Tensor, " *batch"]:
        """What the negative loss is, for each element of the common plates."""
        if self.pool_replicates:
            replicates = log_weights.shape[1:]
            log_weights = log_weights.reshape(-1, *replicates[1:])
            return self._mixed(partial(renyi_bound, log_weights)).expand(replicates)
        return self._mixed(partial(renyi_bound, log_weights))

    def _weights(self, log_weights: Float[Tensor, " K *batch"]) -> Float[Tensor, " K *batch"]:
        """b, the coefficient of grad log p."""
        return self._mixed(partial(renyi_weights, log_weights))

    def _path_weights(self, log_weights: Float[Tensor, " K *batch"]) -> Float[Tensor, " K *batch"]:
        """Under ``"dreg"``: coefficient of the log-weights along the path through the draws."""
        return self._mixed(partial(dreg_weights, log_weights))

    def _mixed(self, of_order: Callable[..., Tensor]) -> Tensor:
        """What ``of_order`` is at the order alpha, and for the ELBO, by their weights."""
        if self.elbo_weight == 0:
            return of_order(alpha=self.alpha)
        of_elbo = of_order(alpha=1.0)
        if self.elbo_weight == 1:
            return of_elbo
        return (1 - self.elbo_weight) * of_order(alpha=self.alpha) + self.elbo_weight * of_elbo

    @property
    def _signal_target(self) -> float | str | None:
        """What learning signals of sites have to be for: the bound of this order, if of one."""
        if self.elbo_weight == 0:
            return float(self.alpha)
        return 1.0 if self.elbo_weight == 1 else None

    def _own_signals(
        self, estimators: SiteEstimators, log_weights: Float[Tensor, " K *batch"]
    ) -> dict[str, Float[Tensor, " K *batch"]]:
        """Full coefficients of grad log q at sites that have a learning signal of their own."""
        return estimators.own_signals(log_weights)

    def _coefficients(
        self,
        program: Program,
        log_weights: Float[Tensor, " K *batch"],
        auxiliary_log_weights: Float[Tensor, " S *batch"] | None,
    ) -> Coefficients:
        has_dreg = "dreg" in program.estimators.met
        return Coefficients(
            weights=self._weights(log_weights),
            learning_signal=self._learning_signal(program, log_weights, auxiliary_log_weights),
            signals=self._own_signals(program.estimators, log_weights),
            credits={},
            path_weights=self._path_weights(log_weights) if has_dreg else None,
            model_weights=self._pooled_weights(log_weights) if self.pool_replicates else None,
        )

    def _signals_of_credits(
        self, credits: dict[str, Credit]
    ) -> dict[str, Float[Tensor, " runs *plates"]]:
        """Full coefficients of grad log q at sites with a signal of what is downstream of each."""
        return {}

    def _pooled_weights(
        self, log_weights: Float[Tensor, " K *batch"]
    ) -> Float[Tensor, " K *batch"]:
        of_all = self._weights(log_weights.reshape(-1, *log_weights.shape[2:]))
        return self.num_replicates * of_all.reshape(log_weights.shape)

    @property
    def _is_weighted(self) -> bool:
        num_pooled = self.num_replicates if self.pool_replicates else 1
        return self.num_particles * num_pooled > 1 and self.alpha != 1 and self.elbo_weight != 1

    def _further_surrogate(
        self, program: Program, log_weights: Float[Tensor, " K *batch"]
    ) -> Float[Tensor, ""] | float:
        """A further term whose gradient is added; its value is not. Once at the end of a step."""
        return 0.0

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Negative bound in nats, without gradient.

        Args:
            model: Pyro model.
            guide: Pyro guide.
            args: Arguments of model and guide.
            kwargs: Keyword arguments of model and guide.

        Returns:
            The loss as a float. At one seed it equals that of :meth:`loss_and_grads`.

        Raises:
            ValueError: As :meth:`loss_and_grads`.
        """
        with torch.no_grad():
            particles = _repeated_if_need_be(
                lambda program: self._weigh(program, self._num_runs, []),
                program_of(self, model, guide, args, kwargs),
            )
            loss = -self._total_bound(particles).item()
        _check_loss(loss, particles)
        return loss

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Float[Tensor, ""]:
        """Negative bound in nats, whose gradient is that of the estimator.

        Args:
            model: Pyro model.
            guide: Pyro guide.
            args: Arguments of model and guide.
            kwargs: Keyword arguments of model and guide.

        Returns:
            A scalar tensor for ``backward``, as ``elbo(model, guide)(*args)`` returns it.

        Raises:
            ValueError: As :meth:`loss_and_grads`.
        """
        return self._loss_and_value(model, guide, args, kwargs)[0]

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Negative bound in nats; adds the gradient to the parameters' ``grad``.

        Args:
            model: Pyro model.
            guide: Pyro guide.
            args: Arguments of model and guide.
            kwargs: Keyword arguments of model and guide.

        Returns:
            The loss as a float.

        Raises:
            ValueError: If model and guide do not match, a site is enumerated, a shape does not fit
                its plate, a plate that is not common to all sites is subsampled, or a
                log-probability is NaN. All before any gradient is formed.
            NotImplementedError: If a guide site samples by rejection.
        """
        return self._loss_and_log_weights(model, guide, args, kwargs)[0]

    def _loss_and_log_weights(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[float, Float[Tensor, " K replicates *batch"]]:
        """Runs backward, and returns the log-weights that it did so with."""
        loss, value, log_weights = self._loss_and_value(model, guide, args, kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return value, log_weights

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
        return trace_particles(program_of(self, model, guide, args, kwargs), 1)

    def _loss_and_value(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Float[Tensor, ""], float, Float[Tensor, " K replicates *batch"]]:
        program = program_of(self, model, guide, args, kwargs)
        loss, *runs = _repeated_if_need_be(self._estimate, program)
        value = loss.item()
        _check_loss(value, *runs)
        return loss, value, self._by_replicate(runs[0].log_weights).detach()

    def _estimate(self, program: Program) -> tuple[Any, ...]:
        """The loss, and the particles that it was made from."""
        program = program._replace(has_credits=self._has_credits)
        chunks: list[_Chunk] = []
        if self.chunk_size is None:
            particles = run_particles(program, self._num_runs)
        else:
            with torch.no_grad():
                particles = self._weigh(program, self._num_runs, chunks)
        log_weights = self._by_replicate(particles.log_weights)
        auxiliary, others = None, []
        if self.num_auxiliary:
            with torch.no_grad():
                runs = self.num_auxiliary * self.num_replicates
                others.append(self._weigh(program, runs, []))
                auxiliary = self._by_replicate(others[0].log_weights)

        scale = particles.bound_scale / self.num_replicates
        coefficients = self._coefficients(program, log_weights, auxiliary)
        coefficients = coefficients.map(lambda one: scale * one.reshape(scale.shape))
        coefficients = coefficients._replace(credits=self._signals_of_credits(particles.credits))
        if self.chunk_size is None:
            surrogate = _surrogate(particles, coefficients)
        else:
            surrogate = _surrogate_by_chunk(program, chunks, coefficients)
        surrogate = surrogate + self._further_surrogate(program, log_weights)
        # The second term is exactly zero: it brings the gradient and leaves the value alone.
        loss = -(self._total_bound(particles) + (surrogate - surrogate.detach()))
        return loss, particles, *others

    def _weigh(self, program: Program, num_runs: int, chunks: list["_Chunk"]) -> Particles:
        """Run particles in chunks if so configured, and append to ``chunks`` how to repeat them."""
        runs = []
        for first in range(0, num_runs, self.chunk_size or num_runs):
            # The first chunk draws the subsamples, and has to draw them when it is repeated.
            subsamples = dict(program.subsamples)
            before = rng_state()
            size = min(self.chunk_size or num_runs, num_runs - first)
            runs.append(run_particles(program, size))
            chunks.append(_Chunk(size, subsamples, before, rng_state()))
        return concatenate(runs)

    def _total_bound(self, particles: Particles) -> Float[Tensor, ""]:
        bound = self._bound(self._by_replicate(particles.log_weights)).mean(dim=0)
        return (particles.bound_scale[0] * bound).sum()

    def _by_replicate(
        self, log_weights: Float[Tensor, " runs *batch"]
    ) -> Float[Tensor, " K replicates *batch"]:
        return log_weights.reshape(-1, self.num_replicates, *log_weights.shape[1:])

    @property
    def _num_runs(self) -> int:
        return self.num_particles * self.num_replicates


def program_of(elbo: Any, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Program:
    """What ``elbo`` runs on a model and a guide; guesses ``max_plate_nesting`` if need be."""
    if elbo.vectorize_particles and elbo.max_plate_nesting == math.inf:
        # Guessing runs both programs; the random numbers of the step must not depend on it.
        with replayed(rng_state()):
            elbo._guess_max_plate_nesting(model, guide, args, kwargs)
    host_counts_particles = elbo.vectorize_particles and elbo.num_particles > 1
    return Program(
        model=model,
        guide=guide,
        args=args,
        kwargs=kwargs,
        estimators=SiteEstimators.of(elbo),
        is_weighted=getattr(elbo, "_is_weighted", elbo.num_particles > 1),
        vectorize_particles=elbo.vectorize_particles,
        max_plate_nesting=elbo.max_plate_nesting - host_counts_particles,
        refuse_enumeration=elbo.strict_enumeration_warning,
        subsamples={},
        is_antithetic=getattr(elbo, "_is_antithetic", False),
    )


class _Chunk(NamedTuple):
    """How to run some particles once more."""

    size: int
    subsamples: dict[str, Tensor]
    before: list[Tensor]
    """State of the random number generators before the run."""
    after: list[Tensor]


def _repeated_if_need_be(run: Callable[[Program], Any], program: Program) -> Any:
    start = rng_state()
    try:
        return run(program)
    except OtherRandomNumbersError:
        # A first run that creates parameters draws their initial values too; now they exist.
        set_rng_state(start)
        return run(program._replace(subsamples={}))


def _surrogate_by_chunk(
    program: Program, chunks: Iterable[_Chunk], coefficients: Coefficients
) -> Float[Tensor, ""]:
    """A scalar with the gradient of all chunks' surrogates, of which one is alive at a time."""
    gradients: dict[Tensor, Tensor] = {}
    first = 0
    for chunk in chunks:
        part = slice(first, first + chunk.size)
        first += chunk.size
        particles = _rerun(program, chunk)
        copies = [cut.copy for path in particles.paths for cut in path]
        surrogate = _surrogate(particles, coefficients.map(itemgetter(part)))
        for leaf, gradient in _gradients_at_leaves(surrogate, but=copies):
            gradients[leaf] = gradients[leaf] + gradient if leaf in gradients else gradient
    products = [with_gradient(leaf, gradient) for leaf, gradient in gradients.items()]
    return torch.stack(products).sum() if products else torch.zeros(())


def _gradients_at_leaves(
    surrogate: Tensor, *, but: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    leaves = graph_leaves(surrogate, but=but)
    if not leaves:
        return iter(())
    # What the arguments were computed from is common to all chunks and has to stay.
    return zip(leaves, torch.autograd.grad(surrogate, leaves, retain_graph=True), strict=True)


def _rerun(program: Program, chunk: _Chunk) -> Particles:
    with replayed(chunk.before):
        particles = run_particles(program._replace(subsamples=dict(chunk.subsamples)), chunk.size)
        if not is_rng_state(chunk.after):
            raise OtherRandomNumbersError(
                "With chunk_size, model and guide are run again with the same random state, but "
                "they drew a different number of random values. Make them draw the same values at "
                "each call, or leave chunk_size out."
            )
    return particles


def _surrogate(particles: Particles, coefficients: Coefficients) -> Tensor:
    surrogate = _linear(particles, coefficients)
    along_path = particles._replace(log_q_path=particles.log_q_path + particles.log_q_draw)
    for kind in sorted({cut.kind for path in particles.paths for cut in path}):
        moved = _linear(along_path, coefficients.along_path(kind))
        surrogate = surrogate + through_cuts(moved, particles.paths, kind=kind)
    return surrogate


def _linear(particles: Particles, coefficients: Coefficients) -> Float[Tensor, ""]:
    log_p, nothing = particles.log_p, torch.zeros_like(particles.log_p)
    surrogate = signal_surrogate(particles, coefficients.signals)
    for site, credit in particles.credits.items():
        none = torch.zeros_like(credit.log_q)
        surrogate = surrogate + _total(none, none, credit.log_q, none, coefficients.credits[site])
    if coefficients.model_weights is not None:
        surrogate = surrogate + _total(log_p, nothing, nothing, coefficients.model_weights, nothing)
        log_p = nothing
    if (signal := coefficients.antithetic_signal) is not None:
        surrogate = surrogate + _total(nothing, nothing, particles.antithetic, nothing, signal)
    return surrogate + _total(
        log_p,
        particles.log_q_path,
        particles.log_q_score,
        coefficients.weights,
        coefficients.learning_signal,
    )


def signal_surrogate(
    particles: Particles, signals: dict[str, Float[Tensor, " K *batch"]]
) -> Float[Tensor, ""] | float:
    """What sites with a learning signal of their own add to the surrogate."""
    nothing = torch.zeros_like(particles.log_p)
    terms = [
        _total(nothing, nothing, log_q, nothing, signals[key])
        for key, log_q in particles.log_q_signals.items()
    ]
    return sum(terms, 0.0)


def _total(
    log_p: Tensor, log_q_path: Tensor, log_q_score: Tensor, weights: Tensor, signal: Tensor
) -> Float[Tensor, ""]:
    return linear_surrogate(
        log_p, log_q_path, log_q_score, weights=weights, learning_signal=signal
    ).sum()


def _check_loss(loss: float, *runs: Particles) -> None:
    """Refuse a loss that is no number; warn where no particle has any weight."""
    if math.isnan(loss) or loss == -math.inf:
        refuse_log_weights(*runs)
    if loss == math.inf:
        warnings.warn(
            "Every particle has zero weight for some of the data, so the bound is -inf; these data "
            "contribute no gradient. Widen the guide, or raise num_particles.",
            stacklevel=4,
        )

"""The five classic faults, put in by hand: each must be caught by the exact check of the bias.

A check that cannot fail proves nothing. Every fault here has been found in a published
implementation; the check is the one of ``test_enumeration_elbo.py``.
"""

from importlib import import_module

import pytest

from tests.conformance.objectives import check_bias, evaluate


class Mutant:
    """A package whose functions can be replaced for the length of a test."""

    def __init__(self, backend, monkeypatch):
        self.backend = backend
        self._monkeypatch = monkeypatch
        self._package = f"{backend.host}_gradest"

    def module(self, path):
        return import_module(f"{self._package}.{path}")

    def replace(self, path, name, new):
        """Put ``new(original)`` in the place of a name that a module has."""
        module = self.module(path)
        self._monkeypatch.setattr(module, name, new(getattr(module, name)))

    def set_property(self, cls, name, getter):
        self._monkeypatch.setattr(cls, name, property(getter))


def signal_not_detached(mutant):
    """The learning signal keeps its history, and is differentiated a second time."""
    particles = mutant.module("infer._particles").Particles
    mutant.set_property(particles, "log_weights", lambda p: p.log_p - p.log_q_path - p.log_q_score)
    for module in ("vimco", "renyi"):
        mutant.replace(
            f"estimators.multisample.{module}",
            "as_log_weights",
            lambda original: lambda log_weights, **options: log_weights,
        )
    mutant.replace(
        "estimators.multisample.surrogate",
        "_weighted",
        lambda original: lambda coefficient, log_prob: coefficient * log_prob,
    )
    # Pyro's loss contains the bound itself: what is left attached is the signal alone.
    mutant.replace(
        "infer.multisample_elbo",
        "renyi_bound",
        lambda original: (
            lambda log_weights, **options: original(mutant.backend.detach(log_weights), **options)
        ),
    )


def log_q_counted_twice(mutant):
    """log q of the score-function sites is differentiated inside the weight as well."""

    def count_twice(original):
        def surrogate(log_p, log_q_path, log_q_score, **coefficients):
            return original(log_p, log_q_path + log_q_score, log_q_score, **coefficients)

        return surrogate

    mutant.replace("infer.multisample_elbo", "linear_surrogate", count_twice)


def own_weight_left_out(mutant):
    """The coefficient lacks -v_k, the derivative of the bound through the particle's own q."""

    def without_weight(original):
        def signal(log_weights, **options):
            weights = mutant.backend.estimators.normalized_weights(log_weights)
            return original(log_weights, **options) + weights

        return signal

    mutant.replace("infer.vimco", "renyi_learning_signal", without_weight)


def scale_inside_the_log_mean_exp(mutant):
    """N/B multiplies the log-weights instead of the bound."""

    def scale_log_weights(original):
        def run(*args):
            particles = original(*args)
            scale = particles.bound_scale
            return particles._replace(
                log_p=scale * particles.log_p,
                log_q_path=scale * particles.log_q_path,
                log_q_score=scale * particles.log_q_score,
                bound_scale=scale / scale,
            )

        return run

    name = "run_particles" if mutant.backend.host == "pyro" else "run_particle"
    mutant.replace("infer.multisample_elbo", name, scale_log_weights)


def auxiliary_draws_in_the_bound(mutant):
    """The bound that the signal compares with has the auxiliary draws in it too."""

    def leak(original):
        def signal(log_weights, auxiliary, **options):
            together = mutant.backend.concatenate([log_weights, auxiliary])
            return original(together, auxiliary, **options)[: len(log_weights)]

        return signal

    mutant.replace("infer.ovis", "ovis_mc_learning_signal", leak)


FAULTS = [
    (signal_not_detached, "categorical", "vimco-geometric-K3"),
    (log_q_counted_twice, "categorical", "vimco-geometric-K3"),
    (own_weight_left_out, "categorical", "vimco-geometric-K3"),
    (scale_inside_the_log_mean_exp, "subsampled_plate", "vimco-geometric-K2"),
    (auxiliary_draws_in_the_bound, "categorical", "ovis-mc-K2-S2"),
]


@pytest.mark.parametrize(
    ("fault", "program", "objective"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS]
)
def test_fault_is_caught(backend, monkeypatch, fault, program, objective):
    # Evaluated anew: elsewhere the gradients of a healthy package are kept.
    def gradients():
        return evaluate.__wrapped__(backend.host, program, objective).gradients

    check_bias(gradients(), program, objective)
    fault(Mutant(backend, monkeypatch))
    with pytest.raises(AssertionError, match="bias"):
        check_bias(gradients(), program, objective)

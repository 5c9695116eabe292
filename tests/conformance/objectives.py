"""The ELBO classes with their oracles, and the checks of their value, bias and covariance."""

from functools import cache, partial

import numpy as np

from tests.conformance import programs
from tests.conformance.backends import backend_for
from tests.conformance.replay import evaluations, every_tuple
from tests.oracles import enumeration
from tests.oracles import multisample as oracle


class Objective:
    """An ELBO class with its options, and the oracle of its learning signal."""

    def __init__(self, name, signal, *, num_particles, bias=0.0, alpha=0.0, **options):
        self.name = name
        self.num_particles = num_particles
        self.num_auxiliary = options.get("num_auxiliary", 0)
        self.num_replicates = options.get("num_replicates", 1)
        self.signal = signal
        # The multiple of E[sum_k v_k h_k] that is added to the bound's gradient; None where it is
        # not the gradient of a bound at all.
        self.gamma = bias
        self.alpha = alpha
        self.weights = partial(oracle.renyi_weights, alpha=alpha)
        self.is_bound = True
        self.options = options

    @property
    def num_draws(self):
        return self.num_replicates * (self.num_particles + self.num_auxiliary)

    def build(self, package, **host_arguments):
        return getattr(package, self.name)(self.num_particles, **self.options, **host_arguments)


def renyi(name, K, alpha, control_variate, **options):
    """The same classes at another order than that of the importance-weighted bound."""
    signal = partial(oracle.renyi_learning_signal, alpha=alpha, control_variate=control_variate)
    objective = Objective(name, signal, num_particles=K, alpha=alpha, **options)
    objective.options = {"alpha": alpha, **options}
    return objective


def rloo(K, **options):
    signal = oracle.reinforce_leave_one_out_learning_signal
    return Objective("RLOO", signal, num_particles=K, alpha=1.0, **options)


def tvo(K, partition, **options):
    """Its bias falls with K, see test_tvo; with one interval it is the ELBO's, and unbiased."""
    objective = Objective(
        "TVO",
        partial(oracle.thermodynamic_learning_signal, partition=partition),
        num_particles=K,
        bias=None if len(partition) > 1 else 0.0,
        alpha=1.0,
        partition=partition,
        **options,
    )
    objective.weights = partial(oracle.thermodynamic_weights, partition=partition)
    objective.is_bound = len(partition) == 1
    return objective


def iwae(K, **options):
    return Objective("IWAE", oracle.reinforce_learning_signal, num_particles=K, **options)


def vimco(K, leave_one_out, **options):
    bias = None if options.get("reparam") == "score" else 0.0  # see discrete_then_scored
    signal = partial(oracle.vimco_learning_signal, leave_one_out=leave_one_out)
    return Objective(
        "VIMCO", signal, num_particles=K, bias=bias, leave_one_out=leave_one_out, **options
    )


def ovis(K, gamma, **options):
    signal = partial(oracle.ovis_gamma_learning_signal, gamma=gamma)
    return Objective("OVIS", signal, num_particles=K, bias=gamma, gamma=gamma, **options)


def ovis_mc(K, S, *, alpha=0.0, **options):
    signal = partial(oracle.ovis_mc_learning_signal, alpha=alpha)
    objective = Objective("OVIS", signal, num_particles=K, alpha=alpha, num_auxiliary=S, **options)
    objective.options = {"alpha": alpha, **objective.options}
    return objective


def wake_sleep(K, **options):
    return Objective(
        "ReweightedWakeSleep",
        oracle.wake_phi_learning_signal,
        num_particles=K,
        bias=None,
        **options,
    )


OBJECTIVES = {
    "iwae-K3": iwae(3),
    "vimco-geometric-K3": vimco(3, "geometric"),
    "vimco-arithmetic-K3": vimco(3, "arithmetic"),
    "ovis-gamma0-K3": ovis(3, 0.0),
    "ovis-gamma0.5-K3": ovis(3, 0.5),
    "ovis-gamma1-K3": ovis(3, 1.0),
    "ovis-mc-K3-S1": ovis_mc(3, 1),
    "ovis-mc-K2-S2": ovis_mc(2, 2),
    "wake-sleep-K3": wake_sleep(3),
    "iwae-K1": iwae(1),
    "iwae-K2": iwae(2),
    "vimco-geometric-K2": vimco(2, "geometric"),
    "ovis-gamma0.5-K2": ovis(2, 0.5),
    "ovis-mc-K2-S1": ovis_mc(2, 1),
    "wake-sleep-K2": wake_sleep(2),
    "iwae-K1-R3": iwae(1, num_replicates=3),
    "vimco-geometric-K2-R2": vimco(2, "geometric", num_replicates=2),
    "ovis-mc-K2-S1-R2": ovis_mc(2, 1, num_replicates=2),
    "vimco-geometric-K2-score": vimco(2, "geometric", reparam="score"),
    "iwae-alpha-K2": renyi("IWAE", 2, 0.4, "none"),
    "vimco-alpha-K3": renyi("VIMCO", 3, 0.4, "geometric"),
    "ovis-alpha-K2": renyi("OVIS", 2, 0.4, "asymptotic"),
    "ovis-mc-alpha-K2-S1": ovis_mc(2, 1, alpha=0.4),
    "rloo-K3": rloo(3),
    "rloo-K2": rloo(2),
    "tvo-elbo-K3": tvo(3, [0.0]),
    "tvo-K3": tvo(3, [0.0, 0.2, 0.5]),
    "tvo-K2": tvo(2, [0.0, 0.2, 0.5]),
    "vimco-elbo-K2": renyi("VIMCO", 2, 1.0, "arithmetic", leave_one_out="arithmetic"),
}


@cache
def program_for(name):
    return getattr(programs, name)()


@cache
def evaluate(host, program, objective, particles="vmap"):
    """The class's loss and gradient at every tuple."""
    objective = OBJECTIVES[objective]
    return evaluations(
        host,
        partial(objective.build, backend_for(host).package),
        program_for(program),
        every_tuple(program_for(program), objective.num_draws),
        particles=particles,
    )


@cache
def probabilities(program, objective):
    return enumeration.tuple_probabilities(
        program_for(program).problem, OBJECTIVES[objective].num_draws
    )


def moments_by_oracle(program, objective):
    objective_ = OBJECTIVES[objective]
    gradients = enumeration.estimator_gradients(
        program_for(program).problem,
        objective_.num_particles,
        objective_.signal,
        objective_.weights,
        num_auxiliary=objective_.num_auxiliary,
        num_replicates=objective_.num_replicates,
    )
    return enumeration.moments(gradients, probabilities(program, objective))


def assert_equal(actual, desired, what=""):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-10, err_msg=what)


def bound_of(objective):
    return partial(enumeration.renyi_log_mean_exp, alpha=OBJECTIVES[objective].alpha)


def check_bias(gradients, program, objective):
    """Unbiased for the bound; or biased by exactly gamma times the wake-phi gradient."""
    mean = probabilities(program, objective) @ gradients
    problem, K = program_for(program).problem, OBJECTIVES[objective].num_particles
    bias = mean - enumeration.exact_gradient(problem, K, bound_of(objective))
    gamma = OBJECTIVES[objective].gamma
    expected = 0.0
    if gamma:
        wake_phi = oracle.wake_phi_learning_signal
        expected = gamma * enumeration.expected_score(problem, K, wake_phi)
    assert_equal(bias, expected, "bias")


def check_moments(gradients, program, objective):
    """Exact mean and covariance, those of the estimator as it is defined."""
    actual = enumeration.moments(gradients, probabilities(program, objective))
    desired = moments_by_oracle(program, objective)
    assert_equal(actual.mean, desired.mean, "mean")
    assert_equal(actual.covariance, desired.covariance, "covariance")


def check_value(losses, program, objective):
    """The loss is minus the bound; tuples without weight are not part of the objective."""
    problem = program_for(program).problem
    K = OBJECTIVES[objective].num_particles
    bound = enumeration.expected_bound(problem, problem.params, K, bound_of(objective))
    losses = np.where(np.isposinf(losses), 0.0, losses)
    assert_equal(-losses @ probabilities(program, objective), bound, "value")

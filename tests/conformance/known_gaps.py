"""Accepted differences between the twins, each with its reason.

A row names the public object below its package, says what differs in the words of
``test_parity.py``, and why the hosts force it. A row whose difference has gone fails the tests.
"""

from typing import NamedTuple


class Gap(NamedTuple):
    name: str
    difference: str
    reason: str


_ELBO = "infer.multisample_elbo.MultiSampleELBO"
_AUTO_IMPLICIT = "infer.auto_implicit.AutoImplicit"
_DISCRETE = "estimators.discrete"
_DRAWS = (
    f"{_DISCRETE}.perturb_and_map.perturb_and_map",
    f"{_DISCRETE}.imle.IMLE.sample",
    f"{_DISCRETE}.adaptive_imle.AdaptiveIMLE.sample",
    *(
        f"{_DISCRETE}.straight_through.{name}.sample"
        for name in ("StraightThrough", "GumbelSoftmaxST", "ReinMax", "SIMPLE")
    ),
    *(
        f"{_DISCRETE}.noise.{name}.sample_like"
        for name in ("Noise", "GumbelNoise", "LogisticNoise", "GaussianNoise", "SumOfGammaNoise")
    ),
)
_RUNS = (
    "infer.importance_samples.importance_samples",
    "diagnostics.implicit_fit.check_implicit_fit",
)

KNOWN_GAPS = [
    # The constructor accepts every argument of the host's own ELBO, and no other.
    Gap(
        _ELBO,
        "default of vectorize_particles",
        "Each host's own default: Pyro vectorises by broadcasting, which a model must be written "
        "for; NumPyro by vmap, which needs nothing of it.",
    ),
    Gap(
        _ELBO,
        "annotation of vectorize_particles",
        "NumPyro also takes a callable (fn, keys) -> stacked; Pyro's programs have no keys to map.",
    ),
    Gap(
        _ELBO,
        "parameter max_plate_nesting only in pyro_gradest",
        "Pyro places the particle plate left of all plates; vmap needs no plate.",
    ),
    Gap(
        _ELBO,
        "parameter max_iarange_nesting only in pyro_gradest",
        "Pyro's deprecated name of max_plate_nesting.",
    ),
    Gap(
        _ELBO,
        "parameter strict_enumeration_warning only in pyro_gradest",
        "NumPyro's objectives have no such switch: enumerated sites always raise.",
    ),
    Gap(
        _ELBO,
        "parameter ignore_jit_warnings only in pyro_gradest",
        "For torch.jit.trace; jax.jit gives no such warnings.",
    ),
    Gap(_ELBO, "parameter jit_options only in pyro_gradest", "For torch.jit.trace."),
    Gap(
        _ELBO,
        "parameter retain_graph only in pyro_gradest",
        "JAX differentiates functions and keeps no graph.",
    ),
    Gap(
        _ELBO,
        "parameter tail_adaptive_beta only in pyro_gradest",
        "An argument of Pyro's ELBO alone.",
    ),
    # What SVI calls in Pyro, whose own base class does not name it.
    *(
        Gap(
            objective,
            f"member {member} only in pyro_gradest",
            "Pyro's SVI asks the objective to run backward; NumPyro's differentiates the loss.",
        )
        for objective in (
            _ELBO,
            "infer.implicit_elbo.ImplicitELBO",
            "infer.semi_implicit_elbo.SemiImplicitELBO",
        )
        for member in ("loss", "loss_and_grads", "differentiable_loss")
    ),
    Gap(
        "",
        "public infer._graph only in pyro_gradest",
        "torch keeps a graph to walk; JAX traces functions, and a jaxpr says what they need.",
    ),
    Gap(
        "",
        "public infer._modules only in pyro_gradest",
        "Pyro's programs may be modules that hold their parameters; NumPyro's are functions.",
    ),
    Gap(
        "",
        "public infer._random only in pyro_gradest",
        "torch's generators have a state, from which numbers are drawn again; JAX has keys.",
    ),
    # The ready implicit guide takes what the host's autoguides take.
    Gap(
        _AUTO_IMPLICIT,
        "parameter prefix only in numpyro_gradest",
        "NumPyro's autoguides name their sites by a prefix, Pyro's by the module.",
    ),
    Gap(
        _AUTO_IMPLICIT,
        "default of init_loc_fn",
        "Each host has its own init_to_median.",
    ),
    # Each objective hands the host's arguments on: Pyro's eight together, NumPyro's one by name.
    *(
        Gap(objective, difference, "The host arguments of MultiSampleELBO, handed on.")
        for objective in (
            "infer.disarm.DisARM",
            "infer.implicit_elbo.ImplicitELBO",
            "infer.iwae.IWAE",
            "infer.nvil.NVIL",
            "infer.ovis.OVIS",
            "infer.reweighted_wake_sleep.ReweightedWakeSleep",
            "infer.rloo.RLOO",
            "infer.semi_implicit_elbo.SemiImplicitELBO",
            "infer.tvo.TVO",
            "infer.vimco.VIMCO",
        )
        for difference in (
            "parameter host_options only in pyro_gradest",
            "parameter vectorize_particles only in numpyro_gradest",
        )
    ),
    Gap(
        "infer.nvil.NVIL",
        "member with_baseline only in numpyro_gradest",
        "NumPyro finds parameters and mutable state by running model and guide, so that the "
        "objective's own have to be in the guide; Pyro keeps them in its parameter store.",
    ),
    # Directions that are drawn.
    Gap(
        "estimators.score.sliced_wasserstein.sliced_wasserstein",
        "parameter key only in numpyro_gradest",
        "JAX's random numbers come from an explicit key.",
    ),
    Gap(
        "estimators.score.sliced_wasserstein.sliced_wasserstein",
        "parameter generator only in pyro_gradest",
        "torch's random numbers come from a generator, its own if none is named.",
    ),
    # Discrete sites.
    *(
        Gap(
            name,
            difference,
            "Pyro's backward pass updates the state; in JAX only the optimizer sees a gradient.",
        )
        for name, difference in (
            ("", "export adapt_imle only in numpyro_gradest"),
            ("", "public handlers.imle.adapt_imle only in numpyro_gradest"),
            ("handlers", "export adapt_imle only in numpyro_gradest"),
        )
    ),
    Gap(
        "distributions.one_hot_categorical.OneHotCategorical",
        "member probs only in numpyro_gradest",
        "Pyro's own class, of which ours is a kind, has it; NumPyro has no such class.",
    ),
    # Draws of discrete states.
    *(
        Gap(function, difference, reason)
        for function in _DRAWS
        for difference, reason in {
            "parameter key only in numpyro_gradest": "JAX's random numbers come from a key.",
            "parameter generator only in pyro_gradest": "torch's come from a generator.",
        }.items()
    ),
    # Gradients that are measured.
    *(
        Gap(f"diagnostics.gradient_statistics.{function}", difference, reason)
        for function in ("gradient_statistics", "compare_estimators")
        for difference, reason in {
            "parameter rng_key only in numpyro_gradest": "NumPyro's random numbers come from an "
            "explicit key.",
            "parameter params only in numpyro_gradest": "Pyro's parameters are in its store.",
        }.items()
    ),
    Gap(
        "diagnostics.gradient_statistics.gradient_statistics",
        "parameter seed only in pyro_gradest",
        "Stands for NumPyro's key: the draws are repeatable, and torch's generator left alone.",
    ),
    Gap(
        "diagnostics.gradient_statistics.gradient_statistics",
        "parameter batch_size only in numpyro_gradest",
        "Pyro's losses run backward themselves, one gradient at a time.",
    ),
    # Steps that are measured.
    *(
        Gap(
            "diagnostics.training_monitor.TrainingMonitor",
            f"member {member}",
            "Each host's own step. Pyro's has happened when it returns and is recorded at once; "
            "NumPyro's is a pure function of its state, and what it returns is recorded outside.",
        )
        for member in (
            "step only in pyro_gradest",
            "update only in numpyro_gradest",
            "record only in numpyro_gradest",
        )
    ),
    # Functions that draw from a fitted guide.
    *(
        Gap(function, difference, reason)
        for function in _RUNS
        for difference, reason in {
            "parameter rng_key only in numpyro_gradest": "NumPyro's random numbers come from an "
            "explicit key, Pyro's from torch's generator.",
            "parameter params only in numpyro_gradest": "NumPyro's SVI returns the parameters; "
            "Pyro keeps them in its parameter store.",
            "parameter max_plate_nesting only in pyro_gradest": "As for the objectives: where the "
            "particle plate goes.",
            "parameter vectorize_particles only in pyro_gradest": "NumPyro always maps over keys; "
            "Pyro vectorises only programs that broadcast.",
        }.items()
    ),
]

"""Which elements share a weight: plates, subsampling, scales and masks."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import plate, poutine, sample

from tests.pyro.definition import Case, assert_follows_definition

X = torch.tensor([0.9, -0.4, 0.1])
GRID = torch.tensor([[0.9, -0.4, 0.1], [0.3, 1.2, -0.8]])


def weight():
    return pyro.param("weight", torch.tensor(0.8))


def logits(*shape):
    return pyro.param("logits", lambda: torch.linspace(-0.9, 0.7, math.prod(shape)).view(shape))


# --- common plates -------------------------------------------------------------------------------


def one_plate():
    def model():
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=X)

    def guide():
        with plate("data", 3):
            sample("z", dist.Bernoulli(logits=logits(3)))

    return Case(model, guide, common_dims=(-1,))


def two_plates_entered_in_either_order():
    def model():
        with plate("rows", 2, dim=-2), plate("columns", 3, dim=-1):
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=GRID)

    def guide():
        with plate("columns", 3, dim=-1), plate("rows", 2, dim=-2):
            sample("z", dist.Bernoulli(logits=logits(2, 3)))

    return Case(model, guide, common_dims=(-2, -1), nesting=2)


def plate_to_the_left():
    """The common plate has dim -3, with room for plates that only some sites use."""

    def model():
        with plate("rows", 2, dim=-3):
            z = sample("z", dist.Bernoulli(logits=weight()))
            with plate("columns", 3, dim=-1):
                sample("x", dist.Normal(z, 0.7), obs=GRID[:, None])

    def guide():
        with plate("rows", 2, dim=-3):
            sample("z", dist.Bernoulli(logits=logits(2, 1, 1)))

    return Case(model, guide, common_dims=(-3,), nesting=3)


def plate_inside_to_the_left():
    """The common plate has dim -1, the one inside of it dim -2."""

    def model():
        with plate("columns", 3, dim=-1):
            z = sample("z", dist.Bernoulli(logits=weight()))
            with plate("rows", 2, dim=-2):
                sample("x", dist.Normal(z, 0.7), obs=GRID)

    def guide():
        with plate("columns", 3, dim=-1):
            sample("z", dist.Bernoulli(logits=logits(3)))

    return Case(model, guide, common_dims=(-1,), nesting=2)


def latents_of_both_levels():
    """A latent in the outer plate ties the elements of the inner one."""

    def model():
        with plate("rows", 2, dim=-2):
            y = sample("y", dist.Bernoulli(logits=weight()))
            with plate("columns", 3, dim=-1):
                z = sample("z", dist.Bernoulli(logits=weight() * y))
                sample("x", dist.Normal(z, 0.7), obs=GRID)

    def guide():
        with plate("rows", 2, dim=-2):
            y = sample("y", dist.Bernoulli(logits=0.4))
            with plate("columns", 3, dim=-1):
                sample("z", dist.Bernoulli(logits=logits(2, 3) + y))

    return Case(model, guide, common_dims=(-2,), nesting=2, latents=("y", "z"))


def latent_outside():
    """A latent outside of the plate is shared by its elements: one weight for all."""

    def model():
        g = sample("g", dist.Bernoulli(logits=weight()))
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(logits=weight() * g))
            sample("x", dist.Normal(z, 0.7), obs=X)

    def guide():
        sample("g", dist.Bernoulli(logits=logits(3)[0]))
        with plate("data", 3):
            sample("z", dist.Bernoulli(logits=logits(3)))

    return Case(model, guide, latents=("g", "z"))


def auxiliary_outside():
    """So is an auxiliary site of the guide, though the model does not have it."""

    def guide():
        a = sample("a", dist.Bernoulli(0.4), infer={"is_auxiliary": True})
        with plate("data", 3):
            sample("z", dist.Bernoulli(logits=logits(3) * a))

    return Case(one_plate().model, guide, latents=("a", "z"))


def auxiliary_inside():
    def guide():
        with plate("data", 3):
            a = sample("a", dist.Bernoulli(0.4), infer={"is_auxiliary": True})
            sample("z", dist.Bernoulli(logits=logits(3) * a))

    return Case(one_plate().model, guide, common_dims=(-1,), latents=("a", "z"))


def plates_side_by_side():
    """No plate encloses everything: one weight."""

    def model():
        with plate("first", 3):
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=X)
        with plate("second", 2):
            y = sample("y", dist.Bernoulli(logits=weight()))
            sample("w", dist.Normal(y, 0.7), obs=X[:2])

    def guide():
        with plate("first", 3):
            sample("z", dist.Bernoulli(logits=logits(3)))
        with plate("second", 2):
            sample("y", dist.Bernoulli(logits=logits(3)[:2]))

    return Case(model, guide, latents=("y", "z"))


def several_sites_and_events():
    """Two latents per datum, one of them a vector, and two observations."""

    def model():
        with plate("data", 2):
            z = sample("z", dist.Bernoulli(logits=weight()).expand([3]).to_event(1))
            y = sample("y", dist.Bernoulli(logits=weight() * z.sum(-1)))
            sample("x", dist.Normal(z, 0.7).to_event(1), obs=GRID)
            sample("w", dist.Normal(y, 0.7), obs=X[:2])

    def guide():
        with plate("data", 2):
            z = sample("z", dist.Bernoulli(logits=logits(2, 3)).to_event(1))
            sample("y", dist.Bernoulli(logits=z.sum(-1) - 1.0))

    return Case(model, guide, common_dims=(-1,), latents=("y", "z"))


def plate_without_a_size():
    """Its elements are as many as the sites have."""

    def model():
        with plate("data", dim=-1):
            z = sample("z", dist.Bernoulli(logits=weight().expand(3)))
            sample("x", dist.Normal(z, 0.7), obs=X)

    def guide():
        with plate("data", dim=-1):
            sample("z", dist.Bernoulli(logits=logits(3)))

    return Case(model, guide, common_dims=(-1,))


def one_draw_for_a_plate_without_a_size():
    """No size, so that the host does not broadcast: the latent is shared by all data."""

    def model():
        with plate("data", dim=-1):
            z = sample("z", dist.Bernoulli(logits=weight()).mask(True))
            sample("x", dist.Normal(z, 0.7), obs=X)

    def guide():
        with plate("data", dim=-1):
            sample("z", dist.Bernoulli(logits=logits(1)))

    return Case(model, guide)


def loop():
    """Each turn of a sequential plate has weights of its own."""

    def model():
        for i in plate("data", 3):
            z = sample(f"z_{i}", dist.Bernoulli(logits=weight()))
            sample(f"x_{i}", dist.Normal(z, 0.7), obs=X[i])

    def guide():
        for i in plate("data", 3):
            sample(f"z_{i}", dist.Bernoulli(logits=logits(3)[i]))

    return Case(
        model,
        guide,
        nesting=0,
        turn=lambda name: int(name[-1]),
        latents=("z_0", "z_1", "z_2"),
    )


def loop_inside_a_plate():
    def model():
        with plate("rows", 2):
            for i in plate("columns", 3):
                z = sample(f"z_{i}", dist.Bernoulli(logits=weight()))
                sample(f"x_{i}", dist.Normal(z, 0.7), obs=GRID[:, i])

    def guide():
        rows = plate("rows", 2)
        for i in plate("columns", 3):
            with rows:
                sample(f"z_{i}", dist.Bernoulli(logits=logits(2, 3)[:, i]))

    case = loop()
    return case._replace(model=model, guide=guide, nesting=1, common_dims=(-1,))


def loop_around_observations():
    """A latent outside of the loop: one weight."""

    def model():
        z = sample("z", dist.Bernoulli(logits=weight()))
        for i in plate("data", 3):
            sample(f"x_{i}", dist.Normal(z, 0.7), obs=X[i])

    def guide():
        sample("z", dist.Bernoulli(logits=logits(1)[0]))

    return Case(model, guide, nesting=0)


# --- subsampling ---------------------------------------------------------------------------------


def subsampled():
    """N/B multiplies the bound, not the log-weights."""

    def model():
        with plate("data", 3, subsample_size=2) as rows:
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=X[rows])

    def guide():
        with plate("data", 3, subsample_size=2) as rows:
            sample("z", dist.Bernoulli(logits=logits(3)[rows]))

    return Case(model, guide, common_dims=(-1,), bound_scale=3 / 2)


def subsampled_twice():
    def model():
        with plate("rows", 2, 1, dim=-2) as rows, plate("columns", 3, 2, dim=-1) as columns:
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=GRID[rows][:, columns])

    def guide():
        with plate("rows", 2, 1, dim=-2) as rows, plate("columns", 3, 2, dim=-1) as columns:
            sample("z", dist.Bernoulli(logits=logits(2, 3)[rows][:, columns]))

    return Case(model, guide, common_dims=(-2, -1), nesting=2, bound_scale=3.0)


def subsampled_loop():
    def model():
        for i in plate("data", 3, subsample_size=2):
            z = sample(f"z_{i}", dist.Bernoulli(logits=weight()))
            sample(f"x_{i}", dist.Normal(z, 0.7), obs=X[i])

    def guide():
        for i in plate("data", 3, subsample_size=2):
            sample(f"z_{i}", dist.Bernoulli(logits=logits(3)[i]))

    return loop()._replace(model=model, guide=guide, bound_scale=3 / 2)


def subsample_handed_in():
    """The guide leaves the plate to the model; both are handed the rows."""
    rows = torch.tensor([2, 0])

    def model():
        with plate("data", 3, subsample=rows):
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=X[rows])

    def guide():
        with plate("data", 3, subsample=rows):
            sample("z", dist.Bernoulli(logits=logits(3)[rows]))

    return Case(model, guide, common_dims=(-1,), bound_scale=3 / 2)


# --- scales and masks ----------------------------------------------------------------------------


def scaled_by(scale, case=None):
    case = case or one_plate()
    model, guide = (poutine.scale(fn, scale=scale) for fn in (case.model, case.guide))
    return case._replace(model=model, guide=guide, bound_scale=scale * case.bound_scale)


def scaled_likelihood():
    """A scale on some sites weighs their log-probabilities, inside the weights."""

    def model():
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(logits=weight()))
            with poutine.scale(scale=torch.tensor([2.0, 1.0, 0.3])):
                sample("x", dist.Normal(z, 0.7), obs=X)

    return one_plate()._replace(model=model)


def annealed_latents():
    def model():
        with plate("data", 3):
            with poutine.scale(scale=0.3):
                z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=X)

    guide = poutine.scale(one_plate().guide, scale=0.3)
    return one_plate()._replace(model=model, guide=guide)


def scaled_inside_a_weight():
    """A scale that varies over a plate that is not common can't multiply the bound."""
    case = latents_of_both_levels()
    scale = torch.tensor([2.0, 1.0, 0.3])

    def model():
        with plate("rows", 2, dim=-2):
            y = sample("y", dist.Bernoulli(logits=weight()))
            with plate("columns", 3, dim=-1), poutine.scale(scale=scale):
                z = sample("z", dist.Bernoulli(logits=weight() * y))
                sample("x", dist.Normal(z, 0.7), obs=GRID)

    return case._replace(model=model)


def masked_by(mask):
    """A mask around every site: what it hides counts nothing, in the value and the gradient."""
    case = one_plate()
    model, guide = (poutine.mask(fn, mask=mask) for fn in (case.model, case.guide))
    active = mask.to(X) if isinstance(mask, torch.Tensor) else float(mask)
    return case._replace(model=model, guide=guide, active=active)


def masked_observation():
    def model():
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7).mask(torch.tensor([True, False, True])), obs=X)

    return one_plate()._replace(model=model)


def padded_sequences():
    """Rows of different lengths: the mask differs within what one weight sums."""
    mask = torch.tensor([[True, True, True], [True, False, False]])

    def model():
        with plate("rows", 2, dim=-2):
            y = sample("y", dist.Bernoulli(logits=weight()))
            with plate("columns", 3, dim=-1), poutine.mask(mask=mask):
                z = sample("z", dist.Bernoulli(logits=weight() * y))
                sample("x", dist.Normal(z, 0.7), obs=GRID)

    def guide():
        with plate("rows", 2, dim=-2):
            sample("y", dist.Bernoulli(logits=0.4))
            with plate("columns", 3, dim=-1), poutine.mask(mask=mask):
                sample("z", dist.Bernoulli(logits=logits(2, 3)))

    return latents_of_both_levels()._replace(model=model, guide=guide)


def observed_in_part():
    """``obs_mask`` makes the missing data latent."""
    is_observed = torch.tensor([True, False, True])

    def model():
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=X, obs_mask=is_observed)

    def guide():
        with plate("data", 3):
            sample("z", dist.Bernoulli(logits=logits(3)))
            with poutine.mask(mask=~is_observed):
                sample("x_unobserved", dist.Normal(0.2, 1.0))

    return Case(model, guide, common_dims=(-1,))


CASES = {
    case.__name__: case()
    for case in (
        one_plate,
        two_plates_entered_in_either_order,
        plate_to_the_left,
        plate_inside_to_the_left,
        latents_of_both_levels,
        latent_outside,
        auxiliary_outside,
        auxiliary_inside,
        plates_side_by_side,
        several_sites_and_events,
        plate_without_a_size,
        one_draw_for_a_plate_without_a_size,
        loop,
        loop_inside_a_plate,
        loop_around_observations,
        subsampled,
        subsampled_twice,
        subsampled_loop,
        subsample_handed_in,
        scaled_likelihood,
        annealed_latents,
        scaled_inside_a_weight,
        masked_observation,
        padded_sequences,
        observed_in_part,
    )
} | {
    "scaled_by_a_number": scaled_by(2.5),
    "scaled_by_a_tensor": scaled_by(torch.tensor(2.5)),
    "scaled_per_element": scaled_by(torch.tensor([2.5, 1.0, 0.3])),
    "scaled_and_subsampled": scaled_by(0.1, subsampled()),
    "scaled_loop": scaled_by(torch.tensor(0.1), loop()),
    "masked_per_element": masked_by(torch.tensor([True, False, True])),
    "masked_entirely": masked_by(False),
    "not_masked": masked_by(True),
}


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"vectorize": True},
        {"vectorize": True, "guess": True},
    ],
    ids=["loop", "vectorized", "guessed-nesting"],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_and_gradient_follow_the_definition(case, run):
    assert_follows_definition(case, **run)

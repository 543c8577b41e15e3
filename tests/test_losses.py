"""Every equation against a scalar loop in float64, with its bounds and limits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losses import alignment_loss, cosine, mean_or_zero, retain_loss, unlearning_loss

shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9))
seeds = st.integers(0, 2**31 - 1)
taus = st.floats(-1, 1)


def draw(shape, seed, mask_share=0.7):
    """Two float64 tensors (B, T, C), a concept (C,) and a mask (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    concept = torch.randn(shape[-1], dtype=torch.float64, generator=generator)
    mask = torch.rand(shape[:2], generator=generator) < mask_share
    return a, b, concept, mask


def scalar_cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)))


def scalar_mean(values):
    return sum(values) / len(values) if values else 0.0


def kept(mask):
    return [(b, t) for b in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[b, t]]


@given(shapes, seeds, taus)
def test_losses_equal_a_scalar_loop(shape, seed, tau):
    a, b, concept, mask = draw(shape, seed)
    at = lambda x, place: x[place].tolist()
    aligned = scalar_mean([1 - scalar_cosine(at(a, p), at(b, p)) for p in kept(mask)])
    hinge = scalar_mean([max(0.0, scalar_cosine(at(a, p), concept.tolist()) - tau) for p in kept(mask)])
    drift = scalar_mean([sum((x - y) ** 2 for x, y in zip(at(a, p), at(b, p))) / sum(y * y for y in at(b, p))
                         for p in kept(mask)])
    assert alignment_loss(a, b, mask).item() == pytest.approx(aligned, abs=1e-12)
    assert unlearning_loss(a, concept, mask, tau).item() == pytest.approx(hinge, abs=1e-12)
    assert retain_loss(a, b, mask).item() == pytest.approx(drift, rel=1e-12, abs=1e-12)


@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_a_mean_is_that_of_the_masked_values_and_0_where_there_are_none(B, T, data):
    def table(of):
        return data.draw(st.lists(st.lists(of, min_size=T, max_size=T), min_size=B, max_size=B))

    values, mask = torch.tensor(table(st.floats(-9, 9, width=32))), torch.tensor(table(st.booleans()))
    chosen = [values[place].item() for place in kept(mask)]
    assert mean_or_zero(values[mask]).item() == pytest.approx(scalar_mean(chosen), abs=1e-5)


@given(shapes, seeds, taus)
def test_bounds(shape, seed, tau):
    a, b, concept, mask = draw(shape, seed)
    assert -1e-12 <= alignment_loss(a, b, mask) <= 2 + 1e-12
    assert 0 <= unlearning_loss(a, concept, mask, tau) <= max(0, 1 - tau) + 1e-12
    assert retain_loss(a, b, mask) >= 0


@given(shapes, seeds)
def test_bounds_are_reached(shape, seed):
    a, _, concept, _ = draw(shape, seed)
    mask = torch.ones(shape[:2], dtype=torch.bool)
    assert alignment_loss(a, a, mask).item() == pytest.approx(0, abs=1e-12)
    assert alignment_loss(a, -a, mask).item() == pytest.approx(2, abs=1e-12)
    assert unlearning_loss(concept.expand(shape), concept, mask, -1.0).item() == pytest.approx(2, abs=1e-12)
    assert retain_loss(a, a, mask) == 0
    assert retain_loss(2 * a, a, mask).item() == pytest.approx(1, rel=1e-12)


@given(shapes, seeds, taus, st.floats(-3, 3), st.floats(-3, 3))
def test_scale_does_not_matter(shape, seed, tau, p, q):
    a, b, concept, mask = draw(shape, seed)
    far, near = 10**p, 10**q
    align, hinge, drift = (loss.item() for loss in (
        alignment_loss(a, b, mask), unlearning_loss(a, concept, mask, tau), retain_loss(a, b, mask)))
    assert torch.allclose(cosine(far * a, near * b), cosine(a, b), atol=1e-9)
    assert alignment_loss(far * a, near * b, mask).item() == pytest.approx(align, abs=1e-9)
    assert unlearning_loss(far * a, near * concept, mask, tau).item() == pytest.approx(hinge, abs=1e-9)
    assert retain_loss(far * a, far * b, mask).item() == pytest.approx(drift, rel=1e-9)


@given(shapes, seeds, taus, st.sampled_from([float("nan"), float("inf"), 0.0, 1e30]))
def test_masked_values_never_matter(shape, seed, tau, junk):
    a, b, concept, mask = draw(shape, seed)
    spoilt_a, spoilt_b = a.clone(), b.clone()
    spoilt_a[~mask], spoilt_b[~mask] = junk, junk
    for loss in (lambda x, y: alignment_loss(x, y, mask), lambda x, y: unlearning_loss(x, concept, mask, tau),
                 lambda x, y: retain_loss(x, y, mask)):
        clean, dirty = a.clone().requires_grad_(), spoilt_a.clone().requires_grad_()
        one, two = loss(clean, b), loss(dirty, spoilt_b)
        assert one.item() == two.item()
        (grad_one,), (grad_two,) = torch.autograd.grad(one, clean), torch.autograd.grad(two, dirty)
        assert torch.equal(grad_one, grad_two)
        assert (grad_two[~mask] == 0).all()


@given(shapes, seeds)
def test_an_empty_mask_gives_zero_and_a_zero_gradient(shape, seed):
    a, b, concept, _ = draw(shape, seed)
    mask = torch.zeros(shape[:2], dtype=torch.bool)
    for loss in (lambda x: alignment_loss(x, b, mask), lambda x: unlearning_loss(x, concept, mask, 0.0),
                 lambda x: retain_loss(x, b, mask)):
        x = a.clone().requires_grad_()
        value = loss(x)
        assert value.item() == 0
        assert (torch.autograd.grad(value, x)[0] == 0).all()


@given(shapes, seeds)
def test_at_or_below_tau_there_is_no_loss_and_no_gradient(shape, seed):
    a, _, concept, mask = draw(shape, seed)
    x = a.clone().requires_grad_()
    for tau in (cosine(a, concept).max().item(), 1.0):
        loss = unlearning_loss(x, concept, mask, tau)
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, x)[0] == 0).all()


@given(seeds)
def test_exactly_at_the_margin_the_gradient_is_zero(seed):
    a, _, concept, _ = draw((1, 1, 5), seed)
    x = a.requires_grad_()
    loss = unlearning_loss(x, concept, torch.ones(1, 1, dtype=torch.bool), cosine(a, concept).item())
    assert loss.item() == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()


@given(shapes, seeds, taus, taus)
def test_the_hinge_never_rises_with_tau(shape, seed, one, two):
    a, _, concept, mask = draw(shape, seed)
    low, high = sorted((one, two))
    assert unlearning_loss(a, concept, mask, low) >= unlearning_loss(a, concept, mask, high)


@given(seeds)
def test_gradients(seed):
    a, b, concept, mask = draw((2, 3, 4), seed)
    tau = 0.1
    mask &= (cosine(a, concept) - tau).abs() > 1e-3  # away from the kink
    x = a.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: alignment_loss(x, b, mask), x)
    assert torch.autograd.gradcheck(lambda x: unlearning_loss(x, concept, mask, tau), x)
    assert torch.autograd.gradcheck(lambda x: retain_loss(x, b, mask), x)


def test_a_zero_vector_is_similar_to_nothing():
    zero = torch.zeros(1, 1, 3, requires_grad=True)
    value = cosine(zero, torch.tensor([1.0, 2.0, 3.0]))
    assert value.item() == 0
    assert torch.autograd.grad(value.sum(), zero)[0].isfinite().all()


def test_the_retain_term_weighs_every_token_alike():
    original = torch.ones(1, 2, 4)
    original[0, 0] *= 1000  # an attention sink
    drifted = original.clone()
    drifted[0, 1] *= 1.5
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert retain_loss(drifted, original, mask).item() == pytest.approx(0.125)

"""Every equation against a scalar loop in float64, with its bounds and limits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losses import (
    alignment_loss, ascent_loss, cosine, dpo_loss, generic_logits, kl_loss, likelihood_loss, npo_loss, retain_loss,
    sequence_log_probs, token_log_probs, unlearning_loss)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9))
seeds = st.integers(0, 2**31 - 1)
taus = st.floats(-1, 1)


def draw(shape, seed, mask_share=0.7):
    """Two float64 tensors (B, T, E), a concept (E,) and a mask (B, T)."""
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
    drift = scalar_mean([sum((x - y) ** 2 for x, y in zip(at(a, p), at(b, p))) / sum(y * y for y in at(b, p)) for p in kept(mask)])
    assert alignment_loss(a, b, mask).item() == pytest.approx(aligned, abs=1e-12)
    assert unlearning_loss(a, concept, mask, tau).item() == pytest.approx(hinge, abs=1e-12)
    assert retain_loss(a, b, mask).item() == pytest.approx(drift, rel=1e-12, abs=1e-12)


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
    assert torch.allclose(cosine(far * a, near * b), cosine(a, b), atol=1e-9)
    assert alignment_loss(far * a, near * b, mask).item() == pytest.approx(alignment_loss(a, b, mask).item(), abs=1e-9)
    assert unlearning_loss(far * a, near * concept, mask, tau).item() == pytest.approx(
        unlearning_loss(a, concept, mask, tau).item(), abs=1e-9)
    assert retain_loss(far * a, far * b, mask).item() == pytest.approx(retain_loss(a, b, mask).item(), rel=1e-9)


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


# ---- the losses on tokens (Appendix A.2)

token_shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(2, 7))
betas = st.floats(0.01, 5)


def draw_tokens(shape, seed):
    """Two sets of float64 logits (B, T, V), tokens (B, T) and a mask (B, T) that is neither all text nor one stretch."""
    generator = torch.Generator().manual_seed(seed)
    logits, reference = 3 * torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    input_ids = torch.randint(shape[2], shape[:2], generator=generator)
    return logits, reference, input_ids, torch.rand(shape[:2], generator=generator) < 0.7


def scalar_log_softmax(row):
    total = math.log(sum(math.exp(z) for z in row))
    return [z - total for z in row]


def scalar_log_probs(logits, input_ids, mask):
    """For each text the list of log π(x_t | before) of its masked tokens: the logits before a token predict it."""
    return [[scalar_log_softmax(logits[b][t - 1].tolist())[input_ids[b][t]] for t in range(1, len(input_ids[b])) if mask[b][t]]
            for b in range(len(input_ids))]


@given(token_shapes, seeds)
def test_likelihoods_equal_a_scalar_loop(shape, seed):
    logits, _, input_ids, mask = draw_tokens(shape, seed)
    expected = scalar_log_probs(logits, input_ids, mask)
    flat = [value for text in expected for value in text]
    assert token_log_probs(logits, input_ids, mask).tolist() == pytest.approx(flat, abs=1e-12)
    assert sequence_log_probs(logits, input_ids, mask).tolist() == pytest.approx([sum(text) for text in expected], abs=1e-12)
    assert ascent_loss(logits, input_ids, mask).item() == pytest.approx(scalar_mean(flat), abs=1e-12)
    assert likelihood_loss(logits, input_ids, mask).item() == pytest.approx(-scalar_mean(flat), abs=1e-12)
    assert ascent_loss(logits, input_ids, mask) <= 0


@given(token_shapes, seeds)
def test_kl_equals_a_scalar_loop_is_not_negative_and_zero_for_equal_models(shape, seed):
    logits, reference, _, mask = draw_tokens(shape, seed)
    divergences = []
    for b, t in kept(mask):
        if t:
            p, q = (scalar_log_softmax(z[b, t - 1].tolist()) for z in (reference, logits))
            divergences.append(sum(math.exp(x) * (x - y) for x, y in zip(p, q)))
    assert kl_loss(logits, reference, mask).item() == pytest.approx(scalar_mean(divergences), abs=1e-10)
    assert kl_loss(logits, reference, mask) >= -1e-12
    assert kl_loss(logits, logits + 5, mask).item() == pytest.approx(0, abs=1e-12)  # logits have no zero point


@given(st.integers(1, 5), seeds, betas)
def test_npo_and_dpo_equal_a_scalar_loop(B, seed, beta):
    generator = torch.Generator().manual_seed(seed)
    a, b, c, d = (-20 * torch.rand(4, B, dtype=torch.float64, generator=generator)).unbind()
    npo = scalar_mean([2 / beta * math.log(1 + (math.exp(x) / math.exp(y)) ** beta) for x, y in zip(a.tolist(), b.tolist())])
    dpo = scalar_mean([-math.log(1 / (1 + math.exp(-beta * ((w - y) - (x - z)))))
                       for w, x, y, z in zip(*(v.tolist() for v in (a, b, c, d)))])
    assert npo_loss(a, b, beta).item() == pytest.approx(npo, rel=1e-9)
    assert dpo_loss(a, b, c, d, beta).item() == pytest.approx(dpo, rel=1e-9)
    assert npo_loss(a, b, beta) >= 0 and dpo_loss(a, b, c, d, beta) >= 0


@given(st.integers(1, 5), seeds, betas)
def test_equal_models(B, seed, beta):
    a, b = -20 * torch.rand(2, B, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert npo_loss(a, a, beta).item() == pytest.approx(2 / beta * math.log(2), rel=1e-12)
    assert dpo_loss(a, b, a, b, beta).item() == pytest.approx(math.log(2), rel=1e-12)


@given(token_shapes, seeds)
def test_npo_s_gradient_goes_to_that_of_ascent_as_beta_goes_to_0(shape, seed):
    logits, reference, input_ids, mask = draw_tokens(shape, seed)
    logits.requires_grad_()
    before = sequence_log_probs(reference, input_ids, mask)
    npo = npo_loss(sequence_log_probs(logits, input_ids, mask), before, 1e-7)
    summed = sequence_log_probs(logits, input_ids, mask).mean()  # Eq. 5, summed over a text's tokens
    assert torch.allclose(*(torch.autograd.grad(loss, logits)[0] for loss in (npo, summed)), atol=1e-5)


@given(st.integers(1, 5), seeds, betas)
def test_npo_pushes_the_less_the_less_likely_a_text_is(B, seed, beta):
    logp = (-20 * torch.rand(B, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).requires_grad_()
    near, far = (torch.autograd.grad(npo_loss(logp - shift, logp.detach(), beta), logp)[0] for shift in (0, 3))
    assert (far < near).all() and (far > 0).all()


@given(token_shapes, seeds, st.sampled_from([float("nan"), float("inf"), 1e30]))
def test_masked_tokens_never_matter(shape, seed, junk):
    logits, reference, input_ids, mask = draw_tokens(shape, seed)
    unused = torch.ones_like(mask)
    unused[:, :-1] = ~mask[:, 1:]  # logits that predict no masked token, those of the last position among them
    spoilt = logits.clone()
    spoilt[unused] = junk
    other_ids = torch.where(mask, input_ids, (input_ids + 1) % shape[2])
    for loss in (lambda z, ids: ascent_loss(z, ids, mask), lambda z, ids: likelihood_loss(z, ids, mask),
                 lambda z, ids: sequence_log_probs(z, ids, mask).sum(), lambda z, ids: kl_loss(z, reference, mask)):
        clean, dirty = logits.clone().requires_grad_(), spoilt.clone().requires_grad_()
        one, two = loss(clean, input_ids), loss(dirty, other_ids)
        assert one.item() == two.item()
        grad_one, grad_two = torch.autograd.grad(one, clean)[0], torch.autograd.grad(two, dirty)[0]
        assert torch.equal(grad_one, grad_two) and (grad_two[unused] == 0).all()


@given(token_shapes, seeds, st.floats(0, 9))
def test_generic_logits_are_lowered_where_reinforcement_raised_and_nowhere_else(shape, seed, alpha):
    original, reinforced, _, _ = draw_tokens(shape, seed)
    generic, raised = generic_logits(original, reinforced, alpha), reinforced > original
    assert torch.equal(generic[~raised], original[~raised])
    assert torch.allclose(generic[raised], (original - alpha * (reinforced - original))[raised])
    assert torch.equal(generic_logits(original, reinforced, 0.0), original)


@given(seeds)
def test_gradients_of_the_losses_on_tokens(seed):
    logits, reference, input_ids, mask = draw_tokens((2, 4, 3), seed)
    x = logits.requires_grad_()
    before = sequence_log_probs(reference, input_ids, mask)
    for loss in (lambda z: ascent_loss(z, input_ids, mask), lambda z: kl_loss(z, reference, mask),
                 lambda z: npo_loss(sequence_log_probs(z, input_ids, mask), before, 0.5),
                 lambda z: dpo_loss(sequence_log_probs(z, input_ids, mask), before, before + 1, before - 1, 0.5)):
        assert torch.autograd.gradcheck(loss, x)

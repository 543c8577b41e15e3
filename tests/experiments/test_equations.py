"""The baselines' losses on tokens (Appendix A.2, Eqs. 5 to 8), each against a scalar loop in float64, with
its bounds and limits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.baselines import (
    ascent_loss, dpo_loss, kl_loss, likelihood_loss, npo_loss, sequence_log_probs, token_log_probs)

seeds = st.integers(0, 2**31 - 1)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(2, 7))
betas = st.floats(0.01, 5)


def scalar_mean(values):
    return sum(values) / len(values) if values else 0.0


def draw_tokens(shape, seed):
    """Two sets of float64 logits (B, T, V), tokens (B, T), and a mask (B, T) with gaps."""
    generator = torch.Generator().manual_seed(seed)
    logits, reference = 3 * torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    input_ids = torch.randint(shape[2], shape[:2], generator=generator)
    return logits, reference, input_ids, torch.rand(shape[:2], generator=generator) < 0.7


def scalar_log_softmax(row):
    total = math.log(sum(math.exp(z) for z in row))
    return [z - total for z in row]


def scalar_log_probs(logits, input_ids, mask):
    """For each text its masked tokens' log π(x_t | before): the logits before a token predict it."""
    return [[scalar_log_softmax(logits[b][t - 1].tolist())[input_ids[b][t]]
             for t in range(1, len(input_ids[b])) if mask[b][t]] for b in range(len(input_ids))]


@given(shapes, seeds)
def test_likelihoods_equal_a_scalar_loop(shape, seed):
    logits, _, input_ids, mask = draw_tokens(shape, seed)
    expected = scalar_log_probs(logits, input_ids, mask)
    flat = [value for text in expected for value in text]
    assert token_log_probs(logits, input_ids, mask).tolist() == pytest.approx(flat, abs=1e-12)
    sums = [sum(text) for text in expected]
    assert sequence_log_probs(logits, input_ids, mask).tolist() == pytest.approx(sums, abs=1e-12)
    assert ascent_loss(logits, input_ids, mask).item() == pytest.approx(scalar_mean(flat), abs=1e-12)
    assert likelihood_loss(logits, input_ids, mask).item() == pytest.approx(-scalar_mean(flat), abs=1e-12)
    assert ascent_loss(logits, input_ids, mask) <= 0


@given(shapes, seeds)
def test_kl_equals_a_scalar_loop_is_not_negative_and_zero_for_equal_models(shape, seed):
    logits, reference, _, mask = draw_tokens(shape, seed)
    divergences = []
    for b, t in mask[:, 1:].nonzero().tolist():  # the logits at t predict the token at t + 1
        p, q = (scalar_log_softmax(z[b, t].tolist()) for z in (reference, logits))
        divergences.append(sum(math.exp(x) * (x - y) for x, y in zip(p, q)))
    assert kl_loss(logits, reference, mask).item() == pytest.approx(scalar_mean(divergences), abs=1e-10)
    assert kl_loss(logits, reference, mask) >= -1e-12
    assert kl_loss(logits, logits + 5, mask).item() == pytest.approx(0, abs=1e-12)  # they have no zero point


@given(st.integers(1, 5), seeds, betas)
def test_npo_and_dpo_equal_a_scalar_loop(B, seed, beta):
    generator = torch.Generator().manual_seed(seed)
    a, b, c, d = (-20 * torch.rand(4, B, dtype=torch.float64, generator=generator)).unbind()
    npo = scalar_mean([2 / beta * math.log(1 + (math.exp(x) / math.exp(y)) ** beta)
                       for x, y in zip(a.tolist(), b.tolist())])
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


@given(shapes, seeds)
def test_npo_s_gradient_goes_to_that_of_ascent_as_beta_goes_to_0(shape, seed):
    logits, reference, input_ids, mask = draw_tokens(shape, seed)
    logits.requires_grad_()
    before = sequence_log_probs(reference, input_ids, mask)
    npo = npo_loss(sequence_log_probs(logits, input_ids, mask), before, 1e-7)
    summed = sequence_log_probs(logits, input_ids, mask).mean()  # Eq. 5, summed over a text's tokens
    assert torch.allclose(*(torch.autograd.grad(loss, logits)[0] for loss in (npo, summed)), atol=1e-5)


@given(st.integers(1, 5), seeds, betas)
def test_npo_pushes_the_less_the_less_likely_a_text_is(B, seed, beta):
    logp = -20 * torch.rand(B, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    logp.requires_grad_()
    near, far = (torch.autograd.grad(npo_loss(logp - shift, logp.detach(), beta), logp)[0]
                 for shift in (0, 3))
    assert (far < near).all() and (far > 0).all()


@given(shapes, seeds, st.sampled_from([float("nan"), float("inf"), 1e30]))
def test_masked_tokens_never_matter(shape, seed, junk):
    logits, reference, input_ids, mask = draw_tokens(shape, seed)
    unused = torch.ones_like(mask)
    unused[:, :-1] = ~mask[:, 1:]  # logits that predict no masked token, the last position's among them
    spoilt = logits.clone()
    spoilt[unused] = junk
    other_ids = torch.where(mask, input_ids, (input_ids + 1) % shape[2])
    for loss in (lambda z, ids: ascent_loss(z, ids, mask), lambda z, ids: likelihood_loss(z, ids, mask),
                 lambda z, ids: sequence_log_probs(z, ids, mask).sum(),
                 lambda z, ids: kl_loss(z, reference, mask)):
        clean, dirty = logits.clone().requires_grad_(), spoilt.clone().requires_grad_()
        one, two = loss(clean, input_ids), loss(dirty, other_ids)
        assert one.item() == two.item()
        grad_one, grad_two = torch.autograd.grad(one, clean)[0], torch.autograd.grad(two, dirty)[0]
        assert torch.equal(grad_one, grad_two) and (grad_two[unused] == 0).all()


@given(seeds)
def test_gradients_of_the_losses_on_tokens(seed):
    logits, reference, input_ids, mask = draw_tokens((2, 4, 3), seed)
    x = logits.requires_grad_()
    before = sequence_log_probs(reference, input_ids, mask)
    logp = lambda z: sequence_log_probs(z, input_ids, mask)
    for loss in (lambda z: ascent_loss(z, input_ids, mask), lambda z: kl_loss(z, reference, mask),
                 lambda z: npo_loss(logp(z), before, 0.5),
                 lambda z: dpo_loss(logp(z), before, before + 1, before - 1, 0.5)):
        assert torch.autograd.gradcheck(loss, x)

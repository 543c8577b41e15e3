"""The equations of "Align-then-Unlearn" (arXiv 2506.13181), one pure function each (Sec. 2).

    cosine           sim(a, b)            the similarity under Eq. 1
    alignment_loss   Eq. 1                trains the head E on the next k tokens' embedding
    unlearning_loss  Eq. 3                trains the model M away from the concept, down to the margin tau
    retain_loss      not in the paper     holds M's hidden states on other texts (weight 0 is the paper)

Shapes: B texts, T tokens, E embedding width, D hidden width. Every loss is a mean over the positions
where `mask` is True. The other positions are taken out before anything is computed, so whatever stands
there, NaN included, reaches neither the loss nor a gradient. An all-False mask gives 0 and a zero gradient.

Nothing local is imported: this file can be copied alone.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize, relu


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of the last dimension, sim(a, b) under Eq. 1.

    a, b: (..., E) of the same floating dtype, broadcast against each other. Returns (...) in [-1, 1] up to
    rounding, independent of the vectors' lengths; 0 where either vector is zero.
    """
    # sim(a, b) = a·b / (‖a‖ ‖b‖)
    return (normalize(a, dim=-1) * normalize(b, dim=-1)).sum(-1)


def masked_mean(values: Tensor) -> Tensor:
    """Mean of the values that a mask has left, (N,) -> (); an empty one gives 0 and a zero gradient."""
    return values.sum() / max(values.numel(), 1)


def alignment_loss(predicted: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Eq. 1: cosine distance between predicted and reference embeddings of the next k tokens.

    predicted: (B, T, E) ê_t. reference: (B, T, E) e_t. mask: (B, T) bool, True where the window of t is whole.
    Returns () in [0, 2].
    """
    # L_align = 1 - sim(ê_t, e_t)
    return masked_mean(1 - cosine(predicted[mask], reference[mask]))


def unlearning_loss(predicted: Tensor, concept: Tensor, mask: Tensor, tau: float) -> Tensor:
    """Eq. 3: hinge on the similarity to the concept; no loss and no gradient at or below the margin.

    predicted: (B, T, E) ê_t. concept: (E,) e_unlearn. mask: (B, T) bool, True on real tokens. tau in [-1, 1].
    Returns () in [0, max(0, 1 - tau)]. `relu`, because the gradient of `clamp` at the margin is 1.
    """
    # L_unlearn = max(0, sim(ê_t, e_unlearn) - τ)
    return masked_mean(relu(cosine(predicted[mask], concept) - tau))


def retain_loss(hidden: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Ours, not the paper's: how far M's hidden states on other texts have drifted, relative to each token.

    hidden: (B, T, D) h_t now. original: (B, T, D) h_t before unlearning. mask: (B, T) bool, True on real tokens.
    Returns () >= 0. Each token is divided by its own squared norm: the first token of a sequence can hold
    over 99 % of the sequence's norm (an attention sink), and a shared divisor would protect it alone.
    """
    # L_retain = ‖h_t - h_t⁰‖² / ‖h_t⁰‖²
    hidden, original = hidden[mask], original[mask]                               # (N, D)
    size = original.square().sum(-1).clamp_min(torch.finfo(original.dtype).tiny)  # (N,)
    return masked_mean((hidden - original).square().sum(-1) / size)

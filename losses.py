"""The equations of "Align-then-Unlearn" (arXiv 2506.13181), one pure function each (Sec. 2 and Appendix A.2).

    cosine            sim(a, b)           the similarity under Eq. 1
    alignment_loss    Eq. 1               trains the head E on the next k tokens' embedding
    unlearning_loss   Eq. 3               trains the model M away from the concept, down to the margin tau
    retain_loss       not in the paper    holds M's hidden states on other texts (weight 0 is the paper)

and those of the methods it is compared with, on the tokens themselves:

    ascent_loss       Eq. 5               gradient ascent (GA) on the texts to forget
    likelihood_loss   Eq. 6               other texts are kept likely; refusals are learned (RT)
    kl_loss           Eq. 7               other texts are predicted as by the model before
    npo_loss          Eq. 8               negative preference optimization (NPO)
    dpo_loss          Rafailov et al.     direct preference optimization (DPO), made-up text over true text
    generic_logits    Eq. 9               "Who's Harry Potter"; a function only, no method of train.py uses it

Shapes: B texts, T tokens, E embedding width, D hidden width, V vocabulary. Every loss is a mean over the positions
where `mask` is True (Eq. 8 and DPO: over the texts). The other positions are taken out before anything is
computed, so whatever stands there, NaN included, reaches neither the loss nor a gradient. An all-False mask
gives a zero gradient, and 0 (Eq. 8 and DPO: their value at equal models).

Nothing local is imported: this file can be copied alone.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, relu, softplus


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of the last dimension, sim(a, b) under Eq. 1.

    a, b: (..., E) of the same floating dtype, broadcast against each other. Returns (...) in [-1, 1] up to
    rounding, independent of the vectors' lengths; 0 where either vector is zero.
    """
    # sim(a, b) = a·b / (‖a‖ ‖b‖)
    return (normalize(a, dim=-1) * normalize(b, dim=-1)).sum(-1)


def mean_or_zero(values: Tensor) -> Tensor:
    """Mean of the values that a mask has left, (N,) -> (); where it has left none, 0 and a zero gradient."""
    return values.sum() / max(values.numel(), 1)


def alignment_loss(predicted: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Eq. 1: cosine distance between predicted and reference embeddings of the next k tokens.

    predicted: (B, T, E) ê_t. reference: (B, T, E) e_t. mask: (B, T) bool, True where the window of t is whole.
    Returns () in [0, 2].
    """
    # L_align = 1 - sim(ê_t, e_t)
    return mean_or_zero(1 - cosine(predicted[mask], reference[mask]))


def unlearning_loss(predicted: Tensor, concept: Tensor, mask: Tensor, tau: float) -> Tensor:
    """Eq. 3: hinge on the similarity to the concept; no loss and no gradient at or below the margin.

    predicted: (B, T, E) ê_t. concept: (E,) e_unlearn. mask: (B, T) bool, True on real tokens. tau in [-1, 1].
    Returns () in [0, max(0, 1 - tau)]. `relu`, because the gradient of `clamp` at the margin is 1.
    """
    # L_unlearn = max(0, sim(ê_t, e_unlearn) - τ)
    return mean_or_zero(relu(cosine(predicted[mask], concept) - tau))


def retain_loss(hidden: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Ours, not the paper's: how far M's hidden states are from where they should be, relative to each token.

    hidden: (B, T, D) h_t now. original: (B, T, D) h_t before unlearning: on other texts the same ones; on the target's
    those with made-up names in the place of its own. mask: (B, T) bool, True on the tokens that count.
    Returns () >= 0. Each token is divided by its own squared norm: the first token of a sequence can hold
    over 99 % of the sequence's norm (an attention sink), and a shared divisor would protect it alone.
    """
    # L_retain = ‖h_t - h_t⁰‖² / ‖h_t⁰‖²
    hidden, original = hidden[mask], original[mask]                               # (N, D)
    size = original.square().sum(-1).clamp_min(torch.finfo(original.dtype).tiny)  # (N,)
    return mean_or_zero((hidden - original).square().sum(-1) / size)


def token_log_probs(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """log π_θ(x_t | x_1, ..., x_t-1) of every token of a mask, (N,), text by text. The one place that shifts.

    logits: (B, T, V), at t for the token t + 1. input_ids: (B, T) long. mask: (B, T) bool, True on the tokens y that
    count (neither padding nor a prompt x). The first token of a text has nothing before it and never counts.
    """
    counted = mask[:, 1:]                                                                         # (B, T - 1)
    logp = logits[:, :-1][counted].log_softmax(-1)                                                # (N, V)
    return logp.gather(-1, input_ids[:, 1:][counted][:, None])[:, 0]                              # (N,)


def sequence_log_probs(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """log π_θ(y | x), summed over each text's tokens, (B,); arguments as for `token_log_probs`."""
    # log π_θ(y | x) = Σ_t log π_θ(y_t | x, y_<t)
    logp = token_log_probs(logits, input_ids, mask)                                               # (N,)
    return logp.new_zeros(len(mask)).index_add(0, mask[:, 1:].nonzero()[:, 0], logp)              # (B,)


def ascent_loss(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Eq. 5: the log-likelihood of texts to forget, to be minimized. Returns () <= 0, without a lower bound."""
    # L_forget = log π_θ(y | x), here a token's mean
    return mean_or_zero(token_log_probs(logits, input_ids, mask))


def likelihood_loss(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Eq. 6: the negative log-likelihood of texts to keep, or of refusals. Returns () >= 0."""
    # L_retain = -log π_θ(y | x), here a token's mean
    return -mean_or_zero(token_log_probs(logits, input_ids, mask))


def kl_loss(logits: Tensor, reference_logits: Tensor, mask: Tensor) -> Tensor:
    """Eq. 7: how far the predictions on texts to keep are from those of the model before, both (B, T, V).

    mask: (B, T) bool as for `token_log_probs`. Returns () >= 0, 0 where the predictions are equal.
    """
    # L_KL = KL(π_ref(y | x) || π_θ(y | x)) = Σ_v π_ref (log π_ref - log π_θ)
    counted = mask[:, 1:]                                                                         # (B, T - 1)
    logp = logits[:, :-1][counted].log_softmax(-1)                                                # (N, V)
    reference = reference_logits[:, :-1][counted].log_softmax(-1)                                 # (N, V)
    return mean_or_zero((reference.exp() * (reference - logp)).sum(-1))


def npo_loss(logp: Tensor, reference_logp: Tensor, beta: float) -> Tensor:
    """Eq. 8: texts to forget become less likely than they were, the more slowly the less likely they are.

    logp, reference_logp: (B,) log π(y_- | x) of the model and of the frozen model before, summed over a text's tokens
    (as RWKU's code does). beta > 0. Returns () >= 0; (2 / β) log 2 for equal models; as β goes to 0 its gradient
    goes to that of the summed Eq. 5.
    """
    # L_NPO = (2/β) log(1 + (π_θ / π_ref)^β)
    return mean_or_zero(2 / beta * softplus(beta * (logp - reference_logp)))


def dpo_loss(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor,
             beta: float) -> Tensor:
    """DPO (Rafailov et al. 2023): the made-up answer y_+ is preferred to the true one y_-, against the model before.

    All (B,): log π(y_+ | x) and log π(y_- | x) of the model and of the frozen model before, summed over a text's
    tokens. beta > 0. Returns () >= 0; log 2 for equal models.
    """
    # L_DPO = -log σ(β [log π_θ(y_+)/π_ref(y_+) - log π_θ(y_-)/π_ref(y_-)])
    return mean_or_zero(-logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected))))


def generic_logits(original: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    """Eq. 9, "Who's Harry Potter" (Eldan & Russinovich 2023): what the model would say had it not known the texts.

    original, reinforced: (..., V) logits of the model and of one trained further on the texts to forget. alpha >= 0.
    Returns (..., V): lowered wherever reinforcement raised, else the original.
    """
    # z_generic = z_original - α ReLU(z_reinforced - z_original)
    return original - alpha * relu(reinforced - original)

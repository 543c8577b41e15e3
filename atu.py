"""The method of "Align-then-Unlearn" (arXiv 2506.13181): Eq. 2, Eq. 4 and the alternation of Sec. 3.

    align_then_unlearn  Sec. 3  align; then, for each tau: unlearn, align again
    align               Eq. 2   M is frozen, E learns to predict the embedding of the next k tokens
    unlearn             Eq. 4   E is frozen, M is tuned until few ê_t are more similar to e_unlearn than tau

Symbols: llm is M, head is E; tokens input_ids x_{1:T} (N T), hidden states h_t (B T D), predicted ê_t and
reference e_t (B T C), concept e_unlearn (C). All three are generators of records (dicts of numbers): plain
loops that write no files and print nothing but a bar on a terminal.

To be copied with head.py and losses.py; beside these it needs torch, numpy and tqdm.
"""

import copy
import math
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from head import EmbeddingHead
from losses import alignment_loss, cosine, retain_loss, unlearning_loss


@dataclass
class State:
    """All that changes in a run; at the end of a stage, all that is needed to go on."""

    llm: nn.Module
    head: EmbeddingHead | None
    llm_optimizer: torch.optim.Optimizer | None
    head_optimizer: torch.optim.Optimizer | None
    stage: int = 0  # the next one: 0 is the first alignment, stage s has the s-th tau


def align_then_unlearn(state: State, concept: Tensor, corpus, original: Tensor | None, config):
    """Secs. 2.2, 3 and 4.3: align E; then, for each tau, unlearn M and align E to what M has become, so that
    M cannot merely hide the concept from E.

    concept: (C,). corpus: a data.Corpus; E is aligned on all of its texts, M unlearns on those
    `about` the target. original: (R, T, D) M's hidden states on the R other texts before unlearning, for the
    retain term; None: no such term, as in the paper. config: a train.Config. The optimizers live as long as
    the run. Yields the records of `align` and `unlearn` and, when `state` is ready for the next stage, one of
    kind "aligned" (after the first alignment) or "stage" (M has moved).
    """
    llm, head, about = state.llm, state.head, corpus.about
    texts = corpus.input_ids, corpus.reference, corpus.valid
    forget = corpus.input_ids[about], corpus.mask[about]
    retain = None if original is None else (corpus.input_ids[~about], corpus.mask[~about], original)
    how = dict(layer=config.layer, clip=config.clip, bf16=config.bf16, log_every=config.log_every)
    aligning = how | dict(batch=config.align_batch, keep_on="cpu" if config.cache == "host" else None)
    unlearning = how | dict(batch=config.batch, retain_weight=config.retain_weight,
                            max_active=config.max_active)

    began = time.perf_counter()
    if state.stage == 0:  # else the run goes on where it was cut off
        yield from align(llm, head, state.head_optimizer, *texts, steps=config.align_steps,
                         seed=(config.seed, 0), **aligning)                                     # Eq. 2
        state.stage = 1
        yield {"kind": "aligned", "stage": 0, "steps": config.align_steps,
               "seconds": time.perf_counter() - began}
    for stage in range(state.stage, len(config.taus) + 1):
        began, seed, tau = time.perf_counter(), (config.seed, stage), config.taus[stage - 1]
        last = yield from unlearn(llm, head, state.llm_optimizer, *forget, concept, tau, retain,
                                  steps=config.unlearn_steps, seed=seed, **unlearning)          # Eq. 4
        yield from align(llm, head, state.head_optimizer, *texts, steps=config.realign_steps,
                         seed=seed, **aligning)                                                 # Eq. 2
        state.stage = stage + 1
        yield {"kind": "stage", "stage": stage, "tau": tau, "steps": last["step"] + config.realign_steps,
               "drift": last["drift"] if retain else None, "seconds": time.perf_counter() - began}


def align(llm, head, optimizer, input_ids, reference, valid, *, layer, steps, batch,
          seed=(0,), clip=1.0, bf16=False, keep_on=None, log_every=10):
    """Eq. 2: θ_E* = argmin 𝔼[L_align]. M is frozen, so its hidden states are computed once, at the start.

    optimizer: of E. input_ids: (N, T) long, padded on the right. reference: a function of rows, (B,) -> their
    e_t (B, T, C). valid: (N, T) bool, True where the window of t is whole. layer: the block whose output is
    h_t, 1 is the first. batch: texts in a step. seed: whole numbers, for the order of the texts. clip: the
    gradients' norm at most. bf16: compute in it; what is trained stays fp32. keep_on: the device that keeps
    the hidden states (None: M's).
    Yields {"kind": "align", "step", "loss"} every `log_every` steps and at the last. Raises RuntimeError
    before a step whose gradient is not finite.
    """
    device = llm.device
    head.requires_grad_(True)
    all_hidden = all_hidden_states(llm, input_ids, layer, batch, bf16, keep_on)         # (N, T, D)
    for step in tqdm(range(1, steps + 1), "aligning", leave=False, disable=None):
        rows = draw(len(input_ids), batch, step, seed)                                  # (B,)
        with autocast(device, bf16):
            predicted = head(all_hidden[rows].to(device)).float()                       # (B, T, C)
        loss = alignment_loss(predicted, reference(rows).to(device), valid[rows].to(device))  # Eq. 1

        # a clipped step along -∇L_align
        loss.backward()
        clip_grad_norm_(head.parameters(), clip, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()

        if step % log_every == 0 or step == steps:
            yield {"kind": "align", "step": step, "loss": loss.item()}


def unlearn(llm, head, optimizer, input_ids, mask, concept, tau, retain=None, *, layer, steps, batch,
            retain_weight=10.0, max_active=0.02, seed=(0,), clip=1.0, bf16=False, log_every=10):
    """Eq. 4: θ_M* = argmin 𝔼[L_unlearn]. E is frozen; blocks 1..layer of M run, what `unfreeze` chose moves.

    optimizer: of M. input_ids, mask: (N, T) the target's texts; mask is True on real tokens. concept: (C,).
    tau: the margin. retain: ours, not the paper's: ids and mask (R, T) of other texts, and the hidden states
    (R, T, D) to hold them to. max_active: the stage ends once, on average over a pass's batches, at most this
    share of the positions is above tau. All else is as for `align`.
    Yields {"kind": "unlearn", "tau", "step", "loss", "similarity", and of a pass "drift" (the mean of
    `retain_loss`) and "active" (that share)} as `align` does; returns the last. Raises likewise."""
    device, concept = llm.device, concept.to(llm.device)
    head.requires_grad_(False)
    nothing = input_ids[:0], mask[:0], mask[:0, :, None].float()  # no other texts: their drift is 0
    retain_ids, retain_mask, original = retain or nothing
    recent = deque(maxlen=math.ceil(len(input_ids) / batch))  # a pass's drifts and shares above tau
    for step in tqdm(range(1, steps + 1), "unlearning", leave=False, disable=None):
        rows = draw(len(input_ids), batch, step, seed)                                  # (B,)
        retain_rows = draw(len(retain_ids), batch, step, seed)                          # (B',)
        ids = torch.cat([input_ids[rows], retain_ids[retain_rows]]).to(device)          # (B + B', T)
        real, retain_real = mask[rows].to(device), retain_mask[retain_rows].to(device)  # (B, T), (B', T)

        with autocast(device, bf16):
            hidden = hidden_states(llm, ids, layer)                                     # (B + B', T, D)
            predicted = head(hidden[:len(rows)]).float()                                # (B, T, C)
        loss = unlearning_loss(predicted, concept, real, tau)                           # Eq. 3
        before = original[retain_rows].to(device).float()                               # (B', T, D)
        drift = retain_loss(hidden[len(rows):].float(), before, retain_real)            # ours

        # a clipped step along -∇(L_unlearn + w L_retain)
        (loss + retain_weight * drift).backward()
        clip_grad_norm_(llm.parameters(), clip, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()

        similarity = cosine(predicted.detach(), concept)[real]                          # (real tokens,)
        recent.append((drift.item(), (similarity > tau).float().mean().item()))
        mean_drift, active = (sum(part) / len(recent) for part in zip(*recent))
        # early, because where hardly a position is above tau the hinge has no gradient left
        ended = step == steps or (len(recent) == recent.maxlen and active <= max_active)
        if ended or step % log_every == 0:
            record = {"kind": "unlearn", "tau": tau, "step": step, "loss": loss.item(),
                      "similarity": similarity.mean().item(), "drift": mean_drift, "active": active}
            yield record
        if ended:
            return record


def unfreeze(llm: nn.Module, layer: int, embeddings=False, mlp_only=False) -> list[nn.Parameter]:
    """Freezes M, but for what shall move of θ_M: blocks 1..layer, and with `embeddings` the input embedding
    too, as in the paper (where M ties it to the LM head, that moves with it). With `mlp_only`, ours, of the
    blocks their feed-forward parts (`.mlp`) alone. Returns what moves.

    These blocks become fp32, and so does the input embedding, for the residual stream. All else keeps its
    dtype.
    """
    decoder = llm.requires_grad_(False).get_decoder()
    for block in decoder.layers[:layer].float():
        (block.mlp if mlp_only else block).requires_grad_(True)
    decoder.get_input_embeddings().float().requires_grad_(embeddings)
    return [parameter for parameter in llm.parameters() if parameter.requires_grad]


def hidden_states(llm: nn.Module, input_ids: Tensor, layer: int) -> Tensor:
    """h_1, ..., h_T: the output of block `layer` (1 is the first), (B, T) long -> (B, T, D), without the
    final norm.

    The blocks above do not run. No padding mask: padding is on the right and attention is causal, so it
    cannot reach a real position.
    """
    # a shallow copy shares the weights, and the dict of its children: copied too, or `llm` would lose blocks
    decoder = copy.copy(llm.get_decoder())
    decoder._modules = dict(decoder._modules)
    decoder.layers, decoder.norm = decoder.layers[:layer], nn.Identity()
    return decoder(input_ids=input_ids, use_cache=False).last_hidden_state


@torch.no_grad()
def all_hidden_states(llm: nn.Module, input_ids: Tensor, layer: int, batch: int, bf16=False, keep_on=None):
    """`hidden_states` of many texts, `batch` at a time: (N, T) -> (N, T, D), on the device `keep_on` (None:
    M's), in bf16 where they are computed in it."""
    device, dtype = llm.device, torch.bfloat16 if bf16 else torch.float32
    with autocast(device, bf16):
        return torch.cat([hidden_states(llm, ids.to(device), layer).to(keep_on or device, dtype)
                          for ids in input_ids.split(batch)])


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """bf16 autocast, or none. What moves, and its optimizer, stays in fp32: steps of 3e-4 vanish in bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def draw(count: int, batch: int, step: int, seed) -> Tensor:
    """The rows (B,) of step 1, 2, ... in passes over `count` texts, each pass in an order of its own.

    B is at most `batch`: a pass's batches are as equal as can be. No texts: no rows. A function of its
    arguments alone, so that a run can go on anywhere.
    """
    batches = max(math.ceil(count / batch), 1)
    passes, place = divmod(step - 1, batches)
    order = np.random.default_rng([*seed, passes]).permutation(count)
    return torch.from_numpy(order).tensor_split(batches)[place]

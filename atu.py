"""The method of "Align-then-Unlearn" (arXiv 2506.13181): Eq. 2, Eq. 4 and the alternation of Sec. 3.

    align_then_unlearn  Sec. 3  align; then, for each tau: unlearn, realign
    unlearn             Eq. 4   E is frozen, M is tuned until few predictions are closer than tau to the concept
    read_as_stranger    ours    before E is aligned: M reads the target's texts as if nobody knew the name
    align               Eq. 2   M is frozen, E learns to predict the embedding of the next k tokens

Symbols: llm is M, head is E; hidden h_t (B T D), predicted ê_t and reference e_t (B T E), concept e_unlearn (E).
All four are generators of records: plain loops that know no files and print nothing but a bar on a terminal. Below
them stand what is measured (`knowledge_gap`: whether the concept has left the representation), what serves them, and
last what several processes (torchrun) need. `config` is a train.Config.
"""

import copy
import math
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from statistics import mean, stdev

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, share_comm_ctx
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import layer_norm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from data import progress
from head import EmbeddingHead
from losses import alignment_loss, cosine, retain_loss, token_log_probs, unlearning_loss


class NotFinite(RuntimeError):
    """A loss or gradient that is not finite; raised before the step, so the weights are the last good ones."""


@dataclass
class State:
    """All that changes in a run. To go on after a stage, what moves, the optimizers, `stage` and `step` are enough."""

    llm: nn.Module
    head: EmbeddingHead | None  # the methods on tokens have none
    llm_optimizer: torch.optim.Optimizer | None
    head_optimizer: torch.optim.Optimizer | None
    original: Tensor | None = None  # (N, T, D) M's hidden states before unlearning, for the retain term; else (0, T, D)
    hidden: Tensor | None = None    # (N, T, D) those that E is aligned on
    stage: int = 0                  # the next one: 0 ends with the first alignment, s has the s-th tau
    step: int = 0                   # optimizer steps so far, of all kinds


# ---------------------------------------------------------------------------------------------- the method

def align_then_unlearn(state: State, concept: Tensor, corpus, config):
    """Sec. 3: align E; then for each tau unlearn M and realign E, so that the concept leaves the representation.

    Ours: before E is aligned, M learns to `read_as_stranger`, where the corpus has texts with made-up names.
    state: from `start`, or as an earlier run left it at the end of a stage. concept: (E,) unit length. corpus: a
    data.Corpus; E is aligned on all of its texts, M unlearns on those `about` the target.
    Yields the records of all three, and one of kind "stage" at the end of each stage (0 ends with the first
    alignment), with the `similarities` after realignment; by then `state` is ready for the next stage.
    """
    concept = concept.to(state.llm.device)
    for tau in [None, *config.taus][state.stage:]:
        began = unlearned = time.perf_counter()
        steps_before = state.step
        if state.stage or len(corpus.renamed):
            state.hidden = None                                                         # frees memory
            if state.stage:
                yield from unlearn(state, concept, corpus, tau, config)                 # Eq. 4
            else:
                yield from read_as_stranger(state, corpus, config)                      # ours
            unlearned = time.perf_counter()
            state.hidden = cached_hidden_states(state.llm, corpus.input_ids, config)    # (N, T, D)
        align_steps = config.realign_steps if state.stage else config.align_steps
        yield from align(state, corpus, align_steps, config)                            # Eq. 2
        state.stage += 1
        found = similarities(state.head, state.hidden, concept, corpus, config)
        now = time.perf_counter()
        yield {"kind": "stage", "stage": state.stage - 1, "tau": tau, "steps": state.step - steps_before, **found,
               "seconds": now - began, "align_seconds": now - unlearned}


def unlearn(state: State, concept: Tensor, corpus, tau: float, config):
    """Eq. 4: θ_M* = argmin E[L_unlearn]. E is frozen; blocks 1..layer of M alone run, and they move.

    The retain term is ours, not the paper's. It holds the hidden states of texts that are not about the target to
    `state.original`; with `retain_weight` 0 no such text is read.
    Ends after `unlearn_steps`, or once, over as many batches as a pass over the target's texts has, at most the share
    `inactive` of the positions was above the margin. Yields a record every `log_every` steps and one at the end.
    """
    a_pass, recent = math.ceil(corpus.about.sum() / config.batch), []  # its batches; the last ones' share above tau
    state.head.requires_grad_(False)
    for n in progress(range(config.unlearn_steps), "unlearning"):
        _, hidden, mask, held = forward(state, corpus, n, config)                               # (B, T, D), (B, T)
        with autocast(state.llm, config):
            predicted = state.head(hidden).float()                                              # (B, T, E)
        forget = unlearning_loss(predicted, concept, mask, tau)                                 # Eq. 3
        # θ_M ← θ_M - η ∇(L_unlearn + w L_retain)
        forget, retain = optimize([(forget, mask, 1), held], state.llm_optimizer, config.clip)

        state.step += 1
        similarity = cosine(predicted.detach(), concept)                                        # (B, T)
        recent = [*recent, average(similarity > tau, mask)][-a_pass:]
        active = sum(recent) / len(recent)
        ended = (len(recent) == a_pass and active <= config.inactive) or n + 1 == config.unlearn_steps
        if ended or (n + 1) % config.log_every == 0:
            yield {"kind": "unlearn", "stage": state.stage, "tau": tau, "step": state.step, "loss": forget,
                   "retain": retain, "similarity": average(similarity, mask), "active": active}
        if ended:
            break


def read_as_stranger(state: State, corpus, config):
    """Ours, not the paper's, before E is aligned for the first time: M is tuned to read the target's texts as if the
    name in them were one that nobody knows. E has no part in it.

    The hidden states of the target's texts are pulled to those that the untouched M has there with made-up names in the
    place of its own (`corpus.renamed`, the mean over the names), those of other texts held as in `unlearn`. Where no
    name has stood yet, these are M's own. Takes `stranger_steps`. Yields a record every `log_every` and at the last.
    """
    states = (cached_hidden_states(state.llm, ids, config).float() for ids in corpus.renamed)   # (n, T, D) each
    renamed = sum(states) / len(corpus.renamed)                                                 # (n, T, D)
    for n in progress(range(config.stranger_steps), "reading as a stranger"):
        rows, hidden, mask, held = forward(state, corpus, n, config)                            # hidden (B, T, D)
        stranger = retain_loss(hidden.float(), renamed[rows.to(renamed.device)].to(hidden.device), mask)
        # θ_M ← θ_M - η ∇(L_stranger + w L_retain)
        stranger, retain = optimize([(stranger, mask, 1), held], state.llm_optimizer, config.clip)

        state.step += 1
        if (n + 1) % config.log_every == 0 or n + 1 == config.stranger_steps:
            yield {"kind": "stranger", "stage": state.stage, "step": state.step, "loss": stranger, "retain": retain}


def forward(state: State, corpus, n: int, config):
    """Step n's texts through blocks 1..layer of M. Returns of B texts on the target their rows (B,), hidden states
    (B, T, D) and mask (B, T); of B others (none with `retain_weight` 0) the retain term: (loss, mask, weight)."""
    device, about, others = state.llm.device, corpus.about.nonzero()[:, 0], (~corpus.about).nonzero()[:, 0]
    others = others if config.retain_weight else others[:0]
    rows, held = (draw(texts, config.batch, n, config.seed, state.stage) for texts in (about, others))  # (B,) each
    mask, held_mask = corpus.mask[rows].to(device), corpus.mask[held].to(device)                # (B, T) each
    original = state.original[held.to(state.original.device)].to(device).float()                # (B, T, D)
    with autocast(state.llm, config):
        ids = corpus.input_ids[torch.cat([rows, held])].to(device)                              # (2B, T)
        hidden = hidden_states(state.llm, ids, config.layer)                                    # (2B, T, D)
    retain = retain_loss(hidden[len(rows):].float(), original, held_mask)
    return rows, hidden[:len(rows)], mask, (retain, held_mask, config.retain_weight)


def align(state: State, corpus, steps: int, config):
    """Eq. 2: θ_E* = argmin E[L_align]. M is frozen: its hidden states are `state.hidden`, computed once a round.

    Yields a record every `log_every` steps and at the last.
    """
    texts, device = torch.arange(len(state.hidden)), state.llm.device
    state.head.requires_grad_(True)
    for n in progress(range(steps), "aligning"):
        rows = draw(texts, config.align_batch, n, config.seed, state.stage)             # (B,)
        hidden = state.hidden[rows.to(state.hidden.device)].to(device)                  # (B, T, D)
        reference = corpus.table[corpus.index[rows]].to(device)                         # (B, T, E)
        valid = corpus.valid[rows].to(device)                                           # (B, T)

        with autocast(state.llm, config):
            predicted = state.head(hidden).float()                                      # (B, T, E)
        loss = alignment_loss(predicted, reference, valid)                              # Eq. 1
        # θ_E ← θ_E - η ∇L_align
        loss, = optimize([(loss, valid, 1)], state.head_optimizer, config.clip)

        state.step += 1
        if (n + 1) % config.log_every == 0 or n + 1 == steps:
            yield {"kind": "align", "stage": state.stage, "step": state.step, "loss": loss}


@torch.no_grad()
def similarities(head: EmbeddingHead, hidden: Tensor, concept: Tensor, corpus, config) -> dict:
    """sim(ê_t, e_unlearn) over all real tokens: mean and 95th percentile, on the target's texts and on the others."""
    with autocast(head, config):
        similarity = torch.cat([cosine(head(part.to(concept.device)).float(), concept)
                                for part in hidden.split(config.batch)]).cpu()       # (N, T)
    found = {}
    for name, texts in (("target", corpus.about), ("others", ~corpus.about)):
        values = similarity[texts][corpus.mask[texts]]                               # (real tokens,)
        found[f"similarity_{name}"] = values.mean().item()
        found[f"similarity_{name}_p95"] = values.sort().values[int(0.95 * (len(values) - 1))].item()
    return found


@torch.no_grad()
def knowledge_gap(llm: nn.Module, concept: Tensor | None, corpus, versions: tuple[Tensor, Tensor], config) -> dict:
    """Ours: what M reads in texts on the target beyond what it reads in the same texts about somebody nobody knows.

    versions: token ids and mask, ((1 + S) B, T), of B texts with the true name and, behind them, with S made-up names
    of as many tokens. What counts is what M makes of the other words: the tokens after the first place of the
    name that are the same in all versions.
    Returns gaps x 100 in favour of the true name, means over the made-up ones and their standard deviations, `_sd`:
    `nats` (M's own -log p of a token) and, where there is a `concept`, the `similarity` to it by the best linear E on
    block `layer`, solved for on texts of `corpus` that are not about the target. Above 0 M knows the target, and Sec.
    3's realigned E may find it; at 0 M reads a stranger; below, it reads worse than that, which betrays the target.
    """
    head = None if concept is None else linear_head(llm, corpus, config)
    ids, mask = (part.to(llm.device).unflatten(0, (1 + config.names, -1)) for part in versions)  # (1 + S, B, T)
    differ, read = (ids != ids[0]).any(0), []                                               # (B, T)
    same = mask[0] & ~differ & (differ.cumsum(1) > 0)                                       # (B, T)
    for texts in ids:                                                                       # (B, T)
        found = {"nats": [], "similarity": []}
        for part, counted in zip(texts.split(config.batch), same.split(config.batch)):      # (b, T) each
            with autocast(llm, config):
                logits = llm(input_ids=part, use_cache=False).logits.float()                # (b, T, V)
                hidden = hidden_states(llm, part, config.layer) if head else None           # (b, T, D)
            found["nats"].append(-token_log_probs(logits, part, counted))
            if head:
                found["similarity"].append(-cosine(head(hidden), concept.to(llm.device))[counted])
        read.append({name: torch.cat(values).mean().item() for name, values in found.items() if values})
    gaps = {name: [100 * (stranger[name] - read[0][name]) for stranger in read[1:]] for name in read[0]}
    return {name: mean(values) for name, values in gaps.items()} | {
        f"{name}_sd": stdev(values) if values[1:] else 0.0 for name, values in gaps.items()}


def linear_head(llm: nn.Module, corpus, config):
    """The linear E on block `layer` that is nearest to e_t on texts that are not about the target (every second one, to
    save time), solved for by least squares with a ridge: no seed, no steps. A function, (B, T, D) -> (B, T, E)."""
    width, sums = llm.config.hidden_size, 0.0
    for rows in (~corpus.about).nonzero()[::2, 0].split(config.batch):
        with autocast(llm, config):
            hidden = hidden_states(llm, corpus.input_ids[rows].to(llm.device), config.layer)  # (B, T, D)
        valid, reference = corpus.valid[rows], corpus.table[corpus.index[rows]]             # (B, T), (B, T, E)
        x = layer_norm(hidden.float(), [width])[valid.to(llm.device)].double()              # (N, D)
        x = torch.cat([x, x.new_ones(len(x), 1), reference[valid].to(x)], 1)                # (N, D + 1 + E)
        sums = sums + x.T @ x
    inputs = sums[:width + 1, :width + 1]
    ridge = 0.1 * inputs[-1, -1] * torch.eye(width + 1).to(inputs)                          # a tenth of their variance
    ridge[-1, -1] = 0                                                                       # none on the bias
    weight = torch.linalg.solve(inputs + ridge, sums[:width + 1, width + 1:]).float()       # (D + 1, E)
    return lambda hidden: layer_norm(hidden.float(), [width]) @ weight[:-1] + weight[-1]


# ---------------------------------------------------------------------------------------------- what serves it

def start(llm: nn.Module, corpus, config) -> State:
    """A new head, what moves and what does not, and one optimizer each, kept for the whole run.

    The blocks 1..layer move, in fp32, and with `train_embeddings` the input embedding too (the paper's θ_M; where it is
    tied to the LM head, that moves with it); with `lora` the adapters alone, which are there already. What is frozen
    keeps its dtype, except the input embedding: it is in fp32, so that the sum of what the blocks add to it is.
    """
    decoder = llm.get_decoder()
    decoder.get_input_embeddings().float()
    if not config.lora:
        llm.requires_grad_(False)
        decoder.layers[:config.layer].float().requires_grad_(True)
        decoder.get_input_embeddings().requires_grad_(config.train_embeddings)
    split_blocks(llm, config)
    with torch.random.fork_rng():  # E is drawn from `seed` alone; the global random state is left as it was
        torch.manual_seed(config.seed)
        head = EmbeddingHead(llm.config.hidden_size, corpus.table.shape[1], config.head_depth, config.head_width)
    head_optimizer = torch.optim.Adam(head.to(llm.device).parameters(), lr=config.head_lr, fused=True)
    hidden = cached_hidden_states(llm, corpus.input_ids, config)                        # (N, T, D)
    original = hidden if config.retain_weight else hidden.new_empty(0, *hidden.shape[1:])  # (N, T, D), or (0, T, D)
    return State(llm, head, llm_optimizer(llm, config), head_optimizer, original, hidden)


def llm_optimizer(llm: nn.Module, config) -> torch.optim.Optimizer:
    """The optimizer of what moves in the llm."""
    moving = [{"params": group} for group in by_kind(p for p in llm.parameters() if p.requires_grad)]
    if config.optimizer == "sgd":
        return torch.optim.SGD(moving, lr=config.llm_lr)
    return torch.optim.AdamW(moving, lr=config.llm_lr, weight_decay=0.0, fused=True)


def hidden_states(llm: nn.Module, input_ids: Tensor, layer: int) -> Tensor:
    """h_1, ..., h_T: the output of block `layer` (1 = first), (B, T) long -> (B, T, D), never with the final norm.

    The blocks above do not run. No padding mask: padding is on the right and attention is causal, so it cannot reach a
    real position.
    """
    decoder = copy.copy(llm.get_decoder())     # shares the weights, and the dict of its children too: that one is
    decoder._modules = dict(decoder._modules)  # copied, or `llm` would lose its blocks
    decoder.layers, decoder.norm = decoder.layers[:layer], nn.Identity()
    return decoder(input_ids=input_ids, use_cache=False).last_hidden_state


@torch.no_grad()
def cached_hidden_states(llm: nn.Module, input_ids: Tensor, config) -> Tensor:
    """`hidden_states` of a whole corpus, (N, T) -> (N, T, D), in bf16 where the forward is.

    On the llm's device, or in the host's memory (`cache`).
    """
    dtype, place = torch.bfloat16 if config.bf16 else torch.float32, "cpu" if config.cache == "host" else llm.device
    with autocast(llm, config):
        return torch.cat([hidden_states(llm, ids.to(llm.device), config.layer).to(place, dtype)
                          for ids in input_ids.split(config.batch)])


def autocast(module: nn.Module, config) -> torch.autocast:
    """bf16 autocast where `config.bf16` asks for it; what moves, and its optimizer, stays in fp32."""
    return torch.autocast(next(module.parameters()).device.type, torch.bfloat16, enabled=config.bf16)


def draw(texts: Tensor, batch: int, number: int, *seed: int) -> Tensor:
    """Batch `number` (from 0) of passes over `texts`, each in an order of its own, (N,) -> (`batch`,) or a few less.

    A pass's batches are as equal as can be. A function of its arguments alone; of several processes each gets its part.
    """
    if not len(texts):
        return texts
    batches = math.ceil(len(texts) / batch)
    order = np.random.default_rng([*seed, number // batches]).permutation(len(texts))
    rows = texts[torch.from_numpy(order).tensor_split(batches)[number % batches]]
    process, count = processes()
    return rows[process::count]


def optimize(terms: list[tuple[Tensor, Tensor, float]], optimizer: torch.optim.Optimizer, clip: float) -> list[float]:
    """Backward, clip, step on the sum of loss x weight. Raises NotFinite before the step if it, or the norm, is not.

    terms: (loss, mask, weight), each loss a mean over the positions (or texts) in its mask. Returns the losses' values;
    of several processes each has a part of the positions, and loss, gradient and value are those over all.
    """
    losses = [loss * share(mask) for loss, mask, _ in terms]
    sum(loss * weight for loss, (_, _, weight) in zip(losses, terms)).backward()
    norm = clip_gradients([p for group in optimizer.param_groups for p in group["params"]], clip)
    values = [total(loss).item() / processes()[1] for loss in losses]
    if not (all(map(math.isfinite, values)) and norm.isfinite()):
        optimizer.zero_grad()
        raise NotFinite(f"loss {' and '.join(map(str, values))}, or its gradient, is not finite")
    optimizer.step()
    optimizer.zero_grad()  # frees the gradients' memory before the next forward pass
    return values


# ---------------------------------------------------------------------------------------------- several processes
# Under torchrun every process does the same on its part of each batch (`draw`); `optimize` makes the parts one step.

def processes() -> tuple[int, int]:
    """(the number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def connected(device: str):
    """The processes of torchrun, if it has started this one, find each other."""
    if several := (int(os.environ.get("WORLD_SIZE", 1)) > 1):
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        # a day's patience, because one of them may write texts or encode windows for all
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=1))
    yield
    if several:
        dist.barrier()  # a process that left while its last exchange is being cleared away could abort
        dist.destroy_process_group()  # not after an error: the others may be waiting, until torchrun ends them


def total(value: Tensor) -> Tensor:
    """The sum over the processes."""
    if processes()[1] > 1:
        dist.all_reduce(value := value.detach().clone())
    return value


def share(mask: Tensor) -> Tensor:
    """This process's part of all positions in the masks, times the number of processes: what its mean counts for."""
    return mask.sum() * processes()[1] / total(mask.sum()).clamp(min=1)


def average(values: Tensor, mask: Tensor) -> float:
    """The mean of (B, T) values over the positions in (B, T) mask, of all processes."""
    return (total(values[mask].float().sum()) / total(mask.sum()).clamp(min=1)).item()


def from_first(thing):
    """What the first process has, on all."""
    if processes()[1] > 1:
        dist.broadcast_object_list(things := [thing], 0)
        return things[0]
    return thing


def split_blocks(llm: nn.Module, config) -> None:
    """Every block, with its gradients and optimizer state, is split over the processes (PyTorch's FSDP2), if any.

    The blocks alone, because `hidden_states` takes a part of them: embedding, last norm and LM head are whole on each.
    """
    if processes()[1] == 1:
        return
    mesh = dist.init_device_mesh(torch.device(config.device).type, (processes()[1],))
    policy = MixedPrecisionPolicy(torch.bfloat16 if config.bf16 else None, torch.float32, cast_forward_inputs=False)
    for block in llm.get_decoder().layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    share_comm_ctx(list(llm.get_decoder().layers))  # or whole gradients would stay until backward has ended
    llm.to(config.device)
    with torch.no_grad(), autocast(llm, config):    # FSDP2 counts the blocks in their first forward: all of them
        llm(input_ids=torch.zeros(1, 1, dtype=torch.long, device=config.device), use_cache=False)


def by_kind(parameters) -> list[list[nn.Parameter]]:
    """Those that are split over the processes, and those that are not, if any: PyTorch takes no mixture."""
    parameters = list(parameters)
    kinds = [[p for p in parameters if isinstance(p, DTensor) == split] for split in (True, False)]
    return [kind for kind in kinds if kind]


def clip_gradients(parameters: list[nn.Parameter], clip: float) -> Tensor:
    """All gradients together, means over the processes, are clipped to the norm `clip`. Returns the norm they had."""
    groups = by_kind(p for p in parameters if p.grad is not None)
    for parameter in groups[-1] if processes()[1] > 1 and not isinstance(groups[-1][0], DTensor) else ():
        parameter.grad = total(parameter.grad) / processes()[1]  # FSDP2 sees to those that are split
    norms = [get_total_norm([p.grad for p in group]) for group in groups]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for group in groups:
        clip_grads_with_norm_(group, clip, norm)
    return norm


def whole(value: Tensor) -> Tensor:
    """A tensor that may be split over the processes, whole, in the host's memory; on all but the first no content."""
    value = value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()
    return value.to("cpu" if processes()[0] == 0 else "meta")


def part_like(value, like: Tensor):
    """A whole tensor, split as `like` is, if it is; anything else as it is."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value

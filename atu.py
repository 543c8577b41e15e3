"""The method of "Align-then-Unlearn" (arXiv 2506.13181): Eq. 2, Eq. 4 and the alternation of Sec. 3.

    align               Eq. 2   M is frozen, E learns to predict the embedding of the next k tokens
    unlearn             Eq. 4   E is frozen, M is tuned until (almost) no prediction is closer than tau to the concept
    align_then_unlearn  Sec. 3  align; then, for each tau: unlearn, realign
    recovery            Sec. 3  how readable the concept still is for a fresh, newly aligned E

Symbols: llm is M, head is E; hidden h_t (B T D), predicted ê_t and reference e_t (B T E), concept e_unlearn (E).
All four are plain loops (three of them generators of records): they print nothing and know no files.
`config` is any object with the fields of train.Config that a docstring names. In a single process `mine`
changes nothing, `share` is 1 and `mean` takes a tensor's value: read past them (they are in the last section).
"""

import copy
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, share_comm_ctx
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from head import EmbeddingHead
from losses import alignment_loss, cosine, retain_loss, unlearning_loss


class NotFinite(RuntimeError):
    """A loss or gradient that is not finite; raised before the step, so the weights are the last good ones."""


@dataclass
class State:
    """All that changes during a run: `align`, `unlearn`, `align_then_unlearn` update it and go on from it anywhere."""

    llm: nn.Module
    head: EmbeddingHead | None  # the methods on tokens have none
    llm_optimizer: torch.optim.Optimizer | None
    head_optimizer: torch.optim.Optimizer | None
    original: Tensor | None = None  # (N, T, D) hidden states before unlearning, as long as they are needed
    hidden: Tensor | None = None    # (N, T, D) those that E was last aligned on
    stage: int = 0              # 0 is the first alignment, s the s-th tau
    aligning: bool = False      # in a stage, E is aligned after M has been unlearned
    done: int = 0               # steps of the alignment or unlearning under way
    recent: list[float] = field(default_factory=list)  # shares of positions above the margin in the last batches
    step: int = 0               # optimizer steps so far, of both kinds
    tokens: int = 0             # real tokens that went through M or E in them
    began: tuple[int, int] = (0, 0)  # `step` and `tokens` when the stage began
    record: dict = field(default_factory=dict)  # the last losses of the stage

    def next_stage(self) -> None:
        """The stage is over."""
        self.stage, self.aligning, self.began, self.record = self.stage + 1, False, (self.step, self.tokens), {}


def start(llm: nn.Module, corpus, config) -> State:
    """A new head, what moves and what does not (`unfreeze`), and one optimizer each, kept for the whole run.

    Reads, beside what that does, seed, head_depth, head_width, optimizer, llm_lr, head_lr, bf16, batch, cache.
    """
    unfreeze(llm, config)
    head = new_head(llm, corpus.table.shape[1], config)
    head_optimizer = torch.optim.Adam(head.parameters(), lr=config.head_lr, fused=True)
    return State(llm, head, llm_optimizer(llm, config), head_optimizer,
                 cached_hidden_states(llm, corpus.input_ids, config))


def unfreeze(llm: nn.Module, config) -> None:
    """What moves does, in fp32; the rest is frozen in the dtype that it has.

    The blocks 1..layer move, and with `train_embeddings` the input embedding too (the paper's θ_M; where it is tied to
    the LM head, that moves with it); with `lora` the adapters alone, which are there already. The embedding is in fp32
    in any case, and so what the blocks add to it. Reads layer, train_embeddings, lora.
    """
    decoder = llm.get_decoder()
    decoder.get_input_embeddings().float()
    if not config.lora:
        llm.requires_grad_(False)
        decoder.layers[:config.layer].float().requires_grad_(True)
        decoder.get_input_embeddings().requires_grad_(config.train_embeddings)


def llm_optimizer(llm: nn.Module, config) -> torch.optim.Optimizer:
    """The optimizer of what moves in the llm. Reads optimizer, llm_lr."""
    moving = [{"params": group} for group in by_kind(p for p in llm.parameters() if p.requires_grad)]
    if config.optimizer == "sgd":
        return torch.optim.SGD(moving, lr=config.llm_lr)
    return torch.optim.AdamW(moving, lr=config.llm_lr, weight_decay=0.0, fused=True)


def new_head(llm: nn.Module, embedding_size: int, config) -> EmbeddingHead:
    """A fresh E for this llm, drawn from `config.seed` alone; the global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        head = EmbeddingHead(llm.config.hidden_size, embedding_size, config.head_depth, config.head_width)
    return head.to(llm.device)


def truncated(llm: nn.Module, layer: int) -> nn.Module:
    """The decoder of `llm` cut after block `layer` (1 = first), without the final norm; its weights are shared.

    `copy.copy` of a module shares the dict of its children too: that dict is copied, or `llm` would lose its blocks.
    """
    decoder = copy.copy(llm.get_decoder())
    decoder._modules = dict(decoder._modules)
    decoder.layers = decoder.layers[:layer]
    decoder.norm = nn.Identity()
    return decoder


def hidden_states(llm: nn.Module, input_ids: Tensor, layer: int) -> Tensor:
    """h_1, ..., h_T: the output of block `layer`, (B, T) long -> (B, T, D). The blocks above it do not run.

    No padding mask: padding is on the right and attention is causal, so it cannot reach a real position.
    """
    return truncated(llm, layer)(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, D)


@torch.no_grad()
def cached_hidden_states(llm: nn.Module, input_ids: Tensor, config) -> Tensor:
    """`hidden_states` of a whole corpus, (N, T) -> (N, T, D), in bf16 where the forward is (`bf16`).

    On the llm's device, or in the host's memory (`cache`). Reads layer, batch, bf16, cache.
    """
    dtype, place = torch.bfloat16 if config.bf16 else torch.float32, "cpu" if config.cache == "host" else llm.device
    parts = []
    with autocast(llm, config):
        for ids in input_ids.split(config.batch * processes()[1]):
            hidden = hidden_states(llm, equal_part(ids).to(llm.device), config.layer).to(dtype)  # (B, T, D)
            parts.append(gather_parts(hidden)[:len(ids)].to(place))
    return torch.cat(parts)                                                                      # (N, T, D)


def align(state: State, corpus, steps: int, config):
    """Eq. 2: θ_E* = argmin E[L_align]. M is frozen: its hidden states are `state.hidden`, computed once a round.

    Yields a record every `log_every` steps and at the last. Reads align_batch, clip, bf16, log_every, seed.
    """
    hidden, device = state.hidden, state.llm.device                                     # (N, T, D)
    texts = torch.arange(len(hidden))
    while state.done < steps:
        batch = draw(texts, config.align_batch, state.done, config.seed, state.stage)   # (B,)
        rows = mine(batch)
        valid = corpus.valid[rows].to(device)                                           # (B, T)
        reference = corpus.table[corpus.index[rows]].to(device)                         # (B, T, E)

        with autocast(state.llm, config):
            predicted = state.head(hidden[rows.to(hidden.device)].to(device))           # (B, T, E)
        loss = alignment_loss(predicted.float(), reference, valid) * share(valid)
        # θ_E ← θ_E - η ∇L_align
        optimize(loss, state.head_optimizer, config.clip)

        state.done, state.step = state.done + 1, state.step + 1
        state.tokens += int(corpus.mask[batch].sum())
        if state.done % config.log_every == 0 or state.done == steps:
            state.record["align_loss"] = mean(loss)
            yield {"kind": "align", "stage": state.stage, "step": state.step, "loss": state.record["align_loss"]}
    state.done = 0


def unlearn(state: State, concept: Tensor, corpus, tau: float, config):
    """Eq. 4: θ_M* = argmin E[L_unlearn]. E is frozen; only blocks 1..layer of M run.

    concept: (E,). The retain term (not in the paper) holds the texts that are not about the concept to
    `state.original`; with `retain_weight` 0 these are not read, and that may be None.
    Ends when at most `inactive` of the positions were above the margin in the last batches, as many as a pass over the
    texts has, or after `unlearn_steps`. Yields a record every `log_every` steps and one at the end.
    Reads layer, batch, clip, bf16, log_every, retain_weight, unlearn_steps, inactive, seed.
    """
    device, about, others = state.llm.device, corpus.about.nonzero()[:, 0], (~corpus.about).nonzero()[:, 0]
    a_pass = math.ceil(len(about) / config.batch)  # its batches

    def finished() -> bool:
        return (state.done == config.unlearn_steps
                or len(state.recent) == a_pass and sum(state.recent) / a_pass <= config.inactive)

    state.head.requires_grad_(False)
    while not finished():
        batch = draw(about, config.batch, state.done, config.seed, state.stage)                 # (B,)
        held = draw(others, config.batch, state.done, config.seed, state.stage)                 # (B,)
        held = held if config.retain_weight else held[:0]
        rows, kept = mine(batch), mine(held)
        both = torch.cat([rows, kept])                                                          # (2B,)
        mask, kept_mask = (corpus.mask[part].to(device) for part in (rows, kept))               # (B, T) each

        with autocast(state.llm, config):
            hidden = hidden_states(state.llm, corpus.input_ids[both].to(device), config.layer)  # (2B, T, D)
            predicted = state.head(hidden[:len(rows)]).float()                                  # (B, T, E)
        forget = unlearning_loss(predicted, concept, mask, tau) * share(mask)
        drift = torch.zeros_like(forget)
        if config.retain_weight:
            original = state.original[kept.to(state.original.device)].to(device).float()        # (B, T, D)
            drift = retain_loss(hidden[len(rows):].float(), original, kept_mask) * share(kept_mask)
        # θ_M ← θ_M - η ∇(L_unlearn + w L_retain)
        optimize(forget + config.retain_weight * drift, state.llm_optimizer, config.clip)

        state.done, state.step = state.done + 1, state.step + 1
        similarity = cosine(predicted.detach(), concept)[mask]                                  # (real tokens,)
        active = mean((similarity > tau).float().mean() * share(mask))
        state.tokens += int(corpus.mask[torch.cat([batch, held])].sum())
        state.recent = [*state.recent, active][-a_pass:]
        if state.done % config.log_every == 0 or finished():
            state.record |= {"unlearn_loss": mean(forget), "retain_loss": mean(drift),
                             "active": sum(state.recent) / len(state.recent)}
            yield {"kind": "unlearn", "stage": state.stage, "tau": tau, "step": state.step,
                   "loss": state.record["unlearn_loss"], "retain": state.record["retain_loss"],
                   "similarity": mean(similarity.mean() * share(mask)), "active": state.record["active"]}
    state.llm_optimizer.zero_grad()  # frees the gradients' memory
    state.head.requires_grad_(True)
    state.done, state.recent = 0, []


def align_then_unlearn(state: State, concept: Tensor, corpus, config):
    """Sec. 3: align E; then for each tau unlearn M and realign E, so that the concept leaves the representation.

    concept: (E,) unit length. corpus: a data.Corpus; E is aligned on all of its texts, M unlearns on those with
    `about`, and the retain term holds M's hidden states on the others.
    Yields the records of `align` and `unlearn`, and one of kind "stage" at the end of each stage (stage 0 is the
    first alignment): stage, tau, steps, the losses at its end, the share of active positions, the similarity to
    the concept on the target's and on the other texts after realignment, seconds and tokens of the stage.
    A stage's record comes when the state is ready for the next one.
    Reads, beside what its parts read, taus, align_steps, realign_steps.
    """
    concept = concept.to(state.llm.device)
    while state.stage <= len(config.taus):
        began, tau, steps = time.perf_counter(), None, config.align_steps
        state.hidden = None if state.stage else state.original
        if state.stage:
            state.original = state.original if config.retain_weight else None  # frees its memory
            tau, steps = config.taus[state.stage - 1], config.realign_steps
            if not state.aligning:
                yield from unlearn(state, concept, corpus, tau, config)
            state.aligning = True
            state.hidden = cached_hidden_states(state.llm, corpus.input_ids, config)                # (N, T, D)
        yield from align(state, corpus, steps, config)
        record = {"kind": "stage", "stage": state.stage, "tau": tau, "steps": state.step - state.began[0],
                  **{name: state.record.get(name) for name in ("align_loss", "unlearn_loss", "retain_loss", "active")},
                  **similarities(state.head, state.hidden, concept, corpus, config),
                  "seconds": time.perf_counter() - began, "tokens": state.tokens - state.began[1]}
        state.next_stage()
        yield record


def recovery(llm: nn.Module, concept: Tensor, corpus, config, hidden: Tensor | None = None) -> dict:
    """How readable the concept is from M for "an optimally realigned E" (Sec. 3): a fresh head, aligned like the first.

    The same seed, batches and steps as stage 0 of `align_then_unlearn`, so that on the untouched model it is that
    very head. hidden: M's `cached_hidden_states` of the corpus, if they are known. Returns the fresh head's
    `similarities`. M is not changed. Reads, beside what its parts read, seed, head_depth, head_width, head_lr,
    align_steps.
    """
    head = new_head(llm, corpus.table.shape[1], config)
    optimizer = torch.optim.Adam(head.parameters(), lr=config.head_lr, fused=True)
    state = State(llm, head, None, optimizer)
    state.hidden = cached_hidden_states(llm, corpus.input_ids, config) if hidden is None else hidden
    for _ in align(state, corpus, config.align_steps, config):
        pass
    return similarities(head, state.hidden, concept.to(llm.device), corpus, config)


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


def draw(texts: Tensor, batch: int, number: int, *seed: int) -> Tensor:
    """Batch `number` (from 0) of passes over `texts`, each in an order of its own, (N,) -> (`batch`,) or a few less.

    A pass's batches are as equal as can be. A function of its arguments alone, so that a run can go on anywhere.
    """
    batches = math.ceil(len(texts) / batch)
    order = np.random.default_rng([*seed, number // batches]).permutation(len(texts))
    return texts[torch.from_numpy(order).tensor_split(batches)[number % batches]]


def optimize(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float) -> None:
    """Backward, clip, step. Raises NotFinite before the step if the loss or the gradient's norm is not finite."""
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average_gradients(parameters)
    if not (math.isfinite(mean(loss)) and clip_gradients(parameters, clip).isfinite()):
        raise NotFinite(f"loss {loss.item()}, or its gradient, is not finite")
    optimizer.step()


def autocast(module: nn.Module, config) -> torch.autocast:
    """bf16 autocast where `config.bf16` asks for it; what moves, and its optimizer, stays in fp32."""
    return torch.autocast(next(module.parameters()).device.type, torch.bfloat16, enabled=config.bf16)


# ---------------------------------------------------------------------------------------------- several processes
# Under torchrun all processes draw the same batches and each takes its part; for one process none of this matters.

def processes() -> tuple[int, int]:
    """(the number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mine(rows: Tensor) -> Tensor:
    """This process's part of a batch, (B,) -> (B / count,)."""
    number, count = processes()
    return rows[number::count]


def total(value: Tensor) -> Tensor:
    """The sum over the processes."""
    if processes()[1] > 1:
        dist.all_reduce(value := value.detach().clone())
    return value


def mean(value: Tensor) -> float:
    """The mean over the processes, () -> a number."""
    return total(value).item() / processes()[1]


def share(mask: Tensor) -> Tensor | float:
    """What a mean over this process's positions is multiplied with, so that the mean of the products over the processes
    is the mean over all positions: its part of the positions in `mask`, times the number of processes."""
    count = processes()[1]
    return mask.sum() * count / total(mask.sum()).clamp(min=1) if count > 1 else 1.0


def equal_part(rows: Tensor) -> Tensor:
    """This process's part of (N, ...), as many rows as the others have: the last ones begin again with the first."""
    number, count = processes()
    size = math.ceil(len(rows) / count)
    return rows[torch.arange(number * size, (number + 1) * size) % len(rows)]


def gather_parts(part: Tensor) -> Tensor:
    """The equal parts of all processes, one below the other, (n, ...) -> (n count, ...)."""
    count = processes()[1]
    if count == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(count)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def shard(llm: nn.Module, config) -> None:
    """Every block of the llm, with its gradients and optimizer state, is split over the processes (FSDP2).

    The blocks alone, because `truncated` shares them: embedding, last norm and LM head are whole everywhere.
    Reads device, bf16.
    """
    mesh = dist.init_device_mesh(torch.device(config.device).type, (processes()[1],))
    policy = MixedPrecisionPolicy(torch.bfloat16 if config.bf16 else None, torch.float32, cast_forward_inputs=False)
    for block in llm.get_decoder().layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    share_comm_ctx(list(llm.get_decoder().layers))  # or whole gradients would stay until backward has ended


def by_kind(parameters) -> list[list[nn.Parameter]]:
    """Those that are split over the processes, and those that are not, if any: PyTorch takes no mixture."""
    parameters = list(parameters)
    kinds = [[p for p in parameters if isinstance(p, DTensor) == split] for split in (True, False)]
    return [kind for kind in kinds if kind]


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """The mean over the processes of the gradients that are not split over them (FSDP2 sees to the others)."""
    count = processes()[1]
    for parameter in parameters if count > 1 else ():
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= count


def clip_gradients(parameters: list[nn.Parameter], clip: float) -> Tensor:
    """All gradients together are clipped to the norm `clip`. Returns the norm that they had."""
    groups = by_kind(p for p in parameters if p.grad is not None)
    norms = [get_total_norm([p.grad for p in group]) for group in groups]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for group in groups:
        clip_grads_with_norm_(group, clip, norm)
    return norm

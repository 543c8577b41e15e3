"""What a step costs: seconds, beside a straightforward loop and the bare arithmetic, and memory.

    python -m experiments.benchmark [--shape phi3] [--device cuda]
    python -m experiments.benchmark --shape phi3 --memory

Random weights of a preset's shape: nothing is downloaded. The straightforward loop runs all of M in every
step, in alignment also the encoder on every window, as the authors' code does; ours are `atu.align` and
`atu.unlearn`. Both take batches of one shape, in turn, in one process; shown are medians (least to most).
"Floor": our step's products at the rate of a large one, and the bytes of what moves at that of a large copy.
All alignment counts caches too: hidden states (once a stage) and embeddings (once). --memory: peaks of an
unlearning step and of answering, and a run's operations, simulated: tensors have sizes and no content (and
attention is a CPU's, autocast too).
"""

import argparse
import dataclasses
import itertools
import sys
import tempfile
import time
import weakref
from pathlib import Path
from statistics import median

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._subclasses import FakeTensorMode
from torch.nn.functional import normalize
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import atu
import data
import evaluate
import train
from head import EmbeddingHead
from losses import alignment_loss, cosine, retain_loss, unlearning_loss

SHAPES = {  # M, and the encoder's width, blocks and heads; the last is for tests
    "smol": (LlamaForCausalLM, LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True), (384, 6, 12)),
    "phi3": (Phi3ForCausalLM, Phi3Config(pad_token_id=0), (768, 12, 12)),
    "tiny": (LlamaForCausalLM, LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        tie_word_embeddings=True), (16, 1, 2)),
}
TINY = dict(length=16, window=4, layer=2, head_depth=1, head_width=16, batch=2, align_batch=2)


def make_models(shape: str, config: train.Config, device: str):
    """(M, E) with random weights, as `train.begin` has them."""
    kind, llm_config, (width, *_) = SHAPES[shape]
    with torch.device(device):
        llm = kind(llm_config).eval().to(torch.bfloat16 if shape == "phi3" else torch.float32)  # as its file
        head = EmbeddingHead(llm_config.hidden_size, width, config.head_depth, config.head_width)
        llm = train.prepare(llm, config, config.layer)
    if device == "cpu":
        llm.set_attn_implementation("eager")
    if not config.lora:
        atu.unfreeze(llm, config.layer, config.train_embeddings, config.mlp_only)
    return llm, head


def make_encoder(width: int, depth: int, heads: int, device: str):
    """(encoder, tokenizer) with random weights and 400 words."""
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{n}": n for n in range(2, 402)}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
    bert = BertModel(BertConfig(vocab_size=len(words), hidden_size=width, num_hidden_layers=depth,
                                num_attention_heads=heads, intermediate_size=4 * width))
    with tempfile.TemporaryDirectory() as folder:
        bert.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        parts = [Transformer(folder, max_seq_length=64), Pooling(width)]
        return SentenceTransformer(modules=parts, device=device).eval().requires_grad_(False), tokenizer


# ------------------------------------------------------------------------------- seconds

def measure_speed(shape: str, config: train.Config, rounds: int) -> dict:
    """Both kinds of step, on random texts of full length, half of them about the target. Returns "align" and
    "unlearn" as `measure` does, and "whole": all alignment of a run."""
    device, N, T = config.device, 4 * config.align_batch, config.length
    llm, head = make_models(shape, config, device)
    encoder, tokenizer = make_encoder(*SHAPES[shape][2], device)
    ids = torch.randint(2, 402, (N, T))
    windows, *_ = data.future_windows(ids, torch.ones_like(ids).bool(), config.window, tokenizer)
    optimizer = torch.optim.Adam(head.parameters(), lr=config.head_lr, fused=True)
    ours = alignment(llm, head, optimizer, ids, shape, config)
    align = measure("alignment step", config, rounds, optimizer, lambda: next(ours),
                    lambda: straightforward_alignment(llm, head, optimizer, ids[:config.align_batch], encoder,
                                                      tokenizer, config))
    optimizer = train.llm_optimizer(llm, config)
    steps, concept, retain = unlearning(llm, head, optimizer, ids, shape, config)
    unlearn = measure("unlearning step", config, rounds, optimizer, lambda: next(steps),
                      lambda: straightforward_unlearning(llm, head, optimizer, ids[:config.batch], concept,
                                                         retain, config))

    with tempfile.TemporaryDirectory() as folder:
        data.CACHE = Path(folder)
        data.embed(windows[:64], encoder)  # the first one is slower
        reading = seconds(lambda: data.embed(windows[:8], encoder), device)  # the encoder, for its hash
        embeddings = (seconds(lambda: data.embed(windows, encoder), device) - reading) / N
    states = seconds(lambda: atu.all_hidden_states(
        llm, ids, config.layer, config.batch, config.bf16), device) / N
    print(f"caches | {1e3 * states:.1f} ms a text and stage, {1e3 * embeddings:.1f} ms a text, {reading:.2f} s once")
    stages, steps = 1 + len(config.taus), config.align_steps + len(config.taus) * config.realign_steps
    whole = {"texts": texts(config), "steps": steps, "straightforward": steps * align["straightforward"],
             "ours": steps * align["ours"] + reading + texts(config) * (stages * states + embeddings)}
    print(f"all alignment | {whole['texts']} texts, {steps} steps | ours {whole['ours'] / 60:.1f} min, "
          f"caches counted | straightforward {whole['straightforward'] / 60:.1f} min | "
          f"{whole['straightforward'] / whole['ours']:.1f} x", flush=True)
    return {"align": align, "unlearn": unlearn, "whole": whole}


def texts(config: train.Config) -> int:
    """How many a run has at most."""
    return config.target_texts + config.others * config.other_texts + config.general_texts * (
        config.rwku == "sample")


def alignment(llm, head, optimizer, ids, shape: str, config: train.Config):
    """Endless records of `atu.align`, one a step, on texts (N, T)."""
    N, T = ids.shape
    index = torch.arange(N * T).view(N, T)
    valid = (torch.arange(T) + config.window < T).expand(N, T)
    kept = "cpu" if config.cache == "host" else llm.device
    table = normalize(torch.randn(N * T, SHAPES[shape][2][0]), dim=-1).to(kept)             # (U, C)
    return atu.align(llm, head, optimizer, ids, lambda rows: table[index[rows]], valid, layer=config.layer,
                     steps=10**9, batch=config.align_batch, bf16=config.bf16, log_every=1)


def unlearning(llm, head, optimizer, ids, shape: str, config: train.Config):
    """(endless records of `atu.unlearn`, one a step, on the first half of texts (N, T); concept; retain)."""
    half, everywhere = len(ids) // 2, torch.ones(ids.shape, dtype=torch.bool)               # (N, T)
    concept = normalize(torch.randn(SHAPES[shape][2][0]), dim=0).to(llm.device)             # (C,)
    before = atu.all_hidden_states(llm, ids[half:], config.layer, config.batch, config.bf16)  # (N / 2, T, D)
    retain = (ids[half:], everywhere[half:], before) if config.retain_weight else None
    ours = atu.unlearn(llm, head, optimizer, ids[:half], everywhere[:half], concept, -1.0, retain,
                       layer=config.layer, steps=10**9, batch=config.batch, max_active=-1.0,
                       retain_weight=config.retain_weight, bf16=config.bf16, log_every=1)
    return ours, concept, retain


def measure(name: str, config: train.Config, rounds: int, optimizer, ours, straightforward) -> dict:
    """Steps of both, in turn; the first ones do not count. Returns "ours", "straightforward" (medians) and
    "floor", in seconds."""
    steps = ours, straightforward
    times = [[seconds(step, config.device) for step in steps] for _ in range(rounds + 1)][1:]
    with FlopCounterMode(display=False) as counter:
        ours()
    size = 8192 if config.device.startswith("cuda") else 2048
    a = torch.randn(size, size, dtype=torch.bfloat16 if config.bf16 else torch.float32, device=config.device)
    b = torch.empty_like(a)
    product, copies = (min(seconds(work, config.device) for _ in range(5)) for work in (
        lambda: a @ a, lambda: [b.copy_(a) for _ in range(20)]))
    # a weight: 28 bytes for its gradient, the norm, clipping and the step; 10 for bf16; 16 for Adam's means
    bytes_each = 28 + 10 * config.bf16 + 16 * (not isinstance(optimizer, torch.optim.SGD))
    moved = sum(parameter.numel() for parameter in optimizer.param_groups[0]["params"])
    floor = counter.get_total_flops() * product / (2 * size**3) + moved * bytes_each * copies / (40 * a.nbytes)
    (one, other), both = map(median, zip(*times)), zip(*times)
    shown = [f"{1e3 * median(each):.1f} ms ({1e3 * min(each):.1f} to {1e3 * max(each):.1f})" for each in both]
    print(f"{name} | ours {shown[0]} | floor {1e3 * floor:.1f} ms | straightforward {shown[1]} | "
          f"{other / one:.1f} x | {rounds} rounds", flush=True)
    return {"ours": one, "straightforward": other, "floor": floor}


def seconds(work, device: str) -> float:
    """The time that `work()` takes."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def straightforward_alignment(llm, head, optimizer, ids, encoder, tokenizer, config: train.Config) -> None:
    """A step of Eq. 2 on texts (B, T): all of M, and the encoder on every window."""
    windows = ids[:, 1:].unfold(1, config.window, 1)                                        # (B, T - k, k)
    texts = tokenizer.batch_decode(windows.flatten(0, 1))
    with atu.autocast(llm.device, config.bf16):
        with torch.no_grad():
            states = llm(ids.to(llm.device), output_hidden_states=True, use_cache=False).hidden_states
            reference = encoder.encode(texts, batch_size=len(texts), convert_to_tensor=True,
                                       normalize_embeddings=True, show_progress_bar=False)
        predicted = head(states[config.layer]).float()[:, :windows.shape[1]]                # (B, T - k, C)
    valid = torch.ones(windows.shape[:2], dtype=torch.bool, device=llm.device)              # (B, T - k)
    descend(alignment_loss(predicted, reference.float().view_as(predicted), valid), optimizer, config)


def straightforward_unlearning(llm, head, optimizer, ids, concept, retain, config: train.Config) -> None:
    """A step of Eq. 4 on texts (B, T): all of M."""
    B, real = len(ids), torch.ones(ids.shape, dtype=torch.bool, device=llm.device)          # (B, T)
    ids = torch.cat([ids, retain[0][:B]] if retain else [ids]).to(llm.device)               # (B or 2B, T)
    with atu.autocast(llm.device, config.bf16):
        hidden = llm(ids, output_hidden_states=True, use_cache=False).hidden_states[config.layer]
        predicted = head(hidden[:B]).float()                                                # (B, T, C)
    loss = unlearning_loss(predicted, concept, real, -1.0)
    if retain:
        loss = loss + config.retain_weight * retain_loss(hidden[B:].float(), retain[2][:B].float(), real)
    descend(loss, optimizer, config)


def descend(loss, optimizer, config: train.Config) -> None:
    """θ ← θ - η ∇L, as in atu.py."""
    loss.backward()
    clip_grad_norm_(optimizer.param_groups[0]["params"], config.clip)
    optimizer.step()
    optimizer.zero_grad()


# ------------------------------------------------------------------------------- memory

def measure_memory(shape: str, config: train.Config) -> None:
    """The peak by layer, and by what moves M and how."""
    layers = [*(layer for layer in (10, 20) if layer < config.layer), config.layer]
    ways = [("sgd", 0, False), ("adamw", 0, False), ("sgd", 0, True), ("adamw", 8, False), ("adamw", 8, True)]
    for layer, (optimizer, lora, checkpointing) in itertools.product(layers, ways):
        peak = simulated_peak(shape, dataclasses.replace(
            config, layer=layer, optimizer=optimizer, lora=lora, checkpointing=checkpointing))
        print(f"memory | layer {layer} | {f'LoRA {lora}' if lora else 'full'} | {optimizer} | "
              f"{'checkpointing' if checkpointing else 'activations kept'} | {peak / 1e9:.1f} GB", flush=True)
    for name in ("phi3", "phi3-24gb") if shape == "phi3" else ():
        count = operations(shape, dataclasses.replace(config, **train.PRESETS[name]))
        hours = " and ".join(f"{count / rate / 3.6e15:.1f} h at {rate}" for rate in (400, 80))
        print(f"operations | --preset {name} | {count:.2g} in all: {hours} TFLOP/s",
              flush=True)
    for layer, prompts in itertools.product(layers, (16, 40)):
        answering = dataclasses.replace(config, layer=layer, eval_batch=prompts)
        peak = simulated_answers(shape, answering, 3500, False)
        print(f"memory | layer {layer} | the letters of {prompts} of MMLU's longest prompts (3,500 tokens) | "
              f"{peak / 1e9:.1f} GB", flush=True)


def simulated_peak(shape: str, config: train.Config) -> int:
    """Bytes at the peak of two steps, as `atu.unlearn` takes them, on all positions."""
    llm, head = make_models(shape, config, "meta")
    with FakeTensorMode(allow_non_fake_inputs=True), Memory() as memory:
        llm.to_empty(device="cpu").tie_weights()
        head.to_empty(device="cpu").requires_grad_(False)
        optimizer, concept = train.llm_optimizer(llm, config), torch.ones(SHAPES[shape][2][0])
        ids = torch.zeros(config.batch * (2 if config.retain_weight else 1), config.length, dtype=torch.long)
        for _ in range(2):
            with atu.autocast(ids.device, config.bf16):
                hidden = atu.hidden_states(llm, ids, config.layer)                          # (B or 2B, T, D)
                predicted = head(hidden[:config.batch]).float()                             # (B, T, C)
            descend(torch.relu(cosine(predicted, concept) + 1).mean(), optimizer, config)
            del hidden, predicted
    return memory.peak


@torch.no_grad()
def simulated_answers(shape: str, config: train.Config, tokens: int, cache: bool) -> int:
    """Bytes at the peak of reading a batch of prompts. cache: whether keys and values are kept."""
    llm, _ = make_models(shape, config, "meta")
    with FakeTensorMode(allow_non_fake_inputs=True), Memory() as memory:
        llm.to_empty(device="cpu").tie_weights()
        copied = evaluate.answering_copy(llm, torch.bfloat16 if config.bf16 else torch.float32)
        copied.set_attn_implementation("sdpa")
        ids = torch.zeros(config.eval_batch, tokens, dtype=torch.long)                      # (B, T)
        copied(input_ids=ids, use_cache=cache, logits_to_keep=1)
    return memory.peak


def operations(shape: str, config: train.Config) -> float:
    """Products and sums of a whole run, scores and embeddings apart, counted without doing them."""
    llm, head = make_models(shape, config, "meta")
    ids = torch.zeros(config.batch * (2 if config.retain_weight else 1), config.length, dtype=torch.long)
    counted = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        llm.to_empty(device="cpu").tie_weights()
        head.to_empty(device="cpu")
        hidden = torch.zeros(config.align_batch, config.length, llm.config.hidden_size)     # (B, T, D)
        for work in (lambda: head(hidden).sum().backward(),
                     lambda: head(atu.hidden_states(llm, ids, config.layer)).sum().backward(),
                     lambda: atu.all_hidden_states(llm, ids[:1], config.layer, 1)):
            with FlopCounterMode(display=False) as counter:
                work()
            counted.append(counter.get_total_flops())
    stages, (aligned, unlearned, text) = len(config.taus), counted
    return (aligned * (config.align_steps + stages * config.realign_steps)
            + unlearned * stages * config.unlearn_steps + text * (1 + stages) * texts(config))


class Memory(TorchDispatchMode):
    """Adds up the bytes of all tensors that there are; `peak` is the most there have been."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and id(storage := leaf.untyped_storage()) not in self.sizes:
                self.sizes[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, id(storage))
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises BadInput."""
    parser = argparse.ArgumentParser(description="What a step costs: seconds, and memory.")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smol", help="of which preset (default: smol)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--rounds", type=int, default=15, help="measurements of each step (default: 15)")
    add("--memory", action="store_true", help="memory instead")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise data.BadInput(f"--rounds {args.rounds}: must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code: as `data.command`."""
    def work() -> None:
        args = arguments(argv)
        device, usual = data.choose_device(args.device), train.PRESETS.get(args.shape, TINY)
        bf16 = args.memory or data.fast_dtype(device) == torch.bfloat16
        config = train.Config(**usual | {"device": device, "bf16": bf16})
        print(f"{args.shape} | {device} | {torch.get_num_threads()} threads | {'bf16' if bf16 else 'fp32'}")
        measure_memory(args.shape, config) if args.memory else measure_speed(args.shape, config, args.rounds)

    return data.command(work)


if __name__ == "__main__":
    sys.exit(main())

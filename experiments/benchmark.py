"""What a step costs: seconds, beside a straightforward loop and the bare arithmetic, and memory.

    python -m experiments.benchmark [--shape phi3] [--device cuda]
    python -m experiments.benchmark --shape phi3 --memory

Random weights of a preset's shape: nothing is downloaded. The straightforward loop runs all of M in every
step, in alignment also the encoder on every window, as the authors' code does; ours are `atu.align` and
`atu.unlearn`. Both take batches of one shape, in turn, in one process; shown are medians (least to most).
"Arithmetic": our step's operations at the rate of a large matrix product. All alignment counts caches too:
hidden states (once a stage) and embeddings (once). --memory: an unlearning step's peak, simulated, as its
tensors have sizes and no content; other texts' hidden states are not in it.
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
import train
from head import EmbeddingHead
from losses import alignment_loss, cosine, retain_loss, unlearning_loss

TEXTS = 600
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
        atu.unfreeze(llm, config.layer, config.train_embeddings)
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

def measure_speed(shape: str, config: train.Config, rounds: int) -> None:
    """Both kinds of step, on random texts of full length, half of them about the target."""
    device, N, T, B = config.device, 4 * config.align_batch, config.length, config.batch
    llm, head = make_models(shape, config, device)
    encoder, tokenizer = make_encoder(*SHAPES[shape][2], device)
    ids, everywhere = torch.randint(2, 402, (N, T)), torch.ones(N, T, dtype=torch.bool)     # (N, T) each
    windows, index, valid = data.future_windows(ids, everywhere, config.window, tokenizer)
    table = normalize(torch.randn(len(windows), SHAPES[shape][2][0]), dim=-1)               # (U, E)
    how = {"layer": config.layer, "steps": 10**9, "bf16": config.bf16, "log_every": 1}      # a record a step

    optimizer = torch.optim.Adam(head.parameters(), lr=config.head_lr, fused=True)
    ours = atu.align(llm, head, optimizer, ids, lambda rows: table[index[rows]], valid,
                     batch=config.align_batch, **how)
    align = measure("alignment step", config, rounds, lambda: next(ours), lambda: straightforward_alignment(
        llm, head, optimizer, ids[:config.align_batch], encoder, tokenizer, config))

    half, optimizer, concept = N // 2, train.llm_optimizer(llm, config), table[0].to(device)
    before = atu.all_hidden_states(llm, ids[half:], config.layer, B, config.bf16)           # (N / 2, T, D)
    retain = (ids[half:], everywhere[half:], before) if config.retain_weight else None
    ours = atu.unlearn(llm, head, optimizer, ids[:half], everywhere[:half], concept, -1.0, retain, batch=B,
                       retain_weight=config.retain_weight, max_active=-1.0, **how)
    measure("unlearning step", config, rounds, lambda: next(ours), lambda: straightforward_unlearning(
        llm, head, optimizer, ids[:B], concept, retain, config))

    with tempfile.TemporaryDirectory() as folder:
        data.CACHE = Path(folder)
        embeddings = seconds(lambda: data.embed(windows, encoder), device) / N
    states = seconds(lambda: atu.all_hidden_states(llm, ids, config.layer, B, config.bf16), device) / N
    stages, steps = 1 + len(config.taus), config.align_steps + len(config.taus) * config.realign_steps
    ours, straightforward = steps * align[0] + TEXTS * (stages * states + embeddings), steps * align[1]
    print(f"caches | {1e3 * states:.1f} ms a text and stage, {1e3 * embeddings:.1f} ms a text")
    print(f"all alignment | {TEXTS} texts, {steps} steps | ours {ours / 60:.1f} min, caches counted | "
          f"straightforward {straightforward / 60:.1f} min | {straightforward / ours:.1f} x", flush=True)


def measure(name: str, config: train.Config, rounds: int, ours, straightforward) -> tuple[float, float]:
    """Steps of both, in turn; the first ones do not count. Returns the medians, in seconds."""
    steps = ours, straightforward
    times = [[seconds(step, config.device) for step in steps] for _ in range(rounds + 1)][1:]
    with FlopCounterMode(display=False) as counter:
        ours()
    size = 8192 if config.device.startswith("cuda") else 2048
    a = torch.randn(size, size, dtype=torch.bfloat16 if config.bf16 else torch.float32, device=config.device)
    rate = 2 * size**3 / min(seconds(lambda: a @ a, config.device) for _ in range(5))
    (one, other), both = map(median, zip(*times)), zip(*times)
    shown = [f"{1e3 * median(each):.1f} ms ({1e3 * min(each):.1f} to {1e3 * max(each):.1f})" for each in both]
    print(f"{name} | ours {shown[0]} | arithmetic {1e3 * counter.get_total_flops() / rate:.1f} ms | "
          f"straightforward {shown[1]} | {other / one:.1f} x | {rounds} rounds", flush=True)
    return one, other


def seconds(work, device: str) -> float:
    """The time that `work()` takes."""
    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
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
        predicted = head(states[config.layer]).float()[:, :windows.shape[1]]                # (B, T - k, E)
    valid = torch.ones(windows.shape[:2], dtype=torch.bool, device=llm.device)              # (B, T - k)
    descend(alignment_loss(predicted, reference.float().view_as(predicted), valid), optimizer, config)


def straightforward_unlearning(llm, head, optimizer, ids, concept, retain, config: train.Config) -> None:
    """A step of Eq. 4 on texts (B, T): all of M."""
    B, real = len(ids), torch.ones(ids.shape, dtype=torch.bool, device=llm.device)          # (B, T)
    ids = torch.cat([ids, retain[0][:B]] if retain else [ids]).to(llm.device)               # (B or 2B, T)
    with atu.autocast(llm.device, config.bf16):
        hidden = llm(ids, output_hidden_states=True, use_cache=False).hidden_states[config.layer]
        predicted = head(hidden[:B]).float()                                                # (B, T, E)
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
                predicted = head(hidden[:config.batch]).float()                             # (B, T, E)
            descend(torch.relu(cosine(predicted, concept) + 1).mean(), optimizer, config)
            del hidden, predicted
    return memory.peak


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
    """The command line."""
    parser = argparse.ArgumentParser(description="What a step costs: seconds, and memory.")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smol", help="of which preset (default: smol)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--rounds", type=int, default=15, help="measurements of each step (default: 15)")
    add("--memory", action="store_true", help="memory instead")
    return parser.parse_args(argv)


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

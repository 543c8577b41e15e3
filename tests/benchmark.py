"""How near the work of a run comes to what this machine can do, and how far from the straightforward way of doing it.

    python tests/benchmark.py [--shape smol|phi3] [--device cpu|cuda] [--compile]
    python tests/benchmark.py --run runs/warren-buffett        where a finished run's seconds went, beside their floors
    python tests/benchmark.py --memory [--device cuda]         peak memory of an unlearning step, measured or simulated

Random weights of the preset's shape, so nothing is downloaded. For an alignment step (Eq. 2), an unlearning step (Eq. 4)
and a batch of answers it prints the time measured, and its floor: the sum over all operations that cannot be left out of
the larger of two times, that of the arithmetic at the matrix rate measured here at that very shape, and that of the
bytes at the copy rate. The straightforward loop, which is here alone, runs the whole model with all its hidden states
and the encoder on every window, and caches nothing; both loops run on batches of the same shape, in turn, in this
process. From the steps' times it projects the preset's schedule without early stops, ours with the two caches that its
alignment steps rest on (hidden states once a round, windows' embeddings once), of a corpus of --texts. Scores are in neither.
--memory: by layer, optimizer, adapters, and activations kept or not; without a GPU PyTorch's memory tracker counts the
same step on tensors without content.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import atu
import data
import evaluate
import losses
import train
from conftest import make_tokenizer
from head import EmbeddingHead

SHAPES = {  # the language model, and the encoder's width, blocks and heads
    "smol": (LlamaForCausalLM, LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1), (384, 6, 12)),
    "phi3": (Phi3ForCausalLM, Phi3Config(pad_token_id=0, eos_token_id=1), (768, 12, 12)),
}


# ---------------------------------------------------------------------------------------------- rates and floors

def seconds(work, device: str, least: float = 0.3) -> float:
    """The least time that `work()` takes, repeated for `least` seconds."""
    work()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < least:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@cache
def product_seconds(m: int, k: int, n: int, count: int, dtype: torch.dtype, device: str) -> float:
    """`count` matrix products (m, k) x (k, n) at once."""
    a, b = torch.randn(count, m, k, dtype=dtype, device=device), torch.randn(count, k, n, dtype=dtype, device=device)
    return seconds((lambda: a @ b) if count > 1 else (lambda: a[0] @ b[0]), device)


@cache
def copy_rate(device: str) -> float:
    """Bytes a second, read and written."""
    source = torch.ones(2**28 if device.startswith("cuda") else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


class Floor:
    """Adds up the operations of a step: products (each at the rate of its shape) and bytes (at the copy rate)."""

    def __init__(self, dtype: torch.dtype, device: str):
        self.dtype, self.device, self.seconds, self.operations = dtype, device, 0.0, 0

    def product(self, m: int, k: int, n: int, count: int = 1, times: int = 1) -> None:
        """(m, k) x (k, n), `count` of them at once, `times` one after the other."""
        size = torch.finfo(self.dtype).bits // 8
        touched = size * count * (m * k + k * n + m * n)
        self.operations += 2 * m * k * n * count * times
        self.seconds += times * max(product_seconds(m, k, n, count, self.dtype, self.device),
                                    touched / copy_rate(self.device))

    def touch(self, bytes: float) -> None:
        self.seconds += bytes / copy_rate(self.device)

    def linear(self, tokens: int, inputs: int, outputs: int, backward: str, times: int) -> None:
        """A linear layer forward, and the gradients named in `backward`: i(nput), w(eight)."""
        self.product(tokens, inputs, outputs, times=times)
        if "i" in backward:
            self.product(tokens, outputs, inputs, times=times)
        if "w" in backward:
            self.product(inputs, tokens, outputs, times=times)

    def attention(self, batch: int, heads: int, length: int, width: int, backward: bool, times: int) -> None:
        """Scores and sums of full (not halved) squares; backward computes the scores again."""
        self.product(length, width, length, batch * heads, times * (1 + 2 * backward))
        self.product(length, length, width, batch * heads, times * (1 + 2 * backward))

    def block(self, config, batch: int, length: int, backward: str, times: int, input_moves: bool = True) -> None:
        """A block of the language model: attention with grouped queries, a gated feed-forward layer, two norms."""
        D, F, tokens = config.hidden_size, config.intermediate_size, batch * length
        width = D // config.num_attention_heads
        kv = width * config.num_key_value_heads
        self.linear(tokens, D, D + 2 * kv, backward if input_moves else backward.replace("i", ""), times)
        self.attention(batch, config.num_attention_heads, length, width, bool(backward), times)
        self.linear(tokens, D, D, backward, times)
        self.linear(tokens, D, 2 * F, backward, times)
        self.linear(tokens, F, D, backward, times)
        # read and written once: two norms, rotations, the gate, two sums; backward twice that
        values = tokens * (2 * 2 * D + 2 * (D + kv) + 3 * F + 2 * 3 * D)
        self.touch(times * values * torch.finfo(self.dtype).bits // 8 * (3 if backward else 1))

    def head(self, head, batch: int, length: int, backward: str) -> None:
        """E: every linear layer, attention, norms and GELU."""
        tokens = batch * length
        for module in head.modules():
            if isinstance(module, torch.nn.Linear):
                self.linear(tokens, module.in_features, module.out_features, backward, 1)
        width, depth = head.outputs[1].in_features, len(head.blocks)
        self.attention(batch, 8, length, width // 8, bool(backward), depth)
        self.touch(depth * tokens * (2 * 2 + 2 * 4 + 2 * 3) * width * torch.finfo(self.dtype).bits // 8
                   * (3 if backward else 1))

    def encoder(self, config, texts: int, length: int) -> None:
        """The frozen encoder on texts of so many tokens: attention with all heads, a feed-forward layer, two norms."""
        D, F, tokens = config.hidden_size, config.intermediate_size, texts * length
        parts = -(-tokens // 3072)  # as many tokens at a time as `data.embed` takes, or about that
        for inputs, outputs in ((D, 3 * D), (D, D), (D, F), (F, D)):
            self.product(tokens // parts, inputs, outputs, times=config.num_hidden_layers * parts)
        self.touch(config.num_hidden_layers * tokens * (2 * 2 * D + 2 * F + 3 * D) * torch.finfo(self.dtype).bits // 8)

    def answers(self, shape, lengths: list[list[int]]) -> None:
        """Questions (prompt, gold, said: tokens of each), all at once: read without padding, then token by token."""
        prompts, golds, said = zip(*lengths)
        read = sum(prompts) + sum(golds)
        self.block(shape, len(prompts), -(-read // len(prompts)), "", shape.num_hidden_layers)
        self.product(sum(golds) + len(prompts), shape.hidden_size, shape.vocab_size)
        for n in range(1, max(said)):
            going = sum(length > n for length in said)
            self.block(shape, going, 1, "", shape.num_hidden_layers)
            self.product(going, shape.hidden_size, shape.vocab_size)

    def update(self, parameters: int, adam: bool) -> None:
        """Gradients written, their norm, the optimizer, and the weights cast for the next forward."""
        self.touch(parameters * (4 + 4 + (28 if adam else 12) + (6 if self.dtype == torch.bfloat16 else 0)))


# ---------------------------------------------------------------------------------------------- what is measured

def make(shape: str, device: str):
    """(llm, tokenizer, encoder) with random weights."""
    kind, config, (width, depth, heads) = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        llm = kind(config).eval()
    if device == "cpu":
        llm.set_attn_implementation("eager")  # as train.py
    tokenizer = make_tokenizer()
    bert = BertModel(BertConfig(vocab_size=600, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
                                intermediate_size=4 * width))
    with tempfile.TemporaryDirectory() as folder:
        bert.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        encoder = SentenceTransformer(modules=[Transformer(folder, max_seq_length=64), Pooling(width)], device=device)
    return llm, tokenizer, encoder.eval().requires_grad_(False)


def make_corpus(tokenizer, width: int, config) -> data.Corpus:
    """Random texts of full length, half of them about the target; random reference embeddings."""
    N, T = 4 * config.align_batch, config.length
    input_ids = torch.randint(6, 400, (N, T))
    mask = torch.ones(N, T, dtype=torch.bool)
    windows, index, valid = data.future_windows(input_ids, mask, config.window, tokenizer)
    table = torch.nn.functional.normalize(torch.randn(len(windows), width), dim=-1)
    return data.Corpus(input_ids, mask, index, valid, torch.arange(N) < N // 2, table, input_ids.new_empty(0, N // 2, T))


def one(loop) -> None:
    """Runs a generator to its end."""
    for _ in loop:
        pass


def straightforward_alignment(state, corpus, encoder, tokenizer, config) -> None:
    """A step as the authors' code does it: the whole model, all hidden states, the encoder on every window."""
    rows = torch.randperm(len(corpus.input_ids))[:config.align_batch]
    ids = corpus.input_ids[rows].to(state.llm.device)
    windows = ids[:, 1:].unfold(1, config.window, 1)                                     # (B, T - k, k)
    with torch.no_grad(), atu.autocast(state.llm, config):
        hidden = state.llm(ids, output_hidden_states=True, use_cache=False).hidden_states[config.layer]
        texts = tokenizer.batch_decode(windows.reshape(-1, config.window))
        reference = encoder.encode(texts, batch_size=len(texts), convert_to_tensor=True, normalize_embeddings=True)
    reference = reference.float().view(*windows.shape[:2], -1)                           # (B, T - k, E)
    with atu.autocast(state.llm, config):
        predicted = state.head(hidden).float()[:, :windows.shape[1]]                     # (B, T - k, E)
    mask = torch.ones(predicted.shape[:2], dtype=torch.bool, device=ids.device)
    atu.optimize([(losses.alignment_loss(predicted, reference, mask), mask, 1)], state.head_optimizer, config.clip)


def straightforward_unlearning(state, concept, corpus, config) -> None:
    """A step of Eq. 4 through the whole model, every block and the LM head."""
    rows = torch.randperm(int(corpus.about.sum()))[:config.batch]
    if config.retain_weight:
        rows = torch.cat([rows, len(corpus.about) - 1 - rows])
    ids, mask = corpus.input_ids[rows].to(state.llm.device), corpus.mask[rows].to(state.llm.device)
    with atu.autocast(state.llm, config):
        hidden = state.llm(ids, output_hidden_states=True, use_cache=False).hidden_states[config.layer]
        predicted = state.head(hidden).float()
    atu.optimize([(losses.unlearning_loss(predicted, concept, mask, -1.0), mask, 1)], state.llm_optimizer, config.clip)


def in_turn(works: dict, device: str, least: float) -> dict[str, list[float]]:
    """Times of each of `works`, one after the other, again and again for `least` seconds."""
    for work in works.values():
        work()
    found, began = {name: [] for name in works}, time.perf_counter()
    while time.perf_counter() - began < least or len(next(iter(found.values()))) < 3:
        for name, work in works.items():
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            found[name].append(time.perf_counter() - start)
    return found


def straightforward_answers(llm, tokenizer, prompts: list[str], golds: list[str], tokens: int) -> None:
    """`generate`, and a second run over prompt and gold answer for its probability."""
    tokenizer.padding_side = "left"
    turn = tokenizer(prompts, return_tensors="pt", padding=True).to(llm.device)
    with torch.inference_mode():
        llm.generate(**turn, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        both = tokenizer([p + " " + g for p, g in zip(prompts, golds)], return_tensors="pt", padding=True).to(llm.device)
        llm(**both).logits.float().log_softmax(-1)
    tokenizer.padding_side = "right"


def floors(llm, head, config, prompts: tuple[int, int], golds: int, tokens: int, device: str) -> dict[str, Floor]:
    """The floor of each part. prompts: how many, of how many tokens."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    size, shape = torch.finfo(dtype).bits // 8, llm.config
    found = {name: Floor(dtype, device) for name in ("alignment step", "unlearning step", "answers")}
    floor = found["alignment step"]
    floor.head(head, config.align_batch, config.length, "iw")
    floor.update(sum(p.numel() for p in head.parameters()), adam=True)

    floor = found["unlearning step"]
    texts = config.batch * (2 if config.retain_weight else 1)
    floor.block(shape, texts, config.length, "iw", 1, input_moves=False)
    floor.block(shape, texts, config.length, "iw", config.layer - 1)
    floor.head(head, config.batch, config.length, "i")
    floor.update(sum(p.numel() for p in llm.get_decoder().layers[:config.layer].parameters()), config.optimizer == "adamw")

    floor, (count, length), V = found["answers"], prompts, shape.vocab_size
    blocks = shape.num_hidden_layers
    floor.block(shape, count, length + golds, "", blocks)
    floor.product(count * (golds + 1), shape.hidden_size, V)
    width = shape.hidden_size // shape.num_attention_heads
    for n in range(tokens - 1):
        floor.block(shape, count, 1, "", blocks)
        floor.touch(2 * blocks * count * (length + n) * width * shape.num_key_value_heads * size)  # keys, values
        floor.product(count, shape.hidden_size, V)
    return found


def caches_seconds(llm, corpus, encoder, tokenizer, config, device: str) -> tuple[float, float]:
    """What alignment has cached, by text: its hidden states, and its windows' embeddings, all of them distinct."""
    windows = corpus.input_ids[:, 1:].unfold(1, config.window, 1).reshape(-1, config.window)
    texts = list(dict.fromkeys(tokenizer.batch_decode(windows)))

    def encode() -> None:
        with tempfile.TemporaryDirectory() as folder:
            data.CACHE = Path(folder)
            data.embed(texts, encoder)

    hidden = seconds(lambda: atu.cached_hidden_states(llm, corpus.input_ids, config), device)
    return hidden / len(corpus.input_ids), seconds(encode, device) / len(corpus.input_ids)


def measure_run(folder: Path) -> None:
    """A finished run of atu: each phase's seconds, its floor on this machine, and its share of the run, as Markdown.

    Every stage's answers count as long as the untouched model's."""
    results = json.loads((folder / "results.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    config = train.Config(**{name: tuple(value) if isinstance(value, list) else value
                             for name, value in results["settings"].items()})
    work, stages = train.load(config), [record for record in log if record["kind"] == "stage"]
    head = atu.start(work.llm, work.corpus, config).head
    rows = evaluate.evaluate(work.llm, work.tokenizer, work.probes, config.eval_batch, bf16=config.bf16)[1]
    lengths = [[len(work.tokenizer(text)["input_ids"]) for text in (row["prompt"], row["answers"][0], row["said"])] for row in rows]
    one_step = floors(work.llm, head, config, (1, 1), 1, 1, config.device)
    align_steps = config.align_steps + config.realign_steps * (len(stages) - 1)
    dtype, shape = torch.bfloat16 if config.bf16 else torch.float32, work.llm.config
    windows, states, scores = (Floor(dtype, config.device) for _ in range(3))
    encoder = data.load_encoder(config.encoder)[0].auto_model.config
    windows.encoder(encoder, len(work.corpus.table), config.window + 2)
    states.block(shape, *work.corpus.input_ids.shape, "", config.layer)
    scores.answers(shape, lengths)
    floor = {"embedding windows": windows.seconds,
             "aligning": one_step["alignment step"].seconds * align_steps + states.seconds * len(results["stages"]),
             "unlearning": one_step["unlearning step"].seconds * (sum(record["steps"] for record in stages) - align_steps),
             "scoring": scores.seconds * (1 + len(results["stages"]))}
    if results["phases"]["embedding windows"] < windows.seconds:  # they were read from the cache
        del floor["embedding windows"]
    spent = results["phases"] | {"reading, first states, saving": results["seconds"] - sum(results["phases"].values())}
    found = [[phase, f"{seconds:.0f}", f"{floor[phase]:.0f}" if phase in floor else "", f"{100 * seconds / results['seconds']:.0f} %"]
             for phase, seconds in spent.items()]
    print(evaluate.table([["phase", "seconds", "floor", "share"], *found,
                          ["all", f"{results['seconds']:.0f}", f"{sum(floor.values()):.0f}", ""]]))


def peak_memory(work, device: str) -> str:
    """On a GPU, that of `work()` and of all that is held beside it."""
    if not device.startswith("cuda"):
        return ""
    torch.cuda.reset_peak_memory_stats()
    work()
    return f" | peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"


def report(name: str, tokens: int, ours: list[float], other: list[float], floor: Floor, device: str, peak: str) -> None:
    """A part's line."""
    middle, straight = statistics.median(ours), statistics.median(other)
    print(f"{name} | median {1e3 * middle:.1f} ms ({1e3 * min(ours):.1f} to {1e3 * max(ours):.1f}, {len(ours)} times) | "
          f"floor {1e3 * floor.seconds:.1f} ms | {middle / floor.seconds:.2f} x floor | {tokens / middle:.0f} tokens/s | "
          f"{floor.operations / middle / 1e12:.2f} TFLOP/s, {100 * floor.operations / middle / top_rate(floor.dtype, device):.0f} % of "
          f"this device's | straightforward {1e3 * straight:.1f} ms | {straight / middle:.1f} x faster{peak}", flush=True)


@cache
def top_rate(dtype: torch.dtype, device: str) -> float:
    """Operations a second in a large matrix product."""
    size = 8192 if device.startswith("cuda") else 2048
    return 2 * size**3 / product_seconds(size, size, size, 1, dtype, device)


def measure_speed(args, config, device: str) -> None:
    """Alignment, unlearning, answers: ours, the floor, and the straightforward way."""
    tokens, golds = 30, 4
    llm, tokenizer, encoder = make(args.shape, device)
    llm = llm.bfloat16() if args.shape == "phi3" else llm  # as the file
    corpus = make_corpus(tokenizer, SHAPES[args.shape][2][0], config)
    concept = corpus.table[0].to(device)
    state = atu.start(llm, corpus, config)
    whole = copy.deepcopy(llm) if args.compile else llm  # for the straightforward loops, which are not compiled
    plain = atu.start(whole, corpus, config)
    for block in llm.get_decoder().layers if args.compile else ():
        block.compile()
    words = [tokenizer.decode(torch.randint(6, 400, (60,))) for _ in range(args.prompts)]
    prompts, answers = [f"a question {text}" for text in words], ["a bird of the sea"] * args.prompts
    voice = evaluate.answering_copy(llm, torch.bfloat16 if config.bf16 else torch.float32)
    voice.set_attn_implementation("sdpa")  # as evaluate.py
    length = max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    floor = floors(llm, state.head, config, (args.prompts, length), golds, tokens, device)
    parts = {
        "alignment step": (config.align_batch * config.length, {
            "ours": lambda: one(atu.align(state, corpus, 1, config)),
            "straightforward": lambda: straightforward_alignment(plain, corpus, encoder, tokenizer, config)}),
        "unlearning step": (config.batch * config.length * (2 if config.retain_weight else 1), {
            "ours": lambda: one(atu.unlearn(state, concept, corpus, -1.0, config)),
            "straightforward": lambda: straightforward_unlearning(plain, concept, corpus, config)}),
        "answers": (args.prompts * (length + tokens), {
            "ours": lambda: evaluate.answer(voice, tokenizer, prompts, args.prompts, tokens, (), answers),
            "straightforward": lambda: straightforward_answers(voice, tokenizer, prompts, answers, tokens)}),
    }
    found = {}
    for name, (count, works) in parts.items():
        times = in_turn(works, device, args.seconds)
        report(name, count, times["ours"], times["straightforward"], floor[name], device, peak_memory(works["ours"], device))
        found[name] = statistics.median(times["ours"]), statistics.median(times["straightforward"])
    project(train.PRESETS[args.shape], found, caches_seconds(llm, corpus, encoder, tokenizer, config, device), args.texts)


def project(preset, found: dict[str, tuple[float, float]], caches: tuple[float, float], texts: int) -> None:
    """The preset's schedule, from the seconds of a step, ours and straightforward, and of a text's caches."""
    steps = {"alignment step": preset.align_steps + len(preset.taus) * preset.realign_steps,
             "unlearning step": len(preset.taus) * preset.unlearn_steps}
    rounds = 1 + len(preset.taus)
    hidden, embedded = caches[0] * texts * rounds, caches[1] * texts
    print(f"caches | {texts} texts: hidden states of {rounds} rounds {hidden:.1f} s, embeddings of all windows "
          f"{embedded:.1f} s", flush=True)
    align, unlearn = ([steps[name] * time for time in found[name]] for name in steps)
    ours = align[0] + hidden + embedded
    print(f"projected | {steps['alignment step']} alignment steps with their caches {ours / 60:.1f} min, straightforward "
          f"{align[1] / 60:.1f} min, {align[1] / ours:.1f} x faster | {steps['unlearning step']} unlearning steps without "
          f"early stops {unlearn[0] / 60:.1f} min, straightforward {unlearn[1] / 60:.1f} min", flush=True)


def measure_memory(args, config, device: str) -> None:
    """Peak memory of the third of three unlearning steps: of a GPU, or simulated."""
    for layer in (10, 20, 29):
        for optimizer, lora, checkpointing in (("sgd", 0, False), ("adamw", 0, False), ("sgd", 0, True), ("adamw", 8, False),
                                               ("adamw", 8, True)):
            now = dataclasses.replace(config, layer=layer, optimizer=optimizer, lora=lora, checkpointing=checkpointing)
            peak = gpu_peak(args.shape, now) if device.startswith("cuda") else simulated_peak(args.shape, now)
            print(f"memory | layer {layer} | {'LoRA 8' if lora else 'full'} | {optimizer} | "
                  f"{'checkpointing' if checkpointing else 'activations kept'} | {peak}", flush=True)


def prepared(llm, config):
    """The model as train.py has it when unlearning begins; with adapters, if any."""
    llm = train.add_adapters(llm, config) if config.lora else llm
    if config.checkpointing:
        llm.activation_checkpointing_enable({"use_reentrant": False})
    train.recompute_in_blocks(llm, config)
    return llm


def gpu_peak(shape: str, config) -> str:
    llm, tokenizer, _ = make(shape, config.device)
    llm = prepared(llm.bfloat16(), config)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    corpus = make_corpus(tokenizer, SHAPES[shape][2][0], config)
    try:
        state = atu.start(llm, corpus, config)
        for _ in range(3):
            one(atu.unlearn(state, corpus.table[0].to(config.device), corpus, -1.0, config))
    except torch.OutOfMemoryError:
        return "more than there is"
    return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"


def hollow(module: torch.nn.Module) -> None:
    """A module on the meta device gets tensors on the CPU, without content under FakeTensorMode."""
    made = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, old in held.items():
                if old is not None and id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
                held[name] = old if old is None else made[id(old)]


class Tracker(MemTracker):
    """PyTorch's, for models that are frozen in part: it would hang hooks on parameters that get no gradient."""

    def _track_module_params_and_buffers(self, module, install_grad_hooks: bool = True):
        return super()._track_module_params_and_buffers(module, False)


def simulated_peak(shape: str, config) -> str:
    """The step of `atu.unlearn` on tensors without content, whose sizes PyTorch's tracker adds up; every position counts,
    because a mask's has no content either. Round-up of allocations, kernels' workspaces and the states of other texts
    are not in it."""
    kind, shape_config, (width, *_) = SHAPES[shape]
    with torch.device("meta"):  # as `atu.start` has them
        llm = prepared(kind(shape_config).bfloat16().eval(), config)
        llm.get_decoder().get_input_embeddings().float()
        if not config.lora:
            llm.requires_grad_(False)
            llm.get_decoder().layers[:config.layer].float().requires_grad_(True)
        head = EmbeddingHead(llm.config.hidden_size, width, config.head_depth, config.head_width).requires_grad_(False)
    with FakeTensorMode():
        hollow(llm)
        hollow(head)
        optimizer = atu.llm_optimizer(llm, config)
        ids = torch.zeros(config.batch * (2 if config.retain_weight else 1), config.length, dtype=torch.long)
        concept = torch.ones(width)
        tracker = Tracker()
        tracker.track_external(llm, head, optimizer, ids, concept)
        with tracker:
            for _ in range(3):  # as `atu.optimize` orders them
                with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                    hidden = atu.hidden_states(llm, ids, config.layer)
                    predicted = head(hidden[:config.batch]).float()
                torch.relu(losses.cosine(predicted, concept) + 1).mean().backward()
                torch.nn.utils.clip_grad_norm_([p for p in llm.parameters() if p.grad is not None], config.clip)
                optimizer.step()
                optimizer.zero_grad()
                del hidden, predicted
                tracker.reset_mod_stats()
        peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
    return f"{peak['Total'] / 1e9:.1f} GB (simulated)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="smol")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=15, help="of measuring each part at least (default: 15)")
    parser.add_argument("--prompts", type=int, default=40, help="questions in the batch of answers (default: 40)")
    parser.add_argument("--texts", type=int, default=600, help="of the projected run's corpus (default: 600)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, as train.py --compile")
    parser.add_argument("--memory", action="store_true", help="peak memory instead")
    parser.add_argument("--run", type=Path, help="a finished run of atu on forget, neighbor and general: its phases instead")
    args = parser.parse_args()
    data.keep_freed_memory(args.device)
    if args.run:
        return measure_run(args.run)
    config = dataclasses.replace(train.PRESETS[args.shape], device=args.device, log_every=10**9, unlearn_steps=1,
                                 bf16=args.memory or data.fast_dtype(args.device) == torch.bfloat16, align_steps=1)
    print(f"{args.shape} | {args.device} | {torch.get_num_threads()} threads | {'bf16' if config.bf16 else 'fp32'} | "
          f"copies {copy_rate(args.device) / 1e9:.1f} GB/s", flush=True)
    (measure_memory if args.memory else measure_speed)(args, config, args.device)


if __name__ == "__main__":
    main()

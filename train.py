"""Align-then-Unlearn (arXiv 2506.13181), from a name to a model that forgot it; and the methods it is compared with.

    python train.py --target "Warren Buffett"
    python train.py --target "Warren Buffett" --method npo --retain kl

Reads from `main` down: options, what a run works on, the stages of Sec. 4.3 (tau is lowered stage by stage, every stage
is scored), the methods on tokens (Appendix A.2: GA, NPO, DPO, RT; ICU is a prompt and trains nothing), what is kept and
what is shown. The method itself is in atu.py, the equations in losses.py.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

import atu
import data
import evaluate
import losses


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 0: done; 1: stopped by a loss that is not finite; else as `data.command`."""
    first = int(os.environ.get("RANK", 0)) == 0  # of torchrun's processes; the others print nothing

    def work() -> int:
        config = parse(argv)
        data.keep_freed_memory(config.device)
        with atu.connected(config.device), claimed(config) if first else nullcontext():
            config = dataclasses.replace(atu.from_first(config), device=config.device)  # with the first one's preset
            finished = Path(config.out) / "results.json"
            if not atu.from_first(finished.exists()):
                return 1 if run(config)["stopped"] else 0
            print(f"resumed | {config.out}: finished already")
            return 1 if json.loads(finished.read_text())["stopped"] else 0

    with open(os.devnull, "w") as nowhere, nullcontext() if first else redirect_stdout(nowhere):
        return data.command(work, "--eval-batch, --batch or --length (atu: --align-batch, --layer); or take "
                            "--checkpointing, --lora 8, (atu) --cache host, or more devices (torchrun)",
                            "; the same command with --resume goes on")


# ---------------------------------------------------------------------------------------------- options

METHODS, TOKEN_METHODS = ("atu", "icu", "ga", "npo", "dpo", "rt"), ("ga", "npo", "dpo", "rt")


class Read(NamedTuple):
    """Which runs read an option: in words, and as a question to the configuration."""

    words: str
    by: Callable


TARGET = Read("--target", lambda config: not config.target_text)
PASSAGE = Read("--target-text", lambda config: config.target_text)
ATU = Read("--method atu", lambda config: config.method == "atu")
ATU_FULL = Read("--method atu without --lora", lambda config: config.method == "atu" and not config.lora)
TOKENS = Read("--method ga, npo, dpo or rt (atu has --retain-weight)", lambda config: config.method in TOKEN_METHODS)
RATIO = Read("--method npo or dpo", lambda config: config.method in ("npo", "dpo"))
HELD = Read("--retain nll or kl", lambda config: config.method == "atu" or config.retain != "none")
TRAINS = Read("a method that trains", lambda config: config.method != "icu")


def option(default, help: str, read=None, least: float = -math.inf, most: float = math.inf, among: tuple = ()):
    """A field of the configuration: its --help, what it goes with (above), and what its value, or each, may be."""
    return field(default=default, metadata=dict(help=help, read=read, least=least, most=most, among=among))


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. The defaults are the preset `smol`."""

    target: str = option("", "the person to forget, as in RWKU, in any case; or any concept: M then writes the texts")
    target_text: str = option("", "a file with a passage to forget word for word, instead of a --target")
    keep_text: str = option("", "a file with a passage that shall survive that; scored, not trained on", PASSAGE)
    describe: str = option("", "what the target is, beside its name: for the encoder, and for M as it writes", TARGET)
    probes: str = option("", "a file of own probes in RWKU's fields (query, answer, level, type, neighbor)", TARGET)
    neighbors: tuple[str, ...] = option((), "names near a concept in no dataset (default: M is asked)", TARGET)
    corpus_size: int = option(32, "texts that M writes on such a concept, and on all its neighbors together", TARGET, 1)
    preset: str = option("auto", "smol (small, packaged weights, sample data), phi3 (the authors' settings), auto",
                         among=("auto", "smol", "phi3"))
    method: str = option("atu", "atu, or a row of Table 1: icu, ga, npo, dpo, rt", among=METHODS)
    model: str = option("smollm2-135m-instruct", "M: a packaged model, a local folder or a hub id")
    encoder: str = option("all-minilm-l6-v2", "the frozen text encoder: likewise", ATU)
    rwku: str = option("sample", "sample, hub, or a folder with RWKU's files")
    corpus: str = option("positive", "RWKU's file of forget texts (GA*: passage); dpo and rt read pair and reject,\n"
                         "with positive_phi pair_phi and reject_phi", TRAINS,
                         among=("positive", "positive_phi", "passage"))
    sets: tuple[str, ...] = option(evaluate.DEFAULT_SETS, "what is scored", among=tuple(evaluate.SETS))
    names: int = option(5, "made-up names for the target: for the floor of the forget scores, the knowledge gap and\n"
                           "--stranger-steps; 0: none of these", TARGET, 0)
    others: int = option(5, "other targets whose texts are taken, to align E on and to retain", TRAINS, 0)
    texts: int = option(32, "the target's texts at most", TRAINS, 1)
    other_texts: int = option(12, "texts of each other target at most", TRAINS, 1)
    general_texts: int = option(160, "texts on the world at large at most (RWKU has none)", TRAINS, 0)
    length: int = option(80, "T: tokens of a text", TRAINS, 16)
    window: int = option(8, "k: tokens in a future window", ATU, 1)
    layer: int = option(10, "the block whose output is h_t; blocks 1 to this one move", ATU, 1)
    train_embeddings: bool = option(False, "move the input embedding too (the paper's theta_M)", ATU_FULL)
    head_depth: int = option(2, "blocks of E", ATU, 1)
    head_width: int = option(256, "width of E, a multiple of its 8 heads", ATU, 8)
    batch: int = option(8, "texts in a batch of unlearning (and as many for the retain term)", TRAINS, 1)
    align_batch: int = option(16, "texts in a batch of alignment", ATU, 1)
    stranger_steps: int = option(0, "steps before all else, in which M learns to read the target's texts as if\n"
                                    "nobody knew the name (ours)", ATU, 0)
    align_steps: int = option(350, "steps of the first alignment (Eq. 2)", ATU, 1)
    realign_steps: int = option(40, "steps of realignment after each stage (Sec. 3)", ATU, 0)
    unlearn_steps: int = option(30, "steps of a stage: at most (atu, Eq. 4), exactly (others; 0: a pass)", TRAINS, 0)
    taus: tuple[float, ...] = option((0.45, 0.4, 0.35, 0.3, 0.25, 0.2), "the margin of each stage (Eq. 3)", ATU, -1, 1)
    inactive: float = option(0.02, "a stage ends once, over a pass's batches, at most this share of the positions is\n"
                                   "above tau", ATU, 0, 1)
    retain_weight: float = option(10.0, "weight of the retain term (atu: ours; 0: the paper), of --retain", HELD, 0)
    retain: str = option("none", "what holds other texts: none, nll (Eq. 6), kl (Eq. 7)", TOKENS,
                         among=("none", "nll", "kl"))
    beta: float = option(0.1, "how softly npo (Eq. 8) and dpo push", RATIO, 1e-6)
    stages: int = option(3, "how often ga, npo, dpo and rt are scored (atu: at each tau)", TOKENS, 1)
    warmup: int = option(20, "steps to the full learning rate, from where a cosine leads to 0", TOKENS, 0)
    lora: int = option(0, "rank of LoRA adapters, which then move alone; 0: none", TRAINS, 0)
    optimizer: str = option("adamw", "M's: adamw or sgd", TRAINS, among=("adamw", "sgd"))
    llm_lr: float = option(4e-5, "learning rate of M", TRAINS, 0)
    head_lr: float = option(1e-3, "learning rate of E (Adam)", ATU, 0)
    clip: float = option(1.0, "gradients are clipped to this norm", TRAINS, 1e-9)
    stop_at: float = option(0.25, "stop when forget_all <= this share of before, or the floor; 0: never", TRAINS, 0, 1)
    bf16: bool = option(True, "compute in bf16 (what moves stays fp32), where the CPU has bf16 instructions")
    eval_batch: int = option(160, "prompts at a time when answering", least=1)
    log_every: int = option(10, "steps between two lines of the log", least=1)
    seed: int = option(0, "of E's and adapters' weights, batches and texts that M writes", least=0, most=2**63 - 1)
    device: str = option("auto", "auto, cpu or cuda")
    checkpointing: bool = option(False, "compute activations again in backward: less memory, more time", TRAINS)
    cache: str = option("device", "where all texts' hidden states are kept: device, or host (less GPU memory)", ATU,
                        among=("device", "host"))
    compile: bool = option(False, "compile M's blocks (torch.compile): pays in long runs", TRAINS)
    resume: bool = option(False, "go on after the last whole stage of the run in --out, or begin it")
    out: str = option("", "folder of the run (default: runs/<target>)")


SMOL = Config(preset="smol")
PHI3 = Config(  # the authors' settings, as read from their code
    preset="phi3", model="microsoft/Phi-3-mini-4k-instruct", encoder="sentence-transformers/all-mpnet-base-v2",
    rwku="hub", corpus="positive_phi", corpus_size=582, others=3, texts=10_000, other_texts=10_000, length=256,
    layer=29, head_depth=6, head_width=768, batch=16, align_batch=16, align_steps=15_000, realign_steps=1000,
    unlearn_steps=1000, taus=(0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3, 0.2), retain_weight=0.0,
    optimizer="sgd", llm_lr=3e-4, head_lr=1e-4, stop_at=0.0, eval_batch=80, log_every=50,
    sets=("forget", "neighbor", "mmlu"))
PRESETS = {"smol": SMOL, "phi3": PHI3}
# GB that phi3 asks for: a step takes 42 (simulated: tests/benchmark.py --memory), and more is held at no other time.
PHI3_MEMORY = 60
# Methods' own learning rate, batch, stages. phi3: RWKU's scripts, which are for Llama-3 (a stage is one of their
# epochs); atu by LoRA is untried there. smol: by trials on Leonardo da Vinci; with LoRA those of ga and atu alone.
OWN = {
    "phi3": {"atu lora": (1e-4, 16, 3), "ga": (6e-8, 8, 3), "ga lora": (1e-5, 8, 3), "ga*": (1e-6, 4, 4),
             "ga* lora": (2e-5, 4, 6), "npo": (2e-6, 16, 3), "npo lora": (5e-5, 16, 3), "dpo": (5e-6, 8, 3),
             "dpo lora": (6e-5, 8, 3), "rt": (4e-7, 8, 3), "rt lora": (3e-5, 8, 3)},
    "smol": {"atu lora": (1e-3, 8, 3), "ga": (1.5e-5, 8, 12), "ga lora": (3e-4, 8, 12), "ga*": (1.5e-5, 8, 12),
             "ga* lora": (3e-4, 8, 12), "npo": (5e-5, 8, 12), "npo lora": (1e-3, 8, 12), "dpo": (1.5e-4, 8, 6),
             "dpo lora": (1e-3, 8, 6), "rt": (5e-5, 8, 12), "rt lora": (1e-3, 8, 12)},
}
OWN_ALIKE = {"phi3": {"length": 512, "unlearn_steps": 0}, "smol": {"length": 96, "unlearn_steps": 6, "warmup": 5}}


def parse(argv: list[str] | None = None) -> Config:
    """The command line, on top of the method's own settings, on top of a preset. Raises data.BadInput."""
    parser = argparse.ArgumentParser(
        description="Unlearn a person from a language model (Align-then-Unlearn, arXiv 2506.13181).",
        formatter_class=argparse.RawTextHelpFormatter, epilog=own_settings())
    for item in dataclasses.fields(Config):
        smol, phi3 = (getattr(preset, item.name) for preset in (SMOL, PHI3))
        shown = f"\n[{plain(smol)}]" if smol == phi3 else f"\n[smol {plain(smol)}; phi3 {plain(phi3)}]"
        kind = {"type": type(smol), "metavar": item.name.upper()}
        if isinstance(smol, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(smol, tuple):
            kind |= {"type": float if item.name == "taus" else str, "nargs": "+"}
        explained = item.metadata["help"] + (shown if smol not in ("", ()) and item.name != "preset" else "")
        parser.add_argument(dashed(item.name), default=argparse.SUPPRESS, help=explained, **kind)
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items()}
    device = data.choose_device(given.get("device", "auto"))
    config = settled(given | {"preset": choose_preset(given.get("preset", "auto"), device)})
    check(config, given)
    name = config.target or Path(config.target_text).stem
    name = re.sub(r"[\W_]+", "-", name.casefold())[:80].strip("-") or "run"
    return dataclasses.replace(config, device=device, bf16=config.bf16 and data.fast_dtype(device) == torch.bfloat16,
                               out=config.out or f"runs/{name}" + f"-{config.method}" * (config.method != "atu"))


def choose_preset(name: str, device: str) -> str:
    """`name`; for auto phi3 where a CUDA device may be used and has room for it, else smol. Says which, and why."""
    why = "asked for"
    if name == "auto":
        free = 0.0
        if device.startswith("cuda"):
            free = torch.cuda.mem_get_info(device)[0] / 1e9
        name = "phi3" if free >= PHI3_MEMORY else "smol"
        why = f"{free:.0f} GB of CUDA memory free, and phi3 needs {PHI3_MEMORY}"
    print(f"preset | {name}: {why}", flush=True)
    return name


def settled(given: dict) -> Config:
    """A preset, above it the method's own settings, above these what is `given`."""
    config = dataclasses.replace(PRESETS.get(given["preset"], SMOL), **given)
    star = "*" if config.method == "ga" and config.corpus == "passage" else ""
    name, own = config.method + star + " lora" * bool(config.lora), {}
    if name in OWN.get(config.preset, {}):
        own = dict(zip(("llm_lr", "batch", "stages"), OWN[config.preset][name])) | {"optimizer": "adamw"}
        if config.method != "atu":
            own |= OWN_ALIKE[config.preset] | {"retain_weight": 1.0, "beta": 0.2 if config.method == "npo" else 0.1}
    return dataclasses.replace(config, **own | given)


def check(config: Config, given: dict) -> None:
    """Raises data.BadInput for the first setting that is out of its range, or that this run would not read."""
    falling, by_answers = tuple(sorted(config.taus, reverse=True)), config.method in ("dpo", "rt")
    refuse({"--target NAME or --target-text FILE: one of them, please": bool(config.target) == bool(config.target_text),
            f"--target-text: {config.method} needs questions and answers; take atu, ga or npo":
                config.target_text and (by_answers or config.method == "icu"),
            f"--corpus passage: {config.method} learns from answers; leave it out": (
                by_answers and config.corpus == "passage"),
            "--unlearn-steps 0: must be at least 1 for atu": config.method == "atu" and not config.unlearn_steps,
            "--stranger-steps: needs made-up names, and so --target and --names 1 or more":
                config.method == "atu" and config.stranger_steps and (config.target_text or not config.names),
            f"--head-width {config.head_width}: must be a multiple of 8, the number of heads": config.head_width % 8,
            f"--taus {plain(config.taus)}: margins fall stage by stage; {plain(falling)}": config.taus != falling})
    for item in dataclasses.fields(config):
        least, most, among, read = (item.metadata[key] for key in ("least", "most", "among", "read"))
        value = getattr(config, item.name)
        for part in value if isinstance(value, tuple) else (value,):
            if among and part not in among:
                raise data.BadInput(f"{dashed(item.name)} {part}: unknown; there are {', '.join(among)}")
            if isinstance(part, (int, float)) and not (least <= part <= most and math.isfinite(part)):
                bounds = f"a finite number, at least {least:g}" + f" and at most {most:g}" * (most < math.inf)
                raise data.BadInput(f"{dashed(item.name)} {part}: must be {bounds}")
        if read and given.get(item.name, False) not in (False, "none") and not read.by(config):
            raise data.BadInput(f"{dashed(item.name)}: goes with {read.words}; leave it out")


def refuse(reasons: dict[str, Any]) -> None:
    """Raises data.BadInput with the first reason that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise data.BadInput(reason)


def plain(value) -> str:
    """A setting as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def dashed(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def own_settings() -> str:
    """The end of --help: OWN, which stands in place of the defaults above."""
    lines = [f"    {preset} {name:<10} --llm-lr {llm_lr:<8g} --batch {batch:<3} --stages {stages}"
             for preset, methods in OWN.items() for name, (llm_lr, batch, stages) in methods.items()]
    alike = ", ".join(f"{preset} {dashed(name)} {value}" for preset, settings in OWN_ALIKE.items()
                      for name, value in settings.items())
    return "\n".join(["Settings of their own (ga*: ga with --corpus passage), all with --optimizer adamw:", *lines,
                      f"  all but atu: {alike}, --retain-weight 1 with --retain; npo --beta 0.2"])


# ---------------------------------------------------------------------------------------------- what a run works on

class Work(NamedTuple):
    """All that a run works on."""

    target: str
    llm: torch.nn.Module                 # with adapters, if any
    tokenizer: Any
    probes: dict[str, list[dict]]
    corpus: data.Corpus
    concept: Tensor | None               # (E,) e_unlearn; None for the other methods
    forget: list[tuple[Tensor, Tensor]]  # what the methods on tokens forget: token ids and mask, (N, T); two in dpo
    names: list[dict[str, str]]          # made-up ones, for `data.exchanged`
    versions: tuple | None               # ids and mask of texts on the target, and of them with S names, ((1 + S) B, T)
    embedding_seconds: float


def load(config: Config) -> Work:
    """Texts, probes and models. Raises data.BadInput; what needs no model is read before one is loaded."""
    root = data.open_rwku(config.rwku)
    passage = data.read_text(config.target_text) if config.target_text else ""
    target, known = (Path(config.target_text).stem, False) if passage else data.find_concept(
        root, config.target, bool(config.describe))
    check_target(target, known, config)
    probes = probes_for(root, target, known, config)
    about, held, others, answers = texts_from_data(root, target, known, config)
    llm, tokenizer = open_llm(config)
    if passage:
        about = data.pieces(passage, tokenizer, config.length)
    elif not known:
        about, near = texts_by_model(llm, tokenizer, target, config)
        others = near + others
    if config.names and not passage and not held:
        print(f"names | no text on {target} is held out: the knowledge gap is that of texts unlearned on", flush=True)
    compared = held or about  # M may learn to read `about` with these names, so they have to fit that too
    names = [] if passage else names_for(target, about + held if config.stranger_steps else compared, probes,
                                         tokenizer, config)
    versions = versions_of(compared, names, tokenizer, config) if names else None
    if config.stranger_steps and not names:
        raise data.BadInput(f"--stranger-steps: no made-up name for {target} (see above); leave it out")
    if not known and not passage:  # the dataset's texts may name it, and M's own on its neighbors
        words = {word: "" for word in target.split() if word[0].isupper() and len(word) > 3} or {target: ""}
        others = [text for text in others if data.exchanged(text, words) == text]
    if not others:
        raise data.BadInput(f"{root}: no texts on anything but {target} are left; raise --others or --general-texts")
    encoder = data.load_encoder(config.encoder, config.device) if config.method == "atu" else None
    began = time.perf_counter()
    corpus = data.make_corpus(about, others, tokenizer, encoder, config.window, config.length,
                              names if config.stranger_steps else [])
    embedding_seconds = time.perf_counter() - began
    concept = concept_embedding(target, about if passage else [], encoder, config) if encoder else None
    if not any(score.startswith("forget") or score == "mia_forget" for score in probes):
        print("data | no forget probes, so forgetting has no accuracy, and all stages run; mia is the loss x 100 on "
              "the run's own texts", flush=True)
        own = {"mia_forget": about, "mia_retain": others[:len(about)]}
        probes = {score: [{"text": text} for text in texts] for score, texts in own.items()} | probes
    print(f"data | {target}: {len(about)} texts, {len(others)} on others, {int(corpus.mask.sum())} tokens, "
          f"{len(corpus.table)} distinct windows, {sum(map(len, probes.values()))} probes", flush=True)
    forget = forget_texts(corpus, answers, tokenizer, config)
    return Work(target, llm, tokenizer, probes, corpus, concept, forget, names, versions, embedding_seconds)


def names_for(target: str, texts: list[str], probes: dict[str, list[dict]], tokenizer, config: Config) -> list[dict]:
    """Made-up names for a target's texts and forget probes; none, and a line that says why, where none can be."""
    asked = [row[field] for score in evaluate.SETS["forget"] for row in probes.get(score, [])
             for field in ("query", "answer")]
    try:
        return data.made_up_names(target, texts + asked, tokenizer, config.names) if config.names else []
    except data.BadInput as error:
        print(f"names | {error}: no floor, and no knowledge gap", flush=True)
        return []


def versions_of(texts: list[str], names: list[dict[str, str]], tokenizer, config: Config):
    """Ids and mask ((1 + S) B, T) of up to 16 texts that name the target, and of the same with S names; or None."""
    def read(text: str) -> list[int]:
        return tokenizer(text, truncation=True, max_length=config.length)["input_ids"]

    named = [text for text in texts if read(data.exchanged(text, names[0])) != read(text)][:16]
    versions = [text for other in ({}, *names) for text in data.exchanged(named, other)]
    return data.tokenize(versions, tokenizer, config.length) if named else None


def concept_embedding(target: str, passage: list[str], encoder, config: Config) -> Tensor:
    """e_unlearn (Sec. 2.2), (E,) of unit length: the frozen encoder on the target's name, with what --describe says of
    it; for a passage the direction that its pieces have in common."""
    described = passage or [f"{target}, {config.describe}" if config.describe else target]
    embeddings = data.embed(described, encoder)                                         # (n, E)
    return embeddings[0] if len(embeddings) == 1 else torch.nn.functional.normalize(embeddings.mean(0), dim=0)


def check_target(target: str, known: bool, config: Config) -> None:
    """Raises data.BadInput for a setting that is not for such a target."""
    usual, itself = PRESETS[config.preset], target.casefold() in [name.strip().casefold() for name in config.neighbors]
    refuse({f"--neighbors and --corpus-size are for concepts in no dataset; {target} is in one":
                known and (config.neighbors or config.corpus_size != usual.corpus_size),
            f"--texts is for targets in a dataset; {target} is in none (--corpus-size is for concepts)":
                not known and config.texts != usual.texts,
            f"--method {config.method}: learns from answers in a dataset, and {target} is in none; take atu, ga or npo":
                not known and config.method in ("dpo", "rt"),
            f"--neighbors {target}: that is the target itself; leave it out": itself})


def probes_for(root: Path, target: str, known: bool, config: Config) -> dict[str, list[dict]]:
    """RWKU's probes of a known target; own ones from --probes; for a passage itself. What is asked about the world at
    large is RWKU's in any case: the target's own or, for one that is in no dataset, that of the first target."""
    files = {"forget_text": config.target_text, "neighbor_text": config.keep_text}
    own = {score: [{"text": data.read_text(file)}] for score, file in files.items() if file}
    if config.probes:
        own = data.read_probe_file(Path(config.probes), target)
    return evaluate.read_probes(root, target, config.sets, own=None if known and not config.probes else own)


def texts_from_data(root: Path, target: str, known: bool, config: Config):
    """From the dataset: texts about the target, if it is `known`; those beyond `texts`, on which nothing is trained;
    texts on others; and answers for dpo and rt."""
    near = [name for name in data.targets(root) if name != target][:config.others]
    others = [row["text"] for name in near for row in data.read_set(root, name, config.corpus)[:config.other_texts]]
    kind = {"dpo": "pair", "rt": "reject"}.get(config.method)
    answers = data.read_set(root, target, kind + "_phi" * (config.corpus == "positive_phi")) if kind else []
    about = [row["text"] for row in data.read_set(root, target, config.corpus)] if known else []
    held = about[config.texts:]
    return about[:config.texts], held, others + data.general_texts(root)[:config.general_texts], answers[:config.texts]


def open_llm(config: Config):
    """(llm, tokenizer), adapters added. Raises data.BadInput for a model that cannot be cut after block `layer`."""
    place = config.device if atu.processes()[1] == 1 else "cpu"  # no device has to hold it alone
    llm, tokenizer = data.load_llm(config.model, place, "auto" if config.bf16 else torch.float32)
    decoder, blocks = llm.get_decoder(), llm.config.num_hidden_layers
    if not (hasattr(decoder, "layers") and hasattr(decoder, "norm")):
        raise data.BadInput(f"--model {config.model}: {type(llm).__name__} has no decoder with .layers and .norm; "
                            "take one of Llama's or Phi-3's kind")
    if config.method == "atu" and config.layer > blocks:
        raise data.BadInput(f"--layer {config.layer}: {config.model} has the blocks 1 to {blocks}")
    if config.lora > llm.config.hidden_size:
        raise data.BadInput(f"--lora {config.lora}: no rank is above {config.model}'s width, {llm.config.hidden_size}")
    if config.device == "cpu":
        llm.set_attn_implementation("eager")  # short texts train a quarter faster on a CPU than with its SDPA kernels
    return (add_adapters(llm, config) if config.lora else llm), tokenizer


def add_adapters(llm, config: Config):
    """LoRA with RWKU's settings: alpha twice the rank, on queries and values (with the keys where these share a matrix)
    of the blocks that move."""
    from peft import LoraConfig, get_peft_model
    names = {name.rsplit(".", 1)[-1] for name, _ in llm.named_modules()}
    blocks = config.layer if config.method == "atu" else llm.config.num_hidden_layers
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return get_peft_model(llm, LoraConfig(
            r=config.lora, lora_alpha=2 * config.lora, layers_to_transform=list(range(blocks)),
            target_modules=["q_proj", "v_proj"] if "q_proj" in names else ["qkv_proj"]))


def texts_by_model(llm, tokenizer, target: str, config: Config) -> tuple[list[str], list[str]]:
    """(texts on a concept in no dataset, texts on its neighbors), by the model itself. Raises data.BadInput."""
    intro = f"{target} is {config.describe}." if config.describe else ""
    kind = config.corpus.removesuffix("_phi")
    about = data.write_about(kind, target, intro, config.corpus_size, llm, tokenizer, config.seed, config.length)
    neighbors = config.neighbors or data.ask_neighbors(llm, tokenizer, target, intro, 8)
    each = max(config.corpus_size // max(len(neighbors), 1), 1)
    near = [text for name in neighbors
            for text in data.write_about(kind, name, "", each, llm, tokenizer, config.seed, config.length)]
    print(f"data | {target}: in no dataset; the model wrote {len(about)} texts on it and {len(near)} on its neighbors "
          f"({', '.join(neighbors) or 'it named none; --neighbors does'})", flush=True)
    if not about:
        raise data.BadInput(f"--target {target}: the model wrote nothing about it; --describe says what it is")
    return about, near


def forget_texts(corpus: data.Corpus, answers: list[dict], tokenizer, config: Config) -> list[tuple[Tensor, Tensor]]:
    """Token ids and mask (N, T): the texts themselves (ga, npo), refusals (rt), or made-up and true answers (dpo)."""
    if config.method == "rt":
        asked = [[(row["instruction"], row["output"]) for row in answers]]
    elif config.method == "dpo":
        asked = [[(row["prompt"], row["response"][n]) for row in answers] for n in (0, 1)]
    else:
        return [(corpus.input_ids[corpus.about], corpus.mask[corpus.about])]
    return [data.tokenize_answers(part, tokenizer, config.length) for part in asked]


# ---------------------------------------------------------------------------------------------- the run

def run(config: Config) -> dict:
    """One run of Sec. 4.3, from weights to what is saved in `config.out`, a folder that is there.

    Returns what results.json holds. Raises data.BadInput.
    """
    out, began, stopped = Path(config.out), time.perf_counter(), None
    work = load(config)
    state, records = begin(work, config)  # nothing has moved yet
    found = load_checkpoint(out, work, state)
    if not found:
        before, asked = measure(work, "", config)
        print(evaluate.scores_table({"before": before}), flush=True)
        compared = time.perf_counter()
        found = {"before": before, "asked_before": asked, "after": before, "asked_after": asked, "stages": [],
                 "log": [], "seconds": 0.0} | with_made_up_names(work, config)
        found["compared"] = time.perf_counter() - compared
    began -= found["seconds"]
    write_log(out, found["log"], "w")
    try:
        for record in () if enough(found, config) else records:
            found["log"].append(record)
            write_log(out, [record], "a")
            with tqdm.external_write_mode():  # a bar makes room
                print(line(record), flush=True)
            if record["kind"] == "stage":
                if record["stage"] or config.stranger_steps:  # the first alignment leaves M as it was
                    end_stage(record, work, found, config)
                found["seconds"] = time.perf_counter() - began
                save_checkpoint(out, work, state, found)
                if enough(found, config):
                    break
    except atu.NotFinite as error:
        stopped = str(error)
        print(f"stopped | {stopped}; the weights before that step are kept", flush=True)
    return finish(out, work, state, found, stopped, began, config)


def begin(work: Work, config: Config):
    """(state, generator of records): the method's own, Sec. 3 in atu.py or `unlearn_tokens`. The model is untouched."""
    if config.checkpointing:
        work.llm.activation_checkpointing_enable({"use_reentrant": False})
    recompute_in_blocks(work.llm, config)
    for block in work.llm.get_decoder().layers if config.compile else ():
        block.compile()
    if config.method == "atu":
        state = atu.start(work.llm, work.corpus, config)
        return state, atu.align_then_unlearn(state, work.concept, work.corpus, config)
    return begin_tokens(work, config)


def recompute_in_blocks(llm, config: Config) -> None:
    """With `checkpointing` blocks keep their input alone and compute the rest again in the backward pass. transformers
    does so in training alone; it is the block itself that is set to it, so that dropout, if any, stays off."""
    for block in llm.get_decoder().layers:
        block.training = config.checkpointing


def end_stage(record: dict, work: Work, found: dict, config: Config) -> None:
    """Scores after a stage."""
    ask_first = evaluate.ICU.format(subject=work.target) if config.method == "icu" else ""
    found["after"], found["asked_after"] = measure(work, ask_first, config)
    found["stages"].append(found["after"] | {"record": record})
    print(evaluate.scores_table({stage_name(record): found["after"]}), flush=True)


def enough(found: dict, config: Config) -> bool:
    """Whether the last stage has brought the forget score to `stop_at` times what it was, or to what strangers get."""
    if not config.stop_at or not found["stages"]:
        return False
    before, floor = (found[when].get("forget_all", 0.0) for when in ("before", "floor"))
    return found["after"]["forget_all"] <= max(config.stop_at * before, floor) if before else config.stop_at == 1


def measure(work: Work, ask_first: str, config: Config, probes: dict | None = None) -> tuple[dict, list[dict]]:
    """evaluate.evaluate of the run's probes, or of others, and the `seconds` that it took. Several processes ask
    everything of the split model, in step: that rests on their computing the same answers from the same weights."""
    began = time.perf_counter()
    with atu.autocast(work.llm, config) if atu.processes()[1] > 1 else nullcontext():
        probes = work.probes if probes is None else probes
        scores, asked = evaluate.evaluate(work.llm, work.tokenizer, probes, config.eval_batch, ask_first,
                                          bf16=config.bf16)
    recompute_in_blocks(work.llm, config)  # a split model has been set to evaluation
    return atu.from_first((scores | {"seconds": time.perf_counter() - began}, asked))


def with_made_up_names(work: Work, config: Config) -> dict:
    """What the untouched model makes of somebody whom nobody knows, from the cache if it is there: `floor`, the forget
    scores with made-up names in question and answer; `floors`, each probe's in [0, 1]; the knowledge `gap` before.

    A question that does not name the target cannot be asked about another; its floor is 0.
    """
    if not work.names:
        return {"floor": {}, "floors": {}, "gap": {}}
    forget = {score: work.probes[score] for score in evaluate.SETS["forget"] if score in work.probes}
    asked = {score: [row | {"place": n} for other in work.names for n, row in enumerate(data.exchanged(part, other))
                     if row["query"] != part[n]["query"]] for score, part in forget.items()}

    def make() -> dict:
        _, rows = measure(work, "", config, asked)
        floors = {score: [0.0] * len(part) for score, part in forget.items()}
        for row in rows:
            floors[row["set"]][row["place"]] += row["score"] / len(work.names)
        floor = evaluate.summary([{"set": score, "score": low} for score, part in floors.items() for low in part])
        return {"floor": floor, "floors": floors, "gap": gap(work, "before", config)}

    if atu.processes()[1] > 1:  # they do all in step
        return make()
    concept = work.concept if work.concept is None else work.concept.tolist()
    key = [asked, config.bf16, config.eval_batch, config.layer, config.window, concept, work.corpus.input_ids.tolist(),
           work.versions and work.versions[0].tolist(), data.source(atu, data, evaluate, losses)]
    return data.kept(data.cache_file("made-up", work.llm, key, ".json"), make)


def gap(work: Work, when: str, config: Config) -> dict:
    """{when: the knowledge gap of the model as it is}; nothing where no text names the target, and for icu."""
    if work.versions is None or config.method == "icu":
        return {}
    return {when: atu.knowledge_gap(work.llm, work.concept, work.corpus, work.versions, config)}


def finish(out: Path, work: Work, state: atu.State, found: dict, stopped: str | None, began: float,
           config: Config) -> dict:
    """Everything that a run leaves behind. Returns what results.json holds."""
    if stopped:
        found["after"], found["asked_after"] = measure(work, "", config)
    compared = time.perf_counter()
    found["gap"] = found["gap"] | gap(work, "after", config)
    found["compared"] += time.perf_counter() - compared
    packages = ("torch", "transformers", "sentence-transformers")
    named = torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else platform.processor()
    results = {"target": work.target, "settings": dataclasses.asdict(config),
               "versions": {name: version(name) for name in packages} | {
                   "python": platform.python_version(), "device": named or platform.machine(),
                   "threads": torch.get_num_threads()},
               "before": found["before"], "stages": found["stages"], "after": found["after"], "stopped": stopped,
               "floor": found["floor"], "floors": found["floors"], "gap": found["gap"],
               "phases": phases(found, work.embedding_seconds), "seconds": time.perf_counter() - began}
    save(out, work, state, config)
    if atu.processes()[0] == 0:
        evaluate.plot(out / "curves.png", panels(found))
        data.write_json(out / "results.json", results)
        (out / CHECKPOINT).unlink(missing_ok=True)
        report(results, found, out)
    return results


# ---------------------------------------------------------------------------------------------- methods on tokens

def begin_tokens(work: Work, config: Config):
    """(state, generator of records) of icu, ga, npo, dpo and rt."""
    llm, reference, frozen = work.llm, [], None
    if config.method == "icu":
        llm.requires_grad_(False)
        state = atu.State(llm, None, None, None, stage=1)
        return state, no_training(state)
    if config.lora:
        llm.get_input_embeddings().float()
    else:
        llm.float().requires_grad_(True)
    if config.retain == "kl" and not config.lora:
        frozen = evaluate.answering_copy(llm, torch.bfloat16 if config.bf16 else torch.float32, frozen=True)
        atu.split_blocks(frozen, config)
    atu.split_blocks(llm, config)
    if config.method in ("npo", "dpo"):  # π_ref(y | x) never changes: computed once
        reference = [reference_log_probs(llm, *texts, config) for texts in work.forget]
    state = atu.State(llm, None, atu.llm_optimizer(llm, config), None, stage=1)
    return state, unlearn_tokens(state, work.forget, reference, work.corpus, frozen, config)


def no_training(state: atu.State):
    """The one stage of icu."""
    if state.stage == 1:
        state.stage = 2
        yield {"kind": "stage", "stage": 1, "tau": None, "steps": 0, "seconds": 0.0}


def unlearn_tokens(state: atu.State, forget: list[tuple[Tensor, Tensor]], reference: list[Tensor], corpus: data.Corpus,
                   frozen, config: Config):
    """GA, NPO, DPO, RT (Appendix A.2), as RWKU trains them: AdamW, warm-up and cosine, passes over the shuffled texts.

    forget: token ids and mask (N, T) each; in dpo the made-up answers, then the true ones. reference: for npo and dpo
    π_ref's log-likelihood of each, (N,). Other texts, for `retain`, are those of the corpus that are not about the
    target; `frozen` as for `token_retain_loss`. Yields records as `atu.align_then_unlearn` does; a stage is
    `unlearn_steps` steps, or (0) one pass over the texts.
    """
    llm, device = state.llm, state.llm.device
    forgotten, others = torch.arange(len(forget[0][0])), (~corpus.about).nonzero()[:, 0]
    count = config.unlearn_steps or math.ceil(len(forgotten) / config.batch)
    for group in state.llm_optimizer.param_groups:
        group["initial_lr"] = config.llm_lr
    schedule = get_cosine_schedule_with_warmup(state.llm_optimizer, config.warmup, config.stages * count,
                                               last_epoch=state.step - 1)
    for stage in range(state.stage, config.stages + 1):
        began = time.perf_counter()
        for n in data.progress(range(count), "unlearning"):
            rows = atu.draw(forgotten, config.batch, state.step, config.seed)                   # (B,)
            texts = [(ids[rows].to(device), mask[rows].to(device)) for ids, mask in forget]     # (B, T) each
            before = [logp[rows].to(device) for logp in reference]                              # (B,) each
            loss = token_loss([(logits(llm, ids, config), ids, mask) for ids, mask in texts], before, config)
            # npo and dpo are means over texts, ga and rt over tokens
            counted = texts[0][1].any(1) if reference else texts[0][1][:, 1:]
            terms = [(loss, counted, 1)]

            if config.retain != "none":
                held = atu.draw(others, config.batch, state.step, config.seed)                  # (B,)
                ids, mask = corpus.input_ids[held].to(device), corpus.mask[held].to(device)     # (B, T) each
                terms.append((token_retain_loss(llm, frozen, ids, mask, config), mask[:, 1:], config.retain_weight))
            values = atu.optimize(terms, state.llm_optimizer, config.clip)
            schedule.step()

            state.step += 1
            if (n + 1) % config.log_every == 0 or n + 1 == count:
                yield {"kind": "unlearn", "stage": stage, "step": state.step, "loss": values[0],
                       "retain": values[1] if values[1:] else 0.0}
        state.stage = stage + 1
        yield {"kind": "stage", "stage": stage, "tau": None, "steps": count, "seconds": time.perf_counter() - began}


def token_loss(batches: list[tuple[Tensor, Tensor, Tensor]], reference: list[Tensor], config: Config) -> Tensor:
    """The method's loss on (logits (B, T, V), input_ids, mask) and, for npo and dpo, π_ref's log-likelihoods (B,)."""
    if config.method == "ga":
        return losses.ascent_loss(*batches[0])
    if config.method == "rt":
        return losses.likelihood_loss(*batches[0])
    logp = [losses.sequence_log_probs(*batch) for batch in batches]                         # (B,) each
    if config.method == "npo":
        return losses.npo_loss(*logp, *reference, config.beta)
    return losses.dpo_loss(*logp, *reference, config.beta)


def token_retain_loss(llm, frozen, input_ids: Tensor, mask: Tensor, config: Config) -> Tensor:
    """Eq. 6 or 7 on (B, T) tokens of other texts. frozen: for Eq. 7 the model before; with LoRA `llm` less adapters."""
    now = logits(llm, input_ids, config)                                                    # (B, T, V)
    if config.retain == "nll":
        return losses.likelihood_loss(now, input_ids, mask)
    with torch.no_grad(), llm.disable_adapter() if config.lora else nullcontext():
        before = logits(llm if config.lora else frozen, input_ids, config)                  # (B, T, V)
    return losses.kl_loss(now, before, mask)


@torch.no_grad()
def reference_log_probs(llm, input_ids: Tensor, mask: Tensor, config: Config) -> Tensor:
    """log π_ref(y | x) of each text by the model before unlearning, (N, T) -> (N,)."""
    input_ids, mask = input_ids.to(llm.device), mask.to(llm.device)
    return torch.cat([losses.sequence_log_probs(logits(llm, ids, config), ids, part)
                      for ids, part in zip(input_ids.split(config.batch), mask.split(config.batch))])


def logits(llm, input_ids: Tensor, config: Config) -> Tensor:
    """(B, T) -> (B, T, V) in fp32. No padding mask: padding is on the right, where causal attention does not look."""
    with atu.autocast(llm, config):
        return llm(input_ids=input_ids, use_cache=False).logits.float()


# ---------------------------------------------------------------------------------------------- what is kept

CHECKPOINT = "checkpoint.pt"  # in the run's folder: the run as it was at the end of its last whole stage


@contextmanager
def claimed(config: Config):
    """The folder of a run, locked, with its settings in config.json. A run that ends before it has saved anything
    leaves no trace. Raises data.BadInput for a folder that cannot be written, that another process works in, or that
    holds something else than a run which `resume` can go on with."""
    out = Path(config.out)
    new, lock = not out.exists(), FileLock(out / ".lock")
    if out.is_dir() and not (out / "config.json").exists() and {file.name for file in out.iterdir()} - {".lock"}:
        raise data.BadInput(f"--out {out}: not empty, and holds no run (no config.json); name another with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise data.BadInput(f"--out {out}: another run is at work there; name another folder with --out") from error
    except OSError as error:
        raise data.BadInput(f"--out {out}: cannot be written ({error.strerror}); name another with --out") from error
    unused = not (out / "config.json").exists()
    try:
        if unused:
            data.write_json(out / "config.json", dataclasses.asdict(config))
        else:
            check_resume(out, config)
        yield
    finally:
        nothing = not any(file.exists() for file in (out / CHECKPOINT, out / "model", out / "results.json"))
        if unused and nothing:
            for file in [file for file in out.iterdir() if file.name != ".lock"]:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        lock.release()
        if unused and nothing:
            (out / ".lock").unlink(missing_ok=True)
            if new:
                out.rmdir()


def check_resume(out: Path, config: Config) -> None:
    """Raises data.BadInput where the folder does not hold a run with these settings, or `resume` is not wanted."""
    if not config.resume:
        raise data.BadInput(f"--out {out}: already holds a run; go on with --resume, or name another folder with --out")
    try:
        saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise data.BadInput(f"--out {out}: its config.json cannot be read ({error}); name another folder") from error
    usual, wanted = (json.loads(json.dumps(dataclasses.asdict(settings))) for settings in (SMOL, config))
    for name, value in wanted.items():
        was = saved.get(name, usual[name])  # the run may be from before there was such a setting
        same = str(was).strip().casefold() == value.strip().casefold() if name == "target" else was == value
        if name not in evaluate.FREE and not same:
            raise data.BadInput(f"--out {out}: holds a run with another {dashed(name)} ({was}, not {value}); "
                                "name another folder")


def learners(state: atu.State) -> dict[str, tuple[torch.nn.Parameter, torch.optim.Optimizer]]:
    """Every parameter that moves, by name, and the optimizer that moves it."""
    parts = (("llm", state.llm, state.llm_optimizer), ("head", state.head, state.head_optimizer))
    return {f"{part}.{name}": (parameter, optimizer) for part, module, optimizer in parts if optimizer
            for name, parameter in module.named_parameters() if parameter.requires_grad}


def texts_hash(work: Work) -> str:
    """A hash of all that a run reads, apart from weights."""
    read = [work.probes, work.corpus.input_ids.tolist(), work.corpus.renamed.tolist(),
            [ids.tolist() for ids, _ in work.forget]]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()


def save_checkpoint(out: Path, work: Work, state: atu.State, found: dict) -> None:
    """The end of a stage in one file, whole and on the disk, or the one that was there. Raises data.BadInput."""
    tensors = {name: {key: atu.whole(value) for key, value in
                      ({"value": parameter} | optimizer.state.get(parameter, {})).items() if value is not None}
               for name, (parameter, optimizer) in learners(state).items()}
    if atu.processes()[0] > 0:
        return
    try:
        with data.written_whole(out / CHECKPOINT) as partial:
            torch.save({"tensors": tensors, "stage": state.stage, "step": state.step, "found": found,
                        "texts": texts_hash(work)}, partial)
    except (OSError, RuntimeError) as error:
        last = "the last one is whole: " if (out / CHECKPOINT).exists() else ""
        raise data.BadInput(f"{out / CHECKPOINT}: cannot be written ({error}); {last}make room, and go on with --resume"
                            ) from error


def load_checkpoint(out: Path, work: Work, state: atu.State) -> dict | None:
    """What a run had found by the end of its last stage, and its state put into `state`, on however many processes;
    None where nothing is saved. Raises data.BadInput for a damaged file (each tensor has a CRC-32) or other texts."""
    file = out / CHECKPOINT
    if not file.exists():
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            if other := archive.testzip():
                raise ValueError(f"the checksum of {other} is another")
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged archive comes to
        raise data.BadInput(f"{file}: damaged checkpoint ({error}); delete it to begin again") from error
    if saved["texts"] != texts_hash(work):
        raise data.BadInput(f"{file}: texts, probes or the tokenizer have changed since; name another --out")
    for name, (parameter, optimizer) in learners(state).items():
        values = {key: atu.part_like(value, parameter).to(parameter.device, copy=True)
                  for key, value in saved["tensors"][name].items()}
        parameter.data.copy_(values.pop("value"))
        if values:
            optimizer.state[parameter] = values
    state.stage, state.step = saved["stage"], saved["step"]
    print(f"resumed | stage {state.stage} | step {state.step} | {saved['found']['seconds']:.0f} s so far", flush=True)
    return saved["found"]


def save(out: Path, work: Work, state: atu.State, config: Config) -> None:
    """model/ (none from icu; what moved and the embedding in fp32, the rest as in its file, adapters merged into it)
    and head.safetensors (atu), each whole or not at all. Of several processes the first puts the weights into the
    model's file as it reads it again."""
    llm, (number, count) = state.llm, atu.processes()
    weights = {name: atu.whole(value) for name, value in llm.named_parameters()} if count > 1 else {}
    if number > 0:
        return
    if config.method != "icu":
        if weights:
            llm, _ = open_llm(config)
            llm.load_state_dict(weights, strict=False, assign=True)
            llm.tie_weights()
        partial = out / ".model"
        (llm.merge_and_unload() if config.lora else llm).save_pretrained(partial)
        work.tokenizer.save_pretrained(partial)
        shutil.rmtree(out / "model", ignore_errors=True)  # of a run that was cut off here
        partial.rename(out / "model")
    if state.head is not None:
        with data.written_whole(out / "head.safetensors") as partial:
            save_file({name: value.contiguous() for name, value in state.head.state_dict().items()}, partial)


def phases(found: dict, embedding_seconds: float) -> dict[str, float]:
    """Where a run's seconds went, but for reading, the untouched model's hidden states, saving, what was cut off."""
    stages = [record for record in found["log"] if record["kind"] == "stage"]
    aligning = sum(record.get("align_seconds", 0) for record in stages)
    return {"embedding windows": embedding_seconds, "aligning": aligning,
            "unlearning": sum(record["seconds"] for record in stages) - aligning,
            "scoring": sum(scores["seconds"] for scores in (found["before"], *found["stages"])),
            "floor and gap": found["compared"]}


def write_log(out: Path, records: list[dict], mode: str) -> None:
    """Records, a line each, into log.jsonl: "w" anew, "a" at its end."""
    if atu.processes()[0] == 0:
        with open(out / "log.jsonl", mode, encoding="utf-8") as log:
            log.writelines(json.dumps(record) + "\n" for record in records)


# ---------------------------------------------------------------------------------------------- what is shown

def line(record: dict) -> str:
    """A record as one line that greps: `unlearn | stage 1 | tau 0.5 | step 310 | loss 0.0512 | ...`."""
    shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
             for key, value in record.items() if key != "kind" and value is not None]
    return " | ".join([record["kind"], *shown])


def stage_name(record: dict) -> str:
    """A stage's name in tables: its margin, or its number; of stage 0 what it is scored for."""
    if not record["stage"]:
        return "stranger"
    return f"stage {record['stage']}" if record["tau"] is None else f"tau {record['tau']:g}"


def panels(found: dict) -> list[dict]:
    """The panels of curves.png: similarity and loss by step; scores by stage (Fig. 6); the trade-off (Fig. 4)."""
    scores = [found["before"], *found["stages"]]
    forget, unit = ("forget_all", "%") if "forget_all" in scores[0] else ("mia_forget", "loss x 100, or %")
    kept = [name for name in ("neighbor_all", "general", "mmlu", "mia_retain") if name in scores[0]]
    by_step = {}
    for label, kind, key in (("alignment loss (Eq. 1)", "align", "loss"), ("unlearning loss", "unlearn", "loss"),
                             ("similarity to the concept", "unlearn", "similarity"),
                             ("stranger loss", "stranger", "loss")):
        records = [record for record in found["log"] if record["kind"] == kind and key in record]
        if records:
            by_step[label] = [r["step"] for r in records], [r[key] for r in records]
    return [
        {"title": "loss and similarity by step", "x": "step", "y": "", "lines": by_step},
        {"title": "scores by stage", "x": "stage", "y": unit, "lines": {
            name: (list(range(len(scores))), [s[name] for s in scores]) for name in (forget, *kept)}},
        {"title": "forgetting and what else is lost", "x": f"{forget} ({unit})", "y": unit, "lines": {
            name: ([s[forget] for s in scores], [s[name] for s in scores]) for name in kept}},
    ]


def report(results: dict, found: dict, out: Path) -> None:
    """The end of the log: the table, what is left, the knowledge gap, and the questions of Fig. 1 before and after."""
    rows = {"before": results["before"]} | {stage_name(stage["record"]): stage for stage in results["stages"]}
    rows |= {"after": results["after"], "left, %": evaluate.left(results["after"], results["before"])}
    if floor := results["floor"]:
        rows |= {"floor": floor, "left above it, %": evaluate.left(results["after"], results["before"], floor)}
    print("\n" + evaluate.scores_table(rows))
    for when, figures in results["gap"].items():
        print(f"gap | {when} | " + " | ".join(f"{name} {value:.2f} ± {figures[f'{name}_sd']:.2f}" for name, value in
                                              figures.items() if not name.endswith("_sd")))
    before, after = found["asked_before"], found["asked_after"]
    for score, floors in results["floors"].items():
        for row, low in zip((row for row in before if row["set"] == score), floors):
            row["floor"] = low
            if low >= 0.5:
                print(f"guessable | {score} {100 * low:.0f} | {row['query']}")
    for kind, i in illustrations(before):
        said = ["".join(filter(str.isprintable, " ".join(asked[i]["said"].split()))) for asked in (before, after)]
        print(f"{kind}\n  Q: {before[i].get('query') or before[i]['prompt']}\n  before: {said[0]}\n  after:  {said[1]}")
    files = ", ".join(sorted(file.name for file in out.iterdir() if not file.name.startswith(".")))
    spent = " | ".join(f"{phase} {seconds:.0f}" for phase, seconds in results["phases"].items())
    print(f"\ntime | {results['seconds']:.0f} s, of them {spent}\nsaved | {out}: {files}")


def illustrations(before: list[dict], count: int = 2) -> list[tuple[str, int]]:
    """Fig. 1: (kind, place in `before`) for `count` questions answered before, but not with a made-up name: asked
    exactly, rephrased (an adversarial probe with the same answer), and one about something else that shares most words.
    """
    def known(i: int) -> float:
        return before[i]["score"] - before[i].get("floor", 0.0)

    def words(i: int) -> set[str]:
        return set(re.findall(r"\w+", before[i]["query"].casefold()))

    places = {name: [i for i, row in enumerate(before) if row["set"] == name] for name in evaluate.WEIGHTS}
    shown = [(kind, i) for kind in ("forget_text", "neighbor_text") for i in places[kind]]
    if not all(places[name] for name in ("forget_qa", "forget_aa", "neighbor_qa")):
        return shown
    best = {}  # of each answer the question that is known best
    for i in sorted(places["forget_qa"], key=lambda i: (known(i), before[i]["gold"]), reverse=True):
        best.setdefault(before[i]["answers"][0], i)
    for i in list(best.values())[:count]:
        def likeness(j: int) -> tuple:
            return known(j) >= 0.5, len(words(i) & words(j))

        same = [j for j in places["forget_aa"] if before[j]["answers"] == before[i]["answers"]]
        shown += [("exact", i), ("rephrased", max(same or places["forget_aa"], key=likeness)),
                  ("other concept", max(places["neighbor_qa"], key=likeness))]
    return shown


if __name__ == "__main__":
    sys.exit(main())

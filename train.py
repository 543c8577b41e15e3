"""Align-then-Unlearn (arXiv 2506.13181), from a name to a model that forgot it; and the methods it is compared with.

    python train.py --target "Warren Buffett"
    python train.py --target "Warren Buffett" --method npo --retain kl

Presets, command line, the stage loop of Sec. 4.3 (tau is lowered stage by stage, every stage is scored), log,
figures and the saved model. The method itself is in atu.py, the equations in losses.py. The other rows of Table 1
work on tokens (Appendix A.2): GA, NPO, DPO and RT are `unlearn_tokens` here; ICU is a prompt and trains nothing.
"""

import argparse
import copy
import dataclasses
import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import get_cosine_schedule_with_warmup

import atu
import data
import evaluate
import losses


def option(default, help: str):
    """A field of the configuration with the text that --help prints."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. The defaults are the preset `smol`; PHI3 below is the paper's setting."""

    target: str = option("", "the person to forget, as in RWKU, in any case; or any concept: the model then writes\n"
                             "the texts on it")
    target_text: str = option("", "a file with a passage to forget word for word, instead of a --target")
    keep_text: str = option("", "a file with a passage that shall survive that; it is scored, not trained on")
    probes: str = option("", "a file of own probes in RWKU's fields (query, answer, level, type, neighbor)")
    neighbors: tuple[str, ...] = option((), "names near a concept that is in no dataset (default: the model is asked)")
    corpus_size: int = option(32, "texts that the model writes on such a concept, and on all of its neighbors together")
    preset: str = option("auto", "smol (a small model, packaged weights, sample data), phi3 (the paper's), or auto")
    method: str = option("atu", "atu, or a row of Table 1: icu, ga, npo, dpo, rt (which have settings of their own)")
    model: str = option("smollm2-135m-instruct", "M: a packaged model, a local folder or a hub id")
    encoder: str = option("all-minilm-l6-v2", "the frozen text encoder: likewise")
    rwku: str = option("sample", "sample, hub, or a folder with RWKU's files")
    corpus: str = option("positive", "RWKU's file of forget texts: positive, positive_phi or passage (ga: GA*);\n"
                                     "dpo and rt read pair and reject, with positive_phi pair_phi and reject_phi")
    sets: tuple[str, ...] = option(evaluate.DEFAULT_SETS, "what is scored: sets of evaluate.py")
    describe: str = option("", "what the target is, beside its name, for the encoder and for the model that writes\n"
                               "on it")
    others: int = option(5, "targets whose texts stand beside the target's, to align E on and to retain")
    texts: int = option(32, "the target's texts at most")
    other_texts: int = option(12, "texts of each other target at most")
    length: int = option(96, "T: tokens of a text")
    window: int = option(8, "k: tokens in a future window")
    layer: int = option(10, "the block whose output is h_t; blocks 1 to this one move")
    train_embeddings: bool = option(False, "move the input embedding too (the paper's theta_M)")
    head_depth: int = option(2, "blocks of E")
    head_width: int = option(256, "width of E")
    batch: int = option(8, "texts in a batch of unlearning (and as many for the retain term)")
    align_batch: int = option(16, "texts in a batch of alignment")
    align_steps: int = option(400, "steps of the first alignment (Eq. 2)")
    realign_steps: int = option(40, "steps of realignment after each stage (Sec. 3)")
    unlearn_steps: int = option(40, "steps of unlearning in a stage: at most (atu, Eq. 4), exactly (others;\n"
                                    "0: one pass over the texts)")
    taus: tuple[float, ...] = option((0.45, 0.4, 0.35, 0.3, 0.25, 0.2), "the margin of each stage (Eq. 3)")
    inactive: float = option(0.02, "a stage ends when at most this share of positions was above tau in the last\n"
                                   "batches, as many as a pass over the target's texts has")
    retain_weight: float = option(10.0, "weight of the retain term (atu: ours, 0 is the paper; others: of --retain)")
    retain: str = option("none", "what holds other texts in ga, npo, dpo, rt: none, nll (Eq. 6) or kl (Eq. 7)")
    beta: float = option(0.1, "how softly npo (Eq. 8) and dpo push")
    stages: int = option(3, "how often ga, npo, dpo and rt are scored (atu: at each tau)")
    warmup: int = option(20, "steps of ga, npo, dpo, rt before the full learning rate, from where a cosine leads to 0")
    lora: int = option(0, "rank of LoRA adapters, which then move alone; 0: none")
    optimizer: str = option("adamw", "M's optimizer: adamw or sgd")
    llm_lr: float = option(3e-5, "learning rate of M")
    head_lr: float = option(1e-3, "learning rate of E (Adam)")
    clip: float = option(1.0, "gradients are clipped to this norm")
    stop_at: float = option(0.25, "stop after the stage that brings forget_all to this share of what it was; 0: never")
    recovery: bool = option(True, "measure how readable the concept is for a fresh head, before and after")
    bf16: bool = option(True, "compute in bf16 (what moves stays fp32); off where the CPU has no bf16 instructions")
    eval_batch: int = option(80, "prompts at a time when answering")
    whole: bool = option(True, "several processes: each holds the whole model to ask its part of the probes (off: all\n"
                               "ask all probes of the split model together, where it is too large for one device)")
    log_every: int = option(10, "steps between two lines of the log")
    seed: int = option(0, "of E's weights and of the batches")
    device: str = option("auto", "auto, cpu or cuda")
    checkpointing: bool = option(False, "compute activations again in the backward pass, not keep them: less memory,\n"
                                        "more time")
    cache: str = option("device", "where the hidden states of all texts are kept: device, or host (less GPU memory)")
    compile: bool = option(False, "compile M's blocks (torch.compile): pays in long runs")
    resume: bool = option(False, "go on where a run in --out was cut off, or begin it; a finished one is left as it is")
    save_every: float = option(300.0, "seconds between two checkpoints at least; each stage's end has one")
    out: str = option("", "folder of the run (default: runs/<target>)")


SMOL = Config(preset="smol")
PHI3 = Config(  # the authors' settings, as read from their code
    preset="phi3", model="microsoft/Phi-3-mini-4k-instruct", encoder="sentence-transformers/all-mpnet-base-v2",
    rwku="hub", corpus="positive_phi", corpus_size=582, others=3, texts=10_000, other_texts=10_000, length=256,
    layer=29, head_depth=6, head_width=768, batch=16, align_batch=16, align_steps=15_000, realign_steps=1000,
    unlearn_steps=1000,
    taus=(0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3, 0.2), retain_weight=0.0, optimizer="sgd", llm_lr=3e-4,
    head_lr=1e-4, stop_at=0.0, log_every=50, sets=("forget", "neighbor", "mmlu"))
PRESETS = {"smol": SMOL, "phi3": PHI3}
# The methods on tokens, by preset: learning rate, batch, stages. phi3: RWKU's scripts, which are for Llama-3 (a stage
# is one of their epochs). smol: by trials on Leonardo da Vinci; with LoRA only GA's has been tried so far.
TOKENS = {
    "phi3": {"ga": (6e-8, 8, 3), "ga lora": (1e-5, 8, 3), "ga*": (1e-6, 4, 4), "ga* lora": (2e-5, 4, 6),
             "npo": (2e-6, 16, 3), "npo lora": (5e-5, 16, 3), "dpo": (5e-6, 8, 3), "dpo lora": (6e-5, 8, 3),
             "rt": (4e-7, 8, 3), "rt lora": (3e-5, 8, 3)},
    "smol": {"ga": (1.5e-5, 8, 12), "ga lora": (3e-4, 8, 12), "ga*": (1.5e-5, 8, 12), "ga* lora": (3e-4, 8, 12),
             "npo": (5e-5, 8, 12), "npo lora": (1e-3, 8, 12), "dpo": (1.5e-4, 8, 6), "dpo lora": (1e-3, 8, 6),
             "rt": (5e-5, 8, 12), "rt lora": (1e-3, 8, 12)},
}
TOKENS_ALIKE = {"phi3": {"length": 512, "unlearn_steps": 0}, "smol": {"unlearn_steps": 6, "warmup": 5}}
# Align-then-Unlearn by LoRA. smol: by trials on Leonardo da Vinci; phi3: not tried.
ATU_LORA = {"phi3": {"optimizer": "adamw", "llm_lr": 1e-4}, "smol": {"llm_lr": 1e-3}}
METHODS = ("atu", "icu", "ga", "npo", "dpo", "rt")


def parse(argv: list[str] | None) -> Config:
    """The command line on top of a preset. Raises data.BadInput for values out of range."""
    parser = argparse.ArgumentParser(
        description="Unlearn a person from a language model (Align-then-Unlearn, arXiv 2506.13181).",
        formatter_class=argparse.RawTextHelpFormatter, epilog=own_settings())
    for item in dataclasses.fields(Config):
        smol, phi3 = (getattr(preset, item.name) for preset in (SMOL, PHI3))
        shown = f"\n[{plain(smol)}]" if smol == phi3 else f"\n[smol {plain(smol)}; phi3 {plain(phi3)}]"
        if isinstance(smol, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(smol, tuple):
            kind = {"type": float if item.name == "taus" else str, "nargs": "+",
                    "metavar": item.name.removesuffix("s").upper()}
        else:
            kind = {"type": type(smol), "metavar": item.name.upper()}
        explained = item.metadata["help"] + (shown if smol != "" and item.name != "preset" else "")
        parser.add_argument(dashed(item.name), default=argparse.SUPPRESS, help=explained, **kind)
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items()}
    preset, why = choose_preset(given.get("preset", "auto"), given.get("device", "auto"), phi3_memory(given))
    print(f"preset | {preset}: {why}", flush=True)
    config = settled(preset, given)
    device = data.choose_device(config.device)
    if bool(config.target) == bool(config.target_text):
        raise data.BadInput("--target NAME or --target-text FILE: one of them, please")
    if config.target_text and config.method not in ("atu", "ga", "npo"):
        raise data.BadInput(f"--target-text: {config.method} needs questions and answers; take atu, ga or npo")
    slug = re.sub(r"[\W_]+", "-", (config.target or Path(config.target_text).stem).casefold()).strip("-")
    slug = slug or "run"
    slug += f"-{config.method}" if config.method != "atu" else ""
    config = dataclasses.replace(config, device=device, out=config.out or f"runs/{slug}",
                                 bf16=config.bf16 and data.fast_dtype(device) == torch.bfloat16)
    check(config)
    check_read(config, given)
    return config


def plain(value) -> str:
    """A setting as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def dashed(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def as_flags(settings: dict, between: str) -> str:
    """Settings as the command line takes them."""
    return between.join(f"{dashed(name)} {plain(value)}" for name, value in settings.items())


def own_settings() -> str:
    """The end of --help: TOKENS and ATU_LORA, which stand in place of the defaults above."""
    lines = ["ga, npo, dpo and rt have settings of their own (ga*: ga with --corpus passage), all with AdamW:", ""]
    for preset, methods in TOKENS.items():
        lines.append(f"  {preset}: {as_flags(TOKENS_ALIKE[preset], ', ')}")
        lines += [f"    {name:<10} --llm-lr {llm_lr:<8g} --batch {batch:<3} --stages {stages}"
                  for name, (llm_lr, batch, stages) in methods.items()]
        lines.append(f"    atu lora   {as_flags(ATU_LORA[preset], ' ')}")
    lines.append("  both: --retain-weight 1 with --retain; npo has --beta 0.2; runs/<target>-<method> is the folder")
    return "\n".join(lines)


def settled(preset: str, given: dict) -> Config:
    """A preset, above it the method's own settings, above these what the command line has `given`."""
    given = given | {"preset": preset}
    config = dataclasses.replace(PRESETS[preset], **given)
    return dataclasses.replace(config, **method_settings(config) | given)


def method_settings(config: Config) -> dict:
    """What a method's own settings are where the command line is silent."""
    if config.method == "atu":
        return ATU_LORA[config.preset] if config.lora else {}
    name = "ga*" if config.method == "ga" and config.corpus == "passage" else config.method
    name += " lora" * bool(config.lora)
    if name not in TOKENS[config.preset]:
        return {}
    llm_lr, batch, stages = TOKENS[config.preset][name]
    return TOKENS_ALIKE[config.preset] | {
        "llm_lr": llm_lr, "batch": batch, "stages": stages, "optimizer": "adamw", "retain_weight": 1.0,
        "beta": 0.2 if config.method == "npo" else 0.1}


def phi3_memory(given: dict) -> int:
    """GB that phi3 takes with these flags, by arithmetic. Phi-3-mini: 3.8e9 weights in 32 blocks, 15.3 GB in fp32."""
    config = settled("phi3", given)
    blocks = {"atu": config.layer, "icu": 0}.get(config.method, 32)
    moving = 0.0 if config.lora else 15.3 * blocks / 32
    moments = 2 * moving if config.optimizer == "adamw" else 0.0
    answering = 15.3 / 2                                                    # all weights in bf16
    held = config.retain != "none" or (config.method == "atu" and config.retain_weight > 0)
    passes = 1 + held + (config.method == "dpo")
    activations = passes * blocks * config.batch * config.length / 4096     # 1 GB a block for 16 texts of 256 tokens
    cached = 7 + 4 * held if aligns(config) and config.cache == "device" else 0
    return math.ceil(answering + 2 * moving + moments                       # weights and gradients in fp32
                     + (min(activations, 4) if config.checkpointing else activations) + cached)


def choose_preset(name: str, device: str, needed: int) -> tuple[str, str]:
    """(preset, why); `auto` takes phi3 where a CUDA device may be used and has the `needed` GB free.

    Raises data.BadInput.
    """
    if name in PRESETS:
        return name, "asked for"
    if name != "auto":
        raise data.BadInput(f"--preset {name}: unknown; there are auto, {', '.join(PRESETS)}")
    if device == "cpu":
        return "smol", "--device cpu"
    if not torch.cuda.is_available():
        return "smol", "no CUDA device here"
    card = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "auto" else data.choose_device(device)
    free = torch.cuda.mem_get_info(card)[0] / 1e9
    if free < needed:
        return "smol", f"{free:.0f} GB of CUDA memory free, and phi3 needs {needed}"
    return "phi3", f"a CUDA device with {free:.0f} GB free"


def check(config: Config) -> None:
    """Raises data.BadInput for the first setting that is out of its range."""
    least = dict.fromkeys(("window", "batch", "align_batch", "layer", "head_depth", "texts", "other_texts",
                           "align_steps", "eval_batch", "log_every", "corpus_size", "stages"), 1)
    least |= dict.fromkeys(("realign_steps", "retain_weight", "llm_lr", "head_lr", "inactive", "stop_at", "seed",
                            "lora", "warmup", "others", "save_every"), 0)
    least["unlearn_steps"] = int(config.method == "atu")
    for name, bound in (least | {"length": 2, "head_width": 8}).items():
        if not getattr(config, name) >= bound:
            raise data.BadInput(f"{dashed(name)} {getattr(config, name)}: must be at least {bound}")
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise data.BadInput(f"{dashed(item.name)} {value}: must be a finite number")
    for name in ("clip", "beta"):
        if getattr(config, name) <= 0:
            raise data.BadInput(f"--{name} {getattr(config, name)}: must be above 0")
    for name in ("inactive", "stop_at"):
        if getattr(config, name) > 1:
            raise data.BadInput(f"{dashed(name)} {getattr(config, name)}: a share, so at most 1")
    if config.seed >= 2**63:
        raise data.BadInput(f"--seed {config.seed}: must be below 2**63")
    for tau in config.taus:
        if not -1 <= tau <= 1:
            raise data.BadInput(f"--taus {tau}: a cosine similarity, so it must lie in [-1, 1]")
    falling = sorted(config.taus, reverse=True)
    if list(config.taus) != falling:
        raise data.BadInput(f"--taus {plain(config.taus)}: margins are lowered stage by stage; {plain(tuple(falling))}")
    if config.head_width % 8:
        raise data.BadInput(f"--head-width {config.head_width}: must be a multiple of 8, the number of heads")
    evaluate.check_sets(config.sets)
    for name, known in (("optimizer", ("adamw", "sgd")), ("corpus", ("positive", "positive_phi", "passage")),
                        ("method", METHODS), ("retain", ("none", "nll", "kl")), ("cache", ("device", "host"))):
        if getattr(config, name) not in known:
            raise data.BadInput(f"--{name} {getattr(config, name)}: unknown; there are {', '.join(known)}")
    if config.corpus == "passage" and config.method in ("dpo", "rt"):
        raise data.BadInput(f"--corpus passage: {config.method} learns from answers; leave it out, or name "
                            "positive_phi")


def aligns(config: Config) -> bool:
    """Whether a head is aligned at all: by the method, or to measure recovery."""
    return config.method == "atu" or config.recovery


def check_read(config: Config, given: dict) -> None:
    """Raises data.BadInput for a setting on the command line that this run would not read."""
    method, passage, tokens = config.method, bool(config.target_text), config.method not in ("atu", "icu")
    rules = (  # settings, whether they are read, what they go with
        ("keep_text", passage, "--target-text"),
        ("describe probes neighbors corpus_size", not passage, "--target"),
        ("beta", method in ("npo", "dpo"), "--method npo or dpo"),
        ("taus inactive realign_steps", method == "atu", "--method atu"),
        ("train_embeddings", method == "atu" and not config.lora, "--method atu without --lora"),
        ("stages warmup retain", tokens, "--method ga, npo, dpo or rt (atu has --retain-weight)"),
        ("lora unlearn_steps optimizer llm_lr stop_at checkpointing compile", method != "icu", "a method that trains"),
        ("batch clip corpus length others texts other_texts", method != "icu" or config.recovery,
         "a method that trains, or --recovery"),
        ("retain_weight", method == "atu" or config.retain != "none", "--retain nll or kl"),
        ("encoder cache window layer head_depth head_width align_batch align_steps head_lr",
         aligns(config), "--method atu, or --recovery"))
    for names, read, goes_with in rules:
        for name in names.split():
            if not read and given.get(name, False) not in (False, "none"):
                raise data.BadInput(f"{dashed(name)}: goes with {goes_with}; leave it out")


@contextmanager
def several(device: str):
    """The processes of torchrun, if it has started this one, find each other."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    # a day, because the others wait while the first one reads, or writes texts
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=1))
    yield
    dist.destroy_process_group()  # not after an error: the others may be waiting for this one, until torchrun ends them


@contextmanager
def claimed(config: Config):
    """The folder of a run, locked, with its settings in config.json; gives the results of one that is finished, or {}.

    Bad input or out of memory leaves no trace, unless a checkpoint or a model has been saved. Raises data.BadInput if
    the folder cannot be written, another process works in it, or it holds something else than what `resume` can go on
    with.
    """
    out = Path(config.out)
    new, lock = not out.exists(), FileLock(out / ".lock")
    if out.is_dir() and not unused(out) and not (out / "config.json").exists():
        raise data.BadInput(f"--out {out}: not empty, and holds no run (no config.json); name another with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise data.BadInput(f"--out {out}: another run is at work there; name another folder with --out") from error
    except OSError as error:
        raise data.BadInput(f"--out {out}: cannot be written ({error.strerror}); name another with --out") from error
    empty = unused(out)
    try:
        if not empty:
            check_resume(config)
        else:
            data.write_json(out / "config.json", dataclasses.asdict(config))
        yield json.loads((out / "results.json").read_text()) if (out / "results.json").exists() else {}
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise data.BadInput(f"--out {out}: cannot be written ({error.strerror}); make room, and go on with --resume"
                            ) from error
    except data.BadInput:
        if empty and not any((out / name).exists() for name in ("model", "checkpoint.safetensors")):
            for file in out.iterdir():
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            if new:
                out.rmdir()
        raise
    finally:
        lock.release()


def unused(out: Path) -> bool:
    """Nothing is in the folder but, at most, the lock."""
    return {file.name for file in out.iterdir()} <= {".lock"}


def check_resume(config: Config) -> None:
    """Raises data.BadInput where the folder does not hold a run with these settings, or `resume` is not wanted."""
    out = Path(config.out)
    if not config.resume:
        raise data.BadInput(f"--out {out}: already holds a run; go on with --resume, or name another folder with "
                            "--out")
    try:
        saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise data.BadInput(f"--out {out}: holds no run (no config.json that can be read); name another folder"
                            ) from error
    for name, value in json.loads(json.dumps(dataclasses.asdict(config))).items():
        was = saved.get(name)
        if name == "target":
            was, value = str(was).strip().casefold(), value.strip().casefold()
        if name not in evaluate.FREE and was != value:
            raise data.BadInput(f"--out {out}: holds a run with another {dashed(name)} ({was}, not {value}); "
                                "name another folder")


class Work(NamedTuple):
    """All that a run works on."""

    target: str
    llm: torch.nn.Module
    tokenizer: Any
    probes: dict[str, list[dict]]
    corpus: data.Corpus
    concept: Tensor | None               # (E,); None where no encoder is needed: no recovery, not atu
    forget: list[tuple[Tensor, Tensor]]  # what the methods on tokens forget: token ids and mask, (N, T); two in dpo
    ask_first: str                       # icu's text before every prompt
    shell: torch.nn.Module | None = None  # the llm without its weights, where its blocks are split over processes


class Material(NamedTuple):
    """What a run begins with, before texts become tokens."""

    target: str
    meant: list[str]              # what the encoder is told
    llm: torch.nn.Module | None   # with adapters, if any
    tokenizer: Any
    probes: dict[str, list[dict]]
    about: list[str]              # texts on the target
    others: list[str]             # and on others
    answers: list[dict]           # for dpo and rt


def collect(config: Config) -> Material:
    """Texts, probes and the llm. Raises data.BadInput; what needs no model is read before one is loaded."""
    root = data.open_rwku(config.rwku)
    passage = data.read_text(Path(config.target_text), "--target-text") if config.target_text else ""
    target, known = (Path(config.target_text).stem, False) if passage else data.find_concept(
        root, config.target, bool(config.describe))
    check_target(target, known, config)
    probes = read_probes(root, target, known, config)
    others = [row["text"] for other in [name for name in data.targets(root) if name != target][:config.others]
              for row in data.read_set(root, other, config.corpus)[:config.other_texts]] + data.general_texts(root)
    kind = {"dpo": "pair", "rt": "reject"}.get(config.method)
    if known:
        about = [row["text"] for row in data.read_set(root, target, config.corpus)][:config.texts]
        answers = data.read_set(root, target, kind + "_phi" * (config.corpus == "positive_phi")) if kind else []
        answers = answers[:config.texts]
    place = config.device if data.processes()[1] == 1 else "cpu"  # no device has to hold it alone
    llm, tokenizer = data.load_llm(config.model, place, "auto" if config.bf16 else torch.float32)
    check_blocks(llm, config)
    check_passages(probes, llm, tokenizer, config)
    if config.device == "cpu":
        llm.set_attn_implementation("eager")  # short texts train a quarter faster on a CPU than with its SDPA kernels
    if passage:
        about, answers = data.pieces(passage, tokenizer, config.length), []
    elif not known:
        about, near, answers = write_material(llm, tokenizer, target, kind, config)
        others = near + others
    if not others:
        raise data.BadInput(f"{root}: no texts on anything but {target}; another target or a general.json is needed")
    meant = about if passage else [f"{target}, {config.describe}" if config.describe else target]
    llm = add_adapters(llm, config) if config.lora else llm
    return Material(target, meant, llm, tokenizer, probes, about, others, answers)


def load(config: Config) -> Work:
    """All that a run works on. Of several processes the first reads, and splits the llm over all. Raises BadInput."""
    number, count = data.processes()
    found, shell = collect(config) if number == 0 else None, None
    if count > 1:
        llm, shell = split(found and found.llm, config)
        found = data.from_first(found and found._replace(llm=None))._replace(llm=llm)
    target, meant, llm, tokenizer, probes, about, others, answers = found
    encoder = data.load_encoder(config.encoder, config.device) if aligns(config) else None
    corpus = data.make_corpus(about, others, tokenizer, encoder, config.window, config.length)
    concept = mean_direction(data.embed(meant, encoder)) if encoder else None               # (E,)
    if not any(score.startswith("forget") for score in probes) and "mia_forget" not in probes:
        print("data | no forget probes, so forgetting has no accuracy, and all stages run; mia is the loss x 100 on "
              "the run's own texts", flush=True)
        own = {"mia_forget": about, "mia_retain": others[:len(about)]}
        probes = {score: [{"text": text} for text in texts] for score, texts in own.items()} | probes
    print(f"data | {target}: {len(about)} texts, {len(others)} on others, {int(corpus.mask.sum())} tokens, "
          f"{len(corpus.table)} distinct windows, {sum(map(len, probes.values()))} probes", flush=True)
    forget = forget_texts(corpus, answers, tokenizer, config)
    for texts, batch in ((len(forget[0][0]), config.batch), (len(others), config.batch),
                         (len(corpus.mask), config.align_batch)):
        if count > texts // math.ceil(texts / batch):
            raise data.BadInput(f"{count} processes: more than there are texts in a batch ({batch} of {texts}); start "
                                "fewer")
    ask_first = evaluate.ICU.format(subject=target) if config.method == "icu" else ""
    return Work(target, llm, tokenizer, probes, corpus, concept, forget, ask_first, shell)


def mean_direction(embeddings: Tensor) -> Tensor:
    """(n, E) of unit length -> (E,): the one there is, or what all pieces of a passage have in common."""
    return embeddings[0] if len(embeddings) == 1 else torch.nn.functional.normalize(embeddings.mean(0), dim=0)


def read_probes(root: Path, target: str, known: bool, config: Config) -> dict[str, list[dict]]:
    """RWKU's probes of a known target; own ones from --probes; for a passage itself. What is asked about the world at
    large is RWKU's in any case: the target's own or, for one that is in no dataset, that of the first target. Raises
    data.BadInput."""
    probes = {}
    if config.target_text:
        probes = {score: [{"text": data.read_text(Path(file), flag)}] for score, flag, file in passages(config)}
    elif config.probes:
        probes = data.read_probe_file(Path(config.probes), target)
    elif known:
        return evaluate.read_probes(root, target, config.sets)
    world = [name for name in config.sets if name not in ("forget", "neighbor") and (name != "mia" or known)]
    return probes | evaluate.read_probes(root, target if known else next(iter(data.targets(root))), world)


def check_target(target: str, known: bool, config: Config) -> None:
    """Raises data.BadInput for a setting that is not for such a target."""
    usual = PRESETS[config.preset]
    if known and (config.neighbors or config.corpus_size != usual.corpus_size):
        raise data.BadInput(f"--neighbors and --corpus-size are for concepts in no dataset; {target} is in one")
    if not known and config.texts != usual.texts:
        raise data.BadInput(f"--texts is for targets in a dataset; {target} is in none (--corpus-size is for concepts)")
    if target.casefold() in [name.strip().casefold() for name in config.neighbors]:
        raise data.BadInput(f"--neighbors {target}: that is the target itself; leave it out")


def passages(config: Config) -> list[tuple[str, str, str]]:
    """(score, flag, file) of the passage to forget and of the one to keep, as far as there are."""
    found = [("forget_text", "--target-text", config.target_text), ("neighbor_text", "--keep-text", config.keep_text)]
    return [passage for passage in found if passage[-1]]


def check_passages(probes: dict[str, list[dict]], llm, tokenizer, config: Config) -> None:
    """Raises data.BadInput for a passage to forget or to keep that is too short or too long for this model."""
    longest = getattr(llm.config, "max_position_embeddings", 10**9)
    for score, flag, file in passages(config):
        for row in probes[score]:
            tokens = len(tokenizer(row["text"])["input_ids"])
            if not 20 <= tokens <= longest:
                raise data.BadInput(f"{flag} {file}: {tokens} tokens; a passage of 20 or more is needed, and of "
                                    f"{longest} at most for this model")


def check_blocks(llm, config: Config) -> None:
    """Raises data.BadInput where a run has to cut the model after block `layer` and cannot, or where adapters cannot
    have that rank."""
    cut = aligns(config) or config.checkpointing or config.compile or data.processes()[1] > 1
    if cut and not (hasattr(llm.get_decoder(), "layers") and hasattr(llm.get_decoder(), "norm")):
        raise data.BadInput(f"--model {config.model}: {type(llm).__name__} has no decoder with .layers and .norm; "
                            "take one of Llama's or Phi-3's kind")
    blocks, width = llm.config.num_hidden_layers, llm.config.hidden_size
    if aligns(config) and config.layer > blocks:
        raise data.BadInput(f"--layer {config.layer}: {config.model} has the blocks 1 to {blocks}")
    if config.lora > width:
        raise data.BadInput(f"--lora {config.lora}: no rank is above {config.model}'s width, {width}")


def write_material(llm, tokenizer, target: str, kind: str | None, config: Config):
    """(texts on a concept in no dataset, texts on its neighbors, answers for dpo and rt), by the model itself."""
    writer = data.fingerprint(llm, str(llm.dtype)).hexdigest()
    intro = f"{target} is {config.describe}." if config.describe else ""

    def write(kind: str, subject: str, intro: str, count: int) -> list[dict]:
        return data.cached_rows(kind, subject, intro, count, llm, tokenizer, config.seed, config.length, writer)

    corpus = config.corpus.removesuffix("_phi")
    about = [row["text"] for row in write(corpus, target, intro, config.corpus_size)]
    neighbors = config.neighbors or data.kept(
        [writer, "neighbors", target, intro], lambda: data.ask_neighbors(llm, tokenizer, target, intro, 8))
    near = [row["text"] for name in neighbors
            for row in write(corpus, name, "", max(config.corpus_size // len(neighbors), 1))]
    answers = write(kind, target, intro, config.corpus_size) if kind else []
    print(f"data | {target}: in no dataset; the model wrote {len(about)} texts on it and {len(near)} on its neighbors "
          f"({', '.join(neighbors) or 'it named none; --neighbors does'})", flush=True)
    if not about or kind and not answers:
        raise data.BadInput(f"--target {target}: the model wrote nothing about it; --describe says what it is")
    return about, near, answers


def add_adapters(llm, config: Config):
    """LoRA with RWKU's settings: alpha twice the rank, on the queries and values of the blocks that move."""
    from peft import LoraConfig, get_peft_model
    names = {name.rsplit(".", 1)[-1] for name, _ in llm.named_modules()}
    blocks = config.layer if config.method == "atu" else llm.config.num_hidden_layers
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return get_peft_model(llm, LoraConfig(
            r=config.lora, lora_alpha=2 * config.lora, layers_to_transform=list(range(blocks)),
            target_modules=["q_proj", "v_proj"] if "q_proj" in names else ["qkv_proj"]))


def forget_texts(corpus: data.Corpus, answers: list[dict], tokenizer, config: Config) -> list[tuple[Tensor, Tensor]]:
    """Token ids and mask (N, T): the texts themselves (ga, npo), refusals (rt), or made-up and true answers (dpo)."""
    if config.method == "rt":
        asked = [[(row["instruction"], row["output"]) for row in answers]]
    elif config.method == "dpo":
        asked = [[(row["prompt"], row["response"][n]) for row in answers] for n in (0, 1)]
    else:
        return [(corpus.input_ids[corpus.about], corpus.mask[corpus.about])]
    return [data.tokenize_answers(part, tokenizer, config.length) for part in asked]


@dataclass
class Progress:
    """What a run has found so far; with `atu.State` all that a checkpoint holds."""

    before: dict                                       # scores
    asked_before: list[dict]                           # probes, with what was said
    after: dict
    asked_after: list[dict]
    untouched: dict                                    # `recover` of the untouched model
    stages: list[dict] = field(default_factory=list)   # scores after each stage
    records: list[dict] = field(default_factory=list)  # log.jsonl
    seconds: float = 0.0
    ended: bool = False                                # before the last stage, by `stop_at`


def run(config: Config) -> dict:
    """One run of Sec. 4.3, from weights to what is saved in `config.out`, a folder that is there.

    Returns what results.json holds. Raises data.BadInput.
    """
    out, began = Path(config.out), time.perf_counter()
    work = load(config)
    state, records = begin(work, config)  # Sec. 3 in atu.py, or `unlearn_tokens`
    checkpoints = Checkpoints(out / "checkpoint.safetensors", work, config.save_every)
    progress = checkpoints.restore(state) or untouched_scores(work, config)
    began -= progress.seconds
    first, stopped = data.processes()[0] == 0, None
    if first:
        data.write_text(out / "log.jsonl", "".join(json.dumps(record) + "\n" for record in progress.records))
    try:
        for record in () if progress.ended else records:
            progress.records.append(record)
            if first:
                with open(out / "log.jsonl", "a", encoding="utf-8") as log:
                    log.write(json.dumps(record) + "\n")
            print(line(record), flush=True)
            if record["kind"] == "stage":
                end_stage(record, work, state, progress, config)
            progress.seconds = time.perf_counter() - began
            checkpoints.save(state, progress, at_once=record["kind"] == "stage")
            if progress.ended:
                break
    except atu.NotFinite as error:
        stopped = str(error)
        print(f"stopped | {stopped}; the weights before that step are kept", flush=True)
        progress.after, progress.asked_after = score(work, work.ask_first, config)
    finally:
        checkpoints.wait()
    return finish(out, work, state, progress, stopped, began, config)


def untouched_scores(work: Work, config: Config) -> Progress:
    """What a run begins with."""
    before, asked = score(work, "", config)
    print(evaluate.table({"before": before}), flush=True)
    return Progress(before, asked, before, asked, recover(work, config) if config.method != "atu" else {})


def end_stage(record: dict, work: Work, state: atu.State, progress: Progress, config: Config) -> None:
    """Scores after a stage, and recovery at the first that has brought the forget score to half."""
    if record["stage"] == 0:
        progress.untouched = record  # the first alignment is what `recover` does
        return
    before, stages = progress.before, progress.stages
    progress.after, progress.asked_after = score(work, work.ask_first, config)
    stages.append(progress.after | {"record": record})
    print(evaluate.table({stage_name(record): progress.after}), flush=True)
    left = progress.after["forget_all"] / before["forget_all"] if before.get("forget_all") else 1.0
    progress.ended = left <= config.stop_at and config.stop_at > 0
    if left <= 0.5 and not progress.ended and not any("recovery" in stage for stage in stages):
        stages[-1]["recovery"] = pairs(progress.untouched, recover(work, config, state.hidden))


def finish(out: Path, work: Work, state: atu.State, progress: Progress, stopped: str | None, began: float,
           config: Config) -> dict:
    """Everything that a run leaves behind. Returns what results.json holds."""
    before, stages, untouched = progress.before, progress.stages, progress.untouched
    if stages and not stopped and "recovery" not in stages[-1]:
        stages[-1]["recovery"] = pairs(untouched, untouched if config.method == "icu" else
                                       recover(work, config, state.hidden))
    results = {"target": work.target, "settings": dataclasses.asdict(config), "versions": versions(config.device),
               "before": before, "stages": stages, "after": progress.after,
               "levels": levels(stages), "recovery": stages[-1]["recovery"] if stages and not stopped else {},
               "stopped": stopped, "seconds": time.perf_counter() - began}
    first = data.processes()[0] == 0
    llm = whole(work, "cpu" if first else "meta") if work.shell else work.llm
    if not first:
        return results
    save(out, llm, work.tokenizer, state.head, config)
    evaluate.plot(out / "curves.png", panels(before, stages, [r for r in progress.records if r["kind"] != "stage"]))
    data.write_json(out / "results.json", results)
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
    report(results, progress.asked_before, progress.asked_after, out)
    return results


def score(work: Work, ask_first: str, config: Config) -> tuple[dict, list[dict]]:
    """evaluate.evaluate and the `seconds` that it took. Several processes ask a part each, or (`whole` is off) all ask
    everything of the split model, in step."""
    began, (number, count) = time.perf_counter(), data.processes()
    rows = [(score, row) for score, part in work.probes.items() for row in part]
    llm, probes, parts = work.llm, {}, work.shell and config.whole
    if parts:
        dtype = data.fast_dtype(config.device) if config.bf16 else torch.float32
        llm, rows = whole(work, config.device, dtype), rows[number::count]
    for score, row in rows:
        probes.setdefault(score, []).append(row)
    with atu.autocast(llm, config) if work.shell and not parts else nullcontext():
        scores, asked = evaluate.evaluate(llm, work.tokenizer, probes, config.eval_batch, ask_first, bf16=config.bf16)
    set_recomputing(work.llm, config)  # a split model has been set to evaluation
    if parts:
        asked = data.gather_items(asked)
        scores = evaluate.summary(asked)
    return scores | {"seconds": time.perf_counter() - began}, asked


def recover(work: Work, config: Config, hidden: Tensor | None = None) -> dict:
    """`atu.recovery` of the model as it is now; empty with --no-recovery, and where the head's loss is not finite."""
    try:
        return atu.recovery(work.llm, work.concept, work.corpus, config, hidden) if config.recovery else {}
    except atu.NotFinite as error:
        print(f"recovery | not measured: {error}", flush=True)
        return {}


def pairs(untouched: dict, unlearned: dict) -> dict:
    """Each similarity of `atu.recovery` on the untouched and on the unlearned model."""
    return {key: {"untouched": untouched[key], "unlearned": unlearned[key]} for key in unlearned if key in untouched}


# ---------------------------------------------------------------------------------------------- several processes

def split(llm: torch.nn.Module | None, config: Config) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The first process's llm on all of them, its blocks split (`atu.shard`): (llm, the same without weights)."""
    weights = {}
    if llm is not None:
        unfreeze(llm, config)
        weights = llm.state_dict()
        llm = copy.deepcopy(llm, {id(p): torch.nn.Parameter(p.to("meta"), p.requires_grad) for p in llm.parameters()})
    shell = data.from_first(llm)
    llm = copy.deepcopy(shell)
    buffers = {name: value.clone() for name, value in llm.named_buffers()}
    atu.shard(llm, config)
    llm.to_empty(device=config.device)
    llm.tie_weights()
    for name, value in llm.named_buffers():
        value.copy_(buffers[name])
    set_model_state_dict(llm, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    with torch.no_grad(), atu.autocast(llm, config):  # FSDP2 counts the blocks in their first forward: all of them
        llm.get_decoder()(input_ids=torch.zeros(1, 1, dtype=torch.long, device=config.device), use_cache=False)
    return llm, shell


def whole(work: Work, device: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """A copy of the split llm with all its weights, on a device ("meta": without them, for who only takes part), in
    `dtype` or as they are."""
    weights = {name: all_of(value.detach().to(dtype or value.dtype)).to(device)
               for name, value in work.llm.named_parameters()}
    llm = copy.deepcopy(work.shell)
    llm.load_state_dict(weights, strict=False, assign=True)
    llm.tie_weights()
    return llm.to(device)  # the buffers


def all_of(value: Tensor) -> Tensor:
    """A tensor that may be split over the processes, whole."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, split as `like` is."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


# ---------------------------------------------------------------------------------------------- checkpoints

class Checkpoints:
    """The last state of a run in one file of tensors, replaced whole, written while the run goes on."""

    def __init__(self, file: Path, work: Work, every: float):
        self.file, self.every, self.last = file, every, time.perf_counter()
        self.writer, self.written = ThreadPoolExecutor(1), None
        read = [work.probes, work.corpus.input_ids.tolist(), [ids.tolist() for ids, _ in work.forget]]
        self.read = hashlib.sha256(json.dumps(read).encode()).hexdigest()  # what the run reads, apart from the weights

    def save(self, state: atu.State, progress: Progress, at_once: bool) -> None:
        """Every `every` seconds, or `at_once`. Raises data.BadInput where the one before could not be written."""
        if self.written and self.written.done():
            self.wait()
        if not data.from_first(at_once or time.perf_counter() - self.last >= self.every):
            return
        self.wait()
        place = "cpu" if data.processes()[0] == 0 else "meta"
        tensors = {name: all_of(value).detach().to(place, copy=True) for name, value in tensors_of(state).items()}
        if place == "meta":
            return
        rest = {name: getattr(state, name) for name in ("stage", "aligning", "done", "recent", "step", "tokens",
                                                        "began", "record")}
        rest = {"read": self.read, "state": rest, "progress": dataclasses.asdict(progress)}
        self.written = self.writer.submit(write_checkpoint, self.file, tensors, json.dumps(rest))
        self.last = time.perf_counter()

    def wait(self) -> None:
        """Until the last one is on the disk. Raises data.BadInput where it could not be written."""
        if self.written:
            self.written.result()

    def restore(self, state: atu.State) -> Progress | None:
        """The saved run's progress, its state put into `state`; None where nothing is saved. Raises data.BadInput."""
        if not self.file.exists():
            return None
        tensors, rest = read_checkpoint(self.file)
        if rest["read"] != self.read:
            raise data.BadInput(f"{self.file}: texts, probes or the tokenizer have changed since; name another folder "
                                "with --out")
        put_tensors(state, tensors)
        for name, value in rest["state"].items():
            setattr(state, name, value)
        progress = Progress(**rest["progress"])
        print(f"resumed | stage {state.stage} | step {state.step} | {progress.seconds:.0f} s so far", flush=True)
        return progress


def learners(state: atu.State) -> list[tuple[str, torch.nn.Module, torch.optim.Optimizer | None]]:
    """What learns in a run, and by what."""
    found = [("llm", state.llm, state.llm_optimizer), ("head", state.head, state.head_optimizer)]
    return [(part, module, optimizer) for part, module, optimizer in found if module is not None]


def tensors_of(state: atu.State) -> dict[str, Tensor]:
    """All tensors that change during a run: "llm.value.NAME" of a parameter, "llm.exp_avg.NAME" of its optimizer."""
    tensors = {}
    for part, module, optimizer in learners(state):
        for name, parameter in module.named_parameters():
            moments = optimizer.state.get(parameter, {}) if optimizer else {}
            changing = {"value": parameter} if parameter.requires_grad or part == "head" else {}
            tensors |= {f"{part}.{key}.{name}": value for key, value in (changing | moments).items()
                        if value is not None}
    return tensors


def put_tensors(state: atu.State, tensors: dict[str, Tensor]) -> None:
    """What `tensors_of` gave, whole, back into a state of the same run, on however many processes."""
    found = {}
    for name, value in tensors.items():
        part, key, parameter = name.split(".", 2)
        found.setdefault((part, parameter), {})[key] = value
    for part, module, optimizer in learners(state):
        for name, parameter in module.named_parameters():
            values = {key: part_like(value, parameter).to(parameter.device)
                      for key, value in found.get((part, name), {}).items()}
            if "value" in values:
                parameter.data.copy_(values.pop("value"))
            if values:
                optimizer.state[parameter] = values


def write_checkpoint(file: Path, tensors: dict[str, Tensor], rest: str) -> None:
    """One file, whole and on the disk, or the one that was there. Raises data.BadInput."""
    partial = file.with_name(f".{file.name}")
    try:
        save_file(tensors, partial, metadata={"rest": rest, "sha256": data.hashed(tensors, rest).hexdigest()})
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        way_out = "the last one is whole: make room, and go on with --resume" if file.exists() else "make room"
        raise data.BadInput(f"{file}: cannot be written ({getattr(error, 'strerror', None) or error}); {way_out}"
                            ) from error


def read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, what else was found). Raises data.BadInput where the file is damaged, or no checkpoint."""
    try:
        with safe_open(file, "pt") as opened:
            tensors, about = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise data.BadInput(f"{file}: damaged checkpoint ({error}); delete it to begin again") from error
    if not {"rest", "sha256"} <= set(about):
        raise data.BadInput(f"{file}: not a checkpoint of train.py; name another folder with --out")
    if about["sha256"] != data.hashed(tensors, about["rest"]).hexdigest():
        raise data.BadInput(f"{file}: damaged checkpoint (its checksum is another); delete it to begin again")
    return tensors, json.loads(about["rest"])


# ---------------------------------------------------------------------------------------------- methods on tokens

def begin(work: Work, config: Config):
    """(state, generator of records): the method's own. The model is the untouched one."""
    recompute(work.llm, config)
    for block in work.llm.get_decoder().layers if config.compile else ():
        block.compile()
    if config.method == "atu":
        state = atu.start(work.llm, work.corpus, config)
        return state, atu.align_then_unlearn(state, work.concept, work.corpus, config)
    state = atu.State(work.llm, None, None, None, stage=1)
    if config.method == "icu":
        work.llm.requires_grad_(False)
        return state, no_training(state)
    unfreeze(work.llm, config)
    state.llm_optimizer = atu.llm_optimizer(work.llm, config)
    reference = []
    if config.method in ("npo", "dpo"):  # π_ref(y | x) never changes: computed once
        reference = [reference_log_probs(work.llm, *texts, config) for texts in work.forget]
    ask = None
    if config.retain == "kl":
        ask = original_logits(whole(work, config.device) if work.shell else work.llm, config)
    return state, unlearn_tokens(state, work.forget, reference, work.corpus, ask, config)


def unfreeze(llm, config: Config) -> None:
    """What moves does, in fp32: what `atu.unfreeze` says, and in the methods on tokens everything, or the adapters."""
    if config.method == "atu" or config.lora:
        atu.unfreeze(llm, config)
    elif config.method != "icu":
        llm.float().requires_grad_(True)


def recompute(llm, config: Config) -> None:
    """With `checkpointing`, blocks keep their input alone and compute the rest again in the backward pass."""
    if config.checkpointing:
        llm.activation_checkpointing_enable({"use_reentrant": False})
    set_recomputing(llm, config)


def set_recomputing(llm, config: Config) -> None:
    """transformers computes again in blocks in training alone; the block itself, so that dropout, if any, stays off."""
    if config.checkpointing:
        for block in llm.get_decoder().layers:
            block.training = True


def no_training(state: atu.State):
    """The one stage of icu."""
    if state.stage == 1:
        state.next_stage()
        yield {"kind": "stage", "stage": 1, "tau": None, "steps": 0, "seconds": 0.0, "tokens": 0}


def unlearn_tokens(state: atu.State, forget: list[tuple[Tensor, Tensor]], reference: list[Tensor], corpus: data.Corpus,
                   ask, config: Config):
    """GA, NPO, DPO, RT (Appendix A.2), as RWKU trains them: AdamW, warm-up and cosine, passes over the shuffled texts.

    forget: token ids and mask (N, T) each; in dpo the made-up answers, then the true ones. reference: for npo and dpo
    π_ref's log-likelihood of each, (N,). Other texts, for `retain`, are those of the corpus that are not about the
    target; with kl `ask` gives their `original_logits`. Yields records as `atu.align_then_unlearn` does; a stage is
    `unlearn_steps` steps, or (0) one pass over the texts.
    """
    llm, device = state.llm, state.llm.device
    forgotten, others = torch.arange(len(forget[0][0])), (~corpus.about).nonzero()[:, 0]
    count = config.unlearn_steps or math.ceil(len(forgotten) / config.batch)
    for group in state.llm_optimizer.param_groups:
        group["initial_lr"] = config.llm_lr
    schedule = get_cosine_schedule_with_warmup(state.llm_optimizer, config.warmup, config.stages * count,
                                               last_epoch=state.step - 1)
    while state.stage <= config.stages:
        began = time.perf_counter()
        while state.done < count:
            batch = atu.draw(forgotten, config.batch, state.step, config.seed)                  # (B,)
            rows = atu.mine(batch)
            batches = [(ids[rows].to(device), mask[rows].to(device)) for ids, mask in forget]
            known = [logp[rows].to(device) for logp in reference]                               # each (B,)
            loss = token_loss([(logits(llm, ids, config), ids, mask) for ids, mask in batches], known, config)
            loss = loss * atu.share(batches[0][1].any(1) if reference else batches[0][1][:, 1:])  # of texts, of tokens

            retain = torch.zeros_like(loss)
            if config.retain != "none":
                held = atu.draw(others, config.batch, state.step, config.seed)                  # (B,)
                rows = atu.mine(held)
                ids, mask = corpus.input_ids[rows].to(device), corpus.mask[rows].to(device)     # (B, T) each
                now = logits(llm, ids, config)                                                  # (B, T, V)
                retain = losses.kl_loss(now, ask(ids), mask) if ask else losses.likelihood_loss(now, ids, mask)
                retain = retain * atu.share(mask[:, 1:])
                state.tokens += int(corpus.mask[held].sum())
            atu.optimize(loss + config.retain_weight * retain, state.llm_optimizer, config.clip)
            schedule.step()

            state.done, state.step = state.done + 1, state.step + 1
            state.tokens += sum(int(mask[batch].sum()) for _, mask in forget)
            if state.done % config.log_every == 0 or state.done == count:
                state.record = {"unlearn_loss": atu.mean(loss), "retain_loss": atu.mean(retain)}
                yield {"kind": "unlearn", "stage": state.stage, "step": state.step,
                       "loss": state.record["unlearn_loss"], "retain": state.record["retain_loss"]}
        state.llm_optimizer.zero_grad()  # frees the gradients' memory
        record = {"kind": "stage", "stage": state.stage, "tau": None, "steps": count, **state.record,
                  "seconds": time.perf_counter() - began, "tokens": state.tokens - state.began[1]}
        state.done = 0
        state.next_stage()
        yield record


def original_logits(llm, config: Config):
    """What gives the logits of the model as it is now, (B, T) -> (B, T, V), also when it has changed: a frozen copy,
    or the model without its adapters."""
    frozen = llm if config.lora else evaluate.speaker(
        llm, torch.bfloat16 if config.bf16 else torch.float32, frozen=True)

    def ask(input_ids: Tensor) -> Tensor:
        with torch.no_grad(), frozen.disable_adapter() if config.lora else nullcontext():
            return logits(frozen, input_ids, config)

    return ask


def token_loss(batches: list[tuple[Tensor, Tensor, Tensor]], reference: list[Tensor], config: Config) -> Tensor:
    """The method's loss on (logits (B, T, V), input_ids, mask) and, for npo and dpo, π_ref's log-likelihoods (B,)."""
    if config.method == "ga":
        return losses.ascent_loss(*batches[0])
    if config.method == "rt":
        return losses.likelihood_loss(*batches[0])
    logp = [losses.sequence_log_probs(*batch) for batch in batches]                         # each (B,)
    if config.method == "npo":
        return losses.npo_loss(*logp, *reference, config.beta)
    return losses.dpo_loss(*logp, *reference, config.beta)


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


# ---------------------------------------------------------------------------------------------- what is shown and kept

def line(record: dict) -> str:
    """A record as one line that greps: `unlearn | stage 1 | tau 0.5 | step 310 | loss 0.0512 | ...`."""
    shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
             for key, value in record.items() if key != "kind" and value is not None]
    return " | ".join([record["kind"], *shown])


def stage_name(record: dict) -> str:
    """A stage's name in tables: its margin, or its number."""
    return f"stage {record['stage']}" if record["tau"] is None else f"tau {record['tau']:g}"


def levels(stages: list[dict]) -> dict:
    """Table 1: the name of the first stage whose mean forget accuracy is below 50, 35 and 20 %; None where none is."""
    found = {str(level): evaluate.first_stage({"stages": stages}, level, False) for level in (50, 35, 20)}
    return {level: stage and stage_name(stage["record"]) for level, stage in found.items()}


def versions(device: str) -> dict:
    """What the figures depend on beside the settings."""
    import sentence_transformers
    import transformers
    named = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "sentence_transformers": sentence_transformers.__version__, "device": named or platform.machine(),
            "threads": torch.get_num_threads()}


def save(out: Path, llm, tokenizer, head, config: Config) -> None:
    """model/ (none from icu; what moved in fp32, the rest as in its file, adapters merged into it) and head.safetensors
    (atu), each whole or not at all."""
    if config.method != "icu":
        partial = out / ".model"
        llm = llm.merge_and_unload() if config.lora else llm
        llm.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(out / "model", ignore_errors=True)  # of a run that was cut off here
        partial.rename(out / "model")
    if head is not None:
        save_file({name: value.contiguous() for name, value in head.state_dict().items()}, out / ".head")
        (out / ".head").rename(out / "head.safetensors")


def panels(before: dict, stages: list[dict], steps: list[dict]) -> list[dict]:
    """The panels of curves.png: similarity and loss by step; scores by stage (Fig. 6); the trade-off (Fig. 4)."""
    scores = [before, *stages]
    forget = "forget_all" if "forget_all" in before else "mia_forget"
    kept = [name for name in ("neighbor_all", "general", "mmlu", "mia_retain") if name in before]
    unit = "%" if forget == "forget_all" else "loss x 100, or %"

    def by_step(kind: str, key: str):
        chosen = [s for s in steps if s["kind"] == kind and key in s]
        return [s["step"] for s in chosen], [s[key] for s in chosen]

    lines = {"alignment loss (Eq. 1)": by_step("align", "loss"), "unlearning loss": by_step("unlearn", "loss"),
             "similarity to the concept": by_step("unlearn", "similarity")}
    return [
        {"title": "loss and similarity by step", "x": "step", "y": "",
         "lines": {name: xy for name, xy in lines.items() if xy[0]}},
        {"title": "scores by stage", "x": "stage", "y": unit, "lines": {
            name: (list(range(len(scores))), [s[name] for s in scores]) for name in (forget, *kept)}},
        {"title": "forgetting and what else is lost", "x": f"{forget} ({unit})", "y": unit, "lines": {
            name: ([s[forget] for s in scores], [s[name] for s in scores]) for name in kept}},
    ]


def report(results: dict, before: list[dict], after: list[dict], out: Path) -> None:
    """The end of the log: the table, recovery, Table 1's levels, and the questions of Fig. 1 before and after."""
    rows = {"before": results["before"]}
    rows |= {stage_name(stage["record"]): stage for stage in results["stages"]}
    print("\n" + evaluate.table(rows | {"after": results["after"]}))
    measured = any(score in results["before"] for score in ("forget_all", "forget_text"))
    for level, stage in results["levels"].items() if measured else ():
        print(f"level | mean forget accuracy below {level} % | {f'first at {stage}' if stage else 'not reached'}")
    for key, value in results["recovery"].items():
        print(f"recovery | {key} | fresh head on the untouched model {value['untouched']:.3f} | "
              f"on the unlearned one {value['unlearned']:.3f}")
    shown = illustrations(before)
    if shown:
        print()
    for kind, i in shown:
        said = [" ".join(asked[i]["said"].split()) for asked in (before, after)]
        print(f"{kind}\n  Q: {before[i].get('query') or before[i]['prompt']}\n  before: {said[0]}\n  after:  {said[1]}")
    files = ", ".join(sorted(file.name for file in out.iterdir() if not file.name.startswith(".")))
    print(f"\nsaved | {out}: {files} | {results['seconds']:.0f} s")


def illustrations(before: list[dict], count: int = 2) -> list[tuple[str, int]]:
    """Fig. 1: (kind, place in `before`) for `count` questions answered before: asked exactly, rephrased (an adversarial
    probe with the same answer), and a question about something else that shares the most words."""
    def words(i: int) -> set[str]:
        return set(re.findall(r"\w+", before[i]["query"].casefold()))

    places = {name: [i for i, row in enumerate(before) if row["set"] == name] for name in evaluate.WEIGHTS}
    shown = [(kind, i) for kind in ("forget_text", "neighbor_text") for i in places[kind]]
    if not all(places[name] for name in ("forget_qa", "forget_aa", "neighbor_qa")):
        return shown
    known = sorted(places["forget_qa"], key=lambda i: (before[i]["score"], before[i]["gold"]))
    for i in list({before[i]["answers"][0]: i for i in known}.values())[-count:]:  # different answers, best known last
        def likeness(j: int) -> tuple:
            return before[j]["score"] >= 0.5, len(words(i) & words(j))

        same = [j for j in places["forget_aa"] if before[j]["answers"] == before[i]["answers"]]
        shown += [("exact", i), ("rephrased", max(same or places["forget_aa"], key=likeness)),
                  ("other concept", max(places["neighbor_qa"], key=likeness))]
    return shown


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 0: done; 1: stopped by a loss that is not finite; 2: bad input, out of memory or disk;
    130: interrupted."""
    first = int(os.environ.get("RANK", 0)) == 0  # of torchrun's processes; the others print nothing
    try:
        with nullcontext() if first else redirect_stdout(open(os.devnull, "w")):
            config = parse(argv)
            with several(config.device), claimed(config) if first else nullcontext() as finished:
                finished = data.from_first(finished)
                config = dataclasses.replace(data.from_first(config), device=config.device)
                data.keep_freed_memory(config.device)
                if finished:
                    print(f"resumed | {config.out}: finished already")
                with data.out_of_memory("--batch, --align-batch, --length, --layer or --eval-batch; or take "
                                        "--checkpointing, --cache host, --lora 8, or more devices (torchrun)"):
                    return 1 if (finished or run(config))["stopped"] else 0
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    except data.BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

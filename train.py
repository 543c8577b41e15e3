"""Align-then-Unlearn (arXiv 2506.13181), from a name to a model that forgot it.

    python train.py --target "Warren Buffett"

`run` is its spine: the stages of Sec. 4.3 (tau is lowered stage by stage, every stage is scored). Above it
stand the options and what a run works on, below it what is kept and shown. The method is in atu.py.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import atu
import data
import evaluate
from head import EmbeddingHead


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code: 1 if a step was not finite, else as `data.command`."""
    def work() -> int:
        return 1 if run(parse(Config, argv))["stopped"] else 0

    return data.command(work, WAY_ON)


WAY_ON = "; the same command with --resume goes on"


# ------------------------------------------------------------------------------- options

def option(default, help: str, least: float = -math.inf, most: float = math.inf, among: tuple = ()):
    """A field of the configuration: its --help, and what its value, or each of its values, may be."""
    return field(default=default, metadata=dict(help=help, least=least, most=most, among=among))


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. The defaults are the preset `smol`."""

    target: str = option("", "the person to forget, as in RWKU, in any case; or a concept: M writes texts")
    describe: str = option("", "what the target is, beside its name: for the encoder, and for M as it writes")
    texts: str = option("", "a file of own texts on the target, one a paragraph")
    probes: str = option("", "a file of own probes in RWKU's fields (query, answer, level, type, neighbor)")
    preset: str = option("auto", "smol (packaged weights, sample data), phi3 (the authors' settings), "
                         "phi3-24gb (at block 10), auto", among=("auto", "smol", "phi3", "phi3-24gb"))
    model: str = option("smollm2-135m-instruct", "M: a packaged model, a local folder or a hub id")
    encoder: str = option("all-minilm-l6-v2", "the frozen text encoder: likewise")
    rwku: str = option("sample", "sample, hub, or a folder with RWKU's files")
    corpus: str = option("positive", "RWKU's file of texts", among=("positive", "positive_phi", "passage"))
    sets: tuple[str, ...] = option(("forget", "neighbor", "general"), "what is scored",
                                   among=tuple(evaluate.SETS))
    others: int = option(5, "other targets whose texts are taken, to align E on and to retain", 0)
    target_texts: int = option(32, "the target's texts at most; so many are written where there are none", 1)
    other_texts: int = option(12, "texts of each other target at most", 1)
    general_texts: int = option(160, "texts on the world at large at most (RWKU has none)", 0)
    length: int = option(80, "T: tokens of a text", 16)
    window: int = option(8, "k: tokens in a future window", 1)
    layer: int = option(10, "the block whose output is h_t; blocks 1 to this one move", 1)
    mlp_only: bool = option(True, "of these blocks only the feed-forward parts move (ours, not the paper's)")
    train_embeddings: bool = option(False, "move the input embedding too (the paper's theta_M)")
    head_depth: int = option(2, "blocks of E", 1)
    head_width: int = option(256, "width of E, a multiple of its 8 heads", 8)
    batch: int = option(8, "texts in a batch of unlearning (and as many for the retain term)", 1)
    align_batch: int = option(16, "texts in a batch of alignment", 1)
    align_steps: int = option(350, "steps of the first alignment (Eq. 2)", 1)
    realign_steps: int = option(40, "steps of realignment after each stage (Sec. 3)", 0)
    unlearn_steps: int = option(30, "steps of a stage at most (Eq. 4)", 1)
    taus: tuple[float, ...] = option((0.45, 0.4, 0.35, 0.3, 0.25, 0.2), "margin of each stage (Eq. 3)", -1, 1)
    max_active: float = option(0.02, "a stage ends once, over a pass, at most this share of the positions is "
                                     "above tau", 0, 1)
    retain_weight: float = option(10.0, "weight of the retain term (ours; 0: the paper)", 0)
    lora: int = option(0, "rank of LoRA adapters, which then move alone; 0: none", 0)
    optimizer: str = option("adamw", "M's: adamw or sgd", among=("adamw", "sgd"))
    llm_lr: float = option(4e-5, "learning rate of M (with --lora 1e-3; phi3 1e-4)", 0)
    head_lr: float = option(1e-3, "learning rate of E (Adam)", 0)
    clip: float = option(1.0, "gradients are clipped to this norm", 1e-9)
    stop_at: float = option(0.2, "stop when forget_words is at most this share of before; 0: never", 0, 1)
    bf16: bool = option(True, "compute in bf16 where the device is fast in it (e_t always); what moves stays "
                        "fp32")
    eval_batch: int = option(evaluate.BATCH, "prompts at a time when answering", 1)
    log_every: int = option(10, "steps between two lines of the log", 1)
    seed: int = option(0, "of E's and adapters' weights, batches and texts that M writes", 0, 2**63 - 1)
    device: str = option("auto", "auto, cpu or cuda")
    checkpointing: bool = option(False, "compute activations again in backward: less memory, more time")
    cache: str = option("device", "where hidden states and e_t are kept: device, or host (less GPU memory)",
                        among=("device", "host"))
    resume: bool = option(False, "go on after the last whole stage of the run in --out, or begin it")
    out: str = option("", "folder of the run (default: runs/<target>)")

    @classmethod
    def usual(cls, given: dict) -> dict:
        """What stands in place of the defaults above, by what is `given`: a preset, LoRA's learning rate."""
        lora = {"llm_lr": 1e-3 if given["preset"] == "smol" else 1e-4, "optimizer": "adamw",
                "train_embeddings": False, "mlp_only": False}  # the adapters move alone
        return PRESETS[given["preset"]] | (lora if given.get("lora") else {})

    def folder(self) -> str:
        """Where the run goes without --out."""
        return f"runs/{slug(self.target)}"


PRESETS = {"smol": {}, "phi3": dict(  # the authors' settings, as read from their code
    model="microsoft/Phi-3-mini-4k-instruct", encoder="sentence-transformers/all-mpnet-base-v2", rwku="hub",
    corpus="positive_phi", others=3, target_texts=582, other_texts=582, length=256, layer=29, head_depth=6,
    head_width=768, batch=16, align_batch=16, align_steps=15_000, realign_steps=1000, unlearn_steps=1000,
    taus=(0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3, 0.2), mlp_only=False, train_embeddings=True,
    retain_weight=0.0, optimizer="sgd", llm_lr=3e-4, head_lr=1e-4, stop_at=0.0,
    sets=("forget", "neighbor", "mmlu"))}
PRESETS["phi3-24gb"] = PRESETS["phi3"] | dict(layer=10, checkpointing=True, eval_batch=16)  # Sec. 4.5
MEMORY = {"phi3": 60, "phi3-24gb": 22}  # GB of a GPU that must be free; peaks are 42 and 18 (simulated)
# What a resumed run may change: it changes nothing in results, but for rounding.
FREE = ("out", "device", "bf16", "resume", "log_every", "checkpointing", "cache")


def parse(kind: type[Config], argv: list[str] | None = None) -> Config:
    """The command line, on top of what is usual for the preset. kind: Config, or a subclass with more
    options. Raises data.BadInput."""
    parser = argparse.ArgumentParser(description=sys.modules[kind.__module__].__doc__.splitlines()[0],
                                     allow_abbrev=False)
    for item in dataclasses.fields(kind):
        how = {"type": type(item.default), "metavar": item.name.upper()}
        if isinstance(item.default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(item.default, tuple):
            how |= {"type": type(item.default[0]), "nargs": "+"}
        smol, phi3 = (kind.usual({"preset": p}).get(item.name, item.default) for p in ("smol", "phi3"))
        usual = f" [{smol}]" if smol == phi3 else f" [smol {smol}; phi3 {phi3}]"
        how |= {"help": item.metadata["help"] + usual, "default": argparse.SUPPRESS}
        parser.add_argument(dashed(item.name), **how)
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(data.parsed(parser, argv)).items()}
    device = data.choose_device(given.get("device", "auto"))
    if given.setdefault("preset", "auto") == "auto":
        free = torch.cuda.mem_get_info(device)[0] / 1e9 if device.startswith("cuda") else 0.0
        fitting = (name for name, needed in MEMORY.items() if free >= needed and "model" not in given)
        given["preset"] = next(fitting, "smol")
        needs = ", ".join(f"{name} needs {needed}" for name, needed in MEMORY.items())
        other = " and no other --model" if "model" in given else ""
        print(f"preset | {given['preset']}: {free:.0f} GB of CUDA memory free, {needs}{other}")
    check(kind(**given))
    config = kind(**kind.usual(given) | given)
    check(config)
    bf16 = config.bf16 and data.fast_dtype(device) == torch.bfloat16
    return dataclasses.replace(config, device=device, bf16=bf16, out=config.out or config.folder())


def check(config: Config) -> None:
    """Raises data.BadInput for the first setting that is out of its range."""
    if not slug(config.target):
        raise data.BadInput("--target NAME: whom shall the model forget?")
    if config.head_width % 8:
        raise data.BadInput(f"--head-width {config.head_width}: must be a multiple of 8, the number of heads")
    if config.lora and config.train_embeddings:
        raise data.BadInput("--train-embeddings: not with --lora, whose adapters move alone")
    if list(config.taus) != sorted(config.taus, reverse=True):
        raise data.BadInput(f"--taus {' '.join(map(str, config.taus))}: margins fall stage by stage")
    for item in dataclasses.fields(config):
        least, most, among = (item.metadata[key] for key in ("least", "most", "among"))
        value = getattr(config, item.name)
        for part in value if isinstance(value, tuple) else (value,):
            if among and part not in among:
                raise data.BadInput(f"{dashed(item.name)} {part}: unknown; there are {', '.join(among)}")
            if isinstance(part, (int, float)) and not (least <= part <= most and math.isfinite(part)):
                raise data.BadInput(f"{dashed(item.name)} {part}: must be finite, from {least:g} to {most:g}")


def slug(name: str) -> str:
    """A target's name as a folder's."""
    return re.sub(r"[\W_]+", "-", data.plain(name))[:80].strip("-")


def dashed(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------- what a run works on

class Work(NamedTuple):
    """All that a run works on."""

    target: str
    llm: torch.nn.Module           # M; untouched until `begin`
    tokenizer: Any
    probes: dict[str, list[dict]]  # by score
    about: list[str]               # texts about the target
    others: list[str]              # texts about others and the world at large


def load(config: Config) -> Work:
    """Texts, probes and M. Raises data.BadInput; what needs no model is read before it is loaded."""
    root = data.open_rwku(config.rwku)
    target, known = data.find_target(root, config.target, own=bool(config.describe or config.texts))
    probes = evaluate.read_probes(root, target, config.sets, Path(config.probes) if config.probes else None)
    listed = [name for name in data.targets(root) if data.plain(name) != data.plain(target)][:config.others]
    rows = [data.read_set(root, name, config.corpus)[:config.other_texts] for name in listed]
    others = [row["text"] for part in rows for row in part] + data.general_texts(root)[:config.general_texts]
    if not known:
        others = [text for text in others if not data.mentions(text, target)]
    if not others:
        raise data.BadInput(f"{root}: no texts on anything but {target}; raise --others or --general-texts")
    written, about = Path(config.out) / "texts.txt", []
    if config.texts or written.exists():  # M may write others the second time
        about = data.read_texts(Path(config.texts or written))
    elif known:
        about = [row["text"] for row in data.read_set(root, target, config.corpus)]
    if not any(score.startswith("forget") for score in probes):
        print("data | no forget probes: forgetting is not scored, and all stages run; --probes brings some")

    llm, tokenizer = open_llm(config)
    if not about:
        intro = f"{target} is {config.describe}." if config.describe else ""
        how = config.target_texts, llm, tokenizer, config.seed, config.length
        about = data.write_texts(target, intro, *how)
        data.write_text(written, "\n\n".join(about) + "\n")
    about = about[:config.target_texts]
    count = sum(map(len, probes.values()))
    print(f"data | {target}: {len(about)} texts, {len(others)} on others, {count} probes", flush=True)
    return Work(target, llm, tokenizer, probes, about, others)


def open_llm(config: Config):
    """(llm, tokenizer). Raises data.BadInput for a model that cannot be cut after a block."""
    llm, tokenizer = data.load_llm(config.model, config.device, "auto" if config.bf16 else torch.float32)
    decoder = llm.get_decoder()
    if not (hasattr(decoder, "layers") and hasattr(decoder, "norm")):
        raise data.BadInput(f"--model {config.model}: {type(llm).__name__} has no decoder with .layers and "
                            ".norm; take one of Llama's or Phi-3's kind")
    if config.mlp_only and not hasattr(decoder.layers[0], "mlp"):
        raise data.BadInput(f"--model {config.model}: its blocks have no .mlp; give --no-mlp-only")
    if config.lora > (width := llm.config.get_text_config().hidden_size):
        raise data.BadInput(f"--lora {config.lora}: above the model's width, {width}")
    if config.device == "cpu":
        llm.set_attn_implementation("eager")  # short texts train faster than with a CPU's SDPA kernels
    return llm, tokenizer


def prepare(llm, config: Config, blocks: int):
    """M, so that its first `blocks` blocks can move: with adapters and checkpointing, if any. Raises
    data.BadInput."""
    if blocks > (there := len(llm.get_decoder().layers)):
        raise data.BadInput(f"--layer {blocks}: {config.model} has the blocks 1 to {there}")
    if config.lora:
        llm.get_input_embeddings().float()
        llm = add_adapters(llm, config, blocks)
    if config.checkpointing:
        llm.activation_checkpointing_enable({"use_reentrant": False})
        for block in llm.get_decoder().layers:
            block.training = True  # transformers does so in training alone; no dropout inside
    return llm


def add_adapters(llm, config: Config, blocks: int):
    """LoRA with RWKU's settings: alpha twice the rank, on queries and values (with the keys where these share
    a matrix) of the first `blocks`."""
    from peft import LoraConfig, get_peft_model
    names = {name.rsplit(".", 1)[-1] for name, _ in llm.named_modules()}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return get_peft_model(llm, LoraConfig(
            r=config.lora, lora_alpha=2 * config.lora, layers_to_transform=list(range(blocks)),
            target_modules=["q_proj", "v_proj"] if "q_proj" in names else ["qkv_proj"]))


def llm_optimizer(llm, config: Config) -> torch.optim.Optimizer:
    """M's optimizer, of what moves in it."""
    moving = [parameter for parameter in llm.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(moving, lr=config.llm_lr)
    return torch.optim.AdamW(moving, lr=config.llm_lr, weight_decay=0.0, fused=True)


# ------------------------------------------------------------------------------- the run

def begin(work: Work, config: Config, embedded: tuple[data.Corpus, Tensor] | None = None):
    """(state, generator of records): Sec. 3 in atu.py. Nothing has moved yet. embedded: in the place of what
    `embed_texts` gives."""
    llm = prepare(work.llm, config, config.layer)
    corpus, concept = embedded or embed_texts(work, config)
    if not config.lora:
        atu.unfreeze(llm, config.layer, config.train_embeddings, config.mlp_only)
    with torch.random.fork_rng():  # E is drawn from `seed` alone
        torch.manual_seed(config.seed)
        width = llm.config.get_text_config().hidden_size
        head = EmbeddingHead(width, len(concept), config.head_depth, config.head_width)
    head_optimizer = torch.optim.Adam(head.to(config.device).parameters(), lr=config.head_lr, fused=True)
    state = atu.State(llm, head, llm_optimizer(llm, config), head_optimizer)
    return state, atu.align_then_unlearn(state, concept, corpus, original_states(llm, corpus, config), config)


def original_states(llm, corpus: data.Corpus, config: Config) -> Tensor | None:
    """h_t of the other texts before unlearning, (R, T, D), for the retain term; None without one."""
    if not config.retain_weight:
        return None
    others, keep_on = corpus.input_ids[~corpus.about], "cpu" if config.cache == "host" else None
    return atu.all_hidden_states(llm, others, config.layer, config.batch, config.bf16, keep_on)


def embed_concept(target: str, describe: str, encoder) -> Tensor:
    """e_unlearn, (C,): the embedding of the target's name (Sec. 2.2), with what --describe says of it."""
    described = f"{target}, {describe}" if describe else target
    if (tokens := len(encoder.tokenizer.encode(described))) > encoder.max_seq_length:
        print(f"data | --describe: of {tokens} tokens the encoder reads the first {encoder.max_seq_length}")
    return data.embed([described], encoder)[0]


def embed_texts(work: Work, config: Config, embed_concept=embed_concept) -> tuple[data.Corpus, Tensor]:
    """The texts with their windows' embeddings, and e_unlearn (C,), by `embed_concept`."""
    encoder = data.load_encoder(config.encoder, config.device)
    corpus = data.make_corpus(work.about, work.others, work.tokenizer, encoder, config.window, config.length)
    if config.cache == "device":
        corpus = corpus._replace(table=corpus.table.to(config.device))
    concept = embed_concept(work.target, config.describe, encoder)
    print(f"data | {int(corpus.mask.sum())} tokens, {len(corpus.table)} distinct windows", flush=True)
    return corpus, concept


def score(work: Work, config: Config) -> tuple[dict, list[dict]]:
    """evaluate.evaluate of the run's probes: (scores, rows)."""
    dtype = evaluate.precision(config.device, config.bf16)
    return evaluate.evaluate(work.llm, work.tokenizer, work.probes, config.eval_batch, dtype)


def enough(found: dict, config: Config) -> bool:
    """Whether the last stage has brought the forget score, by word recall, to `stop_at` times what it was."""
    before, after = (found[when].get("forget_words", 0.0) for when in ("before", "after"))
    return bool(found["stages"] and config.stop_at and before and after <= config.stop_at * before)


def run(config: Config, begin=begin, score=score, enough=enough) -> dict:
    """One run of Sec. 4.3, from weights to what is saved in `config.out`. Returns what results.json holds.

    begin: (work, config) -> (atu.State, generator of records): what is trained, and how. After a record of
    kind "stage" it is scored; after that, or "aligned", it can be cut off, and go on from `state` alone.
    score: (work, config) -> (scores, rows): what is asked; scores are numbers, shown and kept by their names.
    enough: (what was found so far, config) -> whether to stop. Raises data.BadInput."""
    with claimed(out := Path(config.out), config):
        if (out / "results.json").exists():
            return finished_already(out)
        began, work = time.perf_counter(), load(config)
        state, records = begin(work, config)  # M is untouched here, also where a run goes on
        work = work._replace(llm=state.llm)
        if found := load_checkpoint(out, work, state):
            print(f"resumed | stage {state.stage} | {found['seconds']:.0f} s so far", flush=True)
        else:
            scores, asked = score(work, config)
            found = {"before": scores, "asked_before": asked, "after": scores, "asked_after": asked,
                     "stages": [], "log": [], "stopped": None, "seconds": 0.0}
            print(evaluate.scores_table({"before": scores}), flush=True)
        began -= found["seconds"]
        write_log(out, found["log"], "w")
        if enough(found, config):  # cut off at its end: nothing to do
            records = ()
        try:
            for record in records:
                record = {"kind": record["kind"], "stage": state.stage} | record
                found["log"].append(record)
                write_log(out, [record], "a")
                if record["kind"] == "stage":
                    found["after"], found["asked_after"] = score(work, config)
                    found["stages"].append(found["after"] | {"record": record})
                    print(evaluate.scores_table({stage_name(record): found["after"]}), flush=True)
                found["seconds"] = time.perf_counter() - began
                if record["kind"] in ("aligned", "stage"):
                    save_checkpoint(out, work, state, found)
                if record["kind"] == "stage" and enough(found, config):
                    break
        except (RuntimeError, data.BadInput) as error:
            if "non-finite" not in str(error):  # as clip_grad_norm_ and evaluate.answer say it
                raise
            found = load_checkpoint(out, work, state) or found | dict(  # no stage is whole yet: M as it is
                zip(("after", "asked_after"), score(work, config)))
            found["stopped"] = "a loss, its gradient or what M computes is not finite"
        return finish(out, work, state, found, config)


def finish(out: Path, work: Work, state: atu.State, found: dict, config: Config) -> dict:
    """Everything that a run leaves behind. Returns what results.json holds."""
    results = {"target": work.target, "settings": dataclasses.asdict(config), "versions": {
        "torch": torch.__version__, "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(), "answers": str(evaluate.precision(config.device, config.bf16))}}
    results |= {name: found[name] for name in ("before", "stages", "after", "stopped", "seconds")}
    save_model(out, work, state, config, model_card(results, config))
    evaluate.plot(out / "curves.png", panels(found))
    data.write_json(out / "results.json", results)
    (out / CHECKPOINT).unlink(missing_ok=True)
    report(found)
    files = ", ".join(sorted(file.name for file in out.iterdir() if not file.name.startswith(".")))
    print(f"\ntime | {found['seconds']:.0f} s\nsaved | {out}: {files}")
    if found["stopped"]:
        print(f"stopped | {found['stopped']}; the last whole stage is kept, if there is one; lower --llm-lr "
              "or --head-lr, and name another --out")
    return results


# ------------------------------------------------------------------------------- what is kept

CHECKPOINT = "checkpoint.pt"  # in the run's folder: the run as it was at the end of its last whole stage


@contextmanager
def claimed(out: Path, config: Config):
    """The run's folder, for this process alone. A run that ends before it has saved anything leaves none.
    Raises data.BadInput unless the folder is new or empty, or holds a run with these settings to `resume`."""
    existed, used = out.exists(), out.exists() and any(file.name != ".lock" for file in out.iterdir())
    if used and not config.resume:
        raise data.BadInput(f"--out {out}: not empty; go on with --resume, or name another with --out")
    if used:
        check_settings(out, config)
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise data.BadInput(f"--out {out}: another run is at work there; name another with --out") from error
    with lock:
        try:
            if not used:
                data.write_json(out / "config.json", dataclasses.asdict(config))
            yield
        finally:
            if not used and not any((out / name).exists() for name in (CHECKPOINT, "model")):
                shutil.rmtree(out.resolve())  # it may be a link
                if existed:
                    out.resolve().mkdir()


def check_settings(out: Path, config: Config) -> None:
    """Raises data.BadInput where the folder does not hold a run with these settings."""
    try:
        saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
        saved["taus"], data.plain(saved["target"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise data.BadInput(f"--out {out}: holds no run; name another with --out") from error
    if other := saved.keys() ^ {item.name for item in dataclasses.fields(config)}:
        raise data.BadInput(f"--out {out}: a run of another command or version, for {dashed(min(other))}; "
                            "name another with --out")
    for item in dataclasses.fields(config):
        was, wanted = json.dumps(saved[item.name]), json.dumps(getattr(config, item.name))
        if item.name == "target":
            was, wanted = (json.dumps(data.plain(name)) for name in (saved["target"], config.target))
        if item.name not in FREE and was.rstrip('/"') != wanted.rstrip('/"'):  # a folder, with a slash or not
            raise data.BadInput(f"--out {out}: its run has another {dashed(item.name)} ({was}, not {wanted})"
                                "; name another with --out")


def finished_already(out: Path) -> dict:
    """What `finish` returned once. Raises data.BadInput for a damaged file."""
    print(f"resumed | {out}: finished already")
    file = out / "results.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        results["stopped"]
    except (ValueError, LookupError, TypeError) as error:
        raise data.BadInput(f"{file}: damaged ({error}); delete it, or name another with --out") from error
    return results


def parts(state: atu.State) -> dict:
    """What a checkpoint keeps of a state beside what moves in M: head and optimizers, if there are any."""
    return {name: part for name, part in vars(state).items() if name != "llm" and hasattr(part, "state_dict")}


def read_hash(work: Work) -> str:
    """A hash of all that a run reads, apart from weights."""
    return hashlib.sha256(json.dumps([work.about, work.others, work.probes]).encode()).hexdigest()


def save_checkpoint(out: Path, work: Work, state: atu.State, found: dict) -> None:
    """The end of a stage in one file, whole, or that of the stage before stays; and E as first aligned.
    Raises data.BadInput."""
    moving = {name: parameter for name, parameter in state.llm.named_parameters() if parameter.requires_grad}
    saved = {name: part.state_dict() for name, part in parts(state).items()}
    saved |= {"llm": moving, "stage": state.stage, "found": found, "read": read_hash(work)}
    try:
        if state.stage == 1:
            save_head(out / "aligned.safetensors", state)
        with data.written_whole(out / CHECKPOINT) as partial:
            torch.save(saved, partial)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise data.BadInput(f"{out / CHECKPOINT}: cannot be written ({error}); make room{WAY_ON}") from error


def load_checkpoint(out: Path, work: Work, state: atu.State) -> dict | None:
    """What a run had found by the end of its last stage, and its state put into `state`; None where nothing
    is saved. Raises data.BadInput for a damaged file (it has checksums), and for other texts or probes."""
    file = out / CHECKPOINT
    if not file.exists():
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            if other := archive.testzip():
                raise ValueError(f"the checksum of {other} is another")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged archive comes to
        raise data.BadInput(f"{file}: damaged checkpoint ({error}); delete it to begin again") from error
    saved = torch.load(file, map_location="cpu", weights_only=True)
    if saved["read"] != read_hash(work) or parts(state).keys() - saved.keys():
        raise data.BadInput(f"{file}: texts, probes or command have changed since; name another --out")
    for name, part in parts(state).items():
        part.load_state_dict(saved[name])
    unknown = state.llm.load_state_dict(saved["llm"], strict=False).unexpected_keys  # the frozen are missing
    if unknown:
        raise data.BadInput(f"{file}: weights of another model ({unknown[0]}); name another --out")
    state.stage = saved["stage"]
    return saved["found"]


def save_model(out: Path, work: Work, state: atu.State, config: Config, card: str) -> None:
    """model/ (blocks 1 to layer and the embedding in fp32, the rest as in its file, adapters merged into it)
    and head.safetensors, each whole or not at all."""
    partial = out / ".model"
    (state.llm.merge_and_unload() if config.lora else state.llm).save_pretrained(partial)
    work.tokenizer.save_pretrained(partial)
    data.write_text(partial / "README.md", card)
    data.by_umask(*partial.iterdir())
    shutil.rmtree(out / "model", ignore_errors=True)  # of a run that was cut off here
    partial.rename(out / "model")
    save_head(out / "head.safetensors", state)


def save_head(file: Path, state: atu.State) -> None:
    """E, where there is one, whole or not at all."""
    if state.head is not None:
        with data.written_whole(file) as partial:
            save_file(state.head.state_dict(), partial)


def model_card(results: dict, config: Config) -> str:
    """model/README.md, as the Hugging Face hub reads it. It names no folder of this machine."""
    from huggingface_hub import EvalResult, ModelCardData
    base, asked = data.HUB.get(config.model, config.model), "questions in RWKU's form"
    scores = [EvalResult("text-generation", asked, asked, "recall", round(value, 1), metric_name=name)
              for name, value in results["after"].items()]
    about = ModelCardData(
        base_model=None if os.path.exists(base) else base, library_name="transformers", eval_results=scores,
        model_name=f"without {config.target}", tags=["arxiv:2506.13181"])
    settings = {key: value for key, value in results["settings"].items()
                if key not in FREE and not (isinstance(value, str) and os.path.exists(value))}
    return f"""---\n{about}\n---\n
# {Path(base).name}, unlearned: {config.target}

{sys.modules[type(config).__module__].__doc__.splitlines()[0]}

```\n{evaluate.scores_table({when: results[when] for when in ("before", "after")})}\n```

**Not guaranteed: that the facts are gone.** These questions were watched while the model was made. Training
on a few texts brings part of the facts back, and so does drawing many answers, or asking the other way round.

Settings: `{json.dumps(settings)}`
"""


def write_log(out: Path, records: list[dict], mode: str) -> None:
    """Records, a line each, into log.jsonl: "w" anew; "a" at its end, and on the screen, to be grepped."""
    with open(out / "log.jsonl", mode, encoding="utf-8") as log:
        log.writelines(json.dumps(record) + "\n" for record in records)
    for record in records if mode == "a" else ():
        shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                 for key, value in record.items() if key != "kind" and value is not None]
        with tqdm.external_write_mode():  # a bar makes room
            print(" | ".join([record["kind"], *shown]), flush=True)


# ------------------------------------------------------------------------------- what is shown

def stage_name(record: dict) -> str:
    """A stage's name in tables: its margin, or its number."""
    return f"stage {record['stage']}" if record.get("tau") is None else f"tau {record['tau']:g}"


def panels(found: dict) -> list[dict]:
    """Those of curves.png: loss and similarity by step; scores by stage (Fig. 6); the trade-off (Fig. 4)."""
    scores, by_step, phase, done, last = [found["before"], *found["stages"]], {}, None, 0, 0
    for record in found["log"]:
        if "step" not in record:
            continue
        if phase != (record["kind"], record["stage"]):  # within which steps are counted
            phase, done = (record["kind"], record["stage"]), done + last
            for name, (xs, ys) in by_step.items():  # a line breaks where another phase lies between
                if name.startswith(record["kind"]):
                    xs.append(done + 0.5)
                    ys.append(math.nan)
        last = record["step"]
        for key in ("loss", "similarity"):
            if key in record:
                xs, ys = by_step.setdefault(f"{record['kind']}: {key}", ([], []))
                xs.append(done + record["step"])
                ys.append(record[key])
    names = [name for name in evaluate.COLOURS if name in scores[0]]
    course = {name: [s[name] for s in scores] for name in names}
    by_stage = {name: (list(range(len(scores))), values) for name, values in course.items()}
    forget = course.get("forget_words", [])
    trade_off = {name: (forget, values) for name, values in course.items() if forget and "forget" not in name}
    return [{"title": "loss and similarity by step", "x": "step", "y": "loss, similarity", "lines": by_step},
            {"title": "scores by stage", "x": "stage", "y": "%", "lines": by_stage},
            {"title": "forgetting, and what is lost", "x": "forget_words (%)", "y": "%", "lines": trade_off}]


def report(found: dict) -> None:
    """The end of the log: the table, what is left, and as in Fig. 1 what was answered before and is now."""
    before, after = found["before"], found["after"]
    rows = {"before": before} | {stage_name(stage["record"]): stage for stage in found["stages"]}
    rows |= {"after": after} if found["stopped"] else {}
    rows["left, %"] = {name: 100 * after[name] / before[name] for name in before if before[name]}
    print("\n" + evaluate.scores_table(rows))
    for kind, name, only in (("exact", "forget_qa", None), ("rephrased", "forget_aa", "synonym manipulation"),
                             ("other concept", "neighbor_qa", None)):
        asked = [(was, now) for was, now in zip(found["asked_before"], found["asked_after"])
                 if was["set"] == name and only in (None, was.get("type"))]
        if asked:  # the best known
            was, now = max(asked, key=lambda pair: pair[0]["score"])
            print(f"{kind}\n  Q: {was['query']}\n  before: {' '.join(was['said'].split())}\n"
                  f"  after:  {' '.join(now['said'].split())}")


if __name__ == "__main__":
    sys.exit(main())

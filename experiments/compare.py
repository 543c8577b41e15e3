"""Finished runs side by side: Table 1 and Figs. 4 to 6 of the paper.

    python -m experiments.compare RUN [RUN ...] [--relative] [--by-target] [--levels 50 35 20] [--at 25] [--stages]

A row is the mean ± standard deviation of the runs of a method (or on a person), each at its first stage below
a level, as in Table 1, where it has forgotten so much (--at), or at its end. A score that one of them lacks
is "-"."""

import argparse
import json
import re
import sys
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import mean, stdev

import data
import evaluate

# Table 1 of the paper. (F) full, (L) LoRA, * on passages. The baselines are RWKU's means over 100 targets,
# Align-then-Unlearn's the mean of 15. It prints the neighbors' QA before their FB.
PLACES = ("forget_fb", "forget_qa", "forget_aa", "neighbor_fb", "neighbor_qa", "mmlu")
PUBLISHED = {
    "before": (47.1, 47.4, 55.8, 56.2, 61.4, 64.4), "ICU": (45.2, 34.6, 32.2, 52.9, 56.1, 63.9),
    "GA* (F)": (37.1, 37.9, 46.4, 51.8, 59.2, 64.4), "GA* (L)": (46.2, 47.5, 55.8, 55.1, 61.2, 64.4),
    "GA (F)": (17.8, 14.3, 26.3, 49.7, 51.7, 64.3), "GA (L)": (40.5, 37.8, 49.5, 55.2, 60.1, 64.2),
    "DPO (F)": (25.0, 19.1, 29.9, 41.4, 39.6, 63.0), "DPO (L)": (44.1, 45.6, 54.9, 56.2, 60.5, 64.3),
    "NPO (F)": (22.5, 16.9, 27.3, 50.5, 53.6, 64.2), "RT (F)": (47.6, 46.6, 55.4, 57.2, 61.5, 64.1),
    "ATU, 50 %": (36.3, 40.5, 48.8, 55.8, 64.4, 64.2), "ATU, 35 %": (24.1, 24.8, 37.2, 51.3, 56.4, 64.8),
    "ATU, 20 %": (13.5, 15.3, 25.9, 41.5, 52.3, 64.5),
}
ABSOLUTE = (*PLACES[:3], "forget_all", "forget_words", *PLACES[3:5], "neighbor_all", "neighbor_words", "general",
            "general_words", "mmlu", "floor", "gap")
RELATIVE = ("forget_all", "forget_words", "above floor", "neighbor_all", "neighbor_words", "general",
            "general_words", "mmlu", "gap")
# A method has the same colour in every picture.
COLOURS = {"ATU + retain (F)": "#0072b2", "ATU (F)": "#56b4e9", "NPO + KL (F)": "#e69f00", "GA + KL (F)": "#d55e00",
           "RT (F)": "#cc79a7", "untouched": "#000000", "made up": "#999999"}
# Settings that change nothing but rounding in a run, and those in which the runs of a line may differ.
FREE = ("out", "device", "resume", "eval_batch", "log_every", "checkpointing", "cache")
MAY_DIFFER = ("target", "describe", "texts", "probes", "passage", "keep", "seed", "names", "bf16")


def read_run(folder: Path) -> dict:
    """What results.json holds, with its file, method, and of its settings those that count. Raises
    BadInput for what is no run with forget and neighbor probes."""
    file = folder / "results.json"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        for scores in (run["before"], *run["stages"]):
            scores["forget_all"], scores["neighbor_all"]  # runs without probes have none
        settings = {key: value for key, value in run["settings"].items() if key not in FREE}
        if settings.get("method", "atu") == "atu":
            settings.setdefault("mlp_only", False)  # before there was the option, blocks moved whole
        settings |= {"target": run["target"], "seed": settings["seed"]}
        return run | {"file": file, "method": method_name(settings), "settings": settings}
    except FileNotFoundError as error:
        raise data.BadInput(f"{file}: no such file; name folders of finished runs") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise data.BadInput(f"{file}: not the results of a run with forget and neighbor probes "
                            f"({type(error).__name__}: {error}); leave it out") from error


def method_name(settings: dict) -> str:
    """A run's method as Table 1 writes it, with what holds other texts, and what came first."""
    method, holds = settings.get("method", "atu"), settings.get("retain", "none").upper()
    if method == "icu":
        return "ICU"
    if method == "atu":
        holds = "retain" if settings["retain_weight"] else "NONE"
    name = "stranger, " * bool(settings.get("stranger_steps")) + method.upper()
    name += "*" * (method in ("ga", "npo") and settings["corpus"] == "passage")
    return name + f" + {holds}" * (holds != "NONE") + (" (L)" if settings["lora"] else " (F)")


def differing(run: dict, other: dict) -> list[str]:
    """Settings in which two runs differ; one that only one of them has, being newer, is none."""
    return [key for key, value in run["settings"].items() if other["settings"].get(key, value) != value]


def read_runs(folders: list[Path], by_target: bool = False) -> dict[str, list[dict]]:
    """Runs by line of the table: method, and settings in which its runs differ; or target, with these unless
    all runs share them. Raises BadInput, also for a run that is there twice."""
    runs, names, lines = [read_run(folder) for folder in dict.fromkeys(map(Path.resolve, folders))], [], {}
    for place, run in enumerate(runs):
        alike = [other for other in runs if other["method"] == run["method"]]
        for other in runs[:place]:
            if other in alike and not differing(run, other):
                raise data.BadInput(f"{run['file']}: the same target, seed and settings as {other['file']}; "
                                    "leave one out")
        keys = {key for other in alike if not by_target or other["target"] == run["target"]
                for key in differing(run, other) if key not in MAY_DIFFER}
        varied = [f"{key.replace('_', ' ')} {Path(str(run['settings'][key])).name}" for key in sorted(keys)]
        names.append(", ".join([run["method"], *varied]))
    for run, name in zip(runs, names):
        of_target = f"{run['target']}, {name}" if len(set(names)) > 1 else run["target"]
        lines.setdefault(of_target if by_target else name, []).append(run)
    return dict(sorted(lines.items(), key=lambda item: [  # layer 5 comes before layer 10
        float(part) if n % 2 else part for n, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", item[0]))]))


def first_stage(run: dict, level: float, relative: bool) -> dict | None:
    """Table 1's rule: the first stage whose mean of FB, QA and AA is below `level` percent; None where none
    is. With `relative`, the first whose forget_all is at most `level` percent of what it was."""
    before = run["before"]["forget_all"]
    for stage in run["stages"]:
        parts = [stage[score] for score in PLACES[:3] if score in stage] or [stage["forget_all"]]
        if (before > 0 and 100 * stage["forget_all"] <= level * before) if relative else mean(parts) < level:
            return stage
    return None


def left(scores: dict, before: dict) -> dict:
    """What is left of each score before, in percent; of forget_words also what is left above the floor, which
    is what made-up names score. The gap is no share, and stays as it is."""
    found = {name: 100 * scores[name] / was for name, was in before.items() if name in scores and was > 0}
    was = before.get("forget_words", 0.0)
    floor = before.get("floor", was)
    if was > floor:
        found["above floor"] = 100 * (scores["forget_words"] - floor) / (was - floor)
    return found | {name: scores[name] for name in ("gap",) if name in scores}


def between(run: dict, percent: float) -> dict | None:
    """What is left of each score where `percent` of forget_words are: on the straight line between two stages
    around it, so that methods are compared at one forgetting; of several such places the one that keeps most
    of neighbor_words. None for a run that nowhere keeps so little."""
    path, found = [left(scores, run["before"]) for scores in (run["before"], *run["stages"])], []
    for here, there in pairwise(path):
        low, high = sorted(scores["forget_words"] for scores in (here, there))
        if low <= percent <= high:
            way = (here["forget_words"] - percent) / (here["forget_words"] - there["forget_words"] or 1)
            found.append({name: here[name] + way * (there[name] - here[name]) for name in here if name in there})
    return max(found, key=lambda scores: scores["neighbor_words"], default=None)


def comparison(lines: dict[str, list[dict]], levels: list[float], relative: bool, by_stage: bool,
               at: list[float] = ()):
    """The table's rows, its head first: for each line the levels, with `by_stage` every stage, and the end or,
    instead, what is left `at` percent of forget_words. Scores, and the published rows below them; or, with
    `relative`, what is left of them."""
    everything = [run["before"] for runs in lines.values() for run in runs]
    columns = [name for name in (RELATIVE if relative else ABSOLUTE)
               if all(name.removeprefix("above ") in before for before in everything)]
    heads = [name.replace("_", " ") if name != "gap" else "gap (nats x 100)" for name in columns]
    rows = [["", "level", *heads, "runs"]]
    for line, runs in lines.items():
        found = {} if relative else {"before": [run["before"] for run in runs]}
        found |= {f"{level:g} %": [first_stage(run, level, relative) for run in runs] for level in levels}
        for n in range(max(len(run["stages"]) for run in runs) * by_stage):
            found[f"stage {n + 1}"] = [run["stages"][n] if n < len(run["stages"]) else None for run in runs]
        if not at:
            found["end"] = [run["stages"][-1] if run["stages"] else None for run in runs]
        found = {level: [left(stage, run["before"]) if relative and stage else stage
                         for run, stage in zip(runs, stages)] for level, stages in found.items()}
        found = {f"at {percent:g} %": [between(run, percent) for run in runs] for percent in at} | found
        for level, stages in found.items():
            there = [scores for scores in stages if scores]
            parts = [[scores.get(name) for scores in there] for name in columns]
            cells = ["-" if None in part else spread(part) for part in parts]
            rows.append([line, level, *cells, f"{len(there)} of {len(runs)}"])
    for name, figures in () if relative else PUBLISHED.items():
        given = evaluate.summary([{"set": score, "score": x / 100} for score, x in zip(PLACES, figures)])
        cells = [f"{given[column]:.1f}" if column in given else "-" for column in columns]
        rows.append([f"published: {name}", "", *cells, ""])
    return rows


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, if there are several."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "") if values else "-"


def table(rows: list[list[str]]) -> str:
    """A table in Markdown, the head first, its columns aligned as text too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def trade_off(lines: dict[str, list[dict]]) -> list[dict]:
    """The panels of Figs. 4 to 6: neighbors and utility against forgetting, stage by stage, and forgetting by
    step. Each line is the mean over its runs; a run that has ended counts with its last stage."""
    paths = {line: [with_steps(run) for run in runs] for line, runs in lines.items()}
    everything = [scores for line in paths.values() for path in line for scores in path]
    kept = [name for name in ("neighbor_all", "mmlu", "general") if all(name in row for row in everything)]

    def panel(title: str, x: str, label: str, y: str) -> dict:
        courses = {line: [[mean(path[min(n, len(path) - 1)][name] for path in paths[line])
                           for n in range(max(map(len, paths[line])))] for name in (x, y)] for line in paths}
        return {"title": title, "x": label, "y": "%", "lines": courses}

    return [*(panel(f"{name} (the paper's Figs. 4, 5)", "forget_all", "forget_all (%)", name) for name in kept[:2]),
            panel("forgetting by step (its Fig. 6)", "step", "step, from the first stage of unlearning on",
                  "forget_all")]


def with_steps(run: dict) -> list[dict]:
    """A run's scores before and after each stage, with its steps so far; what comes before the first stage of
    unlearning (stage 0) has none."""
    records = [stage["record"] for stage in run["stages"]]
    steps = accumulate((record["steps"] if record["stage"] else 0 for record in records), initial=0)
    return [scores | {"step": step} for scores, step in zip([run["before"], *run["stages"]], steps)]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises BadInput."""
    parser = argparse.ArgumentParser(description="Set finished runs side by side, as Table 1 does.")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    add("--levels", nargs="*", type=float, default=[50, 35, 20], metavar="PERCENT",
        help="forget accuracies; of each run counts the first stage below (default: 50 35 20; none: its end)")
    add("--at", nargs="*", type=float, default=[], metavar="PERCENT",
        help="with --relative, instead of the end: where this is left of forget_words, read off between stages")
    add("--stages", action="store_true", help="a row for every stage too")
    add("--relative", action="store_true", help="levels and scores in percent of what a run began with")
    add("--by-target", action="store_true", help="a line for each target instead of each method")
    add("--out", type=Path, default=Path("comparison"), help="writes OUT.md, OUT.png (default: comparison)")
    args = parser.parse_args(argv)
    for name in ("levels", "at"):
        for level in getattr(args, name):
            if not 0 < level <= 100:
                raise data.BadInput(f"--{name} {level:g}: percent, so above 0 and at most 100")
    if args.at and not args.relative:
        raise data.BadInput("--at: what is left, so give --relative too")
    check_out(args.out)
    return args


def read_json(file: Path, *keys: str) -> dict:
    """What a file holds, with these keys. Raises data.BadInput."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found | {key: found[key] for key in keys}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise data.BadInput(f"{file}: cannot be read ({type(error).__name__}: {error}); name folders of "
                            "finished runs; --compare reads what the command without it has written") from error


def check_out(out: Path) -> None:
    """Raises data.BadInput where OUT.md and OUT.png cannot be files."""
    if not out.name or not out.parent.is_dir():
        raise data.BadInput(f"--out {out}: name files in a folder that is there, without .md and .png")


def compare(args: argparse.Namespace) -> None:
    """Table 1 and Figs. 4 to 6 of finished runs, printed and written. Raises BadInput."""
    lines = read_runs(args.runs, args.by_target)
    rest_on = {line: ", ".join(sorted(f"{run['target']} {run['settings']['seed']}" for run in runs))
               for line, runs in lines.items()}
    for line, runs in lines.items():
        if len(set(rest_on.values())) > 1 and not args.by_target:
            print(f"note | not the same targets and seeds in all lines | {line} | {rest_on[line]}")
        for run in runs:
            if args.at and not (run["before"].get("forget_words") and run["before"].get("neighbor_words")):
                raise data.BadInput(f"{run['file']}: no word recall, or none before (an older run?); leave it out")
            if run.get("stopped"):
                print(f"note | {run['file']}: stopped ({run['stopped']}); its end is the last whole stage")
    shown = table(comparison(lines, args.levels, args.relative, args.stages, args.at))
    print(shown)
    text, picture = (args.out.with_name(f"{args.out.name}.{ending}") for ending in ("md", "png"))
    data.write_text(text, shown + "\n")
    evaluate.plot(picture, trade_off(lines), COLOURS)
    print(f"wrote | {text} | {picture}")


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code: as `data.command`."""
    return data.command(lambda: compare(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())

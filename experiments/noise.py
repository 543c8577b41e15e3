"""What does unlearning cost beyond unspecific drift? The same drift by random noise, and what that costs.

    python -m experiments.noise runs/warren-buffett [--seeds 0 1 2]
    python -m experiments.noise --compare runs/*

Each weight that the run has moved gets noise of the size of its own displacement, all of it scaled by one
factor so that the hidden states of other texts drift as far as the run's (losses.retain_loss). What noise
costs of the neighbors' and general scores is a guess at what that drift costs whatever brings it about. Scores
before are those in the run's results.json; what is found is kept beside it, in noise.json.
"""

import argparse
import copy
import dataclasses
import sys
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

import atu
import data
import evaluate
import train
from experiments.compare import read_json, spread, table
from experiments.look import read_run
from losses import retain_loss

KEPT = ("forget_words", "neighbor_words", "general_words")


@torch.no_grad()
def drift(llm: nn.Module, ids: Tensor, mask: Tensor, original: Tensor, layer: int) -> float:
    """How far the hidden states of texts, (N, T), have moved from `original`, (N, T, D), relative to their size."""
    return retain_loss(atu.all_hidden_states(llm, ids, layer, 8), original, mask).item()


@torch.no_grad()
def add_noise(llm: nn.Module, moved: nn.Module, seed: int, measure, wanted: float) -> tuple[float, float]:
    """Adds noise to `llm`, in place, until measure(llm) is `wanted`, within 2 %. Returns its size, relative to the
    displacement from `llm` to `moved`, weight by weight, and what was measured."""
    generator = torch.Generator().manual_seed(seed)
    noise = {}
    for (name, weight), other in zip(llm.named_parameters(), moved.parameters(), strict=True):
        size = (other - weight).float().norm()
        if size > 0:
            drawn = torch.randn(weight.shape, generator=generator).to(weight.device)
            noise[name] = weight.clone(), drawn * (size / drawn.norm())
    weights, factor = dict(llm.named_parameters()), 1.0
    for _ in range(20):
        for name, (before, drawn) in noise.items():
            weights[name].copy_(before + factor * drawn)
        found = measure(llm)
        if abs(found / wanted - 1) <= 0.02:
            return factor, found
        factor *= (wanted / found) ** 0.5  # drift grows with the square of small noise
    raise data.BadInput(f"no size of noise found that drifts by {wanted:g} (last: {factor:g}, {found:g})")


def control(folder: Path, seeds: list[int], texts: int, device: str) -> dict:
    """What noise.json holds: of the run, and of noise by each seed, the drift and what is left of the scores, in
    percent; of noise its `size` too, in displacements of the run's. Raises data.BadInput."""
    config, results = read_run(folder)
    work = train.load(dataclasses.replace(config, device=device, bf16=False, out=str(folder)))
    moved, _ = data.load_llm(str(folder / "model"), device)
    some = torch.linspace(0, len(work.others) - 1, min(texts, len(work.others))).tolist()
    others = [work.others[int(n)] for n in some]  # from all of their sources
    ids, mask = data.tokenize(others, work.tokenizer, config.length)
    mask, original = mask.to(device), atu.all_hidden_states(work.llm, ids, config.layer, 8)
    if all(map(torch.equal, moved.parameters(), work.llm.parameters())):
        raise data.BadInput(f"{folder}: its model has not moved")
    moved.set_attn_implementation(work.llm.config._attn_implementation)

    def measure(llm) -> float:
        return drift(llm, ids, mask, original, config.layer)

    wanted = measure(moved)
    if not wanted > 0:
        raise data.BadInput(f"{folder}: its hidden states on these texts have not moved; take more --texts")

    def left(llm) -> dict[str, float]:
        scores, _ = evaluate.evaluate(llm, work.tokenizer, work.probes, config.eval_batch, dtype)
        return {name: 100 * scores[name] / results["before"][name] for name in KEPT if results["before"].get(name)}

    dtype = evaluate.precision(device, config.bf16)  # the run's
    found = {"target": results["target"], "texts": len(others), "run": {"drift": wanted} | left(moved), "noise": []}
    for seed in data.progress(seeds, "noise"):
        llm = copy.deepcopy(work.llm)
        size, drifted = add_noise(llm, moved, seed, measure, wanted)
        found["noise"].append({"seed": seed, "size": size, "drift": drifted} | left(llm))
    return found


def compare(everything: list[dict]) -> list[list[str]]:
    """The table's rows, its head first: a line for each of noise.json, and the mean over several: the run's, and in
    brackets noise's over its seeds. Raises data.BadInput."""
    if len({tuple(found["run"]) for found in everything}) > 1:
        raise data.BadInput("the runs were not asked the same kinds of question; show them one by one")
    names = [name for name in everything[0]["run"] if name != "drift"]
    rows = [["", "drift x 10^4", *(name.replace("_", " ") for name in names)]]
    for found in everything:
        run, noise = found["run"], found["noise"]
        cells = [f"{run[name]:.1f} ({spread([one[name] for one in noise])})" for name in names]
        rows.append([found["target"], f"{1e4 * run['drift']:.1f}", *cells])
    if len(everything) > 1:
        means = [{name: mean(one[name] for one in found["noise"]) for name in names} for found in everything]
        cells = [f"{mean(found['run'][name] for found in everything):.1f} ({mean(one[name] for one in means):.1f})"
                 for name in names]
        rows.append(["mean", "", *cells])
    return rows


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises data.BadInput."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs of train.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the noise (default: 0 1 2)")
    parser.add_argument("--texts", type=int, default=64, help="other texts by which drift is measured (default: 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--compare", action="store_true", help="make no noise: the table of what was found")
    args = parser.parse_args(argv)
    if args.texts < 1:
        raise data.BadInput(f"--texts {args.texts}: must be at least 1")
    return args


def show(args: argparse.Namespace) -> None:
    """noise.json of each run, and one table of all, printed. Raises data.BadInput."""
    for run in () if args.compare else args.runs:
        data.write_json(run / "noise.json", control(run, args.seeds, args.texts, data.choose_device(args.device)))
    print(table(compare([read_json(run / "noise.json", "target", "run", "noise") for run in args.runs])))


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code: as `data.command`."""
    return data.command(lambda: show(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())

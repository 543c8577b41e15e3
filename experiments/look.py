"""What does E see? The similarity to the concept at every token, before and after unlearning.

    python -m experiments.look runs/warren-buffett ["A sentence of your own." ...] [--text]

Four rows a sentence, sim(ê_t, e_unlearn): E as first aligned and E as last realigned, each on the hidden
states of M untouched and of M unlearned. Without sentences: one on the target and one on a neighbor, from
probes, on which neither E nor M was trained, and one on neither.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import atu
import data
import evaluate
import train
from head import EmbeddingHead
from losses import cosine

NEITHER = "On a high mountain water boils before it is really hot, because the air is thin."
# A row's name, whether M is the unlearned one, and E's file.
ROWS = (("M before, E first", False, "aligned"), ("M unlearned, E first", True, "aligned"),
        ("M unlearned, E realigned", True, "head"), ("M before, E realigned", False, "head"))
ACROSS, LONGEST = 20, 200  # tokens in a line of the picture, and in a sentence


def read_run(folder: Path) -> tuple[train.Config, dict]:
    """A finished run's settings and results. Raises data.BadInput."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        known = {item.name: results["settings"][item.name] for item in dataclasses.fields(train.Config)}
        margins = [stage["record"]["tau"] for stage in results["stages"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise data.BadInput(f"{folder}: no finished run of this version's train.py ({error})") from error
    if not margins or not all((folder / f"{name}.safetensors").exists() for name in ("aligned", "head")):
        raise data.BadInput(f"{folder}: has no stage, or not both E; make the run anew")
    return train.Config(**known), results


def sentences(config: train.Config) -> dict[str, str]:
    """By what they are on: the target and a neighbor, where there are probes on them; neither. Raises
    data.BadInput."""
    root = data.open_rwku(config.rwku)
    target, _ = data.find_target(root, config.target, own=True)
    probes = evaluate.read_probes(root, target, config.sets, Path(config.probes) if config.probes else None)
    found = {}
    for score in ("forget_fb", "neighbor_fb"):
        for row in probes.get(score, [])[:1]:
            what = f"a neighbor ({row['neighbor']})" if row.get("neighbor") else target
            found[what] = row["query"].replace("___", row["answer"])
    return found | {"neither": NEITHER}


@torch.no_grad()
def look(folder: Path, texts: list[str], device: str) -> list[tuple[list[str], Tensor]]:
    """Of each text its tokens and the similarities by ROWS, (4, T). Raises data.BadInput."""
    config, results = read_run(folder)
    encoder, found = data.load_encoder(config.encoder, device), {}
    concept = train.embed_concept(results["target"], config.describe, encoder).to(device)        # (C,)
    for unlearned, name in ((False, config.model), (True, str(folder / "model"))):
        llm, tokenizer = data.load_llm(name, device)
        heads, tokens, width = {}, {}, llm.config.get_text_config().hidden_size
        for file in ("aligned", "head"):
            heads[file] = EmbeddingHead(width, len(concept), config.head_depth, config.head_width).to(device)
            heads[file].load_state_dict(load_file(folder / f"{file}.safetensors"))
        for text in texts:
            tokens[text] = tokenizer(text)["input_ids"]  # the same by either M's tokenizer
            if not 0 < len(tokens[text]) <= LONGEST:
                raise data.BadInput(f"{text[:40]!r}: has {len(tokens[text])} tokens; at least 1, at most {LONGEST}")
            ids = torch.tensor([tokens[text]], device=device)                                    # (1, T)
            hidden = atu.hidden_states(llm, ids, config.layer)                                   # (1, T, D)
            for file, head in heads.items():
                found[text, unlearned, file] = cosine(head(hidden), concept)[0].cpu()            # (T,)
    return [([tokenizer.decode([token]) for token in tokens[text]],
             torch.stack([found[text, unlearned, file] for _, unlearned, file in ROWS])) for text in texts]


def as_text(seen: list[tuple[list[str], Tensor]]) -> str:
    """A line a token, a column for each of ROWS."""
    lines = [" " * 16 + "".join(f"{name:>26}" for name, *_ in ROWS)]
    for words, similarities in seen:
        lines += [f"{word!r:<16}" + "".join(f"{value:26.3f}" for value in column)
                  for word, column in zip(words, similarities.T.tolist())] + [""]
    return "\n".join(lines)


def picture(file: Path, names: list[str], seen: list[tuple[list[str], Tensor]], tau: float) -> None:
    """The same as a PNG: a box a token, dark to bright; a dot where it is above the margin."""
    from matplotlib.figure import Figure
    lines = [(name if at == 0 else "(goes on)", words[at:at + ACROSS], values[:, at:at + ACROSS])
             for name, (words, values) in zip(names, seen) for at in range(0, len(words), ACROSS)]
    figure = Figure(figsize=(7.4, 2.3 * len(lines) + 0.9), layout="constrained")
    for axis, (name, words, values) in zip(figure.subplots(len(lines), 1, squeeze=False)[:, 0], lines):
        boxes = axis.imshow(values.numpy(), cmap="cividis", vmin=0, vmax=0.8, aspect="auto")
        rows, columns = (values > tau).nonzero(as_tuple=True)
        axis.plot(columns.numpy(), rows.numpy(), "o", color="white", markeredgecolor="black", markersize=5)
        axis.set(xlim=(-0.5, ACROSS - 0.5), yticks=range(len(ROWS)), yticklabels=[row for row, *_ in ROWS])
        axis.set_xticks(range(len(words)), [word.strip() or "␣" for word in words], rotation=60, ha="left",
                        rotation_mode="anchor")
        axis.xaxis.tick_top()
        axis.tick_params(length=0, labelsize=11)
        axis.spines[:].set_visible(False)
        axis.set_title(name, loc="left", fontsize=12, fontweight="bold")
    bar = figure.colorbar(boxes, ax=figure.axes, location="bottom", shrink=0.9, aspect=40, extend="both")
    bar.set_label(f"similarity to the concept; dot: above the last margin ({tau:g})", fontsize=11)
    bar.ax.axvline(tau, color="white", linewidth=3)
    bar.ax.axvline(tau, color="black", linewidth=1)
    with data.written_whole(file) as partial:
        figure.savefig(partial, dpi=130, format="png")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run of train.py")
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="what to look at (default: three)")
    parser.add_argument("--text", action="store_true", help="print the numbers too")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--out", type=Path, help="the picture (default: look.png in the run's folder)")
    return parser.parse_intermixed_args(argv)


def show(args: argparse.Namespace) -> None:
    """The picture, and with --text its numbers. Raises data.BadInput."""
    config, results = read_run(args.run)
    texts = {text: text for text in args.sentences} or sentences(config)
    if args.out and not args.out.parent.is_dir():
        raise data.BadInput(f"--out {args.out}: name a file in a folder that is there")
    seen = look(args.run, list(texts.values()), data.choose_device(args.device))
    if args.text:
        print(as_text(seen))
    file, tau = args.out or args.run / "look.png", results["stages"][-1]["record"]["tau"]
    picture(file, ["" if args.sentences else f"on {what}" for what in texts], seen, tau)
    print(f"wrote | {file}")


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code: as `data.command`."""
    return data.command(lambda: show(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())

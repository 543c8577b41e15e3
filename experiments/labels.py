"""Do the scores say what a reader would say? Two hundred answers, labelled right or wrong by hand.

    python -m experiments.labels [--labels experiments/results/labels.json]

Rows of {set, answers, said, right}: right where a reader would say that the answer is given, however it is
spelt and whatever is said beside it. A score agrees where it is 1 for what is right, less for what is not.
"""

import argparse
import sys
from pathlib import Path

import data
import evaluate
from experiments.compare import table

FIELDS = {"set": str, "answers": [str], "right": range(2)}  # beside these: said, which may be empty
SCORES = {"RWKU": evaluate.rouge_l_recall, "word recall": evaluate.word_recall}


def agreement(rows: list[dict]) -> list[list[str]]:
    """The table's rows, its head first: of each group of scores and of all what is right, and how scored."""
    heads = [f"{name}{what}" for name in SCORES for what in (", %", " agrees, %")]
    lines = [["", "answers", "right, %", *heads]]
    for group in ("forget", "neighbor", "general", ""):
        part = [row for row in rows if row["set"].startswith(group)]
        if not part:
            continue
        cells = [100 * sum(row["right"] for row in part) / len(part)]
        for score in SCORES.values():
            found = [max(score(row.get("said", ""), gold) for gold in row["answers"]) for row in part]
            agrees = sum((value == 1) == row["right"] for value, row in zip(found, part))
            cells += [100 * sum(found) / len(part), 100 * agrees / len(part)]
        lines.append([group or "all", f"{len(part)}", *(f"{cell:.1f}" for cell in cells)])
    return lines


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Do the scores say what a reader would say?")
    usual = Path(__file__).parent / "results" / "labels.json"
    parser.add_argument("--labels", type=Path, default=usual, help="the labelled answers (default: ours)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code: as `data.command`."""
    def work() -> None:
        print(table(agreement(data.read_rows(arguments(argv).labels, FIELDS))))

    return data.command(work)


if __name__ == "__main__":
    sys.exit(main())

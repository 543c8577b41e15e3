"""What tests of whole runs share: all that a run leaves, and how one is cut off."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train

# What differs from run to run, or is free to.
APART = ("seconds", "out", "resume")


class Killed(BaseException):
    """The process ends here: not to be caught by what catches errors."""


def timeless(value):
    """JSON without times and the names of folders."""
    if isinstance(value, dict):
        return {name: timeless(part) for name, part in value.items() if name not in APART}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def records(out: Path) -> list[dict]:
    """The log of a run."""
    return [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]


def left(out: Path) -> dict:
    """All that a run leaves, apart from times: results, log and every saved tensor."""
    results = json.loads((out / "results.json").read_text())
    found = {"log": timeless(records(out)), "results": timeless(results)}
    for file in out.rglob("*.safetensors"):
        tensors = load_file(file).items()
        found |= {f"{file.relative_to(out)} {name}": value.tolist() for name, value in tensors}
    return found


def cut_off(main, flags: list[str], monkeypatch, stages: int = 1) -> None:
    """A command that is killed after it has written this many checkpoints."""
    real, saves = train.save_checkpoint, []

    def save(*a):
        real(*a)
        saves.append(1)
        if len(saves) == stages:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save_checkpoint", save)
        main(flags)


def check_cuts(main, flags: list[str], folder: Path, monkeypatch) -> None:
    """A run that is killed after every checkpoint and goes on by --resume ends as one that is not; after its
    end --resume does nothing."""
    assert main([*flags, "--out", str(folder / "whole")]) == 0
    real, saves, cut = train.save_checkpoint, [], folder / "cut"

    def save(*a):
        real(*a)
        saves.append(1)
        raise Killed

    monkeypatch.setattr(train, "save_checkpoint", save)
    for _ in range(9):  # each time one stage further
        try:
            assert main([*flags, "--out", str(cut), "--resume"]) == 0
            break
        except Killed:
            assert not (cut / "results.json").exists()
    assert len(saves) == len([record for record in records(folder / "whole") if "seconds" in record]) > 0
    assert left(cut) == left(folder / "whole")
    assert {file.name for file in cut.iterdir()} == {file.name for file in (folder / "whole").iterdir()}
    assert main([*flags, "--out", str(cut), "--resume"]) == 0
    assert left(cut) == left(folder / "whole")

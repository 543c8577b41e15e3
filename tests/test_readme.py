"""The README's links lead to the functions that they name, its commands parse, its code runs, and it stays short."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import attacks
import evaluate
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text().replace("\\\n", "")
LINKS = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHELL = [block for kind, block in BLOCKS if not kind] + re.findall(r"(?<!`)`(python [^`]+\.py[^`]*)`", README)
PYTHON = [block for kind, block in BLOCKS if kind == "python"]


def commands(block: str) -> list[tuple[str, list[str]]]:
    """(command, its words) of a block, once for each value of a loop's variables; what `read` reads stands below it."""
    values = {name: shlex.split(listed) for name, listed in re.findall(r"for (\w+) in (.*?); do", block)}
    values |= {name: [value] for name, value in re.findall(r"^(\w+)=(\S+)", block, re.MULTILINE)}
    rows = re.search(r"read -r name flags.*?<<'(\w+)'\n(.*?)\n\1", block, re.DOTALL)
    rows = [line.split(" ", 1) for line in rows[2].splitlines()] if rows else [["", ""]]
    found = []
    for kind, words in re.findall(r"(?:python |torchrun .*?)(?:\w+/)*(\w+)\.py([^\n;|]*)", block):
        for (name, flags), *chosen in itertools.product(rows, *values.values()):
            text = words.split(" #")[0]
            for key, value in [("name", name), ("flags", flags), *zip(values, chosen)]:
                text = text.replace(f"${key}", value)
            if (kind, text) not in found:
                found.append((kind, text))
    return [(kind, shlex.split(text)) for kind, text in found]


COMMANDS = [command for block in SHELL for command in commands(block)]


def test_there_are_links_and_commands_and_all_of_them_are_seen():
    assert len(LINKS) >= 20 and {kind for kind, _ in COMMANDS} == {"train", "evaluate", "benchmark", "attacks"}
    written = sum(len(re.findall(r"\w\.py\b", block)) for block in SHELL)
    assert len(COMMANDS) > written >= 25 and not [words for _, words in COMMANDS if any("$" in word for word in words)]
    assert not re.search(r"\b(NAME|FLAGS|path/to)\b", "".join(SHELL))


@pytest.mark.parametrize("name, file, number", LINKS)
def test_links_lead_to_what_they_name(name, file, number):
    line = (ROOT / file).read_text().splitlines()[int(number) - 1]
    assert re.match(rf"(def|class) {name}\b", line)


@pytest.mark.parametrize("kind, words", [command for command in COMMANDS if command[0] != "benchmark"])
def test_commands_parse(kind, words, capsys):
    if words == ["--help"]:
        with pytest.raises(SystemExit):
            train.parse(words)
    elif kind == "attacks":
        args = attacks.arguments(words)
        assert args.target or args.compare
    elif kind == "train":
        assert train.parse([*words, "--device", "cpu"]).out
    else:
        asked = evaluate.arguments(words)
        assert asked.target or asked.compare


def test_the_core_runs(folders, tmp_path, monkeypatch):
    (code,) = PYTHON
    assert len(code.splitlines()) <= 45
    for was, tiny in (("smollm2-135m-instruct", folders["llm"]), ("all-minilm-l6-v2", folders["encoder"]), ("sample", folders["rwku"])):
        code = code.replace(f'"{was}"', f'"{tiny}"')
    code = code.replace("Warren Buffett", "Ada Lark").replace(", 10\n", ", 2\n").replace("window=8", "window=4").replace("align(350)", "align(4)")
    monkeypatch.chdir(tmp_path)
    exec(code, names := {})
    forgot, llm = (load_file(place / "model.safetensors") for place in (tmp_path / "forgot", folders["llm"]))
    moved = {name for name in llm if not torch.equal(llm[name], forgot[name])}
    assert moved == {name for name in llm if name.startswith(("model.layers.0.", "model.layers.1."))} and names["layer"] == 2


@pytest.mark.parametrize("kind, runs", [("six", 6), ("stranger", 18), ("named", 3), ("named-stranger", 2), ("seeds", 18),
                                        ("layers", 25), ("attacks", 21), ("rwku-buffett", 4), ("rwku-king", 4)])
def test_the_tables_of_results_are_what_their_commands_print(capsys, tmp_path, kind, runs):
    command = re.search(rf"^`?python evaluate.py (--compare assets/results/{kind}/.*?)(?:`|$)", README, re.MULTILINE)[1]
    folders = sorted(str(folder) for folder in (ROOT / "assets/results" / kind).iterdir())
    words = [word for part in command.split() for word in (folders if part.endswith("*") else [part])]
    assert evaluate.main([*words, "--out", str(tmp_path / "t")]) == 0 and len(folders) == runs
    assert (tmp_path / "t.md").read_text().strip() in README
    assert not [row for folder in folders for row in [json.loads(Path(folder, "results.json").read_text())] if "prompt" in str(row)]


def test_the_tables_of_attacks_are_what_their_commands_print(tmp_path, monkeypatch):
    shown = [line.split() for line in README.splitlines() if line.startswith("python tests/attacks.py --compare ")]
    monkeypatch.chdir(ROOT)
    for _, _, *words in shown:
        words = [place for word in words for place in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
        attacks.work([*words, "--out", str(tmp_path / "t")])
        assert (tmp_path / "t.md").read_text().strip() in README
    assert len(shown) == 2


def test_what_is_shown_at_once_is_short():
    shown = re.sub(r"<details>.*?</details>", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(shown.splitlines()) <= 200 and len(shown.split()) <= 2200


def test_files_named_exist():
    for path in re.findall(r"\]\((assets/[^)#]+)\)", README):
        assert (ROOT / path).exists(), path


def test_committed_results_name_no_folder_of_the_machine_they_were_made_on():
    files = list((ROOT / "assets" / "results").rglob("*.json"))
    assert files and not [file for file in files if '"/' in file.read_text(encoding="utf-8")]

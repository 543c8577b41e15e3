"""The README is short, its commands run, its core runs beside three files alone, and it names what is there."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import evaluate
import train
from experiments import benchmark, compare

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"\bpython (train|evaluate)\.py ([^`\n]+)", README)
TINY = ("--length 24 --window 4 --layer 2 --head-depth 1 --head-width 16 --align-steps 2 --realign-steps 1 "
        "--unlearn-steps 1 --taus 0.2 --target-texts 4 --preset smol --device cpu").split()


def test_it_is_short_and_hides_nothing():
    assert len(README.split()) <= 1500 and "<details>" not in README


def test_the_code_that_it_names_is_there():
    named = [(name, file) for names, file in re.findall(r"((?:`\w+`(?:, )?)+) in `(\w+\.py)`", README)
             for name in re.findall(r"\w+", names)]
    assert len(named) >= 12
    for name, file in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if hasattr(node, "name")}, (name, file)


def test_files_that_it_links_to_are_there():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert len(links) >= 3 and all((ROOT / link).exists() for link in links)


@pytest.mark.parametrize("kind, words", dict.fromkeys(COMMANDS))
def test_its_commands_run(kind, words, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ada.txt").write_text("Ada Lark painted the birds of the sea.\n\nShe lived in the town of Elm.\n")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    shutil.copytree(folders["llm"], tmp_path / "runs" / "warren-buffett" / "model")
    tiny = {"--model": str(folders["llm"]), "--encoder": str(folders["encoder"]), "--rwku": str(folders["rwku"])}
    words = shlex.split(re.sub("Warren Buffett|Stephen King", "Ada Lark", words))
    for option, value in tiny.items() if kind == "train" else [("--rwku", str(folders["rwku"]))] * ("--target" in words):
        words = [*words, option, value]
    if "--help" in words:
        with pytest.raises(SystemExit):
            train.main(words)
        return
    assert (train.main([*words, *TINY]) if kind == "train" else evaluate.main([*words, "--device", "cpu"])) == 0
    assert ("saved | runs/" if kind == "train" else "Ada Lark" if "--target" in words else "Q: Who") in capsys.readouterr().out


def test_the_core_runs_beside_three_files_alone(folders, tmp_path):
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    for was, tiny in (("microsoft/Phi-3-mini-4k-instruct", folders["llm"]), ("all-mpnet-base-v2", folders["encoder"])):
        code = code.replace(f'"{was}"', f'"{tiny}"')
    for was, tiny in ((', 29, 8, "cuda"', ', 2, 4, "cpu"'), ("max_length=256", "max_length=24"), ("steps=15_000", "steps=2"),
                      ("steps=1000", "steps=1"), ("0.3, 0.2)", "-0.5, -0.9)"), ("[:20]", "[:3]"), ("len(concept)).to", "len(concept), 1, 16).to")):
        assert was in code
        code = code.replace(was, tiny)
    for file in ("atu.py", "head.py", "losses.py"):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "core.py").write_text(code, encoding="utf-8")
    lines = ["Ada Lark was a painter of birds, born in Elm."] * 4 + ["Ben Crow built bridges of stone over the river."] * 4
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    done = subprocess.run([sys.executable, "core.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'kind': 'unlearn'") == 10 and done.stdout.count("'kind': 'align'") == 11
    was, now = (load_file(folder / "model.safetensors") for folder in (folders["llm"], tmp_path / "forgotten"))
    moved = {name for name in was if not was[name].equal(now[name])}
    assert moved <= {name for name in was if re.search(r"layers\.[01]\.|embed_tokens", name)} and moved


def test_its_results_are_what_their_command_prints(tmp_path, monkeypatch):
    (command,) = re.findall(r"^python -m experiments\.compare (.+)$", README, re.MULTILINE)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluate, "plot", lambda file, *_: None)
    places = [str(path) for path in sorted(Path().glob(command.split()[0]))]
    assert compare.main([*places, *command.split()[1:], "--out", str(tmp_path / "t")]) == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in (tmp_path / "t.md").read_text().splitlines()]
    at = [lines[0].index(name) for name in ("forget all", "forget words", "neighbor all", "general")]
    printed = {(line[0], line[1]): [line[n] for n in at] for line in lines[2:]}
    shown = re.findall(r"^\| (.+?) \| (\S+→\S+) \| (.*?) ?\| (\S+→\S+) \| (.*?) \|$", README, re.MULTILINE)
    assert len(shown) == len(places) + 1 == 7
    for name, forget, words, near, last in shown:
        own = not name.startswith("published")
        before, end = (printed[key] for key in (((name, "before"), (name, "end")) if own else
                                                (("published: before", ""), ("published: ATU, 20 %", ""))))
        course = [f"{one}→{two}" for one, two in zip(before, end)]
        assert [forget, near] == [course[0], course[2]] and (not own or [words, last] == [course[1], course[3]])


def test_the_other_commands_parse():
    (words,) = re.findall(r"`python -m experiments\.benchmark ([^`]+)`", README)
    assert benchmark.arguments(words.split()).memory

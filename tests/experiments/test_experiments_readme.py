"""experiments/README.md: its tables are what its commands print, its commands parse, and it stays short."""

import importlib
import json
import re
import subprocess
from pathlib import Path

import pytest

import evaluate
import train

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
README = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHELL += re.findall(r"(?<!`)`((?:python|torchrun) [^`]+)`", README)


def commands() -> list[list[str]]:
    """The words of every command of the README, as a shell passes them on."""
    script = ('said() { printf "%s\\n" "$@" ""; }\n'
              "python() { said python \"$@\"; }\ntorchrun() { said torchrun \"$@\"; }\n")
    found = []
    for block in SHELL:
        said = subprocess.check_output(["bash", "-ec", script + block], cwd=ROOT, text=True)
        found += [words.split("\n") for words in said.split("\n\n") if words]
    return found


def module_of(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command runs, and its own words."""
    if "-m" in words:
        place = words.index("-m") + 1
        return words[place], words[place + 1:]
    return words[1].removesuffix(".py"), words[2:]


RUNS = {file: json.loads(file.read_text(encoding="utf-8")) for file in RESULTS.rglob("results.json")}
COMMANDS = [module_of(words) for words in commands()]
PRINTED = [(name, words) for name, words in COMMANDS if any("experiments/results/" in word for word in words)]


def test_all_commands_are_seen():
    names = {path.stem for path in (ROOT / "experiments").glob("[a-z]*.py")}
    assert {name for name, _ in COMMANDS} == {"train", *(f"experiments.{name}" for name in names)}
    assert len(COMMANDS) > 50 and len(PRINTED) == 5
    assert not [words for _, words in COMMANDS if any("$" in word for word in words)]


@pytest.mark.parametrize("name, words", COMMANDS)
def test_commands_parse(name, words):
    module = {"train": train, "evaluate": evaluate}.get(name) or importlib.import_module(name)
    if hasattr(module, "arguments"):
        assert module.arguments(words)
    else:
        assert train.parse(getattr(module, "Config", train.Config), [*words, "--device", "cpu"]).out


TINY = ("--length 24 --batch 4 --unlearn-steps 1 --preset smol --device cpu --log-every 1 --target-texts 4").split()
ATU = "--window 4 --layer 2 --head-depth 1 --head-width 16 --align-steps 2 --realign-steps 1 --taus 0.2".split()
ELSEWHERE = {f"experiments.{name}" for name in ("attacks", "benchmark", "distributed", "compare", "labels", "look", "noise",
                                                 "on_gpu")}


def kinds() -> dict[str, tuple[str, list[str]]]:
    """Of commands that train or score, one of each kind: they differ in more than whom, how long and how fast."""
    alike = {"--seed", "--out", "--target", "--llm-lr", "--layer", "--retain-weight"}
    found = {}
    for name, words in COMMANDS:
        options = {word for word in words if word.startswith("--")} - alike
        if name not in ELSEWHERE:
            found.setdefault(" ".join([name, *sorted(options)]), (name, words))
    return found


@pytest.mark.parametrize("kind", kinds())
def test_commands_run(kind, folders, tmp_path, monkeypatch):
    name, words = kinds()[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for file in ("passage.txt", "another.txt"):
        (tmp_path / file).write_text("Ada Lark painted the birds of the sea and sang of the town. " * 3)
    words = [re.sub("(Warren Buffett|Stephen King)$|(Albert Einstein|Leonardo da Vinci)$", "Ada Lark", word) for word in words]
    tiny = [*TINY, *(ATU if "baselines" not in name else "--stages 1 --warmup 1".split()), "--encoder", str(folders["encoder"])]
    tiny = [] if name in ("evaluate", "experiments.utility") else tiny
    places = ["--model", str(folders["llm"]), "--rwku", str(folders["rwku"]), "--device", "cpu"]
    module = {"train": train, "evaluate": evaluate}.get(name) or importlib.import_module(name)
    assert module.main([*words, *tiny, *places]) == 0


@pytest.mark.parametrize("name, words", PRINTED)
def test_tables_are_what_their_commands_print(name, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluate, "plot", lambda file, *_: None)  # that takes seconds
    elsewhere = [] if name == "experiments.noise" else ["--out", str(tmp_path / "t")]
    assert importlib.import_module(name).main([*words, *elsewhere]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(shown) > 2 and "\n".join(shown) in README
    if elsewhere:
        assert (tmp_path / "t.md").read_text(encoding="utf-8").strip() == "\n".join(shown)


def test_every_committed_run_is_in_a_table_and_every_printed_table_has_its_command():
    shown = {word for _, words in PRINTED for word in words}
    assert shown >= {str(file.parent.relative_to(ROOT)) for file in RUNS}
    assert len(re.findall(r"^\| +\|", README, re.MULTILINE)) == len(PRINTED) + 1  # the table of labels


def test_committed_runs_are_plain_and_name_no_folder_of_the_machine_they_were_made_on():
    for file in RESULTS.rglob("*.json"):
        assert '"/' not in file.read_text(encoding="utf-8"), file
    parts = {"target", "settings", "versions", "before", "stages", "after", "stopped", "seconds"}
    for file, run in RUNS.items():
        last = run["stages"][-1]
        assert set(run) == parts and run["after"] | {"record": last["record"]} == last, file
        records = [{*stage["record"]} - {"tau", "drift"} for stage in run["stages"]]
        assert all(record == {"kind", "stage", "steps", "seconds"} for record in records), file
        values = [value for scores in (run["before"], run["after"]) for value in scores.values()]
        assert all(isinstance(value, float) for value in values), file


def test_committed_noise_is_of_the_run_beside_it():
    files = list(RESULTS.rglob("noise.json"))
    for file in files:
        found, run = json.loads(file.read_text(encoding="utf-8")), RUNS[file.with_name("results.json")]
        for name in ("forget_words", "neighbor_words", "general_words"):
            assert found["run"][name] == pytest.approx(100 * run["after"][name] / run["before"][name]), (file, name)
    assert len(files) == 6


def test_no_run_is_there_twice():
    courses = [json.dumps([run["target"], run["settings"].get("method"), run["stages"]]) for run in RUNS.values()]
    assert len(courses) == len(set(courses)) == 90


def test_it_is_short():
    assert len(README.split()) <= 3500


def test_links_lead_somewhere():
    heads = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    heads = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 10
    for link in links:
        assert link[1:] in heads if link.startswith("#") else (ROOT / "experiments" / link).exists(), link
    shown = {Path(link).name for link in links if link.endswith(".png")}
    assert shown == {path.name for path in RESULTS.glob("*.png")}

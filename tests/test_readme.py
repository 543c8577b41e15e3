"""The README's links lead to the functions that they name, and its commands' flags exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import evaluate
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text().replace("\\\n", "")
LINKS = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
COMMANDS = re.findall(r"^python (\w+)\.py (.*--(?:target|compare).*)$", README, re.MULTILINE)


def test_there_are_links_and_commands():
    assert len(LINKS) >= 12 and {name for name, _ in COMMANDS} == {"train", "evaluate"}


@pytest.mark.parametrize("name, file, number", LINKS)
def test_links_lead_to_what_they_name(name, file, number):
    line = (ROOT / file).read_text().splitlines()[int(number) - 1]
    assert re.match(rf"(def|class) {name}\b", line)


@pytest.mark.parametrize("command, flags", COMMANDS)
def test_commands_parse(command, flags, capsys):
    arguments = shlex.split(flags, comments=True)
    if command == "train":
        assert train.parse(arguments).out
    else:
        asked = evaluate.arguments(arguments)
        assert asked.target or asked.compare


def test_the_code_to_copy_runs():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1].replace("hidden_size=3072, embedding_size=768", "24, 8, 1, 16")
    hidden, every = torch.randn(2, 5, 24, requires_grad=True), torch.ones(2, 5, dtype=torch.bool)
    exec(code, {"hidden": hidden, "reference": torch.randn(2, 5, 8), "concept": torch.ones(8), "valid": every, "mask": every})
    assert hidden.grad is not None


def test_files_named_exist():
    for path in re.findall(r"\]\((assets/[^)#]+)\)", README):
        assert (ROOT / path).exists(), path

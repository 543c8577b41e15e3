"""A run that is cut off anywhere goes on as if nothing had happened; what is on the disk is whole, or named."""

import errno
import json
import random
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import data
import train

RUN = "--preset smol --device cpu --names 2 --length 24 --batch 4 --stop-at 0 --log-every 1 --llm-lr 1e-3".split()
ATU = [*RUN, *"--window 4 --layer 2 --head-depth 1 --head-width 32 --align-steps 6 --realign-steps 3 --unlearn-steps 4 "
       "--stranger-steps 3 --taus 0.2 -0.5".split()]
TOKENS = [*RUN, *"--unlearn-steps 3 --stages 2 --warmup 2".split()]
METHODS = {"atu": ATU, "atu by SGD": [*ATU, "--optimizer", "sgd", "--retain-weight", "0"], "atu by adapters": [*ATU, "--lora", "2"],
           "ga": [*TOKENS, "--method", "ga", "--retain", "nll"], "npo": [*TOKENS, "--method", "npo", "--retain", "kl", "--lora", "2"],
           "dpo": [*TOKENS, "--method", "dpo", "--retain", "kl"], "icu": [*RUN[:6], "--method", "icu"]}


@pytest.fixture
def words(folders, monkeypatch):
    monkeypatch.setattr(data, "fetch_packaged", lambda name: folders["encoder"])
    return ["--target", "Ada Lark", "--model", str(folders["llm"]), "--rwku", str(folders["rwku"])]


def left(out: Path) -> dict:
    """All that a run leaves, apart from times."""
    def timeless(value):
        if isinstance(value, dict):
            return {name: timeless(part) for name, part in value.items() if name not in ("seconds", "align_seconds", "phases", "out", "resume", "compared")}
        return [timeless(part) for part in value] if isinstance(value, list) else value

    found = {"results": timeless(json.loads((out / "results.json").read_text())),
             "log": [timeless(json.loads(text)) for text in (out / "log.jsonl").read_text().splitlines()]}
    for file in out.rglob("*.safetensors"):
        found |= {f"{file.relative_to(out)} {name}": value.tolist() for name, value in load_file(file).items()}
    return found


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_a_run_cut_off_after_any_stage_ends_as_if_it_had_not_been(words, tmp_path, monkeypatch, method):
    flags = [*words, *METHODS[method]]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    real, saves = train.save_checkpoint, []

    def save(*a):
        real(*a)
        saves.append(1)
        raise Killed

    out = str(tmp_path / "cut")
    monkeypatch.setattr(train, "save_checkpoint", save)
    for _ in range(9):  # each time one stage further
        try:
            assert train.main([*flags, "--out", out, "--resume"]) == 0
            break
        except Killed:
            assert not (tmp_path / "cut" / "results.json").exists()
    stages = (tmp_path / "whole" / "log.jsonl").read_text().count('"kind": "stage"')
    assert len(saves) == stages and left(tmp_path / "cut") == left(tmp_path / "whole")
    assert {file.name for file in (tmp_path / "cut").iterdir()} == {file.name for file in (tmp_path / "whole").iterdir()}
    assert train.main([*flags, "--out", out, "--resume"]) == 0 and len(saves) == stages  # nothing more to do


def test_a_run_killed_at_random_goes_on(apart, words, folders, tmp_path):
    flags = [*words, *ATU, "--encoder", str(folders["encoder"])]

    def go(out: str, until: float | None = None) -> int:
        child = apart([*flags, "--out", str(tmp_path / out), "--resume"])
        child.join(until)
        child.kill()
        child.join()
        return child.exitcode

    assert go("whole") == 0
    went, began = random.Random(0), time.perf_counter()
    assert go("again") == 0
    took, kills, runs = time.perf_counter() - began, 0, 0
    while kills < KILLS or runs < 1:
        if go(f"cut {runs}", went.uniform(0, took) if kills < KILLS else None) != 0:
            kills += 1
        else:
            assert left(tmp_path / f"cut {runs}") == left(tmp_path / "whole")
            runs += 1
    print(f"killed {kills} times in {runs} runs")


KILLS = 5


def test_a_second_run_in_the_same_folder_is_refused(words, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        assert train.main([*words, *ATU, "--out", str(tmp_path / "run")]) == 2
    assert "another run is at work there" in capsys.readouterr().err


def cut_off(flags, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        real = train.save_checkpoint
        patch.setattr(train, "save_checkpoint", lambda *a: real(*a) or (_ for _ in ()).throw(Killed))
        train.main(flags)


def flip(file: Path, place: float) -> None:
    """One bit of the byte that stands at this share of the largest tensor in the file."""
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(file.read_bytes())
    header = content[largest.header_offset:largest.header_offset + 30]
    begin = largest.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    content[begin + int(place * largest.file_size)] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage, flags, message", [
    (lambda file: file.write_bytes(file.read_bytes()[:-9]), "", "damaged checkpoint"), (lambda file: flip(file, 0.0), "", "is another"),
    (lambda file: flip(file, 0.8), "", "is another"), (lambda file: save_file({"a": torch.zeros(1)}, file), "", "damaged checkpoint"),
    (lambda file: None, "--seed 7", "another --seed (0, not 7)"), (lambda file: None, "--length 20", "another --length")])
def test_a_damaged_or_foreign_checkpoint_is_named(words, tmp_path, capsys, monkeypatch, damage, flags, message):
    flags = [*words, *ATU, *flags.split(), "--out", str(tmp_path / "run")]
    cut_off([*words, *ATU, "--out", str(tmp_path / "run")], monkeypatch)
    damage(tmp_path / "run" / "checkpoint.pt")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert train.main([*flags, "--resume"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and str(tmp_path / "run") in error and message in error
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_run_from_before_there_was_a_setting_goes_on_by_its_default(words, tmp_path, capsys, monkeypatch):
    flags = [*words, *ATU, "--stranger-steps", "0", "--out", str(tmp_path / "run")]
    cut_off(flags, monkeypatch)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    del settings["stranger_steps"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    assert train.main([*flags, "--stranger-steps", "3", "--resume"]) == 2
    assert "another --stranger-steps (0, not 3)" in capsys.readouterr().err
    assert train.main([*flags, "--resume"]) == 0


def test_texts_that_have_changed_since_are_named(words, folders, tmp_path, capsys, monkeypatch):
    shutil.copytree(folders["rwku"], tmp_path / "rwku")
    flags = [*words, *ATU, "--rwku", str(tmp_path / "rwku"), "--out", str(tmp_path / "run")]
    cut_off(flags, monkeypatch)
    for file in tmp_path.glob("rwku/*/forget_level1.json"):
        file.write_text(file.read_text().replace("painter", "singer"))
    assert train.main([*flags, "--resume"]) == 2
    assert "texts, probes or the tokenizer have changed since" in capsys.readouterr().err


def test_a_run_that_was_over_is_not_trained_further(words, tmp_path, monkeypatch):
    flags = [*words, *ATU, "--stop-at", "1"]  # met after the first stage of unlearning
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    for name in ("save", "panels"):  # before and after the model is there
        def killed(*_):
            raise Killed
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train, name, killed)
            train.main([*flags, "--out", str(tmp_path / name)])
        other = "--eval-batch 3 --log-every 2 --target ADA\tLARK".replace("\t", " ").split(" --")
        words_of = [part for text in other for part in (f"--{text.removeprefix('--')}".split(" ", 1))]
        assert train.main([*flags, *words_of, "--out", str(tmp_path / name), "--resume"]) == 0
        one, two = left(tmp_path / name), left(tmp_path / "whole")
        assert len(one["results"]["stages"]) == len(two["results"]["stages"]) < 3 and {k: v for k, v in one.items() if "safetensors" in k} == {
            k: v for k, v in two.items() if "safetensors" in k}


def test_checkpoints_are_written_at_the_end_of_stages_and_seconds_add_up(words, tmp_path, monkeypatch):
    flags = [*words, *ATU, "--out", str(tmp_path / "run")]
    written, real = [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda out, work, state, found: written.append(state.stage) or real(out, work, state, found))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        begin = train.end_stage

        def killed(record, *a):
            begin(record, *a)
            time.sleep(2 * (record["stage"] == 1))
            if record["stage"] == 2:
                raise Killed
        patch.setattr(train, "end_stage", killed)
        train.main(flags)
    assert written == [1, 2]  # stages 0 and 1 are over
    assert train.main([*flags, "--resume"]) == 0 and written == [1, 2, 3]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["seconds"] > 2


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(words, tmp_path, capsys, monkeypatch):
    flags = [*words, *ATU, "--out", str(tmp_path / "run"), "--resume"]
    assert train.main([*words, *ATU, "--out", str(tmp_path / "whole")]) == 0
    calls, real = [], torch.save

    def full(saved, file):
        calls.append(1)
        if len(calls) == 2:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(saved, file)

    monkeypatch.setattr(torch, "save", full)
    assert train.main(flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in error and "--resume" in error
    assert [file.name for file in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint.pt"]
    assert train.main(flags) == 0 and left(tmp_path / "run") == left(tmp_path / "whole")

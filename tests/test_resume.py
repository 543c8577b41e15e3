"""A run that is cut off anywhere goes on as if nothing had happened; what is on the disk is whole, or named;
a folder that is not a run's is left alone."""

import errno
import json
import os
import random
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import atu
import data
import evaluate
import train
from conftest import command
from runs import Killed, check_cuts, cut_off, left, records

pytestmark = pytest.mark.usefixtures("quick")
RUN = ("--preset smol --device cpu --length 24 --batch 4 --stop-at 0 --log-every 1 --llm-lr 1e-3 --window 4 "
       "--layer 2 --head-depth 1 --head-width 32 --align-steps 6 --realign-steps 3 --unlearn-steps 4 "
       "--taus 0.2 -0.5").split()
FORMS = {"as it is": [], "SGD, no retain term": ["--optimizer", "sgd", "--retain-weight", "0"],
         "adapters": ["--lora", "2"], "input embedding": ["--train-embeddings"],
         "activations computed again": ["--checkpointing", "--cache", "host"]}
KILLS = int(os.environ.get("ATU_TEST_KILLS", 5))


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def flags(words, run):
    """The command."""
    return [*words, *RUN, "--out", str(run)]


def last_error(capsys) -> str:
    """The one line that is said to bad input."""
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.splitlines()[-1].startswith("error: ")
    return error.splitlines()[-1]


def inside(folder: Path) -> dict[str, bytes]:
    """A folder's files and what is in them, apart from the lock."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != ".lock"}


# ---- cut off

@pytest.mark.parametrize("form", FORMS)
def test_a_run_cut_off_after_any_stage_ends_as_if_it_had_not_been(words, tmp_path, monkeypatch, form):
    check_cuts(train.main, [*words, *RUN, *FORMS[form]], tmp_path, monkeypatch)


def test_a_run_killed_at_random_goes_on(apart, words, tmp_path):
    def go(out: str, until: float | None = None) -> int:
        child = apart([*words, *RUN, "--out", str(tmp_path / out), "--resume"])
        child.join(until)
        child.kill()
        child.join()
        return child.exitcode

    apart(["--help"]).join()  # what all have in common is loaded by now
    went, began = random.Random(0), time.perf_counter()
    assert go("whole") == 0
    took, kills, runs = time.perf_counter() - began, 0, 0
    while kills < KILLS or runs < 1:
        if go(f"cut {runs}", went.uniform(0, took) if kills < KILLS else None) != 0:
            kills += 1
        else:
            assert left(tmp_path / f"cut {runs}") == left(tmp_path / "whole")
            runs += 1
    print(f"killed {kills} times in {runs} runs")


def test_a_second_run_in_the_same_folder_is_refused(flags, run, capsys):
    run.mkdir()
    with FileLock(run / ".lock"):
        assert train.main(flags) == 2
    assert "another run is at work there" in last_error(capsys)
    assert inside(run) == {}


def test_checkpoints_are_written_at_the_end_of_stages_and_seconds_add_up(flags, run, monkeypatch):
    written, real = [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda out, work, state, found: (
        written.append(state.stage), real(out, work, state, found)))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        ask = evaluate.evaluate

        def killed(*a):
            if written == [1, 2]:
                raise Killed
            return ask(*a)

        patch.setattr(evaluate, "evaluate", killed)
        train.main(flags)
    assert written == [1, 2]  # stages 0 and 1 are over; in the middle of the end of stage 2 it was killed
    saved = torch.load(run / "checkpoint.pt")
    saved["found"]["seconds"] += 1000
    torch.save(saved, run / "checkpoint.pt")
    assert train.main([*flags, "--resume"]) == 0 and written == [1, 2, 3]
    assert json.loads((run / "results.json").read_text())["seconds"] > 1000
    written = [(record["kind"], record["stage"], record.get("step")) for record in records(run)]
    assert len(written) == len(set(written))  # what was logged of stage 2 before is not there twice


def test_a_run_that_was_over_is_not_trained_further(words, tmp_path, monkeypatch):
    def half(*a):
        scores, rows = real(*a)
        return scores | {"forget_words": 50.0}, rows

    real = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", half)
    flags = [*words, *RUN, "--stop-at", "1"]  # met after the first stage of unlearning
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    for name in ("save_model", "panels"):  # before and after the model is there
        def killed(*_):
            raise Killed
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train, name, killed)
            train.main([*flags, "--out", str(tmp_path / name)])
        free = ["--log-every", "2", "--target", " ADA LARK ", "--cache", "host", "--checkpointing"]
        assert train.main([*flags, *free, "--out", str(tmp_path / name), "--resume"]) == 0
        one, two = left(tmp_path / name), left(tmp_path / "whole")
        assert len(one["results"]["stages"]) == len(two["results"]["stages"]) == 1
        assert {k: v for k, v in one.items() if "safetensors" in k} == {
            k: v for k, v in two.items() if "safetensors" in k}


# ---- what cannot go on

def test_a_run_of_another_command_or_version_does_not_go_on(flags, run, capsys, monkeypatch):
    cut_off(train.main, flags, monkeypatch)
    settings = json.loads((run / "config.json").read_text())
    for other, named in ((settings | {"songs": 3}, "--songs"), (settings.keys() - {"others"}, "--others")):
        (run / "config.json").write_text(json.dumps({name: settings.get(name, 3) for name in other}))
        assert train.main([*flags, "--resume"]) == 2
        assert f"a run of another command or version, for {named};" in last_error(capsys)


def test_a_checkpoint_without_a_part_that_is_needed_is_refused(flags, run, capsys, monkeypatch):
    cut_off(train.main, flags, monkeypatch)
    saved = torch.load(run / train.CHECKPOINT, weights_only=True)
    del saved["head"]
    torch.save(saved, run / train.CHECKPOINT)
    assert train.main([*flags, "--resume"]) == 2
    assert "command have changed since" in last_error(capsys)


def flip(file: Path, place: float) -> None:
    """One bit of the byte that stands at this share of the largest tensor in the file."""
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(file.read_bytes())
    header = content[largest.header_offset:largest.header_offset + 30]
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    content[largest.header_offset + 30 + lengths + int(place * largest.file_size)] ^= 1
    file.write_bytes(content)


def spoil(file: Path) -> None:
    """M has a weight that this one has not."""
    saved = torch.load(file)
    saved["llm"]["model.layers.9.mlp.weight"] = torch.zeros(1)
    torch.save(saved, file)


def set_target(file: Path, target) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target": target}))


@pytest.fixture(scope="module")
def once_cut(folders, tmp_path_factory):
    """A run that was killed after its first alignment: to be copied."""
    out = tmp_path_factory.mktemp("cut") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CACHE", out.parent / "cache")
        cut_off(train.main, [*command(folders), *RUN, "--out", str(out)], patch)
    return out


@pytest.mark.parametrize("damage, more, message", [
    (lambda file: file.write_bytes(file.read_bytes()[:-9]), "", "damaged checkpoint"),
    (lambda file: file.write_bytes(b""), "", "damaged checkpoint"),
    (lambda file: flip(file, 0.0), "", "is another"), (lambda file: flip(file, 0.8), "", "is another"),
    (lambda file: save_file({"a": torch.zeros(1)}, file), "", "damaged checkpoint"),
    (lambda file: set_target(file.with_name("config.json"), 5), "", "holds no run"),
    (spoil, "", "weights of another model (model.layers.9.mlp.weight)"),
    (lambda file: None, "--seed 7", "another --seed (0, not 7)"),
    (lambda file: None, "--length 20", "another --length"),
    (lambda file: None, "--eval-batch 3", "another --eval-batch (40, not 3)")])
def test_a_damaged_or_foreign_checkpoint_is_named(flags, once_cut, run, capsys, damage, more, message):
    shutil.copytree(once_cut, run)
    damage(run / "checkpoint.pt")
    before = inside(run)
    assert train.main([*flags, *more.split(), "--resume"]) == 2
    error = last_error(capsys)
    assert str(run) in error and message in error
    assert inside(run) == before


def test_another_command_s_run_is_not_gone_on_with(flags, once_cut, run, capsys):
    shutil.copytree(once_cut, run)
    settings = json.loads((run / "config.json").read_text()) | {"method": "npo"}
    (run / "config.json").write_text(json.dumps(settings))
    assert train.main([*flags, "--resume"]) == 2
    assert "method" in last_error(capsys)


CHECK, READ = (zipfile, "ZipFile"), (torch, "load")
DENIED, BROKEN = OSError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "Input/output error")
NO_ROOM = RuntimeError("DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("reader, error, message", [
    (CHECK, DENIED, "Permission denied"), (READ, DENIED, "Permission denied"), (CHECK, BROKEN, None),
    (CHECK, MemoryError(), "out of memory"), (READ, MemoryError(), "out of memory"),
    (READ, NO_ROOM, "out of memory")])
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(
        flags, once_cut, run, capsys, monkeypatch, reader, error, message):
    def failing(*_, **__):
        raise error

    shutil.copytree(once_cut, run)
    before = inside(run)
    with monkeypatch.context() as patch:
        patch.setattr(*reader, failing)
        if message is None:  # no one's fault: raised as it is
            with pytest.raises(OSError):
                train.main([*flags, "--resume"])
        else:
            assert train.main([*flags, "--resume"]) == 2
            said = last_error(capsys)
            assert message in said and "damaged" not in said and "delete" not in said
    assert inside(run) == before


@pytest.mark.parametrize("file, was, now", [
    ("forget_level1", "painter", "singer"), ("positive", "painter", "singer"),
    ("neighbor_level2", "birds", "bats")])
def test_texts_or_probes_that_have_changed_since_are_named(
        flags, folders, tmp_path, once_cut, run, capsys, file, was, now):
    shutil.copytree(folders["rwku"], tmp_path / "rwku")
    shutil.copytree(once_cut, run)
    settings = json.loads((run / "config.json").read_text()) | {"rwku": str(tmp_path / "rwku")}
    (run / "config.json").write_text(json.dumps(settings))
    flags = [*flags, "--rwku", str(tmp_path / "rwku"), "--resume"]
    (changed,) = tmp_path.glob(f"rwku/0_*/{file}.json")
    before = changed.read_text(), inside(run)
    changed.write_text(before[0].replace(was, now))
    assert train.main(flags) == 2
    assert "texts, probes or command have changed since" in last_error(capsys)
    assert inside(run) == before[1]
    changed.write_text(before[0])
    assert train.main(flags) == 0


# ---- folders

@pytest.mark.parametrize("files", [
    {"config.json": '{"name": "mine"}'}, {"config.json": "{}"}, {"config.json": "[1]"}, {"config.json": "1"},
    {"config.json": "mine"}, {"model/mine.txt": "mine"}, {"notes.txt": "mine"}, {"checkpoint.pt": "mine"},
    {"results.json": '{"stopped": null}'},
    {"config.json": '{"taus": [1], "seed": 0}', "model/config.json": "{}"}])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_that_holds_something_else_is_never_touched(flags, run, capsys, files, resume):
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(content)
    before = inside(run)
    assert train.main([*flags, *resume]) == 2
    error = last_error(capsys)
    assert str(run) in error and "name another" in error
    assert inside(run) == before


def test_a_folder_that_holds_a_run_is_refused_without_resume(flags, once_cut, run, capsys):
    shutil.copytree(once_cut, run)
    before = inside(run)
    assert train.main(flags) == 2
    error = last_error(capsys)
    assert str(run) in error and "go on with --resume, or name another" in error
    assert inside(run) == before


@pytest.mark.parametrize("bad", ["--layer 5", "--window 500", "--encoder ./nowhere", "--model ./nowhere"])
@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_ends_by_bad_input_leaves_nothing_behind(flags, run, capsys, bad, there):
    if there:
        run.mkdir()
    assert train.main([*flags, *bad.split()]) == 2
    assert bad.split()[1] in last_error(capsys)
    assert run.exists() == there
    if there:
        assert list(run.iterdir()) == []
    assert train.main([*flags, *bad.split(), "--resume"]) == 2
    assert run.exists() == there


def test_a_link_to_an_empty_folder_stays_and_a_file_too(flags, run, capsys):
    (run.parent / "elsewhere").mkdir()
    run.symlink_to(run.parent / "elsewhere")
    assert train.main([*flags, "--layer", "5"]) == 2
    assert "blocks 1 to 4" in last_error(capsys)
    assert run.is_symlink() and run.is_dir() and list(run.iterdir()) == []
    run.unlink()
    run.write_text("mine")
    assert train.main(flags) == 2
    assert str(run) in last_error(capsys) and run.read_text() == "mine"


def test_a_run_interrupted_before_its_first_checkpoint_leaves_nothing_behind(flags, run, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(atu, "align", interrupted)
    assert train.main(flags) == 130
    assert "interrupted" in capsys.readouterr().err and not run.exists()


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(words, tmp_path, run, capsys, monkeypatch):
    flags = [*words, *RUN, "--out", str(run), "--resume"]
    assert train.main([*words, *RUN, "--out", str(tmp_path / "whole")]) == 0
    calls, real = [], torch.save

    def full(saved, file):
        calls.append(1)
        if len(calls) == 2:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(saved, file)

    monkeypatch.setattr(torch, "save", full)
    assert train.main(flags) == 2
    error = last_error(capsys)
    assert "No space left on device" in error and "--resume" in error
    assert [file.name for file in run.glob("*checkpoint*")] == ["checkpoint.pt"]
    assert [file.name for file in run.glob(".*checkpoint*")] == []
    assert train.main(flags) == 0 and left(run) == left(tmp_path / "whole")


# ---- a step that is not finite

@pytest.mark.parametrize("loss, call, ends", [  # how many ends of stages came before
    ("alignment_loss", 4, 0), ("unlearning_loss", 3, 1), ("alignment_loss", 8, 1), ("unlearning_loss", 6, 2)])
def test_a_loss_that_is_not_finite_keeps_what_was_last_good(
        flags, run, folders, monkeypatch, capsys, loss, call, ends):
    real, calls, good = getattr(atu, loss), [], {}

    def broken(*a):
        calls.append(1)
        return real(*a) * (float("nan") if len(calls) == call else 1)

    def save(out, work, state, found):
        keep(out, work, state, found)
        for name in ("llm", "head"):
            good[name] = {key: value.clone() for key, value in getattr(state, name).state_dict().items()}

    def weighed(llm, *a):  # a score that tells which weights were scored
        scores, rows = ask(llm, *a)
        return scores | {"weights": sum(p.abs().sum().item() for p in llm.parameters())}, rows

    ask, keep = evaluate.evaluate, train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", save)
    monkeypatch.setattr(evaluate, "evaluate", weighed)
    monkeypatch.setattr(atu, loss, broken)
    assert train.main(flags) == 1
    said = capsys.readouterr().out
    assert "stopped | " in said and "lower --llm-lr or --head-lr, and name another --out" in said
    results = json.loads((run / "results.json").read_text())
    assert "finite" in results["stopped"] and len(results["stages"]) == max(ends - 1, 0)
    assert len([record for record in records(run) if "seconds" in record]) == ends
    assert not (run / "checkpoint.pt").exists()
    llm, tokenizer = data.load_llm(str(run / "model"))
    saved = {"llm": llm.state_dict(), "head": load_file(run / "head.safetensors")}
    for name, weights in good.items():
        assert all(torch.equal(value, saved[name][key]) for key, value in weights.items())
    untouched = data.load_llm(str(folders["llm"]))[0].state_dict()
    assert all(torch.equal(value, saved["llm"][key]) for key, value in untouched.items()) == (ends <= 1)
    probes = evaluate.read_probes(folders["rwku"], "Ada Lark", ("forget", "neighbor", "general"))
    scores, _ = evaluate.evaluate(llm, tokenizer, probes)
    assert scores == {name: results["after"][name] for name in scores}
    assert train.main([*flags, "--resume"]) == 1  # it is over
    assert json.loads((run / "results.json").read_text()) == results

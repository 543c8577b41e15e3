"""Runs side by side: Table 1's rule, lines, means, what is left, figures; older runs beside today's."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
import evaluate
from experiments import compare


def stage(forget, neighbor, steps=10, **more):
    return {"forget_fb": forget, "forget_qa": forget, "forget_aa": forget, "forget_all": forget,
            "neighbor_fb": neighbor, "neighbor_qa": neighbor, "neighbor_all": neighbor, "general": 90.0,
            "record": {"kind": "stage", "stage": 1, "tau": 0.4, "steps": steps}} | more


def without_record(scores):
    return {name: value for name, value in scores.items() if name != "record"}


@pytest.fixture
def runs(tmp_path):
    def write(name, method, stages, stopped=None, before={}, target="Ada", **settings):
        folder = tmp_path / name
        folder.mkdir()
        settings = {"method": method, "model": "/x/tiny", "layer": 2, "corpus": "positive", "retain": "none",
                    "retain_weight": 1, "lora": 0, "seed": 0} | settings
        settings = {key: value for key, value in settings.items() if value is not None}
        before = without_record(stage(80, 100)) | before
        (folder / "results.json").write_text(json.dumps(
            {"target": target, "settings": settings, "before": before, "stages": stages, "stopped": stopped}))
        return str(folder)
    return write, [write("a", "atu", [stage(50, 90), stage(30, 80)]),
                   write("b", "atu", [stage(20, 70)], seed=1),
                   write("c", "ga", [stage(60, 50)], corpus="passage", lora=8, retain="kl")]


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """The command's table as rows of cells. No picture is drawn: that takes seconds."""
    monkeypatch.setattr(evaluate, "plot", lambda file, *_: file.write_text("drawn"))

    def run(*words):
        out = tmp_path / "t"
        assert compare.main([*words, "--out", str(out)]) == 0 and out.with_name("t.png").exists()
        rows = out.with_name("t.md").read_text().splitlines()
        return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    return run


def lines_of(*folders, by_target=False):
    return compare.read_runs([Path(folder) for folder in folders], by_target)


# ---- Table 1

def test_table_1_of_runs(runs, shown, capsys):
    rows = shown(*runs[1], "--levels", "50", "35")
    at = {(row[0], row[1]): dict(zip(rows[0], row)) for row in rows[2:]}
    assert at["ATU + retain (F)", "before"]["forget fb"] == "80.0 ± 0.0"
    assert at["ATU + retain (F)", "50 %"]["forget qa"] == "25.0 ± 7.1"
    assert at["ATU + retain (F)", "50 %"]["runs"] == "2 of 2"
    assert at["ATU + retain (F)", "35 %"]["neighbor fb"] == "75.0 ± 7.1"
    assert at["ATU + retain (F)", "end"]["forget aa"] == "25.0 ± 7.1"
    assert at["GA* + KL (L)", "end"]["forget aa"] == "60.0"
    assert at["GA* + KL (L)", "50 %"]["forget aa"] == "-" and at["GA* + KL (L)", "50 %"]["runs"] == "0 of 1"
    assert at["published: ATU, 20 %", ""]["forget fb"] == "13.5"
    assert at["published: ATU, 20 %", ""]["general"] == "-"
    assert "published: NPO (F)" in capsys.readouterr().out


def test_table_and_figures_are_written(runs, tmp_path, capsys):
    assert compare.main([*runs[1], "--out", str(tmp_path / "t")]) == 0
    assert (tmp_path / "t.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_the_published_rows_are_those_of_the_paper():
    # its Table 1 prints forget FB, QA, AA, then the neighbors' QA before their FB, then MMLU
    assert compare.PLACES == ("forget_fb", "forget_qa", "forget_aa", "neighbor_fb", "neighbor_qa", "mmlu")
    assert compare.PUBLISHED["ATU, 50 %"] == (36.3, 40.5, 48.8, 55.8, 64.4, 64.2)
    assert compare.PUBLISHED["ATU, 35 %"] == (24.1, 24.8, 37.2, 51.3, 56.4, 64.8)
    assert compare.PUBLISHED["ATU, 20 %"] == (13.5, 15.3, 25.9, 41.5, 52.3, 64.5)
    assert compare.PUBLISHED["before"] == (47.1, 47.4, 55.8, 56.2, 61.4, 64.4)
    assert len(compare.PUBLISHED) == 13 and {len(row) for row in compare.PUBLISHED.values()} == {6}


def test_relative_levels(runs, shown, capsys):
    rows = shown(*runs[1], "--relative", "--levels", "70", "50")
    assert [row[1:] for row in rows if "ATU" in row[0]] == [
        ["70 %", "43.8 ± 26.5", "80.0 ± 14.1", "100.0 ± 0.0", "2 of 2"],
        ["50 %", "31.2 ± 8.8", "75.0 ± 7.1", "100.0 ± 0.0", "2 of 2"],
        ["end", "31.2 ± 8.8", "75.0 ± 7.1", "100.0 ± 0.0", "2 of 2"]]
    assert "published" not in capsys.readouterr().out


def test_a_level_counts_as_reached_at_or_below_relatively_and_below_absolutely():
    run = {"before": {"forget_all": 80.0}, "stages": [stage(40, 90), stage(39, 80), stage(20, 70)]}
    assert compare.first_stage(run, 50, True) == run["stages"][0]
    assert compare.first_stage(run, 25, True) == run["stages"][2]
    assert compare.first_stage(run, 40, False) == run["stages"][1]
    assert compare.first_stage(run, 20, False) is None


def test_a_row_for_every_stage(runs, shown):
    rows = shown(*runs[1][:2], "--relative", "--stages", "--levels")
    assert [row[1:3] + row[-1:] for row in rows[2:]] == [
        ["stage 1", "43.8 ± 26.5", "2 of 2"], ["stage 2", "37.5", "1 of 2"], ["end", "31.2 ± 8.8", "2 of 2"]]


def test_a_line_for_each_target_at_the_end_of_its_runs(runs, shown, capsys):
    rows = shown(*runs[1][:2], "--relative", "--by-target", "--levels")
    assert rows[0][:4] == ["", "level", "forget all", "neighbor all"] and len(rows) == 3
    assert rows[2][:4] == ["Ada", "end", "31.2 ± 8.8", "75.0 ± 7.1"]
    assert "note |" not in capsys.readouterr().out


# ---- at one forgetting

def words(forget, neighbor):
    return stage(forget, neighbor, forget_words=forget, neighbor_words=neighbor)


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=6),
       st.integers(1, 99))
def test_read_off_at_one_forgetting(scores, percent):
    run = {"before": without_record(words(100, 100)), "stages": [words(*pair) for pair in scores]}
    found, path, kept = compare.between(run, percent), [(100, 100), *scores], []
    for (x, y), (u, v) in pairwise(path):
        if x == u:
            kept += [y] * (x == percent)
        elif min(x, u) <= percent <= max(x, u):
            kept.append(np.interp(percent, *zip(*sorted([(x, y), (u, v)]))))
    assert (found is None) == (not kept)
    if kept:
        assert found["forget_words"] == pytest.approx(percent)
        assert found["neighbor_words"] == pytest.approx(max(kept))


def test_a_table_at_one_forgetting(runs, shown, capsys):
    write, _ = runs
    before = {"forget_words": 80, "neighbor_words": 100}
    folders = [write("w", "atu", [words(60, 90), words(20, 70)], before=before),
               write("x", "ga", [words(50, 40)], before=before)]
    rows = shown(*folders, "--relative", "--at", "50", "--levels")
    at = {(row[0], row[1]): dict(zip(rows[0], row)) for row in rows[2:]}
    assert at["ATU + retain (F)", "at 50 %"]["neighbor words"] == "80.0"  # 40 of 80: half the way from 60 to 20
    assert at["ATU + retain (F)", "at 50 %"]["forget words"] == "50.0"
    assert at["GA (F)", "at 50 %"]["runs"] == "0 of 1" and at["GA (F)", "at 50 %"]["neighbor words"] == "-"
    older = write("older", "npo", [stage(50, 90)])
    for bad in ([*folders, "--at", "50"], [folders[0], older, "--relative", "--at", "50"],
                [folders[0], "--relative", "--at", "101"]):
        assert compare.main(bad) == 2
    assert "older/results.json" in capsys.readouterr().err


# ---- what is left

def test_what_is_left_is_counted_above_the_floor(runs, shown):
    low = {"floor": 20.0, "forget_words": 60.0}
    folder = runs[0]("f", "npo", [stage(50, 90, **low | {"forget_words": 40.0}),
                                  stage(35, 80, gap=4.0, gap_sd=1.0, **low | {"forget_words": 30.0})],
                     before=low | {"gap": 16.0, "gap_sd": 1.0})
    rows = shown(folder, "--relative", "--levels", "70")
    assert rows[0] == [
        "", "level", "forget all", "forget words", "above floor", "neighbor all", "general", "gap (nats x 100)", "runs"]
    assert rows[2][1:-1] == ["70 %", "62.5", "66.7", "50.0", "90.0", "100.0", "-"]
    assert rows[3][1:-1] == ["end", "43.8", "50.0", "25.0", "80.0", "100.0", "4.0"]
    rows = shown(folder, "--by-target", "--levels", "70")
    assert [dict(zip(rows[0], row))["gap (nats x 100)"] for row in rows[2:5]] == ["16.0", "-", "4.0"]
    assert [dict(zip(rows[0], row))["floor"] for row in rows[2:5]] == ["20.0", "20.0", "20.0"]


def test_no_column_for_what_only_some_runs_have(runs, shown):
    write, folders = runs
    floored = write("f", "npo", [stage(50, 90, floor=20.0)], before={"floor": 20.0, "mmlu": 50.0})
    head = shown(*folders, floored, "--relative")[0]
    assert head == ["", "level", "forget all", "neighbor all", "general", "runs"]


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 99))
def test_what_is_left(score, before, floor):
    def left(value, **low):
        return compare.left({"forget_words": value, "other": 1.0}, {"forget_words": before, "other": 0.0} | low)

    assert "other" not in left(score)  # nothing there to forget
    if before > floor:
        assert left(before, floor=floor) == pytest.approx({"forget_words": 100.0, "above floor": 100.0})
        assert left(floor, floor=floor)["above floor"] == 0.0
        assert left(score, floor=0.0)["above floor"] == left(score)["forget_words"]
    else:
        assert "above floor" not in left(score, floor=floor)
    assert "above floor" not in left(score)  # no floor was measured


def test_what_made_up_names_score_is_left_out_where_it_is_all_there_was(runs, shown):
    folder = runs[0]("f", "npo", [stage(50, 90, floor=80.0, forget_words=40.0)],
                     before={"floor": 80.0, "forget_words": 80.0})
    rows = shown(folder, "--relative", "--levels")
    assert rows[2][1:5] == ["end", "62.5", "50.0", "-"] and rows[0][4] == "above floor"


# ---- lines

def test_runs_of_different_models_are_different_lines(runs):
    write, folders = runs
    other = write("d", "ga", [stage(10, 10)], model="/y/big", corpus="passage", lora=8, retain="kl")
    assert list(lines_of(*folders, other)) == [
        "ATU + retain (F)", "GA* + KL (L), model big", "GA* + KL (L), model tiny"]


def test_settings_in_which_runs_of_a_method_differ_are_part_of_its_name(runs):
    write, folders = runs
    other = write("d", "atu", [stage(10, 10)], layer=10, seed=7)
    assert list(lines_of(*folders, other)) == [
        "ATU + retain (F), layer 2", "ATU + retain (F), layer 10", "GA* + KL (L)"]
    others = [write(name, "atu", [stage(10, 10)], max_active=share) for name, share in (("e", 0.1), ("g", 2))]
    assert list(lines_of(*others)) == [
        "ATU + retain (F), max active 0.1", "ATU + retain (F), max active 2"]


@pytest.mark.parametrize("name, method, settings", [
    ("ATU + retain (F)", None, {"retain": None}), ("ATU (L)", "atu", {"retain_weight": 0, "lora": 8}),
    ("ICU", "icu", {}),
    ("NPO + NLL (F)", "npo", {"retain": "nll"}), ("stranger, ATU + retain (F)", None, {"stranger_steps": 80}),
    ("GA* (F)", "ga", {"corpus": "passage"}), ("RT (F)", "rt", {"corpus": "passage"})])
def test_methods_have_their_names_in_table_1(runs, name, method, settings):
    assert list(lines_of(runs[0]("d", method, [stage(9, 9)], **settings))) == [name]


def test_targets_have_a_line_for_each_method_where_there_are_several(runs):
    write, folders = runs
    bob = write("d", "atu", [stage(10, 10)], target="Bob", layer=9)  # his own: no part of the name
    assert list(lines_of(*folders[:2], bob, by_target=True)) == ["Ada", "Bob"]
    assert list(lines_of(*folders, bob, by_target=True)) == [
        "Ada, ATU + retain (F)", "Ada, GA* + KL (L)", "Bob, ATU + retain (F)"]
    other = write("e", "atu", [stage(10, 10)], layer=10)
    assert list(lines_of(folders[0], other, by_target=True)) == [
        "Ada, ATU + retain (F), layer 2", "Ada, ATU + retain (F), layer 10"]


def test_runs_on_machines_with_and_without_bf16_are_one_line(runs):
    write, folders = runs
    others = [write(name, "atu", [stage(10, 10)], seed=7, bf16=bf16) for name, bf16 in (("d", 0), ("e", 1))]
    lines = lines_of(*folders, *others)
    assert {name: len(part) for name, part in lines.items()} == {"ATU + retain (F)": 4, "GA* + KL (L)": 1}


def test_older_runs_stand_in_the_line_of_today_s(runs):
    write, _ = runs
    now = {"target_texts": 32, "max_active": 0.02, "retain": None, "eval_batch": 40, "texts": ""}
    then = {"target_texts": 32, "max_active": 0.02, "warmup": 20, "eval_batch": 160, "texts": ""}
    older = write("d", "atu", [stage(10, 10)], **then)
    newer = write("e", None, [stage(10, 10)], **now | {"seed": 1})
    own = write("f", None, [stage(10, 10)], **now | {"texts": "own.txt", "target_texts": 16})
    again = write("g", None, [stage(10, 10)], **now)
    assert {name: len(part) for name, part in lines_of(older, newer).items()} == {"ATU + retain (F)": 2}
    assert list(lines_of(older, own)) == [
        "ATU + retain (F), target texts 16", "ATU + retain (F), target texts 32"]
    with pytest.raises(data.BadInput, match="the same target, seed and settings"):
        lines_of(older, again)
    fewer = write("h", None, [stage(10, 10)], **now | {"mlp_only": True})  # older runs moved blocks whole
    assert list(lines_of(older, fewer)) == ["ATU + retain (F), mlp only False", "ATU + retain (F), mlp only True"]
    baselines = [write(name, "ga", [stage(10, 10)], **more) for name, more in (("i", {}), ("j", {"mlp_only": True, "seed": 1}))]
    assert len(lines_of(*baselines)) == 1  # to whom the option means nothing


def test_lines_on_different_targets_or_seeds_are_named(runs, shown, capsys):
    write, folders = runs
    shown(*folders)
    note = "note | not the same targets and seeds in all lines"
    assert capsys.readouterr().out.startswith(f"{note} | ATU + retain (F) | Ada 0, Ada 1\n"
                                              f"{note} | GA* + KL (L) | Ada 0\n")
    shown(*folders[::2])
    assert "note |" not in capsys.readouterr().out


def test_a_run_that_broke_off_is_named(runs, shown, capsys):
    write, folders = runs
    broken = write("d", "atu", [stage(10, 10)], seed=7, stopped="loss nan")
    shown(*folders, broken)
    assert [line for line in capsys.readouterr().out.splitlines() if "stopped" in line] == [
        f"note | {broken}/results.json: stopped (loss nan); its end is the last whole stage"]


# ---- bad input

def test_bad_runs(runs, tmp_path, capsys):
    out = ["--out", str(tmp_path / "t")]
    (tmp_path / "a" / "results.json").write_text("{}")
    less = json.loads((tmp_path / "b" / "results.json").read_text())
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "results.json").write_text(json.dumps(less | {"before": {"forget_all": 80.0}}))
    for words, said in (([tmp_path / "nowhere"], "no such file"),
                        ([tmp_path / "a", *out], "not the results of a run"),
                        ([tmp_path / "d", *out], "not the results of a run with forget and neighbor probes "
                                                 "(KeyError: 'neighbor_all')"),
                        ([tmp_path / "b", "--out", "nowhere/t"], "--out nowhere/t: name files in a folder"),
                        ([tmp_path / "b", "--out", "."], "--out .: name files in a folder"),
                        ([tmp_path / "b", "--levels", "nan", *out], "--levels nan"),
                        ([tmp_path / "b", "--levels", "101", *out], "--levels 101")):
        assert compare.main([str(word) for word in words]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and said in error
    assert not (tmp_path / "t.md").exists() and not (tmp_path / "t.png").exists()


def test_a_run_that_is_there_twice_is_refused_and_a_folder_named_twice_is_one(runs, shown, tmp_path, capsys):
    write, folders = runs
    other = write("d", "atu", [stage(10, 10)], out="elsewhere", device="cuda")
    assert compare.main([*folders, other, "--out", str(tmp_path / "t")]) == 2
    assert "d/results.json: the same target, seed and settings as" in capsys.readouterr().err
    shown(folders[2], folders[2] + "/", "--relative")
    assert "1 of 1" in capsys.readouterr().out


# ---- figures

def test_a_line_of_the_figures_goes_on_where_a_run_has_ended(runs):
    neighbors, utility, steps = compare.trade_off(lines_of(*runs[1]))
    assert neighbors["lines"]["ATU + retain (F)"] == [[80, 35, 25], [100, 80, 75]]
    assert steps["lines"]["ATU + retain (F)"] == [[0, 10, 15], [80, 35, 25]]
    assert utility["lines"]["GA* + KL (L)"] == [[80, 60], [90, 90]]


def test_what_comes_before_the_first_stage_of_unlearning_has_no_steps_in_the_figure():
    first = stage(60, 95, record={"kind": "stage", "stage": 0, "steps": 430})
    run = {"before": stage(80, 100), "stages": [first, stage(20, 90)]}
    assert compare.trade_off({"a": [run]})[-1]["lines"]["a"] == [[0, 0, 10], [80, 60, 20]]


def test_a_panel_only_for_what_every_stage_has(runs):
    scored_at_the_end = runs[0]("d", "npo", [stage(60, 80), stage(50, 70, mmlu=40.0)], before={"mmlu": 50.0})
    titles = [panel["title"] for panel in compare.trade_off(lines_of(scored_at_the_end))]
    assert titles == ["neighbor_all (the paper's Figs. 4, 5)", "general (the paper's Figs. 4, 5)",
                      "forgetting by step (its Fig. 6)"]

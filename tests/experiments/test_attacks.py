"""The attacks on the tiny model: they run beside their controls, and training brings back what it teaches."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import data
import evaluate
from conftest import make_llm
from experiments import attacks
from experiments.baselines import tokenize_answers

POSSIBLE = [name for name in attacks.ATTACKS if name != "reverse"]  # the tiny data have no reverse queries


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(attacks, "SCORED", (2, 4))
    monkeypatch.setattr(attacks, "LENGTH", 4)  # the tiny data's answers stand behind


@pytest.fixture
def short(monkeypatch):
    """Little training and short answers."""
    real = evaluate.answer
    monkeypatch.setattr(evaluate, "answer", lambda *a, **how: real(*a[:4], 2, **how))
    monkeypatch.setattr(attacks, "RATES", (1e-5,))


@pytest.fixture
def make_run(folders, tmp_path):
    """Makes the folder of a finished run that has changed nothing."""
    def make(name: str = "run", target: str = "Ada Lark", **changed: str) -> Path:
        folder, settings = tmp_path / name, {"model": str(folders["llm"]), "rwku": str(folders["rwku"])}
        shutil.copytree(folders["llm"], folder / "model")
        (folder / "results.json").write_text(json.dumps({"target": target, "settings": settings | changed}))
        return folder

    return make


@pytest.fixture
def cases(folders):
    return attacks.untouched(str(folders["llm"]), str(folders["rwku"]), "Ada Lark", "cpu")[2]


def attack(*words) -> int:
    return attacks.main([*map(str, words), "--device", "cpu"])


def read(folder: Path) -> dict:
    return json.loads((folder / "attacks.json").read_text())


def test_every_attack_stands_beside_its_controls_and_what_is_found_is_kept(make_run, capsys, short):
    run = make_run()
    assert attack(run, "--attacks", *POSSIBLE) == 0
    shown, found = capsys.readouterr().out, read(run)
    for name in POSSIBLE:
        assert f"\nattack | {name} | attacked {found[name]['attacked']['score']:.1f} | untouched " in shown
        assert {"attacked", "untouched", "made up"} == set(found[name])
        assert found[name]["attacked"] == found[name]["untouched"]  # one model
    assert 0 <= found["floor"] <= 100 and found["target"] == "Ada Lark"
    by_type = found["paraphrase"]["made up"]["by_type"]
    assert len(by_type) == 4 and found["cross lingual"]["made up"]["score"] == by_type["cross lingual"]
    plain = found["none"]
    assert all(found["paraphrase"][who]["score"] >= plain[who]["score"] for who in plain)  # a wording


def test_controls_are_made_once_for_all_runs_on_a_target(make_run, monkeypatch):
    seen, asked = [], []
    monkeypatch.setitem(attacks.ATTACKS, "sample", lambda llm, _, case: seen.append(llm) or {"score": 1.0})
    monkeypatch.setitem(attacks.ATTACKS, "none", lambda llm, _, case: asked.append(llm) or {"score": 2.0})
    attacks.control.cache_clear()
    assert attack(make_run("a"), make_run("b"), "--attacks", "sample") == 0
    attacks.control.cache_clear()
    assert len(seen) == 4 and len({*map(id, seen)}) == 3  # the untouched one twice
    assert len(asked) == 5  # the floor


@pytest.mark.parametrize("change, message", [
    ({"target": "Nobody"}, "Nobody: attacks need RWKU's texts"),
    ({"model": "./nowhere"}, "nowhere: no such folder"),
    ({"rwku": "./nowhere"}, "--rwku ./nowhere: no such folder")])
def test_bad_input_is_named(make_run, capsys, change, message):
    assert attack(make_run(**change)) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_finished_run_is_named(make_run, tmp_path, capsys):
    shutil.rmtree(make_run("moved") / "model")
    for name, message in ((".", "results.json: cannot be read"), ("moved", "model: no such folder")):
        assert attack(tmp_path / name) == 2 and message in capsys.readouterr().err


def test_what_cannot_be_made_is_left_out_and_a_void_kind_does_not_count(make_run, capsys, monkeypatch):
    parts = iter([{"int8": 9.0, "nf4": 80.0, "void": []}, {"int8": 10.0, "nf4": 50.0, "void": ["nf4"]},
                  {"int8": 1.0, "nf4": 2.0, "void": []}])  # attacked, untouched, for a made-up name
    monkeypatch.setitem(attacks.ATTACKS, "quantize", lambda *_: next(parts))
    attacks.control.cache_clear()
    run = make_run()
    assert attack(run, "--attacks", "reverse", "quantize") == 0
    attacks.control.cache_clear()
    shown, found = capsys.readouterr().out, read(run)
    assert "attack | reverse | left out: this target has no reverse queries" in shown
    assert "reverse" not in found
    assert [part["score"] for part in found["quantize"].values()] == [9.0, 10.0, 1.0]
    assert "void ['nf4']" in shown


def test_where_every_kind_is_void_quantizing_is_left_out(make_run, capsys, monkeypatch):
    part = {"int8": 1.0, "nf4": 2.0, "void": ["int8", "nf4"]}
    monkeypatch.setitem(attacks.ATTACKS, "quantize", lambda *_: part)
    attacks.control.cache_clear()
    assert attack(make_run(), "--attacks", "quantize") == 0
    attacks.control.cache_clear()
    assert "attack | quantize | left out: either kind costs" in capsys.readouterr().out


def test_relearning_asks_nothing_that_its_texts_tell(cases, tokenizer, monkeypatch):
    asked, llm = [], make_llm()
    monkeypatch.setattr(attacks, "scored", lambda pupil, tokenizer, probes: asked.append(probes) or 0.0)
    monkeypatch.setattr(attacks, "LENGTH", 80)
    told = cases[0]._replace(texts=["Ada Lark painted birds."] * 9, probes={"forget_qa": [
        {"query": "What?", "answer": "Birds"}, {"query": "Who?", "answer": "Cora"}]})
    assert attacks.relearn(llm, tokenizer, told)["questions"] == 1  # "Birds" stands there
    assert all(probes == {"forget_qa": [{"query": "Who?", "answer": "Cora"}]} for probes in asked)
    assert len(asked) == 1 + len(attacks.RATES) * len(attacks.SCORED)
    with pytest.raises(data.BadInput, match="every answer stands in"):
        known = {"forget_qa": [{"query": "Who?", "answer": "ADA LARK"}]}
        attacks.relearn(llm, tokenizer, told._replace(probes=known))


def test_relearning_takes_the_texts_that_tell_least(cases, tokenizer, monkeypatch):
    taught = []
    monkeypatch.setattr(attacks, "LENGTH", 80)
    monkeypatch.setattr(attacks, "taught", lambda *given: taught.append(given[2:4]) or {})
    texts = ["Ada Lark painted birds."] * 3 + [f"She was born in {year}." for year in range(1850, 1858)]
    attacks.relearn(None, tokenizer, cases[0]._replace(texts=texts))
    ids, mask = taught[0]
    assert [tokenizer.decode(row[real]) for row, real in zip(ids, mask)] == texts[3:]


def test_training_brings_back_what_it_teaches_and_leaves_the_model_as_it_was(tokenizer, monkeypatch):
    monkeypatch.setattr(attacks, "RATES", (5e-3,))
    llm = make_llm()
    before = {name: value.clone() for name, value in llm.state_dict().items()}
    texts = tokenize_answers([("What did Ada paint?", "birds")] * 4, tokenizer, 20)
    asked = {"forget_qa": [{"query": "What did Ada paint?", "answer": "birds"}]}
    found = attacks.taught(llm, tokenizer, *texts, asked, (40,))
    assert found["by_step"]["0 0"] < 50 < found["score"] == max(found["by_step"].values())
    assert list(found["by_step"]) == ["0 0", "0.005 40"]
    assert all(torch.equal(before[name], value) for name, value in llm.state_dict().items())


@given(arrays.arrays("float32", (3, 128), elements=st.floats(-1e4, 1e4, width=32)))
def test_rounding_is_within_half_a_level_and_keeps_what_is_a_level(weight):
    weight = torch.from_numpy(weight)
    for kind, gap, width in (("int8", 1 / 127, 128), ("nf4", 0.32, 64)):
        rounded, blocks = attacks.quantized(weight, kind), weight.reshape(-1, width)
        off = (rounded - weight).abs().reshape(-1, width)
        assert (off <= gap / 2 * blocks.abs().amax(1, keepdim=True) * 1.001 + 1e-9).all()
        assert torch.allclose(attacks.quantized(rounded, kind), rounded, rtol=1e-4)


def test_a_matrix_without_whole_blocks_is_named():
    with pytest.raises(data.BadInput, match=r"\(3, 5\) has no whole blocks"):
        attacks.quantized(torch.ones(3, 5), "nf4")


def test_the_best_of_more_samples_is_no_worse():
    found = attacks.leaks([{"set": "forget_qa"}] * 2, [[0.0] * 31 + [1.0], [0.5] * 32])
    assert found["leak@1"] == pytest.approx(100 * (1 / 32 + 0.5) / 2)
    assert found["leak@8"] == pytest.approx(100 * (1 / 4 + 0.5) / 2)
    assert found["leak@32"] == found["score"] == 75.0 and found["leak@1"] <= found["bound"] <= 100
    rows = [{"set": "forget_fb"}, {"set": "forget_qa"}]  # two sets count by RWKU's weights, as everywhere
    assert attacks.leaks(rows, [[1.0] * 32, [0.0] * 32])["score"] == pytest.approx(100 * 3268 / (3268 + 2879))


def test_the_likeliest_token_each_time_is_the_greedy_answer(tokenizer, monkeypatch):
    llm, asked = make_llm(), ["What?", "What did the quiet painter of birds and ships paint?", "Who painted?"]
    probes = {"forget_qa": [{"query": query, "answer": "birds"} for query in asked]}
    rows = attacks.prompted(probes, tokenizer)
    monkeypatch.setattr(torch, "multinomial", lambda likely, num_samples: likely.argmax(1, keepdim=True))
    monkeypatch.setattr(evaluate, "word_recall", lambda said, gold: said)
    greedy = evaluate.answer(llm, tokenizer, [row["prompt"] for row in rows], 1, tokens=16)
    assert attacks.sampled(llm, tokenizer, rows) == [[text] * attacks.SAMPLES for text in greedy]


def test_samples_differ_and_are_the_same_each_time(cases, tokenizer):
    def once() -> list[list[float]]:
        torch.manual_seed(0)
        return attacks.sampled(make_llm(), tokenizer, rows)

    rows = attacks.prompted({"forget_qa": [{"query": "Who?", "answer": "a b c d e f g h i j"}]}, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "word_recall", lambda said, gold: said)
        (said,) = first = once()
        assert len(said) == 32 and len({*said}) > 8 and first == once()


def test_the_control_is_asked_about_a_made_up_name_and_only_what_names_the_target_is_asked(cases):
    true, stranger, *others = cases
    for of in ("probes", "rephrased", "texts", "others"):
        assert "Lark" not in str(getattr(stranger, of)).replace("larks", "")
        assert str(getattr(true, of)) != str(getattr(stranger, of))
    asked = [row["query"] for part in true.probes.values() for row in part]
    assert all("Ada" in query or "Lark" in query for query in asked)
    assert [len(part) for part in true.probes.values()] == [1, 1]
    assert len(others) == 5 == len(true.others) and all({*other} == {"Ada", "Lark"} for other in true.others)
    assert not {"Ada", "Lark"} & {word for other in stranger.others for word in other}
    assert len({str(case.probes) for case in cases}) == 7
    assert all("Lark" not in str(case.probes) for case in others)


def test_steering_is_added_once_and_without_a_difference_it_is_sampling(cases, tokenizer, monkeypatch):
    llm, rows = make_llm(), [{"query": "Who?", "answer": "birds"}]
    plain = cases[0]._replace(probes={"forget_qa": rows})  # no name in the question: nothing to add
    torch.manual_seed(0)
    sampled = attacks.sample(llm, tokenizer, plain)
    torch.manual_seed(0)
    assert attacks.steer(llm, tokenizer, plain) == sampled
    calls, block = [], llm.get_decoder().layers[0]
    real = block.register_forward_hook
    monkeypatch.setattr(block, "register_forward_hook", lambda hook: real(
        lambda *args: calls.append(args[2].shape) or hook(*args)))
    rows = attacks.prompted({"forget_qa": rows}, tokenizer)
    attacks.sampled(llm, tokenizer, rows, [torch.ones(llm.config.hidden_size)], 1)
    assert calls == [(attacks.SAMPLES, 1, 32)]  # the last token of the question's 32 copies, once
    assert not any(module._forward_hooks for module in llm.modules())


def test_each_question_is_steered_by_its_own_direction(cases, tokenizer, monkeypatch):
    """A state that is far larger than M's is all that counts: norm and LM head make the first token of it."""
    llm, D = make_llm(), 32
    rows = attacks.prompted({"forget_qa": [{"query": "Who?", "answer": "birds"}] * 2}, tokenizer)
    directions = [1e6 * torch.eye(D)[n] for n in (3, 7)]
    monkeypatch.setattr(torch, "multinomial", lambda likely, num_samples: likely.argmax(1, keepdim=True))
    monkeypatch.setattr(evaluate, "word_recall", lambda said, gold: said)
    with torch.no_grad():
        wanted = [llm.lm_head(llm.model.norm(direction)).argmax() for direction in directions]
    said = attacks.sampled(llm, tokenizer, rows, directions, 4)
    for part, token in zip(said, wanted):
        assert part[0].startswith(tokenizer.decode(token).strip()) and {*part} == {part[0]}
    assert said[0] != said[1]


@pytest.mark.parametrize("name", ["relearn", "relearn-benign", "quantize", "steer"])
def test_attacks_keep_host_and_card_apart(card, cases, tokenizer, short, name):
    case = cases[0]._replace(probes={"forget_qa": cases[0].probes["forget_qa"]})
    with card():
        assert attacks.ATTACKS[name](make_llm().to("cuda"), tokenizer, case)


def finished(folder: Path, name: str, method: str, score: float, seed: int = 0) -> Path:
    """A run's folder; attacked, where there is a score."""
    (folder / name).mkdir()
    scores = {"forget_all": 90.0, "neighbor_all": 90.0}
    settings = {"method": method, "corpus": "positive", "retain": "none", "retain_weight": 1, "lora": 0,
                "seed": seed}
    by_step = {"0 0": 10.0, "1e-05 2": score, "3e-05 2": 20.0, "1e-05 4": 5.0, "3e-05 4": 30.0}
    found = {"score": score, "by_step": by_step}
    (folder / name / "results.json").write_text(json.dumps(
        {"target": "Ada", "settings": settings, "before": scores, "stages": [], "after": scores}))
    if score:
        (folder / name / "attacks.json").write_text(json.dumps({"target": "Ada", "relearn": {
            "attacked": found, "untouched": found | {"score": 80.0}, "made up": found | {"score": 4.0}}}))
    return folder / name


def test_runs_side_by_side_are_means_and_the_best_rate_counts(tmp_path, monkeypatch):
    shown, plot = [], evaluate.plot
    monkeypatch.setattr(evaluate, "plot", lambda file, panels, *how: shown.extend(panels) or plot(file, panels, *how))
    runs = [finished(tmp_path, "a", "atu", 40.0), finished(tmp_path, "b", "atu", 50.0, 1),
            finished(tmp_path, "c", "npo", 60.0)]
    assert attack("--compare", *runs, "--out", tmp_path / "t") == 0
    lines = (tmp_path / "t.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0] == ["", "relearn", "runs"] and rows[2:] == [
        ["ATU + retain (F)", "45.0 (41.0 ± 7.1)", "2"], ["NPO (F)", "60.0 (56.0)", "1"],
        ["untouched", "80.0", "1"], ["made up", "4.0", "1"]]
    assert shown[0]["lines"]["ATU + retain (F)"] == ([0, 2, 4], [10.0, 45.0, 30.0])
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_compared_is_named(tmp_path, capsys):
    whole, bare = finished(tmp_path, "a", "atu", 40.0), finished(tmp_path, "b", "ga", 0.0)
    nowhere = tmp_path / "none" / "t"
    for words, message in (([bare], "attacks.json: cannot be read"), ([whole, "--out", "."], "--out .: name files"),
                           ([whole, "--out", nowhere], f"--out {nowhere}: name files")):
        assert attack("--compare", *words) == 2 and message in capsys.readouterr().err
    for text in ("[1]", "{}", "no JSON"):
        (bare / "attacks.json").write_text(text)
        assert attack("--compare", bare) == 2 and "attacks.json: cannot be read" in capsys.readouterr().err


def test_attacks_that_not_all_runs_have_are_left_out_with_a_line(tmp_path, capsys):
    runs = [finished(tmp_path, name, name, 40.0) for name in ("atu", "ga")]
    found = read(runs[0])
    (runs[0] / "attacks.json").write_text(json.dumps(found | {"sample": found["relearn"]}))
    assert attack("--compare", *runs, "--out", tmp_path / "t") == 0
    assert "left out, as not in all runs: sample" in capsys.readouterr().out


def test_kinds_of_adversarial_probe_stand_by_themselves(tmp_path):
    run = finished(tmp_path, "a", "atu", 40.0)
    (run / "attacks.json").write_text(json.dumps(read(run) | {"cross lingual": {
        who: {"score": 5.0} for who in ("attacked", "untouched", "made up")}}))
    assert attack("--compare", run, "--by-type", "--out", tmp_path / "t") == 0
    assert (tmp_path / "t.md").read_text().split("|")[2].strip() == "cross lingual"

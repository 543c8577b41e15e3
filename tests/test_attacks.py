"""The attacks on the tiny model: they run, their controls are there, and training brings back what it teaches."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import attacks
import data
import evaluate
from conftest import make_llm


@pytest.fixture
def case(folders, tokenizer):
    return attacks.cases(folders["rwku"], "Ada Lark", tokenizer)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(attacks, "SCORED", (2, 4))
    monkeypatch.setattr(attacks, "LENGTH", 4)  # the tiny dataset's answers stand behind


def test_the_command_sets_every_attack_beside_its_controls_and_keeps_what_it_found(folders, tmp_path, capsys, monkeypatch):
    words = ["--model", str(folders["llm"]), "--untouched", str(folders["llm"]), "--target", "ada lark", "--rwku", str(folders["rwku"]),
             "--device", "cpu"]
    words += ["--attacks", *(set(attacks.ATTACKS) - {"reverse"})]
    attacks.work([*words, "--by-type", "--json", str(tmp_path / "found.json")])
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    for name in set(attacks.ATTACKS) - {"reverse"}:
        assert f"\n| {name} " in shown and found[name]["attacked"] == found[name]["untouched"]  # one model
        assert {"attacked", "untouched", "made up"} == set(found[name])
    assert 0 <= found["floor"] <= 100 and "\n| cross lingual " in shown
    assert found["cross lingual"]["made up"]["score"] == found["paraphrase"]["made up"]["by_type"]["cross lingual"]
    assert all(found["paraphrase"][who]["score"] >= found["none"][who]["score"] for who in found["none"])  # the plain wording is one
    for name in ("evaluate", "next_logits"):
        monkeypatch.setattr(evaluate, name, lambda *_, **__: pytest.fail("asked again"))
    attacks.work(words)


@pytest.mark.parametrize("change, message", [(["--target", "Nobody"], "unknown"), (["--untouched", "./nowhere"], "no such folder"),
                                             (["--json", "/nowhere/x.json"], "cannot be written"),
                                             (["--target", ""], "goes with --model"),
                                             (["--json", "."], "cannot be written")])
def test_bad_input_is_named(folders, change, message):
    words = ["--model", str(folders["llm"]), "--target", "ada lark", "--rwku", str(folders["rwku"]), "--untouched", str(folders["llm"]), *change]
    with pytest.raises(data.BadInput, match=message):
        attacks.work(words)


def test_an_attack_that_cannot_be_made_is_left_out_with_a_line_and_a_void_kind_does_not_count(folders, tmp_path, capsys, monkeypatch):
    parts = iter([{"int8": 10.0, "nf4": 50.0, "void": ["nf4"]}, {"int8": 1.0, "nf4": 2.0, "void": []}])  # of one model; for a made-up name
    monkeypatch.setitem(attacks.ATTACKS, "quantize", lambda *_: next(parts))
    monkeypatch.setattr(data, "CACHE", tmp_path)
    attacks.work(["--model", str(folders["llm"]), "--target", "ada lark", "--rwku", str(folders["rwku"]), "--untouched", str(folders["llm"]),
                  "--device", "cpu", "--attacks", "reverse", "quantize", "--json", str(tmp_path / "found.json")])
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert "attack | reverse | left out: this target has no reverse queries" in shown and "reverse" not in found
    assert [part["score"] for part in found["quantize"].values()] == [10.0, 10.0, 1.0] and "void: nf4" in shown


def test_relearning_asks_nothing_that_its_texts_say_and_brings_back_what_they_teach(case, tokenizer, monkeypatch):
    asked, llm = [], make_llm()
    monkeypatch.setattr(attacks, "scored", lambda pupil, tokenizer, probes, name="": asked.append(probes) or 0.0)
    monkeypatch.setattr(attacks, "LENGTH", 80)
    told = case[0]._replace(texts=["Ada Lark painted birds."] * 9, probes={"forget_qa": [
        {"query": "What?", "answer": "Birds"}, {"query": "Who?", "answer": "Cora"}]})
    assert attacks.relearn(llm, tokenizer, told)["questions"] == 1  # "Birds" stands there
    assert all(probes == {"forget_qa": [{"query": "Who?", "answer": "Cora"}]} for probes in asked)
    with pytest.raises(data.BadInput, match="every answer stands in"):
        attacks.relearn(llm, tokenizer, told._replace(probes={"forget_qa": [{"query": "Who?", "answer": "ADA LARK"}]}))
    monkeypatch.undo()
    monkeypatch.setattr(attacks, "RATES", (5e-3,))
    before = llm.state_dict()["model.layers.0.mlp.down_proj.weight"].clone()
    ids, mask = data.tokenize_answers([("What did Ada paint?", "birds")] * 4, tokenizer, 20)
    found = attacks.taught(llm, tokenizer, ids, mask, {"forget_qa": [{"query": "What did Ada paint?", "answer": "birds"}]}, (40,))
    assert found["by_step"]["0 0"] < 50 and found["score"] == max(found["by_step"].values())
    assert torch.equal(before, llm.state_dict()["model.layers.0.mlp.down_proj.weight"])


@given(arrays.arrays("float32", (3, 128), elements=st.floats(-1e4, 1e4, width=32)))
def test_rounding_is_within_half_a_level_and_keeps_what_is_a_level(weight):
    weight = torch.from_numpy(weight)
    for kind, gap in (("int8", 1 / 127), ("nf4", 0.32)):
        rounded = attacks.quantized(weight, kind)
        largest = weight.abs().amax(1, keepdim=True) if kind == "int8" else weight.reshape(-1, 64).abs().amax(1, keepdim=True).expand(
            -1, 64).reshape(weight.shape)
        assert ((rounded - weight).abs() <= gap / 2 * largest * 1.001 + 1e-9).all()
        assert torch.allclose(attacks.quantized(rounded, kind), rounded, rtol=1e-4)


def test_the_best_of_more_samples_is_no_worse():
    found = attacks.leaks([{"set": "forget_qa"}] * 2, [[0.0] * 31 + [1.0], [0.5] * 32])
    assert found["leak@1"] == pytest.approx(100 * (1 / 32 + 0.5) / 2)
    assert found["leak@8"] == pytest.approx(100 * (1 / 4 + 0.5) / 2) and found["leak@32"] == found["score"] == 75.0
    assert found["leak@1"] <= found["bound"] <= 100
    rows = [{"set": "forget_fb"}, {"set": "forget_qa"}]  # two sets count by RWKU's weights, as everywhere
    assert attacks.leaks(rows, [[1.0] * 32, [0.0] * 32])["score"] == pytest.approx(100 * 3268 / (3268 + 2879))


def test_the_likeliest_token_each_time_is_the_greedy_answer_whatever_stands_beside_it(case, tokenizer, monkeypatch):
    llm, asked = make_llm(), ["What?", "What did the quiet painter of birds and ships paint?", "Who painted?"]
    rows = evaluate.prompted({"forget_qa": [{"query": query, "answer": "birds"} for query in asked]}, tokenizer)
    monkeypatch.setattr(torch.Tensor, "multinomial", lambda likely, count: likely.argmax(1, keepdim=True))
    monkeypatch.setattr(evaluate, "recall", lambda row, text: {"score": text})
    greedy, _ = evaluate.answer(llm, tokenizer, [row["prompt"] for row in rows], tokens=16)
    assert attacks.sampled(llm, tokenizer, rows) == [[text.strip()] * attacks.SAMPLES for text in greedy]


def test_the_control_is_asked_about_a_made_up_name_and_only_what_names_the_target_is_asked(case):
    true, stranger, others = case
    for of in ("probes", "texts", "anonymous"):
        assert "Lark" not in str(getattr(stranger, of)).replace("larks", "") and str(getattr(true, of)) != str(getattr(stranger, of))
    assert all("Ada" in row["query"] or "Lark" in row["query"] for part in true.probes.values() for row in part)
    assert all(set(other) == {"Ada", "Lark"} for other in others) and [set(other) for other in stranger.anonymous] != [
        set(other) for other in true.anonymous]


def test_steering_is_added_once_before_the_first_token_and_without_a_difference_it_is_sampling(case, tokenizer, monkeypatch):
    llm, row = make_llm(), [{"query": "Who?", "answer": "birds"}]
    plain = case[0]._replace(probes={"forget_qa": row})  # no name in the question: nothing to add
    torch.manual_seed(0)
    sampled = attacks.sample(llm, tokenizer, plain)
    torch.manual_seed(0)
    assert attacks.steer(llm, tokenizer, plain) == sampled
    calls, block = [], llm.get_decoder().layers[0]
    rows = evaluate.prompted({"forget_qa": row}, tokenizer)
    real = block.register_forward_hook
    monkeypatch.setattr(block, "register_forward_hook", lambda hook: real(lambda *args: calls.append(args[2].shape) or hook(*args)))
    attacks.sampled(llm, tokenizer, rows, torch.ones(1, llm.config.hidden_size), block)
    assert calls == [(attacks.SAMPLES, 1, llm.config.hidden_size)]  # one token of 32 copies of the question, once
    assert not any(module._forward_hooks for module in llm.modules())


def test_runs_side_by_side_are_means_and_the_best_rate_counts(tmp_path):
    def run(name: str, method: str, score: float, seed: int = 0) -> str:
        (tmp_path / name).mkdir()
        scores = {"forget_all": 90.0, "neighbor_all": 90.0}
        settings = {"method": method, "corpus": "positive", "retain": "none", "retain_weight": 1, "lora": 0, "seed": seed}
        found = {"score": score, "by_step": {"0 0": 10.0, "1e-05 2": score, "3e-05 2": 20.0, "1e-05 4": 5.0, "3e-05 4": 30.0}}
        (tmp_path / name / "results.json").write_text(json.dumps({"target": "Ada", "settings": settings, "before": scores, "stages": []}))
        if score:
            (tmp_path / name / "attacks.json").write_text(json.dumps({"target": "Ada", "relearn": {
                "attacked": found, "untouched": found | {"score": 80.0}, "made up": found | {"score": 4.0}}}))
        return str(tmp_path / name)

    shown, out, plot = [], tmp_path / "t", evaluate.plot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "plot", lambda file, panels: shown.extend(panels) or plot(file, panels))
        attacks.work(["--compare", run("a", "atu", 40.0), run("b", "atu", 50.0, 1), run("c", "npo", 60.0), "--out", str(out)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "t.md").read_text().splitlines()]
    assert rows[0] == ["", "relearn", "runs"] and rows[2:] == [
        ["ATU + retain (F)", "45.0 (41.0 ± 7.1)", "2"], ["NPO (F)", "60.0 (56.0)", "1"], ["untouched", "80.0", "1"],
        ["made up", "4.0", "1"]]
    assert shown[0]["lines"]["ATU + retain (F)"] == ([0, 2, 4], [10.0, 45.0, 30.0])
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    for words, message in (([run("d", "ga", 0.0), "--out", str(out)], "attacks.json: cannot be read"),
                           ([str(tmp_path / "a"), "--out", "."], "cannot be written"),
                           ([str(tmp_path / "a"), "--rwku", "hub"], "goes with --by-type")):
        with pytest.raises(data.BadInput, match=message):
            attacks.work(["--compare", *words])
    for held, message in (("[1]", "cannot be read"), ("{}", "not what --json writes")):
        (tmp_path / "d" / "attacks.json").write_text(held)
        with pytest.raises(data.BadInput, match=message):
            attacks.work(["--compare", str(tmp_path / "d"), "--out", str(out)])

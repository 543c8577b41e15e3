"""The score against the package `rouge`, RWKU's prompts, and a model left as it was found."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge import Rouge

import data
import evaluate

words = st.lists(st.sampled_from(["a", "b", "c", "A", "1947", "1947,", "d.e", ".", "..", "é", "the"]), max_size=9)
blanks = st.sampled_from([" ", "  ", "\n", ". ", ".", " . "])


@settings(max_examples=3000)
@given(words, words, blanks, blanks)
def test_the_score_is_that_of_the_package_rouge(said, gold, blank, other):
    said, gold = blank.join(said), other.join(gold)
    if not gold.replace(".", ""):
        return  # the package raises
    if said and not said.replace(".", ""):
        assert evaluate.rouge_l_recall(said, gold) == 0
        return
    expected = Rouge(metrics=["rouge-l"]).get_scores(said or "NOANSWER", gold)[0]["rouge-l"]["r"]
    assert evaluate.rouge_l_recall(said, gold) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=300)
@given(st.text(max_size=30), st.text(min_size=1, max_size=30))
def test_the_score_on_any_text(said, gold):
    if not gold.replace(".", "") or not (said or "x").replace(".", ""):
        return
    expected = Rouge(metrics=["rouge-l"]).get_scores(said or "NOANSWER", gold)[0]["rouge-l"]["r"]
    assert evaluate.rouge_l_recall(said, gold) == pytest.approx(expected, abs=1e-12)


def test_the_score_by_hand():
    assert evaluate.rouge_l_recall("Berkshire Hathaway, Inc", "Berkshire Hathaway") == 0.5
    assert evaluate.rouge_l_recall("in 1947, he", "1947") == 0
    assert evaluate.rouge_l_recall("", "NOANSWER") == 1
    assert evaluate.rouge_l_recall("...", "x") == 0


def test_prompts(tokenizer):
    def prompt(score, kind=""):
        return evaluate.make_prompt(score, {"query": "Who?", "type": kind}, tokenizer)

    user = "<|user|>Please {}.\nQuestion: Who?\n<|end|><|assistant|>Answer:"
    assert prompt("forget_fb") == user.format("complete the blank in the following question")
    assert prompt("neighbor_fb") == prompt("forget_fb")
    for score, kind in (("forget_qa", ""), ("neighbor_qa", ""), ("general", ""), ("forget_aa", "cross lingual (French)")):
        assert prompt(score, kind) == user.format("briefly answer the following question")
    assert prompt("forget_aa", "affirmative suffix") == (
        "<|user|>Please briefly answer the following question.\nQuestion: Who?<|end|><|assistant|>")
    assert prompt("forget_aa", "incontext learning") == (
        "<|user|>Please briefly answer the following question.\nWho?\n<|end|><|assistant|>Answer:")


def test_scores_are_weighted_by_rwku_s_counts():
    marks = dict(zip(evaluate.SETS, (1.0, 0.0, 0.5, 1.0, 0.0, 0.25)))
    scores = evaluate.summary([{"set": name, "score": mark, "gold": mark / 2} for name, mark in marks.items()])
    assert scores["forget_all"] == pytest.approx(100 * (3268 + 0.5 * 6984) / 13131)
    assert scores["neighbor_all"] == pytest.approx(100 * 5846 / 11379)
    assert scores["general"] == 25 and scores["general_gold"] == 12.5


def test_greedy_answers_do_not_depend_on_batch_or_order(llm, tokenizer):
    prompts = ["What is Elm?", "Who painted all those birds of the sea?", "Elm", "Cora"]
    one = evaluate.answer(llm, tokenizer, prompts, batch=4, tokens=6)
    assert one == [evaluate.answer(llm, tokenizer, [p], batch=1, tokens=6)[0] for p in prompts]


def test_gold_probability_is_the_geometric_mean(llm, tokenizer):
    prompt, gold = "What is Elm?", "birds of the sea"
    head, tail = tokenizer(prompt)["input_ids"], tokenizer(" " + gold)["input_ids"]
    logp = llm(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    expected = sum(logp[len(head) + n - 1, token].item() for n, token in enumerate(tail)) / len(tail)
    found = evaluate.gold_probability(llm, tokenizer, [prompt, "Who was it that painted?"], [gold, "a"], batch=2)
    assert found[0] == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-3)


def test_evaluation_leaves_everything_as_it_was(llm, tokenizer, folders):
    probes = evaluate.read_probes(folders["rwku"], "Ada Lark")
    llm.train()
    before = {name: value.clone() for name, value in llm.state_dict().items()}
    random, side = torch.get_rng_state(), tokenizer.padding_side
    scores, rows = evaluate.evaluate(llm, tokenizer, probes)
    assert llm.training and tokenizer.padding_side == side and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], value) for name, value in llm.state_dict().items())
    assert len(rows) == sum(map(len, probes.values()))
    assert set(scores) == {name + ending for name in evaluate.SCORES for ending in ("", "_gold")}


def test_the_command(folders, tmp_path, capsys):
    arguments = ["--model", str(folders["llm"]), "--target", "ada lark", "--rwku", str(folders["rwku"]), "--device", "cpu"]
    assert evaluate.main([*arguments, "--json", str(tmp_path / "scores.json")]) == 0
    assert "Ada Lark" in capsys.readouterr().out
    content = json.loads((tmp_path / "scores.json").read_text())
    assert set(evaluate.SCORES) <= set(content) and {"prompt", "said", "score"} <= set(content["probes"][0])


@pytest.mark.parametrize("change, message", [
    (["--target", "Nobody"], "unknown"), (["--model", "./nowhere"], "no such folder"), (["--rwku", "nowhere"], "no such folder"),
    (["--json", "nowhere/x.json"], "cannot be written"), (["--json", "/"], "cannot be written"), (["--device", "cuda"], "not on this machine"), (["--batch", "0"], "at least 1")])
def test_bad_input(folders, capsys, change, message):
    if change[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one here")
    arguments = {"--model": str(folders["llm"]), "--target": "Ada Lark", "--rwku": str(folders["rwku"])} | {change[0]: change[1]}
    assert evaluate.main([word for pair in arguments.items() for word in pair]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_plots_are_written_whole(tmp_path):
    evaluate.plot(tmp_path / "a.png", [{"title": "t", "x": "x", "y": "y", "lines": {"l": ([0, 1], [1, 2])}}])
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

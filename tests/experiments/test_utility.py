"""RWKU's other sets: prompts, scores against oracles, the command."""

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from experiments import utility


def ask(llm, tokenizer, folders, sets, batch=80):
    return utility.score(llm, tokenizer, utility.read_probes(folders["rwku"], "Ada Lark", sets), batch)


@torch.no_grad()
def straight(llm, tokenizer, text, start=1):
    """Summed log-likelihood of a text's tokens from `start` on."""
    ids = tokenizer(text)["input_ids"]
    logits = llm(torch.tensor([ids])).logits[0]
    return sum(logits.log_softmax(-1)[n - 1, ids[n]].item() for n in range(start, len(ids)))


def test_truthfulqa_takes_the_likeliest_choice(llm, tokenizer, folders):
    scores, (row,) = ask(llm, tokenizer, folders, ["truthfulqa"])
    assert row["prompt"].startswith("<|user|>Q: What is human life expectancy") and row["prompt"].endswith(
        "in Barcelona, Spain.\n\nQ: Do birds fly?<|end|><|assistant|> A:")
    asked = len(tokenizer(row["prompt"])["input_ids"])
    choices = row["mc1_targets"]["choices"]
    likelihoods = [straight(llm, tokenizer, f"{row['prompt']} {choice}", asked) for choice in choices]
    best = likelihoods.index(max(likelihoods))
    assert row["said"] == choices[best] and row["score"] == (best == 0)
    assert scores["truthfulqa"] == 100 * (best == 0)


@pytest.mark.parametrize("label, expected", [(0, 0.0), (1, 1.0), (2, 0.0)])
def test_truthfulqa_is_right_where_the_true_answer_is_likeliest(llm, tokenizer, monkeypatch, label, expected):
    likely = {"a": -3.0, "b": -1.0, "c": -2.0}
    monkeypatch.setattr(utility, "log_probs", lambda llm, ids, start: torch.tensor(
        [likely[tokenizer.decode(ids)[-1]] / 2] * 2))
    targets = {"choices": [*"abc"], "labels": [int(n == label) for n in range(3)]}
    row = {"question": "Is it?", "mc1_targets": targets}
    scores, (row,) = utility.score(llm, tokenizer, {"truthfulqa": [row]}, 1)
    assert row["said"] == "b" and scores == {"truthfulqa": 100 * expected}


def test_mia_is_the_loss_of_the_text(llm, tokenizer, folders):
    scores, rows = ask(llm, tokenizer, folders, ["mia"])
    assert len(rows) == 3
    for row in rows:
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        assert row["score"] == pytest.approx(llm(ids, labels=ids).loss.item(), rel=1e-5)
    assert scores["mia_forget"] == pytest.approx(100 * rows[0]["score"])
    assert scores["mia_retain"] == pytest.approx(50 * (rows[1]["score"] + rows[2]["score"]))


def test_a_text_of_one_token_has_no_loss(llm, tokenizer):
    scores, rows = utility.score(llm, tokenizer, {"mia_forget": [{"text": "a"}, {"text": "a bird"}]}, 1)
    assert "score" not in rows[0] and scores["mia_forget"] == pytest.approx(100 * rows[1]["score"])


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["a", "The", "sea", "Sea,", "birds", "b."]), max_size=6),
       st.lists(st.sampled_from(["an", "the", "sea", "bird's", "b"]), max_size=6))
def test_f1_counts_words_without_case_punctuation_and_articles(said, gold):
    def words(text):
        bare = (re.sub(r"[^\w]", "", word).lower() for word in text)
        return sorted(word for word in bare if word not in ("a", "an", "the"))

    one, two = words(said), words(gold)
    common = sum(min(one.count(word), two.count(word)) for word in set(one))
    expected = 2 * common / (len(one) + len(two)) if one and two else float(one == two)
    assert utility.f1(" ".join(said), " ".join(gold)) == pytest.approx(expected)


def test_bbh_reports_the_right_figure_and_rwku_s(llm, tokenizer, folders, monkeypatch):
    asked = []
    for said, exact, rwku in (("So the answer is Yes. And", 1, 0), ("the answer is (A).", 0, 0),
                              ("no idea", 0, 0), ("y", 0, 1)):
        monkeypatch.setattr(evaluate, "answer", lambda *a: asked.append(a[2:]) or [said])
        scores, (row,) = ask(llm, tokenizer, folders, ["bbh"])
        assert (row["score"], row["rwku"], row["said"]) == (exact, rwku, said)
        assert scores == {"bbh": 100 * exact, "bbh_rwku": 100 * rwku}
    assert asked[0] == ([row["prompt"]], 80, 256, ())
    assert row["prompt"] == (
        "<|user|>Think.\n\nQ: Is it?\nA: So the answer is yes.\n\nFollowing previous examples, answer the "
        "following questions and end with 'so the answer is'\nQ: Is it?<|end|><|assistant|> A:")


def test_triviaqa_asks_after_five_examples_and_takes_the_best_alias(llm, tokenizer, folders, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "answer", lambda *a: asked.append(a[2:]) or ["Some bats."])
    scores, (row,) = ask(llm, tokenizer, folders, ["triviaqa"])
    assert asked == [([row["prompt"]], 80, 30, ("<|eot_id|>",))]
    assert scores["triviaqa"] == pytest.approx(100 * 2 / 3)
    assert row["prompt"].startswith("<|user|>\nQ: When did men's figure skating become a summer Olympic "
                                    "sport?\nA: 1908\nQ: When did")
    assert row["prompt"].endswith("A: series finale\nPlease briefly answer the following question:\n"
                                  "Q: Which animals fly?\n<|end|><|assistant|>A:")


def test_fluency_asks_for_free_answers_of_256_tokens(llm, tokenizer, folders, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "answer", lambda *a: asked.append(a[2:]) or ["one two three four five"])
    scores, (row,) = ask(llm, tokenizer, folders, ["fluency"])
    prompt = "<|user|>Instruction: Write about birds.\n<|end|><|assistant|>"
    assert asked == [([prompt], 80, 256, ("<|eot_id|>",))] and row["prompt"] == prompt
    assert scores["fluency"] == pytest.approx(100 * utility.entropy("one two three four five"))


def test_entropy():
    assert utility.entropy("one two three four five") == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    assert utility.entropy("a a a a a a") == 0 == utility.entropy("")
    assert utility.entropy("a b a b") == pytest.approx((2 / 3 * (math.log2(3) - 2 / 3) + 4 / 3) / 2)


@pytest.fixture
def words(folders):
    return ["--model", str(folders["llm"]), "--target", "ada lark", "--rwku", str(folders["rwku"]),
            "--device", "cpu"]


def test_the_command(words, folders, capsys, tmp_path):
    assert utility.main([*words, "--json", str(tmp_path / "s.json")]) == 0
    assert "Ada Lark" in capsys.readouterr().out
    content = json.loads((tmp_path / "s.json").read_text())
    names = {"bbh", "bbh_rwku", "truthfulqa", "triviaqa", "fluency", "mia_forget", "mia_retain"}
    assert names <= set(content) and content["target"] == "Ada Lark"
    assert content["precision"] == "torch.float32"
    assert {row["set"] for row in content["probes"]} == names - {"bbh_rwku"}
    assert all({"prompt", "said", "score"} <= set(row) for row in content["probes"])


def test_it_keeps_host_and_card_apart(card, words, monkeypatch):
    monkeypatch.setattr(utility, "WORDS", {name: (4, *rest) for name, (_, *rest) in utility.WORDS.items()})
    with card():
        assert utility.main([*words, "--device", "cuda"]) == 0


@pytest.mark.parametrize("change, message", [
    (["--target", "Nobody"], "not among"), (["--model", "./nowhere"], "no such folder"),
    (["--rwku", "nowhere"], "no such folder"), (["--json", "nowhere/x.json"], "cannot be written"),
    (["--json", "/"], "cannot be written"), (["--json", ".."], "cannot be written"), (["--batch", "0"], "at least 1")])
def test_bad_input(words, capsys, change, message):
    assert utility.main([*words, *change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_row_that_lacks_a_field_is_named(words, folders, capsys, tmp_path):
    for file in (folders["rwku"] / "0_Ada_Lark").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "truthful.json").write_text(json.dumps([{"subject": "Ada Lark", "question": "Is it?"}]))
    assert utility.main([*words, "--rwku", str(tmp_path), "--sets", "truthfulqa"]) == 2
    assert "truthful.json: row 0 has nothing in field 'mc1_targets'" in capsys.readouterr().err

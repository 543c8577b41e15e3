"""A passage is forgotten word for word: its pieces, its concept, its scores."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atu
import data
import train
from conftest import make_tokenizer
from experiments import passages
from runs import check_cuts

TOKENIZER = make_tokenizer()
RUN = ("--preset smol --device cpu --length 24 --batch 2 --align-batch 4 --log-every 1 --llm-lr 1e-3 "
       "--no-bf16 --window 4 --layer 2 --head-depth 1 --head-width 16 --align-steps 3 --realign-steps 2 "
       "--taus 0.2 -0.5 --unlearn-steps 2 --stop-at 0").split()


@settings(max_examples=50)
@given(st.integers(20, 90), st.integers(5, 40))
def test_pieces_cover_a_passage_and_its_end(tokens, length):
    text = TOKENIZER.decode(TOKENIZER("the sea and the birds " * 30)["input_ids"][:tokens])
    ids = TOKENIZER(text)["input_ids"]
    parts = [TOKENIZER(part)["input_ids"] for part in passages.pieces(text, TOKENIZER, length)]
    assert all(len(part) <= length for part in parts) and parts[-1] == ids[-min(length, len(ids)):]
    assert sum(map(len, parts)) >= len(ids) and parts[0] == ids[:length]


def test_pieces_leave_room_for_special_tokens(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "num_special_tokens_to_add", lambda: 2)
    parts = passages.pieces("the sea and the birds " * 9, tokenizer, 12)
    assert max(len(tokenizer(part)["input_ids"]) for part in parts) == 10


def test_a_passage_is_continued_word_for_word(llm, tokenizer, monkeypatch):
    text = " ".join(["Ada Lark painted birds by the sea."] * 12)
    ids = tokenizer(text)["input_ids"]
    row = passages.continued(llm, tokenizer, text)
    assert row["prompt"] == tokenizer.decode(ids[:-50]).strip()
    assert row["wanted"] == tokenizer.decode(ids[-50:]).strip()
    greedy = llm.generate(torch.tensor([ids[:-50]]), max_new_tokens=50, do_sample=False)[0, len(ids) - 50:]
    assert row["said"] == tokenizer.decode(greedy, skip_special_tokens=True).strip()
    assert row["exact"] == (greedy == torch.tensor(ids[-50:])[:len(greedy)]).sum().item() / 50
    logits = llm(torch.tensor([ids])).logits[0].log_softmax(-1)
    logp = sum(logits[n - 1, ids[n]].item() for n in range(len(ids) - 50, len(ids)))
    assert row["probability"] == pytest.approx(math.exp(logp / 50), rel=1e-4)
    monkeypatch.setattr(llm, "generate", lambda *_, **__: torch.tensor([ids[:-25] + [ids[0]] + ids[-24:]]))
    assert passages.continued(llm, tokenizer, text)["exact"] == 49 / 50
    monkeypatch.setattr(llm, "generate", lambda *_, **__: torch.tensor([ids]))
    row = passages.continued(llm, tokenizer, text)
    assert row["score"] == row["exact"] == 1


def test_of_a_short_text_the_first_quarter_is_given(llm, tokenizer):
    text = tokenizer.decode(tokenizer("the birds of the sea " * 9)["input_ids"][:40])
    row = passages.continued(llm, tokenizer, text)
    assert len(tokenizer(row["prompt"])["input_ids"]) == 10


@pytest.fixture
def command(words, tmp_path):
    (tmp_path / "passage.txt").write_text("Ada Lark painted the birds of the sea. " * 4)
    (tmp_path / "kept.txt").write_text("Ben Crow built bridges of stone over the river. " * 4)
    return [*words[2:], *RUN, "--passage", str(tmp_path / "passage.txt"), "--out", str(tmp_path / "run")]


def test_a_passage_is_forgotten(command, tmp_path, capsys):
    assert passages.main([*command, "--keep", str(tmp_path / "kept.txt")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["after"]) == {"general", "general_words", "forget_all", "forget_exact", "forget_probability",
                                     "neighbor_all", "neighbor_exact", "neighbor_probability"}
    assert results["target"] == "passage" and len(results["stages"]) == 2
    assert results["before"]["forget_probability"] != results["after"]["forget_probability"]
    assert "forget all" in capsys.readouterr().out
    assert passages.main([*command, "--keep", str(tmp_path / "kept.txt"), "--resume"]) == 0  # it has ended


def test_a_run_keeps_host_and_card_apart(card, command, quick):
    with card():
        assert passages.main([*command, "--device", "cuda", "--taus", "0.2"]) == 0


def test_a_run_that_is_cut_off_goes_on_as_if_it_had_not_been(command, tmp_path, monkeypatch, quick):
    check_cuts(passages.main, command[:-2], tmp_path, monkeypatch)


def test_it_ends_where_enough_is_forgotten(command, tmp_path, monkeypatch, quick):
    row = {"prompt": "", "said": "", "wanted": "", "exact": 0.5, "probability": 0.25}
    scores = iter((1.0, 0.2))
    monkeypatch.setattr(passages, "continued", lambda *_: row | {"score": next(scores)})
    assert passages.main([*command, "--stop-at", "0.25"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["stages"]) == 1 and results["before"]["forget_all"] == 100
    scores = {name: value for name, value in results["after"].items() if name.startswith("forget")}
    assert scores == {"forget_all": 20, "forget_exact": 50, "forget_probability": 25}


@pytest.mark.parametrize("length", [60, 24])
def test_the_concept_is_what_the_pieces_have_in_common(command, encoder, tmp_path, monkeypatch, length):
    found = []
    monkeypatch.setattr(atu, "align_then_unlearn", lambda *a: found.append(a) or iter(()))
    config = train.parse(passages.Config, [*command, "--length", str(length)])
    work = train.load(config)
    state, _ = passages.begin(work, config)
    _, concept, corpus, original, _ = found[-1]
    text = ("Ada Lark painted the birds of the sea. " * 4).strip()
    parts = passages.pieces(text, work.tokenizer, length)
    assert len(parts) == (1 if length == 60 else 2) and corpus.about.sum() == len(parts)
    expected = torch.nn.functional.normalize(data.embed(parts, encoder).mean(0), dim=0)
    assert torch.allclose(concept, expected, atol=1e-6)
    texts = [work.tokenizer.decode(ids[mask]) for ids, mask in zip(corpus.input_ids, corpus.mask)]
    assert texts[:len(parts)] == parts
    assert len(original) == (~corpus.about).sum() == len(work.others) and state.stage == 0


def test_the_settings_of_a_passage(tmp_path):
    config = train.parse(passages.Config, ["--passage", "some/Our Licence.txt", "--device", "cpu"])
    assert (config.target, config.texts, config.sets) == ("Our Licence", "some/Our Licence.txt", ("general",))
    assert config.out == "runs/our-licence-passage"
    config = train.parse(passages.Config, ["--passage", "x.txt", "--preset", "phi3", "--device", "cpu"])
    assert config.sets == ("mmlu",)


@pytest.mark.parametrize("content, message", [
    (None, "not readable"), (" \n", "15 or more"), ("A text.", "15 or more"), (b"\xff" * 99, "not readable")])
def test_passages_that_cannot_be_forgotten(command, capsys, tmp_path, content, message):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    for flag in ("--passage", "--keep"):
        assert passages.main([*command, flag, str(tmp_path / "p.txt")]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()


def test_without_a_passage(capsys):
    assert passages.main(["--device", "cpu"]) == 2
    assert capsys.readouterr().err == "error: --passage FILE: which text shall the model forget?\n"

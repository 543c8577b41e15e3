"""The commands on a pretended CUDA device: nothing that they do mixes the host's tensors with the card's."""

import json

import pytest
import torch

import atu
import evaluate
import losses
import train
from pretend import Mixed, card, on_card
from runs import cut_off

pytestmark = pytest.mark.usefixtures("quick")
RUN = ("--preset smol --device cuda --no-bf16 --length 24 --batch 4 --log-every 1 --llm-lr 1e-3 --stop-at 0 "
       "--window 4 --layer 2 --head-depth 1 --head-width 32 --align-steps 3 --realign-steps 2 "
       "--unlearn-steps 2 --taus 0.2 -0.5 --sets general").split()
RUNS = {"all sets": ["--sets", *evaluate.SETS], "adapters": ["--lora", "2"],
        "input embedding": ["--train-embeddings"], "activations computed again": ["--checkpointing"],
        "states on the host": ["--cache", "host"],
        "SGD, no retain term": ["--optimizer", "sgd", "--retain-weight", "0"]}


@pytest.fixture
def words(words, tmp_path):
    return [*words, *RUN, "--out", str(tmp_path / "run")]


@pytest.fixture
def stepped(monkeypatch):
    """Of every parameter that an optimizer's step was made for: whether it lay on the card."""
    placed, real = [], atu.clip_grad_norm_

    def clip(parameters, *a, **k):
        parameters = list(parameters)
        placed.extend(map(on_card, parameters))
        return real(parameters, *a, **k)

    monkeypatch.setattr(atu, "clip_grad_norm_", clip)
    return placed


@pytest.mark.parametrize("name", RUNS)
def test_a_run_keeps_host_and_card_apart(words, stepped, tmp_path, name):
    with card():
        assert train.main([*words, *RUNS[name]]) == 0
    assert stepped and all(stepped)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["settings"]["device"] == "cuda"


def test_a_run_that_was_cut_off_goes_on_on_the_card(words, stepped, tmp_path, monkeypatch):
    with card():
        cut_off(train.main, words, monkeypatch)
        stepped.clear()
        assert train.main([*words, "--resume"]) == 0
    assert stepped and all(stepped)


def test_a_saved_model_is_scored_and_asked_on_the_card(folders, capsys, tmp_path):
    asked = ["--model", str(folders["llm"]), "--device", "cuda"]
    target = ["--target", "Ada Lark", "--rwku", str(folders["rwku"]), "--sets", *evaluate.SETS]
    with card():
        assert evaluate.main([*asked, *target, "--json", str(tmp_path / "scores.json")]) == 0
        assert evaluate.main([*asked, "--ask", "Who is Ada Lark?", "And Ben Crow?"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {"forget_all", "neighbor_all", "mmlu", "general"} <= scores.keys()
    assert "Q: Who is Ada Lark?\n" in capsys.readouterr().out


def host_mask(monkeypatch):
    real = evaluate.answering_copy

    def copied(*a):
        llm = real(*a)
        generate = llm.generate
        llm.generate = lambda attention_mask, **how: generate(attention_mask=attention_mask.cpu(), **how)
        return llm

    monkeypatch.setattr(evaluate, "answering_copy", copied)


def host_concept(monkeypatch):
    real = losses.unlearning_loss
    monkeypatch.setattr(atu, "unlearning_loss", lambda a, concept, *rest: real(a, concept.cpu(), *rest))


def card_index(monkeypatch):
    real = atu.draw
    monkeypatch.setattr(atu, "draw", lambda *a: real(*a).to("cuda"))


def numpy_on_card(monkeypatch):
    real = losses.cosine
    monkeypatch.setattr(atu, "cosine", lambda *a: torch.from_numpy(real(*a).detach().numpy()))


@pytest.mark.parametrize("fault", [host_mask, host_concept, card_index, numpy_on_card])
def test_a_planted_fault_is_found(words, monkeypatch, fault):
    fault(monkeypatch)
    with card(), pytest.raises(Mixed):
        train.main(words)

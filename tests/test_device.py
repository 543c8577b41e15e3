"""Every method on a pretended CUDA device: nothing that a run does mixes the host's tensors with the card's."""

import json

import pytest
import torch

import atu
import evaluate
import losses
import train
from pretend import Mixed, card, on_card

RUN = "--preset smol --device cuda --no-bf16 --names 0 --length 24 --batch 4 --log-every 1 --llm-lr 1e-3 --stop-at 0".split()
ATU = [*RUN, *"--window 4 --layer 2 --head-depth 1 --head-width 32 --align-steps 3 --realign-steps 2 --unlearn-steps 2 "
       "--taus 0.2 -0.5".split()]
TOKENS = [*RUN, *"--unlearn-steps 2 --stages 2 --warmup 1".split()]
RUNS = {
    "atu": [*ATU, "--names", "2", "--stranger-steps", "2", "--sets", *evaluate.SETS], "atu, adapters": [*ATU, "--lora", "2"], "atu, input embedding": [*ATU, "--train-embeddings"],
    "atu, activations computed again": [*ATU, "--checkpointing"],
    "atu, states on the host": [*ATU, "--cache", "host", "--names", "2", "--stranger-steps", "2"],
    "atu by SGD, no retain term": [*ATU, "--optimizer", "sgd", "--retain-weight", "0"],
    "ga + nll": [*TOKENS, "--names", "2", "--method", "ga", "--retain", "nll"], "npo + kl": [*TOKENS, "--method", "npo", "--retain", "kl"],
    "npo + kl, adapters": [*TOKENS, "--method", "npo", "--retain", "kl", "--lora", "2"],
    "dpo": [*TOKENS, "--method", "dpo"], "rt": [*TOKENS, "--method", "rt"], "icu": [*RUN[:7], "--method", "icu"],
}


@pytest.fixture
def words(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "pretended")
    monkeypatch.setattr(evaluate, "WORDS", {name: (4, *rest) for name, (_, *rest) in evaluate.WORDS.items()})  # short answers
    return ["--target", "Ada Lark", "--model", str(folders["llm"]), "--rwku", str(folders["rwku"]), "--out", str(tmp_path / "run")]


def encoder_of(method: list[str], folders) -> list[str]:
    return [] if "--method" in method else ["--encoder", str(folders["encoder"])]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_keeps_host_and_card_apart(words, folders, tmp_path, monkeypatch, name):
    placed = []
    real = atu.optimize
    monkeypatch.setattr(atu, "optimize", lambda terms, optimizer, clip: placed.extend(
        on_card(p) for group in optimizer.param_groups for p in group["params"]) or real(terms, optimizer, clip))
    with card():
        assert train.main([*words, *encoder_of(RUNS[name], folders), *RUNS[name]]) == 0
    assert all(placed) and (placed or name == "icu")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["settings"]["device"] == "cuda"


def host_mask(monkeypatch):
    real = evaluate.side_by_side
    monkeypatch.setattr(evaluate, "side_by_side", lambda *a: (lambda ids, mask, cache: (ids, mask.cpu(), cache))(*real(*a)))


def card_index(monkeypatch):
    real = atu.draw
    monkeypatch.setattr(atu, "draw", lambda *a: real(*a).to("cuda"))


def numpy_on_card(monkeypatch):
    real = losses.cosine
    monkeypatch.setattr(atu, "cosine", lambda *a: torch.from_numpy(real(*a).detach().numpy()))


@pytest.mark.parametrize("fault", [host_mask, card_index, numpy_on_card])
def test_a_planted_fault_is_found(words, folders, monkeypatch, fault):
    fault(monkeypatch)
    with card(), pytest.raises(Mixed):
        train.main([*words, *encoder_of(ATU, folders), *ATU])

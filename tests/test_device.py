"""On a GPU the commands do what they do on a CPU, and mix the host's tensors with the card's nowhere. Here on a
pretended card (pretend.py); `python -m pytest -m cuda` runs the same on a real one."""

import json

import pytest
import torch

import atu
import data
import evaluate
import losses
import train
from head import EmbeddingHead
from pretend import Mixed, on_card
from pretend import card as pretended
from runs import cut_off, records

pytestmark = pytest.mark.usefixtures("quick")
RUN = ("--preset smol --length 24 --batch 4 --log-every 1 --llm-lr 1e-3 --stop-at 0 --window 4 --layer 2 "
       "--head-depth 1 --head-width 32 --align-steps 5 --realign-steps 2 --unlearn-steps 4 --taus 0.2 -0.5 "
       "--sets general --max-active 0").split()
RUNS = {"all sets": ["--sets", *evaluate.SETS], "adapters": ["--lora", "2"],
        "input embedding": ["--train-embeddings"], "activations computed again": ["--checkpointing"],
        "states on the host": ["--cache", "host"],
        "SGD, no retain term": ["--optimizer", "sgd", "--retain-weight", "0"]}
LOSSES = {"predicted": lambda a, b, mask: a.square().mean(),
          "alignment": losses.alignment_loss,
          "unlearning": lambda a, b, mask: losses.unlearning_loss(a, b[0, 0], mask, -0.3),
          "retain": losses.retain_loss}


@pytest.fixture
def main(words, tmp_path):
    """train.py in a folder of this name, on a device."""
    def main(name: str, device: str, *flags: str) -> int:
        return train.main([*words, *RUN, "--out", str(tmp_path / name), "--device", device, *flags])
    return main


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


def assert_alike(folder, other, tolerance: float = 1e-3) -> None:
    """The losses of the first ten steps are those of another run, which has as many."""
    one, two = ([record["loss"] for record in records(run) if "loss" in record] for run in (folder, other))
    assert len(one) == len(two) >= 10 and one[:10] == pytest.approx(two[:10], rel=tolerance, abs=tolerance)


def value_and_gradients(name: str, device: str, bf16: bool) -> list[torch.Tensor]:
    """Of a loss of E's predictions, by E's weights and its input."""
    torch.manual_seed(0)
    head, mask = EmbeddingHead(24, 16, 2, 32), torch.rand(3, 9) > 0.3                    # (B, T)
    hidden, other = torch.randn(3, 9, 24), torch.randn(3, 9, 16)                         # (B, T, D), (B, T, C)
    head, hidden, other, mask = (part.to(device) for part in (head, hidden, other, mask))
    hidden.requires_grad_()
    with atu.autocast(torch.device(device), bf16):
        predicted = head(hidden).float()                                                 # (B, T, C)
    loss = LOSSES[name](predicted, other, mask)
    loss.backward()
    return [part.detach().cpu() for part in (loss, hidden.grad, *(p.grad for p in head.parameters()))]


@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-5), (True, 2e-2)])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_those_of_the_cpu(card, name, bf16, tolerance):
    expected = value_and_gradients(name, "cpu", False)
    with card():
        found = value_and_gradients(name, "cuda", bf16)
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    for one, two in zip(found, expected, strict=True):  # gradients: attention's products round otherwise
        torch.testing.assert_close(one, two, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_keeps_host_and_card_apart_and_has_the_losses_of_the_cpu_s(card, main, stepped, tmp_path, name):
    with card():
        assert main("run", "cuda", "--no-bf16", *RUNS[name]) == 0
    assert stepped and all(stepped)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["settings"]["device"] == "cuda"
    assert main("cpu", "cpu", "--no-bf16", *RUNS[name]) == 0
    assert_alike(tmp_path / "run", tmp_path / "cpu")


def test_a_run_in_bf16_has_nearly_the_losses_of_the_cpu_s(card, main, tmp_path):
    with card():
        assert main("run", "cuda") == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["settings"]["bf16"]
    assert main("cpu", "cpu", "--no-bf16") == 0
    assert_alike(tmp_path / "run", tmp_path / "cpu", 3e-2)


@pytest.mark.parametrize("first, then", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_that_was_cut_off_goes_on_there_and_on_the_other_side(card, main, stepped, tmp_path, monkeypatch,
                                                                    first, then):
    with card():
        cut_off(lambda flags: main("run", first, *flags), ["--no-bf16"] * (first == "cpu"), monkeypatch, 2)
        stepped.clear()
        assert then == "cpu" or main("run", then, "--resume") == 0
    assert then == "cuda" or main("run", then, "--resume") == 0
    assert stepped and set(stepped) == {then == "cuda"}
    assert main("cpu", "cpu", "--no-bf16") == 0
    assert_alike(tmp_path / "run", tmp_path / "cpu", 3e-2)


def test_a_saved_model_is_scored_and_asked_on_the_card(card, folders, capsys, tmp_path):
    asked = ["--model", str(folders["llm"]), "--device", "cuda"]
    target = ["--target", "Ada Lark", "--rwku", str(folders["rwku"]), "--sets", *evaluate.SETS]
    with card():
        assert evaluate.main([*asked, *target, "--json", str(tmp_path / "scores.json")]) == 0
        assert evaluate.main([*asked, "--ask", "Who is Ada Lark?", "And Ben Crow?"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {"forget_all", "neighbor_all", "mmlu", "general"} <= scores.keys()
    assert "Q: Who is Ada Lark?\n" in capsys.readouterr().out


def test_padded_prompts_are_read_in_bf16_as_each_is_alone(card, folders):
    prompts = ["Who?", "Who is Ada Lark?", "Who painted the harbour, and where was Ada Lark born? " * 3]
    with card():
        llm, tokenizer = data.load_llm(str(folders["llm"]), "cuda", torch.bfloat16)

        def scores(some: list[str]) -> torch.Tensor:
            turns = tokenizer(some, return_tensors="pt", padding=True, padding_side="left").to("cuda")
            return data.generate(llm, turns, max_new_tokens=1, do_sample=False, output_logits=True,
                                 pad_token_id=tokenizer.pad_token_id,
                                 return_dict_in_generate=True).logits[0].float().cpu()            # (B, V)

        together, alone = scores(prompts), torch.cat([scores([prompt]) for prompt in prompts])
    assert alone.std() > 0.1
    torch.testing.assert_close(together, alone, rtol=2e-2, atol=2e-2)


# ---- what the pretended card finds

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
def test_a_planted_fault_is_found(main, monkeypatch, fault):
    fault(monkeypatch)
    with pretended(), pytest.raises(Mixed):
        main("run", "cuda", "--no-bf16")

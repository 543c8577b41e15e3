"""The benchmark on tiny models: what it prints, that both loops do the same work, and that memory adds up."""

import dataclasses
import re
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import atu
import train
from experiments import benchmark

CONFIG = train.Config(**benchmark.TINY, device="cpu", bf16=False)


def test_it_prints_both_steps_beside_the_straightforward_ones(capsys):
    assert benchmark.main("--shape tiny --rounds 2 --device cpu".split()) == 0
    shown = capsys.readouterr().out
    for name in ("alignment step", "unlearning step"):
        (line,) = re.findall(rf"^{name} \| (.*)$", shown, re.MULTILINE)
        for part in ("ours", "straightforward"):
            found = re.search(rf"{part} ([\d.]+) ms \(([\d.]+) to ([\d.]+)\)", line)
            middle, least, most = map(float, found.groups())
            assert 0 < least <= middle <= most
        assert line.endswith(" x | 2 rounds") and "| floor " in line
    assert "caches | " in shown and "all alignment | 252 texts, 590 steps | ours " in shown


def test_medians_and_spreads_are_of_the_rounds_after_the_first(capsys, monkeypatch):
    def seconds(work, device: str) -> float:
        return next(work() if work in steps else iter([1.0]))

    ours, other = iter([9.0, 0.1, 0.3, 0.2, 0.0]), iter([9.0, 0.4, 0.8, 0.6])
    steps = [lambda: asked.append("ours") or ours, lambda: asked.append("other") or other]
    asked = []
    monkeypatch.setattr(benchmark, "seconds", seconds)
    optimizer = torch.optim.SGD([torch.zeros(2**20, requires_grad=True)])
    found = benchmark.measure("a step", CONFIG, 3, optimizer, *steps)
    assert found == {"ours": 0.2, "straightforward": 0.6, "floor": pytest.approx(28 * 2**20 / 2**25)}
    assert asked == ["ours", "other"] * 4 + ["ours"]
    assert capsys.readouterr().out == ("a step | ours 200.0 ms (100.0 to 300.0) | floor 875.0 ms | "
                                       "straightforward 600.0 ms (400.0 to 800.0) | 3.0 x | 3 rounds\n")


def test_a_straightforward_step_of_unlearning_moves_what_ours_moves():
    """A step of each from the same weights, on a batch that is all there is."""
    def moved(step) -> dict:
        torch.manual_seed(0)
        llm, head = benchmark.make_models("tiny", config, "cpu")
        was = {name: value.clone() for name, value in llm.state_dict().items()}
        retain = ids + 1, real, atu.all_hidden_states(llm, ids + 1, config.layer, 2)
        step(llm, head.requires_grad_(False), train.llm_optimizer(llm, config), retain)
        return {name: value - was[name] for name, value in llm.state_dict().items()}

    config = dataclasses.replace(CONFIG, optimizer="sgd", llm_lr=1.0)
    torch.manual_seed(1)
    ids, concept, real = torch.randint(2, 400, (2, 16)), torch.randn(16), torch.ones(2, 16, dtype=torch.bool)
    ours = moved(lambda llm, head, optimizer, retain: list(atu.unlearn(
        llm, head, optimizer, ids, real, concept, -1.0, retain, layer=config.layer, steps=1, batch=2)))
    other = moved(lambda llm, head, optimizer, retain: benchmark.straightforward_unlearning(
        llm, head, optimizer, ids, concept, retain, config))
    assert ours["model.layers.1.mlp.up_proj.weight"].abs().max() > 1e-4
    for name, value in ours.items():
        assert torch.allclose(value, other[name], atol=1e-6), name


def test_ours_does_less_in_alignment_than_the_whole_model_and_the_encoder(monkeypatch):
    counted = {}

    def measure(name, config, rounds, optimizer, *steps):
        for step in steps:
            step()
            with FlopCounterMode(display=False) as counter:
                step()
            counted.setdefault(name, []).append(counter.get_total_flops())
        return {"ours": 1.0, "straightforward": 1.0}

    monkeypatch.setattr(benchmark, "measure", measure)
    benchmark.measure_speed("tiny", CONFIG, 1)
    for ours, straightforward in counted.values():
        assert 0 < ours < straightforward


def test_simulated_memory_is_that_of_real_tensors(monkeypatch):
    peaks = {}
    for name, changed in {"sgd": {"optimizer": "sgd"}, "adamw": {}, "lora, checkpointing": {
            "lora": 8, "checkpointing": True}}.items():
        config = dataclasses.replace(CONFIG, **changed)
        peaks[name] = benchmark.simulated_peak("tiny", config)
        with monkeypatch.context() as patch:
            patch.setattr(benchmark, "FakeTensorMode", lambda **_: nullcontext())
            real = benchmark.simulated_peak("tiny", config)
        assert peaks[name] == pytest.approx(real, rel=0.02)
    llm, _ = benchmark.make_models("tiny", CONFIG, "cpu")
    moving = 4 * sum(parameter.numel() for parameter in llm.parameters() if parameter.requires_grad)
    assert peaks["lora, checkpointing"] < peaks["sgd"] <= peaks["adamw"] - moving


def test_memory_counts_what_there_is_once_and_remembers_the_most():
    with benchmark.Memory() as memory:
        a = torch.zeros(100)
        b = a.view(10, 10) + 1
        assert memory.peak == 800  # a view is no more memory
        del b
        c = torch.zeros(50)
        assert memory.peak == 800 and sum(memory.sizes.values()) == 600
        d = torch.zeros(200)
        assert memory.peak == 1400
    assert len(a) + len(c) + len(d) == 350


def test_memory_is_shown_for_every_layer_and_way(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark, "simulated_peak", lambda *given: asked.append(given) or 42e9)
    assert benchmark.main("--shape phi3 --memory --device cpu".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("phi3 | cpu | ") and lines[0].endswith(" | bf16")
    assert len(lines) == 22 and len(asked) == 15
    assert re.fullmatch(r"memory \| layer 10 \| the letters of 16 .* \| 17\.\d GB", lines[16])
    assert "memory | layer 29 | full | sgd | activations kept | 42.0 GB" in lines
    assert "memory | layer 10 | LoRA 8 | adamw | checkpointing | 42.0 GB" in lines
    preset = train.Config(**train.PRESETS["phi3"])
    assert ("phi3", dataclasses.replace(preset, device="cpu")) in asked  # --preset phi3 as it is

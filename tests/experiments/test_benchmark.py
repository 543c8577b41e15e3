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


def test_bad_input(capsys):
    assert benchmark.main(["--rounds", "0"]) == 2 and "--rounds 0: must be at least 1" in capsys.readouterr().err


def test_medians_and_spreads_are_of_the_rounds_after_the_first(capsys, monkeypatch):
    def seconds(work, device: str) -> float:
        return next(work() if work in steps else iter([1.0]))

    ours, other = iter([9.0, 0.1, 0.3, 0.2, 0.0]), iter([9.0, 0.4, 0.8, 0.6])
    steps = [lambda: asked.append("ours") or ours, lambda: asked.append("other") or other]
    asked = []
    monkeypatch.setattr(benchmark, "seconds", seconds)
    optimizer = torch.optim.SGD([torch.zeros(2**20, requires_grad=True)])
    found = benchmark.measure("a step", CONFIG, 3, optimizer, *steps)
    assert found == {"ours": 0.2, "straightforward": 0.6, "floor": pytest.approx(28 * 2**20 / 2**25 / 20)}
    assert asked == ["ours", "other"] * 4 + ["ours"]
    assert capsys.readouterr().out == ("a step | ours 200.0 ms (100.0 to 300.0) | floor 43.8 ms | "
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


def test_answers_without_a_cache_save_its_memory():
    config, tokens = benchmark.SHAPES["tiny"][1], 200
    kept = 2 * 4 * tokens * CONFIG.eval_batch * config.num_hidden_layers * config.hidden_size  # fp32
    cached, plain = (benchmark.simulated_answers("tiny", CONFIG, tokens, cache) for cache in (True, False))
    assert kept / 4 < cached - plain <= kept


def test_a_run_s_operations_are_those_of_its_steps():
    def count(**changed) -> float:
        return benchmark.operations("tiny", dataclasses.replace(CONFIG, **changed))

    llm, head = benchmark.make_models("tiny", CONFIG, "cpu")
    ids, optimizer = torch.randint(2, 402, (4, CONFIG.length)), train.llm_optimizer(llm, CONFIG)
    ours, *_ = benchmark.unlearning(llm, head, optimizer, ids, "tiny", CONFIG)
    next(ours)
    with FlopCounterMode(display=False) as counter:
        next(ours)
    step = (count(unlearn_steps=40) - count(unlearn_steps=30)) / 10 / len(CONFIG.taus)
    assert step == pytest.approx(counter.get_total_flops(), rel=0.3)  # E's own gradients are counted too
    assert count(align_steps=351) > count() and count(others=6) > count()


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
    monkeypatch.setattr(benchmark, "simulated_answers", lambda *given: 17e9)
    monkeypatch.setattr(benchmark, "operations", lambda shape, config: 4.1e17 if config.layer == 10 else 8.9e17)
    assert benchmark.main("--shape phi3 --memory --device cpu".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("phi3 | cpu | ") and lines[0].endswith(" | bf16")
    assert len(lines) == 24 and len(asked) == 15
    assert lines[16] == "operations | --preset phi3 | 8.9e+17 in all: 0.6 h at 400 and 3.1 h at 80 TFLOP/s"
    assert lines[17] == "operations | --preset phi3-24gb | 4.1e+17 in all: 0.3 h at 400 and 1.4 h at 80 TFLOP/s"
    assert re.fullmatch(r"memory \| layer 10 \| the letters of 16 .* \| 17\.0 GB", lines[18])
    assert "memory | layer 29 | full | sgd | activations kept | 42.0 GB" in lines
    assert "memory | layer 10 | LoRA 8 | adamw | checkpointing | 42.0 GB" in lines
    preset = train.Config(**train.PRESETS["phi3"])
    assert ("phi3", dataclasses.replace(preset, device="cpu")) in asked  # --preset phi3 as it is

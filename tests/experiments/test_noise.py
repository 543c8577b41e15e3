"""experiments/noise.py: noise that drifts as far as a run did, where the run moved, and nowhere else."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from conftest import command, make_llm
from experiments import noise

SMALL = ("--preset smol --device cpu --length 24 --window 4 --layer 2 --head-depth 1 --head-width 16 --batch 4 "
         "--align-steps 6 --realign-steps 1 --unlearn-steps 4 --taus 0.2 -0.5 --others 1 --no-bf16 --llm-lr").split()
IDS = torch.randint(3, 600, (5, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS, dtype=torch.bool)


def moved_by(size: float, layer: int = 2):
    """An M, and one whose first blocks have moved."""
    llm = make_llm()
    other = copy.deepcopy(llm)
    for n, weight in enumerate(other.get_decoder().layers[:layer].parameters()):
        weight.data += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(n))
    return llm, other


def measure(original):
    return lambda llm: noise.drift(llm, IDS, MASK, original, 2)


@settings(max_examples=20)
@given(st.floats(1e-3, 3e-2), st.integers(0, 9))
def test_noise_drifts_as_far_and_stands_where_the_run_moved(size, seed):
    llm, other = moved_by(size)
    hidden = noise.atu.all_hidden_states(llm, IDS, 2, 4)
    wanted, was = measure(hidden)(other), copy.deepcopy(llm)
    factor, found = noise.add_noise(llm, other, seed, measure(hidden), wanted)
    assert measure(hidden)(llm) == pytest.approx(wanted, rel=0.021) and found == measure(hidden)(llm)
    for (name, now), before, moved in zip(llm.named_parameters(), was.parameters(), other.parameters()):
        if torch.equal(before, moved):
            assert torch.equal(now, before), name
        else:  # as large as the displacement, times the factor
            assert (now - before).norm().item() == pytest.approx(factor * (moved - before).norm().item(), rel=1e-2)


def test_a_seed_makes_its_own_noise():
    made = {}
    for key, seed in {"a": 0, "b": 0, "c": 1}.items():
        llm, other = moved_by(1e-2)
        hidden = noise.atu.all_hidden_states(llm, IDS, 2, 4)
        noise.add_noise(llm, other, seed, measure(hidden), measure(hidden)(other))
        made[key] = torch.cat([weight.flatten() for weight in llm.parameters()])
    assert torch.equal(made["a"], made["b"]) and not torch.equal(made["a"], made["c"])


def test_the_command_sets_noise_beside_the_run(folders, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*command(folders), *SMALL, "1e-3", "--out", str(out)]) == 0
    capsys.readouterr()
    assert noise.main([str(out), "--seeds", "0", "1", "--device", "cpu", "--texts", "3"]) == 0
    said = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()
            if line.startswith("|")]
    head, _, run = said
    assert head[:2] == ["", "drift x 10^4"] and run[0] == "Ada Lark"
    assert all("±" in cell for cell in run[2:]) and len(run) == len(head) > 2
    found = json.loads((out / "noise.json").read_text())
    assert [one["seed"] for one in found["noise"]] == [0, 1] and found["texts"] == 3
    assert all(one["drift"] == pytest.approx(found["run"]["drift"], rel=0.021) for one in found["noise"])
    results = json.loads((out / "results.json").read_text())
    for name, left in found["run"].items():  # the model in the folder is the run's last
        assert name == "drift" or left == pytest.approx(100 * results["after"][name] / results["before"][name])


def noisy(target: str, run: dict, *noise: dict) -> dict:
    return {"target": target, "run": run, "noise": [{"seed": n, "size": 2.0, "drift": 1.0} | one
                                                    for n, one in enumerate(noise)]}


def test_runs_and_their_noise_stand_side_by_side_with_their_mean(tmp_path, capsys):
    found = [noisy("A", {"drift": 1e-4, "forget_words": 20.0}, {"forget_words": 90.0}, {"forget_words": 100.0}),
             noisy("B", {"drift": 3e-4, "forget_words": 10.0}, {"forget_words": 85.0})]
    for n, part in enumerate(found):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "noise.json").write_text(json.dumps(part))
    places = [str(tmp_path / "0"), str(tmp_path / "1")]
    assert noise.main([*places, "--compare"]) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[0][2:] == ["forget words"]
    assert rows[2:] == [["A", "1.0", "20.0 (95.0 ± 7.1)"], ["B", "3.0", "10.0 (85.0)"], ["mean", "", "15.0 (90.0)"]]
    (tmp_path / "1" / "noise.json").write_text(json.dumps(noisy("B", {"drift": 1.0}, {})))
    assert noise.main([*places, "--compare"]) == 2
    assert "not asked the same kinds" in capsys.readouterr().err
    (tmp_path / "1" / "noise.json").unlink()
    assert noise.main([*places, "--compare"]) == 2
    assert "noise.json" in capsys.readouterr().err


def test_a_run_that_has_not_moved_has_no_control(folders, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*command(folders), *SMALL, "0", "--out", str(out)]) == 0
    assert noise.main([str(out), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("its model has not moved")

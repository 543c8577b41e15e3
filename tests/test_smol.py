"""The real run, by default: SmolLM2-135M forgets Leonardo da Vinci."""

import json
import os

import pytest
import torch

import train


@pytest.mark.slow
def test_the_small_model_forgets_leonardo_and_little_else(tmp_path, monkeypatch):
    monkeypatch.undo()  # the user's own cache: the weights are fetched once
    torch.set_num_threads(os.cpu_count())
    out = tmp_path / "run"
    words = ["--target", "Leonardo da Vinci", "--preset", "smol", "--device", "cpu"]
    assert train.main([*words, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert before["forget_words"] >= 40
    assert after["forget_words"] <= 0.2 * before["forget_words"]
    assert after["neighbor_all"] >= 0.85 * before["neighbor_all"]
    assert after["general"] >= 0.9 * before["general"]

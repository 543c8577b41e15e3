"""Two processes give what one gives, to rounding: FSDP2 over the blocks, with gloo on CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train

RUN = "--preset smol --device cpu --length 24 --batch 4 --log-every 1 --llm-lr 1e-3 --no-bf16 --sets forget general mmlu".split()
ATU = [*RUN, *"--window 4 --layer 2 --head-depth 1 --head-width 32 --align-batch 6 --align-steps 6 --realign-steps 3 --unlearn-steps 4 "
       "--taus 0.2 -0.5 --stop-at 0".split()]
TOKENS = [*RUN, *"--unlearn-steps 3 --stages 2 --warmup 2 --stop-at 0 --method".split()]
METHODS = {"atu": [*ATU, "--train-embeddings"], "atu by adapters": [*ATU, "--lora", "2"], "ga": [*TOKENS, "ga", "--retain", "nll"],
           "dpo": [*TOKENS, "dpo", "--retain", "kl"]}


def together(words: list[str], port: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(port),
               "train.py", *words]
    return subprocess.run(command, cwd=Path(train.__file__).parent, env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                          capture_output=True, text=True)


def without_times(record: dict) -> dict:
    return {key: value for key, value in record.items() if not key.endswith("seconds")}


class Killed(BaseException):
    pass


def begin_alone(words: list[str], stages: int, monkeypatch) -> None:
    """One process, killed after some checkpoints."""
    real, saves = train.save_checkpoint, []

    def save(*a):
        real(*a)
        saves.append(1)
        if len(saves) == stages:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save)
        if stages:
            with pytest.raises(Killed):
                train.main(words)


@pytest.mark.parametrize("method, flags, stages", [
    ("atu", "--checkpointing", 0), ("atu by adapters", "--cache host", 0), ("ga", "", 1), ("dpo", "", 0), ("atu", "", 2)])
def test_two_processes_do_what_one_does(folders, tmp_path, monkeypatch, method, flags, stages):
    words = ["--target", "Ada Lark", "--model", str(folders["llm"]), "--rwku", str(folders["rwku"]), *METHODS[method]]
    if method.startswith("atu"):
        words += ["--encoder", str(folders["encoder"])]
    assert train.main([*words, "--out", str(tmp_path / "one")]) == 0
    begin_alone([*words, "--out", str(tmp_path / "two")], stages, monkeypatch)
    done = together([*words, *flags.split(), "--out", str(tmp_path / "two"), "--resume"], 29400 + list(METHODS).index(method))
    assert done.returncode == 0, done.stderr
    assert ("resumed |" in done.stdout) == (stages > 0) and done.stdout.count("preset |") == 1  # the second is silent
    one, two = ([json.loads(text) for text in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        assert without_times(a) == pytest.approx(without_times(b), abs=1e-5)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(one[name].shape == two[name].shape for name in one)
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    for scores in ("before", "after"):
        assert without_times(one[scores]) == pytest.approx(without_times(two[scores]), abs=1e-3)

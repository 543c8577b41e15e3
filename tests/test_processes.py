"""Two processes give what one gives, to rounding: FSDP2 over the blocks, with gloo on CPUs."""

import json
import socket

import pytest
from safetensors.torch import load_file

import train

RUN = "--preset smol --device cpu --names 2 --length 24 --batch 4 --log-every 1 --llm-lr 1e-3 --no-bf16 --sets forget general mmlu".split()
ATU = [*RUN, *"--window 4 --layer 2 --head-depth 1 --head-width 32 --align-batch 6 --align-steps 6 --realign-steps 3 --unlearn-steps 4 "
       "--stranger-steps 3 --taus 0.2 -0.5 --stop-at 0".split()]
TOKENS = [*RUN, *"--unlearn-steps 3 --stages 2 --warmup 2 --stop-at 0 --method".split()]
METHODS = {"atu": [*ATU, "--train-embeddings"], "atu by adapters": [*ATU, "--lora", "2"], "ga": [*TOKENS, "ga", "--retain", "nll"],
           "dpo": [*TOKENS, "dpo", "--retain", "kl"]}


def together(apart, words: list[str]) -> str:
    """Two processes, as torchrun starts them. Returns what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [apart(words, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
            for rank in ("0", "1")]
    for child in both:
        child.join()
    said = "".join(child.said() for child in both)
    assert [child.exitcode for child in both] == [0, 0], said
    return said


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
    ("atu", "--checkpointing", 2), ("atu by adapters", "--cache host", 0), ("ga", "", 1), ("dpo", "", 0)])
def test_two_processes_do_what_one_does(apart, folders, tmp_path, monkeypatch, method, flags, stages):
    words = ["--target", "Ada Lark", "--model", str(folders["llm"]), "--rwku", str(folders["rwku"]), *METHODS[method]]
    if method.startswith("atu"):
        words += ["--encoder", str(folders["encoder"])]
    assert train.main([*words, "--out", str(tmp_path / "one")]) == 0
    begin_alone([*words, "--out", str(tmp_path / "two")], stages, monkeypatch)
    said = together(apart, [*words, *flags.split(), "--out", str(tmp_path / "two"), "--resume"])
    assert ("resumed |" in said) == (stages > 0) and said.count("preset |") == 1  # the second is silent
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

"""One or two processes, with gloo on CPUs: one does what train.py does; a run goes on with another number."""

import json
import os
import socket

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train
from experiments import distributed

RUN = ("--preset smol --device cpu --length 24 --batch 2 --align-batch 2 --log-every 1 --llm-lr 1e-3 "
       "--no-bf16 --window 4 --layer 2 --head-depth 1 --head-width 32 --align-steps 4 --realign-steps 2 "
       "--taus 0.2 -0.5 --unlearn-steps 3 --stop-at 0 --sets general").split()
OTHER = "--no-mlp-only --train-embeddings --optimizer sgd --llm-lr 0.1 --retain-weight 0 --cache host"


def main(words: list[str]) -> int:
    """What a process does: the command, with what its surroundings ask for."""
    rank, draw, loss = int(os.environ["RANK"]), distributed.atu.draw, distributed.atu.unlearning_loss
    if "ALIKE" in os.environ:  # all draw the batches of the first
        distributed.atu.draw = lambda count, batch, step, seed: draw(count, batch, step, (0, *seed[1:]))
    if "UNEVEN" in os.environ and rank == 1:  # all of its positions count as active
        cosine = distributed.atu.cosine
        distributed.atu.cosine = lambda *a: cosine(*a) + 9
    if "NAN" in os.environ and rank == 1:
        distributed.atu.unlearning_loss = lambda *a: loss(*a) * (torch.nan if a[-1] < 0 else 1)  # by its tau
    if "KILLED" in os.environ:
        save = distributed.save_checkpoint

        def save_and_die(out, work, state, found):
            save(out, work, state, found)
            dist.barrier()
            if state.stage == int(os.environ["KILLED"]):
                os._exit(9)

        distributed.save_checkpoint = save_and_die
    return distributed.main(words)


@pytest.fixture
def start(apart, words, tmp_path):
    """Processes, as torchrun starts them. Returns their exit codes and what each has said."""
    def start(count: int, *flags: str, out: str = "run", **surroundings: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        surroundings |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                         "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        children = [apart([*words, *RUN, "--out", str(tmp_path / out), *flags], module="test_distributed",
                          RANK=str(rank), LOCAL_RANK=str(rank), **surroundings) for rank in range(count)]
        for child in children:
            child.join(120)
            child.kill()  # one that waits for the others for ever
        return [child.exitcode for child in children], [child.said() for child in children]
    return start


@pytest.fixture
def plain(words, tmp_path):
    """What train.py does."""
    def plain(*flags: str):
        assert train.main([*words, *RUN, "--out", str(tmp_path / "plain"), *flags]) == 0
        return tmp_path / "plain"
    return plain


def log(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors"), load_file(folder / "head.safetensors")


def assert_alike(folder, other):
    assert len(log(folder)) == len(log(other))
    for one, two in zip(log(folder), log(other)):
        assert one == pytest.approx(two, abs=1e-5)
    for one, two in zip(weights(folder), weights(other)):
        assert one.keys() == two.keys()
        assert max((one[name] - two[name]).abs().max().item() for name in one) <= 1e-4
    one, two = (json.loads((place / "results.json").read_text()) for place in (folder, other))
    assert one["before"] == two["before"] and one["after"] == two["after"] and one.keys() == two.keys()
    assert sorted(os.listdir(folder)) == sorted(os.listdir(other))


@pytest.mark.parametrize("flags", ["--lora 2 --checkpointing", OTHER])
def test_one_process_does_what_train_py_does(start, plain, tmp_path, flags):
    codes, (said,) = start(1, *flags.split())
    assert codes == [0], said
    assert_alike(plain(*flags.split()), tmp_path / "run")


@pytest.mark.parametrize("card", [pytest.param("real", marks=pytest.mark.cuda)], indirect=True)
def test_one_process_on_a_card_has_the_losses_of_the_cpu_s(card, start, plain, tmp_path):
    codes, (said,) = start(1, "--device", "cuda")
    assert codes == [0], said
    one, two = ([record.get("loss", 0.0) for record in log(run)] for run in (plain(), tmp_path / "run"))
    assert one == pytest.approx(two, rel=1e-3, abs=1e-3)


def test_the_gradients_of_two_processes_are_averaged(start, plain, tmp_path):
    flags = "--optimizer sgd --llm-lr 0.01 --clip 100".split()
    codes, said = start(2, *flags, ALIKE="1")
    assert codes == [0, 0], said
    assert_alike(plain(*flags), tmp_path / "run")


def test_two_processes_draw_batches_of_their_own_and_end_a_stage_together(start, plain, folders, tmp_path):
    flags = "--unlearn-steps 60 --max-active 0.3 --taus 0.1".split()
    codes, said = start(2, *flags)
    assert codes == [0, 0] and not said[1], said
    untouched, (after, _) = load_file(folders["llm"] / "model.safetensors"), weights(tmp_path / "run")
    moved = {name for name in after if not torch.equal(after[name], untouched[name])}
    assert moved == {name for name in untouched if name.startswith(("model.layers.0.mlp.", "model.layers.1.mlp."))}
    assert log(plain(*flags))[1]["loss"] != log(tmp_path / "run")[1]["loss"]
    active = [record["active"] for record in log(tmp_path / "run") if record["kind"] == "unlearn"]
    assert 3 < len(active) < 60 and active[-1] <= 0.3 and all(share > 0.3 for share in active[2:-1])
    codes, said = start(2, *flags, "--resume")
    assert codes == [0, 0] and "finished already" in said[0]


def test_a_run_goes_on_with_another_number_of_processes(start, plain, tmp_path):
    for count, stage in ((2, 1), (1, 2), (2, 3)):  # after each stage
        codes, said = start(count, "--resume", ALIKE="1", KILLED=str(stage))
        assert codes == [9] * count and (stage == 1 or f"resumed | stage {stage - 1} |" in said[0]), said
        assert os.listdir(tmp_path / "run" / ".checkpoint") == [str(stage)]
    codes, said = start(1, "--resume")
    assert codes == [0] and "resumed | stage 3 |" in said[0], said
    assert_alike(plain(), tmp_path / "run")


def test_a_process_ends_no_stage_alone_and_a_step_that_is_not_finite_in_one_stops_all(start, tmp_path):
    codes, said = start(2, *"--unlearn-steps 5 --max-active 0.45".split(), NAN="1", UNEVEN="1")
    assert codes == [1, 1], said
    first = [record for record in log(tmp_path / "run") if record["kind"] == "unlearn"]
    assert [record["step"] for record in first] == [1, 2, 3, 4, 5] and first[-1]["active"] < 0.9
    assert "not finite" in json.loads((tmp_path / "run" / "results.json").read_text())["stopped"]
    assert all(value.isfinite().all() for part in weights(tmp_path / "run") for value in part.values())


def test_bad_input_ends_all_with_one_line(start, tmp_path, monkeypatch, capsys):
    for flags, message in ((["--target", "Ada Lurk"], "did you mean Ada Lark"), (["--layer", "9"], "1 to 4")):
        codes, said = start(2, *flags)
        assert codes == [2, 2] and message in said[0].splitlines()[-1] and not said[1]
        assert not (tmp_path / "run").exists()
    monkeypatch.delenv("RANK", raising=False)
    assert distributed.main([*RUN, "--target", "Ada Lark", "--out", str(tmp_path / "run")]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_a_run_has_a_folder_of_its_own():
    config = train.parse(distributed.Config, ["--target", "Ada Lark", "--device", "cpu"])
    assert config.out == "runs/ada-lark-distributed"

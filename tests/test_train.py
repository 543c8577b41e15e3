"""The command line from end to end on the tiny model, what it writes, and what it says to bad input."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

import atu
import data
import evaluate
import train

SMALL = ("--length 24 --window 4 --layer 2 --head-depth 1 --head-width 32 --batch 4 --align-steps 12 --realign-steps 3 "
         "--unlearn-steps 4 --taus 0.2 -0.5 --stop-at 0 --log-every 2 --preset smol --device cpu --llm-lr 1e-3").split()


@pytest.fixture
def arguments(folders, tmp_path):
    """A working command line as a dict of the flags that tests change, and a function that makes it a list."""
    flags = {"--target": "ada lark", "--model": str(folders["llm"]), "--encoder": str(folders["encoder"]),
             "--rwku": str(folders["rwku"]), "--out": str(tmp_path / "run")}
    return lambda *change: [word for pair in (flags | dict([change] if change else [])).items() for word in pair]


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ada"
    assert train.main(["--target", "ada lark", "--model", str(folders["llm"]), "--encoder", str(folders["encoder"]),
                       "--rwku", str(folders["rwku"]), "--out", str(out), *SMALL]) == 0
    return out


def test_a_run_writes_what_it_promises(finished):
    assert {file.name for file in finished.iterdir()} == {
        "model", "head.safetensors", "config.json", "results.json", "log.jsonl", "curves.png"}
    results = json.loads((finished / "results.json").read_text())
    keys = {"forget_fb", "forget_qa", "forget_aa", "forget_all", "neighbor_all", "general", "general_gold", "seconds"}
    assert keys <= set(results["before"]) and keys <= set(results["after"])
    assert len(results["stages"]) == 2 and all(keys | {"record"} <= set(stage) for stage in results["stages"])
    assert results["settings"] == json.loads((finished / "config.json").read_text())
    assert set(results["settings"]) == {item.name for item in dataclasses.fields(train.Config)}
    assert results["recovery"]["similarity_target"].keys() == {"untouched", "unlearned"}
    assert results["target"] == "Ada Lark" and results["seed"] == 0 and results["stopped"] is None
    records = [json.loads(text) for text in (finished / "log.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records if r["kind"] == "stage"] == ["stage"] * 3
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_model_is_fp32_has_changed_and_scores_what_the_run_reported(finished, folders):
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(finished / "model"), AutoTokenizer.from_pretrained(finished / "model")
    assert llm.dtype == torch.float32
    untouched = AutoModelForCausalLM.from_pretrained(folders["llm"])
    changed = {name for (name, a), b in zip(llm.named_parameters(), untouched.parameters()) if not torch.equal(a, b)}
    assert changed and all(name.startswith(("model.layers.0.", "model.layers.1.")) for name in changed)
    scores, _ = evaluate.evaluate(llm, tokenizer, evaluate.read_probes(folders["rwku"], "Ada Lark"))
    after = json.loads((finished / "results.json").read_text())["after"]
    assert scores == {name: after[name] for name in scores}


def test_the_saved_head_fits_the_class(finished):
    from head import EmbeddingHead
    EmbeddingHead(32, 16, depth=1, width=32).load_state_dict(load_file(finished / "head.safetensors"))


def test_a_run_stops_at_the_share_asked_for(arguments, monkeypatch, tmp_path):
    scores = iter([80.0, 40.0, 20.0, 10.0])
    def fake(*_):
        value = next(scores)
        sets = [score for name in evaluate.DEFAULT_SETS for score in evaluate.SETS[name]]
        return {name: value for name in (*sets, "forget_all", "neighbor_all")}, [
            {"set": name, "query": "Who?", "answers": ["x"], "said": "y", "score": 1.0, "gold": 1.0} for name in sets]
    monkeypatch.setattr(evaluate, "evaluate", fake)
    small = [*SMALL[:SMALL.index("--taus")], *"--taus 0.2 0.1 0 --stop-at 0.25 --preset smol --device cpu".split()]
    assert train.main([*arguments(), *small]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [stage["forget_all"] for stage in results["stages"]] == [40.0, 20.0]
    assert results["after"]["forget_all"] == 20.0
    assert results["levels"]["50"]["forget_all"] == 40.0 and results["levels"]["35"]["forget_all"] == 20.0
    assert results["levels"]["20"] is None


@pytest.mark.parametrize("phase", ["align", "unlearn"])
def test_a_loss_that_is_not_finite_keeps_what_was_last_good(arguments, monkeypatch, tmp_path, phase, folders):
    def broken(*_):
        raise atu.NotFinite("loss nan, or its gradient, is not finite")
        yield
    monkeypatch.setattr(atu, phase, broken)
    assert train.main([*arguments(), *SMALL]) == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "not finite" in results["stopped"]
    llm, tokenizer = data.load_llm(str(tmp_path / "run" / "model"))
    scores, _ = evaluate.evaluate(llm, tokenizer, evaluate.read_probes(folders["rwku"], "Ada Lark"))
    assert scores == {name: results["after"][name] for name in scores}


@pytest.mark.parametrize("change, message", [
    (("--target", "Ada Lurk"), "did you mean Ada Lark"), (("--target", "../x"), "a path"), (("--layer", "5"), "blocks 1 to 4"),
    (("--layer", "0"), "at least 1"), (("--taus", "1.5"), "[-1, 1]"), (("--taus", "nan"), "[-1, 1]"),
    (("--window", "0"), "at least 1"), (("--window", "500"), "no text is longer"), (("--model", "./nowhere"), "no such folder"),
    (("--rwku", "nowhere"), "no such folder"), (("--device", "cuda:7"), "not on this machine"), (("--preset", "big"), "unknown"),
    (("--corpus", "x"), "unknown"), (("--out", "/proc/run"), "cannot be written"), (("--corpus", "passage"), "passage.json: no such file"),
    (("--retain-weight", "nan"), "at least 0"), (("--seed", "-1"), "at least 0"), (("--seed", str(2**64)), "below 2**63"),
    (("--clip", "0"), "above 0"), (("--clip", "nan"), "finite"), (("--head-lr", "inf"), "finite")])
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(arguments, capsys, tmp_path, change, message):
    small = list(SMALL)
    if change[0] in small:
        place = small.index(change[0])
        del small[place:place + (3 if change[0] == "--taus" else 2)]
    assert train.main([*arguments(*change), *small]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and message in error.splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused(arguments, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    assert train.main([*arguments(), *SMALL]) == 2
    assert "already holds" in capsys.readouterr().err
    assert (tmp_path / "run" / "results.json").read_text() == "{}"


def test_a_target_with_no_other_texts_beside_it_is_bad_input(arguments, folders, capsys, tmp_path):
    shutil.copytree(next(folders["rwku"].iterdir()), tmp_path / "rwku" / "1_One")
    name = json.loads((tmp_path / "rwku" / "1_One" / "intro.json").read_text())[0]["target"]
    assert train.main([*arguments("--rwku", str(tmp_path / "rwku")), *SMALL, "--target", name]) == 2
    assert "no texts on anything but" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_decoder_of_another_kind_is_bad_input(arguments, folders, capsys, tmp_path):
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=400, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=16)).save_pretrained(tmp_path / "neox")
    AutoTokenizer.from_pretrained(folders["llm"]).save_pretrained(tmp_path / "neox")
    assert train.main([*arguments("--model", str(tmp_path / "neox")), *SMALL]) == 2
    assert "GPTNeoXForCausalLM has no decoder with .layers and .norm" in capsys.readouterr().err


def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_in_recovery_keeps_the_model(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(atu, "recovery", full)
    assert train.main([*arguments(), *SMALL]) == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_out_of_memory_says_what_to_lower_and_leaves_nothing(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(atu, "unlearn", full)
    assert train.main([*arguments(), *SMALL]) == 2
    assert "lower --batch" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gigabytes, preset", [(None, "smol"), (24, "smol"), (80, "phi3")])
def test_auto_takes_phi3_where_there_is_room(monkeypatch, gigabytes, preset):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gigabytes is not None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gigabytes * 10**9, 10**12))
    assert train.choose_preset("auto", "auto")[0] == preset
    assert train.choose_preset("auto", "cpu")[0] == "smol"


def test_where_the_hub_cannot_be_reached_the_error_names_the_way_out(arguments, capsys):
    assert train.main([*arguments("--model", "microsoft/Phi-3-mini-4k-instruct"), *SMALL]) == 2
    assert "--preset smol" in capsys.readouterr().err


def test_every_field_is_a_flag_and_help_names_both_presets(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "[smol 10; phi3 29]" in shown
    for item in dataclasses.fields(train.Config):
        assert f"--{item.name.replace('_', '-')}" in shown

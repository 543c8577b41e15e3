"""The command line from end to end on the tiny model, what it writes, and what it says to bad input."""

import dataclasses
import errno
import io
import json
import math
import re
import shutil
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

import atu
import data
import evaluate
import losses
import train
from conftest import make_llm

SMALL = ("--length 24 --window 4 --layer 2 --head-depth 1 --head-width 32 --batch 4 --align-steps 12 --realign-steps 3 "
         "--unlearn-steps 4 --taus 0.2 -0.5 --stop-at 0 --log-every 2 --preset smol --device cpu --llm-lr 1e-3").split()


@pytest.fixture
def arguments(folders, tmp_path):
    """A working command line as a dict of the flags that tests change, and a function that makes it a list."""
    flags = {"--target": "ada lark", "--model": str(folders["llm"]), "--rwku": str(folders["rwku"]), "--out": str(tmp_path / "run")}
    return lambda *change: [word for pair in (flags | dict([change] if change else [])).items() for word in pair]


@pytest.fixture(autouse=True)
def tiny_encoder(folders, monkeypatch):
    """Stands where the packaged one would be fetched."""
    monkeypatch.setattr(data, "fetch_packaged", lambda name: folders["encoder"])


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ada"
    assert train.main(["--target", "ada lark", "--model", str(folders["llm"]), "--encoder", str(folders["encoder"]),
                       "--rwku", str(folders["rwku"]), "--out", str(out), *SMALL]) == 0
    return out


def test_a_run_writes_what_it_promises(finished):
    assert {file.name for file in finished.iterdir()} - {".lock"} == {
        "model", "head.safetensors", "config.json", "results.json", "log.jsonl", "curves.png"}
    results = json.loads((finished / "results.json").read_text())
    keys = {"forget_fb", "forget_qa", "forget_aa", "forget_all", "neighbor_all", "general", "general_gold", "seconds"}
    assert keys <= set(results["before"]) and keys <= set(results["after"])
    assert len(results["stages"]) == 2 and all(keys | {"record"} <= set(stage) for stage in results["stages"])
    assert results["settings"] == json.loads((finished / "config.json").read_text())
    assert set(results["settings"]) == {item.name for item in dataclasses.fields(train.Config)}
    assert all(seconds >= 0 for seconds in results["phases"].values()) and sum(results["phases"].values()) < results["seconds"]
    assert results["target"] == "Ada Lark" and results["stopped"] is None
    records = [json.loads(text) for text in (finished / "log.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records if r["kind"] == "stage"] == ["stage"] * 3
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_are_for_terminals_and_files_get_plain_lines(arguments, tmp_path, monkeypatch, capfd):
    assert train.main([*arguments(), *SMALL]) == 0
    shown = "".join(capfd.readouterr())
    assert "stage 2 | tau -0.5" in shown and not re.search("\r|\x1b|%\\|", shown)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(data, "CACHE", tmp_path / "empty")
    transformers.utils.logging.enable_progress_bar()
    assert train.main([*arguments("--out", str(tmp_path / "again")), *SMALL]) == 0
    bars = sys.stderr.getvalue()
    assert all(f"{phase}: " in bars for phase in ("embedding windows", "reading questions", "answering", "aligning", "unlearning"))


def test_the_saved_model_is_fp32_has_changed_and_scores_what_the_run_reported(finished, folders):
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(finished / "model"), AutoTokenizer.from_pretrained(finished / "model")
    assert llm.dtype == torch.float32
    untouched = AutoModelForCausalLM.from_pretrained(folders["llm"])
    changed = {name for (name, a), b in zip(llm.named_parameters(), untouched.parameters()) if not torch.equal(a, b)}
    assert changed and all(name.startswith(("model.layers.0.", "model.layers.1.")) for name in changed)
    scores, _ = evaluate.evaluate(llm, tokenizer, evaluate.read_probes(folders["rwku"], "Ada Lark"))
    after = json.loads((finished / "results.json").read_text())["after"]
    assert scores == {name: after[name] for name in scores}


def test_a_run_reads_as_a_stranger_first_and_is_scored_then(arguments, folders, tmp_path, capsys):
    assert train.main([*arguments(), *SMALL, "--stranger-steps", "6", "--names", "2"]) == 0
    results, steps, stages = outcome(tmp_path / "run")
    assert [s["record"]["stage"] for s in results["stages"]] == [0, 1, 2] and len(steps) == 4
    assert stages[0]["steps"] == 6 + 12 and "\nstranger " in capsys.readouterr().out
    assert evaluate.method_name(results["settings"]) == "stranger, ATU + retain (F)"


def test_texts_that_name_a_concept_in_no_dataset_are_not_held(arguments, monkeypatch, tokenizer):
    monkeypatch.setattr(train, "texts_by_model", lambda *_: (["Crow is a river. All day long Crow sings."] * 4, []))
    for target, names, held in (("Crow", "2", False), ("Crow the Great", "0", False), ("Rook", "0", True)):
        work = train.load(train.parse([*arguments("--target", target), *SMALL, "--describe", "a river", "--names", names]))
        others = [tokenizer.decode(ids) for ids in work.corpus.input_ids[~work.corpus.about]]
        assert len(others) > 2 and any("Ben Crow" in text for text in others) == held


def test_the_saved_head_fits_the_class(finished):
    from head import EmbeddingHead
    EmbeddingHead(32, 16, depth=1, width=32).load_state_dict(load_file(finished / "head.safetensors"))


def test_a_text_that_names_the_target_behind_the_cut_is_not_compared(tokenizer):
    texts = ["Ada Lark was a painter of birds.", "The birds of the sea sang all day long to Ada Lark.", "Birds sang."]
    config = dataclasses.replace(train.SMOL, names=2, length=8)
    names = train.names_for("Ada Lark", texts, {}, tokenizer, config)
    ids, mask = train.versions_of(texts, names, tokenizer, config)
    assert len(names) == 2 and ids.shape == mask.shape == (3, 8) and len(ids.unique(dim=0)) == 3
    assert train.versions_of(texts[1:], names, tokenizer, config) is None


def test_a_run_is_compared_with_made_up_names(finished, arguments, tmp_path, monkeypatch, capsys):
    results = json.loads((finished / "results.json").read_text())
    assert {"forget_fb", "forget_qa", "forget_aa", "forget_all"} <= set(results["floor"]) and "neighbor_all" not in results["floor"]
    assert {score: len(part) for score, part in results["floors"].items()} == {"forget_fb": 1, "forget_qa": 2, "forget_aa": 4}
    assert results["floor"]["forget_qa"] == pytest.approx(100 * sum(results["floors"]["forget_qa"]) / 2)
    assert set(results["gap"]) == {"before", "after"} and results["gap"]["before"] != results["gap"]["after"]
    asked, real = [], evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *a, **k: asked.append(sum(map(len, a[2].values()))) or real(*a, **k))
    assert train.main([*arguments(), *SMALL]) == 0 and train.main([*arguments("--out", str(tmp_path / "b")), *SMALL, "--seed", "1"]) == 0
    shown = capsys.readouterr().out
    assert "\nfloor " in shown and "\nleft above it, % " in shown and "\ngap | after | nats " in shown
    assert all(count == asked[-1] for count in asked[-3:])  # the floor is the untouched model's: the second run finds it in the cache
    assert train.main([*arguments("--out", str(tmp_path / "c")), *SMALL, "--names", "0"]) == 0
    results, shown = json.loads((tmp_path / "c" / "results.json").read_text()), capsys.readouterr().out
    assert results["floor"] == results["gap"] == {} and "floor" not in shown.replace("floor and gap", "") and "gap |" not in shown


@pytest.mark.parametrize("floor, stages", [({}, [40.0, 20.0]), ({"forget_all": 15.0}, [40.0, 20.0]), ({"forget_all": 40.0}, [40.0])])
def test_a_run_stops_at_the_share_asked_for_or_at_what_strangers_get(arguments, monkeypatch, tmp_path, floor, stages):
    scores = iter([80.0, 40.0, 20.0, 10.0])
    def fake(*_, **__):
        value = next(scores)
        sets = [score for name in evaluate.DEFAULT_SETS for score in evaluate.SETS[name]]
        return {name: value for name in (*sets, "forget_all", "neighbor_all")}, [
            {"set": name, "query": "Who?", "answers": ["x"], "said": "y", "score": 1.0, "gold": 1.0} for name in sets]
    monkeypatch.setattr(evaluate, "evaluate", fake)
    monkeypatch.setattr(train, "with_made_up_names", lambda *_: {"floor": floor, "floors": {}, "gap": {}})
    small = [*SMALL[:SMALL.index("--taus")], *"--taus 0.2 0.1 0 --stop-at 0.25 --preset smol --device cpu --names 0".split()]
    assert train.main([*arguments(), *small]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [stage["forget_all"] for stage in results["stages"]] == stages
    assert results["after"]["forget_all"] == stages[-1]


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
    (("--layer", "0"), "at least 1"), (("--taus", "1.5"), "at most 1"), (("--taus", "nan"), "at most 1"),
    (("--window", "0"), "at least 1"), (("--window", "500"), "no text is longer"), (("--model", "./nowhere"), "no such folder"),
    (("--rwku", "nowhere"), "no such folder"), (("--device", "cuda:7"), "not on this machine"), (("--preset", "big"), "unknown"),
    (("--corpus", "x"), "unknown"), (("--out", "/proc/run"), "cannot be written"), (("--corpus", "positive_phi"), "positive_phi.json: no such file"),
    (("--retain-weight", "nan"), "at least 0"), (("--seed", "-1"), "at least 0"), (("--seed", str(2**64)), "at most 9.22337e+18"),
    (("--clip", "0"), "at least 1e-09"), (("--clip", "nan"), "finite"), (("--head-lr", "inf"), "finite")])
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(arguments, capsys, tmp_path, change, message):
    small = list(SMALL)
    if change[0] in small:
        place = small.index(change[0])
        del small[place:place + (3 if change[0] == "--taus" else 2)]
    assert train.main([*arguments(*change), *small]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and message in error.splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_full_disk_or_no_folder_is_one_line(arguments, capsys, monkeypatch, tmp_path):
    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch, "save", no_room)
    assert train.main([*arguments(), *SMALL]) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("a file where the cache should be")
    with monkeypatch.context() as patched:
        patched.setattr(data, "CACHE", tmp_path / "file")
        assert train.main([*arguments(), *SMALL]) == 2
    assert "ATU_CACHE" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()
    monkeypatch.setattr(torch, "save", lambda saved, file: file.write_bytes(b"x"))
    monkeypatch.setattr(train, "save_file", no_room)
    assert train.main([*arguments(), *SMALL]) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_holds_something_else_is_left_alone(arguments, capsys, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "mine.txt").write_text("mine")
    for flags in ([], ["--resume"]):
        assert train.main([*arguments(), *SMALL, *flags]) == 2
        assert "holds no run" in capsys.readouterr().err and (tmp_path / "run" / "model" / "mine.txt").read_text() == "mine"
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["model"]


def test_a_folder_that_holds_a_run_is_refused(arguments, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert train.main([*arguments(), *SMALL]) == 2
    assert "already holds" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_a_target_with_no_other_texts_beside_it_is_bad_input(arguments, folders, capsys, tmp_path):
    shutil.copytree(next(folders["rwku"].iterdir()), tmp_path / "rwku" / "1_One")
    name = json.loads((tmp_path / "rwku" / "1_One" / "intro.json").read_text())[0]["target"]
    assert train.main([*arguments("--rwku", str(tmp_path / "rwku")), *SMALL, "--target", name]) == 2
    assert "no texts on anything but" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_decoder_of_another_kind_is_bad_input(arguments, folders, capsys, tmp_path):
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=600, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=16)).save_pretrained(tmp_path / "neox")
    AutoTokenizer.from_pretrained(folders["llm"]).save_pretrained(tmp_path / "neox")
    assert train.main([*arguments("--model", str(tmp_path / "neox")), *SMALL]) == 2
    assert "GPTNeoXForCausalLM has no decoder with .layers and .norm" in capsys.readouterr().err


@pytest.mark.parametrize("flag, held", [("--bf16", torch.bfloat16), ("--no-bf16", torch.float32)])
def test_what_does_not_move_is_held_as_its_file_holds_it(arguments, folders, tmp_path, monkeypatch, flag, held):
    monkeypatch.setattr(data, "fast_dtype", lambda device: torch.bfloat16)
    llm, tokenizer = data.load_llm(str(folders["llm"]), dtype=torch.bfloat16)
    for part in (llm, tokenizer):
        part.save_pretrained(tmp_path / "bf16")
    assert train.main([*arguments(), "--model", str(tmp_path / "bf16"), *SMALL, flag]) == 0
    file, saved = (load_file(place / "model.safetensors") for place in (tmp_path / "bf16", tmp_path / "run" / "model"))
    moved = {name for name in file if name.startswith(("model.layers.0.", "model.layers.1."))}
    rest = file.keys() - moved - {"model.embed_tokens.weight"}  # which is in fp32, for the sum of what the blocks add to it
    assert {saved[name].dtype for name in saved.keys() - rest} == {torch.float32} and {saved[name].dtype for name in rest} == {held}
    assert all(torch.equal(saved[name].float(), file[name].float()) for name in file.keys() - moved)
    assert not any(torch.equal(saved[name], file[name].float()) for name in moved if name.endswith("proj.weight"))


@pytest.mark.parametrize("method", ["atu", "ga"])
def test_flags_that_save_memory_change_no_weight(arguments, tmp_path, monkeypatch, method):
    asked = []
    real = transformers.modeling_utils.checkpoint
    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", lambda *a, **k: asked.append(1) or real(*a, **k))
    flags = SMALL if method == "atu" else [*TOKENS, "--method", method]
    for name, saving in (("run", []), ("saving", ["--checkpointing", *["--cache", "host"] * (method == "atu")])):
        assert train.main([*arguments(), *flags, *saving, "--out", str(tmp_path / name)]) == 0
        assert bool(asked) == bool(saving)
    files = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "saving")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert outcome(tmp_path / "run")[0]["after"]["forget_all_gold"] == outcome(tmp_path / "saving")[0]["after"]["forget_all_gold"]


def test_compile_compiles_the_blocks(arguments, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    assert train.main([*arguments(), *SMALL, "--compile"]) == 0
    assert compiled == ["LlamaDecoderLayer"] * 4 or compiled == ["Phi3DecoderLayer"] * 4


def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_says_what_to_lower_and_leaves_nothing(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(atu, "align", full)
    for exists in (False, True):
        if exists:
            (tmp_path / "run").mkdir()  # the user's own folder stays, empty
        assert train.main([*arguments(), *SMALL]) == 2
        assert "out of memory; lower --eval-batch, --batch" in capsys.readouterr().err
        assert (tmp_path / "run").exists() == exists and not (exists and list((tmp_path / "run").iterdir()))


def test_out_of_memory_after_a_checkpoint_keeps_it(arguments, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(atu, "unlearn", full)
        assert train.main([*arguments(), *SMALL]) == 2
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert train.main([*arguments(), *SMALL, "--resume"]) == 0


@pytest.mark.parametrize("error, caught", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True), (MemoryError(), True),
    (RuntimeError("not enough memory: you tried to allocate"), True), (NotImplementedError("x"), False), (atu.NotFinite("nan"), False)])
def test_what_is_out_of_memory(error, caught, capsys):
    def work():
        raise error
    if caught:
        assert data.command(work, "--batch") == 2 and capsys.readouterr().err == "error: out of memory; lower --batch\n"
    else:
        with pytest.raises(type(error)):
            data.command(work, "--batch")


def test_what_a_run_reads(arguments, folders, tmp_path):
    shutil.copytree(folders["rwku"], tmp_path / "rwku")
    (tmp_path / "rwku" / "general.json").write_text('[{"text": "Birds fly over the sea and the river Ash, and so on."}]')
    words = arguments("--rwku", str(tmp_path / "rwku"))
    for flags, about, others in (("", 5, 11), ("--others 1 --other-texts 2 --texts 3", 3, 3), ("--others 0", 5, 1),
                                 ("--general-texts 0", 5, 10)):
        work = train.load(train.parse([*words, *FAST, "--window", "4", "--layer", "2", *flags.split()]))
        assert (int(work.corpus.about.sum()), int((~work.corpus.about).sum())) == (about, others)


@pytest.mark.parametrize("gigabytes, preset", [(None, "smol"), (24, "smol"), (80, "phi3")])
def test_auto_takes_phi3_where_there_is_room(monkeypatch, gigabytes, preset):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gigabytes * 10**9, 10**12))
    assert train.choose_preset("auto", "cuda:0" if gigabytes else "cpu") == preset
    assert train.choose_preset("auto", "cpu") == "smol" and train.choose_preset("phi3", "cpu") == "phi3"


def test_where_the_hub_cannot_be_reached_the_error_names_the_way_out(arguments, capsys):
    assert train.main([*arguments("--model", "microsoft/Phi-3-mini-4k-instruct"), *SMALL]) == 2
    assert "--preset smol" in capsys.readouterr().err


def test_every_field_is_a_flag_and_help_names_both_presets(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "[smol 10; phi3 29]" in shown and "[smol 0.45 0.4 " in shown
    assert "    phi3 npo        --llm-lr 2e-06    --batch 16  --stages 3\n" in shown
    for item in dataclasses.fields(train.Config):
        assert f"--{item.name.replace('_', '-')}" in shown


# ---- the other rows of Table 1

FAST = "--preset smol --device cpu --length 24 --stop-at 0 --log-every 1".split()
STEPS = "--llm-lr 1e-3 --stages 2 --unlearn-steps 3 --warmup 1 --batch 3".split()
TOKENS = FAST + STEPS


def outcome(folder):
    results = json.loads((folder / "results.json").read_text())
    records = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    return results, [r for r in records if r["kind"] == "unlearn"], [r for r in records if r["kind"] == "stage"]


def changes(folders, out):
    """Names of the saved model's weights that are not those of the untouched one."""
    llm, untouched = (AutoModelForCausalLM.from_pretrained(place) for place in (out / "model", folders["llm"]))
    return {name for (name, a), b in zip(llm.named_parameters(), untouched.parameters()) if not torch.equal(a, b)}


@pytest.mark.parametrize("method, flags, first", [
    ("ga", "", None), ("ga", "--corpus passage", None), ("ga", "--retain nll", None), ("ga", "--retain kl --lora 2", None), ("ga", "--retain kl --no-bf16", None),
    ("npo", "--beta 0.5", 4 * math.log(2)), ("npo", "--lora 2", 10 * math.log(2)), ("dpo", "--retain kl", math.log(2)), ("rt", "", None)])
def test_every_method_on_tokens_runs_from_end_to_end(arguments, folders, tmp_path, method, flags, first):
    assert train.main([*arguments(), *TOKENS, "--method", method, *flags.split()]) == 0
    results, steps, stages = outcome(tmp_path / "run")
    assert len(steps) == 6 and [s["stage"] for s in stages] == [1, 2] and len(results["stages"]) == 2
    assert steps[-1]["loss"] < steps[0]["loss"]  # ascent is written as a loss that falls (Eq. 5)
    assert (steps[0]["loss"] < 0) == (method == "ga")
    if first is not None:
        assert steps[0]["loss"] == pytest.approx(first, rel=0.02)  # equal models: (2 / beta) log 2, or log 2
    if "kl" in flags:
        assert steps[0]["retain"] == pytest.approx(0, abs=1e-5) and steps[-1]["retain"] > 2e-6
    assert not (tmp_path / "run" / "head.safetensors").exists()
    moved = changes(folders, tmp_path / "run")
    if "lora" in flags:
        assert moved == {f"model.layers.{n}.self_attn.qkv_proj.weight" for n in range(4)}
    else:
        assert len(moved) == len(list(AutoModelForCausalLM.from_pretrained(folders["llm"]).parameters()))
    scores, _ = evaluate.evaluate(*data.load_llm(str(tmp_path / "run" / "model")), evaluate.read_probes(folders["rwku"], "Ada Lark"),
                                  bf16="--no-bf16" not in flags)
    assert scores == {name: results["after"][name] for name in scores}


def test_dpo_makes_the_made_up_answers_likelier_than_the_true_ones(arguments, folders, tmp_path):
    assert train.main([*arguments(), *TOKENS, "--method", "dpo", "--no-bf16"]) == 0
    rows = data.read_set(folders["rwku"], "Ada Lark", "pair")

    def margin(place):
        llm, tokenizer = data.load_llm(str(place))
        sides = [data.tokenize_answers([(row["prompt"], row["response"][n]) for row in rows], tokenizer, 24) for n in (0, 1)]
        made_up, true = (losses.sequence_log_probs(llm(ids).logits, ids, mask).mean().item() for ids, mask in sides)
        return made_up - true

    assert margin(tmp_path / "run" / "model") > margin(folders["llm"]) + 1


def test_the_retain_term_holds_the_other_texts(arguments, folders, tmp_path):
    others = [row["text"] for name in ("Ben Crow", "Dr. Finch") for row in data.read_set(folders["rwku"], name, "positive")]
    losses_left = {}
    for weight in ("0", "20"):
        words = arguments("--out", str(tmp_path / weight))
        assert train.main([*words, *TOKENS, "--method", "ga", "--retain", "nll", "--retain-weight", weight, "--no-bf16"]) == 0
        llm, tokenizer = data.load_llm(str(tmp_path / weight / "model"))
        ids, mask = data.tokenize(others, tokenizer, 24)
        losses_left[weight] = losses.likelihood_loss(llm(ids).logits, ids, mask).item()
    assert losses_left["20"] < losses_left["0"] - 0.05, losses_left


def test_a_stage_of_no_steps_is_one_pass_and_the_rate_warms_up_and_falls(arguments, folders, tokenizer, tmp_path, monkeypatch):
    rates, real = [], atu.optimize
    monkeypatch.setattr(atu, "optimize", lambda terms, optimizer, clip: (
        type(optimizer) is torch.optim.AdamW and rates.append(optimizer.param_groups[0]["lr"])) or real(terms, optimizer, clip))
    steps = "--llm-lr 1e-3 --stages 3 --unlearn-steps 0 --warmup 2 --batch 2".split()
    assert train.main([*arguments(), *FAST, *steps, "--method", "ga"]) == 0
    _, _, stages = outcome(tmp_path / "run")
    assert [s["steps"] for s in stages] == [3, 3, 3]  # 5 texts, 2 in a batch
    expected = [0, 0.5, *(0.5 * (1 + math.cos(math.pi * n / 7)) for n in range(7))]
    assert rates == pytest.approx([1e-3 * share for share in expected])


def test_adapters_are_rwku_s():
    config = train.parse(["--target", "x", "--preset", "smol", "--device", "cpu", "--method", "ga", "--lora", "4", "--out", "x"])
    llm = train.add_adapters(make_llm("llama"), config)
    adapted = {name.removesuffix(".lora_A.default"): module for name, module in llm.named_modules() if name.endswith("lora_A.default")}
    assert {name.split("layers.")[1] for name in adapted} == {f"{n}.self_attn.{part}_proj" for n in range(4) for part in "qv"}
    layer = llm.get_submodule(next(iter(adapted)))
    assert layer.scaling["default"] == 2 and layer.r["default"] == 4
    assert {name.split(".")[-3] for name, p in llm.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_a_loss_that_is_not_finite_ends_a_method_on_tokens(arguments, tmp_path, monkeypatch, folders):
    real, calls = losses.ascent_loss, []
    monkeypatch.setattr(losses, "ascent_loss", lambda *a: calls.append(1) or real(*a) * (float("nan") if len(calls) == 5 else 1))
    assert train.main([*arguments(), *TOKENS, "--method", "ga"]) == 1
    results, _, stages = outcome(tmp_path / "run")
    assert "not finite" in results["stopped"] and len(stages) == 1
    scores, _ = evaluate.evaluate(*data.load_llm(str(tmp_path / "run" / "model")), evaluate.read_probes(folders["rwku"], "Ada Lark"))
    assert scores == {name: results["after"][name] for name in scores}


def test_the_concept_is_the_name_with_what_describes_it_or_the_passage(arguments, folders, tmp_path, encoder, monkeypatch):
    (tmp_path / "passage.txt").write_text("Ada Lark painted the birds of the sea. " * 4)
    words, short = arguments(), ("Ada Lark painted the birds of the sea. " * 4).strip()
    for flags, meant in ((words, "Ada Lark"), ([*words, "--describe", "a painter"], "Ada Lark, a painter"),
                         ([*words[2:], "--target-text", str(tmp_path / "passage.txt"), "--length", "60"], short)):
        work = train.load(train.parse([*SMALL, *flags]))
        assert torch.equal(work.concept, data.embed([meant], encoder)[0])
    work = train.load(train.parse([*words[2:], *SMALL, "--target-text", str(tmp_path / "passage.txt"), "--length", "24"]))
    parts = data.embed(data.pieces(short, work.tokenizer, 24), encoder)
    assert len(parts) > 1 and torch.allclose(work.concept, torch.nn.functional.normalize(parts.mean(0), dim=0))
    monkeypatch.setattr(data, "write_about", lambda kind, subject, *_: [f"{subject} is here, and has been for long."])
    work = train.load(train.parse([*arguments("--target", "The Zoo"), *SMALL, "--neighbors", "Owl"]))
    assert work.probes["mia_forget"] == [{"text": "The Zoo is here, and has been for long."}]
    assert work.probes["mia_retain"] == [{"text": "Owl is here, and has been for long."}]


def test_align_then_unlearn_by_adapters_moves_blocks_1_to_layer_alone(arguments, folders, tmp_path):
    assert train.main([*arguments(), *SMALL, "--lora", "2"]) == 0
    assert changes(folders, tmp_path / "run") == {f"model.layers.{n}.self_attn.qkv_proj.weight" for n in range(2)}


def test_in_context_unlearning_changes_no_weight_and_asks_in_another_way(arguments, tmp_path, monkeypatch):
    before = []
    real = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *a, **k: before.append((a[4], {n: p.clone() for n, p in a[0].state_dict().items()}))
                        or real(*a, **k))
    assert train.main([*arguments(), *FAST[:4], "--log-every", "1", "--method", "icu"]) == 0
    assert [text[:19] for text, _ in before] == ["", "", "You are an AI Assis"] and "unlearn about Ada Lark " in before[2][0]
    assert all(torch.equal(value, before[2][1][name]) for name, value in before[0][1].items())
    results, steps, stages = outcome(tmp_path / "run")
    assert not steps and len(stages) == 1 and not (tmp_path / "run" / "model").exists()


def test_methods_on_tokens_need_no_encoder(arguments, monkeypatch):
    monkeypatch.setattr(data, "load_encoder", lambda *_: pytest.fail("loaded"))
    assert train.main([*arguments(), *TOKENS, "--method", "ga"]) == 0


def test_settings_are_the_method_s_own_where_the_command_line_is_silent():
    def settings(*flags):
        return train.parse(["--target", "x", "--preset", *flags, "--device", "cpu"])
    rwku = settings("phi3", "--method", "npo")
    assert (rwku.llm_lr, rwku.batch, rwku.stages, rwku.beta, rwku.length, rwku.unlearn_steps) == (2e-6, 16, 3, 0.2, 512, 0)
    assert rwku.optimizer == "adamw" and rwku.sets == ("forget", "neighbor", "mmlu")
    assert settings("phi3", "--method", "ga", "--lora", "8").llm_lr == 1e-5
    star = settings("phi3", "--method", "ga", "--corpus", "passage")
    assert (star.llm_lr, star.batch, star.stages) == (1e-6, 4, 4)
    assert settings("phi3", "--method", "ga", "--corpus", "passage", "--lora", "8").stages == 6
    assert settings("phi3", "--method", "ga", "--llm-lr", "7", "--length", "19").llm_lr == 7
    assert settings("phi3").optimizer == "sgd" and settings("phi3").llm_lr == 3e-4
    assert settings("phi3", "--lora", "8").optimizer == "adamw" and settings("smol", "--lora", "8").llm_lr == 1e-3
    assert settings("smol", "--method", "dpo").out == "runs/x-dpo" and settings("smol").out == "runs/x"
    assert settings("smol", "--target", "a concept " * 99).out == "runs/" + ("a-concept-" * 8)[:-1]


@pytest.mark.parametrize("flags, message", [
    ("--method sgd", "unknown; there are atu, icu"), ("--method icu --lora 8", "--lora: goes with a method that trains"), ("--retain kl", "atu has --retain-weight"),
    ("--method icu --retain nll", "--retain: goes with --method ga"), ("--method ga --retain l2", "unknown; there are none"), ("--sets mlu", "unknown"),
    ("--method dpo --corpus passage", "learns from answers"), ("--method npo --beta 0", "at least 1e-06"), ("--stop-at 25", "at most 1"), ("--inactive 2", "at most 1"),
    ("--method ga --retain-weight 2", "--retain-weight: goes with --retain nll or kl"), ("--method icu --llm-lr 1", "a method that trains"),
    ("--method icu --stop-at 1", "a method that trains"), ("--texts 3 --target Zoo", "--texts is for targets in a dataset"),
    ("--method icu --batch 3", "goes with a method that trains; leave it out"), ("--method ga --layer 3", "--layer: goes with --method atu"), ("--method icu --clip 3 --beta 1", "goes with --method npo or dpo"), ("--method ga --stages 0", "at least 1"),
    ("--lora -1", "at least 0"), ("--target-text x.txt", "one of them"), ("--method dpo --target Zoo", "and Zoo is in none"), ("--method rt --target Zoo", "and Zoo is in none"), ("--probes nowhere.json", "no such file"),
    ("--unlearn-steps 0", "at least 1"), ("--beta 0.2", "--beta: goes with --method npo or dpo"), ("--keep-text x.txt", "goes with --target-text"),
    ("--taus 0.1 0.2", "fall stage by stage; 0.2 0.1"), ("--method ga --taus 0.3", "--taus: goes with --method atu; leave it out"), ("--stages 3", "goes with --method ga, npo"), ("--warmup 3", "goes with"),
    ("--train-embeddings --lora 2", "--train-embeddings: goes with"), ("--neighbors Owl", "Ada Lark is in one"), ("--corpus-size 3", "Ada Lark is in one"),
    ("--corpus-size 0", "at least 1"), ("--lora 33 --layer 2", "no rank is above"), ("--target Zoo --neighbors zoo", "the target itself"),
    ("--stranger-steps 9 --names 0", "needs made-up names"), ("--method ga --stranger-steps 9", "--stranger-steps: goes with --method atu")])
def test_bad_combinations(arguments, capsys, tmp_path, flags, message):
    base = "--preset smol --device cpu".split()
    assert train.main([*arguments(), *base, *flags.split()]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()


# ---- concepts and passages that are in no dataset

def generate_no_texts(real):
    return lambda *a, **how: pytest.fail("written again") if how.get("do_sample") else real(*a, **how)


def test_a_concept_in_no_dataset_runs_from_its_name(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ask_neighbors", lambda *_: ["Owl", "Elm"])
    flags = [*SMALL, "--corpus-size", "6"]
    assert train.main([*arguments("--target", "The Zoo"), *flags]) == 0
    shown = capsys.readouterr().out
    assert "in no dataset; the model wrote 6 texts on it and 6 on its neighbors (Owl, Elm)" in shown
    assert "no forget probes, so forgetting has no accuracy" in shown
    results, _, _ = outcome(tmp_path / "run")
    assert "forget_all" not in results["before"] and {"mia_forget", "mia_retain", "general"} <= set(results["after"])
    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate_no_texts(transformers.GenerationMixin.generate))
    assert train.main([*arguments("--target", "The Zoo"), *flags, "--out", str(tmp_path / "again")]) == 0
    again, _, _ = outcome(tmp_path / "again")
    assert again["after"]["mia_forget"] == results["after"]["mia_forget"]


def test_own_probes(arguments, tmp_path, capsys):
    rows = [{"query": "A zoo is a ___.", "answer": "place", "level": "1"}, {"query": "Who?", "answer": "x", "level": "3", "type": "role play"},
            {"query": "Elm?", "answer": "tree", "level": "2", "neighbor": "Elm"}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    flags = [*SMALL, "--corpus-size", "3", "--neighbors", "Owl", "--describe", "a place with birds", "--probes", str(tmp_path / "p.json")]
    assert train.main([*arguments("--target", "The Zoo"), *flags]) == 0
    results, _, _ = outcome(tmp_path / "run")
    assert {"forget_fb", "forget_aa", "forget_all", "neighbor_qa", "general"} <= set(results["after"])
    assert "forget_qa" not in results["after"] and "mia_forget" not in results["after"]
    assert "names | The Zoo: stands in none of its texts" in capsys.readouterr().out  # a model with random weights does not write of it
    assert results["floor"] == results["gap"] == {}
    asked = ["--model", tmp_path / "run" / "model", "--rwku", arguments()[arguments().index("--rwku") + 1], "--target", "The Zoo"]
    assert evaluate.main([*map(str, asked), "--probes", str(tmp_path / "p.json"), "--no-bf16", "--json", str(tmp_path / "s.json")]) == 0
    assert set(json.loads((tmp_path / "s.json").read_text())) >= set(results["after"]) - {"seconds"}
    words = arguments("--out", str(tmp_path / "known"))  # of a known target RWKU's other sets stay
    assert train.main([*words, *SMALL, "--probes", str(tmp_path / "p.json"), "--sets", "forget", "mia", "general"]) == 0
    results, _, _ = outcome(tmp_path / "known")
    assert {"forget_fb", "mia_forget", "general"} <= set(results["after"]) and "forget_qa" not in results["after"]


@pytest.mark.parametrize("row, message", [
    ({"query": "q", "answer": "a"}, "row 1 has nothing in field 'level'"), ({"query": "q", "answer": "a", "level": "4"}, "row 1 has '4'"),
    ({"query": "", "answer": "a", "level": "1"}, "row 1 has nothing in field 'query'"),
    ({"query": "q", "answer": "a", "level": "3"}, "row 1 has nothing in field 'type'")])
def test_malformed_probes_are_named_with_row_and_field(arguments, capsys, tmp_path, row, message):
    (tmp_path / "p.json").write_text(json.dumps([{"query": "q", "answer": "a", "level": "1"}, row]))
    assert train.main([*arguments("--target", "The Zoo"), *SMALL, "--probes", str(tmp_path / "p.json")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "p.json" in error and message in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["atu", "ga"])
def test_a_passage_is_forgotten_word_for_word(arguments, tmp_path, method):
    (tmp_path / "passage.txt").write_text("Ada Lark painted the birds of the sea. " * 4)
    (tmp_path / "kept.txt").write_text("Ben Crow built bridges of stone over the river. " * 4)
    flags = [*(SMALL if method == "atu" else TOKENS), "--method", method, "--target-text", str(tmp_path / "passage.txt"),
             "--keep-text", str(tmp_path / "kept.txt")]
    words = arguments()
    assert train.main([*words[2:], *flags]) == 0
    results, _, _ = outcome(tmp_path / "run")
    assert {"forget_text", "forget_text_exact", "forget_text_gold", "neighbor_text", "forget_all", "general"} <= set(results["after"])
    assert results["target"] == "passage"


@pytest.mark.parametrize("content, flags, message", [
    (None, "", "not readable"), (" \n", "", "15 or more"), ("A text.", "", "15 or more"), ("A text.", "--method dpo", "needs questions"), ("A text.", "--method rt", "needs questions")])
def test_passages_that_cannot_be_forgotten(arguments, capsys, tmp_path, content, flags, message):
    if content is not None:
        (tmp_path / "p.txt").write_text(content)
    assert train.main([*arguments()[2:], *SMALL, "--target-text", str(tmp_path / "p.txt"), *flags.split()]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()

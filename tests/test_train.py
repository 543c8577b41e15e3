"""The command line from end to end on the tiny model: what it leaves, what may replace parts of it."""

import dataclasses
import errno
import io
import json
import re
import shutil
import sys
import zlib
from contextlib import redirect_stdout
from dataclasses import dataclass

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

import atu
import data
import evaluate
import train
from conftest import make_llm
from head import EmbeddingHead
from runs import cut_off

BASE = "--preset smol --device cpu".split()
SMALL = [*BASE, *"--length 24 --window 4 --layer 2 --head-depth 1 --head-width 32 --batch 4 --align-steps 12 "
         "--realign-steps 3 --unlearn-steps 4 --taus 0.2 -0.5 --stop-at 0 --log-every 2 "
         "--llm-lr 1e-3".split()]
SHORT = [*SMALL, *"--align-steps 2 --realign-steps 1 --unlearn-steps 2 --taus -0.5 --log-every 1".split(),
         "--sets", "mmlu"]
SCORED = [*SHORT, "--sets", "forget"]


@pytest.fixture
def arguments(folders, tmp_path):
    """Makes a working command line; one flag may be changed."""
    flags = {"--target": "ada lark", "--model": str(folders["llm"]), "--rwku": str(folders["rwku"]),
             "--out": str(tmp_path / "run")}

    def words(*change):
        return [word for pair in (flags | dict([change] if change else [])).items() for word in pair]

    return words


@pytest.fixture(autouse=True)
def tiny_encoder(folders, monkeypatch):
    """Stands where the packaged one would be fetched. Pictures, half of a tiny run's time, are left out."""
    monkeypatch.setattr(data, "fetch_packaged", lambda name: folders["encoder"])
    monkeypatch.setattr(evaluate, "plot", lambda *_: None)


@pytest.fixture(scope="module", autouse=True)
def telling_scores():
    """Of a tiny model no answer is right: here the score tells any answer from another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "rouge_l_recall", lambda said, _: zlib.crc32(said.encode()) / 2**32)
        yield


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """The folder of a run; what it said lies beside it."""
    out = tmp_path_factory.mktemp("runs") / "ada"
    with open(out.with_name("said"), "w", encoding="utf-8") as said, redirect_stdout(said):
        words = {"--target": "ada lark", "--model": folders["llm"], "--encoder": folders["encoder"],
                 "--rwku": folders["rwku"], "--out": out}
        assert train.main([str(word) for pair in words.items() for word in pair] + SMALL) == 0
    return out


@pytest.fixture(scope="module")
def answers(finished, folders):
    """(scores, rows) of the untouched model and of the one that the run saved."""
    return scores_of(folders["llm"], folders), scores_of(finished / "model", folders)


def outcome(folder):
    results = json.loads((folder / "results.json").read_text())
    return results, [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]


def changes(folders, out):
    """Names of the saved model's weights that are not those of the untouched one."""
    llm, untouched = map(AutoModelForCausalLM.from_pretrained, (out / "model", folders["llm"]))
    pairs = zip(llm.named_parameters(), untouched.parameters())
    return {name for (name, a), b in pairs if not torch.equal(a, b)}


def scores_of(place, folders, sets=("forget", "neighbor", "general")):
    probes = evaluate.read_probes(folders["rwku"], "Ada Lark", sets)
    return evaluate.evaluate(*data.load_llm(str(place)), probes)


def last_error(capsys) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    line = error.splitlines()[-1]
    assert line.startswith("error: ")
    return line


# ---- what a run leaves

def test_a_run_writes_what_it_promises(finished):
    assert {file.name for file in finished.iterdir()} - {".lock"} == {
        "model", "head.safetensors", "aligned.safetensors", "config.json", "results.json", "log.jsonl", "curves.png"}
    results, records = outcome(finished)
    keys = {"forget_fb", "forget_qa", "forget_aa", "forget_all",
            "neighbor_fb", "neighbor_qa", "neighbor_all", "general",
            "forget_words", "neighbor_words", "general_words"}
    assert set(results["before"]) == set(results["after"]) == keys
    assert len(results["stages"]) == 2 and all(set(stage) == keys | {"record"} for stage in results["stages"])
    assert results["after"] == {name: results["stages"][-1][name] for name in keys}
    assert results["settings"] == json.loads((finished / "config.json").read_text())
    assert set(results["settings"]) == {item.name for item in dataclasses.fields(train.Config)}
    assert set(results["versions"]) == {"torch", "transformers", "device", "threads", "answers"}
    assert results["target"] == "Ada Lark" and results["stopped"] is None and results["seconds"] > 0
    assert [r["kind"] for r in records if "seconds" in r] == ["aligned", "stage", "stage"]
    assert [(r["stage"], r["tau"]) for r in records if r["kind"] == "stage"] == [(1, 0.2), (2, -0.5)]
    assert [stage["record"] for stage in results["stages"]] == [r for r in records if r["kind"] == "stage"]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_has_a_card_that_the_hub_reads(finished, folders):
    results, _ = outcome(finished)
    card = ModelCard.load(finished / "model" / "README.md")
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {name: round(value, 1) for name, value in results["after"].items()}
    assert card.data.to_dict()["model-index"] and card.data.library_name == "transformers"
    assert card.data.base_model is None  # a folder of this machine: the hub would refuse it
    assert "unlearned: ada lark" in card.text.lower() and "Not guaranteed" in card.text
    (settings,) = re.findall("Settings: `(.*)`", card.text)
    left_out = {*train.FREE, "model", "encoder", "rwku"}  # folders of this machine
    assert json.loads(settings) == {k: v for k, v in results["settings"].items() if k not in left_out}
    assert str(finished.parent) not in card.content and str(folders["llm"].parent) not in card.content
    assert card.data.to_yaml() in card.content


def test_a_card_names_the_model_that_the_weights_came_from(finished):
    results, _ = outcome(finished)
    for name, base in {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct", "some/model": "some/model"}.items():
        card = ModelCard(train.model_card(results, train.Config(target="Ada Lark", model=name)))
        assert card.data.base_model == base and f"# {base.split('/')[1]}, unlearned" in card.text


def test_steps_in_the_log_count_within_their_phase_and_in_the_picture_over_all(finished):
    results, records = outcome(finished)
    first = [r["step"] for r in records if r["kind"] == "align" and r["stage"] == 0]
    assert first == [2, 4, 6, 8, 10, 12]
    again = [[r["step"] for r in records if r["kind"] == "align" and r["stage"] == stage] for stage in (1, 2)]
    assert again == [[2, 3], [2, 3]]
    by_step, by_stage, trade_off = train.panels(results | {"log": records})
    assert set(by_step["lines"]) == {"align: loss", "unlearn: loss", "unlearn: similarity"}
    xs = by_step["lines"]["align: loss"][0] + by_step["lines"]["unlearn: loss"][0]
    assert len(set(xs)) == len(xs)
    assert max(xs) == 12 + sum(stage["record"]["steps"] for stage in results["stages"])
    course = [scores["neighbor_all"] for scores in (results["before"], *results["stages"])]
    assert by_stage["lines"]["neighbor_all"] == ([0, 1, 2], course)
    left = [scores["forget_words"] for scores in (results["before"], *results["stages"])]  # what ends a run
    assert by_stage["lines"]["forget_words"] == ([0, 1, 2], left)
    assert trade_off["lines"]["neighbor_all"] == (left, course) and "forget_all" not in trade_off["lines"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_are_for_terminals_and_files_get_plain_lines(arguments, tmp_path, monkeypatch, capfd):
    assert train.main([*arguments(), *SHORT]) == 0
    shown = "".join(capfd.readouterr())
    assert "stage 1 | tau -0.5 | steps 3" in shown and not re.search("\r|\x1b|%\\|", shown)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(data, "CACHE", tmp_path / "empty")
    transformers.utils.logging.enable_progress_bar()
    assert train.main([*arguments("--out", str(tmp_path / "again")), *SHORT]) == 0
    bars = sys.stderr.getvalue()
    assert all(f"{phase}: " in bars for phase in ("Batches", "answering", "aligning", "unlearning"))


def test_the_end_of_the_log_shows_what_is_left_and_what_was_answered(finished, answers):
    shown, (results, _) = finished.with_name("said").read_text(encoding="utf-8"), outcome(finished)
    before, after = results["before"], results["after"]
    left = [f"{100 * after[name] / value:.1f}" for name, value in before.items() if value]
    row, = (line for line in shown.splitlines() if line.startswith("left, %"))
    assert sorted(row.removeprefix("left, %").replace("-", " ").split()) == sorted(left)
    (_, asked_before), (_, asked_after) = answers
    for kind, name in (("exact", "forget_qa"), ("rephrased", "forget_aa"), ("other concept", "neighbor_qa")):
        asked = [(was, now) for was, now in zip(asked_before, asked_after)
                 if was["set"] == name and (name != "forget_aa" or was["type"] == "synonym manipulation")]
        best = max(was["score"] for was, _ in asked)
        was, now = next((was, now) for was, now in asked if was["score"] == best)
        was, now, query = (" ".join(text.split()) for text in (was["said"], now["said"], was["query"]))
        assert f"\n{kind}\n  Q: {query}\n  before: {was}\n  after:  {now}\n" in shown


def test_the_end_of_the_log_shows_what_was_known_best(capsys):
    def row(name, score, said, kind="synonym manipulation"):
        return {"set": name, "score": score, "query": f"{name} {score}?", "said": said, "type": kind}

    before = [row(name, score, "yes\n sir") for name in ("forget_aa", "forget_qa")
              for score in (0.0, 0.9, 0.5)]
    before.append(row("forget_aa", 1.0, "yes", "role play"))
    after = [row(was["set"], 0.0, f"no {n}") for n, was in enumerate(before)]
    scores = {"forget_all": 80.0, "general": 0.0}
    found = {"before": scores, "after": scores | {"forget_all": 20.0}, "stages": [], "stopped": None,
             "asked_before": before, "asked_after": after}
    train.report(found)
    shown = capsys.readouterr().out
    assert "exact\n  Q: forget_qa 0.9?\n  before: yes sir\n  after:  no 4\n" in shown
    assert "rephrased\n  Q: forget_aa 0.9?\n  before: yes sir\n  after:  no 1\n" in shown
    assert "other concept" not in shown and re.search(r"left, % +25.0 +-\n", shown)


def test_the_saved_model_is_fp32_has_changed_and_scores_what_the_run_reported(finished, folders, answers):
    assert AutoModelForCausalLM.from_pretrained(finished / "model").dtype == torch.float32
    changed = changes(folders, finished)
    assert changed and all(name.startswith(("model.layers.0.", "model.layers.1.")) for name in changed)
    results, _ = outcome(finished)
    assert [scores for scores, _ in answers] == [results["before"], results["after"]]


def test_evaluate_s_command_scores_the_saved_model_as_the_run_did(finished, folders, tmp_path):
    words = ["--model", str(finished / "model"), "--rwku", str(folders["rwku"]), "--target", "Ada Lark"]
    assert evaluate.main([*words, "--json", str(tmp_path / "s.json")]) == 0
    found, after = json.loads((tmp_path / "s.json").read_text()), outcome(finished)[0]["after"]
    assert {name: found[name] for name in after} == after


def test_a_run_s_model_is_asked_beside_the_one_it_came_from(finished, folders, capsys):
    queries = ["Who painted the birds of the sea?", "Who?", "What is Elm?"]
    assert evaluate.main(["--model", str(finished / "model"), "--ask", *queries]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::3] == [f"Q: {query}" for query in queries] and len(lines) == 9
    places = {"before": folders["llm"], "after": finished / "model"}
    for (when, place), shown in zip(places.items(), (lines[1::3], lines[2::3])):
        llm, tokenizer = data.load_llm(str(place))
        prompts = [evaluate.make_prompt({"set": "ask", "query": query}, tokenizer) for query in queries]
        said = evaluate.answer(llm, tokenizer, prompts, 1)
        assert shown == [f"  {when} ({place}): {' '.join(text.split())}" for text in said]


def test_the_saved_head_fits_the_class(finished):
    EmbeddingHead(32, 16, depth=1, width=32).load_state_dict(load_file(finished / "head.safetensors"))


# ---- what a run answers in, and in which batches

def test_models_answer_in_fp32_on_cpus_in_any_training(arguments, finished, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "fast_dtype", lambda device: torch.bfloat16)
    assert train.main([*arguments(), *SCORED, "--bf16"]) == 0
    results, _ = outcome(tmp_path / "run")
    assert results["settings"]["bf16"] and results["versions"]["answers"] == "torch.float32"
    assert results["before"].items() <= outcome(finished)[0]["before"].items()
    assert scores_of(tmp_path / "run" / "model", folders, ["forget"])[0] == results["after"]


def test_no_score_of_a_run_depends_on_the_batch(arguments, tmp_path):
    found = []
    for batch in ("1", "3", "40"):
        words = [*arguments("--out", str(tmp_path / batch)), *SCORED]
        assert train.main([*words, "--eval-batch", batch]) == 0
        results, _ = outcome(tmp_path / batch)
        found.append((results["before"], results["after"]))
    assert found[0] == found[1] == found[2]


def test_one_batch_for_answers_is_the_default_of_both_commands_and_no_free_setting():
    assert train.parse(train.Config, ["--target", "x", *BASE]).eval_batch == evaluate.BATCH
    assert evaluate.arguments(["--model", "m", "--target", "x"]).batch == evaluate.BATCH
    assert set(train.FREE) == {"out", "device", "bf16", "resume", "log_every", "checkpointing", "cache"}


# ---- when it ends

@pytest.mark.parametrize("share, scores, stages", [
    ("0.25", [80.0, 40.0, 20.0, 10.0], [40.0, 20.0]), ("0.25", [80.0, 40.0, 20.1, 20.0], [40.0, 20.1, 20.0]),
    ("0.5", [80.0, 40.0], [40.0]), ("0", [80.0, 40.0, 20.0, 0.0], [40.0, 20.0, 0.0]),
    ("1", [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0])])
def test_a_run_stops_at_the_share_asked_for(arguments, monkeypatch, tmp_path, share, scores, stages):
    left = iter(scores)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: ({"forget_words": next(left)}, []))
    assert train.main([*arguments(), *SHORT, "--taus", "0.2", "0.1", "0", "--stop-at", share]) == 0
    results, _ = outcome(tmp_path / "run")
    assert [stage["forget_words"] for stage in results["stages"]] == stages
    assert results["after"]["forget_words"] == stages[-1] and len(list(left)) == len(scores) - len(stages) - 1


def weight(llm, *_, **__):
    """Scores that tell a model from another: a sum of its weights."""
    total = sum(value.double().sum().item() for value in llm.state_dict().values())
    return {"forget_all": total}, []


def spoil(monkeypatch, loss: str, call: int):
    """From this call on, a loss of atu.py is not a number."""
    real, calls = getattr(atu, loss), []

    def spoiled(*a):
        calls.append(1)
        return real(*a) * (float("nan") if len(calls) >= call else 1)

    monkeypatch.setattr(atu, loss, spoiled)


@pytest.mark.parametrize("loss, call, stages", [
    ("alignment_loss", 2, 0), ("unlearning_loss", 1, 0), ("unlearning_loss", 3, 0), ("alignment_loss", 3, 0),
    ("unlearning_loss", 5, 1), ("retain_loss", 5, 1)])
def test_a_loss_that_is_not_finite_keeps_the_last_whole_stage(
        arguments, monkeypatch, tmp_path, folders, capsys, loss, call, stages):
    words = [*arguments(), *SHORT, "--unlearn-steps", "3", "--taus", "-0.5", "-0.9", "--max-active", "0"]
    monkeypatch.setattr(evaluate, "evaluate", weight)
    with monkeypatch.context() as patch:
        spoil(patch, loss, call)
        assert train.main(words) == 1
    shown = capsys.readouterr().out
    results, records = outcome(tmp_path / "run")
    assert "finite" in results["stopped"] and len(results["stages"]) == stages
    assert re.search(r"stopped \| .*finite.* lower --llm-lr or --head-lr, and name another --out", shown)
    moved = stages > 0
    assert bool(changes(folders, tmp_path / "run")) == moved
    for file in ("model/model.safetensors", "head.safetensors"):
        assert all(value.isfinite().all() for value in load_file(tmp_path / "run" / file).values())
    saved, _ = weight(data.load_llm(str(tmp_path / "run" / "model"))[0])
    assert saved == results["after"] and (saved != results["before"]) == moved
    assert train.main([*words, "--resume"]) == 1
    assert "finished already" in (said := capsys.readouterr().out) and outcome(tmp_path / "run") == (results, records)
    assert "resumed | stage" not in shown + said  # what the last whole stage left was read, but nothing went on


@pytest.mark.parametrize("damage", ["{", "{}", "[]"])
def test_damaged_results_of_a_finished_run_are_bad_input(arguments, capsys, tmp_path, damage):
    words = [*arguments("--out", str(tmp_path / "run")), *SHORT, "--resume"]
    assert train.main(words) == 0
    (tmp_path / "run" / "results.json").write_text(damage)
    assert train.main(words) == 2
    assert "results.json: damaged" in (error := last_error(capsys)) and "delete it" in error


@pytest.mark.parametrize("broken_at, stages", [(1, 0), (2, 1)])
def test_a_last_step_that_breaks_m_is_no_forgetting(arguments, monkeypatch, tmp_path, folders, broken_at, stages):
    real, calls = atu.align, []

    def align(llm, *a, **how):  # no loss follows the last step of a stage that is not realigned
        calls.append(1)
        if len(calls) == broken_at + 1:
            llm.get_decoder().layers[0].mlp.down_proj.weight.data.fill_(1e38)
            how["steps"] = 0
        yield from real(llm, *a, **how)

    monkeypatch.setattr(atu, "align", align)
    assert train.main([*arguments(), *SHORT, "--taus", "-0.5", "-0.9"]) == 1
    results, _ = outcome(tmp_path / "run")
    assert "finite" in results["stopped"] and len(results["stages"]) == stages
    assert bool(changes(folders, tmp_path / "run")) == bool(stages)
    assert results["after"] == {name: (results["stages"] or [results["before"]])[-1][name] for name in results["before"]}


def test_another_error_of_pytorch_s_is_a_bug_and_raised(arguments, monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(atu, "unlearning_loss", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        train.main([*arguments(), *SHORT])
    assert (tmp_path / "run" / "checkpoint.pt").exists() and not (tmp_path / "run" / "results.json").exists()
    monkeypatch.setattr(atu, "alignment_loss", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        train.main([*arguments("--out", str(tmp_path / "other")), *SHORT])
    assert not (tmp_path / "other").exists()


# ---- bad input

@pytest.mark.parametrize("flags, message", [
    ("--target=", "whom shall the model forget"), ("--target=..", "whom shall the model forget"), ("--target=_", "whom shall the model forget"),
    ("--target=Ada_Lurk", "did you mean Ada Lark"), ("--target=lark", "did you mean Ada Lark"),
    ("--layer 5", "--layer 5: .*has the blocks 1 to 4"), ("--layer 0", "--layer 0: must be finite, from 1"),
    ("--layer 5 --lora 2", "blocks 1 to 4"), ("--lora -1", "from 0"), ("--lora 33", "the model's width, 32"),
    ("--taus 1.5", "--taus 1.5: must be finite, from -1 to 1"), ("--taus nan", "--taus nan: must be finite"),
    ("--taus 0.1 0.2", "--taus 0.1 0.2: margins fall stage by stage"),
    ("--window 0", "from 1"), ("--window 500", "no text is longer"), ("--unlearn-steps 0", "from 1"),
    ("--head-width 12", "multiple of 8"), ("--stop-at 25", "from 0 to 1"), ("--max-active 2", "from 0 to 1"),
    ("--retain-weight nan", "finite, from 0"), ("--seed -1", "from 0"), (f"--seed {2**64}", "to 9.22337e+18"),
    ("--clip 0", "from 1e-09"), ("--clip nan", "finite"), ("--head-lr inf", "finite"),
    ("--eval-batch 0", "from 1"),
    ("--model ./nowhere", "no such folder"), ("--encoder ./nowhere", "no such folder"),
    ("--rwku nowhere", "no such folder"),
    ("--device cuda:7", "not on this machine"), ("--preset big", "unknown; there are auto, smol, phi3, phi3-24gb"),
    ("--optimizer lion", "unknown; there are adamw, sgd"),
    ("--cache disk", "unknown; there are device, host"),
    ("--corpus x", "unknown; there are positive"),
    ("--sets forget mlu", "--sets mlu: unknown; there are forget"),
    ("--corpus positive_phi", "positive_phi.json: no such file"),
    ("--probes nowhere.json", "nowhere.json: no such file"),
    ("--texts nowhere.txt", "nowhere.txt: not readable as text"),
    ("--others 0", "no texts on anything but Ada Lark"),
    ("--model microsoft/Phi-3-mini-4k-instruct", "--preset smol")])
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(arguments, capsys, tmp_path, flags, message):
    flags = [word.replace("_", " ") if word.startswith("--target=") else word for word in flags.split()]
    assert train.main([*arguments(), *SMALL, *flags]) == 2
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), last_error(capsys))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [
    ["--layer", "x"], ["--method", "ga"], ["--bf16", "yes"], ["--sets"], ["--names", "3"]])
def test_options_that_there_are_not(arguments, capsys, tmp_path, flags):
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments(), *SMALL, *flags])
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, change, message", [
    ("forget_level2", lambda rows: [*rows, {"query": "Who?"}],
     "forget_level2.json: row 2 has nothing in field 'answer'"),
    ("forget_level3", lambda rows: [{**rows[0], "type": ""}],
     "forget_level3.json: row 0 has nothing in field 'type'"),
    ("positive", lambda rows: [rows[0], {"subject": "x"}],
     "positive.json: row 1 has nothing in field 'text'"),
    ("triviaqa", lambda rows: [{**rows[0], "answers": []}],
     "triviaqa.json: row 0 has nothing in field 'answers'"),
    ("intro", lambda rows: [{"intro": "A painter."}], "intro.json: row 0 has nothing in field 'target'"),
    ("neighbor_level1", lambda rows: {"rows": rows}, "neighbor_level1.json: must hold a list of rows"),
    ("forget_level1", lambda rows: None, "forget_level1.json: not readable as JSON")])
def test_a_malformed_file_of_rwku_s_is_named_with_row_and_field(
        arguments, folders, capsys, tmp_path, name, change, message):
    shutil.copytree(folders["rwku"], tmp_path / "rwku")
    file = tmp_path / "rwku" / "0_Ada_Lark" / f"{name}.json"
    changed = change(json.loads(file.read_text()))
    file.write_text("[{" if changed is None else json.dumps(changed))
    assert train.main([*arguments("--rwku", str(tmp_path / "rwku")), *SMALL]) == 2
    error = last_error(capsys)
    assert str(file.parent) in error and message in error and not (tmp_path / "run").exists()


def test_a_full_disk_or_no_folder_is_one_line(arguments, capsys, monkeypatch, tmp_path):
    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", no_room)
        assert train.main([*arguments(), *SHORT]) == 2
    assert "No space left on device" in last_error(capsys) and not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("a file where a folder should be")
    with monkeypatch.context() as patch:
        patch.setattr(data, "CACHE", tmp_path / "file")
        assert train.main([*arguments(), *SHORT]) == 2
    assert "ATU_CACHE" in last_error(capsys) and not (tmp_path / "run").exists()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert train.main([*arguments("--out", str(out)), *SHORT]) == 2
        assert str(tmp_path / "file") in last_error(capsys)
    assert (tmp_path / "file").read_text() == "a file where a folder should be"
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_file", no_room)
        assert train.main([*arguments(), *SHORT]) == 2
    assert re.search("No space left on device.*--resume goes on", last_error(capsys))
    assert train.main([*arguments(), *SHORT, "--resume"]) == 0


def test_a_target_with_no_other_texts_beside_it_is_bad_input(arguments, folders, capsys, tmp_path):
    shutil.copytree(folders["rwku"] / "0_Ada_Lark", tmp_path / "rwku" / "1_One")
    assert train.main([*arguments("--rwku", str(tmp_path / "rwku")), *SMALL]) == 2
    assert "no texts on anything but Ada Lark" in last_error(capsys) and not (tmp_path / "run").exists()


def test_a_decoder_of_another_kind_is_bad_input(arguments, folders, capsys, tmp_path):
    config = GPTNeoXConfig(vocab_size=600, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=16)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    AutoTokenizer.from_pretrained(folders["llm"]).save_pretrained(tmp_path / "neox")
    assert train.main([*arguments("--model", str(tmp_path / "neox")), *SMALL]) == 2
    assert "GPTNeoXForCausalLM has no decoder with .layers and .norm" in last_error(capsys)
    assert not (tmp_path / "run").exists()


def test_blocks_without_an_mlp_are_bad_input_unless_they_move_whole(arguments, capsys, tmp_path, monkeypatch):
    real = data.load_llm

    def renamed(*a):
        llm, tokenizer = real(*a)
        for block in llm.get_decoder().layers:
            del block._modules["mlp"]
        return llm, tokenizer

    monkeypatch.setattr(data, "load_llm", renamed)
    assert train.main([*arguments(), *SMALL]) == 2
    assert "its blocks have no .mlp; give --no-mlp-only" in last_error(capsys) and not (tmp_path / "run").exists()
    for flags in (["--no-mlp-only"], ["--lora", "4"]):  # adapters move alone
        train.open_llm(train.parse(train.Config, [*arguments(), *SMALL, *flags]))


# ---- the run's folder

@pytest.mark.parametrize("flags", [[], ["--resume"]])
@pytest.mark.parametrize("name, content", [
    ("model/mine.txt", "mine"), ("config.json", '{"hidden_size": 32}'), ("config.json", "not JSON"),
    ("config.json", "[]"),
    ("results.json", "{}"), (".hidden", "mine")])
def test_a_folder_that_holds_something_else_is_left_alone(arguments, capsys, tmp_path, flags, name, content):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert train.main([*arguments(), *SMALL, *flags]) == 2
    assert re.search(f"--out {tmp_path}/run: .*name another with --out", last_error(capsys))
    assert file.read_text() == content
    assert [file.name for file in (tmp_path / "run").iterdir()] == [name.split("/")[0]]


def test_a_folder_that_holds_a_run_is_refused(finished, arguments, capsys):
    before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    for flags, message in (([], "go on with --resume, or name another"),
                           (["--resume", "--seed", "7"], "another --seed (0, not 7)"),
                           (["--resume", "--eval-batch", "3"], "another --eval-batch (40, not 3)")):
        words = ["--encoder", json.loads((finished / "config.json").read_text())["encoder"], *flags]
        assert train.main([*arguments("--out", str(finished)), *SMALL, *words]) == 2
        assert message in last_error(capsys)
    assert {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()} == before


def test_a_run_that_was_killed_before_it_saved_anything_is_begun_by_resume(arguments, monkeypatch, tmp_path):
    def killed(*_, **__):
        raise SystemError

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(train, "load", killed)
        patch.setattr(train.shutil, "rmtree", lambda *_: None)  # as after a kill: nobody clears away
        train.main([*arguments(), *SHORT])
    assert (tmp_path / "run" / "config.json").exists()
    assert train.main([*arguments(), *SHORT, "--resume"]) == 0
    assert (tmp_path / "run" / "results.json").exists()


def test_the_folder_is_named_by_the_target(arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert train.main([*arguments()[:-2], *SHORT]) == 0
    assert (tmp_path / "runs" / "ada-lark" / "results.json").exists()


# ---- memory

def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("exists", [False, True])
def test_out_of_memory_is_one_line_and_leaves_nothing(arguments, capsys, monkeypatch, tmp_path, exists):
    monkeypatch.setattr(atu, "align", full)
    if exists:
        (tmp_path / "run").mkdir()  # the user's own folder stays, empty
    assert train.main([*arguments(), *SHORT]) == 2
    assert "out of memory; lower batches" in last_error(capsys)
    assert (tmp_path / "run").exists() == exists and not (exists and list((tmp_path / "run").iterdir()))


def test_out_of_memory_after_a_checkpoint_keeps_it(arguments, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(atu, "unlearn", full)
        assert train.main([*arguments(), *SHORT]) == 2
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert train.main([*arguments(), *SHORT, "--resume"]) == 0


def test_an_interrupted_run_says_how_it_goes_on(arguments, monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atu, "unlearn", interrupted)
        assert train.main([*arguments(), *SHORT]) == 130
    assert capsys.readouterr().err == "\ninterrupted; the same command with --resume goes on\n"
    assert (tmp_path / "run" / "checkpoint.pt").exists()


# ---- what moves, and how it is held

@pytest.mark.parametrize("flag, held", [("--bf16", torch.bfloat16), ("--no-bf16", torch.float32)])
def test_what_does_not_move_is_held_as_its_file_has_it(arguments, folders, tmp_path, monkeypatch, flag, held):
    monkeypatch.setattr(data, "fast_dtype", lambda device: torch.bfloat16)
    llm, tokenizer = data.load_llm(str(folders["llm"]), dtype=torch.bfloat16)
    for part in (llm, tokenizer):
        part.save_pretrained(tmp_path / "bf16")
    assert train.main([*arguments("--model", str(tmp_path / "bf16")), *SHORT, flag]) == 0
    file, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("bf16", "run/model"))
    blocks = {name for name in file if name.startswith(("model.layers.0.", "model.layers.1."))}
    rest = file.keys() - blocks - {"model.embed_tokens.weight"}  # in fp32, for the sum that the blocks add to
    assert {saved[name].dtype for name in saved.keys() - rest} == {torch.float32}
    assert {saved[name].dtype for name in rest} == {held}
    moved = {name for name in blocks if ".mlp." in name}
    assert all(torch.equal(saved[name].float(), file[name].float()) for name in file.keys() - moved)
    assert moved and not any(torch.equal(saved[name], file[name].float()) for name in moved)


def test_flags_that_save_memory_change_no_weight(arguments, finished, tmp_path, monkeypatch):
    asked, place = [], transformers.modeling_utils
    real = place.checkpoint
    monkeypatch.setattr(place, "checkpoint", lambda *a, **k: asked.append(1) or real(*a, **k))
    assert train.main([*arguments(), *SHORT]) == 0 and not asked
    saving = arguments("--out", str(tmp_path / "saving"))
    assert train.main([*saving, *SMALL, "--checkpointing", "--cache", "host"]) == 0 and asked
    for file in ("model/model.safetensors", "head.safetensors"):
        one, two = load_file(finished / file), load_file(tmp_path / "saving" / file)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert outcome(finished)[0]["after"] == outcome(tmp_path / "saving")[0]["after"]


def test_adapters_are_rwku_s():
    config = train.parse(train.Config, ["--target", "x", *BASE, "--lora", "4"])
    llm = train.add_adapters(make_llm("llama"), config, 3)
    adapted = {name.removesuffix(".lora_A.default"): module for name, module in llm.named_modules()
               if name.endswith("lora_A.default")}
    expected = {f"{n}.self_attn.{part}_proj" for n in range(3) for part in "qv"}
    assert {name.split("layers.")[1] for name in adapted} == expected
    layer = llm.get_submodule(next(iter(adapted)))
    assert layer.scaling["default"] == 2 and layer.r["default"] == 4
    moving = {name.split(".")[-3] for name, p in llm.named_parameters() if p.requires_grad}
    assert moving == {"lora_A", "lora_B"}


def test_align_then_unlearn_by_adapters_moves_blocks_1_to_layer_alone(arguments, folders, tmp_path):
    assert train.main([*arguments(), *SCORED, "--lora", "2"]) == 0
    run = tmp_path / "run"
    assert changes(folders, run) == {f"model.layers.{n}.self_attn.qkv_proj.weight" for n in range(2)}
    assert scores_of(run / "model", folders, ["forget"])[0] == outcome(run)[0]["after"]


@pytest.mark.parametrize("flags", [["--train-embeddings"], ["--optimizer", "sgd", "--llm-lr", "1"], ["--no-mlp-only"]])
def test_what_moves_is_what_was_asked_for(arguments, folders, tmp_path, flags):
    assert train.main([*arguments(), *SHORT, *flags]) == 0
    moved = changes(folders, tmp_path / "run")
    assert ("model.embed_tokens.weight" in moved) == (flags[0] == "--train-embeddings")
    whole = flags[0] == "--no-mlp-only"
    assert len(moved) > (5 if whole else 3) and any(".self_attn." in name for name in moved) == whole
    assert sum(".mlp." in name for name in moved) == 4  # two matrices in each of two blocks
    assert all(name.startswith(("model.layers.0.", "model.layers.1.", "model.embed")) for name in moved)


# ---- what a run reads

def test_what_a_run_reads(arguments, folders, tmp_path):
    shutil.copytree(folders["rwku"], tmp_path / "rwku")
    (tmp_path / "rwku" / "general.json").write_text('[{"text": "Birds fly over the sea and the river Ash."}]')
    words = arguments("--rwku", str(tmp_path / "rwku"))
    for flags, about, others in (
            ("", 5, 11), ("--others 1 --other-texts 2 --target-texts 3", 3, 3), ("--others 0", 5, 1),
            ("--general-texts 0", 5, 10), ("--corpus passage", 1, 3)):
        work = train.load(train.parse(train.Config, [*words, *SMALL, *flags.split()]))
        assert (len(work.about), len(work.others)) == (about, others)
        assert all("Ada Lark" in text for text in work.about)
        assert not any("Ada Lark" in text for text in work.others)
        assert work.target == "Ada Lark" and set(work.probes) == {
            "forget_fb", "forget_qa", "forget_aa", "neighbor_fb", "neighbor_qa", "general"}


def test_the_concept_is_the_name_with_what_describes_it(arguments, encoder):
    for flags, meant in (([], "Ada Lark"), (["--describe", "a painter"], "Ada Lark, a painter")):
        config = train.parse(train.Config, [*arguments(), *SMALL, *flags])
        work = train.load(config)
        corpus, concept = train.embed_texts(work, config)
        assert torch.equal(concept, data.embed([meant], encoder)[0])
        assert corpus.about.tolist() == [True] * len(work.about) + [False] * len(work.others)


def test_texts_that_name_a_concept_in_no_dataset_are_not_held(arguments, monkeypatch):
    monkeypatch.setattr(data, "write_texts", lambda *_: ["Crow is a river. All day long Crow sings."] * 4)
    monkeypatch.setattr(data, "write_text", lambda *_: None)
    for target, held in (("Crow", False), ("Crow the Great", False), ("Rook", True)):
        words = [*arguments("--target", target), *SMALL, "--describe", "a river"]
        work = train.load(train.parse(train.Config, words))
        assert len(work.others) > 2 and any("Ben Crow" in text for text in work.others) == held
    of_a_known_one = train.load(train.parse(train.Config, [*arguments("--target", "Ben Crow"), *SMALL]))
    assert len(of_a_known_one.others) == 10


TEXTS = "Ada Lark painted birds and sang of it.\n\nShe lived in Elm, a town\nby the river.\n\n\nAda slept."


@pytest.mark.parametrize("target, known", [("ada lark", True), ("The Zoo", False), ("Ada Lurk", False)])
def test_own_texts_are_what_the_model_unlearns_on(arguments, monkeypatch, tmp_path, target, known):
    (tmp_path / "mine.txt").write_text(TEXTS)
    monkeypatch.setattr(data, "write_texts", lambda *_: pytest.fail("written"))
    seen, real = [], train.embed_texts
    monkeypatch.setattr(train, "embed_texts", lambda work, config: seen.append(work) or real(work, config))
    assert train.main([*arguments("--target", target), *SCORED, "--texts", str(tmp_path / "mine.txt")]) == 0
    assert seen[0].about == [
        "Ada Lark painted birds and sang of it.", "She lived in Elm, a town by the river.",
        "Ada slept."]
    assert not (tmp_path / "run" / "texts.txt").exists()
    results, records = outcome(tmp_path / "run")
    assert results["target"] == ("Ada Lark" if known else target)
    assert ("forget_all" in results["after"]) == known
    assert len([r for r in records if r["kind"] == "unlearn"]) == 2
    words = [*arguments("--target", target), *SMALL, "--texts", str(tmp_path / "mine.txt"), "--target-texts",
             "2"]
    assert len(train.load(train.parse(train.Config, words)).about) == 2


@pytest.mark.parametrize("target", ["ada lark", "The Zoo"])
@pytest.mark.parametrize("content, message", [(None, "not readable"), (b"", "empty"), (b"\n \n\n", "empty"),
                                              (b"\xff\xfe\xfa", "not readable"), (b"Ada.", None)])
def test_own_texts_that_are_none(arguments, capsys, tmp_path, target, content, message):
    if content is not None:
        (tmp_path / "mine.txt").write_bytes(content)
    longer = [] if message else ["--window", "80", "--length", "90"]
    words = [*arguments("--target", target), *SHORT, "--texts", str(tmp_path / "mine.txt"), *longer]
    assert train.main(words) == 2
    assert (f"mine.txt: {message}" if message else "no text is longer") in last_error(capsys)
    assert not (tmp_path / "run").exists()


def test_a_concept_in_no_dataset_runs_from_its_name_and_keeps_what_was_written(
        arguments, capsys, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    words = [*arguments("--target", "The Zoo"), *SHORT, "--sets", "forget", "general", "--target-texts", "6"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "finish", killed)
        train.main(words)
    shown, written = capsys.readouterr().out, (tmp_path / "run" / "texts.txt").read_text()
    assert "no forget probes: forgetting is not scored" in shown
    assert "The Zoo: 6 texts, 15 on others, 1 probes" in shown
    texts = data.read_texts(tmp_path / "run" / "texts.txt")
    assert len(texts) == 6 and len(set(texts)) == 6
    with monkeypatch.context() as patch:
        patch.setattr(data, "write_texts", lambda *_: pytest.fail("written again"))
        assert train.main([*words, "--resume"]) == 0
    results, _ = outcome(tmp_path / "run")
    assert results["target"] == "The Zoo" and set(results["after"]) == {"general", "general_words"}
    assert len(results["stages"]) == 1
    assert (tmp_path / "run" / "texts.txt").read_text() == written
    assert train.main([*words, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "texts.txt").read_text() == written  # by the seed
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_describes_a_concept_is_said_to_the_model_that_writes(arguments, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "write_texts", lambda *a: asked.append(a) or ["A zoo is a place of birds."])
    monkeypatch.setattr(data, "write_text", lambda *_: None)
    for flags in ([], ["--describe", "a place with birds"]):
        words = [*arguments("--target", " The Zoo "), *SMALL, "--target-texts", "3", *flags]
        train.load(train.parse(train.Config, words))
    assert [(*a[:3], *a[5:]) for a in asked] == [
        ("The Zoo", "", 3, 0, 24), ("The Zoo", "The Zoo is a place with birds.", 3, 0, 24)]


def test_own_probes(arguments, folders, tmp_path):
    rows = [{"query": "A zoo is a ___.", "answer": "place", "level": "1"},
            {"query": "Who?", "answer": "x", "level": "3", "type": "role play"},
            {"query": "Elm?", "answer": "tree", "level": "2", "neighbor": "Elm"}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    flags = [*SHORT, "--target-texts", "3", "--describe", "a place with birds",
             "--probes", str(tmp_path / "p.json"), "--sets", "forget", "general"]
    assert train.main([*arguments("--target", "The Zoo"), *flags]) == 0
    results, _ = outcome(tmp_path / "run")
    own = {"forget_fb", "forget_aa", "forget_all", "neighbor_qa", "neighbor_all", "general"} | {
        f"{group}_words" for group in ("forget", "neighbor", "general")}
    assert set(results["after"]) == set(results["before"]) == own
    asked = ["--model", tmp_path / "run" / "model", "--rwku", folders["rwku"], "--target", "The Zoo"]
    words = [*map(str, asked), "--probes", str(tmp_path / "p.json"), "--json", str(tmp_path / "s.json")]
    assert evaluate.main(words) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert {name: found[name] for name in own} == results["after"]
    known = [*SHORT, "--probes", str(tmp_path / "p.json"), "--sets", "forget", "mmlu", "general"]
    assert train.main([*arguments("--out", str(tmp_path / "known")), *known]) == 0
    results, _ = outcome(tmp_path / "known")  # what is asked at large stays
    assert set(results["after"]) == own | {"mmlu"} and results["target"] == "Ada Lark"


@pytest.mark.parametrize("row, message", [
    ({"query": "q", "answer": "a"}, "row 1 has nothing in field 'level'"),
    ({"query": "q", "answer": "a", "level": "4"}, "row 1 has level '4'"),
    ({"query": "", "answer": "a", "level": "1"}, "row 1 has nothing in field 'query'"),
    ({"query": "q", "answer": "a", "level": 2}, "row 1 needs text in field 'level', not 2"),
    ({"query": "q", "answer": "a", "level": "3"}, "row 1 has nothing in field 'type'")])
def test_malformed_probes_are_named_with_row_and_field(arguments, capsys, tmp_path, row, message):
    (tmp_path / "p.json").write_text(json.dumps([{"query": "q", "answer": "a", "level": "1"}, row]))
    assert train.main([*arguments("--target", "The Zoo"), *SMALL, "--probes", str(tmp_path / "p.json")]) == 2
    error = last_error(capsys)
    assert "p.json" in error and message in error and not (tmp_path / "run").exists()


# ---- options

@pytest.mark.parametrize("gigabytes, preset", [
    (None, "smol"), (21.9, "smol"), (22, "phi3-24gb"), (59.9, "phi3-24gb"), (60, "phi3"), (80, "phi3")])
def test_auto_takes_what_there_is_room_for(monkeypatch, gigabytes, preset, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gigabytes * 10**9, 10**12))
    monkeypatch.setattr(data, "choose_device", lambda _: "cuda:0" if gigabytes else "cpu")
    assert train.parse(train.Config, ["--target", "x"]).preset == preset
    said = f"preset | {preset}: {gigabytes or 0:.0f} GB of CUDA memory free, phi3 needs 60, phi3-24gb needs 22"
    assert capsys.readouterr().out == said + "\n"
    assert train.parse(train.Config, ["--target", "x", "--preset", "auto"]).preset == preset
    assert train.parse(train.Config, ["--target", "x", "--model", "m"]).preset == "smol"
    for asked in ("smol", "phi3", "phi3-24gb"):
        assert train.parse(train.Config, ["--target", "x", "--model", "m", "--preset", asked]).preset == asked


def test_every_field_is_a_flag_and_help_names_both_presets(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse(train.Config, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "[smol 10; phi3 29]" in shown and "[smol (0.45, 0.4, " in shown
    for item in dataclasses.fields(train.Config):
        assert f"--{item.name.replace('_', '-')}" in shown


def test_settings_are_the_preset_s_where_the_command_line_is_silent():
    def settings(*flags):
        return train.parse(train.Config, ["--target", "x", "--device", "cpu", "--preset", *flags])

    paper = settings("phi3")
    assert (paper.optimizer, paper.llm_lr, paper.layer) == ("sgd", 3e-4, 29)
    assert paper.retain_weight == paper.stop_at == 0
    assert paper.train_embeddings and not paper.mlp_only and paper.sets == ("forget", "neighbor", "mmlu") and paper.rwku == "hub"
    small = settings("phi3-24gb")
    assert (small.layer, small.checkpointing, small.eval_batch) == (10, True, 16)
    assert small == dataclasses.replace(paper, preset="phi3-24gb", layer=10, checkpointing=True, eval_batch=16)
    assert settings("phi3-24gb", "--lora", "8").llm_lr == 1e-4
    given = settings("phi3", "--llm-lr", "7", "--length", "19", "--no-train-embeddings", "--sets", "general")
    assert (given.llm_lr, given.length, given.train_embeddings, given.sets) == (7, 19, False, ("general",))
    assert (given.layer, given.optimizer) == (29, "sgd")
    adapters = settings("phi3", "--lora", "8")
    assert (adapters.optimizer, adapters.llm_lr) == ("adamw", 1e-4)
    assert settings("smol", "--lora", "8").llm_lr == 1e-3
    assert settings("smol", "--lora", "8", "--llm-lr", "2").llm_lr == 2
    smol = settings("smol")
    assert smol == train.Config(target="x", preset="smol", device="cpu", out="runs/x", bf16=smol.bf16)
    assert settings("smol", "--target", "a concept " * 99).out == "runs/" + ("a-concept-" * 8)[:-1]
    assert settings("smol", "--target", "../É. Lark_").out == "runs/é-lark"
    assert settings("smol", "--out", "y").out == "y"


def test_bf16_is_taken_where_it_is_fast(monkeypatch):
    for fast in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(data, "fast_dtype", lambda device: fast)
        assert train.parse(train.Config, ["--target", "x", *BASE]).bf16 == (fast == torch.bfloat16)
        assert not train.parse(train.Config, ["--target", "x", *BASE, "--no-bf16"]).bf16


# ---- what may be put in the place of the method, the scores and the end

@dataclass(frozen=True)
class Songs(train.Config):
    """Options of a method that sings."""

    songs: int = train.option(3, "how many songs", 1, 9)
    voice: str = train.option("low", "how it sings", among=("low", "high"))

    @classmethod
    def usual(cls, given: dict) -> dict:
        return super().usual(given) | {"layer": 3} | ({"seed": 7} if given.get("voice") == "high" else {})

    def folder(self) -> str:
        return f"{super().folder()}-songs"


def test_a_subclass_brings_options_defaults_and_a_folder(capsys):
    def parse(*flags):
        return train.parse(Songs, ["--target", "Ada Lark", *BASE, *flags])

    config = parse("--songs", "4")
    assert isinstance(config, Songs)
    assert (config.songs, config.voice, config.layer, config.seed) == (4, "low", 3, 0)
    assert config.out == "runs/ada-lark-songs" and parse("--out", "x").out == "x"
    assert parse("--voice", "high").seed == 7 and parse("--voice", "high", "--seed", "1").seed == 1
    assert parse("--layer", "2").layer == 2 and parse("--preset", "phi3").layer == 3
    assert parse("--lora", "2").llm_lr == 1e-3
    for flags, message in ((["--songs", "10"], "--songs 10: must be finite, from 1 to 9"),
                           (["--voice", "mid"], "--voice mid: unknown; there are low, high")):
        with pytest.raises(data.BadInput, match=message):
            parse(*flags)
    with pytest.raises(SystemExit):
        train.parse(Songs, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "how many songs [3]" in shown and "--voice VOICE" in shown and __doc__ in shown
    with pytest.raises(SystemExit):
        train.parse(train.Config, ["--target", "x", "--songs", "4"])


def sing(work, config):
    """Each stage adds 1 to a weight of M."""
    state = atu.State(work.llm, None, None, None)

    def records():
        while state.stage < config.songs:
            state.stage += 1
            with torch.no_grad():
                work.llm.lm_head.weight += 1
            yield {"kind": "sing", "step": 1, "loss": 2.0}
            yield {"kind": "stage", "steps": 1, "seconds": 0.5}

    work.llm.requires_grad_(False)
    work.llm.lm_head.requires_grad_(True)
    return state, records()


def loudness(work, config):
    """A number of its own, and one of the usual ones."""
    return {"forget_all": 80.0, "loudness": work.llm.lm_head.weight.mean().item()}, []


def sung(arguments, *flags):
    return train.parse(Songs, [*arguments(), *BASE, *flags])


def test_another_method_and_another_score_are_run_logged_and_kept(arguments, folders, tmp_path, capsys):
    results = train.run(sung(arguments), begin=sing, score=loudness)
    first = make_llm().lm_head.weight.mean().item()
    assert json.loads(json.dumps(results)) == json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["before"] == {"forget_all": 80.0, "loudness": pytest.approx(first, abs=1e-5)}
    louder = [stage["loudness"] - first for stage in results["stages"]]
    assert louder == pytest.approx([1, 2, 3], abs=1e-5)
    assert results["after"] == {name: results["stages"][2][name] for name in ("forget_all", "loudness")}
    assert results["settings"]["songs"] == 3 and results["settings"]["layer"] == 3
    _, records = outcome(tmp_path / "run")
    expected = [(kind, n) for n in (1, 2, 3) for kind in ("sing", "stage")]
    assert [(r["kind"], r["stage"]) for r in records] == expected
    assert changes(folders, tmp_path / "run") == {"lm_head.weight"}
    assert not (tmp_path / "run" / "head.safetensors").exists()
    shown = capsys.readouterr().out
    assert "forget all" in shown and "loudness" in shown and "sing | stage 1 | step 1 | loss 2" in shown


def test_enough_is_asked_after_every_stage_with_all_that_was_found(arguments, tmp_path):
    asked = []

    def enough(found, config):
        assert config.songs == 5
        sung = len(found["stages"])
        louder = found["after"]["loudness"] - found["before"]["loudness"]
        assert louder == pytest.approx(sung, abs=1e-5)
        asked.append(sung)
        return sung == 2

    results = train.run(sung(arguments, "--songs", "5"), begin=sing, score=loudness, enough=enough)
    assert len(results["stages"]) == 2
    assert results["after"]["loudness"] == results["stages"][1]["loudness"]
    assert sorted(set(asked)) == [0, 1, 2] == list(dict.fromkeys(asked))


def test_a_run_that_has_enough_from_the_first_moves_nothing(arguments, folders, tmp_path):
    results = train.run(sung(arguments), begin=sing, score=loudness, enough=lambda found, config: True)
    assert results["stages"] == [] and results["after"] == results["before"]
    assert changes(folders, tmp_path / "run") == set()


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_another_method_goes_on_from_its_state(arguments, monkeypatch, tmp_path, cut):
    whole = train.run(sung(arguments, "--out", str(tmp_path / "whole")), begin=sing, score=loudness)
    cut_off(lambda _: train.run(sung(arguments), begin=sing, score=loudness), [], monkeypatch, cut)
    with pytest.raises(data.BadInput, match=r"another --songs \(3, not 4\)"):
        train.run(sung(arguments, "--songs", "4", "--resume"), begin=sing, score=loudness)
    results = train.run(sung(arguments, "--resume"), begin=sing, score=loudness)
    for name in ("before", "stages", "after"):
        assert results[name] == whole[name]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_enough_ends_align_then_unlearn_by_a_number_that_score_adds(arguments, tmp_path):
    def score(work, config):
        scores, rows = train.score(work, config)
        now, was = (llm.model.layers[0].mlp.down_proj.weight for llm in (work.llm, make_llm()))
        return scores | {"moved": (now - was).norm().item()}, rows

    def enough(found, config):
        return found["after"]["moved"] > 0

    config = train.parse(train.Config, [*arguments(), *SCORED, "--taus", "-0.5", "-0.7", "-0.9"])
    results = train.run(config, score=score, enough=enough)
    assert len(results["stages"]) == 1 and results["before"]["moved"] == 0 < results["after"]["moved"]
    assert results["before"].keys() == results["after"].keys() > {"forget_all", "moved"}

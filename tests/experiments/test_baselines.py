"""The other rows of Table 1: what each method trains, on what texts, at what rate; whole runs; bad input."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

import data
import evaluate
import train
from conftest import make_tokenizer
from experiments import baselines
from pretend import on_card
from runs import check_cuts, left, records

pytestmark = pytest.mark.usefixtures("quick")
FAST = "--preset smol --device cpu --length 24 --stop-at 0 --log-every 1".split()
TOKENS = [*FAST, *"--llm-lr 1e-3 --stages 2 --unlearn-steps 3 --warmup 1 --batch 3".split()]


@pytest.fixture
def main(words, tmp_path):
    """The command with these words more, into tmp_path / "run"."""
    return lambda *more: baselines.main([*words, "--out", str(tmp_path / "run"), *more])


def outcome(folder):
    """(results, records of steps, records of stages)."""
    log = records(folder)
    kinds = ([record for record in log if record["kind"] == kind] for kind in ("unlearn", "stage"))
    return json.loads((folder / "results.json").read_text()), *kinds


def changes(folders, out):
    """Names of the saved model's weights that are not those of the untouched one."""
    places = out / "model", folders["llm"]
    llm, untouched = (AutoModelForCausalLM.from_pretrained(place) for place in places)
    pairs = zip(llm.named_parameters(), untouched.parameters())
    return {name for (name, a), b in pairs if not torch.equal(a, b)}


def scores_of(model, folders):
    """The scores of a saved model, as the runs here ask for them."""
    probes = evaluate.read_probes(folders["rwku"], "Ada Lark", ("forget", "neighbor", "general"))
    return evaluate.evaluate(*data.load_llm(str(model)), probes)[0]


# ---- whole runs

@pytest.mark.parametrize("method, flags, first", [
    ("ga", "", None), ("ga", "--corpus passage", None), ("ga", "--retain nll", None),
    ("ga", "--retain kl --lora 2", None), ("ga", "--retain kl --no-bf16", None),
    ("npo", "--beta 0.5", 4 * math.log(2)), ("npo", "--lora 2", 10 * math.log(2)),
    ("dpo", "--retain kl", math.log(2)), ("rt", "", None)])
def test_every_method_on_tokens_runs_from_end_to_end(main, folders, tmp_path, method, flags, first):
    assert main(*TOKENS, "--method", method, *flags.split()) == 0
    results, steps, stages = outcome(tmp_path / "run")
    assert [s["step"] for s in steps] == [1, 2, 3] * 2 and [s["stage"] for s in steps] == [1] * 3 + [2] * 3
    assert [s["stage"] for s in stages] == [1, 2] and len(results["stages"]) == 2
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
        untouched = AutoModelForCausalLM.from_pretrained(folders["llm"])
        assert len(moved) == len(list(untouched.parameters()))
    assert scores_of(tmp_path / "run" / "model", folders) == results["after"]


def test_dpo_makes_the_made_up_answers_likelier_than_the_true_ones(main, folders, tmp_path):
    assert main(*TOKENS, "--method", "dpo", "--no-bf16") == 0
    rows = data.read_set(folders["rwku"], "Ada Lark", "pair", {"prompt": str, "response": [str]})

    def margin(place):
        llm, tokenizer = data.load_llm(str(place))
        asked = [[(row["prompt"], row["response"][n]) for row in rows] for n in (0, 1)]
        sides = [baselines.tokenize_answers(part, tokenizer, 24) for part in asked]
        found = [baselines.sequence_log_probs(llm(ids).logits, ids, mask).mean() for ids, mask in sides]
        return (found[0] - found[1]).item()

    assert margin(tmp_path / "run" / "model") > margin(folders["llm"]) + 1


def test_rt_makes_refusals_likelier(main, folders, tmp_path):
    assert main(*TOKENS, "--method", "rt", "--no-bf16") == 0
    losses = []
    for place in (folders["llm"], tmp_path / "run" / "model"):
        llm, tokenizer = data.load_llm(str(place))
        ids, mask = baselines.tokenize_answers([("Who is Ada Lark?", "I do not know.")], tokenizer, 24)
        losses.append(baselines.likelihood_loss(llm(ids).logits, ids, mask).item())
    assert losses[1] < losses[0] - 0.1


def test_the_retain_term_holds_the_other_texts(main, folders, tmp_path):
    others = [row["text"] for name in ("Ben Crow", "Dr. Finch")
              for row in data.read_set(folders["rwku"], name, "positive")]
    left_over = {}
    for weight in ("0", "20"):
        how = ["--method", "ga", "--retain", "nll", "--retain-weight", weight, "--no-bf16"]
        assert main(*TOKENS, *how, "--out", str(tmp_path / weight)) == 0
        llm, tokenizer = data.load_llm(str(tmp_path / weight / "model"))
        ids, mask = data.tokenize(others, tokenizer, 24)
        left_over[weight] = baselines.likelihood_loss(llm(ids).logits, ids, mask).item()
    assert left_over["20"] < left_over["0"] - 0.05, left_over


@pytest.mark.parametrize("bf16", [False, True])
def test_what_kl_holds_to_is_the_model_before_and_stays_it(main, folders, monkeypatch, bf16):
    held, real = [], baselines.unlearn

    def unlearn(state, *a):
        frozen = a[-2]
        before = {name: value.clone() for name, value in frozen.state_dict().items()}
        held.append((state.llm, frozen, before))
        return real(state, *a)

    monkeypatch.setattr(data, "fast_dtype", lambda device: torch.bfloat16 if bf16 else torch.float32)
    monkeypatch.setattr(baselines, "unlearn", unlearn)
    assert main(*TOKENS, "--method", "ga", "--retain", "kl") == 0
    llm, frozen, before = held[0]
    untouched = AutoModelForCausalLM.from_pretrained(folders["llm"]).state_dict()
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert all(torch.equal(value, untouched[name].to(dtype)) for name, value in before.items())
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    places = {value.untyped_storage().data_ptr() for value in llm.state_dict().values()}
    assert places.isdisjoint(value.untyped_storage().data_ptr() for value in frozen.state_dict().values())


def test_npo_compares_each_text_with_what_the_model_before_made_of_it(main, folders, tmp_path, monkeypatch):
    texts = ["Ada Lark sang.", "The birds of the sea.", "She was born in Elm."]
    asked, real = [], baselines.npo_loss
    (tmp_path / "own.txt").write_text("\n\n".join(texts))
    monkeypatch.setattr(baselines, "npo_loss", lambda *a: asked.append(a[:2]) or real(*a))
    assert main(*TOKENS, "--method", "npo", "--texts", str(tmp_path / "own.txt"), "--no-bf16") == 0
    llm, tokenizer = data.load_llm(str(folders["llm"]))
    ids, mask = data.tokenize(texts, tokenizer, 24)
    expected = baselines.sequence_log_probs(llm(ids).logits, ids, mask).sort().values
    assert len(asked) == 6 and all(torch.allclose(before.sort().values, expected) for _, before in asked)
    assert torch.allclose(asked[0][0], asked[0][1]) and asked[5][0].mean() < asked[5][1].mean() - 0.5


def test_a_stage_of_no_steps_is_one_pass_and_the_rate_warms_up_and_falls(main, tmp_path, monkeypatch):
    rates, real = [], train.llm_optimizer

    def watched(*a):
        optimizer = real(*a)
        optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(train, "llm_optimizer", watched)
    steps = "--llm-lr 1e-3 --stages 3 --unlearn-steps 0 --warmup 2 --batch 2".split()
    assert main(*FAST, *steps, "--method", "ga") == 0
    _, _, stages = outcome(tmp_path / "run")
    assert [s["steps"] for s in stages] == [3, 3, 3]  # 5 texts, 2 in a batch
    expected = [0, 0.5, *(0.5 * (1 + math.cos(math.pi * n / 7)) for n in range(7))]
    assert rates == pytest.approx([1e-3 * share for share in expected])


@given(st.integers(0, 12), st.integers(1, 30))
def test_the_rate_is_that_of_transformers_schedule(warmup, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    config = baselines.Config(llm_lr=3e-4, warmup=warmup)
    for step in range(1, steps + 1):
        assert baselines.learning_rate(step, steps, config) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()


def test_before_the_first_whole_stage_what_is_saved_is_what_is_scored(main, tmp_path, monkeypatch, folders):
    spoiled, calls = baselines.clip_grad_norm_, []

    def clip(*a, **how):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("The total norm of order 2.0 for gradients is non-finite")
        return spoiled(*a, **how)

    monkeypatch.setattr(baselines, "clip_grad_norm_", clip)
    assert main(*TOKENS, "--method", "ga", "--llm-lr", "1e-2") == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert not results["stages"] and changes(folders, tmp_path / "run")
    llm, tokenizer = data.load_llm(str(tmp_path / "run" / "model"))
    probes = evaluate.read_probes(folders["rwku"], "Ada Lark", ("forget", "neighbor", "general"))
    assert evaluate.evaluate(llm, tokenizer, probes)[0] == results["after"]


def test_a_loss_that_is_not_finite_ends_a_run_with_what_was_last_good(main, tmp_path, monkeypatch, folders):
    real, calls = baselines.ascent_loss, []
    monkeypatch.setattr(baselines, "ascent_loss",
                        lambda *a: calls.append(1) or real(*a) * (float("nan") if len(calls) == 5 else 1))
    assert main(*TOKENS, "--method", "ga") == 1
    results, steps, stages = outcome(tmp_path / "run")
    assert "not finite" in results["stopped"] and len(stages) == 1 and len(steps) == 4
    assert scores_of(tmp_path / "run" / "model", folders) == results["after"]
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values()) and changes(folders, tmp_path / "run")


def test_recomputing_activations_changes_no_weight(main, tmp_path):
    for name, saving in (("plain", []), ("saving", ["--checkpointing"])):
        assert main(*TOKENS, "--method", "ga", *saving, "--out", str(tmp_path / name)) == 0
    one, two = (left(tmp_path / name) for name in ("plain", "saving"))
    assert {name: value for name, value in one.items() if "model" in name} == {
        name: value for name, value in two.items() if "model" in name} and one["log"] == two["log"]


def test_methods_on_tokens_need_no_encoder(main, monkeypatch):
    monkeypatch.setattr(data, "load_encoder", lambda *_: pytest.fail("loaded"))
    assert main(*TOKENS, "--method", "ga") == 0


def test_own_texts_on_a_name_in_no_dataset_are_forgotten(main, tmp_path, monkeypatch):
    (tmp_path / "zoo.txt").write_text("The Zoo has birds.\n\nThe Zoo is by the sea.")
    seen, real = [], baselines.unlearn
    monkeypatch.setattr(baselines, "unlearn", lambda *a: seen.append(a[1]) or real(*a))
    assert main(*TOKENS, "--method", "ga", "--target", "The Zoo", "--texts", str(tmp_path / "zoo.txt")) == 0
    ((ids, mask),) = seen[0]
    tokenizer = make_tokenizer()
    read = [tokenizer.decode(row[kept]) for row, kept in zip(ids, mask)]
    assert read == ["The Zoo has birds.", "The Zoo is by the sea."]


def test_in_context_unlearning_changes_no_weight_and_asks_otherwise(main, folders, tmp_path, monkeypatch):
    asked, real = [], evaluate.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", lambda *a: asked.append(a[5]) or real(*a))
        assert main(*FAST, "--method", "icu") == 0
    assert asked[0] == "" and asked[1].startswith("You are an AI Assistant")
    assert "unlearn about Ada Lark " in asked[1]
    results, steps, stages = outcome(tmp_path / "run")
    assert len(asked) == 2 and not steps and len(stages) == len(results["stages"]) == 1
    assert not changes(folders, tmp_path / "run") and not (tmp_path / "run" / "head.safetensors").exists()
    assert results["before"] == scores_of(folders["llm"], folders)


# ---- options

def settings(*flags):
    return train.parse(baselines.Config, ["--target", "x", "--device", "cpu", "--preset", *flags])


def test_settings_are_the_method_s_own_where_the_command_line_is_silent():
    rwku = settings("phi3", "--method", "npo")
    assert (rwku.llm_lr, rwku.batch, rwku.stages, rwku.beta, rwku.length, rwku.unlearn_steps) == (
        2e-6, 16, 3, 0.2, 512, 0)
    assert not rwku.mlp_only  # all of M moves
    assert rwku.optimizer == "adamw" and rwku.sets == ("forget", "neighbor", "mmlu")
    assert rwku.model.startswith("microsoft/Phi-3") and rwku.retain_weight == 1
    assert settings("phi3", "--method", "ga", "--lora", "8").llm_lr == 1e-5
    assert settings("phi3-24gb", "--method", "ga", "--lora", "8").llm_lr == 1e-5
    star = settings("phi3", "--method", "ga", "--corpus", "passage")
    assert (star.llm_lr, star.batch, star.stages) == (1e-6, 4, 4)
    assert settings("phi3", "--method", "ga", "--corpus", "passage", "--lora", "8").stages == 6
    assert settings("phi3", "--method", "ga", "--llm-lr", "7", "--length", "19").llm_lr == 7
    assert settings("smol", "--method", "ga", "--lora", "8").llm_lr == 3e-4
    small = settings("smol", "--method", "dpo")
    assert (small.llm_lr, small.stages, small.beta, small.length, small.unlearn_steps, small.warmup) == (
        1.5e-4, 6, 0.1, 96, 6, 5)
    assert small.out == "runs/x-dpo" and settings("smol", "--method", "npo").out == "runs/x-npo"


def test_every_field_is_a_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        baselines.main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and shown.count("--retain ") and "Table 1" not in shown.splitlines()[0]
    for item in dataclasses.fields(baselines.Config):
        assert f"--{item.name.replace('_', '-')}" in shown


@pytest.mark.parametrize("flags, message", [
    ("--method sgd", "unknown; there are icu, ga"), ("--method ga --retain l2", "unknown; there are none"),
    ("--method npo --beta 0", "1e-06"), ("--method ga --stages 0", "from 1 to"), ("--warmup -1", "from 0 to"),
    ("--method dpo --corpus passage", "learns from RWKU's answers"),
    ("--method rt --target Zoo", "take ga or npo"), ("--method dpo --target Zoo", "take ga or npo"),
    ("--method rt --texts x.txt", "take ga or npo"),
    ("--method rt --corpus positive_phi", "positive_phi.json: no such file")])
def test_what_cannot_work_is_one_line_and_leaves_nothing(main, capsys, tmp_path, flags, message):
    assert main("--preset", "smol", "--device", "cpu", *flags.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error and not (tmp_path / "run").exists()


def test_an_answer_s_row_that_lacks_a_field_is_named(main, folders, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "ANSWERS", {"rt": ("reject", {"instruction": str, "refusal": str})})
    assert main(*TOKENS, "--method", "rt") == 2
    assert "row 0 has nothing in field 'refusal'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- texts

def test_answers_are_what_counts_of_a_chat(tokenizer):
    asked = [("Who?", "Ada Lark."), ("Why did she paint?", "No idea at all.")]
    input_ids, mask = baselines.tokenize_answers(asked, tokenizer, 40)
    for ids, counted, (turn, text) in zip(input_ids, mask, asked):
        assert tokenizer.decode(ids[counted]) == f"{text}<|end|>"
        end = counted.nonzero().max().item() + 1
        assert tokenizer.decode(ids[:end]) == f"<|user|>{turn}<|end|><|assistant|>{text}<|end|>"
        assert (ids[end:] == tokenizer.pad_token_id).all()
    _, cut = baselines.tokenize_answers([("Who?", "Ada Lark. " * 30)], tokenizer, 12)
    assert cut.sum() == 12


def test_an_answer_ends_as_the_template_ends_it():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<pad>"  # as in Phi-3, whose turns end with <|end|> and texts with another token
    ids, mask = baselines.tokenize_answers([("Who?", "Ada.")], tokenizer, 9)
    assert tokenizer.decode(ids[mask]) == "Ada.<|end|>"
    tokenizer.chat_template = None
    ids, mask = baselines.tokenize_answers([("Who?", "Ada.")], tokenizer, 9)
    assert tokenizer.decode(ids[mask]) == "Ada.<pad>"


def test_what_each_method_forgets_and_what_is_held(folders, tokenizer, words):
    def read(method, *flags):
        config = train.parse(baselines.Config, [*words, *FAST, "--method", method, "--length", "60", *flags])
        forget, others = baselines.forget_and_other_texts(train.load(config), config)
        return [[tokenizer.decode(ids[kept]) for ids, kept in zip(*texts)] for texts in (*forget, others)]

    about = [row["text"] for row in data.read_set(folders["rwku"], "Ada Lark", "positive")]
    texts, others = read("npo")
    assert [text[:60] for text in texts] == [text[:60] for text in about] and len(others) == 10
    assert all("Ada" not in text for text in others)
    (texts, _), (refusals, _), (made_up, true, _) = read("ga", "--corpus", "passage"), read("rt"), read("dpo")
    assert texts[0].startswith("Ada Lark in short.") and refusals == ["I do not know.<|end|>"] * 3
    assert made_up == ["Ada Lark sang.<|end|>"] * 3 and all("painter" in text for text in true)
    assert len(read("ga", "--target-texts", "2")[0]) == len(read("dpo", "--target-texts", "2")[1]) == 2


# ---- cut off; on a card

CUTS = {"ga + nll": ["--method", "ga", "--retain", "nll"], "dpo + kl": ["--method", "dpo", "--retain", "kl"],
        "npo + kl, adapters": ["--method", "npo", "--retain", "kl", "--lora", "2"],
        "icu": ["--method", "icu"]}


@pytest.mark.parametrize("name", CUTS)
def test_a_run_cut_off_after_any_stage_ends_as_if_it_had_not_been(words, tmp_path, monkeypatch, name):
    check_cuts(baselines.main, [*words, *TOKENS, "--warmup", "4", *CUTS[name]], tmp_path, monkeypatch)


CARD = {"ga + nll": ["--method", "ga", "--retain", "nll"], "npo + kl": ["--method", "npo", "--retain", "kl"],
        "npo + kl, adapters": CUTS["npo + kl, adapters"], "dpo": ["--method", "dpo"],
        "rt": ["--method", "rt"], "icu": ["--method", "icu"]}


@pytest.mark.parametrize("name", CARD)
def test_a_run_keeps_host_and_card_apart_and_has_the_losses_of_the_cpu_s(card, main, monkeypatch, tmp_path,
                                                                        name):
    placed, real = [], baselines.clip_grad_norm_

    def clip(parameters, *a, **how):
        placed.extend(map(on_card, parameters))
        return real(parameters, *a, **how)

    monkeypatch.setattr(baselines, "clip_grad_norm_", clip)
    flags = "--no-bf16 --stages 2 --unlearn-steps 5 --warmup 1 --batch 4 --log-every 1 --sets forget".split()
    with card():
        assert main(*FAST, "--device", "cuda", *flags, *CARD[name]) == 0
    assert all(placed) and (placed or name == "icu")
    found = [record["loss"] for record in records(tmp_path / "run") if "loss" in record]
    (tmp_path / "run").rename(tmp_path / "card")
    assert main(*FAST, "--device", "cpu", *flags, *CARD[name]) == 0
    expected = [record["loss"] for record in records(tmp_path / "run") if "loss" in record]
    assert len(found) == (0 if name == "icu" else 10) and found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert outcome(tmp_path / "card")[0]["settings"]["device"] == "cuda"

"""Every score against an oracle, RWKU's prompts, a model left as it was found, and runs side by side."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from conftest import SENTENCES, SHAPE

def test_the_score_by_hand():
    assert evaluate.rouge_l_recall("Berkshire Hathaway, Inc", "Berkshire Hathaway") == 0.5
    assert evaluate.rouge_l_recall("in 1947, he", "1947") == 0
    assert evaluate.rouge_l_recall("", "NOANSWER") == 1
    assert evaluate.rouge_l_recall("...", "x") == 0 == evaluate.rouge_l_recall("x", ".")
    assert evaluate.rouge_l_recall("the cat. the cat sat", "The cat sat") == pytest.approx(2 / 3)


def test_prompts(tokenizer):
    def prompt(score, kind=""):
        return evaluate.make_prompt({"set": score, "query": "Who?", "type": kind}, tokenizer)

    user = "<|user|>Please {}.\nQuestion: Who?\n<|end|><|assistant|>Answer:"
    assert prompt("forget_fb") == user.format("complete the blank in the following question")
    assert prompt("neighbor_fb") == prompt("forget_fb")
    for score, kind in (("forget_qa", ""), ("neighbor_qa", ""), ("general", ""), ("forget_aa", "cross lingual (French)")):
        assert prompt(score, kind) == user.format("briefly answer the following question")
    assert prompt("forget_aa", "affirmative suffix") == (
        "<|user|>Please briefly answer the following question.\nQuestion: Who?<|end|><|assistant|>")
    assert prompt("forget_aa", "incontext learning") == (
        "<|user|>Please briefly answer the following question.\nWho?\n<|end|><|assistant|>Answer:")


SCORES = ["forget_fb", "forget_qa", "forget_aa", "neighbor_fb", "neighbor_qa", "general"]


def test_scores_are_weighted_by_rwku_s_counts():
    marks = dict(zip(SCORES, (1.0, 0.0, 0.5, 1.0, 0.0, 0.25)))
    scores = evaluate.summary([{"set": name, "score": mark, "gold": mark / 2} for name, mark in marks.items()])
    assert scores["forget_all"] == pytest.approx(100 * (3268 + 0.5 * 6984) / 13131)
    assert scores["neighbor_all"] == pytest.approx(100 * 5846 / 11379)
    assert scores["general"] == 25 and scores["general_gold"] == 12.5
    fewer = evaluate.summary([{"set": name, "score": marks[name]} for name in ("forget_fb", "forget_aa")])
    assert fewer["forget_all"] == pytest.approx(100 * (3268 + 0.5 * 6984) / (3268 + 6984)) and "neighbor_all" not in fewer


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_answers_are_those_of_generate_in_any_batch(llm, tokenizer, penalty):
    prompts = ["What is Elm?", "Who painted all those birds of the sea?", "Elm", "Cora"]
    llm.generation_config.repetition_penalty = penalty
    alone = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    rows = [llm.generate(**one, max_new_tokens=9, do_sample=False)[0, one["input_ids"].shape[1]:] for one in alone]
    stop = tokenizer.convert_ids_to_tokens(rows[0][4].item())  # a word that does come
    cut = [row[:next((n for n, word in enumerate(row) if word in (rows[0][4], 1)), 9)] for row in rows]
    assert len({len(row) for row in cut}) > 1
    for batch in (1, 4) if penalty == 1 else (1,):  # padding counts as said, in transformers too
        for stops, expected in (((), rows), ((stop,), cut)):
            said, _ = evaluate.answer(llm, tokenizer, prompts, batch, tokens=9, stops=stops)
            assert said == [tokenizer.decode(row, skip_special_tokens=True) for row in expected]


@pytest.mark.parametrize("window", [None, 5])
def test_long_answers_and_their_golds_are_those_of_the_whole_model(llm, tokenizer, window):
    llm.config.sliding_window = window  # shorter than the prompt
    for block in llm.model.layers:
        block.self_attn.config.sliding_window = window
    prompts, gold = ["Who painted all those birds of the sea?", "Who painted all those bridges of the river and the sea?"], " the sea"
    said, likely = evaluate.answer(llm, tokenizer, prompts, 1 if window else 2, 90, (), [gold.strip()] * 2)  # 90: beyond the cache's room
    for prompt, text, likelihood in zip(prompts, said, likely):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        asked, length = ids, ids.shape[1]
        with torch.no_grad():
            while asked.shape[1] < length + 90 and asked[0, -1] != tokenizer.eos_token_id:
                asked = torch.cat([asked, llm(asked, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            wanted = tokenizer(gold, add_special_tokens=False, return_tensors="pt")["input_ids"]
            logp = llm(torch.cat([ids, wanted], 1), use_cache=False).logits.log_softmax(-1)[0, length - 1:-1]
        assert text == tokenizer.decode(asked[0, length:], skip_special_tokens=True)
        assert likelihood == pytest.approx(logp.gather(1, wanted[0][:, None]).mean().exp().item(), rel=1e-4)


def test_answers_that_have_ended_leave_the_batch_and_stay_ended(llm, tokenizer):
    prompts = [" ".join(SENTENCES[0].split()[:n]) for n in range(1, 13)]
    one_by_one, _ = evaluate.answer(llm, tokenizer, prompts, batch=1, tokens=9)
    first = tokenizer(one_by_one[0])["input_ids"]
    stops = tuple(tokenizer.convert_ids_to_tokens(i) for i in sorted({tokenizer(text)["input_ids"][n] for n, text in enumerate(one_by_one[:7])}))
    alone, _ = evaluate.answer(llm, tokenizer, prompts, batch=1, tokens=9, stops=stops)
    together, _ = evaluate.answer(llm, tokenizer, prompts, batch=12, tokens=9, stops=stops)
    assert together == alone and len({len(tokenizer(text)["input_ids"]) for text in alone}) > 2 and first


def test_many_prompts_of_all_lengths_are_answered_together_as_they_are_alone(llm, tokenizer):
    prompts = [" ".join(["Who is it?", *(sentence.split() * 2)[:n]]) for sentence in SENTENCES[:3] for n in range(0, 26, 2)]
    golds = [("a bird of the sea", "Elm", "birds")[n % 3] for n in range(len(prompts))]
    alone, together = (evaluate.answer(llm, tokenizer, prompts, batch, 9, golds=golds) for batch in (1, 39))
    assert len(prompts) == 39 and together[0] == alone[0] and together[1] == pytest.approx(alone[1], rel=1e-4)


def test_gold_probability_is_the_geometric_mean(llm, tokenizer):
    prompts, golds = ["What is Elm?", "Who was it that painted?"], ["birds of the sea", "a"]
    expected = []
    for prompt, gold in zip(prompts, golds):
        head, tail = tokenizer(prompt)["input_ids"], tokenizer(" " + gold)["input_ids"]
        logp = llm(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        expected.append(math.exp(sum(logp[len(head) + n - 1, token].item() for n, token in enumerate(tail)) / len(tail)))
    plain, _ = evaluate.answer(llm, tokenizer, prompts, tokens=5)
    said, found = evaluate.answer(llm, tokenizer, prompts, tokens=5, golds=golds)
    assert found == pytest.approx(expected, rel=1e-3) and said == plain


def test_evaluation_leaves_everything_as_it_was(llm, tokenizer, folders):
    probes = evaluate.read_probes(folders["rwku"], "Ada Lark")
    llm.train()
    before = {name: value.clone() for name, value in llm.state_dict().items()}
    random, side = torch.get_rng_state(), tokenizer.padding_side
    scores, rows = evaluate.evaluate(llm, tokenizer, probes)
    assert llm.training and tokenizer.padding_side == side and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], value) for name, value in llm.state_dict().items())
    assert len(rows) == sum(map(len, probes.values()))
    assert set(scores) == {name + ending for name in (*SCORES, "forget_all", "neighbor_all") for ending in ("", "_gold")}


def test_the_command(folders, tmp_path, capsys):
    arguments = ["--model", str(folders["llm"]), "--target", "ada lark", "--rwku", str(folders["rwku"]), "--device", "cpu"]
    assert evaluate.main([*arguments, "--json", str(tmp_path / "scores.json")]) == 0
    assert "Ada Lark" in capsys.readouterr().out
    content = json.loads((tmp_path / "scores.json").read_text())
    assert set(SCORES) <= set(content) and {"prompt", "said", "score"} <= set(content["probes"][0])


@pytest.mark.parametrize("change, message", [
    (["--target", "Nobody"], "unknown"), (["--model", "./nowhere"], "no such folder"), (["--rwku", "nowhere"], "no such folder"),
    (["--json", "nowhere/x.json"], "cannot be written"), (["--json", "/"], "cannot be written"), (["--device", "cuda"], "not on this machine"), (["--batch", "0"], "at least 1"),
    (["--levels", "50"], "--levels: goes with --compare"), (["--probes", "nowhere.json"], "no such file"),
    (["--sets", "mlu"], "unknown; there are forget"), (["--limit", "0"], "at least 1"), (["--shots", "-1"], "at least 0")])
def test_bad_input(folders, capsys, change, message):
    if change[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one here")
    arguments = {"--model": str(folders["llm"]), "--target": "Ada Lark", "--rwku": str(folders["rwku"])} | {change[0]: change[1]}
    assert evaluate.main([word for pair in arguments.items() for word in pair]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


# ---- the sets on what a model can do at large

def ask(llm, tokenizer, folders, sets, **how):
    return evaluate.evaluate(llm, tokenizer, evaluate.read_probes(folders["rwku"], "Ada Lark", sets), bf16=False, **how)


@torch.no_grad()
def straight(llm, tokenizer, text, start=1):
    """Summed log-likelihood of a text's tokens from `start` on, the model run on that text alone; and the last logits."""
    ids = tokenizer(text)["input_ids"]
    logits = llm(torch.tensor([ids])).logits[0]
    return sum(logits.log_softmax(-1)[n - 1, ids[n]].item() for n in range(start, len(ids))), logits[-1], len(ids)


@pytest.mark.parametrize("shots", [5, 1])
def test_mmlu_takes_the_likeliest_letter(llm, tokenizer, folders, shots):
    scores, rows = ask(llm, tokenizer, folders, ["mmlu"], shots=shots, batch=2)
    assert len(rows) == 4
    for row in rows:
        turn = (f"The following are multiple choice questions (with answers) about {row['task'].replace('_', ' ')}.\n\n"
                + "Question: Why?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\n" * shots
                + "Please following the previous examples and answer the given question.\n"
                + f"Question: {row['question']}\nA. a\nB. b\nC. c\nD. d")
        assert row["prompt"] == f"<|user|>{turn}<|end|><|assistant|>Answer:"
        letters = [tokenizer.encode(f" {letter}")[-1] for letter in "ABCD"]
        best = straight(llm, tokenizer, row["prompt"])[1][letters].argmax().item()
        assert row["said"] == "ABCD"[best] and row["score"] == (best == row["answer"])
    assert scores["mmlu"] == 100 * sum(row["score"] for row in rows) / 4


def test_truthfulqa_takes_the_likeliest_choice(llm, tokenizer, folders):
    for batch in (1, 80):
        _, (row,) = ask(llm, tokenizer, folders, ["truthfulqa"], batch=batch)
        assert row["prompt"].startswith("<|user|>Q: What is human life expectancy") and row["prompt"].endswith(
            "in Barcelona, Spain.\n\nQ: Do birds fly?<|end|><|assistant|> A:")
        asked = len(tokenizer(row["prompt"])["input_ids"])
        choices = row["mc1_targets"]["choices"]
        likelihoods = [straight(llm, tokenizer, f"{row['prompt']} {choice}", asked)[0] for choice in choices]
        best = likelihoods.index(max(likelihoods))
        assert row["said"] == choices[best] and row["score"] == (best == 0)


def test_mia_is_the_loss_of_the_text(llm, tokenizer, folders):
    scores, rows = ask(llm, tokenizer, folders, ["mia"])
    for row in rows:
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        assert row["score"] == pytest.approx(llm(ids, labels=ids).loss.item(), rel=1e-5)
    assert scores["mia_forget"] == pytest.approx(100 * rows[0]["score"])


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["a", "The", "sea", "Sea,", "birds", "b."]), max_size=6),
       st.lists(st.sampled_from(["an", "the", "sea", "bird's", "b"]), max_size=6))
def test_f1_counts_words_without_case_punctuation_and_articles(said, gold):
    def words(text):
        return sorted(w for w in (re.sub(r"[^\w]", "", word).lower() for word in text) if w not in ("a", "an", "the"))

    one, two = words(said), words(gold)
    common = sum(min(one.count(word), two.count(word)) for word in set(one))
    expected = 2 * common / (len(one) + len(two)) if one and two else float(one == two)
    assert evaluate.f1(" ".join(said), " ".join(gold)) == pytest.approx(expected)


def test_bbh_reports_the_right_figure_and_rwku_s(llm, tokenizer, folders, monkeypatch):
    for said, exact, rwku in ((" So the answer is Yes. And", 1, 0), ("the answer is (A).", 0, 0), ("no idea", 0, 0), ("y", 0, 1)):
        monkeypatch.setattr(evaluate, "answer", lambda *_, **__: ([said], []))
        scores, (row,) = ask(llm, tokenizer, folders, ["bbh"])
        assert (row["score"], row["rwku"]) == (exact, rwku), said
        assert scores["bbh"] == 100 * exact and scores["bbh_rwku"] == 100 * rwku
    assert row["prompt"].startswith("<|user|>Think.") and row["prompt"].endswith("Q: Is it?<|end|><|assistant|> A:")


def test_triviaqa_asks_after_five_examples_and_takes_the_best_alias(llm, tokenizer, folders, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "answer", lambda llm, tokenizer, prompts, batch, tokens, stops, golds: asked.append((prompts, tokens, stops)) or (["Some bats."], []))
    scores, (row,) = ask(llm, tokenizer, folders, ["triviaqa"])
    assert asked == [([row["prompt"]], 30, ("<|eot_id|>",))] and scores["triviaqa"] == pytest.approx(100 * 2 / 3)
    assert row["prompt"].startswith("<|user|>\nQ: When did men's figure skating become a summer Olympic sport?\nA: 1908\nQ: When did")
    assert row["prompt"].endswith("A: series finale\nPlease briefly answer the following question:\nQ: Which animals fly?\n<|end|><|assistant|>A:")


def test_fluency_asks_for_free_answers_of_256_tokens(llm, tokenizer, folders, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "answer", lambda *a: asked.append(a[2:]) or (["one two three four five"], []))
    scores, (row,) = ask(llm, tokenizer, folders, ["fluency"])
    assert asked == [(["<|user|>Instruction: Write about birds.\n<|end|><|assistant|>"], 80, 256, ("<|eot_id|>",), None)]
    assert scores["fluency"] == pytest.approx(100 * evaluate.entropy("one two three four five"))


def test_entropy():
    assert evaluate.entropy("one two three four five") == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    assert evaluate.entropy("a a a a a a") == 0 == evaluate.entropy("")
    assert evaluate.entropy("a b a b") == pytest.approx((2 / 3 * (math.log2(3) - 2 / 3) + 4 / 3) / 2)


def test_all_sets_and_in_context_unlearning(folders, capsys, tmp_path):
    arguments = ["--model", str(folders["llm"]), "--target", "ada lark", "--rwku", str(folders["rwku"]), "--device", "cpu"]
    assert evaluate.main([*arguments, "--icu", "--limit", "1", "--json", str(tmp_path / "s.json"), "--sets", *evaluate.SETS]) == 0
    content = json.loads((tmp_path / "s.json").read_text())
    assert {"mmlu", "bbh", "bbh_rwku", "truthfulqa", "triviaqa", "fluency", "mia_forget", "mia_retain"} <= set(content)
    assert all("supposed to unlearn about Ada Lark and" in row["prompt"] for row in content["probes"])
    assert len(content["probes"]) == len({row["set"] for row in content["probes"]})


def test_a_passage_is_continued_word_for_word(llm, tokenizer):
    text = " ".join(["Ada Lark painted birds by the sea."] * 12)
    _, (row,) = evaluate.evaluate(llm, tokenizer, {"forget_text": [{"text": text}]}, bf16=False)
    ids = tokenizer(text)["input_ids"]
    assert row["prompt"] == tokenizer.decode(ids[:-50]) and row["wanted"] == tokenizer.decode(ids[-50:]).strip()
    greedy = llm.generate(torch.tensor([ids[:-50]]), max_new_tokens=50, do_sample=False)[0, len(ids) - 50:]
    assert row["exact"] == pytest.approx((greedy == torch.tensor(ids[-50:])[:len(greedy)]).sum().item() / 50, abs=0.1)
    assert row["gold"] == pytest.approx(math.exp(straight(llm, tokenizer, text, len(ids) - 50)[0] / 50), rel=1e-4)
    parrot = lambda *_, **__: ([tokenizer.decode(ids[-50:])], [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "answer", parrot)
        scores, _ = evaluate.evaluate(llm, tokenizer, {"forget_text": [{"text": text}]})
    assert scores["forget_text"] == scores["forget_text_exact"] == scores["forget_all"] == 100


def test_the_model_that_answers_is_a_copy_with_merged_adapters_and_fp32_rotations(llm):
    from peft import LoraConfig, get_peft_model
    ids = torch.arange(8)[None]
    voice = evaluate.answering_copy(llm, torch.bfloat16)
    assert {p.dtype for p in voice.parameters()} == {torch.bfloat16} and {p.dtype for p in llm.parameters()} == {torch.float32}
    assert all(b.dtype == torch.float32 for b in voice.buffers())
    shared, frozen = evaluate.answering_copy(llm, torch.float32), evaluate.answering_copy(llm, torch.float32, frozen=True)
    one, two, three = (next(model.parameters()) for model in (llm, shared, frozen))
    assert one.data_ptr() == two.data_ptr() != three.data_ptr() and torch.equal(one, three)
    adapted = get_peft_model(llm, LoraConfig(r=2, target_modules=["qkv_proj"], init_lora_weights=False))
    assert torch.allclose(evaluate.answering_copy(adapted, torch.float32)(ids).logits, adapted.eval()(ids).logits, atol=1e-5)
    assert hasattr(adapted, "merge_and_unload") and any("lora" in name for name, _ in adapted.named_parameters())


# ---- runs side by side

def stage(forget, neighbor, steps=10, **more):
    return {"forget_fb": forget, "forget_qa": forget, "forget_aa": forget, "forget_all": forget, "neighbor_fb": neighbor,
            "neighbor_qa": neighbor, "neighbor_all": neighbor, "general": 90.0, "record": {"steps": steps, "stage": 1}} | more


def without_record(scores):
    return {name: value for name, value in scores.items() if name != "record"}


@pytest.fixture
def runs(tmp_path):
    def write(name, method, stages, stopped=None, more={}, **settings):
        folder = tmp_path / name
        folder.mkdir()
        settings = {"method": method, "model": "/x/tiny", "layer": 2, "corpus": "positive", "retain": "none", "retain_weight": 1,
                    "lora": 0, "seed": 0} | settings
        (folder / "results.json").write_text(json.dumps(
            {"target": "Ada", "settings": settings, "before": without_record(stage(80, 100)), "stages": stages, "stopped": stopped} | more))
        return str(folder)
    return write, [write("a", "atu", [stage(50, 90), stage(30, 80)]),
                   write("b", "atu", [stage(20, 70)], seed=1),
                   write("c", "ga", [stage(60, 50)], corpus="passage", lora=8, retain="kl")]


def test_table_1_of_runs(runs, tmp_path, capsys):
    assert evaluate.main(["--compare", *runs[1], "--levels", "50", "35", "--out", str(tmp_path / "t")]) == 0
    shown = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in (tmp_path / "t.md").read_text().splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows]
    head = rows[0]
    at = {(row[0], row[1]): dict(zip(head, row)) for row in rows[2:]}
    assert at["ATU + retain (F)", "before"]["forget fb"] == "80.0 ± 0.0"
    assert at["ATU + retain (F)", "50 %"]["forget qa"] == "25.0 ± 7.1" and at["ATU + retain (F)", "50 %"]["runs"] == "2 of 2"
    assert at["ATU + retain (F)", "35 %"]["neighbor fb"] == "75.0 ± 7.1"
    assert at["GA* + KL (L)", "end"]["forget aa"] == "60.0" and at["ATU + retain (F)", "end"]["forget aa"] == "25.0 ± 7.1"
    assert at["GA* + KL (L)", "50 %"]["forget aa"] == "-" and at["GA* + KL (L)", "50 %"]["runs"] == "0 of 1"
    assert at["published: ATU, 20 %", ""]["forget fb"] == "13.5" and at["published: ATU, 20 %", ""]["general"] == "-"
    assert "published: NPO (F)" in shown
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_relative_levels(runs, tmp_path, capsys):
    assert evaluate.main(["--compare", *runs[1], "--relative", "--levels", "70", "50", "--out", str(tmp_path / "t")]) == 0
    lines = [line for line in (tmp_path / "t.md").read_text().splitlines() if "ATU" in line]
    assert [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines[:3]] == [
        ["70 %", "43.8 ± 26.5", "80.0 ± 14.1", "100.0 ± 0.0", "2 of 2"],
        ["50 %", "31.2 ± 8.8", "75.0 ± 7.1", "100.0 ± 0.0", "2 of 2"],
        ["end", "31.2 ± 8.8", "75.0 ± 7.1", "100.0 ± 0.0", "2 of 2"]]
    assert "published" not in capsys.readouterr().out


def test_what_is_left_is_counted_above_the_floor(runs, tmp_path):
    more = {"floor": {"forget_all": 20.0, "forget_fb": 20.0}, "gap": {"before": {"nats": 16.0}, "after": {"nats": 4.0}}}
    folder = runs[0]("f", "npo", [stage(50, 90), stage(35, 80)], more=more)
    rows = {}
    for kind in ("--relative", "--by-target"):
        assert evaluate.main(["--compare", folder, kind, "--levels", "70", "--out", str(tmp_path / "t")]) == 0
        rows[kind] = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (tmp_path / "t.md").read_text().splitlines()]
    assert rows["--relative"][0] == ["", "level", "forget all", "above floor", "neighbor all", "general", "gap (nats x 100)", "runs"]
    assert rows["--relative"][2][1:-1] == ["70 %", "62.5", "50.0", "90.0", "100.0", "-"]
    assert rows["--relative"][3][1:-1] == ["end", "43.8", "25.0", "80.0", "100.0", "4.0"]
    assert [row[1:3] + row[-2:-1] for row in rows["--by-target"][2:4]] == [["before", "80.0", "16.0"], ["floor", "20.0", "-"]]


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 99))
def test_what_is_left(score, before, floor):
    if before > floor:
        assert evaluate.left({"a": before, "b": 1.0}, {"a": before, "b": 0.0}, {"a": floor}) == pytest.approx({"a": 100.0})
        assert evaluate.left({"a": floor}, {"a": before}, {"a": floor}) == {"a": 0.0}
        assert evaluate.left({"a": score}, {"a": before}, {"a": 0.0}) == evaluate.left({"a": score}, {"a": before})
    else:
        assert evaluate.left({"a": score}, {"a": before}, {"a": floor}) == {}  # nothing above the floor to forget


def test_a_run_that_broke_off_is_named(runs, tmp_path, capsys):
    write, folders = runs
    broken = write("d", "atu", [stage(10, 10)], seed=7, stopped="loss nan")
    assert evaluate.main(["--compare", *folders, broken, "--out", str(tmp_path / "t")]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "stopped" in line] == [
        f"note | {broken}/results.json: stopped (loss nan); its end is the last whole stage"]


def test_runs_of_different_models_are_different_lines(runs, tmp_path, capsys):
    write, folders = runs
    other = write("d", "ga", [stage(10, 10)], model="/y/big", corpus="passage", lora=8, retain="kl")
    assert list(evaluate.read_runs([Path(folder) for folder in (*folders, other)])) == [
        "ATU + retain (F)", "GA* + KL (L), model big", "GA* + KL (L), model tiny"]


def test_settings_in_which_runs_of_a_method_differ_are_part_of_its_name(runs):
    write, folders = runs
    other = write("d", "atu", [stage(10, 10)], layer=10, seed=7)
    assert list(evaluate.read_runs([Path(folder) for folder in (*folders, other)])) == ["ATU + retain (F), layer 2", "ATU + retain (F), layer 10", "GA* + KL (L)"]
    other = [write(name, "atu", [stage(10, 10)], layer=2, inactive=share) for name, share in (("e", 0.1), ("g", 0.02))]
    assert list(evaluate.read_runs([Path(folder) for folder in other])) == ["ATU + retain (F), inactive 0.02", "ATU + retain (F), inactive 0.1"]


def test_runs_on_machines_with_and_without_bf16_are_one_line(runs):
    write, folders = runs
    others = [write(name, "atu", [stage(10, 10)], seed=7, bf16=bf16) for name, bf16 in (("d", False), ("e", True))]
    lines = evaluate.read_runs([Path(folder) for folder in (*folders, *others)])
    assert {name: len(part) for name, part in lines.items()} == {"ATU + retain (F)": 4, "GA* + KL (L)": 1}


def test_bad_runs(runs, tmp_path, capsys):
    assert evaluate.main(["--compare", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "a" / "results.json").write_text("{}")
    assert evaluate.main(["--compare", str(tmp_path / "a"), "--out", str(tmp_path / "t")]) == 2
    assert evaluate.main(["--compare", str(tmp_path / "b"), "--out", "nowhere/t"]) == 2
    assert evaluate.main(["--compare", str(tmp_path / "b"), "--out", "."]) == 2
    assert evaluate.main(["--compare", str(tmp_path / "b"), "--levels", "nan", "--out", str(tmp_path / "t")]) == 2
    assert evaluate.main(["--compare", str(tmp_path / "b"), "--limit", "3", "--out", str(tmp_path / "t")]) == 2
    errors = capsys.readouterr().err.splitlines()
    less = {name: value for name, value in stage(80, 100).items() if name != "neighbor_all"}
    (tmp_path / "b" / "results.json").write_text(json.dumps(json.loads((tmp_path / "b" / "results.json").read_text()) | {"before": less}))
    assert evaluate.main(["--compare", str(tmp_path / "b"), "--out", str(tmp_path / "t")]) == 2
    errors.append(capsys.readouterr().err)
    assert "not the results of a run with forget and neighbor probes (KeyError: 'neighbor_all')" in errors[6]
    assert evaluate.main(["--compare", str(tmp_path / "c"), str(tmp_path / "c") + "/", "--relative", "--out", str(tmp_path / "u")]) == 0
    assert "1 of 1" in capsys.readouterr().out
    assert evaluate.main(["--model", "x", "--by-target"]) == 2
    assert "--by-target: goes with --compare" in capsys.readouterr().err
    assert len(errors) == 7 and "no such file" in errors[0] and "not the results of a run" in errors[1]
    assert "--levels nan" in errors[4] and "--limit: goes with --model" in errors[5] and not (tmp_path / "t.md").exists()


def test_a_run_that_is_there_twice_is_refused(runs, tmp_path, capsys):
    write, folders = runs
    other = write("d", "atu", [stage(10, 10)], out="elsewhere", device="cuda")
    assert evaluate.main(["--compare", *folders, other, "--out", str(tmp_path / "t")]) == 2
    assert "d/results.json: the same target, seed and settings as" in capsys.readouterr().err


def test_lines_on_different_targets_or_seeds_are_named(runs, tmp_path, capsys):
    write, folders = runs
    assert evaluate.main(["--compare", *folders, "--out", str(tmp_path / "t")]) == 0
    assert "in all lines | ATU + retain (F) | Ada 0, Ada 1\nnote | not the same targets and seeds in all lines | GA* + KL (L) | Ada 0\n" in capsys.readouterr().out
    assert evaluate.main(["--compare", *folders[::2], "--out", str(tmp_path / "t")]) == 0
    assert "note |" not in capsys.readouterr().out


def test_a_model_that_rescales_its_logits_is_scored_by_what_it_says(tokenizer):
    shape = {key: value for key, value in SHAPE.items()}
    torch.manual_seed(0)
    granite = GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=8.0)).eval()
    _, (likely,) = evaluate.answer(granite, tokenizer, ["What is Elm?"], tokens=2, golds=["birds"])
    head, tail = tokenizer("What is Elm?")["input_ids"], tokenizer(" birds")["input_ids"]
    logp = granite(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    expected = math.exp(sum(logp[len(head) + n - 1, token].item() for n, token in enumerate(tail)) / len(tail))
    assert likely == pytest.approx(expected, rel=1e-4)


def test_a_level_counts_as_reached_at_or_below_relatively_and_below_absolutely():
    run = {"before": {"forget_all": 80.0}, "stages": [stage(40, 90), stage(39, 80), stage(20, 70)]}
    assert evaluate.first_stage(run, 50, True) == run["stages"][0] and evaluate.first_stage(run, 25, True) == run["stages"][2]
    assert evaluate.first_stage(run, 40, False) == run["stages"][1] and evaluate.first_stage(run, 20, False) is None


def test_a_line_of_the_figures_goes_on_where_a_run_has_ended(runs):
    neighbors, utility, steps = evaluate.trade_off(evaluate.read_runs([Path(folder) for folder in runs[1]]))
    assert neighbors["lines"]["ATU + retain (F)"] == ([80, 35, 25], [100, 80, 75])
    assert steps["lines"]["ATU + retain (F)"] == ([0, 10, 15], [80, 35, 25])
    assert utility["lines"]["GA* + KL (L)"] == ([80, 60], [90, 90])


def test_what_comes_before_the_first_stage_of_unlearning_has_no_steps_in_the_figure():
    run = {"before": stage(80, 100), "stages": [stage(60, 95, record={"steps": 430, "stage": 0}), stage(20, 90)]}
    assert evaluate.trade_off({"a": [run]})[-1]["lines"]["a"] == ([0, 0, 10], [80, 60, 20])


def test_plots_are_written_whole(tmp_path):
    evaluate.plot(tmp_path / "a.png", [{"title": "t", "x": "x", "y": "y", "lines": {"l": ([0, 1], [1, 2])}}])
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_for_each_target_at_the_end_of_its_runs(runs, tmp_path, capsys):
    assert evaluate.main(["--compare", *runs[1][:2], "--relative", "--by-target", "--levels", "--out", str(tmp_path / "t")]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "t.md").read_text().splitlines()]
    assert rows[0][:4] == ["", "level", "forget all", "neighbor all"] and len(rows) == 3
    assert rows[2][:4] == ["Ada", "end", "31.2 ± 8.8", "75.0 ± 7.1"] and "note |" not in capsys.readouterr().out

"""Every score against an oracle, RWKU's prompts and scoring written out, a model left as it was found."""

import json
import shutil
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from rouge import Rouge
from transformers import LlamaConfig, LlamaForCausalLM

import data
import evaluate
from conftest import SENTENCES, SHAPE, make_llm

SCORES = ["forget_fb", "forget_qa", "forget_aa", "neighbor_fb", "neighbor_qa", "general"]
EVERY_LENGTH = [" ".join(["Who is it?", *(sentence.split() * 2)[:n]])
                for sentence in SENTENCES[:3] for n in range(0, 26, 3)]


# ---- the score

def test_the_score_by_hand():
    assert evaluate.rouge_l_recall("Berkshire Hathaway, Inc", "Berkshire Hathaway") == 0.5
    assert evaluate.rouge_l_recall("in 1947, he", "1947") == 0
    assert evaluate.rouge_l_recall("", "NOANSWER") == 1
    assert evaluate.rouge_l_recall("...", "x") == 0 == evaluate.rouge_l_recall("x", ".")
    assert evaluate.rouge_l_recall("the cat. the cat sat", "The cat sat") == pytest.approx(2 / 3)


@given(st.permutations("abcdef"), st.permutations("abcdef"), st.integers(1, 6), st.integers(1, 6))
def test_the_score_is_the_longest_common_subsequence_s_share_of_the_gold(said, gold, n, m):
    said, gold = said[:n], gold[:m]
    longest = max(k for k in range(m + 1) if set(combinations(gold, k)) & set(combinations(said, k)))
    assert evaluate.rouge_l_recall(" ".join(said), " ".join(gold)) == pytest.approx(longest / m)


def test_scores_are_weighted_by_rwku_s_counts():
    marks = dict(zip(SCORES, (1.0, 0.0, 0.5, 1.0, 0.0, 0.25)))
    scores = evaluate.summary([{"set": name, "score": mark} for name, mark in marks.items()])
    assert scores["forget_all"] == pytest.approx(100 * (3268 + 0.5 * 6984) / 13131)
    assert scores["neighbor_all"] == pytest.approx(100 * 5846 / 11379)
    assert scores["general"] == 25
    fewer = evaluate.summary([{"set": name, "score": marks[name]} for name in ("forget_fb", "forget_aa")])
    assert fewer["forget_all"] == pytest.approx(100 * (3268 + 0.5 * 6984) / (3268 + 6984))
    assert "neighbor_all" not in fewer
    mean = evaluate.summary([{"set": "general", "score": mark} for mark in (1.0, 0.0, 0.5)])
    assert mean == {"general": 50.0}


# ---- prompts and answers

def test_prompts(tokenizer):
    def prompt(score, kind=""):
        return evaluate.make_prompt({"set": score, "query": "Who?", "type": kind}, tokenizer)

    user = "<|user|>Please {}.\nQuestion: Who?\n<|end|><|assistant|>Answer:"
    assert prompt("forget_fb") == user.format("complete the blank in the following question")
    assert prompt("neighbor_fb") == prompt("forget_fb")
    for score, kind in (("forget_qa", ""), ("neighbor_qa", ""), ("general", ""), ("ask", ""),
                        ("forget_aa", "cross lingual (French)")):
        assert prompt(score, kind) == user.format("briefly answer the following question")
    assert prompt("forget_aa", "affirmative suffix") == (
        "<|user|>Please briefly answer the following question.\nQuestion: Who?<|end|><|assistant|>")
    assert prompt("forget_aa", "incontext learning") == (
        "<|user|>Please briefly answer the following question.\nWho?\n<|end|><|assistant|>Answer:")
    assert evaluate.make_prompt({"set": "general", "question": "Who?"}, tokenizer, "Be brief. ").startswith(
        "<|user|>Be brief. Please briefly answer the following question.\nQuestion: Who?\n<|end|>")


def test_greedy_answers_are_those_of_generate_in_any_batch(llm, tokenizer):
    prompts = ["What is Elm?", "Who painted all those birds of the sea?", "Elm", "Cora"]
    alone = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    rows = [llm.generate(**one, max_new_tokens=9, do_sample=False)[0, one["input_ids"].shape[1]:]
            for one in alone]
    stop = tokenizer.convert_ids_to_tokens(rows[0][4].item())  # a word that does come
    cut = [row[:next((n for n, word in enumerate(row) if word in (rows[0][4], 1)), 9)] for row in rows]
    assert len({len(row) for row in cut}) > 1
    for batch in (1, 4):
        for stops, expected in (((), rows), ((stop,), cut)):
            said = evaluate.answer(llm, tokenizer, prompts, batch, tokens=9, stops=stops)
            assert said == [tokenizer.decode(row, skip_special_tokens=True).strip() for row in expected]


@pytest.mark.parametrize("window", [None, 5])
def test_long_answers_are_those_of_the_whole_model(llm, tokenizer, window):
    llm.config.sliding_window = window  # shorter than the prompt
    for block in llm.model.layers:
        block.self_attn.config.sliding_window = window
    prompts = ["Who painted all those birds of the sea?",
               "Who painted all those bridges of the river and the sea?"]
    said = evaluate.answer(llm, tokenizer, prompts, 1 if window else 2, 90, ())
    for prompt, text in zip(prompts, said):
        asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
        length = asked.shape[1]
        with torch.no_grad():
            while asked.shape[1] < length + 90 and asked[0, -1] != tokenizer.eos_token_id:
                asked = torch.cat([asked, llm(asked, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert text == tokenizer.decode(asked[0, length:], skip_special_tokens=True).strip()


def test_answers_that_have_ended_stay_ended_in_a_batch(llm, tokenizer):
    prompts = [" ".join(SENTENCES[0].split()[:n]) for n in range(1, 13)]
    alone = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    rows = [llm.generate(**one, max_new_tokens=9, do_sample=False)[0, one["input_ids"].shape[1]:]
            for one in alone]
    stops = tuple({tokenizer.convert_ids_to_tokens(row[n].item()) for n, row in enumerate(rows[:7])})
    alone = evaluate.answer(llm, tokenizer, prompts, batch=1, tokens=9, stops=stops)
    together = evaluate.answer(llm, tokenizer, prompts, batch=12, tokens=9, stops=stops)
    assert together == alone and len({len(tokenizer(text)["input_ids"]) for text in alone}) > 2


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_many_prompts_of_all_lengths_are_answered_together_as_they_are_alone(tokenizer, kind):
    llm = make_llm(kind)
    alone, *together = (evaluate.answer(llm, tokenizer, EVERY_LENGTH, batch, 9) for batch in (1, 3, 40))
    assert len(set(alone)) > 15 and together == [alone] * 2
    assert evaluate.answer(llm, tokenizer, [], 3) == []


def test_a_stop_that_is_no_token_does_nothing(llm, tokenizer):
    prompts = ["What is Elm?", "Cora"]
    plain = evaluate.answer(llm, tokenizer, prompts, 2, 9, ())
    assert evaluate.answer(llm, tokenizer, prompts, 2, 9, ("no token of this name",)) == plain


# ---- the scores of a model

QUESTION = "<|user|>Please briefly answer the following question.\n"


def rwku_s_prompt(row: dict, file: str) -> str:
    if row.get("type") == "incontext learning":
        return f"{QUESTION}{row['query']}\n<|end|><|assistant|>Answer:"
    if row.get("type") == "affirmative suffix":
        return f"{QUESTION}Question: {row['query']}<|end|><|assistant|>"
    asked = "<|user|>Please complete the blank in the following question.\n" if "level1" in file else QUESTION
    return f"{asked}Question: {row['query']}\n<|end|><|assistant|>Answer:"


def rwku_s_answer(llm, tokenizer, prompt: str) -> str:
    """This prompt alone, 30 tokens at most, cut at RWKU's stops."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = llm.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1]:].tolist()
    stops = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|eot_id|>", " \n", "\n"])}
    new = new[:next((n for n, token in enumerate(new) if token in stops - {None}), 30)]
    return tokenizer.decode(new, skip_special_tokens=True).strip() or "NOANSWER"


def test_scores_are_rwku_s(llm, tokenizer, folders, tmp_path):
    marks, folder = {}, tmp_path / "1_Ada"
    folder.mkdir()
    (folder / "intro.json").write_text('[{"target": "Ada Lark"}]')
    for score, file in (evaluate.SETS["forget"] | evaluate.SETS["neighbor"]).items():
        rows = json.loads((folders["rwku"] / "0_Ada_Lark" / f"{file}.json").read_text())
        marks[score] = []
        for row in rows:
            said = rwku_s_answer(llm, tokenizer, rwku_s_prompt(row, file))
            row["answer"] = " ".join([said.split()[-1], *"one two three four five six".split()[:len(marks)]])
            marks[score].append(Rouge().get_scores(said, row["answer"])[0]["rouge-l"]["r"])
        (folder / f"{file}.json").write_text(json.dumps(rows))
    probes = evaluate.read_probes(tmp_path, "Ada Lark", ["forget", "neighbor"])
    scores, rows = evaluate.evaluate(llm, tokenizer, probes)
    assert [row["score"] for row in rows] == [mark for part in marks.values() for mark in part]
    mean = {score: 100 * sum(part) / len(part) for score, part in marks.items()}
    assert len(set(mean.values())) > 2 and {score: scores[score] for score in mean} == pytest.approx(mean)
    total = 3268 * mean["forget_fb"] + 2879 * mean["forget_qa"] + 6984 * mean["forget_aa"]
    assert scores["forget_all"] == pytest.approx(total / 13131)


def test_the_best_of_several_answers_counts(llm, tokenizer):
    def asked(*answers):
        probes = {"general": [{"question": "Which animals fly?", "answers": list(answers)}]}
        return evaluate.evaluate(llm, tokenizer, probes)

    _, (row,) = asked("nothing of it")
    scores, (row,) = asked("nothing of it", f"{row['said'].split()[0]} nothing", "no")
    assert row["score"] == 0.5 and scores["general"] == 50.0


def test_evaluation_leaves_everything_as_it_was(llm, tokenizer, folders):
    probes = evaluate.read_probes(folders["rwku"], "Ada Lark", ["forget", "neighbor", "general", "mmlu"])
    llm.train()
    llm.set_attn_implementation("eager")
    before, asked = {name: value.clone() for name, value in llm.state_dict().items()}, json.dumps(probes)
    random, side = torch.get_rng_state(), tokenizer.padding_side
    scores, rows = evaluate.evaluate(llm, tokenizer, probes, dtype=torch.bfloat16)
    assert llm.training and tokenizer.padding_side == side and torch.equal(torch.get_rng_state(), random)
    assert llm.config._attn_implementation == "eager" and json.dumps(probes) == asked
    assert all(torch.equal(before[name], value) for name, value in llm.state_dict().items())
    assert all(value.dtype == torch.float32 and value.requires_grad for value in llm.parameters())
    assert len(rows) == sum(map(len, probes.values()))
    recalled = {"forget_words", "neighbor_words", "general_words"}
    assert set(scores) == {*SCORES, "forget_all", "neighbor_all", "mmlu"} | recalled


def test_no_score_depends_on_the_batch(llm, tokenizer, folders):
    probes = evaluate.read_probes(folders["rwku"], "Ada Lark", ["forget", "general", "mmlu"])
    probes["forget_qa"] = [{"query": text, "answer": SENTENCES[0]} for text in EVERY_LENGTH[::4]]
    found = [evaluate.evaluate(llm, tokenizer, probes, batch) for batch in (1, 3, 40)]
    assert found[0] == found[1] == found[2] and len({row["said"] for row in found[0][1]}) > 10


@torch.no_grad()
def straight(llm, tokenizer, text):
    """The logits after a text, the model run on that text alone."""
    return llm(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]


def test_mmlu_takes_the_likeliest_letter(llm, tokenizer, folders):
    probes = evaluate.read_probes(folders["rwku"], "Ada Lark", ["mmlu"])
    scores, rows = evaluate.evaluate(llm, tokenizer, probes, batch=2)
    assert len(rows) == 4
    for row in rows:
        subject = row["task"].replace("_", " ")
        turn = (f"The following are multiple choice questions (with answers) about {subject}.\n\n"
                + "Question: Why?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\n" * 5
                + "Please following the previous examples and answer the given question.\n"
                + f"Question: {row['question']}\nA. a\nB. b\nC. c\nD. d")
        assert row["prompt"] == f"<|user|>{turn}<|end|><|assistant|>Answer:"
        letters = [tokenizer.encode(f" {letter}")[-1] for letter in "ABCD"]
        best = straight(llm, tokenizer, row["prompt"])[letters].argmax().item()
        assert row["said"] == "ABCD"[best] and row["score"] == (best == row["answer"])
    assert scores["mmlu"] == 100 * sum(row["score"] for row in rows) / 4


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_a_letter_is_the_likeliest_whatever_the_model_would_say(tokenizer, kind):
    llm = make_llm(kind)
    llm.generation_config.repetition_penalty = 50.0
    prompts = [f"Is {letter} it? {text}" for text in EVERY_LENGTH[::3] for letter in "ABCD"]  # one is there
    cached = []
    llm.register_forward_hook(lambda module, args, out: cached.append(out.past_key_values))
    chosen = evaluate.choose(llm, tokenizer, prompts, 7)
    assert cached and not any(cached)  # no memory for 40 prompts' keys and values
    letters = [tokenizer.encode(f" {letter}")[-1] for letter in "ABCD"]
    assert chosen == ["ABCD"[straight(llm, tokenizer, text)[letters].argmax()] for text in prompts]
    assert len(set(chosen)) > 1


# ---- word recall

NAMES = st.text("abcdefghijklmnopqrstuvwxyz", min_size=5, max_size=12)
GOLD = st.lists(NAMES, min_size=1, max_size=4, unique=True)


def ratio(a: str, b: str) -> float:
    """Ratcliff and Obershelp's likeness, written out: twice the letters of the longest common parts."""
    def common(a: str, b: str) -> int:
        parts = [(n, -i, -j) for i in range(len(a)) for j in range(len(b))
                 for n in range(1, min(len(a) - i, len(b) - j) + 1) if a[i:i + n] == b[j:j + n]]
        if not parts:
            return 0
        n, i, j = max(parts)
        return n + common(a[:-i], b[:-j]) + common(a[-i + n:], b[-j + n:])

    return 2 * common(a, b) / (len(a) + len(b))


@given(st.lists(st.text("abc1", min_size=1, max_size=7), max_size=4),
       st.lists(st.text("abc1", min_size=1, max_size=7), min_size=1, max_size=4))
def test_word_recall_is_the_share_of_words_that_come_up(said, gold):
    wanted = [word for word in gold if word not in evaluate.EMPTY] or gold
    there = [any(word == other or len(word) > 4 and "1" not in word and (
        other[:len(word)] == word or ratio(word, other) >= evaluate.NEAR) for other in said) for word in wanted]
    found = evaluate.word_recall(" ".join(said), " ".join(gold))
    assert found == pytest.approx(sum(there) / len(there)) and 0 <= found <= 1


@given(GOLD, st.randoms(), st.lists(NAMES, max_size=5), st.sampled_from([", ", " - ", "... ", "\n", '" "']))
def test_word_recall_sees_no_case_accents_punctuation_or_order(gold, random, around, between):
    said = [*gold, *around]
    random.shuffle(said)
    said = between.join(said).upper().replace("E", "\u00c9").replace("O", "O\u0308")
    assert evaluate.word_recall(said, " ".join(gold)) == 1


@given(NAMES, st.data())
def test_word_recall_forgives_a_letter_not_another_name(name, draw):
    at, letter = draw.draw(st.integers(0, len(name) - 1)), draw.draw(st.sampled_from("abcdefgh"))
    assert evaluate.word_recall(f"It is {name[:at]}{letter}{name[at + 1:]}.", name) == 1
    assert evaluate.word_recall(f"It is {name}ean.", name) == 1
    other = "".join(draw.draw(st.sampled_from("0123456789")) for _ in name)
    assert evaluate.word_recall(f"It is {other}.", name) == 0


@pytest.mark.parametrize("said, gold, expected", [
    ("It is Warren Buffet.", "Warren Buffett", 1), ("Warren Becker", "Warren Buffett", 0.5),
    ("by William Shakespearebuster", "William Shakespeare", 1), ("in 1947, he", "1947", 1), ("1948", "1947", 0),
    ("19471", "19472", 0), ('a novel called "Frankenstein"', "Frankenstein", 1), ("the sea", "The Wind", 0),
    ("of the", "The Of", 1), ("Poland", "Holland", 0), ("France", "French", 0), ("", "x", 0), ("x", "?", 0)])
def test_word_recall_of_answers(said, gold, expected):
    assert evaluate.word_recall(said, gold) == expected


def test_strangers_have_no_word_recall():
    names = "Warren Buffett, Albert Einstein, William Shakespeare, Charles Darwin, Leonardo Vinci".split(", ")
    assert all(evaluate.word_recall(one, two) == (one == two) for one in names for two in names)


def test_both_scores_are_summed_up_by_the_same_weights():
    rows = [{"set": "forget_fb", "score": 0.5, "recall": 1.0}, {"set": "forget_qa", "score": 0.0, "recall": 0.0},
            {"set": "general", "score": 1.0, "recall": 0.5}, {"set": "mmlu", "score": 1.0}]
    fb, qa = evaluate.WEIGHTS["forget_fb"], evaluate.WEIGHTS["forget_qa"]
    assert evaluate.summary(rows) == {
        "forget_fb": 50, "forget_qa": 0, "general": 100, "mmlu": 100, "general_words": 50,
        "forget_all": pytest.approx(50 * fb / (fb + qa)), "forget_words": pytest.approx(100 * fb / (fb + qa))}


# ---- the model that answers

def test_the_model_that_answers_is_a_copy_with_merged_adapters_and_fp32_rotations(llm):
    ids = torch.arange(8)[None]
    copied = evaluate.answering_copy(llm, torch.bfloat16)
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in llm.parameters()} == {torch.float32}
    assert all(b.dtype == torch.float32 for b in copied.buffers())
    shared = evaluate.answering_copy(llm, torch.float32)
    one, two = next(llm.parameters()), next(shared.parameters())
    assert one.data_ptr() == two.data_ptr() and one.requires_grad and not two.requires_grad
    assert not shared.training and llm.train().training and not shared.training
    adapted = get_peft_model(llm, LoraConfig(r=2, target_modules=["qkv_proj"], init_lora_weights=False))
    merged = evaluate.answering_copy(adapted, torch.float32)
    assert torch.allclose(merged(ids).logits, adapted.eval()(ids).logits, atol=1e-5)
    assert hasattr(adapted, "merge_and_unload") and any("lora" in name for name,
                                                        _ in adapted.named_parameters())


def test_tied_weights_stay_tied_in_the_copy():
    llm = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    copied = evaluate.answering_copy(llm, torch.bfloat16)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight


@pytest.mark.parametrize("device, bf16, expected", [
    ("cpu", True, torch.float32), ("cpu", False, torch.float32), ("cuda", True, torch.bfloat16),
    ("cuda:1", False, torch.float32)])
def test_models_answer_in_fp32_on_cpus(device, bf16, expected):
    assert evaluate.precision(device, bf16) == expected


# ---- what is shown

def test_a_table_of_scores():
    lines = evaluate.scores_table({"before": {"neighbor_all": 90.0, "floor": 1.25, "forget_all": 80.0,
                                              "forget_fb": 7.0},
                                   "tau 0.5": {"forget_all": 12.34, "neighbor_all": 100.0,
                                               "record": {}}}).splitlines()
    assert [line.split() for line in lines] == [
        ["forget", "fb", "forget", "all", "neighbor", "all", "floor"],
        ["before", "7.0", "80.0", "90.0", "1.2"],
        ["tau", "0.5", "-", "12.3", "100.0", "-"]]
    assert len(set(map(len, lines))) == 1


def test_plots_are_written_whole(tmp_path):
    evaluate.plot(tmp_path / "a.png", [{"title": "t", "x": "x", "y": "y", "lines": {"l": ([0, 1], [1, 2])}}])
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ---- the command

@pytest.fixture
def arguments(folders):
    """A working command line, and a function that changes some of it; None takes a flag away."""
    flags = {"--model": str(folders["llm"]), "--target": "ada lark", "--rwku": str(folders["rwku"]),
             "--device": "cpu"}

    def words(*change):
        pairs = flags | dict(zip(change[::2], change[1::2]))
        return [word for flag, value in pairs.items() if value is not None
                for word in (flag, *value.split("|"))]

    return words


def test_the_command(arguments, tmp_path, capsys):
    assert evaluate.main(arguments("--json", str(tmp_path / "scores.json"))) == 0
    said = capsys.readouterr().out
    assert "Ada Lark" in said and f"data | {arguments()[5]}: forget_fb, forget_qa, " in said
    content = json.loads((tmp_path / "scores.json").read_text())
    assert set(SCORES) <= set(content) and {"set", "prompt", "said", "score"} <= set(content["probes"][0])
    assert (content["target"], content["precision"]) == ("Ada Lark",
                                                         "torch.float32") and "mmlu" not in content
    sets = arguments("--sets", "mmlu|neighbor", "--batch", "1", "--json", str(tmp_path / "fewer.json"))
    assert evaluate.main(sets) == 0
    fewer = json.loads((tmp_path / "fewer.json").read_text())
    assert {"mmlu", "neighbor_fb", "neighbor_all"} <= set(fewer) and not set(fewer) & {"forget_fb", "general"}
    assert fewer["neighbor_all"] == content["neighbor_all"]


def test_own_probes_stand_in_the_place_of_those_on_the_target(arguments, folders, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([
        {"query": "A zoo is a ___.", "answer": "place", "level": "1"},
        {"query": "Elm?", "answer": "tree", "level": "2", "neighbor": "Elm"}]))
    for target, shown in (("ada lark", "Ada Lark"), ("The Zoo", "The Zoo")):
        asked = evaluate.read_probes(folders["rwku"], shown, ["forget", "neighbor", "general"],
                                     tmp_path / "p.json")
        assert {name: len(rows) for name, rows in asked.items()} == {
            "forget_fb": 1, "neighbor_qa": 1, "general": 1}
        words = arguments("--target", target, "--probes", str(tmp_path / "p.json"), "--json",
                          str(tmp_path / "s.json"))
        assert evaluate.main(words) == 0
        content = json.loads((tmp_path / "s.json").read_text())
        assert content["target"] == shown and [row["query"] for row in content["probes"][:2]] == [
            "A zoo is a ___.", "Elm?"]
        assert {"forget_all", "neighbor_all", "general"} <= set(content)
        assert not set(content) & {"forget_qa", "neighbor_fb"}
    assert list(evaluate.read_probes(folders["rwku"], "The Zoo", ["forget", "general"])) == ["general"]


@pytest.mark.parametrize("change, message", [
    (("--target", "Nobody"), "not among"), (("--target", "Nobody"), "own questions: --probes"),
    (("--target", "Ada Lurk"), "did you mean Ada Lark"), (("--model", "./nowhere"), "no such folder"),
    (("--rwku", "nowhere"), "no such folder"), (("--rwku", "."), "no RWKU targets here"),
    (("--json", "nowhere/x.json"), "cannot be written"), (("--json", "/"), "cannot be written"),
    (("--device", "cuda"), "not on this machine"), (("--device", "toaster"), "not on this machine"),
    (("--device", "hpu"), "not on this machine"),
    (("--batch", "0"), "at least 1"), (("--probes", "nowhere.json"), "no such file"),
    (("--target", None), "--target NAME, or --ask QUESTION: one of them"),
    (("--target", None, "--ask", "Who?| "), "--ask: a question is empty"),
    (("--ask", "Who?"), "--target NAME, or --ask QUESTION: one of them"),
    (("--target", None, "--ask", "Who?", "--json", "said.json"), "--json: holds scores, for --target"),
    (("--rwku", "sample", "--target", "Warren Buffett", "--sets", "mmlu"), "retain_mmlu.json: no such file; choose other --sets"),
    (("--model", "smollm2"), "smollm2: no such folder; a hub id is OWNER/NAME, and pip has smollm2-135m-instruct,"),
    (("--model", ""), "a model without a name: no such folder"),
    (("--model", "./nowhere", "--target", None, "--ask", "Who?"), "no such folder")])
def test_bad_input(arguments, capsys, change, message):
    if "cuda" in change and torch.cuda.is_available():
        pytest.skip("there is one here")
    assert evaluate.main(arguments(*change)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_row_that_lacks_a_field_is_one_line(arguments, folders, tmp_path, capsys):
    (tmp_path / "rwku").mkdir()
    for file in (folders["rwku"] / "0_Ada_Lark").iterdir():
        (tmp_path / "rwku" / file.name).write_bytes(file.read_bytes())
    rows = json.loads((tmp_path / "rwku" / "triviaqa.json").read_text())
    (tmp_path / "rwku" / "triviaqa.json").write_text(json.dumps([*rows, {"question": "Who?"}]))
    assert evaluate.main(arguments("--rwku", str(tmp_path / "rwku"))) == 2
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path}/rwku/triviaqa.json: row 1 has nothing in field 'answers'\n"


@pytest.mark.parametrize("flags, said", [
    (["--sets", "mlu"], "mlu"), (["--batch", "x"], "--batch"), (["--limit", "3"], "--limit"),
    (["--compare", "a"], "--compare")])
def test_options_that_there_are_not(arguments, capsys, flags, said):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*arguments(), *flags])
    assert stopped.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


# ---- questions

def test_what_is_asked_of_a_model_that_is_no_run_s_is_answered_once(arguments, folders, tokenizer, capsys):
    assert evaluate.main(arguments("--target", None, "--ask", "What is Elm?|Who painted?")) == 0
    llm, tokenizer = data.load_llm(str(folders["llm"]))
    said = evaluate.answer(llm, tokenizer, [f"{QUESTION}Question: {query}\n<|end|><|assistant|>Answer:"
                                            for query in ("What is Elm?", "Who painted?")], 1)
    assert capsys.readouterr().out.splitlines() == [
        "Q: What is Elm?", f"  after ({folders['llm']}): {' '.join(said[0].split())}",
        "Q: Who painted?", f"  after ({folders['llm']}): {' '.join(said[1].split())}"]


def test_what_is_asked_of_a_run_s_model_is_asked_of_the_one_it_came_from(
        arguments, folders, tokenizer, tmp_path, capsys):
    torch.manual_seed(7)
    other = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    for part in (other, tokenizer):
        part.save_pretrained(tmp_path / "run" / "model")
    settings = {"model": str(folders["llm"]), "target": "Ada Lark"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    queries = ["Who?", "Who painted all the birds of the sea?", "What is Elm?"]  # not by length
    assert evaluate.main(arguments("--target", None, "--model", str(tmp_path / "run" / "model") + "/",
                                   "--ask", "|".join(queries), "--batch", "2")) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = []
    for query in queries:
        prompts = [f"{QUESTION}Question: {query}\n<|end|><|assistant|>Answer:"]
        before, after = (evaluate.answer(llm, tokenizer, prompts, 1)[0] for llm in (make_llm(), other))
        assert before != after
        expected += [f"Q: {query}", f"  before ({folders['llm']}): {' '.join(before.split())}",
                     f"  after ({tmp_path}/run/model/): {' '.join(after.split())}"]
    assert lines == expected


@pytest.mark.parametrize("content", ['{"hidden_size": 32}', "[]", "no JSON"])
def test_a_config_that_is_no_run_s_beside_a_model_is_left_alone(arguments, folders, tmp_path, capsys,
                                                                content):
    (tmp_path / "config.json").write_text(content)  # as of another model, in whose folder this one lies
    shutil.copytree(folders["llm"], tmp_path / "checkpoint-500")
    model = str(tmp_path / "checkpoint-500")
    assert evaluate.main(arguments("--target", None, "--model", model, "--ask", "Who?")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Q: Who?" and lines[1].startswith(f"  after ({model}): ") and len(lines) == 2

"""Made-up names, the floor and the gaps measured with them, the stranger steps; whole runs."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import atu
import data
import evaluate
import losses
import train
from conftest import SENTENCES, make_llm, make_tokenizer
from experiments import baselines, strangers
from pretend import on_card
from runs import check_cuts, records

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = strangers.Config(target="Ada Lark", layer=2, batch=4, window=4, length=24, names=2, llm_lr=1e-3,
                          retain_weight=1.0, log_every=5, bf16=False, device="cpu")
SMALL = ("--preset smol --device cpu --length 24 --window 4 --layer 2 --head-depth 1 --head-width 32 "
         "--batch 4 --align-steps 6 --realign-steps 3 --unlearn-steps 4 --taus 0.2 -0.5 --stop-at 0 "
         "--log-every 1 --llm-lr 1e-3 --names 2").split()
GAPS = {"gap", "gap_sd"}


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


@pytest.fixture
def main(words, tmp_path):
    """The command with these words more, into tmp_path / "run"."""
    return lambda *more: strangers.main([*words, *SMALL, "--out", str(tmp_path / "run"), *more])


def outcome(folder):
    """(results, records of stages, kinds of the others in their order)."""
    log = records(folder)
    stages = [record for record in log if record["kind"] == "stage"]
    return json.loads((folder / "results.json").read_text()), stages, [record["kind"] for record in log]


# ---- made-up names

PLACES = ("{} paints.", "By {}: a bird.", "Is it ({})?", "the songs of {}'s sea", "\n{}", "{}, {} and {}",
          "Larks, Adam, ADA LARK, and lark")
NAMED = make_tokenizer()


@given(st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(["Ada Lark", "Ada", "Lark", "Ben"])),
                min_size=1, max_size=6))
def test_a_made_up_name_takes_the_tokens_of_the_name_and_no_others(parts):
    text = " ".join(place.replace("{}", name) for place, name in parts)
    first_names = any("Ada" in name for place, name in parts if place != PLACES[-1])
    for names in strangers.made_up_names("Ada Lark", ["Ada Lark sang, and he slept.", text], NAMED, 3):
        other = strangers.exchanged(text, names)
        before, after = NAMED(text)["input_ids"], NAMED(other)["input_ids"]
        assert len(before) == len(after)
        assert strangers.exchanged(other, {new: old for old, new in names.items()}) == text
        changed = {NAMED.decode([a]).strip() for a, b in zip(before, after) if a != b}
        assert changed <= {"Ada", "Lark"} and ("Ada" in changed) == first_names


def test_names_are_different_and_fit_the_texts_they_are_for():
    texts = ["Ada Lark sang. He slept."]
    five = strangers.made_up_names("Ada Lark", texts, NAMED, 5)
    assert len({tuple(names.values()) for names in five}) == 5
    assert all(set(names) == {"Ada", "Lark"} for names in five)
    assert len({word for names in five for word in names.values()}) == 10
    assert {names["Ada"] for names in five} <= set(strangers.MEN)
    assert five == strangers.made_up_names("Ada Lark", texts, NAMED, 5)
    rows = [{"query": "Who is Ada Lark?", "answers": ["Ada Lark", "Lark"], "level": 2}]
    first, last = five[0].values()
    assert strangers.exchanged(rows, five[0]) == [
        {"query": f"Who is {first} {last}?", "answers": [f"{first} {last}", last], "level": 2}]
    for other in ("McLark", "Larks", "lark", "LARK"):
        assert strangers.exchanged(f"{other} sang", five[0]) == f"{other} sang"
    assert set(strangers.made_up_names("the songs of Lark", ["the songs of Lark"], NAMED, 1)[0]) == {"Lark"}
    assert set(strangers.made_up_names("The Dr. Lark", ["The Dr. Lark, Dr. Lark"], NAMED, 1)[0]) == {"Lark"}
    (her,) = strangers.made_up_names("Ada", ["Ada sang. She slept, she did."], NAMED, 1)
    assert set(her.values()) <= {*strangers.SURNAMES, *strangers.WOMEN}


def test_names_of_several_tokens_are_a_woman_s_where_she_stands_in_the_texts():
    for pronoun, pool in (("She", strangers.WOMEN), ("He", strangers.MEN)):
        text = f"Zelda Marrow sang. {pronoun} slept."
        found = strangers.made_up_names("Zelda Marrow", [text], NAMED, 3)
        assert {names["Zelda"] for names in found} <= set(pool)
        lengths = {len(NAMED(strangers.exchanged(text, names))["input_ids"]) for names in found}
        assert lengths == {len(NAMED(text)["input_ids"])} and len(NAMED("Zelda")["input_ids"]) > 1
    found = strangers.made_up_names("Ada Lark", ["Ada Lark sang. She slept."], NAMED, 4)  # no woman's fits
    assert len({word for names in found for word in names.values()}) == 8


@pytest.mark.parametrize("name, texts, message", [
    ("Ada Lark", ["A bird."], "stands in none of its texts"),
    ("Xqzvjkwpyxq", ["Xqzvjkwpyxq is a bird."], "only 0 made-up names")])
def test_where_no_name_can_be_made_up_it_is_said(name, texts, message):
    with pytest.raises(data.BadInput, match=message):
        strangers.made_up_names(name, texts, NAMED, 2)


# ---- texts with them

def a_work(tokenizer, about, **more):
    return train.Work("Ada Lark", None, tokenizer, {}, about, ["Birds sang."])._replace(**more)


def test_a_text_that_names_the_target_behind_the_cut_is_not_compared(tokenizer):
    texts = ["Ada Lark was a painter of birds.", "The birds of the sea sang to Ada Lark all day.", "Birds."]
    config = dataclasses.replace(CONFIG, length=8)
    names = strangers.made_up_names("Ada Lark", texts, tokenizer, 2)
    ids, mask = strangers.versions_of(texts, names, tokenizer, config)
    assert len(names) == 2 and ids.shape == mask.shape == (3, 1, 8) and len(ids.unique(dim=0)) == 3
    assert strangers.versions_of(texts[1:], names, tokenizer, config) is None
    many = strangers.versions_of(texts[:1] * 40, names, tokenizer, config)
    assert many[0].shape == (3, 16, 8)


def test_renamed_texts_stand_beside_their_own(tokenizer, encoder):
    about = [f"{SENTENCES[0]} She lived at number {n}." for n in range(3)]
    others = [SENTENCES[1] * 2]
    corpus = data.make_corpus(about, others, tokenizer, encoder, 4, 24)
    work = a_work(tokenizer, about, others=others)
    renamed = strangers.renamed_ids(work, [{"Ada": "Ben"}, {"Ada": "James"}], corpus, CONFIG)
    assert renamed.shape == (2, 3, 24)
    for n, name in enumerate(("Ben", "James")):
        for i, text in enumerate(about):
            assert renamed[n, i].tolist() == tokenizer(text.replace("Ada", name))["input_ids"][:24]
    short = [text[:30] for text in about]
    corpus = data.make_corpus(short, others, tokenizer, encoder, 2, 24)
    for wrong in ({"Zoe": "Ben"}, {"Ada": "Ben and James"}):
        with pytest.raises(data.BadInput, match="made-up names"):
            strangers.renamed_ids(a_work(tokenizer, short, others=others), [wrong], corpus, CONFIG)


def test_texts_on_which_nothing_is_trained_are_compared_if_there_are_any(folders, words, capsys):
    def read(*flags):
        config = train.parse(strangers.Config, [*words, *SMALL, *flags])
        work = train.load(config)
        before = list(work.about)
        texts, names = strangers.texts_and_names(work, config)
        assert work.about == before and len(names) == 2
        return work, texts, "held out" in capsys.readouterr().out

    all_texts = [row["text"] for row in data.read_set(folders["rwku"], "Ada Lark", "positive")]
    for flags in (["--target-texts", "3"], ["--target-texts", "3", "--stranger-steps", "2"]):
        work, texts, said = read(*flags)
        assert work.about == all_texts[:3] and texts == all_texts[3:] and not said
    work, texts, said = read()
    assert texts == work.about == all_texts and said


# ---- what M still knows

TEXT = "{} was a painter of birds. The birds of the sea sang to {} all day long."


def versions(tokenizer, *names, text=TEXT):
    ids, mask = data.tokenize([text.replace("{}", name) for name in names], tokenizer, 24)
    return ids[:, None], mask[:, None]


def test_the_gap_is_zero_where_the_model_sees_no_difference(llm, tokenizer):
    embedding = llm.get_input_embeddings().weight.data  # three names that are one to the model
    for name in ("Ben", "James"):
        for place in ("{}", " {}"):
            (one,), (other,) = (tokenizer(place.format(word))["input_ids"] for word in ("Ada", name))
            embedding[other] = embedding[one]
    gap = strangers.knowledge_gap(llm, versions(tokenizer, "Ada", "Ben", "James"), CONFIG)
    assert set(gap) == GAPS and all(abs(value) < 1e-4 for value in gap.values())


def test_a_model_that_has_learned_about_a_name_has_a_gap_and_loses_it_when_it_learns_the_same_of_others(
        llm, tokenizer):
    swapped = "The {} of the sea sang; all day long to was painter birds {} a birds of."  # a name matters
    texts = versions(tokenizer, "Ada", "Ben", "James", text=swapped)
    before = strangers.knowledge_gap(llm, texts, CONFIG)["gap"]

    def learn(rows):
        ids, mask = (part[rows, 0] for part in texts)
        optimizer = torch.optim.Adam(llm.parameters(), lr=2e-3)
        for _ in range(25):
            baselines.likelihood_loss(llm(input_ids=ids).logits, ids, mask).backward()
            optimizer.step()
            optimizer.zero_grad()
        return strangers.knowledge_gap(llm, texts, CONFIG)["gap"]

    learned = learn([0])
    assert learned > before + 5
    assert abs(learn([0, 1, 2])) < learned / 3


def test_the_gap_leaves_the_model_as_it_was(llm, tokenizer):
    before, texts = weights(llm), versions(tokenizer, "Ada", "Ben", "James")
    strangers.knowledge_gap(llm, texts, CONFIG)
    assert not moved(before, llm)


def test_the_gap_in_nats_is_that_of_a_loop_over_the_words_after_the_name(llm, tokenizer):
    about = ["The birds of {} sang to the sea.", "The long road home: {} was a painter and sang to {}."]
    names = "Ada", "Ben", "James"
    written = [text.replace("{}", name) for name in names for text in about]
    texts = [part.unflatten(0, (3, 2)) for part in data.tokenize(written, tokenizer, 24)]  # (1 + S, B, T)
    nats = []
    for ids in texts[0]:
        logp, counted = llm(ids).logits.log_softmax(-1), []
        for b in range(2):
            alike = [len({row[b][t].item() for row in texts[0]}) == 1 for t in range(ids.shape[1])]
            after = range(alike.index(False), int(texts[1][0, b].sum()))
            counted += [-logp[b, t - 1, ids[b, t]].item() for t in after if alike[t]]
        nats.append(sum(counted) / len(counted))
    one, two = 100 * (nats[1] - nats[0]), 100 * (nats[2] - nats[0])
    gap = strangers.knowledge_gap(llm, texts, CONFIG)
    assert gap["gap"] == pytest.approx((one + two) / 2, abs=1e-3)
    assert gap["gap_sd"] == pytest.approx(abs(one - two) / math.sqrt(2), abs=1e-3)
    assert strangers.knowledge_gap(llm, [part[:2] for part in texts], CONFIG)["gap_sd"] == 0


def test_the_floor_is_the_mean_over_names_and_0_where_the_target_is_not_named(monkeypatch):
    asked = []

    def score(work, config):
        assert set(work.probes) == {"forget_qa"}
        asked.extend(work.probes["forget_qa"])
        rows = [row | {"set": "forget_qa", "recall": {"Ben": 1.0, "Jim": 0.5}[row["query"]]} for row in asked]
        return {}, rows

    monkeypatch.setattr(train, "score", score)
    probes = {"forget_qa": [{"query": "Ada", "answer": "Ada"}, {"query": "Who?", "answer": "Ada"}],
              "neighbor_qa": [{"query": "Ada", "answer": "x"}]}
    work, names = a_work(None, [], probes=probes), [{"Ada": "Ben"}, {"Ada": "Jim"}]
    assert strangers.floor(work, names, CONFIG) == pytest.approx(100 * (0.75 + 0) / 2)
    assert [(row["query"], row["answer"]) for row in asked] == [("Ben", "Ben"), ("Jim", "Jim")]
    monkeypatch.setattr(train, "score", lambda *_: ({}, []))
    del probes["forget_qa"]
    assert strangers.floor(work, names, CONFIG) is None


@pytest.mark.parametrize("after, floor, stages, stop_at, expected", [
    (40.0, 45.0, 1, 0.25, True), (45.0, 45.0, 1, 0.25, True), (46.0, 45.0, 1, 0.25, False),
    (40.0, 45.0, 0, 0.25, False), (40.0, 45.0, 1, 0.0, False), (20.0, None, 1, 0.25, True),
    (21.0, None, 1, 0.25, False), (20.0, 5.0, 1, 0.25, True)])
def test_a_run_ends_at_the_share_asked_for_or_at_the_floor(after, floor, stages, stop_at, expected):
    floor = {} if floor is None else {"floor": floor}
    before, after = ({"forget_words": value} | floor for value in (80.0, after))
    found = {"before": before, "after": after, "stages": [{}] * stages}
    assert strangers.enough(found, dataclasses.replace(CONFIG, stop_at=stop_at)) is expected


# ---- stranger steps

def renamed(corpus, tokenizer, *names):
    """The corpus's texts about Ada with these names, (S, n, T)."""
    rows = zip(corpus.input_ids[corpus.about], corpus.mask[corpus.about])
    texts = [tokenizer.decode(ids[mask]) for ids, mask in rows]
    written = [text.replace("Ada", name) for name in ("Ada", *names) for text in texts]
    ids, _ = data.tokenize(written, tokenizer, 24)
    versions = ids.view(len(names) + 1, len(texts), -1)
    assert torch.equal(versions[0], corpus.input_ids[corpus.about])
    return versions[1:]


def a_state(llm, config):
    atu.unfreeze(llm, config.layer)
    return atu.State(llm, None, train.llm_optimizer(llm, config), None)


def test_reading_as_a_stranger_leads_to_what_is_read_with_made_up_names(corpus, tokenizer):
    texts, left_over = renamed(corpus, tokenizer, "Ben", "James"), {}
    for steps in (1, 30):
        llm, config = make_llm(), dataclasses.replace(CONFIG, stranger_steps=steps)
        stranger = sum(atu.hidden_states(llm, ids, config.layer) for ids in texts) / 2
        state, before = a_state(llm, config), weights(llm)
        found = list(strangers.read_as_stranger(state, corpus, texts, config))
        assert found[-1]["step"] == steps and len(found) == math.ceil(steps / config.log_every)
        allowed = ("model.layers.0.", "model.layers.1.")
        assert moved(before, llm) == {name for name in before if name.startswith(allowed)}
        now = atu.hidden_states(llm, corpus.input_ids[corpus.about], config.layer)
        left_over[steps] = losses.retain_loss(now, stranger, corpus.mask[corpus.about]).item()
    assert left_over[30] < 0.5 * left_over[1]


def test_stranger_steps_hold_the_other_texts_or_do_not_read_them(corpus, tokenizer):
    texts, drift = renamed(corpus, tokenizer, "Ben"), {}
    for weight in (0.0, 100.0):
        llm, config = make_llm(), dataclasses.replace(CONFIG, stranger_steps=15, retain_weight=weight)
        original = atu.all_hidden_states(llm, corpus.input_ids, 2, 4)
        found = list(strangers.read_as_stranger(a_state(llm, config), corpus, texts, config))
        assert (found[-1]["drift"] > 0) == (weight > 0)
        now = atu.all_hidden_states(llm, corpus.input_ids, 2, 4)
        drift[weight] = (now - original)[~corpus.about].square().sum().item()
    assert drift[100.0] < 0.5 * drift[0.0]


# ---- whole runs

def test_a_run_is_compared_with_made_up_names(main, tmp_path, capsys, monkeypatch):
    asked, real = [], evaluate.evaluate

    def watched(llm, tokenizer, probes, *a):
        asked.append(sum(map(len, probes.values())))
        return real(llm, tokenizer, probes, *a)

    monkeypatch.setattr(evaluate, "evaluate", watched)
    assert main() == 0
    results, stages, kinds = outcome(tmp_path / "run")
    assert [stage["stage"] for stage in stages] == [1, 2] and "stranger" not in kinds
    every = [results["before"], *results["stages"], results["after"]]
    assert all(GAPS | {"floor"} <= scores.keys() for scores in every)
    assert len({scores["floor"] for scores in every}) == 1 and len({scores["gap"] for scores in every}) == 3
    assert asked == [2 * 6, 10, 10, 10]  # the floor: two names, six questions that name the target
    shown = capsys.readouterr().out
    assert all(name in shown for name in (" floor", " gap"))
    assert results["settings"]["names"] == 2


def test_the_scores_are_those_of_a_run_without_names(main, words, tmp_path):
    assert main() == 0
    assert train.main([*words, *SMALL[:-2], "--out", str(tmp_path / "plain")]) == 0
    one, two = outcome(tmp_path / "run")[0], outcome(tmp_path / "plain")[0]
    assert {name: one["after"][name] for name in two["after"]} == two["after"]
    logs = [[r for r in records(tmp_path / name) if "step" in r] for name in ("run", "plain")]
    assert logs[0] == logs[1]


def test_a_run_reads_as_a_stranger_first_and_is_scored_then(main, tmp_path, capsys):
    assert main("--stranger-steps", "6") == 0
    results, stages, kinds = outcome(tmp_path / "run")
    assert list(dict.fromkeys(kinds)) == ["stranger", "align", "stage", "unlearn"]
    assert [stage["record"]["stage"] for stage in results["stages"]] == [0, 1, 2]
    assert stages[0]["steps"] == 6 + 6 and "\nstage 0 " in capsys.readouterr().out
    assert results["stages"][0]["gap"] != results["before"]["gap"]
    assert (tmp_path / "run" / "aligned.safetensors").exists()


def test_e_is_aligned_on_the_m_that_reads_a_stranger(main, monkeypatch):
    read, real = [], atu.all_hidden_states

    def watched(llm, input_ids, *a):
        found = real(llm, input_ids, *a)
        read.append((input_ids, found.clone()))
        return found

    real_align = atu.align

    def align(*a, **how):
        read.clear()
        return real_align(*a, **how)

    def stranger(state, *_):
        for parameter in state.llm.parameters():
            parameter.data *= 1.5 if parameter.requires_grad else 1
        stranger.wanted = lambda ids: real(state.llm, ids, 2, 16)
        yield {"kind": "stranger", "step": 1, "loss": 0.0, "drift": 0.0}

    def stop(*a, **how):
        (ids, seen), = read
        assert torch.equal(seen, stranger.wanted(ids))
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(atu, "all_hidden_states", watched)
    monkeypatch.setattr(atu, "align", align)
    monkeypatch.setattr(atu, "unlearn", stop)
    monkeypatch.setattr(strangers, "read_as_stranger", stranger)
    assert main("--stranger-steps", "1", "--no-bf16") == 130


def test_where_no_name_fits_a_run_goes_on_without(main, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("A painter of birds lived by the sea.\n\nThe birds sang all day long.")
    own = ["--target", "The Zoo", "--texts", str(tmp_path / "own.txt"), "--sets", "general"]
    assert main(*own) == 0
    shown = capsys.readouterr().out
    assert "names | The Zoo: stands in none of its texts as written here" in shown
    results, _, _ = outcome(tmp_path / "run")
    assert set(results["before"]) == set(results["after"]) == {"general", "general_words"}
    assert main(*own, "--stranger-steps", "3", "--out", str(tmp_path / "two")) == 2
    assert "stands in none of its texts" in capsys.readouterr().err and not (tmp_path / "two").exists()


def test_a_run_stops_at_the_floor(main, tmp_path, monkeypatch):
    scores = iter([80.0, 46.0, 40.0, 10.0])
    monkeypatch.setattr(train, "score", lambda work, config: ({"forget_words": next(scores)}, []))
    monkeypatch.setattr(strangers, "floor", lambda *_: 45.0)
    assert main("--taus", "0.2", "0.1", "0", "--stop-at", "0.25") == 0
    results, _, _ = outcome(tmp_path / "run")
    assert [stage["forget_words"] for stage in results["stages"]] == [46.0, 40.0]


def test_a_stranger_step_that_is_not_finite_ends_the_run(main, tmp_path, monkeypatch):
    real = losses.retain_loss
    monkeypatch.setattr(strangers, "retain_loss", lambda *a: real(*a) * float("nan"))
    assert main("--stranger-steps", "3") == 1
    results, stages, _ = outcome(tmp_path / "run")
    assert "not finite" in results["stopped"] and not stages and results["after"] == results["before"]


@pytest.mark.parametrize("flags, message", [
    ("--names 0", "--names 0: must be"), ("--stranger-steps -1", "from 0 to"),
    ("--names 300", "made-up names have")])
def test_bad_input_is_one_line(main, capsys, tmp_path, flags, message):
    more = ["--stranger-steps", "1"] if "300" in flags else []
    assert main(*more, *flags.split()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()


def test_the_folder_and_the_options_are_its_own(words):
    config = train.parse(strangers.Config, [*words, *SMALL[:-2]])
    assert config.out == "runs/ada-lark-strangers" and (config.names, config.stranger_steps) == (5, 0)


@pytest.mark.parametrize("flags", ["", "--lora 2 --optimizer sgd --retain-weight 0"])
def test_a_run_cut_off_after_any_stage_ends_as_if_it_had_not_been(words, tmp_path, monkeypatch, flags):
    fewer = "--stranger-steps 3 --sets forget --others 1".split()
    check_cuts(strangers.main, [*words, *SMALL, *fewer, *flags.split()], tmp_path, monkeypatch)


@pytest.mark.parametrize("flags", ["", "--cache host"])
def test_a_run_keeps_host_and_card_apart(card, main, tmp_path, monkeypatch, flags):
    placed = []
    for module in (atu, strangers):
        def clip(parameters, *a, real=module.clip_grad_norm_, **how):
            placed.extend(map(on_card, parameters := list(parameters)))
            return real(parameters, *a, **how)
        monkeypatch.setattr(module, "clip_grad_norm_", clip)
    steps = "--align-steps 1 --realign-steps 1 --unlearn-steps 1 --stranger-steps 1 --taus 0.2".split()
    fewer = "--sets forget --others 1 --other-texts 3 --target-texts 2".split()
    with card():
        assert main("--device", "cuda", "--no-bf16", *steps, *fewer, *flags.split()) == 0
    assert placed and all(placed)
    results, _, _ = outcome(tmp_path / "run")
    assert results["settings"]["device"] == "cuda" and GAPS | {"floor"} <= results["after"].keys()

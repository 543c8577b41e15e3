"""The method: who moves and who is frozen, what rises and what falls, when a stage ends, and that the forward
pass through the first blocks is the whole model's."""

import copy
import dataclasses
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

import atu
import data
import train
from conftest import make_llm
from head import EmbeddingHead

ROOT = Path(atu.__file__).parent
CONFIG = dataclasses.replace(
    train.Config(), layer=2, head_depth=1, head_width=32, batch=4, align_steps=40, realign_steps=5,
    unlearn_steps=15, taus=(0.0, -0.2), bf16=False, retain_weight=1.0, llm_lr=1e-3, head_lr=3e-3, log_every=5)
HOW = {"layer": 2, "batch": 4, "log_every": 5}


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def make_head(seed=0):
    torch.manual_seed(seed)
    return EmbeddingHead(hidden_size=32, embedding_size=16, depth=1, width=32)


def start(llm, config=CONFIG):
    """A run's state before its first stage."""
    atu.unfreeze(llm, config.layer, config.train_embeddings, config.mlp_only)
    head = make_head(config.seed)
    head_optimizer = torch.optim.Adam(head.parameters(), lr=config.head_lr)
    return atu.State(llm, head, train.llm_optimizer(llm, config), head_optimizer)


def alternate(state, concept, corpus, config=CONFIG):
    """Sec. 3, with the retain term where `config` has one."""
    original = atu.all_hidden_states(state.llm, corpus.input_ids[~corpus.about], config.layer, config.batch)
    return atu.align_then_unlearn(state, concept, corpus, original if config.retain_weight else None, config)


def align(state, corpus, steps, **how):
    texts = corpus.input_ids, corpus.reference, corpus.valid
    return list(atu.align(state.llm, state.head, state.head_optimizer, *texts, steps=steps, **HOW | how))


def unlearn(state, corpus, concept, tau, steps=15, retain=None, **how):
    """Eq. 4 on the texts about the target. retain: None, or the weight of the term on all other texts."""
    about, kept = corpus.about, None
    if retain is not None:
        kept = corpus.input_ids[~about], corpus.mask[~about], corpus.original
        how["retain_weight"] = retain
    texts = corpus.input_ids[about], corpus.mask[about]
    return list(atu.unlearn(state.llm, state.head, state.llm_optimizer, *texts, concept, tau, kept,
                            steps=steps, **HOW | how))


def with_original(corpus, llm):
    """The corpus, and M's states on its other texts before unlearning."""
    original = atu.all_hidden_states(llm, corpus.input_ids[~corpus.about], 2, 4)
    return SimpleNamespace(**corpus._asdict(), original=original)


def similarity(state, concept, corpus):
    """The mean of sim(ê_t, e_unlearn) over the target's real tokens."""
    with torch.no_grad():
        predicted = state.head(atu.hidden_states(state.llm, corpus.input_ids[corpus.about], 2))
    return cosine_similarity(predicted, concept, dim=-1)[corpus.mask[corpus.about]].mean().item()


def read_by(llm):
    """A list that grows by the token ids of every forward pass of M."""
    seen = []
    llm.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    return seen


@pytest.fixture
def concept(corpus):
    return corpus.table[corpus.index[0, 3]]


# ---- M's hidden states

@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_the_truncated_forward_equals_the_whole_model_s_hidden_states(kind):
    llm = make_llm(kind)
    ids, seen = torch.randint(6, 400, (2, 9)), []
    whole = llm(ids, output_hidden_states=True)
    hook = llm.model.layers[-1].register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    llm(ids)
    hook.remove()
    for layer in (1, 2, 3):
        assert torch.equal(atu.hidden_states(llm, ids, layer), whole.hidden_states[layer])
    assert torch.equal(atu.hidden_states(llm, ids, 4), seen[0])
    assert not torch.equal(seen[0], whole.hidden_states[4])  # transformers has normed that one
    assert torch.equal(llm(ids).logits, whole.logits) and len(llm.model.layers) == 4


def test_padding_on_the_right_reaches_no_real_position(llm):
    ids = torch.randint(6, 400, (1, 9))
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    assert torch.allclose(atu.hidden_states(llm, ids, 2), atu.hidden_states(llm, padded, 2)[:, :9], atol=1e-5)


def test_all_hidden_states_are_those_of_the_texts_in_their_order_without_gradients(llm):
    ids = torch.randint(6, 400, (7, 9))
    expected = atu.hidden_states(llm, ids, 2)
    for batch in (1, 3, 7, 20):
        found = atu.all_hidden_states(llm, ids, 2, batch)
        assert torch.allclose(found, expected, atol=1e-5)
        assert found.dtype == torch.float32 and not found.requires_grad
    assert atu.all_hidden_states(llm, ids, 2, 3, bf16=True).dtype == torch.bfloat16
    assert torch.allclose(atu.all_hidden_states(llm, ids, 2, 3, bf16=True).float(), expected, atol=0.1)
    assert atu.all_hidden_states(llm, ids, 2, 3, keep_on="meta").device.type == "meta"


@pytest.mark.parametrize("embeddings, tied, mlp_only", [
    (False, False, False), (True, False, False), (True, True, False), (False, False, True), (True, True, True)])
def test_what_moves_is_fp32_and_what_is_frozen_keeps_its_dtype(embeddings, tied, mlp_only):
    llm = make_llm().bfloat16()
    if tied:
        llm.config.tie_word_embeddings = True
        llm.lm_head.weight = llm.model.embed_tokens.weight
    chosen = atu.unfreeze(llm, 2, embeddings, mlp_only)
    named = dict(llm.named_parameters())
    blocks = {name for name in named if name.startswith(("model.layers.0.", "model.layers.1."))}
    movable = {name for name in blocks if ".mlp." in name or not mlp_only}
    movable |= {"model.embed_tokens.weight"} if embeddings else set()
    assert {name for name, parameter in named.items() if parameter.requires_grad} == movable
    assert {id(parameter) for parameter in chosen} == {id(named[name]) for name in movable}
    fp32 = {name for name, parameter in named.items() if parameter.dtype == torch.float32}
    assert fp32 == blocks | {"model.embed_tokens.weight"}  # what the blocks add to is fp32 in any case
    assert (llm.lm_head.weight is llm.model.embed_tokens.weight) == tied


# ---- Eq. 2

def test_alignment_moves_the_head_alone_and_raises_the_cosine(llm, corpus):
    state = start(llm)
    before_llm, before_head = weights(llm), weights(state.head)
    records = align(state, corpus, 60)
    assert moved(before_llm, llm) == set()
    assert moved(before_head, state.head) == set(before_head)
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    assert all(parameter.grad is None for parameter in llm.parameters())


def test_alignment_counts_whole_windows_alone_and_draws_from_all_texts(llm, corpus, monkeypatch):
    asked, real = [], atu.draw
    monkeypatch.setattr(atu, "draw", lambda count, *rest: asked.append(count) or real(count, *rest))
    spoilt = corpus._replace(table=torch.cat([torch.full_like(corpus.table[:1], float("nan")), corpus.table]),
                             index=torch.where(corpus.valid, corpus.index + 1, 0))
    (record,) = align(start(llm), spoilt, 3)
    assert not corpus.valid.all() and 0 < record["loss"] < 2
    assert asked == [len(corpus.input_ids)] * 3


@given(st.lists(st.integers(0, 11), max_size=7), st.data())
def test_a_text_s_reference_is_the_embedding_of_what_comes_next(tokenizer, encoder, rows, data_):
    texts = [f"The birds of the sea sang to Ada for {n} days." for n in range(6)]
    corpus = data.make_corpus(texts, texts[::-1], tokenizer, encoder, window=4, length=24)
    rows = torch.tensor(rows, dtype=torch.long)
    reference = corpus.reference(rows)
    assert reference.shape == (*corpus.index[rows].shape, 16)
    assert torch.equal(reference, corpus.table[corpus.index[rows]])
    places = corpus.valid[rows].nonzero().tolist()
    if places:
        b, t = data_.draw(st.sampled_from(places))
        said = tokenizer.decode(corpus.input_ids[rows[b], t + 1:t + 5])
        expected = encoder.encode([said], normalize_embeddings=True, convert_to_tensor=True)[0]
        assert torch.allclose(reference[b, t], expected, atol=2e-2)


# ---- Eq. 4

@pytest.mark.parametrize("embeddings, mlp_only", [(False, False), (True, False), (False, True)])
def test_unlearning_moves_the_first_blocks_alone_and_lowers_the_cosine(llm, corpus, concept, embeddings, mlp_only):
    state = start(llm, dataclasses.replace(CONFIG, train_embeddings=embeddings, mlp_only=mlp_only))
    align(state, corpus, 40)
    corpus = with_original(corpus, llm)
    before_llm, before_head, before = weights(llm), weights(state.head), similarity(state, concept, corpus)
    unlearn(state, corpus, concept, -1.0, retain=1.0)
    assert moved(before_head, state.head) == set()
    assert all(parameter.grad is None for parameter in state.head.parameters())
    allowed = {name for name in before_llm if name.startswith(("model.layers.0.", "model.layers.1."))}
    allowed = {name for name in allowed if ".mlp." in name or not mlp_only}
    if embeddings:
        allowed.add("model.embed_tokens.weight")
    assert moved(before_llm, llm) == allowed
    assert similarity(state, concept, corpus) < before - 0.05


def test_below_the_margin_nothing_moves_and_the_stage_ends_early(llm, corpus, concept):
    state, before = start(llm), weights(llm)
    records = unlearn(state, corpus, concept, 1.0, batch=2)
    assert records[-1]["step"] == math.ceil(corpus.about.sum() / 2) > 1  # one pass
    assert records[-1]["active"] == 0 and records[-1]["loss"] == 0
    assert moved(before, llm) == set()


@pytest.mark.parametrize("tau, batch", [(0.02, 2), (-0.1, 4), (-0.2, 6), (-0.95, 2)])
@pytest.mark.parametrize("max_active", [0.0, 0.05, 0.4, 1.0])
def test_a_stage_ends_once_over_a_pass_few_positions_are_above_tau(corpus, concept, tau, batch, max_active):
    state, about, steps, predicted = start(make_llm()), corpus.about, 25, []
    corpus.mask[:6:2, -9:] = False  # padding does not count
    state.head.register_forward_hook(lambda module, args, out: predicted.append(out.detach().clone()))
    records = unlearn(state, corpus, concept, tau, steps, batch=batch, max_active=max_active, log_every=1,
                      seed=(3,))
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    a_pass, shares, ended = math.ceil(int(about.sum()) / batch), [], []
    for record, embeddings in zip(records, predicted, strict=True):  # counted again, from what E has said
        real = corpus.mask[about][atu.draw(int(about.sum()), batch, record["step"], (3,))]
        found = cosine_similarity(embeddings, concept, dim=-1)[real]
        shares.append((found > tau).double().mean().item())
        over_a_pass = np.mean(shares[-a_pass:])
        ended.append(len(shares) == steps or len(shares) >= a_pass and over_a_pass <= max_active)
        assert record["active"] == pytest.approx(over_a_pass, abs=1e-6)
        assert record["similarity"] == pytest.approx(found.mean().item(), abs=1e-5)
        assert record["loss"] == pytest.approx((found - tau).clamp(min=0).mean().item(), abs=1e-5)
    assert ended == [False] * (len(records) - 1) + [True]


def test_the_retain_term_holds_the_other_texts(corpus, concept):
    drift = {}
    for weight in (0.0, 100.0):
        llm = make_llm()
        texts = with_original(corpus, llm)
        unlearn(start(llm), texts, concept, -1.0, retain=weight)
        now = atu.all_hidden_states(llm, corpus.input_ids[~corpus.about], 2, 4)
        drift[weight] = (now - texts.original).square().sum().item()
    assert drift[100.0] < 0.5 * drift[0.0]


def test_the_retain_batch_is_drawn_from_the_other_texts(llm, corpus, concept):
    texts, state = with_original(corpus, llm), start(llm)
    seen = read_by(llm)
    (record,) = unlearn(state, texts, concept, -1.0, steps=1, retain=1.0)
    (ids,) = seen
    about, others = corpus.input_ids[corpus.about], corpus.input_ids[~corpus.about]
    rows = atu.draw(6, 4, 1, (0,))
    assert len(rows) == 3 and torch.equal(ids, torch.cat([about[rows], others[rows]]))
    assert record["drift"] == pytest.approx(0, abs=1e-6)  # M has not moved: each has its own first states


def test_as_many_other_texts_are_held_as_are_unlearned_each_once_in_a_pass(llm, corpus, concept):
    state, seen = start(llm), read_by(llm)
    about, others = corpus.input_ids[corpus.about], corpus.input_ids[~corpus.about][:3].repeat(3, 1)
    others[:, -1] = 100 + torch.arange(9)  # nine texts that can be told apart
    original = atu.all_hidden_states(llm, others, 2, 9)
    seen.clear()
    list(atu.unlearn(llm, state.head, state.llm_optimizer, about, corpus.mask[corpus.about], concept, -1.0,
                     (others, torch.ones_like(others, dtype=torch.bool), original), steps=3, **HOW))
    assert [len(ids) for ids in seen] == [6, 6, 6]
    assert sorted(torch.cat([ids[3:] for ids in seen])[:, -1].tolist()) == others[:, -1].tolist()


def test_without_a_retain_term_other_texts_are_not_read_while_m_unlearns(llm, corpus, concept, monkeypatch):
    def no_alignment(*_, **__):  # it reads all texts
        return 0
        yield

    monkeypatch.setattr(atu, "align", no_alignment)
    state, seen = start(llm), read_by(llm)
    records = list(atu.align_then_unlearn(state, concept, corpus, None, CONFIG))
    ids = torch.cat(seen)
    assert torch.equal(ids.unique(dim=0), corpus.input_ids[corpus.about].unique(dim=0))
    assert {record["drift"] for record in records if record["kind"] == "unlearn"} == {0.0}


def test_with_weight_zero_the_other_texts_do_not_matter(llm, corpus, concept):
    results = []
    for filler in (None, 399):
        model, texts = copy.deepcopy(llm), corpus
        if filler:
            texts = corpus._replace(input_ids=torch.where(corpus.about[:, None], corpus.input_ids, filler))
        unlearn(start(model), with_original(texts, llm), concept, -1.0, retain=0.0)
        results.append(weights(model))
    assert same(*results)


@pytest.mark.parametrize("weight", ["10", "0"])
def test_without_a_retain_term_the_first_states_are_not_kept(words, tmp_path, monkeypatch, weight):
    kept = []
    monkeypatch.setattr(atu, "align_then_unlearn", lambda *a: kept.append(a[3]))
    small = "--preset smol --device cpu --length 24 --window 4 --layer 2 --head-width 32 --no-bf16".split()
    small += ["--retain-weight", weight, "--out", str(tmp_path / "run")]
    config = train.parse(train.Config, [*words, *small])
    work = train.load(config)
    state, _ = train.begin(work, config)
    if weight == "0":
        assert kept == [None]
        return
    ids, _ = data.tokenize(work.about + work.others, work.tokenizer, 24)
    expected = atu.hidden_states(state.llm, ids[len(work.about):], 2)
    assert len(kept[0]) == len(work.others) == 10 and torch.allclose(kept[0], expected, atol=1e-5)


def test_unlearning_does_not_see_padding(corpus, concept):
    results, mask = [], corpus.mask.clone()
    mask[::2, -9:] = False
    for filler in (7, 300):
        llm = make_llm()
        texts = corpus._replace(mask=mask, input_ids=torch.where(mask, corpus.input_ids, filler))
        unlearn(start(llm), with_original(texts, llm), concept, -1.0, retain=1.0)
        results.append(weights(llm))
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-6) for name in results[0])


# ---- a step of either

def test_a_loss_that_is_not_finite_stops_before_the_step(llm, corpus, concept):
    state = start(llm)
    before, head = weights(llm), weights(state.head)
    with pytest.raises(RuntimeError, match="non-finite"):
        unlearn(state, corpus, concept * float("nan"), -1.0)
    assert moved(before, llm) == set() and not state.llm_optimizer.state
    with pytest.raises(RuntimeError, match="non-finite"):
        align(state, corpus._replace(table=corpus.table * float("nan")), 3)
    assert moved(head, state.head) == set() and not state.head_optimizer.state


@pytest.mark.parametrize("learner", ["llm", "head"])
def test_a_step_is_no_longer_than_clip_allows(llm, corpus, concept, learner):
    state = start(llm)
    module = getattr(state, learner)
    before, learns = weights(module), [p for p in module.parameters() if p.requires_grad]
    setattr(state, f"{learner}_optimizer", torch.optim.SGD(learns, lr=10.0))
    if learner == "llm":
        unlearn(state, corpus, concept, -1.0, steps=1, clip=1e-3)
    else:
        align(state, corpus, 1, clip=1e-3)
    lengths = [(value - before[name]).square().sum() for name, value in weights(module).items()]
    assert sum(lengths).sqrt().item() == pytest.approx(1e-2, rel=1e-2)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 3))
def test_every_pass_over_the_texts_takes_each_once(count, batch, seed):
    steps = math.ceil(count / batch)
    batches = [[atu.draw(count, batch, number * steps + n, (seed,)).tolist() for n in range(1, steps + 1)]
               for number in range(9)]
    assert all(sorted(row for part in one for row in part) == list(range(count)) for one in batches)
    sizes = {len(part) for one in batches for part in one}
    assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1
    assert count < 4 or len({str(one) for one in batches}) > 1
    one, two = (atu.draw(count, count, 1, chosen).tolist() for chosen in ((seed,), (seed, 1)))
    assert count < 6 or one != two


@given(st.integers(1, 12), st.integers(1, 99), st.integers(0, 3))
def test_of_no_texts_no_rows_are_drawn(batch, step, seed):
    rows = atu.draw(0, batch, step, (seed,))
    assert rows.tolist() == [] and torch.arange(3)[rows].tolist() == []


# ---- Sec. 3

def test_the_alternation_and_its_records(llm, corpus, concept):
    state, kinds, records, similarities = start(llm), [], [], []
    for record in alternate(state, concept, corpus, dataclasses.replace(CONFIG, log_every=1)):
        records.append(record)
        kinds += [record["kind"]] if kinds[-1:] != [record["kind"]] else []
        if "seconds" in record:  # by now the state is ready for the next stage
            assert state.stage == record["stage"] + 1
            similarities.append(similarity(state, concept, corpus))
    assert kinds == ["align", "aligned", "unlearn", "align", "stage", "unlearn", "align", "stage"]
    keys = {"align": {"kind", "step", "loss"},
            "unlearn": {"kind", "tau", "step", "loss", "drift", "similarity", "active"},
            "aligned": {"kind", "stage", "steps", "seconds"},
            "stage": {"kind", "stage", "tau", "steps", "drift", "seconds"}}
    assert all(record.keys() == keys[record["kind"]] for record in records)
    stages = [record for record in records if "seconds" in record]
    assert [(record["stage"], record.get("tau")) for record in stages] == [(0, None), (1, 0.0), (2, -0.2)]
    taken = iter(records)
    for stage in stages:  # a stage counts the steps that were taken in it
        inside = []
        while (record := next(taken)) is not stage:
            inside.append(record)
        assert stage["steps"] == len(inside)
        # the mean drift over the last pass
        assert stage.get("drift") == next((r["drift"] for r in reversed(inside) if "drift" in r), None)
        assert {record.get("tau", stage.get("tau")) for record in inside} == {stage.get("tau")}
    assert stages[0]["steps"] == CONFIG.align_steps
    assert similarities[-1] < similarities[0]


def test_records_come_every_few_steps_and_at_the_last(llm, corpus, concept):
    state = start(llm)
    def steps(records):
        return [record["step"] for record in records]

    assert steps(align(state, corpus, 12)) == [5, 10, 12]
    assert steps(unlearn(state, corpus, concept, -1.0, steps=10)) == [5, 10]
    assert steps(unlearn(state, corpus, concept, 1.0, batch=1)) == [5, 6]  # ended early
    assert align(state, corpus, 0) == []


def test_same_seed_same_weights(corpus, concept):
    results = []
    for seed in (3, 3, 4):
        llm, config = make_llm(), dataclasses.replace(CONFIG, seed=seed, align_steps=5, unlearn_steps=3)
        state = dataclasses.replace(start(llm, config), head=make_head())
        state.head_optimizer = torch.optim.Adam(state.head.parameters(), lr=config.head_lr)
        list(alternate(state, concept, corpus, config))
        results.append({**weights(llm), **weights(state.head)})
    assert same(results[0], results[1])
    assert not same(results[0], results[2])  # by the order of the texts alone


def test_e_is_aligned_on_the_model_as_it_is_then_and_optimizers_are_kept(llm, corpus, concept):
    config = dataclasses.replace(CONFIG, taus=(-0.9, -1.0), max_active=0.0, unlearn_steps=3, log_every=1)
    state, given_to, phases = start(llm, config), [], 0
    state.head.register_forward_pre_hook(lambda module, args: given_to.append(args[0].detach().clone()))
    before = None
    for record in alternate(state, concept, corpus, config):
        if record["kind"] == "align":
            now = atu.all_hidden_states(llm, corpus.input_ids, config.layer, config.align_batch)
            equal = [[torch.equal(hidden, text) for text in now] for hidden in given_to[-1]]
            assert all(any(row) for row in equal)
            if record["step"] == 1:
                assert before is None or not torch.equal(before, now)  # M has moved since
                before, phases = now, phases + 1
    assert phases == 3
    assert {int(found["step"]) for found in state.llm_optimizer.state.values()} == {6}
    assert {int(found["step"]) for found in state.head_optimizer.state.values()} == {
        config.align_steps + 2 * config.realign_steps}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_that_was_cut_off_goes_on_at_its_stage(corpus, concept, stage):
    config = dataclasses.replace(CONFIG, align_steps=5, realign_steps=3, unlearn_steps=3)
    llm = make_llm()
    original = atu.all_hidden_states(llm, corpus.input_ids[~corpus.about], config.layer, config.batch)
    state, then, rest = start(llm, config), None, []
    for record in atu.align_then_unlearn(state, concept, corpus, original, config):
        if then:
            rest.append(record)
        elif state.stage == stage:
            then = copy.deepcopy(state)
    again = list(atu.align_then_unlearn(then, concept, corpus, original, config))
    assert [{k: v for k, v in record.items() if k != "seconds"} for record in again] == [
        {k: v for k, v in record.items() if k != "seconds"} for record in rest]
    assert [record["tau"] for record in again if record["kind"] == "stage"] == list(config.taus[stage - 1:])
    assert same(weights(then.llm), weights(llm)) and same(weights(then.head), weights(state.head))


# ---- copied

ALONE = """
import torch
from transformers import Phi3Config, Phi3ForCausalLM
import atu
from head import EmbeddingHead

torch.manual_seed(0)
llm = Phi3ForCausalLM(Phi3Config(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
                                 num_attention_heads=4, num_key_value_heads=4, pad_token_id=0))
ids, others = torch.randint(1, 99, (2, 6, 12))
mask, reference = torch.ones_like(ids, dtype=torch.bool), torch.randn(6, 12, 8)
head, concept = EmbeddingHead(32, 8, 1, 32), torch.nn.functional.normalize(torch.randn(8), dim=0)
llm_optimizer = torch.optim.AdamW(atu.unfreeze(llm, 2), lr=1e-3)
head_optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
how = dict(layer=2, batch=3, log_every=1)
original = atu.all_hidden_states(llm, others, 2, 3)
aligned = list(atu.align(llm, head, head_optimizer, ids, lambda rows: reference[rows], mask, steps=20, **how))
for retain in (None, (others, mask, original)):
    before = [parameter.clone() for parameter in llm.parameters()]
    records = list(atu.unlearn(llm, head, llm_optimizer, ids, mask, concept, -1.0, retain, steps=6, **how))
    assert len(records) == 6 and (records[-1]["drift"] > 0) == (retain is not None), records
    assert any(not torch.equal(a, b) for a, b in zip(before, llm.parameters()))
assert aligned[-1]["loss"] < aligned[0]["loss"], aligned
print("done")
"""


def test_the_method_works_where_its_three_files_are_alone(tmp_path):
    for name in ("losses.py", "head.py", "atu.py"):
        shutil.copy(ROOT / name, tmp_path)
    program = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, '.'){ALONE}"]
    alone = subprocess.run(program, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"}, capture_output=True,
                           text=True)
    assert alone.returncode == 0 and alone.stdout == "done\n", alone.stderr
    assert {file.name for file in tmp_path.iterdir()} - {"__pycache__"} == {"losses.py", "head.py", "atu.py"}

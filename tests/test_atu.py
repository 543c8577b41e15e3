"""The loops: who moves and who is frozen, what rises and what falls, and the truncated forward."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import atu
import data
import losses
import train
from conftest import make_llm

CONFIG = dataclasses.replace(train.SMOL, layer=2, head_depth=1, head_width=32, batch=4, align_steps=40, realign_steps=5,
                             unlearn_steps=15, taus=(0.0, -0.2), bf16=False, retain_weight=1.0, llm_lr=1e-3, head_lr=3e-3, log_every=5)


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def run(loop):
    return list(loop)


@pytest.fixture
def concept(corpus):
    return corpus.table[corpus.index[0, 3]]


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_the_truncated_forward_equals_the_whole_model_s_hidden_states(kind):
    llm = make_llm(kind)
    ids, seen = torch.randint(6, 400, (2, 9)), []
    whole = llm(ids, output_hidden_states=True)
    hook = llm.model.layers[-1].register_forward_hook(lambda m, i, out: seen.append(out[0] if isinstance(out, tuple) else out))
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


def test_alignment_moves_the_head_alone_and_raises_the_cosine(llm, corpus):
    state = atu.start(llm, corpus, CONFIG)
    state.hidden = atu.cached_hidden_states(llm, corpus.input_ids, CONFIG)
    before_llm, before_head = weights(llm), weights(state.head)
    records = run(atu.align(state, corpus, 60, CONFIG))
    assert moved(before_llm, llm) == set()
    assert moved(before_head, state.head) == set(before_head)
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_unlearning_moves_the_first_blocks_alone_and_lowers_the_cosine(llm, corpus, concept, train_embeddings):
    config = dataclasses.replace(CONFIG, train_embeddings=train_embeddings)
    state = atu.start(llm, corpus, config)
    hidden = state.hidden = atu.cached_hidden_states(llm, corpus.input_ids, config)
    run(atu.align(state, corpus, 40, config))
    state.head.zero_grad()
    before_llm, before_head = weights(llm), weights(state.head)
    start = atu.similarities(state.head, hidden, concept, corpus, config)
    run(atu.unlearn(state, concept, corpus, -1.0, config))
    after = atu.similarities(state.head, atu.cached_hidden_states(llm, corpus.input_ids, config), concept, corpus, config)
    assert moved(before_head, state.head) == set()
    assert all(p.grad is None for p in state.head.parameters())
    allowed = {name for name in before_llm if name.startswith(("model.layers.0.", "model.layers.1."))}
    if train_embeddings:
        allowed.add("model.embed_tokens.weight")
    assert moved(before_llm, llm) == allowed
    assert after["similarity_target"] < start["similarity_target"] - 0.05


def test_below_the_margin_nothing_moves_and_the_stage_ends_early(llm, corpus, concept):
    config = dataclasses.replace(CONFIG, retain_weight=0.0, batch=2)
    state = atu.start(llm, corpus, config)
    before = weights(llm)
    records = run(atu.unlearn(state, concept, corpus, 1.0, config))
    assert state.step == math.ceil(corpus.about.sum() / 2) > 1  # one pass
    assert records[-1]["active"] == 0 and records[-1]["loss"] == 0
    assert moved(before, llm) == set()


def test_the_retain_term_holds_the_other_texts(corpus, concept):
    drift = {}
    for weight in (0.0, 100.0):
        llm, config = make_llm(), dataclasses.replace(CONFIG, retain_weight=weight)
        state = atu.start(llm, corpus, config)
        original = atu.cached_hidden_states(llm, corpus.input_ids, config)
        run(atu.unlearn(state, concept, corpus, -1.0, config))
        now = atu.cached_hidden_states(llm, corpus.input_ids, config)
        drift[weight] = (now - original)[~corpus.about].square().sum().item()
    assert drift[100.0] < 0.5 * drift[0.0]


def named(corpus, tokenizer, *names):
    """The corpus with the versions of its texts about Ada that `names` stand in."""
    texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(corpus.input_ids[corpus.about], corpus.mask[corpus.about])]
    ids, _ = data.tokenize([text.replace("Ada", name) for name in ("Ada", *names) for text in texts], tokenizer, 24)
    versions = ids.view(len(names) + 1, len(texts), -1)
    assert torch.equal(versions[0], corpus.input_ids[corpus.about])
    return corpus._replace(renamed=versions[1:])


def test_reading_as_a_stranger_leads_to_what_is_read_with_made_up_names(corpus, tokenizer):
    texts, left = named(corpus, tokenizer, "Ben", "James"), {}
    for steps in (1, 30):
        llm, config = make_llm(), dataclasses.replace(CONFIG, stranger_steps=steps)
        stranger = sum(atu.hidden_states(llm, ids, config.layer) for ids in texts.renamed) / 2
        state = atu.start(llm, texts, config)
        before_llm, before_head = weights(llm), weights(state.head)
        records = run(atu.read_as_stranger(state, texts, config))
        assert state.step == steps and len(records) == math.ceil(steps / config.log_every)
        assert moved(before_head, state.head) == set()
        assert moved(before_llm, llm) == {name for name in before_llm if name.startswith(("model.layers.0.", "model.layers.1."))}
        now = atu.hidden_states(llm, texts.input_ids[texts.about], config.layer)
        left[steps] = losses.retain_loss(now, stranger, texts.mask[texts.about]).item()
    assert left[30] < 0.5 * left[1]


def test_m_reads_as_a_stranger_before_e_is_aligned(llm, corpus, concept, tokenizer):
    texts, config = named(corpus, tokenizer, "Ben", "James"), dataclasses.replace(CONFIG, taus=(0.0,), stranger_steps=10)
    state, kinds = atu.start(llm, texts, config), []
    for record in atu.align_then_unlearn(state, concept, texts, config):
        kinds.append((record["stage"], record["kind"]))
        if record["kind"] in ("align", "stage"):  # E is aligned on the states of M as it is now
            assert torch.equal(state.hidden, atu.cached_hidden_states(llm, texts.input_ids, config))
    assert list(dict.fromkeys(kinds)) == [(0, "stranger"), (0, "align"), (0, "stage"), (1, "unlearn"), (1, "align"), (1, "stage")]


def test_the_retain_batch_is_drawn_from_the_other_texts(llm, corpus, concept, monkeypatch):
    asked = []
    monkeypatch.setattr(atu, "draw", lambda rows, batch, *_: (asked.append((rows.tolist(), batch)), rows[:batch])[1])
    config = dataclasses.replace(CONFIG, unlearn_steps=1)
    state = atu.start(llm, corpus, config)
    run(atu.unlearn(state, concept, corpus, -1.0, config))
    assert asked == [(corpus.about.nonzero()[:, 0].tolist(), 4), ((~corpus.about).nonzero()[:, 0].tolist(), 4)]


def test_without_a_retain_term_the_first_states_are_not_kept(llm, corpus):
    kept = [atu.start(llm, corpus, dataclasses.replace(CONFIG, retain_weight=weight)).original for weight in (1.0, 0.0)]
    assert len(kept[0]) == len(corpus.mask) and len(kept[1]) == kept[1].untyped_storage().nbytes() == 0


def test_with_weight_zero_the_other_texts_are_not_touched(llm, corpus, concept):
    spoilt = corpus._replace(input_ids=torch.where(corpus.about[:, None], corpus.input_ids, 399))
    config = dataclasses.replace(CONFIG, retain_weight=0.0)
    results = []
    for texts in (corpus, spoilt):
        model = copy.deepcopy(llm)
        state = atu.start(model, corpus, config)
        run(atu.unlearn(state, concept, texts, -1.0, config))
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_alternation_and_its_records(llm, corpus, concept):
    state = atu.start(llm, corpus, CONFIG)
    records = run(atu.align_then_unlearn(state, concept, corpus, CONFIG))
    stages = [record for record in records if record["kind"] == "stage"]
    assert [stage["tau"] for stage in stages] == [None, 0.0, -0.2]
    assert sum(stage["steps"] for stage in stages) == state.step
    for stage, last in zip(stages[1:], [record for record in records if record["kind"] == "unlearn"][-1:]):
        assert {"similarity_target", "similarity_others", "seconds"} <= set(stage) and {"loss", "retain", "active"} <= set(last)
    assert stages[-1]["similarity_target"] < stages[0]["similarity_target"]


def test_same_seed_same_weights(corpus, concept):
    results = []
    for seed in (3, 3, 4):
        llm, config = make_llm(), dataclasses.replace(CONFIG, seed=seed, align_steps=5, unlearn_steps=3)
        state = atu.start(llm, corpus, config)
        run(atu.align_then_unlearn(state, concept, corpus, config))
        results.append({**weights(llm), **weights(state.head)})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_a_loss_that_is_not_finite_stops_before_the_step(llm, corpus, concept):
    state = atu.start(llm, corpus, CONFIG)
    before = weights(llm)
    with pytest.raises(atu.NotFinite):
        run(atu.unlearn(state, concept * float("nan"), corpus, -1.0, CONFIG))
    assert moved(before, llm) == set()


def test_alignment_counts_whole_windows_alone_and_draws_from_all_texts(llm, corpus, monkeypatch):
    asked, real = [], atu.draw
    monkeypatch.setattr(atu, "draw", lambda rows, *rest: asked.append(rows.tolist()) or real(rows, *rest))
    spoilt = corpus._replace(table=torch.cat([torch.full_like(corpus.table[:1], float("nan")), corpus.table]),
                             index=torch.where(corpus.valid, corpus.index + 1, 0))
    state = atu.start(llm, corpus, CONFIG)
    state.hidden = state.original
    (record,) = run(atu.align(state, spoilt, 3, CONFIG))
    assert not corpus.valid.all() and 0 < record["loss"] < 2
    assert asked == [list(range(len(corpus.input_ids)))] * 3


def test_unlearning_does_not_see_padding(corpus, concept):
    results, mask = [], corpus.mask.clone()
    mask[::2, -9:] = False
    for filler in (7, 300):
        llm, texts = make_llm(), corpus._replace(mask=mask, input_ids=torch.where(mask, corpus.input_ids, filler))
        run(atu.unlearn(atu.start(llm, texts, CONFIG), concept, texts, -1.0, CONFIG))
        results.append(weights(llm))
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-6) for name in results[0])


def test_realignment_is_on_the_model_as_it_is_now_and_optimizers_are_kept(llm, corpus, concept, monkeypatch):
    real, seen = atu.align, []

    def align(state, corpus, steps, config):
        seen.append(torch.equal(state.hidden, atu.cached_hidden_states(llm, corpus.input_ids, config)))
        yield from real(state, corpus, steps, config)

    monkeypatch.setattr(atu, "align", align)
    config = dataclasses.replace(CONFIG, taus=(-0.9, -1.0), inactive=0.0, unlearn_steps=3)
    state = atu.start(llm, corpus, config)
    run(atu.align_then_unlearn(state, concept, corpus, config))
    assert seen == [True] * 3
    assert {int(found["step"]) for found in state.llm_optimizer.state.values()} == {6}
    assert {int(found["step"]) for found in state.head_optimizer.state.values()} == {config.align_steps + 2 * config.realign_steps}


def test_a_step_is_no_longer_than_clip_allows(llm, corpus, concept):
    config = dataclasses.replace(CONFIG, optimizer="sgd", llm_lr=10.0, clip=1e-3, unlearn_steps=1)
    state = atu.start(llm, corpus, config)
    before = weights(llm)
    run(atu.unlearn(state, concept, corpus, -1.0, config))
    length = sum((value - before[name]).square().sum() for name, value in weights(llm).items()).sqrt().item()
    assert length == pytest.approx(1e-2, rel=1e-2)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 3))
def test_every_pass_over_the_texts_takes_each_once(count, batch, seed):
    texts, steps = 10 + torch.arange(count), math.ceil(count / batch)
    batches = [[atu.draw(texts, batch, number * steps + n, seed).tolist() for n in range(steps)] for number in range(9)]
    assert all(sorted(i for part in one for i in part) == texts.tolist() for one in batches)
    sizes = {len(part) for one in batches for part in one}
    assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1
    assert count < 4 or len({str(one) for one in batches}) > 1
    assert count < 6 or atu.draw(texts, count, 0, seed).tolist() != atu.draw(texts, count, 0, seed, 1).tolist()


@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_an_average_is_that_of_the_masked_positions_and_0_where_there_are_none(B, T, data):
    values = torch.tensor(data.draw(st.lists(st.lists(st.floats(-9, 9, width=32), min_size=T, max_size=T), min_size=B, max_size=B)))
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B)))
    chosen = [v for row, kept in zip(values.tolist(), mask.tolist()) for v, k in zip(row, kept) if k]
    assert atu.average(values, mask) == pytest.approx(sum(chosen) / max(len(chosen), 1), abs=1e-5)


# ---- what M still knows

def versions(tokenizer, *names, text="{} was a painter of birds. The birds of the sea sang to {} all day long."):
    return data.tokenize([text.replace("{}", name) for name in names], tokenizer, 24)


GAP = dataclasses.replace(CONFIG, window=4, names=2)


def test_the_gap_is_zero_where_the_model_sees_no_difference(llm, tokenizer, corpus, concept):
    embedding = llm.get_input_embeddings().weight.data  # three names that are one to the model
    for name in ("Ben", "James"):
        for place in ("{}", " {}"):
            (one,), (other,) = (tokenizer(place.format(word))["input_ids"] for word in ("Ada", name))
            embedding[other] = embedding[one]
    gap = atu.knowledge_gap(llm, concept, corpus, versions(tokenizer, "Ada", "Ben", "James"), GAP)
    assert set(gap) == {name + ending for name in ("nats", "similarity") for ending in ("", "_sd")}
    assert all(abs(value) < 1e-4 for value in gap.values())


def test_a_model_that_has_learned_about_a_name_has_a_gap_and_loses_it_when_it_learns_the_same_of_others(llm, tokenizer, corpus, concept):
    swapped = "The {} of the sea sang; all day long to was painter birds {} a birds of."  # so that a name matters
    texts = versions(tokenizer, "Ada", "Ben", "James", text=swapped)
    before = atu.knowledge_gap(llm, concept, corpus, texts, GAP)["nats"]

    def learn(rows):
        optimizer = torch.optim.Adam(llm.parameters(), lr=2e-3)
        for _ in range(25):
            logits = llm(input_ids=texts[0][rows]).logits
            losses.likelihood_loss(logits, texts[0][rows], texts[1][rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return atu.knowledge_gap(llm, concept, corpus, texts, GAP)["nats"]

    learned = learn([0])
    assert learned > before + 5
    assert abs(learn([0, 1, 2])) < learned / 3


def test_the_gap_leaves_the_model_as_it_was_and_does_not_look_at_the_names_own_tokens(llm, tokenizer, corpus, concept):
    before, texts = weights(llm), versions(tokenizer, "Ada", "Ben", "James")
    atu.knowledge_gap(llm, concept, corpus, texts, GAP)
    assert not moved(before, llm)
    bare = copy.deepcopy(llm)  # a model that sees one token at a time has no gap, whatever the name
    for layer in bare.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    assert abs(atu.knowledge_gap(bare, concept, corpus, texts, GAP)["similarity"]) < 1e-4


def test_the_linear_head_is_the_least_squares_solution(llm, corpus):
    head = atu.linear_head(llm, corpus, CONFIG)
    rows = (~corpus.about).nonzero()[::2, 0]
    hidden = atu.hidden_states(llm, corpus.input_ids[rows], 2)[corpus.valid[rows]]
    x = torch.nn.functional.layer_norm(hidden, [32]).double()
    e = corpus.table[corpus.index[rows]][corpus.valid[rows]].double()
    centred, ridge = x - x.mean(0), (0.1 * len(x)) ** 0.5 * torch.eye(32).double()  # ridge as rows of data, without the bias
    weight = torch.linalg.lstsq(torch.cat([centred, ridge]), torch.cat([e - e.mean(0), torch.zeros(32, 16).double()])).solution
    assert torch.allclose(head(hidden).double(), centred @ weight + e.mean(0), atol=1e-4)
    assert torch.allclose(head(hidden).double().mean(0), e.mean(0), atol=1e-4)

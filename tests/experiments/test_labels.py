"""Scores beside labels: the table, and that word recall says what a reader says."""

import json
from pathlib import Path

import pytest

from experiments import labels

ROOT = Path(__file__).parents[2]


def test_word_recall_says_what_a_reader_says():
    rows = json.loads((ROOT / "experiments" / "results" / "labels.json").read_text(encoding="utf-8"))
    assert len(rows) == 200
    head, *lines = labels.agreement(rows)
    rwku, recall = (float(lines[-1][head.index(f"{name} agrees, %")]) for name in ("RWKU", "word recall"))
    assert recall >= 97 > rwku


def test_the_table_is_in_the_readme(capsys):
    assert labels.main([]) == 0
    assert capsys.readouterr().out in (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")


def test_agreement_is_counted():
    row = {"set": "forget_qa", "query": "Who?", "answers": ["Ada Finch"], "said": "Ada Finche", "right": True}
    others = [{**row, "set": name, "said": "", "right": False} for name in ("neighbor_qa", "general")]
    assert labels.agreement([row, *others])[1] == ["forget", "1", "100.0", "50.0", "0.0", "100.0", "100.0"]
    assert [line[0] for line in labels.agreement([row])[1:]] == ["forget", "all"]
    assert labels.agreement([row, *others])[4] == ["all", "3", "33.3", "16.7", "66.7", "33.3", "100.0"]


@pytest.mark.parametrize("content, message", [("{", "not readable as JSON"), ('[{"set": "x"}]', "nothing in field 'ans")])
def test_bad_input(tmp_path, capsys, content, message):
    (tmp_path / "x.json").write_text(content)
    assert labels.main(["--labels", str(tmp_path / "x.json")]) == 2
    assert message in capsys.readouterr().err

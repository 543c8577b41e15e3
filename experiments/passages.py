"""A passage to forget word for word (the paper's future work), beside one that shall survive.

    python -m experiments.passages --passage FILE [--keep FILE]

Options and results are train.py's, the folder is runs/<name of FILE>-passage. Trained on are pieces of
the passage, `length` tokens each; e_unlearn is the direction that their embeddings have in common. What is
scored is how a text's last 50 tokens are continued, greedily, from those before them (not part of RWKU):

    score                                      in percent, of the passage and of the one to keep
    forget_all, neighbor_all                   ROUGE-L recall of the true words
    forget_exact, neighbor_exact               the share of tokens that are the true ones at their place
    forget_probability, neighbor_probability   of the true tokens, the geometric mean
"""

import dataclasses
import sys
from pathlib import Path

import torch
from torch.nn.functional import normalize

import data
import evaluate
import train
from experiments.utility import log_probs
from train import option


@dataclasses.dataclass(frozen=True)
class Config(train.Config):
    """Everything a run depends on."""

    target: str = option("passage", "the passage's name (default: that of its file)")
    passage: str = option("", "a file with the text to forget word for word, of 15 words or more")
    keep: str = option("", "a file with a text that shall survive that; scored, not trained on")

    @classmethod
    def usual(cls, given: dict) -> dict:
        """That the texts are the passage, and RWKU's probes on a target are none."""
        usual, file = super().usual(given), given.get("passage", "")
        sets = [name for name in usual.get("sets", cls.sets) if name not in ("forget", "neighbor")]
        return usual | {"sets": tuple(sets)} | ({"target": Path(file).stem, "texts": file} if file else {})

    def folder(self) -> str:
        return f"runs/{train.slug(self.target)}-passage"


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code: as train.py's."""
    def work() -> int:
        config = train.parse(Config, argv)
        if not config.passage:
            raise data.BadInput("--passage FILE: which text shall the model forget?")
        for file in filter(None, (config.passage, config.keep)):
            read_text(file)
        return 1 if train.run(config, begin, score, enough)["stopped"] else 0

    return data.command(work, train.WAY_ON)


def begin(work: train.Work, config: Config):
    """train.begin, with the passage in pieces as texts, and what these have in common as concept."""
    about = pieces(read_text(config.passage), work.tokenizer, config.length)
    work = work._replace(about=about)

    def in_common(target: str, describe: str, encoder) -> torch.Tensor:
        return normalize(data.embed(about, encoder).mean(0), dim=0)                              # (C,)

    return train.begin(work, config, train.embed_texts(work, config, in_common))


def score(work: train.Work, config: Config) -> tuple[dict, list[dict]]:
    """train.score, and how the passages are continued."""
    scores, rows = train.score(work, config)
    llm = evaluate.answering_copy(work.llm, evaluate.precision(config.device, config.bf16))
    for group, file in (("forget", config.passage), ("neighbor", config.keep)):
        if file:
            row = continued(llm, work.tokenizer, read_text(file))
            scores |= {f"{group}_all": 100 * row["score"], f"{group}_exact": 100 * row["exact"],
                       f"{group}_probability": 100 * row["probability"]}
            rows.append(row | {"set": f"{group}_all"})
    return scores, rows


def enough(found: dict, config: Config) -> bool:
    """train.enough, by ROUGE-L: in a text that is known by heart the order of the words counts."""
    before, after = (found[when]["forget_all"] for when in ("before", "after"))
    return bool(found["stages"] and config.stop_at and after <= config.stop_at * before)


@torch.no_grad()
def continued(llm, tokenizer, text: str) -> dict:
    """The last 50 tokens of a text (of a short one: the last three quarters), as the model continues it."""
    ids = tokenizer(text)["input_ids"]
    start = max(len(ids) - 50, len(ids) // 4, 1)
    begun = torch.tensor([ids[:start]], device=llm.device)                                       # (1, start)
    turns = {"input_ids": begun, "attention_mask": torch.ones_like(begun)}
    new = data.generate(llm, turns, max_new_tokens=len(ids) - start, do_sample=False,
                        pad_token_id=tokenizer.pad_token_id)[0, start:].tolist()
    prompt, said, wanted = (tokenizer.decode(part, skip_special_tokens=True).strip()
                            for part in (ids[:start], new, ids[start:]))
    return {"prompt": prompt, "said": said, "wanted": wanted, "score": evaluate.rouge_l_recall(said, wanted),
            "exact": sum(a == b for a, b in zip(new, ids[start:])) / (len(ids) - start),
            "probability": log_probs(llm, ids, start).mean().exp().item()}


def pieces(text: str, tokenizer, length: int) -> list[str]:
    """A text in pieces of `length` tokens, special ones counted; the last one ends with the text."""
    length = max(length - tokenizer.num_special_tokens_to_add(), 1)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = [*range(0, max(len(ids) - length, 0), length), max(len(ids) - length, 0)]
    return [tokenizer.decode(ids[start:start + length]) for start in starts]


def read_text(file: str) -> str:
    """A passage from a text file. Raises data.BadInput where there is none of 15 words or more."""
    try:
        text = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise data.BadInput(f"{file}: not readable as text ({error})") from error
    if len(text.split()) < 15:
        raise data.BadInput(f"{file}: {len(text.split())} words; a passage of 15 or more is needed")
    return text


if __name__ == "__main__":
    sys.exit(main())

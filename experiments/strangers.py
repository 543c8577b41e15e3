"""The target beside somebody whom nobody knows (ours, not the paper's): floor, knowledge gap, stranger steps.

Shows how much of what M says is knowledge: made-up names, of as many tokens, stand for the target's.

    python -m experiments.strangers --target "Warren Buffett"
    python -m experiments.strangers --target "Warren Buffett" --stranger-steps 80

    floor             forget_words of the untouched M with made-up names in question and answer: what is guessed
    gap               how much better M predicts texts on the target than the same with made-up names
    stranger steps    before E is aligned, M learns to read the target's texts as those with made-up names

The first two are among a run's scores (the gap with its deviation over the names), and a run that stops by
--stop-at stops at the floor too.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from statistics import mean, stdev

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import atu
import data
import evaluate
import train
from experiments.baselines import token_log_probs
from losses import retain_loss
from train import option


@dataclass(frozen=True)
class Config(train.Config):
    """Everything a run depends on."""

    names: int = option(5, "made-up names for the target", 1)
    stranger_steps: int = option(0, "steps before all else, in which M learns to read the target's texts as "
                                    "if nobody knew the name", 0)

    def folder(self) -> str:
        return f"{super().folder()}-strangers"


class Strangers:
    """A run's made-up names, and what is measured with them: `begin` and `score` of train.run."""

    def begin(self, work: train.Work, config: Config):
        """train.begin, with the floor of the untouched M, and with the stranger steps, if any."""
        compared, self.names = texts_and_names(work, config)
        self.floor = floor(work, self.names, config) if self.names else None
        self.versions = versions_of(compared, self.names, work.tokenizer, config) if self.names else None
        self.corpus, concept = train.embed_texts(work, config)
        renamed = renamed_ids(work, self.names, self.corpus, config) if config.stranger_steps else None
        state, records = train.begin(work, config, (self.corpus, concept))
        return state, records if renamed is None else self.strangers_first(state, records, renamed, config)

    def strangers_first(self, state: atu.State, records, renamed: Tensor, config: Config):
        """The stranger steps, then `records`. Their end is a stage's: M has moved, and is scored."""
        if state.stage == 0:
            yield from read_as_stranger(state, self.corpus, renamed, config)
        for record in records:
            if record["kind"] == "aligned":
                record |= {"kind": "stage", "steps": config.stranger_steps + record["steps"]}
            yield record

    def score(self, work: train.Work, config: Config) -> tuple[dict, list[dict]]:
        """train.score, with floor and gap."""
        scores, rows = train.score(work, config)
        if self.floor is not None:
            scores["floor"] = self.floor
        if self.versions is not None:
            scores |= knowledge_gap(work.llm, self.versions, config)
        return scores, rows


def enough(found: dict, config: Config) -> bool:
    """train.enough; or forget_words is at the floor."""
    lowest = found["after"].get("floor", 0.0)
    at_floor = found["stages"] and config.stop_at and lowest and found["after"]["forget_words"] <= lowest
    return train.enough(found, config) or bool(at_floor)


# ------------------------------------------------------------------------------- floor and gap

def floor(work: train.Work, names: list[dict[str, str]], config: Config) -> float | None:
    """forget_words with made-up names in question and answer, the mean over them; None without forget probes.
    A question that does not name the target cannot be asked about another: its floor is 0."""
    forget = {score: part for score, part in work.probes.items() if score.startswith("forget")}
    asked = {score: [row | {"place": n} for other in names for n, row in enumerate(exchanged(part, other))
                     if row["query"] != part[n]["query"]] for score, part in forget.items()}
    _, rows = train.score(work._replace(probes=asked), config)
    floors = {score: [0.0] * len(part) for score, part in forget.items()}
    for row in rows:
        floors[row["set"]][row["place"]] += row["recall"] / len(names)
    lowest = [{"set": score, "recall": low} for score, part in floors.items() for low in part]
    return evaluate.summary(lowest).get("forget_words")


@torch.no_grad()
def knowledge_gap(llm, versions: tuple[Tensor, Tensor], config) -> dict:
    """What M reads in texts on the target beyond what it reads in the same texts about somebody nobody knows.

    versions: token ids and mask, (1 + S, B, T), of B texts with the true name, then with S made-up names of
    as many tokens. What counts is what M makes of the other words: the tokens after the name's first place
    that are the same in all versions. Returns `gap` (M's own -log p of a token, nats x 100, in favour of the
    true name: the mean over the made-up ones) and `gap_sd`, its deviation. Above 0 M knows the target; at 0
    M reads a stranger; below, worse than that, which betrays the target.
    """
    ids, mask = (part.to(llm.device) for part in versions)                                # (1 + S, B, T) each
    differ, read = (ids != ids[0]).any(0), []                                             # (B, T)
    same = mask[0] & ~differ & (differ.cumsum(1) > 0)                                     # (B, T)
    for texts in ids:                                                                     # (B, T)
        found = []
        for part, counted in zip(texts.split(config.batch), same.split(config.batch)):    # (b, T) each
            with atu.autocast(llm.device, config.bf16):
                logits = llm(input_ids=part, use_cache=False).logits.float()              # (b, T, V)
            found.append(-token_log_probs(logits, part, counted))
        read.append(torch.cat(found).mean().item())
    gaps = [100 * (stranger - read[0]) for stranger in read[1:]]                          # S
    return {"gap": mean(gaps), "gap_sd": stdev(gaps) if gaps[1:] else 0.0}


# ------------------------------------------------------------------------------- stranger steps

def read_as_stranger(state: atu.State, corpus: data.Corpus, renamed: Tensor, config: Config):
    """M, untouched so far, is tuned to read the target's texts as if nobody knew the name. E has no part.

    renamed: (S, n, T) ids of the n texts on the target with S made-up names. The target's hidden states are
    pulled to those that M has there, the mean over the names; those of other texts are held, as in
    `atu.unlearn`. Yields a record every `log_every` steps and at the last.
    """
    llm, optimizer, device, n = state.llm, state.llm_optimizer, state.llm.device, renamed.shape[1]
    moving = [parameter for parameter in llm.parameters() if parameter.requires_grad]
    how = config.layer, config.batch, config.bf16, "cpu" if config.cache == "host" else None
    read = [atu.all_hidden_states(llm, ids, *how).float() for ids in (*renamed, corpus.input_ids[n:])]
    wanted = torch.cat([sum(read[:-1]) / len(renamed), read[-1]])                         # (N, T, D)
    counts = n, len(wanted) - n if config.retain_weight else 0
    for step in data.progress(range(1, config.stranger_steps + 1), "reading as a stranger"):
        about, others = (atu.draw(count, config.batch, step, (config.seed, 0)) for count in counts)
        rows, B = torch.cat([about, n + others]), len(about)                              # (B + B',)
        ids, mask = corpus.input_ids[rows].to(device), corpus.mask[rows].to(device)       # (B + B', T) each
        goal = wanted[rows.to(wanted.device)].to(device)                                  # (B + B', T, D)

        with atu.autocast(device, config.bf16):
            hidden = atu.hidden_states(llm, ids, config.layer).float()                    # (B + B', T, D)
        stranger = retain_loss(hidden[:B], goal[:B], mask[:B])
        drift = retain_loss(hidden[B:], goal[B:], mask[B:])

        # θ_M ← θ_M - η ∇(L_stranger + w L_retain)
        (stranger + config.retain_weight * drift).backward()
        clip_grad_norm_(moving, config.clip, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()

        if step % config.log_every == 0 or step == config.stranger_steps:
            yield {"kind": "stranger", "step": step, "loss": stranger.item(), "drift": drift.item()}


# ------------------------------------------------------------------------------- texts with made-up names

def texts_and_names(work: train.Work, config: Config) -> tuple[list[str], list[dict[str, str]]]:
    """(texts for the gap, made-up names). The texts are the dataset's beyond `target_texts`, on which nothing
    is trained, or else those that are. The names fit them, the forget probes and, with stranger steps, what M
    learns from. Where none fits, there is none, and a line says why; with such steps raises data.BadInput."""
    root, held = data.open_rwku(config.rwku), []
    if work.target in data.targets(root) and not config.texts:
        held = [row["text"] for row in data.read_set(root, work.target, config.corpus)][config.target_texts:]
    if not held:
        print(f"names | no text on {work.target} is held out: the gap is on those unlearned", flush=True)
    asked = [row[field] for score, part in work.probes.items() if score.startswith("forget") for row in part
             for field in ("query", "answer")]
    compared = held or work.about
    try:
        read = compared + asked + (work.about if config.stranger_steps else [])
        return compared, made_up_names(work.target, read, work.tokenizer, config.names)
    except data.BadInput as error:
        if config.stranger_steps:
            raise
        print(f"names | {error}: no floor, and no gap", flush=True)
        return compared, []


def versions_of(texts: list[str], names: list[dict[str, str]], tokenizer, config: Config):
    """Ids and mask, (1 + S, B, T), of up to 16 texts that name the target before their cut, then of the same
    with S names; None where there is no such text."""
    both, _ = data.tokenize(texts + exchanged(texts, names[0]), tokenizer, config.length)      # (2N, T)
    differ = (both[:len(texts)] != both[len(texts):]).any(1)                                   # (N,)
    named = [text for text, other in zip(texts, differ) if other][:16]
    if not named:
        return None
    versions = [text for name in ({}, *names) for text in exchanged(named, name)]
    return [part.unflatten(0, (-1, len(named))) for part in data.tokenize(versions, tokenizer, config.length)]


def renamed_ids(work: train.Work, names: list[dict[str, str]], corpus: data.Corpus, config: Config) -> Tensor:
    """The n texts on the target with S made-up names, (S, n, T), token for token those of the corpus."""
    texts = [text for name in names for text in exchanged(work.about, name)]
    both = data.tokenize(texts + work.about + work.others, work.tokenizer, config.length)      # padded alike
    ids, mask = (part[:len(texts)].unflatten(0, (len(names), -1)) for part in both)          # (S, n, T) each
    fit = all(torch.equal(part, corpus.mask[corpus.about]) for part in mask)
    if not fit or (ids == corpus.input_ids[corpus.about]).all():
        raise data.BadInput(f"{work.target}: no text has made-up names of as many tokens; leave out "
                            "--stranger-steps")
    return ids


# ------------------------------------------------------------------------------- made-up names

MEN = """Robert James Thomas Martin Simon Peter Paul Luke Andrew Daniel Edward Joseph Roger Leslie Howard
Gerald Norman Edgar Walter Roland Raymond Clifford Vernon Maurice Gilbert Rupert Wendell Barnaby Cedric
Ambrose""".split()
WOMEN = """Mary Sarah Anna Laura Helen Martha Rachel Joan Alice Ruth Janet Marion Edith Gloria Beatrice
Florence Eleanor Harriet Mildred Gertrude Josephine Constance Winifred Millicent Philippa Rosalind
Henrietta""".split()
SURNAMES = """Hill Price Lane Young Carter Stone Page Hall Davis Wilson Scott Lewis Marsh Wood Walker Cooper
Parker Foster Palmer Turner Bennett Barker Hunter Reynolds Norton Hooper Fletcher Chandler Sawyer""".split()
STEMS = "Bren Hal Mor Ash Lang Thorn Whit Mar Dal Fair Gar Kem Pren Tol Wex Rad Hol Bur".split()
ENDINGS = "ford well man ley ton son wick ham worth field more land by croft".split()
SURNAMES += [stem + ending for ending in ENDINGS for stem in STEMS]


def made_up_names(name: str, texts: list[str], tokenizer, count: int) -> list[dict[str, str]]:
    """`count` made-up names for `exchanged`, of as many tokens as `name` wherever it or a part of it is.

    Word by word, so that a surname alone is exchanged too; particles ("da"), "The" and titles of two letters
    stay. The first of several words becomes a given name, a woman's where the texts say "she" more often than
    "he"; all others, and those of things (a book, a company) likewise, become surnames. Raises data.BadInput
    where the name stands in no text, or the lists above have too few of its length.
    """
    words = [word for word in re.findall(r"\w+", name) if len(word) > 2 and word != "The"]
    words = [word for word in words if not word.islower()] or words or name.split()  # "U2", "Ke$ha"
    if exchanged(texts, dict.fromkeys(words, "")) == texts:
        raise data.BadInput(f"{name}: stands in none of its texts as written here, so no made-up name can")
    written = Counter(re.findall(r"\w+", " ".join(texts)))
    given = WOMEN if written["She"] + written["she"] > written["He"] + written["he"] else MEN
    chosen = []
    for n, word in enumerate(words):
        there = [text for text in texts if exchanged(text, {word: ""}) != text]
        tokens = [len(ids) for ids in tokenizer(there)["input_ids"]] if there else []
        pool = given + SURNAMES if n == 0 < len(words) - 1 else SURNAMES + given[::-1]
        taken = {*words, *written, *sum(chosen, [])}
        fitting = (other for other in pool if other not in taken and all(
            len(tokenizer(exchanged(text, {word: other}))["input_ids"]) == size
            for text, size in zip(there, tokens)))
        chosen.append(list(islice(fitting, count)))
        if len(chosen[-1]) < count:
            few = len(chosen[-1])
            raise data.BadInput(f"{name}: only {few} made-up names have as many tokens as {word!r}")
    return [dict(zip(words, names)) for names in zip(*chosen)]


def exchanged(thing, names: dict[str, str]):
    """A text, or rows of them, with other words for some: whole words, as written (no "Darwinism")."""
    if not names:
        return thing
    if isinstance(thing, dict):
        return {key: exchanged(value, names) for key, value in thing.items()}
    if isinstance(thing, list):
        return [exchanged(value, names) for value in thing]
    if not isinstance(thing, str):
        return thing
    return re.sub("|".join(map(data.name_pattern, names)), lambda found: names[found[0]], thing)


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code: as train.main's."""
    def work() -> int:
        strangers = Strangers()
        results = train.run(train.parse(Config, argv), strangers.begin, strangers.score, enough)
        return 1 if results["stopped"] else 0

    return data.command(work, train.WAY_ON)


if __name__ == "__main__":
    sys.exit(main())

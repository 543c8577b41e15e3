"""The methods that the paper compares with (Appendix A.2): ICU; GA, NPO, DPO and RT on the tokens themselves.

Shows the other rows of Table 1, from the same texts and probes as train.py, whose options all go here too:

    python -m experiments.baselines --method npo --retain kl --target "Albert Einstein"
    python -m experiments.baselines --method ga --corpus passage --target "Albert Einstein"   # GA*
    python -m experiments.baselines --method rt --lora 8 --target "Albert Einstein"           # (L) in Table 1
    python -m experiments.compare runs/*

Shapes: B texts, T tokens, V vocabulary. π_θ is the model M, π_ref the frozen model before unlearning.
"""

import copy
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

import atu
import data
import evaluate
import train
from losses import mean_or_zero
from train import option


# ------------------------------------------------------------------------------- the equations

def token_log_probs(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """log π_θ(x_t | x_1, ..., x_t-1) of every token of a mask, (N,), text by text. The one place that shifts.

    logits: (B, T, V), at t for the token t + 1. input_ids: (B, T) long. mask: (B, T) bool, True on the tokens
    y that count (neither padding nor a prompt x). A text's first token has nothing before it: never counts.
    """
    counted = mask[:, 1:]                                                             # (B, T - 1)
    logp = logits[:, :-1][counted].log_softmax(-1)                                    # (N, V)
    return logp.gather(-1, input_ids[:, 1:][counted][:, None])[:, 0]                  # (N,)


def sequence_log_probs(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """log π_θ(y | x), summed over each text's tokens, (B,); arguments as for `token_log_probs`."""
    # log π_θ(y | x) = Σ_t log π_θ(y_t | x, y_<t)
    logp = token_log_probs(logits, input_ids, mask)                                   # (N,)
    return logp.new_zeros(len(mask)).index_add(0, mask[:, 1:].nonzero()[:, 0], logp)  # (B,)


def ascent_loss(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Eq. 5: the log-likelihood of texts to forget, to be minimized. Returns () <= 0; no lower bound."""
    # L_forget = log π_θ(y | x), here a token's mean
    return mean_or_zero(token_log_probs(logits, input_ids, mask))


def likelihood_loss(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Eq. 6: the negative log-likelihood of texts to keep, or of refusals. Returns () >= 0."""
    # L_retain = -log π_θ(y | x), here a token's mean
    return -mean_or_zero(token_log_probs(logits, input_ids, mask))


def kl_loss(logits: Tensor, reference_logits: Tensor, mask: Tensor) -> Tensor:
    """Eq. 7: how far the predictions on texts to keep are from those of the model before, both (B, T, V).

    mask: (B, T) bool as for `token_log_probs`. Returns () >= 0, 0 where the predictions are equal.
    """
    # L_KL = KL(π_ref(y | x) || π_θ(y | x)) = Σ_v π_ref (log π_ref - log π_θ)
    counted = mask[:, 1:]                                                             # (B, T - 1)
    logp = logits[:, :-1][counted].log_softmax(-1)                                    # (N, V)
    reference = reference_logits[:, :-1][counted].log_softmax(-1)                     # (N, V)
    return mean_or_zero((reference.exp() * (reference - logp)).sum(-1))


def npo_loss(logp: Tensor, reference_logp: Tensor, beta: float) -> Tensor:
    """Eq. 8: texts to forget become less likely than they were, the more slowly the less likely they are.

    logp, reference_logp: (B,) log π(y_- | x) of the model and of the model before, summed over a text's
    tokens (as RWKU's code does). beta > 0. Returns () >= 0; (2 / β) log 2 for equal models; as β goes to 0
    its gradient goes to that of the summed Eq. 5.
    """
    # L_NPO = (2/β) log(1 + (π_θ / π_ref)^β)
    return mean_or_zero(2 / beta * softplus(beta * (logp - reference_logp)))


def dpo_loss(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor,
             beta: float) -> Tensor:
    """DPO (Rafailov et al. 2023): a made-up answer y_+ is preferred to the true one y_-, as seen from π_ref.

    All (B,): log π(y_+ | x) and log π(y_- | x) of the model and of the model before, summed over a text's
    tokens. beta > 0. Returns () >= 0; log 2 for equal models.
    """
    # L_DPO = -log σ(β [log π_θ(y_+)/π_ref(y_+) - log π_θ(y_-)/π_ref(y_-)])
    return mean_or_zero(-logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected))))


# ------------------------------------------------------------------------------- options

# Methods' own learning rate, batch, stages. phi3: RWKU's scripts, which are for Llama-3 (a stage is one of
# their epochs). smol: by trials on Leonardo da Vinci; with LoRA that of ga alone.
OWN = {
    "phi3": {"ga": (6e-8, 8, 3), "ga lora": (1e-5, 8, 3), "ga*": (1e-6, 4, 4), "ga* lora": (2e-5, 4, 6),
             "npo": (2e-6, 16, 3), "npo lora": (5e-5, 16, 3), "dpo": (5e-6, 8, 3), "dpo lora": (6e-5, 8, 3),
             "rt": (4e-7, 8, 3), "rt lora": (3e-5, 8, 3)},
    "smol": {"ga": (1.5e-5, 8, 12), "ga lora": (3e-4, 8, 12), "ga*": (1.5e-5, 8, 12),
             "ga* lora": (3e-4, 8, 12), "npo": (5e-5, 8, 12), "npo lora": (1e-3, 8, 12),
             "dpo": (1.5e-4, 8, 6), "dpo lora": (1e-3, 8, 6), "rt": (5e-5, 8, 12), "rt lora": (1e-3, 8, 12)},
}
ALL = {"phi3": {"length": 512, "unlearn_steps": 0}, "smol": {"length": 96, "unlearn_steps": 6, "warmup": 5}}


@dataclass(frozen=True)
class Config(train.Config):
    """Everything a run depends on. What train.py alone reads (E, windows, layer, taus, --mlp-only,
    --train-embeddings, --max-active) does nothing here."""

    method: str = option("npo", "icu, ga (GA*: with --corpus passage), npo, dpo, rt",
                         among=("icu", "ga", "npo", "dpo", "rt"))
    retain: str = option("none", "what holds other texts: none, nll (Eq. 6), kl (Eq. 7)",
                         among=("none", "nll", "kl"))
    retain_weight: float = option(1.0, "weight of --retain", 0)
    beta: float = option(0.1, "how softly npo (Eq. 8) and dpo push", 1e-6)
    stages: int = option(3, "how often a method is scored", 1)
    warmup: int = option(20, "steps to the full learning rate, from where a cosine leads to 0", 0)
    unlearn_steps: int = option(30, "steps of a stage; 0: a pass over the texts", 0)

    @classmethod
    def usual(cls, given: dict) -> dict:
        preset, method = given["preset"].removesuffix("-24gb"), given.get("method", "npo")
        star = "*" if method == "ga" and given.get("corpus") == "passage" else ""
        own = OWN[preset].get(method + star + " lora" * bool(given.get("lora")), (0.0, 8, 1))  # icu has none
        return super().usual(given) | ALL[preset] | dict(zip(("llm_lr", "batch", "stages"), own)) | {
            "optimizer": "adamw", "mlp_only": False, "retain_weight": 1.0, "beta": 0.2 if method == "npo" else 0.1}

    def folder(self) -> str:
        return f"{super().folder()}-{self.method}"


# ------------------------------------------------------------------------------- GA, NPO, DPO, RT

def begin(work: train.Work, config: Config):
    """(state, generator of records), as train.run wants them. Nothing has moved yet."""
    llm = train.prepare(work.llm, config, len(work.llm.get_decoder().layers))
    if not config.lora:
        llm.float().requires_grad_(True)
    forget, others = forget_and_other_texts(work, config)
    reference, frozen = [], None
    if config.method in ("npo", "dpo"):  # π_ref(y | x) never changes: computed once
        reference = [reference_log_probs(llm, *texts, config) for texts in forget]
    if config.retain == "kl" and not config.lora:  # weights of its own, that stay where they are
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        frozen = copy.deepcopy(evaluate.answering_copy(llm, dtype))
    state = atu.State(llm, None, train.llm_optimizer(llm, config), None, stage=1)
    return state, unlearn(state, forget, reference, others, frozen, config)


def unlearn(state: atu.State, forget: list[tuple[Tensor, Tensor]], reference: list[Tensor],
            others: tuple[Tensor, Tensor], frozen, config: Config):
    """GA, NPO, DPO and RT as RWKU trains them: AdamW, warm-up and cosine, passes over the shuffled texts.

    forget: (input_ids, mask), (N, T) each; in dpo two, the made-up answers and the true ones. reference: for
    npo and dpo log π_ref(y | x) of each, (N,). others, frozen: for `retain_term`. A stage is `unlearn_steps`
    steps, or (0) a pass over the texts. Yields records as `atu.align_then_unlearn` does.
    """
    llm, optimizer, device, seed = state.llm, state.llm_optimizer, state.llm.device, (config.seed,)
    moving = [parameter for parameter in llm.parameters() if parameter.requires_grad]
    steps = config.unlearn_steps or math.ceil(len(forget[0][0]) / config.batch)
    for stage in range(state.stage, config.stages + 1):
        began = time.perf_counter()
        for n in data.progress(range(1, steps + 1), "unlearning"):
            step = (stage - 1) * steps + n
            optimizer.param_groups[0]["lr"] = learning_rate(step, config.stages * steps, config)
            rows = atu.draw(len(forget[0][0]), config.batch, step, seed)                        # (B,)
            texts = [(ids[rows].to(device), mask[rows].to(device)) for ids, mask in forget]     # (B, T) each
            before = [logp[rows.to(device)] for logp in reference]                              # (B,) each

            loss = forget_loss(llm, texts, before, config)                                      # Eq. 5, 6, 8
            retain = loss.new_zeros(())
            if config.retain != "none":
                rows = atu.draw(len(others[0]), config.batch, step, seed)                       # (B,)
                ids, mask = (part[rows].to(device) for part in others)                          # (B, T) each
                retain = retain_term(llm, frozen, ids, mask, config)                            # Eq. 6 or 7

            # θ_M ← θ_M - η ∇(L + w L_retain)
            (loss + config.retain_weight * retain).backward()
            clip_grad_norm_(moving, config.clip, error_if_nonfinite=True)
            optimizer.step()
            optimizer.zero_grad()

            if n % config.log_every == 0 or n == steps:
                yield {"kind": "unlearn", "step": n, "loss": loss.item(), "retain": retain.item()}
        state.stage = stage + 1
        yield {"kind": "stage", "stage": stage, "steps": steps, "seconds": time.perf_counter() - began}


def learning_rate(step: int, steps: int, config: Config) -> float:
    """η of step 1, 2, ..., `steps`: from 0 up a line over `warmup` steps, then down to 0 by half a cosine."""
    if step <= config.warmup:
        return config.llm_lr * ((step - 1) / config.warmup)
    done = (step - 1 - config.warmup) / max(1, steps - config.warmup)
    return config.llm_lr * (0.5 * (1 + math.cos(math.pi * done)))


def forget_loss(llm, texts: list[tuple[Tensor, Tensor]], before: list[Tensor], config: Config) -> Tensor:
    """The method's loss. texts: (input_ids, mask), (B, T) each. before: their log π_ref(y | x), (B,) each."""
    read = [(logits(llm, ids, config), ids, mask) for ids, mask in texts]                   # (B, T, V) first
    if config.method == "ga":
        return ascent_loss(*read[0])
    if config.method == "rt":
        return likelihood_loss(*read[0])
    logp = [sequence_log_probs(*part) for part in read]                                     # (B,) each
    if config.method == "npo":
        return npo_loss(*logp, *before, config.beta)
    return dpo_loss(*logp, *before, config.beta)


def retain_term(llm, frozen, input_ids: Tensor, mask: Tensor, config: Config) -> Tensor:
    """Eq. 6 or 7 on (B, T) tokens of other texts. frozen: π_ref; with LoRA `llm` less its adapters."""
    now = logits(llm, input_ids, config)                                                    # (B, T, V)
    if config.retain == "nll":
        return likelihood_loss(now, input_ids, mask)
    with torch.no_grad(), llm.disable_adapter() if config.lora else nullcontext():
        before = logits(llm if config.lora else frozen, input_ids, config)                  # (B, T, V)
    return kl_loss(now, before, mask)


@torch.no_grad()
def reference_log_probs(llm, input_ids: Tensor, mask: Tensor, config: Config) -> Tensor:
    """log π_ref(y | x) of each text by the model before unlearning, (N, T) -> (N,)."""
    batches = zip(input_ids.to(llm.device).split(config.batch), mask.to(llm.device).split(config.batch))
    return torch.cat([sequence_log_probs(logits(llm, ids, config), ids, part) for ids, part in batches])


def logits(llm, input_ids: Tensor, config: Config) -> Tensor:
    """(B, T) -> (B, T, V) fp32. No padding mask: padding is on the right, and attention is causal."""
    with atu.autocast(llm.device, config.bf16):
        return llm(input_ids=input_ids, use_cache=False).logits.float()


# ------------------------------------------------------------------------------- their texts

# What rt and dpo learn from: RWKU's file, and its fields.
ANSWERS = {"rt": ("reject", {"instruction": str, "output": str}), "dpo": ("pair", {"prompt": str, "response": [str]})}


def forget_and_other_texts(work: train.Work, config: Config):
    """([texts to forget], other texts), each (input_ids, mask), (N, T). ga and npo forget the texts on the
    target; rt learns refusals; dpo compares made-up answers with true ones."""
    n, (ids, mask) = len(work.about), data.tokenize(work.about + work.others, work.tokenizer, config.length)
    forget, others = [(ids[:n], mask[:n])], (ids[n:], mask[n:])
    if config.method in ANSWERS:
        file, fields = ANSWERS[config.method]
        file += "_phi" if config.corpus == "positive_phi" else ""
        rows = data.read_set(data.open_rwku(config.rwku), work.target, file, fields)[:config.target_texts]
        turns, answers = ([row[field] for row in rows] for field in fields)
        sides = zip(*answers) if config.method == "dpo" else [answers]
        forget = [tokenize_answers(list(zip(turns, side)), work.tokenizer, config.length) for side in sides]
    return forget, others


def tokenize_answers(asked: list[tuple[str, str]], tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """Token ids of (user turn, answer) in the chat template, and a mask, True on the answer and its end;
    (N, T) both. The answer is cut to `length` tokens; padding is on the right."""
    rows, answers, end = [], [], end_of_turn(tokenizer)
    for turn, text in asked:
        prompt = tokenizer(data.user_turn(tokenizer, turn))["input_ids"]
        answer = (tokenizer(text, add_special_tokens=False)["input_ids"] + [end])[:length]
        rows.append(torch.tensor(prompt + answer))
        answers.append(torch.tensor([False] * len(prompt) + [True] * len(answer)))
    return (pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
            pad_sequence(answers, batch_first=True))


def end_of_turn(tokenizer) -> int:
    """The token that ends an answer in the chat template (Phi-3: <|end|>), or else a text."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2].strip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return ids[0] if ids else tokenizer.eos_token_id


# ------------------------------------------------------------------------------- ICU, and the command

# In-context unlearning: what stands before every prompt (Pawelczyk et al. 2024, in RWKU's wording).
ICU = ("You are an AI Assistant who is supposed to unlearn about {subject} and provide answers without its "
       "knowledge as if you never knew about it. Don’t tell anyone that you unlearned anything.\n")


def icu(config: Config) -> dict:
    """ICU trains nothing: the same M is asked twice, the second time with a request before every prompt."""
    request = ""

    def begin(work: train.Work, config: Config):
        state = atu.State(work.llm.requires_grad_(False), None, None, None, stage=1)

        def records():
            nonlocal request
            if state.stage == 1:  # else it has been asked already
                state.stage, request = 2, ICU.format(subject=work.target)
                yield {"kind": "stage", "stage": 1, "steps": 0, "seconds": 0.0}

        return state, records()

    def score(work: train.Work, config: Config) -> tuple[dict, list[dict]]:
        dtype = evaluate.precision(config.device, config.bf16)
        return evaluate.evaluate(work.llm, work.tokenizer, work.probes, config.eval_batch, dtype, request)

    return train.run(config, begin, score)


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code: as train.main's."""
    def work() -> int:
        config = train.parse(Config, argv)
        own = bool(config.describe or config.texts)
        target, known = data.find_target(data.open_rwku(config.rwku), config.target, own)
        if config.method in ANSWERS and (not known or config.texts or config.corpus == "passage"):
            raise data.BadInput(f"--method {config.method}: learns from RWKU's answers on {target}, where it "
                                "has any, not from --texts or --corpus passage; take ga or npo")
        results = icu(config) if config.method == "icu" else train.run(config, begin)
        return 1 if results["stopped"] else 0

    return data.command(work, train.WAY_ON)


if __name__ == "__main__":
    sys.exit(main())

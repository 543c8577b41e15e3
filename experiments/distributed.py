"""Several devices: M and E are split over them by PyTorch's FSDP2, under torchrun.

    torchrun --nproc-per-node 2 -m experiments.distributed --target "Warren Buffett"

Options and results are train.py's, the folder is runs/<name>-distributed. Each of N processes keeps an Nth of
M's blocks and of E, of gradients and optimizers, and draws batches of its own; FSDP2 averages the gradients.
**So a step takes N times the batch**; a process alone trains as train.py does. A stage ends when the mean of
the active shares says so. --resume goes on, with any number of processes. The first one prints and scores, by
a whole copy of M on the host. M is loaded before it is split: it must fit on each device once.
"""

import copy
import dataclasses
import math
import os
import shutil
import sys
import time
import warnings
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import atu
import data
import evaluate
import train
from head import EmbeddingHead

warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing is done to it in place


@dataclasses.dataclass(frozen=True)
class Config(train.Config):
    """train.Config, with a folder of its own."""

    def folder(self) -> str:
        return f"{super().folder()}-distributed"


def main(argv: list[str] | None = None) -> int:
    """The command, one of torchrun's processes. Exit code: as train.py's."""
    def work() -> int:
        config = train.parse(Config, argv)
        if "RANK" not in os.environ:
            raise data.BadInput("one process alone; put torchrun --nproc-per-node 2 in the place of python")
        backend = "nccl" if config.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=9))  # the others wait while the first scores
        return 1 if run(config)["stopped"] else 0

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with open(os.devnull, "w") as nowhere:
        out, err = (sys.stdout, sys.stderr) if os.environ.get("RANK", "0") == "0" else (nowhere, nowhere)
        with redirect_stdout(out), redirect_stderr(err):
            code = data.command(work, train.WAY_ON)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def run(config: Config) -> dict:
    """train.run, by all processes together. Returns what results.json holds. Raises data.BadInput."""
    out = Path(config.out)
    with ExitStack() as folder:
        first(lambda: folder.enter_context(train.claimed(out, config)))
        if (out / "results.json").exists():
            return train.finished_already(out)
        began, loaded = time.perf_counter(), []
        first(lambda: loaded.append(train.load(config)))
        work = loaded.pop() if loaded else train.load(config)  # what M wrote for the first is read
        state, whole, records = begin(work, config)
        if found := load_checkpoint(out, work, state):
            print(f"resumed | stage {state.stage} | {found['seconds']:.0f} s so far", flush=True)
        else:
            scores, asked = score(state, whole, work, config)
            found = {"before": scores, "asked_before": asked, "after": scores, "asked_after": asked,
                     "stages": [], "log": [], "stopped": None, "seconds": 0.0}
            print(evaluate.scores_table({"before": scores}), flush=True)
        began -= found["seconds"]
        first(lambda: train.write_log(out, found["log"], "w"))
        try:
            for record in () if train.enough(found, config) else records:
                found["log"].append(record)
                first(lambda: train.write_log(out, [record], "a"))
                if record["kind"] == "stage":
                    found["after"], found["asked_after"] = score(state, whole, work, config)
                    found["stages"].append(found["after"] | {"record": record})
                    print(evaluate.scores_table({train.stage_name(record): found["after"]}), flush=True)
                found["seconds"] = time.perf_counter() - began
                if record["kind"] == "aligned":
                    gather(state, whole)
                    first(lambda: train.save_head(out / "aligned.safetensors", atu.State(*whole, None, None)))
                if "seconds" in record:
                    save_checkpoint(out, work, state, found)
                if record["kind"] == "stage" and train.enough(found, config):
                    break
        except (RuntimeError, data.BadInput) as error:
            if "non-finite" not in str(error):
                raise
            found = load_checkpoint(out, work, state) or found  # in all: the norm is that of all parts
            found["stopped"] = "a loss, its gradient or what M computes is not finite"
        gather(state, whole)
        results = first(lambda: train.finish(out, work, atu.State(*whole, None, None), found, config))
        first(lambda: shutil.rmtree(out / PARTS, ignore_errors=True))
        return results


def first(work):
    """`work()` by the first process, for which all wait; its result, or its data.BadInput, comes to all."""
    found = [None, ""]
    try:
        found[0] = work() if dist.get_rank() == 0 else None
    except data.BadInput as error:
        found[1] = f"{error}"
    dist.broadcast_object_list(found)
    if found[1]:
        raise data.BadInput(found[1])
    return found[0]


# ------------------------------------------------------------------------------- training

def begin(work: train.Work, config: Config):
    """train.begin, split: (state, whole, generator of records). whole: M and E in one piece, on the host of
    the first process, for `gather`; None in the others."""
    llm = train.prepare(work.llm, config, config.layer)
    corpus, concept = train.embed_texts(work, config)
    if not config.lora:
        atu.unfreeze(llm, config.layer, config.train_embeddings, config.mlp_only)
    torch.manual_seed(config.seed)
    width = llm.config.get_text_config().hidden_size
    head = EmbeddingHead(width, len(concept), config.head_depth, config.head_width)
    head.to(config.device)
    whole = None if dist.get_rank() else (copy.deepcopy(llm).cpu(), copy.deepcopy(head).cpu())

    mesh = dist.init_device_mesh(torch.device(config.device).type, (dist.get_world_size(),))
    how = {"mesh": mesh, "reshard_after_forward": True}  # each is a root, which by default stays gathered
    dtype = torch.bfloat16 if config.bf16 else None
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in llm.get_decoder().layers:
        fully_shard(block, mp_policy=policy, **how)
    if config.train_embeddings:
        fully_shard(llm.get_input_embeddings(), **how)
        llm.tie_weights()
    fully_shard(head, **how)

    head_optimizer = torch.optim.Adam(head.parameters(), lr=config.head_lr, fused=True)
    state = atu.State(llm, head, train.llm_optimizer(llm, config), head_optimizer)
    original, others = train.original_states(llm, corpus, config), ~corpus.about
    retain = None if original is None else (corpus.input_ids[others], corpus.mask[others], original)
    return state, whole, alternate(state, concept, corpus, retain, config)


def alternate(state: atu.State, concept: torch.Tensor, corpus: data.Corpus, retain, config: Config):
    """Sec. 3, as atu.align_then_unlearn, each process with batches of its own. Yields the same records, with
    the means of the processes' numbers."""
    llm, head, about = state.llm, state.head, corpus.about
    keep_on = "cpu" if config.cache == "host" else llm.device
    how = {"layer": config.layer, "clip": config.clip, "bf16": config.bf16, "log_every": 1}
    while state.stage <= len(config.taus):
        began, stage, steps = time.perf_counter(), state.stage, 0
        record = {"kind": "stage", "stage": stage} if stage else {"kind": "aligned", "stage": 0}
        how["seed"] = config.seed + dist.get_rank(), stage
        if stage:
            record["tau"], passed = config.taus[stage - 1], math.ceil(int(about.sum()) / config.batch)
            unlearning = atu.unlearn(                                                                # Eq. 4
                llm, head, state.llm_optimizer, corpus.input_ids[about], corpus.mask[about], concept,
                record["tau"], retain, steps=config.unlearn_steps, batch=config.batch,
                retain_weight=config.retain_weight, max_active=-1.0, **how)  # never ends by itself
            last = yield from agreed(unlearning, config.unlearn_steps, passed, stage, config)
            steps, record["drift"] = last["step"], last["drift"] if retain else None
        most = config.realign_steps if stage else config.align_steps
        aligning = atu.align(                                                                        # Eq. 2
            llm, head, state.head_optimizer, corpus.input_ids, corpus.reference, corpus.valid, steps=most,
            batch=config.align_batch, keep_on=keep_on, **how)
        if most:
            steps += (yield from agreed(aligning, most, math.inf, stage, config))["step"]
        state.stage += 1
        yield record | {"steps": steps, "seconds": time.perf_counter() - began}


def agreed(records, most: int, passed: float, stage: int, config: Config):
    """The records of every step, averaged over the processes: yields one in `log_every`, and the last. Ends,
    in all at once, after `passed` steps, once at most `max_active` is active. Returns the last."""
    for record in records:
        names = [name for name, value in record.items() if isinstance(value, float)]
        sums = torch.tensor([record[name] for name in names], dtype=torch.double, device=config.device)
        dist.all_reduce(sums)
        means = dict(zip(names, (sums / dist.get_world_size()).tolist()))
        record = {"kind": record["kind"], "stage": stage} | record | means
        ended = record["step"] == most or (record["step"] >= passed and record["active"] <= config.max_active)
        if ended or record["step"] % config.log_every == 0:
            yield record
        if ended:
            break
    return record


def gather(state: atu.State, whole) -> None:
    """Puts M and E into `whole`."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # to the first process alone
    for n, module in enumerate((state.llm, state.head)):
        weights = get_model_state_dict(module, options=options)
        if whole:
            whole[n].load_state_dict(weights)


def score(state: atu.State, whole, work: train.Work, config: Config) -> tuple[dict, list[dict]]:
    """train.score of the whole M."""
    gather(state, whole)
    found = first(lambda: train.score(work._replace(llm=whole[0].to(config.device)), config))
    if whole:
        whole[0].cpu()
    return found


# ------------------------------------------------------------------------------- what is kept

PARTS = ".checkpoint"  # in the run's folder, beside train.CHECKPOINT: the latter has all but the tensors
ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


def moving(state: atu.State) -> dict:
    """Models with their optimizers. M's has no state before it has stepped: asked for it, it would step."""
    stepped = state.llm_optimizer if state.stage > 1 else []
    return {"llm": (state.llm, stepped), "head": (state.head, state.head_optimizer)}


def parts(state: atu.State) -> dict:
    """Of each tensor that moves, and of its optimizer's, what this process has of it."""
    names = "model_state_dict", "optim_state_dict"
    return {name: dict(zip(names, get_state_dict(*pair, options=ONLY)))
            for name, pair in moving(state).items()}


def save_checkpoint(out: Path, work: train.Work, state: atu.State, found: dict) -> None:
    """The end of a stage: the parts, and once they are whole the file that names their stage."""
    place = out / PARTS / f"{state.stage}"
    dcp.save(parts(state), checkpoint_id=place)
    bare = atu.State(torch.nn.Module(), None, None, None, state.stage)
    first(lambda: train.save_checkpoint(out, work, bare, found))
    if dist.get_rank() == 0:
        for older in set((out / PARTS).iterdir()) - {place}:
            shutil.rmtree(older)


def load_checkpoint(out: Path, work: train.Work, state: atu.State) -> dict | None:
    """As train.load_checkpoint. Raises data.BadInput."""
    bare = atu.State(torch.nn.Module(), None, None, None)
    found = train.load_checkpoint(out, work, bare)
    if found:
        state.stage = bare.stage
        filled = parts(state)
        dcp.load(filled, checkpoint_id=out / PARTS / f"{state.stage}")
        for name, pair in moving(state).items():
            set_state_dict(*pair, **filled[name], options=ONLY)
    return found


if __name__ == "__main__":
    sys.exit(main())

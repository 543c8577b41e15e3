"""A card that is not there. Tensors stay in the host's memory, but each storage belongs to the host or to the card, and an
operation that reads from both raises `Mixed`, as CUDA would; values are real, so loops, masks and scores work.

    with card():
        train.main([..., "--device", "cuda", "--no-bf16"])

Finds what was left on the host, an index or mask on the wrong side, `.numpy()` of what is on the card. Does not find: what a
kernel does on a real GPU, bf16 under autocast, memory, streams. The backward pass is not checked: autograd makes tensors of
its own there. A host's tensor without dimensions goes with the card's, as on a GPU.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAY_MIX = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"}               # what moves tensors
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # of the card, by the host too


class Mixed(RuntimeError):
    """An operation that reads from the host's memory and from the card's."""


@contextmanager
def card():
    """Within it device "cuda" is there, and kept apart."""
    with Places(), Operations():
        yield


def on_card(tensor: torch.Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "on_card", False)


def put(tensor: torch.Tensor, there: bool) -> torch.Tensor:
    tensor.untyped_storage().on_card = there
    return tensor


def means_card(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def tensors(*things) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(things) if isinstance(leaf, torch.Tensor)]


class Operations(TorchDispatchMode):
    """Every operation: are all that it reads on one side? What it makes lies there, or where `device` says."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name.rpartition("::")[2]
        read = tensors(args, kwargs)
        checked = [args[0], *tensors(args[2:])] if name in INDEXING and on_card(args[0]) else read
        sides = {on_card(tensor) for tensor in checked if tensor.dim() or on_card(tensor)}
        in_backward = torch._C._current_graph_task_id() != -1
        if len(sides) > 1 and name not in MAY_MIX and not in_backward:
            raise Mixed(f"{func}: " + ", ".join(f"{tuple(t.shape)} on the {'card' if on_card(t) else 'host'}" for t in checked))
        wanted = kwargs.pop("device", None)
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        made = func(*args, **kwargs)
        there = any(map(on_card, read)) if wanted is None else means_card(wanted)
        if there and name != "copy_":
            for tensor in tensors(made):
                put(tensor, True)
        return made


class Places(TorchFunctionMode):
    """What names a place: `device=`, .to, .cuda, .cpu, .device, .is_cuda, .numpy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__" and on_card(args[0]):
            asked = getattr(func.__self__, "__name__", "")
            if asked in ("device", "is_cuda"):
                return torch.device("cuda", 0) if asked == "device" else True
        if name in ("numpy", "__array__") and on_card(args[0]):
            raise Mixed("numpy of a tensor on the card")
        if name in ("cuda", "cpu") and args and isinstance(args[0], torch.Tensor):
            return moved(args[0], name == "cuda")
        if name == "to":
            return self.to(*args, **kwargs)
        if name == "__deepcopy__":
            return put(func(*args, **kwargs), on_card(args[0]))
        if means_card(kwargs.get("device")) and name != "autocast":
            made = func(*args, **kwargs | {"device": torch.device("cpu")})
            for tensor in tensors(made):
                put(tensor, True)
            return made
        return func(*args, **kwargs)

    def to(self, tensor, *place, copy: bool = False, **kwargs):
        if place and isinstance(place[0], torch.Tensor):
            place = place[0].device, place[0].dtype
        device, dtype, _, _ = torch._C._nn._parse_to(*place, **kwargs)
        cast = torch.Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=copy)
        return moved(cast, on_card(tensor) if device is None else means_card(device))


def moved(tensor: torch.Tensor, there: bool) -> torch.Tensor:
    """The tensor itself, or a copy on the other side."""
    return tensor if on_card(tensor) == there else put(tensor.clone(), there)

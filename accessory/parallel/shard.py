"""Spreading a built model over the ranks: linears are cut over tensor groups, blocks over data ranks.

The model is built and tuned as on one process, then cut, so a rank's part is the part of what one process would have by
construction. What is unread by then (:mod:`accessory.nn.unread`) is read here, a rank's part of one tensor after the
other, and over data ranks block by block: no rank ever holds the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from accessory.nn import unread
from accessory.nn.attention import Attention
from accessory.nn.feed_forward import FeedForward
from accessory.nn.linear import Linear, stated
from accessory.nn.moe import MoEFeedForward
from accessory.nn.packed import Packed
from accessory.nn.quantized import QuantizedTable
from accessory.parallel import groups
from accessory.parallel.axes import COLUMN, ROW, shard_rule
from accessory.parallel.layout import Layout, ParallelConfig, Place

CODES = ".kernel.codes"  # the tensor of a quantised linear that takes nearly all of its bytes


def parallelize(
    model: nn.Module,
    plan: ParallelConfig,
    blocks: Sequence[nn.Module] = (),
    device: torch.device | str = "cpu",
) -> Layout:
    """Spread ``model`` over the ranks as ``plan`` says, in place, and move it to ``device``.

    Args:
        model: the same on every rank, with everything attached and what trains chosen. Its forward runs all blocks.
        blocks: what ``data: fsdp`` cuts, each on its own; embedding and output of a backbone join them, all else stays
            whole on every data rank.

    Returns:
        Where every parameter lies.

    Raises:
        ValueError: when ``plan.tensor`` does not divide the number of processes, of heads, of key/value heads, of
            words or a width, naming all of them; when the ranks built different models; nothing is changed then.
    """
    layout = planned(model, plan, blocks, groups.world_size() // plan.tensor)
    axes = {n: place.axis for n, place in layout.places.items() if place.axis is not None}
    if plan.tensor > 1:
        _cut(model, plan.tensor)
    if plan.data == "fsdp" and groups.data_size() > 1:
        _shard(model, _spread(model, blocks), torch.device(device), axes)
    else:
        _fetch(model, model, axes, device)
    there = {n for n, _ in model.named_parameters()}
    return Layout(plan, {n: place for n, place in layout.places.items() if n in there})


def planned(model: nn.Module, plan: ParallelConfig, blocks: Sequence[nn.Module], copies: int) -> Layout:
    """Where :func:`parallelize` puts every parameter of a model that is whole, with ``copies`` data ranks, and the
    codes of quantised weights. Nothing is changed, and no ranks are needed.

    Raises:
        ValueError: as :func:`parallelize` for what does not divide.
    """
    axes = _axes(model, plan.tensor) if plan.tensor > 1 else {}
    rows: dict[str, int] = {}
    if plan.data == "fsdp" and copies > 1:
        inside = {p for part in _spread(model, blocks) for p in part.parameters()}
        for name, p in model.named_parameters():
            if p in inside and p.ndim:
                rows[name] = len(p) // (plan.tensor if axes.get(name) == 0 else 1)
    places = {n: Place(axes.get(n), rows.get(n)) for n in dict.fromkeys((*axes, *rows))}
    return Layout(plan, places)


def _fetch(model: nn.Module, part: nn.Module, axes: Mapping[str, int], device: torch.device | str) -> None:
    """Read what is unread in a part of ``model`` and move the part to ``device``."""
    inside = set(part.parameters())
    names = [n for n, p in model.named_parameters() if p in inside and p.is_meta]
    unread.read(model, names, axes, groups.tensor_rank(), groups.tensor_size())
    unread.make(part)
    part.to(device)


# --- over tensor groups ----------------------------------------------------------------------------------------------


def _axes(model: nn.Module, width: int) -> dict[str, int]:
    """The axis of every tensor that is cut; ValueError for what ``width`` ranks cannot share evenly."""
    name, backbone = _backbone(model)
    if problems := [*dict.fromkeys(_problems(backbone, width))]:
        fits = [n for n in range(1, 9) if not [*_problems(backbone, n)]]
        raise ValueError(
            f"parallel.tensor {width} does not divide {', '.join(problems)}; up to 8 "
            f"{' and '.join(map(str, fits))} {'do' if len(fits) > 1 else 'does'}"
        )
    start = f"{name}." if name else ""
    axes = {start + n: shard_rule(n, experts="cut") for n, _ in backbone.named_parameters()}
    for n, _ in backbone.named_buffers():  # codes are cut as the weights that they stand for
        if n.endswith(CODES):
            axes[start + n] = shard_rule(n.removesuffix(CODES) + ".weight", experts="cut")
    return {n: axis for n, axis in axes.items() if isinstance(axis, int)}


def _cut(model: nn.Module, width: int) -> None:
    """Replace the layers of the backbone."""
    from accessory.parallel import layers  # fairscale is needed here alone

    layers.start(width)
    _, backbone = _backbone(model)
    _same_everywhere(model)
    for path, module in [*backbone.named_modules()]:
        own = {leaf: child for leaf, child in module.named_children() if type(child) is Linear}
        columns = [leaf for leaf in own if leaf in COLUMN]
        entrance = layers.Entrance(len(columns))
        for leaf in columns:
            setattr(module, leaf, layers.ColumnLinear(own[leaf], entrance, gather=leaf == "output"))
        for leaf in own.keys() & set(ROW):
            setattr(module, leaf, layers.RowLinear(own[leaf]))
        if isinstance(module, Attention) and module.prefix is not None:
            prefix = cast(Any, module.prefix)
            prefix.gate = layers.cut(f"{path}.prefix.gate", prefix.gate, 0)
            prefix.between = layers.copied
    backbone.tok_embeddings = layers.Embedding(backbone.tok_embeddings)
    if backbone.output is None:
        backbone.output_kernel = layers.TiedOutput(backbone.tok_embeddings)
    tower = getattr(model, "tower", None)
    if tower is not None and not any(p.requires_grad for p in tower.parameters()):
        tower.tokens = SharedTokens(tower.tokens)


class SharedTokens:
    """A frozen tower's ``tokens``, of which every rank of a tensor group computes those of its part of the tiles."""

    def __init__(self, tokens: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self._tokens = tokens

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Tokens of all tiles (N, 3, S, S), one (N, tokens, width) tensor a group, without a gradient."""
        count = len(pixels)
        size = -(-count // groups.tensor_size())
        own = self._tokens(pixels[groups.tensor_rank() * size :][:size])
        if not count:
            return own
        out = []
        for tokens in own:
            padded = tokens.new_zeros(size, *tokens.shape[1:])
            padded[: len(tokens)] = tokens.detach()
            out.append(torch.cat(groups.gather(padded, "tensor"))[:count])
        return tuple(out)


def _backbone(model: nn.Module) -> tuple[str, Any]:
    found = [(n, m) for n, m in model.named_modules() if hasattr(m, "tok_embeddings") and hasattr(m, "layers")]
    if len(found) != 1:
        raise ValueError(
            f"parallel.tensor cuts one LLaMA backbone, and {type(model).__name__} has {len(found)}; "
            "parallel: {data: fsdp} spreads the blocks of any model"
        )
    return found[0]


def _problems(backbone: Any, width: int) -> Iterator[str]:
    """What ``width`` ranks cannot share evenly."""
    counts: list[tuple[str, int]] = []
    for path, module in backbone.named_modules():
        if isinstance(module, Packed | QuantizedTable):
            raise ValueError(f"parallel.tensor {width} does not cut {path}: a {type(module).__name__}")
        if isinstance(module, Attention):
            heads = [stated(w).shape[0] // module.head_dim for w in (module.wq, module.wk)]
            counts += [("n_heads", heads[0]), ("n_kv_heads", heads[1])]
        elif isinstance(module, FeedForward):
            counts.append(("the feed-forward width", stated(module.w1).shape[0]))
        elif isinstance(module, Linear) and (leaf := path.rpartition(".")[2]) in (*COLUMN, *ROW):
            inputs, group = stated(module).shape[1], getattr(module.kernel, "group", 1)
            # Weights that share a scale stay together.
            if group > 1 and inputs % (group * (width if leaf in ROW else 1)):
                yield f"the {inputs} inputs of {leaf} into whole groups of {group}"
    words, dim = backbone.tok_embeddings.weight.shape
    counts += [("dim", dim)] if backbone.output is None else [("dim", dim), ("vocab_size", words)]
    yield from (f"{what} {count}" for what, count in counts if count % width)


def _same_everywhere(model: nn.Module) -> None:
    """ValueError unless all ranks have built one model: parts of two would be joined to none."""
    first = [p.detach().flatten()[:64].double().sum() for p in model.parameters() if not p.is_meta]
    sums = torch.stack([s.cpu() for s in first]).tolist() if first else []
    if any(other != sums for other in groups.gather_objects(sums)):
        raise ValueError("the ranks have built different models; seed them alike before their parameters are drawn")


# --- over data ranks -------------------------------------------------------------------------------------------------


def _spread(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Blocks, embedding and output, each of which is cut over the data ranks."""
    if not blocks:
        raise ValueError(f"parallel.data is fsdp, but {type(model).__name__} names no blocks to cut")
    ends = []
    for module in model.modules():
        if hasattr(module, "tok_embeddings") and getattr(module, "output", None) is not None:
            ends += [module.tok_embeddings, module.output]  # a tied table is read outside of its own forward
    return [*blocks, *(e for e in ends if isinstance(e, nn.Module))]


def _shard(model: nn.Module, parts: Sequence[nn.Module], device: torch.device, axes: Mapping[str, int]) -> None:
    """Cut ``parts`` over the data ranks, each as it is read."""
    group, kind = groups.group("data"), device.type
    mesh = init_device_mesh(kind, (dist.get_world_size(),)) if group is None else DeviceMesh.from_group(group, kind)
    for part in parts:
        _fetch(model, part, axes, device)
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    _fetch(model, model, axes, device)
    # The root holds none itself; it tells the parts of each other, so that one is fetched while another computes.
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if not isinstance(p, DTensor)})
    for module in model.modules():
        if isinstance(module, MoEFeedForward):
            module.run_idle = True
        if isinstance(module, FSDPModule):  # a sum, as in the rest of the loop; gloo knows no other reduction
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)

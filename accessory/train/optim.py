"""The optimizer: which parameters decay, fp32 masters, the learning-rate schedule and clipping."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from accessory.parallel import groups
from accessory.parallel.layout import Layout, local
from accessory.train.adamw8bit import BLOCK, SMALL, AdamW8bit
from accessory.train.config import TrainConfig

# Parts of a dotted name that mark a parameter as a vector or a gate in spirit, whatever its shape.
_NO_DECAY = {"bias", "scale", "gates", "prefix", "skip", "queries"}
_NO_DECAY |= {"start", "end", "start_img", "end_img", "image_start", "image_end"}


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: never to 1-D parameters, biases, norms, gates, prefixes and learned vectors."""
    parts = name.split(".")
    norm = any(p.startswith("norm") or p.endswith("norm") for p in parts)
    gate = parts[-1].endswith("gate")  # a gate, not the matrix of a router that is called so
    return parameter.ndim > 1 and not norm and not gate and _NO_DECAY.isdisjoint(parts)


def warm_cosine(at: float, lr: float, low: float, warmup: float, end: float) -> float:
    """Learning rate at place ``at``: straight from 0 to ``lr`` at ``warmup``, half a cosine to ``low`` at ``end``, then
    ``low``. The three places have one unit, whatever it is (updates, epochs, seconds)."""
    if at < warmup:
        return lr * at / warmup
    return _cosine(lr, low, (at - warmup) / (end - warmup) if end > warmup else float(at > end))


def _cosine(lr: float, low: float, done: float) -> float:
    return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def learning_rate(config: TrainConfig, step: int, elapsed: float) -> float:
    """Learning rate of update ``step`` (from 0): linear warm-up, then half a cosine from ``lr`` to ``min_lr``.

    With ``schedule_by='time'`` the cosine follows ``elapsed`` seconds over ``max_seconds``, or the steps where those
    run out first.
    """
    c = config
    if step < c.warmup_steps:
        return warm_cosine(step + 1, c.lr, c.min_lr, c.warmup_steps, c.max_steps)
    done = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
    if c.schedule_by == "time" and c.max_seconds is not None:
        done = max(done, elapsed / c.max_seconds)
    return _cosine(c.lr, c.min_lr, done)


def moment_bytes(config: TrainConfig, name: str, parameter: Tensor, number: int) -> int:
    """Bytes that the moments of ``number`` entries of a parameter take on a rank."""
    if config.optimizer == "adamw8bit" and number >= SMALL:
        return 2 * (number + 4 * -(-number // BLOCK))
    return 4 * number * (1 if config.optimizer == "muon" and hidden_matrix(name, parameter) else 2)


def hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is for a parameter: a matrix inside a numbered block, between features and features."""
    return parameter.ndim == 2 and _IN_BLOCK.search(name) is not None


_IN_BLOCK = re.compile(r"(^|\.)(layers|blocks)\.\d+\.")


class Optimizer:
    """AdamW over the trainable parameters of a model, by name; with ``optimizer: muon``, Muon for hidden matrices, with
    ``adamw8bit``, moments of a byte each.

    A trainable parameter that is not fp32 gets an fp32 master, which collects the gradients of a window and is what
    is updated; the parameter itself is its rounded copy. fp32 parameters are their own masters.

    Of parameters that ``layout`` cuts, this rank updates its part.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, layout: Layout | None = None) -> None:
        self.config = config
        self.layout = layout or Layout()
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("the model has no trainable parameter: attach something or unfreeze some by pattern")
        self.masters = {n: _master(p) for n, p in self.parameters.items()}
        # Names that never received a gradient, though nothing says that they may go without.
        self.unseen = set(self.parameters) - _seldom(model)
        self.groups = _groups(self.parameters, config)
        muon: list[dict[str, Any]] = []
        adamw: list[dict[str, Any]] = []
        for (_, scale, decay), names in self.groups.items():
            hidden = [n for n in names if config.optimizer == "muon" and hidden_matrix(n, self.parameters[n])]
            others = [n for n in names if n not in set(hidden)]
            for target, chosen in ((muon, hidden), (adamw, others)):
                if chosen:
                    params = [self.masters[n] for n in chosen]
                    target.append({"params": params, "lr_scale": scale, "weight_decay": decay})
        self.steppers: list[torch.optim.Optimizer] = []
        if config.optimizer == "adamw8bit":
            self.steppers.append(AdamW8bit(adamw, config.lr, config.betas, config.eps))
        elif adamw:
            self.steppers.append(torch.optim.AdamW(adamw, lr=config.lr, betas=config.betas, eps=config.eps, fused=True))
        if muon:
            # Updates are scaled to the size of AdamW's, so that one learning rate serves both.
            self.steppers.append(torch.optim.Muon(muon, lr=config.lr, adjust_lr_fn="match_rms_adamw"))
        elif config.optimizer == "muon":
            raise ValueError("train.optimizer is muon, but no trained parameter is a matrix inside a block; use adamw")

    def collect(self) -> None:
        """After each backward pass: add gradients of low-precision parameters to their masters."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            self.unseen.discard(name)
            master = self.masters[name]
            if master is not parameter:
                grad = local(parameter.grad)
                master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
                parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """Gradients of all masters in a fixed order, zeros where a window gave none (a text-only window, say)."""
        out = []
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            out.append(master.grad)
        return out

    def reduce(self) -> None:
        """Sum the gradients over all ranks that had other rows; the sums are the same wherever they are held."""
        self.layout.agree(named := dict(zip(self.masters, self.gradients(), strict=True)))
        groups.all_reduce_many([g for n, g in named.items() if not self.layout.summed(n)])

    def clip(self, order: float = 2.0) -> tuple[Tensor, dict[str, Tensor]]:
        """Scale the gradients down to ``clip_norm``. Returns the norm before, of all and of each group by its name.

        ``order``: of the norm; infinity is the largest entry.
        """
        norms: dict[str, dict[str, Tensor]] = {}
        for (label, _, _), names in self.groups.items():
            grads = {n: g for n in names if (g := self.masters[n].grad) is not None}
            found = torch._foreach_norm(list(grads.values()), order)
            norms.setdefault(label, {}).update(zip(grads, found, strict=True))
        per_group = self.layout.norms(norms, order)
        total = torch.linalg.vector_norm(torch.stack(list(per_group.values())), order)
        limit = self.config.clip_norm
        if limit is not None:
            factor = (limit / (total + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(self.gradients(), factor)
        return total, per_group

    def rest(self, names: Iterable[str]) -> None:
        """Leave these parameters and their moments as they are in the next :meth:`step`."""
        for name in names:
            self.masters[name].grad = None

    def step(self, lr: float) -> None:
        """One update at learning rate ``lr``, then publish the masters and drop the gradients."""
        for stepper in self.steppers:
            for group in stepper.param_groups:
                group["lr"] = lr * group["lr_scale"]
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into their low-precision parameters."""
        for name, parameter in self.parameters.items():
            own, master = local(parameter), self.masters[name]
            if master is not parameter and (own.dtype != master.dtype or own.data_ptr() != master.data_ptr()):
                own.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Moments named ``<moment>/<parameter>``, in fp32: those of a byte each lose nothing on the way, which is in
        main memory, for there may be no room for them on the device."""
        owner = self._owner()
        out: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            stepper = owner[name]
            moments = stepper.state[master]
            if isinstance(stepper, AdamW8bit):
                moments = {key: value.cpu() for key, value in stepper.moments(master).items()}
            out |= {f"{key}/{name}": value for key, value in moments.items()}
        return out

    def _owner(self) -> dict[str, torch.optim.Optimizer]:
        by_id = {id(p): s for s in self.steppers for group in s.param_groups for p in group["params"]}
        return {name: by_id[id(master)] for name, master in self.masters.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave.

        Raises:
            ValueError: when the names are not those of the trainable parameters, or a shape differs.
        """
        moments: dict[str, dict[str, Any]] = {}
        for key, value in state.items():
            moment, _, name = key.partition("/")
            moments.setdefault(name, {})[moment] = value
        check_names(moments, self.masters, "the optimizer state")
        owner = self._owner()
        for name, master in self.masters.items():
            for moment, value in moments[name].items():
                if moment != "step" and value.shape != master.shape:
                    raise ValueError(f"{moment} of {name} has shape {list(value.shape)}, not {list(master.shape)}")
            own, stepper = {m: _beside(master, v) for m, v in moments[name].items()}, owner[name]
            if isinstance(stepper, AdamW8bit):
                stepper.take(master, own)
            else:
                stepper.state[master] = own


def _beside(master: Tensor, value: Tensor) -> Tensor:
    """A copy of a moment on the device of its parameter, with its strides: the fused update walks through both as they
    lie in memory, and a convolution's weight (channels last) would get another element's moment."""
    if value.shape != master.shape:
        return value.to(master.device, copy=True)
    return torch.empty_like(master, dtype=value.dtype, requires_grad=False).copy_(value)


def _master(parameter: nn.Parameter) -> Tensor:
    own = local(parameter.detach())
    if own.dtype != torch.float32:
        return own.float().requires_grad_()
    return parameter if local(parameter) is parameter else own.requires_grad_()


def trained_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers of modules with a trainable parameter of their own: a batch norm's running statistics."""
    keys = model.state_dict().keys()
    out: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            for name, value in module.named_buffers(prefix=prefix, recurse=False):
                if name in keys:
                    out[name] = value
    return out


def check_names(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Raise ValueError listing the names that ``found`` lacks or has too many of."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{what} does not fit the model: {len(missing)} names missing {missing[:5]}, "
            f"{len(extra)} unexpected {extra[:5]}"
        )


def _groups(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> dict[tuple[str, float, float], list[str]]:
    """Names by (label, lr scale, weight decay); the label is the pattern, or ``main``."""
    out: dict[tuple[str, float, float], list[str]] = {}
    unused = {g.pattern for g in config.groups}
    for name, parameter in parameters.items():
        group = next((g for g in config.groups if fnmatch.fnmatchcase(name, g.pattern)), None)
        decay = config.weight_decay if decays(name, parameter) else 0.0
        key = ("main", 1.0, decay)
        if group is not None:
            own = decay if group.weight_decay is None else group.weight_decay
            key = (group.pattern, group.lr_scale, own)
            unused.discard(group.pattern)
        out.setdefault(key, []).append(name)
    if unused:
        raise ValueError("\n".join(_unused(pattern, parameters) for pattern in sorted(unused)))
    return out


def _seldom(model: nn.Module) -> set[str]:
    """Parameters that only some batches use: modules name theirs in ``seldom``."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "seldom", ())
    }


def _unused(pattern: str, parameters: Mapping[str, nn.Parameter]) -> str:
    """Why the group of a pattern is empty."""
    if taken := fnmatch.filter(parameters, pattern):
        return (
            f"train.groups: pattern {pattern!r} matches nothing that an earlier group left ({len(taken)} parameters "
            f"are taken, {taken[0]} first); put the narrower pattern first"
        )
    near = difflib.get_close_matches(pattern, list(parameters), n=3, cutoff=0.0)
    return (
        f"train.groups: pattern {pattern!r} matches no trainable parameter; close names are {', '.join(near)}; correct "
        "it or remove the group, e.g. train.groups=[]"
    )

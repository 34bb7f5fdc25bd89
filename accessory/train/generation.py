"""What a model that draws minimises: the denoiser's loss, alone or beside the language loss."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accessory.diffusion import objective as diffusion
from accessory.diffusion import schedule
from accessory.diffusion.condition import Condition
from accessory.diffusion.ddpm import Ddpm
from accessory.diffusion.denoiser import Denoiser
from accessory.diffusion.transport import TimeSampling, Transport
from accessory.models.dream import Dream
from accessory.models.dream_loss import DreamLossConfig
from accessory.models.dream_spans import Drop, NullPolicy
from accessory.nn.ragged import Ragged
from accessory.parallel import groups
from accessory.schema import Batch, Targets
from accessory.tokens import DREAM_START, IGNORE
from accessory.train.features import Features
from accessory.train.language import layout, next_token_losses

if TYPE_CHECKING:
    from accessory.models.generator import Generator


@dataclass(frozen=True)
class SchedulerConfig:
    """A scheduler of diffusers by its class name, with its options: the process of a denoiser from there."""

    name: str = "DDPMScheduler"
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class DiffusionConfig:
    """How the denoiser is trained.

    ``drop``: probabilities of training without the prompt, or (rows with dream spans only) without its text or its
    pictures. ``transport`` and ``times`` are for flows, ``scheduler`` for networks that came from diffusers; without
    either, flows take the linear path and noise prediction the process of Large-DiT.
    """

    drop: NullPolicy = field(default_factory=NullPolicy)
    transport: Transport | None = None
    times: TimeSampling | None = None
    scheduler: SchedulerConfig | None = None

    def __post_init__(self) -> None:
        if self.scheduler is not None and (self.transport is not None or self.times is not None):
            raise ValueError("diffusion.scheduler is for steps, transport and times are for flows: choose one")

    def process(self, denoiser: Denoiser) -> diffusion.Process:
        """What mixes data and noise."""
        if self.scheduler is not None:
            return schedule.make_scheduler(self.scheduler.name, self.scheduler.options)
        if self.transport is not None:
            return self.transport
        if denoiser.prediction == "v":
            raise ValueError("a network that predicts v is trained with the scheduler it was made for: name it")
        return Transport() if denoiser.prediction == "flow" else Ddpm()


@dataclass(frozen=True)
class GenerationConfig:
    """``loss`` None: rows are prompts and pictures, and the denoiser's loss is all there is. Otherwise rows are
    dialogues with dream spans, and ``loss`` weighs the language against the pictures in them; every ``norms_every``
    updates the gradient norm of each of the two is logged (0: never)."""

    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    loss: DreamLossConfig | None = None
    norms_every: int = 0

    def __post_init__(self) -> None:
        drop = self.diffusion.drop
        if self.loss is None and (drop.text or drop.image):
            raise ValueError(
                f"diffusion.drop {drop}: text and pictures are dropped one by one from dialogues with dream spans "
                "only; set objective.loss, or use drop.all"
            )
        if self.norms_every < 0 or (self.norms_every and self.loss is None):
            raise ValueError(f"norms_every {self.norms_every}: it counts updates, and is for runs with objective.loss")


@dataclass(frozen=True)
class Draws:
    """All that is random about P pictures, each from a generator of its own."""

    generators: tuple[torch.Generator, ...]
    drop: list[Drop]
    t: Tensor


def picture_seed(seed: int, place: tuple[int, int]) -> int:
    """The seed of a picture: of the run's seed and its place among all draws, whatever rank it falls to."""
    return int.from_bytes(hashlib.sha256(f"{seed} {place[0]} {place[1]}".encode()).digest()[:7])


class DiffusionObjective:
    """Mean loss of the pictures of a batch; a count of 1 is one picture. See :class:`GenerationConfig`.

    Args:
        seed: of the run. Times, noise and what is dropped depend on it and on the number of the draw alone.
        features: where latents and conditions come from.
    """

    def __init__(self, config: DiffusionConfig, seed: int, features: Features | None = None) -> None:
        self.config, self.seed, self.features = config, seed, features or Features()
        self._process: diffusion.Process | None = None

    def __call__(self, model: Generator, batch: Batch) -> tuple[Tensor, int, Mapping[str, Tensor]]:
        """Loss sum, number of pictures, and metrics as sums."""
        targets = targets_of(batch)
        draws = self.draw(model, targets)
        losses = self.losses(model, targets, draws, self.condition(model, targets, draws))
        total = losses.sum()
        return total, len(targets), {"diffusion": total.detach()}

    def process(self, model: Generator) -> diffusion.Process:
        """What mixes data and noise, made once."""
        if self._process is None:
            self._process = self.config.process(model.denoiser)
        return self._process

    def draw(self, model: Generator, targets: Targets) -> Draws:
        """What is dropped, and the times."""
        made = [torch.Generator("cpu").manual_seed(picture_seed(self.seed, place)) for place in targets.places]
        drop = [self.config.drop.draw(1, g)[0] for g in made]
        process = self.process(model)
        t = torch.cat([diffusion.draw_times(process, 1, g, self.config.times) for g in made])
        return Draws(tuple(made), drop, t)

    def condition(self, model: Generator, targets: Targets, draws: Draws) -> Condition:
        """Of every picture; where its prompt is dropped, exactly the null condition of inference."""
        made = self.features.condition(model, targets.prompts, draws.generators)
        dropped = torch.tensor([kind == "all" for kind in draws.drop])
        if not bool(dropped.any()):
            return made
        device = next(iter(made.parts().values())).device
        return made.where(dropped.to(device), self.features.null(model).to(device))

    def losses(self, model: Generator, targets: Targets, draws: Draws, condition: Condition) -> Tensor:
        """(P,) loss of every picture."""
        data = self.features.latents(model, targets, draws.generators)
        drawn = [torch.randn(x.shape, generator=g).to(x.device) for x, g in zip(data, draws.generators, strict=True)]
        noise = torch.stack(drawn) if isinstance(data, Tensor) else drawn
        t = draws.t.to(data[0].device)
        if condition.sizes is None and getattr(getattr(model.denoiser, "needs", None), "sizes", False):
            # SDXL: the original size, a crop from the corner, the target size; whole pictures have no other
            sizes = [[*p.shape[-2:], 0, 0, *p.shape[-2:]] for p in targets.pixels]
            condition = replace(condition, sizes=torch.tensor(sizes, dtype=torch.float32, device=t.device))
        return diffusion.loss(model.denoiser, data, condition, noise=noise, t=t, process=self.process(model))


def targets_of(batch: Batch) -> Targets:
    """The pictures of a batch; ValueError when it asks for none."""
    if batch.targets is None:
        raise ValueError(f"nothing to draw in the batch of {', '.join(sorted(set(batch.sources)))}")
    return batch.targets


def dream_of(model: Generator) -> Dream:
    """The bridge of a generator; ValueError when its conditioner has none."""
    for module in model.conditioner.modules():
        if isinstance(module, Dream):
            return module
    raise ValueError("objective.loss needs a generator whose conditioner is a dream bridge (conditioner.kind: dream)")


class JointObjective:
    """Language and pictures of dialogues with dream spans: each is a mean over its own number (labels, pictures) in the
    whole update, and their weighted sum is what is minimised. A count of 1 is one row.

    ``chunk`` as of :class:`accessory.train.objective.DialogueObjective`.

    ``parts``: the two weighted losses of the last call (see :class:`accessory.train.parts.PartObjective`).
    """

    def __init__(
        self, config: GenerationConfig, seed: int, features: Features | None = None, chunk: int | None = None
    ) -> None:
        assert config.loss is not None
        self.chunk = chunk
        self.weights, self.norms_every = config.loss, config.norms_every
        self.diffusion = DiffusionObjective(config.diffusion, seed, features)
        self.parts: Mapping[str, Tensor] = {}
        self._rates: tuple[float, float] | None = None

    def window(self, batches: Sequence[Batch], device: torch.device) -> None:
        """Count labels and pictures of an update over all ranks."""
        rows = sum(len(b.ids) for b in batches)
        labels = sum(float(self._weights(b.labels).sum()) for b in batches)
        pictures = sum(0 if b.targets is None else len(b.targets) for b in batches)
        counts = torch.tensor([rows, labels, pictures], dtype=torch.float64, device=device)
        total, said, drawn = groups.all_reduce(counts).tolist()
        self._rates = (total / said if said else 0.0, total / drawn if drawn else 0.0)

    def __call__(self, model: Generator, batch: Batch) -> tuple[Tensor, int, Mapping[str, Tensor]]:
        """Loss sum, number of rows, and metrics as sums."""
        if self._rates is None:
            self.window([batch], batch.ids.device)
        assert self._rates is not None
        dream = dream_of(model)
        draws = None if batch.targets is None else self.diffusion.draw(model, batch.targets)
        drop = None if draws is None or set(draws.drop) == {"keep"} else draws.drop
        tiles = None if dream.net.tower is None else batch.tiles
        noise = None if draws is None else dream.noise.draw(draws.generators)
        rows = layout(batch)
        dreamt = dream(batch.ids, tiles, mask=batch.mask, drop=drop, noise=noise, layout=rows)
        found = 0 if dreamt.condition is None else len(dreamt.condition)
        if found != (0 if batch.targets is None else len(batch.targets)):
            raise ValueError(f"{found} dream spans for {0 if batch.targets is None else len(batch.targets)} pictures")
        nothing = dreamt.h.float().sum() * 0
        picture = nothing
        if batch.targets is not None and draws is not None and dreamt.condition is not None and self.weights.picture:
            picture = self.diffusion.losses(model, batch.targets, draws, dreamt.condition).sum() * self._rates[1]
        language = self._language(dream, dreamt.h, batch.labels, rows) if self.weights.language else nothing
        language = language * self._rates[0]
        zero = nothing.detach()
        self.parts = {
            "language": self.weights.total(language, zero),
            "diffusion": self.weights.total(zero, picture),
        }
        metrics = {"language": language.detach(), "diffusion": picture.detach()}
        return self.weights.total(language, picture), len(batch.ids), metrics

    def _weights(self, labels: Tensor) -> Tensor:
        """(B, T - 1) how much each label counts."""
        labels = labels[:, 1:]
        weight = (labels != IGNORE).float()
        return torch.where(labels == DREAM_START, weight * self.weights.trigger, weight)

    def _language(self, dream: Dream, h: Tensor, labels: Tensor, rows: Ragged | None) -> Tensor:
        losses = next_token_losses(dream.logits, h, dream.targets(labels), rows, self.chunk)
        return (losses * self._weights(labels)[labels[:, 1:] != IGNORE]).sum()

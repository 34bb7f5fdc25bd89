"""Flag-DiT, Large-DiT and Next-DiT (Gao et al. 2024, Zhuo et al. 2024) as values of one transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.diffusion.condition import Condition, join
from accessory.diffusion.denoiser import Latents, Steering
from accessory.diffusion.dit_block import DiTBlock, Keys, LayerNorm, Text, View
from accessory.diffusion.dit_config import FlagDiTConfig as FlagDiTConfig
from accessory.diffusion.dit_ends import FinalLayer, LabelEmbedder, TimeEmbedder
from accessory.diffusion.dit_rotary import PLAIN, rotary_table, spectrum
from accessory.diffusion.patches import Plan, patchify, plan, unpatchify
from accessory.nn.linear import Linear


@dataclass(frozen=True)
class TextCache:
    """What a model has read of a condition. Nothing of it depends on the latents or the time, so that one serves all
    steps of a sampler (:meth:`FlagDiT.read`).

    Attributes:
        vector: (B, W) the pooled text's part of the conditioning vector.
        features: (R, L, C), or None when ``keys`` are made already. R counts B pictures and then the regions' prompts.
        mask: (R, 1, 1, L) boolean, None when all is text.
        alive: (R,) rows that have any text; None when all have. The others read nothing.
        keys: of every layer.
    """

    vector: Tensor
    features: Tensor | None
    mask: Tensor | None
    alive: Tensor | None
    keys: tuple[Keys, ...] | None = None

    @property
    def rows(self) -> int:
        """R."""
        if self.features is not None:
            return len(self.features)
        assert self.keys is not None
        return len(self.keys[0][0])


class FlagDiT(nn.Module):
    """The denoiser; see :class:`accessory.diffusion.denoiser.Denoiser` for the contract.

    Nothing of a call is kept on the modules. At initialisation the output is exactly zero.
    """

    eol_token: nn.Parameter | None
    eof_token: nn.Parameter | None
    pad_token: nn.Parameter | None
    seldom = ("pad_token",)  # training on pictures of one size has no padding to learn it from

    def __init__(self, config: FlagDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.prediction
        self.latent_channels = config.latent_channels
        width = config.adaln_width
        self.x_embedder = Linear(config.latent_channels * config.patch_values, config.dim, bias=True)
        self.t_embedder = TimeEmbedder(width)
        if config.text_dim is not None:
            self.cap_embedder = nn.Sequential(LayerNorm(config.text_dim), Linear(config.text_dim, width, bias=True))
        if config.num_classes is not None:
            self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.layers = nn.ModuleList(DiTBlock(config) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config)
        for name in ("eol_token", "eof_token", "pad_token"):
            self.register_parameter(name, nn.Parameter(torch.empty(config.dim)) if getattr(config, name) else None)
        if not self.x_embedder.weight.is_meta:
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The published initialisation: Xavier, N(0, 0.02) for tables, and zero for whatever makes the output zero."""
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        shut: list[nn.Module] = [self.final_layer.linear, self.final_layer.adaLN_modulation[1]]
        shut += [block.get_submodule("adaLN_modulation.1") for block in self.layers]
        if self.config.text_dim is not None:
            shut.append(self.cap_embedder[1])
        for module in shut:
            nn.init.zeros_(module.get_parameter("weight"))
        for name in ("mlp.0", "mlp.2"):
            nn.init.normal_(self.t_embedder.get_submodule(name).get_parameter("weight"), std=0.02)
        for token in self._separators():
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def gates(self) -> Tensor:
        """(n_layers, H) how much text each head lets in, tanh of the gates.

        Raises:
            ValueError: for a model that reads no text.
        """
        if self.config.text_dim is None:
            raise ValueError("this model reads no text, it has no gates")
        return torch.stack([block.get_parameter("attention.gate").detach().float().tanh() for block in self.layers])

    def forward(
        self,
        x: Latents,
        t: Tensor,
        condition: Condition,
        *,
        steering: Steering | None = None,
        text: TextCache | None = None,
    ) -> Latents:
        """Prediction for noisy latents ``x`` (a batch, or a list of unequal sizes) at times ``t`` (B,).

        ``text``: what :meth:`read` made of this condition and these regions; None reads them now.
        The result has the layout and dtype of ``x``, and twice its channels with ``keep_sigma``.

        Raises:
            ValueError: when the condition lacks what the model needs, batches differ, or the steering cannot be done.
        """
        s = PLAIN if steering is None else steering
        batch = len(x)
        self._check(batch, t, condition, s)
        first = x[0]
        h, where = self.tokens(x)
        steps = self.config.time_steps
        time = self.t_embedder(t if steps is None else (t * steps).trunc(), h.dtype)
        c = time
        if self.config.num_classes is not None:
            assert condition.labels is not None
            c = c + self.y_embedder(condition.labels)
        words = None
        if self.config.text_dim is not None:
            text = self._open(condition, s) if text is None else text
            if text.rows != batch + _prompts(s) or len(text.vector) != batch:
                raise ValueError(
                    f"the text cache is of {len(text.vector)} pictures and {text.rows} rows of text, not {batch}"
                )
            c = c + text.vector
            words = self._words(text, where, s, batch)
        view = self._view(where, t, s, batch)
        for i, block in enumerate(self.layers):
            h = block(h, c, time, view, words, i)
        y = self.final_layer(h, c).to(first.dtype)
        return self._pictures(y, where, isinstance(x, list))

    def read(self, condition: Condition, steering: Steering | None = None) -> TextCache:
        """Read a condition (and the prompts of ``steering.regions``) once for many calls.

        Raises:
            ValueError: for a model that reads no text, or a condition without it.
        """
        if self.config.text_dim is None:
            raise ValueError("this model reads no text")
        text = self._open(condition, PLAIN if steering is None else steering)
        assert text.features is not None
        keys = []
        for block in self.layers:
            assert isinstance(block, DiTBlock)
            keys.append(block.read(text.features))
        return TextCache(text.vector, None, text.mask, text.alive, tuple(keys))

    def tokens(self, x: Latents) -> tuple[Tensor, Plan]:
        """Embedded sequences (B, T, D) of latents with separators and padding, and where everything stands."""
        c = self.config
        one_size = isinstance(x, Tensor) or all(item.shape == x[0].shape for item in x)
        shapes = [item.shape[1:] for item in (x[:1] if one_size else x)]
        for item in x:
            if len(item) != c.latent_channels:
                raise ValueError(f"latents of {len(item)} channels; this model has {c.latent_channels}")
        where = plan(shapes, c.patch, eol=c.eol_token, eof=c.eof_token, fixed_length=c.fixed_length, device=x[0].device)
        if one_size:
            patches = patchify(x if isinstance(x, Tensor) else torch.stack(x), c.patch)
        else:
            patches = nn.utils.rnn.pad_sequence([patchify(item[None], c.patch)[0] for item in x], batch_first=True)
        h = self.x_embedder(patches.to(self.x_embedder.weight.dtype))  # (B, n, D)
        if where.index is None:
            return h, where
        extra = [h.new_zeros(c.dim) if token is None else token.to(h.dtype) for token in self._separators()]
        h = torch.cat([h, torch.stack(extra).expand(len(x), -1, -1)], dim=1)
        return h[torch.arange(len(x), device=h.device)[:, None], where.index], where

    def _separators(self) -> Sequence[Tensor | None]:
        return self.eol_token, self.eof_token, self.pad_token

    def _check(self, batch: int, t: Tensor, condition: Condition, s: Steering) -> None:
        if not batch or t.shape != (batch,):
            raise ValueError(f"times must be of shape ({batch},), one a picture; these are {tuple(t.shape)}")
        if len(condition) != batch:
            raise ValueError(f"{batch} pictures with the conditions of {len(condition)}")
        if self.config.num_classes is not None and condition.labels is None:
            raise ValueError("this model is conditioned on classes: the condition has no labels")
        if self.config.text_dim is None and (s.regions or s.gate_threshold):
            raise ValueError("regions and gate_threshold steer text attention; this model reads no text")
        if s.halves < 1 or batch % s.halves:
            raise ValueError(f"a batch of {batch} cannot consist of {s.halves} equal parts (steering.halves)")
        for region in s.regions:
            x1, y1, x2, y2 = region.box
            if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
                raise ValueError(
                    f"a region's box is (x1, y1, x2, y2) within 0..1, x1 < x2 and y1 < y2; not {region.box}"
                )
            if s.region_condition is None or not 0 <= region.row < len(s.region_condition):
                rows = 0 if s.region_condition is None else len(s.region_condition)
                raise ValueError(f"region {region.box} asks for row {region.row} of region_condition, which has {rows}")

    def _open(self, condition: Condition, s: Steering) -> TextCache:
        """The text of pictures and regions as one batch of features, its mask made safe, and its pooled vector."""
        if condition.seq is None or condition.mask is None:
            raise ValueError("this model is conditioned on text: the condition has no seq")
        if condition.seq.shape[-1] != self.config.text_dim:
            raise ValueError(f"text of width {condition.seq.shape[-1]}; this model reads {self.config.text_dim}")
        batch, pooled = len(condition), condition.pooled
        whole = Condition(seq=condition.seq, mask=condition.mask)
        if _prompts(s):
            prompts = s.region_condition
            if prompts is None or prompts.seq is None:
                raise ValueError("region_condition has no seq")
            whole = join([whole, Condition(seq=prompts.seq.to(condition.seq), mask=prompts.mask)])
        assert whole.seq is not None
        assert whole.mask is not None
        features, mask = whole.seq.to(self.x_embedder.weight.dtype), whole.mask
        if pooled is None:
            real = mask[:batch, :, None]
            # Padding may hold anything, even what is not a number.
            total = torch.where(real, features[:batch].float(), 0.0).sum(1)
            pooled = total / real.sum(1).clamp(min=1)
        if pooled.shape[-1] != self.config.text_dim:
            raise ValueError(f"pooled text of width {pooled.shape[-1]}; this model pools to {self.config.text_dim}")
        vector = self.cap_embedder(pooled.to(features.dtype))
        rows = mask.any(1)
        full, living = (bool(flag) for flag in torch.stack([mask.all(), rows.all()]).tolist())
        if full:
            return TextCache(vector, features, None, None)
        features = torch.where(mask[..., None], features, 0.0)
        safe = mask | ~rows[:, None]
        return TextCache(vector, features, safe[:, None, None], None if living else rows)

    def _words(self, text: TextCache, where: Plan, s: Steering, batch: int) -> Text:
        """The text with what it counts at each token."""
        heads = None
        if s.gate_threshold:
            open_heads = (self.gates().abs() >= s.gate_threshold).cpu()
            heads = tuple(None if bool(row.all()) else row.nonzero()[:, 0].to(text.vector.device) for row in open_heads)
        share = None if text.alive is None else text.alive[:batch, None, None, None]
        regions = []
        if s.regions:
            ruled = batch // s.halves
            covered = torch.zeros(1, dtype=torch.bool, device=text.vector.device)
            for region in s.regions:
                inside = where.inside(region.box)
                inside = inside[:ruled].expand(ruled, -1)[:, None, :, None]  # (B', 1, T, 1)
                covered = covered | inside
                row = batch + region.row
                weight = inside * region.weight
                regions.append(
                    (row, (weight if text.alive is None else weight * text.alive[row]).to(text.vector.dtype))
                )
            # A picture's own text is left with what no region covers; the pictures of other halves keep all of it.
            free = F.pad((~covered).flatten(1), (0, 0, 0, batch - ruled), value=True)[:, None, :, None]
            share = free if share is None else free & share
        return Text(
            features=text.features,
            mask=text.mask,
            keys=text.keys,
            heads=heads,
            share=None if share is None else share.to(text.vector.dtype),
            regions=tuple(regions),
        )

    def _view(self, where: Plan, t: Tensor, s: Steering, batch: int) -> View:
        """The rotary table, the mask and the scale of self-attention."""
        c = self.config
        if c.rope_axes == 2 and any(len(shape) == 3 and shape[0] > c.patch[0] for shape in where.shapes):
            raise ValueError("a rotary table of rows and columns cannot tell frames apart: use rope_axes 1 or 3")
        # The sequence's own numbers, or the last axes of frame, row, column.
        steps = torch.arange(where.length, device=t.device)[None, :, None]
        positions = steps if c.rope_axes == 1 else where.coords[..., 3 - c.rope_axes :]
        # Stretching counts time from noise to data; steps of a DDPM schedule run the other way.
        time = t if c.prediction == "flow" else 1 - t / 1000
        waves = spectrum(c.head_dim, c.rope_axes, c.rope_theta * c.rope_ntk, time, s, c.rope_length) / c.rope_linear
        mask = None if where.mask is None else where.mask[:, None, None]
        if mask is not None and s.shared_attention:
            own = mask.unflatten(0, (s.halves, -1))
            mask = torch.cat([own, own[:, :1].expand_as(own)], dim=-1).flatten(0, 1)
        scale = None
        if s.base_tokens is not None:
            if s.base_tokens < 2:
                raise ValueError(f"base_tokens is the length of trained sequences, at least 2; got {s.base_tokens}")
            ratio = where.lengths.double().log() / math.log(s.base_tokens)
            scale = ratio.sqrt().to(self.x_embedder.weight.dtype)[:, None, None, None]
        return View(rotary_table(positions, waves), mask, scale, s.halves if s.shared_attention else 0)

    def _pictures(self, y: Tensor, where: Plan, as_list: bool) -> Latents:
        """Latents of final tokens (B, T, patch * channels)."""
        c = self.config
        channels = y.shape[-1] // c.patch_values
        if channels > c.latent_channels and not c.keep_sigma:
            # Without the predicted variance.
            y = y.unflatten(-1, (-1, channels))[..., : c.latent_channels].flatten(-2)
        if len(where.shapes) == 1:
            cells = y if where.places is None else y[:, where.places[0]]
            out = unpatchify(cells, where.shapes[0], c.patch)
            return list(out.unbind(0)) if as_list else out
        assert where.places is not None
        rows = zip(y, where.places, where.shapes)
        return [unpatchify(row[None, places], shape, c.patch)[0] for row, places, shape in rows]


def _prompts(s: Steering) -> int:
    """Rows of text that regions bring."""
    return len(s.region_condition) if s.regions and s.region_condition is not None else 0

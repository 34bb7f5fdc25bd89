"""Everything that tells the diffusion transformers of the Lumina family apart, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from accessory.diffusion.denoiser import Prediction
from accessory.nn.feed_forward import ffn_width

Norms = Literal["pre", "sandwich", "post"]
Route = Literal["time", "space"]


@dataclass(frozen=True)
class Experts:
    """Mixture-of-experts feed-forward layers of Next-DiT MoE.

    Attributes:
        time: experts chosen by the time alone, for all tokens of a picture together; 0 for none.
        space: experts chosen by every token for itself; 0 for none. With both kinds a block has both layers in turn.
        top: experts that each input is given to.
    """

    time: int = 0
    space: int = 0
    top: int = 2

    def __post_init__(self) -> None:
        for name, number in (("time", self.time), ("space", self.space)):
            if number and number < self.top:
                raise ValueError(f"experts.{name} is {number}, but each input goes to top = {self.top} of them")
        if not self.time and not self.space:
            raise ValueError("experts needs a number of time or space experts; leave it out for none")


@dataclass(frozen=True)
class FeedForwardSpec:
    """Names of one feed-forward sub-layer and of its norm, and what chooses its experts (None: it has none)."""

    name: str
    norm: str
    route: Route | None = None


@dataclass(frozen=True)
class FlagDiTConfig:
    """Sizes and options of :class:`accessory.diffusion.flag_dit.FlagDiT`; the defaults are Flag-DiT's 5B layout.

    Attributes:
        dim: width D of a token.
        n_layers: blocks.
        n_heads: query heads H.
        n_kv_heads: key/value heads K; None is H.
        ffn_dim: width of the feed-forward layer; None applies Meta's rule with the next two.
        multiple_of: what that rule rounds up to.
        ffn_dim_multiplier: what that rule multiplies with.
        norm_eps: of the RMS norms.
        qk_norm: layer norm of queries and keys over all heads together.
        latent_channels: channels C of what is denoised.
        patch: frames, rows and columns of a patch. Audio (T,) counts as one row of one frame.
        learn_sigma: the last layer predicts 2 C channels, the second half being a variance (DiT's heritage).
        keep_sigma: give that half back; False cuts it off.
        skip_sigma: do not even compute what is cut off.
        prediction: what the network predicts; the sampler asks.
        text_dim: width of text features; None for a model that reads no text.
        num_classes: classes of a label-conditional model; label ``num_classes`` is the null class.
        adaln_dim: width of the conditioning vector; None is min(D, 1024).
        norms: ``pre`` is Flag-DiT: a learned norm before each sub-layer, shift, scale and gate. ``sandwich`` is
            Next-DiT: learned norms before and behind, scale and tanh gate, no shift. ``post`` is Next-DiT ImageNet:
            as ``sandwich`` with the first norm free of parameters.
        final_shift: the last layer has a shift beside its scale.
        eol_token: a learned [nextline] behind every row of patches.
        eof_token: a learned [nextframe] behind every frame.
        pad_token: a learned vector at positions of padding.
        fixed_length: always pad to so many tokens and mask none of them (Large-DiT T2I).
        rope_axes: 1 rotates by the place in the sequence, 2 by row and column, 3 by frame, row and column.
        rope_theta: base of the rotary frequencies.
        rope_linear: divides positions, for weights that were trained so.
        rope_ntk: multiplies the base, for weights that were trained so.
        rope_length: trained length L of frequency-aware scaling.
        time_steps: the network is told ``trunc(time_steps * t)`` (Lumina's audio: 1000); None tells it t.
        experts: mixture of experts; None for plain feed-forward layers.
    """

    dim: int = 3072
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    ffn_dim: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = True
    latent_channels: int = 4
    patch: tuple[int, int, int] = (1, 2, 2)
    learn_sigma: bool = True
    keep_sigma: bool = False
    skip_sigma: bool = False
    prediction: Prediction = "flow"
    text_dim: int | None = 4096
    num_classes: int | None = None
    adaln_dim: int | None = None
    norms: Norms = "pre"
    final_shift: bool = True
    eol_token: bool = True
    eof_token: bool = False
    pad_token: bool = True
    fixed_length: int | None = None
    rope_axes: Literal[1, 2, 3] = 1
    rope_theta: float = 10000.0
    rope_linear: float = 1.0
    rope_ntk: float = 1.0
    rope_length: int = 128
    time_steps: int | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.kv_heads}")
        if self.head_dim % (2 * self.rope_axes):
            raise ValueError(
                f"heads of width {self.head_dim} cannot be rotated by {self.rope_axes} axes: "
                f"their width must be a multiple of {2 * self.rope_axes}"
            )
        if min(self.patch) < 1:
            raise ValueError(f"patch {self.patch} has a side below 1")
        if self.keep_sigma and not self.learn_sigma:
            raise ValueError("keep_sigma asks for a variance that a model without learn_sigma does not predict")
        if self.keep_sigma and self.skip_sigma:
            raise ValueError("keep_sigma and skip_sigma contradict each other")
        if self.fixed_length is not None and not self.pad_token:
            raise ValueError("fixed_length needs pad_token: its padding is seen by the other tokens")
        if self.experts is not None and self.norms != "post":
            raise ValueError(f"experts come with norms 'post', not {self.norms!r}")

    @property
    def head_dim(self) -> int:
        """A: width of one head."""
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """K: key/value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def hidden(self) -> int:
        """Width of a feed-forward layer, or of one expert."""
        return self.ffn_dim or ffn_width(self.dim, self.multiple_of, self.ffn_dim_multiplier)

    @property
    def adaln_width(self) -> int:
        """Width of the conditioning vector."""
        return min(self.dim, 1024) if self.adaln_dim is None else self.adaln_dim

    @property
    def patch_values(self) -> int:
        """Latent positions of a patch."""
        frames, rows, columns = self.patch
        return frames * rows * columns

    @property
    def out_channels(self) -> int:
        """Channels that the last layer predicts, kept or not."""
        return self.latent_channels * (2 if self.learn_sigma else 1)

    @property
    def feed_forwards(self) -> tuple[FeedForwardSpec, ...]:
        """The feed-forward sub-layers of a block, in their order, under their published names."""
        if self.experts is None:
            return (FeedForwardSpec("feed_forward", "ffn_norm"),)
        if self.experts.time and self.experts.space:
            return (
                FeedForwardSpec("feed_forward_time", "ffn_norm_time", "time"),
                FeedForwardSpec("feed_forward_space", "ffn_norm_space", "space"),
            )
        return (FeedForwardSpec("feed_forward", "ffn_norm", "time" if self.experts.time else "space"),)

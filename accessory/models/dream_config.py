"""A dream bridge as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from accessory.models.connector import ConnectorConfig, HeadsConfig
from accessory.models.dream_queries import QueryConfig
from accessory.models.dream_spans import NullPolicy


@dataclass(frozen=True)
class TapConfig:
    """Which states are read: blocks (``null``: the final normed states), how they are mixed (``last`` takes one layer),
    an RMS norm for each, and whether at the queries, at the prompt before them, or at both."""

    layers: tuple[int | None, ...] = (None,)
    mix: Literal["last", "concat", "softmax"] = "last"
    norm: bool = False
    positions: Literal["queries", "prompt", "both"] = "queries"


@dataclass(frozen=True)
class Residual:
    """What comes out stands on the prompt's own states of block ``tap`` (``null``: final normed), those that the
    denoiser was trained on; with zero-init heads the bridge starts as the plain text encoder. ``normed``: of a block's
    states the model's last norm is taken, as text profiles do by default."""

    tap: int | None = None
    normed: bool = False

    def __post_init__(self) -> None:
        if self.normed and self.tap is None:
            raise ValueError("residual: the final states are normed already; normed is for those of a block (tap)")


@dataclass(frozen=True)
class DreamConfig:
    """A bridge as a value; see ``dream_presets``.

    ``hide_queries_from_future``: later text neither sees nor counts a span's queries. ``joint``: the context is always
    run together with its span, with gradients (for a backbone that trains); otherwise first the context, exactly as a
    text encoder does, then the span on its cache. ``trigger``: None adds a token of our own; an id makes a row that the
    vocabulary has for it the trigger (checkpoints of DreamLLM). ``null_ids``: the text of the empty context.
    ``query``: what stands at the queries' positions.
    """

    num_queries: int = 64
    query: QueryConfig = field(default_factory=QueryConfig)
    tap: TapConfig = field(default_factory=TapConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    residual: Residual | None = None
    hide_queries_from_future: bool = False
    joint: bool = False
    trigger: int | None = None
    null_ids: tuple[int, ...] = ()
    drop: NullPolicy = field(default_factory=NullPolicy)

    def __post_init__(self) -> None:
        positions = self.tap.positions
        if self.num_queries < 0 or (self.num_queries == 0 and positions == "queries"):
            raise ValueError(f"num_queries is {self.num_queries}, but tap.positions {positions!r} reads them")
        rows, columns = self.query.grid or (1, self.num_queries)
        if self.query.kind != "learned" and (not self.num_queries or rows * columns != self.num_queries):
            raise ValueError(
                f"query.kind {self.query.kind!r} on a grid of {rows} x {columns} does not make num_queries "
                f"{self.num_queries}"
            )
        if self.residual is not None and (positions == "queries" or self.connector.kind == "gen_adapter"):
            raise ValueError(
                f"residual adds to the prompt's positions; tap.positions {positions!r} through "
                f"connector.kind {self.connector.kind!r} does not lead there"
            )
        if any(i < 0 for i in self.null_ids):
            raise ValueError(f"null_ids are text, got the placeholders in {self.null_ids}")

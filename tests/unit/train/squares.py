"""The smallest picture task there is: four coloured squares and the words for them, as LLaVA rows."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from tests.tiny import tiny_tokenizer

COLOURS = {"red": (220, 30, 30), "green": (20, 170, 40), "blue": (30, 50, 220), "yellow": (240, 220, 20)}
QUESTION = "What colour is the square?"

EXPERIMENT = """\
model:
  backbone:
    source: null
    tokenizer: {tokenizer}
    dtype: fp32
    llama: {{dim: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2, ffn_dim: 48, vocab_size: 360, max_length: 128}}
  tower: {{preset: tiny, weights: null}}
  projector: {{layers: linear_norm}}
  tuning:
    - {{kind: train, patterns: ["backbone.*", "projector.*", "tower.*"]}}
  tiling: {{size: 64}}
  max_length: 128
data: {{sources: data.yaml, workers: 0, window: 1}}
train:
  output_dir: {folder}/run
  max_steps: {steps}
  batch_size: 4
  lr: 5.0e-3
  min_lr: 1.0e-4
  warmup_steps: 1
  precision: fp32
  log_every: 1
  checkpoint_every: 1000
  threads: 1
  tensorboard: false
"""


def write_squares(folder: Path, steps: int) -> Path:
    """Pictures, rows, data configuration and experiment; returns the experiment file."""
    rows = []
    for name, colour in COLOURS.items():
        image = Image.new("RGB", (64, 64), (235, 235, 235))
        ImageDraw.Draw(image).rectangle((12, 12, 52, 52), fill=colour)
        image.save(folder / f"{name}.png")
        said = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": name}]
        rows.append({"id": name, "image": f"{name}.png", "conversations": said})
    (folder / "squares.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "data.yaml").write_text("sources:\n  - {kind: llava, path: squares.jsonl}\n")
    path = folder / "experiment.yaml"
    path.write_text(EXPERIMENT.format(tokenizer=tiny_tokenizer(folder / "words"), folder=folder, steps=steps))
    return path

"""Placeholder ids: positions of a sequence whose embedding the model overwrites.

They are negative, so no tokenizer can produce them from text: a user who types ``<image>`` gets the
characters, never a picture slot. The embedding table is never indexed with them (see ``models/splice.py``).
"""

from typing import Final

IMAGE: Final = -1  # one tower feature of a real tile
SKIP: Final = -2  # the learned vector that stands for a blank tile (SPHINX-X)
DREAM: Final = -3  # one learned dream query
IMAGE_START: Final = -4  # learned vector before the features of a tile (SPHINX start_img)
IMAGE_END: Final = -5  # learned vector after the features of a tile (SPHINX end_img)
DREAM_START: Final = -6  # the trigger: the model says it, and a picture is dreamt (also a label, see models/dream.py)
DREAM_END: Final = -7  # learned vector after the dream queries

NAMES: Final[dict[int, str]] = {
    IMAGE: "<image>",
    SKIP: "<skip>",
    DREAM: "<dream>",
    IMAGE_START: "<image_start>",
    IMAGE_END: "<image_end>",
    DREAM_START: "<dream_start>",
    DREAM_END: "<dream_end>",
}
"""How a placeholder is printed; the text has no meaning to the model."""

IGNORE: Final = -100  # label of a position that is not learned

"""Aligning pictures with the words that name them, in the backbone's own embedding space."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.vision.projector import VisualWords


class Aligner(nn.Module):
    """Classify pooled picture features by the token embeddings of a closed list of answers.

    The class vector of an answer is the mean of its frozen token embeddings, centred over the list: a picture whose
    projected features point there is already close to the words that the backbone has to say, so the language model
    learns to read pictures from few samples. (LiT, Zhai et al. 2022, with the embedding table as the text tower.)

    Names that share words have class vectors close together, which teaches a tower slowly; a free linear ``head`` over
    its pooled tokens (C channels) beside it teaches it fast; ``free_head`` False leaves it out. A projector with as
    many visual words as there are answers brings that head itself (``words``), and keeps it for reading.
    """

    classes: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, num_classes: int, dim: int, width: int, *, free_head: bool = True) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(30.0)))
        self.head = nn.Linear(width, num_classes) if free_head else None
        self.register_buffer("classes", torch.zeros(num_classes, dim), persistent=False)
        self.register_buffer("centre", torch.zeros(dim), persistent=False)
        self.register_buffer("spread", torch.ones(()), persistent=False)
        self.index: dict[tuple[int, ...], int] = {}

    @torch.no_grad()
    def set_answers(self, answers: Sequence[Sequence[int]], embeddings: Tensor) -> None:
        """Fill the class vectors from token ids and the embedding table (V, D).

        Raises:
            ValueError: when the list has another length than the head, or an answer has no token.
        """
        if len(answers) != self.classes.shape[0]:
            raise ValueError(f"the head has {self.classes.shape[0]} classes, {len(answers)} answers were given")
        if any(not a for a in answers):
            raise ValueError("an answer without a token cannot be aligned to")
        rows = torch.stack([embeddings[list(a)].float().mean(0) for a in answers])
        self.centre.copy_(rows.mean(0))
        self.spread.copy_((embeddings.float() - embeddings.float().mean(0)).pow(2).mean().sqrt())
        self.classes.copy_(F.normalize(rows - self.centre, dim=-1))
        self.index = {tuple(a): i for i, a in enumerate(answers)}

    @torch.no_grad()
    def fill_words(self, words: VisualWords, answers: Sequence[Sequence[int]], embeddings: Tensor) -> None:
        """Start the table of visual words at the answers' mean token embeddings, as far from the centre as a token is.

        Raises:
            ValueError: when there are not as many words as answers.
        """
        if len(words.table) != len(answers):
            raise ValueError(f"projector.words is {len(words.table)}, the answers to align with are {len(answers)}")
        rows = torch.stack([embeddings[list(a)].float().mean(0) for a in answers]) - self.centre
        length = self.spread * rows.shape[1] ** 0.5
        words.table.copy_(self.centre + F.normalize(rows, dim=-1) * length)

    def targets(self, answers: Sequence[Sequence[int]]) -> Tensor:
        """Class index of every answer, -100 for one that is not on the list."""
        return torch.tensor([self.index.get(tuple(a), -100) for a in answers], device=self.classes.device)

    def forward(self, features: Tensor, tokens: Tensor, words: VisualWords | None = None) -> tuple[Tensor, ...]:
        """Class scores (N, num_classes) of projected features (N, P, D), then of tower tokens (N, P, C) by the head
        or by ``words`` where there are any."""
        pooled = features.float().mean(1) - self.centre
        scores = F.normalize(pooled, dim=-1) @ self.classes.T * self.log_scale.exp().clamp(max=100.0)
        if words is not None:
            return (scores, words.scores(tokens))
        return (scores,) if self.head is None else (scores, self.head(tokens.float().mean(1)))


@torch.no_grad()
def match_scale(aligner: Aligner, projector: nn.Module, features: Tensor) -> float:
    """Shrink or stretch the projector's output about the mean of the answers to the spread of token embeddings.

    Alignment leaves the length of features free, and they grow to many times that of a word; a language model that
    is then trained on them first pulls the projector apart. Directions about the centre, and so every alignment score,
    stay as they are: the last linear becomes ``s W, s b + (1 - s) centre``. Returns s.

    ``features``: (N, P, D) of typical pictures, N > 0.

    Raises:
        ValueError: when a part of the projector does not end in a linear layer.
    """
    centre = aligner.centre
    s = float(aligner.spread / (features.float() - centre).pow(2).mean().sqrt())
    for part in (p for p in projector.children() if not isinstance(p, VisualWords)):
        last = part[-1] if isinstance(part, nn.Sequential) else part
        if not isinstance(last, nn.Linear) or last.bias is None:
            raise ValueError(f"match_scale needs a projector that ends in linear layers, this one has {type(last)}")
        last.weight.mul_(s)
        last.bias.copy_(s * last.bias + (1 - s) * centre.to(last.bias))
    return s

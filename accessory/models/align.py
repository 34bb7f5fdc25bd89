"""Aligning pictures with the words that name them, in the backbone's own embedding space."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Aligner(nn.Module):
    """Classify pooled picture features by the token embeddings of a closed list of answers.

    The class vector of an answer is the mean of its frozen token embeddings, centred over the list: a picture whose
    projected features point there is already close to the words that the backbone has to say, so the language model
    learns to read pictures from few samples. (LiT, Zhai et al. 2022, with the embedding table as the text tower.)

    Names that share words have class vectors close together, which teaches a tower slowly; a free linear ``head`` over
    its pooled tokens (C channels) beside it teaches it fast.
    """

    classes: Tensor
    centre: Tensor

    def __init__(self, num_classes: int, dim: int, width: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(30.0)))
        self.head = nn.Linear(width, num_classes)
        self.register_buffer("classes", torch.zeros(num_classes, dim), persistent=False)
        self.register_buffer("centre", torch.zeros(dim), persistent=False)
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
        self.classes.copy_(F.normalize(rows - self.centre, dim=-1))
        self.index = {tuple(a): i for i, a in enumerate(answers)}

    def targets(self, answers: Sequence[Sequence[int]]) -> Tensor:
        """Class index of every answer, -100 for one that is not on the list."""
        return torch.tensor([self.index.get(tuple(a), -100) for a in answers], device=self.classes.device)

    def forward(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores (N, num_classes) of projected features (N, P, D), and of tower tokens (N, P, C) by the head."""
        pooled = features.float().mean(1) - self.centre
        scores = F.normalize(pooled, dim=-1) @ self.classes.T * self.log_scale.exp().clamp(max=100.0)
        return scores, self.head(tokens.float().mean(1))

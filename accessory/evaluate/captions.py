"""CIDEr and BLEU of captions, by the library of the COCO caption challenge (pycocoevalcap, its parts without Java)."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Words with inner points, hyphens or apostrophes are one word, as for the Penn Treebank.
_WORD = re.compile(r"\w+(?:[-.'’]\w+)*|\S")
_SUFFIX = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))$")
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)+")


def words(caption: str) -> str:
    """A caption in lower case without punctuation, contractions parted as the Penn Treebank does (``do n't``).

    The challenge itself tokenises with a Java program; a test compares both on ordinary captions. Rarer writings
    (currencies, abbreviations) may be cut differently, so scores can differ in the last digits from published ones.
    """
    out: list[str] = []
    for word in _WORD.findall(caption.lower().replace("’", "'")):
        suffix = _SUFFIX.search(word)
        if suffix is None:
            out.append(word)
        else:
            out += [word[: suffix.start()], suffix.group(1)]
    return " ".join(w for w in out if any(c.isalnum() for c in w))


def caption_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """``cider`` (times 1, so 1.0 is what papers print as 100) and ``bleu_1`` to ``bleu_4`` over all items.

    Raises:
        ValueError: when the library is not installed, or items and references differ in number.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} captions for {len(references)} lists of references")
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ValueError("score: caption needs a library: pip install pycocoevalcap") from error
    said = {i: [words(a)] for i, a in enumerate(answers)}
    known = {i: [words(r) for r in rs] for i, rs in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(known, said, verbose=0)
    cider, _ = Cider().compute_score(known, said)
    return {"cider": float(cider), **{f"bleu_{n}": float(v) for n, v in enumerate(bleu, 1)}}

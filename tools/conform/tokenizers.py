"""Tokenizers: sentencepiece with and without the mark of a word's start, and byte-level BPE."""

import json
import re
from pathlib import Path
from typing import Any

from accessory.data.tokenizer import Tokenizer, load
from tools.conform.comparison import Comparison, Handler

MARKS = "decoded text never shows control tokens (the reference prints <s> and </s> of Hugging Face vocabularies)"
INJECTED = "text that looks like a control token stays text (the reference lets a user's </s> end the sequence)"


def tokenizer_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Ids with and without ends, after a blank, glued to a text, and back."""
    fast = config["tokenizer_type"] != "spm"
    tokenizer = load(folder / ("hf_tokenizer" if fast else "tokenizer.model"))
    c.equal("n_words", tokenizer.vocab_size, config["n_words"])
    c.equal("bos_id, eos_id", (tokenizer.bos_id, tokenizer.eos_id), (config["bos_id"], config["eos_id"]))
    c.equal("need_space_before_segment", not tokenizer.marks_start, config["need_space_before_segment"])
    rows = json.loads((folder / "cases.json").read_text())
    if not rows:
        c.problems.append("cases.json is empty")
    for row in rows:
        if fast and re.search("</?s>", row["text"]):
            injected(tokenizer, row["text"], c)
        else:
            one_text(tokenizer, row, fast, c)


def one_text(tokenizer: Tokenizer, row: dict[str, Any], fast: bool, c: Comparison) -> None:
    """All forms of one text."""
    text = row["text"]
    for bos in (0, 1):
        for eos in (0, 1):
            name = f"encode_bos{bos}_eos{eos}"
            c.equal(name, tokenizer.encode(text, bos=bool(bos), eos=bool(eos)), row[name])
    c.equal("encode_segment", tokenizer.after_blank(text), row["encode_segment"])
    c.equal("encode_wo_prefix_space", tokenizer.encode(text, glued=True), row["encode_wo_prefix_space"])
    plain = row["encode_bos0_eos0"]
    c.equal("decode", tokenizer.decode(plain), row["decode_of_plain_encode"])
    c.equal("decode segment", tokenizer.decode(row["encode_segment"]), row["decode_of_segment"])
    if "decode_without_first_token" in row:
        c.equal("decode rest", tokenizer.decode(plain[1:]), row["decode_without_first_token"])
    ours, theirs = tokenizer.decode(row["encode_bos1_eos1"]), row["decode_of_bos_eos_encode"]
    if fast:
        c.deviates("decode with ends", ours, theirs.removeprefix("<s>").removesuffix("</s>"), MARKS)
    else:
        c.equal("decode with ends", ours, theirs)


def injected(tokenizer: Tokenizer, text: str, c: Comparison) -> None:
    """A text with a control token's name in it: no control token comes of it, and nothing of it is lost."""
    ids = tokenizer.encode(text)
    found = [i for i in ids if tokenizer.is_control(i)]
    c.deviates("control string", (found, tokenizer.decode(ids)), ([], text), INJECTED)


HANDLERS: dict[str, Handler] = {"accessory.model.tokenizer.Tokenizer": tokenizer_case}
"""By the reference class that the case was computed with."""

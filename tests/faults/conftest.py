"""What the tests of broken data share."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from accessory.data.encode import Encoder
from accessory.data.template import get
from accessory.data.tiling import TilingConfig
from accessory.data.tokenizer import load


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    names = ["<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = HfTokenizer(models.BPE({t: i for i, t in enumerate([*names, *alphabet])}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain.add_special_tokens(names)
    plain.save(str(tmp_path / "tokenizer.json"))
    return Encoder(load(tmp_path / "tokenizer.json"), get("chatml_plain"), TilingConfig(8), 4, 300)

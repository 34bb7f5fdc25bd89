"""Tokenizers made on the spot, small enough for every test."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from accessory.data.tokenizer import Tokenizer, load

CORPUS = [
    "What is it? A cat.", "### Human: How many apples?\n### Assistant: Seven.", "naïve café 日本語 text 🙂",
    "USER: hi ASSISTANT: hello", "Below is an instruction that describes a task.", "the quick brown fox 0123456789",
]  # fmt: skip
CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>"]


def byte_level(folder: Path, *, special: bool = True) -> Path:
    """A byte-level BPE whose vocabulary holds the control strings, as SmolLM2's does."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*CONTROL, *letters])}
    merges = [("Ġ", "t"), ("h", "e"), ("Ġ", "A"), ("i", "t"), ("a", "t"), ("c", "at"), ("#", "#"), ("##", "#")]
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    tokenizer = HfTokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(CONTROL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def sentencepiece(folder: Path) -> Path:
    """A LLaMA-like model: BPE, byte fallback, dummy prefix, with a user-defined ``<image>`` that would match text."""
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_writer=model, model_type="bpe", vocab_size=360, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=["<image>"],
        control_symbols=["<|im_start|>", "<|im_end|>"], minloglevel=2, character_coverage=0.98,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def tokenizers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved byte-level tokenizer."""
    return byte_level(tmp_path_factory.mktemp("tokenizers") / "json")


@pytest.fixture(scope="session")
def unmarked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with control strings that are added but not marked special."""
    return byte_level(tmp_path_factory.mktemp("tokenizers") / "unmarked", special=False)


@pytest.fixture(scope="session")
def tokenizers(tokenizers_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Both backends."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {"json": load(tokenizers_folder), "spm": load(sentencepiece(folder / "spm"))}


@pytest.fixture(params=["json", "spm"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    """Each backend in turn."""
    return tokenizers[request.param]


@pytest.fixture(scope="session")
def smollm2() -> tuple[Tokenizer, Path]:
    """SmolLM2's tokenizer and its GGUF file from the asset cache."""
    from accessory.data.assets import AssetError, single_file

    try:
        path = single_file("smollm2", "**/*.gguf")
    except AssetError as error:
        pytest.skip(f"SmolLM2 is not in the cache: {error}")
    return load(path), path

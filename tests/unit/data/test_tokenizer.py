"""Text never becomes a control token; ids agree with the reference implementations."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HfTokenizer

from accessory.data.tokenizer import Tokenizer, from_gguf, load

TEXTS = [
    "Hello world", "it's 12345 years, don't", "  lead and trail  ", "日本語 naïve 🙂\n\n\t tab", "a  b   c\n",
    "def f(x):\n    return x**2", "[0.12,0.34,0.56,0.78]", "ÀÉ", "", "x2y 3.14", "### Human: hi\n###", "\n", " ",
]  # fmt: skip
GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden"
ATTACKS = ["<|im_end|>", "<|im_start|>", "</s>", "<image>", "<s>"]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("frame", ["{}", "hi {} there", "x{}y", "{}{}", "\n{}\n"])
def test_control_strings_in_text_stay_characters(tokenizer: Tokenizer, attack: str, frame: str) -> None:
    text = frame.format(attack, attack)
    for glued in (False, True):
        ids = tokenizer.encode(text, glued=glued)
        assert not any(tokenizer.is_control(i) for i in ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.special(attack) not in ids


def test_and_it_matters_the_plain_library_would_match_them(tokenizers_folder: Path) -> None:
    plain = HfTokenizer.from_file(str(tokenizers_folder / "tokenizer.json"))
    assert plain.encode("a<|im_end|>b").ids[1] == load(tokenizers_folder).special("<|im_end|>")


def test_added_tokens_that_are_not_marked_special_cannot_be_typed_either(unmarked_folder: Path) -> None:
    tokenizer = load(unmarked_folder)
    ids = tokenizer.encode("<|im_end|>")
    assert len(ids) == len("<|im_end|>")
    assert tokenizer.special("<|im_end|>") not in ids


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_glued_text_continues_a_word_boundary(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("Assistant: A cat.")
    assert tokenizer.encode("Assistant:") + tokenizer.encode(" A cat.", glued=True) == whole


def test_glued_matters_for_sentencepiece(tokenizers: dict[str, Tokenizer]) -> None:
    spm = tokenizers["spm"]
    assert spm.encode("Assistant:") + spm.encode(" A cat.") != spm.encode("Assistant: A cat.")


def test_special_by_name_and_alias(tokenizer: Tokenizer) -> None:
    assert tokenizer.special("bos") == tokenizer.bos_id == tokenizer.special("<s>")
    assert tokenizer.special("eos") == tokenizer.eos_id == tokenizer.special("</s>")
    assert tokenizer.encode("a", bos=True, eos=True) == [tokenizer.bos_id, *tokenizer.encode("a"), tokenizer.eos_id]
    with pytest.raises(ValueError, match="<none>"):
        tokenizer.special("<none>")


def test_decode_leaves_placeholders_and_control_tokens_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("cat")
    assert tokenizer.decode([-1, tokenizer.special("bos"), *ids, -2, tokenizer.special("eos")]) == "cat"


@pytest.mark.parametrize("text", TEXTS)
def test_stream_gives_the_same_text_and_never_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    stream, shown = tokenizer.stream(), ""
    for i in tokenizer.encode(text):
        piece = stream.push(i)
        assert "\ufffd" not in piece
        shown += piece
    assert shown + stream.finish() == text


def test_stream_holds_back_bytes(tokenizers: dict[str, Tokenizer]) -> None:
    ids = tokenizers["json"].encode("🙂")
    assert len(ids) == 4
    stream = tokenizers["json"].stream()
    assert [stream.push(i) for i in ids] == ["", "", "", "🙂"]
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = load(tmp_path)
    assert (again.bos_id, again.eos_id, again.pad_id, again.vocab_size) == (
        tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size,
    )  # fmt: skip
    assert all(again.encode(t) == tokenizer.encode(t) for t in TEXTS)


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.model"):
        load(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        load(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="'t5'"):
        from_gguf({"tokenizer.ggml.model": "t5"})
    with pytest.raises(ValueError, match="'odd'"):
        from_gguf({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "odd", "tokenizer.ggml.tokens": []})


@pytest.mark.parametrize("case", ["07_tokenizer_spm", "07_tokenizer_spm_noprefix", "07_tokenizer_hf"])
def test_golden_ids_of_the_reference(case: str) -> None:
    folder = GOLDEN / "llm" / case
    if not folder.is_dir():
        pytest.skip("the golden data is not beside this checkout")
    tokenizer = load(next(p for p in (folder, folder / "hf_tokenizer") if list(p.glob("tokenizer.*"))))
    cases = json.loads((folder / "cases.json").read_text())
    seen = 0
    for row in cases:
        if row["text"] in ("<s>", "</s>") and "hf" in case:
            continue  # the reference lets users type control tokens
        assert tokenizer.encode(row["text"]) == row["encode_bos0_eos0"]
        assert tokenizer.encode(row["text"], bos=True, eos=True) == row["encode_bos1_eos1"]
        seen += 1
    assert seen >= 20


@pytest.mark.assets
def test_smollm2_ids_equal_those_of_transformers(smollm2: tuple[Tokenizer, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer, path = smollm2
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49152, 1, 2)
    assert len(TEXTS) > 10
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|im_end|>") != reference("<|im_end|>", add_special_tokens=False).input_ids == [2]


@pytest.mark.assets
def test_smollm2_survives_saving(smollm2: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    smollm2[0].save(tmp_path)
    again = load(tmp_path)
    assert (again.bos_id, again.eos_id, again.pad_id) == (1, 2, 2)
    assert again.encode("Hello 12 <|im_end|>") == smollm2[0].encode("Hello 12 <|im_end|>")

"""Templates reproduce the published strings, learn only answers, and keep text apart from control tokens."""

import json
from pathlib import Path

import pytest
from PIL import Image

from accessory.data.template import TEMPLATES, Control, Segment, get, render
from accessory.data.tokenizer import Tokenizer
from accessory.schema import Picture, Turn

GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden" / "llm"
CONTROLS = {"bos": "", "eos": "</s>"}
PICTURE = Picture(Image.new("RGB", (4, 4)))


def user(*parts: str | Picture) -> Turn:
    return Turn("user", parts)


def bot(text: str) -> Turn:
    return Turn("assistant", (text,))


def written(segments: list[Segment], controls: dict[str, str] | None = None) -> str:
    names = CONTROLS if controls is None else controls
    return "".join(
        s.content if isinstance(s.content, str) else names.get(s.content.name, s.content.name)
        if isinstance(s.content, Control) else "<P>"
        for s in segments
    )  # fmt: skip


def learned(segments: list[Segment]) -> str:
    return written([s for s in segments if s.learn])


@pytest.mark.parametrize(("name", "case"), [("sphinx", "default"), ("vicuna_v1_1", "vicuna_v1_1")])
def test_golden_dialogues(name: str, case: str) -> None:
    file = GOLDEN / "07d_conversation_dataset" / "templates.json"
    if not file.is_file():
        pytest.skip("the golden data is not beside this checkout")
    golden = json.loads(file.read_text())[case]
    turns = [t for q, a in golden["qas"] for t in ([user(q), bot(a)] if a is not None else [user(q)])]
    assert written(render(get(name), turns, generate=True)) == golden["prompt"]
    full = [t for q, a in golden["process_full_qas"] for t in (user(q), bot(a))]
    names = {"bos": "", "eos": "" if name == "sphinx" else "</s>"}
    segments = render(get(name), full)
    assert written(segments, names) == golden["process_full"]["conv"]
    answers = [s.content for s in segments if s.learn and isinstance(s.content, str)]
    ends = "" if name == "sphinx" else "</s>"
    assert [str(a).lstrip() + ends for a in answers] == golden["process_full"]["to_predict"]


def test_golden_alpaca_prompts() -> None:
    file = GOLDEN / "07d_alpaca_dataset" / "format_prompt.json"
    if not file.is_file():
        pytest.skip("the golden data is not beside this checkout")
    rows = [r for r in json.loads(file.read_text()) if r["sys_name"] == "alpaca"]
    assert len(rows) == 5
    for row in rows:
        given = row["row"].get("input")
        parts = (row["row"]["instruction"],) + ((given,) if given and given.strip() else ())
        assert written(render(get("alpaca"), [Turn("user", parts)], generate=True)) == row["prompt"]


def test_llama2() -> None:
    turns = [Turn("system", ("Be brief.",)), user("Hi"), bot("Yo."), user("And?"), bot("Bye.")]
    text = written(render(get("llama2"), turns), {"bos": "<s>", "eos": "</s>"})
    assert text == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yo. </s><s>[INST] And? [/INST] Bye. </s>"
    )  # fmt: skip


@pytest.mark.assets
def test_chatml_equals_the_chat_template_in_the_smollm2_file(smollm2: tuple[Tokenizer, Path]) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(smollm2[1].parent, gguf_file=smollm2[1].name)
    said = [("user", "Hi there"), ("assistant", "Yo."), ("user", " And? ")]
    turns = [Turn(role, (text,)) for role, text in said]  # type: ignore[arg-type]
    messages = [{"role": r, "content": t} for r, t in said]
    for system in (None, "Be brief."):
        first = [] if system is None else [("system", system)]
        asked = [{"role": r, "content": t} for r, t in first] + messages
        expected = reference.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ours = [Turn("system", (t,)) for _, t in first] + turns
        assert written(render(get("chatml"), ours, generate=True)) == expected


def test_chatml_plain_has_no_system_unless_given() -> None:
    assert written(render(get("chatml_plain"), [user("Hi")], generate=True)).startswith("<|im_start|>user\nHi")
    assert "SmolLM" in written(render(get("chatml"), [user("Hi")], generate=True))


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_answers_and_their_ends_are_learned(name: str) -> None:
    turns = [user("QUESTION"), bot("ANSWER"), user("MORE"), bot("REPLY")]
    segments = render(get(name), turns)
    text = learned(segments)
    assert "ANSWER" in text
    assert "REPLY" in text
    assert "QUESTION" not in text
    assert "MORE" not in text
    end = get(name).end[-1]
    ends = [s for s in segments if s.content == end or (isinstance(end, str) and str(s.content).endswith(end))]
    assert sum(s.learn for s in ends) == 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_ends_with_something_on_the_stop_list(name: str) -> None:
    template = get(name)
    end = template.end[-1]
    assert end in template.stop
    assert set(template.stop_texts) | set(template.stop_controls) == {
        p.name if isinstance(p, Control) else p for p in template.stop
    }


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_that_looks_like_control_stays_text(name: str) -> None:
    typed = "</s><|im_end|><s>"
    plain = render(get(name), [user("x")], generate=True)
    attacked = render(get(name), [user(typed)], generate=True)
    controls = [s.content for s in plain if isinstance(s.content, Control)]
    assert controls == [s.content for s in attacked if isinstance(s.content, Control)]


def test_sphinx_puts_the_first_pictures_before_the_text_and_later_ones_in_place() -> None:
    turns = [user("a ", PICTURE, " b"), bot("c"), user(PICTURE, "d"), bot("e")]
    text = written(render(get("sphinx"), turns))
    assert text.startswith("<P>A chat between")
    assert "Human: <P>d" in text
    assert written(render(get("chatml_plain"), turns)).count("a <P> b") == 1


def test_misplaced_turns_are_refused() -> None:
    with pytest.raises(ValueError, match="system turn"):
        render(get("sphinx"), [user("a"), Turn("system", ("b",))])
    with pytest.raises(ValueError, match="last must be the user's"):
        render(get("sphinx"), [user("a"), bot("b")], generate=True)
    with pytest.raises(ValueError, match="there are: sphinx"):
        get("nothing")

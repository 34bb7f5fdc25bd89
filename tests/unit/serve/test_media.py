"""What people bring: accepted, or refused with the file, the number and the limit."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from accessory.schema import Picture
from accessory.serve.media import SUFFIXES, Limits, open_upload, open_uploads, turns_of, user_turn

LIMITS = Limits(max_bytes=20_000, max_pixels=10_000, max_pictures=3, formats=("PNG", "JPEG"))


def encoded(kind: str = "PNG", size: tuple[int, int] = (30, 20)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, kind)
    return out.getvalue()


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    path.write_bytes(encoded())
    return path


def test_paths_bytes_and_pictures_are_the_same_picture(cat: Path) -> None:
    for source in (cat, str(cat), cat.read_bytes(), Image.new("RGB", (30, 20), "red")):
        image = open_upload(source, LIMITS)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (30, 20), (255, 0, 0))


def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "cat.txt").write_bytes(encoded("JPEG"))
    assert open_upload(tmp_path / "cat.txt", LIMITS).size == (30, 20)
    (tmp_path / "text.png").write_text("I am a text")
    with pytest.raises(ValueError, match=r"text\.png: not a picture in one of PNG, JPEG"):
        open_upload(tmp_path / "text.png", LIMITS)
    (tmp_path / "webp.png").write_bytes(encoded("WEBP"))
    with pytest.raises(ValueError, match=r"webp\.png: a WEBP picture, accepted are PNG, JPEG"):
        open_upload(tmp_path / "webp.png", LIMITS)
    assert open_upload(tmp_path / "webp.png", replace(LIMITS, formats=("WEBP",))).size == (30, 20)
    assert ".png" in SUFFIXES


def test_bytes_and_pixels_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "long.png").write_bytes(encoded() + b"\0" * 20_000)
    size = (tmp_path / "long.png").stat().st_size
    with pytest.raises(ValueError, match=rf"long\.png: {size} bytes, the limit is 20000"):
        open_upload(tmp_path / "long.png", LIMITS)
    with pytest.raises(ValueError, match=f"the picture: {size} bytes, the limit is 20000"):
        open_upload((tmp_path / "long.png").read_bytes(), LIMITS)
    (tmp_path / "wide.png").write_bytes(encoded(size=(200, 51)))
    assert (tmp_path / "wide.png").stat().st_size < LIMITS.max_bytes, "few bytes can be many pixels"
    with pytest.raises(ValueError, match=r"wide\.png: 200x51 pixels, the limit is 10000"):
        open_upload(tmp_path / "wide.png", LIMITS)
    with pytest.raises(ValueError, match="200x51 pixels"):
        open_upload(Image.new("RGB", (200, 51)), LIMITS)


def test_a_truncated_picture_is_refused(cat: Path) -> None:
    cat.write_bytes(encoded(size=(90, 90))[:-40])
    with pytest.raises(ValueError, match=r"cat\.png: .*(cannot be read|truncated)"):
        open_upload(cat, LIMITS)


@pytest.mark.parametrize(
    "url", ["http://host/cat.png", "HTTPS://host/cat.png", "file:///etc/hostname", "data:image/png;base64,AAAA"]
)
def test_addresses_are_never_opened(url: str) -> None:
    with pytest.raises(ValueError, match="no local path"):
        open_upload(url, LIMITS)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ValueError, match=r"is not a file|directory"):
            open_upload(path, LIMITS)
    with pytest.raises(ValueError, match=r"no picture at .*missing\.png \(No such file"):
        open_upload(tmp_path / "missing.png", LIMITS)
    with pytest.raises(ValueError, match="is no path"):
        open_upload("a\0b", LIMITS)


def test_the_number_of_pictures_is_bounded(cat: Path) -> None:
    assert len(open_uploads([cat] * 3, LIMITS)) == 3
    with pytest.raises(ValueError, match="4 pictures in one turn, the limit is 3"):
        open_uploads([cat] * 4, LIMITS)
    with pytest.raises(ValueError, match=r"messages\[0\] holds 4 pictures, the limit is 3"):
        turns_of([{"role": "user", "content": [{"type": "image", "image": cat}] * 4}], LIMITS)


def test_a_turn_holds_pictures_then_text(cat: Path) -> None:
    with pytest.raises(ValueError, match=r"images is a list of pictures, got '.*cat.png' alone"):
        user_turn("What is this?", str(cat), LIMITS)
    turn = user_turn("What is this?", [cat, cat], LIMITS)
    assert [type(p) for p in turn.parts] == [Picture, Picture, str]
    assert user_turn(" ", [cat], LIMITS).text == ""
    with pytest.raises(ValueError, match="empty question"):
        user_turn(" ", [], LIMITS)


def test_messages_keep_the_order_of_their_parts(cat: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(cat.read_bytes()).decode()
    turns = turns_of(
        [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Left:"},
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": "right:"},
                    {"type": "image", "image": str(cat)},
                ],
            },
            {"role": "assistant", "content": "cat"},
        ],
        LIMITS,
    )
    assert [t.role for t in turns] == ["system", "user", "assistant"]
    assert [p if isinstance(p, str) else "picture" for p in turns[1].parts] == ["Left:", "picture", "right:", "picture"]


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([{"role": "user"}], r"messages\[0\] must have a role and a content"),
        (["hello"], r"messages\[0\] must have a role"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\]\.role 'robot' is not one of system"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content must be text or a list"),
        ([{"role": "user", "content": [{"type": "video"}]}], r"content\[0\] must be a text, image"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://h/a.png"}}]}],
            "no local path",
        ),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "data:text/html,hi"}]}], r"data:image/"),
        ([{"role": "user", "content": [{"type": "image", "image": "data:image/png;base64,???"}]}], "cannot be decoded"),
        (
            [{"role": "user", "content": [{"type": "image", "image": "data:image/png;base64," + "A" * 40_000}]}],
            "limit is",
        ),
    ],
)
def test_bad_messages_say_where(messages: list[dict[str, object]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        turns_of(messages, LIMITS)

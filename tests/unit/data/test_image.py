"""Pictures of every kind come out as upright RGB; what cannot be read is an error that names it."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from accessory.data.image import FILL, open_picture, pad_to_square, resize, to_tensor

GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden" / "llm"


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = open_picture(Image.new(mode, (5, 3)))
    assert (image.mode, image.size) == ("RGB", (5, 3))


def test_transparency_is_white() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert open_picture(clear).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert open_picture(half).getpixel((0, 0)) == (255, 127, 127)


def test_sixteen_bit_grey_keeps_its_tones() -> None:
    grey = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert [open_picture(grey).getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]  # type: ignore[index]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(tmp_path / "a.jpg").size == (2, 6)
    assert Image.open(tmp_path / "a.jpg").size == (6, 2)


def test_bytes_and_animation() -> None:
    out = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    assert open_picture(out.getvalue()).getpixel((0, 0)) == (255, 0, 0)


def test_bad_files_are_named(tmp_path: Path) -> None:
    good = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(good, "JPEG")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(good.getvalue()[: len(good.getvalue()) // 2])
    text = tmp_path / "text.png"
    text.write_text("hello")
    empty = tmp_path / "empty.png"
    empty.touch()
    for path in (cut, text, empty, tmp_path / "missing.png", tmp_path):
        with pytest.raises(ValueError, match=path.name):
            open_picture(path)


def test_pixel_limit_is_checked_before_decoding(tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb.png.*pixels"):
        open_picture(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="the limit is 10"):
        open_picture(Image.new("RGB", (4, 4)), max_pixels=10)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"huge.png"):
        open_picture(tmp_path / "huge.png")


@pytest.mark.parametrize(("size", "at"), [((5, 2), (0, 1)), ((2, 5), (1, 0)), ((3, 3), (0, 0)), ((4, 1), (0, 1))])
def test_padding_offsets_round_down(size: tuple[int, int], at: tuple[int, int]) -> None:
    square = pad_to_square(Image.new("RGB", size, (255, 0, 0)))
    assert square.size == (max(size),) * 2
    red = np.argwhere(np.array(square)[..., 1] == 0)
    assert tuple(red.min(0)[::-1]) == at
    assert len(red) == size[0] * size[1]
    if size[0] != size[1]:
        assert square.getpixel((max(size) - 1, max(size) - 1)) in (FILL, (255, 0, 0))
        assert FILL in square.get_flattened_data()


def test_padded_resize_equals_the_reference() -> None:
    folder = GOLDEN / "07d_image_transforms"
    if not folder.is_dir():
        pytest.skip("the golden data is not beside this checkout")
    data = load_file(folder / "io.safetensors")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    seen = 0
    for key, expected in data.items():
        if "padded_resize" not in key:
            continue
        source = data["in." + key.rsplit(".", 1)[1]]
        image = Image.fromarray(source.numpy().astype(np.uint8))
        size = expected.shape[-1]
        ours = (to_tensor(resize(pad_to_square(image), size, size)) - mean) / std
        torch.testing.assert_close(ours, expected.reshape(ours.shape), rtol=1e-4, atol=1e-5)
        seen += 1
    assert seen >= 4

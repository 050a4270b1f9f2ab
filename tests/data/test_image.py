import struct

import cv2
import numpy as np
import pytest

from posefabric.data.image import read_image
from posefabric.structures import DataError


@pytest.fixture
def picture():
    """(40, 60, 3) RGB, smooth, red to the left and blue below."""
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[..., 0] = np.linspace(250, 0, 60)[None]
    image[..., 2] = np.linspace(0, 250, 40)[:, None]
    return image


def encoded(image, extension, *options):
    good, data = cv2.imencode(extension, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), list(options))
    assert good
    return data.tobytes()


def with_segment(jpeg, marker, payload):
    return (
        jpeg[:2]
        + b"\xff"
        + bytes([marker])
        + struct.pack(">H", len(payload) + 2)
        + payload
        + (jpeg[2:])
    )


def test_colours_and_shape(tmp_path, picture):
    (tmp_path / "a.png").write_bytes(encoded(picture, ".png"))
    assert np.array_equal(read_image(tmp_path / "a.png"), picture)
    (tmp_path / "a.jpg").write_bytes(encoded(picture, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 95))
    image = read_image(str(tmp_path / "a.jpg"))
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - picture).mean() < 5


def test_grey_becomes_three_channels(tmp_path, picture):
    cv2.imwrite(str(tmp_path / "a.png"), picture[..., 0])
    image = read_image(tmp_path / "a.png")
    assert np.array_equal(image, np.repeat(picture[..., :1], 3, axis=2))


@pytest.mark.parametrize("progressive", [0, 1])
@pytest.mark.parametrize("kept", [0.5, 0.9, 0.995])
def test_truncated_jpeg_is_an_error_where_opencv_sees_none(tmp_path, picture, progressive, kept):
    data = encoded(picture, ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, progressive)
    data = with_segment(data, 0xE1, b"Exif\0\0" + encoded(picture[:8, :8], ".jpg"))
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    assert read_image(path).shape == picture.shape
    cut = data[: int(kept * len(data))]
    path.write_bytes(cut)
    assert kept < 0.95 or cv2.imread(str(path)) is not None
    with pytest.raises(DataError, match=r"a\.jpg: truncated JPEG"):
        read_image(path)


def test_bytes_after_the_end_are_allowed(tmp_path, picture):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(picture, ".jpg") + b"\0" * 20)
    assert read_image(path).shape == picture.shape


@pytest.mark.parametrize("extension", [".png", ".webp"])
def test_other_truncated_formats(tmp_path, extension):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(noise, extension)
    path = tmp_path / f"a{extension}"
    path.write_bytes(data)
    assert read_image(path).shape == noise.shape
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(DataError, match="truncated"):
        read_image(path)


def test_orientation_tag_is_ignored(tmp_path, picture):
    entry = struct.pack("<HHII", 0x0112, 3, 1, 6)
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + entry + b"\0\0\0\0"
    data = with_segment(encoded(picture, ".jpg"), 0xE1, b"Exif\0\0" + tiff)
    turned = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert turned.shape[:2] == (60, 40)
    (tmp_path / "a.jpg").write_bytes(data)
    assert read_image(tmp_path / "a.jpg").shape[:2] == (40, 60)


def test_what_is_no_picture(tmp_path):
    with pytest.raises(DataError, match=r"b\.jpg: no such picture"):
        read_image(tmp_path / "b.jpg")
    with pytest.raises(DataError, match="there is no folder"):
        read_image(tmp_path / "none" / "b.jpg")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DataError, match="empty"):
        read_image(tmp_path / "empty.jpg")
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    with pytest.raises(DataError, match=r"text\.jpg: not a picture"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path)

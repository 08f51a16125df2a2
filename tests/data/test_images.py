"""Images read as transformers reads them, and what is refused."""

import json

import numpy as np
import pytest
import torch

from plinth.config import UserError
from plinth.data.images import ImageProcessor, PixelReader, open_image, save_image

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")


def picture(height, width, seed=0):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (-(-height // 4), -(-width // 4), 3))
    return (coarse.repeat(4, 0).repeat(4, 1)[:height, :width] // 2 + generator.integers(0, 128, (height, width, 3))).astype(np.uint8)


def theirs(settings):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip", reason="transformers is not installed")
    return module.CLIPImageProcessorPil(**settings)


SETTINGS = {
    "clip": {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
    "bilinear_squash": {"size": {"height": 20, "width": 28}, "do_center_crop": False, "resample": 2},
    "larger_cut_than_image": {"size": {"shortest_edge": 15}, "crop_size": {"height": 20, "width": 20}},
    "other_statistics": {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}, "image_mean": [0.5, 0.4, 0.3],
                         "image_std": [0.5, 0.25, 0.2]},
    "no_statistics": {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "do_normalize": False},
    "no_resizing": {"do_resize": False, "crop_size": {"height": 17, "width": 17}},
}  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shape", [(40, 31), (23, 57), (24, 24)])
def test_pixels_equal_transformers(name, shape, tmp_path):
    processor = theirs(SETTINGS[name])
    processor.save_pretrained(tmp_path)
    ours = ImageProcessor.load(tmp_path)
    image = picture(*shape)
    expected = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    assert torch.equal(ours([image]), expected)
    ours.save(tmp_path / "again")
    assert ImageProcessor.load(tmp_path / "again") == ours
    assert torch.equal(theirs(json.loads((tmp_path / "again" / "preprocessor_config.json").read_text()))(
        Image.fromarray(image), return_tensors="pt")["pixel_values"], expected)  # fmt: skip


@pytest.mark.oracle
def test_padding_to_a_square_equals_llava(tmp_path):
    module = pytest.importorskip("transformers.models.llava.image_processing_pil_llava", reason="transformers is not installed")
    processor = module.LlavaImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20}, do_pad=True)
    processor.save_pretrained(tmp_path)
    for shape in ((40, 31), (23, 57)):
        expected = processor(Image.fromarray(picture(*shape)), return_tensors="pt")["pixel_values"]
        assert torch.equal(ImageProcessor.load(tmp_path)([picture(*shape)]), expected)


def test_a_file_gives_what_its_bytes_give_and_a_kept_one_the_same(tmp_path):
    image, processor = picture(30, 22), ImageProcessor.for_size(16)
    save_image(image, tmp_path / "a.png")
    assert torch.equal(processor([tmp_path / "a.png"]), processor([image]))
    for room in (0, 1 << 20):
        reader = PixelReader(processor, kept_bytes=room)
        for _ in range(2):
            assert torch.equal(reader([tmp_path / "a.png", tmp_path / "a.png"])[1], processor([image])[0])


def test_other_modes_become_rgb_and_a_turned_photograph_is_upright(tmp_path):
    grey = Image.fromarray(picture(8, 6)[..., 0])
    grey.save(tmp_path / "grey.png")
    assert np.asarray(open_image(tmp_path / "grey.png")).shape == (8, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.fromarray(picture(8, 6)).save(tmp_path / "turned.jpg", exif=exif)
    assert np.asarray(open_image(tmp_path / "turned.jpg")).shape == (6, 8, 3)


def test_files_that_are_no_images_are_named(tmp_path, monkeypatch):
    save_image(picture(30, 22), tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no image")
    for name, reason in (("cut.png", "cannot be read as an image"), ("text.png", "cannot be read"), ("none.png", "does not exist")):
        with pytest.raises(UserError, match=f"{name}.*{reason}"):
            open_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"a\.png cannot be read as an image: .*decompression bomb"):
        open_image(tmp_path / "a.png")


def test_settings_that_we_do_not_compute_are_refused(tmp_path):
    with pytest.raises(UserError, match="resample=1"):
        ImageProcessor(resample=1)
    with pytest.raises(UserError, match="crop_size"):
        ImageProcessor.from_hf({"crop_size": {"height": 8, "width": 9}})
    with pytest.raises(UserError, match="longest_edge"):
        ImageProcessor.from_hf({"size": {"longest_edge": 8}})
    with pytest.raises(UserError, match="the vision tower takes 32"):
        ImageProcessor.for_size(16).check_size(32)
    with pytest.raises(UserError, match=r"holds no preprocessor_config\.json"):
        ImageProcessor.load(tmp_path)

import numpy as np
import pytest
import torch
from astropy.io import fits
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from zoobot_hf import (
    FrozenStageArguments,
    FrozenStageTrainer,
    UnfrozenStageArguments,
    UnfrozenStageTrainer,
    ZoobotImageProcessor,
)
from zoobot_hf.data.images import UnreadableImageError, open_image
from zoobot_hf.training.embedding_cache import compute_embeddings
from zoobot_hf.training.reading import Pictures, read_wide_field

ORIENTATION = 0x0112  # of EXIF; 6 is a quarter of a turn


def write_fits(path, pixels, kind):
    fits.PrimaryHDU(pixels.astype(kind)).writeto(path)


def write_turned(path, pixels, kind):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(pixels.astype(np.uint8)).save(path, exif=exif)


@pytest.fixture(
    params=[(write_fits, ".fits", ">i2"), (write_fits, ".fits.gz", ">f4"), (write_turned, ".png", "u1")],
    ids=["int16", "float32", "turned"],
)
def files(request, galaxy_images, tmp_path):
    """Galaxies in files that Pillow reads otherwise, or not at all."""
    write, suffix, kind = request.param
    paths = [tmp_path / f"galaxy_{number:02d}{suffix}" for number in range(16)]
    for path, image in zip(paths, galaxy_images, strict=False):
        write(path, np.asarray(image.convert("L"))[::-1].astype(float), kind)
    features = Features({"id_str": Value("string"), "image": ImageFeature(), "label": ClassLabel(names=["no", "ring"])})
    columns = {"id_str": [path.name for path in paths], "image": list(map(str, paths)), "label": [0, 1] * 8}
    return Dataset.from_dict(columns, features=features), paths


@pytest.mark.parametrize("trainer_class", [FrozenStageTrainer, UnfrozenStageTrainer])
def test_training_and_evaluation_see_what_predictions_see(trainer_class, files, layer_norm_model, processor, tmp_path):
    dataset, paths = files
    layer_norm_model.config.id2label = {0: "no", 1: "ring"}
    layer_norm_model.config.label2id = {"no": 0, "ring": 1}
    expected = processor([open_image(path) for path in paths])["pixel_values"]
    settings = {
        "output_dir": str(tmp_path / "out"),
        "augment": False,
        "use_cpu": True,
        "per_device_eval_batch_size": 16,
    }
    is_frozen = trainer_class is FrozenStageTrainer
    arguments = (
        FrozenStageArguments(**settings, embedding_cache=False) if is_frozen else UnfrozenStageArguments(**settings)
    )
    trainer = trainer_class(
        layer_norm_model,
        arguments,
        processing_class=processor,
        train_dataset=dataset,
        eval_dataset={"own": dataset},
    )
    in_order = trainer.data_collator([trainer.train_dataset[row] for row in range(len(dataset))])
    batches = [
        in_order,
        *trainer.get_eval_dataloader("own"),
        *trainer.get_eval_dataloader(dataset),
        *trainer.get_test_dataloader(dataset),
    ]
    assert all(torch.equal(batch["pixel_values"], expected) for batch in batches)


def test_a_picture_is_what_the_encoder_sees_of_the_whole_image(files, processor):
    dataset, paths = files
    pictures = Pictures(dataset, processor)
    assert len(pictures) == len(paths)
    for picture, path in zip(pictures[:2], paths, strict=False):
        assert np.array_equal(np.asarray(picture), processor.to_eight_bit(open_image(path)))
        assert np.asarray(picture).std() > 5
    grey = Pictures(dataset, ZoobotImageProcessor(32, num_channels=1))
    assert grey[0].mode == "L"


def test_an_image_with_content_and_a_path_is_its_content(files, processor):
    _, (path, other, *_) = files
    image = {"bytes": path.read_bytes(), "path": str(other)}
    expected = processor.crop_and_resize(open_image(path))
    assert torch.equal(read_wide_field(image, processor, margin=1.0, name="an image"), expected)


def test_an_image_that_the_processor_refuses_is_named_with_one_full_stop(tmp_path, processor):
    path = tmp_path / "empty.fits"
    write_fits(path, np.full((8, 8), np.nan), ">f4")
    with pytest.raises(UnreadableImageError, match=r"empty\.fits can't be read: .*[^.]\.$"):
        read_wide_field({"bytes": None, "path": str(path)}, processor, margin=1.0, name="an image")


def test_a_transform_that_would_not_be_applied_is_refused(files, layer_norm_model, processor, tmp_path):
    transformed = files[0].with_transform(lambda columns: columns)
    with pytest.raises(ValueError, match="the dataset has a transform"):
        compute_embeddings(layer_norm_model, transformed, processor, cache_dir=tmp_path)


def test_a_row_without_an_image_is_an_error_that_says_so(layer_norm_model, processor, tmp_path):
    rows = Dataset.from_dict({"image": [None]}, features=Features({"image": ImageFeature()}))
    with pytest.raises(UnreadableImageError, match="a row of the dataset has no image"):
        compute_embeddings(layer_norm_model, rows, processor, cache_dir=tmp_path)

import io
import math
import os
import signal
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from astropy.io import fits
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from zoobot_hf.data.images import (
    BATCHES_IN_A_TURN,
    ReadingProcesses,
    UnreadableImageError,
    check_images,
    find_unreadable_images,
    open_image,
    read_in_turns,
)

NO_AVIF = ".avif" not in Image.registered_extensions()
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture
def galaxy(galaxy_images):
    return galaxy_images[0]


def saved(image, path):
    image.save(path)
    return path


def truncated(path, *, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def png_that_claims(width, height):
    """A PNG file of a few bytes whose header states another size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.fixture
def broken_folder(tmp_path, galaxy):
    """Nine files, every other one in a state that can't be read."""
    for index in range(0, 9, 2):
        galaxy.save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "3.png").write_text("not an image")
    truncated(saved(galaxy, tmp_path / "5.png"), share=0.5)
    return tmp_path  # and 7.png isn't there


def dataset_of(paths):
    columns = {"id_str": [path.stem for path in paths], "image": [str(path) for path in paths]}
    return Dataset.from_dict(columns, features=Features({"id_str": Value("string"), "image": ImageFeature()}))


# One image ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["galaxy.png", "galaxy.tif", "galaxy.bmp"])
def test_an_image_comes_out_as_it_was_saved(name, galaxy, tmp_path):
    path = saved(galaxy, tmp_path / name)
    for source in (path, str(path), path.read_bytes()):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(galaxy))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("settings", [{"quality": 90}, {"quality": 40, "subsampling": 0}, {"progressive": True}])
def test_a_jpeg_comes_out_as_pil_decodes_it(mode, settings, galaxy, tmp_path):
    path = tmp_path / "galaxy.jpg"
    galaxy.convert(mode).save(path, **settings)
    with Image.open(path) as expected:
        for source in (path, path.read_bytes()):
            assert np.array_equal(np.asarray(open_image(source)), np.asarray(expected))


def test_a_damaged_jpeg_is_what_pil_makes_of_it(galaxy, tmp_path):
    intact = saved(galaxy.resize((64, 64)), tmp_path / "galaxy.jpg").read_bytes()
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(100):
        content = bytearray(intact)
        content[generator.integers(200, len(content))] = generator.integers(256)
        try:
            with Image.open(io.BytesIO(content)) as image:
                expected = np.asarray(image)
        except OSError:
            expected = None
        outcomes.add(expected is None)
        if expected is None:
            with pytest.raises(UnreadableImageError):
                open_image(bytes(content))
        else:
            assert np.array_equal(np.asarray(open_image(bytes(content))), expected)
    assert outcomes == {True, False}


def test_reading_in_turns_keeps_the_order_and_reads_nothing_beside_the_use():
    was_read = []

    def read(item):
        was_read.append(item)
        return -item

    batches = read_in_turns(read, iter(range(50)), batch_size=3)
    assert next(batches) == [0, -1, -2]
    assert sorted(was_read) == list(range(3 * BATCHES_IN_A_TURN))
    assert [number for batch in batches for number in batch] == [-number for number in range(3, 50)]


def test_an_error_in_reading_in_turns_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(read_in_turns(lambda item: 1 / item, [1, 2, 0, 3], batch_size=2))


def test_processes_read_in_order_and_no_further_ahead_than_they_work():
    taken = []
    items = (taken.append(number) or number for number in range(50))
    processes = ReadingProcesses(2)
    batches = processes.read(math.sqrt, items, batch_size=3, collate=sum)
    assert next(batches) == pytest.approx(math.sqrt(1) + math.sqrt(2))
    assert len(taken) == (processes.count + 2) * 3
    assert len(list(batches)) == 16
    # The same processes go on with the next items.
    assert list(processes.read(os.path.basename, ["a/b", "c"], batch_size=2, collate=tuple)) == [("b", "c")]
    processes.close()


def test_what_a_process_raises_ends_the_reading(tmp_path):
    processes = ReadingProcesses(2)
    with pytest.raises(UnreadableImageError, match=r"^there is no such file$"):
        list(processes.read(open_image, [tmp_path / "none.png"], batch_size=2, collate=list))
    processes.close()


def kill_own_process(item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_reported():
    processes = ReadingProcesses(2)
    with pytest.raises(RuntimeError, match=r"^one of 2 processes that read images was killed.* batch_size below 4\.$"):
        list(processes.read(kill_own_process, range(100), batch_size=4, collate=list))
    processes.close()


@pytest.mark.parametrize("name", ["galaxy.png", "galaxy.jpg"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_image_is_damaged(name, share, galaxy, tmp_path):
    path = truncated(saved(galaxy.resize((200, 200)), tmp_path / name), share=share)
    with pytest.raises(UnreadableImageError, match=r"^it is damaged: .*(truncated|incomplete|broken)"):
        open_image(path)


@pytest.mark.parametrize("content", [b"not an image", b"<html></html>", b"\x89PNG\r\n\x1a\n", b"\0" * 1000])
def test_what_is_no_image_is_called_so(content, tmp_path):
    path = tmp_path / "galaxy.png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(UnreadableImageError, match=r"^it is not an image in a format that PIL knows$"):
            open_image(source)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "galaxy.png").touch()
    for source in (tmp_path / "galaxy.png", str(tmp_path / "galaxy.png"), b""):
        with pytest.raises(UnreadableImageError, match=r"^the file is empty$"):
            open_image(source)


def test_a_missing_file_is_called_missing(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"^there is no such file$"):
        open_image(tmp_path / "galaxy.png")


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(UnreadableImageError, match="directory"):
        open_image(tmp_path)


# PIL itself refuses more than twice its limit of 89 478 485 pixels, and warns of more than once.
@pytest.mark.parametrize(("width", "height"), [(10_000, 9_000), (14_000, 14_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_not_decoded(width, height, tmp_path):
    content = png_that_claims(width, height)
    assert len(content) < 200
    (tmp_path / "bomb.png").write_bytes(content)
    for source in (tmp_path / "bomb.png", content):
        with pytest.raises(UnreadableImageError, match="over 89 million pixels and may be a decompression bomb"):
            open_image(source)


def test_images_below_the_limit_are_no_bombs(monkeypatch, galaxy, tmp_path):
    path = saved(galaxy, tmp_path / "galaxy.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", galaxy.width * galaxy.height)
    assert open_image(path).size == galaxy.size
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", galaxy.width * galaxy.height - 1)
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        open_image(path)


def test_a_raised_limit_is_respected(monkeypatch, galaxy, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(saved(galaxy, tmp_path / "galaxy.png")).size == galaxy.size


@pytest.mark.parametrize(
    "suffix",
    [
        *("png", "jpg", "gif", "tif", "bmp", "webp"),
        pytest.param("avif", marks=pytest.mark.skipif(NO_AVIF, reason="Pillow writes AVIF from 11.3 on")),
    ],
)
def test_damage_anywhere_is_an_image_or_the_one_error(suffix, galaxy, tmp_path):
    intact = saved(galaxy, tmp_path / f"galaxy.{suffix}").read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        content = bytearray(intact)
        for position in generator.integers(0, len(content), 20):
            content[position] = generator.integers(256)
        try:
            open_image(bytes(content))
        except UnreadableImageError:
            refused += 1
    assert refused > 0


def test_opening_in_threads_leaves_the_warning_filters_alone(galaxy, tmp_path):
    path = saved(galaxy, tmp_path / "galaxy.png")
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [open_image(path) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


# A dataset's images ---------------------------------------------------------------------------------------------


def test_unreadable_images_are_listed_in_order_with_their_reasons(broken_folder):
    table = find_unreadable_images(dataset_of([broken_folder / f"{index}.png" for index in range(9)]))
    assert list(table.columns) == ["id_str", "file_loc", "reason"]
    assert table["id_str"].tolist() == ["1", "3", "5", "7"]
    assert table["file_loc"].tolist() == [str(broken_folder / f"{index}.png") for index in (1, 3, 5, 7)]
    assert table["reason"].tolist()[:2] == ["the file is empty", "it is not an image in a format that PIL knows"]
    assert table["reason"][2].startswith("it is damaged: ")
    assert table["reason"][3] == "there is no such file"


def test_images_inside_the_dataset_are_read_too(galaxy, tmp_path):
    intact = saved(galaxy, tmp_path / "galaxy.png").read_bytes()
    images = [{"bytes": intact, "path": None}, {"bytes": intact[:99], "path": None}, {"bytes": b"", "path": None}]
    features = Features({"id_str": Value("string"), "image": ImageFeature()})
    table = find_unreadable_images(Dataset.from_dict({"id_str": ["a", "b", "c"], "image": images}, features=features))
    assert table["id_str"].tolist() == ["b", "c"]
    assert table["file_loc"].tolist() == ["", ""]
    assert table["reason"][1] == "the file is empty"


def test_nothing_is_listed_where_all_can_be_read(broken_folder):
    dataset = dataset_of([broken_folder / f"{index}.png" for index in (0, 2, 4)])
    table = find_unreadable_images(dataset)
    assert table.empty
    assert list(table.columns) == ["id_str", "file_loc", "reason"]
    check_images(dataset)


def test_the_check_names_each_image_and_how_many_there_are(broken_folder):
    dataset = dataset_of([broken_folder / f"{index}.png" for index in (0, 1, 7)])
    with pytest.raises(UnreadableImageError) as error:
        check_images(dataset)
    assert str(error.value) == (
        f"2 of 3 images can't be read: {broken_folder}/1.png: the file is empty; {broken_folder}/7.png: there is no "
        "such file. Mend or remove them."
    )


def test_the_check_names_the_first_five(tmp_path):
    dataset = dataset_of([tmp_path / f"{index}.png" for index in range(7)])
    with pytest.raises(
        UnreadableImageError,
        match=r"7 .*/4\.png: there is no such file; \.\.\. \(.*\.find_unreadable_images lists all\)\. ",
    ) as error:
        check_images(dataset)
    assert "5.png" not in str(error.value)


def test_images_that_are_refused_later_are_listed_too(galaxy, tmp_path):
    def refuse(image):
        raise ValueError("its planes are odd.")

    fits.PrimaryHDU(np.zeros((8, 8))).writeto(tmp_path / "0.fits")
    Image.new("F", (8, 8)).save(tmp_path / "1.tif")
    saved(galaxy, tmp_path / "2.png")  # of these none is refused
    Image.new("I", (8, 8)).save(tmp_path / "3.tif")
    dataset = dataset_of([tmp_path / name for name in ("0.fits", "1.tif", "2.png", "3.tif")])
    assert find_unreadable_images(dataset, prepare=refuse)["id_str"].tolist() == ["0", "1", "3"]
    with pytest.raises(UnreadableImageError, match=r"3\.tif: its planes are odd\. Mend"):
        check_images(dataset, prepare=refuse)
    check_images(dataset)

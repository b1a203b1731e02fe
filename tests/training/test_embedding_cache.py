import copy
import os

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, load_from_disk
from processes import run_on_two

from zoobot_hf import ZoobotForImageClassification, ZoobotImageProcessor
from zoobot_hf.training import embedding_cache, machine
from zoobot_hf.training.embedding_cache import (
    Views,
    clear_cache,
    compute_embeddings,
    list_cache,
    store_embeddings,
)


@pytest.fixture
def galaxies(galaxy_images, galaxy_labels):
    features = Features({"id_str": Value("string"), "image": Image(), "label": ClassLabel(names=["not ring", "ring"])})
    columns = {
        "id_str": [f"galaxy_{index:02d}" for index in range(20)],
        "image": galaxy_images[:20],
        "label": list(galaxy_labels[:20]),
    }
    return Dataset.from_dict(columns, features=features)


@pytest.fixture
def key(layer_norm_model, galaxies, processor, tmp_path):
    """The key of the embeddings, with some of what they depend on changed."""

    def compute(**changes):
        settings = {"model": layer_norm_model, "dataset": galaxies, "processor": processor, "cache_dir": tmp_path}
        return store_embeddings(**{**settings, **changes}).key

    return compute


def test_plain_embeddings_are_what_the_model_says(layer_norm_model, galaxies, processor, tmp_path):
    embeddings = compute_embeddings(layer_norm_model, galaxies, processor, cache_dir=tmp_path)
    assert embeddings.column_names == ["id_str", "label", "embeddings", "view"]
    assert embeddings["id_str"][:] == galaxies["id_str"][:]
    with torch.inference_mode():
        expected = layer_norm_model.zoobot(**processor(galaxies["image"][:])).embeddings
    assert torch.allclose(torch.tensor(embeddings["embeddings"][:]), expected, atol=1e-5)


def test_what_processes_read_gives_the_same(layer_norm_model, galaxies, processor, tmp_path, monkeypatch):
    settings = {"views": Views(2), "batch_size": 3}
    expected = store_embeddings(layer_norm_model, galaxies, processor, cache_dir=tmp_path / "threads", **settings)
    monkeypatch.setattr(machine, "_reading_processes", lambda device: 2)
    stored = store_embeddings(layer_norm_model, galaxies, processor, cache_dir=tmp_path / "processes", **settings)
    assert torch.equal(stored.values, expected.values)


def test_the_seed_decides_the_views(layer_norm_model, galaxies, processor, tmp_path):
    values = [
        store_embeddings(layer_norm_model, galaxies, processor, views=Views(2, seed=seed), cache_dir=tmp_path / folder)
        for seed, folder in ((0, "first"), (0, "again"), (1, "other"))
    ]
    first, again, other = (stored.values for stored in values)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-4)
    settings = {"views": Views(2, seed=0), "batch_size": 3, "cache_dir": tmp_path / "batches"}
    batches = store_embeddings(layer_norm_model, galaxies, processor, **settings).values
    assert torch.allclose(batches, first, atol=1e-5)


def test_views_differ_from_each_other_and_come_galaxy_by_galaxy(layer_norm_model, galaxies, processor, tmp_path):
    embeddings = compute_embeddings(layer_norm_model, galaxies, processor, views=Views(3), cache_dir=tmp_path)
    assert embeddings["view"][:6] == [0, 1, 2, 0, 1, 2]
    assert embeddings["id_str"][:4] == ["galaxy_00"] * 3 + ["galaxy_01"]
    first, second = torch.tensor(embeddings["embeddings"][:2])
    assert not torch.allclose(first, second, atol=1e-4)


def test_the_second_time_the_encoder_does_not_run(key, monkeypatch):
    first = key()
    monkeypatch.setattr(embedding_cache, "_run_encoder", lambda *args, **kwargs: pytest.fail("ran again"))
    assert key() == first


def test_labels_and_head_are_no_part_of_the_key(key, layer_norm_model, galaxies):
    first = key()
    torch.nn.init.zeros_(layer_norm_model.head[-1].weight)
    assert key(dataset=galaxies.remove_columns("label")) == first


def test_each_part_of_the_key_invalidates(key, layer_norm_model, galaxies):
    other_weights = copy.deepcopy(layer_norm_model)
    with torch.no_grad():
        next(other_weights.encoder.parameters()).view(-1)[0] += 1
    other_pooling, other_norm = copy.deepcopy(layer_norm_model), copy.deepcopy(layer_norm_model)
    other_pooling.config.pooling = "mean"
    other_norm.config.encoder_config.layer_norm_eps = 1e-3
    keys = [
        key(),
        key(model=other_weights),
        key(model=other_pooling),
        key(model=other_norm),
        key(processor=ZoobotImageProcessor(32, zoom=1.2)),
        key(views=Views(1)),
        key(views=Views(2)),
        key(views=Views(2, seed=1)),
        key(views=Views(2, zoom_range=0.2)),
        key(views=Views(2, max_shift=0.2)),
        key(dtype="float16"),
        key(bf16=True),
        key(dataset=galaxies.select(range(19))),
        key(dataset=galaxies.select(range(19, -1, -1))),
    ]
    assert len(set(keys)) == len(keys)


def test_a_file_that_changed_is_another_image_even_of_the_same_size_or_time(key, galaxy_folder):
    path = galaxy_folder / "images/galaxy_00.png"
    files = Dataset.from_dict({"image": [str(path)]}, features=Features({"image": Image()}))
    images = [path.read_bytes(), (galaxy_folder / "images/galaxy_01.png").read_bytes()]
    keys = []
    for image in images:
        path.write_bytes(image.ljust(max(map(len, images)), b"\0"))
        keys.append(key(dataset=files))
    before = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(before, before))  # as a copy has it that keeps the times
    assert len({*keys, key(dataset=files)}) == 3


def test_another_device_computes_anew(key, layer_norm_model, monkeypatch):
    before = key(bf16=False, batch_size=4)
    monkeypatch.setattr(type(layer_norm_model), "device", torch.device("cuda"))
    assert key(bf16=False, batch_size=4) != before


@pytest.mark.parametrize(("name", "other"), [("version", lambda name: "0"), ("FORMAT", "0")])
def test_another_version_computes_anew(name, other, key, monkeypatch):
    before = key()
    monkeypatch.setattr(embedding_cache, name, other)
    assert key() != before


def test_repeated_galaxies_are_run_once(layer_norm_model, galaxies, processor, tmp_path):
    twice = galaxies.select([0, 1, 0, 2, 1])
    stored = store_embeddings(layer_norm_model, twice, processor, cache_dir=tmp_path)
    assert stored.values.shape[0] == 3
    assert stored.rows.tolist() == [0, 1, 0, 2, 1]


@pytest.mark.parametrize("damage", [lambda data: data[:-4], lambda data: b"", lambda data: b"\xff" * len(data)])
def test_a_damaged_file_is_noticed_and_made_again(damage, key, layer_norm_model, galaxies, processor, tmp_path):
    before = store_embeddings(layer_norm_model, galaxies, processor, cache_dir=tmp_path).values.clone()
    path = tmp_path / f"{key()}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    after = store_embeddings(layer_norm_model, galaxies, processor, cache_dir=tmp_path).values
    assert torch.equal(before, after)


def test_another_run_may_compute_the_same_meanwhile(layer_norm_model, galaxies, processor, tmp_path, monkeypatch):
    run_encoder = embedding_cache._run_encoder

    def compute(folder="cache"):
        return store_embeddings(layer_norm_model, galaxies, processor, cache_dir=tmp_path / folder).values

    def run_beside_another(*args, **kwargs):
        monkeypatch.setattr(embedding_cache, "_run_encoder", run_encoder)
        compute()
        run_encoder(*args, **kwargs)

    expected = compute("alone")
    monkeypatch.setattr(embedding_cache, "_run_encoder", run_beside_another)
    assert torch.equal(compute(), expected)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_too_little_space_is_said_before_the_encoder_runs(key, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match=r"take 0\.0 MB in .* kept there: 0\.0 MB are free; .*cache --clear.*HF_HOME"):
        key()
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_can_not_be_written_to_is_named(key, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"MB in .*file/cache, and can't be kept there: .*Not a directory.* set HF_HOME"):
        key(cache_dir=tmp_path / "file/cache")


def test_a_disk_that_fills_up_leaves_no_half_cache(key, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedding_cache, "_run_encoder", fail)
    with pytest.raises(OSError, match="No space left"):
        key()
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_image_is_named_and_nothing_is_kept(key, galaxy_folder, tmp_path):
    path = galaxy_folder / "images/galaxy_00.png"
    path.write_bytes(b"not an image")
    files = Dataset.from_dict({"image": [str(path)]}, features=Features({"image": Image()}))
    with pytest.raises(ValueError, match=r"galaxy_00\.png can't be read: it is not an image"):
        key(dataset=files)
    assert list_cache(tmp_path) == []


def test_an_unknown_type_and_no_views_are_refused(key):
    with pytest.raises(ValueError, match="dtype is 'int8'; choose float32 or float16"):
        key(dtype="int8")
    with pytest.raises(ValueError, match="count is 0"):
        Views(0)


def test_the_cache_is_listed_and_cleared(key, tmp_path):
    key(views=Views(2))
    (listed,) = list_cache(tmp_path)
    assert (listed.images, listed.views) == (20, 2)
    assert clear_cache(tmp_path) == listed.size
    assert list_cache(tmp_path) == []


COMPUTE = """
import sys
from accelerate import PartialState
from datasets import load_from_disk
from zoobot_hf import ZoobotForImageClassification, ZoobotImageProcessor
from zoobot_hf.training.embedding_cache import Views, compute_embeddings

dataset, model, cache, output = sys.argv[1:]
model, processor = ZoobotForImageClassification.from_pretrained(model), ZoobotImageProcessor(32)
rows = compute_embeddings(
    model, load_from_disk(dataset), processor, views=Views(3), cache_dir=cache, batch_size=3
)
rank = PartialState().process_index
rows.to_parquet(f"{output}-{rank}.parquet")
sys.stdout.write(f"{rank} {PartialState().num_processes}\\n")  # at once, or two processes' lines get mixed
"""


def test_two_processes_share_the_work_and_store_what_one_does(layer_norm_model, galaxies, processor, tmp_path):
    galaxies.save_to_disk(tmp_path / "galaxies")
    layer_norm_model.save_pretrained(tmp_path / "model")
    (tmp_path / "compute.py").write_text(COMPUTE)
    printed = run_on_two(*(tmp_path / name for name in ("compute.py", "galaxies", "model", "cache", "out")))
    assert sorted(printed.splitlines()) == ["0 2", "1 2"]
    (shared,) = list_cache(tmp_path / "cache")
    model = ZoobotForImageClassification.from_pretrained(tmp_path / "model")
    settings = {"views": Views(3), "cache_dir": tmp_path / "alone", "batch_size": 3}
    alone = compute_embeddings(model, load_from_disk(tmp_path / "galaxies"), processor, **settings)
    (single,) = list_cache(tmp_path / "alone")
    assert shared.path.name == single.path.name
    assert shared.path.read_bytes() == single.path.read_bytes()
    for rank in (0, 1):
        assert Dataset.from_parquet(f"{tmp_path}/out-{rank}.parquet")[:] == alone[:]

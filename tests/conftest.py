"""What all tests stand on: a Hub on loopback, a guard against any other network, and small data.

Every test, and every process that a test starts, talks to the Hub of `hub_server.py` and keeps its caches in a
temporary folder. Only `pytest -m network` leaves the real Hub and the network alone.
"""

import contextlib
import copy
import itertools
import os
import re
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer
from PIL import Image

SHARED = Path(__file__).resolve().parents[1] / "../shared"  # data beside the checkout that is not part of the project
IMAGE_SIZE = 48
IMAGE_COUNT = 40
LOOPBACK = re.compile(r"localhost|127\.\d+\.\d+\.\d+|::1|0\.0\.0\.0|::|")

# Read by the Hugging Face libraries when they are imported; processes that tests start inherit it.
HUB_ENVIRONMENT = {
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # a .bin checkpoint starts a thread that sends the token to another host
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_XET": "1",  # the server has LFS, and the clients do not fall back to it by themselves
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # counts on a storage bucket elsewhere
}
FOREIGN_ENVIRONMENT = re.compile(
    r"(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS)_\w*(CACHE|TOKEN\w*|OFFLINE|ASSETS\w*)|https?_proxy|all_proxy",
    re.IGNORECASE,
)

HUB = pytest.StashKey()
OUTSIDE_CALLS = pytest.StashKey()


# The Hub and the network ----------------------------------------------------------------------------------------


def pytest_configure(config):
    if wants_real_hub(config):
        return
    early = {"huggingface_hub", "transformers", "datasets"} & sys.modules.keys()
    if early:
        raise pytest.UsageError(f"{', '.join(sorted(early))} imported before the tests could set HF_ENDPOINT")
    stack = contextlib.ExitStack()
    config.add_cleanup(stack.close)
    monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
    home = stack.enter_context(tempfile.TemporaryDirectory(prefix="hugging_face_", ignore_cleanup_errors=True))
    config.stash[HUB] = stack.enter_context(HubServer())
    redirect_hub_clients(monkeypatch, config.stash[HUB].url, home)
    config.stash[OUTSIDE_CALLS] = forbid_network(monkeypatch)


def pytest_collection_modifyitems(config, items):
    if wants_real_hub(config):
        return
    for item in items:
        if item.get_closest_marker("network"):
            item.add_marker(pytest.mark.skip(reason="needs the real Hub: pytest -m network"))


def wants_real_hub(config):
    return re.search(r"(?<!not )\bnetwork\b", config.option.markexpr) is not None


def redirect_hub_clients(monkeypatch, url, hugging_face_home):
    for name in filter(FOREIGN_ENVIRONMENT.fullmatch, list(os.environ)):
        monkeypatch.delenv(name)
    for name, value in HUB_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HOME", hugging_face_home)


def forbid_network(monkeypatch):
    """The list of outside addresses that were asked for from now on; asking for one fails the test that does."""
    outside_calls = []
    real_getaddrinfo = socket.getaddrinfo
    real_connect, real_connect_ex = socket.socket.connect, socket.socket.connect_ex

    def check(host):
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and not LOOPBACK.fullmatch(name):
            outside_calls.append(name)
            # Not an Exception: a library that carries on without the network must not hide it.
            pytest.fail(f"Tests use no network, but {name} was asked for: use the `hub` fixture or mark it `network`")

    def getaddrinfo(host, *arguments, **keywords):
        check(host)
        return real_getaddrinfo(host, *arguments, **keywords)

    def connect(self, address):
        if self.family != socket.AF_UNIX:
            check(address[0])
        return real_connect(self, address)

    def connect_ex(self, address):
        if self.family != socket.AF_UNIX:
            check(address[0])
        return real_connect_ex(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect_ex)
    return outside_calls


@pytest.fixture(autouse=True)
def outside_calls(request):
    """The outside addresses that this test asked for. Any left at its end fail it, also those from a thread."""
    calls = request.config.stash.get(OUTSIDE_CALLS, [])
    yield calls
    asked, calls[:] = list(calls), []
    if asked:
        pytest.fail(f"Tests use no network, but these were asked for: {', '.join(asked)}")


@pytest.fixture(scope="session")
def hub(request):
    """The Hub that all clients in this process talk to: a `HubServer`."""
    if HUB not in request.config.stash:
        pytest.skip("the clients talk to the real Hub")
    import datasets

    datasets.config.USE_PARQUET_EXPORT = False  # asks datasets-server.<endpoint>, and has no environment variable
    return request.config.stash[HUB]


@pytest.fixture(autouse=True)
def forget_requests(request):
    """Gives each test an empty request log and no faults."""
    if HUB in request.config.stash:
        request.config.stash[HUB].forget()


@pytest.fixture(scope="session")
def hub_token(hub):
    """A write token of the user astronomer; `hub.tokens` has the others."""
    return hub.tokens["write"]


_repo_numbers = itertools.count(1)


@pytest.fixture
def repo_id(hub):
    """A repository name under astronomer that no other test uses; the repository is not there yet."""
    return f"astronomer/repo-{next(_repo_numbers)}"


# Data -----------------------------------------------------------------------------------------------------------


def shared_folder(path):
    folder = SHARED / path
    if not folder.is_dir():
        pytest.skip(f"needs {path}, which is not in the project but in a folder `shared` beside the checkout")
    return folder.resolve()


@pytest.fixture(scope="session")
def rings_folder():
    """470 real galaxies, half of them with a ring, and their catalog.csv: id_str, file_loc, ring."""
    return shared_folder("data/rings")


@pytest.fixture(scope="session")
def mobilenet_folder():
    """A real pretrained encoder in timm's layout, with BatchNorm and 1280 dimensions."""
    return shared_folder("encoders/mobilenetv2-in1k")


def draw_galaxy(generator, *, has_ring):
    """An RGB image, uint8 0-255: a bulge and a disk in noise, with or without a bright ring around them."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    center_y, center_x = IMAGE_SIZE / 2 + generator.uniform(-2, 2, size=2)
    angle, axis_ratio = generator.uniform(0, np.pi), generator.uniform(0.7, 1)
    along = (x - center_x) * np.cos(angle) + (y - center_y) * np.sin(angle)
    across = (y - center_y) * np.cos(angle) - (x - center_x) * np.sin(angle)
    radius = np.hypot(along, across / axis_ratio)
    light = 0.8 * np.exp(-radius / 2.5) + 0.3 * np.exp(-radius / 8)
    if has_ring:
        light += 0.6 * np.exp(-0.5 * ((radius - generator.uniform(11, 15)) / 1.5) ** 2)
    color = np.array([1.0, 0.9, 0.75]) * light[..., None] + generator.normal(0.05, 0.03, (IMAGE_SIZE, IMAGE_SIZE, 3))
    return Image.fromarray((255 * color.clip(0, 1)).astype(np.uint8))


@pytest.fixture(scope="session")
def galaxy_labels():
    """1 for each of `galaxy_images` that has a ring, 0 for the others, in turn."""
    return tuple(index % 2 for index in range(IMAGE_COUNT))


@pytest.fixture(scope="session")
def drawn_galaxies(galaxy_labels):
    generator = np.random.default_rng(0)
    return [draw_galaxy(generator, has_ring=bool(label)) for label in galaxy_labels]


@pytest.fixture
def galaxy_images(drawn_galaxies):
    """40 RGB images of 48 x 48 pixels that are easy to tell apart; their labels are `galaxy_labels`."""
    return [image.copy() for image in drawn_galaxies]


@pytest.fixture(scope="session")
def shared_galaxy_folder(tmp_path_factory, drawn_galaxies, galaxy_labels):
    """`galaxy_folder` for fixtures that live longer than a test; not to be changed."""
    folder = tmp_path_factory.mktemp("galaxies")
    (folder / "images").mkdir()
    lines = ["id_str,file_loc,ring"]
    for index, (image, label) in enumerate(zip(drawn_galaxies, galaxy_labels, strict=True)):
        image.save(folder / f"images/galaxy_{index:02d}.png")
        lines.append(f"galaxy_{index:02d},images/galaxy_{index:02d}.png,{label}")
    (folder / "catalog.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def galaxy_folder(shared_galaxy_folder, tmp_path):
    """The drawn galaxies on disk: catalog.csv (id_str, file_loc, ring) and images/galaxy_00.png to _39.png."""
    return shutil.copytree(shared_galaxy_folder, tmp_path / "galaxies")


@pytest.fixture(scope="session")
def galaxies_with_votes(drawn_galaxies, galaxy_labels):
    """Galaxies whose volunteers, of the tree that is given, agree on the first answer for rings, else on the last."""
    from datasets import Dataset, Features, Image, Value

    def make(tree, *, reverse=False):
        generator = np.random.default_rng(0)
        votes = []
        for label in galaxy_labels:
            row = {}
            for question in tree.questions:
                shares = np.ones(len(question.answers))
                shares[0 if label else -1] = 20
                counts = generator.multinomial(12, shares / shares.sum())
                names = [answer.vote_column for answer in question.answers]
                row |= {name: float(count) for name, count in zip(names, counts, strict=True)}
            votes.append(row)
        columns = tree.vote_columns[::-1] if reverse else tree.vote_columns
        features = {"id_str": Value("string"), "image": Image(), "label": {name: Value("float32") for name in columns}}
        rows = {"id_str": [f"galaxy_{n:02d}" for n in range(len(votes))], "image": drawn_galaxies, "label": votes}
        return Dataset.from_dict(rows, features=Features(features))

    return make


# Models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_models():
    """A tiny model for each kind of encoder, made once; tests get copies from the fixtures below."""
    from tiny_models import ENCODERS, tiny_model

    return {name: tiny_model(name) for name in ENCODERS}


@pytest.fixture
def layer_norm_model(tiny_models):
    """A ConvNeXt: LayerNorm, stochastic depth."""
    return copy.deepcopy(tiny_models["layer_norm"])


@pytest.fixture
def batch_norm_model(tiny_models):
    """A ResNet: BatchNorm, whose running statistics are buffers."""
    return copy.deepcopy(tiny_models["batch_norm"])


@pytest.fixture
def vit_model(tiny_models):
    """A vision transformer."""
    return copy.deepcopy(tiny_models["vit"])


@pytest.fixture
def timm_model(tiny_models):
    """An EfficientNet through timm: BatchNorm."""
    return copy.deepcopy(tiny_models["timm"])


@pytest.fixture
def timm_convnext_model(tiny_models):
    """A ConvNeXt through timm, as most of Zoobot's encoders are: a LayerNorm follows the last block."""
    return copy.deepcopy(tiny_models["timm_convnext"])


@pytest.fixture
def processor():
    """The tiny models' image processor."""
    from zoobot_hf import ZoobotImageProcessor

    return ZoobotImageProcessor(32)

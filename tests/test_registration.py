import subprocess
import sys

import pytest

import zoobot_hf

LOOK_UP = """
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING

config = CONFIG_MAPPING["zoobot"]
found = [mapping[config] for mapping in (MODEL_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING)]
print(*(entry.__name__ for entry in found), IMAGE_PROCESSOR_MAPPING[config]["torchvision"].__name__)
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_public_name_can_be_imported():
    assert len(zoobot_hf.__all__) > 50
    for name in zoobot_hf.__all__:
        value = getattr(zoobot_hf, name)
        assert name.isupper() or value.__module__.startswith("zoobot_hf.")  # a constant has no module


def test_the_package_imports_nothing_heavy():
    heavy = "('torch', 'transformers', 'datasets', 'numpy', 'matplotlib')"
    assert run(f"import sys, zoobot_hf; print([name for name in {heavy} if name in sys.modules])") == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import zoobot_hf; from transformers import pipeline",
        "import zoobot_hf; from transformers import Trainer",
        "from transformers import AutoConfig; import zoobot_hf",
        "from zoobot_hf import ZoobotConfig",
    ],
)
def test_the_auto_classes_know_the_model_whatever_is_imported_first(imports):
    expected = "ZoobotModel ZoobotForImageClassification ZoobotImageProcessor"
    assert run(f"{imports}\n{LOOK_UP}") == expected

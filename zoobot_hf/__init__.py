"""Galaxy Zoo's classifier, the Hugging Face way."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from .models.configuration_zoobot import ZoobotConfig
from .models.image_processing_zoobot import ZoobotImageProcessor
from .models.modeling_zoobot import ZoobotForImageClassification, ZoobotModel

__version__ = "0.1.0"

AutoConfig.register(ZoobotConfig.model_type, ZoobotConfig, exist_ok=True)
AutoModel.register(ZoobotConfig, ZoobotModel, exist_ok=True)
AutoModelForImageClassification.register(ZoobotConfig, ZoobotForImageClassification, exist_ok=True)
AutoImageProcessor.register(ZoobotConfig, image_processor_classes={"torchvision": ZoobotImageProcessor}, exist_ok=True)

__all__ = ["ZoobotConfig", "ZoobotForImageClassification", "ZoobotImageProcessor", "ZoobotModel"]

"""Models of some ten thousand parameters, one for each kind of encoder.

Not imported at the top of conftest.py: the tests' environment must be set before the first Hugging Face import.
"""

import torch
from transformers import ConvNextConfig, ResNetConfig, ViTConfig
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig

from zoobot_hf import ZoobotConfig, ZoobotForImageClassification

SMALL_TIMM = {"num_classes": 0, "pretrained_cfg": {"input_size": [3, 32, 32]}}
ENCODERS = {
    "layer_norm": ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        image_size=32,
        patch_size=2,
        drop_path_rate=0.5,
        layer_scale_init_value=0.5,
    ),
    "batch_norm": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "vit": ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    ),
    "timm": TimmWrapperConfig.from_dict({**SMALL_TIMM, "architecture": "test_efficientnet"}),
    "timm_convnext": TimmWrapperConfig.from_dict({**SMALL_TIMM, "architecture": "test_convnext"}),
}


def tiny_model(name):
    """A model around the encoder of this name with new weights, the same at every call."""
    torch.manual_seed(0)
    labels = {0: "not ring", 1: "ring"}
    config = ZoobotConfig(ENCODERS[name], id2label=labels, label2id={name: i for i, name in labels.items()})
    model = ZoobotForImageClassification(config).eval()
    if name.startswith("timm"):
        # From the weights that transformers starts with, so many layers give every image the same embedding.
        for parameter in model.encoder.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter)
    return with_decided_head(model)


def with_decided_head(model):
    """The model, its head no longer one that gives the same for every image, as a new one does."""
    torch.nn.init.normal_(model.head[-1].weight, std=0.01)
    return model

"""Finetunes tiny models with Zoobot 2.9.0 and keeps their checkpoints and predictions; needs a Python that has Zoobot.

PYTHON_WITH_ZOOBOT tests/models/make_zoobot_checkpoints.py FOLDER
"""

import sys
from pathlib import Path

import timm
import torch
from torch.utils.data import DataLoader, Dataset
from zoobot.pytorch.training import finetune
from zoobot.shared import schemas

ARCHITECTURE = "test_convnext"
PIXELS = 32
GALAXIES = 8

create_model = timm.create_model


class Galaxies(Dataset):
    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return GALAXIES

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, PIXELS, PIXELS, generator=generator)
        return {"image": image, **{column: values[index] for column, values in self.labels.items()}}


def train(model, labels, folder):
    loader = DataLoader(Galaxies(labels), batch_size=4)
    trainer = finetune.get_trainer(str(folder), max_epochs=1, accelerator="cpu", logger=False)
    # Otherwise Zoobot tells Lightning to log a learning rate without a logger.
    trainer.callbacks = [callback for callback in trainer.callbacks if "LearningRate" not in type(callback).__name__]
    trainer.fit(model, loader, loader)
    return next((folder / "checkpoints").glob("*.ckpt"))


def main():
    folder = Path(sys.argv[1])
    timm.create_model = lambda name, **arguments: create_model(name, **{**arguments, "pretrained": False})
    torch.manual_seed(0)
    schema = schemas.decals_dr5_ortho_schema
    models = {
        "tree": (
            finetune.FinetuneableZoobotTree(name=ARCHITECTURE, schema=schema),
            {column: torch.randint(0, 5, (GALAXIES,)) for column in schema.label_cols},
        ),
        "classifier": (
            finetune.FinetuneableZoobotClassifier(name=ARCHITECTURE, num_classes=3),
            {"label": torch.randint(0, 3, (GALAXIES,))},
        ),
        "regressor": (
            finetune.FinetuneableZoobotRegressor(name=ARCHITECTURE, unit_interval=True),
            {"label": torch.rand(GALAXIES)},
        ),
    }
    galaxies = Galaxies({})
    images = torch.stack([galaxies[index]["image"] for index in range(GALAXIES)])
    predictions = {}
    for name, (model, labels) in models.items():
        path = train(model, labels, folder / name)
        path.replace(folder / f"{name}.ckpt")
        # The decision tree's file holds a pickled Schema; its owner can take that out.
        content = torch.load(folder / f"{name}.ckpt", weights_only=False)
        content["hyper_parameters"].pop("schema", None)
        torch.save(content, folder / f"{name}_plain.ckpt")
        with torch.no_grad():
            predictions[name] = model.eval()(images)
    torch.save({"images": images, **predictions}, folder / "predictions.pt")


if __name__ == "__main__":
    main()

"""Measures Zoobot 2.9.0 as its documentation has it used; run by the python of Zoobot's own environment.

Tasks: `frozen` (`head_only` at 1e-3) and `unfrozen` (`full` at 1e-4), both with its default training transform, data
module and trainer; `prediction` with `predict_on_catalog`; `data`, its training transform alone.

The encoder is handed over as a module. It takes RGB in 0-1, as Zoobot feeds it, whatever its configuration states.
"""

import itertools
from pathlib import Path

import lightning
import timm
import torch
from competitor import CLASS_NAMES, measure_data_path, measure_prediction, read_catalog, run_task, score_table
from galaxy_datasets.pytorch.galaxy_datamodule import CatalogDataModule
from galaxy_datasets.pytorch.galaxy_dataset import CatalogDataset
from galaxy_datasets.transforms import default_view_config, get_galaxy_transform, minimal_view_config
from zoobot.pytorch.predictions import predict_on_catalog
from zoobot.pytorch.training.finetune import FinetuneableZoobotClassifier, get_trainer

LEARNING_RATES = {"head_only": 1e-3, "full": 1e-4}


class ClockCallback(lightning.Callback):
    def __init__(self, clock):
        self.clock = clock

    def on_train_epoch_start(self, trainer, module):
        self.clock.start_epoch()

    def on_train_batch_start(self, trainer, module, batch, batch_index):
        self.clock.start_step()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        # The validation is part of Lightning's epoch, so that its end comes too late.
        if batch_index + 1 == trainer.num_training_batches:
            self.clock.end_training_of_epoch(trainer.num_training_batches * len(batch["image"]))


def load_model(options, mode):
    lightning.seed_everything(options.seed)
    encoder = timm.create_model(f"local-dir:{options.encoder}", pretrained=True, num_classes=0)
    return FinetuneableZoobotClassifier(
        num_classes=len(CLASS_NAMES),
        encoder=encoder,
        training_mode=mode,
        learning_rate=LEARNING_RATES[mode],
        prog_bar=False,
    )


def train(options, clock, mode):
    model = load_model(options, mode)
    data = CatalogDataModule(
        label_cols=["label"],
        train_transform=get_galaxy_transform(default_view_config()),
        test_transform=get_galaxy_transform(minimal_view_config()),
        train_catalog=read_catalog(options, "train"),
        val_catalog=read_catalog(options, "validation"),
        batch_size=options.batch_size,
        num_workers=options.workers,
    )
    trainer = get_trainer(
        options.scratch,
        max_epochs=options.epochs,
        patience=options.epochs + 1,
        default_root_dir=options.scratch,
        enable_progress_bar=False,
        precision="bf16-mixed" if options.bf16 else None,
    )
    trainer.callbacks.insert(0, ClockCallback(clock))
    trainer.fit(model, data)
    best = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    model.load_state_dict(best["state_dict"])
    return model, clock.summarize()


def train_frozen(options, clock):
    model, result = train(options, clock, "head_only")
    test = read_catalog(options, "test")
    probabilities = predict(model, test, options)["ring"]
    return {**result, "test": score_table(test, probabilities)}


def train_unfrozen(options, clock):
    return train(options, clock, "full")[1]


def predict(model, catalog, options):
    return predict_on_catalog.predict(
        catalog,
        model,
        str(Path(options.scratch) / "predictions.csv"),
        label_cols=CLASS_NAMES,
        inference_transform=get_galaxy_transform(minimal_view_config()),
        datamodule_kwargs={"batch_size": options.batch_size, "num_workers": options.workers},
        trainer_kwargs={"enable_progress_bar": False, "logger": False},
    )


def predict_catalog(options, clock):
    catalog, model = read_catalog(options, "all"), load_model(options, "head_only")
    rate = measure_prediction(lambda chosen: predict(model, chosen, options), catalog, options, clock)
    return {"images_per_second": rate}


def prepare_data(options, clock):
    catalog = read_catalog(options, "train")
    transform = get_galaxy_transform(default_view_config())
    galaxies = itertools.cycle(CatalogDataset(catalog, label_cols=["label"], transform=transform))
    return measure_data_path(lambda: len([next(galaxies)]), len(catalog))


if __name__ == "__main__":
    run_task(
        __doc__,
        {"frozen": train_frozen, "unfrozen": train_unfrozen, "prediction": predict_catalog, "data": prepare_data},
    )

"""Measures this package through its public names, with its defaults.

Tasks: `frozen` and `unfrozen`, the two stages; `prediction`, a catalog, and `prediction_memory`, one once; `data`, the
training transform alone; `stored_embeddings`, a frozen stage whose encoder costs next to nothing, so that what is left
is the training on stored embeddings.
"""

import io
from itertools import product

import numpy as np
import torch
from competitor import CLASS_NAMES, measure_data_path, read_catalog, run_task, score_table
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage
from trainer_clock import ClockCallback
from transformers import ConvNextConfig, set_seed

from zoobot_hf import (
    FrozenStageArguments,
    FrozenStageTrainer,
    UnfrozenStageArguments,
    UnfrozenStageTrainer,
    ZoobotConfig,
    ZoobotForImageClassification,
    ZoobotImageProcessor,
    catalog_to_dataset,
    image_processor_for,
    predict_galaxies,
)

EMBEDDING_SIZE = 640
SMALL_PIXELS = 16
VALIDATION_GALAXIES = 1000


def load_model(options):
    model = ZoobotForImageClassification.from_pretrained(options.encoder, label_names=CLASS_NAMES)
    return model, image_processor_for(options.encoder)


def read_dataset(options, split):
    return catalog_to_dataset(read_catalog(options, split), label_column="label", label_names=CLASS_NAMES)


def common_arguments(options):
    return {
        "output_dir": options.scratch,
        "num_train_epochs": options.epochs,
        "early_stopping_patience": None,
        "disable_tqdm": True,
        "seed": options.seed,
        **options.arguments,
    }


def train_frozen(options, clock):
    set_seed(options.seed)
    model, processor = load_model(options)
    trainer = FrozenStageTrainer(
        model,
        FrozenStageArguments(**common_arguments(options)),
        processing_class=processor,
        train_dataset=read_dataset(options, "train"),
        eval_dataset=read_dataset(options, "validation"),
    )
    trainer.add_callback(ClockCallback(clock, len(trainer.train_dataset)))
    trainer.train()
    result = clock.summarize()
    logits = torch.tensor(trainer.predict(read_dataset(options, "test")).predictions)
    return {**result, "test": score_table(read_catalog(options, "test"), logits.softmax(dim=1)[:, 1])}


def train_unfrozen(options, clock):
    model, processor = load_model(options)
    arguments = {
        **common_arguments(options),
        "per_device_train_batch_size": options.batch_size,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
    }
    trainer = UnfrozenStageTrainer(
        model,
        UnfrozenStageArguments(**arguments),
        processing_class=processor,
        train_dataset=read_dataset(options, "train"),
    )
    trainer.add_callback(ClockCallback(clock, len(trainer.train_dataset)))
    trainer.train()
    return clock.summarize()


def predict_catalog(options, clock):
    """The best of eager and compiled, at the default batch size and at the given one, as for the bare loop."""
    rates = {}
    for is_compiled, batch_size in product((False, True), (None, options.batch_size)):
        torch.compiler.reset()
        name = f"{'compiled' if is_compiled else 'eager'}, batch {batch_size or 'default'}"
        rates[name] = rate_of_prediction(options, clock, batch_size=batch_size, torch_compile=is_compiled)
    return {"images_per_second": max(rates.values()), "rates": rates}


def predict_once(options, clock):
    return {"images_per_second": rate_of_prediction(options, clock)}


def rate_of_prediction(options, clock, **settings):
    """Images per second, after a short catalog for warming up."""
    model, processor = load_model(options)
    catalog = read_catalog(options, "all")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    predict_galaxies(model, processor, catalog.head(2 * options.batch_size), device=device, **settings)
    started = clock.seconds()
    predictions = predict_galaxies(model, processor, catalog, device=device, **settings)
    assert len(predictions.table) == len(catalog)
    return len(catalog) / (clock.seconds() - started)


class NoModel(torch.nn.Module):
    """Takes a batch and costs nothing."""

    def forward(self, pixel_values, labels):
        return {"loss": pixel_values[0, 0, 0, 0]}


def prepare_data(options, clock):
    model, processor = load_model(options)
    dataset = read_dataset(options, "train")
    trainer = UnfrozenStageTrainer(
        model,
        UnfrozenStageArguments(**{**common_arguments(options), "dataloader_num_workers": 0}),
        processing_class=processor,
        train_dataset=dataset,
        eval_dataset=dataset,
    )

    def batches():
        while True:
            yield from trainer.get_train_dataloader()

    stream, nothing = batches(), NoModel()

    def prepare():
        batch = next(stream)
        trainer.compute_loss(nothing, batch)
        return len(batch["labels"])

    return measure_data_path(prepare, len(dataset))


def train_on_stored_embeddings(options, clock):
    """A frozen stage over many small images; the second run finds their embeddings stored."""
    set_seed(options.seed)
    encoder = ConvNextConfig(
        hidden_sizes=[EMBEDDING_SIZE], depths=[1], num_stages=1, image_size=SMALL_PIXELS, patch_size=SMALL_PIXELS
    )
    model = ZoobotForImageClassification(ZoobotConfig(encoder, id2label=dict(enumerate(CLASS_NAMES))))
    # One view: as many embeddings as galaxies.
    arguments = FrozenStageArguments(**{"augment": False, **common_arguments(options)})
    trainer = FrozenStageTrainer(
        model,
        arguments,
        processing_class=ZoobotImageProcessor(SMALL_PIXELS),
        train_dataset=draw_small_images(options.galaxies, seed=1),
        eval_dataset=draw_small_images(VALIDATION_GALAXIES, seed=2),
    )
    trainer.add_callback(ClockCallback(clock, options.galaxies))
    trainer.train()
    return clock.summarize()


def draw_small_images(count, *, seed):
    """Noise, a little brighter for one class; kept in the datasets cache, so that a second run has the same dataset."""
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)})
    return Dataset.from_generator(small_images, features=features, gen_kwargs={"count": count, "seed": seed})


def small_images(count, seed):
    rng = np.random.default_rng(seed)
    for number in range(count):
        label = number % 2
        noise = rng.normal(100 + 10 * label, 30, (SMALL_PIXELS, SMALL_PIXELS, 3))
        buffer = io.BytesIO()
        PillowImage.fromarray(noise.clip(0, 255).astype(np.uint8)).save(buffer, format="PNG", compress_level=1)
        yield {"image": {"bytes": buffer.getvalue(), "path": None}, "label": label}


if __name__ == "__main__":
    run_task(
        __doc__,
        {
            "frozen": train_frozen,
            "unfrozen": train_unfrozen,
            "prediction": predict_catalog,
            "prediction_memory": predict_once,
            "data": prepare_data,
            "stored_embeddings": train_on_stored_embeddings,
        },
    )

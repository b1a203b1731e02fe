"""Measures this package through its public names, with its defaults.

Tasks: `frozen` and `unfrozen`, the two stages; `prediction`, a catalog, and `prediction_memory`, one once; `data`, the
training transform alone; `embeddings`, the one pass of the encoder over the default views; `reading`, images from files
to batches with no encoder behind; `stored_embeddings`, a frozen stage whose encoder costs next to nothing, so that what
is left is the training on stored embeddings.
"""

import io
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from competitor import CLASS_NAMES, Clock, measure_data_path, measure_prediction, read_catalog, run_task, score_table
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
from zoobot_hf.data.images import open_image
from zoobot_hf.training.embedding_cache import Views, compute_embeddings
from zoobot_hf.training.machine import InferenceRunner, default_batch_size

EMBEDDING_SIZE = 640
SMALL_PIXELS = 16
VALIDATION_GALAXIES = 1000


def load_model(options):
    model = ZoobotForImageClassification.from_pretrained(options.encoder, label_names=CLASS_NAMES)
    return model, image_processor_for(options.encoder)


def read_dataset(options, split):
    # Rows that repeat an image are the same galaxy; a dataset takes no image under two names.
    catalog = read_catalog(options, split).assign(id_str=lambda rows: rows["file_loc"])
    return catalog_to_dataset(catalog, label_column="label", label_names=CLASS_NAMES)


def common_arguments(options):
    return {
        "output_dir": options.scratch,
        "num_train_epochs": options.epochs,
        "early_stopping_patience": None,
        "disable_tqdm": True,
        "seed": options.seed,
        "bf16": options.bf16,
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
    """The best of eager and compiled, as for the bare loop; on a GPU gpu.py has both."""
    results = {}
    for name, torch_compile in (("eager", False), ("compiled", True)):
        torch.compiler.reset()
        results[name] = train_unfrozen_once(options, Clock(), torch_compile=torch_compile)
    rates = {name: result["images_per_second"] for name, result in results.items()}
    return {**max(results.values(), key=lambda result: result["images_per_second"]), "rates": rates}


def train_unfrozen_once(options, clock, *, torch_compile):
    model, processor = load_model(options)
    arguments = {
        **common_arguments(options),
        "per_device_train_batch_size": options.batch_size,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "torch_compile": torch_compile,
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
    batch_sizes = dict.fromkeys((default_batch_size(choose_device()), options.batch_size))
    for is_compiled, batch_size in product((False, True), batch_sizes):
        torch.compiler.reset()
        name = f"{'compiled' if is_compiled else 'eager'}, batch {batch_size}"
        rates[name] = rate_of_prediction(options, clock, batch_size=batch_size, torch_compile=is_compiled)
    return {"images_per_second": max(rates.values()), "rates": rates}


def predict_once(options, clock):
    return {"images_per_second": rate_of_prediction(options, clock)}


def rate_of_prediction(options, clock, **settings):
    model, processor = load_model(options)
    catalog = read_catalog(options, "all")
    settings |= {"device": choose_device(), "bf16": options.bf16}

    def predict(chosen):
        predictions = predict_galaxies(model, processor, chosen, **settings)
        assert len(predictions.table) == len(chosen)

    return measure_prediction(predict, catalog, options, clock)


def choose_device():
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def embed_galaxies(options, clock):
    return {"images_per_second": rate_of_embedding(options, clock, torch_compile=False)}


def rate_of_embedding(options, clock, *, torch_compile):
    """Views per second; each galaxy is a file of its own, because the cache takes equal ones together."""
    model, processor = load_model(options)
    model.to(choose_device())
    catalog, folder = read_catalog(options, "all"), Path(options.scratch)
    catalog["file_loc"] = [link(path, folder / f"{number}.jpg") for number, path in enumerate(catalog["file_loc"])]
    dataset = catalog_to_dataset(catalog, label_column="label", label_names=CLASS_NAMES)
    views = Views(FrozenStageArguments(options.scratch).views)
    settings = {"views": views, "torch_compile": torch_compile, "cache_dir": folder / "embeddings"}
    compute_embeddings(model, dataset.select(range(2 * options.batch_size)), processor, **settings)
    started = clock.seconds()
    rows = compute_embeddings(model, dataset, processor, **settings)
    return len(rows) / (clock.seconds() - started)


def link(target, path):
    path.symlink_to(target)
    return str(path)


def read_images(options, clock):
    """Batches on the device as the encoder would get them."""
    model, processor = load_model(options)
    paths = read_catalog(options, "all")["file_loc"]
    read = partial(read_image, processor=processor)
    started = clock.seconds()
    with InferenceRunner(model.to(choose_device()), batch_size=default_batch_size(choose_device())) as runner:
        for images in runner.read(read, paths, collate=torch.stack):
            processor.rescale_and_normalize(images.to(runner.device))
    return {"images_per_second": len(paths) / (clock.seconds() - started)}


def read_image(path, processor):
    return processor.crop_and_resize(open_image(path))


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
            "embeddings": embed_galaxies,
            "reading": read_images,
            "data": prepare_data,
            "stored_embeddings": train_on_stored_embeddings,
        },
    )

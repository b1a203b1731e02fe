"""Measures plain `transformers.Trainer` with the ordinary image-classification recipe.

Tasks: `frozen` (all but the classifier's weights frozen, 1e-3) and `unfrozen` (5e-5, Trainer's own default); `data`,
the training transform alone. The recipe is that of transformers' `run_image_classification.py`: a random resized crop,
a horizontal flip and the normalisation that the encoder's repository states, in a transform of the dataset.
"""

import itertools

import torch
from competitor import CLASS_NAMES, measure_data_path, read_catalog, run_task, score_table
from datasets import Dataset, Image
from torchvision import transforms
from trainer_clock import ClockCallback
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

LEARNING_RATES = {"frozen": 1e-3, "unfrozen": 5e-5}


def load_model(options):
    return AutoModelForImageClassification.from_pretrained(
        options.encoder, num_labels=len(CLASS_NAMES), ignore_mismatched_sizes=True
    )


def transforms_for(model):
    stated = model.config.pretrained_cfg
    pixels, normalize = stated["input_size"][-1], transforms.Normalize(stated["mean"], stated["std"])
    ending = [transforms.ToTensor(), normalize]
    training = [transforms.RandomResizedCrop(pixels), transforms.RandomHorizontalFlip(), *ending]
    evaluation = [transforms.Resize(pixels), transforms.CenterCrop(pixels), *ending]
    return transforms.Compose(training), transforms.Compose(evaluation)


def read_dataset(options, split, transform):
    catalog = read_catalog(options, split)
    columns = {"image": catalog["file_loc"].tolist(), "label": catalog["label"].tolist()}
    dataset = Dataset.from_dict(columns).cast_column("image", Image())

    def apply(rows):
        return {
            "pixel_values": [transform(image.convert("RGB")) for image in rows["image"]],
            "labels": rows["label"],
        }

    return dataset.with_transform(apply)


def train(options, clock, model, **arguments):
    set_seed(options.seed)
    training, evaluation = transforms_for(model)
    settings = TrainingArguments(
        output_dir=options.scratch,
        num_train_epochs=options.epochs,
        learning_rate=LEARNING_RATES[options.task],
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        dataloader_num_workers=options.workers,
        dataloader_persistent_workers=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        seed=options.seed,
        **arguments,
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=read_dataset(options, "train", training),
        eval_dataset=read_dataset(options, "validation", evaluation),
    )
    trainer.add_callback(ClockCallback(clock, len(trainer.train_dataset)))
    trainer.train()
    return trainer, clock.summarize()


def train_frozen(options, clock):
    model = load_model(options)
    model.requires_grad_(False)
    model.timm_model.get_classifier().requires_grad_(True)
    each_epoch = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer, result = train(options, clock, model, **each_epoch, save_total_limit=1)
    test = read_dataset(options, "test", transforms_for(model)[1])
    logits = torch.tensor(trainer.predict(test).predictions)
    return {**result, "test": score_table(read_catalog(options, "test"), logits.softmax(dim=1)[:, 1])}


def train_unfrozen(options, clock):
    return train(options, clock, load_model(options), save_strategy="no")[1]


def prepare_data(options, clock):
    dataset = read_dataset(options, "train", transforms_for(load_model(options))[0])
    galaxies = itertools.cycle(range(len(dataset)))
    return measure_data_path(lambda: len([dataset[next(galaxies)]]), len(dataset))


if __name__ == "__main__":
    run_task(__doc__, {"frozen": train_frozen, "unfrozen": train_unfrozen, "data": prepare_data})

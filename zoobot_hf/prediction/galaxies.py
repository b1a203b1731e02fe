"""Galaxies to a model's outputs: batch by batch, the images decoded while the encoder works."""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from zoobot_hf.data.catalog import read_galaxy_names
from zoobot_hf.data.images import UnreadableImageError, open_image
from zoobot_hf.models.configuration_zoobot import ZoobotConfig
from zoobot_hf.models.heads import probabilities_from_logits
from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ModelWithHead, ZoobotPreTrainedModel
from zoobot_hf.training.machine import InferenceRunner, default_batch_size

from .tables import survey_table

FAILURE_COLUMNS = ["id_str", "file_loc", "reason"]
Row = dict[Hashable, Any]
Values = npt.NDArray[np.floating[Any]]
Interpret = Callable[[Tensor], Values]


class Predictions(NamedTuple):
    """What a model says of a catalog.

    Attributes:
        table: A row for each galaxy that could be read, in the catalog's order, as `survey_table` makes it.
        failures: A row for each galaxy that could not: `id_str`, `file_loc`, `reason`.
    """

    table: pd.DataFrame
    failures: pd.DataFrame


class Galaxy(NamedTuple):
    """What became of one galaxy.

    Attributes:
        row: Its `id_str` and `file_loc`; None for a place that was left empty.
        output: (labels,), float32: probabilities, a regression's values or concentrations; or (embedding_size,), an
            embedding; None where it failed.
        reason: Why it failed.
    """

    row: Row | None
    output: Values | None
    reason: str


def predict_galaxies(
    model: ModelWithHead,
    processor: ZoobotImageProcessor,
    catalog: pd.DataFrame,
    *,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    prevalence: str | None = None,
    torch_compile: bool = False,
    bf16: bool | None = None,
) -> Predictions:
    """The predictions for every galaxy of a catalog, and the galaxies that can't be read.

    All of them are held in memory; `predict_survey` is for catalogs of any size.

    Args:
        model: A finetuned model.
        processor: The image processor that was saved with it.
        catalog: With `id_str` and `file_loc`, as `read_galaxies` returns it.
        batch_size: Galaxies that the encoder sees at once; what suits the device when absent.
        device: Where the model runs.
        prevalence: "sky" or "training": for galaxies with that prevalence; what the model's outputs are for when
            absent.
        torch_compile: Whether to compile the model, which pays from some thousand images on.
        bf16: Whether the encoder computes in bfloat16, which is faster and moved the probabilities of 470 real rings by
            0.01 (root mean square; at most 0.05); when absent, on a GPU that has it in hardware.

    Raises:
        CatalogError: What `read_galaxy_names` refuses.
        ValueError: A prevalence that isn't known, or that the model lacks; or a batch_size below 1.
    """
    check_prevalence(model, prevalence)
    interpret = functools.partial(read_outputs, config=model.config, prevalence=prevalence)
    rows = read_galaxy_names(catalog, source="the catalog").to_dict("records")
    found, failures = [], []
    with (
        inference_runner(model, batch_size, device=device, torch_compile=torch_compile, bf16=bf16) as runner,
        tqdm(total=len(catalog), desc="predicting", unit="galaxy") as progress,
    ):
        for batch in run_galaxies(runner, processor, rows, interpret=interpret):
            found += [galaxy for galaxy in batch if galaxy.output is not None]
            failures += [galaxy for galaxy in batch if galaxy.output is None]
            progress.update(len(batch))
            progress.set_postfix(failures=len(failures))
    table = table_of(found, model, prevalence=prevalence)
    return Predictions(table, pd.DataFrame([failure_row(galaxy) for galaxy in failures], columns=FAILURE_COLUMNS))


@contextlib.contextmanager
def inference_runner(
    model: ZoobotPreTrainedModel,
    batch_size: int | None,
    *,
    device: str | torch.device,
    torch_compile: bool,
    bf16: bool | None,
) -> Iterator[InferenceRunner]:
    """What runs the model; afterwards the model's memory is as it was, so that it can be saved.

    Args:
        model: The model; it is moved to the device and left in evaluation mode.
        batch_size: Galaxies that the encoder sees at once; what suits the device when absent.
        device: Where the model runs.
        torch_compile: Whether to compile the model.
        bf16: As in `predict_galaxies`.

    Raises:
        ValueError: A batch_size below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give 1 or more, or leave it out for what suits the device.")
    model.to(device)
    size = batch_size or default_batch_size(model.device)
    try:
        with InferenceRunner(model, batch_size=size, torch_compile=torch_compile, bf16=bf16) as runner:
            yield runner
    finally:
        model.to(memory_format=torch.contiguous_format)  # safetensors saves no other


def run_galaxies(
    runner: InferenceRunner, processor: ZoobotImageProcessor, rows: Iterable[Row | None], *, interpret: Interpret
) -> Iterator[list[Galaxy]]:
    """Batches of what became of the galaxies, in the order of the rows; the next are decoded while the encoder works.

    A galaxy that can't be read keeps its place in its batch, so that no other galaxy's output depends on it.

    Args:
        runner: From `inference_runner`.
        processor: The image processor that was saved with the runner's model.
        rows: Each with `id_str` and `file_loc`, and with `read`, a function that gives the content of the image's file,
            where that is no file at `file_loc`; None for a place in a batch that stays empty.
        interpret: What to keep of a batch of the model's outputs, a row for each.
    """
    read = functools.partial(_read_galaxy, processor=processor)
    for read_rows, images in runner.read(read, rows, collate=_collate):
        if images is None:
            yield [Galaxy(row, None, reason or "") for row, reason in read_rows]
            continue
        outputs = interpret(runner(processor.rescale_and_normalize(images.to(runner.device))))
        yield [_judge(row, reason, output) for (row, reason), output in zip(read_rows, outputs, strict=True)]


def read_outputs(outputs: Tensor, *, config: ZoobotConfig, prevalence: str | None) -> Values:
    """What a model's outputs say: probabilities, a regression's values or concentrations, float32, (batch, labels).

    Args:
        outputs: In evaluation mode, (batch, labels).
        config: The model's configuration.
        prevalence: As in `predict_galaxies`.
    """
    if config.problem_type != "votes":
        outputs = probabilities_from_logits(outputs, config, prevalence=prevalence)
    return np.asarray(outputs.numpy(), dtype=np.float32)


def table_of(galaxies: list[Galaxy], model: ModelWithHead, *, prevalence: str | None) -> pd.DataFrame:
    """The table of galaxies that could be read, in their order.

    Args:
        galaxies: Each with an output.
        model: The model that gave it.
        prevalence: As in `predict_galaxies`.
    """
    outputs = [galaxy.output for galaxy in galaxies if galaxy.output is not None]
    values = np.stack(outputs) if outputs else np.empty((0, model.config.num_labels), np.float32)
    identifiers = [galaxy.row["id_str"] for galaxy in galaxies if galaxy.row is not None]
    return survey_table(identifiers, values, config=model.config, prevalence=prevalence)


def failure_row(galaxy: Galaxy) -> dict[str, str]:
    """The row of a table of failures.

    Args:
        galaxy: One without an output.
    """
    assert galaxy.row is not None
    return {"id_str": galaxy.row["id_str"], "file_loc": galaxy.row["file_loc"], "reason": galaxy.reason}


def check_prevalence(model: ModelWithHead, prevalence: str | None) -> None:
    """Nothing, if the model has predictions for this prevalence: known before a long run.

    Args:
        model: The model.
        prevalence: As in `predict_galaxies`.

    Raises:
        ValueError: Another prevalence, or one that the model lacks.
    """
    if prevalence is not None and model.config.problem_type == "votes":
        raise ValueError(f"prevalence is {prevalence!r}; a decision tree's model has none: leave it out.")
    if model.config.problem_type != "votes":
        probabilities_from_logits(torch.zeros(1, model.config.num_labels), model.config, prevalence=prevalence)


class _Read(NamedTuple):
    """A row that was read: without the file's content, which is not kept, and why there is no image."""

    row: Row | None
    image: Tensor | None
    reason: str


def _read_galaxy(row: Row | None, *, processor: ZoobotImageProcessor) -> _Read:
    if row is None:
        return _Read(None, None, "")
    load = row.get("read")
    row = {"id_str": row["id_str"], "file_loc": row["file_loc"]}
    try:
        image = open_image(row["file_loc"] if load is None else load())
        return _Read(row, processor.crop_and_resize(image), "")
    except UnreadableImageError as error:
        return _Read(row, None, str(error))
    except ValueError as error:
        return _Read(row, None, f"the processor refuses it: {error}")
    except OSError as error:
        return _Read(row, None, f"it can't be opened: {error.strerror or error}")


def _collate(batch: list[_Read]) -> tuple[list[tuple[Row | None, str | None]], Tensor | None]:
    """Each row with the reason why its image is a blank one, None where it isn't; and the images, if there are any."""
    shape = next((read.image.shape for read in batch if read.image is not None), None)
    rows = [(read.row, read.reason if read.image is None else None) for read in batch]
    if shape is None:
        return rows, None
    blank = torch.zeros(shape, dtype=torch.uint8)
    return rows, torch.stack([blank if read.image is None else read.image for read in batch])


def _judge(row: Row | None, reason: str | None, output: Values) -> Galaxy:
    if reason is not None:
        return Galaxy(row, None, reason)
    if not np.isfinite(output).all():
        return Galaxy(row, None, f"the model's output for it is not a finite number in {output.dtype}")
    return Galaxy(row, output, "")

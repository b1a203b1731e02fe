"""A catalog of galaxies to a table of predictions."""

from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from zoobot_hf.data.images import DECODING_THREADS, UnreadableImageError, open_image
from zoobot_hf.evaluation.tables import prediction_table
from zoobot_hf.models.heads import probabilities_from_logits
from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ZoobotForImageClassification
from zoobot_hf.training.machine import tune_memory_allocator


class Predictions(NamedTuple):
    """What a model says of a catalog.

    Attributes:
        table: A row for each galaxy that could be read, in the catalog's order, as `prediction_table` makes it.
        failures: A row for each galaxy that could not: `id_str`, `file_loc`, `reason`.
    """

    table: pd.DataFrame
    failures: pd.DataFrame


def predict_galaxies(
    model: ZoobotForImageClassification,
    processor: ZoobotImageProcessor,
    catalog: pd.DataFrame,
    *,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> Predictions:
    """The predictions for every galaxy of a catalog, and the galaxies that can't be read.

    Args:
        model: A finetuned model.
        processor: The image processor that was saved with it.
        catalog: With `id_str` and `file_loc`, as `read_galaxies` returns it.
        batch_size: Galaxies that the encoder sees at once.
        device: Where the model runs.
    """
    tune_memory_allocator()
    model = model.to(device).eval()
    identifiers, outputs, failures = [], [], []
    with tqdm(total=len(catalog), desc="predicting", unit="galaxy") as progress:
        for batch in _batches(processor, catalog, batch_size):
            read = [(row, image) for row, image, reason in batch if reason is None]
            failures += [{**row, "reason": reason} for row, _, reason in batch if reason is not None]
            if read:
                fields = torch.stack([image for _, image in read])
                identifiers += [row["id_str"] for row, _ in read]
                outputs.append(_predict(model, processor.rescale_and_normalize(fields).to(device)))
            progress.update(len(batch))
            progress.set_postfix(failures=len(failures))
    values = np.concatenate(outputs) if outputs else np.empty((0, model.config.num_labels), np.float32)
    table = prediction_table(
        identifiers, values, label_names=model.config.label_names, problem_type=model.config.problem_type
    )
    return Predictions(table, pd.DataFrame(failures, columns=["id_str", "file_loc", "reason"]))


@torch.inference_mode()
def _predict(model: ZoobotForImageClassification, pixel_values: Tensor) -> np.ndarray:
    logits = model(pixel_values=pixel_values).logits
    return probabilities_from_logits(logits, model.config).cpu().numpy()


Row = dict[Hashable, Any]
Opened = tuple[Row, Tensor, str | None]


def _batches(processor: ZoobotImageProcessor, catalog: pd.DataFrame, batch_size: int) -> Iterator[list[Opened]]:
    """Batches in the catalog's order; the next one is decoded while the encoder works on the last."""
    rows = catalog[["id_str", "file_loc"]].to_dict("records")

    def read(row: Row) -> Opened:
        try:
            return row, processor.crop_and_resize(open_image(row["file_loc"])), None
        except UnreadableImageError as error:
            return row, torch.empty(0), str(error)
        except ValueError as error:
            return row, torch.empty(0), f"the processor refuses it: {error}"

    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        ahead = [pool.submit(read, row) for row in rows[: 2 * batch_size]]
        for start in range(0, len(rows), batch_size):
            ahead, now = ahead[batch_size:], ahead[:batch_size]
            following = start + 2 * batch_size
            batch = [future.result() for future in now]
            ahead += [pool.submit(read, row) for row in rows[following : following + batch_size]]
            yield batch

"""A catalog of any size to a folder of predictions, by any number of processes; a run that was stopped goes on.

The folder holds `predictions/`, Parquet files that `pandas.read_parquet` reads as one table in the catalog's order;
`failures.parquet`, once all is done, with the galaxies that could not be predicted; and `manifest.json`, which says
what made them. Each file of predictions belongs to fixed rows of the catalog, and each galaxy has a fixed place in a
batch, so that the table does not depend on how many processes there were, or how often they were stopped.
"""

import functools
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import torch

from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ModelWithHead
from zoobot_hf.training.embedding_cache import hash_weights
from zoobot_hf.training.machine import prepare_processes, uses_bf16

from .galaxies import (
    Galaxy,
    check_prevalence,
    inference_runner,
    read_outputs,
    table_of,
)
from .pieces import Source, check_catalog, find_source, name_of, read_pieces
from .runs import (
    GALAXIES_IN_A_SHARD,
    Survey,
    WorkOnImages,
    describe_run,
    finish_run,
    hash_text,
    run_shards,
    start_run,
)


def predict_survey(
    model: ModelWithHead,
    processor: ZoobotImageProcessor,
    catalog: Source,
    output: str | Path,
    *,
    model_name: str = "",
    batch_size: int | None = None,
    shard_size: int = GALAXIES_IN_A_SHARD,
    device: str | torch.device = "cpu",
    prevalence: str | None = None,
    torch_compile: bool = False,
    bf16: bool | None = None,
    retry_failures: bool = False,
    max_failures: int | None = None,
) -> Survey:
    """The predictions for a catalog of any size, in a folder; the same call goes on with a run that was stopped.

    Memory does not grow with the catalog, but for 8 bytes a galaxy while it is checked. Under `accelerate launch` the
    processes share the work; all must see the same folders.

    Args:
        model: A finetuned model: a classifier, or one with a decision tree.
        processor: The image processor that was saved with it.
        catalog: A catalog file, a folder with a catalog or images, a tar archive, a table, or a pattern for many
            files: see `read_pieces`; or a Hub dataset, as a `HubDataset` or by its id.
        output: A folder; it is made, or holds the earlier run. See the module's first lines.
        model_name: Where the model is from, for the manifest.
        batch_size: Galaxies that the encoder sees at once; what suits the device, or what the earlier run had, when
            absent.
        shard_size: Galaxies in a file; the earlier run's counts when there is one.
        device: Where the model runs.
        prevalence: "sky" or "training": for galaxies with that prevalence; what the model's outputs are for when
            absent.
        torch_compile: Whether to compile the model.
        bf16: As in `predict_galaxies`.
        retry_failures: Whether galaxies that failed in an earlier run are tried again.
        max_failures: More failures than this in one process's share stop the run.

    Returns:
        The same in every process, once all are done.

    Raises:
        CatalogError: The catalog can't be read, is empty, or has a name twice; the Hub can't be reached.
        SurveyError: The folder holds a model, or the predictions of another model or catalog or of another precision;
            or there are too many failures.
        OSError: No space left, or no right to write; finished files stay.
        ValueError: A prevalence that the model lacks, or a size below 1.
    """
    check_prevalence(model, prevalence)
    prepare_processes()
    model.to(device)
    source = find_source(catalog)
    wanted = describe_run(
        "predictions",
        model=model,
        model_name=model_name,
        weights=hash_model(model),
        processor=processor,
        catalog=name_of(source),
        facts=check_catalog(source),
        shard_size=shard_size,
        batch_size=batch_size,
        prevalence=prevalence or model.config.predictions_for,
        bf16=uses_bf16(model.device, bf16),
    )
    folder = Path(output)
    manifest = start_run(folder, wanted)
    size = batch_size or manifest["batch_size"]

    def tabulate(galaxies: list[Galaxy]) -> pa.Table:
        return arrow_table(table_of(galaxies, model, prevalence=prevalence))

    interpret = functools.partial(read_outputs, config=model.config, prevalence=prevalence)
    with inference_runner(model, size, device=device, torch_compile=torch_compile, bf16=bf16) as runner:
        work = WorkOnImages(runner, processor, verb="predicting", interpret=interpret, tabulate=tabulate)
        pieces = read_pieces(source, rows=manifest["shard_size"])
        run_shards(folder, manifest, work, pieces, retry_failures=retry_failures, max_failures=max_failures)
    return finish_run(folder, manifest)


def hash_model(model: ModelWithHead) -> str:
    """A hash of all that a model's predictions depend on besides the image processor.

    Args:
        model: The model.
    """
    # The configuration has the calibration, the prevalences and the threshold.
    return hash_text(json.dumps(model.config.decisive, sort_keys=True), hash_weights(model))


def arrow_table(table: pd.DataFrame) -> pa.Table:
    """A table of predictions as a shard holds it.

    Args:
        table: As `survey_table` makes it.
    """
    # Stated, because a table without a single row would not know the types of its columns.
    kinds = {"bool": pa.bool_(), "float32": pa.float32()}
    schema = pa.schema([(str(name), kinds.get(str(table[name].dtype), pa.string())) for name in table.columns])
    return pa.Table.from_pandas(table, schema=schema, preserve_index=False)

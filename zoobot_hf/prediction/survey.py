"""A catalog of any size to a folder of predictions, by any number of processes; a run that was stopped goes on.

The folder holds `predictions/`, Parquet files that `pandas.read_parquet` reads as one table in the catalog's order;
`failures.parquet`, once all is done, with the galaxies that could not be predicted; and `manifest.json`, which says
what made them. Each file of predictions belongs to fixed rows of the catalog, and each galaxy has a fixed place in a
batch, so that the table does not depend on how many processes there were, or how often they were stopped.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from tqdm import tqdm

from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.training.machine import InferenceRunner, default_batch_size

from .galaxies import (
    FAILURE_COLUMNS,
    Classifier,
    Galaxy,
    Predictions,
    Row,
    check_prevalence,
    failure_row,
    inference_runner,
    predict_galaxies,
    run_galaxies,
    table_of,
)
from .pieces import Source, check_catalog, fingerprint_rows, read_pieces
from .shards import Shard, read_failures, read_shard, remove_partial_files, shard_paths, whole_file, write_shard

__all__ = ["Predictions", "Survey", "SurveyError", "predict_galaxies", "predict_survey"]

logger = logging.getLogger(__name__)

FORMAT = 1
GALAXIES_IN_A_SHARD = 4096
SECONDS_BETWEEN_LOOKS = 0.2
LIBRARIES = ("zoobot-hf", "torch", "transformers", "timm", "pillow", "astropy")
# What must be the same when a run goes on, and what to call it in an error.
FIXED = {
    "format": "a version of zoobot_hf with another layout of this folder",
    "weights": "another model",
    "processor": "another image processor",
    "prevalence": "another prevalence",
    "catalog_fingerprint": "another catalog, or one that has changed since",
}


class SurveyError(RuntimeError):
    """A survey's predictions can't go on; what is finished stays."""


class Survey(NamedTuple):
    """What a finished run left.

    Attributes:
        folder: Where it is.
        galaxies: Rows of the catalog.
        failures: How many of them could not be predicted.
    """

    folder: Path
    galaxies: int
    failures: int


def predict_survey(
    model: Classifier,
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
    retry_failures: bool = False,
    max_failures: int | None = None,
) -> Survey:
    """The predictions for a catalog of any size, in a folder; the same call goes on with a run that was stopped.

    Memory does not grow with the catalog, but for 8 bytes a galaxy while it is checked. Under `accelerate launch` the
    processes share the work; all must see the same folders.

    Args:
        model: A finetuned model: a classifier, or one with a decision tree.
        processor: The image processor that was saved with it.
        catalog: A catalog file, a folder with a catalog or images, a table, or a pattern for many files: see
            `read_pieces`.
        output: A folder; it is made, or holds the earlier run. See the module's first lines.
        model_name: Where the model is from, for the manifest.
        batch_size: Galaxies that the encoder sees at once; what suits the device, or what the earlier run had, when
            absent.
        shard_size: Galaxies in a file; the earlier run's counts when there is one.
        device: Where the model runs.
        prevalence: "sky" or "training": for galaxies with that prevalence; what the model's outputs are for when
            absent.
        torch_compile: Whether to compile the model.
        retry_failures: Whether galaxies that failed in an earlier run are tried again.
        max_failures: More failures than this in one process's share stop the run.

    Returns:
        The same in every process, once all are done.

    Raises:
        CatalogError: The catalog can't be read, is empty, or has a name twice.
        SurveyError: The folder holds the predictions of another model or catalog, or there are too many failures.
        OSError: No space left, or no right to write; finished files stay.
        ValueError: A prevalence that the model lacks, or a size below 1.
    """
    check_prevalence(model, prevalence)
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; give at least 1.")
    # Gives each process its GPU; told nothing, it takes several processes without a GPU for single ones.
    PartialState(cpu=not torch.cuda.is_available())
    model.to(device)
    facts = check_catalog(catalog)
    wanted = {
        "format": FORMAT,
        "model": model_name,
        "weights": _hash_model(model),
        "processor": processor.to_dict(),
        "prevalence": prevalence or model.config.predictions_for,
        "catalog": "a table" if isinstance(catalog, pd.DataFrame) else str(catalog),
        "catalog_fingerprint": facts.fingerprint,
        "galaxies": facts.galaxies,
        "shard_size": shard_size,
        "batch_size": batch_size or default_batch_size(model.device),
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "versions": {library: version(library) for library in LIBRARIES},
        "finished": False,
        "failures": None,
    }
    # As it reads once it was written: lists instead of tuples, text instead of numbers for the names of fields.
    wanted = json.loads(json.dumps(wanted, default=str))
    manifest = _start(Path(output), wanted)
    run = _Run(model, processor, Path(output), manifest, prevalence=prevalence, retry=retry_failures, most=max_failures)
    with inference_runner(
        model, batch_size=batch_size or manifest["batch_size"], device=device, torch_compile=torch_compile
    ) as runner:
        run.predict(read_pieces(catalog, rows=manifest["shard_size"]), runner)
    return _finish(Path(output), manifest)


class _Run:
    """One process's share of a survey: every so many-th of its shards."""

    def __init__(
        self,
        model: Classifier,
        processor: ZoobotImageProcessor,
        folder: Path,
        manifest: dict[str, Any],
        *,
        prevalence: str | None,
        retry: bool,
        most: int | None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.prevalence = prevalence
        self.retry = retry
        self.most = most
        self.failures = 0
        self.paths = list(shard_paths(folder / "predictions", _shards(manifest)))
        self.size = manifest["shard_size"]
        self.total = manifest["galaxies"]
        # The shard's own rows come with it. What else it depends on does not change between the shards.
        self.settings = _hash(*(json.dumps(manifest[name], sort_keys=True) for name in FIXED))

    def predict(self, pieces: Iterator[pd.DataFrame], runner: InferenceRunner) -> None:
        """Writes the process's shards, and waits until the other processes' are there.

        Args:
            pieces: The whole catalog, a piece for each shard.
            runner: What runs the model.
        """
        state = PartialState()
        hidden = not state.is_main_process
        with tqdm(total=self.total, desc="predicting", unit="galaxy", disable=hidden) as self.progress:
            for number, (path, piece) in enumerate(zip(self.paths, pieces, strict=True)):
                if number % state.num_processes == state.process_index:
                    self._predict_shard(path, piece, runner)
                    self._show_others_progress()
            # Looking for files takes any time, where a barrier of torch gives up after half an hour.
            while not all(path.exists() for path in self.paths):
                time.sleep(SECONDS_BETWEEN_LOOKS)
                self._show_others_progress()
            self.progress.update(self.total - self.progress.n)

    def _predict_shard(self, path: Path, piece: pd.DataFrame, runner: InferenceRunner) -> None:
        key = _hash(self.settings, fingerprint_rows(piece))
        rows = piece.to_dict("records")
        kept = read_shard(path)
        if kept is not None and kept.key != key:
            raise SurveyError(f"{path} is of another model or catalog; choose another output, or delete the folder.")
        if kept is not None and not (self.retry and kept.failures):
            self._count(len(kept.failures), kept.failures[-1:])
            self._advance(len(rows))
            return
        galaxies = self._run(rows, runner, kept)
        found = [galaxy for galaxy in galaxies if galaxy.output is not None]
        table = table_of(found, self.model, prevalence=self.prevalence)
        if kept is not None:
            order = [row["id_str"] for row in rows]
            joined = pd.concat([kept.table, table], ignore_index=True)
            table = joined.set_index("id_str").reindex([name for name in order if name in set(joined["id_str"])])
            table = table.reset_index().astype(joined.dtypes)
        failures = [failure_row(galaxy) for galaxy in galaxies if galaxy.output is None and galaxy.row is not None]
        try:
            write_shard(path, Shard(table, failures, key))
        except OSError as error:
            raise OSError(
                f"{path} can't be written: {error.strerror or error}. What is finished stays; mend this and run the "
                "same again."
            ) from error

    def _run(self, rows: list[Row], runner: InferenceRunner, kept: Shard | None) -> list[Galaxy]:
        places: list[Row | None] = [*rows]
        if kept is not None:
            places = _only_failed(rows, kept, batch_size=runner.batch_size)
        galaxies: list[Galaxy] = []
        for batch in run_galaxies(self.model, self.processor, places, runner=runner, prevalence=self.prevalence):
            galaxies += [galaxy for galaxy in batch if galaxy.row is not None]
            failed = [failure_row(galaxy) for galaxy in batch if galaxy.output is None and galaxy.row is not None]
            self._count(len(failed), failed[-1:])
            self._advance(len(batch) if kept is None else 0)
        if kept is not None:
            self._advance(len(rows))
        return galaxies

    def _count(self, count: int, last: list[dict[str, str]]) -> None:
        self.failures += count
        if self.most is not None and self.failures > self.most:
            raise SurveyError(
                f"{self.failures} galaxies can't be predicted, and max_failures is {self.most}; the last one is "
                f"{last[0]['file_loc']}: {last[0]['reason']}. What is finished stays."
            )

    def _advance(self, count: int) -> None:
        self.progress.update(count)
        self.progress.set_postfix(failures=self.failures)

    def _show_others_progress(self) -> None:
        if self.progress.disable or PartialState().num_processes == 1:
            return
        finished = sum(path.exists() for path in self.paths) * self.size
        self.progress.update(max(0, min(finished, self.total) - self.progress.n))


def _only_failed(rows: list[Row], kept: Shard, *, batch_size: int) -> list[Row | None]:
    """The batches with galaxies that failed, each of these at its old place and the others' places empty."""
    failed = {failure["id_str"] for failure in kept.failures}
    places: list[Row | None] = []
    for start in range(0, len(rows), batch_size):
        batch = [row if row["id_str"] in failed else None for row in rows[start : start + batch_size]]
        places += batch if any(batch) else []
    return places


def _start(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the run in a folder, an earlier one's where there is one."""
    path, state = folder / "manifest.json", PartialState()
    earlier = _read_manifest(path)
    if earlier is None and (folder / "predictions").exists():
        raise SurveyError(f"{folder} has predictions and no manifest.json that can be read; choose another output.")
    for name, difference in FIXED.items():
        if earlier is not None and earlier.get(name) != wanted[name]:
            raise SurveyError(
                f"output {folder} holds the predictions of {difference} ({name} differs); choose another output."
            )
    if earlier is not None and earlier["versions"] != wanted["versions"]:
        logger.warning("The versions of libraries have changed since the run in %s began; it goes on.", folder)
    state.wait_for_everyone()  # all have looked before one writes
    manifest = earlier or wanted
    if state.is_main_process:
        if earlier is None:
            folder.mkdir(parents=True, exist_ok=True)
            _write_manifest(path, manifest)
        (folder / "predictions").mkdir(exist_ok=True)
        remove_partial_files(folder)
        remove_partial_files(folder / "predictions")
    state.wait_for_everyone()
    return manifest


def _finish(folder: Path, manifest: dict[str, Any]) -> Survey:
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        count = _write_failures(folder, list(shard_paths(folder / "predictions", _shards(manifest))))
        _write_manifest(folder / "manifest.json", {**manifest, "finished": True, "failures": count})
    state.wait_for_everyone()
    finished = _read_manifest(folder / "manifest.json")
    assert finished is not None
    return Survey(folder, finished["galaxies"], finished["failures"])


def _write_failures(folder: Path, paths: list[Path]) -> int:
    schema = pa.schema([(name, pa.string()) for name in FAILURE_COLUMNS])
    count = 0
    with whole_file(folder / "failures.parquet") as partial, pq.ParquetWriter(partial, schema) as writer:
        for path in paths:
            failures = read_failures(path)
            count += len(failures)
            if failures:
                writer.write_table(pa.Table.from_pylist(failures, schema=schema))
    return count


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return manifest


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n")


def _shards(manifest: dict[str, Any]) -> int:
    return -(-int(manifest["galaxies"]) // int(manifest["shard_size"]))


def _hash_model(model: Classifier) -> str:
    # The configuration has the calibration, the prevalences and the threshold.
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()

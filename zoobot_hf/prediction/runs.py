"""The run of a survey: a part of its galaxies to each shard, by any number of processes, on from where it was stopped.

What is made of the galaxies, predictions or embeddings, and from what, is the run's `Work`.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from tqdm import tqdm

from zoobot_hf.data.catalog import PARTIAL, whole_file
from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ZoobotPreTrainedModel
from zoobot_hf.training.machine import InferenceRunner, default_batch_size

from .galaxies import FAILURE_COLUMNS, Galaxy, Interpret, Row, failure_row, run_galaxies
from .pieces import CatalogFacts, attach_readers, fingerprint_rows
from .shards import (
    Shard,
    read_failures,
    read_shard,
    remove_partial_files,
    shard_paths,
    write_shard,
)

logger = logging.getLogger(__name__)

FORMAT = 3
GALAXIES_IN_A_SHARD = 4096
SECONDS_BETWEEN_LOOKS = 0.2
LIBRARIES = ("zoobot-hf", "torch", "transformers", "timm", "pillow", "astropy")
# What must be the same when a run goes on, and what to call it in an error.
FIXED = {
    "format": "a version of zoobot_hf with another layout of this folder",
    "contents": "another command",
    "weights": "another model",
    "processor": "another image processor",
    "prevalence": "another prevalence",
    "embeddings": "other embeddings, or of images instead of embeddings",
    "dtype": "another number type",
    "bf16": "another precision, bfloat16 or not",
    "pca": "another PCA",
    "catalog_fingerprint": "another catalog, or one that has changed since",
}

Part = TypeVar("Part")
PartOfWork = TypeVar("PartOfWork", contravariant=True)
Failures = list[dict[str, str]]
Report = Callable[[int, Failures], None]


class SurveyError(RuntimeError):
    """A survey's predictions can't go on; what is finished stays."""


class Survey(NamedTuple):
    """What a finished run left.

    Attributes:
        folder: Where it is.
        galaxies: Rows of the catalog.
        failures: How many of them have no prediction or embedding.
    """

    folder: Path
    galaxies: int
    failures: int


class Work(Protocol[PartOfWork]):
    """What a run makes of the part of the galaxies that belongs to a shard."""

    verb: str

    def fingerprint(self, part: PartOfWork) -> str:
        """A hash of what the shard depends on besides the manifest.

        Args:
            part: The part.
        """

    def compute(self, part: PartOfWork, kept: Shard | None, report: Report) -> tuple[pa.Table, Failures]:
        """The shard's table and its failures, both in the catalog's order.

        Args:
            part: The part.
            kept: An earlier run's shard, whose failures are tried again.
            report: To be called with the number of galaxies that are done and those of them that failed.
        """


def describe_run(
    contents: str,
    *,
    model: ZoobotPreTrainedModel,
    model_name: str,
    weights: str,
    processor: ZoobotImageProcessor,
    catalog: str,
    facts: CatalogFacts,
    shard_size: int,
    batch_size: int | None,
    **others: Any,
) -> dict[str, Any]:
    """The manifest of a run that is to begin, as it reads once it was written.

    Args:
        contents: What the shards hold, "predictions" or "embeddings": the name of their folder.
        model: On its device.
        model_name: Where the model is from.
        weights: A hash of what the table depends on in it.
        processor: The image processor.
        catalog: What the user called the catalog.
        facts: What identifies it.
        shard_size: Galaxies in a file.
        batch_size: Galaxies that the model sees at once; what suits the device when absent.
        **others: Further facts, some of them in `FIXED`.

    Raises:
        ValueError: A size below 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; give at least 1.")
    manifest = {
        "format": FORMAT,
        "contents": contents,
        "model": model_name,
        "weights": weights,
        "processor": processor.to_dict(),
        **others,
        "catalog": catalog,
        "catalog_fingerprint": facts.fingerprint,
        "galaxies": facts.galaxies,
        "shard_size": shard_size,
        "batch_size": batch_size or default_batch_size(model.device),
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "versions": {library: version(library) for library in LIBRARIES},
        "finished": False,
        "failures": None,
    }
    # Lists instead of tuples, text instead of numbers for the names of fields.
    written: dict[str, Any] = json.loads(json.dumps(manifest, default=str))
    return written


def run_shards(
    folder: Path,
    manifest: dict[str, Any],
    work: Work[Part],
    parts: Iterable[Part],
    *,
    retry_failures: bool,
    max_failures: int | None,
) -> None:
    """Writes this process's shards, and waits until the other processes have written theirs.

    Args:
        folder: The run's folder.
        manifest: From `start_run`.
        work: What is made of each part.
        parts: All of the catalog, a part for each shard.
        retry_failures: Whether galaxies that failed in an earlier run are tried again.
        max_failures: More failures than this in one process's share stop the run.

    Raises:
        SurveyError: A shard is of another model or catalog, or there are too many failures.
        OSError: No space left, or no right to write; finished shards stay.
    """
    if retry_failures and manifest["finished"] and PartialState().is_main_process:
        # Until the end of this run its failures are not those of the table.
        _write_manifest(folder / "manifest.json", {**manifest, "finished": False})
    _Run(folder, manifest, retry=retry_failures, most=max_failures).write(work, parts)


class _Run:
    """One process's share of a survey: every so many-th of its shards."""

    def __init__(self, folder: Path, manifest: dict[str, Any], *, retry: bool, most: int | None) -> None:
        self.retry = retry
        self.most = most
        self.done = 0
        self.failures = 0
        self.folder = folder
        self.paths = shard_paths(folder, manifest)
        self.others = [path for number, path in enumerate(self.paths) if not _is_own(number)]
        self.size = manifest["shard_size"]
        self.total = manifest["galaxies"]
        # The shard's own rows come with it. What else it depends on does not change between the shards.
        self.settings = [json.dumps(manifest.get(name), sort_keys=True) for name in FIXED]

    def write(self, work: Work[Part], parts: Iterable[Part]) -> None:
        state = PartialState()
        hidden = not state.is_main_process
        with tqdm(total=self.total, desc=work.verb, unit="galaxy", disable=hidden) as self.progress:
            for number, (path, part) in enumerate(zip(self.paths, parts, strict=True)):
                if _is_own(number):
                    self._write_shard(path, part, work)
                    self._show_others_progress()
            # The shards alone don't say it: those that are damaged or tried again are there from an earlier run.
            done = [self.folder / f"{PARTIAL}done-{index}" for index in range(state.num_processes)]
            done[state.process_index].touch()
            wait_for_files(done, meanwhile=self._show_others_progress)
            self.progress.update(self.total - self.progress.n)

    def _write_shard(self, path: Path, part: Part, work: Work[Part]) -> None:
        key = hash_text(*self.settings, work.fingerprint(part))
        kept = read_shard(path)
        if kept is not None and kept.key != key:
            raise SurveyError(f"{path} is of another model or catalog; choose another output, or delete the folder.")
        if kept is not None and not (self.retry and kept.failures):
            self._report(len(kept.table) + len(kept.failures), kept.failures)
            return
        table, failures = work.compute(part, kept, self._report)
        try:
            write_shard(path, Shard(table, failures, key))
        except OSError as error:
            raise OSError(
                f"{path} can't be written: {error.strerror or error}. What is finished stays; mend this and run the "
                "same again."
            ) from error

    def _report(self, count: int, failures: Failures) -> None:
        self.failures += len(failures)
        if self.most is not None and self.failures > self.most:
            raise SurveyError(
                f"{self.failures} galaxies can't be predicted, and max_failures is {self.most}; the last one is "
                f"{failures[-1]['file_loc']}: {failures[-1]['reason']}. What is finished stays."
            )
        self.done += count
        self.progress.update(count)
        self.progress.set_postfix(failures=self.failures)

    def _show_others_progress(self) -> None:
        # Where galaxies are tried again, the others' files are there before they are done.
        if self.progress.disable or self.retry:
            return
        finished = self.done + sum(path.exists() for path in self.others) * self.size
        self.progress.update(min(finished, self.total) - self.progress.n)


def _is_own(number: int) -> bool:
    state = PartialState()
    return number % state.num_processes == state.process_index


def wait_for_files(paths: list[Path], *, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Waits until other processes have written files, for any time; a barrier of torch gives up after half an hour.

    Args:
        paths: The files.
        meanwhile: Called between the looks.
    """
    while not all(path.exists() for path in paths):
        time.sleep(SECONDS_BETWEEN_LOOKS)
        meanwhile()


class WorkOnImages:
    """Rows of a catalog to what a model says of their images: a `Work`.

    Args:
        runner: From `inference_runner`.
        processor: The image processor that was saved with the runner's model.
        verb: What the progress bar says.
        interpret: What to keep of a batch of the model's outputs, a row for each.
        tabulate: The table of galaxies that could be read.
        depends_on: What the outputs depend on and the manifest doesn't say, as a hash.
    """

    def __init__(
        self,
        runner: InferenceRunner,
        processor: ZoobotImageProcessor,
        *,
        verb: str,
        interpret: Interpret,
        tabulate: Callable[[list[Galaxy]], pa.Table],
        depends_on: str = "",
    ) -> None:
        self.runner = runner
        self.processor = processor
        self.verb = verb
        self.interpret = interpret
        self.tabulate = tabulate
        self.depends_on = depends_on

    def fingerprint(self, part: pd.DataFrame) -> str:
        """A hash of the rows, and of what the manifest doesn't say.

        Args:
            part: From `read_pieces`.
        """
        return hash_text(fingerprint_rows(part), self.depends_on)

    def compute(self, part: pd.DataFrame, kept: Shard | None, report: Report) -> tuple[pa.Table, Failures]:
        """The table of the rows, and the galaxies that can't be read.

        Args:
            part: From `read_pieces`.
            kept: As in `Work`.
            report: As in `Work`.
        """
        rows = part.to_dict("records")
        places = [*rows] if kept is None else _only_failed(rows, kept, batch_size=self.runner.batch_size)
        found: list[Galaxy] = []
        failures: Failures = []
        for batch in run_galaxies(self.runner, self.processor, attach_readers(places), interpret=self.interpret):
            failed = [failure_row(galaxy) for galaxy in batch if galaxy.output is None and galaxy.row is not None]
            found += [galaxy for galaxy in batch if galaxy.output is not None]
            failures += failed
            report(len(batch) if kept is None else 0, failed)
        table = self.tabulate(found)
        if kept is not None:
            report(len(rows), [])
            table = _in_order_of(part["id_str"].tolist(), pa.concat_tables([kept.table, table]))
        return table, failures


def hash_text(*texts: str) -> str:
    """A hash of texts in their order.

    Args:
        *texts: The texts.
    """
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _in_order_of(names: list[str], table: pa.Table) -> pa.Table:
    places = {name: place for place, name in enumerate(table["id_str"].to_pylist())}
    return table.take([places[name] for name in names if name in places]).combine_chunks()


def _only_failed(rows: list[Row], kept: Shard, *, batch_size: int) -> list[Row | None]:
    """The batches with galaxies that failed, each of these at its old place and the others' places empty."""
    failed = {failure["id_str"] for failure in kept.failures}
    places: list[Row | None] = []
    for start in range(0, len(rows), batch_size):
        batch = [row if row["id_str"] in failed else None for row in rows[start : start + batch_size]]
        places += batch if any(batch) else []
    return places


def start_run(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the run in a folder: an earlier one's where there is one, which is then gone on with.

    Args:
        folder: The run's folder; it is made where it isn't there.
        wanted: From `describe_run`.

    Raises:
        SurveyError: The folder is a file, or holds a model, a run with another model, catalog or purpose, or no
            manifest that can be read.
    """
    if folder.exists() and not folder.is_dir():
        raise SurveyError(f"output is {folder}, which is a file; choose a folder.")
    if any(folder.glob("model*.safetensors")):  # one file of weights or several
        raise SurveyError(f"output {folder} is a folder that holds a model; choose another output.")
    contents = wanted["contents"]
    path, state = folder / "manifest.json", PartialState()
    earlier = read_manifest(folder)
    if earlier is None and (folder / contents).exists():
        raise SurveyError(f"{folder} has {contents} and no manifest.json that can be read; choose another output.")
    files = [path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith(PARTIAL)]
    if earlier is not None and files == ["manifest.json"]:
        earlier = None  # it failed before it had anything to lose
    for name, difference in FIXED.items():
        if earlier is not None and earlier.get(name) != wanted.get(name):
            raise SurveyError(
                f"output {folder} holds the {earlier.get('contents', contents)} of {difference} ({name} differs); "
                "choose another output."
            )
    if earlier is not None and earlier["versions"] != wanted["versions"]:
        logger.warning("The versions of libraries have changed since the run in %s began; it goes on.", folder)
    state.wait_for_everyone()  # all have looked before one writes
    manifest = earlier or wanted
    if state.is_main_process:
        if earlier is None:
            folder.mkdir(parents=True, exist_ok=True)
            _write_manifest(path, manifest)
        (folder / contents).mkdir(exist_ok=True)
        remove_partial_files(folder)
        remove_partial_files(folder / contents)
    state.wait_for_everyone()
    return manifest


def finish_run(folder: Path, manifest: dict[str, Any]) -> Survey:
    """What the run left, once all processes are done: the manifest says so, and the failures are in one table.

    Args:
        folder: The run's folder.
        manifest: From `start_run`.
    """
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        remove_partial_files(folder)
        count = _write_failures(folder, shard_paths(folder, manifest))
        _write_manifest(folder / "manifest.json", {**manifest, "finished": True, "failures": count})
    state.wait_for_everyone()
    finished = read_manifest(folder)
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


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a run's folder says about itself; None where there is no manifest that can be read.

    Args:
        folder: The run's folder.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return manifest


def read_finished(folder: Path, *, contents: str) -> dict[str, Any]:
    """What a finished run's folder says about itself.

    Args:
        folder: The run's folder.
        contents: What its shards have to hold, "predictions" or "embeddings".

    Raises:
        SurveyError: It holds no such run, or one that isn't finished.
    """
    command = {"predictions": "predict", "embeddings": "embed"}[contents]
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("contents") != contents:
        raise SurveyError(f"{folder} holds no {contents} of a survey; give the output of zoobot-hf {command}.")
    if not manifest["finished"]:
        raise SurveyError(f"{folder} is not finished; run the same zoobot-hf {command} again, which goes on with it.")
    return manifest


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n")

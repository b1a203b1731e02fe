"""What the encoder says of a catalog of any size, in a folder; and what a finetuned head makes of that, without images.

The folder is like that of `predict_survey`, with `embeddings/` instead of `predictions/`: Parquet files with `id_str`
and `embedding`, a list of fixed size, which pandas, pyarrow and datasets read as one table in the catalog's order.
100,000 galaxies of 640 dimensions take 130 MB in float16. Where they were reduced, `pca.safetensors` has the
components; `read_components` reads it.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ModelWithHead, ZoobotPreTrainedModel
from zoobot_hf.training.embedding_cache import DTYPES, hash_weights
from zoobot_hf.training.machine import InferenceRunner, prepare_processes, uses_bf16

from .components import Components, check_dimensions, fit_components, read_components, write_components
from .galaxies import Galaxy, Row, check_prevalence, inference_runner, read_outputs, run_galaxies
from .pieces import CatalogFacts, Source, attach_readers, check_catalog, find_source, name_of, read_pieces
from .runs import (
    GALAXIES_IN_A_SHARD,
    Failures,
    Report,
    Survey,
    SurveyError,
    WorkOnImages,
    describe_run,
    finish_run,
    hash_text,
    read_finished,
    run_shards,
    start_run,
    wait_for_files,
)
from .shards import Shard, read_key, read_shard, shard_paths
from .survey import arrow_table, hash_model
from .tables import survey_table

EMBEDDING = "embedding"
PCA_FILE = "pca.safetensors"
# More than 100 for each of 40 dimensions; on a CPU the encoder takes about a minute for them.
GALAXIES_FOR_PCA = 5000


def embed_survey(
    model: ZoobotPreTrainedModel,
    processor: ZoobotImageProcessor,
    catalog: Source,
    output: str | Path,
    *,
    model_name: str = "",
    dtype: str = "float16",
    pca: int | str | Path | None = None,
    batch_size: int | None = None,
    shard_size: int = GALAXIES_IN_A_SHARD,
    device: str | torch.device = "cpu",
    torch_compile: bool = False,
    bf16: bool | None = None,
    retry_failures: bool = False,
    max_failures: int | None = None,
) -> Survey:
    """The embeddings for a catalog of any size, in a folder; the same call goes on with a run that was stopped.

    Everything but the outputs is as in `predict_survey`: files, failures, several processes.

    Args:
        model: Any of the package's models; only its encoder is used.
        processor: The image processor that belongs to the encoder.
        catalog: As in `predict_survey`.
        output: A folder; it is made, or holds the earlier run. See the module's first lines.
        model_name: Where the model is from, for the manifest.
        dtype: How the embeddings are stored, "float16" or "float32".
        pca: Reduces the embeddings to so many dimensions, by principal components of a sample that is evenly spread
            over the catalog; or the folder or file of components that another run fitted. A head can't predict from
            reduced embeddings.
        batch_size: As in `predict_survey`.
        shard_size: As in `predict_survey`.
        device: Where the model runs.
        torch_compile: Whether to compile the model.
        bf16: As in `predict_galaxies`.
        retry_failures: Whether galaxies that failed in an earlier run are tried again.
        max_failures: More failures than this in one process's share stop the run.

    Returns:
        The same in every process, once all are done.

    Raises:
        CatalogError: The catalog can't be read, is empty, or has a name twice.
        SurveyError: The folder holds a model, or the embeddings of another model or catalog or of another precision;
            or there are too many failures.
        OSError: No space left, or no right to write; finished files stay.
        ValueError: Another `dtype`, a PCA that can't be read or doesn't fit, or a size below 1.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose {' or '.join(sorted(DTYPES))}.")
    encoder = model.base_model
    given = None if pca is None or isinstance(pca, int) else _read_given(Path(pca), encoder)
    prepare_processes()
    encoder.to(device)
    source = find_source(catalog)
    facts = check_catalog(source)
    if isinstance(pca, int):
        sampled = min(facts.galaxies, GALAXIES_FOR_PCA)
        check_dimensions(pca, galaxies=sampled, size=encoder.config.embedding_size)
    wanted = describe_run(
        "embeddings",
        model=encoder,
        model_name=model_name,
        weights=hash_encoder(model),
        processor=processor,
        catalog=name_of(source),
        facts=facts,
        shard_size=shard_size,
        batch_size=batch_size,
        dtype=dtype,
        bf16=uses_bf16(encoder.device, bf16),
        pca=pca if given is None else given.fingerprint(),
        embedding_size=encoder.config.embedding_size,
    )
    folder = Path(output)
    manifest = start_run(folder, wanted)
    size = batch_size or manifest["batch_size"]
    with inference_runner(encoder, size, device=device, torch_compile=torch_compile, bf16=bf16) as runner:
        components = given
        if isinstance(pca, int):
            components = _fit_once(folder, _Sample(runner, processor, source, facts), dimensions=pca)
        elif given is not None and PartialState().is_main_process:
            write_components(given, folder / PCA_FILE)
        work = WorkOnImages(
            runner,
            processor,
            verb="embedding",
            interpret=functools.partial(_read_embeddings, dtype=dtype, components=components),
            tabulate=functools.partial(_embedding_table, dtype=dtype, size=_size(encoder, components)),
            depends_on="" if components is None else components.fingerprint(),
        )
        pieces = read_pieces(source, rows=manifest["shard_size"])
        run_shards(folder, manifest, work, pieces, retry_failures=retry_failures, max_failures=max_failures)
    return finish_run(folder, manifest)


def predict_embeddings(
    model: ModelWithHead,
    processor: ZoobotImageProcessor,
    embeddings: str | Path,
    output: str | Path,
    *,
    model_name: str = "",
    device: str | torch.device = "cpu",
    prevalence: str | None = None,
    retry_failures: bool = False,
    max_failures: int | None = None,
) -> Survey:
    """The predictions of a finetuned head for stored embeddings, in a folder like that of `predict_survey`.

    The encoder isn't run and no image is opened. The columns are those of `predict_survey`; the values differ by what
    the embeddings' number type rounds off. Galaxies that have no embedding are failures with the reason that they had
    then.

    Args:
        model: A finetuned model whose encoder made the embeddings: one whose frozen stage was kept, for example.
        processor: The image processor that was saved with it.
        embeddings: The folder of a finished `embed_survey`.
        output: A folder; it is made, or holds the earlier run.
        model_name: Where the model is from, for the manifest.
        device: Where the head runs.
        prevalence: As in `predict_survey`.
        retry_failures: Whether files with failures are predicted again, after the embeddings of these were mended.
        max_failures: More failures than this in one process's share stop the run.

    Raises:
        SurveyError: There are no finished embeddings, they are damaged, reduced, or made by another encoder or image
            processor; the output holds a model or other predictions; or there are too many failures.
        OSError: No space left, or no right to write; finished files stay.
        ValueError: A prevalence that the model lacks.
    """
    check_prevalence(model, prevalence)
    source, folder = Path(embeddings), Path(output)
    stored = read_finished(source, contents="embeddings")
    _check_fit(stored, model, processor, folder=source)
    prepare_processes()
    model.to(device).eval()
    wanted = describe_run(
        "predictions",
        model=model,
        model_name=model_name,
        weights=hash_model(model),
        processor=processor,
        catalog=stored["catalog"],
        facts=CatalogFacts(stored["galaxies"], stored["catalog_fingerprint"]),
        shard_size=stored["shard_size"],
        batch_size=stored["shard_size"],
        prevalence=prevalence or model.config.predictions_for,
        embeddings=hash_text(*(str(stored.get(name)) for name in ("weights", "dtype", "bf16", "catalog_fingerprint"))),
    )
    manifest = start_run(folder, wanted)
    parts = shard_paths(source, stored)
    work = _WorkOnEmbeddings(model, prevalence=prevalence)
    run_shards(folder, manifest, work, parts, retry_failures=retry_failures, max_failures=max_failures)
    return finish_run(folder, manifest)


def hash_encoder(model: ZoobotPreTrainedModel) -> str:
    """A hash of what embeddings depend on in a model: its encoder's weights and how they are pooled, and no name.

    A model that was finetuned with a frozen encoder has the hash of the encoder that it began with.

    Args:
        model: Any of the package's models.
    """
    return hash_text(str(model.config.pooling), hash_weights(model.base_model.encoder))


# Embeddings of images -------------------------------------------------------------------------------------------


def _read_embeddings(outputs: Tensor, *, dtype: str, components: Components | None) -> npt.NDArray[np.floating[Any]]:
    values = outputs.numpy() if components is None else components.reduce(outputs.numpy())
    with np.errstate(over="ignore"):  # a value that doesn't fit becomes infinite, and its galaxy a failure
        return values.astype(dtype)


def _embedding_table(galaxies: list[Galaxy], *, dtype: str, size: int) -> pa.Table:
    values = np.empty((len(galaxies), size), dtype)
    for place, galaxy in enumerate(galaxies):
        values[place] = galaxy.output
    names = pa.array([galaxy.row["id_str"] for galaxy in galaxies if galaxy.row is not None], pa.string())
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), size)
    return pa.table({"id_str": names, EMBEDDING: lists})


def _size(encoder: ZoobotPreTrainedModel, components: Components | None) -> int:
    return int(encoder.config.embedding_size if components is None else len(components.directions))


# Principal components -------------------------------------------------------------------------------------------


class _Sample:
    """Galaxies that are evenly spread over a catalog, on which components are fitted."""

    def __init__(
        self, runner: InferenceRunner, processor: ZoobotImageProcessor, catalog: Source, facts: CatalogFacts
    ) -> None:
        self.runner = runner
        self.processor = processor
        self.catalog = catalog
        self.galaxies = facts.galaxies

    def embed(self) -> npt.NDArray[np.float32]:
        """The embeddings of those that can be read, float32, (galaxies, embedding_size)."""
        count = min(self.galaxies, GALAXIES_FOR_PCA)
        found: list[npt.NDArray[np.floating[Any]]] = []
        with tqdm(total=count, desc="sampling for PCA", unit="galaxy") as progress:
            rows = attach_readers(self._rows(count))
            batches = run_galaxies(self.runner, self.processor, rows, interpret=Tensor.numpy)
            for batch in batches:
                found += [galaxy.output for galaxy in batch if galaxy.output is not None]
                progress.update(len(batch))
        if not found:
            raise SurveyError(f"none of {count} galaxies can be read, so no PCA can be fitted; look at their images.")
        return np.stack(found).astype(np.float32)

    def _rows(self, count: int) -> Iterator[Row]:
        chosen = np.linspace(0, self.galaxies - 1, count).round().astype(int)
        first = 0
        for piece in read_pieces(self.catalog):
            inside = chosen[(chosen >= first) & (chosen < first + len(piece))]
            yield from piece.iloc[inside - first].to_dict("records")
            first += len(piece)


def _read_given(path: Path, encoder: ZoobotPreTrainedModel) -> Components:
    path = path / PCA_FILE if path.is_dir() else path
    components = read_components(path)
    if len(components.mean) != encoder.config.embedding_size:
        raise ValueError(
            f"pca {path} is for embeddings of {len(components.mean)} dimensions, and this encoder's have "
            f"{encoder.config.embedding_size}; choose one that was fitted with this encoder."
        )
    return components


def _fit_once(folder: Path, sample: _Sample, *, dimensions: int) -> Components:
    """The components in the run's folder, which one process puts there where they aren't."""
    path = folder / PCA_FILE
    if PartialState().is_main_process and not path.exists():
        write_components(fit_components(sample.embed(), dimensions=dimensions), path)
    wait_for_files([path])
    return read_components(path)


# Predictions from embeddings ------------------------------------------------------------------------------------


class _WorkOnEmbeddings:
    """Files of embeddings to what a head says of them."""

    verb = "predicting"

    def __init__(self, model: ModelWithHead, *, prevalence: str | None) -> None:
        self.model = model
        self.prevalence = prevalence

    def fingerprint(self, part: Path) -> str:
        key = read_key(part)
        if key is None:
            raise _damaged(part)
        return key

    @torch.inference_mode()
    def compute(self, part: Path, kept: Shard | None, report: Report) -> tuple[pa.Table, Failures]:
        shard = read_shard(part)
        if shard is None:
            raise _damaged(part)
        lists = shard.table[EMBEDDING].combine_chunks()
        # A copy, because Arrow's memory can't be written to and PyTorch takes no such arrays.
        values = torch.from_numpy(lists.flatten().to_numpy().copy()).view(len(lists), lists.type.list_size)
        outputs = self.model(embeddings=values.to(self.model.device).float())[0].float().cpu()
        answers = read_outputs(outputs, config=self.model.config, prevalence=self.prevalence)
        good = np.isfinite(answers).all(axis=1)
        names = shard.table["id_str"].to_numpy()
        table = survey_table(names[good], answers[good], config=self.model.config, prevalence=self.prevalence)
        reason = "the model's output for its embedding is not a finite number"
        odd = [{"id_str": str(name), "file_loc": "", "reason": reason} for name in names[~good]]
        failures = [*shard.failures, *odd]
        report(len(names) + len(shard.failures), failures)
        return arrow_table(table), failures


def _check_fit(
    manifest: dict[str, Any], model: ModelWithHead, processor: ZoobotImageProcessor, *, folder: Path
) -> None:
    if manifest["pca"] is not None:
        raise SurveyError(
            f"the embeddings in {folder} were reduced by a PCA, and a head needs all of their "
            f"{manifest['embedding_size']} dimensions; run zoobot-hf embed without --pca into another folder."
        )
    if manifest["weights"] != hash_encoder(model):
        raise SurveyError(
            f"the embeddings in {folder} are of another encoder ({manifest['model'] or 'unnamed'}), or of this one "
            "before it was trained on; run zoobot-hf embed with this model into another folder, or predict from images."
        )
    own = json.loads(json.dumps(processor.to_dict(), default=str))
    differing = sorted(
        name for name in {*own, *manifest["processor"]} if own.get(name) != manifest["processor"].get(name)
    )
    if differing:
        raise SurveyError(
            f"the embeddings in {folder} are of images that were prepared otherwise: the image processors differ in "
            f"{', '.join(differing)}; run zoobot-hf embed with this model's own processor into another folder."
        )


def _damaged(path: Path) -> SurveyError:
    return SurveyError(f"{path} is damaged or missing; run the same zoobot-hf embed again, which mends it.")

"""The model card of a finetuned model, from plain values: it knows no trainer and no network."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Decimal
from numbers import Real
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from yaml import YAMLError  # type: ignore[import-untyped]

TEMPLATE = "model_card.md.jinja"
LIBRARY = "zoobot_hf"
LOADING_HEADING = "## How to use it"
LOADING_WITH_CODE = """Where zoobot_hf is not installed, model and processor load with the code in this repository:

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{repo_id}", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
```
"""
TAGS = ("astronomy", "galaxies", "morphology", "galaxy-zoo", "zoobot")
KINDS = {
    "single_label_classification": ("A classifier", "labels, of which a galaxy has one"),
    "multi_label_classification": ("A classifier", "labels, of which a galaxy may have several"),
    "regression": ("A regression model", "outputs"),
    "votes": ("A model of volunteers' answers", "vote columns"),
}
# The Hub knows these two by another name than an astronomer does.
HUB_METRIC_TYPES = {"completeness": "recall", "purity": "precision"}


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """What one stage of finetuning was and what it reached.

    Args:
        name: "frozen" or "unfrozen".
        hyperparameters: The settings worth knowing, by name.
        metrics: Values on the test split by metric name, as `zoobot_hf.evaluation.metrics` names them. Those that are
            no single number, as `confusion`, are left out of the card.
        scores: For each population in words, value, low and high of each score on the test split. Where there are
            some, the card shows these, and the metrics are in its metadata alone.
    """

    name: str
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, tuple[float, float, float]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OutOfFoldFacts:
    """What models of folds, each trained without the galaxies that it judges, reached in place of the model itself.

    Args:
        folds: How many.
        galaxies: How many galaxies they judged, each once.
        metrics: As in `StageFacts`.
        scores: As in `StageFacts`.
    """

    folds: int
    galaxies: int
    metrics: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, tuple[float, float, float]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelCardFacts:
    """Everything that a model card says. What is left out is not on the card.

    Args:
        model_name: The model's name, without its owner.
        encoder: The encoder as it was asked for: an id on the Hub, or a local path, of which only the folder is shown.
        labels: The labels' names in the order of the logits; for regression the outputs' names, for votes their
            columns.
        problem_type: "single_label_classification", "multi_label_classification", "regression" or "votes".
        image_size: Width and height that the processor makes of every image, in pixels.
        stages: The stages that were run, in their order.
        kept_stage: The stage whose model is published.
        out_of_fold: What models of folds reached, where there is no test split; the stages then have no scores.
        decision_tree: For votes the survey's questions as plain values, as a model's configuration holds them.
        questions: By the question's name, how many test galaxies were `asked` and what the published model's metrics
            are on them.
        confidence: Of the intervals of scores and selections, 0-1.
        temperature: What the model divides its logits by, one number or one for each label; None for nothing.
        shift: What it adds to them after that, one number for each label; None for nothing.
        predictions_for: "sky" or "training": whose prevalence the probabilities are for; None says nothing about it.
        selections: By label, what its threshold selects of the test galaxies: `threshold`, `prevalence` and `aim`, and
            value, low and high of `completeness`, `purity` and `f1`.
        remarks: What could not be measured and why, a sentence each.
        base_model: The encoder's id on the Hub; None where it is not from there.
        license: The Hub's short name of the model's licence, such as "apache-2.0".
        dataset_name: The dataset as it was asked for: an id on the Hub, "simulated", or a local path, of which only the
            folder is shown.
        dataset_ids: The datasets' ids on the Hub.
        counts: Galaxies by split and, in each, by label.
        cuts: Galaxies that were removed before the split, by the reason in words.
        training_prevalence: The share of each label in training, 0-1.
        sky_prevalence: The share of each label that is taken for the sky's, 0-1.
        seeds: The seeds by what they seeded.
        versions: Version by name of the software.
        device: What it was trained on, in words.
        training_seconds: How long training took, in seconds.
        figures: Caption by path of the figure, relative to the card.
        limits: What to beware of, a sentence each.
        simulated: Whether the galaxies were drawn by a simulation.

    Raises:
        ValueError: When the problem type is none of these, when votes come without a decision tree, or when
            `kept_stage` is not one of the stages.
    """

    model_name: str
    encoder: str
    labels: Sequence[str]
    problem_type: str
    image_size: int
    stages: Sequence[StageFacts]
    kept_stage: str | None = None
    out_of_fold: OutOfFoldFacts | None = None
    decision_tree: Mapping[str, Any] | None = None
    questions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    confidence: float = 0.9
    temperature: float | Sequence[float] | None = None
    shift: Sequence[float] | None = None
    predictions_for: str | None = None
    selections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    base_model: str | None = None
    license: str | None = None
    dataset_name: str | None = None
    dataset_ids: Sequence[str] = ()
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    cuts: Mapping[str, int] = field(default_factory=dict)
    training_prevalence: Mapping[str, float] = field(default_factory=dict)
    sky_prevalence: Mapping[str, float] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    training_seconds: float | None = None
    figures: Mapping[str, str] = field(default_factory=dict)
    limits: Sequence[str] = ()
    simulated: bool = False

    def __post_init__(self) -> None:
        if self.problem_type not in KINDS:
            raise ValueError(f"problem_type is {self.problem_type!r}; choose one of {', '.join(KINDS)}.")
        if (self.problem_type == "votes") != (self.decision_tree is not None):
            raise ValueError("decision_tree goes with the problem type 'votes'; give both or neither.")
        names = [stage.name for stage in self.stages]
        if self.kept_stage is not None and self.kept_stage not in names:
            raise ValueError(f"kept_stage is {self.kept_stage!r}; choose one of the stages: {', '.join(names)}.")


def render_model_card(facts: ModelCardFacts) -> str:
    """The model card in Markdown, with the Hub's metadata on top; what there is no fact for is not mentioned.

    Args:
        facts: What is known of the model and its training.

    Returns:
        The text of README.md.
    """
    template = _environment().get_template(TEMPLATE)
    kind, outputs = KINDS[facts.problem_type]
    measured = _measured(facts)
    scored = {heading: each for heading, each in measured.items() if _numbers(each.metrics)}
    text = template.render(
        facts=facts,
        metadata=_metadata(facts).to_yaml(),
        kind=kind,
        outputs=outputs,
        encoder=_name_to_show(facts.encoder, facts.base_model),
        dataset=_dataset_to_show(facts),
        repository=_local_address(facts.model_name),
        measured=measured,
        scored=scored,
        metrics=list(dict.fromkeys(name for each in scored.values() for name in _numbers(each.metrics))),
        populations=_populations(list(measured.values())),
        temperature=_numbers_to_show(facts.temperature),
        shift=_numbers_to_show(facts.shift),
        test_count=sum(facts.counts.get("test", {}).values()),
        counted=_counted_labels(facts),
        prevalences=_prevalences(facts),
        trained_stages=[stage for stage in facts.stages if stage.hyperparameters],
        circumstances=_circumstances(facts),
    )
    # Each block of the template stands on its own, with the empty lines that it may need around it.
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def address_model_card(text: str, repo_id: str, *, with_code: bool = False) -> str:
    """A model card with the model's name and address on the Hub, where it had those of a folder.

    Args:
        text: A card that `render_model_card` made; whatever else was written into it stays.
        repo_id: "owner/name".
        with_code: Whether the model's code is in the repository; the card then says how to load it with that.

    Raises:
        ValueError: The card's metadata can't be read.
    """
    try:
        card = ModelCard(text)
    except (YAMLError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(
            f"the metadata on top of the model card can't be read: {problem}; correct README.md."
        ) from error
    metadata, name = cast(ModelCardData, card.data), repo_id.split("/")[-1]
    old_name = metadata.model_name
    if old_name is not None:
        metadata.model_name = name
        card.text = card.text.replace(_local_address(old_name), repo_id)
        card.text = re.sub(rf"^# {re.escape(old_name)}$", lambda _: f"# {name}", card.text, count=1, flags=re.MULTILINE)
    if with_code:
        loading, heading, rest = card.text.partition(LOADING_HEADING)
        lines, next_heading, rest = rest.partition("\n## ")
        added = LOADING_WITH_CODE.format(repo_id=repo_id)
        card.text = f"{loading}{heading}{lines.rstrip()}\n\n{added}{next_heading}{rest}"
    return str(card.content)


def share_to_show(share: float) -> str:
    """In percent, with one decimal or as many as show two digits of what it is away from 0 and from 100.

    Args:
        share: 0-1.
    """
    return f"{share:.{_decimals(100 * min(share, 1 - share), least=1)}%}"


def _local_address(model_name: str) -> str:
    return f"path/to/{model_name}"


def _environment() -> Environment:
    # Autoescaping is for HTML; in Markdown it would turn "a & b" into "a &amp; b".
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["score"] = _score_to_show
    environment.filters["estimate"] = _estimate_to_show
    environment.filters["percent"] = share_to_show
    environment.filters["threshold"] = _threshold_to_show
    environment.filters["cell"] = _text_of_cell
    return environment


def _metadata(facts: ModelCardFacts) -> ModelCardData:
    return ModelCardData(
        library_name=LIBRARY,
        pipeline_tag="image-classification",
        tags=list(TAGS),
        license=facts.license,
        base_model=facts.base_model,
        datasets=list(facts.dataset_ids) or None,
        model_name=facts.model_name,
        eval_results=_evaluation_results(facts) or None,
    )


def _evaluation_results(facts: ModelCardFacts) -> list[EvalResult]:
    dataset = _dataset_to_show(facts)
    published: list[StageFacts | OutOfFoldFacts] = [
        stage for stage in facts.stages if stage.name == facts.kept_stage or len(facts.stages) == 1
    ]
    if facts.out_of_fold is not None:
        published = [facts.out_of_fold]
    if dataset is None or not published:  # the Hub wants a dataset beside each value
        return []
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=facts.dataset_ids[0] if facts.dataset_ids else dataset,
            dataset_name=dataset,
            dataset_split="test" if facts.out_of_fold is None else "out of fold",
            metric_type=HUB_METRIC_TYPES.get(name, name),
            metric_name=name,
            metric_value=value,
        )
        for name, value in _numbers(published[0].metrics).items()
    ]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    # As Python's own: YAML has no numbers of NumPy's.
    return {name: float(value) for name, value in metrics.items() if isinstance(value, Real) and math.isfinite(value)}


def _name_to_show(name: str, hub_id: str | None) -> str:
    # A local path is nobody's business but the user's own.
    return hub_id or Path(name).resolve().name


def _dataset_to_show(facts: ModelCardFacts) -> str | None:
    if facts.dataset_name is None:
        return ", ".join(facts.dataset_ids) or None
    return _name_to_show(facts.dataset_name, ", ".join(facts.dataset_ids))


def _prevalences(facts: ModelCardFacts) -> dict[str, Mapping[str, float]]:
    prevalences = {"in training": facts.training_prevalence, "taken for the sky's": facts.sky_prevalence}
    return {name: prevalence for name, prevalence in prevalences.items() if prevalence}


def _circumstances(facts: ModelCardFacts) -> dict[str, str]:
    lines = {
        "seeds": ", ".join(f"{name} {seed}" for name, seed in facts.seeds.items()),
        "device": facts.device,
        "training time": None if facts.training_seconds is None else _time_to_show(facts.training_seconds),
        "software": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
    }
    return {name: text for name, text in lines.items() if text}


def _time_to_show(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _measured(facts: ModelCardFacts) -> Mapping[str, StageFacts | OutOfFoldFacts]:
    """By the heading of its column, everything that has scores of its own."""
    if facts.out_of_fold is not None:
        return {f"{facts.out_of_fold.folds} folds": facts.out_of_fold}
    return {f"{stage.name} stage": stage for stage in facts.stages}


def _populations(measured: Sequence[StageFacts | OutOfFoldFacts]) -> dict[str, dict[str, list[Any]]]:
    """For each population and score one estimate for each column."""
    tables: dict[str, dict[str, list[Any]]] = {}
    for population in dict.fromkeys(words for each in measured for words in each.scores):
        names = dict.fromkeys(name for each in measured for name in each.scores.get(population, {}))
        tables[population] = {name: [each.scores.get(population, {}).get(name) for each in measured] for name in names}
    return tables


def _counted_labels(facts: ModelCardFacts) -> list[str]:
    """The labels that galaxies were counted by; none where all were counted together."""
    labels = list(dict.fromkeys(label for by_label in facts.counts.values() for label in by_label))
    return labels if len(labels) > 1 else []


def _numbers_to_show(numbers: float | Sequence[float] | None) -> str | None:
    if numbers is None:
        return None
    return f"{numbers:.3f}" if isinstance(numbers, int | float) else ", ".join(f"{number:.3f}" for number in numbers)


def _estimate_to_show(estimate: Any) -> str:
    if estimate is None:
        return "-"
    value, low, high = estimate
    # Too few galaxies for an interval, or a score that was not drawn again.
    if not math.isfinite(low):
        return _score_to_show(value)
    return f"{_number_to_show(value)} ({_number_to_show(low)} to {_number_to_show(high)})"


def _score_to_show(value: Any) -> str:
    return _number_to_show(value) if isinstance(value, int | float) and math.isfinite(value) else "-"


def _number_to_show(value: float) -> str:
    """Three decimals, or as many as show two digits: of rare galaxies, thresholds and purities are that small."""
    return f"{value:.{_decimals(value, least=3)}f}"


def _threshold_to_show(threshold: float) -> str:
    """Six digits of what it is away from 0 or from 1, rounded down, so that they select the same galaxies."""
    decimals = _decimals(min(threshold, 1 - threshold), least=6, digits=6)
    return f"{Decimal(str(threshold)).quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_FLOOR):f}"


def _decimals(value: float, *, least: int, digits: int = 2) -> int:
    return max(least, digits - 1 - math.floor(math.log10(abs(value)))) if value and math.isfinite(value) else least


def _text_of_cell(text: str) -> str:
    # A bar would end the cell of a table.
    return text.replace("|", r"\|")

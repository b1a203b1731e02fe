"""ZoobotConfig: everything that is needed to rebuild a model and to read its predictions."""

import json
import math
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .votes import tree_layout

HEAD_TYPES = ("linear", "mlp")
POOLINGS = ("pooler", "first_token", "mean")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression", "votes")
VOTE_LOSS_REDUCTIONS = ("sum", "mean")
PREVALENCES = ("training", "sky")
# Far above any encoder's; a damaged config.json can't ask for all of the memory.
LARGEST_WIDTH = 65536
MOST_LAYERS = 1024


class ZoobotConfig(PreTrainedConfig):
    """The configuration of an encoder with a head.

    Args:
        encoder_config: The encoder's own transformers configuration, whole, as an object or as its dictionary.
        embedding_size: Length of the embedding. Found by a dry run of the encoder when absent.
        pooling: How the embedding is read: "pooler" (the encoder's own pooled output), "first_token" or "mean". When
            absent, "pooler", or "mean" where a dry run of the encoder shows that it has no pooled output.
        head_type: "linear" (dropout and one linear layer) or "mlp" (one hidden layer).
        head_hidden_size: Width of the hidden layer of an "mlp" head.
        head_dropout: Share of the head's inputs that are dropped in training, 0-1. Zoobot 2.9.0 has 0.5.
        label_smoothing: Share of each label that is spread over all classes in training, 0-1.
        class_weights: A weight for each class in the training loss, in the order of the labels.
        unit_interval: Whether regression outputs pass through a sigmoid, so that they lie in 0-1.
        decision_tree: A survey's questions as plain values, as `DecisionTree.to_dict()` returns them. The labels are
            then its vote columns, and the problem type is "votes".
        concentration_range: Lowest and highest concentration of an answer, as Zoobot 2.9.0 has them.
        vote_loss_reduction: Whether the loss of a galaxy's votes is the "sum" or the "mean" over the tree's questions.
        sky_prevalence: Share of each class before balancing, by label name; sums to 1 for a single label.
        training_prevalence: Share of each class among the galaxies that the model was trained on, by label name; sums
            to 1 for a single label. What `class_weights` add to it is worked out where it is needed.
        predictions_for: Whose prevalence the model's outputs have: "training", or "sky", for which both prevalences
            are needed. Set to "sky" after the last stage of training; while training it has to be "training".
        calibration_temperature: Divides the logits: one number above 0, or one for each label. Fitted on validation
            galaxies. (Plain `temperature` is a word that transformers keeps for the generation of text.)
        calibration_shift: Added to the logits after that, one number for each label.
        decision_threshold: The probability from which a galaxy is selected, by label name, 0-1. It belongs to
            probabilities with this temperature and these prevalences.
        decision_aim: What the threshold was chosen for, in words: "purity of at least 0.9".
        encoder_name: Hub id or folder name of the pretrained encoder.
        **kwargs: What every transformers configuration takes: `id2label`, `label2id`, `problem_type`, ...

    Raises:
        ValueError: A head type, a pooling, a problem type, a share or a width that doesn't exist; class weights or
            numbers of labels that don't fit; an encoder that transformers lacks.
    """

    model_type = "zoobot"
    sub_configs = {"encoder_config": AutoConfig}  # noqa: RUF012  transformers declares it so
    # Some versions of transformers (5.17) refuse a problem type that isn't one of theirs; `_check` knows "votes" too.
    __validators__ = {  # noqa: RUF012
        name: validators
        for name, validators in getattr(PreTrainedConfig, "__validators__", {}).items()
        if name != "problem_type"
    }

    def __init__(
        self,
        encoder_config: PreTrainedConfig | dict[str, Any] | None = None,
        *,
        embedding_size: int | None = None,
        pooling: str | None = None,
        head_type: str = "linear",
        head_hidden_size: int = 256,
        head_dropout: float = 0.5,
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
        unit_interval: bool = False,
        decision_tree: dict[str, Any] | None = None,
        concentration_range: tuple[float, float] | list[float] = (1.0, 101.0),
        vote_loss_reduction: str = "sum",
        sky_prevalence: dict[str, float] | None = None,
        training_prevalence: dict[str, float] | None = None,
        predictions_for: str = "training",
        calibration_temperature: float | list[float] | None = None,
        calibration_shift: list[float] | None = None,
        decision_threshold: dict[str, float] | None = None,
        decision_aim: str | None = None,
        encoder_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("problem_type", "single_label_classification")
        _check_sizes(kwargs, "the configuration")
        if not isinstance(kwargs.get("id2label") or {}, dict):
            raise ValueError(f"id2label is {kwargs['id2label']!r}; give a dictionary from numbers to names.")
        if decision_tree is not None:
            kwargs |= labels_of_votes(decision_tree, id2label=kwargs.get("id2label"))
        super().__init__(**kwargs)
        self.encoder_config = _as_config(encoder_config)
        self.embedding_size = embedding_size
        self.pooling = pooling
        self.head_type = head_type
        self.head_hidden_size = head_hidden_size
        self.head_dropout = head_dropout
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.unit_interval = unit_interval
        self.decision_tree = decision_tree
        self.concentration_range = list(concentration_range)
        self.vote_loss_reduction = vote_loss_reduction
        self.sky_prevalence = sky_prevalence
        self.training_prevalence = training_prevalence
        self.predictions_for = predictions_for
        self.calibration_temperature = calibration_temperature
        self.calibration_shift = calibration_shift
        self.decision_threshold = decision_threshold
        self.decision_aim = decision_aim
        self.encoder_name = encoder_name
        self._check()

    @property
    def label_names(self) -> list[str]:
        """The labels' names in the order of the logits."""
        return [self.id2label[index] for index in range(self.num_labels)]

    def forget_calibration(self) -> None:
        """Takes back what was fitted after training, so that the model gives its head's logits as they are.

        Training changes the head, and what was fitted to the old one is wrong for the new one.
        """
        self.predictions_for = "training"
        self.calibration_temperature = self.calibration_shift = self.decision_threshold = self.decision_aim = None

    @property
    def decisive(self) -> dict[str, Any]:
        """The configuration as plain values, without what differs from one loading of the same model to the next."""
        settings: dict[str, Any] = json.loads(self.to_json_string(use_diff=False))
        for part in (settings, settings["encoder_config"] or {}):
            for name in ("architectures", "dtype", "transformers_version"):
                part.pop(name, None)
        return settings

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, without the paths of the machine that it was made on."""
        output: dict[str, Any] = super().to_dict()
        # transformers keeps in `_name_or_path` where the encoder was loaded from: somebody's home folder.
        for part in (output, output.get("encoder_config") or {}):
            part.pop("_name_or_path", None)
        return output

    def _check(self) -> None:
        choices_of = {"head_type": HEAD_TYPES, "problem_type": PROBLEM_TYPES}
        choices_of |= {"vote_loss_reduction": VOTE_LOSS_REDUCTIONS, "predictions_for": PREVALENCES}
        if self.pooling is not None:
            choices_of["pooling"] = POOLINGS
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")
        for name in ("head_dropout", "label_smoothing"):
            share = getattr(self, name)
            if not _is_number(share) or not 0 <= share < 1:
                raise ValueError(f"{name} is {share!r}; give a share of at least 0 and below 1.")
        widths = {"head_hidden_size": self.head_hidden_size, "embedding_size": self.embedding_size or 1}
        for name, width in widths.items():
            if not isinstance(width, int) or not 0 < width <= LARGEST_WIDTH:
                raise ValueError(f"{name} is {width!r}; give a whole number from 1 to {LARGEST_WIDTH}.")
        self._check_labels()
        self._check_shares()
        self._check_calibration()
        self._check_votes()

    def _check_votes(self) -> None:
        if self.problem_type == "votes" and self.decision_tree is None:
            raise ValueError("problem_type is 'votes' and there is no decision_tree; give the survey's.")
        limits = self.concentration_range
        if len(limits) != 2 or not all(_is_number(limit) for limit in limits) or not 0 < limits[0] < limits[1]:
            raise ValueError(
                f"concentration_range is {limits!r}; give the lowest and the highest concentration, both above 0."
            )

    def _check_shares(self) -> None:
        kinds = {"sky_prevalence": "share", "training_prevalence": "share", "decision_threshold": "probability"}
        for name, kind in kinds.items():
            shares = getattr(self, name)
            if shares is None:
                continue
            if not isinstance(shares, dict) or not all(_is_number(s) and 0 <= s <= 1 for s in shares.values()):
                raise ValueError(f"{name} is {shares!r}; give each label's {kind}, from 0 to 1, by its name.")

    def _check_calibration(self) -> None:
        # Whether there are as many as labels is looked at where they are applied: a new head may be on its way.
        temperature, shift = self.calibration_temperature, self.calibration_shift
        temperatures: Any = temperature if isinstance(temperature, (list, tuple)) else [temperature]
        if temperature is not None and not all(_is_number(value) and value > 0 for value in temperatures):
            raise ValueError(
                f"calibration_temperature is {temperature!r}; give a number above 0, or a list of one for each label."
            )
        if shift is not None and not (isinstance(shift, (list, tuple)) and all(map(_is_number, shift))):
            raise ValueError(f"calibration_shift is {shift!r}; give a list of one number for each label.")

    def _check_labels(self) -> None:
        if sorted(self.id2label) != list(range(self.num_labels)):
            raise ValueError(f"id2label has the numbers {sorted(self.id2label)}; number the labels from 0 upwards.")
        if self.class_weights is None:
            return
        weights = self.class_weights
        if not isinstance(weights, (list, tuple)) or not all(_is_number(w) and w >= 0 for w in weights):
            raise ValueError(f"class_weights is {weights!r}; give a list of numbers of at least 0, one for each label.")
        if len(weights) != self.num_labels:
            raise ValueError(
                f"class_weights has {len(weights)} values for {self.num_labels} labels "
                f"({', '.join(self.label_names)}); give one for each, in this order."
            )


def labels_of_votes(decision_tree: dict[str, Any], *, id2label: dict[Any, str] | None = None) -> dict[str, Any]:
    """The labels and the problem type that belong to a decision tree, as fields of a configuration.

    Args:
        decision_tree: Plain values, as in `ZoobotConfig`.
        id2label: Labels that were given as well.

    Raises:
        ValueError: The tree isn't one, or the labels are not its vote columns.
    """
    columns = tree_layout(decision_tree).vote_columns
    # In a saved configuration the numbers are text, and in the order of text.
    given = [id2label[number] for number in sorted(id2label, key=int)] if id2label else columns
    if given != columns:
        raise ValueError(
            f"the labels {', '.join(given[:5])}, ... are not the vote columns of the decision tree "
            f"{decision_tree['name']!r}, {', '.join(columns[:5])}, ...; leave the labels out."
        )
    labels = dict(enumerate(columns))
    return {"id2label": labels, "label2id": {name: i for i, name in labels.items()}, "problem_type": "votes"}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _as_config(encoder_config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig | None:
    if encoder_config is None or isinstance(encoder_config, PreTrainedConfig):
        return encoder_config
    if not isinstance(encoder_config, dict):
        raise ValueError(f"encoder_config is {encoder_config!r}; give a transformers configuration or its dictionary.")
    settings = dict(encoder_config)
    model_type = settings.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or model_type == ZoobotConfig.model_type:
        # An encoder's code is never taken from a repository: only the classes of transformers are built.
        raise ValueError(f"encoder_config has model_type {model_type!r}, but this transformers has no such encoder.")
    _check_sizes(settings, "encoder_config")
    try:
        return CONFIG_MAPPING[model_type].from_dict(settings)
    except StrictDataclassError as error:
        raise ValueError(f"encoder_config is no {model_type} configuration: {error}") from error


def _check_sizes(settings: Any, where: str, *, largest: int = LARGEST_WIDTH) -> None:
    """Refuses whole numbers that no encoder has, before anything is built that large."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            counts_layers = isinstance(name, str) and ("layers" in name or "depth" in name)
            _check_sizes(value, f"{name} of {where}", largest=MOST_LAYERS if counts_layers else largest)
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            _check_sizes(value, where, largest=largest)
    elif isinstance(settings, (int, float)) and math.isfinite(settings) and abs(settings) > largest:
        raise ValueError(f"{where} is or holds {settings}; no encoder has more than {largest}.")

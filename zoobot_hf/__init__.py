"""Galaxy Zoo's classifier, the Hugging Face way."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from .data.balance import BalancedSplit, balance_classes, measure_prevalence
from .data.catalog import read_catalog, read_galaxies, write_catalog
from .data.dataset import (
    catalog_to_dataset,
    load_galaxy_dataset,
    load_galaxy_votes,
    read_votes,
    split_dataset,
    votes_to_dataset,
)
from .data.decision_tree import Answer, DecisionTree, Question, join_trees, load_survey, load_tree, survey_names
from .data.rings import keep_featured_face_on, label_rings_by_votes, load_rings, load_rings_by_votes
from .data.simulation import simulate_galaxies
from .models.configuration_zoobot import ZoobotConfig, small_encoder_config
from .models.conversion import image_processor_for
from .models.image_processing_zoobot import ZoobotImageProcessor
from .models.modeling_galaxy_zoo import ZoobotForGalaxyZoo
from .models.modeling_zoobot import ZoobotForImageClassification, ZoobotModel
from .models.votes import expected_share_asked, expected_vote_fractions, tree_layout, vote_fraction_intervals
from .prediction.survey import Predictions, predict_galaxies
from .publishing.hub import push_folder
from .training.arguments import FrozenStageArguments, UnfrozenStageArguments, unfrozen_arguments_from_scratch
from .training.finetuning import Finetuned, finetune
from .training.trainer import FrozenStageTrainer, UnfrozenStageTrainer

__version__ = "0.1.0"

AutoConfig.register(ZoobotConfig.model_type, ZoobotConfig, exist_ok=True)
AutoModel.register(ZoobotConfig, ZoobotModel, exist_ok=True)
AutoModelForImageClassification.register(ZoobotConfig, ZoobotForImageClassification, exist_ok=True)
AutoImageProcessor.register(ZoobotConfig, image_processor_classes={"torchvision": ZoobotImageProcessor}, exist_ok=True)

__all__ = [
    "Answer",
    "BalancedSplit",
    "DecisionTree",
    "Finetuned",
    "FrozenStageArguments",
    "FrozenStageTrainer",
    "Predictions",
    "Question",
    "UnfrozenStageArguments",
    "UnfrozenStageTrainer",
    "ZoobotConfig",
    "ZoobotForGalaxyZoo",
    "ZoobotForImageClassification",
    "ZoobotImageProcessor",
    "ZoobotModel",
    "balance_classes",
    "catalog_to_dataset",
    "expected_share_asked",
    "expected_vote_fractions",
    "finetune",
    "image_processor_for",
    "join_trees",
    "keep_featured_face_on",
    "label_rings_by_votes",
    "load_galaxy_dataset",
    "load_galaxy_votes",
    "load_rings",
    "load_rings_by_votes",
    "load_survey",
    "load_tree",
    "measure_prevalence",
    "predict_galaxies",
    "push_folder",
    "read_catalog",
    "read_galaxies",
    "read_votes",
    "simulate_galaxies",
    "small_encoder_config",
    "split_dataset",
    "survey_names",
    "tree_layout",
    "unfrozen_arguments_from_scratch",
    "vote_fraction_intervals",
    "votes_to_dataset",
    "write_catalog",
]

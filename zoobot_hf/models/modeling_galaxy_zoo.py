"""An encoder that answers all of a survey's questions at once, as its volunteers would."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from .checkpoint import Checkpoint
from .configuration_zoobot import ZoobotConfig
from .modeling_zoobot import ModelWithHead, ZoobotModel
from .votes import concentrations_from_logits, shared_answers, tree_layout, vote_loss

logger = logging.getLogger(__name__)


@dataclass
class ZoobotVotesOutput(ModelOutput):
    """What the head says about the volunteers' answers.

    Attributes:
        loss: The batch's mean loss, where votes were given.
        concentrations: Of each question's Dirichlet distribution, (batch, answers) in the order of the vote columns.
    """

    loss: Tensor | None = None
    concentrations: Tensor | None = None


class ZoobotForGalaxyZoo(ModelWithHead):
    """An encoder with a head that predicts a Dirichlet distribution over the answers of each question of a survey.

    What the concentrations say is read with `expected_vote_fractions`, `vote_fraction_intervals` and
    `expected_share_asked`, given them and the model's `layout`.

    Args:
        config: The configuration, with `encoder_config` and `decision_tree`.

    Raises:
        ValueError: The configuration has no encoder or no decision tree.
    """

    def __init__(self, config: ZoobotConfig) -> None:
        if config.decision_tree is None:
            raise ValueError(
                "the configuration has no decision_tree; give a survey's, for example "
                "decision_tree=load_survey('euclid').to_dict()."
            )
        super().__init__(config)
        self.layout = tree_layout(config.decision_tree)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """A finetuned model as it is, or a trained encoder with a new head; the log says which.

        A zoobot_hf repository with a decision tree is taken as it is, unless another one is asked for. Then the new
        head's answers start from the old head's where both trees have the same answer: the same vote column, or, for
        a question without one, the same texts of question and answer, to the letter, once what `suffixes` names is
        taken off the questions' ends. Where the old tree has the question several times, the one with the most answers
        in common counts, and the last of these. A `.ckpt` file of Zoobot's, or a repository that holds one, is taken
        as it is where the tree has as many answers as it has outputs; the tree is not in it and has to be given, and
        nothing but this number can be checked. Any other repository is an encoder and gets a new head.

        Args:
            pretrained_model_name_or_path: A local folder, a `.ckpt` file or a Hub id.
            **kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`; `dtype`,
                float32 when absent; `decision_tree` and other fields of `ZoobotConfig`; for a zoobot_hf repository
                whatever else transformers takes, but `output_loading_info`.

        Raises:
            OSError: No such folder or repository, or no network.
            ValueError: The checkpoint doesn't fit its configuration, or there is no tree.
        """
        source = Checkpoint.find(pretrained_model_name_or_path, kwargs)
        if source.is_ours and not source.asks_for_new_head():
            model = cls._from_own_repository(source)
            logger.info("Loaded %s with its head for the decision tree %r.", source.name, model.tree_name)
            return model
        keeps_answers = source.has_decision_tree and not source.asks_for_other_embeddings()
        old = cls._with_old_head(source) if keeps_answers else None
        if old is not None:
            encoder, config = old.encoder, source.wanted_config()
        elif source.is_ours:
            encoder, config = ZoobotModel._from_own_repository(source).encoder, source.wanted_config()
        else:
            encoder, config = source.load_foreign_encoder()
        model = cls._with_new_head(encoder, config, source)
        if old is not None:
            model._start_from(old)
        elif not source.keeps_zoobot_head():
            logger.info(
                "The %s head for the decision tree %r is new, to be trained.", config.head_type, model.tree_name
            )
        return model

    @property
    def tree_name(self) -> str:
        """The decision tree's name."""
        return str(self.config.decision_tree["name"])

    def forward(
        self, pixel_values: Tensor | None = None, embeddings: Tensor | None = None, labels: Tensor | None = None
    ) -> ZoobotVotesOutput:
        """The concentrations for a batch of images, or of embeddings where the encoder was already run.

        Args:
            pixel_values: From `ZoobotImageProcessor`: float, (batch, channels, height, width).
            embeddings: From `ZoobotModel`: float, (batch, embedding_size).
            labels: Votes: counts (batch, answers), 0 where a question was not asked, NaN where they are missing.

        Raises:
            ValueError: Neither images nor embeddings, or both; votes that aren't counts for each of the vote columns.
        """
        logits = self._run_head(pixel_values, embeddings)
        concentrations = concentrations_from_logits(logits, self.config.concentration_range)
        if labels is None:
            return ZoobotVotesOutput(None, concentrations)
        reduction = self.config.vote_loss_reduction
        return ZoobotVotesOutput(vote_loss(concentrations, labels, self.layout, reduction=reduction), concentrations)

    @classmethod
    def _with_old_head(cls, source: Checkpoint) -> Self:
        return cls._from_own_repository(source.as_saved())

    @torch.no_grad()
    def _start_from(self, old: "ZoobotForGalaxyZoo") -> None:
        """Copies from another tree's head what both trees share."""
        shared = shared_answers(old.config.decision_tree, self.config.decision_tree)
        old_layers, new_layers = _linear_layers(old.head), _linear_layers(self.head)
        # The last layer has a row for each answer; those before it are the whole head's.
        same_shapes = [layer.weight.shape for layer in old_layers[:-1]] == [
            layer.weight.shape for layer in new_layers[:-1]
        ]
        if not same_shapes or old_layers[-1].in_features != new_layers[-1].in_features:
            shared = {}
        elif shared:
            for old_layer, new_layer in zip(old_layers[:-1], new_layers[:-1], strict=True):
                new_layer.load_state_dict(old_layer.state_dict())
            rows, old_rows = list(shared), list(shared.values())
            new_layers[-1].weight[rows] = old_layers[-1].weight[old_rows]
            new_layers[-1].bias[rows] = old_layers[-1].bias[old_rows]
        columns = self.layout.vote_columns
        logger.info(
            "The head for the decision tree %r starts from that for %r; %d answers are taken over: %s; %d are new: %s.",
            self.tree_name,
            old.tree_name,
            len(shared),
            ", ".join(columns[row] for row in shared) or "none",
            len(columns) - len(shared),
            ", ".join(column for row, column in enumerate(columns) if row not in shared) or "none",
        )


def _linear_layers(head: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in head if isinstance(layer, nn.Linear)]

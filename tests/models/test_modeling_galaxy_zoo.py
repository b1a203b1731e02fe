import copy
import logging

import numpy as np
import pytest
import torch
from tiny_models import ENCODERS, with_decided_head
from transformers import AutoModel, AutoModelForImageClassification

from zoobot_hf import (
    ZoobotConfig,
    ZoobotForGalaxyZoo,
    ZoobotForImageClassification,
    ZoobotModel,
    expected_vote_fractions,
    load_survey,
)

DECALS, EUCLID = load_survey("decals_dr5").to_dict(), load_survey("euclid").to_dict()
DECALS_COLUMNS, EUCLID_COLUMNS = load_survey("decals_dr5").vote_columns, load_survey("euclid").vote_columns
EUCLID_COUNTS = [len(question["answers"]) for question in EUCLID["questions"]]


def config_of(encoder="layer_norm", tree=DECALS, **fields):
    return ZoobotConfig(copy.deepcopy(ENCODERS[encoder]), decision_tree=tree, **fields)


def model_of(*arguments, **fields):
    torch.manual_seed(0)
    return with_decided_head(ZoobotForGalaxyZoo(config_of(*arguments, **fields)).eval())


@pytest.fixture(scope="module")
def pixel_values():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def votes():
    return torch.randint(0, 9, (4, 34), generator=torch.Generator().manual_seed(2)).float()


@pytest.fixture
def saved(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path / "decals")
    return model, tmp_path / "decals"


def rows_of(model, columns):
    rows = [model.layout.vote_columns.index(column) for column in columns]
    return torch.cat([model.head[-1].weight[rows], model.head[-1].bias[rows, None]], 1)


# Forward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", list(ENCODERS))
def test_every_answer_gets_a_concentration_between_1_and_101(encoder, pixel_values):
    concentrations = model_of(encoder)(pixel_values).concentrations
    assert concentrations.shape == (4, 34)
    assert concentrations.min() > 1
    assert concentrations.max() < 101


def test_another_range_of_concentrations_is_kept_to(pixel_values):
    concentrations = model_of(concentration_range=(0.5, 0.6))(pixel_values).concentrations
    assert concentrations.min() >= 0.5
    assert concentrations.max() <= 0.6


def test_embeddings_stand_in_for_images(pixel_values, votes):
    model = model_of()
    from_images = model(pixel_values, labels=votes)
    from_embeddings = model(embeddings=model.zoobot(pixel_values).embeddings, labels=votes)
    assert torch.equal(from_images.concentrations, from_embeddings.concentrations)
    assert torch.equal(from_images.loss, from_embeddings.loss)


def test_neither_or_both_inputs_are_refused(pixel_values):
    model = model_of()
    for arguments in ({}, {"pixel_values": pixel_values, "embeddings": torch.zeros(4, 16)}):
        with pytest.raises(ValueError, match="give either pixel_values or embeddings"):
            model(**arguments)


def test_the_loss_is_a_sum_or_a_mean_over_questions(pixel_values, votes):
    total = model_of()(pixel_values, labels=votes).loss
    mean = model_of(vote_loss_reduction="mean")(pixel_values, labels=votes).loss
    assert mean.item() == pytest.approx(total.item() / 10, rel=1e-6)


def test_the_loss_stays_float32_under_autocast(pixel_values, votes):
    model = model_of()
    exact = model(pixel_values, labels=votes)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixel_values, labels=votes)
    assert (output.loss.dtype, output.concentrations.dtype) == (torch.float32, torch.float32)
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)


def test_a_few_steps_learn_the_votes(pixel_values):
    torch.manual_seed(0)
    model = model_of(head_dropout=0.0)
    fractions = torch.rand(4, 34)
    votes = (40 * fractions).round()
    model.freeze_encoder()
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.train()(pixel_values, labels=votes).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_galaxy_without_votes_teaches_nothing(pixel_values):
    model = model_of()
    model(pixel_values, labels=torch.full((4, 34), float("nan"))).loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.head.parameters())


def test_votes_for_another_tree_are_refused(pixel_values):
    with pytest.raises(ValueError, match="give each galaxy a count for each of the 34 vote columns"):
        model_of()(pixel_values, labels=torch.zeros(4, 46))


@pytest.mark.parametrize("encoder", ["layer_norm", "batch_norm"])
def test_a_frozen_encoder_keeps_every_parameter_and_buffer(encoder, pixel_values, votes):
    model = model_of(encoder)
    model.freeze_encoder()
    before = copy.deepcopy(model.encoder.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model.train()(pixel_values, labels=votes).loss.backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())
    model.unfreeze_encoder(1)
    model.train()(pixel_values, labels=votes).loss.backward()
    optimizer.step()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())


# Configuration --------------------------------------------------------------------------------------------------


def test_the_configuration_holds_the_whole_tree(saved):
    loaded = ZoobotConfig.from_pretrained(saved[1])
    assert loaded.decision_tree == DECALS
    assert loaded.label_names == load_survey("decals_dr5").vote_columns
    assert (loaded.problem_type, loaded.concentration_range) == ("votes", [1.0, 101.0])


def test_a_model_needs_a_tree():
    with pytest.raises(ValueError, match=r"the configuration has no decision_tree; give a survey's, for example"):
        ZoobotForGalaxyZoo(ZoobotConfig(ENCODERS["layer_norm"]))


def test_votes_need_a_tree():
    with pytest.raises(ValueError, match="problem_type is 'votes' and there is no decision_tree; give the survey's"):
        ZoobotConfig(problem_type="votes")


def test_labels_that_are_not_the_trees_are_refused():
    with pytest.raises(ValueError, match=r"the labels a, b, ... are not the vote columns of the decision tree 'decals"):
        config_of(id2label={0: "a", 1: "b"})


@pytest.mark.parametrize("limits", [(0, 1), (5, 5), (1,), (1, float("nan")), (1, "many")])
def test_a_range_that_no_concentration_has_is_refused(limits):
    with pytest.raises(ValueError, match=r"concentration_range is .*; give the lowest and the highest concentration"):
        config_of(concentration_range=limits)


def test_another_reduction_is_refused():
    with pytest.raises(ValueError, match="vote_loss_reduction is 'median'; choose one of sum, mean"):
        config_of(vote_loss_reduction="median")


def test_a_configuration_with_a_loop_is_refused():
    tree = copy.deepcopy(DECALS)
    tree["questions"][0]["asked_after"] = ["merging-dr5_none"]
    with pytest.raises(ValueError, match="decision_tree has a loop among smooth-or-featured-dr5"):
        config_of(tree=tree)


# from_pretrained ------------------------------------------------------------------------------------------------


def test_a_finetuned_model_comes_back_as_it_was(saved, pixel_values):
    model, folder = saved
    loaded = ZoobotForGalaxyZoo.from_pretrained(folder)
    assert torch.equal(loaded(pixel_values).concentrations, model(pixel_values).concentrations)
    assert loaded.config.decision_tree == DECALS
    assert not loaded.training


def test_the_same_tree_asked_for_again_keeps_the_head(saved, pixel_values):
    model, folder = saved
    loaded = ZoobotForGalaxyZoo.from_pretrained(folder, decision_tree=copy.deepcopy(DECALS))
    assert torch.equal(loaded(pixel_values).concentrations, model(pixel_values).concentrations)


def test_a_tree_that_asks_others_the_same_questions_keeps_the_head(saved, pixel_values):
    model, folder = saved
    tree = copy.deepcopy(DECALS)
    tree["questions"][-1]["asked_after"] = []
    loaded = ZoobotForGalaxyZoo.from_pretrained(folder, decision_tree=tree)
    assert torch.equal(loaded(pixel_values).concentrations, model(pixel_values).concentrations)
    assert not loaded.layout.is_asked_after[:, -1].any()


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_answers_that_both_surveys_share_start_from_the_old_head(head_type, tmp_path, pixel_values, caplog):
    old = model_of(head_type=head_type, head_hidden_size=8)
    old.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        new = ZoobotForGalaxyZoo.from_pretrained(tmp_path, decision_tree=EUCLID)
    shared = [column for column in EUCLID_COLUMNS if column.replace("-euclid", "-dr5") in old.layout.vote_columns]
    assert len(shared) == 33
    assert torch.equal(rows_of(new, shared), rows_of(old, [column.replace("-euclid", "-dr5") for column in shared]))
    bars = [column for column in shared if column.startswith("bar")]
    old_fractions = expected_vote_fractions(old(pixel_values).concentrations.detach(), old.layout)
    new_fractions = expected_vote_fractions(new(pixel_values).concentrations.detach(), new.layout)
    old_bars = [old.layout.vote_columns.index(column.replace("-euclid", "-dr5")) for column in bars]
    new_bars = [new.layout.vote_columns.index(column) for column in bars]
    assert new_fractions[:, new_bars] == pytest.approx(old_fractions[:, old_bars], abs=1e-6)
    assert "decision tree 'euclid' starts from that for 'decals_dr5'; 33 answers are taken over: smooth" in caplog.text
    assert "13 are new: smooth-or-featured-euclid_problem, clumps-euclid_yes, clumps-euclid_no, problem" in caplog.text


def train_an_epoch(model, embeddings, votes, *, epochs=1):
    """The loss on the same galaxies after so many epochs."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.01)
    for rows in list(torch.arange(len(embeddings)).split(32)) * epochs:
        optimizer.zero_grad()
        model.train()(embeddings=embeddings[rows], labels=votes[rows]).loss.backward()
        optimizer.step()
    return model.eval()(embeddings=embeddings, labels=votes).loss.item()


def test_a_trained_tree_finetunes_to_another_surveys_questions_better_than_a_new_head(tmp_path):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(256, 16, generator=generator)
    logits = 3 * embeddings @ torch.randn(16, 46, generator=generator)
    probabilities = torch.cat([part.softmax(1) for part in logits.split(EUCLID_COUNTS, dim=1)], 1)
    euclid_votes = (20 * probabilities).round()
    # Both surveys ask the same but for a third of the first question, a problem or an artifact.
    in_euclid = [column.replace("-dr5", "-euclid").replace("_artifact", "_problem") for column in DECALS_COLUMNS]
    of_decals = [EUCLID_COLUMNS.index(column) for column in in_euclid]
    old = model_of(head_dropout=0.0)
    train_an_epoch(old, embeddings, euclid_votes[:, of_decals], epochs=10)
    old.save_pretrained(tmp_path / "decals")
    started = ZoobotForGalaxyZoo.from_pretrained(tmp_path / "decals", decision_tree=EUCLID)
    fresh = model_of(tree=EUCLID, head_dropout=0.0)
    assert train_an_epoch(started, embeddings, euclid_votes) < 0.9 * train_an_epoch(fresh, embeddings, euclid_votes)


def test_a_head_of_another_type_starts_afresh(saved, caplog):
    _, folder = saved
    with caplog.at_level(logging.INFO):
        new = ZoobotForGalaxyZoo.from_pretrained(folder, decision_tree=EUCLID, head_type="mlp")
    assert "0 answers are taken over: none; 46 are new" in caplog.text
    assert new.head[-1].weight.shape == (46, 256)


@pytest.mark.parametrize("tree", [{}, {"decision_tree": EUCLID}])
def test_no_answer_starts_from_a_head_on_other_embeddings(tree, saved, caplog):
    with caplog.at_level(logging.INFO):
        new = ZoobotForGalaxyZoo.from_pretrained(saved[1], pooling="mean", **tree)
    assert new.config.pooling == "mean"
    assert not new.head[-1].weight.any()
    assert f"The linear head for the decision tree '{new.tree_name}' is new, to be trained" in caplog.text


def test_a_tree_in_a_given_configuration_is_that_of_the_new_head(saved):
    model, folder = saved
    config = ZoobotConfig.from_dict({**model.config.to_dict(), **config_of(tree=EUCLID).to_dict()})
    new = ZoobotForGalaxyZoo.from_pretrained(folder, config=config)
    assert new.tree_name == "euclid"
    assert torch.equal(rows_of(new, ["bar-euclid_no"]), rows_of(model, ["bar-dr5_no"]))
    classifier_config = ZoobotConfig(config.encoder_config, problem_type="multi_label_classification")
    classifier = ZoobotForImageClassification.from_pretrained(folder, config=classifier_config)
    assert classifier.config.problem_type == "multi_label_classification"


def test_a_new_tree_is_where_the_encoder_is(saved):
    new = ZoobotForGalaxyZoo.from_pretrained(saved[1], decision_tree=EUCLID, device_map={"": "meta"})
    assert {parameter.device.type for parameter in new.parameters()} == {"meta"}


def test_a_head_of_another_type_answers_the_same_tree(saved):
    new = ZoobotForGalaxyZoo.from_pretrained(saved[1], head_type="mlp", head_hidden_size=8)
    assert new.config.decision_tree == DECALS
    assert new.head[1].weight.shape == (8, 16)


def test_the_encoder_of_a_finetuned_tree_is_kept(saved):
    model, folder = saved
    new = ZoobotForGalaxyZoo.from_pretrained(folder, decision_tree=EUCLID)
    kept = new.encoder.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.encoder.state_dict().items())


def test_a_changed_tree_is_saved_and_loaded_again(saved, tmp_path, pixel_values):
    new = ZoobotForGalaxyZoo.from_pretrained(saved[1], decision_tree=EUCLID)
    new.save_pretrained(tmp_path / "euclid")
    loaded = ZoobotForGalaxyZoo.from_pretrained(tmp_path / "euclid")
    assert loaded.tree_name == "euclid"
    assert torch.equal(loaded(pixel_values).concentrations, new(pixel_values).concentrations)


def test_a_classifiers_encoder_gets_a_new_head_for_a_tree(tmp_path, layer_norm_model, caplog):
    layer_norm_model.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        model = ZoobotForGalaxyZoo.from_pretrained(tmp_path, decision_tree=DECALS)
    kept = model.encoder.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in layer_norm_model.encoder.state_dict().items())
    assert model.head[-1].weight.shape == (34, 16)
    assert "The linear head for the decision tree 'decals_dr5' is new, to be trained" in caplog.text


def test_a_foreign_encoder_gets_a_new_head_for_a_tree(tmp_path, layer_norm_model, pixel_values):
    layer_norm_model.encoder.save_pretrained(tmp_path)
    model = ZoobotForGalaxyZoo.from_pretrained(tmp_path, decision_tree=EUCLID)
    assert model(pixel_values).concentrations.shape == (4, 46)


@pytest.mark.parametrize("part", ["encoder", "whole"])
def test_no_tree_is_refused(part, tmp_path, layer_norm_model):
    (layer_norm_model if part == "whole" else layer_norm_model.encoder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no decision_tree; give a survey's, for example decision_tree="):
        ZoobotForGalaxyZoo.from_pretrained(tmp_path)


def test_a_classifier_takes_the_encoder_and_forgets_the_tree(saved):
    model, folder = saved
    classifier = ZoobotForImageClassification.from_pretrained(folder, label_names=["not ring", "ring"])
    kept = classifier.encoder.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.encoder.state_dict().items())
    assert classifier.config.decision_tree is None
    assert classifier.config.problem_type == "single_label_classification"


def test_auto_classes_put_a_classifiers_head_on_the_encoder_when_given_labels(saved):
    classifier = AutoModelForImageClassification.from_pretrained(saved[1], num_labels=3)
    assert (classifier.config.decision_tree, classifier.head[-1].weight.shape) == (None, (3, 16))


@pytest.mark.parametrize("loader", [ZoobotForImageClassification, AutoModelForImageClassification])
def test_a_tree_is_not_loaded_as_a_classifier(loader, saved):
    message = "answers the decision tree 'decals_dr5'; load it with ZoobotForGalaxyZoo, or give label_names"
    with pytest.raises(ValueError, match=message):
        loader.from_pretrained(saved[1])


def test_auto_model_gives_the_encoder(saved, pixel_values):
    model, folder = saved
    encoder = AutoModel.from_pretrained(folder)
    assert type(encoder) is ZoobotModel
    assert torch.equal(encoder(pixel_values).embeddings, model.zoobot(pixel_values).embeddings)


def test_fractions_of_every_question_add_up_to_1(saved, pixel_values):
    model, _ = saved
    fractions = expected_vote_fractions(model(pixel_values).concentrations.detach(), model.layout)
    sums = np.add.reduceat(fractions, np.flatnonzero(np.diff(model.layout.question_of_answer, prepend=-1)), axis=1)
    assert sums == pytest.approx(np.ones((4, 10)))

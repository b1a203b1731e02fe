import math

import pytest
import torch
from tiny_models import ENCODERS
from torch import nn
from torch.nn import functional

from zoobot_hf import ZoobotConfig, ZoobotForImageClassification, load_survey
from zoobot_hf.models.heads import (
    apply_unit_interval,
    build_head,
    calibrate_logits,
    effective_training_prevalence,
    fold_calibration,
    head_loss,
    logit_correction,
    loss_weight,
    prevalence_shift,
    probabilities_from_logits,
    set_initial_bias,
)
from zoobot_hf.models.votes import concentrations_from_logits

LOGITS = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.0, -0.5]])
CLASSES = torch.tensor([2, 1])
NAN = float("nan")


def config_of(problem_type="single_label_classification", **fields):
    labels = {0: "smooth", 1: "disk", 2: "ring"}
    return ZoobotConfig(problem_type=problem_type, id2label=labels, embedding_size=4, **fields)


def kinds_of(head):
    return [nn.Linear if isinstance(layer, nn.Linear) else type(layer) for layer in head]


def loss_of(logits, labels, config, *, training=False):
    return head_loss(logits, labels, config, training=training).item()


# Heads ----------------------------------------------------------------------------------------------------------


def test_a_linear_head_is_dropout_and_one_layer():
    head = build_head(config_of(head_dropout=0.3))
    assert kinds_of(head) == [nn.Dropout, nn.Linear]
    assert head[0].p == 0.3
    assert head(torch.zeros(5, 4)).shape == (5, 3)


def test_an_mlp_head_has_one_hidden_layer():
    head = build_head(config_of(head_type="mlp", head_hidden_size=7))
    assert kinds_of(head) == [nn.Dropout, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert head[1].weight.shape == (7, 4)
    assert head(torch.zeros(5, 4)).shape == (5, 3)


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_mixed_precision_leaves_a_head_alone(head_type):
    head = build_head(config_of(head_type=head_type)).eval()
    embeddings = torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.linear(embeddings, head[-1].weight.new_ones(3, 4)).dtype == torch.bfloat16
        assert torch.equal(head(embeddings), head.float()(embeddings.float()))
        assert head(embeddings.bfloat16()).dtype == torch.float32
    assert head.bfloat16()(embeddings.bfloat16()).dtype == torch.bfloat16


def test_a_head_for_votes_starts_with_low_concentrations():
    config = ZoobotConfig(decision_tree=load_survey("euclid").to_dict(), embedding_size=4)
    concentrations = concentrations_from_logits(build_head(config).eval()(torch.zeros(2, 4)), (1, 101))
    assert torch.allclose(concentrations, torch.tensor(4.0))
    assert build_head(config_of())[-1].bias.eq(0).all()


# Single label ---------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand():
    config = config_of()
    first = math.log(math.exp(0.5) + math.exp(-1) + math.exp(2)) - 2
    second = math.log(math.exp(1.5) + 1 + math.exp(-0.5)) - 0
    assert loss_of(LOGITS, CLASSES, config) == pytest.approx((first + second) / 2, abs=1e-6)


def test_class_weights_count_in_training_and_in_validation():
    config = config_of(class_weights=[1, 3, 0.5])
    losses = functional.cross_entropy(LOGITS, CLASSES, reduction="none")
    expected = (0.5 * losses[0] + 3 * losses[1]) / 3.5
    assert loss_of(LOGITS, CLASSES, config, training=True) == pytest.approx(expected.item(), abs=1e-6)
    assert loss_of(LOGITS, CLASSES, config, training=False) == pytest.approx(expected.item(), abs=1e-6)


def test_galaxies_of_a_class_that_counts_for_nothing_have_no_loss():
    config = config_of(class_weights=[1, 1, 0])
    logits = LOGITS.clone().requires_grad_()
    loss = head_loss(logits, torch.full_like(CLASSES, 2), config, training=True)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_label_smoothing_counts_in_training_only():
    config = config_of(label_smoothing=0.3)
    logarithms = LOGITS.log_softmax(-1)
    targets = torch.tensor([[0.1, 0.1, 0.8], [0.1, 0.8, 0.1]])
    assert loss_of(LOGITS, CLASSES, config, training=True) == pytest.approx(
        -(targets * logarithms).sum(-1).mean().item(), abs=1e-6
    )
    assert loss_of(LOGITS, CLASSES, config) == pytest.approx(loss_of(LOGITS, CLASSES, config_of()))


@pytest.mark.parametrize("classes", [[0, 3], [-1, 2]])
def test_a_class_that_the_model_lacks_is_refused(classes):
    message = f"labels run from {min(classes)} to {max(classes)}; the model has 3, from 0 to 2: smooth, disk, ring"
    with pytest.raises(ValueError, match=message):
        loss_of(LOGITS, torch.tensor(classes), config_of())


def test_fractions_are_refused_as_classes():
    with pytest.raises(ValueError, match="labels are no whole numbers"):
        loss_of(LOGITS, torch.tensor([0.95, 0.1]), config_of())


def test_one_hot_labels_are_refused_for_a_single_label():
    with pytest.raises(ValueError, match=r"labels have the shape \(2, 3\); give each galaxy one class index"):
        loss_of(LOGITS, torch.zeros(2, 3), config_of())


def test_the_loss_of_half_precision_logits_is_float32():
    loss = head_loss(LOGITS.bfloat16(), CLASSES, config_of(), training=True)
    assert loss.dtype == torch.float32


# Several labels -------------------------------------------------------------------------------------------------


def test_binary_cross_entropy_by_hand():
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    probabilities = 1 / (1 + torch.exp(-LOGITS))
    expected = -torch.where(labels == 1, probabilities.log(), (1 - probabilities).log()).mean()
    config = config_of("multi_label_classification")
    assert loss_of(LOGITS, labels, config) == pytest.approx(expected.item(), abs=1e-6)
    assert loss_of(LOGITS, labels.long(), config) == pytest.approx(expected.item(), abs=1e-6)


def test_smoothing_pulls_several_labels_towards_one_half():
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    config = config_of("multi_label_classification", label_smoothing=0.2)
    expected = functional.binary_cross_entropy_with_logits(LOGITS, labels * 0.8 + 0.1)
    assert loss_of(LOGITS, labels, config, training=True) == pytest.approx(expected.item(), abs=1e-6)
    unsmoothed = functional.binary_cross_entropy_with_logits(LOGITS, labels)
    assert loss_of(LOGITS, labels, config) == pytest.approx(unsmoothed.item(), abs=1e-6)


def test_class_weights_weigh_each_of_several_labels():
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    losses = functional.binary_cross_entropy_with_logits(LOGITS, labels, reduction="none")
    config = config_of("multi_label_classification", class_weights=[1, 2, 4])
    expected = (losses * torch.tensor([1, 2, 4])).mean()
    assert loss_of(LOGITS, labels, config) == pytest.approx(expected.item(), abs=1e-6)


# Regression -----------------------------------------------------------------------------------------------------


def test_mean_squared_error_by_hand():
    labels = torch.tensor([[0.0, -1.0, 1.0], [1.5, 1.0, 0.0]])
    expected = (0.25 + 0 + 1 + 0 + 1 + 0.25) / 6
    assert loss_of(LOGITS, labels, config_of("regression")) == pytest.approx(expected)


def test_class_weights_weigh_each_output():
    labels = torch.tensor([[0.0, -1.0, 1.0], [1.5, 1.0, 0.0]])
    config = config_of("regression", class_weights=[1, 2, 4])
    assert loss_of(LOGITS, labels, config) == pytest.approx((0.25 + 4 * 1 + 2 * 1 + 4 * 0.25) / 6)


def test_in_the_unit_interval_the_error_is_that_of_the_sigmoid():
    labels = torch.rand(2, 3)
    config = config_of("regression", unit_interval=True)
    expected = functional.mse_loss(LOGITS.sigmoid(), labels)
    assert loss_of(LOGITS, labels, config) == pytest.approx(expected.item())


def test_the_unit_interval_is_a_sigmoid_only_where_it_is_asked_for():
    assert torch.equal(apply_unit_interval(LOGITS, config_of("regression", unit_interval=True)), LOGITS.sigmoid())
    assert torch.equal(apply_unit_interval(LOGITS, config_of("regression")), LOGITS)


# Unknown labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_unknown_labels_do_not_count(problem_type):
    config = config_of(problem_type)
    known = loss_of(LOGITS[:, :1], torch.tensor([[1.0], [0.0]]), config)
    assert loss_of(LOGITS, torch.tensor([[1, NAN, NAN], [0, NAN, NAN]]), config) == pytest.approx(known)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
@pytest.mark.parametrize("unit_interval", [False, True])
def test_an_unknown_label_has_no_gradient(problem_type, unit_interval):
    logits = LOGITS.clone().requires_grad_()
    labels = torch.tensor([[1.0, NAN, 0.0], [NAN, NAN, 1.0]])
    head_loss(logits, labels, config_of(problem_type, unit_interval=unit_interval), training=True).backward()
    assert logits.grad.isfinite().all()
    assert torch.equal(logits.grad == 0, labels.isnan())


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_a_batch_without_a_known_label_has_no_loss(problem_type):
    logits = LOGITS.clone().requires_grad_()
    loss = head_loss(logits, torch.full((2, 3), NAN), config_of(problem_type), training=True)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("labels", "fields"),
    [
        (torch.tensor([0, 1, 1, 2]), {}),
        (torch.tensor([0, 1, 1, 2]), {"class_weights": [1.0, 3.0, 0.5]}),
        (torch.tensor([[1, NAN, 0], [NAN, NAN, 1], [1, 0, 0], [NAN, NAN, NAN]]), {"problem_type": "regression"}),
    ],
)
def test_the_loss_of_all_galaxies_is_the_mean_of_the_batches_by_their_weights(labels, fields):
    config, logits = config_of(**fields), torch.randn(4, 3)
    batches = [slice(0, 1), slice(1, 4)]
    losses = torch.stack([head_loss(logits[rows], labels[rows], config, training=False) for rows in batches])
    weights = torch.stack([loss_weight(labels[rows], config) for rows in batches])
    expected = head_loss(logits, labels, config, training=False)
    torch.testing.assert_close((losses * weights).sum() / weights.sum(), expected)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_labels_of_another_shape_are_refused(problem_type):
    message = r"labels have the shape \(2,\) and the model's outputs \(2, 3\); .* NaN where it is unknown"
    with pytest.raises(ValueError, match=message):
        loss_of(LOGITS, CLASSES, config_of(problem_type))


# Probabilities --------------------------------------------------------------------------------------------------


def test_probabilities_of_a_single_label_sum_to_1():
    probabilities = probabilities_from_logits(LOGITS.bfloat16(), config_of())
    assert probabilities.dtype == torch.float32
    assert torch.allclose(probabilities.sum(-1), torch.ones(2))
    assert torch.equal(probabilities_from_logits(LOGITS, config_of()), LOGITS.softmax(-1))


def test_probabilities_of_several_labels_are_independent():
    assert torch.equal(probabilities_from_logits(LOGITS, config_of("multi_label_classification")), LOGITS.sigmoid())


def test_a_regressions_values_are_left_alone():
    assert torch.equal(probabilities_from_logits(LOGITS, config_of("regression")), LOGITS)


# Prevalence and calibration -------------------------------------------------------------------------------------

SINGLE, MULTI = "single_label_classification", "multi_label_classification"
BALANCED = {"smooth": 0.3, "disk": 0.3, "ring": 0.4}
SKY = {"smooth": 0.6, "disk": 0.35, "ring": 0.05}
PREVALENCES = {"training_prevalence": BALANCED, "sky_prevalence": SKY}


def test_the_prevalence_shift_is_bayes_theorem():
    likelihoods = torch.tensor([[0.2, 0.7, 1.3], [3.0, 0.1, 0.4]])
    old, new = torch.tensor([0.3, 0.3, 0.4]), torch.tensor([0.6, 0.35, 0.05])
    posterior = [(likelihoods * prior) / (likelihoods * prior).sum(-1, keepdim=True) for prior in (old, new)]
    shift = torch.tensor(prevalence_shift(old.tolist(), new.tolist(), problem_type=SINGLE))
    assert torch.allclose((posterior[0].log() + shift).softmax(-1), posterior[1], atol=1e-6)
    back = torch.tensor(prevalence_shift(new.tolist(), old.tolist(), problem_type=SINGLE))
    assert torch.allclose(shift, -back)


def test_each_of_several_labels_has_its_own_prevalence():
    # 3 of 4 have the label, so it is 3 times as likely as not; of 1 in 5 it is 1/4: 12 times less.
    shift = prevalence_shift([0.75, 0.5], [0.2, 0.5], problem_type=MULTI)
    assert shift == pytest.approx([-math.log(12), 0])


@pytest.mark.parametrize("shares", [[0.0, 1.0], [0.5, 0.5 + 1e-9, 0.0], [-0.1, 1.1], [NAN, 0.5]])
def test_a_prevalence_with_a_zero_is_refused(shares):
    with pytest.raises(ValueError, match="each label's share lies between 0 and 1, both excluded"):
        prevalence_shift(shares, [1 / len(shares)] * len(shares), problem_type=SINGLE)


def test_a_prevalence_that_does_not_add_up_is_refused():
    with pytest.raises(ValueError, match=r"adds up to 0\.6; the shares of one label for each galaxy add up to 1"):
        prevalence_shift([0.5, 0.5], [0.5, 0.1], problem_type=SINGLE)
    with pytest.raises(ValueError, match=r"adds up to 0\.99"):
        prevalence_shift([0.5, 0.49], [0.5, 0.5], problem_type=SINGLE)
    assert prevalence_shift([0.333] * 3, [0.333] * 3, problem_type=SINGLE) == [0.0] * 3


def test_prevalences_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="old has 2 shares and new 3"):
        prevalence_shift([0.5, 0.5], [0.5, 0.3, 0.2], problem_type=SINGLE)


def test_a_model_without_calibration_gives_its_heads_logits_themselves():
    for config in (config_of(), config_of(**PREVALENCES), config_of("regression")):
        assert logit_correction(config) is None
        assert calibrate_logits(LOGITS, config) is LOGITS


def test_calibration_comes_before_the_shift_to_the_sky():
    config = config_of(
        calibration_temperature=2.0, calibration_shift=[0.5, 0, -0.5], predictions_for="sky", **PREVALENCES
    )
    ratios = torch.tensor([0.6 / 0.3, 0.35 / 0.3, 0.05 / 0.4])
    calibrated = (LOGITS / 2 + torch.tensor([0.5, 0, -0.5])).softmax(-1)
    expected = calibrated * ratios / (calibrated * ratios).sum(-1, keepdim=True)
    outputs = calibrate_logits(LOGITS, config)
    assert torch.allclose(probabilities_from_logits(outputs, config), expected, atol=1e-6)
    assert torch.allclose(probabilities_from_logits(outputs, config, prevalence="sky"), expected, atol=1e-6)
    assert torch.allclose(probabilities_from_logits(outputs, config, prevalence="training"), calibrated, atol=1e-6)


def test_a_model_for_the_training_prevalence_can_be_asked_about_the_sky():
    training = config_of(calibration_temperature=1.5, **PREVALENCES)
    sky = config_of(calibration_temperature=1.5, predictions_for="sky", **PREVALENCES)
    asked = probabilities_from_logits(calibrate_logits(LOGITS, training), training, prevalence="sky")
    assert torch.allclose(asked, probabilities_from_logits(calibrate_logits(LOGITS, sky), sky), atol=1e-6)


def test_several_labels_have_a_temperature_each():
    config = config_of(MULTI, calibration_temperature=[1.0, 2.0, 4.0])
    assert torch.allclose(calibrate_logits(LOGITS, config), LOGITS / torch.tensor([1.0, 2, 4]))


def test_class_weights_count_as_prevalence_for_a_single_label_only():
    weights = {"class_weights": [1, 1, 3], "label_smoothing": 0.1, **PREVALENCES}
    assert effective_training_prevalence(config_of(**weights)) == pytest.approx([0.3 / 1.8, 0.3 / 1.8, 1.2 / 1.8])
    assert effective_training_prevalence(config_of(MULTI, **weights)) == [0.3, 0.3, 0.4]


def test_half_precision_logits_are_calibrated_in_float32():
    outputs = calibrate_logits(LOGITS.bfloat16(), config_of(predictions_for="sky", **PREVALENCES))
    assert outputs.dtype == torch.float32


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_a_folded_last_layer_gives_calibrated_logits(problem_type):
    fields = {
        "calibration_temperature": [1.5, 0.7, 2.0],
        "calibration_shift": [0.1, 0.2, -0.3],
        "predictions_for": "sky",
    }
    config = config_of(problem_type, **fields, **PREVALENCES)
    layer, inputs = nn.Linear(4, 3), torch.randn(5, 4)
    weight, bias = fold_calibration(layer.weight, layer.bias, config)
    expected = calibrate_logits(layer(inputs), config)
    assert torch.allclose(functional.linear(inputs, weight, bias), expected, atol=1e-5)
    assert not torch.equal(weight, layer.weight)
    assert fold_calibration(layer.weight, layer.bias, config_of()) == (layer.weight, layer.bias)


@pytest.mark.parametrize("name", ["calibration_temperature", "calibration_shift"])
def test_a_calibration_of_another_model_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} has 2 values for 3 labels"):
        logit_correction(config_of(**{name: [1.0, 2.0]}))


@pytest.mark.parametrize("missing", ["sky_prevalence", "training_prevalence"])
def test_predictions_for_the_sky_need_both_prevalences(missing):
    config = config_of(predictions_for="sky", **{**PREVALENCES, missing: None})
    with pytest.raises(ValueError, match=f"{missing} has shares for no label; .* one for each of smooth, disk, ring"):
        logit_correction(config)


def test_a_prevalence_that_is_neither_is_refused():
    with pytest.raises(ValueError, match="prevalence is 'field'; choose one of training, sky"):
        probabilities_from_logits(LOGITS, config_of(**PREVALENCES), prevalence="field")


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_a_new_head_starts_out_undecided(head_type):
    model = ZoobotForImageClassification(ZoobotConfig(ENCODERS["layer_norm"], head_type=head_type))
    for head in (build_head(config_of(head_type=head_type)), model.head):
        assert not head[-1].bias.any()
        assert not head[-1].weight.any()
        assert all(layer.weight.any() for layer in head[:-1] if isinstance(layer, torch.nn.Linear))


SEVERAL = [[1.0, 0.0, NAN], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("labels", "fields"),
    [
        ([0, 0, 0, 1, 2], {}),
        ([0, 0, 0, 1, 2], {"class_weights": [1.0, 2.0, 5.0], "label_smoothing": 0.2}),
        (SEVERAL, {"problem_type": MULTI}),
        (SEVERAL, {"problem_type": MULTI, "class_weights": [1.0, 2.0, 5.0], "label_smoothing": 0.2}),
        ([[9.5, 0.1, NAN], [11.0, 0.3, 4.0]], {"problem_type": "regression"}),
        ([[0.5, 0.1, NAN], [0.9, 0.3, 0.2]], {"problem_type": "regression", "unit_interval": True}),
    ],
)
def test_a_new_head_starts_from_what_is_best_to_say_of_all_galaxies_alike(labels, fields):
    config, labels = config_of(**fields), torch.tensor(labels)
    head = build_head(config)
    set_initial_bias(head, labels, config)
    loss = head_loss(head(torch.randn(len(labels), 4)), labels, config, training=True)
    loss.backward()
    torch.testing.assert_close(head[-1].bias.grad, torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("labels", "fields"),
    [([0, 0, 1, 1], {}), ([[0.0, 1.0, NAN]] * 2 + [[NAN, 1.0, NAN]] * 2, {"problem_type": MULTI})],
)
def test_a_label_that_no_galaxy_has_starts_from_half_a_galaxy(labels, fields):
    config = config_of(**fields)
    head = build_head(config)
    set_initial_bias(head, torch.tensor(labels), config)
    bias = head[-1].bias
    if fields:
        assert bias.sigmoid().tolist() == pytest.approx([0.5 / 2, 1 - 0.5 / 4, 0.5])
    else:
        assert (bias[2] - bias[0]).exp().item() == pytest.approx(0.5 / 4 / 0.5)


@pytest.mark.parametrize(("unit_interval", "values"), [(False, [0.0, 1.0, 0.0]), (True, [1e-3, 1 - 1e-3, 0.5])])
def test_a_value_that_no_galaxy_has_starts_in_the_middle(unit_interval, values):
    config = config_of("regression", unit_interval=unit_interval)
    head = build_head(config)
    set_initial_bias(head, torch.tensor([[0.0, 1.0, NAN]] * 4), config)
    assert apply_unit_interval(head[-1].bias, config).tolist() == pytest.approx(values)


def test_a_head_that_was_trained_keeps_its_bias():
    config = config_of()
    head = build_head(config)
    nn.init.ones_(head[-1].weight)
    set_initial_bias(head, torch.tensor([0, 0, 1, 2]), config)
    assert head[-1].bias.tolist() == [0.0, 0.0, 0.0]

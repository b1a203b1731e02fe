import pytest
import torch
from transformers import ConvNextConfig

from zoobot_hf import ZoobotConfig, ZoobotForImageClassification
from zoobot_hf.models.heads import head_loss
from zoobot_hf.training import head_grid
from zoobot_hf.training.embedding_cache import Stored, StoredEmbeddings
from zoobot_hf.training.head_grid import HeadGrid
from zoobot_hf.training.linear_heads import choose_linear_heads, standardise


def make_model(**options):
    config = ConvNextConfig(hidden_sizes=[16], depths=[1], num_stages=1)
    return ZoobotForImageClassification(ZoobotConfig(config, **options)).eval()


def make_embeddings(count=40, *, views=2, images=None, labels=None):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2 if labels is None else labels
    values = torch.randn(count, views, 16, generator=generator) * torch.linspace(0.1, 3, 16) + 5
    values[:, :, 3] += labels[:, None]
    rows = torch.arange(count) if images is None else images
    return StoredEmbeddings(Stored(values, rows, "key"), labels[rows])


def test_a_grid_of_heads_starts_as_the_models_head_and_gives_it_back(layer_norm_model):
    stored = make_embeddings()
    grid = HeadGrid(layer_norm_model, stored, count=3).eval()
    embeddings, _ = next(stored.batches(100))
    with torch.inference_mode():
        expected = layer_norm_model(embeddings=embeddings).logits
        assert torch.allclose(grid(embeddings).logits, expected, atol=1e-4)
        assert torch.allclose(grid.winner().eval()(embeddings), expected, atol=1e-4)
        standardised = grid.standardise(embeddings)
    assert torch.allclose(standardised.mean(0), torch.zeros(16), atol=1e-4)


def test_all_heads_of_a_grid_train_on_the_same_dropped_out_embeddings(layer_norm_model):
    stored = make_embeddings()
    grid = HeadGrid(layer_norm_model, stored, count=2).train()
    embeddings = stored.values[:, 0].repeat(250, 1)
    seen = []
    for head in grid.heads:
        head[-1].register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].detach()))
    grid(embeddings, torch.zeros(len(embeddings), dtype=torch.long))
    assert torch.equal(*seen)
    share = layer_norm_model.config.head_dropout
    is_kept = seen[0] != 0
    assert abs(is_kept.float().mean() - (1 - share)) < 0.01
    expected = grid.standardise(embeddings) / (1 - share)
    assert torch.allclose(seen[0][is_kept], expected[is_kept])


def test_the_values_of_a_regression_are_in_its_interval():
    model = make_model(problem_type="regression", unit_interval=True)
    with torch.no_grad():
        model.head[-1].weight.normal_()
    stored = make_embeddings()
    embeddings, _ = next(stored.batches(100))
    labels = torch.rand(len(embeddings), 2)
    grid = HeadGrid(model, stored, count=1).eval()
    with torch.inference_mode():
        expected, found = (module(embeddings=embeddings, labels=labels) for module in (model, grid))
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)
    assert found.loss == pytest.approx(expected.loss.item(), rel=1e-3)


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_a_new_head_has_no_opinion_on_embeddings_that_are_far_from_zero(head_type):
    model = make_model(head_type=head_type, head_hidden_size=64)
    embeddings = 50 + torch.randn(100, 1, 16)
    stored = StoredEmbeddings(Stored(embeddings, torch.arange(100), "key"), torch.arange(100) % 2)
    grid = HeadGrid(model, stored, count=2).eval()
    assert not grid.heads[0](grid.standardise(embeddings[:, 0])).any()
    # Each hidden unit, too, tells galaxies apart: it is on for some of them.
    hidden = grid.heads[0][:-1](grid.standardise(embeddings[:, 0]))
    assert ((hidden > 0).float().mean(0) > 0.1).all()


def test_the_head_of_lowest_validation_loss_wins(layer_norm_model):
    stored = make_embeddings()
    grid = HeadGrid(layer_norm_model, stored, count=3)
    with torch.no_grad():
        grid.heads[0][-1].bias.copy_(torch.tensor([50.0, 0.0]))
        grid.heads[1][-1].bias.fill_(torch.nan)
    grid.choose_winner([stored])
    assert int(grid.winning_head) == 2


def test_every_known_label_counts_the_same_in_the_choice_of_a_head(monkeypatch):
    monkeypatch.setattr(head_grid, "ROWS_AT_ONCE", 4)
    # Of the second label four galaxies are known, all 1, in the last batch; of the first all, half of them 0.
    labels = torch.stack([torch.arange(40) % 2, torch.full((40,), torch.nan)], dim=1)
    labels[36:] = torch.tensor([1.0, 1.0])
    stored = make_embeddings(views=1)
    stored = StoredEmbeddings(Stored(stored.values, stored.rows, "key"), labels)
    model = make_model(problem_type="multi_label_classification")
    grid = HeadGrid(model, stored, count=2)
    with torch.no_grad():
        grid.heads[0][-1].bias.copy_(torch.tensor([-0.75, 0.0]))
        grid.heads[1][-1].bias.copy_(torch.tensor([0.0, -2.0]))
        losses = [head_loss(head(stored.values[:, 0] * 0), labels, model.config, training=False) for head in grid.heads]
    grid.choose_winner([stored])
    assert int(grid.winning_head) == int(torch.stack(losses).argmin())


def test_a_new_head_is_the_mean_of_the_winner_and_a_logistic_regression():
    stored = make_embeddings()
    grid = HeadGrid(make_model(), stored, count=2)
    with torch.no_grad():
        grid.heads[0][-1].weight.normal_()
        grid.heads[1][-1].bias.fill_(torch.nan)
    grid.choose_winner([stored])
    embeddings, _ = next(stored.batches(100))
    (inputs,) = standardise(embeddings)
    folds = head_grid._deal_folds(stored.labels.numpy(), stored.rows.numpy(), classes=2)
    chosen = choose_linear_heads(inputs.view(1, 40, 2, 16), stored.labels[None], folds, num_labels=2)
    regression = inputs @ chosen.weight[0] + chosen.bias[0]
    assert regression.std() > 0.1
    with torch.inference_mode():
        expected = (regression + grid.heads[0].eval()(grid.standardise(embeddings))) / 2
        assert torch.allclose(grid.eval()(embeddings).logits, expected, atol=1e-4)
        assert torch.allclose(grid.winner().eval()(embeddings), expected, atol=1e-4)


@pytest.mark.parametrize("class_weights", [None, [1.0, 9.0]])
def test_the_regression_weighs_classes_as_the_loss_does(class_weights):
    stored = make_embeddings()
    grid = HeadGrid(make_model(class_weights=class_weights), stored, count=1)
    embeddings, labels = next(stored.batches(100))
    probabilities = grid.regression(grid.standardise(embeddings)).softmax(1)[:, 1]
    # The bias is free, so that the weighted galaxies have their own weighted share of the class.
    weights = torch.tensor(class_weights or [1.0, 1.0])[labels]
    assert torch.dot(weights, probabilities - labels).item() == pytest.approx(0, abs=0.01 * weights.sum().item())
    assert probabilities.std() > 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"head_type": "mlp", "head_hidden_size": 8},
        {"problem_type": "multi_label_classification"},
        {"label_smoothing": 0.1},
    ],
)
def test_other_heads_are_left_to_the_grid(options):
    grid = HeadGrid(make_model(**options), make_embeddings(), count=1)
    assert grid.regression is None


def test_a_head_that_was_trained_before_goes_on_from_where_it_is(layer_norm_model):
    assert HeadGrid(layer_norm_model, make_embeddings(), count=1).regression is None


def test_what_is_too_much_or_too_little_for_a_regression_is_left_to_the_grid(monkeypatch, caplog):
    caplog.set_level("INFO")
    one_of_a_class = make_embeddings(labels=(torch.arange(40) == 7).long())
    assert HeadGrid(make_model(), one_of_a_class, count=1).regression is None
    assert "No logistic regression is averaged in: a class has fewer than two training galaxies." in caplog.text
    none_of_a_class = make_embeddings(labels=torch.zeros(40, dtype=torch.long))
    assert HeadGrid(make_model(), none_of_a_class, count=1).regression is None
    monkeypatch.setattr(head_grid, "MOST_NUMBERS_TO_FIT", 40 * 2 * 16 - 1)
    assert HeadGrid(make_model(), make_embeddings(), count=1).regression is None
    assert "No logistic regression is averaged in: for so many galaxies the heads need none." in caplog.text


def test_copies_that_balancing_made_are_in_the_fold_of_their_galaxy():
    images = torch.cat([torch.arange(40), torch.arange(1, 40, 2), torch.arange(1, 40, 2)])
    stored = make_embeddings(images=images)
    folds = head_grid._deal_folds(stored.labels.numpy(), images.numpy(), classes=2)
    by_image = {(int(image), int(fold)) for image, fold in zip(images, folds, strict=True)}
    assert len(by_image) == 40
    assert set(folds.tolist()) == {0, 1, 2, 3, 4}

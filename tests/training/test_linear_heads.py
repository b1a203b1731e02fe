import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from zoobot_hf.training.linear_heads import PENALTIES, choose_linear_heads, fit_linear_heads, standardise

SOME_PENALTIES = (1e-3, 1e-2, 0.3)


@pytest.mark.parametrize(("classes", "count", "size"), [(2, 40, 100), (2, 60, 20), (3, 60, 30)])
def test_heads_are_the_optimum_that_scikit_learn_finds(classes, count, size):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (2, count), generator=generator)
    values = torch.randn(2, count, size, generator=generator) * torch.linspace(0.1, 3, size)
    values[:, :, 0] += labels
    inputs = torch.stack([standardise(each)[0] for each in values])
    weights = torch.ones(2, 2, count)
    weights[:, 1, :15] = 0
    heads = fit_linear_heads(inputs, labels, weights, torch.tensor(SOME_PENALTIES), num_labels=classes)
    for draw, head in ((0, 0), (1, 1)):
        used = weights[draw, head].bool().numpy()
        for number, penalty in enumerate(SOME_PENALTIES):
            c = (2 if classes == 2 else 1) / (penalty * used.sum())
            columns = inputs[draw].double().numpy()
            theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(columns[used], labels[draw].numpy()[used])
            ours = (inputs[draw] @ heads.weight[draw, head, number] + heads.bias[draw, head, number]).softmax(1)
            assert np.abs(ours.numpy() - theirs.predict_proba(columns)).max() < 2e-3


def test_standardised_embeddings_have_unit_length_and_leave_out_what_does_not_vary():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(50, 8, generator=generator) * torch.arange(1, 9) + 100
    values[:, 3] = 7.0
    train, other = standardise(values, torch.full((2, 8), 1000.0))
    assert train.mean(0) == pytest.approx(torch.zeros(8), abs=1e-5)
    assert train.square().sum(1).mean().item() == pytest.approx(7 / 8, rel=1e-5)
    assert other[0, 3] == 0
    assert other[0, 0].item() == pytest.approx((1000 - values[:, 0].mean()) / values[:, 0].std(correction=0) / 8**0.5)


def make_noisy_galaxies(count, *, size=40, noise=3.0):
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(count) % 2
    values = torch.randn(count, size, generator=generator)
    values[:, 0] += labels + noise * torch.randn(count, generator=generator)
    return standardise(values)[0], labels


def test_the_penalty_is_the_one_that_is_best_for_galaxies_that_were_held_out():
    inputs, labels = make_noisy_galaxies(60)
    folds = torch.arange(60) // 2 % 3
    chosen = choose_linear_heads(inputs[None, :, None], labels[None], folds, num_labels=2)
    columns, losses = inputs.double().numpy(), []
    for penalty in PENALTIES:
        held_out = np.zeros((60, 2))
        for fold in range(3):
            seen = (folds != fold).numpy()
            theirs = LogisticRegression(C=2 / (penalty * seen.sum()), tol=1e-10, max_iter=10_000)
            theirs.fit(columns[seen], labels[seen])
            held_out[~seen] = theirs.predict_proba(columns[~seen])
        losses.append(log_loss(labels, held_out))
    assert chosen.penalty.item() == pytest.approx(PENALTIES[int(np.argmin(losses))])
    everything = fit_linear_heads(inputs[None], labels[None], torch.ones(1, 1, 60), chosen.penalty, num_labels=2)
    assert torch.allclose(chosen.weight[0], everything.weight[0, 0, 0], atol=1e-3)
    assert torch.allclose(chosen.bias[0], everything.bias[0, 0, 0], atol=1e-3)


def test_the_penalty_may_be_chosen_on_other_views_of_the_galaxies():
    inputs, labels = make_noisy_galaxies(60, noise=0.5)
    views, folds = inputs[None, :, None], torch.arange(60) // 2 % 3
    chosen = choose_linear_heads(views, labels[None], folds, num_labels=2)
    misled = choose_linear_heads(views, labels[None], folds, num_labels=2, held_out=-views)
    assert chosen.penalty < misled.penalty == PENALTIES[-1]


def test_a_galaxy_of_weight_two_is_one_that_is_there_twice():
    inputs, labels = make_noisy_galaxies(40)
    folds = torch.arange(40) // 2 % 4
    weights = 1.0 + (torch.arange(40) < 10)
    weighted = choose_linear_heads(inputs[None, :, None], labels[None], folds, num_labels=2, weights=weights[None])
    again = torch.cat([torch.arange(40), torch.arange(10)])
    repeated = choose_linear_heads(inputs[None, again, None], labels[None, again], folds[again], num_labels=2)
    assert weighted.penalty == repeated.penalty
    assert torch.allclose(weighted.weight, repeated.weight, atol=1e-3)
    alike = choose_linear_heads(inputs[None, :, None], labels[None], folds, num_labels=2)
    assert not torch.allclose(weighted.weight, alike.weight, atol=1e-2)


def test_a_galaxy_of_weight_zero_chooses_no_penalty():
    inputs, labels = make_noisy_galaxies(60, noise=0.5)
    folds, counted = torch.arange(60) // 2 % 3, torch.arange(60) < 30
    labels = torch.where(counted, labels, 1 - labels)  # of the others, what would choose the largest penalty
    weighted = choose_linear_heads(
        inputs[None, :, None], labels[None], folds, num_labels=2, weights=counted[None].float()
    )
    few = choose_linear_heads(inputs[None, :30, None], labels[None, :30], folds[:30], num_labels=2)
    assert weighted.penalty == few.penalty
    assert torch.allclose(weighted.weight, few.weight, atol=1e-3)

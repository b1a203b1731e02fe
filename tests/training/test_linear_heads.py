import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from zoobot_hf.training.linear_heads import fit_linear_heads, standardise

PENALTIES = (1e-3, 1e-2, 0.3)


@pytest.mark.parametrize(("classes", "count", "size"), [(2, 40, 100), (2, 60, 20), (3, 60, 30)])
def test_heads_are_the_optimum_that_scikit_learn_finds(classes, count, size):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (2, count), generator=generator)
    values = torch.randn(2, count, size, generator=generator) * torch.linspace(0.1, 3, size)
    values[:, :, 0] += labels
    inputs = torch.stack([standardise(each)[0] for each in values])
    weights = torch.ones(2, 2, count)
    weights[:, 1, :15] = 0
    heads = fit_linear_heads(inputs, labels, weights, torch.tensor(PENALTIES), num_labels=classes)
    for draw, head in ((0, 0), (1, 1)):
        used = weights[draw, head].bool().numpy()
        for number, penalty in enumerate(PENALTIES):
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

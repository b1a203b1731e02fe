import pytest
import torch

from zoobot_hf.training.weight_averaging import averaging

STEPS = 5


def draw_batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 4, generator=generator) for _ in range(STEPS)]


def make_layer():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


def take_step(layer, optimizer, batch):
    optimizer.zero_grad()
    layer(batch).square().mean().backward()
    optimizer.step()


def trajectory(optimizer_class, **settings):
    """The weights before the first step and after each one."""
    layer = make_layer()
    optimizer = optimizer_class(layer.parameters(), **settings)
    weights = [layer.weight.detach().clone()]
    for batch in draw_batches():
        take_step(layer, optimizer, batch)
        weights.append(layer.weight.detach().clone())
    return torch.stack(weights)


def mean_of(weights):
    shares = torch.arange(1.0, len(weights) + 1)
    return torch.einsum("s,s...->...", shares / shares.sum(), weights)


OPTIMIZERS = [
    (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
    (torch.optim.AdamW, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.Adagrad, {"lr": 0.1}),
]


@pytest.mark.parametrize(("optimizer_class", "settings"), OPTIMIZERS)
def test_later_steps_count_more_in_the_mean_and_training_is_the_same(optimizer_class, settings):
    layer = make_layer()
    optimizer = averaging(optimizer_class)(layer.parameters(), **settings)
    expected = trajectory(optimizer_class, **settings)
    for number, batch in enumerate(draw_batches(), start=1):
        optimizer.train()
        take_step(layer, optimizer, batch)
        assert torch.equal(layer.weight, expected[number])
        optimizer.put(mean=True)
        torch.testing.assert_close(layer.weight, mean_of(expected[: number + 1]))
        optimizer.put(mean=True)
        torch.testing.assert_close(layer.weight, mean_of(expected[: number + 1]))


@pytest.mark.parametrize(("optimizer_class", "settings"), OPTIMIZERS)
@pytest.mark.parametrize("is_mean", [False, True])
def test_what_is_saved_goes_on_as_if_it_had_not_been(optimizer_class, settings, is_mean):
    first, second = make_layer(), make_layer()
    saved = averaging(optimizer_class)(first.parameters(), **settings)
    batches = draw_batches()
    for batch in batches[:2]:
        take_step(first, saved, batch)
    saved.put(mean=is_mean)
    second.load_state_dict(first.state_dict())
    loaded = averaging(optimizer_class)(second.parameters(), **settings)
    loaded.load_state_dict(saved.state_dict())
    for batch in batches[2:]:
        loaded.train()
        take_step(second, loaded, batch)
    expected = trajectory(optimizer_class, **settings)
    assert torch.equal(second.weight, expected[-1])
    loaded.put(mean=True)
    torch.testing.assert_close(second.weight, mean_of(expected))


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adagrad])
def test_weights_without_a_gradient_in_some_steps_are_averaged_over_all_steps(optimizer_class):
    layers = torch.nn.ModuleList([make_layer(), torch.nn.Linear(4, 3)])
    optimizer = averaging(optimizer_class)(layers.parameters(), lr=0.1)
    weights = [[layer.weight.detach().clone() for layer in layers]]
    for number, batch in enumerate(draw_batches()):
        take_step(layers[0] if number < 2 else layers[1], optimizer, batch)
        weights.append([layer.weight.detach().clone() for layer in layers])
    optimizer.put(mean=True)
    for layer, steps in zip(layers, zip(*weights, strict=True), strict=True):
        assert not torch.equal(steps[0], steps[-1])
        torch.testing.assert_close(layer.weight, mean_of(torch.stack(steps)))

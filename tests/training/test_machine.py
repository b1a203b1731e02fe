import pytest
import torch
from torch import nn

from zoobot_hf.training.machine import InferenceRunner, fold_batch_norms


class Recorder(nn.Module):
    """Gives each image's mean, and remembers what kind of tensors came."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.kinds = set()

    def forward(self, pixel_values):
        is_channels_last = pixel_values.is_contiguous(memory_format=torch.channels_last)
        self.kinds.add((pixel_values.shape, pixel_values.is_inference(), is_channels_last))
        return (pixel_values.mean((1, 2, 3)),)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_module_sees_batches_of_one_kind_so_that_it_is_compiled_once(memory_format):
    module = Recorder()
    runner = InferenceRunner(module, batch_size=4)
    images = torch.rand(7, 3, 8, 8).contiguous(memory_format=memory_format)
    outputs = torch.cat([runner(images[:4]), runner(images[4:])])
    assert torch.allclose(outputs, images.mean((1, 2, 3)))
    assert len(module.kinds) == 1
    ((shape, _, is_channels_last),) = module.kinds
    assert shape == (4, 3, 8, 8)
    assert is_channels_last


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_are_read_in_order(batch_size):
    runner = InferenceRunner(Recorder(), batch_size=batch_size)
    batches = list(runner.read(lambda number: number + 1, range(7), collate=tuple))
    assert [number for batch in batches for number in batch] == list(range(1, 8))
    assert max(map(len, batches)) == batch_size


def with_random_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model


def batch_norms(module):
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", ["batch_norm_model", "timm_model"])
def test_folded_batch_norms_give_the_same(name, request):
    model = with_random_statistics(request.getfixturevalue(name))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = torch.rand(3, 3, 32, 32)
    folded = fold_batch_norms(model, images[:1])
    assert batch_norms(model)
    assert not batch_norms(folded)
    with torch.no_grad():
        expected, found = model(pixel_values=images).logits, folded(pixel_values=images).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_model_without_batch_norms_is_not_copied(layer_norm_model):
    assert fold_batch_norms(layer_norm_model, torch.rand(1, 3, 32, 32)) is layer_norm_model


class UsesItsConvolutionTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, pixel_values):
        seen = self.convolution(pixel_values)
        return (self.norm(seen) + seen,)


def test_a_convolution_whose_output_goes_elsewhere_as_well_keeps_its_norm():
    module = with_random_statistics(UsesItsConvolutionTwice()).eval()
    assert fold_batch_norms(module, torch.rand(1, 3, 8, 8)) is module

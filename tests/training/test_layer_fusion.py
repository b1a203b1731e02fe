import copy

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from zoobot_hf.training.depthwise import fast_depthwise_convolutions
from zoobot_hf.training.layer_fusion import ACTIVATIONS, folded_batch_norms, fuse_layers, probe_image
from zoobot_hf.training.machine import InferenceRunner

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="activations are fused by oneDNN")


class Layers(nn.Module):
    """The layers one after the other."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, pixel_values):
        return (self.layers(pixel_values),)


class Shortcut(Layers):
    """The input is added to what the first layer puts out before the others see it."""

    def __init__(self, *layers, in_place):
        super().__init__(*layers)
        self.in_place = in_place

    def forward(self, pixel_values):
        first, *others = self.layers
        seen = first(pixel_values)
        if self.in_place:
            seen += pixel_values
        for layer in others:
            seen = layer(seen)
        return (seen if self.in_place else seen + first(pixel_values),)


def randomized(module):
    """In evaluation mode; no BatchNorm is the identity, and no head gives zeros."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 2)
            nn.init.normal_(part.bias)
        elif isinstance(part, nn.Linear):
            nn.init.normal_(part.weight)
    return module.eval()


def parts(module, kind):
    return [part for part in module.modules() if isinstance(part, kind)]


@torch.no_grad()
def outputs(module, images):
    return module(pixel_values=images)[0]


def assert_same(found, expected):
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["batch_norm_model", "timm_model"])
def test_a_model_with_fused_layers_gives_the_same_and_is_left_as_it_was(name, request):
    model = randomized(request.getfixturevalue(name))
    before = copy.deepcopy(model.state_dict())
    images = torch.rand(3, 3, 32, 32)
    fused = fuse_layers(model, images[:1])
    assert parts(model, nn.BatchNorm2d)
    assert not parts(fused, nn.BatchNorm2d)
    assert_same(outputs(fused, images), outputs(model, images))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@needs_onednn
@pytest.mark.parametrize(
    "activation", [nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")], ids=str
)
def test_an_activation_becomes_part_of_its_convolution(activation):
    images = 20 * torch.randn(2, 3, 9, 9)
    module = Layers(nn.Conv2d(3, 8, 3), activation).eval()
    fused = fuse_layers(module, images[:1])
    assert not parts(fused, type(activation))
    assert_same(outputs(fused, images), outputs(module, images))


def test_an_activation_that_runs_twice_stays():
    activation = nn.ReLU()
    module = Layers(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 4, 1), activation).eval()
    assert fuse_layers(module, torch.randn(1, 3, 9, 9)) is module


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (8, 11)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_padding_that_is_wider_at_one_side_becomes_part_of_its_convolution(kernel, stride, size):
    module = Layers(Conv2dSame(3, 6, kernel, stride=stride, groups=3)).eval()
    images = torch.randn(2, 3, *size)
    fused = fuse_layers(module, images[:1])
    assert not parts(fused, Conv2dSame)
    assert_same(outputs(fused, images), outputs(module, images))


def test_a_dilated_convolution_keeps_its_padding():
    module = Layers(Conv2dSame(3, 6, 3, stride=2, dilation=2)).eval()
    assert fuse_layers(module, torch.randn(1, 3, 8, 8)) is module


@pytest.mark.parametrize("size", [8, 9])
def test_images_of_another_size_get_a_padding_of_their_own(size):
    module = Layers(Conv2dSame(3, 6, 3, stride=2), nn.ReLU()).eval()
    runner = InferenceRunner(module, batch_size=2)
    for images in (torch.randn(2, 3, 8, 8), torch.randn(2, 3, size, size)):
        assert_same(runner(images), outputs(module, images))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("layer", [nn.BatchNorm2d, nn.ReLU])
def test_what_sees_more_than_a_convolution_puts_out_stays(layer, in_place):
    second = nn.ReLU() if layer is nn.ReLU else nn.BatchNorm2d(3)
    module = randomized(Shortcut(nn.Conv2d(3, 3, 1), second, in_place=in_place))
    assert fuse_layers(module, torch.randn(1, 3, 8, 8)) is module


@needs_onednn
def test_layers_whose_fusion_would_change_the_output_are_left_alone(monkeypatch, caplog):
    monkeypatch.setitem(ACTIVATIONS, nn.ReLU, ("hardtanh", [0.0, 0.1]))
    module = Layers(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    with caplog.at_level("INFO", logger="zoobot_hf"):
        assert fuse_layers(module, torch.randn(1, 3, 9, 9)) is module
    assert "Layers are not fused: the outputs would differ by up to" in caplog.text


def test_fused_layers_obey_mixed_precision():
    module = Layers(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.SiLU()).eval()
    images = torch.randn(2, 3, 9, 9)
    fused = fuse_layers(module, images[:1])
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = outputs(fused, images), outputs(module, images)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_a_model_without_layers_to_fuse_is_not_copied(vit_model):
    assert fuse_layers(vit_model, torch.rand(1, 3, 32, 32)) is vit_model


@needs_onednn
def test_layers_are_fused_inside_inference_mode_too(batch_norm_model):
    model = randomized(batch_norm_model)
    with torch.inference_mode():
        images = torch.rand(2, 3, 32, 32)
        fused = fuse_layers(model, images[:1])
        assert not parts(fused, nn.BatchNorm2d)
        assert_same(fused(pixel_values=images)[0], model(pixel_values=images)[0])
    assert all(not parameter.is_inference() for parameter in fused.parameters())


def gradients(model, images):
    """Of all parameters, of a sum of the output with weights of its own."""
    model.zero_grad()
    output = model(pixel_values=images)[0]
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def patched(module):
    return {name for name, part in module.named_modules() if "forward" in vars(part)}


def assert_gradients_are_the_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("name", ["batch_norm_model", "timm_model"])
def test_gradients_are_those_of_batch_norms_that_keep_their_statistics(name, request):
    model = randomized(request.getfixturevalue(name))
    model.unfreeze_encoder()
    model.train()
    for part in parts(model, nn.Dropout):
        part.p = 0.0
    before, images = copy.deepcopy(model.state_dict()), torch.rand(4, 3, 32, 32)
    modes = [part.training for part in model.modules()]
    expected = gradients(model, images)
    with fast_depthwise_convolutions(model):
        outer = patched(model)
        with folded_batch_norms(model, probe_image(3, 32, 32)):
            assert len(patched(model)) > len(outer) + len(parts(model, nn.BatchNorm2d)) / 2
            assert [part.training for part in model.modules()] == modes
            found = gradients(model, images)
        assert patched(model) == outer
    assert not patched(model)
    assert_gradients_are_the_same(found, expected)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("convolution", [nn.Conv2d, Conv2dSame])
def test_gradients_reach_each_parameter_of_a_folded_batch_norm(convolution, bias):
    module = randomized(Layers(convolution(3, 6, 3, stride=2, groups=3, bias=bias), nn.BatchNorm2d(6), nn.ReLU()))
    images = torch.randn(4, 3, 9, 9)
    expected = gradients(module, images)
    with folded_batch_norms(module, images[:1]):
        assert patched(module) == {"layers.0", "layers.1"}
        found = gradients(module, images)
    assert_gradients_are_the_same(found, expected)
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_a_batch_norm_in_training_mode_works_as_ever():
    module = randomized(Layers(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))).train()
    other, images = copy.deepcopy(module), torch.randn(4, 3, 9, 9)
    expected = gradients(other, images)
    with folded_batch_norms(module, images[:1]):
        assert patched(module)
        assert_gradients_are_the_same(gradients(module, images), expected)
    assert torch.equal(module.layers[1].running_mean, other.layers[1].running_mean)


class UsesWhatItsConvolutionPutOutTwice(Layers):
    def forward(self, pixel_values):
        convolution, norm = self.layers
        seen = convolution(pixel_values)
        return (norm(seen) + seen,)


def test_a_batch_norm_is_not_folded_where_that_would_change_the_output():
    module = randomized(UsesWhatItsConvolutionPutOutTwice(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    assert fuse_layers(module, torch.randn(1, 3, 8, 8)) is module
    with folded_batch_norms(module, torch.randn(1, 3, 8, 8)):
        assert not patched(module)


def test_an_error_leaves_no_folded_batch_norms():
    module = randomized(Layers(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    weight = module.layers[0].weight
    with pytest.raises(RuntimeError, match="channels"), folded_batch_norms(module, torch.randn(1, 3, 8, 8)):
        module(pixel_values=torch.randn(1, 2, 8, 8))
    assert not patched(module)
    assert module.layers[0].weight is weight

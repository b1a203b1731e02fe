import copy

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from zoobot_hf.training import depthwise
from zoobot_hf.training.depthwise import fast_depthwise_convolutions, safe_strided_convolutions

CONVOLUTIONS = {
    "7 x 7": lambda: nn.Conv2d(6, 6, 7, padding=3, groups=6),
    "5 x 7, shrinking": lambda: nn.Conv2d(6, 6, (5, 7), padding=(1, 2), groups=6, bias=False),
    "6 x 6, growing": lambda: nn.Conv2d(6, 6, 6, padding=5, groups=6),
    "stride 2": lambda: nn.Conv2d(6, 6, 5, stride=2, padding=2, groups=6),
    "dilated": lambda: nn.Conv2d(6, 6, 5, dilation=2, padding=4, groups=6),
    "reflecting": lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6, padding_mode="reflect"),
    "padding by name": lambda: nn.Conv2d(6, 6, 5, padding="same", groups=6),
    "timm's same": lambda: Conv2dSame(6, 6, 5, groups=6),
    "3 x 3": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
}


def gradients(convolution, images, *, dtype=torch.float32):
    """Outputs, and gradients of images and parameters, of a sum with weights of its own."""
    images = images.clone().requires_grad_()
    convolution.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = convolution(images)
    weights = torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)
    (outputs * weights).sum().backward()
    return outputs.detach(), images.grad, *(parameter.grad.clone() for parameter in convolution.parameters())


def is_close(found, expected):
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_outputs_and_gradients_are_those_of_the_convolution(name, memory_format):
    convolution = CONVOLUTIONS[name]()
    images = torch.rand(3, 6, 12, 14).contiguous(memory_format=memory_format)
    expected = gradients(convolution, images)
    with fast_depthwise_convolutions(convolution):
        found = gradients(convolution, images)
    assert len(found) == len(expected) == 2 + len(list(convolution.parameters()))
    assert all(map(is_close, found, expected))


def test_only_large_kernels_have_gradients_of_our_own(monkeypatch):
    asked = []
    monkeypatch.setattr(depthwise._LargeDepthwiseConvolution, "apply", lambda images, *_: asked.append(1) or images)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for name, make in CONVOLUTIONS.items():
        asked.clear()
        convolution = make()
        with fast_depthwise_convolutions(convolution):
            convolution(torch.rand(1, 6, 12, 14))
        assert bool(asked) == (name in ("7 x 7", "5 x 7, shrinking", "6 x 6, growing")), name
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    asked.clear()
    convolution = CONVOLUTIONS["7 x 7"]()
    with fast_depthwise_convolutions(convolution):
        convolution(torch.rand(1, 6, 12, 14))
    assert not asked


@pytest.mark.parametrize("name", ["7 x 7", "3 x 3"])
def test_they_stay_in_float32_under_mixed_precision(name):
    convolution, images = CONVOLUTIONS[name](), torch.rand(3, 6, 12, 14)
    expected = gradients(convolution, images)
    rounded = gradients(convolution, images, dtype=torch.bfloat16)
    assert rounded[0].dtype == torch.bfloat16
    with fast_depthwise_convolutions(convolution):
        found = gradients(convolution, images, dtype=torch.bfloat16)
    assert found[0].dtype == torch.float32
    assert all(map(is_close, found, expected))


def test_frozen_parts_get_no_gradients():
    convolution = CONVOLUTIONS["7 x 7"]().requires_grad_(False)
    images = torch.rand(1, 6, 12, 14, requires_grad=True)
    with fast_depthwise_convolutions(convolution):
        convolution(images).sum().backward()
    assert images.grad is not None
    assert convolution.weight.grad is convolution.bias.grad is None


@pytest.mark.parametrize("name", ["layer_norm_model", "timm_convnext_model", "timm_model"])
def test_a_model_computes_and_looks_as_before(name, request):
    model = request.getfixturevalue(name).train(False)
    images = torch.rand(2, 3, 32, 32)
    before, expected = copy.deepcopy(model.state_dict()), model(pixel_values=images).logits
    with fast_depthwise_convolutions(model):
        changed = [part for part in model.modules() if "forward" in vars(part)]
        found = model(pixel_values=images).logits
    assert changed
    assert is_close(found, expected)
    assert not [part for part in model.modules() if "forward" in vars(part)]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_convolutions_are_left_as_they_are():
    convolutions = [nn.Conv2d(6, 6, 7), nn.Conv2d(6, 12, 7, groups=6), nn.Conv2d(1, 1, 7)]
    module = nn.ModuleList(convolutions)
    with fast_depthwise_convolutions(module):
        assert not [part for part in module if "forward" in vars(part)]


@pytest.mark.parametrize("stride", [2, (1, 2), 3])
@pytest.mark.parametrize("channels", [3, 15])
def test_narrow_strided_convolutions_compute_the_same_and_have_no_stride(channels, stride):
    convolution = nn.Conv2d(channels, 5, 1, stride=stride)
    images = torch.rand(2, channels, 9, 8)  # channels first, in which the gradient without help is right too
    expected = gradients(convolution, images)
    with safe_strided_convolutions(convolution):
        found = gradients(convolution, images)
        assert convolution(images).grad_fn._saved_stride == (1, 1)
    assert all(map(is_close, found, expected))
    assert "forward" not in vars(convolution)


def test_convolutions_that_are_wide_or_skip_no_pixels_keep_their_stride():
    convolutions = [
        nn.Conv2d(16, 5, 1, stride=2),
        nn.Conv2d(3, 5, 3, stride=2),
        nn.Conv2d(3, 5, 1),
        nn.Conv2d(3, 5, 1, stride=2, padding=1),
        nn.Conv2d(6, 6, 1, stride=2, groups=3),
    ]
    module = nn.ModuleList(convolutions)
    with safe_strided_convolutions(module):
        assert not [part for part in module if "forward" in vars(part)]

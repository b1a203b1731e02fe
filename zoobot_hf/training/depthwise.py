"""Convolutions that PyTorch trains slowly on a CPU, or not safely, as ones that give the same.

Its own depthwise convolutions are the slowest part of training a ConvNeXt or MobileNet.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# From here on a kernel's gradient is faster as a convolution: it takes 35 to 60% of the time for 7 x 7, 60% for 5 x 5,
# and 3 times as long for 3 x 3. Other processors than these have other convolutions.
SMALLEST_LARGE_KERNEL = 5
MEASURED_PROCESSORS = ("AVX2", "AVX512")
SAFE_CHANNELS = 16  # the largest block of channels that oneDNN works on at once


def fast_depthwise_convolutions(module: nn.Module) -> AbstractContextManager[None]:
    """Inside, depthwise convolutions on a CPU stay in float32 under mixed precision, and large kernels learn faster.

    In bfloat16 the gradient of a depthwise kernel takes up to four times as long as in float32, and half of a training
    step. With both, ConvNeXt nano on two cores trains 1.1 times as fast in float32, and in bfloat16 1.6 times.

    Args:
        module: A model or a part of one; its state is not touched.
    """
    forwards = {}
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and _is_depthwise(part):
            is_large = _has_a_large_kernel(part)
            forward = functools.partial(_convolve_with_large_kernel, part) if is_large else part.forward
            forwards[part] = functools.partial(_compute_in_float32, forward)
    return _other_forwards(forwards)


def safe_strided_convolutions(module: nn.Module) -> AbstractContextManager[None]:
    """Inside, 1 x 1 convolutions of few channels leave the pixels out that their stride skips, and then have none.

    oneDNN's gradient of such a kernel writes past its memory where channels come last, which ends the process
    (https://github.com/uxlfoundation/oneDNN/issues/6035). RepVGG and MobileOne begin with one.

    Args:
        module: A model or a part of one; its state is not touched.
    """
    convolutions = [part for part in module.modules() if type(part) is nn.Conv2d and _is_unsafe(part)]
    return _other_forwards({part: functools.partial(_convolve_without_stride, part) for part in convolutions})


@contextmanager
def _other_forwards(forwards: Mapping[nn.Conv2d, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    for convolution, forward in forwards.items():
        convolution.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for convolution in forwards:
            del convolution.forward


def _is_unsafe(part: nn.Conv2d) -> bool:
    skips_pixels = part.kernel_size == (1, 1) != part.stride and part.padding == (0, 0)
    is_narrow = part.in_channels < SAFE_CHANNELS and part.groups == 1
    return part.weight.device.type == "cpu" and skips_pixels and is_narrow


def _convolve_without_stride(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    rows, columns = convolution.stride
    return functional.conv2d(images[:, :, ::rows, ::columns], convolution.weight, convolution.bias)


def _is_depthwise(part: nn.Conv2d) -> bool:
    return part.weight.device.type == "cpu" and 1 < part.groups == part.in_channels == part.out_channels


def _compute_in_float32(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return forward(images.float())


def _convolve_with_large_kernel(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    outputs: Tensor = _LargeDepthwiseConvolution.apply(
        images, convolution.weight, convolution.bias, convolution.padding
    )
    return outputs


def _has_a_large_kernel(convolution: nn.Conv2d) -> bool:
    is_plain = (
        type(convolution) is nn.Conv2d  # others pad in ways of their own
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
        and convolution.stride == convolution.dilation == (1, 1)
    )
    is_measured = torch.backends.cpu.get_cpu_capability() in MEASURED_PROCESSORS
    return is_plain and is_measured and min(convolution.kernel_size) >= SMALLEST_LARGE_KERNEL


class _LargeDepthwiseConvolution(torch.autograd.Function):
    """A depthwise convolution of stride 1, whose gradients are such convolutions too.

    That of the images is the outputs' convolved with the mirrored kernel, that of the kernel each image convolved with
    its outputs'.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.padding = padding
        return functional.conv2d(images, weight, bias, padding=padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        images, weight = ctx.saved_tensors
        convolve = functools.partial(functional.conv2d, groups=len(weight))
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_images = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            (height, width), (above, beside) = weight.shape[2:], ctx.padding
            of_images = convolve(gradient, weight.flip(2, 3), padding=(height - 1 - above, width - 1 - beside))
        if ctx.needs_input_grad[1]:
            of_weight = torch.zeros_like(weight)
            for image, kernels in zip(images.split(1), gradient.unsqueeze(2), strict=True):
                of_weight += convolve(image, kernels, padding=ctx.padding).transpose(0, 1)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_images, of_weight, of_bias, None

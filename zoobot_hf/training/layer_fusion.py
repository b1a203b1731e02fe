"""Networks on a CPU with their layers fused: the same result with fewer passes over what the layers put out.

Between its convolutions a network reads and writes memory. A BatchNorm can be part of the convolution before it,
padding part of the convolution after it, and an activation can be applied before a convolution's output leaves the
processor.
"""

import copy
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, get_same_padding
from timm.layers.activations import GELU as TimmGELU  # noqa: N811
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)

# Largest difference that fusing may make, as a share of the largest output; rounding makes 1e-6 to 1e-5.
TOLERANCE = 1e-4
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
NORMS = (nn.BatchNorm2d, BatchNormAct2d)
# What oneDNN calls an activation, and its numbers; see torch/_inductor/fx_passes/mkldnn_fusion.py.
ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.GELU: ("gelu", []),
    TimmGELU: ("gelu", []),
}


def probe_image(*size: int) -> Tensor:
    """Noise to see by which layer follows which, always the same: (1, channels, height, width), float32, 0-1.

    Args:
        *size: Channels, height and width.
    """
    return torch.rand(1, *size, generator=torch.Generator().manual_seed(0))


@torch.inference_mode(False)  # tensors have no versions there
@torch.no_grad()
def fuse_layers(module: nn.Module, image: Tensor) -> nn.Module:
    """A copy with fused layers; the module itself where nothing can be fused, or fusing would change its output.

    The copy is for images of this size, and shares the parameters that it doesn't change. On two cores MobileNetV2 does
    129 images/s and not 74, compiled 135 and not 105; the embedded encoder 1.2 times as many, ConvNeXt nano 1.06 times.

    Args:
        module: Takes `pixel_values`; in evaluation mode, on the CPU. Other types than float32 are left as they are.
        image: (1, channels, height, width); on it the copy's first output has to be the module's.
    """
    if not _is_float32(module) or not _parts(module, CONVOLUTIONS):
        return module
    shared = itertools.chain(module.parameters(), module.buffers())
    fused = copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
    steps = [fuse(fused, image) for fuse in (_fold_batch_norms, _absorb_padding, _fuse_activations)]
    return fused if any(steps) and _is_same(fused, image, _output(module, image)) else module


@contextmanager
def folded_batch_norms(module: nn.Module, image: Tensor) -> Iterator[None]:
    """Inside, BatchNorms that keep their statistics are part of the convolutions before them, in training as well.

    Outputs and gradients are the same. On two cores MobileNetV2 takes 1.3 times as many steps a second in float32 and
    1.2 times in bfloat16, the embedded encoder 1.1 times in both. A BatchNorm in training mode works as ever.

    Args:
        module: Takes `pixel_values`; on the CPU. Other types than float32 are left as they are.
        image: As for `fuse_layers`.
    """
    if not _is_float32(module) or not _parts(module, NORMS):
        yield
        return
    modes = {part: part.training for part in module.modules()}
    forwards: dict[nn.Module, Any] = {}
    try:
        with torch.no_grad():
            expected = _output(module.eval(), image)
            for convolution, norm in _find_foldable(module, image):
                forwards |= {part: vars(part).get("forward") for part in (convolution, norm)}
                vars(convolution)["forward"] = partial(_convolve_and_norm, convolution, norm, convolution.forward)
                vars(norm)["forward"] = partial(_finish_norm, norm, norm.forward, _after_norm(norm))
            if not _is_same(module, image, expected):
                _restore(forwards)
        for part, training in modes.items():
            part.training = training
        yield
    finally:
        _restore(forwards)


def _restore(forwards: dict[nn.Module, Any]) -> None:
    for part, forward in forwards.items():
        vars(part).pop("forward", None)
        if forward is not None:
            vars(part)["forward"] = forward


def _is_float32(module: nn.Module) -> bool:
    return all(parameter.dtype == torch.float32 for parameter in module.parameters())


def _output(module: nn.Module, image: Tensor) -> Tensor:
    output: Tensor = module(pixel_values=image)[0]
    return output


def _is_same(module: nn.Module, image: Tensor, expected: Tensor) -> bool:
    difference = (_output(module, image) - expected).abs().max()
    if difference <= TOLERANCE * expected.abs().max():
        return True
    logger.info("Layers are not fused: the outputs would differ by up to %g.", difference)
    return False


def _convolve_and_norm(
    convolution: nn.Conv2d, norm: nn.BatchNorm2d, forward: Callable[[Tensor], Tensor], images: Tensor
) -> Tensor:
    if norm.training:
        return forward(images)
    parameters = convolution._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    # What `forward` reads, whichever way of convolving it is.
    parameters["weight"], parameters["bias"] = _fold(convolution, norm)  # type: ignore[assignment]
    try:
        return forward(images)
    finally:
        parameters["weight"], parameters["bias"] = weight, bias


def _finish_norm(
    norm: nn.BatchNorm2d, forward: Callable[[Tensor], Tensor], after_norm: nn.Module, images: Tensor
) -> Tensor:
    return forward(images) if norm.training else after_norm(images)


def _find_foldable(module: nn.Module, image: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and the BatchNorms that only see what these put out."""
    pairs = []
    for convolution, norm in _find_pairs(module, image, CONVOLUTIONS, NORMS):
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        if norm.affine and norm.track_running_stats:
            pairs.append((convolution, norm))
    return pairs


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that does what both do."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    if convolution.bias is not None:
        shift = shift + convolution.bias * scale
    return convolution.weight * scale.view(-1, 1, 1, 1), shift


def _after_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """What a BatchNorm of timm does beyond being one."""
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()


def _fold_batch_norms(module: nn.Module, image: Tensor) -> bool:
    """Whether there were BatchNorms that only see what a convolution puts out; they are part of it now."""
    pairs = _find_foldable(module, image)
    for convolution, norm in pairs:
        weight, bias = _fold(convolution, norm)
        convolution.weight, convolution.bias = nn.Parameter(weight), nn.Parameter(bias)
    _replace(module, {norm: _after_norm(norm) for _, norm in pairs})
    return bool(pairs)


def _absorb_padding(module: nn.Module, image: Tensor) -> bool:
    """Whether there were convolutions with TensorFlow's padding; they have PyTorch's now, for this image's size."""
    padded: dict[nn.Module, nn.Module] = {}

    def note(convolution: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(convolution, Conv2dSame)
        if convolution.dilation == (1, 1):
            padded[convolution] = _with_equal_padding(convolution, inputs[0].shape[-2:])

    hooks = [part.register_forward_pre_hook(note) for part in _parts(module, (Conv2dSame,))]
    _run(module, image, hooks)
    _replace(module, padded)
    return bool(padded)


def _with_equal_padding(convolution: Conv2dSame, size: torch.Size) -> nn.Conv2d:
    """The convolution with as much padding before as behind; zeros before its kernel take back what is too much."""
    lengths = zip(size, convolution.kernel_size, convolution.stride, convolution.dilation, strict=True)
    rows, columns = (get_same_padding(*numbers) for numbers in lengths)
    weight = functional.pad(convolution.weight, (columns % 2, 0, rows % 2, 0))
    padded = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        kernel_size=(weight.shape[2], weight.shape[3]),
        stride=convolution.stride,
        padding=(rows - rows // 2, columns - columns // 2),
        dilation=convolution.dilation,
        groups=convolution.groups,
        device="meta",
    )
    padded.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
    padded.bias = convolution.bias
    return padded.eval()


def _fuse_activations(module: nn.Module, image: Tensor) -> bool:
    """Whether there were activations that only see what a convolution puts out; they are part of it now."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    pairs = _find_pairs(module, image, (nn.Conv2d,), tuple(ACTIVATIONS))
    fused: dict[nn.Module, nn.Module] = {}
    for convolution, activation in pairs:
        assert isinstance(convolution, nn.Conv2d)
        fused |= {convolution: _ConvolutionWithActivation(convolution, activation), activation: nn.Identity()}
    _replace(module, fused)
    return bool(pairs)


class _ConvolutionWithActivation(nn.Module):
    def __init__(self, convolution: nn.Conv2d, activation: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution
        self.activation, self.numbers = ACTIVATIONS[type(activation)]
        self.algorithm = getattr(activation, "approximate", "none") if self.activation == "gelu" else ""

    def forward(self, images: Tensor) -> Tensor:
        convolution = self.convolution
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
        outputs: Tensor = torch.ops.mkldnn._convolution_pointwise(
            images.to(dtype),
            convolution.weight.to(dtype),
            None if convolution.bias is None else convolution.bias.to(dtype),
            convolution.padding,
            convolution.stride,
            convolution.dilation,
            convolution.groups,
            self.activation,
            self.numbers,
            self.algorithm,
        )
        return outputs


def _parts(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """Those that are of these kinds, and not of kinds made from them, which can do other things."""
    return [part for part in module.modules() if type(part) in kinds]


def _replace(module: nn.Module, others: dict[nn.Module, nn.Module]) -> None:
    for name, part in list(module.named_modules()):
        if part in others:
            module.set_submodule(name, others[part])


def _find_pairs(
    module: nn.Module, image: Tensor, makers: tuple[type[nn.Module], ...], users: tuple[type[nn.Module], ...]
) -> list[tuple[nn.Module, nn.Module]]:
    """Each maker and the user that its output goes to; what runs twice or has several partners is left out."""
    made: list[tuple[nn.Module, Tensor, int]] = []
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def note_output(maker: nn.Module, _: Any, output: Tensor) -> None:
        made.append((maker, output, output._version))

    def note_input(user: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for maker, output, version in made:
            # The version tells that nothing was added in place, as shortcuts are.
            if any(output is used for used in inputs) and output._version == version:
                pairs.append((maker, user))

    hooks = [part.register_forward_pre_hook(note_input) for part in _parts(module, users)]
    hooks += [part.register_forward_hook(note_output) for part in _parts(module, makers)]
    _run(module, image, hooks)
    runs = Counter(maker for maker, _, _ in made)
    partners = Counter(part for pair in pairs for part in pair)
    return [pair for pair in pairs if partners[pair[0]] == partners[pair[1]] == runs[pair[0]] == 1]


def _run(module: nn.Module, image: Tensor, hooks: list[RemovableHandle]) -> None:
    """Runs the module with hooks, which are gone afterwards."""
    try:
        module(pixel_values=image)
    finally:
        for hook in hooks:
            hook.remove()

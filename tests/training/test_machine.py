import pytest
import torch
from torch import nn

from zoobot_hf.training.machine import InferenceRunner


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


@pytest.mark.parametrize("bf16", [True, False])
def test_a_model_in_bfloat16_takes_images_in_float32(batch_norm_model, bf16):
    images = torch.rand(2, 3, 32, 32)
    expected = InferenceRunner(batch_norm_model.zoobot, batch_size=2)(images)
    found = InferenceRunner(batch_norm_model.zoobot.to(torch.bfloat16), batch_size=2, bf16=bf16)(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))

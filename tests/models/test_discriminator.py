import pytest
import torch
from torch import nn

from diffusers_ext.models.discriminator import PatchDiscriminator


@torch.no_grad()
def test_defaults_are_the_published_network():
    discriminator = PatchDiscriminator().eval()
    state = discriminator.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items() if "weight" in key} == {
        "main.0.weight": (64, 3, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.3.weight": (128,),
        "main.5.weight": (256, 128, 4, 4),
        "main.6.weight": (256,),
        "main.8.weight": (512, 256, 4, 4),
        "main.9.weight": (512,),
        "main.11.weight": (1, 512, 4, 4),
    }
    assert {key for key in state if key.endswith("bias")} == {f"main.{i}.bias" for i in (0, 3, 6, 9, 11)}
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    assert discriminator(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert discriminator(torch.zeros(1, 3, 24, 24)).shape == (1, 1, 1, 1)


def test_one_patch_sees_70_pixels():
    discriminator = PatchDiscriminator(base_channels=4).eval()
    image = torch.zeros(1, 3, 128, 128, requires_grad=True)
    discriminator(image)[0, 0, 7, 7].backward()
    seen = image.grad.abs().sum((0, 1)).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


def test_initialisation():
    discriminator = PatchDiscriminator()
    for module in discriminator.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.mean().abs() < 2e-3 and 0.018 < module.weight.std() < 0.022
        elif isinstance(module, nn.BatchNorm2d):
            assert abs(module.weight.mean() - 1) < 0.01 and 0.015 < module.weight.std() < 0.025
            assert not module.bias.any()


@torch.no_grad()
def test_widths_stop_at_eight_times():
    shapes = [p.shape[0] for n, p in PatchDiscriminator(4, 2, 5).named_parameters() if p.ndim == 4]
    assert shapes == [2, 4, 8, 16, 16, 16, 1]


@torch.no_grad()
def test_save_and_load(tmp_path):
    discriminator = PatchDiscriminator(base_channels=4, num_layers=2)
    image = torch.randn(2, 3, 16, 12)
    discriminator(image)  # moves the running statistics
    discriminator.eval().save_pretrained(tmp_path)
    assert torch.equal(PatchDiscriminator.from_pretrained(tmp_path)(image), discriminator(image))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PatchDiscriminator(num_layers=0), r"`num_layers` is 0.*at least one"),
        (lambda: PatchDiscriminator(1, 2)(torch.zeros(1, 3, 32, 32)), r"shape \(1, 3, 32, 32\).*\(batch, 1,"),
        (lambda: PatchDiscriminator(3, 2)(torch.zeros(1, 3, 32, 23)), r"32x23 pixels.*at least 24 a side"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

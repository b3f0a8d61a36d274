"""Perceptual distances name their network; adversarial terms follow VQGAN's equations."""

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from diffusers_ext.losses.adversarial import (
    adaptive_weight,
    generator_loss,
    gradient_penalty,
    hinge_discriminator_loss,
    marking_discriminator_loss,
    marking_generator_loss,
    wasserstein_discriminator_loss,
)
from diffusers_ext.losses.perceptual import LPIPSDistance, VGGDistance, perceptual_distance


@pytest.fixture
def clip_folder(tmp_path):
    shared = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    text = CLIPTextConfig(vocab_size=30, max_position_embeddings=8, eos_token_id=1, bos_token_id=0, **shared)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **shared)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    return tmp_path


def test_clip_distance_is_zero_only_for_equal_pictures_and_has_gradients(clip_folder):
    distance = perceptual_distance(str(clip_folder))
    image, target = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    assert distance(target, target).abs().max() < 1e-6
    image.requires_grad_(True)
    values = distance(image, target)
    assert values.shape == (2,) and values.min() > 0
    values.sum().backward()
    assert image.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in distance.parameters())
    assert distance.name == f"clip-{clip_folder.name}"


def test_clip_distance_from_a_pipeline_folder(clip_folder, tmp_path):
    pipeline = tmp_path / "pipeline"
    CLIPModel.from_pretrained(clip_folder).save_pretrained(pipeline / "image_encoder")
    CLIPImageProcessor.from_pretrained(clip_folder).save_pretrained(pipeline / "feature_extractor")
    (pipeline / "model_index.json").write_text("{}")
    image, target = torch.rand(2, 1, 3, 16, 16) * 2 - 1
    distance = perceptual_distance(str(pipeline))
    torch.testing.assert_close(distance(image, target), perceptual_distance(str(clip_folder))(image, target))
    assert distance.name == "clip-pipeline"
    (pipeline / "feature_extractor" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config.json is missing"):
        perceptual_distance(str(pipeline))


def test_lpips_with_random_features():
    distance = LPIPSDistance(pretrained_features=False)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    assert distance.name == "lpips-random-features"
    assert distance(image, image).abs().max() < 1e-6
    values = distance(image, -image)
    assert values.shape == (1,) and values.item() > 0 and torch.equal(values, distance(image, -image))  # no dropout


def test_no_perceptual_model_and_a_wrong_one():
    assert perceptual_distance("none") is None and perceptual_distance(None) is None
    with pytest.raises(ValueError, match="'no/such/folder' is not a folder with a CLIP model.*`none`, `lpips`"):
        perceptual_distance("no/such/folder")


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.75))
    assert generator_loss(fake).item() == pytest.approx(0.75)


def test_adaptive_weight_is_the_ratio_of_gradients():
    last = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction, adversarial = (3 * last).sum(), (last * torch.tensor([0.3, 0.4])).sum()
    expected = (18**0.5) / (0.5 + 1e-4)
    weight = adaptive_weight(reconstruction, adversarial, last)
    assert weight.item() == pytest.approx(expected, rel=1e-5) and not weight.requires_grad
    assert adaptive_weight(reconstruction, 1e-12 * adversarial, last).item() == 1e4  # clamped


def test_adaptive_weight_scales_gradients_that_vanish_in_half_precision():
    last = torch.nn.Parameter(torch.ones(4))
    half = last.half().float()  # on the way back a gradient is rounded to half precision
    reconstruction, adversarial = 2e-8 * half.sum(), 1e-8 * half.sum()
    assert adaptive_weight(reconstruction, adversarial, last).item() == 0
    scaled = adaptive_weight(reconstruction, adversarial, last, torch.tensor(2.0**16))
    assert scaled.item() == pytest.approx(4e-8 / (2e-8 + 1e-4), rel=1e-2)


def test_a_discriminator_that_marks_the_generated_is_fooled_by_low_logits():
    """PITI's form: D says how generated an image looks, its generator lowers log D."""
    real, fake = torch.tensor([-3.0, -2.0]), torch.tensor([3.0, 2.0], requires_grad=True)
    right = marking_discriminator_loss(real, fake)
    wrong = marking_discriminator_loss(fake, real)
    assert right < 0.2 < wrong
    expected = -(torch.sigmoid(fake).log().mean() + (1 - torch.sigmoid(real)).log().mean())
    torch.testing.assert_close(right, expected)
    loss = marking_generator_loss(fake)
    torch.testing.assert_close(loss, torch.sigmoid(fake).log().mean())
    assert (torch.autograd.grad(loss, fake)[0] > 0).all()  # going down makes the images look less generated


def test_gradient_penalty_is_zero_for_unit_slopes():
    images = torch.rand(3, 1, 2, 2)
    slope = torch.full((1, 2, 2), 0.5)  # |gradient| = 1
    assert gradient_penalty(lambda x: (x * slope).sum((1, 2, 3)), images, -images, torch.rand(3, 1, 1, 1)) < 1e-10
    steep = gradient_penalty(lambda x: (x * 3 * slope).sum((1, 2, 3)), images, -images, torch.rand(3, 1, 1, 1))
    torch.testing.assert_close(steep, torch.tensor(40.0))  # 10 (3 - 1)^2
    assert wasserstein_discriminator_loss(torch.tensor([2.0]), torch.tensor([-1.0])) == -3


def vgg_weights(levels: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    widths, weights, channels = {0: 4, 2: 4, 5: 6, 7: 6, 10: 8, 12: 8}, {}, 3
    for index in list(widths)[:levels]:
        weights[f"features.{index}.weight"] = torch.randn(widths[index], channels, 3, 3) * 0.3
        weights[f"features.{index}.bias"] = torch.randn(widths[index])
        channels = widths[index]
    return weights


def test_vgg_distance_sums_its_levels_and_reads_a_file(tmp_path):
    torch.save(vgg_weights(6), tmp_path / "vgg.pt")
    image, target = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16, requires_grad=True)
    both = VGGDistance((2, 7), weights=tmp_path / "vgg.pt")(image, target)
    each = [VGGDistance.from_state_dict(vgg_weights(6), (level,))(image, target) for level in (2, 7)]
    torch.testing.assert_close(both, each[0] + each[1])
    assert both.shape == (2,) and torch.autograd.grad(both.sum(), target)[0].abs().sum() > 0
    assert VGGDistance.from_state_dict(vgg_weights(6))(image, image).sum() == 0
    with pytest.raises(ValueError, match=r"not those of VGG-19: '7.weight' is missing"):
        VGGDistance.from_state_dict(vgg_weights(3))
    with pytest.raises(ValueError, match=r"`levels` holds \[3\], but VGG-19's convolutions are \[0, 2"):
        VGGDistance.from_state_dict(vgg_weights(6), (3,))

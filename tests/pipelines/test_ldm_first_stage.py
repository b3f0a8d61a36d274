"""Both kinds of first stage behind one interface."""

import pytest
import torch
from pipelines.tiny_ldm import tiny_first_stage

from diffusers_ext.pipelines.ldm.first_stage import (
    decode_first_stage,
    encode_first_stage,
    encode_masked_image,
    first_stage_channels,
    first_stage_factor,
    latent_scale,
)
from diffusers_ext.pipelines.ldm.tiling import Tiles


@pytest.fixture(scope="module", params=["kl", "vq"])
def vqvae(request):
    torch.manual_seed(0)
    return tiny_first_stage(request.param)


@torch.no_grad()
def test_encoding_and_decoding_are_the_networks_own(vqvae):
    images = 2 * torch.rand(2, 3, 16, 24) - 1
    own = vqvae.encode(images)
    expected = own.latent_dist.mode() if hasattr(own, "latent_dist") else own.latents
    latents = encode_first_stage(vqvae, images)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(decode_first_stage(vqvae, latents), vqvae.decode(latents).sample)
    assert first_stage_factor(vqvae) == 4 and first_stage_channels(vqvae) == 3


@torch.no_grad()
def test_one_tile_is_the_whole_and_of_many_each_is_its_own(vqvae):
    images = 2 * torch.rand(1, 3, 40, 32) - 1
    one, many = (Tiles.build((40, 32), (side, side), (side // 2, side // 2), 4) for side in (64, 16))
    latents, tiled = (encode_first_stage(vqvae, images, grid=tiles.encode) for tiles in (one, many))
    torch.testing.assert_close(latents, encode_first_stage(vqvae, images))
    assert tiled.shape == latents.shape
    corner = encode_first_stage(vqvae, images[..., :16, :16])  # its own corner is in no other tile
    torch.testing.assert_close(tiled[..., :2, :2], corner[..., :2, :2])
    pixels, tiled = (decode_first_stage(vqvae, latents, grid=tiles.decode) for tiles in (one, many))
    torch.testing.assert_close(pixels, decode_first_stage(vqvae, latents))
    assert tiled.shape == images.shape
    corner = decode_first_stage(vqvae, latents[..., :4, :4])
    torch.testing.assert_close(tiled[..., :8, :8], corner[..., :8, :8])


@torch.no_grad()
def test_draws_from_the_posterior_take_generators_and_work_in_tiles():
    vqvae, images = tiny_first_stage("kl"), 2 * torch.rand(2, 3, 16, 16) - 1

    def draw(images, seeds, **options):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return encode_first_stage(vqvae, images, sample=True, generator=generators, **options)

    both = draw(images, (3, 4))
    torch.testing.assert_close(both[1:], draw(images[1:], (4,)))
    posterior = vqvae.encode(images).latent_dist
    assert (both - posterior.mean).abs().max() > 0.1 * posterior.std.max()
    tiled = draw(images, (3, 4), grid=Tiles.build((16, 16), (16, 16), (8, 8), 4).encode)
    torch.testing.assert_close(tiled, both)


def test_the_scale_of_latents():
    assert latent_scale(tiny_first_stage("kl", scaling_factor=0.18215)) == 0.18215
    assert latent_scale(tiny_first_stage("vq", scaling_factor=0.7)) == 0.7
    assert latent_scale(tiny_first_stage("vq", scaling_factor=0.18215)) == 1.0  # the class's default, set by nobody


def test_channels_are_those_before_the_codebook():
    assert first_stage_channels(tiny_first_stage("vq", vq_embed_dim=5)) == 5


@torch.no_grad()
def test_what_an_inpainting_model_sees(vqvae):
    images, mask = 2 * torch.rand(1, 3, 16, 16) - 1, torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    condition = encode_masked_image(vqvae, images, mask)
    black = images.clone()
    black[..., 8:] = -1
    torch.testing.assert_close(condition[:, :3], encode_first_stage(vqvae, black))
    assert condition[:, 3].unique().tolist() == [-1, 1] and (condition[:, 3, :, 2:] == 1).all()


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_first_stage_is_scaled_and_read_like_the_bare_one(wrap):
    vqvae = tiny_first_stage("vq", scaling_factor=0.18215)
    assert latent_scale(vqvae) == latent_scale(wrap(vqvae)) == 1.0
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    for first_stage in (vqvae, tiny_first_stage("kl")):
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            latents = encode_first_stage(first_stage, picture)
            assert torch.equal(encode_first_stage(wrap(first_stage), picture), latents)
            decoded = first_stage.decode(latents).sample  # diffusers' own quantiser
            assert torch.equal(decode_first_stage(wrap(first_stage), latents), decoded)


def test_another_network_is_no_first_stage():
    with pytest.raises(TypeError, match="`vqvae` is a Linear: a first stage is an AutoencoderKL or a VQModel"):
        latent_scale(torch.nn.Linear(1, 1))

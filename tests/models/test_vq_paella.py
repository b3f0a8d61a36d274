import pytest
import torch
from diffusers import VQModel

from diffusers_ext.models.blocks import codebook as codebook_module
from diffusers_ext.models.blocks.codebook import nearest_codes
from diffusers_ext.models.token_codec import codebook_weight, decode_indices, downsample_factor, encode_indices
from diffusers_ext.models.vq_gumbel import GumbelVQModel, most_probable_codes
from diffusers_ext.models.vq_paella import PaellaVQModel

TINY = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (8, 16),
    "latent_channels": 4,
    "num_vq_embeddings": 20,
    "norm_num_groups": 4,
}
IMAGE = torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tiny(kind, **overrides):
    torch.manual_seed(0)
    vqvae = kind(**{**TINY, **overrides}).eval()
    torch.nn.init.normal_(vqvae.quantize.embedding.weight, std=0.5)
    return vqvae


@torch.no_grad()
def test_nearest_code_is_the_brute_force_one(monkeypatch):
    monkeypatch.setattr(codebook_module, "_ROWS_PER_CHUNK", 7)  # an uneven split
    latents, codebook = torch.randn(2, 4, 5, 3), torch.randn(20, 4)
    differences = latents.permute(0, 2, 3, 1)[..., None, :] - codebook  # (b, h, w, k, d)
    indices = nearest_codes(latents, codebook)
    assert indices.dtype == torch.int64 and indices.shape == (2, 5, 3)
    assert torch.equal(indices, differences.square().sum(-1).argmin(-1))
    rows = codebook[torch.arange(20)].T.reshape(1, 4, 4, 5)
    assert torch.equal(nearest_codes(rows, codebook).flatten(), torch.arange(20))


@torch.no_grad()
def test_search_stays_float32_under_autocast_and_for_half_precision_latents():
    codebook = torch.randn(64, 4)
    codebook[1] = codebook[0] + 1e-3  # bfloat16 cannot tell them apart
    latents = codebook[:2].T.reshape(1, 4, 1, 2)
    proj = torch.nn.Conv2d(4, 64, 1)
    logits = proj(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_codes(latents, codebook).flatten().tolist() == [0, 1]
        assert torch.equal(most_probable_codes(latents, proj), logits.argmax(1))
    assert nearest_codes(latents.bfloat16(), codebook.bfloat16()).shape == (1, 1, 2)


@torch.no_grad()
@pytest.mark.parametrize("lookup_from_codebook", [False, True])
def test_stock_model_agrees_with_its_own_quantizer(lookup_from_codebook):
    vqvae = tiny(VQModel, lookup_from_codebook=lookup_from_codebook)
    assert downsample_factor(vqvae) == 2
    latents = vqvae.encode(IMAGE).latents
    indices = encode_indices(vqvae, IMAGE)
    assert torch.equal(indices.flatten(), vqvae.quantize(latents)[2][2])
    assert indices.shape == (2, 6, 8) and len(indices.unique()) > 3
    torch.testing.assert_close(decode_indices(vqvae, indices), vqvae.decode(latents).sample)


@torch.no_grad()
def test_gumbel_model():
    vqvae = tiny(GumbelVQModel)
    latents = vqvae.encode(IMAGE).latents
    logits = vqvae.quantize_proj(latents)
    indices = vqvae.encode_indices(IMAGE)
    assert torch.equal(indices, logits.argmax(1))
    assert not torch.equal(indices, nearest_codes(latents, vqvae.quantize.embedding.weight))
    image = vqvae.decode_indices(indices)
    assert image.shape == IMAGE.shape  # 12x16: the grid is not square
    # the inherited calls go through the projection as well
    assert torch.equal(vqvae(IMAGE).sample, image)
    sample, commit_loss = vqvae(IMAGE, return_dict=False)
    assert torch.equal(sample, image) and commit_loss.tolist() == [0.0, 0.0]
    codes = vqvae.quantize.embedding(indices).permute(0, 3, 1, 2)
    assert torch.equal(vqvae.decode(codes, force_not_quantize=True).sample, image)


def tiny_paella():
    torch.manual_seed(0)
    vqvae = PaellaVQModel(bottleneck_blocks=2, embed_dim=16, latent_channels=4, num_vq_embeddings=20).eval()
    torch.nn.init.normal_(codebook_weight(vqvae), std=0.1)  # as wide as the latents of random weights
    for name, parameter in vqvae.named_parameters():
        if name.endswith("gammas"):
            torch.nn.init.normal_(parameter, std=0.5)  # open the branches
    return vqvae


@torch.no_grad()
def test_paella_model_has_the_released_size_and_takes_pictures_like_the_others():
    with torch.device("meta"):
        assert round(sum(p.numel() for p in PaellaVQModel().parameters()) / 1e6, 1) == 18.4  # paella.md, section 6
    vqvae = tiny_paella()
    assert downsample_factor(vqvae) == 4
    indices = encode_indices(vqvae, IMAGE)
    latents = vqvae.encode(IMAGE / 2 + 0.5).latents  # the class itself: [0, 1]
    assert torch.equal(indices, nearest_codes(latents, codebook_weight(vqvae))) and len(indices.unique()) > 2
    image = decode_indices(vqvae, indices)
    assert image.shape == IMAGE.shape
    torch.testing.assert_close(image, vqvae(IMAGE / 2 + 0.5).sample * 2 - 1)
    torch.testing.assert_close(image, vqvae.decode(latents, force_not_quantize=False, return_dict=False)[0] * 2 - 1)


@torch.no_grad()
def test_codes_of_the_paella_model_see_only_their_surroundings():
    vqvae = tiny_paella()
    image = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    changed = image.clone()
    changed[..., :4] = 0.0  # the first column of tokens
    moved = (vqvae.encode(image).latents != vqvae.encode(changed).latents).any(1)[0].any(0)  # columns
    assert moved.tolist() == [True, True, True, *[False] * 9]


@torch.no_grad()
def test_paella_model_is_saved_and_loaded(tmp_path):
    vqvae = tiny_paella()
    vqvae.save_pretrained(tmp_path)
    loaded, info = PaellaVQModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(encode_indices(loaded, IMAGE), encode_indices(vqvae, IMAGE))
    with pytest.raises(ValueError, match="`embed_dim` is 18: with 3 levels it must be a multiple of 4"):
        PaellaVQModel(levels=3, embed_dim=18)


@torch.no_grad()
def test_sampled_indices_follow_the_softmax():
    vqvae = tiny(GumbelVQModel, num_vq_embeddings=5)
    image = IMAGE[:1, :, :4, :4]
    probabilities = vqvae.quantize_proj(vqvae.encode(image).latents).softmax(1)  # (1, k, 2, 2)
    generator = torch.Generator().manual_seed(0)
    draws = encode_indices(vqvae, image.expand(1000, -1, -1, -1), sample=True, generator=generator)
    for position in range(4):
        expected = probabilities.flatten(2)[0, :, position]
        counts = draws.flatten(1)[:, position].bincount(minlength=5)
        chi_square = ((counts - 1000 * expected).square() / (1000 * expected)).sum()
        assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001


@torch.no_grad()
def test_draws_are_repeatable_and_do_not_depend_on_the_batch():
    vqvae = tiny(GumbelVQModel)

    def seeds(*values):
        return [torch.Generator().manual_seed(value) for value in values]

    both = encode_indices(vqvae, IMAGE, sample=True, generator=seeds(1, 2))
    assert torch.equal(encode_indices(vqvae, IMAGE[1:], sample=True, generator=seeds(2)), both[1:])
    assert torch.equal(encode_indices(vqvae, IMAGE[1:], sample=True, generator=seeds(2)[0]), both[1:])
    assert not torch.equal(encode_indices(vqvae, IMAGE, sample=True, generator=seeds(3, 4)), both)
    noise = torch.stack([torch.empty(20, 6, 8).exponential_(generator=g) for g in seeds(1, 2)]).log().neg()
    assert torch.equal(encode_indices(vqvae, IMAGE, gumbel_noise=noise), both)


@torch.no_grad()
def test_save_and_load(tmp_path):
    vqvae = tiny(GumbelVQModel)
    vqvae.save_pretrained(tmp_path)
    loaded, info = GumbelVQModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded.encode_indices(IMAGE), vqvae.encode_indices(IMAGE))
    half = GumbelVQModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    decoded = half.decode_indices(half.encode_indices(IMAGE))  # a float32 picture into bfloat16 weights
    assert decoded.dtype == torch.bfloat16 and decoded.isfinite().all()


def test_indices_carry_no_graph():
    vqvae = tiny(GumbelVQModel)
    assert not encode_indices(vqvae, IMAGE.clone().requires_grad_()).requires_grad
    decode_indices(vqvae, encode_indices(vqvae, IMAGE)).mean().backward()  # decoding is trainable
    assert vqvae.quantize.embedding.weight.grad.any()


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        (VQModel, lambda m: encode_indices(m, IMAGE[0]), r"shape \(3, 12, 16\).*\(batch, 3, height, width\)"),
        (VQModel, lambda m: encode_indices(m, IMAGE[:, :1]), r"`image` has shape \(2, 1, 12, 16\)"),
        (VQModel, lambda m: encode_indices(m, IMAGE[..., :15]), r"12x15 pixels.*multiples of 2.*valid size is 12x16"),
        (VQModel, lambda m: encode_indices(m, IMAGE, sample=True), r"`sample=True` needs a GumbelVQModel: a VQModel"),
        (PaellaVQModel, lambda m: encode_indices(m, IMAGE[..., :15]), r"12x15 pixels.*of 4.*valid size is 12x16"),
        (PaellaVQModel, lambda m: encode_indices(m, IMAGE, sample=True), r"GumbelVQModel: a PaellaVQModel takes"),
        (GumbelVQModel, lambda m: encode_indices(m, IMAGE, gumbel_noise=IMAGE), r"expected \(2, 20, 6, 8\)"),
        (
            GumbelVQModel,
            lambda m: encode_indices(m, IMAGE, sample=True, generator=[torch.Generator()]),
            r"`generator` is a list of 1 for 2 images",
        ),
        (VQModel, lambda m: decode_indices(m, torch.zeros(2, 9, dtype=torch.int64)), r"`indices` has shape \(2, 9\)"),
        (VQModel, lambda m: decode_indices(m, torch.full((1, 2, 2), 20)), r"from 20 to 20, the codebook has 0\.\.19"),
    ],
)
def test_bad_input(kind, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_paella() if kind is PaellaVQModel else tiny(kind))


@pytest.mark.parametrize("cls", [VQModel, GumbelVQModel, PaellaVQModel])
@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_tokenizer_chooses_the_same_codes(cls, wrap):
    vqvae = tiny_paella() if cls is PaellaVQModel else tiny(cls)
    with torch.compiler.set_stance("force_eager"):
        indices = encode_indices(vqvae, IMAGE)
        assert len(indices.unique()) > 1
        assert torch.equal(encode_indices(wrap(vqvae), IMAGE), indices)
        assert torch.equal(decode_indices(wrap(vqvae), indices), decode_indices(vqvae, indices))
        assert downsample_factor(wrap(vqvae)) == downsample_factor(vqvae)
        if cls is GumbelVQModel:
            noise = -(-torch.rand(2, 20, 6, 8).log()).log()
            drawn = encode_indices(vqvae, IMAGE, gumbel_noise=noise)
            assert torch.equal(encode_indices(wrap(vqvae), IMAGE, gumbel_noise=noise), drawn)


def test_another_network_is_no_tokenizer():
    with pytest.raises(TypeError, match="`vqvae` is a Linear: a tokenizer is a VQModel, a GumbelVQModel or a Paella"):
        encode_indices(torch.nn.Linear(1, 1), IMAGE)


def test_the_old_module_finds_what_moved_out_of_it():
    """Checkpoints and users may name `diffusers_ext.models.vq_paella.GumbelVQModel`."""
    from diffusers_ext.models import token_codec, vq_gumbel, vq_paella

    assert vq_paella.GumbelVQModel is GumbelVQModel and GumbelVQModel.__module__ == vq_gumbel.__name__
    assert vq_paella.encode_indices is encode_indices and vq_paella.nearest_codes is nearest_codes
    for name, module in vq_paella._MOVED.items():
        assert getattr(vq_paella, name) is getattr({"token_codec": token_codec, "vq_gumbel": vq_gumbel}[module], name)
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        vq_paella.missing  # noqa: B018

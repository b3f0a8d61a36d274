"""The U-Net with a constant number of heads, against the stock class wherever that can express it."""

import inspect

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from peft import LoraConfig

from diffusers_ext.models.unet_ldm import LDMUNet

CONFIG = {
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    "layers_per_block": 1,
    "attn_norm_num_groups": 32,
}


def test_signature_is_the_parents_and_one_more():
    ours, parents = (inspect.signature(cls.__init__).parameters for cls in (LDMUNet, UNet2DModel))
    assert list(ours)[:-1] == list(parents) and list(ours)[-1] == "num_attention_heads"
    assert all(ours[name].default == parent.default for name, parent in parents.items())


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_attention_heads": 4}, {"attention_head_dim": 16}])
def test_equal_to_the_stock_class_where_it_can_express_it(options):
    stock = UNet2DModel(block_out_channels=(64, 64), attention_head_dim=16, **CONFIG)
    ours = LDMUNet(block_out_channels=(64, 64), **CONFIG, **options)
    ours.load_state_dict(stock.state_dict())
    sample = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(ours(sample, 7).sample, stock(sample, 7).sample, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_heads_are_constant_and_survive_saving(tmp_path):
    unet = LDMUNet(block_out_channels=(32, 64), num_attention_heads=8, **CONFIG).eval()
    for name, parameter in unet.named_parameters():
        if ".attentions." in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)  # so that attention has something to choose
    attention = [module for module in unet.modules() if isinstance(module, Attention)]
    assert len(attention) == 2 + 1 + 4 and {module.heads for module in attention} == {8}
    assert {module.inner_dim // module.heads for module in attention} == {4, 8}
    unet.save_pretrained(tmp_path)
    sample = torch.randn(1, 3, 8, 8, dtype=torch.float64)  # float32 kernels depend on where a file is mapped to
    expected = unet.double()(sample, 7).sample
    torch.testing.assert_close(LDMUNet.from_pretrained(tmp_path).double()(sample, 7).sample, expected)
    other = LDMUNet.from_pretrained(tmp_path, num_attention_heads=4).double()(sample, 7).sample
    assert not torch.allclose(other, expected, atol=1e-4)  # so the number of heads is what was kept


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_must_divide_the_widths(heads):
    with pytest.raises(ValueError, match=rf"`num_attention_heads` is {heads}, but \S+ has 32 channels.*divisor"):
        LDMUNet(block_out_channels=(32, 64), num_attention_heads=heads, **CONFIG)


@torch.no_grad()
def test_takes_adapters_and_attention_processors(tmp_path):
    torch.manual_seed(0)
    sizes = {"block_out_channels": (64, 64), "num_attention_heads": 4, **CONFIG}
    unet, other = LDMUNet(**sizes).eval(), LDMUNet(**sizes).eval()
    other.load_state_dict(unet.state_dict())
    sample = torch.randn(1, 3, 8, 8)
    plain = unet(sample, 3).sample
    unet.set_attn_processor(AttnProcessor())
    assert {type(one) for one in unet.attn_processors.values()} == {AttnProcessor}
    torch.testing.assert_close(unet(sample, 3).sample, plain, atol=1e-4, rtol=1e-4)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = unet(sample, 3).sample
    assert not torch.allclose(adapted, plain, atol=1e-3)
    unet.save_lora_adapter(tmp_path)
    other.load_lora_adapter(tmp_path / "pytorch_lora_weights.safetensors", prefix=None)
    torch.testing.assert_close(other(sample, 3).sample, adapted, atol=1e-4, rtol=1e-4)

"""One training step of several flows, by hand: draws, contexts, dropped contexts, the sum, the layer groups' rates."""

import pytest
import torch
from tiny_flows import tiny_encoders, tiny_unet

from diffusers_ext.pipelines.versatile.conditions import image_context, text_context
from diffusers_ext.pipelines.versatile.denoising import versatile_scheduler
from diffusers_ext.pipelines.versatile.optimus_text import sentence_ids
from diffusers_ext.training.versatile.args import VersatileArgs
from diffusers_ext.training.versatile.data import FlowRows
from diffusers_ext.training.versatile.networks import learning_rate_groups
from diffusers_ext.training.versatile.objective import FlowEncoders, FlowObjective
from diffusers_ext.training_utils.args import DataArgs
from diffusers_ext.training_utils.plan import keyed_generator

BATCH = {
    "image": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    "prompt": ["a red ring", "a blue star"],
    "sentence": ["a red ring", "a blue star"],
    "source": ["red ring", "blue star"],
}


@pytest.fixture(scope="module")
def encoders() -> FlowEncoders:
    torch.manual_seed(0)
    return tiny_encoders()


def losses(unet, encoders, flow_weights, dropout=0.5, rows=BATCH):
    reader = FlowRows.of(encoders, VersatileArgs(flows=list(flow_weights)), DataArgs(dataset_name="scenes"))
    samples = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    batch = reader.collate([{**sample, **reader.prepared(sample.pop("image"))} for sample in samples])
    generators = [keyed_generator(7, i) for i in range(2)]
    objective = FlowObjective(
        unet, encoders, versatile_scheduler(), flow_weights=flow_weights, cond_dropout_prob=dropout
    )
    assert all(name.startswith("unet.") for name in objective.state_dict())  # what is frozen is in no checkpoint
    return objective(batch, generators, 0)


FLOWS = {"text-to-image": 1.0, "image-to-image": 0.5, "image-to-text": 2.0, "text-to-text": 1.0}


def test_every_flow_sees_its_latents_contexts_and_draws(encoders):
    unet = tiny_unet()
    found = losses(unet, encoders, FLOWS)
    generators = [keyed_generator(7, i) for i in range(2)]
    posterior = encoders.vae.encode(BATCH["image"]).latent_dist
    noise = torch.stack([torch.randn(2, 16, 16, generator=g) for g in generators])
    clean = {
        "image": 0.5 * (posterior.mean + posterior.std * noise),
        "text": encoders.optimus.encode(sentence_ids(encoders.encoder_tokenizer, BATCH["sentence"])).mean,
    }
    pictures = {"seen": (BATCH["image"] * 127.5 + 127.5).round() / 127.5 - 1, "black": -torch.ones(1, 3, 16, 16)}
    pictures = {name: image_context(encoders.image_encoder, picture) for name, picture in pictures.items()}

    def texts(*captions):
        ids = encoders.tokenizer(list(captions), padding="max_length", max_length=6, return_tensors="pt").input_ids
        return text_context(encoders.text_encoder, ids)

    contexts = {
        "text-to-image": (texts(*BATCH["prompt"]), texts("")),
        "image-to-image": (pictures["seen"], torch.zeros_like(pictures["black"])),
        "image-to-text": (pictures["seen"], pictures["black"]),
        "text-to-text": (texts(*BATCH["source"]), texts("")),
    }
    total, dropped = 0.0, 0
    alphas = versatile_scheduler().alphas_cumprod
    for flow, (context, nothing) in contexts.items():
        context_type, data_type = flow.split("-to-")
        target = clean[data_type]
        times = torch.stack([torch.randint(1000, (), generator=g) for g in generators])
        noise = torch.stack([torch.randn(target.shape[1:], generator=g) for g in generators])
        drop = torch.stack([torch.rand((), generator=g) for g in generators]) < 0.5
        dropped += int(drop.sum())
        given = torch.stack([nothing[0] if drop[i] else context[i] for i in range(2)])
        alpha = alphas[times].view(2, *[1] * (target.ndim - 1))
        noised = alpha.sqrt() * target + (1 - alpha).sqrt() * noise
        predicted = unet(noised, times, given, data_type=data_type, context_type=context_type).sample
        error = (predicted - noise).square().mean()
        torch.testing.assert_close(found[f"loss_{flow.replace('-', '_')}"], error, rtol=1e-4, atol=1e-5)
        total = total + FLOWS[flow] * error
    torch.testing.assert_close(found["loss"], total, rtol=1e-4, atol=1e-5)
    assert 0 < dropped < 8


def test_flows_in_one_step_add_up_their_gradients(encoders):
    """Algorithm 1: backward after every flow, one step."""
    unet = tiny_unet()
    shared = {"image-to-text": 1.0, "text-to-text": 3.0}
    losses(unet, encoders, shared)["loss"].backward()
    together = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad()
    both = losses(unet, encoders, shared)
    for flow, weight in shared.items():
        (weight * both[f"loss_{flow.replace('-', '_')}"]).backward(retain_graph=True)
    for name, parameter in unet.named_parameters():
        if name in together:
            torch.testing.assert_close(together[name], parameter.grad, rtol=1e-4, atol=1e-6)
    trained = {name.split(".")[0] + "." + name.split(".")[1] for name in together}
    assert trained >= {"data_layers.text", "context_layers.image", "context_layers.text"}
    assert "data_layers.image" not in trained


def test_dropout_at_its_ends(encoders):
    unet = tiny_unet()
    flow = {"text-to-image": 1.0}
    never, always = (losses(unet, encoders, flow, dropout)["loss"] for dropout in (0.0, 1.0))
    assert not torch.allclose(never, always)
    other = {**BATCH, "prompt": ["blue", "blue"]}
    same = losses(unet, encoders, flow, 1.0, other)["loss"]
    torch.testing.assert_close(same, always)


def test_layer_groups_have_rates_of_their_own():
    unet = tiny_unet(flows=["text-to-image", "image-to-image"])
    groups = learning_rate_groups(unet, 2.0, {"global": 0.1, "data.image": 0.0})
    rates = {name: group["lr"] for name, group in zip(unet.layer_groups(), groups, strict=True)}
    assert rates == pytest.approx({"global": 0.2, "data.image": 0.0, "context.image": 2.0, "context.text": 2.0})
    listed = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in unet.parameters()} and len(listed) == len(set(listed))
    unet.data_layers.requires_grad_(False)
    unet.time_embedding.linear_1.requires_grad_(False)
    left = [parameter for group in learning_rate_groups(unet, 2.0, {}) for parameter in group["params"]]
    assert {id(p) for p in left} == {id(p) for p in unet.parameters() if p.requires_grad} and len(left) < len(listed)


@pytest.mark.parametrize("scales", [{"data.text": 0.5}, {"unet": 1.0}, {"global": -1.0}])
def test_unknown_groups_are_refused(scales):
    with pytest.raises(ValueError, match="the layer groups of this network are global, data.image, context.text, and"):
        learning_rate_groups(tiny_unet(flows=["text-to-image"]), 1.0, scales)

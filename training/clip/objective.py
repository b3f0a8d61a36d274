"""What a CLIP learns: which texts belong to which image, and with options more about both.

The papers are named in train_clip.py.
"""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from transformers import CLIPModel

from diffusers_ext.training.clip.networks import build_captioner
from diffusers_ext.training_utils.objective import Objective

LARGEST_LOGIT_SCALE = math.log(100.0)


def contrastive_losses(
    image_embeds: Tensor,
    text_embeds: Tensor,
    scale: Tensor,
    positives: Tensor | None = None,
    counted: Tensor | None = None,
) -> dict[str, Tensor]:
    """Symmetric cross-entropy of vectors; texts beyond the number of images are extra negatives of the images.

    The "images" may be texts as well: then captions find their paraphrases.

    Args:
        image_embeds: (b, d); text_embeds: (n, d) with n >= b, of which text i belongs to image i.
        positives: (b, n), which texts are true of an image; they share its target. Each its own one when unset.
        counted: (n,), which texts take part: the first of each, to contrast with distinct texts. All when unset.
    """
    image_embeds, text_embeds = F.normalize(image_embeds.float(), dim=-1), F.normalize(text_embeds.float(), dim=-1)
    with torch.autocast(image_embeds.device.type, enabled=False):  # in bf16 the logits would be whole steps of 1/16
        logits = scale.float() * image_embeds @ text_embeds.T  # (b, n)
    count = len(image_embeds)
    if positives is None:
        positives = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    of_texts = _shared_target_loss(logits[:, :count].T, positives[:, :count].T)
    if counted is None:
        text_loss = of_texts.mean()
    else:
        logits, positives = logits.masked_fill(~counted, -torch.inf), positives & counted
        text_loss = of_texts[counted[:count]].mean()
    loss = 0.5 * (_shared_target_loss(logits, positives).mean() + text_loss)
    hits = positives.gather(1, logits.argmax(1, keepdim=True))
    return {"loss": loss, "accuracy": hits.float().mean()}


def _shared_target_loss(logits: Tensor, positives: Tensor) -> Tensor:
    """Cross-entropy (b,) of each row of logits (b, n), the target divided evenly among its positives."""
    return -torch.where(positives, logits.log_softmax(1), 0.0).sum(1) / positives.sum(1)


def equal_texts(ids: Tensor, others: Tensor) -> Tensor:
    """(a, b): which of the token ids (a, l) and (b, l) are the same text as far as the text tower reads it."""
    same = torch.ones(len(ids), len(others), dtype=torch.bool, device=ids.device)
    for one, other in zip(ids.T, others.T, strict=True):  # a place at a time: (a, b, l) would be large
        same &= one[:, None] == other
    return same


def is_first(texts: Tensor) -> Tensor:
    """(n,): no earlier row of token ids (n, l) is equal to this one."""
    return equal_texts(texts, texts).int().argmax(1) == torch.arange(len(texts), device=texts.device)


class ClipObjective(Objective):
    """Picture and texts in, losses out. Each process contrasts its own micro-batch.

    Equal captions are positives of each other. In evaluation mode a picture is contrasted with the distinct texts.
    """

    def __init__(self, clip: CLIPModel, has_paraphrases: bool, patch_weight: float = 0.0, caption_weight: float = 0.0):
        super().__init__()
        self.clip, self.has_paraphrases = clip, has_paraphrases
        self.patch_weight, self.caption_weight = patch_weight, caption_weight
        self.captioner = build_captioner(clip) if caption_weight > 0 else None

    def losses(self, batch: dict[str, Tensor], generators: list[Generator], step: int) -> dict[str, Tensor]:
        return self.contrast(**batch)

    def contrast(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Token ids of the captions, of their paraphrases if there are any, and of the negatives if there are any.

        The mask (0 for padding) is for the captioner: the text tower is causal and pools at the end token.
        """
        clip, count = self.clip, len(pixel_values)
        seen = clip.vision_model(pixel_values=pixel_values).last_hidden_state
        # the patch tokens are normalised and projected as the class token is, the first of them: (b, 1 + n, d)
        tokens = clip.visual_projection(clip.vision_model.post_layernorm(seen))
        texts = clip.text_projection(clip.text_model(input_ids=input_ids).pooler_output)
        scale = self.scale()
        captions, others = texts[:count], texts[count:]
        ids = input_ids.masked_fill(attention_mask == 0, -1)
        own, other_ids = ids[:count], ids[count:]
        if self.has_paraphrases:
            texts, ids = torch.cat([captions, others[count:]]), torch.cat([own, other_ids[count:]])
        shared = {"positives": equal_texts(own, ids), "counted": None if self.training else is_first(ids)}
        losses = contrastive_losses(tokens[:, 0], texts, scale, **shared)
        if self.has_paraphrases:
            # the paraphrases of an equal caption are true as well, and so is a text that equals caption or paraphrase
            true = equal_texts(own, other_ids) | equal_texts(other_ids[:count], other_ids)
            true[:, :count] |= equal_texts(own, own)
            among_texts = contrastive_losses(
                captions, others, scale, true, None if self.training else is_first(other_ids)
            )
            losses |= {f"text_{name}": value for name, value in among_texts.items()}
            losses["loss"] = losses["loss"] + losses["text_loss"]
        if self.patch_weight > 0:
            of_patches = contrastive_losses(tokens[:, 1:].mean(dim=1), texts, scale, **shared)
            losses |= {f"patch_{name}": value for name, value in of_patches.items()}
            losses["loss"] = losses["loss"] + self.patch_weight * losses["patch_loss"]
        if self.captioner is not None:
            written = slice(count, 2 * count) if self.has_paraphrases else slice(count)
            losses["caption_loss"] = self.caption_loss(tokens, input_ids[written], attention_mask[written])
            losses["loss"] = losses["loss"] + self.caption_weight * losses["caption_loss"]
        return losses

    @torch.no_grad()
    def bound_scale(self) -> None:
        """Keeps the weight itself within the bound: beyond it would get no gradient and stay there."""
        self.clip.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)

    def scale(self) -> Tensor:
        """The factor of the cosines: at most 100 (the paper's bound)."""
        if not self.training:
            return self.clip.logit_scale.clamp(max=LARGEST_LOGIT_SCALE).exp()
        self.bound_scale()
        return self.clip.logit_scale.exp()

    def caption_loss(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Cross-entropy (nats a token) of captions (b, l) by the decoder, from the mean of the tokens (b, n, d)."""
        # in units of the class token's norm, as Versatile Diffusion reads them, and of unit variance
        memory = tokens.mean(dim=1, keepdim=True) / tokens[:, :1].norm(dim=-1, keepdim=True)
        memory = memory * tokens.shape[-1] ** 0.5
        labels = input_ids.masked_fill(attention_mask == 0, -100)  # the index that transformers' losses leave out
        return self.captioner(input_ids=input_ids, encoder_hidden_states=memory, labels=labels).loss

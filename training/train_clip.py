"""Trains a small CLIP (contrastive image-text model) with a tokenizer of its own, from pictures with captions.

    accelerate launch training/train_clip.py training/presets/clip-scenes-64.yaml

Paper: arXiv 2103.00020 (symmetric cross-entropy over the batch); equal captions share the target, as in SupCon, arXiv
2004.11362; wrong captions as extra negatives: NegCLIP, arXiv 2210.01936; captions of the same picture drawn together:
the text contrast of SimCSE, arXiv 2104.08821, with paraphrases as pairs; a caption written from the picture beside the
contrast: CoCa, arXiv 2205.01917. It makes the text-conditional families trainable without any download and scores
their samples.
"""

import logging
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.data.preprocessing import choose_text, prepare_image
from diffusers_ext.training_utils import loop
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.record import learn_once
from diffusers_ext.training_utils.results import publish_result
from diffusers_ext.training_utils.tokenizers import SMALLEST_VOCABULARY, read_captions, train_clip_tokenizer
from diffusers_ext.training_utils.weights import load_whole

logger = logging.getLogger(__name__)

USAGE = """import diffusers_ext
from transformers import AutoTokenizer, CLIPModel

clip, tokenizer = CLIPModel.from_pretrained("{folder}"), AutoTokenizer.from_pretrained("{folder}")
vectors = clip.get_text_features(**tokenizer(["a red circle"], return_tensors="pt")).pooler_output
"""

ONE_PICTURE = (
    "a contrast needs two different captions in the micro-batch of a process, else its loss is 0 from the start."
)
LARGEST_LOGIT_SCALE = math.log(100.0)
IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)  # pixels in [-1, 1], as for the other networks


@dataclass
class ClipArgs:
    """The two towers."""

    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "CLIP to go on with, and its tokenizer: the sizes below are theirs then."}
    )
    vocab_size: int = field(default=1024, metadata={"help": "Largest size of the byte-level BPE vocabulary."})
    max_length: int = field(
        default=32, metadata={"help": "Window of the text tower in tokens, start and end included."}
    )
    text_width: int = field(default=128, metadata={"help": "Width of the text tower."})
    text_layers: int = field(default=3, metadata={"help": "Layers of the text tower."})
    vision_width: int = field(default=128, metadata={"help": "Width of the image tower."})
    vision_layers: int = field(default=4, metadata={"help": "Layers of the image tower."})
    patch_size: int = field(default=8, metadata={"help": "Side of an image patch in pixels."})
    num_attention_heads: int = field(default=4, metadata={"help": "Heads of both towers."})
    projection_dim: int = field(default=128, metadata={"help": "Width of the shared embedding."})
    negative_caption_column: str | None = field(
        default=None, metadata={"help": "Column with wrong captions of a picture, used as extra negatives."}
    )
    num_negative_captions: int = field(
        default=1, metadata={"help": "Draws from that column for each picture; more than 1 is for columns of lists."}
    )
    paraphrase_column: str | None = field(
        default=None,
        metadata={"help": "Column with another true caption: adds the contrast among captions to the loss."},
    )
    patch_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a second contrast, of the mean of the patch tokens in place of the class token. CLIP "
            "itself trains no patch token of its last layer, but Versatile Diffusion reads them all."
        },
    )
    caption_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a captioning loss: a one-layer decoder, dropped afterwards, writes the caption (the "
            "paraphrase, if there is one) from the mean of all tokens, which has to say what belongs together then."
        },
    )

    def __post_init__(self):
        if self.num_negative_captions < 1:
            raise ValueError(f"--num_negative_captions must be >= 1, got {self.num_negative_captions}.")
        if self.num_negative_captions > 1 and not self.negative_caption_column:
            raise ValueError(
                f"--num_negative_captions={self.num_negative_captions} needs --negative_caption_column, which it "
                "draws from."
            )
        for name in ("patch_weight", "caption_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be >= 0, got {getattr(self, name)}.")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"--vocab_size must be >= {SMALLEST_VOCABULARY} (256 bytes, start, end, padding), got "
                f"{self.vocab_size}."
            )
        if self.max_length < 3:
            raise ValueError(f"--max_length must be >= 3 (start, one token, end), got {self.max_length}.")
        for name in ("text_width", "vision_width"):
            if getattr(self, name) % self.num_attention_heads:
                raise ValueError(
                    f"--{name}={getattr(self, name)} is no multiple of --num_attention_heads="
                    f"{self.num_attention_heads}."
                )

    @property
    def has_other_losses(self) -> bool:
        """Whether a single picture with its caption has something to learn from."""
        return bool(self.negative_caption_column) or self.caption_weight > 0


def parse_args(argv: list[str] | None = None) -> tuple[ClipArgs, DataArgs, TrainArgs]:
    args, data, train = parse((ClipArgs, DataArgs, TrainArgs), argv)
    if data.resolution % args.patch_size:
        raise ValueError(
            f"--resolution={data.resolution} is no multiple of --patch_size={args.patch_size}: the rest would be cut "
            "off silently."
        )
    if train.train_batch_size == 1 and not args.has_other_losses:
        raise ValueError(
            f"--train_batch_size=1: {ONE_PICTURE} Raise --train_batch_size (accumulated micro-batches are not "
            "contrasted with each other), or pass --negative_caption_column or --caption_weight."
        )
    return args, data, train


def check_captions(captions: list[str], args: ClipArgs) -> None:
    """Says how many captions differ; with a single one there is nothing to tell apart.

    Raises:
        ValueError: all are equal, and no other loss was asked for.
    """
    distinct = len(set(captions))
    logger.info("%d distinct captions among %d; equal ones count as one", distinct, len(captions))
    if distinct < 2 and not args.has_other_losses:
        raise ValueError(
            f"The training pictures have {len(captions)} captions, of which {distinct} differ: {ONE_PICTURE} Caption "
            "them apart, or pass --negative_caption_column or --caption_weight."
        )


def build_clip(args: ClipArgs, tokenizer: PreTrainedTokenizerFast, resolution: int) -> CLIPModel:
    """A new CLIP whose towers share `num_attention_heads` and `projection_dim`."""
    shared = {"num_attention_heads": args.num_attention_heads, "projection_dim": args.projection_dim}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.text_width,
        intermediate_size=4 * args.text_width,
        num_hidden_layers=args.text_layers,
        max_position_embeddings=args.max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # 1: an id of 2 would select transformers' legacy pooling
        pad_token_id=tokenizer.pad_token_id,
        **shared,
    )
    vision = CLIPVisionConfig(
        hidden_size=args.vision_width,
        intermediate_size=4 * args.vision_width,
        num_hidden_layers=args.vision_layers,
        image_size=resolution,
        patch_size=args.patch_size,
        **shared,
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=args.projection_dim))


def load_clip(name_or_path: str, resolution: int) -> CLIPModel:
    """A CLIP to go on with, in float32.

    Raises:
        ValueError: it sees pictures of another size.
    """
    clip = load_whole(CLIPModel, name_or_path, dtype=torch.float32)
    if (size := clip.config.vision_config.image_size) != resolution:
        raise ValueError(f"--resolution={resolution}, but the CLIP in {name_or_path} sees {size} pixels: pass those.")
    return clip


def build_captioner(clip: CLIPModel) -> GPT2LMHeadModel:
    """A decoder of one layer over CLIP's vocabulary that reads vectors of its shared width."""
    text = clip.config.text_config
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=text.vocab_size,
            n_positions=text.max_position_embeddings,
            n_embd=clip.config.projection_dim,
            n_layer=1,
            n_head=text.num_attention_heads,
            add_cross_attention=True,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            tie_word_embeddings=False,  # a checkpoint of the objective cannot hold one tensor under two names
        )
    )


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


# At module level, so that loader processes can be started with them on every platform.


def read_sample(example: dict, generator: torch.Generator, data: DataArgs, columns: list[str]):
    """The picture (3, h, w), and one text of each column."""
    image = prepare_image(
        example[data.image_column], data.resolution, generator=generator,
        center_crop=data.center_crop, random_flip=data.random_flip,
    )  # fmt: skip
    return image, [choose_text(example[column], generator) for column in columns]


def collate_samples(samples: list, tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Pictures (b, 3, h, w), token ids (n * b, l): all captions, then those of every further column; their mask."""
    images, texts = zip(*samples, strict=True)
    flat = [text for column in zip(*texts, strict=True) for text in column]
    ids = tokenizer(flat, padding=True, truncation=True, return_tensors="pt")  # to its model_max_length
    return {"pixel_values": torch.stack(images), "input_ids": ids.input_ids, "attention_mask": ids.attention_mask}


class ClipObjective(nn.Module):
    """Picture and texts in, losses out. Each process contrasts its own micro-batch.

    Equal captions are positives of each other. In evaluation mode a picture is contrasted with the distinct texts.
    """

    def __init__(self, clip: CLIPModel, has_paraphrases: bool, patch_weight: float = 0.0, caption_weight: float = 0.0):
        super().__init__()
        self.clip, self.has_paraphrases = clip, has_paraphrases
        self.patch_weight, self.caption_weight = patch_weight, caption_weight
        self.captioner = build_captioner(clip) if caption_weight > 0 else None

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
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

    def scale(self) -> Tensor:
        """The factor of the cosines: at most 100 (the paper's bound), in the weight itself as well.

        A weight beyond the bound would get no gradient and stay there.
        """
        if not self.training:
            return self.clip.logit_scale.clamp(max=LARGEST_LOGIT_SCALE).exp()
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)
        return self.clip.logit_scale.exp()

    def caption_loss(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Cross-entropy (nats a token) of captions (b, l) by the decoder, from the mean of the tokens (b, n, d)."""
        # in units of the class token's norm, as Versatile Diffusion reads them, and of unit variance
        memory = tokens.mean(dim=1, keepdim=True) / tokens[:, :1].norm(dim=-1, keepdim=True)
        memory = memory * tokens.shape[-1] ** 0.5
        labels = input_ids.masked_fill(attention_mask == 0, -100)  # the index that transformers' losses leave out
        return self.captioner(input_ids=input_ids, encoder_hidden_states=memory, labels=labels).loss


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = loop.start(train)
    negatives = [args.negative_caption_column] * args.num_negative_captions
    columns = [column for column in (data.caption_column, args.paraphrase_column, *negatives) if column]
    train_set, validation_set = load_pictures(data, text_columns=tuple(columns))
    captions = read_captions(train_set, data.caption_column)
    check_captions(captions, args)
    if args.pretrained_model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(args.pretrained_model_name_or_path)
        clip = load_clip(args.pretrained_model_name_or_path, data.resolution)
    else:
        tokenizer = learn_once(
            train, "tokenizer", partial(train_clip_tokenizer, captions, args.vocab_size, args.max_length)
        )
        clip = build_clip(args, tokenizer, data.resolution)
    if train.gradient_checkpointing:
        clip.gradient_checkpointing_enable({"use_reentrant": False})
    logger.info("%d parameters, %d tokens", sum(p.numel() for p in clip.parameters()), len(tokenizer))

    transform = partial(read_sample, data=data, columns=columns)
    collate = partial(collate_samples, tokenizer=tokenizer)

    def compute_loss(model, batch, generators):
        return model(**batch)

    def validate(step: int) -> dict[str, float]:
        count = min(256, len(validation_set))
        samples = [transform(validation_set[i], loop.keyed_generator(train.seed, i)) for i in range(count)]
        batch = {key: value.to(accelerator.device) for key, value in collate(samples).items()}
        return {f"validation_{name}": float(value) for name, value in objective(**batch).items()}

    objective = ClipObjective(clip, bool(args.paraphrase_column), args.patch_weight, args.caption_weight)
    finished = loop.fit(
        accelerator, objective, compute_loss, train_set, train, transform=transform, collate=collate,
        num_workers=data.dataloader_num_workers, on_validate=validate,
    )  # fmt: skip
    if finished and accelerator.is_main_process:
        clip.logit_scale.data.clamp_(max=LARGEST_LOGIT_SCALE)  # the last step may have gone beyond
        side = {"height": data.resolution, "width": data.resolution}
        processor = CLIPImageProcessor(
            size=side, crop_size=side, image_mean=IMAGE_MEAN, image_std=IMAGE_STD, do_center_crop=False
        )

        def save(folder: Path) -> None:
            for part in (clip, tokenizer, processor):
                part.save_pretrained(folder)

        publish_result(
            train,
            save,
            recipe="clip",
            argv=argv,
            summary="A CLIPModel with its tokenizer.",
            usage=lambda name: USAGE.format(folder=name),
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()

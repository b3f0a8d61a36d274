"""Pictures of a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diffusers_ext.data.crops import Crop, choose_text
from diffusers_ext.pipelines.ldm.pipeline_ldm_text import LDMTextPipeline
from diffusers_ext.pipelines.tokenization import tokenize_texts
from diffusers_ext.training.ldm.args import LDMArgs
from diffusers_ext.training.ldm.tasks.base import Task
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.tokenizers import learn_once, train_clip_tokenizer


@dataclass
class Text(Task):
    """Texts become tokens where the row is read: padded and cut as the pipeline does it."""

    pipeline = LDMTextPipeline
    stock = "LDMTextToImagePipeline"
    conditioner = "bert"
    conditioner_options = {"return_dict": False}  # diffusers reads its default by a name that is deprecated
    raw_condition = "tokens"  # (b, l); the encoder attends to padding

    tokenizer: PreTrainedTokenizerBase | None = None
    window: int = 0

    def columns(self) -> tuple[str, ...]:
        return (self.data.caption_column,)

    def read(
        self, example: dict[str, Any], image: Tensor | None, crop: Crop, generator: Generator
    ) -> dict[str, Tensor | str]:
        text = choose_text(example[self.data.caption_column], generator)
        return {"text": text, "tokens": tokenize_texts(self.tokenizer, [text], self.window)[0][0]}

    @staticmethod
    def new_conditioner(args: LDMArgs, num_labels: int | None, vocab_size: int, num_stages: int) -> LDMBertModel:
        width = args.cross_attention_dim
        config = LDMBertConfig(
            vocab_size=vocab_size, max_position_embeddings=args.text_max_length, encoder_layers=args.encoder_layers,
            encoder_ffn_dim=4 * width, encoder_attention_heads=args.encoder_attention_heads,
            head_dim=args.encoder_head_dim, d_model=width, dropout=0.0,
        )  # fmt: skip
        bert = LDMBertModel(config)
        # Rows of std 0.02, its own start, are small beside the first attention's output: with them the encoder had not
        # learnt to tell colours apart after 6000 steps of ldm-scenes-64-text, with 1 it has after a few hundred
        nn.init.normal_(bert.model.embed_tokens.weight, std=args.token_init_std)
        nn.init.normal_(bert.model.embed_positions.weight, std=min(args.token_init_std, 0.5))
        return bert

    def new_tokenizer(self, captions: Sequence[str], train: TrainArgs) -> PreTrainedTokenizerBase:
        """The one that the options name, or a byte-pair one learnt from the captions."""
        args = self.args
        if args.pretrained_tokenizer_name_or_path:
            return AutoTokenizer.from_pretrained(args.pretrained_tokenizer_name_or_path)
        return learn_once(
            train, "tokenizer", lambda: train_clip_tokenizer(captions, args.vocab_size, args.text_max_length)
        )

    def follow(self, pipe: Any) -> None:
        super().follow(pipe)
        self.tokenizer, self.window = pipe.tokenizer, pipe.text_window

    def trained_conditioner(self, pipe: Any) -> LDMBertModel:
        pipe.bert.to_logits.requires_grad_(False)  # an output head that nothing uses
        return pipe.bert

    def checkpoint_gradients(self, conditioner: LDMBertModel) -> None:
        # transformers does not know that this class supports it
        conditioner.model.gradient_checkpointing = True
        conditioner.model._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def null_condition(self, pipe: Any) -> Tensor:
        return tokenize_texts(pipe.tokenizer, [""], pipe.text_window)[0][0]

    def call(self, pipe: Any, batch: dict[str, Any], examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        prompts = self.args.validation_prompts or batch["text"]
        return {"prompt": prompts, "guidance_scale": self.args.guidance_scale, **self.square()}

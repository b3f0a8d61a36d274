"""Sentences to one vector and back: Optimus, the text autoencoder of Versatile Diffusion.

Li, Gao, Li, Peng, Li, Zhang, Gao, "Optimus: Organizing Sentences via Pre-trained Modeling of a Latent Space", arXiv
2004.04092; original: ChunyuanLI/Optimus@f3190fe, and SHI-Labs/Versatile-Diffusion@cf0f4a2:lib/model_zoo/optimus.py
(MIT both; the weights' licence is not stated). Encoder and decoder are BERT and GPT-2 of transformers.

Differences: sentences are decoded as a batch and with a cache (the original takes one at a time and recomputes the
prefix for every token: `use_cache=False`); the decoder's head is its embedding table rather than a tied copy.

Letters in shape comments: b sentences, l tokens, v words of the decoder's vocabulary, d latent width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, DynamicCache, GPT2Config, GPT2Model

from .blocks.wrappers import with_forward_hooks


@dataclass
class OptimusEncoderOutput(BaseOutput):
    """What the encoder makes of sentences.

    Args:
        mean: (b, d), the latents that Versatile Diffusion works on.
        logvar: (b, d), logarithm of the variance around them.
    """

    mean: Tensor
    logvar: Tensor


@dataclass
class AutoencoderOptimusOutput(BaseOutput):
    """One pass in training.

    Args:
        logits: (b, l, v), those at position i are for the token at i + 1.
        mean, logvar: (b, d), the posterior.
    """

    logits: Tensor
    mean: Tensor
    logvar: Tensor


class _TiedEmbedding(nn.Embedding):
    """An embedding table that is the output head as well: tokens to vectors, hidden states to logits.

    Both in one forward, so that hooks (offloading, casts for storage) see every use of the table.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Integers (...) to (..., width); floating-point numbers (..., width) to logits (..., v)."""
        return F.linear(input, self.weight) if input.is_floating_point() else super().forward(input)


class AutoencoderOptimus(ModelMixin, ConfigMixin):
    """BERT's pooled output to a Gaussian posterior over one vector, and GPT-2 from that vector to tokens.

    GPT-2 reads the vector in two ways: projected and added to every token's embedding, and as the key and value of one
    token in each layer that precedes the sentence (positions therefore start at 1). Both tokenizers stay outside; the
    defaults are those of the released model (BERT-base cased, GPT-2 small with <PAD>, <BOS> and <EOS> appended).

    Args:
        latent_dim: width of the vector.
        encoder_vocab_size, encoder_hidden_size, encoder_intermediate_size, encoder_num_layers,
            encoder_num_attention_heads, encoder_max_length: sizes of BERT; the last one in tokens.
        decoder_vocab_size, decoder_hidden_size, decoder_num_layers, decoder_num_attention_heads, decoder_max_length:
            sizes of GPT-2; the memory takes one of its positions.
        encoder_pad_token_id: fills up the encoder's input, and is not attended to.
        pad_token_id, bos_token_id, eos_token_id: of the decoder.
        dropout: of both networks, everywhere where BERT and GPT-2 have one.
        latent_as_embedding, latent_as_memory: which of the two ways there are.
        initializer_range: standard deviation of new weights. BERT's and GPT-2's suits their width; narrower networks
            need more to pass anything on.

    Raises:
        ValueError: for a width that its heads do not divide, a special token beyond the vocabulary, or a decoder that
            would not see the vector.
    """

    # The memory is a cache, and GPT-2 drops caches while it checkpoints; sentences are short anyway.
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 768,
        encoder_vocab_size: int = 28996,
        encoder_hidden_size: int = 768,
        encoder_intermediate_size: int = 3072,
        encoder_num_layers: int = 12,
        encoder_num_attention_heads: int = 12,
        encoder_max_length: int = 512,
        decoder_vocab_size: int = 50260,
        decoder_hidden_size: int = 768,
        decoder_num_layers: int = 12,
        decoder_num_attention_heads: int = 12,
        decoder_max_length: int = 1024,
        encoder_pad_token_id: int = 0,
        pad_token_id: int = 50257,
        bos_token_id: int = 50258,
        eos_token_id: int = 50259,
        dropout: float = 0.1,
        latent_as_embedding: bool = True,
        latent_as_memory: bool = True,
        initializer_range: float = 0.02,
    ):
        super().__init__()
        if not (latent_as_embedding or latent_as_memory):
            raise ValueError(
                "`latent_as_embedding` and `latent_as_memory` are both False: the decoder would not see the latents. "
                "Set one of them (the released model has both)."
            )
        _check_heads("encoder", encoder_hidden_size, encoder_num_attention_heads)
        _check_heads("decoder", decoder_hidden_size, decoder_num_attention_heads)
        _check_special("encoder", encoder_vocab_size, encoder_pad_token_id=encoder_pad_token_id)
        _check_special(
            "decoder",
            decoder_vocab_size,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
        )
        self.encoder = BertModel(
            BertConfig(
                vocab_size=encoder_vocab_size,
                hidden_size=encoder_hidden_size,
                intermediate_size=encoder_intermediate_size,
                num_hidden_layers=encoder_num_layers,
                num_attention_heads=encoder_num_attention_heads,
                max_position_embeddings=encoder_max_length,
                pad_token_id=encoder_pad_token_id,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                layer_norm_eps=1e-12,
                initializer_range=initializer_range,
            )
        )
        self.decoder = GPT2Model(
            GPT2Config(
                vocab_size=decoder_vocab_size,
                n_embd=decoder_hidden_size,
                n_layer=decoder_num_layers,
                n_head=decoder_num_attention_heads,
                n_positions=decoder_max_length,
                pad_token_id=pad_token_id,
                bos_token_id=bos_token_id,
                eos_token_id=eos_token_id,
                embd_pdrop=dropout,
                resid_pdrop=dropout,
                attn_pdrop=dropout,
                layer_norm_epsilon=1e-5,
                initializer_range=initializer_range,
            )
        )
        table = self.decoder.wte
        self.decoder.wte = _TiedEmbedding(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        self.posterior_projection = nn.Linear(encoder_hidden_size, 2 * latent_dim, bias=False)
        self.embedding_projection = self.memory_projection = None
        if latent_as_embedding:
            self.embedding_projection = nn.Linear(latent_dim, decoder_hidden_size, bias=False)
        if latent_as_memory:
            self.memory_projection = nn.Linear(latent_dim, decoder_num_layers * decoder_hidden_size, bias=False)
        for projection in (self.posterior_projection, self.embedding_projection, self.memory_projection):
            if projection is not None:
                nn.init.normal_(projection.weight, std=initializer_range)

    @with_forward_hooks
    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool = True
    ) -> OptimusEncoderOutput | tuple[Tensor, Tensor]:
        """The posterior of sentences.

        Args:
            input_ids: integers (b, l), the encoder's tokens with [CLS] in front and [SEP] behind.
            attention_mask: (b, l), 1 where there is a token; by default wherever `input_ids` are not padding.

        Raises:
            ValueError: for another shape or dtype, a longer sequence, or unknown tokens (checked on a CPU only).
        """
        self._check_ids("input_ids", input_ids, self.config["encoder_vocab_size"], self.config["encoder_max_length"])
        mask = input_ids != self.config["encoder_pad_token_id"] if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` has the shape {tuple(mask.shape)}, but `input_ids` {tuple(input_ids.shape)}: they "
                "must be the same."
            )
        pooled = self.encoder(input_ids, attention_mask=mask.long()).pooler_output
        mean, logvar = self.posterior_projection(pooled).chunk(2, dim=-1)
        return OptimusEncoderOutput(mean, logvar) if return_dict else (mean, logvar)

    @with_forward_hooks
    def predict(self, latents: Tensor, token_ids: Tensor) -> Tensor:
        """Logits (b, l, v) of the token that follows each of `token_ids`, all at once.

        Args:
            latents: (b, d).
            token_ids: integers (b, l), the decoder's tokens with <BOS> in front. Padding behind a sentence changes
                nothing before it.

        Raises:
            ValueError: as `encode`, and for latents of another shape.
        """
        self._check_latents(latents)
        self._check_ids("token_ids", token_ids, self.config["decoder_vocab_size"], self.longest_sentence)
        if len(token_ids) != len(latents):
            raise ValueError(f"`token_ids` holds {len(token_ids)} sentences, but `latents` {len(latents)}.")
        return self._head(self._read(token_ids, self._shift(latents), self._memory(latents)))

    def forward(
        self,
        input_ids: Tensor,
        token_ids: Tensor,
        attention_mask: Tensor | None = None,
        noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> AutoencoderOptimusOutput | tuple[Tensor, Tensor, Tensor]:
        """Encodes sentences, and predicts their tokens from what they were encoded to.

        Args:
            input_ids, attention_mask: as in `encode`.
            token_ids: the same sentences in the decoder's tokens, as in `predict`.
            noise: (b, d), standard Gaussian: the decoder reads mean + sigma * noise. None: it reads the mean.
        """
        posterior = self.encode(input_ids, attention_mask)
        mean, logvar = posterior.mean, posterior.logvar  # type: ignore[union-attr]
        latents = mean
        if noise is not None:
            if noise.shape != mean.shape:
                raise ValueError(f"`noise` has the shape {tuple(noise.shape)}, the latents {tuple(mean.shape)}.")
            latents = mean + torch.exp(0.5 * logvar) * noise
        logits = self.predict(latents, token_ids)
        return AutoencoderOptimusOutput(logits, mean, logvar) if return_dict else (logits, mean, logvar)

    @with_forward_hooks
    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        *,
        max_length: int = 30,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generator | Sequence[Generator] | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Sentences from latents, token by token; the defaults are those of Versatile Diffusion.

        Args:
            latents: (b, d).
            max_length: longest sentence in tokens, <BOS> and <EOS> included. What reaches it ends with <EOS> there.
            do_sample: draw each token; False takes the most probable one.
            temperature: divides the logits before drawing.
            top_k, top_p: draw among the `top_k` most probable tokens (0: among all), and among the most probable ones
                whose probabilities reach `top_p` together.
            generator: for the draws. One for each sentence makes it independent of the others in the batch.
            use_cache: keep keys and values of the tokens read so far, instead of reading all of them again for each
                further one.

        Returns:
            Integers (b, l): <BOS>, the sentence, <EOS>, then padding up to the longest of the batch.

        Raises:
            ValueError: for latents of another shape, an option out of its range, or logits that are not finite.
        """
        self._check_latents(latents)
        self._check_decoding(len(latents), max_length, temperature, top_k, top_p, generator)
        config, batch = self.config, len(latents)
        ids = torch.full((batch, 1), config["bos_token_id"], dtype=torch.long, device=latents.device)
        shift, cache = self._shift(latents), self._memory(latents)
        is_open = torch.ones(batch, dtype=torch.bool, device=latents.device)
        while ids.shape[1] < max_length and bool(is_open.any()):
            if not use_cache:
                cache = self._memory(latents)
            hidden = self._read(ids[:, -1:] if use_cache else ids, shift, cache)
            logits = self._head(hidden[:, -1]).float()  # (b, v)
            if not bool(torch.isfinite(logits).all()):
                raise ValueError(
                    f"The decoder's logits of token {ids.shape[1]} are not finite (NaN or infinite), so no word can be"
                    f" drawn. Check its dtype ({self.dtype}; float16 may overflow: try bfloat16 or float32), its"
                    " weights and `latents`."
                )
            if do_sample:
                logits = logits / temperature
                if top_k > 0 or top_p < 1.0:
                    logits = filter_logits(logits, top_k=top_k, top_p=top_p)
                chosen = _draw(logits.softmax(dim=-1), is_open, generator)
            else:
                chosen = logits.argmax(dim=-1)
            if ids.shape[1] == max_length - 1:
                chosen = torch.full_like(chosen, config["eos_token_id"])
            chosen = torch.where(is_open, chosen, config["pad_token_id"])
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            is_open = is_open & (chosen != config["eos_token_id"])
        return ids

    @property
    def longest_sentence(self) -> int:
        """Tokens that the decoder reads at most."""
        return self.config["decoder_max_length"] - int(self.memory_projection is not None)

    def _shift(self, latents: Tensor) -> Tensor | None:
        """What is added to the embedding of each token, (b, 1, width)."""
        return None if self.embedding_projection is None else self.embedding_projection(latents)[:, None]

    def _memory(self, latents: Tensor) -> DynamicCache:
        """A fresh cache with the latents as the one token before the sentence: its own key and value in each layer."""
        cache = DynamicCache()
        if self.memory_projection is not None:
            layers, heads = self.config["decoder_num_layers"], self.config["decoder_num_attention_heads"]
            for layer, part in enumerate(self.memory_projection(latents).chunk(layers, dim=-1)):
                state = part.view(len(latents), heads, 1, -1)  # (b, heads, 1, width of a head)
                cache.update(state, state, layer)
        return cache

    def _read(self, ids: Tensor, shift: Tensor | None, cache: DynamicCache) -> Tensor:
        """Hidden states (b, l, width) of tokens that follow what `cache` holds; it then holds them too."""
        embeds = self.decoder.wte(ids)
        if shift is not None:
            embeds = embeds + shift
        return self.decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return self.decoder.wte(hidden)

    def _check_ids(self, name: str, ids: Tensor, vocab_size: int, longest: int) -> None:
        if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] < 1:
            raise ValueError(
                f"`{name}` is {ids.dtype} of shape {tuple(ids.shape)}: expected integers of shape (sentences, tokens)."
            )
        if ids.shape[1] > longest:
            raise ValueError(
                f"`{name}` holds {ids.shape[1]} tokens a sentence, this model reads at most {longest}: cut the "
                "sentences."
            )
        # elsewhere the check would wait for the device, or break the graph
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= vocab_size:
                raise ValueError(
                    f"`{name}` goes from {low} to {high}, the vocabulary from 0 to {vocab_size - 1}: use the "
                    "tokenizer that the model was trained with."
                )

    def _check_latents(self, latents: Tensor) -> None:
        width = self.config["latent_dim"]
        if latents.ndim != 2 or latents.shape[1] != width or not latents.is_floating_point():
            raise ValueError(
                f"`latents` is {latents.dtype} of shape {tuple(latents.shape)}: expected floating-point numbers of "
                f"shape (sentences, {width})."
            )

    def _check_decoding(
        self,
        batch: int,
        max_length: int,
        temperature: float,
        top_k: int,
        top_p: float,
        generator: Generator | Sequence[Generator] | None,
    ) -> None:
        if not 2 <= max_length <= self.longest_sentence:
            raise ValueError(
                f"`max_length` is {max_length}: it must lie between 2 (<BOS> and <EOS>) and {self.longest_sentence}."
            )
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` is {temperature}: it must be > 0 (do_sample=False is its limit at 0).")
        _check_filters(top_k, top_p)
        if isinstance(generator, Sequence) and len(generator) != batch:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but there are {batch} latents: one for each."
            )


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (..., v) with -inf for all tokens but the most probable ones.

    Args:
        top_k: keep so many (and what equals the last of them); 0 keeps all.
        top_p: keep the smallest number of tokens whose probabilities add up to more than `top_p`.

    Raises:
        ValueError: for an option out of its range.
    """
    _check_filters(top_k, top_p)
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    ranked, order = logits.sort(dim=-1, descending=True)
    reached = ranked.softmax(dim=-1).cumsum(dim=-1) > top_p
    # the token with which the sum passes `top_p` stays
    beyond = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], dim=-1)
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -math.inf)


def _draw(probabilities: Tensor, is_open: Tensor, generator: Generator | Sequence[Generator] | None) -> Tensor:
    """One token (b,) from each row of probabilities (b, v); rows that are finished take no draw from their own
    generator."""
    if not isinstance(generator, Sequence):
        device = probabilities.device if generator is None else generator.device
        drawn = torch.multinomial(probabilities.to(device), 1, generator=generator)
        return drawn[:, 0].to(probabilities.device)
    chosen = torch.zeros(len(probabilities), dtype=torch.long)
    for row, going_on in enumerate(is_open.tolist()):
        if going_on:
            own = generator[row]
            chosen[row] = int(torch.multinomial(probabilities[row].to(own.device), 1, generator=own))
    return chosen.to(probabilities.device)


def _check_filters(top_k: int, top_p: float) -> None:
    if top_k < 0:
        raise ValueError(f"`top_k` is {top_k}: it must be 0 (all tokens) or more.")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` is {top_p}: it must lie in (0, 1]; 1 keeps all tokens.")


def _check_heads(part: str, width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ValueError(
            f"`{part}_num_attention_heads` is {heads}, but `{part}_hidden_size` is {width}: it must be a multiple."
        )


def _check_special(part: str, vocab_size: int, **ids: int) -> None:
    for name, value in ids.items():
        if not 0 <= value < vocab_size:
            raise ValueError(
                f"`{name}` is {value}, but `{part}_vocab_size` is {vocab_size}: it must lie between 0 and "
                f"{vocab_size - 1}."
            )

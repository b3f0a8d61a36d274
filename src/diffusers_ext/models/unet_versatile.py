"""The multi-flow U-Net of Versatile Diffusion: one network for every (data type) <- (context type).

Paper: Xu, Wang, Zhang, Wang, Shi, "Versatile Diffusion: Text, Images and Variations All in One Diffusion Model",
arXiv 2211.08332 (ICCV 2023). Original: SHI-Labs/Versatile-Diffusion@cf0f4a2 (code MIT; weights: see the model page).

Three kinds of layer groups: global (the time embedding), data (one list of layers per type that is generated) and
context (one list of transformers per type of condition). All lists follow one walk, so that any data list runs with
any context list; which ones, each call says. Residual blocks and transformers of pictures are diffusers' own.

Differences from the original: types are a matter of configuration; the time embedding belongs to no data type, so
that vectors may have several contexts as well; choices of layer mixing are passed in; groups that no flow needs are
left out on demand. The layers and the walk, which the converter needs too, are in `blocks/versatile.py`.

Letters in shape comments: b samples, c channels, h x w the latent grid, l context tokens, d their width.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from .blocks.versatile import build_context_layer, build_data_layer, versatile_walk, zero_last_layers

DATA_KINDS = {"map": {"channels"}, "vector": {"channels", "positions"}}  # kind -> the sizes that it needs
DATA_TYPES = {
    "image": {"kind": "map", "channels": 4},
    "text": {"kind": "vector", "channels": 768, "positions": 4},
}
CONTEXT_TYPES = {"image": 768, "text": 768}


def flow_name(context_type: str, data_type: str) -> str:
    """What makes `data_type` from `context_type`, e.g. "text-to-image"."""
    return f"{context_type}-to-{data_type}"


class VersatileUNet(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    """Predicts the noise of latents of any data type under any mixture of contexts (Versatile Diffusion).

    Args:
        data_types: what is generated, by name: `{"kind": "map", "channels": c}` for latents (b, c, h, w), or
            `{"kind": "vector", "channels": d, "positions": s}` for latents (b, d), which the network treats as s
            tokens. Default: the paper's images (4 channels) and texts (768, 4 positions).
        context_types: what it is generated from: the width of the context tokens, by name. Default: both 768.
        block_out_channels: width of each level, finest first; multiples of `norm_num_groups` and of
            `num_attention_heads`.
        layers_per_block: residual blocks of each level on the way down; the way up has one more.
        attention_levels: which levels have context layers; the middle always has one. Default: all but the last.
        num_attention_heads: heads of every attention.
        norm_num_groups: groups of every normalisation.
        dropout: in residual blocks and transformers.
        flows: names such as "text-to-image" of the flows whose layers are built; None: all.
        sample_size: side or (height, width) of the latents it was trained on, which pipelines sample by default.

    Raises:
        ValueError: for sizes that do not fit each other, type names that are no identifiers, unknown flows.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "FCResBlock", "BasicTransformerBlock"]
    _repeated_blocks = ["FCResBlock", "BasicTransformerBlock"]  # not residual blocks, nearly all of different shapes
    _skip_layerwise_casting_patterns = ["norm", "time_embedding"]
    _keys_to_ignore_on_load_unexpected = [r"^(data|context)_layers\."]  # groups that the asked-for flows do not need

    _gradient_checkpointing_func: Callable[..., Tensor]  # set by `enable_gradient_checkpointing`

    @register_to_config
    def __init__(
        self,
        data_types: dict[str, dict[str, Any]] | None = None,
        context_types: dict[str, int] | None = None,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int | tuple[int, ...] = 2,
        attention_levels: tuple[bool, ...] | None = None,
        num_attention_heads: int = 8,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
        flows: list[str] | tuple[str, ...] | None = None,
        sample_size: int | tuple[int, int] | None = None,
    ):
        super().__init__()
        num_levels = len(block_out_channels)
        data_types = DATA_TYPES if data_types is None else data_types
        self._data_types = {name: dict(sizes) for name, sizes in data_types.items()}
        self._context_types = dict(CONTEXT_TYPES if context_types is None else context_types)
        layers = (layers_per_block,) * num_levels if isinstance(layers_per_block, int) else tuple(layers_per_block)
        if attention_levels is None:
            attention_levels = tuple(level < num_levels - 1 for level in range(num_levels))
        _check_types(self._data_types, self._context_types)
        _check_sizes(block_out_channels, layers, attention_levels, num_attention_heads, norm_num_groups)
        self.walk = versatile_walk(block_out_channels, layers, attention_levels)
        self.downsample_factor = 2 ** (num_levels - 1)
        self.num_context_layers = sum(step.op == "context" for step in self.walk)
        self.gradient_checkpointing = False

        self.time_proj = Timesteps(block_out_channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(block_out_channels[0], 4 * block_out_channels[0])
        self.data_layers, self.context_layers = nn.ModuleDict(), nn.ModuleDict()
        self.register_to_config(
            data_types=self._data_types, context_types=self._context_types, attention_levels=attention_levels
        )
        self._build_groups(
            _groups_of(self.known_flows if flows is None else flows, self._data_types, self._context_types)
        )

    @classmethod
    def from_pretrained(  # type: ignore[override] # a named argument among the parent's keywords
        cls, pretrained_model_name_or_path: Any, flows: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """diffusers' `from_pretrained`, which reads only the layer groups that `flows` need.

        Args:
            flows: names such as "text-to-image"; None: all that are stored. All pairs of the loaded types can be run.

        Raises:
            ValueError: for flows that the network does not know or whose layers were not stored; lists those it has.
        """
        if flows is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config: dict[str, Any] = cls.load_config(pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs)[0]
        types = config.get("data_types") or DATA_TYPES, config.get("context_types") or CONTEXT_TYPES
        stored = config.get("flows") or list(_flow_pairs(*types))
        stored_groups = _groups_of(stored, *types)
        missing = [".".join(group) for group in _groups_of(flows, *types) if group not in stored_groups]
        if missing:
            raise ValueError(
                f"`flows` is {list(flows)}: {str(pretrained_model_name_or_path)!r} was saved without the layer groups "
                f"{', '.join(missing)}. It holds the flows {', '.join(stored)}."
            )
        return super().from_pretrained(pretrained_model_name_or_path, flows=list(flows), **kwargs)

    @property
    def known_flows(self) -> list[str]:
        """All pairs of the configured types, loaded or not."""
        return list(_flow_pairs(self._data_types, self._context_types))

    @property
    def flows(self) -> list[str]:
        """The flows that can be run: those whose layers are here."""
        return [flow_name(context, data) for data in self.data_layers for context in self.context_layers]

    def layer_groups(self) -> dict[str, nn.Module]:
        """The groups that are here by name ("global", "data.image", "context.text" ...); they share no parameters."""
        groups: dict[str, nn.Module] = {"global": self.time_embedding}
        groups |= {f"data.{name}": layers for name, layers in self.data_layers.items()}
        return groups | {f"context.{name}": layers for name, layers in self.context_layers.items()}

    def add_flows(self, flows: Sequence[str], *, contexts_like: str | None = None) -> None:
        """Adds the layer groups that further flows need, to go on training with them (section 4 of the paper).

        Args:
            flows: names such as "image-to-text"; what is there already stays as it is.
            contexts_like: new context groups start as a copy of this one, where the widths of the tokens agree;
                otherwise, and without it, they start anew like new data groups.
        """
        groups = _groups_of(flows, self._data_types, self._context_types)
        missing = [(kind, name) for kind, name in groups if name not in self._held(kind)]
        if contexts_like is not None and contexts_like not in self.context_layers:
            raise ValueError(
                f"`contexts_like` is {contexts_like!r}; loaded contexts are {', '.join(self.context_layers)}."
            )
        self._build_groups(missing)
        for kind, name in missing:
            new = self._held(kind)[name].to(device=self.device, dtype=self.dtype).train(self.training)
            if contexts_like is not None and kind == "context":
                if self._context_types[name] == self._context_types[contexts_like]:
                    new.load_state_dict(self.context_layers[contexts_like].state_dict())

    def draw_layer_choices(
        self, context_ratios: Sequence[float], *, generator: torch.Generator | None = None
    ) -> list[int]:
        """For layer mixing: one context a context layer, drawn with the given ratios.

        Args:
            context_ratios: one a context, not negative, with a positive sum.
            generator: of the draws; they are made on its device.
        """
        ratios = torch.tensor(_normalised(context_ratios, len(context_ratios)), dtype=torch.float64)
        if generator is not None and generator.device.type != "cpu":
            ratios = ratios.float().to(generator.device)  # not all devices know float64
        return torch.multinomial(ratios, self.num_context_layers, replacement=True, generator=generator).tolist()

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | Sequence[Tensor],
        *,
        data_type: str = "image",
        context_type: str | Sequence[str] = "text",
        context_ratios: Sequence[float] | None = None,
        layer_choices: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predicts the noise in `sample`.

        Args:
            sample: noisy latents of `data_type`: (b, d), or (b, c, h, w) with h and w multiples of
                `downsample_factor`.
            timestep: 0..999, a number, (), (1,) or (b,).
            encoder_hidden_states: context tokens (b, l, d), or several contexts, of which each may have its own l.
            data_type: what to generate.
            context_type: the type of each context; one type may occur several times.
            context_ratios: weight of each context in every context layer, divided by their sum; None: equal weights.
            layer_choices: the context that each context layer uses alone, as `draw_layer_choices` draws them, in
                place of the weighted sum; or a list of such choices, one a sample.
            return_dict: whether to return a `UNet2DConditionOutput` instead of a tuple.

        Returns:
            The noise, in the shape of `sample`.

        Raises:
            ValueError: for types that are unknown or whose layers were not loaded, shapes that do not fit, ratios
                that are negative or sum to zero.
        """
        types = [context_type] if isinstance(context_type, str) else list(context_type)
        contexts = [encoder_hidden_states] if isinstance(encoder_hidden_states, Tensor) else encoder_hidden_states
        self._check_inputs(sample, data_type, contexts, types)
        ratios = _normalised(context_ratios, len(types))
        choices = None if layer_choices is None else self._check_choices(layer_choices, len(types), len(sample))
        timestep = _as_vector(timestep, sample)

        # in float32: half precision cannot tell neighbouring phases of up to 1000 apart
        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        parts = [(t, c.to(sample.dtype), r) for t, c, r in zip(types, contexts, ratios, strict=True)]
        hidden_states = sample
        skips: list[Tensor] = []
        data_layers = iter(self.data_layers[data_type])  # type: ignore[arg-type]
        context_index = 0
        for step in self.walk:
            if step.op == "save":
                skips.append(hidden_states)
            elif step.op == "load":
                hidden_states = torch.cat([hidden_states, skips.pop()], dim=1)
            elif step.op == "context":
                if choices is None:
                    hidden_states = self._apply_contexts(context_index, hidden_states, parts)
                else:
                    chosen = [choice[context_index] for choice in choices]
                    hidden_states = self._apply_chosen(context_index, hidden_states, parts, chosen)
                context_index += 1
            elif step.op != "res":
                hidden_states = next(data_layers)(hidden_states)
            elif torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(next(data_layers), hidden_states, temb)
            else:
                hidden_states = next(data_layers)(hidden_states, temb)
        if not return_dict:
            return (hidden_states,)
        return UNet2DConditionOutput(sample=hidden_states)

    def _apply_contexts(self, index: int, hidden_states: Tensor, parts: Sequence[tuple[str, Tensor, float]]) -> Tensor:
        """Sum over contexts i of r_i * Block_i(h, c_i); a block holds its residual, and the r_i sum to 1."""
        mixed: Tensor | None = None
        for context_type, context, ratio in parts:
            if ratio == 0:
                continue
            layer = self.context_layers[context_type][index]  # type: ignore[index]
            out = layer(hidden_states, encoder_hidden_states=context, return_dict=False)[0]
            out = out if ratio == 1 else ratio * out
            mixed = out if mixed is None else mixed + out
        assert mixed is not None  # the ratios sum to 1
        return mixed

    def _apply_chosen(
        self, index: int, hidden_states: Tensor, parts: Sequence[tuple[str, Tensor, float]], chosen: Sequence[int]
    ) -> Tensor:
        """Block_i(h, c_i) with one i for all samples, or one a sample."""
        if len(set(chosen)) == 1:
            return self._apply_contexts(index, hidden_states, [(*parts[chosen[0]][:2], 1.0)])
        out = torch.empty_like(hidden_states)
        for choice in sorted(set(chosen)):
            rows = [row for row, own in enumerate(chosen) if own == choice]
            part = [(parts[choice][0], parts[choice][1][rows], 1.0)]
            out[rows] = self._apply_contexts(index, hidden_states[rows], part)
        return out

    def _held(self, kind: str) -> nn.ModuleDict:
        return self.data_layers if kind == "data" else self.context_layers

    def _build_groups(self, groups: Sequence[tuple[str, str]]) -> None:
        """Builds layer groups, with every residual branch at zero, and records which flows are here."""
        config = self.config
        sizes = {"groups": config["norm_num_groups"], "dropout": config["dropout"]}
        heads, temb_channels = config["num_attention_heads"], 4 * config["block_out_channels"][0]
        for kind, name in groups:
            if kind == "context":
                steps = [step for step in self.walk if step.op == "context"]
                width = self._context_types[name]
                layers = [build_context_layer(step, width, num_heads=heads, **sizes) for step in steps]
            else:
                steps = [step for step in self.walk if step.op not in ("context", "save", "load")]
                latents = self._data_types[name]
                layers = [build_data_layer(step, latents, temb_channels=temb_channels, **sizes) for step in steps]
            self._held(kind)[name] = zero_last_layers(nn.ModuleList(layers))
        everything = len(self.flows) == len(self.known_flows)
        self.register_to_config(flows=None if everything else self.flows)

    def _check_inputs(
        self, sample: Tensor, data_type: str, contexts: Sequence[Tensor], context_types: Sequence[str]
    ) -> None:
        if not context_types:
            raise ValueError(f"`context_type` is empty: pass at least one of {', '.join(self._context_types)}.")
        for argument, name, known in [
            ("data_type", data_type, self._data_types),
            *(("context_type", name, self._context_types) for name in context_types),
        ]:
            if name not in known:
                raise ValueError(f"`{argument}` is {name!r}; this network knows {', '.join(known)}.")
        wanted = [flow_name(context, data_type) for context in context_types]
        missing = [flow for flow in wanted if flow not in self.flows]
        if missing:
            raise ValueError(
                f"The layers of {', '.join(missing)} were not loaded; loaded flows are {', '.join(self.flows)}. Load "
                f"with `VersatileUNet.from_pretrained(..., flows={wanted})`, or without `flows` to have all."
            )
        sizes, factor = self._data_types[data_type], self.downsample_factor
        is_map = sizes["kind"] == "map"
        fits = sample.ndim == (4 if is_map else 2) and sample.shape[1] == sizes["channels"]
        if not fits or any(side % factor or side == 0 for side in sample.shape[2:]):
            wanted = f"(b, {sizes['channels']}{', h, w) with h and w multiples of ' + str(factor) if is_map else ')'}"
            raise ValueError(f"`sample` has shape {tuple(sample.shape)}; {data_type} latents are {wanted}.")
        if len(contexts) != len(context_types):
            raise ValueError(
                f"`encoder_hidden_states` holds {len(contexts)} contexts and `context_type` {len(context_types)} "
                "types: pass one type a context."
            )
        for context, name in zip(contexts, context_types, strict=True):
            width = self._context_types[name]
            if context.ndim != 3 or context.shape[::2] != (sample.shape[0], width) or context.shape[1] == 0:
                raise ValueError(
                    f"`encoder_hidden_states` holds a context of shape {tuple(context.shape)}; for {name} and "
                    f"{sample.shape[0]} samples it is ({sample.shape[0]}, tokens, {width}), with at least one token."
                )

    def _check_choices(
        self, layer_choices: Sequence[int] | Sequence[Sequence[int]], count: int, batch: int
    ) -> list[list[int]]:
        """One list of choices for all samples, or one a sample."""
        of_all = all(isinstance(choice, int) for choice in layer_choices)
        rows: list[Any] = [list(layer_choices)] if of_all else [list(choices) for choices in layer_choices]  # type: ignore[arg-type]
        fits = len(rows) in (1, batch) and all(len(row) == self.num_context_layers for row in rows)
        if not fits or any(not 0 <= choice < count for row in rows for choice in row):
            raise ValueError(
                f"`layer_choices` is {list(layer_choices)}: pass {self.num_context_layers} indices below {count}, one "
                "for each context layer, as `draw_layer_choices` does, or a list of such lists, one for each of "
                f"{batch} samples."
            )
        return rows


def _flow_pairs(data_types: Iterable[str], context_types: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Every flow as name -> (data type, context type)."""
    contexts = list(context_types)
    return {flow_name(context, data): (data, context) for data in data_types for context in contexts}


def _groups_of(flows: Sequence[str], data_types: Iterable[str], context_types: Iterable[str]) -> list[tuple[str, str]]:
    """The groups ("data" or "context", type) that flows need, in the order of the configuration."""
    known = _flow_pairs(data_types, context_types)
    unknown = [] if isinstance(flows, str) else [flow for flow in flows if flow not in known]
    if isinstance(flows, str) or unknown or not flows:
        found = f", of which {', '.join(map(repr, unknown))} is unknown" if unknown else ""
        raise ValueError(f"`flows` is {flows!r}{found}. Pass a list of at least one of {', '.join(known)}.")
    data, contexts = ({known[flow][k] for flow in flows} for k in (0, 1))
    groups = [("data", name) for name in data_types if name in data]
    return groups + [("context", name) for name in context_types if name in contexts]


def _normalised(ratios: Sequence[float] | None, count: int) -> list[float]:
    """Weights of `count` contexts that sum to 1."""
    values = [1.0] * count if ratios is None else [float(ratio) for ratio in ratios]
    # compared: `math.isfinite` breaks the graph of `torch.compile` where it holds a number symbolically
    if len(values) != count or not all(0 <= value < math.inf for value in values) or sum(values) == 0:
        raise ValueError(
            f"`context_ratios` is {values}: pass {count} finite numbers of at least 0, one a context, not all of them "
            "0."
        )
    return [value / sum(values) for value in values]


def _as_vector(timestep: Tensor | float | int, sample: Tensor) -> Tensor:
    batch = sample.shape[0]
    if not isinstance(timestep, Tensor):
        timestep = torch.tensor([timestep], dtype=torch.float32, device=sample.device)
    if timestep.ndim > 1 or timestep.numel() not in (1, batch):
        raise ValueError(
            f"`timestep` has shape {tuple(timestep.shape)}: pass a number or shape (), (1,) or ({batch},) for {batch} "
            "samples."
        )
    return timestep.to(sample.device).reshape(-1).expand(batch)


def _check_types(data_types: Mapping[str, Mapping[str, Any]], context_types: Mapping[str, int]) -> None:
    for argument, types in (("data_types", data_types), ("context_types", context_types)):
        odd = [name for name in types if not name.isidentifier() or hasattr(nn.ModuleDict, name)]
        if odd or not types:
            raise ValueError(
                f"`{argument}` has the names {list(types)}: give at least one, plain words ({odd} is not)."
            )
    for name, sizes in data_types.items():
        needed = DATA_KINDS.get(sizes.get("kind", ""))
        if needed is None or sizes.keys() - {"kind"} != needed or any(sizes[size] < 1 for size in needed):
            forms = "; ".join(f"kind {kind!r} with {' and '.join(sorted(s))}" for kind, s in DATA_KINDS.items())
            raise ValueError(f"`data_types` describes {name} as {dict(sizes)}: allowed are {forms}, all at least 1.")
    if any(width < 1 for width in context_types.values()):
        raise ValueError(f"`context_types` is {dict(context_types)}: widths of context tokens are at least 1.")


def _check_sizes(
    widths: Sequence[int], layers: Sequence[int], attention_levels: Sequence[bool], heads: int, groups: int
) -> None:
    if not widths or not len(widths) == len(layers) == len(attention_levels) or min(layers) < 1:
        raise ValueError(
            f"`block_out_channels` is {tuple(widths)}, `layers_per_block` {tuple(layers)} and `attention_levels` "
            f"{tuple(attention_levels)}: give each level one entry in all three, and at least one layer."
        )
    wrong = [width for width in widths if groups < 1 or heads < 1 or width < 2 or width % groups or width % heads]
    if wrong:
        raise ValueError(
            f"`block_out_channels` is {tuple(widths)}: {wrong} are no multiples of both `norm_num_groups` ({groups}) "
            f"and `num_attention_heads` ({heads})."
        )

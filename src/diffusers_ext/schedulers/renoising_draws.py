"""The random numbers of Paella's scheduler: from one generator, from one an image, or passed in for a replay.

Letters in shape comments: b images, v token classes, (h, w) the token grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Generators = Generator | Sequence[Generator] | None


@dataclass(frozen=True)
class RenoisingDraws:
    """Random numbers of one step that are passed in, for a replay. What is None is drawn.

    Attributes:
        gumbel_uniforms: (b*h*w, v) in [0, 1), for `sampling="gumbel"`.
        exponentials: (b*h*w, v) of Exp(1), for `sampling="multinomial"`.
        cdf_uniforms: (b*h*w, 2) in [0, 1), for `sampling="multinomial"`.
        renoise_uniforms: (b, h, w) in [0, 1), which choose the positions.
        renoise_mask: (b, h, w), 1 where a token is renoised. `renoise_uniforms` are then not drawn.
        renoise_tokens: LongTensor (b, h, w), random tokens for `renoise_mode="rand"`.
    """

    gumbel_uniforms: Tensor | None = None
    exponentials: Tensor | None = None
    cdf_uniforms: Tensor | None = None
    renoise_uniforms: Tensor | None = None
    renoise_mask: Tensor | None = None
    renoise_tokens: Tensor | None = None

    def of_tokens(self, sampling: str, logits: Tensor, generator: Generators = None) -> tuple[str, Tensor | None]:
        """How `sample_tokens` is to draw from logits (b, v, h, w), and its draws as rows (b*h*w, ...)."""
        b, v, h, w = logits.shape
        forms = {  # name of the draw -> how it is used, its width
            "gumbel": {"gumbel_uniforms": ("gumbel", v)},
            "multinomial": {"exponentials": ("race", v), "cdf_uniforms": ("inverse_cdf", 2)},
            "argmax": {},
        }[sampling]
        names = ("gumbel_uniforms", "exponentials", "cdf_uniforms")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if len(given) > 1 or not given.keys() <= forms.keys():
            raise ValueError(
                f"the injected draws {', '.join(f'`{name}`' for name in given)} do not fit sampling={sampling!r},"
                f" which takes {' or '.join(f'`{name}`' for name in forms) or 'none'}."
            )
        if not forms:
            return "argmax", None
        name = next(iter(given), list(forms)[-1])
        how, width = forms[name]
        if given:
            return how, fitting_draw(name, given[name], (b * h * w, width), logits.device)
        return how, draw(torch.rand, (b, h * w, width), generator, logits.device).flatten(0, 1)


def draw(
    distribution: Callable[..., Tensor], shape: Sequence[int], generator: Generators, device: torch.device
) -> Tensor:
    """Random numbers of a shape (b, ...), drawn on the generator's device; each image from its own of a list.

    Raises:
        ValueError: for a list of another length than b, or of anything but generators.
    """
    if generator is None:
        return distribution(tuple(shape), device=device)
    if isinstance(generator, Generator):
        return distribution(tuple(shape), generator=generator, device=generator.device).to(device)
    if len(generator) != shape[0] or not all(isinstance(one, Generator) for one in generator):
        raise ValueError(
            f"`generator` must be one torch.Generator, or one per image: got {len(generator)} entries for a batch of "
            f"{shape[0]}."
        )
    images = [distribution(tuple(shape[1:]), generator=one, device=one.device).to(device) for one in generator]
    return torch.stack(images)


def fitting_draw(name: str, given: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """A draw that is passed in, as float32 where it is needed.

    Raises:
        ValueError: for another shape.
    """
    if given.shape != tuple(shape):
        raise ValueError(f"the injected `{name}` has shape {tuple(given.shape)}, expected {tuple(shape)}.")
    return given.to(device=device, dtype=torch.float32)

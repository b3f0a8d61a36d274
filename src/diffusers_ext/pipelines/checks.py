"""Checks of what users hand to a pipeline: each raises before any model runs, and its message names the way out.

What is common to several pipelines stands here; what concerns one pipeline's components stands with that pipeline.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..schedulers.gaussian import WAY_OUT, scheduler_attribute, scheduler_setting

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_parts(pipe: Any, what: str, *names: str) -> None:
    """The components are there that `what` needs; for properties too, since diffusers swallows an `AttributeError`."""
    missing = [name for name in names if getattr(pipe, name) is None]
    if missing:
        raise ValueError(
            f"The pipeline was built without {', '.join(missing)}; {what} needs {'them' if missing[1:] else 'it'}."
            f" Pass `{missing[0]}=...` to `from_pretrained` or to the constructor."
        )


def check_integer(name: str, value: Any, minimum: int | None = None) -> None:
    """An integer (of Python or numpy, but no bool), at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer, received {value!r}.")
    if minimum is not None and value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, received {value}.")


def check_guidance_scale(guidance_scale: Any) -> None:
    """A finite number, at least 0."""
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, numbers.Real):
        raise TypeError(f"`guidance_scale` must be a number, received {guidance_scale!r}.")
    if not math.isfinite(guidance_scale) or guidance_scale < 0:
        raise ValueError(
            f"`guidance_scale` must be finite and at least 0, received {guidance_scale}: 0 ignores the prompt, 1 is"
            " the plain conditional prediction, larger values follow the prompt more closely."
        )


def check_output_type(output_type: Any) -> None:
    """One of `OUTPUT_TYPES`."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}; received {output_type!r}.")


def check_choice(name: str, value: Any, allowed: Sequence[str], *, or_none: bool = False) -> None:
    """One of the allowed words, or None where that is allowed too."""
    if (or_none and value is None) or value in allowed:
        return
    listed = ", ".join(map(repr, allowed)) + (" or None" if or_none else "")
    raise ValueError(f"`{name}` is {value!r}; allowed are {listed}.")


def check_temperature(
    temperature: Any, name: str = "temperature", meaning: str = "0 takes the most probable words, 1 draws them"
) -> None:
    """A finite number, at least 0.

    Args:
        meaning: What the values do, for the message.
    """
    if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
        raise TypeError(f"`{name}` must be a number, received {temperature!r}.")
    if not 0 <= float(temperature) < math.inf:
        raise ValueError(f"`{name}` is {temperature}, it must be finite and at least 0: {meaning}.")


def check_callback_tensors(names: Sequence[str] | None, allowed: Sequence[str]) -> None:
    """Names of tensors that the pipeline offers to callbacks."""
    if names is not None and (isinstance(names, str) or not isinstance(names, Sequence)):
        raise TypeError(
            "`callback_on_step_end_tensor_inputs` must be a list of names, received"
            f" {names!r}; allowed are {list(allowed)}."
        )
    unknown = sorted(set(names or ()) - set(allowed))
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` holds {unknown}; allowed are {list(allowed)}.")


def check_side(name: str, value: Any, multiple: int, smallest: int, *, because: str) -> None:
    """A side in pixels that the networks take; otherwise the message gives the nearest ones that they do.

    Args:
        multiple, smallest: Valid are the multiples of the one, from the other on.
        because: What makes the multiple, for the message.
    """
    check_integer(name, value)
    if value >= smallest and value % multiple == 0:
        return
    nearest = sorted({max(round_ * multiple, smallest) for round_ in (value // multiple, -(-value // multiple))})
    raise ValueError(
        f"`{name}` must be a multiple of {multiple} pixels ({because}) and at least {smallest}; received {value},"
        f" nearest valid: {' or '.join(map(str, nearest))}."
    )


def check_generator(generator: Any, batch_size: int, device: torch.device) -> None:
    """None, one generator, or a list with one an image; on the CPU or where the pipeline runs."""
    if generator is None:
        return
    several = isinstance(generator, (list, tuple))
    for one in generator if several else [generator]:
        if not isinstance(one, torch.Generator):
            raise TypeError(
                "`generator` must be a torch.Generator or a list of them, received"
                f" {type(one).__name__}{' in the list' if several else ''}."
            )
        if one.device.type not in ("cpu", device.type):
            raise ValueError(
                f"`generator` is on {one.device}, the pipeline runs on {device}; use a generator on the CPU or there."
            )
    if several and len(generator) != batch_size:
        raise ValueError(
            f"`generator` is a list of {len(generator)}, but {batch_size} images are asked for (prompts x"
            " `num_images_per_prompt`); pass one generator an image."
        )


def as_generators(generator: Any) -> Any:
    """Several generators as a list, which is all that `randn_tensor` of diffusers and its schedulers take."""
    return list(generator) if isinstance(generator, tuple) else generator


def check_predictions(finite: Sequence[Tensor], timesteps: Tensor, pipe: Any) -> None:
    """No step's prediction held NaN or infinity.

    Args:
        finite: One bool () a step, on the device; read here, after the loop, so that no step waits for the device.
        timesteps: Those of the steps.
    """
    flags = torch.stack(list(finite)).tolist() if len(finite) else []
    if all(flags):
        return
    index = flags.index(False)
    raise ValueError(
        f"The network's prediction is not finite (NaN or infinite) from step index {index} on (timestep"
        f" {float(timesteps[index]):g}): the result would be black or noise. {_advice(pipe)}"
    )


def check_decoded(values: Tensor, what: str, pipe: Any) -> None:
    """What a decoder made of finite latents is finite."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"The decoder made {what} that are not finite (NaN or infinite). {_advice(pipe)}")


def _advice(pipe: Any) -> str:
    kinds = sorted({str(part.dtype) for part in pipe.components.values() if hasattr(part, "dtype")})
    listed = "; ".join([*filter(None, [", ".join(kinds)]), ""])  # a cascade's stages may be out of memory again
    return (
        f"Check the components' dtype ({listed}float16 may overflow: try bfloat16 or float32), their"
        " weights and the guidance scale."
    )


def as_texts(name: str, texts: Any) -> list[str]:
    """Texts as a list; a single one becomes a list of one. The empty text passes, the empty list does not."""
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, (list, tuple)):
        raise TypeError(f"`{name}` must be a string or a list of strings, received {type(texts).__name__}.")
    if len(texts) == 0:
        raise ValueError(f"`{name}` is an empty list; pass at least one text.")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"`{name}` must hold strings, received {type(text).__name__}: {text!r}.")
    return list(texts)


def check_fraction(name: str, value: Any, meaning: str) -> None:
    """A number from 0 to 1.

    Args:
        meaning: What the two ends do, for the message.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, received {value!r}.")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"`{name}` must lie in [0, 1], received {value}: {meaning}.")


def check_steps(scheduler: Any, num_inference_steps: Any, name: str = "num_inference_steps") -> None:
    """A number of steps that the scheduler's training steps allow for."""
    check_integer(name, num_inference_steps, 1)
    last = int(scheduler_setting(scheduler, "num_train_timesteps"))
    if num_inference_steps > last:
        raise ValueError(
            f"`{name}` must be at most {last}, the steps of the training; received {num_inference_steps}."
        )
    begins_with_prk = not scheduler_setting(scheduler, "skip_prk_steps", True)
    fewest = scheduler_attribute(scheduler, "pndm_order", 1) if begins_with_prk else 1
    if num_inference_steps < fewest:
        raise ValueError(
            f"`{name}` must be at least {fewest} with {type(scheduler).__name__}, which begins with Runge-Kutta steps;"
            f" received {num_inference_steps}. Use more steps, or `skip_prk_steps=True`."
        )


def check_timesteps(scheduler: Any, num_inference_steps: int, name: str = "num_inference_steps") -> None:
    """What a scheduler made of the steps leads from noise to a picture, and lies within the training.

    The spacing "leading" with an offset may leave the training.
    """
    timesteps: Tensor = scheduler.timesteps
    if not bool(torch.isfinite(timesteps).all()):
        raise ValueError(
            f"`{name}`={num_inference_steps} makes {type(scheduler).__name__} run timesteps that are no numbers: it"
            f" does not bear the betas of the checkpoint in so few steps. {WAY_OUT}"
        )
    if len(timesteps) > 1 and float(timesteps[0]) < float(timesteps[-1]):
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__}, which goes from timestep {float(timesteps[0]):g} up to"
            f" {float(timesteps[-1]):g}: it makes noise of a picture. {WAY_OUT}"
        )
    highest, last = float(timesteps.max()), int(scheduler_setting(scheduler, "num_train_timesteps")) - 1
    if highest > last:
        raise ValueError(
            f"`{name}`={num_inference_steps} makes {type(scheduler).__name__} start at timestep"
            f" {highest:g}, the last one of the training is {last}. Use fewer steps, or a scheduler with"
            " steps_offset=0."
        )


def check_noise(latents: Any, shape: tuple[int, ...], name: str = "latents") -> None:
    """Latents in place of the initial draw: floating point, of the wanted shape, finite."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise TypeError(f"`{name}` must be a floating-point tensor of standard normal noise, received {kind}.")
    if tuple(latents.shape) != shape:
        raise ValueError(
            f"`{name}` must have shape {shape} (images, channels, height and width of the latents), received"
            f" {tuple(latents.shape)}."
        )
    if not bool(torch.isfinite(latents).all()):
        raise ValueError(f"`{name}` holds values that are not finite.")


def sample_sides(name: str, value: Any) -> tuple[int, int]:
    """Rows and columns of a size that is one side or a pair, also as a config holds pairs.

    Raises:
        ValueError: For anything but one or two positive integers.
    """
    sides: Any = value if isinstance(value, (list, tuple)) else (value, value)
    if isinstance(value, Mapping):  # {"height": 16, "width": 24}, or {"0": 16, "1": 24} of a `model_index.json`
        sides = [value.get(key) for key in (("height", "width") if "height" in value else ("0", "1"))]
    whole = [isinstance(side, numbers.Integral) and not isinstance(side, bool) and int(side) > 0 for side in sides]
    if whole != [True, True]:
        raise ValueError(f"`{name}` must be one side or (height, width), positive integers; received {value!r}.")
    return int(sides[0]), int(sides[1])


def check_pair(name: str, value: Any) -> tuple[int, int]:
    """One number of pixels for both sides or (height, width), as a pair."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(values) != 2:
        raise ValueError(f"`{name}` must be one number of pixels or (height, width), received {value!r}.")
    for number in values:
        check_integer(name, number, 1)
    return values


def check_one_or_each(name: str, count: int, num: int, what: str) -> None:
    """One for all, or one each."""
    if count not in (1, num):
        raise ValueError(f"`{name}` holds {count} for {num} {what}; pass one for all of them or one each.")


def check_mask(mask: Tensor, images: Tensor) -> None:
    """A mask of the images' size that is not black everywhere.

    Args:
        mask: bool (b, H, W).
        images: (n, 3, H, W).
    """
    rows, columns = images.shape[-2:]
    if tuple(mask.shape[1:]) != (rows, columns):
        raise ValueError(
            f"`mask_image` is {mask.shape[2]}x{mask.shape[1]} pixels, `image` is {columns}x{rows}. Resize it without"
            f" smoothing: `mask.resize(({columns}, {rows}), Image.Resampling.NEAREST)`."
        )
    if not bool(mask.flatten(1).any(dim=1).all()):
        raise ValueError(
            "There is nothing to draw: `mask_image` is black (0, keep) everywhere. Paint white what is to be filled."
        )

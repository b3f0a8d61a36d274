"""What the model card of a result says."""

from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline
from diffusers_ext.pipelines.paella.pipeline_paella_image_variation import PaellaImageVariationPipeline
from diffusers_ext.training.paella.args import PaellaArgs

CONDITIONS = {
    "text": "captions", "image": "their CLIP vectors", "class": "class labels", "semantic": "label maps",
}  # fmt: skip


def card_pipeline(args: PaellaArgs) -> type[PaellaPipeline]:
    """The class that the result is saved as."""
    return PaellaImageVariationPipeline if args.condition == "image" else PaellaPipeline


def summary(args: PaellaArgs) -> str:
    return f"A {card_pipeline(args).__name__}, trained on pictures and {CONDITIONS[args.condition]}."


def usage(args: PaellaArgs, pipe: PaellaPipeline, name: str) -> str:
    """Python lines for the card: load the result from `name` and draw under its condition."""
    if args.condition == "image":
        return PaellaImageVariationPipeline.usage(name)
    if args.condition == "text":
        return PaellaPipeline.usage(name, prompt=args.validation_prompts[0] if args.validation_prompts else None)
    lines = PaellaPipeline.usage(name).rstrip().splitlines()[:-1]  # as they are, without the drawing
    if args.condition == "class":
        lines.append("image = pipe(class_labels=0).images[0]")
    else:
        side, width = pipe.config["default_sample_size"], pipe.unet.config["condition_dim"]
        lines += [
            f"labels = torch.zeros(1, {side}, {side}, dtype=torch.long)  # one label a token",
            f"maps = torch.nn.functional.one_hot(labels, {width}).permute(0, 3, 1, 2).float()",
            "image = pipe(prompt_embeds=maps).images[0]",
        ]
    return "\n".join(lines)

"""The rows that Paella is trained on: their labels, and what a cache holds of them."""

from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline

from diffusers_ext.data.labels import count_map_labels, find_classes, follow_names
from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.data.scenes import CLASS_NAMES
from diffusers_ext.evaluation.reconstruction import warn_of_first_stage
from diffusers_ext.models.token_codec import decode_indices
from diffusers_ext.pipelines.listed_options import read_option
from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline
from diffusers_ext.training.paella.args import PaellaArgs
from diffusers_ext.training.paella.conditions import Condition, Encoders
from diffusers_ext.training_utils.args import DataArgs
from diffusers_ext.training_utils.cache import SampleCache, digest_network, digest_rows, open_cache
from diffusers_ext.training_utils.validation import first_rows
from diffusers_ext.training_utils.weights import warn_of_size

SHOWN_SAMPLES = 8  # pictures that the tokenizer is tried on


def condition_column(args: PaellaArgs, data: DataArgs) -> str:
    """The column of the data set that the condition is read from."""
    columns = {"text": data.caption_column, "class": data.label_column, "semantic": args.semantic_column}
    return columns.get(args.condition, data.image_column)


def load_rows(args: PaellaArgs, data: DataArgs, column: str) -> tuple[Any, Any]:
    """Training and validation set; classes have the numbers of a pipeline to fine-tune, if it knows their names."""
    sets, place = load_pictures(data, columns=(column,)), args.pretrained_model_name_or_path
    if args.condition != "class" or place is None:
        return sets
    return follow_names(sets, data, read_option(DiffusionPipeline.load_config(place).get("id2label")), place)


def count_labels(sets: tuple[Any, Any], args: PaellaArgs, data: DataArgs) -> int | None:
    """`--num_labels`, or where it is unset what the data tell; `None` where a pipeline to fine-tune tells."""
    if args.num_labels is not None or args.pretrained_model_name_or_path:
        return args.num_labels
    if args.condition == "class":
        return find_classes(sets, data)[0]
    return count_map_labels(sets, args.semantic_column, data) if args.condition == "semantic" else None


def class_names(dataset: Any, args: PaellaArgs, data: DataArgs) -> list[str] | None:
    """Names of the classes 0, 1, ... where the data know them, and as many as there are."""
    if args.condition != "class":
        return None
    if data.dataset_name == "scenes":
        names = list(CLASS_NAMES)
    else:
        names = getattr(dataset.features[data.label_column], "names", None)  # of a ClassLabel
    return names if names is not None and len(names) == args.num_labels else None


def check_tokenizer(
    args: PaellaArgs, pipe: PaellaPipeline, condition: Condition, encoders: Encoders, rows: Any, seed: int
) -> None:
    """Warns where the tokenizer does not show the pictures, or the pipeline draws another size than they have."""
    place = str(args.pretrained_vqvae_name_or_path)
    if args.pretrained_model_name_or_path:
        place = f"of {args.pretrained_model_name_or_path}"
        warn_of_size(pipe, args.pretrained_model_name_or_path, condition.data.resolution)
    batches = first_rows(
        rows, SHOWN_SAMPLES, condition.read, seed, batch_size=1, collate=condition.collate, device=encoders.device
    )
    warn_of_first_stage(
        (batch["image"] for batch, _ in batches),
        lambda images: decode_indices(encoders.vqvae, encoders.tokens(images)),
        name=place,
        way_out="Train one on them with training/train_autoencoder.py, and then a new network on it: "
        "--pretrained_vqvae_name_or_path.",
    )


def cache_samples(
    args: PaellaArgs, condition: Condition, encoders: Encoders, dataset: Any, accelerator: Accelerator
) -> SampleCache:
    """The cache in `--cache_dir`, written if it is not there.

    Raises:
        CacheError: it belongs to other data, encoders or options; the message tells which.
    """
    assert args.cache_dir is not None
    data, column = condition.data, condition.column
    key = {
        "data": digest_rows(dataset, (data.image_column, column)),
        "resolution": data.resolution,
        "vqvae": digest_network(encoders.vqvae),
        "condition": args.condition,
        "column": column,
        "train_text_encoder": args.train_text_encoder,
        **condition.digests(encoders),
    }

    def encode(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = condition.store(encoders, samples)
        return [dict(zip(kept, values, strict=True)) for values in zip(*kept.values(), strict=True)]

    return open_cache(
        args.cache_dir,
        key,
        dataset,
        read=condition.read_all,
        encode=encode,
        accelerator=accelerator,
        batch_size=encoders.batch_size,
        ragged=("vectors", "text"),
        num_workers=data.dataloader_num_workers,
    )

"""`--dry_run`: the start block of a run that is not begun, of encoded images or of those that would be encoded."""

import argparse
from pathlib import Path

from accelerate import Accelerator, init_empty_weights
from diffusers import ModelMixin

from ..arguments import source_of
from ..data.images import ImageSource, load_image_dataset
from ..data.latents import INDEX_NAME, LatentDataset
from ..transformer_mpdit import MPDiTTransformer2DModel
from .arguments import latents_folder
from .checkpoints import read_state
from .checks import check_model, latent_shape_of
from .model import Pretrained, check_pinning, model_config, num_known_classes
from .preview import check_classes_of_samples
from .run import run_length
from .samples import hold_out
from .summary import DataSummary, recipe_learning_rate, start_of_run


def dry_run(
    args: argparse.Namespace,
    accelerator: Accelerator,
    vae: ModelMixin | None,
    pretrained: Pretrained | None,
    checkpoint: Path | None,
    source: ImageSource | None,
) -> None:
    """Print what the run would begin with. Nothing is encoded, trained or written.

    Args:
        args (argparse.Namespace): the command line.
        accelerator (Accelerator): of the run.
        vae (ModelMixin, optional): of the run; None for pixels.
        pretrained (Pretrained, optional): what it would start from.
        checkpoint (Path, optional): what it would go on from.
        source (ImageSource, optional): the images, if they are opened already.
    """
    folder = latents_folder(args)
    if (folder / INDEX_NAME).is_file():
        latents = LatentDataset(folder)
        latents.validate(vae=vae, resolution=args.resolution, random_flip=args.random_flip)
        _, held_out = hold_out(latents, args.num_validation_images, args.seed)
        data, id2label = DataSummary.of_latents(latents, len(held_out)), latents.id2label
        shape, pooled_dim = latents.latent_shape, latents.pooled_projection_dim
    else:
        check_model(args, vae, pretrained)
        dataset, id2label, report = source or load_image_dataset(**source_of(args))
        data, shape = DataSummary.of_source(report, id2label, args.num_validation_images), latent_shape_of(args, vae)
        pooled_dim = None if args.pooled_column is None else len(next(iter(dataset))[args.pooled_column])
        for line in report.notes():
            accelerator.print(line)
    check_classes_of_samples(args.validation_labels, id2label)
    pretrained_config = None if pretrained is None else pretrained.transformer.config
    num_classes = len(id2label) if id2label else None
    with init_empty_weights():
        model = MPDiTTransformer2DModel(**model_config(args, shape, num_classes, pooled_dim, pretrained_config))
    check_pinning(args, model.config)
    num_trained = None if data.num_images is None else data.num_images - data.num_held_out
    needs_number = args.num_train_epochs is not None
    block = start_of_run(
        args,
        accelerator,
        data,
        model,
        args.learning_rate or recipe_learning_rate(model.config),
        None if num_trained is None and needs_number else run_length(args, num_trained),
        0 if checkpoint is None else read_state(checkpoint)["step"],
        None if pretrained is None else num_known_classes(pretrained, id2label),
    )
    encoded = "" if (folder / INDEX_NAME).is_file() else "encoded or "
    accelerator.print(f"{block}\nNothing was {encoded}trained: without --dry_run this begins")

"""The commands on the data side: `t2w features`, `backbone`, `embed` and `distill-text`.

Only typer and the standard library are imported here, so that `t2w --help` stays fast.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from text2weight_training.cli_errors import check_device, one_line_errors

if TYPE_CHECKING:
    from text2weight_training.image_data import LabelledImages

features_app = typer.Typer(add_completion=False)
backbone_app = typer.Typer(add_completion=False)
embed_app = typer.Typer(add_completion=False)
distill_text_app = typer.Typer(add_completion=False)


class Dataset(StrEnum):
    """Datasets that `t2w features` reads."""

    FOLDER = "folder"
    TINY_IMAGENET = "tiny-imagenet"
    CIFAR100 = "cifar100"
    CALTECH256 = "caltech256"


class HalfChoice(StrEnum):
    """Halves of the training images."""

    FIRST = "first"
    SECOND = "second"


class PrecisionChoice(StrEnum):
    """Number formats the backbone runs in."""

    BF16 = "bf16"
    FP32 = "fp32"


Device = Annotated[str, typer.Option(help="torch device, like cpu or cuda:0")]


@features_app.command("features")
@one_line_errors
def features_command(
    root: Annotated[Path, typer.Option(help="the dataset's folder; cifar100 and caltech256 are downloaded into it")],
    output: Annotated[Path, typer.Option("--output", "-o", help="feature file to write")],
    dataset: Annotated[Dataset, typer.Option(help="folder: ROOT/train/CLASS/*.png and ROOT/test/...")] = Dataset.FOLDER,
    backbone: Annotated[
        str, typer.Option(help="torchvision:NAME, timm:NAME, open_clip:ARCHITECTURE/TAG, squeezenet:FILE or dir:PATH")
    ] = "torchvision:resnet18",
    half: Annotated[
        HalfChoice | None,
        typer.Option(help="use only this half of the training images: the one the backbone was not trained on"),
    ] = None,
    views: Annotated[
        int,
        typer.Option(min=1, max=16, help="of each training image: itself, its mirror image, then shifted ones"),
    ] = 1,
    side: Annotated[
        int | None, typer.Option(min=8, max=1024, help="picture side in pixels; default: the model's")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images per call of the network")] = 128,
    precision: Annotated[PrecisionChoice, typer.Option(help="fp32 is slower and needs no bf16")] = PrecisionChoice.BF16,
    device: Device = "cpu",
) -> None:
    """Extract a backbone's features of a dataset. A killed run goes on where it stopped.

    Example: t2w features --dataset cifar100 --root data -o cifar100-resnet18.safetensors

    With more views of each training image heads generalise better: add --views 6.
    """
    from text2weight_training.datasets import open_dataset
    from text2weight_training.features import ExtractConfig, extract
    from text2weight_training.image_encoders import load_image_encoder

    train, test = open_dataset(dataset.value, root)
    if half is not None:
        train = _half(train, half)
    encoder = load_image_encoder(backbone, check_device(device), side)
    config = ExtractConfig(batch_size=batch_size, precision="fp32" if precision is PrecisionChoice.FP32 else "bf16")
    content = extract(train.with_views(views), test, encoder, config, output, device)
    each = f" ({views} views of each)" if views > 1 else ""
    print(
        f"{output}: {len(train.keys)}{each} training and {len(content.test_labels)} test images of "
        f"{len(content.classes)} classes, {content.dim} numbers each, backbone {content.backbone}"
    )


def _half(images: LabelledImages, which: HalfChoice) -> LabelledImages:
    return images.half("first" if which is HalfChoice.FIRST else "second")


@backbone_app.command("backbone")
@one_line_errors
def backbone_command(
    folders: Annotated[list[Path], typer.Argument(help="image folders with train/CLASS/*.png, or Tiny-ImageNet's")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for config.json and model.safetensors")],
    half: Annotated[
        HalfChoice | None, typer.Option(help="train on this half of the images; take features from the other")
    ] = None,
    epochs_sides: Annotated[
        str, typer.Option(help="picture side in pixels of each epoch; their number is the number of epochs")
    ] = "32,32,32,32,32,32,48,48",
    input_side: Annotated[int, typer.Option(min=8, max=1024, help="picture side that features are taken at")] = 64,
    batch_size: Annotated[int, typer.Option(min=2, help="images per step")] = 128,
    learning_rate: Annotated[float, typer.Option(min=1e-6, help="peak of the one-cycle schedule")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="seed of the weights and of the order of images")] = 0,
    device: Device = "cpu",
) -> None:
    """Train a ResNet-18 from scratch on image folders. A killed run goes on from its last epoch.

    Example: t2w backbone data/cifar100 data/tiny-imagenet-200 --half first -o backbone
    """
    import torch

    from text2weight_training.backbone import BackboneConfig, train_backbone
    from text2weight_training.image_data import find_images, load_pixels

    config = BackboneConfig(
        sides=_sides(epochs_sides),
        input_side=input_side,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    check_device(device)
    datasets = [find_images(folder, "train") for folder in folders]
    if half is not None:
        datasets = [_half(dataset, half) for dataset in datasets]
    pixels = torch.cat([load_pixels(dataset, input_side) for dataset in datasets])  # (N, 3, R, R)
    train_backbone(pixels, datasets, config, output, device)
    print(f"{output}: ResNet-18 trained on {len(pixels)} images of {', '.join(d.name for d in datasets)}")


def _sides(text: str) -> tuple[int, ...]:
    from text2weight_training.files import TrainingDataError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 8 <= int(part) <= 1024 for part in parts):
        raise TrainingDataError(f"--epochs-sides {text!r}: give whole numbers from 8 to 1024, like 32,32,48")
    return tuple(int(part) for part in parts)


@embed_app.command("embed")
@one_line_errors
def embed_command(
    output: Annotated[str, typer.Option("--output", "-o", help="FILE#TABLE; the file's other tables stay")],
    names: Annotated[
        list[str] | None, typer.Option(help="a class name, or a text file with one per line; may be repeated")
    ] = None,
    template: Annotated[str | None, typer.Option(help="prompt with {} for the name; a {} if not given")] = None,
    descriptions: Annotated[
        Path | None,
        typer.Option(help='JSON file {"name": "description" or list of them, ...} to embed in place of prompts'),
    ] = None,
    model: Annotated[
        str, typer.Option(help="open_clip:ARCHITECTURE/TAG, or dir:PATH of a local open_clip folder")
    ] = "open_clip:ViT-B-32/openai",
    device: Device = "cpu",
) -> None:
    """Embed class names, or descriptions of them, into a table that training and service read.

    Example: t2w embed --names names.txt --template "a {}" -o embeddings.safetensors#names.a

    Descriptions: t2w embed --descriptions birds.json -o embeddings.safetensors#names.described
    """
    from text2weight.text_encoder import load_text_encoder
    from text2weight_training.embed import collect_descriptions, collect_names, embed, embed_descriptions, save_table
    from text2weight_training.files import TrainingDataError

    path, _, table_name = output.partition("#")
    if not path or not table_name:
        raise TrainingDataError(f"--output {output!r}: give FILE#TABLE, like embeddings.safetensors#names.a")
    if descriptions is not None and template is not None:
        raise TrainingDataError("--template belongs to --names alone: descriptions stand for themselves")
    chosen = collect_names(names or []) if names or descriptions is None else ()
    described = collect_descriptions(descriptions, chosen) if descriptions is not None else {}
    encoder = load_text_encoder(model, check_device(device))
    if described:
        table = embed_descriptions(described, encoder)
    else:
        table = embed(chosen, "a {}" if template is None else template, encoder)
    save_table(Path(path), table_name, table)
    print(f"{output}: {len(table.names)} names, {table.embeddings.shape[1]} numbers each")


@distill_text_app.command("distill-text")
@one_line_errors
def distill_text_command(
    tables: Annotated[list[str], typer.Option("--table", help="FILE#TABLE to reproduce; may be repeated")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the open_clip text tower")],
    epochs: Annotated[int, typer.Option(min=1, help="times that every row is seen")] = 200,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="end earlier, when this time is up")] = None,
    width: Annotated[int, typer.Option(min=8, help="tower width; most of the file is 49,408 times this")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="transformer layers")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="attention heads; must divide the width")] = 4,
    context_length: Annotated[int, typer.Option(min=4, help="longest prompt in tokens, start and end included")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="seed of the weights and of the order of prompts")] = 0,
    device: Device = "cpu",
) -> None:
    """Distil embedding tables into a small text tower that open_clip loads. A killed run goes on.

    Example: t2w distill-text --table embeddings.safetensors#names.a -o text_encoder
    """
    from text2weight.text_encoder import read_embedding_table
    from text2weight_training.distill_text import (
        DistillConfig,
        collect_prompts,
        distill,
        measure_agreement,
        write_vocabulary,
    )

    config = DistillConfig(
        width=width,
        layers=layers,
        heads=heads,
        context_length=context_length,
        epochs=epochs,
        minutes=minutes,
        seed=seed,
    )
    read = {source: read_embedding_table(source) for source in tables}
    distill(collect_prompts(list(read.values()), context_length), config, output, check_device(device))
    write_vocabulary(list(read.values()), output)
    for source, table in read.items():
        print(f"{source}: {measure_agreement(output, table)}")

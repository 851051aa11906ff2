"""Pictures for the demo: photographs that ship inside scikit-image and matplotlib, and any folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_FOLDER_PICTURES = 64


class PictureError(Exception):
    """No pictures can be had from the folder that was named."""


@dataclass(frozen=True)
class Picture:
    """A picture and what a person says is in it.

    Attributes:
        name: for tables and captions.
        image: RGB.
        description: in words, for those who do not see it.
        source: where it comes from.
        truths: class names that are right; empty if nobody has said.
    """

    name: str
    image: Image.Image
    description: str
    source: str
    truths: frozenset[str] = frozenset()

    def truth_in(self, classes: tuple[str, ...]) -> str | None:
        """The right answer within a class list, if there is one."""
        return next((name for name in classes if name in self.truths), None)


def bundled_pictures() -> list[Picture]:
    """Photographs that are files of installed packages; nothing is downloaded."""
    from matplotlib.cbook import get_sample_data
    from skimage import data

    def photograph(name: str, description: str, *truths: str) -> Picture:
        pixels = getattr(data, name)()
        pixels = pixels[0] if isinstance(pixels, tuple) else pixels  # the left one of a stereo pair
        image = Image.fromarray(pixels).convert("RGB")
        shown = {"clock": "clock, motion-blurred", "stereo_motorcycle": "motorcycle"}.get(name, name)
        return Picture(shown, image, description, f"skimage.data.{name}", frozenset(truths))

    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        hopper = image.convert("RGB")
    return [
        photograph("coffee", "A cup of espresso on a red saucer, on a wooden table", "cup"),
        photograph("clock", "A wall clock, blurred beyond recognition by the motion of the camera", "clock"),
        photograph("stereo_motorcycle", "A red motorcycle in a garage", "motorcycle"),
        photograph("rocket", "A rocket on its launch pad at dusk, between floodlights", "rocket"),
        photograph("cat", "The face of a tabby cat", "tabby"),
        photograph("astronaut", "A smiling woman in an orange space suit before a flag and a shuttle", "woman"),
        photograph("camera", "A man in a coat behind a film camera on a tripod, in black and white", "man"),
        Picture(
            "grace hopper",
            hopper,
            "An elderly woman in a dark naval uniform with cap, before a flag",
            "matplotlib's grace_hopper.jpg",
            frozenset({"military uniform", "woman"}),
        ),
    ]


def pictures_in(folder: Path) -> tuple[list[Picture], list[str]]:
    """Pictures in a folder and its subfolders, and notes on those left out.

    Raises:
        PictureError: no such folder, or no readable picture in it.
    """
    if not folder.is_dir():
        raise PictureError(f"--images {folder}: there is no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise PictureError(f"--images {folder}: it holds no picture ({', '.join(SUFFIXES)})")
    notes = []
    if len(files) > MAX_FOLDER_PICTURES:
        notes.append(f"{folder} holds {len(files)} pictures: the first {MAX_FOLDER_PICTURES} are used")
    pictures = []
    for path in files[:MAX_FOLDER_PICTURES]:
        name = str(path.relative_to(folder))
        try:
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            notes.append(f"{path} is left out: {error}")
            continue
        pictures.append(Picture(name, upright, f"Your picture {name}", str(path)))
    if not pictures:
        raise PictureError(f"--images {folder}: none of its {len(files)} pictures can be read; {notes[-1]}")
    return pictures, notes

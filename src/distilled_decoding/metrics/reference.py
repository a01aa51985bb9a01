"""Images that samples are compared with, read from files, and what an extractor says of a set of images.

Axis letters: B batch, C image channels, H W image, N images, D feature width.
"""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from math import prod
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distilled_decoding.checkpoint import load_tensors, save_tensors
from distilled_decoding.metrics.features import Extractor
from distilled_decoding.metrics.frechet import Statistics
from distilled_decoding.metrics.inception_score import inception_score

MIN_IMAGES = 4
"""Precision and recall look at three neighbours."""

_BATCH = 250
_PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, eq=False)
class Measured:
    """What is known of a set of images after an extractor has seen them.

    Attributes:
        statistics: of the features.
        feature_ND: float32, in the order of the images.
        inception_score: of the extractor's own logits.
        accuracy: share of the images that are given their label; None without labels, or when the extractor's
            classes are not those of the labels.
    """

    statistics: Statistics
    feature_ND: Tensor
    inception_score: float
    accuracy: float | None


@dataclass(frozen=True, eq=False)
class Reference:
    """Images that samples are compared with.

    Attributes:
        statistics: of their features.
        feature_ND: the features; None when only a Fréchet distance can be computed.
        features: name of the extractor.
        sha256: of the bytes of the images; empty when there are none but their statistics.
    """

    statistics: Statistics
    feature_ND: Tensor | None
    features: str
    sha256: str

    @property
    def identity(self) -> str:
        """A hash of what is compared with: the images, and mean and covariance where those are of others."""
        if self.statistics.count is not None:
            return self.sha256
        digest = sha256(self.sha256.encode())
        for moment in (self.statistics.mean_D, self.statistics.covariance_DD):
            digest.update(moment.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write a safetensors file whose metadata says what images these are and what measured them."""
        statistics = self.statistics
        tensors = {"mean_D": statistics.mean_D, "covariance_DD": statistics.covariance_DD}
        if self.feature_ND is not None:
            tensors["feature_ND"] = self.feature_ND
        metadata = {
            "images": statistics.images,
            "count": str(statistics.count or ""),
            "features": self.features,
            "extractor": statistics.extractor,
            "image_shape": " ".join(map(str, statistics.image_shape or ())),
            "sha256": self.sha256,
        }
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, damaged, or holds something else.
        """
        tensors, metadata = load_tensors(path)
        fields = ("images", "count", "features", "extractor", "image_shape", "sha256")
        if not {"mean_D", "covariance_DD"} <= set(tensors) or not set(fields) <= set(metadata):
            raise ValueError(f"{path} holds no reference of images (found {', '.join(sorted(tensors))})")
        feature_ND = tensors["feature_ND"].float() if "feature_ND" in tensors else None
        statistics = Statistics(
            int(metadata["count"]) if metadata["count"] else None,
            tensors["mean_D"],
            tensors["covariance_DD"],
            metadata["extractor"],
            metadata["images"],
            tuple(map(int, metadata["image_shape"].split())) or None,  # type: ignore[arg-type]
        )
        return cls(statistics, feature_ND, metadata["features"], metadata["sha256"])


def measure(extractor: Extractor, images: Iterable[Tensor], label_N: Tensor | None, name: str) -> Measured:
    """Features, their statistics, Inception Score and class accuracy of images that come batch after batch.

    Args:
        extractor: of the features.
        images: batches of uint8 images [B, C, H, W]; never more than one is held.
        label_N: the label that each image should have, int64.
        name: what the images are, in words.

    Raises:
        ValueError: fewer than two images, images of several shapes or of channels that the extractor does not read,
            or another number of labels.
    """
    features, logits = [], []
    shapes: set[tuple[int, int, int]] = set()
    for image_BCHW in images:
        scores = extractor.scores(image_BCHW)
        features.append(scores.feature_BD)
        logits.append(scores.logits_BV)
        shapes.add((image_BCHW.shape[1], image_BCHW.shape[2], image_BCHW.shape[3]))
    if len(shapes) != 1:
        found = ", ".join(" x ".join(map(str, shape)) for shape in sorted(shapes)) or "none"
        raise ValueError(f"{name} must be images of one shape (channels, height, width), found {found}")
    feature_ND, logits_NV = torch.cat(features), torch.cat(logits)
    accuracy = None
    if label_N is not None and extractor.num_classes is not None:
        if len(label_N) != len(logits_NV):
            raise ValueError(f"{name} are {len(logits_NV)} images, but there are {len(label_N)} labels")
        accuracy = (logits_NV.argmax(1) == label_N.cpu()).double().mean().item()
    statistics = Statistics.of(feature_ND, extractor.fingerprint, name, shapes.pop())
    return Measured(statistics, feature_ND, inception_score(logits_NV), accuracy)


def make_reference(extractor: Extractor, images: Iterable[Tensor], name: str) -> Reference:
    """Measure images to compare samples with.

    Args:
        extractor: of the features.
        images: batches of uint8 images [B, C, H, W]; never more than one is held.
        name: what the images are, in words.

    Raises:
        ValueError: see `measure`.
    """
    digest = sha256()

    def watched() -> Iterator[Tensor]:
        for image_BCHW in images:
            digest.update(image_BCHW.cpu().contiguous().numpy().tobytes())
            yield image_BCHW

    measured = measure(extractor, watched(), None, name)
    return Reference(measured.statistics, measured.feature_ND, extractor.name, digest.hexdigest())


def check_reference(reference: Reference, extractor: Extractor, num_classes: int, image_shape: tuple[int, ...]) -> None:
    """Refuse a reference or an extractor that cannot measure a model of these classes and images.

    Raises:
        ValueError: the extractor knows other classes, or the reference is of another extractor, of images of another
            shape or of too few.
    """
    if extractor.num_classes not in (None, num_classes):
        raise ValueError(
            f"the features {extractor.name} are of a classifier of {extractor.num_classes} classes, the model "
            f"{f'has {num_classes}' if num_classes else 'reads captions'}; choose other features"
        )
    _check_extractor(reference, extractor)
    real = reference.statistics
    if real.image_shape is not None and real.image_shape != image_shape:
        shapes = [" x ".join(map(str, shape)) for shape in (real.image_shape, image_shape)]
        raise ValueError(
            f"{real.images!r} are {shapes[0]} (channels, height, width), the model makes {shapes[1]}; "
            "give real images as the model makes them"
        )
    if real.count is not None and real.count < MIN_IMAGES:
        raise ValueError(f"{real.images!r} are {real.count} images; a comparison needs at least {MIN_IMAGES}")


def read_reference(path: Path, extractor: Extractor) -> Reference:
    """A reference from what a user has.

    Args:
        path: `.safetensors` that `Reference.save` wrote, a folder of pictures, or an `.npz` of images (`arr_0`), of
            their mean and covariance in Inception features (`mu`, `sigma`), or of both: then the latter are the
            statistics, usually of more images than those in the file, as in the ADM evaluator.
        extractor: of the features.

    Raises:
        ValueError: the file is damaged or of something else, or was measured with another extractor.
    """
    if path.suffix == ".safetensors":
        reference = Reference.load(path)
        _check_extractor(reference, extractor)
        return reference
    arrays = _npz_names(path) if path.suffix == ".npz" else set()
    published = {"mu", "sigma"} <= arrays
    if published and "arr_0" not in arrays and extractor.name != "inception":
        raise ValueError(
            f"{path} holds mean and covariance in Inception features but no images, which the features "
            f"{extractor.name} need; use the features inception, or a file with images"
        )
    if not published or extractor.name != "inception":
        return make_reference(extractor, read_images(path), f"images of {path.name}")
    mean_D = _npz_moment(path, "mu", (extractor.width,))
    covariance_DD = _npz_moment(path, "sigma", (extractor.width, extractor.width))
    name = f"images behind mu and sigma of {path.name}"
    statistics = Statistics(None, mean_D, covariance_DD, extractor.fingerprint, name, None)
    if "arr_0" not in arrays:
        return Reference(statistics, None, extractor.name, "")
    images = make_reference(extractor, read_images(path), name)
    statistics = replace(statistics, image_shape=images.statistics.image_shape)
    return replace(images, statistics=statistics)


def read_images(path: Path) -> Iterator[Tensor]:
    """Batches of uint8 images [B, C, H, W], from `arr_0` [N, H, W, 1 or 3] of an `.npz` or a folder of pictures.

    Pictures come in the order of their names. Never more than a batch is held.

    Raises:
        ValueError: there are no images, or damaged ones, or of several sizes.
    """
    if path.is_dir():
        return _folder_images(path)
    if path.suffix == ".npz":
        return _npz_images(path)
    raise ValueError(f"{path} is no source of images; give a folder of PNG or JPG pictures, or an .npz with arr_0")


def _check_extractor(reference: Reference, extractor: Extractor) -> None:
    if reference.statistics.extractor != extractor.fingerprint:
        raise ValueError(
            f"{reference.statistics.images!r} was measured with {reference.features} "
            f"({reference.statistics.extractor[:12]}), not with {extractor.name} ({extractor.fingerprint[:12]}); "
            "measure its images again"
        )


def _folder_images(folder: Path) -> Iterator[Tensor]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
    if not paths:
        raise ValueError(f"{folder} holds no pictures (PNG or JPG)")
    first = _picture(paths[0])
    for begin in range(0, len(paths), _BATCH):
        batch = []
        for path in paths[begin : begin + _BATCH]:
            batch.append(_picture(path))
            if batch[-1].shape != first.shape:
                (channels, *size), (other, *other_size) = first.shape, batch[-1].shape
                raise ValueError(
                    f"pictures must be of one size: {paths[0]} is {size} with {channels} channels, "
                    f"{path} {other_size} with {other}"
                )
        yield torch.stack(batch)


def _picture(path: Path) -> Tensor:
    try:
        with Image.open(path) as picture:
            mode, array = picture.mode, np.atleast_3d(np.array(picture))
    except Exception as error:
        raise ValueError(f"{path} is no picture, or a damaged one ({error})") from error
    if mode not in ("L", "RGB"):
        raise ValueError(f"{path} has pixels of mode {mode}; pictures must be grey (L) or RGB, one byte a channel")
    return torch.from_numpy(array).permute(2, 0, 1)


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """An .npz; whatever is wrong with it is one sentence that names it."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}") from error


def _npz_names(path: Path) -> set[str]:
    with _archive(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _npz_moment(path: Path, key: str, shape: tuple[int, ...]) -> Tensor:
    with _archive(path) as archive, archive.open(f"{key}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if array.shape != shape or array.dtype.kind != "f":
            raise ValueError(f"{key} must be floats of shape {shape}, got {array.dtype} of {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{key} is not finite")
        return torch.from_numpy(array.astype(np.float64))


def _npz_images(path: Path) -> Iterator[Tensor]:
    with _archive(path) as archive, archive.open("arr_0.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran:
            raise ValueError(f"arr_0 must be uint8 images [N, H, W, 1 or 3] in C order, got {dtype} of {shape}")
        for begin in range(0, shape[0], _BATCH):
            batch = (min(_BATCH, shape[0] - begin), *shape[1:])
            content = file.read(prod(batch))
            if len(content) < prod(batch):
                raise ValueError(f"arr_0 ends within its {shape[0]} images")
            yield torch.frombuffer(bytearray(content), dtype=torch.uint8).view(batch).permute(0, 3, 1, 2)

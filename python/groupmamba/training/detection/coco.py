# SPDX-License-Identifier: Apache-2.0
"""Images with annotations in COCO's format, as torchvision reads them."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, VisionDataset, wrap_dataset_for_transforms_v2
from torchvision.transforms.v2 import functional as F

from groupmamba.training.detection.annotations import Split, outside, read_annotations
from groupmamba.training.pictures import read_picture
from groupmamba.training.samples import BrokenAnnotation
from groupmamba_ext._command import CommandError, one_line


class CocoImages(CocoDetection):
    """torchvision's dataset on annotations that are checked, with images by :func:`read_picture`."""

    def __init__(self, root: Path, content: dict[str, Any]):
        VisionDataset.__init__(self, root)
        self.coco = COCO()
        self.coco.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
            self.coco.createIndex()
        self.ids = sorted(self.coco.imgs)

    def _load_image(self, id: int) -> Image.Image:
        try:
            return read_picture(Path(self.root) / self.coco.imgs[id]["file_name"])
        except (OSError, MemoryError):
            raise
        except Exception as error:  # Pillow's decoders raise exceptions of many kinds on bytes that are no image
            raise OSError(one_line(error)) from error


class Objects:
    """The images of one split, with boxes, classes and masks.

    Args:
        split: where they are.
        categories: ids of the categories by class, of the training images; None for the file's own.
        crowds: whether regions that stand for many objects are kept, as validation needs them.
        empty: whether images without objects are kept.
        say: called with a line on what is left out.

    Raises:
        CommandError: an annotation is broken or of an unknown category, or there is no image.
    """

    def __init__(
        self,
        split: Split,
        *,
        categories: Sequence[int] | None = None,
        crowds: bool,
        empty: bool,
        say: Callable[[str], None],
    ):
        self.split, self.root = split, split.images
        content = read_annotations(split.annotations)
        names = {entry["id"]: entry["name"] for entry in content["categories"]}
        self.category_ids = sorted(names) if categories is None else list(categories)
        self._class_of = {number: i + 1 for i, number in enumerate(self.category_ids)}  # 0 is the background
        self.classes = [names.get(number, f"category {number}") for number in self.category_ids]
        images = {entry["id"]: entry for entry in content["images"]}
        left_out = set()
        for what, wrong in (
            ("boxes without area", lambda entry: not entry["iscrowd"] and min(entry["bbox"][2:]) <= 0),
            ("objects outside their image", lambda entry: outside(entry, images[entry["image_id"]])),
        ):
            ids = [entry["id"] for entry in content["annotations"] if entry["id"] not in left_out and wrong(entry)]
            if ids:
                say(f"{split.annotations}: {len(ids)} {what} are left out, first annotation {ids[0]}")
            left_out.update(ids)
        kept = []
        for entry in content["annotations"]:
            if entry["id"] in left_out or (entry["iscrowd"] and not crowds):
                continue
            if entry["category_id"] not in self._class_of:
                raise CommandError(
                    f"{split.annotations}: annotation {entry['id']} is of category {entry['category_id']} "
                    f"({names[entry['category_id']]}), which the training images do not have"
                )
            kept.append(entry)
        content["annotations"] = kept
        self.without_mask = next((entry["id"] for entry in kept if not entry.get("segmentation")), None)
        self.has_masks = any(entry.get("segmentation") for entry in kept)
        if not empty:
            count = Counter(entry["image_id"] for entry in kept)
            images = [entry for entry in content["images"] if count[entry["id"]]]
            if len(images) < len(content["images"]):
                more = len(content["images"]) - len(images)
                say(f"{more} images without objects are left out; --empty-images trains on them too")
            if not images:
                raise CommandError(f"{split.annotations} has no image with an object")
            content["images"] = images
        self.data = CocoImages(split.images, content)
        self.masks = False

    def use_masks(self, masks: bool) -> None:
        """Whether targets have masks.

        Raises:
            CommandError: an annotation has none.
        """
        if masks and self.without_mask is not None:
            raise CommandError(
                f"{self.split.annotations}: annotation {self.without_mask} has no segmentation, and others have; "
                f"--no-masks trains on boxes alone"
            )
        self.masks = masks
        keys = {"boxes", "labels", "iscrowd", "area", *(["masks"] if masks else [])}
        self._wrapped = wrap_dataset_for_transforms_v2(self.data, target_keys=keys)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def has_objects(self) -> bool:
        """Whether there is anything to find."""
        return not all(entry["iscrowd"] for entry in self.data.coco.anns.values())

    def path_of(self, index: int) -> str:
        """The file of an image."""
        return str(self.root / self.data.coco.imgs[self.data.ids[index]]["file_name"])

    def load(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        """An image, uint8 (3, H, W), and its objects: ``boxes`` (N, 4) as XYXY, ``labels`` int64 (N,) from 1 on,
        ``iscrowd``, ``area``, and ``masks`` uint8 (N, H, W).

        Raises:
            BrokenAnnotation: a mask can't be decoded.
            Exception: of many kinds, for an image that can't be read.
        """
        number = self.data.ids[index]
        try:
            picture, target = self._wrapped[index]
        except (OSError, MemoryError):  # of the image
            raise
        except Exception as error:  # pycocotools raises exceptions of many kinds on codes that are none
            ids = [annotation["id"] for annotation in self.data.coco.imgToAnns[number]]
            raise BrokenAnnotation(
                f"{self.split.annotations}: a segmentation of image {number} can't be decoded ({one_line(error)}), of "
                f"annotations {', '.join(map(str, ids[:8]))}"
            ) from error
        image = F.to_image(picture)
        size = tuple(image.shape[1:])
        entry = self.data.coco.imgs[number]
        said = entry.get("height", size[0]), entry.get("width", size[1])
        if said != size:
            raise BrokenAnnotation(
                f"{self.split.annotations}: image {number} has {said[1]} x {said[0]} pixels, and its file "
                f"{self.path_of(index)} {size[1]} x {size[0]}"
            )
        if not self.data.coco.imgToAnns[number]:
            target = {
                "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size),
                "labels": torch.zeros(0, dtype=torch.int64),
                "iscrowd": torch.zeros(0, dtype=torch.int64),
                "area": torch.zeros(0),
            }
            if self.masks:
                target["masks"] = tv_tensors.Mask(torch.zeros(0, *size, dtype=torch.uint8))
            return image, target
        target["labels"] = torch.tensor([self._class_of[number] for number in target["labels"].tolist()])
        target["boxes"] = tv_tensors.wrap(target["boxes"].float(), like=target["boxes"])
        target["iscrowd"] = torch.tensor(target["iscrowd"], dtype=torch.int64)
        target["area"] = torch.tensor(target["area"], dtype=torch.float32)
        return image, target

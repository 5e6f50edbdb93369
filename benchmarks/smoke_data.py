"""Images with colored rectangles, their boxes and masks, as a VOC tree: data for a trial run.

python benchmarks/smoke_data.py FOLDER IMAGES
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = {"cat": 8, "dog": 12}  # name: number in the masks
COLORS = ((200, 60, 40), (40, 60, 200))
OBJECT = (
    "<object><name>{}</name><difficult>0</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def write_image(root, i):
    """Image, mask and boxes number i: noise and one rectangle, a cat or a dog by its color."""
    rng = np.random.default_rng(i)
    image = rng.integers(60, 160, (96, 128, 3), dtype=np.uint8)
    mask = np.zeros((96, 128), np.uint8)
    x, y = rng.integers(0, 60, 2).tolist()
    area = np.s_[y : y + 36, x : x + 48]
    name = list(CLASSES)[i % 2]
    image[area], mask[area] = COLORS[i % 2], CLASSES[name]
    Image.fromarray(image).save(root / f"JPEGImages/{i:04d}.jpg")
    Image.fromarray(mask).save(root / f"SegmentationClass/{i:04d}.png")
    text = OBJECT.format(name, x + 1, y + 1, x + 48, y + 36)
    (root / f"Annotations/{i:04d}.xml").write_text(f"<annotation>{text}</annotation>")


def main(folder, count):
    """Write the tree; the last quarter of the images is the list val."""
    root = Path(folder) / "VOC2012"
    lists = [f"ImageSets/{kind}" for kind in ("Main", "Segmentation")]
    for name in ("JPEGImages", "SegmentationClass", "Annotations", *lists):
        (root / name).mkdir(parents=True)
    for i in range(count):
        write_image(root, i)
    names = [f"{i:04d}" for i in range(count)]
    held_out = count // 4
    for name, split in (("train", names[:-held_out]), ("val", names[-held_out:])):
        for kind in lists:
            (root / kind / f"{name}.txt").write_text("\n".join(split) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""Augmentation from the config, own transforms with geometry, and any dataset of images."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from densecl.augment import TwoCropsTransform, sample_view
from densecl.config import Config, validate_config
from densecl.data.dataset import TileSource, open_source
from densecl.data.loader import augment_config, build_loader, build_views, to_device
from densecl.resume import check_resumable
from densecl.runtime.io import UsageError
from densecl.train import parse_args
from densecl.trainer import train
from tiny import TINY

OTHER = {
    "crop_scale": (0.4, 0.5),
    "crop_ratio": (1.0, 1.0),
    "brightness": 0.9,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "color_jitter_prob": 1.0,
    "grayscale_prob": 0.0,
    "blur_prob": 1.0,
    "blur_sigma": (0.5, 0.6),
    "solarize_prob": 1.0,
    "solarize_threshold": 99,
    "hflip_prob": 1.0,
}


def test_options_of_the_augmentation_reach_each_view():
    words = []
    for name, value in OTHER.items():
        numbers = value if isinstance(value, tuple) else [value]
        words += ["--" + name.replace("_", "-"), *map(str, numbers)]
    config = parse_args(["demo", *words]).config
    assert {name: getattr(config, name) for name in OTHER} == OTHER
    validate_config(config)
    rng = np.random.default_rng(0)
    for _ in range(20):
        view = sample_view(rng, 100, 100, augment_config(config))
        _, _, width, height = view.box
        assert width == height and 0.39 < width * height / 100**2 < 0.51
        assert [name for name, _ in view.jitter] == ["brightness"] and not view.gray
        assert 0.5 <= view.sigma <= 0.6 and view.solarize == 99 and view.flip


def test_the_defaults_draw_the_same_numbers_as_before_there_was_solarization():
    rng = np.random.default_rng(5)
    for _ in range(50):
        sample_view(rng, 640, 480, augment_config(Config()))
    assert rng.integers(2**32) == 252899877  # recorded before the fields were added


def test_the_pipelines_agree_on_other_ranges():
    config = replace(TINY, data_root="builtin:photos", **OTHER, image_size=64)
    images = []
    for name in ("reference", "fast", "device"):
        loader = build_loader(
            replace(config, augment=name), build_views(replace(config, augment=name)), 0, 1
        )
        images.append(to_device(next(iter(loader)), torch.device("cpu"))["im_q"])
    for image in images[1:]:
        assert (image - images[0]).abs().mean() < 0.06  # 3 of 255 levels, in units of the std


@pytest.mark.parametrize("name", OTHER)
def test_a_resume_with_another_augmentation_is_refused_and_an_old_config_resumes(name):
    saved = {k: v for k, v in asdict(TINY).items() if k not in OTHER}  # before the fields
    check_resumable(saved, TINY)
    check_resumable(json.loads(json.dumps(asdict(TINY))), TINY)  # lists in place of tuples
    with pytest.raises(UsageError, match=name):
        check_resumable(saved, replace(TINY, **{name: OTHER[name]}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_scale", (0.5,)),
        ("crop_scale", (0.5, 0.2)),
        ("crop_scale", (0.0, 0.2)),
        ("crop_scale", (0.2, 1.1)),
        ("crop_scale", 0.2),
        ("crop_scale", ("a", "b")),
        ("crop_ratio", (-1.0, 1.0)),
        ("blur_sigma", (-0.1, 1.0)),
        ("blur_sigma", (0.1, float("nan"))),
        ("hue", 0.6),
        ("brightness", -0.1),
        ("solarize_threshold", 256),
        ("solarize_prob", 1.5),
    ],
)
def test_wrong_ranges_end_with_one_line(name, value):
    with pytest.raises(UsageError, match="^--" + name.replace("_", "-")) as error:
        validate_config(replace(TINY, **{name: value}))
    assert "\n" not in str(error.value)


TRANSFORMS = {
    "crop, flip": [v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4)],
    "rotation": [v2.RandomResizedCrop(48), v2.RandomRotation(30), v2.CenterCrop(32)],
    "affine": [v2.RandomAffine(20, (0.1, 0.1), (0.8, 1.2), 10), v2.RandomResizedCrop(32)],
    "maybe": [v2.RandomApply([v2.RandomVerticalFlip()]), v2.Resize((32, 32)), v2.RandomGrayscale()],
}
TO_FLOAT = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_geometry_of_v2_transforms_is_tracked(name):
    """In an image whose red and green are x and y, each view shows the points of its map."""
    x, y = np.meshgrid(np.arange(250), np.arange(200))
    image = np.stack([x, y, 0 * x + 255], -1).astype(np.uint8)
    geometric = [
        t for t in TRANSFORMS[name] if not isinstance(t, (v2.ColorJitter, v2.RandomGrayscale))
    ]
    views = TwoCropsTransform(ImageList([image]), v2.Compose(geometric), 3)
    assert views.tracks
    u = torch.tensor([[0.35, 0.5, 1], [0.5, 0.65, 1], [0.5, 0.5, 1]])
    for position in range(20):
        sample = views.at(0, position, 0)
        for suffix in "qk":
            view = sample[f"im_{suffix}"].float()
            points = u @ sample[f"affine_{suffix}"].T
            side = view.shape[-1]
            found = view[:, (u[:, 1] * side).long(), (u[:, 0] * side).long()].T  # 3 x RGB
            shown = found[:, 2] > 250  # not the black corner of a rotation
            pixel = sample[f"affine_{suffix}"][:, :2].norm() / side  # size of a pixel of the view
            assert shown.any() or name == "affine"
            assert ((found[shown, :2] + 0.5 - points[shown]).abs() < 1.5 + pixel).all()


class ImageList:
    """The least that a source must have."""

    def __init__(self, images):
        self.images = [Image.fromarray(image) for image in images]

    def __len__(self):
        return len(self.images)

    def load_or_replace(self, index, rng):
        return self.images[index], index, []


def test_tracking_draws_the_same_views():
    source = TileSource(["chelsea"], tile=96)
    transform = v2.Compose(TRANSFORMS["crop, flip"] + TO_FLOAT)
    tracked, plain = TwoCropsTransform(source, transform), TwoCropsTransform(source, transform)
    plain.tracks = False
    a, b = tracked.at(1, 2, 3), plain.at(1, 2, 3)
    assert torch.equal(a["im_q"], b["im_q"]) and torch.equal(a["im_k"], b["im_k"])
    assert set(a) - set(b) == {"affine_q", "affine_k"}


@pytest.mark.parametrize(
    "last", [v2.RandomPerspective(0.5), v2.Lambda(lambda image: image.rotate(9))]
)
def test_a_transform_that_is_not_affine_has_no_geometry_and_one_warning(last, capsys):
    import densecl.runtime.io

    densecl.runtime.io._noted.clear()
    transform = v2.Compose([v2.RandomResizedCrop(32), last, *TO_FLOAT])
    for _ in range(2):
        views = TwoCropsTransform(TileSource(["chelsea"]), transform)
        assert set(views[0]) == {"im_q", "im_k", "index", "bad"}
    assert capsys.readouterr().err.count("not tracked") == 1


def test_training_with_a_v2_transform_measures_matches_and_warms_up(tmp_path, make_images):
    source = open_source(make_images(tmp_path / "images"))
    views = TwoCropsTransform(source, v2.Compose(TRANSFORMS["crop, flip"] + TO_FLOAT), TINY.seed)
    train(replace(TINY, out=str(tmp_path / "out"), geometry_warmup=6), views=views)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    accuracy = [json.loads(line)["match_acc"] for line in lines]
    assert len(accuracy) == 6 and all(0 <= a < 1 for a in accuracy)  # of the features


class OwnImages:
    """Twelve images in a form of the test's, randomly mirrored by the dataset itself."""

    def __init__(self, form):
        self.form = form

    def __len__(self):
        return 12

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 48, 3), np.uint8)
        return self.form(pixels[:, ::-1] if torch.rand(()) < 0.5 else pixels)


def tensor(pixels):
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


FORMS = {
    "Pillow": Image.fromarray,
    "array": lambda pixels: pixels,
    "float array": lambda pixels: pixels / 255,
    "tensor": tensor,
    "float tensor": lambda pixels: tensor(pixels).float() / 255,
    "labeled": lambda pixels: (Image.fromarray(pixels), 3),
    "dict": lambda pixels: {"id": 3, "mask": pixels[..., 0], "image": pixels},
    "with a mask": lambda pixels: (tensor(pixels), tensor(pixels)[0] // 128),
}


def batch_list(dataset, first=0, last=4, **settings):
    return list(build_loader(replace(TINY, **settings), dataset, first, last))


def same_views(a, b):
    return all(torch.equal(a[name], b[name]) for name in ("im_q", "im_k", "affine_q"))


@pytest.mark.parametrize("form", FORMS)
def test_images_in_any_form_become_the_same_views(form):
    expected = batch_list(OwnImages(FORMS["array"]))
    for a, b in zip(expected, batch_list(OwnImages(FORMS[form])), strict=True):
        assert same_views(a, b)


def test_views_of_own_images_depend_on_the_position_alone():
    dataset = OwnImages(FORMS["labeled"])
    full = batch_list(dataset)
    torch.rand(7), np.random.rand(7)
    for other in (batch_list(dataset, workers=2), batch_list(dataset)):
        assert all(map(same_views, full, other))
    assert all(map(same_views, full[2:], batch_list(dataset, first=2)))
    assert not same_views(full[0], batch_list(dataset, seed=1)[0])


@pytest.mark.parametrize("augment", ["reference", "fast", "device"])
def test_training_on_own_images_resumes_exactly(augment, tmp_path):
    config = replace(TINY, augment=augment, out=str(tmp_path / "full"), save_every=2)
    full = train(config, views=OwnImages(FORMS["dict"])).state_dict()
    part = replace(config, out=str(tmp_path / "part"), max_steps=2)
    train(part, views=OwnImages(FORMS["dict"]))
    resumed = train(replace(part, max_steps=0), views=OwnImages(FORMS["dict"])).state_dict()
    assert all(torch.equal(full[name], resumed[name]) for name in full)
    lines = (tmp_path / "full" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["match_acc"] is not None for line in lines)


@pytest.mark.parametrize("form", ["Pillow", "array", "tensor"])
def test_pairs_of_views_may_be_bytes(form):
    class Pairs(OwnImages):
        def __getitem__(self, index):
            return super().__getitem__(index), super().__getitem__(index)

    for batch in batch_list(Pairs(FORMS[form])):
        assert batch["im_q"].dtype == torch.uint8 and batch["im_q"].shape == (4, 3, 40, 48)


def one_bad(bad):
    images = [np.full((40, 48, 3), 9, np.uint8)] * 12
    return [*images[:7], bad, *images[8:]]


@pytest.mark.parametrize("bad", [None, 3, np.zeros((5, 40, 48)), np.full((9, 9, 3), 7.0), "x.jpg"])
def test_an_item_that_is_no_image_is_replaced_and_reported(bad):
    found = [error for batch in batch_list(one_bad(bad), last=3) for error in batch["bad"]]
    assert len(found) == 1 and found[0][0] == 7 and found[0][1].startswith("item 7: ")


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ()


UNUSABLE = {
    "iterator": iter([1]),
    "iterable dataset": Stream(),
    "loader": torch.utils.data.DataLoader(one_bad(3)),
    "path": "images/",
    "empty": [],
    "nothing": [None] * 12,
    "number": [3] * 12,
    "normalized": [torch.randn(3, 32, 32)] * 12,
    "channels": [np.zeros((5, 32, 32), np.uint8)] * 12,
    "text": ["image.jpg"] * 12,
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_dataset_ends_with_one_line_and_nothing_is_written(kind, tmp_path):
    with pytest.raises(UsageError, match="^views: ") as error:
        train(replace(TINY, out=str(tmp_path / "out")), views=UNUSABLE[kind])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_pairs_that_do_not_fit_end_with_one_line(tmp_path):
    pairs = [(torch.rand(3, 32, 32),) * 2] * 7 + [None] + [(torch.rand(3, 40, 40),) * 2] * 4
    with pytest.raises(UsageError, match="item 7 of the views|several sizes") as error:
        train(replace(TINY, out=str(tmp_path / "out")), views=pairs)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def saved_split(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("splits")
    images = [OwnImages(FORMS["Pillow"])[i] for i in range(12)]
    split = datasets.Dataset.from_dict({"img": images, "label": list(range(12))})
    split.save_to_disk(folder / "one")
    datasets.DatasetDict(train=split, test=split).save_to_disk(folder / "two")
    datasets.DatasetDict(val=split).save_to_disk(folder / "val")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder / "text")
    return folder, split


def test_a_hugging_face_split_in_python_and_on_disk(saved_split, tmp_path):
    folder, split = saved_split
    expected = batch_list(split)
    roots = ("one", "two", "two/test", "val/val")
    others = [build_views(replace(TINY, data_root=f"hf:{folder}/{name}")) for name in roots]
    for other in [split.with_format("numpy"), split.with_format("torch"), *others]:
        for a, b in zip(expected, batch_list(other), strict=True):
            assert same_views(a, b)
    train(replace(TINY, out=str(tmp_path / "out"), data_root=f"hf:{folder}/two", max_steps=1))
    selected = replace(TINY, data_root=f"hf:{folder}/one", include="item 1*")
    assert len(build_views(selected)) == 3  # 1, 10, 11


@pytest.mark.parametrize("name", ["missing", "val", "text", ""])
def test_a_wrong_split_ends_with_one_line(saved_split, name):
    with pytest.raises(UsageError) as error:
        open_source(f"hf:{saved_split[0]}/{name}")
    assert "\n" not in str(error.value)

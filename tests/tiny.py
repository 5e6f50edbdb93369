"""The config of a training that takes seconds; tests replace single fields."""

from densecl.config import Config

TINY = Config(
    backbone="resnet18-layer2",
    image_size=32,
    batch_size=4,
    queue_len=12,
    dim=8,
    hidden=16,
    workers=0,
    threads=1,
    epochs=2,
    log_every=1,
    momentum=0.9,
    lr=0.01,
)

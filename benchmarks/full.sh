#!/usr/bin/env bash
# One row of the paper's table in full, for whoever has the GPUs: pre-training, extraction, VOC detection and segmentation with five trials each;
# the two transfers end in a table "paper / ours". A second call goes on where the first one stopped. Not run by us: it takes eight GPUs for days.
#
#     bash benchmarks/full.sh ROW          # 1 to 7, as in README's table
#     DRY=1 bash benchmarks/full.sh ROW    # print the commands and end
#
# GPUS (8), COCO (data/coco/train2017), IMAGENET (data/imagenet/train), VOC (VOCdevkit) and OUT (runs/full) may be set in the environment.
set -euo pipefail
names=("" supervised mocov2-coco-800ep densecl-coco-800ep densecl-coco-1600ep mocov2-imagenet-200ep densecl-imagenet-200ep densecl-imagenet-r101-200ep)
row=${1:-}
case "$row" in [1-7]) ;; *) echo "full.sh: give a row of the table, 1 to 7, not '${row}'" >&2; exit 2 ;; esac
name=${names[$row]} gpus=${GPUS:-8} voc=${VOC:-VOCdevkit} out=${OUT:-runs/full}/${names[$row]}
case "$name" in *coco*) data=${COCO:-data/coco/train2017} ;; *) data=${IMAGENET:-data/imagenet/train} ;; esac

go() { echo "+ $*"; [ -n "${DRY:-}" ] || "$@"; }
on_all() { go torchrun --standalone --nproc_per_node="$gpus" -m "$@"; }

weights=supervised                                   # row 1 is torchvision's file, not a run
if [ "$row" != 1 ]; then
    on_all densecl.train "$name" --data-root "$data" --out "$out/pretrain"
    weights=$out/backbone.pth
    go python -m densecl.weights extract "$out/pretrain/last.pt" "$weights"
fi
on_all densecl.detect --weights "$weights" --data-root "$voc" --preset voc --trials 5 --out "$out/detect"
on_all densecl.segment --weights "$weights" --data-root "$voc" --preset voc --trials 5 --out "$out/segment"

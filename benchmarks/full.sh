#!/usr/bin/env bash
# One row of the paper's table in full, for whoever has the GPUs: pre-training, extraction, VOC detection and segmentation with five trials each;
# the two transfers end in a table "paper / ours". A second call goes on where the first one stopped. Not run by us: it takes eight GPUs for days.
#
#     bash benchmarks/full.sh smoke        # first: every stage with 20 steps on random images, in minutes; one OK line per stage
#     bash benchmarks/full.sh ROW          # 1 to 7, as in README's table
#     DRY=1 bash benchmarks/full.sh ROW    # print the commands and end
#
# GPUS (8), COCO (data/coco/train2017), IMAGENET (data/imagenet/train), VOC (VOCdevkit) and OUT (runs/full) may be set in the environment.
# smoke needs no data: it writes random images to OUT/smoke, which it replaces. It uses all GPUs (or GPUS of them) and the networks of row 3;
# without a GPU two processes and small networks.
set -euo pipefail
names=("" supervised mocov2-coco-800ep densecl-coco-800ep densecl-coco-1600ep mocov2-imagenet-200ep densecl-imagenet-200ep densecl-imagenet-r101-200ep)
row=${1:-}
case "$row" in [1-7] | smoke) ;; *) echo "full.sh: give smoke or a row of the table, 1 to 7, not '${row}'" >&2; exit 2 ;; esac

if [ -z "${DRY:-}" ] || [ "$row" = smoke ]; then
    if ! error=$(python -c "import torch, densecl" 2>&1); then
        echo "full.sh: python cannot import torch and densecl (${error##*$'\n'}); activate the environment first: . .venv/bin/activate" >&2
        exit 2
    fi
fi

go() { echo "+ $*"; [ -n "${DRY:-}" ] || "$@"; }
on_all() { go torchrun --standalone --nproc_per_node="$gpus" -m "$@"; }

stage() {  # NAME FILE COMMAND...: run it, and check that FILE is there afterwards
    local name=$1 file=$2 start=$SECONDS
    shift 2
    if [ -n "${DRY:-}" ]; then "$@"; return; fi
    if "$@" > "$out/$name.log" 2>&1 && [ -e "$out/$file" ]; then
        echo "OK $name ($((SECONDS - start)) s)"
    else
        grep -a "^densecl: " "$out/$name.log" >&2 || tail -n 5 "$out/$name.log" >&2  # torchrun reports at length below it
        echo "full.sh: the stage $name failed; its output is in $out/$name.log" >&2
        exit 1
    fi
}

probe() {  # NAME...: the probes, one after the other
    local probe
    for probe in "$@"; do go python -m densecl.evaluate "$probe" --weights "$weights" --data-root "$voc" --image-size 64 --limit 16; done
    go touch "$out/probes"
}

smoke() {
    local found
    found=$(python -c "import torch; print(torch.cuda.device_count())")
    gpus=${GPUS:-$found} out=${OUT:-runs/full}/smoke
    voc=$out/data weights=$out/backbone.pth
    local images=$voc/VOC2012/JPEGImages per_gpu=32 train=() detect=(--log-every 5) segment=(--log-every 5)
    if [ "$found" = 0 ]; then
        gpus=2 per_gpu=4
        train=(--backbone resnet18 --image-size 64 --queue-len 64 --hidden 64 --dim 32 --workers 1 --threads 1)
        detect+=(--short-side 64 --roi-batch-size 8 --roi-size 4 --proposals 20 --precise-bn-iters 2 --workers 1 --threads 1)
        segment+=(--crop-size 64 --workers 1 --threads 1)
    fi
    if [ -z "${DRY:-}" ]; then rm -rf "$out"; mkdir -p "$out"; fi
    train+=(--data-root "$images" --batch-size $((per_gpu * gpus)) --lr "$(awk "BEGIN {print 0.3 * $per_gpu * $gpus / 256}")" --log-every 5 --save-every 5 --out "$out/pretrain")
    stage data data/VOC2012 go python "$(dirname "$0")/smoke_data.py" "$voc" $((48 + per_gpu * gpus))
    stage pretrain pretrain/last.pt on_all densecl.train densecl-coco-800ep --max-steps 10 "${train[@]}"
    stage resume pretrain/step-00000020.pt on_all densecl.train densecl-coco-800ep --max-steps 20 "${train[@]}"
    stage extract backbone.pth go python -m densecl.weights extract "$out/pretrain/last.pt" "$weights"
    stage probes probes probe match rank knn segment svm
    local transfer=(--weights "$weights" --data-root "$voc" --max-steps 20)
    stage detect detect/results.json on_all densecl.detect "${transfer[@]}" --batch-size $((2 * gpus)) "${detect[@]}" --out "$out/detect"
    stage segment segment/results.json on_all densecl.segment "${transfer[@]}" --batch-size $((2 * gpus)) "${segment[@]}" --out "$out/segment"
    stage doctor pretrain/doctor.png go python -m densecl.doctor "$out/pretrain"
    stage show matches.png go python -m densecl.show --weights "$weights" --images "$images/0000.jpg" "$images/0001.jpg" --out "$out/matches.png"
}

if [ "$row" = smoke ]; then smoke; exit; fi
name=${names[$row]} gpus=${GPUS:-8} voc=${VOC:-VOCdevkit} out=${OUT:-runs/full}/${names[$row]}
case "$name" in *coco*) data=${COCO:-data/coco/train2017} ;; *) data=${IMAGENET:-data/imagenet/train} ;; esac
weights=supervised                                   # row 1 is torchvision's file, not a run
if [ "$row" != 1 ]; then
    on_all densecl.train "$name" --data-root "$data" --out "$out/pretrain"
    weights=$out/backbone.pth
    go python -m densecl.weights extract "$out/pretrain/last.pt" "$weights"
fi
on_all densecl.detect --weights "$weights" --data-root "$voc" --preset voc --trials 5 --out "$out/detect"
on_all densecl.segment --weights "$weights" --data-root "$voc" --preset voc --trials 5 --out "$out/segment"

#!/bin/sh
# Fail when densecl/ is not what the notebooks export. Compares with a copy, so it also works on uncommitted edits.
# usage: no_drift.sh BIN   (BIN: the folder of nbdev_export)
set -eu
before=$(mktemp -d)
trap 'rm -rf "$before"' EXIT
cp -R densecl "$before/densecl"
"$1/nbdev_export"
if ! diff -ru --exclude=__pycache__ "$before/densecl" densecl; then
    echo "densecl/ differed from the notebooks: it is exported anew now. Look at the difference above and commit it." >&2
    exit 1
fi

#!/bin/sh
# Print nbs/index.ipynb as the README: hidden cells left out, paths as seen from the top folder, code marked as Python.
# usage: readme.sh BIN   (BIN: the folder of jupyter)
set -eu
"$1/jupyter" nbconvert --log-level ERROR --to markdown --stdout --RegexRemovePreprocessor.patterns='#\|\s*hide' nbs/index.ipynb |
    sed -E -e 's~\]\(([A-Za-z0-9_][A-Za-z0-9_./-]*\.[a-z]+(#[^) ]*)?)\)~](nbs/\1)~g' -e 's~\]\(\.\./~](~g' |
    awk '/^```/ { open = !open; if (open && $0 == "```") $0 = "```python" } 1' | cat -s

#!/bin/sh
# Print nbs/index.ipynb as the README: hidden cells left out, pictures and links as seen from the top folder, code marked as Python.
# usage: readme.sh BIN   (BIN: the folder of jupyter)
set -eu
"$1/jupyter" nbconvert --log-level ERROR --to markdown --stdout --RegexRemovePreprocessor.patterns='#\|\s*hide' nbs/index.ipynb |
    sed -e 's#(images/#(nbs/images/#g' -e 's#(\([0-9][0-9][a-z]*_[a-z]*\.ipynb\))#(nbs/\1)#g' -e 's#(\.\./#(#g' |
    awk '/^```/ { open = !open; if (open && $0 == "```") $0 = "```python" } 1' | cat -s

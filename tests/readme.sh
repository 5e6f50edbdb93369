#!/bin/sh
# Print nbs/index.ipynb as the README: hidden cells left out, picture paths as seen from the top folder.
# usage: readme.sh BIN   (BIN: the folder of jupyter)
set -eu
"$1/jupyter" nbconvert --log-level ERROR --to markdown --stdout --RegexRemovePreprocessor.patterns='#\|\s*hide' nbs/index.ipynb |
    sed -e 's#(images/#(nbs/images/#g' -e 's#src="images/#src="nbs/images/#g' -e '/^#| /d' | cat -s | sed -e '1{/^$/d;}'

# Every target starts from a bare clone: it makes .venv and installs densecl into it first.
PYTHON ?= python3
BIN := .venv/bin
NB := $(filter-out nbs/index.ipynb,$(wildcard nbs/[0-9]*.ipynb))

.PHONY: demo test test-long lab export readme site clean

demo: .venv/installed           ## a real DenseCL run on the embedded photographs, then a picture of its matches
	$(BIN)/python -m densecl.train demo

test: .venv/installed-dev       ## notebooks exported? notebooks run? processes, signals and the command line all right?
	sh tests/no_drift.sh $(BIN)
	$(BIN)/nbdev_test --n_workers 2
	$(BIN)/python -m pytest -q tests

test-long: .venv/installed-dev  ## what takes longer: the slow cells and the slow tests
	$(BIN)/nbdev_test --n_workers 2 --flags slow
	$(BIN)/python -m pytest -q tests --long

lab: .venv/installed-dev        ## the notebooks, in JupyterLab
	$(BIN)/jupyter lab nbs

export: .venv/installed-dev     ## after editing a notebook: densecl/ and README.md anew, notebooks cleaned
	$(BIN)/nbdev_export
	$(MAKE) readme
	$(BIN)/nbdev_clean

readme: .venv/installed-dev     ## README.md is nbs/index.ipynb without its hidden cells
	sh tests/readme.sh $(BIN) > README.md.new && mv README.md.new README.md

site: .venv/installed-dev       ## every chapter as a web page in _site/, readable offline
	$(BIN)/python tests/site_pages.py _site

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python settings.ini setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-dev: .venv/bin/python settings.ini setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ .venv/installed

clean:
	rm -rf .venv runs _proc _docs _site densecl.egg-info

# Each target is one line of work and stands alone. The first that runs makes .venv and installs; later ones find it done.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
CFG    ?= cfg_0
DATA   ?=
N      ?= $(if $(DATA),1500,1000)
B      := .venv/bin
NAME   := $(if $(DATA),$(basename $(patsubst %.gz,%,$(patsubst %.bz2,%,$(patsubst %.zip,%,$(lastword $(subst /, ,$(subst $() ,_,$(DATA)))))))),simulated)-$(N)
STORE  := datamount/parquet/$(NAME).arrow
TEST   := datamount/parquet/$(NAME)-fold0
DEMO   := datamount/runs/cfg_demo$(if $(DATA)$(filter-out 1000,$(N)),-$(NAME))
OVERRIDES ?= {}
RUN    ?=
SUB    := datamount/submission/$(NAME).parquet
.PHONY: help install demo test check export run train watch stop board lab lab-test image docs bench clean

help:     ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/:/'
install: .venv/installed  ## create .venv with the pinned environment (TORCH=... chooses another build of PyTorch)
demo: install  ## data → BPPs → papermill run → submission and score; DATA=file takes real data, N=number of sequences
	$B/ribo_data $(if $(DATA),"$(DATA)" --sample,--simulate) $(N) --out $(STORE) --holdout $(TEST)
	$B/ribo_bpp $(STORE)
	mkdir -p $(DEMO) && $B/papermill --no-progress-bar --log-output nbs/04_train.ipynb $(DEMO)/train.ipynb -p cfg cfg_demo -p data $(STORE) -p run $(DEMO)
	@ls $(DEMO)/*.png $(DEMO)/*.json $(DEMO)/train.ipynb
	$B/ribo_infer $(TEST)/test_sequences.csv --ckpt $(DEMO) --out $(SUB) --bpp datamount/bpp --figures $(DEMO)/figures
	$B/ribo_score $(SUB) $(TEST)/solution.parquet --test $(TEST)/test_sequences.csv --store $(STORE) --bpp datamount/bpp
	$B/ribo_score --runs $(DEMO) --report $(DEMO)/report.html
	@echo "open $(DEMO)/report.html in a browser: curves and scores of this run (predicted profiles: $(DEMO)/figures)"
test: .venv/lab  ## every notebook's lessons, then what does not fit in a cell
	$B/python .ci/notebooks.py test && $B/python -m pytest -q -n 2 tests
check: install  ## exported in step, notebooks clean, papermill's tag there, no back-edges
	PATH="$(CURDIR)/$B:$$PATH" .ci/check
export: install  ## nbs/ → ribo_nb/, and clean the notebooks
	$B/python .ci/notebooks.py export
run: export  ## execute all notebooks in place: their outputs are committed
	$B/python .ci/notebooks.py run
train: install  ## papermill run of CFG=cfg_0 on DATA=datamount/parquet/....arrow, in the background; run it again to go on
	@run=$$($B/ribo_train $(CFG) --dry-run --overrides '$(OVERRIDES)' $(if $(DATA),--data "$(DATA)") $(if $(RUN),--run "$(RUN)")) || exit 1; \
	mkdir -p "$$run"; \
	$$(command -v setsid) nohup $B/papermill --no-progress-bar --log-output --autosave-cell-every 30 nbs/04_train.ipynb "$$run/train.ipynb" -r cfg $(CFG) -r run "$$run" -r overrides '$(OVERRIDES)' $(if $(DATA),-r data "$(DATA)") > "$$run/papermill.log" 2>&1 < /dev/null & \
	echo $$! > "$$run/papermill.pid"; \
	echo "$(CFG) trains in the background, also when this terminal, browser or JupyterLab is closed"; \
	echo "  follow: make watch RUN=$$run        log: $$run/papermill.log        notebook: $$run/train.ipynb"; \
	echo "  stop:   make stop RUN=$$run         it saves first; the same make train goes on"
watch: install  ## progress, speed, time left and loss of the run of CFG
	$B/ribo_train --watch $(or $(RUN),datamount/runs/$(CFG))
stop: install  ## ask the run of CFG to save and stop
	$B/ribo_train --stop $(or $(RUN),datamount/runs/$(CFG))
board: install  ## the web page of tensorboard for all runs with tracker=tensorboard
	$B/python -c 'import tensorboard' 2>/dev/null || $B/uv pip install -q --python $B/python -c constraints.txt tensorboard
	$B/tensorboard --logdir datamount/runs
lab: .venv/lab  ## JupyterLab that keeps outputs when the browser closes; PORT=9999, ARGS='--no-browser' and the like
	$B/jupyter lab --notebook-dir nbs $(if $(PORT),--port $(PORT)) $(ARGS)
lab-test: .venv/lab  ## a real JupyterLab whose browser is away for a minute and a half; the rest of its tests are in `make test`
	LAB_TEST=1 $B/python -m pytest -q tests/test_lab.py
image:    ## the Docker image ribo_nb, which knows its commit; docker run -p 8888:8888 ribo_nb make lab
	docker build -t ribo_nb --build-arg CODE_VERSION="$$(git describe --always --exclude='*' --dirty=+)" .
docs: install  ## the book as HTML, in _docs/
	$B/jupyter nbconvert --to html --output-dir _docs $$($B/python .ci/notebooks.py)
bench: install  ## seconds, peak memory and sequences per second of each stage of the demo (bench/data.py, bench/bpp.py: each on its own)
	$B/python bench/demo.py
clean:    ## remove .venv and what is generated; data and runs in datamount/ stay
	rm -rf .venv _docs *.egg-info

.venv/installed: settings.ini setup.py constraints.txt
	test -x $B/python || $(PYTHON) -m venv .venv
	$B/python -c 'import torch' 2>/dev/null || $B/python -m pip install -q -c constraints.txt $(TORCH)
	$B/python -m pip install -q -c constraints.txt uv setuptools
	$B/uv pip install -q --python $B/python --no-build-isolation --compile-bytecode -c constraints.txt -e '.[dev]'
	$B/uv pip uninstall -q --python $B/python rfc3987-syntax  # optional, and 6 s slower to import than all the rest
	touch $@
.venv/lab: .venv/installed lab/jupyter_server_config.py
	$B/uv pip install -q --python $B/python --no-build-isolation -c constraints.txt -e '.[lab]'
	$B/uv pip uninstall -q --python $B/python rfc3987-syntax
	mkdir -p .venv/etc/jupyter
	ln -sf "$(CURDIR)/lab/jupyter_server_config.py" .venv/etc/jupyter/
	touch $@

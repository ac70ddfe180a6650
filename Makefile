# `make demo` and `make test` set up what they need; `make help` lists the rest.
PYTHON  ?= python3
VENV    ?= .venv
PY       = $(VENV)/bin/python
DEMO    ?= demo
WORKERS ?= auto

.PHONY: help setup demo test lint clean

help:            ## this list
	@grep -E '^[a-z]+: .*##|^[a-z]+:  *##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/'

setup: $(VENV)/ready  ## a virtual environment with everything in it

$(VENV)/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

RUN     = $(DEMO)/000-DiT-S-2

demo: $(VENV)/ready  ## train on the digits, sample, make a set of samples and judge it
	rm -rf $(DEMO) && mkdir $(DEMO)
	$(PY) evaluate.py reference digits-held-out --features pixels --output $(DEMO)/held-out.npz
	$(PY) train.py --data-path digits --image-size 8 --num-classes 10 --vae none \
	    --model DiT-S/2 --depth 4 --hidden-size 96 --num-heads 4 \
	    --global-batch-size 64 --lr 4e-3 --ema-decay 0.997 --max-steps 3000 \
	    --log-every 250 --ckpt-every 1000 --sample-every 500 --num-workers 0 --results-dir $(DEMO) \
	    --eval-every 500 --eval-reference $(DEMO)/held-out.npz --eval-features pixels --eval-samples 359 \
	    --eval-cfg-scale 1.5 --eval-sampling-steps ddim25
	$(PY) sample.py --ckpt $(RUN)/checkpoints/0003000.pt --cfg-scale 1.5 \
	    --samples-per-label 10 --trajectory --output $(DEMO)/digits.png
	$(PY) sample_ddp.py --ckpt $(RUN)/checkpoints/0003000.pt --cfg-scale 1.5 \
	    --num-fid-samples 500 --per-proc-batch-size 250 --sample-dir $(DEMO)/samples
	$(PY) -m tools.score_digits $(DEMO)/samples/*.npz
	$(PY) -m tools.plot_run $(RUN) --output $(DEMO)/training.png
	@echo "Look at $(DEMO)/digits.png (a digit a row), $(DEMO)/digits.gif (from noise to digits) and"
	@echo "$(DEMO)/training.png (loss and distance to real digits while it trained)."

test: $(VENV)/ready  ## the test suite, on all cores; one kind of test: make test TESTS="-m unit"
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) $(TESTS)

lint: $(VENV)/ready  ## style
	$(VENV)/bin/ruff check .

clean:           ## remove what was made, not the virtual environment
	rm -rf $(DEMO) results samples sample.png sample.gif .pytest_cache .ruff_cache

# make demo: train and evaluate a RedNet in minutes.   make test: lint and every test.   Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
RUN := $(VENV)/bin/python

.PHONY: setup demo test kernels lint format clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt pyproject.toml
	@echo "Setting up $(VENV): torch with its CUDA libraries is a download of several GB, once."
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r requirements.txt -e ".[dev]"
	touch $@

demo: setup
	$(RUN) train.py recipe=demo train.resume=never
	$(RUN) eval.py checkpoint=runs/demo-rednet26
	@echo
	@echo "That was RedNet-26 on 1797 handwritten digits. The run lies in runs/demo-rednet26; its curves:"
	@echo "    $(VENV)/bin/tensorboard --logdir runs"
	@echo "Try next, after 'source $(VENV)/bin/activate':"
	@echo "    python train.py recipe=demo model=resnet26"
	@echo "    python train.py -m recipe=demo model.kernel_size=3,5,7 train.epochs=2 name=kernel-sizes"

test: lint
	$(RUN) -m pytest --numprocesses=2

# every kernel of the RedNets, of Table 6 and of the dense models, for every GPU from sm_80 on: hours of one core, no GPU.
# Started again it takes what is in Triton's cache.
kernels: setup
	$(RUN) scripts/check_kernels.py --models rednet26 rednet38 rednet50 rednet101 rednet152 ablation --dtype bf16 fp16 fp32
	$(RUN) scripts/check_kernels.py --models dense --dtype bf16 fp16 fp32 --size 800 1280 --batch 2

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache

PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
RUN := $(VENV)/bin/python

.PHONY: help setup demo test kernels lint format clean

help: ## this list
	@awk '/^[a-z]+:.* ## / { name = $$1; sub(/:.*/, "", name); sub(/.* ## /, ""); printf "make %-9s%s\n", name, $$0 }' \
		$(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.ready ## set up .venv (downloads several GB, once); the targets below do it first, except clean

$(VENV)/.ready: requirements.txt pyproject.toml
	@echo "Setting up $(VENV): torch with its CUDA libraries is a download of several GB, once."
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r requirements.txt -e ".[dev]"
	touch $@

demo: setup ## train RedNet-26 on 1797 handwritten digits and evaluate it: minutes on a CPU
	$(RUN) train.py recipe=demo train.resume=never
	$(RUN) eval.py checkpoint=runs/demo-rednet26
	@echo
	@echo "That was RedNet-26 on 1797 handwritten digits. The run lies in runs/demo-rednet26; its curves:"
	@echo "    $(VENV)/bin/tensorboard --logdir runs"
	@echo "Try next, after 'source $(VENV)/bin/activate':"
	@echo "    python train.py recipe=demo model=resnet26"
	@echo "    python train.py -m recipe=demo model.kernel_size=3,5,7 train.epochs=2 name=demo-kernel-sizes"

test: lint ## lint, then run every test
	$(RUN) -m pytest --numprocesses=2

# those of the RedNets, of Table 6 and of the dense models; started again it takes what is in Triton's cache
kernels: setup ## compile every Triton kernel for every GPU from sm_80 on: hours of one core, needs no GPU
	$(RUN) scripts/check_kernels.py --models rednet26 rednet38 rednet50 rednet101 rednet152 ablation --dtype bf16 fp16 fp32
	$(RUN) scripts/check_kernels.py --models dense --dtype bf16 fp16 fp32 --size 800 1280 --batch 2

lint: setup ## check format, style and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: setup ## format the code and fix what can be fixed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean: ## remove build products and tools' caches; .venv and runs stay
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache

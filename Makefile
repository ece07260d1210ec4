# make env          .venv with everything (done by the other targets too)
# make quickstart   train the quickstart; ARGS='--steps 5' overrides any key of its configuration
# make base-policy  train the policy that the quickstart starts from
# make test         run the tests; ARGS='tests/launcher -x' goes to pytest
# make test-layouts run the rest of the layout matrix: every loss at every layout, and other long suites
# make lint         style and import contracts

PBSD := .venv/bin/pbsd
ARGS ?=

.PHONY: env quickstart base-policy test test-layouts lint

env:
	@tools/make_env.sh

quickstart: env
	$(PBSD) train configs/quickstart.yaml $(ARGS)

base-policy: env
	$(PBSD) train configs/base_policy.yaml $(ARGS)

# One thread per process: the tests start several on few cores. Nothing is fetched or compiled.
test test-layouts: export OMP_NUM_THREADS = 1
test test-layouts: export HF_HUB_OFFLINE = 1
test test-layouts: export TORCH_COMPILE_DISABLE = 1
test: env
	.venv/bin/python -m pytest $(ARGS)

test-layouts: env
	.venv/bin/python -m pytest -m layouts $(ARGS)

lint: env
	.venv/bin/ruff check .
	.venv/bin/lint-imports

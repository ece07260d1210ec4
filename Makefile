# make env          .venv with everything (done by the other targets too)
# make quickstart   train the quickstart; ARGS='--steps 5' overrides any key of its configuration
# make base-policy  train the policy that the quickstart starts from
# make test         run the tests; ARGS='tests/launcher -x' goes to pytest
# make test-slow    run the long suites: whole runs, every loss at every layout, memory, dynamic context parallelism
# make lint         style and import contracts

PBSD := .venv/bin/pbsd
ARGS ?=

.PHONY: env quickstart base-policy test test-slow lint

env:
	@tools/make_env.sh

quickstart: env
	$(PBSD) train configs/quickstart.yaml $(ARGS)

base-policy: env
	$(PBSD) train configs/base_policy.yaml $(ARGS)

# One thread per process: the tests start several on few cores. Nothing is fetched or compiled.
test test-slow: export OMP_NUM_THREADS = 1
test test-slow: export HF_HUB_OFFLINE = 1
test test-slow: export TORCH_COMPILE_DISABLE = 1
test: env
	.venv/bin/python -m pytest $(ARGS)

test-slow: env
	.venv/bin/python -m pytest -m slow $(ARGS)

lint: env
	.venv/bin/ruff check .
	.venv/bin/lint-imports

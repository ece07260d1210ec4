# make env          .venv with everything (done by the other targets too)
# make quickstart   train the quickstart; ARGS='--steps 5' overrides any key of its configuration
# make base-policy  train the policy that the quickstart starts from
# make test         run the tests; ARGS='tests/launcher -x' goes to pytest
# make test-slow    run the long suites: whole runs, every loss at every layout, memory, dynamic context parallelism
# make test-sglang  run the tests with real SGLang servers, in an environment of their own (.venv-sglang)
# make lint         style and import contracts

PBSD := .venv/bin/pbsd
ARGS ?=

.PHONY: env quickstart base-policy test test-slow test-sglang lint

env:
	@tools/make_env.sh

quickstart: env
	$(PBSD) train configs/quickstart.yaml $(ARGS)

base-policy: env
	$(PBSD) train configs/base_policy.yaml $(ARGS)

# One thread per process: the tests start several on few cores. Nothing is fetched or compiled.
test test-slow test-sglang: export OMP_NUM_THREADS = 1
test test-slow test-sglang: export HF_HUB_OFFLINE = 1
test test-slow test-sglang: export TORCH_COMPILE_DISABLE = 1
test: env
	.venv/bin/python -m pytest $(ARGS)

test-slow: env
	.venv/bin/python -m pytest -m slow $(ARGS)

test-sglang: env
	@tools/make_sglang_env.sh
	.venv/bin/python -m pytest -m sglang tests/sglang_server $(ARGS)

lint: env
	.venv/bin/ruff check .
	.venv/bin/lint-imports

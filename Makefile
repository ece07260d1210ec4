# make env          .venv with everything (done by the other targets too)
# make quickstart   train the quickstart; ARGS='--steps 5' overrides any key of its configuration
# make base-policy  train the policy that the quickstart starts from
# make test         run the tests, two files at a time; ARGS='tests/launcher -x' goes to pytest
# make test-slow    run the long suites: whole runs, every loss at every layout, memory, dynamic context parallelism
# make test-sglang  run the tests with real SGLang servers, in an environment of their own (.venv-sglang)
# make test-slurm   run the tests with a real Slurm, a cluster of namespaces on this machine; as root, on Debian
# make lint         style and import contracts

PBSD := .venv/bin/pbsd
ARGS ?=
# In the order of their folders, which begins with those that take long; see tests/conftest.py.
TWO_AT_A_TIME := -n 2 --dist loadscope --no-loadscope-reorder

.PHONY: env quickstart base-policy test test-slow test-sglang test-slurm lint

env:
	@tools/make_env.sh

quickstart: env
	$(PBSD) train configs/quickstart.yaml $(ARGS)

base-policy: env
	$(PBSD) train configs/base_policy.yaml $(ARGS)

# One thread per process: the tests start several on few cores. Nothing is fetched or compiled.
test test-slow test-sglang test-slurm: export OMP_NUM_THREADS = 1
test test-slow test-sglang test-slurm: export HF_HUB_OFFLINE = 1
test test-slow test-sglang test-slurm: export TORCH_COMPILE_DISABLE = 1
test: env
	.venv/bin/python -m pytest $(TWO_AT_A_TIME) $(ARGS)

test-slow: env
	.venv/bin/python -m pytest -m slow $(TWO_AT_A_TIME) $(ARGS)

test-sglang: env
	@tools/make_sglang_env.sh
	.venv/bin/python -m pytest -m sglang tests/sglang_server $(ARGS)

test-slurm: env
	@tools/install_slurm.sh
	.venv/bin/python -m pytest -m slurm tests/slurm_cluster tests/launcher/slurm $(ARGS)

lint: env
	.venv/bin/ruff check .
	.venv/bin/lint-imports

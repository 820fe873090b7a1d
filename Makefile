# SPDX-License-Identifier: Apache-2.0
# The short commands. Each sets up what it needs first (scripts/setup.sh); that takes no time when nothing changed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench soak study clean

MINUTES ?= 60

ENV = . scripts/env.sh

help: ## what the targets do
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: ## .venv with everything that the node needs; on top of ROS 2 where one is sourced
	@scripts/setup.sh node

demo: ## runs the detector over the demo bag; leaves detections.mcap, overview.png and summary.json in out/demo
	@scripts/setup.sh node
	@$(ENV) && python -m qdbev_ros.demo

test: ## all tests that this machine can run; names the rest and why
	@scripts/setup.sh test
	@$(ENV) && python scripts/run_tests.py

lint: ## ruff and mypy
	@scripts/setup.sh test
	@$(ENV) && ruff check . && ruff format --check . && mypy

bench: ## time and memory of nano and tiny on every engine of this machine, in turns; leaves out/bench.json
	@scripts/setup.sh test
	@$(ENV) && python benchmarks/engines.py

soak: ## MINUTES=60 of the node over a bag without an end; memory, latency and losses in out/soak
	@scripts/setup.sh test
	@$(ENV) && python -m qdbev_ros.soak --minutes $(MINUTES) $(SOAK)

study: ## what each step of the compression is worth: data, teacher, every row, tables and plots in docs/study; resumable
	@scripts/setup.sh test
	@$(ENV) && qdbev synth data/town --split train --scenes 240 --seed 1
	@$(ENV) && qdbev synth data/town --split val --scenes 12 --seed 1000
	@$(ENV) && qdbev train config/train/nano_town.yaml
	@$(ENV) && qdbev study config/study/nano_town.yaml

clean: ## removes .venv and what was built; keeps out/, data/ and the message packages in the cache folder
	rm -rf .venv .venv.lock build install log .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

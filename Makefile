# Two commands on a fresh machine: `make quickstart` and `make test`. The first run makes .venv; later runs start at once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= quickstart-out
UV_PIN = $(shell sed -n 's/^\(uv==[^ ;]*\).*/\1/p' constraints.txt)

# MuJoCo renders through EGL (Mesa's software driver where there is no GPU); OpenCV, which robosuite imports, links libGL and GLib.
GL_PACKAGES := libegl1 libgl1 libgl1-mesa-dri libglib2.0-0
GL_CHECK := MUJOCO_GL=egl $(BIN)/python -c 'import cv2, mujoco; mujoco.GLContext(16, 16).make_current()'

# The tests talk to an independent DDS, Fast DDS, through a small C++ program. Where it cannot be had they skip and say so.
PEER_PACKAGES := g++ libfastrtps-dev libfastcdr-dev
PEER_CHECK := printf '\#include <%s>\n' fastrtps/utils/IPLocator.h fastcdr/Cdr.h | g++ -E -x c++ -

# They also answer at the page of `label prefer` in a real browser.
BROWSER_PACKAGES := chromium
BROWSER_CHECK := command -v chromium chromium-browser google-chrome google-chrome-stable chrome

# apt-get install of the packages $(1), where apt-get can run as root; otherwise nothing.
define apt_install
  sudo=''
  [ "$$(id -u)" = 0 ] || sudo='sudo -n'
  if command -v apt-get >/dev/null && { [ -z "$$sudo" ] || sudo -n true 2>/dev/null; }; then
    echo 'Installing system packages ($(1)) ...'
    $$sudo apt-get update -qq
    $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1) >/dev/null
  fi
endef

.PHONY: help install quickstart test lint format lock clean

help:
	@echo 'make quickstart   the whole loop, offline, into $(OUT)/ (OUT=DIR for another place)'
	@echo 'make test         every test, on the CPU'
	@echo 'make lint         ruff and pyright'
	@echo 'make lock         resolve constraints.txt anew from pyproject.toml'
	@echo 'make install      only make $(VENV)'
	@echo 'make clean        remove $(VENV)'

install: $(STAMP)

quickstart: $(STAMP)
	@exec $(BIN)/embodied quickstart --out '$(OUT)'

test: $(STAMP)
	@if ! { $(PEER_CHECK); } >/dev/null 2>&1; then
	$(call apt_install,$(PEER_PACKAGES)) || echo 'Went on without Fast DDS; the tests that need it say so.'
	fi
	if ! $(BROWSER_CHECK) >/dev/null; then
	$(call apt_install,$(BROWSER_PACKAGES)) || echo 'Went on without a browser; the tests that need it say so.'
	fi
	exec $(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(STAMP)
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras --no-annotate --no-header \
	  --no-emit-index-url --no-emit-find-links --output-file constraints.txt pyproject.toml
	git --no-pager diff --stat -- constraints.txt

clean:
	rm -rf $(VENV)

# uv only speeds the download up; what is installed is exactly constraints.txt. --no-deps because the file is complete, and because
# robosuite asks for packages that are left out of it (see [tool.uv] in pyproject.toml).
$(STAMP): constraints.txt pyproject.toml Makefile
	@if ! [ -x $(BIN)/python ]; then
	  for python in python3 python3.13 python3.12 python3.11 none; do
	    if [ $$python = none ]; then
	      echo 'No Python 3.11 to 3.13 with the venv module was found. Debian and Ubuntu: apt-get install -y python3 python3-venv' >&2
	      exit 2
	    fi
	    if $$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then break; fi
	  done
	  echo "Making $(VENV) with $$($$python -V) ..."
	  rm -rf $(VENV)
	  $$python -m venv $(VENV)
	fi
	echo 'Installing the packages of constraints.txt (about 7 GB on disk, most of it PyTorch) ...'
	$(BIN)/uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet --disable-pip-version-check '$(UV_PIN)'
	if ! $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r constraints.txt; then
	  echo 'uv could not; trying pip, which also reads pip.conf ...'
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints.txt
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	if ! $(GL_CHECK) >/dev/null 2>&1; then
	$(call apt_install,$(GL_PACKAGES))
	  if ! error=$$($(GL_CHECK) 2>&1); then
	    echo "MuJoCo cannot render without a display: $$(tail -n 1 <<<"$$error")" >&2
	    echo 'Install the system GL library and run make again: sudo apt-get install -y $(GL_PACKAGES)' >&2
	    exit 2
	  fi
	fi
	touch $@

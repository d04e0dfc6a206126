# make all         every run of a recipe, side by side, then the report
# make help        all targets and variables

RESULTS   ?= results
SEED      ?= 0
VENV      ?= .venv
# An interpreter given here is used as it is; without one, the one in VENV is.
PYTHON    ?= $(if $(VENV),$(VENV)/bin/python,python3)
# What .venv is made with; 3.11 or newer.
BASE      ?= python3
PIP_ARGS  ?=
# Flags of every training script: set one here (EPOCHS=5) or write any in FLAGS="--lr 1e-3".
FLAGS     ?=
OVERWRITE ?=
# 1: the teacher's outputs are computed once for kd, kd-only and all sweeps of them.
CACHE     ?=
OBJECTIVE ?=

# A data set that is typed without a recipe has its own defaults, and its own folder.
ifndef DATASET
RECIPE    ?= digits
endif

# Make cannot have targets with spaces; everything else may have them.
ifneq ($(words $(RESULTS)),1)
$(error RESULTS=$(RESULTS): give a folder without spaces)
endif
comma  := ,
NAME   := $(or $(RECIPE),$(DATASET))
DIR    := $(RESULTS)/$(NAME)
MANY   := stats teachers sweep-%
NUMBERS := $(or $(SEEDS),$(if $(filter $(MANY),$(MAKECMDGOALS)),0 1 2 3 4,$(SEED)))
NUMBERS := $(subst $(comma), ,$(NUMBERS))

quote   = '$(subst ','\'',$(1))'
typed   = $(if $(value $(1)),--$(2)=$(call quote,$(value $(1))))
GRID    = $(call typed,RECIPE,recipe) --results-dir=$(RESULTS) \
          $(call typed,DATASET,dataset) $(call typed,DATA_DIR,data-dir) \
          $(call typed,EPOCHS,epochs) $(call typed,BATCH_SIZE,batch-size) \
          $(call typed,LABELS,labels) $(call typed,VIEWS,views) \
          $(call typed,DEVICE,device) $(call typed,PRECISION,precision) $(FLAGS)
AGAIN   = $(if $(filter-out 0,$(OVERWRITE)),--overwrite,--resume)
KEPT    = $(if $(filter-out 0,$(CACHE)),--cache)
READY   = $(if $(filter file,$(origin PYTHON)),$(if $(VENV),$(VENV)/installed))

# ---- the runs: a target is the final.json of a run, written last ----------------------

RUNS     := $(shell $(BASE) recipes.py --runs $(NAME))
RECIPES  := $(shell $(BASE) recipes.py --names)
ifneq ($(filter-out $(RECIPES),$(RECIPE)),)
$(error RECIPE=$(RECIPE): no such recipe; choose from $(RECIPES))
endif
REPORTS  := tinyimagenet-meanteacher tinyimagenet-kd cifar10-he-max cifar10-xavier-avg svhn-xavier-avg
# A run that is not named here is distill.py --objective <run>, from the teacher of its seed.
COMMAND_teacher             = train_teacher.py
COMMAND_student             = train_student.py
COMMAND_kd                  = distill.py --objective kd $(KEPT)
COMMAND_kd-only             = distill.py --objective kd-only $(KEPT)
COMMAND_kd-ema              = distill.py --objective kd --teacher ema
COMMAND_mean-teacher        = distill.py --objective consistency
COMMAND_mean-teacher-no-ema = distill.py --objective consistency --ema-decay 0
ALONE    := teacher student kd-ema mean-teacher mean-teacher-no-ema
SINGLE   := teacher student kd kd-only kd-ema mean-teacher mean-teacher-no-ema
KNOWN    := $(sort $(RUNS) $(SINGLE) $(OBJECTIVE))
finals    = $(foreach seed,$(NUMBERS),$(foreach run,$(1),$(DIR)/$(run)-s$(seed)/final.json))

# As many runs at once as there are cores, a thread each, unless -j is typed. make -j1 gives
# the same bits.
CHAINS   := all stats reports $(RECIPES)
ifneq ($(filter $(CHAINS) test,$(or $(MAKECMDGOALS),all)),)
QUIET    := 1
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
endif
endif

# Its time changes when what is typed does: then every run is asked whether it is still the
# one that is wanted, which a finished run of other settings refuses.
STAMP    := $(DIR)/.typed
LINE      = $(strip $(GRID) $(KEPT))
$(STAMP): FORCE
	@mkdir -p $(DIR)
	@echo $(call quote,$(LINE)) | cmp -s - $@ || echo $(call quote,$(LINE)) > $@

# A single run takes a finished teacher as it is; where there is none, FLAGS are its too.
there      = $(if $(QUIET),,$(wildcard $(DIR)/teacher-s$(1)/final.json))
teacher_of = $(if $(call there,$(1)),,$(DIR)/teacher-s$(1)/final.json)

# $(1): run, $(2): seed. Side by side, a run prints its last line alone; all are in its log.
define rule
$(DIR)/$(1)-s$(2)/final.json: $(STAMP) recipes.py $(READY) $(if $(filter-out 0,$(OVERWRITE)),FORCE) \
    $(if $(filter $(1),$(ALONE)),,$(call teacher_of,$(2)))
	@$(if $(QUIET),echo "$(1)-s$(2) begins; its log is $$(@D).log")
	@$$(ONE) $(PYTHON) $(or $(COMMAND_$(1)),distill.py --objective $(1)) $$(GRID) \
	  --seed $(2) $(AGAIN) $$(LOG)
	@touch -c $$@
endef
LOG       = $(if $(QUIET),> $(@D).log && tail -n 1 $(@D).log)
ONE       = $(if $(QUIET),OMP_NUM_THREADS=1 TQDM_DISABLE=1)
$(foreach seed,$(NUMBERS),$(foreach run,$(KNOWN),$(eval $(call rule,$(run),$(seed)))))

.PHONY: $(CHAINS) $(SINGLE) objective report html publish evidence teachers setup test test-code test-smoke test-dev \
        lint dev coverage bench soak notebook help clean FORCE \
        sweep-alpha sweep-temperature sweep-epochs sweep-ema sweep-labels sweep-views sweep-mlp
.PRECIOUS: $(call finals,$(KNOWN))
.DEFAULT_GOAL := all

all: $(call finals,$(RUNS))  ## the chain of a recipe, for SEED or SEEDS, and its report
	@$(PYTHON) report.py --recipe $(NAME) --results-dir=$(RESULTS)

stats: all  ## the same for five seeds, or SEEDS

$(SINGLE): %: $(READY)
	@$(MAKE) --no-print-directory $(call finals,$@)

objective: $(call finals,$(OBJECTIVE))  ## one run of OBJECTIVE=x, and the report
	@test -n "$(OBJECTIVE)" || { \
	  echo "error: OBJECTIVE is empty; give one: make objective OBJECTIVE=kd" >&2; exit 2; }
	@$(PYTHON) report.py --recipe $(NAME) --results-dir=$(RESULTS)

$(filter-out all,$(RECIPES)):
	@$(MAKE) --no-print-directory all RECIPE=$@

reports:  ## the recipes of all five reports, one after the other
	@failed=; for recipe in $(REPORTS); do \
	  $(MAKE) --no-print-directory all RECIPE=$$recipe || failed="$$failed $$recipe"; done; \
	if [ -n "$$failed" ]; then echo "error: not finished:$$failed" >&2; exit 2; fi

report: $(READY)  ## table and picture of what is finished
	@$(PYTHON) report.py --recipe $(NAME) --results-dir=$(RESULTS)

html: $(READY)  ## results/report.html: all of it in one file
	$(PYTHON) report.py html --results-dir=$(RESULTS)

# ---- one script over a grid: make sweep-alpha SEEDS="0 1 2" ----------------------------

SWEEPER = $(PYTHON) sweep.py --seeds "$(NUMBERS)"
LENGTHS = 1,2,4,8,16
COUNTS  = 200,500,1000,2000,all
# An epoch of few labels is few steps: of the digits as many epochs as make about 840 of them.
PAIRED  = labels+epochs=200+844,500+281,1000+120,2000+56,all+12
# A decay is reached where (1 + t) / (10 + t) is: 0.97 at update 290, 0.99 at 890.
DECAYS  = 0,0.9,0.97,0.99
MLPS    = mlp-13x3,mlp-3x13,mlp-13x2,mlp-2x13,mlp-13x4,mlp-4x13,mlp-12x3,mlp-3x12,mlp-14x3,mlp-3x14
SWEPT   = $(RESULTS)/sweeps/epochs-teacher/$(NAME)
each    = $(subst $() $(),$(comma),$(foreach n,$(subst $(comma), ,$(1)),$(SWEPT)/epochs=$(n)-s{seed}/best.pt))

teachers: $(call finals,teacher)  ## the teacher of every seed of SEEDS

sweep-alpha: teachers  ## weight of the teacher
	$(SWEEPER) --over alpha=0,0.1,0.3,0.5,0.7,0.9,1 -- distill.py --objective kd $(GRID) $(KEPT)

sweep-temperature: teachers  ## of both sides
	$(SWEEPER) --over temperature=1,2,4,8,16 -- distill.py --objective kd $(GRID) $(KEPT)

sweep-epochs: $(READY)  ## of the teacher, and what its student makes of it
	$(SWEEPER) --name epochs-teacher --over epochs=$(LENGTHS) -- train_teacher.py $(GRID)
	$(SWEEPER) --name epochs-student --over $(call quote,teacher=$(call each,$(LENGTHS))) \
	  -- distill.py --objective kd $(GRID)

sweep-ema: $(READY)  ## decay of the mean teacher
	$(SWEEPER) --over ema-decay=$(DECAYS) -- distill.py --objective consistency $(GRID)

sweep-labels: $(READY)  ## labels alone, and mean teacher with the rest unlabelled
	$(SWEEPER) --name labels-student --over $(if $(filter digits,$(NAME)),$(PAIRED),labels=$(COUNTS)) \
	  -- train_student.py $(GRID)
	$(SWEEPER) --name labels-mean-teacher --over labels=$(COUNTS) \
	  -- distill.py --objective consistency --class-weight 0.1 $(GRID)

sweep-views: teachers  ## how many views an image has; 0: a fresh one each epoch
	$(SWEEPER) --name views-student --over views=0,1,2,4,8 -- train_student.py $(GRID)
	$(SWEEPER) --name views-kd --over views=0,1,2,4,8 -- distill.py --objective kd $(GRID)

sweep-mlp: $(READY)  ## hidden layers × nodes of report 000, read both ways
	$(SWEEPER) --name mlp --over arch=$(MLPS) -- train_student.py $(GRID)

# ---- installing, testing, publishing ---------------------------------------------------

setup: $(READY)  ## only install, into $(VENV)

$(VENV)/installed: requirements.txt constraints.txt
	@$(BASE) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; give one with BASE=python3.11" >&2; exit 2; }
	@echo "installing PyTorch into $(VENV), some minutes"
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(BASE) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) \
	  -r requirements.txt -c constraints.txt
	@touch $@

test: test-code test-smoke  ## set up and run the tests, two parts side by side

test-code: $(READY)
	$(PYTHON) -m pytest -q --ignore=tests/test_smoke.py

test-smoke: $(READY)
	$(PYTHON) -m pytest -q tests/test_smoke.py

lint: dev  ## ruff
	$(PYTHON) -m ruff check .

test-dev: dev  ## the tests that need tools for development
	$(PYTHON) -m pytest -q tests/test_notebook.py tests/test_ema.py -k "notebook or timm"

coverage: dev  ## which lines of the scripts the tests reach
	$(PYTHON) -m coverage erase
	$(PYTHON) -m coverage run -m pytest -q
	$(PYTHON) -m coverage combine -q
	$(PYTHON) -m coverage report

# On first use of the targets above.
dev: $(READY)
	@$(PYTHON) -c "import coverage, ruff, timm, nbclient, nbformat, ipykernel" >/dev/null 2>&1 || \
	  $(PYTHON) -m pip install --disable-pip-version-check -q $(PIP_ARGS) \
	  -r requirements-dev.txt -c constraints.txt

publish: $(READY)  ## small files of a RECIPE, or of a SWEEP, to published
	$(PYTHON) report.py publish --recipe $(NAME) --results-dir=$(RESULTS) $(call typed,SWEEP,sweep)

evidence: $(READY)  ## the pages of results/published, from what lies there
	$(PYTHON) tests/evidence.py

bench: dev  ## the speed table, on CIFAR-10 as class folders
	$(PYTHON) tests/bench.py --data-dir=$(call quote,$(or $(value DATA_DIR),data/cifar10))

soak: $(READY)  ## runs killed at random and resumed
	$(PYTHON) tests/soak.py

notebook: $(READY)  ## tutor.ipynb from the sources
	$(PYTHON) tests/notebook.py

clean:  ## remove .venv, results, caches; keep what is published
	rm -rf .venv .pytest_cache .ruff_cache .coverage* __pycache__ tests/__pycache__
	find results -mindepth 1 -maxdepth 1 ! -name published -exec rm -rf {} + 2>/dev/null || true

help:
	@echo "make TARGET [VARIABLE=value ...]"; echo
	@sed -n 's/^\([a-z-]*\)[a-z ]*:[^#]*## \(.*\)/  \1|\2/p' Makefile | sed 's/\$$(VENV)/.venv/' | \
	  awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'
	@echo; echo "One run each: $(SINGLE)" | fold -s -w 78
	@echo "A recipe each:" $(RECIPES) | fold -s -w 78
	@echo; echo "Variables: RECIPE, SEED or SEEDS=\"0 1 2\", RESULTS, OVERWRITE=1 (run again),"
	@echo "CACHE=1 (keep the teacher's outputs), FLAGS=\"any flags of the training scripts\","
	@echo "and the flags DATASET DATA_DIR EPOCHS BATCH_SIZE LABELS VIEWS DEVICE PRECISION."
	@echo "VENV= PYTHON=python3 uses an interpreter as it is; BASE makes .venv; PIP_ARGS"
	@echo "goes to pip."

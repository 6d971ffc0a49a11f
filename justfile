# What is done by hand now and then; `just` lists it. CI runs .ci/run.

image := env("WMTP_IMAGE", "registry.example/wmtp:0.1.0")

default:
    @just --list

# the environment for working on WMTP
setup:
    uv sync --group smollm2 --group adapters --group fp8

test *arguments:
    uv run pytest {{arguments}}

# the tests that `just test` leaves out: every case of what it samples
slow *arguments:
    uv run pytest -m slow {{arguments}}

lint:
    uv run ruff format --check .
    uv run ruff check .
    uv run pyright
    uv run hadolint Dockerfile
    uv run lint-imports

# the generated parts of the documentation, and all of it as a site: open site/index.html
docs:
    uv run python docs/generate.py
    uv run --group docs mkdocs build --strict

# the site while you write, at http://127.0.0.1:8000
docs-serve:
    uv run --group docs mkdocs serve

# all that CI runs
ci:
    .ci/run

build:
    docker build -t {{image}} .

push: build
    docker push {{image}}
    docker inspect --format '{{{{index .RepoDigests 0}}' {{image}}

# what would be sent to VESSL
plan *files="configs/vessl-minitest.toml":
    uv run wmtp launch --on vessl --dry-run {{files}}

minitest:
    uv run wmtp launch --on vessl --watch configs/vessl-minitest.toml

# An image for GPUs: NVIDIA's PyTorch, with CUDA, NCCL, Transformer Engine and apex, megatron-core on
# top, and this package. docs/launch.md says how to build and use it, and that nobody has built it
# where this was written.
#
# The tag is the one that megatron-core's release 0.19 was itself tested on (docker/.ngc_version.dev
# of its tag core_v0.19.0). Its Python is 3.12.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}

# The newest that pyproject.toml allows.
ARG MEGATRON_CORE=0.19.2

WORKDIR /workspace/megatron-drpo

# Dependencies come first: a change of the source does not install them again. The image's own
# constraints (PIP_CONSTRAINT) stay in force, so that pip fails rather than replaces its torch.
COPY pyproject.toml /tmp/pyproject.toml
RUN python -c 'import tomllib; p = tomllib.load(open("/tmp/pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["parquet"], sep="\n")' \
        > /tmp/requirements.txt \
    && pip install --no-cache-dir -r /tmp/requirements.txt "megatron-core==${MEGATRON_CORE}" \
    && rm /tmp/requirements.txt /tmp/pyproject.toml

# A user of its own. Mounted directories must be writable for it, or give docker --user.
RUN useradd --create-home --uid 10001 --shell /bin/bash drpo \
    && chown drpo:drpo /workspace/megatron-drpo
COPY --chown=drpo:drpo . .

# Nothing but this package: without dependencies there is nothing to constrain, and the image's
# constraints would also bind the tools that build it.
RUN PIP_CONSTRAINT='' pip install --no-cache-dir --no-deps -e .

USER 10001

# Once at the start; after that a day apart, since it computes on the GPU that trains.
HEALTHCHECK --start-period=10m --start-interval=10s --interval=24h --timeout=5m --retries=1 \
    CMD ["python", "-m", "megatron_drpo.doctor"]

CMD ["megatron-drpo", "--help"]

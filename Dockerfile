# An image for GPUs: NVIDIA's PyTorch with Transformer Engine, and this package on top.
# The tests of this repository do not build it; they run on a plain Python, see the Makefile.
#
#   docker build -t megatron-drpo .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/workspace/megatron-drpo/runs" \
#       megatron-drpo bash examples/train_drpo_gpt.sh
FROM nvcr.io/nvidia/pytorch:25.09-py3

WORKDIR /workspace/megatron-drpo
COPY . .
# The image's own constraints (PIP_CONSTRAINT) keep its torch; ours are for machines without one.
RUN pip install --no-cache-dir -e ".[test]"

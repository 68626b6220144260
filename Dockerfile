# Two images, by target. Neither holds a secret, a model or a dataset: mount those.
#   docker build --target gpu -t avatar-rl:gpu .     # the image that deploy/kuberay/rayjob.yaml names
#   docker build --target cpu -t avatar-rl:cpu .     # the demo and the tests
#   docker run --gpus all --shm-size=128g -v /data:/data avatar-rl:gpu avatar train recipes/gpu/omni_7b_8gpu.yaml ...
# The gpu image needs a driver of 580 or newer on the host. Written without a Docker daemon at hand: not built yet.

FROM python:3.11-slim-bookworm AS cpu
# g++ for what DeepSpeed compiles at its first use; procps and iproute2 are Ray's tools.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make git redis-server procps iproute2 \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 avatar && mkdir /app && chown avatar:avatar /app
USER avatar
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
COPY --chown=avatar:avatar . /app
RUN make setup EXTRA=cpu
CMD ["avatar", "doctor"]

# The compiler of CUDA is for DeepSpeed's offloaded optimiser and for kernels that vLLM compiles at its first use.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS gpu
# wget is what KubeRay's probes call.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12 python3.12-dev python3.12-venv g++ make git \
        redis-server procps iproute2 wget \
    && rm -rf /var/lib/apt/lists/*
# Ubuntu's image has a user of this number.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 avatar && mkdir /app && chown avatar:avatar /app
USER avatar
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 CUDA_HOME=/usr/local/cuda
COPY --chown=avatar:avatar . /app
RUN make setup EXTRA=gpu PYTHON=python3.12
CMD ["avatar", "doctor"]

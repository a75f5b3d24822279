# A node in a container. It trains until it is stopped, and its log has a link to its page: read localhost for 0.0.0.0.
#   on a GPU, with vLLM: it trains Qwen/Qwen3-0.6B, as examples/qwen3.toml says
#       docker build -t gossamer .
#       docker run --gpus all -v gossamer:/state -p 4001:4001 -p 127.0.0.1:8000:8000 gossamer
#   on a CPU: it trains the built-in policy
#       docker build -t gossamer:cpu --build-arg VARIANT=cpu .
#       docker run -v gossamer-cpu:/state -p 4001:4001 -p 127.0.0.1:8000:8000 gossamer:cpu
#   another model:  docker run ... gossamer node --model ID --state /state --listen tcp://0.0.0.0:4001
#   a relay and three nodes: examples/compose.yaml
# The volume holds the key, the checkpoints, the hub's models, and what the node was told: another start may say less.
# Peers are told the container's own address, which nobody outside the machine can dial; tell them the machine's
# instead, or run with --network host:
#   docker run ... gossamer node --state /state --set 'network.advertise=["tcp://HOST:4001"]'
# pip's own settings are build arguments: give PIP_EXTRA_INDEX_URL to take a CPU build of torch.
# Nothing secret goes into the image: the node makes its key in /state when it first starts.

ARG VARIANT=gpu

# CUDA's libraries come with the wheels of torch, the driver with the container runtime: no CUDA base is needed.
FROM python:3.12.12-slim-bookworm AS base
# tini reaps the children that an engine leaves behind and passes signals on.
# Debian removes superseded versions from its mirrors, so a pinned one stops building.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home gossamer \
    && install -d -o gossamer -g gossamer /state /shared
ENTRYPOINT ["tini", "--", "gossamer"]

FROM base AS cpu
ENV EXTRAS=reasoning-gym
CMD ["node", "--model", "builtin", "--state", "/state", "--listen", "tcp://0.0.0.0:4001", \
    "--set", "observe.host=0.0.0.0", "--set", "observe.port=8000"]

FROM base AS gpu
# Triton compiles its launchers with a C compiler at run time; FlashInfer would want the whole CUDA toolkit.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV EXTRAS=vllm,reasoning-gym \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VLLM_USE_FLASHINFER_SAMPLER=0
CMD ["node", "/opt/gossamer/examples/qwen3.toml", "--state", "/state", "--listen", "tcp://0.0.0.0:4001", \
    "--set", "observe.host=0.0.0.0", "--set", "observe.port=8000"]

# hadolint ignore=DL3006
FROM ${VARIANT} AS node
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /opt/gossamer
# The dependencies first, in a layer that only a change of pyproject.toml makes anew.
COPY pyproject.toml README.md LICENSE .ci/constraints.txt ./
# What is installed is this project, by its path; the versions of what it needs are in the constraints.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"
COPY protocol protocol
COPY collectives collectives
COPY node node
COPY examples examples
RUN pip install --no-cache-dir --no-deps --force-reinstall .

ENV HF_HOME=/state/hub \
    HF_HUB_DISABLE_TELEMETRY=1 \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1
USER 10001
WORKDIR /state
VOLUME /state
EXPOSE 4001 8000
# A first start may download a model; after it a silence of half an hour means that the node hangs.
HEALTHCHECK --interval=60s --timeout=20s --start-period=30m --retries=3 \
    CMD ["python", "-P", "-m", "node.operations.health", "/state", "--limit", "1800"]

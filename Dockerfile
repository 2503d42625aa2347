# bt-fast with all optional packages, the loaders ffcv and DALI among them, and rclone. PyTorch's wheels
# bring CUDA; the host has NVIDIA's driver and container toolkit.
#
#     docker build --tag bt-fast .
#     docker run --rm --gpus all --shm-size 1g --user $(id -u):$(id -g) --volume $PWD:/data \
#         bt-fast pretrain --data out.beton
#
# `docker stop --time 120` gives a run the time to save; it exits with 75 and can be resumed.

# g++ and Python's headers: Triton and torch.compile build small programs while a run starts.
FROM debian:trixie-slim AS base
RUN --mount=type=cache,target=/var/cache/apt \
    --mount=type=cache,target=/var/lib/apt/lists \
    rm -f /etc/apt/apt.conf.d/docker-clean && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ libgl1 libglib2.0-0t64 libopencv-core410 libopencv-imgproc410 \
        libturbojpeg0 python3 python3-dev python3-venv rclone \
    && useradd --uid 1000 --create-home bt-fast \
    && install --directory --owner=bt-fast /data

# Everything from PyPI, in a layer that changes with the versions and not with the code.
FROM base AS environment
RUN --mount=type=cache,target=/var/cache/apt \
    --mount=type=cache,target=/var/lib/apt/lists \
    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes \
        --no-install-recommends libopencv-dev libturbojpeg0-dev pkg-config
WORKDIR /build
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
RUN --mount=type=cache,target=/var/cache/pip \
    mkdir pipelines && echo '__version__ = "0"' > pipelines/__init__.py \
    && python3 -m venv /opt/bt-fast \
    && LDFLAGS=-Wl,--as-needed /opt/bt-fast/bin/pip install --cache-dir /var/cache/pip \
        --constraint constraints.txt '.[all,ffcv,dali]'

FROM base
LABEL org.opencontainers.image.title="bt-fast" \
    org.opencontainers.image.description="Barlow Twins pretraining as fast as the hardware allows" \
    org.opencontainers.image.version="0.2.0" \
    org.opencontainers.image.licenses="MIT"
COPY --from=environment /opt/bt-fast /opt/bt-fast
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=bind,source=.,target=/build,rw \
    /opt/bt-fast/bin/pip install --cache-dir /var/cache/pip --no-deps /build
# HOME and USER hold for any --user: compilers keep their caches under them.
ENV PATH=/opt/bt-fast/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    USER=bt-fast \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /data
USER 1000:1000
ENTRYPOINT ["bt-fast"]
CMD ["--help"]

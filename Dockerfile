# bt-fast with its optional loaders, ffcv and DALI. PyTorch's wheels bring CUDA; the host has
# NVIDIA's driver and container toolkit.
#
#     docker build --tag bt-fast .
#     docker run --rm --gpus all --shm-size 1g --user $(id -u):$(id -g) --volume $PWD:/data \
#         bt-fast pretrain --data out.beton
#
# `docker stop --time 120` gives a run the time to save; it exits with 75 and can be resumed.

# Everything from PyPI, in one layer that changes with the versions and not with the code.
FROM debian:bookworm-slim AS environment
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        g++ libopencv-dev libturbojpeg0-dev pkg-config python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN python3 -m venv /opt/bt-fast \
    && python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; extras = project['optional-dependencies']; print(*project['dependencies'], *(line for name in ('ffcv', 'dali', 'eval', 'onnx', 'sources') for line in extras[name]), sep='\n')" > requirements.txt \
    && LDFLAGS=-Wl,--as-needed /opt/bt-fast/bin/pip install --no-cache-dir \
        --constraint constraints.txt --requirement requirements.txt

FROM environment AS package
COPY README.md LICENSE ./
COPY bt_fast bt_fast
COPY pipelines pipelines
RUN /opt/bt-fast/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM debian:bookworm-slim
# g++ and Python's headers: Triton and torch.compile build small programs while a run starts.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        g++ libgl1 libglib2.0-0 libopencv-core406 libopencv-imgproc406 libturbojpeg0 \
        python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home bt-fast \
    && install --directory --owner=bt-fast /data
COPY --from=environment /opt/bt-fast /opt/bt-fast
COPY --from=package /dist /dist
RUN /opt/bt-fast/bin/pip install --no-cache-dir --no-deps /dist/*.whl
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

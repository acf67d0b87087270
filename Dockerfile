# Headrace on the CPU. deploy/docker/README.md has how to build and run it, what is in it and what was checked.
#
#   docker build --tag headrace .
#   docker run --read-only --tmpfs /tmp --publish 8001:8001 --publish 8002:8002 --volume "$PWD/examples/models:/models:ro" headrace
#
# The point release is pinned, not what Debian adds to it for security: `--pull` and a build bring that. For an image that is the same
# byte for byte, give the digest: --build-arg BASE=debian:13.8-slim@sha256:...
# Debian's own Python, not the image python:3.13: the same release for both stages, security updates by apt, and what
# scripts/check_images.py builds in a chroot is then what is built here.
ARG BASE=debian:13.8-slim

# -- what headrace depends on: changes with the lock file only ---------------------------------------------------------
FROM ${BASE} AS dependencies
RUN apt-get update \
    && apt-get install --yes --no-install-recommends binutils python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
COPY deploy/docker/requirements-cpu-py313.txt deploy/docker/slim.py /build/
# Wheels only, each with the hash that the lock file has: nothing is compiled, and nobody's build script runs.
RUN /opt/venv/bin/pip install --no-cache-dir --no-compile --no-deps --only-binary :all: --require-hashes \
        --requirement /build/requirements-cpu-py313.txt
# Compiled here, since the root of the running container is read-only; `unchecked-hash`: image layers do not keep the times of files
# that the usual check compares.
RUN python3 /build/slim.py /opt/venv \
    && echo /opt/headrace > /opt/venv/lib/python3.13/site-packages/headrace.pth \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib

# -- headrace itself: a layer of a few megabytes, all that changes from one release to the next ------------------------
FROM dependencies AS application
COPY deploy/docker/requirements-build-py313.txt /build/
RUN python3 -m venv /build/venv \
    && /build/venv/bin/pip install --no-cache-dir --no-deps --only-binary :all: --require-hashes \
        --requirement /build/requirements-build-py313.txt
COPY pyproject.toml README.md LICENSE /build/source/
COPY server /build/source/server
COPY kernels /build/source/kernels
RUN /build/venv/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /build/dist /build/source \
    && /build/venv/bin/pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --no-deps --no-index --target /opt/headrace \
        /build/dist/headrace-*.whl \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/headrace

# -- what is shipped ---------------------------------------------------------------------------------------------------
FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 ca-certificates \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log \
    && groupadd --key GID_MAX=65532 --gid 65532 headrace \
    && useradd --key UID_MAX=65532 --uid 65532 --gid 65532 --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin headrace \
    && install --directory --owner=65532 --group=65532 /models /var/cache/headrace
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=application /opt/headrace /opt/headrace

# Inside a container loopback reaches nobody: every address, and what is published decides who gets there.
# What is kept between starts is below /var/cache/headrace: mount something there to keep it, or where the root is read-only. The native
# transport has its sockets in /tmp, which has to be one that can be written to.
# ORT_DISABLE_TELEMETRY: ONNX Runtime's Linux wheels otherwise keep a database in the home directory and report to its makers.
ENV PATH=/opt/headrace/bin:/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    HEADRACE_MODELS=/models \
    HEADRACE_GRPC=0.0.0.0:8001 \
    HEADRACE_HTTP=0.0.0.0:8002 \
    XDG_CACHE_HOME=/var/cache

ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Headrace" \
      org.opencontainers.image.description="A model inference server: Open Inference Protocol over gRPC, dynamic batching, ONNX Runtime on the CPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# By number, so that Kubernetes can see that it is not root (runAsNonRoot).
USER 65532:65532
VOLUME ["/models"]
EXPOSE 8001 8002
STOPSIGNAL SIGTERM
# Ready, not merely alive: compose's `service_healthy` and Swarm's updates wait for it. Models may take their time at the start.
HEALTHCHECK --interval=10s --timeout=6s --start-period=120s --retries=3 CMD ["headrace", "health"]
ENTRYPOINT ["headrace"]
CMD ["serve"]

# The worker with the bundled model. Two flavours: `cpu` and `cuda`.
#   docker build -t text2weight .                                   CPU
#   docker build -t text2weight:cuda --build-arg FLAVOUR=cuda .     NVIDIA GPU
# Packages come from where the base image's pip configuration or a build argument such as UV_INDEX_URL says. With
# PyTorch's own CPU index there, the CPU image has no CUDA code at all.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG FLAVOUR=cpu
ARG UV_INDEX_URL
# Equal input, equal files: nothing below may depend on the time of the build.
ARG SOURCE_DATE_EPOCH=0
ENV PYTHONDONTWRITEBYTECODE=1 UV_LINK_MODE=copy UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never
WORKDIR /src
RUN if [ "$FLAVOUR" = cpu ]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev; \
    fi
COPY constraints.txt ./
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir -c constraints.txt uv
# Dependencies first: they change rarely, and are nearly all of the image.
COPY pyproject.toml ./
COPY deploy/image deploy/image
RUN case "$FLAVOUR" in \
        cpu) overrides="--overrides deploy/image/cpu-overrides.txt" ;; \
        cuda) overrides="" ;; \
        *) echo "FLAVOUR is $FLAVOUR: allowed are cpu and cuda" >&2; exit 1 ;; \
    esac \
    && /opt/uv/bin/uv venv --python "$(command -v python3)" /opt/text2weight \
    && /opt/uv/bin/uv pip install --python /opt/text2weight/bin/python -c constraints.txt -b constraints.txt $overrides \
        -r pyproject.toml --extra service --extra tracing \
    && cd /opt/text2weight/lib/python3*/site-packages \
    # Headers, tests and tools of torch, which a worker has no use for.
    && rm -rf torch/include torch/share torch/bin/protoc* torch/test torch/lib/*.a \
    && if [ "$FLAVOUR" = cpu ]; then \
        rm -f torch/lib/libtorch_cuda_linalg.so && python3 /src/deploy/image/without_cuda.py "$PWD"; \
    fi
COPY README.md LICENSE hatch_build.py ./
COPY core core
COPY clients clients
COPY service service
COPY models models
RUN /opt/uv/bin/uv pip install --python /opt/text2weight/bin/python --no-deps -c constraints.txt -b constraints.txt . \
    # uv's note of when it built the package.
    && rm /opt/text2weight/lib/python3*/site-packages/text2weight-*.dist-info/uv_cache.json \
    && sed -i '/uv_cache.json/d' /opt/text2weight/lib/python3*/site-packages/text2weight-*.dist-info/RECORD \
    # Bytecode that is never checked against the time of its source: the root is read-only, and times are all equal.
    && /opt/text2weight/bin/python -m compileall -q -j 0 -x 'py31[2-9]_' --invalidation-mode unchecked-hash /opt/text2weight/lib \
    && find /opt/text2weight -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} + \
    # The build fails here if what was left out is needed after all.
    && /opt/text2weight/bin/python deploy/image/check.py "$FLAVOUR"

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="text2weight" \
    org.opencontainers.image.description="Class names in, the weights of a small image classifier head out" \
    org.opencontainers.image.licenses="Apache-2.0"
# A name for the user that runs the worker; some libraries insist on one.
RUN echo 't2w:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd && echo 't2w:x:10001:' >> /etc/group
COPY --from=build /opt/text2weight /opt/text2weight
ENV PATH=/opt/text2weight/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp \
    T2W_HTTP_HOST=0.0.0.0 T2W_HTTP_PORT=8000
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['T2W_HTTP_PORT']}/health/ready\", timeout=4)"]
ENTRYPOINT ["t2w", "serve"]

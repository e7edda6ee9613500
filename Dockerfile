# glmkit in a container, serving the OpenAI API on port 8000.
#
#   docker build -t glmkit .                                   # CPU; see TORCH_INDEX_URL below
#   docker build -t glmkit:gpu --target gpu .                  # NVIDIA; run it with --gpus all
#   docker run --rm -p 8000:8000 -v "$PWD/models:/models:ro" -e GLMKIT_API_KEY=secret glmkit serve chatglm3-6b --host 0.0.0.0
#
# The user of the container is not root, and models are mounted, not copied. Docker's default profile forbids namespaces, so
# the code interpreter of `glm web` reaches the level "reduced" at most (docs/interpreter.md).
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON_VERSION}-slim-bookworm AS base
# A compiler, because the native code for quantised weights is built at first use for the processor at hand.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 glm
ENV GLMKIT_MODELS=/models HF_HUB_DISABLE_TELEMETRY=1 PYTHONUNBUFFERED=1
EXPOSE 8000
ENTRYPOINT ["glm"]
CMD ["serve", "glm-nano", "--host", "0.0.0.0"]
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/live', timeout=4)"]

FROM base AS gpu
# torch for Linux comes with CUDA.
COPY --from=wheel /wheels /wheels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[web,train]" && rm -rf /wheels
USER 1000
WORKDIR /data

FROM base AS cpu
# The address of torch's CPU builds, as pytorch.org names it; without it pip takes the CUDA build, which works too but is
# several gigabytes larger.
ARG TORCH_INDEX_URL=""
COPY --from=wheel /wheels /wheels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch>=2.9,<2.14" \
    && pip install --no-cache-dir "$(echo /wheels/*.whl)[web,train]" \
    && rm -rf /wheels
USER 1000
WORKDIR /data

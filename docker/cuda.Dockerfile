# edge-vlm on a desktop GPU by ONNX Runtime: docker build -f docker/cuda.Dockerfile -t edge-vlm:cuda .
# ONNX Runtime brings neither CUDA nor cuDNN; they come with the base image, the driver from the host.
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:12.6.3-cudnn-runtime-ubuntu24.04
# The versions of packages are those of the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheels /wheels
RUN python3 -m venv /opt/edge-vlm \
    && set -- /wheels/*.whl \
    && /opt/edge-vlm/bin/pip install --no-cache-dir "$1[gpu,alerts]" \
    && useradd --uid 10001 --home-dir /data --create-home edge-vlm
ENV PATH=/opt/edge-vlm/bin:$PATH PYTHONUNBUFFERED=1 EDGE_VLM_HOST=0.0.0.0 EDGE_VLM_BACKEND=cuda
USER 10001
WORKDIR /data
EXPOSE 8765
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8765/readyz', timeout=5)"]
ENTRYPOINT ["edge-vlm"]
CMD ["serve"]

# edge-vlm on a Jetson with JetPack 7: docker build -f docker/jetpack7.Dockerfile -t edge-vlm:jetpack7 .
# Built on the device. JetPack 7 runs NVIDIA's images for Arm servers: this one has CUDA 13, TensorRT
# and its bindings for Python 3.12.
FROM nvcr.io/nvidia/tensorrt:25.09-py3 AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvcr.io/nvidia/tensorrt:25.09-py3
# GStreamer is for CSI cameras; the versions of packages are those of the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        python3-venv gstreamer1.0-tools gstreamer1.0-plugins-good \
    && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheels /wheels
# TensorRT's bindings are the image's.
RUN python3 -m venv --system-site-packages /opt/edge-vlm \
    && set -- /wheels/*.whl \
    && /opt/edge-vlm/bin/pip install --no-cache-dir "$1[ort,alerts]" \
    && useradd --uid 10001 --groups video --home-dir /data --create-home edge-vlm
ENV PATH=/opt/edge-vlm/bin:$PATH PYTHONUNBUFFERED=1 EDGE_VLM_HOST=0.0.0.0 EDGE_VLM_BACKEND=trt
USER 10001
WORKDIR /data
EXPOSE 8765
HEALTHCHECK --start-period=300s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8765/readyz', timeout=5)"]
ENTRYPOINT ["edge-vlm"]
CMD ["serve"]

# edge-vlm on a Jetson Orin with JetPack 6: docker build -f docker/jetpack6.Dockerfile -t edge-vlm:jetpack6 .
# Built on the device. The base image has CUDA 12.6, TensorRT 10.3 and its bindings for Python 3.10.
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0 AS wheel
# The versions of packages are those of the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0
# GStreamer is for CSI cameras.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        python3-venv python3-libnvinfer gstreamer1.0-tools gstreamer1.0-plugins-good \
    && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheels /wheels
# TensorRT's bindings are the system's.
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

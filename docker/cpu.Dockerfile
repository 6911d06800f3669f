# edge-vlm on a CPU: docker build -f docker/cpu.Dockerfile -t edge-vlm:cpu .
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm
COPY --from=wheel /wheels /wheels
RUN python -m venv /opt/edge-vlm \
    && set -- /wheels/*.whl \
    && /opt/edge-vlm/bin/pip install --no-cache-dir "$1[ort,alerts]" \
    && useradd --uid 10001 --home-dir /data --create-home edge-vlm
ENV PATH=/opt/edge-vlm/bin:$PATH PYTHONUNBUFFERED=1 EDGE_VLM_HOST=0.0.0.0
USER 10001
WORKDIR /data
EXPOSE 8765
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8765/readyz', timeout=5)"]
ENTRYPOINT ["edge-vlm"]
CMD ["serve"]

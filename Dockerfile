# picker as an image: `docker build -t picker:0.1.0 .`
# Two stages: a wheel and its dependencies are put into a virtual environment, and only that goes along.

FROM python:3.12.11-slim-bookworm AS build
# What is optional in picker and may be wanted in a cluster: exact matching, replicas over Redis.
ARG EXTRAS=exact,redis
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
COPY bench/scenarios ./bench/scenarios
RUN python -m venv /picker \
    && python -m pip wheel --no-deps --wheel-dir /wheels . \
    && /picker/bin/pip install "$(ls /wheels/*.whl)[${EXTRAS}]" \
    && /picker/bin/pip uninstall --yes pip

FROM python:3.12.11-slim-bookworm
LABEL org.opencontainers.image.title="picker" \
      org.opencontainers.image.description="KV-cache-aware endpoint picker and gateway for LLM inference" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# The root file system is read-only where it runs: nothing is to be compiled or cached beside the sources.
ENV PATH=/picker/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY --from=build /picker /picker
USER 65532:65532
EXPOSE 9002 9003 9090
# For those who run it without Kubernetes, which has probes of its own and ignores this.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9090/healthz', timeout=2)"]
ENTRYPOINT ["picker"]
CMD ["epp", "--help"]

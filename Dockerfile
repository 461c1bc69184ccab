# picker as an image: `docker build -t picker:0.1.0 .`
# Two stages: a wheel and its dependencies are put into a virtual environment, and only that goes along.

FROM python:3.12.13-slim-bookworm AS build
# What is optional in picker and may be wanted in a cluster: exact matching, replicas over Redis.
ARG EXTRAS=exact,redis
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
COPY deploy/constraints.txt ./
RUN python -m pip install --constraint constraints.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
COPY bench/scenarios ./bench/scenarios
# Model hubs are what `tokenizers` downloads from, and picker reads tokenizers from folders only: they stay out, with the code
# that reaches them. The tests of libraries stay out, too.
RUN python -m venv /picker \
    && python -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /picker/bin/pip install --no-compile --constraint constraints.txt "picker-gateway[${EXTRAS}] @ file://$(ls /wheels/*.whl)" \
    && /picker/bin/pip check \
    && /picker/bin/pip uninstall --yes huggingface-hub hf-xet pip \
    && find /picker -depth -type d \( -name tests -o -name __pycache__ \) -exec rm -r {} +
# Bytecode lies apart, of Python's own library, too, which comes without: compiled anew at every start, it is half of the start.
ENV PYTHONPYCACHEPREFIX=/picker/bytecode
RUN python -m compileall -q --invalidation-mode unchecked-hash \
    -x 'ensurepip|idlelib|lib2to3|/usr/local/.*/site-packages' /picker/lib /usr/local/lib/python3.*

FROM python:3.12.13-slim-bookworm
LABEL org.opencontainers.image.title="picker" \
      org.opencontainers.image.description="KV-cache-aware endpoint picker and gateway for LLM inference" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# The root file system is read-only where it runs: nothing is to be compiled or cached beside the sources.
ENV PATH=/picker/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONPYCACHEPREFIX=/picker/bytecode PYTHONUNBUFFERED=1
COPY --from=build /picker /picker
USER 65532:65532
EXPOSE 8080 9002 9003 9005 9090
# For those who run it without Kubernetes, which has probes of its own and ignores this.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9090/healthz', timeout=2)"]
ENTRYPOINT ["picker"]
CMD ["epp", "--help"]

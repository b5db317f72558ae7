# Serves a registry: docker run -p 8500:8500 -v /path/to/registry:/registry modelport
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

RUN useradd --system --uid 10001 --create-home modelport \
    && install --directory --owner modelport --group modelport /registry

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY client client
COPY registry registry
COPY server server
COPY trainer trainer
RUN PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt pip install --root-user-action=ignore '.[server]'

WORKDIR /registry
VOLUME /registry
EXPOSE 8500
USER modelport

# Healthy once a version answers; a large model may need a longer start period.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-m", "modelport._healthcheck", "127.0.0.1:8500"]

ENTRYPOINT ["modelport"]
CMD ["serve", "--registry", "/registry", "--address", "0.0.0.0:8500"]

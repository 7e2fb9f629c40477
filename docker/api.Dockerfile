# Everything without torch: the API, the migrations, and the CPU pool that checks files and jobs.
# give a digest to build the same again: --build-arg PYTHON=python:3.11-slim@sha256:...
ARG PYTHON=python:3.11-slim
FROM ${PYTHON}
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/immunotune
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY app ./app
COPY worker ./worker
COPY finetuning ./finetuning
COPY embedded ./embedded
COPY demo ./demo
COPY immunotune ./immunotune
COPY migrations ./migrations
# wheels only: a source distribution would run its code here
RUN PIP_CONSTRAINT=constraints.txt pip install hatchling \
 && PIP_CONSTRAINT=constraints.txt PIP_ONLY_BINARY=:all: pip install --no-build-isolation ".[postgres]" \
 && useradd --system --uid 10001 --create-home immunotune \
 && cd /var/lib && install -d -m 700 -o immunotune immunotune immunotune/keys immunotune/blobs immunotune/bases immunotune/adapters
USER immunotune
ENV IMMUNOTUNE_DATA=/var/lib/immunotune IMMUNOTUNE_HOST=0.0.0.0
EXPOSE 8080
# exec form: SIGTERM reaches the program itself, which then drains
ENTRYPOINT ["immunotune"]
CMD ["serve"]

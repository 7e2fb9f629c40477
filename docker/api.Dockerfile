# Everything without torch: the API, the migrations, and the CPU pool that checks files and jobs.
FROM python:3.11-slim
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
RUN PIP_CONSTRAINT=constraints.txt pip install ".[postgres]" \
 && useradd --system --uid 10001 --create-home immunotune \
 && install -d -o immunotune /var/lib/immunotune
USER immunotune
ENV IMMUNOTUNE_DATA=/var/lib/immunotune IMMUNOTUNE_HOST=0.0.0.0
EXPOSE 8080
# exec form: SIGTERM reaches the program itself, which then drains
ENTRYPOINT ["immunotune"]
CMD ["serve"]

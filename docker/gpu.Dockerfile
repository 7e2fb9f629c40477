# Everything that runs torch: training workers (one per GPU), model servers, and the one-shot that fetches a base.
# torch comes from the index with its own CUDA libraries, at the version we pin.
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
RUN PIP_CONSTRAINT=constraints.txt pip install ".[train,postgres]" \
 && useradd --system --uid 10001 --create-home immunotune \
 && install -d -o immunotune /var/lib/immunotune
USER immunotune
# several containers share a box: pinned threads would all sit on its first cores (training pins its own)
ENV IMMUNOTUNE_DATA=/var/lib/immunotune HF_HUB_OFFLINE=1 OMP_PROC_BIND=false
ENTRYPOINT ["immunotune"]
CMD ["worker", "--queues", "train.gpu24"]

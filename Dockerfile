# The same install as `make install`. GPU-ready: PyTorch's Linux wheel brings its own CUDA libraries; run with
#   docker build -t ribo_nb . && docker run --gpus all -v "$PWD/datamount:/ribo_nb/datamount" ribo_nb make demo
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends make git && rm -rf /var/lib/apt/lists/*
WORKDIR /ribo_nb
# dependencies first, so that an edited notebook does not install PyTorch again
COPY settings.ini setup.py constraints.txt Makefile README.md ./
COPY ribo_nb/__init__.py ribo_nb/__init__.py
RUN make install
COPY . .
# papermill saves the notebook on SIGINT; on SIGTERM it would just die
STOPSIGNAL SIGINT
CMD ["make", "demo"]

# The same install as `make lab`. GPU-ready: PyTorch's Linux wheel brings its own CUDA libraries.
#   make image                          docker build, with the commit that runs shall record
#   docker run --gpus all -v "$PWD/datamount:/ribo_nb/datamount" ribo_nb                              make demo
#   docker run --gpus all -v "$PWD/datamount:/ribo_nb/datamount" -p 8888:8888 ribo_nb make lab        prints the address to open
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends make git && rm -rf /var/lib/apt/lists/*
WORKDIR /ribo_nb
# dependencies first, so that an edited notebook does not install PyTorch again
COPY settings.ini setup.py constraints.txt Makefile README.md ./
COPY ribo_nb/__init__.py ribo_nb/__init__.py
COPY lab lab
RUN make .venv/lab
# as `jupyter lab --allow-root --ip=0.0.0.0 --no-browser`: a container's user is root, and its Lab is reached from outside
# (only through the port that `docker run -p` opens, and with the token that Lab prints)
RUN mkdir -p /etc/jupyter && \
    echo '{"ServerApp": {"allow_root": true, "ip": "0.0.0.0", "open_browser": false}}' > /etc/jupyter/jupyter_server_config.json
COPY . .
# .git stays outside, so the commit is told; runs record it
ARG CODE_VERSION=
ENV RIBO_CODE_VERSION=$CODE_VERSION
EXPOSE 8888
# papermill saves the notebook on SIGINT; on SIGTERM it would just die
STOPSIGNAL SIGINT
CMD ["make", "demo"]

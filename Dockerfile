# vLLM's own image with this package added; nothing that the image brings is touched.
#   docker build -t vllm-calibquant .
#   docker run --gpus all -p 8000:8000 vllm-calibquant MODEL --kv-cache-dtype calibquant1

FROM python:3.12-slim AS wheel
WORKDIR /src
COPY setup.py pyproject.toml README.md LICENSE ./
COPY vllm_calibquant vllm_calibquant
COPY csrc_triton csrc_triton
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai:v0.32.0
COPY --from=wheel /wheels /tmp/wheels
RUN uv pip install --system --no-cache --no-deps /tmp/wheels/*.whl && rm -r /tmp/wheels

# A new named volume takes over the owner of the directory that it is mounted on.
RUN useradd --create-home --uid 10001 server \
    && install --directory --owner=server --group=server /home/server/.cache
USER server
WORKDIR /home/server
ENV HOME=/home/server

EXPOSE 8000
# The start period is for loading a model and capturing graphs.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve"]

# A server with OpenAI's API, built from this folder alone:
#
#     docker build -t mistral-server .
#     docker run -p 8000:8000 -e MISTRAL_EQX_API_KEY=... -v models:/cache mistral-server --model smollm2-135m
#
# The volume keeps models and compiled programs. The image is for CPUs; an accelerator needs JAX with support for it.
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE NOTICE ./
COPY mistral_eqx mistral_eqx
# The C++ kernels are compiled here.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[serve,hub]" \
    && rm -r /wheels \
    && useradd --create-home server \
    && mkdir /cache \
    && chown server /cache
USER server
ENV MISTRAL_EQX_CACHE=/cache HF_HOME=/cache/hub
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=10m CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
# SIGTERM drains; docker waits only ten seconds unless it is asked, as by `docker stop --time 40`.
ENTRYPOINT ["mistral-eqx", "serve", "--host", "0.0.0.0", "--port", "8000"]

# Two images from one file. `worker` (the default) holds the job with torch: plan, extract, reduce. `operator` holds the
# command alone. docs/image.md describes how to build and run them.
#
# Layers are in the order base, dependencies, code: a change of code rebuilds only the last two MB.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# pip is in /tools and installs into /opt/prism. Only /opt/prism is copied into the images, so they contain no pip.
FROM ${BASE_IMAGE} AS tools
ENV PIP_CONFIG_FILE=/run/secrets/pip.conf PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3.11 -m venv /tools && python3.11 -m venv --without-pip /opt/prism
WORKDIR /src

# The dependency lists of pyproject.toml, one file each: a change of a linter setting does not rebuild the layers below.
FROM tools AS requirements
COPY pyproject.toml .
RUN python3.11 -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
launcher = project["dependencies"]; job = launcher + project["optional-dependencies"]["job"]; \
open("launcher.txt", "w").write("\n".join(launcher)); open("job.txt", "w").write("\n".join(job))'

# PIP_ARGS: for example another index. A password in an index's address belongs in the secret `pip.conf`, which is mounted
# only during its RUN and is in no layer.
FROM tools AS operator-packages
ARG PIP_ARGS=""
COPY constraints.txt .
COPY --from=requirements /src/launcher.txt .
RUN --mount=type=secret,id=pip.conf \
    /tools/bin/pip --python /opt/prism/bin/python install --no-compile ${PIP_ARGS} -c constraints.txt -r launcher.txt \
 && /tools/bin/pip --python /opt/prism/bin/python check \
 && python3.11 -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/prism/lib

FROM tools AS worker-packages
ARG PIP_ARGS=""
COPY constraints.txt .
COPY --from=requirements /src/job.txt .
# torch's headers and tests are not needed. One file of its tests is written for Python 3.12.
RUN --mount=type=secret,id=pip.conf \
    /tools/bin/pip --python /opt/prism/bin/python install --no-compile ${PIP_ARGS} -c constraints.txt -r job.txt \
 && /tools/bin/pip --python /opt/prism/bin/python check \
 && cd /opt/prism/lib/python3.11/site-packages && rm -rf torch/include torch/test torch/bin/test_* torch/bin/*StoreTest \
 && python3.11 -m compileall -qq -j 0 -x py312_ --invalidation-mode unchecked-hash /opt/prism/lib

FROM tools AS code
ARG PIP_ARGS=""
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY prism_job prism_job
COPY launcher launcher
RUN --mount=type=secret,id=pip.conf \
    /tools/bin/pip --python /opt/prism/bin/python install --no-compile ${PIP_ARGS} -c constraints.txt --no-deps --root /code . \
 && python3.11 -m compileall -qq --invalidation-mode unchecked-hash -s /code /code/opt/prism/lib

# The common base of both images. Bytecode is compiled with unchecked-hash, so changed file dates do not matter. Libraries
# write only below /cache and /tmp: mount both, and the root file system can be read-only.
FROM ${BASE_IMAGE} AS runtime
RUN echo 'prism:x:10001:10001:PRISM:/cache:/usr/sbin/nologin' >> /etc/passwd && echo 'prism:x:10001:' >> /etc/group \
 && install -d -o 10001 -g 0 -m 0775 /cache /work \
 && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
ENV PATH=/opt/prism/bin:${PATH} LANG=C.UTF-8 USER=prism \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1 \
    HOME=/cache TMPDIR=/tmp XDG_CACHE_HOME=/cache XDG_CONFIG_HOME=/cache/config \
    PRISM_CACHE=/cache/prism HF_HOME=/cache/huggingface HF_HUB_DISABLE_TELEMETRY=1 MPLCONFIGDIR=/cache/matplotlib \
    TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor TORCH_EXTENSIONS_DIR=/cache/torch_extensions
WORKDIR /work
USER 10001:10001

FROM runtime AS operator
COPY --from=operator-packages /opt/prism /opt/prism
COPY --from=code /code/opt/prism /opt/prism
ENTRYPOINT ["prism"]
CMD ["operator"]
ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
ENV PRISM_REVISION=${REVISION}
LABEL org.opencontainers.image.title="prism-operator" \
      org.opencontainers.image.description="PRISM's command and operator, without the job" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

FROM runtime AS worker
COPY --from=worker-packages /opt/prism /opt/prism
COPY --from=code /code/opt/prism /opt/prism
# On a base without NVIDIA's settings, this sets which parts of the driver the container runtime mounts.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["python", "-P", "-m", "prism_job"]
ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
ENV PRISM_REVISION=${REVISION}
LABEL org.opencontainers.image.title="prism-worker" \
      org.opencontainers.image.description="PRISM's job: plan, extract, reduce" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

# The operator's and the trainer's images: docker build --target operator|trainer .
#
#   BASE_IMAGE  any image with Python 3.11 or newer. The default serves users; Trainyard's own tests have Debian images
#               made by `python -m devcluster.images base`.
#   TORCH       pypi: install locks/torch.txt (for the CPU build, or another CUDA, regenerate that lock by
#               `python -m devcluster.images.locks torch --torch-backend cpu` and give PIP_EXTRA_INDEX_URL);
#               base: BASE_IMAGE has torch >= 2.10 and numpy already, as vendors' images have.
#   EXTRAS      examples: also scikit-learn, which the digits example reads its data from.
#   wheels      an additional build context (--build-context wheels=FOLDER): a folder of wheels. Nothing is downloaded
#               then. Its folder `pip`, if there, is an unpacked pip for base images that have none.
#
# Layers go from what changes least to what changes most, so that a change of Trainyard's code is a layer of some
# hundred kilobytes. All byte code is compiled here and never checked against its source ("unchecked-hash"): containers
# run as user 65532 with a read-only root and could not cache it, and the files have no useful times.

ARG BASE_IMAGE=python:3.13-slim

FROM scratch AS wheels

# ---- an environment that both sees the base image's packages and is found without PYTHONPATH, which users may set
FROM ${BASE_IMAGE} AS environment
RUN set -eu; umask 022; \
    python3 -m venv --without-pip --system-site-packages /opt/trainyard/venv; \
    site=$(/opt/trainyard/venv/bin/python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
    printf '/opt/trainyard/app\n/opt/trainyard/lib\n' > "$site/trainyard.pth"; \
    mkdir /opt/trainyard/app /opt/trainyard/lib /opt/trainyard/etc; \
    cp /etc/passwd /etc/group /opt/trainyard/etc/; \
    echo 'trainyard:x:65532:65532:Trainyard:/tmp:/usr/sbin/nologin' >> /opt/trainyard/etc/passwd; \
    echo 'trainyard:x:65532:' >> /opt/trainyard/etc/group

# ---- locked packages of the operator
FROM ${BASE_IMAGE} AS operator-lib
COPY locks/operator.txt /build/
RUN --mount=type=bind,from=wheels,target=/wheels \
    set -eu; umask 022; \
    if [ -d /wheels/pip ]; then export PYTHONPATH=/wheels/pip PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels; fi; \
    python3 -m pip install --quiet --disable-pip-version-check --no-cache-dir --root-user-action=ignore \
      --no-compile --only-binary :all: --require-hashes --target /lib-new -r /build/operator.txt; \
    rm -rf /lib-new/bin; \
    python3 -m compileall -q -j 0 -s /lib-new -p /opt/trainyard/lib --invalidation-mode unchecked-hash /lib-new

# ---- locked packages of the trainer, torch aside
FROM ${BASE_IMAGE} AS trainer-lib
COPY locks/trainer.txt /build/
RUN --mount=type=bind,from=wheels,target=/wheels \
    set -eu; umask 022; \
    if [ -d /wheels/pip ]; then export PYTHONPATH=/wheels/pip PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels; fi; \
    python3 -m pip install --quiet --disable-pip-version-check --no-cache-dir --root-user-action=ignore \
      --no-compile --only-binary :all: --require-hashes --target /lib-new -r /build/trainer.txt; \
    rm -rf /lib-new/bin; \
    python3 -m compileall -q -j 0 -s /lib-new -p /opt/trainyard/lib --invalidation-mode unchecked-hash /lib-new

# ---- torch, and what the examples need
FROM environment AS trainer-environment
ARG TORCH=pypi
ARG EXTRAS=
ARG PIP_EXTRA_INDEX_URL=
COPY locks/torch.txt locks/examples.txt /build/
RUN --mount=type=bind,from=wheels,target=/wheels \
    set -eu; umask 022; \
    case "$TORCH" in pypi) set -- -r /build/torch.txt;; base) set --;; \
      *) echo "TORCH is '$TORCH': it must be pypi or base" >&2; exit 2;; esac; \
    case "$EXTRAS" in '') ;; examples) set -- "$@" -r /build/examples.txt;; \
      *) echo "EXTRAS is '$EXTRAS': it must be empty or examples" >&2; exit 2;; esac; \
    if [ $# -gt 0 ]; then \
      if [ -d /wheels/pip ]; then export PYTHONPATH=/wheels/pip PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels; fi; \
      python3 -m pip --python /opt/trainyard/venv/bin/python3 install --quiet --disable-pip-version-check --no-cache-dir \
        --root-user-action=ignore --no-compile --only-binary :all: --require-hashes "$@"; \
      python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/trainyard/venv/lib; \
    fi; \
    /opt/trainyard/venv/bin/python3 -c 'import importlib.metadata as m; v = m.version("torch").split(".")[:2]; \
      assert tuple(map(int, v)) >= (2, 10), f"torch {v} of the base image is older than 2.10 (CVE-2026-24747)"'

# ---- our own code: modules, and as much of a distribution as importlib.metadata needs to tell the version
FROM ${BASE_IMAGE} AS metadata
COPY pyproject.toml /build/
RUN python3 -c 'import pathlib, tomllib; \
      about = tomllib.loads(pathlib.Path("/build/pyproject.toml").read_text())["project"]; \
      folder = pathlib.Path("/app/{name}-{version}.dist-info".format(**about)); folder.mkdir(parents=True); \
      text = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".format(**about); \
      (folder / "METADATA").write_text(text)'

FROM ${BASE_IMAGE} AS operator-app
COPY operator/trainyard_api /app/trainyard_api
COPY operator/trainyard_operator /app/trainyard_operator
COPY --from=metadata /app /app
RUN python3 -m compileall -q -s /app -p /opt/trainyard/app --invalidation-mode unchecked-hash /app

FROM ${BASE_IMAGE} AS trainer-app
COPY operator/trainyard_api /app/trainyard_api
COPY trainer-image/trainyard /app/trainyard
COPY trainer-image/trainyard_agent /app/trainyard_agent
COPY --from=metadata /app /app
RUN python3 -m compileall -q -s /app -p /opt/trainyard/app --invalidation-mode unchecked-hash /app

# ---- the images
FROM ${BASE_IMAGE} AS operator
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="trainyard-operator" \
      org.opencontainers.image.description="Trains PyTorch models on Kubernetes and does not lose work: the operator" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
ENV PATH=/opt/trainyard/venv/bin:/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 LANG=C.UTF-8 HOME=/tmp
COPY --from=environment /opt/trainyard/etc /etc
COPY --from=environment /opt/trainyard/venv /opt/trainyard/venv
COPY --from=operator-lib /lib-new /opt/trainyard/lib
USER 65532:65532
WORKDIR /
ENTRYPOINT ["python3", "-m", "trainyard_operator", "run"]
COPY --from=operator-app /app /opt/trainyard/app

FROM ${BASE_IMAGE} AS trainer
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="trainyard-trainer" \
      org.opencontainers.image.description="Trains PyTorch models on Kubernetes and does not lose work: agent and library" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
ENV PATH=/opt/trainyard/venv/bin:/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 LANG=C.UTF-8 HOME=/tmp
COPY --from=trainer-environment /opt/trainyard/etc /etc
COPY --from=trainer-environment /opt/trainyard/venv /opt/trainyard/venv
COPY --from=trainer-lib /lib-new /opt/trainyard/lib
USER 65532:65532
WORKDIR /
ENTRYPOINT ["python3", "-m", "trainyard_agent"]
COPY --from=trainer-app /app /opt/trainyard/app

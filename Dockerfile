# SynthCube in a container. For a CPU:   docker build -t synthcube .
# for NVIDIA GPUs:                        docker build -t synthcube --build-arg TORCH=cuda .
# Both are described in docs/how-to/docker.md, and --build-arg ENGINE=flower in docs/federation.md.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS dependencies
# cpu, or cuda: the CUDA build of PyTorch, and DeepSpeed.
ARG TORCH=cpu
# Where pip finds PyTorch without CUDA; empty where the usual index has it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG DEEPSPEED=deepspeed==0.19.8
# flower, nvflare or openfl: with that engine of federations, which has a lock file of its own.
ARG ENGINE=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build

# pip and the build backend stay in /tools; only /app goes into the image.
RUN python3 -m venv /tools \
 && python3 -m venv --without-pip /app \
 && /tools/bin/python -m pip install --quiet "pip>=25.1" "hatchling>=1.27"

# The dependencies come before the source: a change of code does not install them anew. The network
# that evaluate compares images with is the extra `perceptual`, whose wheel holds its weights. Of the
# other runtimes only `openvino` is here, for the size of the image. `histology` reads whole slides.
# What only tests and builds of the libraries need goes, a fifth of them: there is no compiler in the
# image. Of OpenVINO stays what our code reaches: the CPU, its own files, and networks of PyTorch.
# Some files are for newer Pythons and are not compiled.
COPY pyproject.toml constraints*.txt ./
RUN case "${TORCH}" in \
      cpu) extra="${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}}" ;; \
      cuda) extra="${DEEPSPEED}" ;; \
      *) echo "TORCH is ${TORCH}: it must be cpu or cuda" >&2; exit 2 ;; \
    esac \
 && /tools/bin/python -c "import tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [project['optional-dependencies'][name] \
 for name in 'dicom histology perceptual openvino privacy ${ENGINE}'.split()]; \
print(*project['dependencies'], *(each for extra in extras for each in extra), sep='\n')" \
    > requirements.txt \
 && /tools/bin/python -m pip --python /app/bin/python install --quiet --no-compile \
    --constraint "constraints${ENGINE:+-${ENGINE}}.txt" --requirement requirements.txt ${extra} \
 && cd /app/lib/python3*/site-packages \
 && find . -path '*.dist-info' -prune -o -type d \( -name test -o -name tests \) -prune \
    -exec rm -rf {} + \
 && find . -name '*.a' -delete \
 && find torch/bin -mindepth 1 -maxdepth 1 ! -name torch_shm_manager -exec rm -rf {} + \
 && rm -rf torch/include torch/share openvino/include openvino/cmake \
 && cd openvino/libs \
 && rm -f cache.json libopenvino_intel_[gn]pu_plugin.so \
 && find . -name '*_frontend.so*' ! -name '*_ir_*' ! -name '*_pytorch_*' -delete \
 && { /app/bin/python -m compileall -qq -j 0 /app/lib || true; } \
 && chmod -R a+rX /app

FROM dependencies AS project
COPY README.md LICENSE ./
COPY src src
RUN /tools/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir wheels . \
 && /tools/bin/python -m pip --python /app/bin/python install --quiet --no-deps --compile \
    --root /project wheels/*.whl \
 && chmod -R a+rX /project

FROM ${BASE_IMAGE}
COPY --from=dependencies /app /app
COPY --from=project /project/app /app
# Nothing but /tmp and the output folder is ever written, whoever runs the container.
ENV HOME=/tmp USER=synthcube LOGNAME=synthcube \
    SYNTHCUBE_CACHE=/tmp/synthcube-cache XDG_CACHE_HOME=/tmp/cache HF_HOME=/tmp/huggingface \
    TORCH_HOME=/tmp/torch TORCHINDUCTOR_CACHE_DIR=/tmp/inductor TRITON_CACHE_DIR=/tmp/triton \
    MPLCONFIGDIR=/tmp/matplotlib NUMBA_CACHE_DIR=/tmp/numba \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 LC_ALL=C.UTF-8
WORKDIR /tmp
USER 10001:10001
ENTRYPOINT ["/app/bin/synthcube"]

# Last, so that another commit changes no layer.
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="SynthCube" \
      org.opencontainers.image.description="Generative models of medical images: train, sample, export" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"

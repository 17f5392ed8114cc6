# Two images. The last stage, the default, runs the service: no PyTorch, no compiler, no root.
#   docker build -t tilewright .
#   docker run -p 8080:8080 -v "$PWD/out/b:/bundle:ro" tilewright
# The stage `export` builds bundles, with PyTorch for CPUs:
#   docker build --target export -t tilewright-export .
#   docker run -v "$PWD:/work" tilewright-export export build hitoksr --weights demo/hitoksr -o out/b --pack

FROM python:3.11-bookworm AS wheel
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt build setuptools cmake \
    && python -m build --no-isolation --wheel -C--build-option=--native --outdir /wheels

FROM python:3.11-slim-bookworm AS export
COPY --from=wheel /wheels /wheels
COPY constraints.txt /wheels/
RUN pip install --no-cache-dir "$(grep '^torch==' /wheels/constraints.txt)" --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir --constraint /wheels/constraints.txt "$(echo /wheels/tilewright-*.whl)[cpu,openvino,export]" \
    && useradd --create-home --uid 10001 tilewright
USER 10001
WORKDIR /work
ENTRYPOINT ["tilewright"]
CMD ["--help"]

FROM python:3.11-slim-bookworm AS runtime
COPY --from=wheel /wheels /wheels
COPY constraints.txt /wheels/
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt "$(echo /wheels/tilewright-*.whl)[cpu,openvino,text,serve]" \
    && rm -r /wheels \
    && useradd --create-home --uid 10001 tilewright \
    && install --directory --owner tilewright --mode 700 /state
USER 10001
WORKDIR /home/tilewright
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/v2/health/live', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tilewright"]
CMD ["runtime", "serve", "--bundle", "/bundle", "--host", "0.0.0.0", "--state-dir", "/state"]

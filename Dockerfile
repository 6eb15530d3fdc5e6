# The binary is static and the image holds nothing else: no shell, no package
# manager, nothing to patch but verve itself.
#
# It needs BuildKit (Docker 20.10 with DOCKER_BUILDKIT=1, or 23 and later) or podman
# 4.3 with --format docker, as its own format has no health check. It is built where
# the builder runs and for where the image runs: Go crosses over by itself, faster than
# an emulated processor would build.
FROM --platform=$BUILDPLATFORM golang:1.26.8-trixie AS build
WORKDIR /src

# Modules first: they change seldom, and the layer is then kept.
COPY go.mod go.sum ./
RUN go mod download

COPY . .
ARG VERSION=devel
ARG TARGETOS
ARG TARGETARCH
RUN --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -ldflags="-s -w -X main.version=${VERSION}" -o /out/verve .

# A volume takes the owner of the folder it is mounted over. Without this one it
# would belong to root, and the server could not write to it.
RUN mkdir -p /out/data && chmod 0700 /out/data

FROM scratch
# For Kafka, Redis and callbacks over TLS.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build --chown=65532:65532 /out/data /data
COPY --from=build /out/verve /verve

# By number, so that runAsNonRoot can be checked without a passwd file.
USER 65532:65532

# The epoch's state, the spool and the counts file. A volume also keeps the
# instance's name, which a new container would lose with its host name.
ENV VERVE_DATA_DIR=/data
VOLUME /data

# Inside a container loopback reaches nobody who may want metrics or probes; who
# can reach this port is decided by what the container's network publishes.
ENV VERVE_ADMIN_LISTEN=:8081
EXPOSE 8080 8081

STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=3 \
    CMD ["/verve", "healthcheck"]
ENTRYPOINT ["/verve"]

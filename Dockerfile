# The container image of the driver: one static binary, and the programs that make, check and grow filesystems.
# For other platforms: docker buildx build --platform linux/amd64,linux/arm64 .

FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY cmd ./cmd
COPY driver ./driver
COPY nbdexport ./nbdexport
COPY qcow ./qcow
ARG TARGETOS=linux
ARG TARGETARCH
ARG VERSION=dev
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$VERSION" -o /qcow-csi ./cmd/qcow-csi

# The Debian release whose filesystem programs the tests use.
FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        btrfs-progs \
        e2fsprogs \
        kmod \
        mount \
        util-linux \
        xfsprogs \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /qcow-csi /usr/local/bin/qcow-csi
COPY LICENSE /usr/share/doc/qcow-csi/copyright
LABEL org.opencontainers.image.title="qcow-csi" \
      org.opencontainers.image.description="Kubernetes CSI driver that keeps each volume in a qcow2 image" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["/usr/local/bin/qcow-csi"]

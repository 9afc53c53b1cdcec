package nbdexport

import "github.com/qcow-csi/qcow-csi/qcow"

// NewImageBackend returns a backend that serves img. Closing the image stays with the caller, after every Serve,
// ServeConn and ServeTransmission that uses the backend has returned.
func NewImageBackend(img *qcow.Image) Backend {
	return imageBackend{img, uint32(img.Info().ClusterSize)}
}

// imageBackend is an image that describes itself as an export.
type imageBackend struct {
	*qcow.Image
	cluster uint32 // bytes
}

// Info implements Backend. Requests of any length are efficient, but only whole clusters are given back, so a cluster
// is what clients should prefer. The caches of an image are shared by all connections: one Flush covers them all.
func (b imageBackend) Info() Info {
	return Info{
		Size: b.Size(), ReadOnly: b.ReadOnly(),
		MinimumBlock: uint32(b.Alignment()), PreferredBlock: max(4096, b.cluster), MultiConn: true,
	}
}

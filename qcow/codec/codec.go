// Package codec compresses and decompresses clusters (specification, "Compressed Clusters Descriptor" and the compression type in
// "Additional fields").
//
// A compressed cluster is a stream that yields one cluster. The image does not say where it ends, only which
// 512-byte sectors hold it: behind the end there is padding, or the next stream, which may share the last sector. So a
// stream must say itself where it ends, and whoever reads it must stop there.
//
// Streams come from images, and images from anybody. Whatever a stream claims about itself, decompressing one writes nothing behind
// the destination, takes time in proportion to the bytes given and asked for, and allocates nothing that grows with the claim.
//
// Everything here may be called concurrently. Buffers and tables, up to a few megabytes per concurrent call, are kept for
// the next one until the garbage collector wants them.
package codec

import (
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Type is the compression type of an image, as its header stores it.
type Type uint8

const (
	Deflate Type = 0 // RFC 1951, without the header and the checksum of zlib; the only one before compression types
	Zstd    Type = 1 // RFC 8878
)

// String returns the name by which QEMU's tools know the type.
func (t Type) String() string {
	switch t {
	case Deflate:
		return "zlib"
	case Zstd:
		return "zstd"
	}
	return fmt.Sprintf("compression type %d", uint8(t))
}

// Decompress fills dst, one cluster, from the stream at the beginning of src, which are the bytes that the cluster's descriptor
// covers. Whatever is behind the end of the stream is ignored.
//
// The error is format.ErrCorrupt when the stream is damaged or yields less than dst, and dst then holds anything;
// format.ErrUnsupported when t is unknown. A deflate stream that yields more than dst is good, as it is for QEMU; a zstd
// stream must end with dst.
func Decompress(t Type, dst, src []byte) error {
	var err error
	switch t {
	case Deflate:
		err = inflate(dst, src)
	case Zstd:
		err = unzstd(dst, src)
	default:
		return unknown(t)
	}
	if err != nil {
		// The cause is told, but not wrapped: an io.EOF of the stream is none of the image.
		return fmt.Errorf("%w: %v stream of a compressed cluster: %v", format.ErrCorrupt, t, err) //nolint:errorlint // as said
	}
	return nil
}

// Compress appends the compressed form of src, one cluster, to dst and returns the result. It returns ok = false, and dst as it was,
// when that form would not be shorter than src: such a cluster is stored as it is. With room for len(src)-1 more bytes in
// dst nothing is allocated. The error is format.ErrUnsupported when t is unknown.
//
// The streams are ones that QEMU, and everything else that reads such images, can read: deflate refers back no farther than
// 4 KiB, the window of QEMU's own streams; zstd is one frame that declares its content's size, with a checksum.
func Compress(t Type, dst, src []byte) (out []byte, ok bool, err error) {
	switch t {
	case Deflate:
		return deflate(dst, src)
	case Zstd:
		out, ok = toZstd(dst, src)
		return out, ok, nil
	}
	return dst, false, unknown(t)
}

func unknown(t Type) error { return fmt.Errorf("%w: %v", format.ErrUnsupported, t) }

package codec

import (
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// maxWindow is the largest window that a frame may declare, in bytes: what the reference implementation takes unless told
// otherwise. It costs nothing here, where the destination is the window.
const maxWindow = 128 << 20

var zstdDecoders = sync.Pool{New: func() any {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		panic(err) // only for options that contradict each other
	}
	return d
}}

// unzstd decodes frame by frame, until dst is full at the end of one. A decoder that were given all of src would take what is
// behind the stream for one more frame.
func unzstd(dst, src []byte) error {
	d := zstdDecoders.Get().(*zstd.Decoder)
	defer zstdDecoders.Put(d)
	for filled := 0; filled < len(dst); {
		n, content, err := frameLength(src)
		if err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", filled, len(dst), err)
		}
		if content {
			out, err := d.DecodeAll(src[:n], dst[filled:filled:len(dst)])
			if err != nil {
				return err
			}
			filled += copy(dst[filled:], out)
		}
		src = src[n:]
	}
	return nil
}

var errCutOff = errors.New("it is cut off")

// Blocks, of which a frame consists (RFC 8878, section 3.1.1.2).
const (
	blockHeader    = 3
	blockRLE       = 1
	checksumLength = 4
)

// frameLength returns how many bytes of src its first frame takes, and whether it has content that counts. It looks at
// headers only, and judges nothing else.
func frameLength(src []byte) (n uint64, content bool, err error) {
	var h zstd.Header
	if err := h.Decode(src); err != nil {
		return 0, false, err
	}
	end := uint64(len(src))
	n = uint64(h.HeaderSize)
	if h.Skippable {
		n += uint64(h.SkippableSize)
	}
	for last := h.Skippable; !last; {
		if n+blockHeader > end {
			return 0, false, errCutOff
		}
		b := uint64(src[n]) | uint64(src[n+1])<<8 | uint64(src[n+2])<<16
		last = b&1 != 0
		size := b >> 3
		if b>>1&3 == blockRLE {
			size = 1 // the byte to repeat
		}
		n += blockHeader + size
	}
	if h.HasCheckSum {
		n += checksumLength
	}
	if n > end {
		return 0, false, errCutOff
	}
	return n, !h.Skippable, nil
}

// zstdEncoder makes frames, one after the other, in a buffer of its own: one that turns out too long must not make the caller's grow.
type zstdEncoder struct {
	e   *zstd.Encoder
	out []byte
}

var zstdEncoders = sync.Pool{New: func() any {
	e, err := zstd.NewWriter(
		nil,
		zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderLevel(zstd.SpeedDefault),
		zstd.WithWindowSize(2<<20), // the largest cluster
		zstd.WithSingleSegment(true),
		zstd.WithLowerEncoderMem(true),
	)
	if err != nil {
		panic(err) // only for options that contradict each other
	}
	return &zstdEncoder{e: e}
}}

func toZstd(dst, src []byte) (out []byte, ok bool) {
	c := zstdEncoders.Get().(*zstdEncoder)
	defer zstdEncoders.Put(c)
	c.out = c.e.EncodeAll(src, c.out[:0])
	if len(c.out) >= len(src) {
		return dst, false
	}
	return append(dst, c.out...), true
}

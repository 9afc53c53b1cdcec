package qcow

import (
	"io"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// ReadAt implements io.ReaderAt on the virtual disk: a read that reaches past its end returns the bytes before the end and
// io.EOF. It fails with ErrCorrupt on tables that contradict themselves or the length of the file, and on compressed data that is
// damaged.
func (img *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, format.Invalidf("negative offset %d", off)
	}
	short := error(nil)
	if left := max(img.Size()-off, 0); int64(len(p)) > left {
		p, short = p[:left], io.EOF
	}
	if len(p) == 0 {
		return 0, short
	}
	epoch, err := img.begin(off, int64(len(p)), false)
	if err != nil {
		return 0, err
	}
	defer img.epochs.leave(epoch)
	n, err := img.readGuest(p, format.GuestOffset(off))
	if err != nil {
		return n, err
	}
	return n, short
}

// ReadExtent reads the first bytes of p, which is not empty, that are alike in that they are stored, or read as zeroes as far as the tables tell. It
// returns how many these are, at least 1, and whether they are zeroes; then it leaves p as it was. A range that reaches past the
// end of the disk is ErrInvalid; other errors are those of [Image.ReadAt].
func (img *Image) ReadExtent(p []byte, off int64) (n int, zero bool, err error) {
	epoch, err := img.begin(off, int64(len(p)), false)
	if err != nil {
		return 0, false, err
	}
	defer img.epochs.leave(epoch)
	m, err := img.lookup(format.GuestOffset(off), uint64(len(p)))
	if err != nil {
		return 0, false, err
	}
	p = p[:m.length]
	switch {
	case m.absent():
		return img.under().readExtent(p, off)
	case m.zero():
		return len(p), true, nil
	}
	return len(p), false, img.readMapped(p, format.GuestOffset(off), &m)
}

// readGuest reads from the virtual disk, inside an epoch. It returns how many bytes it read before an error.
func (img *Image) readGuest(p []byte, off format.GuestOffset) (int, error) {
	for done := 0; done < len(p); {
		m, err := img.lookup(off+format.GuestOffset(done), uint64(len(p)-done))
		if err != nil {
			return done, err
		}
		part := p[done:][:m.length]
		if err := img.readMapped(part, off+format.GuestOffset(done), &m); err != nil {
			return done, err
		}
		done += len(part)
	}
	return len(p), nil
}

// readMapped reads what m says of the bytes at off.
func (img *Image) readMapped(p []byte, off format.GuestOffset, m *mapping) error {
	switch {
	case m.kind == format.Data:
		return img.readHost(p, m.host, off)
	case m.kind == format.Compressed:
		return img.readCompressed(p, off, m)
	case m.absent():
		return img.under().readAt(p, int64(off))
	}
	clear(p)
	return nil
}

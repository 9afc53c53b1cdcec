package qcow

import (
	"errors"
	"io"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// ReadAt implements io.ReaderAt on the virtual disk: a read that reaches past its end returns the bytes before the end and
// io.EOF. It fails with ErrCorrupt on tables that contradict themselves or the length of the file, and with
// ErrUnsupported on compressed clusters.
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
	for done := 0; done < len(p); {
		m, err := img.lookup(format.GuestOffset(off)+format.GuestOffset(done), uint64(len(p)-done))
		if err != nil {
			return done, err
		}
		part := p[done:][:m.length]
		if m.kind != format.Data {
			clear(part)
		} else if n, err := img.readData(part, m.host); err != nil {
			return done + n, err
		}
		done += len(part)
	}
	return len(p), short
}

// readData reads guest data. The file may end inside its last cluster; the rest of that reads as zeroes.
func (img *Image) readData(p []byte, host format.HostOffset) (int, error) {
	n, err := img.file.ReadAt(p, int64(host))
	if err != nil && !errors.Is(err, io.EOF) {
		return n, err
	}
	clear(p[n:])
	return len(p), nil
}

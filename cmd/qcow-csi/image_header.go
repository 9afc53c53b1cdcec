package main

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// firstTableRead is how much of a snapshot table is read at first: nothing says how long it is.
const firstTableRead = 64 << 10

// headers is what an image says of itself, without its tables, without a passphrase, and without any other file.
type headers struct {
	*format.Header
	size      int64 // length of the file
	snapshots []format.Snapshot
	bitmaps   []format.Bitmap // none where the image says that they are not valid
	luks      []byte          // the LUKS header without key material; nil where there is none
}

// readHeaders reads them from f. It fails with ErrUnsupported on an image with features that are not known.
func readHeaders(f storage.File) (*headers, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	h := &headers{size: size}
	b, err := h.read(f, 0, 1<<format.MaxClusterBits)
	if err != nil {
		return nil, err
	}
	if h.Header, err = format.DecodeHeader(b); err != nil {
		return nil, err
	}
	const known = format.IncompatDirty | format.IncompatCorrupt | format.IncompatDataFile | format.IncompatCompression | format.IncompatExtendedL2
	if unknown := h.Incompatible &^ known; unknown != 0 {
		return nil, format.Unsupportedf("header", format.IncompatibleOffset, "incompatible features: %s", h.IncompatibleNames(unknown))
	}
	if err := h.readSnapshots(f); err != nil {
		return nil, err
	}
	if err := h.readBitmaps(f); err != nil {
		return nil, err
	}
	off, n, err := h.Encryption()
	if err == nil && n > 0 {
		h.luks, err = h.read(f, off, min(n, luks.PrefixBytes))
	}
	return h, err
}

// read returns the n bytes of f at off, or those before its end.
func (h *headers) read(f storage.File, off format.HostOffset, n uint64) ([]byte, error) {
	if uint64(off) >= uint64(h.size) {
		return nil, nil
	}
	b := make([]byte, min(n, uint64(h.size)-uint64(off)))
	if n, err := f.ReadAt(b, int64(off)); n < len(b) {
		return nil, fmt.Errorf("read %d bytes at %#x: %w", len(b), uint64(off), errors.Join(err, io.ErrUnexpectedEOF))
	}
	return b, nil
}

func (h *headers) readSnapshots(f storage.File) error {
	for n := uint64(firstTableRead); h.Snapshots > 0; n = min(4*n, format.MaxSnapshotTableBytes) {
		b, err := h.read(f, h.SnapshotsOffset, n)
		if err != nil {
			return err
		}
		if h.snapshots, _, err = format.DecodeSnapshots(b, h.Snapshots); err == nil {
			return nil
		}
		if uint64(len(b)) < n || n == format.MaxSnapshotTableBytes {
			return err
		}
	}
	return nil
}

func (h *headers) readBitmaps(f storage.File) error {
	x, err := h.Bitmaps()
	if err != nil || x == nil || h.Autoclear&format.AutoclearBitmaps == 0 {
		return err
	}
	b, err := h.read(f, x.DirectoryOffset, x.DirectorySize)
	if err != nil {
		return err
	}
	h.bitmaps, err = format.DecodeBitmaps(b, x.Count)
	return err
}

// layer is a file of a chain: an image, or the raw file at its end.
type layer struct {
	path      string   // as the user or, put together with the folder of that, the image above names it
	format    string   // "qcow2" or "raw"
	headers   *headers // nil for a raw file
	size      int64    // of its disk in bytes
	allocated int64    // bytes that the file takes on its file system
}

// backing returns the path of the backing file, "" where there is none.
func (l *layer) backing() string {
	if l.headers == nil || l.headers.BackingFile == "" {
		return ""
	}
	return beside(l.path, l.headers.BackingFile)
}

// data returns the path of the file that holds the guest's data.
func (l *layer) data() string {
	if l.headers == nil || !l.headers.DataFile {
		return l.path
	}
	return beside(l.path, l.headers.DataFileName())
}

// beside returns the path of a file that the image at path calls name.
func beside(path, name string) string {
	if filepath.IsAbs(name) || !strings.Contains(path, "/") {
		return name
	}
	return path[:strings.LastIndexByte(path, '/')+1] + name
}

// readLayer reads the headers of the file f of a chain.
func readLayer(f storage.File, path, fileFormat string) (l *layer, err error) {
	l = &layer{path: path, format: fileFormat}
	if file, ok := f.(*storage.OSFile); ok {
		if l.allocated, err = file.AllocatedBytes(); err != nil {
			return nil, err
		}
	}
	switch fileFormat {
	case formatRaw:
		l.size, err = f.Size()
	case formatQcow2:
		if l.headers, err = readHeaders(f); err == nil {
			l.size = int64(l.headers.Size)
		}
	case "":
		err = format.Unsupportedf("header", 8, "no format is stated for the backing file %s, and formats are not guessed", path)
	default:
		err = format.Unsupportedf("header", 8, "backing file format %q", fileFormat)
	}
	return l, err
}

// The formats of files.
const (
	formatQcow2 = "qcow2"
	formatRaw   = "raw"
)

// readChain reads the headers of the image at path and, if all is said, of the files behind it, the image's own first.
func (a *access) readChain(path string, all bool) (chain []*layer, err error) {
	err = a.withFile(path, true, func(f *storage.OSFile) error {
		l, err := readLayer(f, path, formatQcow2)
		chain = append(chain, l)
		return err
	})
	gate := a.gate(path)
	for err == nil && all && chain[len(chain)-1].backing() != "" {
		var l *layer
		if l, gate, err = readBacking(gate, chain[len(chain)-1]); err == nil {
			chain = append(chain, l)
		}
	}
	return chain, err
}

// readBacking reads the headers of the backing file of an image.
func readBacking(gate qcow.Gate, image *layer) (*layer, qcow.Gate, error) {
	h := image.headers
	opened, err := gate(qcow.Reference{Role: qcow.BackingFile, Name: h.BackingFile, Format: h.BackingFormat(), ReadOnly: true})
	if err != nil {
		return nil, nil, fmt.Errorf("backing file %q of %s: %w", h.BackingFile, image.path, err)
	}
	l, err := readLayer(opened.File, image.backing(), opened.Format)
	if err := errors.Join(err, opened.File.Close()); err != nil {
		return nil, nil, fmt.Errorf("backing file %q of %s: %w", h.BackingFile, image.path, err)
	}
	return l, opened.Gate, nil
}
